"""Bytes that the fullest rank holds: every layout, optimizer and precision, from shapes alone.

    layout   weights   gradients   state       held only for a while ("buffers")
    ddp      all       all         all         the gradient on its way into its bucket
    zero1    all       all         own         a unit's gradients, or a bucket
    zero2    all       own         own         two units' gradients
    zero3    own       own         own         two units' weights and gradients
    fsdp     rows/n    rows/n      rows/n      weights of embedding, head and two blocks
                                               (reshard=False: all), one unit's gradients twice;
                                               the gradients of earlier micro-batches

Each layout deals out rows of the tensors, or full parameters to an optimizer that needs them so.
Buffers also hold
    the temporaries of a step: at least the size of the largest parameter; for Muon two bfloat16
    copies of the matrices of one shape, at most 4M numbers or one matrix at a time, and three
    short x short products
    no copies of the weights under autocast: train.py keeps none (parallel/autocast_linear.py), but
    for those that torch.compile or zero bubble keep
    bf16_sr: the float32 weights and gradients of a chunk of 64 MiB, and 21 bytes for each number of
    the largest parameter, to round it
    two float32 numbers for each logit, in the loss's backward; with --loss_chunk for each of an
    eighth of a chunk, beside the chunk's logits and the head's gradient in float32
    fsdp, with a method that needs full matrices: state and weights at owners, too, see
    parallel/sharded_optimizer.py
    with hooks (hooks/wear.py), during a step: a copy of the matrices that the rank steps, in full,
    or of those of a chunk, in float32 under bf16_sr
    with E experts: the gradients of a matrix of all of them at once, 4 E w h bytes, before they
    are added or sent

With --ep=N in ddp, zero1 and fsdp a rank has E/N of the experts: their weights, gradients and state
are a share, which zero1 and fsdp deal out to the n/N ranks that hold the same ones.

Offloaded state passes the device in chunks of 64 MiB of parameters, two at a time; a larger
parameter is a chunk by itself. (If the device is the CPU, nothing moves, and state in files needs
no memory.)

With one micro-batch gradients come as activations go: of these the result has what is there beside
all gradients. The estimate is rough, and rather too large than too small. It leaves out
fragmentation, the device's own context and kernels' workspaces (emulated FP8 has float32 operands).
Measured on a CPU, it is within 5 % (tests/test_estimate.py).

Neighbours: memory/flags.py, memory/shapes.py, optim/adamw.py, optim/attributes.py, optim/muon.py,
parallel/replicas.py, precision/amp.py

Example:
    from memory.ranks import bytes_per_rank
    from memory.shapes import gpt_shapes
    shapes = gpt_shapes(n_layer=12, n_embd=768, vocab_size=50304)
    ddp = bytes_per_rank(shapes, "adamw", "ddp", world=8)
    zero1 = bytes_per_rank(shapes, "adamw", "zero1", world=8)
    print(f"AdamW's state: {ddp['state'] / 1e9:.2f} GB, {zero1['state'] / 1e9:.2f} on 8 ranks")
    assert zero1["state"] < ddp["state"] / 3
"""

import collections
import functools
import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from memory.flags import check
from memory.shapes import (
    ACCOUNTINGS,
    PUBLISHED,
    Shapes,
    bytes_of,
    chunk_part,
    has_copies,
    is_expert,
)
from optim import muon
from optim.attributes import attribute, own_classes
from parallel.replicas import deal
from precision.amp import PRECISIONS, Precision

LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
EXPERT_PARALLEL = ("ddp", "zero1", "fsdp")  # those that know --ep


# ---- what an optimizer keeps of each parameter --------------------------------------------------
@functools.cache
def find_optimizer(name: str) -> type:
    """The class in optim/ that `optim` names.

    Raises ValueError where there is none, or where it does not tell how much state it keeps.
    """
    ours = own_classes()
    check("optim", name, ours)
    if not hasattr(ours[name], "state_numbers"):
        raise ValueError(
            f"optim={name} does not say what it keeps; give {ours[name].__name__} a "
            "state_numbers(shape), as in optim/adamw.py"
        )
    return ours[name]


