"""Which layout for which cluster: the fastest ways to spread a model over GPUs, on paper.

    python -m memory.plan --params=13B --gpus=64 --gpu=H100          # the shape published as 13B
    python -m memory.plan --model=qwen3-32b --gpus=64 --gpu=H200 --tokens=1.5T
    python -m memory.plan --n_layer=126 --n_embd=16384 --n_head=128 --gpus=8192 --gpu=H100
    python -m memory.plan --params=7B --gpus=64 --memory=40GB --bandwidth=12.5e9 --batch=512
    python -m memory.plan --n_layer=16 --n_embd=1024 --n_expert=16 --gpus=8    # with experts
    python -m memory.plan runs                        # what the course texts claim
    python -m memory.estimate --largest --gpu=4090    # the other way round: what fits on a card

It tries all layouts that train.py would start (memory/layouts.py), leaves out those that do not
fit, and shows the fastest with a legend, and what to type. AdamW is the optimizer. How time and
memory are predicted, and how that compares with 34 published runs (MFU within 11 % where there are
no experts), is at the top of memory/predict.py. Not in it: the optimizer's step, latency,
stragglers, failures, data. What a GPU can do comes from metrics/devices.py.

Neighbours: memory/activations.py, memory/claims.py, memory/flags.py, memory/known.py,
memory/layouts.py, memory/predict.py, memory/ranks.py, memory/shapes.py, metrics/devices.py,
optim/adamw.py, optim/attributes.py, optim/muon.py, parallel/replicas.py, precision/amp.py

Example:
    from memory.plan import parse, table
    text = table(parse(["--params=1B", "--gpus=8", "--gpu=A100", "--top=3"]))
    print(text)
    assert "the published shape" in text and "torchrun" in text
"""

import dataclasses
import math
import textwrap

from memory import known
from memory.claims import runs
from memory.flags import check, from_text, usage, words
from memory.layouts import USABLE, flags, plans
from memory.predict import Cluster, Layout, Model, Plan, full_shapes
from memory.shapes import NORM_PARTS
from metrics import devices

FLAGS = known.FLAGS | dict(
    gpus=8,
    gpu="A100",
    gpus_per_node=None,
    memory=None,
    peak_flops=None,
    memory_bandwidth=None,
    node_bandwidth=None,
    bandwidth=None,
    batch=None,
    batch_tokens=None,
    tokens=None,
    precision="bf16",
    top=8,
    row=1,
)
SAYS = known.SAYS | dict(
    gpus="GPUs in all",
    gpu="which: sets the next six flags (metrics/devices.py)",
    gpus_per_node="GPUs of one machine",
    memory="bytes of one GPU, as 80GB",
    peak_flops="dense FLOP/s of one GPU, as 312T",
    memory_bandwidth="bytes/s between a GPU and its memory",
    node_bandwidth="bytes/s, one way, between GPUs of one machine",
    bandwidth="bytes/s, one way, of one GPU to other machines",
    batch="sequences of a step",
    batch_tokens="the same in tokens; none: 4 Mi (4.2e6)",
    tokens="tokens to train on, as 1.5T: how many days; none: 20 for each parameter",
    precision="mixed is the papers' 2 + 2 + 12 bytes a parameter, which train.py does not offer",
    top="how many rows",
    row="the row whose command is printed",
)
CHOICES = {"precision": ("bf16", "mixed"), "arch": tuple(NORM_PARTS)}
GPU_NAMES = {"gpu": devices.NAMES}
NO_NETWORK = 12.5e9 / 8  # bytes/s of a GPU where nobody says: 100 Gb/s for a machine of 8

