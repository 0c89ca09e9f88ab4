"""Fine-tuning a pruned MAPEX beside the full one and a plain ViT of the pruned size, and what Trainer adds, as ratios.

    python benchmarks/finetuning.py                       # mapex-nano on 2 CPU threads: about five minutes
    python benchmarks/finetuning.py --model org/mapex-base --image_size 224 --device cuda --batch_size 64

A step is forward, backward, clipping and AdamW on one batch of one sensor. Pairs run in turn and the ratio is taken
pair by pair; printed are the median and its quartiles.

    pruned / ViT              one expert a layer against transformers' own ViT of the same width and depth, with a
                              linear head on the mean of the tokens
    full / pruned             all experts, of which a token uses two, against one expert, and against the experts that
                              cover 95 %, of which a token uses two as well
    Trainer / bare loop       `MapexTrainer` against a loop over the same loader with the same optimiser
    extracting / encoding     `evaluate_frozen.py` reading, processing and encoding shards, against the encoder alone on
                              batches that lie ready
    predict_map               of a scene eight chips wide, in windows of a chip with half of it to the next, against the
                              forward passes of these windows alone, and against the scene as one image
    memory                    parameters, gradients and what autograd keeps for the backward pass
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from encoder import compare, training_memory, vit
from pretraining import row
from torch import nn
from torch.utils.data import DataLoader, default_collate
from transformers import HfArgumentParser, PrinterCallback, TrainingArguments
from transformers.utils import logging

from modeling_mapex import SENSORS, MapexForImageClassification, MapexForSemanticSegmentation, MapexTrainer
from modeling_mapex.shards_mapex import Layer, Sample, ShardSchema
from modeling_mapex.writing_mapex import Item, write_shards


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from frozen_features import Encoder, Shards, compute_features


NUM_LABELS = 10
SCENE = 8  # chips a side


@dataclass
class Arguments:
    model: str = field(
        default=str(Path(__file__).parent.parent / "examples" / "checkpoints" / "mapex-nano"),
        metadata={"help": "A checkpoint with expert statistics."},
    )
    modality: str = field(default="s2", metadata={"help": "The sensor of the task."})
    batch_size: int = field(default=32, metadata={"help": "Chips a batch."})
    image_size: int = field(default=64, metadata={"help": "Side of a chip in pixels."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    repetitions: int = field(default=21, metadata={"help": "Pairs that are measured."})
    trainer_steps: int = field(default=40, metadata={"help": "Steps of each run of Trainer and of the bare loop."})
    extracted_batches: int = field(default=60, metadata={"help": "Batches of features that are extracted."})


class ViTClassifier(nn.Module):
    """transformers' ViT with a linear head on the mean of its tokens, as MAPEX has."""

    def __init__(self, encoder: nn.Module, hidden_size: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(hidden_size, NUM_LABELS)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.classifier(self.encoder(pixel_values).last_hidden_state.mean(dim=1))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def training_step(model: nn.Module, inputs: dict) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> None:
        model(**inputs)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def inference(model: nn.Module, inputs: dict) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(inputs["pixel_values"])

    return run


def trainer_and_bare_loop(
    model: MapexForImageClassification, args: Arguments
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Functions that train for `trainer_steps` and return the seconds from the first step to the last."""
    channels = len(model.config.modalities[args.modality]["bands"])
    chips = [
        {"pixel_values": {args.modality: torch.randn(channels, args.image_size, args.image_size)}, "labels": i % 10}
        for i in range(args.batch_size * args.trainer_steps)
    ]

    def with_trainer() -> float:
        with TemporaryDirectory() as folder:
            options = TrainingArguments(
                folder,
                max_steps=args.trainer_steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=1e-4,
                remove_unused_columns=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=args.device == "cpu",
                dataloader_pin_memory=False,
            )
            trainer = MapexTrainer(model, options, train_dataset=chips, data_collator=default_collate)
            trainer.remove_callback(PrinterCallback)
            start = time.perf_counter()
            trainer.train()
            return time.perf_counter() - start

    def bare() -> float:
        model.train()
        loader = DataLoader(chips, batch_size=args.batch_size, shuffle=True, collate_fn=default_collate)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.trainer_steps)
        start = time.perf_counter()
        for batch in loader:
            pixel_values = {name: pixels.to(args.device) for name, pixels in batch["pixel_values"].items()}
            model(pixel_values, labels=batch["labels"].to(args.device)).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return time.perf_counter() - start

    return with_trainer, bare


def extracting_and_encoding(
    model: MapexForImageClassification, folder: Path, args: Arguments
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions that encode `extracted_batches`: read from shards that are made in `folder`, stored as the converters
    store the sensor, or ready in memory.
    """
    spec = model.config.modalities[args.modality]
    count, size = args.batch_size * args.extracted_batches, args.image_size
    mean, std = (np.array(spec[key], dtype=np.float32)[:, None, None] for key in ("mean", "std"))
    stored = {"bands": spec["bands"], "unit": spec["unit"], "gsd": spec["gsd"], "dtype": "float32"}
    if "dn_scale" in spec:  # reflectance is delivered, and converted, as whole numbers
        stored |= {"unit": "dn", "dtype": "uint16", "dn_offset": spec["dn_offset"]}
        mean, std = (mean - spec["dn_offset"]) / spec["dn_scale"], std / spec["dn_scale"]
    elif spec["unit"] == "uint8":
        stored["dtype"] = "uint8"
    if args.modality in SENSORS:
        stored["sensor"] = args.modality
    schema = ShardSchema({args.modality: stored})

    def read(item: Item) -> Sample:
        noise = np.random.default_rng(item.payload).standard_normal((len(spec["bands"]), size, size), dtype=np.float32)
        pixels = (mean + 0.5 * std * np.abs(noise)).astype(stored["dtype"])
        return Sample(item.id, item.id, {args.modality: Layer(pixels, gsd=spec["gsd"])})

    write_shards([Item(f"{index}", "made up", index) for index in range(count)], read, schema, folder, progress=False)
    encoder, shards = Encoder("pruned", model.mapex, [args.modality]), Shards(str(folder), None, {})
    encoder.model.to(args.device)
    batch = {args.modality: torch.randn(args.batch_size, len(spec["bands"]), size, size, device=args.device)}

    def extracting() -> None:
        compute_features(encoder, shards, "train", schema, batch_size=args.batch_size)

    def encoding() -> None:
        with torch.inference_mode():
            features = [encoder.model(batch).pooler_output for _ in range(args.extracted_batches)]
        torch.cat(features).cpu()

    return extracting, encoding


def scene_in_windows(args: Arguments) -> tuple[Callable[[], None], ...]:
    """Functions that map a scene: by `predict_map` in windows, by the windows' forward passes alone, and at once."""
    segmenter = MapexForSemanticSegmentation.from_pretrained(
        args.model, modalities=[args.modality], experts_per_layer=1, num_labels=2
    )
    segmenter.to(args.device).eval()
    channels, size = len(segmenter.config.modalities[args.modality]["bands"]), args.image_size
    scene = {args.modality: torch.randn(1, channels, SCENE * size, SCENE * size)}
    count = (2 * SCENE - 1) ** 2
    windows = torch.randn(count, channels, size, size, device=args.device)

    def in_windows() -> None:
        segmenter.predict_map(scene, window_size=size, batch_size=args.batch_size)

    def forward_passes() -> None:
        with torch.no_grad():
            for part in windows.split(args.batch_size):
                segmenter({args.modality: part}).logits.cpu()

    def at_once() -> None:
        segmenter.predict_map(scene)

    return in_windows, forward_passes, at_once


def main(args: Arguments) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    load = MapexForImageClassification.from_pretrained
    full = load(args.model, num_labels=NUM_LABELS)
    covering = load(args.model, modalities=[args.modality], num_labels=NUM_LABELS)
    single = load(args.model, modalities=[args.modality], experts_per_layer=1, num_labels=NUM_LABELS)
    dense = ViTClassifier(vit(single.config, args.image_size, wide_layers=[]), single.config.hidden_size)
    for model in (full, covering, single, dense):
        model.to(args.device).train()

    channels = len(single.config.modalities[args.modality]["bands"])
    pixels = torch.randn(args.batch_size, channels, args.image_size, args.image_size, device=args.device)
    labels = torch.arange(args.batch_size, device=args.device) % NUM_LABELS
    inputs = {"pixel_values": {args.modality: pixels}, "labels": labels}
    plain_inputs = {"pixel_values": pixels, "labels": labels}

    print(f"{args.model}, {args.modality}, batches of {args.batch_size} chips of {args.image_size}, {args.device}")
    print(f"{'':58}{'ratio':>8}{'quartiles':>18}")
    steps = {model: training_step(model, inputs) for model in (full, covering, single)}
    steps[dense] = training_step(dense, plain_inputs)
    row("ViT / the same ViT, step", compare(steps[dense], training_step(dense, plain_inputs), args))
    row("pruned to one expert / ViT, step", compare(steps[single], steps[dense], args))
    row("full / pruned to one expert, step", compare(steps[full], steps[single], args))
    row("full / pruned to cover 95 %, step", compare(steps[full], steps[covering], args))
    forward, plain_forward = inference(single.eval(), inputs), inference(dense.eval(), plain_inputs)
    row("pruned to one expert / ViT, evaluation", compare(forward, plain_forward, args))

    with_trainer, bare = trainer_and_bare_loop(single, args)
    with_trainer(), bare()
    row("Trainer / bare loop", [with_trainer() / bare() for _ in range(11)])

    with TemporaryDirectory() as folder:
        extracting, encoding = extracting_and_encoding(single, Path(folder) / "shards", args)
        row("extracting from shards / encoding", compare(extracting, encoding, replace(args, repetitions=11)))

    in_windows, forward_passes, at_once = scene_in_windows(args)
    row(
        "predict_map / forward passes of its windows", compare(in_windows, forward_passes, replace(args, repetitions=7))
    )
    row("predict_map in windows / at once", compare(in_windows, at_once, replace(args, repetitions=7)))

    pixel_values = inputs["pixel_values"]
    memory = {model: training_memory(model.train(), pixel_values) for model in (full, covering, single)}
    memory[dense] = training_memory(dense.train(), pixels)
    for name, one, other in (
        ("pruned to one expert / ViT, training memory", single, dense),
        ("full / pruned to one expert, training memory", full, single),
        ("full / pruned to cover 95 %, training memory", full, covering),
    ):
        print(f"{name:58}{memory[one] / memory[other]:8.3f}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
