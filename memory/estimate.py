"""How many bytes a rank needs, predicted from shapes alone: every layout, optimizer and precision.

    python -m memory.estimate --params=7B --gpus=64 --optim=adamw
    python -m memory.estimate --params=7e9 --n_layer=32 --n_embd=4096 --block_size=2048 --batch=4
    python -m memory.estimate --n_layer=12 --n_embd=768 --vocab_size=50304 --optim=muon --batch=16

Without --params the exact tensors of our GPT, in whole parameters or rows as each layout deals them
out (with it equal parts, for Muon all of them matrices); a row shows the rank that holds most.
--batch is one rank's micro-batch. 7B is 7e9, as are K, M and T, and GB are 1e9 bytes. Bytes of a
parameter, and of one number of state, by precision:

    name     weight  gradient  master  state  with Adam  what it is
    fp64     8       8         -       8      32         ours
    fp32     4       4         -       4      16         ours
    bf16     4       4         -       4      16         ours: autocast over fp32 weights
    fp16     4       4         -       4      16         the same with loss scaling
    fp8      4       4         -       4      16         the same with e4m3 products
    bf16_sr  2       2         -       4      12         ours: stochastic rounding, no master
    mixed    2       2         4       4      16         Rajbhandari et al. 2020 (1910.02054)
    texts    2       2         -       4      12         a common text, which forgets the master

    layout   weights   gradients   state       held only for a while ("buffers")
    ddp      all       all         all         the gradient on its way into its bucket
    zero1    all       all         owner       a unit's gradients, or a bucket
    zero2    all       owner       owner       two units' gradients
    zero3    owner     owner       owner       two units' weights and gradients
    fsdp     rows/n    rows/n      rows/n      weights of embedding, head and two blocks
                                               (reshard=False: all), one unit's gradients twice;
                                               those of earlier micro-batches

To buffers come the temporaries of a step, at least the largest parameter's (Muon: of the matrices
of one shape and its transpose two bfloat16 copies, and three short x short products), for bf16 and
fp16 the copies of the weights that autocast keeps till backward (fp8: of the head), and for bf16_sr
the float32 weights and gradients of a chunk of 64 MiB, with 21 bytes a number of the largest
parameter to round it. With fsdp, methods that need whole matrices keep state and weights at owners
too, see parallel/sharded_optimizer.py.

Activations kept for backward, for b x s tokens, L layers, h channels, V words:

    34 s b h L                Korthikanti et al. 2022 (2205.05198), mixed precision, without the s²
                              of plain attention, and without logits
    20 s b h L                a common text: 7B, b = 4, s = 2048 make its 105.5 GB; the primary
                              source says 36.5 of activations, not 21.5
    b s (k h L + r h + l V)   ours, counted by autograd's saved tensors: see KEPT, and with
                              --activation_checkpoint LEFT, to which comes what backward makes
                              again of one block or segment, and the gradients inside a block: the
                              peak of backward

Offloaded state passes the device in chunks of 64 MiB of parameters, two at a time; a larger
parameter is a chunk by itself. (If the device is the CPU, nothing passes, and what files hold needs
no memory.)

Rough, and rather too much than too little: with one micro-batch gradients come as activations go,
and both are counted in full. Not in it: fragmentation, the device's own context, kernels'
workspaces (of FP8, where it is emulated, float32 operands), the peak inside a layer. Measured with
tiny batches and several micro-batches: within 5 % (tests/test_estimate.py).
"""

import difflib
import functools
import inspect
import itertools
import math
import sys
import typing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

from optim.attributes import attribute, own_classes
from parallel.ownership import owners_by_shape
from precision.amp import PRECISIONS, Precision

