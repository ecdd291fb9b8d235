"""Local SGD and DiLoCo: replicas train alone for H steps, then go on together from an outer step.

    anchor ─┬─ replica 0: H steps on its own rows ─► weights 0 ─┬─ average, outer step ─► anchor ─┬─
            └─ replica 1: H steps on its own rows ─► weights 1 ─┘                                 └─

    Δ ← anchor - mean over replicas of their weights      the outer gradient
    m ← μ m + Δ                                           m starts at 0
    anchor ← anchor - ν (Δ + μ m)                         Nesterov;  anchor - ν m  without
    every replica's weights ← anchor                      its inner optimizer's state stays its own

    H `every`   ν `lr`   μ `momentum`

This is another algorithm than the plain run, not another layout of it: what comes out depends on
the number of replicas and on H. Only with every=1, lr=1, momentum=0 and an inner optimizer that is
linear in the gradients (SGD, also with momentum, Nesterov or weight decay; no clipping) it is the
same run: the mean of the replicas' steps is then the step by the mean gradient. Adam, Lion and Muon
are not linear: their mean step is not the step of the mean. With lr=1, momentum=0 and every > 1 it
is local SGD (Stich 2018, 1805.09767).

Each replica holds weights, gradients, inner state, anchor and m. Bytes sent per rank: nothing in
H - 1 steps, then 2 (N-1)/N x the weights' bytes (one all-reduce of weights 0 - anchor): on average
1/H of DDP's.

Our loss is divided by the tokens of the whole batch, so a replica's gradient is 1/N of its own
mean; it is multiplied by N, or replicas would learn N times too slowly. Norm and clipping are each
replica's own.

A gradient that is missing is missing for this replica's step alone, which leaves the parameter as
it is. In the outer step one is missing that no replica got in the whole round: anchor and m stay.
(So a round sends 2 (N-1)/N bytes a parameter tensor more, the roll call of parallel/ddp.py.)

The model that training is about is the anchor: it is what is evaluated, sampled and saved as the
model; what replicas did since the last outer step is in the checkpoint, but not in the anchor. So
let `steps` be a multiple of `every`.

Reference: Douillard et al. 2023, DiLoCo (2311.08105): AdamW inside, H = 500, ν = 0.7, μ = 0.9.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.allocate import allocate
from parallel.ddp import cut
from parallel.roll_call import RollCall


class DiLoCo:
    """A data-parallel layout, see parallel/protocol.py. With group=None (one replica) nothing is
    sent, but the outer step is taken all the same.

    group: the replicas; device: where the weights live; every: inner steps per outer step; lr,
    momentum, nesterov: the outer SGD's; bucket_mb: how much of the weights is averaged at a time,
    MiB.
    """

    is_primary = True  # each replica clips by the norm of its own gradient
    shards: dict = {}  # the optimizer sees full parameters
    backward_is_collective = False  # replicas train alone

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        every: int,
        lr: float = 0.7,
        momentum: float = 0.9,
        nesterov: bool = True,
        bucket_mb: float = 25.0,
    ):
        if every < 1:
            raise ValueError(
                f"every={every}: an outer step needs at least 1 inner step; DiLoCo takes 500"
            )
        if not 0 < lr < float("inf"):
            raise ValueError(
                f"the outer lr={lr} must be above 0; 0.7 is usual, 1 is plain averaging"
            )
        if not 0 <= momentum < 1:
            raise ValueError(
                f"the outer momentum={momentum} lies in [0, 1); 0.9 is usual, 0 is none"
            )
        self.group, self.device, self.every, self.bucket_bytes = (
            group,
            device,
            every,
            bucket_mb * 2**20,
        )
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self.rank, self.world = (0, 1) if group is None else (group.rank(), group.size())
        self.taken = 0  # inner steps since the last outer step
        self.moved: set[str] = set()  # parameters that had a gradient here in one of them
        self.sent_bytes = 0  # by this rank in the last step

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Allocates the parameters of `model`, which are on the meta device."""
        self.model = allocate(model, self.device)
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return self.model

    @torch.no_grad()
    def init_weights(self, source: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Every parameter from source(its name, its full shape), a full CPU tensor: the first
        anchor."""
        for name, p in self.model.named_parameters():
            p.copy_(source(name, tuple(p.shape)))
        self.anchor = {name: p.detach().clone() for name, p in self.params.items()}
        self.outer_momentum = {name: torch.zeros_like(x) for name, x in self.anchor.items()}

    def last_micro_batch(self, flag: bool) -> None:
        """Nothing is sent during backward."""

    def finish_gradients(self) -> None:
        """After the last backward: the mean gradient of this replica's own rows."""
        self.sent_bytes = 0
        if gradients := list(self.gradients().values()):
            torch._foreach_mul_(gradients, self.world)

    def gradients(self) -> dict[str, Tensor]:
        """After finish_gradients: this replica's own gradients by name."""
        return {n: p.grad for n, p in self.params.items() if p.grad is not None}

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> torch.optim.Optimizer:
        """The inner optimizer; each `every`-th step() ends with the outer step. All replicas have
        to take the same number of steps: whoever skips one has to make all skip it."""
        if hasattr(cls, "eval"):
            raise ValueError(
                f"{cls.__name__} keeps a second set of weights, which DiLoCo would not average; "
                "take another optimizer, such as adamw"
            )
        optimizer = cls(groups, **arguments)
        optimizer.register_step_pre_hook(lambda *_: self.moved.update(self.gradients()))
        optimizer.register_step_post_hook(lambda *_: self.after_step())
        return optimizer

    def after_step(self) -> None:
        self.taken += 1
        if self.taken == self.every:
            self.outer_step()
            self.taken, self.moved = 0, set()

    @torch.no_grad()
    def outer_step(self) -> None:
        names = list(self.params)
        still = [i for i, name in enumerate(names) if name not in self.moved]
        if self.group is not None and names:
            call = RollCall([name in self.moved for name in names], self.group, self.device)
            still = call.nowhere(still)
            self.sent_bytes += call.sent_bytes
        still = {names[i] for i in still}
        for part in cut(list(self.params.items()), self.bucket_bytes):
            flat = torch.cat([(self.anchor[name] - p).flatten() for name, p in part])
            if self.group is not None:
                dist.all_reduce(flat, group=self.group)
                self.sent_bytes += 2 * (self.world - 1) * flat.nbytes // self.world
            for (name, p), delta in zip(
                part, flat.div_(self.world).split([p.numel() for _, p in part])
            ):
                delta, m, anchor = delta.view_as(p), self.outer_momentum[name], self.anchor[name]
                if name not in still:
                    m.mul_(self.momentum).add_(delta)
                    anchor.sub_(delta + self.momentum * m if self.nesterov else m, alpha=self.lr)
                p.copy_(anchor)

    @contextmanager
    def outer_weights(self) -> Iterator[None]:
        """Inside, the model holds the anchor, to be evaluated or sampled; afterwards this replica's
        weights, bit for bit."""
        own = {name: p.detach().clone() for name, p in self.params.items()}
        torch._foreach_copy_([p.detach() for p in self.params.values()], list(self.anchor.values()))
        yield
        torch._foreach_copy_([p.detach() for p in self.params.values()], list(own.values()))

    def broadcast_weights(self) -> None:
        """Nobody but step() changes the weights."""

    def weights(self) -> dict[str, Tensor]:
        """By name, what this rank has to put into a checkpoint as the model: the anchor."""
        return (
            {n: self.anchor.get(n, p) for n, p in self.model.named_parameters()}
            if self.rank == 0
            else {}
        )

    def discard_step(self) -> None:
        """Nothing is kept of a step whose gradients are not used."""

    def state_dict(self, optimizer_state: dict[str, dict]) -> dict | None:
        """What this rank has to put into a checkpoint beside the anchor.

        optimizer_state: this replica's inner one by parameter name. Between outer steps its weights
        too, and which of them it has moved.
        """
        weights = {name: p.detach() for name, p in self.params.items()} if self.taken else {}
        shared = {
            "replicas": self.world,
            "taken": self.taken,
            "outer_momentum": self.outer_momentum,
        }
        moved = {name: int(name in self.moved) for name in weights}
        return shared | {
            str(self.rank): {"weights": weights, "moved": moved, "optim": optimizer_state}
        }

    @torch.no_grad()
    def load_state_dict(self, read: Callable[[str], dict | int]) -> dict[str, dict]:
        """After init_weights with the saved anchor: takes up what `state_dict` gave, and returns
        this replica's inner optimizer state by parameter name ({} if nobody with its number was
        saved).

        read("3/weights") is that part of the trees of all ranks, merged, or {}. On the same number
        of replicas the run goes on bitwise. On another number all start from the mean of the saved
        replicas' weights, so that the outer gradient keeps what they did since the anchor.
        """
        self.taken, saved, self.moved = read("taken"), read("replicas"), set()
        for name, x in read("outer_momentum").items():
            self.outer_momentum[name].copy_(x)
        if self.taken:
            which = [self.rank] if saved == self.world else range(saved)
            for i, r in enumerate(which):
                moved = read(f"{r}/moved") or dict.fromkeys(self.params, 1)  # older: not saved
                self.moved |= {name for name, yes in moved.items() if yes}
                for name, x in read(f"{r}/weights").items():
                    x = x.to(self.device) / len(which)
                    self.params[name].copy_(self.params[name] + x if i else x)
        return read(f"{self.rank}/optim")
