"""examples/evaluate_pretraining.py: planted specialisation is measured as what it is."""

import json

import pytest
import torch
from conftest import randomize
from shard_samples import SCHEMA, items, read


pytest.importorskip("accelerate", reason="the script shares options with pretraining")
pytest.importorskip("torchdata", reason="the script shares options with pretraining")

import evaluate_pretraining
from command_line import Stop
from run_pretraining import DataArguments

from modeling_mapex import MapexConfig, MapexForPreTraining
from modeling_mapex.shards_mapex import Sample
from modeling_mapex.writing_mapex import write_shards


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of a model in which each modality has an expert of its own, and one that none uses."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_shards(items(40), read, SCHEMA, folder / "shards", progress=False)
    config = MapexConfig.from_preset(
        "nano",
        modalities={"s1": None, "s2": ["B04", "B03", "B02"], "dem": None},
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=4,
        num_experts_per_tok=1,
    )
    model = randomize(MapexForPreTraining(config))
    with torch.no_grad():
        for layer in (1, 3):
            bias = model.mapex.layers[layer].mlp.gate.modality_bias
            bias.copy_(torch.eye(3, 4) * 100)
    model.save_pretrained(folder / "model")
    evaluate_pretraining.main(
        evaluate_pretraining.EvaluationArguments(
            model=[str(folder / "model")] * 2, masks=2, random_choices=3, output=str(folder / "results.json")
        ),
        DataArguments(sources=[str(folder / "shards")], held_out=0.8, crop_size=24),
    )
    return json.loads((folder / "results.json").read_text())[str(folder / "model")]


def test_what_cannot_be_evaluated(tmp_path):
    config = MapexConfig.from_preset("nano", modalities=["s1"], hidden_size=32, num_attention_heads=4, num_experts=2)
    MapexForPreTraining(config).save_pretrained(tmp_path / "small")
    MapexForPreTraining(
        MapexConfig.from_dict({**config.to_dict(), "num_experts": 4, "expert_ids": None})
    ).save_pretrained(tmp_path / "whole")
    write_shards(items(4), read, SCHEMA, tmp_path / "shards", progress=False)
    heights = SCHEMA.select(["dem"], [])
    only = lambda item: Sample(item.id, "p", {"dem": read(item).images["dem"]})  # noqa: E731
    write_shards(items(4), only, heights, tmp_path / "heights", progress=False)
    for model, source, words in (
        ("nowhere", "shards", "Cannot load .*nowhere"),
        ("small", "shards", r"has \[2.*\] experts in its layers: prunings to \(1, 2, 3\) need a whole model"),
        ("whole", "elsewhere", "elsewhere"),
        ("whole", "shards", "No held-out sample is left to calibrate or to test on"),
        ("whole", "heights", r"heights'\] hold nothing that .*whole has \(\['s1'\]\): leave them out"),
    ):
        args = evaluate_pretraining.EvaluationArguments(model=[str(tmp_path / model)])
        with pytest.raises(Stop, match=words):
            evaluate_pretraining.main(args, DataArguments(sources=[str(tmp_path / source)], held_out=0.0, crop_size=24))


def test_specialisation(results):
    for layer in results["layers"]:
        assert layer["normalized_mutual_information"] == pytest.approx(1.0, abs=1e-3)
        assert layer["dead_experts"] == 1
        assert layer["effective_experts"] == pytest.approx({"s1": 1.0, "s2": 1.0, "dem": 1.0}, abs=1e-3)


def test_pruning_costs_nothing_where_each_has_its_expert(results):
    for entry in results["alone"].values():
        assert entry["without"] != pytest.approx(entry["full"], rel=1e-3)
        for criterion in ("saliency", "usage", "gate", "exhaustive"):
            assert list(entry["pruned"][criterion].values()) == pytest.approx([entry["full"]] * 3, rel=1e-5)
        assert entry["pruned"]["random"]["1"] != pytest.approx(entry["full"], rel=1e-5)
        assert entry["coverage_0.95"]["experts"] == [1, 1]


def test_cross_table(results):
    for chosen, errors in results["cross"].items():
        assert errors[chosen] == pytest.approx(results["alone"][chosen]["full"], rel=1e-5)


def test_report(results):
    text = evaluate_pretraining.report([results, results])
    assert "| 1 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.0 ± 0.0 |" in text
    assert "| s1 | 1 | 1.000 ± 0.000 |" in text
