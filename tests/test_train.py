"""The promise: whatever the layout, the same training run; whatever happens, nothing lost."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import device_flags, gpu, init_weights, run_ranks

import train
from checkpoint import load
from metrics import logger
from run import control
from settings import parse

ROOT = Path(train.__file__).parent
CLASSES = [
    "sgd",
    "adamw",
    "adam_l2",
    "ademamix",
    "adafactor",
    "lion",
    "lars",
    "lamb",
    "mars",
    "shampoo",
    "soap",
    "kl_soap",
    "soap_muon",
    "muon",
    "muown",
    "dion",
    "pmuon",
    "schedule_free",
    "schedule_free.SGDScheduleFree",
]


def flags(text, out_dir, *more: str) -> list[str]:
    tiny = [
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--block_size=16",
        "--batch_size=8",
        "--steps=12",
        "--eval_every=6",
        "--eval_tokens=512",
        "--sample_tokens=0",
        "--plot=false",
        "--save_every=5",
        "--precision=fp32",
        "--device=cpu",
    ]
    return [f"--data={text}", f"--out_dir={out_dir}", *tiny, *more]


def go(*args) -> dict:
    return train.main(parse.parse(flags(*args)))


def rows(out_dir, kind="loss") -> dict:
    """{step: row} of the train rows (kind="loss") or evaluations (kind="val_loss")."""
    found = [row for row in logger.read_metrics(Path(out_dir) / "metrics.jsonl") if kind in row]
    steps = [row["step"] for row in found]
    assert steps == sorted(set(steps)), "a step is there twice, or out of order"
    return {row["step"]: row for row in found}


def trace(out_dir) -> dict:
    """What must be bitwise the same however often a run was interrupted."""
    return {s: (r["loss"], r["grad_norm"], r["lr"], r["tokens"]) for s, r in rows(out_dir).items()}


# ---- one run on every layout ---------------------------------------------------------------------
def on_ranks(rank, world, *args):
    final = go(*args)
    return final["val_loss"]


def close(a: dict, b: dict, tolerance: float) -> None:
    assert a.keys() == b.keys()
    for step in a:
        for name in ("loss", "grad_norm", "val_loss", "val_bpb", "val_accuracy"):
            if name in a[step]:
                assert a[step][name] == pytest.approx(b[step][name], rel=tolerance, abs=0), (
                    step,
                    name,
                )


FP64, FP32 = ("fp64", 8, 1e-10), ("fp32", 20, 1e-5)


@pytest.mark.parametrize("optim", ["muon", "adamw"])
def test_owners_of_divided_matrices_follow_one_process(tmp_path, text, optim):
    """zero1 x tp: the optimizer that zero1 is given is made by a function, not a class."""
    more = [f"--optim={optim}", "--precision=fp64", "--steps=4"]
    go(text, tmp_path / "one", *more)
    run_ranks(4, on_ranks, text, tmp_path / "four", *more, "--data_parallel=zero1", "--tp=2")
    close(rows(tmp_path / "four"), rows(tmp_path / "one"), 1e-10)


@pytest.mark.parametrize(
    "optim, precision, steps, tolerance",
    [
        ("muon", *FP64),
        *(pytest.param(optim, *FP64, marks=pytest.mark.slow) for optim in ("adamw", "sgd")),
        *(pytest.param(optim, *FP32, marks=pytest.mark.slow) for optim in ("muon", "sgd", "adamw")),
    ],
)
def test_every_layout_is_the_same_run(tmp_path, text, optim, precision, steps, tolerance):
    more = [f"--optim={optim}", f"--precision={precision}", f"--steps={steps}", "--dropout=0.1"]
    more += ["--opt.ns_dtype=float32"] if optim == "muon" and precision == "fp32" else []
    go(text, tmp_path / "one", *more)
    expected = rows(tmp_path / "one"), rows(tmp_path / "one", "val_loss")
    assert expected[0][steps]["loss"] < expected[0][1]["loss"]
    for micro in (1, 2):
        go(text, tmp_path / f"micro{micro}", *more, f"--micro_batch_size={micro}")
    for ranks in (2, 4):
        losses = run_ranks(
            ranks,
            on_ranks,
            text,
            tmp_path / f"ranks{ranks}",
            *more,
            "--micro_batch_size=1",
            "--data_parallel=ddp",
        )
        assert len(set(losses)) == 1  # every rank learns the global figure
    for layout in ("micro1", "micro2", "ranks2", "ranks4"):
        close(rows(tmp_path / layout), expected[0], tolerance)
        close(rows(tmp_path / layout, "val_loss"), expected[1], tolerance)


@pytest.mark.gpu
def test_the_run_is_what_the_formula_says(tmp_path, text, device):
    """Plain SGD without clipping, by hand in float64: a wrong factor anywhere in the loss or the
    sums shows."""
    from data import corpora, dataset
    from model import GPT, GPTConfig

    go(
        text,
        tmp_path,
        *device_flags(device),
        "--optim=sgd",
        "--precision=fp64",
        "--grad_clip=none",
        "--lr=0.3",
        "--steps=4",
        "--schedule=constant",
        "--warmup_steps=2",
        "--micro_batch_size=2",
    )
    corpus = corpora.load(text, "bytes", str(tmp_path))
    take = dataset.Dataset(corpus.train, 16, 1337, 256)
    model = init_weights(
        GPT(GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=32, block_size=16)).double()
    )
    for step, lr in enumerate((0.15, 0.3, 0.3, 0.3)):
        batch = take(range(8 * step, 8 * step + 8))
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        row = rows(tmp_path)[step + 1]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-10)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-10)
        assert (row["lr"], row["tokens"]) == (lr, 128 * (step + 1))
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
    saved = load.newest(tmp_path)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            saved.tensor(f"model/{name}"), p.detach(), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("optim", [gpu(optim) if optim == "muon" else optim for optim in CLASSES])
def test_every_optimizer_learns_with_its_defaults(tmp_path, text, optim, device):
    go(text, tmp_path, *device_flags(device), f"--optim={optim}", "--steps=40", "--eval_every=40")
    losses = rows(tmp_path, "val_loss")
    assert losses[40]["val_loss"] < losses[0]["val_loss"] - 0.02, optim


@pytest.mark.parametrize("optim", ["schedule_free", "schedule_free.SGDScheduleFree"])
def test_schedule_free_is_evaluated_and_saved_at_x_and_looking_changes_nothing(
    tmp_path, text, optim
):
    go(text, tmp_path / "often", f"--optim={optim}", "--eval_every=1", "--save_every=1")
    go(text, tmp_path / "never", f"--optim={optim}", "--eval_every=0", "--save_every=0")
    assert trace(tmp_path / "often") == trace(tmp_path / "never")
    saved = load.newest(tmp_path / "often")
    x, y = saved.tree("model"), saved.tree("training_weights")
    assert x.keys() == y.keys() and not torch.equal(x["embed.weight"], y["embed.weight"])
    go(text, tmp_path / "from", f"--init_from={tmp_path / 'often'}", "--steps=1")
    final = rows(tmp_path / "often", "val_loss")[12]["val_loss"]
    assert rows(tmp_path / "from", "val_loss")[0]["val_loss"] == final


def test_the_batch_ramps_up_and_every_row_is_seen_once(tmp_path, text):
    more = ["--optim=sgd", "--precision=fp64", "--batch_ramp=6", "--batch_ramp_from=2"]
    go(text, tmp_path / "one", *more)
    run_ranks(2, on_ranks, text, tmp_path / "two", *more)
    sizes = [2, 2, 4, 6, 6, 8] + [8] * 6
    tokens = [r["tokens"] for r in rows(tmp_path / "one").values()]
    assert tokens == [16 * sum(sizes[: i + 1]) for i in range(12)]
    close(rows(tmp_path / "one"), rows(tmp_path / "two"), 1e-10)
    with pytest.raises(ValueError, match="does not divide batch_size"):
        go(text, tmp_path, "--batch_ramp=6", "--batch_ramp_from=3")


def test_lr_follows_the_batch_and_momentum_warms_up(tmp_path, text):
    scale = [
        "--lr=0.1",
        "--base_batch_size=2",
        "--schedule=constant",
        "--warmup_steps=0",
        "--steps=3",
    ]
    go(text, tmp_path / "linear", "--optim=sgd", "--lr_scaling=linear", *scale)
    go(text, tmp_path / "sqrt", "--optim=sgd", "--lr_scaling=sqrt", *scale)
    assert rows(tmp_path / "linear")[1]["lr"] == pytest.approx(0.4)
    assert rows(tmp_path / "sqrt")[1]["lr"] == pytest.approx(0.2)
    go(text, tmp_path / "short", "--momentum_warmup=2", "--steps=4")
    go(text, tmp_path / "plain", "--steps=4")
    a, b = rows(tmp_path / "short"), rows(tmp_path / "plain")
    assert a[1]["loss"] == b[1]["loss"] and a[4]["loss"] != b[4]["loss"]
    groups = load.newest(tmp_path / "short").tree("optim/groups")
    assert groups["matrix"]["momentum"] == 0.95
    with pytest.raises(ValueError, match="no momentum"):
        go(text, tmp_path / "adamw", "--optim=adamw", "--momentum_warmup=2")


def test_mup_changes_nothing_at_its_base_and_scales_lr_elsewhere(tmp_path, text):
    shape = ["--n_embd=64", "--n_head=1", "--optim=adamw", "--steps=3"]  # head size 64
    go(text, tmp_path / "off", *shape)
    go(text, tmp_path / "on", *shape, "--mup_base_width=64")
    go(text, tmp_path / "wide", *shape, "--mup_base_width=16")
    assert trace(tmp_path / "on") == trace(tmp_path / "off")
    assert rows(tmp_path / "wide")[1]["lr"] == rows(tmp_path / "off")[1]["lr"] / 4
    with pytest.raises(ValueError, match="no μP rule for LARS"):
        go(text, tmp_path / "lars", "--optim=lars", "--mup_base_width=16")


def test_clipping_works_on_raw_gradients(tmp_path, text):
    base = ["--optim=sgd", "--precision=fp64", "--steps=2", "--lr=0.1"]
    go(text, tmp_path / "off", *base, "--grad_clip=none")
    go(text, tmp_path / "norm", *base, "--grad_clip=0.01")
    go(text, tmp_path / "value", *base, "--grad_clip=none", "--clip_value=1e-4")
    off, norm, value = (rows(tmp_path / n) for n in ("off", "norm", "value"))
    assert (
        off[1]["grad_norm"] == norm[1]["grad_norm"] == value[1]["grad_norm"] > 0.1
    )  # logged before clipping
    assert (
        off[2]["loss"] < norm[2]["loss"] < off[1]["loss"]
        and off[2]["loss"] < value[2]["loss"] < off[1]["loss"]
    )


# ---- nothing is lost -----------------------------------------------------------------------------
def killed_at(step: int, text, out_dir, *more) -> None:
    """The same command in a process that is killed -9 when it has done this step, before the step
    is recorded."""

    def child():
        record = logger.Logger.train
        logger.Logger.train = lambda self, row: (
            os.kill(os.getpid(), signal.SIGKILL) if row["step"] == step else record(self, row)
        )
        go(text, out_dir, *more)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def assert_same_bits(a: dict, b: dict, where: str = "") -> None:
    """Two checkpoints' trees, all but where and on which machine they were written: weights, state,
    RNG, the guard's window, the best evaluation, the position."""
    assert a.keys() == b.keys(), where
    for name in a.keys() - {"config", "record"}:
        x, y = a[name], b[name]
        if isinstance(x, dict):
            assert_same_bits(x, y, f"{where}/{name}")
        else:
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, f"{where}/{name}"


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@needs_fork
@pytest.mark.parametrize(
    "optim",
    [
        (
            name
            if name in ("muon", "soap", "schedule_free")
            else pytest.param(name, marks=pytest.mark.slow)
        )
        for name in CLASSES
    ],
)
def test_kill_and_same_command_again_is_bitwise_the_uninterrupted_run(tmp_path, text, optim):
    more = [
        f"--optim={optim}",
        "--dropout=0.2",
        "--micro_batch_size=4",
        "--precision=bf16",
        "--patience=9",
    ]
    go(text, tmp_path / "whole", *more)
    # Before the first checkpoint, twice after the same one, after the last step
    for step in (3, 7, 9, 12):
        killed_at(step, text, tmp_path / "killed", *more)
    go(text, tmp_path / "killed", *more)
    assert (
        trace(tmp_path / "killed") == trace(tmp_path / "whole")
        and len(trace(tmp_path / "whole")) == 12
    )
    assert rows(tmp_path / "killed", "val_loss").keys() == {0, 6, 12}
    assert_same_bits(*(load.newest(tmp_path / name).tree() for name in ("killed", "whole")))


