"""The model card: what a checkpoint takes, keeps and comes from, written from its configuration whenever a model is
saved, and left alone once somebody has edited it.
"""

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError
from transformers.utils.hub import hf_api

from .configuration_mapex import AUTO_MAP, CRITERIA


CARD_NAME = "README.md"
PAPER = "https://arxiv.org/abs/2507.07527"
PIPELINE_TAGS = {  # others give features
    "MapexForImageClassification": "image-classification",
    "MapexForSemanticSegmentation": "image-segmentation",
}
_AUTO_CLASSES = {
    name.rsplit(".", 1)[1]: auto for auto, name in AUTO_MAP.items() if auto not in ("AutoConfig", "AutoImageProcessor")
}
_CRITERION_TEXT = {
    "saliency": "gate times norm of the expert's output",
    "usage": "share of tokens",
    "gate": "mean gate",
    "exhaustive": "output energy",
    "random": "gate times norm of the expert's output (experts chosen at random, as a control)",
}
assert set(_CRITERION_TEXT) == set(CRITERIA)
_SEAL = re.compile(r"\n<!-- Written by MAPEX, sha256 ([0-9a-f]{64})\. An edited card is left alone\. -->\n\Z")


def is_edited(text: str) -> bool:
    """Whether somebody else has written or changed a card: its text is not what its seal says."""
    text = text.replace("\r\n", "\n")  # git may change line endings, which is no edit
    found = _SEAL.search(text)
    return found is None or found.group(1) != _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_model_card(
    model, directory: str | os.PathLike, tags: list[str] | None = None, repo_id: str | None = None
) -> None:
    """Write the card of a model beside its weights, unless there is one that was edited: that one is left alone, but
    for `tags` that it lacks.

    Args:
        model (`MapexPreTrainedModel`): What is saved. Its `training_record`, which `MapexTrainer` keeps, gives results.
        directory (`str` or `os.PathLike`): Where the weights are.
        tags (`list[str]`, *optional*): Added to those of the card.
        repo_id (`str`, *optional*): Where the model is going to be; default the folder.
    """
    file = Path(directory) / CARD_NAME
    tags = [*(model.model_tags or []), *(tags or [])]
    if file.is_file() and is_edited(text := file.read_text(encoding="utf-8")):
        _add_tags(file, text, tags)
        return
    files = [entry for entry in Path(directory).glob("*.safetensors") if not entry.name.startswith("adapter_")]
    # Without files yet, or beside an adapter: what they would hold.
    size = sum(entry.stat().st_size for entry in files) or sum(
        tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()
    )
    text = model_card(
        model.config,
        type(model).__name__,
        size,
        record=model.training_record,
        tags=tags,
        location=repo_id or Path(directory).name,
    )
    file.write_text(text, encoding="utf-8")


def fetch_model_card(
    directory: str | os.PathLike, repo_id: str, *, revision: str | None = None, token: str | bool | None = None
) -> None:
    """Put the card of a repository into `directory`, if there is one, unless a card there was edited."""
    file = Path(directory) / CARD_NAME
    if file.is_file() and is_edited(file.read_text(encoding="utf-8")):
        return
    # The repository may have no card yet, or lack the branch from which a pull request is to be made.
    with contextlib.suppress(EntryNotFoundError, RevisionNotFoundError):
        fetched = hf_api().hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token)
        file.write_text(Path(fetched).read_text(encoding="utf-8"), encoding="utf-8")


def _add_tags(file: Path, text: str, tags: list[str]) -> None:
    card = ModelCard(text, ignore_metadata_errors=True)
    missing = [tag for tag in tags if tag not in (card.data.tags or [])]
    if missing:
        card.data.tags = [*(card.data.tags or []), *missing]
        card.save(file)


def model_card(
    config,
    class_name: str,
    num_bytes: int,
    *,
    record: dict[str, Any] | None = None,
    tags: list[str] | None = None,
    location: str = "path/to/model",
) -> str:
    """The text of a card, with its seal.

    Args:
        config (`MapexConfig`): Of the model. `config.card_data` are entries of the head that outlive pruning and
            fine-tuning, like `license` and `datasets`.
        class_name (`str`): Name of the model's class.
        num_bytes (`int`): Size of its weights on disk.
        record (`dict`, *optional*): `metrics` and `hyperparameters` of the training that has made it.
        tags (`list[str]`, *optional*): Further tags.
        location (`str`): Repository or folder that the examples load.
    """
    sections = [
        _summary(config, class_name),
        _inputs(config),
        _experts(config),
        _size(config, num_bytes),
        _results(record),
        _use(config, class_name, location),
        _code(),
        _limits(config, class_name),
        _citation(config),
    ]
    head = _head(config, class_name, record, tags or [])
    text = f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(section for section in sections if section) + "\n"
    return f"{text}\n<!-- Written by MAPEX, sha256 {_digest(text)}. An edited card is left alone. -->\n"