# What each column is; the table shows those that its rows need.
LEGEND = {
    "#": "place in the order: by s/step; among equals the layout with fewer flags comes first, "
    "then the one with less memory",
    "s/step": "predicted seconds of a step, to three digits; the rows are sorted by it",
    "MFU": "share of the GPUs' peak that the model's FLOPs use (metrics/flops.py)",
    "idle": "share of the step in which pipeline stages wait for each other",
    "tp": "GPUs that split each matrix (--tp); +sp: the tokens between the matrices, too (--sp)",
    "cp": "GPUs that split each sequence (--cp)",
    "pp": "GPUs that split the layers (--pp)",
    "ep": "data-parallel GPUs that share out the experts (--ep)",
    "schedule": "order of the pipeline's work (python -m parallel.pipeline draws it); x2: model "
    "chunks on each GPU (--pp_schedule, --pp_chunks)",
    "data": "how all other GPUs share the batch (--data_parallel); kept: fsdp gathers weights once "
    "a step and keeps them (--reshard=false)",
    "again": "what backward computes again instead of keeping it (--activation_checkpoint)",
    "micro": "sequences in one forward of a GPU (--micro_batch_size)",
    "total": "GB (1e9 bytes) on the GPU that holds most; its five parts are in the second table",
    "weights": "GB of weights there",
    "grads": "GB of gradients there",
    "state": "GB of AdamW's state there",
    "activ": "GB of activations there, of all micro-batches in flight",
    "buffers": "GB of messages, gathered weights and temporary copies there",
    "inside": "GB that a GPU sends in a step to others of its own machine",
    "others": "GB that it sends in a step to other machines",
}
# Two tables of the same rows, each no wider than 100 characters: heading -> columns.
TABLES = (
    {
        "time": ("s/step", "MFU", "idle"),
        "layout": ("tp", "cp", "pp", "ep", "schedule", "data", "again", "micro"),
        "GB": ("total",),
    },
    {
        "GB on the fullest GPU": ("weights", "grads", "state", "activ", "buffers"),
        "GB sent": ("inside", "others"),
    },
)
# Columns that are left out where each row has this in them.
USUAL = dict.fromkeys(("tp", "cp", "pp", "ep"), "1") | dict.fromkeys(("inside", "others"), "0.0")
USUAL |= {"schedule": "-", "idle": "0.0%"}
# Column -> what it is in Plan.held.
HELD = {"total": "total", "weights": "parameters", "grads": "gradients", "state": "state"}
HELD |= {"activ": "activations", "buffers": "buffers"}
LEFT = {"schedule", "data", "again"}  # columns of words, which begin at the left


# ---- what is asked for ---------------------------------------------------------------------------
def parse(argv: list[str]) -> dict:
    """--name=value ... -> the settings. Raises ValueError."""
    found = dict(FLAGS)
    for name, text in words(argv):
        check("the name", name, FLAGS)
        if name == "model":
            known.shape_of(text)
            found[name] = text
        elif name == "gpu":
            found[name] = devices.typed(text)
        else:
            # Without a list of words any text passes here, and from_text judges it.
            check(name, text, CHOICES.get(name, (text,)))
            found[name] = text if name in CHOICES else from_text(name, text, None)
    if found["batch"] and found["batch_tokens"]:
        raise ValueError("--batch and --batch_tokens both say how large a step is; type one")
    known.check_experts(found)
    return found


def requested(s: dict) -> tuple[Model, Cluster, int, str]:
    """(model, cluster, sequences a step, whose shape it is). Raises ValueError."""
    shape, whose = known.asked(s)
    m = Model(**shape, experts=known.experts_of(s))
    tokens = s["batch_tokens"] or 2**22
    return m, cluster_of(s), s["batch"] or max(1, round(tokens / m.block_size)), whose


def cluster_of(s: dict) -> Cluster:
    """So many GPUs of a kind, but for what the flags say. Raises ValueError."""
    gpu = devices.DEVICES[devices.typed(s["gpu"])]
    per_node = s["gpus_per_node"] or gpu.per_node
    if s["gpus"] > per_node and s["gpus"] % per_node:
        whole = per_node * math.ceil(s["gpus"] / per_node)
        raise ValueError(
            f"gpus={s['gpus']} is not whole nodes of gpus_per_node={per_node}; type --gpus={whole},"
            f" or --gpus_per_node={math.gcd(s['gpus'], per_node)}"
        )
    peak = s["peak_flops"] or gpu.peaks.get("bf16", 0) * 1e12
    if not peak:
        raise ValueError(
            f"nobody publishes a {s['gpu']}'s bf16 peak, and none is made up here; type "
            "--peak_flops=100T, or what you measured"
        )
    return Cluster(
        gpus=s["gpus"],
        peak_flops=peak,
        memory=s["memory"] or gpu.memory * 1e9,
        memory_bandwidth=s["memory_bandwidth"] or gpu.bandwidth * 1e9,
        # A machine of one GPU has no links inside.
        node_bandwidth=s["node_bandwidth"] or (gpu.link or gpu.network) * 1e9,
        bandwidth=s["bandwidth"] or (gpu.network * 1e9 if gpu.network else NO_NETWORK),
        gpus_per_node=per_node,
    )


