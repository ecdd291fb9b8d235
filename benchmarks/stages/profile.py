"""Where the time of a step of GPT-2 124M goes: the dearest operators and kernels, and a trace.

A run of train.py with --profile=6:8, as in stage gpt2 with 12 sequences at a time. The trace stays
in the bench's --out: drag it onto https://ui.perfetto.dev.
"""

import shutil

import torch

from benchmarks import runs
from benchmarks.stages import gpt2
from benchmarks.stages import plan as common

COVERS = (
    "metrics/profile.py:Profiler.begin",
    "run/batch.py:largest_micro_batch",
    "run/microbatches.py:MicroBatches.forward",
)
SHOWN = 15


def run(plan: common.Plan) -> None:
    size = common.SIZES["tiny" if plan.rehearse else "124M"]
    batch = 4 if plan.rehearse else 12
    ids = plan.folder / "ids"
    common.write_ids(ids, size["vocab_size"], 50 * batch * size["block_size"])
    words = [str(runs.ROOT / "configs" / "gpt2_124m.toml"), *gpt2.USUAL, *common.fields(size)]
    words += [f"--data={ids}", "--tokenizer=ids", f"--device={plan.device.type}", "--steps=8"]
    words += [f"--batch_size={batch}", "--profile=6:8"]
    words += [f"--compile={'default' if plan.device.type == 'cuda' else 'off'}"]
    folder = plan.folder / "run"
    common.train(words, folder)
    made = folder / "profile"
    shutil.copy(made / "rank_0.trace.json.gz", plan.out / "step.trace.json.gz")
    shutil.copy(made / "memory.png", plan.out / "step.memory.png")
    lines = (made / "rank_0.operators.txt").read_text(encoding="utf-8").splitlines()
    for line in lines[2 : 2 + SHOWN]:
        name, calls, ms, share, megabytes = line.rsplit(None, 4)
        plan.emit(
            "Profile: the dearest of a step.",
            operator=name,
            calls=float(calls),
            ms=float(ms),
            share=share,
            MB=float(megabytes),
        )
    if plan.device.type == "cuda":
        kernels = sum(float(line.rsplit(None, 4)[2]) for line in lines[2:])
        plan.emit("Profile: in all.", what="ms of the GPU a step", value=kernels)
        torch.cuda.synchronize()
