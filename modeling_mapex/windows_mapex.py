"""Maps of images larger than those a model was trained on, window by window."""

import itertools
import math
from typing import Any

import torch
from transformers.utils import logging

from .dense_mapex import ground_extent, reference_modality
from .tokens_mapex import check_inputs, token_grids


@torch.no_grad()
def predict_in_windows(
    model,
    pixel_values: dict[str, torch.Tensor],
    modality_mask: dict[str, torch.BoolTensor] | None = None,
    valid_mask: dict[str, torch.BoolTensor] | None = None,
    gsd: dict[str, float | torch.Tensor] | None = None,
    *,
    window_size: int | None = None,
    stride: int | None = None,
    output_size: tuple[int, int] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> torch.Tensor:
    """The map of an image that is larger than those the model was trained on, in windows of their size, averaged where
    they overlap: attention and positions have not learnt to reach farther, and a scene would not fit in memory. Without
    gradients or dropout. Windows are moved to the device of the model one batch at a time, and what it says of them
    back: an image need not fit on that device. Sides must be whole patches, as the processor makes them; the map has
    any `output_size`.

    Where the pixels of two modalities do not begin at the same place, a window takes the nearest, at most half a pixel
    of the coarser one away.

    Args:
        model: Takes the inputs below and `output_size`, gives an output with `logits`; has `config` and `device`.
        pixel_values, modality_mask, valid_mask, gsd: As in [`MapexModel.forward`].
        window_size (`int`, *optional*):
            Side of a window, in pixels of the modality with the smallest ones, or a little more, so that it holds whole
            patches of all modalities. Default: the ground of `config.dense_window_metres`; if there is none, all is one
            window.
        stride (`int`, *optional*): From a window to the next, in the same pixels. Default: half a window.
        output_size (`tuple[int, int]`, *optional*):
            Height and width of the map. Default: as the model's own, those of the modality with the smallest tokens.
        batch_size (`int`): Windows in a forward pass.
        progress (`bool`): Whether to show a bar where there are more than ten passes.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_labels, *output_size)`, or `(batch_size, *output_size)` of a
        regression: the logits, in fp32 on the device of `pixel_values`; NaN where no window holds a valid pixel.

    Raises:
        ValueError: numbers out of range, inputs that the model cannot take, modalities that do not cover the same
            ground, patches of which no window holds whole ones of all.
    """
    modalities = model.config.modalities
    check_inputs(modalities, pixel_values, modality_mask, valid_mask, gsd)
    finest = max(pixel_values, key=lambda name: math.prod(pixel_values[name].shape[-2:]))
    sides = {name: tuple(pixels.shape[-2:]) for name, pixels in pixel_values.items()}
    if window_size is None:
        window_size = _default_window(model.config, finest, gsd) or max(sides[finest])
    for name, value in (("window_size", window_size), ("stride", stride), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if stride is not None and stride > window_size:
        raise ValueError(f"`stride` ({stride}) must not be larger than `window_size` ({window_size}): it leaves gaps.")
    patches = {name: modalities[name]["patch_size"] for name in sides}
    size = tuple(output_size or sides[reference_modality(sides, modalities)])
    axes = [
        _spans({name: side[axis] for name, side in sides.items()}, finest, patches, size[axis], window_size, stride)
        for axis in range(2)
    ]
    if max(map(len, axes)) > 1:
        _check_ground(pixel_values, finest, modalities, gsd, modality_mask)

    num_samples = len(pixel_values[finest])
    windows = []
    for sample in range(num_samples):
        of_sample = [(sample, *spans) for spans in itertools.product(*axes)]
        windows += [window for window in of_sample if _holds_something(window, pixel_values, modality_mask, valid_mask)]
        if not windows or windows[-1][0] != sample:
            raise ValueError(f"Sample {sample} of the batch has no modality and no valid pixel at all. Leave it out.")

    total = None
    weight = torch.zeros(num_samples, *size, device=pixel_values[finest].device)
    starts = range(0, len(windows), batch_size)
    modes = [(module, module.training) for module in model.modules()]  # parts may be frozen in eval mode
    model.eval()
    try:
        for start in logging.tqdm(starts, desc="Predicting", unit="batch", disable=not progress or len(starts) <= 10):
            chosen = windows[start : start + batch_size]
            batch: dict[str, Any] = {
                "pixel_values": _cut(pixel_values, chosen, model.device),
                "modality_mask": _of_sample(modality_mask, chosen, model.device),
                "valid_mask": _cut(valid_mask, chosen, model.device),
                "gsd": _of_sample(gsd, chosen, model.device),
            }
            _, down, right = chosen[0]
            logits = model(**batch, output_size=(_length(down[None]), _length(right[None]))).logits
            if total is None:
                total = weight.new_zeros(num_samples, *logits.shape[1:-2], *size)
            for (sample, down, right), values in zip(chosen, logits.to(total)):
                total[sample, ..., down[None], right[None]] += values
                weight[sample, down[None], right[None]] += 1
    finally:
        for module, training in modes:
            module.training = training
    return (total.view(num_samples, -1, *size) / weight[:, None]).view(total.shape)  # 0 / 0 is NaN


def _default_window(config, finest: str, gsd: dict[str, float | torch.Tensor] | None) -> int | None:
    """Of `config.dense_window_metres`, to the nearest patch."""
    if config.dense_window_metres is None:
        return None
    spec = config.modalities[finest]
    resolution = float(torch.as_tensor((gsd or {}).get(finest, spec["gsd"]), dtype=torch.float32).mean())
    return spec["patch_size"] * max(round(config.dense_window_metres / resolution / spec["patch_size"]), 1)


def _spans(
    sides: dict[str, int], finest: str, patches: dict[str, int], output_side: int, window_size: int, stride: int | None
) -> list[dict[str | None, slice]]:
    """Along one axis: each window, as the pixels of each modality, and under `None` those of the map."""
    side = sides[finest]
    lengths = _window(sides, finest, patches, window_size)
    window = lengths[finest]
    stride = window // 2 if stride is None else stride
    scales = {name: other / side for name, other in sides.items()}  # pixels for one of the finest
    lengths[None] = math.ceil(window * output_side / side)
    spans = []
    for first in [*range(0, side - window, max(stride, 1)), side - window]:
        starts = {name: min(round(first * scale), sides[name] - lengths[name]) for name, scale in scales.items()}
        starts[None] = first * output_side // side  # down, as lengths are rounded up: no pixel between two windows
        spans.append({name: slice(start, start + lengths[name]) for name, start in starts.items()})
    return spans


def _window(sides: dict[str, int], finest: str, patches: dict[str, int], window_size: int) -> dict[str | None, int]:
    """The smallest window that is no smaller than asked for and holds whole patches of all modalities, to a pixel of
    the coarser one; the whole side if that is smaller.
    """
    side, patch = sides[finest], patches[finest]
    smallest = patch * math.ceil(window_size / patch)
    scales = {name: side / other for name, other in sides.items()}  # pixels of the finest for one of this
    for window in range(smallest, min(2 * smallest, side), patch):
        lengths = {name: patches[name] * round(window * sides[name] / side / patches[name]) for name in sides}
        if all(
            0 < length <= sides[name] and abs(length * scales[name] - window) <= scales[name]
            for name, length in lengths.items()
        ):
            return lengths
    if side <= 2 * smallest:
        return dict(sides)
    raise ValueError(
        f"No window of {smallest} to {2 * smallest} pixels of `{finest}` holds whole patches of all modalities, which "
        f"have sides of {sides} and patches of {patches} pixels. Resize the images, or ask for another `window_size`."
    )


def _check_ground(
    pixel_values: dict[str, torch.Tensor], finest: str, modalities: dict[str, dict], gsd, modality_mask
) -> None:
    """Raise `ValueError` for modalities whose ground differs by more than a pixel of the coarser one."""
    extents = ground_extent(token_grids(modalities, pixel_values), modalities, gsd, modality_mask)
    pixels = {name: metres / torch.tensor(pixel_values[name].shape[-2:]) for name, metres in extents.items()}
    for name, metres in extents.items():
        if ((metres - extents[finest]).abs() > torch.maximum(pixels[name], pixels[finest])).any():
            raise ValueError(
                f"`{finest}` and `{name}` cover {extents[finest].tolist()} and {metres.tolist()} metres, down and "
                "right: to be read in windows they must cover the same ground. Crop them to it, or say the resolution "
                "by `gsd`. Resizing to whole patches may change it too: crop sides to multiples of the patch size."
            )


def _length(part: slice) -> int:
    return part.stop - part.start


def _part(window: tuple, name: str) -> tuple:
    sample, down, right = window
    return sample, ..., down[name], right[name]


def _holds_something(window: tuple, names, modality_mask, valid_mask) -> bool:
    """Whether any modality has a valid pixel in a window."""
    for name in names:
        is_absent = modality_mask is not None and name in modality_mask and not modality_mask[name][window[0]]
        if not is_absent and (
            valid_mask is None or name not in valid_mask or valid_mask[name][_part(window, name)].any()
        ):
            return True
    return False


def _cut(values: dict[str, torch.Tensor] | None, windows: list[tuple], device) -> dict[str, torch.Tensor] | None:
    """Windows in place of samples."""
    if values is None:
        return None
    return {
        name: torch.stack([value[_part(window, name)] for window in windows]).to(device)
        for name, value in values.items()
    }


def _of_sample(values: dict[str, Any] | None, windows: list[tuple], device) -> dict[str, Any] | None:
    """What is the same in all windows of a sample, for each window; a number is the same for all samples."""
    if values is None:
        return None
    samples = [sample for sample, _, _ in windows]
    return {
        name: value[samples].to(device) if isinstance(value, torch.Tensor) and value.ndim else value
        for name, value in values.items()
    }
