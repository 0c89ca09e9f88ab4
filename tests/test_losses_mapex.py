"""Losses against values worked out by hand."""

import math

import pytest
import torch

from modeling_mapex.losses_mapex import (
    PretrainingSums,
    entropy_floor_loss,
    load_balancing_loss,
    masked_squared_error,
    modality_membership,
    mutual_information,
    normalize_groups,
    patchify,
    router_sums,
    router_z_loss,
    unpatchify,
)


def means_of(modality_ids, probabilities, count, mask=None, index=None, gates=None):
    """Probability, dispatch and squared log-sum-exp of one layer, and which modalities are present."""
    mask = None if mask is None else torch.tensor(mask)
    logits = torch.as_tensor(probabilities, dtype=torch.float64).clamp_min(1e-30).log()
    index = torch.zeros(len(logits), 1, dtype=torch.long) if index is None else torch.tensor(index)
    gates = torch.ones(index.shape) if gates is None else torch.tensor(gates)
    membership = modality_membership(torch.tensor(modality_ids), count, mask).double()
    tokens = membership.sum(dim=1)
    sums = PretrainingSums(tokens, (router_sums(logits, index, gates, membership),), tokens, tokens)
    return *sums.routing_means()[0], tokens > 0


def information(modality_ids, probabilities, count, mask=None):
    probability, _, _, present = means_of(modality_ids, probabilities, count, mask)
    return mutual_information(probability, present).item()


class TestMutualInformation:
    def test_planted(self):
        ids = [0, 0, 1, 1]
        own_expert = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
        assert information(ids, own_expert, 2) == pytest.approx(math.log(2))
        assert information(ids, [[0.3, 0.7]] * 4, 2) == pytest.approx(0.0, abs=1e-12)
        # 0.9 to the own expert: log 2 - H(0.9)
        entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
        partly = [[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]]
        assert information(ids, partly, 2) == pytest.approx(math.log(2) - entropy)

    def test_modalities_count_equally_whatever_their_tokens(self):
        many = [[1.0, 0.0]] * 9 + [[0.0, 1.0]]
        assert information([0] * 9 + [1], many, 2) == pytest.approx(math.log(2))

    def test_masked_tokens_and_absent_modalities_do_not_count(self):
        probabilities = [[1.0, 0.0], [0.0, 1.0], [0.2, 0.8]]
        assert information([0, 1, 1], probabilities, 5, [True, True, False]) == pytest.approx(math.log(2))

    def test_gradient_is_finite_when_fully_specialised(self):
        logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
        membership = modality_membership(torch.tensor([0, 1]), 2)
        sums = router_sums(logits, torch.tensor([[0], [1]]), torch.ones(2, 1), membership)
        mutual_information(sums[:, :2], torch.tensor([True, True])).backward()
        assert torch.isfinite(logits.grad).all()


def balance(modality_ids, probabilities, index, gates=None):
    count = max(modality_ids) + 1
    probability, dispatched, _, present = means_of(modality_ids, probabilities, count, index=index, gates=gates)
    return load_balancing_loss(probability, dispatched, present).item()


def test_load_balancing():
    ids = [0, 0, 1, 1]
    assert balance(ids, [[0.5, 0.5]] * 4, [[0], [1], [0], [1]]) == pytest.approx(1.0)
    assert balance(ids, [[1.0, 0.0]] * 4, [[0]] * 4) == pytest.approx(2.0)
    # Each modality its own expert is balanced too, also when one has three times the tokens.
    own = [[1.0, 0.0]] * 3 + [[0.0, 1.0]]
    assert balance([0, 0, 0, 1], own, [[0], [0], [0], [1]]) == pytest.approx(1.0)
    # By hand: f = (0.75, 0.25) + top-2 over three experts
    one_token = [[0.5, 0.3, 0.2]]
    assert balance([0], one_token, [[0, 1]], [[0.6, 0.4]]) == pytest.approx(3 * (0.5 + 0.3) / 2)
    # A place with weight 0, where a pool had no second expert, is no dispatch.
    assert balance([0], one_token, [[0, 1]], [[1.0, 0.0]]) == pytest.approx(3 * 0.5)


def test_z_loss():
    exponentials = torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]], dtype=torch.float64).exp()
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    _, _, squared, present = means_of([0, 1, 1], exponentials, 2, [True, True, False])
    assert router_z_loss(squared, present).item() == pytest.approx(expected)


def test_entropy_floor():
    probability, _, _, present = means_of([0, 1], [[1.0, 0.0], [0.5, 0.5]], 2)
    assert entropy_floor_loss(probability, present, 0.5).item() == pytest.approx(0.25)  # 0.5 below, and none
    assert entropy_floor_loss(probability, present, 0.0).item() == 0.0


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

    def test_squared_error(self):
        prediction, target = (
            torch.zeros(1, 2, 2, 2),
            torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [9.0, 9.0]]]]),
        )
        hidden = torch.tensor([[True, False]])
        loss, count = masked_squared_error(prediction, target, hidden)
        assert (loss.item(), count.item()) == (30.0, 4)
        valid = torch.tensor([[[[True, False]], [[True, True]]]])
        loss, count = masked_squared_error(prediction, target, hidden, valid)
        assert (loss.item(), count.item()) == (10.0, 2)
        loss, count = masked_squared_error(prediction, target, torch.zeros(1, 2, dtype=torch.bool))
        assert (loss.item(), count.item()) == (0.0, 0)
