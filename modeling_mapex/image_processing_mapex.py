"""`MapexImageProcessor`: from arrays of any sensor, with named bands and a stated unit, to the inputs of a MAPEX model.

It reorders bands, converts units, clips, normalises, resizes to whole patches and marks pixels without data. What it
is not told it does not guess: values that cannot be of the stated unit, bands that are missing and options that nothing
uses are errors.
"""

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BaseImageProcessor, BatchFeature
from transformers.utils import IMAGE_PROCESSOR_NAME, logging

from .sensors_mapex import SENSORS, select_bands
from .units_mapex import UNITS, check_range


logger = logging.get_logger(__name__)

_SPEC_KEYS = (
    *("bands", "gsd", "patch_size", "unit", "mean", "std", "clip", "nodata", "dn_scale", "dn_offset", "codes"),
    "other_codes",
)
# What saving adds to the file beside the arguments of the constructor.
_LIBRARY_KEYS = {"image_processor_type", "auto_map", "processor_class", "_commit_hash", "_name_or_path", "name_or_path"}


class NoValidPixelError(ValueError):
    """An image without one valid pixel: it should count as absent."""


class MapexBatchFeature(BatchFeature):
    """A batch for a MAPEX model whose `.to()` reaches the tensors inside dictionaries: floating point tensors are cast
    and moved, others (masks, labels) moved, and so is `gsd`, which half precision would blur.
    """

    def to(self, *args, **kwargs) -> "MapexBatchFeature":
        device = torch.empty(0).to(*args, **kwargs).device  # understands every form of the arguments
        targets = (str, int, torch.device, torch.Tensor)
        moves = any(isinstance(value, targets) and not isinstance(value, bool) for value in args)
        moves = moves or kwargs.get("device") is not None

        def send(value, cast=True):
            if isinstance(value, torch.Tensor):
                if value.is_floating_point() and cast:
                    return value.to(*args, **kwargs)
                return value.to(device, non_blocking=kwargs.get("non_blocking", False)) if moves else value
            if isinstance(value, Mapping):
                return {key: send(entry, cast) for key, entry in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(send(entry, cast) for entry in value)
            return value

        self.data = {key: send(value, cast=key != "gsd") for key, value in self.data.items()}
        return self


class MapexImageProcessor(BaseImageProcessor):
    r"""Prepares images of several sensors for a MAPEX model.

    Args:
        modalities (`dict[str, dict]`):
            As in `MapexConfig.modalities`, from which [`MapexImageProcessor.from_config`] takes it: per modality
            `bands` (in the model's order), `gsd` (metres per pixel) and `patch_size`; `unit`, `mean` and `std` (one
            value a band, in `unit`), and where they apply `clip`, `nodata`, `dn_scale`, `dn_offset`, `codes`,
            `other_codes` (of classes that were pruned: valid, and none of the bands).
        do_normalize (`bool`):
            Whether to subtract the mean and divide by the standard deviation of each band.
        do_resize (`bool`):
            Whether to resize images whose sides are no multiples of the patch size to the nearest that are; their
            `gsd` changes with them. If not, they are an error. The resolution is one number: where rows and columns are
            stretched by different shares, sensors of one scene come to lie askew by the difference. Crop those.
        missing_bands (`str`):
            What to do about a band that the model has and the input lacks: `"raise"`, or `"mean"` to fill it with its
            mean, with a warning, for a model that was trained with dropped bands.

    Raises:
        ValueError: a modality without statistics, an unknown key or argument.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_mapex import MapexConfig, MapexImageProcessor

    >>> config = MapexConfig.from_preset("nano", modalities={"s1": None, "s2": ["B04", "B03", "B02"]})
    >>> processor = MapexImageProcessor.from_config(config)
    >>> features = processor(
    ...     {"s1": np.full((2, 64, 64), -12.0), "s2": np.full((4, 64, 64), 800, dtype=np.uint16)},
    ...     bands={"s2": ["B02", "B03", "B04", "B08"]},
    ...     units={"s2": "dn"},
    ... )
    >>> features["pixel_values"]["s2"].shape
    torch.Size([1, 3, 64, 64])
    ```"""

    model_input_names = ["pixel_values", "modality_mask", "valid_mask", "gsd"]  # noqa: RUF012 as in the base class

    def __init__(
        self,
        modalities: dict[str, dict[str, Any]] | None = None,
        do_normalize: bool = True,
        do_resize: bool = True,
        missing_bands: str = "raise",
        **kwargs,
    ):
        unknown = set(kwargs) - _LIBRARY_KEYS
        if unknown:
            raise ValueError(f"`MapexImageProcessor` has no arguments {sorted(unknown)}.")
        super().__init__(**kwargs)
        if missing_bands not in ("raise", "mean"):
            raise ValueError(f'`missing_bands` must be "raise" or "mean", got {missing_bands!r}.')
        if not modalities:
            raise ValueError("`modalities` is empty: use `MapexImageProcessor.from_config(config)`.")
        if not isinstance(modalities, dict):
            raise TypeError(
                f"`modalities` must describe each modality, got {modalities!r}. A processor takes all that its model "
                "has: for some of them, that of the pruned model, `MapexImageProcessor.from_config(pruned.config)`."
            )
        self.do_normalize = do_normalize
        self.do_resize = do_resize
        self.missing_bands = missing_bands
        self.modalities = {name: self._check_spec(name, spec) for name, spec in modalities.items()}

    @classmethod
    def from_config(cls, config, **kwargs) -> "MapexImageProcessor":
        """The processor of a model: bands, resolutions and statistics are those of its configuration, so that a pruned
        model gets the processor of what it keeps.

        Args:
            config (`MapexConfig`): Of the model.
            kwargs: Further arguments of the constructor.

        Raises:
            ValueError: a modality has no `mean` and `std`.
        """
        modalities = {
            name: {key: deepcopy(spec[key]) for key in _SPEC_KEYS if spec.get(key) is not None}
            for name, spec in config.modalities.items()
        }
        return cls(modalities=modalities, **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """As in the base class, but what overrides a file is checked like any argument."""
        own = {key: kwargs.pop(key) for key in ("modalities", "missing_bands") if key in kwargs}
        return super().from_dict({**image_processor_dict, **own}, **kwargs)

    def _check_spec(self, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        unknown = set(spec) - set(_SPEC_KEYS)
        missing = {"bands", "gsd", "patch_size"} - set(spec)
        if unknown or missing:
            raise ValueError(
                f"The description of `{name}` lacks {sorted(missing)} and has the unknown keys {sorted(unknown)}. "
                f"Known: {list(_SPEC_KEYS)}."
            )
        spec = {key: deepcopy(value) for key, value in spec.items() if value is not None}
        for key in ("mean", "std", "clip", "codes"):
            if key in spec and len(spec[key]) != len(spec["bands"]):
                raise ValueError(f"`{key}` of `{name}` needs {len(spec['bands'])} values, one a band.")
        for key in ("mean", "std"):
            if spec.get(key) is None or any(value is None for value in spec[key]):
                raise ValueError(
                    f"Modality `{name}` has no `{key}`. Put one value a band, in its `unit`, into "
                    f'`config.modalities["{name}"]`; `conversion/compute_statistics.py` computes them from shards.'
                )
        if not min(spec["std"]) > 0 or not np.isfinite([*spec["mean"], *spec["std"]]).all():
            raise ValueError(
                f"`mean` and `std` of `{name}` must be finite, and `std` above 0: {spec['mean']}, {spec['std']}."
            )
        return spec

    def preprocess(
        self,
        images: dict[str, Any],
        *,
        bands: dict[str, list[str]] | None = None,
        units: dict[str, str] | None = None,
        gsd: dict[str, float | list[float]] | None = None,
        nodata: dict[str, float | list[float]] | None = None,
        dn_offset: dict[str, float] | None = None,
        size: dict[str, tuple[int, int]] | None = None,
        return_tensors: str = "pt",
    ) -> MapexBatchFeature:
        """
        Args:
            images (`dict[str, Any]`):
                Modality to one image `(channels, height, width)`, a batch `(batch, channels, height, width)`, a list
                with an image or `None` (absent) per sample, or `None`. An image is an array, a tensor or nested lists,
                or a PIL image; with a single channel `(height, width)` will do. A categorical layer holds one channel
                of codes.
            bands (`dict[str, list[str]]`, *optional*):
                Names of the channels of the images, in their order. More than the model has are left out, by name.
                Default: the model's own bands in its order.
            units (`dict[str, str]`, *optional*):
                Unit of the values: `"reflectance"` or `"dn"`, `"db"` or `"linear"` (power), `"metres"`, `"degrees"`,
                `"uint8"`, `"class"`. Default: the unit of the modality's statistics. Either is checked.
            gsd (`dict[str, float | list[float]]`, *optional*):
                Metres per pixel, of all samples, or a list of those that have the modality. Default: the
                configuration's.
            nodata (`dict[str, float | list[float]]`, *optional*):
                Values that mark pixels without data, instead of the modality's own. NaN and infinity always do.
            dn_offset (`dict[str, float]`, *optional*):
                For digital numbers, what to add to `dn * dn_scale`, instead of the modality's own: -0.1 for Sentinel-2
                products since processing baseline 04.00 that have not been harmonised.
            size (`dict[str, tuple[int, int]]`, *optional*):
                Height and width to resize to, multiples of the patch size. Default: the nearest that are.

        Returns:
            [`MapexBatchFeature`] with `pixel_values` (float32 `(batch, channels, height, width)`), `modality_mask`
            (bool `(batch,)`), `valid_mask` (bool `(batch, height, width)`: all bands of the pixel hold data) and
            `gsd` (a float, or `(batch,)` where samples differ), each a dictionary over the given modalities. Where
            there is no data, pixel values are the band's mean, which is 0 after normalisation.

        Raises:
            TypeError: a container of the wrong kind.
            NoValidPixelError: an image of NaN or nodata alone; a `ValueError`.
            ValueError: an unknown modality, band or unit; missing bands; values that cannot be of the unit; sizes that
                do not fit together; an option for a modality that is not there.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f'`return_tensors` must be "pt", got {return_tensors!r}.')
        if not isinstance(images, Mapping):
            raise TypeError(
                f'`images` must be a dictionary from modality to images, like {{"{next(iter(self.modalities))}": '
                f"array}}, got {type(images).__name__}."
            )
        options = {"bands": bands, "units": units, "gsd": gsd, "nodata": nodata, "dn_offset": dn_offset, "size": size}
        self._check_names(images, options)
        samples = {name: self._samples(name, value) for name, value in images.items()}
        batch_size = self._batch_size(samples)

        features: dict[str, dict[str, Any]] = {"pixel_values": {}, "modality_mask": {}, "valid_mask": {}, "gsd": {}}
        for name, entries in samples.items():
            chosen = {key: value[name] for key, value in options.items() if value and value.get(name) is not None}
            entries = [None] * batch_size if entries is None else entries
            present = [entry is not None for entry in entries]
            if not any(present):
                continue
            pixels, valid, metres = self._process(name, [entry for entry in entries if entry is not None], **chosen)
            if not all(present):
                where = torch.tensor(present)
                pixels, some = pixels.new_zeros(batch_size, *pixels.shape[1:]), pixels
                valid, some_valid = valid.new_zeros(batch_size, *valid.shape[1:]), valid
                pixels[where], valid[where] = some, some_valid
                metres, some_metres = np.full(batch_size, metres.mean()), metres
                metres[where.numpy()] = some_metres
            features["pixel_values"][name] = pixels
            features["modality_mask"][name] = torch.tensor(present)
            features["valid_mask"][name] = valid
            features["gsd"][name] = combine_gsd(metres)
        if not features["pixel_values"]:
            raise ValueError("Every modality of every sample is None: there is nothing to process.")
        lacking = [
            sample
            for sample in range(batch_size)
            if not any(mask[sample] for mask in features["modality_mask"].values())
        ]
        if lacking:
            raise ValueError(f"Samples {lacking} have no modality at all. Leave them out of the batch.")
        self._warn_of_skew(samples, features["pixel_values"])
        return MapexBatchFeature(features)

    @staticmethod
    def _warn_of_skew(samples: dict[str, Any], pixel_values: dict[str, torch.Tensor]) -> None:
        """Warn where resizing, which changes the one resolution of a modality, stretches the rows of sensors by other
        shares than their columns, and so moves them against each other by more than a pixel.
        """
        largest = max(max(pixels.shape[2:]) for pixels in pixel_values.values())
        for sample in zip(*(samples[name] for name in pixel_values)):
            shares = []
            for image, pixels in zip(sample, pixel_values.values()):
                if image is not None:
                    down, right = (after / before for after, before in zip(pixels.shape[2:], image.shape[1:]))
                    shares.append((down / right) ** 0.5)
            skew = largest * (max(shares, default=0) - min(shares, default=0))
            if skew > 1:
                logger.warning_once(
                    f"Resized to whole patches, sensors of a sample lie askew by up to {skew:.0f} pixels. Crop their "
                    "sides to multiples of the patch size."
                )
                return

    def inverse_transform(self, pixel_values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """From normalised pixels back to physical values, for pictures and maps.

        Args:
            pixel_values (`dict[str, torch.Tensor]`): Modality to `(..., channels, height, width)`, the model's bands.

        Returns:
            `dict[str, torch.Tensor]`: In the `unit` of each modality's statistics; for a categorical layer the code of
            the likeliest class, with one channel. What was clipped stays clipped.

        Raises:
            ValueError: an unknown modality or a wrong number of channels.
        """
        self._check_names(pixel_values, {})
        result = {}
        for name, pixels in pixel_values.items():
            spec = self.modalities[name]
            pixels = torch.as_tensor(pixels)
            if pixels.ndim < 3:
                raise ValueError(f"`{name}` must be (..., channels, height, width), got {tuple(pixels.shape)}.")
            if pixels.shape[-3] != len(spec["bands"]):
                raise ValueError(f"`{name}` has the bands {spec['bands']}, got {pixels.shape[-3]} channels.")
            if self.do_normalize:
                pixels = pixels * _per_band(spec["std"]).to(pixels) + _per_band(spec["mean"]).to(pixels)
            if "codes" in spec:
                codes = torch.tensor(spec["codes"], device=pixels.device)
                pixels = codes[pixels.argmax(dim=-3, keepdim=True)]
            result[name] = pixels
        return result

    def _check_names(self, images: Mapping, options: dict[str, dict | None]) -> None:
        if not images:
            raise ValueError(f"`images` is empty: pass at least one of {list(self.modalities)}.")
        for name in images:
            if name not in self.modalities:
                raise ValueError(
                    f"Unknown modality `{name}`. This processor has {list(self.modalities)}; for another, use the one "
                    "of a model that has it."
                )
        for option, value in options.items():
            if value is None:
                continue
            if not isinstance(value, Mapping):
                raise TypeError(f"`{option}` must be a dictionary from modality to value, got {type(value).__name__}.")
            stray = [name for name in value if name not in images]
            if stray:
                raise ValueError(
                    f"`{option}` is given for {stray}, but `images` holds {list(images)}: nothing uses it."
                )

    def _samples(self, name: str, value: Any) -> list[np.ndarray | torch.Tensor | None] | None:
        """The images of a modality one by one; `None` if the whole modality is absent."""
        if value is None:
            return None
        if isinstance(value, (list, tuple)):
            if any(isinstance(entry, (str, os.PathLike)) for entry in value):
                raise TypeError(f"`{name}` must hold pixels, got file names: read them first, with rasterio or PIL.")
            if all(entry is None or hasattr(entry, "shape") or _is_pil(entry) for entry in value):
                return [None if entry is None else self._image(name, entry) for entry in value]
            try:
                value = np.asarray(value)  # nested lists of numbers
            except ValueError as error:
                raise ValueError(f"`{name}`: the nested lists are no array: {error}") from error
        if _is_pil(value):
            return [self._image(name, value)]
        if not isinstance(value, (np.ndarray, torch.Tensor)):
            raise TypeError(
                f"`{name}` must be an array, a tensor, a PIL image, a list of them, or None if absent, got "
                f"{type(value).__name__}."
            )
        return [self._image(name, entry) for entry in (value if value.ndim == 4 else [value])]

    def _image(self, name: str, image: Any) -> np.ndarray | torch.Tensor:
        if _is_pil(image):
            image = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
        if not isinstance(image, (np.ndarray, torch.Tensor)):
            image = np.asarray(image)
        if isinstance(image, np.ma.MaskedArray):  # as rasterio reads with masked=True
            image = np.where(np.ma.getmaskarray(image), np.float32("nan"), np.ma.getdata(image))
        if image.ndim == 2:
            image = image[None]
        if image.ndim != 3:
            raise ValueError(
                f"An image of `{name}` must be (channels, height, width), got {tuple(image.shape)}. A list holds one "
                "image, or None, per sample."
            )
        if 0 in image.shape[1:]:
            raise ValueError(f"An image of `{name}` has no pixels: its shape is {tuple(image.shape)}.")
        return image

    @staticmethod
    def _batch_size(samples: dict[str, list | None]) -> int:
        sizes = {name: len(entries) for name, entries in samples.items() if entries is not None}
        if not sizes:
            raise ValueError("Every modality is None: there is nothing to process.")
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"The modalities hold different numbers of samples: {sizes}. Where a sample lacks a modality, put None."
            )
        if not next(iter(sizes.values())):
            raise ValueError("The batch is empty.")
        return next(iter(sizes.values()))

    def _process(
        self,
        name: str,
        images: list[np.ndarray | torch.Tensor],
        bands: list[str] | None = None,
        units: str | None = None,
        gsd: float | list[float] | None = None,
        nodata: float | list[float] | None = None,
        dn_offset: float | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """The present images of one modality: pixels `(n, channels, height, width)`, validity, metres per pixel."""
        spec = self.modalities[name]
        counts = {image.shape[0] for image in images}
        if len(counts) > 1:
            raise ValueError(f"The images of `{name}` differ in their number of channels: {sorted(counts)}.")
        channels = self._channels(name, bands, images[0])
        unit = self._unit(name, units, dn_offset)
        metres = self._gsd(name, gsd, len(images)).copy()
        sentinels = spec.get("nodata", []) if nodata is None else nodata
        with np.errstate(over="ignore"):  # beyond float32 they become infinite, as the pixels do
            sentinels = np.atleast_1d(np.asarray(sentinels, dtype=np.float64)).astype(np.float32).tolist()
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(tuple(image.shape), []).append(index)
        parts = {}
        for shape, indices in groups.items():
            height, width = self._size(name, shape[1:], size)
            stacked = _to_float([images[index] for index in indices])  # (n, C_in, H, W)
            if "codes" in spec:
                pixels, valid = self._one_hot(name, stacked, sentinels)
            else:
                pixels, valid = self._physical(name, stacked, channels, unit, dn_offset, sentinels)
            if (height, width) != shape[1:]:
                pixels, valid = _resize(pixels, valid, (height, width))
            if valid is not None:
                some = valid.flatten(1).any(dim=1).tolist()
                hollow = [index for index, any_valid in zip(indices, some) if not any_valid]
                if hollow:
                    resized = " after resizing" if (height, width) != shape[1:] else ""
                    raise NoValidPixelError(
                        f"`{name}` of samples {hollow} (counting those that have it) has not one valid pixel{resized}: "
                        f"all are NaN or nodata ({sentinels}). Pass None in its place, so that it counts as absent."
                    )
            if valid is None:
                valid = torch.ones(len(pixels), height, width, dtype=torch.bool)
            parts[shape] = (indices, pixels, valid)
            metres[indices] *= ((shape[1] / height) * (shape[2] / width)) ** 0.5
        sizes = {tuple(pixels.shape[2:]) for _, pixels, _ in parts.values()}
        if len(sizes) > 1:
            raise ValueError(
                f"The images of `{name}` differ in size: {sorted(groups)}. A batch holds one size per modality: crop "
                f'them alike (`random_crop`), resize them (`size={{"{name}": (height, width)}}`), or batch them apart.'
            )
        if len(parts) == 1:
            _, pixels, valid = next(iter(parts.values()))
            return pixels, valid, metres
        order = torch.tensor([index for indices, _, _ in parts.values() for index in indices]).argsort()
        pixels = torch.cat([pixels for _, pixels, _ in parts.values()])[order]
        valid = torch.cat([valid for _, _, valid in parts.values()])[order]
        return pixels, valid, metres

    def _channels(self, name: str, given: list[str] | None, image) -> list[int | None] | None:
        """For each band of the model its position among the given ones, `None` where missing; `None`: as they are."""
        spec = self.modalities[name]
        count = image.shape[0]
        if "codes" in spec:
            if given is not None or count != 1:
                raise ValueError(
                    f"`{name}` is a categorical layer: it takes one channel with the codes {spec['codes']} and no band "
                    f"names, got {count} channels{'' if given is None else f' named {given}'}."
                )
            return None
        wanted = spec["bands"]
        if given is None:
            if count != len(wanted):
                last = " Channels come first: move the last axis to the front." * (image.shape[-1] == len(wanted))
                raise ValueError(
                    f"`{name}` needs {len(wanted)} channels in the order {wanted}, got {count}. Name yours with "
                    f'`bands={{"{name}": [...]}}`, in any order.{last}'
                )
            return None
        if isinstance(given, str):
            raise TypeError(f'`bands` of `{name}` must be a list of names, got the string "{given}".')
        given = list(given)
        if len(given) != count:
            raise ValueError(f"`bands` names {len(given)} channels of `{name}`, {given}, but the image has {count}.")
        select_bands(name, given, given)  # refuses a band that is named twice
        missing = [band for band in wanted if band not in given]
        if missing:  # by a typo, perhaps
            registered = SENSORS[name].band_names if name in SENSORS else []
            select_bands(name, [*wanted, *(band for band in registered if band not in wanted)], given)
        if missing and self.missing_bands == "raise":
            kept = [band for band in wanted if band in given]
            fix = f'prune it for what you have, `model.prune_for_modalities({{"{name}": {kept}}})`, and take the '
            fix += "processor of its configuration, or " if kept else "processor of another model, or "
            raise ValueError(
                f"`{name}` lacks the bands {missing}, which the model has; given are {given}. Either {fix}"
                'construct the processor with `missing_bands="mean"` if the model was trained with dropped bands.'
            )
        if missing:
            logger.warning_once(f"`{name}` lacks the bands {missing}; they are filled with their mean.")
        if given == wanted:
            return None
        return [given.index(band) if band in given else None for band in wanted]

    def _unit(self, name: str, given: str | None, dn_offset: float | None) -> str:
        spec = self.modalities[name]
        own = spec.get("unit", "as normalised")
        accepted = UNITS.get(own, (own,))
        unit = own if given is None else given
        if unit not in accepted:
            raise ValueError(f"`{name}` cannot be given in `{unit}`. Accepted: {list(accepted)}.")
        if unit == "dn" and spec.get("dn_scale") is None:
            raise ValueError(
                f"`{name}` has no `dn_scale`: convert digital numbers to reflectance yourself, or put `dn_scale` and "
                f'`dn_offset` into `config.modalities["{name}"]`.'
            )
        if dn_offset is not None and unit != "dn":
            fix = f'pass `units={{"{name}": "dn"}}`' if "dn" in accepted else "leave it out"
            raise ValueError(f"`dn_offset` of `{name}` is not used with the unit `{unit}`: {fix}.")
        return unit

    def _gsd(self, name: str, given: float | list[float] | None, count: int) -> np.ndarray:
        """Metres per pixel of each of `count` images."""
        values = np.atleast_1d(np.asarray(self.modalities[name]["gsd"] if given is None else given))
        if values.ndim > 1 or values.dtype.kind not in "fiu" or not np.isfinite(values).all() or values.min() <= 0:
            raise ValueError(f"`gsd` of `{name}` must be metres per pixel above 0, got {given}.")
        if len(values) not in (1, count):
            raise ValueError(
                f"`gsd` of `{name}` has {len(values)} values for {count} images: one for all, or one for each that is "
                "there."
            )
        return np.broadcast_to(values.astype(np.float64), count)

    def _size(self, name: str, given: tuple[int, int], wanted: tuple[int, int] | None) -> tuple[int, int]:
        patch = self.modalities[name]["patch_size"]
        nearest = tuple(max(patch, int(side / patch + 0.5) * patch) for side in given)
        if wanted is not None:
            whole = isinstance(wanted, (list, tuple)) and all(isinstance(side, (int, np.integer)) for side in wanted)
            if not whole or len(wanted) != 2 or any(side < patch or side % patch for side in wanted):
                raise ValueError(f"`size` of `{name}` must be two multiples of its patch size {patch}, got {wanted}.")
            return tuple(wanted)
        if nearest != tuple(given) and not self.do_resize:
            raise ValueError(
                f"`{name}` is {given[0]} x {given[1]} pixels, no multiples of its patch size {patch}, and `do_resize` "
                f"is off. Crop it, or turn `do_resize` on for {nearest[0]} x {nearest[1]}."
            )
        return nearest

    def _physical(
        self,
        name: str,
        stacked: torch.Tensor,
        channels: list[int | None] | None,
        unit: str,
        dn_offset: float | None,
        sentinels: list[float],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Bands selected, checked, converted, clipped, normalised, in place; `(n, C, H, W)` and validity `(n, H, W)`,
        `None` if all is valid.
        """
        spec = self.modalities[name]
        missing = [] if channels is None else [band for band, position in enumerate(channels) if position is None]
        if channels is not None:
            stacked = stacked[:, [position or 0 for position in channels]]  # a missing one is overwritten at the end
        low, high = (float(bound) for bound in torch.aminmax(stacked))
        holes = None  # where a band has no value; None: nowhere
        for sentinel in sentinels:
            if not (low > sentinel or high < sentinel):  # also when the bounds are NaN
                found = stacked == sentinel
                holes = found if holes is None else holes | found
        if not np.isfinite([low, high]).all():
            found = ~stacked.isfinite()
            holes = found if holes is None else holes | found
        if holes is not None and not holes.any():
            holes = None
        if holes is not None:
            good = stacked[~holes]
            low, high = (float(bound) for bound in torch.aminmax(good)) if good.numel() else (0.0, 0.0)
            check_range(name, unit, good, low, high)
        else:
            check_range(name, unit, stacked, low, high)

        pixels = stacked
        if unit == "linear":
            if low <= 0:  # no echo at all has no logarithm
                zero = pixels <= 0
                holes = zero if holes is None else holes | zero
            pixels.clamp_min_(1e-30).log10_().mul_(10.0)
        # Digital numbers are normalised as they are, with bounds, mean and deviation brought to their scale: one pass
        # over the pixels less.
        scale, offset = 1.0, 0.0
        if unit == "dn":
            scale = spec["dn_scale"]
            offset = spec.get("dn_offset", 0.0) if dn_offset is None else dn_offset
        if "clip" in spec:
            least = [(bound - offset) / scale for bound, _ in spec["clip"]]
            most = [(bound - offset) / scale for _, bound in spec["clip"]]
            if len(set(least)) > 1 or len(set(most)) > 1:
                pixels.clamp_(_per_band(least), _per_band(most))
            elif unit == "linear" or low < least[0] or high > most[0]:  # most images need no clipping
                pixels.clamp_(least[0], most[0])
        if self.do_normalize:
            mean = (_per_band(spec["mean"], torch.float64) - offset) / scale
            factor = scale / _per_band(spec["std"], torch.float64)
            pixels.sub_(mean.float()).mul_(factor.float())
            fill = torch.zeros(len(spec["bands"]), 1, 1)
        else:
            if unit == "dn":
                pixels.mul_(scale).add_(offset)
            fill = _per_band(spec["mean"])
        if holes is not None:
            pixels = torch.where(holes, fill, pixels)
        for band in missing:
            pixels[:, band] = fill[band]
        if holes is None:
            return pixels, None
        there = [band for band in range(len(spec["bands"])) if band not in missing]
        return pixels, ~holes[:, there].any(dim=1)

    def _one_hot(self, name: str, stacked: torch.Tensor, sentinels: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer of codes to one channel a class; `(n, C, H, W)` and validity `(n, H, W)`."""
        spec = self.modalities[name]
        codes = _per_band(spec["codes"])
        pixels = (stacked == codes).float()  # (n, C, H, W)
        valid = pixels.any(dim=1)
        for code in spec.get("other_codes", []):
            valid |= stacked[:, 0] == code
        holes = ~stacked[:, 0].isfinite()
        for sentinel in sentinels:
            holes |= stacked[:, 0] == sentinel
        valid &= ~holes  # also where a code of the layer was named as nodata
        strange = stacked[:, 0][~valid & ~holes].unique().tolist()
        if strange:
            raise ValueError(
                f"`{name}` holds the codes {strange[:10]}, which are no classes of it ({spec['codes']}). If they mark "
                f'pixels without data, pass `nodata={{"{name}": {strange[:10]}}}`.'
            )
        if self.do_normalize:
            pixels = (pixels - _per_band(spec["mean"])) / _per_band(spec["std"])
            return pixels * valid[:, None], valid
        return torch.where(valid[:, None], pixels, _per_band(spec["mean"])), valid


def combine_gsd(metres: np.ndarray) -> float | torch.Tensor:
    """Metres per pixel of samples as a model takes them, to seven digits: one number, or a float32 tensor `(batch,)` if
    they differ.
    """
    metres = np.array([float(f"{value:.7g}") for value in metres])  # each by itself: a batch changes no sample
    return float(metres[0]) if (metres == metres[0]).all() else torch.from_numpy(metres).float()


def _is_pil(value: Any) -> bool:
    return hasattr(value, "getbands") and hasattr(value, "mode")


def _per_band(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None, None]  # (C, 1, 1)


def _to_float(images: list[np.ndarray | torch.Tensor]) -> torch.Tensor:
    """Images of one shape to a new float32 tensor `(images, channels, height, width)` on the CPU."""
    for image in images:
        if image.is_complex() if isinstance(image, torch.Tensor) else image.dtype.kind not in "fiub":
            raise TypeError(f"Pixels must be real numbers, got {image.dtype}.")
    if all(isinstance(image, torch.Tensor) for image in images):
        return torch.stack([image.detach() for image in images]).to("cpu", torch.float32)
    # Through float32, for numpy has no bfloat16.
    arrays = [image.float().numpy(force=True) if isinstance(image, torch.Tensor) else image for image in images]
    result = np.empty((len(arrays), *arrays[0].shape), dtype=np.float32)
    with np.errstate(over="ignore"):  # what exceeds float32 becomes infinite: no data
        for index, array in enumerate(arrays):
            result[index] = array  # casts while copying
    return torch.from_numpy(result)


def _resize(
    pixels: torch.Tensor, valid: torch.Tensor | None, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bilinear with antialiasing; a pixel is valid where all that it was made of was."""
    options = {"size": size, "mode": "bilinear", "antialias": True, "align_corners": False}
    pixels = torch.nn.functional.interpolate(pixels, **options)
    if valid is None:
        return pixels, None
    share = torch.nn.functional.interpolate(valid[:, None].float(), **options)[:, 0]
    return pixels, share > 1 - 1e-4


def save_image_processor(config, directory: str | os.PathLike) -> None:
    """Put the processor of a model beside its weights, if the configuration has the statistics for it. One that is
    there for the same modalities, perhaps with options of the user's, is left alone; one for others is deleted.
    """
    file = Path(directory) / IMAGE_PROCESSOR_NAME
    there = json.loads(file.read_text()).get("modalities") if file.is_file() else None
    if any(None in (spec.get("mean") or [None]) + (spec.get("std") or [None]) for spec in config.modalities.values()):
        if there is not None and _grids(there) != _grids(config.modalities):
            file.unlink()
        return
    processor = MapexImageProcessor.from_config(config)
    if there == processor.modalities:
        return
    processor.save_pretrained(directory)


def _grids(modalities: dict[str, dict[str, Any]]) -> dict[str, list]:
    """What a processor must share with a model beside statistics."""
    return {name: [spec[key] for key in ("bands", "gsd", "patch_size")] for name, spec in modalities.items()}


def terrain_slope(elevation: np.ndarray | torch.Tensor, gsd: float) -> torch.Tensor:
    """Slope of the terrain in degrees, by central differences, for the sensor `slope`.

    Args:
        elevation (`np.ndarray` or `torch.Tensor` of shape `(..., height, width)`): In metres; NaN where unknown, which
            makes the slope there and beside it NaN as well.
        gsd (`float`): Metres per pixel.

    Returns:
        `torch.Tensor` of the same shape, float32.
    """
    if isinstance(elevation, np.ndarray):
        # A copy in native byte order: torch takes no other, and warns of read-only memory.
        elevation = np.ma.filled(elevation.astype(np.float32), np.nan)
    elevation = torch.as_tensor(elevation).float()
    down, right = torch.gradient(elevation, spacing=float(gsd), dim=(-2, -1))
    slope = torch.rad2deg(torch.atan(torch.hypot(down, right)))
    return slope.masked_fill(elevation.isnan(), torch.nan)  # a central difference passes over the pixel itself


MapexImageProcessor.register_for_auto_class()
