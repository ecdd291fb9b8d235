"""Optimizer state in host memory or in files, on the device only while its parameters step.

    inward      fetch 0   fetch 1   fetch 2                        host or file -> device
    device                step 0    step 1    step 2
    outward                         store 0   store 1   store 2    device -> host or file

A chunk is a run of parameters of about chunk_mb together. Fetch 2 waits for store 0: the device
never holds the state of more than two chunks. All state crosses the bus twice a step, so no step is
faster than 2 x state / bus. On a CPU nothing moves: `cpu` leaves the state where it is, `disk`
steps the mapped files themselves, and the system writes their pages out when memory is short.

This fits every torch optimizer whose update of a parameter depends on no other parameter: for a
chunk the optimizer gets groups with the chunk's parameters alone. A counter of a group
(Schedule-Free's k) starts each chunk from the same value, so it advances once; the largest counts
where chunks disagree. Muon, which multiplies matrices of one shape together, gets smaller stacks.
The hooks of step() and load_state_dict() run once around all chunks. Schedulers may be made before
or after.

Every tensor of `optimizer.state` with more than one element moves, master copies too. A file takes
all its room on the disk before it is used: a full disk is a sentence at the first step or at the
load, with the checkpoints untouched, and no bus error weeks later. The name of a file is removed
once it is mapped, so nothing is left however the process ends. (Windows refuses; there the next run
uses the same files again.)

On a GPU (by reading, not run yet). `cpu`: pinned memory, from which alone a copy runs beside the
computing. torch rounds each pinned tensor up to a power of two (CachingHostAllocator.h; pytorch
issues 95823, 150517), so host memory may reach twice the state's bytes; torch 2.11 and later take a
limit in PYTORCH_CUDA_ALLOC_CONF (pull request 171662). `disk`: a mapped file is not pinned. A copy
from it waits in the host until the driver has staged it, one into it until it is there (CUDA
runtime API, "API synchronization behavior"): right, but nothing runs beside it.

Ren et al. 2021, ZeRO-Offload (2101.06840); Rajbhandari et al. 2021, ZeRO-Infinity (2104.07857).
They step on the CPU. Here the device steps, because then the optimizer needs no second version.

Example:
    import copy
    import tempfile
    import torch
    from memory.offload import offload
    layer = torch.nn.Linear(8, 8)
    twin = copy.deepcopy(layer)
    with tempfile.TemporaryDirectory() as folder:
        in_files = offload(torch.optim.AdamW(layer.parameters()), "disk", folder)
        in_memory = torch.optim.AdamW(twin.parameters())
        for x in torch.randn(5, 64, 8):
            for model, optimizer in (layer, in_files), (twin, in_memory):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
    assert torch.equal(layer.weight, twin.weight)
"""

import functools
import math
import os
import shutil
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from types import MethodType

import torch
from torch.optim import Optimizer


def offload(
    optimizer: Optimizer,
    where: str,
    folder: str | Path | None = None,
    device: torch.device = torch.device("cpu"),
    chunk_mb: float = 64.0,
) -> Optimizer:
    """The same optimizer, with its state in host memory (`cpu`) or in files in `folder` (`disk`).

    folder: for this process alone. device: where the parameters are. chunk_mb: MiB of parameters
    stepped at a time. Raises ValueError for another `where`, and where step() is no longer the
    class's own. Raises OSError for a full disk, as do step() and load_state_dict() then.
    """
    if where not in ("cpu", "disk") or (where == "disk" and folder is None):
        raise ValueError(f"offload={where} is not allowed; take 'cpu', or 'disk' and a folder")
    cls = type(optimizer)
    own_step = vars(optimizer).get("step")
    # A scheduler wraps step() to count its calls; that wrapper may go.
    is_scheduled = hasattr(own_step, "_wrapped_by_lr_sched") and own_step.__wrapped__ is cls.step
    if own_step is not None and not is_scheduled:
        raise ValueError(
            "something has replaced this optimizer's step(), which offloading would "
            "undo; call offload() once, and before others do that"
        )
    stream = Stream(optimizer, where, folder, device, chunk_mb * 2**20)
    # State that is there already moves now.
    stream.run(lambda optimizer: None)
    # Torch wraps step() in what runs the hooks; a chunk must not run them.
    plain_step = cls.step.__wrapped__

    def step(optimizer, closure=None):
        optimizer._opt_called = True  # schedulers check it
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stream.run(plain_step)
        return loss

    def load_state_dict(optimizer, state_dict: dict):
        saved = dict(state_dict)
        pre_hooks = optimizer._optimizer_load_state_dict_pre_hooks
        post_hooks = optimizer._optimizer_load_state_dict_post_hooks
        before = dict(pre_hooks)
        after = dict(post_hooks)
        for hook in before.values():
            result = hook(optimizer, saved)
            saved = saved if result is None else result
        # Hooks see the whole state, so the load of a chunk finds none.
        pre_hooks.clear()
        post_hooks.clear()
        try:
            load_chunks(optimizer, stream, saved)
        finally:
            pre_hooks.update(before)
            post_hooks.update(after)
        for hook in after.values():
            hook(optimizer)

    step = Optimizer.profile_hook_step(step)
    step._wrapped_by_lr_sched = True  # it does what a scheduler's wrapper does
    optimizer.step = MethodType(step, optimizer)
    optimizer.load_state_dict = MethodType(load_state_dict, optimizer)
    # train() and eval() of an average move parameters by their state, chunk by chunk.
    for name in {"train", "eval"} & {*dir(cls)}:

        def change(change=getattr(cls, name), **options):
            stream.run(functools.partial(change, **options))

        setattr(optimizer, name, change)
    return optimizer


