"""examples/evaluate_missing.py: what it says of all and of none is what the model does with and without the sensor."""

import json
import re
from pathlib import Path

import command_line
import evaluate_missing
import numpy as np
import pytest
import torch
from test_finetuning import checkpoint, options, read, run, shards, write  # noqa: F401

from modeling_mapex.shards_mapex import Layer


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):  # noqa: F811
    """A run in which radar tells everything, and the optical image of three samples in four nothing."""
    folder = tmp_path_factory.mktemp("missing") / "run"
    changes = {"modalities": ["s1", "s2"], "rename": ["optical=s2"], "modality_dropout": 0.3, "max_steps": 60}
    return folder, run({**options, **changes}, folder, "flood")


def arguments(folder: Path, **changes) -> evaluate_missing.Arguments:
    return evaluate_missing.Arguments(**{"runs": [str(folder)], "missing": "s1", "bootstrap": 20, **changes})


def test_the_more_are_missing_the_worse(finished, tmp_path, capsys):
    folder, metrics = finished
    output = tmp_path / "new" / "missing.json"
    results = evaluate_missing.main(arguments(folder, output=str(output)))
    values = [entry["metrics"]["mean_iou"] for entry in results[str(folder)]]
    assert values[0] == pytest.approx(metrics["mean_iou"], abs=1e-4)
    assert values[0] > 0.8 > 0.7 > values[-1] and values[0] > values[2] > values[-1]
    assert json.loads(output.read_text()) == results and output.with_suffix(".png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "test samples have s1 and another sensor" in printed and "| share without s1 | mean_iou |" in printed
    # Samples without an optical image keep their radar: the share is of the others.
    chips = evaluate_missing.open_run(folder)[1].data.sides["test"]
    held = sum(shape is not None for shape in chips.column("optical__shape"))
    assert f"{held} of {len(chips)} test samples" in printed and held < len(chips)


def test_noise_is_not_missed(finished):
    folder, _ = finished
    first, last = evaluate_missing.main(arguments(folder, missing="s2", shares=[0.0, 1.0]))[str(folder)]
    assert abs(first["metrics"]["mean_iou"] - last["metrics"]["mean_iou"]) < 0.1


@pytest.mark.parametrize("label", ["flood", "biomass"])
def test_same_pixels_count_at_every_share(options, tmp_path, capsys, label):  # noqa: F811
    """Optical images end in the middle: beyond, nothing is known without radar, and those pixels do not count with it
    either. Every third chip is larger, and evaluated by itself.
    """

    def read_half(item):
        side = 32 if item.payload % 3 == 0 else 16
        sample = read(item, side)
        optical = sample.images["optical"] or Layer(np.full((3, side, side), 500, dtype=np.uint16))
        pixels = optical.pixels.copy()
        pixels[:, :, pixels.shape[2] // 2 :] = 0
        sample.images["optical"], sample.images["dem"] = Layer(pixels), None
        sample.labels["biomass"] = sample.labels["biomass"].astype(np.float32)
        return sample

    folder = tmp_path / "run"
    changes = {"modalities": ["s1", "s2"], "rename": ["optical=s2"], "max_steps": 4, "eval_steps": 4, "crop_size": 8}
    run({**options, **changes, "shards": write(tmp_path / "shards", 48, read_half)}, folder, label)
    capsys.readouterr()
    entries = evaluate_missing.main(arguments(folder))[str(folder)]
    unread = int(re.search(r"(\d+) labelled pixels have no data around them without s1", capsys.readouterr().out)[1])
    model, task = evaluate_missing.open_run(folder)
    first, counted = evaluate_missing.score(model, task, "s1", set(), 1)
    last, fewer = evaluate_missing.score(model, task, "s1", set(range(len(first))), 1)
    assert unread == sum(int((a != b).sum() - (torch.isnan(a) & torch.isnan(b)).sum()) for a, b in zip(counted, fewer))
    assert unread > 100
    # All lack it: as if the images had never had radar. None does: fewer pixels than that evaluation has.
    metrics = task.scores.metrics(last, np.ones(len(last)))
    assert entries[-1]["metrics"] == pytest.approx(metrics)
    assert entries[0]["metrics"] != pytest.approx(task.scores.metrics(first, np.ones(len(first))))


def test_several_runs(finished, options, tmp_path):  # noqa: F811
    folder, _ = finished
    other = tmp_path / "alone"
    run({**options, "modalities": ["s1", "dem"], "max_steps": 6, "eval_steps": 6}, other, "flood")
    output = tmp_path / "both.json"
    args = arguments(folder, runs=[str(folder), str(other)], shares=[0.0, 1.0], output=str(output))
    results = evaluate_missing.main(args)
    assert list(results) == [str(folder), str(other)] and results == json.loads(output.read_text())
    assert results[str(folder)] == evaluate_missing.main(arguments(folder, shares=[0.0, 1.0]))[str(folder)]
    run({**options, "modalities": ["s1", "dem"], "max_steps": 2, "eval_steps": 2}, tmp_path / "biomass", "biomass")
    with pytest.raises(command_line.Stop, match="The runs are of different tasks"):
        evaluate_missing.main(arguments(folder, runs=[str(folder), str(tmp_path / "biomass")], shares=[0.0]))


def test_what_is_refused(finished, tmp_path):
    folder, _ = finished
    for changes, words in (
        ({"missing": "dem"}, "must be one of several, got dem"),
        ({"shares": [2.0]}, "between 0 and 1"),
        ({"runs": [str(tmp_path)]}, "holds no finished run"),
        ({"output": "/dev/null/missing.json"}, "Cannot write --output /dev/null/missing.json"),
    ):
        with pytest.raises(command_line.Stop, match=words):
            evaluate_missing.main(arguments(folder, **changes))
