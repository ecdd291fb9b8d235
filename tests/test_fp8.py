"""FP8 products against ones written out block by block in float64, against torch's own, against
autograd."""

import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import gpu, init_weights, joined, placed, run_ranks
from torch.utils.checkpoint import checkpoint

from memory.activation_checkpoint import keep_products
from model import GPT, GPTConfig
from parallel.ddp import DDP
from parallel.zero import ZeRO
from precision import fp8
from precision.fp8 import GRADIENT, WEIGHT, Recipe, X, dequantise, linear, matmul, quantise
from run.options import resolve_options
from settings.fields import Config

CPU, E4M3, E5M2 = torch.device("cpu"), torch.float8_e4m3fn, torch.float8_e5m2
SCALINGS, ALL = ("tensor", "row", "block"), (True, True, True)
SHAPE = dict(
    n_layer=2, n_head=2, n_kv_head=2, n_embd=32, block_size=16, vocab_size=64, zero_init=False
)


def recipe(
    scaling="block", products=ALL, gradient_format="e4m3", power_of_two=False, hardware=False
):
    return Recipe(scaling, products, gradient_format, power_of_two, hardware)


def tensors(m=300, k=200, n=144, dtype=torch.float64, bias=True, seed=0, device=CPU):
    """x, W, b and the gradient of y; every few places something much larger."""
    torch.manual_seed(seed)
    x, w, b, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(n), torch.randn(m, n)
    for t in (x, w, dy):
        t[torch.rand(t.shape) < 0.003] *= 1e4
    made = [t.to(device, dtype).requires_grad_() for t in (x, w, b)]
    return (*made[: 3 if bias else 2], dy.to(device, dtype))


def results(function, x, w, b, dy):
    x, w, b = (t if t is None else t.detach().requires_grad_() for t in (x, w, b))
    y = function(x, w, b)
    leaves = [t for t in (x, w, b) if t is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def naive(t, scaling, role, form, power_of_two=False):
    """t (rows, contraction), float64, as FP8 holds it: block by block."""
    largest, out = torch.finfo(form).max, torch.zeros_like(t)
    r, c = {
        "tensor": t.shape,
        "row": (1, t.shape[1]),
        "block": (128 if role == WEIGHT else 1, 128),
    }[scaling]
    for i in range(0, t.shape[0], r):
        for j in range(0, t.shape[1], c):
            part = t[i : i + r, j : j + c]
            scale = part.abs().max().float() / largest
            scale = torch.tensor(
                2.0 ** math.ceil(math.log2(scale)) if power_of_two else scale.item()
            )
            q = (part / scale.double()).clamp(-largest, largest).to(form)
            out[i : i + r, j : j + c] = q.double() * scale.double()
    return out


# ---- numbers -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "form,largest,normal,subnormal,epsilon",
    [(E4M3, 448, 2**-6, 2**-9, 2**-3), (E5M2, 57344, 2**-14, 2**-16, 2**-2)],
)
def test_the_table_of_formats_is_right(form, largest, normal, subnormal, epsilon):
    every = torch.arange(256, dtype=torch.uint8).view(form).float()
    positive = every[every.isfinite() & (every > 0)].sort().values
    info = torch.finfo(form)
    assert positive[-1] == largest == info.max and positive[0] == subnormal
    assert info.smallest_normal == normal and info.eps == epsilon
    after_one = positive[positive > 1][0]
    assert after_one - 1 == epsilon


@pytest.mark.parametrize("form", [E4M3, E5M2])
@pytest.mark.parametrize("block", [(256, 512), gpu((1, 512)), gpu((1, 128)), (128, 128)])
def test_rounding_changes_a_number_by_half_an_epsilon_at_most(form, block, device):
    torch.manual_seed(0)
    x = torch.randn(256, 512, dtype=torch.float64) * torch.logspace(-3, 0, 512, dtype=torch.float64)
    x = x.to(device)
    q, scale = quantise(x, block, form)
    error = (dequantise(q, scale, block, torch.float64) - x).abs()
    info, scales = torch.finfo(form), fp8.expand(scale, block, x.shape)
    normal = x.abs() >= info.smallest_normal * scales
    assert normal.float().mean() > 0.5
    # Half an epsilon of what is rounded to: 1 + eps/2 -> 1
    bound = info.eps / 2 / (1 + info.eps / 2)
    assert (error <= bound * x.abs() * (1 + 1e-9))[normal].all()
    assert (error <= info.eps / 2 * info.smallest_normal * scales * (1 + 1e-6))[~normal].all()
    assert error[normal].div(x[normal].abs()).max() > 0.98 * bound  # a bound that is met


@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_the_mean_square_error_of_uniform_mantissas_is_epsilon_squared_over_24(form):
    """An error uniform in ±eps/2 on mantissas m uniform in [1, 2): eps²/12 times the mean of 1/m²,
    1/2."""
    torch.manual_seed(0)
    x = (1 + torch.rand(200, 1000, dtype=torch.float64)) * 2.0 ** torch.randint(-4, 5, (200, 1000))
    x[0, 0] = torch.finfo(form).max  # scale 1
    q, scale = quantise(x, x.shape, form)
    relative = dequantise(q, scale, x.shape, torch.float64) / x - 1
    assert scale.item() == 1
    assert relative.square().mean().sqrt().item() == pytest.approx(
        torch.finfo(form).eps / 24**0.5, rel=0.01
    )