def load_chunks(optimizer: Optimizer, stream: "Stream", saved: dict) -> None:
    """load_state_dict(saved), chunk by chunk. Raises ValueError where the groups do not fit."""
    cls = type(optimizer)
    groups = saved["param_groups"]
    state = saved["state"]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group["params"]) for group in groups] != sizes:
        # The class itself says what is wrong.
        cls.load_state_dict(optimizer, saved)
        return
    # A checkpoint names a parameter by its number.
    number_of = {}
    for group, saved_group in zip(optimizer.param_groups, groups):
        number_of.update(zip(group["params"], saved_group["params"]))

    def load(optimizer):
        chunk_groups = []
        chunk_state = {}
        for group, saved_group in zip(optimizer.param_groups, groups):
            numbers = [number_of[p] for p in group["params"]]
            chunk_groups.append({**saved_group, "params": numbers})
            chunk_state |= {i: state[i] for i in numbers if i in state}
        chunk = {**saved, "state": chunk_state, "param_groups": chunk_groups}
        cls.load_state_dict(optimizer, chunk)

    optimizer.state.clear()
    stream.run(load)


class Stream:
    """Leads the state past the device, chunk by chunk.

    homes: parameter -> name of a state -> its tensor in host memory or in a file.
    """

    def __init__(self, optimizer, where: str, folder, device: torch.device, chunk_bytes: float):
        self.optimizer = optimizer
        self.where = where
        self.folder = folder
        self.device = device
        self.chunk_bytes = chunk_bytes
        self.homes = {}
        self.n_files = 0
        self.on_gpu = device.type == "cuda"
        # A stream for each direction, so that both copy at the same time.
        self.inward = torch.cuda.Stream(device) if self.on_gpu else None
        self.outward = torch.cuda.Stream(device) if self.on_gpu else None

    def chunks(self) -> list[list[list]]:
        """For each chunk the parameters it takes of each group; one chunk if there are none."""
        groups = self.optimizer.param_groups
        chunks = []
        size = math.inf
        for i, group in enumerate(groups):
            for p in group["params"]:
                if size + p.nbytes > self.chunk_bytes:
                    chunks.append([[] for _ in groups])
                    size = 0
                chunks[-1][i].append(p)
                size += p.nbytes
        return chunks or [[[] for _ in groups]]

    @torch.no_grad()
    def run(self, method) -> None:
        """Calls method(optimizer) for one chunk after the other, with its state on the device."""
        optimizer = self.optimizer
        groups = optimizer.param_groups
        state = optimizer.state
        chunks = self.chunks()
        done = []  # each chunk's groups, as the method left them
        main = torch.cuda.current_stream(self.device) if self.on_gpu else None
        fetched = self.fetch(state, chunks[0])
        try:
            for chunk, following in zip(chunks, [*chunks[1:], []]):
                # Copies of the groups: a counter must start each chunk from the same value.
                optimizer.param_groups = [{**g, "params": ps} for g, ps in zip(groups, chunk)]
                optimizer.state = defaultdict(dict, fetched)
                if self.on_gpu:
                    main.wait_stream(self.inward)
                    keep_until_past(fetched, main)
                method(optimizer)
                # Only when the chunk before is home is there room for the next one.
                if self.on_gpu:
                    self.outward.synchronize()
                fetched = self.fetch(state, following)
                self.store(state, optimizer.state, main)
                done.append(optimizer.param_groups)
        finally:
            optimizer.param_groups = groups
            optimizer.state = state
            # Whoever reads the state from now on reads all of it.
            if self.on_gpu:
                self.outward.synchronize()
        for group, *parts in zip(groups, *done):
            merge(group, parts)

    def fetch(self, state: dict, chunk: list[list]) -> dict:
        """The state of a chunk's parameters, its copies to the device under way."""
        fetched = {}
        # A stream of None changes nothing.
        with torch.cuda.stream(self.inward):
            for params in chunk:
                for p in params:
                    if p in state:
                        fetched[p] = {name: inward(p, x) for name, x in state[p].items()}
        return fetched

    def store(self, state: dict, new: dict, main) -> None:
        """Brings a chunk's state home. main: the stream that has stepped it."""
        if self.on_gpu:
            self.outward.wait_stream(main)
            keep_until_past(new, self.outward)
        with torch.cuda.stream(self.outward):
            for p, named in new.items():
                state[p] = {name: self.home(p, name, x) for name, x in named.items()}

    def home(self, p: torch.Tensor, name: str, x):
        """What holds `x` from now on: its tensor here, or `x` itself where it need not move."""
        if not moves(x) or (self.where == "cpu" and x.device.type == "cpu"):
            return x
        homes = self.homes.setdefault(p, {})
        home = homes.get(name)
        if home is None or (home.shape, home.dtype) != (x.shape, x.dtype):
            if self.where == "disk":
                flat = self.map_file(x.nbytes)
            else:
                flat = torch.empty(x.nbytes, dtype=torch.uint8, pin_memory=self.on_gpu)
            # The strides of x, so that sums keep their order.
            strides = torch.empty_like(x, device="meta").stride()
            home = flat.view(x.dtype).as_strided(x.shape, strides)
            homes[name] = home
        if x is home:
            return x
        return home.copy_(x, non_blocking=True)

    def map_file(self, n_bytes: int) -> torch.Tensor:
        """A tensor of n_bytes that is a file. Raises OSError where the disk has no room for it."""
        path = Path(self.folder, f"{self.n_files}.state")
        self.n_files += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                else:
                    # Written zeros take the room. A file that is only made longer would be sparse.
                    for start in range(0, n_bytes, 2**20):
                        file.write(bytes(min(2**20, n_bytes - start)))
            flat = torch.from_file(str(path), shared=True, size=n_bytes, dtype=torch.uint8)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(
                f"{self.folder} has no room for the optimizer's state: one more tensor needs "
                f"{n_bytes:,} bytes, {shutil.disk_usage(path.parent).free:,} are free "
                f"({error.strerror}); take another folder, or offload to cpu"
            ) from error
        # The mapping keeps the file alive without a name. Windows refuses while it is mapped.
        with suppress(PermissionError):
            path.unlink()
        return flat


