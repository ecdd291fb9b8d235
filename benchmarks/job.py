"""The whole of a recipe, as a user starts it: how long it takes, and what it has learned.

    python bench.py job [recipe.toml] [--runs=3] [--quick] [--out=FILE.md] [--field=...]

Of the default recipe, or the given one; run i has --seed=i, other fields are train.py's. Seconds
are those of the whole process, evaluations, checkpoints, sample and picture with it, after an
untimed start that fills the cache of the corpus. Loss is the run's own val_loss at its end, in nats
a token; tokens/s of the median step, the first third left out. --quick: one run of ten steps.
"""

import math
import tempfile
from pathlib import Path

from benchmarks import runs
from benchmarks.speedrun import mean_sd
from settings import parse

FLAGS = {"--runs": "[1-9][0-9]*", "--quick": "", "--out": ".+"}


def once(words: list[str]) -> dict:
    """Seconds, val_loss and tokens_per_s of a run. Raises RuntimeError."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        seconds, rows = runs.run(words, Path(folder, "run"))
    last = [row["val_loss"] for row in rows if "val_loss" in row][-1:]  # None where it diverged
    return runs.middle(rows) | {
        "seconds": seconds,
        "val_loss": math.nan if last in ([], [None]) else last[0],
    }


def main(argv: list[str]) -> int:
    """What `python bench.py job ...` does with the words after `job`: 0, or 1 where a run
    failed."""
    own = [word for word in argv if word.partition("=")[0] in FLAGS]
    flags, words = runs.flags(own, FLAGS, __doc__), [word for word in argv if word not in own]
    for word in words:
        if word.startswith(("--out_dir=", "--resume=", "--seed=")):
            raise ValueError(f"{word} is the bench's own; leave it out")
    quick = "--quick" in flags
    recipes, fields = ([w for w in words if w.startswith("--") == field] for field in (False, True))
    words = [
        *recipes,
        "--resume=never",
        f"--data_dir={runs.CACHE}",
        *["--steps=10"] * quick,
        *fields,
    ]
    parse.parse(words)  # a mistake shows now
    n, found = 1 if quick else int(flags.get("--runs", 3)), []
    try:
        once([*words, "--steps=1", "--sample_tokens=0"])
        for i in range(n):
            found.append(once([*words, f"--seed={i + 1}"]))
            runs.tell(
                f"run {i + 1} of {n}: {found[-1]['seconds']:.1f} s, loss"
                f" {found[-1]['val_loss']:.4f}"
            )
    except RuntimeError as error:
        runs.tell(f"bench.py job: {error}")
        return 1
    seconds, losses, speeds = (
        [run[key] for run in found] for key in ("seconds", "val_loss", "tokens_per_s")
    )
    head = ["seconds, median (min..max)", "loss, nats a token", "tokens/s"]
    row = [
        f"**{runs.spread(seconds, '.1f')}**",
        f"**{mean_sd(losses)}**",
        runs.spread(speeds, ",.0f"),
    ]
    runs.show([runs.header(["job", *argv]), "", *runs.table(head, [row])], flags.get("--out"))
    return 0
