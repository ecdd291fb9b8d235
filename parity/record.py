"""A recorder: what a few training steps of any model compute, tensor by tensor, on the disk.

    kind               what it is                                          written when
    weight             a parameter after `step` updates; step 0: before    after each step
    input              integers the model is called with: token ids, ...   forward
    output             what a module returns, in order of execution        forward
    choice             the experts of each token, where the caller says    forward
    output_gradient    the loss's gradient with respect to it              backward
    part               what one backward adds to a parameter's gradient    backward
    counts             tokens of each expert in the whole batch            balance()
    term               what keeps experts' loads even, summed over tokens  balance()
    gradient           a parameter's gradient before clipping, summed      gradients(), or step()
    norm               the gradients' norm, where the caller gives it      norm()
    clipped            the gradient that the optimizer gets                step(), after gradients()
    selection_bias     of each expert in the choice, after `step` updates  selection_bias()

Each rank writes for itself and sends nothing. Each piece is written with its place in the full
tensor, by the module's or the parameter's global name, so recordings of different layouts can be
compared: `python -m parity A B`.

    folder/rank_0.jsonl              a line for each piece: kind, step, name, place, file, key
    folder/rank_0.0.safetensors      the pieces themselves

A piece goes to the disk when it is there; only one is held at a time. Forwards without gradients
(evaluation) and those that activation checkpointing repeats in backward are not recorded. What no
module returns can be recorded too: call Recorder.activation(name, x) where it is computed, and
choice(), balance(), selection_bias() for a mixture of experts.

This file needs torch alone, and can be copied into any project. (It writes the safetensors format,
https://github.com/huggingface/safetensors, by itself: the library wants all tensors at once.)

Example:
    import tempfile, torch
    from parity.record import record

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with tempfile.TemporaryDirectory() as folder:
        recorder = record(model, folder, optimizer)
        for step in range(2):
            for i in range(2):
                recorder.batch(range(3 * i, 3 * i + 3), of=6)  # which samples come next
                model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        recorder.close()
        print(len(open(f"{folder}/rank_0.jsonl").readlines()), "lines")
"""

import ctypes
import inspect
import json
import math
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
AFTER = ("weight", "selection_bias")  # kinds of what a step leaves behind
HEADER = 65536  # bytes at the beginning of each file, for its header


class Place(NamedTuple):
    """Where a piece lies in its full tensor.

    shape: of the full tensor. index: for each dimension where the piece begins, or the positions of
    all its entries. part: pieces with one place and the same part are copies; those with different
    parts are summands.
    """

    shape: tuple[int, ...]
    index: tuple[int | list[int], ...]
    part: str = ""


def whole(x: Tensor) -> Place:
    return Place(tuple(x.shape), (0,) * x.ndim)


