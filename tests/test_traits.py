"""The traits of Llama, Qwen and Mistral beside formulas written out apart from model.py."""

import math
from dataclasses import replace

import pytest
import torch
from harness import init_weights

from layers import rope_scaling
from model import GPT, GPTConfig
from optim.adamw import AdamW
from run.auto import resolve_auto
from settings import fields, parse

SIZE = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=16, vocab_size=64)
LLAMA = GPTConfig(**SIZE, **fields.ARCHS["llama"])
QWEN3 = GPTConfig(**SIZE, **fields.ARCHS["qwen3"], head_dim=6)
CASES = {
    "llama": LLAMA,
    "llama 3.1": replace(LLAMA, rope_scaling="llama3:8:1:4:8", mlp_width=40),
    "qwen2": replace(LLAMA, qkv_bias=True, norm_eps=1e-3, tied=True, rope_scaling="linear:4"),
    "qwen3": QWEN3,
    "qwen3, learned positions": replace(QWEN3, position="learned", norm_eps=1e-2),
    "with all biases but three": replace(QWEN3, bias=True, qkv_bias=False),
    "mistral": replace(LLAMA, window=5, rope_base=1e4),
    "gpt2": GPTConfig(
        **SIZE,
        norm="layernorm",
        activation="gelu_tanh",
        position="learned",
        qk_norm=False,
        tied=True,
        bias=True,
        norm_eps=1e-2,
        logit_cap=None,
        mlp_width=48,
    ),
    "modern with a gate": GPTConfig(**SIZE, activation="swiglu", norm_eps=1e-2, rope_base=50.0),
}


# ---- the formulas --------------------------------------------------------------------------------
def normed(c, x, weights, name, eps=1e-6):
    eps = c.norm_eps or eps
    if c.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y * weights.get(f"{name}.weight", 1.0)
    return y + weights.get(f"{name}.bias", 0.0)


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def frequency(c, i, D):
    """Of pair i, radians a token: waves of more than `original` / low tokens are stretched."""
    f = c.rope_base ** (-2 * i / D)
    kind, *numbers = (c.rope_scaling or "none").split(":")
    if kind == "linear":
        return f / float(numbers[0])
    if kind == "llama3":
        factor, low, high, original = map(float, numbers)
        wave = 2 * math.pi / f
        if wave > original / low:
            return f / factor
        if wave < original / high:
            return f
        smooth = (original / wave - low) / (high - low)
        return (1 - smooth) * f / factor + smooth * f
    return f


