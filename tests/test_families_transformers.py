"""Our model beside transformers' own, of the same folder: logits, losses, gradients, steps; and
back: what we export, loaded there.

Without transformers (requirements-extras.txt) these tests skip. In float64 transformers still
rounds to float32 in four places, which in_float64() lifts: its RMSNorm, its rotary angles, its
router's softmax, and the logits of its loss, which is why losses are taken here from its logits.
"""

import importlib
import math
import os
import re
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_families import AS_THEIRS, CONFIGS, bits, ours_of, run_of, take_apart
from test_families_runs import ours_trained
from test_train import rows

from checkpoint import __main__ as tool
from checkpoint import families
from checkpoint.load import resolve
from data.dataset import Dataset
from data.tokenizer import Tokenizer
from model import GPTConfig, make_moe
from run import build
from settings import parse

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip(
    "transformers", reason="compares with transformers: pip install -r requirements-extras.txt"
)

EXPERTS = ("mixtral", "qwen3_moe", "qwen3_moe_second")
# What only transformers' classes take beside a config.json of CONFIGS.
TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)


@torch.no_grad()
def theirs_of(name: str, folder, dtype=torch.float32, **changes):
    """A small random model of transformers of a family, saved in the folder."""
    config = CONFIGS[name] | TOKENS | changes
    kind = config["model_type"]
    config = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(1)
    for key, p in model.named_parameters():
        centre = 1.0 if p.ndim == 1 and key.endswith("weight") else 0.0
        p.copy_(centre + 0.2 * torch.randn(p.shape, generator=generator))
    model = model.to(dtype).eval()
    # Shards of a few tensors, as a large model has.
    model.save_pretrained(folder, max_shard_size="40KB" if kind != "gpt2" else "1GB")
    return model


def in_float64(model):
    """transformers' model without its own rounding to float32, see above."""
    config = model.config
    if "expert" in str(config) and hasattr(model, "set_experts_implementation"):
        # Its usual one, F.grouped_mm, has no float64.
        model.set_experts_implementation("eager")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(plain_norm, module)
        if type(module).__name__.endswith("TopKRouter"):
            module.forward = types.MethodType(plain_router, module)
        if type(module).__name__.endswith("SparseMoeBlock") and transformers.__version__ < "5":
            module.forward = types.MethodType(plain_experts, module)
        if type(module).__name__.endswith("RotaryEmbedding"):
            frequency = frequencies(config)

            def angles(x, position_ids, *_, frequency=frequency, **__):
                angle = position_ids[..., None].double() * frequency
                angle = torch.cat([angle, angle], -1)
                return angle.cos(), angle.sin()

            module.forward = angles
    return model


def plain_norm(self, x):
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def plain_router(self, x):
    """(logits, gates, chosen) of x (..., C), as transformers 5 has them, in x's dtype."""
    logits = x.flatten(0, -2) @ self.weight.T
    gates, chosen = logits.softmax(-1).topk(self.top_k)
    if getattr(self, "norm_topk_prob", True):
        gates = gates / gates.sum(-1, keepdim=True)
    return logits, gates, chosen


def plain_experts(self, x):
    """(y, logits) of x (B, T, C), as transformers 4 has them, in x's dtype."""
    logits = self.gate(x)
    gates, chosen = logits.softmax(-1).topk(self.top_k)
    if getattr(self, "norm_topk_prob", True):
        gates = gates / gates.sum(-1, keepdim=True)
    gates = torch.zeros_like(logits).scatter(-1, chosen, gates)  # (B, T, E)
    y = sum(g.unsqueeze(-1) * expert(x) for g, expert in zip(gates.unbind(-1), self.experts))
    return y, logits


