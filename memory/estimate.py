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
import itertools
import math
import sys
from types import SimpleNamespace

from parallel.ownership import owners_by_shape

BYTES = {
    "fp64": (8, 8, 0, 8),
    "fp32": (4, 4, 0, 4),
    "bf16": (4, 4, 0, 4),
    "fp16": (4, 4, 0, 4),
    "fp8": (4, 4, 0, 4),
    "bf16_sr": (2, 2, 0, 4),
    "mixed": (2, 2, 4, 4),
    "texts": (2, 2, 0, 4),
}
# of a weight, its gradient, its master copy, one number of state
HEADINGS = {
    "fp64": "8 + 8 bytes and state in float64",
    "fp32": "4 + 4 bytes and state in float32",
    "bf16": "autocast over float32 weights: 4 + 4 bytes and state in float32",
    "fp16": "autocast over float32 weights: 4 + 4 bytes and state in float32",
    "fp8": "e4m3 products, autocast over float32 weights: 4 + 4 bytes and state in float32",
    "bf16_sr": "rounded by chance: 2 + 2 bytes and state in float32 (12 with Adam)",
    "mixed": "the primary source's 2 + 2 + 4 bytes and state in float32 (16 with Adam)",
    "texts": "a text's 2 + 2 bytes and state in float32 (12 with Adam), no master weights",
}
LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
OPTIONS = {  # what changes the size of the state, with the class's default
    "sgd": {"momentum": 0.0},
    "adamw": {},
    "adam_l2": {},
    "adafactor": {"beta1": None},
    "lion": {},
    "lars": {"momentum": 0.9},
    "lamb": {},
    "muon": {"normuon_beta2": None},
    "shampoo": {"max_precond_dim": 8192, "precondition_1d": False, "grafting": "adam"},
    "soap": {"max_precond_dim": 10000, "precondition_1d": False},
    "schedule_free": {},
    "schedule_free.SGDScheduleFree": {},
}
ELEMENTWISE = ("sgd", "adamw", "adam_l2", "lion", "schedule_free", "schedule_free.SGDScheduleFree")
# (k, r, l) of the formula above; l also covers the logits' softmax
KEPT = {
    ("modern", "fp64"): (152, 18, 16),
    ("modern", "fp32"): (76, 9, 8),
    ("modern", "bf16"): (51, 6, 8),
    ("gpt2", "fp64"): (128, 16, 8),
    ("gpt2", "fp32"): (64, 8, 4),
    ("gpt2", "bf16"): (40, 6, 4),
    ("track3", "fp64"): (168, 42, 24),
    ("track3", "fp32"): (84, 21, 12),
    ("track3", "bf16"): (59, 18, 12),
    ("modern", "bf16_sr"): (47, 6, 8),
    ("gpt2", "bf16_sr"): (32, 4, 4),
    ("track3", "bf16_sr"): (55, 18, 12),
}
# with activation checkpointing in place of k: full, attention, mlp, selective; and gradients inside
# a block, with what track3's norm of the embedding has kept
LEFT = {
    ("modern", "fp64"): (8, 96, 88, 88, 105),
    ("modern", "fp32"): (4, 48, 44, 44, 53),
    ("modern", "bf16"): (4, 30, 37, 24, 28),
    ("gpt2", "fp64"): (8, 96, 64, 88, 41),
    ("gpt2", "fp32"): (4, 48, 32, 44, 20),
    ("gpt2", "bf16"): (4, 30, 26, 24, 14),
    ("track3", "fp64"): (8, 112, 104, 88, 121),
    ("track3", "fp32"): (4, 56, 52, 44, 61),
    ("track3", "bf16"): (4, 38, 45, 24, 36),
    ("modern", "bf16_sr"): (2, 28, 30, 22, 28),
    ("gpt2", "bf16_sr"): (2, 24, 16, 22, 11),
    ("track3", "bf16_sr"): (2, 36, 38, 22, 36),
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


def state_numbers(optim: str, kind: str, shape: tuple[int, ...], **options) -> int:
    """How many numbers `optim` remembers of one parameter, see the docstrings in optim/."""
    o, n = OPTIONS[optim] | options, math.prod(shape)
    preconditioned = shape if len(shape) > 1 or o.get("precondition_1d") else ()
    squares = 2 * sum(d * d for d in preconditioned if d <= o.get("max_precond_dim", 0))
    if optim in ("sgd", "lars"):
        return n if o["momentum"] else 0
    if optim == "adafactor":
        factored = math.prod(shape[:-1]) + n // max(1, shape[-2]) if len(shape) > 1 else n
        return factored + (n if o["beta1"] is not None else 0)
    if optim == "muon":
        return (
            n + (shape[0] if o["normuon_beta2"] is not None else 0) if kind == "matrix" else 2 * n
        )
    if optim == "shampoo":
        return squares + (2 * n if o["grafting"] in ("adam", "rmsprop") else n)
    if optim == "soap":
        return squares + 2 * n
    return n if optim in ("lion", "schedule_free.SGDScheduleFree") else 2 * n


# ---- who holds it --------------------------------------------------------------------------------
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
    {name: shape}, ranks -> {name: rank}. options: the optimizer's, see OPTIONS. Buffers are 0 if no
    name begins with `blocks.`. Raises ValueError for names that are not known, with the nearest
    one, and for sizes that do not fit.
    """
    check("optim", optim, OPTIONS)
    check("layout", layout, LAYOUTS)
    check("precision", precision, BYTES)
    for name in options:
        check(f"{optim}'s option", name, OPTIONS[optim])
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
    weight, gradient, master, number = BYTES[precision]
    fsdp, stage = layout == "fsdp", LAYOUTS.index(layout)
    # Ranks that share one copy
    n = 1 if layout == "ddp" else (fsdp_shard or world) if fsdp else world
    sizes = {name: math.prod(shape) for name, (_, shape) in shapes.items()}
    everything = sum(sizes.values())

    def state_bytes(kind: str, shape: tuple[int, ...]) -> int:
        return number * state_numbers(optim, kind, shape, **options) + master * math.prod(shape)

    # What each rank owns whole: with ZeRO its parameters, with FSDP only what cannot be stepped in
    # shards.
    whole = {
        name: shape
        for name, (kind, shape) in shapes.items()
        if not fsdp
        or (n > 1 and optim not in ELEMENTWISE and (optim != "muon" or kind == "matrix"))
    }
    # (bytes of weights, of state), rank by rank
    held_by, stepped = owners(whole, n), [[] for _ in range(n)]
    groups = dict.fromkeys(kind for kind, _ in shapes.values())  # in the optimizer's order
    for name in (name for group in groups for name, (kind, _) in shapes.items() if kind == group):
        kind, shape = shapes[name]
        shape = shape if name in whole else (math.ceil(shape[0] / n), *shape[1:])
        for rank in [held_by[name]] if name in whole else range(n):
            stepped[rank].append((weight * math.prod(shape), state_bytes(kind, shape)))
    if fsdp:
        share = sum(math.prod((math.ceil(s[0] / n), *s[1:])) for _, s in shapes.values())
        ranks = [(weight * share, gradient * share, sum(s for _, s in owned)) for owned in stepped]
    else:
        # With one micro-batch our zero1 sends gradients as early as zero2; the paper counts them
        # whole.
        free = stage >= 2 or (
            stage == 1 and micro_batches == 1 and precision not in ("mixed", "texts")
        )
        ranks = [
            (
                size if stage >= 3 else weight * everything,
                gradient * (size / weight if free else everything),
                state,
            )
            for size, state in ([sum(x) for x in zip((0, 0), *owned)] for owned in stepped)
        ]
    fullest = max(range(n), key=lambda rank: sum(ranks[rank]))
    parameters, gradients, state = ranks[fullest]

    by_block, chunk = any(name.startswith("blocks.") for name in shapes), chunk_mb * 2**20
    chunks = 0  # of offloaded state on the device
    if offload and not offload_params:
        chunks = min(state, 2 * chunk * state / sum(size for size, _ in stepped[fullest]))
        chunks = in_flight(stepped[fullest], chunk) if by_block else chunks
    backward = step = 0
    if by_block:
        # It steps float32 copies of a chunk, with their gradients
        stochastic = precision == "bf16_sr"
        wide = 4 if stochastic else weight
        at_once = chunk / wide if chunks or stochastic else math.inf
        step = of_the_step(shapes, optim, n, wide, precision, at_once)
        if stochastic:
            largest, here = max(sizes.values()), sum(size for size, _ in stepped[fullest])
            step = max(step, 21 * largest) + 4 * min(here, max(chunk, weight * largest))
        if n > 1 or world > 1 or offload_params:
            backward = coming_and_going(
                shapes,
                layout,
                n,
                weight,
                gradient,
                reshard,
                micro_batches,
                bucket_mb,
                own=not offload_params,
            )
        # Autocast's copies till backward
        if precision in ("bf16", "fp16", "fp8") and layout != "zero3":
            # Tied
            head = [x for x, (kind, _) in shapes.items() if kind == "head"] or ["embed.weight"]
            cast = [x for x, (kind, _) in shapes.items() if kind == "matrix" and precision != "fp8"]
            backward += 2 * sum(sizes[x] for x in head + cast)
        if layout == "zero1":  # at the step others' gradients are gone
            step -= gradients - gradient * sum(size for size, _ in stepped[fullest]) / weight
    at_owner = sum(sizes[name] for name in whole) / n if fsdp and by_block else 0
    # Owners keep whole weights; gradients come and go
    kept, wire = weight * at_owner, gradient * at_owner
    host = 0
    # Then the step, and all it needs, is on the host; what travels passes the device
    if offload_params:
        host = parameters + gradients + state + kept + wire + max(step, wire)
        # fsdp takes a unit's gradients there at once, zero3 all of them after backward
        parameters, gradients, state, kept, step = 0, 0 if fsdp else gradients, 0, 0, 2 * wire
    elif offload:
        host, state, step = state, 0, step + 3 * wire + chunks
    else:
        step += 3 * wire
    buffers = kept + max(backward, step - activations)  # backward and step are not at the same time
    held = dict(
        parameters=parameters,
        gradients=gradients,
        state=state,
        activations=activations,
        buffers=buffers,
    )
    return held | dict(total=sum(held.values()), host=host)


def coming_and_going(
    shapes: Shapes,
    layout: str,
    n: int,
    weight: int,
    gradient: int,
    reshard: bool,
    micro_batches: int,
    bucket_mb: float,
    own: bool,
) -> float:
    """Bytes of weights and gradients that a rank has for a while in backward, beside what it keeps;
    `own`: it keeps its own weights (and fsdp's gradients) on the device."""
    units = {"before": 0, "after": 0}  # and the blocks -> numbers in them
    for name, (_, shape) in shapes.items():
        unit = (
            name.split(".")[1]
            if name.startswith("blocks.")
            else "before"
            if len(units) == 2
            else "after"
        )
        units[unit] = units.get(unit, 0) + math.prod(shape)
    everything, unit, root = (
        sum(units.values()),
        max(units.values()),
        units["before"] + units["after"],
    )
    block = max(size for name, size in units.items() if name not in ("before", "after"))
    sent, others = min(max(bucket_mb * 2**20, gradient * unit), gradient * everything), (n - 1) / n
    if layout == "ddp":
        return gradient * max(math.prod(shape) for _, shape in shapes.values())
    if layout == "zero1" and micro_batches > 1:
        return sent
    if layout in ("zero1", "zero2"):
        return sent + others * gradient * unit
    if layout == "zero3":
        return (others if own else 1) * 2 * weight * unit + (1 + others) * gradient * unit
    gathered = weight * (root + 2 * block if reshard else everything)
    if micro_batches > 1:  # gradients wait, whole
        return gathered + gradient * ((others if own else 1) * everything + max(root, block))
    return gathered + 2 * gradient * max(root, block)


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


def of_the_step(
    shapes: Shapes, optim: str, n: int, weight: int, precision: str, chunk: float
) -> float:
    """Bytes of the temporaries of an optimizer's step: of the largest parameter, for Muon of a
    stack, in which go no more matrices than in a chunk of so many numbers."""
    most = weight * max(math.prod(shape) for _, shape in shapes.values())
    if optim != "muon":
        return most
    # Transposes too
    sides = [tuple(sorted(shape)) for kind, shape in shapes.values() if kind == "matrix"]
    stack = max(
        (2 * math.prod(s) + 3 * s[0] ** 2)
        * min(math.ceil(sides.count(s) / n), max(1, chunk / math.prod(s)))
        for s in set(sides)
    )
    return max(most, stack * (8 if precision == "fp64" else 2))


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
    check("precision", precision, BYTES)
    precision = {"fp16": "bf16", "fp8": "bf16"}.get(precision, precision)  # they keep the same
    # With inputs and results of products of 2 bytes
    published = {"mixed": 34, "texts": 20}.get(precision)
    per_layer, per_channel, per_word = (published, 0, 0) if published else KEPT[arch, precision]
    full, attention, mlp, selective, passing = (
        (2, 26, 18, 22, 0) if published else LEFT[arch, precision]
    )
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
    "optim": OPTIONS,
    "precision": BYTES,
    "arch": ("modern", "gpt2", "track3"),
    "offload": ("cpu", "disk"),
    "offload_params": ("cpu", "disk"),
    "grafting": ("adam", "rmsprop", "sgd", "none"),
}
FRACTIONS = ("bucket_mb", "momentum", "beta1", "normuon_beta2")
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
            settings[name] = from_text(name, text, DEFAULTS[name])
    for name, text in options.items():
        check(f"{settings['optim']}'s option", name, OPTIONS[settings["optim"]])
        options[name] = from_text(name, text, OPTIONS[settings["optim"]][name])
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


def from_text(name: str, text: str, default):
    """The value of --name=text, whose default shows its kind. Raises ValueError."""
    if name == "activation_checkpoint":
        return text
    if default is None and text.lower() == "none":
        return None
    if name in NAMES:
        check(name, text, NAMES[name])
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
    whole, least = name not in FRACTIONS, 0 if name in FRACTIONS or name == "batch" else 1
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
    by_shape = s.params is None
    if (by_shape or s.batch) and None in (s.n_layer, s.n_embd):
        raise ValueError(
            "type --params=7e9, or the model's --n_layer=12 --n_embd=768 --vocab_size=50304; "
            "--batch needs --n_layer and --n_embd in any case"
        )
    if by_shape:
        shapes = gpt_shapes(
            s.n_layer, s.n_embd, s.vocab_size, s.block_size, s.arch, s.n_head, s.n_kv_head
        )
    elif s.optim in ("adafactor", "shampoo", "soap"):
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
            f"{precision}: {HEADINGS[precision]}",
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
        print(__doc__ + "\n" + usage(DEFAULTS, NAMES))
        sys.exit()
    try:
        print(table(*parse(sys.argv[1:])))
    except ValueError as error:
        print(f"estimate.py: {error}", file=sys.stderr)
        sys.exit(2)
