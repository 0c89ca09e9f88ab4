"""The masked pretraining head: its loss, its randomness, and what must not enter it."""

import pytest
import torch
from conftest import SIZES, randomize, tiny_config, tiny_inputs

from modeling_mapex import MapexForPreTraining
from modeling_mapex.losses_mapex import patchify


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def tiny_model(**overrides):
    return randomize(MapexForPreTraining(tiny_config(**overrides)))


def test_loss_by_hand():
    """Mean over modalities of the mean over hidden pixels, recomputed in a loop."""
    model, pixel_values = tiny_model(norm_pix_loss="none"), tiny_inputs()
    outputs = model(pixel_values, generator=generator())
    expected = {}
    for name, prediction in outputs.predictions.items():
        target = patchify(pixel_values[name], model.config.modalities[name]["patch_size"])
        errors = [
            (prediction[sample, patch] - target[sample, patch]).square().mean()
            for sample in range(3)
            for patch in range(target.shape[1])
            if outputs.hidden_patches[name][sample, patch]
        ]
        expected[name] = torch.stack(errors).mean()
        torch.testing.assert_close(outputs.reconstruction_losses[name], expected[name])
    torch.testing.assert_close(outputs.reconstruction_loss, torch.stack(list(expected.values())).mean())


@pytest.mark.parametrize("training", [True, False])
def test_loss_is_the_sum_of_its_named_parts(training):
    model = tiny_model(router_entropy_floor=1.3).train(training)
    outputs = model(tiny_inputs(), generator=generator(), mutual_information_scale=0.5)
    config = model.config
    expected = (
        outputs.reconstruction_loss
        + config.router_aux_loss_coef * outputs.load_balancing_loss
        + config.router_z_loss_coef * outputs.router_z_loss
        + config.router_entropy_coef * outputs.entropy_floor_loss
        - 0.5 * config.mutual_information_coef * outputs.mutual_information
    )
    torch.testing.assert_close(outputs.loss, expected)
    assert all(getattr(outputs, name) > 0 for name in ("load_balancing_loss", "router_z_loss", "entropy_floor_loss"))


def test_layers_with_different_expert_counts():
    model = tiny_model(expert_ids=[[0, 2, 3], [1, 3]]).train()
    outputs = model(tiny_inputs(), generator=generator())
    assert [logits.shape[1] for logits in outputs.router_logits] == [3, 2]
    outputs.loss.backward()
    dense = tiny_model(num_experts=1, num_experts_per_tok=1).train()
    outputs = dense(tiny_inputs(), generator=generator())
    assert outputs.loss == outputs.reconstruction_loss and outputs.mutual_information == 0


def test_every_parameter_learns():
    model = tiny_model().train()
    model(tiny_inputs(), generator=generator()).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


class TestRandomness:
    def test_the_generator_decides_everything(self):
        model, pixel_values = tiny_model(hidden_dropout_prob=0.0).train(), tiny_inputs()
        one, same, other = (model(pixel_values, generator=generator(seed)).loss for seed in (1, 1, 2))
        assert one == same and one != other

    def test_noise_equals_its_generator(self):
        model, pixel_values = tiny_model().train(), tiny_inputs()
        noise = model.draw_noise(pixel_values, generator=generator())
        assert model(pixel_values, noise=noise).loss == model(pixel_values, generator=generator()).loss

    def test_pools_and_noise_only_in_training(self):
        model, pixel_values = tiny_model(modality_dropout_prob=0.0), tiny_inputs()
        plain = tiny_model(modality_dropout_prob=0.0, expert_pools=False, router_noise_std=0.0)
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert model(pixel_values, generator=generator()).loss == plain(pixel_values, generator=generator()).loss
            expected = plain.train()(pixel_values, generator=generator()).loss
            assert model.train()(pixel_values, generator=generator()).loss != expected

    @pytest.mark.parametrize("size", [1, 2, 3, 4])
    def test_pools_bound_the_experts_of_a_modality(self, size):
        model, pixel_values = tiny_model(router_noise_std=0.0).train(), tiny_inputs()
        noise = model.draw_noise(pixel_values, generator=generator())
        noise = noise._replace(pools=torch.full_like(noise.pools, (size - 0.5) / 4))
        captured = []
        for layer in (1, 3):
            model.mapex.layers[layer].mlp.gate.register_forward_hook(
                lambda m, args, out: captured.append((args[1], out))
            )
        model(pixel_values, noise=noise)
        for routing, (_, weights, index) in captured:
            for modality in range(3):
                tokens = routing.modality_ids == modality
                used = index[tokens][weights[tokens] > 0].unique()
                assert 1 <= len(used) <= size
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(len(weights)))

    def test_checkpointing_repeats_the_same_draws(self):
        model, pixel_values = tiny_model().train(), tiny_inputs()
        model(pixel_values, generator=generator()).loss.backward()
        expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        model.activation_checkpointing_enable()
        model(pixel_values, generator=generator()).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])


