"""Pictures of runs: what a person reads off them without a word of explanation."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from metrics import curves, labels, plot

ROOT = Path(__file__).parent.parent


def train_row(step, loss=None, **changes):
    """A loss that falls from 5.5 to 2.6 in a tenth of 200 steps, and to 1.5 in the rest."""
    if loss is None:
        loss = 1.5 + 3 * math.exp(-step / 6) + math.exp(-step / 60) + 0.02 * (step % 3)
    return dict(step=step, loss=loss, lr=2e-2, grad_norm=0.8, tokens=step * 512) | changes


def eval_row(step, val_loss):
    return dict(step=step, val_loss=val_loss)


FALL = [train_row(step) for step in range(1, 201)]
EVALS = [eval_row(0, 5.55), eval_row(100, 1.7), eval_row(150, 1.6), eval_row(200, 1.65)]
EVENTS = [
    dict(step=40, event="spike"),
    dict(step=60, event="spike"),
    dict(step=60, event="rollback", to=50),
    dict(step=90, event="skip"),
    dict(step=100, event="save"),
]


def run_of(rows, name="out", branch=None):
    return curves.Run(name, sorted(rows, key=lambda row: row["step"]), branch)


def drawn(*runs):
    return curves.draw([run if isinstance(run, curves.Run) else run_of(run) for run in runs])


def laid_out(*runs):
    """The figure after its layout, as a file has it: this takes most of the time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = drawn(*runs)
    FigureCanvasAgg(figure).draw()
    return figure


