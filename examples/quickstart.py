"""Train, calibrate, prune, save and load a nano MAPEX on real Sentinel-1 + Sentinel-2 patches, in minutes on a CPU.

    pip install -e ".[demo]"
    python examples/quickstart.py                       # everything below outputs/quickstart
    python examples/quickstart.py --steps 2000          # longer: better pictures
    python examples/quickstart.py --prune_for s2 --experts_per_layer 1

The patches are BigEarthNet's and come with the PyPI package `bigearthnet-common` (extra `demo`); nothing is downloaded.
Five patches train the model, one is held out for every number and picture. It shows that all of it works; a model that
has seen five patches is no foundation model.
"""

import json
import math
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
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from tqdm import tqdm
from transformers import AutoModel, HfArgumentParser, set_seed
from transformers.utils import logging

from modeling_mapex import MapexConfig, MapexForPreTraining
from modeling_mapex.visualization_mapex import plot_reconstruction, plot_routing


HELD_OUT = "29UPU_36_85"  # the patch, by tile and position, that no step trains on


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/quickstart", metadata={"help": "Where data, model and pictures go."})
    prune_for: str = field(default="s1", metadata={"help": "The modality to keep: s1 or s2."})
    coverage: float = field(default=0.95, metadata={"help": "Share of its expert saliency that each layer must keep."})
    experts_per_layer: int | None = field(default=None, metadata={"help": "Keep exactly so many, instead of coverage."})
    steps: int = field(default=450, metadata={"help": "Optimisation steps."})
    batch_size: int = field(default=32, metadata={"help": "Crops a step."})
    crop: int = field(default=64, metadata={"help": "Side of a crop in pixels, a multiple of 8 up to 120."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak of the one-cycle schedule."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, crops and masks."})


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


def read_patch(folder: Path, bands: list[str], size: int = 120) -> np.ndarray:
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


def random_crops(images: dict[str, torch.Tensor], count: int, crop: int, generator: torch.Generator) -> dict:
    """`count` co-registered crops, flipped at random, of `images`, modality to `(patches, bands, height, width)`."""
    patches, _, height, width = next(iter(images.values())).shape
    batch = {name: [] for name in images}
    for _ in range(count):
        patch, top, left, flip = (
            int(torch.randint(limit, (), generator=generator))
            for limit in (patches, height - crop + 1, width - crop + 1, 8)
        )
        for name, image in images.items():
            piece = image[patch, :, top : top + crop, left : left + crop]
            piece = torch.rot90(piece, flip % 4, dims=(1, 2))
            batch[name].append(piece.flip(2) if flip >= 4 else piece)
    return {name: torch.stack(pieces) for name, pieces in batch.items()}


def corners(image: torch.Tensor, crop: int) -> torch.Tensor:
    """The four corners of each patch, `(patches, bands, height, width)` to `(4 * patches, bands, crop, crop)`."""
    return torch.cat(
        [
            image[..., rows, columns]
            for rows in (slice(crop), slice(-crop, None))
            for columns in (slice(crop), slice(-crop, None))
        ]
    )


