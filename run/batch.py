"""How a batch is divided: over replicas, and into micro-batches that fit the memory."""

import torch

from parallel.mesh import Mesh
from settings.checks import divisor
from settings.fields import Config


def batch_share(cfg: Config, dp: int) -> int:
    """Sequences of the smallest step on one of dp replicas. Raises ValueError where parts are not
    even."""
    micro = cfg.micro_batch_size
    name = "batch_size" if cfg.batch_ramp_from is None else "batch_ramp_from"
    batch = getattr(cfg, name)
    if batch % dp:
        fits = -(-batch // dp) * dp
        ends = -(-cfg.batch_size // fits) * fits  # where a ramp ends must be a multiple of it, too
        more = f" --batch_size={ends}" if name != "batch_size" and ends != cfg.batch_size else ""
        raise ValueError(f"{name}={batch} does not divide by {dp} ranks; try --{name}={fits}{more}")
    share = batch // dp
    if "micro_batch_size" in cfg.given and micro is not None and share % micro:
        raise ValueError(
            f"micro_batch_size={micro} does not divide the {share} sequences of each rank "
            f"({name}={batch} over {dp}); try --micro_batch_size={divisor(share, micro)}"
        )
    return share


def micro_batch_size(cfg: Config, micro_batches, dataset, mesh: Mesh) -> int:
    """What the settings say, if that divides each rank's share of the batch; else the largest that
    fits. Raises ValueError."""
    share = batch_share(cfg, mesh.sizes["dp"])
    size = cfg.micro_batch_size
    divides = size is not None and share % size == 0
    if divides and "micro_batch_size" not in cfg.given:
        # Chosen by an earlier run, on another layout perhaps: a pipeline wants a multiple of pp.
        divides = share // size % cfg.pp == 0
    if not divides:
        size = largest_micro_batch(micro_batches, dataset, share, mesh)
    if micro_batches.pipe is not None:
        micro_batches.pipe.plan(share // size, True)  # a schedule that cannot be raises now
    return size


def split(samples, mesh: Mesh, size: int) -> list:
    """This replica's share of the batch's sample ids, in micro-batches."""
    share = len(samples) // mesh.sizes["dp"]
    first = mesh.coords["dp"] * share
    return [samples[i : i + size] for i in range(first, first + share, size)]


def largest_micro_batch(micro_batches, dataset, share: int, mesh: Mesh) -> int:
    """The full share on a CPU; on a GPU halved, by all ranks together, until forward and backward
    fit. In a pipeline of p stages a size that gives 4 p micro-batches, or more, or as many as there
    can be.

    Where weights or gradients are sharded, ranks that run out of memory leave the others in a
    collective, so there the first one that does ends the run with what to type. Raises ValueError.
    """
    model, replicas = micro_batches.model, micro_batches.replicas
    if (pp := mesh.sizes["pp"]) > 1:
        counts = [n for n in range(pp, share + 1, pp) if share % n == 0]  # of micro-batches
        return share // min((n for n in counts if n >= 4 * pp), default=max(counts, default=share))
    size = share
    spread = mesh.sizes["tp"] * mesh.sizes["cp"] > 1 or replicas.backward_is_collective
    while mesh.device.type == "cuda":
        replicas.last_micro_batch(spread)  # what is not sent would stay inside FSDP
        try:
            micro_batches.forward(range(size), dataset)[0].backward()
            fits = True
        except torch.OutOfMemoryError:
            fits = False
            if spread:
                raise ValueError(
                    f"out of memory with {size} sequences at a time; type "
                    f"--micro_batch_size={max(1, size // 2)}, or less"
                ) from None
        if spread:
            replicas.finish_gradients()
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if mesh.sum(not fits)[0] == 0:
            break
        if size == 1:
            raise ValueError(
                "out of memory with one sequence at a time; --precision=bf16, a shorter "
                "--block_size or a smaller model need less"
            )
        size = max(m for m in range(1, size // 2 + 1) if share % m == 0)
    return size
