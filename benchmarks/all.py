"""Every bench in turn, each a process of its own, on one page: all that the README says of speed.

    python bench.py all [--quick] [--nanogpt=CLONE] [--out=DIR]

The page is printed as it grows; --out=DIR writes it to DIR/benchmarks.md. It ends with the figures
in bold, at a glance. A bench that fails is named on the page, with the line that says why. The
others still run, and the exit status is 1. --nanogpt: a clone of nanoGPT to run beside ours
(python bench.py nanogpt --help); without it the page says that this is left out. --quick: minutes
in place of about an hour, and figures that say only that everything works.
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks import runs

BENCHES = (
    "job",
    "nanogpt",
    "speedrun",
    "overhead",
    "scaling",
    "train",
    "optim",
    "spread",
    "memory",
    "layouts",
    "experts",
    "checkpoint",
    "scale",
    "network",
    "pipeline",
)
RANKS = {"network": 2, "pipeline": 2}
QUICK = {"pipeline": "--micro_batches=2"}  # it has no --quick
NO_MARKDOWN = ("spread", "network")


def command(bench: str, quick: bool, clone: str | None) -> list[str]:
    """The words after python."""
    name, *flags = bench.split()
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={RANKS.get(name, 1)}",
    ]
    flags += [f"--path={clone}"] * (name == "nanogpt") + [QUICK.get(name, "--quick")] * quick
    return [*torchrun * (name in RANKS), str(runs.ROOT / "bench.py"), name, *flags]


def section(bench: str, quick: bool, clone: str | None) -> tuple[list[str], bool]:
    """(lines of the page, whether it went well)."""
    if bench == "nanogpt" and clone is None:
        return [f"## {bench}", "", "left out: type --nanogpt= and the folder of a clone", ""], True
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command(bench, quick, clone)],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=runs.ROOT,
    )
    said = done.stdout.strip()
    lines = [f"## {bench}", "", *(["```", said, "```"] if bench in NO_MARKDOWN else [said]), ""]
    if done.returncode:
        lines += [f"**failed**, status {done.returncode}: {runs.reason(done.stderr)}", ""]
    return [*lines, f"{time.monotonic() - began:.0f} s", ""], done.returncode == 0


def at_a_glance(page: list[str]) -> list[str]:
    """The lines with something in bold, each under its bench, and cells with the head of their
    column."""
    lines, title, head, before = ["## At a glance", ""], "", [], ""
    for line in "\n".join(page).splitlines():
        if line.startswith("## "):
            title = line[3:]
        elif line.startswith("|---"):
            head = [cell.strip() for cell in before.split("|")]
        elif line.count("**") > 1:
            cells = [cell.strip() for cell in line.removeprefix("- ").split("|")]
            named = (
                [f"{name} {cell}".strip() for name, cell in zip(head, cells)]
                if len(cells) > 1
                else cells
            )
            lines.append(f"- {title}: {', '.join(filter(None, named))}")
        before = line
    return lines


def main(argv: list[str]) -> int:
    """What `python bench.py all ...` does with the words after `all`."""
    flags = runs.flags(argv, {"--quick": "", "--nanogpt": ".+", "--out": ".+"}, __doc__)
    clone = flags.get("--nanogpt")
    if clone is not None and not Path(clone, "train.py").is_file():
        raise ValueError(
            f"--nanogpt={clone} has no train.py; it is the folder of a clone of nanoGPT"
        )
    if "--out" in flags:
        if Path(flags["--out"]).is_file():
            raise ValueError(f"--out={flags['--out']} is a file; type the name of a folder")
        Path(flags["--out"]).mkdir(exist_ok=True)
    words = [word for word in argv if not word.startswith(("--nanogpt", "--out"))]
    page, fine = [runs.header(["all", *words]), ""], True
    print("\n".join(page), flush=True)
    for bench in BENCHES:
        runs.tell(f"{bench} ...")
        lines, well = section(bench, "--quick" in flags, clone and str(Path(clone).resolve()))
        page, fine = page + lines, fine and well
        print("\n".join(lines), flush=True)
        if "--out" in flags:  # after each, so that a kill loses one
            Path(flags["--out"], "benchmarks.md").write_text(
                "\n".join(page + at_a_glance(page)) + "\n", encoding="utf-8"
            )
    print("\n".join(at_a_glance(page)))
    return int(not fine)
