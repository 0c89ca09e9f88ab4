r"""What a frozen MAPEX encoder knows of a task: nearest neighbours and logistic regression on its embeddings.

    pip install -e ".[data,evaluate]"
    python examples/evaluate_frozen.py --model examples/checkpoints/mapex-nano --shards data/eurosat_rgb
    # pruned while loading, with few labels, beside the two controls
    python examples/evaluate_frozen.py --model org/mapex-base --shards org/bigearthnet-shards --modalities s1 s2 \
        --bands s2=B04,B03,B02 --experts_per_layer 1 --shots 10 50 all --random_weights --band_statistics \
        --output outputs/frozen/bigearthnet.json
    # several models, and splits that come with the data
    python examples/evaluate_frozen.py --model outputs/nano-{0,1,2}/model --shards data/task \
        --validation validation --test test

The task is a label of the shards of kind `class` or `multi_label`. Prints a table in Markdown and writes everything as
JSON. Accuracy and macro F1 for one label; for several, mean average precision (macro) and micro F1.

- The places of the training split are divided among training, validation and test, so that no test chip has a
  neighbour in training; `--validation` and `--test` may instead name splits of the shards. With a `--test` no larger
  than `--held_out` of run_pretraining.py, and its `--split_seed`, no test place was seen in pretraining either.
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
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from command_line import Stop
from probes import KINDS, METRICS, MOST_ITERATIONS, fit_logistic, neighbor_scores, summarize
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser

import modeling_mapex
from modeling_mapex import SENSORS, MapexConfig, MapexModel
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.data_mapex import read_schema, split_of_place, stream_shards
from modeling_mapex.image_processing_mapex import MapexBatchFeature, MapexImageProcessor
from modeling_mapex.shards_mapex import ShardSchema, shard_files


PERCENTILES = (5, 25, 50, 75, 95)
PROVENANCE = ("_name_or_path", "pruning")


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
class DataArguments:
    """What to evaluate on."""

    shards: str | None = field(default=None, metadata={"help": "A folder of shards, or a data set on the Hub."})
    label: str | None = field(
        default=None, metadata={"help": "A label of kind class or multi_label. Default: the only one there is."}
    )
    train: str = field(default="train", metadata={"help": "Split of the shards to train on."})
    validation: str = field(
        default="0.2", metadata={"help": "Share of the training split's places, or another split, to choose C on."}
    )
    test: str = field(
        default="0.2", metadata={"help": "Share of the training split's places, or another split, to test on."}
    )
    split_seed: int = field(default=0, metadata={"help": "Chooses the places."})
    crop_size: int | None = field(
        default=None, metadata={"help": "Side in pixels of a crop, at a place that the sample's id fixes."}
    )
    batch_size: int = field(default=64, metadata={"help": "Samples at a time."})
    num_workers: int = field(default=1, metadata={"help": "Processes that read, no more than there are shards."})
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


class Features(NamedTuple):
    """Of the samples of a split, in the order of their ids.

    Attributes:
        values (`np.ndarray` of shape `(samples, features)`): float32.
        ids, places (`np.ndarray` of shape `(samples,)`): Strings.
        labels (`dict[str, np.ndarray]`): Label to classes `(samples,)`, or 0 and 1 `(samples, classes)`; -1: unknown.
        absent (`np.ndarray` of shape `(modalities,)`): In how many of the samples each modality is missing.
        without (`int`): How many further samples have none of the modalities and were left out.
    """

    values: np.ndarray
    ids: np.ndarray
    places: np.ndarray
    labels: dict[str, np.ndarray]
    absent: np.ndarray
    without: int

    def select(self, chosen: np.ndarray) -> "Features":
        """Some of the samples."""
        labels = {name: value[chosen] for name, value in self.labels.items()}
        return self._replace(
            values=self.values[chosen], ids=self.ids[chosen], places=self.places[chosen], labels=labels
        )


# What gives features of a batch: an encoder, or the statistics of its bands.


class Encoder:
    """The pooled output of a frozen model."""

    def __init__(self, name: str, model: MapexModel, modalities: list[str]):
        self.name = name
        self.modalities = modalities
        self.processor = MapexImageProcessor.from_config(model.config)
        self.parameters = model.num_parameters()
        self.config = model.config
        self._weights = hash_weights(model)
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def identity(self) -> dict[str, Any]:
        """All of it that changes features, which where it came from does not."""
        config = {name: value for name, value in self.config.to_dict().items() if name not in PROVENANCE}
        return {"config": config, "weights": self._weights, "device": self.model.device.type}

    def __call__(self, inputs: dict[str, Any]) -> torch.Tensor:
        batch = MapexBatchFeature(inputs).to(self.model.device, non_blocking=True)
        return self.model(**batch).pooler_output.float()  # (B, D)


class BandStatistics:
    """Mean, standard deviation, minimum, maximum and percentiles of the valid pixels of each band, normalised; zeros,
    which stand for the band's usual mean, for a modality that a sample lacks.
    """

    name = "band statistics"
    parameters = 0
    config = None
    per_band = 4 + len(PERCENTILES)

    def __init__(self, processor: MapexImageProcessor, modalities: list[str]):
        # Patches of one pixel, so that nothing is resized.
        specs = {name: {**processor.modalities[name], "patch_size": 1} for name in modalities}
        self.processor = MapexImageProcessor(modalities=specs)
        self.modalities = modalities

    def identity(self) -> dict[str, Any]:
        return {"statistics": self.processor.modalities}

    def __call__(self, inputs: dict[str, Any]) -> torch.Tensor:
        columns = []
        for name in self.modalities:
            pixels = inputs["pixel_values"].get(name)
            if pixels is None:
                count = len(next(iter(inputs["pixel_values"].values())))
                columns.append(np.zeros((count, len(self.processor.modalities[name]["bands"]) * self.per_band)))
                continue
            valid = inputs.get("valid_mask", {}).get(name, torch.ones_like(pixels[:, 0], dtype=torch.bool))
            columns.append(np.stack([self._of(image[:, mask].numpy()) for image, mask in zip(pixels, valid)]))
        return torch.from_numpy(np.concatenate(columns, axis=1)).float()

    @staticmethod
    def _of(pixels: np.ndarray) -> np.ndarray:
        """Of the valid pixels `(bands, pixels)` of a sample: `(bands * statistics,)`."""
        measured = [pixels.mean(axis=1), pixels.std(axis=1), pixels.min(axis=1), pixels.max(axis=1)]
        return np.stack([*measured, *np.percentile(pixels, PERCENTILES, axis=1)], axis=1).flatten()


def hash_weights(model: torch.nn.Module) -> str:
    """A name for the values of all weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def parse_bands(args: ModelArguments) -> dict[str, list[str] | None] | None:
    """Modality to its bands, or to `None` for all; `None` if nothing is to be pruned."""
    if args.modalities is None:
        for name in ("bands", "coverage", "experts_per_layer", "criterion"):
            if getattr(args, name) is not None:
                raise Stop(f"--{name} says how to prune, but --modalities does not say for what: give both.")
        return None
    chosen: dict[str, list[str] | None] = dict.fromkeys(args.modalities)
    for entry in args.bands or []:
        name, separator, bands = entry.partition("=")
        if not separator or not bands or name not in chosen:
            raise Stop(f"--bands takes modality=band,band for one of --modalities {args.modalities}, got `{entry}`.")
        chosen[name] = bands.split(",")
    return chosen


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


