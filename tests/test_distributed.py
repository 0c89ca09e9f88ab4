"""Divided over two processes on the CPU, a model is what it is in one: its outputs, its gradients and its training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import randomize, tiny_config

from modeling_mapex import MapexModel


FOLDER = Path(__file__).parent
pytestmark = pytest.mark.slow


def run_on_two_processes(script: str, *arguments: str) -> None:
    """Both must say that they found no difference."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(FOLDER / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert all(f"rank {rank}: equal" in result.stdout for rank in range(2)), result.stdout


@pytest.mark.parametrize("mode", ["fsdp", "expert_parallel"])
def test_sharded_equals_whole(mode, tmp_path):
    """Outputs, and gradients of the mean over both processes' batches."""
    pytest.importorskip("accelerate", reason="loading onto several processes needs the extra `train`")
    randomize(MapexModel(tiny_config())).save_pretrained(tmp_path)
    run_on_two_processes("distributed_forward_backward.py", str(tmp_path), mode)


@pytest.mark.parametrize("mode", ["ddp", "missing", "fsdp"])
def test_training_equals_that_of_one_process(mode):
    """Every parameter after each of several AdamW steps, from the losses of both processes' batches together; also
    where the processes have different modalities, and one that neither has.
    """
    run_on_two_processes("distributed_pretraining.py", mode)
