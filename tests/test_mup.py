"""μP's coordinate check (Yang et al. 2022, D.1): what a few steps change does not depend on the
width."""

import pytest
import torch
from harness import init_weights

from model import GPT, GPTConfig
from optim import mup, param_groups
from optim.adamw import AdamW
from optim.attributes import attribute, own_classes
from optim.kl_soap import KLSOAP
from optim.lamb import LAMB
from optim.lion import Lion
from optim.muon import Muon
from optim.pmuon import PMuon
from optim.sgd import SGD
from optim.soap import SOAP
from optim.soap_muon import SOAPMuon

RUNS = {
    "adamw": (AdamW, 0.01, {}),
    "lion": (Lion, 0.003, {}),
    "sgd": (SGD, 0.3, {}),
    "muon": (Muon, 0.05, {"ns_dtype": "float32"}),
    "soap": (SOAP, 0.01, {}),
    "kl_soap": (KLSOAP, 0.01, {}),
    "soap_muon": (SOAPMuon, 0.05, {"ns_dtype": "float32"}),
    "pmuon": (PMuon, 0.05, {}),
}
SLOW = ("soap", "kl_soap", "soap_muon", "pmuon")
EACH = [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in RUNS]
WIDTHS = (32, 64, 128, 256)


SWIGLU = dict(activation="swiglu", norm="rmsnorm_gain")


def change(name: str, width: int, on: bool, **traits) -> dict[str, float]:
    """RMS of how much 4 steps change the hidden states before the head, and the logits."""
    optimizer_class, lr, options = RUNS[name]
    shape = dict(n_layer=2, n_head=4, n_kv_head=4, n_embd=width, block_size=16, vocab_size=64)
    traits = dict(zero_init=False, logit_cap=None, qk_norm=False) | traits
    if "activation" in traits:
        traits["mlp_width"] = 3 * width
    c = GPTConfig(**shape, **traits, mup_base_width=32 if on else None)
    model = init_weights(GPT(c))
    rule = mup.lr_multipliers(optimizer_class, width, 32) if on else {}
    lrs = {kind: lr * rule.get(kind, 1.0) for kind in ("matrix", "embedding", "head", "scalar")}
    matrices_only = attribute(optimizer_class, "matrices_only")
    groups = param_groups.param_groups(model, lrs, 0.0, matrices_only)
    optimizer = optimizer_class(groups, **options)
    tokens = torch.randint(64, (8, 17), generator=torch.Generator().manual_seed(0))
    seen = {}
    for name, module in ("hidden", model.final_norm), ("logits", model.head):
        module.register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: out.detach()})
        )
    history = []
    for _ in range(5):
        loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        history.append(dict(seen))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {k: (history[-1][k] - history[0][k]).square().mean().sqrt().item() for k in history[0]}


def growth(name: str, on: bool, **traits) -> dict[str, float]:
    """How much the change grows from the narrowest to the widest model (8 times as wide)."""
    first, last = (change(name, width, on, **traits) for width in (WIDTHS[0], WIDTHS[-1]))
    return {k: last[k] / first[k] for k in first}


@pytest.mark.parametrize("name", EACH)
def test_under_mup_the_change_does_not_depend_on_the_width(name):
    for what, factor in growth(name, on=True).items():
        assert 0.5 < factor < 2, (what, factor)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_with_a_gate_and_heads_of_their_own_width_too(name):
    for what, factor in growth(name, True, **SWIGLU, head_dim=16).items():
        assert 0.5 < factor < 2, (what, factor)


@pytest.mark.parametrize("name", EACH)
def test_without_it_the_change_grows_with_the_width(name):
    assert growth(name, on=False)["logits"] > 2.5


def test_the_rules_are_the_papers_table():
    assert mup.lr_multipliers(AdamW, 512, 64)["matrix"] == 1 / 8
    assert mup.lr_multipliers(SGD, 512, 64) == {
        "embedding": 8,
        "matrix": 1,
        "head": 8,
        "scalar": 8,
    }
    assert mup.lr_multipliers(Muon, 512, 64)["matrix"] == 1
    assert mup.lr_multipliers(Muon, 1024, 64, adjust_lr_fn="match_rms_adamw")["matrix"] == 1 / 4
    for cls in SOAP, KLSOAP:
        assert mup.lr_multipliers(cls, 1024, 64) == {
            "embedding": 1,
            "matrix": 1 / 4,
            "head": 4,
            "scalar": 1,
        }
    rules = {name: cls for name, cls in own_classes().items() if cls.mup_rule is not None}
    assert set(own_classes()) - set(rules) == {"adafactor", "lamb", "lars", "muown", "shampoo"}
    for cls in rules.values():
        assert set(mup.lr_multipliers(cls, 64, 64).values()) == {1.0}


def test_an_optimizer_without_a_rule_is_refused_with_those_that_have_one():
    class Mine(torch.optim.Optimizer):
        mup_rule = "adamw"  # none of the words

    for cls in (LAMB, torch.optim.RMSprop, Mine):
        with pytest.raises(ValueError, match=f"no μP rule for {cls.__name__}.*AdamW.*Muon.*SOAP"):
            mup.lr_multipliers(cls, 64, 32)


@pytest.mark.parametrize("init", ["gpt2", "fan_in"])
def test_initial_std_follows_the_table(init):
    shared = dict(n_head=4, n_kv_head=4, zero_init=False, init=init, mup_base_width=64)
    narrow, wide = (init_weights(GPT(GPTConfig(n_embd=w, **shared))) for w in (64, 256))
    for name, ratio in [
        ("embed", 1),
        ("head", 1),
        ("blocks.0.attn.q", 1 / 2),
        ("blocks.0.mlp.proj", 1 / 2),
    ]:
        a, b = (m.get_submodule(name).weight.std().item() for m in (narrow, wide))
        assert b / a == pytest.approx(ratio, rel=0.05), name
