"""examples/plot_pretraining.py: curves of several seeds and runs."""

import json
from pathlib import Path

import pytest


pytest.importorskip("matplotlib", reason="pictures need the extra `viz`")

import plot_pretraining


def write_log(folder: Path, offset: float) -> str:
    folder.mkdir()
    lines = [
        {
            "step": step,
            "evaluation/loss": 1.0,
            "evaluation/reconstruction/s1": offset + 1.0 / step,
            "evaluation/normalized_mutual_information": 0.01 * step,
        }
        for step in (10, 20, 30)
    ]
    lines.insert(1, {"step": 15, "training/loss": 1.0})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "log.jsonl")


def test_seeds_are_one_curve(tmp_path, monkeypatch):
    logs = [write_log(tmp_path / name, offset) for name, offset in (("full-0", 0.5), ("full-1", 0.7), ("plain-0", 0.9))]
    drawn = []
    monkeypatch.setattr(plot_pretraining.Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    plot_pretraining.main(plot_pretraining.Arguments(logs=logs, output=str(tmp_path / "new" / "curves.png")))
    error, information = drawn[0].axes[:2]
    assert error.get_title() == "s1: error" and information.get_title().startswith("I(M;E)")
    assert [line.get_label() for line in error.lines] == ["full", "plain"]
    assert list(error.lines[0].get_xdata()) == [10, 20, 30]
    assert error.lines[0].get_ydata() == pytest.approx([0.7, 0.65, 0.6 + 1 / 30])


def test_refuses_what_is_no_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "training/loss": 1.0}\n')
    with pytest.raises(SystemExit, match="hold no evaluations"):
        plot_pretraining.main(plot_pretraining.Arguments(logs=[str(tmp_path / "log.jsonl")]))
    with pytest.raises(SystemExit, match="Cannot read"):
        plot_pretraining.main(plot_pretraining.Arguments(logs=[str(tmp_path / "nowhere.jsonl")]))
