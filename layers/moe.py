"""Mixture of experts: each token goes through a few of many MLPs, which a router chooses for it.

    s_e = softmax_e(x·w_e)  or  σ(x·w_e)              scores of E experts, in at least float32
    S   = the k experts with the largest s_e + b_e    a tie: the lower index
    g_e = s_e / Σ_{S} s        or s_e                 gates; b has no part in them
    y   = shared(x) + Σ_{e in S} g_e expert_e(x)

    token            0   1   2   3            rows   1   3 | 0   1 | 2 | 0   2   3
    its experts    1 3 0 1 2 3 0 3    sort           expert 0   1   2   3
                                     ----->  products with each expert's own matrices
                                     <-----  y[token] = Σ_j g_j rows[slot of the token's j-th]

No expert has a limit, no token is dropped, and there are always k rows a token. Both ways are
gathers, also in backward: nothing is added up in an order that changes.

Three terms keep the experts' loads even; each is off or on:

    bias    b_e += γ sign(mean load - load_e)      Wang et al. 2024 (2408.15664), DeepSeek-V3
            after a step, from the tokens of the whole batch: update_bias()     (2412.19437)
    z       c Σ_tokens (log Σ_e exp(x·w_e))²       ST-MoE (Zoph et al. 2022, 2202.08906)
    sequence    α T Σ_e f_e P_e for each sequence of T tokens                   DeepSeek-V3
            f_e = E/(k T) x tokens whose k largest s hold e;  P_e = mean over them of s_e / Σ s

z and sequence are sums over sequences, as the token loss is. So they are the same for any
micro-batches and replicas. The loss of Switch and Mixtral, E Σ f_e P_e over a batch, is not: it is
a product of two means, so the mean over micro-batches is another number; and the loss over the
global batch (Qiu et al. 2025, 2501.11873) needs the f of later micro-batches. The bias needs no
gradient, so it can wait for the whole batch's counts.

They are minimised and never part of the loss's value: their gradient enters where they arise, times
`loss_scale`, what the token loss is multiplied by before backward(). Tokens are counted there, too,
in backward, which passes once for every forward that counts: not in an evaluation, and not a second
time in a forward that activation checkpointing runs again.

An expert has its own parameters under its own name, so every optimizer sees a matrix. The experts'
products are a loop that writes into the memory of one product, or torch's kernel F.grouped_mm over
stacked weights, which on Hopper and Blackwell runs all of them at once in bfloat16 and needs rows
of a multiple of 16 bytes. An expert without tokens has a gradient of zeros.

Neighbours: layers/recompute.py

Example:
    import torch
    from torch import nn
    from layers.moe import MoE, update_bias
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.activation = None, torch.relu
            self.fc, self.proj = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)
        def forward(self, x):
            return self.proj(self.activation(self.fc(x)))
    layer = MoE(8, [Expert() for _ in range(4)], n_active=2)
    x = torch.randn(2, 5, 8)
    y = layer(x)
    s = (x @ layer.router.weight.t()).softmax(-1)  # (B, T, E)
    s = s * (s >= s.topk(2).values[..., -1:])
    gates = (s / s.sum(-1, True)).unbind(-1)
    plain = sum(g.unsqueeze(-1) * expert(x) for g, expert in zip(gates, layer.experts.values()))
    assert torch.allclose(y, plain, atol=1e-6)
    y.sum().backward()
    print("tokens of each expert:", layer.counts.tolist())
    update_bias(layer.selection_bias, layer.counts, lr=0.001)
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.recompute import casts, is_transformed, recompute

# On a CPU, see Experts.block.
BLOCK = 64
# What layer.terms adds up, each a sum over tokens.
TERMS = ("z_loss", "sequence_loss", "log_z")


class MoE(nn.Module):
    """x (B, T, C) -> (B, T, C)

    experts: E modules with `fc`, `proj`, `activation` and, for gated ones, a `gate` that is not
    None: proj(activation(fc(x))) or proj(activation(gate(x), fc(x))); n_active: k; shared: a module
    for all tokens, or None; router: softmax or sigmoid; normalize: do the k gates add up to 1?
    z_loss, sequence_loss: c and α, None = off.
    """

    def __init__(
        self,
        width: int,
        experts: list[nn.Module],
        n_active: int,
        shared: nn.Module | None = None,
        router: str = "softmax",
        normalize: bool = True,
        z_loss: float | None = None,
        sequence_loss: float | None = None,
    ):
        super().__init__()
        n = len(experts)
        self.n_expert = n
        self.n_active = n_active
        self.score = {"softmax": softmax, "sigmoid": torch.sigmoid}[router]
        self.log_score = {"softmax": torch.clone, "sigmoid": F.logsigmoid}[router]
        self.normalize = normalize
        self.z_loss = z_loss
        self.sequence_loss = sequence_loss
        self.router = Router(width, n, bias=False)
        self.experts = Experts({str(e): expert for e, expert in enumerate(experts)})
        self.shared = shared
        self.register_buffer("selection_bias", torch.zeros(n))

        # Since somebody has set them to 0: tokens of each expert, and TERMS.
        self.register_buffer("counts", torch.zeros(n, dtype=torch.int64), persistent=False)
        self.register_buffer("terms", torch.zeros(len(TERMS)), persistent=False)
        self.loss_scale = 1.0
        # Of the ranks that hold the same tokens one alone adds the terms.
        self.adds_terms = True
        # (B, E) -> (B, E): adds up over ranks that have other tokens of the same sequences.
        self.sum_loads = None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x)  # (B, T, E)
            scores = self.score(logits)
            chosen = self.choose(scores.detach() + self.selection_bias)  # (B, T, k)
            if self.normalize:
                # From logarithms, up to a constant: all chosen scores may be too small for float32.
                gates = self.log_score(logits).gather(-1, chosen).softmax(-1)
            else:
                gates = scores.gather(-1, chosen)

        order = self.sort(chosen.flatten(0, 1))
        # What autocast makes of x is made before there are k rows of it.
        (narrow,) = casts(x, 1)
        y = self.through_experts(narrow.flatten(0, 1), gates.flatten(0, 1), order).view(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        # Transforms of torch.func take no such Function: there nothing is counted or balanced.
        if torch.is_grad_enabled() and not is_transformed():
            terms = self.balance_terms(logits, scores)
            y = CountAndBalance.apply(y, terms[:2].sum(), terms.detach(), order.counts, self)
        return y

    def sort(self, chosen: Tensor) -> "Order":
        """chosen: (N, k)"""
        return sort(chosen, self.n_expert, *self.experts.block(chosen))

    def choose(self, scores: Tensor) -> Tensor:
        """(..., E) -> (..., k), the indices of the largest, of equal ones the lowest index."""
        found = torch.sort(scores, dim=-1, descending=True, stable=True)
        # A copy: a view would keep the indices of all experts for backward.
        return found.indices[..., : self.n_active].clone()

    def through_experts(self, x: Tensor, gates: Tensor, order: "Order") -> Tensor:
        """x (N, C), gates (N, k) -> (N, C)"""
        rows, ends, slots, _ = order
        if is_transformed():  # transforms of torch.func take no Function such as those below
            h = self.run_experts(with_zeros(x, order)[rows], ends)
            return (h[slots] * gates.to(h.dtype).unsqueeze(-1)).sum(1)
        x = recompute(lambda x: Gather.apply(x, order), x, saves_little=True)  # (R, C)
        h = self.run_experts(x, ends)  # (R, C)
        return Combine.apply(h, gates.to(h.dtype), rows, slots)

    def run_experts(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows sorted by expert (R, C) -> (R, C). parallel/expert.py replaces it."""
        return self.experts(x, ends)

    def balance_terms(self, logits: Tensor, scores: Tensor) -> Tensor:
        """(3,): TERMS of these tokens, the first two times their coefficients."""
        log_z = logits.logsumexp(-1)  # (B, T)
        z_loss = sequence_loss = log_z.new_zeros(())
        if self.z_loss is not None:
            z_loss = self.z_loss * log_z.square().sum()
        if self.sequence_loss is not None:
            # The choice without the bias, as the paper has it.
            chosen = self.choose(scores.detach()).flatten(1)  # (B, Tk)
            ones = scores.new_ones(()).expand(chosen.shape)
            load = torch.zeros_like(scores[:, 0]).scatter_add_(1, chosen, ones)
            if self.sum_loads is not None:
                load = self.sum_loads(load)
            fraction = load * (load.shape[1] / load.sum(1, keepdim=True))  # (B, E)
            share = self.log_score(logits).softmax(-1)  # (B, T, E)
            sequence_loss = self.sequence_loss * (fraction * share.sum(1)).sum()
        return torch.stack([z_loss, sequence_loss, log_z.detach().sum()])


