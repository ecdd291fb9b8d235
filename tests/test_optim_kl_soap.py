"""KL-SOAP is the paper's method, written out plainly with whole matrices in float64."""

import copy

import pytest
import torch
from test_optim_contract import give_gradients
from test_optim_oracles import agree, contract, run, transcribe

from optim.kl_soap import KLSOAP
from optim.soap import SOAP

SHAPES = [(4, 4), (5,), (3, 4, 5), (), (6, 5), (4, 4)]


def covariance_of(g, i, inverses):
    """Mean over all other dimensions of g S^-1 g^T, S the other dimensions' covariances."""
    whitened = contract(g, [None if j == i else S for j, S in enumerate(inverses)])
    a, b = (x.movedim(i, 0).reshape(g.shape[i], -1) for x in (g, whitened))
    return a @ b.T / a.shape[1]


def kl_soap_formula(p, g, s, t, h):
    b1, b2 = h.get("betas", (0.95, 0.95))
    sb = b2 if h.get("shampoo_beta") is None else h["shampoo_beta"]
    large = h.get("max_precond_dim", 10000)
    dims = [i for i in range(p.ndim) if p.ndim > 1 and p.shape[i] <= large]
    if t == 1:
        s["S"] = {i: (1 - sb) * covariance_of(g, i, [None] * p.ndim) for i in dims}
        s["Q"] = {i: torch.linalg.eigh(s["S"][i]).eigenvectors.flip(1) for i in dims}
        s["L"] = {i: torch.full_like(g, 0.1).movedim(i, 0).flatten(1)[:, 0] for i in dims}
        s["m"] = s["v"] = torch.zeros_like(p)
        return p

    def forth(x):
        return contract(x, [s["Q"].get(i) for i in range(p.ndim)])

    def back(x):
        return contract(x, [s["Q"][i].T if i in dims else None for i in range(p.ndim)])

    rotated = forth(g)
    s["m"] = b1 * s["m"] + (1 - b1) * rotated
    s["v"] = b2 * s["v"] + (1 - b2) * rotated**2
    p = p - h["lr"] * back(s["m"] / (s["v"].sqrt() + h["eps"]))
    p = p - h["lr"] * h["weight_decay"] * p
    inverses = [
        s["Q"][i] @ torch.diag(1 / s["L"][i]) @ s["Q"][i].T if i in dims else None
        for i in range(p.ndim)
    ]
    for i in dims:
        new, Q, n = covariance_of(g, i, inverses), s["Q"][i], p.shape[i]
        s["S"][i] = sb * s["S"][i] + (1 - sb) * new
        along = sb * s["L"][i] + (1 - sb) * torch.diag(Q.T @ new @ Q)
        s["L"][i] = along.clamp(min=1 / max(10, min(n, 4000)) ** 2)
    if (t - 1) % h["precondition_frequency"] == 0:
        momentum = back(s["m"])
        s["Q"] = {i: torch.linalg.qr(s["S"][i] @ s["Q"][i]).Q for i in dims}
        s["m"] = forth(momentum)
    return p


@pytest.mark.parametrize(
    "options",
    [
        {"precondition_frequency": 3, "betas": (0.9, 0.95), "weight_decay": 0.1},
        {
            "precondition_frequency": 1,
            "betas": (0.9, 0.98),
            "shampoo_beta": 0.8,
            "max_precond_dim": 4,
            "weight_decay": 0.0,
        },
    ],
)
def test_equals_a_plain_transcription(options):
    options = {"lr": 0.01, "eps": 1e-2} | options
    ours = run(KLSOAP, options, SHAPES)
    agree(ours, transcribe(kl_soap_formula, options, SHAPES))
    # SOAP's covariances are others, so this is a test of how they are estimated.
    soaps = run(SOAP, options | {"correct_bias": False}, SHAPES)
    assert not torch.allclose(ours[0], soaps[0], atol=1e-4)


@pytest.mark.parametrize("size", [1e-2, 1.0, 100.0])
def test_the_covariances_share_the_gradients_scale(size):
    """Of iid gradients of variance size², in SOAP each covariance has it, times the other side."""
    w = torch.zeros(12, 20, dtype=torch.float64, requires_grad=True)
    optimizer = KLSOAP([w], precondition_frequency=1)
    for step in range(300):
        give_gradients([w], step)
        w.grad *= size
        optimizer.step()
    state = optimizer.state[w]
    along = [state[f"eigenvalues_{i}"].mean() for i in range(2)]
    assert 0.7 * size**2 < along[0] * along[1] < 1.4 * size**2
    for i in range(2):
        assert 0.8 < state[f"GG_{i}"].diag().mean() / along[i] < 1.25


def test_eigenvalues_keep_a_floor_where_gradients_vanish():
    """From there a gradient that returns is whitened by a finite number."""
    w = torch.zeros(4, 20, dtype=torch.float64, requires_grad=True)
    optimizer = KLSOAP([w])
    for step in range(300):
        give_gradients([w], step)
        w.grad *= 1e-9
        optimizer.step()
    state = optimizer.state[w]
    for i, floor in enumerate((1 / 10**2, 1 / 20**2)):
        assert state[f"eigenvalues_{i}"].tolist() == pytest.approx([floor] * w.shape[i], rel=1e-12)


@pytest.mark.parametrize("other", [SOAP, "options"])
def test_a_state_of_soap_or_of_other_options_is_refused(other):
    w = torch.zeros(4, 6, requires_grad=True)
    given = SOAP([w]) if other is SOAP else KLSOAP([w], max_precond_dim=5)
    give_gradients([w], 0)
    given.step()
    saved = given.state_dict()
    saved["param_groups"][0].pop("max_precond_dim")  # not saved: ours stays
    optimizer = KLSOAP([w])
    with pytest.raises(ValueError, match="KLSOAP: a saved state of step, exp_avg, .* another"):
        optimizer.load_state_dict(copy.deepcopy(saved))
    assert not optimizer.state


def test_a_dtensor_is_refused_and_leaves_no_group():
    w = torch.zeros(4, 6, requires_grad=True)
    optimizer = KLSOAP([w])
    other = torch.zeros(4, 6, requires_grad=True)
    other.placements = ()  # as a DTensor
    with pytest.raises(ValueError, match="make_optimizer"):
        optimizer.add_param_group({"params": [other]})
    assert len(optimizer.param_groups) == 1
