"""Attention kinds and windows by themselves, then compile modes and CUDA graphs in training.

kinds     forward and backward of the attention function alone, bfloat16, heads of 64; documents:
          about so many in a sequence, hidden from each other; mask_ms: to make their mask
ring      what ring attention calls for a block of keys, with its backward
modes     two blocks of width 768, forward, backward and update, bfloat16; difference: of the
          first gradient to the first row's. reduce-overhead replays CUDA graphs, max-autotune
          also tries several kernels
"""

import functools
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.stages import common
from benchmarks.stages.common import Plan
from layers import attention, document_mask
from layers.compile import compile_blocks, own_gradients
from model import GPTConfig
from parallel import context
from precision import amp

COVERS = (
    "layers/attention.py:sdpa",
    "parallel/context.py:block",
    "parallel/context.py:block_backward",
    "parallel/context.py:on_gpu",
)


def run(plan: Plan) -> None:
    if plan.rehearse:
        ring(plan, 64)
        lengths(plan, 64)
        modes(plan, ("off", "default"))
        return
    ring(plan, 1024)
    lengths(plan, 1024)
    modes(plan, ("off", "default", "reduce-overhead"))
    lengths(plan, 4096)
    modes(plan, ("off", "max-autotune"))


def lengths(plan: Plan, T: int) -> None:
    """Rows for every kind of attention to T tokens."""
    for kind in ("sdpa", "plain", "flex"):
        rows = ((None, 12, 0), (None, 12, 8), (T // 4, 12, 0), (T // 4, 4, 0), (T // 4, 4, 8))
        for window, kv_heads, documents in rows:
            table = f"Attention: forward and backward, {T} tokens, bf16."
            case = dict(kind=kind, window=window, kv_heads=kv_heads, documents=documents)
            if kind == "flex" and plan.rehearse:
                plan.emit(table, **case, note="no backward on a CPU")
                continue
            with common.failing_is_a_row(plan, table, **case):
                plan.emit(table, **case, **attend(plan, T, **case))


def attend(
    plan: Plan, T: int, kind: str, window: int | None, kv_heads: int, documents: int
) -> dict:
    """Time of forward and backward, and how far the output is from the formula in float32."""
    B = 2 if plan.rehearse else 8
    common.freed(plan.device)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(B, n, T, 64, device=plan.device, dtype=torch.bfloat16).requires_grad_()
        for n in (12, kv_heads, kv_heads)
    )
    # A kernel for these shapes alone, as in training: torch would make one for any.
    torch._dynamo.reset()
    attention.kernel.cache_clear()
    function = attention.choose(kind, window)
    hidden = {}
    exactly = {}
    found = {}
    if documents:
        ids = torch.randint(0, T // documents, (B, T), device=plan.device)
        starts = document_mask.starts(ids, 0)
        make = functools.partial(document_mask.make, kind, window, starts, q.dtype)
        hidden["documents"] = make()
        exactly["documents"] = document_mask.make("plain", window, starts[:1])
        found["mask_ms"] = common.milliseconds(make, plan.device, 0.05)

    def step() -> Tensor:
        for x in (q, k, v):
            x.grad = None
        y = function(q, k, v, **hidden)
        y.sum().backward()
        return y

    began = time.perf_counter()
    y = step()[:1]
    with torch.no_grad():
        one = (x[:1].float() for x in (q, k, v))
        exact = attention.plain_attention(*one, window, **exactly)
    apart = common.difference(y, exact)
    first_s = time.perf_counter() - began
    ms = common.milliseconds(step, plan.device, 0.05 if plan.rehearse else 0.15)
    return dict(ms=ms, **found, difference=apart, first_s=first_s, ok=apart < 0.02)


def ring(plan: Plan, T: int) -> None:
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
            is_real = fused or plan.rehearse
            plan.emit(
                table, causal=str(causal), **apart, fused_kernel=str(fused), ok=is_same and is_real
            )


MODES_TABLE = "Compile modes: forward, backward and update of two blocks, bf16."


def modes(plan: Plan, names: tuple[str, ...]) -> None:
    """Rows for these modes; the first one is what the others' gradients are compared with."""
    expected = None
    for mode in names:
        with common.failing_is_a_row(plan, MODES_TABLE, mode=mode):
            gradient, cells = mode_of(plan, mode)
            if expected is None:
                expected = gradient
            apart = common.difference(gradient, expected)
            plan.emit(MODES_TABLE, mode=mode, **cells, difference=apart, ok=apart < 0.02)


def mode_of(plan: Plan, mode: str) -> tuple[Tensor, dict]:
    """The gradient of the first step, flat, and the times of a row."""
    width, T, B = (32, 32, 2) if plan.rehearse else (768, 1024, 12)
    heads = max(width // 64, 2)
    common.freed(plan.device)
    model = common.gpt(GPTConfig(2, heads, heads, width, T, 512), plan.device)
    ids = torch.randint(512, (B, T + 1), device=plan.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch._dynamo.reset()
    if mode != "off":
        compile_blocks(model, mode, backend="aot_eager" if plan.rehearse else "inductor")
        own_gradients(model)

    def backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        with amp.autocast("bf16", plan.device):
            loss = model(ids[:, :-1], ids[:, 1:])
        (loss / ids[:, 1:].numel()).backward()

    def step() -> None:
        backward()
        optimizer.step()

    began = time.perf_counter()
    backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
    for _ in range(2):  # a CUDA graph is recorded in the second
        step()
    first_s = time.perf_counter() - began
    ms = common.milliseconds(step, plan.device, 0.1 if plan.rehearse else 0.4)
    return gradient, dict(ms=ms, first_three_s=first_s)
