"""What layers/fewer_passes.py writes out by hand, beside autograd and in half precision."""

import functools

import pytest
import torch
import torch.nn.functional as F

from layers.fewer_passes import (
    RMSNorm,
    norm_and_turn,
    relu_squared,
    rms_norm,
    swiglu,
    turn,
    turn_alone,
)
from layers.recompute import forget_results
from model import rotary_angles

SHAPES = [(3, 5, 2, 8), (4, 8)]


def drawn(*shape, dtype=torch.float64) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


GAIN = torch.linspace(0.5, 2, 8, dtype=torch.float64)
NAMES = ["rms_norm", "norm_and_turn", "gain_and_turn", "turn_alone", "relu_squared", "swiglu"]


def turned(x, cos, sin, factor, gain=None, eps=1e-6):
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    n = x if eps is None else F.rms_norm(x, x.shape[-1:], eps=eps)
    if gain is not None:
        n = n * gain.to(x.dtype)
    a, b = n.chunk(2, -1)
    return factor * torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def pairs(shape) -> dict:
    """name -> (ours, the formula for autograd), functions of x."""
    cos, sin = (x[: shape[-3]] for x in rotary_angles(torch.arange(5), 8, torch.float64))
    ours = functools.partial(norm_and_turn, cos=cos, sin=sin, factor=0.3)
    angles = dict(cos=cos, sin=sin)
    found = {
        "gain_and_turn": (
            functools.partial(ours, gain=GAIN, eps=1e-2),
            functools.partial(turned, **angles, factor=0.3, gain=GAIN, eps=1e-2),
        ),
        "turn_alone": (
            functools.partial(turn_alone, **angles),
            functools.partial(turned, **angles, factor=1, eps=None),
        ),
        # Of x twice, so that both gradients are seen.
        "swiglu": (
            lambda x: swiglu(x, x.flip(-1) * 3),
            lambda x: F.silu(x) * (x.flip(-1) * 3),
        ),
        "rms_norm": (rms_norm, lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6)),
        "norm_and_turn": (ours, functools.partial(turned, cos=cos, sin=sin, factor=0.3)),
        "relu_squared": (relu_squared, lambda x: F.relu(x).square()),
    }
    return found


@pytest.mark.parametrize("kept", [True, False], ids=["alone", "recomputed"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 1, 0, 3), (0, 1, 3, 2)], ids=str)
def test_values_and_gradients_are_those_of_the_formula(name, order, kept):
    ours, formula = pairs((3, 5, 2, 8))[name]
    x = drawn(3, 5, 2, 8)
    if order == (0, 1, 3, 2):
        x = drawn(3, 5, 8, 2)
    elif order == (2, 1, 0, 3):
        x = drawn(2, 5, 3, 8)
    view = x.permute(order)  # not contiguous
    weights = drawn(8, 8).detach()
    results = []
    for function in (ours, formula):
        if kept:
            y = function(view) @ weights
        else:
            with forget_results():
                y = function(view) @ weights
        (gradient,) = torch.autograd.grad((y.sin() * 3).sum(), x)
        results.append((y, gradient))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_nearly_as_near_to_the_truth_as_autograd(name, dtype):
    ours, plain = pairs((3, 5, 2, 8))[name]
    x = drawn(64, 5, 2, 8)
    half = x.detach().to(dtype).requires_grad_()

    def both(function, x):
        y = function(x)
        dy = drawn(*y.shape).detach().to(y.dtype)
        return y, *torch.autograd.grad((y * dy).sum(), x)

    truth = both(plain, half.detach().double().requires_grad_())
    for found, usual, expected in zip(both(ours, half), both(plain, half), truth):
        assert found.dtype == dtype
        off = (found.double() - expected).square().mean().sqrt()
        usual = (usual.double() - expected).square().mean().sqrt()
        assert off < 1.5 * usual