# ---- the answer ----------------------------------------------------------------------------------
def table(s: dict) -> str:
    """The best plans, what the columns are, and what to type. Raises ValueError."""
    m, c, batch, whose = requested(s)
    found = plans(m, c, batch, s["precision"])
    shown = found[: s["top"]]
    if s["row"] > len(shown):
        raise ValueError(f"row={s['row']} is not in the table, which has {len(shown)}")
    best = found[s["row"] - 1]
    n = f"{len(shown)} fastest" if len(shown) > 1 else "fastest"
    lines = [
        *heading(s, m, c, batch, whose),
        f"{len(found):,} layouts fit in {USABLE * c.memory / 1e9:.4g} GB, {USABLE} of a GPU's "
        f"memory. The {n}, by s/step:",
        "",
        *rows_with_heads([cells(plan, i) for i, plan in enumerate(shown, 1)]),
        "",
        trust(m),
        in_words(s, m, c, batch, best),
        "",
        *how_to_type(s, c),
        train_command(m, c, best.layout, batch, s["precision"]),
    ]
    if s["precision"] == "mixed":
        lines.append("(--precision=mixed is the papers' accounting; train.py has bf16)")
    return "\n".join(lines)


def trust(m: Model) -> str:
    """How far the table is to be believed: what is at the top of memory/predict.py."""
    if m.experts is not None:
        return (
            "Of the MFU of published runs with experts 0.41 to 0.86 was predicted, so days are "
            "too many,\nand rows may change places (memory/predict.py)."
        )
    return "Published runs were predicted within 11 %: rows that are closer may change places."


def heading(s: dict, m: Model, c: Cluster, batch: int, whose: str) -> list[str]:
    """The model, the cluster and the step, a line each."""
    active = f", {m.active / 1e9:.4g}e9 of them active" if m.experts else ""
    size = f"n_layer={m.n_layer} n_embd={m.n_embd} n_head={m.n_head} n_kv_head={m.n_kv_head}"
    gpus = f"{c.gpus} x {s['gpu']}" if c.gpus > 1 else f"one {s['gpu']}"
    cluster = f"{gpus}, each of {c.memory / 1e9:.4g} GB and {c.peak_flops / 1e12:.4g} TFLOP/s"
    if c.gpus > 1:
        cluster += f";\n         {c.node_bandwidth / 1e9:.4g} GB/s to GPUs of the same machine"
    if c.gpus > c.gpus_per_node:
        cluster += f" (it has {c.gpus_per_node}), {c.bandwidth / 1e9:.4g} GB/s to other machines"
        if c.bandwidth == NO_NETWORK:
            cluster += " (a guess: type --bandwidth=)"
    step = f"{batch} sequences of {m.block_size} tokens, {batch * m.block_size / 1e6:.3g}e6 in all"
    count = sum(math.prod(x) for _, x in full_shapes(m, m.experts).values())
    return [
        f"model    {whose}",
        f"         {count / 1e9:.4g}e9 parameters{active};",
        f"         {size} vocab_size={m.vocab_size} arch={m.arch}",
        f"cluster  {cluster}",
        f"step     {step} (--batch=, --block_size=); AdamW, {s['precision']}",
    ]


def cells(p: Plan, i: int) -> dict[str, str]:
    """Column -> what a row has there."""
    x = p.layout
    chunks = f" x{x.pp_chunks}" if x.pp_chunks > 1 else ""
    return {
        "#": str(i),
        "s/step": three_digits(p.step),
        "MFU": f"{p.mfu:.1%}",
        "idle": f"{p.idle:.1%}",
        "tp": f"{x.tp}+sp" if x.sp else f"{x.tp}",
        "cp": str(x.cp),
        "pp": str(x.pp),
        "ep": str(x.ep),
        "schedule": x.pp_schedule + chunks if x.pp > 1 else "-",
        "data": x.data_parallel if x.reshard else f"{x.data_parallel}, kept",
        "again": x.activation_checkpoint,
        "micro": str(x.micro_batch_size),
        **{column: f"{p.held[name] / 1e9:.2f}" for column, name in HELD.items()},
        "inside": f"{p.node_bytes / 1e9:.1f}",
        "others": f"{p.net_bytes / 1e9:.1f}",
    }


def three_digits(x: float) -> str:
    """1234.5 -> 1230, 12.34 -> 12.3, 0.1 -> 0.100"""
    places = 2 - math.floor(math.log10(x))
    return f"{round(x, places):.{max(0, places)}f}"


