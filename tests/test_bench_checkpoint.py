"""bench.py checkpoint: both programs save and load the same bits; pages of invented figures."""

import shutil
from pathlib import Path

import pytest
import torch
from harness import run_ranks

import bench
from benchmarks import checkpointing as ck

TINY = {"n_layer": 1, "width": 8, "vocab": 30, "block": 5}  # 30 rows on 4 ranks: one has fewer


def both(rank, world, folder, cut):
    ck.MODELS["tiny"] = TINY
    parts = ck.held("tiny", cut, rank, world)
    found = {}

    def note(row, seconds, turn):
        if turn > 0:
            found.setdefault(row, []).append(sorted(seconds))

    if cut == "rows":
        for row, (kind, arguments) in {**ck.SAVES, **ck.BACKGROUND}.items():
            who = kind(parts, **arguments)
            for _ in range(2):
                assert ck.saves(who, folder / row)["save"] > 0
                seconds = ck.saves_in_background(who, folder / f"{row} again")
                assert 0 < seconds["waits"] < seconds["durable"]
    ck.load_all(parts, folder, 1, note)
    into = ck.zeros(parts)
    ck.Ours(parts).load(folder / "now", into)
    ck.check(parts, into, "ours")
    into["exp_avg"]["norm.weight"].tensor.add_(1)
    with pytest.raises(RuntimeError, match="DCP has loaded another exp_avg/norm.weight"):
        ck.check(parts, into, "DCP")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["rows", "whole"])
def test_both_programs_load_what_was_saved(tmp_path, cut):
    import torch.distributed.checkpoint
    import torch.distributed.tensor  # noqa: F401 - once, here, and not in each fork

    for found in run_ranks(4 if cut == "rows" else 2, both, tmp_path, cut):
        assert found == {row: [["load, warm"], ["load, cold"]] for row in ck.LOADS}


def test_each_rank_holds_its_rows_of_the_same_tensors():
    ck.MODELS["tiny"] = TINY
    held = [ck.held("tiny", "rows", rank, 4)["model"]["embed.weight"] for rank in range(4)]
    assert [tuple(s.tensor.shape) for s in held] == [(8, 8), (8, 8), (8, 8), (6, 8)]
    assert [s.shard.offsets for s in held] == [(0, 0), (8, 0), (16, 0), (24, 0)]
    assert not torch.equal(held[0].tensor, held[1].tensor)
    whole = [ck.held("tiny", "whole", rank, 2)["exp_avg"]["embed.weight"] for rank in range(2)]
    assert torch.equal(whole[0].tensor, whole[1].tensor) and whole[0].tensor.shape == (30, 8)


def test_rates_and_ratios_are_turn_by_turn_and_rows_in_order():
    found = {"save": {"DCP, sync": [0.2, 0.3, 0.9], "ours": [0.1, 0.3, 0.3]}}
    lines = ck.report(found, 60_000_000)
    assert lines[2] == "| ours | 300 (100..300) | 200 (200..600) |  |"
    assert lines[3] == "| DCP, sync | 300 (200..900) | 200 (67..300) | **2.00 (1.00..3.00)** |"
    assert [ck.rotated("abc", turn) for turn in (0, 1, 3)] == [
        list("abc"),
        list("bca"),
        list("abc"),
    ]


def test_a_folder_that_is_not_there_is_a_mistake_in_one_line(capsys):
    assert bench.main(["checkpoint", "--folder=nowhere"]) == 2
    assert "--folder=nowhere is no folder; type mkdir -p nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_the_bench_end_to_end(tmp_path, capsys):
    out = tmp_path / "page.md"
    words = ["--quick", "--ranks=2", "--turns=1", f"--folder={tmp_path}", f"--out={out}"]
    assert bench.main(["checkpoint", *words]) == 0
    page = out.read_text()
    assert page in capsys.readouterr().out and "## 2 ranks, --cut=rows" in page
    for table, rows in {"save": ck.SAVES, "durable": ck.BACKGROUND, "load, cold": ck.LOADS}.items():
        part = page.split(f"| {table} |")[1].split("\n\n")[0]
        assert [line.split(" | ")[0][2:] for line in part.splitlines()[2:]] == [*rows]
    assert [path.name for path in Path(tmp_path).iterdir()] == ["page.md"]
    shutil.rmtree(tmp_path)
