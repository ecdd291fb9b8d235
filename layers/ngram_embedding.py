"""N-grams with embeddings of their own: the last 2, 3, ... K tokens together choose rows of one
learned table, which are added to the token's embedding.

    x = embed[token] + sum over k = 2 .. K of grams[hash(last k tokens) mod R]        (B, T, C)

A byte says little, the last five a good deal: what a first block of attention would have to put
together is there in one lookup. The table has far fewer rows than there are n-grams; those that
share one share what they learn, and the rare ones hardly disturb the frequent ones. It starts at
zero, as if it were not there, and is an embedding to the optimizer. It costs R C weights, their
gradient and state, and no product.

The hash is a function of token ids alone, the same on every machine. Before the start of a row
stands a token that no text has. In generation the tokens before the new one are remembered. Tokens
before a rank's own are another rank's under context parallelism: there it is refused
(settings/checks.py).

References: hashed n-grams of bytes, Pagnoni et al. 2024 (2412.09871), section 3.2; over-tokenized
transformers, Huang et al. 2025 (2501.16975); bigrams of the nanoGPT speedruns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NGramEmbedding(nn.Embedding):
    """A table (rows, width) for n-grams of 2 to `longest` tokens. The weight is left
    uninitialised."""

    def __init__(self, rows: int, width: int, longest: int):
        super().__init__(rows, width, _weight=torch.empty(rows, width))
        self.longest, self.past = longest, None

    def forward(self, rows: Tensor) -> Tensor:
        """rows (K - 1, B, T), from `find` -> (B, T, C)."""
        return super().forward(rows).sum(0)

    def find(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids (B, T), from the start of a row or, when not training, from positions[0] on -> the
        numbers of their rows in the table (K - 1, B, T)."""
        T = ids.shape[1]
        if not self.training:  # in generation ids are what is new
            before = int(positions.reshape(-1)[0])
            ids = self.past = torch.cat([self.past[:, :before], ids], 1) if before else ids
        found, h = [], ids
        for k in range(1, self.longest):
            # The k-th before it
            h = h + 0x9E3779B1 * (F.pad(ids, (k, 0), value=-1)[:, : ids.shape[1]] + 2)
            # Mixed, in 32 bits
            h = ((h & 0xFFFFFFFF) ^ ((h & 0xFFFFFFFF) >> 16)) * 0x45D9F3B & 0xFFFFFFFF
            found.append((h ^ (h >> 16))[:, -T:] % self.num_embeddings)
        return torch.stack(found)
