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
import platform
import subprocess
import time

import torch

from benchmarks.stages import plan as common
from layers import compile
from parallel import launch
from precision import amp
from run import announce

COVERS = (
    "checkpoint/save.py:Saver.save",
    "checkpoint/slices.py:copied",
    "layers/attention.py:flex_attention",
    "layers/compile.py:lacking",
    "memory/activation_checkpoint.py:start_trip",
    "memory/offload.py:Stream.__init__",
    "memory/offload.py:Stream.home",
    "metrics/flops.py:peak_bytes",
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
    "run/auto.py:resolve_auto",
    "run/auto.py:resolve_compile",
    "run/batch.py:largest_micro_batch",
    "run/microbatches.py:MicroBatches.forward",
)
USUAL = (
    "--steps=3 --eval_every=0 --save_every=0 --sample_tokens=0 --plot=false --log_every=1"
    " --resume=never"
).split()
SMALL = "--n_layer=2 --n_head=4 --n_embd=256 --block_size=256 --batch_size=8".split()
TINY = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4".split()
EXACT = ["--precision=fp64", "--opt.ns_dtype=float64"]
SINGLE = ["--precision=fp32", "--opt.ns_dtype=float32"]
PRECISIONS = {  # name: (words, bound)
    "fp64": (EXACT, 1e-10),
    "fp32": (SINGLE, 1e-4),
    "bf16": (["--precision=bf16"], 0.02),
    "fp8": (["--precision=fp8"], 0.05),
    "fp8 by row": (["--precision=fp8", "--fp8.scaling=row"], 0.05),
    "fp8 by tensor": (["--precision=fp8", "--fp8.scaling=tensor"], 0.05),
    "fp16": (["--precision=fp16", "--scaler.init_power=8"], 0.02),
    "bf16_sr": (["--precision=bf16_sr"], 0.05),
}
ADAMW = [*EXACT[:1], "--optim=adamw"]
FEATURES = {  # name: (words, the words of the run it is compared with, bound)
    "micro-batches": (["--micro_batch_size=2"], EXACT, 1e-10),
    "deterministic": (["--deterministic=true"], EXACT, 1e-10),
    "attention=plain": (["--attention=plain"], EXACT, 1e-10),
    "activation_checkpoint=full": (["--activation_checkpoint=full"], EXACT, 1e-10),
    "activation_checkpoint=full_offload": (["--activation_checkpoint=full_offload"], EXACT, 1e-10),
    "activation_checkpoint=selective": (["--activation_checkpoint=selective"], EXACT, 1e-10),
    "activation_checkpoint=offload": (["--activation_checkpoint=offload"], EXACT, 1e-10),
    "offload=cpu": (["--offload=cpu"], EXACT, 1e-10),
    "offload=disk": (["--offload=disk"], EXACT, 1e-10),
    "histograms, watched": (["--histogram_every=1", "--watch_every=1"], EXACT, 1e-10),
    "a checkpoint after each step": (["--save_every=1"], EXACT, 1e-10),
    "zero1": (["--data_parallel=zero1"], EXACT, 1e-10),
    "zero3": (["--data_parallel=zero3"], EXACT, 1e-10),
    "zero3, offload_params": (
        ["--data_parallel=zero3", "--offload_params=cpu"],
        EXACT,
        1e-10,
    ),
    "fsdp": (["--data_parallel=fsdp"], EXACT, 1e-10),
    "fused AdamW": (["--opt.fused=true"], ADAMW, 1e-10),
    "attention=flex": (["--attention=flex"], SINGLE, 1e-4),
    "attention=flex, window=64": (
        ["--attention=flex", "--window=64"],
        [*SINGLE, "--window=64"],
        1e-4,
    ),
}
MODES = {"default": 1e-4, "reduce-overhead": 1e-4, "max-autotune": 1e-4}  # mode: bound in fp32


