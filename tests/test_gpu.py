"""The tests marked `gpu` are many, of many files, and have their tensors where --device says."""

import collections
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# A device whose name torch knows, and which nobody has built: whatever touches it raises.
RUN = """
import json, sys
import pytest, torch
torch.utils.rename_privateuse1_backend("nowhere")

class Writer:
    found = {}
    def pytest_collection_finish(self, session):
        for item in session.items:
            self.found[item.nodeid] = ["collected", item.fixturenames]
    def pytest_runtest_logreport(self, report):
        if report.when != "teardown" and report.outcome != "passed" or report.when == "call":
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash is not None else str(report.longrepr)
            self.found[report.nodeid] = [report.outcome, said]

writer = Writer()
pytest.main(sys.argv[2:], plugins=[writer])
with open(sys.argv[1], "w") as file:
    json.dump(writer.found, file)
"""


def reports(folder: Path, *arguments: str) -> dict[str, list]:
    """{test: [outcome, what it said]} of a pytest of its own, of all that is marked gpu."""
    file = folder / "reports.json"
    command = [
        sys.executable,
        "-c",
        RUN,
        str(file),
        str(HERE),
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*command, *arguments], cwd=HERE.parent, capture_output=True, text=True)
    assert file.exists(), done.stdout + done.stderr
    return json.loads(file.read_text())


def function(test: str) -> str:
    return test.partition("[")[0]


@pytest.fixture(scope="module")
def marked(request, tmp_path_factory) -> dict[str, list[str]]:
    """{test: its fixtures} of all that is marked gpu: this session's, if it has all of them."""
    sources = {path: path.read_text(encoding="utf-8") for path in HERE.glob("test_*.py")}
    marks = {path for path, text in sources.items() if "mark.gpu" in text or "gpu(" in text}
    if {item.path for item in request.session.items} >= marks:
        items = [item for item in request.session.items if item.get_closest_marker("gpu")]
        return {item.nodeid: item.fixturenames for item in items}
    found = reports(tmp_path_factory.mktemp("marked"), "--collect-only")
    return {test: fixtures for test, (_, fixtures) in found.items()}


def test_60_tests_of_15_files_are_marked_and_8_of_one_function_at_most(marked):
    assert len(marked) >= 60
    assert len({test.partition("::")[0] for test in marked}) >= 15
    most = collections.Counter(map(function, marked)).most_common(1)
    assert most[0][1] <= 8, most


def test_what_is_marked_takes_the_device_and_what_takes_it_is_marked(marked, request):
    assert [test for test, fixtures in marked.items() if "device" not in fixtures] == []
    functions = set(map(function, marked))
    takes = {i.nodeid for i in request.session.items if "device" in getattr(i, "fixturenames", ())}
    assert set(map(function, takes)) <= functions


@pytest.mark.slow
def test_no_tensor_of_a_marked_test_is_elsewhere(tmp_path):
    """On a device that does not exist every one of them fails, at a tensor or at --device."""
    found = reports(tmp_path, "--device=nowhere", "--tb=line")
    assert len(found) >= 60
    for test, (outcome, said) in found.items():
        assert outcome == "failed", f"{test}: {outcome} {said}"
        assert "No module named 'torch.nowhere'" in said or "--device=nowhere" in said, (test, said)
