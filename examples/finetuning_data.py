"""Labelled shards for the fine-tuning scripts: which label, which sensors, which samples on which side of the split."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from command_line import Stop, ignore_interrupts
from finetuning_options import DataArguments, ModelArguments, ShardArguments, assignments
from torch.utils.data import Dataset, get_worker_info

from modeling_mapex import MapexConfig
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.data_mapex import load_shards, read_schema, split_of_place
from modeling_mapex.extension_mapex import extend_config
from modeling_mapex.image_processing_mapex import NoValidPixelError
from modeling_mapex.shards_mapex import ShardSchema, from_bytes


SIDES = ("train", "validation", "test")
SHARE = 0.15  # of the places, to validate and to test on
KINDS = {  # of labels, by the script that takes them
    "run_image_classification.py": ("class", "multi_label"),
    "run_semantic_segmentation.py": ("mask",),
    "run_pixel_regression.py": ("map",),
}


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
        if (worker := get_worker_info()) is not None:  # `Trainer` has a `worker_init_fn` of its own
            ignore_interrupts(worker.id)
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
        config (`MapexConfig`): Of the whole model, with the sensors of `--add`.
    """

    label: str
    spec: dict[str, Any]
    modalities: dict[str, list[str] | None]
    sides: dict[str, Chips]
    config: MapexConfig


def read_data(model_args: ModelArguments, data_args: DataArguments, kinds: Sequence[str], seed: int) -> Data:
    """Choose label and sensors, and split the samples; what is chosen or left out is printed."""
    if data_args.shards is None:
        raise Stop("Nothing to train on: give --shards, a folder of shards or a data set on the Hub.")
    try:
        config = read_config(model_args)
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
    return Data(label, schema.labels[label], modalities, sides, config)


def read_config(args: ModelArguments) -> MapexConfig:
    """Of the whole model, with the sensors of `--add`.

    Raises:
        OSError, ValueError: there is no such model, or it cannot have these sensors.
    """
    config = MapexConfig.from_pretrained(args.model)
    for name, like in assignments("--add", args.add).items():
        config = extend_config(config, name, like)
    return config


def choose_label(args: ShardArguments, schema: ShardSchema, kinds: Sequence[str]) -> str:
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
        kind = schema.labels[args.label]["kind"]
        script = next(script for script, taken in KINDS.items() if kind in taken)
        raise Stop(f"`{args.label}` is of kind {kind}, but this script takes {wanted}: use {script}.")
    return args.label


def read_rename(args: ShardArguments, schema: ShardSchema) -> dict[str, str]:
    """Of `--rename`: sensor of the shards to modality of the model."""
    rename = assignments("--rename", args.rename)
    if unknown := [name for name in rename if name not in schema.modalities]:
        raise Stop(f"--rename names {unknown}, but {args.shards} has {list(schema.modalities)}.")
    return rename


def choose_modalities(
    model_args: ModelArguments, data_args: DataArguments, config: MapexConfig, schema: ShardSchema
) -> tuple[dict[str, str], dict[str, list[str] | None]]:
    """Sensors of the shards to read with the modality that each becomes, and the bands to keep of each modality."""
    rename = read_rename(data_args, schema)
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
    added = assignments("--add", model_args.add)
    if useless := [name for name, like in added.items() if name not in wanted or like not in wanted]:
        raise Stop(
            f"--add makes {useless} of {[added[name] for name in useless]}, and both must be among --modalities. To "
            "use a sensor of the shards in place of one of the model: --rename; or `add_modality`, which takes other "
            "names of bands too, and --model with the folder that its model was saved to."
        )
    if strange := [name for name in bands if name in added]:
        raise Stop(f"--bands names {strange}, which have the bands of {[added[name] for name in strange]} by --add.")
    bands |= {name: bands[like] for name, like in added.items() if like in bands}
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
    shares, named = plan_sides(args)
    sides = {side: open_split(args, split, names, label) for side, split in named.items()}
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
        if both := set(sides["train"].places()) & set(sides[side].places()):
            print(f"Beware: {len(both)} places of the split `{named[side]}` are trained on as well.")
    return {side: sides[side] for side in SIDES if side in sides}


def plan_sides(args: ShardArguments) -> tuple[dict[str, float], dict[str, str]]:
    """To validate and to test on: side to its share of the places of the training split, or to a split of its own."""
    shares, named = {}, {}
    for side in ("validation", "test"):
        share, split = getattr(args, side), getattr(args, f"{side}_split")
        if split is None:
            shares[side] = SHARE if share is None else share
        elif share is None:
            named[side] = split
        else:
            raise Stop(f"--{side} is a share of --train_split, and --{side}_split another split: give one of the two.")
    if any(not 0 <= share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise Stop(f"Shares lie between 0 and 1 and leave something to train on, got {shares}.")
    return shares, named


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


def window_metres(args: DataArguments, data: Data) -> float:
    """The mean side of what is trained on, crops or whole samples. Crops are measured in pixels of the finest layer,
    which the labels may be.
    """
    chips, metres = data.sides["train"], []
    resolutions = zip(*(chips.column(f"{stored}__gsd") for stored in chips.names))
    for sizes, gsd in zip(chips.sizes(), resolutions):
        sides = [max(size) if size is not None else 0 for size in sizes]  # of the sensors, then of the labels
        side, resolution = max((side, gsd) for side, gsd in zip(sides, gsd) if side)
        metres.append((args.crop_size or max(sides)) * side / max(sides) * resolution)
    return float(np.mean(metres))


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
        except NoValidPixelError as error:
            raise Stop(f"{error}") from error
        except ValueError as error:
            raise Stop(f"Sample `{sample['id']}`: {error}") from error
