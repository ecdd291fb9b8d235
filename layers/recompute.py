"""Cheap results are computed again in backward, so that forward need not keep them.

    y = norm(x);  q = y Wqᵀ, k = y Wkᵀ, v = y Wvᵀ

              forward keeps                   backward
    plain     x for norm; y for each of       dy = dq Wq + dk Wk + dv Wv;  dWq = dqᵀ y, ...;
              q, k, v, cast three times       dx = norm's derivative at x, times dy
    here      x                               y = norm(x) once more, then the same

recompute(function, x) calls the function; what autograd saves inside of it is not kept, only x is
(or x, y, ... of a function of several tensors).
Within forget_results() nobody else keeps the result either: where autograd would save it, a view of
it or one of its casts(), it gets a note of how to compute it. When backward comes to the first such
note, the function runs once more on the same x, so all numbers are the same bits. The graph is as
it was: hooks, sums of gradients and their order are untouched.

What a layer of model.py keeps between forward and backward, in bytes for each token and channel, in
float32 and under autocast in bfloat16 (the residual stream is float32 there):

                          gpt2                          modern
                          float32      bfloat16         float32      bfloat16
                          plain here   plain here       plain here   plain here
    x, before attention    4     4      4     4          4     4      4     4
    norm(x)                4     -      6     -          4     -      6     -
    products q, k          8     8      4     4          -     8      -     4
    QK-norm, inside        -     -      -     -          8     -      8     -
    q, k, turned           -     -      -     -          8     -      4     -
    v                      4     4      2     2          4     4      2     2
    attention              4     4      2     2          4     4      2     2
    x, before the MLP      4     4      4     4          4     4      4     4
    norm(x)                4     -      2     -          4     -      2     -
    fc(norm(x))           16    16      8     8          -    16      -     8
    inside relu(.)²        -     -      -     -         16     -      8     -
    gelu, relu(.)²        16     -      8     -         16     -      8     -
    in all                64    40     40    24         72    40     48    24

(Besides some numbers for each token.) It composes with activation checkpointing
(memory/activation_checkpoint.py): x, like all else that is kept, goes to the saved-tensor hooks
around it. This file does nothing for x of less than 2 MiB, without gradients, under torch.compile
(the compiler recomputes by itself), within torch.func's transforms and disable_saved_tensors_hooks
(they take no hooks), and on a device without autocast (meta has no numbers to keep).

Limits. The function is of its tensors alone, without random numbers. A result of
saves_little that is used detached, too, is an error in a later call of backward. A result that
somebody has changed in place is kept where it is used from then on, and so is the cast of a part of
a result.
A module with forward hooks keeps what it always kept: a hook may change the result. Where a user of
the result copies it before it saves it, the copy is kept.

References: Gist (Jain et al. 2018, ISCA) and Chen et al. 2016 (1604.06174) recompute cheap layers;
Korthikanti et al. 2022 (2205.05198) attention.

Example:
    import torch
    import layers.recompute
    from layers.recompute import forget_results, recompute
    layers.recompute.LEAST = 0  # bytes; usually 2 MiB
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with forget_results():
            h = x * 2
            y = recompute(torch.nn.functional.gelu, h) @ weight.t()
    found = torch.autograd.grad(y.sum(), [x, weight])
    plain = torch.nn.functional.gelu(x * 2) @ weight.t()
    assert all(map(torch.equal, found, torch.autograd.grad(plain.sum(), [x, weight])))
    assert [t.shape for t in kept] == [h.shape, weight.t().shape]  # and not gelu(h)
"""

import contextlib
import inspect
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Bytes of x from which on results are computed again. The speedrun's step (configs/), of 0.8 MB,
# takes 1.1 times as long where they are, by two cores of an AMD EPYC.
LEAST = 2**21
# Address of a storage -> the Again whose result is in it, as long as somebody can still ask for it.
RESULTS = weakref.WeakValueDictionary()