class TestPrecisionAndCompilation:
    def test_router_losses_under_autocast(self):
        """Mutual information is a small difference of entropies, which half precision would drown."""
        model, pixel_values = tiny_model(initializer_range=0.02), tiny_inputs()
        expected = model(pixel_values, generator=generator()).mutual_information.item()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(pixel_values, generator=generator())
        assert outputs.mutual_information.dtype == torch.float32
        assert 0 < expected < 0.05
        assert outputs.mutual_information.item() == pytest.approx(expected, rel=0.05)

    def test_compiled_as_one_graph(self):
        model, pixel_values = tiny_model().train(), tiny_inputs()
        noise = model.draw_noise(pixel_values, generator=generator())
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixel_values, noise=noise).loss, model(pixel_values, noise=noise).loss)

    def test_reentrant_checkpointing_is_refused(self):
        model = tiny_model().train()
        model.activation_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ValueError, match="use_reentrant=False"):
            model(tiny_inputs(), generator=generator())

    def test_pools_within_an_expert_mask(self):
        """Each modality its own mask, and pools on top of it: every token keeps an expert, and one that it may use."""
        model, pixel_values = tiny_model().train(), tiny_inputs()
        allowed = torch.tensor([[True, False, False, False], [False, True, True, False], [True, True, True, True]])
        ids = []
        model.mapex.layers[1].mlp.gate.register_forward_hook(lambda module, args, out: ids.append(args[1].modality_ids))
        for seed in range(8):
            outputs = model(pixel_values, generator=generator(seed), expert_mask=[allowed] * 2)
            assert torch.isfinite(outputs.loss)
            for index, weights in zip(outputs.router_indices, outputs.router_weights):
                torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)))
                assert allowed[ids[-1]].gather(1, index)[weights > 0].all()


class TestMissingData:
    def test_absent_pixels_never_enter(self):
        model, pixel_values = tiny_model().train(), tiny_inputs()
        mask = {"optical": torch.tensor([True, False, True])}
        results = []
        for fill in (0.0, torch.nan):
            pixel_values["optical"][1] = fill
            model.zero_grad()
            outputs = model(pixel_values, modality_mask=mask, generator=generator())
            outputs.loss.backward()
            assert not outputs.hidden_patches["optical"][1].any()
            results.append([outputs.loss.detach()] + [parameter.grad.clone() for parameter in model.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*results))

    def test_invalid_pixels_never_enter(self):
        model, pixel_values = tiny_model().train(), tiny_inputs()
        valid = torch.rand(3, *SIZES["radar"]) > 0.3
        results = []
        for fill in (0.0, torch.nan):
            pixel_values["radar"] = torch.where(valid[:, None], pixel_values["radar"], fill)
            model.zero_grad()
            outputs = model(pixel_values, valid_mask={"radar": valid}, generator=generator())
            outputs.loss.backward()
            results.append([outputs.loss.detach()] + [parameter.grad.clone() for parameter in model.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*results))

    def test_a_modality_absent_from_the_whole_batch_is_not_averaged_in(self):
        model, pixel_values = tiny_model(), tiny_inputs()
        outputs = model(pixel_values, modality_mask={"radar": torch.zeros(3, dtype=torch.bool)}, generator=generator())
        losses = outputs.reconstruction_losses
        assert losses["radar"] == 0
        torch.testing.assert_close(outputs.reconstruction_loss, (losses["optical"] + losses["height"]) / 2)


