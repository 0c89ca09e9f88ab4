"""Pruning by modality: from expert statistics to a plan (which experts each layer keeps), from the plan to a smaller
configuration and its tensors. Pure functions of a configuration and a state dict, which they never change.
"""

import copy
import os
import random
import re
from itertools import combinations
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .configuration_mapex import CRITERIA, PER_BAND_KEYS
from .sensors_mapex import select_bands


logger = logging.get_logger(__name__)


class _ConfigAndWeights(NamedTuple):
    config: Any
    state_dict: dict[str, torch.Tensor]


class PrunedCheckpoint(_ConfigAndWeights):
    """What pruning returns: `config, state_dict = model.prune_for_modalities(...)`, with ways to make use of them.

    Attributes:
        config (`MapexConfig`): The smaller configuration, with the provenance in `config.pruning`.
        state_dict (`dict[str, torch.Tensor]`): Its weights, sharing no memory with the source.
        model_class (`type`): Class of the model that was pruned.
    """

    model_class: type | None = None

    def build(self, model_class: type | None = None, **overrides):
        """A model with these weights, in eval mode like one from `from_pretrained`.

        Args:
            model_class (`type`, *optional*):
                Class to build; default the one that was pruned. Another head is newly initialised, with a warning.
            overrides: Fields of the configuration to change, like `num_labels=10`, which makes a new head too.

        Raises:
            ValueError: an override that is no field of the configuration.
        """
        model_class = model_class or self.model_class
        self.config.refuse_unknown_fields(overrides)
        fields = self.config.to_dict()
        if "num_labels" in overrides:  # names of other classes do not fit
            fields = {key: value for key, value in fields.items() if key not in ("id2label", "label2id")}
        config = type(self.config).from_dict({**fields, **overrides})
        config._attn_implementation = self.config._attn_implementation
        config._experts_implementation = self.config._experts_implementation
        some_tensor = next(iter(self.state_dict.values()))
        encoder = f"{model_class.base_model_prefix}."
        has_head = any(key.startswith(encoder) for key in self.state_dict)
        keeps_head = not has_head or config.num_labels == self.config.num_labels
        # from_pretrained takes the tensors as they are: the model gets copies, and training it changes nothing here.
        state_dict = {
            key: tensor.clone() for key, tensor in self.state_dict.items() if keeps_head or key.startswith(encoder)
        }
        model = model_class.from_pretrained(None, config=config, state_dict=state_dict, dtype=some_tensor.dtype)
        model.config._name_or_path = self.config._name_or_path
        return model.to(some_tensor.device)

    def save_pretrained(self, save_directory, **kwargs):
        """Save as a standard checkpoint; arguments as `PreTrainedModel.save_pretrained`."""
        return self.build().save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs):
        """Push as a standard checkpoint; arguments as `PreTrainedModel.push_to_hub`."""
        return self.build().push_to_hub(repo_id, **kwargs)


def prune(
    config,
    state_dict: dict[str, torch.Tensor],
    modalities: list[str] | dict[str, list[str] | None],
    *,
    model_class: type,
    revision: str | None = None,
    coverage: float = 0.95,
    experts_per_layer: int | list[int] | None = None,
    criterion: str = "saliency",
    seed: int = 0,
) -> PrunedCheckpoint:
    """Plan and slice; what `prune_for_modalities` documents. `config` and `state_dict` are those of the whole model,
    `revision` is the commit it was loaded from.
    """
    pruned = plan_pruning(
        config,
        modalities,
        revision=revision,
        parameters_before=sum(tensor.numel() for tensor in state_dict.values()),
        coverage=coverage,
        experts_per_layer=experts_per_layer,
        criterion=criterion,
        seed=seed,
    )
    tensors = prune_state_dict(state_dict, config, pruned)
    pruned.dtype = next(iter(tensors.values())).dtype
    pruned.pruning["parameters_after"] = sum(tensor.numel() for tensor in tensors.values())
    result = PrunedCheckpoint(pruned, tensors)
    result.model_class = model_class
    return result


