"""Pruning: a pruned model is the full one with the dropped experts masked, and nothing else."""

import copy

import numpy as np
import pytest
import torch
from conftest import MODALITIES, SIZES, randomize, subsets, tiny_config, tiny_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_mapex import (
    MapexConfig,
    MapexForImageClassification,
    MapexForPixelRegression,
    MapexForPreTraining,
    MapexImageProcessor,
    MapexModel,
    add_modality,
)
from modeling_mapex.pruning_mapex import plan_experts, unprune, unprune_state_dict


CLASSES = [MapexModel, MapexForPreTraining, MapexForImageClassification]
PLANS = [
    {"coverage": 0.95},
    {"coverage": 0.5},
    {"experts_per_layer": 1},
    {"experts_per_layer": [3, 1]},
    {"experts_per_layer": 2, "criterion": "random", "seed": 3},
    {"coverage": 0.7, "criterion": "exhaustive"},
]


def calibrated(model_class=MapexModel, **overrides):
    model = randomize(model_class(tiny_config(num_labels=5, **overrides)))
    batches = [{"pixel_values": tiny_inputs(names)} for names in subsets(MODALITIES)]
    model.calibrate_experts(batches, subset_errors=True)
    return model


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {model_class: calibrated(model_class) for model_class in CLASSES}


def expert_mask(config, expert_ids):
    """For the full model: only the experts with `expert_ids` may be used."""
    return [torch.tensor([expert in kept for expert in held]) for held, kept in zip(config.expert_ids, expert_ids)]


def outputs_of(model, pixel_values, **kwargs):
    """The tensors that a model computes, by name."""
    with torch.no_grad():
        if isinstance(model, MapexForPreTraining):
            outputs = model(pixel_values, generator=torch.Generator().manual_seed(1), **kwargs)
            return {"loss": outputs.reconstruction_loss, **outputs.predictions}
        outputs = model(pixel_values, **kwargs)
        keys = ("last_hidden_state", "pooler_output", "logits")
        return {key: getattr(outputs, key) for key in keys if getattr(outputs, key, None) is not None}


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        scale = tensor.abs().max().clamp_min(1.0)
        assert (actual[key] - tensor).abs().max() <= tolerance * scale, key


def same_checkpoint(one, other):
    assert one.config.to_dict() == other.config.to_dict()
    assert one.state_dict.keys() == other.state_dict.keys()
    for key, tensor in one.state_dict.items():
        assert torch.equal(tensor, other.state_dict[key]), key


