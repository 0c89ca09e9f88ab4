r"""Pretrain MAPEX on shards of any mix of sensors, on one CPU or many GPUs.

    # one CPU
    python examples/run_pretraining.py --sources data/ben --modalities s1 s2 --preset nano --max_steps 1000
    # one GPU, in bf16
    python examples/run_pretraining.py --sources org/s1-s2-shards org/dem-shards --weights 3 1 --mixed_precision bf16
    # eight GPUs: every option may stand in a file; what follows it on the command line wins
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml --num_processes 8 \
        examples/run_pretraining.py examples/configs/base.yaml --output_dir outputs/base
    # two nodes of eight GPUs: the same on each, with its rank
    accelerate launch --config_file examples/accelerate_configs/multi_node.yaml --machine_rank 0 \
        --main_process_ip 10.0.0.1 examples/run_pretraining.py examples/configs/base.yaml --output_dir /shared/base

`--sources` are folders of shards, as the scripts in `conversion/` write them, or data set repositories on the Hub. Of
each, the modalities that the model has are read. `--held_out` of the places are kept for evaluation: no sample of them
is trained on. The run writes checkpoints to `output_dir`, from the last of which the same command goes on after it was
stopped, whenever and however; at its end it calibrates the experts on held-out data and writes the model, in files
grouped by modality and with its card, to `output_dir/model`.
"""

import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, send_to_device, set_seed
from command_line import Stop, check_trackers, ignore_interrupts, parse_arguments, read_overrides
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from modeling_mapex import MapexConfig, MapexForPreTraining
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.data_mapex import MixedShardStream, ShardStream, read_schema, split_of_place, stream_shards
from modeling_mapex.image_processing_mapex import MapexImageProcessor
from modeling_mapex.losses_mapex import PretrainingSums, pretraining_losses
from modeling_mapex.routing_mapex import routing_metrics


@dataclass
class ModelArguments:
    """What to train."""

    preset: str = field(default="base", metadata={"help": "Size: nano, tiny, small, base or large."})
    modalities: list[str] | None = field(
        default=None, metadata={"help": "Sensors of the registry; in a file also a mapping to bands or descriptions."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of MapexConfig as JSON (a mapping in a file): '{\"num_experts\": 8}'."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "A folder or repository with a config.json, instead of a preset."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint to start from, instead of random weights."}
    )


