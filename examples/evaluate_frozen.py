r"""What a frozen MAPEX encoder knows of a task: nearest neighbours and logistic regression on its embeddings.

    pip install -e ".[data,evaluate]"
    python examples/evaluate_frozen.py --model examples/checkpoints/mapex-nano --shards data/eurosat_rgb
    # pruned while loading, with few labels, beside the two controls
    python examples/evaluate_frozen.py --model org/mapex-base --shards org/bigearthnet-shards --modalities s1 s2 \
        --bands s2=B04,B03,B02 --experts_per_layer 1 --shots 10 50 all --random_weights --band_statistics \
        --output outputs/frozen/bigearthnet.json
    # several models, and splits that come with the data
    python examples/evaluate_frozen.py --model outputs/nano-{0,1,2}/model --shards data/task \
        --validation_split validation --test_split test

The task is a label of the shards of kind `class` or `multi_label`. Prints a table in Markdown and writes everything as
JSON. Accuracy and macro F1 for one label; for several, mean average precision (macro) and micro F1.

- The places of the training split are divided among training, validation and test, so that no test chip has a
  neighbour in training; `--validation_split` and `--test_split` name splits of the shards instead. By the same
  `--split_seed` and shares the sides are those of the fine-tuning scripts. With a `--test` no larger than `--held_out`
  of run_pretraining.py, and its `--split_seed`, no test place was seen in pretraining either.
- Neighbours are by cosine. Logistic regression is on features standardised by the training samples, for several labels
  one by one. Its `C` is chosen on the validation samples, which it is never fitted to: a probe with `--shots` samples
  has seen no others.
- Intervals hold 95 % of the metric over test sets resampled by place. With `--shots` the metric is the mean over draws
  of the training samples, and the number after ± the standard deviation; models that read the same samples get the
  same draws.

Embeddings are computed once and kept in `--cache_dir`, under a key of the weights, the configuration, the shards, the
code and the options that change them. Batch size and workers change them by rounding only and are not part of it.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from command_line import Stop, parse_arguments
from finetuning_data import choose_label, plan_sides, read_rename
from finetuning_options import ShardArguments, assignments
from frozen_features import BandStatistics, Encoder, Features, Shards, cached_features, open_shards
from probes import LABEL_KINDS, METRICS, MOST_ITERATIONS, fit_logistic, neighbor_scores, summarize
from tqdm import tqdm

from modeling_mapex import SENSORS, MapexConfig, MapexModel
from modeling_mapex.data_mapex import split_of_place
from modeling_mapex.image_processing_mapex import MapexImageProcessor
from modeling_mapex.shards_mapex import ShardSchema


@dataclass
class ModelArguments:
    """What to evaluate."""

    model: list[str] = field(default_factory=list, metadata={"help": "Folders or repositories of MAPEX models."})
    modalities: list[str] | None = field(
        default=None,
        metadata={"help": "Prune for these while loading. Default: the whole model, on what the shards have of it."},
    )
    bands: list[str] | None = field(
        default=None, metadata={"help": "Bands to keep of some of --modalities, like s2=B04,B03,B02."}
    )
    coverage: float | None = field(
        default=None, metadata={"help": "Share of each modality's mass that pruning keeps. Default: 0.95."}
    )
    experts_per_layer: list[int] | None = field(
        default=None, metadata={"help": "Keep exactly so many, one number or one a layer, instead of --coverage."}
    )
    criterion: str | None = field(
        default=None,
        metadata={"help": "Mass of an expert: saliency (default), usage, gate, exhaustive or random (by --seed)."},
    )
    pooling: Literal["mean", "modality_mean", "mean_std"] | None = field(
        default=None, metadata={"help": "How tokens become one embedding. Default: what the checkpoint says."}
    )
    random_weights: bool = field(
        default=False, metadata={"help": "Control: also evaluate each model with fresh weights, by --seed."}
    )
    band_statistics: bool = field(
        default=False,
        metadata={
            "help": "Control: also evaluate mean, deviation, extremes and percentiles of each normalised band, without "
            "any model. Normalised as for the first model, or without --model as the sensor registry says."
        },
    )


@dataclass
class DataArguments(ShardArguments):
    """What to evaluate on."""

    crop_size: int | None = field(
        default=None, metadata={"help": "Side in pixels of a crop, at a place that the sample's id fixes."}
    )
    batch_size: int = field(default=64, metadata={"help": "Samples at a time."})
    num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that read, no more than there are shards. Default: 4 beside a GPU, none on a CPU, where "
            "they would take the encoder's cores."
        },
    )
    cache_dir: str = field(default="outputs/frozen/embeddings", metadata={"help": "Where embeddings are kept."})


@dataclass
class ProbeArguments:
    """How to evaluate."""

    shots: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": "Training samples of each class, one or several numbers; all or 0: all there are. For several "
            "labels, so many samples that hold the class, and what else these hold."
        },
    )
    seeds: int = field(default=3, metadata={"help": "Draws of the training samples for each number of --shots."})
    seed: int = field(default=0, metadata={"help": "Of draws, bootstrap, fresh weights and random pruning."})
    neighbors: int = field(default=5, metadata={"help": "How many neighbours vote."})
    bootstrap: int = field(default=1000, metadata={"help": "Resampled test sets."})
    output: str | None = field(default=None, metadata={"help": "File for all results, as JSON."})


def parse_bands(args: ModelArguments) -> dict[str, list[str] | None] | None:
    """Modality to its bands, or to `None` for all; `None` if nothing is to be pruned."""
    if args.modalities is None:
        for name in ("bands", "coverage", "experts_per_layer", "criterion"):
            if getattr(args, name) is not None:
                raise Stop(f"--{name} says how to prune, but --modalities does not say for what: give both.")
        return None
    chosen: dict[str, list[str] | None] = dict.fromkeys(args.modalities)
    bands = {name: choice.split(",") for name, choice in assignments("--bands", args.bands).items()}
    if strange := [name for name in bands if name not in chosen]:
        raise Stop(f"--bands names {strange}, but --modalities are {args.modalities}.")
    return {**chosen, **bands}


def usable_modalities(
    schema: ShardSchema, bands: dict[str, list[str]], wanted: list[str] | None, notes: list[str]
) -> list[str]:
    """Which modalities to read.

    Args:
        schema (`ShardSchema`): What the shards hold.
        bands (`dict[str, list[str]]`): Modality to the bands that the model takes.
        wanted (`list[str]`, *optional*): Must be there. Default: what can be used.
        notes (`list[str]`): Gets what was left out and why.
    """
    usable, refused = [], []
    for name in schema.modalities if wanted is None else wanted:
        missing = [band for band in bands.get(name, ()) if band not in schema.modalities[name]["bands"]]
        if name not in bands:
            refused.append(f"{name} (unknown to the model)")
        elif missing:
            refused.append(f"{name} (lacks the bands {' '.join(missing)})")
        else:
            usable.append(name)
    if not usable or (refused and wanted is not None):
        held = {name: schema.modalities[name]["bands"] for name in wanted or schema.modalities}
        raise Stop(
            f"Cannot use {', '.join(refused)}. The shards have {held}, the model takes {list(bands)}: choose with "
            "--modalities, and with --bands the bands of each."
        )
    if refused:
        notes.append(f"Left out of the shards: {', '.join(refused)}.")
    return usable


def load_encoder(name: str, args: ModelArguments, schema: ShardSchema, seed: int, notes: list[str]) -> Encoder:
    """A model, whole or pruned while it loads."""
    options: dict[str, Any] = {} if args.pooling is None else {"pooling_type": args.pooling}
    if (chosen := parse_bands(args)) is not None:
        experts = args.experts_per_layer
        options |= {
            "modalities": chosen,
            "coverage": args.coverage,
            "experts_per_layer": experts[0] if experts is not None and len(experts) == 1 else experts,
            "criterion": args.criterion,
            "seed": seed if args.criterion == "random" else None,
        }
    try:
        model, loaded = MapexModel.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise Stop(f"Cannot load {name}: {error}") from error
    if loaded["missing_keys"]:
        raise Stop(f"{name} lacks weights of the encoder, such as {min(loaded['missing_keys'])}: save it again.")
    bands = {modality: spec["bands"] for modality, spec in model.config.modalities.items()}
    return Encoder(name, model, usable_modalities(schema, bands, args.modalities, notes))


def with_fresh_weights(encoder: Encoder, seed: int) -> Encoder:
    """The same configuration, never trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MapexModel(copy.deepcopy(encoder.config)).to(encoder.model.dtype)
    return Encoder(f"{encoder.name}, random weights", model, encoder.modalities)