def options_of(optimizer: type) -> dict[str, inspect.Parameter]:
    """The options that change the size of the optimizer's state."""
    parameters = inspect.signature(optimizer.state_numbers).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def state_numbers(optimizer: type, kind: str, shape: tuple[int, ...], **options) -> int:
    """How many numbers the optimizer remembers of one parameter."""
    if attribute(optimizer, "matrices_only"):
        return optimizer.state_numbers(shape, kind == "matrix", **options)
    return optimizer.state_numbers(shape, **options)


def row_of(precision: str) -> Precision:
    """The precision's table row. The papers' accountings neither copy weights nor round."""
    return PRECISIONS.get(precision, PRECISIONS["fp32"])


# ---- who holds it --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """The arguments of bytes_per_rank, and what follows from them at once."""

    shapes: Shapes
    optimizer: type
    options: dict  # the optimizer's
    layout: str
    world: int
    n: int  # ranks that share one copy of what is sharded, all experts' copies among them
    ep: int  # neighbours among them, each with other experts
    precision: str
    reshard: bool
    micro_batches: int
    bucket: float  # bytes
    chunk: float
    offload: str | None
    offload_params: str | None
    logits: float  # numbers of a micro-batch
    loss_chunk: int | None  # tokens whose logits are there at once; None: all
    inside: float  # bytes of activations that are not there yet at the loss
    hooks: bool  # does the optimizer wear some?
    kept: int  # more sets of weights in its state

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, (_, shape) in self.shapes.items()}

    @property
    def row(self) -> Precision:
        return row_of(self.precision)

    @property
    def weight(self) -> int:
        return bytes_of(self.precision)[0]

    @property
    def gradient(self) -> int:
        return bytes_of(self.precision)[1]

    @property
    def by_block(self) -> bool:
        return any(name.startswith("blocks.") for name in self.shapes)

    @functools.cached_property
    def at_once(self) -> int:
        """Numbers of the gradients that one operation makes: of a matrix of all experts."""
        sizes = collections.Counter()
        for name, size in self.sizes.items():
            before, experts, after = name.partition(".experts.")
            sizes[before, after.partition(".")[2] if experts else name] += size
        return max(sizes.values())

    @property
    def has_experts(self) -> bool:
        return any(is_expert(name) for name in self.shapes)

    def n_holders(self, name: str) -> int:
        """Of the n ranks those that hold this parameter, or share it: of an expert every ep-th."""
        return max(1, self.n // self.ep) if is_expert(name) else self.n

    def place(self, name: str, rank: int) -> int:
        """This rank's place among the holders of its parameter of this name."""
        return rank // self.ep if is_expert(name) else rank

    def ranks_at(self, name: str, place: int) -> range:
        """The ranks in this place, of all that have a parameter of this name."""
        size = self.ep if is_expert(name) else 1
        return range(place * size, place * size + size)

    @property
    def head(self) -> tuple[int, ...]:
        """(words, width); a tied head is the embedding."""
        kinds = {kind: shape for kind, shape in reversed(self.shapes.values())}
        return kinds.get("head") or kinds["embedding"]

    @property
    def has_chunks(self) -> bool:
        """Is the loss computed in chunks?"""
        return self.loss_chunk is not None and self.logits > 0

    @property
    def full(self) -> dict[str, tuple[int, ...]]:
        """The parameters that an owner steps in full, as rows of them cannot be: name -> shape."""
        is_elementwise = self.optimizer.elementwise
        if self.n == 1 or (is_elementwise and not self.hooks):
            return {}
        # Hooks take matrices in full, and leave all else to the method.
        matrices_only = is_elementwise or attribute(self.optimizer, "matrices_only")
        full = {}
        for name, (kind, shape) in self.shapes.items():
            if kind == "matrix" or not matrices_only:
                full[name] = shape
        return full

    @functools.cached_property
    def steppers(self) -> dict[str, Sequence[int]]:
        """The ranks that step each parameter: one owner in full, or several an equal share each."""
        shapes = {name: shape for name, (_, shape) in self.shapes.items()}
        found = {}
        for n in {self.n_holders(name) for name in shapes}:
            alike = {name: shape for name, shape in shapes.items() if self.n_holders(name) == n}
            full = {name: shape for name, shape in self.full.items() if name in alike}
            if self.layout == "fsdp":
                # Owners take their parameters from shards that are even already.
                found |= dict.fromkeys(alike, range(n)) | deal(full, (), n)
            else:
                found |= deal(alike, alike.keys() - full.keys(), n)
        return {name: found[name] for name in shapes}

    def state_bytes(self, kind: str, shape: tuple[int, ...]) -> int:
        _, _, master, number = bytes_of(self.precision)
        numbers = state_numbers(self.optimizer, kind, shape, **self.options)
        return number * numbers + (master + number * self.kept) * math.prod(shape)

    def shard(self, name: str) -> tuple[int, ...]:
        """FSDP's shard of a parameter: some of its rows."""
        rows, *others = self.shapes[name][1]
        return math.ceil(rows / self.n_holders(name)), *others

    def stepped(self, name: str) -> tuple[float, float]:
        """Bytes of (weights, state) of what one of the parameter's `steppers` steps of it."""
        kind, shape = self.shapes[name]
        share = 1
        if self.layout == "fsdp" and name not in self.full:
            shape = self.shard(name)
        elif len(self.steppers[name]) > 1:
            share = self.shares[self.bucket_of(name)]
        return self.weight * math.prod(shape) * share, self.state_bytes(kind, shape) * share

    @functools.cached_property
    def unit_of(self) -> dict[str, str]:
        """The unit in which each parameter is gathered and sent: `before`, a block, or `after`."""
        found = {}
        outside = "before"
        for name in self.shapes:
            if name.startswith("blocks."):
                outside = "after"
                found[name] = name.split(".")[1]
            else:
                found[name] = outside
        return found

    def bucket_of(self, name: str) -> tuple:
        """What ZeRO cuts together: rows of one size, in one unit, for the same ranks."""
        row = math.prod(self.shapes[name][1][1:])
        return self.unit_of[name], row, len(self.steppers[name])

    @functools.cached_property
    def shares(self) -> dict[tuple, float]:
        """Bucket -> the part of it that the fullest rank owns: whole rows."""
        rows = {}
        for name, ranks in self.steppers.items():
            if len(ranks) > 1:
                bucket = self.bucket_of(name)
                rows[bucket] = rows.get(bucket, 0) + self.shapes[name][1][0]
        return {bucket: math.ceil(n / bucket[-1]) / n for bucket, n in rows.items()}


def shapes_here(shapes: Shapes, world: int, ep: int) -> Shapes:
    """Those of a rank, of `world`, that holds one of `ep` equal shares of the experts.

    Raises ValueError where there are no experts, or ep does not divide them, or the ranks.
    """
    if ep == 1:
        return shapes
    if world % ep:
        raise ValueError(f"ep={ep} must divide the {world} ranks, which share the experts out")
    numbers = {
        name: int(name.split(".experts.")[1].split(".")[0]) for name in shapes if is_expert(name)
    }
    n_expert = max(numbers.values(), default=-1) + 1
    if n_expert == 0:
        raise ValueError(
            f"ep={ep} shares out experts, and there are none; type --n_expert={8 * ep}"
        )
    if n_expert % ep:
        fits = -(-n_expert // ep) * ep
        raise ValueError(f"ep={ep} does not divide n_expert={n_expert}; type --n_expert={fits}")
    return {name: x for name, x in shapes.items() if numbers.get(name, 0) < n_expert // ep}


def bytes_per_rank(
    shapes: Shapes,
    optim: str = "adamw",
    layout: str = "ddp",
    world: int = 1,
    precision: str = "fp32",
    *,
    ep: int = 1,
    fsdp_shard: int | None = None,
    reshard: bool = True,
    micro_batches: int = 1,
    activations: float = 0,
    inside: float = 0,
    logits: float = 0,
    loss_chunk: int | None = None,
    bucket_mb: float = 25.0,
    offload: str | None = None,
    offload_params: str | None = None,
    chunk_mb: float = 64.0,
    hooks: bool = False,
    kept: int = 0,
    **options,
) -> dict[str, float]:
    """Bytes on the fullest rank: parameters, gradients, state, activations, buffers, total, host.

    shapes: see gpt_shapes. ep: ranks that share out the experts, in ddp, zero1 and fsdp.
    fsdp_shard: ranks that share one copy, None: all. offload (of state) and offload_params (zero3,
    fsdp): `cpu` or `disk`, both counted under host. activations: bytes of a micro-batch, see
    activation_bytes; inside: how many of them are not there yet at the loss (activation_bytes less
    the same without in_backward); logits: how many numbers it has, tokens x words; loss_chunk: the
    setting, None for all tokens at once. hooks: does the optimizer wear any? kept: sets of weights
    in its state, 1 with --ema, 2 with ema_nesterov. options: of its state_numbers. If no name
    begins with `blocks.`, buffers are those of the loss alone. Raises ValueError.
    """
    optimizer = find_optimizer(optim)
    check("layout", layout, LAYOUTS)
    check("precision", precision, ACCOUNTINGS)
    for name in options:
        check(f"{optim}'s option", name, options_of(optimizer))
    check("offload", offload, (None, "cpu", "disk"))
    check("offload_params", offload_params, (None, "cpu", "disk"))
    if offload_params and layout not in ("zero3", "fsdp"):
        raise ValueError(
            f"offload_params={offload_params} needs layout=zero3 or fsdp, not {layout}"
        )
    check_world(world, micro_batches, fsdp_shard)
    if ep > 1 and (layout not in EXPERT_PARALLEL or fsdp_shard or offload or offload_params):
        raise ValueError(
            f"ep={ep} needs layout=ddp, zero1 or fsdp, without fsdp_shard, offload, offload_params"
        )
    # DDP shares out nothing, hybrid FSDP shards over some of the ranks, all others over all.
    n = {"ddp": 1, "fsdp": fsdp_shard or world}.get(layout, world)
    c = Case(
        shapes_here(shapes, world, ep),
        optimizer,
        options,
        layout,
        world,
        n,
        ep,
        precision,
        reshard,
        micro_batches,
        bucket_mb * 2**20,
        chunk_mb * 2**20,
        offload,
        offload_params,
        logits,
        loss_chunk,
        inside,
        hooks,
        kept,
    )
    # The run needs as much memory as its fullest rank.
    held, fullest = fullest_rank(c)
    return in_all(c, stepped_by(c, fullest), *held, activations)


def check_world(world: int, micro_batches: int, fsdp_shard: int | None) -> None:
    """Raises ValueError for sizes that do not fit."""
    if min(world, micro_batches) < 1:
        raise ValueError(f"world={world} and micro_batches={micro_batches} must be at least 1")
    if world % (fsdp_shard or 1):
        fits = max(k for k in range(1, min(world, fsdp_shard) + 1) if world % k == 0)
        raise ValueError(f"fsdp_shard={fsdp_shard} must divide the {world} GPUs; type {fits}")


def stepped_by(c: Case, rank: int) -> dict[str, tuple[float, float]]:
    """Name -> (bytes of weights, bytes of state) of what this rank steps of a parameter.

    In the order of the optimizer: its groups are the kinds.
    """
    kinds = [*dict.fromkeys(kind for kind, _ in c.shapes.values())]
    in_groups = sorted(c.shapes, key=lambda name: kinds.index(c.shapes[name][0]))
    return {name: c.stepped(name) for name in in_groups if c.place(name, rank) in c.steppers[name]}


def fullest_rank(c: Case) -> tuple[tuple[float, float, float], int]:
    """(bytes of (parameters, gradients, state) between the steps, the rank), where most is held."""
    held = held_by_rank(c)
    fullest = max(range(c.n), key=lambda rank: sum(held[rank]))
    return held[fullest], fullest


def held_by_rank(c: Case) -> list[tuple[float, float, float]]:
    """For each rank, bytes of (parameters, gradients, state) between the steps."""
    weights_of_all = 0
    state_of_all = 0
    weights = [0] * c.n  # beside what all ranks have
    state = [0] * c.n
    for name, ranks in c.steppers.items():
        its_weights, its_state = c.stepped(name)
        if len(ranks) == c.n_holders(name):
            weights_of_all += its_weights
            state_of_all += its_state
            continue
        for rank in itertools.chain(*(c.ranks_at(name, place) for place in ranks)):
            weights[rank] += its_weights
            state[rank] += its_state
    # Of thousands of ranks most step equally much.
    held = {}
    for pair in {*zip(weights, state)}:
        held[pair] = held_bytes(c, weights_of_all + pair[0], state_of_all + pair[1])
    return [held[pair] for pair in zip(weights, state)]


def held_bytes(c: Case, weights: float, state: float) -> tuple[float, float, float]:
    """Bytes of (parameters, gradients, state) of a rank that steps so many bytes of weights."""
    if c.layout == "fsdp":
        shard = sum(math.prod(c.shard(name)) for name in c.shapes)
        return c.weight * shard, c.gradient * shard, state
    stage = LAYOUTS.index(c.layout)  # ddp is stage 0
    all_numbers = sum(c.sizes.values())
    # With one micro-batch our zero1 sends gradients as early as zero2. The papers count them all.
    sends_early = stage == 1 and c.micro_batches == 1 and c.precision not in PUBLISHED
    parameters = weights if stage >= 3 else c.weight * all_numbers
    gradients = c.gradient * all_numbers
    if stage >= 2 or sends_early:
        gradients = c.gradient * weights / c.weight
    return parameters, gradients, state


def in_all(
    c: Case, owned: dict, parameters: float, gradients: float, state: float, activations: float
) -> dict[str, float]:
    """What bytes_per_rank returns, for a rank that steps `owned` and holds so many bytes."""
    # An FSDP owner also keeps full weights (`kept`). An exchange holds three buffers of `wire`
    # bytes: full gradients, the message out and the message in.
    at_owner = 0
    if c.layout == "fsdp" and c.by_block:
        at_owner = sum(c.sizes[name] for name in c.full) / c.n
    kept = c.weight * at_owner
    wire = c.gradient * at_owner
    chunks = offloaded_chunks(c, owned, state)
    backward = 0
    step = 0
    host = 0
    copied = 0
    # Temporaries depend on the shapes of blocks.
    if c.by_block:
        backward = backward_bytes(c)
        step = step_bytes(c, owned, gradients, chunks)
        copied = copied_bytes(c, owned)
    # The two messages are gone when the step begins.
    exchanged = max(3 * wire, wire + copied)
    if c.offload_params:
        # The step is on the host with all that it needs. What travels passes the device.
        host = parameters + gradients + state + kept + wire + max(step + copied, wire)
        # fsdp moves a unit's gradients there at once, zero3 all of them after backward.
        if c.layout == "fsdp":
            gradients = 0
        parameters = 0
        state = 0
        kept = 0
        step = 2 * wire
    elif c.offload:
        host = state
        state = 0
        step = step + exchanged + chunks
    else:
        step += exchanged
    # Backward begins at the loss, before the gradients of one micro-batch are there.
    of_loss, early = 0, 0
    if c.logits:
        words, width = c.head
        of_loss, early = loss_bytes(c.precision, c.logits / words, words, width, c.loss_chunk)
    at_loss = backward + early + of_loss - c.inside
    if c.micro_batches == 1:
        at_loss -= gradients
        # DDP on several ranks has its buckets all the time. Others make gradients as activations
        # go, so that either the first block of backward has the most, or the last one.
        has_buckets = c.layout == "ddp" and c.world > 1
        if not has_buckets and c.precision not in PUBLISHED:
            gathers = c.layout in ("zero3", "fsdp")
            at_first = early - gradients + (backward if gathers else 0)
            backward = max(at_first, backward + 2 * c.inside - activations)
    else:
        # It comes beside the gradients of earlier micro-batches.
        backward += early
    # These three are not at the same time, and the step finds no activations.
    most = max(at_loss, backward, step - activations)
    held = dict(
        parameters=parameters,
        gradients=gradients,
        state=state,
        # Below 0: so many of them have gone when all gradients are there.
        activations=activations + min(0, most),
        buffers=kept + max(0, most),
    )
    return held | dict(total=sum(held.values()), host=host)


def offloaded_chunks(c: Case, owned: dict, state: float) -> float:
    """The most bytes of offloaded state that are on the device at once."""
    if not c.offload or c.offload_params:
        return 0
    if c.by_block:
        return in_flight([*owned.values()], c.chunk)
    # Without shapes: two chunks' share of all state.
    return min(state, 2 * c.chunk * state / sum(size for size, _ in owned.values()))


def loss_bytes(
    precision: str, tokens: float, words: float, width: int, loss_chunk: int | None
) -> tuple[float, float]:
    """Bytes that the loss's backward holds for a while, and of the head's gradient.

    Two numbers for each logit: the gradients of log softmax, and of its input, in at least float32.
    In chunks (layers/chunked_loss.py) it is two for each logit of a part, or a product for some
    words of the head's gradient; besides the chunk's logits, autocast's copy of the head, and the
    gradients of the hidden states. A loss in chunks makes the head's gradient before backward
    begins; without chunks that is 0 here.
    """
    row = row_of(precision)
    wide = row.state.itemsize
    if loss_chunk is None:
        return 2 * wide * tokens * words, 0
    operand = row.products.itemsize
    of_part = 2 * wide * words * min(tokens, chunk_part(loss_chunk))
    copy = operand * words * width if has_copies(row) else 0
    of_words = (operand + wide if operand != wide else wide) * min(words, 8192) * width
    at_once = max(of_part, of_words)
    of_hidden = bytes_of(precision)[0] * tokens * width
    whole = operand * words * min(tokens, loss_chunk) + at_once + copy + of_hidden
    return whole, wide * words * width


def backward_bytes(c: Case) -> float:
    """Bytes of weights and gradients that are on their way in backward."""
    if c.n > 1 or c.world > 1 or c.offload_params:
        return travelling_bytes(c)
    # Beside the gradients of earlier micro-batches.
    return c.gradient * c.at_once if c.has_experts and c.micro_batches > 1 else 0


def unit_sizes(c: Case, names) -> dict[str, int]:
    """Numbers of these parameters in each unit that is gathered and sent at once."""
    units = {"before": 0, "after": 0} | dict.fromkeys(c.unit_of.values(), 0)
    for name in names:
        units[c.unit_of[name]] += c.sizes[name]
    return units


def travelling_bytes(c: Case) -> float:
    """Bytes of weights and gradients on their way in backward, beside what the rank keeps."""
    units = unit_sizes(c, c.shapes)
    all_numbers = sum(units.values())
    unit = max(units.values())
    # What comes to a rank, or leaves it, of each of ZeRO's units. Of a full parameter that is not
    # what the rank owns; of rows it is all, for its own ones have memory of their own besides.
    foreign = dict(units)
    for name, ranks in c.steppers.items():
        if len(ranks) == 1:
            foreign[c.unit_of[name]] -= c.sizes[name] / c.n_holders(name)
    root = units["before"] + units["after"]
    blocks = [size for name, size in units.items() if name not in ("before", "after")]
    block = max(blocks)
    bucket = min(max(c.bucket, c.gradient * unit), c.gradient * all_numbers)
    if c.layout == "ddp":
        return c.gradient * c.at_once
    if c.layout == "zero1" and c.micro_batches > 1:
        return bucket
    if c.layout in ("zero1", "zero2"):
        return bucket + c.gradient * max(foreign.values())
    if c.layout == "zero3":
        return zero3_bytes(c, units, units if c.offload_params else foreign)

    # fsdp: the block in work and the next one are gathered, and embedding and head.
    two_blocks = max(a + b for a, b in itertools.pairwise([*blocks, block]))
    gathered = root + two_blocks if c.reshard else all_numbers
    gathered = c.weight * gathered
    if c.micro_batches > 1:
        # Full gradients wait for the last micro-batch, beside this rank's own shards of them, which
        # are on the host where weights are offloaded.
        own = sum(size / c.n_holders(name) for name, size in c.sizes.items())
        full = all_numbers - (0 if c.offload_params else own)
        return gathered + c.gradient * (full + max(root, block))
    return gathered + 2 * c.gradient * max(root, block)


def zero3_bytes(c: Case, units: dict[str, int], fetched: dict[str, float]) -> float:
    """Bytes of weights and gradients on their way in ZeRO-3's backward, where they are most.

    In unit i that is the weights of i and of the unit before, the gradients of i, and those of the
    unit after, which are sent. A tied embedding, or a norm before the blocks, keeps unit 0 there.
    The gradients of a tied embedding's two uses, and their sum, are there at once.
    """
    order = ["before", *(name for name in units if name not in ("before", "after")), "after"]
    is_tied = all(kind != "head" for kind, _ in c.shapes.values())
    has_norm = any(c.unit_of[name] == "before" and len(x) < 2 for name, (_, x) in c.shapes.items())
    stays = {"before"} if is_tied or has_norm else set()
    most = 0
    for i, name in enumerate(order):
        here = {name, order[max(i - 1, 0)]} | stays
        weights = sum(fetched[unit] for unit in here)
        gradients = units[name] + sum(units[after] for after in order[i + 1 : i + 2])
        if is_tied and i == 0:
            # A loss in chunks has made one of them early, which is counted apart.
            gradients += math.prod(c.head) * (1 if c.has_chunks else 2)
        most = max(most, c.weight * weights + c.gradient * gradients)
    return most


def in_flight(stepped: list[tuple[float, float]], limit: float) -> float:
    """The most bytes of state on the device at once, which is the state of two chunks.

    stepped: bytes of (weights, state), cut into chunks of at most `limit` bytes of weights as
    memory/offload.py does it.
    """
    chunks = [0]
    size = 0
    for weights, state in stepped:
        if size and size + weights > limit:
            chunks.append(0)
            size = 0
        chunks[-1] += state
        size += weights
    # While one chunk steps, the next one arrives. Nothing follows the last one.
    return max(a + b for a, b in itertools.pairwise([*chunks, 0]))


def step_bytes(c: Case, owned: dict, gradients: float, chunks: float) -> float:
    """Bytes of the temporaries of an optimizer's step."""
    stochastic = c.row.stochastic
    owned_weights = sum(size for size, _ in owned.values())
    # Stochastic rounding steps float32 copies of a chunk, with their gradients.
    wide = c.row.state.itemsize if stochastic else c.weight
    at_once = c.chunk / wide if chunks or stochastic else math.inf
    step = update_bytes(c, wide, at_once)
    if stochastic:
        largest = max(c.sizes.values())
        step = max(step, 21 * largest) + 4 * min(owned_weights, max(c.chunk, c.weight * largest))
    if c.layout == "zero1":
        # The gradients of other owners' parameters are gone by then.
        step -= gradients - c.gradient * owned_weights / c.weight
    return step


def copied_bytes(c: Case, owned: dict) -> float:
    """Bytes of the copies that hooks need of the matrices, or of those of a chunk."""
    if not c.hooks:
        return 0
    matrices = [size for name, (size, _) in owned.items() if c.shapes[name][0] == "matrix"]
    copied = sum(matrices)
    in_chunks = c.row.stochastic or (c.offload and not c.offload_params)
    if in_chunks:
        copied = min(copied, max([c.chunk, *matrices]))
    return copied * (c.row.state.itemsize / c.weight if c.row.stochastic else 1)


def update_bytes(c: Case, wide: int, at_once: float) -> float:
    """Bytes of the temporaries of one update.

    They are as large as the largest parameter, at `wide` bytes a number. A method that multiplies
    matrices of one shape together needs them for a stack, of `at_once` numbers or one matrix, and
    of no more than Muon stacks.
    """
    largest = wide * max(c.sizes.values())
    if not attribute(c.optimizer, "matrices_only"):
        return largest
    most = 0
    for sides, count in stacks(c, at_once):
        # Two copies of each matrix, and three products of its short side.
        numbers = math.prod(sides)
        short = min(sides[0], numbers // sides[0])
        each = 2 * numbers + 3 * short**2
        most = max(most, each * min(math.ceil(count / c.n), max(1, muon.STACK // numbers)))
    itemsize = 8 if c.row.weights.itemsize == 8 else 2  # Muon computes in bfloat16, or float64
    return max(largest, most * itemsize)


def stacks(c: Case, at_once: float) -> list[tuple[tuple[int, ...], int]]:
    """(sides, how many) of all ranks' matrices of a shape in one chunk.

    at_once: numbers in a chunk of one rank; a larger matrix is a chunk by itself.
    """
    chunks = [collections.Counter()]
    size = 0
    for kind, shape in c.shapes.values():
        if kind != "matrix":
            continue
        numbers = math.prod(shape)
        if size and size + numbers > at_once * c.n:
            chunks.append(collections.Counter())
            size = 0
        chunks[-1][shape] += 1
        size += numbers
    return [stack for chunk in chunks for stack in chunk.items()]


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
