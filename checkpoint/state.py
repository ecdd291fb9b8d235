"""Everything a step depends on: collected for a checkpoint, put back from one, on any layout.

model               the weights to evaluate, sample and export: Schedule-Free's average, the
                    best ones once early stopping has chosen, else those of training
training_weights    those that training goes on from, where they are others
optim               state by parameter name, what the groups count
replicas            what the layout keeps beside: residuals of compression, DiLoCo's outer step
fp8, scaler, guard, progress, best        one tree for each thing in `kept`
rng                 torch's generator of each rank; train.py never draws from it, a fork may
"""

import contextlib
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
    """optimizer, replicas: the run's; shards: of parameters of which the optimizer has one;
    tp_shards: of those that parallel/tensor.py has divided; kept: name -> anything with tree() and
    load(tree)."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        replicas: DataParallel,
        shards: dict[str, Shard],
        tp_shards: dict[str, Shard],
        mesh: Mesh,
        kept: dict,
    ):
        self.optimizer, self.replicas = optimizer, replicas
        self.shards, self.tp_shards = shards, tp_shards
        self.mesh, self.kept, self.training = mesh, kept, None

    def outside(self):
        """with this: the model holds the weights that others are to have, and afterwards the very
        bits it had. Gives those that training goes on from, by name; {} where they are the same."""
        if self.training is not None:
            return contextlib.nullcontext(self.training)
        return param_groups.evaluation_weights(self.optimizer, self.replicas.broadcast_weights)

    @contextlib.contextmanager
    def looking(self):
        """The same to evaluate and sample: DiLoCo's replicas then hold what they last agreed on."""
        with self.outside(), self.replicas.outer_weights():
            yield

    def counted(self, by_name: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Those of a tensor for each parameter of which no other rank brings the same numbers."""
        tied_copy = {"embed.weight"} if self.mesh.coords["pp"] > 0 else {}
        # The rest is alike on all tp ranks
        mine = self.tp_shards if self.mesh.coords["tp"] > 0 else by_name
        return [
            x
            for n, x in by_name.items()
            if self.replicas.is_primary and n in mine and n not in tied_copy
        ]

    def norm(self, gradients: dict[str, torch.Tensor], everywhere: bool = True) -> torch.Tensor:
        """The 2-norm of the gradients of all ranks, or only of this one, each number counted
        once."""
        return self.mesh.norm(self.counted(gradients), everywhere)

    def weights(self) -> dict:
        """What the model holds now, for a checkpoint."""
        return slices.as_slices(self.replicas.weights(), self.tp_shards)

    @contextlib.contextmanager
    def tree(self):
        """This rank's part of a checkpoint. It is not a copy, and holds inside alone."""
        state = param_groups.state_by_name(self.optimizer)
        state["state"] = slices.as_slices(state["state"], self.shards)
        tree = {name: part.tree() for name, part in self.kept.items()}
        tree |= {"rng": {str(self.mesh.rank): torch.get_rng_state()}}
        tree |= {"optim": state} if self.replicas.is_primary else {}
        beside = self.replicas.state_dict(state["state"])
        tree |= {"replicas": beside} if beside is not None else {}
        with self.outside() as training:
            if training and self.replicas.is_primary:
                tree["training_weights"] = slices.as_slices(training, self.shards)
            yield tree | {"model": self.weights()}

    def save(self, saver: Saver, step: int, metadata: dict, last: bool = False) -> None:
        """A checkpoint of all of it, and of `metadata`. last: returns when it is on the disk."""
        with self.tree() as tree:
            saver.save(step, metadata | tree, last)

    def with_weights(self, metadata: dict) -> dict:
        """`metadata` and the weights alone, for a checkpoint that nobody trains on from."""
        return metadata | {"model": self.weights()}

    def load(self, saved: checkpoint.Checkpoint, names=None) -> None:
        """All of it but the weights. names: of `kept`, None for all."""
        with checkpoint.reading(saved.path):
            self._load(saved, names)

    def _load(self, saved: checkpoint.Checkpoint, names) -> None:
        # A replica that trains alone has an optimizer state of its own
        own = self.replicas.load_state_dict(lambda path: saved.tree(f"replicas/{path}", missing={}))

        def state_of(name: str, shape: tuple[int, ...]) -> dict:
            return own.get(name) or saved.tree(
                f"optim/state/{name}", self.shards.get(name), shape, missing={}
            )

        param_groups.load_state_by_name(self.optimizer, saved.tree("optim/groups"), state_of)
        for name in self.kept if names is None else names:
            self.kept[name].load(saved.tree(name, missing={}))
        rng = saved.tree("rng")
        torch.set_rng_state(rng.get(str(self.mesh.rank), rng["0"]))

    def take_best(self, path: Path) -> str:
        """From now on the model holds these weights, and those of training are kept beside. What to
        say."""
        try:
            saved = checkpoint.load(path)
        except ValueError as error:
            return f"the best weights are lost, the last ones stay: {error}"
        groups = self.optimizer.param_groups
        self.training = {
            n: p.detach().clone() for g in groups for n, p in zip(g["names"], g["params"])
        }
        self.replicas.init_weights(sharded(saved.weights("model"), self.tp_shards))
        return f"the best weights are those of step {saved.step}"


def training_weights(saved: checkpoint.Checkpoint):
    """The weights that training goes on from, by name and shape."""
    return saved.weights("training_weights" if saved.has("training_weights") else "model")


class Disk:
    """The run's checkpoints as what a rollback goes back to: SnapshotBuffer's interface, on
    any layout."""

    def __init__(self, out_dir: Path, state: State, saver: Saver):
        self.out_dir, self.state, self.saver = out_dir, state, saver

    def snapshot(self, step: int, more=None) -> None:
        """Saving is train.py's."""

    def restore(self, before: int, back: int = 1) -> tuple | None:
        """The back-th newest whole checkpoint of a step before this one, or the oldest: (step, the
        guard's memory and the next row then); None where there is none."""
        self.saver.wait()  # its end deletes old ones
        mesh, found = self.state.mesh, []
        if mesh.rank == 0:
            found = checkpoint.before(self.out_dir, before, back)
        step = mesh.agree(found[-1].step if found else -1)
        if step < 0:
            return None
        saved = checkpoint.load(self.out_dir / f"step-{step:08d}", verify=False)
        self.state.replicas.init_weights(sharded(training_weights(saved), self.state.tp_shards))
        self.state.load(saved, self.state.kept.keys() - {"progress", "best", "guard"})
        return step, (saved.tree("guard/seen"), saved.tree("progress")["rows"])
