"""Every flag of train.py does what it says: one observable each."""

import math
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from test_train import go, rows, trace

import train
from checkpoint import load as checkpoint
from data import corpora, dataset
from metrics import flops as monitor
from model import GPT, GPTConfig
from optim import param_groups
from run import evaluate
from settings import fields, parse


def groups(out_dir) -> dict:
    return checkpoint.newest(out_dir).tree("optim/groups")


def test_keep_and_save_every(tmp_path, text):
    for keep, kept in (("1", [12]), ("2", [10, 12]), ("none", [2, 4, 6, 8, 10, 12])):
        go(text, tmp_path / keep, f"--keep={keep}", "--save_every=2")
        assert sorted(int(p.name[5:]) for p in (tmp_path / keep).glob("step-*")) == kept
    go(text, tmp_path / "end", "--save_every=0")
    assert [p.name for p in (tmp_path / "end").glob("step-*")] == ["step-00000012"]


def test_log_every_and_eval_every(tmp_path, text):
    go(text, tmp_path, "--log_every=5", "--eval_every=4")
    assert list(rows(tmp_path)) == [5, 10, 12] and list(rows(tmp_path, "val_loss")) == [0, 4, 8, 12]


def test_bits_per_byte_and_perplexity(tmp_path, text):
    go(text, tmp_path)
    for row in rows(tmp_path, "val_loss").values():
        assert row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2))
        assert row["perplexity"] == pytest.approx(math.exp(row["val_loss"]))


