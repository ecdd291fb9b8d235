"""A GPT in one file: token embedding, blocks of causal attention and MLP, output head.

    x = embed[tokens] (+ positions) (+ n-grams)         (B, T, C)
    x = x + proj(attention(q, k, v of norm(x)))         for each block
    x = x + mlp_proj(activation(fc(norm(x))))           or silu(gate(norm(x))) fc(norm(x)): SwiGLU
                                                        or a few of many MLPs: layers/moe.py
    loss = sum over tokens of -log softmax(head(norm(x)))[target]

Five sets of traits, each trait its own switch: `gpt2` (Radford et al. 2019: LayerNorm, GELU,
learned positions, tied head, biases), `llama` (Touvron et al. 2023: RMSNorm with gains, SwiGLU,
rotary positions), `qwen3` (Yang et al. 2025: besides, QK-norm with gains), `modern` (RMSNorm,
rotary positions, QK-norm, squared ReLU, untied head, zero-initialised projections, capped logits:
the choices of the nanoGPT speedruns, Jordan et al. 2024) and `track3`, on which those compare
optimizers: besides, gains in norms, a norm of the embedding, biases, head's too, positions that
turn half of each head, a constant attention scale, logits bent by a root instead of tanh.

Made to be cut up from outside; nothing here knows how:
- `forward` returns the *sum* of token losses: adding over micro-batches and ranks needs no weights;
- `blocks` is keyed by the global layer number: a pipeline stage is this model with some layers
  alone, and every parameter has the same name in every layout;
- q, k, v are separate matrices: a fused one cut by columns gives the wrong heads, and Muon wants
  them apart;
- `Attention.attention_fn`, `Linear.matmul`, `GPT.run_blocks` and `GPT.loss_fn` can be replaced by
  functions; with `GPT.loss_chunk` the loss is computed over so many tokens at a time;
- the initial weight is a function of (seed, name), a dropout mask of (seed, name, row, position).

Norms, softmax and loss are in at least float32. Attention weights are not dropped: no fused kernel
has reproducible masks.
"""

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import attention, document_mask, rope_scaling
from layers.chunked_loss import chunked_loss
from layers.document_mask import Documents
from layers.fewer_passes import RMSNorm, norm_and_turn, relu_squared, rms_norm, swiglu, turn_alone
from layers.moe import MoE
from layers.ngram_embedding import NGramEmbedding
from layers.recompute import casts, forget_results, recompute


