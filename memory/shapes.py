"""A model's parameters by name and shape, and the bytes of one number of each.

gpt_shapes lists the parameters of model.py, in its order. A number takes, by --precision:

    name     weight  gradient  master  state  with Adam  what it is
    fp64     8       8         -       8      32         ours
    fp32     4       4         -       4      16         ours
    bf16     4       4         -       4      16         ours: autocast over fp32 weights
    fp16     4       4         -       4      16         the same with loss scaling
    fp8      4       4         -       4      16         the same with e4m3 products
    bf16_sr  2       2         -       4      12         ours: stochastic rounding, no master
    mixed    2       2         4       4      16         Rajbhandari et al. 2020 (1910.02054)
    texts    2       2         -       4      12         a tutorial, which forgets the master

Neighbours: precision/amp.py

Example:
    import math
    from memory.shapes import bytes_of, gpt_shapes
    shapes = gpt_shapes(n_layer=12, n_embd=768, vocab_size=50304, arch="gpt2")
    count = sum(math.prod(shape) for _, shape in shapes.values())
    weight, gradient, master, number = bytes_of("bf16")
    print(f"GPT-2 has {count:,} parameters, with Adam {weight + gradient + 2 * number} bytes each")
    assert 124e6 < count < 125e6
"""

import math
from dataclasses import dataclass

from precision.amp import PRECISIONS, Precision

# Accountings of others: bytes of a weight, its gradient, its master copy, one number of state.
PUBLISHED = {"mixed": (2, 2, 4, 4), "texts": (2, 2, 0, 4)}
ACCOUNTINGS = (*PRECISIONS, *PUBLISHED)

# Architectures whose MLP has a gate: a third matrix, and twice as many numbers of its width.
GATED = ("llama", "qwen3")
# What a norm of an architecture has.
NORM_PARTS = {"modern": (), "gpt2": ("weight", "bias")} | dict.fromkeys(
    ("track3", "llama", "qwen3"), ("weight",)
)

