"""The losses over held-out rows: always the same ones, evenly spread, each replica taking a part of them."""

import math

import torch

import data
from generation import generate
from parallel.mesh import Mesh
from tokenizer import Tokenizer


def batches_of(tokens: int, micro_batch_size: int, rows: data.Rows, mesh: Mesh,
               first: bool = False) -> list[list[int]]:  # fmt: skip
    """This replica's row numbers in micro-batches, as many on every rank, for a forward may be a collective;
    the last one may be smaller, or empty."""
    count, dp = max(1, min(tokens // rows.block_size, rows.per_epoch)), mesh.sizes["dp"]
    mine = [i if first else i * rows.per_epoch // count for i in range(mesh.coords["dp"], count, dp)]
    return [mine[i : i + micro_batch_size] for i in range(0, -(-count // dp), micro_batch_size)]


@torch.no_grad()
def evaluate(model: torch.nn.Module, each, rows: data.Rows, tokens: int, micro_batch_size: int,
             tokenizer: Tokenizer, mesh: Mesh, first=False, stopped=lambda: False) -> dict | None:  # fmt: skip
    """val_loss (nats a token), val_bpb (bits a byte; None where tokens have no known length), val_accuracy
    and perplexity over about `tokens` tokens, the same on all ranks: the first ones, or spread over `rows`.

    each(batches, rows, look=): forward on micro-batches of row numbers; look(i, loss, targets) sees each
    loss, and `model.hits` then is the count of right guesses.
    """
    batches = batches_of(tokens, micro_batch_size, rows, mesh, first)
    widths, sums = tokenizer.byte_lengths(), torch.zeros(4, dtype=torch.float64)

    def look(i: int, loss: torch.Tensor, targets: torch.Tensor) -> None:
        if batches[i] and mesh.coords["tp"] == 0:  # the other tp ranks see the same
            n_bytes = int(widths[targets.cpu().numpy()].sum()) if widths is not None else 0
            sums.add_(torch.tensor([loss.item(), model.hits, targets.numel(), n_bytes], dtype=sums.dtype))

    model.eval()
    some, over = 8 * mesh.sizes["pp"], False  # soon enough asked again, enough to fill a pipeline
    for start in range(0, len(batches), some):
        if over := start > 0 and stopped():
            break
        part = [numbers or [0] for numbers in batches[start : start + some]]
        each(part, rows, look=lambda i, *seen: look(start + i, *seen))
    model.train()
    if over:
        return None
    loss, hits, count, n_bytes = mesh.sum(*sums.tolist())
    return {"val_loss": loss / count, "val_bpb": loss / math.log(2) / n_bytes if n_bytes else None,
            "val_accuracy": hits / count, "perplexity": math.exp(min(loss / count, 700))}


def sample(model: torch.nn.Module, tokenizer: Tokenizer, n: int, seed: int, device: torch.device,
           forward=None) -> str:  # fmt: skip
    """A line break and the n tokens that follow. On every rank, for a forward may be a collective."""
    prompt = torch.from_numpy(tokenizer.encode("\n")).to(device)[None]
    prompt = prompt if prompt.numel() else prompt.new_zeros(1, 1)  # shards of an unknown tokenizer
    return tokenizer.decode(generate(model.eval(), prompt, n, 0.8, 50, seed, forward)[0].tolist())
