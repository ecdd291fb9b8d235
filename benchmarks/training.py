"""Speed and memory of training: precisions, compilation and recomputation beside one another.

    python bench.py train [recipe.toml] [--only=NAME,...] [--rounds=3] [--quick] [--out=FILE.md]
                          [--field=...]

A NAME joins by "+" a precision and, where wanted, a mode of compile and an activation_checkpoint:
bf16, bf16+default, bf16+max-autotune+every_2; what it leaves out is off. --quick: a tiny model, a
few steps, no compiling. Other fields are train.py's, --steps being 12 unless given, and go to every
run, those of compile., fp8. and scaler. where they belong.

Each run is a process of its own. They take turns (A B C A B C), as other work and heat should meet
all alike. A run's figures are those of its median step, the first third of them left out, as they
compile and warm up; the table has medians over rounds. Ratio: of tokens/s to the first row that
ran, round by round, median (smallest..largest). MFU leaves recomputation out (metrics/flops.py).
Peak: what torch's allocator gave out, on a CPU the resident set, libraries included. micro:
sequences of one forward; on a GPU what fits, so that peaks say little, unless --micro_batch_size is
given. loss: of the last step, to see that rows agree.
"""

import os
import re
import tempfile
import time
import typing
from pathlib import Path
from statistics import median

import torch

from benchmarks import runs
from layers import compile
from memory import activation_checkpoint
from precision import amp
from settings import parse
from settings.fields import TYPES

NAMES = "fp32,bf16,bf16+default,fp8,bf16+full,bf16+selective,bf16+every_2"
ON_GPU = ",bf16+reduce-overhead,bf16+max-autotune,bf16+default+selective,fp8+default"  # as well
IF_QUICK = "fp32,bf16,fp8,bf16+full"
USUAL = (
    "--steps=12 --eval_every=0 --save_every=0 --sample_tokens=0 --log_every=1 --resume=never"
).split()
QUICK = "--steps=6 --n_layer=2 --n_head=2 --n_embd=64 --block_size=64 --batch_size=4".split()
CHOSEN = ("precision", "compile", "activation_checkpoint")
PRECISIONS, MODES = (typing.get_args(TYPES[name]) for name in CHOSEN[:2])
FLAGS = {"--only": ".+", "--rounds": "[1-9][0-9]*", "--out": ".+", "--quick": ""}


def chosen(name: str, n_layer: int) -> dict[str, str]:
    """bf16+full -> precision=bf16, compile=off, activation_checkpoint=full. Raises ValueError."""
    found = {}
    for word in name.split("+"):
        field = CHOSEN[0 if word in PRECISIONS else 1 if word in MODES else 2]
        if field in found:
            raise ValueError(
                f"--only={name} has two words for {field}: {found[field]}, {word}; take one"
            )
        found[field] = word
    if "precision" not in found:
        raise ValueError(
            f"--only={name} has no precision; type bf16+{name}, or another of {PRECISIONS}"
        )
    activation_checkpoint.parse(found.setdefault("activation_checkpoint", "none"), n_layer)
    return {"compile": "off", **found}


def arguments(words: list[str], choice: dict[str, str], quick: bool) -> list[str]:
    """train.py's command line, later wins: recipes, what is usual here, the user's fields, the
    choice."""
    # auto is no row of PRECISIONS. Like fp32 it takes no fp8. or scaler. fields.
    precision = amp.PRECISIONS.get(choice["precision"], amp.PRECISIONS["fp32"])
    on = {
        "--compile.": choice["compile"] != "off",
        "--fp8.": precision.fp8_blocks,
        "--scaler.": precision.loss_scaling,
    }
    words = [
        word for word in words if not word.startswith(tuple(space for space in on if not on[space]))
    ]
    recipes, fields = ([w for w in words if w.startswith("--") == field] for field in (False, True))
    return [*recipes, *USUAL, *QUICK * quick, *fields, *(f"--{k}={v}" for k, v in choice.items())]