@dataclass(frozen=True)
class GPTConfig:
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4
    n_embd: int = 256
    block_size: int = 256
    vocab_size: int = 256
    dropout: float = 0.0
    norm: str = "rmsnorm"  # or rmsnorm_gain, layernorm
    norm_eps: float | None = None  # of all norms; None = 1e-6, and layernorm's is 1e-5
    embed_norm: bool = False
    activation: str = "relu2"  # or gelu, gelu_tanh, swiglu
    mlp_width: int | None = None  # None: see mlp_size
    position: str = "rotary"  # or rotary_half, learned
    rope_base: float = 10000.0
    rope_scaling: str | None = None  # layers/rope_scaling.py
    head_dim: int | None = None  # None: see head_size
    qk_norm: bool | str = True  # or gain
    attention_scale: float | None = None  # q.k is multiplied by it; None = 1/sqrt(D)
    window: int | None = None  # tokens that a query sees, itself among them; None = all before it
    attention: str = "sdpa"  # or plain, flex (layers/attention.py)
    document_mask: bool = False  # tokens see their own document alone (layers/document_mask.py)
    document_token: int | None = None  # the id with which a document begins
    tied: bool = False
    bias: bool = False
    qkv_bias: bool | None = None  # of queries, keys and values; None = as bias
    head_bias: bool = False
    zero_init: bool = True
    init: str = "fan_in"  # or torch, gpt2
    logit_cap: float | None = 15.0
    logit_cap_form: str = "tanh"  # or root
    mup_base_width: int | None = None  # μP (optim/mup.py): the width at which it changes nothing
    # N-grams of up to so many tokens have embeddings too (layers/ngram_embedding.py)
    ngram_embed: int | None = None
    ngram_rows: int = 16384
    # Mixture of experts (layers/moe.py) in place of the MLP of each moe_every-th layer
    n_expert: int | None = None
    n_expert_active: int = 2
    n_shared_expert: int = 0
    expert_width: int | None = None  # None: see expert_size
    moe_every: int = 1
    router: str = "softmax"  # or sigmoid
    normalize_gates: bool = True
    router_z_loss: float | None = None
    moe_sequence_loss: float | None = None
    seed: int = 1337

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_size(self) -> int:
        """The width between the MLP's matrices."""
        if self.mlp_width is not None:
            return self.mlp_width
        if self.activation == "swiglu":
            # Three matrices, with about as many weights as two of 4C.
            return -(-8 * self.n_embd // (3 * 64)) * 64
        return 4 * self.n_embd

    @property
    def expert_size(self) -> int:
        """The width between an expert's matrices."""
        if self.expert_width is not None:
            return self.expert_width
        # A token goes through as many weights as it would in the MLP. Kernels like multiples of 8.
        return -(-self.mlp_size // (8 * (self.n_expert_active + self.n_shared_expert))) * 8

    def has_experts(self, layer: int) -> bool:
        return self.n_expert is not None and (layer + 1) % self.moe_every == 0


class ForwardContext(NamedTuple):
    """What every block needs beside the hidden states."""

    position_ids: Tensor  # (T,) or, without documents, (B, T): each token's place in its sequence
    sample_ids: Tensor | None  # (B,): each sequence's number in the run, for dropout masks
    rotary: tuple[Tensor, Tensor] | None  # cos and sin, each (T, 1, D/2) or (B, T, 1, D/2)
    documents: Documents | None = None  # with document_mask


class Linear(nn.Linear):
    matmul = staticmethod(F.linear)  # x (..., K), weight (N, K), bias (N,) -> (..., N)

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight, self.bias)


class Head(Linear):
    def forward(self, x: Tensor, loss_of=None, size: int | None = None) -> Tensor:
        """x (..., C) -> logits (..., V); with loss_of the sum of losses (layers/chunked_loss.py).

        One call either way: what a layout has hooked before the head sees all hidden states, once.
        """
        if loss_of is None:
            return super().forward(x)
        return chunked_loss(x.flatten(0, -2), self.weight, self.bias, loss_of, size, self.matmul)


class Attention(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.head_size = c.head_size
        q_width = c.n_head * self.head_size
        kv_width = c.n_kv_head * self.head_size  # fewer than n_head: grouped queries
        qkv_bias = c.bias if c.qkv_bias is None else c.qkv_bias
        self.q = Linear(c.n_embd, q_width, bias=qkv_bias)
        self.k = Linear(c.n_embd, kv_width, bias=qkv_bias)
        self.v = Linear(c.n_embd, kv_width, bias=qkv_bias)
        self.proj = Linear(q_width, c.n_embd, bias=c.bias)
        eps = (c.norm_eps or EPS) if c.qk_norm else None
        self.q_norm = self.k_norm = functools.partial(placed, eps=eps)
        if c.qk_norm == "gain":
            self.q_norm = HeadNorm(c)
            self.k_norm = HeadNorm(c)
        self.attention_fn = attention.choose(c.attention, c.window)
        # Every attention function divides q·k by sqrt(D), so another scale becomes a factor of q.
        self.q_factor = 1.0
        if c.mup_base_width:
            self.q_factor = 8 / self.head_size**0.5  # μP: 8 q·k/D
        if c.attention_scale is not None:
            self.q_factor = c.attention_scale * self.head_size**0.5

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:  # x (B, T, C)
        for_q, for_k, for_v = casts(x, 3)
        q = self.split_heads(self.q(for_q))  # (B, T, H, D)
        k = self.split_heads(self.k(for_k))  # (B, T, Hkv, D)
        v = self.split_heads(self.v(for_v))  # (B, T, Hkv, D)
        q = self.q_norm(q, context.rotary, self.q_factor)
        k = self.k_norm(k, context.rotary)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, D)
        # Three arguments without documents: whatever replaces attention_fn need not know of them.
        more = {} if context.documents is None else {"documents": context.documents}
        y = self.attention_fn(q, k, v, **more)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, heads x D) -> (B, T, heads, D)"""
        return x.unflatten(-1, (-1, self.head_size))


class HeadNorm(nn.Module):
    """placed() with a gain: one for all heads of queries, and one for those of keys."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.eps = c.norm_eps or EPS
        self.weight = nn.Parameter(torch.ones(c.head_size))

    def forward(self, x: Tensor, rotary: tuple | None, factor: float = 1.0) -> Tensor:
        return placed(x, rotary, factor, self.eps, self.weight)


