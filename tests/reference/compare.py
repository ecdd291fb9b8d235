"""Is every run of this checkout, to the last bit, the run of the commit before a refactoring?

    python tests/reference/compare.py                 all cases, at the base too; 1 if one differs
    python tests/reference/compare.py ddp fsdp        these cases alone
    python tests/reference/compare.py --traces        against traces.json, to 1e-12; needs no base
    python tests/reference/compare.py --write-traces  writes traces.json from this checkout
    python tests/reference/compare.py --self-test     plants faults in a copy; 1 if one is not found
    python tests/reference/compare.py --list          the cases and their commands

    --base=COMMIT   instead of BASE     --jobs=N    cases at a time (default: 2)
    --cache=DIR     where runs of the base are kept: the second call runs this checkout alone
    --keep=DIR      where runs of this checkout are kept; otherwise they are deleted

cases.py has the cases, and the tables of what is meant to differ.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import artifacts
from cases import CASES, CHANGED, REWORDED, Case
from runs import HERE, Tree, key

BASE = "34f47eb"  # after fields of documents had come into every config.toml
ROOT = HERE.parents[1]
TRACES = HERE / "traces.json"
FLAGS = {"base", "jobs", "cache", "keep", "traces", "write-traces", "self-test", "list", "help"}


# ---- running -------------------------------------------------------------------------------------
def run_all(root: Path, cases: list[Case], folder: Path, jobs: int) -> Iterator[tuple[Case, Path]]:
    """Each case and the folder with what it has left, in order, as soon as they are there."""
    jobs = max(1, min(jobs, len(cases)))
    idle: queue.Queue = queue.Queue()
    for _ in range(jobs):
        idle.put(Tree(root))

    def run(case: Case) -> Path:
        tree = idle.get()
        try:
            tree.run(case, folder / case.name)
        finally:
            idle.put(tree)
        return folder / case.name

    pool = ThreadPoolExecutor(jobs)
    try:
        yield from zip(cases, pool.map(run, cases))
    finally:  # after an error or Ctrl-C, too: those under way end, the others never begin
        pool.shutdown(cancel_futures=True)
        for _ in range(jobs):
            idle.get().close()


def broken(case: Case, folder: Path, reworded: dict[str, str] | None = None) -> str | None:
    """What this run lacks of what its case promises, or None. A case that fails alike on both sides
    would be the same, and prove nothing. reworded: other words in it, and what to read for them."""
    statuses = json.loads((folder / "status.json").read_text(encoding="utf-8"))["status"]
    for number, (command, found) in enumerate(zip(case.commands, statuses, strict=True), 1):
        if any(status != command.status for status in found):
            errors = folder / f"{number}.rank0.err"
            said = errors.read_text(encoding="utf-8", errors="replace").strip()
            last = said.splitlines()[-1] if said else "it said nothing"
            return f"command {number} ended with {found}, not {command.status}: {last}"
    paths = [*folder.glob("*.rank*"), *folder.rglob("metrics.jsonl")]
    said = "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    said = artifacts.replaced(said, reworded or {})
    missing = [words for words in case.needs if words not in said]
    return f"it never said {missing[0]!r}" if missing else None


# ---- the base ------------------------------------------------------------------------------------
def git(*words: str) -> str:
    line = ["git", "-C", str(ROOT), *words]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    """What decides the bits of a run beside the code: the CPU, Python, torch and numpy."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = file.read().partition("\n\n")[0].splitlines()  # of the first core
        cpu = "".join(line for line in lines if line.startswith(("model", "cpu family", "flags")))
    versions = [importlib.metadata.version(name) for name in ("torch", "numpy")]
    return f"{cpu} {os.cpu_count()} {platform.python_version()} {versions}"


