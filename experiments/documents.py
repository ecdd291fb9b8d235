"""Claim: rows that begin where documents begin, and a mask that hides other documents, end lower on
documents that a model meets alone; the mask by itself changes next to nothing, at no cost in time.

Source: none of the lessons. nanochat's log (dev/LOG.md, 2026-01-13): in rows packed by best fit a
mask takes 0.0002 off 0.8543 bits a byte, at equal speed, so it is not kept; the rows are, though
they cut 35 % of the tokens, for which it sees no harm downstream. Llama 3 (2024, 2407.21783, 3.2):
the mask matters little in usual pre-training, much on very long sequences. Ding et al. (2024,
2404.10830): best fit without cuts, 4.7 % better in reading comprehension, 9.2 % in programs.

Protocol: documents are the functions and methods of Python's standard library, each one a text of
its own (a whole class has six rows' length, on average); equal ones count once. Modules are held
out as a whole, 7 % of them. Both sides are in the order of the texts' sha256, so neighbours are
strangers. Of Python 3.11 these are 12,883 documents to train on and 724 held out, 6.7 MB; the
median has 247 bytes, a tenth 1,133 or more. Tokens are bytes, the byte 0 between two. 2 layers of
width 128, rows of 512, 8 of them a step, 800 steps, bf16, Muon, all else as train.py has it, 5
seeds; the four arms see equally many tokens in equally many steps, and none reads one twice. The
learning rate is the best of 3 for `neither`, one seed; half and twice as much are tried for `both`,
too. Two measures, neither of them packed:
`flat`: train.py's own validation, rows of 512 wherever they begin, masked as in training.
`alone`: each held-out document in a row of its own from its first byte on, up to 512 of them, as a
prompt is met. Without another document a mask changes nothing here, so all arms are measured alike.
By distance from the start, too: the first 32 bytes, and those from 129 on. Bits of the end (the
byte 0 behind a document) are counted apart. A row of `alone` begins with the byte 0, as documents
do in training; prompts often lack it, so `bare` leaves it away, and counts from the second byte on.
Times: CPU seconds of 10 steps of each arm in turn, 6 rounds (by the clock, as first planned, they
were 0.7 to 1.5 of neither's: the machine was not quiet). "Clearly" is a mean x sqrt(n) of 3.1
standard deviations or more, seed by seed; "within 0.5 %" is the 90 % interval of the mean.

Expected: (the plan of the rows was known: packing cuts 43 % of the tokens, 42 of them ends of
documents above 512; in flat rows 36 % of the tokens have the beginning of their document in the
row, in packed ones all.) The mask alone earns 2 % in the first 32 bytes, which in flat rows nearly
always follow a stranger, nothing later, so 0.5 % on documents alone; flat rows within 0.5 %, a
little above, as a stranger's style is of some use. Pack alone: -1 % on documents alone, at all
distances, because it trains on beginnings, and +1 % in flat rows, which are mostly of what it has
never seen. Both: -1.5 % alone, lowest of all; in packed rows the mask earns 0.5 %, more than
nanochat's 0.02 %, because our rows are short. The end of a document costs 5 % less with packing. A
masked step takes 1.05 times as long. (12 steps of one seed had been seen when this was written, and
the rates for `neither`. `bare` was added when `neither` and `mask` had run: the mask earned 6 to
10 % in the first 32 bytes, perhaps only where a row begins with a byte 0. Expected of it: the mask
earns nothing, and the packed arms, whose rows never begin otherwise, lose 1 %. All was run again.
Then packing was seen to put the longer of two documents in front, where the end cost `pack` 20 %
more; since either may be, the packed arms were run once more.)

    python -m experiments.documents [--quick] [--out=DIR] [--jobs=N]
"""

import ast
import json
import math
import os
import sys
import sysconfig
import tempfile
import textwrap
import time
from hashlib import sha256
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from data import corpora
from data.dataset import Dataset
from data.packing import Packed
from experiments import protocol
from experiments.findings import (
    INK,
    clear,
    judged,
    line,
    listed,
    markdown,
    mean_sd,
    paired,
    pick,
    plus_minus,
)
from experiments.significance import judge, t_quantile
from layers import document_mask
from sample import load