class MLP(nn.Module):
    def __init__(self, c: GPTConfig, width: int):
        super().__init__()
        self.gate = None
        if c.activation == "swiglu":
            self.gate = Linear(c.n_embd, width, bias=c.bias)
        self.fc = Linear(c.n_embd, width, bias=c.bias)
        self.proj = Linear(width, c.n_embd, bias=c.bias)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        if self.gate is None:
            (x,) = casts(x, 1)
            return self.proj(self.activation(self.fc(x)))  # (B, T, width) between the two
        for_gate, for_fc = casts(x, 2)
        return self.proj(self.activation(self.gate(for_gate), self.fc(for_fc)))


class Block(nn.Module):
    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        self.attn_norm = make_norm(c)
        self.attn = Attention(c)
        self.mlp_norm = make_norm(c)
        self.mlp = make_moe(c) if c.has_experts(layer) else MLP(c, c.mlp_size)
        self.drop_attn = Dropout(c, f"blocks.{layer}.attn")
        self.drop_mlp = Dropout(c, f"blocks.{layer}.mlp")

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:  # (B, T, C)
        # Backward computes norms and activations again: see layers/recompute.py for what it keeps.
        with forget_results(x):
            x = x + self.drop_attn(self.attn(recompute(self.attn_norm, x), context), context)
            return x + self.drop_mlp(self.mlp(recompute(self.mlp_norm, x)), context)


