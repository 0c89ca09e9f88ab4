"""How far the experts of a pretrained MAPEX have specialised, and what pruning costs, on held-out imagery.

    python examples/evaluate_pretraining.py --model outputs/nano/model --sources data/ben data/water
    python examples/evaluate_pretraining.py --model outputs/nano-{0,1,2}/model --sources ... --output results.json

Prints, and writes as JSON: the normalised mutual information and the effective experts of each layer; for each modality
alone the reconstruction error of the full model, without its experts, and with the r experts that each criterion would
keep; and for each modality the retention with the experts that were chosen for another. Several models, of several
seeds, give a mean and its standard deviation.

Held-out places are those of `run_pretraining.py`, by the same options. Half of them calibrate, the other half test.
`retention = (err_0 - err_pruned) / (err_0 - err_full)`, with `err_0` the error when all mixtures give zero: 1 when
pruning costs nothing, 0 when the kept experts are worth nothing.
"""

import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from command_line import Stop, parse_arguments
from run_pretraining import DataArguments, held_out_samples, to_batches, usable_modalities
from tqdm import tqdm

from modeling_mapex import MapexForPreTraining
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.data_mapex import split_of_place
from modeling_mapex.image_processing_mapex import MapexImageProcessor
from modeling_mapex.losses_mapex import PretrainingSums
from modeling_mapex.modeling_mapex import MapexSparseMoeBlock
from modeling_mapex.pruning_mapex import plan_experts
from modeling_mapex.routing_mapex import dead_experts, effective_experts, normalized_mutual_information


KEPT = (1, 2, 3)  # experts a layer
CRITERIA = ("saliency", "usage", "gate", "exhaustive")


@dataclass
class EvaluationArguments:
    model: list[str] = field(default_factory=list, metadata={"help": "Folders or repositories of pretrained models."})
    masks: int = field(default=4, metadata={"help": "Random masks of each batch to average over."})
    random_choices: int = field(default=5, metadata={"help": "Random choices of experts to average over."})
    batch_size: int = field(default=64, metadata={"help": "Samples at a time."})
    output: str | None = field(default=None, metadata={"help": "File for all results, as JSON."})


