"""torch.compile, one block at a time: fused kernels for what is between the matrix products.

All blocks are the same code, so one compilation serves every layer. What happens between blocks
(FSDP's and ZeRO's gathering, a pipeline's messages) stays outside of what is compiled. Tensor
parallelism, precision and activation checkpointing change blocks, so they come first; data
parallelism comes last.

    mode              what it does                                      costs
    default           fuses elementwise work, norms and softmax         10 to 60 s at the first step
    reduce-overhead   and replays launches as CUDA graphs               memory for the graphs
    max-autotune      and tries several kernels for each product        minutes at the first step

CUDA graphs (reduce-overhead, max-autotune) replay into the same memory, and torch guesses when that
memory is free again. With a block for a graph it guesses wrong twice (read in cudagraph_trees.py of
torch 2.13, not run on a GPU yet):

    it takes a call without a pending backward for a new step, so in an evaluation block 1 would
        overwrite its own input, block 0's output (pytorch issue 152887): whoever calls the model
        says where a step begins, by torch.compiler.cudagraph_mark_step_begin(), and then nothing
        else is taken for a beginning; a pipeline's micro-batches are one step
    autograd makes the gradient of a first micro-batch p.grad itself, in the graph's memory, which
        the next micro-batch overwrites (issue 169545; before torch 2.13 in silence, issue 96693):
        own_gradients() has it copied out, a read and a write of the gradients a micro-batch

What the host reads (.item() of loss and norm), clipping, the optimizer and the monitor come after
the last replay of a step, and are in no graph. Weights must stay where they are: a graph is
recorded anew for each new address, so ZeRO-3 and FSDP, which gather weights, gain nothing.

A new shape is a new compilation. So training keeps one shape, evaluation compiles once more, and
generation runs uncompiled. Reference: Ansel et al. 2024, PyTorch 2 (ASPLOS).

Example:
    import torch
    from torch import nn
    from layers.compile import compile_blocks
    model = nn.Module()
    model.blocks = nn.ModuleDict({str(i): nn.Linear(8, 8) for i in range(2)})
    x = torch.randn(4, 8)
    before = model.blocks["1"](model.blocks["0"](x))
    compile_blocks(model, "default", backend="eager")  # without backend=: kernels, in seconds
    after = model.blocks["1"](model.blocks["0"](x))
    assert torch.allclose(before, after)
"""

import importlib.util
import os
import shutil
import sys

import torch


def lacking(device: torch.device) -> str | None:
    """What this machine lacks to compile for the device, in a sentence; None if nothing."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton is missing; pip install triton"
        return None
    # What torch runs: CXX where it is set, else this.
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX", default)
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler} is missing; install it, or name another one in CXX"
    return None


def compile_blocks(
    model: torch.nn.Module,
    mode: str,
    dynamic: bool = False,
    verbose: bool = False,
    backend: str = "inductor",
) -> None:
    """Compiles `forward` of each of model.blocks at its first call.

    mode: see above
    dynamic: one compilation for all shapes
    verbose: prints each graph break and each recompilation with its reason
    backend: another one to find faults, such as aot_eager; ValueError if torch does not know it
    """
    # The import takes seconds, so only a run that compiles pays for it.
    import torch._dynamo

    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"--compile.backend={backend} is none of {', '.join(known)}")
    if verbose:
        torch._logging.set_logs(graph_breaks=True, recompiles=True)

    # With dropout each layer is a compilation of its own, for layers differ in the key of their
    # masks. Beyond its limit dynamo would run the other layers uncompiled.
    limit = 8 + 4 * len(model.blocks)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    options = dict(mode=mode) if backend == "inductor" and mode != "default" else {}
    # On a GPU. On a CPU these modes replay nothing, and what is done for them does no harm.
    model.has_cuda_graphs = options != {}
    for block in model.blocks.values():
        # Experts leave the compiled block: whose each row is, is known when it runs.
        for module in block.modules():
            if hasattr(module, "experts"):
                module.forward = torch.compiler.disable(module.forward)
        block.forward = torch.compile(block.forward, dynamic=dynamic, backend=backend, **options)


def own_gradients(model: torch.nn.Module) -> None:
    """From now on gradients of the blocks' weights reach p.grad as copies, in memory of their own.

    Call it after whatever replaces parameters, such as data parallelism.
    """
    for p in model.blocks.parameters():
        if p.requires_grad:
            p.register_hook(torch.clone)


if __name__ == "__main__":
    why_not = lacking(torch.device("cpu"))
    print(why_not or "nothing is missing to compile: python train.py --compile=default")
