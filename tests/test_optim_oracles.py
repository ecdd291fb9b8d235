"""Every optimizer against torch's own or a plain transcription of its formula, in float64, ≤ 1e-10
after 30 steps with a changing lr, two groups that differ, and gradients that are None now and then.

A transcription is a function (p, g, s, t, h) -> new p: s is the parameter's own dict, t its step
from 1, h its group's hyperparameters. It follows the formula literally and shares nothing with the
file it checks. Inputs avoid what the method itself amplifies: Lion's sign at 0; for SOAP, singular
gradients tiny eps.
"""

import math

import pytest
import torch
from harness import gpu

from optim import (
    adafactor,
    adam_l2,
    adamw,
    lamb,
    lars,
    lion,
    muon,
    schedule_free,
    sgd,
    shampoo,
    soap,
)

torch_optim = torch.optim
SHAPES = [(6, 4), (5,), (3, 4, 5), (), (4, 4), (4, 9), (2, 3, 2, 2)]
STEPS = 30


def lr_factor(step):
    return 0.5 + 0.5 * math.cos(step / 5) ** 2


def gradients(step, shapes, device="cpu"):
    """One per shape; None now and then, never for all."""
    generator = torch.Generator().manual_seed(step)
    gs = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(device) * (1 + i)
        for i, s in enumerate(shapes)
    ]
    return [None if step > 2 and (step + 3 * i) % 7 == 0 else g for i, g in enumerate(gs)]


def start(shapes, device="cpu"):
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes]


def groups_of(params, options):
    """Even parameters in a group with the options, odd ones with another lr and decay."""
    second = {"lr": 0.5 * options["lr"], "weight_decay": 0.2}
    return [{"params": params[0::2], **options}, {"params": params[1::2], **options, **second}]


