"""What a run needs of each GPU's memory, for every layout: predicted, in GB, before it starts.

    python -m memory.estimate --params=7B --gpus=64              # the shape published as 7B
    python -m memory.estimate --model=qwen3-8b --gpus=8 --gpu=H100 --activation_checkpoint=full
    python -m memory.estimate --n_layer=12 --n_embd=768 --optim=muon --batch=16
    python -m memory.estimate --n_layer=12 --n_embd=768 --n_expert=32 --ep=8 --gpus=8
    python -m memory.estimate --params=7B --gpus=64 --compare    # beside the papers' formulas
    python -m memory.estimate --largest --memory=24GB            # the largest model for a card

Activations are those of one micro-batch on each GPU: one sequence, unless --batch= says otherwise.
A row shows the GPU that holds most. How it is counted: memory/ranks.py (weights, gradients, state,
buffers; within 5 % of what was measured on CPUs), memory/activations.py, memory/shapes.py (bytes of
a number by precision). Not in it: the driver's context, fragmentation, kernels' workspaces; so a
run is said to fit that fills at most 0.9 of a GPU. Which layout is the fastest: memory/plan.py.

Neighbours: memory/activations.py, memory/claims.py, memory/flags.py, memory/known.py,
memory/largest.py, memory/layouts.py, memory/plan.py, memory/predict.py, memory/ranks.py,
memory/shapes.py, metrics/devices.py, optim/adamw.py, optim/attributes.py, optim/muon.py,
parallel/replicas.py, precision/amp.py

Example:
    from memory.estimate import parse, table
    text = table(*parse(["--params=7B", "--gpus=64", "--memory=80GB"]))
    print(text)
    assert "Llama 2 7B" in text and "zero3" in text
"""

import inspect
import math
import textwrap
import typing
from types import SimpleNamespace
from typing import Literal

from memory import known
from memory.flags import check, from_text, usage, words
from memory.largest import DEFAULTS, USABLE, WAYS, Row, held, largest, layouts_of
from memory.plan import FLAGS, cluster_of, model_flags, start_command
from memory.predict import Layout, Model, predict
from memory.ranks import find_optimizer, options_of
from memory.shapes import ACCOUNTINGS, NORM_PARTS, PUBLISHED, even_shapes, gpt_shapes, heading
from metrics import devices
from optim.attributes import own_classes

SAYS = known.SAYS | dict(
    gpus="GPUs that share the batch; none: 8, and 1 for --largest",
    gpu="which: sets --memory (metrics/devices.py)",
    memory="bytes of one GPU, as 24GB: which layouts fit",
    optim="optimizer; --opt.NAME= is an option of it that changes how much it remembers",
    precision="as train.py's; mixed and texts are accountings of others (--compare)",
    batch="sequences of a micro-batch, on each GPU; 0 leaves activations out",
    micro_batches="of a step, on each GPU; 2 stands for more: gradients of earlier ones are held",
    activation_checkpoint="what backward computes again: full, every_2, segments_4, attention, "
    "mlp, selective; or offload",
    loss_chunk="tokens whose logits are there at once; auto: as train.py on a GPU; none: all",
    ep="GPUs that share out the experts",
    fsdp_shard="GPUs that share one copy; none: all",
    reshard="false: fsdp keeps gathered weights",
    bucket_mb="MiB of a bucket of gradients",
    offload="where optimizer state waits",
    offload_params="where weights wait (zero3, fsdp)",
    hooks="does the optimizer wear any (train.py's --hooks)?",
    ema="does the run average its weights (train.py's --ema)?",
    ema_nesterov="is that one of its hooks?",
    compare="also what published formulas make of it",
    row="with --largest: the row whose command is printed; none: the last",
    largest="not a model's memory, but the largest model for --memory= or --gpu=",
)
CHOICES = {
    "precision": ACCOUNTINGS,
    "arch": tuple(NORM_PARTS),
    "offload": ("cpu", "disk"),
    "offload_params": ("cpu", "disk"),
}
SWITCHES = ("compare", "largest", "hooks", "ema", "ema_nesterov")
# Heading of a column -> key of what is held.
COLUMNS = dict(
    total="total",
    weights="parameters",
    gradients="gradients",
    state="state",
    activations="activations",
    buffers="buffers",
    host="host",
)
LEGEND = dict(
    layout="--data_parallel: ddp keeps everything on each GPU, zero1 shares out state, zero2 "
    "gradients too, zero3 and fsdp weights too",
    total="GB (1e9 bytes) of the next five on the GPU that holds most; the rows are sorted by it, "
    "to three digits",
    weights="GB of parameters between the steps",
    gradients="GB of gradients, where they have all been computed",
    state="GB of what the optimizer remembers, of master weights and of averages (--ema)",
    activations="GB that forward keeps for backward (with one micro-batch a step: what is left of "
    "them when all gradients are there)",
    buffers="GB held only for a while: messages, gathered weights, temporaries of loss and step; "
    "of fsdp also the full gradients of earlier micro-batches",
    host="GB of the machine's memory, or files, for each GPU (--offload, --offload_params)",
    fits=f"is the total at most {USABLE} of --memory?",
)


