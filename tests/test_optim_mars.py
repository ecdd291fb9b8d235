"""MARS against its paper's formula, in float64; the exact form; states of the authors' class."""

import copy

import pytest
import test_mup
import torch
from test_optim_contract import parameters, steps
from test_optim_oracles import SHAPES, agree, run, transcribe

from optim.adamw import AdamW
from optim.mars import MARS


def formula(p, g, s, t, h):
    """Algorithm 2 with clipping, the gradient of the step before for that of the weights before."""
    (b1, b2), gamma = h.get("betas", (0.95, 0.99)), h.get("gamma", 0.025)
    if p.ndim < 2 and h.get("exclude_1d", True):
        (b1, b2), gamma = h.get("betas_1d", (0.9, 0.95)), None
    c = g
    if gamma is not None:
        c = g + gamma * b1 / (1 - b1) * (g - s.get("before", g))
        s["before"] = g
        if torch.linalg.vector_norm(c) > 1:
            c = c / torch.linalg.vector_norm(c)
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * c
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * c**2
    u = (s["m"] / (1 - b1**t)) / ((s["v"] / (1 - b2**t)).sqrt() + h.get("eps", 1e-8))
    return p - h["lr"] * (u + h["weight_decay"] * p)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"weight_decay": 0.0, "exclude_1d": False, "gamma": 0.1},
        {"weight_decay": 0.1, "betas": (0.8, 0.9), "betas_1d": (0.5, 0.7), "eps": 1e-3},
    ],
)
def test_mars_equals_its_formula(options):
    options = {"lr": 0.01, **options}
    agree(run(MARS, options, SHAPES), transcribe(formula, options, SHAPES))


def test_small_gradients_are_not_clipped_and_large_ones_are():
    moments = {}
    for norm in 0.5, 2.0, 4.0:
        w = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
        w.grad = torch.full_like(w, norm / 12**0.5)
        optimizer = MARS([w])
        optimizer.step()
        moments[norm] = optimizer.state[w]["exp_avg"].norm().item()
    assert moments == pytest.approx({0.5: 0.05 * 0.5, 2.0: 0.05, 4.0: 0.05})


def test_gamma_zero_is_adamw_on_gradients_of_norm_one():
    shapes = [(6, 4), (3, 4, 5)]
    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def unit(groups):
        optimizer = AdamW(groups)

        def divide(*_):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = p.grad / p.grad.norm() if p.grad is not None else None

        optimizer.register_step_pre_hook(divide)
        return optimizer

    agree(run(MARS, options | {"gamma": 0.0}, shapes), run(unit, options, shapes), 1e-13)


def test_with_the_coming_batchs_gradient_it_is_the_exact_form():
    """c = ∇f(x, ξ) + k·(∇f(x, ξ) − ∇f(x₋, ξ)), both of this step's batch ξ."""
    torch.manual_seed(0)
    A, y = torch.randn(9, 5, 4, dtype=torch.float64), torch.randn(9, 5, 3, dtype=torch.float64)

    def gradient(w, t):
        return A[t].T @ (A[t] @ w - y[t]) / 50

    start = torch.randn(4, 3, dtype=torch.float64)
    w = start.clone().requires_grad_()
    optimizer = MARS([w], lr=0.05)
    for t in range(8):
        coming = gradient(w.detach(), t + 1)
        w.grad = gradient(w.detach(), t)
        optimizer.step()
        optimizer.state[w]["last_grad"].copy_(coming)

    x, before, s = start, start, {}
    for t in range(8):
        s["before"] = gradient(before, t)
        h = {"lr": 0.05, "weight_decay": 0.0}
        before, x = x, formula(x, gradient(x, t), s, t + 1, h)
    assert torch.allclose(w, x, atol=1e-13)
    approximate = transcribe_approximately(start, gradient)
    assert not torch.allclose(w, approximate, atol=1e-3)


def transcribe_approximately(x, gradient):
    s = {}
    for t in range(8):
        x = formula(x, gradient(x, t), s, t + 1, {"lr": 0.05, "weight_decay": 0.0})
    return x


def test_a_state_of_the_authors_class_loads():
    """Theirs keeps last_grad for vectors too, and says optimize_1d for not exclude_1d."""
    params, copies = parameters(torch.float64), parameters(torch.float64)
    ours = MARS(params)
    steps(ours, params, range(3))
    theirs = copy.deepcopy(ours.state_dict())
    for state in theirs["state"].values():
        state.setdefault("last_grad", torch.ones_like(state["exp_avg"]))
    for group in theirs["param_groups"]:
        del group["exclude_1d"]
        group.update(optimize_1d=False, mars_type="mars-adamw", amsgrad=False)
    loaded = MARS(copies, exclude_1d=False)
    loaded.load_state_dict(theirs)
    with torch.no_grad():
        for p, q in zip(copies, params):
            p.copy_(q)
    for optimizer, ps in (ours, params), (loaded, copies):
        steps(optimizer, ps, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, copies))
    assert "last_grad" not in loaded.state[copies[2]]
    theirs["param_groups"][0]["mars_type"] = "mars-lion"
    with pytest.raises(ValueError, match="mars-lion"):
        MARS(copies).load_state_dict(theirs)


@pytest.mark.parametrize("change", ["lacks last_grad", "has max_exp_avg_sq"])
def test_another_methods_state_is_refused(change):
    params = parameters()
    optimizer = MARS(params)
    steps(optimizer, params, range(1))
    saved = optimizer.state_dict()
    if change == "lacks last_grad":
        del saved["state"][0]["last_grad"]
    else:
        saved["state"][0]["max_exp_avg_sq"] = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="another method's"):
        MARS(params).load_state_dict(saved)


def test_under_mup_the_change_does_not_depend_on_the_width(monkeypatch):
    monkeypatch.setitem(test_mup.RUNS, "mars", (MARS, 0.01, {}))
    assert all(0.5 < factor < 2 for factor in test_mup.growth("mars", on=True).values())
    assert test_mup.growth("mars", on=False)["logits"] > 2.5