def run(cls, options, shapes, device="cpu"):
    """30 steps of an optimizer class; returns its weights (at x, for Schedule-Free)."""
    params = [p.requires_grad_() for p in start(shapes, device)]
    optimizer = cls(groups_of(params, options))
    if hasattr(optimizer, "train"):
        optimizer.train()
    base = [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * lr_factor(step)
        for p, g in zip(params, gradients(step, shapes, device)):
            p.grad = g
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return [p.detach() for p in params]


def transcribe(formula, options, shapes, device="cpu"):
    """The same 30 steps by a formula."""
    params, states = start(shapes, device), [{} for _ in shapes]
    for group in groups_of(range(len(shapes)), options):
        h = dict(group)
        for i in h.pop("params"):
            t = 0
            for step in range(STEPS):
                g = gradients(step, shapes, device)[i]
                if g is not None:
                    t += 1
                    params[i] = formula(
                        params[i], g, states[i], t, {**h, "lr": h["lr"] * lr_factor(step)}
                    )
    return params


def agree(ours, theirs, tolerance=1e-10):
    for p, q in zip(ours, theirs):
        assert (p - q).abs().max() <= tolerance * max(1, q.abs().max()), p.shape


@pytest.mark.parametrize(
    "ours, theirs, options",
    [
        (sgd.SGD, torch_optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
        gpu(sgd.SGD, torch_optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
        gpu(
            sgd.SGD,
            torch_optim.SGD,
            {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0},
        ),
        gpu(
            adamw.AdamW, torch_optim.AdamW, {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
        ),
        gpu(adamw.AdamW, torch_optim.AdamW, {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.0}),
        gpu(
            adamw.AdamW,
            torch_optim.AdamW,
            {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True},
        ),
        gpu(adam_l2.AdamL2, torch_optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
        gpu(
            adafactor.Adafactor,
            torch_optim.Adafactor,
            {"lr": 0.05, "eps": (None, 1e-3), "weight_decay": 0.1, "d": 0.7},
        ),
        gpu(
            adafactor.Adafactor,
            torch_optim.Adafactor,
            {"lr": 0.3, "beta2_decay": -0.5, "weight_decay": 0.0},
        ),
    ],
)
def test_equals_torch(ours, theirs, options, device):
    if theirs is torch_optim.Adafactor and "eps" not in options:
        options = {**options, "eps": (1e-30, 1e-3)}
    agree(run(ours, options, SHAPES, device), run(theirs, options, SHAPES, device))


def test_defaults_are_torchs_where_meant_as_a_drop_in():
    p = [torch.zeros(2, requires_grad=True)]
    for ours, theirs in (
        (adamw.AdamW(p), torch_optim.AdamW(p)),
        (adam_l2.AdamL2(p), torch_optim.Adam(p)),
    ):
        assert all(
            theirs.defaults[name] == value
            for name, value in ours.defaults.items()
            if name != "fused"
        )


def adafactor_formula(p, g, s, t, h):
    eps1, eps2 = h.get("eps", (1e-30, 1e-3))
    w = t**-0.8
    if p.ndim >= 2:
        s["R"] = (1 - w) * s.get("R", 0) + w * (g * g).mean(dim=-1)
        s["C"] = (1 - w) * s.get("C", 0) + w * (g * g).mean(dim=-2)
        share = s["R"] / s["R"].mean(dim=-1, keepdim=True).clamp(min=eps1)
        V = share.unsqueeze(-1) * s["C"].unsqueeze(-2)
    else:
        V = s["V"] = (1 - w) * s.get("V", 0) + w * g * g
    U = g / V.sqrt().clamp(min=eps1)
    U = U / max(1, (U * U).mean().sqrt().item() / h.get("d", 1))
    rho = min(h["lr"], t**-0.5) if h.get("relative_step", True) else h["lr"]
    alpha = rho * max(eps2, (p * p).mean().sqrt().item()) if h.get("scale_parameter", True) else rho
    update = alpha * U
    if h.get("beta1") is not None:
        update = s["m"] = h["beta1"] * s.get("m", 0) + (1 - h["beta1"]) * update
    return p * (1 - h["lr"] * h["weight_decay"]) - update


def lion_formula(p, g, s, t, h):
    b1, b2 = h.get("betas", (0.9, 0.99))
    m = s.get("m", torch.zeros_like(p))
    p = p - h["lr"] * h["weight_decay"] * p
    p = p - h["lr"] * torch.sign(b1 * m + (1 - b1) * g)
    s["m"] = b2 * m + (1 - b2) * g
    return p


def lars_formula(p, g, s, t, h):
    mu, decay = h.get("momentum", 0.9), h["weight_decay"]
    if p.ndim < 2 and h.get("exclude_1d", True):
        d = g
    else:
        pn, gn = p.norm().item(), g.norm().item()
        k = h["trust_coefficient"] * pn / (gn + decay * pn + 1e-8) if pn and gn else 1
        d = k * (g + decay * p)
    b = s["b"] = mu * s.get("b", 0) + d
    return p - h["lr"] * (d + mu * b if h.get("nesterov") else b)


def lamb_formula(p, g, s, t, h):
    b1, b2 = h.get("betas", (0.9, 0.999))
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
    c1, c2 = (1 - b1**t, 1 - b2**t) if h.get("bias_correction", True) else (1, 1)
    u = (s["m"] / c1) / ((s["v"] / c2).sqrt() + 1e-6) + h["weight_decay"] * p
    r = (p.norm() / u.norm()).item() if p.norm() > 0 and u.norm() > 0 else 1
    return p - h["lr"] * r * u


def contract(x, matrices):
    """Sum over each dimension i of x with the first index of matrices[i]."""
    letters = "abcdefgh"[: x.ndim]
    for i, M in enumerate(matrices):
        if M is not None:
            x = torch.einsum(f"{letters},{letters[i]}z->{letters.replace(letters[i], 'z')}", x, M)
    return x


def outer(g, i):
    """G₍ᵢ₎G₍ᵢ₎ᵀ"""
    others = [d for d in range(g.ndim) if d != i]
    return torch.tensordot(g, g, dims=(others, others))


def shampoo_formula(p, g, s, t, h):
    b1, b2 = h.get("betas", (0.9, 0.999))
    freq, begin = h["precondition_frequency"], h.get("start_preconditioning_step", 1)
    w, unbias = (1, 1) if b2 == 1 else (1 - b2, 1 - b2**t)
    conditioned = p.ndim >= 2 or (p.ndim == 1 and h.get("precondition_1d"))
    exponent = h.get("exponent") or (-1 / (2 * p.ndim) if p.ndim else -1)
    if conditioned:
        zeros = [
            torch.zeros(n, n).to(p) if n <= h.get("max_precond_dim", 8192) else None
            for n in p.shape
        ]
        L = s.setdefault("L", zeros)
        for i in range(p.ndim):
            if L[i] is not None:
                L[i] = b2 * L[i] + w * outer(g, i)
        if t == begin or (t > begin and t % freq == 0):
            s["P"] = []
            for M in L:
                if M is None:
                    s["P"].append(None)
                    continue
                e, Q = torch.linalg.eigh(M / unbias)
                s["P"].append(Q @ torch.diag((e.clamp(min=0) + h["eps"]) ** exponent) @ Q.T)
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    v = s["v"] = b2 * s.get("v", 0) + w * g * g
    m = s["m"] / (1 - b1**t)
    graft = h.get("grafting", "adam")
    A = {"adam": m / ((v / unbias).sqrt() + 1e-10), "rmsprop": m / (v.sqrt() + 1e-10)}.get(graft, m)
    D = A
    if conditioned and t >= begin:
        D = contract(m, s["P"])
        if graft is not None:
            D = D * A.norm() / (D.norm() + 1e-16)
    return p - h["lr"] * (D + h["weight_decay"] * p)


def soap_formula(p, g, s, t, h):
    b1, b2 = h.get("betas", (0.95, 0.95))
    sb = b2 if h.get("shampoo_beta") is None else h["shampoo_beta"]
    free = p.ndim < 2 and not h.get("precondition_1d")
    dims = [i for i in range(p.ndim) if not free and p.shape[i] <= h.get("max_precond_dim", 10000)]
    if t == 1:
        s["GG"] = {i: (1 - sb) * outer(g, i) for i in dims}
        s["Q"] = {i: torch.linalg.eigh(s["GG"][i]).eigenvectors.flip(1) for i in dims}
        s["m"] = s["v"] = torch.zeros_like(p)
        return p
    t -= 1

    def forth(x):
        return contract(x, [s["Q"].get(i) for i in range(p.ndim)])

    def back(x):
        return contract(x, [s["Q"][i].T if i in s["Q"] else None for i in range(p.ndim)])

    rotated = forth(g)
    s["m"] = b1 * s["m"] + (1 - b1) * rotated
    s["v"] = b2 * s["v"] + (1 - b2) * rotated**2
    size = h["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t) if h.get("correct_bias", True) else h["lr"]
    u = back(s["m"] / (s["v"].sqrt() + h["eps"]))
    if h.get("normalize_grads"):
        u = u / (1e-30 + (u * u).mean().sqrt())
    p = p - size * u
    p = p * (1 - h["lr"] * h["weight_decay"])
    s["GG"] = {i: sb * s["GG"][i] + (1 - sb) * outer(g, i) for i in dims}
    if t % h["precondition_frequency"] == 0:
        momentum, new = back(s["m"]), {}
        for i in dims:
            Q, GG = s["Q"][i], s["GG"][i]
            order = torch.diag(Q.T @ GG @ Q).argsort(descending=True)
            s["v"] = s["v"].index_select(i, order)
            new[i] = torch.linalg.qr(GG @ Q[:, order]).Q
        s["Q"] = new
        s["m"] = forth(momentum)
    return p


POLAR = """8.28721201814563 -23.595886519098837 17.300387312530933
4.107059111542203 -2.9478499167379106 0.5448431082926601
3.9486908534822946 -2.908902115962949 0.5518191394370137
3.3184196573706015 -2.488488024314874 0.51004894012372
2.300652019954817 -1.6689039845747493 0.4188073119525673
1.891301407787398 -1.2679958271945868 0.37680408948524835
1.8750014808534479 -1.2500016453999487 0.3750001645474248""".split()


def muon_formula(p, g, s, t, h):
    if p.ndim < 2:  # the AdamW group with its own defaults
        b1, b2 = 0.9, 0.95
        p = p - h["lr"] * h["weight_decay"] * p
        s["m"], s["v"] = b1 * s.get("m", 0) + (1 - b1) * g, b2 * s.get("v", 0) + (1 - b2) * g * g
        return p - h["lr"] * (s["m"] / (1 - b1**t)) / ((s["v"] / (1 - b2**t)).sqrt() + 1e-10)
    mu = h.get("momentum", 0.95)
    b = s["b"] = mu * s.get("b", 0) + (1 - mu) * g
    u = ((1 - mu) * g + mu * b if h.get("nesterov", True) else b).reshape(p.shape[0], -1)
    rows, cols = u.shape
    X = u / max(u.norm().item(), 1e-7)
    if rows > cols:
        X = X.T
    for i in range(h.get("ns_steps", 5)):
        a, bb, c = (1.5, -0.5, 0) if h.get("ns") == "cubic" else (3.4445, -4.7750, 2.0315)
        if h.get("ns") == "polar":
            a, bb, c = 1.875, -1.25, 0.375
            if i < 7:
                a, bb, c = (float(x) / 1.01**n for x, n in zip(POLAR[3 * i : 3 * i + 3], (1, 3, 5)))
        A = X @ X.T
        X = a * X + (bb * A + c * A @ A) @ X
    if rows > cols:
        X = X.T
    if h.get("normuon_beta2"):
        b2 = h["normuon_beta2"]
        s["v"] = b2 * s.get("v", 0) + (1 - b2) * (X * X).mean(1, keepdim=True)
        Y = X / (s["v"].sqrt() + 1e-10)
        X = Y * X.norm() / (Y.norm() + 1e-10)
    k = math.sqrt(max(1, rows / cols))
    if h.get("adjust_lr_fn") == "match_rms_adamw":
        k = 0.2 * math.sqrt(max(rows, cols))
    X = X.reshape(p.shape)
    mask = (X * p > 0).double() if h.get("cautious") else 1
    return p - h["lr"] * h["weight_decay"] * mask * p - h["lr"] * k * X


@pytest.mark.parametrize(
    "cls, formula, options",
    [
        gpu(adafactor.Adafactor, adafactor_formula, {"lr": 0.3, "weight_decay": 0.1}),
        (
            adafactor.Adafactor,
            adafactor_formula,
            {"lr": 0.02, "beta1": 0.9, "relative_step": False, "d": 0.5, "weight_decay": 0.0},
        ),
        (
            adafactor.Adafactor,
            adafactor_formula,
            {"lr": 0.02, "scale_parameter": False, "eps": (1e-3, 0.1), "weight_decay": 0.1},
        ),
        gpu(lion.Lion, lion_formula, {"lr": 0.01, "weight_decay": 0.1}),
        (lion.Lion, lion_formula, {"lr": 0.01, "betas": (0.95, 0.98), "weight_decay": 0.0}),
        gpu(lars.LARS, lars_formula, {"lr": 1.0, "trust_coefficient": 0.01, "weight_decay": 0.1}),
        (
            lars.LARS,
            lars_formula,
            {
                "lr": 1.0,
                "trust_coefficient": 0.01,
                "nesterov": True,
                "exclude_1d": False,
                "weight_decay": 0.0,
            },
        ),
        gpu(lamb.LAMB, lamb_formula, {"lr": 0.01, "weight_decay": 0.1}),
        (
            lamb.LAMB,
            lamb_formula,
            {"lr": 0.01, "betas": (0.8, 0.9), "bias_correction": False, "weight_decay": 0},
        ),
        gpu(
            shampoo.Shampoo,
            shampoo_formula,
            {"lr": 0.01, "eps": 1e-4, "precondition_frequency": 4, "weight_decay": 0.1},
        ),
        gpu(
            shampoo.Shampoo,
            shampoo_formula,
            {
                "lr": 0.01,
                "eps": 1e-4,
                "precondition_frequency": 3,
                "start_preconditioning_step": 5,
                "grafting": "rmsprop",
                "max_precond_dim": 4,
                "precondition_1d": True,
                "weight_decay": 0.1,
            },
        ),
        (
            shampoo.Shampoo,
            shampoo_formula,
            {
                "lr": 0.01,
                "eps": 1e-4,
                "precondition_frequency": 1,
                "grafting": "sgd",
                "betas": (0.5, 0.9),
                "exponent": -0.5,
                "weight_decay": 0.0,
            },
        ),
        (
            shampoo.Shampoo,
            shampoo_formula,
            {
                "lr": 0.1,
                "eps": 1e-4,
                "precondition_frequency": 1,
                "grafting": None,
                "betas": (0, 1),
                "weight_decay": 0.0,
            },
        ),
        (
            shampoo.Shampoo,
            shampoo_formula,
            {
                "lr": 0.01,
                "eps": 1e-4,
                "precondition_frequency": 2,
                "precondition_1d": True,
                "weight_decay": 0.1,
            },
        ),
        gpu(
            soap.SOAP,
            soap_formula,
            {"lr": 0.01, "eps": 1e-2, "precondition_frequency": 3, "weight_decay": 0.1},
        ),
        gpu(
            soap.SOAP,
            soap_formula,
            {
                "lr": 0.01,
                "eps": 1e-2,
                "precondition_frequency": 1,
                "shampoo_beta": 0.8,
                "normalize_grads": True,
                "correct_bias": False,
                "max_precond_dim": 4,
                "weight_decay": 0.0,
            },
        ),
    ],
)
def test_equals_a_plain_transcription(cls, formula, options, device):
    shapes = [(4, 4), (5,), (3, 4, 5), (), (5, 5), (4, 4)] if cls is soap.SOAP else SHAPES
    agree(run(cls, options, shapes, device), transcribe(formula, options, shapes, device))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "ns": "cubic", "ns_steps": 12},
        {"ns": "polar", "ns_steps": 9, "cautious": True},
        {"adjust_lr_fn": "match_rms_adamw", "normuon_beta2": 0.95},
        {"normuon_beta2": 0.9, "cautious": True, "ns_steps": 4},
    ],
)
def test_muon_equals_a_plain_transcription(options, device):
    def build(groups):
        vectors = [
            {
                "params": [p for p in g["params"] if p.ndim < 2],
                "use_muon": False,
                "lr": g["lr"],
                "weight_decay": g["weight_decay"],
            }
            for g in groups
        ]
        return muon.Muon(
            [{**g, "params": [p for p in g["params"] if p.ndim >= 2]} for g in groups] + vectors
        )

    options = {"lr": 0.02, "weight_decay": 0.1, **options}
    # Stacks of one shape, wide and tall
    shapes = [*SHAPES, (6, 4), (9, 4), (4, 16), (4, 16), (16, 4)]
    ours = run(build, options, shapes, device)
    agree(ours, transcribe(muon_formula, options, shapes, device))


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(torch_optim, "Muon"), reason="this torch has no Muon of its own")
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_equals_torch_up_to_the_bfloat16_of_the_products(adjust, device):
    options = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust}
    shapes = [(8, 8), (8, 24), (24, 8), (8, 8)]
    ours = run(muon.Muon, {**options, "ns_dtype": "bfloat16"}, shapes, device)
    theirs = run(torch_optim.Muon, options, shapes, device)
    begun = start(shapes, device)
    for p, q, w in zip(ours, theirs, begun):
        assert (p - q).norm() < 0.02 * (q - w).norm()


def schedule_free_reference(options, shapes, adam, device):
    """The paper's three sequences, y, z and x, kept apart."""
    out = [None] * len(shapes)
    for group in groups_of(range(len(shapes)), options):
        b1, b2 = group.get("betas", (group.get("momentum", 0.9), 0.999))
        for i in group["params"]:
            z = x = start(shapes, device)[i]
            v, total, gamma_max, k = torch.zeros_like(z), 0.0, 0.0, 0
            for step in range(STEPS):
                g = gradients(step, shapes, device)[i]
                if g is None:
                    continue
                k += 1
                warmup = group.get("warmup_steps", 0)
                gamma = group["lr"] * lr_factor(step) * (min(1, k / warmup) if warmup else 1)
                gamma_max = max(gamma_max, gamma)
                w = k ** group.get("r", 0) * gamma_max ** group.get("weight_lr_power", 2)
                total += w
                y = (1 - b1) * z + b1 * x
                d = g
                if adam:
                    v = b2 * v + (1 - b2) * g * g
                    d = g / ((v / (1 - b2**k)).sqrt() + 1e-8)
                z = z - gamma * (d + group["weight_decay"] * y)
                x = (1 - w / total) * x + w / total * z
            out[i] = x
    return out


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02, "weight_decay": 0.0},
        {"lr": 0.02, "weight_decay": 0.1, "warmup_steps": 7, "r": 1.0, "weight_lr_power": 1.0},
    ],
)
@pytest.mark.parametrize("cls", [schedule_free.AdamWScheduleFree, schedule_free.SGDScheduleFree])
def test_schedule_free_equals_the_three_sequences_of_the_paper(cls, options, device):
    adam = cls is schedule_free.AdamWScheduleFree
    ours = run(cls, options, SHAPES, device)
    agree(ours, schedule_free_reference(options, SHAPES, adam, device))


