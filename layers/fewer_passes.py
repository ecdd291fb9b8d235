"""RMSNorm, QK-norm with its rotation, squared ReLU, SwiGLU: backward written out, in few passes.

On a CPU what is between two matrix products takes as long as its memory takes to come and go, and
autograd reads and writes every step of a formula. Of the default job's forward and backward these
take an eighth off (experiments/results/bench_step.md).

    rms_norm        s = 1/sqrt(mean(x²) + eps)                y = x s
                    dx = s (dy - x (s²/C) (dy·x))             C channels
    norm_and_turn   n = q s;  y = turn(n g)                   turn: pairs by their angles, times f;
                    dm = f turn⁻¹(dy);  dg = Σ dm n           g: a gain of (D,), or none
                    dn = dm g;  dq = s (dn - n (dn·n)/D)
    relu_squared    r = max(h, 0);  y = r²                    backward needs r alone:
                    dh = 2 r dy                               0 where r is 0
    swiglu          y = silu(a) b = a σ(a) b                  backward needs a and b alone
                    db = silu(a) dy;  da = silu'(a) b dy      silu' = σ(a) (1 + a (1 - σ(a)))

Statistics are in at least float32, and a result is rounded once (in swiglu silu is rounded, too).
Where torch.compile or a transform of torch.func is at work, or on another device than a CPU, the
same formulas go to autograd, or to torch's kernels.

Their results are not kept either, by layers/recompute.py.

Neighbours: layers/recompute.py

Example:
    import torch
    import torch.nn.functional as F
    from layers.fewer_passes import rms_norm
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 8, dtype=torch.float64)
    (found,) = torch.autograd.grad((rms_norm(x, 1e-6) * weights).sum(), x)
    (plain,) = torch.autograd.grad((F.rms_norm(x, (8,), eps=1e-6) * weights).sum(), x)
    assert torch.allclose(found, plain)
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.recompute import is_transformed, recompute


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension, in x's dtype."""
    if by_autograd(x):
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return Normed.apply(x, eps)


class RMSNorm(nn.RMSNorm):
    """torch's module, by rms_norm() above."""

    def forward(self, x: Tensor) -> Tensor:  # (..., C)
        if by_autograd(x):
            return super().forward(x)
        y = rms_norm(x, self.eps)
        return y if self.weight is None else y * self.weight


def norm_and_turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    factor: float = 1.0,
    gain: Tensor | None = None,
) -> Tensor:
    """Heads x (..., H, D), normed, each pair (x[i], x[i + D/2]) turned by its angle, times factor.

    cos, sin: (..., 1, D/2); gain: (D,), what the normed heads are multiplied by before they turn.
    """

    def formula(x: Tensor) -> Tensor:
        y = F.rms_norm(x, x.shape[-1:], eps=eps)
        if gain is not None:
            y = (y * gain).to(x.dtype)
        y = turn(y, cos, sin)
        return y * factor if factor != 1 else y

    def written_out(x: Tensor) -> Tensor:
        if gain is None:
            return NormAndTurn.apply(x, cos, sin, eps, factor)
        return GainAndTurn.apply(x, gain, cos, sin, eps, factor)

    if by_autograd(x):
        return recompute(formula, x)
    return recompute(written_out, x, saves_little=True)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)². Backward computes it once more, from max(x, 0), which alone is kept."""
    if by_autograd(x):
        return recompute(lambda h: F.relu(h).square(), x)
    return recompute(Square.apply, ReLU.apply(x), saves_little=True)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up (Shazeer 2020, 2002.05202). Backward computes it once more, from these two."""
    if by_autograd(gate):
        return recompute(lambda a, b: F.silu(a) * b, gate, up)
    return recompute(SwiGLU.apply, gate, up, saves_little=True)


