"""ZeRO by hand, stages 1, 2 and 3: a replica does not keep what another replica already keeps.

The model is cut into pieces, each with one owner. Only the owner keeps the piece's optimizer state
(from stage 1 on), gradient (from 2 on) and weights (3). A piece is some rows of a parameter where
the optimizer steps each element by itself, and all ranks own as many rows. A parameter that it
needs in full, such as a matrix for Muon, is one piece. Here A and B are the two halves of an
embedding, C and D matrices; capital letters are always there, small letters only while in use:

              rank 0 owns A, C                      rank 1 owns B, D
              weights    gradients   state          weights    gradients   state
    ddp       A B C D    A B C D     A B C D        A B C D    A B C D     A B C D
    stage 1   A B C D    A B C D     A   C          A B C D    A B C D       B   D
    stage 2   A B C D    A b C d     A   C          A B C D    a B c D       B   D
    stage 3   A b C d    A b C d     A   C          a B c D    a B c D       B   D

Bytes per parameter on N ranks under Adam. "mixed" is the paper's mixed precision (weights 2,
gradients 2, float32 master weights and state 12), "float32" is what this project does (4, 4, 8).
"sent" is what a rank sends in a step of m micro-batches, in units of (N-1)/N x the weights' bytes:

              mixed        float32     sent
    ddp       16           16          2                one all-reduce
    stage 1   4 + 12/N     8 + 8/N     1 + 1            gradients to owners, new weights from owners
    stage 2   2 + 14/N     4 + 12/N    m + 1            a gradient must be sent before it is freed
    stage 3   16/N         16/N        m (1 + 1 + 1)    weights forward, weights backward, gradients

Memory in use comes on top: the gradients of two units (one on its way while the next computes) and,
in stage 3, the weights of two units, also of rows that live here. The weights backward are those of
the blocks alone. The roll call of parallel/replicas.py sends another 2 (N-1)/N bytes for each
parameter tensor. With one micro-batch stages 1 and 2 are the same, because no gradient waits for
another.

A unit is a block, or what comes before the blocks (unit 0), or what follows them (the last unit).
When backward has left a unit, the gradients of the unit start on their way to their owners, in flat
buckets of at most `bucket_mb`, while the next unit computes. Stage 3 fetches the weights of a unit
while the unit before it computes, and frees them after use:

    forward  | compute 0 | compute 1 | compute 2 |  backward | compute 2 | compute 1 | compute 0 |
             | fetch 1   | fetch 2   |           |           | fetch 1   |           |           |
                         | free 0    | free 1    |                       | free 2    | free 1    |
                                                                         | send 2    | send 1    |
                                                                                       then send 0

A bucket of rows is cut into equal segments, one for each rank: a reduce-scatter sums its gradients,
an all-gather fetches its weights. A bucket of full parameters has one owner: a reduce, a broadcast.
(With gloo on few ranks these serve each segment too, and on two a message serves as a reduce.)

The backward of unit 0 reads no weights: an embedding is a lookup, not a product. Two cases differ,
and there unit 0 stays from forward to backward: a tied head multiplies with the embedding, and a
norm in unit 0 needs its gain. The unit after the blocks always stays, for its backward comes next.

Gradients are summed, not averaged: divide the loss by the tokens of the global batch. A gradient
that is missing on some ranks counts as zero there. If it is missing on all, it is None. All ranks
must skip the same steps: torch's GradScaler looks at one rank's gradients alone, so it would leave
the others waiting. precision/loss_scale.py takes a verdict that all ranks share. torch's
clip_grad_norm_(model.parameters()) clips nothing, for the gradients of rows are elsewhere: add up
the squares of gradients() over the group, and scale these. Between two calls of finish_gradients()
comes a zero_grad().

On a GPU (read, not run yet) wait() of a broadcast holds up the stream that computes, not Python, so
memory freed after it is written to by nobody. Backward's hooks run in autograd's thread, on the
stream of the operation they follow: the same one. Offloaded weights are copied in on that stream
too, from pinned memory; Python steps them in host memory only after it has read the gradients,
which are behind all copies.

To save, each rank writes weights(), of which shards[name] tells where in the parameter they lie:
together they are the model. In stage 3 model.state_dict() has weights whose memory is freed.

All ranks must make the same forward and backward calls, also for evaluation. But a rank may skip
blocks (in stage 3 not the last one), or a backward (not in stage 3). To compile the model, compile
each `block.forward`: the hooks on a block must stay outside.

Reference: Rajbhandari et al. 2020 (1910.02054). In the paper each rank owns a slice of one flat
vector. Here a piece is whole rows, which an optimizer can step and a checkpoint can name, or a full
parameter, which any optimizer can step: Muon's orthogonalisation is spread over the ranks. What
each rank owns is even up to a row of each bucket, or up to the largest full parameter (deal in
parallel/replicas.py).

parallelize(model) keeps the model's own weights and gives every replica those of rank 0, and its
buffers. For parameters on the meta device nothing is sent: init_weights(source) gives each owner
the same. A model with `matmul` layers needs parallel/autocast_linear.py too, in stage 3.

An optimizer that needs full parameters needs by_rows=False, or the names of those that it does
not need in full; make_optimizer() refuses one for which too much was cut.

A step() before finish_gradients(), or by an optimizer that make_optimizer() has not made, is a
RuntimeError: only the owners step, and only make_optimizer's sends what they change. Where
last_micro_batch() is forgotten, each backward sends, and the sums are right all the same.

Neighbours: parallel/replicas.py

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from parallel.zero import ZeRO

    def train(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        torch.manual_seed(rank)  # rank 0's weights count
        replicas = ZeRO(dist.group.WORLD, torch.device("cpu"), stage=3, blocks="")
        layers = [torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)]
        model = replicas.parallelize(torch.nn.Sequential(*layers))  # the blocks are its children
        held = sum(p.nbytes for p in replicas.owned_params().values())
        optimizer = replicas.make_optimizer(torch.optim.AdamW, model.named_parameters(), lr=0.01)
        for step in range(60):
            x = torch.randn(16, 8)  # this rank's own samples
            loss = (model(x) - x.mean(1, keepdim=True)).square().sum() / 32
            loss.backward()  # 32: the samples of both ranks
            replicas.finish_gradients()
            optimizer.step()
            model.zero_grad()
        print(f"rank {rank} holds {held} of 1284 bytes, loss {loss.item():.4f}")
        assert held < 1284 and loss < 0.05
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(train, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.replicas import (
    StepGuard,
    all_gather,
    blocks_of,
    broadcast_start,
    deal,
    drop_stand_ins,
    fill,
    is_elementwise,
    is_gloo,
    make_buckets,
    mapped_file,
    named_groups,
    on_gradient,
    reduce_scatter,
    refuse_coupled,
    split_like,
)

# Apart from what others, such as ring attention, send each other in the same group.
GRADIENTS = 1

NOT_OURS = (
    "under ZeRO only the optimizer that make_optimizer() returns may step the model: every rank "
    "steps what it owns and sends it; make yours by replicas.make_optimizer(cls, groups, lr=...)"
)


@dataclass
class Piece:
    """What this rank owns of a parameter."""

    param: nn.Parameter  # what the optimizer steps; of a full parameter the model's, if it is here
    first_row: int | None  # where in the full parameter it begins; None: it is the full parameter

    def of(self, full: Tensor) -> Tensor:
        """This piece of a tensor of the full parameter's shape, as a view."""
        if self.first_row is None:
            return full
        return full[self.first_row : self.first_row + len(self.param)]

    def others(self, full: Tensor) -> list[Tensor]:
        """What of it other ranks own, before and after this piece."""
        if self.first_row is None:
            return []
        return [full[: self.first_row], full[self.first_row + len(self.param) :]]


