"""How many bytes a rank needs, predicted from shapes alone: every layout, optimizer and precision.

    python memory/estimate.py --params=7e9 --gpus=64 --optim=adamw
    python memory/estimate.py --params=7e9 --n_layer=32 --n_embd=4096 --block_size=2048 --batch=4
    python memory/estimate.py --n_layer=12 --n_embd=768 --vocab_size=50304 --gpus=8 --optim=muon --batch=16

Without --params the exact tensors of our GPT, in whole parameters or rows as each layout deals them out (with
it equal parts, for Muon all of them matrices); a row shows the rank that holds most. --batch is one rank's
micro-batch. GB are 1e9 bytes. Bytes of a parameter, by precision:

    name    weight  gradient  master  a number of state    with Adam   what it is
    fp64      8        8        -            8                32       ours
    fp32      4        4        -            4                16       ours
    bf16      4        4        -            4                16       ours: autocast over fp32 weights
    mixed     2        2        4            4                16       Rajbhandari et al. 2020 (1910.02054)
    texts     2        2        -            4                12       a common text, which forgets the master

    layout   weights   gradients   state       held only for a while ("buffers")
    ddp      all       all         all         the gradient on its way into its bucket
    zero1    all       all         owner       a unit's gradients, or a bucket
    zero2    all       owner       owner       two units' gradients
    zero3    owner     owner       owner       two units' weights and gradients
    fsdp     rows/n    rows/n      rows/n      weights of embedding, head and two blocks (reshard=False: all),
                                               one unit's gradients twice; those of earlier micro-batches

To buffers come the temporaries of a step, at least the largest parameter's (Muon: three bfloat16 copies of
the matrices of one shape), and for bf16 the copies of the weights that autocast keeps till backward.
With fsdp, methods that need whole matrices keep state and weights at owners too, see parallel/whole.py.

Activations kept for backward, for b x s tokens, L layers, h channels, V words:

    34 s b h L             Korthikanti et al. 2022 (2205.05198), mixed precision, without the s² of plain
                           attention, and without logits
    20 s b h L             a common text: 7B, b = 4, s = 2048 make its 105.5 GB; the primary source says 36.5
                           of activations, not 21.5
    b s (k h L + r h + l V)   ours, counted by autograd's saved tensors: see KEPT

Rough, and rather too much than too little: with one micro-batch gradients come as activations go, and both
are counted in full. Not in it: fragmentation, the device's own context, kernels' workspaces, the peak inside
a layer. Measured with tiny batches and several micro-batches: within 5 % (tests/test_estimate.py).
"""

import difflib
import math
import sys
from types import SimpleNamespace

BYTES = {"fp64": (8, 8, 0, 8), "fp32": (4, 4, 0, 4), "bf16": (4, 4, 0, 4), "mixed": (2, 2, 4, 4),
         "texts": (2, 2, 0, 4)}  # of a weight, its gradient, its master copy, one number of state
HEADINGS = {"fp64": "8 + 8 bytes and state in float64", "fp32": "4 + 4 bytes and state in float32",
            "bf16": "autocast over float32 weights: 4 + 4 bytes and state in float32",
            "mixed": "the primary source's 2 + 2 + 4 bytes and state in float32 (16 with Adam)",
            "texts": "a text's 2 + 2 bytes and state in float32 (12 with Adam), no master weights"}
LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp")
OPTIONS = {  # what changes the size of the state, with the class's default
    "sgd": {"momentum": 0.0}, "adamw": {}, "adam_l2": {}, "adafactor": {"beta1": None}, "lion": {},
    "lars": {"momentum": 0.9}, "lamb": {}, "muon": {"normuon_beta2": None},
    "shampoo": {"max_precond_dim": 8192, "precondition_1d": False, "grafting": "adam"},
    "soap": {"max_precond_dim": 10000, "precondition_1d": False},
    "schedule_free": {}, "schedule_free.SGDScheduleFree": {}}  # fmt: skip