def registered_statistics(args: ModelArguments, schema: ShardSchema, notes: list[str]) -> BandStatistics:
    """Statistics of bands that are normalised as the sensor registry says."""
    chosen = parse_bands(args) or dict.fromkeys(name for name in schema.modalities if name in SENSORS)
    if not chosen:
        raise Stop(
            f"No sensor of the registry is in the shards ({list(schema.modalities)}): give a --model that has one."
        )
    try:
        config = MapexConfig.from_preset("nano", modalities=chosen, patch_size=1)
        processor = MapexImageProcessor.from_config(config)
    except ValueError as error:
        raise Stop(f"{error}") from error
    bands = {name: spec["bands"] for name, spec in config.modalities.items()}
    return BandStatistics(processor, usable_modalities(schema, bands, args.modalities, notes))


def extractors(
    args: ModelArguments, schema: ShardSchema, seed: int, notes: list[str]
) -> Iterator[Encoder | BandStatistics]:
    """Everything to evaluate, one after another."""
    first = None
    for name in args.model:
        encoder = load_encoder(name, args, schema, seed, notes)
        first = first or (encoder.processor, encoder.modalities)
        yield encoder
        if args.random_weights:
            yield with_fresh_weights(encoder, seed)
    if args.band_statistics:
        yield BandStatistics(*first) if first else registered_statistics(args, schema, notes)


