"""Run by test_distributed.py under torchrun: training steps of two processes against those of one.

torchrun --nproc_per_node 2 tests/distributed_pretraining.py MODE
"""

import os
import sys

import torch
import torch.distributed as dist
from conftest import randomize, tiny_config, tiny_inputs

from modeling_mapex import MapexForPreTraining


STEPS = 4


def make_model() -> MapexForPreTraining:
    torch.manual_seed(0)
    return randomize(MapexForPreTraining(tiny_config(router_entropy_floor=0.5))).train()


def make_groups(model: MapexForPreTraining, step: int, mode: str) -> list[dict]:
    """The two parts of the batch of a step, one for each process, with all that is random in it."""
    torch.manual_seed(100 + step)
    if mode == "missing":  # no modality is in both, and one is in neither
        names = [("radar",), ("optical",)]
    else:
        names = [("radar", "optical"), ("optical", "height")] if mode == "ddp" else [("radar", "optical", "height")] * 2
    groups = []
    for part, present in enumerate(names):
        pixel_values = tiny_inputs(present, batch_size=3 + (part if mode == "ddp" else 0))
        noise = model.draw_noise(pixel_values, generator=torch.Generator().manual_seed(10 * step + part))
        groups.append({"pixel_values": pixel_values, "noise": noise})
    return groups


def train_step(model, optimizer, arguments: dict) -> torch.Tensor:
    outputs = model(**arguments, mutual_information_scale=0.7)
    outputs.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return outputs.loss.detach()


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-3)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(mode: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    whole, divided = make_model(), make_model()
    if mode == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in (*divided.mapex.layers, *divided.decoder.layers):
            fully_shard(layer)
        fully_shard(divided)
    else:
        divided = torch.nn.parallel.DistributedDataParallel(divided)
    whole_optimizer, divided_optimizer = make_optimizer(whole), make_optimizer(divided)
    for step in range(STEPS):
        groups = make_groups(whole, step, mode)
        expected = train_step(whole, whole_optimizer, {"groups": groups})
        loss = train_step(divided, divided_optimizer, {**groups[rank], "process_group": dist.group.WORLD})
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        other = dict(getattr(divided, "module", divided).named_parameters())
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(
                full(other[name].detach()), parameter.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    print(f"rank {rank}: equal", flush=True)
    dist.barrier()  # no rank closes its sockets while the other still uses them
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as distributed_forward_backward.py
