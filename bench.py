"""Benchmarks: each is a file of benchmarks/, whose docstring says what is measured and how.

    python bench.py optim [...]      optimizers.py   a step of each optimizer beside the peers'
    python bench.py train [...]      training.py     precision, compile, checkpointing: their speed
    python bench.py job [...]        job.py          the whole of a recipe: seconds and loss
    python bench.py step [...]       step.py         a step beside another checkout's, and why
    python bench.py nanogpt [...]    nanogpt.py      nanoGPT's own train.py beside ours
    python bench.py speedrun [...]   speedrun.py     seconds to a reference's loss, whole processes
    python bench.py scaling [...]    scaling.py      ranks and sizes: speed, memory, bytes sent
    python bench.py overhead [...]   overhead.py     what data, monitoring, saving, start-up cost
    python bench.py spread [...]     spread.py       Muon's products on every rank, and at owners
    python bench.py memory [...]     memory.py       peak bytes of a step, and of what
    python bench.py layouts [...]    layouts.py      each layout beside torch's own
    python bench.py experts [...]    experts.py      experts beside loops, and beside dense
    python bench.py checkpoint [...]  checkpointing.py  saving, loading beside torch's DCP
    python bench.py scale [...]      scale.py        up to 16,384 played ranks: what each costs
    python bench.py all [...]        all.py          all of these in turn, one page
    python bench.py gpu [...]        gpu.py          what only a GPU can answer, in five minutes

    torchrun --standalone --nproc_per_node=4 bench.py network [...]    network.py: every link
    torchrun --standalone --nproc_per_node=2 bench.py pipeline [...]   pipeline.py: bubbles

`python bench.py NAME --help` prints that docstring. Exit status: 0 done; 1 something failed; 2 a
user's mistake, in one line.
"""

import importlib
import sys

from metrics.outlets import command
from settings import parse

# The flags of benchmarks that have no value; all others do, train.py's too.
ALONE = ("--quick", "--profile", "--rehearse", "--help")
# NAME as typed -> its file in benchmarks/, whose name says more.
FILES = {
    "optim": "optimizers",
    "train": "training",
    "speedrun": "speedrun",
    "scaling": "scaling",
    "overhead": "overhead",
    "job": "job",
    "step": "step",
    "nanogpt": "nanogpt",
    "spread": "spread",
    "memory": "memory",
    "layouts": "layouts",
    "experts": "experts",
    "checkpoint": "checkpointing",
    "scale": "scale",
    "network": "network",
    "pipeline": "pipeline",
    "gpu": "gpu",
    "all": "all",
}


def main(argv: list[str]) -> int:
    if argv == ["--help"]:
        print(__doc__)
        return 0
    name = "".join(argv[:1])
    words = parse.with_equals(argv[1:], ALONE)
    if name not in FILES:
        print(
            f"bench.py: not understood: {name!r}; usage: python bench.py NAME, with one of",
            ", ".join(FILES),
            file=sys.stderr,
        )
        return 2
    # Imported here: --help then needs no torch, and no benchmark pays for another one's imports.
    bench = importlib.import_module(f"benchmarks.{FILES[name]}")
    if "--help" in words:
        print(bench.__doc__)
        return 0
    try:
        return bench.main(words)
    except ValueError as error:
        print(f"bench.py {name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    command("bench.py", main)
