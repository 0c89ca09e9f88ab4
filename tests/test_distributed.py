"""Sharded over two processes on the CPU, by the plans of the configuration, a model is what it is in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import randomize, tiny_config

from modeling_mapex import MapexModel


@pytest.mark.parametrize("mode", ["fsdp", "expert_parallel"])
def test_sharded_equals_whole(mode, tmp_path):
    """Outputs, and gradients of the mean over both processes' batches."""
    pytest.importorskip("accelerate", reason="loading onto several processes needs the extra `train`")
    randomize(MapexModel(tiny_config())).save_pretrained(tmp_path)
    script = Path(__file__).parent / "distributed_forward_backward.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(script), str(tmp_path), mode],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert all(f"rank {rank}: equal" in result.stdout for rank in range(2)), result.stdout
