"""Optimizer state in host memory or in files, on the device only while its parameters are stepped.

    inward      fetch 0   fetch 1   fetch 2                        host or file -> device
    device                step 0    step 1    step 2
    outward                         store 0   store 1   store 2    device -> host or file

A chunk is a run of parameters of about chunk_mb together. Fetch 2 waits for store 0: the device
never holds the state of more than two chunks. All state crosses the bus twice a step, so no step is
faster than 2 x state / bus. On a CPU nothing moves: `cpu` leaves the state where it is, `disk`
steps the mapped files themselves, and the system writes their pages out when memory is short.

Fits every torch optimizer whose update of a parameter looks at no other: for a chunk it is given
groups with the chunk's parameters alone. What a group counts (Schedule-Free's k) starts each chunk
from the same value, so it advances once; of different values the largest holds. Muon, which
multiplies matrices of one shape together, gets smaller stacks. The hooks of step() and
load_state_dict() run once around the whole. Schedulers may be made before or after.

What moves is every tensor of `optimizer.state` with more than one element, master copies too. A
file takes all its room on the disk before it is used: a full disk is a sentence at the first step
or at the load, with the checkpoints untouched, and no bus error weeks later. Its name is removed
once it is mapped, so nothing is left however the process ends (Windows refuses; there the next run
takes the same files again).

Ren et al. 2021, ZeRO-Offload (2101.06840); Rajbhandari et al. 2021, ZeRO-Infinity (2104.07857).
They step on the CPU; here the device does, because so the optimizer stays what it was.
"""

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
    """The same optimizer, its state from now on in host memory (`cpu`) or in files under `folder`
    (`disk`).

    folder: for this process alone. device: where the parameters are. chunk_mb: MiB of parameters
    stepped at a time. Raises ValueError for another `where` and where step() is no longer the
    class's own, OSError (as do step() and load_state_dict()) for a full disk.
    """
    if where not in ("cpu", "disk") or (where == "disk" and folder is None):
        raise ValueError(f"offload={where} is not allowed; take 'cpu', or 'disk' and a folder")
    cls, own = type(optimizer), vars(optimizer).get("step")
    scheduled = hasattr(own, "_wrapped_by_lr_sched") and own.__wrapped__ is cls.step
    if not (own is None or scheduled):
        raise ValueError(
            "something has replaced this optimizer's step(), which offloading would "
            "undo; call offload() once, and before others do that"
        )
    stream = Stream(optimizer, where, folder, device, chunk_mb * 2**20)
    stream.run(lambda optimizer: None)  # the state it already has moves now
    # Torch wraps step() in what runs the hooks; a chunk must not run them
    plain_step = cls.step.__wrapped__

    def step(optimizer, closure=None):
        optimizer._opt_called = True  # schedulers look at it
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        stream.run(plain_step)
        return loss

    def load_state_dict(optimizer, state_dict: dict):
        saved, pre = dict(state_dict), optimizer._optimizer_load_state_dict_pre_hooks
        post = optimizer._optimizer_load_state_dict_post_hooks
        before, after = dict(pre), dict(post)
        for hook in before.values():
            result = hook(optimizer, saved)
            saved = saved if result is None else result
        pre.clear(), post.clear()  # they see the whole and no chunk
        try:
            load_chunks(optimizer, saved)
        finally:
            pre.update(before), post.update(after)
        for hook in after.values():
            hook(optimizer)

    def load_chunks(optimizer, saved: dict):
        groups, state = saved["param_groups"], saved["state"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in optimizer.param_groups]:
            return cls.load_state_dict(optimizer, saved)  # which says what is wrong
        ids = {
            p: i
            for g, h in zip(optimizer.param_groups, groups)
            for p, i in zip(g["params"], h["params"])
        }

        def load(optimizer):
            chunk = [[ids[p] for p in g["params"]] for g in optimizer.param_groups]
            part = {i: state[i] for numbers in chunk for i in numbers if i in state}
            chunk = [{**g, "params": numbers} for g, numbers in zip(groups, chunk)]
            cls.load_state_dict(optimizer, {**saved, "state": part, "param_groups": chunk})

        optimizer.state.clear()
        stream.run(load)

    step = Optimizer.profile_hook_step(step)
    step._wrapped_by_lr_sched = True  # it does what a scheduler's wrapper does
    optimizer.step = MethodType(step, optimizer)
    optimizer.load_state_dict = MethodType(load_state_dict, optimizer)
    # Schedule-Free's, which move parameters by their state
    for name in {"train", "eval"} & {*dir(cls)}:
        setattr(optimizer, name, lambda change=getattr(cls, name): stream.run(change))
    return optimizer


