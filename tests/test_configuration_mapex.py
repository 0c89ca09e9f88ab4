"""Configuration and sensor registry: what is wrong is refused at construction, what is right survives JSON."""

import pytest
from conftest import MODALITIES, tiny_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.utils import logging

from modeling_mapex import SENSORS, MapexConfig, MapexModel
from modeling_mapex.sensors_mapex import modality_spec


ERRORS = (ValueError, StrictDataclassError)


def modality(**changes):
    return {"modalities": {"radar": {**MODALITIES["radar"], **changes}}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hiden_size": 64}, "no field `hiden_size`. Did you mean `hidden_size`"),
        ({"completely_unknown": 1}, "no field `completely_unknown`"),
        ({"hidden_size": 36, "num_attention_heads": 4}, r"`hidden_size` \(36\) must be a positive multiple of 8"),
        ({"intermediate_size": 50}, r"`intermediate_size` \(50\) must be a positive multiple of 8"),
        ({"num_attention_heads": 5}, r"`hidden_size` \(32\) must be a multiple of `num_attention_heads` \(5\)"),
        ({"decoder_num_attention_heads": 3}, "must be a multiple of `decoder_num_attention_heads`"),
        ({"num_hidden_layers": 0}, "must be at least 1"),
        ({"num_attention_heads": 0}, "must be at least 1"),
        ({"num_experts": 0}, "`num_experts` must be at least 1"),
        ({"num_experts_per_tok": 5}, r"between 1 and `num_experts` \(4\), got 5"),
        ({"num_shared_experts": -1}, "`num_shared_experts` at least 0"),
        ({"moe_layers": [3, 1]}, "ascending block indices below 4"),
        ({"moe_layers": [4]}, "ascending block indices below 4"),
        ({"expert_ids": [[0]]}, r"one list per MoE layer \(2\), got 1"),
        ({"expert_ids": [[0], []]}, "`expert_ids` of block 3"),
        ({"expert_ids": [[0], [4]]}, "`expert_ids` of block 3"),
        ({"expert_ids": [[1, 0], [0]]}, "`expert_ids` of block 1"),
        ({"mask_ratio": 1.0}, "`mask_ratio` must lie between 0 and 1"),
        ({"modality_dropout_prob": 1.0}, r"`modality_dropout_prob` must lie in \[0, 1\)"),
        ({"router_z_loss_coef": -1.0}, "`router_z_loss_coef` must not be negative"),
        ({"position_unit": 0.0}, "`position_unit` must be above 0"),
        ({"pooling_type": "cls"}, "pooling_type"),
        ({"norm_pix_loss": True}, "norm_pix_loss"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"modalities": {}}, "`modalities` is empty"),
        ({"modalities": {"a.b": MODALITIES["radar"]}}, "`a.b` cannot be the name of a modality"),
        ({"modalities": {"keys": MODALITIES["radar"]}}, "`keys` cannot be the name of a modality"),
        (modality(bands=[]), "`bands` of modality `radar` must be a list of names"),
        (modality(bands="VV"), "must be a list of names"),
        (modality(bands=["VV", "VV"]), "names a band twice"),
        (modality(gsd=0), "`gsd` of modality `radar` must be metres per pixel"),
        (modality(gsd="10m"), "`gsd` of modality `radar`"),
        (modality(patch_size=2.5), "`patch_size` of modality `radar` must be a positive integer"),
        (modality(patchsize=4), r"unknown keys \['patchsize'\]"),
        (modality(target_groups=[["VV"]]), "`target_groups` of modality `radar`"),
        (modality(mean=[0.0]), "`mean` of modality `radar` needs a list of 2 values"),
        (modality(std=1.0), "`std` of modality `radar` needs a list of 2 values"),
        (modality(clip=[0.0, 1.0]), "`clip` of modality `radar` needs the least and the greatest value"),
        (modality(clip=[[1.0, 0.0]] * 2), "`clip` of modality `radar` needs the least and the greatest value"),
        (modality(mean=[0.0, float("nan")]), "`mean` and `std` of modality `radar` must be finite"),
        (modality(std=[1.0, 0.0]), "`std` above 0, got None and"),
        ({"modalities": {"radar": {"bands": ["VV"]}}}, r"lacks \['gsd', 'patch_size'\]"),
        ({"expert_statistics": {"sonar": {}}}, "names modality `sonar`"),
        ({"expert_statistics": {"radar": {"usage": [[1.0]]}}}, "needs `usage` for 2 layers x 4 experts"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ERRORS, match=message):
        tiny_config(**fields)


def test_round_trip(tmp_path):
    config = tiny_config(expert_ids=[[0, 2], [3]], num_labels=4, pruning={"source": "org/name"})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MapexConfig
    for key, value in config.to_dict().items():
        assert getattr(loaded, key) == value or key in ("id2label", "transformers_version", "_name_or_path"), key
    assert loaded.modalities == MODALITIES and loaded.num_labels == 4
    assert loaded.num_layer_experts == [1, 2, 1, 1] and loaded.routed_layers == [0]