def turn_alone(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """turn(x, cos, sin), of which nothing is kept but cos and sin, the same for all layers."""
    if by_autograd(x):
        return turn(x, cos, sin)
    return Turn.apply(x, cos, sin)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x[i], x[i + D/2]) turned by its angle (Su et al. 2021, 2104.09864)."""
    # (a cos - b sin, b cos + a sin), in few operations on all of x.
    a, b = x.chunk(2, -1)
    swapped = torch.cat([b, a], -1)
    cos = torch.cat([cos, cos], -1).to(x.dtype)
    sin = torch.cat([-sin, sin], -1).to(x.dtype)
    return swapped.mul_(sin).addcmul_(x, cos)


def by_autograd(x: Tensor) -> bool:
    return x.device.type != "cpu" or is_transformed()


def refuse_second_derivative() -> None:
    """Called in backward, where gradients are recorded for create_graph=True alone."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "layers/fewer_passes.py: backward is written out once, and has no derivative; call "
            "backward without create_graph=True"
        )


# ---- as autograd sees them -----------------------------------------------------------------------
class Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, scale)
        return rounded_product(x, scale)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        x, scale = ctx.saved_tensors
        along = (dy * x).sum(-1, keepdim=True, dtype=scale.dtype)
        along.mul_(scale.square()).div_(-x.shape[-1])
        return rounded_product(torch.addcmul(dy, x, along.to(x.dtype)), scale), None


class NormAndTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, eps: float, factor: float) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, scale, cos, sin)
        ctx.factor = factor
        return turn(rounded_product(x, scale * factor), cos, sin)

    @staticmethod
    def backward(ctx, dy: Tensor):
        refuse_second_derivative()
        x, scale, cos, sin = ctx.saved_tensors
        dn = turn(dy, cos, -sin)
        n = rounded_product(x, scale)
        along = (dn * n).sum(-1, keepdim=True, dtype=scale.dtype).div_(-x.shape[-1])
        dx = torch.addcmul(dn, n, along.to(x.dtype))
        return rounded_product(dx, scale * ctx.factor), None, None, None, None


class GainAndTurn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, eps: float, factor: float
    ) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, gain, scale, cos, sin)
        ctx.factor = factor
        n = x.to(scale.dtype) * scale
        return turn(n.mul_(gain.to(scale.dtype) * factor).to(x.dtype), cos, sin)

    @staticmethod
    def backward(ctx, dy: Tensor):
        refuse_second_derivative()
        x, gain, scale, cos, sin = ctx.saved_tensors
        dm = turn(dy, cos, -sin).to(scale.dtype)
        n = x.to(scale.dtype) * scale
        dgain = None
        if ctx.needs_input_grad[1]:
            dgain = (dm * n).flatten(0, -2).sum(0).mul_(ctx.factor).to(gain.dtype)
        dn = dm.mul_(gain.to(scale.dtype) * ctx.factor)
        along = (dn * n).sum(-1, keepdim=True).div_(-x.shape[-1])
        dx = dn.addcmul_(n, along).mul_(scale).to(x.dtype)
        return dx, dgain, None, None, None, None


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        refuse_second_derivative()
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, F.silu(gate).mul_(dy)


class Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        cos, sin = ctx.saved_tensors
        # turn() the other way, in the order of autograd's roundings.
        a, b = dy.chunk(2, -1)
        swapped = torch.cat([b, a], -1)
        cos = torch.cat([cos, cos], -1).to(dy.dtype)
        sin = torch.cat([sin, -sin], -1).to(dy.dtype)
        return swapped.mul_(sin).add_(dy * cos), None, None


class ReLU(torch.autograd.Function):
    """For Square, whose gradient is 0 already where x is not above 0."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return F.relu(x)

    @staticmethod
    def backward(ctx, dr: Tensor) -> Tensor:
        return dr


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r: Tensor) -> Tensor:
        ctx.save_for_backward(r)
        return r.square()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        refuse_second_derivative()
        (r,) = ctx.saved_tensors
        # 0 + 2 r dy: one pass, where (2 r) dy would be two.
        return torch.addcmul(r.new_zeros(()), r, dy, value=2)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1/sqrt(mean(x²) + eps) (..., 1), in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rounded_product(x: Tensor, scale: Tensor) -> Tensor:
    """x times scale (..., 1), rounded to x's dtype once, though scale may be wider."""
    if x.dtype == scale.dtype:
        return x * scale
    # Faster on a CPU than a product of two dtypes.
    return x.to(scale.dtype).mul_(scale).to(x.dtype)


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