ARMS = {
    "neither": {},
    "mask": dict(document_mask=True),
    "pack": dict(pack="best_fit"),
    "both": dict(document_mask=True, pack="best_fit"),
}
LRS, SEEDS = (2.0**-6, 2.0**-5, 2.0**-4), (1, 2, 3, 4, 5)
LR = LRS[1]
BLOCK, BATCH, D = 512, 8, 0  # D: the byte with which a document begins
NEAR = 0.005
HELD_OUT = 18  # of 256 modules
SKIP = {"test", "tests", "idlelib", "pydoc_data", "turtledemo", "site-packages", "dist-packages"}
EDGES = (0, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # bytes from the start of a document


def grid(seeds: tuple, lrs: tuple) -> list[dict]:
    main = [dict(part="main", arm=arm, lr=LR, seed=seed) for seed in seeds for arm in ARMS]
    others = [lr for lr in lrs if lr != LR]
    tune = [dict(part="tune", arm=a, lr=lr, seed=1) for a in ("neither", "both") for lr in others]
    return [*tune, *main, dict(part="time", arm="all", lr=LR, seed=1)]


GRID, QUICK = grid(SEEDS, LRS), grid(SEEDS[:1], LRS[1:])


# ---- documents -----------------------------------------------------------------------------------
def modules(root: str) -> list[str]:
    """The files of the standard library, paths below its folder."""
    names = [f"{module}.py" for module in sys.stdlib_module_names]
    for module in sys.stdlib_module_names - SKIP:
        for folder, inner, files in os.walk(os.path.join(root, module)):
            inner[:] = set(inner) - SKIP
            above = os.path.relpath(folder, root).replace(os.sep, "/")
            names += [f"{above}/{file}" for file in files if file.endswith(".py")]
    return sorted(name for name in names if os.path.isfile(os.path.join(root, name)))


def functions(source: str) -> list[str]:
    """The functions of a module, and the methods of its classes, with decorators, from column 0."""
    lines = source.split("\n")
    bodies = [ast.parse(source).body]
    bodies += [node.body for node in bodies[0] if isinstance(node, ast.ClassDef)]
    found = []
    for node in [node for body in bodies for node in body]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min(part.lineno for part in (node, *node.decorator_list))
            text = "\n".join(lines[first - 1 : node.end_lineno])
            found.append(textwrap.dedent(text) + "\n")
    return found


def write(folder: Path, most: int | None = None) -> tuple[str, list[bytes]]:
    """Writes train.jsonl and val.jsonl; (what --data= takes, the held-out documents).

    most: so many modules alone.
    """
    root = sysconfig.get_path("stdlib")
    sides = {"val": {}, "train": {}}
    for name in modules(root)[:most]:
        is_held_out = sha256(name.encode()).digest()[0] < HELD_OUT
        found = functions(Path(root, name).read_text(encoding="utf-8"))
        sides["val" if is_held_out else "train"] |= dict.fromkeys(found)
    # A text of both sides would be one that the model knows by heart.
    sides["train"] = {text: None for text in sides["train"] if text not in sides["val"]}
    for side, texts in sides.items():
        texts = sorted(texts, key=lambda text: sha256(text.encode()).digest())
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
        sides[side] = texts
    data = f"{folder / 'train.jsonl'},{folder / 'val.jsonl'}"
    return data, [text.encode() for text in sides["val"]]


# ---- rows ----------------------------------------------------------------------------------------
def row(keys: dict, quick: bool) -> dict:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data, held_out = write(Path(folder), 60 if quick else None)
        fields = dict(data=data, data_dir=folder, lr=keys["lr"], seed=keys["seed"])
        if keys["part"] == "time":
            return times(fields, 2 if quick else 6)
        steps = 12 if quick else 800
        run = f"{folder}/run"
        rows = train(steps, keys["arm"], eval_every=steps, out_dir=run, **fields)
        figures = alone(load(run)[0], held_out[: 64 if quick else None])
        figures |= {name: protocol.curve(rows, name)[-1] for name in ("val_bpb", "val_loss")}
        figures |= {"loss": protocol.tail(rows)}
        return figures | seen(keys["arm"], steps, data, folder, keys["seed"])


def train(steps: int, arm: str, **fields) -> list[dict]:
    return protocol.train_run(
        steps=steps,
        n_layer=2,
        n_embd=128,
        block_size=BLOCK,
        batch_size=BATCH,
        precision="bf16",
        eval_tokens=131072,
        plot=False,
        **ARMS[arm],
        **fields,
    )


def alone(model: torch.nn.Module, documents: list[bytes]) -> dict:
    """Bits a byte of documents, each alone in a row, up to BLOCK bytes of it.

    `ends`: bits of the byte behind a document, where it is in the row. `bare`: without the byte in
    front, by which a row says that a document begins, so from the second byte on.
    """
    bits, ends = by_place(model, documents, 1)
    bare, _ = by_place(model, documents, 0)

    def mean(first: int, last: int, of: torch.Tensor = bits) -> float:
        total, n = of[first:last].sum(0)
        return (total / n).item()

    return {
        "alone": mean(0, BLOCK),
        "first": mean(0, 32),
        "later": mean(128, BLOCK),
        "bare": mean(1, BLOCK, bare),
        "bare_first": mean(1, 32, bare),
        "ends": mean_sd(ends)[0],
        "by_distance": [float(f"{mean(a, b):.5g}") for a, b in zip(EDGES, EDGES[1:])],
    }


@torch.no_grad()
def by_place(
    model: torch.nn.Module, documents: list[bytes], lead: int
) -> tuple[torch.Tensor, list[float]]:
    """(BLOCK + 1, 2) bits of each byte of a document and how many documents have it; bits of the
    ends that are in a row. lead: how many bytes D are in front, 0 or 1."""
    sums = torch.zeros(BLOCK + 1, 2, dtype=torch.float64)
    ends = []
    documents = sorted(documents, key=len)
    for start in range(0, len(documents), 32):
        some = documents[start : start + 32]
        width = min(lead + len(some[-1]) + 1, BLOCK + 1)
        # Causal: whatever stands behind a document changes nothing before it.
        tokens = torch.full((len(some), width), D)
        for sequence, text in zip(tokens, some):
            text = torch.frombuffer(bytearray(text[: width - lead]), dtype=torch.uint8)
            sequence[lead : lead + len(text)] = text
        lengths = torch.tensor([len(text) for text in some]).unsqueeze(1)
        logits = model(tokens[:, :-1])  # (B, width - 1, V)
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        bits = nats.view_as(tokens[:, 1:]).double() / math.log(2)
        places = torch.arange(1, width) - lead  # of the targets, in their documents
        is_text = places < lengths  # (B, width - 1)
        sums[places] += torch.stack([(bits * is_text).sum(0), is_text.sum(0)], 1)
        ends += bits[places == lengths].tolist()
    return sums, ends


def seen(arm: str, steps: int, data: str, folder: str, seed: int) -> dict:
    """What an arm trains on: epochs; shares of the tokens that are cut; of documents, and bytes of
    rows, that have their document's beginning in the row."""
    tokens = corpora.load(data, "bytes", folder).train
    cut = rests = 0.0
    if "pack" in ARMS[arm]:
        rows = Packed(tokens, BLOCK, seed, 256, token=D)
        rests = rows.rests / rows.n_tokens
        cut = rests + (rows.filling + rows.left) / rows.n_tokens
    else:
        rows = Dataset(tokens, BLOCK, seed, 256)
    some = rows(range(min(2000, rows.per_epoch)))[:, :-1]
    starts = document_mask.starts(some, D)
    return {
        "epochs": steps * BATCH / rows.per_epoch,
        "cut": cut,
        "rests": rests,
        "whole": (some.gather(1, starts) == D).double().mean().item(),
        "a_row": (some == D).sum(1).double().mean().item(),
    }


def times(fields: dict, rounds: int) -> dict:
    """CPU milliseconds of a step, round by round: a list for each arm."""
    # What train.py's clock tells, in this process alone: others on the machine do not count.
    time.perf_counter = time.process_time
    found = {arm: [] for arm in ARMS}
    for i in range(rounds):
        for arm in [*ARMS][:: 1 - i % 2 * 2]:
            rows = train(13, arm, eval_every=0, **fields)
            found[arm].append(1000 * median(protocol.curve(rows, "step_s")[3:]))
    return {"step_ms": [[round(ms, 2) for ms in each] for each in found.values()]}


# ---- what they say -------------------------------------------------------------------------------
def of(rows: list[dict], arm: str) -> list[dict]:
    return pick(rows, part="main", arm=arm)


def gaps(rows: list[dict], arm: str, figure: str, base: str = "neither") -> list[float]:
    return paired(of(rows, arm), of(rows, base), figure)


def near(differences: list[float]) -> bool:
    """Is the mean within NEAR of 0, by its 90 % interval? One value says nothing."""
    mean, sd = mean_sd(differences)
    n = len(differences)
    return n > 1 and abs(mean) + t_quantile(n - 1, 0.1) * sd / math.sqrt(n) <= NEAR


def ratios(rows: list[dict], arm: str) -> list[float]:
    """An arm's step time over that of `neither`, round by round."""
    [timed] = pick(rows, part="time")
    found = dict(zip(ARMS, timed["step_ms"]))
    return [ms / base for ms, base in zip(found[arm], found["neither"])]


def parts(rows: list[dict]) -> dict[str, bool]:
    """What is claimed, in figures: does it hold?"""
    found = {}
    for arm in ("both", "pack"):
        gap = gaps(rows, arm, "alone")
        found[
            f"documents alone: {arm} ends {plus_minus(gap, '+.2%')} from neither (clearly below)"
        ] = clear([-x for x in gap])
    in_packed = gaps(rows, "both", "alone", "pack")
    found[
        f"documents alone, packed rows: the mask moves the loss by {plus_minus(in_packed, '+.2%')}"
        " (within 0.5 %)"
    ] = near(in_packed)
    for name, figure in (("documents alone", "alone"), ("flat rows", "val_bpb")):
        gap = gaps(rows, "mask", figure)
        found[
            f"{name}: the mask without packing moves the loss by {plus_minus(gap, '+.2%')}"
            " (within 0.5 %)"
        ] = near(gap)
    gap = gaps(rows, "pack", "val_bpb")
    found[
        f"flat rows: what packing cuts is not missed, it ends {plus_minus(gap, '+.2%')} from"
        " neither (within 0.5 % or below)"
    ] = near(gap) or clear([-x for x in gap])
    for arm in ("mask", "both"):
        found[
            f"a step of {arm} takes {median(ratios(rows, arm)):.2f} times as long (1.1 or less)"
        ] = median(ratios(rows, arm)) <= 1.1
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    return judged(parts(rows))


def table(rows: list[dict]) -> str:
    return "\n\n".join(
        [
            "\n".join(listed(parts(rows))),
            "Bits a byte; the end is in bits:",
            table_of_losses(rows),
            "The same against neither, seed by seed:",
            table_of_gaps(rows),
            "On documents alone (p is corrected for 6 comparisons by Holm's rule):",
            "\n".join(f"- {one['text']}, in bits a byte" for one in pairs(rows)),
            "What a run trains on, and its time:",
            table_of_rows(rows),
            "Learning rates, seed 1, bits a byte:",
            table_of_rates(rows),
        ]
    )


MEASURES = {
    "alone": "documents alone",
    "first": "their first 32 bytes",
    "later": "from byte 129 on",
    "bare": "without the byte 0 in front",
    "bare_first": "their first 32 bytes so",
    "ends": "the end",
    "val_bpb": "flat rows",
}


def table_of_losses(rows: list[dict]) -> str:
    lines = [
        [arm, *(plus_minus([r[name] for r in of(rows, arm)]) for name in MEASURES)] for arm in ARMS
    ]
    return markdown(["", *MEASURES.values()], lines)


def table_of_gaps(rows: list[dict]) -> str:
    lines = [
        [arm, *(plus_minus(gaps(rows, arm, name), "+.2%") for name in MEASURES)]
        for arm in [*ARMS][1:]
    ]
    lines.append(
        [
            "both, against pack",
            *(plus_minus(gaps(rows, "both", name, "pack"), "+.2%") for name in MEASURES),
        ]
    )
    return markdown(["", *MEASURES.values()], lines)


def pairs(rows: list[dict]) -> list[dict]:
    """significance.py's verdict on each pair of arms, on documents alone."""
    losses = {arm: {r["seed"]: r["alone"] for r in of(rows, arm)} for arm in ARMS}
    another = 2 * mean_sd([r["seconds"] for r in of(rows, "both")])[0] / 60
    return judge(losses, margin=NEAR, minutes=another)


def table_of_rows(rows: list[dict]) -> str:
    lines = []
    for arm in ARMS:
        mine = of(rows, arm)
        numbers = [
            f"{mean_sd([r[name] for r in mine])[0]:{form}}"
            for name, form in (
                ("a_row", ".2f"),
                ("whole", ".0%"),
                ("cut", ".1%"),
                ("rests", ".1%"),
                ("epochs", ".2f"),
            )
        ]
        found = ratios(rows, arm)
        spread = f" ({min(found):.2f} to {max(found):.2f})" if arm != "neither" else ""
        lines.append([arm, *numbers, f"{median(found):.2f}{spread}"])
    head = [
        "",
        "documents that begin in a row",
        "tokens whose document begins in their row",
        "tokens cut",
        "of them ends of documents above 512",
        "epochs",
        "CPU time of a step",
    ]
    return markdown(head, lines)


def table_of_rates(rows: list[dict]) -> str:
    lines = []
    for arm in ("neither", "both"):
        tried = {r["lr"]: r for r in rows if r["arm"] == arm and r["seed"] == 1}
        for figure in ("val_bpb", "alone"):
            losses = [f"{tried[lr][figure]:.4f}" if lr in tried else "" for lr in LRS]
            lines.append([arm, MEASURES[figure], *losses])
    return markdown(["", "", *(f"lr 2^{math.log2(lr):.0f}" for lr in LRS)], lines)


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(12, 4.8)
    ends, distance = figure.subplots(1, 2, width_ratios=(1, 1.1))
    others = [*ARMS][1:]
    names = ("alone", "bare", "val_bpb")
    shown = [(name, arm) for name in names for arm in others]
    for y, (name, arm) in enumerate(shown):
        found = [100 * x for x in gaps(rows, arm, name)]
        mean, sd = mean_sd(found)
        color = INK[others.index(arm)]
        ends.plot(found, [y] * len(found), "o", ms=5, color=color, alpha=0.35, mew=0)
        error = None if math.isnan(sd) else sd
        ends.errorbar(mean, y, xerr=error, fmt="|", ms=14, mew=2, capsize=4, color=color)
    ends.set_yticks(range(len(shown)), [f"{MEASURES[name]}: {arm}" for name, arm in shown])
    ends.set_ylim(len(shown) - 0.5, -0.5)
    for i in range(1, len(names)):
        ends.axhline(i * len(others) - 0.5, color="black", lw=0.5, ls=":")
    ends.axvline(0, color="black", lw=0.8)
    ends.grid(alpha=0.25, axis="x")
    ends.set(xlabel="bits a byte against neither, %, seed by seed", title="Left of 0 is better")
    base = {r["seed"]: r["by_distance"] for r in of(rows, "neither")}
    middles = [math.sqrt(max(a, 1) * b) for a, b in zip(EDGES, EDGES[1:])]
    for arm, color in zip(others, INK):
        points = {
            x: [r["by_distance"][i] - base[r["seed"]][i] for r in of(rows, arm)]
            for i, x in enumerate(middles)
        }
        line(distance, points, arm, color=color, marker="o", ms=4)
    distance.axhline(0, color="black", lw=0.8)
    distance.set_xscale("log", base=2)
    distance.set_xticks(EDGES[1:], [str(edge) for edge in EDGES[1:]])
    distance.set(
        xlabel="bytes from the document's start",
        ylabel="bits a byte, less those of neither",
        title="Documents alone: below 0 is better",
    )
    distance.legend(frameon=False)


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