@dataclass
class DataArguments:
    """What to train on."""

    sources: list[str] = field(default_factory=list, metadata={"help": "Folders of shards or repositories on the Hub."})
    weights: list[float] | None = field(
        default=None, metadata={"help": "How often samples of each source are drawn. Default: all alike."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of the shards to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split of every source to evaluate on, instead of --held_out."}
    )
    held_out: float = field(default=0.1, metadata={"help": "Share of the places kept for evaluation."})
    split_seed: int = field(default=0, metadata={"help": "Chooses the places."})
    evaluation_samples: int = field(default=256, metadata={"help": "Held-out samples of each source to evaluate on."})
    crop_size: int = field(default=128, metadata={"help": "Side in pixels of the crops; smaller samples stay whole."})
    band_dropout: float = field(default=0.0, metadata={"help": "Probability of replacing a band by its mean."})
    shuffle_window: int = field(default=512, metadata={"help": "So many samples of a source are shuffled at a time."})
    num_workers: int = field(
        default=1, metadata={"help": "Processes that read and augment, for each training process."}
    )


@dataclass
class PretrainingArguments:
    """How to train."""

    output_dir: str = field(default="outputs/pretraining", metadata={"help": "Checkpoints, logs and the model."})
    max_steps: int = field(default=100_000, metadata={"help": "Optimisation steps."})
    per_device_batch_size: int = field(default=64, metadata={"help": "Samples of a process and forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes for each step."})
    base_learning_rate: float = field(
        default=1.5e-4, metadata={"help": "For 256 samples a step; the rate grows linearly with their number."}
    )
    minimum_learning_rate: float = field(default=0.01, metadata={"help": "Share of the rate that the cosine ends at."})
    warmup_steps: int = field(default=2000, metadata={"help": "Steps of linear warm-up."})
    mutual_information_warmup_steps: int = field(
        default=2000, metadata={"help": "Steps in which mutual information gains its full weight."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Of matrices; biases, norms, embeddings have none."})
    adam_beta1: float = field(default=0.9, metadata={"help": "Of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no or bf16. Default: what accelerate launch says."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Save memory, compute activations twice."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model; samples then need one size."})
    local_losses: bool = field(
        default=False, metadata={"help": "Losses of each process by itself; then no step equals that of one process."}
    )
    seed: int = field(default=0, metadata={"help": "Of weights, order, crops, masks and noise."})
    logging_steps: int = field(default=50, metadata={"help": "Steps from log to log."})
    evaluation_steps: int = field(default=1000, metadata={"help": "Steps from evaluation to evaluation."})
    checkpoint_steps: int = field(default=1000, metadata={"help": "Steps from checkpoint to checkpoint."})
    keep_checkpoints: int = field(default=2, metadata={"help": "How many of the last to keep."})
    from_scratch: bool = field(default=False, metadata={"help": "Delete the checkpoints there are; do not resume."})
    stop_after: int | None = field(default=None, metadata={"help": "End this session at a step, as if interrupted."})
    report_to: list[str] | None = field(
        default=None, metadata={"help": "Trackers of Accelerate, or none. Default: tensorboard where it is installed."}
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "Of one device, in 1e12 operations a second; gives the utilisation (MFU)."}
    )
    process_timeout: int = field(default=600, metadata={"help": "Seconds to wait for a process before giving up."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository to push the model to at the end."})


# A run may go on with others of these: they change neither what is learnt nor from what.
FREE_SETTINGS = {
    *("output_dir", "logging_steps", "evaluation_steps", "evaluation_samples", "checkpoint_steps", "keep_checkpoints"),
    *("from_scratch", "stop_after", "report_to", "peak_tflops", "process_timeout", "push_to_hub", "modalities"),
    *("mixed_precision", "gradient_checkpointing", "torch_compile", "num_workers"),
}


def build_model(args: ModelArguments) -> MapexForPreTraining:
    """The model to train, from a checkpoint, a configuration or a preset."""
    overrides = read_overrides(args.config_overrides, MapexConfig)
    existing = args.model_name_or_path or args.config_name
    if existing and args.modalities:
        there = {name: spec["bands"] for name, spec in MapexConfig.from_pretrained(existing).modalities.items()}
        named = args.modalities if isinstance(args.modalities, dict) else dict.fromkeys(args.modalities)
        if sorted(named) != list(there) or any(bands not in (None, there[name]) for name, bands in named.items()):
            raise Stop(f"{existing} has the sensors {there}, and --modalities asks for others: {named}.")
    if args.model_name_or_path:
        return MapexForPreTraining.from_pretrained(args.model_name_or_path, dtype=torch.float32, **overrides)
    if args.config_name:
        return MapexForPreTraining(MapexConfig.from_pretrained(args.config_name, **overrides))
    return MapexForPreTraining(MapexConfig.from_preset(args.preset, modalities=args.modalities, **overrides))


def usable_modalities(source: str, split: str, config: MapexConfig) -> tuple[list[str], list[str]]:
    """Modalities of a source that the model can be trained on, and why others are not."""
    usable, refused = [], []
    for name, layer in read_schema(source, split).modalities.items():
        if name not in config.modalities:
            refused.append(f"{name} (not a modality of the model)")
            continue
        missing = [band for band in config.modalities[name]["bands"] if band not in layer["bands"]]
        if missing:
            refused.append(f"{name} (lacks {' '.join(missing)})")
        else:
            usable.append(name)
    return usable, refused


def is_of_split(place: str, wanted: str, held_out: float, seed: int) -> bool:
    """Whether a place belongs to the `"train"` or `"held_out"` side."""
    return split_of_place(place, {"train": 1.0 - held_out, "held_out": held_out}, seed) == wanted


def open_streams(
    args: DataArguments, modalities: dict[str, list[str]], accelerator: Accelerator, seed: int
) -> dict[str, ShardStream]:
    """A shuffled stream of the training side of each source, this process's share."""
    places = None
    if args.validation_split is None and args.held_out > 0:
        places = partial(is_of_split, wanted="train", held_out=args.held_out, seed=args.split_seed)
    return {
        source: stream_shards(
            source,
            args.train_split,
            modalities=modalities[source],
            labels=[],
            places=places,
            seed=seed,
            window=args.shuffle_window,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        for source in args.sources
    }


def held_out_samples(args: DataArguments, modalities: dict[str, list[str]]) -> dict[str, list[dict[str, Any]]]:
    """Up to `evaluation_samples` of each source that no step trains on."""
    places, split = None, args.validation_split
    if split is None:
        if args.held_out <= 0:
            return {}
        places, split = (
            partial(is_of_split, wanted="held_out", held_out=args.held_out, seed=args.split_seed),
            args.train_split,
        )
    samples = {}
    for source in args.sources:
        try:
            stream = stream_shards(source, split, modalities=modalities[source], labels=[], places=places)
        except (OSError, ValueError) as error:
            raise Stop(f"Nothing to evaluate on: {error}") from error
        samples[source] = [sample for _, sample in zip(range(args.evaluation_samples), stream)]
    return samples


def to_batches(samples: list[dict[str, Any]], collator: MapexCollator, size: int) -> list[dict[str, Any]]:
    try:
        return [collator(samples[start : start + size]) for start in range(0, len(samples), size)]
    except ValueError as error:  # of the samples, which are the user's
        raise Stop(f"Cannot use the held-out data: {error}") from error


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only: not for biases, norms, embeddings, the mask token and what shifts the router."""
    kept = set(get_parameter_names(model, [nn.LayerNorm, nn.Embedding], [r"bias", r"mask_token", r"modality_shift"]))
    named = list(model.named_parameters())
    return [
        {"params": [parameter for name, parameter in named if name in kept], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name not in kept], "weight_decay": 0.0},
    ]


def step_flops(sums: PretrainingSums, model: MapexForPreTraining) -> float:
    """Floating point operations of the steps that `sums` are of, all processes together: 6 for each active parameter
    and token, forward and backward. An estimate: attention scores and recomputed activations are not counted.
    """
    config = model.config
    expert = 2 * config.hidden_size * config.intermediate_size
    block = 4 * config.hidden_size**2
    active = config.num_hidden_layers * (block + expert)
    for held in config.num_layer_experts:
        active += (min(config.num_experts_per_tok, held) - 1) * expert
    active += len(config.moe_layers) * config.num_shared_experts * expert
    width = config.decoder_hidden_size
    decoder = config.decoder_num_hidden_layers * (4 * width**2 + 2 * width * config.decoder_intermediate_size)
    total = sums.tokens.sum().item() * (active + config.hidden_size * width)
    for name, tokens, values in zip(config.modalities, sums.tokens.tolist(), sums.values.tolist()):
        spec = config.modalities[name]
        patch = len(spec["bands"]) * spec["patch_size"] ** 2
        total += (tokens + values / patch) * (decoder + patch * (width + config.hidden_size))
    return 6.0 * total


class Checkpoints:
    """Checkpoints of a run: written whole or not at all, the last few kept."""

    def __init__(self, output_dir: Path, accelerator: Accelerator, model: nn.Module, args: PretrainingArguments):
        self.folder = output_dir / "checkpoints"
        self.accelerator = accelerator
        self.model = model
        self.keep = args.keep_checkpoints

    def all(self) -> list[Path]:
        """Complete ones, the oldest first."""
        found = [path for path in self.folder.glob("step-*") if (path / "run.json").is_file()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def save(self, step: int, loader: StatefulDataLoader, description: dict[str, Any]) -> None:
        """Write what the run needs to go on from `step`; not of weights that are no longer finite."""
        accelerator = self.accelerator
        parameters = list(self.model.parameters())
        mine = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in parameters]
        finite = torch.stack([torch.isfinite(part).all() for part in mine]).all()
        if not accelerator.gather(finite[None]).all():  # all processes end together
            raise Stop(f"The weights are no longer finite after step {step}. {self.advise()}")
        unfinished = self.folder / "unfinished"
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        torch.save(loader.state_dict(), unfinished / f"stream_{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (unfinished / "run.json").write_text(json.dumps({"step": step, **description}, indent=1))
            final = self.folder / f"step-{step}"
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            for old in self.all()[: -self.keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def tell_last(self) -> str:
        return f"The last checkpoint is {(self.all() or ['none'])[-1]}."

    def advise(self) -> str:
        """For a run that has diverged."""
        return (
            f"Nothing was saved since. {self.tell_last()} Lower --base_learning_rate, look for bad values in the data, "
            "or train without mixed precision."
        )

    def load(self, loader: StatefulDataLoader, mixture: MixedShardStream, description: dict[str, Any]) -> int:
        """Go on from the last checkpoint; its step, or 0 if there is none."""
        if not (found := self.all()):
            return 0
        last, accelerator = found[-1], self.accelerator
        run = json.loads((last / "run.json").read_text())
        changed = [
            f"{name}: {run[name]} -> {value}"
            for name, value in description.items()
            if name in run and run[name] != value and name not in ("processes", "workers")
        ]
        if changed:
            raise Stop(
                f"{last} is of a run with other settings ({'; '.join(changed)}). Go on with those, or begin anew with "
                "--from_scratch or another --output_dir."
            )
        accelerator.load_state(str(last))
        position = last / f"stream_{accelerator.process_index}.pt"
        readers = [
            f"{run[name]} {name}, now {description[name]}"
            for name in ("processes", "workers")
            if run.get(name, description[name]) != description[name]
        ]
        if readers:
            # The samples fall to others now: positions mean nothing, each source begins another epoch.
            mixture.begin_epoch(run["step"])
            accelerator.print(
                f"The run had {', '.join(readers)}: weights, optimiser and schedule go on exactly; every source begins "
                "a new epoch."
            )
        else:
            loader.load_state_dict(torch.load(position, weights_only=True))
        return run["step"]


def evaluate(
    model: MapexForPreTraining, batches: list[tuple[int, dict[str, Any]]], accelerator: Accelerator
) -> PretrainingSums | None:
    """Sums over numbered batches, each with the same masks at every call; `None` without batches."""
    model.eval()
    total = None
    with torch.no_grad():
        for index, batch in batches:
            generator = torch.Generator(accelerator.device).manual_seed(index)
            with accelerator.autocast():
                outputs = model(**send_to_device(batch, accelerator.device), generator=generator)
            total = outputs.sums if total is None else total + outputs.sums
    model.train()
    return total


def metrics_of(sums: PretrainingSums, config: MapexConfig, prefix: str, scale: float = 1.0) -> dict[str, float]:
    """Every loss by name, the error of each modality, and the routing."""
    values = {name: value.item() for name, value in pretraining_losses(sums, config, scale).items()}
    values |= {
        f"reconstruction/{name}": error
        for name, error, count in zip(config.modalities, sums.reconstruction_errors().tolist(), sums.values.tolist())
        if count > 0
    }
    values |= routing_metrics(sums, config)
    return {f"{prefix}/{name}": value for name, value in values.items()}


def routing_picture(sums: PretrainingSums, config: MapexConfig, step: int, folder: Path, accelerator: Accelerator):
    """Draw which modality goes to which expert, to a file and to the trackers that show pictures."""
    from modeling_mapex.visualization_mapex import plot_routing

    present = (sums.tokens > 0).tolist()
    layers = [layer for layer, ids in zip(config.moe_layers, config.expert_ids) if len(ids) > 1]
    statistics = {
        name: {"usage": [dispatched[index].tolist() for _, dispatched, _ in sums.routing_means()]}
        for index, name in enumerate(config.modalities)
        if present[index]
    }
    figure = plot_routing(statistics, layers, title=f"Step {step}: share of each modality's tokens, held-out data")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"step-{step:07d}.png", dpi=100)
    import numpy as np
    from PIL import Image

    picture = np.asarray(Image.open(folder / f"step-{step:07d}.png").convert("RGB"))
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"routing": picture[None]}, step=step, **options)


class Log:
    """Metrics to the trackers and to `log.jsonl`, whose lines after the step that is resumed from are cut off."""

    def __init__(self, file: Path, accelerator: Accelerator, resumed_from: int):
        self.file, self.accelerator = file, accelerator
        if accelerator.is_main_process and file.is_file():
            lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
            lines = [line for line in lines if json.loads(line)["step"] <= resumed_from]
            file.write_text("".join(f"{line}\n" for line in lines))

    def __call__(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


@contextmanager
def interruptible(accelerator: Accelerator) -> Iterator[list[bool]]:
    """In a run of one process, Ctrl-C and SIGTERM set the flag that is given, so that the step can end and be saved.
    Several processes would stop at different steps: they end at once, and the last checkpoint is gone on from.
    """
    flag: list[bool] = []
    if accelerator.num_processes > 1:
        yield flag
        return
    handlers = {
        number: signal.signal(number, lambda *_: flag.append(True)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield flag
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(args: PretrainingArguments) -> Accelerator:
    """The processes, devices and trackers of the run."""
    report_to = args.report_to
    if report_to is None:
        report_to = ["tensorboard"] if find_spec("tensorboard") else []
    check_trackers(report_to, [str(tracker) for tracker in get_available_trackers()])
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        return Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=[name for name in report_to if name != "none"] or None,
            project_dir=args.output_dir,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.process_timeout))],
        )
    except (OSError, ValueError, ImportError) as error:
        raise Stop(f"{error}") from error


def choose_modalities(args: DataArguments, config: MapexConfig, accelerator: Accelerator) -> dict[str, list[str]]:
    """What to read of each source; printed, with what is left out and why."""
    if not args.sources:
        raise Stop("Nothing to train on: give --sources, folders of shards or repositories on the Hub.")
    try:
        found = {source: usable_modalities(source, args.train_split, config) for source in args.sources}
    except (OSError, ValueError) as error:
        raise Stop(f"{error}") from error
    for source, (usable, refused) in found.items():
        left_out = f"; left out: {', '.join(refused)}" if refused else ""
        accelerator.print(f"{source}: {', '.join(usable) or 'nothing'}{left_out}")
    if useless := [source for source, (usable, _) in found.items() if not usable]:
        raise Stop(f"{useless} hold nothing that the model has ({list(config.modalities)}): leave them out.")
    if missing := [name for name in config.modalities if not any(name in usable for usable, _ in found.values())]:
        raise Stop(
            f"No source has {missing}: add one, train without with --modalities, or say in a settings file for which "
            "bands, like `modalities: {s1: null, s2: [B02, B03, B04]}`."
        )
    return {source: usable for source, (usable, _) in found.items()}


def mix_streams(
    args: DataArguments, modalities: dict[str, list[str]], accelerator: Accelerator, seed: int
) -> MixedShardStream:
    """The training side of all sources, this process's share."""
    weights = args.weights or [1.0] * len(args.sources)
    if len(weights) != len(args.sources):
        raise Stop(f"{len(args.sources)} --sources but {len(weights)} --weights: give one for each.")
    streams = open_streams(args, modalities, accelerator, seed)
    most = max(stream.num_shards for stream in streams.values())
    if args.num_workers > most:
        raise Stop(f"{args.num_workers} workers for {most} shards a process: set --num_workers to {most} or less.")
    own_seed = seed * accelerator.num_processes + accelerator.process_index
    try:
        return MixedShardStream(streams, dict(zip(args.sources, weights)), seed=own_seed)
    except ValueError as error:
        raise Stop(f"{error}") from error


def list_held_out(samples: dict[str, list[dict[str, Any]]], config: MapexConfig, file: Path) -> None:
    """Write which places are held out, and say which modalities they lack."""
    places = {source: sorted({sample["place"] for sample in part}) for source, part in samples.items()}
    file.write_text(json.dumps(places, indent=1))
    images = [sample["images"] for part in samples.values() for sample in part]
    unseen = [name for name in config.modalities if all(image.get(name) is None for image in images)]
    if unseen:
        print(f"No held-out sample has {unseen}: they are not evaluated, and cannot be pruned for.")


class Window:
    """What happened since the last log: sums for the losses, samples, and time, without that of `pause`."""

    def __init__(self):
        self.sums: PretrainingSums | None = None
        self.samples = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    def add(self, sums: PretrainingSums) -> None:
        self.sums = sums if self.sums is None else self.sums + sums

    @contextmanager
    def wait(self) -> Iterator[None]:
        """For data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """For what is no training."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def throughput(self, model: MapexForPreTraining, share: int, devices: int, peak: float | None) -> dict[str, float]:
        """Rates of all processes together, `share` times what the sums hold, and the utilisation of a device."""
        elapsed = time.perf_counter() - self.started
        values = {
            "throughput/samples_per_second": self.samples / elapsed,
            "throughput/tokens_per_second": share * self.sums.tokens.sum().item() / elapsed,
            "throughput/waiting_for_data": self.waited / elapsed,
        }
        if peak:
            values["throughput/mfu"] = share * step_flops(self.sums, model) / elapsed / devices / (peak * 1e12)
        return values


def main(model_args: ModelArguments, data_args: DataArguments, args: PretrainingArguments) -> None:
    if args.keep_checkpoints < 1:
        raise Stop(f"--keep_checkpoints must be at least 1, to go on from; got {args.keep_checkpoints}.")
    accelerator = start(args)
    output_dir = Path(args.output_dir)
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    set_seed(args.seed)
    try:
        plain_model = model = build_model(model_args)
    except (ValueError, OSError, StrictDataclassError) as error:
        raise Stop(f"{error}") from error
    config = model.config

    # Data: a stream to train on, and batches in memory to evaluate on.
    modalities = choose_modalities(data_args, config, accelerator)
    mixture = mix_streams(data_args, modalities, accelerator, args.seed)
    # Groups of different shapes would make the processes of a sharded model disagree on how often to gather it, and a
    # compiled one compile again and again: these fill up to one shape.
    collate = partial(
        MapexCollator,
        MapexImageProcessor.from_config(config),
        crop_size=data_args.crop_size,
        group=not (is_sharded or args.torch_compile),
        seed=args.seed,
    )
    loader = StatefulDataLoader(
        mixture,
        batch_size=args.per_device_batch_size,
        collate_fn=collate(flip=True, band_dropout=data_args.band_dropout),
        num_workers=data_args.num_workers,
        worker_init_fn=ignore_interrupts,
        pin_memory=accelerator.device.type == "cuda",
        drop_last=True,
    )
    held_out = held_out_samples(data_args, modalities)
    if accelerator.is_main_process:
        list_held_out(held_out, config, output_dir / "held_out.json")
    samples = [sample for part in held_out.values() for sample in part]
    batches = to_batches(samples, collate(), args.per_device_batch_size)
    # A sharded model is evaluated by all processes together, on the same batches; otherwise each takes its share.
    numbered = list(enumerate(batches))
    mine = numbered if is_sharded else numbered[accelerator.process_index :: accelerator.num_processes]

    # Model, optimiser, schedule.
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    samples_per_step = args.per_device_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay),
        lr=args.base_learning_rate * samples_per_step / 256,
        betas=(args.adam_beta1, args.adam_beta2),
    )
    scheduler = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=args.warmup_steps,
        num_training_steps=args.max_steps,
        scheduler_specific_kwargs={"min_lr_rate": args.minimum_learning_rate},
    )
    if args.torch_compile:
        model = torch.compile(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    all_processes = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
    process_group = None if args.local_losses else all_processes

    # Where an earlier session ended.
    if args.from_scratch and accelerator.is_main_process:
        shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
        (output_dir / "log.jsonl").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    checkpoints = Checkpoints(output_dir, accelerator, model, args)
    settings = {**asdict(model_args), **asdict(data_args), **asdict(args)}
    description = {
        **{name: value for name, value in settings.items() if name not in FREE_SETTINGS},
        "processes": accelerator.num_processes,
        "workers": data_args.num_workers,
        "modalities": list(config.modalities),
        "bands": {name: spec["bands"] for name, spec in config.modalities.items()},
        "config_overrides": read_overrides(model_args.config_overrides, MapexConfig),
    }
    step = checkpoints.load(loader, mixture, description)
    if step:
        accelerator.print(f"Going on from step {step}.")
    log = Log(output_dir / "log.jsonl", accelerator, step)
    accelerator.init_trackers("logs", config=_flat(settings))

    def draw(part: int) -> torch.Generator:
        """Of masks, pools and noise: of its own for each step, part of a step and process, hence the same on resume."""
        position = (args.seed * args.max_steps + step) * args.gradient_accumulation_steps + part
        position = position * accelerator.num_processes + accelerator.process_index
        return torch.Generator(accelerator.device).manual_seed(position)

    def evaluate_now() -> None:
        sums = evaluate(model if is_sharded else plain_model, mine, accelerator)
        if all_processes is not None and not is_sharded:
            empty = PretrainingSums.zeros(config, accelerator.device)  # of a process that has no batch
            sums = (empty if sums is None else sums).all_reduce(all_processes)
        log(metrics_of(sums, config, "evaluation"), step)
        if accelerator.is_main_process and sums.router and find_spec("matplotlib"):
            routing_picture(sums, config, step, output_dir / "routing", accelerator)

    model.train()
    last_step = min(args.max_steps, args.stop_after or args.max_steps)
    ending = step >= last_step
    data, window = iter(loader), Window()
    progress = tqdm(
        initial=step, total=args.max_steps, desc="Pretraining", unit="step", disable=not accelerator.is_main_process
    )
    with interruptible(accelerator) as interrupted:
        while not ending:
            scale = min(1.0, (step + 1) / max(args.mutual_information_warmup_steps, 1))
            for part in range(args.gradient_accumulation_steps):
                with window.wait():
                    try:
                        batch = next(data)
                    except (OSError, ValueError) as error:
                        raise Stop(f"Cannot read the data: {error}\n{checkpoints.tell_last()}") from error
                    batch = send_to_device(batch, accelerator.device, non_blocking=True)
                with accelerator.accumulate(model):
                    outputs = model(
                        **batch, generator=draw(part), mutual_information_scale=scale, process_group=process_group
                    )
                    accelerator.backward(outputs.loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                window.add(outputs.sums.detach())
            scheduler.step()
            step += 1
            window.samples += samples_per_step
            progress.update()

            ending = step == last_step or bool(interrupted)
            if step % args.logging_steps == 0 or ending:
                values = metrics_of(window.sums, config, "training", scale)
                if not math.isfinite(values["training/loss"]):
                    raise Stop(f"The loss is {values['training/loss']} before step {step}. {checkpoints.advise()}")
                share = accelerator.num_processes if process_group is None else 1  # sums are of all processes already
                values |= window.throughput(plain_model, share, accelerator.num_processes, args.peak_tflops)
                values["training/learning_rate"] = scheduler.get_last_lr()[0]
                log(values, step)
                shown = {
                    "loss": f"{values['training/loss']:.3f}",
                    "reconstruction": f"{values['training/reconstruction_loss']:.3f}",
                    "samples_s": f"{values['throughput/samples_per_second']:.0f}",
                }
                if (information := values.get("training/normalized_mutual_information")) is not None:
                    shown["information"] = f"{information:.2f}"
                progress.set_postfix(shown)
                window = Window()
            with window.pause():
                if batches and (step % args.evaluation_steps == 0 or step == args.max_steps):
                    evaluate_now()
                if step % args.checkpoint_steps == 0 or ending:
                    checkpoints.save(step, loader, description)
    progress.close()

    if step < args.max_steps:
        again = "Run the same command again" + (", without --from_scratch," if args.from_scratch else "")
        accelerator.print(f"Stopped at step {step}. {again} to go on.")
    else:
        state_dict = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            finish(config, state_dict, batches, log, args, output_dir, accelerator.device)
        accelerator.wait_for_everyone()
    accelerator.end_training()


def finish(
    config: MapexConfig,
    state_dict: dict[str, torch.Tensor],
    batches: list[dict[str, Any]],
    log: Log,
    args: PretrainingArguments,
    output_dir: Path,
    device: torch.device,
) -> None:
    """Calibrate the experts on held-out data, save the model by modality with its card, and push it."""
    model = MapexForPreTraining(config)
    model.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()})
    model.to(device)
    if batches:
        model.calibrate_experts(part for batch in batches for part in batch.get("groups", [batch]))
        lines = [json.loads(line) for line in log.file.read_text().splitlines()]
        evaluated = [line for line in lines if "evaluation/loss" in line] or [{}]  # none if only calibrated
        model.training_record = {
            "metrics": {
                name.removeprefix("evaluation/"): value
                for name, value in evaluated[-1].items()
                if name.startswith(("evaluation/reconstruction", "evaluation/normalized")) and "layer" not in name
            },
            "hyperparameters": {
                "steps": args.max_steps,
                "batch_size": args.per_device_batch_size * args.gradient_accumulation_steps,
                "base_learning_rate": args.base_learning_rate,
                "weight_decay": args.weight_decay,
                "seed": args.seed,
            },
        }
    folder = output_dir / "model"
    calibrated = model.config.expert_statistics is not None
    model.save_pretrained(folder, shard_by_modality=calibrated)
    print(f"The model is in {folder}." + ("" if calibrated else " It is not calibrated: there is no held-out data."))
    if args.push_to_hub:
        model.push_to_hub(args.push_to_hub, shard_by_modality=calibrated)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """What trackers take as hyperparameters: numbers and strings."""
    return {
        name: value if isinstance(value, (int, float, str)) else json.dumps(value) for name, value in values.items()
    }


if __name__ == "__main__":
    main(*parse_arguments((ModelArguments, DataArguments, PretrainingArguments), __doc__))
