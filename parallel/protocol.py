"""What a data-parallel layout has: everything that train.py asks of one, in the order of a run.

    once        replicas = ZeRO(group, device, ...)    group: the replicas, None where there is one
                model = replicas.parallelize(model)
                replicas.init_weights(source)
                optimizer = replicas.make_optimizer(cls, groups)
                replicas.load_state_dict(read)                    a run that goes on

    each step   replicas.last_micro_batch(i + 1 == n), forward, backward      n times
                replicas.finish_gradients()
                gradients = replicas.gradients()                  to be measured and clipped
                optimizer.step()                                  or replicas.discard_step()

    at times    with replicas.outer_weights(): ...                to evaluate and to sample
                replicas.weights(), replicas.state_dict(state)    a checkpoint

Layouts (ddp.py, zero.py, fsdp.py, diloco.py) inherit nothing: each is a class with all of these,
under these names, so that its file can be read and copied alone. A new one is a file here, its name
in settings/fields.py, a line in run/build.py and one in README.md. With group=None a layout sends
nothing. tests/test_protocol.py holds all of them against this file.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer


@runtime_checkable
class DataParallel(Protocol):
    is_primary: bool  # no lower rank holds the same gradients and optimizer state
    shards: dict  # name -> Shard of each parameter of which the optimizer has one
    backward_is_collective: bool  # do ranks wait for each other in every forward or backward?
    sent_bytes: int  # by this rank in the last step, but for what the optimizer sends

    # ---- once ------------------------------------------------------------------------------------
    def parallelize(self, model: nn.Module) -> nn.Module:
        """Allocates what this rank holds of `model`, whose parameters are on the meta device."""

    def init_weights(self, source: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Every parameter held here from source(its name, its whole shape), a whole CPU tensor;
        also later, when other weights replace those of training."""

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> Optimizer:
        """The optimizer whose step() takes the gradients held here and moves the weights of all
        ranks. groups: of optim/param_groups.py, each with `params` and their `names`."""

    # ---- each step -------------------------------------------------------------------------------
    def last_micro_batch(self, flag: bool) -> None:
        """Before each micro-batch (in a pipeline, its backward): does backward now complete the
        gradients?"""

    def finish_gradients(self) -> None:
        """After the last backward: waits until the gradients are the sums over all replicas. What
        no replica has is None."""

    def gradients(self) -> dict[str, Tensor]:
        """After finish_gradients: by name, the gradients, or parts of them, that this rank holds;
        whoever clips changes them in place."""

    def discard_step(self) -> None:
        """In place of optimizer.step(): these gradients are not used."""

    # ---- at times --------------------------------------------------------------------------------
    def outer_weights(self) -> AbstractContextManager:
        """`with` this: the model holds the weights to evaluate; afterwards those of training, bit
        for bit."""

    def broadcast_weights(self) -> None:
        """After something else than step() changed the optimizer's parameters: the other ranks see
        it too."""

    def weights(self) -> dict[str, Tensor]:
        """By name, what this rank has to put into a checkpoint as the model: nothing a lower rank
        already puts there."""

    def state_dict(self, optimizer_state: dict) -> dict | None:
        """What this rank has to put into a checkpoint beside weights and optimizer state (by
        name), its entry `replicas`; None for no entry."""

    def load_state_dict(self, read: Callable[[str], dict | int]) -> dict:
        """After init_weights: takes up what `state_dict` gave, also on another number of replicas;
        read("a/b") is that part of the entries of all ranks, merged, or {}. Returns by name the
        optimizer state that this replica alone has; {} where the one saved for all holds."""
