"""Linear layers that multiply 8-bit floating-point numbers.

    format  sign.exponent.mantissa   largest   smallest normal   subnormal   epsilon
    e4m3    1.4.3                        448   2^-6   1.6e-2     2^-9        2^-3     no inf
    e5m2    1.5.2                      57344   2^-14  6.1e-5     2^-16       2^-2     inf from 61440

A scale, by which we divide (Transformer Engine's is its inverse), makes each tensor fit:

    scale = amax(x) / largest        float32; power_of_two: rounded up to a power of two, so that
                                     dividing by it changes no mantissa
    q     = cast(clamp(x / scale))   saturate, then cast: the cast makes no inf and no NaN
    a·bᵀ  ≈ Σ_k (qa scale_a)(qb scale_b)

    matmul            contraction    operands (rows, contraction)
    forward  y  = x·Wᵀ     over K    x   (M, K) e4m3                       W  (N, K) e4m3
    input    dx = dy·W     over N    dy  (M, N) e4m3 (DeepSeek) or e5m2    Wᵀ (K, N) e4m3
    weight   dW = dyᵀ·x    over M    dyᵀ (N, M) the same                   xᵀ (K, M) e4m3

All three are a·bᵀ with the contraction last in both, as the hardware wants it (a row-major, bᵀ
column-major, K and N multiples of 16, never e5m2 with e5m2). Weights are the model's float32
parameters, cast for each use, and their gradients are float32. Everything else is as under bf16
autocast (precision/amp.py). The values that share a scale are, for each `scaling`:

    tensor   the whole operand (Micikevicius et al. 2022, 2209.05433)
    row      each row of an operand above: in y a token of x or an output of W, in dW one feature
             over all tokens
    block    1 x 128 along the contraction, weights 128 x 128 (DeepSeek-V3, 2412.19437, section 3.3)

Unlike int8, a float gives each value its own exponent, so an outlier costs the others little: e4m3
loses bits only of values 2^15 times smaller than the largest (e5m2: 2^30). A scale can be applied
after a sum only if it is constant along the sum. dW is a sum over tokens, so x and dy are quantised
anew, transposed: in blocks of 128 tokens, or in whole rows. DeepSeek saves x in FP8, so xᵀ is
rounded twice. We save autocast's x for backward: it is rounded once, and takes the memory of bf16.

`delayed` (by tensor; Transformer Engine's recipe) takes amax from the steps before; larger values
saturate. The scale is known before the tensor is, so a fused kernel reads the tensor once. Ours
reads it twice, so that inf and NaN of this step become NaN. A layer's history:

                          x    W    dy
    0  this step so far   .    .    .       grows with each micro-batch
    1  one step ago       .    .    .  ┐
    …                                  │    the window: the largest of a column makes the scale
    h  h steps ago        .    .    .  ┘    h = `history`
                                            after the step all rows move down by one: row 0 is 0
                                            again, row h is forgotten

We depart from the recipe twice. (1) While the window is empty (first step, weights that start at 0)
the tensor's own amax is used, not a scale of 1. From then on scales are constant within a step, so
micro-batches and recomputed activations have the same ones. (2) inf and NaN are not clamped away:
they turn every value with the same scale to NaN, and stay out of the history.

Emulation works on any device and gains nothing: quantise, dequantise, multiply in float32 (float64
for float64). Hopper's tensor cores keep about 14 bits of a sum, so DeepSeek moves it to float32
every 128 terms, as cuBLAS does by default; emulation sums in float32. Tensor-parallel ranks
quantise their shards. The scale of a tensor is each rank's own, or with `delayed` the largest of
all; the scales of rows and blocks are those of the full tensor where the split cuts none. An expert
multiplies the rows that its rank has been sent as one operand (parallel/expert.py): all replicas'
with ep = dp. With `delayed` it has the largest amax of all that hold it.

What Hopper wants, by torch's own source (not run on a GPU yet). `F.scaled_mm` has one signature in
torch 2.11 and 2.13. ScaledBlas.cpp and ScaledBlasUtils.cpp check:

    all     K % 16 = N % 16 = 0, a row-major, bᵀ column-major (capability 9), not both e5m2; a sum
            of no terms is 0. float32 results: no bias then, and we pass none
    tensor  two float32 scales of one element; capability 8.9 or more
    row     (M, 1) and (1, N), contiguous. On capability 9 cuBLASLt 12.9 writes float32; elsewhere
            CUTLASS did not before pull request 187569 (June 2026), so there we emulate
    block   capability 9 alone, cuBLASLt 12.9, e4m3 on both sides, float32 scales that begin a
            column each `stride` numbers: of 1 x 128 blocks (M, K/128), stride M; of 128 x 128
            blocks (K/128 filled up to a multiple of 4, N/128), stride that multiple. Before pull
            request 166752 a wrong filling gave wrong numbers in silence. Pairs: 1x128·1x128, and
            128x128 on one side, never on both. float32 results are in torch's tests

The compiler must not see into this product. torch 2.13 lowers `_scaled_mm_v2` to the older
`_scaled_mm`, which wants 1 x 128 scales transposed and no filling (pull requests 182527, 188996),
and may choose a Triton kernel; its shapes for the compiler round N/128 down, the kernel's round it
up. So `product` is one operator of its own, which a graph calls as it is.

Below, quantise and dequantise treat one tensor, matmul multiplies two, Linear is a layer's forward
and backward, and convert brings it into a model.

Neighbours: precision/onednn.py

Example:
    import torch
    import torch.nn.functional as F
    from precision.fp8 import convert
    class Linear(torch.nn.Linear):
        matmul = staticmethod(F.linear)
        def forward(self, x):
            return self.matmul(x, self.weight, self.bias)
    model = torch.nn.Sequential(Linear(256, 256), torch.nn.GELU(), Linear(256, 256))
    x = torch.randn(64, 256)
    exact = model(x)
    state = convert(model, x.device, only=("",))  # all layers; call state.step() after each step
    error = (model(x) - exact).norm() / exact.norm()
    assert 0.001 < error < 0.1
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from precision import onednn

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

# What an operand is in its layer: the columns of an amax history.
X, WEIGHT, GRADIENT = range(3)


class Recipe(NamedTuple):
    scaling: str  # tensor, row or block
    matmuls: tuple[bool, bool, bool]  # are y, dx, dW computed in FP8?
    gradient_format: str  # of dy: e4m3 or e5m2
    power_of_two: bool
    hardware: bool  # else emulated
    onednn: bool = False  # emulation multiplies by oneDNN, which is faster on AMD's CPUs


# ---- scale, saturate, cast -----------------------------------------------------------------------
def quantise(
    x: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    power_of_two: bool = False,
    amax_history: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (R, C) in float8, and a float32 scale for each block r x c: (R/r, C/c), rounded up.

    amax_history: (1 + history,), the amax of this step so far, then of the steps before. With it,
    the largest of the steps before replaces x's own amax, and x's own enters the first entry.
    """
    largest = torch.finfo(dtype).max
    # A transposed x is copied before the cast to float32: fewer bytes.
    x = x.contiguous().to(torch.promote_types(x.dtype, torch.float32))
    amax = block_amax(x, block)  # (R/r, C/c)
    if amax_history is not None and x.numel() > 0:
        expected = amax_history[1:].amax()
        # A single inf or NaN must not stay in the window for `history` steps.
        is_finite = amax.isfinite()
        own = torch.where(is_finite, amax, 0).amax()
        amax_history[0].copy_(torch.maximum(amax_history[0], own))
        # An empty window expects nothing yet. And one inf or NaN must make all that has its scale
        # NaN, as it would in a matmul of floats, so that the training loop can see it.
        amax = torch.where(is_finite & (expected > 0), expected, amax)
    # A block of zeros stays 0 / scale = 0. The bound is the smallest normal float32.
    scale = (amax / largest).clamp(min=2.0**-126)
    if power_of_two:
        scale = scale.log2().ceil().exp2()
    # Before version 2.13 torch casts what lies beyond 464 to NaN in e4m3, not to the largest.
    saturated = (x / expand(scale, block, x.shape)).clamp(-largest, largest)
    return saturated.to(dtype), scale


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest |x| of each block r x c: (R, C) -> (R/r, C/c), rounded up, float32."""
    rows, columns = x.shape
    r, c = block
    # Fill up the last blocks: zeros change no amax.
    filled = F.pad(x.abs(), (0, -columns % c, 0, -rows % r))
    blocks = filled.reshape(filled.shape[0] // r, r, filled.shape[1] // c, c)
    return blocks.amax((1, 3)).to(torch.float32)


def dequantise(q: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """q (R, C) in float8 times the scale of its block, in `dtype`."""
    # On a CPU a table of all 256 values gives the same numbers four times as fast as a cast.
    if q.device.type == "cpu":
        table = torch.arange(256, dtype=torch.uint8).view(q.dtype).to(dtype)
        codes = q.contiguous().view(torch.uint8).flatten().int()
        q = table.index_select(0, codes).view(q.shape)
    return q.to(dtype) * expand(scale, block, q.shape)


def expand(scale: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Each scale at every element of its block: (R/r, C/c) -> (R, C)."""
    rows, columns = scale.shape
    r, c = block
    whole_blocks = scale[:, None, :, None].expand(-1, r, -1, c).reshape(rows * r, columns * c)
    return whole_blocks[: shape[0], : shape[1]]


