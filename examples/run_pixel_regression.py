r"""Fine-tune MAPEX to give each pixel a value, like biomass, height or a share.

    # both radar and optical, pruned for them while loading, everything trained; samples may lack one
    python examples/run_pixel_regression.py --shards shards/biomassters_s1s2_agbm --label agbm --modalities s1 s2 \
        --modality_dropout 0.2 --output_dir outputs/biomass
    # a second pass of radar, which mapex-nano does not know: it begins as a copy of the first
    python examples/run_pixel_regression.py --shards shards/biomassters_s1s2_agbm --modalities s1 s1_descending \
        --add s1_descending=s1 --modality_dropout 0.2 --output_dir outputs/biomass-passes
    # the encoder frozen: only the decoder is trained
    python examples/run_pixel_regression.py --shards shards/biomassters_s1s2_agbm --modalities s2 --method frozen \
        --output_dir outputs/biomass-frozen
    # low-rank adapters in attention and experts (pip install peft), merged and pushed at the end
    python examples/run_pixel_regression.py --shards shards/biomassters_s1s2_agbm --modalities s2 --method lora \
        --output_dir outputs/biomass-lora --push_to_hub me/mapex-nano-biomass
    # a sensor of the shards under another name; options in a file, those that follow win
    python examples/run_pixel_regression.py settings.yaml --rename s1_descending=s1

The label is of kind `map`; samples without it are left out, and its nodata value and NaN do not count. Of the places
`--validation` are kept to choose the best model and to stop early, and `--test` to test it: no place is on two sides.
Metrics are in the unit of the label; `--best_metric` is the root mean square error. The same command goes on from the
last checkpoint; at the end there are `results.json`, with 95 % intervals over resampled test places, `predictions.png`,
and the model with its card in `model`.
"""

import math

import numpy as np
import torch
from command_line import Stop, parse_arguments
from finetuning import Finetuning, Run
from finetuning_data import Data, read_data, window_metres
from finetuning_model import build_model
from finetuning_options import DataArguments, FinetuningArguments, ModelArguments
from finetuning_results import Scores, can_draw, choose_shown, picture_of, predict
from transformers import set_seed

from modeling_mapex import MapexForPixelRegression


PICTURES, SCATTERED = 3, 64  # test samples that are shown


