"""The MAPEX model: a pre-norm vision transformer over the tokens of several sensors, in which every second MLP is a
mixture of experts with a router conditioned on the token's modality, its heads for pretraining, classification and
maps, its use as a backbone, and the methods that calibrate and prune it. Experts and attention stay in this file
because transformers looks for them in the module of the `PreTrainedModel`; what has no weights lives in the sibling
modules.
"""

import copy
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput, SemanticSegmenterOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple, maybe_autocast
from transformers.utils.hub import resolve_revision
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, maybe_install_capturing_hooks

from .calibration_mapex import ExpertRecorder
from .checkpoint_mapex import Repository, group_by_modality, open_pruned, staged, upload_checkpoint
from .configuration_mapex import AUTO_MAP, MapexConfig
from .dense_mapex import fourier_features, fuse_maps, fuse_tokens, ground_extent, reference_modality
from .losses_mapex import (
    PretrainingSums,
    masked_squared_error,
    modality_membership,
    normalize_groups,
    patchify,
    pretraining_losses,
    router_sums,
    unpatchify,
)
from .masking_mapex import (
    PretrainingNoise,
    draw_pretraining_noise,
    modality_pools,
    num_visible_tokens,
    sample_visible_tokens,
)
from .pruning_mapex import PrunedCheckpoint, plan_pruning, prune
from .task_losses_mapex import check_class_labels, check_class_map, regression_loss, weighted_cross_entropy
from .tokens_mapex import (
    TokenLayout,
    check_inputs,
    pixels_that_count,
    sincos_embedding,
    token_grids,
    token_layout,
    token_positions,
)
from .windows_mapex import predict_in_windows


POOLING_EPSILON = 1e-6  # added to the variance of tokens that are all equal, whose root has no gradient


