"""Local SGD and DiLoCo: replicas train alone for H steps, then an outer step brings them together.

    anchor ─┬─ replica 0: H steps, own samples ─► weights 0 ─┬─ average, outer step ─► anchor ─┬─
            └─ replica 1: H steps, own samples ─► weights 1 ─┘                                 └─

    Δ ← anchor - mean over replicas of their weights      the outer gradient
    m ← μ m + Δ                                           m starts at 0
    anchor ← anchor - ν (Δ + μ m)                         Nesterov;  anchor - ν m  without
    every replica's weights ← anchor                      each inner optimizer keeps its state

    H `every`   ν `lr`   μ `momentum`

This is another algorithm than the plain run, not another layout of it: the result depends on the
number of replicas and on H. It is the same run only with every=1, lr=1, momentum=0 and an inner
optimizer that is linear in the gradients (SGD, also with momentum, Nesterov or weight decay, but
without clipping). Then the mean of the replicas' steps is the step by the mean gradient. Adam, Lion
and Muon are not linear.

With lr=1, momentum=0 and every > 1 this is local SGD (Stich 2018, 1805.09767).

Each replica holds weights, gradients, inner state, anchor and m. Bytes sent per rank: nothing in
H - 1 steps, then 2 (N-1)/N x the weights' bytes (one all-reduce of weights - anchor). On average
that is 1/H of DDP's bytes.

The loss is divided by the tokens of the whole batch, so a replica's gradient is 1/N of its own
mean. It is multiplied by N, or replicas would learn N times too slowly. Each replica has its own
gradient norm and clips by it.

In an inner step a gradient is missing for one replica alone, which leaves the parameter as it is.
In the outer step a parameter is missing if no replica had a gradient for it in the whole round:
then its anchor and m stay. (So a round sends another 2 (N-1)/N bytes for each parameter tensor, the
roll call of parallel/replicas.py.)

The anchor is the result of training. It is evaluated, sampled and saved as the model. What the
replicas did since the last outer step is in the checkpoint, but not in the anchor. So let `steps`
be a multiple of `every`.

parallelize(model) keeps the model's own weights and gives every replica those of rank 0, and its
buffers: they are the first anchor. For parameters on the meta device nothing is sent, and
init_weights(source) gives every replica the same. A step() before finish_gradients(), or by an
optimizer that make_optimizer() has not made and after which no outer step would come, is a
RuntimeError. last_micro_batch() does nothing here, so it may be forgotten.

Reference: Douillard et al. 2023, DiLoCo (2311.08105): AdamW inside, H = 500, ν = 0.7, μ = 0.9.

Neighbours: parallel/replicas.py

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from parallel.diloco import DiLoCo

    def train(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        torch.manual_seed(rank)  # rank 0's weights count
        replicas = DiLoCo(dist.group.WORLD, torch.device("cpu"), every=10, momentum=0.5)
        model = replicas.parallelize(torch.nn.Linear(4, 1))
        optimizer = replicas.make_optimizer(torch.optim.AdamW, model.parameters(), lr=0.03)
        apart = []
        for step in range(60):
            x = torch.randn(16, 4)  # this rank's own samples
            loss = (model(x) - x.sum(1, keepdim=True)).square().sum() / 32
            loss.backward()  # 32: the samples of both ranks
            replicas.finish_gradients()
            optimizer.step()
            optimizer.zero_grad()
            first = loss.item() if step == 0 else first
            weights = [torch.empty(1, 4) for _ in range(2)]
            dist.all_gather(weights, model.weight.detach())
            apart.append(not torch.equal(*weights))
        assert any(apart) and not any(apart[9::10]) and loss < first / 2
        if rank == 0:
            print(f"loss {first:.2f} -> {loss:.2f}, the same on both ranks:", weights[0].tolist())
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(train, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.replicas import (
    RollCall,
    StepGuard,
    allocate,
    broadcast_start,
    fill,
    make_buckets,
    on_gradient,
    split_like,
)

NOT_OURS = (
    "under DiLoCo only the optimizer that make_optimizer() returns may step the model, for its "
    "step() brings the replicas together; make yours by replicas.make_optimizer(cls, groups, lr=..)"
)


class DiLoCo:
    """A data-parallel layout (parallel/protocol.py).

    group: the replicas; None is one replica, which sends nothing but takes outer steps all the same
    device: where the weights live
    every: inner steps per outer step
    lr, momentum, nesterov: of the outer SGD
    bucket_mb: how much of the weights is averaged at a time, in MiB

    Raises ValueError for every, lr or momentum out of range.
    """

    also_first = ()
    is_primary = True  # each replica clips by the norm of its own gradient
    shards: dict = {}  # the optimizer sees full parameters
    weight_shards: dict = {}
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
        self.group = group
        self.device = device
        self.every = every
        self.lr = lr
        self.momentum = momentum
        self.nesterov = nesterov
        self.bucket_bytes = bucket_mb * 2**20
        self.rank = 0
        self.world = 1
        if group is not None:
            self.rank = group.rank()
            self.world = group.size()
        self.taken = 0  # inner steps since the last outer step
        self.moved: set[str] = set()  # parameters that had a gradient here in one of those steps
        self.unfinished = False  # a gradient came after the last finish_gradients()
        self.sent_bytes = 0  # by this rank in the last step

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Gives all replicas rank 0's weights, which are the first anchor; returns `model`.

        Parameters on the meta device get memory instead, for init_weights() to fill.
        """
        is_meta = any(p.is_meta for p in model.parameters())
        broadcast_start(model, self.group, self.device)
        self.model = allocate(model, self.device)
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.guard = StepGuard(self, self.model.parameters, only_own=NOT_OURS)
        if self.world > 1:
            for p in self.params.values():
                on_gradient(p, self.arrived)
        if not is_meta:
            self.drop_anchor()
        return self.model

    def arrived(self, _) -> None:
        """A backward has added to a gradient."""
        self.unfinished = True

    def drop_anchor(self) -> None:
        """The weights are the anchor from now on."""
        # Frozen parameters have no anchor: they are the same on every replica.
        self.anchor = {name: p.detach().clone() for name, p in self.params.items()}
        self.outer_momentum = {name: torch.zeros_like(x) for name, x in self.anchor.items()}

    @torch.no_grad()
    def init_weights(self, source: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Sets every parameter to source(its name, its full shape), a full tensor on the CPU.

        These weights are the first anchor.
        """
        for name, p in self.model.named_parameters():
            fill(p, source, name)
        self.drop_anchor()

    # ---- inner steps: each replica alone ---------------------------------------------------------
    def last_micro_batch(self, flag: bool) -> None:
        """Nothing is sent during backward."""

    def finish_gradients(self) -> None:
        """After the last backward: the mean gradient of this replica's own samples."""
        self.sent_bytes = 0
        self.unfinished = False
        gradients = list(self.gradients().values())
        if gradients:
            # The loss was divided by the tokens of all replicas.
            torch._foreach_mul_(gradients, self.world)

    def gradients(self) -> dict[str, Tensor]:
        """After finish_gradients: this replica's own gradients by name."""
        return {name: p.grad for name, p in self.params.items() if p.grad is not None}

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> torch.optim.Optimizer:
        """The inner optimizer; every `every`-th step() ends with the outer step.

        step() raises RuntimeError if finish_gradients() has not scaled the gradients yet.
        All replicas must take the same number of steps: if one skips a step, all must skip it.
        Raises ValueError for an optimizer with two sets of weights, such as Schedule-Free.
        """
        if hasattr(cls, "eval"):
            raise ValueError(
                f"{cls.__name__} keeps a second set of weights, which DiLoCo would not average; "
                "take another optimizer, such as adamw"
            )
        optimizer = self.guard.admit(cls(groups, **arguments))
        # Whether a parameter has moved is seen before the step, for step() may clear gradients.
        optimizer.register_step_pre_hook(lambda *_: self.moved.update(self.gradients()))
        optimizer.register_step_post_hook(lambda *_: self.after_inner_step())
        return optimizer

    def after_inner_step(self) -> None:
        self.taken += 1
        if self.taken == self.every:
            self.outer_step()
            self.taken = 0
            self.moved = set()

    def discard_step(self) -> None:
        """In place of optimizer.step(). Nothing to undo: the next zero_grad drops the gradients."""

    # ---- the outer step: all replicas together ---------------------------------------------------
    @torch.no_grad()
    def outer_step(self) -> None:
        unmoved = self.unmoved_everywhere()
        for named in make_buckets(list(self.params.items()), self.bucket_bytes):
            # A bucket at a time: for the whole model `flat` would be one more copy of the weights.
            flat = torch.cat([(self.anchor[name] - p).flatten() for name, p in named])
            if self.group is not None:
                dist.all_reduce(flat, group=self.group)
                self.sent_bytes += 2 * (self.world - 1) * flat.nbytes // self.world
            deltas = split_like(flat.div_(self.world), [p for _, p in named])

            # All replicas compute the same step from the same sum, so nothing is broadcast.
            for (name, p), delta in zip(named, deltas):
                anchor = self.anchor[name]
                if name not in unmoved:
                    m = self.outer_momentum[name]
                    m.mul_(self.momentum).add_(delta)
                    direction = delta + self.momentum * m if self.nesterov else m
                    anchor.sub_(direction, alpha=self.lr)
                p.copy_(anchor)

    def unmoved_everywhere(self) -> set[str]:
        """Names of the parameters for which no replica had a gradient since the last outer step."""
        names = list(self.params)
        unmoved = [i for i, name in enumerate(names) if name not in self.moved]
        if self.group is not None and names:
            call = RollCall([name in self.moved for name in names], self.group, self.device)
            unmoved = call.missing_everywhere(unmoved)
            self.sent_bytes += call.sent_bytes
        return {names[i] for i in unmoved}

    # ---- at times --------------------------------------------------------------------------------
    @contextmanager
    def outer_weights(self) -> Iterator[None]:
        """`with` this: the model holds the anchor; afterwards its own weights, bit for bit."""
        # Copies in place: the optimizer holds these very tensors.
        params = [p.detach() for p in self.params.values()]
        own = [p.clone() for p in params]
        torch._foreach_copy_(params, list(self.anchor.values()))
        yield
        torch._foreach_copy_(params, own)

    def broadcast_weights(self) -> None:
        """Nothing to send: only step() changes the weights."""

    def weights(self) -> dict[str, Tensor]:
        """What this rank puts into a checkpoint as the model, by name: the anchor."""
        if self.rank > 0:
            return {}
        return {name: self.anchor.get(name, p) for name, p in self.model.named_parameters()}

    def state_dict(self, optimizer_state: dict[str, dict]) -> dict | None:
        """What this rank puts into a checkpoint beside the anchor.

        optimizer_state: this replica's inner state by parameter name. Between outer steps the
        replica's weights are saved too, and which of them it has moved.
        """
        # Right after an outer step they are the anchor, which is saved as the model.
        weights = {}
        if self.taken:
            weights = {name: p.detach() for name, p in self.params.items()}
        moved = {name: int(name in self.moved) for name in weights}
        return {
            "replicas": self.world,
            "taken": self.taken,
            "outer_momentum": self.outer_momentum,
            str(self.rank): {"weights": weights, "moved": moved, "optim": optimizer_state},
        }

    @torch.no_grad()
    def load_state_dict(self, read: Callable[[str], dict | int]) -> dict[str, dict]:
        """After init_weights with the saved anchor: takes up what `state_dict` gave.

        read("3/weights") is that part of the entries of all ranks, merged, or {}. Returns this
        replica's inner optimizer state by parameter name, or {} if no replica with its number was
        saved. On the same number of replicas the run continues bitwise. On another number all start
        from the mean of the saved replicas' weights, so the outer gradient keeps what they did
        since the anchor.
        """
        self.taken = read("taken")
        n_saved = read("replicas")
        self.moved = set()
        for name, m in read("outer_momentum").items():
            self.outer_momentum[name].copy_(m)
        if self.taken:
            sources = [self.rank] if n_saved == self.world else range(n_saved)
            for i, r in enumerate(sources):
                # An older checkpoint does not say what has moved: then everything has.
                moved = read(f"{r}/moved") or dict.fromkeys(self.params, 1)
                self.moved |= {name for name, has_moved in moved.items() if has_moved}
                for name, saved in read(f"{r}/weights").items():
                    share = saved.to(self.device) / len(sources)
                    p = self.params[name]
                    p.copy_(p + share if i > 0 else share)
        return read(f"{self.rank}/optim")


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