# ---- multiply ------------------------------------------------------------------------------------
def matmul(
    a: Tensor,
    b: Tensor,
    roles: tuple[int, int],
    recipe: Recipe,
    out_dtype: torch.dtype,
    amax_history: Tensor | None = None,
) -> Tensor:
    """a·bᵀ in FP8: (M, K), (N, K) -> (M, N) of `out_dtype`.

    roles: what a and b are in their layer, each X, WEIGHT or GRADIENT. amax_history:
    (1 + history, 3), a column for each role, for delayed scaling.
    """
    # Autocast would make the emulation's float32 product bf16.
    with torch.autocast(a.device.type, enabled=False):
        # The hardware has no float64 output.
        hardware = recipe.hardware and out_dtype != torch.float64
        n_rows = a.shape[0]
        if hardware:
            # The contraction (in dW the number of tokens) must be a multiple of 16, of 128 here
            # for blocks. Zeros change no sum.
            multiple = 128 if recipe.scaling == "block" else 16
            fill = -a.shape[1] % multiple
            # cuBLASLt has no product for another number of rows of 1 x 128 blocks. torch does not
            # check it; TransformerEngine observed it (common/gemm/cublaslt_gemm.cu, 2.8).
            fill_rows = -n_rows % 8 if recipe.scaling == "block" else 0
            if fill or fill_rows:  # F.pad copies even where it adds nothing
                a = F.pad(a, (0, fill, 0, fill_rows))
            if fill:
                b = F.pad(b, (0, fill))
        qa, scale_a, block_a = quantise_operand(a, roles[0], recipe, amax_history)
        qb, scale_b, block_b = quantise_operand(b, roles[1], recipe, amax_history)
        if hardware:
            b_is_weight = roles[1] == WEIGHT
            out = product(qa, qb, scale_a, scale_b, recipe.scaling, b_is_weight, out_dtype)
            return out[:n_rows]

        # Emulate: the same FP8 numbers, multiplied and summed in a wide dtype.
        wide = torch.promote_types(out_dtype, torch.float32)
        a = dequantise(qa, scale_a, block_a, wide)
        b = dequantise(qb, scale_b, block_b, wide)
        if recipe.onednn and wide == torch.float32:
            return onednn.matmul(a, b, None).to(out_dtype)
        return (a @ b.t()).to(out_dtype)