def plan_pruning(
    config,
    modalities: list[str] | dict[str, list[str] | None],
    *,
    revision: str | None,
    parameters_before: int,
    coverage: float = 0.95,
    experts_per_layer: int | list[int] | None = None,
    criterion: str = "saliency",
    seed: int = 0,
):
    """The configuration of the pruned model with its provenance in `config.pruning`, all but `parameters_after`.

    Args:
        config (`MapexConfig`): Of the source, which stays as it is.
        revision (`str`, *optional*): Commit of the repository that the source was loaded from.
        parameters_before (`int`): Number of parameters of the source.
        modalities, coverage, experts_per_layer, criterion, seed: As in `prune_for_modalities`.
    """
    bands = resolve_modalities(config, modalities)
    expert_ids = plan_experts(
        config, list(bands), coverage=coverage, experts_per_layer=experts_per_layer, criterion=criterion, seed=seed
    )
    pruned = prune_config(config, bands, expert_ids)
    earlier = config.pruning or {}
    source = config._name_or_path or None
    if source is not None and revision is None:
        source = os.path.basename(os.path.normpath(source))  # where a folder lies is nobody's business
    pruned.pruning = {
        # Of the first model in a chain of prunings, so that pruning twice is the same as pruning once.
        "source": earlier.get("source", source),
        "revision": earlier.get("revision", revision),
        "modalities": {name: list(spec["bands"]) for name, spec in pruned.modalities.items()},
        "criterion": criterion,
        "coverage": coverage if experts_per_layer is None else None,
        "experts_per_layer": experts_per_layer,
        "seed": seed if criterion == "random" else None,
        "coverage_reached": reached_coverage(config, list(bands), expert_ids, criterion),
        "parameters_before": earlier.get("parameters_before", parameters_before),
    }
    return pruned


def resolve_modalities(config, modalities: list[str] | dict[str, list[str] | None]) -> dict[str, list[str]]:
    """What to keep, as modality to bands, in the order of the configuration.

    Raises:
        TypeError: `modalities` is neither a list nor a mapping.
        ValueError: nothing asked for, something asked for twice, or a modality or band that `config` does not have.
    """
    if isinstance(modalities, str) or not hasattr(modalities, "__iter__"):
        raise TypeError(
            "`modalities` must be a list of names or a mapping from name to bands, got "
            f"{modalities!r}: use [{modalities!r}]."
        )
    if not isinstance(modalities, dict):
        names = list(modalities)
        if len(set(names)) != len(names):
            raise ValueError(f"`modalities` names one twice: {names}.")
        modalities = dict.fromkeys(names)
    held = list(config.modalities)
    if not modalities:
        raise ValueError(f"`modalities` is empty: name at least one of {held}.")
    unknown = [name for name in modalities if name not in config.modalities]
    if unknown:
        advice = "Load the unpruned model to keep others." if config.pruning else "Choose among these."
        raise ValueError(f"Unknown modalities {unknown}. This checkpoint has {held}. {advice}")
    result = {}
    for name in held:
        if name in modalities:
            available = config.modalities[name]["bands"]
            wanted = available if modalities[name] is None else modalities[name]
            result[name] = [available[position] for position in select_bands(name, available, wanted)]
    return result


