"""Claim: what a rank holds in memory can be computed beforehand: a 7B model takes 105.5 GB, 10B
take 120 GB on each GPU and 15 GB with ZeRO-3 on 8; ZeRO 1, 2, 3, FSDP and offloading hold what
their tables say.

Source: the third lesson (120 and 15 GB), the fourth (105.5 GB; 4, 8 and N times less by ZeRO), and
the paper behind them, Rajbhandari et al. 2020, 1910.02054 (120, 31.4, 16.6, 1.9 GB for 7.5B on 64
GPUs).

Protocol: `sources`: memory/ranks.py against each of these figures, and beside those of the
lessons what the primary sources' 16 bytes a parameter and 34 s b h of activations make of them.
`measured`: GPTs of 8 layers, widths 64 and 128, on 4 ranks, two micro-batches of 8 tokens, fp32:
the most bytes alive at any moment of a step on the fullest rank, found by asking all storages at
every operation. `offloaded`: the same on 3 ranks with state, with zero3 and fsdp also weights and
gradients, in files, which count as the host's memory and not as the device's
(tests/test_estimate.py has both meters). `process`: what Linux counts as anonymous memory of
train.py, state kept, offloaded to the CPU (on a CPU it is there already), or in files. Needs Linux.

Expected: the estimator gives every figure to its last digit; measured peaks lie within 5 % of the
predicted ones; with the state in files anonymous memory is less by the 8 bytes a parameter that
AdamW keeps.

    python -m experiments.memory_per_rank [--quick] [--out=DIR] [--jobs=N]
"""

import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed.fsdp  # here once, not in each rank of each row
import torch.distributed.tensor

from experiments import protocol
from experiments.findings import INK, judged, markdown, pick
from memory.activations import activation_bytes
from memory.ranks import bytes_per_rank
from memory.shapes import gpt_shapes

# It measures as the estimate's tests do, with their functions.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
import test_estimate as measuring  # noqa: E402
from harness import run_ranks  # noqa: E402

SEVEN = dict(tokens=4 * 2048, n_layer=32, n_embd=4096)
# Claimed GB; parameters, layout, ranks, accounting, activations; None: no source says so
SOURCES = {
    "7B, 4 x 2048 tokens": (105.5, 7e9, "ddp", 1, "texts", SEVEN),
    "7B, by the primary sources": (None, 7e9, "ddp", 1, "mixed", SEVEN),
    "10B on each GPU": (120, 10e9, "ddp", 8, "texts", None),
    "10B, ZeRO-3 on 8 GPUs": (15, 10e9, "zero3", 8, "texts", None),
    "10B on each GPU, 16 bytes": (None, 10e9, "ddp", 8, "mixed", None),
    "10B, ZeRO-3 on 8 GPUs, 16 bytes": (None, 10e9, "zero3", 8, "mixed", None),
    "7.5B on 64 GPUs": (120, 7.5e9, "ddp", 64, "mixed", None),
    "7.5B on 64 GPUs, ZeRO-1": (31.4, 7.5e9, "zero1", 64, "mixed", None),
    "7.5B on 64 GPUs, ZeRO-2": (16.6, 7.5e9, "zero2", 64, "mixed", None),
    "7.5B on 64 GPUs, ZeRO-3": (1.9, 7.5e9, "zero3", 64, "mixed", None),
}
LAYOUTS, CLOSE = ("ddp", "zero1", "zero2", "zero3", "fsdp"), 0.05
OFFLOADED = ("ddp", "zero1", "zero3", "fsdp")


def grid(
    widths: tuple[int, ...], optims: tuple[str, ...], offloaded: tuple[str, ...]
) -> list[dict]:
    cases = [("sources", name, 0, "adamw") for name in SOURCES]
    cases += [
        ("measured", x, width, optim) for width in widths for optim in optims for x in LAYOUTS
    ]
    cases += [("offloaded", x, widths[0], optim) for optim in optims for x in offloaded]
    cases += [("process", place, 512, "adamw") for place in ("kept", "cpu", "disk")]
    return [dict(zip(("part", "case", "width", "optim"), case)) for case in cases]


GRID, QUICK = grid((64, 128), ("adamw", "muon"), OFFLOADED), grid((64,), ("adamw",), OFFLOADED[:1])