# Features: read, computed, kept.


class Shards(NamedTuple):
    """Where samples come from; `revision` is the commit of a data set on the Hub."""

    source: str
    revision: str | None

    def schema(self, split: str) -> ShardSchema:
        try:
            return read_schema(self.source, split, revision=self.revision)
        except (OSError, ValueError) as error:
            raise Stop(f"{error}") from error

    def identity(self, split: str) -> dict[str, Any]:
        if self.revision:
            return {"source": self.source, "commit": self.revision, "split": split}
        files = [(file.name, file.stat()) for file in shard_files(self.source, split)]
        return {"split": split, "files": [[name, about.st_size, about.st_mtime_ns] for name, about in files]}

    def count(self, split: str) -> int | None:
        """Samples of a split, where that is known without asking the Hub."""
        import pyarrow.parquet as pq

        if self.revision:
            return None
        return sum(pq.read_metadata(file).num_rows for file in shard_files(self.source, split))


def open_shards(source: str | None) -> Shards:
    if source is None:
        raise Stop("Give --shards, a folder of shards or a data set on the Hub.")
    if Path(source).is_dir() or source.count("/") != 1:
        return Shards(source, None)  # whose schema says what is wrong if it is neither
    from huggingface_hub import HfApi

    try:
        return Shards(source, HfApi().dataset_info(source).sha)
    except Exception as error:  # of the network come exceptions of the client's own libraries, with no base in common
        raise Stop(f"{source} is no folder, and not to be had from the Hub: {error}") from error