LAYOUTS = [
    "--data_parallel=ddp --optim=muon",
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (
            "--data_parallel=zero3 --offload_params=disk --offload=cpu --bucket_mb=0.01",
            "--precision=bf16_sr --data_parallel=zero1 --bucket_mb=0.01 --optim=schedule_free",
            "--pp=2 --pp_schedule=zerobubble --optim=muon --n_layer=2 --offload=disk",
            "--diloco_every=3 --diloco.momentum=0.8 --optim=adamw",
            "--precision=fp16 --scaler.init_power=40 --scaler.window=3 --optim=adamw"
            " --opt.fused=true",
            "--compress=topk --compress.fraction=0.05 --optim=adamw --bucket_mb=0.01",
            "--tp=2 --sp=true --optim=muon --n_layer=2 --arch=gpt2",
            (
                "--precision=fp8 --fp8.scaling=tensor --fp8.delayed=true --data_parallel=zero3"
                " --bucket_mb=0.01"
            ),
            "--data_parallel=zero1 --optim=soap --bucket_mb=0.01",
            "--data_parallel=fsdp --optim=lamb",
            "--cp=2 --data_parallel=fsdp --optim=lamb",
            "--data_parallel=zero2 --optim=schedule_free --bucket_mb=0.01",
            "--data_parallel=fsdp --fsdp_shard=1 --reduce_dtype=bf16 --offload=disk",
            "--compress=powersgd --compress.rank=2 --optim=sgd --bucket_mb=0.01",
        )
    ),
]


