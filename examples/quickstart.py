"""Prune a pretrained MAPEX for Sentinel-1 and let it predict on real patches, in a minute on a CPU.

    pip install -e ".[demo]"
    python examples/quickstart.py                                   # everything below outputs/quickstart
    python examples/quickstart.py --prune_for s2 --experts_per_layer 1
    python examples/quickstart.py --model org/mapex-base            # another checkpoint, a folder or from the Hub

The model is mapex-nano, which lies beside this file: five sensors, pretrained on two CPU cores (docs/pretraining.md).
The patches are BigEarthNet's and come with the PyPI package `bigearthnet-common` (extra `demo`); nothing is downloaded.
"""

import json
import shutil
import statistics
import sys
import tarfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import rasterio
import torch
from command_line import parse_arguments
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import logging

from modeling_mapex import MapexForPreTraining
from modeling_mapex.visualization_mapex import plot_reconstruction, plot_routing


CHECKPOINT = Path(__file__).parent / "checkpoints" / "mapex-nano"
PATCH_PIXELS = 120
UNITS = {"s1": "db", "s2": "dn"}  # of the patches' files


@dataclass
class Arguments:
    model: str = field(default=str(CHECKPOINT), metadata={"help": "A pretrained model with s1 and s2."})
    output_dir: str = field(default="outputs/quickstart", metadata={"help": "Where data, model and pictures go."})
    prune_for: str = field(default="s1", metadata={"help": "The modality to keep: s1 or s2."})
    coverage: float = field(default=0.95, metadata={"help": "Share of its expert saliency that each layer must keep."})
    experts_per_layer: int | None = field(default=None, metadata={"help": "Keep exactly so many, instead of coverage."})
    patch: int = field(default=0, metadata={"help": "Which of the six patches to draw, from 0."})


def extract_patches(folder: Path) -> list[tuple[Path, Path]]:
    """Unpack the example patches of `bigearthnet-common` into `folder`; pairs of (Sentinel-1, Sentinel-2) folders."""
    try:
        files = metadata.files("bigearthnet-common") or []
    except metadata.PackageNotFoundError:
        sys.exit('The example patches are not installed. Run: pip install -e ".[demo]"')
    for archive in (file for file in files if file.name.endswith("-Example.tar.bz2")):
        target = folder / archive.name.removesuffix(".tar.bz2")
        if not target.is_dir():
            # Unpacked beside its place and moved there whole, so that an interruption leaves nothing half done.
            unfinished = folder / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            with tarfile.open(archive.locate()) as tar:
                tar.extractall(unfinished, filter="data")
            (unfinished / target.name).rename(target)
            shutil.rmtree(unfinished)
    pairs = []
    for s1 in sorted((folder / "BigEarthNet-S1-Example").glob("S1*")):
        labels = json.loads((s1 / f"{s1.name}_labels_metadata.json").read_text())
        pairs.append((s1, folder / "BigEarthNet-S2-Example" / labels["corresponding_s2_patch"]))
    if not pairs:
        sys.exit(f"No patches in {folder}. Delete that folder and run again.")
    return pairs


def read_patch(folder: Path, bands: list[str], size: int = PATCH_PIXELS) -> np.ndarray:
    """The bands of a BigEarthNet patch, one GeoTIFF each, on a common grid: `(bands, size, size)`."""
    layers = []
    for band in bands:
        path = folder / f"{folder.name}_{band}.tif"
        try:
            with rasterio.open(path) as raster:
                layers.append(raster.read(1, out_shape=(size, size), resampling=Resampling.bilinear))
        except RasterioError as error:
            sys.exit(f"Cannot read {path}: {error}. Delete {folder.parent} and run again.")
    return np.stack(layers).astype(np.float32)


@torch.no_grad()
def reconstruction_error(model: MapexForPreTraining, pixel_values: dict[str, torch.Tensor]) -> float:
    """Mean over 16 fixed masks of the squared error, in units of the variance that pretraining saw. A generator draws
    for the tokens first: a new one for each mask hides the same from models of different modalities.
    """
    masks = (torch.Generator().manual_seed(seed) for seed in range(16))
    return statistics.mean(model(pixel_values, generator=mask).reconstruction_loss.item() for mask in masks)


@torch.no_grad()
def milliseconds_per_chip(models: list[torch.nn.Module], pixel_values: dict[str, torch.Tensor]) -> list[float]:
    """Median encoding time of each model, taken in turn so that all meet the same state of the machine."""
    times = [[] for _ in models]
    for repetition in range(33):
        for model, measured in zip(models, times):
            start = time.perf_counter()
            model(pixel_values)
            if repetition >= 3:
                measured.append(time.perf_counter() - start)
    chips = next(iter(pixel_values.values())).shape[0]
    return [1000 * statistics.median(measured) / chips for measured in times]


