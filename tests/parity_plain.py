"""A small GPT in plain torch, trained on simulated ranks, with faults to switch on.

The ranks of a data-parallel group are copies of the model in one process, each with a recorder of
its own; their gradients are added up by hand. `Plan` says which fault is where. Nothing here knows
train.py: what parity finds, it finds for anybody's model.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from parity.record import Recorder

B, T, C, HEADS, VOCAB = 8, 8, 16, 2, 64
D = C // HEADS
torch.manual_seed(0)
TOKENS = torch.randint(0, VOCAB - 16, (4, B, T + 1))


@dataclass
class Plan:
    """fault: its name, None for a sound run; at: the module or parameter it sits in."""

    fault: str | None = None
    at: str = "blocks.1.up"
    ranks: int = 2
    micro: int = 1
    steps: int = 3
    optimizer: str = "adamw"
    lr: float = 0.01
    decay: float = 0.1
    clip: float | None = None
    tied: bool = False
    position: str = "rotary"
    dropout: float = 0.0
    ignore: bool = False  # some targets do not count
    shards: bool = False  # each rank steps its half of each matrix
    norm: bool = False  # the norm is recorded too
    dtype: torch.dtype = torch.float64
    more: dict = field(default_factory=dict)


class Rotary(nn.Module):
    def __init__(self, plan: Plan, name: str):
        super().__init__()
        self.plan = plan
        self.name = name

    def forward(self, x):  # (B, H, T, D)
        fault = self.plan.fault if self.plan.at == self.name else None
        t = torch.arange(x.shape[2], dtype=x.dtype)
        if fault == "positions":
            t = t.roll(2)
        if fault == "positions_late":
            t = t + 3
        angle = t[:, None] * 10000.0 ** (-torch.arange(D // 2, dtype=x.dtype) / (D // 2))
        cos, sin = angle.cos(), angle.sin()
        if fault == "rotary_sign":
            sin = -sin
        if fault == "rotary_neighbours":
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        a, b = x.chunk(2, -1)
        if fault == "rotary_halves":
            a, b = b, a
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Mask(nn.Module):
    """Dropout whose mask is a function of the sample's number."""

    def __init__(self, plan: Plan, name: str):
        super().__init__()
        self.plan = plan
        self.name = name
        self.rows = None

    def forward(self, x):
        if self.plan.dropout == 0:
            return x
        masks = []
        for i, row in enumerate(self.rows):
            here = self.plan.fault == "masks_by_rank" and self.plan.at == self.name
            seed = i if here else row
            generator = torch.Generator().manual_seed(1000 + seed)
            masks.append(torch.rand(x.shape[1:], generator=generator) >= self.plan.dropout)
        return x * torch.stack(masks).to(x.dtype) / (1 - self.plan.dropout)