def killed_at_7(rank, world, *args):
    record = logger.Logger.train
    logger.Logger.train = lambda self, row: (
        os.kill(os.getpid(), signal.SIGKILL) if row["step"] == 7 else record(self, row)
    )
    go(*args)


@needs_fork
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_on_two_ranks_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path, text, layout):
    more = [*layout.split(), "--dropout=0.2", "--micro_batch_size=2"]
    plain = any(word in layout for word in ("fsdp", "diloco", "compress", "precision"))
    more += [] if plain else ["--precision=bf16"]
    run_ranks(2, on_ranks, text, tmp_path / "whole", *more)
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        run_ranks(2, killed_at_7, text, tmp_path / "killed", *more)
    run_ranks(2, on_ranks, text, tmp_path / "killed", *more)
    assert (
        trace(tmp_path / "killed") == trace(tmp_path / "whole")
        and len(trace(tmp_path / "whole")) == 12
    )
    assert_same_bits(*(load.newest(tmp_path / name).tree() for name in ("killed", "whole")))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("optim", ["muon", gpu("schedule_free")])
def test_offloaded_state_is_the_same_run_bitwise(
    tmp_path, text, where, optim, device, deterministic
):
    more = [*device_flags(device), f"--optim={optim}"]
    go(text, tmp_path / "here", *more)
    go(text, tmp_path / "away", *more, f"--offload={where}")
    assert trace(tmp_path / "here") == trace(tmp_path / "away")


