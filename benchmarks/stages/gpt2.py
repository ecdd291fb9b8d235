"""GPT-2 124M at 1024 tokens in bfloat16: speed, MFU, memory, and nanoGPT beside it.

Each row is a process of train.py's: configs/gpt2_124m.toml on random ids, 60 sequences a step,
compiled. tokens/s, MFU and ms are of the median step, the first third left out. Peak: what torch's
allocator gave out, beside what memory/estimate.py predicts of a run that is not compiled.

nanoGPT's own train.py has the same shape, precision, optimizer, ids and 60 sequences a step, in
micro-batches of 12, its default; so has the row "ours, 12 at a time".
"""

import shutil
from statistics import median

from benchmarks import nanogpt, runs
from benchmarks.stages import plan as common
from memory import estimate

COVERS = ()
TABLE = "GPT-2 124M, bf16."
N_SEQUENCES = 60
USUAL = (
    "--eval_every=0 --save_every=0 --sample_tokens=0 --plot=false --log_every=1 --resume=never"
    " --precision=bf16 --warmup_steps=10"
).split()


def run(plan: common.Plan) -> None:
    size = common.SIZES["tiny" if plan.rehearse else "124M"]
    batch, micro = (4, 2) if plan.rehearse else (N_SEQUENCES, 12)
    steps = 4 if plan.rehearse else 20
    ids = plan.folder / "ids"
    common.write_ids(ids, size["vocab_size"], 4 * batch * size["block_size"] * steps)
    words = [str(runs.ROOT / "configs" / "gpt2_124m.toml"), *USUAL, *common.fields(size)]
    words += [f"--data={ids}", "--tokenizer=ids", f"--device={plan.device.type}"]
    words += [f"--batch_size={batch}", f"--steps={steps}"]
    on_gpu = plan.device.type == "cuda"
    mode = "default" if on_gpu else "off"
    cases = {
        "ours, micro-batch found by itself": [f"--compile={mode}"],
        f"ours, {micro} at a time": [f"--compile={mode}", f"--micro_batch_size={micro}"],
        f"ours, {micro} at a time, not compiled": ["--compile=off", f"--micro_batch_size={micro}"],
    }
    speeds = {}
    speed = None
    for i, (name, more) in enumerate(cases.items()):
        with common.failing_is_a_row(plan, TABLE, what=name):
            speeds[name] = ours(plan, name, [*words, *more], size, batch, i)
        if i == 0:  # nanoGPT is worth more than the rest
            with common.failing_is_a_row(plan, TABLE, what="nanoGPT"):
                speed = theirs(plan, ids, size, batch, micro, steps)
    if speed is not None:
        for name, mine in speeds.items():
            plan.emit("Beside nanoGPT.", what=name, ratio=mine / speed)


def ours(plan, name: str, words: list[str], size: dict, batch: int, i: int) -> float:
    """A row for one run; returns its tokens/s."""
    seconds, rows = runs.run(words, plan.folder / f"run{i}")
    middle = runs.middle(rows)
    log = (plan.folder / f"run{i}" / "train.log").read_text(encoding="utf-8")
    micro = int(log.partition("in micro-batches of ")[2].partition(";")[0].partition(",")[0])
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
        estimate_by_peak=predicted / peak,
        loss=[row for row in rows if "loss" in row][-1]["loss"],
        whole_process_s=round(seconds, 1),
    )
    return middle["tokens_per_s"]


def predict(size: dict, micro: int, micro_batches: int) -> float:
    """Bytes by memory/estimate.py."""
    shapes = estimate.gpt_shapes(
        size["n_layer"],
        size["n_embd"],
        size["vocab_size"],
        size["block_size"],
        "gpt2",
        size["n_head"],
    )
    activations = estimate.activation_bytes(
        "bf16",
        micro * size["block_size"],
        size["n_layer"],
        size["n_embd"],
        size["vocab_size"],
        "gpt2",
    )
    return estimate.bytes_per_rank(
        shapes, "adamw", precision="bf16", micro_batches=micro_batches, activations=activations
    )["total"]


def theirs(plan, ids, size: dict, batch: int, micro: int, steps: int) -> float | None:
    """A row for nanoGPT's own train.py; returns its tokens/s."""
    if plan.nanogpt is None:
        plan.emit(TABLE, what="nanoGPT", note="left out: type --nanogpt= and a clone's folder")
        return None
    folder = plan.folder / "nanogpt"
    (folder / "data").mkdir(parents=True)
    for name in nanogpt.FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(plan.nanogpt / name, folder / name)
    shutil.copytree(ids, folder / "data" / "ids")
    # What its prepare.py leaves: {"vocab_size": n} as a pickle, in the protocol of text.
    meta = f"(dVvocab_size\nI{size['vocab_size']}\ns."
    (folder / "data" / "ids" / "meta.pkl").write_bytes(meta.encode())
    on_gpu = plan.device.type == "cuda"
    words = [f"--{name}={size[name]}" for name in ("n_layer", "n_head", "n_embd", "block_size")]
    words += [f"--batch_size={micro}", f"--gradient_accumulation_steps={batch // micro}"]
    words += [f"--max_iters={steps}", "--dataset=ids", "--dtype=bfloat16", "--bias=False"]
    words += ["--dropout=0.0", "--log_interval=1", "--eval_iters=1", "--eval_interval=100000"]
    words += [f"--device={plan.device.type}", f"--compile={on_gpu}", "--out_dir=run"]
    words += ["--always_save_checkpoint=False"]
    seconds, times, _ = nanogpt.theirs(folder, words)
    step_s = median(times[len(times) // 3 :])
    tokens_per_s = batch * size["block_size"] / step_s
    plan.emit(
        TABLE,
        what=f"nanoGPT, {micro} at a time",
        micro=micro,
        tokens_per_s=round(tokens_per_s),
        ms=1000 * step_s,
        whole_process_s=round(seconds, 1),
    )
    return tokens_per_s