# Accountings of others: bytes of a weight, its gradient, its master copy, one number of state
PUBLISHED = {"mixed": (2, 2, 4, 4), "texts": (2, 2, 0, 4)}
ACCOUNTINGS = (*PRECISIONS, *PUBLISHED)
LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
# By arch, bytes of a weight and of a product's operand: (k, r, l) of the formula above; l also
# covers the logits' softmax
KEPT = {
    ("modern", 8, 8): (152, 18, 16),
    ("modern", 4, 4): (76, 9, 8),
    ("modern", 4, 2): (51, 6, 8),
    ("gpt2", 8, 8): (128, 16, 8),
    ("gpt2", 4, 4): (64, 8, 4),
    ("gpt2", 4, 2): (40, 6, 4),
    ("track3", 8, 8): (168, 42, 24),
    ("track3", 4, 4): (84, 21, 12),
    ("track3", 4, 2): (59, 18, 12),
    ("modern", 2, 2): (47, 6, 8),
    ("gpt2", 2, 2): (32, 4, 4),
    ("track3", 2, 2): (55, 18, 12),
}
# with activation checkpointing in place of k: full, attention, mlp, selective; and gradients inside
# a block, with what track3's norm of the embedding has kept
LEFT = {
    ("modern", 8, 8): (8, 96, 88, 88, 105),
    ("modern", 4, 4): (4, 48, 44, 44, 53),
    ("modern", 4, 2): (4, 30, 37, 24, 28),
    ("gpt2", 8, 8): (8, 96, 64, 88, 41),
    ("gpt2", 4, 4): (4, 48, 32, 44, 20),
    ("gpt2", 4, 2): (4, 30, 26, 24, 14),
    ("track3", 8, 8): (8, 112, 104, 88, 121),
    ("track3", 4, 4): (4, 56, 52, 44, 61),
    ("track3", 4, 2): (4, 38, 45, 24, 36),
    ("modern", 2, 2): (2, 28, 30, 22, 28),
    ("gpt2", 2, 2): (2, 24, 16, 22, 11),
    ("track3", 2, 2): (2, 36, 38, 22, 36),
}

# Name -> (embedding | head | matrix | scalar, shape)
Shapes = dict[str, tuple[str, tuple[int, ...]]]


# ---- what there is -------------------------------------------------------------------------------
def gpt_shapes(
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    block_size: int = 1024,
    arch: str = "modern",
    n_head: int = 1,
    n_kv_head: int | None = None,
) -> Shapes:
    """The parameters of model.py in its order. arch `gpt2`: tied, with biases, gains and positions;
    `track3`: with biases, gains and a norm of the embedding."""
    C, V, gpt2, bias = n_embd, vocab_size, arch == "gpt2", arch != "modern"
    kv = C // n_head * (n_kv_head or n_head)
    shapes = {"embed.weight": ("embedding", (V, C))}
    if gpt2:
        shapes["positions.weight"] = "embedding", (block_size, C)

    def norm(name: str) -> None:
        for part in {"modern": (), "gpt2": ("weight", "bias"), "track3": ("weight",)}[arch]:
            shapes[f"{name}.{part}"] = "scalar", (C,)

    if arch == "track3":
        norm("embed_norm")
    for i in range(n_layer):
        for part, linears in (
            ("attn", dict(q=(C, C), k=(kv, C), v=(kv, C), proj=(C, C))),
            ("mlp", dict(fc=(4 * C, C), proj=(C, 4 * C))),
        ):
            norm(f"blocks.{i}.{part}_norm")
            for name, shape in linears.items():
                shapes[f"blocks.{i}.{part}.{name}.weight"] = "matrix", shape
                if bias:
                    shapes[f"blocks.{i}.{part}.{name}.bias"] = "scalar", shape[:1]
    norm("final_norm")
    if not gpt2:
        shapes["head.weight"] = "head", (V, C)
    if arch == "track3":
        shapes["head.bias"] = "scalar", (V,)
    return shapes


def even_shapes(params: float, world: int) -> Shapes:
    """`params` parameters of which nothing is known, in `world` equal parts."""
    return {f"part {i}": ("matrix", (math.ceil(params / world),)) for i in range(world)}