def test_held_out_rows_are_spread_over_the_whole_set(tmp_path, text, monkeypatch):
    seen, plain = [], dataset.Dataset.__call__
    monkeypatch.setattr(
        dataset.Dataset, "__call__", lambda self, n: (seen.extend(n), plain(self, n))[1]
    )
    go(text, tmp_path / "a", "--steps=1", "--eval_tokens=160", "--eval_every=5")
    per_epoch = (len(corpora.load(text, "bytes", str(tmp_path)).val) - 1) // 16
    assert seen[:10] == [i * per_epoch // 10 for i in range(10)]
    del seen[:]
    go(
        text,
        tmp_path / "b",
        "--steps=1",
        "--eval_tokens=160",
        "--eval_every=5",
        "--eval_rows=first",
    )
    assert seen[:10] == [*range(10)]


def test_clip_value_then_grad_clip(tmp_path, text, monkeypatch):
    before, after = [], []
    zero_grad = torch.nn.Module.zero_grad
    norm = torch.nn.utils.get_total_norm
    monkeypatch.setattr(
        torch.nn.utils,
        "get_total_norm",
        lambda g: (before.append([x.clone() for x in g]), norm(g))[1],
    )
    monkeypatch.setattr(
        torch.nn.Module,
        "zero_grad",
        lambda self, **k: (
            after.extend(p.grad.clone() for p in self.parameters()),
            zero_grad(self, **k),
        )[1],
    )
    go(
        text,
        tmp_path,
        "--optim=sgd",
        "--precision=fp64",
        "--steps=1",
        "--eval_every=0",
        "--clip_value=1e-3",
        "--grad_clip=1e-2",
    )
    cut = [g.clamp(-1e-3, 1e-3) for g in before[0]]
    total = torch.cat([g.flatten() for g in cut]).norm()
    expected = sorted((g * 1e-2 / (total + 1e-6)).norm().item() for g in cut)
    assert total > 1e-2 and sorted(g.norm().item() for g in after) == pytest.approx(
        expected, rel=1e-9
    )


def test_each_kind_has_its_lr_and_decay(tmp_path, text):
    lrs = ["--lr=0.1", "--embed_lr=0.2", "--head_lr=0.3", "--scalar_lr=0.4", "--weight_decay=0.5"]
    go(text, tmp_path, "--optim=adamw", "--norm=layernorm", *lrs, "--steps=1")
    found = {kind: (g["initial_lr"], g["weight_decay"]) for kind, g in groups(tmp_path).items()}
    assert found == {
        "embedding": (0.2, 0.0),
        "matrix": (0.1, 0.5),
        "head": (0.3, 0.5),
        "scalar": (0.4, 0.0),
    }
    with pytest.raises(ValueError, match="head_lr"):
        go(text, tmp_path / "tied", "--tied=true", "--head_lr=0.3")


def test_decay_embeddings_decays_all_that_has_two_dimensions(tmp_path, text):
    """As nanoGPT does: the tied head and the positions too, no gain and no bias."""
    lines = ["--arch=gpt2", "--optim=adamw", "--weight_decay=0.5", "--steps=1"]
    for given, decay in (("true", 0.5), ("false", 0.0)):
        go(text, tmp_path / given, *lines, f"--decay_embeddings={given}")
        found = {kind: g["weight_decay"] for kind, g in groups(tmp_path / given).items()}
        assert found == {"embedding": decay, "matrix": 0.5, "scalar": 0.0}
    go(text, tmp_path / "muon", "--weight_decay=0.5", "--decay_embeddings=true", "--steps=1")
    found = {kind: g["weight_decay"] for kind, g in groups(tmp_path / "muon").items()}
    assert found == {"embedding": 0.5, "matrix": 0.5, "head": 0.5}


@pytest.mark.parametrize("recipe", ["nanogpt_cpu", "gpt2_124m"])
def test_the_recipes_after_nanogpt_decay_what_nanogpt_decays(recipe):
    """Its configure_optimizers: every parameter with two dimensions or more, and no other."""
    root = Path(train.__file__).parent
    cfg = fields.with_traits(parse.parse([str(root / "configs" / f"{recipe}.toml")]))
    cfg = fields.update(cfg, vocab_size=64, n_layer=2, n_embd=16, n_head=2)
    with torch.device("meta"):
        model = GPT(
            GPTConfig(**{name: getattr(cfg, name) for name in GPTConfig.__dataclass_fields__})
        )
    lrs = dict.fromkeys(("embedding", "matrix", "head", "scalar"), cfg.lr)
    made = param_groups.param_groups(
        model, lrs, cfg.weight_decay, decay_embeddings=cfg.decay_embeddings
    )
    decay = {p: g["weight_decay"] for g in made for p in g["params"]}
    assert {*decay} == {*model.parameters()} and cfg.decay_embeddings
    assert all(decay[p] == (0.1 if p.ndim > 1 else 0) for p in model.parameters())


def test_a_branch_changes_every_lr_left_to_it(tmp_path, text):
    go(
        text,
        tmp_path / "run",
        "--optim=adamw",
        "--lr=1e-2",
        "--embed_lr=5e-3",
        "--steps=3",
        "--clip_value=1",
    )
    branch = [
        f"--resume={tmp_path / 'run'}",
        f"--out_dir={tmp_path / 'b'}",
        "--lr=1e-4",
        "--steps=4",
    ]
    train.main(
        parse.parse([*branch, "--clip_value=none", "--schedule=constant", "--warmup_steps=0"])
    )
    found = {kind: g["initial_lr"] for kind, g in groups(tmp_path / "b").items()}
    assert found == {"embedding": 1e-4, "matrix": 1e-4, "head": 1e-4}
    assert rows(tmp_path / "b")[4]["lr"] == 1e-4
    assert checkpoint.newest(tmp_path / "b").tree("config")["clip_value"] is None
    with pytest.raises(ValueError, match="more than --steps=2"):
        train.main(
            parse.parse(
                [f"--resume={tmp_path / 'run'}", f"--out_dir={tmp_path / 'c'}", "--steps=2"]
            )
        )


def test_warmup_start_and_momentum_warmup(tmp_path, text):
    warm = ["--warmup_steps=4", "--warmup_start=0.5", "--momentum_warmup=4"]
    go(text, tmp_path, "--lr=0.1", *warm, "--steps=8", "--save_every=1", "--keep=none")
    assert [rows(tmp_path)[i]["lr"] for i in (1, 2, 3, 4, 5)] == pytest.approx(
        [0.05, 0.0625, 0.075, 0.0875, 0.1]
    )
    momenta = [
        checkpoint.load(tmp_path / f"step-0000000{i}").tree("optim/groups")["matrix"]["momentum"]
        for i in (1, 3, 5)
    ]
    assert momenta == pytest.approx([0.85, 0.9, 0.95])


def test_kinds_decay_by_themselves_and_momentum_cools_down(tmp_path, text):
    own = ["--decay_frac=0.5", "--embed_decay_frac=0.25", "--head_decay_frac=1"]
    power = ["--schedule=wsd", "--schedule.shape=power", "--schedule.power=2"]
    more = ["--momentum_cooldown=4", "--warmup_steps=0", "--steps=8", "--save_every=1"]
    go(text, tmp_path, "--lr=0.1", "--embed_lr=0.2", *own, *power, *more, "--keep=none")
    for i in range(1, 9):
        groups = checkpoint.load(tmp_path / f"step-0000000{i}").tree("optim/groups")
        t = i - 1  # of the step that was saved
        lrs = {kind: groups[kind]["lr"] for kind in ("matrix", "embedding", "head")}
        assert lrs["matrix"] == pytest.approx(0.1 * min(1, (8 - t) / 4) ** 2)
        assert lrs["embedding"] == pytest.approx(0.2 * min(1, (8 - t) / 2) ** 2)
        assert lrs["head"] == pytest.approx(0.01 * ((8 - t) / 8) ** 2)
        assert groups["matrix"]["momentum"] == pytest.approx(0.95 - 0.1 * max(0, t - 4) / 4)
        assert rows(tmp_path)[i]["lr"] == pytest.approx(lrs["matrix"])
    said = (tmp_path / "train.log").read_text()
    assert "decay from step 4 on, embedding from step 6 on, head from step 0 on" in said
    with pytest.raises(ValueError, match="--scalar_decay_frac: this model has no such"):
        go(text, tmp_path / "x", "--scalar_decay_frac=0.5")


def mfu_on_ranks(rank, world, *args):
    go(*args)
    return True


def test_mfu_is_per_device_against_the_given_peak(tmp_path, text):
    go(text, tmp_path / "1", "--peak_flops=1e9")
    run_ranks(2, mfu_on_ranks, text, tmp_path / "2", "--peak_flops=1e9")
    flops = monitor.flops_per_token(2 * 12 * 32 * 32 + 32 * 256, 2, 32, 16)
    for ranks in (1, 2):
        row = rows(tmp_path / str(ranks))[5]
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] / ranks * flops / 1e9)
    go(text, tmp_path / "unknown")
    assert rows(tmp_path / "unknown")[5]["mfu"] is None


