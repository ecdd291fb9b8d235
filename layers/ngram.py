"""Counted n-grams under a GPT: its logits are added to log p(next | last tokens) as the training
text counts it. So a run starts where counting ends, and learns what counting does not know.

    logits = GPT(x) + log p_K     p_k(w | c) = (max(n(c w) - d, 0) + d u(c) p_(k-1)(w | c')) / n(c)

c: the last k tokens, c': without the oldest; n(c w): how often w follows c in the text, below order
K behind how many different tokens c w stands there; u(c): how many different w follow; d = n1 / (n1
+ 2 n2), kept within .1 and .95, where n1 and n2 n-grams were counted once and twice; p_(-1) = 1 /
V. That is Kneser and Ney 1995, interpolated, with one discount an order (Chen and Goodman 1998). A
network on top of it: Li et al. 2022, 2210.14431.

In training the text's own count of a token is taken off again (leave one out): a prior that has
seen the answer would teach the network to be silent. The orders kept as a table are left as they
are: a context there is met MANY times on the average, so one more or less is little. At the start
of a row contexts are short, as they are for the network; what counts there is kinds, of which one
token more is mostly none more: nothing is taken off before order K is reached.

    NGrams(tokens, order, vocab_size).add_to(model)        tokens (N,): the ids of the training text

Counting 9.8M bytes to order 6 takes half a second; 100 MB are kept, 150 at the peak, on every rank.
The counts are a function of the text, so no checkpoint holds them. A rank needs whole rows and
whole logits: no tp, cp, pp.
"""

import numpy as np
import torch
from torch import Tensor, nn

LIMIT, TABLE = 2**27, 2**22  # tokens that are counted; numbers in the table of the low orders
MANY = 100  # times that a context of theirs is there, on the average


class Order:
    """All n-grams of one order. keys (N,) sorted, k context tokens and the next one in `bits`
    each."""

    def __init__(self, keys: np.ndarray, bits: int):
        first = starts(keys)
        self.keys, self.n = keys[first], np.diff(first, append=len(keys)).astype(np.float32)
        contexts = self.keys >> np.uint64(bits)
        self.first = starts(contexts)
        self.contexts, self.first = contexts[self.first], np.append(self.first, len(contexts))
        self.next = (self.keys & np.uint64(2**bits - 1)).astype(np.int64)
        once, twice = (np.count_nonzero(self.n == n) for n in (1, 2))
        self.d = np.float32(min(max(once / max(once + 2 * twice, 1), 0.1), 0.95))

    def find(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index of each context among mine, whether it is there)"""
        at = np.minimum(np.searchsorted(self.contexts, contexts), len(self.contexts) - 1)
        return at, self.contexts[at] == contexts

    def entries(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(i, place among my n-grams) of all that follow the contexts at[i]."""
        n = self.first[at + 1] - self.first[at]
        i = np.repeat(np.arange(len(at)), n)
        return i, np.arange(len(i)) + np.repeat(self.first[at] - np.cumsum(n) + n, n)