# The task: sides of the split, classes, training samples.


class Task(NamedTuple):
    """A label of the shards, and how their samples are divided.

    Attributes:
        label (`str`), kind (`str`), names (`list[str]`): The label and its classes.
        shares (`dict[str, float]`): Side to its share of the training split's places.
        splits (`dict[str, str]`): Side to a split of its own.
    """

    label: str
    kind: str
    names: list[str]
    shares: dict[str, float]
    splits: dict[str, str]


def define_task(args: DataArguments, shards: Shards, schema: ShardSchema) -> Task:
    label = choose_label(args, schema, LABEL_KINDS)
    shares, splits = plan_sides(args)
    if any(share == 0 for share in shares.values()):
        raise Stop(f"C is chosen on samples to validate on, and measured on others: shares above 0, got {shares}.")
    named = [args.train_split, *splits.values()]
    if len(set(named)) < len(named):
        raise Stop(f"A split cannot serve twice: to train, validate and test there are {named}.")
    for split in splits.values():
        if shards.schema(split).labels.get(label) != schema.labels[label]:
            raise Stop(f"The split `{split}` has another label `{label}` than `{args.train_split}`, or none.")
    return Task(label, schema.labels[label]["kind"], schema.labels[label]["names"], shares, splits)


def divide(
    task: Task, args: DataArguments, load: Callable[[str], Features], modalities: list[str], notes: list[str]
) -> dict[str, Features]:
    """The labelled samples of each side: training, validation and test."""

    def labelled(split: str) -> Features:
        features = load(split)
        known = (features.labels[task.label].reshape(len(features.ids), -1) >= 0).all(axis=1)
        missing = {
            f"have none of {modalities} and are left out": features.without,
            f"have no label `{task.label}` and are left out": int((~known).sum()),
            **{f"lack {name}": int(count) for name, count in zip(modalities, features.absent)},
        }
        total = len(known) + features.without
        notes.extend(f"Of {total} samples of `{split}`, {count} {why}." for why, count in missing.items() if count)
        return features.select(known)

    whole = labelled(args.train_split)
    shares = {"train": 1 - sum(task.shares.values()), **task.shares}
    draws = np.array([split_of_place(place, shares, args.split_seed) for place in whole.places.tolist()])
    sides = {side: whole.select(draws == side) for side in shares}
    sides |= {side: labelled(split) for side, split in task.splits.items()}
    for side, features in sides.items():
        if len(features.ids) == 0:
            raise Stop(
                f"No labelled sample is left for {side}: there are {len(set(whole.places))} places in "
                f"`{args.train_split}`. Give it a larger share or another --split_seed, or a split of its own."
            )
    for side in ("validation", "test"):
        if both := set(sides["train"].places) & set(sides[side].places):
            notes.append(f"{len(both)} places are in training and in {side}.")
    if len(set(sides["test"].places)) < 2:
        raise Stop("The test samples are all of one place: resampling needs two. Give --test a larger share.")
    return sides


def one_hot(task: Task, features: Features) -> np.ndarray:
    """Targets 0 and 1 `(samples, classes)`."""
    labels = features.labels[task.label]
    return np.eye(len(task.names))[labels] if task.kind == "class" else labels.astype(float)


