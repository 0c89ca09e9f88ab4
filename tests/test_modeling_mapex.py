"""Encoder and classification head: what should not matter does not, and all ways to run agree."""

import copy

import pytest
import torch
from conftest import MODALITIES, SIZES, randomize, subsets, tiny_config, tiny_inputs
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining, ViTConfig
from transformers.models.vit.modeling_vit import ViTModel

from modeling_mapex import MapexConfig, MapexForImageClassification, MapexForPreTraining, MapexModel


def tiny_model(model_class=MapexModel, **overrides):
    return randomize(model_class(tiny_config(**overrides)))


def encode(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).last_hidden_state


def gradients(model, pixel_values, **kwargs):
    model.zero_grad()
    model(pixel_values, **kwargs).last_hidden_state.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class TestWaysToRun:
    @pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
    @pytest.mark.parametrize("num_experts_per_tok", [1, 2, 3])
    def test_experts_implementations_agree(self, implementation, num_experts_per_tok):
        model = tiny_model(num_experts_per_tok=num_experts_per_tok)
        assert model.config._experts_implementation == "grouped_mm"
        pixel_values, other = tiny_inputs(), copy.deepcopy(model)
        model.set_experts_implementation("eager")
        other.set_experts_implementation(implementation)
        torch.testing.assert_close(encode(other, pixel_values), encode(model, pixel_values), rtol=1e-5, atol=1e-5)
        expected = gradients(model, pixel_values)
        for name, gradient in gradients(other, pixel_values).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)

    def test_attention_implementations_agree(self):
        model = tiny_model()
        assert model.config._attn_implementation == "sdpa"
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        pixel_values = tiny_inputs()
        mask = {"radar": torch.tensor([True, False, True])}
        for kwargs in ({}, {"modality_mask": mask}):
            torch.testing.assert_close(encode(eager, pixel_values, **kwargs), encode(model, pixel_values, **kwargs))
        attentions = eager(pixel_values, output_attentions=True).attentions
        assert [tuple(weights.shape) for weights in attentions] == [(3, 4, 56, 56)] * 4
        torch.testing.assert_close(attentions[0].sum(dim=-1), torch.ones(3, 4, 56))

    @pytest.mark.parametrize("masked", [False, True])
    def test_compiled_as_one_graph(self, masked):
        model = tiny_model()
        pixel_values = tiny_inputs()
        kwargs = {"modality_mask": {"radar": torch.tensor([True, False, True])}} if masked else {}
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(encode(compiled, pixel_values, **kwargs), encode(model, pixel_values, **kwargs))

    def test_compiled_training_step(self):
        model = tiny_model(MapexForImageClassification, num_labels=3)
        pixel_values, labels = tiny_inputs(), torch.tensor([0, 2, 1])
        model(pixel_values, labels=labels).loss.backward()
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        torch.compile(model, backend="aot_eager", fullgraph=True)(pixel_values, labels=labels).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)

    def test_checkpointing_gives_the_same_gradients(self):
        model = tiny_model().train()
        pixel_values = tiny_inputs()
        mask = {"radar": torch.tensor([True, False, True])}
        expected = gradients(model, pixel_values, modality_mask=mask)
        model.activation_checkpointing_enable()
        for name, gradient in gradients(model, pixel_values, modality_mask=mask).items():
            torch.testing.assert_close(gradient, expected[name])

    def test_half_precision(self):
        model = tiny_model(initializer_range=0.02)
        pixel_values = tiny_inputs()
        expected = encode(model, pixel_values)
        half = encode(copy.deepcopy(model).to(torch.bfloat16), pixel_values)
        assert half.dtype == torch.bfloat16
        assert (half.float() - expected).norm() < 0.05 * expected.norm()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(pixel_values, output_router_logits=True)
            outputs.pooler_output.float().square().mean().backward()
        assert (outputs.last_hidden_state.float() - expected).norm() < 0.05 * expected.norm()
        assert all(logits.dtype == torch.float32 for logits in outputs.router_logits)

    def test_experts_follow_autocast(self):
        """With weights in fp32 the experts work in half precision, as linear layers do, and gradients come in fp32."""
        model, pixel_values = tiny_model(initializer_range=0.02), tiny_inputs()
        seen = []
        model.layers[1].mlp.experts.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = gradients(model, pixel_values)
        assert seen == [torch.bfloat16]
        for name, gradient in gradients(model, pixel_values).items():
            assert actual[name].dtype == torch.float32
            assert (actual[name] - gradient).norm() < 0.1 * gradient.norm() + 1e-3, name

    def test_adapted_experts_follow_autocast(self):
        """Every forward pass gives the same: peft puts other tensors in the place of the experts' parameters."""
        peft = pytest.importorskip("peft", reason="adapters need the extra `lora`")
        model = tiny_model(MapexForImageClassification, num_labels=3, initializer_range=0.02)
        pixel_values = tiny_inputs()
        options = {"target_parameters": ["mlp.experts.up_proj", "mlp.experts.down_proj"], "init_lora_weights": False}
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).eval()
        with torch.no_grad():
            expected = adapted(pixel_values=pixel_values).logits
            with torch.autocast("cpu", dtype=torch.bfloat16):
                first, second = (adapted(pixel_values=pixel_values).logits for _ in range(2))
            plain = adapted.unload()(pixel_values).logits
        assert torch.equal(first, second)
        assert (first.float() - expected).norm() < 0.3 * (plain - expected).norm()

    def test_meta_device(self):
        with torch.device("meta"):
            model = MapexModel(tiny_config())
        assert all(parameter.is_meta for parameter in model.parameters())


