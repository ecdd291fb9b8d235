"""A linear layer under autocast that keeps no copy of its weight.

                   forward                          kept until backward      backward
    F.linear       W16 = W.to(bfloat16), x W16ᵀ     x, W16                   dy W16
    linear         W16 = W.to(bfloat16), x W16ᵀ     x, W                     dy W.to(bfloat16)

Autocast keeps a cast copy of each weight until backward: half the weights' bytes, and freeing the
weight does not free that copy. This layer saves the weight itself, which ZeRO's stage 3
(parallel/zero.py) frees and fetches again. The price is a second cast: at width 768, with 4096
tokens, 0.2 ms beside products of 126 ms (one core of an AMD EPYC, bfloat16).

Example:
    import torch
    import torch.nn.functional as F
    from parallel.autocast_linear import linear

    x, weight = torch.randn(5, 8), torch.randn(3, 8, requires_grad=True)
    kept = []
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = linear(x, weight)
        assert torch.equal(y, F.linear(x, weight))
    print([tuple(t.shape) for t in kept], [t.dtype for t in kept])
    assert kept[1].data_ptr() == weight.data_ptr()  # the weight itself, and no copy
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(torch.autograd.Function):
    """x·Wᵀ + b in autocast's dtype. Autograd casts each gradient to the dtype of its tensor."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)  # (..., K)
        ctx.save_for_backward(x, weight)
        if bias is not None:
            bias = bias.to(dtype)
        return F.linear(x, weight.to(dtype), bias)  # (..., N)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # (..., K), (N, K)
        needs_dx, needs_dweight, needs_dbias, _ = ctx.needs_input_grad
        dx = dweight = dbias = None
        # The gradients of weight and bias are sums over all positions of all sequences.
        dy_rows = dy.reshape(-1, dy.shape[-1])  # (rows, N)
        if needs_dx:
            dx = dy @ weight.to(dy.dtype)
        if needs_dweight:
            dweight = dy_rows.t() @ x.reshape(-1, x.shape[-1])
        if needs_dbias:
            dbias = dy_rows.sum(0)
        return dx, dweight, dbias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    device = x.device.type
    # Without autocast nothing is cast, so there is no copy to avoid. Meta has none.
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return F.linear(x, weight, bias)
    # Autocast leaves float64 as it is.
    if torch.float64 in (x.dtype, weight.dtype):
        return F.linear(x, weight, bias)
    # Transforms of torch.func (grad, vmap, jvp) take no such Function as Linear. torch has no
    # public name for the question; torch.compile handles both.
    compiles = torch.compiler.is_compiling()
    if not compiles and torch._C._functorch.peek_interpreter_stack() is not None:
        return F.linear(x, weight, bias)
    return Linear.apply(x, weight, bias, torch.get_autocast_dtype(device))


def keep_no_copies(model: nn.Module) -> None:
    """Gives `linear` to each layer that has F.linear in its attribute `matmul`, as model.Linear."""
    for module in model.modules():
        if getattr(module, "matmul", None) is F.linear:
            module.matmul = linear


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
