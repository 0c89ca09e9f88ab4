"""Every Python snippet of the README runs, in order, as a reader would paste them."""

import re
from pathlib import Path

import pytest


README = Path(__file__).parents[1] / "README.md"
SHAPE = re.compile(r"^(?P<expression>\S+\.shape)  # (?P<shape>\([^)]*\))", re.MULTILINE)


def blocks(text: str, language: str = "python") -> list[str]:
    """The code blocks of a document."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_snippets_run_and_shapes_are_as_written(tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="the fine-tuning snippet needs the extra `train`")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(README.parent / "examples")  # a reader sits in the repository
    snippets = blocks(README.read_text())
    assert len(snippets) >= 5
    names: dict = {}
    checked = 0
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
        for found in SHAPE.finditer(snippet):
            assert tuple(eval(found["expression"], names)) == eval(found["shape"]), found[0]
            checked += 1
    assert checked >= 3


def test_pictures_and_files_exist():
    text = README.read_text()
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text) + re.findall(
        r"`((?:tests|examples|benchmarks)/[^`]+)`", text
    ):
        assert (README.parent / path).exists(), path
    assert "<!--" not in text, "a placeholder is left"
    makefile = (README.parent / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", text)):
        assert f"\n{target}:" in makefile, target
