"""Claim: gradients of K small micro-batches added up give the update of one batch K times as large,
in half precision too, and with no_sync their sum is sent once instead of K times.

Source: the first lesson, section 5 (no_sync; "accuracy: no effect"); the third; the fifth,
section 4.

Protocol: 2 layers of width 64, 8 sequences of 64 tokens a step, in K = 1, 2, 4, 8 micro-batches, in
fp32, bf16 and fp16. `update`: one step of SGD; ‖u(K) - u(1)‖ / ‖u(1)‖ for the weights' change u,
and how far u(K) is from that of fp64. `train`: 100 steps of Muon from the same start, 3 seeds; the
final validation loss against K = 1's with the same seed. `sent`: bytes that one of two ranks sends
in a step of 16 sequences: ours, and torch's DistributedDataParallel on the same model with and
without no_sync, its all-reduces caught on their way.

Expected: fp32 updates equal to 1e-5; in half precision the products' rounding differs, so not
equal, but no further from fp64's than one batch's update is (at most 1.1 times); validation losses
within 0.3 %. Bytes do not depend on K; without no_sync they are K times as many. The loss has to be
divided by the tokens of the whole batch: the lessons' mean of K means is the same only if
micro-batches are equal, as they are here.

    python -m experiments.accumulation [--quick] [--out=DIR] [--jobs=N]
"""

import contextlib
import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from checkpoint import load
from experiments import protocol
from experiments.findings import (
    INK,
    below,
    dots,
    groups,
    judged,
    line,
    markdown,
    mean_sd,
    paired,
    pick,
    plus_minus,
)
from experiments.parallel_layouts import Wire
from model import GPT, GPTConfig, initial_weight

SIZE = dict(n_layer=2, n_embd=64, block_size=64)
PRECISIONS, COUNTS, SEEDS = ("fp32", "bf16", "fp16"), (1, 2, 4, 8), (1, 2, 3)
SAME, FURTHER, WITHIN = 1e-5, 1.1, 0.003


def grid(
    precisions: tuple[str, ...], counts: tuple[int, ...], seeds: tuple[int, ...]
) -> list[dict]:
    cases = [("update", p, k, s) for p in precisions for k in counts for s in seeds[:1]]
    cases += [("sent", "fp32", k, seeds[0]) for k in counts]
    cases += [("train", p, k, s) for p in precisions for s in seeds for k in counts]
    return [dict(zip(("part", "precision", "micro_batches", "seed"), case)) for case in cases]


GRID, QUICK = grid(PRECISIONS, COUNTS, SEEDS), grid(("fp32", "bf16"), (1, 4), (1,))


