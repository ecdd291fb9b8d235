"""The loss over chunks of tokens: the logits of all tokens at once are never in memory.

    whole     logits = x Wᵀ + b                    (N, V), kept with their softmax until backward
              loss = loss_of(logits)
    chunks    for each chunk of n tokens (train.py: --loss_chunk=n)
                  logits = x[chunk] Wᵀ + b         (n, V)
                  loss += loss_of(logits)
                  d = d loss_of / d logits         (n, V)
                  dx[chunk] = d W                  (n, C)
                  dW += dᵀ x[chunk]                (V, C), summed in at least float32
                  db += sum of d's rows            (V,)
              backward: dx, dW, db times the gradient of the loss

N tokens, C channels, V words. The loss is a number, so all that backward does is to scale. Forward
can therefore compute the gradients, chunk by chunk, and drop each chunk's logits. These are the
three products that there are without chunks. d takes the place of the logits in the same memory,
an eighth of a chunk at a time, so that what softmax and loss keep besides is an eighth, too.

The other way keeps x alone and computes the logits again in backward, which is a fourth product.
What computing early costs: dW is there from forward on, where otherwise backward would make it at
its start. That is nothing, unless several forwards wait for their backwards, as in the last stage
of a pipeline under gpipe, which then holds a dW for each.

Head and loss of GPT-2 124M (C = 768, V = 50,304), forward and backward of 2048 tokens in bfloat16
on one core of an Intel Xeon, in seconds of CPU time, median of three: all tokens at once 2.32,
chunks of 256 1.93, of 512 1.66, of 1024 1.68. A fourth product would take 0.39. Chunks are faster
because softmax and its derivative work on memory that is in the caches.

loss_of is any function of a chunk's logits that adds over tokens: a cap, a penalty, a collective
(parallel/tensor.py) belong to it. Its gradient is autograd's.

References: Cut Cross-Entropy (Wijmans et al. 2024, 2411.09009) and Liger Kernel (Hsu et al. 2024,
2410.10989) do this in kernels of their own. Here it is a loop over torch's, for any loss.

Example:
    import torch
    import torch.nn.functional as F
    from layers.chunked_loss import chunked_loss
    x = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (10,))

    def loss_of(logits, where):
        return F.cross_entropy(logits, targets[where], reduction="sum")

    loss = chunked_loss(x, weight, None, loss_of, 3)
    whole = loss_of(x @ weight.t(), slice(0, 10))
    assert torch.allclose(loss, whole)
    found = torch.autograd.grad(loss / 10, [x, weight])
    expected = torch.autograd.grad(whole / 10, [x, weight])
    assert all(map(torch.allclose, found, expected))
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PARTS = 8  # of a chunk: so many times does loss_of see some of its tokens
WORDS = 8192  # of which the weight's gradient is made at once


def chunked_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss_of: Callable[[Tensor, slice], Tensor],
    size: int,
    matmul: Callable = F.linear,
) -> Tensor:
    """The sum of loss_of over all N tokens, 0-dim, with the logits of `size` tokens at a time.

    x (N, C), weight (V, C), bias (V,); loss_of(logits (n, V), which of the N tokens they are of) ->
    0-dim; matmul(a (M, K), b (N, K), bias (N,) or None) -> a bᵀ + bias. The gradients go back once:
    a second backward raises RuntimeError.
    """
    inputs = [p for p in (x, weight, bias) if p is not None]
    if torch.is_grad_enabled() and any(p.requires_grad for p in inputs):
        return ChunkedLoss.apply(x, weight, bias, loss_of, size, matmul)
    total = 0.0
    for tokens, some, w, b in chunks(x, weight, bias, size):
        logits = matmul(some, w, b)  # (n, V)
        for part, where in parts(tokens, size):
            total = total + loss_of(logits[part], where)
    return total


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, loss_of, size, matmul):
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        total = 0.0
        dx = torch.empty_like(x) if needs_x else None
        sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=sum_dtype) if needs_bias else None
        for tokens, some, w, b in chunks(x, weight, bias, size):
            logits = matmul(some, w, b)  # (n, V)
            for part, where in parts(tokens, size):
                leaf = logits[part].detach().requires_grad_()
                with torch.enable_grad():
                    loss = loss_of(leaf, where)
                total = total + loss.detach()
                # Nobody needs these logits again: their gradient takes their place.
                (gradient,) = torch.autograd.grad(loss, leaf)
                logits[part] = gradient
            # Not what the last part has kept, while the products are made.
            del leaf, loss, gradient
            if needs_x:
                dx[tokens] = matmul(logits, w.t(), None)
            if needs_weight:
                add_product(dweight, logits, some, matmul)
            if needs_bias:
                dbias += logits.sum(0, dtype=sum_dtype)
            del logits
        ctx.gradients = dx, dweight, dbias
        ctx.dtypes = x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("chunked_loss: its gradients have gone back already")
        scaled = []
        for gradient, dtype in zip(ctx.gradients, ctx.dtypes):
            if gradient is not None:
                # In at least float32: a factor rounded to bfloat16 would be off by up to 0.4 %.
                wide = gradient.to(torch.promote_types(dtype, torch.float32))
                gradient = wide.mul_(dloss).to(dtype)
            scaled.append(gradient)
        # Nobody else may hold them: autograd then takes them for p.grad without a copy.
        ctx.gradients = None
        return *scaled, None, None, None


def add_product(dweight: Tensor, d: Tensor, x: Tensor, matmul: Callable) -> None:
    """dweight += dᵀ x, in dweight's dtype: (V, C), (n, V), (n, C)."""
    # Some words at a time: the product of all would be a second tensor of dweight's size.
    for rows, some in zip(dweight.split(WORDS), d.split(WORDS, 1)):
        # Cast by itself: an addition of two dtypes takes three times as long on a CPU.
        rows += matmul(some.t(), x.t(), None).to(dweight.dtype)


def chunks(x: Tensor, weight: Tensor, bias: Tensor | None, size: int):
    """Yields (which tokens, their x, weight, bias), in the dtype of the products."""
    # Autocast would cast the weight anew in every chunk.
    dtype = x.dtype
    device = x.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    weight = weight.to(dtype)
    if bias is not None:
        bias = bias.to(dtype)
    for start in range(0, len(x), size):
        tokens = slice(start, min(start + size, len(x)))
        yield tokens, x[tokens].to(dtype), weight, bias


def parts(tokens: slice, size: int):
    """Yields (which tokens of the chunk, which of all), an eighth of a chunk at a time."""
    step = -(-size // PARTS)
    for start in range(tokens.start, tokens.stop, step):
        stop = min(start + step, tokens.stop)
        yield slice(start - tokens.start, stop - tokens.start), slice(start, stop)


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
