"""Features of all samples of a split of shards, computed once and kept: the pooled output of a frozen encoder, or the
statistics of bands.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from command_line import Stop, message_of
from probes import LABEL_KINDS
from torch.utils.data import DataLoader
from tqdm import tqdm

import modeling_mapex
from modeling_mapex import MapexModel
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.data_mapex import read_schema, stream_shards
from modeling_mapex.image_processing_mapex import MapexBatchFeature, MapexImageProcessor
from modeling_mapex.shards_mapex import ShardSchema, shard_files


PERCENTILES = (5, 25, 50, 75, 95)
PROVENANCE = ("_name_or_path", "pruning")


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

    @classmethod
    def _of(cls, pixels: np.ndarray) -> np.ndarray:
        """Of the valid pixels `(bands, pixels)` of a sample: `(bands * statistics,)`."""
        if not pixels.shape[1]:  # of a crop beside others that have some
            return np.zeros(len(pixels) * cls.per_band)
        measured = [pixels.mean(axis=1), pixels.std(axis=1), pixels.min(axis=1), pixels.max(axis=1)]
        return np.stack([*measured, *np.percentile(pixels, PERCENTILES, axis=1)], axis=1).flatten()


def hash_weights(model: torch.nn.Module) -> str:
    """A name for the values of all weights, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class Shards(NamedTuple):
    """Where samples come from.

    Attributes:
        source (`str`): A folder or a data set on the Hub.
        revision (`str`, *optional*): The commit of the data set on the Hub.
        rename (`dict[str, str]`): Sensor of the shards to the modality of the model that it is read as.
    """

    source: str
    revision: str | None
    rename: dict[str, str]

    def schema(self, split: str) -> ShardSchema:
        """With the sensors under the names that they are read as."""
        try:
            schema = read_schema(self.source, split, revision=self.revision)
        except (OSError, ValueError) as error:
            raise Stop(f"{error}") from error
        stored = [name for name in schema.modalities if name in self.rename or name not in self.rename.values()]
        return replace(schema, modalities={self.rename.get(name, name): schema.modalities[name] for name in stored})

    def stored(self, modalities: list[str]) -> list[str]:
        """The names that the shards have for these."""
        originals = {name: stored for stored, name in self.rename.items()}
        return [originals.get(name, name) for name in modalities]

    def identity(self, split: str) -> dict[str, Any]:
        read_as = {"split": split, "rename": self.rename}
        if self.revision:
            return {"source": self.source, "commit": self.revision, **read_as}
        files = [(file.name, file.stat()) for file in shard_files(self.source, split)]
        return {"files": [[name, about.st_size, about.st_mtime_ns] for name, about in files], **read_as}

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
        return Shards(source, None, {})  # whose schema says what is wrong if it is neither
    from huggingface_hub import HfApi

    try:
        return Shards(source, HfApi().dataset_info(source).sha, {})
    except Exception as error:  # of the network come exceptions of the client's own libraries, with no base in common
        raise Stop(f"{source} is no folder, and not to be had from the Hub: {error}") from error


class Reader:
    """Collates samples to parts that have the same modalities in the same sizes, each `(samples, inputs)`: no sample is
    padded, and masks that say that all is there are left out, which cost attention its fastest kernels.
    """

    def __init__(self, collator: MapexCollator, rename: dict[str, str]):
        self.collator, self.rename = collator, rename

    def __call__(self, samples: list[dict[str, Any]]) -> list[tuple[list[tuple], dict[str, Any] | None]]:
        groups: dict[tuple, list[dict[str, Any]]] = {}
        for sample in samples:
            for key in ("images", "gsd", "sensors"):
                sample[key] = {self.rename.get(name, name): value for name, value in sample[key].items()}
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
    extractor: Encoder | BandStatistics,
    shards: Shards,
    split: str,
    schema: ShardSchema,
    *,
    batch_size: int,
    num_workers: int | None = None,
    crop_size: int | None = None,
) -> Features:
    """Features of all samples of a split, with all labels that can be evaluated. They are read by `num_workers`
    processes; by default by 4 beside a GPU, and by none on a CPU, where they would take the encoder's cores.

    Raises:
        Stop: no sample has any of the sensors, or there are features that are not finite.
    """
    labels = [name for name, spec in schema.labels.items() if spec["kind"] in LABEL_KINDS]
    stream = stream_shards(
        shards.source, split, modalities=shards.stored(extractor.modalities), labels=labels, revision=shards.revision
    )
    if num_workers is None:
        num_workers = 4 if torch.cuda.is_available() else 0
    loader = DataLoader(
        stream,
        batch_size=batch_size,
        num_workers=min(num_workers, stream.num_shards),
        collate_fn=Reader(MapexCollator(extractor.processor, crop_size=crop_size), shards.rename),
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
    extractor: Encoder | BandStatistics,
    shards: Shards,
    split: str,
    schema: ShardSchema,
    cache_dir: str,
    *,
    batch_size: int,
    num_workers: int | None = None,
    crop_size: int | None = None,
) -> Features:
    """As [`compute_features`], which is called only where its result is not in `cache_dir`."""
    code = [Path(__file__), *sorted(Path(modeling_mapex.__file__).parent.glob("*.py"))]
    identity = {
        **extractor.identity(),
        "modalities": extractor.modalities,
        "shards": shards.identity(split),
        "crop_size": crop_size,
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest(),
        "torch": torch.__version__,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    file = Path(cache_dir) / f"{key[:40]}.npz"
    if file.is_file():
        try:
            return read_features(file)
        except Exception as error:  # there is hardly one that a damaged file cannot raise
            print(f"{file} is damaged ({type(error).__name__}: {error}): computing it again.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # before the work, in case it cannot be
        features = compute_features(
            extractor,
            shards,
            split,
            schema,
            batch_size=batch_size,
            num_workers=num_workers,
            crop_size=crop_size,
        )
        write_features(file, features)
    except (OSError, ValueError) as error:
        raise Stop(message_of(error)) from error
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
