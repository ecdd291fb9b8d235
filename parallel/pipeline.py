"""Pipeline parallelism: each rank holds some layers, and micro-batches pass through the ranks.

       rank 0                rank 1            rank 2            rank 3            p = 4 stages,
    embed, layers 0 1 ──h──► layers 2 3 ──h──► layers 4 5 ──h──► layers 6 7,       n_layer=8
                      ◄─dh──            ◄─dh──            ◄─dh── head, loss        h: (B, T, C)

parallel/timeline.py decides in which order each rank works; this file carries its programs out.

Bytes sent per rank and step, with m micro-batches and v model chunks a rank, each a virtual stage:

    hidden states   m x bytes of h for each of its virtual stages but the very last
    gradients       m x bytes of h for each of its virtual stages but the very first
    tied head       the bytes of embed.weight, first and last rank only: each has a part of its
                    gradient

Weights are those of each stage's own model: a stage has layers that no other has, so they need not
agree, whatever the seeds. A tied parameter is on two ranks: tie(model) gives the last rank the
first one's weights. From then on a step() of any optimizer before all_reduce_tied_grads() is a
RuntimeError, for the two copies would part. (Weights that are functions of their names, as
init_weights(source) of a layout sets them, need no tie().) With several replicas pass
`replicas.last_micro_batch` as before_backward: a data-parallel layout that does not hear of the
last micro-batch says so itself.

References: see parallel/timeline.py. `python -m parallel.pipeline` also needs metrics/outlets.py.

Neighbours: parallel/mesh.py, parallel/replicas.py, parallel/timeline.py

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from parallel.pipeline import Pipeline

    def train(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        torch.manual_seed(rank)
        pipe = Pipeline(dist.group.WORLD, "1f1b", n_layer=4)
        stage = torch.nn.ModuleDict({str(i): torch.nn.Linear(8, 8) for i in pipe.stage_layers})
        optimizer = torch.optim.AdamW(stage.parameters(), lr=0.01)
        data = torch.Generator().manual_seed(0)  # the same samples on both ranks
        losses = []
        for step in range(30):
            batches = torch.randn(4, 16, 8, generator=data)  # 4 micro-batches

            def forward(i, layers, x):
                x = batches[i] if x is None else x
                for n in layers:
                    x = torch.tanh(stage[str(n)](x))
                return (x - batches[i] / 2).square().mean() if 3 in layers else x

            like = (16, 8), torch.float32, torch.device("cpu")  # what stages send each other
            losses = pipe.run(4, forward, lambda i: like, backward=1 / 4)
            optimizer.step()
            optimizer.zero_grad()
            first = losses if step == 0 else first
        if rank == 1:  # the last stage has the losses
            print(f"loss {sum(first) / 4:.3f} -> {sum(losses) / 4:.3f}")
            assert sum(losses) < 0.8 * sum(first)
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(train, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import functools
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from parallel.mesh import new_group
from parallel.replicas import StepGuard
from parallel.timeline import SCHEDULES, Op, Transfer, layers, programs, schedule, simulate

UNTIED = (
    "optimizer.step() came before all_reduce_tied_grads(): the tied parameter is on two ranks, and "
    "each has a part of its gradient; call all_reduce_tied_grads(gradients) after the last run()"
)


class Pipeline:
    """One rank's part of the pipeline: p ranks in `group`, v = n_chunks model chunks on each.

    name: the schedule; device: where messages leave from; tied: the first and the last rank share
    the parameter `tied_name`. Collective. Raises ValueError for an impossible schedule and for more
    virtual stages than layers.

    stage_layers: the numbers of all layers here; first, last: does this rank hold the model's first
    (last) virtual stage? After run(): `in_flight`, the most forwards alive at once, `sent_bytes`,
    and `idle_s`, the seconds of waiting for others (a GPU waits apart from its process, which sees
    none of it).
    """

    deferred: list | None = None  # for zero bubble: what defer_weight_gradients(model) returned

    def __init__(
        self,
        group: dist.ProcessGroup,
        name: str,
        n_layer: int,
        n_chunks: int = 1,
        device: torch.device = torch.device("cpu"),
        tied: bool = False,
        tied_name: str = "embed.weight",
    ):
        assert group is not None, "one rank is no pipeline"
        self.group = group
        self.name = name
        self.v = n_chunks
        self.device = device
        self.tied_name = tied_name
        self.rank = dist.get_rank(group)
        self.p = dist.get_world_size(group)
        # Refuse an impossible schedule before anything is sent.
        schedule(name, self.p, self.p, n_chunks)
        self.chunks = layers(n_layer, self.p, n_chunks)[self.rank]  # layer numbers of each chunk
        self.stage_layers = [i for chunk in self.chunks for i in chunk]
        self.first = self.rank == 0
        self.last = self.rank == self.p - 1
        self.idle_s = 0.0
        self.in_flight = 0
        self.sent_bytes = 0
        # Two ranks share the tied parameter. They alone make this group and sum its gradient in it.
        self.ends = None
        self.model = None  # the model that tie() was given
        self.unfinished = False  # a run() came after the last all_reduce_tied_grads()
        if tied and (self.first or self.last):
            ranks = dist.get_process_group_ranks(group)
            self.ends = new_group([ranks[0], ranks[-1]], device)
        self.plan = functools.cache(self.plan)
        # NCCL wants a collective of the whole group before messages between two of its ranks.
        dist.barrier(group)

    def plan(self, m: int, training: bool) -> list[Op | list[Transfer]]:
        """This rank's program for m micro-batches; without training, forwards alone."""
        if training:
            ops = schedule(self.name, self.p, m, self.v)
        else:
            # The order of interleaved, but here m need not be a multiple of p.
            forwards = []
            for start in range(0, m, self.p):
                for chunk in range(self.v):
                    stop = min(start + self.p, m)
                    forwards += [Op("F", i, chunk) for i in range(start, stop)]
            ops = [forwards] * self.p
        return programs(simulate(ops))[self.rank]

    def run(
        self,
        m: int,
        forward: Callable,
        like: Callable[[int], tuple],
        backward: float | None = None,
        before_backward: Callable[[bool], None] = lambda is_last: None,
    ) -> list:
        """m micro-batches, forward and backward, or forward alone.

        forward(i, layers, x) -> the hidden states (B, T, C) after these layers of micro-batch i;
        after the model's last layer, the loss (0-dim; without backward, anything). x: the hidden
        states before these layers, None at the start.
        like(i): shape, dtype and device of the hidden states of micro-batch i.
        backward: what each loss is multiplied by before its backward; None: forward alone.
        before_backward(is_last): called before each backward; is_last: it completes the gradients.

        Returns what forward gave on the last rank, in the order of micro-batches; elsewhere [].
        """
        training = backward is not None
        if training and self.name == "zerobubble":
            assert self.deferred is not None, "set deferred = defer_weight_gradients(model)"
        self.reset(like, training)
        alive = {}  # (micro-batch, chunk) -> (input, graph) between its forward and its backward
        waiting = {}  # (micro-batch, chunk) -> weight gradients that are still to be computed
        outputs = {}  # micro-batch -> what the last virtual stage gave
        program = self.plan(m, training)
        # The backward that completes the gradients. Zero bubble has none, as its W come later.
        last_backward = None
        for step in program:
            if isinstance(step, Op) and step.kind == "B":
                last_backward = step

        for step in program:
            if not isinstance(step, Op):
                self.post(step)
                continue
            kind, i, chunk = step
            stage = chunk * self.p + self.rank
            is_final = stage == self.p * self.v - 1

            if kind == "F":
                # Stage 0 receives nothing: it starts from token ids, which `forward` has already.
                x = None
                if stage > 0:
                    x = self.receive("F", i, stage)
                if stage > 0 and training:
                    x.requires_grad_()  # its gradient goes back to the stage before
                y = forward(i, self.chunks[chunk], x)
                if is_final:
                    outputs[i] = y.detach() if training else y
                else:
                    self.outbox["F", i, stage + 1] = y.detach().contiguous()
                if training:
                    # Keep the graph but not y itself: its memory is free once it has been sent.
                    edge = get_gradient_edge(y) if y.requires_grad else None
                    alive[i, chunk] = x, edge
                    # Until its W has run, a micro-batch's activations stay in memory.
                    self.in_flight = max(self.in_flight, len(alive) + len(waiting))
            elif kind == "W":
                weight_gradients(waiting.pop((i, chunk)))
            else:
                x, edge = alive.pop((i, chunk))
                if is_final:
                    dy = torch.full_like(outputs[i], backward)
                else:
                    dy = self.receive("B", i, stage)
                before_backward(step == last_backward)
                # No edge: all parameters up to here are frozen.
                if edge is not None:
                    torch.autograd.backward([edge], [dy])
                if stage > 0:
                    self.outbox["B", i, stage - 1] = x.grad.contiguous()
                if kind == "I":
                    # Zero bubble: this backward has left its weight gradients in `deferred`.
                    waiting[i, chunk] = self.deferred[:]
                    self.deferred.clear()
        # The next run() drops the buffers, so no message may still be on its way then.
        self.wait([work for work, _ in self.sending])
        return [outputs[i] for i in sorted(outputs)]

    def reset(self, like: Callable[[int], tuple], training: bool) -> None:
        self.like = like
        self.unfinished = self.unfinished or training
        self.idle_s = 0.0
        self.in_flight = 0
        self.sent_bytes = 0
        self.outbox = {}  # key of a message -> its tensor, until it is sent
        self.inbox = {}  # key of a message -> (work, tensor), until it is used
        self.sending = []  # (work, tensor) of messages on their way

    # ---- messages --------------------------------------------------------------------------------
    def post(self, batch: list[Transfer]) -> None:
        """Starts a batch of messages in both directions, and waits for none of them."""
        calls = []
        buffers = []
        for transfer in batch:
            shape, dtype, device = self.like(transfer.key[1])
            if transfer.send:
                call = dist.isend
                buffer = self.outbox.pop(transfer.key)
            else:
                call = dist.irecv
                buffer = torch.empty(shape, dtype=dtype, device=device)
            assert (buffer.shape, buffer.dtype) == (torch.Size(shape), dtype), "not like `like`"
            calls.append(dist.P2POp(call, buffer, group=self.group, group_peer=transfer.peer))
            buffers.append(buffer)
        works = dist.batch_isend_irecv(calls)
        # gloo returns a work for each message, NCCL one for the batch.
        if len(works) != len(batch):
            works = works * len(batch)

        # A buffer on its way must stay alive; what has arrived is let go of.
        self.sending = [pair for pair in self.sending if not pair[0].is_completed()]
        for transfer, buffer, work in zip(batch, buffers, works):
            if transfer.send:
                self.sent_bytes += buffer.nbytes
                self.sending.append((work, buffer))
            else:
                self.inbox[transfer.key] = work, buffer

    def receive(self, *key) -> torch.Tensor:
        """The message with this key (kind, micro-batch, stage), once it is here."""
        work, buffer = self.inbox.pop(key)
        self.wait([work])
        return buffer

    def wait(self, works: list) -> None:
        began = time.perf_counter()
        for work in works:
            work.wait()
        self.idle_s += time.perf_counter() - began

    # ---- beside the schedule ---------------------------------------------------------------------
    def logits(
        self,
        model: torch.nn.Module,
        like: Callable[[int, int], tuple],
        n_logits: int,
        ids: torch.Tensor,
        position_ids: torch.Tensor,
        **more,
    ) -> torch.Tensor:
        """ids (B, T) -> logits (B, T, n_logits), by all stages, the same on all ranks.

        like(B, T): shape, dtype and device of the hidden states; position_ids: (T,); more: what
        else the model takes.
        """
        hidden = like(*ids.shape)

        def forward(i: int, layers: list[int], x: torch.Tensor | None) -> torch.Tensor:
            x = ids if x is None else x
            return model(x, position_ids=position_ids, layers=layers, **more)

        outputs = self.run(1, forward, lambda i: hidden)
        # The other ranks must know the dtype they receive: model.py gives logits at least float32.
        if self.last:
            logits = outputs[0].contiguous()
        else:
            dtype = torch.promote_types(hidden[1], torch.float32)
            logits = torch.empty(*ids.shape, n_logits, dtype=dtype, device=ids.device)
        dist.broadcast(logits, group=self.group, group_src=self.p - 1)
        return logits

    @torch.no_grad()
    def tie(self, model: torch.nn.Module) -> None:
        """The last rank's tied parameter gets the first rank's weights, once before training.

        Call it on all ranks. On the meta device nothing is sent.
        """
        if self.ends is None:
            return
        self.model = model
        self.guard = StepGuard(self, self.tied_params, UNTIED)
        p = model.get_parameter(self.tied_name)
        if not p.is_meta:
            weights = p.to(self.device)
            dist.broadcast(weights, group=self.ends, group_src=0)
            p.copy_(weights)

    def tied_params(self) -> list:
        # Asked for at each step: a layout may have put another parameter in its place.
        return [self.model.get_parameter(self.tied_name)]

    def all_reduce_tied_grads(self, gradients: dict[str, torch.Tensor]) -> None:
        """Sums the tied parameter's gradient over its two ranks, in place.

        Does nothing where `gradients` lacks it: then both ranks lack it.
        """
        self.unfinished = False
        if self.ends is None or self.tied_name not in gradients:
            return
        gradient = gradients[self.tied_name]
        # An offloaded gradient lies on the CPU, but messages leave from the device.
        total = gradient.to(self.device)
        dist.all_reduce(total, group=self.ends)
        if total is not gradient:
            gradient.copy_(total)
        self.sent_bytes += total.nbytes