def quantise_operand(
    operand: Tensor, role: int, recipe: Recipe, amax_history: Tensor | None
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(q, scale, block) of an operand (rows, contraction), as the recipe has it for this role."""
    block = block_of(recipe.scaling, role, operand.shape)
    # Gradients have the widest range of the three; e5m2 trades precision for it.
    dtype = FORMATS[recipe.gradient_format if role == GRADIENT else "e4m3"]
    own_history = None if amax_history is None else amax_history[:, role]
    q, scale = quantise(operand, block, dtype, recipe.power_of_two, own_history)
    return q, scale, block


def block_of(scaling: str, role: int, shape: tuple[int, int]) -> tuple[int, int]:
    """How many rows and columns of an operand (rows, contraction) have one scale."""
    # An operand without elements has a block of one all the same.
    rows, columns = max(shape[0], 1), max(shape[1], 1)
    if scaling == "tensor":
        return rows, columns
    if scaling == "row":
        return 1, columns
    # DeepSeek's blocks: finer for x and dy, whose outliers differ from token to token.
    return (128, 128) if role == WEIGHT else (1, 128)


def scaled_mm(
    qa: Tensor,
    qb: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    scaling: str,
    b_is_weight: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """qa (M, K) times qbᵀ (K, N) by the hardware, which unscales: (M, N) of `out_dtype`.

    K is the contraction of whichever matmul this is. The layouts of scales that the hardware takes:
    for tensors one each; for rows (M, 1) and (1, N); for blocks 1 x 128 (rows, K/128),
    column-major; for a weight's square blocks (K/128 filled up to a multiple of 4, N/128),
    column-major.
    """
    assert qb.shape[0] % 16 == 0 and qb.shape[1] % 16 == 0, (
        f"{tuple(qb.shape)}: not multiples of 16"
    )
    assert torch.float8_e4m3fn in (qa.dtype, qb.dtype), "there is no product of e5m2 with e5m2"
    kinds = F.ScalingType
    if scaling == "tensor":
        kind_a = kind_b = kinds.TensorWise
    elif scaling == "row":
        kind_a = kind_b = kinds.RowWise
        scale_b = scale_b.t()  # (1, N)
    else:
        kind_a = kind_b = kinds.BlockWise1x128
        scale_a = column_major(scale_a)
        if b_is_weight:
            kind_b = kinds.BlockWise128x128
            scale_b = F.pad(scale_b, (0, -scale_b.shape[1] % 4)).t()
        else:
            scale_b = column_major(scale_b)
    # use_fast_accum stays off: the sum is moved to float32 every 128 terms.
    return F.scaled_mm(qa, qb.t(), scale_a, kind_a, scale_b, kind_b, output_dtype=out_dtype)


# The same as one operator, which torch.compile and selective checkpointing know by its name.
@torch.library.custom_op("nanoscale::scaled_mm", mutates_args=())
def product(
    qa: Tensor,
    qb: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    scaling: str,
    b_is_weight: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return scaled_mm(qa, qb, scale_a, scale_b, scaling, b_is_weight, out_dtype)


@product.register_fake
def product_shape(qa, qb, scale_a, scale_b, scaling, b_is_weight, out_dtype):
    return qa.new_empty(qa.shape[0], qb.shape[0], dtype=out_dtype)


def column_major(scale: Tensor) -> Tensor:
    # Of the same shape: .t() alone would swap it.
    return scale.t().clone(memory_format=torch.contiguous_format).t()


def missing_hardware(
    device: torch.device, scaling: str, gradient_format: str, shapes: list[tuple[int, int]]
) -> str | None:
    """Why the hardware here cannot multiply such weights in FP8, in a sentence; None if it can."""
    capability = (0, 0)
    version = (0, 0)
    if device.type == "cuda" and torch.version.cuda is not None and hasattr(F, "scaled_mm"):
        capability = torch.cuda.get_device_capability(device)
        version = tuple(map(int, torch.version.cuda.split(".")))
    # FP8 units came with Ada (8.9). dW is float32: for scales of rows and blocks every torch from
    # 2.11 on writes that on Hopper alone (9), from CUDA 12.9.
    if scaling == "tensor" and capability < (8, 9):
        return (
            "FP8 products need an NVIDIA GPU of capability 8.9 or more, and torch 2.11 or later"
            " for it"
        )
    if scaling != "tensor" and (capability[0] != 9 or version < (12, 9)):
        return (
            f"FP8 products scaled by {scaling} need a Hopper GPU, and torch 2.11 or later for CUDA"
            " 12.9"
        )
    if scaling == "block" and gradient_format == "e5m2":
        return "FP8 products scaled by block need e4m3 on both sides"
    for shape in shapes:
        if shape[0] % 16 or shape[1] % 16:
            return f"FP8 products need weights of sizes that 16 divides, not {shape}"
    return None


# ---- the layer -----------------------------------------------------------------------------------
class Linear(torch.autograd.Function):
    """y = x·Wᵀ + b and its gradients; each of the three matmuls in FP8, or in x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, recipe: Recipe, amax_history, dtype):
        x = x.to(dtype)
        if bias is not None:
            bias = bias.to(dtype)
        # The float32 weight is kept, not its FP8 copy: backward scales its transpose anew.
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        ctx.amax_history = amax_history
        y_in_fp8, _, _ = recipe.matmuls
        if not y_in_fp8:
            return F.linear(x, weight.to(dtype), bias)
        x_rows = x.reshape(-1, x.shape[-1])  # (M, K)
        y = matmul(x_rows, weight, (X, WEIGHT), recipe, dtype, amax_history)  # (M, N)
        if bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors  # (..., K), (N, K); dy (..., N)
        recipe = ctx.recipe
        amax_history = ctx.amax_history
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        _, dx_in_fp8, dw_in_fp8 = recipe.matmuls
        dx = dweight = dbias = None
        dy_rows = dy.reshape(-1, dy.shape[-1])  # (M, N)
        x_rows = x.reshape(-1, x.shape[-1])  # (M, K)

        # dx (..., K): a sum over outputs, so the weight is transposed.
        if needs_x and dx_in_fp8:
            roles = (GRADIENT, WEIGHT)
            dx = matmul(dy_rows, weight.t(), roles, recipe, dy.dtype, amax_history)
            dx = dx.view(x.shape)
        elif needs_x:
            dx = dy @ weight.to(dy.dtype)

        # dW (N, K): a sum over tokens, so both operands are transposed.
        if needs_weight and dw_in_fp8:
            roles = (GRADIENT, X)
            dweight = matmul(dy_rows.t(), x_rows.t(), roles, recipe, weight.dtype, amax_history)
        elif needs_weight:
            dweight = dy_rows.t() @ x_rows

        if needs_bias:
            dbias = dy_rows.sum(0)
        # autograd casts each to the dtype of its input: weights get float32.
        return dx, dweight, dbias, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recipe: Recipe,
    amax_history: Tensor | None = None,
) -> Tensor:
    """`F.linear` in FP8: x (..., K), weight (N, K), bias (N,) -> (..., N).

    The output has autocast's dtype if that is on, else x's; float64 stays, as autocast leaves it.
    amax_history: (1 + history, 3), the layer's, for delayed scaling; None for the other scalings.
    """
    dtype = x.dtype
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    # What an evaluation sees must not move the scales of training.
    if amax_history is not None and not torch.is_grad_enabled():
        amax_history = amax_history.clone()
    return Linear.apply(x, weight, bias, recipe, amax_history, dtype)


