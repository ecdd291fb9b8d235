"""The optimization benchmark (configs/track3.toml): its model and optimizer against both written
out here."""

import contextlib
import io
import math
import tempfile
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from matrix import TINY, difference, runs, text, trace
from test_matrix import saved_and_resumed
from test_model import awake, tokens

import train
from metrics import logger
from model import GPT, GPTConfig, initial_weight
from optim import param_groups
from run import auto, build, optimizers
from run.options import resolve_options
from settings import fields, parse

RECIPE = str(Path(train.__file__).parent / "configs" / "track3.toml")
RECORD = RECIPE.replace("track3", "track3_record")
ARCH = fields.ARCHS["track3"]
SMALL = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=32, block_size=16, vocab_size=64) | ARCH
# Heads of 16, a quarter as wide
MUP = SMALL | dict(n_kv_head=1, attention_scale=None, mup_base_width=8)


# ---- the model -----------------------------------------------------------------------------------
def normed(x, gain=1.0):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def turned(x, heads, dim):
    """x (B, T, H D) -> (B, H, T, D): normed, then the first quarter's pairs turn, as complex
    numbers."""
    x = normed(x.view(*x.shape[:2], heads, dim)).transpose(1, 2)
    turns = torch.cat(
        [1 / 1024 ** torch.linspace(0, 1, dim // 4, dtype=x.dtype), torch.zeros(dim // 4)]
    )
    angle = torch.outer(torch.arange(x.shape[2]), turns)
    z = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([z.real, z.imag], -1)


def by_hand(w, x, y, heads, kv_heads, scale, width=1.0):
    """The sum of the token losses. w: name -> weight; width: what the logits are multiplied by, but
    for b."""

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    h = normed(w["embed.weight"][x], w["embed_norm.weight"])
    (B, T, C), dim = h.shape, h.shape[-1] // heads
    future = torch.ones(T, T).triu(1).bool()
    for i in range(2):
        a, to = normed(h, w[f"blocks.{i}.attn_norm.weight"]), f"blocks.{i}.attn"
        q, k = turned(linear(f"{to}.q", a), heads, dim), turned(linear(f"{to}.k", a), kv_heads, dim)
        v = linear(f"{to}.v", a).view(B, T, kv_heads, dim).transpose(1, 2)
        k, v = (z.repeat_interleave(heads // kv_heads, 1) for z in (k, v))
        p = (scale * q @ k.mT).masked_fill(future, -torch.inf).softmax(-1)
        h = h + linear(f"{to}.proj", (p @ v).transpose(1, 2).reshape(B, T, C))
        wide = linear(f"blocks.{i}.mlp.fc", normed(h, w[f"blocks.{i}.mlp_norm.weight"]))
        h = h + linear(f"blocks.{i}.mlp.proj", wide.clamp(min=0) ** 2)
    z = width * normed(h, w["final_norm.weight"]) @ w["head.weight"].T + w["head.bias"]
    z = 15 * z / (z**2 + 225).sqrt()
    return (z.logsumexp(-1) - z.gather(-1, y[..., None])[..., 0]).sum()


@pytest.mark.parametrize("shape, scale, width", [(SMALL, 0.12, 1.0), (MUP, 8 / 16, 8 / 32)])
def test_loss_and_every_gradient_are_the_formula_s(shape, scale, width):
    model, x, y = awake(GPTConfig(**shape)), tokens(3, 16), tokens(3, 16, seed=1)
    with torch.no_grad():
        model.head.weight.mul_(20)  # logits of some size, or the cap would hardly show
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = by_hand(w, x, y, 2, shape["n_kv_head"], scale, width)
    loss = model(x, y)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    for name, p in model.named_parameters():
        size = w[name].grad.abs().max()
        assert size > 1e-4, name
        assert (p.grad - w[name].grad).abs().max() < 1e-12 * size, name


def test_the_start_is_torch_s_own_std_and_zero_where_the_residual_stream_begins():
    c = GPTConfig(**SMALL)
    assert (
        abs(initial_weight(c, "blocks.0.mlp.fc.weight", (1024, 256)).std() - (3 * 256) ** -0.5)
        < 2e-4
    )
    assert abs(initial_weight(c, "embed.weight", (1024, 256)).std() - 1) < 0.01
    for name, p in GPT(c).named_parameters():
        start = initial_weight(c, name, tuple(p.shape))
        if p.ndim == 1:
            assert start.eq(name.endswith("norm.weight")).all(), name
        else:
            assert start.any() != (name.endswith("proj.weight") or name == "head.weight"), name


# ---- the optimizer -------------------------------------------------------------------------------
def test_two_steps_of_the_recipe_s_optimizer_are_what_it_says():
    cfg = parse.parse([RECIPE, "--device=cpu"])
    Muon = optimizers.find_optimizer(cfg.optim)
    cfg = auto.resolve_auto(cfg, torch.device("cpu"), Muon, False)
    model = awake(GPTConfig(**SMALL))
    lrs = build.learning_rates(cfg, Muon, cfg.sub("opt"), param_groups.kinds(model))
    groups = param_groups.param_groups(model, lrs, cfg.weight_decay, muon=True)
    options = resolve_options(cfg, Muon)["opt"]
    optimizer, w = (
        Muon(groups, **options),
        {n: p.detach().clone() for n, p in model.named_parameters()},
    )
    m, v = ({n: torch.zeros_like(p) for n, p in w.items()} for _ in range(2))
    for t in (1, 2):
        for i, (name, p) in enumerate(model.named_parameters()):
            g = (
                torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * i + t)).to(p)
                * 1e-6
            )
            p.grad = g.clone()
            if name.startswith("blocks") and p.ndim == 2:
                m[name] = 0.95 * m[name] + 0.05 * g
                u = 0.95 * m[name] + 0.05 * g
                left, s, right = torch.linalg.svd(u / u.norm(), full_matrices=False)
                for _ in range(12):
                    s = 2 * s - 1.5 * s**3 + 0.5 * s**5
                step = max(1, p.shape[0] / p.shape[1]) ** 0.5 * (left * s) @ right
                w[name] = w[name] * (1 - 0.025 * 0.05) - 0.025 * step
            else:
                lr = {"embed.weight": 0.7, "head.weight": 0.004}.get(name, 0.015)
                m[name], v[name] = 0.8 * m[name] + 0.2 * g, 0.95 * v[name] + 0.05 * g**2
                step = m[name] / (1 - 0.8**t) / ((v[name] / (1 - 0.95**t)).sqrt() + 1.9e-16)
                w[name] = w[name] * (1 - lr * 0.001) - lr * step
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), w[name], rtol=1e-10, atol=1e-10)


