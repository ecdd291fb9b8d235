"""Every bench in turn, each a process of its own, on one page.

    python bench.py all [--quick] [--out=DIR]

optim, spread, train, scaling, overhead, speedrun; network and pipeline under torchrun with 2 ranks. The page
is printed as it grows; --out=DIR writes it to DIR/benchmarks.md. One that fails is said so on the page, with
the line that says why, and the others go on; the exit status is then 1. --quick: minutes in place of an hour
or two, and figures that say only that everything works.
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks import runs

NAMES = ("optim", "spread", "train", "scaling", "overhead", "speedrun", "network", "pipeline")
RANKS = {"network": 2, "pipeline": 2}
QUICK = {"pipeline": "--micro_batches=2"}  # it has no --quick
NO_MARKDOWN = ("spread", "network")


def command(name: str, quick: bool) -> list[str]:
    """The words after python."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS.get(name, 1)}"]
    flags = [QUICK.get(name, "--quick")] * quick
    return [*torchrun * (name in RANKS), str(runs.ROOT / "bench.py"), name, *flags]


def section(name: str, quick: bool) -> tuple[list[str], bool]:
    """(lines of the page, whether it went well)."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, *command(name, quick)], capture_output=True, text=True,
                          errors="replace")  # fmt: skip
    said = done.stdout.strip()
    lines = [f"## {name}", "", *(["```", said, "```"] if name in NO_MARKDOWN else [said]), ""]
    if done.returncode:
        lines += [f"**failed**, status {done.returncode}: {runs.reason(done.stderr)}", ""]
    return [*lines, f"{time.monotonic() - began:.0f} s", ""], done.returncode == 0


def main(argv: list[str]) -> int:
    """What `python bench.py all ...` does with the words after `all`."""
    flags = runs.flags(argv, {"--quick": "", "--out": ".+"}, __doc__)
    if "--out" in flags:
        if Path(flags["--out"]).is_file():
            raise ValueError(f"--out={flags['--out']} is a file; type the name of a folder")
        Path(flags["--out"]).mkdir(exist_ok=True)
    quick, page, fine = "--quick" in flags, [runs.header(["all", *argv]), ""], True
    print("\n".join(page), flush=True)
    for name in NAMES:
        runs.tell(f"{name} ...")
        lines, well = section(name, quick)
        page, fine = page + lines, fine and well
        print("\n".join(lines), flush=True)
        if "--out" in flags:  # after each, so that a kill loses one
            Path(flags["--out"], "benchmarks.md").write_text("\n".join(page), encoding="utf-8")
    return int(not fine)
