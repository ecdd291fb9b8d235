"""Faults put into a run through train.py: what each policy promises, on every layout."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch._dynamo  # before the ranks are forked, as test_fsdp does
import torch.distributed.fsdp
import torch.distributed.tensor
from harness import device_flags, run_ranks
from test_train import go, killed_at, killed_at_7, needs_fork, rows

import monitor
from checkpoint import early_stopping, load
from checkpoint import save as saving
from data import cursor, dataset
from metrics import logger
from model import GPT

ROW = 58  # of the 8 rows of step 8, which is taken after 7 updates
TAKE, FORWARD, INIT = dataset.Dataset.__call__, GPT.forward, cursor.Cursor.__init__


def poisoned(factor: float, row: int = ROW, gradient: bool = False):
    """From now on in this process the loss of any micro-batch with this row is multiplied by
    `factor`, or its gradient alone."""
    last = {}

    def take(self, numbers):
        last["poisoned"] = self.seed is not None and row in numbers
        return TAKE(self, numbers)

    def forward(self, x, targets=None, *more, **named):
        out = FORWARD(self, x, targets, *more, **named)
        bad = last.get("poisoned") and self.training and targets is not None and out.ndim == 0
        if bad and gradient:
            out.register_hook(lambda g: g * factor)
        return out * factor if bad and not gradient else out

    dataset.Dataset.__call__, GPT.forward = take, forward


@pytest.fixture(autouse=True)
def mended():
    yield
    dataset.Dataset.__call__, GPT.forward = TAKE, FORWARD


def with_fault(rank, world, factor, *args):
    poisoned(factor)
    return go(*args)


def inf_gradient(rank, world, killed, *args):
    """Only one rank ever has that row."""
    poisoned(math.inf, gradient=True)
    return (killed_at_7 if killed else go)(*((rank, world) if killed else ()), *args)


def never_seen(rank, world, first, last, *args):
    """The run that has known from the start which rows it must not read."""
    cursor.Cursor.__init__ = lambda self, *data: (INIT(self, *data), self.skip(first, last))[0]
    try:
        return go(*args)
    finally:
        cursor.Cursor.__init__ = INIT


def end(out_dir) -> dict:
    """The last row of every step: a rollback takes some steps again."""
    return {
        row["step"]: (row["loss"], row["grad_norm"], row["tokens"])
        for row in logger.read_metrics(Path(out_dir) / "metrics.jsonl")
        if "loss" in row
    }


def events(out_dir, *kinds) -> list[tuple]:
    found = logger.read_metrics(Path(out_dir) / "metrics.jsonl")
    return [
        (row["event"], row["step"])
        for row in found
        if row.get("event") in kinds and "field" not in row
    ]


def same_checkpoints(a, b, parts=("model/", "training_weights/", "optim/")) -> None:
    a, b = load.newest(a), load.newest(b)
    assert a.step == b.step and a.names() == b.names()
    for name in a.names():
        if name.startswith(parts):
            assert torch.equal(a.tensor(name), b.tensor(name)), name


RING, DISK = "--monitor.ring=2 --monitor.ring_every=2", "--monitor.ring=0 --save_every=3"
LAYOUTS = [
    "--data_parallel=ddp",
    "--optim=soap --data_parallel=zero1 --bucket_mb=0.01",
    "--tp=2 --sp=true",
    "--data_parallel=fsdp --optim=lamb",
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (
            "--optim=schedule_free",
            "--optim=schedule_free --data_parallel=zero3 --bucket_mb=0.01",
            "--optim=adamw --data_parallel=zero2 --bucket_mb=0.01 --offload=disk",
            "--data_parallel=zero3 --offload_params=disk --offload=cpu --bucket_mb=0.01",
            "--data_parallel=fsdp --fsdp_shard=1 --offload=disk",
            "--pp=2 --pp_schedule=zerobubble --optim=adamw",
            "--cp=2 --data_parallel=fsdp --optim=lamb",
            (
                "--precision=fp8 --fp8.scaling=tensor --fp8.delayed=true --data_parallel=zero3"
                " --bucket_mb=0.01"
            ),
            "--precision=bf16_sr --data_parallel=zero1 --bucket_mb=0.01",
            "--precision=bf16_sr --optim=adamw --tp=2 --offload=cpu",
            "--hooks=hyperball --optim=muon --data_parallel=zero1 --bucket_mb=0.01",
            (
                "--hooks=radial_brake,uw_floor,radius_pin,cautious_decay --optim=adamw --tp=2"
                " --precision=bf16_sr --offload=cpu"
            ),
        )
    ),
]
# Biases for the choice of experts are no parameters, and come back all the same.
EXPERTS = "--n_expert=4 --moe_bias_lr=0.01 --data_parallel=zero3 --bucket_mb=0.01"
KEEPS_MORE = [
    pytest.param(layout, marks=pytest.mark.slow)
    for layout in (
        "--compress=topk --compress.fraction=0.05 --optim=adamw --bucket_mb=0.01",
        "--compress=powersgd --compress.rank=2 --optim=sgd --bucket_mb=0.01",
        "--diloco_every=3 --diloco.momentum=0.8 --optim=adamw",
    )
]


def test_a_rollback_to_before_the_resumed_step_takes_nothing_from_what_follows(tmp_path, text):
    """The first step after a resume goes back behind it: what is done again is saved again."""
    more = [*DISK.split(), "--on_nonfinite=rollback", "--keep=none", "--eval_every=3"]
    more += ["--schedule=constant"]
    go(text, tmp_path, *more, "--steps=9")
    assert (tmp_path / "step-00000009").is_dir()
    poisoned(math.nan, row=75)
    go(text, tmp_path, *more, "--steps=12")
    assert events(tmp_path, "rollback") == [("rollback", 10)]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        f"step-{step:08d}" for step in (3, 6, 9, 12)
    ]
    evaluated = [r for r in logger.read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in r]
    losses = {row["val_loss"] for row in evaluated if row["step"] == 9}
    assert len(losses) == 2, "the evaluation at step 9 is that of other samples now"


@pytest.mark.parametrize(
    "layout, where",
    [
        (LAYOUTS[0], RING),
        pytest.param(EXPERTS, RING, marks=pytest.mark.slow),
        pytest.param(EXPERTS, DISK, marks=pytest.mark.slow),
        pytest.param(LAYOUTS[0], DISK, marks=pytest.mark.slow),
        # Owners hold full copies of the weights.
        pytest.param(LAYOUTS[2], DISK, marks=pytest.mark.slow),
        pytest.param(LAYOUTS[3], DISK, marks=pytest.mark.slow),
        *(pytest.param(layout, RING, marks=pytest.mark.slow) for layout in LAYOUTS[1:4]),
        *(
            pytest.param(*p.values, where, marks=p.marks)
            for p in LAYOUTS[4:]
            for where in (RING, DISK)
        ),
        *(pytest.param(*p.values, DISK, marks=p.marks) for p in KEEPS_MORE),
    ],
)
def test_rollback_is_bitwise_the_run_that_never_saw_the_poisoned_rows(
    tmp_path, text, layout, where
):
    more = [
        *layout.split(),
        *where.split(),
        "--dropout=0.2",
        "--micro_batch_size=2",
        "--steps=12",
        "--on_nonfinite=rollback",
        "--keep=none",
    ]
    run_ranks(2, never_seen, 48, 63, text, tmp_path / "clean", *more)
    run_ranks(2, with_fault, math.nan, text, tmp_path / "faulty", *more)
    assert events(tmp_path / "faulty", "nonfinite", "rollback") == [
        ("nonfinite", 8),
        ("rollback", 8),
    ]
    assert (
        end(tmp_path / "faulty") == end(tmp_path / "clean") and len(end(tmp_path / "clean")) == 12
    )
    same_checkpoints(tmp_path / "faulty", tmp_path / "clean")
    saved = load.newest(tmp_path / "faulty").tree("progress")
    assert saved["rows"] == 112 and saved["banned"] == [[48, 63]]
    assert '"to": 6' in (tmp_path / "faulty" / "metrics.jsonl").read_text()


def test_the_evaluation_after_a_rollback_is_that_of_the_step_it_goes_back_to(tmp_path, text):
    poisoned(math.nan)
    go(text, tmp_path, "--on_nonfinite=rollback", "--monitor.ring_every=6", "--save_every=0")
    found = [row for row in logger.read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in row]
    assert [row["step"] for row in found] == [0, 6, 6, 12] and found[1] == found[2]


@pytest.mark.gpu
def test_a_spike_of_50_times_the_loss_is_rolled_back(tmp_path, text, device, deterministic):
    row = 8 * 30 + 3
    more = [*device_flags(device), "--steps=40", "--save_every=0", "--eval_every=0"]
    never_seen(0, 1, 160, 247, text, tmp_path / "clean", *more)  # from the state of step 20 on
    poisoned(50.0, row)
    go(text, tmp_path / "faulty", *more, "--on_spike=rollback", "--monitor.ring_every=10")
    assert events(tmp_path / "faulty", "spike", "rollback") == [("spike", 31), ("rollback", 31)]
    assert end(tmp_path / "faulty") == end(tmp_path / "clean")
    same_checkpoints(tmp_path / "faulty", tmp_path / "clean")


def test_one_rank_s_nan_makes_all_skip_and_nothing_of_the_step_stays(tmp_path, text):
    more = [
        "--save_every=1",
        "--keep=none",
        "--steps=10",
        "--micro_batch_size=2",
        "--precision=fp64",
        "--optim=adamw",
    ]
    assert (
        len(set(map(str, run_ranks(2, with_fault, math.nan, text, tmp_path / "two", *more)))) == 1
    )
    with_fault(0, 1, math.nan, text, tmp_path / "one", *more, "--micro_batch_size=4")
    for out_dir in (tmp_path / "one", tmp_path / "two"):
        assert events(out_dir, "nonfinite", "skip") == [("nonfinite", 8)]
        before, after = (load.load(out_dir / f"step-{s:08d}") for s in (7, 8))
        for name in before.names():
            if name.startswith(("model/", "optim/")):
                assert torch.equal(before.tensor(name), after.tensor(name)), name
        assert after.tree("progress")["rows"] == 64
    one, two = end(tmp_path / "one"), end(tmp_path / "two")
    assert one[8][0] is None and all(
        one[s][0] == pytest.approx(two[s][0], rel=1e-10) for s in one if s != 8
    )


@needs_fork
@pytest.mark.parametrize(
    "precision, words",
    [
        ("fp16", "--n_expert=4"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("fp16", "--dropout=0"),
                ("fp16", "--hooks=radial_brake,uw_floor,radius_pin,cautious_decay"),
                ("fp32", "--n_expert=4"),
            )
        ),
    ],
)
def test_an_inf_gradient_on_one_rank_makes_all_skip_also_after_a_kill(
    tmp_path, text, precision, words
):
    """In fp16 it is the loss scaler that skips."""
    more = [
        f"--precision={precision}",
        "--micro_batch_size=2",
        "--save_every=1",
        "--keep=none",
        "--data_parallel=ddp",
        words,
    ]
    run_ranks(2, inf_gradient, False, text, tmp_path / "whole", *more)
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        run_ranks(2, inf_gradient, True, text, tmp_path / "killed", *more)
    run_ranks(2, inf_gradient, False, text, tmp_path / "killed", *more)
    for out_dir in (tmp_path / "whole", tmp_path / "killed"):
        kind = "nonfinite" if precision == "fp32" else "skip"
        assert events(out_dir, "nonfinite", "skip") == [(kind, 8)]
        before, after = (load.load(out_dir / f"step-{s:08d}") for s in (7, 8))
        assert all(
            torch.equal(w, after.tensor(f"model/{n}")) for n, w in before.tree("model").items()
        )
        assert precision == "fp32" or after.tree("scaler") != before.tree("scaler")
    assert (
        end(tmp_path / "whole") == end(tmp_path / "killed") and len(end(tmp_path / "whole")) == 12
    )
    same_checkpoints(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.gpu
def test_fp8_s_delayed_scales_forget_a_step_of_nan(tmp_path, text, device):
    more = [*device_flags(device), "--precision=fp8", "--fp8.scaling=tensor", "--fp8.delayed=true"]
    with_fault(0, 1, math.nan, text, tmp_path, *more)
    assert [step for step, row in end(tmp_path).items() if row[0] is None] == [8]


def residuals_after_nan(rank, world, poison, *args):
    if poison:
        poisoned(math.nan)
    return go(*args)


def test_a_skipped_step_leaves_no_trace_in_what_compression_owes(tmp_path, text):
    more = [
        "--compress=topk",
        "--compress.fraction=0.05",
        "--optim=sgd",
        "--save_every=1",
        "--keep=none",
        "--steps=9",
        "--bucket_mb=0.01",
        "--micro_batch_size=2",
        "--eval_every=0",
    ]
    run_ranks(2, residuals_after_nan, True, text, tmp_path, *more)
    before, after = (
        load.load(tmp_path / f"step-{s:08d}").tree("replicas/residuals") for s in (7, 8)
    )
    assert before.keys() == {"0", "1"}
    for rank in before:
        assert all(torch.equal(x, after[rank][name]) for name, x in before[rank].items())
        assert any(bool(x.any()) for x in before[rank].values())


# 9: there is an older save of the step that the rollback goes to
@pytest.mark.parametrize("keep", [2, 9])
def test_a_rollback_on_a_full_disk_deletes_nothing(tmp_path, text, monkeypatch, keep):
    poisoned(math.nan)
    write, full = saving.write_tensors, []
    emit = monitor.SpikeMonitor.emit

    def fill(self, step, event, *more, **fields):
        full.append(event)
        emit(self, step, event, *more, **fields)

    def fails(path, tensors):
        if full:
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(monitor.SpikeMonitor, "emit", fill)
    monkeypatch.setattr(saving, "write_tensors", fails)
    with pytest.raises(OSError, match="No space left"):
        go(
            text,
            tmp_path,
            "--on_nonfinite=rollback",
            "--monitor.ring_every=5",
            "--save_every=1",
            "--async_save=false",
            f"--keep={keep}",
        )
    assert load.newest(tmp_path).step == 7 and len(events(tmp_path, "save_failed")) > 1


def test_what_was_saved_after_the_state_a_rollback_goes_back_to_is_gone(
    tmp_path, text, monkeypatch
):
    more = ["--on_nonfinite=rollback", "--monitor.ring_every=5", "--save_every=7"]
    never_seen(0, 1, 40, 63, text, tmp_path / "clean", *more)
    poisoned(math.nan)
    monkeypatch.setattr(saving.Saver, "drop_after", stop_after(saving.Saver.drop_after))
    with pytest.raises(KeyboardInterrupt):
        go(text, tmp_path / "faulty", *more)
    monkeypatch.undo()
    assert load.newest(tmp_path / "faulty").step == 5  # 7 was there
    go(text, tmp_path / "faulty", *more)
    assert end(tmp_path / "faulty") == end(tmp_path / "clean")
    same_checkpoints(tmp_path / "faulty", tmp_path / "clean")


def stop_after(method):
    def then(*args):
        method(*args)
        raise KeyboardInterrupt

    return then


def test_a_best_that_cannot_be_saved_or_read_ends_no_run(tmp_path, text, monkeypatch):
    save = saving.save

    def fails(folder, *more, **named):
        if folder.name == "best":
            raise OSError(28, "No space left on device")
        return save(folder, *more, **named)

    monkeypatch.setattr(saving, "save", fails)
    go(text, tmp_path / "a", "--patience=9", "--eval_every=4")
    assert (
        len(events(tmp_path / "a", "save_failed")) == 4 and load.newest(tmp_path / "a").step == 12
    )
    monkeypatch.undo()
    monkeypatch.setattr(
        early_stopping.EarlyStopping, "path", property(lambda self: self.folder / "step-77777777")
    )
    stop_early(0, 1, LOSSES, text, tmp_path / "b", "--patience=3", "--eval_every=1", "--steps=8")
    assert load.newest(tmp_path / "b").step == 5


def test_without_a_guard_nan_ends_the_training(tmp_path, text):
    with_fault(0, 1, math.nan, text, tmp_path, "--on_nonfinite=none")
    assert end(tmp_path)[12][0] is None


@needs_fork
@pytest.mark.parametrize("where", [RING, DISK])
def test_killed_after_a_rollback_the_ban_is_remembered(tmp_path, text, where):
    more = [*where.split(), "--on_nonfinite=rollback", "--keep=none"]
    never_seen(0, 1, 48, 63, text, tmp_path / "clean", *more)
    poisoned(math.nan)
    killed_at(9, text, tmp_path / "faulty", *more)  # after the rollback
    assert events(tmp_path / "faulty", "rollback") == [("rollback", 8)]
    dataset.Dataset.__call__, GPT.forward = TAKE, FORWARD
    go(text, tmp_path / "faulty", *more)
    assert end(tmp_path / "faulty") == end(tmp_path / "clean")
    same_checkpoints(tmp_path / "faulty", tmp_path / "clean")


def test_a_rollback_before_anything_was_saved_skips_and_bans(tmp_path, text):
    poisoned(math.nan)
    go(text, tmp_path, "--on_nonfinite=rollback", "--monitor.ring=0", "--save_every=8")
    assert events(tmp_path, "nonfinite", "skip", "rollback") == [("nonfinite", 8), ("skip", 8)]
    saved = load.newest(tmp_path).tree("progress")
    assert saved["rows"] == 96 and saved["banned"] == [[56, 63]]


def test_warn_says_so_and_changes_nothing(tmp_path, text):
    poisoned(50.0, 8 * 30 + 3)
    more = ["--steps=34", "--save_every=0", "--eval_every=0"]
    for policy, told in (("warn", [("spike", 31)]), ("none", [])):
        go(text, tmp_path / policy, *more, f"--on_spike={policy}")
        assert events(tmp_path / policy, "spike", "skip", "rollback") == told
    assert end(tmp_path / "warn") == end(tmp_path / "none") and end(tmp_path / "warn")[31][0] > 100
    same_checkpoints(tmp_path / "warn", tmp_path / "none")


def test_a_spike_and_what_is_not_finite_have_policies_of_their_own(tmp_path, text):
    more = ["--steps=34", "--save_every=0", "--eval_every=0", "--monitor.ring_every=10"]
    for row, factor, spike, nonfinite, told in (
        (8 * 30 + 3, 50.0, "abort", "rollback", [("spike", 31)]),
        (8 * 30 + 3, 50.0, "skip", "rollback", [("spike", 31)]),
        (ROW, math.nan, "rollback", "skip", [("nonfinite", 8)]),
    ):
        poisoned(factor, row)
        out, abort = tmp_path / f"{spike} {nonfinite}", spike == "abort"
        with (
            pytest.raises(monitor.Aborted, match="step 31: loss")
            if abort
            else contextlib.nullcontext()
        ):
            go(text, out, *more, f"--on_spike={spike}", f"--on_nonfinite={nonfinite}")
        assert events(out, "spike", "nonfinite", "rollback") == told
        assert load.newest(out).step == (30 if abort else 34)


def test_a_branch_keeps_bans_for_the_same_data_alone(tmp_path, text):
    poisoned(math.nan)
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text()[::-1])
    go(text, tmp_path / "a", "--on_nonfinite=rollback", "--monitor.ring_every=5")
    dataset.Dataset.__call__, GPT.forward = TAKE, FORWARD
    assert load.newest(tmp_path / "a").tree("progress")["banned"] == [[40, 63]]
    for name, kept in ((text, [[40, 63]]), (str(other), [])):
        out = tmp_path / Path(name).stem
        go(name, out, f"--resume={tmp_path / 'a'}", "--steps=14", "--lr=0.01")
        assert load.newest(out).tree("progress")["banned"] == kept


def test_abort_saves_says_why_and_the_same_command_with_skip_goes_on(tmp_path, text, capsys):
    poisoned(math.nan)
    with pytest.raises(
        monitor.Aborted, match="step 8: loss nan; likely overflow. What helps: look"
    ):
        go(text, tmp_path, "--on_nonfinite=abort")
    assert load.newest(tmp_path).step == 7
    go(text, tmp_path, "--on_nonfinite=skip")
    assert load.newest(tmp_path).step == 12 and events(tmp_path, "nonfinite")[-1] == (
        "nonfinite",
        8,
    )


def test_a_run_that_stays_broken_ends_by_itself(tmp_path, text):
    poisoned(math.nan)
    dataset.Dataset.__call__ = lambda self, numbers: TAKE(self, numbers)
    GPT.forward = lambda self, *a, **k: (
        FORWARD(self, *a, **k) * (math.nan if self.training else 1.0)
    )
    with pytest.raises(monitor.Aborted, match="as in 5 steps in a row"):
        go(text, tmp_path, "--steps=40", "--monitor.accept=5")
    assert load.newest(tmp_path).step == 4  # weights as they were, never NaN
    assert all(weight.isfinite().all() for weight in load.newest(tmp_path).tree("model").values())


@pytest.mark.parametrize("policy", [pytest.param("clip", marks=pytest.mark.slow), "lr_cut"])
def test_clip_and_lr_cut_reach_the_update(tmp_path, text, policy):
    poisoned(50.0, 8 * 25)
    more = [
        "--steps=32",
        "--optim=sgd",
        "--opt.momentum=0",
        "--lr=0.5",
        "--eval_every=0",
        "--save_every=1",
        "--keep=none",
        "--schedule=constant",
        "--warmup_frac=0",
    ]
    more += ["--monitor.cut=0.1"] if policy == "lr_cut" else []
    go(text, tmp_path, *more, f"--on_spike={policy}", "--monitor.recover=4")
    assert events(tmp_path, "spike") == [("spike", 26)]
    found = rows(tmp_path)
    for step, expected in (
        ((25, 0.5), (26, 0.05), (27, 0.1625), (30, 0.5)) if policy == "lr_cut" else ()
    ):
        assert found[step]["lr"] == pytest.approx(expected)
    for step in (25, 26, 27, 30, 31):
        a, b = (load.load(tmp_path / f"step-{s:08d}").tree("model") for s in (step - 1, step))
        moved = (
            math.sqrt(sum(float((a[n] - b[n]).double().square().sum()) for n in a))
            / found[step]["lr"]
        )
        limit = 0.1 if policy == "clip" and 26 <= step < 30 else 1.0
        assert moved == pytest.approx(min(limit, found[step]["grad_norm"]), rel=1e-4), step


# ---- early stopping ------------------------------------------------------------------------------
def stop_early(rank, world, losses, *args):
    """A run whose evaluations, one a step, say these losses."""
    import train

    evaluate, said, gather = train.evaluate, iter(losses), saving.gather
    train.evaluate = lambda *a, **more: evaluate(*a, **more) | {"val_loss": next(said)}

    def gather_apart_from_training(message, group):
        assert world == 1 or group is not None
        return gather(message, group)

    saving.gather = gather_apart_from_training
    try:
        return go(*args)
    finally:
        train.evaluate, saving.gather = evaluate, gather


LOSSES = [5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 2.0, 1.9, 1.8]  # of steps 0, 1, ...: 2 is best at the end


@pytest.mark.parametrize(
    "ranks, layout",
    [
        (1, "--optim=muon"),
        pytest.param(1, "--optim=schedule_free", marks=pytest.mark.slow),
        (2, "--data_parallel=zero1 --optim=schedule_free"),
        pytest.param(2, EXPERTS, marks=pytest.mark.slow),
        pytest.param(2, f"{EXPERTS} --optim=schedule_free", marks=pytest.mark.slow),
        *(
            pytest.param(2, layout, marks=pytest.mark.slow)
            for layout in (
                "--data_parallel=fsdp",
                "--data_parallel=zero3 --offload_params=disk",
                "--tp=2 --sp=true",
                "--pp=2",
                "--precision=bf16_sr --data_parallel=zero2",
                "--cp=2 --data_parallel=ddp",
            )
        ),
    ],
)
def test_the_best_weights_come_back_and_training_can_go_on(tmp_path, text, ranks, layout):
    more = [*layout.split(), "--eval_every=1", "--save_every=1", "--keep=none", "--steps=8"]
    out = tmp_path / "stopped"
    for result in run_ranks(ranks, stop_early, LOSSES, text, out, *more, "--patience=3"):
        assert result["step"] == 5
    best, last = load.newest(out / "best"), load.newest(out)
    at_2 = load.load(out / "step-00000002")
    assert best.step == 2 and last.step == 5 and [*(out / "best").iterdir()] == [best.path]
    for name, weight in best.tree("model").items():
        assert torch.equal(weight, at_2.tensor(f"model/{name}")), name
        assert torch.equal(weight, last.tensor(f"model/{name}")), name
    # Without patience the same run goes on from the last weights, not the best ones, bitwise.
    run_ranks(ranks, stop_early, LOSSES[6:], text, out, *more, "--patience=none")
    run_ranks(ranks, stop_early, LOSSES, text, tmp_path / "whole", *more)
    assert end(out) == end(tmp_path / "whole")
    same_checkpoints(out, tmp_path / "whole")


def test_patience_with_improving_losses_changes_nothing(tmp_path, text):
    more = ["--eval_every=1", "--steps=8", "--patience=1"]
    stop_early(0, 1, [9.0 - i for i in range(9)], text, tmp_path / "a", *more)
    go(text, tmp_path / "b", "--eval_every=0", "--steps=8")
    assert end(tmp_path / "a") == end(tmp_path / "b")
    assert load.newest(tmp_path / "a" / "best").step == 8


def test_the_guard_s_events_name_rows_cause_and_remedy(tmp_path, text):
    poisoned(math.nan)
    go(text, tmp_path)
    event = next(
        row
        for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        if row.get("event") == "nonfinite" and "rows" in row
    )
    assert (
        event["rows"] == [56, 63]
        and event["action"] == "skip"
        and event["cause"]
        and event["remedy"]
    )