ELEMENTWISE = ("sgd", "adamw", "adam_l2", "lion", "schedule_free", "schedule_free.SGDScheduleFree")
# (k, r, l) of the formula above; l also covers the logits' softmax
KEPT = {
    ("modern", "fp64"): (152, 18, 16), ("modern", "fp32"): (76, 9, 8), ("modern", "bf16"): (51, 6, 8),
    ("gpt2", "fp64"): (128, 16, 8), ("gpt2", "fp32"): (64, 8, 4), ("gpt2", "bf16"): (40, 6, 4)}  # fmt: skip

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # name -> (embedding | head | matrix | scalar, shape)


# ---- what there is ---------------------------------------------------------------------------------------
def gpt_shapes(n_layer: int, n_embd: int, vocab_size: int, block_size: int = 1024, arch: str = "modern",
               n_head: int = 1, n_kv_head: int | None = None) -> Shapes:
    """The parameters of model.py in its order. arch `gpt2`: tied, with biases, gains and positions."""
    C, V, gpt2 = n_embd, vocab_size, arch == "gpt2"
    kv = C // n_head * (n_kv_head or n_head)
    shapes = {"embed.weight": ("embedding", (V, C))}
    if gpt2:
        shapes["positions.weight"] = "embedding", (block_size, C)

    def norm(name: str) -> None:
        if gpt2:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = "scalar", (C,)

    for i in range(n_layer):
        for part, linears in (("attn", dict(q=(C, C), k=(kv, C), v=(kv, C), proj=(C, C))),
                              ("mlp", dict(fc=(4 * C, C), proj=(C, 4 * C)))):  # fmt: skip
            norm(f"blocks.{i}.{part}_norm")
            for name, shape in linears.items():
                shapes[f"blocks.{i}.{part}.{name}.weight"] = "matrix", shape
                if gpt2:
                    shapes[f"blocks.{i}.{part}.{name}.bias"] = "scalar", shape[:1]
    norm("final_norm")
    if not gpt2:
        shapes["head.weight"] = "head", (V, C)
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
        return n + (shape[0] if o["normuon_beta2"] is not None else 0) if kind == "matrix" else 2 * n
    if optim == "shampoo":
        return squares + (2 * n if o["grafting"] in ("adam", "rmsprop") else n)
    if optim == "soap":
        return squares + 2 * n
    return n if optim in ("lion", "schedule_free.SGDScheduleFree") else 2 * n


def assign(shapes: dict[str, tuple[int, ...]], n: int) -> dict[str, int]:
    """{name: owner}, by the rule of parallel/zero.py: each shape goes round the ranks, the bulkiest first."""
    owners, load = {}, [0] * n
    alike = {shape: [name for name, s in shapes.items() if s == shape] for shape in shapes.values()}
    for shape, names in sorted(alike.items(), key=lambda item: (-math.prod(item[0]) * len(item[1]), item[0])):
        have = [0] * n
        for name in names:
            owners[name] = rank = min(range(n), key=lambda r: (have[r], load[r]))
            have[rank] += 1
            load[rank] += math.prod(shape)
    return owners


