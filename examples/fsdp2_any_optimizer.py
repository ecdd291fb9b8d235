"""torch's fully_shard on somebody's MLP, with any optimizer of optim/ by its name (and lr).

Type at the root:

    torchrun --standalone --nproc_per_node=2 -m examples.fsdp2_any_optimizer shampoo
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from optim.attributes import attribute, own_classes
from optim.param_groups import averages_weights
from parallel.sharded_optimizer import make_optimizer


def main(name: str, lr: str = "0.02") -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # fully_shard does not make weights alike: the same seed does
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
    model.append(nn.Linear(32, 1))
    for layer in (*model, model):
        fully_shard(layer)

    cls = own_classes()[name]
    groups = [{"params": list(model.parameters())}]
    if attribute(cls, "matrices_only"):  # Muon takes hidden matrices, its AdamW the rest
        rest = [p for p in model.parameters() if p is not model[2].weight]
        groups = [{"params": [model[2].weight]}, {"params": rest, "use_muon": False, "lr": 0.01}]
    optimizer = make_optimizer(cls, groups, lr=float(lr))
    if averages_weights(cls):  # Schedule-Free keeps two sets of weights
        optimizer.train()

    torch.manual_seed(dist.get_rank())
    losses = []
    for _ in range(100):
        x = torch.randn(64, 8)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{name} on rank {dist.get_rank()}: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert losses[-1] < losses[0] / 2
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["shampoo"]))