class Stream:
    """Leads the state past the device, chunk by chunk. `homes`: parameter -> name -> its tensor
    here."""

    def __init__(self, optimizer, where: str, folder, device: torch.device, chunk_bytes: float):
        self.optimizer, self.where, self.folder, self.device = optimizer, where, folder, device
        self.chunk_bytes, self.homes, self.files, self.gpu = (
            chunk_bytes,
            {},
            0,
            device.type == "cuda",
        )
        self.inward, self.outward = (
            torch.cuda.Stream(device) if self.gpu else None for _ in range(2)
        )

    def chunks(self) -> list[list[list]]:
        """For each chunk the parameters it takes of each group; one chunk if there are none."""
        groups, chunks, size = self.optimizer.param_groups, [], math.inf
        for i, p in ((i, p) for i, group in enumerate(groups) for p in group["params"]):
            if size + p.nbytes > self.chunk_bytes:
                chunks.append([[] for _ in groups])
                size = 0
            chunks[-1][i].append(p)
            size += p.nbytes
        return chunks or [[[] for _ in groups]]

    @torch.no_grad()
    def run(self, method) -> None:
        """method(optimizer) for one chunk after the other, each with its own state on the
        device."""
        optimizer, groups, state = self.optimizer, self.optimizer.param_groups, self.optimizer.state
        chunks, parts = self.chunks(), []
        main = torch.cuda.current_stream(self.device) if self.gpu else None
        fetched = self.fetch(state, chunks[0])
        try:
            for chunk, following in zip(chunks, [*chunks[1:], []]):
                optimizer.param_groups = [{**g, "params": ps} for g, ps in zip(groups, chunk)]
                optimizer.state = defaultdict(dict, fetched)
                if self.gpu:
                    main.wait_stream(self.inward)
                method(optimizer)
                if self.gpu:
                    self.outward.synchronize()  # the chunk before is home: room for the next
                fetched = self.fetch(state, following)
                self.store(state, optimizer.state, main)
                parts.append(optimizer.param_groups)
        finally:
            optimizer.param_groups, optimizer.state = groups, state
            if self.gpu:
                self.outward.synchronize()  # whoever reads the state now reads all of it
        for group, *seen in zip(groups, *parts):
            settle(group, seen)

    def fetch(self, state: dict, chunk: list[list]) -> dict:
        with torch.cuda.stream(self.inward):  # None changes nothing
            return {
                p: {
                    k: x.to(p.device, non_blocking=True) if moves(x) else x
                    for k, x in state[p].items()
                }
                for ps in chunk
                for p in ps
                if p in state
            }

    def store(self, state: dict, new: dict, main) -> None:
        if self.gpu:
            self.outward.wait_stream(main)
            for x in (
                x for named in new.values() for x in named.values() if moves(x) and x.is_cuda
            ):
                x.record_stream(main)  # its memory is free once both streams are past it
                x.record_stream(self.outward)
        with torch.cuda.stream(self.outward):
            for p, named in new.items():
                state[p] = {name: self.home(p, name, x) for name, x in named.items()}

    def home(self, p: torch.Tensor, name: str, x):
        """What holds `x` from now on: its tensor here, or `x` itself where it need not move."""
        if not moves(x) or (self.where == "cpu" and x.device.type == "cpu"):
            return x
        home = self.homes.setdefault(p, {}).get(name)
        if home is None or (home.shape, home.dtype) != (x.shape, x.dtype):
            home = (
                self.map_file(x.nbytes)
                if self.where == "disk"
                else torch.empty(x.nbytes, dtype=torch.uint8, pin_memory=self.gpu)
            )
            # As x, so that sums keep their order
            strides = torch.empty_like(x, device="meta").stride()
            home = self.homes[p][name] = home.view(x.dtype).as_strided(x.shape, strides)
        return x if x is home else home.copy_(x, non_blocking=True)

    def map_file(self, n_bytes: int) -> torch.Tensor:
        """A tensor that is a file, all of whose room on the disk is taken."""
        path, self.files = Path(self.folder, f"{self.files}.state"), self.files + 1
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                else:
                    file.writelines(
                        bytes(min(2**20, n_bytes - i)) for i in range(0, n_bytes, 2**20)
                    )
            flat = torch.from_file(str(path), shared=True, size=n_bytes, dtype=torch.uint8)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OSError(
                f"{self.folder} has no room for the optimizer's state: one more tensor needs "
                f"{n_bytes:,} bytes, {shutil.disk_usage(path.parent).free:,} are free "
                f"({error.strerror}); take another folder, or offload to cpu"
            ) from error
        with suppress(PermissionError):  # Windows, while it is mapped
            path.unlink()
        return flat


def settle(group: dict, parts: list[dict]) -> None:
    """The group becomes what the chunks have made of their copies. All began with the same: of
    different numbers the largest holds."""
    new = {}
    for part in parts:
        for name, x in part.items():
            if name != "params" and x is not group.get(name):
                new[name] = max(x, new.get(name, x)) if isinstance(x, (int, float)) else x
    for name in group.keys() - parts[-1].keys():
        del group[name]
    group.update(new)


def moves(x) -> bool:
    return torch.is_tensor(x) and x.numel() > 1