def gradient_for_all(step, shapes, device="cpu"):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes]


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_schedule_free_equals_its_authors_package(name, monkeypatch):
    """Where no gradient is missing: the package counts the steps of a whole group."""
    package = pytest.importorskip(
        "schedulefree", reason="optional oracle: pip install schedulefree"
    )
    monkeypatch.setitem(globals(), "gradients", gradient_for_all)

    def theirs(groups):
        return getattr(package, name)(groups, foreach=False)

    options = {"lr": 0.02, "weight_decay": 0.1, "warmup_steps": 5}
    agree(run(getattr(schedule_free, name), options, SHAPES), run(theirs, options, SHAPES))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_schedule_free_goes_on_from_a_state_of_its_authors_package(name, mode):
    package = pytest.importorskip(
        "schedulefree", reason="optional oracle: pip install schedulefree"
    )
    params = [p.requires_grad_() for p in start(SHAPES)]
    theirs = getattr(package, name)(params, lr=0.02, weight_decay=0.1, warmup_steps=12, r=1.0)
    theirs.train()

    def go(optimizer, params, steps):
        for step in steps:
            for p, g in zip(params, gradient_for_all(step, SHAPES)):
                p.grad = g
            optimizer.step()

    go(theirs, params, range(7))
    getattr(theirs, mode)()
    copies = [p.detach().clone().requires_grad_() for p in params]
    ours = getattr(schedule_free, name)(copies)
    ours.load_state_dict(theirs.state_dict())
    for optimizer, ps in (theirs, params), (ours, copies):
        optimizer.train()
        go(optimizer, ps, range(7, STEPS))
        optimizer.eval()
    agree([p.detach() for p in copies], [p.detach() for p in params])