class TestInputs:
    @pytest.mark.parametrize("names", subsets(MODALITIES), ids="+".join)
    def test_any_subset(self, names):
        model = tiny_model()
        outputs = model(tiny_inputs(names))
        assert outputs.last_hidden_state.shape == (
            3,
            sum({"radar": 16, "optical": 24, "height": 16}[n] for n in names),
            32,
        )
        assert torch.isfinite(outputs.pooler_output).all()

    def test_order_of_the_dictionary_does_not_matter(self):
        model, pixel_values = tiny_model(), tiny_inputs()
        turned = dict(reversed(pixel_values.items()))
        assert torch.equal(encode(model, pixel_values), encode(model, turned))

    def test_what_else_is_in_the_batch_does_not_matter(self):
        model, pixel_values = tiny_model(), tiny_inputs(batch_size=5)
        mask = {"radar": torch.tensor([True, False, True, True, False])}
        together = encode(model, pixel_values, modality_mask=mask)
        for sample in range(5):
            single = {name: pixels[sample : sample + 1] for name, pixels in pixel_values.items()}
            alone = encode(model, single, modality_mask={"radar": mask["radar"][sample : sample + 1]})
            torch.testing.assert_close(together[sample : sample + 1], alone, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("pooling_type", ["mean", "modality_mean", "mean_std"])
    def test_presence_mask_equals_leaving_the_modality_out(self, pooling_type):
        model, pixel_values = tiny_model(pooling_type=pooling_type), tiny_inputs()
        without = {name: pixels for name, pixels in pixel_values.items() if name != "optical"}
        with torch.no_grad():
            masked = model(pixel_values, modality_mask={"optical": torch.zeros(3, dtype=torch.bool)})
            left_out = model(without)
        there = masked.token_mask[0]
        torch.testing.assert_close(masked.last_hidden_state[:, there], left_out.last_hidden_state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(masked.pooler_output, left_out.pooler_output, rtol=1e-5, atol=1e-5)
        assert masked.last_hidden_state[:, ~there].abs().max() == 0

    def test_pixels_of_an_absent_modality_are_never_read(self):
        model, pixel_values = tiny_model(), tiny_inputs()
        mask = {"optical": torch.tensor([True, False, True])}
        expected = encode(model, pixel_values, modality_mask=mask)
        expected_gradients = gradients(model, pixel_values, modality_mask=mask)
        pixel_values["optical"][1] = torch.nan
        assert torch.equal(encode(model, pixel_values, modality_mask=mask), expected)
        for name, gradient in gradients(model, pixel_values, modality_mask=mask).items():
            assert torch.equal(gradient, expected_gradients[name]), name

    def test_values_of_invalid_pixels_are_never_read(self):
        model, pixel_values = tiny_model(), tiny_inputs()
        valid = torch.rand(3, *SIZES["radar"]) > 0.3
        valid[:, :4, :4] = False  # the first patch has none
        outputs = model(pixel_values, valid_mask={"radar": valid})
        pixel_values["radar"] = torch.where(valid[:, None], pixel_values["radar"], torch.nan)
        again = model(pixel_values, valid_mask={"radar": valid})
        assert torch.equal(again.last_hidden_state, outputs.last_hidden_state)
        expected = torch.ones(3, 56, dtype=torch.bool)
        expected[:, 40] = False  # height, optical, radar: 16 + 24 tokens come first
        assert torch.equal(outputs.token_mask, expected)

    def test_hidden_states_and_router_logits(self):
        model = tiny_model()
        outputs = model(tiny_inputs(), output_hidden_states=True, output_router_logits=True)
        assert len(outputs.hidden_states) == 5
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
        assert [tuple(logits.shape) for logits in outputs.router_logits] == [(3 * 56, 4)] * 2
        model.config.output_router_logits = True
        assert len(model(tiny_inputs()).router_logits) == 2

    def test_modality_mean_weighs_sensors_equally(self):
        model = tiny_model(pooling_type="modality_mean")
        outputs = model(tiny_inputs())
        means = [outputs.last_hidden_state[:, part].mean(dim=1) for part in (slice(16), slice(16, 40), slice(40, 56))]
        torch.testing.assert_close(outputs.pooler_output, torch.stack(means).mean(dim=0))

    def test_mean_std_is_of_the_tokens_that_are_there(self):
        model = tiny_model(pooling_type="mean_std")
        mask = {"radar": torch.tensor([True, False, True])}
        with torch.no_grad():
            outputs = model(tiny_inputs(), modality_mask=mask)
        for sample, tokens in enumerate((56, 40, 56)):  # radar has the last 16
            there = outputs.last_hidden_state[sample, :tokens]
            expected = torch.cat([there.mean(dim=0), there.std(dim=0, correction=0)])
            torch.testing.assert_close(outputs.pooler_output[sample], expected, rtol=1e-4, atol=1e-5)
        assert outputs.pooler_output.shape == (3, model.config.pooled_size)

    def test_mean_std_of_one_token_has_a_gradient(self):
        model = tiny_model(pooling_type="mean_std")
        outputs = model({"radar": tiny_inputs()["radar"][:, :, :4, :4]})
        assert outputs.last_hidden_state.shape[1] == 1
        outputs.pooler_output.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda x: x["radar"], TypeError, "must be a dictionary from modality to tensor"),
            (lambda x: {}, ValueError, "`pixel_values` is empty"),
            (lambda x: {"sonar": x["radar"]}, ValueError, "Unknown modality `sonar`. This checkpoint has"),
            (
                lambda x: {"radar": x["radar"][0]},
                ValueError,
                r"must be \(batch, channels, height, width\), got \(2, 16",
            ),
            (lambda x: {"radar": [1, 2]}, ValueError, "got list"),
            (
                lambda x: {"radar": x["radar"][:, :1]},
                ValueError,
                r"needs 2 channels in the order \['VV', 'VH'\], got 1",
            ),
            (lambda x: {"radar": x["radar"][..., :15]}, ValueError, "16 x 15 pixels; both must be multiples of .* 4"),
            (lambda x: {"radar": x["radar"][..., :0]}, ValueError, "multiples of its patch size"),
            (lambda x: {**x, "radar": x["radar"][:2]}, ValueError, "differ in batch size"),
            (
                lambda x: {"radar": x["radar"] * torch.nan},
                ValueError,
                "`radar` holds NaN or infinite values.*valid_mask",
            ),
            (lambda x: {"radar": x["radar"] + torch.inf}, ValueError, "NaN or infinite"),
        ],
    )
    def test_bad_pixel_values(self, change, error, message):
        with pytest.raises(error, match=message):
            tiny_model()(change(tiny_inputs()))

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"modality_mask": torch.ones(3)}, TypeError, "`modality_mask` must be a dictionary"),
            ({"modality_mask": {"sonar": torch.ones(3)}}, ValueError, r"names \['sonar'\], which `pixel_values`"),
            ({"modality_mask": {"radar": torch.ones(3)}}, ValueError, "must be a bool tensor of shape"),
            ({"modality_mask": {"radar": torch.ones(2).bool()}}, ValueError, r"of shape \(3,\)"),
            ({"modality_mask": {"radar": torch.tensor([True, False, False])}}, ValueError, r"Samples \[1, 2\]"),
            ({"valid_mask": {"radar": torch.ones(3, 4, 4).bool()}}, ValueError, r"of shape \(3, 16, 16\)"),
            ({"valid_mask": {"radar": torch.zeros(3, 16, 16).bool()}}, ValueError, "no valid pixel at all"),
            ({"gsd": {"radar": 0.0}}, ValueError, "metres per pixel above 0"),
            ({"gsd": 10.0}, TypeError, "`gsd` must be a dictionary"),
            ({"expert_mask": [torch.ones(4).bool()]}, ValueError, "one mask per MoE layer"),
            ({"expert_mask": [torch.zeros(4).bool()] * 2}, ValueError, "without any expert"),
            ({"modality_masks": {}}, TypeError, "modality_masks"),
        ],
    )
    def test_bad_options(self, kwargs, error, message):
        with pytest.raises(error, match=message):
            tiny_model()(tiny_inputs(["radar"]), **kwargs)
        with pytest.raises(error, match=message):
            tiny_model(MapexForImageClassification)(tiny_inputs(["radar"]), **kwargs)


