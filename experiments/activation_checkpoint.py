"""Claim: recomputing activations in backward takes their memory from O(L) to O(sqrt L) in the
number of layers L, for 30 to 40 % more time; recomputing attention alone, or products not at all,
lies in between.

Source: the second lesson ("memory O(n) to O(sqrt n), 30-40 % slower"), the fourth (per block, every
k-th block, attention alone, "O(sqrt L)"); Chen et al. 2016, 1604.06174; Korthikanti et al. 2022,
2205.05198.

Protocol: `step`: forward and backward of a GPT of 8 layers of width 256 on 4 x 256 tokens in fp32,
with each way of memory/activation_checkpoint.py, in turn with the same model that keeps all; the
time is the median ratio of 7 pairs. `depth`: width 32, one sequence of 64 tokens, 4 to 256 layers.
Bytes: the most that are alive in a step beside weights and their gradients, in units of one (B, T,
C) tensor, every storage counted from the operation that makes it until it is freed. (What is
offloaded counts too: on a CPU it stays where it is.)

Expected: `full` 20 to 35 % slower, since the last product of a block is not repeated. For one layer
that keeps k = 19 tensors: `full` needs L + k, which grows with L; K segments of layers K + k L/K,
least at K = sqrt(k L), where it is 2 sqrt(k L). So from 64 to 256 layers memory grows by 4 if all
is kept, by about 3.3 if blocks are recomputed, and by 2 with sqrt(k L) segments alone: O(sqrt L) is
right for segments, not for blocks.

    python -m experiments.activation_checkpoint [--quick] [--out=DIR] [--jobs=N]
"""

import math
import time
import weakref
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from experiments import protocol
from experiments.findings import INK, groups, judged, markdown, pick
from memory.activation_checkpoint import apply_activation_checkpointing
from model import GPT, GPTConfig, initial_weight

KEPT = 19  # (B, T, C) tensors that a layer of model.py's modern keeps in fp32
HOWS = (
    "none",
    "full",
    "every_2",
    "every_4",
    "segments_2",
    "segments_4",
    "attention",
    "mlp",
    "selective",
    "full_offload",
    "offload",
)
DEPTHS, WAYS = (4, 16, 64, 256), ("none", "full", "sqrt(L) segments", "sqrt(kL) segments")


def grid(
    hows: tuple[str, ...], ways: tuple[str, ...], depths: tuple[int, ...], seeds: tuple[int, ...]
) -> list[dict]:
    cases = [("step", how, 8, seed) for how in hows for seed in seeds]
    cases += [("depth", way, depth, seeds[0]) for way in ways for depth in depths]
    return [dict(zip(("part", "how", "layers", "seed"), case)) for case in cases]


GRID = grid(HOWS, WAYS, DEPTHS, (1, 2, 3))
QUICK = grid(("none", "full", "attention", "selective"), WAYS, (4, 16), (1,))


# ---- rows ----------------------------------------------------------------------------------------
class Alive(TorchDispatchMode):
    """now, peak: bytes of the storages made since it began that are alive, at most after any
    operation."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, {}

    def gone(self, address: int, size: int) -> None:
        self.now -= size
        self.seen.pop(address, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage()._cdata
            for x in tree_iter((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for x in tree_iter(out):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if (
                storage is not None
                and storage._cdata not in self.seen
                and storage._cdata not in given
            ):
                address, size = storage._cdata, storage.nbytes()
                self.now += size
                self.seen[address] = weakref.ref(
                    storage, lambda _, a=address, n=size: self.gone(a, n)
                )
        self.peak = max(self.peak, self.now)
        return out


def ways(how: str, layers: int) -> str:
    """`sqrt(kL) segments` -> segments_9; others are names of apply_activation_checkpointing."""
    if not how.endswith("segments"):
        return how
    return f"segments_{min(layers, round(math.sqrt((KEPT if 'k' in how else 1) * layers)))}"


def model_of(how: str, layers: int, width: int, length: int, seed: int) -> GPT:
    shape = GPTConfig(n_layer=layers, n_embd=width, block_size=length, zero_init=False, seed=seed)
    model = GPT(shape)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_weight(shape, name, tuple(p.shape)))
            p.grad = torch.zeros_like(p)  # there before, so that none is counted
    apply_activation_checkpointing(model, how)
    return model


def step(model: GPT, ids: torch.Tensor) -> float:
    """Seconds of a forward and a backward."""
    began = time.perf_counter()
    model(ids[:, :-1], ids[:, 1:]).backward()
    return time.perf_counter() - began


def row(keys: dict, quick: bool) -> dict:
    small = quick or keys["part"] == "depth"
    batch, width, length = (1, 32, 64) if small else (4, 256, 256)
    if small:
        torch.set_num_threads(1)  # with so little to do two wait for each other
    how = ways(keys["how"], keys["layers"])
    model = model_of(how, keys["layers"], width, length, keys["seed"])
    ids = torch.randint(
        256, (batch, length + 1), generator=torch.Generator().manual_seed(keys["seed"])
    )
    step(model, ids)
    with Alive() as alive:
        step(model, ids)
    found = {
        "run_as": how,
        "tensors": alive.peak / (4 * batch * length * width),
        "peak": alive.peak,
    }
    if keys["part"] == "depth":
        return found
    other = model_of("none", keys["layers"], width, length, keys["seed"])
    gap = max(
        float((p.grad - q.grad).abs().max())
        for p, q in zip(model.parameters(), gradients_of(other, ids))
    )
    pairs = [(step(model, ids), step(other, ids)) for _ in range(3 if quick else 8)][1:]
    return found | {
        "ratio": median(a / b for a, b in pairs),
        "ms": 1000 * median(a for a, _ in pairs),
        "gradient_gap": gap,
    }


def gradients_of(model: GPT, ids: torch.Tensor):
    """The model's parameters after as many steps as the one it is compared with."""
    for _ in range(2):
        step(model, ids)
    return model.parameters()


