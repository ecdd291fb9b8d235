"""Tokens after tokens: what a GPT writes.

    logits of the last token -> top_k likeliest -> softmax(logits / temperature) -> one drawn -> ...

A new token's queries look at all earlier keys, which do not change: every attention keeps them, and
one token at a time goes through the model. While it does, `Attention.attention_fn` of each block is
a KVCache.
"""

import torch
from torch import Tensor, nn

from layers.attention import causal_attention, newest_attention


@torch.no_grad()
def generate(
    model: nn.Module,
    ids: Tensor,
    n: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    forward=None,
) -> Tensor:
    """ids (B, T) with n more tokens, drawn from softmax(logits / temperature) among the top_k
    likeliest.

    temperature 0: the likeliest. forward: in place of this model where it is a part of one. A full
    block starts again from its last half. Raises ValueError for an id that the model does not know.
    """
    known = model.config.vocab_size
    if ids.numel() and not (ids.min() >= 0 and ids.max() < known):
        raise ValueError(
            f"the prompt's token ids are {int(ids.min())} to {int(ids.max())}, and the model knows"
            f" 0 to {known - 1}: give another prompt, or the tokenizer it was trained with"
        )
    generator, size, kept = torch.Generator().manual_seed(seed), model.config.block_size, 0
    threads, attention_fns = (
        torch.get_num_threads(),
        {b.attn: b.attn.attention_fn for b in model.blocks.values()},
    )
    torch.set_num_threads(1)  # one token is too little work to share
    for i in range(n):
        if i == 0 or kept == size:
            x, kept = ids[:, -size if i == 0 else -(size // 2 or 1) :], 0
            for attention in attention_fns:
                attention.attention_fn = KVCache(model.config.window)
        positions = torch.arange(kept, kept + x.shape[1], device=x.device)
        kept += x.shape[1]
        logits = (forward or model)(x, position_ids=positions)[:, -1].cpu()  # (B, V)
        if top_k is not None:
            least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        odds = torch.softmax(logits / (temperature or 1), -1)
        x = (
            torch.multinomial(odds, 1, generator=generator)
            if temperature
            else odds.argmax(-1, True)
        )
        ids = torch.cat([ids, x := x.to(ids.device)], 1)
    for attention, plain in attention_fns.items():
        attention.attention_fn = plain
    torch.set_num_threads(threads)
    return ids


class KVCache:
    """Attention that remembers the keys and values of earlier calls, the last `window` of them."""

    kv = None

    def __init__(self, window: int | None):
        self.window = window

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = self.kv is None
        if not first:  # then q is one new token, which sees all that is kept
            k, v = (torch.cat(pair, 2) for pair in zip(self.kv, (k, v)))
        kept = slice(None if self.window is None else -self.window, None)
        self.kv = k[:, :, kept], v[:, :, kept]
        return causal_attention(q, k, v, self.window) if first else newest_attention(q, *self.kv)