class Recorder:
    """What `record` returns.

    place(kind, name, x) -> Place, or None for what is as it seems. shards: parameter name ->
    (full shape, offsets). axes: name of an axis of the layout -> (its size, this rank's index);
    comparisons name them. backward_scale: the loss (an output without dimensions) and what backward
    computes are multiplied by it, 1/N where each of N ranks (or micro-batches) has the mean loss of
    its own samples. rank, world: default: as torch.distributed, or torchrun's environment, has
    them. Raises ValueError where the folder has a recording of this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike,
        rank: int | None = None,
        place: Callable[[str, str, Tensor], Place | None] | None = None,
        shards: dict[str, tuple] | None = None,
        axes: dict[str, tuple[int, int]] | None = None,
        backward_scale: float = 1.0,
        world: int | None = None,
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = model
        default_rank, default_world = where_am_i(axes or {})
        self.rank = default_rank if rank is None else rank
        self.place = place or (lambda kind, name, x: None)
        self.shards = shards or {}
        self.backward_scale = backward_scale
        self.step = 0  # steps done
        self.rows = None  # (sample numbers of the next forward, of how many)
        self.calls = 0  # forwards of the model in this step
        self.seen = {}  # name -> how often it came, in this forward (or this step: parts)
        self.began = False
        self.has_gradients = False  # of this step
        self.newest = lambda: None  # the last activation, weakly
        self.files = Files(self.folder, f"rank_{self.rank}")
        path = self.folder / f"rank_{self.rank}.jsonl"
        try:
            self.index = open(path, "x", encoding="utf-8")
        except FileExistsError:
            raise ValueError(
                f"{path} is there already: of another process (then each needs its rank=), or of"
                " an older run (then remove the folder, or name another)"
            ) from None
        self.line({"rank": self.rank, "world": world or default_world, "axes": axes or {}})
        self.handles = []
        for name, module in model.named_modules(remove_duplicate=True):
            self.hook(clean(name), module)
        for name, p in model.named_parameters():
            if p.requires_grad:
                hook = self.part_hook(clean(name))
                self.handles.append(p.register_hook(hook))

    # ---- what the caller says ------------------------------------------------------------------
    def batch(self, rows: Iterable[int] | Callable[[int], Iterable[int]], of: int) -> None:
        """The numbers of the samples in the next forwards, of all `of` samples of the step.

        rows: the numbers, or a function of the forward's number in the step.
        """
        self.rows = (rows if callable(rows) else list(rows), of)

    @torch.no_grad()
    def gradients(self, by_name: dict[str, Tensor] | None = None) -> None:
        """Records the gradients as they are now, before clipping. by_name: default: p.grad."""
        for name, gradient in self.named(by_name, "grad"):
            self.write("clipped" if self.has_gradients else "gradient", name, gradient)
        self.has_gradients = True

    def norm(self, value: float | Tensor) -> None:
        """Records the norm by which this rank clips."""
        if not torch.is_tensor(value):
            value = torch.tensor(value, dtype=torch.float64)
        self.write("norm", "(norm)", value)

    def choice(self, name: str, experts: Tensor) -> None:
        """Records the experts (B, T, k) of each token, where a forward has chosen them."""
        place = self.placed("choice", name, experts)
        if place is not None:
            self.write("choice", name, experts, place)

    def balance(self, name: str, counts: Tensor, terms: dict[str, Tensor]) -> None:
        """Records the tokens of each expert (E,) of the layer `name`, and its terms of balance.

        counts, terms: summed over the whole batch; to be called before the step ends.
        """
        self.write("counts", name, counts)
        for term, value in terms.items():
            self.write("term", f"{name}.{term}", value)

    def selection_bias(self, by_name: dict[str, Tensor]) -> None:
        """Records what is added to the experts' scores (E,) in the choice, by the layer's name.

        To be called before the first step, and after the end of each.
        """
        for name, bias in by_name.items():
            self.write("selection_bias", name, bias)

    @torch.no_grad()
    def end_step(self, by_name: dict[str, Tensor] | None = None, groups: list = ()) -> None:
        """Records the weights after the step. groups: the optimizer's, for their numbers."""
        self.begin(by_name)
        self.step += 1
        if groups:
            self.line({"step": self.step, "groups": [settings(group) for group in groups]})
        self.weights(by_name)
        self.calls = 0
        self.seen = {}
        self.has_gradients = False
        self.flush()

    def begin(self, by_name: dict[str, Tensor] | None = None) -> None:
        """Records the weights before the first step, once."""
        if not self.began:
            self.began = True
            self.weights(by_name)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.files.close()
        self.index.close()

    # ---- hooks ---------------------------------------------------------------------------------
    def hook(self, name: str, module: nn.Module) -> None:
        def before(module, args, kwargs):
            if is_recorded(args):
                self.begin()
                self.seen = {key: n for key, n in self.seen.items() if key[0] == "part"}
                self.calls += 1
                for i, x in enumerate([*args, *kwargs.values()]):
                    if torch.is_tensor(x) and not x.is_floating_point() and x.ndim > 1:
                        self.write("input", f"({i})", x)

        def after(module, args, output):
            if is_recorded(args):
                outputs = output if isinstance(output, tuple | list) else [output]
                for i, x in enumerate(outputs):
                    is_float = torch.is_tensor(x) and x.is_floating_point()
                    # What goes through unchanged is no output of this module.
                    if is_float and not any(x is other for other in (*args, self.newest())):
                        own = name or ("(loss)" if x.ndim == 0 else "(model)")
                        self.activation(own if i == 0 else f"{own}[{i}]", x)

        if name == "":
            # First of all: FSDP's own hook makes full weights of the shards.
            self.handles.append(
                module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
            )
        self.handles.append(module.register_forward_hook(after))

    def activation(self, name: str, x: Tensor) -> None:
        """Records x, a step of a forward, and later its gradient."""
        again = self.seen[name, ""] = self.seen.get((name, ""), 0) + 1
        if again > 1:
            name = f"{name}#{again}"
        place = self.placed("output", name, x)
        if place is None:
            return
        self.newest = weakref.ref(x)
        with torch.no_grad():
            is_loss = x.ndim == 0 and self.backward_scale != 1
            self.write("output", name, x * self.backward_scale if is_loss else x, place)
        if x.requires_grad and x.ndim > 0:
            scale = self.backward_scale
            # Made now, as only now the samples are known.
            where = self.placed("output_gradient", name, x)

            def on_gradient(g: Tensor) -> None:
                with torch.no_grad():
                    self.write("output_gradient", name, g if scale == 1 else g * scale, where)

            x.register_hook(on_gradient)

    def part_hook(self, name: str) -> Callable:
        def on_gradient(g: Tensor | None) -> None:
            if g is None:  # an autograd Function has none for this parameter
                return
            n = self.seen["part", name] = self.seen.get(("part", name), 0) + 1
            with torch.no_grad():
                place = self.of_parameter(name, g)
                if self.backward_scale != 1:
                    g = g * self.backward_scale
                part = f"{place.part}rank {self.rank}, backward {n}"
                self.write("part", name, g, place._replace(part=part))

        return on_gradient

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on each step() of the optimizer records gradients, and then the weights."""
        groups = optimizer.param_groups
        self.handles.append(optimizer.register_step_pre_hook(lambda *_: self.gradients()))
        self.handles.append(
            optimizer.register_step_post_hook(lambda *_: self.end_step(groups=groups))
        )

    # ---- places --------------------------------------------------------------------------------
    def named(self, by_name: dict[str, Tensor] | None, what: str) -> Iterable:
        if by_name is not None:
            yield from by_name.items()
            return
        for name, p in self.model.named_parameters():
            x = p.grad if what == "grad" else p
            if x is not None:
                yield clean(name), x

    def weights(self, by_name: dict[str, Tensor] | None) -> None:
        for name, p in self.named(by_name, "weight"):
            self.write("weight", name, p.detach())

    def of_parameter(self, name: str, x: Tensor) -> Place:
        found = self.place("parameter", name, x)
        if found is not None:
            return found
        if hasattr(x, "placements"):
            return place_of_dtensor(x)
        if name in self.shards and tuple(x.shape) != tuple(self.shards[name][0]):
            shape, offsets = self.shards[name]
            return Place(tuple(shape), tuple(offsets))
        return whole(x)

    def placed(self, kind: str, name: str, x: Tensor) -> Place | None:
        """The place of an activation or an input; None: it is not recorded."""
        found = self.place(kind, name, x)
        if found is not None:
            return found if found.index is not None else None
        if hasattr(x, "placements"):
            place = place_of_dtensor(x)
        else:
            place = whole(x)
        if self.rows is None:
            return place
        rows, n = self.rows
        rows = list(rows(self.calls - 1)) if callable(rows) else rows
        if x.ndim == 0:
            return place._replace(part=f"samples {rows[0]}")
        if x.shape[0] != len(rows):
            # The same for all samples, as positions are: its gradient is a sum over them.
            if kind == "output_gradient":
                place = place._replace(part=f"{place.part}samples {rows[0]}")
            return place
        shape = (n, *place.shape[1:])
        return Place(shape, (rows, *place.index[1:]), place.part)

    # ---- the disk ------------------------------------------------------------------------------
    def write(self, kind: str, name: str, x: Tensor, place: Place | None = None) -> None:
        if place is None and kind == "input":
            place = self.placed(kind, name, x)
        elif place is None:
            place = self.of_parameter(name, x)
        if place is None:
            return
        if hasattr(x, "placements"):
            x = x.to_local()
        if hasattr(x, "trigger_wait"):
            x = x.trigger_wait()  # a collective that may still be on its way
        file, key, dtype = self.files.add(x.detach().cpu().contiguous())
        self.line(
            {
                "kind": kind,
                "step": self.step if kind in AFTER else self.step + 1,
                "name": name,
                "shape": place.shape,
                "index": [starts(i) for i in place.index],
                "part": place.part,
                "dtype": dtype,
                "at": time.time_ns(),
                "file": file,
                "key": key,
            }
        )

    def line(self, fact: dict) -> None:
        self.index.write(json.dumps(fact) + "\n")

    def flush(self) -> None:
        """What is recorded so far can be read."""
        self.files.flush()
        self.index.flush()


class Files:
    """safetensors files that grow tensor by tensor: each keeps room at its beginning for a header.

    (The header is JSON and may end with spaces. When its room is used up, the next file begins.)
    """

    def __init__(self, folder: Path, stem: str):
        self.folder = folder
        self.stem = stem
        self.file = None
        self.n_files = 0

    def add(self, x: Tensor) -> tuple[str, str, str]:
        """Writes x, contiguous and on the CPU; returns (name of the file, its key there, dtype)."""
        if self.file is None or self.used + 200 > HEADER:
            self.begin_file()
        key = str(len(self.entries))
        end = self.n_bytes + x.nbytes
        entry = {"dtype": DTYPES[x.dtype], "shape": list(x.shape)}
        entry["data_offsets"] = [self.n_bytes, end]
        self.entries[key] = entry
        self.used += len(json.dumps(entry)) + len(key) + 6
        self.n_bytes = end
        if x.nbytes:
            # Not by numpy(): FSDP could no longer free memory that numpy has looked at.
            self.file.write((ctypes.c_char * x.nbytes).from_address(x.data_ptr()))
        return self.name, key, entry["dtype"]

    def begin_file(self) -> None:
        self.close()
        self.name = f"{self.stem}.{self.n_files}.safetensors"
        self.file = open(self.folder / self.name, "wb")
        self.n_files += 1
        self.entries = {}
        self.used = 10  # bytes of the header
        self.n_bytes = 0  # of tensors
        self.flush()

    def flush(self) -> None:
        if self.file is None:
            return
        header = json.dumps(self.entries).encode().ljust(HEADER - 8)
        self.file.seek(0)
        self.file.write(len(header).to_bytes(8, "little") + header)
        self.file.seek(0, os.SEEK_END)
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.flush()
            self.file.close()


def record(
    model: nn.Module,
    folder: str | os.PathLike,
    optimizer: torch.optim.Optimizer | None = None,
    **arguments,
) -> Recorder:
    """Records each training step of `model` from now on, into `folder`, until close().

    optimizer: its step() ends a step; None: call gradients() and end_step(). arguments: Recorder's.
    """
    recorder = Recorder(model, folder, **arguments)
    if optimizer is not None:
        recorder.follow(optimizer)
    return recorder


def where_am_i(axes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """(rank, world size) of this process; without torch.distributed the axes may tell the size."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, math.prod(n for n, _ in axes.values())


