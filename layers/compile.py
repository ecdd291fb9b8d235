"""torch.compile, one block at a time: fused kernels for what is between the matrix products.

Each block is compiled by itself, as all of them are the same code: one compilation serves every
layer, and what happens between blocks (FSDP's and ZeRO's gathering, a pipeline's messages) stays
outside. Order: tensor parallelism, precision and activation checkpointing first, data parallelism
last.

    mode              what it does                                      costs
    default           fuses elementwise work, norms and softmax         10 to 60 s at the first step
    reduce-overhead   and replays launches as CUDA graphs               memory for the graphs
    max-autotune      and tries several kernels for each product        minutes at the first step

A new shape would compile anew, so training keeps one shape; evaluation compiles once more, and
generation runs uncompiled. Reference: Ansel et al. 2024, PyTorch 2 (ASPLOS).
"""

import importlib.util
import os
import shutil

import torch


def lacking(device: torch.device) -> str | None:
    """What this machine lacks to compile for the device, in a sentence; None if nothing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is missing; pip install triton"
    if device.type != "cuda" and not any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))
    ):
        return "a C++ compiler is missing, such as g++"
    return None


def compile_blocks(
    model: torch.nn.Module,
    mode: str,
    dynamic: bool = False,
    verbose: bool = False,
    backend: str = "inductor",
) -> None:
    """Compiles `forward` of each of model.blocks at its first call. mode: see above. dynamic: one
    compilation for all shapes; verbose: prints each graph break and recompilation with its reason;
    backend: another one to find faults, such as aot_eager. Raises ValueError for a backend that
    torch does not know."""
    import torch._dynamo  # a second, which runs that compile nothing save

    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"--compile.backend={backend} is none of {', '.join(known)}")
    if verbose:
        torch._logging.set_logs(graph_breaks=True, recompiles=True)
    # Layers differ in the key of their dropout masks: with dropout each is compiled by itself.
    limit = 8 + 4 * len(model.blocks)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    options = dict(mode=mode) if backend == "inductor" and mode != "default" else {}
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward, dynamic=dynamic, backend=backend, **options)
