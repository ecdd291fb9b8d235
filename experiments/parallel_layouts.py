"""Claim: however a model is spread over ranks, it is the same training run, and what a rank sends
in a step is what the layout's formula says.

Source: the fourth lesson, section 1 (data, tensor, pipeline, sequence parallelism and their
combination), with the formulas of the papers named in parallel/.

Protocol: a GPT of 4 layers and width 64, 8 sequences of 64 tokens a step in two micro-batches,
AdamW, constant learning rate. fp64: 10 steps, the largest relative gap to one process's training
loss; fp32: 60 steps, the same. Bytes: each collective of the third step is caught on its way to
torch.distributed, on every rank, and counted by its formula on a ring (all-reduce 2 (n-1)/n of its
tensor, gather, scatter, all-to-all and broadcast (n-1)/n, a message all of it); the figure is the
mean over ranks. Messages of up to 64 bytes, loss, norm and the like, are left out. (Needs Linux:
the ranks are forks of a process that counts.) The formula knows only sizes: numbers of layers, of
ranks, bytes of weights and of one activation.

Expected: fp64 within 1e-10, fp32 within 1e-4 (the sums' order differs, and steps amplify it); bytes
within 1 %, as parts of a matrix are rounded to rows.

    python -m experiments.parallel_layouts [--quick] [--out=DIR] [--jobs=N]
"""

import json
import tempfile
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.fsdp  # here once, not in each rank of each row
import torch.distributed.tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experiments import protocol
from experiments.findings import INK, groups, judged, markdown, pick
from parallel import watchdog

# MICRO: micro-batches of a replica
LAYERS, WIDTH, LENGTH, BATCH, MICRO, WORDS = 4, 64, 64, 8, 2, 256
EXACT, CLOSE, BYTES = 1e-10, 1e-4, 0.01
LAYOUTS = {  # name -> ranks, train.py's fields
    "one process": (1, {}),
    "ddp": (4, {}),
    "zero1": (4, dict(data_parallel="zero1")),
    "zero2": (4, dict(data_parallel="zero2")),
    "zero3": (4, dict(data_parallel="zero3")),
    "fsdp": (4, dict(data_parallel="fsdp")),
    "fsdp, kept": (4, dict(data_parallel="fsdp", reshard=False)),
    "fsdp, 2 x 2": (4, dict(data_parallel="fsdp", fsdp_shard=2)),
    "tp": (4, dict(tp=4)),
    "tp, sp": (4, dict(tp=4, sp=True)),
    "cp, ring": (4, dict(cp=4)),
    "cp, ulysses": (4, dict(cp=4, cp_attention="ulysses")),
    "pp": (4, dict(pp=4)),
    "dp x tp": (4, dict(tp=2)),
    "dp x pp": (4, dict(pp=2)),
    "fsdp x tp": (4, dict(data_parallel="fsdp", tp=2)),
    "cp x tp": (4, dict(cp=2, tp=2)),
    "dp x pp x tp": (8, dict(pp=2, tp=2)),
}
NUMBERS = {"fp64": 8, "fp32": 4}  # bytes of a number


def grid(names: list[str], precisions: list[str]) -> list[dict]:
    return [dict(precision=p, layout=name, seed=1337) for p in precisions for name in names]


GRID = grid([*LAYOUTS], [*NUMBERS])
QUICK = grid(["one process", "fsdp", "tp", "pp"], ["fp64"])


# ---- rows ----------------------------------------------------------------------------------------
class Wire(TorchDispatchMode):
    """Bytes this rank sends, collective by collective."""

    sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            group = next(
                (a for a in args if "ProcessGroup" in str(getattr(a, "_type", lambda: "")())), None
            )
            n = dist.get_world_size() if group is None else dist.ProcessGroup.unbox(group).size()
            lists = [
                [a] if isinstance(a, torch.Tensor) else a
                for a in args
                if isinstance(a, (list, torch.Tensor))
            ]
            sizes = [
                sum(x.nbytes for x in a) for a in lists if a and isinstance(a[0], torch.Tensor)
            ]
            if sizes and max(sizes) > 64 and name not in ("recv_", "barrier"):
                self.sent += max(sizes) * (
                    1 if name == "send" else (n - 1) / n * (1 + (name == "allreduce_"))
                )
        return func(*args, **(kwargs or {}))


