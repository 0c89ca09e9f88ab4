"""Run by test_distributed.py under torchrun: a sharded model against the whole one, outputs and gradients.

torchrun --nproc_per_node 2 tests/distributed_forward_backward.py CHECKPOINT MODE
"""

import os
import sys

import torch
import torch.distributed as dist
from conftest import tiny_inputs
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging

from modeling_mapex import MapexModel


MODES = {"fsdp": {"fsdp_size": 2}, "expert_parallel": {"fsdp_size": 2, "ep_size": 2}}


def loss_of(model: torch.nn.Module, pixel_values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(pixel_values).last_hidden_state
    return output.detach(), output.square().mean()


def main(checkpoint: str, mode: str) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    whole = MapexModel.from_pretrained(checkpoint)
    sharded = MapexModel.from_pretrained(checkpoint, distributed_config=DistributedConfig(**MODES[mode]))
    torch.manual_seed(1)
    batches = [tiny_inputs(), tiny_inputs()]  # each rank sees one, the whole model both

    outputs, losses = zip(*(loss_of(whole, batch) for batch in batches))
    (sum(losses) / 2).backward()
    output, loss = loss_of(sharded, batches[rank])
    loss.backward()

    torch.testing.assert_close(output, outputs[rank], rtol=1e-5, atol=1e-5)
    experts = sharded.layers[1].mlp.experts.up_proj
    assert experts.to_local().shape[0] == 2, "each rank should hold two of the four experts"
    expected = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        torch.testing.assert_close(
            gradient, expected[name].grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    print(f"rank {rank}: equal", flush=True)
    dist.barrier()  # no rank closes its sockets while the other still uses them
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # Past this line there is nothing to test. Torch's C++ threads, torn down with the interpreter on a busy machine,
    # sometimes abort the process ("terminate called without an active exception") after all has been compared.
    sys.stdout.flush()
    os._exit(0)
