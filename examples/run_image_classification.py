r"""Fine-tune MAPEX to classify chips: one label each, or several.

    pip install -e ".[data,train,evaluate,viz]"
    # pruned for the sensor while loading, everything trained
    python examples/run_image_classification.py --shards shards/eurosat_rgb --label label --modalities rgb \
        --output_dir outputs/eurosat
    # the encoder frozen, only a linear head trained; 10 samples of each class
    python examples/run_image_classification.py --shards shards/eurosat_rgb --modalities rgb --method frozen \
        --shots 10 --output_dir outputs/eurosat-frozen
    # low-rank adapters in attention and experts (pip install peft), one expert a layer, merged and pushed
    python examples/run_image_classification.py --shards shards/eurosat_rgb --modalities rgb --experts_per_layer 1 \
        --method lora --output_dir outputs/eurosat-lora --push_to_hub me/mapex-nano-eurosat
    # another product and fewer bands; options in a file, those that follow win
    python examples/run_image_classification.py settings.yaml --rename s2_l1c=s2 --bands s2=B04,B03,B02

The label is of kind `class` or `multi_label`; samples without it are left out. The head begins as a logistic regression
on what the encoder says of the samples as they are (`--head`), and all is trained from there. Of the places
`--validation` are kept to choose the best model and to stop early, and `--test` to test it: no place is on two sides.
`--best_metric` is accuracy, or mean average precision for several labels. The same command goes on from the last
checkpoint; at the end there are `results.json`, with 95 % intervals over resampled test places, `confusion.png`, and
the model with its card in `model`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from command_line import Stop, parse_arguments
from finetuning import Finetuning, Run
from finetuning_data import Data, draw_samples, read_data
from finetuning_model import build_model
from finetuning_options import DataArguments, FinetuningArguments, ModelArguments
from finetuning_results import Scores, can_draw, choose_class_weights, confusion_picture, warn_of_absent
from probes import average_precision
from transformers import set_seed

from modeling_mapex import MapexForImageClassification


@dataclass
class ClassificationArguments:
    """How to classify."""

    shots: int | None = field(default=None, metadata={"help": "Train on so many samples of each class, by --seed."})
    class_weights: list[str] | None = field(
        default=None, metadata={"help": "balanced, or a number for each class: weights in the loss, for one label."}
    )
    pooling: Literal["mean", "modality_mean", "mean_std"] | None = field(
        default=None, metadata={"help": "How tokens become one feature. Default: what the checkpoint says."}
    )
    head: Literal["probe", "random"] | None = field(
        default=None,
        metadata={
            "help": "What the head begins as: a logistic regression on the features of the encoder, or random weights. "
            "Default: probe, random for --convnet."
        },
    )


class SingleLabelScores(Scores):
    """Accuracy, and the F1 of each class averaged over those that occur."""

    best, names = "accuracy", ("accuracy", "macro_f1")

    def __init__(self, num_labels: int):
        super().__init__()
        self.num_labels = num_labels

    def rows(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.stack([labels, predictions.argmax(dim=-1)], dim=1)

    def confusion(self, table: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """`(true, predicted)`"""
        index = (table[:, 0] * self.num_labels + table[:, 1]).astype(np.int64)
        return np.bincount(index, weights, self.num_labels**2).reshape(self.num_labels, self.num_labels)

    def metrics(self, table: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        confusion = self.confusion(table, weights)
        there = confusion.sum(axis=1) > 0
        return {
            "accuracy": float(np.trace(confusion) / confusion.sum()),
            "macro_f1": float(f1_of(confusion)[there].mean()),
        }

    def per_class(self, table: np.ndarray) -> np.ndarray:
        return self.confusion(table, np.ones(len(table)))


class MultiLabelScores(Scores):
    """Mean average precision over classes that occur, and F1 at a probability of one half."""

    best, names = "mean_average_precision", ("mean_average_precision", "macro_f1", "micro_f1")

    def __init__(self, num_labels: int):
        super().__init__()
        self.num_labels = num_labels

    def rows(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.cat([predictions, labels], dim=1)

    def split(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits and targets."""
        return table[:, : self.num_labels], table[:, self.num_labels :]

    def metrics(self, table: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        logits, targets = self.split(table)
        occurs = weights @ targets > 0
        if not occurs.any():
            return {}
        precision = [
            average_precision(*pair, weights[None]).item() for pair in zip(targets.T[occurs], logits.T[occurs])
        ]
        right, predicted, true = label_counts(logits, targets, weights)
        return {
            "mean_average_precision": float(np.mean(precision)),
            "macro_f1": float((2 * right / np.maximum(predicted + true, 1e-12))[occurs].mean()),
            "micro_f1": float(2 * right.sum() / (predicted + true).sum()),
        }


def f1_of(confusion: np.ndarray) -> np.ndarray:
    """Of each class; 0 for one that neither occurs nor is predicted."""
    return 2 * np.diag(confusion) / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1), 1e-12)


