"""Experiments: rows are measured once, each in a process of its own; verdicts follow from figures.
Most tests put a toy in an experiment's place, whose rows leave a line in a file each time they are
measured.
"""

import importlib.util
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import all as everything
from experiments import findings, protocol

ROOT = Path(__file__).parent.parent
NAMES = [path.stem for path in everything.experiments()]
needs_fork = pytest.mark.skipif(protocol.START != "fork", reason="this needs fork")
DOC = "Claim: twice\nas much.\n\nSource: x.\n"
GRID = [
    {"x": x, "name": name, "seed": seed}
    for x in (1, 0.1)
    for name in ("a", None)
    for seed in (1, 2)
]


def load(name: str):
    spec = importlib.util.spec_from_file_location(
        f"experiment_{name}", ROOT / "experiments" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy(
    folder: Path, *words: str, grid=GRID, small=GRID[:2], slow=0.0, fails=(), factor=2, jobs=2
) -> int:
    """The command of an experiment, its rows in folder/toy.csv: its exit status."""

    def row(keys: dict, quick: bool) -> dict:
        with open(folder / "measured", "a") as file:
            file.write(f"{keys['x']} {keys['name']} {keys['seed']} {quick} {os.getpid()}\n")
        time.sleep(slow if keys["x"] == 1 else 100 * slow)
        if keys["x"] in fails:
            raise RuntimeError("no such thing")
        return {"y": factor * keys["x"], "curve": [keys["x"], float("nan")], "pid": os.getpid()}

    def verdict(rows):
        twice = all(r["y"] == 2 * r["x"] for r in rows)
        return (
            "holds" if twice else "does not hold",
            f"{sum(r['y'] for r in rows):g}",
            f"of {len(rows)} rows",
        )

    words = [w for w in words if w] + [f"--jobs={jobs}"]
    words += [] if any(w.startswith("--out") for w in words) else [f"--out={folder}"]
    before, sys.argv, load_corpus = sys.argv, ["toy.py", *words], protocol.corpora.load
    protocol.corpora.load = lambda *_: None  # toys read none
    try:
        protocol.main(
            DOC,
            "toy.py",
            grid,
            small,
            row,
            lambda rows: f"{len(rows)} rows",
            lambda rows, figure: figure.subplots().plot([1, 2]),
            verdict,
        )
    except SystemExit as end:
        return end.code
    finally:
        sys.argv, protocol.corpora.load = before, load_corpus


def measured(folder: Path) -> list[str]:
    """Keys of the rows, as often as they were measured."""
    path = folder / "measured"
    return (
        [line.rsplit(" ", 2)[0] for line in path.read_text().splitlines()] if path.exists() else []
    )


# ---- rows
@needs_fork
def test_each_row_is_measured_once_in_a_process_of_its_own(tmp_path):
    assert toy(tmp_path) == 0
    rows = protocol.read(tmp_path / "toy.csv")
    assert [{k: r[k] for k in GRID[0]} for r in rows] == GRID
    assert [r["y"] for r in rows] == [2] * 4 + [0.2] * 4
    assert len({r["pid"] for r in rows} | {os.getpid()}) == 9
    assert rows[0]["curve"][0] == 1 and rows[0]["curve"][1] != rows[0]["curve"][1]  # NaN comes back
    assert all(
        r["commit"] and r["date"] and "cores" in r["machine"] and r["seconds"] >= 0 for r in rows
    )
    before = (tmp_path / "toy.csv").read_bytes(), (tmp_path / "toy.md").read_bytes()
    assert toy(tmp_path) == 0 and len(measured(tmp_path)) == 8  # nothing is left to do
    assert ((tmp_path / "toy.csv").read_bytes(), (tmp_path / "toy.md").read_bytes()) == before
    assert toy(tmp_path, grid=[{"x": 5, "name": "a", "seed": 1}, *GRID]) == 0
    assert measured(tmp_path)[8:] == ["5 a 1"] and protocol.read(tmp_path / "toy.csv")[0]["x"] == 5


@needs_fork
def test_a_killed_run_goes_on_row_by_row_and_leaves_nobody_behind(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=toy, args=(tmp_path,), kwargs=dict(slow=0.3)
    )
    process.start()
    deadline = time.monotonic() + 20
    while len(measured(tmp_path)) < 5 and time.monotonic() < deadline:  # into rows that take 30 s
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done, begun = protocol.read(tmp_path / "toy.csv"), measured(tmp_path)
    assert 3 <= len(done) < len(begun) < 8
    pids = [int(line.split()[-1]) for line in (tmp_path / "measured").read_text().splitlines()]
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline  # rows die with the command, not at their own end
    assert toy(tmp_path) == 0
    kept = {(r["x"], r["name"], r["seed"]) for r in done}
    missing = [f"{g['x']} {g['name']} {g['seed']}" for g in GRID if tuple(g.values()) not in kept]
    assert sorted(measured(tmp_path)[len(begun) :]) == sorted(missing)
    rows = protocol.read(tmp_path / "toy.csv")
    # As they were, to the pid; a later row may have ended before an earlier one.
    assert [r for r in rows if (r["x"], r["name"], r["seed"]) in kept] == done


@needs_fork
def test_a_row_that_fails_or_is_killed_has_no_figures_and_the_others_have(tmp_path, capsys):
    assert toy(tmp_path) == 0 and (tmp_path / "toy.png").exists()
    more = [{"x": x, "name": "a", "seed": 1} for x in (7, 8)]
    assert toy(tmp_path, grid=GRID + more, fails=(7,)) == 1
    assert "no such thing" in capsys.readouterr().err
    assert [r["x"] for r in protocol.read(tmp_path / "toy.csv")][8:] == [8]
    text = (tmp_path / "toy.md").read_text()
    assert (
        "unfinished: 9 of 10 rows" in text
        and "holds" not in text
        and not (tmp_path / "toy.png").exists()
    )
    assert toy(tmp_path, grid=GRID + more) == 0 and measured(tmp_path)[-1] == "7 a 1"
    assert "**Verdict.** holds: of 10 rows" in (tmp_path / "toy.md").read_text()


@needs_fork
def test_two_commands_do_not_share_a_csv(tmp_path, capsys):
    process = multiprocessing.get_context("fork").Process(
        target=toy, args=(tmp_path,), kwargs=dict(slow=0.5)
    )
    process.start()
    while not measured(tmp_path):
        time.sleep(0.01)
    assert toy(tmp_path) == 2 and "is in use by" in capsys.readouterr().err
    process.kill()
    process.join()


@needs_fork
def test_quick_never_writes_to_the_results(tmp_path, capsys):
    assert toy(tmp_path, "--quick", f"--out={protocol.RESULTS}") == 2
    assert "--quick measures too little" in capsys.readouterr().err
    assert toy(tmp_path, "--quick", f"--out={tmp_path / 'new' / 'folder'}") == 0
    assert [line.split()[3] for line in (tmp_path / "measured").read_text().splitlines()] == [
        "True"
    ] * 2
    assert len(protocol.read(tmp_path / "new" / "folder" / "toy.csv")) == 2
    assert toy(tmp_path, "--quik") == toy(tmp_path, "--jobs=0") == 2
    assert not [path for path in protocol.RESULTS.iterdir() if "toy" in path.name]


# ---- what people read
@needs_fork
def test_the_page_says_claim_verdict_number_and_how_to_get_them(tmp_path):
    assert toy(tmp_path) == 0
    text = (tmp_path / "toy.md").read_text()
    for part in (
        "# toy\n",
        "**Claim.** Twice as much.\n",
        "**Verdict.** holds: of 8 rows\n",
        "8 rows\n",
        "**Number.** 8.8\n",
        "![toy](toy.png)",
        "`python -m experiments.toy`; commit ",
        "; seeds 1, 2; ",
    ):
        assert part in text
    assert "several commits" not in text


@needs_fork
def test_rows_of_several_commits_are_said_to_be_so(tmp_path):
    toy(tmp_path)
    rows = protocol.read(tmp_path / "toy.csv")
    rows[3]["commit"] = "353e154"  # no number
    protocol.write(tmp_path / "toy.csv", rows)
    assert toy(tmp_path) == 0
    text = (tmp_path / "toy.md").read_text()
    assert "**rows of several commits**" in text and "353e154 (1 rows)" in text


@needs_fork
def test_the_verdict_follows_the_figures(tmp_path):
    assert toy(tmp_path, factor=3) == 0
    assert "**Verdict.** does not hold: of 8 rows" in (tmp_path / "toy.md").read_text()


def test_mup_transfers_verdict_follows_the_figures():
    mup = load("mup_transfer")

    def rows(*best: float, deep: float = -1, grows: float = 1, **more) -> list[dict]:
        """Rows whose loss is least at best[i] (factors of 2 above the first width's) of the i-th
        case."""
        low, shift, found = {"adamw": -7, "lion": -10, "muon": -5}, dict(zip(mup.CASES, best)), []
        for g in mup.GRID:
            away = shift[g["optim"], g["mup"]] * (g["width"] == 512) + deep * (g["layers"] == 16)
            rms = g["width"] ** (0 if g["mup"] else grows)
            loss = 1 + abs(away + low[g["optim"]] - math.log2(g["lr"]))
            found.append(g | {"loss": loss, "last MLP": rms, "logits": rms, "seconds": 1} | more)
        return found

    good = rows(0, -3, 0, -2, 0, 0)
    assert mup.verdict(good)[0] == mup.verdict(rows(1, -2, -1, -3, 0, 1))[0] == "holds"
    bad = [
        rows(2, -3, 0, -2, 0, 0),
        rows(0, -1, 0, -2, 0, 0),
        rows(0, -3, 0, -2, 0, 2),
        rows(0, -3, 0, -2, 0, 0, deep=0),
        rows(0, -3, 0, -2, 0, 0, grows=0.3),
    ]
    assert [mup.verdict(r)[0] for r in bad] == ["holds in part"] * 5
    at = mup.sizes(good, "width", part="width", optim="adamw", mup=False)
    assert mup.moved(at) == -3 and mup.price(at) == 3  # loss 4 at the narrow one's lr, 1 at its own
    assert math.isnan(
        mup.price(
            mup.sizes(
                [
                    (
                        r | {"loss": r["loss"] if r["lr"] < 2**-8 else math.nan}
                        if r["width"] == 512
                        else r
                    )
                    for r in good
                ],
                "width",
                part="width",
                optim="adamw",
                mup=False,
            )
        )
    )


def test_precisions_verdict_follows_the_figures():
    precision = load("precision")
    loss = {"fp32": 1.0, "bf16": 1.001, "fp8 tensor": 2.0, "fp16 x 2^-10": 1.2}
    good = [
        g
        | {
            "val_loss": loss.get(g["case"], 1.001),
            "lost_-10": 0.5,
            "lost_0": 0.1,
            "lost_16": 0.001,
            "kept": {"fp32": 100, "bf16": 50}.get(g["case"], 25),
            "errors": [0.1] * 13,
        }
        for g in precision.GRID
    ]
    assert precision.verdict(good)[0] == "holds" and len(precision.parts(good)) == 8
    for part, case, figure, bad in (
        ("default", "bf16", "val_loss", 1.0035),
        ("fp16", "fp16", "val_loss", 0.996),
        ("default", "fp8 block", "val_loss", 1.004),
        ("default", "fp8 block", "val_loss", float("nan")),
        ("fp16", "fp16", "val_loss", 1.004),
        ("fp16", "fp16 x 2^-10", "val_loss", 1.0),
        ("default", "fp32", "lost_16", 0.05),
        ("outlier", "fp8 tensor", "val_loss", 1.005),
        ("bytes", "bf16", "kept", 62),
        ("bytes", "fp8 block", "kept", 50),
    ):
        rows = [r | {figure: bad} if (r["part"], r["case"]) == (part, case) else r for r in good]
        word, _, why = precision.verdict(rows)
        assert word == "holds in part" and "not so" in why, (part, case, figure, bad)


def picture_of(name: str):
    """The figure that an experiment draws from its committed figures, after its layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    module = load(name)
    figure = Figure(layout="constrained")
    module.picture(protocol.read(protocol.RESULTS / f"{name}.csv"), figure)
    FigureCanvasAgg(figure).draw()
    return figure


def test_an_optimizer_that_misses_the_target_has_no_bar_and_each_curve_its_name():
    from matplotlib.text import Text

    figure = picture_of("optimizers")
    bars, _, means = figure.axes
    said = [text.get_text() for text in bars.texts]
    assert said.count("not within 600") == 3 and len(bars.patches) == len(said) - 3
    names = [text for text in means.texts if text.get_text()]
    assert len(names) == len(said)
    # An annotation's own box would hold its line, too.
    boxes = sorted((Text.get_window_extent(text) for text in names), key=lambda box: box.y0)
    assert all(a.y1 <= b.y0 for a, b in zip(boxes, boxes[1:]))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_a_decay_of_0_is_0_on_the_axis():
    decays = picture_of("weight_decay").axes[0]
    labels = [text.get_text() for text in decays.get_xticklabels()]
    assert labels[0] == "0" and labels[-1] == "1"
    zero = decays.get_xticks()[0]
    starts = [min(bar.get_segments(), key=lambda x: x[0][0])[0][0] for bar in decays.collections]
    assert starts == [zero, zero]


def test_many_points_have_a_shade_and_few_have_bars():
    from matplotlib.figure import Figure

    few, many, dots = Figure().subplots(3)
    findings.line(few, {k: [1, 2] for k in range(12)}, "few")
    findings.line(many, {k: [1, 3] for k in range(13)}, "many")
    findings.line(dots, {k: [1, 2] for k in range(13)}, "dots", ls="", marker="o")
    assert len(few.containers) == len(dots.containers) == 1 and not many.containers
    [shade] = many.collections
    low, high = shade.get_paths()[0].get_extents().intervaly
    assert (low, high) == pytest.approx((2 - 2**0.5, 2 + 2**0.5))


def test_a_curve_ends_at_the_first_mean_above_the_picture_without_its_deviation():
    up_to = load("large_batch").up_to
    assert up_to(2, {1: [1, 1.5], 2: [1, 5], 4: [1]}) == {1: [1, 1.5], 2: [3]}
    assert [*up_to(2, {1: [1], 2: [math.nan], 4: [1]})] == [1, 2]


def test_gaps_are_paired_by_seed():
    rows = [
        dict(case=case, seed=s, loss=s * x)
        for case, x in (("a", 1), ("b", 1.01))
        for s in (1, 2, 3)
    ]
    found = findings.paired(
        findings.pick(rows, case="b")[::-1], findings.pick(rows, case="a"), "loss"
    )
    assert found == pytest.approx([0.01] * 3)
    assert (
        findings.mean_sd([1.0, 2.0, 3.0]) == (2, 1)
        and findings.mean_sd([1.0, float("nan")])[1] != 0
    )
    assert findings.plus_minus([0.01, 0.02], "+.1%") == "+1.5% ± 0.7%"


# ---- every experiment
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_says_what_it_claims_expects_and_does_before_it_runs(name):
    module = load(name)
    for part in ("Claim", "Source", "Protocol", "Expected"):
        assert f"{part}: " in module.__doc__, part
    for grid in (module.GRID, module.QUICK):
        assert len({tuple(keys) for keys in grid}) == 1 and len(
            {str(keys) for keys in grid}
        ) == len(grid)


def test_the_index_has_a_line_for_each_experiment(tmp_path):
    page = "# x\n\n**Claim.** a | b\n\n**Verdict.** holds: c\n\n**Number.** 3\n"
    (tmp_path / "precision.md").write_text(page)
    lines = everything.index(tmp_path).splitlines()
    assert len(lines) == 2 + len(NAMES) and {"mup_transfer", "precision"} <= {*NAMES}
    assert "| [precision](results/precision.md) | a \\| b | holds: c | 3 |  |" in lines
    assert any(
        "[mup_transfer](mup_transfer.py)" in line and "not run yet" in line for line in lines
    )


@needs_fork
def test_two_ranks_in_a_row_are_one_process():
    small = dict(
        steps=2, n_layer=1, n_embd=32, block_size=32, batch_size=4, eval_every=0, precision="fp32"
    )
    one, two = (protocol.curve(protocol.train_run(ranks, **small)) for ranks in (1, 2))
    assert len(one) == 2 and two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_experiment_is_taken_for_a_package_of_the_same_name(name):
    """`precision`, `search`, `schedules`: as experiments.NAME it leaves NAME what it is."""
    import importlib

    importlib.import_module(f"experiments.{name}")
    for place in (ROOT / f"{name}.py", ROOT / name / "__init__.py"):
        if place.exists():
            assert importlib.import_module(name).__file__ == str(place)
    assert "sys.path.insert" not in (ROOT / "experiments" / f"{name}.py").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_quick_form_runs_and_leaves_the_results_alone(name, tmp_path):
    command = [
        sys.executable,
        "-m",
        f"experiments.{name}",
        "--quick",
        f"--out={tmp_path}",
    ]
    mine = [
        path for path in protocol.RESULTS.iterdir() if path.stem == name and path.suffix != ".csv"
    ]
    before = {path: path.stat().st_mtime_ns for path in mine}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{kind}" for kind in ("csv", "md", "png")
    }
    text = (tmp_path / f"{name}.md").read_text()
    assert "**Verdict.** " in text and "unfinished" not in text and "--quick`" in text
    assert {path: path.stat().st_mtime_ns for path in before} == before
