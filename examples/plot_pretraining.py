"""Draw the held-out reconstruction error of each modality, and the specialisation of the experts, against steps.

    python examples/plot_pretraining.py --logs outputs/nano/log.jsonl --output nano.png
    python examples/plot_pretraining.py --logs outputs/full-*/log.jsonl outputs/plain-*/log.jsonl --output compare.png

Logs are those of `run_pretraining.py`. Runs whose folders differ only in a number after the last `-`, as seeds do, are
one curve: their mean, and a band from the lowest to the highest.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from command_line import parse_arguments
from matplotlib.figure import Figure


INFORMATION = "evaluation/normalized_mutual_information"
ERROR = "evaluation/reconstruction/"


@dataclass
class Arguments:
    logs: list[str] = field(default_factory=list, metadata={"help": "Files log.jsonl of runs."})
    output: str = field(default="pretraining.png", metadata={"help": "Picture to write."})


def read_log(file: Path) -> dict[int, dict[str, float]]:
    """Evaluations by step."""
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        sys.exit(f"Cannot read {file}: {error}")
    return {line["step"]: line for line in lines if "evaluation/loss" in line}


def main(args: Arguments) -> None:
    groups: dict[str, list[dict[int, dict[str, float]]]] = {}
    for file in map(Path, args.logs):
        name = file.parent.name
        stem, _, last = name.rpartition("-")
        groups.setdefault(stem if last.isdigit() else name, []).append(read_log(file))
    if not any(run for runs in groups.values() for run in runs):
        sys.exit("The logs hold no evaluations. Give files log.jsonl of run_pretraining.py with --logs.")
    first = next(line for runs in groups.values() for run in runs for line in run.values())
    panels = sorted(key for key in first if key.startswith(ERROR))
    panels += [INFORMATION] if INFORMATION in first else []
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels):
        for name, runs in groups.items():
            steps = sorted(set.intersection(*(set(run) for run in runs)))
            values = np.array([[run[step].get(panel, np.nan) for step in steps] for run in runs])
            axis.plot(steps, values.mean(axis=0), label=name)
            if len(runs) > 1:
                axis.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.25, linewidth=0)
        is_error = panel.startswith(ERROR)
        axis.set_title(f"{panel.removeprefix(ERROR)}: error" if is_error else "I(M;E) / min(log M, log E)", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if is_error:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.tick_params(which="minor", labelsize=7)
        else:
            axis.set_ylim(0, 1)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if len(groups) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(groups), fontsize=9)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=130)
    print(args.output)


if __name__ == "__main__":
    main(*parse_arguments((Arguments,), __doc__))
