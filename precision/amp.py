"""The dtypes a run computes with: a table of the values that --precision= takes.

    name     weights, grads  state    products  epsilon  largest
    fp64     float64         float64  float64   2.2e-16  1.8e308  the oracle
    fp32     float32         float32  float32   1.2e-07  3.4e38
    bf16     float32         float32  bfloat16  7.8e-03  3.4e38   autocast
    bf16_sr  bfloat16        float32  bfloat16  7.8e-03  3.4e38   rounded by chance: stochastic.py
    fp16     float32         float32  float16   9.8e-04  65504    autocast, scaling: loss_scale.py
    fp8      float32         float32  e4m3      1.2e-01  448      bf16 but for the blocks: fp8.py

bf16 keeps float32's exponent and so its range. It gives up precision, which sums, norms, softmax,
loss, weights and optimizer state therefore keep in float32 (Micikevicius et al. 2018, 1710.03740;
Kalamkar et al. 2019, 1905.12322). Activations halve; weights and state do not.

On a GPU fp32 is fp32: torch's products use TF32 only where a program asks for it (since 1.12).
bf16 products may sum in bf16 where cuBLAS splits a long sum: torch's default,
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction.

Example:
    import torch
    from precision.amp import autocast
    layer = torch.nn.Linear(8, 8)
    with autocast("bf16", torch.device("cpu")):
        y = layer(torch.randn(2, 8))
    assert y.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    weights: torch.dtype  # and gradients
    autocast: torch.dtype | None  # to what autocast casts a product's operands; None: no autocast
    peak: str  # its column among the peaks in metrics/devices.py
    loss_scaling: bool = False  # by precision/loss_scale.py
    fp8_blocks: bool = False  # the blocks multiply in FP8, by precision/fp8.py
    stochastic: bool = False  # weights are rounded by chance, precision/stochastic.py

    @property
    def products(self) -> torch.dtype:
        """The dtype of a product's operands."""
        return self.autocast or self.weights

    @property
    def state(self) -> torch.dtype:
        """The dtype of the optimizer's state, which is never below float32."""
        return torch.promote_types(self.weights, torch.float32)


# Everything that depends on a precision reads it here. `--precision=` lists the same names in
# settings/fields.py, which imports no torch.
PRECISIONS = {
    "fp64": Precision(torch.float64, None, "fp64"),
    "fp32": Precision(torch.float32, None, "fp32"),
    "bf16": Precision(torch.float32, torch.bfloat16, "bf16"),
    "fp16": Precision(torch.float32, torch.float16, "fp16", loss_scaling=True),
    "fp8": Precision(torch.float32, torch.bfloat16, "fp8", fp8_blocks=True),
    "bf16_sr": Precision(torch.bfloat16, torch.bfloat16, "bf16", stochastic=True),
}


def choose(precision: str, device: torch.device) -> str:
    """`auto` resolved: bf16 where this device multiplies it faster than float32, else fp32."""
    if precision != "auto":
        return precision
    # A device without bf16 units emulates it, more slowly than it computes float32.
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    return "bf16" if fast else "fp32"


def autocast(precision: str, device: torch.device):
    """The context for forward passes. Raises ValueError for fp64 where the device has none."""
    row = PRECISIONS[precision]
    if row.weights == torch.float64 and device.type == "mps":
        raise ValueError("this device has no float64; type --precision=fp32 or --device=cpu")
    # fp64 and fp32 multiply in the weights' own dtype.
    if row.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, row.autocast)


if __name__ == "__main__":
    for name, row in PRECISIONS.items():
        print(f"{name:7}  weights {row.weights}, state {row.state}, products {row.products}")
    print(f"--precision=auto is {choose('auto', torch.device('cpu'))} on this CPU")
