"""Autoregressive sampling: a GPT writes one token after another.

    logits of the last token -> top_k likeliest -> softmax(logits / temperature) -> one drawn -> ...

The queries of a new token see all earlier keys and values, which do not change. So every attention
keeps them (a KV cache), and after the prompt the model computes one token at a time. While it
generates, `Attention.attention_fn` of each block is a KVCache.

Neighbours: layers/attention.py

Example:
    from types import SimpleNamespace
    import torch
    from layers.generation import generate
    class Counter(torch.nn.Module):  # 7 comes after 6, and 0 after 9
        config = SimpleNamespace(vocab_size=10, block_size=8, window=None)
        blocks = {}  # layer -> block, whose attn.attention_fn becomes a KVCache
        def forward(self, ids, position_ids):
            return 9.0 * torch.nn.functional.one_hot((ids + 1) % 10, 10)
    ids = generate(Counter(), torch.tensor([[5, 6]]), n=4, temperature=0)
    assert ids.tolist() == [[5, 6, 7, 8, 9, 0]]
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
    """ids (B, T), then n more tokens: (B, T + n).

    Tokens are drawn from softmax(logits / temperature) among the top_k likeliest.

    temperature: 0 takes the likeliest token
    top_k: None = all tokens
    forward: called in place of the model, (ids, position_ids=) -> logits, where the model is one
        stage of a pipeline; with document_mask it gets document_starts= too

    When block_size tokens are there, the cache starts again from the last half of them. Raises
    ValueError for an id that the model does not know, and for logits that are not numbers.
    """
    vocab_size = model.config.vocab_size
    if ids.numel() and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(
            f"the prompt's token ids are {int(ids.min())} to {int(ids.max())}, and the model knows"
            f" 0 to {vocab_size - 1}: give another prompt, or the tokenizer it was trained with"
        )
    forward = forward or model
    block_size = model.config.block_size
    generator = torch.Generator().manual_seed(seed)

    # Caches take the place of each attention, and one token is too little work for several threads.
    attentions = [block.attn for block in model.blocks.values()]
    attention_fns = [attention.attention_fn for attention in attentions]
    masks_documents = getattr(model.config, "document_mask", False)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)

    try:
        n_cached = 0
        new_ids = ids[:, -block_size:]  # what the model has not seen yet
        for i in range(n):
            is_full = n_cached == block_size
            if is_full:
                new_ids = ids[:, -max(1, block_size // 2) :]
            if i == 0 or is_full:
                n_cached = 0
                for attention in attentions:
                    attention.attention_fn = KVCache(model.config.window)

            n_known = n_cached + new_ids.shape[1]
            arguments = {"position_ids": torch.arange(n_cached, n_known, device=new_ids.device)}
            if masks_documents:
                arguments["document_starts"] = model.document_starts(ids[:, -n_known:])
                # A cache masks the newest token itself.
                model.masks_for = "sdpa" if n_cached == 0 else "cache"
            # On the CPU, where the generator is, so a seed draws the same numbers on every device.
            logits = forward(new_ids, **arguments)[:, -1].cpu()  # (B, V)
            n_cached = n_known
            new_ids = draw(logits, temperature, top_k, generator).to(ids.device)
            ids = torch.cat([ids, new_ids], 1)
        return ids
    finally:
        for attention, attention_fn in zip(attentions, attention_fns):
            attention.attention_fn = attention_fn
        if masks_documents:
            model.masks_for = model.config.attention
        torch.set_num_threads(n_threads)


def draw(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    """One token for each sequence: logits (B, V) on the CPU -> ids (B, 1)."""
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    # Also with temperature 0, because NaN and infinite logits show in the probabilities.
    probabilities = torch.softmax(logits / (temperature or 1), -1)
    if probabilities.isnan().any():
        raise ValueError(
            "the model's logits are NaN or infinite, so no token can be drawn: its weights are not "
            "finite any more; take an earlier checkpoint"
        )
    if temperature == 0:
        # The first one where several are equal, as rounding in softmax may make them.
        return probabilities.argmax(-1, keepdim=True)
    return torch.multinomial(probabilities, 1, generator=generator)


class KVCache:
    """Attention that keeps the keys and values of earlier calls, the last `window` of them."""

    def __init__(self, window: int | None):
        self.window = window
        self.k = None  # (B, Hkv, tokens, D)
        self.v = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents=None) -> Tensor:
        """q (B, H, T, D), k and v (B, Hkv, T, D) -> (B, H, T, D); T is 1 after the first call.

        documents: of all tokens so far (layers/document_mask.py), for the first call with a mask.
        """
        is_prompt = self.k is None
        if not is_prompt:
            k = torch.cat([self.k, k], 2)
            v = torch.cat([self.v, v], 2)

        # Beyond the window no later token sees a key.
        start = 0 if self.window is None else -self.window
        self.k = k[:, :, start:]
        self.v = v[:, :, start:]
        if is_prompt:
            return causal_attention(q, k, v, self.window, documents)
        # One new token sees everything that is kept, or of that its own document.
        mask = None
        if documents is not None:
            n = documents.starts.shape[1]
            places = torch.arange(n - self.k.shape[2], n, device=q.device)
            mask = (places >= documents.starts[:, -1:])[:, None, None]  # (B, 1, 1, tokens)
        return newest_attention(q, self.k, self.v, mask)


if __name__ == "__main__":
    for temperature in 0.0, 0.5, 1.0, 2.0:
        ids = draw(torch.tensor([[0.0, 1, 2]] * 1000), temperature, None, torch.Generator())
        print(f"logits 0, 1, 2 at temperature {temperature}:", ids.view(-1).bincount(minlength=3))
