"""What a data-parallel layout has: everything that train.py asks of it, in the order of a run.

    once        replicas = ZeRO(group, device, ...)    group: the replicas; None: one replica
                model = replicas.parallelize(model)    real weights: all get rank 0's
                replicas.init_weights(source)          meta weights: all are functions of a name
                optimizer = replicas.make_optimizer(cls, groups)
                replicas.load_state_dict(read)                    where a run resumes

    each step   replicas.last_micro_batch(i + 1 == n), forward, backward      n times
                replicas.finish_gradients()
                gradients = replicas.gradients()                  to be measured and clipped
                optimizer.step()                                  or replicas.discard_step()

    at times    with replicas.outer_weights(): ...                to evaluate and to sample
                replicas.weights(), replicas.state_dict(state)    for a checkpoint

Layouts (ddp.py, zero.py, fsdp.py, diloco.py) inherit nothing: each is a class with all of these,
under these names, so that its file can be read and copied alone. A new one is a file here, its name
in settings/fields.py, a line in run/build.py and one in README.md. With group=None a layout sends
nothing. tests/test_protocol.py holds all of them against this file.

All replicas start alike. parallelize() keeps the weights of a model that has some and sends those
of rank 0 to all replicas, buffers too. For parameters on the meta device it sends nothing, and
init_weights(source) fills them. A forgotten finish_gradients(), or a last_micro_batch() without
which the sums would be wrong, is a RuntimeError of one sentence, at the latest in the next step(),
whoever made the optimizer.

Example:
    import torch
    from parallel.protocol import DataParallel

    class Alone:
        is_primary, also_first, backward_is_collective, sent_bytes = True, (), False, 0
        shards = weight_shards = {}
        parallelize = init_weights = make_optimizer = last_micro_batch = finish_gradients = print
        gradients = discard_step = outer_weights = broadcast_weights = weights = print
        state_dict = print

    assert not isinstance(Alone(), DataParallel)
    Alone.load_state_dict = print
    assert isinstance(Alone(), DataParallel)
    print("a layout has all of", *sorted(name for name in vars(Alone) if name[0] != "_"))
"""

import inspect
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer


@runtime_checkable
class DataParallel(Protocol):
    """The attributes and methods of a layout."""

    # No lower rank holds the same gradients and optimizer state.
    is_primary: bool
    # Names of the parameters, such as experts, of which that is so where is_primary is False.
    also_first: Collection[str]
    # Name -> (full shape, offsets) of each parameter that the optimizer steps shard by shard.
    shards: dict
    # The same of each plain tensor in weights() that is a shard. (A DTensor knows its own.)
    weight_shards: dict
    # Ranks wait for each other in every forward or backward.
    backward_is_collective: bool
    # By this rank in the last step, without what the optimizer sends.
    sent_bytes: int

    # ---- once ------------------------------------------------------------------------------------
    def parallelize(self, model: nn.Module) -> nn.Module:
        """Keeps what this rank holds of `model`: of rank 0's weights, on every replica.

        Parameters on the meta device get memory for init_weights() to fill, and nothing is sent.
        """

    def init_weights(self, source: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Fills every parameter held here from source(its name, its full shape), a full CPU tensor.

        A source may be able to give a shard alone, see fill in replicas.py. Also called later,
        when other weights replace those being trained.
        """

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> Optimizer:
        """An optimizer whose step() takes the gradients held here and moves all ranks' weights.

        groups: as torch's optimizers take them, or from optim/param_groups.py, with `names`.
        """

    # ---- each step -------------------------------------------------------------------------------
    def last_micro_batch(self, flag: bool) -> None:
        """Called before each micro-batch; flag: its backward completes the gradients.

        In a pipeline, called before the micro-batch's backward.
        """

    def finish_gradients(self) -> None:
        """After the last backward: waits until the gradients are the sums over all replicas.

        A gradient that no replica has is None.
        """

    def gradients(self) -> dict[str, Tensor]:
        """After finish_gradients: name -> the gradient, or its shard, that this rank holds.

        Whoever clips changes them in place.
        """

    def discard_step(self) -> None:
        """In place of optimizer.step(): these gradients are not used."""

    # ---- at times --------------------------------------------------------------------------------
    def outer_weights(self) -> AbstractContextManager:
        """In this context the model holds the weights to evaluate.

        Afterwards it holds the weights being trained again, bit for bit.
        """

    def broadcast_weights(self) -> None:
        """After anything but step() changed the optimizer's parameters: all ranks see it."""

    def weights(self) -> dict[str, Tensor]:
        """Name -> what this rank puts into a checkpoint as the model.

        It leaves out what a lower rank already puts there.
        """

    def state_dict(self, optimizer_state: dict) -> dict | None:
        """What this rank puts into a checkpoint as `replicas`, beside weights and optimizer state.

        optimizer_state: by name. None: no such entry.
        """

    def load_state_dict(self, read: Callable[[str], dict | int]) -> dict:
        """After init_weights: loads what `state_dict` gave, also on another number of replicas.

        read("a/b"): this part of the entries of all ranks, merged, or {}. Returns by name the
        optimizer state that this replica alone has; {} where the state saved for all is valid.
        """


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
