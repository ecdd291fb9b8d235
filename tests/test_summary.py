"""What a run says at its start and at its end is what it is and what it did."""

import os
import re
import sys

import pytest
import torch
from harness import run_ranks
from test_train import go, rows

from metrics import logger
from parallel.mesh import make_mesh
from run import announce, summary
from settings import parse


def said(capsys) -> dict[str, str]:
    """Head -> text of the summary's lines; the lines without a head belong to the one above."""
    found = {}
    head = ""
    for line in capsys.readouterr().out.splitlines():
        match = re.fullmatch(r"([a-z]+) +(\S.*)|( {11}\S.*)", line)
        if match is None or (match[1] and len(line[: line.index(match[2])]) != 11):
            head = ""
        elif match[1]:
            head = match[1]
            found[head] = match[2]
        elif head:
            found[head] += "\n" + line.strip()
    return found


def test_a_run_introduces_itself_and_closes_with_its_own_numbers(tmp_path, text, capsys):
    go(text, tmp_path / "a run", "--sample_tokens=0", "--lr=0.01", "--weight_decay=0.1")
    lines = said(capsys)
    trained, evaluated = (rows(tmp_path / "a run", kind) for kind in ("loss", "val_loss"))
    assert lines["model"] == (
        "modern, 41k parameters: 2 layers, 2 heads, width 32; context of 16 tokens"
    )
    assert "8 x 16 = 128 tokens a step, in micro-batches of 8; 12 steps = 1.54k" in lines["batch"]
    assert lines["optimizer"] == (
        "muon: lr 0.01 (matrix, embedding, head, scalar); weight decay 0.1; gradients clipped to"
        " norm 1"
    ) or lines["optimizer"].startswith("muon: lr 0.01; weight decay 0.1")
    # The factor of the last step is in the log: lr is that of matrices.
    last = trained[12]["lr"] / 0.01
    assert lines["schedule"].startswith("wsd: 0 steps of warm-up, decay from step 7 on")
    assert lines["schedule"].endswith(f"{last:.2g} x lr")
    assert lines["layout"] == "1 process" and "fp32 on" in lines["precision"]
    assert "a spike: skip" in lines["guards"] and "every 6 steps" in lines["saves"]
    assert "lr=0.01" in lines["unusual"] and "weight_decay=0.1" not in lines["model"]
    assert lines["done"].startswith("12 steps and 1.54k tokens; ")
    best = min(evaluated, key=lambda step: evaluated[step]["val_loss"])
    assert lines["loss"] == (
        f"{trained[12]['loss']:.4f} at the end; validation {evaluated[12]['val_loss']:.4f} at the "
        f"end, {evaluated[best]['val_loss']:.4f} at best (step {best})"
    )
    assert lines["events"] == "none"
    assert lines["next"].startswith(f"python sample.py '{tmp_path}/a run'\n")
    log = (tmp_path / "a run" / "train.log").read_text()
    assert (
        log.startswith("commit ") and "\nchosen: " in log and f"loss       {lines['loss']}" in log
    )


def test_a_run_with_experts_tells_how_many_parameters_a_token_goes_through(tmp_path, text, capsys):
    more = ["--n_expert=4", "--expert_width=64", "--n_shared_expert=1", "--moe_every=2"]
    go(text, tmp_path, "--sample_tokens=0", "--steps=1", *more)
    # Of the one layer's 4 x 2 x 32 x 64 a token goes through half.
    expected = 40_960 - 8 * 32**2 + 4 * 32 + (4 + 1) * 2 * 32 * 64
    assert said(capsys)["model"] == (
        f"modern, {logger.short(expected)} parameters, {logger.short(expected - 8192)} of them "
        "active: 2 layers, 4 experts in one layer of 2, 2 of a token, 1 shared, 2 heads, width 32; "
        "context of 16 tokens"
    )


def test_what_is_on_shows(tmp_path, text, capsys):
    more = ["--on_spike=rollback", "--activation_checkpoint=full", "--offload=cpu", "--patience=3"]
    go(text, tmp_path, *more, "--precision=fp8", "--optim=adamw", "--grad_clip=none")
    lines = said(capsys)
    assert "rollback is armed (2 snapshots in memory, one every 25 steps)" in lines["guards"]
    assert "stops after 3 evaluations" in lines["guards"]
    assert "activations of 2 blocks are computed again in backward (full)" in lines["memory"]
    assert "optimizer state waits on the host" in lines["memory"]
    assert "No FP8 hardware here: emulating it (same numbers, slower)." in lines["precision"]
    assert "gradients not clipped" in lines["optimizer"]