@functools.cache
def find_optimizer(name: str) -> type:
    """The class in optim/ that `optim` names. Raises ValueError where there is none, or where it
    does not say what it keeps."""
    ours = own_classes()
    check("optim", name, ours)
    if not hasattr(ours[name], "state_numbers"):
        raise ValueError(
            f"optim={name} does not say what it keeps; give {ours[name].__name__} a "
            "state_numbers(shape), as in optim/adamw.py"
        )
    return ours[name]


def options_of(optimizer: type) -> dict[str, inspect.Parameter]:
    """The options that change the size of its state."""
    parameters = inspect.signature(optimizer.state_numbers).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def state_numbers(optimizer: type, kind: str, shape: tuple[int, ...], **options) -> int:
    """How many numbers it remembers of one parameter."""
    if attribute(optimizer, "matrices_only"):
        return optimizer.state_numbers(shape, kind == "matrix", **options)
    return optimizer.state_numbers(shape, **options)


def bytes_of(precision: str) -> tuple[int, int, int, int]:
    """Bytes of a weight, its gradient, its master copy, one number of state."""
    if precision in PUBLISHED:
        return PUBLISHED[precision]
    row = PRECISIONS[precision]
    return row.weights.itemsize, row.weights.itemsize, 0, row.state.itemsize


def heading(precision: str) -> str:
    """What the bytes of this accounting are, in a line."""
    published = {
        "mixed": "the primary source's 2 + 2 + 4 bytes and state in float32 (16 with Adam)",
        "texts": "a text's 2 + 2 bytes and state in float32 (12 with Adam), no master weights",
    }
    if precision in published:
        return published[precision]
    row = PRECISIONS[precision]
    weight, gradient, _, number = bytes_of(precision)
    how = "e4m3 products, " if row.fp8_blocks else ""
    how += "autocast over float32 weights: " if has_copies(row) else ""
    how += "rounded by chance: " if row.stochastic else ""
    with_adam = f" ({weight + gradient + 2 * number} with Adam)" if row.stochastic else ""
    state = str(row.state).removeprefix("torch.")
    return f"{how}{weight} + {gradient} bytes and state in {state}{with_adam}"


def has_copies(row: Precision) -> bool:
    """Does autocast copy weights?"""
    return row.products != row.weights


