"""How long the stages of a pipeline wait for each other, measured beside simulated.

    torchrun --standalone --nproc_per_node=2 bench.py pipeline [--micro_batches=8]

One row a schedule: the best of three steps, and the share of all ranks' time that is not spent on
their own operations, waiting at the end included. A step is m micro-batches of 4 x 128 tokens
through 8 layers of width 256. Simulated: backward takes twice as long as forward, a message nothing
(parallel/timeline.py). Ranks that share cores slow each other down, which the share does not show.
On a GPU waiting is not seen by the process: the measured column then counts the launches alone.
"""

import sys
import time

import torch
import torch.distributed as dist

from model import GPT, GPTConfig, initial_weight
from parallel import launch, pipeline, timeline

B, T, C, LAYERS = 4, 128, 256, 8


def one(name: str, chunks: int, m: int, device: torch.device) -> tuple[float, float]:
    """(seconds of the best step, share of all ranks' time in it that was idle)."""
    pipe = pipeline.Pipeline(dist.group.WORLD, name, LAYERS, chunks, device)
    shape = dict(n_layer=LAYERS, n_embd=C, block_size=T, zero_init=False)
    model = GPT(GPTConfig(**shape), pipe.stage_layers).to(device)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(initial_weight(model.config, key, tuple(p.shape)))
    if name == "zerobubble":
        pipe.deferred = pipeline.defer_weight_gradients(model)
    ids = torch.randint(256, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    like, steps = ((B, T, C), torch.float32, device), []
    for _ in range(4):
        model.zero_grad()
        dist.barrier()
        began = time.perf_counter()
        pipe.run(
            m,
            lambda i, layers, h: model(ids[:, :-1] if h is None else h, ids[:, 1:], layers=layers),
            lambda i: like,
            1 / (m * B * T),
        )
        busy = torch.tensor([time.perf_counter() - began - pipe.idle_s])
        dist.all_reduce(busy)
        seconds = time.perf_counter() - began
        steps.append((seconds, 1 - busy.item() / (pipe.p * seconds)))
    return min(steps[1:])


def main(argv: list[str]) -> int:
    m, device = 8, torch.device("cpu")
    for word in argv:
        name, _, text = word.partition("=")
        if name != "--micro_batches" or not text.isdecimal() or int(text) < 1:
            print(f"bench.py pipeline: {word!r} is not --micro_batches=8", file=sys.stderr)
            return 2
        m = int(text)
    if not launch.start(device):
        print("type torchrun --standalone --nproc_per_node=2 bench.py pipeline", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    p, main_rank = dist.get_world_size(), dist.get_rank() == 0
    head = (
        f"{p} stages, {m} micro-batches",
        "ms a step",
        "idle, measured",
        "simulated",
        "forwards in memory",
    )
    rows = [f"| {' | '.join(head)} |", "|---" * 5 + "|"]
    for name in timeline.SCHEDULES:
        chunks = 2 if name == "interleaved" else 1
        if name == "interleaved" and (m % p or p * chunks > LAYERS):
            continue
        plan = timeline.simulate(timeline.schedule(name, p, m, chunks))
        seconds, idle = one(name, chunks, m, device)
        cells = (
            f"{1000 * seconds:.0f}",
            f"{idle:.3f}",
            f"{plan.bubble:.3f}",
            f"{max(plan.in_flight)}",
        )
        rows.append(f"| {name} | {' | '.join(cells)} |")
    if main_rank:
        print("\n".join(rows))
    dist.barrier()
    dist.destroy_process_group()
    return 0
