"""From tokens and pixels of several sensors to one map: where each sensor lies on a common grid in metres. Pure
functions of tensors.
"""

from collections.abc import Iterable

import torch
from torch import nn

from .tokens_mapex import TokenLayout


def fourier_features(pixels: torch.Tensor, num_frequencies: int) -> torch.Tensor:
    """Normalised pixels, and beside them their sines and cosines: layers learn slowly what happens in a small part of
    the range of their input, like single metres of an elevation that varies by hundreds, but soon from waves as short
    (Tancik et al., arXiv 2006.10739; an octave from each wave to the next as in arXiv 2003.08934). Of cosines it is
    their distance from 1: a pixel of zero, as one that is missing reads, stays zero.

    Args:
        pixels (`torch.Tensor` of shape `(batch_size, bands, height, width)`)
        num_frequencies (`int`): The longest wave is 4 standard deviations, each of the others half of the one before.

    Returns:
        `torch.Tensor` of shape `(batch_size, (1 + 2 * num_frequencies) * bands, height, width)`: all bands, all sines
        of the longest wave, all cosines of it, and so on. Of half precision the short waves are noise: the model takes
        pixels in fp32 whatever its own precision.
    """
    if num_frequencies == 0:
        return pixels
    features = [pixels]
    for octave in range(num_frequencies):
        angles = features[0] * (torch.pi / 2 * 2**octave)
        features += [angles.sin(), 1.0 - angles.cos()]
    return torch.cat(features, dim=1)


def ground_extent(
    grids: dict[str, tuple[int, int]],
    modalities: dict[str, dict],
    gsd: dict[str, float | torch.Tensor] | None = None,
    modality_mask: dict[str, torch.Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """Metres that each modality of the batch spans down and right of the common upper left corner.

    Args:
        grids (`dict[str, tuple[int, int]]`): Rows and columns of tokens, from [`token_grids`].
        modalities, gsd: As in [`token_positions`].
        modality_mask (`dict[str, torch.Tensor]`, *optional*):
            Modality to bool `(batch_size,)`. Of a sample that lacks the modality the extent is that of the one that
            would be its reference alone: a sample must not depend on the others of its batch.
        device (`torch.device`): Of the result.

    Returns:
        `dict[str, torch.Tensor]`: Modality to `(1, 2)`, or `(batch_size, 2)` where samples differ.
    """
    extents = {}
    for name, grid in grids.items():
        resolution = (gsd or {}).get(name, modalities[name]["gsd"])
        resolution = torch.as_tensor(resolution, dtype=torch.float32, device=device).view(-1, 1)  # (B or 1, 1)
        pixels = torch.tensor(grid, dtype=torch.float32, device=device) * modalities[name]["patch_size"]  # (2,)
        extents[name] = pixels * resolution
    if modality_mask is None:
        return extents
    ground = None  # of the first modality, from the reference on, that a sample has
    for name in _from_the_finest(grids, modalities)[::-1]:
        if name in modality_mask and ground is not None:
            ground = torch.where(modality_mask[name].to(device)[:, None], extents[name], ground)
        else:
            ground = extents[name]
    return {
        name: torch.where(modality_mask[name].to(device)[:, None], metres, ground) if name in modality_mask else metres
        for name, metres in extents.items()
    }


def reference_modality(names: Iterable[str], modalities: dict[str, dict]) -> str:
    """The modality of these whose grid of tokens is the common one: that with the smallest tokens on the ground by the
    configuration, of equals that with the smallest pixels, of equals again the first.
    """
    return _from_the_finest(names, modalities)[0]


def _from_the_finest(names: Iterable[str], modalities: dict[str, dict]) -> list[str]:
    def metres(name: str) -> tuple[float, float]:
        spec = modalities[name]
        return spec["patch_size"] * spec["gsd"], spec["gsd"]

    return sorted(names, key=metres)


def fuse_maps(
    maps: dict[str, torch.Tensor],
    present: dict[str, torch.Tensor],
    extents: dict[str, torch.Tensor],
    reference: str,
    size: tuple[int, int],
    otherwise: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean, at each place of a grid over the ground of `reference`, of the modalities that are present there.

    Args:
        maps (`dict[str, torch.Tensor]`): Modality to features `(batch_size, channels, rows, columns)`.
        present (`dict[str, torch.Tensor]`): Modality to `(batch_size, 1, rows, columns)`, 1 or 0.
        extents (`dict[str, torch.Tensor]`): From [`ground_extent`].
        reference (`str`): Modality whose ground the result covers.
        size (`tuple[int, int]`): Rows and columns of the result.
        otherwise (`torch.Tensor` of shape `(channels,)`, *optional*):
            Features of places where no modality is present. Default: zero.

    Returns:
        `torch.Tensor` of shape `(batch_size, channels, *size)`
    """
    total, weight = 0.0, 0.0
    for name, features in maps.items():
        there = present[name].to(features.dtype)
        ratio = extents[reference] / extents[name]  # (B or 1, 2), down and right
        values = _resample(torch.cat([features * there, there], dim=1), ratio, size, name == reference)
        total, weight = total + values[:, :-1], weight + values[:, -1:]
    mean = total / weight.clamp_min(1e-6)
    return mean if otherwise is None else torch.where(weight > 1e-6, mean, otherwise[:, None, None].to(mean))


def fuse_tokens(
    tokens: dict[str, torch.Tensor],
    layout: TokenLayout,
    extents: dict[str, torch.Tensor],
    reference: str,
    otherwise: torch.Tensor | None = None,
) -> torch.Tensor:
    """As [`fuse_maps`] on the grid of tokens of `reference`, for tokens `(batch_size, rows * columns, channels)` of
    each modality of `layout`.
    """
    maps, present = {}, {}
    for name, part in layout.slices().items():
        values = tokens[name].transpose(1, 2)  # (B, C, N)
        maps[name] = values.unflatten(2, layout.grids[name])
        mask = torch.ones_like(values[:, :1], dtype=torch.bool)
        if layout.token_mask is not None:
            mask = layout.token_mask[:, None, part]
        present[name] = mask.unflatten(2, layout.grids[name])
    return fuse_maps(maps, present, extents, reference, layout.grids[reference], otherwise)


def _resample(values: torch.Tensor, ratio: torch.Tensor, size: tuple[int, int], is_reference: bool) -> torch.Tensor:
    """`values` at the cell centres of a grid of `size` that spans `ratio` times their ground; zero beyond it."""
    if is_reference:
        if values.shape[2:] == size:
            return values
        return nn.functional.interpolate(values, size=size, mode="bilinear", align_corners=False)
    # Coordinates of grid_sample run from -1 to 1 over the ground of `values`. In half precision they would be off by
    # more than half a pixel in an image of 256.
    ratio = ratio.float().expand(values.shape[0], -1)  # (B, 2)
    rows, columns = (
        (torch.arange(count, device=values.device) + 0.5) * (2 / count) * ratio[:, axis, None] - 1.0  # (B, count)
        for axis, count in enumerate(size)
    )
    grid = torch.stack(
        [columns[:, None, :].expand(-1, size[0], -1), rows[:, :, None].expand(-1, -1, size[1])], dim=-1
    )  # (B, rows, columns, 2)
    with torch.autocast(values.device.type, enabled=False):
        sampled = nn.functional.grid_sample(
            values.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
    inside = (grid.abs() <= 1.0 + 1e-4).all(dim=-1)  # rounding at the edge
    return (sampled * inside[:, None]).to(values.dtype)
