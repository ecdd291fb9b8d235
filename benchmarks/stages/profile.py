"""Where the time of a step of GPT-2 124M goes: the dearest operators and kernels, and a trace.

A run of train.py with --profile=6:8, with the graphs that stage gpt2 has compiled. The trace stays
in the bench's --out: drag it onto https://ui.perfetto.dev.
"""

import shutil

from benchmarks.stages import common, gpt2
from benchmarks.stages.common import Plan

COVERS = (
    "metrics/profile.py:Profiler.begin",
    "metrics/profile.py:operators",
    "run/batch.py:largest_micro_batch",
    "run/microbatches.py:MicroBatches.forward",
)
SHOWN = 15


def run(plan: Plan) -> None:
    size = common.SIZES["tiny" if plan.rehearse else "124M"]
    batch = 4 if plan.rehearse else 12
    ids = plan.folder / "ids"
    common.write_ids(ids, size["vocab_size"], 50 * batch * size["block_size"])
    words = gpt2.words(plan, size, ids, batch, 8)
    words += ["--profile=6:8", f"--compile={'off' if plan.rehearse else 'default'}"]
    folder = plan.folder / "run"
    common.train(words, folder)
    made = folder / "profile"
    shutil.copy(made / "rank_0.trace.json.gz", plan.out / "step.trace.json.gz")
    shutil.copy(made / "memory.png", plan.out / "step.memory.png")
    lines = (made / "rank_0.operators.txt").read_text(encoding="utf-8").splitlines()
    body = lines[2:]
    # The last line is the sum of all.
    for line in [*body[:SHOWN], body[-1]]:
        name, calls, ms, share, megabytes = line.rsplit(None, 4)
        plan.emit(
            "Profile: the dearest of a step.",
            operator=name.strip(),
            calls=float(calls),
            ms=float(ms),
            share=share,
            MB=float(megabytes),
        )
