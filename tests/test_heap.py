"""memory/heap.py: what a step frees, the next one need not ask the system for."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from memory import heap

ROOT = Path(heap.__file__).parent.parent
# Pages that are new to the process in ten rounds; one round of 48 MiB has 12,288 of 4 KiB.
FAULTS = """
import resource, sys, torch
from memory.heap import keep_freed_memory

def faults():
    torch.ones(12 * 2**20)  # the first round may ask for pages
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12 * 2**20)
        # And at the end of the heap.
        small = [torch.ones(2**16) for _ in range(300)]
        del small
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

"""
GLIBC = platform.libc_ver()[0] == "glibc"


def run(code: str, *words: str, **more: str) -> list[str]:
    env = {name: x for name, x in os.environ.items() if name not in heap.OWN_SETTINGS}
    command = [sys.executable, "-c", FAULTS + code, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"} | more, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@pytest.mark.skipif(not GLIBC, reason="another malloc than glibc's stays as it is")
def test_a_run_keeps_the_memory_that_it_frees(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 400)
    code = (
        "before = faults()\n"
        "import train\n"
        "from settings import parse\n"
        "train.main(parse.parse(sys.argv[1:]))\n"
        "print(before, min(faults() for _ in range(3)))"  # the system may take pages in between
    )
    tiny = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=16 --batch_size=2 --steps=1"
    words = [*tiny.split(), f"--data={tmp_path}/text.txt", f"--out_dir={tmp_path}/run"]
    before, after = map(int, run(code, *words, "--device=cpu", "--eval_every=0"))
    # A machine may have huge pages of 2 MiB, 24 in a round, where nothing is kept.
    assert before > 200 and after < before / 50, (before, after)


@pytest.mark.skipif(not GLIBC, reason="another malloc than glibc's stays as it is")
@pytest.mark.parametrize("name", heap.OWN_SETTINGS)
def test_a_malloc_that_the_environment_has_set_stays_as_it_is(name, monkeypatch):
    for other in heap.OWN_SETTINGS:
        monkeypatch.delenv(other, raising=False)
    calls = []

    class Library:
        def __init__(self, path):
            self.mallopt = lambda *words: calls.append(words) or 1

    monkeypatch.setattr(heap.ctypes, "CDLL", Library)
    assert heap.keep_freed_memory() and {what for what, _ in calls} == {-1, -3}
    monkeypatch.setenv(name, "1")
    assert not heap.keep_freed_memory() and len(calls) == 2


def test_an_older_glibc_takes_the_largest_threshold_that_it_allows(monkeypatch):
    for name in heap.OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    taken = {}

    def mallopt(what, value):
        if what == heap.M_MMAP_THRESHOLD and value > 2**25:
            return 0
        taken[what] = value
        return 1

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda path: SimpleNamespace(mallopt=mallopt))
    assert heap.keep_freed_memory()
    assert taken == {heap.M_MMAP_THRESHOLD: 2**25, heap.M_TRIM_THRESHOLD: 2**31 - 1}


@pytest.mark.parametrize("error", [TypeError, OSError, AttributeError])
def test_a_system_without_glibc_trains_as_before(error, monkeypatch):
    """Windows, a system without such a library, musl or macOS."""
    for name in heap.OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)

    def library(path):
        raise error

    monkeypatch.setattr(heap.ctypes, "CDLL", library)
    assert not heap.keep_freed_memory()
