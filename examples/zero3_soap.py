"""ZeRO 3 on somebody's MLP: weights, gradients and SOAP's large state are each on one rank alone.

Type at the root:

    torchrun --standalone --nproc_per_node=2 -m examples.zero3_soap
"""

import torch
import torch.distributed as dist
from torch import nn

from optim.soap import SOAP
from parallel.zero import ZeRO


class MLP(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.leave = nn.Linear(width, 1)

    def forward(self, x):
        x = self.enter(x)
        for layer in self.layers:
            x = layer(torch.tanh(x))
        return self.leave(x)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = dist.get_world_size()
    torch.manual_seed(rank)
    cpu = torch.device("cpu")
    # SOAP needs each matrix in full. With AdamW, leave by_rows out.
    replicas = ZeRO(dist.group.WORLD, cpu, stage=3, blocks="layers", by_rows=False)
    model = replicas.parallelize(MLP())
    optimizer = replicas.make_optimizer(SOAP, model.named_parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        x = torch.randn(32, 8)
        loss = (model(x) - x.sum(1, keepdim=True)).square().sum() / (32 * world)
        loss.backward()
        replicas.finish_gradients()
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item() * world)
    n_owned = sum(p.numel() for p in replicas.owned_params().values())
    print(f"rank {rank} of {world} owns {n_owned}: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert losses[-1] < losses[0] / 4
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
