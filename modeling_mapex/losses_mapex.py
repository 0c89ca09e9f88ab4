"""Losses of MAPEX pretraining as pure functions of tensors: reconstruction targets, and the regularisers that make
experts balanced and modality-specific.
"""

import torch
from torch import nn


def modality_averaging_weights(
    modality_ids: torch.LongTensor, num_modalities: int, token_mask: torch.BoolTensor | None = None
) -> torch.Tensor:
    """Weights with which a matrix product takes the mean of a token quantity within each modality.

    Args:
        modality_ids (`torch.LongTensor` of shape `(num_tokens,)`): Modality of each token.
        num_modalities (`int`): Modalities of the configuration.
        token_mask (`torch.BoolTensor` of shape `(num_tokens,)`, *optional*): False for tokens that do not count.

    Returns:
        `torch.Tensor` of shape `(num_modalities, num_tokens)`: each row sums to 1, or is 0 for an absent modality.
    """
    weights = nn.functional.one_hot(modality_ids, num_modalities).T.to(torch.float32)  # (M, T)
    if token_mask is not None:
        weights = weights * token_mask
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(1.0)


def _mean_over_present(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over the modalities that have tokens: `values (M, ...)`, `weights (M, T)`."""
    present = weights.sum(dim=1)  # 1 or 0
    return torch.einsum("m,m...->...", present.to(values.dtype), values) / present.sum().clamp_min(1.0)


def load_balancing_loss(
    router_logits: torch.Tensor, expert_index: torch.LongTensor, gates: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Load balancing loss of one layer, `E * sum_e f_e P_e / sum_e f_e` (Switch Transformer, arXiv 2101.03961,
    equation 4), with `f` (share of tokens sent to an expert) and `P` (its mean probability) averaged over modalities,
    so that a sensor with many tokens does not outvote the others. It is 1 when balanced.

    Args:
        router_logits (`torch.Tensor` of shape `(num_tokens, num_experts)`): Before noise and pools.
        expert_index (`torch.LongTensor` of shape `(num_tokens, top_k)`): Experts that were chosen.
        gates (`torch.Tensor` of shape `(num_tokens, top_k)`):
            Their weights; 0 marks a place that no allowed expert was left for, which does not count.
        weights (`torch.Tensor` of shape `(num_modalities, num_tokens)`): From [`modality_averaging_weights`].
    """
    num_experts = router_logits.shape[1]
    chosen = torch.zeros_like(router_logits).scatter(1, expert_index, (gates > 0).to(router_logits.dtype))  # (T, E)
    dispatched = _mean_over_present(weights @ chosen, weights)  # (E,)
    probability = _mean_over_present(weights @ router_logits.softmax(dim=-1), weights)  # (E,)
    return num_experts * (dispatched * probability).sum() / dispatched.sum().clamp_min(1e-9)


def router_z_loss(router_logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean square of the log-sum-exp of the router logits (ST-MoE, arXiv 2202.08906, equation 5), averaged over
    modalities; it keeps the logits small. Arguments as in [`load_balancing_loss`].
    """
    return _mean_over_present(weights @ router_logits.logsumexp(dim=-1).square(), weights)


def _entropy(probability: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension."""
    return torch.special.entr(probability.clamp_min(torch.finfo(probability.dtype).tiny)).sum(dim=-1)


def mutual_information(router_logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`I(modality; expert)` of one layer in nats, from mean router probabilities and with the present modalities
    equally likely (Mod-Squad, arXiv 2212.08066, equation 3, with the task replaced by the modality): 0 when all
    modalities use the experts alike, at most `min(log M, log E)`. Arguments as in [`load_balancing_loss`].
    """
    conditional = weights @ router_logits.softmax(dim=-1)  # (M, E)
    marginal = _mean_over_present(conditional, weights)  # (E,)
    return _entropy(marginal) - _mean_over_present(_entropy(conditional), weights)


def entropy_floor_loss(router_logits: torch.Tensor, weights: torch.Tensor, floor: float) -> torch.Tensor:
    """How far, in nats, the entropy of each modality's mean routing falls below `floor`, averaged over modalities
    (after LIMoE, arXiv 2206.02770, section 3.2). It keeps a second expert in use.
    """
    entropy = _entropy(weights @ router_logits.softmax(dim=-1))  # (M,)
    return _mean_over_present((floor - entropy).clamp_min(0.0), weights)


def patchify(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut `(batch, channels, height, width)` into `(batch, num_patches, channels, patch_size * patch_size)`."""
    batch_size, channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    pixels = pixels.reshape(batch_size, channels, rows, patch_size, columns, patch_size)
    return pixels.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, rows * columns, channels, patch_size * patch_size)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """The inverse of [`patchify`] for a `grid` of rows and columns of patches."""
    batch_size, _, channels, _ = patches.shape
    rows, columns = grid
    patches = patches.reshape(batch_size, rows, columns, channels, patch_size, patch_size)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch_size, channels, rows * patch_size, columns * patch_size)


def normalize_groups(
    patches: torch.Tensor, groups: list[list[int]], valid: torch.Tensor | None = None, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise each patch to zero mean and unit variance within each group of correlated bands (MAE, arXiv
    2111.06377, section 3, per group of bands as in MAESTRO, arXiv 2508.10894).

    Args:
        patches (`torch.Tensor` of shape `(batch, num_patches, channels, pixels)`): From [`patchify`].
        groups (`list[list[int]]`): Channel indices of each group; together they hold every channel once.
        valid (`torch.BoolTensor` of shape `(batch, num_patches, 1, pixels)`, *optional*): Pixels that count.

    Returns:
        The normalised patches, and their mean and standard deviation of shape `(batch, num_patches, channels, 1)`:
        `normalised * std + mean` gives the pixels back.
    """
    mean, std = torch.empty_like(patches[..., :1]), torch.empty_like(patches[..., :1])
    for channels in groups:
        values = patches[:, :, channels]
        if valid is None:
            group_mean = values.mean(dim=(2, 3), keepdim=True)
            variance = (values - group_mean).square().mean(dim=(2, 3), keepdim=True)
        else:
            count = (valid.sum(dim=(2, 3), keepdim=True) * len(channels)).clamp_min(1)
            group_mean = torch.where(valid, values, 0.0).sum(dim=(2, 3), keepdim=True) / count
            variance = torch.where(valid, (values - group_mean).square(), 0.0).sum(dim=(2, 3), keepdim=True) / count
        mean[:, :, channels], std[:, :, channels] = group_mean, (variance + eps).sqrt()
    return (patches - mean) / std, mean, std


def masked_mean_square(
    prediction: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean square error over the valid pixels of the hidden patches of one modality.

    Args:
        prediction, target (`torch.Tensor` of shape `(batch, num_patches, channels, pixels)`)
        hidden (`torch.BoolTensor` of shape `(batch, num_patches)`): Patches to be reconstructed.
        valid (`torch.BoolTensor` of shape `(batch, num_patches, 1, pixels)`, *optional*): Pixels that count.

    Returns:
        The error, a scalar, and how many values it is the mean of; 0 and 0 where there are none.
    """
    counted = hidden[:, :, None, None] if valid is None else hidden[:, :, None, None] & valid  # (B, N, 1, 1 or P)
    # Chosen before the square: a target that does not count may be NaN, and NaN times a zero gradient is NaN.
    difference = torch.where(counted, prediction - target, 0.0)
    count = counted.expand_as(difference).sum()
    return difference.square().sum() / count.clamp_min(1), count
