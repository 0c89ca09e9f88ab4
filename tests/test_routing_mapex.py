"""Measures of routing against values worked out by hand."""

import math

import pytest
import torch
from conftest import randomize, tiny_config, tiny_inputs

from modeling_mapex import MapexForPreTraining
from modeling_mapex.routing_mapex import (
    dead_experts,
    effective_experts,
    normalized_mutual_information,
    routing_metrics,
)


def test_mutual_information():
    own = torch.eye(3)
    assert normalized_mutual_information(own) == pytest.approx(1.0)
    assert normalized_mutual_information(torch.full((3, 3), 1 / 3)) == pytest.approx(0.0, abs=1e-6)
    # Two modalities, each with two of four experts: all that can be known, though neither has one expert.
    pairs = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    assert normalized_mutual_information(pairs) == pytest.approx(1.0)
    # Absent modalities neither count nor make it harder.
    absent = torch.cat([pairs, torch.zeros(1, 4)])
    assert normalized_mutual_information(absent, torch.tensor([True, True, False])) == pytest.approx(1.0)
    assert math.isnan(normalized_mutual_information(torch.eye(3)[:1]))


def test_effective_experts():
    probability = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3] * 3])
    torch.testing.assert_close(effective_experts(probability), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


def test_dead_experts():
    dispatched = torch.tensor([[0.9, 0.1, 0.0, 0.005], [0.0, 0.99, 0.009, 0.02]])
    assert dead_experts(dispatched, top_k=2) == 1  # the third; the fourth has 2 % of one modality
    assert dead_experts(dispatched[:, :2], top_k=2) == 0


def test_metrics_of_a_step():
    model = randomize(MapexForPreTraining(tiny_config()))
    outputs = model(tiny_inputs(), generator=torch.Generator().manual_seed(0))
    metrics = routing_metrics(outputs.sums, model.config)
    information = [metrics[f"normalized_mutual_information/layer_{layer}"] for layer in (1, 3)]
    assert sum(information) * math.log(3) == pytest.approx(outputs.mutual_information.item(), rel=1e-4)
    assert metrics["normalized_mutual_information"] == pytest.approx(sum(information) / 2)
    assert 1 <= metrics["effective_experts"] <= 4 and metrics["dead_experts"] >= 0
    one_expert_left = randomize(MapexForPreTraining(tiny_config(expert_ids=[[1], [0, 2, 3]])))
    metrics = routing_metrics(one_expert_left(tiny_inputs()).sums, one_expert_left.config)
    assert "dead_experts/layer_3" in metrics and "dead_experts/layer_1" not in metrics
