"""Measures how much each modality uses each expert, in the form that `MapexConfig.expert_statistics` keeps: sums while
batches pass, and plain lists at the end. It observes; what to keep is decided in `pruning_mapex`.
"""

import torch


class ExpertRecorder:
    """Collects, per MoE layer and modality, what the tokens did with the experts.

    Args:
        expert_ids (`list[list[int]]`): Original ids of the experts that each MoE layer holds.
        num_experts (`int`): Experts of the unpruned model; statistics are indexed by original id.
        modalities (`list[str]`): Names of the modalities, in the order of their indices.
        top_k (`int`): Experts per token.
        subset_errors (`bool`):
            Also measure, for every subset of a layer's experts, the error that keeping only it makes. It needs the
            output of all experts for each token.
    """

    def __init__(
        self, expert_ids: list[list[int]], num_experts: int, modalities: list[str], top_k: int, subset_errors: bool
    ):
        self.expert_ids = expert_ids
        self.num_experts = num_experts
        self.modalities = modalities
        self.top_k = top_k
        self.subset_errors = subset_errors
        self._sums: list[torch.Tensor | None] = [None] * len(expert_ids)  # each (3, M, experts of the layer)
        self._errors: list[torch.Tensor | None] = [None] * len(expert_ids)  # each (M, 2 ** experts of the layer)
        self._tokens: torch.Tensor | None = None  # (M,)

    def count_tokens(self, modality_ids: torch.LongTensor) -> None:
        """Add the tokens of one batch, `modality_ids` of shape `(num_tokens,)`; call it once per batch."""
        counts = torch.bincount(modality_ids, minlength=len(self.modalities))
        self._tokens = counts if self._tokens is None else self._tokens + counts

    def add_routing(
        self,
        layer: int,
        modality_ids: torch.LongTensor,
        expert_index: torch.LongTensor,
        gates: torch.Tensor,
        norms: torch.Tensor,
    ) -> None:
        """Add the choices of one layer.

        Args:
            layer (`int`): Position among the MoE layers.
            modality_ids (`torch.LongTensor` of shape `(num_tokens,)`)
            expert_index (`torch.LongTensor` of shape `(num_tokens, top_k)`): Chosen experts, by position in the layer.
            gates (`torch.Tensor` of shape `(num_tokens, top_k)`): Weights of the chosen experts.
            norms (`torch.Tensor` of shape `(num_tokens, top_k)`): Euclidean norms of their outputs.
        """
        held = len(self.expert_ids[layer])
        cells = (modality_ids[:, None] * held + expert_index).flatten()  # (T * k,)
        gates = gates.flatten()
        quantities = torch.stack([(gates > 0).to(gates.dtype), gates, gates * norms.to(gates.dtype).flatten()])
        sums = _sum_by(quantities, cells, len(self.modalities) * held).view(3, len(self.modalities), held)
        self._sums[layer] = sums if self._sums[layer] is None else self._sums[layer] + sums

    def add_subset_errors(
        self, layer: int, modality_ids: torch.LongTensor, router_logits: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Add the squared error that each subset of a layer's experts would make, against all of them.

        Args:
            layer (`int`): Position among the MoE layers.
            modality_ids (`torch.LongTensor` of shape `(num_tokens,)`)
            router_logits (`torch.Tensor` of shape `(num_tokens, num_experts)`)
            outputs (`torch.Tensor` of shape `(num_tokens, num_experts, hidden_size)`): Output of every expert.
        """
        num_experts = outputs.shape[1]
        outputs = outputs.to(router_logits.dtype)
        gram = outputs @ outputs.transpose(1, 2)  # (T, E, E)
        full = self._gates(router_logits, list(range(num_experts)))
        squared = []
        for subset in range(2**num_experts):
            kept = [expert for expert in range(num_experts) if subset >> expert & 1]
            difference = full - self._gates(router_logits, kept)  # (T, E)
            squared.append(torch.einsum("te,tef,tf->t", difference, gram, difference).clamp_min(0.0))
        errors = _sum_by(torch.stack(squared), modality_ids, len(self.modalities)).T  # (M, 2 ** E)
        self._errors[layer] = errors if self._errors[layer] is None else self._errors[layer] + errors

    def _gates(self, router_logits: torch.Tensor, kept: list[int]) -> torch.Tensor:
        """Dense gates `(num_tokens, num_experts)` of the router restricted to the `kept` experts; zero for none."""
        gates = torch.zeros_like(router_logits)
        if not kept:
            return gates
        probability = router_logits[:, kept].softmax(dim=-1)
        value, index = probability.topk(min(self.top_k, len(kept)), dim=-1)
        value = value / value.sum(dim=-1, keepdim=True)
        return gates.scatter(1, torch.tensor(kept, device=index.device)[index], value)

    def statistics(self) -> dict[str, dict]:
        """The result for the modalities that had tokens, as `MapexConfig.expert_statistics` keeps it.

        Per modality: `tokens` (how many were seen) and, for each MoE layer a list indexed by original expert id,
        `usage` (share of the tokens sent to the expert; sums to the experts per token), `gate` (mean weight; sums to
        1), `saliency` (mean of weight times norm of the expert's output, 0 for a token that did not use it), and if
        asked for `subset_error` (per subset of experts, as a bit mask of original ids, the mean squared error of the
        layer's output when only they are kept; `None` for subsets with an expert that the layer does not hold).

        Raises:
            ValueError: no batch was seen, or a value is not finite.
        """
        if self._tokens is None:
            raise ValueError("No batches to calibrate on: `batches` was empty.")
        result = {}
        for index, name in enumerate(self.modalities):
            tokens = int(self._tokens[index])
            if tokens == 0:
                continue
            entry = {"tokens": tokens}
            for position, criterion in enumerate(("usage", "gate", "saliency")):
                entry[criterion] = [
                    self._by_original_id(sums[position, index] / tokens, ids)
                    for sums, ids in zip(self._sums, self.expert_ids)
                ]
            if self.subset_errors:
                entry["subset_error"] = [
                    None if errors is None else self._by_original_subset(errors[index] / tokens, ids)
                    for errors, ids in zip(self._errors, self.expert_ids)
                ]
            result[name] = entry
        return result

    def _by_original_id(self, values: torch.Tensor, ids: list[int]) -> list[float]:
        if not torch.isfinite(values).all():
            raise ValueError("The expert statistics are not finite: check the inputs and weights for NaN and infinity.")
        row = [0.0] * self.num_experts
        for expert_id, value in zip(ids, values.tolist()):
            row[expert_id] = value
        return row

    def _by_original_subset(self, values: torch.Tensor, ids: list[int]) -> list[float | None]:
        row: list[float | None] = [None] * 2**self.num_experts
        for subset, value in enumerate(values.tolist()):
            row[sum(1 << expert_id for position, expert_id in enumerate(ids) if subset >> position & 1)] = value
        return row


def _sum_by(values: torch.Tensor, index: torch.LongTensor, size: int) -> torch.Tensor:
    """Sums `(n, size)` of `values (n, T)` by `index (T,)`, in float64, so that they do not depend on how the data is
    cut into batches; in float32 on MPS, which has no float64.
    """
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    return torch.zeros(values.shape[0], size, dtype=dtype, device=values.device).index_add_(1, index, values.to(dtype))