def error_of(x, scaling, form, power_of_two=False):
    block = fp8.block_of(scaling, X, x.shape)
    q, scale = quantise(x, block, form, power_of_two)
    return (dequantise(q, scale, block, torch.float64) / x - 1).square().mean().sqrt().item()


def test_an_outlier_costs_nothing_within_the_formats_range_and_little_beyond_with_small_blocks():
    torch.manual_seed(0)
    x = torch.randn(64, 512, dtype=torch.float64)
    plain = {s: error_of(x, s, E4M3) for s in SCALINGS}
    x[:, 7] *= 30
    assert all(error_of(x, s, E4M3) < 1.3 * plain[s] for s in SCALINGS)
    x[:, 7] *= torch.logspace(2, 5, 64, dtype=torch.float64)  # differs from token to token
    tensor, row, block = (error_of(x, s, E4M3) for s in SCALINGS)
    assert block < 0.8 * row and row < 0.8 * tensor
    assert error_of(x, "tensor", E5M2) < 0.5 * tensor  # range is what it lacks


def test_e4m3_is_twice_as_exact_as_e5m2_on_tame_numbers():
    torch.manual_seed(0)
    x = torch.randn(64, 512, dtype=torch.float64).abs() + 0.1
    for scaling in SCALINGS:
        ratio = error_of(x, scaling, E5M2) / error_of(x, scaling, E4M3)
        assert 1.9 < ratio < 2.1


@pytest.mark.parametrize("block", [(5, 300), (1, 300), (1, 128), (128, 128)])
def test_scales_of_powers_of_two_round_nothing_themselves(block):
    powers = 2.0 ** torch.arange(-110, 118).double()
    for form in (E4M3, E5M2):
        x = powers[:, None] * torch.tensor([1.0, 1.75, 448 / 256])
        q, scale = quantise(x, (1, 3), form, power_of_two=True)
        assert torch.equal(dequantise(q, scale, (1, 3), torch.float64), x)
    torch.manual_seed(0)
    x = torch.randn(5, 300, dtype=torch.float64)
    exact, coarse = quantise(x, block, E4M3)[1], quantise(x, block, E4M3, power_of_two=True)[1]
    assert torch.equal(coarse.frexp().mantissa, torch.full_like(coarse, 0.5))
    assert (coarse >= exact).all() and (coarse < 2 * exact).all()