def rotated(c, x):  # (B, T, D), one head
    T, D = x.shape[1:]
    rows = []
    for t in range(T):
        turned = [None] * D
        for i in range(D // 2):
            angle = t * frequency(c, i, D)
            a, b = x[:, t, i], x[:, t, i + D // 2]
            turned[i] = a * math.cos(angle) - b * math.sin(angle)
            turned[i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
        rows.append(torch.stack(turned, -1))
    return torch.stack(rows, 1)


def head(c, x, weights, name, which):
    """(B, T, D): one head of queries or keys."""
    q = linear(x, weights, name).unflatten(-1, (-1, c.head_dim or c.n_embd // c.n_head))[
        :, :, which
    ]
    if c.qk_norm:
        plain = replace(c, norm="rmsnorm")
        q = normed(plain, q, weights, f"{name}_norm")
    return rotated(c, q) if c.position == "rotary" else q


def attention(c, x, weights, name):
    T = x.shape[1]
    D = c.head_dim or c.n_embd // c.n_head
    ahead = torch.arange(T)[:, None] - torch.arange(T)
    unseen = (ahead < 0) | (ahead >= (c.window or T))
    values = linear(x, weights, f"{name}.v").unflatten(-1, (-1, D))
    found = []
    for h in range(c.n_head):
        shared = h // (c.n_head // c.n_kv_head)
        q = head(c, x, weights, f"{name}.q", h)
        k = head(c, x, weights, f"{name}.k", shared)
        scores = (q @ k.mT / D**0.5).masked_fill(unseen, -math.inf)
        found.append(scores.softmax(-1) @ values[:, :, shared])
    return linear(torch.cat(found, -1), weights, f"{name}.proj")


def mlp(c, x, weights, name):
    h = linear(x, weights, f"{name}.fc")
    if c.activation == "swiglu":
        g = linear(x, weights, f"{name}.gate")
        y = g / (1 + (-g).exp()) * h
    else:
        y = h / 2 * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())
    return linear(y, weights, f"{name}.proj")


def loss_of(c, weights, ids, targets):
    usual = 1e-5 if c.norm == "layernorm" else 1e-6
    x = weights["embed.weight"][ids]
    if c.position == "learned":
        x = x + weights["positions.weight"][: ids.shape[1]]
    for i in range(c.n_layer):
        name = f"blocks.{i}"
        x = x + attention(
            c, normed(c, x, weights, f"{name}.attn_norm", usual), weights, f"{name}.attn"
        )
        x = x + mlp(c, normed(c, x, weights, f"{name}.mlp_norm", usual), weights, f"{name}.mlp")
    x = normed(c, x, weights, "final_norm", usual)
    logits = x @ weights["embed.weight" if c.tied else "head.weight"].T
    if c.logit_cap is not None:
        logits = c.logit_cap * (logits / c.logit_cap).tanh()
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum()


# ---- the model beside them -----------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_are_the_formulas(case):
    c = CASES[case]
    model = init_weights(GPT(c).double())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    ids = torch.randint(64, (2, 13), generator=generator)
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    expected = loss_of(c, weights, ids[:, :-1], ids[:, 1:])
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, weights[name].grad, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("bias, qkv_bias", [(False, True), (True, False), (True, None)])
def test_queries_keys_and_values_have_their_biases_and_no_other(bias, qkv_bias):
    model = GPT(replace(LLAMA, bias=bias, qkv_bias=qkv_bias))
    found = {n.rsplit(".", 2)[1] for n, _ in model.named_parameters() if n.endswith("bias")}
    others = {"proj", "gate", "fc"} if bias else set()
    assert found == others | (set("qkv") if qkv_bias is not False else set())


def test_a_scaling_that_is_none_is_refused_before_the_data_are_read():
    cfg = parse.parse(["--rope_scaling=yarn:4", "--data=not_there.txt"])
    with pytest.raises(ValueError, match="rope_scaling='yarn:4' is neither"):
        resolve_auto(cfg, torch.device("cpu"), AdamW, False)


def test_the_names_and_shapes_of_qwen3():
    shapes = {name: tuple(p.shape) for name, p in GPT(QWEN3).blocks["0"].named_parameters()}
    assert shapes == {
        "attn_norm.weight": (32,),
        "attn.q.weight": (24, 32),
        "attn.k.weight": (12, 32),
        "attn.v.weight": (12, 32),
        "attn.proj.weight": (32, 24),
        "attn.q_norm.weight": (6,),
        "attn.k_norm.weight": (6,),
        "mlp_norm.weight": (32,),
        "mlp.gate.weight": (128, 32),
        "mlp.fc.weight": (128, 32),
        "mlp.proj.weight": (32, 128),
    }


@pytest.mark.parametrize("arch", fields.ARCHS)
@pytest.mark.parametrize("more", ["", "--mlp_width=40", "--activation=swiglu", "--head_dim=20"])
def test_settings_and_model_agree_on_the_widths(arch, more):
    cfg = parse.parse([f"--arch={arch}", "--n_embd=96", "--n_head=4", *more.split()])
    traits = {n: getattr(fields.with_traits(cfg), n) for n in fields.ARCHS[arch]}
    shape = {n: getattr(cfg, n) for n in ("n_embd", "n_head", "head_dim", "mlp_width")}
    c = GPTConfig(**shape, **traits)
    assert (fields.head_size(cfg), fields.mlp_size(cfg)) == (c.head_size, c.mlp_size)


def test_the_usual_width_of_a_gated_mlp_is_llama_2_s():
    # 8/3 n_embd, rounded up; Llama 2 7B rounds up to multiples of 256, and has 11008.
    assert replace(LLAMA, n_embd=4096).mlp_size == 10944
    assert replace(LLAMA, n_embd=48).mlp_size == 128
    assert replace(LLAMA, n_embd=48, activation="gelu").mlp_size == 192


# ---- rope_scaling --------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["linear:4", "llama3:8:1:4:8192", "llama3:32:1:4:8192", None])
def test_frequencies_are_those_of_transformers(text):
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    kind, *numbers = (text or "default").split(":")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rope = {"rope_type": kind, "rope_theta": 500000.0} | dict(zip(names, map(float, numbers)))
    if kind == "llama3":
        rope["original_max_position_embeddings"] = 8192
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters=rope,
    )
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    if text is None:
        theirs = 1 / 500000.0 ** (torch.arange(0, 128, 2).float() / 128)
    else:
        theirs, factor = utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        assert factor == 1
    ours = rope_scaling.scaled(plain, rope_scaling.parse(text))
    # Both in float32, in which a mixture of two frequencies is off by some 6e-7.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "yarn:4",
        "linear",
        "linear:0.5",
        "linear:nan",
        "linear:-4",
        "linear:1e99",
        "linear:4:5",
        "llama3:8:1:4",
        "llama3:8:4:4:8192",
        "llama3:8:1:4:0",
        "llama3:8:1:4:8192.5",
        "llama3:8:1:4:8192\n",
        "linear:4" * 99,
    ],
)
def test_no_other_scaling_is_taken(text):
    with pytest.raises(ValueError, match="^rope_scaling=.*type --rope_scaling=linear:4, or"):
        rope_scaling.parse(text)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--arch=gpt2 --rope_base=500", "position=learned has no frequencies"),
        ("--arch=track3 --rope_base=10000", "position=rotary_half has a base of its own, 1024"),
        ("--position=learned --rope_scaling=linear:2", "position=learned has no frequencies"),
        ("--head_dim=7", "not head_dim = 7; type --head_dim=8"),
        ("--tp=4 --mlp_width=6", "does not divide the MLP's width, 6; type --mlp_width=8"),
        ("--n_head=3 --tp=3 --head_dim=8 --arch=llama", "MLP's width, 704; type --mlp_width=705"),
        ("--qk_clip=100 --arch=qwen3", "qk_norm=gain undoes that"),
        ("--norm_eps=0", "at least 1e-12"),
        ("--qk_norm=maybe", "true or false, auto, gain"),
        ("--arch=llama --tied=false --n_head=3", "for instance --n_head="),
    ],
)
def test_a_flag_that_cannot_act_is_a_sentence(flags, says):
    with pytest.raises(ValueError) as refusal:
        parse.parse(flags.split())
    assert says in str(refusal.value)


@pytest.mark.parametrize("arch", fields.ARCHS)
def test_a_resolved_recipe_is_taken_again(arch, tmp_path):
    """What auto stood for is in [chosen], and not held against anybody."""
    cfg = parse.parse([f"--arch={arch}"])
    path = tmp_path / "config.toml"
    path.write_text(parse.to_toml(fields.with_traits(cfg), {}))
    again = parse.parse([str(path)])
    assert again.rope_base == fields.ARCHS[arch]["rope_base"]
    assert fields.with_traits(again) == fields.with_traits(cfg)
    saved = parse.from_dict(parse.to_dict(fields.with_traits(cfg)))
    assert saved.norm_eps == fields.ARCHS[arch]["norm_eps"]
