"""The losses over held-out samples: always the same ones, evenly spaced, shared out to replicas.

val_loss counts all tokens. val_bpb counts text alone: a token without bytes of its own (a special
token such as <|endoftext|>, an id beyond the tokenizer's) is left out on both sides,

    val_bpb = sum of -log2 p(token) over the tokens with bytes / sum of their bytes
"""

import contextlib
import math
from collections.abc import Callable

import torch

from data.dataset import Dataset
from data.tokenizer import Tokenizer
from layers.generation import generate
from parallel.mesh import Mesh
from run.microbatches import MicroBatches


def batches_of(
    tokens: int, micro_batch_size: int, dataset: Dataset, mesh: Mesh, first: bool = False
) -> list[list[int]]:
    """This replica's sample ids, in micro-batches.

    All ranks have the same number of micro-batches, for a forward may be a collective. The last one
    may be smaller, or empty.
    """
    dp = mesh.sizes["dp"]
    count = max(1, min(tokens // dataset.block_size, dataset.per_epoch))
    ids = list(range(mesh.coords["dp"], count, dp))
    if not first:
        # Held-out samples are in the order of the text: the first ones would be of one place.
        ids = [i * dataset.per_epoch // count for i in ids]
    most = -(-count // dp)  # samples of the replica that has most
    return [ids[i : i + micro_batch_size] for i in range(0, most, micro_batch_size)]


@torch.no_grad()
def evaluate(
    micro_batches: MicroBatches,
    dataset: Dataset,
    tokens: int,
    micro_batch_size: int,
    tokenizer: Tokenizer,
    mesh: Mesh,
    first: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float | None] | None:
    """val_loss, val_bpb, val_accuracy and perplexity over about `tokens` tokens of the dataset.

    The numbers are the same on all ranks. val_loss is in nats a token. val_bpb is in bits a byte,
    and None where nobody knows the bytes. first: the first samples, instead of evenly spaced ones.
    stopped: called now and then, returns the same on all ranks; once it is true the evaluation ends
    and returns None. A long evaluation must not outlast the patience of who stops the run.
    """
    model = micro_batches.model
    batches = batches_of(tokens, micro_batch_size, dataset, mesh, first)
    token_bytes = tokenizer.byte_lengths(model.config.vocab_size)  # id -> bytes
    # The loss, correct tokens, all tokens, bytes, and the loss of tokens without bytes.
    sums = torch.zeros(5, dtype=torch.float64)

    def on_loss(i: int, loss: torch.Tensor, targets: torch.Tensor) -> None:
        # An empty micro-batch ran sample 0 as padding. The tp ranks see the same: one counts.
        is_padding = not batches[i]
        if is_padding or mesh.coords["tp"] > 0:
            return
        n_bytes = 0
        if token_bytes is not None:
            n_bytes = int(token_bytes[targets.cpu().numpy()].sum())
        seen = [loss.item(), model.n_correct, targets.numel(), n_bytes, silent[0]]
        silent[0] = 0.0
        sums.add_(torch.tensor(seen, dtype=sums.dtype))

    model.eval()
    # Few enough to notice a stop soon, enough to fill a pipeline.
    at_once = 8 * mesh.sizes["pp"]
    is_stopped = False
    with loss_without_bytes(model, token_bytes) as silent:
        for start in range(0, len(batches), at_once):
            is_stopped = start > 0 and stopped()
            if is_stopped:
                break
            some = [ids or [0] for ids in batches[start : start + at_once]]
            micro_batches.evaluate(some, dataset, lambda i, *seen: on_loss(start + i, *seen))
    model.train()
    if is_stopped:
        return None

    # Over all ranks: those that must not count, such as early stages of a pipeline, add 0.
    loss, n_correct, n_tokens, n_bytes, silent_loss = mesh.sum(*sums.tolist())
    val_loss = loss / n_tokens
    bits = (loss - silent_loss) / math.log(2)
    return {
        "val_loss": val_loss,
        "val_bpb": bits / n_bytes if n_bytes else None,
        "val_accuracy": n_correct / n_tokens,
        # Python raises OverflowError for exp(710).
        "perplexity": math.exp(min(val_loss, 700)),
    }


@contextlib.contextmanager
def loss_without_bytes(model: torch.nn.Module, widths):
    """Yields a list of one number, to which a forward adds its loss of the targets of width 0.

    It adds once for each chunk of tokens; who reads the number sets it to 0.
    widths: (V,) bytes of each token id, or None. All tp ranks have the same targets, so the second
    call of `model.loss_fn` may be a collective too.
    """
    plain = model.loss_fn
    silent = [0.0]
    has_none = torch.zeros(0, dtype=torch.bool)
    if widths is not None:
        has_none = torch.from_numpy(widths == 0)

    def loss_fn(logits: torch.Tensor, targets: torch.Tensor | None, *more):
        which = None if targets is None else has_none.to(targets.device)[targets]  # (B, T)
        if which is not None and which.any():
            silent[0] += float(plain(logits[which][None], targets[which][None], False)[0])
        return plain(logits, targets, *more)

    # Where each token has bytes, the model keeps its own loss.
    if has_none.any():
        model.loss_fn = loss_fn
    try:
        yield silent
    finally:
        model.loss_fn = plain


def sample(micro_batches: MicroBatches, tokenizer: Tokenizer, n: int, seed: int) -> str:
    """What the model writes at the beginning of a document, where the run knows documents, or after
    a line break, or after token 0 if it has none: n tokens as text.

    All ranks call it together, for a forward may be a collective.
    """
    model = micro_batches.model.eval()
    document_token = model.config.document_token
    ids, n_unsaid = tokenizer.prompt("\n" if document_token is None else "", document_token)
    prompt = torch.tensor(ids, dtype=torch.long, device=micro_batches.device)[None]
    if not prompt.numel() or prompt.max() >= model.config.vocab_size:
        prompt = prompt.new_zeros(1, 1)
    try:
        ids = generate(model, prompt, n, 0.8, 50, seed, micro_batches.logits)
    except ValueError as error:
        # The weights of a diverged run may be NaN: that ends no run.
        return f"\nthere is none: {error}"
    # The byte 0, which ends a text of several, would make train.log a binary file for grep.
    text = tokenizer.decode(ids[0, n_unsaid:].tolist()).replace("\0", "\n")
    return text if document_token is None else "\n" + text
