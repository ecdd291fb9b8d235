"""The net under a refactoring: float64 runs are on their stored traces, and one bit, key or word is
seen."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parent / "reference"
sys.path.insert(0, str(REFERENCE))

import artifacts  # noqa: E402
import cases  # noqa: E402
import compare  # noqa: E402
import planted  # noqa: E402


def command(*words: str) -> str:
    """What the command prints; it must end well."""
    if not hasattr(os, "fork"):
        pytest.skip("the cases are run in forks, which this system lacks")
    line = [sys.executable, str(REFERENCE / "compare.py"), *words]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_runs_are_on_their_stored_traces(tmp_path):
    said = command("--traces", "muon", "more_steps", "ddp", "--jobs=1", f"--cache={tmp_path}")
    assert "3 of 3 cases on their stored traces" in said


@pytest.mark.slow
def test_every_float64_run_is_on_its_stored_trace(tmp_path):
    traced = sum(case.trace is not None for case in cases.CASES)
    assert f"{traced} of {traced} cases on their stored traces" in command(
        "--traces", f"--cache={tmp_path}"
    )


@pytest.mark.slow
def test_planted_faults_are_found(tmp_path):
    assert f"{len(planted.FAULTS)} of {len(planted.FAULTS)} planted faults found" in command(
        "--self-test", f"--cache={tmp_path}"
    )


@pytest.mark.parametrize("fault", planted.FAULTS, ids=lambda fault: fault.what)
def test_each_planted_fault_still_has_its_place(fault):
    planted.place_of(fault, compare.ROOT)


def test_every_traced_case_has_a_trace_and_names_are_unique():
    stored = json.loads(compare.TRACES.read_text(encoding="utf-8"))
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert set(stored) == {case.name for case in cases.CASES if case.trace is not None}
    assert cases.CHANGED.keys() <= set(names)


# ---- what a comparison sees ----------------------------------------------------------------------
ROW = '{"step": 1, "loss": 0.1, "grad_norm": 2.0, "step_s": 0.25, "mfu": null}\n'
SAVE = '{"step": 1, "event": "save"}\n'
SCREEN = (
    "commit 1a2b3c4-dirty, torch 2.13.0, x86_64 CPU, 1 rank(s)\n"
    "step 1/9  loss 0.1  3.1k tok/s  eta 00:04\n"
    "step 1/9  save\n"
    "see watch.py; train.py says: python logger.py plot RUN\n"
)
RECIPE = '# commit: 1a2b3c4\nlr = 0.1\n# here: device = "cpu"\n'


def write_run(
    folder: Path, row=ROW + SAVE, screen=SCREEN, recipe=RECIPE, shape=(2,), numbers=(1.0, 0.0)
) -> Path:
    """The files of a run of one step, with a tensor w of float64."""
    (folder / "out" / "step-00000001").mkdir(parents=True)
    (folder / "status.json").write_text('{"status": [[0]], "cpu": "AVX2"}')
    (folder / "1.rank0.out").write_text(screen)
    (folder / "out" / "metrics.jsonl").write_text(row)
    (folder / "out" / "config.toml").write_text(recipe)
    header = json.dumps({"w": {"dtype": "F64", "shape": shape, "data_offsets": [0, 16]}}).encode()
    data = len(header).to_bytes(8, "little") + header + struct.pack("<2d", *numbers)
    (folder / "out" / "step-00000001" / "rank_0.safetensors").write_bytes(data)
    body = {
        "step": 1,
        "tree": {"w": {"$": "tensor"}, "record": {"commit": "1a2b3c4", "data": "ab"}, "lrs": [0.5]},
    }
    (folder / "out" / "step-00000001" / "index.json").write_text(json.dumps({"body": body}))
    return folder


def facts(folder: Path, reworded=None) -> dict:
    return artifacts.facts(folder, {str(folder): "<folder>"}, reworded or {})


def difference(tmp_path: Path, **other) -> str | None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", **other)
    return compare.first_difference(facts(two), facts(one))


LATER = SCREEN.replace("1a2b3c4-dirty", "99ffee0").replace("3.1k", "72")
MOVED = SCREEN.replace("watch.py", "metrics/watch.py").replace("logger.py plot", "-m metrics.plot")


@pytest.mark.parametrize("other", [
    dict(row=SAVE + ROW.replace("0.25", "0.5")),  # a save is reported when it is done
    dict(screen=LATER.replace("00:04", "1 day, 2:00:00")),
    dict(screen=MOVED),
    dict(recipe=RECIPE.replace("1a2b3c4", "99ffee0")),
])  # fmt: skip
def test_what_cannot_be_the_same_twice_is_no_difference(tmp_path, other):
    assert difference(tmp_path, **other) is None


@pytest.mark.parametrize("other, seen", [
    (dict(row=ROW.replace("0.1", "0.10000000000000002") + SAVE), "loss: 0.10000000000000002, in"),
    (dict(row=ROW.replace("2.0", "2") + SAVE), "grad_norm: 2, in the base 2.0"),
    (dict(row=ROW.replace("grad_norm", "norm") + SAVE), "'norm'"),
    (dict(row=ROW.replace('"mfu": null', '"mfu": 0.5') + SAVE), "mfu"),
    (dict(row=ROW), "only in the base"),
    (dict(row=ROW + SAVE + SAVE.replace("save", "skip")), "skip"),
    (dict(screen=SCREEN.replace("says", "said")), "1.rank0.out line 2"),
    (dict(screen=SCREEN.replace("train.py", "main.py")), "line 2"),
    (dict(recipe=RECIPE.replace("here: ", "")), "config.toml line 3"),
    (dict(recipe=RECIPE.replace("1a2b3c4", "unknown")), "config.toml line 1"),
    (dict(numbers=(1.0, -0.0)), "the same numbers in other bits"),
    (dict(numbers=(1.0 + 2**-52, 0.0)), "the first at 0: np.float64(1.0000000000000002)"),
    (dict(shape=(2, 1)), "F64 [2, 1], in the base F64 [2]"),
])  # fmt: skip
def test_the_smallest_difference_is_seen(tmp_path, other, seen):
    assert seen in difference(tmp_path, **other)


def test_a_missing_checkpoint_and_a_changed_index_are_seen(tmp_path):
    one, two, three = (write_run(tmp_path / name) for name in ("one", "two", "three"))
    shutil.rmtree(two / "out" / "step-00000001")
    assert "only in the base" in compare.first_difference(facts(two), facts(one))
    index = three / "out" / "step-00000001" / "index.json"
    index.write_text(index.read_text().replace("0.5", "0.25"))
    assert "/tree/lrs/0: 0.25" in compare.first_difference(facts(three), facts(one))


def test_a_rewording_is_allowed_where_the_table_says_so(tmp_path):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", screen=SCREEN.replace("says", "writes"))
    assert compare.first_difference(facts(two), facts(one)) is not None
    assert compare.first_difference(facts(two), facts(one, {"says": "writes"})) is None


def test_what_has_changed_on_purpose_is_run_but_not_compared(tmp_path, monkeypatch, capsys):
    case = cases.one("a", needs=["tok/s"])
    folder = write_run(tmp_path / "one")
    monkeypatch.setattr(compare, "run_all", lambda *_: [(case, folder)])

    def counts(changed: dict) -> list[int]:
        return compare.checked([case], 1, tmp_path, lambda *_: "differs", lambda *_: "", changed)

    assert counts({}) == [0, 1] and counts({"a": "a better loss"}) == [0, 0]
    assert "a: changed on purpose, a better loss" in capsys.readouterr().out
    (folder / "1.rank0.out").write_text("nothing")  # it does not work
    assert counts({"a": "a better loss"}) == [0, 1]


def test_a_case_that_fails_or_does_not_do_what_it_is_for_is_no_reference(tmp_path):
    folder = write_run(tmp_path / "one")
    assert compare.broken(cases.one("a", needs=["tok/s", '"save"']), folder) is None
    rollback = cases.one("a", needs=["rollback"])
    assert "never said 'rollback'" in compare.broken(rollback, folder)
    assert compare.broken(rollback, folder, {"tok/s": "rollback"}) is None
    (folder / "1.rank0.err").write_text("train.py: no\n")
    assert "ended with [0], not 2: train.py: no" in compare.broken(
        cases.refused("a", "--lr=x"), folder
    )


def test_traces_are_held_to_their_tolerance(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "TRACES", tmp_path / "traces.json")
    folder = write_run(tmp_path / "one")
    stored = {"out loss": [[1, 0.1]], "out grad_norm": [[1, 2.0]]}
    for change, seen in ((1 + 1e-13, None), (1 + 1e-11, "out loss at step 1: 0.1, stored is")):
        traces = {"a": stored | {"out loss": [[1, 0.1 * change]]}}
        compare.TRACES.write_text(json.dumps(traces))
        found = compare.off_trace(cases.one("a"), folder)
        assert found is None if seen is None else seen in found
    compare.TRACES.write_text(json.dumps({"a": stored | {"out loss": [[1, 0.1], [2, 0.1]]}}))
    assert "is there for the steps [1], stored for [1, 2]" in compare.off_trace(
        cases.one("a"), folder
    )
    compare.TRACES.write_text(json.dumps({}))
    assert "no stored trace" in compare.off_trace(cases.one("a"), folder)
