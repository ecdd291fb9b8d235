"""What a step did, looked at now and then (--watch_every), for QK-clip at every step (--qk_clip).

    of a watched step, in its train row                                             over
    max_logit, max_logit/LAYER  largest attention logit q·k/√D of a query and a     batch, heads
                                key it sees
    log_z, log_z_max            mean and largest log of the head's softmax's        tokens
                                denominator
    weight_rms/KIND             root mean square of the weights after the step      a kind's weights
    update_rms/KIND             the same of what the step changed, lr included      a kind's weights
    clip_frac                   share of gradients whose norm was clipped           steps since then

KIND: matrix, embedding, head, scalar (optim/param_groups.py). A step that the loss scaler skips has
no update and no such fields. clip_frac counts from the start of the process.

The numbers are the same on every layout. Each rank looks at what it holds: its rows, its heads, its
layers, the weights it steps. Two all-reduces, one sum and one maximum, make the whole of it, of a
few numbers each. Besides, tensor parallel ranks tell each other their part of log Z, two numbers a
token, and context parallel ones gather the keys: with R of them (R-1)/R x a layer's k, for each
layer and micro-batch.

What looks is put in before a step and taken out after it: `Attention.attention_fn` is wrapped by
what computes the logits anew in blocks (optim/qk_clip.py), `GPT.loss_fn` by what sees the head's
logits, and hooks on the optimizer keep a copy of the weights during the step. Other steps do none
of that. Looking changes no bit; under compile attention leaves the compiled block for such a step,
each layer is compiled once more, and bits may differ.

QK-clip has the first of these always. Its hook comes right after the optimizer's own update, before
owners send what they have stepped: so it holds for every layout (the all-reduce's maxima are
everybody's, factors too), wherever the weights are. A step that is not taken is not clipped either.
"""

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.qk_clip import clip as clip_heads
from optim.qk_clip import max_logits
from parallel import context
from parallel.mesh import Mesh
from parallel.tensor import summed

KINDS = ("matrix", "embedding", "head", "scalar")


