"""Losses against values worked out by hand."""

import math

import pytest
import torch

from modeling_mapex.losses_mapex import (
    entropy_floor_loss,
    load_balancing_loss,
    masked_mean_square,
    modality_averaging_weights,
    mutual_information,
    normalize_groups,
    patchify,
    router_z_loss,
    unpatchify,
)


def logits_for(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).clamp_min(1e-30).log()


def weights_for(modality_ids, count, mask=None):
    mask = None if mask is None else torch.tensor(mask)
    return modality_averaging_weights(torch.tensor(modality_ids), count, mask).double()


class TestMutualInformation:
    def test_planted(self):
        weights = weights_for([0, 0, 1, 1], 2)
        own_expert = logits_for([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        assert mutual_information(own_expert, weights).item() == pytest.approx(math.log(2))
        shared = logits_for([[0.3, 0.7]] * 4)
        assert mutual_information(shared, weights).item() == pytest.approx(0.0, abs=1e-12)
        # 0.9 to the own expert: log 2 - H(0.9)
        partly = logits_for([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
        entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
        assert mutual_information(partly, weights).item() == pytest.approx(math.log(2) - entropy)

    def test_modalities_count_equally_whatever_their_tokens(self):
        many = logits_for([[1.0, 0.0]] * 9 + [[0.0, 1.0]])
        assert mutual_information(many, weights_for([0] * 9 + [1], 2)).item() == pytest.approx(math.log(2))

    def test_masked_tokens_and_absent_modalities_do_not_count(self):
        logits = logits_for([[1.0, 0.0], [0.0, 1.0], [0.2, 0.8]])
        weights = weights_for([0, 1, 1], 5, [True, True, False])
        assert mutual_information(logits, weights).item() == pytest.approx(math.log(2))

    def test_gradient_is_finite_when_fully_specialised(self):
        logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
        mutual_information(logits, weights_for([0, 1], 2).float()).backward()
        assert torch.isfinite(logits.grad).all()


def test_load_balancing():
    weights = weights_for([0, 0, 1, 1], 2)
    balanced = logits_for([[0.5, 0.5]] * 4)
    one = torch.ones(4, 1)
    assert load_balancing_loss(balanced, torch.tensor([[0], [1], [0], [1]]), one, weights).item() == pytest.approx(1.0)
    collapsed = logits_for([[1.0, 0.0]] * 4)
    assert load_balancing_loss(collapsed, torch.tensor([[0]] * 4), one, weights).item() == pytest.approx(2.0)
    # Each modality its own expert is balanced too, also when one has three times the tokens.
    logits = logits_for([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    weights = weights_for([0, 0, 0, 1], 2)
    assert load_balancing_loss(logits, torch.tensor([[0], [0], [0], [1]]), one, weights).item() == pytest.approx(1.0)
    # By hand: f = (0.75, 0.25) + top-2 over three experts
    logits = logits_for([[0.5, 0.3, 0.2]])
    loss = load_balancing_loss(logits, torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]]), weights_for([0], 1))
    assert loss.item() == pytest.approx(3 * (0.5 + 0.3) / 2)
    # A place with weight 0, where a pool had no second expert, is no dispatch.
    loss = load_balancing_loss(logits, torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]), weights_for([0], 1))
    assert loss.item() == pytest.approx(3 * 0.5)


def test_z_loss():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]], dtype=torch.float64)
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    weights = weights_for([0, 1, 1], 2, [True, True, False])
    assert router_z_loss(logits, weights).item() == pytest.approx(expected)


def test_entropy_floor():
    logits = logits_for([[1.0, 0.0], [0.5, 0.5]])
    weights = weights_for([0, 1], 2)
    assert entropy_floor_loss(logits, weights, 0.5).item() == pytest.approx(0.25)  # 0.5 below, and none
    assert entropy_floor_loss(logits, weights, 0.0).item() == 0.0


def test_patches_and_back():
    pixels = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = patchify(pixels, 2)
    assert patches.shape == (2, 6, 3, 4)
    assert torch.equal(patches[1, 4, 2].view(2, 2), pixels[1, 2, 2:4, 2:4])
    assert torch.equal(unpatchify(patches, (2, 3), 2), pixels)


class TestTargets:
    def test_groups(self):
        patches = torch.randn(2, 5, 3, 16) * 7 + 3
        normalised, mean, std = normalize_groups(patches, [[0, 2], [1]])
        for channels in ([0, 2], [1]):
            group = normalised[:, :, channels].flatten(2)
            torch.testing.assert_close(group.mean(dim=2), torch.zeros(2, 5), atol=1e-5, rtol=0)
            torch.testing.assert_close(group.std(dim=2, unbiased=False), torch.ones(2, 5))
        torch.testing.assert_close(normalised * std + mean, patches)

    def test_invalid_pixels_do_not_count(self):
        patches, valid = torch.randn(2, 5, 3, 16), torch.rand(2, 5, 1, 16) > 0.4
        expected = normalize_groups(patches, [[0, 1, 2]], valid)
        changed = torch.where(valid, patches, 1e6)
        actual = normalize_groups(changed, [[0, 1, 2]], valid)
        torch.testing.assert_close(actual[1], expected[1])
        torch.testing.assert_close(actual[2], expected[2])
        values = patches[0, 0][:, valid[0, 0, 0]]
        torch.testing.assert_close(expected[1][0, 0, 0, 0], values.mean())
        torch.testing.assert_close(expected[2][0, 0, 0, 0], (values.var(unbiased=False) + 1e-6).sqrt())

    def test_mean_square(self):
        prediction, target = (
            torch.zeros(1, 2, 2, 2),
            torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [9.0, 9.0]]]]),
        )
        hidden = torch.tensor([[True, False]])
        loss, count = masked_mean_square(prediction, target, hidden)
        assert (loss.item(), count.item()) == (30 / 4, 4)
        valid = torch.tensor([[[[True, False]], [[True, True]]]])
        loss, count = masked_mean_square(prediction, target, hidden, valid)
        assert (loss.item(), count.item()) == (10 / 2, 2)
        loss, count = masked_mean_square(prediction, target, torch.zeros(1, 2, dtype=torch.bool))
        assert (loss.item(), count.item()) == (0.0, 0)
