"""Measures of routing: how far experts have specialised by modality, and which do nothing. Pure functions of what a
training step or `calibrate_experts` has counted.
"""

import math

import torch

from .losses_mapex import PretrainingSums, mutual_information


DEAD_SHARE = 0.01  # an expert to which no modality sends this share of its tokens counts as dead


def normalized_mutual_information(probability: torch.Tensor, present: torch.BoolTensor | None = None) -> float:
    """`I(modality; expert) / min(log M, log E)` of one layer: 0 when all modalities use the experts alike, 1 when each
    has experts of its own (or each expert a modality of its own).

    Args:
        probability (`torch.Tensor` of shape `(num_modalities, num_experts)`): Mean routing of each modality.
        present (`torch.BoolTensor` of shape `(num_modalities,)`, *optional*): Rows that count. Default: all.

    Returns:
        `float`; NaN with fewer than two modalities or experts, where there is nothing to specialise.
    """
    if present is None:
        present = torch.ones(probability.shape[0], dtype=torch.bool, device=probability.device)
    most = min(int(present.sum()), probability.shape[1])
    return mutual_information(probability, present).item() / math.log(most) if most > 1 else math.nan


def effective_experts(probability: torch.Tensor) -> torch.Tensor:
    """How many experts each modality uses, weighted: the exponential of the entropy of its mean routing `(M, E)`;
    shape `(M,)`, between 1 and `E`.
    """
    return torch.special.entr(probability.double()).sum(dim=-1).exp()


def dead_experts(dispatched: torch.Tensor, top_k: int) -> int:
    """Experts to which no modality sends 1 % of its tokens.

    Args:
        dispatched (`torch.Tensor` of shape `(num_modalities, num_experts)`): Share of the tokens sent to each expert.
        top_k (`int`): Experts per token. A layer with no more experts than that has none to choose among.
    """
    return 0 if dispatched.shape[1] <= top_k else int((dispatched.amax(dim=0) < DEAD_SHARE).sum())


def routing_metrics(sums: PretrainingSums, config) -> dict[str, float]:
    """What a training run logs of its routers: per MoE layer and on average the normalised mutual information, the
    entropy of the mean routing of a modality in nats and the effective experts (each a mean over modalities), and the
    number of dead experts.

    Args:
        sums (`PretrainingSums`): Of one or several steps.
        config (`MapexConfig`): Of the model.

    Returns:
        `dict[str, float]`: like `{"normalized_mutual_information": 0.8, "normalized_mutual_information/layer_1": ...}`;
        without the information where there is one modality, and it is not defined.
    """
    layers = [layer for layer, ids in zip(config.moe_layers, config.expert_ids) if len(ids) > 1]
    present = sums.tokens > 0
    metrics: dict[str, float] = {}
    for layer, (probability, dispatched, _) in zip(layers, sums.routing_means()):
        used = effective_experts(probability[present])
        values = {
            "normalized_mutual_information": normalized_mutual_information(probability, present),
            "router_entropy": used.log().mean().item(),
            "effective_experts": used.mean().item(),
            "dead_experts": float(dead_experts(dispatched[present], config.num_experts_per_tok)),
        }
        for name, value in values.items():
            if math.isnan(value):
                continue
            metrics[f"{name}/layer_{layer}"] = value
            whole = value if name == "dead_experts" else value / len(layers)
            metrics[name] = metrics.get(name, 0.0) + whole
    return metrics