def runs_of_base(base: str, cases: list[Case], cache: Path, jobs: int) -> dict[str, Path]:
    """The folder of each case at the base; what the cache lacks is run now, in a worktree."""
    commit = git("rev-parse", "--verify", f"{base}^{{commit}}")
    home = cache / hashlib.sha256(f"{commit} {machine()}".encode()).hexdigest()[:16]
    folders = {case.name: home / f"{case.name}-{key(case)}" for case in cases}
    missing = [case for case in cases if not folders[case.name].exists()]
    if not missing:
        return folders
    home.mkdir(parents=True, exist_ok=True)
    print(f"{len(missing)} cases are run at {base} first", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        tree = Path(work, "tree").resolve()
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            for case, folder in run_all(tree, missing, Path(work, "runs").resolve(), jobs):
                (folder / "root.txt").write_text(f"{folder}\n{tree}", encoding="utf-8")
                if not folders[case.name].exists():  # nobody else was faster
                    os.replace(folder, folders[case.name])
        finally:
            git("worktree", "remove", "--force", str(tree))
    return folders


def facts_of_base(folder: Path) -> dict[str, object]:
    where, tree = (folder / "root.txt").read_text(encoding="utf-8").splitlines()
    return artifacts.facts(folder, {where: "<folder>", tree: "<tree>"}, REWORDED)


def facts(folder: Path, tree: Path) -> dict[str, object]:
    return artifacts.facts(folder, {str(folder): "<folder>", str(tree): "<tree>"}, {})


# ---- comparing -----------------------------------------------------------------------------------
def first_difference(here: dict[str, object], there: dict[str, object]) -> str | None:
    """The first place where two runs differ, and both values; None where they are the same."""
    for where in [*there, *(place for place in here if place not in there)]:
        if where not in here:
            return f"{where} is only in the base: {artifacts.short(there[where])}"
        if where not in there:
            return f"{where} is only here: {artifacts.short(here[where])}"
        if here[where] != there[where]:
            return f"{where}: {artifacts.difference(here[where], there[where])}"
    return None


def checked(
    cases: list[Case], jobs: int, keep: Path, check: Callable, good: Callable, changed: dict
) -> list[int]:
    """Runs the cases here and prints a line for each: what check(case, folder) finds wrong or,
    where that is None, good(case, folder). What has `changed` need only work. [how many are as they
    should be, of how many]."""
    counts = [0, 0]
    for case, folder in run_all(ROOT, cases, keep, jobs):
        if case.name in changed and broken(case, folder) is None:
            print(f"{case.name}: changed on purpose, {changed[case.name]}", flush=True)
            continue
        wrong = check(case, folder)
        counts = [counts[0] + (wrong is None), counts[1] + 1]
        print(f"{case.name}: {wrong or good(case, folder)}", flush=True)
    return counts


def against_base(base: str, cases: list[Case], cache: Path, keep: Path, jobs: int) -> bool:
    began = time.monotonic()
    folders = runs_of_base(base, cases, cache, jobs)

    def check(case: Case, folder: Path) -> str | None:
        if wrong := broken(case, folders[case.name], REWORDED):
            return f"the base itself is no reference: {wrong}"
        there = facts_of_base(folders[case.name])
        return broken(case, folder) or first_difference(facts(folder, ROOT), there)

    same, total = checked(cases, jobs, keep, check, lambda case, folder: "same", CHANGED)
    seconds = time.monotonic() - began
    print(f"{same} of {total} cases bitwise the same as {base} ({seconds:.0f} seconds)")
    return same == total


# ---- traces --------------------------------------------------------------------------------------
def read_traces() -> dict[str, dict[str, list[list]]]:
    return json.loads(TRACES.read_text(encoding="utf-8")) if TRACES.exists() else {}


def write_traces(cases: list[Case], keep: Path, jobs: int) -> None:
    kept = read_traces()
    for case, folder in run_all(ROOT, cases, keep, jobs):
        if wrong := broken(case, folder):
            raise ValueError(f"{case.name}: {wrong}")
        kept[case.name] = artifacts.trace(folder)
    texts = []
    for case in CASES:
        if case.trace is None or case.name not in kept:
            continue
        series = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in kept[case.name].items()]
        texts.append(f" {json.dumps(case.name)}: {{\n" + ",\n".join(series) + "\n }")
    TRACES.write_text("{\n" + ",\n".join(texts) + "\n}\n", encoding="utf-8")
    print(f"{TRACES.name} has {len(texts)} cases")