def test_statistics_of_half_precision_are_in_float32():
    x = torch.full((2, 4096), 300.0, dtype=torch.float16)  # squares beyond float16
    assert torch.equal(rms_norm(x), torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_gradients_of_half_precision_stay_finite(dtype):
    x = torch.full((2, 64), 1000.0, dtype=dtype, requires_grad=True)
    dy = torch.linspace(-300, 300, 64).to(dtype).expand(2, 64)
    cos, sin = rotary_angles(torch.zeros(2), 64, torch.float32)
    for y in (rms_norm(x), norm_and_turn(x.unsqueeze(1), cos, sin).squeeze(1)):
        (dx,) = torch.autograd.grad(y, x, dy)
        wide = x.detach().double().requires_grad_()
        (want,) = torch.autograd.grad(rms_norm(wide), wide, dy.double())
        torch.testing.assert_close(dx.double(), want, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("shape, options", [((8,), {}), ((4, 8), {"eps": 1e-6})])
def test_the_module_is_torchs_in_all_its_forms(shape, options):
    x = torch.randn(3, 4, 8)
    for dtype in (torch.float32, torch.bfloat16):
        found = RMSNorm(shape, **options)(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found, torch.nn.RMSNorm(shape, **options)(x.to(dtype)))
    gain = RMSNorm(8, 1e-6)
    assert gain(x.bfloat16()).dtype == torch.bfloat16  # its gain is float32


def test_zeros_have_no_direction_and_finite_gradients():
    x = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    for function in (rms_norm, relu_squared):
        y = function(x)
        assert torch.equal(y, torch.zeros_like(x))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gain_of_heads_has_its_gradient_in_its_own_dtype(dtype):
    x = drawn(3, 5, 2, 8, dtype=dtype)
    gain = GAIN.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    cos, sin = rotary_angles(torch.arange(5), 8, gain.dtype)
    dy = drawn(3, 5, 2, 8, dtype=dtype).detach().flip(0)
    (found,) = torch.autograd.grad(norm_and_turn(x, cos, sin, 1e-6, 0.3, gain), gain, dy)
    y = turned(x.double(), cos.double(), sin.double(), 0.3, gain.double())
    (plain,) = torch.autograd.grad(y, gain, dy.double())
    assert found.dtype == gain.dtype
    accuracy = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, plain, rtol=accuracy, atol=accuracy)


def test_a_turn_alone_has_the_bits_of_autograd():
    x = drawn(3, 5, 2, 8, dtype=torch.float32)
    cos, sin = rotary_angles(torch.arange(5), 8, torch.float32)
    dy = drawn(3, 5, 2, 8, dtype=torch.float32).detach().flip(0)
    found = [torch.autograd.grad(f(x, cos, sin), x, dy)[0] for f in (turn_alone, turn)]
    assert torch.equal(*found)


def test_a_gain_and_its_gradient():
    norm = RMSNorm(8, 1e-6).double()
    norm.weight.data = drawn(8).detach()
    x = drawn(5, 8)
    found = torch.autograd.grad(norm(x).sin().sum(), [x, norm.weight])
    y = F.rms_norm(x, (8,), norm.weight, 1e-6)
    for ours, plain in zip(found, torch.autograd.grad(y.sin().sum(), [x, norm.weight])):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-13)
    assert norm.state_dict().keys() == torch.nn.RMSNorm(8, 1e-6).state_dict().keys()


@pytest.mark.parametrize("name", NAMES)
def test_transforms_get_the_formula(name):
    function = pairs((2, 3, 2, 8))[name][0]
    x = drawn(2, 3, 2, 8).detach()
    with torch.autograd.forward_ad.dual_level():
        y = function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    _, expected = torch.func.jvp(function, (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, expected)
    ours, formula = pairs((3, 5, 2, 8))[name]
    x = drawn(3, 5, 2, 8).detach()
    found, expected = (torch.func.grad(lambda x: f(x).sin().sum())(x) for f in (ours, formula))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused(name):
    x = drawn(3, 5, 2, 8)
    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.autograd.grad(pairs(x.shape)[name][0](x).sum(), x, create_graph=True)


def test_what_is_kept():
    """Not the results, and nothing but x, r and numbers for each row."""
    x = drawn(16, 64)
    weights = drawn(64, 4).detach()

    def gated(x):
        return swiglu(x, x.flip(-1))

    for function, most in (
        (rms_norm, 16 * 64 + 16),
        (relu_squared, 16 * 64),
        (gated, 2 * 16 * 64),
    ):
        storages = {}

        def pack(x):
            storages[x.untyped_storage()._cdata] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), forget_results():
            y = function(x) @ weights
        assert y.requires_grad
        numbers = sum(t.untyped_storage().nbytes() // 8 for t in storages.values())
        assert numbers == most + weights.numel()


def test_a_turn_is_undone_by_the_turn_back():
    x = drawn(3, 5, 2, 8).detach()
    cos, sin = rotary_angles(torch.arange(5), 8, torch.float64)
    torch.testing.assert_close(turn(turn(x, cos, sin), cos, -sin), x, rtol=1e-12, atol=1e-13)
