"""Probes of frozen features, and what they are worth: nearest neighbours, logistic regression, metrics and intervals
over test places. Targets are 0 and 1 `(samples, classes)`, also where a sample has one class.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from command_line import Stop


LABEL_KINDS = ("class", "multi_label")
METRICS = {"class": ("accuracy", "macro F1"), "multi_label": ("mean average precision", "micro F1")}
STRENGTHS = tuple(10.0**power for power in range(-3, 4))  # C of the logistic regression
MOST_ITERATIONS = 1000
CERTAIN = 20.0  # log odds of what all training samples have in common


def neighbor_scores(values: np.ndarray, targets: np.ndarray, others: np.ndarray, neighbors: int) -> np.ndarray:
    """Shares of the votes of the nearest neighbours, `(others, classes)`."""
    from sklearn.neighbors import KNeighborsRegressor

    if len(values) < neighbors:
        raise Stop(f"{neighbors} neighbours cannot vote among {len(values)} training samples: give fewer --neighbors.")
    return KNeighborsRegressor(neighbors, metric="cosine").fit(values, targets).predict(others)


class LogisticProbe(NamedTuple):
    """A logistic regression on features in their own units.

    Attributes:
        weight (`np.ndarray` of shape `(classes, features)`), bias (`np.ndarray` of shape `(classes,)`)
        strength (`float`): The `C` that was chosen.
        arrived (`bool`): Whether the optimiser did.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float
    arrived: bool

    def scores(self, kind: str, values: np.ndarray) -> np.ndarray:
        """Probabilities `(samples, classes)` of `values (samples, features)`."""
        from scipy.special import expit, softmax

        logits = values @ self.weight.T + self.bias
        return softmax(logits, axis=1) if kind == "class" else expit(logits)