def row(keys: dict, quick: bool) -> dict:
    torch.set_num_threads(1)  # as each of several ranks has
    ranks, layout = LAYOUTS[keys["layout"]]
    steps = (4 if quick else 10) if keys["precision"] == "fp64" else 60
    with tempfile.TemporaryDirectory() as folder:
        plain, begin = protocol.train.main, watchdog.RankLog.step

        def counted(cfg):
            """train.main on this rank, with what it sends in its third step."""
            wire, marks = Wire(), []

            def step(log, number):
                marks.append(wire.sent)
                begin(log, number)

            watchdog.RankLog.step = step
            with wire:
                result = plain(cfg)
            rank = dist.get_rank() if dist.is_initialized() else 0
            Path(folder, f"sent_{rank}").write_text(json.dumps(marks[3] - marks[2]))
            return result

        protocol.train.main = counted
        rows = protocol.train_run(
            ranks,
            out_dir=f"{folder}/run",
            steps=steps,
            seed=keys["seed"],
            n_layer=LAYERS,
            n_embd=WIDTH,
            block_size=LENGTH,
            batch_size=BATCH,
            precision=keys["precision"],
            optim="adamw",
            lr=3e-3,
            schedule="constant",
            zero_init=False,
            eval_every=0,
            on_spike="none",
            on_nonfinite="none",
            micro_batch_size=BATCH // MICRO // replicas(keys["layout"]),
            **layout,
        )
        sent = [json.loads(Path(folder, f"sent_{rank}").read_text()) for rank in range(ranks)]
    return {
        "sent": sum(sent) / ranks,
        "most": max(sent),
        "told": formula(keys["layout"], keys["precision"]),
        "losses": protocol.curve(rows, "loss"),
    }


def sizes(layout: str) -> tuple[str, int, int, int, int]:
    """(data parallel way, dp, cp, tp, pp)."""
    ranks, fields = LAYOUTS[layout]
    cp, tp, pp = (fields.get(name, 1) for name in ("cp", "tp", "pp"))
    return fields.get("data_parallel", "ddp"), ranks // (cp * tp * pp), cp, tp, pp


def replicas(layout: str) -> int:
    return sizes(layout)[1]