def recompute(
    function: Callable[..., Tensor], x: Tensor, *others: Tensor, saves_little: bool = False
) -> Tensor:
    """function(x, *others), a new tensor. Backward computes again, from its arguments, what
    autograd saved in it.

    others: tensors of x's size. saves_little: what it saves are its arguments and small tensors.
    They are kept, and the function runs again only where backward asks for its result.

    In backward, raises RuntimeError where an argument or a parameter was changed in place since, or
    where the function does not save the same number of tensors again.
    """
    has_autocast = torch.amp.is_autocast_available(x.device.type)
    if not (is_on() and has_autocast) or is_small(x) or has_hooks(function):
        return function(x, *others)
    again = Again(function, (x, *others), saves_little)
    hooks = saved_tensors_hooks(again.pack, again.unpack)
    with contextlib.nullcontext() if saves_little else hooks:
        y = function(x, *others)
    again.add_result(y)
    if saves_little and y.grad_fn is not None:
        # It is held by this hook alone, and for as long as somebody holds the loss.
        y.grad_fn.register_prehook(again.release)
    return y


def casts(x: Tensor, n: int) -> list[Tensor]:
    """For n products of x: what autocast, if it is on, would make of it for each, but one copy.

    Each has a cast of its own in backward, as under autocast: gradients add up in x's dtype.
    """
    device = x.device.type
    if is_transformed() or is_small(x) or not torch.amp.is_autocast_available(device):
        return [x] * n
    dtype = torch.get_autocast_dtype(device)
    if not torch.is_autocast_enabled(device) or x.dtype in (dtype, torch.float64):
        return [x] * n
    copy = x.detach().to(dtype)
    again = computed_by(x)
    # Backward casts the whole result: the copy must be of all of it, and in memory as it is.
    is_whole = x.numel() * x.itemsize == x.untyped_storage().nbytes()
    if again is not None and is_whole and copy.stride() == x.stride():
        again.add_result(copy)
    return [Cast.apply(x, copy) for _ in range(n)]


class Cast(torch.autograd.Function):
    """x in the dtype of `copy`, which has the same numbers."""

    @staticmethod
    def forward(ctx, x: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy.to(ctx.dtype), None


@contextlib.contextmanager
def forget_results(x: Tensor | None = None):
    """Within it autograd saves no result of recompute(), but how to get it.

    x: a tensor of the usual size within; where it is small, nothing is done.

    All else goes to the saved-tensor hooks around, if there are any. Backward raises RuntimeError
    for what was changed in place, as it does without hooks.
    """
    if not is_on() or (x is not None and is_small(x)):
        yield
        return
    hooks = hooks_around()

    def pack(x: Tensor) -> Kept | Elsewhere | View:
        again = computed_by(x)
        if again is None:
            return keep(x, hooks)
        return View(again, x.dtype, x.shape, x.stride(), x.storage_offset())

    with saved_tensors_hooks(pack, lambda packed: packed.get()):
        yield


def is_small(x: Tensor) -> bool:
    """Does keeping results of x's size cost less than what Python does to forget them?"""
    return x.numel() * x.itemsize < LEAST


def is_on() -> bool:
    # torch has no public name for it.
    hooks_are_allowed = torch._C._autograd._saved_tensors_hooks_is_enabled
    return torch.is_grad_enabled() and not is_transformed() and hooks_are_allowed()


def is_transformed() -> bool:
    """Is it torch.compile or a transform of torch.func (grad, vmap, jvp) that calls?"""
    # torch has no public name for the second either.
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def has_hooks(function: Callable) -> bool:
    """Is it a module that calls hooks before or after its forward?"""
    if not isinstance(function, nn.Module):
        return False
    own = function._forward_pre_hooks or function._forward_hooks
    return bool(own) or nn.modules.module._has_any_global_hook()


# ---- what is kept --------------------------------------------------------------------------------
class Kept(NamedTuple):
    """A tensor as it is."""

    x: Tensor
    version: int

    def get(self) -> Tensor:
        check_version(self.x, self.version)
        return self.x


class Elsewhere(NamedTuple):
    """What the hooks around have made of a tensor."""

    packed: object
    unpack: Callable

    def get(self) -> Tensor:
        return self.unpack(self.packed)


class View(NamedTuple):
    """Where in a result a tensor was."""

    again: "Again"
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple
    offset: int

    def get(self) -> Tensor:
        return self.again.result(self.dtype).as_strided(self.shape, self.stride, self.offset)


def keep(x: Tensor, hooks: tuple[Callable, Callable] | None) -> Kept | Elsewhere:
    if hooks is None:
        # Detached, for a result that its own part of the graph holds would never go. A leaf has no
        # such part, and must stay the same object: a layout may give it other memory.
        return Kept(x if x.is_leaf else x.detach(), x._version)
    pack, unpack = hooks
    return Elsewhere(pack(x), unpack)


def hooks_around() -> tuple[Callable, Callable] | None:
    """(pack, unpack) of the innermost saved_tensors_hooks."""
    # torch has no public name for it.
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def check_version(x: Tensor, version: int) -> None:
    if x._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(x.shape)} that backward needs was changed in place after "
            "forward used it; change a copy, or change it after backward"
        )


