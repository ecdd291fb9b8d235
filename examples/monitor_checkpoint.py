"""Spike monitor and checkpoints in somebody's loop: kill it and run it again, and it resumes.

Type at the root:

    python -m examples.monitor_checkpoint FOLDER
"""

import sys

import torch
from torch import nn

from checkpoint.load import newest
from checkpoint.save import save
from monitor import SpikeMonitor


def main(folder: str) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor = SpikeMonitor(model, optimizer, cursor=None)  # rollback would need a cursor
    saved = newest(folder)
    start = 0 if saved is None else saved.step
    if saved is not None:
        print(f"resumes at step {start}")
        saved.load_weights(model)
        state = {int(i): x for i, x in saved.tree("optimizer").items()}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        monitor.load_state_dict(saved.tree("monitor"))
    losses = []
    for step in range(start, 200):
        # A function of the step alone: a resumed run sees what the killed one would have seen.
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        y = x.sum(1, keepdim=True) * (50 if step == 120 else 1)  # 120: a bad batch
        loss = (model(x) - y).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        verdict = monitor.check(step, loss.item(), norm.item(), samples=[step])
        for event in monitor.events:
            print(f"step {step}: {event['text']}: {verdict}")
        if verdict == "step":
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 10 == 0:
            state = {str(i): x for i, x in optimizer.state_dict()["state"].items()}
            tree = {"model": dict(model.named_parameters()), "optimizer": state}
            save(folder, step + 1, tree | {"monitor": monitor.state_dict()}, keep=2)
            print(f"step {step + 1}: loss {loss:.4f}", flush=True)
    assert not losses or losses[-1] < 1.0
    return losses


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["out-example"]))
