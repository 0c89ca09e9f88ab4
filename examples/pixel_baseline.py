"""What pixels alone can tell: a random forest on band statistics of chips, or on the bands of single pixels.

    python examples/pixel_baseline.py settings.yaml     # options of a fine-tuning script, and `task_script`: its name

Reads and splits as the fine-tuning script does, and writes a `results.json` like its own. A sensor that a sample lacks
is zero after normalisation, and a feature says so.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import to_image
from command_line import Stop, read_mapping
from finetuning_data import Data, read_config
from finetuning_options import FinetuningArguments, ModelArguments
from finetuning_results import intervals, peak_memory, results_table
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


def main(settings: dict[str, Any]) -> dict[str, float]:
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    settings = dict(settings)
    script = settings.pop("task_script", None)
    task = open_task(script, settings)
    data, scores = task.data, task.scores
    if data.spec["kind"] == "multi_label":
        raise Stop("The forest gives one label of a chip: there is no baseline for several.")
    args, model_args = part_of(FinetuningArguments, settings), part_of(ModelArguments, settings)
    whole_chips = script == "run_image_classification.py"

    whole = read_config(model_args)
    config = prune_config(whole, resolve_modalities(whole, data.modalities), whole.expert_ids)
    collator = MapexCollator(MapexImageProcessor.from_config(config), **task.collator_options)
    generator = np.random.default_rng(args.seed)

    start, features, targets = time.perf_counter(), [], []
    for image, labels in chips_of(data, "train", collator, config):
        if whole_chips:
            features.append(statistics_of(image))
            targets.append(labels.numpy())
            continue
        image = torch.nn.functional.interpolate(image, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        pixels, values = image[0].flatten(1).T.numpy(), labels.flatten().numpy()
        known = np.flatnonzero(~np.isnan(values) if values.dtype.kind == "f" else values != IGNORE_INDEX)
        chosen = generator.permutation(known)[:PIXELS]
        features.append(pixels[chosen])
        targets.append(values[chosen])
    forest_class = RandomForestRegressor if script == "run_pixel_regression.py" else RandomForestClassifier
    forest = forest_class(TREES, min_samples_leaf=1 if whole_chips else 5, random_state=args.seed, n_jobs=-1)
    forest.fit(np.concatenate(features), np.concatenate(targets))
    seconds = time.perf_counter() - start

    start, rows = time.perf_counter(), []
    for image, labels in chips_of(data, "test", collator, config):
        if whole_chips:
            predicted = torch.zeros(1, scores.num_labels)
            predicted[0, forest.classes_] = torch.from_numpy(forest.predict_proba(statistics_of(image))[0]).float()
        else:
            image = torch.nn.functional.interpolate(image, size=labels.shape[-2:], mode="bilinear", align_corners=False)
            predicted = torch.from_numpy(forest.predict(image[0].flatten(1).T.numpy())).view(labels.shape)
        rows.append(scores.rows(predicted, labels).double().numpy())
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
        "settings": settings,
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(results_table(results))
    return results["metrics"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(read_mapping(sys.argv[1]))