def test_the_recipe_holds_its_rate_and_goes_down_to_zero_over_the_last_70_percent():
    factor = build.lr_schedule(parse.parse([RECIPE]), {})
    for step, expected in (
        (0, 1),
        (975, 1),
        (976, 2274 / 2275),
        (2000, 1250 / 2275),
        (3249, 1 / 2275),
    ):
        assert factor(step) == pytest.approx(expected, rel=1e-12)


def test_the_record_s_recipe_cools_down_as_its_script_does_each_kind_by_itself():
    cfg = parse.parse([RECORD])
    options = {name.partition(".")[2]: x for name, x in cfg.options.items() if "schedule." in name}
    factor = build.lr_schedule(cfg, options)
    # (kind, lr, the script's constant c, to which lr is min(lr, c (2900 - t)^1.2))
    for kind, lr, c in (
        ("matrix", cfg.lr, 3.3169534699576625e-06),
        ("embedding", cfg.embed_lr, 4.976805410800738e-05),
        ("head", cfg.head_lr, 5.184172302917436e-07),
        ("scalar", cfg.scalar_lr, 1.6589351369335795e-06),
    ):
        for t in (0, 500, 1000, 1480, 1500, 2000, 2690, 2899):
            wanted = min(lr, c * (2900 - t) ** 1.2)
            assert lr * factor(t, kind) == pytest.approx(wanted, rel=2e-3), (kind, t)


