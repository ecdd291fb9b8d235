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
    for row in rows:
        print(f"{row.count / 1e9:5.2f}e9 parameters, {row.published}, with {row.flags}")
    assert rows[0].count < rows[-1].count
"""

import bisect
import functools
import inspect
import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

from memory import known
from memory.activations import activation_bytes, step_of_layers
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
# What saves memory, and what it costs; each row adds to those before it. One that does not help,
# or was typed, has no row.
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


@dataclass(frozen=True)
class Row:
    run: SimpleNamespace  # the flags of memory/estimate.py: what was typed, and the ways
    shape: dict
    count: int  # of parameters
    layout: str
    published: str  # the largest published model that fits, or "none"
    held: float  # bytes on the fullest GPU

    @property
    def flags(self) -> str:
        """Those of WAYS in the run, and the layout, as typed."""
        names = [name for way, _ in WAYS for name in way]
        changed = [name for name in names if getattr(self.run, name) != DEFAULTS[name]]
        flags = [f"--{name}={getattr(self.run, name)}" for name in changed]
        if self.run.gpus > 1:
            flags.insert(0, f"--data_parallel={self.layout}")
        return " ".join(flags) or "the defaults"


def usual_shapes(s: SimpleNamespace) -> list[dict]:
    """Guessed shapes, 3 % apart, from 1e6 to 1e13 parameters, with what was typed of a shape.

    Raises ValueError where that fits none of them.
    """
    typed = {name: getattr(s, name) for name in known.COLUMNS if getattr(s, name) is not None}
    found = []
    for i in range(547):
        guess = known.guess(10 ** (6 + i / 78), s.vocab_size or 50304)
        try:
            shape, _ = known.asked(vars(s) | dict(params=None, model=None) | guess | typed)
        except ValueError as error:
            refused = error  # its heads do not divide by those typed
            continue
        found.append(shape)
    if not found:
        raise refused
    return found


def may_run(s: SimpleNamespace, shape: dict) -> bool:
    """Has the model as many layers as there are segments?"""
    how, k = step_of_layers(s.activation_checkpoint)
    return how != "segments" or k <= shape["n_layer"]


def largest(s: SimpleNamespace, options: dict) -> list[Row]:
    """The largest model without any of WAYS, and with each that makes it larger.

    Raises ValueError where nothing fits.
    """
    limit = USABLE * s.memory
    shapes = usual_shapes(s)
    published = [of_published(s, name) for name in by_size()]
    rows = []
    run = s
    for way, _ in WAYS:
        more = SimpleNamespace(**vars(run) | way)
        if rows and vars(more) == vars(run):
            continue
        candidates = [shape for shape in shapes if may_run(more, shape)]
        total = functools.partial(least, more, options)
        # The last that fits.
        i = bisect.bisect_right(candidates, limit, key=lambda shape: total(shape)[0])
        if i == 0:
            continue
        shape = candidates[i - 1]
        count = sum(math.prod(x) for _, x in gpt_shapes(**shape).values())
        if rows and count <= rows[-1].count:
            continue
        run = more
        fit = [may_run(run, x) and total(x)[0] <= limit for x in published]
        names = ["none", *itertools.compress(by_size(), fit)]
        held, layout = total(shape)
        rows.append(Row(run, shape, count, layout, names[-1], held))
    if not rows:
        raise ValueError(
            f"nothing fits in memory={s.memory:g}; give more, or a smaller --block_size"
        )
    return rows


def by_size() -> list[str]:
    """The published models, the smallest first."""
    return sorted(known.SHAPES, key=lambda name: known.SHAPES[name][0])


def of_published(s: SimpleNamespace, name: str) -> dict:
    """The shape of a published model, at 2048 tokens or --block_size."""
    own = dict.fromkeys(known.COLUMNS) | dict(params=None, model=name)
    shape, _ = known.asked(vars(s) | own | dict(block_size=s.block_size or 2048))
    return shape


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
