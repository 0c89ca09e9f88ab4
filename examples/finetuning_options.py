"""Options of the fine-tuning scripts, from the command line or a file."""

from dataclasses import dataclass, field
from typing import Any, Literal

from command_line import Stop


@dataclass
class ModelArguments:
    """What to fine-tune, and how much of it."""

    model: str = field(
        default="examples/checkpoints/mapex-nano", metadata={"help": "Folder or repository of a MAPEX checkpoint."}
    )
    modalities: list[str] | None = field(
        default=None,
        metadata={"help": "Sensors to use, for which the model is pruned while loading. Default: all that both have."},
    )
    bands: list[str] | None = field(
        default=None, metadata={"help": "Bands to use of a sensor: s2=B04,B03,B02. Default: all of the model's."}
    )
    add: list[str] | None = field(
        default=None,
        metadata={"help": "Give the model a sensor that it lacks, as a copy of one that it has: s1_descending=s1."},
    )
    keep_all: bool = field(default=False, metadata={"help": "Do not prune: load the whole model."})
    coverage: float | None = field(
        default=None, metadata={"help": "Share of each sensor's mass that the kept experts cover. Default: 0.95."}
    )
    experts_per_layer: list[int] | None = field(
        default=None, metadata={"help": "Keep exactly so many: one number, or one for each mixture. Not --coverage."}
    )
    criterion: str | None = field(
        default=None, metadata={"help": "Mass of an expert: saliency (default), usage, gate, exhaustive or random."}
    )
    pruning_seed: int | None = field(default=None, metadata={"help": "Of --criterion random."})
    from_scratch: bool = field(
        default=False, metadata={"help": "Random weights in the architecture that the checkpoint would give."}
    )
    convnet: bool = field(
        default=False,
        metadata={"help": "Instead, to compare with, a convolutional network of similar size with random weights."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Fields of MapexConfig as JSON (a mapping in a file): '{\"hidden_dropout_prob\": 0.1}'."},
    )
    method: Literal["full", "frozen", "lora"] = field(
        default="full",
        metadata={
            "help": "Train everything, only the head, or the head and low-rank adapters (peft). With --add, always the "
            "patch embedding of the new sensor, too."
        },
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Rank of the adapters, for each expert too. Default: 8."}
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Adapters are scaled by this over their rank. Default: twice the rank."}
    )


@dataclass
class ShardArguments:
    """Labelled shards and their sides."""

    shards: str | None = field(default=None, metadata={"help": "A folder of shards or a data set on the Hub."})
    label: str | None = field(default=None, metadata={"help": "Label of the shards. Default: the only one that fits."})
    rename: list[str] | None = field(
        default=None, metadata={"help": "Read a sensor of the shards as one of the model: s2_l1c=s2."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of the shards to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split of the shards to validate on, instead of --validation."}
    )
    test_split: str | None = field(default=None, metadata={"help": "Split of the shards to test on, not --test."})
    validation: float | None = field(
        default=None,
        metadata={"help": "Share of the places of --train_split to choose the best model on. Default: 0.15."},
    )
    test: float | None = field(
        default=None, metadata={"help": "Share of the places of --train_split to test on. Default: 0.15."}
    )
    split_seed: int = field(default=0, metadata={"help": "Chooses the places."})


@dataclass
class DataArguments(ShardArguments):
    """What to train and evaluate on."""

    train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many samples, drawn by --seed; larger draws hold smaller ones."}
    )
    crop_size: int | None = field(
        default=None, metadata={"help": "Train on crops of this side, in pixels of the finest layer. Default: whole."}
    )
    flip: bool = field(default=True, metadata={"help": "Mirror and turn samples in training."})
    modality_dropout: float = field(
        default=0.0, metadata={"help": "Probability of leaving out a sensor of a sample in training, never all."}
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that read and augment."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where datasets keeps its copy of the shards."})


@dataclass
class FinetuningArguments:
    """How to train."""

    output_dir: str = field(default="outputs/finetuning", metadata={"help": "Checkpoints, results and the model."})
    epochs: float = field(default=30.0, metadata={"help": "Times to go through the training samples."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimisation steps, instead of --epochs."})
    batch_size: int = field(default=16, metadata={"help": "Samples of a forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes for each step."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Of the head. Default: 1e-3 for full, 5e-3 for frozen, 3e-3 for lora."}
    )
    layer_decay: float | None = field(
        default=None,
        metadata={
            "help": "Each block's rate is this times that of the next, embeddings have the lowest; not for adapters. "
            "Default: 0.75, from scratch 1."
        },
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Of matrices; biases, norms, embeddings have none."})
    warmup: float = field(default=0.05, metadata={"help": "Share of the steps in which the rate rises."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0: not."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bf16 by autocast."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Save memory, compute activations twice."})
    eval_steps: int | None = field(
        default=None, metadata={"help": "Steps from evaluation and checkpoint to the next. Default: an epoch."}
    )
    patience: int = field(
        default=10, metadata={"help": "Stop when so many evaluations in a row are no better; 0: never."}
    )
    best_metric: str | None = field(
        default=None, metadata={"help": "Metric that chooses the best model. Default: see above."}
    )
    bootstrap: int = field(default=1000, metadata={"help": "Resampled sets of test places, for the intervals."})
    seed: int = field(default=0, metadata={"help": "Of new weights, order, augmentation and --train_samples."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the run in output_dir; do not go on with it."})
    stop_after: int | None = field(default=None, metadata={"help": "End this session at a step, as if interrupted."})
    report_to: list[str] | None = field(default=None, metadata={"help": "Trackers, like tensorboard. Default: none."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository to push the model to at the end."})


def assignments(option: str, values: list[str] | dict[str, Any] | None) -> dict[str, Any]:
    """`["a=b", ...]` from the command line, or a mapping from a file, as a mapping."""
    if values is None or isinstance(values, dict):
        return dict(values or {})
    pairs = [str(value).split("=") for value in ([values] if isinstance(values, str) else values)]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise Stop(f"{option} takes name=value, got {values}.")
    return dict(pairs)
