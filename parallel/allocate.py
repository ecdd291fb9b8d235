"""Memory for parameters on the meta device: on a device, or in files."""

import os
import shutil
from pathlib import Path

import torch
from torch import nn


def allocate(module: nn.Module, device: torch.device, keep=lambda p: True) -> nn.Module:
    """Real, uninitialised memory for every parameter on the meta device for which `keep` holds.

    Unlike `Module.to_empty`, a tied parameter stays one parameter.
    """
    made = {}
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False, remove_duplicate=False):
            if p.is_meta and keep(p):
                if p not in made:
                    # _like imports a compiler
                    empty = torch.empty(p.shape, dtype=p.dtype, device=device)
                    made[p] = nn.Parameter(empty, p.requires_grad)
                setattr(part, name, made[p])
    return module


def mapped_file(path: Path, numbers: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor whose memory is the file `path`. Its room on the disk is taken now: where there
    is none, OSError, not a bus error in the middle of a step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = numbers * dtype.itemsize
    try:
        with open(path, "wb") as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            f"{path.parent} has no room for offloaded weights: one more file needs {size:,} bytes, "
            f"{shutil.disk_usage(path.parent).free:,} are free ({error.strerror})"
        ) from error
    return torch.from_file(str(path), shared=True, size=numbers, dtype=dtype)
