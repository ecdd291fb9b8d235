"""N-grams with embeddings of their own, in one hashed table, added to the token's embedding.

    x = embed[token] + sum over k = 2 .. K of grams[hash(last k tokens) mod R]        (B, T, C)

A byte says little, the last five bytes say a good deal. One lookup brings what a first block of
attention would otherwise have to put together. The table has far fewer rows (R) than there are
n-grams. N-grams that share a row share what they learn, and rare n-grams hardly disturb frequent
ones. The table starts at zero, as if it were not there, and the optimizer treats it as an
embedding. It costs R C weights with their gradient and state, and no matrix product.

The hash is a function of token ids alone, the same on every machine. Before the start of a sequence
comes a token id that no text has. In generation the tokens before the new one are remembered.
Context parallelism is refused (settings/checks.py): there the tokens before a rank's own are on
another rank.

References: hashed n-grams of bytes, Pagnoni et al. 2024 (2412.09871), section 3.2; over-tokenized
transformers, Huang et al. 2025 (2501.16975); bigrams of the nanoGPT speedruns.

Example:
    import torch
    from layers.ngram_embedding import NGramEmbedding
    embed = torch.nn.Embedding(10, 8)
    grams = NGramEmbedding(rows=1000, width=8, longest=3)
    torch.nn.init.zeros_(grams.weight)
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    rows = grams.find(ids, torch.arange(5))  # (2, 1, 5): of the 2-grams, of the 3-grams
    x = embed(ids) + grams(rows)  # (1, 5, 8)
    assert rows[0, 0, 1] == rows[0, 0, 4]  # both end the 2-gram 1 2
    assert rows[1, 0, 1] != rows[1, 0, 4]  # its 3-grams differ: nothing 1 2, and 3 1 2
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NGramEmbedding(nn.Embedding):
    """A table (rows, width) for n-grams of 2 to `longest` tokens; its weight is uninitialised."""

    def __init__(self, rows: int, width: int, longest: int):
        super().__init__(rows, width, _weight=torch.empty(rows, width))
        self.longest = longest
        self.past = None  # (B, tokens) ids so far, in evaluation and generation

    def forward(self, rows: Tensor) -> Tensor:
        """rows (K - 1, B, T), from `find` -> (B, T, C)."""
        return super().forward(rows).sum(0)

    def find(self, ids: Tensor, positions: Tensor, starts: Tensor | None = None) -> Tensor:
        """The rows in the table of the n-grams that end at each token: (K - 1, B, T).

        ids: (B, T), from the start of a sequence. When not training, they may be the tokens from
        positions[0] on, and the earlier ones are remembered from the calls before. starts: (B, all
        tokens so far) where each token's document begins, before which it has no tokens.
        """
        T = ids.shape[1]
        if not self.training:
            n_before = int(positions.reshape(-1)[0])
            if n_before > 0:
                ids = torch.cat([self.past[:, :n_before], ids], 1)
            self.past = ids

        rows = []
        h = ids
        for k in range(1, self.longest):
            # The token k places back. Before the start it is -1, and + 2 makes it 1: a token that
            # no text has.
            earlier = F.pad(ids, (k, 0), value=-1)[:, : ids.shape[1]]
            if starts is not None:
                is_other = torch.arange(ids.shape[1], device=ids.device) - k < starts
                earlier = earlier.masked_fill(is_other, -1)
            h = h + 0x9E3779B1 * (earlier + 2)
            # Mix the bits: a 32-bit hash in int64, where its products do not overflow.
            h = ((h & 0xFFFFFFFF) ^ ((h & 0xFFFFFFFF) >> 16)) * 0x45D9F3B & 0xFFFFFFFF
            rows.append((h ^ (h >> 16))[:, -T:] % self.num_embeddings)
        return torch.stack(rows)


if __name__ == "__main__":
    rows = NGramEmbedding(1000, 8, longest=3).find(torch.tensor([[1, 2, 3, 1, 2]]), torch.arange(5))
    for n in 2, 3:
        print(f"tokens 1 2 3 1 2: the {n}-grams that end there have rows {rows[n - 2, 0].tolist()}")
