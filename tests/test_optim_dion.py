"""Dion 3 against its formula, in float64; which rows move; Polar Express; its AdamW groups."""

import math

import pytest
import test_mup
import torch
from test_optim_contract import give_gradients, parameters, steps
from test_optim_oracles import SHAPES, agree, run, transcribe

from optim import dion
from optim.dion import Dion3, orthogonalize, take_rows
from optim.mup import lr_multipliers

TRIPLES = """8.156554524902461 -22.48329292557795 15.878769915207462
4.042929935166739 -2.808917465908714 0.5000178451051316
3.8916678022926607 -2.772484153217685 0.5060648178503393
3.285753657755655 -2.3681294933425376 0.46449024233003106
2.3465413258596377 -1.7097828382687081 0.42323551169305323"""


def polar(X):
    """Five steps by singular values: U·p(S)·Vᵀ with p(s) = a·s + b·s³ + c·s⁵."""
    U, S, V = torch.linalg.svd(X / (1.02 * (X * X).sum().sqrt() + 1e-7), full_matrices=False)
    for line in TRIPLES.splitlines():
        a, b, c = map(float, line.split())
        S = a * S + b * S**3 + c * S**5
    return U @ torch.diag(S) @ V


def formula(p, g, s, t, h):
    if p.ndim < 2:  # the AdamW group with its own defaults
        b1, b2 = 0.9, 0.95
        p = p - h["lr"] * h["weight_decay"] * p
        s["m"], s["v"] = b1 * s.get("m", 0) + (1 - b1) * g, b2 * s.get("v", 0) + (1 - b2) * g * g
        return p - h["lr"] * (s["m"] / (1 - b1**t)) / ((s["v"] / (1 - b2**t)).sqrt() + 1e-8)
    shape, p, g = p.shape, p.reshape(len(p), -1), g.reshape(len(p), -1)
    rows, cols = p.shape
    M = s.get("M", 0) + g
    sums = [(-sum(abs(x) for x in row), i) for i, row in enumerate(M.tolist())]
    R = [i for _, i in sorted(sums)[: math.ceil(h.get("fraction", 0.25) * rows)]]
    X = polar(M[R])
    s["M"] = M.clone()
    s["M"][R] *= h.get("momentum", 0.95)
    b2 = h.get("normuon_beta2", 0.95)
    if b2 is not None:
        v = s.setdefault("v", torch.zeros(rows).to(p))
        for i, row in zip(R, X):
            v[i] = b2 * v[i] + (1 - b2) * (row * row).mean()
        Y = torch.stack([row / (v[i].sqrt() + 1e-8) for i, row in zip(R, X)])
        X = Y * X.norm() / Y.norm()
    k = math.sqrt(rows / cols)
    if h.get("adjust_lr_fn") == "match_rms_adamw":
        k = 0.2 * math.sqrt(max(rows, cols))
    p = (1 - h["lr"] * h["weight_decay"]) * p
    p[R] -= h["lr"] * k * X
    return p.reshape(shape)


def build(groups):
    """Vectors in AdamW groups."""
    found = []
    for g in groups:
        found.append({**g, "params": [p for p in g["params"] if p.ndim >= 2]})
        own = {"use_muon": False, "lr": g["lr"], "weight_decay": g["weight_decay"]}
        found.append({"params": [p for p in g["params"] if p.ndim < 2], **own})
    return Dion3(found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fraction": 1.0, "momentum": 0.8},
        {"fraction": 0.5, "normuon_beta2": None, "adjust_lr_fn": "match_rms_adamw"},
        {"fraction": 0.01, "normuon_beta2": 0.5},
    ],
)
def test_dion_equals_its_formula(options):
    options = {"lr": 0.02, "weight_decay": 0.1, **options}
    # Stacks of one shape, wide and tall
    shapes = [*SHAPES, (6, 4), (9, 4), (4, 16), (4, 16), (16, 4)]
    agree(run(build, options, shapes), transcribe(formula, options, shapes))


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (8, 16), (8, 12), (5, 5), (1, 7)])
def test_orthogonalised_in_both_forms_it_is_polar_express(shape):
    torch.manual_seed(0)
    us = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    X = orthogonalize(us, torch.float64)
    for u, x in zip(us, X):
        assert torch.allclose(x, polar(u), atol=1e-11)


def test_only_the_chosen_rows_move_and_decay_in_the_buffer():
    w = torch.zeros(8, 32, requires_grad=True)
    optimizer = Dion3([w], momentum=0.5, fraction=0.25)
    w.grad = torch.full((8, 32), 0.1)
    w.grad[2] = 1.0
    w.grad[6] = -2.0
    optimizer.step()
    assert w.abs().sum(1).nonzero().flatten().tolist() == [2, 6]
    b = optimizer.state[w]["momentum_buffer"]
    assert torch.equal(b[[2, 6]], 0.5 * w.grad[[2, 6]]) and torch.equal(b[0], w.grad[0])
    v = optimizer.state[w]["row_sq"]
    assert v.flatten().nonzero().flatten().tolist() == [2, 6]


