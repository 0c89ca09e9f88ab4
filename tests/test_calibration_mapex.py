"""Expert statistics against what the routers and experts really did."""

import pytest
import torch
from conftest import MODALITIES, randomize, subsets, tiny_config, tiny_inputs

from modeling_mapex import MapexForImageClassification, MapexModel


def observed(model, pixel_values, **kwargs):
    """Statistics by brute force: every expert run by itself on every token."""
    inputs = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
        for layer in model.layers
        if hasattr(layer.mlp, "gate")
    ]
    with torch.no_grad():
        outputs = model(pixel_values, output_router_logits=True, output_router_indices=True, **kwargs)
    for hook in hooks:
        hook.remove()
    ids = outputs.modality_ids.flatten()
    mask = torch.ones_like(ids, dtype=torch.bool) if outputs.token_mask is None else outputs.token_mask.flatten()
    result = {}
    for position, name in enumerate(model.config.modalities):
        tokens = mask & (ids == position)
        if not tokens.any():
            continue
        entry = {"tokens": int(tokens.sum()), "usage": [], "gate": [], "saliency": []}
        for layer, logits, index, hidden in zip([1, 3], outputs.router_logits, outputs.router_indices, inputs):
            experts = model.layers[layer].mlp.experts
            gates = torch.zeros_like(logits).scatter(1, index, logits.softmax(-1).gather(1, index))
            gates = gates / gates.sum(dim=1, keepdim=True)
            norms = torch.stack(
                [
                    experts.act_fn(hidden @ experts.up_proj[e].T + experts.up_proj_bias[e])
                    .matmul(experts.down_proj[e].T)
                    .add(experts.down_proj_bias[e])
                    .norm(dim=1)
                    for e in range(experts.num_experts)
                ],
                dim=1,
            )
            entry["usage"].append((gates > 0).float()[tokens].mean(dim=0).tolist())
            entry["gate"].append(gates[tokens].mean(dim=0).tolist())
            entry["saliency"].append((gates * norms)[tokens].mean(dim=0).tolist())
        result[name] = entry
    return result


def assert_statistics(actual, expected):
    assert actual.keys() == expected.keys()
    for name, entry in expected.items():
        assert actual[name]["tokens"] == entry["tokens"]
        for criterion in ("usage", "gate", "saliency"):
            for row, expected_row in zip(actual[name][criterion], entry[criterion], strict=True):
                assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6), (name, criterion)


@pytest.fixture
def model():
    return randomize(MapexModel(tiny_config()))


@pytest.mark.parametrize("names", subsets(MODALITIES), ids="+".join)
def test_equals_brute_force(model, names):
    pixel_values = tiny_inputs(names)
    assert_statistics(model.calibrate_experts([{"pixel_values": pixel_values}]), observed(model, pixel_values))


def test_absent_modalities_do_not_count(model):
    pixel_values = tiny_inputs()
    mask = {"radar": torch.tensor([True, False, False]), "height": torch.zeros(3, dtype=torch.bool)}
    statistics = model.calibrate_experts([{"pixel_values": pixel_values, "modality_mask": mask}])
    assert_statistics(statistics, observed(model, pixel_values, modality_mask=mask))
    assert "height" not in statistics and statistics["radar"]["tokens"] == 16


def test_does_not_depend_on_the_batches(model):
    pixel_values = tiny_inputs(batch_size=6)
    parts = [{"pixel_values": {n: p[start : start + 2] for n, p in pixel_values.items()}} for start in (0, 2, 4)]
    assert_statistics(model.calibrate_experts(iter(parts)), model.calibrate_experts([{"pixel_values": pixel_values}]))


def test_sums(model):
    """Each token uses two experts, with gates that sum to one."""
    statistics = model.calibrate_experts([{"pixel_values": tiny_inputs()}])
    for entry in statistics.values():
        for usage, gate in zip(entry["usage"], entry["gate"]):
            assert sum(usage) == pytest.approx(2.0) and sum(gate) == pytest.approx(1.0)


def test_model_is_unchanged(model):
    model.train()
    model.layers[0].eval()  # frozen by its owner
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.calibrate_experts([{"pixel_values": tiny_inputs(), "labels": torch.tensor([1, 2, 3])}])
    assert model.training and not model.layers[0].training and model.layers[1].mlp.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_heads_calibrate_their_encoder():
    head = randomize(MapexForImageClassification(tiny_config()))
    pixel_values = tiny_inputs()
    assert_statistics(head.calibrate_experts([{"pixel_values": pixel_values}]), observed(head.mapex, pixel_values))


def test_pruned_model_can_be_calibrated_again(model):
    model.calibrate_experts([{"pixel_values": tiny_inputs()}])
    small = model.prune_for_modalities(["radar"], experts_per_layer=[2, 1]).build()
    statistics = small.calibrate_experts([{"pixel_values": tiny_inputs(["radar"])}], subset_errors=True)
    for layer, kept in enumerate(small.config.expert_ids):
        used = [expert for expert, share in enumerate(statistics["radar"]["usage"][layer]) if share > 0]
        assert used == kept
    # Of two experts the better one by itself is the one whose absence costs more.
    errors = statistics["radar"]["subset_error"][0]
    best = min(small.config.expert_ids[0], key=lambda expert: errors[1 << expert])
    again = small.prune_for_modalities(["radar"], experts_per_layer=1, criterion="exhaustive")
    assert again.config.expert_ids == [[best], small.config.expert_ids[1]]


class TestErrors:
    def refused(self, model, error, message, batches, **kwargs):
        model.train()
        model.config.expert_statistics = None
        with pytest.raises(error, match=message):
            model.calibrate_experts(batches, **kwargs)
        assert model.training and model.config.expert_statistics is None

    def test_batches(self, model):
        self.refused(model, ValueError, "`batches` was empty", [])
        self.refused(model, TypeError, "dictionary with `pixel_values`, got list", [[1, 2]])
        self.refused(model, TypeError, "dictionary with `pixel_values`", [{"images": tiny_inputs()}])
        wrong = [{"pixel_values": torch.ones(1, 2, 8, 8)}]
        self.refused(model, TypeError, "must be a dictionary from modality to tensor", wrong)
        self.refused(
            model, ValueError, "Unknown modality `sonar`", [{"pixel_values": {"sonar": torch.ones(1, 1, 8, 8)}}]
        )

    def test_too_many_subsets(self):
        model = MapexModel(tiny_config(num_experts=9))
        self.refused(model, ValueError, "at most 8 experts", [{"pixel_values": tiny_inputs()}], subset_errors=True)

    def test_broken_weights(self, model):
        with torch.no_grad():
            model.layers[0].attention.o_proj.bias[0] = torch.nan
        self.refused(model, ValueError, "not finite", [{"pixel_values": tiny_inputs()}])
