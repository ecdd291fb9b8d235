"""Counted n-grams under a GPT: a run starts where counting ends, and learns what counts do not say.

The text's own statistics, log p(next | last tokens), are added to the logits:

    logits = GPT(x) + log p_K     p_k(w | c) = (max(n(c w) - d, 0) + d u(c) p_(k-1)(w | c')) / n(c)

    c, c'    the last k tokens; the same without the oldest
    n(c w)   order K: how often w follows c in the text; lower orders: how many different tokens
             come before c w there
    n(c)     the sum of n(c w) over w
    u(c)     how many different w follow c
    d        the discount of the order, n1 / (n1 + 2 n2) within 0.1 and 0.95, where n1 and n2
             n-grams have the count 1 and 2
    p_(-1)   1 / V

These are the interpolated counts of Kneser and Ney 1995, with one discount for each order (Chen and
Goodman 1998). A network on top of them: Li et al. 2022 (2210.14431).

In training the count of the true next token is reduced by one (leave one out). A prior that has
seen the answer would teach the network to be silent. Two cases need no such correction:
- Low orders are kept as a table of probabilities. A context there occurs MANY times on average, so
  one count more or less changes little.
- At the start of a sequence contexts are short, as they are for the network. Orders below K count
  different tokens, not occurrences, and one occurrence less hardly changes such a count. So nothing
  is taken off before a context reaches order K.

    NGrams(tokens, order, vocab_size).add_to(model)        tokens (N,): the ids of the training text

Counting 9.8M bytes to order 6 takes half a second. It keeps 100 MB, 150 MB at the peak, on every
rank. The counts are a function of the text, so no checkpoint holds them. A rank needs full
sequences and full logits: no tp, cp or pp.

Example:
    import numpy as np
    from layers.ngram import NGrams
    text = np.frombuffer(b"the cat, the dog and the cow; " * 40, np.uint8)
    ngrams = NGrams(text, order=3, vocab_size=256)
    prompt = np.frombuffer(b"and t", np.uint8)
    log_probs = ngrams.log_probs(prompt[None])  # (1, 5, 256)
    assert chr(log_probs[0, -1].argmax()) == "h"
"""

import numpy as np
import torch
from torch import Tensor, nn

LIMIT = 2**27  # tokens that are counted
TABLE = 2**22  # numbers in the table of the low orders
MANY = 100  # occurrences of a context of those orders, on average