def computed_by(x: Tensor) -> "Again | None":
    """What computes the tensor of which x is a part; None where it does not compute x as it is."""
    address = x.untyped_storage()._cdata
    again = RESULTS.get(address)
    if again is None:
        return None
    storage, dtype, version = again.results[address]
    # A new storage may have the address of one that is gone.
    if storage() is None or x.dtype != dtype:
        return None
    # Changed in place since, or a conjugate, which is the same memory read otherwise.
    if x._version != version or x.is_conj():
        return None
    return again


# ---- what is computed again ----------------------------------------------------------------------
class Again:
    """One call of a function: how to get its result once more, and what autograd saved in it.

    Nothing but autograd's graph holds this object: it goes when backward has passed.
    """

    def __init__(self, function: Callable, inputs: tuple[Tensor, ...], saves_little: bool):
        # Not the module: hooks that it gets later are not of this call.
        self.function = function.forward if isinstance(function, nn.Module) else function
        self.inputs = [keep(x.detach(), hooks_around()) for x in inputs]
        self.saves = not saves_little
        self.needs_grad = [x.requires_grad and self.saves for x in inputs]
        device = inputs[0].device.type
        self.autocast = dict(
            device_type=device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
        )
        self.results = {}  # address -> (weak reference to the storage, dtype, version)
        self.versions = []  # of each tensor that autograd saved, None for no parameter

        # While backward is here:
        self.saved = {}  # number -> what autograd saved, until it has taken it
        self.found = {}  # dtype -> the result

    def add_result(self, y: Tensor) -> None:
        storage = y.untyped_storage()
        self.results[storage._cdata] = weakref.ref(storage), y.dtype, y._version
        RESULTS[storage._cdata] = self

    def pack(self, x: Tensor) -> int:
        self.versions.append(x._version if isinstance(x, nn.Parameter) else None)
        return len(self.versions) - 1

    def unpack(self, i: int) -> Tensor:
        if i not in self.saved:
            self.run()
        # Backward is past all products of the result, or it would not be inside the function.
        self.forget()
        return self.saved.pop(i)

    def forget(self, *_) -> None:
        self.found.clear()

    def release(self, *_) -> None:
        self.forget()
        # torch has no public name for it. A graph that is kept may come back.
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.inputs = None

    def result(self, dtype: torch.dtype) -> Tensor:
        if not self.found:
            self.run()
        if dtype not in self.found:
            (y,) = self.found.values()
            self.found[dtype] = y.to(dtype)
        return self.found[dtype]

    def run(self) -> None:
        if self.inputs is None:
            raise RuntimeError(
                "recompute: a product wants a result whose own backward has passed; give it the "
                "result itself, not result.detach()"
            )
        saved = []

        def pack(x: Tensor) -> None:
            saved.append(x.detach())

        inputs = []
        for kept, needs_grad in zip(self.inputs, self.needs_grad):
            inputs.append(kept.get().detach().requires_grad_(needs_grad))
        with (
            torch.set_grad_enabled(self.saves),
            torch.autocast(**self.autocast),
            saved_tensors_hooks(pack, lambda packed: packed),
        ):
            y = self.function(*inputs)
        if len(saved) != len(self.versions):
            raise RuntimeError(
                f"recompute: the function saved {len(self.versions)} tensors for backward at first "
                f"and {len(saved)} now; it must do the same at each call"
            )
        for tensor, version in zip(saved, self.versions):
            if version is not None:
                check_version(tensor, version)
        self.saved = dict(enumerate(saved))
        self.found = {y.dtype: y.detach()}


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