class Experts(nn.ModuleDict):
    """Expert -> MLP: rows x (R, C), sorted by expert, -> (R, C)."""

    # a (M, K), b (N, K) -> (M, N): how all multiply. None: each by its own forward.
    product: Callable | None = staticmethod(F.linear)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        experts = list(self.values())
        if self.product is None or is_transformed():
            return torch.cat([expert(part) for expert, part in zip(experts, split(x, ends))])
        h = self.grouped([expert.fc for expert in experts], x, ends)  # (R, width of an expert)
        if experts[0].gate is None:
            h = experts[0].activation(h)
        else:
            gate = self.grouped([expert.gate for expert in experts], x, ends)
            h = experts[0].activation(gate, h)
        return self.grouped([expert.proj for expert in experts], h, ends)

    def grouped(self, linears: list[nn.Linear], x: Tensor, ends: Tensor) -> Tensor:
        """x (R, K), each row times the matrix of its expert -> (R, N)"""
        weights = [linear.weight for linear in linears]
        biases = [linear.bias for linear in linears if linear.bias is not None]
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        return Grouped.apply(x, ends, self.product, *weights, *biases)

    def block(self, chosen: Tensor) -> tuple[int, int]:
        """(what divides each expert's number of rows, how many it has at least), for sort()."""
        # FP8's products take no rows that 16 does not divide, and not none of them.
        if self.product is None:
            return 16, 1
        # oneDNN makes a kernel for each new number of rows and keeps it: a product of 1,000 rows
        # takes up to twice as long, and the process grows by 0.4 MB. A GPU's kernels take any.
        is_large = chosen.numel() >= 2 * BLOCK * len(self)
        return (BLOCK if is_large and not chosen.is_cuda else 1), 0