# Name -> (embedding | head | matrix | scalar, shape).
Shapes = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Experts:
    """Mixture of experts: the fields of this name in settings/fields.py.

    row_block: what divides the rows of each expert, where they are many: layers.moe.BLOCK on a
    CPU, 1 on a GPU. ep: ranks that share out the experts, each of which gets as many rows.
    """

    n_expert: int
    n_expert_active: int = 2
    n_shared_expert: int = 0
    expert_width: int | None = None
    moe_every: int = 1
    row_block: int = 1
    ep: int = 1

    def are_in(self, layer: int) -> bool:
        return (layer + 1) % self.moe_every == 0

    def width(self, n_embd: int, arch: str, mlp_width: int | None = None) -> int:
        """The width between an expert's matrices, as GPTConfig in model.py has it."""
        if self.expert_width is not None:
            return self.expert_width
        of_token = self.n_expert_active + self.n_shared_expert
        return -(-mlp_size(n_embd, arch, mlp_width) // (8 * of_token)) * 8

    def rows(self, tokens: float) -> float:
        """How many rows go through a rank's experts, where each rank has so many tokens."""
        rows = self.n_expert_active * tokens
        here = self.n_expert // self.ep
        if rows < 2 * self.row_block * here:
            return rows
        return -(-(rows + here * (self.row_block - 1)) // self.row_block) * self.row_block


def gpt_shapes(
    n_layer: int,
    n_embd: int,
    vocab_size: int,
    block_size: int = 1024,
    arch: str = "modern",
    n_head: int = 1,
    n_kv_head: int | None = None,
    head_dim: int | None = None,
    mlp_width: int | None = None,
    qkv_bias: bool | None = None,
    experts: Experts | None = None,
    tied: bool | None = None,
) -> Shapes:
    """The parameters of model.py, in its order.

    arch `gpt2`: with a tied head, biases, gains and learned positions; `track3`: with biases, gains
    and a norm of the embedding; `llama`: with gains and a gate in the MLP; `qwen3`: with gains for
    queries and keys, too. head_dim, mlp_width, qkv_bias, tied: as in settings/fields.py.
    """
    C = n_embd
    V = vocab_size
    head_dim = head_dim or C // n_head
    kv = head_dim * (n_kv_head or n_head)
    has_bias = arch in ("gpt2", "track3")
    qkv_bias = has_bias if qkv_bias is None else qkv_bias
    shapes = {"embed.weight": ("embedding", (V, C))}
    if arch == "gpt2":
        shapes["positions.weight"] = "embedding", (block_size, C)

    def norm(name: str, size: int = C) -> None:
        for part in NORM_PARTS[arch]:
            shapes[f"{name}.{part}"] = "scalar", (size,)

    def linear(name: str, shape: tuple[int, int], has_bias: bool = has_bias) -> None:
        shapes[f"{name}.weight"] = "matrix", shape
        if has_bias:
            shapes[f"{name}.bias"] = "scalar", shape[:1]

    def mlp(name: str, width: int) -> None:
        if arch in GATED:
            linear(f"{name}.gate", (width, C))
        linear(f"{name}.fc", (width, C))
        linear(f"{name}.proj", (C, width))

    if arch == "track3":
        norm("embed_norm")
    for i in range(n_layer):
        norm(f"blocks.{i}.attn_norm")
        linear(f"blocks.{i}.attn.q", (n_head * head_dim, C), qkv_bias)
        linear(f"blocks.{i}.attn.k", (kv, C), qkv_bias)
        linear(f"blocks.{i}.attn.v", (kv, C), qkv_bias)
        linear(f"blocks.{i}.attn.proj", (C, n_head * head_dim))
        if arch == "qwen3":
            norm(f"blocks.{i}.attn.q_norm", head_dim)
            norm(f"blocks.{i}.attn.k_norm", head_dim)
        norm(f"blocks.{i}.mlp_norm")
        if experts is None or not experts.are_in(i):
            mlp(f"blocks.{i}.mlp", mlp_size(C, arch, mlp_width))
            continue
        width = experts.width(C, arch, mlp_width)
        linear(f"blocks.{i}.mlp.router", (experts.n_expert, C), False)
        for e in range(experts.n_expert):
            mlp(f"blocks.{i}.mlp.experts.{e}", width)
        if experts.n_shared_expert:
            mlp(f"blocks.{i}.mlp.shared", experts.n_shared_expert * width)
    norm("final_norm")
    # A tied head is the embedding, so it is no parameter of its own.
    if not is_tied(arch, tied):
        shapes["head.weight"] = "head", (V, C)
    if arch == "track3":
        shapes["head.bias"] = "scalar", (V,)
    return shapes


def is_tied(arch: str, tied: bool | None = None) -> bool:
    return arch == "gpt2" if tied is None else tied


def mlp_size(n_embd: int, arch: str, mlp_width: int | None = None) -> int:
    """The width between the MLP's matrices, as GPTConfig in model.py has it."""
    if mlp_width is not None:
        return mlp_width
    if arch in GATED:
        return -(-8 * n_embd // (3 * 64)) * 64
    return 4 * n_embd


def even_shapes(params: float, world: int) -> Shapes:
    """`params` parameters of unknown shapes, in `world` equal parts."""
    return {f"part {i}": ("matrix", (math.ceil(params / world),)) for i in range(world)}


# ---- bytes of one number -----------------------------------------------------------------------
def bytes_of(precision: str) -> tuple[int, int, int, int]:
    """Bytes of a weight, its gradient, its master copy, one number of state."""
    if precision in PUBLISHED:
        return PUBLISHED[precision]
    row = PRECISIONS[precision]
    return row.weights.itemsize, row.weights.itemsize, 0, row.state.itemsize


def heading(precision: str) -> str:
    """What this accounting counts, in a line."""
    weight, gradient, master, number = bytes_of(precision)
    with_adam = weight + gradient + master + 2 * number
    how = {"mixed": "as the ZeRO paper counts", "texts": "as a tutorial counts"}
    state = "float32"
    if precision not in PUBLISHED:
        row = PRECISIONS[precision]
        state = str(row.state).removeprefix("torch.")
        how = {precision: "as --precision has it"}
        if has_copies(row):
            how[precision] = "autocast over float32 weights"
        if row.fp8_blocks:
            how[precision] = "e4m3 products, " + how[precision]
        if row.stochastic:
            how[precision] = "rounded by chance"
    copy = f"{master} its master copy, " if master else ""
    return (
        f"{precision}, {how[precision]}: {weight} bytes a weight, {gradient} its gradient, {copy}"
        f"state in {state} ({with_adam} with Adam)"
    )


def has_copies(row: Precision) -> bool:
    """Does autocast copy weights?"""
    return row.products != row.weights


def is_expert(name: str) -> bool:
    return ".experts." in name


def chunk_part(loss_chunk: int) -> int:
    """How many tokens of a chunk go through the loss at once."""
    return math.ceil(loss_chunk / 8)


if __name__ == "__main__":
    shapes = gpt_shapes(n_layer=1, n_embd=768, vocab_size=50304)
    print("the parameters of a GPT of one layer")
    for name, (kind, shape) in shapes.items():
        print(f"    {name:24} {kind:10} {' x '.join(map(str, shape)):12} {math.prod(shape):12,}")