def label_counts(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rightly predicted, predicted and true samples of each class."""
    predicted = logits > 0
    return weights @ (predicted * targets), weights @ predicted, weights @ targets


def count_labels(data: Data) -> dict[str, np.ndarray]:
    """Samples of each class on each side."""
    names, counts = data.spec["names"], {}
    for side, chips in data.sides.items():
        values = list(chips.labels())
        if data.spec["kind"] == "class":
            labels = np.array(values)
            if strange := sorted({int(label) for label in labels if not 0 <= label < len(names)}):
                raise Stop(
                    f"`{data.label}` holds {strange[:10]}, but the shards name {len(names)} classes (0 .. "
                    f"{len(names) - 1}). Convert the data again with all of its classes."
                )
            counts[side] = np.bincount(labels, minlength=len(names))
        else:
            if any(len(value) != len(names) or not set(value) <= {0, 1} for value in values):
                raise Stop(f"`{data.label}` must be 0 or 1 for each of {len(names)} classes. Convert the data again.")
            counts[side] = np.array(values).sum(axis=0)
            if not counts[side].any():
                raise Stop(f"No sample of the {side} side has any of the classes. Choose another --split_seed.")
    return counts


def describe(data: Data, scores: Scores, table: np.ndarray) -> dict[str, dict[str, float | None]]:
    """What the test says of each class; `None` where it has no sample."""
    ones = np.ones(len(table))
    if isinstance(scores, SingleLabelScores):
        confusion = scores.confusion(table, ones)
        right, predicted, true = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
        extra = {}
    else:
        logits, targets = scores.split(table)
        right, predicted, true = label_counts(logits, targets, ones)
        extra = {
            "average_precision": [
                average_precision(*pair, ones[None]).item() if pair[0].any() else None
                for pair in zip(targets.T, logits.T)
            ]
        }
    columns = {
        **extra,
        "f1": [float(2 * r / (p + t)) if t else None for r, p, t in zip(right, predicted, true)],
        "precision": [float(r / p) if p else None for r, p in zip(right, predicted)],
        "recall": [float(r / t) if t else None for r, t in zip(right, true)],
        "samples": [int(t) for t in true],
    }
    return {name: dict(zip(columns, row)) for name, row in zip(data.spec["names"], zip(*columns.values()))}


def main(
    model_args: ModelArguments,
    data_args: DataArguments,
    task_args: ClassificationArguments,
    args: FinetuningArguments,
) -> dict[str, float]:
    """Returns the test metrics; everything else is in `results.json`."""
    run = Run(args, model_args, data_args, task_args)
    if results := run.finished():
        return results["metrics"]
    set_seed(args.seed)

    # Data.
    data = read_data(model_args, data_args, ("class", "multi_label"), args.seed)
    names, is_single = data.spec["names"], data.spec["kind"] == "class"
    counts = count_labels(data)
    if task_args.shots is not None:
        if not is_single:
            raise Stop("--shots counts samples of a class, but these have several: use --train_samples.")
        groups = np.array(list(data.sides["train"].labels()))
        data.sides["train"] = draw_samples(data.sides["train"], task_args.shots, args.seed, groups)
        counts = count_labels(data)
        print(f"train: {len(data.sides['train'])} samples, up to {task_args.shots} of each class")
    warn_of_absent(counts, names)
    if task_args.class_weights is not None and not is_single:
        raise Stop("--class_weights are for one label; these samples have several.")
    class_weights = choose_class_weights(task_args.class_weights, counts["train"], names)

    if task_args.head == "probe" and model_args.convnet:
        raise Stop("--head probe is for the features of MAPEX: leave it out with --convnet.")

    # Model.
    fields: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "single_label_classification" if is_single else "multi_label_classification",
        "class_weights": class_weights,
    }
    if task_args.pooling is not None:
        fields["pooling_type"] = task_args.pooling
    model = build_model(MapexForImageClassification, model_args, data.modalities, **fields)
    scores = SingleLabelScores(len(names)) if is_single else MultiLabelScores(len(names))

    # Training, test, results.
    probe = task_args.head == "probe" or (task_args.head is None and not model_args.convnet)
    tuning = Finetuning(run, data, scores, model, model_args, data_args, {"label": data.label}, probe=probe)
    tuning.train()
    results = tuning.finish(lambda table: describe(data, scores, table))
    if is_single:
        confusion = scores.confusion(scores.table, np.ones(len(scores.table)))
        results["confusion"] = confusion.astype(int).tolist()
        if can_draw():
            confusion_picture(confusion, names).savefig(run.folder / "confusion.png", dpi=120)
    return tuning.close(results)


if __name__ == "__main__":
    kinds = (ModelArguments, DataArguments, ClassificationArguments, FinetuningArguments)
    main(*parse_arguments(kinds, __doc__))
