"""Time of a pretraining step beside transformers' own masked autoencoder, and what of it is not the network, as ratios.

    python benchmarks/pretraining.py                      # nano, 2 CPU threads: about five minutes
    python benchmarks/pretraining.py --preset base --device cuda --dtype bfloat16 --batch_size 128
    python benchmarks/pretraining.py --profile            # also the operations that take most of a step

Steps are forward, backward, clipping and AdamW. Pairs run in turn and the ratio is taken pair by pair; printed are the
median and its quartiles.

    MAPEX / ViT-MAE           `ViTMAEForPreTraining` of the same width, depth, decoder, tokens and pixels, per token:
                              four sensors side by side are one image of twice the side. Top-2, and one expert (dense)
    without bookkeeping       1 - the time of a step whose masks, routing and router losses were computed before, over
                              that of a whole step: the share of masking and routing, backward included
    logging                   the metrics of `run_pretraining.py`, once in 50 steps as by default, over 50 steps
    waiting for data          of a run of `run_pretraining.py` on made-up shards, as it logs it itself
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from unittest.mock import patch

import torch
from data import SCHEMA, chip
from encoder import compare
from torch import nn
from transformers import HfArgumentParser, ViTMAEConfig, ViTMAEForPreTraining
from transformers.utils import logging

from modeling_mapex import MapexConfig, MapexForPreTraining, modeling_mapex
from modeling_mapex.modeling_mapex import MapexTopKRouter
from modeling_mapex.shards_mapex import Layer, Sample
from modeling_mapex.tokens_mapex import sincos_embedding
from modeling_mapex.writing_mapex import Item, write_shards


EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from run_pretraining import metrics_of  # noqa: E402


SENSORS = ["s1", "s2", "rgb", "hls"]  # 24 bands


@dataclass
class Arguments:
    preset: str = field(default="nano", metadata={"help": "Size of the model."})
    batch_size: int = field(default=32, metadata={"help": "Chips a batch."})
    image_size: int = field(default=64, metadata={"help": "Side of a chip in pixels, of all sensors."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "float32, or bfloat16 under autocast."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    repetitions: int = field(default=15, metadata={"help": "Pairs that are measured."})
    data_steps: int = field(default=150, metadata={"help": "Steps of the run that measures waiting; 0: leave it out."})
    profile: bool = field(default=False, metadata={"help": "Print the operations that take most of a step."})


def vit_mae(config: MapexConfig, image_size: int) -> ViTMAEForPreTraining:
    """transformers' masked autoencoder of the same shape. Its fixed position tables, which this release leaves at zero,
    are filled.
    """
    bands = sum(len(spec["bands"]) for spec in config.modalities.values())
    patch_size = next(iter(config.modalities.values()))["patch_size"]
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            layer_norm_eps=config.layer_norm_eps,
            decoder_hidden_size=config.decoder_hidden_size,
            decoder_num_hidden_layers=config.decoder_num_hidden_layers,
            decoder_num_attention_heads=config.decoder_num_attention_heads,
            decoder_intermediate_size=config.decoder_intermediate_size,
            image_size=2 * image_size,
            patch_size=patch_size,
            num_channels=bands // 4,
            mask_ratio=config.mask_ratio,
            norm_pix_loss=True,
        )
    )
    side = torch.arange(2 * image_size // patch_size)
    positions = torch.cartesian_prod(side, side).float()
    with torch.no_grad():
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table[0, 1:] = sincos_embedding(positions, table.shape[2], 1.0, 10_000.0)
    return model


def training_step(model: nn.Module, args: Arguments, inputs: dict) -> Callable[[], torch.Tensor]:
    """A function that takes a step and returns the outputs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    half = args.dtype == "bfloat16"

    def run():
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=half):
            outputs = model(**inputs)
        outputs.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return outputs

    return run


def without_bookkeeping(model: MapexForPreTraining, args: Arguments, inputs: dict) -> Callable[[], torch.Tensor]:
    """A step with the masks and the routing of one that is taken here, and without the losses of the routers."""
    masks, routes, noise = [], {}, model.draw_noise(inputs["pixel_values"])
    choose, route = modeling_mapex.sample_visible_tokens, MapexTopKRouter.forward

    def remember_masks(*arguments, **options):
        masks.append(choose(*arguments, **options))
        return masks[-1]

    def remember_route(router, *arguments):
        routes[router] = tuple(part.detach() for part in route(router, *arguments))
        return routes[router]

    def replaced(masks_by, routes_by) -> ExitStack:
        stack = ExitStack()
        nothing = (torch.ones(len(model.config.modalities), device=args.device), ())
        stack.enter_context(patch.object(modeling_mapex, "sample_visible_tokens", masks_by))
        stack.enter_context(patch.object(MapexTopKRouter, "forward", routes_by))
        stack.enter_context(patch.object(MapexForPreTraining, "_router_sums", lambda *arguments: nothing))
        return stack

    with replaced(remember_masks, remember_route):
        model(**inputs, noise=noise)
    step = training_step(model, args, {**inputs, "noise": noise})

    def run():
        with replaced(lambda *arguments, **options: masks[0], lambda router, *arguments: routes[router]):
            return step()

    return run


