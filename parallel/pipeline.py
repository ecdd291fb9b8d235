"""Pipeline parallelism: each rank holds some layers; micro-batches walk through the ranks and back.

       rank 0                rank 1            rank 2            rank 3            p = 4 stages,
    embed, layers 0 1 ──h──► layers 2 3 ──h──► layers 4 5 ──h──► layers 6 7,       n_layer=8
                      ◄─dh──            ◄─dh──            ◄─dh── head, loss        h: (B, T, C)

In which order is parallel/timeline.py's matter; here its programs are carried out.

Bytes sent per rank and step, with v chunks of layers a rank:

    hidden states   m x bytes of h for each of its virtual stages but the very last
    gradients       m x bytes of h for each of its virtual stages but the very first
    tied head       the bytes of embed.weight, first and last rank only: each has a part of its
                    gradient

References: see parallel/timeline.py.
"""

import functools
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.autograd.graph import get_gradient_edge

from parallel.mesh import new_group
from parallel.timeline import Op, Transfer, layers, programs, schedule, simulate


class Pipeline:
    """One rank's part: `layers` are the numbers of all it holds; `first`, `last`: has it that
    virtual stage? After run(): `in_flight`, most forwards alive at once, `sent_bytes`, and
    `idle_s`, seconds of waiting for others (a GPU waits apart from its process: not seen here).

    device: where messages leave from. tied: first and last rank share the parameter `tied_name`.
    """

    deferred: list | None = None  # what defer_weight_gradients(model) gave

    def __init__(
        self,
        group: dist.ProcessGroup,
        name: str,
        n_layer: int,
        chunks: int = 1,
        device: torch.device = torch.device("cpu"),
        tied: bool = False,
        tied_name: str = "embed.weight",
    ):
        assert group is not None, "one rank is no pipeline"
        self.group, self.name, self.v, self.tied_name, self.device = (
            group,
            name,
            chunks,
            tied_name,
            device,
        )
        self.rank, self.p = dist.get_rank(group), dist.get_world_size(group)
        schedule(name, self.p, self.p, chunks)  # refuses
        self.chunks = layers(n_layer, self.p, chunks)[self.rank]
        self.layers = [i for chunk in self.chunks for i in chunk]
        self.first, self.last, self.idle_s, self.in_flight = (
            self.rank == 0,
            self.rank == self.p - 1,
            0.0,
            0,
        )
        ranks, self.ends, self.sent_bytes = dist.get_process_group_ranks(group), None, 0
        if tied and (self.first or self.last):
            self.ends = new_group([ranks[0], ranks[-1]], device)
        self.plan = functools.cache(self.plan)
        dist.barrier(group)  # NCCL: messages between two ranks only after one of all

    def plan(self, m: int, training: bool) -> list[Op | list[Transfer]]:
        groups = [range(i, min(i + self.p, m)) for i in range(0, m, self.p)]
        every = [Op("F", i, chunk) for group in groups for chunk in range(self.v) for i in group]
        ops = schedule(self.name, self.p, m, self.v) if training else [every] * self.p
        return programs(simulate(ops))[self.rank]

    def run(
        self,
        m: int,
        forward: Callable,
        like: Callable[[int], tuple],
        backward: float | None = None,
        before_backward: Callable[[bool], None] = lambda is_last: None,
    ) -> list:
        """m micro-batches: forward(i, layers, x) gives the hidden states after these layers or,
        after the last, the loss (0-dim; forward only: anything). x: the hidden states before them,
        None at the start.

        like(i): shape, dtype, device of hidden states. backward: what each loss is multiplied by
        before its backward; None: forward only. before_backward(is_last): before each; are the
        gradients complete after it? Returns on the last rank what forward gave, in the order of
        micro-batches; elsewhere [].
        """
        training = backward is not None
        if training and self.name == "zerobubble":
            assert self.deferred is not None, "set deferred = defer_weight_gradients(model)"
        self.like, self.idle_s, self.in_flight, self.sent_bytes = like, 0.0, 0, 0
        self.outbox, self.inbox, self.sending = {}, {}, []
        alive, waiting, outputs, program = {}, {}, {}, self.plan(m, training)
        last = [step for step in program if isinstance(step, Op) and step.kind == "B"][-1:]
        for step in program:
            if not isinstance(step, Op):
                self.post(step)
                continue
            kind, i, chunk = step
            stage = chunk * self.p + self.rank
            final = stage == self.p * self.v - 1
            if kind == "F":
                x = self.receive("F", i, stage) if stage else None
                if stage and training:
                    x.requires_grad_()
                y = forward(i, self.chunks[chunk], x)
                if final:
                    outputs[i] = y.detach() if training else y
                else:
                    self.outbox["F", i, stage + 1] = y.detach().contiguous()
                if training:  # the edge: y's numbers are free as soon as they are sent
                    alive[i, chunk] = x, get_gradient_edge(y) if y.requires_grad else None
                    self.in_flight = max(self.in_flight, len(alive) + len(waiting))
            elif kind == "W":
                weight_gradients(waiting.pop((i, chunk)))
            else:
                x, edge = alive.pop((i, chunk))
                dy = torch.full_like(outputs[i], backward) if final else self.receive("B", i, stage)
                before_backward([step] == last)
                if edge is not None:  # else all is frozen up to here
                    torch.autograd.backward([edge], [dy])
                if stage:
                    self.outbox["B", i, stage - 1] = x.grad.contiguous()
                if kind == "I":
                    waiting[i, chunk] = self.deferred[:]
                    self.deferred.clear()
        self.wait([work for work, _ in self.sending])
        return [outputs[i] for i in sorted(outputs)]

    def post(self, batch: list[Transfer]) -> None:
        buffers = []
        for t in batch:
            shape, dtype, device = self.like(t.key[1])
            new = (
                self.outbox.pop(t.key) if t.send else torch.empty(shape, dtype=dtype, device=device)
            )
            assert (new.shape, new.dtype) == (torch.Size(shape), dtype), "not like `like`"
            buffers.append(new)
        calls = [
            dist.P2POp(dist.isend if t.send else dist.irecv, b, group=self.group, group_peer=t.peer)
            for t, b in zip(batch, buffers)
        ]
        works = dist.batch_isend_irecv(calls)
        self.sending = [pair for pair in self.sending if not pair[0].is_completed()]  # or not yet
        for t, buffer, work in zip(
            batch, buffers, works if len(works) == len(batch) else works * len(batch)
        ):
            self.sent_bytes += buffer.nbytes * t.send
            if t.send:
                self.sending.append((work, buffer))
            else:
                self.inbox[t.key] = work, buffer

    def receive(self, *key) -> torch.Tensor:
        work, buffer = self.inbox.pop(key)
        self.wait([work])
        return buffer

    def wait(self, works: list) -> None:
        began = time.perf_counter()
        for work in works:
            work.wait()
        self.idle_s += time.perf_counter() - began

    def logits(
        self,
        model: torch.nn.Module,
        like: Callable[[int, int], tuple],
        n_logits: int,
        ids: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """The logits (B, T, n_logits) of ids (B, T), by all stages, on all ranks. like(B, T): as in
        run."""
        hidden = like(*ids.shape)

        def forward(i: int, layers: list[int], x: torch.Tensor | None) -> torch.Tensor:
            return model(ids if x is None else x, position_ids=positions, layers=layers)

        out, dtype = (
            self.run(1, forward, lambda i: hidden),
            torch.promote_types(hidden[1], torch.float32),
        )
        shape = *ids.shape, n_logits
        out = (
            out[0].contiguous() if self.last else torch.empty(shape, dtype=dtype, device=ids.device)
        )
        dist.broadcast(out, group=self.group, group_src=self.p - 1)
        return out

    def share_tied(self, gradients: dict[str, torch.Tensor]) -> None:
        """Sums the tied parameter's gradient over its two ranks, in place, if it is there (on
        both)."""
        if self.ends is not None and self.tied_name in gradients:
            gradient = gradients[self.tied_name]
            total = gradient.to(self.device)  # offloaded ones are on the CPU
            dist.all_reduce(total, group=self.ends)
            if total is not gradient:
                gradient.copy_(total)
            self.sent_bytes += total.nbytes


# ---- zero bubble: a backward in two parts --------------------------------------------------------
def defer_weight_gradients(model: torch.nn.Module) -> list:
    """From now on a backward leaves the weight gradients of each module with a `matmul` in the
    list that is returned, for Pipeline.deferred. To be called after all else that replaces
    products."""
    queue = []
    for module in model.modules():
        if hasattr(module, "matmul"):
            module.matmul = functools.partial(deferred_matmul, queue, module.matmul)
    return queue


def deferred_matmul(queue: list, matmul: Callable, x, weight, bias=None) -> torch.Tensor:
    if not torch.is_grad_enabled() or not any(
        w is not None and w.requires_grad for w in (weight, bias)
    ):
        return matmul(x, weight, bias)
    start = x if x.requires_grad else x.detach().requires_grad_()  # or backward would not come here
    return Matmul.apply(start, x.requires_grad, queue, matmul, (weight, bias))


class Matmul(torch.autograd.Function):
    """matmul(x, weight, bias) in a graph of its own, which is asked for the input's gradient now,
    for the others later. (A matmul that is one custom Function computes all of them both
    times.)"""

    @staticmethod
    def forward(ctx, x, needs_x, queue, matmul, parameters):
        needs = [needs_x, *(w is not None and w.requires_grad for w in parameters)]
        with torch.enable_grad():
            tensors = zip((x, *parameters), needs)
            inner = [w if w is None else w.detach().requires_grad_(n) for w, n in tensors]
            y = matmul(*inner)
        pairs = [(leaf, w) for leaf, w, n in zip(inner[1:], parameters, needs[1:]) if n]
        ctx.kept = queue, get_gradient_edge(y), inner[:1] * needs_x, pairs
        return y.detach()

    @staticmethod
    def backward(ctx, dy):
        queue, edge, x, pairs = ctx.kept
        queue.append((edge, dy, pairs))
        dx = torch.autograd.grad([edge], x, [dy], retain_graph=True) if x else [None]
        return dx[0], None, None, None, None


def weight_gradients(queue: list) -> None:
    """Into the real weights, through whatever they are views of, as any backward: hooks fire."""
    while queue:
        edge, dy, pairs = queue.pop()
        gradients = torch.autograd.grad([edge], [leaf for leaf, _ in pairs], [dy])
        torch.autograd.backward([weight for _, weight in pairs], gradients)


def main(argv: list[str]) -> str:
    flags = {"schedule": "1f1b", "pp": 4, "micro_batches": 8, "pp_chunks": None}
    for argument in argv:
        name, _, text = argument.removeprefix("--").partition("=")
        if name not in flags or (name != "schedule" and not text.isdecimal()):
            raise ValueError(
                f"{argument!r}: type --schedule=1f1b, --pp=4, --micro_batches=8, --pp_chunks=1"
            )
        flags[name] = text if name == "schedule" else int(text)
    flags["pp_chunks"] = flags["pp_chunks"] or (2 if flags["schedule"] == "interleaved" else 1)
    timeline = simulate(schedule(*flags.values()))
    return (
        f"{timeline}\nidle: {timeline.bubble:.1%}; most forwards in memory, by rank:"
        f" {timeline.in_flight}"
    )


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except ValueError as error:
        print(f"pipeline.py: {error}", file=sys.stderr)
        sys.exit(2)
