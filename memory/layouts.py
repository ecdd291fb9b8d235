"""All layouts that train.py would start on a cluster, and of those that fit the fastest.

    grids     pp x cp x tp that the model, the cluster and the batch divide by
    layouts   each grid with each data-parallel layout, schedule, recomputation, micro-batch, ep
    plans     predicted by memory/predict.py; those that fit, by time

Neighbours: memory/activations.py, memory/flags.py, memory/predict.py, memory/ranks.py,
memory/shapes.py, optim/adamw.py, optim/attributes.py, optim/muon.py, parallel/replicas.py,
precision/amp.py

Example:
    from memory.layouts import flags, plans
    from memory.predict import Cluster, Model
    model = Model(n_layer=16, n_embd=2048, n_head=16, n_kv_head=16)
    best = plans(model, Cluster(gpus=8), batch=64)[0]
    print(f"{best.step:.2f} s a step with {flags(model, best.layout, 64)}")
    assert best.held["total"] < 80e9
"""

import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from memory.predict import Cluster, Layout, Model, Plan, predict
from memory.shapes import mlp_size

# The share of a device's memory that a plan fills. The rest is for the context, communication
# buffers and fragmentation.
USABLE = 0.9


def grids(m: Model, c: Cluster, batch: int) -> Iterator[tuple[int, int, int]]:
    """(pp, cp, tp) that the model, the cluster and the batch divide by."""
    # tp splits each of these evenly, and a node holds whole tp groups.
    widths = []
    if m.split(range(m.n_layer))[0]:
        widths.append(mlp_size(m.n_embd, m.arch, m.mlp_width))
    if m.experts is not None:
        widths.append(m.expert_width)
    split = (m.n_head, m.n_kv_head, m.n_embd, *widths, m.vocab_size, c.gpus_per_node)
    tps = [tp for tp in range(1, c.gpus_per_node + 1) if not any(size % tp for size in split)]
    cps = [cp for cp in (1, 2, 4, 8, 16, 32, 64) if cp == 1 or m.block_size % (2 * cp) == 0]
    pps = [pp for pp in range(1, min(m.n_layer, c.gpus) + 1) if c.gpus % pp == 0]
    for pp, cp, tp in itertools.product(pps, cps, tps):
        size = pp * cp * tp
        if c.gpus % size == 0 and batch % (c.gpus // size) == 0:
            yield pp, cp, tp


def layouts(m: Model, c: Cluster, batch: int) -> Iterator[Layout]:
    """Layouts that train.py would start.

    Left out: zero2 and zero3 (fsdp composes with everything), naive and gpipe (1f1b's time at
    best), micro-batches above 16, hybrids; K is 2, chunks are 2, 3, 4 or 8.
    """
    for pp, cp, tp in grids(m, c, batch):
        dp = c.gpus // (pp * cp * tp)
        sp = tp > 1 and m.block_size // cp % tp == 0
        kinds = [("ddp", True)]
        if dp * cp > 1:
            kinds += [("zero1", True), ("fsdp", True), ("fsdp", False)]
        n_expert = m.experts.n_expert if m.experts else 1
        eps = [ep for ep in range(1, min(dp, n_expert) + 1) if dp % ep == n_expert % ep == 0]
        choices = itertools.product(eps, kinds, ("none", "every_2", "full"), (1, 2, 4, 8, 16))
        for ep, (kind, reshard), again, size in choices:
            micro, rest = divmod(batch // dp, size)
            if rest or not micro:
                continue
            x = Layout(tp, sp, cp, pp, ep, "1f1b", 1, kind, reshard, again, size)
            yield x
            # Zero bubble is incompatible with fsdp and with activation checkpointing.
            if pp > 1 and kind != "fsdp" and again == "none":
                yield replace(x, pp_schedule="zerobubble")
            if pp > 1 and micro % pp == 0:
                for chunks in (2, 3, 4, 8):
                    if chunks * pp <= m.n_layer:
                        yield replace(x, pp_schedule="interleaved", pp_chunks=chunks)


def plans(m: Model, c: Cluster, batch: int, precision: str = "bf16") -> list[Plan]:
    """The plans that fit, the fastest first (to three digits; among equals the simplest).

    Raises ValueError, with what to type, where none fits.
    """
    smallest = None  # of those that do not fit
    fits = []
    for x in layouts(m, c, batch):
        plan = predict(m, c, x, batch, precision)
        if plan.held["total"] <= USABLE * c.memory:
            fits.append(plan)
        elif smallest is None or plan.held["total"] < smallest.held["total"]:
            smallest = plan
    if not fits and smallest is None:
        raise ValueError(
            f"no layout shares batch={batch} sequences out over gpus={c.gpus}; "
            f"give a multiple, as --batch={c.gpus * math.ceil(batch / c.gpus)}"
        )
    if not fits:
        memory = f"{c.memory / 1e9:g}e9"
        least = f"{smallest.held['total'] / USABLE / 1e9:.1f}e9"
        raise ValueError(
            f"nothing fits in {USABLE} of memory={memory}; the least is --memory={least}, "
            f"with {flags(m, smallest.layout, batch)}; type more --gpus, or a smaller --block_size "
            "(python -m memory.estimate --largest --gpu=: what does fit)"
        )

    def order(plan: Plan) -> tuple:
        # Steps equal to three digits tie: then the fewest flags to type, then the least memory.
        default = vars(Layout())
        n_changed = sum(getattr(plan.layout, name) != usual for name, usual in default.items())
        return float(f"{plan.step:.3g}"), n_changed, plan.held["total"]

    return sorted(fits, key=order)


def flags(m: Model, x: Layout, batch: int) -> str:
    """The layout in train.py's command line: what differs from its defaults, and the batch."""
    typed = {k: v for k, v in vars(x).items() if v != getattr(Layout(), k)}
    if x.cp > 1:
        typed["cp_attention"] = "ring"
    if x.pp > 1:
        typed["pp_schedule"] = x.pp_schedule
    typed |= dict(micro_batch_size=x.micro_batch_size, batch_size=batch, block_size=m.block_size)
    return " ".join(f"--{k}={str(v).lower()}" for k, v in typed.items())


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