def fit_logistic(
    kind: str,
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    strengths: Sequence[float] = STRENGTHS,
    class_weights: Sequence[float] | None = None,
) -> LogisticProbe | None:
    """The regression, on features standardised by `train`, with the `C` that is best on `validation`, of equals the
    lowest. `None` if none of the classes is among the validation samples.

    Args:
        kind (`str`): `"class"`, which is one regression over all classes, or `"multi_label"`, one for each.
        train, validation (`tuple[np.ndarray, np.ndarray]`): Values `(samples, features)` and targets.
        strengths (`Sequence[float]`): The `C` to try.
        class_weights (`Sequence[float]`, *optional*): How much a sample of each class counts, for one label.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    values, targets = train
    scaler = StandardScaler().fit(values)
    values = scaler.transform(values)
    counts_as = None if class_weights is None else targets @ np.asarray(class_weights)
    best, best_quality = None, -np.inf
    for strength in strengths:
        weight, bias, arrived = np.zeros((targets.shape[1], values.shape[1])), np.zeros(targets.shape[1]), True
        # One regression for the rows of all classes, or one for the row of each.
        problems = [(slice(None), targets.argmax(axis=1))] if kind == "class" else [*enumerate(targets.T)]
        for rows, target in problems:
            if np.ptp(target) == 0:  # of a few samples all may have a class, or none: then there is nothing to fit
                bias[rows] = np.where(targets[0][rows] > 0, CERTAIN, -CERTAIN)
                continue
            model = LogisticRegression(C=strength, max_iter=MOST_ITERATIONS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # told of the one that is chosen
                model.fit(values, target, counts_as)
            arrived &= bool(model.n_iter_.max() < MOST_ITERATIONS)
            if kind == "multi_label":
                weight[rows], bias[rows] = model.coef_[0], model.intercept_[0]
                continue
            bias[:] = -CERTAIN  # of classes that no training sample has
            pair = len(model.classes_) == 2  # scikit-learn gives the odds of the second: half for it, half against
            weight[model.classes_] = np.concatenate([-model.coef_, model.coef_]) / 2 if pair else model.coef_
            odds = model.intercept_
            bias[model.classes_] = np.concatenate([-odds, odds]) / 2 if pair else odds
        weight = weight / scaler.scale_
        probe = LogisticProbe(weight, bias - weight @ scaler.mean_, strength, arrived)
        scores = probe.scores(kind, validation[0])
        quality = metrics(kind, validation[1], scores)[METRICS[kind][0]].item()
        if quality > best_quality:  # never where all are NaN
            best, best_quality = probe, quality
    return best


def metrics(
    kind: str, targets: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Metrics of test sets in which each sample counts `weights` times.

    Args:
        kind (`str`): `"class"` or `"multi_label"`.
        targets, scores (`np.ndarray` of shape `(samples, classes)`): Truth, and probabilities.
        weights (`np.ndarray` of shape `(sets, samples)`, *optional*): Default: one set, with every sample once.

    Returns:
        `dict[str, np.ndarray]`: Name to `(sets,)`. Classes that do not occur in a set are no part of its mean; NaN
        where that leaves none.
    """
    weights = np.ones((1, len(targets))) if weights is None else weights
    single = kind == "class"
    predicted = np.eye(scores.shape[1])[scores.argmax(axis=1)] if single else (scores > 0.5).astype(float)
    hits = weights @ (targets * predicted)  # (S, C)
    sizes = weights @ targets + weights @ predicted  # (S, C)
    first, second = METRICS[kind]
    if single:
        return {first: hits.sum(axis=1) / weights.sum(axis=1), second: _mean(_ratio(2 * hits, sizes))}
    precisions = [average_precision(*columns, weights) for columns in zip(targets.T, scores.T)]
    return {first: _mean(np.stack(precisions, axis=1)), second: _ratio(2 * hits.sum(axis=1), sizes.sum(axis=1))}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the last dimension, without NaN."""
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1))


def average_precision(targets: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """As scikit-learn defines it, equal scores being one threshold, for many weightings at once: `(sets,)`.

    Args:
        targets, scores (`np.ndarray` of shape `(samples,)`): Of one class.
        weights (`np.ndarray` of shape `(sets, samples)`): How often each sample counts.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of runs of equal scores
    weights = weights[:, order]
    found = (weights * targets[order]).cumsum(axis=1)[:, ends]  # (S, thresholds)
    taken = weights.cumsum(axis=1)[:, ends]
    precision = np.nan_to_num(_ratio(found, taken))
    gained = np.diff(found, axis=1, prepend=0.0)
    return _ratio((gained * precision).sum(axis=1), found[:, -1])


def bootstrap_metrics(
    kind: str, targets: np.ndarray, scores: np.ndarray, places: np.ndarray, draws: int, seed: int
) -> dict[str, np.ndarray]:
    """Metrics of `draws` test sets, each of as many places drawn with replacement: name to `(draws,)`."""
    names, index = np.unique(places, return_inverse=True)
    generator = np.random.default_rng(seed)
    step = max(1, (1 << 23) // len(index))  # so many at a time bound the memory
    parts = []
    for start in range(0, draws, step):
        size = min(step, draws - start)
        counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size)
        parts.append(metrics(kind, targets, scores, counts[:, index].astype(float)))
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS[kind]}


def summarize(
    kind: str, targets: np.ndarray, draws: list[np.ndarray], places: np.ndarray, bootstrap: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Per metric the mean over `draws`, each the scores `(samples, classes)` of a probe, its interval over test sets,
    and where there are several the standard deviation over draws.
    """
    values = [metrics(kind, targets, scores) for scores in draws]
    resampled = [bootstrap_metrics(kind, targets, scores, places, bootstrap, seed) for scores in draws]
    result = {}
    for name in METRICS[kind]:
        means = np.mean([sets[name] for sets in resampled], axis=0)
        of_draws = [value[name].item() for value in values]
        result[name] = {"mean": float(np.mean(of_draws)), "interval": np.nanquantile(means, (0.025, 0.975)).tolist()}
        if len(draws) > 1:
            result[name] |= {"std": float(np.std(of_draws, ddof=1)), "draws": of_draws}
    return result
