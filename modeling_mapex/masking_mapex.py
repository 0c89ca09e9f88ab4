"""What masked pretraining hides in a step: tokens from the encoder, and experts from a modality. Pure functions; all
randomness comes in through an argument.
"""

from typing import NamedTuple

import torch
from torch import nn

from .tokens_mapex import TokenLayout


class PretrainingNoise(NamedTuple):
    """Every random draw of one pretraining step, so that a step can be repeated, split over processes, or tested.

    Attributes:
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens)`): Uniform in [0, 1); orders the tokens of a modality.
        shares (`torch.Tensor` of shape `(batch_size, num_modalities)`): Exponential; normalised it is Dirichlet(1).
        dropout (`torch.Tensor` of shape `(batch_size, num_modalities)`): Uniform; a low one drops the modality.
        pools (`torch.Tensor` of shape `(num_moe_layers, num_modalities)`): Uniform; the size of each pool of experts.
        router (`torch.Tensor` of shape `(num_moe_layers, batch_size, num_visible, num_experts)`): Standard normal.
    """

    tokens: torch.Tensor
    shares: torch.Tensor
    dropout: torch.Tensor
    pools: torch.Tensor
    router: torch.Tensor


def num_visible_tokens(num_tokens: int, mask_ratio: float) -> int:
    """How many of `num_tokens` the encoder sees, at least one."""
    return max(1, round(num_tokens * (1.0 - mask_ratio)))


def draw_pretraining_noise(
    batch_size: int,
    num_tokens: int,
    num_visible: int,
    num_modalities: int,
    num_moe_layers: int,
    num_experts: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> PretrainingNoise:
    """Draw a [`PretrainingNoise`] from `generator` (default: torch's global one); the result lies on `device`."""
    source = device if generator is None else generator.device

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=source).to(device)

    return PretrainingNoise(
        tokens=uniform(batch_size, num_tokens),
        shares=-torch.log1p(-uniform(batch_size, num_modalities)),
        dropout=uniform(batch_size, num_modalities),
        pools=uniform(num_moe_layers, num_modalities),
        router=torch.randn(num_moe_layers, batch_size, num_visible, num_experts, generator=generator, device=source).to(
            device
        ),
    )


def sample_visible_tokens(
    layout: TokenLayout,
    noise: PretrainingNoise,
    *,
    mask_ratio: float,
    modality_dropout_prob: float = 0.0,
) -> tuple[torch.LongTensor, torch.BoolTensor, torch.BoolTensor]:
    """Choose the tokens that the encoder sees: a budget per sample, split over its modalities by Dirichlet(1) shares
    (MultiMAE, arXiv 2204.01678, section 3.2).

    A modality with share `p` offers its tokens, in random order `r = 0, 1, ...`, at the price `(r + 0.5) / p`, and
    the cheapest are taken. That is Webster's method of apportionment: the parts follow the shares, add up to the
    budget exactly, and a modality that has run out leaves its rest to the others.

    Args:
        layout (`TokenLayout`): The tokens of the batch.
        noise (`PretrainingNoise`): Its `tokens`, `shares` and `dropout` are used.
        mask_ratio (`float`): Share of the present tokens to hide.
        modality_dropout_prob (`float`): Probability of showing nothing of a modality; a sample keeps at least one.

    Returns:
        `visible_ids` (`torch.LongTensor` of shape `(batch_size, num_visible)`): positions of the visible tokens in the
        sequence, ascending.
        `visible_mask` (`torch.BoolTensor` of shape `(batch_size, num_visible)`): False where a sample has fewer tokens
        to show than the batch has places; its `visible_ids` there are to be ignored.
        `hidden` (`torch.BoolTensor` of shape `(batch_size, num_tokens)`): present tokens that are to be reconstructed.
    """
    batch_size, num_tokens = noise.tokens.shape
    num_visible = num_visible_tokens(num_tokens, mask_ratio)
    present = layout.token_mask
    if present is None:
        present = torch.ones(batch_size, num_tokens, dtype=torch.bool, device=noise.tokens.device)

    counts = torch.zeros_like(noise.shares, dtype=torch.long)  # (B, M), tokens of each modality
    counts = counts.index_add(1, layout.modality_ids, present.long())
    offered = counts > 0
    if modality_dropout_prob > 0:
        kept = offered & (noise.dropout >= modality_dropout_prob)
        # Where all were dropped, the one with the highest draw stays.
        highest = noise.dropout.masked_fill(~offered, -1.0).argmax(dim=1)
        kept |= offered & nn.functional.one_hot(highest, offered.shape[1]).bool() & ~kept.any(dim=1, keepdim=True)
        offered = kept
    shown = present & offered[:, layout.modality_ids]  # (B, N)

    order = torch.where(shown, noise.tokens, 2.0)  # tokens that cannot be shown come last
    prices = torch.empty_like(order)
    for part in layout.slices().values():
        rank = order[:, part].argsort(dim=1).argsort(dim=1)
        share = noise.shares[:, layout.modality_ids[part]].clamp_min(1e-9)  # (B, n), the same for all n tokens
        prices[:, part] = (rank + 0.5) / share
    prices = prices.masked_fill(~shown, torch.inf)

    budget = (counts.sum(dim=1) * (1.0 - mask_ratio)).round().clamp_min(1).long()  # (B,)
    visible_ids = prices.topk(num_visible, dim=1, largest=False).indices  # cheapest first
    places = torch.arange(num_visible, device=prices.device)
    visible_mask = (places[None] < budget[:, None]) & prices.gather(1, visible_ids).isfinite()  # (B, V)
    # Ascending positions: the tokens of a modality stand together, and no sample depends on the order of the draw.
    visible_ids = torch.where(visible_mask, visible_ids, num_tokens).sort(dim=1).values
    visible_mask = visible_ids < num_tokens
    visible_ids = torch.where(visible_mask, visible_ids, 0)

    is_visible = torch.zeros_like(present, dtype=torch.long).scatter_add_(1, visible_ids, visible_mask.long()) > 0
    return visible_ids, visible_mask, present & ~is_visible


def modality_pools(logits: torch.Tensor, membership: torch.Tensor, draws: torch.Tensor) -> torch.BoolTensor:
    """The experts that each modality may use in this step: the `s` with its highest mean probability in the batch,
    with `s` uniform on 1 .. E (EMO, arXiv 2605.06663). Trained so, a modality learns to get along with few experts, and
    which ones: the regime that pruning creates.

    Args:
        logits (`torch.Tensor` of shape `(T, num_experts)`)
        membership (`torch.Tensor` of shape `(num_modalities, T)`): From `modality_membership`.
        draws (`torch.Tensor` of shape `(num_modalities,)`): Uniform in [0, 1).

    Returns:
        `torch.BoolTensor` of shape `(num_modalities, num_experts)`.
    """
    num_experts = logits.shape[1]
    probability = membership.to(logits.dtype) @ logits.softmax(dim=-1)  # (M, E), sums rank as means do
    rank = probability.argsort(dim=1, descending=True).argsort(dim=1)
    size = 1 + (draws * num_experts).floor()
    return rank < size[:, None]
