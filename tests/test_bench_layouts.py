"""bench.py layouts: both sides compute the same, and what is no comparison says so."""

import math
import multiprocessing

import pytest
import torch

import bench
from benchmarks import layouts, layouts_job, layouts_ranks
from benchmarks.layouts import Row

FORK = "fork" in multiprocessing.get_all_start_methods()


@pytest.fixture(autouse=True)
def same_threads():
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


def page(capsys, words: str, status: int = 0) -> str:
    if not FORK:
        pytest.skip("spawned ranks would not see the rows of a test")
    assert bench.main(["layouts", "--quick", *words.split()]) == status
    return capsys.readouterr().out


def test_a_row_has_a_ratio_of_each_figure_and_the_page_is_written(capsys, tmp_path):
    out = tmp_path / "layouts.md"
    said = page(capsys, f"--only=zero1,1f1b --out={out}")
    assert out.read_text(encoding="utf-8") == said
    for name in ("zero1", "1f1b"):
        (line,) = [line for line in said.splitlines() if line.startswith(f"| {name} |")]
        cells = line.strip("| ").split(" | ")
        assert len(cells) == len(layouts.HEAD) and float(cells[-1]) < 1e-6
        # ours, theirs, ratio: CPU, wall, tensors, RSS
        for at in (2, 5, 8, 11):
            ours, theirs, ratio = cells[at : at + 3]
            assert min(float(ours), float(theirs), float(ratio.split("**")[1])) > 0


def test_ratios_are_turn_by_turn_and_figures_medians(monkeypatch):
    """Invented seconds: the medians are 0.2 and 0.2, the ratios 0.5, 2 and 1.5."""

    def measure(function, sides, *_):
        if function is layouts.metered:
            ours = "ddp" in sides[0]
            return {"tensors": 3e6 if ours else 4e6, "rss": 5e6 if ours else 4e6}
        seconds = [[0.1, 0.4, 0.2], [0.2, 0.2, 0.2 / 1.5]]
        wall = [[3.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
        return {"cpu": seconds, "wall": wall, "losses": [[1.0, 2.0], [1.0, 2.002]]}

    monkeypatch.setattr(layouts, "measure", measure)
    row = Row("peer", "layouts_ours:ddp", "layouts_peers:other", tolerance=2e-3)
    monkeypatch.setattr(layouts, "sides_of", lambda row: [row.ours, row.theirs])
    assert layouts.compared(row, None, 2, 3, 1) == [
        *("200.0", "200.0", "**1.50** (0.50..2.00)"),
        *("1000.0", "1000.0", "**1.00** (1.00..3.00)"),
        *("3.0", "4.0", "**0.75**", "5.0", "4.0", "**1.25**", "1e-03"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_row_is_a_comparison_or_left_out_with_a_known_reason(ranks, capsys):
    said = page(capsys, f"--ranks={ranks}")
    for name, row in layouts.ROWS.items():
        compared = f"| {name} | {row.peer} |" in said
        left_out = f"- {name} beside {row.peer}: left out" in said
        assert compared != left_out
        assert compared or row.refusal or "not installed" in said


def test_another_computation_has_no_ratio(monkeypatch, capsys):
    other = Row("half", "ddp", "layouts_ours:compress_fp16", tolerance=1e-12)
    monkeypatch.setattr(layouts, "ROWS", {"ddp": other})
    said = page(capsys, "--only=ddp", status=1)
    assert "**ddp beside half failed**: losses differ by" in said and "| ddp |" not in said


def test_a_missing_peer_is_left_out_and_a_fault_is_a_failure(monkeypatch, capsys):
    rows = {
        "ddp": Row("nobody's", "ddp", "ddp", imports=("no_such_module",)),
        "bf16": layouts.ROWS["bf16"],
        "fsdp": Row("a wrong name", "ddp", "no_such_function"),
    }
    monkeypatch.setattr(layouts, "ROWS", rows)
    assert "left out, not installed: No module" in page(capsys, "--only=ddp")
    assert "left out, TypeError: BF16 all reduce" in page(capsys, "--only=bf16")
    said = page(capsys, "--only=fsdp", status=1)
    assert "failed**: AttributeError" in said and "no_such_function" in said


@pytest.mark.slow
def test_a_profile_names_operators_of_both_sides(capsys):
    said = page(capsys, "--profile --only=ddp")
    assert "layouts_ours:ddp" in said and "layouts_peers:ddp" in said
    assert said.count("x aten::addmm") + said.count("x aten::mm") >= 2


@pytest.mark.parametrize(
    "words, says",
    [
        ("--only=ddq", "--only=ddq is no row; there are ddp, "),
        ("--only=ddp,", "--only= is no row"),
        ("--ranks=3", "--ranks=3 is not understood"),
        ("--size=tiny", "--size=tiny is not understood"),
        ("--turns=0", "--turns=0 is not understood"),
        ("--quick=1", "--quick=1 is not understood"),
    ],
)
def test_what_is_not_understood_is_one_line_and_exit_2(words, says, capsys):
    assert bench.main(["layouts", words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and says in captured.err


def test_losses_apart_are_found_also_if_they_are_nan():
    assert layouts.apart([1.0, 2.0], [1.0, 2.0]) == 0
    assert layouts.apart([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert layouts.apart([math.nan, 2.0], [1.0, 2.0]) == math.inf
    with pytest.raises(ValueError):
        layouts.apart([1.0], [1.0, 2.0])


def test_replicas_have_samples_of_their_own_and_stages_the_same():
    job = layouts.QUICK.__class__(2, 32, 2, 16, 64, sequences=2, micro_batches=2, world=2)
    first, second = (layouts_job.dataclasses.replace(job, rank=rank) for rank in (0, 1))
    ids = [x for rank in (first, second) for x, _ in rank.replicas_batches(0)]
    assert len({tuple(x.flatten().tolist()) for x in ids}) == 4
    for (x, _), (y, _) in zip(first.all_batches(0), second.all_batches(0), strict=True):
        assert torch.equal(x, y)
    x, y = job.batch(3)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert not torch.equal(x, job.batch(4)[0]) and torch.equal(x, job.batch(7)[0])


def test_resident_bytes_are_read_or_unknown(monkeypatch, tmp_path):
    now = layouts_ranks.resident("VmRSS")
    assert math.isnan(now) or layouts_ranks.resident("VmHWM") >= 0.9 * now > 10**7
    assert math.isnan(layouts_ranks.resident("VmNothing"))
