"""Losses of the task heads, and what labels they accept. Pure functions of tensors."""

import torch
from torch import nn


def check_class_labels(labels: torch.Tensor, logits: torch.Tensor, problem_type: str | None) -> None:
    """Raise `ValueError` for labels of a classification that are none. Not looked for in a compiled graph.

    Args:
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`)
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`)
        problem_type (`str`, *optional*): Of the configuration.
    """
    batch_size, num_labels = logits.shape
    wanted = [(batch_size,), (batch_size, 1)] if num_labels == 1 else [(batch_size,), (batch_size, num_labels)]
    if tuple(labels.shape) not in wanted:
        raise ValueError(f"`labels` must be of shape {' or '.join(map(str, wanted))}, got {tuple(labels.shape)}.")
    if torch.compiler.is_compiling():
        return
    if labels.is_floating_point():
        if not torch.isfinite(labels).all():
            raise ValueError("`labels` hold NaN or infinite values: leave such samples out.")
        if problem_type == "multi_label_classification" and not ((labels >= 0) & (labels <= 1)).all():
            raise ValueError("`labels` of a multi-label classification must lie between 0 and 1.")
    elif num_labels > 1 and problem_type in (None, "single_label_classification"):
        if labels.ndim == 2:
            raise ValueError(
                f"`labels` of several classes a sample, {tuple(labels.shape)}, are floats; or set `problem_type` of "
                'the configuration to "multi_label_classification".'
            )
        wrong = (labels < 0) | (labels >= num_labels)
        if wrong.any():
            raise ValueError(
                f"`labels` hold {labels[wrong].unique().tolist()[:10]}, but the classes are 0 .. {num_labels - 1}. Set "
                "`num_labels`, or map your codes to these."
            )


def check_class_map(labels: torch.Tensor, num_labels: int, ignore_index: int) -> None:
    """Raise `ValueError` for labels that are no classes of a map. Not looked for in a compiled graph."""
    if labels.ndim != 3 or labels.is_floating_point():
        raise ValueError(
            f"`labels` must be whole numbers of shape (batch, height, width), got {labels.dtype} {tuple(labels.shape)}."
        )
    if torch.compiler.is_compiling():
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_labels))
    if wrong.any():
        raise ValueError(
            f"`labels` hold {labels[wrong].unique().tolist()[:10]}, but the classes are 0 .. {num_labels - 1}, and "
            f"{ignore_index} is ignored (`semantic_loss_ignore_index`). Map the codes of your data to these, or set "
            "`num_labels`."
        )


def weighted_cross_entropy(
    logits: torch.Tensor, labels: torch.LongTensor, class_weights: list[float] | None = None, ignore_index: int = -100
) -> torch.Tensor:
    """Cross-entropy over the samples or pixels of a batch that count, weighted by class. Zero, with a gradient of zero,
    if none does or all have a weight of zero: torch's own mean would be NaN.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)` or `(batch_size, num_labels, height, width)`)
        labels (`torch.LongTensor` of shape `(batch_size,)` or `(batch_size, height, width)`)
        class_weights (`list[float]`, *optional*): One a class.
        ignore_index (`int`): Label of what does not count.
    """
    labels = labels.to(logits.device)
    weights = torch.ones(logits.shape[1], device=logits.device)
    if class_weights is not None:
        weights = torch.tensor(class_weights, dtype=torch.float32, device=logits.device)
    total = nn.functional.cross_entropy(
        logits.float(), labels, weight=weights, ignore_index=ignore_index, reduction="sum"
    )
    counted = labels != ignore_index
    share = (weights[labels.masked_fill(~counted, 0)] * counted).sum()
    return total / torch.where(share > 0, share, torch.ones_like(share))


def regression_loss(predictions: torch.Tensor, labels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Mean square error in standard deviations over the pixels that have a value; NaN marks those that have none. Zero,
    with a gradient of zero, if none has.

    Args:
        predictions (`torch.Tensor` of shape `(batch_size, height, width)`): In units of the labels.
        labels (`torch.Tensor` of the same shape)
        mean, std (`float`): Of the labels.
    """
    known = ~torch.isnan(labels)
    error = torch.where(known, (predictions.float() - torch.where(known, labels, mean)) / std, 0.0)
    return error.square().sum() / known.sum().clamp_min(1)