def frequencies(config) -> torch.Tensor:
    """The rotary frequencies (D/2,) by the formulas of the Llama papers, in float64."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None:  # transformers 4
        rope = {"rope_type": "default"} | (getattr(config, "rope_scaling", None) or {})
        rope["rope_theta"] = config.rope_theta
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    f = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if rope["rope_type"] == "linear":
        return f / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        length = 2 * math.pi / f
        n = rope["original_max_position_embeddings"]
        smooth = (n / length - low) / (high - low)
        mixed = (1 - smooth) * f / rope["factor"] + smooth * f
        mixed = torch.where(length > n / low, f / rope["factor"], mixed)
        return torch.where(length < n / high, f, mixed)
    return f


def batch(vocab_size: int, n: int = 1) -> torch.Tensor:
    """(2, 25) ids: 24 tokens and their targets."""
    generator = torch.Generator().manual_seed(n)
    return torch.randint(vocab_size, (2, 25), generator=generator)


def loss_of(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, sum of the token losses) of a model of transformers."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return logits, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_losses_and_all_gradients_are_those_of_transformers(tmp_path, name):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        folder = tmp_path / str(dtype)
        theirs = theirs_of(name, folder, dtype)
        if dtype == torch.float64:
            theirs = in_float64(theirs)
        ours = ours_of(folder, dtype, *AS_THEIRS[name])
        ids = batch(theirs.config.vocab_size)
        expected, loss = loss_of(theirs, ids)
        loss.backward()
        found = ours(ids[:, :-1])
        ours_loss = ours(ids[:, :-1], ids[:, 1:])
        ours_loss.backward()
        assert (found - expected).abs().max() <= tolerance * max(1, expected.abs().max())
        assert abs(ours_loss - loss) <= tolerance * abs(loss)
        gradients = {key: p.grad for key, p in theirs.named_parameters()}
        family = theirs.config.model_type
        for key, p in ours.named_parameters():
            their = take_apart(gradients, family, key)
            scale = max(1, their.abs().max())
            assert (p.grad - their).abs().max() <= tolerance * scale, key


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in EXPERTS])
def test_documents_are_apart_as_transformers_packs_them(tmp_path, name):
    """Without a cache, whose presence lets them see each other: findings/README.md."""
    theirs = in_float64(theirs_of(name, tmp_path, torch.float64))
    ours = ours_of(
        tmp_path, torch.float64, *AS_THEIRS[name], "--document_mask=true", "--document_token=3"
    )
    ids = batch(theirs.config.vocab_size)[:, :-1]
    ids[0, 5] = ids[0, 6] = ids[1, 0] = ids[1, 20] = 3
    starts = ours.document_starts(ids)
    assert len(starts.unique()) > 3
    positions = torch.arange(24) - starts
    expected = theirs(ids, position_ids=positions, use_cache=False).logits
    assert (ours(ids) - expected).abs().max() <= 1e-10 * max(1, expected.abs().max())
    assert (theirs(ids, use_cache=False).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_loads_without_a_warning_and_gives_the_same_logits(tmp_path, name, caplog):
    theirs = theirs_of(name, tmp_path / "from")
    run_of(tmp_path / "from", tmp_path / "run", *AS_THEIRS[name])
    tool.main(["export", str(tmp_path / "run"), str(tmp_path / "to"), "--format=hf"])
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        transformers.utils.logging.enable_propagation()
        again, facts = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "to", output_loading_info=True
        )
    assert not caplog.records and not any(facts.values()), (caplog.records, facts)
    # Without a window Mistral is Llama.
    if name == "mistral_wide":
        assert again.config.model_type == "llama"
    else:
        assert type(again) is type(theirs)
    assert again.dtype == torch.float32
    ids = batch(theirs.config.vocab_size)
    assert torch.equal(loss_of(again.eval(), ids)[0], loss_of(theirs, ids)[0])
    # What the weights compute is said by the same keys.
    theirs, again = theirs.config.to_dict(), again.config.to_dict()
    silent = {
        "transformers_version",
        "_name_or_path",
        "max_position_embeddings",
        "max_window_layers",
    }
    silent |= families.SILENT | {"attn_pdrop", "embd_pdrop", "resid_pdrop"}
    differ = {key for key in theirs if theirs[key] != again.get(key)} - silent
    differ -= {"sliding_window"} if name == "mistral_wide" else set()
    assert differ <= {"n_inner", "head_dim"}, differ


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensors_come_back_to_the_bit(tmp_path, name):
    theirs_of(name, tmp_path / "from")
    run_of(tmp_path / "from", tmp_path / "run", *AS_THEIRS[name])
    tool.main(["export", str(tmp_path / "run"), str(tmp_path / "to"), "--format=hf"])
    assert bits(tmp_path / "to") == bits(tmp_path / "from")


@pytest.mark.parametrize("name", ["gpt2", "llama3", "mistral", "qwen2", "qwen3", *EXPERTS])
def test_ten_steps_of_a_run_are_those_of_a_plain_loop_over_transformers(tmp_path, name):
    theirs = in_float64(theirs_of(name, tmp_path / "in", torch.float64)).train()
    # Its dropout is no part of what is compared.
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    run = tmp_path / "run"
    words = "--steps=10 --precision=fp64 --optim=adamw --lr=1e-3 --weight_decay=0.1"
    words += " --schedule=constant --warmup_steps=0 --opt.betas=0.9,0.95 --on_spike=none"
    run_of(tmp_path / "in", run, *words.split(), *AS_THEIRS[name])
    cfg = parse.from_dict(resolve(run).tree("config"))
    data = Dataset(build.corpus(cfg).train, cfg.block_size, cfg.seed, cfg.vocab_size)
    is_table = re.compile(r".*(wte|wpe|embed_tokens)\.weight")
    # transformers 5 has the matrices of all experts in one tensor.
    matrices = {k: p for k, p in theirs.named_parameters() if p.ndim > 1 and not is_table.match(k)}
    others = [p for k, p in theirs.named_parameters() if k not in matrices]
    optimizer = torch.optim.AdamW(
        [dict(params=[*matrices.values()]), dict(params=others, weight_decay=0.0)],
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
    )
    ours = rows(run)
    assert [*ours] == [*range(1, 11)]
    losses = []
    for step in range(10):
        ids = data(range(step * cfg.batch_size, (step + 1) * cfg.batch_size))
        loss = loss_of(theirs, ids)[1] / ids[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert abs(losses[-1] - ours[step + 1]["loss"]) <= 1e-6, step
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
def test_an_exports_tokenizer_is_the_runs(tmp_path, arch):
    from test_tokenizer_json import KINDS, PROSE, write

    there = write(tmp_path / "there", KINDS["byte_level"])
    run = ours_trained(tmp_path, f"--arch={arch}", "--optim=adamw", f"--tokenizer={there}")
    tool.main(["export", run, str(tmp_path / "out"), "--format=hf"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Tokenizer(str(there))
    assert theirs(PROSE).input_ids == ours.encode(PROSE).tolist()
    assert theirs.eos_token_id == ours.end_of_text


# ---- the layer with experts alone ----------------------------------------------------------------
# Name -> (transformers' class, what its config says besides, what ours says).
LAYERS = {
    "mixtral": ("MixtralSparseMoeBlock", dict(intermediate_size=24, num_local_experts=6), {}),
    "qwen3_moe": (
        "Qwen3MoeSparseMoeBlock",
        dict(moe_intermediate_size=24, num_experts=6, norm_topk_prob=False),
        dict(normalize_gates=False),
    ),
    "deepseek_v3": (
        "DeepseekV3MoE",
        dict(
            moe_intermediate_size=24,
            n_routed_experts=6,
            n_shared_experts=2,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            norm_topk_prob=True,
        ),
        dict(router="sigmoid", n_shared_expert=2),
    ),
}


def layer_of(name: str) -> torch.nn.Module:
    """transformers' layer, with random weights and, where it has one, a bias in the choice."""
    kind, sizes, _ = LAYERS[name]
    config = transformers.AutoConfig.for_model(
        name, hidden_size=32, num_experts_per_tok=2, hidden_act="silu", **sizes
    )
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    layer = getattr(module, kind)(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for x in [*layer.parameters(), *layer.buffers()]:
            x.copy_(0.3 * torch.randn(x.shape, generator=generator))
    return layer


def of_theirs(tensors: dict, name: str) -> torch.Tensor:
    """Our tensor of the layer, out of a dict of theirs."""
    if name == "selection_bias":
        return tensors["gate.e_score_correction_bias"]
    if name.startswith("shared."):
        part = {"gate": "gate", "fc": "up", "proj": "down"}[name.split(".")[1]]
        return tensors[f"shared_experts.{part}_proj.weight"]
    fronts = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}
    for family, front in fronts.items():
        there = {f"model.layers.0.{front}.{key}": x for key, x in tensors.items()}
        there |= {f"model.layers.0.mlp.{key}": x for key, x in tensors.items()}
        try:
            return take_apart(there, family, f"blocks.0.mlp.{name}")
        except StopIteration:
            continue
    raise KeyError(name)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_experts_is_that_of_transformers(name):
    theirs = layer_of(name)
    sizes = dict(n_expert=6, n_expert_active=2, expert_width=24, router_z_loss=None)
    ours = make_moe(GPTConfig(n_embd=32, activation="swiglu", **sizes, **LAYERS[name][2]))
    held = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
    names = [key for key, _ in ours.named_parameters()]
    has_bias = name == "deepseek_v3"
    with torch.no_grad():
        for key in names + ["selection_bias"] * has_bias:
            x = ours.get_buffer(key) if key == "selection_bias" else ours.get_parameter(key)
            x.copy_(of_theirs(held, key))
    x = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(4))
    weights = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(5))
    results = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y = y[0] if isinstance(y, tuple) else y  # transformers 4 gives the logits, too
        (y * weights).sum().backward()
        results.append((y, leaf.grad, {k: p.grad for k, p in layer.named_parameters()}))
    (y, dx, found), (their_y, their_dx, their) = results
    pairs = {"y": (y, their_y), "dx": (dx, their_dx)}
    pairs |= {key: (found[key], of_theirs(their, key)) for key in names}
    for key, (a, b) in pairs.items():
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max()), key
    # The bias changes the choice, so a layer that ignored it would be another one.
    assert has_bias == bool(ours.selection_bias.any())
    if has_bias:
        ours.selection_bias.zero_()
        assert (ours(x) - their_y).abs().max() > 0.1
