"""SOAP-Muon is its published steps, written out plainly with whole matrices in float64."""

import copy
import math

import pytest
import torch
from test_optim_contract import give_gradients
from test_optim_oracles import STEPS, agree, gradients, lr_factor, start

from optim.muon import Muon
from optim.soap_muon import SOAPMuon, blend, norm4

QUINTIC = (3.4445, -4.7750, 2.0315)
# One side no more than one longer: the first gradient then leaves no choice of eigenvectors.
SHAPES = [(4, 4), (6, 5), (5,), (6, 2, 3), (), (4, 5)]


def schatten4(x):
    return torch.linalg.svdvals(x).pow(4).sum().pow(0.25)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)


def matrix_formula(p, g, s, t, h):
    """A step of a matrix; s: its state."""
    g, b, mu = g.flatten(1), h.get("shampoo_beta", 0.9), h.get("momentum", 0.95)
    s["m"] = mu * s.get("m", 0) + (1 - mu) * g
    u = (1 - mu) * g + mu * s["m"]
    if t > 1:
        left, right = s["Q"]
        rotated = left.T @ u @ right
        s["v"] = b * s["v"] + (1 - b) * rotated**2
        w = left @ (rotated / s["v"].sqrt().clamp(min=h["eps"])) @ right.T
        floor, cap = h.get("trust_gate", (1, 1))
        agrees = min(max((cosine(w, u) - 0.2) / 0.8, 0), 1)
        downhill = min(max(cosine(w, g) / max(cosine(u, g), 1e-8), 0), 1)
        gate = min(max(agrees * downhill, floor), cap)
        u = (1 - gate) * u + gate * w * schatten4(u) / schatten4(w)
    U, sigma, V = torch.linalg.svd(u / schatten4(u), full_matrices=False)
    a, c, d = h.get("ns_coefficients", QUINTIC)
    for _ in range(h.get("ns_steps", 5)):
        sigma = a * sigma + c * sigma**3 + d * sigma**5
    k = math.sqrt(max(1, g.shape[0] / g.shape[1]))
    p = p - h["lr"] * h["weight_decay"] * p - h["lr"] * k * (U * sigma @ V).view(p.shape)
    s["GG"] = [b * old + (1 - b) * new for old, new in zip(s.get("GG", (0, 0)), (g @ g.T, g.T @ g))]
    if t == 1:
        s["Q"] = [torch.linalg.eigh(GG).eigenvectors.flip(1) for GG in s["GG"]]
        s["v"] = torch.zeros_like(g)
    elif (t - 1) % h["precondition_frequency"] == 0:
        for i, (GG, Q) in enumerate(zip(s["GG"], s["Q"])):
            order = torch.diag(Q.T @ GG @ Q).argsort(descending=True)
            s["v"] = s["v"].index_select(i, order)
            s["Q"][i] = torch.linalg.qr(GG @ Q[:, order]).Q
    return p


def adamw_formula(p, g, s, t, h):
    (b1, b2), decay = h["betas"], h["lr"] * h["weight_decay"]
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    root = (s["v"] / (1 - b2**t)).sqrt() + h["eps"]
    return p - decay * p - h["lr"] * s["m"] / (1 - b1**t) / root


@pytest.mark.parametrize(
    "options",
    [
        {"precondition_frequency": 3, "eps": 1e-2},
        {"precondition_frequency": 1, "eps": 1e-2, "trust_gate": (0.1, 0.8), "shampoo_beta": 0.8},
        {
            "precondition_frequency": 10,
            "eps": 1e-2,
            "trust_gate": (0.0, 1.0),
            "momentum": 0.8,
            "ns_coefficients": (2.0, -1.5, 0.5),
            "ns_steps": 12,
        },
    ],
)
def test_equals_a_plain_transcription(options):
    options = {"lr": 0.02, "weight_decay": 0.1} | options
    vectors = {"use_muon": False, "lr": 0.01, "weight_decay": 0.2, "betas": (0.8, 0.9)}
    ours = [p.requires_grad_() for p in start(SHAPES)]
    groups = [
        options | {"params": [p for p in ours if p.ndim > 1]},
        options | vectors | {"params": [p for p in ours if p.ndim < 2]},
    ]
    optimizer, plain, states = SOAPMuon(groups), start(SHAPES), [{} for _ in SHAPES]
    counts = [0] * len(SHAPES)
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * lr_factor(step)
        for i, (p, g) in enumerate(zip(ours, gradients(step, SHAPES))):
            p.grad = g
            if g is None:
                continue
            counts[i] += 1
            matrix = p.ndim > 1
            h = options if matrix else options | vectors
            formula = matrix_formula if matrix else adamw_formula
            h = h | {"lr": h["lr"] * lr_factor(step)}
            plain[i] = formula(plain[i], g, states[i], counts[i], h)
        optimizer.step()
    agree([p.detach() for p in ours], plain)


