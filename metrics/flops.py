"""How well the hardware is used: FLOPs per token, model FLOPs utilisation (MFU), peak memory.

    FLOPs per token = 6 N + 12 L C T                                  (forward and backward)
    MFU             = tokens per second per device * FLOPs per token / peak FLOP/s of the device

    N  n_params_matmul    entries of the weight matrices a token is multiplied with: 2 N forward,
                          4 N backward; of experts those that one token goes through
    L  n_layer            attention layers
    C  n_embd_attention   query heads * head size (H * Q in the paper)
    T  block_size         tokens a query may see

This is the convention of PaLM, appendix B (Chowdhery et al. 2022, arXiv 2204.02311). It makes three
choices:
  - Causal attention is not halved: every query counts all T keys. A kernel that skips the masked
    half does less work than this; texts that halve (6 L C T) report a lower MFU for the same speed.
  - N holds the output head once, tied or not, and never the embedding: a lookup multiplies nothing.
    Counting all parameters, as is often done, is nearly right only when the head is tied.
  - Recomputation (activation checkpointing) is not useful work and does not count; hence MFU, not
    HFU.
"""

import re
import sys

import torch
from torch import nn

# Dense peaks in TFLOP/s per device from NVIDIA's data sheets (half of the figures "with sparsity");
# GeForce: from the white papers of the architectures. Products accumulate in fp32, as training
# needs; on GeForce that is half of the advertised rate. fp32 is without tensor cores, tf32 what
# fp32 becomes where torch may use it.
PEAK_FLOPS = {
    "V100-SXM2": {"fp16": 125, "fp32": 15.7},
    "V100-PCIE": {"fp16": 112, "fp32": 14},
    "V100S-PCIE": {"fp16": 130, "fp32": 16.4},
    "T4": {"fp16": 65, "fp32": 8.1},
    "A10": {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2},
    "A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "L4": {"bf16": 121, "fp16": 121, "fp8": 242.5, "tf32": 60, "fp32": 30.3},
    "L40S": {"bf16": 362, "fp16": 362, "fp8": 733, "tf32": 183, "fp32": 91.6},
    "RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
    "RTX 4090": {"bf16": 165.2, "fp16": 165.2, "fp8": 330.3, "tf32": 82.6, "fp32": 82.6},
    "RTX 5090": {"bf16": 209.5, "fp16": 209.5, "fp8": 419, "tf32": 104.8, "fp32": 104.8},
    # H100 without PCIe or NVL in its name is the SXM card.
    "H100 HBM3": {"bf16": 989.5, "fp16": 989.5, "fp8": 1979, "tf32": 494.5, "fp32": 67},
    "H100 SXM5": {"bf16": 989.5, "fp16": 989.5, "fp8": 1979, "tf32": 494.5, "fp32": 67},
    "H100 PCIe": {"bf16": 756.5, "fp16": 756.5, "fp8": 1513, "tf32": 378, "fp32": 51},
    "H100 NVL": {"bf16": 835.5, "fp16": 835.5, "fp8": 1670.5, "tf32": 417.5, "fp32": 60},
    "H200": {"bf16": 989.5, "fp16": 989.5, "fp8": 1979, "tf32": 494.5, "fp32": 67},
    "H200 NVL": {"bf16": 835.5, "fp16": 835.5, "fp8": 1670.5, "tf32": 417.5, "fp32": 60},
    "B200": {"bf16": 2250, "fp16": 2250, "fp8": 4500, "tf32": 1100, "fp32": 75},
    # GB200: for each of its two GPUs.
    "GB200": {"bf16": 2500, "fp16": 2500, "fp8": 5000, "tf32": 1250, "fp32": 80},
}
# Beside a listed name these words mean another chip, or a part of one.
OTHER_CHIP = {"laptop", "mig", "max", "super", "ti", "d"}


def matmul_params(model: nn.Module) -> int:
    """N above: entries of the weights of all nn.Linear modules; no biases, no embedding.

    A tied head is a Linear with the embedding's weight, so it counts. model: all of it, before it
    is split over ranks.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel()
        if hasattr(module, "n_active"):  # experts (layers/moe.py), all of one size
            one = matmul_params(module.experts["0"])
            total -= (len(module.experts) - module.n_active) * one
    return total


def active_params(model: nn.Module) -> int:
    """Parameters that one token goes through: all but those of the experts it does not choose.

    model: all of it, before it is split over ranks.
    """
    total = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if hasattr(module, "n_active"):
            one = sum(p.numel() for p in module.experts["0"].parameters())
            total -= (len(module.experts) - module.n_active) * one
    return total


def flops_per_token(
    n_params_matmul: int, n_layer: int, n_embd_attention: int, block_size: int
) -> float:
    """Matmul FLOPs of forward and backward for one token, see above; a multiply-add is two."""
    return 6.0 * n_params_matmul + 12.0 * n_layer * n_embd_attention * block_size


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s; None for a device that the table does not know.

    device_name: as `torch.cuda.get_device_name()` says it; precision: of the products, fp8, fp16,
    bf16, tf32 or fp32. A peak is never made up. Names match by whole words and the longest match
    wins: "NVIDIA H100 PCIe" is not taken for the SXM card, "GH200" not for an H200, "L40" not for
    an L4. A laptop's RTX 4090 and a MIG slice are unknown.
    """
    words = set(re.findall(r"\w+", device_name.lower()))
    known = [name for name in PEAK_FLOPS if words.issuperset(re.findall(r"\w+", name.lower()))]
    if not known or words & OTHER_CHIP:
        return None
    peaks = PEAK_FLOPS[max(known, key=len)]
    return peaks[precision] * 1e12 if precision in peaks else None


def mfu(tokens_per_s_per_device: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation, a fraction; peak: in FLOP/s of one device, or None: unknown."""
    return None if peak is None else tokens_per_s_per_device * flops_per_token / peak


def peak_bytes(device: torch.device | str) -> int | None:
    """Most memory this process has held so far, in bytes; None where nobody knows (Windows).

    CUDA: given out by torch's allocator on the device. Elsewhere: the resident set of the whole
    process, interpreter included. Trap: on Linux a child inherits its parent's peak, so a rank
    reports at least the peak of the process that started it.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    # In KiB on Linux, in bytes on a Mac.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
