"""Is a step on the GPU the step on the CPU, and is it the same step with everything switched on?

Runs of train.py, three steps each, in this process. The differences are the largest relative ones
of losses and gradient norms. A bound is what the arithmetic allows: float64 and float32 may sum in
another order, 16 and 8 bits round elsewhere, too.

    precisions   the GPU's run beside the CPU's
    features     a run with the feature beside the run without it, both on the GPU, in float64
                 where there are kernels for it
    compile      a compiled run beside the same one not compiled, both on the GPU
"""

import os
import subprocess
import time

import torch

from benchmarks.stages import common
from benchmarks.stages.common import Plan
from layers import compile
from parallel import launch
from precision import amp
from run import announce

COVERS = (
    "checkpoint/save.py:Saver.save",
    "checkpoint/slices.py:copied",
    "layers/attention.py:flex_attention",
    "layers/document_mask.py:block_mask",
    "layers/compile.py:lacking",
    "layers/fewer_passes.py:by_autograd",
    "layers/moe.py:Experts.block",
    "layers/moe.py:has_kernel",
    "memory/activation_checkpoint.py:start_trip",
    "memory/offload.py:Stream.__init__",
    "memory/offload.py:Stream.home",
    "memory/offload.py:Stream.run",
    "memory/offload.py:Stream.store",
    "metrics/flops.py:peak_bytes",
    "optim/adamw.py:is_fast",
    "optim/muon.py:symmetric_product_",
    "parallel/launch.py:best_device",
    "parallel/launch.py:pick_device",
    "parallel/zero.py:ZeRO.make_bucket",
    "precision/amp.py:autocast",
    "precision/amp.py:choose",
    "precision/fp8.py:missing_hardware",
    "precision/onednn.py:faster",
    "run/announce.py:about_machine",
    "run/announce.py:about_memory",
    "run/announce.py:environment",
    "run/auto.py:resolve_attention",
    "run/auto.py:resolve_auto",
    "run/auto.py:resolve_compile",
    "run/batch.py:largest_micro_batch",
    "run/microbatches.py:MicroBatches.forward",
    "train.py:main",
)
# Projections that start at 0 would hide what is before them.
USUAL = (
    "--steps=3 --eval_every=0 --save_every=0 --sample_tokens=0 --plot=false --log_every=1"
    " --resume=never --zero_init=false"
).split()
SMALL = "--n_layer=2 --n_head=4 --n_embd=256 --block_size=256 --batch_size=8".split()
TINY = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4".split()
EXACT = ["--precision=fp64", "--opt.ns_dtype=float64"]
SINGLE = ["--precision=fp32", "--opt.ns_dtype=float32"]
DOCUMENTS = ["--document_mask=true", "--document_token=10"]  # a line is a document
PRECISIONS = {  # name: (words, bound)
    "fp64": (EXACT, 1e-10),
    "fp32": (SINGLE, 1e-4),
    "bf16": (["--precision=bf16"], 0.01),
    "fp16": (["--precision=fp16", "--scaler.init_power=8"], 0.01),
    "bf16_sr": (["--precision=bf16_sr"], 0.03),
    "fp64, documents": ([*EXACT, *DOCUMENTS], 1e-10),
    "fp64, experts": ([*EXACT, "--n_expert=8"], 1e-10),
    "fp32, experts": ([*SINGLE, "--n_expert=8"], 1e-4),
    "bf16, experts": (["--precision=bf16", "--n_expert=8"], 0.01),
    "fp8, experts": (["--precision=fp8", "--n_expert=8"], 0.03),
    "fp8": (["--precision=fp8"], 0.03),
    "fp8 by row": (["--precision=fp8", "--fp8.scaling=row"], 0.03),
    "fp8 by tensor": (["--precision=fp8", "--fp8.scaling=tensor"], 0.03),
}
ADAMW = ["--precision=fp64", "--optim=adamw"]
FEATURES = {  # name: (words, the words of the run it is compared with, bound)
    "micro-batches": (["--micro_batch_size=2"], EXACT, 1e-10),
    "offload=cpu": (["--offload=cpu"], EXACT, 1e-10),
    "offload=disk": (["--offload=disk"], EXACT, 1e-10),
    "zero3, offload_params": (["--data_parallel=zero3", "--offload_params=cpu"], EXACT, 1e-10),
    "activation_checkpoint=full": (["--activation_checkpoint=full"], EXACT, 1e-10),
    "activation_checkpoint=full_offload": (["--activation_checkpoint=full_offload"], EXACT, 1e-10),
    "activation_checkpoint=selective": (["--activation_checkpoint=selective"], EXACT, 1e-10),
    "activation_checkpoint=offload": (["--activation_checkpoint=offload"], EXACT, 1e-10),
    "a checkpoint after each step": (["--save_every=1"], EXACT, 1e-10),
    "histograms, watched": (["--histogram_every=1", "--watch_every=1"], EXACT, 1e-10),
    "deterministic": (["--deterministic=true"], EXACT, 1e-10),
    "attention=plain": (["--attention=plain"], EXACT, 1e-10),
    "zero1": (["--data_parallel=zero1"], EXACT, 1e-10),
    "zero3": (["--data_parallel=zero3"], EXACT, 1e-10),
    "fused AdamW": (["--opt.fused=true"], ADAMW, 1e-10),
}
WINDOW = ["--window=64"]
FLEX = {  # as above; each is compiled, which takes seconds
    "attention=flex": (["--attention=flex"], SINGLE, 1e-4),
    "attention=flex, window=64": (["--attention=flex"], [*SINGLE, *WINDOW], 1e-4),
    "attention=flex, documents": (["--attention=flex"], [*SINGLE, *DOCUMENTS], 1e-4),
}
# CUDA graphs overwrite what they returned: gradients of a micro-batch, inputs of an evaluation.
CUT = ["--micro_batch_size=2", "--eval_every=1", "--eval_tokens=1024"]
FIRST = [("default", "fp32", []), ("default", "bf16", [])]  # mode, precision, more words
LATER = [
    ("default", "fp8", []),
    ("reduce-overhead", "fp32", CUT),
    ("reduce-overhead", "bf16", []),
    ("max-autotune", "bf16", []),
]