def test_the_first_step_is_muons_and_later_ones_are_not():
    found = []
    for cls, options in (SOAPMuon, {"ns_coefficients": (2.0, -1.5, 0.5)}), (Muon, {"ns": "exact"}):
        w = torch.zeros(6, 9, dtype=torch.float64, requires_grad=True)
        optimizer = cls([w], lr=0.1, ns_steps=30, **options)
        for step in range(2):
            give_gradients([w], step)
            optimizer.step()
            found.append(w.detach().clone())
    assert torch.allclose(found[0], found[2], atol=1e-9)
    assert not torch.allclose(found[1], found[3], atol=1e-3)


@pytest.mark.parametrize("size", [1e-12, 1e6])
def test_the_gradients_scale_drops_out(size):
    ends = []
    for factor in 1.0, size:
        w = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
        optimizer = SOAPMuon([w], lr=0.1, eps=0.0, trust_gate=(0, 1))
        for step in range(4):
            give_gradients([w], step)
            w.grad *= factor
            optimizer.step()
        ends.append(w.detach())
    assert torch.allclose(*ends, atol=1e-8)


def test_the_gate_opens_where_w_agrees_with_the_momentum_and_the_gradient():
    torch.manual_seed(0)
    u, w, g = torch.randn(3, 5, 7, dtype=torch.float64).unbind()
    scaled = w * schatten4(u) / schatten4(w)
    assert norm4(u) == pytest.approx(schatten4(u).item(), rel=1e-12)
    assert torch.equal(blend(u, u, g, 0, 1), u)
    assert torch.allclose(blend(u, -u, u, 0, 1), u)  # against the momentum: closed
    assert torch.allclose(blend(u, w, g, 0.3, 0.3), u + 0.3 * (scaled - u))
    near = u + 0.1 * w
    assert torch.allclose(blend(u, near, -g * torch.sign(cosine(near, g)), 0, 1), u)  # uphill
    better = blend(u, near, near, 0, 1)  # as much downhill as u, and more
    gate = (cosine(near, u) - 0.2) / 0.8
    assert torch.allclose(better, u + gate * (near * schatten4(u) / schatten4(near) - u))


@pytest.mark.parametrize("gate", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1)])
def test_a_gate_outside_its_range_is_refused(gate):
    with pytest.raises(ValueError, match="trust_gate.* 0 ≤ floor ≤ cap ≤ 1"):
        SOAPMuon([torch.zeros(2, 2)], trust_gate=gate)


@pytest.mark.parametrize("kind", ["vector", "DTensor"])
def test_vectors_and_dtensors_are_refused_and_leave_no_group(kind):
    optimizer = SOAPMuon([torch.zeros(4, 6, requires_grad=True)])
    other = torch.zeros((4,) if kind == "vector" else (4, 6), requires_grad=True)
    if kind == "DTensor":
        other.placements = ()
    with pytest.raises(ValueError, match="use_muon=False.*make_optimizer"):
        optimizer.add_param_group({"params": other})
    assert len(optimizer.param_groups) == 1
    vectors = {"params": torch.zeros(4), "use_muon": False}
    optimizer.add_param_group(vectors)
    group = optimizer.param_groups[1]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.9, 0.95), 0)


def test_a_state_of_muon_is_refused():
    w = torch.zeros(4, 6, requires_grad=True)
    given, optimizer = Muon([w]), SOAPMuon([w])
    give_gradients([w], 0)
    given.step()
    with pytest.raises(ValueError, match="SOAPMuon: a state of .* is another method's"):
        optimizer.load_state_dict(copy.deepcopy(given.state_dict()))
    assert not optimizer.state


@pytest.mark.parametrize("name", ["bfloat16", torch.float32, None])
def test_ns_dtype_takes_a_dtype_or_its_name(name):
    w = torch.zeros(4, 8, requires_grad=True)
    optimizer = SOAPMuon([w], lr=1.0, ns_dtype=name)
    give_gradients([w], 0)
    optimizer.step()
    assert optimizer.param_groups[0]["ns_dtype"] == (name and str(name).removeprefix("torch."))
    assert torch.equal(w.bfloat16().float(), w) == (name is not torch.float32)
