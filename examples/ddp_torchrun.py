"""Somebody's MLP on several ranks by our DDP, with torch's own AdamW and a scheduler.

Type at the root:

    torchrun --standalone --nproc_per_node=2 -m examples.ddp_torchrun
"""

import torch
import torch.distributed as dist
from torch import nn

from parallel.ddp import DDP


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = dist.get_world_size()
    torch.manual_seed(rank)  # all ranks get rank 0's weights, and samples of their own
    replicas = DDP(dist.group.WORLD, torch.device("cpu"))
    model = replicas.parallelize(nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    first = None
    for _ in range(100):
        total = 0.0
        for i in range(2):  # micro-batches of 32 samples
            x = torch.randn(32, 8)
            y = x.sin().sum(1, keepdim=True)
            replicas.last_micro_batch(i == 1)
            # The sum over all ranks is the mean of the whole batch: divide by its size.
            loss = (model(x) - y).square().sum() / (2 * 32 * world)
            loss.backward()
            total += loss.item() * world
        replicas.finish_gradients()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        first = first or total
    print(f"rank {rank} of {world}: loss {first:.2f} -> {total:.2f}")
    assert total < first / 4
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
