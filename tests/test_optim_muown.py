"""Muown against its formulas written out with g and v apart, and what its docstring says."""

import pytest
import torch
from test_optim_oracles import SHAPES, agree, gradients, lr_factor, start, transcribe

from optim import muon, muown


def quintic(u):
    wide = u.T if u.shape[0] > u.shape[1] else u
    X = wide / max(wide.norm().item(), 1e-7)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if u.shape[0] > u.shape[1] else X


def muown_formula(p, g, s, t, h):
    """The authors' step: g and v are variables of their own, kept in `s`."""
    if p.ndim < 2:
        h = {"weight_decay": 0, **h}
        b1, b2 = h.get("betas", (0.9, 0.95))
        p = p - h["lr"] * h["weight_decay"] * p
        s["m"], s["v"] = b1 * s.get("m", 0) + (1 - b1) * g, b2 * s.get("v", 0) + (1 - b2) * g * g
        return p - h["lr"] * (s["m"] / (1 - b1**t)) / (
            (s["v"] / (1 - b2**t)).sqrt() + h.get("eps", 1e-8)
        )
    W, G = p.flatten(1), g.flatten(1)
    if not s:
        s.update(v=W, g=W.norm(dim=1, keepdim=True), b=0, m=0, q=0)
    v, mag, mu, (b1, b2) = s["v"], s["g"], h.get("momentum", 0.95), h.get("betas", (0.9, 0.95))
    length = v.norm(dim=1, keepdim=True)
    dg = (G * v).sum(1, keepdim=True) / length
    dv = mag / length * (G - dg * v / length)
    s["b"] = mu * s["b"] + (1 - mu) * dv
    k = 0.2 * max(W.shape) ** 0.5
    v = v - h["lr"] * k * quintic((1 - mu) * dv + mu * s["b"])
    s["m"], s["q"] = b1 * s["m"] + (1 - b1) * dg, b2 * s["q"] + (1 - b2) * dg**2
    root = (s["q"] / (1 - b2**t)).sqrt() + h.get("eps", 1e-8)
    mag = mag - h["lr"] * s["m"] / (1 - b1**t) / root
    length = v.norm(dim=1, keepdim=True)
    new = mag * v / length - h["lr"] * h["weight_decay"] * W
    # Decay turns the rows a little: g and v follow, v at the length it had.
    s["g"] = new.norm(dim=1, keepdim=True) * mag.sign()
    s["v"] = new / s["g"] * length
    return new.view(p.shape)


def run(options, shapes):
    """As in test_optim_oracles.py: two groups, an lr that changes, gradients that are None."""
    params = [p.requires_grad_() for p in start(shapes)]
    second = {"lr": 0.5 * options["lr"], "weight_decay": 0.2}
    groups = []
    for members, own in (params[0::2], {}), (params[1::2], second):
        both = {**options, **own}
        groups.append({**both, "params": [p for p in members if p.ndim >= 2]})
        vectors = [p for p in members if p.ndim < 2]
        groups.append({**both, "params": vectors, "use_muon": False})
    optimizer = muown.Muown([group for group in groups if group["params"]])
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(30):
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * lr_factor(step)
        for p, g in zip(params, gradients(step, shapes)):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02, "weight_decay": 0.0},
        {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.8},
        {"lr": 0.05, "weight_decay": 0.0, "betas": (0.7, 0.8), "eps": 1e-2},
    ],
)
def test_equals_a_plain_transcription(options):
    shapes = [*SHAPES, (6, 4), (9, 4), (4, 16), (4, 16), (16, 4)]
    ours = run(options, shapes)
    agree(ours, transcribe(muown_formula, options, shapes))


def test_a_magnitude_that_passes_zero_is_the_one_that_the_transcription_keeps():
    torch.manual_seed(0)
    start = 0.05 * torch.randn(6, 4, dtype=torch.float64)
    w, expected, s = start.clone().requires_grad_(), start, {}
    optimizer = muown.Muown([w], lr=0.1)
    for t in range(1, 31):
        w.grad = torch.randn(6, 4, dtype=torch.float64)
        optimizer.step()
        expected = muown_formula(expected, w.grad, s, t, {"lr": 0.1, "weight_decay": 0.0})
    assert 0 < (s["g"] < 0).sum() < 6, "no row has turned, so this proves nothing"
    agree([w.detach()], [expected])


