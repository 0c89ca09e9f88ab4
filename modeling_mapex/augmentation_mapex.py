"""Augmentation that keeps co-registered layers together: pure functions with an explicit generator.

`random_crop`, `random_flip` and `drop_modalities` take and return a sample as `ShardSchema.decode` gives it, before
normalisation, and cut images and label maps alike; its transforms no longer hold and are left out. `drop_bands` works
on a normalised batch.
"""

import math
from typing import Any

import numpy as np
import torch


def _map_layers(sample: dict[str, Any], change) -> dict[str, Any]:
    """A new sample with `change` applied to every image and to every label that is a map."""
    images = {name: None if pixels is None else change(pixels) for name, pixels in sample["images"].items()}
    labels = {name: change(value) if _is_map(value) else value for name, value in sample.get("labels", {}).items()}
    kept = {key: value for key, value in sample.items() if key not in ("crs", "transform")}
    return {**kept, "images": images, "labels": labels}


def _is_map(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 2


def layer_sizes(sample: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Height and width of every image and label map of a sample."""
    layers = {name: pixels for name, pixels in sample["images"].items() if pixels is not None}
    layers |= {name: value for name, value in sample.get("labels", {}).items() if _is_map(value)}
    return {name: layer.shape[-2:] for name, layer in layers.items()}


def _draw(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (), generator=generator))


def random_crop(sample: dict[str, Any], size: int, generator: torch.Generator) -> dict[str, Any]:
    """Cut the same square of ground out of all layers.

    Args:
        sample (`dict`): As from `ShardSchema.decode`; its layers cover the same ground at one or several resolutions.
        size (`int`): Side in pixels of the finest layer. Corners lie where the pixels of all layers begin: of layers of
            120 and 40 pixels, at every third pixel of the finer one.
        generator (`torch.Generator`): Source of the position.

    Returns:
        `dict`: The sample with views of its arrays.

    Raises:
        ValueError: the sample is smaller, or `size` cuts through pixels of a coarser layer.
    """
    sizes = layer_sizes(sample)
    spans = []
    for axis in range(2):
        sides = {name: shape[axis] for name, shape in sizes.items()}
        finest, steps = max(sides.values()), math.gcd(*sides.values())
        unit = finest // steps  # pixels of the finest layer between two common pixel borders
        if size > finest or size % unit or size < 1:
            raise ValueError(
                f"Cannot cut {size} pixels out of layers of {sides} pixels: the pixels of all begin together at every "
                f"{unit}. Choose a multiple of {unit} up to {finest}."
            )
        start = _draw(steps - size // unit + 1, generator)
        spans.append((start, start + size // unit, steps))

    def cut(layer: np.ndarray) -> np.ndarray:
        rows, columns = (
            slice(start * side // steps, stop * side // steps)
            for (start, stop, steps), side in zip(spans, layer.shape[-2:])
        )
        return layer[..., rows, columns]

    return _map_layers(sample, cut)


def random_flip(sample: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Mirror and turn all layers alike, into one of the eight orientations of a square; of four if they are not square.

    Args:
        sample (`dict`): As from `ShardSchema.decode`.
        generator (`torch.Generator`): Source of the choice.

    Returns:
        `dict`: The sample with views of its arrays.
    """
    square = all(height == width for height, width in layer_sizes(sample).values())
    code = _draw(8 if square else 4, generator)

    def turn(layer: np.ndarray) -> np.ndarray:
        if code & 1:
            layer = layer[..., ::-1]
        if code & 2:
            layer = layer[..., ::-1, :]
        return layer.swapaxes(-1, -2) if code & 4 else layer

    return _map_layers(sample, turn)


def drop_modalities(sample: dict[str, Any], probability: float, generator: torch.Generator) -> dict[str, Any]:
    """Leave out each present modality with a probability, but never all of them.

    Args:
        sample (`dict`): As from `ShardSchema.decode`.
        probability (`float`): Of leaving out a modality.
        generator (`torch.Generator`): Source of the choice.
    """
    _check_probability(probability)
    present = [name for name, pixels in sample["images"].items() if pixels is not None]
    draws = torch.rand(len(present), generator=generator)
    dropped = {name for name, draw in zip(present, draws.tolist()) if draw < probability}
    if len(dropped) == len(present):
        dropped.remove(present[int(draws.argmax())])
    images = {name: None if name in dropped else pixels for name, pixels in sample["images"].items()}
    return {**sample, "images": images}


def drop_bands(
    pixel_values: dict[str, torch.Tensor], probability: float, draws: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Replace single bands of single samples by their mean, which is 0 after normalisation, but never all of a modality
    (band dropout as in OlmoEarth).

    Args:
        pixel_values (`dict[str, torch.Tensor]`): Modality to `(batch, channels, height, width)`, normalised.
        probability (`float`): Of dropping a band.
        draws (`dict[str, torch.Tensor]`): Modality to uniform numbers `(batch, channels)`; the band with the highest
            stays.
    """
    _check_probability(probability)
    result = {}
    for name, pixels in pixel_values.items():
        keep = (draws[name] >= probability) | (draws[name] == draws[name].amax(dim=1, keepdim=True))  # (B, C)
        result[name] = pixels * keep[:, :, None, None].to(pixels)
    return result


def _check_probability(probability: float) -> None:
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"A probability lies between 0 and 1, got {probability}.")
