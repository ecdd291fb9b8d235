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

import sys

import torch
from torch import nn

from metrics.devices import find


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

    device_name: as `torch.cuda.get_device_name()` says it (metrics/devices.py); precision: of the
    products, fp8, fp16, bf16, tf32 or fp32. A peak is never made up.
    """
    device = find(device_name)
    if device is None or precision not in device.peaks:
        return None
    return device.peaks[precision] * 1e12


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
