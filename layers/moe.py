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

An expert has its own parameters under its own name, so every optimizer sees a matrix. Its product
is one of `grouped`: a loop over experts, in memory that one product would take, or torch's kernel
F.grouped_mm over stacked weights, which on Hopper and Blackwell runs all of them at once in
bfloat16 and needs rows of a multiple of 16 bytes. An expert without tokens has a gradient of zeros.

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

from layers.recompute import casts, is_transformed

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
        self.n_active = n_active
        self.score = {"softmax": softmax, "sigmoid": torch.sigmoid}[router]
        self.normalize = normalize
        self.z_loss = z_loss
        self.sequence_loss = sequence_loss
        # A Linear of torch: whatever replaces the products of others leaves it in full precision.
        self.router = nn.Linear(width, n, bias=False)
        self.experts = nn.ModuleDict({str(e): expert for e, expert in enumerate(experts)})
        self.shared = shared
        self.register_buffer("selection_bias", torch.zeros(n))

        # a (M, K), b (N, K) -> (M, N): how experts multiply. None: each by its own forward.
        self.product = F.linear
        # Since somebody has set them to 0: tokens of each expert, and TERMS.
        self.counts = torch.zeros(n, dtype=torch.int64)
        self.terms = torch.zeros(len(TERMS))
        self.loss_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.router.weight.to(wide))  # (B, T, E)
            scores = self.score(logits)
            chosen = self.choose(scores.detach() + self.selection_bias)  # (B, T, k)
            gates = scores.gather(-1, chosen)
            if self.normalize:
                gates = gates / gates.sum(-1, keepdim=True)

        order = sort(chosen.flatten(0, 1), len(self.experts))
        # What autocast makes of x is made before there are k rows of it.
        (narrow,) = casts(x, 1)
        y = self.through_experts(narrow.flatten(0, 1), gates.flatten(0, 1), order).view(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        if torch.is_grad_enabled():
            terms = self.balance_terms(logits, scores)
            y = CountAndBalance.apply(y, terms[:2].sum(), terms.detach(), order.ends, self)
        return y

    def choose(self, scores: Tensor) -> Tensor:
        """(..., E) -> (..., k), the indices of the largest, of equal ones the lowest index."""
        found = torch.sort(scores, dim=-1, descending=True, stable=True)
        return found.indices[..., : self.n_active]

    def through_experts(self, x: Tensor, gates: Tensor, order: "Order") -> Tensor:
        """x (N, C), gates (N, k) -> (N, C)"""
        experts = list(self.experts.values())
        if self.product is None or is_transformed():
            parts = x[order.rows].tensor_split(order.ends[:-1].tolist())
            y = torch.cat([expert(part) for expert, part in zip(experts, parts)])
            return (y[order.slots] * gates.to(y.dtype).unsqueeze(-1)).sum(1)
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        first = experts[0]
        names = ["fc", "proj"] if first.gate is None else ["gate", "fc", "proj"]
        tensors = []
        for name in names:
            linears = [getattr(expert, name) for expert in experts]
            tensors += [linear.weight for linear in linears]
            tensors += [linear.bias for linear in linears if linear.bias is not None]
        how = How(first.activation, self.product, len(names))
        return Experts.apply(x, gates, *order, how, *tensors)

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
            fraction = load * (scores.shape[-1] / chosen.shape[1])  # (B, E)
            share = scores / scores.sum(-1, keepdim=True)  # (B, T, E)
            sequence_loss = self.sequence_loss * (fraction * share.sum(1)).sum()
        return torch.stack([z_loss, sequence_loss, log_z.detach().sum()])


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


class Order(NamedTuple):
    """Rows of the tokens, k for each, sorted by expert and then by token."""

    rows: Tensor  # (kN,): the token of each row
    ends: Tensor  # (E,) int32: where the rows of each expert end
    slots: Tensor  # (N, k): the rows of each token, in the order of its gates


def sort(chosen: Tensor, n_expert: int) -> Order:
    """chosen: (N, k), the experts of each token."""
    by_expert, order = torch.sort(chosen.flatten(), stable=True)
    experts = torch.arange(n_expert, device=chosen.device)
    ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=order.device)
    return Order(order // chosen.shape[1], ends, slots.view(chosen.shape))


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, lr: float) -> None:
    """b += γ sign(mean load - load), in place. bias (..., E); counts (..., E): tokens; lr: γ."""
    # Without a division: the sign of Σ n - E n.
    bias += lr * (counts.sum(-1, keepdim=True) - counts * counts.shape[-1]).sign()


# ---- all experts, as autograd sees them ----------------------------------------------------------
class How(NamedTuple):
    activation: Callable
    product: Callable
    n_linear: int  # of an expert


