r"""Fine-tune MAPEX to give each pixel a class.

    # optical and terrain, pruned for both while loading, everything trained, on crops
    python examples/run_semantic_segmentation.py --shards shards/water_hls_dem_lulc --label water --modalities hls dem \
        --crop_size 64 --output_dir outputs/water
    # the encoder frozen: only the decoder is trained
    python examples/run_semantic_segmentation.py --shards shards/water_hls_dem_lulc --modalities hls --method frozen \
        --output_dir outputs/water-frozen
    # low-rank adapters in attention and experts (pip install peft), merged and pushed at the end
    python examples/run_semantic_segmentation.py --shards shards/water_hls_dem_lulc --modalities hls --method lora \
        --output_dir outputs/water-lora --push_to_hub me/mapex-nano-water
    # classes of your own; options in a file, those that follow win
    python examples/run_semantic_segmentation.py settings.yaml --classes classes.yaml --class_weights balanced

The label is of kind `mask`; samples without it are left out. Its classes are those that the shards name, or those of
`--classes`, a mapping from names to the codes that are stored:

    water: [511, 512, 523]
    forest: [311, 312, 313]
    other: rest     # all other codes
    ignore: [0]     # pixels that do not count

Of the places `--validation` are kept to choose the best model and to stop early, and `--test` to test it: no place is
on two sides. `--best_metric` is the mean over classes that occur of intersection over union. The same command goes on
from the last checkpoint; at the end there are `results.json`, with 95 % intervals over resampled test places,
`confusion.png`, `predictions.png`, and the model with its card in `model`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from command_line import Stop, parse_arguments, read_mapping
from finetuning import Finetuning, Run
from finetuning_data import Data, read_data, window_metres
from finetuning_model import build_model
from finetuning_options import DataArguments, FinetuningArguments, ModelArguments
from finetuning_results import (
    Scores,
    can_draw,
    choose_class_weights,
    choose_shown,
    confusion_picture,
    picture_of,
    predict,
    warn_of_absent,
)
from transformers import set_seed

from modeling_mapex import MapexForSemanticSegmentation
from modeling_mapex.shards_mapex import mask_names


IGNORE_INDEX = 255  # in the batches; `config.semantic_loss_ignore_index`
PICTURES = 4


@dataclass
class SegmentationArguments:
    """What the pixels are."""

    classes: str | None = field(
        default=None, metadata={"help": "YAML or JSON file, in a file of options also a mapping: name to codes."}
    )
    class_weights: list[str] | None = field(
        default=None, metadata={"help": "balanced, or a number for each class: weights in the loss."}
    )


class SegmentationScores(Scores):
    """Intersection over union, from a confusion matrix of each sample."""

    best, names = "mean_iou", ("mean_iou", "pixel_accuracy", "mean_accuracy")

    def __init__(self, num_labels: int):
        super().__init__()
        self.num_labels = num_labels

    def rows(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        batch_size, cells = labels.shape[0], self.num_labels**2
        counted = labels != IGNORE_INDEX
        sample = torch.arange(batch_size, device=labels.device)[:, None, None].expand_as(labels)
        index = sample * cells + labels * self.num_labels + predictions  # (B, H, W)
        return torch.bincount(index[counted], minlength=batch_size * cells).view(batch_size, cells)

    def confusion(self, table: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Pixels `(true, predicted)`"""
        return (weights @ table).reshape(self.num_labels, self.num_labels)

    def metrics(self, table: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        confusion = self.confusion(table, weights)
        there = confusion.sum(axis=1) > 0
        if not there.any():
            return {}
        return {
            "mean_iou": float(iou_of(confusion)[there].mean()),
            "pixel_accuracy": float(np.trace(confusion) / confusion.sum()),
            "mean_accuracy": float((np.diag(confusion)[there] / confusion.sum(axis=1)[there]).mean()),
        }


def iou_of(confusion: np.ndarray) -> np.ndarray:
    """Of each class; 0 for one that neither occurs nor is predicted."""
    right = np.diag(confusion)
    return right / np.maximum(confusion.sum(axis=0) + confusion.sum(axis=1) - right, 1e-12)


def count_codes(data: Data) -> dict[str, dict[int, int]]:
    """Pixels of each code on each side."""
    counts: dict[str, dict[int, int]] = {}
    for side, chips in data.sides.items():
        counts[side] = {}
        for mask in chips.labels():
            for code, count in zip(*np.unique(mask, return_counts=True)):
                counts[side][int(code)] = counts[side].get(int(code), 0) + int(count)
    return counts


def choose_classes(
    given: str | dict[str, Any] | None, data: Data, found: set[int]
) -> tuple[list[str], dict[int, int | None]]:
    """Names of the classes, and the class of each code, `None` where it does not count."""
    ignored = data.spec.get("ignore_index")
    if given is None:
        named = {code: name for code, name in mask_names(data.spec).items() if code != ignored}
        if not named:
            raise Stop(
                f"The shards do not name the classes of `{data.label}`, which holds the codes {sorted(found)[:20]}: "
                "name them by --classes."
            )
        names = list(named.values())
        codes: dict[int, int | None] = {code: index for index, code in enumerate(named)}
    else:
        mapping = dict(given if isinstance(given, dict) else read_mapping(given))
        ignore = mapping.pop("ignore", [])
        names, codes, rest = list(mapping), {}, None
        for index, (name, held) in [*enumerate(mapping.items()), (None, ("ignore", ignore))]:
            if held == "rest":
                if rest is not None:
                    raise Stop("Only one of --classes can hold the rest.")
                rest = (index,)
                continue
            for code in held if isinstance(held, list) else [held]:
                if not isinstance(code, int) or code in codes:
                    raise Stop(f"--classes: `{name}` holds {code!r}; codes are whole numbers, each in one class.")
                codes[code] = index
        if rest is not None:
            codes |= {code: rest[0] for code in found if code not in codes and code != ignored}
    if ignored is not None:
        codes.setdefault(int(ignored), None)
    if strange := sorted(found - set(codes)):
        raise Stop(
            f"`{data.label}` holds the codes {strange[:20]}, which have no class; the classes are {names}. Name them "
            "by --classes, where `ignore: rest` ignores all others."
        )
    if len(names) < 2:
        raise Stop(f"There must be two classes or more, got {names}.")
    if len(names) >= IGNORE_INDEX:
        raise Stop(f"There are {len(names)} classes, more than {IGNORE_INDEX - 1}: join some by --classes.")
    return names, codes


def count_classes(
    found: dict[str, dict[int, int]], codes: dict[int, int | None], num_labels: int
) -> dict[str, np.ndarray]:
    """Pixels of each class on each side."""
    counts = {side: np.zeros(num_labels, dtype=np.int64) for side in found}
    for side, pixels in found.items():
        for code, count in pixels.items():
            if codes[code] is not None:
                counts[side][codes[code]] += count
        if not counts[side].any():
            raise Stop(
                f"No pixel of the {side} side has a class: all are ignored. Choose another --split_seed or --classes."
            )
    return counts


def describe(names: list[str], confusion: np.ndarray) -> dict[str, dict[str, float | None]]:
    """What the test says of each class; `None` where it has no pixel."""
    right, predicted, true = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    return {
        name: {
            "iou": float(iou) if t else None,
            "precision": float(r / p) if p else None,
            "recall": float(r / t) if t else None,
            "pixels": int(t),
        }
        for name, iou, r, p, t in zip(names, iou_of(confusion), right, predicted, true)
    }


def predictions_picture(tuning: Finetuning, names: list[str]):
    """Some test samples: image, label, prediction.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    chips = tuning.data.sides["test"]
    shown = choose_shown(chips, PICTURES)
    figure = Figure(figsize=(7, 2.3 * len(shown) + 0.6), layout="constrained")
    axes = figure.subplots(len(shown), 3, squeeze=False)
    colours, occurring = colormaps["tab10" if len(names) <= 10 else "tab20"], set()
    for row, index in zip(axes, shown):
        batch = tuning.collator([chips[index]])
        logits, labels = predict(tuning.model, batch)
        label, prediction = labels[0].numpy(), logits[0].argmax(dim=0).numpy()
        occurring |= set(np.unique(prediction).tolist()) | set(np.unique(label[label != IGNORE_INDEX]).tolist())
        pictures = [picture_of(tuning.config, batch), colours(label % colours.N), colours(prediction % colours.N)]
        pictures[1][label == IGNORE_INDEX] = (1.0, 1.0, 1.0, 1.0)
        for axis, picture in zip(row, pictures):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], ("image", "label (white: ignored)", "prediction")):
        axis.set_title(title, fontsize=9)
    legend = [Patch(color=colours(index % colours.N), label=names[index]) for index in sorted(occurring)]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def main(
    model_args: ModelArguments, data_args: DataArguments, task_args: SegmentationArguments, args: FinetuningArguments
) -> dict[str, float]:
    """Returns the test metrics; everything else is in `results.json`."""
    if isinstance(task_args.classes, str):  # the run remembers the classes, not where they were written
        task_args = replace(task_args, classes=read_mapping(task_args.classes))
    run = Run(args, model_args, data_args, task_args)
    if results := run.finished():
        return results["metrics"]
    set_seed(args.seed)

    # Data.
    data = read_data(model_args, data_args, ("mask",), args.seed)
    found = count_codes(data)
    names, codes = choose_classes(task_args.classes, data, set().union(*found.values()))
    counts = count_classes(found, codes, len(names))
    warn_of_absent(counts, names)
    class_weights = choose_class_weights(task_args.class_weights, counts["train"], names)

    # Model.
    fields: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "semantic_loss_ignore_index": IGNORE_INDEX,
        "dense_window_metres": window_metres(data_args, data),
        "class_weights": class_weights,
    }
    model = build_model(MapexForSemanticSegmentation, model_args, data.modalities, **fields)
    scores = SegmentationScores(len(names))

    # Training, test, results.
    labels = {"label": data.label, "label_codes": codes, "ignore_index": IGNORE_INDEX}
    tuning = Finetuning(
        run, data, scores, model, model_args, data_args, labels, preprocess=lambda logits, labels: logits.argmax(dim=1)
    )
    tuning.train()
    results = tuning.finish(lambda table: describe(names, scores.confusion(table, np.ones(len(table)))))
    confusion = scores.confusion(scores.table, np.ones(len(scores.table)))
    results["confusion"] = confusion.astype(int).tolist()
    if can_draw():
        confusion_picture(confusion, names).savefig(run.folder / "confusion.png", dpi=120)
        predictions_picture(tuning, names).savefig(run.folder / "predictions.png", dpi=120)
    return tuning.close(results)


if __name__ == "__main__":
    kinds = (ModelArguments, DataArguments, SegmentationArguments, FinetuningArguments)
    main(*parse_arguments(kinds, __doc__))
