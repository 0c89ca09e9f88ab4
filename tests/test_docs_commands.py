"""Commands of the README, the documentation and the scripts' own docstrings: scripts and files exist, and options are
those that the scripts have.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest
from test_readme import blocks


pytest.importorskip("accelerate", reason="the scripts need the extras `data` and `train`")
pytest.importorskip("matplotlib", reason="the scripts need the extra `viz`")
pytest.importorskip("sklearn", reason="the scripts need the extra `evaluate`")
pytest.importorskip("torchdata", reason="the scripts need the extras `data` and `train`")

ROOT = Path(__file__).parents[1]

import evaluate_frozen  # noqa: E402
import evaluate_missing  # noqa: E402
import evaluate_pretraining  # noqa: E402
import evaluate_tasks  # noqa: E402
import finetuning_options  # noqa: E402
import plot_pretraining  # noqa: E402
import run_image_classification  # noqa: E402
import run_pretraining  # noqa: E402
import run_semantic_segmentation  # noqa: E402


FINETUNING = (
    finetuning_options.ModelArguments,
    finetuning_options.DataArguments,
    finetuning_options.FinetuningArguments,
)
OPTIONS = {
    "run_image_classification.py": (*FINETUNING, run_image_classification.ClassificationArguments),
    "run_semantic_segmentation.py": (*FINETUNING, run_semantic_segmentation.SegmentationArguments),
    "run_pixel_regression.py": FINETUNING,
    "evaluate_frozen.py": (
        evaluate_frozen.ModelArguments,
        evaluate_frozen.DataArguments,
        evaluate_frozen.ProbeArguments,
    ),
    "evaluate_missing.py": (evaluate_missing.Arguments,),
    "evaluate_tasks.py": (evaluate_tasks.Arguments,),
    "run_pretraining.py": (
        run_pretraining.ModelArguments,
        run_pretraining.DataArguments,
        run_pretraining.PretrainingArguments,
    ),
    "evaluate_pretraining.py": (evaluate_pretraining.EvaluationArguments, run_pretraining.DataArguments),
    "plot_pretraining.py": (plot_pretraining.Arguments,),
}


def commands() -> list[list[str]]:
    """All command lines that name one of the scripts, in words."""
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = [text for document in documents for text in blocks(document.read_text(), "bash")]
    for script in OPTIONS:
        docstring = ast.get_docstring(ast.parse((ROOT / "examples" / script).read_text()))
        texts.append("\n".join(line for line in docstring.splitlines() if line.startswith("    ")))
    joined = "\n".join(texts).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [words for words in lines if any(Path(word).name in OPTIONS for word in words)]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_options_exist(words):
    position, script = next((index, Path(word)) for index, word in enumerate(words) if Path(word).name in OPTIONS)
    assert (ROOT / script).is_file()
    for word in words:
        if word.startswith("examples/") and not re.search(r"[*{]", word):
            assert (ROOT / word).exists(), word
    known = {name for kind in OPTIONS[script.name] for name in kind.__dataclass_fields__}
    used = {word.removeprefix("--") for word in words[position + 1 :] if word.startswith("--")}
    assert used <= known
    assert used or script.name == "run_pretraining.py"


def test_all_are_found():
    named = [Path(word).name for words in commands() for word in words if Path(word).name in OPTIONS]
    assert named.count("run_pretraining.py") >= 8 and set(named) == set(OPTIONS)