# ---- who holds it --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """What bytes_per_rank is asked, and what follows at once."""

    shapes: Shapes
    optimizer: type
    options: dict  # the optimizer's
    layout: str
    world: int
    n: int  # ranks that share one copy
    precision: str
    reshard: bool
    micro_batches: int
    bucket: float  # bytes
    chunk: float
    offload: str | None
    offload_params: str | None

    @property
    def sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, (_, shape) in self.shapes.items()}

    @property
    def row(self) -> Precision:
        """The papers' accountings neither copy nor round."""
        return PRECISIONS.get(self.precision, PRECISIONS["fp32"])

    @property
    def weight(self) -> int:
        return bytes_of(self.precision)[0]

    @property
    def gradient(self) -> int:
        return bytes_of(self.precision)[1]

    @property
    def by_block(self) -> bool:
        return any(name.startswith("blocks.") for name in self.shapes)

    @property
    def whole(self) -> dict[str, tuple[int, ...]]:
        """What ranks own whole: with ZeRO all parameters, with FSDP only what cannot be stepped in
        shards."""
        alone = self.n == 1 or self.optimizer.elementwise
        matrices = attribute(self.optimizer, "matrices_only")
        return {
            name: shape
            for name, (kind, shape) in self.shapes.items()
            if self.layout != "fsdp" or not (alone or (matrices and kind != "matrix"))
        }

    def state_bytes(self, kind: str, shape: tuple[int, ...]) -> int:
        _, _, master, number = bytes_of(self.precision)
        numbers = state_numbers(self.optimizer, kind, shape, **self.options)
        return number * numbers + master * math.prod(shape)

    def shard(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """fsdp's part of a parameter: rows."""
        return math.ceil(shape[0] / self.n), *shape[1:]


def bytes_per_rank(
    shapes: Shapes,
    optim: str = "adamw",
    layout: str = "ddp",
    world: int = 1,
    precision: str = "fp32",
    *,
    fsdp_shard: int | None = None,
    reshard: bool = True,
    micro_batches: int = 1,
    activations: float = 0,
    bucket_mb: float = 25.0,
    offload: str | None = None,
    offload_params: str | None = None,
    chunk_mb: float = 64.0,
    owners=owners_by_shape,
    **options,
) -> dict[str, float]:
    """Bytes on the fullest rank: parameters, gradients, state, activations, buffers, their total;
    and host.

    shapes: as gpt_shapes gives them. fsdp_shard: ranks that share one copy (None: all). offload (of
    state) and offload_params (zero3, fsdp): `cpu` or `disk`, both counted under host. owners:
    {name: shape}, ranks -> {name: rank}. options: the optimizer's, those that its state_numbers
    takes by keyword. Buffers are 0 if no name begins with `blocks.`. Raises ValueError for names
    that are not known, with the nearest one, and for sizes that do not fit.
    """
    optimizer = find_optimizer(optim)
    check("layout", layout, LAYOUTS)
    check("precision", precision, ACCOUNTINGS)
    for name in options:
        check(f"{optim}'s option", name, options_of(optimizer))
    for what, place in ("offload", offload), ("offload_params", offload_params):
        check(what, place, (None, "cpu", "disk"))
    if offload_params and layout not in ("zero3", "fsdp"):
        raise ValueError(
            f"offload_params={offload_params} needs layout=zero3 or fsdp, not {layout}"
        )
    if min(world, micro_batches) < 1 or world % (fsdp_shard or 1):
        raise ValueError(
            f"world={world} and micro_batches={micro_batches} must be at least 1, and "
            f"fsdp_shard={fsdp_shard} a divisor of world"
        )
    c = Case(
        shapes,
        optimizer,
        options,
        layout,
        world,
        1 if layout == "ddp" else (fsdp_shard or world) if layout == "fsdp" else world,
        precision,
        reshard,
        micro_batches,
        bucket_mb * 2**20,
        chunk_mb * 2**20,
        offload,
        offload_params,
    )
    stepped = stepped_by_rank(c, owners)
    ranks = held_by_rank(c, stepped)
    fullest = max(range(c.n), key=lambda rank: sum(ranks[rank]))
    return in_all(c, stepped[fullest], *ranks[fullest], activations)


def stepped_by_rank(c: Case, owners) -> list[list[tuple[int, int]]]:
    """(bytes of weights, of state) of all that a rank steps, rank by rank, in the optimizer's
    order."""
    held_by, stepped = owners(c.whole, c.n), [[] for _ in range(c.n)]
    groups = dict.fromkeys(kind for kind, _ in c.shapes.values())
    for group in groups:
        for name, (kind, shape) in c.shapes.items():
            if kind != group:
                continue
            shape = shape if name in held_by else c.shard(shape)
            both = c.weight * math.prod(shape), c.state_bytes(kind, shape)
            for rank in [held_by[name]] if name in held_by else range(c.n):
                stepped[rank].append(both)
    return stepped


def held_by_rank(c: Case, stepped: list) -> list[tuple[float, float, float]]:
    """(parameters, gradients, state) in bytes, rank by rank."""
    if c.layout == "fsdp":
        share = sum(math.prod(c.shard(shape)) for _, shape in c.shapes.values())
        held = c.weight * share, c.gradient * share
        return [(*held, sum(state for _, state in owned)) for owned in stepped]
    stage, everything = LAYOUTS.index(c.layout), sum(c.sizes.values())
    # With one micro-batch our zero1 sends gradients as early as zero2; the papers count them whole.
    early = stage == 1 and c.micro_batches == 1 and c.precision not in PUBLISHED
    ranks = []
    for owned in stepped:
        size, state = sum(size for size, _ in owned), sum(state for _, state in owned)
        parameters = size if stage >= 3 else c.weight * everything
        gradients = c.gradient * (size / c.weight if stage >= 2 or early else everything)
        ranks.append((parameters, gradients, state))
    return ranks


def in_all(
    c: Case, owned: list, parameters: float, gradients: float, state: float, activations: float
) -> dict[str, float]:
    """What bytes_per_rank returns, of a rank that steps `owned` and holds so many bytes."""
    # Owners keep whole weights; gradients come and go
    owns = c.layout == "fsdp" and c.by_block
    at_owner = sum(c.sizes[name] for name in c.whole) / c.n if owns else 0
    kept, wire = c.weight * at_owner, c.gradient * at_owner
    chunks = offloaded_chunks(c, owned, state)
    backward = of_backward(c) if c.by_block else 0
    step = of_the_step(c, owned, gradients, chunks) if c.by_block else 0
    host = 0
    # Then the step, and all it needs, is on the host; what travels passes the device
    if c.offload_params:
        host = parameters + gradients + state + kept + wire + max(step, wire)
        # fsdp takes a unit's gradients there at once, zero3 all of them after backward
        gradients = 0 if c.layout == "fsdp" else gradients
        parameters, state, kept, step = 0, 0, 0, 2 * wire
    elif c.offload:
        host, state, step = state, 0, step + 3 * wire + chunks
    else:
        step += 3 * wire
    held = dict(
        parameters=parameters,
        gradients=gradients,
        state=state,
        activations=activations,
        # Backward and step are not at the same time
        buffers=kept + max(backward, step - activations),
    )
    return held | dict(total=sum(held.values()), host=host)


def offloaded_chunks(c: Case, owned: list, state: float) -> float:
    """Bytes of offloaded state on the device."""
    if not c.offload or c.offload_params:
        return 0
    if c.by_block:
        return in_flight(owned, c.chunk)
    return min(state, 2 * c.chunk * state / sum(size for size, _ in owned))


def of_backward(c: Case) -> float:
    """Bytes that a rank has for a while in backward: what comes and goes, and autocast's copies of
    the weights, which stay till then."""
    several = c.n > 1 or c.world > 1 or c.offload_params
    backward = coming_and_going(c) if several else 0
    if has_copies(c.row) and c.layout != "zero3":
        # A tied head is the embedding
        head = [x for x, (kind, _) in c.shapes.items() if kind == "head"] or ["embed.weight"]
        matrices = [x for x, (kind, _) in c.shapes.items() if kind == "matrix"]
        copied = head if c.row.fp8_blocks else head + matrices
        backward += c.row.products.itemsize * sum(c.sizes[x] for x in copied)
    return backward


def coming_and_going(c: Case) -> float:
    """Bytes of weights and gradients that a rank has for a while in backward, beside what it
    keeps."""
    units = {"before": 0, "after": 0}  # and the blocks -> numbers in them
    for name, size in c.sizes.items():
        unit = "before" if len(units) == 2 else "after"
        unit = name.split(".")[1] if name.startswith("blocks.") else unit
        units[unit] = units.get(unit, 0) + size
    everything, unit = sum(units.values()), max(units.values())
    root = units["before"] + units["after"]
    block = max(size for name, size in units.items() if name not in ("before", "after"))
    sent = min(max(c.bucket, c.gradient * unit), c.gradient * everything)
    others = (c.n - 1) / c.n
    # Unless they are offloaded, a rank keeps its own weights, and fsdp's gradients, on the device
    missing = 1 if c.offload_params else others
    if c.layout == "ddp":
        return c.gradient * max(c.sizes.values())
    if c.layout == "zero1" and c.micro_batches > 1:
        return sent
    if c.layout in ("zero1", "zero2"):
        return sent + others * c.gradient * unit
    if c.layout == "zero3":
        return missing * 2 * c.weight * unit + (1 + others) * c.gradient * unit
    gathered = c.weight * (root + 2 * block if c.reshard else everything)
    if c.micro_batches > 1:  # gradients wait, whole
        return gathered + c.gradient * (missing * everything + max(root, block))
    return gathered + 2 * c.gradient * max(root, block)


def in_flight(stepped: list[tuple[float, float]], limit: float) -> float:
    """Most state on the device: that of two chunks, as memory/offload.py cuts (weights, state) into
    them."""
    chunks, size = [0], 0
    for weights, state in stepped:
        # One that is larger than the limit is a chunk by itself
        if size and size + weights > limit:
            chunks, size = [*chunks, 0], 0
        chunks[-1], size = chunks[-1] + state, size + weights
    return max(a + b for a, b in itertools.pairwise([*chunks, 0]))


def of_the_step(c: Case, owned: list, gradients: float, chunks: float) -> float:
    """Bytes of the temporaries of an optimizer's step."""
    stochastic, here = c.row.stochastic, sum(size for size, _ in owned)
    # Rounding by chance steps float32 copies of a chunk, with their gradients
    wide = c.row.state.itemsize if stochastic else c.weight
    step = of_the_update(c, wide, c.chunk / wide if chunks or stochastic else math.inf)
    if stochastic:
        largest = max(c.sizes.values())
        step = max(step, 21 * largest) + 4 * min(here, max(c.chunk, c.weight * largest))
    if c.layout == "zero1":  # others' gradients are gone
        step -= gradients - c.gradient * here / c.weight
    return step


def of_the_update(c: Case, wide: int, at_once: float) -> float:
    """Those of the largest parameter, in numbers of `wide` bytes; where matrices of one shape are
    multiplied together, of a stack, into which go no more of them than at_once numbers."""
    most = wide * max(c.sizes.values())
    if not attribute(c.optimizer, "matrices_only"):
        return most
    # Transposes too
    sides = [tuple(sorted(shape)) for kind, shape in c.shapes.values() if kind == "matrix"]
    stack = max(
        (2 * math.prod(s) + 3 * s[0] ** 2)
        * min(math.ceil(sides.count(s) / c.n), max(1, at_once / math.prod(s)))
        for s in set(sides)
    )
    return max(most, stack * (8 if c.row.weights.itemsize == 8 else 2))


def activation_bytes(
    precision: str,
    tokens: int,
    n_layer: int,
    n_embd: int,
    vocab_size: int = 0,
    arch: str = "modern",
    activation_checkpoint: str = "none",
    tp: int = 1,
) -> float:
    """Kept for backward by one micro-batch of `tokens` = b x s: by 34 s b h, the text's 20 s b h,
    or ours.

    activation_checkpoint: as in memory/activation_checkpoint.py; tp: ranks that share out what
    full_sharded keeps. What is offloaded is on the device while it is used, for two blocks at a
    time.
    """
    check("precision", precision, ACCOUNTINGS)
    if precision in PUBLISHED:  # with inputs and results of products of 2 bytes
        per_layer, per_channel, per_word = {"mixed": 34, "texts": 20}[precision], 0, 0
        full, attention, mlp, selective, passing = 2, 26, 18, 22, 0
    else:
        row = PRECISIONS[precision]
        key = arch, row.weights.itemsize, row.products.itemsize
        per_layer, per_channel, per_word = KEPT[key]
        full, attention, mlp, selective, passing = LEFT[key]
    how, _, number = activation_checkpoint.partition("_")
    if not (how in ("every", "segments") and number.isdecimal()):
        how, number = activation_checkpoint, 1
    K, L, attention, selective = (
        int(number),
        n_layer,
        min(attention, per_layer),
        min(selective, per_layer),
    )
    if K < 1 or (how == "segments" and K > L):
        raise ValueError(
            f"activation_checkpoint={activation_checkpoint} takes 1 to {L}, the layers"
        )
    again = math.ceil(L / K)  # layers, where they are taken in steps of K
    by_how = {
        "none": (L * per_layer, 0),
        "full": (L * full, per_layer - full),
        "full_sharded": (L * full / tp, per_layer - full / tp),
        "full_offload": (0, per_layer + full),
        "every": (again * full + (L - again) * per_layer, (per_layer - full) * ((L - 1) % K == 0)),
        "segments": (K * full, again * per_layer - full),
        "attention": (L * attention, 0),
        "mlp": (L * mlp, per_layer - mlp),
        "selective": (L * selective, per_layer - selective),
        "offload": (0, 2 * per_layer),
    }
    check("activation_checkpoint", how, by_how)
    kept, back = by_how[how]
    # Of the head; gone when backward is in the blocks
    after = per_channel * n_embd + per_word * vocab_size
    if how == "none":
        return tokens * (kept * n_embd + after)
    return tokens * (kept * n_embd + max((back + passing) * n_embd, after))


def check(what: str, value, known) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), [k for k in known if k], 1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"there are: {', '.join(map(str, known)) or 'none'}"
        )
        raise ValueError(f"{what} {value!r} is not known; {hint}")