class TestPositions:
    def test_resolution_matters(self):
        model, pixel_values = tiny_model(), tiny_inputs(["radar"])
        assert torch.equal(encode(model, pixel_values), encode(model, pixel_values, gsd={"radar": 10.0}))
        assert not torch.equal(encode(model, pixel_values), encode(model, pixel_values, gsd={"radar": 30.0}))

    def test_same_after_from_pretrained(self, tmp_path):
        """A table kept in a buffer would be garbage there; ours is computed in the forward pass."""
        model = tiny_model()
        assert not list(model.named_buffers())
        model.save_pretrained(tmp_path)
        loaded = MapexModel.from_pretrained(tmp_path)
        pixel_values = tiny_inputs()
        torch.testing.assert_close(encode(loaded, pixel_values), encode(model, pixel_values), rtol=0, atol=1e-6)


def test_one_expert_a_layer_is_a_plain_vit():
    """Pruned to one expert, the blocks compute what transformers' own ViT does with the same weights."""
    model = tiny_model()
    model.calibrate_experts([{"pixel_values": tiny_inputs()}])
    pruned = model.prune_for_modalities(["optical"], experts_per_layer=1).build()
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        layer_norm_eps=1e-6,
        image_size=16,
        patch_size=4,
    )
    vit = ViTModel(config, add_pooling_layer=False).eval()
    names = {"mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}
    weights = {}
    for key, tensor in pruned.state_dict().items():
        if key.startswith(("layers.", "layernorm.")):
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            weights[key] = tensor
    missing, unexpected = vit.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.startswith("embeddings.") for key in missing)

    pixel_values = tiny_inputs(["optical"])
    with torch.no_grad():
        outputs = pruned(pixel_values, output_hidden_states=True)
        hidden_states = outputs.hidden_states[0]
        for layer in vit.layers:
            hidden_states = layer(hidden_states)
        expected = vit.layernorm(hidden_states)
    torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=1e-5, atol=1e-5)