def test_diloco_at_one_inner_step_without_momentum_is_the_plain_run(tmp_path, text):
    more = ["--optim=sgd", "--precision=fp64", "--grad_clip=none", "--lr=0.3"]
    go(text, tmp_path / "plain", *more)
    run_ranks(
        2,
        on_ranks,
        text,
        tmp_path / "diloco",
        *more,
        "--diloco_every=1",
        "--diloco.lr=1",
        "--diloco.momentum=0",
    )
    plain, diloco = rows(tmp_path / "plain"), rows(tmp_path / "diloco")
    for step in plain:
        assert diloco[step]["loss"] == pytest.approx(plain[step]["loss"], rel=1e-10)
    close(rows(tmp_path / "plain", "val_loss"), rows(tmp_path / "diloco", "val_loss"), 1e-10)


def test_compression_goes_on_with_other_replicas_and_says_so(tmp_path, text, capfd):
    more = ["--compress=topk", "--compress.fraction=0.05", "--optim=adamw", "--schedule=constant"]
    run_ranks(2, on_ranks, text, tmp_path, *more, "--steps=6")
    owed = [load.newest(tmp_path).tree(f"replicas/residuals/{r}") for r in range(2)]
    run_ranks(4, on_ranks, text, tmp_path, *more, "--steps=7", "--save_every=1")
    assert "2 replicas were saved, now there are 4" in capfd.readouterr().out
    assert len(rows(tmp_path)) == 7 and all(
        row["sent_bytes"] > 0 for row in rows(tmp_path).values()
    )
    assert any(x.abs().sum() > 0 for x in owed[1].values())
    go(text, tmp_path, *more[2:], "--steps=8")
    assert "what compression had not sent yet is dropped" in capfd.readouterr().out