def clean(name: str) -> str:
    """The module's or parameter's name without what wrappers add to it."""
    for wrapper in WRAPPERS:
        name = f"{name}.".replace(wrapper, "").rstrip(".")
    return name


def is_recorded(args: tuple = ()) -> bool:
    """Is this a forward for training, and not one that is repeated within a backward?

    Nor one with shapes alone, as pipelines make to learn them.
    """
    if any(torch.is_tensor(x) and x.is_meta for x in args):
        return False
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1


def starts(index) -> int | list[int]:
    """Positions that follow one another as their first."""
    if isinstance(index, int):
        return index
    index = [int(i) for i in index]
    return index[0] if index == list(range(index[0], index[0] + len(index))) else index


def place_of_dtensor(x: Tensor) -> Place:
    """Where this rank's shard of a DTensor lies; its summands where it is a partial sum."""
    positions = [torch.arange(n) for n in x.shape]
    parts = []
    mesh = x.device_mesh
    for axis, (at, placement) in enumerate(zip(mesh.get_coordinate(), x.placements)):
        if placement.is_partial():
            parts.append(str(at))
        elif hasattr(placement, "dim"):
            # Strided shards take a share of each of several blocks: FSDP over tensor parallelism.
            blocks = getattr(placement, "split_factor", 1)
            chunks = positions[placement.dim].view(blocks, -1).chunk(mesh.size(axis), 1)
            empty = positions[placement.dim][:0]
            positions[placement.dim] = chunks[at].flatten() if at < len(chunks) else empty
    index = tuple(starts(dim.tolist()) if len(dim) else 0 for dim in positions)
    return Place(tuple(x.shape), index, " ".join(parts))


def settings(group: dict) -> dict:
    """The numbers of an optimizer's group."""
    kept = {}
    for name, value in group.items():
        if name != "params" and isinstance(value, int | float | str | bool | list | tuple):
            kept[name] = value
    return kept


if __name__ == "__main__":
    # The example finds this file under its name here, whatever it is called and wherever it lies.
    sys.modules["parity.record"] = sys.modules["__main__"]

if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