@pytest.mark.parametrize("form", [E4M3, gpu(E5M2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_finite_number_becomes_nan_or_infinite(form, dtype, device):
    torch.manual_seed(0)
    tiny = torch.finfo(dtype).tiny
    cases = [torch.randn(3, 200) * size for size in (1e37, 1e4, 1.0, 1e-20, 1e-37, 1e-40, 1e-45)]
    cases += [
        torch.zeros(3, 200),
        torch.full((3, 200), tiny),
        torch.tensor([[1e38, 1e-45, 0.0, -1e38]]),
    ]
    cases += [torch.linspace(-480, 480, 999)[None], torch.linspace(-62000, 62000, 999)[None]]
    for x in (case.to(device, dtype) for case in cases):
        for block in (tuple(x.shape), (1, x.shape[1]), (1, 128), (128, 128)):
            for power_of_two in (False, True):
                for before in (None, 0.0, 1e-30, 1e30):
                    past = None if before is None else x.new_tensor([0.0, before, 0.0]).float()
                    q, scale = quantise(x, block, form, power_of_two, past)
                    back = dequantise(q, scale, block, torch.float32)
                    assert (
                        q.float().isfinite().all()
                        and scale.isfinite().all()
                        and back.isfinite().all()
                    )
        if not x.any():
            assert not back.any()


def test_what_is_larger_than_the_history_saturates_and_is_entered():
    past = torch.tensor([0.0, 3.0, 7.0, 5.0])
    x = torch.tensor([[14.0, -1000.0, 7.0, 1.0]])
    q, scale = quantise(x, (1, 4), E4M3, amax_history=past)
    assert scale.item() == 7 / torch.tensor(448.0).item() and past.tolist() == [
        1000.0,
        3.0,
        7.0,
        5.0,
    ]
    assert dequantise(q, scale, (1, 4), torch.float32).tolist() == [[7.0, -7.0, 7.0, 1.0]]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_where_it_shares_a_scale_and_nowhere_else(bad):
    x = torch.ones(4, 256)
    x[1, 200] = bad
    shared = {(4, 256): 1024, (1, 256): 256, (1, 128): 128, (128, 128): 4 * 128}
    for block, count in shared.items():
        for power_of_two in (False, True):
            back = dequantise(*quantise(x, block, E4M3, power_of_two), block, torch.float32)
            assert back.isnan().sum() == count and back[1, 200].isnan()
            assert torch.equal(back[~back.isnan()], torch.ones(1024 - count))
    past = torch.tensor([0.5, 2.0])
    back = dequantise(*quantise(x, (4, 256), E4M3, amax_history=past), (4, 256), torch.float32)
    assert back.isnan().all() and past.tolist() == [0.5, 2.0]  # it stays out of the history


# ---- products ------------------------------------------------------------------------------------
SIZES = [(300, 200, 144), (128, 128, 128), (1, 1, 1), (7, 129, 3), (130, 64, 257)]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("size", [*SIZES[:-1], gpu(SIZES[-1])], ids=str)
@pytest.mark.parametrize("gradient_format,power_of_two", [("e4m3", False), ("e5m2", True)])
def test_the_products_are_those_of_the_numbers_that_fp8_holds(
    scaling, size, gradient_format, power_of_two, device
):
    x, w, b, dy = tensors(*size, device=device)
    form = recipe(scaling, ALL, gradient_format, power_of_two)
    ours = results(lambda *t: linear(*t, recipe=form), x, w, b, dy)
    form = {"e4m3": E4M3, "e5m2": E5M2}[gradient_format]

    def held(t, role):
        return naive(t.detach(), scaling, role, form if role == GRADIENT else E4M3, power_of_two)

    exact = [
        held(x, X) @ held(w, WEIGHT).T + b.detach(),
        held(dy, GRADIENT) @ held(w.T, WEIGHT).T,
        held(dy.T, GRADIENT) @ held(x.T, X).T,
        dy.sum(0),
    ]
    for mine, right in zip(ours, exact):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12 * right.abs().max().item())


@pytest.mark.parametrize("shape", [(20,), (0, 20), (3, 0, 20), (2, 5, 20), (4, 1, 3, 20)], ids=str)
@pytest.mark.parametrize("scaling", [*SCALINGS, "delayed"])
def test_any_number_of_dimensions_and_of_tokens_none_included(shape, scaling):
    torch.manual_seed(0)
    x, w = torch.randn(shape, requires_grad=True), torch.randn(24, 20, requires_grad=True)
    history = torch.zeros(4, 3) if scaling == "delayed" else None
    options = dict(recipe=recipe("tensor" if scaling == "delayed" else scaling))
    y = linear(x, w, **options, amax_history=history)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 24) and x.grad.shape == x.shape and w.grad.shape == w.shape
    flat = linear(x.detach().reshape(-1, 20), w, **options, amax_history=history)
    assert torch.equal(y.reshape(-1, 24), flat) and w.grad.isfinite().all()


def test_float64_stays_float64_under_autocast_as_in_torch():
    x, w = torch.randn(4, 32, dtype=torch.float64), torch.randn(16, 32, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w, recipe=recipe("row")).dtype == F.linear(x, w).dtype == torch.float64
        assert linear(x.float(), w, recipe=recipe("row")).dtype == torch.bfloat16


@pytest.mark.parametrize("scaling", SCALINGS)
def test_backward_is_the_gradient_where_fp8_holds_the_numbers_exactly(scaling):
    """Small integers times a power of two, and an amax of 448 of it wherever a scale is shared."""
    torch.manual_seed(0)

    def whole(rows, columns, unit):
        t = torch.randint(-8, 9, (rows, columns), dtype=torch.float64)
        i, j = torch.arange(rows)[:, None], torch.arange(columns)
        return torch.where((i + j) % 64 == 0, 448.0, t) * unit  # one in any 64 of a row or a column

    x, w, dy = whole(256, 128, 2**-3), whole(192, 128, 2**-7), whole(256, 192, 2**-12)
    ours = results(lambda *t: linear(*t, recipe=recipe(scaling)), x, w, None, dy)
    for mine, exact in zip(ours, results(F.linear, x, w, None, dy)):
        assert torch.equal(mine, exact)

    def loss(x, w):
        return linear(x, w, recipe=recipe(scaling))

    # a step that FP8 also holds: the difference quotient of a bilinear function is its derivative
    step = torch.zeros_like(x)
    step[3, (x[3].abs() < 1).nonzero()[0]] = 2**-3
    quotient = ((loss(x + step, w) - loss(x, w)) * dy).sum()
    assert quotient == (ours[1] * step).sum() != 0


@pytest.mark.parametrize("off", range(3))
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_that_is_off_is_the_plain_one_bitwise(off, bias):
    x, w, b, dy = tensors(dtype=torch.float32)
    x, b = x.detach().unflatten(0, (3, 100)), b if bias else None
    dy = dy.unflatten(0, (3, 100))
    products = tuple(i != off for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(F.linear, x, w, b, dy)
        ours = results(lambda *t: linear(*t, recipe=recipe("block", products)), x, w, b, dy)
    for i, (mine, exact) in enumerate(zip(ours, plain)):
        assert mine.dtype == exact.dtype
        assert torch.equal(mine, exact) == (i in (off, 3)), i


def test_dtypes_are_autocasts_and_the_weight_gradient_keeps_float32():
    x, w, b, dy = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, dx, dw, db = results(lambda *t: linear(*t, recipe=recipe()), x, w, b, dy)
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (torch.bfloat16, *[torch.float32] * 3)
    assert not torch.equal(dw, dw.bfloat16().float())
    exact = results(
        lambda *t: linear(*t, recipe=recipe()),
        *(t.detach().double() for t in (x.bfloat16(), w, b, dy.bfloat16())),
    )
    for mine, right, epsilon in zip((y, dx, dw), exact, (2**-7, 2**-7, 1e-5)):
        limit = epsilon * right.abs().max().item()
        torch.testing.assert_close(mine.double(), right, rtol=epsilon, atol=limit)


def test_frozen_inputs_and_weights_get_no_gradient():
    x, w, _, dy = tensors(dtype=torch.float32)
    linear(x.detach(), w, recipe=recipe()).backward(dy)
    assert x.grad is None and w.grad is not None
    linear(x, w.detach(), recipe=recipe()).backward(dy)
    assert x.grad is not None


@pytest.mark.parametrize("scaling", ["row", "block"])
def test_tiles_of_tokens_make_micro_batches_and_replicas_exact(scaling):
    """128 tokens each: no tile is cut. With row scaling a weight gradient's row has all tokens."""
    x, w, _, dy = tensors(256, 100, 60)
    form = recipe(scaling)
    whole = results(lambda *t: linear(*t, recipe=form), x, w, None, dy)
    parts = [
        results(lambda *t: linear(*t, recipe=form), x[s], w, None, dy[s])
        for s in (slice(128), slice(128, 256))
    ]
    assert all(torch.equal(torch.cat([p[i] for p in parts]), whole[i]) for i in (0, 1))
    difference = (parts[0][2] + parts[1][2] - whole[2]).abs().max() / whole[2].abs().max()
    assert (difference < 1e-14) == (scaling == "block")


def test_blocks_that_a_cut_leaves_whole_are_quantised_alike():
    _, w, _, _ = tensors(1, 256, 384)
    block, parts = (128, 128), (w[:128], w[128:])
    whole = dequantise(*quantise(w.detach(), block, E4M3), block, torch.float64)
    cut = [dequantise(*quantise(p.detach(), block, E4M3), block, torch.float64) for p in parts]
    assert torch.equal(torch.cat(cut), whole)
    cut = [dequantise(*quantise(p.detach(), p.shape, E4M3), p.shape, torch.float64) for p in parts]
    whole = dequantise(*quantise(w.detach(), w.shape, E4M3), w.shape, torch.float64)
    assert not torch.equal(torch.cat(cut), whole)  # one scale for the tensor: each part has its own


@pytest.mark.parametrize("form", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_code_becomes_the_number_that_torch_casts_it_to(form, dtype):
    q = torch.arange(256, dtype=torch.uint8).view(16, 16).t().view(form)  # not contiguous
    scale = torch.full((1, 1), 0.5)
    torch.testing.assert_close(
        dequantise(q, scale, (16, 16), dtype), q.to(dtype) / 2, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN"
)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_onednn_multiplies_the_same_numbers_in_another_order(scaling, monkeypatch):
    calls, real = [], fp8.onednn.matmul
    monkeypatch.setattr(fp8.onednn, "matmul", lambda *args: calls.append(1) or real(*args))
    # It has no float64
    for dtype, tolerance, n in ((torch.float32, 2e-6, 3), (torch.float64, 0, 0)):
        x, w, dy = tensors(dtype=dtype, bias=False)
        plain = results(lambda x, w, b: linear(x, w, b, recipe=recipe(scaling)), x, w, None, dy)
        assert calls == []
        quick = recipe(scaling)._replace(onednn=True)
        fast = results(lambda x, w, b: linear(x, w, b, recipe=quick), x, w, None, dy)
        for a, b in zip(plain, fast):
            assert (a - b).norm() <= tolerance * a.norm()
        assert len(calls) == n
        calls.clear()


# ---- others' products ----------------------------------------------------------------------------
def why_no_product(device: torch.device, scaling: str) -> str | None:
    """Why torch has no scaled product of this kind on this device; None if it has one."""
    if device.type == "cuda":
        return fp8.missing_hardware(device, scaling, "e4m3", [])
    if scaling == "block":
        return "no CPU multiplies by block"
    q = torch.ones(16, 16, device=device).to(E4M3)
    scale = torch.ones(1 if scaling == "tensor" else 16, 1, device=device)
    try:
        kind = {"tensor": F.ScalingType.TensorWise, "row": F.ScalingType.RowWise}[scaling]
        F.scaled_mm(q, q.t(), scale, kind, scale.t(), kind, output_dtype=torch.float32)
    except (AttributeError, NotImplementedError):
        # Torch 2.11 has the function and no kernel of it for a CPU.
        return "no scaled_mm here on a CPU"
    return None


# y has autocast's dtype, dW float32. dx's product has the layouts of y's.
ASKED = [((X, WEIGHT), torch.bfloat16), ((GRADIENT, X), torch.float32)]
OTHERS = [(roles, torch.float32) for roles in ((X, WEIGHT), (GRADIENT, WEIGHT))]
OTHERS += [(roles, torch.bfloat16) for roles in ((GRADIENT, WEIGHT), (GRADIENT, X))]


@pytest.mark.parametrize(
    "scaling, roles, out",
    [
        *(gpu(scaling, *case) for scaling in SCALINGS for case in ASKED),
        *((scaling, *case) for scaling in ("tensor", "row") for case in OTHERS),
    ],
)
def test_torchs_own_scaled_product_gives_the_emulations_numbers(scaling, roles, out, device):
    """It is what the hardware path calls; on a CPU it exists for one scale a tensor or a row."""
    a, b = (t.detach() for t in tensors(77, 200, 144, torch.float32, device=device)[:2])
    why = why_no_product(device, scaling)
    if why is not None:
        pytest.skip(why)
    ours = matmul(a, b, roles, recipe(scaling), out)
    theirs = matmul(a, b, roles, recipe(scaling, hardware=True), out)
    assert ours.dtype == theirs.dtype == out
    # Hopper's sums of 128 products keep some 13 bits before they become float32.
    exact = 1e-5 if device.type == "cpu" else 2e-3
    tolerance = exact if out == torch.float32 else 2**-7
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance * ours.abs().max().item()
    )
    assert (ours - a @ b.T).abs().max() > 1e-3 * ours.abs().max()  # FP8 it is


@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="this torch has no scaled_mm")
@pytest.mark.parametrize(
    "size", [(300, 200, 144), (128, 384, 272), (5, 640, 16), (64, 100, 128)], ids=str
)
@pytest.mark.parametrize("roles", [(X, WEIGHT), (GRADIENT, WEIGHT), (GRADIENT, X)])
def test_block_scales_reach_the_hardware_in_the_layout_it_takes(monkeypatch, size, roles):
    """No CPU has this product. In its place one that demands the layouts that Hopper's does, and
    takes its numbers from them."""
    kind, seen = F.ScalingType, []

    def column_major(scale, rows, columns):
        assert scale.shape == (rows, columns) and scale.dtype == torch.float32
        assert scale.stride(0) == 1 and (scale.stride(1) == rows or columns == 1 == scale.stride(1))

    def hopper(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype):
        (m, k), n = a.shape, b.shape[1]
        assert m % 8 == 0 and k % 16 == 0 and n % 16 == 0 and b.shape[0] == k
        assert a.dtype == b.dtype == E4M3
        assert a.stride() == (k, 1) and b.stride() == (1, k)
        assert kind_a == kind.BlockWise1x128
        seen.append(kind_b)
        tiles = -(-k // 128)
        column_major(scale_a, m, tiles)
        a = a.double() * scale_a.double().repeat_interleave(128, 1)[:, :k]
        if kind_b == kind.BlockWise128x128:
            column_major(scale_b, -(-tiles // 4) * 4, -(-n // 128))
            scale_b = (
                scale_b[:tiles].double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:k, :n]
            )
            return (a @ (b.double() * scale_b)).to(output_dtype)
        assert kind_b == kind.BlockWise1x128
        column_major(scale_b, n, tiles)
        return (a @ (b.double() * scale_b.t().double().repeat_interleave(128, 0)[:k])).to(
            output_dtype
        )

    monkeypatch.setattr(F, "scaled_mm", hopper)
    a, b = tensors(*size, torch.float32)[:2]
    forms = (
        recipe("block"),
        recipe("block", hardware=True),
    )
    a, b = a.detach(), b.detach()
    for pair in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
        ours, theirs = (matmul(*pair, roles, form, torch.float32) for form in forms)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * ours.abs().max().item())
    assert seen == 2 * [kind.BlockWise128x128 if roles[1] == WEIGHT else kind.BlockWise1x128]


@pytest.mark.skipif(why_no_product(CPU, "row") is not None, reason="no such product on a CPU")
@pytest.mark.parametrize("how, n", [("selective", 3), ("full", 4)])
def test_selective_checkpointing_keeps_the_hardwares_products(monkeypatch, how, n):
    """y, dx and dW; only a full recomputation multiplies y again."""
    calls = []
    plain = fp8.scaled_mm
    monkeypatch.setattr(fp8, "scaled_mm", lambda *args: (calls.append(1), plain(*args))[1])
    form = recipe("row", hardware=True)
    x, w, _, dy = tensors(16, 32, 16, torch.float32)
    contexts = {"context_fn": keep_products} if how == "selective" else {}
    y = checkpoint(lambda x, w: linear(x, w, recipe=form), x, w, use_reentrant=False, **contexts)
    y.backward(dy)
    assert len(calls) == n


@pytest.mark.skipif(why_no_product(CPU, "row") is not None, reason="no such product on a CPU")
@pytest.mark.skipif(sys.platform == "win32", reason="torch.compile there wants a compiler")
def test_the_compiler_sees_the_hardwares_product_as_one_operator():
    """torch's own lowering would take scales by block for those of an older product."""
    form = recipe("row", hardware=True)
    x, w = (t.detach() for t in tensors(16, 32, 16, torch.float32, bias=False)[:2])
    seen = []

    def backend(graph, examples):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    y = torch.compile(partial(linear, recipe=form), backend=backend, fullgraph=True)(x, w)
    assert torch.equal(y, linear(x, w, recipe=form))
    assert [f for f in seen if "scaled_mm" in str(f)] == [torch.ops.nanoscale.scaled_mm.default]


def test_what_the_hardware_has_no_product_for_is_not_asked_of_it():
    form = recipe("tensor", hardware=True, gradient_format="e5m2")
    with pytest.raises(AssertionError, match="multiples of 16"):
        matmul(torch.ones(16, 16), torch.ones(24, 16), (X, WEIGHT), form, torch.float32)
    with pytest.raises(AssertionError, match="e5m2 with e5m2"):
        matmul(torch.ones(16, 16), torch.ones(16, 16), (GRADIENT, GRADIENT), form, torch.float32)


def test_it_agrees_with_torchao():
    """Scales as powers of two, so that multiplying by one and dividing by its inverse is the
    same."""
    pytest.importorskip("torchao")
    from torchao.float8.config import Float8LinearConfig, Float8LinearRecipeName
    from torchao.float8.float8_linear import Float8Linear

    x, w, b, dy = tensors(64, 96, 80, torch.bfloat16)
    for scaling in ("tensor", "row"):
        name = {"tensor": "TENSORWISE", "row": "ROWWISE"}[scaling]
        settings = Float8LinearConfig.from_recipe_name(Float8LinearRecipeName[name])
        object.__setattr__(settings, "round_scales_to_power_of_2", True)
        object.__setattr__(settings, "emulate", True)
        layer = torch.nn.Linear(96, 80).bfloat16()
        layer.weight.data, layer.bias.data = w.detach().clone(), b.detach().clone()
        theirs_layer = Float8Linear.from_float(layer, settings)
        form = recipe(
            scaling, gradient_format="e5m2" if scaling == "tensor" else "e4m3", power_of_two=True
        )
        inside = x.detach().requires_grad_()
        y = theirs_layer(inside)
        dx, dw = torch.autograd.grad(y, [inside, theirs_layer.weight], dy)
        ours = results(lambda *t: linear(*t, recipe=form), x, w, b, dy)
        for mine, their in zip(ours, (y, dx, dw)):
            torch.testing.assert_close(
                mine, their.detach(), rtol=2**-6, atol=2**-7 * mine.abs().max().item()
            )


# ---- delayed scaling -----------------------------------------------------------------------------
def layer_state(history=3, device=CPU, **options):
    layer = torch.nn.Linear(20, 24, bias=False).to(device)
    layer.matmul = F.linear
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleDict({"0": layer})
    return layer, fp8.convert(
        model, device, scaling="tensor", delayed=True, history=history, **options
    )


@pytest.mark.gpu
def test_delayed_scales_come_from_the_largest_amax_of_the_last_steps(device):
    layer, state = layer_state(history=3, device=device)
    sizes = [1.0, 8.0, 2.0, 4.0, 0.5, 16.0]
    for i, size in enumerate(sizes):
        x = torch.linspace(-size, size, 40, device=device).view(2, 20)
        before = state.histories["blocks.0"].clone()
        window = sizes[max(0, i - 3) : i]
        assert before[1:, 0].max().item() == max(window, default=0)
        y = layer.matmul(x, layer.weight)
        y.backward(torch.full_like(y, 100 * size))
        amax = max(window, default=size)  # an empty window: the tensor's own
        w = naive(layer.weight.detach().double(), "tensor", WEIGHT, E4M3).float()
        scale = torch.tensor(amax) / 448
        held = (x / scale).clamp(-448, 448).to(E4M3).float() * scale
        torch.testing.assert_close(y, held @ w.T, rtol=1e-5, atol=1e-5)
        now = state.histories["blocks.0"][0].clone()
        assert (
            now[0] == size and now[1] == layer.weight.detach().abs().max() and now[2] == 100 * size
        )
        state.step()
        assert torch.equal(state.histories["blocks.0"][1], now)
        assert torch.equal(state.histories["blocks.0"][2:], before[1:-1])
        assert not state.histories["blocks.0"][0].any()


@pytest.mark.gpu
def test_micro_batches_recomputation_and_evaluation_leave_the_scales_alone(device):
    layer, state = layer_state(device=device)
    history = state.histories["blocks.0"]
    history[1:] = 1.0
    big = torch.full((4, 20), 3.0, device=device)
    small = torch.randn(4, 20).clamp(-1, 1).to(device)
    alone = layer.matmul(small, layer.weight).detach()
    layer.matmul(big, layer.weight)
    # After a larger micro-batch of this step
    assert torch.equal(layer.matmul(small, layer.weight), alone)
    assert history[0, 0] == 3 and (history[1:] == 1).all()
    with torch.no_grad():
        layer.matmul(10 * big, layer.weight)
    assert history[0, 0] == 3
    state.step()
    assert not torch.equal(layer.matmul(small, layer.weight), alone)

    grads = []
    for again in (False, True):
        x = small.clone().requires_grad_()
        if again:
            y = checkpoint(lambda x: layer.matmul(x, layer.weight), x, use_reentrant=False)
        else:
            y = layer.matmul(x, layer.weight)
        grads.append([y, *torch.autograd.grad(y.square().sum(), [x, layer.weight])])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_zero_weight_and_a_first_step_have_the_tensors_own_scale():
    """With a scale of 1, gradients of 1e-6 would be 0 in e4m3, and a first nonzero weight too
    coarse."""
    layer, state = layer_state()
    layer.weight.data.zero_()
    for size in (0.0, 1e-6):
        layer.weight.data.fill_(size)
        x = torch.ones(3, 20, requires_grad=True)
        y = layer.matmul(x, layer.weight)
        y.backward(torch.full_like(y, 1e-6))
        state.step()
        assert y.detach().unique().item() == pytest.approx(20 * size, rel=1e-6)
        assert layer.weight.grad.unique().item() == pytest.approx(3e-6, rel=1e-6)
        layer.weight.grad = None


def small_gpt(seed=0, device=CPU, **options):
    torch.manual_seed(seed)
    model = init_weights(GPT(GPTConfig(**SHAPE))).to(device)
    return model, fp8.convert(model, device, **options)


def train(model, state, steps, first=0, recompute=False, lr=0.5):
    losses = []
    for step in range(first, first + steps):
        torch.manual_seed(step)
        tokens = (torch.randint(8, (8, 17)).cumsum(1) % 64).to(model.embed.weight.device)
        with torch.autocast(tokens.device.type, torch.bfloat16):
            call = (lambda *a: checkpoint(model, *a, use_reentrant=False)) if recompute else model
            loss = call(tokens[:, :-1], tokens[:, 1:]) / 128
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
                p.grad = None
        state.step()
        losses.append(loss.item())
    return losses


@pytest.mark.gpu
def test_a_delayed_run_goes_on_bitwise_from_its_tree(device, deterministic):
    options = dict(scaling="tensor", delayed=True, history=4, device=device)
    model, state = small_gpt(**options)
    train(model, state, 3)
    saved = {n: p.detach().clone() for n, p in model.named_parameters()}
    tree = state.state_dict()
    rest = train(model, state, 3, first=3)
    for cut in ({}, {"blocks.0.attn.q"}):
        again, fresh = small_gpt(**options)
        again.load_state_dict(saved)
        fresh.load_state_dict({n: h for n, h in tree.items() if n not in cut})
        assert (train(again, fresh, 3, first=3) == rest) == (not cut)
        same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
        assert same == (not cut)
    assert tree.keys() == {n for n, m in model.named_modules() if hasattr(m, "matmul")} - {"head"}
    assert len(tree) == 12 and all(h.shape == (4, 3) and h[:3].all() for h in tree.values())


def test_another_length_of_history_keeps_the_latest_steps_and_an_empty_tree_starts_anew():
    layer, state = layer_state(history=3)
    tree = {"blocks.0": torch.tensor([[3.0] * 3, [2.0] * 3, [1.0] * 3])}
    layer, shorter = layer_state(history=2)
    shorter.load_state_dict(tree)
    assert shorter.histories["blocks.0"][:, 0].tolist() == [0, 3, 2]
    _, longer = layer_state(history=4)
    longer.load_state_dict(tree)
    assert longer.histories["blocks.0"][:, 0].tolist() == [0, 3, 2, 1, 0]
    longer.histories["blocks.0"][0] = 9
    longer.load_state_dict({})
    assert not longer.histories["blocks.0"].any()
    pointer = shorter.histories["blocks.0"].data_ptr()
    shorter.load_state_dict(tree)
    assert shorter.histories["blocks.0"].data_ptr() == pointer  # the layers hold it


# ---- with the rest -------------------------------------------------------------------------------
def ranks_step(rank, world):
    _, state = layer_state(history=2)
    state.histories["blocks.0"][0] = (
        torch.tensor([1.0, 5.0, 3.0]) if rank else torch.tensor([4.0, 2.0, 3.0])
    )
    state.step(None, dist.group.WORLD)
    return state.state_dict()


def test_ranks_share_the_largest_amax():
    trees = run_ranks(2, ranks_step)
    for tree in trees:
        assert tree["blocks.0"].tolist() == [[4, 5, 3], [0, 0, 0]]


def layouts(rank, world):
    """Gradients of 128 tokens a rank: DDP, ZeRO-3, and on rank 0 one process with all tokens."""
    shape = SHAPE | dict(block_size=32)
    found = {}
    for name in ("ddp", "zero3", "alone"):
        group, rows = dist.group.WORLD, slice(4 * rank, 4 * rank + 4)
        if name == "alone":
            group, rows = None, slice(8)
        replicas = ZeRO(group, CPU, 3) if name == "zero3" else DDP(group, CPU)
        with torch.device("meta"):
            model = GPT(GPTConfig(**shape)).double()
        fp8.convert(model, CPU, scaling="block")
        model = replicas.parallelize(model)
        torch.manual_seed(0)
        replicas.init_weights(
            lambda n, size: torch.sin(torch.arange(math.prod(size)) * len(n)).view(size) / 4
        )
        tokens = torch.randint(64, (8, 33))
        replicas.last_micro_batch(True)
        model(tokens[rows, :-1], tokens[rows, 1:]).backward()
        replicas.finish_gradients()
        found[name] = placed(replicas, replicas.gradients())
    return found


def test_two_replicas_are_one_process_under_ddp_and_zero3():
    results = run_ranks(2, layouts)
    alone = joined([results[0]["alone"]])
    for parts in ([results[1]["ddp"]], [result["zero3"] for result in results]):
        merged = joined(parts)
        assert merged.keys() == alone.keys()
        for n, g in alone.items():
            torch.testing.assert_close(merged[n], g, rtol=1e-9, atol=1e-9 * g.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [dict(scaling="block"), dict(scaling="tensor", delayed=True)], ids=str
)
def test_recomputed_activations_give_the_same_bits(options, device, deterministic):
    runs = []
    for recompute in (False, True):
        model, state = small_gpt(device=device, **options)
        losses = train(model, state, 3, recompute=recompute)
        runs.append([losses, *[p.detach() for p in model.parameters()]])
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1:], runs[1][1:]))


