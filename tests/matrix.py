"""Any optimizer on any layout is the same run: the matrix, printed.

    python tests/matrix.py       float64, ten steps: each cell's largest relative difference from
                                 one process over loss, gradient norm and validation loss
    python tests/matrix.py --precision=fp32

The runs are train.py's own, on forked processes with gloo, with micro-batches, dropout and
clipping. What a method itself magnifies without bound is run where it does not: SOAP with eps 1e-2
and lr 1e-3, Shampoo with eps 1e-4 (SOAP as it is: tests/test_matrix.py, in lock step).
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
    "Adafactor": ["--optim=adafactor"],
    "Lion": ["--optim=lion"],
    "LARS": ["--optim=lars"],
    "LAMB": ["--optim=lamb"],
    "Shampoo": ["--optim=shampoo", "--opt.eps=1e-4", "--opt.precondition_frequency=3"],
    "SOAP": ["--optim=soap", "--opt.eps=1e-2", "--lr=1e-3"],
    "Muon": ["--optim=muon"],
    "Muown": ["--optim=muown"],
    "PMuon": ["--optim=pmuon"],
    "AdamW Schedule-Free": ["--optim=schedule_free"],
    "SGD Schedule-Free": ["--optim=schedule_free.SGDScheduleFree"],
}
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
        more = ["--opt.ns_dtype=float32"] if name == "Muon" and precision == "fp32" else []
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
    world, flags = LAYOUTS.get(layout) or MODEL_PARALLEL.get(layout, (1, []))
    larger = LARGER if layout in MODEL_PARALLEL or layout == "one larger process" else []
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


def main(argv: list[str]) -> None:
    precision = dict(word.split("=") for word in argv).get("--precision", "fp64")
    for layouts, alone in ((LAYOUTS, "one process"), (MODEL_PARALLEL, "one larger process")):
        oracle = column(alone, precision, list(OPTIMIZERS))
        print(
            "\n| " + " | ".join(["", *OPTIMIZERS]) + " |\n" + "|---" * (len(OPTIMIZERS) + 1) + "|"
        )
        for layout in layouts:
            found = column(layout, precision, list(OPTIMIZERS))
            cells = [f"{difference(found[name], oracle[name]):.0e}" for name in OPTIMIZERS]
            print("| " + " | ".join([layout, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
