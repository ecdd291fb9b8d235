"""Tokens after tokens: what a GPT writes.

    logits of the last token -> the top_k likeliest -> softmax(logits / temperature) -> one drawn -> again

A new token's queries look at all earlier keys, which do not change: every attention keeps them, and one
token at a time goes through the model. While it does, `Attention.core` of each block is a KeepingCore.
"""

import torch
from torch import Tensor, nn

from model import causal_attention


@torch.no_grad()
def generate(model: nn.Module, ids: Tensor, n: int, temperature: float = 1.0, top_k: int | None = None,
             seed: int = 0, forward=None) -> Tensor:  # fmt: skip
    """ids (B, T) with n more tokens, drawn from softmax(logits / temperature) among the top_k likeliest.

    temperature 0: the likeliest. forward: in place of this model where it is a part of one. A full block
    starts again from its last half.
    """
    generator, size, kept = torch.Generator().manual_seed(seed), model.config.block_size, 0
    threads, cores = torch.get_num_threads(), {b.attn: b.attn.core for b in model.blocks.values()}
    torch.set_num_threads(1)  # one token is too little work to share
    for i in range(n):
        if i == 0 or kept == size:
            x, kept = ids[:, -size if i == 0 else -(size // 2 or 1) :], 0
            for attention in cores:
                attention.core = KeepingCore()
        positions = torch.arange(kept, kept + x.shape[1], device=x.device)
        kept += x.shape[1]
        logits = (forward or model)(x, positions=positions)[:, -1].cpu()  # (B, V)
        if top_k is not None:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        odds = torch.softmax(logits / (temperature or 1), -1)
        x = torch.multinomial(odds, 1, generator=generator) if temperature else odds.argmax(-1, True)
        ids = torch.cat([ids, x := x.to(ids.device)], 1)
    for attention, core in cores.items():
        attention.core = core
    torch.set_num_threads(threads)
    return ids


class KeepingCore:
    """Attention that remembers the keys and values of earlier calls."""

    kv = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kv is not None:  # then q is one new token, which sees all
            k, v = torch.cat([self.kv[0], k], 2), torch.cat([self.kv[1], v], 2)
        causal, self.kv = self.kv is None, (k, v)
        return causal_attention(q, k, v, causal)