def on_two(rank, world, *args):
    go(*args)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_compression_shows_and_what_it_saved(tmp_path, text, capfd):
    more = ["--compress=topk", "--compress.fraction=0.05", "--optim=adamw", "--steps=3"]
    run_ranks(2, on_two, text, tmp_path, *more)
    lines = said(capfd)
    assert lines["layout"] == "2 ranks: dp 2; ddp; gradients compressed by topk"
    times = float(re.search(r"ddp would send ([\d.e+]+) times as much", lines["sent"])[1])
    sent = [row["sent_bytes"] for row in rows(tmp_path).values()]
    n_bytes = 4 * 40_960  # the gradients; 2 (N-1)/N is 1 on two ranks
    assert times == pytest.approx(n_bytes * len(sent) / sum(sent), rel=0.01) and times > 2


@pytest.mark.parametrize("kind", ["patience", "abort"])
def test_why_a_run_ends_early_is_said(tmp_path, text, capsys, kind):
    if kind == "patience":
        go(text, tmp_path, "--patience=1", "--min_delta=9", "--eval_every=2")
        lines = said(capsys)
        assert lines["stopped"].endswith("patience=1: no better evaluation came")
        assert "continues" not in lines["next"], "the same command would stop at once"
        return
    words = ["--on_nonfinite=abort", "--arch=gpt2", "--optim=sgd", "--lr=1e38", "--grad_clip=none"]
    with pytest.raises(Exception, match="What helps"):
        go(text, tmp_path, *words)
    lines = said(capsys)
    assert lines["stopped"].endswith("the monitor ended it")
    events = logger.read_metrics(tmp_path / "metrics.jsonl")
    kinds = {row["event"] for row in events if "event" in row} - {"save", "resume"}
    assert kinds and all(f"1 {kind}" in lines["events"] for kind in kinds)
    assert "continues this run" in lines["next"]


def test_lines_are_aligned():
    assert summary.aligned([("model", "a"), ("next", "b"), ("next", "c")]) == [
        "model      a",
        "next       b",
        "           c",
    ]


@pytest.mark.parametrize(
    "losses, says",
    [
        ([5.0, 4.0, 3.0], ""),
        ([5.0, 3.0, 3.1], ""),
        ([5.0, 3.0, 4.0], "it is worse since then; --patience=3"),
        ([5.0, 4.95, 5.0], "it learnt nothing; try a lower --lr"),
        ([5.0, None, 6.0], "it learnt nothing"),
        ([5.0, 2.0, 6.0], "it is worse since then"),
        ([5.0], ""),
    ],
)
def test_a_validation_loss_that_did_not_fall_is_said(losses, says):
    rows = [{"step": i, "val_loss": loss, "loss": 1.0} for i, loss in enumerate(losses)]
    text = summary.about_losses(rows, rows, None)
    assert says in text and text.endswith(")") == (not says)


def test_an_unusual_lr_and_a_busy_machine_are_said(monkeypatch):
    def said(*words, load=0.0):
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0), raising=False)
        mesh = make_mesh(torch.device("cpu"))
        return "\n".join(announce.warnings(parse.parse([*words]), mesh, None, None))

    assert said("--lr=0.001") == "lr=0.001: muon's own is 0.02"
    assert said("--lr=0.01") == said("--optim=adamw", "--lr=0.001") == said() == ""
    assert "this machine is busy (load 99.0 on " in said(load=99.0)


@pytest.mark.slow
def test_a_tiny_text_is_learnt_by_heart(tmp_path, capsys):
    (tmp_path / "tiny.txt").write_text("All work and no play. " * 9)
    data = str(tmp_path / "tiny.txt")
    go(data, tmp_path / "a", "--steps=200", "--eval_every=0")
    assert "learn it by heart: --patience=3" in said(capsys)["batch"]
    go(data, tmp_path / "b", "--steps=10", "--eval_every=0")
    assert "heart" not in said(capsys)["batch"]