def test_a_run_saved_on_two_ranks_goes_on_alone_and_back(tmp_path, text):
    more = ["--optim=adamw", "--precision=fp64"]
    go(text, tmp_path / "whole", *more)
    run_ranks(2, on_ranks, text, tmp_path / "moved", *more, "--steps=5", "--schedule=constant")
    go(text, tmp_path / "moved", *more, "--steps=9", "--schedule=constant")
    run_ranks(4, on_ranks, text, tmp_path / "moved", *more, "--schedule=constant")
    go(text, tmp_path / "still", *more, "--schedule=constant")
    close(rows(tmp_path / "moved"), rows(tmp_path / "still"), 1e-10)
    assert trace(tmp_path / "moved") != trace(tmp_path / "whole")


@pytest.mark.parametrize("step", [6, gpu(8), 12])
def test_a_stopped_run_goes_on_bitwise_where_a_signal_caught_it(
    tmp_path, text, monkeypatch, capfd, step, device, deterministic
):
    """The stop puts off the evaluations at steps 6 and 12: the next run makes up for them."""
    more = [*device_flags(device), "--patience=9"]
    go(text, tmp_path / "whole", *more)
    plain = logger.Logger.train

    def signal_in_this_step(self, row):
        plain(self, row)
        if row["step"] == step - 1:  # the step that has begun is finished first
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(logger.Logger, "train", signal_in_this_step)
    before = signal.getsignal(signal.SIGTERM)
    assert go(text, tmp_path / "stopped", *more)["step"] == step
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopping after this step, then saving" in capfd.readouterr().err
    assert load.newest(tmp_path / "stopped").step == step
    assert step not in rows(tmp_path / "stopped", "val_loss")
    monkeypatch.undo()
    for _ in range(2):  # the second time there is nothing left to do
        end = go(text, tmp_path / "stopped", *more)
        assert end["step"] == 12 and "val_loss" in end
    assert trace(tmp_path / "stopped") == trace(tmp_path / "whole")
    whole, stopped = (rows(tmp_path / name, "val_loss") for name in ("whole", "stopped"))
    assert {s: row["val_loss"] for s, row in whole.items()} == {
        s: row["val_loss"] for s, row in stopped.items()
    }
    for part in ("model", "optim/state", "best"):
        trees = [load.newest(tmp_path / name).tree(part) for name in ("stopped", "whole")]
        assert_same_bits(*trees)


def stopped_on_rank_1(rank, world, *args):
    if rank == 1:
        plain = control.StopSignal.__init__

        def init(self):
            plain(self)
            self.requested = True

        control.StopSignal.__init__ = init
    return go(*args)["step"]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, text):
    assert run_ranks(2, stopped_on_rank_1, text, tmp_path) == [1, 1]
    assert load.newest(tmp_path).step == 1


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, text, capsys):
    go(text, tmp_path / "whole")
    go(text, tmp_path / "hurt")
    file = tmp_path / "hurt" / "step-00000012" / "rank_0.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    go(text, tmp_path / "hurt")
    assert "damaged" in capsys.readouterr().out
    assert trace(tmp_path / "hurt") == trace(tmp_path / "whole")


def test_a_finished_run_says_so_and_more_steps_go_on(tmp_path, text, capsys):
    first = go(text, tmp_path, "--schedule=constant")
    before = (tmp_path / "metrics.jsonl").read_text()
    again = go(text, tmp_path, "--schedule=constant")
    said = capsys.readouterr().out
    assert "finished at step 12; for more type --steps=24" in said
    assert again["step"] == first["step"]
    go(text, tmp_path, "--schedule=constant", "--steps=9")
    assert "at step 12, beyond --steps=9; for more" in capsys.readouterr().out
    assert [r for r in rows(tmp_path).values()] == [
        r for r in map(json.loads, before.splitlines()) if "loss" in r
    ]
    assert go(text, tmp_path, "--schedule=constant", "--steps=15")["step"] == 15
    assert rows(tmp_path).keys() == set(range(1, 16))


