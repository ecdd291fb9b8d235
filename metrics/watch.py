"""Measures what a step did: now and then (--watch_every), for QK-clip in every step (--qk_clip).

    what the train row of a watched step gets                                       over
    max_logit, max_logit/LAYER  largest attention logit q·k/√D of a query and a     batch, heads
                                key it sees
    log_z, log_z_max            mean and largest log of the head's softmax's        tokens
                                denominator
    weight_rms/KIND             root mean square of the weights after the step      a kind's weights
    update_rms/KIND             the same of what the step changed, lr included      a kind's weights
    clip_frac                   share of gradients whose norm was clipped           steps since then

    moe_*                       loads of experts (metrics/experts.py)             batch

KIND: matrix, embedding, head, scalar (optim/param_groups.py). A step that the loss scaler skips has
no update and no such fields. clip_frac counts from the start of the process.

The numbers are the same on every layout. Each rank measures what it holds: its samples, its heads,
its layers, the weights it steps. Two all-reduces, one sum and one maximum of a few numbers each,
combine them. Besides, tensor parallel ranks send each other their part of log Z, two numbers a
token, and context parallel ranks gather the keys: (R-1)/R x a layer's k for R ranks, for each layer
and micro-batch.

The probes are put in before a step and taken out after it:

    Attention.attention_fn    wrapped by one that computes the logits anew in blocks
                              (optim/qk_clip.py)
    GPT.loss_fn               wrapped by one that sees the head's logits
    optimizer.step            hooks that keep a copy of the weights during the step

Other steps have none of them. Measuring changes no bit. But under compile attention leaves the
compiled block for a watched step, each layer is compiled once more, and bits may differ.

QK-clip always has the first probe. Its hook comes right after the optimizer's own update, before
owners send what they have stepped. So it works on every layout, wherever the weights are: the
all-reduce makes the maxima, and thus the factors, the same on all ranks. A step that is not taken
is not clipped either.
"""