class TestClassification:
    @pytest.mark.parametrize(
        ("problem_type", "labels", "loss"),
        [
            ("single_label_classification", torch.tensor([0, 2, 1]), torch.nn.functional.cross_entropy),
            (
                "multi_label_classification",
                torch.tensor([[0.0, 1.0, 1.0]] * 3),
                torch.nn.functional.binary_cross_entropy_with_logits,
            ),
            ("regression", torch.randn(3, 3), torch.nn.functional.mse_loss),
        ],
    )
    def test_loss(self, problem_type, labels, loss):
        model = tiny_model(MapexForImageClassification, problem_type=problem_type, num_labels=3)
        outputs = model(tiny_inputs(), labels=labels)
        torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))

    def test_integer_labels_of_several_classes(self):
        model = tiny_model(MapexForImageClassification, problem_type="multi_label_classification", num_labels=3)
        pixel_values, labels = tiny_inputs(), torch.tensor([[0, 1, 1]] * 3)
        assert model(pixel_values, labels=labels).loss == model(pixel_values, labels=labels.float()).loss

    def test_routing_can_be_asked_for(self):
        model = tiny_model(MapexForImageClassification)
        outputs = model(tiny_inputs(), output_router_logits=True, output_hidden_states=True)
        assert len(outputs.router_logits) == 2 and len(outputs.hidden_states) == 5

    def test_logits_are_a_linear_map_of_the_pooled_feature(self):
        model = tiny_model(MapexForImageClassification, num_labels=3)
        pixel_values = tiny_inputs()
        with torch.no_grad():
            expected = model.classifier(model.mapex(pixel_values).pooler_output)
            assert torch.equal(model(pixel_values).logits, expected)
            assert torch.equal(model(pixel_values, return_dict=False)[0], expected)


