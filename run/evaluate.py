"""The losses over held-out rows: always the same ones, evenly spread, each replica taking a part.

val_loss is over all tokens. val_bpb is over text alone: a token without bytes of its own (a special
one such as <|endoftext|>, an id beyond the tokenizer's) is left out on both sides,

    val_bpb = sum of -log2 p(token) over the tokens with bytes / sum of their bytes
"""

import contextlib
import math

import torch

from data import dataset
from data.tokenizer import Tokenizer
from layers.generation import generate
from parallel.mesh import Mesh


def batches_of(
    tokens: int, micro_batch_size: int, rows: dataset.Rows, mesh: Mesh, first: bool = False
) -> list[list[int]]:
    """This replica's row numbers in micro-batches, as many on every rank, for a forward may be a
    collective; the last one may be smaller, or empty."""
    count, dp = max(1, min(tokens // rows.block_size, rows.per_epoch)), mesh.sizes["dp"]
    mine = [
        i if first else i * rows.per_epoch // count for i in range(mesh.coords["dp"], count, dp)
    ]
    return [mine[i : i + micro_batch_size] for i in range(0, -(-count // dp), micro_batch_size)]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    each,
    rows: dataset.Rows,
    tokens: int,
    micro_batch_size: int,
    tokenizer: Tokenizer,
    mesh: Mesh,
    first=False,
    stopped=lambda: False,
) -> dict[str, float | None] | None:
    """val_loss (nats a token), val_bpb (bits a byte; None where nobody knows the bytes),
    val_accuracy and perplexity over about `tokens` tokens, the same on all ranks: the first ones,
    or spread over `rows`.

    each(batches, rows, look=): forward on micro-batches of row numbers; look(i, loss, targets) sees
    each loss, and `model.hits` then is the count of right guesses. stopped(), the same on all
    ranks, is asked now and then: an evaluation may take longer than whoever stops a run is willing
    to wait. Then None.
    """
    batches = batches_of(tokens, micro_batch_size, rows, mesh, first)
    widths = tokenizer.byte_lengths(model.config.vocab_size)
    sums = torch.zeros(5, dtype=torch.float64)

    def look(i: int, loss: torch.Tensor, targets: torch.Tensor) -> None:
        if batches[i] and mesh.coords["tp"] == 0:  # the other tp ranks see the same
            n_bytes = int(widths[targets.cpu().numpy()].sum()) if widths is not None else 0
            seen = [loss.item(), model.hits, targets.numel(), n_bytes, silent[0]]
            sums.add_(torch.tensor(seen, dtype=sums.dtype))

    model.eval()
    some, over = 8 * mesh.sizes["pp"], False  # soon enough asked again, enough to fill a pipeline
    with loss_without_bytes(model, widths) as silent:
        for start in range(0, len(batches), some):
            if over := start > 0 and stopped():
                break
            part = [numbers or [0] for numbers in batches[start : start + some]]
            each(part, rows, look=lambda i, *seen: look(start + i, *seen))
    model.train()
    if over:
        return None
    loss, hits, count, n_bytes, without = mesh.sum(*sums.tolist())
    bpb = (loss - without) / math.log(2) / n_bytes if n_bytes else None
    return {
        "val_loss": loss / count,
        "val_bpb": bpb,
        "val_accuracy": hits / count,
        "perplexity": math.exp(min(loss / count, 700)),
    }


@contextlib.contextmanager
def loss_without_bytes(model: torch.nn.Module, widths):
    """A list of one number: of the newest forward, the loss of the targets whose width is 0.

    Each tp rank has the same targets, so the second call of `model.output` may be a collective too.
    """
    plain, silent = model.output, [0.0]
    has_none = torch.zeros(0, dtype=torch.bool)
    if widths is not None:
        has_none = torch.from_numpy(widths == 0)

    def output(logits: torch.Tensor, targets: torch.Tensor | None, *more):
        silent[0] = 0.0
        which = None if targets is None else has_none.to(targets.device)[targets]  # (B, T)
        if which is not None and which.any():
            silent[0] = float(plain(logits[which][None], targets[which][None], False)[0])
        return plain(logits, targets, *more)

    if has_none.any():
        model.output = output
    try:
        yield silent
    finally:
        model.output = plain


def sample(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    n: int,
    seed: int,
    device: torch.device,
    forward=None,
) -> str:
    """A line break, or token 0 where the model knows none, and the n tokens that follow. On every
    rank, for a forward may be a collective."""
    prompt = torch.from_numpy(tokenizer.encode("\n")).to(device)[None]
    if not prompt.numel() or prompt.max() >= model.config.vocab_size:
        prompt = prompt.new_zeros(1, 1)
    return tokenizer.decode(generate(model.eval(), prompt, n, 0.8, 50, seed, forward)[0].tolist())