# ---- the command ---------------------------------------------------------------------------------
DEFAULTS = dict(
    params=None,
    gpus=8,
    optim="adamw",
    precision=None,
    n_layer=None,
    n_embd=None,
    vocab_size=50304,
    n_head=1,
    n_kv_head=None,
    block_size=1024,
    arch="modern",
    batch=0,
    micro_batches=1,
    fsdp_shard=None,
    reshard=True,
    bucket_mb=25.0,
    offload=None,
    offload_params=None,
    activation_checkpoint="none",
)
NAMES = {
    "precision": ACCOUNTINGS,
    "arch": ("modern", "gpt2", "track3"),
    "offload": ("cpu", "disk"),
    "offload_params": ("cpu", "disk"),
}
SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def parse(argv: list[str]) -> tuple[dict, dict]:
    """--name=value ... -> the settings, and the optimizer's own from --opt.NAME=value. Raises
    ValueError."""
    settings, options = dict(DEFAULTS), {}
    for name, text in words(argv):
        if name.startswith("opt."):
            options[name[4:]] = text
        else:
            check("the name", name, DEFAULTS)
            choices = own_classes() if name == "optim" else NAMES.get(name, ())
            settings[name] = from_text(name, text, DEFAULTS[name], choices, name == "bucket_mb")
    known = options_of(find_optimizer(settings["optim"]))
    for name, text in options.items():
        check(f"{settings['optim']}'s option", name, known)
        # `float | None`, or `Literal["adam", "sgd"] | None`
        kinds = [known[name].annotation, *typing.get_args(known[name].annotation)]
        choices = [x for k in kinds if typing.get_origin(k) is Literal for x in typing.get_args(k)]
        choices += ["none"] if choices and type(None) in kinds else []
        options[name] = from_text(name, text, known[name].default, choices, float in kinds)
    width, heads = settings["n_embd"] or 0, settings["n_head"]
    if width % heads or heads % (settings["n_kv_head"] or heads):
        raise ValueError(
            f"n_embd={width}, n_head={heads} and n_kv_head={settings['n_kv_head']} must divide, "
            "each the one before"
        )
    return settings, options


