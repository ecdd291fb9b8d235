"""PMuon against its formulas written out, and what its docstring says."""

import math

import pytest
import torch
from test_optim_muown import quintic
from test_optim_oracles import SHAPES, agree, gradients, groups_of, lr_factor, start

from optim import muon, pmuon


def side(G, s, i, h):
    """C^−γ as the method has it, (n, n), of the side that is the rows of G."""
    n, beta = len(G), h.get("beta", 0.95)
    s[f"GG{i}"] = beta * s.get(f"GG{i}", torch.zeros(n, n).double()) + G @ G.T
    eye = torch.eye(n).double()
    C = beta * s[f"GG{i}"] + G @ G.T + (h.get("eps", 1e-6) * s[f"GG{i}"].trace() / n + 1e-30) * eye
    Q = torch.linalg.qr(C @ s.get(f"Q{i}", eye))[0]
    return Q @ torch.diag(torch.diag(Q.T @ C @ Q) ** -h.get("gamma", 0.3)) @ Q.T


def pmuon_formula(p, g, s, t, h):
    if p.ndim < 2:
        b1, b2 = h.get("betas", (0.9, 0.95))
        p = p - h["lr"] * h["weight_decay"] * p
        s["m"], s["v"] = b1 * s.get("m", 0) + (1 - b1) * g, b2 * s.get("v", 0) + (1 - b2) * g * g
        root = (s["v"] / (1 - b2**t)).sqrt() + h.get("eps", 1e-10)
        return p - h["lr"] * (s["m"] / (1 - b1**t)) / root
    mu = h.get("momentum", 0.95)
    s["b"] = mu * s.get("b", 0) + (1 - mu) * g
    u = ((1 - mu) * g + mu * s["b"]).flatten(1)
    left, right = side(u, s, 0, h), side(u.T, s, 1, h)
    X = quintic(left @ u @ right) * math.sqrt(max(1, u.shape[0] / u.shape[1]))
    return p - h["lr"] * h["weight_decay"] * p - h["lr"] * X.reshape(p.shape)


def known(state, t):
    """What the formula needs to go on from the optimizer's state after t - 1 steps."""
    if t == 1:
        return {}
    if "exp_avg" in state:
        return {"m": state["exp_avg"].clone(), "v": state["exp_avg_sq"].clone()}
    s = {"b": state["momentum_buffer"].clone()}
    for i in 0, 1:
        s |= {f"GG{i}": state[f"GG_{i}"].clone(), f"Q{i}": state[f"Q_{i}"].clone()}
    return s


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02, "weight_decay": 0.0},
        {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.8},
        {"lr": 0.05, "weight_decay": 0.0, "eps": 1e-2, "gamma": 0.2, "beta": 0.8},
    ],
)
def test_equals_a_plain_transcription_in_lock_step(options):
    """Power iteration magnifies rounding, as in SOAP: every step starts from the optimizer's."""
    shapes = [*SHAPES, (6, 4), (9, 4), (4, 16), (4, 16), (16, 4)]
    params, counts = [p.requires_grad_() for p in start(shapes)], [0] * len(shapes)
    groups = []
    for group in groups_of(range(len(shapes)), options):
        for flat in False, True:
            members = [params[i] for i in group["params"] if (params[i].ndim < 2) == flat]
            groups.append({**group, "params": members} | ({"use_muon": False} if flat else {}))
    optimizer = pmuon.PMuon([group for group in groups if group["params"]])
    base = [group["lr"] for group in optimizer.param_groups]
    owners = {p: group for group in optimizer.param_groups for p in group["params"]}
    for step in range(30):
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * lr_factor(step)
        gs, expected = gradients(step, shapes), []
        for i, (p, g) in enumerate(zip(params, gs)):
            p.grad = g
            counts[i] += g is not None
            s = known(optimizer.state[p], counts[i]) if g is not None else {}
            args = p.detach().clone(), g, s, counts[i], owners[p]
            expected.append(pmuon_formula(*args) if g is not None else args[0])
        optimizer.step()
        agree([p.detach() for p in params], expected)


def test_the_scale_of_the_loss_changes_nothing():
    ends = []
    for scale in 1e-6, 1.0, 1e6:
        torch.manual_seed(0)
        w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        optimizer = pmuon.PMuon([w])
        for _ in range(5):
            w.grad = scale * torch.randn(4, 6, dtype=torch.float64)
            optimizer.step()
        ends.append(w.detach())
    assert all(torch.allclose(ends[1], x, atol=1e-9) for x in ends)


def test_a_direction_that_is_large_in_every_step_is_made_smaller():
    torch.manual_seed(0)
    noise = torch.ones(6, 1, dtype=torch.float64)
    noise[0] = 30
    GG, Q = torch.zeros(6, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for _ in range(60):
        G = noise * torch.randn(6, 8, dtype=torch.float64)
        P = pmuon.power(G, GG, Q, 0.95, 0.5, 1e-6)
    assert P[0, 0] < 0.1 * P.diagonal()[1:].min()
    # It has converged: with γ = 1/2 the square of P is the inverse of C.
    C = 0.95 * GG + G @ G.T
    assert torch.allclose(P @ C @ P, torch.eye(6, dtype=torch.float64), atol=0.1)
    assert torch.allclose(Q.T @ Q, torch.eye(6, dtype=torch.float64), atol=1e-12)


def test_vectors_and_muons_state_are_refused_by_name():
    with pytest.raises(ValueError, match=r"Parameter \(4,\) is no whole matrix.*use_muon=False"):
        pmuon.PMuon([torch.nn.Parameter(torch.zeros(4))])
    w = torch.nn.Parameter(torch.randn(4, 4))
    w.grad = torch.randn_like(w)
    theirs = muon.Muon([w])
    theirs.step()
    with pytest.raises(ValueError, match="PMuon: the state of momentum_buffer is another's"):
        pmuon.PMuon([w]).load_state_dict(theirs.state_dict())
    flat = torch.nn.Parameter(torch.zeros(4))
    group = pmuon.PMuon([{"params": [flat], "use_muon": False}], weight_decay=0.1).param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"]) == (3e-4, 1e-10, 0)
