"""GPT-2 124M at 1024 tokens in bfloat16: speed, MFU, memory, and nanoGPT beside it.

A run is configs/gpt2_124m.toml on random ids, 60 sequences a step, in this process. tokens/s, MFU
and ms are of the median step, the first third left out. Peak: what torch's allocator gave out.
memory/ranks.py predicts that of a run that is not compiled: there is the ratio.

nanoGPT's own train.py has the same shape, precision, optimizer, ids and 60 sequences a step, in
micro-batches of 12, its default; so has the row "ours, 12 at a time". Micro-batches of another size
come last, as they are compiled anew.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import median

from benchmarks import nanogpt, runs
from benchmarks.stages import common
from benchmarks.stages.common import Plan
from memory.activations import activation_bytes
from memory.ranks import bytes_per_rank
from memory.shapes import gpt_shapes

COVERS = ()
TABLE = "GPT-2 124M, bf16."
N_SEQUENCES = 60
SECONDS = 90  # for nanoGPT, which compiles two graphs of the whole model
LOSS_CHUNK = 4096  # tokens: what a run on a GPU chooses for so many words
USUAL = (
    "--eval_every=0 --save_every=0 --sample_tokens=0 --plot=false --log_every=1 --resume=never"
    " --precision=bf16 --warmup_steps=10"
).split()


def run(plan: Plan) -> None:
    size = common.SIZES["tiny" if plan.rehearse else "124M"]
    batch, micro = (4, 2) if plan.rehearse else (N_SEQUENCES, 12)
    steps = 4 if plan.rehearse else 20
    ids = plan.folder / "ids"
    common.write_ids(ids, size["vocab_size"], 4 * batch * size["block_size"] * steps)
    usual = words(plan, size, ids, batch, steps)
    mode = "--compile=off" if plan.rehearse else "--compile=default"
    fixed = f"--micro_batch_size={micro}"
    speed = None
    mine = ours(plan, f"ours, {micro} at a time", [*usual, mode, fixed], size, batch)
    with common.failing_is_a_row(plan, TABLE, what="nanoGPT"):
        speed = theirs(plan, ids, size, batch, micro, steps)
    beside(plan, f"ours, {micro} at a time", mine, speed)
    few = [*usual, "--compile=off", fixed, f"--steps={min(steps, 6)}"]
    ours(plan, f"ours, {micro} at a time, not compiled", few, size, batch, is_predicted=True)
    mine = ours(plan, "ours, micro-batch found by itself", [*usual, mode], size, batch)
    beside(plan, "ours, micro-batch found by itself", mine, speed)


def words(plan: Plan, size: dict, ids: Path, batch: int, steps: int) -> list[str]:
    """train.py's command line for this size on these ids."""
    return [
        str(runs.ROOT / "configs" / "gpt2_124m.toml"),
        *USUAL,
        *common.fields(size),
        f"--data={ids}",
        "--tokenizer=ids",
        f"--device={plan.device.type}",
        f"--batch_size={batch}",
        f"--steps={steps}",
    ]