def once(words: list[str]) -> dict:
    """One run's figures. Raises RuntimeError with the one line that says why it failed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        _, rows = runs.run(words, Path(folder, "run"))
        log = Path(folder, "run", "train.log").read_text(encoding="utf-8", errors="replace")
    last = [row for row in rows if "step_s" in row][-1]
    emulated = "FP8 is emulated" in log
    return runs.middle(rows) | dict(
        loss=last["loss"],
        peak_bytes=last["peak_bytes"],
        emulated=emulated,
        head=log.partition("\n")[0],
        micro=int(re.search(r"in micro-batches of (\d+)", log)[1]),
    )


def measure(
    commands: dict[str, list[str]], rounds: int, idle: dict[str, str]
) -> dict[str, list[dict]]:
    """{name: its runs}. Who is in `idle` (name: why) never runs; who fails joins them, and has no
    runs."""
    found = {name: [] for name in commands if name not in idle}
    for i in range(rounds):
        for name in [*found]:
            try:
                found[name].append(once(commands[name]))
                said = f"{found[name][-1]['tokens_per_s']:,.0f} tokens/s"
            except RuntimeError as error:
                del found[name]
                said = idle[name] = "failed: " + str(error).replace("|", "/")[:200]
            runs.tell(f"round {i + 1} of {rounds}: {name}: {said}")
    return found


def row(name: str, mine: list[dict], first: list[dict]) -> str:
    """A line of the table. first: the runs of the row it is compared with, in the same rounds."""
    ratios = [run["tokens_per_s"] / other["tokens_per_s"] for run, other in zip(mine, first)]
    cells = [
        name + " (emulated)" * mine[0]["emulated"],
        f"**{median(ratios):.2f}** ({min(ratios):.2f}..{max(ratios):.2f})",
    ]
    for key, unit, form in (
        ("tokens_per_s", 1, ",.0f"),
        ("step_s", 1e-3, ".1f"),
        ("mfu", 1, ".1%"),
        ("peak_bytes", 2**20, ",.0f"),
        ("micro", 1, ".0f"),
        ("loss", 1, ".4f"),
    ):
        values = [run[key] / unit for run in mine if run[key] is not None]
        cells.append(format(median(values), form) if values else "unknown")
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str]) -> int:
    """What `python bench.py train ...` does with the words after `train`: 0, 1 where a run
    failed."""
    own = [word for word in argv if word.partition("=")[0] in FLAGS]
    words, flags = [word for word in argv if word not in own], runs.flags(own, FLAGS, __doc__)
    quick = "--quick" in flags
    cfg = parse.parse(arguments(words, chosen("fp32", 1), quick))
    gpu = cfg.device.startswith("cuda") or cfg.device == "auto" and torch.cuda.is_available()
    names = flags.get("--only", IF_QUICK if quick else NAMES + ON_GPU * gpu).split(",")
    commands = {n: arguments(words, chosen(n, cfg.n_layer), quick) for n in names}
    for word in words:
        if word[2:].partition("=")[0] in (*CHOSEN, "out_dir", "resume", "log_every"):
            raise ValueError(
                f"{word} is the bench's own; what is compared is chosen by --only=NAME,..."
            )
        if not any(word in command for command in commands.values()):
            raise ValueError(f"{word} has nothing to do with {', '.join(names)}; leave it out")
    why = compile.lacking(torch.device("cuda" if gpu else "cpu"))
    load = getattr(os, "getloadavg", lambda: ["?"])()[0]
    idle = {
        n: f"skipped: {why}" for n in names if why and chosen(n, cfg.n_layer)["compile"] != "off"
    }
    found = measure(commands, int(flags.get("--rounds", 2 if quick else 3)), idle)
    first = next(iter(found.values()), [{"head": "nothing ran"}])
    said = [
        (
            f"`python bench.py {' '.join(['train', *argv])}`, {first[0]['head']}, {os.cpu_count()}"
            f" cores, load {str(load)[:4]} before, {time.strftime('%Y-%m-%d')}"
        ),
        "",
        "| | ratio | tokens/s | ms a step | MFU | peak MiB | micro | loss |",
        "|---" * 8 + "|",
        *(
            row(n, found[n], first) if n in found else f"| {n} | {idle[n]} | | | | | | |"
            for n in names
        ),
    ]
    runs.show(said, flags.get("--out"))
    return int(any(why.startswith("failed") for why in idle.values()))
