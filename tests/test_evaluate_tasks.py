"""examples/evaluate_tasks.py and the baselines that it runs: real runs of a made-up task, gone on with, in a table."""

import json

import numpy as np
import pytest
import torch
import yaml
from test_finetuning import checkpoint, shards  # noqa: F401


pytest.importorskip("sklearn", reason="the baseline needs the extra `evaluate`")

import baselines
import evaluate_tasks

from modeling_mapex import MapexConfig
from modeling_mapex.data_mapex import split_of_place


METHODS = {"pruned, 1.5": {}, "convnet": {"convnet": True}, "pixel": {"script": "pixel_baseline.py"}}


@pytest.fixture
def tasks(shards, checkpoint, tmp_path):  # noqa: F811
    """A file of two tasks of which radar tells everything."""
    common = {
        "model": checkpoint,
        "shards": shards,
        "modalities": ["s1"],
        "cache_dir": str(tmp_path / "cache"),
        "split_seed": 3,
        "test": 0.25,
        "validation": 0.2,
        "max_steps": 2,
        "train_samples": 32,
        "bootstrap": 20,
    }
    content = {
        "methods": METHODS,
        "tasks": {
            "flood": {
                "title": "Floods",
                "script": "run_semantic_segmentation.py",
                "metrics": ["mean_iou"],
                "options": {**common, "label": "flood"},
            },
            "biomass": {
                "title": "Biomass",
                "script": "run_pixel_regression.py",
                "metrics": ["rmse", "r2"],
                "options": {**common, "label": "biomass"},
                "variants": {"short": {"max_steps": 1}},
                "methods": {"convnet": {"variants": []}},
            },
        },
    }
    file = tmp_path / "tasks.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_everything_is_run_once(tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = evaluate_tasks.Arguments(str(tasks), seeds=1, output_dir=str(tmp_path / "runs"))
    evaluate_tasks.main(args)
    table = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert [row[1] for row in rows if row[1] in METHODS] == ["pruned, 1.5", "convnet", "pixel", "pruned, 1.5", "pixel"]
    assert "### Floods" in table and "### Biomass" in table
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/*/*/results.json")}
    assert len(files) == 5
    for path in files:  # beside the run, of its whole name
        settings = json.loads(path.parent.with_name(f"{path.parent.name}.json").read_text())
        assert settings["output_dir"] == str(path.parent)
    # Radar tells the classes and the values: a forest of single pixels finds them.
    forest = json.loads((tmp_path / "runs/flood/all/pixel-0/results.json").read_text())
    assert forest["metrics"]["mean_iou"] > 0.85 and forest["samples"]["train"] == 32
    assert json.loads((tmp_path / "runs/biomass/short/pixel-0/results.json").read_text())["metrics"]["r2"] > 0.9

    evaluate_tasks.main(args)
    assert capsys.readouterr().out == table
    assert {path: path.stat().st_mtime_ns for path in files} == files

    tasks.write_text(tasks.read_text().replace("max_steps: 1", "max_steps: 3"))
    with pytest.raises(SystemExit, match=r"was run with other options.*delete the folder"):
        evaluate_tasks.main(args)


def test_splits_are_those_of_the_runs(tasks, tmp_path):
    args = evaluate_tasks.Arguments(str(tasks), splits=str(tmp_path / "splits.json"))
    evaluate_tasks.main(args)
    splits = json.loads((tmp_path / "splits.json").read_text())
    shares = {"train": 0.55, "validation": 0.2, "test": 0.25}
    for sides in splits.values():
        assert list(sides) == ["validation", "test"]
        for side, places in sides.items():
            assert len(places) > 3 and all(split_of_place(place, shares, 3) == side for place in places)


def test_what_failed_is_told(tasks, tmp_path, capsys):
    content = yaml.safe_load(tasks.read_text())
    content["tasks"]["flood"]["options"]["label"] = "nothing"
    tasks.write_text(yaml.safe_dump(content))
    args = evaluate_tasks.Arguments(str(tasks), ["flood"], ["pruned, 1.5"], 1, str(tmp_path / "runs"))
    with pytest.raises(SystemExit, match=r"(?s)These runs failed.*has no label `nothing`"):
        evaluate_tasks.main(args)
    with pytest.raises(SystemExit, match="has no tasks"):
        evaluate_tasks.main(evaluate_tasks.Arguments(str(tasks), ["lava"]))
    with pytest.raises(SystemExit, match="Cannot read"):
        evaluate_tasks.main(evaluate_tasks.Arguments(str(tmp_path / "none.yaml")))


def test_the_file_in_the_repository():
    """Every script and method of it exists."""
    args = evaluate_tasks.Arguments(seeds=2)
    jobs = evaluate_tasks.plan(evaluate_tasks.read_file(args), args)
    assert len({job.folder for job in jobs}) == len(jobs) > 100
    assert all((evaluate_tasks.EXAMPLES / job.script).is_file() for job in jobs)
    assert {job.options["pruning_seed"] for job in jobs if job.method == "random"} == {0, 1}


def test_the_splits_in_the_repository():
    """They are what any run with these options finds: a place is on one side whatever else there is."""
    args = evaluate_tasks.Arguments()
    content = evaluate_tasks.read_file(args)["tasks"]
    splits = json.loads((evaluate_tasks.EXAMPLES / "configs" / "splits.json").read_text())
    assert splits.keys() == content.keys()
    for task, sides in splits.items():
        options = content[task]["options"]
        shares = {side: options[side] for side in ("validation", "test")}
        shares = {"train": 1 - sum(shares.values()), **shares}
        for side, places in sides.items():
            assert {split_of_place(place, shares, options["split_seed"]) for place in places} == {side}


def test_normalised_difference(tasks, tmp_path):
    """Water is darker in VV than in VH, always; elsewhere chance decides."""
    content = yaml.safe_load(tasks.read_text())
    index = {"script": "pixel_baseline.py", "index": ["VH", "VV"], "variants": ["all"]}
    content["tasks"] = {"flood": {**content["tasks"]["flood"], "variants": {"all": {}}, "methods": {"index": index}}}
    tasks.write_text(yaml.safe_dump(content))
    evaluate_tasks.main(evaluate_tasks.Arguments(str(tasks), None, ["index"], 1, str(tmp_path / "runs")))
    results = json.loads((tmp_path / "runs/flood/all/index-0/results.json").read_text())
    assert results["metrics"]["mean_accuracy"] == pytest.approx((1 + 0.5) / 2, abs=0.01)
    assert results["settings"]["index"] == ["VH", "VV"]
    assert len(list((tmp_path / "runs").glob("*/*/*/results.json"))) == 1
    index["index"] = ["VH", "HH"]
    tasks.write_text(yaml.safe_dump(content))
    args = evaluate_tasks.Arguments(str(tasks), None, ["index"], 1, str(tmp_path / "others"))
    with pytest.raises(SystemExit, match="names two of the bands"):
        evaluate_tasks.main(args)


def test_absent_sensors_are_no_values():
    """Whatever lies where a sample has no image, the convolutional networks see the same."""
    config = MapexConfig.from_preset("nano", modalities=["s1", "dem"])
    pixels = {"s1": torch.randn(2, 2, 32, 32), "dem": torch.randn(2, 1, 16, 16)}
    mask = {"dem": torch.tensor([True, False])}
    image = baselines.to_image(config, pixels, mask)
    assert image.shape == (2, 3 + 2, 32, 32)
    pixels["dem"][1] = np.nan
    assert torch.equal(baselines.to_image(config, pixels, mask), image)
    assert torch.equal(baselines.to_image(config, {"s1": pixels["s1"]})[1], image[1])
