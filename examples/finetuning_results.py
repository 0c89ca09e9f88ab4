"""Results of the fine-tuning scripts: metrics with intervals over places, tables, pictures, and weights of classes."""

import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from command_line import Stop
from finetuning_data import Chips
from transformers import EvalPrediction

from modeling_mapex import MapexConfig
from modeling_mapex.visualization_mapex import display_bands, stretch_limits, to_picture
from modeling_mapex.windows_mapex import predict_in_windows


class Scores(ABC):
    """Metrics of an evaluation, from a row of numbers that is kept of each sample instead of its predictions: memory
    does not grow with pixels, and intervals come from weighting the rows. For `Trainer` with `batch_eval_metrics`.
    """

    best: str  # metric that chooses the best model
    names: tuple[str, ...]  # of all metrics
    smaller_is_better: tuple[str, ...] = ()

    def __init__(self):
        self.parts: list[np.ndarray] = []
        self.table: np.ndarray | None = None  # of the last evaluation

    @abstractmethod
    def rows(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`(batch_size, columns)`"""

    @abstractmethod
    def metrics(self, table: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """Of `table (samples, columns)`, each sample as often as `weights` says; without those that are not defined."""

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        self.parts.append(self.rows(prediction.predictions, prediction.label_ids).double().cpu().numpy())
        if not compute_result:
            return {}
        self.table, self.parts = np.concatenate(self.parts), []
        return self.metrics(self.table, np.ones(len(self.table)))


def intervals(
    scores: Scores, table: np.ndarray, places: np.ndarray, count: int, seed: int = 0
) -> dict[str, list[float]]:
    """For each metric the bounds that hold 95 % of its values over `count` sets of places, drawn with replacement. None
    for a single place.
    """
    names, place_of = np.unique(places, return_inverse=True)
    if count < 1 or len(names) < 2:
        return {}
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)  # (count, places)
    values: dict[str, list[float]] = {}
    for draw in draws:
        for name, value in scores.metrics(table, draw[place_of].astype(np.float64)).items():
            values.setdefault(name, []).append(value)
    return {name: np.percentile(drawn, [2.5, 97.5]).tolist() for name, drawn in values.items()}


def results_table(results: dict[str, Any]) -> str:
    """Markdown: the metrics with their intervals, and what there is of each class."""
    lines = ["| metric | test | 95 % interval |", "| --- | --- | --- |"]
    for name, value in results["metrics"].items():
        bounds = results["intervals"].get(name)
        lines.append(f"| {name} | {value:.4g} | {'-' if bounds is None else '{:.4g} .. {:.4g}'.format(*bounds)} |")
    per_class = results.get("per_class", {})
    if per_class:
        columns = list(next(iter(per_class.values())))
        lines += ["", f"| class | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
        for name, row in per_class.items():
            cells = ["-" if row[column] is None else f"{row[column]:.4g}" for column in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def peak_memory() -> float | None:
    """Of this process in MB: on the GPU where there is one; `None` on Windows, which does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def can_draw() -> bool:
    """Whether there will be pictures; said if not."""
    if importlib.util.find_spec("matplotlib"):
        return True
    print("No pictures: matplotlib is not installed.")
    return False


def predict(model, batch: dict[str, Any], batch_size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """The map of a batch, in windows of the size of what the model was trained on; and its labels, ignored where no
    window over them holds a valid pixel, and the map is NaN. `batch_size` is of windows.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    logits = predict_in_windows(model, **inputs, output_size=labels.shape[-2:], batch_size=batch_size, progress=False)
    if logits.ndim == labels.ndim:  # values, which may be stored as whole numbers
        return logits, labels.float().masked_fill(torch.isnan(logits), torch.nan)
    return logits, labels.masked_fill(torch.isnan(logits[:, 0]), model.config.semantic_loss_ignore_index)


def count_unread(labels: torch.Tensor, read: torch.Tensor) -> int:
    """How many of the labels that count are ignored in `read`, which are the same but for those."""
    return int(((labels != read) & ~torch.isnan(labels)).sum())


def picture_of(config: MapexConfig, batch: dict[str, Any]) -> np.ndarray:
    """The sensor of a sample that is shown in colour, or else its first, `(height, width, 3)`."""
    present = [name for name in config.modalities if name in batch["modality_mask"] and batch["modality_mask"][name][0]]
    positions = {name: display_bands(name, config.modalities[name]["bands"]) for name in present}
    name = max(present, key=lambda name: len(positions[name]))
    pixels = batch["pixel_values"][name][0]
    return to_picture(pixels, positions[name], stretch_limits(pixels, positions[name]))


def choose_shown(chips: Chips, count: int) -> list[int]:
    """Positions of up to `count` samples to show, of as many places as there are."""
    places = chips.places()
    _, turns = np.unique(places, return_inverse=True)
    rank = np.array([np.count_nonzero(turns[:index] == turn) for index, turn in enumerate(turns)])
    return np.sort(np.lexsort((np.arange(len(chips)), rank))[:count]).tolist()


def confusion_picture(confusion: np.ndarray, names: Sequence[str]):
    """Rows are what is true, each summing to 1; only classes that occur.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.figure import Figure

    there = np.flatnonzero(confusion.sum(axis=0) + confusion.sum(axis=1))
    shown = confusion[np.ix_(there, there)].astype(np.float64)
    shown /= np.maximum(shown.sum(axis=1, keepdims=True), 1e-12)
    names = [names[index] for index in there]
    side = 2.2 + 0.42 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shown, vmin=0, vmax=1, cmap="Blues")
    if len(names) <= 20:
        for (row, column), value in np.ndenumerate(shown):
            colour = "white" if value > 0.55 else "#444444"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the true class")
    return figure


def balanced_weights(counts: np.ndarray) -> list[float]:
    """Weights under which all classes that occur weigh the same, of mean 1 over what is counted; 0 for the others."""
    there = counts > 0
    return [float(weight) for weight in np.where(there, counts.sum() / (there.sum() * np.maximum(counts, 1)), 0.0)]


def choose_class_weights(given: list[str] | None, counts: np.ndarray, names: Sequence[str]) -> list[float] | None:
    """Of `--class_weights`: `balanced`, or a number for each class."""
    if given is None:
        return None
    given = [given] if isinstance(given, (str, float, int)) else given
    if [str(value) for value in given] == ["balanced"]:
        return balanced_weights(counts)
    try:
        weights = [float(value) for value in given]
    except ValueError:
        weights = []
    if len(weights) != len(names) or not all(weight >= 0 for weight in weights):
        raise Stop(f"--class_weights takes `balanced` or a number for each of {list(names)}, got {given}.")
    return weights


def warn_of_absent(counts: dict[str, np.ndarray], names: Sequence[str]) -> None:
    """Classes that are not trained on, and those that the test does not have."""
    for side, text in (("train", "cannot be learnt: no training sample has them"), ("test", "are not tested")):
        if absent := [name for name, count in zip(names, counts[side]) if count == 0]:
            print(f"Classes that {text}: {', '.join(absent)}.")