# ---- findings ------------------------------------------------------------------------------------
def mean(rows: list[dict], how: str, figure: str) -> float:
    found = [r[figure] for r in pick(rows, part="step", how=how)]
    return sum(found) / len(found)


def growth(rows: list[dict], way: str) -> float:
    """The exponent of memory in the number of layers, between the two deepest models."""
    a, b = pick(rows, part="depth", how=way)[-2:]
    return math.log(b["tensors"] / a["tensors"]) / math.log(b["layers"] / a["layers"])


def parts(rows: list[dict]) -> dict[str, bool]:
    slower, kept = mean(rows, "full", "ratio") - 1, mean(rows, "none", "tensors")
    size = {how: mean(rows, how, "tensors") / kept for how in ("full", "attention", "selective")}
    grow = {way: growth(rows, way) for way in WAYS}
    same = max(r["gradient_gap"] for r in pick(rows, part="step"))
    return {
        (
            f"memory of sqrt(kL) segments grows as L^{grow['sqrt(kL) segments']:.2f}"
            " (claimed: 0.5 within 0.1)"
        ): (abs(grow["sqrt(kL) segments"] - 0.5) <= 0.1),
        (
            f"memory of recomputed blocks grows as L^{grow['full']:.2f}"
            " (the lessons' 0.5 within 0.1)"
        ): (abs(grow["full"] - 0.5) <= 0.1),
        f"without recomputation as L^{grow['none']:.2f} (1 within 0.1)": (
            abs(grow["none"] - 1) <= 0.1
        ),
        f"recomputing all is {slower:.0%} slower (30 to 40 %)": 0.295 <= slower <= 0.405,
        (
            f"all recomputed {size['full']:.0%} of the memory, but products"
            f" {size['selective']:.0%}, attention alone {size['attention']:.0%}"
            " (in this order, below 100 %)"
        ): (size["full"] < size["selective"] <= size["attention"] < 1),
        f"gradients are the same, to {same:.0e} (0)": same == 0,
    }


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    found = parts(rows)
    word, _, why = judged(found)
    number = "; ".join(text.partition(" (")[0] for text in [*found][:2])
    return word, number, why


def table(rows: list[dict]) -> str:
    lines, steps = [], pick(rows, part="step")
    for (how,), mine in groups(steps, "how").items():
        lines.append(
            [
                how,
                f"{mine[0]['tensors']:.0f}",
                f"{mine[0]['peak'] / 2**20:.1f}",
                f"{mean(rows, how, 'tensors') / mean(rows, 'none', 'tensors'):.0%}",
                (
                    f"{mean(rows, how, 'ratio') - 1:+.0%}"
                    f" ({min(r['ratio'] for r in mine) - 1:+.0%}.."
                    f"{max(r['ratio'] for r in mine) - 1:+.0%})"
                ),
                f"{mean(rows, how, 'ms'):.0f}",
            ]
        )
    deep = [
        [way, *(f"{r['tensors']:.0f} ({r['run_as']})" for r in mine), f"{growth(rows, way):.2f}"]
        for (way,), mine in groups(pick(rows, part="depth"), "how").items()
    ]
    depths = [r["layers"] for r in pick(rows, part="depth", how="none")]
    return "\n\n".join(
        [
            "\n".join(
                f"- {text}: {'yes' if held else '**no**'}" for text, held in parts(rows).items()
            ),
            markdown(
                [
                    f"{steps[0]['layers']} layers",
                    "(B, T, C) tensors at the peak",
                    "MiB",
                    "of keeping all",
                    "time",
                    "ms a step",
                ],
                lines,
            ),
            markdown(
                ["tensors at the peak", *(f"{n} layers" for n in depths), "exponent at the end"],
                deep,
            ),
        ]
    )


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(12, 4.8)
    left, right = figure.subplots(1, 2)
    none = mean(rows, "none", "tensors")
    for how in (how for (how,) in groups(pick(rows, part="step"), "how")):
        x, y = 100 * mean(rows, how, "tensors") / none, 100 * (mean(rows, how, "ratio") - 1)
        left.plot(x, y, "o", color=INK[0], ms=7)
        below = -12 if how == "full" else 4  # its twin, full_offload, lies just above
        left.annotate(how, (x, y), xytext=(5, below), textcoords="offset points", fontsize=9)
    left.axhspan(30, 40, color=INK[2], alpha=0.15, lw=0)
    left.set(
        xlabel="memory of activations, % of keeping all",
        ylabel="slower by, % (green: the lessons)",
        title="What recomputation costs and saves",
    )
    left.margins(x=0.15)
    left.grid(alpha=0.25)
    for way, color in zip(WAYS, INK):
        mine = pick(rows, part="depth", how=way)
        right.plot(
            [r["layers"] for r in mine],
            [r["tensors"] for r in mine],
            "o-",
            color=color,
            label=f"{way}: L^{growth(rows, way):.2f} at the end",
        )
    depths = [r["layers"] for r in mine]
    right.plot(
        depths, [2 * math.sqrt(KEPT * n) for n in depths], ":", color=INK[5], label="2 sqrt(k L)"
    )
    right.plot(depths, [n + KEPT for n in depths], "--", color=INK[5], lw=1, label="L + k")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="layers L",
        ylabel="(B, T, C) tensors at the peak",
        title="How memory grows with depth",
    )
    right.set_xticks(depths, depths)
    right.minorticks_off()
    right.grid(alpha=0.25)
    right.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict, timed=True)