def test_a_direction_learns_nothing_along_its_row():
    w = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    before = w.detach().clone()
    w.grad = torch.randn_like(w)
    optimizer = muown.Muown([w], lr=0.03)
    optimizer.step()
    state = optimizer.state[w]
    assert (state["momentum_buffer"] * before).sum(1).abs().max() < 1e-15
    # The first step of Adam is lr, whatever the gradient's size; turning the rows adds nothing.
    lengths = w.detach().norm(dim=1) - before.norm(dim=1)
    assert torch.allclose(lengths.abs(), torch.tensor(0.03, dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_start_to_learn(dtype):
    """In float16, too, which holds no 1e-12."""
    w, target = torch.zeros(8, 16, dtype=dtype, requires_grad=True), torch.randn(8, 16).to(dtype)
    optimizer = muown.Muown([w], lr=0.02)
    for step in range(40):
        w.grad = (w - target).detach()
        optimizer.step()
        if step == 0:
            assert w.float().norm(dim=1).max() < 1e-4, "a first step without a length is no jump"
    assert (w - target).norm() < 0.9 * target.norm() and w.isfinite().all()
    # Row by row; a row whose gradient is 0 meanwhile stays there.
    w.grad[0] = 0
    assert (w.float().norm(dim=1) > 0.1).all()


def test_a_row_whose_magnitude_becomes_zero_keeps_its_direction():
    w = torch.tensor([[0.5, 0.0, 0.0]], requires_grad=True)
    w.grad = torch.tensor([[1.0, 0.0, 0.0]])
    muown.Muown([w], lr=0.5, eps=0.0).step()
    assert torch.allclose(w, torch.tensor([[1e-12, 0.0, 0.0]]), rtol=1e-6, atol=0)


def test_what_scales_the_weights_from_outside_is_not_undone():
    w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    optimizer = muown.Muown([w], lr=1e-3)
    for scale in 1.0, 3.0, 0.1:
        with torch.no_grad():
            w *= scale
        before = w.detach().norm(dim=1)
        w.grad = torch.randn_like(w)
        optimizer.step()
        assert ((w.detach().norm(dim=1) - before).abs() < 3e-3).all()


def test_stacks_of_a_few_matrices_are_the_same_step(monkeypatch):
    shapes, ends, seen = [(4, 6)] * 5 + [(6, 4)] * 2, [], []
    whole = muown.orthogonalize

    def counted(us, dtype):
        seen.append(len(us))
        return whole(us, dtype)

    monkeypatch.setattr(muown, "orthogonalize", counted)
    for stack in 10**9, 2 * 24:
        monkeypatch.setattr(muown, "STACK", stack)
        torch.manual_seed(0)
        params = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        muown.Muown(params).step()
        ends.append([p.detach() for p in params])
    assert seen == [5, 2, 2, 2, 1, 2]
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(*ends))


@pytest.mark.parametrize("dtype, products", [("float32", "bfloat16"), ("float64", "float64")])
def test_products_are_in_bfloat16_but_for_float64(dtype, products, monkeypatch):
    seen, whole = [], muown.orthogonalize

    def watched(us, dtype):
        X = whole(us, dtype)
        seen.append(str(X.dtype).removeprefix("torch."))
        return X

    monkeypatch.setattr(muown, "orthogonalize", watched)
    w = torch.randn(4, 6, dtype=getattr(torch, dtype), requires_grad=True)
    w.grad = torch.randn_like(w)
    muown.Muown([w]).step()
    assert seen == [products]


def test_vectors_and_muons_state_are_refused_by_name():
    with pytest.raises(ValueError, match=r"Parameter \(4,\) is no whole matrix.*use_muon=False"):
        muown.Muown([torch.nn.Parameter(torch.zeros(4))])
    w = torch.nn.Parameter(torch.randn(4, 4))
    w.grad = torch.randn_like(w)
    theirs = muon.Muon([w])
    theirs.step()
    with pytest.raises(ValueError, match="Muown: the state of momentum_buffer is another's"):
        muown.Muown([w]).load_state_dict(theirs.state_dict())
    flat = torch.nn.Parameter(torch.zeros(4))
    group = muown.Muown([{"params": [flat], "use_muon": False}], weight_decay=0.1).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.9, 0.95), 0)
