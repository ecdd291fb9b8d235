"""Seconds until a model is as good as the reference's: whole processes, both recipes in turn.

    python bench.py speedrun [--runs=5] [--data=python] [--recipe=configs/cpu_speedrun.toml]
                             [--reference=configs/nanogpt_cpu.toml] [--loss=1.588] [--quick]
                             [--out=FILE.md]

Time is that of the whole process, from before it starts (the import of torch too) until it has
ended and its checkpoint is on the disk. Reference and ours take turns, A B A B; run i has --seed=i
in both. The corpus is prepared by an untimed start of each. The recipe is the entry; the same for
both are the words in EQUAL: an evaluation of as many tokens before the first step and after the
last, no other, no sample, no picture.

Loss. Two recipes cut the held-out text into rows of their own length, and a run's own val_loss is
over rows of its own. So after the clock has stopped, both models read the very same text: stretches
of 4096 tokens (or the least multiple of that and both block_sizes), evenly spread over the held-out
part, 2^17 tokens or what there is. Each reads them in rows of its own block_size, in float32, and
predicts every token once, the first ones of a row from few others, as in training: who has longer
rows has paid for them in time. The loss is the mean over these tokens, in nats; the tokenizers must
be the same. The table also has val_loss, which the runs logged.

--loss=1.588 is for entries that need no reference run: the recipe alone, --runs times, against this
loss by the same measure. Reached: the mean of the losses is at most the target. Significant: also
(target - mean) sqrt(n) >= 3.1 sd over the n runs (3.1 is the one-sided 0.1 % of the normal
distribution, the rule of modded-nanogpt's track 3). The target that is a reference's mean is taken
as if it were exact.
--quick: one run of ten steps each, which proves nothing.
"""

import math
import tempfile
from pathlib import Path
from statistics import fmean, median

import torch

import sample
from benchmarks import runs
from data import corpora, dataset
from settings import parse

EQUAL = (
    "--eval_tokens=32768",
    "--sample_tokens=0",
    "--save_every=0",
    "--plot=false",
    "--resume=never",
)
FLAGS = {
    "--runs": "[1-9][0-9]*",
    "--data": ".+",
    "--recipe": ".+",
    "--reference": ".+",
    "--quick": "",
    "--loss": r"[0-9]+(\.[0-9]+)?",
    "--out": ".+",
}
STRETCH, TOKENS, Z = 4096, 2**17, 3.1