def plan_experts(
    config,
    modalities: list[str],
    *,
    coverage: float = 0.95,
    experts_per_layer: int | list[int] | None = None,
    criterion: str = "saliency",
    seed: int = 0,
) -> list[list[int]]:
    """Original ids of the experts that each MoE layer should keep for `modalities`, from `config.expert_statistics`.

    With `coverage`, each modality by itself chooses the fewest experts that cover so much of its mass, and the layer
    keeps the union. A layer keeps the same experts whether modalities are dropped at once or one after the other; the
    smallest set that serves all at once would not have that property.

    Raises:
        ValueError: an unknown criterion, numbers out of range, or a modality without statistics.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"Unknown criterion `{criterion}`. Available: {list(CRITERIA)}.")
    _require_statistics(config, modalities, criterion)
    counts = _requested_counts(config, experts_per_layer)
    if counts is None and not 0.0 < coverage <= 1.0:
        raise ValueError(f"`coverage` must lie in (0, 1], got {coverage}.")
    if counts is not None and coverage != 0.95:
        raise ValueError("Give either `coverage` or `experts_per_layer`, not both.")
    if criterion == "random":
        if counts is None:
            saliency = plan_experts(config, modalities, coverage=coverage, criterion="saliency")
            counts = [len(kept) for kept in saliency]
        generator = random.Random(seed)
        return [sorted(generator.sample(held, count)) for held, count in zip(config.expert_ids, counts)]

    plan = []
    for layer in range(len(config.expert_ids)):
        if counts is not None:
            kept = _best_of_size(config, modalities, criterion, layer, counts[layer])
        else:
            kept = set()
            for modality in modalities:
                kept |= set(_fewest_that_cover(config, modality, criterion, layer, coverage))
        plan.append(sorted(kept))
    return plan


def _require_statistics(config, modalities: list[str], criterion: str) -> None:
    statistics = config.expert_statistics or {}
    if not config.routed_layers:
        return  # nothing to choose
    missing = [name for name in modalities if name not in statistics]
    if missing:
        raise ValueError(
            f"No expert statistics for {missing} (there are some for {sorted(statistics) or 'none'}). Run "
            "`model.calibrate_experts(batches)` on batches that hold these modalities, then prune."
        )
    if criterion == "exhaustive" and not all("subset_error" in statistics[name] for name in modalities):
        raise ValueError(
            '`criterion="exhaustive"` needs the error of every subset of experts. Run '
            "`model.calibrate_experts(batches, subset_errors=True)`, then prune."
        )


def _requested_counts(config, experts_per_layer: int | list[int] | None) -> list[int] | None:
    if experts_per_layer is None:
        return None
    held = [len(ids) for ids in config.expert_ids]
    counts = [experts_per_layer] * len(held) if isinstance(experts_per_layer, int) else list(experts_per_layer)
    if len(counts) != len(held):
        raise ValueError(f"`experts_per_layer` needs one number per MoE layer ({len(held)}), got {counts}.")
    for layer, count, available in zip(config.moe_layers, counts, held):
        if not 1 <= count <= available:
            raise ValueError(f"Block {layer} holds {available} experts; cannot keep {count} (`experts_per_layer`).")
    return counts


def kept_mass(config, modality: str, criterion: str, layer: int, kept: list[int]) -> float:
    """Share, in [0, 1], of the mass of `modality` in MoE layer `layer` that the experts with ids `kept` hold, measured
    against all experts of the unpruned model. For `"exhaustive"` it is the share of the layer's output energy that is
    explained.
    """
    entry = config.expert_statistics[modality]
    if criterion == "exhaustive":
        errors = entry["subset_error"][layer]
        if errors is None:
            return 1.0  # the layer had one expert when it was measured
        return 1.0 - errors[sum(1 << expert for expert in kept)] / max(errors[0], 1e-30)
    masses = entry["saliency" if criterion == "random" else criterion][layer]
    total = sum(masses)
    return sum(masses[expert] for expert in kept) / total if total > 0 else 1.0


def _ranked(config, modalities: list[str], criterion: str, layer: int) -> list[int]:
    """Experts of the layer, the one with the highest mean share first; of equals the lower id."""
    return sorted(
        config.expert_ids[layer],
        key=lambda expert: (-sum(kept_mass(config, name, criterion, layer, [expert]) for name in modalities), expert),
    )


def _fewest_that_cover(config, modality: str, criterion: str, layer: int, coverage: float) -> list[int]:
    held = config.expert_ids[layer]
    if len(held) == 1:
        return held  # nothing to choose, and there need be no statistics
    tolerance = 1e-9  # shares are sums of floats, and coverage=1.0 must be reachable
    for count in range(1, len(held)):
        best = _best_of_size(config, [modality], criterion, layer, count)
        if kept_mass(config, modality, criterion, layer, best) >= coverage - tolerance:
            return best
    return held  # all, even where an earlier pruning left less than `coverage`


def _best_of_size(config, modalities: list[str], criterion: str, layer: int, count: int) -> list[int]:
    if count == len(config.expert_ids[layer]):
        return config.expert_ids[layer]
    if criterion != "exhaustive":
        return _ranked(config, modalities, criterion, layer)[:count]
    return list(
        max(
            combinations(config.expert_ids[layer], count),
            key=lambda kept: sum(kept_mass(config, name, criterion, layer, list(kept)) for name in modalities),
        )
    )


def reached_coverage(
    config, modalities: list[str], expert_ids: list[list[int]], criterion: str
) -> dict[str, list[float]] | None:
    """Per kept modality and MoE layer the share of the mass that `expert_ids` cover, by `criterion` (by saliency for
    `"random"`). `None` if there is nothing to measure it by.
    """
    statistics = config.expert_statistics or {}
    needed = "subset_error" if criterion == "exhaustive" else "saliency"
    if not all(needed in statistics.get(name, ()) for name in modalities):
        return None
    return {
        name: [round(kept_mass(config, name, criterion, layer, kept), 6) for layer, kept in enumerate(expert_ids)]
        for name in modalities
    }


def prune_config(config, bands: dict[str, list[str]], expert_ids: list[list[int]]):
    """The configuration of the pruned model.

    Args:
        config (`MapexConfig`): Of the source.
        bands (`dict[str, list[str]]`): Modalities to keep and their bands, from [`resolve_modalities`].
        expert_ids (`list[list[int]]`): Original ids of the experts to keep, from [`plan_experts`].
    """
    pruned = copy.deepcopy(config)
    pruned.modalities = {name: _slice_spec(name, config.modalities[name], kept) for name, kept in bands.items()}
    pruned.expert_ids = [list(kept) for kept in expert_ids]
    if config.expert_statistics is not None:
        pruned.expert_statistics = {
            name: entry for name, entry in copy.deepcopy(config.expert_statistics).items() if name in bands
        }
    pruned.validate()
    return pruned


def _slice_spec(name: str, spec: dict[str, Any], bands: list[str]) -> dict[str, Any]:
    positions = select_bands(name, spec["bands"], bands)
    sliced = copy.deepcopy(spec)
    sliced["bands"] = list(bands)
    for key in PER_BAND_KEYS:
        if spec.get(key) is not None:
            sliced[key] = [spec[key][position] for position in positions]
    if spec.get("codes") is not None and len(bands) < len(spec["bands"]):
        # Ground of a class that is no longer told apart is still ground, not a hole in the data.
        dropped = [code for code in spec["codes"] if code not in sliced["codes"]]
        sliced["other_codes"] = sorted([*spec.get("other_codes", []), *dropped])
    if spec.get("target_groups") is not None:
        groups = [[band for band in group if band in bands] for group in spec["target_groups"]]
        sliced["target_groups"] = [group for group in groups if group]
    return sliced


def prune_state_dict(state_dict: dict[str, torch.Tensor], config, pruned) -> dict[str, torch.Tensor]:
    """The tensors of the pruned model, cut from those of the source; every one a copy.

    Args:
        state_dict (`dict[str, torch.Tensor]`): Of the source, experts stacked as in memory.
        config, pruned (`MapexConfig`): Of the source and of the result.
    """
    refuse_adapters(state_dict)
    result = {}
    for key, tensor in state_dict.items():
        part = kept_part(key, config, pruned)
        if part is not None:
            result[part.key] = part.of(tensor).detach().clone(memory_format=torch.contiguous_format)
    return result


def refuse_adapters(state_dict: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` for the weights of a model with adapters, which hide those that they adapt."""
    if any(".base_layer." in key or "lora_" in key for key in state_dict):
        raise ValueError(
            "The model carries adapters (peft): merge them first, `model = model.merge_and_unload()` of a `PeftModel`, "
            "or take them off, `model.delete_adapter(...)`."
        )