# ---- zero bubble: a backward in two parts --------------------------------------------------------
def defer_weight_gradients(model: torch.nn.Module) -> list:
    """From now on a backward leaves the weight gradients of each `matmul` for later.

    Returns the list in which it leaves them, for Pipeline.deferred. Call this after everything else
    that replaces a module's `matmul`.
    """
    queue = []
    for module in model.modules():
        if hasattr(module, "matmul"):
            module.matmul = functools.partial(deferred_matmul, queue, module.matmul)
        if hasattr(module, "product"):
            module.product = None  # experts (layers/moe.py), each by its own `matmul`
    return queue


def deferred_matmul(queue: list, matmul: Callable, x, weight, bias=None) -> torch.Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N); its backward puts an entry into `queue`."""
    parameters = (weight, bias)
    is_trained = any(w is not None and w.requires_grad for w in parameters)
    if not torch.is_grad_enabled() or not is_trained:
        return matmul(x, weight, bias)
    # autograd calls our backward only if an input of `apply` wants a gradient.
    start = x
    if not x.requires_grad:
        start = x.detach().requires_grad_()
    return Matmul.apply(start, x.requires_grad, queue, matmul, parameters)


class Matmul(torch.autograd.Function):
    """matmul(x, weight, bias) in a graph of its own, whose backward runs in two parts.

    The input's gradient is computed now, the weights' gradients later. A matmul that is one custom
    Function computes all of them both times.
    """

    @staticmethod
    def forward(ctx, x, needs_x, queue, matmul, parameters):
        needs = [w is not None and w.requires_grad for w in parameters]
        # Detached copies make the inner graph end at this product's own inputs. It saves these, and
        # not how to compute them again: leaf_x is here anyway, as long as this graph.
        with torch.enable_grad(), saved_tensors_hooks(itself, itself):
            leaf_x = x.detach().requires_grad_(needs_x)
            leaves = []
            for w, needed in zip(parameters, needs):
                leaves.append(None if w is None else w.detach().requires_grad_(needed))
            y = matmul(leaf_x, *leaves)
        pairs = [(leaf, w) for leaf, w, needed in zip(leaves, parameters, needs) if needed]
        if not needs_x:
            leaf_x = None
        ctx.kept = queue, get_gradient_edge(y), leaf_x, pairs
        return y.detach()

    @staticmethod
    def backward(ctx, dy):
        queue, edge, leaf_x, pairs = ctx.kept
        queue.append((edge, dy, pairs))
        dx = None
        if leaf_x is not None:
            # The weights' gradients need the same graph once more.
            (dx,) = torch.autograd.grad([edge], [leaf_x], [dy], retain_graph=True)
        return dx, None, None, None, None


def itself(x: torch.Tensor) -> torch.Tensor:
    # Detached, for a result that its own part of the graph holds would never go.
    return x if x.is_leaf else x.detach()


def weight_gradients(queue: list) -> None:
    """Computes the weight gradients that backward has left, and empties the queue."""
    while queue:
        edge, dy, pairs = queue.pop()
        leaves = [leaf for leaf, _ in pairs]
        weights = [weight for _, weight in pairs]
        gradients = torch.autograd.grad([edge], leaves, [dy])
        # A backward of the real weights, not an assignment to grad: their hooks must fire.
        torch.autograd.backward(weights, gradients)


# ---- python -m parallel.pipeline: draws a schedule -----------------------------------------------
USAGE = f"""Draws a pipeline schedule: who computes what when, who waits, who keeps how much.

    python -m parallel.pipeline --schedule=1f1b --pp=4
    python -m parallel.pipeline --schedule=interleaved --pp=4 --pp_chunks=2
    python -m parallel.pipeline --schedule=zerobubble --pp=4 --micro_batches=16

  --schedule=1f1b       or {", ".join(name for name in SCHEDULES if name != "1f1b")} (--pp_schedule)
  --pp=4                ranks, each with some of the layers
  --micro_batches=8     of a step, on each rank
  --pp_chunks=1         model chunks on each rank; 2 or more for interleaved, where 2 is usual

