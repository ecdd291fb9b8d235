"""A training step beside another checkout's, and what each technique of it earns.

    python bench.py step [recipe.toml] [--beside=FOLDER] [--pairs=5] [--seeds=0] [--quick]
                         [--out=FILE.md] [--field=...]

FOLDER, `before` unless given, is a checkout of this project at another commit (git worktree add
--detach FOLDER COMMIT); the recipe is the default or the given one, fields are train.py's and go to
both, --steps being 30 unless given. A field that the other commit lacks ends the bench.

Whole runs. Processes take turns: the other checkout, this one with what `auto` chooses, this one
with --compile=off, this one with --compile=default; then in the opposite order. A figure is the
run's median step_s, its first third left out. Ratios are of the same turn: the other's seconds over
these, so they are also those of tokens/s. Compilation itself is in no step.

Techniques. One process, eager, forward and backward of one micro-batch: all techniques, and each
switched off in turn. The ratio is the seconds without it over those with all.

Losses. With --seeds=n, runs of seeds 1 to n in both checkouts, evaluated at the end.

--quick: one turn of six steps, which proves nothing.
"""

import contextlib
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from unittest import mock

import torch

from benchmarks import runs
from layers import attention, fewer_passes
from metrics.logger import read_metrics
from model import GPT, initial_weight
from parallel.autocast_linear import keep_no_copies
from precision import amp
from run import auto, build, optimizers
from settings import parse

FLAGS = {"--beside": ".+", "--pairs": "[1-9][0-9]*", "--seeds": "[0-9]+", "--quick": ""}
FLAGS |= {"--out": ".+"}
USUAL = ["--eval_every=0", "--save_every=0", "--sample_tokens=0", "--plot=false", "--resume=never"]
KINDS = {
    "another checkout": None,
    "this one, as `auto` chooses": [],
    "this one, --compile=off": ["--compile=off"],
    "this one, --compile=default": ["--compile=default"],
}