def usable_classes(task: Task, targets: dict[str, np.ndarray], notes: list[str]) -> np.ndarray:
    """Which classes can be evaluated, `(classes,)`."""
    counts = {side: values.sum(axis=0) for side, values in targets.items()}

    def named(chosen: np.ndarray) -> str:
        return ", ".join(f"`{name}`" for name, there in zip(task.names, chosen) if there)

    if task.kind == "class":
        usable = counts["train"] > 0
        untrained = ~usable & (counts["validation"] + counts["test"] > 0)
        if untrained.any():
            raise Stop(
                f"No training sample is of {named(untrained)}, but others are. Give another --split_seed, or smaller "
                "--validation and --test."
            )
        reasons = {"in no sample": ~usable}
        notes.extend(
            f"No test sample is of {named(absent)}." for absent in [usable & (counts["test"] == 0)] if absent.any()
        )
    else:
        always = counts["train"] == len(targets["train"])
        reasons = {
            "in no training sample": counts["train"] == 0,
            "in every training sample": always,
            "in no test sample": (counts["test"] == 0) & (counts["train"] > 0) & ~always,
        }
        usable = ~np.any(list(reasons.values()), axis=0)
    notes.extend(f"Not evaluated, since {why}: {named(where)}." for why, where in reasons.items() if where.any())
    if usable.sum() < (2 if task.kind == "class" else 1):
        raise Stop(f"There is nothing to tell apart: of {len(usable)} classes, {int(usable.sum())} can be evaluated.")
    return usable


def parse_shots(given: list[str]) -> list[int]:
    """Training samples of each class; 0: all."""
    shots = []
    for entry in given:
        if entry != "all" and not entry.isdecimal():
            raise Stop(f"--shots takes numbers of samples, or all, got `{entry}`.")
        shots.append(0 if entry == "all" else int(entry))
    if not shots or len(set(shots)) < len(shots):
        raise Stop(f"--shots takes different numbers, got {given}.")
    return shots


def check_shots(shots: list[int], targets: np.ndarray, names: list[str]) -> None:
    counts = targets.sum(axis=0).astype(int).tolist()
    most = max(shots)
    if few := [f"`{name}` ({count})" for name, count in zip(names, counts) if count < most]:
        raise Stop(f"--shots {most} is more than the training samples of {', '.join(few)}.")


def draw_samples(targets: np.ndarray, shots: int, seed: list[int]) -> np.ndarray:
    """Training samples with `shots` of each class, as positions in order."""
    if not shots:
        return np.arange(len(targets))
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(np.flatnonzero(column), shots, replace=False) for column in targets.T]
    return np.unique(np.concatenate(drawn))


def evaluate(
    name: str, task: Task, sides: dict[str, Features], args: ProbeArguments, notes: list[str]
) -> list[dict[str, Any]]:
    """Results of each number of shots, of what is called `name`."""
    targets = {side: one_hot(task, features) for side, features in sides.items()}
    usable = usable_classes(task, targets, notes)
    targets = {side: values[:, usable] for side, values in targets.items()}
    values = {side: features.values.astype(np.float64) for side, features in sides.items()}
    all_shots = parse_shots(args.shots)
    check_shots(all_shots, targets["train"], [name for name, there in zip(task.names, usable) if there])
    results = []
    with tqdm(total=sum(args.seeds if shots else 1 for shots in all_shots), desc="Probing", unit="draw") as progress:
        for shots in all_shots:
            samples, strengths, scores = [], [], {"knn": [], "logistic": []}
            for draw in range(args.seeds if shots else 1):
                chosen = draw_samples(targets["train"], shots, [args.seed, shots, draw])
                train = values["train"][chosen], targets["train"][chosen]
                held_out = values["validation"], targets["validation"]
                scores["knn"].append(neighbor_scores(*train, values["test"], args.neighbors))
                probe = fit_logistic(task.kind, train, held_out)
                if probe is None:
                    raise Stop("None of the classes is among the validation samples: give --validation a larger share.")
                scores["logistic"].append(probe.scores(task.kind, values["test"]))
                if not probe.arrived:
                    notes.append(
                        f"{name}, shots {shots or 'all'}: the regression chosen, with C = {probe.strength:g}, did not "
                        f"converge in {MOST_ITERATIONS} steps."
                    )
                samples.append(len(chosen))
                strengths.append(probe.strength)
                progress.update()
            probes = {
                kind: summarize(task.kind, targets["test"], draws, sides["test"].places, args.bootstrap, args.seed)
                for kind, draws in scores.items()
            }
            results.append({"shots": shots or "all", "training_samples": samples, "C": strengths, **probes})
    return results


