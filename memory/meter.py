"""How much memory tensors take, on any device: all storages alive, asked for their size at each
operation.

    with Meter() as meter: ...            meter.peak, meter.now()

A storage that is freed by `resize_(0)` counts as empty, one that comes back counts again: counting
at allocation would miss both. Only what an operation has touched since the meter began is seen.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def nbytes(tensors) -> int:
    """Bytes of the storages of all these tensors, each once; a DTensor's are those of its local
    part."""
    storages = {}
    for x in tensors:
        x = x.to_local() if hasattr(x, "to_local") else x
        if x.device.type != "meta":
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
    return sum(storages.values())


class Meter(TorchDispatchMode):
    """peak: the most bytes that were alive after any operation since the meter began, or since
    reset()."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0  # address of the storage -> weak reference to it

    def now(self) -> int:
        total = 0
        for address, reference in list(self.storages.items()):
            storage = reference()
            if storage is None:
                del self.storages[address]
            else:
                total += storage.nbytes()
        return total

    def reset(self) -> None:
        self.peak = self.now()

    def watch(self, tree) -> None:
        for x in tree_iter(tree):
            if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type != "meta":
                storage = x.untyped_storage()
                if storage._cdata not in self.storages or self.storages[storage._cdata]() is None:
                    self.storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(t, "to_local") for t in types):
            # The operations on a DTensor's local part are seen one level down
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        self.watch((args, kwargs, out))
        self.peak = max(self.peak, self.now())
        return out


def measure(
    replicas,
    model,
    source,
    cls,
    groups,
    micro_batches=1,
    tokens=8,
    rank=0,
    world=1,
    steps=3,
    offload=None,
    autocast=None,
    **options,
) -> dict[str, float]:
    """Bytes this rank holds in the last of a few steps, each of `micro_batches` micro-batches of 1
    x tokens.

    replicas: a layout of parallel/protocol.py; model: on the meta device; source: see its
    init_weights; groups: model -> groups for cls; offload: what is done to the optimizer. Gives
    parameters, gradients (between the steps, and just before the last one), state, and peak: the
    most at any moment of the last step, all together.
    """
    model = replicas.parallelize(model)
    replicas.init_weights(source)
    optimizer = replicas.make_optimizer(cls, groups(model), **options)
    optimizer = offload(optimizer) if offload is not None else optimizer
    if hasattr(optimizer, "train"):
        optimizer.train()
    vocabulary = next(model.parameters()).shape[0]
    with Meter() as meter:
        for step in range(steps):
            parameters = nbytes(model.parameters())
            meter.reset()
            for i in range(micro_batches):
                ids = (
                    torch.arange(tokens).view(1, -1).add(step * 7 + i + rank).remainder(vocabulary)
                )
                replicas.last_micro_batch(i == micro_batches - 1)
                with torch.autocast(
                    "cpu", autocast or torch.bfloat16, enabled=autocast is not None
                ):
                    loss = model(ids, ids)
                (loss / (tokens * world * micro_batches)).backward()
                del loss
            replicas.finish_gradients()
            gradients = nbytes(replicas.gradients().values())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            model.zero_grad(set_to_none=True)
        state = nbytes(
            x for named in optimizer.state.values() for x in named.values() if torch.is_tensor(x)
        )
    return dict(parameters=parameters, gradients=gradients, state=state, peak=meter.peak)
