"""The model of a fine-tuning run: pruned while loading, with what is trained of it and at which rate."""

import importlib.util
import re
from typing import Any

import torch
from baselines import BASELINES
from command_line import Stop, read_overrides
from finetuning_options import ModelArguments, assignments
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from modeling_mapex import MapexConfig, add_modality


LEARNING_RATES = {"full": 1e-3, "frozen": 5e-3, "lora": 3e-3}


def build_model(model_class: type, args: ModelArguments, modalities: dict[str, list[str] | None], **config_fields):
    """The pretrained model with a new head, pruned while loading unless `--keep_all`; or its like with random weights;
    or the convolutional network of the same sensors and labels.

    Args:
        model_class (`type`): Of the task.
        modalities (`dict[str, list[str] | None]`): From [`Data`].
        config_fields: Of the task, like `id2label`.
    """
    pruning = {"coverage": args.coverage, "criterion": args.criterion, "seed": args.pruning_seed}
    counts = args.experts_per_layer
    if counts is not None:
        counts = [counts] if isinstance(counts, int) else list(counts)
        pruning["experts_per_layer"] = counts[0] if len(counts) == 1 else counts
    pruning = {name: value for name, value in pruning.items() if value is not None}
    if args.keep_all and pruning:
        raise Stop(f"--keep_all does not prune, but {sorted(pruning)} say how: leave out one or the other.")
    if args.convnet and (args.method != "full" or args.keep_all or args.from_scratch or pruning):
        raise Stop(
            "--convnet is trained whole and from random weights: leave out --method, --keep_all, --from_scratch, and "
            "what says how to prune."
        )
    if args.method != "lora" and (args.lora_rank is not None or args.lora_alpha is not None):
        raise Stop(f"--lora_rank and --lora_alpha are for --method lora, not {args.method}.")
    settled = [name for name in config_fields if name != "dense_window_metres"]  # which is a default
    config_fields |= read_overrides(args.config_overrides, MapexConfig, settled)
    added = assignments("--add", args.add)
    if not args.keep_all:
        pruning["modalities"] = {name: bands for name, bands in modalities.items() if name not in added}
    try:
        model, message = load(model_class, args.model, **pruning, **config_fields)
        for name, like in added.items():
            model = add_modality(model, name, like)
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise Stop(f"{error}") from error
    if message and not (args.from_scratch or args.convnet):
        print(message)
    if args.from_scratch:
        config = model.config
        config.pruning = config.expert_statistics = None  # they tell of other weights
        model = model_class(config)
    config = model.config
    if args.convnet:
        # A copy without what transformers has chosen for MAPEX, like a kind of attention.
        plain = type(config).from_dict({**config.to_dict(), "pruning": None, "expert_statistics": None})
        model = BASELINES[model_class](plain)
        print(f"{model.num_parameters():,} parameters of a convolutional network.")
        return model
    kept = ", ".join(f"{len(ids)} in block {layer}" for layer, ids in zip(config.moe_layers, config.expert_ids))
    print(f"{model.num_parameters():,} parameters; experts kept of {config.num_experts}: {kept}.")
    return model


def load(model_class: type, name: str, **options) -> tuple[Any, str | None]:
    """The pretrained model; of one that was fine-tuned, its head as well, unless that is for other labels. And what is
    to be said of it.

    Raises:
        Stop: options under which other weights than those of the head do not fit.
    """
    heads = ("classifier.", "dense_decoder.output.")
    options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = model_class.from_pretrained(name, **options)
    unfit = sorted({key for key, *_ in info["mismatched_keys"]})
    if others := [key for key in unfit if not key.startswith(heads)]:
        raise Stop(f"These weights of {name} do not fit the configuration: {others[:5]}. Leave out --config_overrides.")
    if unfit:
        return model, f"The head of {name} is for another number of labels: a new one is trained."
    return model, None if info["missing_keys"] else f"Going on with the head of {name}."


def lora_config(model, args: ModelArguments):
    """Adapters for attention, plain MLPs and every expert; the head is trained whole.

    Linear layers are `target_modules`. Experts are parameters `(experts, out, in)` stacked in one module and hence
    `target_parameters`, each with factors of its own; pruned to one expert, a mixture is a plain MLP with linear layers
    of the same names.
    """
    from peft import LoraConfig

    rank = 8 if args.lora_rank is None else args.lora_rank
    heads = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    experts = ["mlp.experts.up_proj", "mlp.experts.down_proj"] if model.config.routed_layers else None
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank if args.lora_alpha is None else args.lora_alpha,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        target_parameters=experts,
        modules_to_save=[*heads, *new_embeddings(args)],
    )


def new_embeddings(args: ModelArguments) -> list[str]:
    """Modules that tell the sensors of --add from those that they begin as: trained by every method."""
    return [f"patch_embeddings.{name}" for name in assignments("--add", args.add)]


def choose_trained(model, args: ModelArguments):
    """The model with what `--method` trains; for lora wrapped in peft's."""
    if args.method == "frozen":
        model.base_model.requires_grad_(False)
        for name in new_embeddings(args):
            model.get_submodule(f"{model.base_model_prefix}.embeddings.{name}").requires_grad_(True)
    elif args.method == "lora":
        if importlib.util.find_spec("peft") is None:
            raise Stop("--method lora needs peft: pip install peft.")
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(model, args))
        # Else peft asks the Hub, each time it saves, whether the vocabulary of the base model has changed.
        model.peft_config[model.active_adapter].base_model_name_or_path = ""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{trained:,} parameters are trained ({args.method}).")
    return model


def depth_of(name: str, num_layers: int) -> int:
    """How far a parameter is from the input: 0 for embeddings, 1 .. `num_layers` for blocks, one more for the rest."""
    if re.search(r"\bmapex\.embeddings\.", name):
        return 0
    block = re.search(r"\bmapex\.layers\.(\d+)\.", name)
    return int(block.group(1)) + 1 if block else num_layers + 1


def parameter_groups(
    model: nn.Module, num_layers: int, learning_rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """For an optimiser: what is trained, by rate and weight decay. The rate falls by `layer_decay` from each block to
    the one before (as in BEiT, arXiv 2106.08254), but for adapters; weight decay is for matrices only, as in
    pretraining.
    """
    decaying = set(get_parameter_names(model, [nn.LayerNorm, nn.GroupNorm, nn.Embedding], [r"bias", r"modality_shift"]))
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            distance = 0 if "lora_" in name else num_layers + 1 - depth_of(name, num_layers)
            key = (distance, name in decaying)
            options = {"lr": learning_rate * layer_decay**distance, "weight_decay": weight_decay * (name in decaying)}
            groups.setdefault(key, {"params": [], **options})["params"].append(parameter)
    return list(groups.values())
