"""Blocks of a GPT in FP8 by tensor, row and block, against bfloat16, at three widths.

First the products alone: the hardware's beside the emulation, both of the same FP8 numbers. Then
forward and backward of two blocks (heads of 128) of 8 x 1024 tokens, not compiled, then compiled,
for what quantises costs a pass over memory that only a compiler can fuse. Ratio: time in bfloat16
over this time.
"""

import torch
from torch import Tensor

from benchmarks.stages import common
from benchmarks.stages.common import Plan
from layers.compile import compile_blocks
from model import GPTConfig
from precision import amp, fp8

COVERS = (
    "precision/fp8.py:missing_hardware",
    "precision/fp8.py:dequantise",
)
SCALINGS = ("tensor", "row", "block")


def run(plan: Plan) -> None:
    if plan.rehearse:
        blocks(plan, 64, False, SCALINGS)
        blocks(plan, 64, True, ("block",))  # tracing takes the seconds
        products(plan, 64)
        return
    # FP8 is to pay from a width of 2048 on, compiled.
    blocks(plan, 2048, True, SCALINGS)
    products(plan, 2048)
    blocks(plan, 4096, True, SCALINGS)
    for width in (2048, 4096, 1024):
        blocks(plan, width, False, SCALINGS)
    products(plan, 4096)
    products(plan, 1024)
    blocks(plan, 1024, True, SCALINGS)


def products(plan: Plan, width: int) -> None:
    """y, dx and dW by the hardware beside the emulation, from the same inputs."""
    table = "FP8: the hardware's products beside the emulation's."
    M = 64 if plan.rehearse else 8192
    torch.manual_seed(0)
    x = torch.randn(M, width, device=plan.device, dtype=torch.bfloat16)
    dy = torch.randn(M, width, device=plan.device, dtype=torch.bfloat16)
    weight = torch.randn(width, width, device=plan.device) / width**0.5
    for scaling in SCALINGS:
        why_not = fp8.missing_hardware(plan.device, scaling, "e4m3", [tuple(weight.shape)])
        with common.failing_is_a_row(plan, table, width=width, scaling=scaling):
            hardware = results(x, weight, dy, scaling, why_not is None)
            emulated = results(x, weight, dy, scaling, False)
            apart = {
                name: common.difference(mine, other)
                for name, mine, other in zip(("y", "dx", "dW"), hardware, emulated)
            }
            # Both round y and dx to bfloat16 after a sum in float32.
            is_same = all(value < 2**-7 for value in apart.values())
            is_real = plan.rehearse or why_not is None
            plan.emit(
                table, width=width, scaling=scaling, **apart, ok=is_same and is_real, note=why_not
            )


def results(x: Tensor, weight: Tensor, dy: Tensor, scaling: str, hardware: bool) -> list[Tensor]:
    recipe = fp8.Recipe(scaling, (True, True, True), "e4m3", False, hardware)
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    y = fp8.linear(x, weight, recipe=recipe)
    y.backward(dy)
    return [y, x.grad, weight.grad]


def blocks(plan: Plan, width: int, is_compiled: bool, scalings: tuple[str, ...]) -> None:
    """Rows of one width: bfloat16, then FP8 by each scaling."""
    table = f"FP8: forward and backward of two blocks, {'' if is_compiled else 'not '}compiled."
    beside = None  # milliseconds in bfloat16
    for scaling in (None, *scalings):
        name = "bf16" if scaling is None else f"fp8 by {scaling}"
        with common.failing_is_a_row(plan, table, width=width, precision=name):
            ms, why, n_tokens = measure(plan, width, scaling, is_compiled)
            if scaling is None:
                beside = ms
            plan.emit(
                table,
                width=width,
                precision=name,
                ms=ms,
                ratio=None if beside is None else beside / ms,
                products="emulated" if why else "hardware",
                tokens_per_s=round(1000 * n_tokens / ms),
                ok=plan.rehearse or why is None,
            )


def measure(
    plan: Plan, width: int, scaling: str | None, is_compiled: bool
) -> tuple[float, str | None, int]:
    """(milliseconds, why FP8 is emulated, tokens); scaling None: bfloat16."""
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

    return common.milliseconds(step, plan.device, 0.1 if plan.rehearse else 0.4), why, B * T
