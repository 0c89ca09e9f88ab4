"""Losses of MAPEX pretraining as pure functions of tensors: reconstruction targets, and the regularisers that make
experts balanced and modality-specific.
"""

from dataclasses import dataclass

import torch
from torch import nn


def modality_membership(
    modality_ids: torch.LongTensor, num_modalities: int, token_mask: torch.BoolTensor | None = None
) -> torch.Tensor:
    """Matrix that sums a token quantity within each modality.

    Args:
        modality_ids (`torch.LongTensor` of shape `(num_tokens,)`): Modality of each token.
        num_modalities (`int`): Modalities of the configuration.
        token_mask (`torch.BoolTensor` of shape `(num_tokens,)`, *optional*): False for tokens that do not count.

    Returns:
        `torch.Tensor` of shape `(num_modalities, num_tokens)`: 1 where the token is of the modality, else 0.
    """
    membership = nn.functional.one_hot(modality_ids, num_modalities).T.to(torch.float32)  # (M, T)
    return membership if token_mask is None else membership * token_mask


class _AllReduce(torch.autograd.Function):
    """Sum over processes, of values and of gradients. torch's own lies in a private module since its public one was
    deprecated.
    """

    @staticmethod
    def forward(ctx, values: torch.Tensor, process_group) -> torch.Tensor:
        ctx.process_group = process_group
        total = values.clone()
        torch.distributed.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.process_group)
        return total, None