@dataclass
class MapexModelOutput(ModelOutput):
    """Output of [`MapexModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`):
            Tokens of all modalities, modality after modality in the order of the configuration; zero for tokens that
            the sample does not have.
        pooler_output (`torch.Tensor` of shape `(batch_size, config.pooled_size)`):
            The tokens that the sample has as one feature, as `config.pooling_type` says.
        modality_ids (`torch.LongTensor` of shape `(batch_size, num_tokens)`):
            Index in the configuration of each token's modality.
        token_mask (`torch.BoolTensor` of shape `(batch_size, num_tokens)`, *optional*):
            False for tokens that the sample does not have. `None` if all have all.
        hidden_states, attentions (`tuple[torch.Tensor]`, *optional*): As everywhere in transformers.
        router_logits (`tuple[torch.Tensor]`, *optional*):
            Per layer with a router `(batch_size * num_tokens, experts of the layer)`, before noise and masks.
        router_indices (`tuple[torch.LongTensor]`, *optional*):
            Per layer with a router `(batch_size * num_tokens, experts per token)`, positions in the layer.
        router_weights (`tuple[torch.Tensor]`, *optional*):
            Of the same shape, the weights of these experts; they sum to 1 for each token.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    modality_ids: torch.LongTensor | None = None
    token_mask: torch.BoolTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    router_indices: tuple[torch.LongTensor, ...] | None = None
    router_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MapexForPreTrainingOutput(ModelOutput):
    """Output of [`MapexForPreTraining`]. With the coefficients of the configuration,
    `loss = reconstruction_loss + router_aux_loss_coef * load_balancing_loss + router_z_loss_coef * router_z_loss
    + router_entropy_coef * entropy_floor_loss
    - mutual_information_scale * mutual_information_coef * mutual_information`.

    Args:
        loss (`torch.Tensor`): What to minimise.
        reconstruction_loss (`torch.Tensor`): Mean over modalities of `reconstruction_losses`.
        load_balancing_loss, router_z_loss, mutual_information, entropy_floor_loss (`torch.Tensor`):
            Each summed over the layers with a router; mutual information and entropy in nats.
        reconstruction_losses (`dict[str, torch.Tensor]`): Per modality, mean square error over hidden valid pixels.
        sums (`PretrainingSums`): What the losses are computed from.
        predictions (`dict[str, torch.Tensor]`):
            Per modality `(batch_size, num_patches, channels, patch_size ** 2)`, in units of the normalised target.
        hidden_patches (`dict[str, torch.BoolTensor]`):
            Per modality `(batch_size, num_patches)`, True where a patch was to be reconstructed.
        hidden_states, attentions, router_logits, router_indices, router_weights:
            Of the encoder, as in [`MapexModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    load_balancing_loss: torch.FloatTensor | None = None
    router_z_loss: torch.FloatTensor | None = None
    mutual_information: torch.FloatTensor | None = None
    entropy_floor_loss: torch.FloatTensor | None = None
    reconstruction_losses: dict[str, torch.FloatTensor] | None = None
    sums: PretrainingSums | None = None
    predictions: dict[str, torch.FloatTensor] | None = None
    hidden_patches: dict[str, torch.BoolTensor] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    router_indices: tuple[torch.LongTensor, ...] | None = None
    router_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MapexImageClassifierOutput(ImageClassifierOutput):
    """`ImageClassifierOutput` with the routing of the encoder, as in [`MapexModelOutput`], where it was asked for."""

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    router_indices: tuple[torch.LongTensor, ...] | None = None
    router_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MapexSemanticSegmenterOutput(SemanticSegmenterOutput):
    """`SemanticSegmenterOutput`, its logits `(batch_size, num_labels, height, width)` of the size of the labels, with
    the routing of the encoder where it was asked for.
    """

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    router_indices: tuple[torch.LongTensor, ...] | None = None
    router_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MapexPixelRegressionOutput(ModelOutput):
    """Output of [`MapexForPixelRegression`].

    Args:
        loss (`torch.Tensor`, *optional*): Mean square error in standard deviations of the labels.
        logits (`torch.Tensor` of shape `(batch_size, height, width)`):
            Values in the unit of the labels; called so as in the regression models of transformers.
        hidden_states, attentions, router_logits, router_indices, router_weights:
            Of the encoder, as in [`MapexModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    router_indices: tuple[torch.LongTensor, ...] | None = None
    router_weights: tuple[torch.FloatTensor, ...] | None = None


class MapexRouting(NamedTuple):
    """What the mixtures of one forward pass have to know beside the hidden states; T tokens, sample after sample.

    Attributes:
        modality_ids (`torch.LongTensor` of shape `(T,)`): Modality of each token.
        token_index (`torch.LongTensor`, *optional*): Positions of the tokens that exist. `None`: all.
        expert_mask (`list[torch.BoolTensor]`, *optional*): Per MoE layer the experts that may be used.
        pools (`torch.Tensor` of shape `(num_moe_layers, num_modalities)`, *optional*): Uniform draws of pool sizes.
        membership (`torch.Tensor` of shape `(num_modalities, T)`, *optional*): Needed with `pools`.
        noise (`torch.Tensor` of shape `(num_moe_layers, T, num_experts)`, *optional*): Added to the router logits.
        recorder (`ExpertRecorder`, *optional*): Collects expert statistics.
    """

    modality_ids: torch.LongTensor
    token_index: torch.LongTensor | None = None
    expert_mask: list[torch.BoolTensor] | None = None
    pools: torch.Tensor | None = None
    membership: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    recorder: ExpertRecorder | None = None


class MapexPatchEmbeddings(nn.Module):
    """Patches of one modality to tokens: a convolution over its bands."""

    def __init__(self, config: MapexConfig, num_channels: int, patch_size: int):
        super().__init__()
        self.projection = nn.Conv2d(num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.projection(pixels.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)  # (B, N, D)


class MapexEmbeddings(nn.Module):
    """Pixels of all modalities to one sequence of tokens: patch + position in metres + modality."""

    def __init__(self, config: MapexConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = nn.ModuleDict(
            {
                name: MapexPatchEmbeddings(config, len(spec["bands"]), spec["patch_size"])
                for name, spec in config.modalities.items()
            }
        )
        self.modality_embeddings = nn.Embedding(len(config.modalities), config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        layout: TokenLayout,
        pixel_values: dict[str, torch.Tensor],
        modality_mask: dict[str, torch.BoolTensor] | None = None,
        valid_mask: dict[str, torch.BoolTensor] | None = None,
        gsd: dict[str, float | torch.Tensor] | None = None,
    ) -> torch.Tensor:
        patches = []
        for name in layout.grids:
            pixels, _ = pixels_that_count(name, pixel_values, modality_mask, valid_mask)
            self._refuse_nan(name, pixels)
            patches.append(self.patch_embeddings[name](pixels))
        hidden_states = torch.cat(patches, dim=1)  # (B, N, D)

        config = self.config
        positions = token_positions(layout, config.modalities, gsd)
        positions = sincos_embedding(positions, config.hidden_size, config.position_unit, config.position_temperature)
        fixed = positions.to(hidden_states.dtype) + self.modality_embeddings(layout.modality_ids)  # (N, D), (B, N, D)
        return self.dropout(hidden_states + fixed)

    def _refuse_nan(self, name: str, pixels: torch.Tensor) -> None:
        """In training on an accelerator the check would make the device wait; there a NaN shows in the loss."""
        if torch.compiler.is_compiling() or (self.training and pixels.device.type != "cpu"):
            return
        # Least and greatest pass on NaN, and are found in a twentieth of the time of a look at each.
        if pixels.numel() and not torch.stack(torch.aminmax(pixels)).isfinite().all():
            raise ValueError(
                f"`pixel_values` of `{name}` holds NaN or infinite values. Mark them False in `valid_mask` "
                f'({{"{name}": bool tensor of shape (batch, height, width)}}), or replace them.'
            )


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference attention. `query`, `key`, `value`: `(batch, heads, tokens, head_dim)`; `attention_mask` is added."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MapexAttention(nn.Module):
    """Multi-head self-attention over the tokens of all modalities."""

    def __init__(self, config: MapexConfig, hidden_size: int, num_attention_heads: int):
        super().__init__()
        self.config = config
        self.num_attention_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, num_tokens, hidden_size = hidden_states.shape
        shape = (batch_size, num_tokens, self.num_attention_heads, self.head_dim)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            self.q_proj(hidden_states).view(shape).transpose(1, 2),
            self.k_proj(hidden_states).view(shape).transpose(1, 2),
            self.v_proj(hidden_states).view(shape).transpose(1, 2),
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
        )
        return self.o_proj(output.reshape(batch_size, num_tokens, hidden_size)), weights


class MapexMLP(nn.Module):
    """A plain transformer MLP; also what a mixture becomes when pruning leaves it one expert."""

    def __init__(self, config: MapexConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.act_fn = ACT2FN[config.hidden_act]
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class MapexTopKRouter(nn.Module):
    """Modality-conditioned router. For a token `x` of modality `m`, after the block's layer norm,
    `z = W (x + a_m) + b_m`; experts that are not allowed get -inf, then softmax, then top-k, then renormalisation. In
    this order, so that leaving an expert out and masking it are the same thing. At least fp32, also under autocast.
    With `config.conditioned_router=False`, for comparison, a plain one: `z = W x`.
    """

    def __init__(self, config: MapexConfig, num_experts: int, moe_index: int):
        super().__init__()
        self.moe_index = moe_index
        self.top_k = min(config.num_experts_per_tok, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))  # W
        self.modality_shift = self.modality_bias = None
        if config.conditioned_router:
            self.modality_shift = nn.Parameter(torch.empty(len(config.modalities), config.hidden_size))  # a
            self.modality_bias = nn.Parameter(torch.empty(len(config.modalities), num_experts))  # b

    def forward(
        self, hidden_states: torch.Tensor, routing: MapexRouting
    ) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(T, hidden_size)`)

        Returns:
            Logits `(T, num_experts)` before noise and masks, weights `(T, top_k)` that sum to 1 for each token, and the
            chosen experts `(T, top_k)`. An expert that is not allowed can fill a place only with weight 0.
        """
        with maybe_autocast(hidden_states.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            weight = self.weight.to(dtype)
            logits = nn.functional.linear(hidden_states.to(dtype), weight)  # (T, E)
            if self.modality_shift is not None:
                # W (x + a_m) + b_m = W x + (W a_m + b_m): the second term is one small row per modality.
                per_modality = (
                    nn.functional.linear(self.modality_shift.to(dtype), weight) + self.modality_bias
                )  # (M, E)
                logits = logits + per_modality[routing.modality_ids]
            scores = logits
            if routing.noise is not None:
                scores = scores + routing.noise[self.moe_index, :, : scores.shape[1]]
            allowed = self._allowed_experts(logits, routing)
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -torch.inf)
            weights, expert_index = scores.softmax(dim=-1).topk(self.top_k, dim=-1)  # (T, k)
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), expert_index

    def _allowed_experts(self, logits: torch.Tensor, routing: MapexRouting) -> torch.BoolTensor | None:
        """Experts that each token may use, `(T, E)` or `(E,)`; `None`: all."""
        allowed = None
        if routing.expert_mask is not None:
            allowed = routing.expert_mask[self.moe_index]
            allowed = allowed if allowed.ndim == 1 else allowed[routing.modality_ids]
        if routing.pools is not None:
            candidates = logits.detach() if allowed is None else logits.detach().masked_fill(~allowed, -torch.inf)
            pool = modality_pools(candidates, routing.membership, routing.pools[self.moe_index])
            pool = pool[routing.modality_ids]
            allowed = pool if allowed is None else allowed & pool
        return allowed


@use_experts_implementation(has_gate=False, has_bias=True)
class MapexStackedExperts(nn.Module):
    """Expert MLPs, stacked in 3-D parameters; `experts_implementation` chooses how they are run."""

    def __init__(self, config: MapexConfig, num_experts: int):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.num_experts = num_experts
        self.act_fn = ACT2FN[config.hidden_act]
        self.up_proj = nn.Parameter(torch.empty(num_experts, inner, width))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, inner))
        self.down_proj = nn.Parameter(torch.empty(num_experts, width, inner))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, width))
        self.register_load_state_dict_pre_hook(_stack_experts)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.LongTensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Reference implementation (`"eager"`).

        Args:
            hidden_states (`torch.Tensor` of shape `(T, hidden_size)`)
            top_k_index, top_k_weights (`torch.Tensor` of shape `(T, top_k)`): Experts of each token and their weights.

        Returns:
            `torch.Tensor` of shape `(T, hidden_size)`
        """
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, place = torch.where(top_k_index == expert)
            inner = self.act_fn(
                nn.functional.linear(hidden_states[token], self.up_proj[expert], self.up_proj_bias[expert])
            )
            expert_output = nn.functional.linear(inner, self.down_proj[expert], self.down_proj_bias[expert])
            weighted = expert_output * top_k_weights[token, place, None]
            output.index_add_(0, token, weighted.to(output.dtype))  # under autocast the product may be narrower
        return output


class MapexExperts(MapexStackedExperts):
    """The experts, under autocast in its precision: the grouped products do not know of autocast by themselves."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.LongTensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As [`MapexStackedExperts.forward`]."""
        device_type = hidden_states.device.type
        if not torch.is_autocast_enabled(device_type):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        dtype = torch.get_autocast_dtype(device_type)
        experts = _CastExperts(self, dtype)
        return MapexStackedExperts.forward(experts, hidden_states.to(dtype), top_k_index, top_k_weights.to(dtype))


class _CastExperts:
    """Experts whose tensors are of another dtype, cast when they are asked for: what an adapter has put in their place
    is cast too.
    """

    def __init__(self, experts: MapexExperts, dtype: torch.dtype):
        self._experts = experts
        self._dtype = dtype

    def __getattr__(self, name: str):
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, torch.Tensor) else value


def _stack_experts(module: MapexStackedExperts, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
    """Before `load_state_dict`: files hold a key for each expert. `from_pretrained` converts them, but `Trainer` loads
    the best model, and the one it goes on with, from the file as it is, and would pass over them with a warning.
    """
    for name in ("up_proj", "down_proj"):
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            keys = [f"{prefix}{expert}.{name}.{kind}" for expert in range(module.num_experts)]
            if all(key in state_dict for key in keys):
                state_dict[f"{prefix}{name}{suffix}"] = torch.stack([state_dict.pop(key) for key in keys])


class MapexSparseMoeBlock(nn.Module):
    """Router and routed experts of one layer."""

    def __init__(self, config: MapexConfig, num_experts: int, moe_index: int):
        super().__init__()
        self.moe_index = moe_index
        self.gate = MapexTopKRouter(config, num_experts, moe_index)
        self.experts = MapexExperts(config, num_experts)

    def forward(self, hidden_states: torch.Tensor, routing: MapexRouting) -> torch.Tensor:
        tokens = hidden_states.flatten(0, 1)  # (T, D)
        logits, weights, expert_index = self.gate(tokens, routing)
        modality_ids, present = routing.modality_ids, routing.token_index
        if present is not None:  # no expert works on tokens that are not there
            tokens, logits, weights, expert_index, modality_ids = (
                values.index_select(0, present) for values in (tokens, logits, weights, expert_index, modality_ids)
            )
        if routing.recorder is None:
            output = self.experts(tokens, expert_index, weights)
        else:
            output = self._recorded(tokens, logits, weights, expert_index, modality_ids, routing.recorder)
        if present is not None:
            output = output.new_zeros(hidden_states.shape).flatten(0, 1).index_copy(0, present, output)
        return output.view_as(hidden_states)

    def _recorded(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        weights: torch.Tensor,
        expert_index: torch.LongTensor,
        modality_ids: torch.LongTensor,
        recorder: ExpertRecorder,
    ) -> torch.Tensor:
        """The same output, with each expert's contribution seen on its own: one place per token and call."""
        outputs = self._single_outputs(tokens, expert_index)  # (T, k, D)
        norms = _norms(outputs)  # (T, k)
        recorder.add_routing(self.moe_index, modality_ids, expert_index, weights, norms)
        if recorder.subset_errors:
            everyone = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
            recorder.add_subset_errors(self.moe_index, modality_ids, logits, self._single_outputs(tokens, everyone))
        return (outputs * weights[:, :, None]).sum(dim=1).to(tokens.dtype)

    def _single_outputs(self, tokens: torch.Tensor, expert_index: torch.LongTensor) -> torch.Tensor:
        """Outputs `(T, n, D)` of the experts `expert_index (T, n)` for each token."""
        count = expert_index.shape[1]
        repeated = tokens.repeat_interleave(count, dim=0)  # (T * n, D)
        ones = repeated.new_ones(repeated.shape[0], 1)
        return self.experts(repeated, expert_index.reshape(-1, 1), ones).view(-1, count, tokens.shape[1])


def _norms(outputs: torch.Tensor) -> torch.Tensor:
    """Euclidean norms over the last dimension, in at least fp32."""
    return torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.promote_types(outputs.dtype, torch.float32))


class MapexLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block. Its MLP is a mixture of experts where there is more than one expert; the shared
    expert, if the configuration has one, works beside it.
    """

    def __init__(
        self,
        config: MapexConfig,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        num_experts: int = 1,
        moe_index: int | None = None,
    ):
        super().__init__()
        self.moe_index = moe_index
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = MapexAttention(config, hidden_size, num_attention_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        if num_experts > 1:
            self.mlp = MapexSparseMoeBlock(config, num_experts, moe_index)
        else:
            self.mlp = MapexMLP(config, hidden_size, intermediate_size)
        self.shared_expert = None
        if moe_index is not None and config.num_shared_experts:
            self.shared_expert = MapexMLP(config, hidden_size, config.num_shared_experts * intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        routing: MapexRouting | None = None,
    ) -> torch.Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask)
        hidden_states = hidden_states + self.dropout(attended)
        normed = self.layernorm_after(hidden_states)
        if isinstance(self.mlp, MapexSparseMoeBlock):
            output = self.mlp(normed, routing)
        else:
            output = self.mlp(normed)
            if self.moe_index is not None and routing.recorder is not None:
                self._record_only_expert(output, routing)
        if self.shared_expert is not None:
            output = output + self.shared_expert(normed)
        return hidden_states + self.dropout(output)

    def _record_only_expert(self, output: torch.Tensor, routing: MapexRouting) -> None:
        """Statistics of a layer that pruning has left one expert: every token uses it, with weight 1."""
        norms = _norms(output.flatten(0, 1))[:, None]  # (T, 1)
        modality_ids = routing.modality_ids
        if routing.token_index is not None:
            norms, modality_ids = norms[routing.token_index], modality_ids[routing.token_index]
        index = torch.zeros_like(norms, dtype=torch.long)
        routing.recorder.add_routing(self.moe_index, modality_ids, index, torch.ones_like(norms), norms)


def _xavier_uniform(weight: torch.Tensor, fan_in: int, fan_out: int) -> None:
    """As `init.xavier_uniform_`, for a parameter whose shape does not tell its fans."""
    bound = (6.0 / (fan_in + fan_out)) ** 0.5
    init.uniform_(weight, -bound, bound)


class MapexPreTrainedModel(PreTrainedModel):
    """Initialisation, loading, saving, calibration and pruning that all MAPEX models share.

    Initialisation, as MAE's (arXiv 2111.06377, appendix A.1): weights of linear layers, experts and patch projections
    Xavier uniform; biases zero; layer norms one and zero; modality embeddings, mask token, router weight and modality
    shift normal with `initializer_range`; router bias zero, so that all experts start nearly equal.
    """

    config: MapexConfig
    base_model_prefix = "mapex"
    # Trainer counts the elements of this input, and ours are dictionaries: a name that no batch has turns that off.
    main_input_name = "flattened_pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # with **kwargs in `forward` Trainer would not divide by the accumulation steps
    _no_split_modules: ClassVar[list[str]] = ["MapexEmbeddings", "MapexLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": MapexLayer,
        "attentions": MapexAttention,
        "router_logits": OutputRecorder(MapexTopKRouter, index=0),
        "router_indices": OutputRecorder(MapexTopKRouter, index=2),
        "router_weights": OutputRecorder(MapexTopKRouter, index=1),
    }

    def __init__(self, config: MapexConfig, *args, **kwargs):
        config.validate()  # fields may have been set since the configuration was made
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):  # a linear layer on the pixels of a patch
            _xavier_uniform(module.weight, module.weight[0].numel(), module.weight.shape[0])
        elif isinstance(module, MapexTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.modality_shift is not None:
                init.normal_(module.modality_shift, mean=0.0, std=std)
                init.zeros_(module.modality_bias)
        elif isinstance(module, MapexExperts):
            for weight in (module.up_proj, module.down_proj):
                _xavier_uniform(weight, weight.shape[2], weight.shape[1])
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)
        elif isinstance(module, MapexDecoder):
            init.normal_(module.mask_token, mean=0.0, std=std)

    _source_revision: str | None = None  # commit of the repository that this model was loaded from
    training_record: dict[str, Any] | None = None  # metrics and hyperparameters for the model card, from MapexTrainer

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        modalities: list[str] | dict[str, list[str] | None] | None = None,
        coverage: float | None = None,
        experts_per_layer: int | list[int] | None = None,
        criterion: str | None = None,
        seed: int | None = None,
        revision: str = "main",
        **kwargs,
    ):
        """As `PreTrainedModel.from_pretrained`, whole or pruned while loading. Opens safetensors only.

        With `modalities` the model is the one that `prune_for_modalities` would make of the whole one, bit for bit, but
        only what it keeps is read; of a checkpoint saved with `shard_by_modality=True`, only files that hold something
        of it are downloaded.

        Args:
            modalities, coverage, experts_per_layer, criterion, seed:
                As in `prune_for_modalities`. The checkpoint must have expert statistics.
            revision (`str`): Branch, tag or commit. The commit is remembered, for the provenance of pruning.
            kwargs: As everywhere in transformers: `dtype`, `device_map`, `token`, `num_labels`, ...

        Raises:
            OSError: no safetensors weights, files that are missing or damaged, or a repository out of reach.
            ValueError: modalities or bands that the checkpoint lacks or has no statistics for, options of pruning
                without `modalities`, or an index that names files outside the checkpoint.
        """
        plan = {
            "coverage": coverage,
            "experts_per_layer": experts_per_layer,
            "criterion": criterion,
            "seed": seed,
        }
        plan = {name: value for name, value in plan.items() if value is not None}
        if plan and modalities is None:
            raise ValueError(f"{sorted(plan)} say how to prune, but `modalities` does not say for what.")
        hub = {name: kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in kwargs}
        revision = resolve_revision(pretrained_model_name_or_path, revision, **hub)
        hub.update({name: kwargs[name] for name in ("force_download", "proxies") if name in kwargs}, revision=revision)
        repository = None
        if pretrained_model_name_or_path is not None:
            layout = {"subfolder": kwargs.get("subfolder", ""), "variant": kwargs.get("variant")}
            repository = Repository(pretrained_model_name_or_path, **layout, **hub)
            if kwargs.setdefault("use_safetensors", True) is False:
                raise OSError(repository.no_weights())
        try:
            if modalities is None:
                if repository is not None and os.path.isdir(repository.name) and not repository.is_adapter():
                    repository.find_weights()  # transformers would follow the index of a folder to anywhere
                kwargs["revision"] = revision
                result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            else:
                result = cls._from_pretrained_pruned(repository, modalities, plan, *args, **kwargs)
        except SafetensorError as error:  # which does not say of what file
            raise OSError(repository.damaged() or str(error)) from error
        except OSError as error:  # transformers would advise to open pickles
            if repository is not None and repository.is_known_to_lack_weights():
                raise OSError(repository.no_weights()) from error
            raise
        model = result[0] if isinstance(result, tuple) else result  # a tuple with output_loading_info=True
        model._source_revision = getattr(revision, "resolved", None)  # None for a local folder
        return result

    @classmethod
    def _from_pretrained_pruned(cls, repository: Repository, modalities, plan: dict[str, Any], *args, **kwargs):
        """`from_pretrained` with `modalities`: plan from the configuration, hand over tensors that are read late."""
        if repository is None or kwargs.get("state_dict") is not None:
            raise ValueError("`modalities` prunes a stored checkpoint: give a folder or a repository, no `state_dict`.")
        refused = [name for name in ("gguf_file", "key_mapping") if kwargs.get(name) is not None]
        if refused:
            raise ValueError(f"{refused} cannot be combined with `modalities`: load the whole model, then prune it.")
        for name in (*repository.hub, "subfolder", "variant", "use_safetensors"):
            kwargs.pop(name, None)
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):
            fields = [
                name for name in kwargs if cls.config_class.is_field(name) and name not in ("dtype", "torch_dtype")
            ]
            config = cls.config_class.from_pretrained(
                config or repository.name,
                subfolder=repository.subfolder,
                **repository.hub,
                **{name: kwargs.pop(name) for name in fields},
            )
        config = copy.deepcopy(config)
        config._name_or_path = repository.name
        with init.no_init_weights(), torch.device("meta"):  # the whole model, without its weights
            whole = cls(copy.deepcopy(config))
        pruned = plan_pruning(
            config,
            modalities,
            revision=getattr(repository.hub["revision"], "resolved", None),
            parameters_before=sum(tensor.numel() for tensor in whole.state_dict().values()),
            **plan,
        )
        ignored = cls._keys_to_ignore_on_load_unexpected or []
        in_place = not kwargs.pop("disable_mmap", False)
        with open_pruned(repository, config, pruned, ignored, in_place=in_place) as tensors:
            if pruned.dtype is None:
                pruned.dtype = next(iter(tensors.values()))[...].dtype
            result = super().from_pretrained(None, *args, config=pruned, state_dict=tensors, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        model.config._name_or_path = repository.name
        model.config.pruning["parameters_after"] = sum(tensor.numel() for tensor in model.state_dict().values())
        return result

    def save_pretrained(
        self,
        save_directory,
        *args,
        shard_by_modality: bool = False,
        coverage: float | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """As `PreTrainedModel.save_pretrained`: weights with one key per expert, configuration, code, image processor
        (if the configuration has the statistics of all modalities) and model card (unless there is one that was
        edited). All is written before anything of an earlier checkpoint is replaced.

        Args:
            shard_by_modality (`bool`):
                Whether to write files by the modalities that need them, see [`group_by_modality`], of which
                `from_pretrained(modalities=...)` downloads and reads only some.
            coverage (`float`, *optional*):
                With `shard_by_modality`: how much of a modality's mass the experts cover that it needs; 0.95 by
                default, as in `prune_for_modalities`.
            push_to_hub (`bool`):
                Whether to upload the folder afterwards, with the arguments of [`~MapexPreTrainedModel.push_to_hub`]
                (`repo_id`, `private`, `commit_message`, ...).
            kwargs: As everywhere in transformers: `max_shard_size`, `variant`, `state_dict`, ...

        Raises:
            ValueError: options that do not go together, or `shard_by_modality` without expert statistics.
            OSError: a folder that cannot be written.
        """
        # They stand right of this module, hence are imported here.
        from .image_processing_mapex import save_image_processor
        from .modelcard_mapex import write_model_card

        if coverage is not None and not shard_by_modality:
            raise ValueError("`coverage` says how to arrange files by modality: give `shard_by_modality=True` with it.")
        has_adapters = getattr(self, "_hf_peft_config_loaded", False)
        if shard_by_modality and (has_adapters or kwargs.get("distributed_checkpoint")):
            raise ValueError(
                "`shard_by_modality` arranges the weights of a whole model: merge adapters first, and save without "
                "`distributed_checkpoint`."
            )
        push = {name: kwargs.pop(name) for name in signature(upload_checkpoint).parameters if name in kwargs}
        if push and not push_to_hub and set(push) != {"token"}:  # transformers takes a token in either case
            raise ValueError(f"{sorted(push)} say how to push: give `push_to_hub=True` with them.")
        self.config.auto_map = dict(AUTO_MAP)  # to the code beside the weights, wherever this model came from
        self._weight_conversions = None  # else transformers repeats the layout of the file it was loaded from
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if kwargs.get("distributed_checkpoint") or not self.should_save_on_this_rank(is_main_process):
            return super().save_pretrained(save_directory, *args, **kwargs)

        variant = kwargs.get("variant")
        with staged(save_directory, variant) as folder:
            super().save_pretrained(folder, *args, **kwargs)
            if shard_by_modality:
                options = {} if coverage is None else {"coverage": coverage}
                if "max_shard_size" in kwargs:
                    options["max_shard_size"] = kwargs["max_shard_size"]
                group_by_modality(folder, self.config, variant=variant, **options)
        save_image_processor(self.config, save_directory)
        write_model_card(self, save_directory)
        if push_to_hub:
            push.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            push["write_card"] = lambda repo_id: write_model_card(self, save_directory, repo_id=repo_id)
            upload_checkpoint(save_directory, **push)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        shard_by_modality: bool = False,
        coverage: float | None = None,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        **kwargs,
    ):
        """Save as [`~MapexPreTrainedModel.save_pretrained`] does and upload to the Hub, in one commit. Weight files of
        an earlier push that are not of this one are deleted in it; a model card that was edited on the Hub stays.

        Args:
            repo_id (`str`): `"user/name"`, or a name in your own account. Made if it does not exist.
            shard_by_modality, coverage, max_shard_size: As in `save_pretrained`.
            tags (`list[str]`, *optional*): Added to those of the model card.
            kwargs: `private`, `token`, `revision` (a branch, made if it does not exist), `create_pr`,
                `commit_message`, `commit_description`.

        Returns:
            `CommitInfo` of huggingface_hub.
        """
        from .modelcard_mapex import write_model_card

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(
                folder, shard_by_modality=shard_by_modality, coverage=coverage, max_shard_size=max_shard_size
            )
            kwargs["write_card"] = lambda full_id: write_model_card(self, folder, tags, full_id)
            return upload_checkpoint(folder, repo_id, **kwargs)

    @torch.no_grad()
    def calibrate_experts(
        self, batches: Iterable[dict[str, Any]], *, subset_errors: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Measure how much each modality uses each expert, and keep the result in `config.expert_statistics`, with
        which the model can later be pruned without data. Runs the encoder on whole inputs, in eval mode; the weights
        and the mode of the model are unchanged. Earlier statistics are replaced.

        Args:
            batches (`Iterable[dict]`):
                What the forward pass takes: `pixel_values` and optionally `modality_mask`, `valid_mask`, `gsd`. Other
                keys, like labels, are not used. Give every modality that you may want to prune for, alone or together.
            subset_errors (`bool`):
                Also measure what `criterion="exhaustive"` needs. Every token then passes through every expert.

        Returns:
            `dict[str, dict]`: Per modality `tokens`, `usage`, `gate`, `saliency`; see [`ExpertRecorder.statistics`].

        Raises:
            ValueError: no batches, more than 8 experts with `subset_errors`, or values that are not finite.
            TypeError: a batch that is not a dictionary with `pixel_values`.
        """
        config = self.config
        if subset_errors and config.num_experts > 8:
            raise ValueError(
                f"`subset_errors` tries all subsets of at most 8 experts, this model has {config.num_experts}. Use the "
                "criteria saliency, usage or gate."
            )
        recorder = ExpertRecorder(
            config.expert_ids, config.num_experts, list(config.modalities), config.num_experts_per_tok, subset_errors
        )
        device = self.device
        modes = [(module, module.training) for module in self.modules()]  # parts may be frozen in eval mode
        self.eval()
        try:
            for batch in logging.tqdm(batches, desc="Calibrating experts", unit="batch"):
                if not hasattr(batch, "keys") or "pixel_values" not in batch:
                    raise TypeError(f"A batch must be a dictionary with `pixel_values`, got {type(batch).__name__}.")
                inputs = {key: batch[key] for key in ("pixel_values", "modality_mask", "valid_mask") if key in batch}
                for key, value in inputs.items():
                    if isinstance(value, dict):  # anything else the forward pass refuses
                        inputs[key] = {name: tensor.to(device) for name, tensor in value.items()}
                self.base_model(**inputs, gsd=batch.get("gsd"), expert_recorder=recorder)
            statistics = recorder.statistics()
        finally:
            for module, training in modes:
                module.training = training
        config.expert_statistics = statistics
        return statistics

    def prune_for_modalities(
        self,
        modalities: list[str] | dict[str, list[str] | None],
        *,
        coverage: float = 0.95,
        experts_per_layer: int | list[int] | None = None,
        criterion: str = "saliency",
        seed: int = 0,
    ) -> PrunedCheckpoint:
        """A smaller model for some of the modalities: their experts, patch embeddings and heads, and nothing else. This
        model is unchanged and shares no memory with the result.

        Args:
            modalities (`list[str]` or `dict[str, list[str] | None]`):
                Modalities to keep; as a mapping also the bands to keep of each, in the order of your channels.
            coverage (`float`):
                Share, in (0, 1], of each kept modality's mass (see `criterion`) that the kept experts of a layer must
                cover. For each modality the fewest experts that do are kept, and of several modalities their union,
                so that pruning for A and B and then for A gives what pruning for A gives.
            experts_per_layer (`int` or `list[int]`, *optional*):
                Keep exactly so many in every, or in each, MoE layer: those that cover most, averaged over the
                modalities. Instead of `coverage`.
            criterion (`str`):
                Mass of an expert for a modality: `"saliency"` (mean of gate times norm of its output), `"usage"` (share
                of tokens), `"gate"` (mean gate); or `"exhaustive"`, the error of the layer's output measured for every
                subset by `calibrate_experts(..., subset_errors=True)`; or, as a control, `"random"`: as many experts as
                saliency would keep, drawn with `seed`.
            seed (`int`): For `criterion="random"` only.

        Returns:
            [`PrunedCheckpoint`]: `(config, state_dict)`, with `build`, `save_pretrained` and `push_to_hub`.

        Raises:
            ValueError: a modality or band that this checkpoint lacks, one without statistics, numbers out of range.
            TypeError: `modalities` is neither a list nor a mapping.
        """
        return prune(
            self.config,
            self.state_dict(),
            modalities,
            model_class=type(self),
            revision=self._source_revision,
            coverage=coverage,
            experts_per_layer=experts_per_layer,
            criterion=criterion,
            seed=seed,
        )


class MapexModel(MapexPreTrainedModel):
    """The MAPEX encoder: tokens and a pooled feature from any subset of the configuration's modalities."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^decoder\."]  # a pretraining checkpoint's, not needed

    def __init__(self, config: MapexConfig):
        super().__init__(config)
        self.embeddings = MapexEmbeddings(config)
        moe_index = {layer: position for position, layer in enumerate(config.moe_layers)}
        self.layers = nn.ModuleList(
            MapexLayer(
                config,
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                num_experts=num_experts,
                moe_index=moe_index.get(layer),
            )
            for layer, num_experts in enumerate(config.num_layer_experts)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    @capture_outputs
    def forward(
        self,
        pixel_values: dict[str, torch.Tensor],
        modality_mask: dict[str, torch.BoolTensor] | None = None,
        valid_mask: dict[str, torch.BoolTensor] | None = None,
        gsd: dict[str, float | torch.Tensor] | None = None,
        visible_ids: torch.LongTensor | None = None,
        visible_mask: torch.BoolTensor | None = None,
        expert_mask: list[torch.BoolTensor] | None = None,
        router_pools: torch.Tensor | None = None,
        router_noise: torch.Tensor | None = None,
        expert_recorder: ExpertRecorder | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_router_logits: bool | None = None,
        output_router_indices: bool | None = None,
        output_router_weights: bool | None = None,
    ) -> MapexModelOutput:
        r"""
        Args:
            pixel_values (`dict[str, torch.Tensor]`):
                Modality to normalised pixels `(batch_size, channels, height, width)`, channels in the order of
                `config.modalities[...]["bands"]`. Any subset of the modalities; sizes may differ, each a multiple of
                its patch size. All are taken to start at the same upper left corner on the ground.
            modality_mask (`dict[str, torch.BoolTensor]`, *optional*):
                Modality to `(batch_size,)`: does the sample have it? Pixels of a sample that does not are never read.
            valid_mask (`dict[str, torch.BoolTensor]`, *optional*):
                Modality to `(batch_size, height, width)`: False for pixels without data. Their values are never read;
                a patch without one valid pixel is no token.
            gsd (`dict[str, float | torch.Tensor]`, *optional*): Metres per pixel, where they differ from the
                configuration's: of all samples, or `(batch_size,)` of each.
            visible_ids (`torch.LongTensor` of shape `(batch_size, num_visible)`, *optional*):
                Encode only these tokens. `visible_mask`, of the same shape, is False for ids to be ignored.
            expert_mask (`list[torch.BoolTensor]`, *optional*):
                Per MoE layer the experts that may be used, `(experts of the layer,)` or `(num_modalities, experts)`.
            router_pools (`torch.Tensor` of shape `(num_moe_layers, num_modalities)`, *optional*):
                Uniform draws; restricts each modality to a pool of experts, see [`modality_pools`].
            router_noise (`torch.Tensor` of shape `(num_moe_layers, batch_size, num_tokens, num_experts)`, *optional*):
                Added to the router logits of the tokens that are encoded.
            expert_recorder (`ExpertRecorder`, *optional*): Collects statistics; used by `calibrate_experts`.

        Raises:
            TypeError, ValueError: inputs that do not fit the configuration; see [`check_inputs`] and [`token_layout`].
                Infinite or NaN pixels are refused too, except in training on an accelerator, where looking for them
                would stall it.
        """
        check_inputs(self.config.modalities, pixel_values, modality_mask, valid_mask, gsd)
        layout = token_layout(self.config.modalities, pixel_values, modality_mask, valid_mask)
        self._check_expert_mask(expert_mask)
        hidden_states = self.embeddings(layout, pixel_values, modality_mask, valid_mask, gsd)  # (B, N, D)
        batch_size = hidden_states.shape[0]
        modality_ids, token_mask = layout.modality_ids.expand(batch_size, -1), layout.token_mask
        if visible_ids is not None:
            hidden_states = hidden_states.gather(1, visible_ids[:, :, None].expand(-1, -1, hidden_states.shape[2]))
            modality_ids = modality_ids.gather(1, visible_ids)
            token_mask = visible_mask

        attention_mask = create_bidirectional_mask(self.config, hidden_states, token_mask)
        routing = self._routing(modality_ids, token_mask, expert_mask, router_pools, router_noise, expert_recorder)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=attention_mask, routing=routing)
        hidden_states = self.layernorm(hidden_states)
        if token_mask is not None:
            hidden_states = hidden_states.masked_fill(~token_mask[:, :, None], 0.0)
        return MapexModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=self._pool(hidden_states, modality_ids, token_mask),
            modality_ids=modality_ids,
            token_mask=token_mask,
        )

    def _check_expert_mask(self, expert_mask: list[torch.BoolTensor] | None) -> None:
        if expert_mask is None:
            return
        ids = self.config.expert_ids
        if len(expert_mask) != len(ids) or any(mask.shape[-1] != len(held) for mask, held in zip(expert_mask, ids)):
            raise ValueError(
                f"`expert_mask` needs one mask per MoE layer, for {[len(held) for held in ids]} experts, got masks of "
                f"shape {[tuple(mask.shape) for mask in expert_mask]}."
            )
        if not torch.compiler.is_compiling() and not all(bool(mask.any(dim=-1).all()) for mask in expert_mask):
            raise ValueError("`expert_mask` leaves a modality without any expert in some layer.")

    def _routing(
        self,
        modality_ids: torch.LongTensor,
        token_mask: torch.BoolTensor | None,
        expert_mask: list[torch.BoolTensor] | None,
        router_pools: torch.Tensor | None,
        router_noise: torch.Tensor | None,
        recorder: ExpertRecorder | None,
    ) -> MapexRouting:
        """What the mixtures need, computed once for all layers."""
        flat_ids = modality_ids.flatten()  # (T,)
        flat_mask = None if token_mask is None else token_mask.flatten()
        token_index = None
        # Leaving out absent tokens saves work but has a shape that depends on data, which a compiled graph cannot have;
        # there they pass through the experts and are ignored after.
        if flat_mask is not None and not torch.compiler.is_compiling() and not flat_mask.all():
            token_index = flat_mask.nonzero().squeeze(1)
        membership = None
        if router_pools is not None:
            membership = modality_membership(flat_ids, len(self.config.modalities), flat_mask)
        if router_noise is not None:
            router_noise = router_noise.flatten(1, 2)  # (L, T, E)
        if recorder is not None:
            recorder.count_tokens(flat_ids if token_index is None else flat_ids[token_index])
        return MapexRouting(flat_ids, token_index, expert_mask, router_pools, membership, router_noise, recorder)

    def _pool(
        self, hidden_states: torch.Tensor, modality_ids: torch.LongTensor, token_mask: torch.BoolTensor | None
    ) -> torch.Tensor:
        if self.config.pooling_type == "mean" and token_mask is None:
            return hidden_states.mean(dim=1)
        # Counts of tokens go beyond what half precision can hold.
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weights = torch.ones_like(modality_ids) if token_mask is None else token_mask
        weights = weights.to(dtype)  # (B, N)
        if self.config.pooling_type == "modality_mean":
            one_hot = nn.functional.one_hot(modality_ids, len(self.config.modalities)).to(weights.dtype)  # (B, N, M)
            counts = (weights[:, :, None] * one_hot).sum(dim=1)  # (B, M)
            weights = weights / counts.gather(1, modality_ids).clamp_min(1.0)
        weights = weights / weights.sum(dim=1, keepdim=True)
        mean = (weights[:, :, None] * hidden_states).sum(dim=1)  # (B, D)
        if self.config.pooling_type != "mean_std":
            return mean.to(hidden_states.dtype)
        variance = (weights[:, :, None] * (hidden_states - mean[:, None]).square()).sum(dim=1)
        std = (variance + POOLING_EPSILON).sqrt()
        return torch.cat([mean, std], dim=1).to(hidden_states.dtype)


def layout_of(outputs: MapexModelOutput, config: MapexConfig, pixel_values: dict[str, torch.Tensor]) -> TokenLayout:
    """Where the tokens of `outputs`, which are of all of `pixel_values`, come from."""
    return TokenLayout(token_grids(config.modalities, pixel_values), outputs.modality_ids[0], outputs.token_mask)


class MapexDecoder(nn.Module):
    """Light transformer from the encoder's visible tokens to the pixels of all tokens."""

    def __init__(self, config: MapexConfig):
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.modality_embeddings = nn.Embedding(len(config.modalities), width)
        self.layers = nn.ModuleList(
            MapexLayer(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(width, len(spec["bands"]) * spec["patch_size"] ** 2)
                for name, spec in config.modalities.items()
            }
        )

    def forward(
        self,
        encoded: torch.Tensor,
        visible_ids: torch.LongTensor,
        visible_mask: torch.BoolTensor,
        layout: TokenLayout,
        gsd: dict[str, float | torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            encoded (`torch.Tensor` of shape `(batch_size, num_visible, hidden_size)`): The encoder's output.
            visible_ids, visible_mask (`torch.Tensor` of shape `(batch_size, num_visible)`): Where it belongs.

        Returns:
            `dict[str, torch.Tensor]`: Modality to `(batch_size, num_patches, channels, patch_size ** 2)`.
        """
        config, num_tokens = self.config, layout.modality_ids.shape[0]
        embedded = self.embed(encoded)  # (B, V, W)
        batch_size, _, width = embedded.shape
        # One place more than tokens: ids to be ignored are written there, and cut off.
        places = torch.where(visible_mask, visible_ids, num_tokens)[:, :, None].expand(-1, -1, width)
        hidden_states = self.mask_token.to(embedded.dtype).expand(batch_size, num_tokens + 1, width)
        hidden_states = hidden_states.scatter(1, places, embedded)[:, :num_tokens]
        positions = token_positions(layout, config.modalities, gsd)
        positions = sincos_embedding(positions, width, config.position_unit, config.position_temperature)
        hidden_states = hidden_states + positions.to(embedded.dtype) + self.modality_embeddings(layout.modality_ids)

        attention_mask = create_bidirectional_mask(config, hidden_states, layout.token_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=attention_mask)
        hidden_states = self.layernorm(hidden_states)
        predictions = {}
        for name, part in layout.slices().items():
            spec = config.modalities[name]
            shape = (batch_size, -1, len(spec["bands"]), spec["patch_size"] ** 2)
            predictions[name] = self.heads[name](hidden_states[:, part]).view(shape)
        return predictions


class MapexForPreTraining(MapexPreTrainedModel):
    """MAPEX with a masked autoencoding head over all modalities, and the losses that make experts specialise."""

    def __init__(self, config: MapexConfig):
        super().__init__(config)
        self.mapex = MapexModel(config)
        self.decoder = MapexDecoder(config)
        self.post_init()
        # transformers would do it when routing is first recorded, under a lock, which a compiled graph cannot take.
        maybe_install_capturing_hooks(self.mapex)

    @can_return_tuple
    def forward(
        self,
        pixel_values: dict[str, torch.Tensor] | None = None,
        modality_mask: dict[str, torch.BoolTensor] | None = None,
        valid_mask: dict[str, torch.BoolTensor] | None = None,
        gsd: dict[str, float | torch.Tensor] | None = None,
        noise: PretrainingNoise | None = None,
        generator: torch.Generator | None = None,
        groups: list[dict[str, Any]] | None = None,
        mutual_information_scale: float = 1.0,
        process_group: Any | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> MapexForPreTrainingOutput:
        r"""
        Modality dropout, pools of experts and router noise apply in training mode only; tokens are hidden in both.

        Args:
            pixel_values, modality_mask, valid_mask, gsd: As in [`MapexModel.forward`]. Invalid pixels are not targets.
            noise (`PretrainingNoise`, *optional*): All random draws of the step, from [`draw_noise`].
            generator (`torch.Generator`, *optional*): Where to draw the noise from, if it is not given.
            groups (`list[dict]`, *optional*):
                Instead of `pixel_values`, a batch in parts whose samples differ in modalities or in size, as
                `MapexCollator(group=True)` makes them; each a dictionary of the arguments above. The losses are those
                of one batch that holds them all, without the work that filling up to a common shape would cost. Pools
                of experts are drawn for each group. The output holds losses and sums only.
            mutual_information_scale (`float`): Multiplies its coefficient; raise it from 0 to 1 to warm up.
            process_group (`torch.distributed.ProcessGroup`, *optional*):
                Compute the losses over the batches of all its processes together: the step is then that of one process
                with all of the data, see [`PretrainingSums.all_reduce`]. Default: of this process's batch alone.
            return_loss (`bool`):
                Whether the output holds `loss`. By this argument Trainer sees that evaluation needs no labels.
            kwargs: `expert_mask` and `output_*`, for [`MapexModel.forward`].

        Raises:
            ValueError: both or neither of `pixel_values` and `groups`, or what [`MapexModel.forward`] refuses.
        """
        if (pixel_values is None) == (not groups):
            raise ValueError("Give either `pixel_values` or a list of `groups` that is not empty.")
        if groups:
            parts = [self._forward_group(generator=generator, **group, **kwargs)["sums"] for group in groups]
            outputs = {"sums": sum(parts[1:], parts[0])}
            seen = {name for group in groups for name in group["pixel_values"]}
        else:
            outputs = self._forward_group(pixel_values, modality_mask, valid_mask, gsd, noise, generator, **kwargs)
            seen = set(pixel_values)
        sums = outputs["sums"]
        if process_group is not None:
            sums = outputs["sums"] = sums.all_reduce(process_group)
        # Differences of nearly equal entropies: not in half precision.
        with maybe_autocast(sums.tokens.device.type, enabled=False):
            losses = pretraining_losses(sums, self.config, mutual_information_scale)
        if self.training and torch.is_grad_enabled():
            losses["loss"] = losses["loss"] + self._zero_of_unseen(seen)
        errors = zip(self.config.modalities, sums.reconstruction_errors())
        losses["reconstruction_losses"] = {
            name: error for name, error in errors if name in seen or process_group is not None
        }
        if not return_loss:
            del losses["loss"]
        return MapexForPreTrainingOutput(**losses, **outputs)

    def _forward_group(
        self,
        pixel_values: dict[str, torch.Tensor],
        modality_mask: dict[str, torch.BoolTensor] | None = None,
        valid_mask: dict[str, torch.BoolTensor] | None = None,
        gsd: dict[str, float | torch.Tensor] | None = None,
        noise: PretrainingNoise | None = None,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """The fields of the output that belong to one group, and the sums of which the losses are made."""
        config = self.config
        check_inputs(config.modalities, pixel_values, modality_mask, valid_mask, gsd)
        layout = token_layout(config.modalities, pixel_values, modality_mask, valid_mask)
        if noise is None:
            noise = self.draw_noise(pixel_values, generator=generator)
        visible_ids, visible_mask, hidden = sample_visible_tokens(
            layout,
            noise,
            mask_ratio=config.mask_ratio,
            modality_dropout_prob=config.modality_dropout_prob if self.training else 0.0,
        )
        use_pools = self.training and config.expert_pools
        use_noise = self.training and config.router_noise_std > 0
        outputs = self.mapex(
            pixel_values,
            modality_mask,
            valid_mask,
            gsd,
            visible_ids=visible_ids,
            visible_mask=visible_mask,
            router_pools=noise.pools if use_pools else None,
            router_noise=noise.router * config.router_noise_std if use_noise else None,
            **{
                **kwargs,
                **dict.fromkeys(("output_router_logits", "output_router_indices", "output_router_weights"), True),
            },
        )
        predictions = self.decoder(outputs.last_hidden_state, visible_ids, visible_mask, layout, gsd)

        hidden_patches = {name: hidden[:, part] for name, part in layout.slices().items()}
        zero = outputs.last_hidden_state.new_zeros((), dtype=torch.float32)
        errors, counts = [], []
        for name in config.modalities:
            error, count = zero, zero
            if name in predictions:
                target, _, _, valid = self._targets(name, pixel_values[name], valid_mask)
                error, count = masked_squared_error(predictions[name].float(), target, hidden_patches[name], valid)
            errors.append(error)
            counts.append(count)
        with maybe_autocast(zero.device.type, enabled=False):
            tokens, router = self._router_sums(outputs)
        return {
            "sums": PretrainingSums(tokens, router, torch.stack(errors), torch.stack(counts).to(zero.dtype)),
            "predictions": predictions,
            "hidden_patches": hidden_patches,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
            "router_logits": outputs.router_logits,
            "router_indices": outputs.router_indices,
            "router_weights": outputs.router_weights,
        }

    def _zero_of_unseen(self, seen: set[str]) -> torch.Tensor | float:
        """Zero, with a gradient of zero for the parameters of modalities that the batch lacks: processes whose batches
        lack different ones must exchange the same gradients, and one process must do as they do.
        """
        total = 0.0
        for name in self.config.modalities:
            if name not in seen:
                parts = (self.mapex.embeddings.patch_embeddings[name], self.decoder.heads[name])
                total = total + sum(0.0 * parameter.sum() for part in parts for parameter in part.parameters())
        return total

    def draw_noise(
        self, pixel_values: dict[str, torch.Tensor], generator: torch.Generator | None = None
    ) -> PretrainingNoise:
        """Draw everything that is random in a step on `pixel_values`."""
        config = self.config
        layout = token_layout(config.modalities, pixel_values)
        num_tokens = layout.modality_ids.shape[0]
        return draw_pretraining_noise(
            next(iter(pixel_values.values())).shape[0],
            num_tokens,
            num_visible_tokens(num_tokens, config.mask_ratio),
            len(config.modalities),
            len(config.moe_layers),
            config.num_experts,
            generator=generator,
            device=layout.modality_ids.device,
        )

    def _targets(
        self, name: str, pixels: torch.Tensor, valid_mask: dict[str, torch.BoolTensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.BoolTensor | None]:
        """Normalised target patches in fp32, their mean and standard deviation, and which pixels count."""
        config = self.config
        spec = config.modalities[name]
        patches = patchify(pixels.float(), spec["patch_size"])  # (B, N, C, P)
        valid = (valid_mask or {}).get(name)
        if valid is not None:
            valid = patchify(valid.to(pixels.device)[:, None], spec["patch_size"])  # (B, N, 1, P)
        bands = spec["bands"]
        if config.norm_pix_loss == "none":
            mean = torch.zeros_like(patches[..., :1])
            return patches, mean, torch.ones_like(mean), valid
        groups = [bands]
        if config.norm_pix_loss == "group":
            groups = spec.get("target_groups") or groups
        groups = [[bands.index(band) for band in group] for group in groups]
        return (*normalize_groups(patches, groups, valid), valid)

    def _router_sums(self, outputs: MapexModelOutput) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Visible tokens of each modality, and what the routers did with them, as [`PretrainingSums`] holds them."""
        mask = None if outputs.token_mask is None else outputs.token_mask.flatten()
        membership = modality_membership(outputs.modality_ids.flatten(), len(self.config.modalities), mask)
        tokens = membership.sum(dim=1)
        if not outputs.router_logits:
            return tokens, ()
        learns = self.mapex.embeddings.modality_embeddings.weight.requires_grad
        needs_gradient = self.training and torch.is_grad_enabled() and learns
        if needs_gradient and not outputs.router_logits[0].requires_grad:
            raise ValueError(
                "The router logits have no gradient, so the router losses would do nothing. Use activation "
                "checkpointing that is not reentrant: `use_reentrant=False`."
            )
        routers = zip(outputs.router_logits, outputs.router_indices, outputs.router_weights)
        return tokens, tuple(router_sums(logits, index, gates, membership) for logits, index, gates in routers)

    @torch.no_grad()
    def reconstruct(
        self,
        pixel_values: dict[str, torch.Tensor],
        outputs: MapexForPreTrainingOutput,
        valid_mask: dict[str, torch.BoolTensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Images from a forward pass: predicted where patches were hidden, given elsewhere, in the units of
        `pixel_values`. With a normalised target each patch gets the mean and contrast of the true one, as in MAE's
        pictures.

        Returns:
            `dict[str, torch.Tensor]`: Modality to `(batch_size, channels, height, width)`.
        """
        images = {}
        for name, prediction in outputs.predictions.items():
            patch = self.config.modalities[name]["patch_size"]
            target, mean, std, _ = self._targets(name, pixel_values[name], valid_mask)
            patches = (
                torch.where(outputs.hidden_patches[name][:, :, None, None], prediction.float(), target) * std + mean
            )
            height, width = pixel_values[name].shape[-2:]
            images[name] = unpatchify(patches, (height // patch, width // patch), patch)
        return images


class MapexForImageClassification(MapexPreTrainedModel):
    """MAPEX with a linear head on the pooled feature, for one label, several, or values (`config.problem_type`)."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^decoder\."]

    def __init__(self, config: MapexConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mapex = MapexModel(config)
        self.classifier = nn.Linear(config.pooled_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: dict[str, torch.Tensor],
        modality_mask: dict[str, torch.BoolTensor] | None = None,
        valid_mask: dict[str, torch.BoolTensor] | None = None,
        gsd: dict[str, float | torch.Tensor] | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> MapexImageClassifierOutput:
        r"""
        Args:
            pixel_values, modality_mask, valid_mask, gsd: As in [`MapexModel.forward`].
            labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
                Class indices (`"single_label_classification"`), 0 and 1 per class (`"multi_label_classification"`), or
                values (`"regression"`).
            kwargs: `expert_mask` and `output_*`, for [`MapexModel.forward`].

        Raises:
            ValueError: labels of another shape, out of range or not finite (their values are not looked at in training
                on an accelerator), or `class_weights` for another problem than that of one label.
        """
        outputs = self.mapex(pixel_values, modality_mask, valid_mask, gsd, **kwargs)
        logits = self.classifier(outputs.pooler_output)  # (B, num_labels)
        loss = None
        if labels is not None:
            config = self.config
            if labels.device.type == "cpu" or not self.training:
                check_class_labels(labels, logits, config.problem_type)
            if config.problem_type in ("multi_label_classification", "regression"):
                labels = labels.to(logits.dtype)
            if config.class_weights is None:
                loss = self.loss_function(labels, logits, config)
            else:
                config.problem_type = config.problem_type or "single_label_classification"
                if labels.is_floating_point() or config.problem_type != "single_label_classification":
                    raise ValueError(
                        "`class_weights` weigh one class index of each sample, but the labels are "
                        f"{labels.dtype} {tuple(labels.shape)} and `problem_type` is {config.problem_type}."
                    )
                loss = weighted_cross_entropy(logits, labels, config.class_weights)
        return MapexImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            router_indices=outputs.router_indices,
            router_weights=outputs.router_weights,
        )


class MapexConvolution(nn.Module):
    """3 x 3 convolution, normalisation, activation. Normalised is each pixel over its channels, or each channel over
    the batch, after training by its running statistics. Not over the image: whether a pixel is water must not depend on
    how much of it there is elsewhere.
    """

    def __init__(self, config: MapexConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        if config.dense_normalization == "batch":
            self.batchnorm = nn.BatchNorm2d(out_channels)
        else:
            self.layernorm = nn.LayerNorm(out_channels, eps=config.layer_norm_eps)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.convolution(features)
        if hasattr(self, "batchnorm"):
            return self.act_fn(self.batchnorm(features))
        features = features.permute(0, 2, 3, 1)  # (B, H, W, C)
        return self.act_fn(self.layernorm(features)).permute(0, 3, 1, 2)


class MapexDenseDecoder(nn.Module):
    """Light convolutional decoder from the tokens of all modalities to a map. Tokens are projected by modality, and
    averaged on a common grid in metres over those modalities that are present at a place; stages of convolutions go
    from there to the size of the output, where a convolution over the pixels themselves, averaged likewise, brings back
    the detail that patches lose. Of elevations it also reads the Fourier features.
    """

    def __init__(self, config: MapexConfig, num_channels: int):
        super().__init__()
        self.config = config
        widths = [config.dense_hidden_size >> stage for stage in range(config.dense_num_stages)]
        last = widths[-1]
        self.modality_projections = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, widths[0]) for name in config.modalities}
        )
        self.stages = nn.ModuleList(
            MapexConvolution(config, before, after) for before, after in zip([widths[0], *widths], widths)
        )
        self.pixel_embeddings = nn.ModuleDict(
            {
                name: nn.Conv2d(config.pixel_parts(name) * len(spec["bands"]), last, kernel_size=3, padding=1)
                for name, spec in config.modalities.items()
            }
        )
        self.fusion = MapexConvolution(config, 2 * last, last)
        self.output = nn.Conv2d(last, num_channels, kernel_size=1)

    def forward(
        self,
        tokens: torch.Tensor,
        layout: TokenLayout,
        pixel_values: dict[str, torch.Tensor],
        modality_mask: dict[str, torch.BoolTensor] | None = None,
        valid_mask: dict[str, torch.BoolTensor] | None = None,
        gsd: dict[str, float | torch.Tensor] | None = None,
        output_size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): The encoder's output.
            layout (`TokenLayout`): Where they come from.
            pixel_values, modality_mask, valid_mask, gsd: As in [`MapexModel.forward`].
            output_size (`tuple[int, int]`, *optional*):
                Height and width of the map. Default: those of the modality with the smallest tokens on the ground,
                whose ground the map covers in any case.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_channels, *output_size)`
        """
        modalities = self.config.modalities
        extents = ground_extent(layout.grids, modalities, gsd, modality_mask, layout.modality_ids.device)
        reference = reference_modality(layout.grids, modalities)
        size = tuple(output_size or pixel_values[reference].shape[-2:])
        projected = {name: self.modality_projections[name](tokens[:, part]) for name, part in layout.slices().items()}
        # Of zeros, which convolutions without a bias keep, normalisation has no scale: gradients would explode. Small,
        # so that it is no edge beside what sensors show.
        nothing = torch.linspace(-0.1, 0.1, self.config.dense_hidden_size, device=tokens.device)
        features = fuse_tokens(projected, layout, extents, reference, nothing)  # (B, W, R, C)

        rows, columns = layout.grids[reference]
        for stage, block in enumerate(self.stages):
            share = stage / max(len(self.stages) - 1, 1)  # 0 on the grid of tokens, 1 on the pixels of the output
            between = (round(rows * (size[0] / rows) ** share), round(columns * (size[1] / columns) ** share))
            if features.shape[-2:] != between:
                features = nn.functional.interpolate(features, size=between, mode="bilinear", align_corners=False)
            features = block(features)
        if features.shape[-2:] != size:
            features = nn.functional.interpolate(features, size=size, mode="bilinear", align_corners=False)

        details, present = {}, {}
        for name in layout.grids:
            pixels, there = pixels_that_count(name, pixel_values, modality_mask, valid_mask)
            embedding = self.pixel_embeddings[name]
            parts = fourier_features(pixels, self.config.pixel_parts(name) // 2)
            details[name] = embedding(parts.to(embedding.weight.dtype))  # (B, w, H, W)
            present[name] = torch.ones_like(pixels[:, :1], dtype=torch.bool) if there is None else there
        details = fuse_maps(details, present, extents, reference, size)
        return self.output(self.fusion(torch.cat([features, details], dim=1)))


class MapexDenseModel(MapexPreTrainedModel):
    """What the models of maps share: the encoder, and the decoder from tokens to pixels."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^decoder\."]
    _no_split_modules: ClassVar[list[str]] = ["MapexEmbeddings", "MapexLayer", "MapexDenseDecoder"]

    def __init__(self, config: MapexConfig, num_channels: int):
        super().__init__(config)
        self.mapex = MapexModel(config)
        self.dense_decoder = MapexDenseDecoder(config, num_channels)
        self.post_init()

    def _decode(
        self,
        outputs: MapexModelOutput,
        pixel_values: dict[str, torch.Tensor],
        modality_mask: dict[str, torch.BoolTensor] | None,
        valid_mask: dict[str, torch.BoolTensor] | None,
        gsd: dict[str, float | torch.Tensor] | None,
        output_size: tuple[int, int] | None,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """The map `(batch_size, num_channels, height, width)`, of the size of the labels if there are any."""
        if labels is not None:
            if labels.ndim != 3 or labels.shape[0] != outputs.last_hidden_state.shape[0]:
                raise ValueError(
                    f"`labels` must be of shape (batch, height, width) with {outputs.last_hidden_state.shape[0]} "
                    f"samples, got {tuple(labels.shape)}."
                )
            if output_size is not None and tuple(output_size) != tuple(labels.shape[-2:]):
                raise ValueError(f"`output_size` is {output_size}, but the labels are {tuple(labels.shape[-2:])}.")
            output_size = labels.shape[-2:]
        layout = layout_of(outputs, self.config, pixel_values)
        return self.dense_decoder(
            outputs.last_hidden_state, layout, pixel_values, modality_mask, valid_mask, gsd, output_size
        )

    predict_map = predict_in_windows


class MapexForSemanticSegmentation(MapexDenseModel):
    """MAPEX with a convolutional decoder to a class for each pixel."""

    def __init__(self, config: MapexConfig):
        super().__init__(config, config.num_labels)
        self.num_labels = config.num_labels

    def map_loss(self, logits: torch.Tensor, labels: torch.LongTensor) -> torch.Tensor:
        """Cross-entropy by `config.class_weights`, see [`weighted_cross_entropy`]."""
        config = self.config
        return weighted_cross_entropy(logits, labels, config.class_weights, config.semantic_loss_ignore_index)

    @can_return_tuple
    def forward(
        self,
        pixel_values: dict[str, torch.Tensor],
        modality_mask: dict[str, torch.BoolTensor] | None = None,
        valid_mask: dict[str, torch.BoolTensor] | None = None,
        gsd: dict[str, float | torch.Tensor] | None = None,
        labels: torch.LongTensor | None = None,
        output_size: tuple[int, int] | None = None,
        **kwargs,
    ) -> MapexSemanticSegmenterOutput:
        r"""
        Args:
            pixel_values, modality_mask, valid_mask, gsd: As in [`MapexModel.forward`].
            labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
                Class of each pixel, over the ground of the modality with the smallest tokens;
                `config.semantic_loss_ignore_index` where it does not count. The logits have their size.
            output_size (`tuple[int, int]`, *optional*): Height and width of the logits, without labels.
            kwargs: `expert_mask` and `output_*`, for [`MapexModel.forward`].

        Raises:
            ValueError: labels out of range or of another shape. Values are looked at, except in training on an
                accelerator, where that would stall it.
        """
        config = self.config
        if labels is not None and (labels.device.type == "cpu" or not self.training):
            check_class_map(labels, self.num_labels, config.semantic_loss_ignore_index)
        outputs = self.mapex(pixel_values, modality_mask, valid_mask, gsd, **kwargs)
        logits = self._decode(outputs, pixel_values, modality_mask, valid_mask, gsd, output_size, labels)
        return MapexSemanticSegmenterOutput(
            loss=None if labels is None else self.map_loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            router_indices=outputs.router_indices,
            router_weights=outputs.router_weights,
        )


class MapexForPixelRegression(MapexDenseModel):
    """MAPEX with a convolutional decoder to a value for each pixel, like biomass or height."""

    def __init__(self, config: MapexConfig):
        super().__init__(config, 1)

    def map_loss(self, logits: torch.Tensor, labels: torch.FloatTensor) -> torch.Tensor:
        """Mean square error in standard deviations, see [`regression_loss`]."""
        return regression_loss(logits, labels, self.config.label_mean, self.config.label_std)

    @can_return_tuple
    def forward(
        self,
        pixel_values: dict[str, torch.Tensor],
        modality_mask: dict[str, torch.BoolTensor] | None = None,
        valid_mask: dict[str, torch.BoolTensor] | None = None,
        gsd: dict[str, float | torch.Tensor] | None = None,
        labels: torch.FloatTensor | None = None,
        output_size: tuple[int, int] | None = None,
        **kwargs,
    ) -> MapexPixelRegressionOutput:
        r"""
        Args:
            pixel_values, modality_mask, valid_mask, gsd: As in [`MapexModel.forward`].
            labels (`torch.FloatTensor` of shape `(batch_size, height, width)`, *optional*):
                Value of each pixel, NaN where it is not known. `config.label_mean` and `config.label_std` describe
                them.
            output_size (`tuple[int, int]`, *optional*): Height and width of the logits, without labels.
            kwargs: `expert_mask` and `output_*`, for [`MapexModel.forward`].

        Raises:
            ValueError: labels of another shape.
        """
        config = self.config
        outputs = self.mapex(pixel_values, modality_mask, valid_mask, gsd, **kwargs)
        values = self._decode(outputs, pixel_values, modality_mask, valid_mask, gsd, output_size, labels)
        logits = values.squeeze(1).float() * config.label_std + config.label_mean  # (B, H, W)
        return MapexPixelRegressionOutput(
            loss=None if labels is None else self.map_loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            router_indices=outputs.router_indices,
            router_weights=outputs.router_weights,
        )


class MapexBackbone(BackboneMixin, MapexPreTrainedModel):
    """The MAPEX encoder as a backbone: feature maps on a grid, all of the same size, for decoders of other libraries.
    Most of these pass on one tensor: of a model of one sensor, as by `prune_for_modalities(["s2"])`, that will do.
    """

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^decoder\."]

    def __init__(self, config: MapexConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size for _ in config.stage_names]
        self.mapex = MapexModel(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: dict[str, torch.Tensor] | torch.Tensor,
        modality_mask: dict[str, torch.BoolTensor] | None = None,
        valid_mask: dict[str, torch.BoolTensor] | None = None,
        gsd: dict[str, float | torch.Tensor] | None = None,
        **kwargs,
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`dict[str, torch.Tensor]` or `torch.Tensor`):
                As in [`MapexModel.forward`], or the tensor of the only modality of the model.
            modality_mask, valid_mask, gsd: As in [`MapexModel.forward`].
            kwargs: `expert_mask` and `output_*`, for [`MapexModel.forward`].

        Returns:
            `BackboneOutput` whose `feature_maps` are one for each of `out_features`, after the final layer norm:
            `(batch_size, hidden_size, rows, columns)`, the mean of the modalities that are present at a place, on the
            grid of tokens of the modality with the smallest tokens on the ground.
        """
        modalities = self.config.modalities
        if isinstance(pixel_values, torch.Tensor) and len(modalities) == 1:
            pixel_values = dict.fromkeys(modalities, pixel_values)
        outputs = self.mapex(pixel_values, modality_mask, valid_mask, gsd, **kwargs)
        layout = layout_of(outputs, self.config, pixel_values)
        extents = ground_extent(layout.grids, modalities, gsd, modality_mask, layout.modality_ids.device)
        reference = reference_modality(layout.grids, modalities)
        feature_maps = []
        for stage, hidden_states in zip(self.stage_names, outputs.hidden_states):
            if stage in self.out_features:
                is_last = stage == self.stage_names[-1]  # normalised already, as everywhere in transformers
                normed = hidden_states if is_last else self.mapex.layernorm(hidden_states)
                tokens = {name: normed[:, part] for name, part in layout.slices().items()}
                feature_maps.append(fuse_tokens(tokens, layout, extents, reference))
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# One key per expert on disk, so that files can hold some of them; stacked in memory, so that they run as one product.
# Registered at import, because with `trust_remote_code` nothing of ours but this file is sure to run.
register_checkpoint_conversion_mapping(
    MapexConfig.model_type,
    [
        WeightConverter(f"mlp.experts.*.{name}.{kind}", f"mlp.experts.{name}{suffix}", [MergeModulelist(dim=0)])
        for name in ("up_proj", "down_proj")
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
    ],
    overwrite=True,
)

MapexConfig.register_for_auto_class()
MapexModel.register_for_auto_class("AutoModel")
MapexForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MapexForImageClassification.register_for_auto_class("AutoModelForImageClassification")
MapexForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
MapexForPixelRegression.register_for_auto_class("AutoModelForDepthEstimation")
MapexBackbone.register_for_auto_class("AutoBackbone")
