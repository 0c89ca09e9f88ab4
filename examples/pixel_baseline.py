"""What pixels alone can tell: a random forest on band statistics of chips, or on the bands of single pixels; or the
sign of a normalised difference, like NDWI, which learns nothing.

    python examples/pixel_baseline.py settings.yaml

The file has options of a fine-tuning script, `task_script`, which is its name, and for a normalised difference `index`,
the names of two bands of the only sensor: of the two classes the second is where the first band is the brighter one.
Reads and splits as the fine-tuning script does, and writes a `results.json` like its own. A sensor that a sample lacks
is zero after normalisation, and a feature says so.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import resized, to_image
from command_line import Stop, read_mapping
from finetuning_data import Data
from finetuning_options import FinetuningArguments
from finetuning_results import Scores, intervals, peak_memory, results_table
from finetuning_tasks import open_task, part_of
from run_semantic_segmentation import IGNORE_INDEX

from modeling_mapex import MapexConfig
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.image_processing_mapex import MapexImageProcessor
from modeling_mapex.pruning_mapex import prune_config, resolve_modalities


PIXELS = 300  # of each training chip
TREES = 200


def statistics_of(image: torch.Tensor) -> np.ndarray:
    """Mean, standard deviation and five percentiles of each channel: `(batch, 7 * channels)`."""
    pixels = image.flatten(2)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    parts = [pixels.mean(dim=2), pixels.std(dim=2), *torch.quantile(pixels, levels, dim=2)]
    return torch.cat(parts, dim=1).numpy()


def chips_of(data: Data, side: str, collator: MapexCollator, config: MapexConfig):
    """Image `(1, channels, height, width)` and labels of each chip of a side."""
    chips = data.sides[side]
    for index in range(len(chips)):
        batch = collator([chips[index]])
        masks = {key: batch.get(key) for key in ("modality_mask", "valid_mask")}
        yield to_image(config, batch["pixel_values"], **masks), batch["labels"]


def fit_forest(
    script: str, data: Data, collator: MapexCollator, config: MapexConfig, scores: Scores, seed: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A random forest, as a function from the image and the labels of a chip, of which it takes the size, to what
    `scores` compare with the labels.
    """
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    whole_chips = script == "run_image_classification.py"
    generator, features, targets = np.random.default_rng(seed), [], []
    for image, labels in chips_of(data, "train", collator, config):
        if whole_chips:
            features.append(statistics_of(image))
            targets.append(labels.numpy())
            continue
        pixels, values = resized(image, labels.shape[-2:])[0].flatten(1).T.numpy(), labels.flatten().numpy()
        known = np.flatnonzero(~np.isnan(values) if values.dtype.kind == "f" else values != IGNORE_INDEX)
        chosen = generator.permutation(known)[:PIXELS]
        features.append(pixels[chosen])
        targets.append(values[chosen])
    forest_class = RandomForestRegressor if script == "run_pixel_regression.py" else RandomForestClassifier
    forest = forest_class(TREES, min_samples_leaf=1 if whole_chips else 5, random_state=seed, n_jobs=-1)
    forest.fit(np.concatenate(features), np.concatenate(targets))

    def predict(image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if not whole_chips:
            pixels = resized(image, labels.shape[-2:])[0].flatten(1).T.numpy()
            return torch.from_numpy(forest.predict(pixels)).view(labels.shape)
        predicted = torch.zeros(1, scores.num_labels)
        predicted[0, forest.classes_] = torch.from_numpy(forest.predict_proba(statistics_of(image))[0]).float()
        return predicted

    return predict


def normalized_difference(
    index: list[str], config: MapexConfig, scores: Scores
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Class 1 where the first band is brighter than the second, else 0; a function like that of [`fit_forest`]."""
    (spec,) = config.modalities.values()
    if getattr(scores, "num_labels", None) != 2 or any(band not in spec["bands"] for band in index):
        raise Stop(f"`index` is for two classes of pixels and names two of the bands {spec['bands']}, got {index}.")
    bands = [spec["bands"].index(band) for band in index]
    mean, std = (torch.tensor(spec[key])[:, None, None] for key in ("mean", "std"))

    def predict(image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        pixels = resized(image, labels.shape[-2:])[0, : len(spec["bands"])] * std + mean  # in the units of the sensor
        return (pixels[bands[0]] > pixels[bands[1]]).long()[None]

    return predict


def main(settings: dict[str, Any]) -> dict[str, float]:
    settings = dict(settings)
    script, index = settings.pop("task_script", None), settings.pop("index", None)
    task = open_task(script, settings)
    data, scores = task.data, task.scores
    if data.spec["kind"] == "multi_label":
        raise Stop("The forest gives one label of a chip: there is no baseline for several.")
    args = part_of(FinetuningArguments, settings)
    whole = data.config
    config = prune_config(whole, resolve_modalities(whole, data.modalities), whole.expert_ids)
    collator = MapexCollator(MapexImageProcessor.from_config(config), **task.collator_options)

    start = time.perf_counter()
    if index is None:
        predict = fit_forest(script, data, collator, config, scores, args.seed)
    else:
        predict = normalized_difference(index, config, scores)
    seconds = time.perf_counter() - start

    start, rows = time.perf_counter(), []
    for image, labels in chips_of(data, "test", collator, config):
        rows.append(scores.rows(predict(image, labels), labels).double().numpy())
    table = np.concatenate(rows)
    results = {
        "metrics": scores.metrics(table, np.ones(len(table))),
        "intervals": intervals(scores, table, data.sides["test"].places(), args.bootstrap),
        "samples": {side: len(chips) for side, chips in data.sides.items()},
        "places": {side: len(set(chips.places())) for side, chips in data.sides.items()},
        "parameters": {"all": 0},
        "seconds": seconds,
        "ms_per_chip": 1000 * (time.perf_counter() - start) / len(table),
        "peak_memory_mb": peak_memory(),
        "settings": {**settings, "task_script": script, "index": index},
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(results_table(results))
    return results["metrics"]


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(read_mapping(sys.argv[1]))