def ours(
    plan: Plan, name: str, words: list[str], size: dict, batch: int, is_predicted: bool = False
) -> float | None:
    """A row for one run; returns its tokens/s, None where it failed."""
    with common.failing_is_a_row(plan, TABLE, what=name):
        folder = plan.folder / name.replace(" ", "-").replace(",", "")
        rows = common.train(words, folder)
        middle = runs.middle(rows)
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        micro = (config | config["chosen"])["micro_batch_size"]  # chosen: nobody gave it
        predicted = predict(size, micro, batch // micro)
        peak = middle["peak_bytes"]
        plan.emit(
            TABLE,
            what=name,
            micro=micro,
            tokens_per_s=round(middle["tokens_per_s"]),
            ms=1000 * middle["step_s"],
            MFU=middle["mfu"],
            peak_GB=peak / 1e9,
            estimate_GB=predicted / 1e9,
            estimate_by_peak=predicted / peak if is_predicted else None,
            loss=rows[-1]["loss"],
        )
        return middle["tokens_per_s"]


def beside(plan: Plan, name: str, mine: float | None, theirs: float | None) -> None:
    if mine is not None and theirs is not None:
        plan.emit("Tokens/s over nanoGPT's.", what=name, ratio=mine / theirs)


def predict(size: dict, micro: int, micro_batches: int) -> float:
    """Bytes by memory/ranks.py."""
    shapes = gpt_shapes(
        size["n_layer"],
        size["n_embd"],
        size["vocab_size"],
        size["block_size"],
        "gpt2",
        size["n_head"],
    )
    count = functools.partial(
        activation_bytes,
        "bf16",
        micro * size["block_size"],
        size["n_layer"],
        size["n_embd"],
        size["vocab_size"],
        "gpt2",
        loss_chunk=LOSS_CHUNK,
    )
    activations = count()
    return bytes_per_rank(
        shapes,
        "adamw",
        precision="bf16",
        micro_batches=micro_batches,
        activations=activations,
        inside=activations - count(in_backward=False),
        logits=micro * size["block_size"] * size["vocab_size"],
        loss_chunk=LOSS_CHUNK,
    )["total"]


# ---- nanoGPT -------------------------------------------------------------------------------------
def theirs(plan: Plan, ids: Path, size: dict, batch: int, micro: int, steps: int) -> float | None:
    """A row for nanoGPT's own train.py; returns its tokens/s, None without a clone."""
    if plan.nanogpt is None:
        plan.emit(TABLE, what="nanoGPT", note="left out: type --nanogpt= and a clone's folder")
        return None
    folder = plan.folder / "nanogpt"
    copy_clone(plan.nanogpt, folder, ids, size["vocab_size"])
    log = folder / "log"
    # What it has said is kept, should it take too long.
    with open(log, "w", encoding="utf-8") as file:
        try:
            subprocess.run(
                [sys.executable, "train.py", *their_words(plan, size, batch, micro, steps)],
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            print(f"nanoGPT was stopped after {SECONDS} s", flush=True)
    said = log.read_text(encoding="utf-8", errors="replace")
    print(said, flush=True)
    times = [float(ms) for ms in re.findall(r"iter \d+: loss \S+, time ([\d.]+)ms", said)]
    if not times:
        raise RuntimeError(f"nanoGPT: {runs.reason(said) or 'no step'}")
    ms = median(times[len(times) // 3 :])
    tokens_per_s = 1000 * batch * size["block_size"] / ms
    plan.emit(
        TABLE,
        what=f"nanoGPT, {micro} at a time",
        micro=micro,
        tokens_per_s=round(tokens_per_s),
        ms=ms,
        note=f"{len(times)} steps",
    )
    return tokens_per_s


def copy_clone(clone: Path, folder: Path, ids: Path, vocab_size: int) -> None:
    """nanoGPT's files, and the ids where its train.py looks for them."""
    for name in nanogpt.FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clone / name, folder / name)
    shutil.copytree(ids, folder / "data" / "ids")
    # What its prepare.py leaves: {"vocab_size": n} as a pickle, in the protocol of text.
    meta = f"(dVvocab_size\nI{vocab_size}\ns."
    (folder / "data" / "ids" / "meta.pkl").write_bytes(meta.encode())


def their_words(plan: Plan, size: dict, batch: int, micro: int, steps: int) -> list[str]:
    """nanoGPT's command line for what `words` says in ours."""
    names = ("n_layer", "n_head", "n_embd", "block_size")
    return [
        *(f"--{name}={size[name]}" for name in names),
        f"--batch_size={micro}",
        f"--gradient_accumulation_steps={batch // micro}",
        f"--max_iters={steps}",
        f"--device={plan.device.type}",
        f"--compile={not plan.rehearse}",
        "--dataset=ids",
        "--dtype=bfloat16",
        "--bias=False",
        "--dropout=0.0",
        "--log_interval=1",
        "--eval_iters=1",
        "--eval_interval=100000",
        "--always_save_checkpoint=False",
        "--out_dir=run",
    ]