def row(name: str, values: list[float]) -> None:
    low, _, high = quantiles(values, n=4)
    print(f"{name:58}{median(values):8.3f}{f'{low:.3f} .. {high:.3f}':>18}", flush=True)


def share_of_logging(run: Callable, config: MapexConfig, args: Arguments) -> list[float]:
    """Time of the metrics over that of the 50 steps before them."""
    shares = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(5):
            outputs = run()
        steps = 10 * (time.perf_counter() - start)
        start = time.perf_counter()
        json.dumps(metrics_of(outputs.sums.detach(), config, "training"))
        shares.append((time.perf_counter() - start) / steps)
    return shares


def read(item: Item) -> Sample:
    pixels = chip(item.payload, 64)
    return Sample(item.id, item.id, {name: Layer(values) for name, values in pixels.items()})


def shares_of_waiting(args: Arguments) -> list[float]:
    """What `run_pretraining.py` logs, but for the first lines, in which workers start."""
    with tempfile.TemporaryDirectory() as folder:
        items = [Item(str(index), str(index), index) for index in range(512)]
        write_shards(items, read, SCHEMA, f"{folder}/shards", progress=False)
        command = [sys.executable, str(EXAMPLES / "run_pretraining.py"), "--sources", f"{folder}/shards"]
        options = {
            "preset": args.preset,
            "crop_size": args.image_size,
            "per_device_batch_size": args.batch_size,
            "max_steps": args.data_steps,
            "logging_steps": 10,
            "evaluation_steps": 10**6,
            "checkpoint_steps": 10**6,
            "report_to": "none",
            "output_dir": f"{folder}/run",
        }
        command += ["--modalities", "s1", "s2", "dem"]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        if args.dtype == "bfloat16":
            command += ["--mixed_precision", "bf16"]
        subprocess.run(command, check=True, capture_output=True)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
        return [line["throughput/waiting_for_data"] for line in lines if "throughput/waiting_for_data" in line][2:]


def main(args: Arguments) -> None:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = MapexConfig.from_preset(args.preset, modalities=SENSORS)
    dense = MapexConfig.from_preset(
        args.preset, modalities=SENSORS, num_experts=1, num_experts_per_tok=1, modality_dropout_prob=0.0
    )
    size = args.image_size
    pixel_values = {
        name: torch.randn(args.batch_size, len(spec["bands"]), size, size, device=args.device)
        for name, spec in config.modalities.items()
    }
    # The same numbers as one image of a quarter of the bands and twice the side, cut into as many patches.
    quarters = torch.cat(list(pixel_values.values()), dim=1).chunk(4, dim=1)  # (B, C / 4, H, W) each
    image = torch.cat([torch.cat(quarters[:2], dim=3), torch.cat(quarters[2:], dim=3)], dim=2)  # (B, C / 4, 2 H, 2 W)

    model, one_expert = MapexForPreTraining(config), MapexForPreTraining(dense)
    mae = vit_mae(config, size)
    for each in (model, one_expert, mae):
        each.to(args.device).train()
    inputs = {"pixel_values": pixel_values}
    step, mae_step = training_step(model, args, inputs), training_step(mae, args, {"pixel_values": image})
    dense_step = training_step(one_expert, args, inputs)
    tokens = len(SENSORS) * (size // next(iter(config.modalities.values()))["patch_size"]) ** 2
    print(f"{args.preset}, batches of {args.batch_size} with {tokens} tokens each, {args.dtype} on {args.device}")
    print(f"{'':58}{'ratio':>8}{'quartiles':>18}")
    row("ViT-MAE / the same ViT-MAE", compare(mae_step, training_step(mae, args, {"pixel_values": image}), args))
    row("MAPEX, one expert / ViT-MAE, time per token", compare(dense_step, mae_step, args))
    row("MAPEX, top-2 of 6 / ViT-MAE, time per token", compare(step, mae_step, args))
    shares = [1 - ratio for ratio in compare(without_bookkeeping(model, args, inputs), step, args)]
    row("masking and routing, share of a step", shares)
    row("logging, share of the steps", share_of_logging(step, config, args))
    if args.data_steps:
        row("waiting for data, share of the time", shares_of_waiting(args))
    if args.profile:
        with torch.profiler.profile() as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=44))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