def test_never_sets_the_old_run_aside(tmp_path, text):
    go(text, tmp_path)
    old = trace(tmp_path)
    go(text, tmp_path, "--resume=never", "--seed=2")
    assert trace(tmp_path) != old and rows(tmp_path).keys() == set(range(1, 13))
    (aside,) = tmp_path.glob("earlier-*")
    assert trace(aside) == old and load.newest(aside).step == 12


def test_a_branch_decays_from_a_stable_checkpoint(tmp_path, text):
    go(text, tmp_path / "run", "--schedule=constant", "--keep=none")
    branch = [
        f"--resume={tmp_path / 'run' / 'step-00000005'}",
        f"--out_dir={tmp_path / 'branch'}",
        "--schedule=linear",
        "--steps=8",
    ]
    train.main(parse.parse(branch))
    got, run = rows(tmp_path / "branch"), rows(tmp_path / "run")
    # The same rows on the same weights
    assert got.keys() == {6, 7, 8} and got[6]["loss"] == run[6]["loss"]
    assert got[8]["lr"] < got[6]["lr"] < run[6]["lr"]
    train.main(parse.parse(branch))  # finished: says so
    with pytest.raises(ValueError, match="an --out_dir of its own"):
        train.main(parse.parse([branch[0], f"--out_dir={tmp_path / 'run'}"]))
    with pytest.raises(ValueError, match="a branch cannot change"):
        train.main(parse.parse([branch[0], f"--out_dir={tmp_path / 'other'}", "--n_embd=64"]))


def test_a_folder_of_shards_of_an_unknown_tokenizer_trains_and_samples(tmp_path, text, capsys):
    for split, n in (("train", 4000), ("val", 500)):
        ids = torch.randint(300, (n,), generator=torch.Generator().manual_seed(n))
        (tmp_path / f"{split}.bin").write_bytes(ids.to(torch.int16).numpy().tobytes())
    go(text, tmp_path / "out", f"--data={tmp_path}", "--tokenizer=ids", "--sample_tokens=5")
    sample = capsys.readouterr().out.partition("---- a sample ----")[2].splitlines()[0]
    assert len(sample.split()) == 6 and all(0 <= int(word) < 320 for word in sample.split())


def test_init_from_takes_the_weights_alone(tmp_path, text):
    go(text, tmp_path / "run")
    final = rows(tmp_path / "run", "val_loss")[12]["val_loss"]
    go(text, tmp_path / "tuned", f"--init_from={tmp_path / 'run'}", "--optim=adamw", "--seed=5")
    assert rows(tmp_path / "tuned", "val_loss")[0]["val_loss"] == final
    assert rows(tmp_path / "tuned")[1]["tokens"] == 128
    with pytest.raises(ValueError, match="has n_embd=32 and the command --n_embd=64"):
        go(text, tmp_path / "wide", f"--init_from={tmp_path / 'run'}", "--n_embd=64")


def test_a_run_brings_the_traits_of_its_model(tmp_path, text):
    traits = "--arch=qwen3 --head_dim=12 --mlp_width=48 --rope_base=77 --rope_scaling=linear:2"
    traits += " --norm_eps=1e-3 --qkv_bias=true --logit_cap=9 --logit_cap_form=root --window=7"
    go(text, tmp_path / "run", *traits.split(), "--ngram_embed=3", "--ngram_rows=500")
    final = rows(tmp_path / "run", "val_loss")[12]["val_loss"]
    start = f"--init_from={tmp_path / 'run'}"
    go(text, tmp_path / "tuned", start, "--optim=adamw", "--steps=6")
    assert rows(tmp_path / "tuned", "val_loss")[0]["val_loss"] == final
    go(text, tmp_path / "tuned", start, "--optim=adamw", "--steps=12")  # resumes
    for flag in "--rope_base=78", "--logit_cap=none", "--arch=llama", "--ngram_rows=400":
        with pytest.raises(ValueError, match=f"and the command {flag}"):
            go(text, tmp_path / "other", start, flag)