@dataclass
class Bucket:
    """Parameters side by side in one flat tensor, cut into a segment for each of its ranks.

    w (3, 2) and v (2, 2) on three ranks: 2 of the 5 rows each, and a row of padding

        flat       w w | w w | w w | v v | v v | . .
        segments   rank 0    | rank 1    | rank 2

    A bucket of full parameters has one rank.
    """

    names: list[str]
    params: list[nn.Parameter]  # the model's parameters: views of `flat`
    flat: Tensor  # the weights on the device; its storage is empty while they are not here
    group: dist.ProcessGroup | None  # the replicas of its parameters; None: this rank alone
    rank: int  # this rank in the group
    world: int
    ranks: Sequence[int]  # of the group: the owners
    share: int  # elements of a segment; the last ones may be shorter
    mine: slice  # this rank's segment, empty where it has none
    held: Tensor | None  # the numbers of `mine` where they outlive `flat`: in memory of their own
    pieces: dict[str, Piece] = field(default_factory=dict)  # name -> what this rank owns of it
    works: list[dist.Work] = field(default_factory=list)  # weights on their way

    def segments(self) -> list[tuple[int, slice]]:
        """Each rank and its segment."""
        return [(rank, segment(i, self.share, len(self.flat))) for i, rank in enumerate(self.ranks)]

    def is_trained(self) -> bool:
        """Whether any of its parameters is trained. The answer may change from step to step."""
        return any(p.requires_grad for p in self.params)


def segment(i: int, share: int, size: int) -> slice:
    """The i-th `share` of `size` elements: shorter, or empty, where they end."""
    return slice(min(i * share, size), min((i + 1) * share, size))


def units_of(model: nn.Module, blocks: dict[str, nn.Module]) -> tuple[dict[str, int], int]:
    """The unit of each parameter by name, and the number of units.

    Unit 0 is before the blocks, units 1 to n are the n blocks, unit n + 1 is after the blocks.
    """
    unit_of_block = {name: i for i, name in enumerate(blocks, 1)}
    depth = min(blocks).count(".") + 1  # in how many words a block's name is
    after_blocks = len(blocks) + 1
    unit_of = {}
    unit_outside = 0
    # named_parameters() must be in the order of forward.
    for name, _ in model.named_parameters():
        block = ".".join(name.split(".")[:depth])
        if block in unit_of_block:
            unit_of[name] = unit_of_block[block]
            unit_outside = after_blocks
        else:
            unit_of[name] = unit_outside
    return unit_of, after_blocks + 1


