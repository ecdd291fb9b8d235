"""Blocks of a GPT in FP8 by tensor, row and block, against bfloat16, at three widths.

First the products alone: the hardware's beside the emulation, both of the same FP8 numbers. Then
forward and backward of two blocks (heads of 128) of 8 x 1024 tokens, not compiled, then compiled,
for what quantises costs a pass over memory that only a compiler can fuse. Ratio: time in bfloat16
over this time.
"""

import torch

from benchmarks.stages import plan as common
from layers.compile import compile_blocks
from model import GPTConfig
from precision import amp, fp8

COVERS = (
    "precision/fp8.py:missing_hardware",
    "precision/fp8.py:dequantise",
)
SCALINGS = ("tensor", "row", "block")


def run(plan: common.Plan) -> None:
    widths = (64,) if plan.rehearse else (1024, 2048, 4096)
    for width in widths:
        for scaling in SCALINGS:
            products(plan, width, scaling)
    # What is measured fastest comes first, then the width at which FP8 should begin to pay.
    for is_compiled in (False, True):
        for width in sorted(widths, key=lambda width: width != 2048):
            beside = None
            # A rehearsal compiles one: tracing takes the seconds.
            scalings = ("block",) if plan.rehearse and is_compiled else SCALINGS
            for scaling in (None, *scalings):
                with common.failing_is_a_row(plan, table_of(is_compiled), width=width, fp8=scaling):
                    beside = block(plan, width, scaling, is_compiled, beside)


def products(plan: common.Plan, width: int, scaling: str) -> None:
    """y, dx and dW by the hardware beside the emulation, from the same inputs."""
    table = "FP8: the hardware's products beside the emulation's."
    M = 64 if plan.rehearse else 8192
    x = torch.randn(M, width, device=plan.device, dtype=torch.bfloat16)
    weight = torch.randn(width, width, device=plan.device) / width**0.5
    why_not = fp8.missing_hardware(plan.device, scaling, "e4m3", [tuple(weight.shape)])
    with common.failing_is_a_row(plan, table, width=width, scaling=scaling):
        found = [results(x, weight, scaling, why_not is None), results(x, weight, scaling, False)]
        apart = {
            name: common.difference(mine, other)
            for name, mine, other in zip(("y", "dx", "dW"), *found)
        }
        # The emulation rounds y and dx to bfloat16 after a float32 sum, as the hardware does.
        is_same = all(value < 2**-7 for value in apart.values())
        plan.emit(table, width=width, scaling=scaling, **apart, ok=is_same, note=why_not)


def results(x, weight, scaling: str, hardware: bool) -> list[torch.Tensor]:
    recipe = fp8.Recipe(scaling, (True, True, True), "e4m3", False, hardware)
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    y = fp8.linear(x, weight, recipe=recipe)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    return [y, x.grad, weight.grad]


def table_of(is_compiled: bool) -> str:
    return f"FP8: forward and backward of two blocks, {'' if is_compiled else 'not '}compiled."


def block(plan, width: int, scaling: str | None, is_compiled: bool, beside: float | None) -> float:
    """A row; returns milliseconds. scaling None: bfloat16. beside: the time of bfloat16."""
    B, T, head = (1, 32, 32) if plan.rehearse else (8, 1024, 128)
    heads = width // head
    common.freed(plan.device)
    model = common.gpt(GPTConfig(2, heads, heads, width, T, 512), plan.device)
    ids = torch.randint(512, (B, T + 1), device=plan.device)
    why = None
    if scaling is not None:
        why = fp8.convert(model, plan.device, scaling).why_emulated
    if is_compiled:
        torch._dynamo.reset()
        compile_blocks(model, "default", backend="eager" if plan.rehearse else "inductor")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with amp.autocast("bf16", plan.device):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()

    ms = common.milliseconds(step, plan.device, 0.1 if plan.rehearse else 0.5)
    plan.emit(
        table_of(is_compiled),
        width=width,
        precision="bf16" if scaling is None else f"fp8 by {scaling}",
        ms=ms,
        ratio=(beside or ms) / ms,
        products="emulated" if why else "hardware",
        tokens_per_s=round(1000 * B * T / ms),
    )
    return ms if scaling is None else beside
