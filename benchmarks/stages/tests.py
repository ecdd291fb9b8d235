"""The tests marked `gpu`, with their tensors on the GPU: a row for each that fails, then counts.

    python -m pytest -m "gpu and not slow" --device=cuda      the same by hand

The line of each test is printed as it ends, so that gpu.log names the one that hung.
"""

import collections

import pytest

from benchmarks import runs
from benchmarks.stages.common import Plan

COVERS = (
    "checkpoint/tensor_file.py:TensorFile.read",
    "memory/meter.py:Meter.watch",
    "parallel/launch.py:backend_of",
)
TABLE = "Tests: pytest -m gpu."


class Rows:
    """A plugin of pytest: every outcome a line, and what failed a row."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.outcomes = collections.Counter()
        self.files = []
        self.of_file = collections.Counter()  # outcomes of the newest file

    def write_file(self) -> None:
        self.plan.emit(TABLE, what=self.files[-1], note=counts(self.of_file))
        self.of_file.clear()

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.plan.rehearse:
            # The suite runs them all: here the first of each function is enough.
            firsts = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
            items[:] = [item for item in items if item in firsts.values()]

    def pytest_runtest_logreport(self, report) -> None:
        # A test has three reports. Its call says how it ended; the others only if they went wrong.
        if report.when != "call" and report.passed:
            return
        file = report.nodeid.partition("::")[0]
        if self.files and file != self.files[-1]:
            self.write_file()
        if file not in self.files:
            self.files.append(file)
        self.outcomes[report.outcome] += 1
        self.of_file[report.outcome] += 1
        print(f"{report.outcome}: {report.nodeid} {report.duration:.1f} s", flush=True)
        if report.failed:
            why = str(report.longrepr).strip().splitlines()[-1:]
            self.plan.emit(TABLE, what=report.nodeid, note=" ".join(why)[:200], ok=False)


def run(plan: Plan) -> None:
    rows = Rows(plan)
    # Other files are not even read: reading all takes as long as these tests.
    files = [
        str(path)
        for path in sorted((runs.ROOT / "tests").glob("test_*.py"))
        if "gpu" in path.read_text(encoding="utf-8")
    ]
    words = [*files, "-m", "gpu and not slow", f"--device={plan.device.type}"]
    words += ["-p", "no:cacheprovider", "-q", f"--rootdir={runs.ROOT}"]
    status = pytest.main(words, plugins=[rows])
    if rows.files:
        rows.write_file()
    what = f"{rows.outcomes.total()} tests of {len(rows.files)} files"
    plan.emit(TABLE, what=what, note=counts(rows.outcomes), ok=status == 0)


def counts(outcomes: collections.Counter) -> str:
    return ", ".join(f"{outcomes[how]} {how}" for how in ("passed", "failed", "skipped"))