@pytest.mark.parametrize(
    "module, cls",
    [(adamw, adamw.AdamW), (lion, lion.Lion), (schedule_free, schedule_free.AdamWScheduleFree)],
)
def test_scalars_may_be_0d_tensors_so_that_a_compiled_step_does_not_recompile(
    module, cls, monkeypatch
):
    options, name = {"lr": 0.02, "weight_decay": 0.1}, module.__name__.split(".")[-1] + "_update"
    expected, update = run(cls, options, SHAPES), getattr(module, name)

    def wrapped(*args):
        update(*(torch.tensor(x, dtype=torch.float64) if isinstance(x, float) else x for x in args))

    monkeypatch.setattr(module, name, wrapped)
    agree(run(cls, options, SHAPES), expected)


@pytest.mark.parametrize("seed", [*map(gpu, range(4)), *range(4, 12)])
def test_the_eigenvectors_of_a_tiny_matrix_with_zero_rows_are_finite(seed, device):
    """An embedding with unseen tokens: LAPACK's float32 eigh raises or returns NaN for a third of
    these."""
    from optim.shampoo import matrix_power

    g = torch.Generator().manual_seed(seed)
    G = torch.randn(256, 128, generator=g)
    G *= torch.logspace(-6, -3, 256)[torch.randperm(256, generator=g)][:, None]
    G[torch.randperm(256, generator=g)[:155]] = 0
    G = G.to(device)
    assert matrix_power(G @ G.mT, 1e-6, -0.25).isfinite().all()
