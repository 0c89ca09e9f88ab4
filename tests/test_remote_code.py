"""Checkpoints carry their code: everything works in a fresh interpreter that cannot import the package."""

import os
import shutil
import textwrap

import pytest
import torch
from conftest import randomize, tiny_config, tiny_inputs
from interpreters import run_python
from safetensors.torch import load_file, save_file

from modeling_mapex import (
    MapexForImageClassification,
    MapexForPixelRegression,
    MapexForPreTraining,
    MapexForSemanticSegmentation,
)


PRELUDE = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining
from transformers import AutoModelForDepthEstimation, AutoModelForSemanticSegmentation

pixel_values = load_file("inputs.safetensors")

def encode(model):
    with torch.no_grad():
        return getattr(model, "mapex", model).eval()(pixel_values).last_hidden_state
"""


def run_without_package(code: str, folder) -> str:
    """Run `code` where `import modeling_mapex` fails, with an empty module cache; its standard output."""
    variables = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    return run_python(PRELUDE + textwrap.dedent(code), folder, variables, package=False)


def same_weights(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.fixture
def full(tmp_path):
    """A calibrated model, saved below `tmp_path` with an input and what the encoder makes of it."""
    model = randomize(MapexForPreTraining(tiny_config()))
    model.calibrate_experts([{"pixel_values": tiny_inputs()}, {"pixel_values": tiny_inputs(["radar"])}])
    model.save_pretrained(tmp_path / "full")
    pixel_values = tiny_inputs(["radar"])
    save_file(pixel_values, tmp_path / "inputs.safetensors")
    with torch.no_grad():
        save_file({"output": model.mapex(pixel_values).last_hidden_state}, tmp_path / "full.safetensors")
    return model


def test_all_auto_classes_and_pruning(full, tmp_path):
    """Load, prune and save remotely; load that remotely again; and compare with the package at each step."""
    pruned = full.prune_for_modalities(["radar"], experts_per_layer=[2, 1])
    pruned.save_pretrained(tmp_path / "pruned")
    pixel_values = load_file(tmp_path / "inputs.safetensors")
    with torch.no_grad():
        save_file({"output": pruned.build().mapex(pixel_values).last_hidden_state}, tmp_path / "pruned.safetensors")

    run_without_package(
        """
        for name in ("full", "pruned"):
            expected = load_file(f"{name}.safetensors")["output"]
            config = AutoConfig.from_pretrained(name, trust_remote_code=True)
            assert type(config).__module__.startswith("transformers_modules"), type(config)
            for auto in (AutoModel, AutoModelForPreTraining, AutoModelForImageClassification):
                model = auto.from_pretrained(name, trust_remote_code=True)
                assert (encode(model) - expected).abs().max() < 1e-5, (name, auto)
                assert model.config._experts_implementation == "grouped_mm"
        model = AutoModelForPreTraining.from_pretrained("full", trust_remote_code=True)
        model.save_pretrained("resaved")
        checkpoint = model.prune_for_modalities(["radar"], experts_per_layer=[2, 1])
        checkpoint.save_pretrained("pruned-remotely")
        checkpoint.build().calibrate_experts([{"pixel_values": pixel_values}])
        """,
        tmp_path,
    )
    assert same_weights(tmp_path / "resaved/model.safetensors", tmp_path / "full/model.safetensors")
    assert same_weights(tmp_path / "pruned-remotely/model.safetensors", tmp_path / "pruned/model.safetensors")
    for name in ("pruned", "pruned-remotely"):
        files = {file.name for file in (tmp_path / name).glob("*.py")}
        assert {"modeling_mapex.py", "configuration_mapex.py", "pruning_mapex.py"} <= files

    run_without_package(
        """
        expected = load_file("pruned.safetensors")["output"]
        for auto in (AutoModel, AutoModelForPreTraining, AutoModelForImageClassification):
            model = auto.from_pretrained("pruned-remotely", trust_remote_code=True)
            assert (encode(model) - expected).abs().max() < 1e-5, auto
        """,
        tmp_path,
    )
    again = MapexForPreTraining.from_pretrained(tmp_path / "pruned-remotely")
    assert again.config.expert_ids == pruned.config.expert_ids
    assert again.config.expert_statistics == pruned.config.expert_statistics


def test_provenance_names_the_commit(full, tmp_path):
    """From a cached repository: the source is the repository, the revision the commit that its branch points to."""
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hf" / "hub" / "models--org--mapex-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tmp_path / "full", repository / "snapshots" / commit)
    run_without_package(
        """
        model = AutoModelForPreTraining.from_pretrained("org/mapex-tiny", trust_remote_code=True)
        checkpoint = model.prune_for_modalities(["radar", "optical"])
        again = checkpoint.build().prune_for_modalities(["radar"])
        again.save_pretrained("again")
        """,
        tmp_path,
    )
    config = MapexForPreTraining.from_pretrained(tmp_path / "again").config
    assert (config.pruning["source"], config.pruning["revision"]) == ("org/mapex-tiny", commit)
    assert all("--" not in name for name in config.auto_map.values()), "the code beside the weights is the one to use"


def test_classifier(tmp_path):
    """A head model keeps its head, its labels and its answers."""
    model = randomize(MapexForImageClassification(tiny_config(id2label={0: "water", 1: "land"})))
    model.calibrate_experts([{"pixel_values": tiny_inputs()}])
    pixel_values = tiny_inputs(["radar"])
    small = model.prune_for_modalities(["radar"], coverage=0.5).build()
    small.save_pretrained(tmp_path / "small")
    save_file(pixel_values, tmp_path / "inputs.safetensors")
    with torch.no_grad():
        save_file({"logits": small(pixel_values).logits}, tmp_path / "logits.safetensors")
    output = run_without_package(
        """
        model = AutoModelForImageClassification.from_pretrained("small", trust_remote_code=True).eval()
        with torch.no_grad():
            difference = (model(pixel_values).logits - load_file("logits.safetensors")["logits"]).abs().max()
        assert difference < 1e-5, difference
        print(model.config.id2label)
        """,
        tmp_path,
    )
    assert output.strip() == "{0: 'water', 1: 'land'}"


@pytest.mark.parametrize(
    "model_class, auto",
    [(MapexForSemanticSegmentation, "SemanticSegmentation"), (MapexForPixelRegression, "DepthEstimation")],
)
def test_maps(model_class, auto, tmp_path):
    model = randomize(model_class(tiny_config(num_labels=3)))
    model.calibrate_experts([{"pixel_values": tiny_inputs()}])
    pixel_values = tiny_inputs(["radar"])
    small = model.prune_for_modalities(["radar"], coverage=0.5).build()
    small.save_pretrained(tmp_path / "small")
    save_file(pixel_values, tmp_path / "inputs.safetensors")
    with torch.no_grad():
        save_file({"map": small(pixel_values)[0].contiguous()}, tmp_path / "map.safetensors")
    run_without_package(
        f"""
        model = AutoModelFor{auto}.from_pretrained("small", trust_remote_code=True).eval()
        assert model.config._experts_implementation == "grouped_mm"
        with torch.no_grad():
            difference = (model(pixel_values)[0] - load_file("map.safetensors")["map"]).abs().max()
        assert difference < 1e-4, difference
        """,
        tmp_path,
    )