# ---- who holds it ----------------------------------------------------------------------------------------
def bytes_per_rank(shapes: Shapes, optim: str = "adamw", layout: str = "ddp", world: int = 1,
                   precision: str = "fp32", *, fsdp_shard: int | None = None, reshard: bool = True,
                   micro_batches: int = 1, activations: float = 0, bucket_mb: float = 25.0,
                   offload: str | None = None, offload_params: str | None = None, chunk_mb: float = 64.0,
                   owners=assign, **options) -> dict[str, float]:
    """Bytes on the fullest rank: parameters, gradients, state, activations, buffers, their total; and host.

    shapes: as gpt_shapes gives them. fsdp_shard: ranks that share one copy (None: all). offload (of state)
    and offload_params (zero3, fsdp): `cpu` or `disk`, both counted under host. owners: {name: shape}, ranks
    -> {name: rank}. options: the optimizer's, see OPTIONS. Buffers are 0 if no name begins with `blocks.`.
    Raises ValueError for names that are not known, with the nearest one, and for sizes that do not fit.
    """
    check("optim", optim, OPTIONS)
    check("layout", layout, LAYOUTS)
    check("precision", precision, BYTES)
    for name in options:
        check(f"{optim}'s option", name, OPTIONS[optim])
    for what, place in ("offload", offload), ("offload_params", offload_params):
        check(what, place, (None, "cpu", "disk"))
    if offload_params and layout not in ("zero3", "fsdp"):
        raise ValueError(f"offload_params={offload_params} needs layout=zero3 or fsdp, not {layout}")
    if min(world, micro_batches) < 1 or world % (fsdp_shard or 1):
        raise ValueError(f"world={world} and micro_batches={micro_batches} must be at least 1, and "
                         f"fsdp_shard={fsdp_shard} a divisor of world")
    weight, gradient, master, number = BYTES[precision]
    fsdp, stage = layout == "fsdp", LAYOUTS.index(layout)
    n = 1 if layout == "ddp" else (fsdp_shard or world) if fsdp else world  # ranks that share one copy
    sizes = {name: math.prod(shape) for name, (_, shape) in shapes.items()}
    everything = sum(sizes.values())

    def state_bytes(kind: str, shape: tuple[int, ...]) -> int:
        return number * state_numbers(optim, kind, shape, **options) + master * math.prod(shape)

    # What each rank owns whole: with ZeRO its parameters, with FSDP only what cannot be stepped in shards.
    whole = {name: shape for name, (kind, shape) in shapes.items() if not fsdp or (
        n > 1 and optim not in ELEMENTWISE and (optim != "muon" or kind == "matrix"))}  # fmt: skip
    owned = [[0, 0] for _ in range(n)]  # numbers, bytes of state
    for name, rank in owners(whole, n).items():
        owned[rank][0] += sizes[name]
        owned[rank][1] += state_bytes(*shapes[name])
    if fsdp:
        shards = [(name, kind, (math.ceil(s[0] / n), *s[1:])) for name, (kind, s) in shapes.items()]
        share = sum(math.prod(shape) for _, _, shape in shards)
        state = sum(state_bytes(kind, shape) for name, kind, shape in shards if name not in whole)
        ranks = [(weight * share, gradient * share, state + s) for _, s in owned]
    else:
        # With one micro-batch our zero1 sends gradients as early as zero2; the paper counts them whole.
        free = stage >= 2 or (stage == 1 and micro_batches == 1 and precision not in ("mixed", "texts"))
        ranks = [(weight * (size if stage >= 3 else everything), gradient * (size if free else everything), s)
                 for size, s in owned]  # fmt: skip
    parameters, gradients, state = max(ranks, key=sum)

    buffers = 0
    if any(name.startswith("blocks.") for name in shapes):
        backward, step = 0, of_the_step(shapes, optim, n, weight, precision)
        if n > 1 or world > 1 or offload_params:
            backward = coming_and_going(shapes, layout, n, weight, gradient, reshard, micro_batches,
                                        bucket_mb)  # fmt: skip
        if precision == "bf16" and layout != "zero3":  # autocast keeps its copies till backward
            backward += 2 * sum(sizes[x] for x, (kind, _) in shapes.items() if kind in ("matrix", "head"))
        if fsdp and whole:  # the owners' weights stay; their gradients come, go over the wire, and leave
            at_owner = sum(sizes[name] for name in whole) / n
            buffers, step = weight * at_owner, step + 3 * gradient * at_owner
        buffers += max(backward, step - activations)  # backward and step are not at the same time
    host = 0
    if offload_params:  # then the step, and all it needs, is on the host
        host, parameters, gradients, state = parameters + gradients + state, 0, 0, 0
    elif offload:
        chunks = 2 * chunk_mb * 2**20 * sum(state_bytes(*s) for s in shapes.values()) / (weight * everything)
        buffers, host, state = buffers + min(state, chunks), state, 0
    held = dict(parameters=parameters, gradients=gradients, state=state, activations=activations,
                buffers=buffers)  # fmt: skip
    return held | dict(total=sum(held.values()), host=host)