# ---- the run -------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", [RECIPE, RECORD])
def test_a_tiny_version_of_the_recipe_learns(tmp_path, recipe):
    flags = [
        recipe,
        f"--data={text(tmp_path)}",
        "--tokenizer=bytes",
        f"--out_dir={tmp_path}/out",
        "--device=cpu",
        "--precision=fp32",
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=32",
        "--block_size=32",
        "--batch_size=8",
        "--steps=12",
        "--eval_every=6",
        "--eval_tokens=512",
        "--sample_tokens=9",
        "--vocab_size=256",
    ]
    if recipe == RECORD:  # its average, and where it looks ahead, in 12 steps
        flags += ["--ema_from=8", "--hook.ema_nesterov.start=2", "--hook.ema_nesterov.stop=9"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(parse.parse(flags))
    found = logger.read_metrics(tmp_path / "out" / "metrics.jsonl")
    rows = [row["val_loss"] for row in found if "val_loss" in row]
    assert rows[0] == pytest.approx(math.log(256)) and rows[-1] < rows[0] - 1


FLAGS = [*TINY, "--arch=track3", "--n_embd=32", "--block_size=16"]
LAYOUTS = {
    "tp 2 + sp": ["--tp=2", "--sp=true"],
    "cp 2": ["--cp=2"],
    "pp 2": ["--pp=2"],
    "zero3 2": ["--data_parallel=zero3"],
    "fsdp 2": ["--data_parallel=fsdp"],
}


def on(ranks, flags):
    with tempfile.TemporaryDirectory() as folder:
        text(folder)
        arguments = folder, "fp64", ["SGD", "Muon"], [*FLAGS, *flags]
        runs(0, 1, *arguments) if ranks == 1 else run_ranks(ranks, runs, *arguments)
        return {name: trace(f"{folder}/{name}") for name in ("SGD", "Muon")}


@pytest.fixture(scope="module")
def alone():
    return on(1, [])


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=pytest.mark.slow)
        if layout in ("cp 2", "pp 2", "zero3 2", "fsdp 2")
        else layout
        for layout in LAYOUTS
    ],
)
def test_cut_up_or_spread_it_is_one_process(alone, layout):
    for name, found in on(2, LAYOUTS[layout]).items():
        assert difference(found, alone[name]) < 1e-10, name
        assert abs(found[-1] / found[0] - 1) > 1e-4, (
            f"{name} learns nothing, so this proves nothing"
        )


@pytest.mark.slow
def test_saved_in_one_layout_and_resumed_in_the_next(tmp_path):
    places = ["one process", "tp 2 + sp", "pp 2 interleaved", "fsdp 2 x tp 2", "zero3 2"]
    shape = ["--n_layer=4", "--n_embd=32", "--block_size=16", "--arch=track3"]
    saved_and_resumed(tmp_path, places, list(zip(places, places[1:] + places[:1])), ["muon"], shape)


# ---- who is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, says",
    [
        (
            "--n_head=128",
            "position=rotary_half needs a head size divisible by 4, not n_embd/n_head = 2",
        ),
        ("--mup_base_width=64", "--attention_scale=none"),
        ("--attention_scale=0", "--attention_scale=none"),
        ("--logit_cap_form=tanh --logit_cap=none", "--logit_cap=15"),
        ("--norm=rmsnorm_gains", "rmsnorm_gain"),
        ("--qk_clip=100", "--qk_norm=false"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_type(flags, says):
    with pytest.raises(ValueError) as error:
        parse.parse(["--arch=track3", *flags.split()])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_the_refusals_say_to_type_goes():
    for flags in (
        "--mup_base_width=64 --attention_scale=none",
        "--logit_cap=none",
        "--n_head=64",
        "--n_head=128 --position=learned",
        "--qk_clip=100 --qk_norm=false",
    ):
        cfg = fields.with_traits(parse.parse(["--arch=track3", *flags.split()]))
        assert parse.from_dict(parse.to_dict(cfg)) == cfg  # as a checkpoint holds it