The formulas of each schedule are at the top of parallel/timeline.py."""


def main(argv: list[str]) -> str:
    if {"--help", "-h"} & {*argv}:
        return USAGE
    flags = {"schedule": "1f1b", "pp": 4, "micro_batches": 8, "pp_chunks": None}
    for argument in argv:
        name, _, text = argument.removeprefix("--").partition("=")
        is_number = text.isdecimal()
        if name not in flags or (name != "schedule" and not is_number):
            raise ValueError(
                f"{argument!r}: type --schedule=1f1b, --pp=4, --micro_batches=8, --pp_chunks=1"
            )
        flags[name] = text if name == "schedule" else int(text)
    if not flags["pp_chunks"]:
        flags["pp_chunks"] = 2 if flags["schedule"] == "interleaved" else 1
    ops = schedule(*flags.values())
    timeline = simulate(ops)
    drawing = str(timeline).splitlines()
    width = max(map(len, drawing))
    cell = 1 + max(op.chunk for op in ops[0])  # characters of a unit of time
    units = range(0, round(timeline.end), 10 if cell == 1 else 5)
    axis = "".join(str(unit).ljust(cell * units.step) for unit in units).rstrip()
    nouns = dict(pp="rank", micro_batches="micro-batch", pp_chunks="model chunk")
    ranks, batches, chunks = (counted(flags[name], noun) for name, noun in nouns.items())
    lines = [f"{flags['schedule']}: {ranks}, {batches} a step, {chunks} on each rank", ""]
    lines.append(f"{'time':8}{axis:{width}}  kept  waits")
    for rank, row in enumerate(drawing):
        busy = sum(end - start for start, end in timeline.spans[rank])
        idle = 1 - busy / timeline.end
        lines.append(f"rank {rank:<3}{row:{width}}  {timeline.in_flight[rank]:4} {idle:6.1%}")
    return "\n".join([*lines, "", *legend(ops, timeline.bubble)])


def counted(n: int, noun: str) -> str:
    """1 rank, 2 ranks, 2 micro-batches."""
    return f"{n} {noun}" + (n != 1) * ("es" if noun.endswith("h") else "s")


def legend(ops: list[list[Op]], bubble: float) -> list[str]:
    """What the drawing of a schedule means: a line for each kind of mark in it."""
    kinds = {op.kind for op in ops[0]}
    has_chunks = any(op.chunk > 0 for op in ops[0])
    part = "one chunk" if has_chunks else "a rank's layers"
    lines = [
        "rank       a row is a rank, a part of the layers; rank 0 has the first ones",
        f"time       to the right; a unit is the forward of one micro-batch through {part}",
        "0 1 2      forward of micro-batch 0, 1, 2; 10 is 0 again, but letters go on to z",
    ]
    if "W" in kinds:
        lines += [
            "a b c      backward of micro-batch 0, 1, 2: the gradient of the input",
            "A B C      the same: the gradients of the weights, which no other rank waits for",
        ]
    else:
        lines.append("a b c      backward of micro-batch 0, 1, 2: twice a forward's time")
    if has_chunks:
        lines.append("0' a'      the same in the rank's second model chunk, 0'' in its third")
    lines += [
        ".          the rank waits for another",
        f"kept       the most forwards through {part} whose activations it keeps at one time",
        f"waits      the share of the time in which it waits; of all ranks' time {bubble:.1%}: the"
        " bubble",
    ]
    return lines


if __name__ == "__main__":
    from metrics.outlets import command

    command("pipeline.py", lambda words: print(main(words)))