def size_on_disk(folder: Path) -> str:
    """Of the weights in a saved model."""
    if not folder.is_dir():
        return "on the Hub"
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e6:.1f} MB"


def main(args: Arguments) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"Cannot write to {output_dir}: {error}. Choose another place with --output_dir.")
    if args.prune_for not in UNITS:
        sys.exit(f"--prune_for must be one of {list(UNITS)}, which the patches have, got {args.prune_for}.")

    # The whole model, and the same pruned while it is loaded: only what Sentinel-1 needs is read.
    choice = (
        {"coverage": args.coverage} if args.experts_per_layer is None else {"experts_per_layer": args.experts_per_layer}
    )
    try:
        full = MapexForPreTraining.from_pretrained(args.model).eval()
        small = MapexForPreTraining.from_pretrained(args.model, modalities=[args.prune_for], **choice).eval()
        processor = AutoImageProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"Cannot load {args.model}: {error}")
    if lacking := [name for name in UNITS if name not in full.config.modalities]:
        sys.exit(f"{args.model} has no {lacking}, which the patches have: give a --model that was not pruned.")

    # Real imagery, in the units of its files; the processor knows what the model wants.
    pairs = extract_patches(output_dir / "bigearthnet")
    if not 0 <= args.patch < len(pairs):
        sys.exit(f"--patch must be below {len(pairs)}, got {args.patch}.")
    images = {
        name: [read_patch(pair[index], full.config.modalities[name]["bands"]) for pair in pairs]
        for index, name in enumerate(UNITS)
    }
    name = args.prune_for
    pixel_values = processor({name: images[name]}, units={name: UNITS[name]})["pixel_values"]
    print(f"{len(pairs)} BigEarthNet patches of 1.2 km, {name}: {tuple(pixel_values[name].shape)}")

    # The small model is an ordinary one: saved, and loaded by transformers' own classes.
    small_dir = output_dir / f"mapex-nano-{name}"
    small.save_pretrained(small_dir)
    loaded = AutoModel.from_pretrained(small_dir)
    with torch.no_grad():
        difference = (loaded(pixel_values).last_hidden_state - small.mapex(pixel_values).last_hidden_state).abs().max()

    milliseconds = milliseconds_per_chip([full.mapex, loaded], pixel_values)
    errors = [reconstruction_error(each, pixel_values) for each in (full, small)]
    reached = small.config.pruning["coverage_reached"][name]
    rows = [("", "full", f"pruned for {name}")]
    rows += [
        ("modalities", ", ".join(full.config.modalities), ", ".join(small.config.modalities)),
        *(
            (f"experts, block {block}", f"{len(all_ids)}", f"{len(kept)} ({', '.join(map(str, kept))})")
            for block, all_ids, kept in zip(full.config.moe_layers, full.config.expert_ids, small.config.expert_ids)
        ),
        ("coverage per layer", "", ", ".join(f"{value:.3f}" for value in reached)),
        ("encoder parameters", f"{full.mapex.num_parameters():,}", f"{loaded.num_parameters():,}"),
        ("weights on disk", f"{size_on_disk(Path(args.model))}", f"{size_on_disk(small_dir)}"),
        (f"ms per chip, {name}", f"{milliseconds[0]:.2f}", f"{milliseconds[1]:.2f}"),
        (f"error of hidden {name}", f"{errors[0]:.4f}", f"{errors[1]:.4f}"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"\nLoaded back with AutoModel; outputs differ from the model in memory by at most {difference:.1e}.")

    noise = small.draw_noise(pixel_values, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = small(pixel_values, noise=noise)
    figure = plot_reconstruction(
        small.config,
        pixel_values,
        small.reconstruct(pixel_values, outputs),
        outputs.hidden_patches,
        sample=args.patch,
        title=f"The model pruned for {name} predicts what it does not see, {small.config.mask_ratio:.0%} of a patch",
    )
    figure.savefig(output_dir / "reconstruction.png", dpi=150)
    figure = plot_routing(
        full.config.expert_statistics,
        full.config.moe_layers,
        kept=small.config.expert_ids,
        criterion="saliency",
        title=f"Who uses which expert (% of saliency); framed: kept for {name}",
    )
    figure.savefig(output_dir / "routing.png", dpi=150)
    print(f"Small model: {small_dir}\nPictures:    {output_dir / 'reconstruction.png'}, {output_dir / 'routing.png'}")


if __name__ == "__main__":
    try:
        main(*parse_arguments((Arguments,), __doc__))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Nothing is left half written; run the command again to start over.")