class Reader:
    """Collates samples to parts that have the same modalities in the same sizes, each `(samples, inputs)`: no sample is
    padded, and masks that say that all is there are left out, which cost attention its fastest kernels.
    """

    def __init__(self, collator: MapexCollator):
        self.collator = collator

    def __call__(self, samples: list[dict[str, Any]]) -> list[tuple[list[tuple], dict[str, Any] | None]]:
        groups: dict[tuple, list[dict[str, Any]]] = {}
        for sample in samples:
            shapes = [(name, pixels.shape) for name, pixels in sample["images"].items() if pixels is not None]
            groups.setdefault(tuple(shapes), []).append(sample)
        return [([self._about(sample) for sample in group], self._inputs(group, key)) for key, group in groups.items()]

    @staticmethod
    def _about(sample: dict[str, Any]) -> tuple:
        present = [pixels is not None for pixels in sample["images"].values()]
        return sample["id"], sample["place"], list(sample["labels"].values()), present

    def _inputs(self, samples: list[dict[str, Any]], shapes: tuple) -> dict[str, Any] | None:
        if not shapes:
            return None
        batch = self.collator(samples)
        valid = {name: mask for name, mask in batch["valid_mask"].items() if not mask.all()}
        return {"pixel_values": batch["pixel_values"], "gsd": batch["gsd"]} | ({"valid_mask": valid} if valid else {})


@torch.inference_mode()
def compute_features(
    extractor: Encoder | BandStatistics, shards: Shards, split: str, schema: ShardSchema, args: DataArguments
) -> Features:
    """Features of all samples of a split, with all labels that can be evaluated."""
    labels = [name for name, spec in schema.labels.items() if spec["kind"] in KINDS]
    stream = stream_shards(
        shards.source, split, modalities=extractor.modalities, labels=labels, revision=shards.revision
    )
    loader = DataLoader(
        stream,
        batch_size=args.batch_size,
        num_workers=min(args.num_workers, stream.num_shards),
        collate_fn=Reader(MapexCollator(extractor.processor, crop_size=args.crop_size)),
        pin_memory=torch.cuda.is_available(),
    )
    values, rows, without = [], [], 0
    with tqdm(total=shards.count(split), desc=f"{extractor.name}: {split}", unit="sample") as progress:
        for parts in loader:
            for samples, inputs in parts:
                if inputs is None:
                    without += len(samples)
                else:
                    values.append(extractor(inputs))
                    rows += samples
                progress.update(len(samples))
    if not rows:
        raise Stop(f"No sample of the split `{split}` in {shards.source} has any of {extractor.modalities}.")
    stacked = torch.cat(values).cpu().numpy()
    strange = [row[0] for row, finite in zip(rows, np.isfinite(stacked).all(axis=1)) if not finite]
    if strange:
        raise Stop(
            f"The features that {extractor.name} gives of {len(strange)} samples are not finite, {strange[:3]} among "
            "them: the weights are damaged, or of a run that diverged."
        )
    ids, places, classes, present = zip(*rows)
    order = np.argsort(ids, kind="stable")  # in which they are read depends on the number of workers
    unknown = {
        name: -1 if schema.labels[name]["kind"] == "class" else [-1] * len(schema.labels[name]["names"])
        for name in labels
    }
    columns = {
        name: np.array([unknown[name] if row[index] is None else row[index] for row in classes])
        for index, name in enumerate(labels)
    }
    absent = len(rows) - np.sum(present, axis=0)
    return Features(stacked, np.array(ids), np.array(places), columns, absent, without).select(order)