class TestEqualsMasking:
    @pytest.mark.parametrize("plan", PLANS, ids=str)
    @pytest.mark.parametrize("names", subsets(MODALITIES), ids="+".join)
    @pytest.mark.parametrize("model_class", [MapexModel, MapexForImageClassification])
    def test_outputs(self, models, model_class, names, plan):
        model = models[model_class]
        pruned = model.prune_for_modalities(names, **plan)
        pixel_values = tiny_inputs(names)
        mask = expert_mask(model.config, pruned.config.expert_ids)
        expected = outputs_of(model, pixel_values, expert_mask=mask)
        assert_close(outputs_of(pruned.build(), pixel_values), expected, 1e-5)

    @pytest.mark.parametrize("plan", PLANS, ids=str)
    @pytest.mark.parametrize("names", subsets(MODALITIES), ids="+".join)
    def test_pretraining_outputs(self, models, names, plan):
        """With the same draws, of which the pruned model needs those of its modalities."""
        model = models[MapexForPreTraining]
        pruned = model.prune_for_modalities(names, **plan)
        small = pruned.build()
        pixel_values = tiny_inputs(names)
        noise = model.draw_noise(pixel_values)
        kept = [list(model.config.modalities).index(name) for name in pruned.config.modalities]
        small_noise = noise._replace(shares=noise.shares[:, kept], dropout=noise.dropout[:, kept])
        mask = expert_mask(model.config, pruned.config.expert_ids)
        with torch.no_grad():
            expected = model(pixel_values, noise=noise, expert_mask=mask)
            actual = small(pixel_values, noise=small_noise)
        assert_close(actual.predictions, expected.predictions, 1e-5)
        torch.testing.assert_close(actual.reconstruction_loss, expected.reconstruction_loss)
        for name in names:
            assert torch.equal(actual.hidden_patches[name], expected.hidden_patches[name])

    @pytest.mark.parametrize("plan", PLANS, ids=str)
    @pytest.mark.parametrize("names", subsets(MODALITIES), ids="+".join)
    def test_double_precision(self, models, names, plan):
        model = copy.deepcopy(models[MapexForImageClassification]).double()
        model.set_experts_implementation("eager")  # grouped_mm knows no float64
        pruned = model.prune_for_modalities(names, **plan)
        pixel_values = tiny_inputs(names, dtype=torch.float64)
        expected = outputs_of(model, pixel_values, expert_mask=expert_mask(model.config, pruned.config.expert_ids))
        small = pruned.build()
        assert next(small.parameters()).dtype == torch.float64
        assert_close(outputs_of(small, pixel_values), expected, 1e-12)

    def test_plain_router(self, tmp_path):
        """One that does not know the modality: less to prune, by the same rules, and the same after a save."""
        model = calibrated(conditioned_router=False)
        assert not any("modality_shift" in name or "modality_bias" in name for name in model.state_dict())
        pruned = model.prune_for_modalities(["radar", "height"], experts_per_layer=[3, 2])
        pixel_values = tiny_inputs(("radar", "height"))
        mask = expert_mask(model.config, pruned.config.expert_ids)
        assert_close(outputs_of(pruned.build(), pixel_values), outputs_of(model, pixel_values, expert_mask=mask), 1e-5)
        pruned.save_pretrained(tmp_path)
        loaded = MapexModel.from_pretrained(tmp_path)
        assert_close(outputs_of(loaded, pixel_values), outputs_of(pruned.build(), pixel_values), 0.0)

    @pytest.mark.parametrize("names", subsets(MODALITIES), ids="+".join)
    def test_same_choices(self, models, names):
        """Each token goes to the same experts with the same weights, layer by layer."""
        model = models[MapexModel]
        pruned = model.prune_for_modalities(names, experts_per_layer=[3, 2])
        pixel_values = tiny_inputs(names)
        mask = expert_mask(model.config, pruned.config.expert_ids)
        flags = {"output_router_logits": True, "output_router_indices": True}
        with torch.no_grad():
            full = model(pixel_values, expert_mask=mask, **flags)
            small = pruned.build()(pixel_values, **flags)
        for layer, kept in enumerate(pruned.config.expert_ids):
            chosen = torch.tensor(kept)[small.router_indices[layer]]
            assert torch.equal(chosen, full.router_indices[layer])
            torch.testing.assert_close(small.router_logits[layer], full.router_logits[layer][:, kept])

    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        names=st.lists(st.sampled_from(list(MODALITIES)), min_size=1, unique=True),
        counts=st.lists(st.integers(1, 4), min_size=2, max_size=2),
        present=st.lists(st.booleans(), min_size=3, max_size=3),
        seed=st.integers(0, 100),
    )
    def test_any_plan_and_presence(self, models, names, counts, present, seed):
        """Random modalities, experts and missing modalities."""
        model = models[MapexModel]
        pruned = model.prune_for_modalities(names, experts_per_layer=counts, criterion="random", seed=seed)
        pixel_values = tiny_inputs(names)
        modality_mask = {names[0]: torch.tensor(present)} if len(names) > 1 else None
        mask = expert_mask(model.config, pruned.config.expert_ids)
        expected = outputs_of(model, pixel_values, modality_mask=modality_mask, expert_mask=mask)
        assert_close(outputs_of(pruned.build(), pixel_values, modality_mask=modality_mask), expected, 1e-5)