def words(argv: list[str]) -> list[tuple[str, str]]:
    """(name, text) of each --name=text, or --name text. Raises ValueError."""
    left, found = list(argv), []
    while left:
        word = left.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals and left and not left[0].startswith("--"):
            text = left.pop(0)
        if not word.startswith("--") or not text:
            raise ValueError(f"{word!r} is not understood; type --name=value")
        found.append((name, text))
    return found


def from_text(name: str, text: str, default, choices=(), fraction: bool = False):
    """The value of --name=text, whose default shows its kind: one of the choices, or else a number,
    which is whole unless it may be a fraction. Raises ValueError."""
    if name == "activation_checkpoint":
        return text
    if default is None and text.lower() == "none":
        return None
    if choices:
        check(name, text, choices)
        return None if text == "none" else text
    if type(default) is bool:
        check(name, text.lower(), ("true", "false"))
        return text.lower() == "true"
    try:
        short = text[:-1] if text[-2:].lower() in ("kb", "mb", "gb", "tb") else text
        factor = SUFFIXES.get(short[-1:].lower())
        value = round(float(short[:-1]) * factor, 3) if factor else float(short)
    except ValueError:
        value = math.nan
    whole, least = not fraction, 0 if fraction or name == "batch" else 1
    if not least <= value < math.inf or (whole and value != round(value)):
        what = (
            f"a whole number, {least} or more, as 8, 7e9 or 7B" if whole else "a number, 0 or more"
        )
        raise ValueError(f"{name}={text} is not allowed; it takes {what}")
    return round(value) if whole else value