class Order:
    """All n-grams of one order k, sorted by context, each with its count.

    keys: (N,) uint64, sorted: k context tokens and the next token, in `bits` bits each.
    """

    def __init__(self, keys: np.ndarray, bits: int):
        # Equal keys are neighbours: each run of them is an n-gram, its length the count.
        start_of_run = starts(keys)
        self.keys = keys[start_of_run]
        self.n = np.diff(start_of_run, append=len(keys)).astype(np.float32)
        self.next = (self.keys & np.uint64(2**bits - 1)).astype(np.int64)

        # The n-grams of context i are first[i] .. first[i + 1] - 1.
        contexts = self.keys >> np.uint64(bits)
        start_of_context = starts(contexts)
        self.contexts = contexts[start_of_context]
        self.first = np.append(start_of_context, len(contexts))

        n1 = np.count_nonzero(self.n == 1)
        n2 = np.count_nonzero(self.n == 2)
        self.d = np.float32(min(max(n1 / max(n1 + 2 * n2, 1), 0.1), 0.95))

    def find(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each of these contexts its index here, and whether it is here at all."""
        index = np.searchsorted(self.contexts, contexts)
        index = np.minimum(index, len(self.contexts) - 1)
        return index, self.contexts[index] == contexts

    def entries(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All n-grams of the contexts index[0], index[1], ..., one after the other.

        Returns for each n-gram the i of its context index[i], and its own index here.
        """
        first = self.first[index]
        lengths = self.first[index + 1] - first
        i = np.repeat(np.arange(len(index)), lengths)
        # Count on from the first of each context: 7 8 9 | 2 3 | ...
        begins = np.cumsum(lengths) - lengths
        return i, np.arange(len(i)) + np.repeat(first - begins, lengths)


class NGrams:
    """The n-grams of a text up to an order: `orders`, and `table` for the low ones of them.

    tokens: (N,) ids; order: context tokens; vocab_size: V. Raises ValueError if order + 1 tokens
    have no room in 64 bits, and for a text that is too short, too long, or has other ids.
    """

    def __init__(self, tokens: np.ndarray, order: int, vocab_size: int):
        self.vocab_size = vocab_size
        self.bits = max(1, (vocab_size - 1).bit_length())
        largest_order = 64 // self.bits - 1
        if not 1 <= order <= largest_order:
            raise ValueError(f"with {vocab_size} different tokens it is from 1 to {largest_order}")
        if not order < len(tokens) <= LIMIT:
            raise ValueError(
                f"it counts texts of {order + 1} to {LIMIT:,} tokens, not of {len(tokens):,}"
            )
        largest_id = int(tokens.max())
        if largest_id >= vocab_size:
            raise ValueError(
                f"the text holds token id {largest_id}, and vocab_size is {vocab_size}"
            )
        self.orders = self.count(tokens, order)
        self.tabulate(len(tokens))

    def count(self, tokens: np.ndarray, order: int) -> list[Order]:
        """The n-grams of order 0, 1, ... `order`."""
        # order + 1 tokens in a row as one integer. The oldest has the highest bits, so that sorting
        # brings equal contexts together.
        keys = np.zeros(len(tokens) - order, np.uint64)
        for j in range(order + 1):
            keys <<= np.uint64(self.bits)
            keys |= tokens[j : j + len(keys)].astype(np.uint64)

        orders = []
        for k in range(order, -1, -1):
            keys.sort()
            orders.insert(0, Order(keys, self.bits))
            # Without the oldest token. Each n-gram is there once now, so the order below counts
            # different tokens in front.
            keys = orders[0].keys & np.uint64(2 ** (k * self.bits) - 1)
        return orders

    def tabulate(self, n_tokens: int) -> None:
        """Order 0 and the orders with few contexts, as a table of p: (contexts of all of them, V).

        Their contexts have long lists of next tokens, and every token needs them.
        """
        most_contexts = min(TABLE // self.vocab_size, n_tokens // MANY)
        self.tabled = sum(len(o.contexts) <= most_contexts for o in self.orders[1:])
        uniform = np.full((1, self.vocab_size), 1 / self.vocab_size, np.float32)
        tables = [uniform]  # p_(-1), p_0, ...
        self.rows = [0]  # where the rows of order 0, 1, ... begin
        for k, o in enumerate(self.orders[: self.tabled + 1]):
            i, entry = o.entries(np.arange(len(o.contexts)))
            n = o.n[entry]
            n_context = np.bincount(i, n)
            discounted = np.bincount(i, np.minimum(n, o.d))  # d u(c)

            # p_(k-1) of the contexts without their oldest token. find() never misses one of these.
            if k == 0:
                below = uniform
            else:
                shorter = o.contexts & np.uint64(2 ** ((k - 1) * self.bits) - 1)
                below = tables[k][self.orders[k - 1].find(shorter)[0]]
            p = below * (discounted / n_context).astype(np.float32)[:, None]
            p[i, o.next[entry]] += np.maximum(n - o.d, 0) / n_context[i]
            tables.append(p)
            self.rows.append(self.rows[-1] + len(o.contexts))
        self.table = torch.from_numpy(np.concatenate(tables[1:]))

    def log_probs(self, tokens: np.ndarray, targets: np.ndarray | None = None) -> Tensor:
        """log p of what follows each token: (B, T, V) float32.

        tokens: (B, T), sequences from their start; targets: (B, T), what does follow, whose count
        is reduced by one; None = no correction.
        """
        B, T = tokens.shape
        row, found = self.known_contexts(tokens)

        # From the highest order down: what an order knows, times what the orders above left to it.
        left = np.ones(B * T, np.float32)
        shares = []
        # What is taken off a target's count: 1 where the context has all K tokens, else 0.
        off = None
        if targets is not None:
            order = len(self.orders) - 1
            off = (np.arange(B * T) % T >= order - 1).astype(np.float32)
        for o, here, index in reversed(found):
            i, entry = o.entries(index)
            n = o.n[entry]
            follows = o.next[entry]
            if off is not None:
                is_target = np.flatnonzero(follows == targets.ravel()[here[i]])
                at = here[i[is_target]]
                n[is_target] -= off[at]
                # The order below counts different n-grams: it loses one where this one is gone.
                off[at] *= n[is_target] == 0
            n_context = np.bincount(i, n, len(here))
            discounted = np.bincount(i, np.minimum(n, o.d), len(here))  # d u(c)
            # A context with no count left knows nothing: inf makes its share 0.
            n_context = np.where(n_context > 0, n_context, np.inf)
            share = left[here[i]] * np.maximum(n - o.d, 0) / n_context[i]
            shares.append((here[i], follows, share))
            left[here] *= np.where(n_context < np.inf, discounted / n_context, 1)

        # The table holds the low orders already mixed: one lookup, weighted by what is left.
        p = self.table[torch.from_numpy(row)].mul_(torch.from_numpy(left)[:, None])  # (B T, V)
        for i, follows, share in shares:
            p.numpy()[i, follows] += share.astype(np.float32)
        return p.log_().view(B, T, -1)

    def known_contexts(self, tokens: np.ndarray) -> tuple[np.ndarray, list[tuple]]:
        """Which contexts end at each of the B T tokens: (row in the table, found).

        found: for each order above the table (Order, the tokens whose context is there, its index).
        """
        B, T = tokens.shape
        order = len(self.orders) - 1
        padded = np.pad(tokens.astype(np.uint64), ((0, 0), (order, 0)))
        context = np.zeros(B * T, np.uint64)
        row = np.zeros(B * T, np.int64)
        found = []
        # A context is known only if the context without its oldest token is.
        here = np.arange(B * T)
        for k, o in enumerate(self.orders):
            if k > 0:
                oldest = padded[:, order + 1 - k : order + 1 - k + T].ravel()
                context |= oldest << np.uint64((k - 1) * self.bits)
                # The first tokens of a sequence have fewer before them.
                here = here[here % T >= k - 1]
            index, is_known = o.find(context[here])
            here = here[is_known]
            index = index[is_known]
            if k <= self.tabled:
                row[here] = self.rows[k] + index
            else:
                found.append((o, here, index))
        return row, found

    def add_to(self, model: nn.Module) -> None:
        """From now on the logits of `model` have log p added, in forward and in generation.

        model: called with (x (B, T), targets, position_ids); it adds logit_bias(targets) (B, T, V)
        to its logits.
        """
        past = None  # (B, tokens): the sequences so far

        def remember(_, args, named) -> None:
            nonlocal past
            x = args[0].cpu()
            position_ids = named.get("position_ids", args[2] if len(args) > 2 else None)
            first = 0
            if position_ids is not None and not model.training:
                first = int(position_ids.reshape(-1)[0])
            # In generation x has only the new tokens: keep those before them.
            past = torch.cat([past[:, :first], x], 1) if first > 0 else x

        def logit_bias(targets: Tensor | None) -> Tensor:
            answers = None
            if targets is not None and model.training:
                answers = targets.cpu().numpy()
            return self.log_probs(past.numpy(), answers)

        model.register_forward_pre_hook(remember, with_kwargs=True)
        model.logit_bias = logit_bias


def starts(x: np.ndarray) -> np.ndarray:
    """Where in the sorted x (N,) another value begins."""
    return np.flatnonzero(np.append(True, x[1:] != x[:-1]))


if __name__ == "__main__":
    text = np.frombuffer(b"the cat, the dog and the cow; " * 40, np.uint8)
    p = NGrams(text, 3, 256).log_probs(text[None, :4])[0, -1].exp()
    print("after 'the '", {chr(i): round(p[i].item(), 2) for i in p.topk(3).indices.tolist()})
