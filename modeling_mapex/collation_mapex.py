"""`MapexCollator`: from samples of shards, augmented on the way, to a normalised batch for a model."""

import zlib
from typing import Any

import numpy as np
import torch

from .augmentation_mapex import drop_bands, drop_modalities, layer_sizes, random_crop, random_flip
from .image_processing_mapex import MapexBatchFeature, MapexImageProcessor, NoValidPixelError, combine_gsd
from .shards_mapex import without_data


_CROPS = 20  # draws of a crop with a valid pixel before a sample is given up


class MapexCollator:
    """Collates samples of shards, which may lack modalities and come from data sets with different bands and units, to
    a batch for a MAPEX model. For a `DataLoader`, `Trainer` or Accelerate.

    A modality without a valid pixel, in the sample or in the crop of it, counts as absent.

    What is random depends on the seed, the epoch and the id of each sample only: not on workers or the order of the
    samples, and the same after a resume.

    Args:
        processor ([`MapexImageProcessor`]): Of the model.
        label (`str`, *optional*): The label to put into the batch as `labels`: a class as int64 `(batch,)`, several as
            float32 `(batch, classes)`, a mask, or a map of whole numbers, as int64 `(batch, height, width)`, a map of
            others as float32 of that shape.
        label_codes (`dict[int, int | None]`, *optional*):
            Of a mask: the class of each code that is stored, `None` for pixels that do not count, which become
            `ignore_index`. Default: codes are classes.
        ignore_index (`int`): See `label_codes`; `config.semantic_loss_ignore_index` of the model.
        label_nodata (`float`, *optional*): Of a map: the value that stands for none, which becomes NaN; whole numbers
            become float32.
        crop_size (`int`, *optional*): Cut samples to this side, in pixels of their finest layer. Where no modality has
            a valid pixel in the crop, another is drawn.
        flip (`bool`): Mirror and turn samples.
        modality_dropout (`float`): Probability of leaving out a modality.
        band_dropout (`float`): Probability of replacing a band by its mean.
        group (`bool`):
            For pretraining: instead of filling up to one shape, give `{"groups": [...]}`, batches whose samples have
            the same modalities in the same sizes, which `MapexForPreTraining` trains on as one. Of samples smaller
            than `crop_size` the largest square is taken.
        seed (`int`): Of all that is random.

    Raises (when called):
        NoValidPixelError: a sample has not one valid pixel, or none of many crops of it has; a `ValueError`.
        ValueError: a sample lacks the label, samples differ in size, a code is not in `label_codes`, or the processor
            refuses the values.
    """

    def __init__(
        self,
        processor: MapexImageProcessor,
        *,
        label: str | None = None,
        label_codes: dict[int, int | None] | None = None,
        ignore_index: int = 255,
        label_nodata: float | None = None,
        crop_size: int | None = None,
        flip: bool = False,
        modality_dropout: float = 0.0,
        band_dropout: float = 0.0,
        group: bool = False,
        seed: int = 0,
    ):
        if group and label is not None:
            raise ValueError("`group=True` is for pretraining, which has no labels: leave out `label`.")
        self.processor = processor
        self.label = label
        self.label_codes = label_codes
        self.ignore_index = ignore_index
        self.label_nodata = label_nodata
        self.crop_size = crop_size
        self.flip = flip
        self.modality_dropout = modality_dropout
        self.band_dropout = band_dropout
        self.group = group
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # reaches workers that are already running

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops, flips and dropouts than in earlier epochs."""
        self._epoch.fill_(epoch)

    def __call__(self, samples: list[dict[str, Any]]) -> MapexBatchFeature | dict[str, list[dict[str, Any]]]:
        samples = [self._augment(sample) for sample in samples]
        if self.group:
            groups = _group(samples, by_shape=True).values()
            return {"groups": [self._whole([samples[index] for index in indices]) for indices in groups]}
        batch = self._batch(samples)
        if self.label is not None:
            batch["labels"] = self._labels(samples)
        return batch

    def _batch(self, samples: list[dict[str, Any]]) -> MapexBatchFeature:
        parts = [
            (indices, self._process([samples[index] for index in indices])) for indices in _group(samples).values()
        ]
        batch = parts[0][1] if len(parts) == 1 else _merge(parts, len(samples))
        if self.band_dropout:
            draws = {
                name: self._draw_bands(samples, name, pixels.shape[1]) for name, pixels in batch["pixel_values"].items()
            }
            batch["pixel_values"] = drop_bands(batch["pixel_values"], self.band_dropout, draws)
        return batch

    def _whole(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of samples that have the same modalities, without masks that say that all is there."""
        batch = self._batch(samples)
        valid = {name: mask for name, mask in batch["valid_mask"].items() if not mask.all()}
        kept = {"pixel_values": batch["pixel_values"], "gsd": batch["gsd"]}
        return kept | ({"valid_mask": valid} if valid else {})

    def _generator(self, content: str, epoch: int | None = None) -> torch.Generator:
        epoch = int(self._epoch) if epoch is None else epoch
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}-{epoch}-{content}".encode()))

    def _draw_bands(self, samples: list[dict[str, Any]], modality: str, count: int) -> torch.Tensor:
        """Numbers for the bands of a modality, of each sample by itself: `(batch, count)`."""
        generators = [self._generator(f"{sample['id']}-{modality}", sample.get("epoch")) for sample in samples]
        return torch.stack([torch.rand(count, generator=generator) for generator in generators])

    def _augment(self, sample: dict[str, Any]) -> dict[str, Any]:
        generator = self._generator(sample["id"], sample.get("epoch"))  # in a mixture each data set has its own epoch
        if self.crop_size is not None:
            size = self.crop_size
            if self.group:  # samples of any size go together
                size = min(size, *(max(sides) for sides in zip(*layer_sizes(sample).values())))
            sample = self._crop(sample, size, generator)
        elif (whole := self._with_data(sample)) is not None:
            sample = whole
        else:
            raise NoValidPixelError(f"Sample `{sample['id']}` has not one valid pixel of any sensor. Leave it out.")
        if self.flip:
            sample = random_flip(sample, generator)
        if self.modality_dropout:
            sample = drop_modalities(sample, self.modality_dropout, generator)
        return sample

    def _crop(self, sample: dict[str, Any], size: int, generator: torch.Generator) -> dict[str, Any]:
        for _ in range(_CROPS):
            crop = self._with_data(random_crop(sample, size, generator))
            if crop is not None:
                return crop
        raise NoValidPixelError(
            f"None of {_CROPS} crops of {size} pixels out of sample `{sample['id']}` has one valid pixel. Leave the "
            "sample out, or choose a larger `crop_size`."
        )

    def _with_data(self, sample: dict[str, Any]) -> dict[str, Any] | None:
        """The sample with `None` for modalities without a valid pixel, or nothing if there is no other."""
        present = {name: self._has_data(sample, name) for name in sample["images"]}
        if not any(present.values()):
            return None
        images = {name: pixels if present[name] else None for name, pixels in sample["images"].items()}
        return {**sample, "images": images}

    def _has_data(self, sample: dict[str, Any], name: str) -> bool:
        """Whether a modality is there and has a valid pixel; what that is the processor decides."""
        pixels, sensor = sample["images"][name], sample["sensors"][name]
        if pixels is None:
            return False
        spec = self.processor.modalities.get(name, {})  # an unknown one it refuses itself
        sentinels = spec.get("nodata", []) if sensor.get("nodata") is None else sensor["nodata"]
        height, width = pixels.shape[1:]
        keeps_size = not (height % spec.get("patch_size", 1) or width % spec.get("patch_size", 1))
        # To find out fast, as nearly all have: of an image that is not resized the pixel in the middle will do.
        some = pixels[:, height // 2, width // 2] if keeps_size else pixels
        if sensor["unit"] != "linear" and not without_data(some, sentinels).any():
            return True
        try:
            self._process([{**sample, "images": {**dict.fromkeys(sample["images"]), name: pixels}}])
        except NoValidPixelError:
            return False
        return True

    def _process(self, samples: list[dict[str, Any]]) -> MapexBatchFeature:
        """Samples of one description."""
        options: dict[str, dict[str, Any]] = {key: {} for key in ("bands", "units", "gsd", "nodata", "dn_offset")}
        images = {}
        for name, sensor in samples[0]["sensors"].items():
            layers = [sample["images"][name] for sample in samples]
            if all(layer is None for layer in layers):
                continue
            images[name] = layers
            options["units"][name] = sensor["unit"]
            options["gsd"][name] = [sample["gsd"][name] for sample, layer in zip(samples, layers) if layer is not None]
            if sensor["unit"] != "class":
                options["bands"][name] = sensor["bands"]
            for key in ("nodata", "dn_offset"):
                if sensor.get(key) is not None:
                    options[key][name] = sensor[key]
        return self.processor(images, **options)

    def _labels(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        values = []
        for sample in samples:
            labels = sample["labels"]
            if labels.get(self.label) is None:
                there = [name for name, value in labels.items() if value is not None]
                raise ValueError(
                    f"Sample `{sample['id']}` has no label `{self.label}`, only {there}. Filter such samples out, or "
                    "choose another `label`."
                )
            values.append(np.asarray(labels[self.label]))
        shapes = {value.shape for value in values}
        if len(shapes) > 1:
            raise ValueError(f"The labels `{self.label}` differ in shape: {sorted(shapes)}. Set `crop_size`.")
        stacked = np.stack(values)
        if self.label_codes is not None:
            stacked = self._to_classes(stacked, samples)
        stacked = stacked.astype(_label_dtype(values[0]) if self.label_nodata is None else np.float32)
        if self.label_nodata is not None:
            stacked[stacked == np.float32(self.label_nodata)] = np.nan
        return torch.from_numpy(stacked)

    def _to_classes(self, codes: np.ndarray, samples: list[dict[str, Any]]) -> np.ndarray:
        found, positions = np.unique(codes, return_inverse=True)
        unknown = [code for code in found.tolist() if code not in self.label_codes]
        if unknown:
            holder = next(sample["id"] for sample, part in zip(samples, codes) if np.isin(part, unknown).any())
            raise ValueError(
                f"`{self.label}` of sample `{holder}` holds {unknown}, which `label_codes` does not name "
                f"({sorted(self.label_codes)}). Give each its class, or `None` if it does not count."
            )
        classes = [self.label_codes[code] for code in found.tolist()]
        classes = np.array([self.ignore_index if index is None else index for index in classes], dtype=np.int64)
        return classes[positions].reshape(codes.shape)


def _label_dtype(value: np.ndarray) -> type:
    # One value is a class; a list of 0 and 1 are targets of a binary cross-entropy, which are floats; whole numbers per
    # pixel are classes again, and fractions values.
    return np.float32 if value.ndim == 1 or value.dtype.kind == "f" else np.int64


def _group(samples: list[dict[str, Any]], by_shape: bool = False) -> dict[Any, list[int]]:
    """Positions of the samples of one description: what the processor must be told is the same for them. `by_shape`
    also tells apart samples that have different modalities, or the same in different sizes.
    """
    groups: dict[Any, list[int]] = {}
    descriptions: dict[int, str] = {}  # samples of one data set share the very same dictionary
    for index, sample in enumerate(samples):
        sensors = sample["sensors"]
        if id(sensors) not in descriptions:
            descriptions[id(sensors)] = repr(sorted(sensors.items()))
        key = descriptions[id(sensors)]
        if by_shape:
            shapes = [(name, pixels.shape) for name, pixels in sample["images"].items() if pixels is not None]
            key = (key, *sorted(shapes))
        groups.setdefault(key, []).append(index)
    return groups


def _merge(parts: list[tuple[list[int], MapexBatchFeature]], batch_size: int) -> MapexBatchFeature:
    """One batch of several, each with the positions of its samples."""
    merged: dict[str, dict[str, Any]] = {"pixel_values": {}, "modality_mask": {}, "valid_mask": {}, "gsd": {}}
    metres: dict[str, np.ndarray] = {}
    for indices, part in parts:
        for name, pixels in part["pixel_values"].items():
            if name not in merged["pixel_values"]:
                merged["pixel_values"][name] = pixels.new_zeros(batch_size, *pixels.shape[1:])
                merged["modality_mask"][name] = torch.zeros(batch_size, dtype=torch.bool)
                merged["valid_mask"][name] = torch.zeros(batch_size, *pixels.shape[2:], dtype=torch.bool)
                metres[name] = np.full(batch_size, np.nan)
            whole = merged["pixel_values"][name]
            if whole.shape != (batch_size, *pixels.shape[1:]):
                raise ValueError(
                    f"`{name}` comes with {tuple(whole.shape[2:])} and with {tuple(pixels.shape[2:])} pixels. A batch "
                    "holds one size per modality: set `crop_size`, or batch the data sets apart."
                )
            for key in ("pixel_values", "modality_mask", "valid_mask"):
                merged[key][name][indices] = part[key][name]
            metres[name][indices] = part["gsd"][name]
    for name, values in metres.items():
        merged["gsd"][name] = combine_gsd(np.where(np.isnan(values), np.nanmean(values), values))
    return MapexBatchFeature(merged)
