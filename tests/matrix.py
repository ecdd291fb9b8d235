"""Any optimizer on any layout is the same run: the matrix, printed.

    python tests/matrix.py       float64, ten steps: each cell's largest relative difference from
                                 one process over loss, gradient norm and validation loss
    python tests/matrix.py --precision=fp32
    python tests/matrix.py --part=dense      without a mixture of experts
    python tests/matrix.py --part=experts    with one, and six of the optimizers

The runs are train.py's own, on forked processes with gloo, with micro-batches, dropout and
clipping. What a method itself magnifies without bound is run where it does not: SOAP and KL-SOAP
with eps 1e-2 and lr 1e-3, SOAP-Muon with eps 1e-4 and lr 1e-3, Shampoo with eps 1e-4 (the first
three as they are: tests/test_matrix.py, in lock step).
"""

import contextlib
import functools
import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules under test

import torch

torch.set_num_threads(1)  # a forked child hangs in OpenMP if its parent ever used more

import torch._dynamo  # noqa: E402, F401  (once here, not in every forked rank)
import torch.distributed.fsdp  # noqa: E402, F401
import torch.distributed.tensor  # noqa: E402, F401
from harness import run_ranks  # noqa: E402

import train  # noqa: E402
from metrics import logger  # noqa: E402
from settings import parse  # noqa: E402

