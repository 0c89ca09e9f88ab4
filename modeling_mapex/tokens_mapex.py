"""From a batch of images to the sequence of its tokens: which inputs are accepted, where each token comes from, and
where it lies on the ground. Pure functions of shapes, masks and resolutions; nothing here has weights.
"""

from typing import Any, NamedTuple

import torch
from torch import nn


class TokenLayout(NamedTuple):
    """Where the tokens of a batch come from. Tokens of all modalities stand in one sequence of `num_tokens`, modality
    after modality in the order of the configuration, and row by row within each.

    Attributes:
        grids (`dict[str, tuple[int, int]]`): Rows and columns of tokens of each modality that the batch holds.
        modality_ids (`torch.LongTensor` of shape `(num_tokens,)`): Index of each token's modality in the configuration.
        token_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`, *optional*):
            False where the sample lacks the modality, or the patch has not one valid pixel. `None`: all are there.
    """

    grids: dict[str, tuple[int, int]]
    modality_ids: torch.LongTensor
    token_mask: torch.BoolTensor | None

    def slices(self) -> dict[str, slice]:
        """The part of the sequence that holds each modality."""
        result, start = {}, 0
        for name, (rows, columns) in self.grids.items():
            result[name] = slice(start, start + rows * columns)
            start += rows * columns
        return result


def check_inputs(
    modalities: dict[str, dict[str, Any]],
    pixel_values: dict[str, torch.Tensor],
    modality_mask: dict[str, torch.Tensor] | None = None,
    valid_mask: dict[str, torch.Tensor] | None = None,
    gsd: dict[str, float | torch.Tensor] | None = None,
) -> None:
    """Raise for a batch that the `modalities` of a configuration cannot take, saying what to do about it.

    Args are those of [`MapexModel.forward`].

    Raises:
        TypeError: a container of the wrong kind.
        ValueError: an unknown modality, wrong bands or size, masks that do not fit.
    """
    if not isinstance(pixel_values, dict):
        raise TypeError(
            "`pixel_values` must be a dictionary from modality to tensor, like "
            f'{{"{next(iter(modalities))}": tensor}}, got {type(pixel_values).__name__}.'
        )
    if not pixel_values:
        raise ValueError(f"`pixel_values` is empty: pass at least one of {list(modalities)}.")
    for name, given in (("modality_mask", modality_mask), ("valid_mask", valid_mask), ("gsd", gsd)):
        if given is not None and not isinstance(given, dict):
            raise TypeError(f"`{name}` must be a dictionary from modality to value, got {type(given).__name__}.")
        stray = [key for key in given or () if key not in pixel_values]
        if stray:
            raise ValueError(f"`{name}` names {stray}, which `pixel_values` does not hold ({list(pixel_values)}).")
    batch_sizes = {}
    for name, pixels in pixel_values.items():
        if name not in modalities:
            raise ValueError(
                f"Unknown modality `{name}`. This checkpoint has {list(modalities)}; if it was pruned, load the "
                "unpruned one to use another."
            )
        spec = modalities[name]
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
            got = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
            raise ValueError(f"`pixel_values` of `{name}` must be (batch, channels, height, width), got {got}.")
        batch_sizes[name], channels, height, width = pixels.shape
        if channels != len(spec["bands"]):
            raise ValueError(
                f"`{name}` needs {len(spec['bands'])} channels in the order {spec['bands']}, got {channels}. To use "
                'fewer bands, prune for them: `model.prune_for_modalities({"' + name + '": [...]})`.'
            )
        patch = spec["patch_size"]
        if height < patch or width < patch or height % patch or width % patch:
            raise ValueError(
                f"`{name}` is {height} x {width} pixels; both must be multiples of its patch size {patch}. "
                "Crop or resize the images."
            )
        mask = (valid_mask or {}).get(name)
        if mask is not None and (mask.shape != (pixels.shape[0], height, width) or mask.dtype != torch.bool):
            raise ValueError(
                f"`valid_mask` of `{name}` must be a bool tensor of shape {(pixels.shape[0], height, width)}, got "
                f"{mask.dtype} {tuple(mask.shape)}."
            )
        present = (modality_mask or {}).get(name)
        if present is not None and (present.shape != (pixels.shape[0],) or present.dtype != torch.bool):
            raise ValueError(
                f"`modality_mask` of `{name}` must be a bool tensor of shape {(pixels.shape[0],)}, got "
                f"{present.dtype} {tuple(present.shape)}."
            )
    if len(set(batch_sizes.values())) > 1:
        raise ValueError(
            f"The modalities differ in batch size: {batch_sizes}. Where a sample lacks a modality, fill its place with "
            "any value and say so in `modality_mask`."
        )
    for name, value in (gsd or {}).items():
        if isinstance(value, torch.Tensor):
            if value.shape != (pixel_values[name].shape[0],) or not value.is_floating_point():
                raise ValueError(
                    f"`gsd` of `{name}` must be a number, or a floating point tensor with one a sample, of shape "
                    f"{(pixel_values[name].shape[0],)}; got {value.dtype} {tuple(value.shape)}."
                )
            # Elsewhere a look would stall the accelerator, and a compiled graph cannot branch on data.
            if value.device.type == "cpu" and not torch.compiler.is_compiling() and not (value > 0).all():
                raise ValueError(f"`gsd` of `{name}` must be metres per pixel above 0, got {value.tolist()}.")
        elif not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"`gsd` of `{name}` must be metres per pixel above 0, got {value!r}.")