def alone(batch: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The batch with one of its modalities only, or `None` if it does not have it."""
    if name not in batch["pixel_values"]:
        return None
    return {key: {name: values[name]} for key, values in batch.items() if name in values}


@contextmanager
def without_experts(model: MapexForPreTraining) -> Iterator[None]:
    """Every mixture gives zero."""
    blocks = [module for module in model.modules() if isinstance(module, MapexSparseMoeBlock)]
    hooks = [block.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output)) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Errors:
    """Reconstruction errors of one model on fixed masks of fixed batches."""

    def __init__(self, model: MapexForPreTraining, batches: list[dict[str, Any]], masks: int):
        self.model = model
        self.batches = batches
        self.masks = masks

    @torch.no_grad()
    def of(self, name: str | None, kept: list[list[int]] | None = None) -> dict[str, float]:
        """Error of each modality, seen alone if it is `name`, with only the experts `kept` of each layer."""
        model, options = self.model, {}
        if kept is not None:
            held = model.config.expert_ids
            options["expert_mask"] = [
                torch.tensor([expert in layer for expert in ids], device=model.device) for ids, layer in zip(held, kept)
            ]
        total: PretrainingSums | None = None
        for index, batch in enumerate(self.batches):
            part = batch if name is None else alone(batch, name)
            for mask in range(self.masks if part else 0):
                generator = torch.Generator(model.device).manual_seed(1000 * index + mask)
                sums = model(**send_to_device(part, model.device), generator=generator, **options).sums
                total = sums if total is None else total + sums
        if total is None:
            return {}
        errors = zip(model.config.modalities, total.reconstruction_errors().tolist(), total.values.tolist())
        return {modality: error for modality, error, count in errors if count > 0}


def evaluate_model(
    model: MapexForPreTraining, calibration: list[dict[str, Any]], test: list[dict[str, Any]], args: EvaluationArguments
) -> dict[str, Any]:
    """All results of one model, as plain data."""
    config = model.eval().config
    parts = [part for batch in calibration for name in config.modalities if (part := alone(batch, name))]
    model.calibrate_experts(parts, subset_errors=config.num_experts <= 8)
    measured = config.expert_statistics
    errors = Errors(model, test, args.masks)
    full = {name: errors.of(name) for name in measured}
    names = [name for name in measured if name in full[name]]
    if unmeasured := [name for name in config.modalities if name not in names]:
        print(f"Not evaluated, since the held-out samples hide no patch of them: {unmeasured}.")
    layers = []
    for position, layer in enumerate(config.moe_layers):
        gates = torch.tensor([measured[name]["gate"][position] for name in names])
        usage = torch.tensor([measured[name]["usage"][position] for name in names])
        layers.append(
            {
                "layer": layer,
                "normalized_mutual_information": normalized_mutual_information(gates),
                "effective_experts": dict(zip(names, effective_experts(gates).tolist())),
                "dead_experts": dead_experts(usage, config.num_experts_per_tok),
            }
        )

    with without_experts(model):
        together_without = errors.of(None)
    result: dict[str, Any] = {
        "layers": layers,
        "statistics": measured,
        "together": {"full": errors.of(None), "without": together_without},
    }
    criteria = [name for name in CRITERIA if name != "exhaustive" or config.num_experts <= 8]
    alone_results, cross = {}, {}
    for name in tqdm(names, desc="Pruning for each modality", unit="modality"):
        with without_experts(model):
            without = errors.of(name)[name]
        entry: dict[str, Any] = {"full": full[name][name], "without": without, "pruned": {}}
        for kept in KEPT:
            for criterion in criteria:
                ids = plan_experts(config, [name], experts_per_layer=kept, criterion=criterion)
                entry["pruned"].setdefault(criterion, {})[str(kept)] = errors.of(name, ids)[name]
            draws = [
                plan_experts(config, [name], experts_per_layer=kept, criterion="random", seed=seed)
                for seed in range(args.random_choices)
            ]
            entry["pruned"].setdefault("random", {})[str(kept)] = statistics.mean(
                errors.of(name, ids)[name] for ids in draws
            )
        ids = plan_experts(config, [name], coverage=0.95, criterion="saliency")
        entry["coverage_0.95"] = {"experts": [len(layer) for layer in ids], "error": errors.of(name, ids)[name]}
        alone_results[name] = entry
    for chosen_for in names:
        ids = plan_experts(config, [chosen_for], experts_per_layer=2, criterion="saliency")
        cross[chosen_for] = {tested: errors.of(tested, ids)[tested] for tested in names}
    return {**result, "alone": alone_results, "cross": cross}


def retention(entry: dict[str, Any], error: float) -> float:
    """Share of what the experts are worth that is left; NaN where they are worth nothing."""
    worth = entry["without"] - entry["full"]
    return (entry["without"] - error) / worth if worth else math.nan


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(values: list[float], digits: int = 3) -> str:
    """Mean, and standard deviation where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def report(results: list[dict[str, Any]]) -> str:
    """The results of one model, or of several seeds of one, as Markdown."""
    first = results[0]
    names = list(first["alone"])
    text = ["## Specialisation per layer", ""]
    rows = []
    for position, layer in enumerate(first["layers"]):
        over = [result["layers"][position] for result in results]
        rows.append(
            [
                str(layer["layer"]),
                spread([entry["normalized_mutual_information"] for entry in over], 2),
                spread([statistics.mean(entry["effective_experts"].values()) for entry in over], 2),
                spread([entry["dead_experts"] for entry in over], 1),
            ]
        )
    text.append(table(["block", "I(M;E) / min(log M, log E)", "effective experts", "dead experts"], rows))
    text += ["", "## Error without experts, and together with the other modalities", ""]
    rows = [
        [
            name,
            spread([result["alone"][name]["full"] for result in results]),
            spread([result["alone"][name]["without"] for result in results]),
            spread([result["alone"][name]["without"] / result["alone"][name]["full"] for result in results], 2),
            spread([result["together"]["full"][name] for result in results]),
        ]
        for name in names
    ]
    text.append(table(["modality", "err_full", "err_0", "err_0 / err_full", "err_full, all modalities seen"], rows))
    text += ["", "## Retention when pruned to r experts a layer", ""]
    criteria = list(first["alone"][names[0]]["pruned"])
    rows = [
        [name, str(kept)]
        + [
            spread(
                [retention(result["alone"][name], result["alone"][name]["pruned"][c][str(kept)]) for result in results]
            )
            for c in criteria
        ]
        for name in names
        for kept in KEPT
    ]
    text.append(table(["modality", "r", *criteria], rows))
    text += ["", "## Retention with the two experts chosen for another modality", ""]
    rows = [
        [chosen]
        + [
            spread([retention(result["alone"][name], result["cross"][chosen][name]) for result in results])
            for name in names
        ]
        for chosen in names
    ]
    text.append(table(["chosen for \\ tested on", *names], rows))
    return "\n".join(text)


def main(args: EvaluationArguments, data_args: DataArguments) -> None:
    if not args.model or not data_args.sources:
        raise Stop("Give --model and --sources.")
    results = []
    for name in args.model:
        try:
            model = MapexForPreTraining.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise Stop(f"Cannot load {name}: {error}") from error
        held = [len(ids) for ids in model.config.expert_ids]
        if not held or min(held) < max(KEPT):
            raise Stop(f"{name} has {held or 'no'} experts in its layers: prunings to {KEPT} need a whole model.")
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        try:
            modalities = {
                source: usable_modalities(source, data_args.train_split, model.config)[0]
                for source in data_args.sources
            }
        except (OSError, ValueError) as error:
            raise Stop(f"{error}") from error
        if useless := [source for source, usable in modalities.items() if not usable]:
            raise Stop(f"{useless} hold nothing that {name} has ({list(model.config.modalities)}): leave them out.")
        samples = [sample for part in held_out_samples(data_args, modalities).values() for sample in part]
        collator = MapexCollator(
            MapexImageProcessor.from_config(model.config), crop_size=data_args.crop_size, group=True
        )
        halves: dict[str, list[dict[str, Any]]] = {"calibration": [], "test": []}
        for half, batches in halves.items():
            chosen = [
                sample
                for sample in samples
                if split_of_place(sample["place"], dict.fromkeys(halves, 0.5), data_args.split_seed + 1) == half
            ]
            for batch in to_batches(chosen, collator, args.batch_size):
                batches += batch["groups"]
        if not all(halves.values()):
            raise Stop("No held-out sample is left to calibrate or to test on: give more --sources or --held_out.")
        results.append(evaluate_model(model, halves["calibration"], halves["test"], args))
    print(report(results))
    if args.output:
        Path(args.output).write_text(json.dumps(dict(zip(args.model, results)), indent=1))


if __name__ == "__main__":
    main(*parse_arguments((EvaluationArguments, DataArguments), __doc__))