# ---- rows ----------------------------------------------------------------------------------------
def row(keys: dict, quick: bool) -> dict:
    torch.set_num_threads(1)  # with so little to do two wait for each other
    part, case, optim = keys["part"], keys["case"], keys["optim"]
    measuring.SIZE["n_embd"] = keys["width"]  # of its model
    if part == "sources":
        _, params, layout, ranks, accounting, size = SOURCES[case]
        kept = activation_bytes(accounting, **size) if size else 0
        return {
            "predicted": (
                1e9 * measuring.total(optim, layout, params, ranks, accounting, activations=kept)
            )
        }
    if part == "process":
        return anonymous(case, 3 if quick else 8)
    if part == "measured":
        ranks = run_ranks(4, measuring.measured, case, optim, "fp32", 2, {}, 0.25)
        told = measuring.predicted(case, optim, 4, "fp32", 2, {}, bucket_mb=0.25)
        names = ("parameters", "gradients", "state")
        return (
            {"predicted": told["total"], "found": max(rank["peak"] for rank in ranks)}
            | {f"predicted_{k}": told[k] for k in names}
            | {k: max(rank[k] for rank in ranks) for k in names}
        )
    where = "offload_params" if case in ("zero3", "fsdp") else "offload"
    told = measuring.predicted(
        case,
        optim,
        3,
        "fp32",
        2,
        {},
        bucket_mb=0.25,
        chunk_mb=0.1,
        **{where: "disk"},
    )
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(3, measuring.offloaded, case, optim, 0.1, Path(folder))
    device, host = map(max, zip(*found))
    return {
        "predicted": told["total"],
        "found": device,
        "predicted_host": told["host"],
        "host": host,
    }


def anonymous(place: str, steps: int) -> dict:
    """Most anonymous memory of this process while train.py runs, in bytes, and that of the
    state."""
    most, over = [0], threading.Event()

    def look() -> None:
        while not over.is_set():
            kib = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
            most[0] = max(most[0], 1024 * int(kib[1]))
            time.sleep(0.005)

    threading.Thread(target=look, daemon=True).start()
    protocol.train_run(
        steps=steps,
        optim="adamw",
        precision="fp32",
        n_layer=8,
        n_embd=512,
        block_size=64,
        batch_size=4,
        eval_every=0,
        async_save=False,
        offload="none" if place == "kept" else place,
    )
    over.set()
    held = gpt_shapes(8, 512, 256)
    return {"found": most[0], "predicted_state": bytes_per_rank(held)["state"]}


# ---- findings ------------------------------------------------------------------------------------
def digits(row: dict) -> str:
    """The estimate in GB, with as many digits as the claimed figure has."""
    claimed = SOURCES[row["case"]][0]
    digits = 1 if claimed is None else len(str(claimed).partition(".")[2])
    return f"{row['predicted'] / 1e9:.{digits}f}"


def gaps(rows: list[dict], part: str, figure: str = "") -> dict[str, float]:
    """{case: measured / predicted - 1}."""
    told, found = ("predicted_" + figure, figure) if figure else ("predicted", "found")
    return {
        f"{r['case']} {r['optim']} {r['width']}": r[found] / r[told] - 1
        for r in pick(rows, part=part)
        if r[told]
    }


def moved(rows: list[dict]) -> tuple[float, float]:
    """Bytes that left the process's anonymous memory with the state in files, and those of the
    state."""
    kept, disk = (pick(rows, part="process", case=case)[0] for case in ("kept", "disk"))
    return kept["found"] - disk["found"], kept["predicted_state"]


def parts(rows: list[dict]) -> dict[str, bool]:
    claimed = [r for r in pick(rows, part="sources") if SOURCES[r["case"]][0] is not None]
    same = sum(digits(r) == str(SOURCES[r["case"]][0]) for r in claimed)
    found = {
        f"{same} of the sources' {len(claimed)} figures come out to the last digit": (
            same == len(claimed)
        )
    }
    for name, part, figure in (
        ("measured peaks lie", "measured", ""),
        ("with offloading, the device's lie", "offloaded", ""),
        ("and the host's", "offloaded", "host"),
    ):
        off = max(gaps(rows, part, figure).values(), key=abs)
        found[f"{name} within {abs(off):.1%} of the predicted (claimed: 5 %)"] = abs(off) <= CLOSE
    gone, state = moved(rows)
    found[
        f"state in files leaves the process lighter by {gone / 2**20:.0f} MiB of its"
        f" {state / 2**20:.0f} (claimed: within 15 %)"
    ] = abs(gone / state - 1) <= 0.15
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    found = parts(rows)
    word, _, why = judged(found)
    return word, "; ".join([*found][:2]), why