def usage(defaults: dict, names: dict) -> str:
    """The flags with their defaults, and what those with a choice take."""
    lines = ["--name=value, or --name value; the values here are the defaults"]
    for name, value in defaults.items():
        choice = [x for x in names.get(name, ()) if x != str(value)]
        value = str(value).lower() if value in (None, True, False) else value
        lines.append(f"  --{name}={value}" + (f"  or {', '.join(choice)}" if choice else ""))
    return "\n".join(lines)


def table(settings: dict, options: dict) -> str:
    """A row for every layout, for each accounting that was asked for. Raises ValueError."""
    s = SimpleNamespace(**settings)
    by_shape, optimizer = s.params is None, find_optimizer(s.optim)
    if (by_shape or s.batch) and None in (s.n_layer, s.n_embd):
        raise ValueError(
            "type --params=7e9, or the model's --n_layer=12 --n_embd=768 --vocab_size=50304; "
            "--batch needs --n_layer and --n_embd in any case"
        )
    if by_shape:
        shapes = gpt_shapes(
            s.n_layer, s.n_embd, s.vocab_size, s.block_size, s.arch, s.n_head, s.n_kv_head
        )
    elif optimizer.state_numbers((2, 3)) != optimizer.state_numbers((6,)):
        raise ValueError(
            f"{s.optim}'s state depends on shapes: give --n_layer and --n_embd, not --params"
        )
    else:
        shapes = even_shapes(s.params, s.gpus)
    if s.activation_checkpoint != "none" and not s.batch:
        raise ValueError(
            "--activation_checkpoint is about activations: type --batch=8, or another number"
        )
    count = sum(math.prod(shape) for _, shape in shapes.values())
    lines = [f"{count:,} parameters, {s.optim}, {s.gpus} ranks; GB (1e9 bytes) on the fullest rank"]
    columns = ("parameters", "gradients", "state", "activations", "buffers", "total", "host")
    for precision in [s.precision] if s.precision else ["bf16"] * by_shape + ["mixed", "texts"]:
        tokens, kept = s.batch * s.block_size, 0
        if s.batch:
            kept = activation_bytes(
                precision,
                tokens,
                s.n_layer,
                s.n_embd,
                s.vocab_size,
                s.arch,
                s.activation_checkpoint,
            )
        lines += [
            "",
            f"{precision}: {heading(precision)}",
            "layout " + "".join(f"{c:>12}" for c in columns),
        ]
        for layout in LAYOUTS:
            held = bytes_per_rank(
                shapes,
                s.optim,
                layout,
                s.gpus,
                precision,
                reshard=s.reshard,
                micro_batches=s.micro_batches,
                fsdp_shard=s.fsdp_shard if layout == "fsdp" else None,
                activations=kept,
                offload=s.offload,
                offload_params=s.offload_params if layout in ("zero3", "fsdp") else None,
                bucket_mb=s.bucket_mb,
                **options,
            )
            cells = [f"{held[c] / 1e9:.4g}" if by_shape or c != "buffers" else "-" for c in columns]
            lines.append(f"{layout:7}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(
        lines + ([] if by_shape else ["", "-: give --n_layer and --n_embd instead of --params"])
    )


if __name__ == "__main__":
    if {"--help", "-h"} & {*sys.argv}:
        print(__doc__ + "\n" + usage(DEFAULTS, NAMES | {"optim": own_classes()}))
        sys.exit()
    try:
        print(table(*parse(sys.argv[1:])))
    except ValueError as error:
        print(f"estimate.py: {error}", file=sys.stderr)
        sys.exit(2)
