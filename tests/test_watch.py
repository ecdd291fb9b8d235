"""What --watch_every shows is what a plain computation finds, on every layout; looking changes
nothing."""

import tempfile

import pytest
import torch
from harness import device_flags, run_ranks
from matrix import LARGER, LAYOUTS, MODEL_PARALLEL, runs
from matrix import text as squares
from test_qk_clip import GPT2, GQA, Scores, batch, watched
from test_train import go, rows, trace

from metrics import plot
from metrics.watch import KINDS
from optim import param_groups

FIELDS = ("loss", "grad_norm", "max_logit", "log_z", "weight_rms", "update_rms", "clip_frac")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [GQA | dict(qk_norm=True, logit_cap=2.0), GPT2 | dict(logit_cap=None), GQA | dict(window=3)],
)
def test_a_row_is_what_is_found_by_hand(shape, device):
    model, optimizer, watcher = watched(shape, 0.01, None, every=2, device=device)
    named, kinds = dict(model.named_parameters()), param_groups.kinds(model)
    cores_before = [block.attn.attention_fn for block in model.blocks.values()]
    norms = [torch.tensor(x, device=device).double() for x in (0.5, 2.0, 3.0, 0.1, 4.0)]
    for step, norm in enumerate(norms):
        watcher.start(step)
        looked = [block.attn.attention_fn for block in model.blocks.values()] != cores_before
        assert looked == (step in (1, 3))
        tops, z, before = {}, [], {name: p.detach().clone() for name, p in named.items()}
        for part in batch(step, device).chunk(2):
            model(part[:, :-1], part[:, 1:]).backward()
            with torch.no_grad():
                model.eval()
                cores = {name: block.attn.attention_fn for name, block in model.blocks.items()}
                for name, block in model.blocks.items():
                    block.attn.attention_fn = tops.setdefault(name, Scores(shape.get("window")))
                z.append(model(part[:, :-1]).exp().sum(-1).log().flatten())
                for name, block in model.blocks.items():
                    block.attn.attention_fn = cores[name]
                model.train()
        optimizer.step(), optimizer.zero_grad()
        row = watcher.row(norm, 1.0)
        if not looked:
            assert row == {}
            continue
        z, layers = torch.cat(z), [tops[name].top.max().item() for name in model.blocks]
        expected = {
            "max_logit": max(layers),
            "log_z": z.mean().item(),
            "log_z_max": z.max().item(),
            "clip_frac": {1: 1 / 2, 3: 1 / 2}[step],
        }
        expected |= {f"max_logit/{i}": x for i, x in enumerate(layers)}
        for kind in set(kinds.values()):
            names = [name for name in kinds if kinds[name] == kind]
            new = torch.cat([named[name].detach().flatten() for name in names])
            old = torch.cat([before[name].flatten() for name in names])
            expected[f"weight_rms/{kind}"] = new.square().mean().sqrt().item()
            expected[f"update_rms/{kind}"] = (new - old).square().mean().sqrt().item()
        assert row == pytest.approx(expected, rel=1e-11)
        assert [block.attn.attention_fn for block in model.blocks.values()] == cores_before
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks


def cell(layout, *more, optim="Muon"):
    """The train rows of a run with z-loss, QK-clip and watching on this layout, {step: row}."""
    world, flags = LAYOUTS.get(layout) or MODEL_PARALLEL.get(layout, (1, []))
    with tempfile.TemporaryDirectory() as folder:
        squares(folder)
        flags = [*LARGER, "--n_layer=4", "--eval_every=0", "--data_parallel=ddp", *more, *flags]
        args = folder, "fp64", [optim], flags
        runs(0, 1, *args) if world == 1 else run_ranks(world, runs, *args)
        return rows(f"{folder}/{optim}")


def apart(layout, alone, *more, **optim):
    found, largest = cell(layout, *more, **optim), 0.0
    assert found.keys() == alone.keys()
    for step, row in alone.items():
        names = {name for name in row if name.startswith(FIELDS)}
        assert names == {name for name in found[step] if name.startswith(FIELDS)}
        largest = max(
            [largest, *(abs(found[step][n] - row[n]) / max(abs(row[n]), 1e-3) for n in names)]
        )
    return largest


