"""A sensor that a checkpoint was not pretrained on, made of one that it knows: `add_modality`. The reverse of pruning,
and like it on configurations and state dicts.
"""

import copy
from collections import Counter
from typing import Any

import torch

from .pruning_mapex import MODALITY_KEY, kept_part, prune_config, rebuild, refuse_adapters


def add_modality(model, name: str, like: str, *, bands: dict[str, str] | None = None, **description):
    """A model that also has the sensor `name`, which begins as a copy of `like`: the same patch embedding, modality
    embedding, routing and heads, and the same experts. So it gives the same tokens of the same pixels, until training
    tells the two apart.

    Args:
        model (`MapexPreTrainedModel`): Any, pruned or not. Not changed.
        name (`str`): Of the new sensor: letters, digits and underscores.
        like (`str`): The sensor of `model` that measures most alike.
        bands (`dict[str, str]`, *optional*):
            Bands of the new sensor, in the order of your channels, each with the band of `like` that it begins as.
            Default: those of `like`.
        description:
            What else differs from `like`, as in `config.modalities`: `gsd` (metres), `mean`, `std`, `clip`, `unit`,
            `nodata`, `dn_scale`, `dn_offset`. Not `patch_size`, for which the copied weights would not fit.

    Returns:
        A model of the class of `model`, in eval mode, that shares no memory with it. `config.expert_statistics` has the
        sensor too, so that it can be pruned for.

    Raises:
        ValueError: a sensor that the model has already, or `like` or a band of it that it has not, a description that
            is none, or one of metres where the other is not.

    Example:

    ```python
    >>> from modeling_mapex import MapexConfig, MapexModel, add_modality

    >>> model = MapexModel(MapexConfig.from_preset("nano", modalities=["s2"]))
    >>> bands = {"red": "B04", "green": "B03", "blue": "B02"}
    >>> model = add_modality(model, "drone", like="s2", bands=bands, gsd=0.5)
    >>> model.config.modalities["drone"]["bands"]
    ['red', 'green', 'blue']
    ```"""
    config = extend_config(model.config, name, like, bands=bands, **description)
    tensors = extend_state_dict(model.state_dict(), model.config, config, name, like, bands)
    return rebuild(model, config, tensors)


def extend_config(config, name: str, like: str, *, bands: dict[str, str] | None = None, **description):
    """The configuration of [`add_modality`]; `config` (`MapexConfig`) stays as it is."""
    if name in config.modalities:
        raise ValueError(f"There is a modality `{name}` already: choose a name beside {list(config.modalities)}.")
    if like not in config.modalities:
        raise ValueError(f"`like` must be one of {list(config.modalities)}, got `{like}`.")
    if "patch_size" in description or "bands" in description:
        raise ValueError("A new sensor has the `patch_size` of the one it is like, and its `bands` are an argument.")
    unit = config.modalities[like].get("unit")
    if (unit == "metres") != (description.get("unit", unit) == "metres"):
        raise ValueError(
            f"`{like}` is in {unit} and `{name}` in {description['unit']}: maps read elevations (metres) in another "
            "way than other values. Choose a `like` of the same kind."
        )
    names = _band_names(config, like, bands)
    sliced = prune_config(config, {like: list(names.values())}, config.expert_ids).modalities[like]
    renamed = {old: new for new, old in names.items()}
    spec: dict[str, Any] = {**sliced, "bands": list(names)}
    if sliced.get("target_groups") is not None:
        spec["target_groups"] = [[renamed[band] for band in group] for group in sliced["target_groups"]]
    extended = copy.deepcopy(config)
    extended.modalities = dict(sorted({**extended.modalities, name: {**spec, **description}}.items()))
    if like in (config.expert_statistics or {}):
        extended.expert_statistics[name] = copy.deepcopy(config.expert_statistics[like])
    extended.validate()
    return extended


def extend_state_dict(
    state_dict: dict[str, torch.Tensor],
    config,
    extended,
    name: str,
    like: str,
    bands: dict[str, str] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of [`add_modality`]; every one a copy.

    Args:
        state_dict (`dict[str, torch.Tensor]`): Of the model, experts stacked as in memory.
        config, extended (`MapexConfig`): Of the model, and from [`extend_config`] with the same arguments.
        name, like, bands: As in [`add_modality`].
    """
    refuse_adapters(state_dict)
    alike = prune_config(config, {like: list(_band_names(config, like, bands).values())}, config.expert_ids)
    held = list(config.modalities)
    rows = [held.index(like if entry == name else entry) for entry in extended.modalities]
    result = {}
    for key, tensor in state_dict.items():
        by_row = key.endswith(("modality_embeddings.weight", "modality_shift", "modality_bias"))
        result[key] = (tensor[rows] if by_row else tensor).detach().clone()
        found = MODALITY_KEY.search(key)
        if found and found.group(2) == like:
            copied = kept_part(key, config, alike).of(tensor)
            result[f"{key[: found.start(2)]}{name}{key[found.end(2) :]}"] = copied.detach().clone()
    return result


def _band_names(config, like: str, bands: dict[str, str] | None) -> dict[str, str]:
    """Each band of the new sensor with that of `like`."""
    available = config.modalities[like]["bands"]
    if bands is None:
        return {band: band for band in available}
    if not isinstance(bands, dict):
        raise TypeError(f"`bands` must say which band of `{like}` each of yours begins as, got {bands!r}.")
    if repeated := sorted(band for band, count in Counter(bands.values()).items() if count > 1):
        raise ValueError(f"Each band of `{like}` can be the beginning of one of yours, but {repeated} are of several.")
    if unknown := [band for band in bands.values() if band not in available]:
        raise ValueError(f"`bands` begin as bands of `{like}`, which has {available}, not {unknown}.")
    return dict(bands)