@pytest.mark.gpu
def test_a_model_learns_in_fp8_as_it_does_in_bf16(device):
    plain = init_weights(GPT(GPTConfig(**SHAPE))).to(device)
    reference = train(plain, SimpleNamespace(step=lambda: None), 30)
    assert reference[-1] < 0.8 * reference[0]
    for options in (
        dict(scaling="block"),
        dict(scaling="tensor", delayed=True, gradient_format="e5m2"),
    ):
        losses = train(*small_gpt(device=device, **options), 30)
        assert losses != reference and losses[-1] == pytest.approx(reference[-1], rel=0.03)


def test_only_products_inside_blocks_are_replaced_and_options_are_checked():
    model, state = small_gpt(history=2)
    fresh = GPT(GPTConfig(**SHAPE))
    assert model.head.matmul is fresh.head.matmul is F.linear
    assert all(
        m.matmul.func is linear for n, m in model.blocks.named_modules() if hasattr(m, "matmul")
    )
    assert (
        state.state_dict() == {}
        and state.why_emulated.startswith("FP8 products")
        and state.step() is None
    )
    assert small_gpt(hardware="never")[1].why_emulated == "--fp8.hardware=never"
    other, _ = small_gpt(only=("blocks.1.", "head"))
    assert isinstance(other.head.matmul, type(model.blocks["0"].attn.q.matmul))
    assert other.blocks["0"].attn.q.matmul is F.linear
    for options, message in (
        ({"scaling": "blocks"}, "tensor, row, block"),
        ({"gradient_format": "e4m3fn"}, "e4m3, e5m2"),
        ({"hardware": "yes"}, "auto, always, never"),
        ({"hardware": "always"}, "leave --fp8.hardware=always out"),
        ({"delayed": True}, "--fp8.scaling=tensor"),
        ({"delayed": True, "scaling": "tensor", "history": 0}, "--fp8.history=16"),
        ({"forward": False, "input_gradient": False, "weight_gradient": False}, "--precision=bf16"),
    ):
        with pytest.raises(ValueError, match=message):
            small_gpt(**options)