class TestGroups:
    def parts(self, model):
        """A batch in which two samples have all modalities and three have one, and the same in two groups."""
        pixel_values = tiny_inputs(batch_size=5)
        present = torch.tensor([True, True, False, False, False])
        whole = {"pixel_values": pixel_values, "modality_mask": {"radar": present, "height": present}}
        whole["noise"] = noise = model.draw_noise(pixel_values, generator=generator())
        groups = []
        # Tokens stand in the order height, optical, radar: 16, 24 and 16.
        for rows, names, tokens in (
            (slice(2), list(pixel_values), slice(None)),
            (slice(2, 5), ["optical"], slice(16, 40)),
        ):
            pixels = {name: pixel_values[name][rows] for name in names}
            drawn = model.draw_noise(pixels)
            drawn = drawn._replace(
                tokens=noise.tokens[rows, tokens],
                shares=noise.shares[rows],
                dropout=noise.dropout[rows],
                pools=noise.pools,
            )
            groups.append({"pixel_values": pixels, "noise": drawn})
        return whole, groups

    def test_groups_equal_one_batch(self):
        model = tiny_model(router_noise_std=0.0, expert_pools=False, modality_dropout_prob=0.3).train()
        whole, groups = self.parts(model)
        expected = model(**whole)
        expected.loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        outputs = model(groups=groups)
        outputs.loss.backward()
        names = ("loss", "reconstruction_loss", "load_balancing_loss", "router_z_loss", "mutual_information")
        for name in names:
            torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
        assert outputs.predictions is None and set(outputs.reconstruction_losses) == set(whole["pixel_values"])

    def test_parameters_of_absent_modalities_have_a_gradient_of_zero(self):
        model = tiny_model().train()
        model(tiny_inputs(("radar",)), generator=generator()).loss.backward()
        for part in (model.mapex.embeddings.patch_embeddings, model.decoder.heads):
            assert all(not parameter.grad.any() for parameter in part["optical"].parameters())
            assert all(parameter.grad.any() for parameter in part["radar"].parameters())

    def test_either_pixels_or_groups(self):
        model = tiny_model()
        for arguments in ({}, {"groups": []}, {"pixel_values": tiny_inputs(), "groups": [{}]}):
            with pytest.raises(ValueError, match="either `pixel_values` or a list of `groups`"):
                model(**arguments)


class TestReconstruct:
    @pytest.mark.parametrize("norm_pix_loss", ["none", "patch", "group"])
    def test_visible_patches_are_given_back(self, norm_pix_loss):
        model, pixel_values = tiny_model(norm_pix_loss=norm_pix_loss), tiny_inputs()
        outputs = model(pixel_values, generator=generator())
        images = model.reconstruct(pixel_values, outputs)
        for name, image in images.items():
            patch = model.config.modalities[name]["patch_size"]
            given, back = patchify(pixel_values[name], patch), patchify(image, patch)
            hidden = outputs.hidden_patches[name]
            torch.testing.assert_close(back[~hidden], given[~hidden], rtol=1e-5, atol=1e-5)
            assert (back[hidden] - given[hidden]).abs().max() > 0.1

    def test_a_perfect_prediction_gives_the_image(self):
        model, pixel_values = tiny_model(), tiny_inputs()
        outputs = model(pixel_values, generator=generator())
        outputs.predictions = {name: model._targets(name, pixel_values[name], None)[0] for name in pixel_values}
        for name, image in model.reconstruct(pixel_values, outputs).items():
            torch.testing.assert_close(image, pixel_values[name], rtol=1e-4, atol=1e-5)


def test_it_learns():
    """A few steps on one batch bring the loss down, and mutual information up."""
    model, pixel_values = (
        MapexForPreTraining(tiny_config(initializer_range=0.02, mutual_information_coef=0.2)),
        tiny_inputs(),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draws = generator()
    history = []
    for _ in range(60):
        outputs = model(pixel_values, generator=draws)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append((outputs.reconstruction_loss.item(), outputs.mutual_information.item()))
    start, end = (torch.tensor(part).mean(dim=0) for part in (history[:10], history[-10:]))
    assert end[0] < 0.95 * start[0] and end[1] > start[1] + 0.5