class Watch:
    """All ranks make one, after all else that changes model and optimizer, and call start and row
    in every step. shards: name -> Shard of what the optimizer has one of;
    counted({name: x}): those of the x which no other rank counts. every: steps between rows;
    qk_clip: the largest logit; compiled: are the blocks?
    """

    def __init__(
        self,
        mesh: Mesh,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        shards: dict,
        counted,
        every: int | None = None,
        qk_clip: float | None = None,
        cp_attention: str = "ring",
        compiled: bool = False,
    ):
        self.mesh, self.model, self.optimizer, self.counted = mesh, model, optimizer, counted
        self.every, self.qk_clip, self.compiled = every, qk_clip, compiled
        self.watched, self.undo, self.steps, self.clipped = False, [], 0, torch.zeros(())
        config, cp, tp = model.config, mesh.sizes["cp"], mesh.sizes["tp"]
        places = [context.positions(config.block_size, cp, i, cp_attention) for i in range(cp)]
        self.places, self.order = (
            places[mesh.coords["cp"]],
            torch.cat(places).argsort().to(mesh.device),
        )
        heads = config.n_head // tp
        self.heads = slice(mesh.coords["tp"] * heads, (mesh.coords["tp"] + 1) * heads)
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self.top = torch.full(
            (config.n_layer, config.n_head), -torch.inf, dtype=dtype, device=mesh.device
        )
        if qk_clip is None:
            return

        def clip(*_) -> None:
            self.top = highest(self.top, mesh)
            clip_heads(
                optimizer.param_groups,
                self.top,
                qk_clip,
                config.n_kv_head,
                config.n_embd // config.n_head,
                shards,
            )

        first_after_step(optimizer, clip)
        self.wrap_cores()

    # ---- one step --------------------------------------------------------------------------------
    def start(self, step: int) -> None:
        """Before the forward passes of a step; step: how many are completed."""
        self.stop()  # if a rollback left out the end of the last step
        self.watched = False
        self.top.fill_(-torch.inf)
        if self.every is None or (step + 1) % self.every:
            return
        self.watched, self.before, self.log_z = True, {}, []
        # Squares of update and weights, elements
        self.moved = {kind: [0.0, 0.0, 0] for kind in KINDS}
        if self.qk_clip is None:
            self.undo += self.wrap_cores()
        self.undo += [
            self.optimizer.register_step_pre_hook(self.keep).remove,
            first_after_step(self.optimizer, self.compare).remove,
            functools.partial(setattr, self.model, "loss_fn", self.model.loss_fn),
        ]
        self.model.loss_fn = functools.partial(self.loss_fn, self.model.loss_fn)

    def stop(self) -> None:
        while self.undo:
            self.undo.pop()()

    def row(self, norm: Tensor, limit: float | None) -> dict[str, float]:
        """After the step: what there is to log of it, the same on all ranks; {} but for a watched
        one. norm, limit: of the gradient before it was clipped, and what it was clipped to."""
        if self.every is not None and limit is not None:
            self.clipped, self.steps = (
                self.clipped.to(norm.device) + (norm + 1e-6 > limit),
                self.steps + 1,
            )
        if not self.watched:
            return {}
        self.stop()
        z = torch.cat([self.top.new_empty(0), *self.log_z])
        # Other stages
        largest = z.amax(0, keepdim=True) if len(z) else self.top.new_full((1,), -torch.inf)
        *top, log_z_max = highest(torch.cat([self.top.amax(1), largest]), self.mesh).tolist()
        sums = self.mesh.sum(
            z.sum(), len(z), self.clipped, self.steps, *sum(self.moved.values(), [])
        )
        z, tokens, clipped, steps, *sums = sums
        found = {"max_logit": max(top)} | {f"max_logit/{i}": x for i, x in enumerate(top)}
        found |= {"log_z": z / tokens, "log_z_max": log_z_max}
        for kind, (update, weight, n) in zip(KINDS, zip(*[iter(sums)] * 3)):
            if n:
                found[f"weight_rms/{kind}"] = (weight / n) ** 0.5
                found[f"update_rms/{kind}"] = (update / n) ** 0.5
        self.clipped, self.steps = torch.zeros(()), 0
        return found | ({"clip_frac": clipped / steps} if steps else {})

    # ---- what looks ------------------------------------------------------------------------------
    def wrap_cores(self) -> list:
        """Every attention's largest logits go to self.top; returns what undoes it."""
        undo = []
        for layer, block in self.model.blocks.items():
            attention, plain = block.attn, block.attn.attention_fn
            looking = functools.partial(self.attention_fn, int(layer), attention, plain)
            if self.compiled:
                looking = torch.compiler.disable(looking)
            attention.attention_fn = looking
            undo.append(functools.partial(setattr, attention, "attention_fn", plain))
        return undo

    def attention_fn(
        self, layer: int, attention: nn.Module, plain, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        if attention.training:
            keys, top = k.detach(), self.top[layer, self.heads]
            if (group := self.mesh.groups["cp"]) is not None:
                parts = [torch.empty_like(keys) for _ in range(group.size())]
                dist.all_gather(parts, keys.contiguous(), group)
                keys = torch.cat(parts, 2)[:, :, self.order]
            found = max_logits(q.detach(), keys, self.places, self.model.config.window)
            torch.maximum(top, found.to(top.dtype), out=top)
        return plain(q, k, v)

    @torch.no_grad()
    def loss_fn(self, plain, logits: Tensor, targets: Tensor | None, count: bool):
        if targets is not None:
            z, group = logits.logsumexp(-1), self.mesh.groups["tp"]
            if group is not None:  # of my words
                top = summed(z, group, dist.ReduceOp.MAX)
                z = top + summed((z - top).exp(), group).log()
            self.log_z.append(z.flatten())
        with torch.enable_grad():
            return plain(logits, targets, count)

    def keep(self, optimizer: torch.optim.Optimizer, *_) -> None:
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                self.before[name] = group["kind"], p.detach().clone(), p

    @torch.no_grad()
    def compare(self, *_) -> None:
        for kind, old, p in self.counted(self.before):
            dtype = torch.promote_types(p.dtype, torch.float32)
            new, old = p.to(dtype), old.to(dtype)
            sizes = (new - old).square().sum().item(), new.square().sum().item(), p.numel()
            self.moved[kind] = [a + b for a, b in zip(self.moved[kind], sizes)]
        self.before = {}


def first_after_step(optimizer: torch.optim.Optimizer, hook):
    """A post hook that runs before those which send what was stepped to other ranks."""
    handle = optimizer.register_step_post_hook(hook)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    return handle


def highest(x: Tensor, mesh: Mesh) -> Tensor:
    """Element by element, over all ranks."""
    if mesh.world > 1:
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x
