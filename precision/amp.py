"""Which numbers the run computes with.

    name     weights, grads  state    products  epsilon  largest
    fp64     float64         float64  float64   2.2e-16  1.8e308  the oracle
    fp32     float32         float32  float32   1.2e-07  3.4e38
    bf16     float32         float32  bfloat16  7.8e-03  3.4e38   autocast
    bf16_sr  bfloat16        float32  bfloat16  7.8e-03  3.4e38   rounded by chance: stochastic.py
    fp16     float32         float32  float16   9.8e-04  65504    autocast, scaling: loss_scale.py
    fp8      float32         float32  e4m3      1.2e-01  448      bf16 but for the blocks: fp8.py

bf16 keeps float32's exponent and so its range; what it gives up is precision, which sums, norms,
softmax, loss, weights and optimizer state therefore keep in float32 (Micikevicius et al. 2018,
1710.03740; Kalamkar et al. 2019, 1905.12322). Activations halve; weights and state do not.
"""

from contextlib import nullcontext

import torch

PARAM_DTYPE = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.float32,
    "fp16": torch.float32,
    "fp8": torch.float32,
    "bf16_sr": torch.bfloat16,
}


def choose(precision: str, device: torch.device) -> str:
    """`auto` resolved: bf16 where this device multiplies it faster than float32, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    return "bf16" if fast else "fp32"


def autocast(precision: str, device: torch.device):
    """The context for forward passes. Raises ValueError for fp64 where the device has none."""
    if precision == "fp64" and device.type == "mps":
        raise ValueError("this device has no float64; type --precision=fp32 or --device=cpu")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return nullcontext() if precision in ("fp64", "fp32") else torch.autocast(device.type, dtype)
