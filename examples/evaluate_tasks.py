"""Fine-tune on every task by every method and seed, and print what each is worth, as Markdown.

    make evaluate                                           # all of examples/configs/tasks.yaml: hours on two cores
    python examples/evaluate_tasks.py --tasks water --methods pruned full pixel --seeds 1
    python examples/evaluate_tasks.py --table_only          # what has been run so far
    python examples/evaluate_tasks.py --splits examples/configs/splits.json     # which places are on which side

The file of tasks says for each which script, which options, which metrics, and in which variants; and for each method
the options that make it, which a task may change, or limit to some of its `variants`. A run is a process of its own, so
that its peak of memory is its own, and leaves its `results.json` below `--output_dir`: what is there is not run again,
and an interrupted run is gone on with. Given are the mean over seeds, the standard deviation, and in brackets the 95 %
interval over test places, averaged over seeds.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import parse_arguments, read_mapping
from finetuning_tasks import open_task
from tqdm import tqdm


EXAMPLES = Path(__file__).parent


@dataclass
class Arguments:
    file: str = field(
        default=str(EXAMPLES / "configs" / "tasks.yaml"), metadata={"help": "YAML file of tasks and methods."}
    )
    tasks: list[str] | None = field(default=None, metadata={"help": "Which tasks. Default: all."})
    methods: list[str] | None = field(default=None, metadata={"help": "Which methods. Default: all."})
    seeds: int = field(default=3, metadata={"help": "Runs of each, with seeds from 0."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Where the runs go."})
    table_only: bool = field(default=False, metadata={"help": "Run nothing."})
    splits: str | None = field(
        default=None, metadata={"help": "Run nothing, and list the places to validate and to test on in this file."}
    )


@dataclass(frozen=True)
class Job:
    """One run: a task in one variant, by one method, with one seed."""

    task: str
    variant: str
    method: str
    seed: int
    script: str
    options: dict[str, Any]
    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        """What the script reads."""
        return {**self.options, "seed": self.seed, "output_dir": str(self.folder)}

    @property
    def settings_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")  # a name may hold a dot: no suffix

    def results(self) -> dict[str, Any] | None:
        """Of the finished run, if it is."""
        file = self.folder / "results.json"
        if not file.is_file():
            return None
        if json.loads(self.settings_file.read_text()) != self.settings:
            sys.exit(
                f"{self.folder} was run with other options, see {self.settings_file}: delete the folder to run it "
                "again, or give another --output_dir."
            )
        return json.loads(file.read_text())

    def run(self) -> str | None:
        """Run it in a process of its own; the end of what it said, if it failed."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.settings_file.write_text(json.dumps(self.settings, indent=1))
        log = self.folder.with_name(f"{self.folder.name}.log")
        with log.open("w") as output:
            command = [sys.executable, str(EXAMPLES / self.script), str(self.settings_file)]
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        return None if code == 0 else "\n".join(log.read_text().splitlines()[-5:])


def read_file(args: Arguments) -> dict[str, Any]:
    """Methods, and the tasks that were asked for."""
    content = read_mapping(args.file)
    content.setdefault("methods", {})  # where each task has its own
    for kind in ("tasks", "methods"):
        if not isinstance(content.get(kind), dict):
            sys.exit(f"{args.file} needs a mapping `{kind}`.")
    methods = dict.fromkeys(method for task in content["tasks"] for method in methods_of(content, task))
    for kind, known in (("tasks", content["tasks"]), ("methods", methods)):
        if unknown := [name for name in getattr(args, kind) or [] if name not in known]:
            sys.exit(f"{args.file} has no {kind} {unknown}; it has {list(known)}.")
    content["tasks"] = {task: content["tasks"][task] for task in args.tasks or content["tasks"]}
    return content


