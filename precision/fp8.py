"""Linear layers whose products multiply 8-bit floating-point numbers.

    format  sign.exponent.mantissa   largest   smallest normal   subnormal   epsilon
    e4m3    1.4.3                        448   2^-6   1.6e-2     2^-9        2^-3     no inf
    e5m2    1.5.2                      57344   2^-14  6.1e-5     2^-16       2^-2     inf from 61440

What lies beyond 464, inf too, torch casts to an e4m3 of 448 since version 2.13, before that to NaN.

Each tensor is made to fit by a scale:

    scale = amax(x) / largest        float32; power_of_two: the next one, which rounds nothing
    q     = cast(clamp(x / scale))   saturate, then cast: no inf or NaN can come of it
    a·bᵀ  ≈ Σ_k (qa scale_a)(qb scale_b)

    product           contraction    operands (rows, contraction)
    forward  y  = x·Wᵀ     over K    x   (M, K) e4m3                       W  (N, K) e4m3
    input    dx = dy·W     over N    dy  (M, N) e4m3 (DeepSeek) or e5m2    Wᵀ (K, N) e4m3
    weight   dW = dyᵀ·x    over M    dyᵀ (N, M) the same                   xᵀ (K, M) e4m3

All are a·bᵀ with the contraction last in both, as the hardware wants it (a row-major, bᵀ
column-major, K and N multiples of 16, never e5m2 with e5m2). Weights are the model's float32
parameters, cast for each use, and their gradients float32; the rest is as in precision/amp.py. What
has one scale:

    tensor   the whole operand (Micikevicius et al. 2022, 2209.05433)
    row      each row: a token of x and dy, an output of W
    block    1 x 128 along the contraction, weights 128 x 128 (DeepSeek-V3, 2412.19437, section 3.3)

Outliers are often said to take the others' bits. In an int8 tensor they do; a float gives each
number its own exponent, and e4m3 loses bits only of what is 2^15 times smaller than the largest
(e5m2: 2^30). A token's scale cannot leave a sum over tokens, so the weight gradient quantises x and
dy anew, transposed, in tiles of 128 tokens. DeepSeek keeps x in FP8 and rounds it twice; we keep
autocast's, which saves no memory.

`delayed` (by tensor; Transformer Engine's recipe): amax is the largest of the last `history` steps,
known before the tensor is, which saves reading it twice; what is larger saturates. Two departures:
scales stand still within a step, so that micro-batches and recomputed activations see the same; and
while the window is empty (first step, weights that start at 0) the tensor's own amax counts, not a
scale of 1. inf or NaN is not clamped away: it turns all that shares its scale to NaN, and stays out
of the history.

Emulation, on any device: quantise, dequantise, multiply in float32 (float64 for float64), without
any gain. Hopper's tensor cores keep about 14 bits of a sum, so DeepSeek moves it to float32 every
128 terms, as cuBLAS does by default; emulation sums in float32. Tensor-parallel ranks quantise what
they hold: one scale per tensor is each one's own, rows and blocks that the cut leaves whole are
those of the whole tensor.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from precision import onednn

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
X, WEIGHT, GRADIENT = range(3)  # columns of a history


class Recipe(NamedTuple):
    scaling: str
    products: tuple[bool, bool, bool]  # forward, input, weight
    gradient_format: str
    power_of_two: bool
    hardware: bool
    onednn: bool = False


# ---- scale, saturate, cast -----------------------------------------------------------------------
def quantise(
    x: Tensor,
    block: tuple[int, int],
    form: torch.dtype,
    power_of_two: bool = False,
    past: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (R, C) in float8, and a float32 scale for each block r x c: (R/r, C/c), rounded up.

    past (1 + history,): the amax of this step so far, here brought up to date, and of the steps
    before, whose largest takes the place of x's own."""
    largest, (rows, columns), (r, c) = torch.finfo(form).max, x.shape, block
    x = x.contiguous().to(torch.promote_types(x.dtype, torch.float32))  # turned before it is wide
    filled = F.pad(x.abs(), (0, -columns % c, 0, -rows % r))  # zeros change no amax
    amax = filled.reshape(-(-rows // r), r, -(-columns // c), c).amax((1, 3)).to(torch.float32)
    if past is not None:
        expected, finite = past[1:].amax(), amax.isfinite()
        past[0].copy_(torch.maximum(past[0], torch.where(finite, amax, 0).amax()))
        amax = torch.where(finite & (expected > 0), expected, amax)
    scale = (amax / largest).clamp(min=2.0**-126)  # never 0, so 0 / scale is 0
    scale = scale.log2().ceil().exp2() if power_of_two else scale
    scaled = x / spread(scale, block, x.shape)
    saturated = scaled.clamp(-largest, largest)
    return saturated.to(form), scale


def dequantise(q: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if q.device.type == "cpu":  # looking up is four times as fast as casting, and the same
        table = torch.arange(256, dtype=torch.uint8).view(q.dtype).to(dtype)
        q = table.index_select(0, q.contiguous().view(torch.uint8).flatten().int()).view(q.shape)
    return q.to(dtype) * spread(scale, block, q.shape)


def spread(scale: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Each scale at all places of its block: (R/r, C/c) -> (R, C)."""
    (rows, columns), (r, c) = scale.shape, block
    whole = scale[:, None, :, None].expand(-1, r, -1, c).reshape(rows * r, columns * c)
    return whole[: shape[0], : shape[1]]


# ---- multiply ------------------------------------------------------------------------------------
def product(
    a: Tensor,
    b: Tensor,
    roles: tuple[int, int],
    recipe: Recipe,
    out: torch.dtype,
    amaxes: Tensor | None = None,
) -> Tensor:
    """a·bᵀ in FP8: (M, K), (N, K) -> (M, N) of dtype `out`. roles: which of the layer's tensors
    they are."""
    with torch.autocast(a.device.type, enabled=False):
        hardware = recipe.hardware and out != torch.float64
        if hardware:
            edge = 0, -a.shape[1] % (128 if recipe.scaling == "block" else 16)
            a, b = F.pad(a, edge), F.pad(b, edge)
        blocks = [block_of(recipe.scaling, role, t.shape) for t, role in zip((a, b), roles)]
        forms = [FORMATS[recipe.gradient_format if role == GRADIENT else "e4m3"] for role in roles]
        pasts = [None if amaxes is None else amaxes[:, role] for role in roles]
        qa, scale_a = quantise(a, blocks[0], forms[0], recipe.power_of_two, pasts[0])
        qb, scale_b = quantise(b, blocks[1], forms[1], recipe.power_of_two, pasts[1])
        if hardware:
            return scaled_mm(qa, qb, scale_a, scale_b, recipe.scaling, roles[1] == WEIGHT, out)
        high = torch.promote_types(out, torch.float32)
        a, b = dequantise(qa, scale_a, blocks[0], high), dequantise(qb, scale_b, blocks[1], high)
        amd = recipe.onednn and high == torch.float32
        return (onednn.product(a, b, None) if amd else a @ b.t()).to(out)


def block_of(scaling: str, role: int, shape: tuple[int, int]) -> tuple[int, int]:
    """How many rows and columns of an operand (rows, contraction) have one scale."""
    rows, columns = max(shape[0], 1), max(shape[1], 1)
    tile = (128 if role == WEIGHT else 1), 128
    return {"tensor": (rows, columns), "row": (1, columns), "block": tile}[scaling]


def scaled_mm(
    qa: Tensor,
    qb: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    scaling: str,
    square: bool,
    out: torch.dtype,
) -> Tensor:
    """The same by the hardware. square: qb is a weight. Its layouts for scales: one each; (M, 1)
    and (1, N); tiles (rows, K/128) by columns; square blocks (K/128 filled up to a multiple of 4,
    N/128) by columns.
    """
    assert qb.shape[0] % 16 == 0 and qb.shape[1] % 16 == 0, (
        f"{tuple(qb.shape)}: not multiples of 16"
    )
    assert torch.float8_e4m3fn in (qa.dtype, qb.dtype), "there is no product of e5m2 with e5m2"
    kind, by_columns = (
        F.ScalingType,
        lambda s: s.t().clone(memory_format=torch.contiguous_format).t(),
    )
    kind_a = kind_b = {
        "tensor": kind.TensorWise,
        "row": kind.RowWise,
        "block": kind.BlockWise1x128,
    }[scaling]
    if scaling == "row":
        scale_b = scale_b.t()
    elif scaling == "block":
        scale_a, filled = by_columns(scale_a), F.pad(scale_b, (0, -scale_b.shape[1] % 4))
        kind_b, scale_b = (
            (kind.BlockWise128x128, filled.t()) if square else (kind_b, by_columns(scale_b))
        )
    return F.scaled_mm(qa, qb.t(), scale_a, kind_a, scale_b, kind_b, output_dtype=out)


def lacking(device: torch.device, scaling: str, shapes: list[tuple[int, int]]) -> str | None:
    """Why the hardware here cannot multiply such weights in FP8, in a sentence; None if it can."""
    cuda = device.type == "cuda" and torch.version.cuda is not None and hasattr(F, "scaled_mm")
    at = torch.cuda.get_device_capability(device) if cuda else (0, 0)
    version = tuple(map(int, torch.version.cuda.split("."))) if cuda else (0, 0)
    if scaling == "tensor" and at < (8, 9):
        return (
            "FP8 products need an NVIDIA GPU of capability 8.9 or more, and torch 2.11 or later"
            " for it"
        )
    if scaling != "tensor" and (at[0] != 9 or version < (12, 9)):
        return (
            f"FP8 products scaled by {scaling} need a Hopper GPU, and torch 2.11 or later for CUDA"
            " 12.9"
        )
    odd = [shape for shape in shapes if shape[0] % 16 or shape[1] % 16]
    return f"FP8 products need weights of sizes that 16 divides, not {odd[0]}" if odd else None


# ---- the layer -----------------------------------------------------------------------------------
class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, recipe: Recipe, amaxes, dtype):
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.recipe, ctx.amaxes = recipe, amaxes
        if not recipe.products[0]:
            return F.linear(x, weight.to(dtype), bias)
        y = product(x.flatten(0, -2), weight, (X, WEIGHT), recipe, dtype, amaxes)  # (M, N)
        return (y if bias is None else y + bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors  # (..., K), (N, K); dy (..., N)
        recipe, amaxes, needs, dx, dweight = (
            ctx.recipe,
            ctx.amaxes,
            ctx.needs_input_grad,
            None,
            None,
        )
        rows, x_rows = dy.flatten(0, -2), x.flatten(0, -2)  # (M, N), (M, K)
        if needs[0] and recipe.products[1]:
            dx = product(rows, weight.t(), (GRADIENT, WEIGHT), recipe, dy.dtype, amaxes).view(
                x.shape
            )
        elif needs[0]:
            dx = dy @ weight.to(dy.dtype)
        if needs[1] and recipe.products[2]:
            dweight = product(rows.t(), x_rows.t(), (GRADIENT, X), recipe, weight.dtype, amaxes)
        elif needs[1]:
            dweight = rows.t() @ x_rows
        return dx, dweight, rows.sum(0) if needs[2] else None, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recipe: Recipe,
    amaxes: Tensor | None = None,
) -> Tensor:
    """`F.linear` in FP8: x (..., K), weight (N, K), bias (N,) -> (..., N), of autocast's dtype if
    that is on. amaxes: the layer's history, for delayed scaling; nothing is entered while gradients
    are off."""
    on = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if on else x.dtype
    amaxes = amaxes if amaxes is None or torch.is_grad_enabled() else amaxes.clone()
    return Linear.apply(x, weight, bias, recipe, amaxes, dtype)


# ---- the model -----------------------------------------------------------------------------------
class State:
    """What convert leaves behind. emulated: why the hardware is not used, or None. histories
    (delayed): of each layer by name, the amax of x, W and dy in this step, then in those before: (1
    + history, 3).
    """

    def __init__(self, emulated: str | None, histories: dict[str, Tensor]):
        self.emulated, self.histories = emulated, histories

    def step(self, *groups: dist.ProcessGroup | None) -> None:
        """After each optimizer step: this step's amax enters the window. groups: of ranks that have
        the same layers or parts of them; all take the largest (12 bytes a layer), so trees are
        equal."""
        if self.histories:
            now = torch.stack([history[0] for history in self.histories.values()])  # (layers, 3)
            for group in filter(None, groups):
                dist.all_reduce(now, dist.ReduceOp.MAX, group)
            for history, row in zip(self.histories.values(), now):
                history.copy_(torch.stack([torch.zeros_like(row), row, *history[1:-1]]))

    def tree(self) -> dict[str, Tensor]:
        return {name: history[1:].clone() for name, history in self.histories.items()}

    def load(self, tree: dict[str, Tensor]) -> None:
        """Goes on from `tree`, with as many steps as both windows hold; a layer it lacks starts
        anew."""
        for name, history in self.histories.items():
            saved = tree.get(name, history[:0])[: len(history) - 1]
            history.zero_()[1 : 1 + len(saved)].copy_(saved)


def convert(
    model: nn.Module,
    device: torch.device,
    scaling: str = "block",
    delayed: bool = False,
    forward: bool = True,
    input_gradient: bool = True,
    weight_gradient: bool = True,
    gradient_format: str = "e4m3",
    power_of_two: bool = False,
    history: int = 16,
    hardware: str = "auto",
    only: tuple[str, ...] = ("blocks.",),
) -> State:
    """The modules with a `matmul` whose names begin with one of `only` now multiply in FP8 on
    `device`, in those of the three products that are on. hardware: auto, always or never."""
    for option, value, allowed in (
        ("scaling", scaling, ("tensor", "row", "block")),
        ("gradient_format", gradient_format, tuple(FORMATS)),
        ("hardware", hardware, ("auto", "always", "never")),
    ):
        if value not in allowed:
            raise ValueError(f"--fp8.{option}={value} is none of {', '.join(allowed)}")
    if delayed and scaling != "tensor":
        raise ValueError(f"--fp8.delayed goes with --fp8.scaling=tensor alone, not {scaling}")
    if history < 1:
        raise ValueError(
            f"--fp8.history={history} holds nothing; type 1 or more, as --fp8.history=16"
        )
    if not any(products := (forward, input_gradient, weight_gradient)):
        raise ValueError(
            "--fp8.*: all three products are off; leave one on, or type --precision=bf16"
        )
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "matmul") and n.startswith(only)}
    why = lacking(device, scaling, [tuple(m.weight.shape) for m in layers.values()])
    if hardware == "always" and why is not None:
        raise ValueError(f"{why}; leave --fp8.hardware=always out to emulate them")
    why = "--fp8.hardware=never" if hardware == "never" else why
    amd = onednn.faster(torch.float32, device)
    recipe = Recipe(scaling, products, gradient_format, power_of_two, why is None, amd)
    histories = {n: torch.zeros(1 + history, 3, device=device) for n in layers} if delayed else {}
    for name, module in layers.items():
        module.matmul = partial(linear, recipe=recipe, amaxes=histories.get(name))
    return State(why, histories)