class RegressionScores(Scores):
    """Root mean square and mean absolute error, bias and coefficient of determination, over all pixels with a value."""

    best, names = "rmse", ("rmse", "mae", "r2")
    smaller_is_better = ("rmse", "mae")

    def rows(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        predictions, labels = predictions.double().flatten(1), labels.double().flatten(1)
        known = ~torch.isnan(labels)
        labels = labels.where(known, 0.0)
        error = (predictions - labels).where(known, 0.0)
        values = (known, error, error.abs(), error.square(), labels, labels.square())
        return torch.stack([value.sum(dim=1) for value in values], dim=1)

    def metrics(self, table: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        count, error, absolute, square, total, total_square = weights @ table
        if count == 0:
            return {}
        metrics = {
            "rmse": math.sqrt(square / count),
            "mae": float(absolute / count),
            "bias": float(error / count),
        }
        variation = total_square - total**2 / count
        return {**metrics, "r2": float(1 - square / variation)} if variation > 0 else metrics


def describe_labels(data: Data) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the known values of each side."""
    nodata, described = data.spec.get("nodata"), {}
    for side, chips in data.sides.items():
        count, total, square = 0, 0.0, 0.0
        for values in chips.labels():
            known = values[~np.isnan(values) & (values != nodata)].astype(np.float64)
            if not np.isfinite(known).all():
                raise Stop(
                    f"`{data.label}` holds infinite values. Convert the data again with them as its nodata value."
                )
            shifted = known - described["train"][0] if described else known
            count, total, square = count + known.size, total + shifted.sum(), square + (shifted**2).sum()
        if not count:
            raise Stop(f"No pixel of the {side} side has a value of `{data.label}`. Choose another --split_seed.")
        mean = total / count
        described[side] = (float(mean), math.sqrt(max(square / count - mean**2, 0.0)))
    if described["train"][1] == 0:
        raise Stop(f"`{data.label}` is {described['train'][0]:g} in all training samples: there is nothing to learn.")
    return described


def predictions_picture(tuning: Finetuning, unit: str):
    """Some test samples, label and prediction in the same colours; below, the values of more against each other.

    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib.figure import Figure

    chips = tuning.data.sides["test"]
    pictured, pairs = choose_shown(chips, PICTURES), []
    figure = Figure(figsize=(7.4, 2.3 * len(pictured) + 3.4), layout="constrained")
    grid = figure.add_gridspec(len(pictured) + 1, 3, height_ratios=[*[1] * len(pictured), 1.5])
    rows = {index: [figure.add_subplot(grid[row, column]) for column in range(3)] for row, index in enumerate(pictured)}
    for index in sorted(choose_shown(chips, SCATTERED)):
        batch = tuning.collator([chips[index]])
        logits, labels = predict(tuning.model, batch)
        label, prediction = labels[0].float().numpy(), logits[0].numpy()
        known = ~np.isnan(label)
        pairs.append((label[known], prediction[known]))
        if index in rows:
            image_axis, *maps = rows[index]
            image_axis.imshow(picture_of(tuning.config, batch), interpolation="nearest")
            limits = {"vmin": np.nanmin(label), "vmax": np.nanmax(label)} if known.any() else {}
            for axis, values in zip(maps, (label, prediction)):
                image = axis.imshow(values, cmap="viridis", interpolation="nearest", **limits)
            figure.colorbar(image, ax=maps, label=unit, shrink=0.9)
            for axis in rows[index]:
                axis.set_xticks([])
                axis.set_yticks([])
    for axis, title in zip(rows[pictured[0]], ("image", "label", "prediction")):
        axis.set_title(title, fontsize=9)
    truth, predicted = (np.concatenate(values) for values in zip(*pairs))
    axis = figure.add_subplot(grid[-1, :])
    image = axis.hexbin(truth, predicted, gridsize=50, bins="log", mincnt=1, cmap="Blues")
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    axis.plot(ends, ends, color="#d1495b", linewidth=1)
    axis.set_aspect("equal")
    axis.set_xlabel(f"label ({unit})")
    axis.set_ylabel(f"prediction ({unit})")
    figure.colorbar(image, ax=axis, label="pixels")
    return figure


def main(model_args: ModelArguments, data_args: DataArguments, args: FinetuningArguments) -> dict[str, float]:
    """Returns the test metrics; everything else is in `results.json`."""
    run = Run(args, model_args, data_args)
    if results := run.finished():
        return results["metrics"]
    set_seed(args.seed)

    # Data.
    data = read_data(model_args, data_args, ("map",), args.seed)
    described = describe_labels(data)
    unit = data.spec.get("unit") or "unit not stated"
    mean, std = described["train"]
    print(f"`{data.label}` of the training samples: mean {mean:.4g}, standard deviation {std:.4g} ({unit}).")

    # Model.
    fields = {"label_mean": mean, "label_std": std, "dense_window_metres": window_metres(data_args, data)}
    model = build_model(MapexForPixelRegression, model_args, data.modalities, num_labels=1, **fields)
    scores = RegressionScores()

    # Training, test, results.
    labels = {"label": data.label, "label_nodata": data.spec.get("nodata")}
    tuning = Finetuning(run, data, scores, model, model_args, data_args, labels)
    tuning.train()
    results = tuning.finish()
    results["unit"] = unit
    results["labels"] = {side: {"mean": values[0], "std": values[1]} for side, values in described.items()}
    if can_draw():
        predictions_picture(tuning, unit).savefig(run.folder / "predictions.png", dpi=120)
    return tuning.close(results)


if __name__ == "__main__":
    main(*parse_arguments((ModelArguments, DataArguments, FinetuningArguments), __doc__))