def coming_and_going(shapes: Shapes, layout: str, n: int, weight: int, gradient: int, reshard: bool,
                     micro_batches: int, bucket_mb: float) -> float:
    """Bytes of weights and gradients that a rank has for a while in backward, beside what it keeps."""
    units = {"before": 0, "after": 0}  # and the blocks -> numbers in them
    for name, (_, shape) in shapes.items():
        unit = name.split(".")[1] if name.startswith("blocks.") else "before" if len(units) == 2 else "after"
        units[unit] = units.get(unit, 0) + math.prod(shape)
    everything, unit, root = sum(units.values()), max(units.values()), units["before"] + units["after"]
    block = max(size for name, size in units.items() if name not in ("before", "after"))
    sent, others = min(max(bucket_mb * 2**20, gradient * unit), gradient * everything), (n - 1) / n
    if layout == "ddp":
        return gradient * max(math.prod(shape) for _, shape in shapes.values())
    if layout == "zero1" and micro_batches > 1:
        return sent
    if layout in ("zero1", "zero2"):
        return sent + others * gradient * unit
    if layout == "zero3":
        return others * 2 * weight * unit + (1 + others) * gradient * unit
    gathered = weight * (root + 2 * block if reshard else everything)
    if micro_batches > 1:  # gradients wait, whole
        return gathered + gradient * (others * everything + max(root, block))
    return gathered + 2 * gradient * max(root, block)


def of_the_step(shapes: Shapes, optim: str, n: int, weight: int, precision: str) -> float:
    """Bytes of the temporaries of an optimizer's step: of the largest parameter, for Muon of a stack."""
    most = weight * max(math.prod(shape) for _, shape in shapes.values())
    if optim != "muon":
        return most
    matrices = [shape for kind, shape in shapes.values() if kind == "matrix"]
    stack = max(math.prod(s) * math.ceil(matrices.count(s) / n) for s in set(matrices))
    return max(most, 3 * stack * (8 if precision == "fp64" else 2))


def activation_bytes(precision: str, tokens: int, n_layer: int, n_embd: int, vocab_size: int = 0,
                     arch: str = "modern") -> float:
    """Kept for backward by one micro-batch of `tokens` = b x s: by 34 s b h, the text's 20 s b h, or ours."""
    check("precision", precision, BYTES)
    if precision in ("mixed", "texts"):
        return tokens * n_embd * n_layer * {"mixed": 34, "texts": 20}[precision]
    per_layer, per_channel, per_word = KEPT[arch, precision]
    return tokens * ((per_layer * n_layer + per_channel) * n_embd + per_word * vocab_size)


def check(what: str, value, known) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), [k for k in known if k], 1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(map(str, known)) or 'none'}"
        raise ValueError(f"{what} {value!r} is not known; {hint}")


# ---- the command -----------------------------------------------------------------------------------------
DEFAULTS = dict(params=None, gpus=8, optim="adamw", precision=None, n_layer=None, n_embd=None,
                vocab_size=50304, n_head=1, n_kv_head=None, block_size=1024, arch="modern", batch=0,
                micro_batches=1, fsdp_shard=None, reshard=True, bucket_mb=25.0, offload=None,
                offload_params=None)  # fmt: skip
NAMES = {"optim": OPTIONS, "precision": BYTES, "arch": ("modern", "gpt2"), "offload": ("cpu", "disk"),
         "offload_params": ("cpu", "disk"), "grafting": ("adam", "rmsprop", "sgd", "none")}  # fmt: skip
FRACTIONS = ("bucket_mb", "momentum", "beta1", "normuon_beta2")
MAY_BE_NONE = ("n_kv_head", "fsdp_shard", "beta1", "normuon_beta2")


