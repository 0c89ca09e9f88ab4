"""examples/evaluate_missing.py: what it says of all and of none is what the model does with and without the sensor."""

import json
from pathlib import Path

import command_line
import evaluate_missing
import pytest
from test_finetuning import checkpoint, options, run, shards  # noqa: F401


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
