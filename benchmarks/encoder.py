"""Speed and memory of the MAPEX encoder beside transformers' own ViT, in one process, as ratios.

    python benchmarks/encoder.py                          # small width, 2 CPU threads: about five minutes
    python benchmarks/encoder.py --preset base --device cuda --dtype bfloat16 --batch_size 64
    python benchmarks/encoder.py --repetitions 40         # narrower spread

Each row compares A with B on the same batch. The two run in turn and the ratio is taken pair by pair, so that a machine
that slows down slows both; printed are the median ratio and its quartiles. The pair that is the same model twice tells
what the machine's noise alone gives.

    pruned to one expert a layer / ViT      the blocks must cost what a plain ViT's do
    full, top-2 / ViT of equal active FLOPs the mixture's overhead: router, sorting, gathering. The dense twin's MLP is
                                            twice as wide where MAPEX has two active experts
    calibrating / encoding                  what it costs to record expert statistics
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import HfArgumentParser, ViTConfig, ViTModel
from transformers.utils import logging

from modeling_mapex import MapexConfig, MapexModel


@dataclass
class Arguments:
    preset: str = field(default="small", metadata={"help": "Size of the encoder."})
    layers: int = field(default=6, metadata={"help": "Blocks, fewer than the preset's to save time; 0: the preset's."})
    batch_size: int = field(default=8, metadata={"help": "Chips a batch."})
    image_size: int = field(default=224, metadata={"help": "Side of a chip in pixels: 196 tokens at 224."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    repetitions: int = field(default=15, metadata={"help": "Pairs that are measured."})


def forward(model: nn.Module, pixels) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(pixels)

    return run


def forward_backward(model: nn.Module, pixels) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(pixels).last_hidden_state.float().square().mean().backward()

    return run


def compare(one: Callable[[], None], other: Callable[[], None], args: Arguments) -> list[float]:
    """Ratios of the times of `one` to those of `other`, pair by pair."""
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    def seconds(run: Callable[[], None]) -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    for _ in range(2):  # warm up
        one(), other()
    ratios = []
    for repetition in range(args.repetitions):
        pair = (one, other) if repetition % 2 == 0 else (other, one)  # neither is always second
        first, second = (seconds(run) for run in pair)
        ratios.append(first / second if repetition % 2 == 0 else second / first)
    return ratios


class ActivationBytes:
    """Bytes that autograd keeps for the backward pass of what runs inside, each storage once; not the parameters."""

    def __init__(self, model: nn.Module):
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages: dict[int, int] = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def training_memory(model: nn.Module, pixels) -> int:
    """Bytes of parameters, their gradients, and what is kept for the backward pass."""
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    with ActivationBytes(model) as kept:
        outputs = model(pixels)
    del outputs
    return 2 * parameters + kept.total


def vit(config: MapexConfig, image_size: int, wide_layers: list[int]) -> ViTModel:
    """transformers' ViT of the same shape; its MLP is twice as wide in `wide_layers`."""
    spec = next(iter(config.modalities.values()))
    model = ViTModel(
        ViTConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            layer_norm_eps=config.layer_norm_eps,
            image_size=image_size,
            patch_size=spec["patch_size"],
            num_channels=len(spec["bands"]),
        ),
        add_pooling_layer=False,
    )
    for layer in wide_layers:
        model.layers[layer].mlp.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        model.layers[layer].mlp.fc2 = nn.Linear(2 * config.intermediate_size, config.hidden_size)
    return model


def main(args: Arguments) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    layers = {"num_hidden_layers": args.layers} if args.layers else {}
    config = MapexConfig.from_preset(args.preset, modalities=["s2"], **layers)
    place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    pixels = torch.randn(args.batch_size, 12, args.image_size, args.image_size, **place)
    inputs = {"s2": pixels}

    full = MapexModel(config).to(**place).eval()
    full.calibrate_experts([{"pixel_values": inputs}])
    pruned = full.prune_for_modalities(["s2"], experts_per_layer=1).build()
    plain = vit(config, args.image_size, wide_layers=[]).to(**place).eval()
    wide = vit(config, args.image_size, wide_layers=config.moe_layers).to(**place).eval()

    print(
        f"{args.preset}, {config.num_hidden_layers} blocks of {config.hidden_size}, {args.batch_size} chips of "
        f"{(args.image_size // config.modalities['s2']['patch_size']) ** 2} tokens, {args.dtype} on {args.device}"
    )
    print(f"{'':50}{'ratio':>8}{'quartiles':>16}")
    rows = [
        ("ViT / the same ViT, forward", forward(plain, pixels), forward(plain, pixels)),
        ("pruned to one expert / ViT, forward", forward(pruned, inputs), forward(plain, pixels)),
        (
            "pruned to one expert / ViT, with backward",
            forward_backward(pruned, inputs),
            forward_backward(plain, pixels),
        ),
        ("full top-2 / ViT of equal FLOPs, forward", forward(full, inputs), forward(wide, pixels)),
        (
            "full top-2 / ViT of equal FLOPs, with backward",
            forward_backward(full, inputs),
            forward_backward(wide, pixels),
        ),
        (
            "calibrating / encoding",
            lambda: full.calibrate_experts([{"pixel_values": inputs}]),
            forward(full, inputs),
        ),
    ]
    for name, one, other in rows:
        ratios = compare(one, other, args)
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"{name:50}{statistics.median(ratios):8.3f}{f'{low:.3f} .. {high:.3f}':>16}", flush=True)
    for name, one, other in (
        ("pruned to one expert / ViT", pruned, plain),
        ("full top-2 / ViT of equal FLOPs", full, wide),
    ):
        ratio = training_memory(one, inputs) / training_memory(other, pixels)
        print(f"{name + ', training memory':50}{ratio:8.3f}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