class TestInvariants:
    def test_keeping_all_experts_changes_nothing(self, models):
        model = models[MapexForImageClassification]
        pruned = model.prune_for_modalities(list(MODALITIES), experts_per_layer=4)
        for key, tensor in model.state_dict().items():
            assert torch.equal(pruned.state_dict[key], tensor), key
        pixel_values = tiny_inputs()
        assert_close(outputs_of(pruned.build(), pixel_values), outputs_of(model, pixel_values), 0.0)

    @pytest.mark.parametrize("criterion", ["saliency", "usage", "gate", "exhaustive"])
    @pytest.mark.parametrize("coverage", [0.3, 0.6, 0.95, 1.0])
    @pytest.mark.parametrize("first", [("radar", "optical"), ("optical", "height"), ("radar", "optical", "height")])
    def test_pruning_twice_is_pruning_once(self, models, criterion, coverage, first):
        model = models[MapexForPreTraining]
        plan = {"criterion": criterion, "coverage": coverage}
        for then in subsets(first):
            twice = model.prune_for_modalities(first, **plan).build().prune_for_modalities(then, **plan)
            same_checkpoint(twice, model.prune_for_modalities(then, **plan))

    @pytest.mark.parametrize("model_class", CLASSES)
    def test_saved_and_loaded_is_equal(self, models, model_class, tmp_path):
        pruned = models[model_class].prune_for_modalities(["radar"], coverage=0.6)
        pruned.save_pretrained(tmp_path)
        loaded = model_class.from_pretrained(tmp_path)
        assert loaded.state_dict().keys() == pruned.state_dict.keys()
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, pruned.state_dict[key]), key
        pixel_values = tiny_inputs(["radar"])
        assert_close(outputs_of(loaded, pixel_values), outputs_of(pruned.build(), pixel_values), 1e-6)

    @pytest.mark.parametrize("training", [True, False])
    def test_source_is_untouched_and_shares_no_storage(self, models, training):
        model = copy.deepcopy(models[MapexForPreTraining]).train(training)
        config, weights = model.config.to_dict(), {key: value.clone() for key, value in model.state_dict().items()}
        pruned = model.prune_for_modalities(list(MODALITIES), experts_per_layer=4)
        built = pruned.build()
        with torch.no_grad():
            for tensor in pruned.state_dict.values():
                tensor.add_(1.0)
        assert not any(torch.equal(a, b) for a, b in zip(built.parameters(), pruned.state_dict.values()))
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.zero_()
        built.config.modalities["radar"]["bands"].append("x")
        pruned.config.expert_statistics["radar"]["usage"][0][0] = -1.0
        assert model.config.to_dict() == config
        assert model.training is training
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, weights[key]), key

    @pytest.mark.parametrize("plan", PLANS, ids=str)
    @pytest.mark.parametrize("fields", [{}, {"num_shared_experts": 2}, {"conditioned_router": False}], ids=str)
    def test_size_is_what_the_configuration_says(self, plan, fields, tmp_path):
        model = calibrated(**fields)
        for names in subsets(MODALITIES):
            pruned = model.prune_for_modalities(names, **plan)
            expected = pruned.config.num_encoder_parameters()
            assert pruned.build().num_parameters() == expected == pruned.config.pruning["parameters_after"]
        pruned.save_pretrained(tmp_path)
        header = 120 * len(pruned.state_dict) * 5  # names and shapes, per expert on disk
        size = (tmp_path / "model.safetensors").stat().st_size
        assert 4 * expected < size < 4 * expected + header

    def test_statistics_ids_and_provenance_survive(self, models, tmp_path):
        model = models[MapexForImageClassification]
        pruned = model.prune_for_modalities(["radar", "height"], coverage=0.8)
        pruned.save_pretrained(tmp_path)
        config = MapexForImageClassification.from_pretrained(tmp_path).config
        assert config.expert_ids == pruned.config.expert_ids
        assert config.pruning == pruned.config.pruning
        assert config.expert_statistics == {name: model.config.expert_statistics[name] for name in ("height", "radar")}
        provenance = config.pruning
        assert provenance["criterion"] == "saliency" and provenance["coverage"] == 0.8
        assert provenance["modalities"] == {"height": ["elevation"], "radar": ["VV", "VH"]}
        assert provenance["parameters_before"] == sum(tensor.numel() for tensor in model.state_dict().values())
        assert all(share >= 0.8 - 1e-6 for shares in provenance["coverage_reached"].values() for share in shares)

    def test_source_of_a_loaded_model_is_recorded(self, models, tmp_path):
        models[MapexModel].save_pretrained(tmp_path)
        model = MapexModel.from_pretrained(tmp_path)
        once = model.prune_for_modalities(["radar", "height"], coverage=0.8)
        twice = once.build().prune_for_modalities(["radar"], coverage=0.8)
        assert once.config.pruning["source"] == twice.config.pruning["source"] == tmp_path.name


