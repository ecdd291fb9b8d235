"""Bytes of activations: what forward keeps for backward, and what backward adds for a while.

For b x s tokens, L layers, h channels, V words:

    34 s b h L                Korthikanti et al. 2022 (2205.05198), mixed precision, without the s²
                              of plain attention, and without logits
    20 s b h L                a tutorial: 7B, b = 4, s = 2048 make its 105.5 GB; the primary
                              source says 36.5 of activations, not 21.5
    b s (k h L + r h + l V)   ours, counted by autograd's saved tensors: k, r and l are in
                              ACTIVATION_BYTES. --activation_checkpoint takes k from
                              CHECKPOINTED_BYTES; the peak of backward then adds what it computes
                              again of one block or segment, and the temporaries inside a block.
                              With --loss_chunk the words are those of an eighth of a chunk

In a layer with E experts of width w, k of a token (layers/moe.py), R rows = k b s go through them,
on a CPU up to 63 E more. It keeps, with p bytes of an operand and q of a score, beside attention:

    p R (w + h), with a gate p R (2 w + h)      what proj's input comes from, and its result
    b s (2 q E + (16 + q + p) k) + 8 R          logits and scores; choices, rows, gates
    4 b s h                                     the router's input, where x is bfloat16

With --ep=N a rank's experts get R rows as before (loads are taken as even), but from all N ranks,
so it keeps p R h more (they are computed nowhere here), and has p R h more in backward, 2 p R h
where a block is computed again.

Measured on a CPU, this is within 5 % (tests/test_estimate.py), but for tensors of less than 2 MiB,
which are kept where larger ones are computed again (layers/recompute.py). FP8's experts hold up to
a tenth more.

Neighbours: memory/flags.py, memory/shapes.py, precision/amp.py

Example:
    from memory.activations import activation_bytes
    size = dict(tokens=4096, n_layer=12, n_embd=768, vocab_size=50304, loss_chunk=4096)
    kept = activation_bytes("bf16", **size)
    less = activation_bytes("bf16", **size, activation_checkpoint="full")
    print(f"activations: {kept / 1e9:.2f} GB, {less / 1e9:.2f} where blocks are computed again")
    assert less < kept / 2
"""

from dataclasses import dataclass

from memory.flags import check
from memory.shapes import ACCOUNTINGS, GATED, PUBLISHED, Experts, chunk_part, has_copies, mlp_size
from precision.amp import PRECISIONS

# (arch, bytes of a weight, bytes of a matmul's operand) -> (k, r, l) of the formula above, with an
# MLP of width 4h. l also covers the logits' softmax.
ACTIVATION_BYTES = {
    ("modern", 8, 8): (80, 18, 16),
    ("modern", 4, 4): (40, 9, 8),
    ("modern", 4, 2): (24, 6, 8),
    ("gpt2", 8, 8): (80, 16, 8),
    ("gpt2", 4, 4): (40, 8, 4),
    ("gpt2", 4, 2): (24, 6, 4),
    ("track3", 8, 8): (80, 42, 24),
    ("track3", 4, 4): (40, 21, 12),
    ("track3", 4, 2): (24, 18, 12),
    ("llama", 8, 8): (112, 25, 8),
    ("llama", 4, 4): (56, 12, 4),
    ("llama", 4, 2): (32, 10, 4),
    ("qwen3", 8, 8): (112, 25, 8),
    ("qwen3", 4, 4): (56, 12, 4),
    ("qwen3", 4, 2): (32, 10, 4),
    ("modern", 2, 2): (20, 3, 8),
    ("gpt2", 2, 2): (20, 4, 4),
    ("track3", 2, 2): (20, 9, 12),
    ("llama", 2, 2): (28, 6, 4),
    ("qwen3", 2, 2): (28, 6, 4),
}
# In place of k with activation checkpointing: full, attention, mlp, selective. The fifth number is
# the gradients inside a block and what layers/recompute.py computes again of it in backward (and
# what track3's norm of the embedding keeps).
CHECKPOINTED_BYTES = {
    ("modern", 8, 8): (8, 48, 48, 88, 81),
    ("modern", 4, 4): (4, 24, 24, 44, 40),
    ("modern", 4, 2): (4, 16, 16, 24, 27),
    ("gpt2", 8, 8): (8, 48, 48, 88, 77),
    ("gpt2", 4, 4): (4, 24, 24, 44, 38),
    ("gpt2", 4, 2): (4, 16, 16, 24, 23),
    ("track3", 8, 8): (8, 48, 48, 88, 98),
    ("track3", 4, 4): (4, 24, 24, 44, 49),
    ("track3", 4, 2): (4, 16, 16, 24, 37),
    ("llama", 8, 8): (8, 80, 48, 120, 107),
    ("llama", 4, 4): (4, 40, 24, 60, 53),
    ("llama", 4, 2): (4, 24, 16, 32, 31),
    ("qwen3", 8, 8): (8, 80, 48, 120, 108),
    ("qwen3", 4, 4): (4, 40, 24, 60, 54),
    ("qwen3", 4, 2): (4, 24, 16, 32, 32),
    ("modern", 2, 2): (2, 12, 12, 22, 20),
    ("gpt2", 2, 2): (2, 12, 12, 22, 19),
    ("track3", 2, 2): (2, 12, 12, 22, 25),
    ("llama", 2, 2): (2, 20, 12, 30, 27),
    ("qwen3", 2, 2): (2, 20, 12, 30, 27),
}