class Experts(torch.autograd.Function):
    """y[t] = Σ_j gates[t, j] proj_e(activation(fc_e(x[t]))), e the j-th expert of token t.

    Expert by expert: its rows stay in the cache from its first product to its last. Kept for
    backward are x and what activation takes.
    """

    @staticmethod
    def forward(ctx, x, gates, rows, ends, slots, how: How, *tensors) -> Tensor:
        *inner, proj = linears = group_linears(tensors, how, ends)
        y = x.new_empty(len(rows), x.shape[1])  # (kN, C)
        kept = []
        for span, e in parts(x, ends, linears):
            part = x.index_select(0, rows[span])
            hidden = [linear.forward(part, e) for linear in inner]
            y[span] = proj.forward(how.activation(*hidden), e)
            kept += hidden
        # The weights themselves are kept, no copy in x's dtype: a layout may free and fetch them.
        ctx.save_for_backward(x, gates, rows, ends, slots, *kept, *tensors)
        ctx.how = how
        ctx.n_kept = len(kept)
        return F.embedding_bag(slots, y, mode="sum", per_sample_weights=gates.to(y.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, rows, ends, slots, *others = ctx.saved_tensors
        kept = iter(others[: ctx.n_kept])
        *inner, proj = linears = group_linears(others[ctx.n_kept :], ctx.how, ends)
        dx = x.new_empty(len(rows), x.shape[1])  # (kN, C)
        gate_of_row = gates.new_empty(len(rows)).index_put_((slots,), gates)
        dgate_of_row = torch.empty_like(gate_of_row)
        for span, e in parts(x, ends, linears):
            part = x.index_select(0, rows[span])
            dpart = dy.index_select(0, rows[span])
            hidden = [next(kept).detach().requires_grad_() for _ in inner]
            with torch.enable_grad():
                a = ctx.how.activation(*hidden)
            # A gate's own gradient is of the output without it.
            da = proj.backward(dpart, e)
            dgate_of_row[span] = (da * a.detach()).sum(-1, dtype=gates.dtype)
            if proj.biases:
                dgate_of_row[span] += dpart.to(gates.dtype) @ proj.biases[e.start].to(gates.dtype)
            gate = gate_of_row[span].unsqueeze(1).to(dy.dtype)
            proj.add_gradients(dpart.mul_(gate), a.detach(), e)
            dhidden = torch.autograd.grad(a, hidden, da.mul_(gate))
            for linear, dh in zip(inner, dhidden):
                linear.add_gradients(dh, part, e)
            dx[span] = sum(linear.backward(dh, e) for linear, dh in zip(inner, dhidden))
        gradients = [gradient for linear in linears for gradient in linear.gradients()]
        dx = F.embedding_bag(slots, dx, mode="sum")
        return dx, dgate_of_row[slots], None, None, None, None, *gradients


class Linears:
    """The same Linear of all experts. e: a slice, which of them."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor], product: Callable, ends: Tensor):
        self.weights = weights  # each (N, K)
        self.biases = biases  # each (N,), or none
        self.product = product
        self.ends = ends
        self.dweights = [None] * len(weights)
        self.dbiases = [None] * len(biases)

    def forward(self, x: Tensor, e: slice) -> Tensor:  # (R, K) -> (R, N)
        y = self.matmul(x, [w.to(x.dtype) for w in self.weights[e]])
        for bias in self.biases[e]:
            y += bias
        return y

    def backward(self, dy: Tensor, e: slice) -> Tensor:  # (R, N) -> (R, K)
        return self.matmul(dy, [w.to(dy.dtype).t() for w in self.weights[e]])

    def matmul(self, a: Tensor, weights: list[Tensor]) -> Tensor:
        if len(weights) == 1:
            return self.product(a, weights[0])
        return F.grouped_mm(a, torch.stack(weights).transpose(1, 2), offs=self.ends)

    def add_gradients(self, dy: Tensor, x: Tensor, e: slice) -> None:  # (R, N), (R, K)
        if len(self.weights[e]) == 1:
            self.dweights[e] = [self.product(dy.t(), x.t())]
        else:
            self.dweights[e] = F.grouped_mm(dy.t(), x, offs=self.ends).unbind()
        self.dbiases[e] = [dy.sum(0) for _ in self.biases[e]]

    def gradients(self) -> list[Tensor]:
        """Of weights and biases: zeros for an expert without tokens."""
        pairs = zip(self.weights + self.biases, self.dweights + self.dbiases)
        return [torch.zeros_like(p) if dp is None else dp for p, dp in pairs]


def group_linears(tensors, how: How, ends: Tensor) -> list[Linears]:
    n = len(ends)
    size = len(tensors) // how.n_linear  # n weights, and perhaps n biases
    groups = [tensors[i : i + size] for i in range(0, len(tensors), size)]
    return [Linears(list(g[:n]), list(g[n:]), how.product, ends) for g in groups]


def parts(x: Tensor, ends: Tensor, linears: list[Linears]) -> list[tuple[slice, slice]]:
    """(rows, experts) of what is computed at once: one expert, or all by torch's kernel."""
    # The kernel wants rows of a multiple of 16 bytes, and takes no biases.
    is_aligned = all(size * x.itemsize % 16 == 0 for m in linears for size in m.weights[0].shape)
    if x.is_cuda and is_aligned and not linears[0].biases and hasattr(F, "grouped_mm"):
        return [(slice(None), slice(None))]
    stops = ends.tolist()
    spans = enumerate(zip([0, *stops], stops))
    return [(slice(a, b), slice(e, e + 1)) for e, (a, b) in spans if a < b]


class CountAndBalance(torch.autograd.Function):
    """y as it is. Backward counts tokens, and gives `term` the gradient loss_scale."""

    @staticmethod
    def forward(ctx, y: Tensor, term: Tensor, terms: Tensor, ends: Tensor, layer: MoE) -> Tensor:
        # Attributes, not saved tensors: activation checkpointing would compute those again.
        ctx.terms = terms
        ctx.ends = ends
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        layer = ctx.layer
        layer.counts += ctx.ends.diff(prepend=ctx.ends.new_zeros(1))
        layer.terms += ctx.terms
        return dy, ctx.terms.new_tensor(layer.loss_scale), None, None, None


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