def off_trace(case: Case, folder: Path) -> str | None:
    """Where a float64 run leaves its stored trace, or None."""
    if wrong := broken(case, folder):
        return wrong
    found, stored = artifacts.trace(folder), read_traces().get(case.name)
    if stored is None:
        return "there is no stored trace; type --write-traces"
    for where, series in stored.items():
        steps, expected = ([step for step, _ in pairs] for pairs in (found.get(where, []), series))
        if steps != expected:
            return f"{where} is there for the steps {steps}, stored for {expected}"
    away, place = furthest(found, stored)
    return f"{place}, {away:.1e} apart" if away > max(case.trace, allowed(folder)) else None


def allowed(folder: Path) -> float:
    """What every trace is allowed on this CPU. Without AVX2 (ARM, say) torch draws the normal
    numbers of initial weights by another kernel, in float32, whose last bits are others."""
    cpu = json.loads((folder / "status.json").read_text(encoding="utf-8"))["cpu"]
    return 0.0 if cpu in ("AVX2", "AVX512") else 1e-4


def furthest(found: dict[str, list[list]], stored: dict[str, list[list]]) -> tuple[float, str]:
    """How far the pair is apart that is furthest, and what it is."""
    most = (-1.0, "")
    for where, series in stored.items():
        for (step, here), (_, there) in zip(found[where], series, strict=True):
            place = f"{where} at step {step}: {here!r}, stored is {there!r}"
            most = max(most, (apart(here, there), place))
    return most


def apart(a: float | None, b: float | None) -> float:
    """The relative distance of two numbers; None stands for what is not finite."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-300)


def against_traces(cases: list[Case], keep: Path, jobs: int) -> bool:
    began, stored = time.monotonic(), read_traces()

    def how_near(case: Case, folder: Path) -> str:
        return f"at most {furthest(artifacts.trace(folder), stored[case.name])[0]:.0e} away"

    same, total = checked(cases, jobs, keep, off_trace, how_near, {})
    seconds = time.monotonic() - began
    print(f"{same} of {total} cases on their stored traces ({seconds:.0f} seconds)")
    return same == total


# ---- the command ---------------------------------------------------------------------------------
def main(argv: list[str]) -> int:
    flags = dict(word[2:].partition("=")[::2] for word in argv if word.startswith("--"))
    names = [word for word in argv if not word.startswith("--")]
    unknown = [f"--{name}" for name in flags if name not in FLAGS]
    unknown += [name for name in names if name not in {case.name for case in CASES}]
    if unknown:
        raise ValueError(f"there is no {unknown[0]}; --help has the flags, --list the cases")
    chosen = [case for case in CASES if not names or case.name in names]
    if "traces" in flags or "write-traces" in flags:
        chosen = [case for case in chosen if case.trace is not None]
    if "help" in flags:
        print(__doc__)
        return 0
    if "list" in flags:
        for case in chosen:
            for command in case.commands:
                print(f"{case.name} [{command.ranks}] {command.script} {command.flags}")
        return 0
    cache = Path(flags.get("cache") or Path(tempfile.gettempdir(), "nanoscale-reference")).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    keep = Path(flags.get("keep") or tempfile.mkdtemp(dir=cache)).resolve()
    jobs = int(flags.get("jobs") or 2)
    try:
        if "self-test" in flags:
            import planted

            good = planted.all_found(keep, jobs)
        elif "write-traces" in flags:
            write_traces(chosen, keep, jobs)
            good = True
        elif "traces" in flags:
            good = against_traces(chosen, keep, jobs)
        else:
            good = against_base(flags.get("base") or BASE, chosen, cache, keep, jobs)
    finally:
        if not flags.get("keep"):
            shutil.rmtree(keep, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is under way is tidied up
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        print(f"compare.py: git: {error.stderr.strip()}", file=sys.stderr)
        sys.exit(2)
