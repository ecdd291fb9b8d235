"""The page about runs: what a stranger's files say is text, nothing is fetched, spikes stay, and
what is missing is said."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import sweep
import train
from metrics import report
from metrics.labels import tick_labels
from metrics.report_chart import WIDTH, Curve, chart, label, path_of, thinned, ticks
from metrics.report_curves import limits
from metrics.report_page import MOST_ROWS, page, tag, text
from metrics.report_read import MAXIMISED
from metrics.report_search import over_field
from settings import parse

ROOT = Path(__file__).parent.parent
LOSSES = {"a": 1.3, "b": 1.4, "LR$3": 42.0}
JS = ("text", "ticks", "tickLabels")  # functions of report.js
EVIL = '</script><img src=x onerror="document.title=1"><script>document.title=2</script>\'"&\u202e'
# What is seen of it: the last character would turn round what follows.
SEEN = EVIL.replace("\u202e", "\ufffd")


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, content: str):
        super().__init__()
        self.tags = []
        self.attributes = []
        self.said = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes

    def handle_data(self, words):
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.said += words

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def train_row(step: int, **fields) -> dict:
    row = dict(step=step, loss=2 + 1 / step, lr=0.01, grad_norm=1.0, tokens=64 * step)
    return row | dict(tokens_per_s=1e4, step_s=0.5, peak_bytes=2**28) | fields


@pytest.fixture
def make(tmp_path):
    """make(name, rows, config=..., tail=...) -> the folder of a run."""

    def made(name: str, rows: list[dict], config: str = "steps = 3\n", tail: str = "") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "metrics.jsonl").write_text("".join(lines) + tail, encoding="utf-8")
        (folder / "config.toml").write_text(config, encoding="utf-8")
        return folder

    return made


def said(folders) -> str:
    return Reader(report.build(folders if isinstance(folders, list) else [folders])).said


def paths(content: str, name: str) -> list[list[tuple[float, float]]]:
    """The points (x, y) of each path of this name; y is a logarithm on a logarithmic axis."""
    found = []
    for svg in content.split('<svg class="chart"')[1:]:
        left, right, low, high = map(float, re.search(r'data-scale="([^"]*)"', svg)[1].split())
        for d in re.findall(rf'<path d="([^"]*)"[^>]* data-name="{name}"', svg):
            pairs = [map(float, pair) for pair in re.findall(r"(-?[\d.]+),(-?[\d.]+)", d)]
            values = [(left + x * (right - left), high - y * (high - low)) for x, y in pairs]
            found.append([(round(x, 4), round(y, 3)) for x, y in values])
    return found


# ---- strangers -----------------------------------------------------------------------------------
def check_inert(content: str) -> Reader:
    """One script, ours, known to the policy by its hash; nothing is fetched; no tag but ours."""
    reader = Reader(content)
    script = (ROOT / "metrics" / "report.js").read_text(encoding="utf-8")
    assert re.findall(r"<script>(.*?)</script>", content, re.S) == [script]
    ours = "html head meta title style body h1 h2 h3 p ul li div table tr th td span b details "
    ours += "summary svg path text g rect label input script"
    assert {*reader.tags} <= {*ours.split()}
    assert reader.tags.count("script") == reader.tags.count("style") == 1
    names = {name for name, _ in reader.attributes}
    fetching = {"src", "href", "xlink:href", "action", "background", "poster", "style", "srcset"}
    assert not names & fetching and not [name for name in names if name.startswith("on")]
    css = (ROOT / "metrics" / "report.css").read_text(encoding="utf-8")
    assert "url(" not in css and "@import" not in css
    addresses = {*re.findall(r"https?://[\w./]+", script + css)}
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    policy = reader.values("content")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    return reader


def plant(folder: Path) -> None:
    """Hostile words wherever a file may hold some."""
    folder.mkdir(parents=True)
    wild = [EVIL, None, True, [1], {"a": EVIL}, 10**400, -1e308, 1e308, 1.5]
    rows = []
    for step in range(1, 2 * len(wild)):
        fields = "loss val_loss val_loss_ema lr grad_norm tokens tokens_per_s step_s peak_bytes"
        row = {name: wild[(step + i) % len(wild)] for i, name in enumerate(fields.split())}
        rows.append({"step": step, EVIL: step, f"{EVIL}/1": 2.0} | row)
    for event in (EVIL, [EVIL], {"x": EVIL}, "rollback", "spike"):
        rows += [dict(step=3, event=event, to=EVIL), dict(step=4, event=event, text=EVIL)]
    rows += [dict(step=step, loss=1.0) for step in (10**400, -4, True, "1", None)]
    lines = [json.dumps(row) for row in rows] + ["[1, 2]", "null", "[" * 99_999, '{"step": 5, "lo']
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    word = json.dumps(EVIL)
    config = f"# commit: {EVIL}\n# ranks: <b>\ntokenizer = {word}\ndata = {word}\narch = {word}\n"
    config += (
        f'steps = "many"\npatience = {word}\nresume = {word}\nlr = nan\nx = [1, {{a = {word}}}]\n'
    )
    config += f"{word} = 1\n[chosen]\noptim = {word}\nday = 1979-05-27T07:32:00Z\n"
    (folder / "config.toml").write_text(config, encoding="utf-8")
    counts = {"1": 3, "x": 4, "2": EVIL, "99999": 2, "--5": 3, "-": 1, "": 1, "²": 2, "-\n": 1}
    histograms = [dict(step=1, kind=EVIL, counts=counts)]
    histograms += [dict(step=1, kind=[EVIL], counts={"-3": 1}), dict(step=2, counts=[EVIL])]
    text_of = "\n".join(map(json.dumps, histograms))
    (folder / "histograms.jsonl").write_text(text_of, encoding="utf-8")
    loads = [dict(step=1, tokens={"0": [1, 0, 3]}), dict(step=2, tokens={EVIL: [1]})]
    (folder / "moe_load.jsonl").write_text("\n".join(map(json.dumps, loads)), encoding="utf-8")
    trial = dict(values={EVIL: EVIL, "lr": EVIL}, status=EVIL, error=EVIL)
    (folder / "trial.json").write_text(json.dumps(trial), encoding="utf-8")


def test_hostile_words_are_text(tmp_path):
    run = tmp_path / '<img src=x onerror=a>"&$x$'
    plant(run)
    reader = check_inert(report.build([run]))
    for words in (SEEN, f"{run.name}: best validation loss", "rollback"):
        assert words in reader.said
    assert any(name.startswith(SEEN[:39]) for name in reader.values("data-name"))
    assert "9 lines are left out of metrics.jsonl" in reader.said


def test_hostile_words_of_a_search_are_text(tmp_path):
    for k in range(3):
        plant(tmp_path / "s" / f"trial-000{k}")
    search = {f"search.{EVIL}": ["a", EVIL], "search.lr": ["log", 1, EVIL], "metric": [EVIL]}
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(search), encoding="utf-8")
    reader = check_inert(report.build([tmp_path / "s"]))
    assert SEEN in reader.said and "Search s: 3 trials" in reader.said
    (tmp_path / "s" / "sweep.json").write_text("{", encoding="utf-8")
    assert "sweep.json is damaged" in said(tmp_path / "s")


def test_text_escapes_all_that_is_not_our_markup():
    assert text("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert (
        tag("p", "<b>", tag("b", "&"), class_='"') == '<p class="&quot;">&lt;b&gt;<b>&amp;</b></p>'
    )
    assert text("a\x00\x1b\udcff\u2066b\n") == "a\ufffd\ufffd?\ufffdb\n"


@pytest.mark.slow
def test_a_browser_runs_our_script_alone(tmp_path):
    """Where there is one: the policy lets the script run, and a planted one not."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no chromium here")
    plant(tmp_path / "run")
    content = report.build([tmp_path / "run"])
    planted = content.replace("<h1>", "<script>document.title='planted'</script><h1>", 1)
    for i, page_ in enumerate((content, planted)):
        path = tmp_path / f"{i}.html"
        path.write_text(page_, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command = [browser, *options, f"--user-data-dir={tmp_path}/profile", path.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
        assert 'class="tip"' in dom and "<title>run</title>" in dom


# ---- curves --------------------------------------------------------------------------------------
def test_a_spike_stays_and_a_page_is_small(make):
    rows = [train_row(step) for step in range(1, 8001)]
    rows[4321]["loss"] = 50.0
    rows[4321]["grad_norm"] = 900.0
    content = report.build([make("long", rows)])
    raw = paths(content, "training, each step")[0]
    assert (4322, 50.0) in [(round(x), y) for x, y in raw]
    assert round(raw[0][0]) == 1 and raw[0][1] == 3 and round(raw[-1][0]) == 8000
    assert len(raw) <= 4000 and len(content) < 600_000


@pytest.mark.slow
def test_a_hundred_thousand_rows_make_three_megabytes_at_most(make):
    watched = {f"max_logit/{layer}": 1.0 + layer for layer in range(12)}
    rows = []
    for step in range(1, 100_001):
        noise = (step * 7919 % 1000) / 1000
        rows.append(train_row(step, loss=2 + noise, grad_norm=noise, tokens_per_s=noise) | watched)
        if step % 10 == 0:
            rows.append(dict(step=step, val_loss=2 + noise, perplexity=8.0 + noise))
            rows.append(dict(step=step, event="spike", text="a" * 1000))
    one = make("a", rows)
    assert len(report.build([one])) <= 3e6
    others = [make(f"b{k}", rows[k::40]) for k in range(45)]
    assert len(report.build([one, *others])) <= 3e6


def test_thinning_keeps_the_ends_of_each_stretch():
    points = [(x, (x * 37) % 101) for x in range(1000)]
    kept = thinned(points, 50)
    assert len(kept) <= 100 and kept == sorted(kept) and {*kept} <= {*points}
    for first in range(0, 980, 20):
        stretch = [y for x, y in points if first <= x < first + 20]
        mine = [y for x, y in kept if first <= x < first + 20]
        assert (min(mine), max(mine)) == (min(stretch), max(stretch))
    assert thinned(points[:100], 50) == points[:100]
    assert thinned([(x, None) for x in range(1000)], 2)[0] == (0, None)


def test_a_path_holds_shares_of_the_picture_and_leaves_gaps():
    points = [(1, 2.5), (2, None), (3, 1e9), (4, 0.125)]
    line = Curve("a", points, "red")
    assert path_of(line, float, (0, 4), (0, 1), 100) == "M.25,-1.5h0M.75,-1000000 1,.875"
    dots = Curve("a", points, "red", "dots")
    assert path_of(dots, float, (0, 4), (0, 1), 100) == "M.25,-1.5h0M.75,-1000000h0M1,.875h0"


@pytest.mark.parametrize("size", [1e30, 1e-8, 1e299])
@pytest.mark.parametrize("first", [1, 10**9, 2**53 - 300])
def test_no_size_and_no_step_is_beyond_a_browsers_numbers(make, size, first):
    rows = [train_row(first + k, loss=size * (1 + 1 / (k + 1)), tokens=k) for k in range(200)]
    content = report.build([make("run", [*rows, dict(step=first, event="spike")])])
    assert {*re.findall(r'class="view"[^>]*viewBox="([^"]*)"', content)} <= {"0 0 1 1"}
    assert {*re.findall(r'viewBox="([^"]*)"[^>]*class="view"', content)} <= {"0 0 1 1"}
    [d] = re.findall(r'<path d="([^"]*)"[^>]* data-name="training, each step"', content)
    pairs = [tuple(map(float, pair.split(","))) for pair in d.strip("M").split()]
    # Each step has a place of its own, all but the first fall are in the frame.
    assert len({x for x, _ in pairs}) == 200 and all(0 <= x <= 1 for x, _ in pairs)
    assert sum(0 <= y <= 1 for _, y in pairs) > 150 and pairs[0][1] < pairs[-1][1]
    [d] = re.findall(r'<path d="([^"]*)"[^>]* data-name="spike"', content)
    assert 0 <= float(d.strip("M").split(",")[0]) <= 1


@pytest.mark.parametrize("low, high", [(0, 1), (1.8, 5.55), (-3, 1e6), (0.0199, 0.0201), (0, 7e-9)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high * (1 + 1e-12)
    digits = f"{found[1] - found[0]:.3e}".split("e")[0]
    assert digits in ("1.000", "2.000", "5.000")


@pytest.mark.parametrize(
    "low, high, wanted",
    [
        (150_000, 150_060, ["150,000", "150,010", "150,020", "150,030", "150,040"]),
        (1_000_000, 1_000_060, ["1,000,000", "1,000,010", "1,000,020"]),
        (10**9, 10**9 + 60, ["1,000,000,000", "1,000,000,010"]),
        (0, 1500, ["0", "200", "400"]),
        (100_000, 200_000, ["100k", "120k", "140k"]),
        (150_000, 151_500, ["150.0k", "150.2k"]),
        (0, 5e9, ["0", "1B", "2B"]),
        (0, 5e10, ["0", "10B", "20B"]),
        (0.985, 1.015, ["1"]),
        (1.5e30, 2e30, ["1.5e+30", "1.6e+30"]),
        (1.5e-8, 2e-8, ["1.5e-08", "1.6e-08"]),
        (-1.5, 3.1, ["-1", "0", "1"]),
        (1.3, 1.62, ["1.30", "1.35", "1.40"]),
    ],
)
def test_no_two_ticks_are_labelled_alike(low, high, wanted):
    found = tick_labels(ticks(low, high, 8, is_whole=high > 100 or high < 1.1 > low > 0.1))
    assert len({*found}) == len(found)
    assert tick_labels([1.0, 1.25, 1.5]) == ["1.00", "1.25", "1.50"]
    assert found[: len(wanted)] == wanted


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_a_zoom_labels_as_the_page_does():
    script = (ROOT / "metrics" / "report.js").read_text(encoding="utf-8")
    parts = [re.search(rf"^function {name}\(.*?^}}", script, re.M | re.S)[0] for name in JS]
    ends = [
        (0.9, 1.9),
        (150_000, 150_060),
        (1e6, 1e6 + 60),
        (1e5, 2e5),
        (0, 5e9),
        (-1.5, 3.1),
        (1.3, 1.62),
    ]
    code = "\n".join(parts) + f"\nconst ends = {json.dumps(ends)};"
    code += "console.log(JSON.stringify(ends.map(([a, b]) => tickLabels(ticks(a, b, 8)))))"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [tick_labels(ticks(*pair, 8)) for pair in ends]


def test_the_page_labels_steps_as_whole_numbers_that_differ(make):
    row = re.findall(r'text-anchor="middle">([^<]*)<', report.build([make("a", [train_row(1)])]))
    assert {*row} == {"1"}
    late = report.build([make("b", [train_row(150_000 + k) for k in range(60)])])
    of_loss = re.findall(r'text-anchor="middle">([^<]*)<', late.split("Learning rate")[0])
    assert len({*of_loss}) == len(of_loss) >= 6 and "150,010" in of_loss


def test_labels_are_short():
    assert [label(x) for x in (0, 0.002, 2.5, 1e-5, 150_000)] == [
        "0",
        "0.002",
        "2.5",
        "1e-05",
        "150k",
    ]


def test_a_logarithmic_axis_places_by_powers():
    content = chart([Curve("a", [(0, 1.0), (1, 100.0), (2, 0)], "red")], (0, 2), (1, 100), log=True)
    assert paths(content, "a") == [[(0, 0), (1, 2)]]
    assert 'data-scale="0 2 0.0 2.0"' in content and ">100</text>" in content


@pytest.mark.parametrize("is_pale", [False, True])
def test_a_point_alone_is_a_dot(is_pale):
    points = [(1, 2.0), (2, None)] + [(3, 2.0)] * is_pale
    content = chart([Curve("a", points, "red")], (0, 3), (1, 3))
    assert ('stroke-width="7"' in content) == (not is_pale)


def test_names_that_would_lie_over_each_other_hang():
    def turned(n, width=18):
        names = {k: f"{k}-".ljust(width, "x") for k in range(n)}
        content = chart([Curve("a", [(0, 1.0)], "red")], (-1, n), (0, 2), names=names)
        tall = float(re.search(rf'viewBox="0 0 {WIDTH} (\S+)"', content)[1])
        assert content.count("data-at=") == n
        return "rotate" in content, tall

    assert not turned(4)[0] and turned(12)[0]
    assert turned(12)[1] > turned(4)[1] + 80


def test_a_chart_from_zero_begins_there():
    assert limits([2.0, 4.0], True)[0] == 0 and limits([2.0, 4.0])[0] > 1.8
    assert limits([-1.0, 4.0], True)[0] < -1
    low, high = limits([2.0, 2.0 + 1e-12])
    assert low < 1.95 and high > 2.05


def test_a_single_step_has_some_width(make):
    for step in (0, 2**53 - 1):
        rows = [dict(step=step, val_loss=2.0)]
        assert ">2.0000 at step" in report.build([make(f"run{step}", rows)])


def test_speed_and_memory_begin_at_zero(make):
    rows = [train_row(k, tokens_per_s=1e4 + k, peak_bytes=2**28 + k) for k in range(1, 9)]
    content = report.build([make("run", rows)])
    for title in ("Tokens a second", "Memory at most"):
        scale = re.search(r'data-scale="([^"]*)"', content.split(title)[-1])[1].split()
        assert float(scale[2]) == 0 < float(scale[3])


# ---- what is there, and what is not --------------------------------------------------------------
def test_a_run_says_what_it_was_and_how_it_ended(make):
    rows = [dict(step=0, val_loss=5.0), *(train_row(step) for step in range(1, 4))]
    rows += [dict(step=3, val_loss=2.25), dict(step=3, event="save")]
    config = '# torch: 2.13.0\n# ranks: 1\nsteps = 3\nlr = 0.02\n[chosen]\nschedule = "wsd"\n'
    config += 'optim = "muon"\n'
    text_of = said(make("run", rows, config))
    for words in ("all 3 steps", "muon at lr 0.02, schedule wsd", "1 process", "2.2500 at step 3"):
        assert words in text_of
    for words in ("256 MiB", "1.5 s", "192", "1 save", "2.13.0"):
        assert words in text_of
    assert "3 of 9 steps: still running, stopped, or killed" in said(make("b", rows, "steps = 9"))
    rows += [dict(step=3, event="divergence", text="it rose")]
    assert "diverged" in said(make("c", rows)) and "it rose" in said(make("d", rows))


def test_what_a_rollback_undid_is_drawn_apart(make):
    rows = [train_row(step) for step in (1, 2, 3)]
    rows += [train_row(4, loss=9.0), dict(step=4, event="rollback", to=3), train_row(4, loss=2.1)]
    content = report.build([make("run", rows)])
    assert paths(content, "undone by a rollback") == [[(4, 9.0)]]
    assert paths(content, "training, each step")[0][-1] == (4, 2.1)
    rows = [train_row(1), train_row(10), dict(step=10, event="rollback", to=5), train_row(7)]
    again = report.build([make("less", rows)])
    assert [x for x, _ in paths(again, "training, each step")[0]] == [1, 7, 10]
    assert "2.1000" in Reader(content).said and len(paths(content, "rollback")[0]) == 1


def test_seconds_count_undone_steps_and_those_between_rows(make):
    rows = [train_row(1), train_row(2), train_row(2)]
    assert "time in steps1.5 s" in said(make("a", rows))
    assert "time in steps20 s" in said(make("b", [train_row(k) for k in (1, 14, 27, 40)]))


def test_several_runs_are_compared_best_first(make):
    worse = make("worse", [train_row(1), dict(step=1, val_loss=3.0)], "lr = 1\nn_layer = 2\n")
    better = make("better", [train_row(1), dict(step=1, val_loss=2.0)], "lr = 2\nn_layer = 2\n")
    branch = [train_row(5)]
    branch = make("branch", branch, 'lr = 2\nn_layer = 2\nresume = "/x/worse/step-00000004"\n')
    content = report.build([worse, better, branch])
    text_of = Reader(content).said
    table = text_of.split("3 runs, the best first")[1]
    assert table.index("better") < table.index("worse") < table.index("branch")
    assert "leaves /x/worse" in table and content.count('type="checkbox"') == 3
    settings = text_of.split("Settings")[1]
    assert "runlrresume" in settings.replace(" ", "") and "1 that all runs share" in settings
    assert len(paths(content, "better")) > 0 and paths(content, "branch")


def test_a_search_names_its_best_and_draws_each_field(make, tmp_path):
    for k, (lr, loss) in enumerate([("1e-3", 3.0), ("1e-1", 2.0), ("1e-2", 2.5)]):
        folder = make(f"s/trial-000{k}", [train_row(1), dict(step=1, val_loss=loss)])
        trial = dict(values={"lr": lr, "optim": "sgd"}, status="done")
        (folder / "trial.json").write_text(json.dumps(trial), encoding="utf-8")
    lost = make("s/trial-0004", [train_row(1), dict(step=1, val_loss=9.0)])
    (lost / "trial.json").write_text("{", encoding="utf-8")
    failed = tmp_path / "s" / "trial-0003"
    failed.mkdir()
    (failed / "trial.json").write_text('{"status": "failed", "error": "no disk"}')
    search = {"search.lr": ["1e-3", "1e-1", "1e-2"], "search.optim": ["sgd"], "metric": "val_loss"}
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(search), encoding="utf-8")
    content = report.build([tmp_path / "s"])
    text_of = Reader(content).said
    assert "best is trial-0001, val_loss 2.0000 with lr=1e-1, optim=sgd" in text_of
    assert "no disk" in text_of and "trial-0003: no metrics.jsonl" in text_of
    assert paths(content, "trial") == [[(-3, 3.0), (-2, 2.5), (-1, 2.0)]]
    assert "val_loss over lr" in text_of and "val_loss over optim" not in text_of
    assert 'class="best"><td>trial-0001' in content


def test_what_is_maximised_is_a_metric_of_a_search():
    assert {*MAXIMISED} < {*sweep.ALLOWED["metric"]}


def test_bad_trials_do_not_flatten_the_many():
    points = [(10.0**k, 2 + k / 10) for k in range(12)] + [(1e12, 900.0)]
    content = "".join(over_field("lr", ["log", 1, 1e12], "val_loss", points))
    assert "Beyond the picture: 1 that are worse" in content
    top = float(re.search(r'data-scale="([^"]*)"', content)[1].split()[-1])
    assert 3.1 < top < 4 and ">1e+12</text>" not in content and ">1M</text>" in content
    words = over_field("optim", ["a", "b"], "val_loss", [("b", 1.0), ("a", 2.0)])
    assert ">a</text>" in words[1] and paths(words[1], "trial") == [[(0, 2.0), (1, 1.0)]]


def test_what_is_missing_is_said(make, tmp_path):
    empty = make("empty", [])
    assert "metrics.jsonl has no rows" in said(empty) and "No loss was logged." in said(empty)
    torn = make("torn", [train_row(1)], "steps = [", tail='{"step": 2, "lo')
    assert "1 line is left out of metrics.jsonl" in said(torn)
    assert "config.toml is damaged" in said(torn)
    (torn / "config.toml").unlink()
    assert "no config.toml" in said(torn)
    (empty / "metrics.jsonl").unlink()
    assert "no metrics.jsonl" in said(empty)
    one = said(make("null", [train_row(1, loss=None), train_row(2, loss=None)]))
    assert "its last loss is no number" in one and "No loss was logged." in one
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "sweep.json").write_text("{}")
    assert "No run is here yet." in said(tmp_path / "none")


def test_what_many_runs_lack_is_said_once(make):
    runs = [make(name, [train_row(1)]) for name in "abc"]
    for run in runs[:2]:
        (run / "config.toml").unlink()
    (runs[2] / "config.toml").write_text("[", encoding="utf-8")
    text_of = said(runs)
    assert text_of.count("no config.toml") == 1 and "2 of 3 runs: no config.toml" in text_of
    assert "c: config.toml is damaged" in text_of and "1 step;" not in text_of
    assert "1 steps" not in said(make("one", [train_row(1)], ""))


def test_a_bad_run_is_named_below_the_picture_as_it_is_called(make):
    runs = [
        make(n, [train_row(s, loss=x + 1 / s) for s in range(1, 99)]) for n, x in LOSSES.items()
    ]
    assert "Above the picture: all of LR$3, from 42" in said(runs)


def test_a_loss_of_any_size_is_short(make):
    text_of = said(make("huge", [train_row(1, loss=1e30), dict(step=1, val_loss=2e-8)]))
    assert "1e+30" in text_of and "2e-08 at step 1" in text_of and not re.search(r"\d{20}", text_of)


def test_long_tables_end(make):
    rows = [train_row(1), *(dict(step=1, event="skip", text=f"no. {k}") for k in range(1000))]
    text_of = said(make("run", rows))
    assert f"no. {MOST_ROWS - 1}" in text_of and f"no. {MOST_ROWS}" not in text_of
    assert "1000 in all" in text_of and "and 700 more rows" in text_of


def test_values_and_loads_are_drawn_where_recorded(make):
    run = make("run", [train_row(1)])
    assert "Sizes of values" not in said(run) and "Loads" not in said(run)
    lines = [dict(step=s, kind="gradient", counts={"-3": n, "2": 1}) for s, n in ((0, 9), (5, 3))]
    (run / "histograms.jsonl").write_text("\n".join(map(json.dumps, lines)))
    loads = [dict(step=k, tokens={"0": [4, 0, k]}) for k in (1, 2, 4)]
    (run / "moe_load.jsonl").write_text("\n".join(map(json.dumps, loads)))
    content = report.build([run])
    assert paths(content, "gradient, step 5") == [[(-3, 0.75), (2, 0.25)]]
    assert "layer 0: 0.00 to 1.50 of the mean at step 4" in Reader(content).said
    assert '<path d="M0,1h1v1h-1zM1,1h1v1h-1zM2,1h1v1h-1z" fill="#000000"' in content


# ---- the command ---------------------------------------------------------------------------------
def test_the_command_writes_where_it_says(make, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make("a", [train_row(1)])
    make("b", [train_row(1)])
    report.main(["a"])
    report.main(["a", "b"])
    report.main(["a", "a/", "--out=c.html"])  # one run, named twice
    assert capsys.readouterr().out.split() == ["a/report.html", "report.html", "c.html"]
    content = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "Summary" in content and "<title>a, a</title>" in content
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        report.main(["a", "--out=taken"])
    assert not [*tmp_path.rglob("*.tmp")]
    report.main(["--help"])
    assert "Exit status" in capsys.readouterr().out
    for wrong in ([], ["--out=x.html"], ["a", "--csv"], ["a", "--out="]):
        with pytest.raises(ValueError, match="usage"):
            report.main(wrong)
    (tmp_path / "bare").mkdir()
    for wrong in ("nowhere", "bare"):
        with pytest.raises(ValueError, match=f"{wrong} is not the folder of a run or a search"):
            report.main([wrong])


def test_a_finished_run_is_never_ended_by_its_page(make, tmp_path, capsys, monkeypatch):
    run = make("a", [train_row(1)])
    assert report.write(run, tmp_path / "a.html") and report.write([run], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()
    assert not report.write(run, tmp_path / "no" / "a.html")
    assert "a.html was not written" in capsys.readouterr().out
    monkeypatch.setattr(report, "read", lambda *_: 1 / 0)
    assert not report.write(run, tmp_path / "a.html") and "division" in capsys.readouterr().out


def test_a_page_is_made_without_torch_or_matplotlib(make):

    run = make("a", [train_row(1), dict(step=1, val_loss=2.0)])
    code = f"import sys; from metrics import report; report.build([{str(run)!r}]); "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_page_is_whole():
    content = page("<t>", tag("p", "x"))
    assert content.startswith("<!DOCTYPE html>") and content.endswith("</html>\n")
    assert "<title>&lt;t&gt;</title>" in content


def test_a_run_writes_its_page_at_its_end_and_says_so(tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(str(i * i) for i in range(2000)))
    words = [*"--n_layer=1 --n_head=2 --n_embd=16 --block_size=8 --batch_size=4".split()]
    words += [*"--steps=2 --eval_tokens=100 --plot=false --sample_tokens=0 --threads=1".split()]
    words += ["--tokenizer=bytes", f"--data={file}", f"--out_dir={tmp_path}/run"]
    train.main(parse.parse([*words, "--report=true"]))
    assert "best" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "report.html" in capsys.readouterr().out