def parse(argv: list[str]) -> tuple[dict, dict]:
    """(the settings, the optimizer's own from --opt.NAME=value) of a command line.

    Raises ValueError for an unknown name or a value that is not allowed.
    """
    settings = dict(DEFAULTS)
    options = {}
    for name, text in words(argv, SWITCHES):
        if name.startswith("opt."):
            options[name[4:]] = text
            continue
        check("the name", name, DEFAULTS)
        if name == "model":
            known.shape_of(text)
            settings[name] = text
        elif name == "gpu":
            settings[name] = devices.typed(text)
        elif (name, text) == ("loss_chunk", "auto"):
            settings[name] = text
        else:
            choices = own_classes() if name == "optim" else CHOICES.get(name, ())
            usual = None if name == "loss_chunk" else DEFAULTS[name]
            settings[name] = from_text(name, text, usual, choices, name == "bucket_mb")
    if settings["gpus"] is None:
        settings["gpus"] = 1 if settings["largest"] else 8
    if settings["gpu"] and not settings["memory"]:
        settings["memory"] = devices.DEVICES[settings["gpu"]].memory * 1e9

    # The optimizer is known only now, and with it the kinds of its options.
    ours = options_of(find_optimizer(settings["optim"]))
    for name, text in options.items():
        check(f"{settings['optim']}'s option", name, ours)
        choices, is_fraction = kinds_of(ours[name])
        options[name] = from_text(name, text, ours[name].default, choices, is_fraction)
    known.check_experts(settings)
    return settings, options


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


# ---- a run's memory ------------------------------------------------------------------------------
def table(settings: dict, options: dict) -> str:
    """The run in words, a row for every layout, what the columns are. Raises ValueError."""
    s = SimpleNamespace(**settings)
    if s.largest:
        return largest_table(s, options)
    if s.row is not None:
        raise ValueError("--row is a row of --largest's table; type --largest too, or leave it out")
    shape, whose = known.asked(settings)
    if s.activation_checkpoint != "none" and not s.batch:
        raise ValueError(
            "--activation_checkpoint is about activations: type --batch=8, or another number"
        )
    shapes = gpt_shapes(**shape, experts=known.experts_of(settings))
    count = sum(math.prod(x) for _, x in shapes.values())
    size = " ".join(f"{k}={v}" for k, v in shape.items() if v is not None and k != "block_size")
    gpus = f"{s.gpus} GPUs" if s.gpus > 1 else "one GPU"
    several = "several micro-batches" if s.micro_batches > 1 else "one micro-batch"
    lines = [
        f"model    {whose}",
        f"         {count:,} parameters: {size}",
        f"run      {gpus}, {s.optim}, {several} a step (--micro_batches=)",
        f"         {heading(s.precision)}",
        f"         {activations_in_words(s, shape)}",
        "",
        *rows(s, options, shape, s.precision),
        "",
        *legend(s),
    ]
    if s.memory and not any(line.endswith(" yes") for line in lines):
        lines += ["", *textwrap.wrap(f"No layout fits. What helps: {helps(s)}", 100)]
    if s.compare:
        lines += comparison(s, options, shape)
    return "\n".join(lines)


def helps(s: SimpleNamespace) -> str:
    """What saves memory and was not typed."""
    found = []
    if s.batch and s.activation_checkpoint == "none":
        found.append("--activation_checkpoint=full")
    if s.offload is None and s.ep == 1:
        found.append("--offload=cpu")
    found += ["more --gpus", "a smaller --block_size"] if s.batch else ["more --gpus"]
    return f"{', '.join(found)}; which model would fit: --largest"


def activations_in_words(s: SimpleNamespace, shape: dict) -> str:
    if not s.batch:
        return "without activations (--batch=1)"
    sequences = "1 sequence" if s.batch == 1 else f"{s.batch} sequences"
    again = "nothing computed again"
    if s.activation_checkpoint != "none":
        again = f"--activation_checkpoint={s.activation_checkpoint}"
    return (
        f"activations of {sequences} of {shape['block_size']} tokens on each GPU (--batch=, "
        f"--block_size=), {again}"
    )


