"""How a batch is divided: over replicas, and into micro-batches that fit the memory."""

import contextlib

import torch

from parallel.mesh import Mesh
from run import build
from settings.checks import divisor
from settings.fields import Config


def batch_share(cfg: Config, dp: int) -> int:
    """How many sequences of the smallest step one of dp replicas takes.

    Raises ValueError where the replicas cannot all take as many, or micro_batch_size does not
    divide their share.
    """
    micro = cfg.micro_batch_size
    # With a ramp the first step is the smallest; all later ones are multiples of it.
    name = "batch_size" if cfg.batch_ramp_from is None else "batch_ramp_from"
    batch = getattr(cfg, name)
    if batch % dp:
        fits = -(-batch // dp) * dp
        more = ""
        if name == "batch_ramp_from":
            # The ramp must end at a multiple of where it begins.
            end = -(-cfg.batch_size // fits) * fits
            if end != cfg.batch_size:
                more = f" --batch_size={end}"
        raise ValueError(
            f"{name}={batch} is not divisible by {dp} ranks; try --{name}={fits}{more}"
        )
    share = batch // dp
    if "micro_batch_size" in cfg.given and micro is not None and share % micro:
        raise ValueError(
            f"micro_batch_size={micro} does not divide the {share} sequences of each rank "
            f"({name}={batch} over {dp}); try --micro_batch_size={divisor(share, micro)}"
        )
    return share


def micro_batch_size(cfg: Config, micro_batches, dataset, mesh: Mesh) -> int:
    """Sequences per forward: the setting if it divides a rank's share, else the largest that fits.

    Raises ValueError where no size fits the memory or the pipeline's schedule.
    """
    share = batch_share(cfg, mesh.sizes["dp"])
    size = cfg.micro_batch_size
    divides = size is not None and share % size == 0
    if divides and "micro_batch_size" not in cfg.given:
        # Chosen by an earlier run, on another layout perhaps: a pipeline wants a multiple of pp.
        divides = share // size % cfg.pp == 0
    if not divides:
        # Uncompiled: each size tried would be a compilation of its own, and CUDA graphs would keep
        # the memory of those that failed. Compiled blocks mostly need less than these. But
        # FlexAttention keeps T x T scores where nothing is compiled.
        with contextlib.ExitStack() as stack:
            if cfg.attention != "flex":
                stack.enter_context(build.uncompiled(cfg))
            size = largest_micro_batch(micro_batches, dataset, share, mesh)
    if micro_batches.pipe is not None:
        # A schedule that is not possible with this number of micro-batches raises now.
        micro_batches.pipe.plan(share // size, True)
    return size


def split(samples, mesh: Mesh, size: int) -> list:
    """This replica's share of the batch's sample ids, in micro-batches."""
    share = len(samples) // mesh.sizes["dp"]
    first = mesh.coords["dp"] * share
    return [samples[i : i + size] for i in range(first, first + share, size)]


def largest_micro_batch(micro_batches, dataset, share: int, mesh: Mesh) -> int:
    """The largest micro-batch that fits: the full share on a CPU; halved on a GPU until it fits.

    All ranks halve it together, and try a forward and a backward each time. A pipeline of p stages
    gets a size that makes at least 4 p micro-batches, or else as many as possible.

    Where weights, gradients or experts are sharded, a rank that runs out of memory leaves the
    others in a collective. There the first such rank ends the run with a sentence. Raises
    ValueError.
    """
    model = micro_batches.model
    replicas = micro_batches.replicas
    if mesh.sizes["pp"] > 1:
        return share // count_for_pipeline(share, mesh.sizes["pp"])
    size = share
    sharded = mesh.sizes["tp"] * mesh.sizes["cp"] > 1 or replicas.backward_is_collective
    sharded = sharded or mesh.groups["ep"] is not None
    while mesh.device.type == "cuda":
        # Gradients that FSDP does not send would stay inside it.
        replicas.last_micro_batch(sharded)
        try:
            micro_batches.forward(range(size), dataset)[0].backward()
            fits = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
            if sharded:
                raise ValueError(
                    f"out of memory with {size} sequences at a time; type "
                    f"--micro_batch_size={max(1, size // 2)}, or less"
                ) from None
        if sharded:
            replicas.finish_gradients()

        # The trial leaves nothing behind; the next one begins with all of the memory.
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        n_out_of_memory = mesh.sum(not fits)[0]
        if n_out_of_memory == 0:
            break
        if size == 1:
            raise ValueError(
                "out of memory with one sequence at a time; --precision=bf16, a shorter "
                "--block_size or a smaller model need less"
            )
        # Only a divisor of the share makes micro-batches of one size.
        size = max(m for m in range(1, size // 2 + 1) if share % m == 0)
    # The run's peak is not that of a size that did not fit.
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(mesh.device)
    return size


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had too little memory; cuBLAS, which allocates by itself, says it so."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def count_for_pipeline(share: int, stages: int) -> int:
    """How many micro-batches a pipeline makes of its share: with 4 a stage the bubble is small."""
    counts = [n for n in range(stages, share + 1, stages) if share % n == 0]
    enough = [n for n in counts if n >= 4 * stages]
    if enough:
        return min(enough)
    return max(counts, default=share)
