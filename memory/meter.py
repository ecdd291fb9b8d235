"""How much memory tensors take, on any device: the sizes of all living storages.

    with Meter() as meter: ...            meter.peak, meter.now()

The meter adds up the sizes after each operation. So a storage that `resize_(0)` frees counts as
empty, and counts again when it comes back; counting at allocation would miss both. It sees only
storages that an operation has touched since it began.

Example:
    import torch
    from memory.meter import Meter
    with Meter() as meter:
        x = torch.ones(1000)
        y = x.exp().sum()
    assert meter.peak == 4000 + 4000 + 4  # x, its exp and y
    assert meter.now() == 4000 + 4
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def nbytes(tensors) -> int:
    """Bytes of the storages of all these tensors, each once; a DTensor counts its local shard."""
    storages = {}
    for x in tensors:
        if hasattr(x, "to_local"):
            x = x.to_local()
        # A tensor on the meta device has a shape, but no bytes.
        if x.device.type != "meta":
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
    return sum(storages.values())


class Meter(TorchDispatchMode):
    """peak: the most bytes alive after any operation since the meter began, or since reset()."""

    def __init__(self):
        super().__init__()
        self.storages = {}  # address of a storage -> weak reference to it
        self.peak = 0

    def now(self) -> int:
        """Bytes alive now."""
        total = 0
        # Over a copy: the loop removes dead storages from the dict.
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
        """Counts the storages of all tensors in this tree from now on."""
        for x in tree_iter(tree):
            # Wrappers such as DTensor have no storage of their own.
            if type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type != "meta":
                storage = x.untyped_storage()
                # A new storage may have the address of one that is dead.
                if storage._cdata not in self.storages or self.storages[storage._cdata]() is None:
                    self.storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(t, "to_local") for t in types):
            # The operations on a DTensor's local shard come one level down.
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
    sequences=1,
    rank=0,
    world=1,
    steps=3,
    offload=None,
    autocast=None,
    **options,
) -> dict[str, float]:
    """Bytes this rank holds in the last of a few steps, of micro-batches of sequences x tokens.

    replicas: a layout of parallel/protocol.py; model: on the meta device; source: see init_weights
    there; groups: model -> groups for cls; offload: what is done to the optimizer. Returns
    parameters (between the steps), gradients (just before the last step), state, and peak: the most
    at any moment of the last step, all together.
    """
    # In train.py's order, so that the same tensors are alive as in a run.
    model = replicas.parallelize(model)
    replicas.init_weights(source)
    optimizer = replicas.make_optimizer(cls, groups(model), **options)
    if offload is not None:
        optimizer = offload(optimizer)
    if hasattr(optimizer, "train"):
        optimizer.train()
    vocabulary = next(model.parameters()).shape[0]
    with Meter() as meter:
        for step in range(steps):
            parameters = nbytes([*model.parameters(), *replicas.weights().values()])
            # Only the last step's peak counts: the first one makes the state.
            meter.reset()
            for i in range(micro_batches):
                ids = torch.arange(sequences * tokens).view(sequences, tokens)
                ids = ids.add(step * 7 + i + rank).remainder(vocabulary)
                replicas.last_micro_batch(i == micro_batches - 1)
                with torch.autocast(
                    "cpu", autocast or torch.bfloat16, enabled=autocast is not None
                ):
                    loss = model(ids, ids)
                (loss / (ids.numel() * world * micro_batches)).backward()
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


if __name__ == "__main__":
    with Meter() as meter:
        torch.ones(10**6).exp().sum()
    print(f"exp and sum of a million numbers: {meter.peak:,} bytes at most, {meter.now()} left")