def _head(config, class_name: str, record: dict[str, Any] | None, tags: list[str]) -> ModelCardData:
    own = dict(config.card_data or {})
    own |= {key: [own[key]] for key in ("tags", "datasets") if isinstance(own.get(key), str)}
    standard = ["mapex", "remote-sensing", "earth-observation", "multi-modal", "mixture-of-experts", *config.modalities]
    fields = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINE_TAGS.get(class_name, "image-feature-extraction"),
        "tags": list(dict.fromkeys([*own.pop("tags", []), *standard, *tags])),
    }
    base = _base_model(config)
    if base is not None:
        # The Hub knows no relation for pruning; this one means weights derived from others.
        fields.update(base_model=base, base_model_relation="finetune")
    metrics = (record or {}).get("metrics")
    if metrics:
        data = (own.get("datasets") or ["unnamed"])[0]
        fields["model_name"] = class_name
        fields["eval_results"] = [
            EvalResult(
                task_type=fields["pipeline_tag"],
                dataset_type=data,
                dataset_name=data,
                dataset_split="evaluation",
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
            for name, value in metrics.items()
        ]
    return ModelCardData(**{**fields, **own})


def _base_model(config) -> str | None:
    """The Hub repository that a model was cut from. A folder of somebody's machine is none."""
    provenance = config.pruning or {}
    return provenance.get("source") if provenance.get("revision") else None


def _summary(config, class_name: str) -> str:
    names = ", ".join(f"`{name}`" for name in config.modalities)
    lines = [
        f"# {class_name} for {', '.join(config.modalities)}",
        "",
        f"A [MAPEX]({PAPER}) model: a vision transformer for remote sensing whose experts specialise by modality. This "
        f"one takes {names}{'' if len(config.modalities) == 1 else ', in any combination: samples may lack some'}.",
    ]
    provenance = config.pruning
    if provenance is not None:
        source, revision = provenance["source"], provenance["revision"]
        origin = "a model in memory"
        if revision:
            origin = f"[{source}](https://huggingface.co/{source}/tree/{revision}) at commit `{revision}`"
        elif source:
            origin = f"`{Path(source).name}`, a local checkpoint"
        lines += ["", f"It was pruned from {origin}, keeping only the experts that these modalities use."]
    if class_name == "MapexForPreTraining":
        lines += ["", "It reconstructs hidden patches: a starting point for tasks, not a model of one."]
    labels = config.id2label or {}
    if class_name in PIPELINE_TAGS and labels:
        lines += ["", f"Its {len(labels)} labels: " + ", ".join(f"`{labels[key]}`" for key in sorted(labels)) + "."]
    return "\n".join(lines)


def _inputs(config) -> str:
    rows = []
    for name, spec in config.modalities.items():
        side = spec["patch_size"]
        rows.append(
            [
                f"`{name}`",
                ", ".join(spec["bands"]),
                spec.get("unit") or "not stated",
                f"{spec['gsd']:g} m",
                f"{side} x {side} pixels, {side * spec['gsd']:g} m",
                "yes" if spec.get("mean") and None not in spec["mean"] + (spec.get("std") or [None]) else "no",
            ]
        )
    table = _table(["modality", "bands, in this order", "unit", "resolution", "patch", "statistics"], rows)
    return (
        "## Inputs\n\n"
        f"{table}\n\n"
        "Pixels are normalised by mean and standard deviation per band. Where there are statistics, they are in "
        "`config.json`, and `MapexImageProcessor`, saved with the weights, does it: it takes bands by name and in "
        "their units, refuses what does not fit, and marks pixels without data."
    )


def _experts(config) -> str:
    if not config.moe_layers:
        return ""
    provenance = config.pruning
    coverage = (provenance or {}).get("coverage_reached")
    rows = []
    for layer, (block, kept) in enumerate(zip(config.moe_layers, config.expert_ids)):
        row = [str(block), ", ".join(map(str, kept)), f"{len(kept)} of {config.num_experts}"]
        if coverage:
            row += [f"{coverage[name][layer]:.3f}" for name in config.modalities if name in coverage]
        rows.append(row)
    headings = ["block", "experts", "kept"]
    if coverage:
        headings += [f"coverage, {name}" for name in config.modalities if name in coverage]
    text = f"## Experts\n\n{_table(headings, rows)}\n\n"
    text += f"Each token uses {config.num_experts_per_tok} experts of a layer, or the one that is left."
    if provenance is None:
        calibrated = sorted(config.expert_statistics or {})
        if calibrated:
            text += (
                f" Statistics of who uses which expert are stored for {', '.join(calibrated)}, so that the model can "
                "be pruned for these without data."
            )
        else:
            text += " The model has not been calibrated: run `calibrate_experts` before pruning it."
    elif coverage:
        text += (
            f" Coverage is the share of a modality's mass ({_CRITERION_TEXT[provenance['criterion']]}) that the kept "
            "experts hold"
        )
        asked = provenance["coverage"]
        text += f"; asked for: {asked:g}." if asked is not None else "."
    return text


def _size(config, num_bytes: int) -> str:
    provenance = config.pruning
    if provenance is None:
        return f"## Size\n\n{num_bytes / 1e6:.1f} MB of weights; {config.num_encoder_parameters():,} in the encoder."
    before, after = provenance["parameters_before"], provenance["parameters_after"]
    per_parameter = num_bytes / max(after, 1)
    rows = [
        ["parameters", f"{before:,}", f"{after:,}", f"{1 - after / before:.0%}"],
        ["weights", f"{before * per_parameter / 1e6:.1f} MB", f"{num_bytes / 1e6:.1f} MB", ""],
    ]
    return "## Size\n\n" + _table(["size", "before pruning", "after", "less"], rows)


def _results(record: dict[str, Any] | None) -> str:
    if not record:
        return ""
    text = ""
    if record.get("metrics"):
        rows = [[name, f"{value:.4g}"] for name, value in record["metrics"].items()]
        text += "## Results\n\nOn the evaluation split of the training that made this model:\n\n"
        text += _table(["metric", "value"], rows)
    if record.get("hyperparameters"):
        rows = [[name, f"`{value}`"] for name, value in record["hyperparameters"].items()]
        text += "\n\n## Training\n\n" + _table(["setting", "value"], rows)
    return text.strip()


def _use(config, class_name: str, location: str) -> str:
    name, spec = next(iter(config.modalities.items()))
    side = 8 * spec["patch_size"]
    auto = _AUTO_CLASSES.get(class_name, "AutoModel")
    return f"""## Use

With the `modeling_mapex` package:

```python
from modeling_mapex import {class_name}, MapexImageProcessor

model = {class_name}.from_pretrained("{location}")
processor = MapexImageProcessor.from_pretrained("{location}")  # if it has statistics, see above
```

Without it, with the code of this repository. Name a commit, so that it is the code that you have read:

```python
import torch
from transformers import {auto}

model = {auto}.from_pretrained("{location}", trust_remote_code=True, revision="...")
outputs = model({{"{name}": torch.randn(1, {len(spec["bands"])}, {side}, {side})}})  # normalised pixels
```

Pruned further, reading only what is kept: `from_pretrained("{location}", modalities=["{name}"])`."""


def _code() -> str:
    return """## The code in this repository

For those who have to approve `trust_remote_code`: the `*_mapex.py` files are the model (`modeling_`, `tokens_`,
`masking_`, `losses_`, `task_losses_`), its maps (`dense_`, `windows_`), its configuration and sensors
(`configuration_`, `sensors_`, `units_`), pruning (`pruning_`, `calibration_`), reading and writing of weights
(`checkpoint_`, `modelcard_`) and preparation of images (`image_processing_`). They import torch, transformers,
huggingface_hub, safetensors and numpy, start no process, and use the network and the disk only where you ask them to
load, save or push, by the means of these libraries. Weights are safetensors; pickles are never opened."""


def _limits(config, class_name: str) -> str:
    lines = [
        "- Images of another resolution, processing level or normalisation than stated above give wrong results, "
        "without an error where numbers alone cannot tell.",
        "- Patches must fit: heights and widths are multiples of the patch size.",
    ]
    if config.dense_window_metres is not None:
        lines.append(
            f"- Trained on images or crops of {config.dense_window_metres:g} m: read larger images by "
            "`model.predict_map(...)`, in windows of that size."
        )
    if config.pruning is not None:
        lines.append("- Modalities, bands and experts that were dropped are gone; load the source for others.")
    if class_name != "MapexForPreTraining":
        lines.append("- What it was trained on, and where, bounds what it can be used for: evaluate it on your ground.")
    return "## Limits\n\n" + "\n".join(lines)


def _citation(config) -> str:
    text = "## Licence and citation\n\nThe code is Apache-2.0. "
    licence = (config.card_data or {}).get("license")
    if licence:
        text += f"The weights: {licence}."
    else:
        text += "None has been stated for the weights: who publishes them adds `license` to the head of this card."
    return f"""{text}

An independent implementation following:

```bibtex
@article{{hanna2025mapex,
  title   = {{{{MAPEX}}: Modality-Aware Pruning of Experts for Remote Sensing Foundation Models}},
  author  = {{Hanna, Joelle and Scheibenreif, Linus and Borth, Damian}},
  journal = {{arXiv preprint arXiv:2507.07527}},
  year    = {{2025}}
}}
```"""


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