def lines(ax, **style):
    """Lines whose properties are these, such as marker="o"."""
    return [
        line
        for line in ax.lines
        if len(line.get_xdata())
        and all(getattr(line, f"get_{name}")() == value for name, value in style.items())
    ]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def write_run(folder, rows, config=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config:
        (folder / "config.toml").write_text(config)
    return folder


# ---- limits --------------------------------------------------------------------------------------
def limits(rows):
    """Lowest and highest loss of the picture, and what it says is cut off."""
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    note = curves.set_limits(ax, [run_of(rows)])
    return *ax.get_ylim(), note


def test_the_first_steps_do_not_spend_the_axis_and_what_is_cut_off_is_said():
    low, high, note = limits(FALL + EVALS)
    assert 1.3 < low < 1.6 and 2.3 < high < 2.8
    assert note == "above the picture: the first steps, from 5.55  (▲ validation)"


@pytest.mark.parametrize("rows", [FALL[:3], FALL[:20], [*EVALS]])
def test_a_short_run_is_shown_whole(rows):
    low, high, note = limits(rows)
    losses = [row.get("loss", row.get("val_loss")) for row in rows]
    assert low < min(losses) and max(losses) < high and note == ""


def test_a_start_that_takes_little_of_the_height_stays():
    rows = [train_row(step, loss=5 - step / 50) for step in range(1, 201)]
    assert limits(rows)[1] > 4.98 and limits(rows)[2] == ""


def test_a_spike_is_cut_off_and_a_lasting_rise_is_not():
    spike = [train_row(s, loss=1e30 if s == 120 else 2 + s % 2) for s in range(1, 201)]
    assert limits(spike)[1] < 4
    assert limits(spike)[2] == "above the picture: 1 later loss, up to 1e+30"
    rise = [train_row(s, loss=2 + max(0, s - 150) / 10) for s in range(1, 201)]
    assert limits(rise)[1] > 7 and limits(rise)[2] == ""
    # Few evaluations among many steps: an overfitting run is all in the picture.
    overfit = [eval_row(s, 1.5 + s / 100) for s in range(0, 201, 50)]
    assert limits(FALL + overfit)[1] > 3.5
    assert limits(FALL + EVALS + [eval_row(120, 1e9)])[1] < 3


def test_a_constant_loss_has_some_height():
    low, high, _ = limits([train_row(s, loss=2.0) for s in range(1, 100)])
    assert (low, high) == (1.5, 2.5)
    low, high, _ = limits([train_row(s, loss=2 + s % 2 * 1e-12) for s in range(1, 100)])
    assert low < 1.6 and high > 2.4


def test_a_bad_run_flattens_no_others_and_is_named():
    def run(name, end, **changes):
        rows = [train_row(s, loss=end + 3 * math.exp(-s / 20)) for s in range(1, 201)]
        return run_of(rows + changes.get("more", []), name)

    many = [run("a", 1.3), run("b_$", 1.4), run("c", 42.0)]
    _, (low, top), note = curves.limits(many)
    assert 1 < low < 1.3 and 1.4 < top < 6
    assert note.startswith(r"above the picture: all of c, from 42") and "later" not in note
    # Two are compared whatever lies between them, and near ones are never cut off.
    assert curves.limits([run("a", 1.3), run("c", 42.0)])[1][1] < 6
    flat = [train_row(s, loss=2 + s % 2 / 1000) for s in range(1, 201)]
    near = [run_of(flat, "a"), run_of(flat, "b"), run("c", 2.4)]
    assert "all of" not in curves.limits(near)[2] and curves.limits(near)[1][1] > 2.4
    rise = [train_row(s, loss=2 + max(0, s - 150) ** 4) for s in range(1, 201)]
    _, (_, top), note = curves.limits([*many[:2], run_of(rise, "diverged")])
    assert top < 6 and "later losses, up to 6.25e+06" in note and "all of" not in note
    worse = [run(f"bad{i}", 50.0 + i) for i in range(5)]
    note = curves.limits([run(f"good{i}", 1.3) for i in range(6)] + worse)[2]
    assert "all of bad1, from 51; 3 more runs" in note
    bad = run("$" + "c" * 300, 42.0)
    check_labels(laid_out(*many[:2], bad))


# ---- what is drawn -------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 3])
def test_training_is_thin_and_smoothed_in_one_hue_and_validation_is_dots(n):
    figure = drawn(*[run_of(FALL + EVALS, name=f"run{i}") for i in range(n)])
    ax = figure.axes[0]
    pale = lines(ax, linewidth=0.7)
    thick = lines(ax, linewidth=1.8)
    dots = lines(ax, marker="o", linestyle="None", markersize=6)
    assert len(pale) == len(thick) == len(dots) == n
    for a, b, c in zip(pale, thick, dots):
        assert a.get_color() == b.get_color() and a.get_alpha() < 0.5 and b.get_alpha() is None
        assert len(a.get_xdata()) == 200
        assert [*c.get_xdata()] == [100, 150, 200]  # step 0 lies above
        if n == 1:
            assert c.get_color() != a.get_color()
    assert [[*line.get_xdata()] for line in lines(ax, marker="^")] == [[0]] * n
    assert len({line.get_color() for line in thick}) == n
    # No other line joins evaluations.
    assert not [x for x in lines(ax, linestyle="-") if len(x.get_xdata()) == 4]
    assert figure.axes[0].get_title("left").endswith("(▲ validation)")


def test_smoothing_drops_a_spike_and_keeps_the_first_fall():
    run = run_of(FALL[:49] + [train_row(50, loss=99.0)] + FALL[50:])
    steps, medians = curves.smoothed(run, "loss")
    assert max(medians) < 5.6 and medians[0] == FALL[0]["loss"]
    assert steps[0] == 1 and steps[-1] == 200 and len(steps) <= 201
    # A branch begins in the middle of a curve: no fall to keep, so no raw value at its start.
    noisy = run_of([train_row(s, loss=9.0 if s == 101 else 2.0) for s in range(101, 201)])
    noisy.branch = ("out", 100)
    assert curves.smoothed(noisy, "loss")[1][0] == 2.0


def test_the_best_is_ringed_and_named_with_value_and_step():
    figure = drawn(FALL + EVALS)
    [ring] = lines(figure.axes[0], markersize=13)
    assert ([*ring.get_xdata()], [*ring.get_ydata()]) == ([150], [1.6])
    assert figure.get_suptitle() == (
        "out: best validation loss 1.6000 at step 150, 1.6500 at the end"
    )
    assert "best validation: 1.6000 at step 150" in legend_of(figure)


def test_with_an_average_its_validation_counts_and_its_dots_are_hollow():
    rows = [row | {"val_loss_ema": row["val_loss"] - 0.1} for row in EVALS[1:]]
    figure = drawn(FALL + EVALS[:1] + rows)
    assert "best validation loss 1.5000 at step 150, 1.5500 at the end" in figure.get_suptitle()
    [ring] = lines(figure.axes[0], markersize=13)
    assert [*ring.get_ydata()] == [1.5]
    full, hollow = lines(figure.axes[0], marker="o", linestyle="None", markersize=6)
    assert hollow.get_markerfacecolor() == "white" != full.get_markerfacecolor()
    assert [*full.get_ydata()] == [1.7, 1.6, 1.65]
    assert [*hollow.get_ydata()] == pytest.approx([1.6, 1.5, 1.55])
    assert "validation of the average" in legend_of(figure)


def test_of_several_runs_the_title_names_the_best():
    worse = [row | {"val_loss": row["val_loss"] + 1} for row in EVALS]
    figure = drawn(run_of(FALL + worse, "a"), run_of(FALL + EVALS, "b"), run_of(FALL, "c"))
    assert figure.get_suptitle().startswith("Best of 3 is b: best validation loss 1.6000")
    assert len(lines(figure.axes[0], markersize=13)) == 1
    assert legend_of(figure)[:3] == ["a", "b", "c"]


def test_events_are_ticks_with_their_names_and_numbers():
    figure = drawn(FALL + EVENTS)
    strip = figure.axes[1]
    names = [text.get_text() for text in strip.get_yticklabels()]
    assert names == ["spike (2)", "skip (1)", "rollback (1)"]
    ticks, back = {}, []
    for collection in strip.collections:
        for (x0, y0), (x1, y1) in collection.get_segments():
            if y0 == y1:
                back.append((x0, x1))
            else:
                ticks.setdefault(round((y0 + y1) / 2), []).append(x0)
    assert ticks == {0: [40, 60], 1: [90], 2: [60]} and back == [(50, 60)]
    assert strip.get_xlim() == figure.axes[0].get_xlim()


def test_lr_and_gradient_norm_lie_below_and_a_spike_of_the_norm_flattens_nothing():
    figure = drawn(FALL)
    assert [ax.get_ylabel() for ax in figure.axes[1:]] == ["lr", "gradient\nnorm"]
    assert figure.axes[2].get_yscale() == "linear"
    spiky = [row | {"grad_norm": 500.0 if row["step"] == 90 else 0.8} for row in FALL]
    figure = drawn(spiky)
    assert figure.axes[2].get_yscale() == "log"
    assert figure.axes[1].get_yscale() == "linear"
    # A logarithmic axis has no 0.
    zeros = [row | {"grad_norm": 9.0 if row["step"] == 90 else 0.0} for row in FALL]
    assert drawn(zeros).axes[2].get_yscale() == "linear"


def test_a_branch_is_marked_where_it_leaves(tmp_path):
    branch = FALL[100:] + EVALS[2:]
    config = 'resume = "runs/base/step-00000100"\n'
    write_run(tmp_path / "branch", branch, config)
    write_run(tmp_path / "newest", branch, 'resume = "runs/base"\n')
    write_run(tmp_path / "auto", FALL, 'resume = "auto"\n')
    write_run(tmp_path / "broken", FALL, "resume = \n")
    found = [
        plot.branch_of(tmp_path / name, rows)
        for name, rows in [("branch", branch), ("newest", branch), ("auto", FALL), ("broken", FALL)]
    ]
    assert found == [("runs/base", 100), ("runs/base", 100), None, None]
    figure = drawn(run_of(FALL, "base"), run_of(branch, "branch", found[0]))
    ax = figure.axes[0]
    [leaves] = lines(ax, linestyle=":")
    [begins] = lines(ax, marker="D")
    assert [*leaves.get_xdata()] == [100, 100] and [*begins.get_xdata()] == [101]
    assert leaves.get_color() == begins.get_color() == lines(ax, linewidth=1.8)[1].get_color()
    assert "branch leaves runs/base at step 100" in legend_of(figure)
    # Alone, the picture begins where the branch does.
    assert drawn(run_of(branch, "branch", found[0])).axes[0].get_xlim()[0] > 95


ODD = {
    "nulls": [row | ({"loss": None} if row["step"] % 3 else {}) for row in FALL],
    "NaN": [row | ({"loss": math.nan} if row["step"] == 7 else {}) for row in FALL],
    "no number": [row | ({"loss": "two"} if row["step"] == 7 else {}) for row in FALL],
    "too large for a float": [row | {"grad_norm": 10**400} for row in FALL],
    "one evaluation": FALL + [eval_row(100, 2.0)],
    "only one evaluation": [eval_row(0, 2.0)],
    "no evaluation": FALL,
    "three rows": FALL[:3],
    "one row": FALL[:1],
    "undone by a rollback": [FALL[k] for k in [*range(50), *range(20, 80)]],
    "no lr and no norm": [dict(step=row["step"], loss=row["loss"]) for row in FALL],
    "norm of 0": [row | {"grad_norm": 0.0 if row["step"] % 2 else 99.0} for row in FALL],
}


@pytest.mark.parametrize("case", ODD)
def test_odd_metrics_are_drawn(case):
    figure = drawn(ODD[case])
    ax = figure.axes[0]
    drawn_losses = [y for line in ax.lines for y in line.get_ydata()]
    assert drawn_losses and all(map(math.isfinite, drawn_losses))
    rows = {row["step"]: row for row in ODD[case] if curves.is_finite(row.get("loss"))}
    if rows:
        [pale] = [line for line in ax.lines if line.get_alpha()]
        assert [*pale.get_ydata()] == [rows[step]["loss"] for step in sorted(rows)]
    else:
        assert figure.get_suptitle() == "out: best validation loss 2.0000 at step 0"


def test_odd_metrics_share_a_picture():
    check_labels(laid_out(*[run_of(rows, name) for name, rows in ODD.items()]))


# ---- labels --------------------------------------------------------------------------------------
def boxes_of(figure):
    """The boxes of all words, by what they say."""
    found = {}
    render = figure.canvas.get_renderer()
    words = [figure._suptitle, *figure.legends[0].get_texts()]
    for ax in figure.axes:
        words += [ax.yaxis.label, ax.xaxis.label, ax._left_title]
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            for tick in axis.get_major_ticks():
                if min(low, high) <= tick.get_loc() <= max(low, high):
                    words.append(tick.label1)
            words.append(axis.get_offset_text())
        for top in ax.child_axes:
            words += [top.xaxis.label, top.xaxis.get_offset_text()]
            low, high = sorted(top.get_xlim())
            words += [t.label2 for t in top.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
    for k, word in enumerate(words):
        if word.get_text() and word.get_visible():
            found[k, word.get_text()] = word.get_window_extent(render)
    return found


def check_labels(figure):
    found = [*boxes_of(figure).items()]
    for i, (name, a) in enumerate(found):
        assert figure.bbox.x0 - 1 <= a.x0 and a.x1 <= figure.bbox.x1 + 12, name
        assert figure.bbox.y0 - 1 <= a.y0 and a.y1 <= figure.bbox.y1 + 1, name
        for other, b in found[i + 1 :]:
            assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1), (name, other)


def test_no_label_lies_over_another():
    spiky = [row | {"grad_norm": 500.0 if row["step"] == 90 else 0.8} for row in FALL]
    check_labels(laid_out(run_of(spiky + EVALS + EVENTS, "a/b" * 60, ("long/" * 40, 30))))
    figure = laid_out(*[run_of(FALL + EVALS, f"{i}-{'long' * 30}") for i in range(12)])
    check_labels(figure)
    # The curves have their room, however long the legend.
    assert figure.axes[0].get_window_extent().height / figure.dpi > 3.3


def moved(factor=1.0, first=0):
    return [
        row | {"loss": row["loss"] * factor, "step": first + row["step"], "tokens": 1000 * (k + 1)}
        for k, row in enumerate(FALL)
    ]


@pytest.mark.parametrize("factor, first", [(1e-8, 0), (1, 10**6), (1e15, 10**9), (1e30, 0)])
def test_no_size_hides_a_label_under_another(factor, first):
    rows = [row | {"tokens": 1000 * row["step"]} for row in moved(factor, first)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = laid_out(rows)
    check_labels(figure)
    loss = figure.axes[0]
    for axis in (loss.yaxis, loss.child_axes[0].xaxis, figure.axes[-1].xaxis):
        low, high = sorted(axis.get_view_interval())
        places = [x for x in axis.get_majorticklocs() if low <= x <= high]
        said = [*axis.get_major_formatter().format_ticks(places)]
        assert len({*said}) == len(said) >= 2, said
        assert axis.get_offset_text().get_text() == ""


def test_a_source_of_many_branches_has_one_row_of_the_legend():
    runs = [run_of(FALL, f"b{i}", ("base", 90 + i % 3)) for i in range(13)]
    figure = drawn(*runs, run_of(FALL, "c", ("other", 7)))
    left = [words for words in legend_of(figure) if "leaves" in words]
    assert left == ["13 runs: each leaves base at steps 90 to 92", "c leaves other at step 7"]
    assert len(lines(figure.axes[0], linestyle=":")) == 14


def test_a_legend_has_as_many_columns_as_fit():
    assert [labels.columns(words, 9) for words in (["a"], ["a" * 25, "b"], ["a" * 80])] == [
        11,
        3,
        1,
    ]


HOSTILE = ["$x^$", "a\nb\tc", r"\frac{$$", "_hidden", "l" * 500, "\x1b[31mred", "\udcff", "%s{}"]


def test_hostile_names_are_drawn_as_text():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as a sign that the font has no shape for
        figure = laid_out(*[run_of(FALL[:30] + EVALS, name) for name in HOSTILE])
    names = legend_of(figure)[: len(HOSTILE)]
    assert [name.replace(r"\$", "$").strip() for name in names] == [
        "$x^$",
        "a b c",
        r"\frac{$$",
        "_hidden",
        "…" + "l" * 39,
        "[31mred",
        "?",
        "%s{}",
    ]
    # Every $ is escaped: none begins a formula.
    for text in [*names, figure.get_suptitle()]:
        assert text.count("$") == text.count(r"\$")
    check_labels(figure)


def test_many_runs_have_as_many_colours():
    from matplotlib.colors import to_hex

    runs = [run_of(FALL[:3], str(i)) for i in range(14)]
    assert len({to_hex(color) for color in curves.hues(runs)}) == 14
    assert len({to_hex(color) for color in curves.hues(runs[:10])}) == 10


# ---- files and the command -----------------------------------------------------------------------
def test_several_runs_share_a_picture_and_a_table_the_best_first(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "a" / "run", FALL),
        write_run(tmp_path / "b" / "run", FALL + EVALS),
        write_run(tmp_path / "empty", [{"step": 0, "event": "resume"}]),
    ]
    assert plot.plot([str(run) for run in runs], tmp_path / "all.png")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{runs[2]}: no loss was logged, nothing to draw"
    assert [line.split() for line in said[1:]] == [
        "run steps best validation at step last validation last training".split(),
        ["b/run", "200", "1.6000", "150", "1.6500", f"{FALL[-1]['loss']:.4f}"],
        ["a/run", "200", f"{FALL[-1]['loss']:.4f}"],
    ]
    # One run needs no table.
    assert plot.plot(runs[0], tmp_path / "one.png") and capsys.readouterr().out == ""
    assert (tmp_path / "one.png").stat().st_size > 20_000


def test_a_loss_has_the_digits_that_say_something():
    said = [
        labels.loss_text(x) for x in (2.05, 1e-3, 9.99e-4, 1e-8, 0.0, -2.5, 1e30, 9999.5, 12345.6)
    ]
    wanted = "2.0500 0.0010 0.000999 1e-08 0.0000 -2.5000 1e+30 9999.5000 1.235e+04"
    assert " ".join(said) == wanted
    for size, words in ((1e30, "2.05e+30"), (1e-8, "2.05e-08"), (1, "2.0500")):
        runs = [
            run_of([*FALL, eval_row(1, 2.05 * size), eval_row(9, 2.050001 * size)], n) for n in "ab"
        ]
        # What is the same is not said twice.
        assert curves.title_of(runs[:1]) == f"a: best validation loss {words} at step 1"
        assert f"best validation: {words} at step 1" in legend_of(drawn(*runs))
        assert plot.table(runs).splitlines()[1].split()[2] == words


def test_a_hostile_branch_is_none(tmp_path):
    for k, digits in enumerate(("9" * 22, "9" * 400, "9" * 5000, "²", "")):
        folder = write_run(tmp_path / str(k), FALL, f'resume = "x/step-{digits}"\n')
        assert plot.branch_of(folder, FALL) == (f"x/step-{digits}", 0)
    assert plot.branch_of(write_run(tmp_path / "a", FALL, 'resume = "x/7"'), FALL) == ("x", 7)


def test_names_tell_folders_apart():
    assert plot.names_of(["x/a", "x/b"]) == ["a", "b"]
    assert plot.names_of(["x/a", "y/a", "y/b"]) == ["x/a", "y/a", "b"]
    assert plot.names_of(["a", "a"])[0].endswith("a")


def test_without_rows_there_is_a_sentence_and_no_picture(tmp_path, capsys):
    run = write_run(tmp_path / "run", [{"step": 0, "event": "resume"}])
    assert not plot.plot(run, tmp_path / "loss.png")
    assert "no loss was logged" in capsys.readouterr().out
    assert not (tmp_path / "loss.png").exists()


def test_the_command_draws_and_a_mistake_has_a_sentence(tmp_path, capsys):
    run = write_run(tmp_path / "run", FALL)
    plot.main([str(run)])
    assert capsys.readouterr().out == f"{run / 'loss.png'}\n"
    assert (run / "loss.png").stat().st_size > 20_000
    for args, words in [
        ([tmp_path / "nowhere"], "it has no metrics.jsonl"),
        ([], "usage: "),
        ([run, run, "--csv"], "usage: "),
        ([run, "--ouf=x.png"], "usage: "),
        ([run, f"--out={tmp_path}/x.xyz"], "xyz"),
    ]:
        with pytest.raises((OSError, ValueError), match=words):
            plot.main([str(arg) for arg in args])


def test_help_is_no_mistake_and_a_search_names_its_command(tmp_path, capsys):
    plot.main(["--help"])
    assert "draws RUN/loss.png" in capsys.readouterr().out
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(OSError, match="is the folder of a search: python -m metrics.report "):
        plot.main([str(tmp_path)])


def test_a_mistake_is_one_line_and_exit_status_2(tmp_path):
    argv = [sys.executable, "-m", "metrics.plot", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "it has no metrics.jsonl" in done.stderr and len(done.stderr.splitlines()) == 1