def train(model: MapexForPreTraining, images: dict[str, torch.Tensor], args: Arguments) -> None:
    """Masked pretraining with a progress bar; mutual information is warmed up over the first third."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=min(0.1, 10 / args.steps + 0.05)
    )
    model.train()
    progress = tqdm(range(args.steps), desc="Training", unit="step")
    for step in progress:
        outputs = model(
            random_crops(images, args.batch_size, args.crop, generator),
            generator=generator,
            mutual_information_scale=min(1.0, 3 * step / args.steps),
        )
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            layers = len(model.config.moe_layers)
            progress.set_postfix(
                reconstruction=f"{outputs.reconstruction_loss.item():.3f}",
                information=f"{outputs.mutual_information.item() / layers:.2f}/{math.log(2):.2f}",
            )
    model.eval()


@torch.no_grad()
def reconstruction_error(model: MapexForPreTraining, pixel_values: dict[str, torch.Tensor]) -> float:
    """Mean over 16 fixed masks of the reconstruction loss."""
    generator = torch.Generator().manual_seed(1)
    return statistics.mean(model(pixel_values, generator=generator).reconstruction_loss.item() for _ in range(16))


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


def size_on_disk(folder: Path) -> float:
    """Megabytes of weights in a saved model."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def main(args: Arguments) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"Cannot write to {output_dir}: {error}. Choose another place with --output_dir.")

    # Real imagery, on one grid of 10 m: Sentinel-1 in dB, Sentinel-2 in digital numbers.
    # Plain pixels as target: after normalisation per band the error is then a share of the variance, 1 for a guess of
    # the mean. That, and hiding less, suits a few minutes on little data; the defaults are for longer runs.
    config = MapexConfig.from_preset(
        "nano", modalities=["s1", "s2"], norm_pix_loss="none", mask_ratio=0.6, modality_dropout_prob=0.0
    )
    patch_size = config.modalities["s1"]["patch_size"]
    if args.crop % patch_size or not patch_size <= args.crop <= 120:
        sys.exit(f"--crop must be a multiple of {patch_size} up to 120, got {args.crop}.")
    if args.prune_for not in config.modalities:
        sys.exit(f"--prune_for must be one of {list(config.modalities)}, got {args.prune_for}.")
    pairs = extract_patches(output_dir / "bigearthnet")
    trained_on = [index for index, (s1, _) in enumerate(pairs) if not s1.name.endswith(HELD_OUT)]
    held_out = [index for index in range(len(pairs)) if index not in trained_on]
    images = {
        name: torch.from_numpy(np.stack([read_patch(pair[index], config.modalities[name]["bands"]) for pair in pairs]))
        for index, name in enumerate(("s1", "s2"))
    }
    # Snow is twenty times as bright as forest: in logarithms, as radar's dB already are, it does not drown the rest.
    images["s2"] = images["s2"].clamp_min(1.0).log()
    for key in ("clip", "nodata", "dn_scale", "dn_offset"):  # the registry's, of reflectance
        del config.modalities["s2"][key]
    config.modalities["s2"]["unit"] = "logarithm of digital numbers"
    for name, image in images.items():
        mean, std = image[trained_on].mean(dim=(0, 2, 3)), image[trained_on].std(dim=(0, 2, 3))
        config.modalities[name].update(mean=mean.tolist(), std=std.tolist())
        images[name] = (image - mean[:, None, None]) / std[:, None, None]
    seen = {name: image[trained_on] for name, image in images.items()}
    unseen = {name: corners(image[held_out], args.crop) for name, image in images.items()}
    print(f"{len(pairs)} BigEarthNet patches of 1.2 km: {len(trained_on)} to train on, {HELD_OUT} held out")

    model = MapexForPreTraining(config)
    train(model, seen, args)

    # Calibrate each modality alone and together, then prune: from here on no data is needed.
    chips = {name: corners(image, args.crop) for name, image in seen.items()}
    batches = [{"pixel_values": {name: chips[name] for name in names}} for names in (["s1"], ["s2"], ["s1", "s2"])]
    model.calibrate_experts(batches)
    choice = (
        {"coverage": args.coverage} if args.experts_per_layer is None else {"experts_per_layer": args.experts_per_layer}
    )
    pruned = model.prune_for_modalities([args.prune_for], **choice)

    full_dir, pruned_dir = output_dir / "mapex-nano", output_dir / f"mapex-nano-{args.prune_for}"
    model.save_pretrained(full_dir)
    pruned.save_pretrained(pruned_dir)
    loaded = AutoModel.from_pretrained(pruned_dir)
    pruned_model = pruned.build()
    only = {args.prune_for: unseen[args.prune_for]}
    with torch.no_grad():
        difference = (loaded(only).last_hidden_state - pruned_model.mapex(only).last_hidden_state).abs().max().item()

    milliseconds = milliseconds_per_chip([model.mapex, loaded], only)
    errors = [reconstruction_error(each, only) for each in (model, pruned_model)]
    reached = pruned.config.pruning["coverage_reached"][args.prune_for]
    rows = [("", "full", f"pruned for {args.prune_for}")]
    rows += [
        ("modalities", ", ".join(model.config.modalities), ", ".join(loaded.config.modalities)),
        *(
            (f"experts, block {block}", f"{len(all_ids)}", f"{len(kept)} ({', '.join(map(str, kept))})")
            for block, all_ids, kept in zip(config.moe_layers, config.expert_ids, loaded.config.expert_ids)
        ),
        ("coverage per layer", "", ", ".join(f"{value:.3f}" for value in reached)),
        ("encoder parameters", f"{model.mapex.num_parameters():,}", f"{loaded.num_parameters():,}"),
        ("weights on disk", f"{size_on_disk(full_dir):.1f} MB", f"{size_on_disk(pruned_dir):.1f} MB"),
        (f"ms per chip, {args.prune_for}", f"{milliseconds[0]:.2f}", f"{milliseconds[1]:.2f}"),
        (f"error on held-out {args.prune_for}", f"{errors[0]:.4f}", f"{errors[1]:.4f}"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"\nLoaded back with AutoModel; outputs differ from the model in memory by at most {difference:.1e}.")

    noise = model.draw_noise(unseen, generator=torch.Generator().manual_seed(args.seed))
    noise = noise._replace(
        shares=torch.ones_like(noise.shares)
    )  # for the picture, as much to see of one as of the other
    with torch.no_grad():
        outputs = model(unseen, noise=noise)
    reconstruction = model.reconstruct(unseen, outputs)
    figure = plot_reconstruction(
        config,
        unseen,
        reconstruction,
        outputs.hidden_patches,
        title=f"A held-out patch, {config.mask_ratio:.0%} hidden",
    )
    figure.savefig(output_dir / "reconstruction.png", dpi=150)
    figure = plot_routing(
        model.config.expert_statistics,
        config.moe_layers,
        kept=loaded.config.expert_ids,
        criterion="saliency",
        title=f"Who uses which expert (% of saliency); framed: kept for {args.prune_for}",
    )
    figure.savefig(output_dir / "routing.png", dpi=150)
    print(f"Small model: {pruned_dir}\nPictures:    {output_dir / 'reconstruction.png'}, {output_dir / 'routing.png'}")


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Nothing is left half written; run the command again to start over.")