def rows_with_heads(rows: list[dict[str, str]]) -> list[str]:
    """Both tables of the rows, and below them what each column is."""
    columns = []
    for column in rows[0]:
        if any(row[column] != USUAL.get(column) for row in rows):
            columns.append(column)
    lines = []
    for groups in TABLES:
        lines += [*aligned(rows, groups, columns), ""]
    for c in columns:
        wrapped = textwrap.wrap(LEGEND[c], 86)
        lines += [f"{c:9} {wrapped[0]}", *(" " * 10 + more for more in wrapped[1:])]
    return lines


def aligned(rows: list[dict[str, str]], groups: dict, columns: list[str]) -> list[str]:
    """One table: groups of columns, those columns that are in `columns`, and the rows."""
    shown = {"": ["#"]}
    for group, names in groups.items():
        here = [c for c in names if c in columns]
        if here:
            shown[group] = here
    heads = {c: c for c in columns}
    width = {c: max(len(row[c]) for row in (heads, *rows)) for c in columns}
    # The heading of a group needs its place, too.
    for group, here in shown.items():
        size = sum(width[c] + 2 for c in here) - 2
        width[here[-1]] += max(0, len(group) - size)

    def line(texts: dict[str, str]) -> str:
        blocks = []
        for here in shown.values():
            fit = [
                texts[c].ljust(width[c]) if c in LEFT else texts[c].rjust(width[c]) for c in here
            ]
            blocks.append("  ".join(fit))
        return " | ".join(blocks).rstrip()

    sizes = [sum(width[c] + 2 for c in here) - 2 for here in shown.values()]
    first = " | ".join(group.ljust(size) for group, size in zip(shown, sizes))
    return [first.rstrip(), line(heads), *map(line, rows)]


def in_words(s: dict, m: Model, c: Cluster, batch: int, p: Plan) -> str:
    """How long a training takes with this plan."""
    tokens = s["tokens"] or 20 * m.parameters
    per_second = batch * m.block_size / p.step
    days = tokens / per_second / 86400
    steps = math.ceil(tokens / (batch * m.block_size))
    how = "--tokens=" if s["tokens"] else "20 a parameter; another: --tokens=1.5T"
    hours = f"{days * 24 * c.gpus:,.0f} GPU-hours (without the optimizer's step)"
    billions = float(f"{tokens / 1e9:.4g}")
    return (
        f"Row {s['row']} sees {per_second:,.0f} tokens a second. {billions:,g}e9 tokens "
        f"({how})\nare --steps={steps} and take {days:,.3g} days, {hours}."
    )


def how_to_type(s: dict, c: Cluster) -> list[str]:
    where = "on each machine (HOST is the first)" if c.gpus > c.gpus_per_node else "here"
    return [f"Row {s['row']} (another: --row=2), {where}; add --data=, --steps= and --lr=:"]


def train_command(m: Model, c: Cluster, x: Layout, batch: int, precision: str) -> str:
    """What to type on each node to train with this layout."""
    start = start_command(c.gpus, c.gpus_per_node)
    layout = flags(m, x, batch)
    return f"{start} train.py {model_flags(m)} --optim=adamw --precision={precision} {layout}"


def start_command(gpus: int, per_node: int) -> str:
    """What starts train.py on each node."""
    if gpus == 1:
        return "python"
    nodes = math.ceil(gpus / per_node)
    while gpus % nodes:
        nodes += 1
    start = f"torchrun --nnodes={nodes} --nproc_per_node={gpus // nodes}"
    return start if nodes == 1 else f"{start} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"


def model_flags(m: Model) -> str:
    """The model in train.py's command line."""
    shape = {name: getattr(m, name) for name in ("n_layer", "n_embd", "n_head", "n_kv_head")}
    usual = {field.name: field.default for field in dataclasses.fields(Model)}
    for name in ("arch", "head_dim", "mlp_width", "tied", "qkv_bias"):
        if getattr(m, name) != usual[name]:
            shape[name] = str(getattr(m, name)).lower()
    if m.experts is not None:
        of_experts = {name: getattr(m.experts, name) for name in ("n_expert", *known.OF_EXPERTS)}
        shape |= {name: value for name, value in of_experts.items() if value != FLAGS[name]}
    shape["vocab_size"] = m.vocab_size
    return " ".join(f"--{name}={value}" for name, value in shape.items())


def main(argv: list[str]) -> str:
    if {"--help", "-h"} & {*argv}:
        return f"{__doc__.partition('Neighbours:')[0]}{usage(FLAGS, CHOICES | GPU_NAMES, SAYS)}"
    return runs() if argv == ["runs"] else table(parse(argv))


if __name__ == "__main__":
    from metrics.outlets import command

    command("plan.py", lambda words: print(main(words)))