def test_unknown_keys_of_a_file_are_kept_with_a_warning(tmp_path, caplog):
    """A checkpoint written by a newer version, or touched by a library, still opens."""
    config = tiny_config()
    config.use_cache, config.from_the_future = False, 3
    config.save_pretrained(tmp_path)
    logger = logging.get_logger("modeling_mapex.configuration_mapex")
    logger.addHandler(caplog.handler)
    loaded = MapexConfig.from_pretrained(tmp_path)
    logger.removeHandler(caplog.handler)
    assert loaded.from_the_future == 3
    assert "['from_the_future']" in caplog.text
    loaded.save_pretrained(tmp_path / "again")
    assert MapexConfig.from_pretrained(tmp_path / "again").from_the_future == 3


def test_overrides_are_validated(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert MapexConfig.from_pretrained(tmp_path, mask_ratio=0.5).mask_ratio == 0.5
    with pytest.raises(ERRORS, match="`mask_ratio` must lie between"):
        MapexConfig.from_pretrained(tmp_path, mask_ratio=1.5)


def test_order_of_modalities_is_kept(tmp_path):
    """Their order is their index: it is the same whoever sets it, or refused."""
    config = tiny_config()
    config.save_pretrained(tmp_path)
    turned = dict(reversed(MODALITIES.items()))
    assert list(MapexConfig.from_pretrained(tmp_path, modalities=turned).modalities) == sorted(MODALITIES)
    config.modalities["a_new_one"] = MODALITIES["radar"]
    with pytest.raises(ERRORS, match="alphabetical order"):
        config.save_pretrained(tmp_path)
    with pytest.raises(ERRORS, match="alphabetical order"):
        MapexModel(config)


def test_auto_map_is_complete():
    assert set(tiny_config().to_dict()["auto_map"]) == {
        "AutoConfig",
        "AutoImageProcessor",
        "AutoModel",
        "AutoModelForPreTraining",
        "AutoModelForImageClassification",
        "AutoModelForSemanticSegmentation",
        "AutoModelForDepthEstimation",
        "AutoBackbone",
    }


class TestPresets:
    @pytest.mark.parametrize(
        ("name", "width", "layers", "patch"),
        [
            ("nano", 128, 6, 8),
            ("tiny", 192, 12, 16),
            ("small", 384, 12, 16),
            ("base", 768, 12, 16),
            ("large", 1024, 24, 16),
        ],
    )
    def test_sizes(self, name, width, layers, patch):
        config = MapexConfig.from_preset(name)
        assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (width, layers, 4 * width)
        assert (config.num_experts, config.num_experts_per_tok) == (6, 2)
        assert config.moe_layers == list(range(1, layers, 2))
        assert {spec["patch_size"] for spec in config.modalities.values()} == {patch}
        assert list(config.modalities) == ["dem", "rgb", "s1", "s2"]

    def test_modalities(self):
        own = {"bands": ["red", "nir"], "gsd": 3.0}
        config = MapexConfig.from_preset("nano", {"s2": ["B04", "B08"], "s1": None, "planet": own}, patch_size=4)
        assert config.modalities["planet"] == {"patch_size": 4, **own}
        assert config.modalities["s2"]["bands"] == ["B04", "B08"]
        assert config.modalities["s2"]["target_groups"] == [["B04"], ["B08"]]
        assert config.modalities["s1"]["bands"] == ["VV", "VH"]

    def test_refused(self):
        with pytest.raises(ValueError, match="Unknown preset `huge`"):
            MapexConfig.from_preset("huge")
        with pytest.raises(ValueError, match="Unknown sensor `s7`"):
            MapexConfig.from_preset("nano", ["s7"])
        with pytest.raises(ValueError, match=r"Unknown bands \['B10'\] of `s2`"):
            MapexConfig.from_preset("nano", {"s2": ["B10"]})
        with pytest.raises(TypeError, match=r'use \["s1"\]'):
            MapexConfig.from_preset("nano", "s1")
        with pytest.raises(ValueError, match=r"no field `num_expert`\. Did you mean `num_experts`"):
            MapexConfig.from_preset("nano", num_expert=2)


@pytest.mark.parametrize("name", SENSORS)
def test_registry(name):
    sensor = SENSORS[name]
    spec = modality_spec(name, patch_size=8)
    assert spec["bands"] == sensor.band_names and len(set(spec["bands"])) == len(spec["bands"])
    assert set(sensor.display) <= set(spec["bands"]) and len(sensor.display) in (1, 3)
    assert sorted(band for group in spec["target_groups"] for band in group) == sorted(spec["bands"])
    assert all(band.gsd >= sensor.gsd for band in sensor.bands)