# ---- rows ----------------------------------------------------------------------------------------
def row(keys: dict, quick: bool) -> dict:
    torch.set_num_threads(1)  # with so little to do two wait for each other
    precision, k, seed = keys["precision"], keys["micro_batches"], keys["seed"]
    usual = SIZE | dict(seed=seed, batch_size=8, micro_batch_size=8 // k, precision=precision)
    if keys["part"] == "sent":
        return sent(k)
    if keys["part"] == "train":
        rows = protocol.train_run(
            **usual, steps=4 if quick else 100, eval_tokens=4096 if quick else 32768
        )
        return {
            "val_loss": protocol.curve(rows, "val_loss")[-1],
            "losses": protocol.curve(rows)[::2],
        }
    whole = update(**usual | dict(micro_batch_size=8))
    mine, true = update(**usual), update(**usual | dict(precision="fp64", micro_batch_size=8))
    return {"gap": apart(mine, whole), "error": apart(mine, true), "error_1": apart(whole, true)}


def apart(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


def update(**fields) -> torch.Tensor:
    """What one step of SGD adds to the weights, as one vector."""
    scale = {"scaler.fixed": 1024.0} if fields["precision"] == "fp16" else {}
    with tempfile.TemporaryDirectory() as folder:
        plain = dict(optim="sgd", lr=1.0, weight_decay=0.0, grad_clip="none", schedule="constant")
        protocol.train_run(
            out_dir=f"{folder}/run",
            steps=1,
            warmup_frac=0.0,
            zero_init=False,
            eval_every=0,
            **plain,
            **fields,
            **scale,
        )
        after = load.resolve(f"{folder}/run").weights("model")
        shape = GPTConfig(**SIZE, zero_init=False, seed=fields["seed"])
        with torch.device("meta"):
            named = {name: tuple(p.shape) for name, p in GPT(shape).named_parameters()}
        return torch.cat(
            [
                (after(n, s).double() - initial_weight(shape, n, s).double()).flatten()
                for n, s in named.items()
            ]
        )


def sent(k: int) -> dict:
    """Bytes of one rank's step by three ways: ours, torch's, torch's without no_sync."""
    rows = protocol.train_run(
        2,
        **SIZE,
        steps=1,
        batch_size=16,
        micro_batch_size=8 // k,
        precision="fp32",
        optim="adamw",
        eval_every=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(torchs, (k, folder), 2, start_method=protocol.START)
        return {"ours": protocol.curve(rows, "sent_bytes")[-1]} | json.loads(
            Path(folder, "sent").read_text()
        )


def torchs(rank: int, k: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    model = GPT(GPTConfig(**SIZE, zero_init=False))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_weight(model.config, name, tuple(p.shape)))
    found, ids = {}, torch.arange(64).expand(8 // k, 64)
    for name, quiet in (("torch", True), ("torch without", False)):
        replica = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second step: the first one also arranges buckets
            with Wire() as wire:
                for i in range(k):
                    wait = quiet and i + 1 < k
                    with replica.no_sync() if wait else contextlib.nullcontext():
                        (replica(ids, ids) / (ids.numel() * k)).backward()
            found[name] = wire.sent
            replica.zero_grad()
    if rank == 0:
        Path(folder, "sent").write_text(json.dumps(found))
    dist.barrier()
    protocol.os._exit(0)


# ---- findings ------------------------------------------------------------------------------------
def gaps(rows: list[dict], precision: str) -> dict[int, list[float]]:
    """{K: validation loss against K = 1's, seed by seed}."""
    mine = groups(pick(rows, part="train", precision=precision), "micro_batches")
    return {k: paired(found, mine[1,], "val_loss") for (k,), found in mine.items() if k > 1}


def parts(rows: list[dict]) -> dict[str, bool]:
    updates, found = pick(rows, part="update"), {}
    off = max(r["gap"] for r in pick(updates, precision="fp32"))
    found[f"in fp32 updates differ by {off:.0e} at most (claimed: {SAME:g})"] = off <= SAME
    half = [r for r in updates if r["precision"] != "fp32"]
    ratio = max(r["error"] / r["error_1"] for r in half)
    found[
        f"in half precision an accumulated update is at most {ratio:.2f} times as far from fp64's"
        f" as one batch's ({FURTHER:g})"
    ] = ratio <= FURTHER
    for (precision,), _ in groups(pick(rows, part="train"), "precision").items():
        worst = max(
            (mean_sd(x)[0] for x in gaps(rows, precision).values()), key=lambda x: (x != x, abs(x))
        )
        found[f"{precision} ends within {abs(worst):.2%} of one batch's loss (0.3 %)"] = (
            abs(worst) <= WITHIN
        )
    wire = pick(rows, part="sent")
    # Ours sends a byte for each parameter beside, the roll call of missing gradients.
    once = all(abs(r[way] / wire[0]["torch"] - 1) < 1e-3 for r in wire for way in ("ours", "torch"))
    more = max(r["torch without"] / r["torch"] / r["micro_batches"] for r in wire)
    text = (
        f"bytes are the same for each K, and without no_sync {more:.2f} K times as many (K times)"
    )
    found[text] = once and all(r["torch without"] == r["micro_batches"] * r["torch"] for r in wire)
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    return judged(parts(rows))


def table(rows: list[dict]) -> str:
    lines = []
    for (precision, k), [r] in groups(
        pick(rows, part="update"), "precision", "micro_batches"
    ).items():
        losses = [
            x["val_loss"] for x in pick(rows, part="train", precision=precision, micro_batches=k)
        ]
        against = plus_minus(gaps(rows, precision)[k], "+.2%") if k > 1 else "-"
        lines.append(
            [precision, k, f"{r['gap']:.1e}", f"{r['error']:.1e}", plus_minus(losses), against]
        )
    wire = [
        [r["micro_batches"], *(f"{r[way]:,.0f}" for way in ("ours", "torch", "torch without"))]
        for r in pick(rows, part="sent")
    ]
    return "\n\n".join(
        [
            "\n".join(
                f"- {text}: {'yes' if held else '**no**'}" for text, held in parts(rows).items()
            ),
            markdown(
                [
                    "precision",
                    "K",
                    "update against K = 1",
                    "against fp64's",
                    "validation loss",
                    "against K = 1",
                ],
                lines,
            ),
            markdown(
                ["K", "bytes a rank sends in a step, ours", "torch's, with no_sync", "without"],
                wire,
            ),
        ]
    )


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(12.5, 5)
    updates, losses, wire = figure.subplots(1, 3)
    for ((precision,), mine), color in zip(
        groups(pick(rows, part="update"), "precision").items(), INK
    ):
        line(
            updates,
            {r["micro_batches"]: [r["gap"]] for r in mine if r["gap"]},
            precision,
            color=color,
            marker="o",
        )
        line(
            updates,
            {r["micro_batches"]: [r["error"]] for r in mine},
            f"{precision}, from fp64's",
            color=color,
            ls=":",
        )
    updates.axhline(SAME, color=INK[5], lw=1, label="claimed for fp32: below")
    updates.set(
        xscale="log",
        yscale="log",
        title="One step's update against K = 1's",
        xlabel="micro-batches K",
        ylabel="relative difference",
    )
    updates.set_xticks(COUNTS, COUNTS)
    updates.minorticks_off()
    below(updates, ncols=2)
    losses.axvspan(-100 * WITHIN, 100 * WITHIN, color=INK[2], alpha=0.15, lw=0)
    names = [p for (p,) in groups(pick(rows, part="train"), "precision")]
    dots(
        losses,
        {
            f"{p}, K = {k}": [100 * x for x in found]
            for p in names
            for k, found in gaps(rows, p).items()
        },
    )
    losses.set(
        title="Trained so (green: within 0.3 %)", xlabel="validation loss against K = 1's, %"
    )
    found = pick(rows, part="sent")
    for way, name, style in (
        ("torch without", "torch without no_sync", "o-"),
        ("torch", "torch with no_sync", "s-"),
        ("ours", "ours", "x"),
    ):
        wire.plot(
            [r["micro_batches"] for r in found],
            [r[way] / 2**20 for r in found],
            style,
            label=name,
            color=INK[("torch without", "torch", "ours").index(way)],
            ms=7,
        )
    wire.set(
        title="MiB that a rank of two sends in a step", xlabel="micro-batches K", ylim=(0, None)
    )
    wire.set_xticks(COUNTS, COUNTS)
    wire.grid(alpha=0.25)
    below(wire, ncols=3)


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