# ---- whole runs ----------------------------------------------------------------------------------
def run(root: Path, words: list[str]) -> list[dict]:
    """The rows of metrics.jsonl of a run of root's train.py. Raises RuntimeError."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "train.py", *words, f"--out_dir={folder}/run"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, errors="replace")
        path = Path(folder, "run", "metrics.jsonl")
        if done.returncode or not path.exists():
            raise RuntimeError(f"{root}: {runs.reason(done.stderr)}")
        return read_metrics(path)


def whole_runs(beside: Path, words: list[str], pairs: int) -> list[str]:
    """The table of step times, turn by turn."""
    seconds = {kind: [] for kind in KINDS}
    for i in range(pairs):
        order = list(KINDS.items())
        for kind, more in order if i % 2 == 0 else reversed(order):
            root = beside if more is None else runs.ROOT
            rows = run(root, [*words, "--log_every=1", *(more or [])])
            seconds[kind].append(runs.middle(rows)["step_s"])
        runs.tell(f"turn {i + 1} of {pairs}: {[round(x[-1], 4) for x in seconds.values()]}")
    others = seconds["another checkout"]
    rows = []
    for kind, own in seconds.items():
        ratios = [other / x for other, x in zip(others, own)]
        rows.append(
            [kind, runs.spread([1000 * x for x in own], ".1f"), f"**{runs.spread(ratios)}**"]
        )
    return runs.table(["", "ms a step, median (min..max)", "its time / this"], rows)


# ---- techniques ----------------------------------------------------------------------------------
def off(*patches):
    """A context in which attributes have other values: (object, name, value)."""
    stack = contextlib.ExitStack()
    for owner, name, value in patches:
        stack.enter_context(mock.patch.object(owner, name, value))
    return stack


def techniques(words: list[str], rounds: int) -> list[str]:
    """The table of what each technique saves, or a line that says why there is none."""
    asked = parse.parse([*words, "--compile=off"])
    device = torch.device("cpu")
    cfg = auto.resolve_auto(asked, device, optimizers.find_optimizer(asked.optim), False)
    cfg = auto.with_vocabulary(cfg, 256)
    precision = amp.PRECISIONS[cfg.precision]
    model = GPT(build.model_config(cfg)).to(precision.weights)
    for name, p in model.named_parameters():
        weight = initial_weight(model.config, name, tuple(p.shape))
        # Where a run starts at zero: a step has as much to do, but no gradient of what is before.
        p.data.copy_(weight if weight.any() else 0.02 * torch.randn(p.shape))
    keep_no_copies(model)
    size = cfg.micro_batch_size or cfg.batch_size
    ids = torch.randint(cfg.vocab_size, (size, cfg.block_size))

    def step() -> float:
        began = time.perf_counter()
        with amp.autocast(cfg.precision, device):
            loss = model(ids, ids)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    blocks = [block.attn for block in model.blocks.values()]
    sdpa = [(attn, "attention_fn", attention.choose("sdpa", cfg.window)) for attn in blocks]
    by_autograd = (fewer_passes, "by_autograd", lambda x: True)
    without = {
        "all": [],
        "attention=plain (layers/attention.py)": sdpa if cfg.attention == "plain" else None,
        "plain attention in chunks": [(attention, "CHUNK", cfg.block_size)],
        "norms, QK-norm, relu² written out (layers/fewer_passes.py)": [by_autograd],
        "none of these": [*sdpa, by_autograd],
    }
    without = {name: patches for name, patches in without.items() if patches is not None}
    seconds = {name: [] for name in without}
    for i in range(rounds + 2):
        for name, patches in without.items():
            with off(*patches):
                took = step()
            if i > 1:  # the first ones warm up
                seconds[name].append(took)
    rows = []
    for name, own in seconds.items():
        ratios = [x / y for x, y in zip(own, seconds["all"])]
        label = name if name in ("all", "none of these") else f"without {name}"
        rows.append([label, runs.spread([1000 * x for x in own], ".1f"), runs.spread(ratios)])
    return runs.table(["", "ms forward and backward", "its time / all's"], rows)


# ---- losses --------------------------------------------------------------------------------------
def losses(beside: Path, words: list[str], n: int) -> list[str]:
    """The table of final held-out losses of n seeds in both checkouts."""
    steps = parse.parse(words).steps
    found = {"another checkout": [], "this one": []}
    for seed in range(1, n + 1):
        for name, root in zip(found, (beside, runs.ROOT)):
            rows = run(root, [*words, f"--seed={seed}", f"--eval_every={steps}"])
            found[name].append([row["val_loss"] for row in rows if "val_loss" in row][-1])
    rows = []
    for name, values in found.items():
        sd = stdev(values) if n > 1 else math.nan
        rows.append([name, f"{fmean(values):.4f} ± {sd:.4f}", " ".join(f"{x:.4f}" for x in values)])
    ours, other = found["this one"], found["another checkout"]
    apart = fmean(a / b - 1 for a, b in zip(ours, other))
    table = runs.table(["", "val_loss, nats a token", "each seed"], rows)
    return [*table, "", f"Seed by seed {100 * apart:+.2f} % on the average."]


def main(argv: list[str]) -> int:
    """What `python bench.py step ...` does with the words after `step`: 0, or 1 where a run
    failed."""
    own = [word for word in argv if word.partition("=")[0] in FLAGS]
    flags = runs.flags(own, FLAGS, __doc__)
    words = [word for word in argv if word not in own]
    beside = Path(flags.get("--beside", "before")).resolve()
    if not (beside / "train.py").is_file():
        raise ValueError(
            f"--beside={beside} has no train.py; type git worktree add --detach before COMMIT, "
            "then --beside=before"
        )
    for word in words:
        if re.match("--(out_dir|resume|seed|eval_every|compile)=", word):
            raise ValueError(f"{word} is the bench's own; leave it out")
    quick = "--quick" in flags
    recipes = [word for word in words if not word.startswith("--")]
    fields = [word for word in words if word.startswith("--")]
    steps = "--steps=6" if quick else "--steps=30"
    words = [*recipes, steps, f"--data_dir={runs.CACHE}", *USUAL, *fields]
    parse.parse(words)  # a mistake shows now
    pairs = 1 if quick else int(flags.get("--pairs", 5))
    try:
        page = [runs.header(["step", *argv]), "", *whole_runs(beside, words, pairs), ""]
        page += techniques(words, 1 if quick else max(5, 3 * pairs))
        if int(flags.get("--seeds", 0)):
            page += ["", *losses(beside, words, int(flags["--seeds"]))]
    except RuntimeError as error:
        runs.tell(f"bench.py step: {error}")
        return 1
    runs.show(page, flags.get("--out"))
    return 0
