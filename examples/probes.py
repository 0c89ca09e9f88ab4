"""Probes of frozen features, and what they are worth: nearest neighbours, logistic regression, metrics and intervals
over test places. Targets are 0 and 1 `(samples, classes)`, also where a sample has one class.
"""

import warnings
from typing import Any

import numpy as np
from command_line import Stop


KINDS = ("class", "multi_label")
METRICS = {"class": ("accuracy", "macro F1"), "multi_label": ("mean average precision", "micro F1")}
STRENGTHS = tuple(10.0**power for power in range(-3, 4))  # C of the logistic regression
MOST_ITERATIONS = 1000


def neighbor_scores(values: np.ndarray, targets: np.ndarray, others: np.ndarray, neighbors: int) -> np.ndarray:
    """Shares of the votes of the nearest neighbours, `(others, classes)`."""
    from sklearn.neighbors import KNeighborsRegressor

    if len(values) < neighbors:
        raise Stop(f"{neighbors} neighbours cannot vote among {len(values)} training samples: give fewer --neighbors.")
    return KNeighborsRegressor(neighbors, metric="cosine").fit(values, targets).predict(others)


def logistic_scores(
    kind: str, train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray], others: np.ndarray
) -> tuple[np.ndarray, float, bool]:
    """Probabilities `(others, classes)`, with the `C` that is best on `validation`, of equals the lowest; that `C`; and
    whether the optimiser arrived.

    Args:
        kind (`str`): `"class"`, which is one regression over all classes, or `"multi_label"`, one for each.
        train, validation (`tuple[np.ndarray, np.ndarray]`): Values `(samples, features)` and targets.
        others (`np.ndarray` of shape `(others, features)`): What to predict.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    values, targets = train
    scaler = StandardScaler().fit(values)
    values, held_out, others = (scaler.transform(part) for part in (values, validation[0], others))
    best, best_quality = None, -np.inf
    for strength in STRENGTHS:
        arrived, held_out_scores, scores = True, [], []
        for target in [targets.argmax(axis=1)] if kind == "class" else targets.T:
            if np.ptp(target) == 0:  # of a few samples all may have a class, or none: then there is nothing to fit
                held_out_scores.append(np.full((len(held_out), 1), target[0]))
                scores.append(np.full((len(others), 1), target[0]))
                continue
            model = LogisticRegression(C=strength, max_iter=MOST_ITERATIONS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # told of the one that is chosen
                model.fit(values, target)
            arrived &= bool(model.n_iter_.max() < MOST_ITERATIONS)
            columns = slice(None) if kind == "class" else slice(1, None)  # of a class by itself: not, and is
            held_out_scores.append(model.predict_proba(held_out)[:, columns])
            scores.append(model.predict_proba(others)[:, columns])
        quality = metrics(kind, validation[1], np.concatenate(held_out_scores, axis=1))[METRICS[kind][0]].item()
        if quality > best_quality:
            best, best_quality = (np.concatenate(scores, axis=1), strength, arrived), quality
    if best is None:  # all are NaN
        raise Stop("None of the classes is among the validation samples: give --validation a larger share.")
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