class TestBands:
    def test_band_subset_equals_zeroed_bands(self, models):
        """Keeping bands, in another order, is the full model with weight zero on the others."""
        model = copy.deepcopy(models[MapexModel])
        small = model.prune_for_modalities({"optical": ["nir", "green"]}, experts_per_layer=4).build()
        assert small.config.modalities["optical"]["bands"] == ["nir", "green"]
        pixels = tiny_inputs(["optical"])["optical"]
        full = torch.zeros_like(pixels)
        full[:, 3], full[:, 1] = pixels[:, 3], pixels[:, 1]
        expected = outputs_of(model, {"optical": full})
        assert_close(outputs_of(small, {"optical": pixels[:, [3, 1]]}), expected, 1e-5)

    def test_decoder_head_keeps_the_pixels_of_its_bands(self, models):
        model = models[MapexForPreTraining]
        small = model.prune_for_modalities({"optical": ["red", "blue"], "radar": None}, experts_per_layer=4)
        head = model.decoder.heads["optical"].weight.view(4, 16, -1)
        assert torch.equal(small.state_dict["decoder.heads.optical.weight"].view(2, 16, -1), head[[2, 0]])
        assert small.config.modalities["optical"]["target_groups"] == [["blue", "red"]]
        loss = small.build()({"optical": torch.randn(2, 2, 8, 8)}).loss
        assert torch.isfinite(loss)

    def test_band_statistics_follow(self):
        modalities = {"a": {"bands": ["x", "y"], "gsd": 1.0, "patch_size": 4, "mean": [1.0, 2.0], "std": [3.0, 4.0]}}
        model = MapexModel(tiny_config(modalities=modalities))
        model.calibrate_experts([{"pixel_values": {"a": torch.randn(2, 2, 8, 8)}}])
        spec = model.prune_for_modalities({"a": ["y"]}).config.modalities["a"]
        assert (spec["mean"], spec["std"], spec["bands"]) == ([2.0], [4.0], ["y"])


class TestPlans:
    def statistics(self, rows):
        """A configuration whose modalities have these masses in both layers."""
        config = tiny_config()
        config.expert_statistics = {
            name: {"tokens": 1, **{key: [row, row] for key in ("usage", "gate", "saliency")}}
            for name, row in rows.items()
        }
        return config

    def test_coverage_keeps_the_fewest(self):
        config = self.statistics({"radar": [0.1, 0.6, 0.3, 0.0]})
        for coverage, kept in (
            (0.5, [1]),
            (0.6, [1]),
            (0.61, [1, 2]),
            (0.9, [1, 2]),
            (0.95, [0, 1, 2]),
            (1.0, [0, 1, 2]),
        ):
            assert plan_experts(config, ["radar"], coverage=coverage)[0] == kept

    def test_modalities_keep_their_union(self):
        config = self.statistics({"radar": [0.9, 0.1, 0.0, 0.0], "optical": [0.0, 0.0, 0.2, 0.8]})
        assert plan_experts(config, ["radar", "optical"], coverage=0.8) == [[0, 3], [0, 3]]
        assert plan_experts(config, ["radar", "optical"], experts_per_layer=[1, 3]) == [[0], [0, 2, 3]]

    def test_ties_go_to_the_lower_id(self):
        config = self.statistics({"radar": [1.0, 1.0, 1.0, 1.0]})
        assert plan_experts(config, ["radar"], coverage=0.5) == [[0, 1], [0, 1]]

    def test_random_keeps_as_many_as_saliency(self):
        config = self.statistics({"radar": [0.1, 0.6, 0.3, 0.0]})
        plans = [plan_experts(config, ["radar"], coverage=0.9, criterion="random", seed=seed) for seed in range(20)]
        assert {len(kept) for plan in plans for kept in plan} == {2}
        assert len({str(plan) for plan in plans}) > 5
        assert plans[3] == plan_experts(config, ["radar"], coverage=0.9, criterion="random", seed=3)

    def test_exhaustive_finds_the_best_subset(self, models):
        """Against every subset tried on the layer itself."""
        model = copy.deepcopy(models[MapexModel]).double()
        model.set_experts_implementation("eager")
        pixel_values = tiny_inputs(["optical"], dtype=torch.float64)
        model.calibrate_experts([{"pixel_values": pixel_values}], subset_errors=True)
        captured = {}
        block = model.layers[1].mlp
        block.register_forward_hook(lambda module, args, output: captured.update(inputs=args, output=output))
        with torch.no_grad():
            model(pixel_values)
            hidden, routing = captured["inputs"]
            expected, errors = captured["output"], {}
            for kept in subsets(range(4)):
                mask = [torch.tensor([expert in kept for expert in range(4)])] * 2
                difference = block(hidden, routing._replace(expert_mask=mask)) - expected
                errors[kept] = difference.square().sum(dim=-1).mean().item()
        measured = model.config.expert_statistics["optical"]["subset_error"][0]
        for kept, error in errors.items():
            assert measured[sum(1 << expert for expert in kept)] == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert measured[0] == pytest.approx(expected.square().sum(dim=-1).mean().item(), rel=1e-4)
        for count in (1, 2, 3):
            best = min((kept for kept in errors if len(kept) == count), key=errors.get)
            plan = plan_experts(model.config, ["optical"], experts_per_layer=count, criterion="exhaustive")
            assert plan[0] == list(best)


