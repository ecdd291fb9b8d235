"""What every optimizer promises, whatever its mathematics; then, by name, defects found
elsewhere."""

import ast
import copy
import importlib.util
import inspect
import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from density import measure

from optim import (
    adafactor,
    adam_l2,
    adamw,
    ademamix,
    dion,
    kl_soap,
    lamb,
    lars,
    lion,
    mars,
    muon,
    muown,
    pmuon,
    schedule_free,
    sgd,
    shampoo,
    soap,
    soap_muon,
)
from optim.attributes import attribute

FOLDER = Path(__file__).parent.parent / "optim"
# class -> (arguments for these tests, lr that solves the quadratic, bytes of state of a (16, 8)
# matrix)
CASES = {
    sgd.SGD: ({"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, 0.02, 4 * 128),
    adamw.AdamW: ({"weight_decay": 0.1}, 0.05, 8 * 128),
    adam_l2.AdamL2: ({"weight_decay": 0.01}, 0.05, 8 * 128),
    ademamix.AdEMAMix: (
        {"weight_decay": 0.1, "alpha": 4.0, "alpha_warmup": 8, "beta3_warmup": 8},
        0.1,
        12 * 128,
    ),
    adafactor.Adafactor: ({"beta1": 0.9, "weight_decay": 0.01}, 0.05, 4 * (16 + 8) + 4 * 128),
    lion.Lion: ({"weight_decay": 0.1}, 0.05, 4 * 128),
    lars.LARS: (
        {"weight_decay": 0.01, "trust_coefficient": 0.02, "exclude_1d": False},
        1.0,
        4 * 128,
    ),
    lamb.LAMB: ({}, 0.03, 8 * 128),
    mars.MARS: ({"weight_decay": 0.1}, 0.05, 12 * 128),
    shampoo.Shampoo: (
        {"precondition_frequency": 3, "weight_decay": 0.01},
        0.05,
        8 * (256 + 64) + 8 * 128,
    ),
    soap.SOAP: ({"precondition_frequency": 3}, 0.1, 8 * (256 + 64) + 8 * 128),
    kl_soap.KLSOAP: (
        {"precondition_frequency": 3},
        0.1,
        8 * (256 + 64) + 4 * (16 + 8) + 8 * 128,
    ),
    soap_muon.SOAPMuon: (
        {"weight_decay": 0.1, "precondition_frequency": 3, "trust_gate": (0.2, 0.9)},
        0.1,
        8 * (256 + 64) + 8 * 128,
    ),
    muon.Muon: ({"weight_decay": 0.1, "normuon_beta2": 0.95}, 0.1, 4 * 128 + 4 * 16),
    muown.Muown: ({"weight_decay": 0.1}, 0.2, 4 * 128 + 12 * 16),
    dion.Dion3: ({"weight_decay": 0.1, "fraction": 0.5}, 0.1, 4 * 128 + 4 * 16),
    pmuon.PMuon: ({"weight_decay": 0.1}, 0.1, 8 * (256 + 64) + 4 * 128),
    schedule_free.AdamWScheduleFree: ({"weight_decay": 0.01, "warmup_steps": 2}, 0.1, 8 * 128),
    schedule_free.SGDScheduleFree: ({"weight_decay": 0.01, "warmup_steps": 2}, 0.3, 4 * 128),
}
every = pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
half = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)


def build(cls, params, **options):
    """The optimizer, ready to step; Muon's kin get vectors in an AdamW group, as users must."""
    options = {**CASES[cls][0], **options}
    if attribute(cls, "matrices_only"):
        params = [
            {"params": [p for p in params if p.ndim >= 2]},
            {"params": [p for p in params if p.ndim < 2], "use_muon": False},
        ]
        params = [group for group in params if group["params"]]
    optimizer = cls(params, **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def parameters(
    dtype=torch.float32, shapes=((6, 4), (4, 6), (5,), (2, 3, 4), ()), device=torch.device("cpu")
):
    torch.manual_seed(0)
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def steps(optimizer, params, seeds):
    for seed in seeds:
        give_gradients(params, seed)
        optimizer.step()


def tensors(optimizer):
    return [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]


@every
def test_a_quadratic_is_solved(cls):
    torch.manual_seed(0)
    target, w = torch.randn(8, 6), torch.randn(8, 6).requires_grad_()
    optimizer = build(cls, [w], lr=CASES[cls][1])
    if "weight_decay" in optimizer.param_groups[0]:
        optimizer.param_groups[0]["weight_decay"] = 0
    start = (w - target).square().sum().item()
    for t in range(200):
        if not hasattr(optimizer, "eval"):
            optimizer.param_groups[0]["lr"] = CASES[cls][1] * (1 - t / 200)
        optimizer.zero_grad()
        (w - target).square().sum().backward()
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    assert (w - target).square().sum() < 0.02 * start


@every
def test_a_parameter_without_gradient_and_its_state_stay_untouched(cls):
    params = parameters()
    optimizer = build(cls, params)
    steps(optimizer, params, range(3))
    give_gradients(params, 4)
    params[0].grad = None
    before, state = params[0].detach().clone(), copy.deepcopy(optimizer.state[params[0]])
    optimizer.step()
    assert torch.equal(params[0], before) and state.keys() == optimizer.state[params[0]].keys()
    for name, x in optimizer.state[params[0]].items():
        assert torch.equal(x, state[name]) if torch.is_tensor(x) else x == state[name], name
    assert not torch.equal(params[1], parameters()[1])


@every
def test_a_parameter_that_never_had_a_gradient_has_no_state(cls):
    params = parameters()
    optimizer = build(cls, params)
    give_gradients(params[1:], 0)
    optimizer.step()
    assert not optimizer.state.get(params[0]) and torch.equal(params[0], parameters()[0])


@every
def test_closure_runs_with_grad_enabled_and_its_loss_is_returned(cls):
    w = torch.ones(3, 3, requires_grad=True)
    optimizer = build(cls, [w])

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9
    assert optimizer.step() is None
    assert not torch.equal(w, torch.ones(3, 3)) and w.requires_grad and w.is_leaf


@every
@half
def test_gradients_are_never_modified(cls, dtype):
    params = parameters(dtype)
    optimizer = build(cls, params)
    for seed in range(4):
        give_gradients(params, seed)
        before = [p.grad.clone() for p in params]
        grads = [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is g and torch.equal(g, b) for p, g, b in zip(params, grads, before))


@every
def test_hyperparameters_are_read_at_every_step_and_per_group(cls):
    a, b = parameters(shapes=((4, 4), (4, 4)))
    optimizer = cls([{"params": [a], "lr": 0.0}, {"params": [b]}], **CASES[cls][0])
    if hasattr(optimizer, "train"):
        optimizer.train()
    before_a, before_b = a.detach().clone(), b.detach().clone()
    steps(optimizer, [a, b], range(3))
    assert torch.equal(a, before_a) and not torch.equal(b, before_b)
    optimizer.param_groups[0]["lr"] = 0.1
    steps(optimizer, [a, b], [3])
    assert not torch.equal(a, before_a)


@every
@half
def test_state_is_float32_for_half_precision_and_resumes_bit_for_bit(cls, dtype):
    params = parameters(dtype)
    optimizer = build(cls, params)
    steps(optimizer, params, range(5))
    expected = torch.promote_types(dtype, torch.float32)
    assert tensors(optimizer) and all(x.dtype == expected for x in tensors(optimizer))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    copies = [p.requires_grad_() for p in saved["params"]]
    resumed = build(cls, copies)
    resumed.load_state_dict(saved["optimizer"])
    assert all(x.dtype == expected for x in tensors(resumed))
    for optimizer, ps in (optimizer, params), (resumed, copies):
        steps(optimizer, ps, range(5, 10))
    assert all(torch.equal(p, q) for p, q in zip(params, copies))


@every
def test_loading_copies_the_state_and_leaves_the_given_one_alone(cls):
    params = parameters()
    optimizer = build(cls, params)
    steps(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(saved)
    other = build(cls, copies := parameters())
    other.load_state_dict(given)
    steps(other, copies, range(3))
    for i, state in saved["state"].items():
        for name, x in state.items():
            other = given["state"][i][name]
            assert torch.equal(x, other) if torch.is_tensor(x) else x == other


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32_and_rounds_once(cls, dtype):
    half, full = parameters(dtype), [p.detach().float().requires_grad_() for p in parameters(dtype)]
    a, b = build(cls, half), build(cls, full)
    for seed in range(3):
        give_gradients(half, seed)
        for p, q in zip(half, full):
            q.grad = p.grad.float()
            with torch.no_grad():
                # Schedule-Free keeps what rounding takes
                q.copy_(q if "lost" in a.state.get(p, {}) else p)
        a.step()
        b.step()
        assert all(torch.equal(p, q.to(dtype)) for p, q in zip(half, full))


@every
def test_scalar_strided_and_zero_parameters_work(cls):
    torch.manual_seed(0)
    plain = torch.randn(6, 4)
    strided = torch.randn(4, 6).T.copy_(plain).requires_grad_()
    conv = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    params = [
        torch.tensor(2.0, requires_grad=True),
        strided,
        torch.zeros(3, 5, requires_grad=True),
        conv,
        torch.zeros(4, requires_grad=True),
    ]
    optimizer = build(cls, params)
    reference = [plain.clone().requires_grad_()]
    plain_optimizer = build(cls, reference)
    for seed in range(4):
        give_gradients(params, seed)
        params[4].grad.zero_()
        reference[0].grad = params[1].grad.clone()
        optimizer.step()
        plain_optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)
    assert not strided.is_contiguous() and torch.allclose(strided, reference[0], atol=1e-3)
    assert params[2].abs().sum() > 0


@every
def test_zero_gradients_keep_everything_finite(cls):
    params = parameters()
    optimizer = build(cls, params)
    for _ in range(4):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(torch.isfinite(x).all() for x in [*params, *tensors(optimizer)])


BAD_VALUES = [
    ("lr", -1e-3),
    ("lr", math.nan),
    ("weight_decay", -0.1),
    ("eps", -1e-8),
    ("momentum", -0.1),
    ("momentum", 1.0),
    ("betas", (-0.1, 0.9)),
    ("betas", (1.0, 0.9)),
    ("betas", (0.9, 1.1)),
    ("beta1", 1.0),
    ("alpha", -1.0),
    ("gamma", -1.0),
    ("fraction", 0.0),
    ("fraction", 1.5),
    ("betas_1d", (0.9, 1.1)),
    ("alpha_warmup", -1),
    ("beta3_warmup", -1),
    ("shampoo_beta", 1.0),
    ("beta", 1.0),
    ("gamma", -0.1),
    ("ns_steps", 0),
    ("ns", "sextic"),
    ("adjust_lr_fn", "none"),
    ("ns_dtype", "int8"),
    ("normuon_beta2", 1.5),
    ("grafting", "lion"),
    ("precondition_frequency", 0),
    ("warmup_steps", -1),
    ("trust_coefficient", -1),
    ("d", 0),
    ("adamw_weight_decay", -1),
    ("trust_gate", (0.9, 1.5)),
]


@pytest.mark.parametrize(
    "cls, name, value",
    [
        (cls, name, value)
        for cls in CASES
        for name, value in BAD_VALUES
        if name in cls([torch.zeros(2, 2)]).defaults
    ],
)
def test_bad_values_are_refused_by_name_in_the_constructor_and_in_groups(cls, name, value):
    w = torch.zeros(2, 2, requires_grad=True)
    options = dict(CASES[cls][0])
    if name == "eps" and cls is adafactor.Adafactor:
        value = (-1.0, 1e-3)
    shown = str([x for x in value if not 0 <= x < 1][0] if isinstance(value, tuple) else value)
    for params, arguments in (
        ([w], {**options, name: value}),
        (
            [{"params": [w], name: value}],
            options,
        ),
    ):
        with pytest.raises(ValueError) as error:
            cls(params, **arguments)
        assert shown in str(error.value) and name.split("[")[0].rstrip("s") in str(error.value)


@pytest.mark.parametrize(
    "cls, name, usual",
    [
        (cls, name, parameter.default)
        for cls in CASES
        for name, parameter in inspect.signature(cls).parameters.items()
        if isinstance(parameter.default, tuple)
    ],
)
def test_one_number_too_few_or_too_many_is_refused_before_any_step(cls, name, usual):
    w = torch.zeros(2, 2, requires_grad=True)
    for wrong in usual[:-1], (*usual, usual[-1]):
        with pytest.raises(ValueError):
            cls([w], **CASES[cls][0] | {name: wrong})


def test_the_ends_of_beta_ranges_are_as_documented():
    w = [torch.zeros(2, 2, requires_grad=True)]
    shampoo.Shampoo(w, betas=(0, 1))
    soap.SOAP(w, betas=(0, 0))
    for cls, options in (
        (adamw.AdamW, {"betas": (0.9, 1.0)}),
        (soap.SOAP, {"betas": (0.9, 1.0)}),
        (schedule_free.AdamWScheduleFree, {"betas": (0.0, 0.9)}),
        (schedule_free.SGDScheduleFree, {"momentum": 0.0}),
        (sgd.SGD, {"nesterov": True}),
    ):
        with pytest.raises(ValueError):
            cls(w, **options)


@every
def test_sparse_and_complex_gradients_are_refused(cls):
    w = torch.zeros(3, 3, requires_grad=True)
    w.grad = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse|dense"):
        build(cls, [w]).step()
    z = torch.zeros(3, 3, dtype=torch.complex64, requires_grad=True)
    z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match="complex|real"):
        build(cls, [z]).step()


@every
def test_elementwise_means_that_shards_step_like_the_whole(cls):
    assert isinstance(cls.elementwise, bool)
    whole = torch.linspace(-1, 1, 24).view(6, 4).requires_grad_()
    shards = [
        whole.detach()[:3].clone().requires_grad_(),
        whole.detach()[3:].clone().requires_grad_(),
    ]
    a, b = build(cls, [whole]), build(cls, shards)
    for seed in range(3):
        give_gradients([whole], seed)
        for shard, g in zip(shards, whole.grad.split(3)):
            shard.grad = g.clone()
        a.step()
        b.step()
    assert torch.allclose(whole, torch.cat(shards), atol=1e-6) == cls.elementwise


@every
def test_state_bytes_are_those_of_the_docstring(cls):
    w = torch.randn(16, 8, requires_grad=True)
    optimizer = build(cls, [w])
    steps(optimizer, [w], range(2))
    assert sum(x.numel() * x.element_size() for x in tensors(optimizer)) == CASES[cls][2]


@every
def test_deepcopy_and_late_groups_work(cls):
    params = parameters(shapes=((3, 3), (3, 3)))
    optimizer = build(cls, params[:1])
    optimizer.add_param_group({"params": params[1:], "lr": 0.5})
    assert optimizer.param_groups[1]["lr"] == 0.5
    copy.deepcopy(optimizer).state_dict()


@pytest.mark.parametrize(
    "file", sorted({Path(sys.modules[cls.__module__].__file__).name for cls in CASES})
)
def test_a_file_copied_alone_into_an_empty_folder_imports(file, tmp_path):
    text = (FOLDER / file).read_text(encoding="utf-8")
    (tmp_path / file).write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"alone_{file[:-3]}", tmp_path / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert measure(text)["code"] <= 260  # not blank, no comment, no docstring
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(name.split(".")[0] in {"torch", *sys.stdlib_module_names} for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", sorted({Path(sys.modules[cls.__module__].__file__).name for cls in CASES})
)
def test_the_self_check_of_a_file_runs_and_prints(file):
    run = subprocess.run(
        [sys.executable, FOLDER / file], capture_output=True, encoding="utf-8", check=True
    )
    assert run.stdout.strip()


@pytest.mark.gpu
@half
@pytest.mark.parametrize("cls", [adamw.AdamW, muon.Muon])
def test_fused_adamw_is_the_plain_one_and_they_go_on_from_each_other(dtype, cls, device):
    """With two groups, a parameter that joins late, and another optimizer from the fourth step
    on."""

    def six_steps(*kinds):
        params, state = parameters(dtype, device=device), {}
        base = torch.randn(9, 4).to(device, dtype)
        params[0] = base[:6].T.requires_grad_()  # the last rows of base are nobody's
        for step in range(6):
            if step % 3 == 0:
                groups = [
                    {"params": params[:2], "lr": 0.1},
                    {"params": params[2:], "weight_decay": 0.5},
                ]
                groups = (
                    [group | {"use_muon": False} for group in groups]
                    if cls is muon.Muon
                    else groups
                )
                optimizer = cls(
                    groups, lr=0.02, betas=(0.8, 0.95), eps=1e-9, fused=kinds[step // 3]
                )
                optimizer.state.update(state)
            give_gradients(params, step)
            params[1].grad = None if step < 2 else params[1].grad
            optimizer.step()
            state = optimizer.state
        assert [state[p]["step"] for p in params] == [6, 4, 6, 6, 6]
        return [*params, base]

    plain, tolerance = (
        six_steps(False, False),
        {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2),
    )
    for kinds in ((True, True), (True, False), (False, True)):
        for p, q in zip(six_steps(*kinds), plain):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_fused_none_takes_the_kernel_for_float32_alone(monkeypatch):
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float32
    params = [torch.nn.Parameter(torch.ones(i, dtype=x)) for i, x in enumerate(dtypes, 3)]
    params[3].placements = ()  # as a DTensor
    taken = []
    kernel = torch._fused_adamw_

    def spy(ps, *args, **options):
        taken.extend(p.numel() for p in ps)
        return kernel(ps, *args, **options)

    monkeypatch.setattr(torch, "_fused_adamw_", spy)
    for fused, expected in (None, [3]), (False, []), (True, [3, 4, 5, 6]):
        taken.clear()
        optimizer = adamw.AdamW(params, fused=fused)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert sorted(taken) == expected


@pytest.mark.gpu
def test_adamw_continues_from_torchs_own_state(device):
    ours, theirs = (parameters(torch.float64, device=device) for _ in range(2))
    reference = torch.optim.AdamW(theirs)
    steps(reference, theirs, range(5))
    optimizer = adamw.AdamW(ours)
    optimizer.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for p, q in zip(ours, theirs):
            p.copy_(q)
    for o, ps in (optimizer, ours), (reference, theirs):
        steps(o, ps, range(5, 10))
    assert all(torch.allclose(p, q, atol=1e-14) for p, q in zip(ours, theirs))


@pytest.mark.parametrize("cls", [schedule_free.AdamWScheduleFree, schedule_free.SGDScheduleFree])
def test_schedule_free_modes_are_idempotent_saved_and_guarded(cls):
    params = parameters(torch.float64)
    optimizer = cls(params, lr=0.1)
    give_gradients(params, 0)
    with pytest.raises(RuntimeError, match="train"):
        optimizer.step()
    optimizer.train()
    optimizer.train()
    steps(optimizer, params, range(5))
    y = params[0].detach().clone()
    optimizer.eval()
    x = params[0].detach().clone()
    optimizer.eval()
    assert torch.equal(params[0], x) and not torch.allclose(x, y)
    other = cls(params, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    other.eval()
    assert torch.equal(params[0], x)  # the mode came with the state, so nothing moved
    other.train()
    other.train()
    assert torch.allclose(params[0], y, atol=1e-14)


# Defects seen elsewhere, by name. (p.grad overwritten, closure under no_grad: the contract above.)


def test_muon_does_not_treat_a_missing_gradient_as_zero():
    params = parameters(shapes=((4, 4), (4, 4)))
    optimizer = muon.Muon(params)
    steps(optimizer, params, range(2))
    before = params[1].detach().clone()
    buffer = optimizer.state[params[1]]["momentum_buffer"].clone()
    give_gradients(params, 3)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)
    assert torch.equal(optimizer.state[params[1]]["momentum_buffer"], buffer)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_treats_a_convolution_as_the_matrix_it_is(adjust):
    torch.manual_seed(0)
    conv = torch.randn(8, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    matrix = conv.detach().flatten(1).requires_grad_()
    for w in conv, matrix:
        optimizer = muon.Muon(
            [w], adjust_lr_fn=adjust, normuon_beta2=0.9, cautious=True, weight_decay=0.1
        )
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            w.grad = torch.randn(8, 30, generator=generator, dtype=torch.float64).view(w.shape)
            optimizer.step()
    assert torch.allclose(conv.flatten(1), matrix, atol=1e-14)


@pytest.mark.parametrize("shape, k", [((8, 32), 1.0), ((32, 8), 2.0), ((8, 2, 2, 2), 1.0)])
def test_muon_update_is_neither_clipped_nor_scaled_by_the_gradient(shape, k):
    updates = []
    for scale in 1e-3, 1.0, 1e4:
        torch.manual_seed(0)
        w = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        w.grad = scale * torch.randn(shape, dtype=torch.float64)
        muon.Muon([w], lr=1.0, ns="polar", ns_steps=8).step()
        updates.append(w.detach())
    assert torch.allclose(updates[0], updates[2], atol=1e-9)
    s = torch.linalg.svdvals(updates[1].flatten(1))
    assert torch.allclose(s, torch.full_like(s, k), atol=1e-6)


def test_muon_refuses_vectors_by_name_rather_than_stepping_them_otherwise():
    with pytest.raises(ValueError, match="use_muon=False"):
        muon.Muon([torch.zeros(4, requires_grad=True)])
    optimizer = muon.Muon([{"params": [torch.zeros(4, requires_grad=True)], "use_muon": False}])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        3e-4,
        (0.9, 0.95),
        1e-10,
        0,
    )


@pytest.mark.parametrize("ns, ns_steps", [("quintic", 5), ("polar", 8), ("cubic", 3)])
def test_muon_in_panels_and_small_stacks_is_the_same_step(ns, ns_steps, monkeypatch):
    """Square, long and tall ones; 7 columns are no multiple of a panel's 2."""
    shapes = [(7, 7)] * 3 + [(7, 20), (20, 7)] * 3 + [(8, 7), (7, 3, 5)]
    options = dict(ns=ns, ns_steps=ns_steps, normuon_beta2=0.9, weight_decay=0.1)
    ends, stacks, cut, orthogonalize = [], [], muon.batches, muon.orthogonalize

    def counted(us, *args):
        X = orthogonalize(us, *args)
        stacks.append(tuple(X.shape))
        return X

    monkeypatch.setattr(muon, "orthogonalize", counted)
    for panel, stack in (1000, 10**9), (2, 2 * 140):
        monkeypatch.setattr(muon, "PANEL", panel)
        monkeypatch.setattr(muon, "STACK", stack)
        params = parameters(torch.float64, shapes)
        steps(muon.Muon(params, lr=0.1, **options), params, range(3))
        ends.append([p.detach() for p in params])
    whole = [(3, 7, 7), (3, 7, 20), (3, 20, 7), (1, 8, 7), (1, 7, 15)]
    few = [(3, 7, 7), *[(2, 7, 20), (1, 7, 20)], *[(2, 20, 7), (1, 20, 7)], (1, 8, 7), (1, 7, 15)]
    assert stacks == 3 * whole + 3 * few
    assert all(torch.allclose(x, y, atol=1e-11) for x, y in zip(*ends))
    params = parameters(torch.float64, [(20, 20)])
    give_gradients(params, 0)
    assert cut({"params": params, "use_muon": True}) == [params]  # larger than a stack


@pytest.mark.parametrize("short, panels", [(5, 1), (6, 3), (7, 4), (12, 6)])
def test_a_symmetric_product_multiplies_the_lower_panels_alone(short, panels, monkeypatch):
    monkeypatch.setattr(muon, "PANEL", 2)
    X = torch.randn(2, short, 9, dtype=torch.float64)
    start = torch.randn(2, short, short, dtype=torch.float64)
    start = start + start.mT
    out = muon.symmetric_product_(start.clone(), X, X.mT, 0.5, -2.0)
    assert torch.allclose(out, 0.5 * start - 2 * X @ X.mT, atol=1e-13)
    # What lies above the diagonal's panels is never read, nor computed.
    Y = torch.randn(2, 9, short, dtype=torch.float64)
    out, full = muon.symmetric_product_(torch.full_like(start, torch.nan), X, Y), X @ Y
    below = torch.arange(short)[:, None] // 2 >= torch.arange(short) // 2
    if panels == 1:
        below[:] = True
    assert torch.allclose(out[:, below], full[:, below], atol=1e-13)
    assert torch.equal(out[:, ~below], out.mT[:, ~below])


@pytest.mark.gpu
@pytest.mark.parametrize("n", [4, 5, 8])
@pytest.mark.parametrize("rank", [0, 4])
def test_soaps_qr_by_panels_is_lapacks(n, rank, monkeypatch, device):
    monkeypatch.setattr(soap, "PANEL", 2)
    torch.manual_seed(0)
    Y = torch.randn(n, rank, dtype=torch.float64) @ torch.randn(rank, n, dtype=torch.float64)
    for Y in (Y.to(device), Y.mT.to(device), (Y + 1e-8 * torch.randn_like(Y)).to(device)):
        Q = soap.householder_qr(Y)
        assert torch.allclose(Q, torch.linalg.qr(Y)[0], atol=1e-13)
        assert torch.allclose(Q.mT @ Q, torch.eye(n, dtype=Y.dtype, device=device), atol=1e-14)
        assert (Q.mT @ Y).tril(-1).abs().max() < 1e-13


@pytest.mark.parametrize("n", [3, 6, 7])
def test_soap_multiplies_the_lower_half_of_a_large_side_alone(n, monkeypatch):
    monkeypatch.setattr(soap, "HALVED", 2)
    g = torch.randn(n, 4, 5, dtype=torch.float64)
    start = torch.randn(n, n, dtype=torch.float64)
    start = start + start.mT
    G = g.flatten(1)
    want = 0.9 * start + 0.1 * G @ G.mT
    if n >= 6:
        above = torch.arange(n)[:, None] // 2 < torch.arange(n) // 2
        start[above] = torch.nan  # never read
    soap.accumulate(g, [start, None, None], 0.9)
    assert torch.allclose(start, want, atol=1e-13)


def test_soap_with_panels_is_the_same_method(monkeypatch):
    ends = []
    for panel in 1000, 2:
        monkeypatch.setattr(soap, "PANEL", panel)
        monkeypatch.setattr(soap, "HALVED", panel)
        params = parameters(torch.float64, ((7, 6), (5, 2, 6), (9,)))
        steps(soap.SOAP(params, precondition_frequency=2, eps=1e-2), params, range(6))
        ends.append([p.detach() for p in params])
    assert all(torch.allclose(x, y, atol=1e-10) for x, y in zip(*ends))


def test_muon_leaves_tall_matrices_in_their_order():
    """A copy that turns them costs more than a product with them."""
    for shape in (6, 2), (3, 2), (2, 6):
        u = torch.randn(shape, dtype=torch.float64)
        X = muon.orthogonalize([u, 2 * u], dtype=torch.float64)
        assert X.is_contiguous() and X.shape == (2, *shape)
        turned = muon.orthogonalize([u.mT], dtype=torch.float64)[0]
        assert torch.allclose(X[0], turned.mT, atol=1e-13)
        assert torch.allclose(X[0], X[1], atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "ns, steps_", [("quintic", 5), ("polar", 5), ("polar", 8), ("cubic", 10), ("exact", 12)]
)
def test_muon_in_bfloat16_never_blows_up_on_gradients_of_low_rank(ns, steps_, device, monkeypatch):
    for panel in 256, 4:
        monkeypatch.setattr(muon, "PANEL", panel)
        for shape in (16, 32), (16, 64), (64, 16), (32, 32):
            for noise in 0, 1e-6, 1e-3, 3e-2:
                torch.manual_seed(0)
                g = torch.randn(shape[0], 1) @ torch.randn(1, shape[1]) + noise * torch.randn(shape)
                x = muon.orthogonalize([g.to(device)], ns, steps_).float()[0]
                assert torch.linalg.matrix_norm(x, 2) < 1.3


@pytest.mark.parametrize("cls, first", [(shampoo.Shampoo, 0), (soap.SOAP, 1), (kl_soap.KLSOAP, 1)])
def test_matrix_optimizers_move_between_refreshes_too(cls, first):
    w = parameters(shapes=((4, 4),))[0]
    optimizer = cls([w], precondition_frequency=100)
    for t in range(6):
        before = w.detach().clone()
        steps(optimizer, [w], [t])
        assert torch.equal(w, before) == (t < first)


def test_lamb_corrects_the_moments_and_not_the_learning_rate():
    w = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    before = w.detach().clone()
    w.grad = torch.randn_like(w)
    lamb.LAMB([w], lr=0.01).step()
    assert abs((w - before).norm() / before.norm() - 0.01) < 1e-12


@pytest.mark.parametrize("name", ("lr", "eps", "weight_decay"))
@pytest.mark.parametrize("cls", (kl_soap.KLSOAP, dion.Dion3))
def test_none_is_no_number_where_another_option_may_be_none(cls, name):
    w = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(ValueError, match=f"{name}=None is not allowed"):
        cls([w], **{name: None})
    cls([w], **{"shampoo_beta" if cls is kl_soap.KLSOAP else "normuon_beta2": None})


@pytest.mark.parametrize(
    "cls", (muon.Muon, muown.Muown, dion.Dion3, soap_muon.SOAPMuon, pmuon.PMuon)
)
def test_betas_set_by_hand_stay_until_onecyclelr_moves_again(cls):
    params = parameters(shapes=((4, 8), (4,)))
    optimizer = build(cls, params)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    (group,) = [group for group in optimizer.param_groups if not group["use_muon"]]
    steps(optimizer, params, range(1))
    assert group["betas"][0] == group["momentum"]
    group["betas"] = (0.5, 0.9)
    steps(optimizer, params, range(1))
    assert group["betas"] == (0.5, 0.9)
    scheduler.step()
    steps(optimizer, params, range(1))
    assert group["betas"] == (group["momentum"], 0.9)


def test_no_matrix_optimizer_falls_back_to_sgd_or_adam_on_a_slice():
    whole = muon.Muon, muown.Muown, shampoo.Shampoo, soap.SOAP, kl_soap.KLSOAP
    whole += soap_muon.SOAPMuon, pmuon.PMuon, dion.Dion3
    for cls in *whole, adafactor.Adafactor, lars.LARS, lamb.LAMB:
        assert (
            not cls.elementwise
        )  # parallel/sharded_optimizer.py must bring whole parameters to these


@every
def test_the_update_belongs_to_the_accumulated_gradient(cls):
    torch.manual_seed(0)
    inputs, a = torch.randn(8, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    b = a.clone().requires_grad_()
    a.requires_grad_()
    for w, chunks in (a, 1), (b, 4):
        optimizer = build(cls, [w])
        for _ in range(2):
            optimizer.zero_grad()
            for x in inputs.chunk(chunks):
                (x @ w.T).square().sum().backward()
            optimizer.step()
    assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("name", ["bfloat16", "float32", torch.float32, torch.float64, None])
def test_ns_dtype_takes_a_dtype_or_its_name(name):
    w = parameters(shapes=((4, 8),))[0]
    optimizer = muon.Muon([w], ns_dtype=name)
    steps(optimizer, [w], range(2))
    assert optimizer.param_groups[0]["ns_dtype"] == (name and str(name).removeprefix("torch."))