def methods_of(content: dict[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """All methods with their options, those changed that the task changes, and those added that only the task has."""
    of_task = content["tasks"][task].get("methods") or {}
    names = [*content["methods"], *(name for name in of_task if name not in content["methods"])]
    return {name: {**(content["methods"].get(name) or {}), **(of_task.get(name) or {})} for name in names}


def plan(content: dict[str, Any], args: Arguments) -> list[Job]:
    """All runs, in the order of the file; seeds outermost, so that the first results are of everything."""
    jobs = []
    for seed in range(args.seeds):
        for task, spec in content["tasks"].items():
            for variant, changes in (spec.get("variants") or {"": {}}).items():
                for method, of_method in methods_of(content, task).items():
                    script = of_method.pop("script", spec["script"])
                    if variant not in of_method.pop("variants", [variant]) or method not in (args.methods or [method]):
                        continue
                    options = {**(spec.get("options") or {}), **(changes or {}), **of_method}
                    if options.get("criterion") == "random":
                        options["pruning_seed"] = seed
                    if script == "pixel_baseline.py":
                        options["task_script"] = spec["script"]
                    folder = Path(args.output_dir) / task / (variant or "all") / f"{method}-{seed}"
                    jobs.append(Job(task, variant, method, seed, script, options, folder))
    return jobs


def splits(content: dict[str, Any], jobs: list[Job]) -> dict[str, dict[str, list[str]]]:
    """The places of each task that are not trained on; its variants and methods share them."""
    found = {}
    for task in content["tasks"]:
        job = next(job for job in jobs if job.task == task)
        data = open_task(content["tasks"][task]["script"], job.options).data
        held_out = {side: chips.places() for side, chips in data.sides.items() if side != "train"}
        found[task] = {side: sorted(set(places.tolist())) for side, places in held_out.items()}
    return found


def cell(results: list[dict[str, Any]], metric: str) -> str:
    """Mean over seeds, deviation, interval."""
    values = [entry["metrics"][metric] for entry in results]
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.3f}"
    bounds = [entry["intervals"][metric] for entry in results if metric in entry["intervals"]]
    if bounds:
        low, high = (statistics.mean(ends) for ends in zip(*bounds))
        text += f" [{low:.3f}, {high:.3f}]"
    return text


def report(content: dict[str, Any], jobs: list[Job]) -> str:
    """A table of each task."""
    parts = []
    for task, spec in content["tasks"].items():
        metrics = spec["metrics"]
        sizes = ["parameters", "ms per chip", "seconds to train", "peak MB"]
        rows = [["variant", "method", "seeds", *metrics, *sizes]]
        rows.append(["---"] * len(rows[0]))
        for variant in spec.get("variants") or [""]:
            for method in methods_of(content, task):
                mine = [job for job in jobs if (job.task, job.variant, job.method) == (task, variant, method)]
                done = [results for job in mine if (results := job.results())]
                if not done:
                    continue
                row = [variant, method, str(len(done)), *(cell(done, metric) for metric in metrics)]
                row.append(f"{done[0]['parameters']['all']:,}")
                for key, digits in (("ms_per_chip", 1), ("seconds", 0), ("peak_memory_mb", 0)):
                    row.append(f"{statistics.median(entry[key] for entry in done):.{digits}f}")
                rows.append(row)
        if len(rows) > 2:
            counts = done_counts(task, jobs)
            parts.append(f"### {spec['title']}\n\n{counts}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def done_counts(task: str, jobs: list[Job]) -> str:
    """How many samples and places there are on each side, of the first run that is there."""
    results = next(found for job in jobs if job.task == task and (found := job.results()))
    verbs = {"train": "train on", "validation": "validate", "test": "test"}
    sides = [
        f"{count} samples of {results['places'][side]} places to {verbs[side]}"
        for side, count in results["samples"].items()
    ]
    return f"Of the first variant: {', '.join(sides)}."


def main(args: Arguments) -> None:
    content = read_file(args)
    jobs = plan(content, args)
    if args.splits is not None:
        Path(args.splits).write_text(json.dumps(splits(content, jobs), indent=0) + "\n")
        return
    failed = []
    if not args.table_only:
        for job in tqdm(jobs, desc="Evaluating", unit="run"):
            if job.results() is None and (words := job.run()):
                failed.append(f"{job.folder}: {words}")
    print(report(content, jobs) or f"No run is finished in {args.output_dir}.")
    if failed:
        sys.exit("These runs failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    try:
        main(*parse_arguments((Arguments,), __doc__))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on.")