class TestSaving:
    @pytest.mark.parametrize("model_class", [MapexModel, MapexForPreTraining, MapexForImageClassification])
    def test_round_trip_bit_for_bit(self, model_class, tmp_path):
        model = tiny_model(model_class, num_labels=3)
        model.save_pretrained(tmp_path / "one")
        auto = {
            MapexModel: AutoModel,
            MapexForPreTraining: AutoModelForPreTraining,
            MapexForImageClassification: AutoModelForImageClassification,
        }[model_class]
        loaded, info = auto.from_pretrained(tmp_path / "one", output_loading_info=True)
        assert type(loaded) is model_class
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        loaded.save_pretrained(tmp_path / "two")
        for key, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), key
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
        assert files[0] == files[1]

    def test_one_key_per_expert_on_disk(self, tmp_path):
        from safetensors import safe_open

        model = tiny_model()
        model.save_pretrained(tmp_path / "saved")
        # A file with stacked experts loads too, and is saved one key per expert again.
        model.save_pretrained(tmp_path / "stacked", save_original_format=False)
        MapexModel.from_pretrained(tmp_path / "stacked").save_pretrained(tmp_path / "again")
        for name in ("saved", "again"):
            with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
                experts = {key for key in file.keys() if ".experts." in key}  # noqa: SIM118 - no mapping
                for expert in range(4):
                    key = f"layers.1.mlp.experts.{expert}.up_proj.weight"
                    assert torch.equal(file.get_tensor(key), model.layers[1].mlp.experts.up_proj[expert])
            assert len(experts) == 2 * 4 * 4  # layers x experts x (two weights, two biases)

    def test_more_than_ten_experts_keep_their_order(self, tmp_path):
        model = tiny_model(num_experts=12)
        model.save_pretrained(tmp_path)
        loaded = MapexModel.from_pretrained(tmp_path)
        assert torch.equal(loaded.layers[1].mlp.experts.up_proj, model.layers[1].mlp.experts.up_proj)

    def test_pretraining_checkpoint_to_other_classes(self, tmp_path):
        model = tiny_model(MapexForPreTraining)
        model.save_pretrained(tmp_path)
        pixel_values = tiny_inputs()
        encoder = AutoModel.from_pretrained(tmp_path)
        torch.testing.assert_close(encode(encoder, pixel_values), encode(model.mapex, pixel_values), rtol=0, atol=1e-6)
        classifier, info = MapexForImageClassification.from_pretrained(tmp_path, num_labels=7, output_loading_info=True)
        assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
        assert not info["unexpected_keys"], "dropping the decoder is no news to report"
        assert classifier(pixel_values).logits.shape == (3, 7)
        assert classifier.classifier.weight.abs().max() > 0

    def test_modalities_keep_their_index(self, tmp_path):
        """config.json is written with sorted keys; the index of a modality must not depend on who wrote it."""
        config = tiny_config(modalities=dict(reversed(MODALITIES.items())))
        config.save_pretrained(tmp_path)
        assert list(AutoConfig.from_pretrained(tmp_path).modalities) == list(config.modalities) == sorted(MODALITIES)

    def test_dtype(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        model = MapexModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert model.layers[1].mlp.experts.up_proj.dtype == torch.bfloat16

    def test_initial_weights(self):
        """No parameter is forgotten: all are set, only biases are zero, experts differ from each other."""
        model = MapexForPreTraining(tiny_config())
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter).all(), name
            is_zero = parameter.abs().max() == 0
            assert is_zero == ("bias" in name), name
        experts = model.mapex.layers[1].mlp.experts.up_proj
        assert not torch.equal(experts[0], experts[1])
        assert experts.abs().max() <= (6 / (32 + 48)) ** 0.5

    def test_parallel_plans_name_real_modules(self):
        """Each pattern of the FSDP and expert parallel plans matches something."""
        import re

        config = tiny_config()
        names = [name for name, _ in MapexModel(config).named_modules()]
        names += [name for name, _ in MapexModel(config).named_parameters()]
        for pattern in (*config.base_model_fsdp_plan, *config.base_model_ep_plan):
            expression = re.compile(pattern.replace(".", r"\.").replace("*", r"\d+"))
            assert any(expression.fullmatch(name) for name in names), pattern


def test_base_has_the_size_of_the_design():
    """227 M in the encoder within 2 %, 85 M with one expert a layer; counted on the meta device, as the config says."""
    full = MapexConfig.from_preset("base")
    one = MapexConfig.from_preset("base", modalities=["s1"], expert_ids=[[0]] * 6)
    for config, millions in ((full, 227), (one, 85)):
        with torch.device("meta"):
            count = MapexModel(config).num_parameters()
        assert count == config.num_encoder_parameters()
        assert abs(count / 1e6 - millions) < 0.02 * millions