def table(rows: list[dict]) -> str:
    kib = lambda x: f"{x / 1024:,.0f}"  # noqa: E731
    sources = [
        [r["case"], SOURCES[r["case"]][0] or "-", digits(r)] for r in pick(rows, part="sources")
    ]
    names = ("parameters", "gradients", "state")
    measured = [
        [
            r["case"],
            r["optim"],
            r["width"],
            *(f"{kib(r[k])} ({kib(r['predicted_' + k])})" for k in names),
            kib(r["found"]),
            kib(r["predicted"]),
            f"{r['found'] / r['predicted'] - 1:+.1%}",
        ]
        for r in pick(rows, part="measured")
    ]
    places = [
        [
            r["case"],
            r["optim"],
            kib(r["found"]),
            kib(r["predicted"]),
            kib(r["host"]),
            kib(r["predicted_host"]),
        ]
        for r in pick(rows, part="offloaded")
    ]
    return "\n\n".join(
        [
            "\n".join(
                f"- {text}: {'yes' if held else '**no**'}" for text, held in parts(rows).items()
            ),
            markdown(["GB of one rank", "claimed", "estimated"], sources),
            (
                "A dash: no lesson says so; it is their case by the 16 bytes and 34 s b h of the"
                " primary sources."
            ),
            markdown(
                [
                    "layout, 4 ranks",
                    "optimizer",
                    "width",
                    *(f"{k} (predicted)" for k in names),
                    "peak, KiB",
                    "predicted",
                    "gap",
                ],
                measured,
            ),
            "Gradients are those at the step; with zero1 most of them are gone by then.",
            markdown(
                [
                    "layout, 3 ranks, in files",
                    "optimizer",
                    "device, KiB",
                    "predicted",
                    "host",
                    "predicted",
                ],
                places,
            ),
            markdown(
                ["one process, state", "anonymous memory, MiB"],
                [[r["case"], f"{r['found'] / 2**20:.0f}"] for r in pick(rows, part="process")],
            ),
        ]
    )


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(12, 5)
    left, right = figure.subplots(1, 2)
    top = max(r["width"] for r in pick(rows, part="measured"))
    shown = pick(rows, part="measured", width=top)
    bottom = [0.0] * len(shown)
    names = [f"{r['case']}\n{r['optim']}" for r in shown]
    for k, color in zip(("parameters", "gradients", "state"), INK):
        heights = [r["predicted_" + k] / 2**20 for r in shown]
        left.bar(names, heights, 0.7, bottom, color=color, alpha=0.75, label=k)
        bottom = [a + b for a, b in zip(bottom, heights)]
    rest = [r["predicted"] / 2**20 - b for r, b in zip(shown, bottom)]
    left.bar(names, rest, 0.7, bottom, color=INK[5], alpha=0.4, label="held for a while")
    left.plot(
        names,
        [r["found"] / 2**20 for r in shown],
        "_",
        ms=26,
        mew=3,
        color="black",
        label="measured peak",
    )
    left.set(
        ylabel="MiB on the fullest of 4 ranks",
        title=f"8 layers of width {top}: predicted and measured",
    )
    left.tick_params(axis="x", labelsize=7)
    left.legend(frameon=False)
    claimed = [r for r in pick(rows, part="sources") if SOURCES[r["case"]][0] is not None]
    right.barh(
        [r["case"] for r in claimed],
        [r["predicted"] / 1e9 for r in claimed],
        0.6,
        color=INK[0],
        alpha=0.75,
        label="estimated",
    )
    right.plot(
        [SOURCES[r["case"]][0] for r in claimed],
        range(len(claimed)),
        "|",
        ms=20,
        mew=3,
        color="black",
        label="claimed",
    )
    for y, r in enumerate(claimed):
        right.text(r["predicted"] / 1e9 + 2, y, digits(r), va="center")
    right.set(xlabel="GB of one rank", title="The sources' figures", xlim=(0, 140))
    right.invert_yaxis()
    right.legend(frameon=False, loc="lower right")


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
