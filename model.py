"""A GPT in one file: token embedding, blocks of causal attention and MLP, output head.

    x = embed[tokens] (+ positions) (+ n-grams)         (B, T, C)
    x = x + proj(attention(q, k, v of norm(x)))         for each block
    x = x + mlp_proj(activation(fc(norm(x))))
    loss = sum over tokens of -log softmax(head(norm(x)))[target]

Three sets of traits, each trait its own switch: `gpt2` (Radford et al. 2019: LayerNorm, GELU,
learned positions, tied head, biases), `modern` (RMSNorm, rotary positions, QK-norm, squared ReLU,
untied head, zero-initialised projections, capped logits: the choices of the nanoGPT speedruns,
Jordan et al. 2024) and `track3`, on which those compare optimizers: besides, gains in norms, a norm
of the embedding, biases, head's too, positions that turn half of each head, a constant attention
scale, logits bent by a root instead of tanh.

Made to be cut up from outside; nothing here knows how:
- `forward` returns the *sum* of token losses: adding over micro-batches and ranks needs no weights;
- `blocks` is keyed by the global layer number: a pipeline stage is this model with some layers
  alone, and every parameter has the same name in every layout;
- q, k, v are separate matrices: a fused one cut by columns gives the wrong heads, and Muon wants
  them apart;
- `Attention.core`, `Linear.product`, `GPT.through` and `GPT.output` are functions that can be
  replaced;
- the initial weight is a function of (seed, full name), a dropout mask of (seed, name, row,
  position).

Norms, softmax and loss are in at least float32. Attention weights are not dropped: no fused kernel
has reproducible masks.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import attention
from layers.ngram_embedding import NGramEmbedding


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
    embed_norm: bool = False
    activation: str = "relu2"  # or gelu
    position: str = "rotary"  # or rotary_half, learned
    qk_norm: bool = True
    attention_scale: float | None = None  # q.k is multiplied by it; None = 1/sqrt(D)
    window: int | None = None  # tokens that a query sees, itself among them; None = all before it
    attention: str = "sdpa"  # or plain, flex (layers/attention.py)
    tied: bool = False
    bias: bool = False
    head_bias: bool = False
    zero_init: bool = True
    init: str = "fan_in"  # or torch, gpt2
    logit_cap: float | None = 15.0
    logit_cap_form: str = "tanh"  # or root
    mup_base_width: int | None = None  # μP (optim/mup.py): the width at which it changes nothing
    # N-grams of up to so many tokens have embeddings too (layers/ngram_embedding.py)
    ngram_embed: int | None = None
    ngram_rows: int = 16384
    seed: int = 1337


class Where(NamedTuple):
    """Where the tokens stand: what positions and dropout masks are computed from."""

    positions: Tensor  # (T,) or (B, T) place in the sequence
    rows: Tensor | None  # (B,) number of the row in the run, for dropout
    rotary: tuple[Tensor, Tensor] | None  # cos, sin, each (T, D/2) or (B, 1, T, D/2)


class Linear(nn.Linear):
    product = staticmethod(F.linear)  # x (..., K), weight (N, K), bias (N,) -> (..., N)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.head_size, self.qk_norm = c.n_embd // c.n_head, c.qk_norm
        self.q = Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.k, self.v = (
            Linear(c.n_embd, c.n_kv_head * self.head_size, bias=c.bias) for _ in range(2)
        )
        self.proj = Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.core = attention.core(c.attention, c.window)
        # μP: 8 q.k/D, not q.k/sqrt(D)
        self.q_factor = 8 / self.head_size**0.5 if c.mup_base_width else 1.0
        if c.attention_scale is not None:
            self.q_factor = c.attention_scale * self.head_size**0.5  # which every core divides by

    def forward(self, x: Tensor, where: Where) -> Tensor:
        heads = (f(x).unflatten(-1, (-1, self.head_size)) for f in (self.q, self.k, self.v))
        q, k, v = (h.transpose(1, 2) for h in heads)  # (B, H, T, D)
        if self.qk_norm:
            # In float32 for half types
            q, k = (F.rms_norm(h, h.shape[-1:], eps=1e-6) for h in (q, k))
        if where.rotary is not None:
            q, k = rotate(q, *where.rotary), rotate(k, *where.rotary)
        y = self.core(q if self.q_factor == 1 else q * self.q_factor, k, v)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.fc = Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.proj = Linear(4 * c.n_embd, c.n_embd, bias=c.bias)
        self.gelu = c.activation == "gelu"

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)  # (B, T, 4C)
        return self.proj(F.gelu(x) if self.gelu else F.relu(x).square())


class Block(nn.Module):
    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        self.attn_norm, self.attn = make_norm(c), Attention(c)
        self.mlp_norm, self.mlp = make_norm(c), MLP(c)
        self.drop_attn, self.drop_mlp = (
            Dropout(c, f"blocks.{layer}.{name}") for name in ("attn", "mlp")
        )

    def forward(self, x: Tensor, where: Where) -> Tensor:
        x = x + self.drop_attn(self.attn(self.attn_norm(x), where), where)
        return x + self.drop_mlp(self.mlp(self.mlp_norm(x)), where)


class GPT(nn.Module):
    """The model, or the part of it with these `layers`: the first brings the embedding, the last
    the head."""

    def __init__(self, c: GPTConfig, layers=None):
        super().__init__()
        self.config, layers = c, range(c.n_layer) if layers is None else layers
        first, last = 0 in layers, c.n_layer - 1 in layers
        # Draws no numbers
        table, learned = nn.Embedding.from_pretrained, first and c.position == "learned"
        embed = first or (last and c.tied)  # a tied head has the embedding's name, also on its own
        self.embed = table(torch.empty(c.vocab_size, c.n_embd), freeze=False) if embed else None
        self.positions = (
            table(torch.empty(c.block_size, c.n_embd), freeze=False) if learned else None
        )
        grams = first and c.ngram_embed
        self.grams = NGramEmbedding(c.ngram_rows, c.n_embd, c.ngram_embed) if grams else None
        self.embed_norm = make_norm(c) if first and c.embed_norm else None
        self.drop_embed = Dropout(c, "embed")
        self.blocks = nn.ModuleDict({str(i): Block(c, i) for i in layers})
        self.final_norm = make_norm(c) if last else None
        self.head = Linear(c.n_embd, c.vocab_size, bias=c.head_bias) if last else None
        if c.tied and last:
            self.head.weight = self.embed.weight
        self.through, self.output = through, output
        self.prior = (
            None  # targets -> (B, T, V), the last T are added to the logits (layers/ngram.py)
        )
        # After a forward in eval mode: how many targets were the likeliest token (0-dim)
        self.hits = None

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        rows: Tensor | None = None,
        layers: list[int] | None = None,
    ) -> Tensor:
        """x: (B, T) token ids, or (B, T, C) hidden states after other layers; targets: (B, T) ids;
        positions: (T,) or (B, T), default 0..T-1; rows: (B,) numbers of the rows in the run, for
        dropout; layers: which of those here to run, default all. Returns hidden states or, after
        the last layer, the sum of the token losses, without targets logits (B, T, V).
        """
        if positions is None:
            if x.shape[1] > self.config.block_size:
                raise ValueError(
                    f"{x.shape[1]} tokens are more than block_size={self.config.block_size}"
                )
            positions = torch.arange(x.shape[1], device=x.device)
        rotary, dtype = None, torch.promote_types(next(self.parameters()).dtype, torch.float32)
        if (kind := self.config.position) != "learned":
            size = self.config.n_embd // self.config.n_head
            rotary = rotary_angles(positions, size, dtype, half=kind == "rotary_half")
        where = Where(positions, rows, rotary)
        if x.ndim == 2:
            ids, x = x, self.embed(x)
            x = x if self.positions is None else x + self.positions(where.positions)
            x = x if self.grams is None else x + self.grams(self.grams.find(ids, where.positions))
            x = self.drop_embed(x if self.embed_norm is None else self.embed_norm(x), where)
        names = list(self.blocks) if layers is None else list(map(str, layers))
        x = self.through([self.blocks[name] for name in names], x, where)
        if names[-1] != str(self.config.n_layer - 1):
            return x
        x = self.final_norm(x)
        if self.config.mup_base_width:
            # The head's output, not its bias
            x = x * (self.config.mup_base_width / self.config.n_embd)
        logits = self.head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, T, V)
        if (cap := self.config.logit_cap) is not None:
            logits = capped(logits, cap, self.config.logit_cap_form)
        if self.prior is not None:
            logits = logits + self.prior(targets)[:, -logits.shape[1] :].to(logits)
        out, self.hits = self.output(logits, targets, not self.training)
        return out


# ---- the pieces ----------------------------------------------------------------------------------
def through(blocks: list[nn.Module], x: Tensor, where: Where) -> Tensor:
    for block in blocks:
        x = block(x, where)
    return x


def output(
    logits: Tensor, targets: Tensor | None, count: bool, z_loss=None
) -> tuple[Tensor, Tensor | None]:
    """(sum of token losses, how many targets are the likeliest token if asked); or (logits, None).
    z_loss: to the gradient, not to the value, adds that of z_loss (log Z)^2 of each token (PaLM,
    2204.02311).
    """
    if targets is None:
        return logits, None
    hits = (logits.argmax(-1) == targets).sum() if count else None
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    if z_loss is not None:  # over the targets that cross_entropy counts
        z = z_loss * logits.logsumexp(-1).masked_fill(targets == -100, 0).square().sum()
        loss = loss + (z - z.detach())
    return loss, hits


def make_norm(c: GPTConfig) -> nn.Module:
    if c.norm == "layernorm":
        return nn.LayerNorm(c.n_embd, bias=c.bias)
    return nn.RMSNorm(c.n_embd, 1e-6, c.norm == "rmsnorm_gain")


def capped(logits: Tensor, cap: float, form: str) -> Tensor:
    """cap tanh(x / cap), or cap x / sqrt(x^2 + cap^2): both x where it is small, +-cap where it is
    large."""
    if form == "tanh":
        return cap * torch.tanh(logits / cap)
    return logits * (logits.square() / cap**2 + 1).rsqrt()


def rotary_angles(
    positions: Tensor, head_size: int, dtype: torch.dtype, half=False
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * f_i: (T, D/2), or (B, 1, T, D/2) for positions (B, T).

    f_i = 10000^(-2i/D). half: 1024^(-i/(D/4 - 1)) for i < D/4, from 1 down to 1/1024, then 0.
    """
    i, n = torch.arange(head_size // 2, device=positions.device, dtype=dtype), head_size // 4
    frequency = (
        1024.0 ** (-i / max(1, n - 1)) * (i < n) if half else 10000.0 ** (-2 * i / head_size)
    )
    angle = positions.to(dtype).unsqueeze(-1) * frequency
    angle = angle.unsqueeze(1) if positions.ndim == 2 else angle
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x[i], x[i + D/2]) turned by its angle (Su et al. 2021, 2104.09864)."""
    a, b, cos, sin = *x.chunk(2, -1), cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Dropout(nn.Module):
    """Dropout whose mask is a hash of (seed, layer's name, row, position, channel): one for all
    layouts."""

    def __init__(self, c: GPTConfig, name: str):
        super().__init__()
        self.p, self.key = c.dropout, key(c.seed, name)

    def forward(self, x: Tensor, where: Where) -> Tensor:  # x (B, T, C)
        if not self.training or self.p == 0:
            return x
        if where.rows is None:
            raise ValueError("dropout needs the numbers of the rows: model(x, targets, rows=...)")
        h = mix(mix(where.rows.unsqueeze(1) + self.key) + where.positions)  # (B, T)
        # Below 2^32
        h = mix(h.unsqueeze(-1) + torch.arange(x.shape[-1], device=x.device) * 0x9E3779B1)
        return x * (h >= int(self.p * 2**32)).to(x.dtype) / (1 - self.p)


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
    into_residual, embedding = (
        name.endswith("proj.weight"),
        name
        in (
            "embed.weight",
            "positions.weight",
        ),
    )
    if name == "grams.weight" or (c.zero_init and (into_residual or name == "head.weight")):
        return torch.zeros(shape)
    base, hidden = c.mup_base_width or c.n_embd, not (embedding or name == "head.weight")
    if c.init != "gpt2":
        gain = 0.5 if c.init == "fan_in" else 3**-0.5
        std = (
            (0.02 if c.tied else 1.0)
            if embedding
            else gain / math.sqrt(shape[1] if hidden else base)
        )
    else:
        std = 0.02 / math.sqrt(2 * c.n_layer) if into_residual else 0.02
        std *= math.sqrt(base / c.n_embd) if hidden else 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(key(c.seed, name))) * std