def parse(argv: list[str]) -> tuple[dict, dict]:
    """--name=value ... -> the settings, and the optimizer's own from --opt.NAME=value. Raises ValueError."""
    settings, options = dict(DEFAULTS), {}
    for argument in argv:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise ValueError(f"{argument!r} is not understood; type --name=value")
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
        raise ValueError(f"n_embd={width}, n_head={heads} and n_kv_head={settings['n_kv_head']} must divide, "
                         "each the one before")  # fmt: skip
    return settings, options


def from_text(name: str, text: str, default):
    if name in NAMES and not (text == "none" and default is None):
        check(name, text, NAMES[name])
    if name in NAMES or (text == "none" and name in MAY_BE_NONE):
        return None if text == "none" else text
    if type(default) is bool:
        check(name, text, ("true", "false"))
        return text == "true"
    try:
        value = float(text)
        assert 0 <= value < math.inf and (name in FRACTIONS or value == int(value))
        assert value >= 1 or name in FRACTIONS or name == "batch"
    except (ValueError, AssertionError):
        what = "a number, 0 or more" if name in FRACTIONS else "a whole number"
        raise ValueError(f"{name}={text} is not allowed; it takes {what}") from None
    return value if name in FRACTIONS else int(value)


def table(settings: dict, options: dict) -> str:
    """A row for every layout, for each accounting that was asked for. Raises ValueError."""
    s = SimpleNamespace(**settings)
    by_shape = s.params is None
    if (by_shape or s.batch) and None in (s.n_layer, s.n_embd):
        raise ValueError("type --params=7e9, or the model's --n_layer=12 --n_embd=768 --vocab_size=50304; "
                         "--batch needs --n_layer and --n_embd in any case")  # fmt: skip
    if by_shape:
        shapes = gpt_shapes(s.n_layer, s.n_embd, s.vocab_size, s.block_size, s.arch, s.n_head, s.n_kv_head)
    elif s.optim in ("adafactor", "shampoo", "soap"):
        raise ValueError(f"{s.optim}'s state depends on shapes: give --n_layer and --n_embd, not --params")
    else:
        shapes = even_shapes(s.params, s.gpus)
    count = sum(math.prod(shape) for _, shape in shapes.values())
    owners = assign if by_shape else lambda shapes, n: {name: i % n for i, name in enumerate(shapes)}
    lines = [f"{count:,} parameters, {s.optim}, {s.gpus} ranks; GB (1e9 bytes) on the fullest rank"]
    columns = ("parameters", "gradients", "state", "activations", "buffers", "total", "host")
    for precision in [s.precision] if s.precision else ["bf16"] * by_shape + ["mixed", "texts"]:
        tokens, kept = s.batch * s.block_size, 0
        if s.batch:
            kept = activation_bytes(precision, tokens, s.n_layer, s.n_embd, s.vocab_size, s.arch)
        lines += ["", f"{precision}: {HEADINGS[precision]}", "layout " + "".join(f"{c:>12}" for c in columns)]
        for layout in LAYOUTS:
            held = bytes_per_rank(
                shapes, s.optim, layout, s.gpus, precision, reshard=s.reshard, micro_batches=s.micro_batches,
                fsdp_shard=s.fsdp_shard if layout == "fsdp" else None, activations=kept, offload=s.offload,
                offload_params=s.offload_params if layout in ("zero3", "fsdp") else None,
                bucket_mb=s.bucket_mb, owners=owners, **options)  # fmt: skip
            cells = [f"{held[c] / 1e9:.4g}" if by_shape or c != "buffers" else "-" for c in columns]
            lines.append(f"{layout:7}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines + ([] if by_shape else ["", "-: give --n_layer and --n_embd instead of --params"]))


if __name__ == "__main__":
    if {"--help", "-h"} & {*sys.argv}:
        print(__doc__, *(f"--{name}={value}" for name, value in DEFAULTS.items()), sep="\n  ")
        sys.exit()
    try:
        print(table(*parse(sys.argv[1:])))
    except ValueError as error:
        print(f"estimate.py: {error}", file=sys.stderr)
        sys.exit(2)
