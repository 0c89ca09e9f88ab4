"""What `run_image_classification.py`, `run_semantic_segmentation.py` and `run_pixel_regression.py` share: their
options, reading and splitting labelled shards, the model and how much of it is trained, the run with its checkpoints,
and results.
"""

import argparse
import importlib.util
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.data import Dataset, get_worker_info
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import get_last_checkpoint

from modeling_mapex import MapexConfig, MapexTrainer
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.data_mapex import load_shards, read_schema, split_of_place
from modeling_mapex.image_processing_mapex import MapexImageProcessor
from modeling_mapex.shards_mapex import ShardSchema, from_bytes
from modeling_mapex.visualization_mapex import display_bands, stretch_limits, to_picture


@dataclass
class ModelArguments:
    """What to fine-tune, and how much of it."""

    model: str = field(
        default="examples/checkpoints/mapex-nano", metadata={"help": "Folder or repository of a MAPEX checkpoint."}
    )
    modalities: list[str] | None = field(
        default=None,
        metadata={"help": "Sensors to use, for which the model is pruned while loading. Default: all that both have."},
    )
    bands: list[str] | None = field(
        default=None, metadata={"help": "Bands to use of a sensor: s2=B04,B03,B02. Default: all of the model's."}
    )
    keep_all: bool = field(default=False, metadata={"help": "Do not prune: load the whole model."})
    coverage: float | None = field(
        default=None, metadata={"help": "Share of each sensor's mass that the kept experts cover. Default: 0.95."}
    )
    experts_per_layer: list[int] | None = field(
        default=None, metadata={"help": "Keep exactly so many: one number, or one for each mixture. Not --coverage."}
    )
    criterion: str | None = field(
        default=None, metadata={"help": "Mass of an expert: saliency (default), usage, gate, exhaustive or random."}
    )
    pruning_seed: int | None = field(default=None, metadata={"help": "Of --criterion random."})
    from_scratch: bool = field(
        default=False, metadata={"help": "Random weights in the architecture that the checkpoint would give."}
    )
    method: Literal["full", "frozen", "lora"] = field(
        default="full", metadata={"help": "Train everything, only the head, or the head and low-rank adapters (peft)."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters, for each expert too."})
    lora_alpha: int = field(default=16, metadata={"help": "Adapters are scaled by this over their rank."})


@dataclass
class DataArguments:
    """What to train and evaluate on."""

    shards: str | None = field(default=None, metadata={"help": "A folder of shards or a data set on the Hub."})
    label: str | None = field(default=None, metadata={"help": "Label of the shards. Default: the only one that fits."})
    rename: list[str] | None = field(
        default=None, metadata={"help": "Read a sensor of the shards as one of the model: s2_l1c=s2."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of the shards to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split of the shards to validate on, instead of --validation."}
    )
    test_split: str | None = field(default=None, metadata={"help": "Split of the shards to test on, not --test."})
    validation: float = field(
        default=0.15, metadata={"help": "Share of the places of --train_split to choose the best model on."}
    )
    test: float = field(default=0.15, metadata={"help": "Share of the places of --train_split to test on."})
    split_seed: int = field(default=0, metadata={"help": "Chooses the places."})
    train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many samples, drawn by --seed; larger draws hold smaller ones."}
    )
    crop_size: int | None = field(
        default=None, metadata={"help": "Train on crops of this side, in pixels of the finest layer. Default: whole."}
    )
    flip: bool = field(default=True, metadata={"help": "Mirror and turn samples in training."})
    modality_dropout: float = field(
        default=0.0, metadata={"help": "Probability of leaving out a sensor of a sample in training, never all."}
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that read and augment."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where datasets keeps its copy of the shards."})


@dataclass
class FinetuningArguments:
    """How to train."""

    output_dir: str = field(default="outputs/finetuning", metadata={"help": "Checkpoints, results and the model."})
    epochs: float = field(default=30.0, metadata={"help": "Times to go through the training samples."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimisation steps, instead of --epochs."})
    batch_size: int = field(default=16, metadata={"help": "Samples of a forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes for each step."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Of the head. Default: 5e-4 for full, 5e-3 for frozen, 1e-3 for lora."}
    )
    layer_decay: float | None = field(
        default=None,
        metadata={
            "help": "Each block's rate is this times that of the next, embeddings have the lowest; not for adapters. "
            "Default: 0.75, from scratch 1."
        },
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Of matrices; biases, norms, embeddings have none."})
    warmup: float = field(default=0.05, metadata={"help": "Share of the steps in which the rate rises."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0: not."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bf16 by autocast."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Save memory, compute activations twice."})
    eval_steps: int | None = field(
        default=None, metadata={"help": "Steps from evaluation and checkpoint to the next. Default: an epoch."}
    )
    patience: int = field(
        default=10, metadata={"help": "Stop when so many evaluations in a row are no better; 0: never."}
    )
    best_metric: str | None = field(
        default=None, metadata={"help": "Metric that chooses the best model. Default: see above."}
    )
    bootstrap: int = field(default=1000, metadata={"help": "Resampled sets of test places, for the intervals."})
    seed: int = field(default=0, metadata={"help": "Of new weights, order, augmentation and --train_samples."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the run in output_dir; do not go on with it."})
    stop_after: int | None = field(default=None, metadata={"help": "End this session at a step, as if interrupted."})
    report_to: list[str] | None = field(default=None, metadata={"help": "Trackers, like tensorboard. Default: none."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository to push the model to at the end."})


LEARNING_RATES = {"full": 5e-4, "frozen": 5e-3, "lora": 1e-3}
# A run may go on with others of these.
FREE_SETTINGS = {"output_dir", "overwrite", "stop_after", "report_to", "push_to_hub", "num_workers", "cache_dir"}
SIDES = ("train", "validation", "test")


class Stop(SystemExit):
    """An end with a message for the user and without a traceback."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring, and shows defaults."""


def parse_arguments(kinds: Sequence[type], description: str, argv: list[str] | None = None) -> tuple:
    """Arguments from the command line, after those of a JSON or YAML file if the first is one."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(kinds, description=description)
    parser.formatter_class = Formatter
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        file, *argv = argv
        values = read_mapping(file)
        known = {entry.name for kind in kinds for entry in fields(kind)}
        if unknown := sorted(set(values) - known):
            raise Stop(f"{file} has options that there are not: {unknown}. Run with --help for those there are.")
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(args=argv)


def read_mapping(file: str) -> dict[str, Any]:
    """Of a JSON or YAML file."""
    try:
        values = yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise Stop(f"Cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise Stop(f"{file} must hold a mapping.")
    return values


def assignments(option: str, values: list[str] | dict[str, Any] | None) -> dict[str, Any]:
    """`["a=b", ...]` from the command line, or a mapping from a file, as a mapping."""
    if values is None or isinstance(values, dict):
        return dict(values or {})
    pairs = [str(value).split("=") for value in ([values] if isinstance(values, str) else values)]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise Stop(f"{option} takes name=value, got {values}.")
    return dict(pairs)


# Data


class Chips(Dataset):
    """Labelled samples by position, their sensors under the names that the model has for them.

    Args:
        dataset (`datasets.Dataset`): From `load_shards`.
        schema (`ShardSchema`): What it holds.
        label (`str`): The label that is trained on.
        names (`dict[str, str]`): Sensor of the shards to modality of the model.
    """

    def __init__(self, dataset, schema: ShardSchema, label: str, names: dict[str, str]):
        self.dataset, self.schema, self.label, self.names = dataset, schema, label, names
        self.rows = dataset.with_format(None)
        self.sensors = {name: schema.modalities[stored] for stored, name in names.items()}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([int(index)])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        if get_worker_info() is not None:  # Ctrl-C reaches all processes of a terminal: the one that trains decides
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        columns = self.dataset[indices]
        samples = []
        for values in zip(*columns.values()):
            sample = dict(zip(columns, values))
            for key in ("images", "gsd", "crs", "transform"):
                sample[key] = {name: sample[key][stored] for stored, name in self.names.items()}
            samples.append({**sample, "sensors": self.sensors})
        return samples

    def select(self, indices: Sequence[int]) -> "Chips":
        return Chips(self.dataset.select(np.asarray(indices)), self.schema, self.label, self.names)

    def column(self, name: str) -> list[Any]:
        return list(self.rows[name])

    def places(self) -> np.ndarray:
        return np.array(self.column("place"))

    def labels(self) -> Iterator[Any]:
        """As stored, one after another and without the images."""
        spec = self.schema.labels[self.label]
        is_array = spec["kind"] in ("mask", "map")
        keys = [self.label, f"{self.label}__shape"] if is_array else [self.label]
        for row in self.rows.select_columns(keys):
            yield from_bytes(row[self.label], spec["dtype"], row[keys[1]]) if is_array else row[self.label]

    def sizes(self) -> list[tuple]:
        """Height and width of each layer of each sample, `None` where it is missing."""
        layers = [*self.names, *([self.label] if self.schema.labels[self.label]["kind"] in ("mask", "map") else [])]
        shapes = [self.column(f"{name}__shape") for name in layers]
        return [tuple(None if shape is None else tuple(shape[-2:]) for shape in sample) for sample in zip(*shapes)]


@dataclass
class Data:
    """Labelled samples, split.

    Attributes:
        label (`str`), spec (`dict`): The label, and what the shards say of it.
        modalities (`dict[str, list[str] | None]`): Modality of the model to the bands to keep, `None` for all.
        sides (`dict[str, Chips]`): `"train"`, `"test"` and, unless there is none, `"validation"`.
    """

    label: str
    spec: dict[str, Any]
    modalities: dict[str, list[str] | None]
    sides: dict[str, Chips]


def read_data(model_args: ModelArguments, data_args: DataArguments, kinds: Sequence[str], seed: int) -> Data:
    """Choose label and sensors, and split the samples; what is chosen or left out is printed."""
    if data_args.shards is None:
        raise Stop("Nothing to train on: give --shards, a folder of shards or a data set on the Hub.")
    try:
        config = MapexConfig.from_pretrained(model_args.model)
        schema = read_schema(data_args.shards, data_args.train_split)
    except (OSError, ValueError) as error:
        raise Stop(f"{error}") from error
    label = choose_label(data_args, schema, kinds)
    names, modalities = choose_modalities(model_args, data_args, config, schema)
    sides = read_sides(data_args, names, label)
    if data_args.train_samples is not None:
        sides["train"] = draw_samples(sides["train"], data_args.train_samples, seed)
    for side, chips in sides.items():
        print(f"{side}: {len(chips)} samples of {len(set(chips.places()))} places")
    check_sizes(data_args, sides)
    return Data(label, schema.labels[label], modalities, sides)


def choose_label(args: DataArguments, schema: ShardSchema, kinds: Sequence[str]) -> str:
    fitting = [name for name, spec in schema.labels.items() if spec["kind"] in kinds]
    there = {name: spec["kind"] for name, spec in schema.labels.items()} or "none"
    wanted = f"a label of kind {' or '.join(kinds)}"
    if args.label is None:
        if len(fitting) != 1:
            raise Stop(
                f"{args.shards} does not have one label of the kind {' or '.join(kinds)}: name it by --label. "
                f"Its labels: {there}."
            )
        return fitting[0]
    if args.label not in schema.labels:
        raise Stop(f"{args.shards} has no label `{args.label}`. Its labels: {there}; this script takes {wanted}.")
    if args.label not in fitting:
        scripts = {
            "class": "run_image_classification.py",
            "multi_label": "run_image_classification.py",
            "mask": "run_semantic_segmentation.py",
            "map": "run_pixel_regression.py",
        }
        kind = schema.labels[args.label]["kind"]
        raise Stop(f"`{args.label}` is of kind {kind}, but this script takes {wanted}: use {scripts[kind]}.")
    return args.label


def choose_modalities(
    model_args: ModelArguments, data_args: DataArguments, config: MapexConfig, schema: ShardSchema
) -> tuple[dict[str, str], dict[str, list[str] | None]]:
    """Sensors of the shards to read with the modality that each becomes, and the bands to keep of each modality."""
    rename = assignments("--rename", data_args.rename)
    if unknown := [name for name in rename if name not in schema.modalities]:
        raise Stop(f"--rename names {unknown}, but {data_args.shards} has {list(schema.modalities)}.")
    if unknown := [name for name in rename.values() if name not in config.modalities]:
        raise Stop(f"--rename makes {unknown} of sensors, but the model has {list(config.modalities)}.")
    stored = {name: name for name in schema.modalities if name not in rename}  # modality to sensor of the shards
    stored |= {name: sensor for sensor, name in rename.items()}

    wanted = model_args.modalities
    if wanted is None:
        wanted = [name for name in config.modalities if name in stored]
        if not wanted:
            raise Stop(
                f"The model has {list(config.modalities)} and {data_args.shards} has {list(schema.modalities)}: "
                "nothing in common. Take another --model, or read a sensor as one of the model by --rename."
            )
    if isinstance(wanted, str):
        wanted = [wanted]
    bands = {name: choice for name, choice in wanted.items() if choice} if isinstance(wanted, dict) else {}
    bands |= assignments("--bands", model_args.bands)
    bands = {name: choice.split(",") if isinstance(choice, str) else choice for name, choice in bands.items()}
    if lost := [name for name in wanted if name not in config.modalities]:
        pruned = " It was pruned: load the whole model to use others." if config.pruning else ""
        raise Stop(f"{model_args.model} has no {lost}. It has {list(config.modalities)}.{pruned}")
    if missing := [name for name in wanted if name not in stored]:
        raise Stop(
            f"{data_args.shards} has no {missing}. It has {list(schema.modalities)}: leave the others out of "
            "--modalities, or read one of these as another by --rename."
        )
    if strange := [name for name in bands if name not in wanted]:
        raise Stop(f"--bands names {strange}, but the modalities are {list(wanted)}.")
    if model_args.keep_all and bands:
        raise Stop("--keep_all loads the whole model, with all its bands: leave out --bands.")

    for name in wanted:
        sensor = schema.modalities[stored[name]]
        available, known = sensor["bands"], config.modalities[name]["bands"]
        if unknown := [band for band in bands.get(name, []) if band not in known]:
            raise Stop(f"--bands names {unknown} of `{name}`, but the model has {known}.")
        lacking = [band for band in bands.get(name, known) if band not in available]
        if lacking and sensor["unit"] != "class":
            common = [band for band in known if band in available]
            advice = f"Use those that both have: --bands {name}={','.join(common)}." if common else "Leave it out."
            raise Stop(f"`{stored[name]}` of {data_args.shards} has {available}, but not {lacking}. {advice}")
        source = "" if stored[name] == name else f", read from the shards' `{stored[name]}`"
        print(f"Using {name} ({', '.join(bands.get(name, known))}){source}.")
    if unused := [name for name in schema.modalities if name not in [stored[name] for name in wanted]]:
        print(f"Not used of the shards: {', '.join(unused)}.")
    return {stored[name]: name for name in wanted}, {name: bands.get(name) for name in wanted}


def read_sides(args: DataArguments, names: dict[str, str], label: str) -> dict[str, Chips]:
    """Open the splits, leave out what cannot be used, and divide the training split by place."""
    named = {"validation": args.validation_split, "test": args.test_split}
    sides = {side: open_split(args, split, names, label) for side, split in named.items() if split is not None}
    shares = {side: getattr(args, side) for side in ("validation", "test") if side not in sides}
    if any(not 0 <= share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise Stop(f"Shares lie between 0 and 1 and leave something to train on, got {shares}.")
    chips = open_split(args, args.train_split, names, label)
    places = chips.places()
    full_shares = {"train": 1 - sum(shares.values()), **shares}
    side_of = {place: split_of_place(place, full_shares, args.split_seed) for place in set(places)}
    for side in full_shares:
        sides[side] = chips.select(np.flatnonzero([side_of[place] == side for place in places]))
    for side in SIDES:
        if not len(sides[side]) and not (side == "validation" and full_shares.get(side) == 0):
            raise Stop(
                f"Nothing is left to {side if side == 'train' else side + ' on'}: {args.shards} has "
                f"{len(chips)} usable samples of {len(side_of)} places in its split `{args.train_split}`, and by the "
                f"shares {full_shares} and --split_seed {args.split_seed} none of them is of this side. Choose another "
                f"seed or share, or name a split of the shards by --{side}_split."
            )
    if not len(sides["validation"]):
        del sides["validation"]
        print("There is no validation: the last model is kept, not the best.")
    for side in named:
        if named[side] and (both := set(sides["train"].places()) & set(sides[side].places())):
            print(f"Beware: {len(both)} places of the split `{named[side]}` are trained on as well.")
    return {side: sides[side] for side in SIDES if side in sides}


def open_split(args: DataArguments, split: str, names: dict[str, str], label: str) -> Chips:
    """The samples of a split that have the label and one of the sensors."""
    try:
        schema = read_schema(args.shards, split).select(list(names), [label])
        dataset = load_shards(args.shards, split, modalities=list(names), labels=[label], cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise Stop(f"{error}") from error
    chips = Chips(dataset, schema, label, names)
    stored = f"{label}__shape" if f"{label}__shape" in chips.rows.column_names else label
    labelled = [value is not None for value in chips.column(stored)]
    pictured = [
        any(shape is not None for shape in shapes)
        for shapes in zip(*(chips.column(f"{name}__shape") for name in names))
    ]
    usable = np.logical_and(labelled, pictured)
    if not all(labelled):
        print(f"Left out {len(chips) - sum(labelled)} of {len(chips)} samples of `{split}` without `{label}`.")
    if not all(pictured):
        print(f"Left out {len(chips) - sum(pictured)} of {len(chips)} samples of `{split}` with none of {list(names)}.")
    if not usable.any():
        raise Stop(f"No sample of the split `{split}` of {args.shards} has `{label}` and any of {list(names)}.")
    return chips if usable.all() else chips.select(np.flatnonzero(usable))


def draw_samples(chips: Chips, count: int, seed: int, groups: np.ndarray | None = None) -> Chips:
    """`count` samples, or so many of each of `groups`; a larger count holds a smaller one."""
    order = np.random.default_rng(seed).permutation(len(chips))
    if groups is None:
        if not 1 <= count <= len(chips):
            raise Stop(f"--train_samples {count}, but there are {len(chips)} to train on.")
        return chips.select(np.sort(order[:count]))
    if count < 1:
        raise Stop(f"--shots must be at least 1, got {count}.")
    chosen = [order[groups[order] == group][:count] for group in np.unique(groups)]
    return chips.select(np.sort(np.concatenate(chosen)))


def check_sizes(args: DataArguments, sides: dict[str, Chips]) -> None:
    if args.crop_size is None and any(differ_in_size(chips) for chips in sides.values()):
        shown = sorted({size for chips in sides.values() for sample in chips.sizes() for size in sample if size})
        raise Stop(f"Samples differ in size ({shown[0]} to {shown[-1]}): train on crops of one by --crop_size.")


def differ_in_size(chips: Chips) -> bool:
    """Whether any layer comes in several sizes, which no batch can hold."""
    return any(len({size for size in layer if size is not None}) > 1 for layer in zip(*chips.sizes()))


def check_samples(collator: MapexCollator, chips: Chips) -> None:
    """Collate one sample of each combination of sizes and sensors, to find what cannot be before training begins."""
    first = {size: index for index, size in reversed(list(enumerate(chips.sizes())))}
    for index in first.values():
        sample = chips[index]
        try:
            collator([sample])
        except ValueError as error:
            raise Stop(f"Sample `{sample['id']}`: {error}") from error


# Model


def build_model(model_class: type, args: ModelArguments, modalities: dict[str, list[str] | None], **config_fields):
    """The pretrained model with a new head, pruned while loading unless `--keep_all`; or its like with random weights.

    Args:
        model_class (`type`): Of the task.
        modalities (`dict[str, list[str] | None]`): From [`Data`].
        config_fields: Of the task, like `id2label`.
    """
    pruning = {"coverage": args.coverage, "criterion": args.criterion, "seed": args.pruning_seed}
    counts = args.experts_per_layer
    if counts is not None:
        counts = [counts] if isinstance(counts, int) else list(counts)
        pruning["experts_per_layer"] = counts[0] if len(counts) == 1 else counts
    pruning = {name: value for name, value in pruning.items() if value is not None}
    if args.keep_all and pruning:
        raise Stop(f"--keep_all does not prune, but {sorted(pruning)} say how: leave out one or the other.")
    if not args.keep_all:
        pruning["modalities"] = modalities
    try:
        model = model_class.from_pretrained(args.model, dtype=torch.float32, **pruning, **config_fields)
    except (OSError, ValueError, RuntimeError) as error:
        raise Stop(f"{error}") from error
    if args.from_scratch:
        config = model.config
        config.pruning = config.expert_statistics = None  # they tell of other weights
        model = model_class(config)
    config = model.config
    kept = ", ".join(f"{len(ids)} in block {layer}" for layer, ids in zip(config.moe_layers, config.expert_ids))
    print(f"{model.num_parameters():,} parameters; experts kept of {config.num_experts}: {kept}.")
    return model


def lora_config(model, args: ModelArguments):
    """Adapters for attention, plain MLPs and every expert; the head is trained whole.

    Linear layers are `target_modules`. Experts are parameters `(experts, out, in)` stacked in one module and hence
    `target_parameters`, each with factors of its own; pruned to one expert, a mixture is a plain MLP with linear layers
    of the same names.
    """
    from peft import LoraConfig

    experts = ["mlp.experts.up_proj", "mlp.experts.down_proj"] if model.config.routed_layers else None
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        target_parameters=experts,
        modules_to_save=[name for name, _ in model.named_children() if name != model.base_model_prefix],
    )


def choose_trained(model, args: ModelArguments):
    """The model with what `--method` trains; for lora wrapped in peft's."""
    if args.method == "frozen":
        model.base_model.requires_grad_(False)
    elif args.method == "lora":
        if importlib.util.find_spec("peft") is None:
            raise Stop("--method lora needs peft: pip install peft.")
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(model, args))
        # Else peft asks the Hub, each time it saves, whether the vocabulary of the base model has changed.
        model.peft_config[model.active_adapter].base_model_name_or_path = ""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{trained:,} parameters are trained ({args.method}).")
    return model


def depth_of(name: str, num_layers: int) -> int:
    """How far a parameter is from the input: 0 for embeddings, 1 .. `num_layers` for blocks, one more for the rest."""
    if re.search(r"\bmapex\.embeddings\.", name):
        return 0
    block = re.search(r"\bmapex\.layers\.(\d+)\.", name)
    return int(block.group(1)) + 1 if block else num_layers + 1


def parameter_groups(
    model: nn.Module, num_layers: int, learning_rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """For an optimiser: what is trained, by rate and weight decay. The rate falls by `layer_decay` from each block to
    the one before (as in BEiT, arXiv 2106.08254), but for adapters; weight decay is for matrices only, as in
    pretraining.
    """
    decaying = set(get_parameter_names(model, [nn.LayerNorm, nn.GroupNorm, nn.Embedding], [r"bias", r"modality_shift"]))
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            distance = 0 if "lora_" in name else num_layers + 1 - depth_of(name, num_layers)
            key = (distance, name in decaying)
            options = {"lr": learning_rate * layer_decay**distance, "weight_decay": weight_decay * (name in decaying)}
            groups.setdefault(key, {"params": [], **options})["params"].append(parameter)
    return list(groups.values())


# The run


class Run:
    """The folder of a run: what it was asked for, its checkpoints, and whether it is finished.

    Args:
        args (`FinetuningArguments`)
        settings: The other dataclasses of options.

    Raises:
        Stop: the folder cannot be written, holds something else, or a run with other settings.
    """

    def __init__(self, args: FinetuningArguments, *settings):
        self.args, self.folder = args, Path(args.output_dir)
        options = {name: value for part in (*settings, args) for name, value in asdict(part).items()}
        self.settings = {name: value for name, value in options.items() if name not in FREE_SETTINGS}
        self.file, self.checkpoints = self.folder / "run.json", self.folder / "checkpoints"
        if torch.cuda.device_count() > 1 or torch.distributed.is_torchelastic_launched():
            raise Stop("This script trains on one device, in one process: choose it by CUDA_VISIBLE_DEVICES=0.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise Stop(f"Cannot write to --output_dir {self.folder}: {error}") from error
        if not self.file.exists():
            if found := sorted(path.name for path in self.folder.iterdir()):
                raise Stop(f"{self.folder} holds something else than a run ({found[:5]}): choose another --output_dir.")
            return
        earlier = json.loads(self.file.read_text())
        changed = [
            f"{name}: {earlier.get(name)} -> {value}"
            for name, value in json.loads(json.dumps(self.settings)).items()
            if earlier.get(name) != value
        ]
        if changed and not args.overwrite:
            raise Stop(
                f"{self.folder} is of a run with other settings ({'; '.join(changed)}). Go on with those, or begin "
                "anew with --overwrite or another --output_dir."
            )

    def finished(self) -> dict[str, Any] | None:
        """The results of the run, if it is at its end."""
        file = self.folder / "results.json"
        if self.args.overwrite or not file.exists():
            return None
        results = json.loads(file.read_text())
        print(f"The run in {self.folder} is finished: {file} has its results. --overwrite runs it again.")
        if self.args.push_to_hub:
            raise Stop(f"Push its model by: hf upload {self.args.push_to_hub} {self.folder / 'model'}")
        return results

    def begin(self) -> str | None:
        """Note the settings; the checkpoint to go on from."""
        if self.args.overwrite and self.file.exists():
            for path in self.folder.iterdir():
                if path.name in ("checkpoints", "model"):
                    shutil.rmtree(path)
                elif path.name == "run.json" or path.suffix in (".json", ".png"):
                    path.unlink()
        self.file.write_text(json.dumps(self.settings, indent=1))
        return get_last_checkpoint(str(self.checkpoints)) if self.checkpoints.is_dir() else None


class Epochs(TrainerCallback):
    """Tells the collator which epoch it is, so that augmentation differs from one to the next."""

    def __init__(self, collator: MapexCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch or 0))


class Session(TrainerCallback):
    """Ends training with a checkpoint after Ctrl-C, SIGTERM or `--stop_after`, and evaluates at the very end."""

    def __init__(self, stop_after: int | None):
        self.stop_after = stop_after
        self.interrupted = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True
        elif self.interrupted or state.global_step == self.stop_after:
            self.interrupted = control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """To signals; the second Ctrl-C ends at once, and the last checkpoint is gone on from."""

        def interrupt(number: int, frame) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            print("\nEnding after this step, with a checkpoint.")

        handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


class Clock(TrainerCallback, ExportableState):
    """Seconds of training up to a checkpoint, those of earlier sessions included."""

    def __init__(self):
        self.seconds = 0.0
        self.since = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.since = time.perf_counter()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seconds": self.seconds + time.perf_counter() - self.since}}


class Scores:
    """Metrics of an evaluation, from a row of numbers that is kept of each sample instead of its predictions: memory
    does not grow with pixels, and intervals come from weighting the rows. For `Trainer` with `batch_eval_metrics`.
    """

    best: str  # metric that chooses the best model
    names: tuple[str, ...]  # of all metrics
    smaller_is_better: tuple[str, ...] = ()

    def __init__(self):
        self.parts: list[np.ndarray] = []
        self.table: np.ndarray | None = None  # of the last evaluation

    def rows(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`(batch_size, columns)`"""
        raise NotImplementedError

    def metrics(self, table: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Of `table (samples, columns)`, each sample as often as `weights` says; without those that are not defined."""
        raise NotImplementedError

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        self.parts.append(self.rows(prediction.predictions, prediction.label_ids).double().cpu().numpy())
        if not compute_result:
            return {}
        self.table, self.parts = np.concatenate(self.parts), []
        return self.metrics(self.table, np.ones(len(self.table)))


class FinetuningTrainer(MapexTrainer):
    """Augments what it trains on, and not what it evaluates on."""

    def __init__(self, *args, eval_collator: MapexCollator, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator

    def get_eval_dataloader(self, eval_dataset=None):
        augmenting, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = augmenting


class Finetuning:
    """One run: a model, its data and how it is measured.

    Args:
        run (`Run`), data (`Data`), scores (`Scores`): Of this run.
        model: From [`build_model`].
        model_args, data_args, args: Options.
        collator_options: Of [`MapexCollator`], for the labels.
        preprocess (`Callable`, *optional*): `preprocess_logits_for_metrics` of `Trainer`.
    """

    def __init__(
        self,
        run: Run,
        data: Data,
        scores: Scores,
        model,
        model_args: ModelArguments,
        data_args: DataArguments,
        collator_options: dict[str, Any],
        preprocess=None,
    ):
        self.run, self.data, self.scores, self.args = run, data, scores, run.args
        self.model_args, self.preprocess = model_args, preprocess
        self.config = model.config
        self.best = self.args.best_metric or scores.best
        if self.best not in (*scores.names, "loss"):
            raise Stop(f"There is no metric `{self.best}` for --best_metric: choose one of {[*scores.names, 'loss']}.")
        processor = MapexImageProcessor.from_config(model.config)
        self.collator = MapexCollator(processor, **collator_options)
        self.training_collator = MapexCollator(
            processor,
            crop_size=data_args.crop_size,
            flip=data_args.flip,
            modality_dropout=data_args.modality_dropout,
            seed=self.args.seed,
            **collator_options,
        )
        for side, chips in data.sides.items():
            check_samples(self.training_collator if side == "train" else self.collator, chips)
        self.evaluated_alone = any(differ_in_size(chips) for side, chips in data.sides.items() if side != "train")
        if self.evaluated_alone:
            print("Samples differ in size: they are evaluated whole, one at a time.")
        self.try_batch(model)
        if self.args.bf16 and model_args.method == "lora" and model.config.routed_layers:
            raise Stop(
                "Adapters of experts are not computed in another precision than the experts: leave out --bf16 with "
                "--method lora, or keep one expert a layer by --experts_per_layer 1."
            )
        self.model = choose_trained(model, model_args)
        self.state: TrainerState | None = None
        self.workers = data_args.num_workers
        self.dataset = None if Path(data_args.shards).is_dir() else data_args.shards

    @torch.no_grad()
    def try_batch(self, model) -> None:
        """One forward pass, to find what does not fit before training begins."""
        chips = self.data.sides["train"]
        batch = self.training_collator(chips.__getitems__(list(range(min(2, len(chips))))))
        try:
            model.eval()(**batch)
        except ValueError as error:
            raise Stop(f"{error}") from error

    def options(self) -> TrainingArguments:
        args = self.args
        interval = "epoch" if args.eval_steps is None else "steps"
        choosing = {
            "eval_strategy": interval,
            "load_best_model_at_end": True,
            "metric_for_best_model": self.best,
            "greater_is_better": self.best not in ("loss", *self.scores.smaller_is_better),
        }
        if args.eval_steps is not None:
            choosing |= dict.fromkeys(("eval_steps", "save_steps", "logging_steps"), args.eval_steps)
        if not self.is_validated:
            choosing = {"eval_strategy": "no"}
        return TrainingArguments(
            output_dir=str(self.run.checkpoints),
            num_train_epochs=args.epochs,
            max_steps=args.max_steps or -1,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=1 if self.evaluated_alone else args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            learning_rate=self.learning_rate,  # for the logs: the optimiser has those of its groups
            lr_scheduler_type="cosine",
            warmup_steps=args.warmup,
            max_grad_norm=args.max_grad_norm,
            bf16=args.bf16,
            activation_checkpointing=args.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if args.gradient_checkpointing else None,
            logging_strategy=interval,
            save_strategy=interval,
            save_total_limit=2,
            **choosing,
            batch_eval_metrics=True,
            # Else a run that goes on forgets how long it has not improved.
            restore_callback_states_from_checkpoint=True,
            remove_unused_columns=False,  # inputs are dictionaries
            label_names=["labels"],
            dataloader_num_workers=self.workers,
            dataloader_pin_memory=torch.accelerator.is_available(),
            use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused there
            disable_tqdm=not sys.stderr.isatty(),  # in a file a bar is a line for each step
            report_to=args.report_to or [],
            seed=args.seed,
        )

    def trainer(self, model, **options) -> FinetuningTrainer:
        return FinetuningTrainer(
            model,
            self.options(),
            train_dataset=self.data.sides["train"],
            eval_dataset=self.data.sides.get("validation"),
            data_collator=self.training_collator,
            eval_collator=self.collator,
            compute_metrics=self.scores,
            preprocess_logits_for_metrics=self.preprocess,
            **options,
        )

    @property
    def is_validated(self) -> bool:
        return "validation" in self.data.sides

    @property
    def learning_rate(self) -> float:
        given = self.args.learning_rate
        return LEARNING_RATES[self.model_args.method] if given is None else given

    @property
    def layer_decay(self) -> float:
        default = 1.0 if self.model_args.from_scratch else 0.75
        return default if self.args.layer_decay is None else self.args.layer_decay

    @property
    def ignored(self) -> list[str]:
        """What evaluation need not gather. The configuration lists `predictions` too, meaning those of pretraining."""
        return [name for name in self.config.keys_to_ignore_at_inference if name != "predictions"]

    def train(self) -> None:
        """Begin or go on, to the best model.

        Raises:
            Stop: interrupted, with a checkpoint.
        """
        checkpoint = self.run.begin()
        if checkpoint is not None:
            state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
            print(f"Going on from step {state.global_step}.")
            if self.is_over(state):  # it was stopped while it was evaluated
                self.load(state, checkpoint)
                return
        args, session = self.args, Session(self.args.stop_after)
        callbacks = [Epochs(self.training_collator), session, Clock()]
        if self.is_validated and args.patience:
            callbacks.append(EarlyStoppingCallback(args.patience))
        layers = self.config.num_hidden_layers
        groups = parameter_groups(self.model, layers, self.learning_rate, self.layer_decay, args.weight_decay)
        trainer = self.trainer(self.model, callbacks=callbacks, optimizers=(torch.optim.AdamW(groups), None))
        with session.listening():
            trainer.train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=self.ignored)
        self.state = trainer.state
        if session.interrupted and not self.is_over(trainer.state):
            raise Stop(f"Stopped at step {self.state.global_step}. Run the same command again to go on.")

    def is_over(self, state: TrainerState) -> bool:
        """Whether the run that a checkpoint is of has come to its end."""
        stopping = state.stateful_callbacks.get("EarlyStoppingCallback")
        waited = stopping["attributes"]["early_stopping_patience_counter"] if stopping else 0
        return state.global_step >= state.max_steps or (bool(self.args.patience) and waited >= self.args.patience)

    def load(self, state: TrainerState, last: str) -> None:
        """The best weights of a run that is over."""
        best = str(self.run.checkpoints / Path(state.best_model_checkpoint or last).name)
        if self.model_args.method == "lora":
            self.model.load_adapter(best, self.model.active_adapter, is_trainable=True)
        else:
            self.model.load_state_dict(type(self.model).from_pretrained(best, dtype=torch.float32).state_dict())
        self.state = state

    def finish(self, per_class=None) -> dict[str, Any]:
        """Test the best model as it is saved, save it with its card, and write `results.json`.

        Args:
            per_class (`Callable`, *optional*): From the table of the scores to what the results say of each class.

        Returns:
            `dict`: The results.
        """
        state, model = self.state, self.model
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if self.model_args.method == "lora":
            model = model.merge_and_unload()  # what is tested, saved and pushed is an ordinary model
        self.model = model.requires_grad_(True)
        test = self.data.sides["test"]
        measured = self.trainer(model).evaluate(test, ignore_keys=self.ignored, metric_key_prefix="test")
        table = self.scores.table
        metrics = self.scores.metrics(table, np.ones(len(table)))
        best = [entry for entry in state.log_history if entry["step"] == state.best_global_step]
        validation = {
            name.removeprefix("eval_"): value for entry in best for name, value in entry.items() if "eval_" in name
        }
        results = {
            "metrics": metrics,
            "intervals": intervals(self.scores, table, test.places(), self.args.bootstrap),
            "loss": measured["test_loss"],
            "validation": {name: value for name, value in validation.items() if name in metrics or name == "loss"},
            "samples": {side: len(chips) for side, chips in self.data.sides.items()},
            "places": {side: len(set(chips.places())) for side, chips in self.data.sides.items()},
            "parameters": {"all": model.num_parameters(), "trained": trained},
            "experts": [len(ids) for ids in self.config.expert_ids],
            "steps": state.global_step,
            "best_step": state.best_global_step if self.is_validated else state.global_step,
            "seconds": state.stateful_callbacks["Clock"]["attributes"]["seconds"],
            "peak_memory_mb": peak_memory(),
            "ms_per_chip": 1000 * measured["test_runtime"] / len(test),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "settings": self.run.settings,
        }
        if per_class is not None:
            results["per_class"] = per_class(table)
        model.training_record = {"metrics": metrics, "hyperparameters": self.hyperparameters()}
        if self.dataset is not None:
            model.config.card_data = {**(model.config.card_data or {}), "datasets": [self.dataset]}
        model.save_pretrained(self.run.folder / "model")
        return results

    def hyperparameters(self) -> dict[str, Any]:
        """For the card."""
        wanted = ("method", "learning_rate", "layer_decay", "batch_size", "weight_decay", "warmup", "crop_size", "seed")
        values = {name: self.run.settings[name] for name in wanted if self.run.settings[name] is not None}
        values |= {"learning_rate": self.learning_rate, "layer_decay": self.layer_decay}
        return {**values, "steps": self.state.global_step}

    def close(self, results: dict[str, Any]) -> dict[str, float]:
        """Write the results, which ends the run, push the model, and give the test metrics."""
        print("\n" + results_table(results))
        (self.run.folder / "results.json").write_text(json.dumps(results, indent=1))
        shutil.rmtree(self.run.checkpoints, ignore_errors=True)
        folder = self.run.folder / "model"
        print(f"The model is in {folder}, the results are in {self.run.folder / 'results.json'}.")
        if self.args.push_to_hub:
            try:
                self.model.push_to_hub(self.args.push_to_hub)
            except OSError as error:
                raise Stop(
                    f"All is saved, but not pushed: {error}\nTry again by: hf upload {self.args.push_to_hub} {folder}"
                ) from error
        return results["metrics"]


# Results


def intervals(
    scores: Scores, table: np.ndarray, places: np.ndarray, count: int, seed: int = 0
) -> dict[str, list[float]]:
    """For each metric the bounds that hold 95 % of its values over `count` sets of places, drawn with replacement. None
    for a single place.
    """
    names, place_of = np.unique(places, return_inverse=True)
    if count < 1 or len(names) < 2:
        return {}
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)  # (count, places)
    values: dict[str, list[float]] = {}
    for draw in draws:
        for name, value in scores.metrics(table, draw[place_of].astype(np.float64)).items():
            values.setdefault(name, []).append(value)
    return {name: np.percentile(drawn, [2.5, 97.5]).tolist() for name, drawn in values.items()}


def results_table(results: dict[str, Any]) -> str:
    """Markdown: the metrics with their intervals, and what there is of each class."""
    lines = ["| metric | test | 95 % interval |", "| --- | --- | --- |"]
    for name, value in results["metrics"].items():
        bounds = results["intervals"].get(name)
        lines.append(f"| {name} | {value:.4g} | {'-' if bounds is None else '{:.4g} .. {:.4g}'.format(*bounds)} |")
    per_class = results.get("per_class", {})
    if per_class:
        columns = list(next(iter(per_class.values())))
        lines += ["", f"| class | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
        for name, row in per_class.items():
            cells = ["-" if row[column] is None else f"{row[column]:.4g}" for column in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def peak_memory() -> float | None:
    """Of this process in MB: on the GPU where there is one; `None` on Windows, which does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def can_draw() -> bool:
    """Whether there will be pictures; said if not."""
    if importlib.util.find_spec("matplotlib"):
        return True
    print("No pictures: matplotlib is not installed.")
    return False


@torch.no_grad()
def predict(model, collator: MapexCollator, chip: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The batch of one sample, on the device of the model, and what the model says of it."""
    batch = collator([chip]).to(model.device)
    return batch, model.eval()(**batch)


def picture_of(config: MapexConfig, batch: dict[str, Any]) -> np.ndarray:
    """The sensor of a sample that is shown in colour, or else its first, `(height, width, 3)`."""
    present = [name for name in config.modalities if name in batch["modality_mask"] and batch["modality_mask"][name][0]]
    positions = {name: display_bands(name, config.modalities[name]["bands"]) for name in present}
    name = max(present, key=lambda name: len(positions[name]))
    pixels = batch["pixel_values"][name][0]
    return to_picture(pixels, positions[name], stretch_limits(pixels, positions[name]))


def choose_shown(chips: Chips, count: int) -> list[int]:
    """Positions of up to `count` samples to show, of as many places as there are."""
    places = chips.places()
    _, turns = np.unique(places, return_inverse=True)
    rank = np.array([np.count_nonzero(turns[:index] == turn) for index, turn in enumerate(turns)])
    return np.sort(np.lexsort((np.arange(len(chips)), rank))[:count]).tolist()


def confusion_picture(confusion: np.ndarray, names: Sequence[str]):
    """Rows are what is true, each summing to 1; only classes that occur.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.figure import Figure

    there = np.flatnonzero(confusion.sum(axis=0) + confusion.sum(axis=1))
    shown = confusion[np.ix_(there, there)].astype(np.float64)
    shown /= np.maximum(shown.sum(axis=1, keepdims=True), 1e-12)
    names = [names[index] for index in there]
    side = 2.2 + 0.42 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shown, vmin=0, vmax=1, cmap="Blues")
    if len(names) <= 20:
        for (row, column), value in np.ndenumerate(shown):
            colour = "white" if value > 0.55 else "#444444"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
    return figure


def balanced_weights(counts: np.ndarray) -> list[float]:
    """Weights under which all classes that occur weigh the same, of mean 1 over what is counted; 0 for the others."""
    there = counts > 0
    return [float(weight) for weight in np.where(there, counts.sum() / (there.sum() * np.maximum(counts, 1)), 0.0)]


def choose_class_weights(given: list[str] | None, counts: np.ndarray, names: Sequence[str]) -> list[float] | None:
    """Of `--class_weights`: `balanced`, or a number for each class."""
    if given is None:
        return None
    given = [given] if isinstance(given, (str, float, int)) else given
    if [str(value) for value in given] == ["balanced"]:
        return balanced_weights(counts)
    try:
        weights = [float(value) for value in given]
    except ValueError:
        weights = []
    if len(weights) != len(names) or not all(weight >= 0 for weight in weights):
        raise Stop(f"--class_weights takes `balanced` or a number for each of {list(names)}, got {given}.")
    return weights


def warn_of_absent(counts: dict[str, np.ndarray], names: Sequence[str]) -> None:
    """Classes that are not trained on, and those that the test does not have."""
    for side, text in (("train", "cannot be learnt: no training sample has them"), ("test", "are not tested")):
        if absent := [name for name, count in zip(names, counts[side]) if count == 0]:
            print(f"Classes that {text}: {', '.join(absent)}.")