def cell(summary: dict[str, Any]) -> str:
    low, high = summary["interval"]
    spread = f" ± {summary['std']:.3f}" if "std" in summary else ""
    return f"{summary['mean']:.3f}{spread} [{low:.3f}, {high:.3f}]"


def table(kind: str, rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    first, second = METRICS[kind]
    headings = ["model", "modalities", "parameters", "shots", f"kNN, {first}", f"logistic, {first}"]
    headings.append(f"logistic, {second}")
    lines = [headings, ["---"] * len(headings)]
    for row in rows:
        for result in row["results"]:
            lines.append(
                [
                    row["model"],
                    " ".join(row["modalities"]),
                    f"{row['parameters']:,}",
                    str(result["shots"]),
                    cell(result["knn"][first]),
                    cell(result["logistic"][first]),
                    cell(result["logistic"][second]),
                ]
            )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def check_arguments(model_args: ModelArguments, data_args: DataArguments, args: ProbeArguments) -> None:
    if find_spec("sklearn") is None:
        raise Stop('The probes are those of scikit-learn, which is not installed. Run: pip install -e ".[evaluate]"')
    if not model_args.model and not model_args.band_statistics:
        raise Stop("Nothing to evaluate: give --model, or --band_statistics.")
    if model_args.random_weights and not model_args.model:
        raise Stop("--random_weights takes the configuration of a model: give --model.")
    if not model_args.model and model_args.pooling is not None:
        raise Stop("--pooling is of a model: give --model.")
    parse_bands(model_args)
    parse_shots(args.shots)
    for name in ("seeds", "neighbors", "bootstrap"):
        if getattr(args, name) < 1:
            raise Stop(f"--{name} must be 1 or more, got {getattr(args, name)}.")
    if data_args.batch_size < 1 or (data_args.num_workers or 0) < 0:
        raise Stop("--batch_size must be 1 or more, and --num_workers 0 or more.")


def main(model_args: ModelArguments, data_args: DataArguments, args: ProbeArguments) -> dict[str, Any]:
    check_arguments(model_args, data_args, args)
    shards = open_shards(data_args.shards)
    shards = shards._replace(rename=read_rename(data_args, shards.schema(data_args.train_split)))
    schema = shards.schema(data_args.train_split)
    task = define_task(data_args, shards, schema)
    if unknown := [name for name in model_args.modalities or [] if name not in schema.modalities]:
        raise Stop(f"The shards have no modalities {unknown}, only {list(schema.modalities)}.")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)

    rows, notes = [], []
    for extractor in extractors(model_args, schema, args.seed, notes):

        def load(split: str, extractor=extractor) -> Features:
            return cached_features(
                extractor,
                shards,
                split,
                schema,
                data_args.cache_dir,
                batch_size=data_args.batch_size,
                num_workers=data_args.num_workers,
                crop_size=data_args.crop_size,
            )

        sides = divide(task, data_args, load, extractor.modalities, notes)
        samples = {side: len(features.ids) for side, features in sides.items()}
        bands = {name: extractor.processor.modalities[name]["bands"] for name in extractor.modalities}
        rows.append(
            {
                "model": extractor.name,
                "modalities": bands,
                "parameters": extractor.parameters,
                "pooling": extractor.config.pooling_type if extractor.config else None,
                "pruning": extractor.config.pruning if extractor.config else None,
                "samples": samples,
                "places": {side: len(set(features.places)) for side, features in sides.items()},
                "results": evaluate(extractor.name, task, sides, args, notes),
            }
        )
    notes = list(dict.fromkeys(notes))
    counts = ", ".join(f"{count} to {verb}" for verb, count in zip(("train", "validate", "test"), samples.values()))
    print(f"{schema.title or data_args.shards}: `{task.label}`, {len(task.names)} classes; samples: {counts}.")
    print(*notes, "", table(task.kind, rows), sep="\n")
    settings = {**asdict(model_args), **asdict(data_args), **asdict(args)}
    results = {"label": task.label, "kind": task.kind, "classes": task.names, "notes": notes, "rows": rows}
    if args.output:
        Path(args.output).write_text(json.dumps({"settings": settings, **results}, indent=1))
    return results


if __name__ == "__main__":
    main(*parse_arguments((ModelArguments, DataArguments, ProbeArguments), __doc__))