import functools
from collections.abc import Callable

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
    """All ranks make one after everything else that changes model and optimizer.

    They call start and row in every step. shards: parameter name -> Shard, where the optimizer has
    only a shard; deduplicate: State.deduplicate, name -> x to a list of the x that this rank
    counts; every: steps between watched steps, or None; qk_clip: the largest logit that is allowed,
    or None; compiled: are the blocks compiled?
    """

    def __init__(
        self,
        mesh: Mesh,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        shards: dict,
        deduplicate: Callable[[dict], list],
        every: int | None = None,
        qk_clip: float | None = None,
        cp_attention: str = "ring",
        compiled: bool = False,
    ):
        self.mesh = mesh
        self.model = model
        self.optimizer = optimizer
        self.deduplicate = deduplicate
        self.every = every
        self.qk_clip = qk_clip
        self.compiled = compiled
        self.is_watched = False
        self.undo = []  # what takes the probes out
        self.n_steps = 0  # since the last watched one
        self.n_clipped = torch.zeros(())

        # Which of all keys this rank's queries are, and how to put gathered keys in their order.
        config = model.config
        cp = mesh.sizes["cp"]
        of_ranks = [context.position_ids(config.block_size, cp, i, cp_attention) for i in range(cp)]
        self.position_ids = of_ranks[mesh.coords["cp"]]
        self.order = torch.cat(of_ranks).argsort().to(mesh.device)

        # The largest logit of every layer and head; each rank fills in its own.
        n_heads = config.n_head // mesh.sizes["tp"]
        first_head = mesh.coords["tp"] * n_heads
        self.heads = slice(first_head, first_head + n_heads)
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        shape = (config.n_layer, config.n_head)
        self.max_logit = torch.full(shape, -torch.inf, dtype=dtype, device=mesh.device)
        if qk_clip is None:
            return

        def clip(*_) -> None:
            self.max_logit = highest(self.max_logit, mesh)
            clip_heads(
                optimizer.param_groups,
                self.max_logit,
                qk_clip,
                config.n_kv_head,
                config.head_size,
                shards,
            )

        first_after_step(optimizer, clip)
        self.wrap_attention()

    # ---- one step --------------------------------------------------------------------------------
    def start(self, step: int) -> None:
        """Before the forward passes of a step. step: how many are completed."""
        # A rollback may have left out the end of the last step.
        self.stop()
        self.is_watched = False
        self.max_logit.fill_(-torch.inf)
        if self.every is None or (step + 1) % self.every != 0:
            return
        self.is_watched = True
        self.before = {}  # name -> kind, weights before the step, parameter
        self.log_z = []
        # For each kind: sum of squares of the update, of the weights, number of weights.
        self.moved = {kind: [0.0, 0.0, 0] for kind in KINDS}
        if self.qk_clip is None:
            self.undo += self.wrap_attention()
        plain = self.model.loss_fn
        self.model.loss_fn = functools.partial(self.loss_fn, plain)
        self.undo += [
            self.optimizer.register_step_pre_hook(self.keep).remove,
            first_after_step(self.optimizer, self.compare).remove,
            functools.partial(setattr, self.model, "loss_fn", plain),
        ]

    def stop(self) -> None:
        """Takes the probes out, the last one first."""
        while self.undo:
            self.undo.pop()()

    def row(self, norm: Tensor, limit: float | None) -> dict[str, float]:
        """After the step: what there is to log of it, the same on all ranks.

        norm: of the gradient before it was clipped; limit: what it was clipped to, or None. Returns
        {} for a step that is not watched.
        """
        # Every step counts here, watched or not; no number leaves the device yet. The clipping in
        # train.py has the same 1e-6.
        if self.every is not None and limit is not None:
            self.n_clipped = self.n_clipped.to(norm.device) + (norm + 1e-6 > limit)
            self.n_steps += 1
        if not self.is_watched:
            return {}
        self.stop()

        # The maxima, over all ranks. Only the last stage of a pipeline has the head's logits.
        log_z = torch.cat([self.max_logit.new_empty(0), *self.log_z])
        if len(log_z):
            largest = log_z.amax(0, keepdim=True)
        else:
            largest = self.max_logit.new_full((1,), -torch.inf)
        maxima = highest(torch.cat([self.max_logit.amax(1), largest]), self.mesh).tolist()
        *of_layers, log_z_max = maxima

        # All sums in one all-reduce. A rank without the head's logits adds 0 to 0 tokens.
        of_kinds = sum(self.moved.values(), [])
        log_z_sum, n_tokens, n_clipped, n_steps, *of_kinds = self.mesh.sum(
            log_z.sum(), len(log_z), self.n_clipped, self.n_steps, *of_kinds
        )
        self.n_clipped = torch.zeros(())
        self.n_steps = 0

        # Where no update was made, as in a step that the loss scaler skips, none is reported.
        found = {"max_logit": max(of_layers)}
        for i, x in enumerate(of_layers):
            found[f"max_logit/{i}"] = x
        found["log_z"] = log_z_sum / n_tokens
        found["log_z_max"] = log_z_max
        for i, kind in enumerate(KINDS):
            update, weight, n = of_kinds[3 * i : 3 * i + 3]
            if n:
                found[f"weight_rms/{kind}"] = (weight / n) ** 0.5
                found[f"update_rms/{kind}"] = (update / n) ** 0.5
        if n_steps:
            found["clip_frac"] = n_clipped / n_steps
        return found

    # ---- the probes ------------------------------------------------------------------------------
    def wrap_attention(self) -> list:
        """Every attention writes its largest logits to self.max_logit; returns what undoes it."""
        undo = []
        for layer, block in self.model.blocks.items():
            attention = block.attn
            plain = attention.attention_fn
            probe = functools.partial(self.attention_fn, int(layer), attention, plain)
            # The probe is not compiled: for such a step attention leaves the compiled block.
            if self.compiled:
                probe = torch.compiler.disable(probe)
            attention.attention_fn = probe
            undo.append(functools.partial(setattr, attention, "attention_fn", plain))
        return undo

    def attention_fn(
        self,
        layer: int,
        attention: nn.Module,
        plain: Callable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        **more,
    ) -> Tensor:
        """plain(q, k, v, **more), and each head's largest logit; q, k, v: (B, H, T, D).

        more: documents=, where there is a mask of them.
        """
        if attention.training:
            keys = k.detach()
            # This rank's queries see the keys of all context parallel ranks.
            group = self.mesh.groups["cp"]
            if group is not None:
                of_ranks = [torch.empty_like(keys) for _ in range(group.size())]
                dist.all_gather(of_ranks, keys.contiguous(), group)
                keys = torch.cat(of_ranks, 2)[:, :, self.order]
            window = self.model.config.window
            starts = more["documents"].starts if more else None
            found = max_logits(q.detach(), keys, self.position_ids, window, starts)
            here = self.max_logit[layer, self.heads]
            torch.maximum(here, found.to(here.dtype), out=here)
        return plain(q, k, v, **more)

    @torch.no_grad()
    def loss_fn(self, plain: Callable, logits: Tensor, targets: Tensor | None, count: bool):
        """plain(logits, targets, count), and log Z of each token; logits: (B, T, V)."""
        if targets is not None:
            log_z = logits.logsumexp(-1)  # (B, T)
            group = self.mesh.groups["tp"]
            # Each tensor parallel rank has a part of the vocabulary.
            if group is not None:
                largest = summed(log_z, group, dist.ReduceOp.MAX)
                log_z = largest + summed((log_z - largest).exp(), group).log()
            self.log_z.append(log_z.flatten())
        # The loss itself needs its gradient.
        with torch.enable_grad():
            return plain(logits, targets, count)

    def keep(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """Before optimizer.step(): a copy of the weights."""
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                self.before[name] = group["kind"], p.detach().clone(), p

    @torch.no_grad()
    def compare(self, *_) -> None:
        """After optimizer.step(): how far the weights have moved."""
        for kind, old, p in self.deduplicate(self.before):
            dtype = torch.promote_types(p.dtype, torch.float32)
            new = p.to(dtype)
            update = new - old.to(dtype)
            sums = self.moved[kind]
            sums[0] += update.square().sum().item()
            sums[1] += new.square().sum().item()
            sums[2] += p.numel()
        self.before = {}


def first_after_step(optimizer: torch.optim.Optimizer, hook):
    """A post hook that runs before the hooks that send stepped weights to other ranks."""
    handle = optimizer.register_step_post_hook(hook)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    return handle


def highest(x: Tensor, mesh: Mesh) -> Tensor:
    """The maximum over all ranks, element by element."""
    if mesh.world > 1:
        # In place: without the copy, the caller's tensor would change too.
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x