def run(plan: common.Plan) -> None:
    environment(plan)
    size = TINY if plan.rehearse else SMALL
    words = [*USUAL, *size, f"--data={common.TEXT}"]
    here = [*words, f"--device={plan.device.type}", "--compile=off"]
    count = 0

    def train(words: list[str]) -> list[dict]:
        nonlocal count
        count += 1
        return common.train(words, plan.folder / str(count))

    precisions(plan, train, [*words, "--device=cpu", "--compile=off"], here)
    features(plan, train, here)
    compiled(plan, train, here)


def environment(plan: common.Plan) -> None:
    """The machine, a row for each fact."""
    facts = announce.environment(plan.device, 1, "")
    facts["cores"] = os.cpu_count()
    facts["processor"] = platform.processor()
    if plan.device.type == "cuda":
        properties = torch.cuda.get_device_properties(plan.device)
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory, GiB"] = round(properties.total_memory / 2**30, 1)
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,power.limit",
            "--format=csv,noheader",
        ]
        try:
            facts["driver, clock, power limit"] = subprocess.run(
                query, capture_output=True, text=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            facts["driver, clock, power limit"] = "nvidia-smi does not answer"
    facts["lacking to compile"] = compile.lacking(plan.device) or "nothing"
    facts["--device=auto is"] = launch.best_device()
    facts["--precision=auto is"] = amp.choose("auto", plan.device)
    del facts["data_sha256"]
    for name, fact in facts.items():
        plan.emit("The machine.", what=name, value=str(fact))


def compare(plan: common.Plan, table: str, name: str, work, reference: list[dict], bound: float):
    """One row: how far work()'s run is from the reference."""
    with common.failing_is_a_row(plan, table, what=name):
        began = time.perf_counter()
        apart = common.furthest(work(), reference)
        plan.emit(
            table,
            what=name,
            difference=apart,
            bound=bound,
            ok=apart <= bound,
            seconds=round(time.perf_counter() - began, 2),
        )


def precisions(plan: common.Plan, train, on_cpu: list[str], here: list[str]) -> None:
    table = "Precisions: a run on the GPU beside the CPU's."
    for name, (words, bound) in PRECISIONS.items():
        with common.failing_is_a_row(plan, table, what=f"{name} on the CPU"):
            reference = train([*on_cpu, *words])
            compare(plan, table, name, lambda: train([*here, *words]), reference, bound)


def features(plan: common.Plan, train, here: list[str]) -> None:
    table = "Features: a run with it beside the run without, both on the GPU."
    references = {}
    for name, (words, beside, bound) in FEATURES.items():
        if "flex" in name and plan.device.type != "cuda":
            plan.emit(table, what=name, note="FlexAttention has no backward on a CPU")
            continue
        with common.failing_is_a_row(plan, table, what=name):
            key = tuple(beside)
            if key not in references:
                references[key] = train([*here, *beside])
            compare(
                plan, table, name, lambda: train([*here, *beside, *words]), references[key], bound
            )


def compiled(plan: common.Plan, train, here: list[str]) -> None:
    table = "Compile: a compiled run beside the same one not compiled."
    cases = [(mode, precision, False) for mode in MODES for precision in ("fp32", "bf16", "fp8")]
    # CUDA graphs overwrite what they returned: gradients of a micro-batch, inputs of an evaluation.
    cases.insert(4, ("reduce-overhead", "fp32", True))
    if plan.rehearse:
        # The CPU's kernels take 15 s to compile and say nothing of a GPU's: trace alone.
        cases = [("default", "fp32", True)]
    references = {}
    for mode, precision, is_cut in cases:
        words, loose = PRECISIONS[precision]
        name = f"{precision}, {mode}" + ", micro-batches and evaluations" * is_cut
        with common.failing_is_a_row(plan, table, what=name):
            if precision not in references:
                references[precision] = train([*here, *words])
            more = [*words, f"--compile={mode}"]
            if is_cut:
                more += ["--micro_batch_size=2", "--eval_every=1", "--eval_tokens=1024"]
            if plan.rehearse:
                more.append("--compile.backend=aot_eager")
            bound = MODES[mode] if precision == "fp32" else loose
            compare(plan, table, name, lambda: train([*here, *more]), references[precision], bound)