class TestBuild:
    def test_another_head(self, models):
        """From pretraining to classification: the encoder comes along, the head is new."""
        pruned = models[MapexForPreTraining].prune_for_modalities(["radar"], coverage=0.7)
        model = pruned.build(MapexForImageClassification, num_labels=3)
        assert model.classifier.weight.shape == (3, 32)
        encoder = pruned.build().mapex
        pixel_values = tiny_inputs(["radar"])
        assert_close(outputs_of(model.mapex, pixel_values), outputs_of(encoder, pixel_values), 0.0)

    def test_another_number_of_labels(self, models):
        """A pruned classifier for other classes: the same encoder, a new head."""
        pruned = models[MapexForImageClassification].prune_for_modalities(["radar"], coverage=0.7)
        model = pruned.build(num_labels=9)
        assert model.classifier.weight.shape == (9, 32) and model.config.num_labels == 9
        pruned.config.id2label = {index: f"class {index}" for index in range(5)}
        assert pruned.build().config.id2label[4] == "class 4"
        assert pruned.build(num_labels=9).classifier.weight.shape == (9, 32)
        named = pruned.build(id2label={0: "water", 1: "land"})
        assert named.classifier.weight.shape == (2, 32) and named.config.id2label[1] == "land"
        pixel_values = tiny_inputs(["radar"])
        assert_close(outputs_of(model.mapex, pixel_values), outputs_of(pruned.build().mapex, pixel_values), 0.0)

    @pytest.mark.parametrize("fields", [{"num_experts": 1, "num_experts_per_tok": 1}, {"expert_ids": [[1], [3]]}])
    def test_without_routers_no_statistics_are_needed(self, fields):
        model = randomize(MapexModel(tiny_config(**fields)))
        pixel_values = tiny_inputs(["radar"])
        for plan in ({}, {"experts_per_layer": 1}, {"criterion": "random"}):
            small = model.prune_for_modalities(["radar"], **plan).build()
            assert_close(outputs_of(small, pixel_values), outputs_of(model, pixel_values), 1e-5)

    def test_exhaustive_has_nothing_to_choose_without_routers(self):
        """Calibrated without subset errors, and left one expert a layer: pruning again needs none."""
        model = randomize(MapexModel(tiny_config()))
        model.calibrate_experts([{"pixel_values": tiny_inputs()}])
        one = model.prune_for_modalities(["radar", "optical"], experts_per_layer=1).build()
        again = one.prune_for_modalities(["radar"], criterion="exhaustive")
        assert again.config.expert_ids == one.config.expert_ids
        assert again.config.pruning["coverage_reached"] is None

    def test_implementations_survive(self, models):
        model = copy.deepcopy(models[MapexModel])
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
        small = model.prune_for_modalities(["radar"], experts_per_layer=2).build()
        assert small.config._attn_implementation == small.config._experts_implementation == "eager"

    def test_unknown_override(self, models):
        with pytest.raises(ValueError, match=r"has no field `mask_ration`\. Did you mean `mask_ratio`"):
            models[MapexModel].prune_for_modalities(["radar"]).build(mask_ration=0.5)

    def test_one_expert_is_a_plain_mlp(self, models):
        small = models[MapexModel].prune_for_modalities(["radar"], experts_per_layer=1)
        assert not any("gate" in key or "experts" in key for key in small.state_dict)
        expert = small.config.expert_ids[0][0]
        source = models[MapexModel].state_dict()
        assert torch.equal(
            small.state_dict["layers.1.mlp.up_proj.weight"], source["layers.1.mlp.experts.up_proj"][expert]
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (([],), ValueError, "empty: name at least one of"),
            (("radar",), TypeError, r"use \['radar'\]"),
            ((3,), TypeError, "must be a list of names"),
            ((["radar", "sonar"],), ValueError, r"Unknown modalities \['sonar'\]. This checkpoint has"),
            ((["radar", "radar"],), ValueError, "names one twice"),
            (({"optical": ["red", "swir"]},), ValueError, r"Unknown bands \['swir'\] of `optical`. Available"),
            (({"optical": []},), ValueError, "No bands asked for"),
            (({"optical": "red"},), TypeError, "must be a list of names"),
            (({"optical": ["red", "red"]},), ValueError, "repeated"),
        ],
    )
    def test_modalities(self, models, arguments, error, message):
        with pytest.raises(error, match=message):
            models[MapexModel].prune_for_modalities(*arguments)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"coverage": 0.0}, r"must lie in \(0, 1\], got 0.0"),
            ({"coverage": 1.01}, r"must lie in \(0, 1\]"),
            ({"coverage": float("nan")}, r"must lie in \(0, 1\]"),
            ({"experts_per_layer": 0}, "Block 1 holds 4 experts; cannot keep 0"),
            ({"experts_per_layer": 5}, "Block 1 holds 4 experts; cannot keep 5"),
            ({"experts_per_layer": [4, 5]}, "Block 3 holds 4 experts; cannot keep 5"),
            ({"experts_per_layer": [4]}, r"one number per MoE layer \(2\), got \[4\]"),
            ({"experts_per_layer": 2, "coverage": 0.5}, "not both"),
            ({"criterion": "luck"}, "Unknown criterion `luck`. Available"),
        ],
    )
    def test_options(self, models, options, message):
        model = models[MapexModel]
        before = model.config.to_dict()
        with pytest.raises(ValueError, match=message):
            model.prune_for_modalities(["radar"], **options)
        assert model.config.to_dict() == before

    def test_without_statistics(self):
        model = MapexModel(tiny_config())
        with pytest.raises(ValueError, match=r"No expert statistics for \['radar'\].*calibrate_experts"):
            model.prune_for_modalities(["radar"])
        model.calibrate_experts([{"pixel_values": tiny_inputs(["optical"])}])
        with pytest.raises(ValueError, match=r"for \['radar'\] \(there are some for \['optical'\]\)"):
            model.prune_for_modalities(["radar", "optical"])
        with pytest.raises(ValueError, match="subset_errors=True"):
            model.prune_for_modalities(["optical"], criterion="exhaustive")

    def test_what_an_earlier_pruning_dropped(self, models):
        small = models[MapexModel].prune_for_modalities({"optical": ["red", "nir"]}, experts_per_layer=2).build()
        with pytest.raises(ValueError, match=r"Unknown modalities \['radar'\].*Load the unpruned model"):
            small.prune_for_modalities(["radar"])
        with pytest.raises(ValueError, match=r"Unknown bands \['blue'\]"):
            small.prune_for_modalities({"optical": ["blue"]})
        with pytest.raises(ValueError, match="holds 2 experts; cannot keep 3"):
            small.prune_for_modalities(["optical"], experts_per_layer=3)
        with pytest.raises(ValueError, match=r"Unknown modality `radar`.*load the unpruned"):
            small({"radar": torch.randn(1, 2, *SIZES["radar"])})


