"""Bytes that a rank needs, predicted from shapes alone, for every layout, optimizer and precision.

    python -m memory.estimate --params=7B --gpus=64 --optim=adamw
    python -m memory.estimate --params=7e9 --n_layer=32 --n_embd=4096 --block_size=2048 --batch=4
    python -m memory.estimate --n_layer=12 --n_embd=768 --vocab_size=50304 --optim=muon --batch=16
    python -m memory.estimate --n_layer=12 --n_embd=768 --n_expert=32 --ep=8 --gpus=8

Without --params the tensors are exactly our GPT's, and each layout deals out rows of them, or full
parameters to an optimizer that needs them so. With --params they are equal parts. A row of the
table shows the rank that holds most. --batch is one rank's micro-batch. 7B is 7e9; K, M and T are
likewise powers of ten, and a GB is 1e9 bytes. Bytes of a parameter, and of one number of state, by
precision:

    name     weight  gradient  master  state  with Adam  what it is
    fp64     8       8         -       8      32         ours
    fp32     4       4         -       4      16         ours
    bf16     4       4         -       4      16         ours: autocast over fp32 weights
    fp16     4       4         -       4      16         the same with loss scaling
    fp8      4       4         -       4      16         the same with e4m3 products
    bf16_sr  2       2         -       4      12         ours: stochastic rounding, no master
    mixed    2       2         4       4      16         Rajbhandari et al. 2020 (1910.02054)
    texts    2       2         -       4      12         a tutorial, which forgets the master

    layout   weights   gradients   state       held only for a while ("buffers")
    ddp      all       all         all         the gradient on its way into its bucket
    zero1    all       all         own         a unit's gradients, or a bucket
    zero2    all       own         own         two units' gradients
    zero3    own       own         own         two units' weights and gradients
    fsdp     rows/n    rows/n      rows/n      weights of embedding, head and two blocks
                                               (reshard=False: all), one unit's gradients twice;
                                               the gradients of earlier micro-batches

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

Activations kept for backward, for b x s tokens, L layers, h channels, V words:

    34 s b h L                Korthikanti et al. 2022 (2205.05198), mixed precision, without the s²
                              of plain attention, and without logits
    20 s b h L                a tutorial: 7B, b = 4, s = 2048 make its 105.5 GB; the primary
                              source says 36.5 of activations, not 21.5
    b s (k h L + r h + l V)   ours, counted by autograd's saved tensors: k, r and l are in
                              ACTIVATION_BYTES. --activation_checkpoint takes k from
                              CHECKPOINTED_BYTES; the peak of backward then adds what it computes
                              again of one block or segment, and the temporaries inside a block.
                              With --loss_chunk the words are those of an eighth of a chunk

In a layer with E experts of width w, k of a token (layers/moe.py), R rows = k b s go through them,
on a CPU up to 63 E more. It keeps, with p bytes of an operand and q of a score, beside attention:

    p R (w + h), with a gate p R (2 w + h)      what proj's input comes from, and its result
    b s (2 q E + (16 + q + p) k) + 8 R          logits and scores; choices, rows, gates
    4 b s h                                     the router's input, where x is bfloat16

Its backward makes the gradients of a matrix of all E experts at once, 4 E w h bytes, before they
are added or sent. FP8's experts hold up to a tenth more than is predicted.

With --ep=N in ddp, zero1 and fsdp a rank has E/N of the experts: their weights, gradients and state
are a share, which zero1 and fsdp deal out to the n/N ranks that hold the same ones. Loads are taken
as even: the rank's experts get R rows as before, but from all N, so it keeps p R h more (they are
computed nowhere here), and has p R h more in backward, 2 p R h where a block is computed again.

Offloaded state passes the device in chunks of 64 MiB of parameters, two at a time; a larger
parameter is a chunk by itself. (If the device is the CPU, nothing moves, and state in files needs
no memory.)

With one micro-batch gradients come as activations go: of these the table shows what is there beside
all gradients. The estimate is rough, and rather too large than too small. It leaves out
fragmentation, the device's own context and kernels' workspaces (emulated FP8 has float32 operands).
Measured on a CPU, it is within 5 % (tests/test_estimate.py), but for tensors of less than 2 MiB,
which are kept where larger ones are computed again (layers/recompute.py).

Neighbours: memory/flags.py, optim/adamw.py, optim/attributes.py, optim/muon.py,
parallel/replicas.py, precision/amp.py

Example:
    from memory.estimate import bytes_per_rank, gpt_shapes
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
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

from memory.flags import check, from_text, usage, words
from optim import muon
from optim.attributes import attribute, own_classes
from parallel.replicas import deal
from precision.amp import PRECISIONS, Precision

# Accountings of others: bytes of a weight, its gradient, its master copy, one number of state.
PUBLISHED = {"mixed": (2, 2, 4, 4), "texts": (2, 2, 0, 4)}
ACCOUNTINGS = (*PRECISIONS, *PUBLISHED)
LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
EXPERT_PARALLEL = ("ddp", "zero1", "fsdp")  # those that know --ep
# (arch, bytes of a weight, bytes of a matmul's operand) -> (k, r, l) of the formula above, with an
# MLP of width 4h. l also covers the logits' softmax.
ACTIVATION_BYTES = {
    ("modern", 8, 8): (80, 18, 16),
    ("modern", 4, 4): (40, 9, 8),
    ("modern", 4, 2): (24, 6, 8),
    ("gpt2", 8, 8): (80, 16, 8),
    ("gpt2", 4, 4): (40, 8, 4),
    ("gpt2", 4, 2): (24, 6, 4),
    ("track3", 8, 8): (80, 42, 24),
    ("track3", 4, 4): (40, 21, 12),
    ("track3", 4, 2): (24, 18, 12),
    ("llama", 8, 8): (112, 25, 8),
    ("llama", 4, 4): (56, 12, 4),
    ("llama", 4, 2): (32, 10, 4),
    ("qwen3", 8, 8): (112, 25, 8),
    ("qwen3", 4, 4): (56, 12, 4),
    ("qwen3", 4, 2): (32, 10, 4),
    ("modern", 2, 2): (20, 3, 8),
    ("gpt2", 2, 2): (20, 4, 4),
    ("track3", 2, 2): (20, 9, 12),
    ("llama", 2, 2): (28, 6, 4),
    ("qwen3", 2, 2): (28, 6, 4),
}
# In place of k with activation checkpointing: full, attention, mlp, selective. The fifth number is
# the gradients inside a block and what layers/recompute.py computes again of it in backward (and
# what track3's norm of the embedding keeps).
CHECKPOINTED_BYTES = {
    ("modern", 8, 8): (8, 48, 48, 88, 81),
    ("modern", 4, 4): (4, 24, 24, 44, 40),
    ("modern", 4, 2): (4, 16, 16, 24, 27),
    ("gpt2", 8, 8): (8, 48, 48, 88, 77),
    ("gpt2", 4, 4): (4, 24, 24, 44, 38),
    ("gpt2", 4, 2): (4, 16, 16, 24, 23),
    ("track3", 8, 8): (8, 48, 48, 88, 98),
    ("track3", 4, 4): (4, 24, 24, 44, 49),
    ("track3", 4, 2): (4, 16, 16, 24, 37),
    ("llama", 8, 8): (8, 80, 48, 120, 107),
    ("llama", 4, 4): (4, 40, 24, 60, 53),
    ("llama", 4, 2): (4, 24, 16, 32, 31),
    ("qwen3", 8, 8): (8, 80, 48, 120, 108),
    ("qwen3", 4, 4): (4, 40, 24, 60, 54),
    ("qwen3", 4, 2): (4, 24, 16, 32, 32),
    ("modern", 2, 2): (2, 12, 12, 22, 20),
    ("gpt2", 2, 2): (2, 12, 12, 22, 19),
    ("track3", 2, 2): (2, 12, 12, 22, 25),
    ("llama", 2, 2): (2, 20, 12, 30, 27),
    ("qwen3", 2, 2): (2, 20, 12, 30, 27),
}
# Architectures whose MLP has a gate: a third matrix, and twice as many numbers of its width.
GATED = ("llama", "qwen3")
# What a norm of an architecture has.
NORM_PARTS = {"modern": (), "gpt2": ("weight", "bias")} | dict.fromkeys(
    ("track3", "llama", "qwen3"), ("weight",)
)

# Name -> (embedding | head | matrix | scalar, shape).
Shapes = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Experts:
    """Mixture of experts: the fields of this name in settings/fields.py.

    row_block: what divides the rows of each expert, where they are many: layers.moe.BLOCK on a
    CPU, 1 on a GPU. ep: ranks that share out the experts, each of which gets as many rows.
    """

    n_expert: int
    n_expert_active: int = 2
    n_shared_expert: int = 0
    expert_width: int | None = None
    moe_every: int = 1
    row_block: int = 1
    ep: int = 1

    def are_in(self, layer: int) -> bool:
        return (layer + 1) % self.moe_every == 0

    def width(self, n_embd: int, arch: str, mlp_width: int | None = None) -> int:
        """The width between an expert's matrices, as GPTConfig in model.py has it."""
        if self.expert_width is not None:
            return self.expert_width
        of_token = self.n_expert_active + self.n_shared_expert
        return -(-mlp_size(n_embd, arch, mlp_width) // (8 * of_token)) * 8

    def rows(self, tokens: float) -> float:
        """How many rows go through a rank's experts, where each rank has so many tokens."""
        rows = self.n_expert_active * tokens
        here = self.n_expert // self.ep
        if rows < 2 * self.row_block * here:
            return rows
        return -(-(rows + here * (self.row_block - 1)) // self.row_block) * self.row_block


# ---- the parameters, and what an optimizer keeps of each -----------------------------------------
def gpt_shapes(
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    block_size: int = 1024,
    arch: str = "modern",
    n_head: int = 1,
    n_kv_head: int | None = None,
    head_dim: int | None = None,
    mlp_width: int | None = None,
    qkv_bias: bool | None = None,
    experts: Experts | None = None,
) -> Shapes:
    """The parameters of model.py, in its order.

    arch `gpt2`: with a tied head, biases, gains and learned positions; `track3`: with biases, gains
    and a norm of the embedding; `llama`: with gains and a gate in the MLP; `qwen3`: with gains for
    queries and keys, too. head_dim, mlp_width, qkv_bias: as in settings/fields.py.
    """
    C = n_embd
    V = vocab_size
    head_dim = head_dim or C // n_head
    kv = head_dim * (n_kv_head or n_head)
    has_bias = arch in ("gpt2", "track3")
    qkv_bias = has_bias if qkv_bias is None else qkv_bias
    shapes = {"embed.weight": ("embedding", (V, C))}
    if arch == "gpt2":
        shapes["positions.weight"] = "embedding", (block_size, C)

    def norm(name: str, size: int = C) -> None:
        for part in NORM_PARTS[arch]:
            shapes[f"{name}.{part}"] = "scalar", (size,)

    def linear(name: str, shape: tuple[int, int], has_bias: bool = has_bias) -> None:
        shapes[f"{name}.weight"] = "matrix", shape
        if has_bias:
            shapes[f"{name}.bias"] = "scalar", shape[:1]

    def mlp(name: str, width: int) -> None:
        if arch in GATED:
            linear(f"{name}.gate", (width, C))
        linear(f"{name}.fc", (width, C))
        linear(f"{name}.proj", (C, width))

    if arch == "track3":
        norm("embed_norm")
    for i in range(n_layer):
        norm(f"blocks.{i}.attn_norm")
        linear(f"blocks.{i}.attn.q", (n_head * head_dim, C), qkv_bias)
        linear(f"blocks.{i}.attn.k", (kv, C), qkv_bias)
        linear(f"blocks.{i}.attn.v", (kv, C), qkv_bias)
        linear(f"blocks.{i}.attn.proj", (C, n_head * head_dim))
        if arch == "qwen3":
            norm(f"blocks.{i}.attn.q_norm", head_dim)
            norm(f"blocks.{i}.attn.k_norm", head_dim)
        norm(f"blocks.{i}.mlp_norm")
        if experts is None or not experts.are_in(i):
            mlp(f"blocks.{i}.mlp", mlp_size(C, arch, mlp_width))
            continue
        width = experts.width(C, arch, mlp_width)
        linear(f"blocks.{i}.mlp.router", (experts.n_expert, C), False)
        for e in range(experts.n_expert):
            mlp(f"blocks.{i}.mlp.experts.{e}", width)
        if experts.n_shared_expert:
            mlp(f"blocks.{i}.mlp.shared", experts.n_shared_expert * width)
    norm("final_norm")
    # gpt2's head is the embedding, so it is no parameter of its own.
    if arch != "gpt2":
        shapes["head.weight"] = "head", (V, C)
    if arch == "track3":
        shapes["head.bias"] = "scalar", (V,)
    return shapes


def mlp_size(n_embd: int, arch: str, mlp_width: int | None = None) -> int:
    """The width between the MLP's matrices, as GPTConfig in model.py has it."""
    if mlp_width is not None:
        return mlp_width
    if arch in GATED:
        return -(-8 * n_embd // (3 * 64)) * 64
    return 4 * n_embd


def even_shapes(params: float, world: int) -> Shapes:
    """`params` parameters of unknown shapes, in `world` equal parts."""
    return {f"part {i}": ("matrix", (math.ceil(params / world),)) for i in range(world)}


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


def bytes_of(precision: str) -> tuple[int, int, int, int]:
    """Bytes of a weight, its gradient, its master copy, one number of state."""
    if precision in PUBLISHED:
        return PUBLISHED[precision]
    row = PRECISIONS[precision]
    return row.weights.itemsize, row.weights.itemsize, 0, row.state.itemsize


def heading(precision: str) -> str:
    """What this accounting counts, in a line."""
    published = {
        "mixed": "the primary source's 2 + 2 + 4 bytes and state in float32 (16 with Adam)",
        "texts": "a text's 2 + 2 bytes and state in float32 (12 with Adam), no master weights",
    }
    if precision in published:
        return published[precision]
    row = PRECISIONS[precision]
    weight, gradient, _, number = bytes_of(precision)
    how = ""
    with_adam = ""
    if row.fp8_blocks:
        how += "e4m3 products, "
    if has_copies(row):
        how += "autocast over float32 weights: "
    if row.stochastic:
        how += "rounded by chance: "
        with_adam = f" ({weight + gradient + 2 * number} with Adam)"
    state = str(row.state).removeprefix("torch.")
    return f"{how}{weight} + {gradient} bytes and state in {state}{with_adam}"


def has_copies(row: Precision) -> bool:
    """Does autocast copy weights?"""
    return row.products != row.weights


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

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, (_, shape) in self.shapes.items()}

    @property
    def row(self) -> Precision:
        """The precision's table row. The papers' accountings neither copy weights nor round."""
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
        return number * numbers + master * math.prod(shape)

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


def is_expert(name: str) -> bool:
    return ".experts." in name


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
    **options,
) -> dict[str, float]:
    """Bytes on the fullest rank: parameters, gradients, state, activations, buffers, total, host.

    shapes: see gpt_shapes. ep: ranks that share out the experts, in ddp, zero1 and fsdp.
    fsdp_shard: ranks that share one copy, None: all. offload (of state) and offload_params (zero3,
    fsdp): `cpu` or `disk`, both counted under host. activations: bytes of a micro-batch, see
    activation_bytes; inside: how many of them are not there yet at the loss (activation_bytes less
    the same without in_backward); logits: how many numbers it has, tokens x words; loss_chunk: the
    setting, None for all tokens at once. hooks: does the optimizer wear any? options: keyword
    arguments of its state_numbers. If no name begins with `blocks.`, buffers are those of the loss
    alone. Raises ValueError for unknown names, the nearest one in it, and sizes that do not fit.
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
    if min(world, micro_batches) < 1 or world % (fsdp_shard or 1):
        raise ValueError(
            f"world={world} and micro_batches={micro_batches} must be at least 1, and "
            f"fsdp_shard={fsdp_shard} a divisor of world"
        )
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
    )
    # The run needs as much memory as its fullest rank.
    held, fullest = fullest_rank(c)
    return in_all(c, stepped_by(c, fullest), *held, activations)


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
    early = early_gradient(c)
    at_loss = backward + early + loss_bytes(c) - c.inside
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


def loss_bytes(c: Case) -> float:
    """Bytes that the loss's backward holds for a while: two numbers for each logit.

    They are the gradients of log softmax, and of its input, in at least float32. In chunks
    (layers/chunked_loss.py) it is two for each logit of a part, or a product for some words of the
    head's gradient; besides the chunk's logits, autocast's copy of the head, and the gradients of
    the hidden states.
    """
    wide = c.row.state.itemsize
    if not c.has_chunks:
        return 2 * wide * c.logits
    words, width = c.head
    operand = c.row.products.itemsize
    tokens = c.logits / words
    of_part = 2 * wide * words * min(tokens, chunk_part(c.loss_chunk))
    copy = operand * words * width if has_copies(c.row) else 0
    of_words = (operand + wide if operand != wide else wide) * min(words, 8192) * width
    at_once = max(of_part, of_words)
    of_hidden = c.weight * tokens * width
    return operand * words * min(tokens, c.loss_chunk) + at_once + copy + of_hidden


def chunk_part(loss_chunk: int) -> int:
    """How many tokens of a chunk go through the loss at once."""
    return math.ceil(loss_chunk / 8)


def early_gradient(c: Case) -> float:
    """Bytes of the head's gradient, which a loss in chunks makes before backward begins."""
    if not c.has_chunks:
        return 0
    return c.row.state.itemsize * math.prod(c.head)


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


def activation_bytes(
    precision: str,
    tokens: int,
    n_layer: int,
    n_embd: int,
    vocab_size: int = 0,
    arch: str = "modern",
    activation_checkpoint: str = "none",
    tp: int = 1,
    loss_chunk: int | None = None,
    in_backward: bool = True,
    plain_attention: tuple[int, int] | None = None,
    q_width: int | None = None,
    kv_width: int | None = None,
    mlp_width: int | None = None,
    experts: Experts | None = None,
) -> float:
    """Bytes that one micro-batch of `tokens` = b x s keeps for backward, and holds in it at most.

    By 34 s b h, the text's 20 s b h, or our own count. activation_checkpoint: as in
    memory/activation_checkpoint.py; tp: ranks that share out what full_sharded keeps; loss_chunk:
    the setting, None for all tokens at once. in_backward: False for what forward leaves.
    plain_attention: (heads, tokens of a sequence) of --attention=plain, which keeps probabilities.
    q_width, kv_width: of all heads of queries, and of keys, None for n_embd; mlp_width: the
    setting. Others' accountings do not ask for these three, and know no experts.
    Offloaded activations are on the device while they are used, two blocks at a time. Raises
    ValueError for an unknown precision or activation_checkpoint.
    """
    check("precision", precision, ACCOUNTINGS)
    if experts is not None and precision in PUBLISHED:
        raise ValueError(
            f"precision={precision} counts no activations of experts; type --precision=bf16, or "
            "leave --batch out"
        )
    L = n_layer
    how, K = step_of_layers(activation_checkpoint)
    if K < 1 or (how == "segments" and K > L):
        raise ValueError(
            f"activation_checkpoint={activation_checkpoint} takes 1 to {L}, the layers"
        )
    check("activation_checkpoint", how, CHECKPOINTS)
    per_channel, per_word, dense = layer_bytes(
        precision, n_embd, arch, q_width, kv_width, mlp_width
    )
    sparse = dense
    if experts is not None:
        sparse = with_experts(dense, precision, tokens, n_embd, arch, mlp_width, experts)
    layers = []
    for i in range(L):
        layers.append(sparse if experts is not None and experts.are_in(i) else dense)

    # Bytes of a token: what each layer keeps, and what there is when backward is in it.
    kept = [kept_of_layer(layer, i, how, K, tp) for i, layer in enumerate(layers)]
    if how == "segments":
        # The first layer of each segment.
        kept = [x if i in (-(-s * L // K) for s in range(K)) else 0 for i, x in enumerate(kept)]
    if plain_attention is not None and precision in PRECISIONS:
        number = PRECISIONS[precision].products.itemsize * n_embd
        for i in range(L):
            if how in ("none", "mlp") or (how == "every" and i % K):
                kept[i] += number * kept_by_plain_attention(*plain_attention, n_embd, arch)

    # What the head keeps is gone when backward comes to the blocks.
    words = per_word * vocab_size
    if loss_chunk is not None and tokens:
        words *= min(1, chunk_part(loss_chunk) / tokens)
    most = sum(kept) + per_channel * n_embd + words
    if in_backward:
        left = 0
        for i in range(L):
            left += kept[i]
            most = max(most, left + again_in_layer(layers, i, how, K, tp))
    return tokens * most


@dataclass(frozen=True)
class LayerBytes:
    """Of a token: what a layer keeps by each --activation_checkpoint, and the temporaries in it."""

    kept: float
    full: float
    attention: float
    mlp: float
    selective: float
    inside: float
    # The same in what was computed again: a block, or its MLP alone.
    inside_again: float
    inside_mlp: float


# What --activation_checkpoint may be, without its numbers.
CHECKPOINTS = (
    *("none", "full", "full_sharded", "full_offload", "every", "segments"),
    *("attention", "mlp", "selective", "offload"),
)


def kept_of_layer(x: LayerBytes, i: int, how: str, K: int, tp: int) -> float:
    """Bytes of a token that layer i keeps, or a segment that begins with it."""
    kept = {
        "none": x.kept,
        "full_sharded": x.full / tp,
        "full_offload": 0,
        "every": x.full if i % K == 0 else x.kept,
        "attention": x.attention,
        "mlp": x.mlp,
        "selective": x.selective,
        "offload": 0,
    }
    return kept.get(how, x.full)


def again_in_layer(layers: list[LayerBytes], i: int, how: str, K: int, tp: int) -> float:
    """Bytes of a token that backward holds in layer i, beside what layers up to i keep."""
    x = layers[i]
    L = len(layers)
    again = 0
    if how == "full" or (how == "every" and i % K == 0):
        again = x.kept - x.full
    elif how == "full_sharded":
        again = x.kept - x.full / tp
    elif how == "full_offload":
        again = x.kept + x.full
    elif how == "segments":
        segment = [y for j, y in enumerate(layers[: i + 1]) if j * K // L == i * K // L]
        again = sum(y.kept for y in segment) - x.full
    elif how == "mlp":
        # Its input is computed again, too.
        again = x.kept - x.mlp + x.full
    elif how == "selective":
        again = max(0, x.kept - x.selective)
    elif how == "offload":
        # The layer before it is on its way.
        again = x.kept + layers[max(0, i - 1)].kept
    if how == "mlp":
        return again + x.inside_mlp
    is_again = how not in ("none", "attention", "offload") and not (how == "every" and i % K)
    return again + (x.inside_again if is_again else x.inside)


def layer_bytes(
    precision: str,
    n_embd: int,
    arch: str,
    q_width: int | None,
    kv_width: int | None,
    mlp_width: int | None,
) -> tuple[float, float, LayerBytes]:
    """r and l of the formula above, and a layer's bytes of a token, for these widths."""
    C = n_embd
    if precision in PUBLISHED:
        # At 2 bytes a number attention drops q, k, v and its output (8 of the 34), mlp two tensors
        # of width 4C (16). selective keeps the block's input and all products (22).
        k = {"mixed": 34, "texts": 20}[precision]
        return 0, 0, LayerBytes(k * C, 2 * C, min(26, k) * C, 18 * C, min(22, k) * C, 0, 0, 0)
    row = PRECISIONS[precision]
    key = arch, row.weights.itemsize, row.products.itemsize
    per_layer, per_channel, per_word = ACTIVATION_BYTES[key]
    full, attention, mlp, selective, inside = CHECKPOINTED_BYTES[key]

    # The tables' widths are n_embd and 4 n_embd: what others are more, in bytes.
    number = row.products.itemsize
    more_heads = number * (2 * (q_width or C) + 2 * (kv_width or C) - 4 * C)
    wider = number * (mlp_size(C, arch, mlp_width) - 4 * C)
    n_kept = 2 if arch in GATED else 1
    inside = inside * C + (n_kept + 1) * wider
    return (
        per_channel,
        per_word,
        LayerBytes(
            kept=per_layer * C + more_heads + n_kept * wider,
            full=full * C,
            attention=attention * C + n_kept * wider,
            mlp=mlp * C + more_heads,
            selective=selective * C + more_heads + n_kept * wider,
            inside=inside,
            inside_again=inside,
            inside_mlp=inside,
        ),
    )


def with_experts(
    dense: LayerBytes,
    precision: str,
    tokens: float,
    n_embd: int,
    arch: str,
    mlp_width: int | None,
    experts: Experts,
) -> LayerBytes:
    """A layer whose MLP makes room for experts (layers/moe.py)."""
    C = n_embd
    row = PRECISIONS[precision]
    number = row.products.itemsize
    wide = row.state.itemsize
    n_kept = 2 if arch in GATED else 1
    E = experts.n_expert
    k = experts.n_expert_active
    rows = experts.rows(tokens) / tokens if tokens else k  # of a token
    width = experts.width(C, arch, mlp_width)
    shared = experts.n_shared_expert * width

    # Shared experts are an MLP of another width.
    narrower = number * (shared - mlp_size(C, arch, mlp_width))
    # Logits, scores, the order of choices; slots; gates, their sum, log Z; the rows' tokens.
    of_router = 2 * wide * E + (16 + wide + number) * k + 2 * wide + 8 * rows
    if row.weights.itemsize < wide:
        of_router += wide * C  # its input
    more = of_router + rows * number * (n_kept * width + C) + n_kept * narrower
    # Of all products `selective` keeps the router's alone, and those of shared experts.
    selective = dense.selective + n_kept * narrower + wide * E
    if not shared:
        selective -= number * C
    residual = row.weights.itemsize * C
    cast = number * C if has_copies(row) else 0
    inside = inside_experts(residual, cast, number, rows * width, rows * C, shared, n_kept)
    inside = max(dense.inside + (n_kept + 1) * narrower, inside)
    # Rows that came from others are computed by nobody here again; they, or their gradients, are
    # there once more where they arrive.
    travelling = number * rows * C if experts.ep > 1 else 0
    more += travelling
    inside += travelling
    # The activation's forward, beside norm(x), its gradient, and casts.
    forward = 2 * number * rows * width + 2 * residual + 2 * cast
    return LayerBytes(
        kept=dense.kept + more,
        full=dense.full,
        attention=dense.attention + more,
        mlp=dense.mlp,
        selective=selective,
        inside=inside,
        inside_again=max(inside, forward) + travelling,
        # Nobody forgets the rows there.
        inside_mlp=inside + number * rows * C + residual + cast,
    )


def inside_experts(
    residual: float,
    cast: float,
    number: int,
    inner: float,
    outer: float,
    shared: int,
    n_kept: int,
) -> float:
    """Bytes of a token that the backward of experts holds at most, beside what forward keeps.

    residual, cast: bytes of x, and of autocast's copy; inner, outer: numbers of a token's rows
    between the matrices of its experts, and around them; shared: the width of shared experts.
    """
    most = max(
        # In backward's order: a product of rows with rows, for the gradients of gates.
        residual + cast + 2 * number * outer,
        # proj, whose input is computed again.
        residual + 2 * number * inner,
        # The activation, when proj's result has gone.
        residual + number * ((n_kept + 1) * inner - outer),
        # fc, and a gate: the rows once more, two gradients of them, and their sum.
        3 * residual + cast + number * (3 * outer - 2 * inner) if n_kept == 2 else 0,
    )
    if shared:
        # Their backward is over, and has left norm(x) and gradients of it.
        most += (1 + n_kept) * residual + cast - n_kept * number * shared
    return most


def kept_by_plain_attention(heads: int, length: int, n_embd: int, arch: str) -> float:
    """Numbers a token and channel of a layer: probabilities; q and k once more, turned."""
    # Half of all pairs, and half of the chunk on the diagonal.
    probabilities = heads * (length + min(64, length)) / 2
    # Without QK-norm they are kept already.
    turned = 0 if arch in ("gpt2", "llama") else 2
    return probabilities / n_embd + turned


def step_of_layers(activation_checkpoint: str) -> tuple[str, int]:
    """("every", 2) for every_2, ("full", 1) for full."""
    how, _, number = activation_checkpoint.partition("_")
    if how in ("every", "segments") and number.isdecimal():
        return how, int(number)
    return activation_checkpoint, 1


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
    head_dim=None,
    mlp_width=None,
    n_expert=None,
    n_expert_active=2,
    n_shared_expert=0,
    expert_width=None,
    moe_every=1,
    ep=1,
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
    loss_chunk=None,
    hooks=False,
)
# Flags that mean nothing without n_expert.
OF_EXPERTS = ("n_expert_active", "n_shared_expert", "expert_width", "moe_every")
NAMES = {
    "precision": ACCOUNTINGS,
    "arch": tuple(NORM_PARTS),
    "offload": ("cpu", "disk"),
    "offload_params": ("cpu", "disk"),
}


def parse(argv: list[str]) -> tuple[dict, dict]:
    """(the settings, the optimizer's own from --opt.NAME=value) of a command line.

    Raises ValueError for an unknown name or a value that is not allowed.
    """
    settings = dict(DEFAULTS)
    options = {}
    for name, text in words(argv):
        if name.startswith("opt."):
            options[name[4:]] = text
        else:
            check("the name", name, DEFAULTS)
            choices = own_classes() if name == "optim" else NAMES.get(name, ())
            settings[name] = from_text(name, text, DEFAULTS[name], choices, name == "bucket_mb")

    # The optimizer is known only now, and with it the kinds of its options.
    known = options_of(find_optimizer(settings["optim"]))
    for name, text in options.items():
        check(f"{settings['optim']}'s option", name, known)
        choices, is_fraction = kinds_of(known[name])
        options[name] = from_text(name, text, known[name].default, choices, is_fraction)
    width = settings["n_embd"] or 0
    heads = settings["n_head"]
    divides = settings["head_dim"] is not None or width % heads == 0
    if not divides or heads % (settings["n_kv_head"] or heads):
        raise ValueError(
            f"n_embd={width}, n_head={heads} and n_kv_head={settings['n_kv_head']} must divide, "
            "each the one before"
        )
    check_experts(settings)
    return settings, options


def check_experts(s: dict) -> None:
    """Raises ValueError for flags of experts that do not fit the model."""
    if s["n_expert"] is None:
        for name in (*OF_EXPERTS, "ep"):
            if s.get(name, DEFAULTS[name]) != DEFAULTS[name]:
                raise ValueError(f"{name} means nothing without experts; type --n_expert=8 too")
        return
    if s["params"] is not None:
        raise ValueError("--n_expert needs --n_layer and --n_embd; leave --params out")
    if s["n_expert_active"] > s["n_expert"]:
        raise ValueError(
            f"n_expert_active={s['n_expert_active']} is more than n_expert={s['n_expert']}; type "
            "--n_expert_active=2"
        )
    if s["moe_every"] > (s["n_layer"] or math.inf):
        raise ValueError(
            f"moe_every={s['moe_every']} is more than n_layer={s['n_layer']}; type --moe_every=1"
        )


def experts_of(s: SimpleNamespace) -> Experts | None:
    """The experts that the command line describes, on a GPU."""
    if s.n_expert is None:
        return None
    return Experts(s.n_expert, **{name: getattr(s, name) for name in OF_EXPERTS}, ep=s.ep)


def kinds_of(parameter: inspect.Parameter) -> tuple[list, bool]:
    """(the words that an option takes, may it be a fraction?), from its annotation.

    `Literal["adam", "sgd"] | None` takes adam, sgd and none; float may be a fraction.
    """
    kinds = [parameter.annotation, *typing.get_args(parameter.annotation)]
    choices = []
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            choices += typing.get_args(kind)
    if choices and type(None) in kinds:
        choices.append("none")
    return choices, float in kinds


def shapes_of(s: SimpleNamespace) -> Shapes:
    """The parameters that the command line describes. Raises ValueError."""
    has_shape = None not in (s.n_layer, s.n_embd)
    if not has_shape and (s.params is None or s.batch):
        raise ValueError(
            "type --params=7e9, or the model's --n_layer=12 --n_embd=768 --vocab_size=50304; "
            "--batch needs --n_layer and --n_embd in any case"
        )
    if s.params is None:
        names = "n_layer n_embd vocab_size block_size arch n_head n_kv_head head_dim mlp_width"
        return gpt_shapes(
            **{name: getattr(s, name) for name in names.split()}, experts=experts_of(s)
        )
    optimizer = find_optimizer(s.optim)
    if optimizer.state_numbers((2, 3)) != optimizer.state_numbers((6,)):
        raise ValueError(
            f"{s.optim}'s state depends on shapes: give --n_layer and --n_embd, not --params"
        )
    return even_shapes(s.params, s.gpus)


COLUMNS = ("parameters", "gradients", "state", "activations", "buffers", "total", "host")


def table(settings: dict, options: dict) -> str:
    """For each accounting a table with a row for every layout. Raises ValueError."""
    s = SimpleNamespace(**settings)
    shapes = shapes_of(s)
    if s.activation_checkpoint != "none" and not s.batch:
        raise ValueError(
            "--activation_checkpoint is about activations: type --batch=8, or another number"
        )
    by_shape = s.params is None
    if s.precision:
        precisions = [s.precision]
    else:
        # Our accounting needs shapes.
        precisions = ["bf16", "mixed", "texts"] if by_shape else ["mixed", "texts"]
        # The texts count no activations of experts.
        if s.n_expert is not None and s.batch:
            precisions = ["bf16"]
    count = sum(math.prod(shape) for _, shape in shapes.values())
    lines = [f"{count:,} parameters, {s.optim}, {s.gpus} ranks; GB (1e9 bytes) on the fullest rank"]
    for precision in precisions:
        lines += ["", f"{precision}: {heading(precision)}"]
        lines.append("layout " + "".join(f"{column:>12}" for column in COLUMNS))
        for layout in LAYOUTS if s.ep == 1 else EXPERT_PARALLEL:
            lines.append(table_row(s, options, shapes, precision, layout))
    if not by_shape:
        lines += ["", "-: give --n_layer and --n_embd instead of --params"]
    return "\n".join(lines)


def table_row(
    s: SimpleNamespace, options: dict, shapes: Shapes, precision: str, layout: str
) -> str:
    activations = 0
    inside = 0
    if s.batch:
        head_dim = s.head_dim or s.n_embd // s.n_head
        count = functools.partial(
            activation_bytes,
            precision,
            s.batch * s.block_size,
            s.n_layer,
            s.n_embd,
            s.vocab_size,
            s.arch,
            s.activation_checkpoint,
            loss_chunk=s.loss_chunk,
            q_width=s.n_head * head_dim,
            kv_width=(s.n_kv_head or s.n_head) * head_dim,
            mlp_width=s.mlp_width,
            experts=experts_of(s),
        )
        activations = count()
        inside = activations - count(in_backward=False)
    held = bytes_per_rank(
        shapes,
        s.optim,
        layout,
        s.gpus,
        precision,
        ep=s.ep,
        reshard=s.reshard,
        micro_batches=s.micro_batches,
        fsdp_shard=s.fsdp_shard if layout == "fsdp" else None,
        activations=activations,
        inside=inside,
        logits=s.batch * s.block_size * s.vocab_size,
        loss_chunk=s.loss_chunk,
        offload=s.offload,
        offload_params=s.offload_params if layout in ("zero3", "fsdp") else None,
        bucket_mb=s.bucket_mb,
        hooks=s.hooks,
        **options,
    )
    cells = []
    for column in COLUMNS:
        # Buffers depend on the shapes of blocks, which --params does not give.
        is_known = s.params is None or column != "buffers"
        cells.append(f"{held[column] / 1e9:.4g}" if is_known else "-")
    return f"{layout:7}" + "".join(f"{cell:>12}" for cell in cells)


if __name__ == "__main__":
    if {"--help", "-h"} & {*sys.argv}:
        print(__doc__ + "\n" + usage(DEFAULTS, NAMES | {"optim": own_classes()}))
        sys.exit()
    try:
        print(table(*parse(sys.argv[1:])))
    except ValueError as error:
        print(f"estimate.py: {error}", file=sys.stderr)
        sys.exit(2)