OPTIMIZERS = {  # what train.py gets for each
    "SGD": ["--optim=sgd", "--opt.momentum=0.9"],
    "AdamW": ["--optim=adamw"],
    "AdamL2": ["--optim=adam_l2", "--weight_decay=0.01"],
    "AdEMAMix": [
        "--optim=ademamix",
        "--opt.alpha=8",
        "--opt.alpha_warmup=10",
        "--opt.beta3_warmup=10",
    ],
    "Adafactor": ["--optim=adafactor"],
    "Lion": ["--optim=lion"],
    "LARS": ["--optim=lars"],
    "LAMB": ["--optim=lamb"],
    "MARS": ["--optim=mars"],
    "Shampoo": ["--optim=shampoo", "--opt.eps=1e-4", "--opt.precondition_frequency=3"],
    "SOAP": ["--optim=soap", "--opt.eps=1e-2", "--lr=1e-3"],
    "KL-SOAP": ["--optim=kl_soap", "--opt.eps=1e-2", "--lr=1e-3"],
    "SOAP-Muon": [
        "--optim=soap_muon",
        "--opt.eps=1e-4",
        "--lr=1e-3",
        "--opt.precondition_frequency=2",
    ],
    "Muon": ["--optim=muon"],
    "Muown": ["--optim=muown"],
    "Dion 3": ["--optim=dion"],
    "PMuon": ["--optim=pmuon"],
    "AdamW Schedule-Free": ["--optim=schedule_free"],
    "SGD Schedule-Free": ["--optim=schedule_free.SGDScheduleFree"],
}
# The allowed relative difference from one process, where it is not 1e-10.
TOLERANCES = {"SOAP": 1e-4, "KL-SOAP": 1e-4, "SOAP-Muon": 1e-3}
LAYOUTS = {  # name: ranks, flags
    "4 micro-batches": (1, ["--micro_batch_size=2"]),
    "ddp 2": (2, []),
    "ddp 4": (4, ["--micro_batch_size=1"]),
    "zero1 2": (2, ["--data_parallel=zero1"]),
    "zero1 4": (4, ["--data_parallel=zero1", "--micro_batch_size=1"]),
    "zero2 4": (4, ["--data_parallel=zero2", "--micro_batch_size=1"]),
    "zero3 2": (2, ["--data_parallel=zero3", "--micro_batch_size=2"]),
    "zero3 4": (4, ["--data_parallel=zero3"]),
    "fsdp 2": (2, ["--data_parallel=fsdp", "--micro_batch_size=2"]),
    "fsdp 4": (4, ["--data_parallel=fsdp"]),
    "hybrid 2x2": (4, ["--data_parallel=fsdp", "--fsdp_shard=2"]),
    "fsdp, no reshard": (2, ["--data_parallel=fsdp", "--reshard=false", "--micro_batch_size=2"]),
}
MODEL_PARALLEL = {
    "tp 2": (2, ["--tp=2"]),
    "tp 4": (4, ["--tp=4"]),
    "tp 2 + sp": (2, ["--tp=2", "--sp=true"]),
    "tp 4 + sp": (4, ["--tp=4", "--sp=true"]),
    "cp 2": (2, ["--cp=2"]),
    "cp 4": (4, ["--cp=4"]),
    "cp 2 ulysses": (2, ["--cp=2", "--cp_attention=ulysses"]),
    "cp 4 ulysses": (4, ["--cp=4", "--cp_attention=ulysses"]),
    **{
        f"pp {p} {s}": (p, [f"--pp={p}", f"--pp_schedule={s}"])
        for p in (2, 4)
        for s in ("naive", "gpipe", "1f1b", "interleaved", "zerobubble")
    },
    "dp 2 x tp 2": (4, ["--tp=2"]),
    "dp 2 x cp 2": (4, ["--cp=2"]),
    "dp 2 x pp 2": (4, ["--pp=2"]),
    "pp 2 x tp 2": (4, ["--pp=2", "--tp=2"]),
    "zero1 2 x tp 2": (4, ["--data_parallel=zero1", "--tp=2"]),
    "zero1 2 x pp 2": (4, ["--data_parallel=zero1", "--pp=2"]),
    "zero1 2 x pp 2 interleaved": (
        4,
        ["--data_parallel=zero1", "--pp=2", "--pp_schedule=interleaved"],
    ),
    "zero1 2 x pp 2 zerobubble": (
        4,
        ["--data_parallel=zero1", "--pp=2", "--pp_schedule=zerobubble"],
    ),
    "zero1 2 x cp 2": (4, ["--data_parallel=zero1", "--cp=2"]),
    "fsdp 2 x tp 2": (4, ["--data_parallel=fsdp", "--tp=2"]),
    "fsdp 2 x pp 2": (4, ["--data_parallel=fsdp", "--pp=2", "--pp_schedule=interleaved"]),
    "dp 2 x pp 2 x tp 2": (8, ["--pp=2", "--tp=2"]),
    "zero1 2 x cp 2 x tp 2 + sp": (8, ["--data_parallel=zero1", "--cp=2", "--tp=2", "--sp=true"]),
    "fsdp 2 x cp 2 x tp 2 + sp": (8, ["--data_parallel=fsdp", "--cp=2", "--tp=2", "--sp=true"]),
    "pp 2 x cp 2 x tp 2": (8, ["--pp=2", "--cp=2", "--tp=2"]),
    "pp 2 x fsdp 2 x tp 2": (8, ["--pp=2", "--data_parallel=fsdp", "--tp=2"]),
    "pp 2 x fsdp 2 x tp 2 + sp": (8, ["--pp=2", "--data_parallel=fsdp", "--tp=2", "--sp=true"]),
}
# With experts
EXPERTS = ["--n_expert=4", "--router_z_loss=0.01", "--moe_bias_lr=0.01"]
SIX = ("SGD", "AdamW", "Muon", "SOAP", "Shampoo", "Lion")
RECOMPUTED = {
    how: (1, ["--micro_batch_size=4", f"--activation_checkpoint={how}"])
    for how in ("full", "selective", "mlp", "segments_2", "offload", "full_offload")
} | {"zero3 2, full": (2, ["--data_parallel=zero3", "--activation_checkpoint=full"])}
EXPERT_PARALLEL = {
    "ep 2": (2, []),
    "ep 4": (4, ["--ep=4"]),
    "ep 2 x dp 2": (4, ["--micro_batch_size=1"]),
    "ep 2, full": (2, ["--activation_checkpoint=full", "--micro_batch_size=2"]),
    "ep 2, selective": (2, ["--activation_checkpoint=selective"]),
    "ep 2 x tp 2": (4, ["--tp=2"]),
    "ep 2 x tp 2 + sp": (4, ["--tp=2", "--sp=true"]),
    "ep 2 x cp 2": (4, ["--cp=2"]),
    "ep 2 x cp 2 ulysses": (4, ["--cp=2", "--cp_attention=ulysses"]),
    **{
        f"ep 2 x pp 2 {schedule}": (4, ["--pp=2", f"--pp_schedule={schedule}"])
        for schedule in ("naive", "gpipe", "1f1b", "interleaved", "zerobubble")
    },
    "zero1 x ep 2": (2, ["--data_parallel=zero1"]),
    "zero1 x ep 2 x dp 2": (4, ["--data_parallel=zero1", "--micro_batch_size=1"]),
    "zero1 x ep 2 x tp 2": (4, ["--data_parallel=zero1", "--tp=2"]),
    "zero1 x ep 2 x pp 2": (4, ["--data_parallel=zero1", "--pp=2"]),
    "fsdp x ep 2": (2, ["--data_parallel=fsdp"]),
    "fsdp x ep 2 x dp 2": (4, ["--data_parallel=fsdp", "--micro_batch_size=1"]),
    "fsdp x ep 2, full": (4, ["--data_parallel=fsdp", "--activation_checkpoint=full"]),
    "fsdp x ep 2 x tp 2": (4, ["--data_parallel=fsdp", "--tp=2"]),
    "fsdp x ep 2 x cp 2": (4, ["--data_parallel=fsdp", "--cp=2"]),
    "fsdp x ep 2 x pp 2": (4, ["--data_parallel=fsdp", "--pp=2"]),
    "ep 2 x tp 2 x pp 2": (8, ["--tp=2", "--pp=2"]),
}
EXPERT_PARALLEL = {name: (n, ["--ep=2", *words]) for name, (n, words) in EXPERT_PARALLEL.items()}
CUT_UP = MODEL_PARALLEL | EXPERT_PARALLEL
# To be cut up
LARGER = ["--n_layer=8", "--n_head=4", "--block_size=16", "--steps=6", "--eval_every=3"]
TINY = [
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=8",
    "--batch_size=8",
    "--steps=10",
    "--eval_every=5",
    "--eval_tokens=200",
    "--sample_tokens=0",
    "--plot=false",
    "--save_every=0",
    "--device=cpu",
    "--dropout=0.1",
    "--vocab_size=256",
]