# ---- mistakes ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flag, says",
    [
        ("--optim=adamv", "did you mean adamw?"),
        ("--optim=muon.Moun", "did you mean Muon?"),
        ("--optim=param_groups", "no such file in optim"),
        ("--opt.beta=0.9", "no such argument"),
        ("--optim=adamw --opt.eps=-1", "eps"),
        ("--schedule.shape=round", "linear, cosine"),
        ("--schedule=cosine --schedule.shape=linear", "no such argument"),
        ("--batch_size=7 --micro_batch_size=2", "--micro_batch_size=1"),
        ("--data=/no/such/file", "/no/such/file"),
        ("--data=shakespear", "shakespeare"),
        ("--block_size=100000", "smaller"),
        ("--vocab_size=64", "vocab_size"),
        ("--tokenizer=bites", "bites"),
        ("--resume=/no/such/run", "/no/such/run"),
        ("--init_from=/no/such/run", "/no/such/run"),
        ("--device=cuda", "--device=cpu"),
        ("--device=tpux", "tpux"),
    ],
)
def test_a_mistake_is_a_sentence_before_anything_starts(tmp_path, text, flag, says):
    if flag == "--device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match=says) as error:
        go(text, tmp_path, *flag.split())
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("step-*"))


def two_ranks(rank, world, *args):
    with pytest.raises(ValueError, match="--batch_size=8"):
        go(*args)


def test_a_batch_that_does_not_divide_is_refused(tmp_path, text):
    run_ranks(2, two_ranks, text, tmp_path, "--batch_size=7")


def test_a_second_run_in_one_out_dir_is_refused(tmp_path, text):
    lock = control.RunLock(tmp_path)
    with pytest.raises(ValueError, match="in use"):
        go(text, tmp_path)
    lock.release()
    go(text, tmp_path, "--steps=1")


def run(*argv, **kwargs):
    return subprocess.run(
        [sys.executable, "train.py", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )


def test_a_mistake_exits_with_2_and_one_line(tmp_path):
    done = run("--stepz=3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--steps" in done.stderr


def test_the_command_line_trains(tmp_path, text):
    done = run(*flags(text, tmp_path, "--sample_tokens=10", "--plot=true"))
    assert done.returncode == 0, done.stderr
    assert "a sample" in done.stdout and (tmp_path / "loss.png").stat().st_size > 5000
    again = parse.parse([str(tmp_path / "config.toml")])
    assert (again.optim, again.lr, again.micro_batch_size) == ("muon", 0.02, 8)


@pytest.mark.slow
def test_a_run_that_compiles_nothing_imports_no_compiler(tmp_path, text):
    code = "import sys, train; from settings import parse; train.main(parse.parse(sys.argv[1:])); "
    code += "assert not {'torch._dynamo', 'sympy'} & {*sys.modules}"
    for more in ("--arch=gpt2", "--data_parallel=zero3", "--data_parallel=fsdp"):
        argv = [sys.executable, "-c", code, *flags(text, tmp_path / more[-5:], more, "--steps=1")]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_five_times_at_random_moments(tmp_path, text, ranks):
    """Every process of the run, from the outside, wherever it is."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launch = [sys.executable, *(torchrun if ranks > 1 else []), "train.py"]
    more = ["--steps=60", "--n_embd=128", "--save_every=7"]
    whole = subprocess.run(
        launch + flags(text, tmp_path / "whole", *more), cwd=ROOT, capture_output=True, timeout=300
    )
    assert whole.returncode == 0, whole.stderr
    began = time.time()
    for i in range(5):
        process = subprocess.Popen(
            launch + flags(text, tmp_path / "killed", *more),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(3 + (time.time() - began) * 7919 % 4)
        subprocess.run(["pkill", "-9", "-f", str(tmp_path / "killed")], check=False)
        process.wait()
    last = subprocess.run(
        launch + flags(text, tmp_path / "killed", *more), cwd=ROOT, capture_output=True, timeout=300
    )
    assert last.returncode == 0, last.stderr
    assert (
        trace(tmp_path / "killed") == trace(tmp_path / "whole")
        and len(trace(tmp_path / "whole")) == 60
    )