def rows(
    s: SimpleNamespace, options: dict, shape: dict, precision: str, shapes: dict | None = None
) -> list[str]:
    """The head, and a row for every layout, by total."""
    columns = columns_of(s)
    found = []
    for layout in layouts_of(s):
        found.append((layout, held(s, options, shape, layout, precision, shapes)))
    lines = ["layout" + "".join(f"{column:>13}" for column in columns)]
    # Equal in three digits, the simplest layout comes first.
    for layout, bytes_of in sorted(found, key=lambda pair: float(f"{pair[1]['total']:.3g}")):
        cells = {column: f"{bytes_of[key] / 1e9:.2f}" for column, key in COLUMNS.items()}
        if shapes is not None:
            cells["buffers"] = "-"  # they depend on the shapes of blocks
        cells["fits"] = "yes" if bytes_of["total"] <= USABLE * (s.memory or 0) else "no"
        lines.append(f"{layout:6}" + "".join(f"{cells[column]:>13}" for column in columns))
    return lines


def columns_of(s: SimpleNamespace) -> list[str]:
    left_out = {"host"} if not (s.offload or s.offload_params) else set()
    return [c for c in COLUMNS if c not in left_out] + ["fits"] * (s.memory is not None)


def legend(s: SimpleNamespace) -> list[str]:
    lines = []
    for column in ("layout", *columns_of(s)):
        text = LEGEND[column]
        if column == "fits":
            text += f" ({s.memory / 1e9:.4g} GB)"
        first, *more = textwrap.wrap(text, 84)
        lines += [f"{column:12} {first}", *(" " * 13 + line for line in more)]
    return lines


def comparison(s: SimpleNamespace, options: dict, shape: dict) -> list[str]:
    """The same by formulas of others, which know neither buffers nor this trainer."""
    lines = ["", "Not your run, but what published formulas make of its size (--compare):"]
    shapes = None
    optimizer = find_optimizer(s.optim)
    # Their figures are of a round number of parameters, in equal parts.
    if s.params is not None and optimizer.state_numbers((2, 3)) == optimizer.state_numbers((6,)):
        shapes = even_shapes(s.params, s.gpus)
        lines.append(f"{s.params:,} parameters, as typed, in equal parts")
    if s.n_expert is not None:
        s = SimpleNamespace(**vars(s) | dict(batch=0))
        lines.append("without activations: these formulas know no experts")
    for precision in PUBLISHED:
        lines += ["", heading(precision)]
        lines += rows(s, options, shape, precision, shapes)
    return lines


# ---- the largest model ---------------------------------------------------------------------------
def largest_table(s: SimpleNamespace, options: dict) -> str:
    """The largest models for a GPU's memory, by what is done to save it. Raises ValueError."""
    check_largest(s)
    found = largest(s, options) if (s.row or 1) <= len(WAYS) else WAYS
    n = s.row or len(found)
    if n > len(found):
        raise ValueError(f"row={n} is not in the table, which has {len(found)}")
    block_size = found[0].shape["block_size"]
    gpus = "one GPU" if s.gpus == 1 else f"each of {s.gpus} GPUs"
    limit = f"{USABLE * s.memory / 1e9:.4g} GB, {USABLE} of {s.memory / 1e9:.4g}"
    paces = [tokens_per_s(row) for row in found]
    has_pace = any(paces)
    head = f"#  {'parameters':>10}  {'published':13} {'GB':>6}"
    lines = [
        f"The largest models whose training fits in {limit}, on {gpus}: {s.optim},",
        f"{s.batch} x {block_size} tokens at a time (--batch=, --block_size=).",
        "",
        head + f" {'tokens/s':>9} {'days':>6}" * has_pace + "  with",
    ]
    for i, (row, pace) in enumerate(zip(found, paces), 1):
        cells = f"{i}  {row.count / 1e9:8.2f}e9  {row.published:13} {row.held / 1e9:6.1f}"
        if has_pace:
            cells += f" {pace:9,.0f} {days(row.count, pace):6.3g}" if pace else f"{'-':>10}{'-':>7}"
        lines.append(f"{cells}  {row.flags}")
    tokens = batch_size(found[n - 1]) * block_size
    return "\n".join(
        [
            *lines,
            "",
            *largest_legend(found, has_pace),
            "",
            f"Row {n} (another: --row=1), typed, in steps of {tokens / 1e6:.3g}e6 tokens.",
            f"Add {to_add(s)}:",
            largest_command(found[n - 1], options),
        ]
    )


def check_largest(s: SimpleNamespace) -> None:
    """Raises ValueError for flags that --largest does not go with."""
    if s.memory is None:
        raise ValueError("--largest needs the GPU's memory; type --memory=24GB, or --gpu=4090")
    for name in ("params", "model", "n_layer", "n_embd", "n_expert"):
        if getattr(s, name) is not None:
            raise ValueError(f"--largest looks for the model; leave --{name} out")
    if not s.batch:
        raise ValueError("--largest counts activations; type --batch=1, or another number")
    if s.precision in PUBLISHED:
        raise ValueError(
            f"--largest is about train.py, which has no precision={s.precision}; type "
            "--precision=bf16"
        )
    if s.compare:
        raise ValueError("--compare is about one model; leave it out, or --largest")


