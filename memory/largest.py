"""What one run holds, by the flags of memory/estimate.py; and the largest model that fits a GPU.

    python -m memory.estimate --largest --memory=24GB     # or --gpu=4090, --gpus=8

`largest` tries usual shapes (known.guess) and the published ones, for each of a few ways to save
memory, the dearest last. A run fits that fills at most USABLE of a GPU.

Neighbours: memory/activations.py, memory/flags.py, memory/known.py, memory/ranks.py,
memory/shapes.py, optim/adamw.py, optim/attributes.py, optim/muon.py, parallel/replicas.py,
precision/amp.py

Example:
    from types import SimpleNamespace
    from memory.largest import DEFAULTS, largest
    rows = largest(SimpleNamespace(**DEFAULTS | dict(memory=24e9, gpus=1)), {})
    for ways, count, shape, published, gigabytes in rows:
        print(f"{count / 1e9:5.2f}e9 parameters, {published}, with {ways or 'the defaults'}")
    assert rows[0][1] < rows[-1][1]
"""

import bisect
import functools
import inspect
import math
from types import SimpleNamespace

from memory import known
from memory.activations import activation_bytes
from memory.ranks import EXPERT_PARALLEL, LAYOUTS, bytes_per_rank
from memory.shapes import Shapes, gpt_shapes

# The share of a GPU's memory that a run fills. The rest is for the driver's context, communication
# buffers and fragmentation.
USABLE = 0.9
# The flags of memory/estimate.py.
DEFAULTS = known.FLAGS | dict(
    gpus=None,
    gpu=None,
    memory=None,
    optim="adamw",
    precision="bf16",
    batch=1,
    micro_batches=2,
    activation_checkpoint="none",
    loss_chunk="auto",
    ep=1,
    fsdp_shard=None,
    reshard=True,
    bucket_mb=25.0,
    offload=None,
    offload_params=None,
    hooks=False,
    ema=False,
    ema_nesterov=False,
    compare=False,
    row=None,
    largest=False,
)
# What saves memory, and what it costs; each row adds to those before it.
WAYS = (
    ({}, ""),
    ({"activation_checkpoint": "full"}, "a third more work: backward computes each block again"),
    ({"offload": "cpu"}, "optimizer state in host memory: a step copies it to and fro"),
    (
        {"precision": "bf16_sr"},
        "bfloat16 weights, rounded by chance: docs/results.md",
    ),
)


# ---- one run -------------------------------------------------------------------------------------
def layouts_of(s: SimpleNamespace) -> tuple[str, ...]:
    """The layouts that these flags allow, those that keep most on each GPU first."""
    if s.gpus == 1 and s.offload_params is None:
        return LAYOUTS[:1]  # nothing is shared out
    return LAYOUTS if s.ep == 1 else EXPERT_PARALLEL


def loss_chunk(s: SimpleNamespace, vocab_size: int) -> int | None:
    """How many tokens have logits at once; auto is what train.py chooses on a GPU."""
    if s.loss_chunk != "auto":
        return s.loss_chunk
    return 4096 if vocab_size >= 8192 else None


def held(
    s: SimpleNamespace,
    options: dict,
    shape: dict,
    layout: str,
    precision: str,
    shapes: Shapes | None = None,
) -> dict[str, float]:
    """What bytes_per_rank returns, with this run's activations.

    s: the flags; options: the optimizer's; shape: of the model, see known.asked; shapes: its
    parameters, if they are equal parts, for which the loss is left out.
    """
    experts = known.experts_of(vars(s))
    tokens = s.batch * shape["block_size"]
    chunk = loss_chunk(s, shape["vocab_size"])
    logits = tokens * shape["vocab_size"]
    if shapes is None:
        shapes = gpt_shapes(**shape, experts=experts)
    else:
        chunk = None
        logits = 0
    activations = 0
    inside = 0
    if tokens:
        head_dim = shape.get("head_dim") or shape["n_embd"] // shape["n_head"]
        count = functools.partial(
            activation_bytes,
            precision,
            tokens,
            shape["n_layer"],
            shape["n_embd"],
            shape["vocab_size"],
            shape["arch"],
            s.activation_checkpoint,
            loss_chunk=chunk,
            q_width=shape["n_head"] * head_dim,
            kv_width=shape["n_kv_head"] * head_dim,
            mlp_width=shape.get("mlp_width"),
            experts=experts,
        )
        activations = count()
        inside = activations - count(in_backward=False)
    return bytes_per_rank(
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
        logits=logits,
        loss_chunk=chunk,
        offload=s.offload,
        offload_params=s.offload_params if layout in ("zero3", "fsdp") else None,
        bucket_mb=s.bucket_mb,
        hooks=s.hooks,
        kept=s.ema + 2 * s.ema_nesterov,
        **options,
    )


# ---- the largest ---------------------------------------------------------------------------------
def least(s: SimpleNamespace, options: dict, shape: dict) -> tuple[float, str]:
    """(bytes, layout) of the layout that needs least; the simplest among equals."""
    totals = []
    for layout in layouts_of(s):
        totals.append((held(s, options, shape, layout, s.precision)["total"], layout))
    return min(totals, key=lambda pair: round(pair[0] / 1e6))


def guessed(s: SimpleNamespace, params: float) -> dict:
    shape, _ = known.asked(vars(s) | dict(params=None, model=None) | typed_shape(s, params))
    return shape


def typed_shape(s: SimpleNamespace, params: float) -> dict:
    """The guessed shape, and what of it was typed."""
    typed = {name: getattr(s, name) for name in known.COLUMNS if getattr(s, name) is not None}
    return known.guess(params, s.vocab_size or 50304) | typed


def largest(s: SimpleNamespace, options: dict) -> list[tuple]:
    """For each of WAYS (its flags, parameters, shape, published model or "none", GB held).

    Raises ValueError where nothing fits.
    """
    limit = USABLE * s.memory
    rows = []
    typed = {}
    for way, _ in WAYS:
        typed |= {name: value for name, value in way.items() if getattr(s, name) != value}
        run = SimpleNamespace(**vars(s) | typed)

        def total(shape: dict) -> float:
            return least(run, options, shape)[0]

        # Sizes 3 % apart, from 1e6 to 1e13 parameters: the last that fits.
        sizes = [10 ** (6 + i / 78) for i in range(547)]
        i = bisect.bisect_right(sizes, limit, key=lambda params: total(guessed(run, params)))
        if i == 0:
            raise ValueError(
                f"nothing fits in memory={s.memory:g}; give more, or a smaller --block_size"
            )
        shape = guessed(run, sizes[i - 1])
        count = sum(math.prod(x) for _, x in gpt_shapes(**shape).values())
        published = [name for name in by_size() if total(of_published(run, name)) <= limit]
        flags = [f"--{name}={value}" for name, value in typed.items()]
        if s.gpus > 1:
            flags.insert(0, f"--data_parallel={least(run, options, shape)[1]}")
        name = published[-1] if published else "none"
        rows.append((" ".join(flags), count, shape, name, total(shape) / 1e9))
    return rows


def by_size() -> list[str]:
    """The published models, the smallest first."""
    return sorted(known.SHAPES, key=lambda name: known.SHAPES[name][0])


def of_published(s: SimpleNamespace, name: str) -> dict:
    """The shape of a published model, with what was typed, at 2048 tokens or --block_size."""
    model = dict(model=name, params=None, n_layer=None, n_embd=None)
    shape, _ = known.asked(vars(s) | model | dict(block_size=s.block_size or 2048))
    return shape


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
