"""Pictures of what pretraining reconstructs and of which modality uses which expert. Needs matplotlib (extra `viz`)."""

from typing import Any

import numpy as np
import torch

from .losses_mapex import patchify, unpatchify
from .sensors_mapex import SENSORS
from .shards_mapex import mask_names


def display_bands(name: str, bands: list[str]) -> list[int]:
    """Positions of the bands that show a modality to a person: three for a colour picture, or one for grey.

    Args:
        name (`str`): Modality; the registry knows how its own sensors are shown.
        bands (`list[str]`): The bands at hand, in order.
    """
    wanted = SENSORS[name].display if name in SENSORS else ()
    if wanted and all(band in bands for band in wanted):
        return [bands.index(band) for band in wanted]
    return [0]


def to_picture(pixels: torch.Tensor, positions: list[int], limits: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """`(channels, height, width)` to `(height, width, 3)` in [0, 1], stretched between `limits` per band."""
    low, high = limits
    image = pixels[positions].float().cpu().numpy().transpose(1, 2, 0)  # (H, W, 1 or 3)
    image = np.clip((image - low) / np.maximum(high - low, 1e-6), 0.0, 1.0)
    return np.broadcast_to(image, (*image.shape[:2], 3))


def stretch_limits(pixels: torch.Tensor, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The 2nd and 98th percentile of each shown band of `pixels (channels, height, width)`."""
    values = pixels[positions].float().cpu().numpy().reshape(len(positions), -1)
    low, high = np.nanpercentile(values, [2, 98], axis=1)
    return low, high


def plot_reconstruction(
    config,
    pixel_values: dict[str, torch.Tensor],
    reconstruction: dict[str, torch.Tensor],
    hidden_patches: dict[str, torch.Tensor],
    sample: int = 0,
    title: str | None = None,
):
    """Per modality: the input, what the encoder saw of it, and the reconstruction.

    Args:
        config (`MapexConfig`): Of the model.
        pixel_values (`dict[str, torch.Tensor]`): The input, modality to `(batch, channels, height, width)`.
        reconstruction (`dict[str, torch.Tensor]`): From `MapexForPreTraining.reconstruct`.
        hidden_patches (`dict[str, torch.BoolTensor]`): From its output.
        sample (`int`): Which sample of the batch.
        title (`str`, *optional*): Above the picture.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.figure import Figure

    names = [name for name in config.modalities if name in reconstruction]
    figure = Figure(figsize=(7.2, 2.5 * len(names) + 0.4), layout="constrained")
    axes = figure.subplots(len(names), 3, squeeze=False)
    for row, name in zip(axes, names):
        spec = config.modalities[name]
        pixels = pixel_values[name][sample]
        positions = display_bands(name, spec["bands"])
        limits = stretch_limits(pixels, positions)
        patch = spec["patch_size"]
        grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
        hidden = hidden_patches[name][sample].cpu()  # (N,)
        picture = to_picture(pixels, positions, limits)
        hidden_pixels = unpatchify(hidden.view(1, -1, 1, 1).expand(-1, -1, 1, patch * patch), grid, patch)[0, 0].numpy()
        masked = np.where(hidden_pixels[:, :, None], 0.88, picture)
        error = patchify((pixels - reconstruction[name][sample].to(pixels))[None], patch)[0].square()  # (N, C, P)
        captions = (
            f"{name}: {', '.join(spec['bands'][position] for position in positions)}",
            f"visible: {int((~hidden).sum())} of {hidden.numel()} patches",
            f"reconstruction (rmse {float(error[hidden].mean().sqrt()):.2f} std)" if hidden.any() else "reconstruction",
        )
        for axis, image, caption in zip(
            row, (picture, masked, to_picture(reconstruction[name][sample], positions, limits)), captions
        ):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(caption, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def plot_routing(
    expert_statistics: dict[str, dict[str, Any]],
    moe_layers: list[int],
    kept: list[list[int]] | None = None,
    criterion: str = "usage",
    title: str | None = None,
):
    """Expert by modality, one panel per MoE layer: the share of each modality's mass that each expert has.

    Args:
        expert_statistics (`dict`): `config.expert_statistics` of a calibrated model.
        moe_layers (`list[int]`): `config.moe_layers`, for the titles.
        kept (`list[list[int]]`, *optional*): Experts that a pruned model keeps per layer, to be framed.
        criterion (`str`): `"usage"`, `"gate"` or `"saliency"`.
        title (`str`, *optional*): Above the picture.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    names = list(expert_statistics)
    num_experts = len(expert_statistics[names[0]][criterion][0])
    size = (max(2.0, 0.46 * num_experts) * len(moe_layers) + 1.6, 0.46 * len(names) + 1.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(moe_layers), squeeze=False, sharey=True)[0]
    for layer, (axis, block) in enumerate(zip(axes, moe_layers)):
        mass = np.array([expert_statistics[name][criterion][layer] for name in names])
        share = mass / np.maximum(mass.sum(axis=1, keepdims=True), 1e-30)  # (modalities, experts)
        image = axis.imshow(share, vmin=0.0, vmax=1.0, cmap="Blues", aspect="auto")
        for (row, column), value in np.ndenumerate(share):
            colour = "white" if value > 0.55 else "#444444"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        for expert in kept[layer] if kept is not None else ():
            frame = (expert - 0.46, -0.46)
            axis.add_patch(Rectangle(frame, 0.92, len(names) - 0.08, fill=False, edgecolor="#d1495b", linewidth=1.8))
        axis.set_title(f"block {block}", fontsize=9)
        axis.set_xticks(range(num_experts), [str(expert) for expert in range(num_experts)], fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.tick_params(length=0)
        axis.set_xlabel("expert", fontsize=8)
    figure.colorbar(image, ax=axes, label=f"share of {criterion}", shrink=0.9, ticks=[0, 0.5, 1])
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def plot_samples(samples: list[dict[str, Any]], labels: dict[str, dict[str, Any]] | None = None):
    """A sheet of samples of shards: one a row, one modality or label map a column, as stored.

    Args:
        samples (`list[dict]`): As from `ShardSchema.decode`.
        labels (`dict[str, dict]`, *optional*): `ShardSchema.labels`, for the names of classes.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    labels = labels or {}
    maps = [name for name, spec in labels.items() if spec["kind"] in ("mask", "map")]
    columns = [*samples[0]["images"], *maps]
    figure = Figure(figsize=(1.9 * len(columns) + 0.3, 2.15 * len(samples) + 0.4), layout="constrained")
    axes = figure.subplots(len(samples), len(columns), squeeze=False)
    legend = []
    for column, name in zip(axes.T, columns):
        layers = [sample["labels"].get(name) if name in maps else sample["images"][name] for sample in samples]
        mask = name in maps and labels[name]["kind"] == "mask"
        codes = []
        if mask:
            codes = np.unique(np.concatenate([layer.ravel() for layer in layers if layer is not None] or [[0]]))
        for axis, layer, sample in zip(column, layers, samples):
            axis.set_xticks([])
            axis.set_yticks([])
            if layer is None:
                axis.text(0.5, 0.5, "missing", ha="center", va="center", fontsize=8, color="#888888")
                axis.set_box_aspect(1)
            elif mask:  # the same colour for a class in every sample
                axis.imshow(colormaps["tab20"](np.searchsorted(codes, layer) % 20), interpolation="nearest")
            elif name in maps:
                axis.imshow(layer, cmap="viridis", interpolation="nearest")
            else:
                axis.imshow(_stored_picture(sample["sensors"][name], name, layer), interpolation="nearest")
        if mask:
            names = mask_names(labels[name])
            legend += [
                Patch(color=colormaps["tab20"](rank % 20), label=f"{name}: {names.get(int(code), int(code))}")
                for rank, code in enumerate(codes)
            ]
        sensor = samples[0]["sensors"].get(name)
        shown = ""
        if sensor is not None and sensor["unit"] != "class":
            shown = "\n" + ", ".join(sensor["bands"][index] for index in _stored_bands(sensor, name))
        column[0].set_title(f"{name}{shown}", fontsize=8)
    for row, sample in zip(axes, samples):
        row[0].set_ylabel(sample["id"][-24:], fontsize=6)
        words = [_label_text(labels[name], sample["labels"][name]) for name in labels if name not in maps]
        if words:
            row[-1].set_xlabel("; ".join(words)[: 24 * len(columns)], fontsize=6, loc="right")
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=max(1, len(columns)), fontsize=6)
    return figure


def _stored_bands(sensor: dict[str, Any], name: str) -> list[int]:
    return display_bands(sensor.get("sensor", name), sensor["bands"])


def _stored_picture(sensor: dict[str, Any], name: str, pixels: np.ndarray) -> np.ndarray:
    if sensor["unit"] == "class":
        return pixels[0]
    values = torch.from_numpy(pixels.astype(np.float32))
    for sentinel in np.atleast_1d(sensor.get("nodata", [])).tolist():
        values[values == sentinel] = torch.nan
    positions = _stored_bands(sensor, name)
    limits = stretch_limits(values, positions)
    return np.nan_to_num(to_picture(values, positions, limits), nan=0.85)


def _label_text(spec: dict[str, Any], value: Any) -> str:
    if value is None:
        return "no label"
    if spec["kind"] == "class":
        return spec["names"][value]
    return ", ".join(name for name, there in zip(spec["names"], value) if there)
