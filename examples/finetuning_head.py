"""A head to begin with: the logistic regression on what the pretrained encoder says of the samples as they are.

A linear head with random weights learns slowly, and what it sends back on the way wears out what pretraining has
learnt; one that is right already leaves the encoder what it knows (Kumar et al., arXiv 2202.10054).
"""

import importlib.util

import numpy as np
import torch
from command_line import Stop
from finetuning_data import Chips
from probes import fit_logistic
from torch.utils.data import DataLoader
from tqdm import tqdm

from modeling_mapex import MapexForImageClassification
from modeling_mapex.collation_mapex import MapexCollator


SAMPLES = 2000  # are read of each side at most: more do not make a better beginning
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the regression


@torch.no_grad()
def pooled_features(
    model: MapexForImageClassification, collator: MapexCollator, chips: Chips, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pooled feature of each sample `(samples, config.pooled_size)`, and targets 0 and 1 `(samples, classes)`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = model.mapex.eval().to(device)
    values, targets = [], []
    loader = DataLoader(chips, batch_size, collate_fn=collator)
    for batch in tqdm(loader, desc="Reading features for the head", unit="batch", leave=False):
        batch = batch.to(device)
        labels = batch.pop("labels").cpu()
        values.append(encoder(**batch).pooler_output.float().cpu())
        targets.append(torch.eye(model.num_labels)[labels] if labels.ndim == 1 else labels)
    return torch.cat(values).double().numpy(), torch.cat(targets).double().numpy()


def fit_head(
    model: MapexForImageClassification, collator: MapexCollator, sides: dict[str, Chips], batch_size: int, seed: int
) -> None:
    """Give the classifier of `model` the weights of the regression; of how strong, the validation samples decide.

    Args:
        collator (`MapexCollator`): Reads samples as they are, without augmentation.
        sides (`dict[str, Chips]`): `"train"` and, if there is one, `"validation"`: else the training samples decide.
        batch_size (`int`), seed (`int`): How many to read at once; which to read, where there are more than `SAMPLES`.

    Raises:
        Stop: scikit-learn is not there, or no validation sample has any of the classes.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise Stop("--head probe needs scikit-learn: pip install scikit-learn, or begin with --head random.")
    parts = {}
    for side in ("train", "validation"):
        if side in sides:
            order = np.random.default_rng(seed).permutation(len(sides[side]))
            parts[side] = pooled_features(model, collator, sides[side].select(np.sort(order[:SAMPLES])), batch_size)
    kind = "class" if model.config.problem_type == "single_label_classification" else "multi_label"
    held_out = parts.get("validation", parts["train"])
    probe = fit_logistic(kind, parts["train"], held_out, STRENGTHS, model.config.class_weights)
    if probe is None:
        raise Stop("No validation sample has any of the classes: choose another --split_seed, or --head random.")
    with torch.no_grad():
        for parameter, value in ((model.classifier.weight, probe.weight), (model.classifier.bias, probe.bias)):
            parameter.copy_(torch.from_numpy(value))
    print(f"The head begins as a logistic regression on {len(parts['train'][0])} samples, C = {probe.strength:g}.")
