"""The tests marked `gpu`, with their tensors on the GPU: a row for each that fails, then counts.

    python -m pytest -m "gpu and not slow" --device=cuda      the same by hand

The line of each test is printed as it ends, so that gpu.log names the one that hung.
"""

import collections

import pytest

from benchmarks import runs
from benchmarks.stages.plan import Plan

COVERS = (
    "memory/meter.py:Meter.watch",
    "parallel/launch.py:backend_of",
)
TABLE = "Tests: pytest -m gpu."


class Rows:
    """A plugin of pytest: every outcome a line, and what failed a row."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.outcomes = collections.Counter()
        self.files = set()

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.plan.rehearse:
            # The suite runs them all: here the first of each function is enough.
            firsts = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
            items[:] = [item for item in items if item in firsts.values()]

    def pytest_runtest_logreport(self, report) -> None:
        # A test has three reports. Its call says how it ended; the others only if they went wrong.
        if report.when != "call" and report.passed:
            return
        self.outcomes[report.outcome] += 1
        self.files.add(report.nodeid.partition("::")[0])
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
    n = rows.outcomes
    plan.emit(
        TABLE,
        what=f"{sum(n.values())} tests of {len(rows.files)} files",
        note=f"{n['passed']} passed, {n['failed']} failed, {n['skipped']} skipped",
        ok=status == 0,
    )