class NGrams:
    """Raises ValueError where order + 1 tokens have no room in 64 bits, or the text is too short or
    long."""

    def __init__(self, tokens: np.ndarray, order: int, vocab_size: int):
        self.vocab_size, self.bits = vocab_size, max(1, (vocab_size - 1).bit_length())
        most = 64 // self.bits - 1
        if not 1 <= order <= most:
            raise ValueError(f"with {vocab_size} different tokens it is from 1 to {most}")
        if not order < len(tokens) <= LIMIT:
            raise ValueError(
                f"it counts texts of {order + 1} to {LIMIT:,} tokens, not of {len(tokens):,}"
            )
        if (most := int(tokens.max())) >= vocab_size:
            raise ValueError(f"the text holds token id {most}, and vocab_size is {vocab_size}")
        keys = np.zeros(len(tokens) - order, np.uint64)
        for j in range(order + 1):
            keys <<= np.uint64(self.bits)
            keys |= tokens[j : j + len(keys)].astype(np.uint64)
        self.orders = []
        for k in range(order, -1, -1):  # below the highest each different one is counted once
            keys.sort()
            self.orders.insert(0, Order(keys, self.bits))
            keys = self.orders[0].keys & np.uint64(2 ** (k * self.bits) - 1)
        # The low orders have long lists of what follows, and all tokens need them: p as a table, by
        # context.
        most = min(TABLE // vocab_size, len(tokens) // MANY)
        self.tabled = sum(len(o.contexts) <= most for o in self.orders[1:])  # 1 .. so many
        tables, self.rows = [np.full((1, vocab_size), 1 / vocab_size, np.float32)], [0]
        for k, o in enumerate(self.orders[: self.tabled + 1]):
            i, e = o.entries(np.arange(len(o.contexts)))
            n, back = np.bincount(i, o.n[e]), np.bincount(i, np.minimum(o.n[e], o.d))
            shorter = o.contexts & np.uint64(2 ** (max(k - 1, 0) * self.bits) - 1)
            below = tables[k][self.orders[k - 1].find(shorter)[0] if k else [0]]
            tables.append(below * (back / n).astype(np.float32)[:, None])
            tables[-1][i, o.next[e]] += np.maximum(o.n[e] - o.d, 0) / n[i]
            self.rows.append(self.rows[-1] + len(o.contexts))  # where the next order's begin
        self.table = torch.from_numpy(np.concatenate(tables[1:]))

    def log_probs(self, tokens: np.ndarray, targets: np.ndarray | None = None) -> Tensor:
        """tokens (B, T): rows from their start -> (B, T, V), of what follows each token. targets
        (B, T): what does follow, of whose counts one is taken off."""
        (B, T), order = tokens.shape, len(self.orders) - 1
        before = np.pad(tokens.astype(np.uint64), ((0, 0), (order, 0)))
        context, row, found = np.zeros(B * T, np.uint64), np.zeros(B * T, np.int64), []
        # Places whose context of k tokens is known; with one more it may not be
        here = np.arange(B * T)
        for k, o in enumerate(self.orders):
            if k:
                oldest = before[:, order + 1 - k : order + 1 - k + T].ravel()
                context |= oldest << np.uint64((k - 1) * self.bits)
                here = here[here % T >= k - 1]  # a row's first tokens have fewer before them
            at, known = o.find(context[here])
            here, at = here[known], at[known]
            if k <= self.tabled:
                row[here] = self.rows[k] + at
            else:
                found.append((o, here, at))
        left, parts = np.ones(B * T, np.float32), []
        off = None if targets is None else (np.arange(B * T) % T >= order - 1).astype(np.float32)
        for o, here, at in reversed(found):
            i, e = o.entries(at)
            n, follows = o.n[e], o.next[e]
            if off is not None:  # off the order below only where it was the only one here
                mine = np.flatnonzero(follows == targets.ravel()[here[i]])
                n[mine] -= off[here[i[mine]]]
                off[here[i[mine]]] *= n[mine] == 0
            total, back = (
                np.bincount(i, n, len(here)),
                np.bincount(i, np.minimum(n, o.d), len(here)),
            )
            total = np.where(total > 0, total, np.inf)
            parts.append((here[i], follows, left[here[i]] * np.maximum(n - o.d, 0) / total[i]))
            left[here] *= np.where(total < np.inf, back / total, 1)
        p = self.table[torch.from_numpy(row)].mul_(torch.from_numpy(left)[:, None])  # (B T, V)
        for i, follows, share in parts:
            p.numpy()[i, follows] += share.astype(np.float32)
        return p.log_().view(B, T, -1)

    def add_to(self, model: nn.Module) -> None:
        """model: takes (x (B, T), targets, positions) and adds prior(targets)[:, -T:] to its
        logits. From now on in forward, evaluation and generation."""
        past = None

        def see(_, args, named) -> None:
            nonlocal past
            x = args[0].cpu()
            positions = named.get("positions", args[2] if len(args) > 2 else None)
            first = 0 if positions is None or model.training else int(positions.reshape(-1)[0])
            # In generation x is what is new
            past = torch.cat([past[:, :first], x], 1) if first else x

        def prior(targets: Tensor | None) -> Tensor:
            answers = targets.cpu().numpy() if targets is not None and model.training else None
            return self.log_probs(past.numpy(), answers)

        model.register_forward_pre_hook(see, with_kwargs=True)
        model.logit_bias = prior


def starts(x: np.ndarray) -> np.ndarray:
    """Where in the sorted (N,) another value begins."""
    return np.flatnonzero(np.append(True, x[1:] != x[:-1]))