def days(parameters: float, tokens_per_s: float) -> float:
    """Of training with 20 tokens for each parameter."""
    return 20 * parameters / tokens_per_s / 86400


def batch_size(row: Row) -> int:
    """Sequences of a step of about 2^19 tokens, a whole number of micro-batches on each GPU."""
    at_once = row.run.batch * row.run.gpus
    if row.run.micro_batches == 1:
        return at_once
    return at_once * max(2, round(2**19 / row.shape["block_size"] / at_once))


def to_add(s: SimpleNamespace) -> str:
    """The flags of train.py that each has to choose."""
    names = ["--data=", "--steps=", "--lr="]
    if s.hooks and not s.ema_nesterov:
        names.append("--hooks=")
    if s.ema:
        names.append("--ema=")
    return f"{', '.join(names[:-1])} and {names[-1]}"


def largest_command(row: Row, options: dict) -> str:
    """What to type to train this model in just the run that was counted."""
    s = row.run
    typed = dict(optim=s.optim) | {f"opt.{name}": value for name, value in options.items()}
    if s.ema_nesterov:
        typed["hooks"] = "ema_nesterov"
    typed["precision"] = s.precision
    names = ["activation_checkpoint", "loss_chunk", "offload"]
    if s.gpus > 1 or row.layout != "ddp":
        typed["data_parallel"] = row.layout
        # Each layout refuses, or counts not, what is of another.
        names += {
            "zero3": ["offload_params", "bucket_mb"],
            "fsdp": ["offload_params", "fsdp_shard", "reshard"],
        }.get(row.layout, ["bucket_mb"])
    typed |= {name: getattr(s, name) for name in names if getattr(s, name) != DEFAULTS[name]}
    typed |= dict(micro_batch_size=s.batch, batch_size=batch_size(row))
    typed["block_size"] = row.shape["block_size"]
    flags = []
    for name, value in typed.items():
        flags.append(f"--{name}={value if isinstance(value, str) else str(value).lower()}")
    per_node = devices.DEVICES[s.gpu].per_node if s.gpu else 8
    shape = model_flags(Model(**row.shape))
    return f"{start_command(s.gpus, per_node)} train.py {shape} {' '.join(flags)}"


def tokens_per_s(row: Row) -> float | None:
    """By memory/predict.py, for a GPU whose peak is known; None otherwise, or if it is not alone.

    None also for ways to compute again that it does not know, and for products not of 16 bits.
    """
    s = row.run
    if s.gpu is None or s.gpus > 1 or "bf16" not in devices.DEVICES[s.gpu].peaks:
        return None
    if s.precision not in ("bf16", "bf16_sr", "fp16"):
        return None
    again = s.activation_checkpoint
    if again.startswith("segments_"):
        again = "full"
    if again not in ("none", "full") and not again.startswith("every_"):
        return None
    x = Layout(activation_checkpoint=again, micro_batch_size=s.batch)
    cluster = cluster_of(FLAGS | dict(gpus=1, gpu=s.gpu))
    plan = predict(Model(**row.shape), cluster, x, 64 * s.batch)
    return 64 * s.batch * row.shape["block_size"] / plan.step


def largest_legend(found: list[Row], has_pace: bool) -> list[str]:
    lines = [
        "parameters  of the largest model of a usual shape; the rows are sorted by it, and each",
        "            adds to the flags of the row above what makes it larger",
        "published   the largest published model that fits, too (python -m memory.known)",
        "GB          what the former takes on the fullest GPU",
    ]
    if has_pace:
        lines += [
            "tokens/s    predicted (memory/predict.py), without the optimizer's step; -: it is not",
            "days        for 20 tokens a parameter at that speed",
        ]
    lines.append("with        flags of train.py, which cost:")
    for way, cost in WAYS[1:]:
        flags = " ".join(f"--{name}={value}" for name, value in way.items())
        if any(flags in row.flags for row in found):
            lines.append(f"            {flags:29} {cost}")
    if lines[-1].endswith(":"):
        lines[-1] = "with        flags of train.py"
    if not has_pace:
        lines.append("Tokens/s: with --gpu=4090, in 16 bits, on one GPU (several: memory.plan)")
    return lines


def main(argv: list[str]) -> str:
    if {"--help", "-h"} & {*argv}:
        choices = CHOICES | {"optim": own_classes(), "gpu": devices.NAMES}
        return f"{__doc__.partition('Neighbours:')[0]}{usage(DEFAULTS, choices, SAYS)}"
    return table(*parse(argv))


if __name__ == "__main__":
    from metrics.outlets import command

    command("estimate.py", lambda words: print(main(words)))
