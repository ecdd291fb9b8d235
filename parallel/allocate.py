"""Memory for parameters on the meta device: on a device, or in files."""

import os
import shutil
from pathlib import Path

import torch
from torch import nn


def allocate(module: nn.Module, device: torch.device, keep=lambda p: True) -> nn.Module:
    """Gives uninitialised memory to the parameters on the meta device, in place.

    keep: which of them get memory, default all. Unlike with `Module.to_empty`, a tied parameter
    stays one parameter.
    """
    real = {}  # meta parameter -> the allocated one
    for submodule in module.modules():
        for name, p in submodule.named_parameters(recurse=False, remove_duplicate=False):
            if p.is_meta and keep(p):
                if p not in real:
                    # Not empty_like: on a meta tensor it imports a compiler, which takes a second.
                    empty = torch.empty(p.shape, dtype=p.dtype, device=device)
                    real[p] = nn.Parameter(empty, p.requires_grad)
                setattr(submodule, name, real[p])
    return module


def mapped_file(path: Path, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor (numel,) whose memory is the file `path`.

    Raises OSError if the disk has no room for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = numel * dtype.itemsize
    try:
        with open(path, "wb") as file:
            # Take the room now: later a full disk is a bus error in the middle of a step.
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            f"{path.parent} has no room for offloaded weights: one more file needs {size:,} bytes, "
            f"{shutil.disk_usage(path.parent).free:,} are free ({error.strerror})"
        ) from error
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)
