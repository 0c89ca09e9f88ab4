"""The task of a fine-tuning run from its settings, for what works on its data without training: labels, split and
scores are those of the script.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import run_image_classification
import run_pixel_regression
import run_semantic_segmentation
import torch
from command_line import Stop
from finetuning_data import KINDS, Data, draw_samples, read_data
from finetuning_options import DataArguments, ModelArguments
from finetuning_results import Scores

from modeling_mapex import MapexForImageClassification, MapexForPixelRegression, MapexForSemanticSegmentation


MODEL_CLASSES = {
    "run_image_classification.py": MapexForImageClassification,
    "run_semantic_segmentation.py": MapexForSemanticSegmentation,
    "run_pixel_regression.py": MapexForPixelRegression,
}


@dataclass
class Task:
    """What a run is about.

    Attributes:
        data (`Data`): Split as the run splits it.
        scores (`Scores`): How it is measured.
        collator_options (`dict[str, Any]`): Of `MapexCollator`, for the labels.
    """

    data: Data
    scores: Scores
    collator_options: dict[str, Any]

    def rows(self, logits: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
        """What the scores keep of a batch."""
        if isinstance(self.scores, run_semantic_segmentation.SegmentationScores):
            logits = logits.argmax(dim=1)
        return self.scores.rows(logits, labels).double().cpu().numpy()


def part_of(kind: type, settings: dict[str, Any]):
    """Those of the settings that are options of `kind`."""
    return kind(**{entry.name: settings[entry.name] for entry in fields(kind) if entry.name in settings})


def open_task(script: str, settings: dict[str, Any]) -> Task:
    """The task of a script with its settings.

    Raises:
        Stop: an unknown script, or what the script itself would refuse.
    """
    if script not in KINDS:
        raise Stop(f"The script must be one of {list(KINDS)}, got {script}.")
    seed = settings.get("seed", 0)
    data_args = part_of(DataArguments, settings)
    data = read_data(part_of(ModelArguments, settings), data_args, KINDS[script], seed)
    options: dict[str, Any] = {"label": data.label}
    if script == "run_image_classification.py":
        if settings.get("shots"):
            groups = np.array(list(data.sides["train"].labels()))
            data.sides["train"] = draw_samples(data.sides["train"], settings["shots"], seed, groups)
        count = len(data.spec["names"])
        is_single = data.spec["kind"] == "class"
        kind = run_image_classification.SingleLabelScores if is_single else run_image_classification.MultiLabelScores
        return Task(data, kind(count), options)
    if script == "run_pixel_regression.py":
        return Task(data, run_pixel_regression.RegressionScores(), {**options, "label_nodata": data.spec.get("nodata")})
    codes_found = set().union(*run_semantic_segmentation.count_codes(data).values())
    names, codes = run_semantic_segmentation.choose_classes(settings.get("classes"), data, codes_found)
    options |= {"label_codes": codes, "ignore_index": run_semantic_segmentation.IGNORE_INDEX}
    return Task(data, run_semantic_segmentation.SegmentationScores(len(names)), options)
