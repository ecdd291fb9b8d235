"""The picture of a search: a person finds the best trial, each label, and what went wrong."""

import pytest

from search import proposals, results


@pytest.fixture
def figures(monkeypatch):
    from matplotlib.figure import Figure

    found, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *args, **more: (save(figure, *args, **more), found.append(figure)),
    )
    return found


class Result:  # what search/results.py asks of a trial
    def __init__(self, number: int, values: dict, status: str, value: float | None):
        self.number, self.values, self.status, self.value, self.error = (
            number,
            values,
            status,
            value,
            "",
        )
        self.name = f"trial-{number:04d}"

    def result(self, metric: str, worst: float):
        return worst if self.status == "diverged" else self.value

    def reached(self) -> int:
        return 12


def drawn(folder, search: dict, method="random", maximise=False) -> list[str]:
    proposed = proposals.Proposals(method, search, "val_loss", maximise, 0, 30)
    found = []
    for number in range(proposed.total):
        status = ("done", "pruned", "diverged", "done", "failed")[number % 5]
        trial = Result(number, {}, status, 2 + number / 9)
        proposed.begin(trial)
        found.append(trial)
    return results.tell(folder, found, search, "val_loss", maximise, lambda text: None)


FILES = [f"/data/somebody/a_long_name_of_a_text_{n}.txt" for n in range(9)]
PICTURES = {
    "a log search": {"lr": ("log", 1e-4, 1.0)},
    "less than a power of ten": {"lr": ("log", 9e-4, 1.1e-3), "weight_decay": ("log", 1e-3, 8e-3)},
    "many powers of ten": {"lr": ("log", 1e-12, 1.0), "dropout": ("lin", 0.0, 0.3)},
    "large numbers": {"steps": ("int", 100_000, 2_000_000), "eval_tokens": ("log", 1.0, 1e9)},
    "paths": {"lr": ("log", 1e-3, 8e-2), "data": FILES, "n_layer": ("int", 2, 6)},
    "many fields": {
        "lr": ["1e-3", "3e-3", "1e-2", "0.1"],
        "qk_norm": ["true", "false"],
        "opt.betas": ["0.9,0.95", "0.9,0.99", "0.95,0.999"],
        "dropout": ("lin", 0.0, 0.3),
        "batch_size": ["8", "16", "32", "64", "128"],
        "n_kv_head": ["none", "1"],
        "tokenizer": ["$a$", "a_{b", r"$\x{$"],
        "data": FILES[:1],
        "init_from": FILES[1:2],
        "data_dir": FILES[2:3],
        "arch": ["modern"],
        "activation": ["relu2"],
    },
    "many values": {"seed": [str(n) for n in range(40)]},
    "one value": {"lr": ["0.02"]},
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_has_the_best_trial_in_its_title_and_labels_side_by_side(tmp_path, figures, kind):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    search = PICTURES[kind]
    assert (
        drawn(tmp_path, search, "random") == [] and (tmp_path / "sweep.png").stat().st_size > 9000
    )
    figure = figures[-1]
    title = figure.get_suptitle()
    assert (
        title.startswith("Best (ringed): trial 0, val loss 2.0000, ") and "pruned (hollow)" in title
    )
    edge, draw = figure.bbox, FigureCanvasAgg(figure).get_renderer()
    inside = [figure._suptitle, *figure.legends]
    for ax in figure.axes:
        choice = search[ax.get_xlabel()]
        assert ax.get_xscale() == ("log" if choice[0] == "log" else "linear")
        low, high = ax.get_xlim()
        labels = [
            t for t in ax.get_xticklabels() if t.get_text() and low <= t.get_position()[0] <= high
        ]
        assert len(labels) >= min(3, len(choice)) or isinstance(choice, list)
        boxes = [label.get_window_extent(draw) for label in labels if not label.get_rotation()]
        assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:])), [
            label.get_text() for label in labels
        ]
        inside += labels + [ax.xaxis.label]
    for part in inside:
        box = part.get_window_extent(draw)
        assert edge.x0 - 1 <= box.x0 and box.x1 <= edge.x1 + 1, part
        assert edge.y0 - 1 <= box.y0 and box.y1 <= edge.y1 + 1, part
    # The points have their room, however long the labels below them.
    inches = [ax.get_window_extent().height / figure.dpi for ax in figure.axes]
    assert min(inches) > 2.4, inches
    below = figure._suptitle.get_window_extent(draw).y0
    assert all(ax.get_tightbbox(draw).y1 < below for ax in figure.axes)


@pytest.mark.parametrize("maximise", [False, True])
def test_the_best_is_ringed_and_what_is_far_worse_lies_at_the_rim(tmp_path, figures, maximise):
    found = [
        Result(n, {"lr": f"{n + 1}e-3"}, "done", y) for n, y in enumerate((2.0, 2.1, 2.2, 9.0))
    ]
    found += [Result(4, {"lr": "5e-3"}, "diverged", None)]
    if maximise:
        for trial in found[:4]:
            trial.value = -trial.value
    search = {"lr": [trial.values["lr"] for trial in found]}
    assert results.tell(tmp_path, found, search, "val_loss", maximise, print) == []
    ax, sign = figures[-1].axes[0], -1 if maximise else 1
    points = [tuple(map(float, at)) for dots in ax.collections for at in dots.get_offsets()]
    rim = pytest.approx(sign * (2.0 + 3 * 0.15))  # the median is 2.15
    assert points == [
        (0, sign * 2.0),
        (1, sign * 2.1),
        (2, sign * 2.2),
        (3, rim),
        (4, rim),
        (0, sign * 2.0),
    ]
    assert all(ax.get_ylim()[0] < y < ax.get_ylim()[1] for _, y in points)
    assert (
        figures[-1]
        .get_suptitle()
        .endswith("worse than this picture: " + ("▼" if maximise else "▲"))
    )


def test_listed_values_lie_as_far_apart_as_their_logarithms():
    def at(*texts):
        axis = results.Axis("lr", [*texts])
        return [round(axis.at(text), 3) for text in texts]

    assert at("1e-3", "1e-2", "1e-1") == [0, 1, 2]
    assert at("0.1", "1e-3", "3e-3", "1e-2") == [3, 0, 0.716, 1.5]
    # Side by side: less than ten times, a 0, words, and labels that would touch.
    assert at("2", "4", "6") == at("0", "1", "100") == at("a", "b", "c") == [0, 1, 2]
    assert at("1", "1.01", "100") == [0, 1, 2]