@dataclass
class PretrainingSums:
    """All that the losses of a step are computed from, as sums over tokens and pixels. The sums of the parts of a batch
    add up to those of the whole, whether the parts differ in modalities or size or lie on different processes: so the
    losses, which are no means over samples, are the same however a batch is divided.

    Args:
        tokens (`torch.Tensor` of shape `(num_modalities,)`): Tokens that were routed.
        router (`tuple[torch.Tensor]`): Per layer with a router, from [`router_sums`].
        squared_error, values (`torch.Tensor` of shape `(num_modalities,)`): Of the reconstruction, and their number.
    """

    tokens: torch.Tensor
    router: tuple[torch.Tensor, ...]
    squared_error: torch.Tensor
    values: torch.Tensor

    @classmethod
    def zeros(cls, config, device: torch.device | None = None) -> "PretrainingSums":
        """The sums over nothing, for a model of this `MapexConfig`."""
        count = len(config.modalities)
        router = [torch.zeros(count, 2 * len(ids) + 1, device=device) for ids in config.expert_ids if len(ids) > 1]
        tokens, squared_error, values = torch.zeros(3, count, device=device)
        return cls(tokens, tuple(router), squared_error, values)

    def __add__(self, other: "PretrainingSums") -> "PretrainingSums":
        return PretrainingSums(
            self.tokens + other.tokens,
            tuple(one + another for one, another in zip(self.router, other.router)),
            self.squared_error + other.squared_error,
            self.values + other.values,
        )

    def all_reduce(self, process_group) -> "PretrainingSums":
        """The sums over the processes of a group. Differentiable: where each process takes the gradient of the same
        loss of these sums and the gradients are then averaged, as DDP does, the result is that of one process.
        """
        parts = (self.tokens, *self.router, self.squared_error, self.values)
        flat = _AllReduce.apply(torch.cat([part.flatten() for part in parts]), process_group)
        pieces = flat.split([part.numel() for part in parts])
        tokens, *router, squared_error, values = (piece.view_as(part) for piece, part in zip(pieces, parts))
        return PretrainingSums(tokens, tuple(router), squared_error, values)

    def detach(self) -> "PretrainingSums":
        router = tuple(part.detach() for part in self.router)
        return PretrainingSums(self.tokens.detach(), router, self.squared_error.detach(), self.values.detach())

    def routing_means(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per layer, means over the tokens of each modality: probability of each expert `(M, E)`, share of the tokens
        sent to it `(M, E)`, and squared log-sum-exp of the logits `(M,)`; zero for absent modalities.
        """
        means = [sums / self.tokens[:, None].clamp_min(1.0) for sums in self.router]
        experts = [(mean.shape[1] - 1) // 2 for mean in means]
        return [(mean[:, :held], mean[:, held:-1], mean[:, -1]) for mean, held in zip(means, experts)]

    def reconstruction_errors(self) -> torch.Tensor:
        """Mean square error of each modality `(M,)`; zero where nothing was hidden."""
        return self.squared_error / self.values.clamp_min(1.0)


def router_sums(
    router_logits: torch.Tensor, expert_index: torch.LongTensor, gates: torch.Tensor, membership: torch.Tensor
) -> torch.Tensor:
    """What one layer adds to [`PretrainingSums`].

    Args:
        router_logits (`torch.Tensor` of shape `(num_tokens, num_experts)`): Before noise and pools.
        expert_index (`torch.LongTensor` of shape `(num_tokens, top_k)`): Experts that were chosen.
        gates (`torch.Tensor` of shape `(num_tokens, top_k)`):
            Their weights; 0 marks a place that no allowed expert was left for, which does not count.
        membership (`torch.Tensor` of shape `(num_modalities, num_tokens)`): From [`modality_membership`].

    Returns:
        `torch.Tensor` of shape `(num_modalities, 2 * num_experts + 1)`: sums over the tokens of each modality of the
        probability of each expert, of 1 where it was chosen, and of the squared log-sum-exp of the logits.
    """
    log_sum = router_logits.logsumexp(dim=-1, keepdim=True)  # (T, 1)
    chosen = torch.zeros_like(router_logits).scatter(1, expert_index, (gates > 0).to(router_logits.dtype))  # (T, E)
    quantities = torch.cat([(router_logits - log_sum).exp(), chosen, log_sum.square()], dim=1)  # (T, 2 E + 1)
    return membership.to(quantities.dtype) @ quantities


def _mean_over_present(values: torch.Tensor, present: torch.BoolTensor) -> torch.Tensor:
    """Mean of `values (M, ...)` over the modalities that are `present (M,)`."""
    weights = present.to(values.dtype)
    return torch.einsum("m,m...->...", weights, values) / weights.sum().clamp_min(1.0)


def load_balancing_loss(probability: torch.Tensor, dispatched: torch.Tensor, present: torch.BoolTensor) -> torch.Tensor:
    """Load balancing loss of one layer, `E * sum_e f_e P_e / sum_e f_e` (Switch Transformer, arXiv 2101.03961,
    equation 4), with `f` (share of tokens sent to an expert) and `P` (its mean probability) averaged over modalities,
    so that a sensor with many tokens does not outvote the others. It is 1 when balanced.

    Args:
        probability, dispatched (`torch.Tensor` of shape `(num_modalities, num_experts)`):
            From [`PretrainingSums.routing_means`].
        present (`torch.BoolTensor` of shape `(num_modalities,)`): Modalities that have tokens.
    """
    share = _mean_over_present(dispatched, present)  # (E,)
    product = (share * _mean_over_present(probability, present)).sum()
    return probability.shape[1] * product / share.sum().clamp_min(1e-9)


def router_z_loss(squared_log_sum: torch.Tensor, present: torch.BoolTensor) -> torch.Tensor:
    """Mean square of the log-sum-exp of the router logits (ST-MoE, arXiv 2202.08906, equation 5), averaged over
    modalities; it keeps the logits small. `squared_log_sum (M,)` is the third of [`PretrainingSums.routing_means`].
    """
    return _mean_over_present(squared_log_sum, present)


def _entropy(probability: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension."""
    return torch.special.entr(probability.clamp_min(torch.finfo(probability.dtype).tiny)).sum(dim=-1)


def mutual_information(probability: torch.Tensor, present: torch.BoolTensor) -> torch.Tensor:
    """`I(modality; expert)` of one layer in nats, from mean router probabilities `(M, E)` and with the present
    modalities equally likely (Mod-Squad, arXiv 2212.08066, equation 3, with the task replaced by the modality): 0 when
    all modalities use the experts alike, at most `min(log M, log E)`.
    """
    marginal = _mean_over_present(probability, present)  # (E,)
    return _entropy(marginal) - _mean_over_present(_entropy(probability), present)


def entropy_floor_loss(probability: torch.Tensor, present: torch.BoolTensor, floor: float) -> torch.Tensor:
    """How far, in nats, the entropy of each modality's mean routing `(M, E)` falls below `floor`, averaged over
    modalities (after LIMoE, arXiv 2206.02770, section 3.2). It keeps a second expert in use.
    """
    return _mean_over_present((floor - _entropy(probability)).clamp_min(0.0), present)


def pretraining_losses(sums: PretrainingSums, config, mutual_information_scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The loss of pretraining and its parts, with the coefficients of a `MapexConfig`; reconstruction is averaged over
    modalities, the losses of routers summed over layers.

    Returns:
        `dict[str, torch.Tensor]`: scalars `loss`, `reconstruction_loss`, `load_balancing_loss`, `router_z_loss`,
        `mutual_information`, `entropy_floor_loss`.
    """
    present = sums.tokens > 0
    parts = {
        "reconstruction_loss": _mean_over_present(sums.reconstruction_errors(), sums.values > 0),
        **dict.fromkeys(
            ("load_balancing_loss", "router_z_loss", "mutual_information", "entropy_floor_loss"),
            sums.tokens.new_zeros(()),
        ),
    }
    for probability, dispatched, squared_log_sum in sums.routing_means():
        parts["load_balancing_loss"] = parts["load_balancing_loss"] + load_balancing_loss(
            probability, dispatched, present
        )
        parts["router_z_loss"] = parts["router_z_loss"] + router_z_loss(squared_log_sum, present)
        parts["mutual_information"] = parts["mutual_information"] + mutual_information(probability, present)
        if config.router_entropy_floor > 0:
            floor = entropy_floor_loss(probability, present, config.router_entropy_floor)
            parts["entropy_floor_loss"] = parts["entropy_floor_loss"] + floor
    loss = (
        parts["reconstruction_loss"]
        + config.router_aux_loss_coef * parts["load_balancing_loss"]
        + config.router_z_loss_coef * parts["router_z_loss"]
        + config.router_entropy_coef * parts["entropy_floor_loss"]
        - mutual_information_scale * config.mutual_information_coef * parts["mutual_information"]
    )
    return {"loss": loss, **parts}


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


def masked_squared_error(
    prediction: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the squared error over the valid pixels of the hidden patches of one modality.

    Args:
        prediction, target (`torch.Tensor` of shape `(batch, num_patches, channels, pixels)`)
        hidden (`torch.BoolTensor` of shape `(batch, num_patches)`): Patches to be reconstructed.
        valid (`torch.BoolTensor` of shape `(batch, num_patches, 1, pixels)`, *optional*): Pixels that count.

    Returns:
        The sum, a scalar, and how many values it is over.
    """
    counted = hidden[:, :, None, None] if valid is None else hidden[:, :, None, None] & valid  # (B, N, 1, 1 or P)
    # Chosen before the square: a target that does not count may be NaN, and NaN times a zero gradient is NaN.
    difference = torch.where(counted, prediction - target, 0.0)
    count = counted.sum() * (difference[0, 0].numel() // counted[0, 0].numel())
    return difference.square().sum(), count