class TestAdapters:
    """Weights that adapters hide are not lost in silence."""

    def test_loaded_from_a_folder_of_their_own(self, models, tmp_path):
        peft = pytest.importorskip("peft", reason="the extra `lora`")
        base = copy.deepcopy(models[MapexForImageClassification]).eval()
        base.save_pretrained(tmp_path / "base")
        model = MapexForImageClassification.from_pretrained(tmp_path / "base")
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(tmp_path / "adapter")
        assert not (tmp_path / "adapter" / "model.safetensors").exists()
        again = MapexForImageClassification.from_pretrained(tmp_path / "adapter").eval()
        pixels = tiny_inputs(["radar"])
        with torch.no_grad():
            expected, other = model.eval()(pixels).logits, base(pixels).logits
            assert torch.equal(again(pixels).logits, expected) and not torch.allclose(expected, other)
        assert "| 0.0 MB |" not in (tmp_path / "adapter" / "README.md").read_text(), "the size is that of the model"

    def test_refused_until_they_are_merged(self, models):
        peft = pytest.importorskip("peft", reason="the extra `lora`")
        full = copy.deepcopy(models[MapexForImageClassification])
        pruned = full.prune_for_modalities(["radar"])
        adapter = peft.LoraConfig(target_modules=["q_proj"])
        adapted, small = peft.get_peft_model(copy.deepcopy(full), adapter), pruned.build()
        small.add_adapter(adapter)
        with pytest.raises(ValueError, match="carries adapters"):
            adapted.base_model.model.prune_for_modalities(["radar"])
        with pytest.raises(ValueError, match="carries adapters"):
            unprune(full, small)
        with pytest.raises(ValueError, match="carries adapters"):
            add_modality(small, "other", "radar")
        merged = adapted.merge_and_unload().prune_for_modalities(["radar"])
        assert all(torch.equal(tensor, merged.state_dict[key]) for key, tensor in pruned.state_dict.items())


