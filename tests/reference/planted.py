"""Faults of one line, planted in a copy of this checkout: each must be found.

A fault is looked for in the source by what the line says, not by the name of its file, which may
move. The pattern must be there exactly once; where it is not, the line has been rewritten, and the
fault here must follow.
"""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cases import CASES
from compare import ROOT, broken, facts, first_difference, git, off_trace, run_all

TOOLS = {"tests", "experiments", "benchmarks", "docs"}  # folders that no run imports


@dataclass(frozen=True)
class Fault:
    """In a file that has `beside` too, `pattern` becomes `fault`. traced: the stored traces must
    see it as well."""

    what: str
    beside: str
    pattern: str
    fault: str
    cases: tuple[str, ...]
    traced: bool


SUM = r"dist\.all_reduce\(\s*bucket\.flat"
FAULTS = [
    Fault("AdamW's weights grow by their decay", r"class AdamW\(", r"1 - lr \* weight_decay",
          "1 + lr * weight_decay", ("adamw", "mup"), True),
    Fault("DDP's sum is a billionth too large", r"class DDP\b", SUM,
          "dist.all_reduce(bucket.flat.mul_(1 + 1e-9)", ("ddp",), True),
    Fault("DDP's sum is four roundings too large", r"class DDP\b", SUM,
          "dist.all_reduce(bucket.flat.mul_(1 + 2**-50)", ("ddp",), False),
    Fault("perplexity has another name", r"val_accuracy", r'"perplexity": math\.', '"ppl": math.',
          ("adamw",), False),
]  # fmt: skip


def copy_of_tree(folder: Path) -> Path:
    """Every file of the checkout that git does not ignore, as it is now."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def place_of(fault: Fault, tree: Path) -> Path:
    """The file to plant it in. Raises ValueError where the pattern is not there exactly once."""
    found = []
    for path in tree.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.relative_to(tree).parts[0] not in TOOLS and re.search(fault.beside, text):
            found += [path] * len(re.findall(fault.pattern, text))
    if len(found) != 1:
        times = f"{len(found)} times, not once"
        raise ValueError(f"{fault.what}: {fault.pattern} is there {times}; see FAULTS")
    return found[0]


def is_found(fault: Fault, tree: Path, work: Path, jobs: int) -> bool:
    """Runs the fault's cases without it and with it. Prints what is seen."""
    path = place_of(fault, tree)
    text = path.read_text(encoding="utf-8")
    cases = [case for case in CASES if case.name in fault.cases]
    clean = dict(run_all(tree, cases, work / "clean", jobs))
    path.write_text(re.sub(fault.pattern, fault.fault, text), encoding="utf-8")
    try:
        planted = dict(run_all(tree, cases, work / "planted", jobs))
    finally:
        path.write_text(text, encoding="utf-8")
    good = True
    for case in cases:
        here, there = planted[case], clean[case]
        seen = {
            "bits": broken(case, here) or first_difference(facts(here, tree), facts(there, tree))
        }
        if fault.traced:
            seen["trace"] = off_trace(case, here)
            if early := off_trace(case, there):
                print(f"{fault.what}: {case.name} is off its trace without it: {early}", flush=True)
                good = False
        for by, what in seen.items():
            print(f"{fault.what}: {case.name}, by {by}: {what or 'NOT FOUND'}", flush=True)
            good = good and what is not None
    return good


def all_found(work: Path, jobs: int) -> bool:
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_tree(Path(folder).resolve())
        for fault in FAULTS:
            try:
                found += is_found(fault, tree, work, jobs)
            except ValueError as error:
                print(error, flush=True)
    print(f"{found} of {len(FAULTS)} planted faults found")
    return found == len(FAULTS)