def formula(layout: str, precision: str) -> float:
    """Bytes sent per step, mean over ranks: the tables in the docstrings of parallel/, for this
    model."""
    way, dp, cp, tp, pp = sizes(layout)
    w, m, n, fields = NUMBERS[precision], MICRO, dp * cp, LAYOUTS[layout][1]
    blocks, ends = 12 * WIDTH**2 * LAYERS * w / (tp * pp), 2 * WORDS * WIDTH * w / (tp * pp)
    weights, of = blocks + ends, lambda n: (n - 1) / n
    # One micro-batch's hidden states, of a rank
    activation = BATCH / dp / m * LENGTH / cp * WIDTH * w
    if way == "fsdp":
        s = fields.get("fsdp_shard", n)
        gathers = 2 * m if fields.get("reshard", True) else 1
        total = of(s) * (gathers * blocks + ends + weights) + 2 * of(n // s) * weights / s
    elif way == "zero3":  # backward looks up no embedding, and the head is still there
        total = of(n) * (m * weights + m * blocks + m * weights)
    else:
        total = of(n) * {"ddp": 2, "zero1": 2, "zero2": m + 1}[way] * weights
    # Tensor parallelism: sums of activations; the loss's three numbers a token, of the last stage.
    total += (
        m * ((2 * LAYERS + 1) * 4 * of(tp) * activation + 2 * of(tp) * 3 * activation / WIDTH) / pp
    )
    kv = 2 * activation / tp
    if cp > 1:
        ring = fields.get("cp_attention", "ring") == "ring"
        total += m * LAYERS / pp * ((cp - 1) * 3 * kv if ring else of(cp) * 2 * 2 * kv)
    return total + m * 2 * (pp - 1) / pp * activation


# ---- findings ------------------------------------------------------------------------------------
def gap(rows: list[dict], layout: str, precision: str) -> float:
    """The largest relative gap to one process's loss."""
    mine, base = (
        pick(rows, layout=name, precision=precision)[0]["losses"]
        for name in (layout, "one process")
    )
    gaps = (abs(a / b - 1) for a, b in zip(mine, base, strict=True))
    return max(gaps, key=lambda x: (x != x, x))  # NaN is the largest


def parts(rows: list[dict]) -> dict[str, bool]:
    found = {}
    for (precision,), mine in groups(rows, "precision").items():
        limit = EXACT if precision == "fp64" else CLOSE
        off = {
            r["layout"]: gap(rows, r["layout"], precision)
            for r in mine
            if r["layout"] != "one process"
        }
        worst = max(off, key=lambda name: (off[name] != off[name], off[name]))
        same = sum(x <= limit for x in off.values())
        found[
            f"{same} of {len(off)} layouts follow one process in {precision} within {limit:g} "
            f"(worst: {worst}, {off[worst]:.1e})"
        ] = same == len(off)
    wrong = {
        f"{r['layout']}, {r['precision']}": r["sent"] / r["told"] - 1 if r["told"] else r["sent"]
        for r in rows
    }
    worst = max(wrong, key=lambda name: abs(wrong[name]))
    right = [name for name, x in wrong.items() if abs(x) <= BYTES]
    found[
        f"{len(right)} of {len(wrong)} rows send what their formula says within 1 % (worst:"
        f" {worst}, {wrong[worst]:+.1%})"
    ] = len(right) == len(wrong)
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    found = parts(rows)
    word, _, why = judged(found)
    return word, next(iter(found)), why


def table(rows: list[dict]) -> str:
    lines = []
    for (layout,), mine in groups(rows, "layout").items():
        last = mine[-1]
        ratio = f"{last['sent'] / last['told'] - 1:+.2%}" if last["told"] else "-"
        lines.append(
            [
                layout,
                LAYOUTS[layout][0],
                *(f"{gap(rows, layout, r['precision']):.1e}" for r in mine),
                *(f"{last[k] / 1024:,.1f}" for k in ("sent", "told")),
                ratio,
                f"{last['most'] / 1024:,.1f}",
            ]
        )
    names = [p for (p,) in groups(rows, "precision")]
    head = [
        "layout",
        "ranks",
        *(f"gap of the loss, {p}" for p in names),
        f"KiB sent per rank and step, {names[-1]}",
        "formula",
        "gap",
        "busiest rank",
    ]
    held = "\n".join(
        f"- {text}: {'yes' if found else '**no**'}" for text, found in parts(rows).items()
    )
    return f"{held}\n\n{markdown(head, lines)}"


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(13, 5)
    curves, off, sent = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    precision = rows[-1]["precision"]
    mine = pick(rows, precision=precision)
    for r in mine:
        curves.plot(r["losses"], lw=1.2, color=INK[0])
    # The first tenth would take half of the height.
    every = [loss for r in mine for loss in r["losses"]]
    later = [loss for r in mine for loss in r["losses"][len(r["losses"]) // 10 :]]
    curves.grid(alpha=0.25)
    curves.set(
        title=f"{len(mine)} layouts, {precision}: a line each",
        xlabel=f"step (the first ones, from {max(every):.1f}, lie above)",
        ylim=(min(every) - 0.1, max(later) + 0.1),
        ylabel="training loss (nats per byte)",
    )
    names = [r["layout"] for r in mine if r["layout"] != "one process"]
    for (p,), color in zip(groups(rows, "precision"), INK):
        off.plot([max(gap(rows, n, p), 1e-17) for n in names], names, "o", color=color, label=p)
        off.axvline(EXACT if p == "fp64" else CLOSE, color=color, ls="--", lw=1)
    off.set(
        xscale="log",
        title="Largest gap to one process",
        xlabel="relative gap of the loss (dashed: claimed)",
    )
    off.invert_yaxis()
    off.legend(frameon=False, loc="center", bbox_to_anchor=(0.28, 0.5))
    sent.barh(
        names,
        [pick(mine, layout=n)[0]["sent"] / 1024 for n in names],
        0.6,
        color=INK[0],
        alpha=0.7,
        label="sent",
    )
    sent.plot(
        [pick(mine, layout=n)[0]["told"] / 1024 for n in names],
        names,
        "|",
        ms=14,
        mew=2.5,
        color="black",
        label="formula",
    )
    sent.set(title="KiB a rank sends in a step", xlabel=f"mean over ranks, {precision}")
    sent.invert_yaxis()
    sent.legend(frameon=False)


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