def cached_features(
    extractor: Encoder | BandStatistics, shards: Shards, split: str, schema: ShardSchema, args: DataArguments
) -> Features:
    """As [`compute_features`], which is called only where its result is not in the cache."""
    code = [Path(__file__), *sorted(Path(modeling_mapex.__file__).parent.glob("*.py"))]
    identity = {
        **extractor.identity(),
        "modalities": extractor.modalities,
        "shards": shards.identity(split),
        "crop_size": args.crop_size,
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest(),
        "torch": torch.__version__,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    file = Path(args.cache_dir) / f"{key[:40]}.npz"
    if file.is_file():
        try:
            return read_features(file)
        except Exception as error:  # there is hardly one that a damaged file cannot raise
            print(f"{file} is damaged ({type(error).__name__}: {error}): computing it again.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # before the work, in case it cannot be
        features = compute_features(extractor, shards, split, schema, args)
        write_features(file, features)
    except (OSError, ValueError) as error:
        # From a worker comes its traceback as well, with what the user wants to know at the end.
        raise Stop(f"{error}".rsplit(f"{type(error).__name__}: ", 1)[-1].strip()) from error
    return features


def read_features(file: Path) -> Features:
    with np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored}
    labels = {name.removeprefix("label_"): arrays.pop(name) for name in list(arrays) if name.startswith("label_")}
    return Features(**{**arrays, "labels": labels, "without": int(arrays["without"])})


def write_features(file: Path, features: Features) -> None:
    """Whole or not at all."""
    arrays = features._asdict()
    arrays |= {f"label_{name}": value for name, value in arrays.pop("labels").items()}
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as temporary:
        try:
            np.savez(temporary, **arrays)
            temporary.close()
            os.replace(temporary.name, file)
        except BaseException:
            os.unlink(temporary.name)
            raise


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


def choose_label(schema: ShardSchema, wanted: str | None) -> str:
    kinds = {name: spec["kind"] for name, spec in schema.labels.items()}
    possible = [name for name, kind in kinds.items() if kind in KINDS]
    if wanted is None:
        if len(possible) == 1:
            return possible[0]
        raise Stop(f"The shards have {len(possible)} labels that can be evaluated, of {kinds}: name one with --label.")
    if wanted not in kinds:
        raise Stop(f"The shards have no label `{wanted}`. They have {kinds or 'none'}.")
    if wanted not in possible:
        raise Stop(
            f"The label `{wanted}` is of kind {kinds[wanted]}; only {' and '.join(KINDS)} are evaluated: {possible}."
        )
    return wanted


def define_task(args: DataArguments, shards: Shards, schema: ShardSchema) -> Task:
    label = choose_label(schema, args.label)
    shares, splits = {}, {}
    for side in ("validation", "test"):
        given = getattr(args, side)
        try:
            shares[side] = float(given)
        except ValueError:
            if given in (args.train, *splits.values()):
                raise Stop(f"The split `{given}` cannot serve twice: --train, --validation and --test.") from None
            splits[side] = given
            if shards.schema(given).labels.get(label) != schema.labels[label]:
                raise Stop(f"The split `{given}` has another label `{label}` than `{args.train}`, or none.") from None
    if any(not 0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise Stop(f"Shares of the places must lie above 0 and leave some to train on, got {shares}.")
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

    whole = labelled(args.train)
    shares = {"train": 1 - sum(task.shares.values()), **task.shares}
    draws = np.array([split_of_place(place, shares, args.split_seed) for place in whole.places.tolist()])
    sides = {side: whole.select(draws == side) for side in shares}
    sides |= {side: labelled(split) for side, split in task.splits.items()}
    for side, features in sides.items():
        if len(features.ids) == 0:
            raise Stop(
                f"No labelled sample is left for {side}: there are {len(set(whole.places))} places in `{args.train}`. "
                "Give it a larger share or another --split_seed, or a split of its own."
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
    if data_args.batch_size < 1 or data_args.num_workers < 0:
        raise Stop("--batch_size must be 1 or more, and --num_workers 0 or more.")


def main(model_args: ModelArguments, data_args: DataArguments, args: ProbeArguments) -> dict[str, Any]:
    check_arguments(model_args, data_args, args)
    shards = open_shards(data_args.shards)
    schema = shards.schema(data_args.train)
    task = define_task(data_args, shards, schema)
    if unknown := [name for name in model_args.modalities or [] if name not in schema.modalities]:
        raise Stop(f"The shards have no modalities {unknown}, only {list(schema.modalities)}.")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)

    rows, notes = [], []
    for extractor in extractors(model_args, schema, args.seed, notes):

        def load(split: str, extractor=extractor) -> Features:
            return cached_features(extractor, shards, split, schema, data_args)

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
    main(*HfArgumentParser((ModelArguments, DataArguments, ProbeArguments)).parse_args_into_dataclasses())