NORMAL = [
    "--watch_every=2",
    "--z_loss=0.1",
    "--qk_norm=false",
    "--qk_clip=0.05",
    "--zero_init=false",
]
GROUPED = [*NORMAL[:2], "--arch=gpt2", "--qk_clip=0.001", "--n_kv_head=2", "--micro_batch_size=2"]
FAST = ("pp 2 x tp 2",)


@pytest.fixture(scope="module")
def alone():
    return cell("one process", *NORMAL)


# 8 layers
LAST = [name for name in [*LAYOUTS, *MODEL_PARALLEL] if name not in (*FAST, "pp 4 interleaved")]


@pytest.mark.parametrize(
    "layout", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in LAST)]
)
def test_z_loss_qk_clip_and_what_is_watched_are_those_of_one_process(alone, layout):
    assert apart(layout, alone, *NORMAL) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one process", "tp 2 + sp", "cp 2", "pp 2 x tp 2", "zero3 2"])
def test_log_z_is_that_of_all_chunks_of_the_loss(alone, layout):
    assert apart(layout, alone, *NORMAL, "--loss_chunk=5") < 1e-10


@pytest.mark.slow
def test_each_of_them_shows_in_the_loss(alone):
    for left_out in ("--z_loss=none", "--qk_clip=none"):
        other = cell("one process", *NORMAL, left_out)
        assert abs(other[6]["loss"] / alone[6]["loss"] - 1) > 1e-5, left_out


@pytest.mark.parametrize(
    "layout, optim",
    [
        ("fsdp 2 x tp 2", "SGD"),
        *(
            pytest.param(layout, optim, marks=pytest.mark.slow)
            for layout in ("pp 2 x tp 2", "zero1 2 x pp 2", "fsdp 2", "cp 2 ulysses")
            for optim in ("SGD", "Muon")
        ),
    ],
)
def test_biases_grouped_queries_a_tied_head_and_parts_of_weights_too(layout, optim):
    assert apart(layout, cell("one process", *GROUPED, optim=optim), *GROUPED, optim=optim) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "selective", "segments_2", "offload"])
def test_recomputed_attention_counts_as_what_it_is(alone, how):
    assert apart("cp 2", alone, *NORMAL, f"--activation_checkpoint={how}") < 1e-10


@pytest.mark.slow
def test_compiled_blocks_are_looked_at_too(alone):
    more = ["--compile=default", "--compile.backend=aot_eager"]
    assert apart("one process", alone, *NORMAL, *more) < 1e-10


@pytest.mark.gpu
def test_looking_changes_nothing_and_its_steps_have_rows(tmp_path, text, device, deterministic):
    go(text, tmp_path / "off", *device_flags(device))
    go(text, tmp_path / "on", *device_flags(device), "--watch_every=4", "--log_every=3")
    off, on = trace(tmp_path / "off"), trace(tmp_path / "on")
    assert [*on] == [3, 4, 6, 8, 9, 12] and all(on[step] == off[step] for step in on)
    found = rows(tmp_path / "on", "max_logit")
    assert [*found] == [4, 8, 12] and set(rows(tmp_path / "on")[3]) == set(
        rows(tmp_path / "off")[3]
    )
    logged = [row["grad_norm"] > 1 for row in rows(tmp_path / "off").values()]
    assert [r["clip_frac"] for r in found.values()] == [
        sum(logged[i : i + 4]) / 4 for i in (0, 4, 8)
    ]
    assert {k.split("/")[1] for k in found[4] if k.startswith("update_rms")} <= set(KINDS)
    plot.to_csv(tmp_path / "on", tmp_path / "table.csv")
    assert "max_logit/1" in (tmp_path / "table.csv").read_text().splitlines()[0]


@pytest.mark.gpu
def test_a_step_the_loss_scaler_skips_has_no_update(tmp_path, text, device):
    flags = [
        *device_flags(device),
        "--precision=fp16",
        "--scaler.init_power=126",
        "--watch_every=1",
        "--steps=2",
    ]
    go(text, tmp_path, *flags, "--qk_norm=false", "--qk_clip=1e-6")
    first = rows(tmp_path)[1]
    assert "max_logit" in first and not any(name.startswith("update_rms") for name in first)