def test_threads_sample_tokens_and_data_url_are_handed_on(tmp_path, text, monkeypatch):
    threads, made, urls, load = [], [], [], corpora.load
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(evaluate, "generate", lambda model, ids, n, *a: (made.append(n), ids)[1])
    monkeypatch.setattr(
        corpora,
        "load",
        lambda name, words, cache, url, *rest: (
            urls.append((cache, url)),
            load(name, words, cache),
        )[1],
    )
    go(
        text,
        tmp_path,
        "--threads=3",
        "--sample_tokens=17",
        "--data_url=http://mirror",
        "--data_dir=elsewhere",
        "--steps=2",
    )
    assert threads[0] == 3 and made == [17] and urls == [("elsewhere", "http://mirror")]


@pytest.mark.slow
def test_dropout_seed_and_logit_cap_change_the_run(tmp_path, text):
    go(text, tmp_path / "plain", "--steps=3")
    flags = """--dropout=0.5 --seed=7 --logit_cap=0.5 --qk_norm=false --n_kv_head=1
        --activation=gelu --tied=true --position=learned --bias=true --zero_init=false --init=gpt2
        --grad_clip=0.01 --norm=layernorm --norm=rmsnorm_gain --embed_norm=true --head_bias=true
        --position=rotary_half --attention_scale=0.5 --init=torch --logit_cap_form=root
        --head_lr=0.5 --embed_lr=0.5"""
    for flag in flags.split():
        more = (
            ["--zero_init=false"]
            if flag
            in (
                "--qk_norm=false",
                "--n_kv_head=1",
                "--activation=gelu",
                "--init=gpt2",
                "--init=torch",
                "--position=rotary_half",
                "--attention_scale=0.5",
            )
            else []
        )
        go(text, tmp_path / flag, "--steps=3", flag, *more)
        go(text, tmp_path / f"{flag}-without", "--steps=3", *more) if more else None
        other = tmp_path / f"{flag}-without" if more else tmp_path / "plain"
        assert rows(tmp_path / flag)[3]["loss"] != rows(other)[3]["loss"], flag


# ---- mistakes leave an earlier run as it was -----------------------------------------------------
def test_changed_data_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("to be or not to be, " * 200)
    go(str(path), tmp_path / "run", "--steps=2")
    path.write_text("that is the question " * 200)
    with pytest.raises(ValueError, match="has changed"):
        go(str(path), tmp_path / "run", "--steps=4")


def test_a_mistake_beside_never_leaves_the_run_alone(tmp_path, text):
    go(text, tmp_path)
    before = trace(tmp_path)
    with pytest.raises(ValueError):
        go(text, tmp_path, "--resume=never", "--optim=adamv")
    assert trace(tmp_path) == before and not list(tmp_path.glob("earlier-*"))


def test_fewer_steps_than_done_change_nothing(tmp_path, text):
    first = go(text, tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in ("config.toml", "metrics.jsonl")}
    assert go(text, tmp_path, "--steps=5") == go(text, tmp_path) == first
    assert files == {name: (tmp_path / name).read_bytes() for name in files}


def test_an_out_dir_that_cannot_be_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="cannot be used"):
        go(text, text)


@pytest.mark.parametrize(
    "flag",
    [
        "--opt.ns_steps=none",
        "--opt.momentum=[1]",
        "--opt.normuon_beta2=abc",
        "--schedule.shape=1,2",
        "--schedule=onecycle --schedule.div_factor=none",
        "--schedule=constant --min_lr_frac=0.3",
        "--schedule=cosine --decay_frac=0.3",
        "--schedule=cosine --head_decay_frac=0.3",
        "--scalar_decay_frac=1.5",
        "--schedule.power=2",
        "--schedule.shape=power --schedule.power=0",
        "--threads=100000",
        "--steps=1e20",
        "--batch_size=1e10",
        "--device=meta",
        "--optim=adamw.",
    ],
)
def test_odd_values_are_sentences(tmp_path, text, flag):
    with pytest.raises(ValueError) as error:
        go(text, tmp_path, *flag.split())
    assert "\n" not in str(error.value)


def test_plot(tmp_path, text):
    for wanted in (True, False):
        go(text, tmp_path / str(wanted), "--steps=2", f"--plot={wanted}".lower())
        assert (tmp_path / str(wanted) / "loss.png").exists() == wanted