class GPT(nn.Module):
    """The model, or the stage of it with these `layers`.

    The stage with layer 0 has the embedding, the one with the last layer has the head.
    """

    def __init__(self, c: GPTConfig, layers=None):
        super().__init__()
        self.config = c
        if c.document_mask and c.document_token is None:
            raise ValueError("document_mask needs document_token, the id with which one begins")
        self.rope_scaling = rope_scaling.parse(c.rope_scaling)
        if layers is None:
            layers = range(c.n_layer)
        is_first = 0 in layers
        is_last = c.n_layer - 1 in layers

        # A stage has None for what it lacks. A tied head needs the embedding's weight in its own
        # stage too.
        self.embed = None
        self.positions = None
        self.grams = None
        self.embed_norm = None
        if is_first or (is_last and c.tied):
            self.embed = empty_embedding(c.vocab_size, c.n_embd)
        if is_first and c.position == "learned":
            self.positions = empty_embedding(c.block_size, c.n_embd)
        if is_first and c.ngram_embed:
            self.grams = NGramEmbedding(c.ngram_rows, c.n_embd, c.ngram_embed)
        if is_first and c.embed_norm:
            self.embed_norm = make_norm(c)
        self.drop_embed = Dropout(c, "embed")

        self.blocks = nn.ModuleDict({str(i): Block(c, i) for i in layers})

        self.final_norm = make_norm(c) if is_last else None
        self.head = Head(c.n_embd, c.vocab_size, bias=c.head_bias) if is_last else None
        if is_last and c.tied:
            # One Parameter, so that the gradients of both uses add up.
            self.head.weight = self.embed.weight

        # Replaced by activation checkpointing, tensor parallelism and layers/ngram.py.
        self.run_blocks = run_blocks
        self.loss_fn = loss_fn
        self.logit_bias = None  # targets (B, T) -> (B, T, V), added to the logits (layers/ngram.py)
        self.loss_chunk = None  # tokens whose logits are in memory at once; None = all
        self.masks_for = c.attention  # whose masks of documents forward makes
        # After a forward in eval mode: how many targets were the likeliest token (0-dim).
        self.n_correct = None

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        position_ids: Tensor | None = None,
        sample_ids: Tensor | None = None,
        layers: list[int] | None = None,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """The sum of the token losses; without targets the logits (B, T, V).

        x: (B, T) token ids, or (B, T, C) hidden states of earlier layers; targets: (B, T) ids;
        position_ids: (T,) or, without document_mask, (B, T), default 0..T-1; sample_ids: (B,), for
        dropout; layers: which of those here to run, default all. document_starts: (B, length of the
        whole sequence) where each token's document begins, for document_mask; default: found in x,
        which then is the whole sequence. Hidden states (B, T, C) come back where the last layer is
        not among them. Raises ValueError for more than block_size tokens.
        """
        c = self.config
        if c.document_mask and document_starts is None:
            if x.ndim == 3 or position_ids is not None:
                raise ValueError("document_mask needs document_starts where x is a part of a text")
            document_starts = self.document_starts(x)
        if position_ids is None:
            if x.shape[1] > c.block_size:
                raise ValueError(f"{x.shape[1]} tokens are more than block_size={c.block_size}")
            position_ids = torch.arange(x.shape[1], device=x.device)
        # Made once for all layers: the angles depend on the positions alone.
        positions = position_ids
        documents = None
        if c.document_mask:
            dtype = next(self.parameters()).dtype
            documents = document_mask.make(self.masks_for, c.window, document_starts, dtype)
            positions = position_ids - document_starts[:, position_ids]  # (B, T)
        rotary = self.rotary_angles(positions)
        context = ForwardContext(position_ids, sample_ids, rotary, documents)
        if x.ndim == 2:
            x = self.embed_tokens(x, positions, context)  # (B, T, C)
        names = list(self.blocks) if layers is None else [str(layer) for layer in layers]
        x = self.run_blocks([self.blocks[name] for name in names], x, context)
        # Without the last layer there is no head here: the next stage gets hidden states.
        if names[-1] != str(c.n_layer - 1):
            return x
        x = self.final_norm(x)
        # Generation, which has no targets, needs the logits themselves.
        if targets is not None and self.loss_chunk is not None:
            return self.loss_in_chunks(x, targets)
        logits = self.logits(x)  # (B, T, V)
        if self.logit_bias is not None:
            # In generation the bias is of all tokens so far, the logits of the new ones alone.
            bias = self.logit_bias(targets)[:, -logits.shape[1] :]
            logits = logits + bias.to(logits)
        out, self.n_correct = self.loss_fn(logits, targets, not self.training)
        return out

    def document_starts(self, ids: Tensor) -> Tensor | None:
        """(B, T) where each token's document begins; None where documents see each other."""
        c = self.config
        return document_mask.starts(ids, c.document_token) if c.document_mask else None

    def rotary_angles(self, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """The angles by which this model's heads turn; None for learned positions."""
        kind = self.config.position
        if kind == "learned":
            return None
        # bf16 holds integers up to 256 exactly, and positions go beyond.
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        c = self.config
        if kind == "rotary_half":
            return rotary_angles(position_ids, c.head_size, dtype, half=True)
        return rotary_angles(
            position_ids, c.head_size, dtype, base=c.rope_base, scaling=self.rope_scaling
        )

    def embed_tokens(self, ids: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """(B, T) token ids, at these positions (T,) or (B, T) of their documents -> (B, T, C)"""
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.grams is not None:
            starts = None if context.documents is None else context.documents.starts
            x = x + self.grams(self.grams.find(ids, context.position_ids, starts))
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return self.drop_embed(x, context)

    def logits(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V), in float32 or float64"""
        return self.finished_logits(self.head(self.head_input(x)))

    def head_input(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        c = self.config
        if c.mup_base_width:
            x = x * (c.mup_base_width / c.n_embd)  # the head's output, but not its bias
        return x

    def finished_logits(self, logits: Tensor) -> Tensor:
        """The head's output (..., V) -> (..., V), in float32 or float64, capped"""
        c = self.config
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if c.logit_cap is not None:
            logits = capped(logits, c.logit_cap, c.logit_cap_form)
        return logits

    def loss_in_chunks(self, x: Tensor, targets: Tensor) -> Tensor:
        """What forward returns, from final_norm's output; never with the logits of all tokens."""
        counts = []
        bias = None
        if self.logit_bias is not None:
            bias = self.logit_bias(targets).flatten(0, 1)  # (BT, V)
        targets = targets.flatten()  # (BT,)

        def loss_of(logits: Tensor, where: slice) -> Tensor:  # (n, V)
            logits = self.finished_logits(logits)
            if bias is not None:
                logits = logits + bias[where].to(logits)
            # As one sequence of n tokens.
            loss, n_correct = self.loss_fn(logits[None], targets[where][None], not self.training)
            counts.append(n_correct)
            return loss

        loss = self.head(self.head_input(x), loss_of, self.loss_chunk)
        self.n_correct = None if self.training else sum(counts)
        return loss


# ---- the pieces ----------------------------------------------------------------------------------
def empty_embedding(n: int, width: int) -> nn.Embedding:
    """An embedding of n rows whose weight is memory alone: no random numbers are drawn."""
    return nn.Embedding.from_pretrained(torch.empty(n, width), freeze=False)


def run_blocks(blocks: list[nn.Module], x: Tensor, context: ForwardContext) -> Tensor:
    for block in blocks:
        x = block(x, context)
    return x


def loss_fn(
    logits: Tensor, targets: Tensor | None, count: bool, z_loss: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """(sum of the token losses, number of targets that are the likeliest token, if asked to count).

    logits: (B, T, V); targets: (B, T), or None: (logits, None). z_loss adds the gradient of
    z_loss (log Z)^2 of each token (PaLM, 2204.02311), but leaves the value as it is.
    """
    if targets is None:
        return logits, None
    n_correct = (logits.argmax(-1) == targets).sum() if count else None
    # Two dimensions: for (B, V, T) a GPU's kernel overflows at 2^31 logits (pytorch issue 190139).
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    if z_loss is not None:
        # cross_entropy ignores the target -100, so the penalty has to as well.
        log_z = logits.logsumexp(-1).masked_fill(targets == -100, 0)
        penalty = z_loss * log_z.square().sum()
        # The value cancels out, the gradient does not.
        loss = loss + (penalty - penalty.detach())
    return loss, n_correct


# (fc's output, or with swiglu gate's and fc's) -> what proj gets
ACTIVATIONS = {
    "relu2": relu_squared,
    "gelu": functools.partial(recompute, F.gelu),
    # The approximation that GPT-2 was trained with.
    "gelu_tanh": functools.partial(recompute, functools.partial(F.gelu, approximate="tanh")),
    "swiglu": swiglu,
}
# Of RMSNorm and QK-norm. torch's default would be the dtype's epsilon.
EPS = 1e-6


def make_moe(c: GPTConfig) -> MoE:
    shared = MLP(c, c.n_shared_expert * c.expert_size) if c.n_shared_expert else None
    return MoE(
        c.n_embd,
        [MLP(c, c.expert_size) for _ in range(c.n_expert)],
        c.n_expert_active,
        shared,
        c.router,
        c.normalize_gates,
        c.router_z_loss,
        c.moe_sequence_loss,
    )


def make_norm(c: GPTConfig) -> nn.Module:
    if c.norm == "layernorm":
        return nn.LayerNorm(c.n_embd, c.norm_eps or 1e-5, bias=c.bias)
    # The last argument adds a gain.
    return RMSNorm(c.n_embd, c.norm_eps or EPS, c.norm == "rmsnorm_gain")


def placed(
    x: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    factor: float = 1.0,
    eps: float | None = EPS,
    gain: Tensor | None = None,
) -> Tensor:
    """Queries or keys (B, T, heads, D), normed, turned by their positions, times the factor.

    eps: None for no norm; gain: (D,), of the norm.
    """
    if eps is not None and rotary is not None:
        return norm_and_turn(x, *rotary, eps, factor, gain)
    if eps is not None:
        x = rms_norm(x, eps)
        if gain is not None:
            x = (x * gain).to(x.dtype)
    if rotary is not None:
        x = turn_alone(x, *rotary)
    return x * factor if factor != 1 else x


def capped(logits: Tensor, cap: float, form: str) -> Tensor:
    """cap tanh(x / cap), or cap x / sqrt(x^2 + cap^2): both x where it is small, +-cap where it is
    large."""
    if form == "tanh":
        return cap * torch.tanh(logits / cap)
    return logits * (logits.square() / cap**2 + 1).rsqrt()


def rotary_angles(
    position_ids: Tensor,
    head_size: int,
    dtype: torch.dtype,
    half: bool = False,
    base: float = 10000.0,
    scaling: rope_scaling.Scaling | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * f_i: each (T, 1, D/2), or (B, T, 1, D/2) for position_ids (B, T).

    f_i = base^(-2i/D), scaled by layers/rope_scaling.py. half: 1024^(-i/(D/4 - 1)) for i < D/4,
    from 1 down to 1/1024, then 0.
    """
    i = torch.arange(head_size // 2, device=position_ids.device, dtype=dtype)
    if half:
        n_turned = head_size // 4
        frequency = 1024.0 ** (-i / max(1, n_turned - 1)) * (i < n_turned)
    else:
        frequency = rope_scaling.scaled(base ** (-2 * i / head_size), scaling)
    # One for all heads.
    angle = position_ids.to(dtype).unsqueeze(-1).unsqueeze(-1) * frequency
    return angle.cos(), angle.sin()


class Dropout(nn.Module):
    """Dropout whose mask is a hash of (seed, layer's name, sample, position, channel).

    So every layout drops the same numbers.
    """

    def __init__(self, c: GPTConfig, name: str):
        super().__init__()
        self.p = c.dropout
        self.key = key(c.seed, name)

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:  # x (B, T, C)
        if not self.training or self.p == 0:
            return x
        if context.sample_ids is None:
            raise ValueError(
                "dropout needs the samples' numbers: model(x, targets, sample_ids=...)"
            )
        h = mix(context.sample_ids.unsqueeze(1) + self.key)  # (B, 1)
        h = mix(h + context.position_ids)  # (B, T)
        channels = torch.arange(x.shape[-1], device=x.device)
        h = mix(h.unsqueeze(-1) + channels * 0x9E3779B1)  # (B, T, C), each below 2^32
        # h is uniform in [0, 2^32), so a share p of it is below the limit.
        kept = h >= int(self.p * 2**32)
        return x * kept.to(x.dtype) / (1 - self.p)


def mix(h: Tensor) -> Tensor:
    """A 32-bit integer hash kept in int64 (multiply and shift; constants of Mueller's integer
    hash)."""
    for _ in range(2):
        h = ((h & 0xFFFFFFFF) ^ ((h & 0xFFFFFFFF) >> 16)) * 0x45D9F3B
    return (h & 0xFFFFFFFF) ^ ((h & 0xFFFFFFFF) >> 16)


def key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "little")


# ---- the start -----------------------------------------------------------------------------------
def initial_weight(c: GPTConfig, name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole initial tensor of the parameter with this full name, float32 on the CPU.

    gpt2: std 0.02, and 0.02/sqrt(2 n_layer) for the two projections into the residual stream.
    fan_in: embeddings 1, matrices 0.5/sqrt(fan_in). torch: its own, 1 and sqrt(1/3)/sqrt(fan_in).
    zero_init: those projections and an untied head start at 0, so that every block starts as the
    identity. N-grams always do.
    """
    if len(shape) < 2:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    is_head = name == "head.weight"
    is_embedding = name in ("embed.weight", "positions.weight")
    is_hidden = not (is_embedding or is_head)
    into_residual = name.endswith("proj.weight")
    if name == "grams.weight" or (c.zero_init and (into_residual or is_head)):
        return torch.zeros(shape)

    base_width = c.mup_base_width or c.n_embd
    if c.init == "gpt2":
        std = 0.02 / math.sqrt(2 * c.n_layer) if into_residual else 0.02
        if is_hidden:
            std *= math.sqrt(base_width / c.n_embd)
    elif is_embedding:
        std = 0.02 if c.tied else 1.0
    else:
        gain = 0.5 if c.init == "fan_in" else 3**-0.5
        std = gain / math.sqrt(shape[1] if is_hidden else base_width)
    # torch's CPU generator in float32: the same numbers for every device, dtype and layout.
    generator = torch.Generator().manual_seed(key(c.seed, name))
    return torch.randn(shape, generator=generator) * std