class KeptPart(NamedTuple):
    """What pruning keeps of one tensor of the source model.

    Attributes:
        key (`str`): Its name in the pruned model.
        index (`tuple`):
            For each leading dimension the positions that are kept; `None` is all of them, and a number alone is that
            position, without the dimension. Dimensions that are not mentioned are kept whole.
    """

    key: str
    index: tuple[list[int] | int | None, ...] = ()

    @property
    def is_whole(self) -> bool:
        return all(positions is None for positions in self.index)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of `tensor`; a view where that is possible."""
        dim = 0
        for positions in self.index:
            if isinstance(positions, int):
                tensor = tensor.select(dim, positions)
                continue
            if positions is not None:
                tensor = tensor.index_select(dim, torch.tensor(positions, device=tensor.device))
            dim += 1
        return tensor

    def put(self, values: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write `values`, of the shape of `self.of(tensor)`, to where they belong in `tensor`."""
        if self.is_whole:
            tensor.copy_(values)
            return
        lists = [position if position is not None else range(size) for position, size in zip(self.index, tensor.shape)]
        grids = torch.meshgrid(
            *(torch.tensor([item] if isinstance(item, int) else list(item)) for item in lists), indexing="ij"
        )
        shape = grids[0].shape + tensor.shape[len(self.index) :]
        tensor[tuple(grid.to(tensor.device) for grid in grids)] = values.to(tensor).view(shape)


MODALITY_KEY = re.compile(r"(?:^|\.)(patch_embeddings|pixel_embeddings|modality_projections|heads)\.([A-Za-z0-9_]+)\.")
_MIXTURE_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.(gate|experts)\.(\w+)$")


