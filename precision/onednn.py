"""float32 matrix products on an AMD CPU by oneDNN, about twice as fast as torch's own choice.

torch multiplies float32 matrices on x86 by Intel's MKL, which gives AVX-512 kernels to Intel's own
processors alone. oneDNN, which the same torch contains for bfloat16, asks the processor what it can
do. All numbers stay float32; only the order of the sums differs, as between any two libraries.

    forward   y = x·Wᵀ + b          (M, K) (N, K) -> (M, N)
    backward  dx = dy·W    dW = dyᵀ·x    db = sum of dy's rows

GFLOP/s on two Zen 5 cores at M = 3072, K = 384, N = 1536: MKL 180 for each; oneDNN 410, 400, 270.

The operator is the one that torch's compiler emits for CPUs (`mkldnn::_linear_pointwise`). It has
no derivative, so the derivative is here.

Example:
    import torch
    import torch.nn.functional as F
    from precision.onednn import faster, linear
    x = torch.randn(64, 256, requires_grad=True)
    weight = torch.randn(128, 256)
    print("faster here:", faster(x.dtype, x.device))
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        linear = F.linear  # this build of torch lacks oneDNN
    y = linear(x, weight)
    y.sum().backward()
    assert torch.allclose(y, F.linear(x, weight), atol=1e-3)
    assert torch.allclose(x.grad, weight.sum(0).expand(64, 256), atol=1e-3)
"""

import platform
from pathlib import Path

import torch
from torch import Tensor


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors  # (..., K), (N, K); dy (..., N)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = dweight = dbias = None
        dy_rows = dy.flatten(0, -2)  # (M, N)
        # The operator transposes its second operand: hand it over transposed, to undo that.
        if needs_x:
            dx = matmul(dy, weight.t(), None)
        if needs_weight:
            dweight = matmul(dy_rows.t(), x.flatten(0, -2).t(), None)
        if needs_bias:
            dbias = dy_rows.sum(0)
        return dx, dweight, dbias


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·bᵀ + bias: (..., K), (N, K), (N,) -> (..., N)."""
    # "none", [], "": no activation is fused behind the product.
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for float32 CPU tensors: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    return Linear.apply(x, weight, bias)


def faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Does oneDNN multiply this dtype faster than torch's own choice on this device?

    It does for float32 on an AMD processor with AVX-512.
    """
    if dtype != torch.float32 or device.type != "cpu":
        return False
    # Some builds of torch lack oneDNN.
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    # Linux names the maker in a file, Windows by platform.processor().
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        maker = cpuinfo.read_text(encoding="utf-8")
    else:
        maker = platform.processor()
    return "AuthenticAMD" in maker and torch.backends.cpu.get_cpu_capability() == "AVX512"


if __name__ == "__main__":
    verb = "multiplies" if faster(torch.float32, torch.device("cpu")) else "does not multiply"
    print(f"oneDNN {verb} float32 matrices faster than torch's own choice on this CPU")
