"""Maps of images larger than those a model was trained on, window by window."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .tokens_mapex import check_inputs


@torch.no_grad()
def predict_in_windows(
    model,
    pixel_values: Mapping[str, torch.Tensor],
    modality_mask: Mapping[str, torch.BoolTensor] | None = None,
    valid_mask: Mapping[str, torch.BoolTensor] | None = None,
    gsd: Mapping[str, float | torch.Tensor] | None = None,
    *,
    window_size: int | None = None,
    stride: int | None = None,
    output_size: tuple[int, int] | None = None,
    batch_size: int = 16,
) -> torch.Tensor:
    """The map that `model` gives in windows over an image, averaged where they overlap. Windows are moved to the device
    of the model one batch at a time, and what it says of them back: the image can be as large as its own memory.

    Args:
        model: Takes the inputs below and `output_size`, gives an output with `logits`; has `config` and `device`.
        pixel_values, modality_mask, valid_mask, gsd:
            As in [`MapexModel.forward`]; all modalities cover the same ground.
        window_size (`int`, *optional*):
            Side of a window, in pixels of the modality with the smallest ones; rounded up to whole patches and whole
            pixels of all modalities. Default: `config.dense_window_size`; if there is none, all is one window.
        stride (`int`, *optional*): From a window to the next, in the same pixels. Default: half a window.
        output_size (`tuple[int, int]`, *optional*):
            Height and width of the map. Default: those of the modality with the smallest pixels, which are resized
            where windows do not begin and end with whole pixels of the map.
        batch_size (`int`): Windows in a forward pass.

    Returns:
        `torch.Tensor` of shape `(batch_size, ..., *output_size)`: the logits, in fp32 on the device of `pixel_values`.
        NaN where no window holds a valid pixel.

    Raises:
        ValueError: numbers below 1, or inputs that the model cannot take.
    """
    modalities = model.config.modalities
    check_inputs(modalities, pixel_values, modality_mask, valid_mask, gsd)
    for name, value in (("window_size", window_size), ("stride", stride), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    layers = {name: tuple(pixels.shape[-2:]) for name, pixels in pixel_values.items()}
    patches = {name: modalities[name]["patch_size"] for name in layers}
    finest = max(layers, key=lambda name: math.prod(layers[name]))
    if window_size is None:
        window_size = model.config.dense_window_size or max(layers[finest])
    axes = [
        _spans({name: sides[axis] for name, sides in layers.items()}, patches, window_size, stride) for axis in range(2)
    ]
    size = tuple(output_size or layers[finest])
    borders = [{border for span in spans for border in (span[finest].start, span[finest].stop)} for spans in axes]
    fits = all(
        border * wanted % side == 0
        for side, wanted, on_axis in zip(layers[finest], size, borders)
        for border in on_axis
    )
    drawn = size if fits else layers[finest]

    num_samples = len(pixel_values[finest])
    windows = []
    for sample, down, right in itertools.product(range(num_samples), *axes):
        parts = {name: (sample, ..., down[name], right[name]) for name in layers}
        if _holds_something(parts, modality_mask, valid_mask):
            target = [_scaled(span[finest], *sides) for span, *sides in zip((down, right), layers[finest], drawn)]
            windows.append((sample, parts, tuple(target)))
    if not windows:
        raise ValueError("No sample has a modality with a valid pixel: there is nothing to predict from.")

    total = None
    weight = torch.zeros(num_samples, *drawn, device=pixel_values[finest].device)
    starts = range(0, len(windows), batch_size)
    for start in logging.tqdm(starts, desc="Predicting", unit="batch", disable=len(starts) <= 10):
        chosen = windows[start : start + batch_size]
        batch: dict[str, Any] = {
            "pixel_values": _cut(pixel_values, chosen, model.device),
            "modality_mask": _of_sample(modality_mask, chosen, model.device),
            "valid_mask": _cut(valid_mask, chosen, model.device),
            "gsd": _of_sample(gsd, chosen, model.device),
        }
        _, _, (down, right) = chosen[0]
        logits = model(**batch, output_size=(down.stop - down.start, right.stop - right.start)).logits
        if total is None:
            total = weight.new_zeros(num_samples, *logits.shape[1:-2], *drawn)
        for (sample, _, (down, right)), values in zip(chosen, logits.to(total)):
            total[sample, ..., down, right] += values
            weight[sample, down, right] += 1
    maps = total.view(num_samples, -1, *drawn) / weight[:, None]  # 0 / 0 is NaN
    if drawn != size:
        maps = nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps.view(*total.shape[:-2], *size)


def _spans(
    sides: dict[str, int], patches: dict[str, int], window_size: int, stride: int | None
) -> list[dict[str, slice]]:
    """Along one axis: each window, as the pixels of each modality."""
    finest = max(sides.values())
    steps = math.gcd(*sides.values())  # from one border of pixels that all have in common to the next
    lengths = {name: side // steps for name, side in sides.items()}  # of a step, in pixels
    unit = math.lcm(*(math.lcm(patches[name], length) // length for name, length in lengths.items()))
    window = min(unit * math.ceil(window_size * steps / finest / unit), steps)
    stride = window // 2 if stride is None else stride * steps // finest
    starts = [*range(0, steps - window, max(stride, 1)), steps - window]
    return [
        {name: slice(first * length, (first + window) * length) for name, length in lengths.items()} for first in starts
    ]


def _scaled(part: slice, side: int, other_side: int) -> slice:
    """The same ground on a layer of another size."""
    return slice(part.start * other_side // side, part.stop * other_side // side)


def _holds_something(parts: dict[str, tuple], modality_mask, valid_mask) -> bool:
    """Whether any modality has a valid pixel in a window."""
    for name, part in parts.items():
        is_absent = modality_mask is not None and name in modality_mask and not modality_mask[name][part[0]]
        if not is_absent and (valid_mask is None or name not in valid_mask or valid_mask[name][part].any()):
            return True
    return False


def _cut(values: Mapping[str, torch.Tensor] | None, windows: list[tuple], device) -> dict[str, torch.Tensor] | None:
    """Windows in place of samples."""
    if values is None:
        return None
    return {
        name: torch.stack([value[parts[name]] for _, parts, _ in windows]).to(device) for name, value in values.items()
    }


def _of_sample(values: Mapping[str, Any] | None, windows: list[tuple], device) -> dict[str, Any] | None:
    """What is the same in all windows of a sample, for each window; a number is the same for all samples."""
    if values is None:
        return None
    samples = [sample for sample, _, _ in windows]
    return {
        name: value[samples].to(device) if isinstance(value, torch.Tensor) and value.ndim else value
        for name, value in values.items()
    }