# ---- the model -----------------------------------------------------------------------------------
class State:
    """What convert leaves behind: why the hardware is not used, and the amax of steps before.

    why_emulated: that sentence, or None where the hardware multiplies. histories: by name of the
    layer (1 + history, 3), the amax of x, W and dy in this step, then in the steps before; empty
    without delayed scaling.
    """

    def __init__(self, why_emulated: str | None, histories: dict[str, Tensor]):
        self.why_emulated = why_emulated
        self.histories = histories

    def step(
        self,
        replicas: dist.ProcessGroup | None = None,
        tp: dist.ProcessGroup | None = None,
        others: dict[str, dist.ProcessGroup | None] | None = None,
    ) -> None:
        """After each training step, also a skipped one: its amax enters the window.

        replicas: ranks that have the same layers; tp: shards of them; others: name of a layer that
        some of the replicas have alone -> these, or None. They all take the largest amax (12 bytes
        a layer), so their states are equal.
        """
        layers = {}  # replicas -> histories; in the same order on all ranks
        for name, history in self.histories.items():
            layers.setdefault((others or {}).get(name, replicas), []).append(history)
        for group, histories in layers.items():
            newest = torch.stack([history[0] for history in histories])  # (layers, 3)
            for ranks in (group, tp):
                if ranks is not None:
                    dist.all_reduce(newest, dist.ReduceOp.MAX, ranks)
            # The layers hold these tensors: change them in place.
            for history, amax in zip(histories, newest):
                history.copy_(torch.stack([torch.zeros_like(amax), amax, *history[1:-1]]))

    def state_dict(self) -> dict[str, Tensor]:
        """The window of each layer, (history, 3), newest first."""
        return {name: history[1:].clone() for name, history in self.histories.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Takes the newest steps that fit into the window. A layer without an entry starts anew."""
        for name, history in self.histories.items():
            saved = state_dict.get(name, history[:0])[: len(history) - 1]
            history.zero_()
            history[1 : 1 + len(saved)].copy_(saved)


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
    """Makes the model's linear layers multiply in FP8 on `device`.

    Those are the modules that have an attribute `matmul` and whose names begin with one of `only`.
    torch's nn.Linear has none; make it one: `matmul = staticmethod(F.linear)`, and a forward that
    returns self.matmul(x, self.weight, self.bias). forward, input_gradient, weight_gradient: which
    of the three matmuls are in FP8. history: steps that `delayed` remembers. hardware: auto, always
    or never. Raises ValueError for options that are not allowed, for hardware="always" where there
    is none, and where no module is found.
    """
    check_options(scaling, delayed, gradient_format, history, hardware)
    matmuls = (forward, input_gradient, weight_gradient)
    if not any(matmuls):
        raise ValueError(
            "--fp8.*: all three products are off; leave one on, or type --precision=bf16"
        )
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "matmul") and name.startswith(only):
            layers[name] = module

    if not layers:
        raise ValueError(f"no module below {', '.join(only)} has a matmul to replace")

    # One layer that the hardware cannot multiply makes all of them emulated.
    shapes = [tuple(module.weight.shape) for module in layers.values()]
    why_emulated = missing_hardware(device, scaling, gradient_format, shapes)
    if hardware == "always" and why_emulated is not None:
        raise ValueError(f"{why_emulated}; leave --fp8.hardware=always out to emulate them")
    if hardware == "never":
        why_emulated = "--fp8.hardware=never"

    recipe = Recipe(
        scaling,
        matmuls,
        gradient_format,
        power_of_two,
        hardware=why_emulated is None,
        onednn=onednn.faster(torch.float32, device),
    )
    histories = {}
    if delayed:
        histories = {name: torch.zeros(1 + history, 3, device=device) for name in layers}
    for name, module in layers.items():
        module.matmul = partial(linear, recipe=recipe, amax_history=histories.get(name))
    return State(why_emulated, histories)


def check_options(
    scaling: str, delayed: bool, gradient_format: str, history: int, hardware: str
) -> None:
    """Raises ValueError with a sentence that says what to type."""
    for option, value, allowed in (
        ("scaling", scaling, ("tensor", "row", "block")),
        ("gradient_format", gradient_format, tuple(FORMATS)),
        ("hardware", hardware, ("auto", "always", "never")),
    ):
        if value not in allowed:
            raise ValueError(f"--fp8.{option}={value} is none of {', '.join(allowed)}")
    # A window of amaxes holds one number for each tensor.
    if delayed and scaling != "tensor":
        raise ValueError(f"--fp8.delayed needs --fp8.scaling=tensor, not {scaling}")
    if history < 1:
        raise ValueError(
            f"--fp8.history={history} holds nothing; type 1 or more, as --fp8.history=16"
        )


if __name__ == "__main__":
    x = torch.randn(256, 256)
    back = dequantise(*quantise(x, (1, 128), FORMATS["e4m3"]), (1, 128), torch.float32)
    print(f"e4m3, a scale for 128 values: error {(back - x).norm() / x.norm():.1%} of the norm")