class Router(nn.Linear):
    """Logits in at least float32. It has no `matmul`: whatever replaces that of others, such as
    FP8, leaves it alone."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


class Order(NamedTuple):
    """The tokens' rows, k for each, sorted by expert and then by token."""

    rows: Tensor  # (R,): the token of each row; R is kN, or more where rows of zeros fill up
    ends: Tensor  # (E,) int32: where the rows of each expert end
    slots: Tensor  # (N, k): the rows of each token, in the order of its gates
    counts: Tensor  # (E,): tokens of each expert


def sort(chosen: Tensor, n_expert: int, block: int = 1, least: int = 0) -> Order:
    """chosen: (N, k), the experts of each token; block: what divides each expert's number of rows;
    least: how many it has at least.

    Rows that fill up are of a token N, zeros behind all others: they change no amax in FP8, and no
    slot leads to them.
    """
    n_rows, device = chosen.numel(), chosen.device
    by_expert, order = torch.sort(chosen.flatten(), stable=True)
    experts = torch.arange(n_expert, device=device)
    ends = torch.searchsorted(by_expert, experts, right=True)
    counts = ends.diff(prepend=ends.new_zeros(1))
    filled = (counts.clamp(min=least) + block - 1) // block * block
    filled_ends = filled.cumsum(0)
    shift = (filled_ends - filled) - (ends - counts)  # of an expert's first row
    places = torch.arange(n_rows, device=device) + shift[by_expert]
    # As many rows each time: the last expert gets what is left.
    n_filled = -(-(n_rows + n_expert * (block - 1 + least)) // block) * block
    filled_ends[-1] = n_filled
    rows = order.new_full((n_filled,), len(chosen))
    rows.index_put_((places,), order // chosen.shape[1])
    slots = torch.empty_like(order).index_put_((order,), places)
    return Order(rows, filled_ends.int(), slots.view(chosen.shape), counts)


def with_zeros(x: Tensor, order: Order) -> Tensor:
    """x (N, C) and behind it, where rows are filled up, what they are taken from"""
    return F.pad(x, (0, 0, 0, 1)) if len(order.rows) > order.slots.numel() else x


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, lr: float) -> None:
    """b += γ sign(mean load - load), in place. bias (..., E); counts (..., E): tokens; lr: γ."""
    # Without a division: the sign of Σ n - E n.
    bias += lr * (counts.sum(-1, keepdim=True) - counts * counts.shape[-1]).sign()


# ---- as autograd sees them -----------------------------------------------------------------------
class Gather(torch.autograd.Function):
    """x (N, C) -> x[rows] (kN, C). Backward adds up the k rows of a token, in the order of its
    gates."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(order.slots)
        return with_zeros(x, order).index_select(0, order.rows)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return F.embedding_bag(slots, dy, mode="sum"), None


class Grouped(torch.autograd.Function):
    """y[i] = W_e x[i] + b_e, where e is the expert of row i; rows are sorted by expert."""

    @staticmethod
    def forward(ctx, x: Tensor, ends: Tensor, product: Callable, *tensors: Tensor) -> Tensor:
        # The weights themselves are kept, no copy in x's dtype: a layout may free and fetch them.
        ctx.save_for_backward(x, ends, *tensors)
        ctx.product = product
        weights = tensors[: len(ends)]  # each (N, K)
        biases = tensors[len(ends) :]  # each (N,), or none
        y = products(x, weights, ends, product)
        for part, bias in zip(split(y, ends), biases):
            part += bias
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, ends, *tensors = ctx.saved_tensors
        weights = tensors[: len(ends)]
        dx = products(dy, [w.t() for w in weights], ends, ctx.product)
        dweights = outer_products(dy, x, ends, ctx.product)
        dbiases = []
        if len(tensors) > len(ends):
            dbiases = [part.sum(0) for part in split(dy, ends)]
        return dx, None, None, *dweights, *dbiases


class Combine(torch.autograd.Function):
    """h (kN, C), gates (N, k) -> y (N, C): of each token the sum of its rows times its gates."""

    @staticmethod
    def forward(ctx, h: Tensor, gates: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(h, gates, rows, slots)
        return F.embedding_bag(slots, h, mode="sum", per_sample_weights=gates)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, gates, rows, slots = ctx.saved_tensors
        # Of rows that only fill up anything: it is multiplied by 0.
        dh = dy.index_select(0, rows.clamp(max=len(dy) - 1))  # (kN, C)
        dgates = torch.linalg.vecdot(dh, h)[slots]  # (N, k)
        gate_of_row = gates.new_zeros(len(rows)).index_put_((slots,), gates)
        return dh.mul_(gate_of_row.unsqueeze(1)), dgates, None, None


class CountAndBalance(torch.autograd.Function):
    """y as it is. Backward counts tokens, and gives `term` the gradient loss_scale."""

    @staticmethod
    def forward(ctx, y: Tensor, term: Tensor, terms: Tensor, counts: Tensor, layer: MoE) -> Tensor:
        # Attributes, not saved tensors: activation checkpointing would compute those again.
        ctx.terms = terms
        ctx.counts = counts
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        layer = ctx.layer
        layer.counts += ctx.counts
        layer.terms += ctx.terms
        scale = layer.loss_scale if layer.adds_terms else 0.0
        return dy, ctx.terms.new_full((), scale), None, None, None


# ---- products of groups --------------------------------------------------------------------------
def split(x: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    """Rows x (R, C) -> those of each expert."""
    return x.tensor_split(ends[:-1].tolist())


def has_kernel(x: Tensor, *widths: int) -> bool:
    """Does torch multiply all groups at once? It wants rows of a multiple of 16 bytes, and no
    float64."""
    is_aligned = all(width * x.itemsize % 16 == 0 for width in widths)
    is_known = x.dtype != torch.float64 and hasattr(F, "grouped_mm")
    return x.is_cuda and is_aligned and is_known


def products(x: Tensor, weights: list[Tensor], ends: Tensor, product: Callable) -> Tensor:
    """x (R, K), W_e (N, K) of any dtype -> x W_eᵀ (R, N), of each row's expert e"""
    n_out, n_in = weights[0].shape
    if has_kernel(x, n_in, n_out):
        stacked = torch.stack([w.to(x.dtype) for w in weights])
        return F.grouped_mm(x, stacked.transpose(1, 2), offs=ends)
    # One result, of a size that does not change from step to step: malloc reuses it.
    y = x.new_empty(len(x), n_out)
    for w, part, out in zip(weights, split(x, ends), split(y, ends)):
        # One copy at a time in x's dtype.
        if product is F.linear:
            torch.mm(part, w.to(x.dtype).t(), out=out)
        elif len(part):
            out.copy_(product(part, w.to(x.dtype)))
    return y


def outer_products(dy: Tensor, x: Tensor, ends: Tensor, product: Callable) -> list[Tensor]:
    """dy (R, N), x (R, K) -> dyᵀ x (N, K) over the rows of each expert"""
    if has_kernel(x, x.shape[1], dy.shape[1]):
        return F.grouped_mm(dy.t(), x, offs=ends).unbind()
    pairs = zip(split(dy, ends), split(x, ends))
    return [product(a.t(), b.t()) if len(a) else a.t() @ b for a, b in pairs]


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
