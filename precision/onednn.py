"""float32 matrix products on an AMD CPU by oneDNN, about twice as fast as torch's own choice.

torch multiplies float32 matrices on x86 by Intel's MKL, which gives processors of another maker no
AVX-512 kernels. oneDNN, which is in the same torch and does its bfloat16 products, asks the
processor what it can do. The numbers are float32 throughout; only the order of the sums differs, as
between any two libraries.

    forward   y = x·Wᵀ + b          (M, K) (N, K) -> (M, N)
    backward  dx = dy·W    dW = dyᵀ·x    db = sum of dy's rows

GFLOP/s on two Zen 5 cores at M = 3072, K = 384, N = 1536: MKL 180 for each; oneDNN 410, 400, 270.

The operator is the one that torch's compiler emits for CPUs (`mkldnn::_linear_pointwise`); it has
no derivative, so the derivative is here.
"""

import platform
from pathlib import Path

import torch
from torch import Tensor


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # (..., K), (N, K); dy (..., N)
        rows, needs = dy.flatten(0, -2), ctx.needs_input_grad
        dx = product(dy, weight.t(), None) if needs[0] else None
        dweight = product(rows.t(), x.flatten(0, -2).t(), None) if needs[1] else None
        return dx, dweight, rows.sum(0) if needs[2] else None


def product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a·bᵀ + bias: (..., K), (N, K), (N,) -> (..., N)."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for float32 CPU tensors: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    return Linear.apply(x, weight, bias)


def faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Is this where oneDNN's products of this dtype beat torch's own: float32 on an AMD processor
    with AVX-512?"""
    if (
        dtype != torch.float32
        or device.type != "cpu"
        or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    cpuinfo = Path("/proc/cpuinfo")  # Windows tells the maker by platform.processor()
    maker = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else platform.processor()
    return "AuthenticAMD" in maker and torch.backends.cpu.get_cpu_capability() == "AVX512"
