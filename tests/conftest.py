"""Tiny models and inputs that all tests share. Dimensions are multiples of 8: the grouped matrix product needs that."""

# ruff: noqa: E402
import os


# Tests know no Hub but their own on loopback, whatever this shell says. The client reads these when it is imported.
for _variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
    os.environ.pop(_variable, None)
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # where nobody listens: asking the real Hub fails at once

import pytest
import torch
from transformers.utils import logging

from modeling_mapex import MapexConfig


MODALITIES = {
    "radar": {"bands": ["VV", "VH"], "gsd": 10.0, "patch_size": 4},
    "optical": {
        "bands": ["blue", "green", "red", "nir"],
        "gsd": 10.0,
        "patch_size": 4,
        "target_groups": [["blue", "green", "red"], ["nir"]],
    },
    "height": {"bands": ["elevation"], "gsd": 20.0, "patch_size": 2},
}
SIZES = {"radar": (16, 16), "optical": (16, 24), "height": (8, 8)}  # 16, 24 and 16 tokens


@pytest.fixture(autouse=True, scope="session")
def _few_threads_and_no_progress_bars():
    torch.set_num_threads(1)  # tests run in several processes
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny_config(**overrides) -> MapexConfig:
    """Three modalities, four blocks, mixtures of four experts in blocks 1 and 3."""
    fields = {
        "modalities": MODALITIES,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "num_experts": 4,
        # Large weights, so that routing is decided and a wrong one shows.
        "initializer_range": 0.5,
    }
    return MapexConfig(**{**fields, **overrides})


def tiny_inputs(names=("radar", "optical", "height"), batch_size=3, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.randn(batch_size, len(MODALITIES[name]["bands"]), *SIZES[name], dtype=dtype) for name in names}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and norms start at 0 and 1, where a mistake with them would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "layernorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def subsets(items) -> list[tuple]:
    """All subsets of `items` but the empty one."""
    items = list(items)
    return [
        tuple(item for position, item in enumerate(items) if code >> position & 1) for code in range(1, 2 ** len(items))
    ]