def kept_part(key: str, config, pruned) -> KeptPart | None:
    """What becomes of the tensor `key` of the source model, or `None` if it goes.

    The rules, by name: patch and pixel embeddings and pretraining heads of a modality go or stay with it, cut to its
    bands, and so does its projection to maps, which has no bands; rows of modality embeddings follow the modalities;
    rows of router and experts follow the expert ids; a layer left with one expert has no router and a plain MLP;
    everything else stays.
    """
    found = MODALITY_KEY.search(key)
    if found:
        kind, name = found.groups()
        if name not in pruned.modalities:
            return None
        spec = config.modalities[name]
        bands = select_bands(name, spec["bands"], pruned.modalities[name]["bands"])
        if kind == "modality_projections":
            return KeptPart(key)
        if kind != "heads":  # embeddings: weight (D, C, p, p), of pixels (D, parts * C, 3, 3), bias (D,)
            count = len(spec["bands"])
            parts = config.pixel_parts(name) if kind == "pixel_embeddings" else 1
            columns = [part * count + band for part in range(parts) for band in bands]
            return KeptPart(key, (None, _unless_all(columns, parts * count)) if key.endswith(".weight") else ())
        pixels = spec["patch_size"] ** 2  # head: (C * P, ...)
        rows = [band * pixels + pixel for band in bands for pixel in range(pixels)]
        return KeptPart(key, (_unless_all(rows, len(spec["bands"]) * pixels),))
    held_modalities = list(config.modalities)
    modality_rows = _unless_all([held_modalities.index(name) for name in pruned.modalities], len(held_modalities))
    if key.endswith("modality_embeddings.weight"):
        return KeptPart(key, (modality_rows,))
    found = _MIXTURE_KEY.search(key)
    if not found:
        return KeptPart(key)
    block, part, name = int(found.group(1)), found.group(2), found.group(3)
    layer = config.moe_layers.index(block)
    held, kept = config.expert_ids[layer], pruned.expert_ids[layer]
    rows = [held.index(expert) for expert in kept]
    if part == "experts" and len(rows) == 1:
        plain = f"{name.removesuffix('_bias')}.{'bias' if name.endswith('_bias') else 'weight'}"
        return KeptPart(key.replace(f"mlp.experts.{name}", f"mlp.{plain}"), (rows[0],))
    if len(rows) == 1:
        return None
    rows = _unless_all(rows, len(held))
    if part == "experts" or name == "weight":
        return KeptPart(key, (rows,))
    if name == "modality_shift":
        return KeptPart(key, (modality_rows,))
    return KeptPart(key, (modality_rows, rows))  # modality_bias


def _unless_all(positions: list[int], count: int) -> list[int] | None:
    """`None`, which is all, where `positions` are all of `count` in order."""
    return None if positions == list(range(count)) else positions