class Linear(nn.Linear):
    """Faults in a product: narrow numbers, a bias that counts twice."""

    plan = None
    name = ""

    def forward(self, x):
        fault = self.plan.fault if self.plan.at == self.name else None
        if fault in NARROW:
            return NARROW[fault](x, self.weight, self.bias).to(x.dtype)
        if fault == "old_weight":
            # What a layout gathered in the first step is never gathered again.
            if not hasattr(self, "old"):
                self.old = self.weight.detach().clone(), self.bias.detach().clone()
            now = self.weight, self.bias
            return F.linear(x, *(p + (old - p).detach() for p, old in zip(now, self.old)))
        if fault == "bias_twice":
            return super().forward(x) + self.bias
        if fault == "no_bias":
            return F.linear(x, self.weight)
        if fault == "half_input":
            return F.linear(
                x * (torch.arange(x.shape[-1]) < x.shape[-1] // 2), self.weight, self.bias
            )
        return super().forward(x)


def tf32(x):
    """Ten bits of mantissa."""
    return (x.float().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


NARROW = {
    "bf16_product": lambda x, w, b: F.linear(x.bfloat16(), w.bfloat16(), b.bfloat16()),
    "fp32_product": lambda x, w, b: F.linear(x.float(), w.float(), b.float()),
    "bf16_inputs": lambda x, w, b: F.linear(x.bfloat16().to(w), w.bfloat16().to(w), b),
    "tf32_product": lambda x, w, b: F.linear(tf32(x).to(w), tf32(w).to(w), b),
}


class Heads(nn.Module):
    """A name for attention's output."""

    def forward(self, x):
        return x * 1


class Block(nn.Module):
    def __init__(self, plan: Plan, name: str):
        super().__init__()
        self.plan = plan
        self.name = name
        self.norm1 = nn.LayerNorm(C)
        self.q, self.k, self.v, self.out = (Linear(C, C) for _ in range(4))
        self.rotary_q = Rotary(plan, f"{name}.rotary_q")
        self.rotary_k = Rotary(plan, f"{name}.rotary_k")
        self.heads = Heads()
        self.norm2 = nn.LayerNorm(C)
        self.up = Linear(C, 2 * C)
        self.down = Linear(2 * C, C)
        self.mask = Mask(plan, f"{name}.mask")

    def forward(self, x):
        fault = self.plan.fault if self.plan.at == self.name else None
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (HEADS, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.plan.position == "rotary":
            q, k = self.rotary_q(q), self.rotary_k(k)
        if fault == "swapped_k_v":
            k, v = v, k
        if fault == "no_scale":
            q = q * D**0.5
        y = F.scaled_dot_product_attention(q, k, v, is_causal=fault != "sees_the_future")
        if fault == "heads_swapped":
            y = y.flip(1)
        y = y.transpose(1, 2).flatten(2)
        if fault == "heads_interleaved":
            y = y.unflatten(-1, (HEADS, D)).transpose(-1, -2).flatten(2)
        x = x + self.mask(self.out(self.heads(y)))
        activation = F.relu if fault == "relu" else F.gelu
        return x + self.down(activation(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self.tokens = nn.Embedding(VOCAB, C)
        self.positions = nn.Embedding(T, C) if plan.position == "learned" else None
        self.blocks = nn.ModuleList(Block(plan, f"blocks.{i}") for i in range(2))
        self.norm = nn.LayerNorm(C, eps=1e-2 if plan.fault == "norm_eps" else 1e-5)
        self.head = nn.Linear(C, VOCAB, bias=False)
        if plan.tied:
            self.head.weight = self.tokens.weight
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.plan, module.name = plan, name

    def forward(self, ids, targets, count):
        fault = self.plan.fault
        if fault == "tied_embedding_detached":
            x = self.tokens(ids).detach()
        else:
            x = self.tokens(ids)
        if self.positions is not None:
            t = torch.arange(T)
            if fault == "learned_positions":
                t = t % (T // 2)
            x = x + self.positions(t)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if fault == "tied_head_detached":
            logits = F.linear(x, self.head.weight.detach())
        else:
            logits = self.head(x)
        smooth = 0.1 if fault == "label_smoothing" else 0.0
        loss = F.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            reduction="sum",
            ignore_index=-100,
            label_smoothing=smooth,
        )
        return loss / count


# ---- training ------------------------------------------------------------------------------------
def batch(step: int, plan: Plan):
    x = TOKENS[step % len(TOKENS)]
    ids, targets = x[:, :-1], x[:, 1:].clone()
    if plan.ignore:
        for row in range(B):
            targets[row, : row % T] = -100
    return ids, targets


def start(plan: Plan) -> Model:
    torch.manual_seed(1)
    model = Model(plan).to(plan.dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    return model


def places(shape, rank: int, ranks: int):
    """Rows of a matrix that a rank steps, where shards are stepped."""
    n = shape[0] // ranks
    return slice(rank * n, (rank + 1) * n)


def train(plan: Plan, folder) -> None:
    """Records each rank into the folder."""
    models = []
    for _ in range(plan.ranks):
        models.append(start(plan))
    damage_weights(plan, models)
    recorders = []
    for rank, model in enumerate(models):
        shards = {}
        if plan.shards:
            for name, p in model.named_parameters():
                rows = places(p.shape, rank, plan.ranks)
                shards[name] = (tuple(p.shape), (rows.start, *[0] * (p.ndim - 1)))
        axes = {"dp": (plan.ranks, rank)}
        recorders.append(Recorder(model, folder, rank, shards=shards, axes=axes))
    states = [{} for _ in models]
    old = None
    for step in range(plan.steps):
        forward_backward(plan, models, recorders, step)
        grads = reduced(plan, models, step, old)
        old = grads[0]
        update(plan, models, recorders, states, grads, step)
    for recorder in recorders:
        recorder.close()


def damage_weights(plan: Plan, models: list) -> None:
    p = dict(models[-1].named_parameters()).get(plan.at)
    if p is None:
        return
    with torch.no_grad():
        if plan.fault == "weights_drawn_anew":
            torch.manual_seed(5)
            p.copy_(torch.randn_like(p) * p.std())
        if plan.fault == "weights_heads_swapped":
            p.copy_(p.unflatten(0, (HEADS, D)).flip(0).flatten(0, 1))
        if plan.fault == "weights_halves_swapped":
            p.copy_(p.unflatten(0, (HEADS, 2, D // 2)).flip(1).flatten(0, 2))
        if plan.fault == "weights_neighbours":
            p.copy_(p.unflatten(0, (HEADS, 2, D // 2)).transpose(1, 2).flatten(0, 2))
        if plan.fault == "weights_transposed":
            p.copy_(p.T.clone())
        if plan.fault == "weights_shards_swapped":
            p.copy_(torch.cat(p.chunk(2)[::-1]))
        if plan.fault == "weights_bf16":
            p.copy_(p.bfloat16())


def forward_backward(plan: Plan, models: list, recorders: list, step: int) -> None:
    ids, targets = batch(step, plan)
    n = B // plan.ranks // plan.micro
    count = int((targets >= 0).sum())
    for rank, (model, recorder) in enumerate(zip(models, recorders)):
        if not (plan.fault == "not_cleared" and step == 1):
            model.zero_grad()
        for i in range(plan.micro):
            first = (rank * plan.micro + i) * n
            rows = list(range(first, first + n))
            recorder.batch(rows, of=B)
            for module in model.modules():
                if isinstance(module, Mask):
                    module.rows = rows
            used = rows
            if plan.fault == "samples_of_rank_0":
                used = list(range(n))
            divisor = count
            if plan.fault == "local_means":
                divisor = int((targets[rows] >= 0).sum()) * plan.ranks * plan.micro
            if plan.fault == "scaled_by_micro":
                divisor = count * plan.micro
            loss = model(ids[used], targets[used], divisor)
            if plan.fault == "backward_skipped" and i == plan.micro - 1 and rank == plan.ranks - 1:
                continue
            loss.backward()
            if plan.fault == "micro_lost" and i == 0:
                model.zero_grad()
            if plan.fault == "no_accumulation" and i < plan.micro - 1 and rank == 0:
                dict(model.named_parameters())[plan.at].grad = None


def reduced(plan: Plan, models: list, step: int, old) -> list[dict]:
    """Each rank's gradients after the reduction."""
    own = []
    for model in models:
        grads = {}
        for name, p in model.named_parameters():
            grads[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        own.append(grads)
    if plan.fault == "clipped_before_sum":
        for grads in own:
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            for g in grads.values():
                g.mul_(0.05 / norm)
    if plan.fault == "bf16_sum":
        own = [{name: g.bfloat16().to(g.dtype) for name, g in grads.items()} for grads in own]
    total = {name: sum(grads[name] for grads in own) for name in own[0]}
    found = []
    for rank in range(plan.ranks):
        grads = {name: g.clone() for name, g in total.items()}
        at = plan.at
        if plan.fault == "not_summed":
            grads[at] = own[rank][at].clone()
        if plan.fault == "not_summed_all":
            grads = own[rank]
        if plan.fault == "mean":
            grads = {name: g / plan.ranks for name, g in grads.items()}
        if plan.fault == "mean_one":
            grads[at] /= plan.ranks
        if plan.fault == "summed_twice":
            grads[at] *= plan.ranks
        if plan.fault == "own_twice":
            grads[at] += own[0][at]
        if plan.fault == "rank_left_out":
            grads[at] -= own[-1][at]
        if plan.fault == "stale_gradient" and step > 0:
            grads[at] = old[at].clone()
        if plan.fault == "gradient_shards_swapped":
            grads[at] = torch.cat(grads[at].chunk(2)[::-1])
        if plan.fault == "sign":
            grads[at] *= -1
        if plan.fault == "noise":
            grads[at] += torch.linspace(-1, 1, grads[at].numel()).view_as(grads[at]).abs() * 1e-3
        if plan.fault == "nan":
            grads[at][..., 0] = torch.nan
        found.append(grads)
    return found


def update(plan: Plan, models, recorders, states, grads, step: int) -> None:
    plan.more["full"] = grads[0]
    for rank, (model, recorder) in enumerate(zip(models, recorders)):
        mine = {}
        for name, g in grads[rank].items():
            if plan.shards:
                g = g[places(g.shape, rank, plan.ranks)]
            mine[name] = g.clone()
        if step == 0:
            recorder.begin()
        recorder.gradients(mine)
        clip(plan, grads[rank], mine, rank, recorder)
        weights = {}
        for name, p in model.named_parameters():
            if not (plan.fault == "stale_weight" and rank == 1 and step == 1 and name == plan.at):
                with torch.no_grad():
                    one_step(plan, name, p, mine[name], states[rank], rank, step)
            weights[name] = p[places(p.shape, rank, plan.ranks)] if plan.shards else p
        group = {
            "lr": plan.lr,
            "betas": [0.9, 0.99],
            "weight_decay": plan.decay,
            "names": list(weights),
        }
        mine = {name: w.detach() for name, w in weights.items()}
        recorder.end_step(mine, [group])
    if plan.shards:
        for name, _ in models[0].named_parameters():
            halves = []
            for rank, model in enumerate(models):
                p = dict(model.named_parameters())[name]
                halves.append(p[places(p.shape, rank, plan.ranks)])
            whole = torch.cat(halves)
            for model in models:
                with torch.no_grad():
                    dict(model.named_parameters())[name].copy_(whole)


def clip(plan: Plan, full: dict, mine: dict, rank: int, recorder) -> None:
    if plan.clip is None:
        return
    used = mine if plan.fault == "local_norm" else full
    norm = torch.stack([g.norm() for g in used.values()]).norm()
    if plan.fault != "local_norm" or plan.norm:
        recorder.norm(norm)
    factor = min(1.0, plan.clip / float(norm))
    if plan.fault == "not_clipped":
        factor = 1.0
    for name, g in mine.items():
        own = plan.clip / float(g.norm()) if plan.fault == "clipped_one_by_one" else factor
        g.mul_(min(1.0, own))
    recorder.gradients(mine)


def one_step(plan: Plan, name: str, p, g, states: dict, rank: int, step: int) -> None:
    """AdamW, SGD, or Muon (an orthogonal step) of this rank's part of p, in place."""
    here = plan.at in (name, "all")
    fault = plan.fault if here else None
    lr = plan.lr * (0.5 if fault == "half_lr" else 1)
    decay = plan.decay * (0 if fault == "no_decay" else 1) * (2 if fault == "decay_twice" else 1)
    if fault == "decay_grows":
        decay = -decay
    t = step + 1 + (1 if fault == "step_count" else 0)
    if plan.shards:
        p = p[places(p.shape, rank, plan.ranks)]
    if fault == "l2":
        g = g + decay * p
        decay = 0
    if fault != "decay_late":
        p.mul_(1 - (1 if fault == "decay_without_lr" else lr) * decay)
    if plan.optimizer == "adamw":
        m, v = states.setdefault(name, (torch.zeros_like(g), torch.zeros_like(g)))
        m.lerp_(g, 1 - 0.9)
        b2 = 0.95 if fault == "beta2" else 0.99
        v.lerp_(g.square(), 1 - b2)
        first = 1 if fault == "no_first_correction" else 1 - 0.9**t
        second = 1 if fault == "no_second_correction" else 1 - 0.99**t
        direction = m / first / ((v / second).sqrt() + 1e-12)
    elif plan.optimizer == "muon" and name == plan.at:
        direction = orthogonal(plan, name, g, states, rank, fault)
    elif plan.optimizer == "lamb":
        norm = g.norm() if fault == "shard_norms" else plan.more["full"][name].norm()
        direction = g / norm
    else:
        direction = g
    p.sub_(lr * direction)
    if fault == "decay_late":
        p.mul_(1 - lr * decay)


def orthogonal(plan: Plan, name: str, g, states: dict, rank: int, fault) -> torch.Tensor:
    """The orthogonal factor of the full gradient, or of the shard where it is the fault."""
    if plan.shards and fault != "shard_muon":
        g = plan.more["full"][name]
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    whole = u @ vh
    if plan.shards and fault != "shard_muon":
        whole = whole[places(whole.shape, rank, plan.ranks)]
    return whole


def sound(plan: Plan) -> Plan:
    """The oracle: the same settings, one rank, no fault."""
    alone = copy.copy(plan)
    alone.fault = None
    alone.ranks = alone.micro = 1
    alone.shards = False
    return alone