class TestCategorical:
    def test_classes_that_were_pruned_are_ground_like_any_other(self):
        """The pruned model and its processor against the whole one with the bands of other classes set to zero."""
        config = MapexConfig.from_preset("nano", modalities=["s1", "worldcover"], hidden_size=32, num_attention_heads=4)
        full = randomize(MapexModel(config))
        full.calibrate_experts(
            [
                {
                    "pixel_values": {
                        name: torch.randn(2, len(spec["bands"]), 16, 16) for name, spec in config.modalities.items()
                    }
                }
            ]
        )
        kept = ["tree_cover", "built_up"]
        small = full.prune_for_modalities({"worldcover": kept}, coverage=1.0).build()
        again = full.prune_for_modalities({"worldcover": [*kept, "water"]}, coverage=1.0).build()
        again = again.prune_for_modalities({"worldcover": kept}, coverage=1.0).build()
        assert again.config.modalities == small.config.modalities
        codes = np.random.default_rng(0).choice(config.modalities["worldcover"]["codes"], (1, 16, 16))
        codes[0, :3] = 0  # no data
        whole = MapexImageProcessor.from_config(full.config)({"worldcover": codes})
        part = MapexImageProcessor.from_config(small.config)({"worldcover": codes})
        positions = [config.modalities["worldcover"]["bands"].index(name) for name in kept]
        assert torch.equal(part["valid_mask"]["worldcover"], whole["valid_mask"]["worldcover"])
        assert torch.equal(part["pixel_values"]["worldcover"], whole["pixel_values"]["worldcover"][:, positions])
        with pytest.raises(ValueError, match=r"holds the codes \[77.0\]"):
            MapexImageProcessor.from_config(small.config)({"worldcover": np.full((1, 16, 16), 77)})


