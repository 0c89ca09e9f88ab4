"""The checkpoint in the repository: small, calibrated, specialised, and of use on patches it was not trained on."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from modeling_mapex import MapexForPreTraining, MapexImageProcessor
from modeling_mapex.routing_mapex import dead_experts, normalized_mutual_information


EXAMPLES = Path(__file__).parent.parent / "examples"
CHECKPOINT = EXAMPLES / "checkpoints" / "mapex-nano"
SENSORS = ["dem", "hls", "rgb", "s1", "s2"]


@pytest.fixture(scope="module")
def model():
    return MapexForPreTraining.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """The six of `bigearthnet-common`, by sensor, normalised."""
    pytest.importorskip("rasterio", reason="patches are GeoTIFFs")
    pytest.importorskip("bigearthnet_common", reason="the patches need the extra `demo`")
    import quickstart

    processor = MapexImageProcessor.from_pretrained(CHECKPOINT)
    pairs = quickstart.extract_patches(tmp_path_factory.mktemp("patches"))
    result = {}
    for index, name in enumerate(("s1", "s2")):
        images = [quickstart.read_patch(pair[index], processor.modalities[name]["bands"]) for pair in pairs]
        result[name] = processor({name: images}, units={name: quickstart.UNITS[name]})["pixel_values"]
    return result


def error(model, pixel_values) -> float:
    with torch.no_grad():
        return statistics.mean(
            model(pixel_values, generator=torch.Generator().manual_seed(seed)).reconstruction_loss.item()
            for seed in range(4)
        )


def test_files():
    weights = list(CHECKPOINT.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in weights) < 20e6
    assert {"model-trunk.safetensors", "model-experts-s1.safetensors"} <= {file.name for file in weights}
    card = (CHECKPOINT / "README.md").read_text()
    assert "reconstruction/s1" in card and all(name in card for name in SENSORS)
    held_out = json.loads((CHECKPOINT / "held_out.json").read_text())
    assert len(held_out) == 8 and sum(map(len, held_out.values())) > 200


def test_specialised(model):
    found = model.config.expert_statistics
    assert sorted(found) == SENSORS
    information = []
    for layer in range(len(model.config.moe_layers)):
        gates, usage = (torch.tensor([found[name][kind][layer] for name in SENSORS]) for kind in ("gate", "usage"))
        information.append(normalized_mutual_information(gates))
        assert dead_experts(usage, model.config.num_experts_per_tok) == 0
    assert statistics.mean(information) > 0.8


@pytest.mark.parametrize("name", ["s1", "s2"])
def test_pruned_predicts_as_the_whole_one(model, patches, name):
    """Better than a guess of each chip's mean, and with experts chosen at random much worse."""
    whole = error(model, patches[name])
    small = error(MapexForPreTraining.from_pretrained(CHECKPOINT, modalities=[name]).eval(), patches[name])
    guess = patches[name][name].var(dim=(2, 3)).mean().item()
    by_chance = statistics.mean(
        error(
            model.prune_for_modalities([name], experts_per_layer=2, criterion="random", seed=seed).build(),
            patches[name],
        )
        for seed in range(3)
    )
    print(f"{name}: whole {whole:.4f}, pruned {small:.4f}, random {by_chance:.4f}, mean of the chip {guess:.4f}")
    assert small < 1.02 * whole and whole < guess
    assert by_chance - whole > 5 * abs(small - whole)