def activation_bytes(
    precision: str,
    tokens: int,
    n_layer: int,
    n_embd: int,
    vocab_size: int = 0,
    arch: str = "modern",
    activation_checkpoint: str = "none",
    tp: int = 1,
    loss_chunk: int | None = None,
    in_backward: bool = True,
    plain_attention: tuple[int, int] | None = None,
    q_width: int | None = None,
    kv_width: int | None = None,
    mlp_width: int | None = None,
    experts: Experts | None = None,
) -> float:
    """Bytes that one micro-batch of `tokens` = b x s keeps for backward, and holds in it at most.

    By 34 s b h, the text's 20 s b h, or our own count. activation_checkpoint: as in
    memory/activation_checkpoint.py; tp: ranks that share out what full_sharded keeps; loss_chunk:
    the setting, None for all tokens at once. in_backward: False for what forward leaves.
    plain_attention: (heads, tokens of a sequence) of --attention=plain, which keeps probabilities.
    q_width, kv_width: of all heads of queries, and of keys, None for n_embd; mlp_width: the
    setting. Others' accountings do not ask for these three, and know no experts.
    Offloaded activations are on the device while they are used, two blocks at a time. Raises
    ValueError for an unknown precision or activation_checkpoint.
    """
    check("precision", precision, ACCOUNTINGS)
    if experts is not None and precision in PUBLISHED:
        raise ValueError(
            f"precision={precision} counts no activations of experts; type --precision=bf16, or "
            "leave --batch out"
        )
    L = n_layer
    how, K = step_of_layers(activation_checkpoint)
    if K < 1 or (how == "segments" and K > L):
        raise ValueError(
            f"activation_checkpoint={activation_checkpoint} takes 1 to {L}, the layers"
        )
    if how == activation_checkpoint:
        # every_K is a pattern, not a name.
        check("activation_checkpoint", how.replace("_K", "_"), CHECKPOINTS)
    per_channel, per_word, dense = layer_bytes(
        precision, n_embd, arch, q_width, kv_width, mlp_width
    )
    sparse = dense
    if experts is not None:
        sparse = with_experts(dense, precision, tokens, n_embd, arch, mlp_width, experts)
    layers = []
    for i in range(L):
        layers.append(sparse if experts is not None and experts.are_in(i) else dense)

    # Bytes of a token: what each layer keeps, and what there is when backward is in it.
    kept = [kept_of_layer(layer, i, how, K, tp) for i, layer in enumerate(layers)]
    if how == "segments":
        # The first layer of each segment.
        kept = [x if i in (-(-s * L // K) for s in range(K)) else 0 for i, x in enumerate(kept)]
    if plain_attention is not None and precision in PRECISIONS:
        number = PRECISIONS[precision].products.itemsize * n_embd
        for i in range(L):
            if how in ("none", "mlp") or (how == "every" and i % K):
                kept[i] += number * kept_by_plain_attention(*plain_attention, n_embd, arch)

    # What the head keeps is gone when backward comes to the blocks.
    words = per_word * vocab_size
    if loss_chunk is not None and tokens:
        words *= min(1, chunk_part(loss_chunk) / tokens)
    most = sum(kept) + per_channel * n_embd + words
    if in_backward:
        left = 0
        for i in range(L):
            left += kept[i]
            most = max(most, left + again_in_layer(layers, i, how, K, tp))
    return tokens * most


@dataclass(frozen=True)
class LayerBytes:
    """Of a token: what a layer keeps by each --activation_checkpoint, and the temporaries in it."""

    kept: float
    full: float
    attention: float
    mlp: float
    selective: float
    inside: float
    # The same in what was computed again: a block, or its MLP alone.
    inside_again: float
    inside_mlp: float


# What --activation_checkpoint may be, K a number.
CHECKPOINTS = (
    *("none", "full", "full_sharded", "full_offload", "every_K", "segments_K"),
    *("attention", "mlp", "selective", "offload"),
)


def kept_of_layer(x: LayerBytes, i: int, how: str, K: int, tp: int) -> float:
    """Bytes of a token that layer i keeps, or a segment that begins with it."""
    kept = {
        "none": x.kept,
        "full_sharded": x.full / tp,
        "full_offload": 0,
        "every": x.full if i % K == 0 else x.kept,
        "attention": x.attention,
        "mlp": x.mlp,
        "selective": x.selective,
        "offload": 0,
    }
    return kept.get(how, x.full)


def again_in_layer(layers: list[LayerBytes], i: int, how: str, K: int, tp: int) -> float:
    """Bytes of a token that backward holds in layer i, beside what layers up to i keep."""
    x = layers[i]
    L = len(layers)
    again = 0
    if how == "full" or (how == "every" and i % K == 0):
        again = x.kept - x.full
    elif how == "full_sharded":
        again = x.kept - x.full / tp
    elif how == "full_offload":
        again = x.kept + x.full
    elif how == "segments":
        segment = [y for j, y in enumerate(layers[: i + 1]) if j * K // L == i * K // L]
        again = sum(y.kept for y in segment) - x.full
    elif how == "mlp":
        # Its input is computed again, too.
        again = x.kept - x.mlp + x.full
    elif how == "selective":
        again = max(0, x.kept - x.selective)
    elif how == "offload":
        # The layer before it is on its way.
        again = x.kept + layers[max(0, i - 1)].kept
    if how == "mlp":
        return again + x.inside_mlp
    is_again = how not in ("none", "attention", "offload") and not (how == "every" and i % K)
    return again + (x.inside_again if is_again else x.inside)


def layer_bytes(
    precision: str,
    n_embd: int,
    arch: str,
    q_width: int | None,
    kv_width: int | None,
    mlp_width: int | None,
) -> tuple[float, float, LayerBytes]:
    """r and l of the formula above, and a layer's bytes of a token, for these widths."""
    C = n_embd
    if precision in PUBLISHED:
        # At 2 bytes a number attention drops q, k, v and its output (8 of the 34), mlp two tensors
        # of width 4C (16). selective keeps the block's input and all products (22).
        k = {"mixed": 34, "texts": 20}[precision]
        return 0, 0, LayerBytes(k * C, 2 * C, min(26, k) * C, 18 * C, min(22, k) * C, 0, 0, 0)
    row = PRECISIONS[precision]
    key = arch, row.weights.itemsize, row.products.itemsize
    per_layer, per_channel, per_word = ACTIVATION_BYTES[key]
    full, attention, mlp, selective, inside = CHECKPOINTED_BYTES[key]

    # The tables' widths are n_embd and 4 n_embd: what others are more, in bytes.
    number = row.products.itemsize
    more_heads = number * (2 * (q_width or C) + 2 * (kv_width or C) - 4 * C)
    wider = number * (mlp_size(C, arch, mlp_width) - 4 * C)
    n_kept = 2 if arch in GATED else 1
    inside = inside * C + (n_kept + 1) * wider
    return (
        per_channel,
        per_word,
        LayerBytes(
            kept=per_layer * C + more_heads + n_kept * wider,
            full=full * C,
            attention=attention * C + n_kept * wider,
            mlp=mlp * C + more_heads,
            selective=selective * C + more_heads + n_kept * wider,
            inside=inside,
            inside_again=inside,
            inside_mlp=inside,
        ),
    )


def with_experts(
    dense: LayerBytes,
    precision: str,
    tokens: float,
    n_embd: int,
    arch: str,
    mlp_width: int | None,
    experts: Experts,
) -> LayerBytes:
    """A layer whose MLP makes room for experts (layers/moe.py)."""
    C = n_embd
    row = PRECISIONS[precision]
    number = row.products.itemsize
    wide = row.state.itemsize
    n_kept = 2 if arch in GATED else 1
    E = experts.n_expert
    k = experts.n_expert_active
    rows = experts.rows(tokens) / tokens if tokens else k  # of a token
    width = experts.width(C, arch, mlp_width)
    shared = experts.n_shared_expert * width

    # Shared experts are an MLP of another width.
    narrower = number * (shared - mlp_size(C, arch, mlp_width))
    # Logits, scores, the order of choices; slots; gates, their sum, log Z; the rows' tokens.
    of_router = 2 * wide * E + (16 + wide + number) * k + 2 * wide + 8 * rows
    if row.weights.itemsize < wide:
        of_router += wide * C  # its input
    more = of_router + rows * number * (n_kept * width + C) + n_kept * narrower
    # Of all products `selective` keeps the router's alone, and those of shared experts.
    selective = dense.selective + n_kept * narrower + wide * E
    if not shared:
        selective -= number * C
    residual = row.weights.itemsize * C
    cast = number * C if has_copies(row) else 0
    inside = inside_experts(residual, cast, number, rows * width, rows * C, shared, n_kept)
    inside = max(dense.inside + (n_kept + 1) * narrower, inside)
    # Rows that came from others are computed by nobody here again; they, or their gradients, are
    # there once more where they arrive.
    travelling = number * rows * C if experts.ep > 1 else 0
    more += travelling
    inside += travelling
    # The activation's forward, beside norm(x), its gradient, and casts.
    forward = 2 * number * rows * width + 2 * residual + 2 * cast
    return LayerBytes(
        kept=dense.kept + more,
        full=dense.full,
        attention=dense.attention + more,
        mlp=dense.mlp,
        selective=selective,
        inside=inside,
        inside_again=max(inside, forward) + travelling,
        # Nobody forgets the rows there.
        inside_mlp=inside + number * rows * C + residual + cast,
    )


def inside_experts(
    residual: float,
    cast: float,
    number: int,
    inner: float,
    outer: float,
    shared: int,
    n_kept: int,
) -> float:
    """Bytes of a token that the backward of experts holds at most, beside what forward keeps.

    residual, cast: bytes of x, and of autocast's copy; inner, outer: numbers of a token's rows
    between the matrices of its experts, and around them; shared: the width of shared experts.
    """
    most = max(
        # In backward's order: a product of rows with rows, for the gradients of gates.
        residual + cast + 2 * number * outer,
        # proj, whose input is computed again.
        residual + 2 * number * inner,
        # The activation, when proj's result has gone.
        residual + number * ((n_kept + 1) * inner - outer),
        # fc, and a gate: the rows once more, two gradients of them, and their sum.
        3 * residual + cast + number * (3 * outer - 2 * inner) if n_kept == 2 else 0,
    )
    if shared:
        # Their backward is over, and has left norm(x) and gradients of it.
        most += (1 + n_kept) * residual + cast - n_kept * number * shared
    return most


def kept_by_plain_attention(heads: int, length: int, n_embd: int, arch: str) -> float:
    """Numbers a token and channel of a layer: probabilities; q and k once more, turned."""
    # Half of all pairs, and half of the chunk on the diagonal.
    probabilities = heads * (length + min(64, length)) / 2
    # Without QK-norm they are kept already.
    turned = 0 if arch in ("gpt2", "llama") else 2
    return probabilities / n_embd + turned


def step_of_layers(activation_checkpoint: str) -> tuple[str, int]:
    """("every", 2) for every_2, ("full", 1) for full."""
    how, _, number = activation_checkpoint.partition("_")
    if how in ("every", "segments") and number.isdecimal():
        return how, int(number)
    return activation_checkpoint, 1


if __name__ == "__main__":
    print("GPT-2 124M, 4 x 1024 tokens, bf16: GB of activations by --activation_checkpoint")
    for how in ("none", "selective", "attention", "mlp", "every_2", "segments_4", "full"):
        kept = activation_bytes("bf16", 4096, 12, 768, 50304, "gpt2", how, loss_chunk=4096)
        print(f"    {how:12} {kept / 1e9:6.2f}")