def merge(group: dict, parts: list[dict]) -> None:
    """Puts into the group what the chunks have changed in their copies of it.

    All copies began with the same values. The largest number counts where chunks disagree.
    """
    new = {}
    for part in parts:
        for name, x in part.items():
            if name == "params" or x is group.get(name):
                continue
            if isinstance(x, (int, float)):
                x = max(x, new.get(name, x))
            new[name] = x
    # A load may bring fewer entries than the group had.
    for name in group.keys() - parts[-1].keys():
        del group[name]
    group.update(new)


def keep_until_past(state: dict, stream) -> None:
    """The allocator gives the memory of these states away only when the stream is past them.

    It knows of the stream alone on which a tensor was made: the inward one. An optimizer that puts
    another tensor in a state's place drops this one while its kernels still read it.
    """
    for p, named in state.items():
        for x in named.values():
            # An optimizer may keep a state on the host, where there are no streams.
            if moves(x) and x.device == p.device:
                x.record_stream(stream)


def inward(p: torch.Tensor, x):
    """A state on its parameter's device."""
    return x.to(p.device, non_blocking=True) if moves(x) else x


def moves(x) -> bool:
    """Does this entry of a state move? Counters of one element stay where they are."""
    return torch.is_tensor(x) and x.numel() > 1


if __name__ == "__main__":
    params = [torch.zeros(2**20, requires_grad=True) for _ in range(40)]
    stream = Stream(torch.optim.SGD(params), "cpu", None, torch.device("cpu"), 64 * 2**20)
    print(f"40 tensors of 4 MiB pass in chunks of {[len(chunk[0]) for chunk in stream.chunks()]}")