def text(folder) -> Path:
    """Something to learn, the same wherever and whenever this runs."""
    path = Path(folder) / "squares.txt"
    path.write_text(" ".join(str(i * i) for i in range(3000)))
    return path


def trace(out_dir) -> list[float]:
    """Everything a run of the matrix is compared by, in order."""
    found = []
    for row in logger.read_metrics(Path(out_dir) / "metrics.jsonl"):
        found += [row[name] for name in ("loss", "grad_norm", "val_loss") if name in row]
    return found


def runs(
    rank: int, world: int, folder: str, precision: str, optimizers: list[str], flags: list[str]
):
    for name in optimizers:
        more = (
            ["--opt.ns_dtype=float32"] if name in ("Muon", "Dion 3") and precision == "fp32" else []
        )
        argv = [
            f"--data={folder}/squares.txt",
            f"--out_dir={folder}/{name}",
            *TINY,
            f"--precision={precision}",
            *OPTIMIZERS[name],
            *more,
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(parse.parse([*argv, *flags]))


def column(
    layout: str, precision: str, optimizers: list[str], *more: str
) -> dict[str, list[float]]:
    """The trace of every optimizer on one layout. The oracles: "one process", for what cuts the
    model up "one larger process"."""
    world, flags = (LAYOUTS | RECOMPUTED | CUT_UP).get(layout, (1, []))
    larger = LARGER if layout in CUT_UP or layout == "one larger process" else []
    flags = [*larger, "--data_parallel=ddp", *flags, *more]
    with tempfile.TemporaryDirectory() as folder:
        text(folder)
        if world == 1:
            runs(0, 1, folder, precision, optimizers, flags)
        else:
            run_ranks(world, runs, folder, precision, optimizers, flags)
        return {name: trace(f"{folder}/{name}") for name in optimizers}


def difference(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) >= 15, "a run is shorter than the other"
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


@functools.cache
def sgd(layout: str, *flags: str) -> list[float]:
    return column(layout, "fp64", ["SGD"], *flags)["SGD"]


def assert_one_process(layout: str, *flags: str) -> None:
    """With these flags the layout is one process, whose run they change."""
    one = "one process" if layout in LAYOUTS else "one larger process"
    assert sgd(one, *flags) != sgd(one), "the flags do nothing, so this proves nothing"
    assert difference(sgd(layout, *flags), sgd(one, *flags)) < 1e-10


def table(layouts, alone: str, precision: str, optimizers: list[str], *more: str) -> None:
    oracle = column(alone, precision, optimizers, *more)
    print("\n| " + " | ".join(["", *optimizers]) + " |\n" + "|---" * (len(optimizers) + 1) + "|")
    for layout in layouts:
        found = column(layout, precision, optimizers, *more)
        cells = [f"{difference(found[name], oracle[name]):.0e}" for name in optimizers]
        print("| " + " | ".join([layout, *cells]) + " |", flush=True)


def main(argv: list[str]) -> None:
    given = {"--precision": "fp64", "--part": "all"} | dict(word.split("=") for word in argv)
    precision = given["--precision"]
    if given["--part"] in ("all", "dense"):
        table(LAYOUTS, "one process", precision, list(OPTIMIZERS))
        table(MODEL_PARALLEL, "one larger process", precision, list(OPTIMIZERS))
    if given["--part"] in ("all", "experts"):
        table(LAYOUTS | RECOMPUTED, "one process", precision, list(SIX), *EXPERTS)
        for layouts in (MODEL_PARALLEL, EXPERT_PARALLEL):
            table(layouts, "one larger process", precision, list(SIX), *EXPERTS)


if __name__ == "__main__":
    main(sys.argv[1:])
