"""Weights in and out, without transformers: folders made by hand, and each family's formulas."""

import functools
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import train
from checkpoint import __main__ as tool
from checkpoint import families, family_names, pretrained
from model import GPT
from run import build
from run import pretrained as start
from settings import parse
from settings.fields import update, with_traits

LLAMA = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
# Name -> a config.json, as transformers would write it.
CONFIGS = {
    "gpt2": dict(model_type="gpt2", vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt2_wide": dict(
        model_type="gpt2",
        vocab_size=300,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=64,
        n_inner=72,
        activation_function="gelu",
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-3,
    ),
    "llama": dict(model_type="llama", **LLAMA),
    "llama3": dict(
        model_type="llama",
        **LLAMA,
        rope_theta=500000.0,
        rope_scaling=LLAMA3,
        tie_word_embeddings=True,
    ),
    "llama_linear": dict(
        model_type="llama",
        **LLAMA,
        rope_scaling=dict(rope_type="linear", factor=2.0),
        attention_bias=True,
        mlp_bias=True,
    ),
    "mistral": dict(model_type="mistral", **LLAMA, sliding_window=8),
    "mistral_wide": dict(model_type="mistral", **LLAMA, sliding_window=None, head_dim=16),
    "qwen2": dict(model_type="qwen2", **LLAMA, tie_word_embeddings=True),
    "qwen2_window": dict(
        model_type="qwen2",
        **LLAMA,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=0,
    ),
    "qwen3": dict(model_type="qwen3", **LLAMA, head_dim=16),
    "mixtral": dict(model_type="mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(
        model_type="qwen3_moe",
        **LLAMA,
        head_dim=16,
        num_experts=5,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
    "qwen3_moe_second": dict(
        model_type="qwen3_moe",
        **LLAMA,
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=24,
        decoder_sparse_step=2,
        use_sliding_window=True,
        sliding_window=8,
        tie_word_embeddings=True,
    ),
}
# Flags of a run without what keeps experts' loads even: it is in nobody's weights or loss.
AS_THEIRS = {
    name: ["--moe_bias_lr=none", "--router_z_loss=none"] if "expert" in str(config) else []
    for name, config in CONFIGS.items()
}


# ---- what the tests look with --------------------------------------------------------------------
def config_of(folder, *flags):
    """The settings of a run that begins at the folder."""
    cfg = start.with_its_settings(parse.parse([f"--init_from={folder}", *flags]))
    return update(with_traits(cfg), attention="sdpa")


def run_of(folder, out, *flags) -> dict:
    """A run of one step that begins at the folder's weights; with --lr=0 it ends at them."""
    text = out.parent / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    # Learned positions bring their own.
    config = folder / "config.json"
    has_no_end = config.exists() and b"gpt2" not in config.read_bytes()
    block_size = ["--block_size=32"] if has_no_end else []
    words = [f"--init_from={folder}", f"--data={text}", f"--out_dir={out}", *block_size]
    words += ["--batch_size=4", "--eval_tokens=256", "--plot=false", "--sample_tokens=0"]
    return train.main(parse.parse([*words, "--steps=1", "--optim=sgd", "--lr=0", *flags]))


def ours_of(folder, dtype=torch.float32, *flags) -> GPT:
    """Our model with the folder's weights."""
    model = GPT(build.model_config(config_of(folder, *flags))).to(dtype)
    weights = start.weights(folder)
    for name, p in model.named_parameters():
        weights.fill(p.detach(), name)
    return model


def take_apart(theirs: dict, family: str, name: str) -> torch.Tensor:
    """Our tensor of this name, out of a dict of theirs."""
    there = next(x for x in family_names.places(family, name) if x.name in theirs)
    x = theirs[there.name]
    if there.expert is not None:
        x = x[there.expert]
    if there.transposed:
        x = x.T
    return x if there.part is None else x.chunk(there.part[1])[there.part[0]]


def bits(folder) -> dict:
    """Tensor -> (dtype, shape, bytes) of all safetensors in the folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                x = file.get_tensor(name)
                found[name] = x.dtype, tuple(x.shape), pretrained.as_bytes(x)
    return found


# ---- each family by its formulas -----------------------------------------------------------------
def tensors_of(config: dict, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes that the family's files have."""
    generator = torch.Generator().manual_seed(0)
    found = {}

    def add(name, *shape):
        # Numbers that every dtype of a file holds exactly.
        x = torch.randint(-16, 17, shape, generator=generator) / 64
        found[name] = (x + 1 if "norm.weight" in name or ".ln_" in name else x).to(dtype)

    def add_linear(name, *shape, bias=False):
        add(f"{name}.weight", *shape)
        if bias:
            add(f"{name}.bias", shape[0])

    if config["model_type"] == "gpt2":
        c, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
        add("transformer.wte.weight", config["vocab_size"], c)
        add("transformer.wpe.weight", config["n_positions"], c)
        for i in range(config["n_layer"]):
            front = f"transformer.h.{i}"
            parts = [("attn.c_attn", c, 3 * c), ("attn.c_proj", c, c)]
            parts += [("mlp.c_fc", c, inner), ("mlp.c_proj", inner, c)]
            for part, n_in, n_out in parts:
                add(f"{front}.{part}.weight", n_in, n_out)
                add(f"{front}.{part}.bias", n_out)
            for norm in ("ln_1", "ln_2"):
                add(f"{front}.{norm}.weight", c)
                add(f"{front}.{norm}.bias", c)
        add("transformer.ln_f.weight", c)
        add("transformer.ln_f.bias", c)
        if not config.get("tie_word_embeddings", True):
            add("lm_head.weight", config["vocab_size"], c)
        return found
    c, inner = config["hidden_size"], config["intermediate_size"]
    size = config.get("head_dim") or c // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    bias = config.get("attention_bias", False)
    qkv_bias = bias or config["model_type"] == "qwen2"
    add("model.embed_tokens.weight", config["vocab_size"], c)
    for i in range(config["num_hidden_layers"]):
        front = f"model.layers.{i}"
        add(f"{front}.input_layernorm.weight", c)
        add(f"{front}.post_attention_layernorm.weight", c)
        for part, n in (("q", q), ("k", kv), ("v", kv)):
            add_linear(f"{front}.self_attn.{part}_proj", n, c, bias=qkv_bias)
        add_linear(f"{front}.self_attn.o_proj", c, q, bias=bias)
        names = mlp_names(config, i)
        width = config.get("moe_intermediate_size", inner) if len(names) > 1 else inner
        for gate, up, down in names:
            add_linear(f"{front}.{gate}", width, c, bias=bias)
            add_linear(f"{front}.{up}", width, c, bias=bias)
            add_linear(f"{front}.{down}", c, width, bias=bias)
        if len(names) > 1:
            add(f"{front}.{router_name(config)}.weight", len(names), c)
        if config["model_type"] in ("qwen3", "qwen3_moe"):
            add(f"{front}.self_attn.q_norm.weight", size)
            add(f"{front}.self_attn.k_norm.weight", size)
    add("model.norm.weight", c)
    if not config.get("tie_word_embeddings", False):
        add("lm_head.weight", config["vocab_size"], c)
    return found


def mlp_names(config: dict, layer: int) -> list[tuple[str, str, str]]:
    """(gate, up, down) of the layer's MLP, or of each of its experts."""
    if config["model_type"] == "mixtral":
        front = "block_sparse_moe.experts"
        return [
            (f"{front}.{e}.w1", f"{front}.{e}.w3", f"{front}.{e}.w2")
            for e in range(config["num_local_experts"])
        ]
    fronts = ["mlp"]
    if "num_experts" in config and (layer + 1) % config.get("decoder_sparse_step", 1) == 0:
        fronts = [f"mlp.experts.{e}" for e in range(config["num_experts"])]
    return [tuple(f"{front}.{part}_proj" for part in ("gate", "up", "down")) for front in fronts]


def router_name(config: dict) -> str:
    return "block_sparse_moe.gate" if config["model_type"] == "mixtral" else "mlp.gate"


def write_folder(folder, config: dict, tensors: dict, n_files: int = 1) -> None:
    """A folder as transformers writes it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if n_files == 1:
        save_file({k: x.contiguous() for k, x in tensors.items()}, folder / "model.safetensors")
        return
    places = {}
    for i in range(n_files):
        file = f"model-{i + 1:05d}-of-{n_files:05d}.safetensors"
        part = {key: tensors[key].contiguous() for key in sorted(tensors)[i::n_files]}
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def attend(q, k, v, n_head: int, window: int | None):
    """Causal attention of (B, T, heads, D) by its formula."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(n_head // x.shape[1], 1) for x in (k, v))
    i = torch.arange(q.shape[2])
    back = i[:, None] - i
    seen = (back >= 0) & (back < (window or len(i)))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def gpt2_logits(config: dict, t: dict, ids):
    """The formulas of Radford et al. 2019, on the tensors by their names."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + config.get("layer_norm_epsilon", 1e-5)).sqrt()
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(x, name):
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    def act(x):
        if config.get("activation_function") == "gelu":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    n = config["n_head"]
    x = t["transformer.wte.weight"][ids] + t["transformer.wpe.weight"][: ids.shape[1]]
    for i in range(config["n_layer"]):
        front = f"transformer.h.{i}"
        h = linear(norm(x, f"{front}.ln_1"), f"{front}.attn.c_attn")
        q, k, v = (part.unflatten(-1, (n, -1)) for part in h.chunk(3, -1))
        x = x + linear(attend(q, k, v, n, None), f"{front}.attn.c_proj")
        h = act(linear(norm(x, f"{front}.ln_2"), f"{front}.mlp.c_fc"))
        x = x + linear(h, f"{front}.mlp.c_proj")
    head = t.get("lm_head.weight", t["transformer.wte.weight"])
    return norm(x, "transformer.ln_f") @ head.T


def llama_logits(config: dict, t: dict, ids):
    """The formulas of Touvron et al. 2023 and their successors, on the tensors by their names."""

    def norm(x, name):
        x = x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
        return x * t[f"{name}.weight"]

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0)

    def mlp(gate, up, down, front, x):
        gate = linear(x, f"{front}.{gate}")
        return linear(gate * torch.sigmoid(gate) * linear(x, f"{front}.{up}"), f"{front}.{down}")

    def turn(x):
        # As complex numbers: pair (i, i + D/2) turns by position times frequency.
        a, b = x.chunk(2, -1)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] * frequency
        z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], -1)

    n = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // n
    base = config.get("rope_theta", 1e6 if config["model_type"] == "mixtral" else 1e4)
    frequency = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    scaled = [stretched(f, config.get("rope_scaling")) for f in frequency.tolist()]
    frequency = torch.tensor(scaled, dtype=torch.float64)
    window = config.get("sliding_window")
    x = t["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        front = f"model.layers.{i}"
        h = norm(x, f"{front}.input_layernorm")
        q, k, v = (
            linear(h, f"{front}.self_attn.{part}_proj").unflatten(-1, (-1, size)) for part in "qkv"
        )
        if config["model_type"] in ("qwen3", "qwen3_moe"):
            q, k = (norm(z, f"{front}.self_attn.{s}_norm") for z, s in ((q, "q"), (k, "k")))
        x = x + linear(attend(turn(q), turn(k), v, n, window), f"{front}.self_attn.o_proj")
        h = norm(x, f"{front}.post_attention_layernorm")
        mlps = [functools.partial(mlp, *names, front) for names in mlp_names(config, i)]
        if len(mlps) == 1:
            x = x + mlps[0](h)
            continue
        scores = linear(h, f"{front}.{router_name(config)}").softmax(-1)
        x = x + through_experts(config, mlps, scores, h)
    head = t.get("lm_head.weight", t["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def through_experts(config: dict, experts: list, scores, x):
    """Token by token: scores (B, T, E), x (B, T, C) -> (B, T, C)"""
    k = config["num_experts_per_tok"]
    is_normalized = config["model_type"] == "mixtral" or config.get("norm_topk_prob", False)
    rows = []
    for s, token in zip(scores.flatten(0, 1), x.flatten(0, 1)):
        chosen = sorted(range(len(experts)), key=lambda e: -s[e].item())[:k]
        total = sum(s[e] for e in chosen) if is_normalized else 1
        rows.append(sum(s[e] / total * experts[e](token) for e in chosen))
    return torch.stack(rows).view_as(x)


def stretched(f: float, scaling: dict | None) -> float:
    if scaling is None:
        return f
    if scaling["rope_type"] == "linear":
        return f / scaling["factor"]
    n_waves = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = min(1.0, max(0.0, (n_waves - low) / (high - low)))
    return f * (share + (1 - share) / scaling["factor"])


def logits_of(config: dict, tensors: dict, ids):
    formula = gpt2_logits if config["model_type"] == "gpt2" else llama_logits
    return formula(config, tensors, ids)


IDS = torch.randint(300, (2, 25), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_each_family_computes_its_familys_formulas(tmp_path, name):
    config = CONFIGS[name]
    tensors = tensors_of(config)
    write_folder(tmp_path / "in", config, tensors, n_files=1 + (name[0] == "l"))
    leaves = {key: x.requires_grad_() for key, x in tensors.items()}
    expected = logits_of(config, leaves, IDS[:, :-1])
    loss = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    model = ours_of(tmp_path / "in", torch.float64, *AS_THEIRS[name])
    assert (model(IDS[:, :-1]) - expected).abs().max() < 1e-10
    model(IDS[:, :-1], IDS[:, 1:]).backward()
    gradients = {key: x.grad for key, x in leaves.items()}
    n_numbers = 0
    for key, p in model.named_parameters():
        their = take_apart(gradients, config["model_type"], key)
        assert (p.grad - their).abs().max() < 1e-10 * max(1, their.abs().max()), key
        n_numbers += p.numel()
    assert n_numbers == sum(x.numel() for x in tensors.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_what_comes_in_goes_out_again_to_the_bit(tmp_path, name, capsys):
    config = CONFIGS[name]
    write_folder(tmp_path / "in", config, tensors_of(config, torch.float32), n_files=2)
    run_of(tmp_path / "in", tmp_path / "run", *AS_THEIRS[name])
    tool.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format=hf"])
    assert bits(tmp_path / "out") == bits(tmp_path / "in")
    # And its config.json says the same model again.
    one, two = (
        families.fields_of(json.loads((tmp_path / x / "config.json").read_text()))
        for x in ("in", "out")
    )
    assert one.fields == two.fields
    length = two.longest
    # The run's 32, or what llama3's frequencies are for.
    assert length == {"gpt2": 64, "gpt2_wide": 64, "llama3": 128}.get(name, 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_float_dtype_is_read(tmp_path, dtype):
    tensors = tensors_of(CONFIGS["qwen2"], dtype)
    write_folder(tmp_path / "in", CONFIGS["qwen2"], tensors)
    model = ours_of(tmp_path / "in")
    for key, p in model.named_parameters():
        assert torch.equal(p, take_apart(tensors, "qwen2", key).float()), key
