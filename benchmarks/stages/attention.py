"""Attention kinds and windows by themselves, then compile modes and CUDA graphs in training.

kinds     forward and backward of the attention function alone, bfloat16, heads of 64
ring      what ring attention calls for a block of keys, with its backward
modes     two blocks of the default width, forward and backward, bfloat16; difference: of the
          loss to the first row's. reduce-overhead replays CUDA graphs, max-autotune also tries
          several kernels.
"""

import time

import torch
import torch.nn.functional as F

from benchmarks.stages import plan as common
from layers import attention
from layers.compile import compile_blocks
from model import GPTConfig
from parallel import context
from precision import amp

COVERS = (
    "layers/attention.py:causal_attention",
    "parallel/context.py:block",
    "parallel/context.py:block_backward",
    "parallel/context.py:on_gpu",
)


def run(plan: common.Plan) -> None:
    for T in (64,) if plan.rehearse else (1024, 4096):
        for kind in ("sdpa", "plain", "flex"):
            for window in (None, T // 4):
                kinds(plan, T, kind, window, n_kv_head=12)
            kinds(plan, T, kind, T // 4, n_kv_head=4)
        ring(plan, T)
    beside = None
    for mode in (
        ("off", "default")
        if plan.rehearse
        else (
            "off",
            "default",
            "reduce-overhead",
            "max-autotune",
        )
    ):
        with common.failing_is_a_row(plan, MODES, mode=mode):
            loss = modes(plan, mode, beside)
            beside = loss if beside is None else beside


def kinds(plan: common.Plan, T: int, kind: str, window: int | None, n_kv_head: int) -> None:
    table = f"Attention: forward and backward, {T} tokens, bf16."
    case = dict(kind=kind, window=window, kv_heads=n_kv_head)
    if kind == "flex" and plan.device.type != "cuda":
        plan.emit(table, **case, note="no backward on a CPU")
        return
    B = 2 if plan.rehearse else 8
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(B, n, T, 64, device=plan.device, dtype=torch.bfloat16).requires_grad_()
        for n in (12, n_kv_head, n_kv_head)
    )
    with common.failing_is_a_row(plan, table, **case):
        attend = attention.choose(kind, window)
        began = time.perf_counter()
        with torch.no_grad():  # in float32, by the formula
            exact = attention.plain_attention(q[:1].float(), k[:1].float(), v[:1].float(), window)
            apart = common.difference(attend(q[:1], k[:1], v[:1]), exact)
        first_s = time.perf_counter() - began

        def step() -> None:
            for x in (q, k, v):
                x.grad = None
            attend(q, k, v).sum().backward()

        ms = common.milliseconds(step, plan.device, 0.05 if plan.rehearse else 0.2)
        plan.emit(table, **case, ms=ms, difference=apart, first_s=first_s, ok=apart < 0.02)


def ring(plan: common.Plan, T: int) -> None:
    """What ring attention calls for one block of keys, beside autograd's attention to it."""
    table = f"Ring attention: one block of {T} keys, bf16."
    torch.manual_seed(0)
    shape = (2, 4, T, 64)
    q, k, v, dy = torch.randn(4, *shape, device=plan.device, dtype=torch.bfloat16).unbind()
    for causal in (True, False):
        with common.failing_is_a_row(plan, table, causal=str(causal)):
            out, lse = context.block(q, k, v, causal)
            found = [out, *context.block_backward(dy, q, out, lse, k, v, causal)]
            wide = [x.float().requires_grad_() for x in (q, k, v)]
            y = F.scaled_dot_product_attention(*wide, is_causal=causal)
            y.backward(dy.float())
            exact = [y, *(x.grad for x in wide)]
            apart = {
                name: common.difference(x, other)
                for name, x, other in zip(("y", "dq", "dk", "dv"), found, exact)
            }
            is_same = all(value < 0.02 for value in apart.values())
            fused = context.on_gpu(q)
            plan.emit(table, causal=str(causal), **apart, fused_kernel=str(fused), ok=is_same)


MODES = "Compile modes: forward and backward of two blocks, bf16."


def modes(plan: common.Plan, mode: str, beside: float | None) -> float:
    """A row; returns the loss of the last step."""
    width, T, B = (32, 32, 2) if plan.rehearse else (768, 1024, 12)
    heads = max(width // 64, 2)
    model = common.gpt(GPTConfig(2, heads, heads, width, T, 512), plan.device)
    ids = torch.randint(512, (B, T + 1), device=plan.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch._dynamo.reset()
    if mode != "off":
        backend = "aot_eager" if plan.rehearse else "inductor"
        compile_blocks(model, mode, backend=backend)

    def loss_of_step() -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with amp.autocast("bf16", plan.device):
            loss = model(ids[:, :-1], ids[:, 1:])
        (loss / ids[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    began = time.perf_counter()
    for _ in range(3):
        loss = float(loss_of_step()) / ids[:, 1:].numel()
    first_s = time.perf_counter() - began
    ms = common.milliseconds(loss_of_step, plan.device, 0.1 if plan.rehearse else 0.5)
    apart = 0.0 if beside is None else abs(loss / beside - 1)
    plan.emit(MODES, mode=mode, ms=ms, first_three_s=first_s, difference=apart, ok=apart < 0.02)
    return loss