def test_the_command_lines_options_fit_the_signature():
    def checked(**options):
        cfg = Config(precision="fp8", options={f"fp8.{k}": x for k, x in options.items()})
        return resolve_options(cfg, torch.optim.SGD)["fp8"]

    good = dict(scaling="row", delayed=True, weight_gradient=False, history=8, hardware="never")
    assert checked(**good) == good
    for bad in (dict(scalings="row"), dict(delayed=1), dict(history="long"), dict(only="head")):
        with pytest.raises(ValueError, match="--fp8"):
            checked(**bad)


def test_the_requirement_of_the_hardware_is_said_in_a_sentence(monkeypatch):
    cuda, version = torch.device("cuda"), "13.0"
    assert "NVIDIA GPU" in fp8.missing_hardware(CPU, "tensor", "e4m3", [])
    assert "Hopper" in fp8.missing_hardware(CPU, "block", "e4m3", [])
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for scaling in SCALINGS:
        assert fp8.missing_hardware(cuda, scaling, "e4m3", [(64, 128)]) is None
        assert "(64, 100)" in fp8.missing_hardware(cuda, scaling, "e4m3", [(64, 128), (64, 100)])
        said = fp8.missing_hardware(cuda, scaling, "e5m2", [(64, 128)])
        assert said is None if scaling != "block" else "e4m3 on both sides" in said
    for capability, version, can in (
        ((8, 0), "13.0", ()),
        ((8, 9), "13.0", ("tensor",)),
        ((10, 0), "13.0", ("tensor",)),
        ((9, 0), "12.8", ("tensor",)),
        ((9, 0), "12.9", SCALINGS),
    ):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, at=capability: at)
        assert (
            tuple(s for s in SCALINGS if fp8.missing_hardware(cuda, s, "e4m3", []) is None) == can
        )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torch.compile there wants a compiler")
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_has_no_graph_break_and_the_same_bits(delayed, backend):
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        layer, state = layer_state(history=3)
        if not delayed:
            layer.matmul, state.histories = fp8.partial(linear, recipe=recipe()), {}
        inner = lambda x: torch.relu(layer.matmul(x, layer.weight))  # noqa: E731
        function = torch.compile(inner, fullgraph=True, backend=backend) if compiled else inner
        found = []
        for i in range(3):
            x = torch.randn(5, 7, 20, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16):
                y = function(x)
            found += [y, *torch.autograd.grad(y.float().square().sum(), [x, layer.weight])]
            state.step()
        runs.append(found + list(state.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs)) and len(runs[0]) == 9 + delayed