class TestUnprune:
    """A pruned model goes back to where it came from."""

    def test_head_comes_with_what_its_labels_are(self):
        full = randomize(MapexForPixelRegression(tiny_config(dense_window_metres=None)))
        full.calibrate_experts([{"pixel_values": tiny_inputs()}])
        small = full.prune_for_modalities(["radar"]).build(label_mean=63.0, label_std=72.0, dense_window_metres=160.0)
        merged = unprune(full, small)
        pixels = tiny_inputs(["radar"])
        fields = ("label_mean", "label_std", "dense_window_metres")
        assert [getattr(merged.config, field) for field in fields] == [63.0, 72.0, 160.0]
        with torch.no_grad():
            expected = full(pixels).logits * 72.0 + 63.0  # of mean 0 and deviation 1
            torch.testing.assert_close(merged(pixels).logits, expected, rtol=1e-4, atol=1e-3)

    def test_incomplete_weights(self, models):
        full = models[MapexForImageClassification]
        config, tensors = full.prune_for_modalities(["radar"])
        del tensors["mapex.layers.0.attention.q_proj.weight"]
        with pytest.raises(ValueError, match=r"lacks `mapex.layers.0.attention.q_proj.weight`"):
            unprune_state_dict(full.state_dict(), full.config, tensors, config)

    @pytest.mark.parametrize("plan", PLANS, ids=str)
    @pytest.mark.parametrize("choice", [["radar"], ["height", "optical"], {"optical": ["nir", "blue"]}], ids=str)
    @pytest.mark.parametrize("model_class", CLASSES)
    def test_without_training_it_is_the_identity(self, models, model_class, choice, plan):
        full = models[model_class]
        pruned = full.prune_for_modalities(choice, **plan)
        for small in (pruned, pruned.build()):
            merged = unprune(full, small)
            assert type(merged) is model_class and not merged.training
            assert merged.config.to_dict() == {**full.config.to_dict(), "dtype": "float32"}
            for key, tensor in full.state_dict().items():
                assert torch.equal(merged.state_dict()[key], tensor), key
                assert merged.state_dict()[key].data_ptr() != tensor.data_ptr(), key

    @pytest.mark.parametrize("plan", PLANS, ids=str)
    @pytest.mark.parametrize("choice", [["radar"], {"optical": ["nir", "blue"], "height": None}], ids=str)
    def test_what_was_trained_comes_back(self, models, choice, plan):
        """Pruning the merged model gives the trained one, and what was dropped is as it was."""
        full = models[MapexForPreTraining]
        small = full.prune_for_modalities(choice, **plan).build()
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = {key: tensor.clone() for key, tensor in full.state_dict().items()}
        merged = unprune(full, small)
        again = merged.prune_for_modalities(choice, **plan)
        for key, tensor in small.state_dict().items():
            assert torch.equal(again.state_dict[key], tensor), key
        for key, tensor in before.items():
            assert torch.equal(full.state_dict()[key], tensor), "the whole model is not changed"
        unused = [name for name in MODALITIES if name not in small.config.modalities]
        for name in unused:
            key = f"mapex.embeddings.patch_embeddings.{name}.projection.weight"
            assert torch.equal(merged.state_dict()[key], before[key])
        for layer, kept, held in zip(full.config.moe_layers, small.config.expert_ids, full.config.expert_ids):
            experts = merged.state_dict()[f"mapex.layers.{layer}.mlp.experts.up_proj"]
            for expert in set(held) - set(kept):
                assert torch.equal(experts[expert], before[f"mapex.layers.{layer}.mlp.experts.up_proj"][expert])
            for expert in kept:
                assert not torch.equal(experts[expert], before[f"mapex.layers.{layer}.mlp.experts.up_proj"][expert])

    def test_a_task_model_brings_its_encoder(self, models):
        full = models[MapexForPreTraining]
        small = full.prune_for_modalities(["radar"]).build(MapexForImageClassification, num_labels=7)
        with torch.no_grad():
            small.mapex.layernorm.weight.fill_(3.0)
        for tuned in (small, small.mapex):
            tuned.config.pruning = small.config.pruning
            merged = unprune(full, tuned)
            assert bool((merged.mapex.layernorm.weight == 3.0).all())
            assert torch.equal(merged.decoder.embed.weight, full.decoder.embed.weight)
        whole = unprune(models[MapexModel], small)
        assert bool((whole.layernorm.weight == 3.0).all())

    def test_refused(self, models):
        full = models[MapexModel]
        small = full.prune_for_modalities(["radar"]).build()
        with pytest.raises(ValueError, match="no provenance"):
            unprune(full, full)
        with pytest.raises(ValueError, match="experts"):
            unprune(full.prune_for_modalities(["radar"], experts_per_layer=1).build(), small)
        with pytest.raises(ValueError, match="`radar` with bands"):
            unprune(full.prune_for_modalities(["optical"], coverage=1.0).build(), small)
        other = MapexModel(tiny_config(hidden_size=64))
        with pytest.raises(ValueError, match="`hidden_size=32`"):
            unprune(other, small)
        classifier = models[MapexForImageClassification]
        tuned = classifier.prune_for_modalities(["radar"]).build(num_labels=7)
        with pytest.raises(ValueError, match="as many labels"):
            unprune(classifier, tuned)