def unprune_state_dict(
    state_dict: dict[str, torch.Tensor], config, pruned_state_dict: dict[str, torch.Tensor], pruned
) -> dict[str, torch.Tensor]:
    """The tensors of the whole model with those of a pruned one put back to where they came from; every one a copy.

    What the pruned model does not have, such as the experts that it dropped and the routers of layers that it left one
    expert, stays as it is in `state_dict`, and so does a head (decoder, classifier) that only one of the two has.

    Args:
        state_dict (`dict[str, torch.Tensor]`), config (`MapexConfig`): Of the whole model.
        pruned_state_dict (`dict[str, torch.Tensor]`), pruned (`MapexConfig`): Of the pruned model.

    Raises:
        ValueError: a pruned model that cannot come from the whole one.
    """
    _require_descent(config, pruned)
    refuse_adapters(state_dict)
    refuse_adapters(pruned_state_dict)
    there = {key.split(".")[0] for key in pruned_state_dict}
    result = {}
    for key, tensor in state_dict.items():
        result[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
        part = kept_part(key, config, pruned)
        if part is None or part.key.split(".")[0] not in there:
            continue
        if part.key not in pruned_state_dict:
            raise ValueError(f"The pruned model lacks `{part.key}`: it is not whole, or not of the same architecture.")
        values = pruned_state_dict[part.key]
        if values.shape != part.of(tensor).shape:
            raise ValueError(
                f"`{part.key}` is {tuple(values.shape)} in the pruned model, where the whole one has room for "
                f"{tuple(part.of(tensor).shape)}. Give models of the same class with as many labels."
            )
        part.put(values.detach(), result[key])
    return result


def _require_descent(config, pruned) -> None:
    """Raise `ValueError` where the model of `pruned` cannot have been cut from that of `config`."""
    fields = ("hidden_size", "num_hidden_layers", "intermediate_size", "moe_layers", "num_experts")
    fields += ("num_shared_experts", "decoder_hidden_size", "decoder_num_hidden_layers", "decoder_intermediate_size")
    for field in fields:
        if getattr(config, field) != getattr(pruned, field):
            raise ValueError(
                f"The pruned model has `{field}={getattr(pruned, field)}`, the whole one "
                f"`{field}={getattr(config, field)}`: one was not cut from the other."
            )
    for name, spec in pruned.modalities.items():
        whole = config.modalities.get(name)
        if whole is None or not set(spec["bands"]) <= set(whole["bands"]) or spec["patch_size"] != whole["patch_size"]:
            raise ValueError(
                f"The pruned model has `{name}` with bands {spec['bands']} and `patch_size` {spec['patch_size']}, the "
                f"whole one {whole and (whole['bands'], whole['patch_size'])}: one was not cut from the other."
            )
    for layer, kept, held in zip(config.moe_layers, pruned.expert_ids, config.expert_ids):
        if not set(kept) <= set(held):
            raise ValueError(
                f"Block {layer} of the pruned model has experts {kept}, of the whole one {held}: give the model that "
                "was pruned, or one that holds more."
            )


_HEADS_WITH_LABELS = {"classifier", "dense_decoder"}
_FIELDS_OF_LABELS = (
    *("id2label", "label2id", "problem_type", "class_weights", "semantic_loss_ignore_index"),
    *("label_mean", "label_std", "dense_window_metres", "pooling_type"),
)


def unprune(full, pruned):
    """Put what a pruned model has learned back into the model it was cut from.

    Experts, patch and modality embeddings (of the kept bands), router rows and everything that all modalities share
    take the values of `pruned`, and so does a head that both have, with what the configuration says of its labels; the
    rest stays that of `full`. Without training in between the result equals `full`
    bit for bit. After training, the modalities that `pruned` did not have meet shared layers that have changed: measure
    them before you rely on them, and calibrate again before you prune again.

    Args:
        full (`MapexPreTrainedModel`): The model that was pruned, or the same checkpoint loaded again. Not changed.
        pruned (`MapexPreTrainedModel` or [`PrunedCheckpoint`]): What pruning gave, fine-tuned or not.

    Returns:
        A model of the class of `full`, in eval mode, that shares no memory with either.

    Raises:
        ValueError: `pruned` cannot have been cut from `full`, or has no provenance.
    """
    provenance = pruned.config.pruning
    if provenance is None:
        raise ValueError("`pruned` has no provenance (`config.pruning`): it is not a pruned model.")
    state_dict = pruned.state_dict if isinstance(pruned, PrunedCheckpoint) else pruned.state_dict()
    origin = (provenance["source"], provenance["revision"])
    own = (full.config._name_or_path or None, full._source_revision)
    if None not in origin + own and origin != own:
        logger.warning(
            f"The pruned model was cut from {origin[0]} at commit {origin[1]}; it is now put into {own[0]} at commit "
            f"{own[1]}."
        )
    own_state_dict, encoder = full.state_dict(), f"{full.base_model_prefix}."
    if any(key.startswith(encoder) for key in own_state_dict):
        if not any(key.startswith(encoder) for key in state_dict):  # an encoder alone, for a model with a head
            state_dict = {encoder + key: tensor for key, tensor in state_dict.items()}
    else:
        state_dict = {key.removeprefix(encoder): tensor for key, tensor in state_dict.items()}
    merged = unprune_state_dict(own_state_dict, full.config, state_dict, pruned.config)
    config = copy.deepcopy(full.config)
    own_heads, heads = ({key.split(".")[0] for key in keys} for keys in (own_state_dict, state_dict))
    if own_heads & heads & _HEADS_WITH_LABELS:
        for field in _FIELDS_OF_LABELS:
            setattr(config, field, copy.deepcopy(getattr(pruned.config, field)))
    return rebuild(full, config, merged)


def rebuild(model, config, state_dict: dict[str, torch.Tensor]):
    """A model of the class, dtype, device and origin of `model`, in eval mode, of another configuration and weights."""
    rebuilt = type(model).from_pretrained(None, config=config, state_dict=state_dict, dtype=model.dtype)
    rebuilt.config._name_or_path, rebuilt._source_revision = model.config._name_or_path, model._source_revision
    return rebuilt.to(model.device)