def refuse_copy(*_) -> None:
    # torch would read weights whose memory is freed, and end the process.
    raise TypeError("deepcopy: ZeRO 3 has freed the model's weights; copy weights() of each rank")


class ZeRO:
    """A data-parallel layout (parallel/protocol.py).

    group: the replicas; None is one replica, which sends nothing
    device: where the weights are used
    stage: 1, 2 or 3
    by_rows: the parameters that the optimizer steps element by element, which are cut by rows:
        True all, False none, or their names
    bucket_mb: parameters are grouped up to so many MiB, then split by owner and by the size of a
        row; a larger parameter is a message of its own
    reduce_dtype: gradients are sent in it, None = their own; an owner's own share is never rounded
    offload_params: stage 3 alone; owners keep and step their weights in host memory ("cpu") or in
        files under `folder` that are mapped into memory ("disk")
    pinned: names of parameters that another stage of the pipeline holds too: all stages cut them
        alike, or the first rank owns them
    blocks: where the model has its layers, see parallelize()
    tp_shards: name -> (full shape, offsets), for each parameter that already is a shard
    others: stage 1 alone; name -> the group of replicas of this parameter, where it is not `group`:
        experts that some ranks hold alone (parallel/expert.py); None: this rank alone

    Raises ValueError for a stage that is not 1, 2 or 3, for offload_params that is unknown or
    without stage 3, and for offload_params="disk" without a folder.
    """

    also_first = ()
    is_primary = True  # no lower rank has the same gradients and optimizer state

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        stage: int,
        bucket_mb: float = 25.0,
        reduce_dtype: torch.dtype | None = None,
        offload_params: str | None = None,
        folder: str | Path | None = None,
        pinned: tuple[str, ...] = (),
        blocks: str = "blocks",
        by_rows: bool | Collection[str] = True,
        tp_shards: dict[str, tuple] | None = None,
        others: dict[str, dist.ProcessGroup | None] | None = None,
    ):
        if stage not in (1, 2, 3):
            raise ValueError(f"ZeRO has no stage {stage}; take 1, 2 or 3")
        if offload_params not in (None, "cpu", "disk"):
            raise ValueError(f"offload_params={offload_params} is not known; take cpu or disk")
        if offload_params is not None and stage != 3:
            raise ValueError(
                f"offload_params={offload_params} needs stage 3: before it every rank uses all "
                "its weights where they are; type --data_parallel=zero3"
            )
        if offload_params == "disk" and folder is None:
            raise ValueError("offload_params=disk needs a folder for its files")
        self.group = group
        self.rank = 0
        self.world = 1
        if group is not None:
            self.rank = dist.get_rank(group)
            self.world = dist.get_world_size(group)
        # gloo sums a copy of the full input for a reduce-scatter: as many reduces are faster, up to
        # about 8 ranks, and so are broadcasts.
        self.has_collectives = self.world > 8 or (group is not None and not is_gloo(group, device))
        self.device = device
        self.stage = stage
        self.bucket_bytes = bucket_mb * 2**20
        self.reduce_dtype = reduce_dtype
        self.offload_params = offload_params
        self.folder = folder
        self.pinned = pinned
        self.blocks_at = blocks
        self.by_rows = by_rows
        self.tp_shards = tp_shards or {}
        self.others = others or {}
        # Name -> (full shape, offsets) of what this rank owns, where that is not all.
        self.shards = {}
        self.weight_shards = self.shards
        # From stage 2 on each backward sends gradients; in stage 3 each forward needs weights.
        self.backward_is_collective = stage > 1 and group is not None
        # Are weights fetched before use and freed after it?
        self.fetches = stage == 3 and (group is not None or offload_params is not None)

        # Where this rank is in the model.
        self.in_backward = False
        self.unit = 0  # the newest unit that forward or backward has entered
        self.fetched = set()  # units whose weights are here or on their way

        # Where this rank is in the step.
        self.is_last = True  # the micro-batch in hand is the last one of the step
        self.owes_gradients = False  # the micro-batch in hand has not sent its gradients yet
        self.next_to_send = 0  # unit whose gradients go next; the last unit is the first to go
        self.in_flight = []  # (bucket, flat gradients, works) of each reduce on its way
        self.sums = {}  # name -> the gradient of a piece owned here, as far as it is summed
        self.got = set()  # parameters that got a gradient here since the last step
        self.nothing_sent = True  # the first backward of the step has not sent its gradients yet
        self.step_begun = False  # a micro-batch came after the last finish_gradients()
        self.unfinished = False  # a backward came after it: the optimizer must not step yet
        self.sent_bytes = 0  # in the last step, the mean over the ranks

    # ---- who holds what --------------------------------------------------------------------------
    def parallelize(self, model: nn.Module) -> nn.Module:
        """Keeps what this rank holds of `model`, and hooks into its forward and backward.

        All ranks get rank 0's weights; parameters on the meta device (where no buffers are) get
        memory for init_weights() to fill. Convert the model before, say to bfloat16, not after.
        Parameters are registered in the order in which forward uses them. `blocks` is a ModuleDict,
        ModuleList or Sequential; forward calls each block at most once and in order, with a tensor
        as the first argument. Block and model each return one tensor. In stage 3 a shared weight is
        unit 0's, and a unit 0 without shared weights and 1-D parameters reads none in backward.
        Raises ValueError for a model without blocks.
        """
        self.model = model
        self.blocks = blocks_of(model, self.blocks_at)
        broadcast_start(model, self.group, self.device, self.others)
        named = list(model.named_parameters())
        unit_of, n_units = units_of(model, self.blocks)

        # Unit 0 stays where its backward reads its weights: a tied head, or the gain of a norm.
        n_with_ties = len(list(model.named_parameters(remove_duplicate=False)))
        is_tied = len(named) < n_with_ties
        has_gain = any(p.ndim < 2 for name, p in named if unit_of[name] == 0)
        self.unit_0_stays = is_tied or has_gain

        # Every rank computes the same owners, so nobody has to be told.
        shapes = {name: tuple(p.shape) for name, p in named}
        by_rows = self.by_rows
        if isinstance(by_rows, bool):
            by_rows = shapes.keys() if by_rows else ()
        own = {name: shape for name, shape in shapes.items() if name not in self.others}
        owners = deal(own, by_rows, self.world)
        for group in set(self.others.values()):
            theirs = {
                n: s for n, s in shapes.items() if n in self.others and self.others[n] is group
            }
            owners |= deal(theirs, by_rows, 1 if group is None else group.size())
        for name in self.pinned:
            owners[name] = range(self.world) if name in by_rows else (0,)

        self.units = [[] for _ in range(n_units)]  # unit -> its buckets
        real = self.fill_units(named, unit_of, owners)
        self.buckets = [bucket for unit in self.units for bucket in unit]

        # Put the new parameters where the old ones were. A tied parameter is replaced twice.
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
                setattr(module, name, real[p])
        # Under autocast F.linear keeps cast copies of weights, which nobody could free. Only layers
        # with an attribute `matmul`, as model.Linear has, are changed: give yours one.
        has_matmul = any(getattr(module, "matmul", None) is F.linear for module in model.modules())
        if self.fetches and has_matmul:
            # Imported here: other models do without.
            from parallel.autocast_linear import keep_no_copies

            keep_no_copies(model)
        self.add_hooks(real.values())
        self.extend_zero_grad(model)
        is_shared = self.group is not None or self.fetches
        self.guard = StepGuard(self, self.all_params, only_own=NOT_OURS if is_shared else "")
        return model

    def extend_zero_grad(self, model: nn.Module) -> None:
        """The model's zero_grad() drops the gradients of what this rank owns, too.

        In stage 3 a deep copy of the model is a TypeError.
        """

        def zero_grad(model: nn.Module, set_to_none: bool = True) -> None:
            type(model).zero_grad(model, set_to_none)
            if model is self.model:
                self.sums = {}
                for p in self.owned_params().values():
                    p.grad = None

        # Bound to the model: a deep copy of it gets a method of its own.
        model.zero_grad = MethodType(zero_grad, model)
        if self.fetches:
            model.__deepcopy__ = refuse_copy

    def all_params(self) -> list[nn.Parameter]:
        """The model's, and those pieces of them that an optimizer steps in their place."""
        return [*self.model.parameters(), *self.owned_params().values()]

    def fill_units(
        self,
        named: list[tuple[str, nn.Parameter]],
        unit_of: dict[str, int],
        owners: dict[str, Sequence[int]],
    ) -> dict[nn.Parameter, nn.Parameter]:
        """Makes the buckets of each unit; returns given parameter -> the one to be used."""
        backward_order = named[::-1]
        # Stage 3 frees unit by unit, so a bucket lies within one unit; else it may span several.
        spans = [backward_order]
        if self.stage == 3:
            all_units = range(len(self.units))
            spans = [[(n, p) for n, p in backward_order if unit_of[n] == i] for i in all_units]
        real = {}
        for span in spans:
            for run in make_buckets(span, self.bucket_bytes):
                # A bucket has one owner, or rows of one size. Frozen parameters send no gradients,
                # so they are apart; a pinned one, so that it is cut alike beside any others.
                alike = {}
                for name, p in run:
                    ranks = owners[name]
                    row = p.shape[1:].numel() if len(ranks) > 1 else None
                    own = name if name in self.pinned else None
                    group = self.others.get(name, self.group)
                    key = (id(group), ranks[0], len(ranks), row, own, p.requires_grad)
                    alike.setdefault(key, {})[name] = p
                for given in alike.values():
                    # It can be sent when backward has left its lowest unit, the last it comes to.
                    unit = min(unit_of[name] for name in given)
                    self.units[unit].append(self.make_bucket(given, owners, real))
        return real

    @torch.no_grad()
    def make_bucket(self, given: dict[str, nn.Parameter], owners: dict, real: dict) -> Bucket:
        """The bucket of these parameters; those that take their places go into `real`.

        owners: name -> ranks, the same ones for all of `given`.
        """
        like = list(given.values())
        dtype = like[0].dtype
        first_name = next(iter(given))
        ranks = owners[first_name]
        group, rank, world = self.group, self.rank, self.world
        if first_name in self.others:
            group = self.others[first_name]
            rank = 0 if group is None else dist.get_rank(group)
            world = 1 if group is None else group.size()
        size = sum(p.numel() for p in like)
        share = size  # of one rank
        if len(ranks) > 1:
            row = like[0].shape[1:].numel()
            share = math.ceil(size / row / len(ranks)) * row
        if len(ranks) == world:
            size = share * world  # with padding: all-gather takes equal segments
        mine = slice(0, 0)
        if rank in ranks:
            mine = segment(ranks.index(rank), share, size)
        n_mine = mine.stop - mine.start
        flat = torch.empty(size, dtype=dtype, device=self.device)

        # What this rank owns needs memory of its own where `flat` is freed, unless it is all of it,
        # or is in host memory. There the optimizer steps it.
        held = None
        if n_mine and self.offload_params == "cpu":
            # Pinned memory is copied to a GPU without the host waiting.
            held = torch.empty(n_mine, dtype=dtype, pin_memory=self.device.type == "cuda")
        elif n_mine and self.offload_params == "disk":
            held = mapped_file(Path(self.folder) / f"{first_name}.weights", n_mine, dtype)
        elif n_mine and self.fetches and len(ranks) > 1:
            held = torch.empty(n_mine, dtype=dtype, device=self.device)

        # autograd refuses tensors that changed since forward saved them. `.data` has a version
        # counter of its own, so fetching weights again is no change.
        params = []
        for p, view in zip(like, split_like(flat, like)):
            if p.is_meta:
                params.append(nn.Parameter(view.data, p.requires_grad))
            else:
                # The same object, for an optimizer may hold it already.
                view.copy_(p)
                p.data = view.data
                params.append(p)
        real.update(zip(like, params))
        bucket = Bucket(list(given), params, flat, group, rank, world, ranks, share, mine, held)
        if held is not None and not all(p.is_meta for p in like):
            held.copy_(flat[mine])
        self.cut_pieces(bucket)
        # In stage 3, before the next unit is allocated: memory never holds the whole model.
        self.release(bucket)
        return bucket

    def cut_pieces(self, bucket: Bucket) -> None:
        """Fills `pieces` and `shards` with what this rank owns of the parameters."""
        if bucket.rank not in bucket.ranks:
            return
        is_full = len(bucket.ranks) == 1
        memory = bucket.flat[bucket.mine] if bucket.held is None else bucket.held
        begin = -bucket.mine.start  # of a parameter, in `memory`
        for name, p in zip(bucket.names, bucket.params):
            end = begin + p.numel()
            part = memory[max(begin, 0) : max(end, 0)]
            if is_full and bucket.held is None:
                bucket.pieces[name] = Piece(p, None)
            elif is_full:
                bucket.pieces[name] = Piece(nn.Parameter(part.view(p.shape), p.requires_grad), None)
            elif len(part):
                rows = part.view(-1, *p.shape[1:])
                first_row = max(-begin, 0) // p.shape[1:].numel()
                bucket.pieces[name] = Piece(nn.Parameter(rows, p.requires_grad), first_row)
                whole = tuple(p.shape), (0,) * p.ndim
                full_shape, offsets = self.tp_shards.get(name, whole)
                self.shards[name] = full_shape, (offsets[0] + first_row, *offsets[1:])
            begin = end

    def add_hooks(self, params: Iterable[nn.Parameter]) -> None:
        """Forward and backward call this object when they enter or leave a unit."""
        if self.group is not None:
            for p in params:
                on_gradient(p, self.got.add)  # the hook keeps this set: empty it, never replace it
        if self.group is None and not self.fetches:
            return
        blocks = list(self.blocks.values())
        after_blocks = len(blocks) + 1
        self.model.register_forward_pre_hook(lambda _, args: self.enter_forward(0, None))
        for i, block in enumerate(blocks, 1):
            block.register_forward_pre_hook(lambda _, args, i=i: self.enter_forward(i, args[0]))
        blocks[-1].register_forward_hook(lambda _, args, out: self.enter_forward(after_blocks, out))
        self.model.register_forward_hook(lambda _, args, out: self.end_forward(out))

    @torch.no_grad()
    def init_weights(self, source: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Sets every parameter held here to source(its name, its full shape).

        source returns the full tensor on the CPU; from one that can give shards stage 3 takes its
        rows alone.
        """
        for bucket in self.buckets:
            for name, p in zip(bucket.names, bucket.params):
                piece = bucket.pieces.get(name)
                if self.stage < 3:
                    fill(p, source, name)
                elif piece is not None and piece.first_row is None:
                    fill(piece.param, source, name, p.shape)
                elif piece is not None:
                    fill(piece.param, source, name, p.shape, piece.first_row)

    # ---- weights come and go ---------------------------------------------------------------------
    def is_even(self, bucket: Bucket) -> bool:
        """Does one collective serve all ranks? Else each owner sends and receives its segment."""
        return self.has_collectives and len(bucket.ranks) == bucket.world

    def start_broadcast(self, bucket: Bucket) -> None:
        group = bucket.group
        if group is None:
            return
        flat = bucket.flat
        if self.is_even(bucket):
            bucket.works = [all_gather(flat, flat[bucket.mine], group=group, async_op=True)]
        else:
            for owner, place in bucket.segments():
                part = flat[place]
                work = dist.broadcast(part, group=group, group_src=owner, async_op=True)
                bucket.works.append(work)
        # The owner sends world - 1 copies; each rank counts a share of them, for owners own alike.
        self.sent_bytes += (bucket.world - 1) * flat.nbytes // bucket.world

    def wait_for_broadcasts(self, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            for work in bucket.works:
                work.wait()
            bucket.works = []

    def lives_here(self, bucket: Bucket) -> bool:
        """Is `flat` never freed? None is before stage 3, then an owner's full parameters alone."""
        is_owner = bucket.rank in bucket.ranks
        return not self.fetches or (is_owner and bucket.held is None)

    def start_fetch(self, i: int) -> None:
        """The weights of unit i start on their way here."""
        if not self.fetches or i in self.fetched:
            return
        self.fetched.add(i)
        for bucket in self.units[i]:
            if not self.lives_here(bucket):
                bucket.flat.untyped_storage().resize_(bucket.flat.nbytes)
            # What this rank owns comes from memory of its own, on the host perhaps.
            if bucket.held is not None:
                bucket.flat[bucket.mine].copy_(bucket.held, non_blocking=True)
            self.start_broadcast(bucket)

    def fetch(self, i: int) -> None:
        """The weights of unit i are here when this returns."""
        self.start_fetch(i)
        self.wait_for_broadcasts(self.units[i])

    def free(self, units: Iterable[int]) -> None:
        """The weights of these units leave the device, unless they live here."""
        for i in self.fetched.intersection(units):
            self.fetched.remove(i)
            # Memory must not go while a broadcast still writes to it.
            self.wait_for_broadcasts(self.units[i])
            for bucket in self.units[i]:
                self.release(bucket)

    def release(self, bucket: Bucket) -> None:
        """Frees the memory of the weights. The parameters keep their shapes."""
        if not self.lives_here(bucket):
            bucket.flat.untyped_storage().resize_(0)

    # ---- forward ---------------------------------------------------------------------------------
    def last_micro_batch(self, flag: bool) -> None:
        """Call it before each micro-batch (in a pipeline: before its backward).

        flag: does its backward complete the gradients?
        """
        self.send_owed_gradients()
        if not self.step_begun:
            self.step_begun = True
            self.sent_bytes = 0
        self.is_last = flag
        self.owes_gradients = True

    def send_owed_gradients(self) -> None:
        """Joins the other ranks' reduces where this rank had a micro-batch without a backward."""
        if self.in_backward:
            self.drop_in_flight()
        if self.owes_gradients:
            self.next_to_send = len(self.units) - 1
            self.send_gradients(0)
            self.collect_gradients()

    def drop_in_flight(self) -> None:
        """After a backward that raised: what it had sent by then is no part of any sum."""
        # A message that nobody waits for would meet the next one's receiver.
        for _, _, works in self.in_flight:
            for work in works:
                work.wait()
        self.in_flight = []
        self.in_backward = False

    def enter_forward(self, i: int, x: Tensor | None) -> None:
        """Forward enters unit i with x (B, T, C), the output of the unit before.

        Where this rank has skipped units, it fetches them and later sends for them all the same,
        so that its collectives come in the other ranks' order.
        """
        if i == 0:
            # Drop what an earlier forward without a backward, or a failed backward, left behind.
            self.drop_in_flight()
            self.unit = -1
            self.free(range(len(self.units)))
        if self.in_backward:
            # Activation checkpointing runs the forward of unit i again, within backward.
            self.fetch(i)
            return

        if i <= self.unit:
            raise RuntimeError(
                f"ZeRO: forward came to unit {i} after unit {self.unit}; it must call each block "
                "at most once and in order, or gradients would leave before they are complete"
            )

        # Leave the units before, enter unit i, and start fetching the unit after it.
        unit_before = self.unit
        while self.unit < i:
            left = self.unit
            self.unit += 1
            if left > 0 or not self.unit_0_stays:
                self.free([left])
            self.fetch(self.unit)
            if self.unit + 1 < len(self.units):
                self.start_fetch(self.unit + 1)

        # When the gradient of x is there, backward has left unit i. (The input of a pipeline stage
        # is a leaf: it needs no hook, for end_backward() follows at once.)
        if x is not None and x.grad_fn is not None:
            x.register_hook(lambda _: self.enter_backward(unit_before))

    def end_forward(self, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda _: self.begin_backward())
        else:
            self.free(range(len(self.units)))

    # ---- backward --------------------------------------------------------------------------------
    def begin_backward(self) -> None:
        self.in_backward = True
        self.unfinished = True
        last_unit = len(self.units) - 1
        self.next_to_send = last_unit
        self.unit = last_unit + 1
        # The engine calls end_backward() when this backward has run.
        torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)
        self.enter_backward(last_unit)

    def enter_backward(self, i: int) -> None:
        """Backward enters unit i, from unit i+1, or from above units that this rank has skipped."""
        while self.unit > i:
            self.unit -= 1
            self.free(range(self.unit + 1, len(self.units)))
            # Unit 0 needs no weights in backward, or it has stayed since its forward.
            if self.unit > 0:
                self.fetch(self.unit)
            if self.unit > 1:
                self.start_fetch(self.unit - 1)
            # The gradients of the unit that backward has just left are complete.
            self.send_gradients(self.unit + 1)

    def end_backward(self) -> None:
        """Sends what is left, also for units that backward never came to, as all ranks must."""
        self.send_gradients(0)
        self.collect_gradients()
        self.free(range(len(self.units)))
        self.in_backward = False
        # Stage 1 sends after the last micro-batch alone; until then this rank owes.
        self.owes_gradients = self.stage == 1 and not self.is_last

    @torch.no_grad()
    def send_gradients(self, i: int) -> None:
        """The gradients of the units from `next_to_send` down to i start on their way to owners."""
        if self.group is None or (self.stage == 1 and not self.is_last):
            return
        for unit in range(self.next_to_send, i - 1, -1):
            # One unit on its way at a time: more would hold more memory.
            self.collect_gradients()
            for bucket in self.units[unit]:
                if bucket.is_trained() and bucket.group is not None:
                    self.start_reduce(bucket)
        self.next_to_send = min(self.next_to_send, i - 1)
        if i == 0:
            self.nothing_sent = False

    def start_reduce(self, bucket: Bucket) -> None:
        # Not zeros_like: all but padding, whose sum nobody reads, is written to below.
        flat = torch.empty_like(bucket.flat, dtype=self.reduce_dtype)
        # An owner contributes only zeros: its own share and the sum so far are in `sums`, to which
        # collect_gradients() adds, without rounding.
        if not self.is_pair(bucket):
            flat[bucket.mine] = 0
        for name, p, view in zip(bucket.names, bucket.params, split_like(flat, bucket.params)):
            if self.nothing_sent:
                # Forget a backward whose gradients were dropped without finish_gradients(), such as
                # the trial of a micro-batch size in run/batch.py.
                self.sums.pop(name, None)
                if p.grad is None:
                    self.got.discard(p)
            if p.grad is None:
                # Zeros where this rank has no gradient.
                view.zero_()
                continue
            piece = bucket.pieces.get(name)
            if piece is None:
                view.copy_(p.grad)
            else:
                self.add(name, piece.of(p.grad))
                for part, gradient in zip(piece.others(view), piece.others(p.grad)):
                    part.copy_(gradient)
            p.grad = None
        self.in_flight.append((bucket, flat, self.reduce(bucket, flat)))
        self.sent_bytes += (bucket.world - 1) * flat.nbytes // bucket.world

    def is_pair(self, bucket: Bucket) -> bool:
        """Two ranks on gloo: a sum of one other rank's share is a message."""
        return bucket.world == 2 and not self.has_collectives

    def reduce(self, bucket: Bucket, flat: Tensor) -> list[dist.Work]:
        """Starts to sum `flat` over the ranks, each segment at its owner."""
        group = bucket.group
        if self.is_even(bucket):
            return [reduce_scatter(flat[bucket.mine], flat, group=group, async_op=True)]
        works = []
        for owner, place in bucket.segments():
            part = flat[place]
            if not self.is_pair(bucket):
                work = dist.reduce(part, group=group, group_dst=owner, async_op=True)
            elif owner == bucket.rank:
                work = dist.irecv(part, group=group, group_src=1 - owner, tag=GRADIENTS)
            else:
                work = dist.isend(part, group=group, group_dst=owner, tag=GRADIENTS)
            works.append(work)
        return works

    def add(self, name: str, gradient: Tensor) -> None:
        if name in self.sums:
            self.sums[name].add_(gradient)
        else:
            # A view would keep the memory of all that it is a part of.
            self.sums[name] = gradient.clone() if gradient._is_view() else gradient

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Waits for the gradients on their way. Owners add them to their own."""
        for bucket, flat, works in self.in_flight:
            for work in works:
                work.wait()
            views = split_like(flat, bucket.params)
            for name, p, view in zip(bucket.names, bucket.params, views):
                if name in bucket.pieces:
                    self.add(name, bucket.pieces[name].of(view).to(p.dtype))
        self.in_flight = []

    # ---- the step --------------------------------------------------------------------------------
    def owned_params(self) -> dict[str, nn.Parameter]:
        """The parameters that this rank owns, by name and in the model's order.

        They are those that its optimizer steps, rows or full ones: with offloading they are in host
        memory.
        """
        owned = {}
        for bucket in self.buckets:
            owned |= {name: piece.param for name, piece in bucket.pieces.items()}
        return {name: owned[name] for name, _ in self.model.named_parameters() if name in owned}

    def finish_gradients(self) -> None:
        """After the last backward: owners hold the gradients summed over all replicas.

        Other ranks hold none. A gradient that is missing on all replicas is None.
        """
        # A zero-bubble pipeline calls no micro-batch the last one, for it computes weight gradients
        # after all of them.
        self.is_last = True
        self.send_owed_gradients()
        self.step_begun = False
        self.unfinished = False
        self.owes_gradients = False
        if self.nothing_sent:
            self.sums = {}
        self.nothing_sent = True

        # What is stepped gets its gradient, offloaded weights in host memory, or None.
        params = []
        stepped = []
        for bucket in self.buckets:
            for name, p in zip(bucket.names, bucket.params):
                piece = bucket.pieces.get(name, Piece(p, None)).param
                gradient = self.sums.pop(name, p.grad)
                p.grad = None
                piece.grad = None if gradient is None else gradient.to(piece.device)
                params.append(p)
                stepped.append(piece)

        # The sums have zeros where nobody had a gradient: these become None.
        self.sent_bytes += drop_stand_ins(params, self.got, self.group, self.device, stepped)

    def gradients(self) -> dict[str, Tensor]:
        """After finish_gradients: the summed gradients of the parameters owned here, by name.

        To clip by their norm, add up its square over the group.
        """
        return {name: p.grad for name, p in self.owned_params().items() if p.grad is not None}

    def make_optimizer(self, cls, groups: list[dict], **arguments) -> torch.optim.Optimizer:
        """The optimizer of the parameters owned here; its step() moves the weights of all ranks.

        groups: as torch's optimizers take them. What it steps are owned_params(): rows are no
        parameters of the model. step() raises RuntimeError if the gradients are not summed yet,
        add_param_group() raises ValueError. Raises ValueError where `by_rows` has cut what cls
        needs in full.
        """
        owned = self.owned_params()
        owned_groups = []
        groups = named_groups(self.model, groups)
        for settings in groups:
            self.refuse_rows(cls, settings)
            names = [name for name in settings["names"] if name in owned]
            owned_groups.append(settings | {"names": names, "params": [owned[n] for n in names]})
        # With tensor parallelism `cls` is a function: whoever made it has tried the class already.
        if self.group is not None and isinstance(cls, type):
            refuse_coupled(cls, owned_groups, arguments)
        optimizer = self.guard.admit(cls(owned_groups, **arguments))
        optimizer.register_step_post_hook(lambda *_: self.broadcast_weights())
        names = [name for settings in groups for name in settings["names"]]
        optimizer.zero_grad = partial(self.zero_grad, optimizer.zero_grad, names)
        if self.group is not None:
            optimizer.add_param_group = self.refuse_late_group
        return optimizer

    def zero_grad(self, plain: Callable, names: list[str], set_to_none: bool = True) -> None:
        """An optimizer's zero_grad(), which drops what the model has of its parameters, too."""
        plain(set_to_none)
        for name in names:
            self.sums.pop(name, None)
            self.model.get_parameter(name).grad = None

    def refuse_rows(self, cls, group: dict) -> None:
        # A function, made for tensor parallelism, knows better which class it makes.
        if not isinstance(cls, type) or is_elementwise(cls, group):
            return
        cut = {name for bucket in self.buckets if len(bucket.ranks) > 1 for name in bucket.names}
        for name in group["names"]:
            if name in cut:
                raise ValueError(
                    f"{cls.__name__} may need {name} in full, and ZeRO has cut it by rows; make "
                    "ZeRO(..., by_rows=False), or give by_rows the names of the parameters that it "
                    "steps element by element; a class with elementwise = True steps all so"
                )

    def refuse_late_group(self, settings: dict) -> None:
        raise ValueError(
            "add_param_group: under ZeRO every rank would step these parameters, with "
            "gradients of its own; give all groups to make_optimizer"
        )

    def broadcast_weights(self) -> None:
        """After the owners' weights changed: stages 1 and 2 send them to all ranks.

        Stage 3 sends them when they are used.
        """
        if self.stage == 3:
            return
        changed = [bucket for bucket in self.buckets if bucket.is_trained()]
        for bucket in changed:
            self.start_broadcast(bucket)
        self.wait_for_broadcasts(changed)

    def discard_step(self) -> None:
        """In place of optimizer.step(). Nothing to undo: the next zero_grad drops the gradients."""

    # ---- at times --------------------------------------------------------------------------------
    def state_dict(self, optimizer_state: dict) -> dict | None:
        """Weights and optimizer state are all there is: no entry of its own in a checkpoint."""

    def load_state_dict(self, read: Callable[[str], dict | int]) -> dict:
        """Takes up nothing, for no replica saved a state of its own."""
        return {}

    def outer_weights(self) -> AbstractContextManager:
        """`with` this: the model holds the weights to evaluate, as it always does."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """What this rank puts into a checkpoint, by name: what it owns."""
        return self.owned_params()


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
