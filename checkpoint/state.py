"""Everything a step depends on: collected for a checkpoint, put back from one, on any layout.

branch of the tree     what it holds
model                  the weights to evaluate, sample and export: an average (Schedule-Free's,
                       --ema's), the best weights once early stopping has chosen, else the trained
                       ones
training_weights       the weights that training continues from, where they are different
optim                  optimizer state by parameter name, and the counters of the groups
replicas               what the layout keeps: residuals of compression, DiLoCo's outer step
fp8, scaler, guard,    the state_dict() of each object in `kept`
progress, best
rng                    a row for each rank: the state of torch's generator. train.py never draws
                       from it, a fork may
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from checkpoint import load as checkpoint
from checkpoint import slices
from checkpoint.save import Saver
from optim import param_groups
from parallel.mesh import Mesh
from parallel.protocol import DataParallel
from parallel.shard import Shard, sharded


class State:
    """The state of one run on this rank.

    balance: run.balance.Balance, the experts' biases; shards: parameter name -> Shard, where the
    optimizer has only a shard of the parameter;
    tp_shards: the same where parallel/tensor.py has divided a parameter; kept: name -> any object
    with state_dict() and load_state_dict().
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        replicas: DataParallel,
        balance,
        shards: dict[str, Shard],
        tp_shards: dict[str, Shard],
        mesh: Mesh,
        kept: dict,
    ):
        self.optimizer = optimizer
        self.replicas = replicas
        self.balance = balance
        self.shards = shards
        self.tp_shards = tp_shards
        self.mesh = mesh
        self.kept = kept
        self.training = None  # after restore_best: name -> the weights that training had

    def exported_weights(self, **options):
        """`with` this: the model holds the weights that others get, then its own ones again.

        options: see optim.param_groups.evaluation_weights. They come back bit for bit. Yields the
        weights that training continues from, by name, or {} where they are the same.
        """
        if self.training is not None:
            return contextlib.nullcontext(self.training)
        return param_groups.evaluation_weights(self.optimizer, self.share_weights, **options)

    def share_weights(self) -> None:
        """Tells the model, on all ranks, that the optimizer's parameters have changed."""
        # Under tensor parallelism owners step full copies (parallel/adapter.py).
        if hasattr(self.optimizer, "share_weights"):
            self.optimizer.share_weights()
        self.replicas.broadcast_weights()

    @contextlib.contextmanager
    def eval_weights(self, **options):
        """`with` this: the model holds the weights to evaluate and to sample with.

        DiLoCo's replicas, which differ while they train, hold the weights they last agreed on.
        """
        with self.exported_weights(**options), self.replicas.outer_weights():
            yield

    def held_first(self, by_name: dict) -> dict:
        """Without the parameters whose gradients and state a lower replica holds, too."""
        replicas = self.replicas
        return {n: x for n, x in by_name.items() if replicas.is_primary or n in replicas.also_first}

    def deduplicate(self, by_name: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The tensors this rank contributes to a global sum, so that each value is counted once.

        by_name: parameter name -> any tensor that belongs to the parameter, such as its gradient.
        """
        is_first_stage = self.mesh.coords["pp"] == 0
        is_first_tp_rank = self.mesh.coords["tp"] == 0
        found = []
        for name, x in self.held_first(by_name).items():
            # A tied embedding is on the first and on the last stage of a pipeline.
            is_copy_of_tied = name == "embed.weight" and not is_first_stage
            # What tensor parallelism has not divided is the same on all its ranks.
            is_only_here = name in self.tp_shards or is_first_tp_rank
            if is_only_here and not is_copy_of_tied:
                found.append(x)
        return found

    def norm(self, gradients: dict[str, torch.Tensor], everywhere: bool = True) -> torch.Tensor:
        """The 2-norm of the gradients, a 0-D tensor; each value is counted once.

        everywhere: over all ranks, and the same on all; else over this rank's replica alone.
        """
        norm = self.mesh.norm(self.deduplicate(gradients), everywhere)
        # A rank whose gradients another rank counts clips them where they are: on the host, maybe.
        for gradient in gradients.values():
            return norm.to(gradient.device)
        return norm

    def weights(self) -> dict:
        """What the model holds now, for a checkpoint."""
        shards = {name: Shard(*where) for name, where in self.replicas.weight_shards.items()}
        held = self.replicas.weights()
        # All replicas have the same biases.
        if self.mesh.coords["dp"] == self.mesh.coords["cp"] == 0:
            held = held | self.balance.weights()
        return slices.as_slices(held, self.tp_shards | shards)

    @contextlib.contextmanager
    def state_dict(self):
        """`with` this as tree: this rank's part of a checkpoint. No copy: valid inside alone."""
        optim = param_groups.state_by_name(self.optimizer)
        optim["state"] = slices.as_slices(self.held_first(optim["state"]), self.shards)
        tree = {name: part.state_dict() for name, part in self.kept.items()}
        rng = torch.get_rng_state()
        rows = Shard((self.mesh.world, len(rng)), (self.mesh.rank, 0))
        tree["rng"] = slices.Slice(rng[None], rows)
        if self.replicas.is_primary or optim["state"]:
            tree["optim"] = optim
        # Even a rank that is not primary may keep something: its own residuals, for instance.
        of_layout = self.replicas.state_dict(optim["state"])
        if of_layout is not None:
            tree["replicas"] = of_layout
        with self.exported_weights() as training:
            if training:
                training = self.held_first(self.balance.weights() | training)
            if training:
                tree["training_weights"] = slices.as_slices(training, self.shards)
            yield tree | {"model": self.weights()}

    def save(self, saver: Saver, step: int, metadata: dict, last: bool = False) -> None:
        """A checkpoint of everything, and of `metadata`. last: returns when it is on the disk."""
        with self.state_dict() as tree:
            saver.save(step, metadata | tree, last)

    def with_weights(self, metadata: dict) -> dict:
        """`metadata` and the weights alone, for a checkpoint from which nobody continues."""
        return metadata | {"model": self.weights()}

    def load_state_dict(self, saved: checkpoint.Checkpoint, names=None) -> None:
        """Takes up everything but the weights. names: which of `kept`; None means all of them.

        Raises ValueError where the checkpoint holds what this program does not write.
        """
        with checkpoint.reading(saved.path):
            self._load(saved, names)

    def _load(self, saved: checkpoint.Checkpoint, names) -> None:
        # Between two rounds of DiLoCo each replica has an optimizer state of its own.
        own = self.replicas.load_state_dict(lambda path: saved.tree(f"replicas/{path}", missing={}))

        def state_of(name: str, shape: tuple[int, ...]) -> dict:
            if own.get(name):
                return own[name]
            return saved.tree(f"optim/state/{name}", self.shards.get(name), shape, missing={})

        param_groups.load_state_by_name(self.optimizer, saved.tree("optim/groups"), state_of)
        for name in self.kept if names is None else names:
            self.kept[name].load_state_dict(saved.tree(name, missing={}))
        torch.set_rng_state(rng_of(saved, self.mesh.rank))

    def init_weights(self, source: Callable) -> None:
        """Fills the model from a source of full tensors, as replicas.init_weights() takes one."""
        self.replicas.init_weights(sharded(source, self.tp_shards))
        self.balance.init_weights(source)
        # Under tensor parallelism owners step full copies (parallel/adapter.py).
        if hasattr(self.optimizer, "gather_weights"):
            self.optimizer.gather_weights()

    def restore_best(self, path: Path) -> str:
        """From now on the model holds the best weights, from the checkpoint at `path`.

        The trained weights are kept, for the checkpoint. Returns a line for people.
        """
        try:
            saved = checkpoint.load(path)
        except ValueError as error:
            return f"the best weights are lost, the last ones stay: {error}"
        self.training = {name: bias.clone() for name, bias in self.balance.weights().items()}
        for group in self.optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                self.training[name] = p.detach().clone()
        self.init_weights(saved.weights("model"))
        return f"the best weights are from step {saved.step}"


def rng_of(saved: checkpoint.Checkpoint, rank: int) -> torch.Tensor:
    """The state of the generator of this rank; of rank 0, where the run had fewer ranks then."""
    if "rng" not in saved.names():
        # Before format 2 each rank's state had a name of its own.
        rng = saved.tree("rng")
        return rng.get(str(rank), rng["0"])
    n_saved, n_bytes = saved.shape("rng")
    row = rank if rank < n_saved else 0
    return saved.tensor("rng", (row, 0), (1, n_bytes))[0]


def training_weights(saved: checkpoint.Checkpoint):
    """The weights that training continues from, as a function of a parameter's name and shape."""
    return saved.weights("training_weights" if saved.has("training_weights") else "model")


class Disk:
    """The run's checkpoints as what a rollback returns to, on any layout.

    It has the two methods of SnapshotBuffer, and takes its place where no state is kept in memory.
    """

    def __init__(self, out_dir: Path, state: State, saver: Saver):
        self.out_dir = out_dir
        self.state = state
        self.saver = saver

    def snapshot(self, step: int, more=None) -> None:
        """Nothing: train.py saves."""

    def restore(self, before: int, back: int = 1) -> tuple | None:
        """Puts back the back-th newest intact checkpoint older than step `before`, or the oldest.

        Returns (its step, (what the monitor had seen, the next sample then)); None where there is
        no checkpoint.
        """
        # A save that ends now may delete what we are about to read.
        self.saver.wait()
        # Rank 0 reads every byte, and the others trust its choice.
        mesh = self.state.mesh
        found = []
        if mesh.rank == 0:
            found = checkpoint.before(self.out_dir, before, back)
        step = mesh.agree(found[-1].step if found else -1)
        if step < 0:
            return None
        saved = checkpoint.load(self.out_dir / f"step-{step:08d}", verify=False)
        self.state.init_weights(training_weights(saved))
        # The monitor and early stopping remember what happened; the monitor moves the cursor.
        others = self.state.kept.keys() - {"progress", "best", "guard"}
        self.state.load_state_dict(saved, others)
        return step, (saved.tree("guard/seen"), saved.tree("progress")["rows"])