def pixels_that_count(
    name: str,
    pixel_values: dict[str, torch.Tensor],
    modality_mask: dict[str, torch.Tensor] | None = None,
    valid_mask: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pixels of a modality, zero where a sample lacks it or holds no data, and where that is not so. Replaced before
    any convolution, not after: NaN times a zero gradient is NaN.

    Args are those of [`MapexModel.forward`].

    Returns:
        `(batch_size, channels, height, width)`, and bool `(batch_size, 1, height, width)` or `None`: everywhere.
    """
    pixels, there = pixel_values[name], None
    if modality_mask is not None and name in modality_mask:
        there = modality_mask[name].to(pixels.device)[:, None, None, None]
    if valid_mask is not None and name in valid_mask:
        valid = valid_mask[name].to(pixels.device)[:, None]
        there = valid if there is None else there & valid
    if there is None:
        return pixels, None
    return torch.where(there, pixels, 0.0), there.expand_as(pixels[:, :1])


def token_grids(
    modalities: dict[str, dict[str, Any]], pixel_values: dict[str, torch.Tensor]
) -> dict[str, tuple[int, int]]:
    """Rows and columns of tokens of each modality of a batch, in the order of the configuration."""
    return {
        name: tuple(size // spec["patch_size"] for size in pixel_values[name].shape[2:])
        for name, spec in modalities.items()
        if name in pixel_values
    }


def token_layout(
    modalities: dict[str, dict[str, Any]],
    pixel_values: dict[str, torch.Tensor],
    modality_mask: dict[str, torch.Tensor] | None = None,
    valid_mask: dict[str, torch.Tensor] | None = None,
) -> TokenLayout:
    """The tokens of a batch that [`check_inputs`] has accepted.

    Args are those of [`MapexModel.forward`].

    Raises:
        ValueError: a sample has no token at all; not looked for in a compiled graph, which cannot branch on data.
    """
    grids, ids, masks = token_grids(modalities, pixel_values), [], []
    any_pixels = next(iter(pixel_values.values()))
    batch_size, device = any_pixels.shape[0], any_pixels.device
    indices = {name: index for index, name in enumerate(modalities)}
    for name, (rows, columns) in grids.items():
        num_tokens = rows * columns
        ids.append(torch.full((num_tokens,), indices[name], device=device))
        mask = None
        if valid_mask is not None and name in valid_mask:
            valid = valid_mask[name].to(device, torch.float32)[:, None]  # (B, 1, H, W)
            any_valid = nn.functional.max_pool2d(valid, modalities[name]["patch_size"])  # (B, 1, rows, columns)
            mask = any_valid.flatten(1) > 0  # (B, N)
        if modality_mask is not None and name in modality_mask:
            present = modality_mask[name].to(device)[:, None].expand(-1, num_tokens)  # (B, N)
            mask = present if mask is None else mask & present
        masks.append(mask)
    token_mask = None
    if any(mask is not None for mask in masks):
        counts = [rows * columns for rows, columns in grids.values()]
        masks = [
            torch.ones(batch_size, count, dtype=torch.bool, device=device) if mask is None else mask
            for mask, count in zip(masks, counts)
        ]
        token_mask = torch.cat(masks, dim=1)
        if not torch.compiler.is_compiling():
            fewest = int(token_mask.sum(dim=1).min())
            if fewest == 0:
                empty = (~token_mask.any(dim=1)).nonzero().flatten().tolist()
                raise ValueError(
                    f"Samples {empty} of the batch have no modality and no valid pixel at all. Leave them out of the "
                    "batch."
                )
            if fewest == token_mask.shape[1]:
                token_mask = None  # all are there: attention is faster without a mask
    return TokenLayout(grids, torch.cat(ids), token_mask)


def token_positions(
    layout: TokenLayout,
    modalities: dict[str, dict[str, Any]],
    gsd: dict[str, float | torch.Tensor] | None = None,
) -> torch.Tensor:
    """Centres of the tokens in metres down and right of the upper left corner, shape `(num_tokens, 2)`, or
    `(batch_size, num_tokens, 2)` if a resolution is given for each sample. Tokens of different sensors over the same
    ground have the same position, at any image size and resolution (after ScaleMAE, arXiv 2212.14532).
    """
    device = layout.modality_ids.device
    positions = []
    for name, (rows, columns) in layout.grids.items():
        spec = modalities[name]
        down = torch.arange(rows, device=device, dtype=torch.float32) + 0.5
        right = torch.arange(columns, device=device, dtype=torch.float32) + 0.5
        resolution = (gsd or {}).get(name, spec["gsd"])
        if isinstance(resolution, torch.Tensor):
            resolution = resolution.to(device, torch.float32)[:, None, None]  # (B, 1, 1)
        positions.append(torch.cartesian_prod(down, right).view(-1, 2) * (spec["patch_size"] * resolution))
    batch_sizes = [part.shape[0] for part in positions if part.ndim == 3]
    if batch_sizes:
        positions = [part.expand(batch_sizes[0], -1, -1) for part in positions]
    return torch.cat(positions, dim=-2)


def sincos_embedding(positions: torch.Tensor, dim: int, unit: float, temperature: float) -> torch.Tensor:
    """Two-dimensional sine-cosine embedding of `positions (..., num_tokens, 2)` in metres, shape
    `(..., num_tokens, dim)`: for each axis `dim // 4` wavelengths from `2 pi unit` to `2 pi unit * temperature` metres
    (MAE, arXiv 2111.06377, with metres in place of patch indices).
    """
    exponents = torch.arange(dim // 4, device=positions.device, dtype=torch.float32) / max(dim // 4 - 1, 1)
    angles = positions[..., None] / unit * temperature**-exponents  # (..., N, 2, dim / 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., N, dim)