def stretches(length: int, multiple: int) -> list[tuple[int, int]]:
    """(first, last + 1) of the inputs to read in `length` tokens: evenly spread, apart, each a
    multiple of `multiple`, as many as make TOKENS; the target of the last input is there too.
    Raises ValueError.
    """
    size = math.lcm(STRETCH, multiple)
    if size > length - 1:
        size = (length - 1) // multiple * multiple
    if size < 1:
        raise ValueError(
            f"the held-out part has {length} tokens, rows of {multiple} do not fit in; give a "
            "larger --data=, or recipes of a shorter block_size"
        )
    count = max(1, min(TOKENS, length - 1) // size)
    return [(i * (length - 1) // count, i * (length - 1) // count + size) for i in range(count)]


@torch.no_grad()
def mean_loss(nats_of, T: int, held_out: dataset.Tokens, multiple: int) -> float:
    """Nats a token. nats_of: inputs and targets (B, T) -> the sum of their losses; multiple: of the
    block_sizes that are compared, T among them."""
    nats, count = 0.0, 0
    for first, last in stretches(len(held_out), multiple):
        ids = torch.from_numpy(held_out.slice(first, last + 1).astype("int64"))
        for inputs, targets in zip(ids[:-1].view(-1, T).split(16), ids[1:].view(-1, T).split(16)):
            nats, count = nats + nats_of(inputs, targets), count + targets.numel()
    return nats / count


def loss_of(run: Path, held_out: dataset.Tokens, multiple: int) -> float:
    """By the run's newest checkpoint."""
    model, _ = sample.load(str(run))
    return mean_loss(lambda x, y: model(x, y).item(), model.config.block_size, held_out, multiple)


def once(words: list[str], held_out: dataset.Tokens, multiple: int) -> dict:
    """One run's seconds, val_loss and loss. Raises RuntimeError."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        seconds, rows = runs.run(words, Path(folder, "run"))
        val_loss = [row["val_loss"] for row in rows if "val_loss" in row][-1]
        loss = loss_of(Path(folder, "run"), held_out, multiple)
    return {
        "seconds": seconds,
        "loss": loss,
        "val_loss": math.nan if val_loss is None else val_loss,
    }


def sd(values: list[float]) -> float:
    """Of the sample; NaN where a run diverged, which statistics.stdev does not survive
    everywhere."""
    return math.sqrt(sum((x - fmean(values)) ** 2 for x in values) / (len(values) - 1))


def mean_sd(values: list[float]) -> str:
    return f"{fmean(values):.4f} ± {sd(values):.4f}" if len(values) > 1 else f"{values[0]:.4f}"


def verdict(losses: list[float], target: float) -> list[str]:
    """Is the mean at most the target, and is that significant?"""
    mean, n = fmean(losses), len(losses)
    said = [
        f"- loss {mean:.4f} {'<=' if mean <= target else '>'} {target:.4f}: "
        f"{'reached' if mean <= target else '**not reached**'}"
    ]
    if n < 2:
        return [*said, "- significance: one run has no spread; type --runs=2, or more"]
    left, right = (target - mean) * math.sqrt(n), Z * sd(losses)
    return [
        *said,
        (
            f"- (target - mean) sqrt({n}) = {left:.4f} {'>=' if left >= right else '<'} {Z} sd = "
            f"{right:.4f}: {'significant' if left >= right else '**not significant**'}"
        ),
    ]


def report(found: dict[str, list[dict]], target: float | None) -> list[str]:
    """The table's lines. found: {recipe: its runs}, the reference first if there is one, ours last;
    target: None for the reference's mean loss."""
    rows = []
    for name, mine in found.items():
        seconds, losses, own = (
            [run[key] for run in mine] for key in ("seconds", "loss", "val_loss")
        )
        rows.append(
            [
                name,
                runs.spread(seconds, ".1f"),
                mean_sd(losses),
                " ".join(f"{x:.4f}" for x in losses),
                mean_sd(own),
                " ".join(f"{x:.4f}" for x in own),
            ]
        )
    head = ["", "seconds, median (min..max)", "loss, nats a token", "each", "val_loss", "each"]
    theirs, ours = [*found.values()][0], [*found.values()][-1]
    said = [*runs.table(head, rows), ""]
    if len(found) > 1:
        ratio = median(r["seconds"] for r in theirs) / median(r["seconds"] for r in ours)
        pairs = [a["seconds"] / b["seconds"] for a, b in zip(theirs, ours)]
        said.append(
            f"- seconds, reference / ours: **{ratio:.2f}** (pair by pair {min(pairs):.2f}.."
            f"{max(pairs):.2f})"
        )
    target = fmean(run["loss"] for run in theirs) if target is None else target
    return said + verdict([run["loss"] for run in ours], target)


def main(argv: list[str]) -> int:
    """What `python bench.py speedrun ...` does with the words after `speedrun`."""
    flags = runs.flags(argv, FLAGS, __doc__)
    if "--loss" in flags and "--reference" in flags:
        raise ValueError("--loss stands for a reference's; type --loss= without --reference=")
    recipes = {
        "reference": flags.get("--reference", str(runs.ROOT / "configs" / "nanogpt_cpu.toml")),
        "ours": flags.get("--recipe", str(runs.ROOT / "configs" / "cpu_speedrun.toml")),
    }
    if "--loss" in flags:
        del recipes["reference"]
    n, same = int(flags.get("--runs", 5)), [f"--data={flags.get('--data', 'python')}", *EQUAL]
    n, same = (1, [*same, "--steps=10"]) if "--quick" in flags else (n, same)
    words = {who: [recipe, *same, f"--data_dir={runs.CACHE}"] for who, recipe in recipes.items()}
    configs = {who: parse.parse(words[who]) for who in words}
    if len({cfg.tokenizer for cfg in configs.values()}) > 1:
        raise ValueError(
            "the recipes have two tokenizers, and nats of different tokens cannot be compared; "
            f"write one tokenizer into {' and '.join(recipes.values())}"
        )
    cfg, found = configs["ours"], {who: [] for who in recipes}
    held_out = corpora.load(cfg.data, cfg.tokenizer, cfg.data_dir, cfg.data_url).val
    multiple = math.lcm(*(cfg.block_size for cfg in configs.values()))
    stretches(len(held_out), multiple)  # a text that is too short shows now
    try:
        for who in recipes:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                runs.run([*words[who], "--steps=1", "--eval_every=0"], Path(folder, "run"))
        for i in range(n):
            for who, cfg in configs.items():
                run = once(
                    [*words[who], f"--seed={i + 1}", f"--eval_every={cfg.steps}"],
                    held_out,
                    multiple,
                )
                found[who].append(run)
                print(
                    f"run {i + 1} of {n}: {who}: {run['seconds']:.1f} s, loss {run['loss']:.4f}, "
                    f"val_loss {run['val_loss']:.4f}",
                    flush=True,
                )
    except RuntimeError as error:
        runs.tell(f"bench.py speedrun: {recipes[who]}: {error}")
        return 1
    target = float(flags["--loss"]) if "--loss" in flags else None
    shown = {f"{who}: {Path(recipes[who]).name}": mine for who, mine in found.items()}
    print()
    runs.show(
        [
            runs.header(["speedrun", *argv]),
            "",
            f"Each: `python train.py RECIPE {' '.join(same)} --seed=1,2,... --eval_every=STEPS`",
            "",
            *report(shown, target),
        ],
        flags.get("--out"),
    )
    return 0