def run(plan: Plan) -> None:
    # cuBLAS reads this at its first product, and --deterministic needs it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with common.failing_is_a_row(plan, "The machine."):
        environment(plan)
    stage = Steps(plan)
    # What is worth most comes first; what may leave the GPU in an error comes late.
    exact = [name for name in PRECISIONS if "fp8" not in name]
    stage.precisions(exact)
    stage.compiled([("default", "fp32", CUT)] if plan.rehearse else FIRST)
    stage.features(FEATURES)
    stage.precisions([name for name in PRECISIONS if "fp8" in name])
    if not plan.rehearse:
        stage.compiled(LATER[:3])
        stage.features(FLEX)
        stage.compiled(LATER[3:])


def environment(plan: Plan) -> None:
    """The machine, a row for each fact."""
    facts = announce.environment(plan.device, 1, "")
    facts["cores"] = os.cpu_count()
    facts["lacking to compile"] = compile.lacking(plan.device) or "nothing"
    facts["--device=auto is"] = launch.best_device()
    facts["--precision=auto is"] = amp.choose("auto", plan.device)
    if plan.device.type == "cuda":
        properties = torch.cuda.get_device_properties(plan.device)
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory, GiB"] = round(properties.total_memory / 2**30, 1)
        facts["driver, highest clock, power limit"] = driver()
    del facts["data_sha256"]
    for name, fact in facts.items():
        plan.emit("The machine.", what=name, value=str(fact))


def driver() -> str:
    query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
    try:
        return subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer"


class Steps:
    """The runs of this stage. A run that serves as a reference is done once."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.usual = [*USUAL, *(TINY if plan.rehearse else SMALL), f"--data={common.TEXT}"]
        self.references = {}  # words -> rows
        self.count = 0

    def train(self, device: str, words: list[str]) -> list[dict]:
        self.count += 1
        where = [f"--device={device}"]
        if not any(word.startswith("--compile=") for word in words):
            where.append("--compile=off")
        return common.train([*self.usual, *where, *words], self.plan.folder / str(self.count))

    def reference(self, device: str, words: list[str]) -> list[dict]:
        key = (device, *words)
        if key not in self.references:
            self.references[key] = self.train(device, words)
        return self.references[key]

    def compare(self, table: str, name: str, run, reference, bound: float) -> None:
        """One row: how far the rows of run() are from those of reference()."""
        with common.failing_is_a_row(self.plan, table, what=name):
            expected = reference()
            began = time.perf_counter()
            apart = common.furthest(run(), expected)
            seconds = round(time.perf_counter() - began, 2)
            is_same = apart <= bound
            self.plan.emit(
                table, what=name, difference=apart, bound=bound, ok=is_same, seconds=seconds
            )

    def precisions(self, names: list[str]) -> None:
        here = self.plan.device.type
        for name in names:
            words, bound = PRECISIONS[name]
            self.compare(
                "Precisions: a run on the GPU beside the CPU's.",
                name,
                lambda: self.reference(here, words),
                lambda: self.train("cpu", words),
                bound,
            )

    def features(self, features: dict) -> None:
        here = self.plan.device.type
        for name, (words, beside, bound) in features.items():
            self.compare(
                "Features: a run with it beside the run without, both on the GPU.",
                name,
                lambda: self.train(here, [*beside, *words]),
                lambda: self.reference(here, beside),
                bound,
            )

    def compiled(self, cases: list[tuple]) -> None:
        here = self.plan.device.type
        for mode, precision, more in cases:
            words, bound = PRECISIONS[precision]
            name = f"{precision}, {mode}" + (", micro-batches and evaluations" if more else "")
            how = [f"--compile={mode}", *more]
            if self.plan.rehearse:
                # A CPU's kernels take 15 s to compile and say nothing of a GPU's: trace alone.
                how.append("--compile.backend=aot_eager")
            self.compare(
                "Compile: a compiled run beside the same one not compiled.",
                name,
                lambda: self.train(here, [*words, *how]),
                lambda: self.reference(here, words),
                bound,
            )
