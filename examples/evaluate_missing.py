"""What a fine-tuned model loses where a sensor is missing at inference: its metrics against the share of test samples
that lack it.

    python examples/run_pixel_regression.py --shards shards/biomass --modalities s1 s2 --modality_dropout 0.3 \\
        --output_dir outputs/biomass
    python examples/evaluate_missing.py --runs outputs/biomass --missing s2
    # several models beside each other, in one picture
    python examples/evaluate_missing.py --runs outputs/biomass outputs/other --missing s2 --output outputs/missing.json

Test samples are those of the run, and the share is of those that have the sensor and another one. Larger shares hold
the samples of smaller ones. With `--output` the results go to a JSON file, and the curves to a picture beside it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import Stop, parse_arguments
from finetuning_data import differ_in_size
from finetuning_results import can_draw, count_unread, intervals, predict
from finetuning_tasks import MODEL_CLASSES, Task, open_task

from modeling_mapex import MapexConfig
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.image_processing_mapex import MapexImageProcessor


@dataclass
class Arguments:
    runs: list[str] = field(metadata={"help": "Folders of finished runs of a fine-tuning script."})
    missing: str = field(metadata={"help": "The sensor that is missing."})
    shares: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0], metadata={"help": "Shares of the samples that lack it."}
    )
    batch_size: int = field(default=16, metadata={"help": "Samples of a forward pass."})
    seed: int = field(default=0, metadata={"help": "Chooses the samples."})
    bootstrap: int = field(default=1000, metadata={"help": "Resampled sets of test places, for the intervals."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})


def open_run(folder: Path) -> tuple[Any, Task]:
    """Model and task of a finished run."""
    if not (folder / "results.json").is_file():
        raise Stop(f"{folder} holds no finished run of a fine-tuning script: there is no results.json.")
    config = MapexConfig.from_pretrained(folder / "model")
    scripts = {model_class.__name__: script for script, model_class in MODEL_CLASSES.items()}
    architecture = (config.architectures or ["none"])[0]
    if architecture not in scripts:
        raise Stop(f"The model in {folder} is a {architecture}, not one of {list(scripts)}.")
    script = scripts[architecture]
    task = open_task(script, json.loads((folder / "run.json").read_text()))
    return MODEL_CLASSES[script].from_pretrained(folder / "model").eval(), task


def can_lack(task: Task, missing: str) -> np.ndarray:
    """Test samples that have the sensor and another one, as positions."""
    chips = task.data.sides["test"]
    present = {
        name: np.array([shape is not None for shape in chips.column(f"{stored}__shape")])
        for stored, name in chips.names.items()
    }
    others = [there for name, there in present.items() if name != missing]
    return np.flatnonzero(present[missing] & np.any(others, axis=0))


@torch.inference_mode()
def score(
    model, task: Task, missing: str, lacking: set[int], batch_size: int, counted: list[torch.Tensor] | None = None
) -> tuple[np.ndarray, list[torch.Tensor]]:
    """What the scores keep of each test sample, those of `lacking` without the sensor; and the labels of each batch as
    they counted. To count the same pixels again, pass these as `counted`.
    """
    collator = MapexCollator(MapexImageProcessor.from_config(model.config), **task.collator_options)
    chips, rows, seen = task.data.sides["test"], [], []
    for number, start in enumerate(range(0, len(chips), batch_size)):
        indices = range(start, min(start + batch_size, len(chips)))
        samples = chips.__getitems__(list(indices))
        for index, sample in zip(indices, samples):
            if index in lacking:
                sample["images"] = {**sample["images"], missing: None}
        batch = collator(samples).to(model.device)
        labels = batch["labels"]
        logits, labels = predict(model, batch, batch_size) if labels.ndim == 3 else (model(**batch).logits, labels)
        seen.append(labels)
        rows.append(task.rows(logits, labels if counted is None else counted[number]))
    return np.concatenate(rows), seen


def evaluate(folder: Path, args: Arguments) -> tuple[list[dict[str, Any]], str]:
    """Metrics of a run by share, with their intervals; and the name of the metric that chose the model."""
    model, task = open_run(folder)
    names = list(model.config.modalities)
    if args.missing not in names or len(names) < 2:
        raise Stop(f"The model takes {names}: --missing must be one of several, got {args.missing}.")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    chips = task.data.sides["test"]
    order = np.random.default_rng(args.seed).permutation(can_lack(task, args.missing))
    batch_size = 1 if differ_in_size(chips) else args.batch_size
    # What a sample scores depends on itself alone: twice is enough for any share. The same pixels count in both.
    without, counted = score(model, task, args.missing, set(order.tolist()), batch_size)
    with_all, readable = score(model, task, args.missing, set(), batch_size, counted)
    if unread := sum(map(count_unread, readable, counted)):
        print(f"{unread} labelled pixels have no data around them without {args.missing}: they count at no share.")
    results = []
    for share in args.shares:
        table = with_all.copy()
        lacking = order[: round(share * len(order))]
        table[lacking] = without[lacking]
        results.append(
            {
                "share": share,
                "metrics": task.scores.metrics(table, np.ones(len(table))),
                "intervals": intervals(task.scores, table, chips.places(), args.bootstrap),
            }
        )
    print(f"\n{folder}: {len(order)} of {len(chips)} test samples have {args.missing} and another sensor.\n")
    print(as_table(results, args.missing))
    return results, task.scores.best


def main(args: Arguments) -> dict[str, list[dict[str, Any]]]:
    """Returns the results of each run."""
    if not all(0.0 <= share <= 1.0 for share in args.shares):
        raise Stop(f"--shares lie between 0 and 1, got {args.shares}.")
    if args.output:
        try:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Stop(f"Cannot write --output {args.output}: {error}") from error
    results, metrics = {}, {}
    for folder in args.runs:
        results[folder], metrics[folder] = evaluate(Path(folder), args)
    if len(set(metrics.values())) > 1:
        raise Stop(f"The runs are of different tasks, measured by {metrics}: evaluate them one by one.")
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1))
        if can_draw():
            figure = picture(results, args.missing, next(iter(metrics.values())))
            figure.savefig(Path(args.output).with_suffix(".png"), dpi=120)
    return results


def as_table(results: list[dict[str, Any]], missing: str) -> str:
    metrics = list(results[0]["metrics"])
    lines = [f"| share without {missing} | {' | '.join(metrics)} |", "| --- |" + " --- |" * len(metrics)]
    for entry in results:
        cells = []
        for name in metrics:
            bounds = entry["intervals"].get(name)
            cells.append(f"{entry['metrics'][name]:.4g}" + (" [{:.4g}, {:.4g}]".format(*bounds) if bounds else ""))
        lines.append(f"| {entry['share']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(results: dict[str, list[dict[str, Any]]], missing: str, metric: str):
    """The metric of each run against the share, with its intervals.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axis = figure.subplots()
    for folder, entries in results.items():
        shares = [entry["share"] for entry in entries]
        values = [entry["metrics"][metric] for entry in entries]
        axis.plot(shares, values, marker="o", label=Path(folder).name)
        if all(metric in entry["intervals"] for entry in entries):
            axis.fill_between(shares, *zip(*(entry["intervals"][metric] for entry in entries)), alpha=0.2, linewidth=0)
    if len(results) > 1:
        axis.legend(frameon=False)
    axis.set_xlabel(f"share of samples without {missing}")
    axis.set_ylabel(metric)
    axis.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main(*parse_arguments((Arguments,), __doc__))
