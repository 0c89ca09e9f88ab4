"""`MapexConfig`: everything that fixes the shape, the routing and the training objective of a MAPEX model.

A configuration is plain data: it says which modalities and experts the weights hold, and carries the expert statistics
and the provenance with which a checkpoint can be pruned, and its origin told, without any other file.
"""

import difflib
import math
import re
from dataclasses import fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import logging

from .sensors_mapex import modality_spec


logger = logging.get_logger(__name__)

# Field values of the presets; `patch_size` is that of the modalities. The rest of the fields keep their defaults.
PRESETS: dict[str, dict[str, int]] = {
    "nano": {
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "decoder_hidden_size": 128,
        "patch_size": 8,
    },
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
PRESET_PATCH_SIZE = 16
DEFAULT_SENSORS = ("s1", "s2", "rgb", "dem")
CRITERIA = ("saliency", "usage", "gate", "exhaustive", "random")

AUTO_MAP = {
    "AutoConfig": "configuration_mapex.MapexConfig",
    "AutoImageProcessor": "image_processing_mapex.MapexImageProcessor",
    "AutoModel": "modeling_mapex.MapexModel",
    "AutoBackbone": "modeling_mapex.MapexBackbone",
    "AutoModelForPreTraining": "modeling_mapex.MapexForPreTraining",
    "AutoModelForImageClassification": "modeling_mapex.MapexForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_mapex.MapexForSemanticSegmentation",
    # A value per pixel: the closest that transformers has an Auto class for.
    "AutoModelForDepthEstimation": "modeling_mapex.MapexForPixelRegression",
}

# Keys that transformers itself adds to a configuration beside the declared fields (`use_cache` by Trainer, for one).
_LIBRARY_KEYS = {
    *("_commit_hash", "_name_or_path", "attn_implementation", "auto_map", "base_model_name_or_path"),
    *("experts_implementation", "model_type", "name_or_path", "num_labels", "out_features", "out_indices"),
    *("output_attentions", "quantization_config", "torch_dtype", "use_cache"),
}
PER_BAND_KEYS = ("mean", "std", "clip", "codes")  # lists with one entry a band, which follow a choice of bands
_MODALITY_KEYS = {
    "bands",
    "other_codes",
    "gsd",
    "patch_size",
    "target_groups",
    "unit",
    "nodata",
    "dn_scale",
    "dn_offset",
    *PER_BAND_KEYS,
}
_GROUPED_MM_MULTIPLE = 8  # grouped_mm needs rows of 16 bytes: 8 elements in bf16


def _describes_sensors(modalities) -> bool:
    """Whether `modalities` say what sensors are, as in a configuration; else they choose among those there are."""
    return isinstance(modalities, dict) and all(isinstance(spec, dict) for spec in modalities.values())


@strict
class MapexConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of a MAPEX model.

    Args:
        modalities (`dict[str, dict]`, *optional*):
            The inputs, by name: `{"s1": {"bands": ["VV", "VH"], "gsd": 10.0, "patch_size": 16}}`. `bands` are the
            channels in order, `gsd` is the default ground sampling distance in metres per pixel, `patch_size` is in
            pixels. Optional keys: `target_groups` (lists of bands whose pretraining targets are normalised together;
            default all), and what `MapexImageProcessor` needs: `unit`, `mean`, `std`, `clip`, `nodata`, `dn_scale`,
            `dn_offset`, `codes`, as `modality_spec` describes them. Kept in alphabetical order, which is the order of
            their tokens. Default: s1, s2, rgb, dem of the registry.
        hidden_size (`int`), num_hidden_layers (`int`), num_attention_heads (`int`):
            Dimensions of the encoder.
        intermediate_size (`int`, *optional*):
            Inner width of the MLPs and of each expert. Default: four times `hidden_size`.
        hidden_act (`str`), hidden_dropout_prob (`float`), attention_probs_dropout_prob (`float`),
        layer_norm_eps (`float`), qkv_bias (`bool`):
            As in `ViTConfig`.
        initializer_range (`float`):
            Standard deviation of embeddings, mask token and router at the start; other weights do not depend on it.
        position_unit (`float`):
            Metres per unit of the sine-cosine position embedding: its shortest wavelength is 2 pi units.
        position_temperature (`float`):
            Ratio of its longest to its shortest wavelength.
        pooling_type (`str`):
            How `pooler_output` is made of the present tokens: `"mean"` over all of them; `"modality_mean"`, the mean
            over modalities of each one's mean, which gives a sensor with few tokens the same weight; or `"mean_std"`,
            the mean and the standard deviation over all of them, which also tells how varied a chip is.
        moe_layers (`list[int]`, *optional*):
            Blocks whose MLP is a mixture of experts. Default: every second one, starting with block 1.
        num_experts (`int`), num_experts_per_tok (`int`):
            Experts per mixture before pruning, and how many of them each token is sent to.
        num_shared_experts (`int`):
            Experts that every token of a mixture uses beside the routed ones, kept by pruning.
        conditioned_router (`bool`):
            Whether the router knows the modality of a token. `False` is the plain router, to compare with.
        expert_ids (`list[list[int]]`, *optional*):
            For each of `moe_layers` the original ids of the experts that it holds. Default: all of them.
        decoder_hidden_size (`int`, *optional*), decoder_num_hidden_layers (`int`),
        decoder_num_attention_heads (`int`, *optional*), decoder_intermediate_size (`int`, *optional*):
            Dimensions of the pretraining decoder. Defaults: half of the encoder's width, and as many heads.
        dense_hidden_size (`int`, *optional*), dense_num_stages (`int`):
            Width of the decoder of maps (segmentation, regression) on the grid of tokens, by default about half of the
            encoder's; and in how many stages it goes from there to pixels, each half as wide as the one before.
        dense_num_frequencies (`int`):
            Of the sines and cosines of elevations (modalities whose `unit` is metres) that the decoder of maps reads
            beside them, see [`fourier_features`].
        dense_normalization (`str`):
            In the convolutions of the decoder of maps: `"layer"`, of each pixel over its channels, or `"batch"`, of
            each channel over the batch.
        dense_window_metres (`float`, *optional*):
            Side of the windows in which `predict_map` reads an image: that of the images in training, or of the crops
            of them. Default: the whole image at once.
        semantic_loss_ignore_index (`int`):
            The label of pixels that do not count in segmentation.
        class_weights (`list[float]`, *optional*):
            Weights of the classes in the loss of segmentation or of single-label classification.
        label_mean (`float`), label_std (`float`):
            Of the values that pixel regression predicts: it learns `(value - mean) / std` and returns values.
        out_features (`list[str]`, *optional*), out_indices (`list[int]`, *optional*):
            Of `MapexBackbone`: which of `"stem"`, `"stage1"`, ... to return. Default: the last.
        mask_ratio (`float`):
            Share of the present tokens that pretraining hides.
        modality_dropout_prob (`float`):
            Probability with which pretraining hides a whole modality of a sample (never all of them).
        norm_pix_loss (`str`):
            Pretraining target: pixels normalised per patch and target `"group"`, per `"patch"`, or plain (`"none"`).
        expert_pools (`bool`):
            Whether pretraining restricts each modality to a pool of experts of random size, the regime of pruning.
        router_noise_std (`float`, *optional*):
            Standard deviation of the noise on the router logits in pretraining. Default: 1 / `num_experts`.
        router_aux_loss_coef (`float`), router_z_loss_coef (`float`), mutual_information_coef (`float`),
        router_entropy_coef (`float`):
            Coefficients of the load balancing loss, the router z-loss, the mutual information between modality and
            expert (which is maximised) and the penalty for falling below `router_entropy_floor`, summed over layers.
        router_entropy_floor (`float`):
            Entropy in nats below which the mean routing of a modality is penalised; 0 turns the penalty off.
        output_router_logits (`bool`):
            Whether the encoder returns the logits of its routers by default.
        expert_statistics (`dict`, *optional*):
            What `calibrate_experts` measured: per modality `tokens` and, per MoE layer and original expert id, `usage`,
            `gate`, `saliency` (and `subset_error`, if asked for).
        pruning (`dict`, *optional*):
            Provenance of a pruned checkpoint, written by `prune_for_modalities`.
        card_data (`dict`, *optional*):
            Entries of the model card's head that outlive pruning and fine-tuning: `license`, `datasets`, `tags`,
            `language`, or any other of the Hub's.

    Raises:
        ValueError: an unknown field, an impossible dimension, or a modality that is not well described.

    Example:

    ```python
    >>> from modeling_mapex import MapexConfig

    >>> config = MapexConfig.from_preset("nano", modalities=["s1", "s2"])
    >>> config.moe_layers
    [1, 3, 5]
    ```"""

    model_type = "mapex"
    # What Trainer.evaluate need not gather.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *("hidden_states", "attentions", "router_logits", "router_indices", "router_weights"),
        *("reconstruction_losses", "sums", "predictions", "hidden_patches"),
    ]
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "layernorm": "keep_full_weight",
    }
    base_model_ep_plan: ClassVar[dict[str, str]] = {
        "layers.*.mlp.experts.up_proj": "grouped_gemm",
        "layers.*.mlp.experts.up_proj_bias": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj_bias": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    modalities: dict[str, dict[str, Any]] | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    position_unit: float | int = 10.0
    position_temperature: float | int = 1000.0
    pooling_type: Literal["mean", "modality_mean", "mean_std"] = "mean"

    moe_layers: list[int] | None = None
    num_experts: int = 6
    num_experts_per_tok: int = 2
    num_shared_experts: int = 0
    conditioned_router: bool = True
    expert_ids: list[list[int]] | None = None

    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int = 2
    decoder_num_attention_heads: int | None = None
    decoder_intermediate_size: int | None = None

    dense_hidden_size: int | None = None
    dense_num_stages: int = 3
    dense_num_frequencies: int = 8
    dense_normalization: Literal["layer", "batch"] = "layer"
    dense_window_metres: float | int | None = None
    semantic_loss_ignore_index: int = 255
    class_weights: list[float | int] | None = None
    label_mean: float | int = 0.0
    label_std: float | int = 1.0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    mask_ratio: float = 0.75
    modality_dropout_prob: float | int = 0.1
    norm_pix_loss: Literal["group", "patch", "none"] = "group"
    expert_pools: bool = True
    router_noise_std: float | int | None = None
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    mutual_information_coef: float | int = 0.05
    router_entropy_coef: float | int = 0.01
    router_entropy_floor: float | int = 0.0
    output_router_logits: bool = False

    expert_statistics: dict[str, dict[str, Any]] | None = None
    pruning: dict[str, Any] | None = None
    card_data: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        self.refuse_unknown_fields(kwargs)
        if self.modalities is None:
            self.modalities = {name: modality_spec(name, patch_size=PRESET_PATCH_SIZE) for name in DEFAULT_SENSORS}
        # config.json is written with sorted keys: the order that gives modalities their index must survive it.
        self.modalities = dict(sorted(self.modalities.items()))
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.moe_layers is None:
            self.moe_layers = list(range(1, self.num_hidden_layers, 2))
        if self.expert_ids is None:
            self.expert_ids = [list(range(self.num_experts)) for _ in self.moe_layers]
        if self.decoder_num_attention_heads is None:
            self.decoder_num_attention_heads = self.num_attention_heads
        if self.decoder_hidden_size is None:
            self.decoder_hidden_size = self.hidden_size // 2
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = 4 * self.decoder_hidden_size
        if self.dense_hidden_size is None:
            unit = 8 << max(self.dense_num_stages - 1, 0)
            self.dense_hidden_size = unit * math.ceil(self.hidden_size / 2 / unit)
        if self.router_noise_std is None:
            self.router_noise_std = 1.0 / max(self.num_experts, 1)
        # Complete, so that any of our classes can open any of our checkpoints; transformers alone would list only the
        # class that was saved.
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As `PreTrainedConfig.from_dict`. Keys of a file that are no fields, written by another version or a library,
        are kept as attributes with a warning, since an old checkpoint must stay readable.

        Raises:
            ValueError: the configuration of another kind of model, or `modalities` that choose instead of describing,
                which only a model can follow.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"This is the configuration of a `{model_type}` model, not of a `{cls.model_type}` one.")
        choice = kwargs.get("modalities")
        if choice is not None and not _describes_sensors(choice):
            if not kwargs.get("return_unused_kwargs"):
                raise ValueError(
                    f"`modalities={choice!r}` chooses what to keep, which takes weights: give it to `from_pretrained` "
                    "of a model, or describe the sensors in full."
                )
            # An Auto class asks the configuration first: this is for the model, which prunes while it loads.
            config, unused = cls.from_dict(
                config_dict, **{name: value for name, value in kwargs.items() if name != "modalities"}
            )
            return config, {**unused, "modalities": choice}
        unknown = {name: value for name, value in config_dict.items() if not cls.is_field(name)}
        if kwargs.get("modalities") is not None:  # set after construction, which would sort them
            kwargs["modalities"] = dict(sorted(kwargs["modalities"].items()))
        result = super().from_dict({key: config_dict[key] for key in config_dict if key not in unknown}, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if unknown:
            logger.warning_once(
                f"The configuration has keys that this version of MAPEX does not use: {sorted(unknown)}."
            )
            for name, value in unknown.items():
                setattr(config, name, value)
        config.validate()  # values in kwargs were set after construction
        return result

    @classmethod
    def is_field(cls, name: str) -> bool:
        """Whether a configuration takes `name`: its own fields, and what transformers adds to them."""
        return name in _LIBRARY_KEYS or name in {field.name for field in fields(cls)}

    @classmethod
    def refuse_unknown_fields(cls, kwargs: dict[str, Any]) -> None:
        """Raise `ValueError` for a keyword that is no field: transformers stores any silently, and a typo would pass
        for a setting.
        """
        known = {field.name for field in fields(cls)}
        for name in kwargs:
            if cls.is_field(name):
                continue
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"`MapexConfig` has no field `{name}`.{hint}")

    @classmethod
    def from_preset(
        cls,
        name: str,
        modalities: list[str] | dict[str, Any] | None = None,
        *,
        patch_size: int | None = None,
        **overrides,
    ):
        """A configuration of a standard size.

        Args:
            name (`str`): `"nano"`, `"tiny"`, `"small"`, `"base"` or `"large"`.
            modalities (`list[str]` or `dict`, *optional*):
                Names of registered sensors (default: s1, s2, rgb, dem), or a mapping from the name to `None` (the
                registered sensor), a list of its bands, or a dictionary that describes a sensor of your own (its
                `patch_size` defaults to the preset's).
            patch_size (`int`, *optional*): Overrides the preset's side of a patch, in pixels.
            overrides: Any field of `MapexConfig`.

        Raises:
            ValueError: unknown preset, sensor or band.
            TypeError: `modalities` is a string.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset `{name}`. Available: {list(PRESETS)}.")
        if isinstance(modalities, str):
            raise TypeError(
                f'`modalities` must be a list or a mapping, got the string "{modalities}": use ["{modalities}"].'
            )
        preset = dict(PRESETS[name])
        preset_patch_size = preset.pop("patch_size", PRESET_PATCH_SIZE)
        patch_size = preset_patch_size if patch_size is None else patch_size
        if modalities is None:
            modalities = DEFAULT_SENSORS
        if not isinstance(modalities, dict):
            modalities = dict.fromkeys(modalities)
        specs = {}
        for modality, description in modalities.items():
            if isinstance(description, dict):
                specs[modality] = {"patch_size": patch_size, **description}
            else:
                specs[modality] = modality_spec(modality, patch_size=patch_size, bands=description)
        return cls(modalities=specs, **{**preset, **overrides})

    @property
    def stage_names(self) -> list[str]:
        """What `MapexBackbone` can return: the embeddings, and what each block gives."""
        return ["stem", *(f"stage{block}" for block in range(1, self.num_hidden_layers + 1))]

    @property
    def num_layer_experts(self) -> list[int]:
        """Number of experts in each block; 1 is a plain MLP."""
        held = dict(zip(self.moe_layers, self.expert_ids))
        return [len(held[layer]) if layer in held else 1 for layer in range(self.num_hidden_layers)]

    @property
    def routed_layers(self) -> list[int]:
        """Positions in `moe_layers` whose layer holds more than one expert and hence a router."""
        return [position for position, ids in enumerate(self.expert_ids) if len(ids) > 1]

    @property
    def pooled_size(self) -> int:
        """Width of `pooler_output`."""
        return 2 * self.hidden_size if self.pooling_type == "mean_std" else self.hidden_size

    def pixel_parts(self, name: str) -> int:
        """What the decoder of maps reads of each band of a modality: its pixels, and of elevations their sines and
        cosines.
        """
        return 1 + 2 * self.dense_num_frequencies if self.modalities[name].get("unit") == "metres" else 1

    def num_encoder_parameters(self) -> int:
        """Parameters of `MapexModel`, computed from the fields alone; equal to what the built model counts."""
        width, inner = self.hidden_size, self.intermediate_size
        mlp = 2 * width * inner + inner + width
        attention = 4 * width * width + width + (3 * width if self.qkv_bias else 0)
        total = 2 * width + len(self.modalities) * width  # final norm, modality embeddings
        for spec in self.modalities.values():
            total += width * (len(spec["bands"]) * spec["patch_size"] ** 2 + 1)
        for layer, num_experts in enumerate(self.num_layer_experts):
            total += attention + 4 * width + num_experts * mlp
            if num_experts > 1:
                total += num_experts * width  # router
                total += len(self.modalities) * (width + num_experts) if self.conditioned_router else 0
            if layer in self.moe_layers and self.num_shared_experts:
                total += 2 * width * inner * self.num_shared_experts + inner * self.num_shared_experts + width
        return total

    def validate_dimensions(self):
        """Raise `ValueError` for a dimension that the modules or the grouped matrix product cannot take."""
        for prefix, layers in (("", self.num_hidden_layers), ("decoder_", self.decoder_num_hidden_layers)):
            width = getattr(self, f"{prefix}hidden_size")
            heads = getattr(self, f"{prefix}num_attention_heads")
            if layers < 1 or heads < 1 or width < 1:
                raise ValueError(
                    f"`{prefix}num_hidden_layers`, `{prefix}num_attention_heads` and `{prefix}hidden_size` must be at "
                    f"least 1, got {layers}, {heads} and {width}."
                )
            if width % heads:
                raise ValueError(
                    f"`{prefix}hidden_size` ({width}) must be a multiple of `{prefix}num_attention_heads` ({heads})."
                )
            for name in (f"{prefix}hidden_size", f"{prefix}intermediate_size"):
                value = getattr(self, name)
                if value < 1 or value % _GROUPED_MM_MULTIPLE:
                    raise ValueError(
                        f"`{name}` ({value}) must be a positive multiple of {_GROUPED_MM_MULTIPLE}, which the grouped "
                        "matrix product over experts needs in bf16."
                    )
        if self.position_unit <= 0 or self.position_temperature <= 1:
            raise ValueError(
                "`position_unit` must be above 0 metres and `position_temperature` above 1, got "
                f"{self.position_unit} and {self.position_temperature}."
            )

    def validate_heads(self):
        """Raise `ValueError` for a decoder of maps, or labels, that cannot be."""
        narrowest = self.dense_hidden_size >> max(self.dense_num_stages - 1, 0)
        if self.dense_num_stages < 1 or narrowest < 8 or narrowest % 8:
            raise ValueError(
                f"`dense_hidden_size` ({self.dense_hidden_size}), halved in each of `dense_num_stages` "
                f"({self.dense_num_stages}) but the first, must end at a multiple of 8."
            )
        if self.dense_num_frequencies < 0:
            raise ValueError(f"`dense_num_frequencies` must be at least 0, got {self.dense_num_frequencies}.")
        if self.dense_window_metres is not None and not self.dense_window_metres > 0:
            raise ValueError(f"`dense_window_metres` must be above 0, got {self.dense_window_metres}.")
        if self.class_weights is not None and (
            len(self.class_weights) != self.num_labels or not all(weight >= 0 for weight in self.class_weights)
        ):
            raise ValueError(
                f"`class_weights` needs {self.num_labels} numbers, one a class and none negative, got "
                f"{self.class_weights}."
            )
        if not math.isfinite(self.label_mean) or not self.label_std > 0:
            raise ValueError(
                f"`label_mean` must be finite and `label_std` above 0, got {self.label_mean} and {self.label_std}."
            )

    def validate_experts(self):
        """Raise `ValueError` where layers, experts and the experts that each layer holds do not fit together."""
        if self.num_experts < 1 or self.num_shared_experts < 0:
            raise ValueError(
                "`num_experts` must be at least 1 and `num_shared_experts` at least 0, got "
                f"{self.num_experts} and {self.num_shared_experts}."
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` must lie between 1 and `num_experts` ({self.num_experts}), got "
                f"{self.num_experts_per_tok}."
            )
        if sorted(set(self.moe_layers)) != self.moe_layers or not set(self.moe_layers) <= set(
            range(self.num_hidden_layers)
        ):
            raise ValueError(
                f"`moe_layers` must be ascending block indices below {self.num_hidden_layers}, got {self.moe_layers}."
            )
        if len(self.expert_ids) != len(self.moe_layers):
            raise ValueError(
                f"`expert_ids` needs one list per MoE layer ({len(self.moe_layers)}), got {len(self.expert_ids)}."
            )
        for layer, ids in zip(self.moe_layers, self.expert_ids):
            if not ids or sorted(set(ids)) != ids or not set(ids) <= set(range(self.num_experts)):
                raise ValueError(
                    f"`expert_ids` of block {layer} must be ascending, distinct, at least one and below "
                    f"{self.num_experts}, got {ids}."
                )

    def validate_modalities(self):
        """Raise `ValueError` for a modality that is not fully described."""
        from torch import nn

        if not self.modalities:
            raise ValueError("`modalities` is empty: a model needs at least one modality.")
        if list(self.modalities) != sorted(self.modalities):
            raise ValueError(
                "`modalities` must stay in alphabetical order, which gives each its index, got "
                f"{list(self.modalities)}. Set them when the configuration is made, not after."
            )
        for name, spec in self.modalities.items():
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or hasattr(nn.ModuleDict, name):
                raise ValueError(
                    f"`{name}` cannot be the name of a modality: use letters, digits and `_`, starting with a letter, "
                    "and no word that torch modules reserve."
                )
            unknown = set(spec) - _MODALITY_KEYS
            if unknown:
                raise ValueError(
                    f"Modality `{name}` has unknown keys {sorted(unknown)}. Known: {sorted(_MODALITY_KEYS)}."
                )
            missing = {"bands", "gsd", "patch_size"} - set(spec)
            if missing:
                raise ValueError(f"Modality `{name}` lacks {sorted(missing)}.")
            bands = spec["bands"]
            if not isinstance(bands, list) or not bands or not all(isinstance(band, str) for band in bands):
                raise ValueError(f"`bands` of modality `{name}` must be a list of names, got {bands!r}.")
            if len(set(bands)) != len(bands):
                raise ValueError(f"Modality `{name}` names a band twice: {bands}.")
            if not isinstance(spec["patch_size"], int) or spec["patch_size"] < 1:
                raise ValueError(
                    f"`patch_size` of modality `{name}` must be a positive integer, got {spec['patch_size']!r}."
                )
            if not isinstance(spec["gsd"], (int, float)) or not spec["gsd"] > 0:
                raise ValueError(f"`gsd` of modality `{name}` must be metres per pixel above 0, got {spec['gsd']!r}.")
            groups = spec.get("target_groups")
            if groups is not None and sorted(band for group in groups for band in group) != sorted(bands):
                raise ValueError(f"`target_groups` of modality `{name}` must hold each of {bands} once, got {groups}.")
            for key in PER_BAND_KEYS:
                values = spec.get(key)
                if values is not None and (not isinstance(values, (list, tuple)) or len(values) != len(bands)):
                    raise ValueError(
                        f"`{key}` of modality `{name}` needs a list of {len(bands)} values, one a band, got {values!r}."
                    )
            for bounds in spec.get("clip") or []:
                if not isinstance(bounds, (list, tuple)) or len(bounds) != 2 or not bounds[0] < bounds[1]:
                    raise ValueError(
                        f"`clip` of modality `{name}` needs the least and the greatest value of each band, like "
                        f"[[0.0, 1.0]], got {spec['clip']}."
                    )
            deviations = [value for value in spec.get("std") or [] if value is not None]
            numbers = [value for value in spec.get("mean") or [] if value is not None] + deviations
            if not all(math.isfinite(value) for value in numbers) or not all(value > 0 for value in deviations):
                raise ValueError(
                    f"`mean` and `std` of modality `{name}` must be finite, and `std` above 0, got "
                    f"{spec.get('mean')} and {spec.get('std')}."
                )

    def validate_objective(self):
        """Raise `ValueError` for a probability, share or coefficient out of range."""
        if not 0.0 < self.mask_ratio < 1.0:
            raise ValueError(f"`mask_ratio` must lie between 0 and 1, both excluded, got {self.mask_ratio}.")
        for name in ("modality_dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        coefficients = [name for name in (field.name for field in fields(self)) if name.endswith("_coef")]
        for name in (*coefficients, "router_entropy_floor", "router_noise_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")

    def validate_expert_statistics(self):
        """Raise `ValueError` for statistics that do not fit the layers and experts."""
        for modality, entry in (self.expert_statistics or {}).items():
            if modality not in self.modalities:
                raise ValueError(
                    f"`expert_statistics` names modality `{modality}`, which is not in {list(self.modalities)}."
                )
            for criterion in ("usage", "gate", "saliency"):
                shape = [len(row) for row in entry.get(criterion, [])]
                if shape != [self.num_experts] * len(self.moe_layers):
                    raise ValueError(
                        f"`expert_statistics` of `{modality}` needs `{criterion}` for {len(self.moe_layers)} layers x "
                        f"{self.num_experts} experts, got rows of {shape}."
                    )