def test_a_row_that_waits_is_reached_in_the_end():
    """What is not applied adds up: at momentum 0 every row of equal gradients has its turn."""
    w = torch.zeros(8, 8, requires_grad=True)
    optimizer, reached = Dion3([w], momentum=0.0, fraction=0.25), []
    for _ in range(4):
        before = w.detach().clone()
        w.grad = torch.ones(8, 8)
        optimizer.step()
        reached += (w - before).abs().sum(1).nonzero().flatten().tolist()
    assert reached == list(range(8))  # of equal rows the upper ones first


def test_a_fraction_is_rounded_up_to_a_row_at_least():
    for rows, fraction, k in (8, 0.25, 2), (9, 0.25, 3), (3, 0.01, 1), (5, 1.0, 5):
        g = torch.randn(rows, 4)
        R, chosen = take_rows(g, torch.zeros(rows, 4), fraction, 0.9)
        assert len(R) == k and torch.equal(chosen, g[R])


def test_a_convolution_is_the_matrix_it_is():
    conv = torch.randn(8, 3, 2, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    matrix = conv.flatten(1).clone().requires_grad_()
    conv = conv.requires_grad_()
    a, b = Dion3([conv], weight_decay=0.1), Dion3([matrix], weight_decay=0.1)
    for seed in range(3):
        give_gradients([matrix], seed)
        conv.grad = matrix.grad.reshape(8, 3, 2, 5)
        a.step()
        b.step()
    assert torch.allclose(conv.flatten(1), matrix, atol=1e-13)


def test_matrices_of_another_dtype_are_stepped_apart():
    """In one stack the first one's dtype would decide that of the products for both."""
    together = [torch.ones(4, 8, dtype=x, requires_grad=True) for x in (torch.float64, torch.float)]
    alone = [p.detach().clone().requires_grad_() for p in together]
    for params in together, alone:
        give_gradients(params, 0)
    for params in together, alone[:1], alone[1:]:
        Dion3(params).step()
    assert all(map(torch.equal, together, alone))


def test_the_step_is_not_scaled_by_the_gradient():
    ends = []
    for scale in 1e-3, 1.0, 1e4:
        w = torch.zeros(8, 16, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(0)
        w.grad = scale * torch.randn(8, 16, dtype=torch.float64)
        Dion3([w], lr=1.0).step()
        ends.append(w.detach())
    assert torch.allclose(ends[0], ends[1], atol=1e-3) and torch.allclose(ends[1], ends[2])


@pytest.mark.parametrize("noise", [0, 1e-6, 1e-3, 3e-2])
def test_in_bfloat16_it_never_blows_up_on_gradients_of_low_rank(noise):
    for shape in (16, 32), (16, 64), (64, 16), (32, 32):
        torch.manual_seed(0)
        g = torch.randn(shape[0], 1) @ torch.randn(1, shape[1]) + noise * torch.randn(shape)
        x = orthogonalize([g], torch.bfloat16).float()[0]
        assert torch.linalg.matrix_norm(x, 2) < 1.3


def test_vectors_are_refused_by_name_and_groups_have_adamws_defaults():
    with pytest.raises(ValueError, match="use_muon=False"):
        Dion3([torch.zeros(4, requires_grad=True)])
    vectors = [torch.zeros(4, requires_grad=True)]
    group = Dion3([{"params": vectors, "use_muon": False}], betas=(0.8, 0.9)).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.8, 0.9), 0)


def test_another_methods_state_is_refused():
    params = [p for p in parameters() if p.ndim >= 2]
    optimizer = Dion3(params)
    steps(optimizer, params, range(1))
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="another method's"):
        Dion3(params).load_state_dict(saved)


def test_autocast_and_ns_dtype_decide_nothing_but_the_products():
    ends = {}
    for dtype in None, "bfloat16", torch.float32:
        params = parameters(shapes=((8, 16), (8, 16)))
        steps(Dion3(params, ns_dtype=dtype), params, range(3))
        ends[str(dtype)] = params[0].detach()
    assert torch.equal(ends["None"], ends["bfloat16"])
    assert 0 < (ends["None"] - ends["torch.float32"]).abs().max() < 1e-2
    assert dion.SCALES["spectral"](8, 32) == 0.5


def test_under_mup_the_change_does_not_depend_on_the_width(monkeypatch):
    monkeypatch.setitem(test_mup.RUNS, "dion", (Dion3, 0.1, {"ns_dtype": "float32"}))
    assert all(0.5 < factor < 2 for factor in test_mup.growth("dion", on=True).values())
    assert test_mup.growth("dion", on=False)["logits"] > 2.5
    multipliers = lr_multipliers(Dion3, 512, 64, adjust_lr_fn="match_rms_adamw")
    assert multipliers["matrix"] == 8**-0.5 and lr_multipliers(Dion3, 512, 64)["matrix"] == 1
