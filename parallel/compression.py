"""Compressed gradients: each replica sends a summary, and what that left out another time.

         replica 0                                      replica 1
    x0 = g0 + e0                                   x1 = g1 + e1       e: not sent yet, 0 at first
    s0 = what a short message says of x0           s1 = ...
    e0 = x0 - s0                 messages          e1 = x1 - s1
                  └──────────────►  ◄──────────────────┘
                 s0 + s1 is the gradient on both: a plain sum, as in parallel/ddp.py

Nothing is lost by this error feedback (Seide et al. 2014; Stich et al. 2018, 1809.07599), only
delayed: (sum of all sent) + e = sum of all gradients. Without it sign and top-k need not converge
(Karimireddy et al. 2019, 1901.09847). The residuals e are keyed by the parameter's name and each
message is about one parameter, so nothing depends on how parameters are packed into buckets
(torch's DDP repacks them after its first step).

A parameter of d entries (as a matrix: a x b), entries of w bytes, N replicas: bytes sent per rank
and step

    method        message                                        collective     bytes
    none          x                                              all-reduce     2 (N-1)/N dw
    topk(f)       the fd largest |x|: values, int32 indices      all-gather     (N-1) fd (w + 4)
    sign          bits x >= 0, one fp32 scale: mean |x|          all-gather     (N-1) (d/8 + 4)
    onebit        bits x >= 0, per column the fp32 means of the  all-gather     (N-1) (d/8 + 8b)
                  entries with bit 1 and of those with bit 0
    powersgd(r)   P (a x r), then Q (b x r): x is about P Qᵀ     2 all-reduces  2 (N-1)/N r(a + b) w
    fp16, bf16    x rounded                                      all-reduce     2 (N-1)/N 2d

and 2 (N-1)/N for the roll call of parallel/ddp.py. An all-gather's bytes grow with N: signs beat
plain float32 while N < 64, the top hundredth while N < 100. Papers average over the workers; here
scales, means and Q are such that the plain sum over replicas comes out.

References: onebit: Seide, Fu, Droppo, Li and Yu 2014, "1-bit stochastic gradient descent" (its
columns are ours; a vector is one column). sign: scaled as by Karimireddy et al. PowerSGD: Vogels,
Karimireddy and Jaggi 2019, 1905.13727. Ours differs in that e is what this replica's own P Qᵀ
leaves of its own x, instead of what the average over replicas leaves of it: the sums, and so the
run, are the same, and e stays small where replicas see different data. The ring of fp16 and bf16
adds in 16 bits; that rounding, the same on all replicas, is in no residual.

`reduce` of parallel/ddp.py is one of these: DDP(group, device, reduce=topk(fraction=0.01)). A
gradient that is not finite leaves a sum that is not finite on every replica, for a monitor to see,
and what it would do to the residual or to Q is not kept. One that is missing on some replicas is
zero there, and they send of their residuals; one that is missing on all leaves residuals and Q as
they were.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize, pad

from parallel.ddp import Bucket


class Compressor:
    """One of the methods below, with its memory; call it as `reduce(bucket, group)`.

    exchange(compressor, bucket, group): a generator that turns bucket.views into their sums over
    replicas, hands `keep` what it sent, and yields where it has to wait for a collective.
    """

    def __init__(self, exchange: Callable[..., Iterator], error_feedback: bool):
        self.exchange, self.error_feedback = exchange, error_feedback
        # Parameter's name -> what this replica has not sent yet
        self.residuals: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}  # the same as the step in hand found it
        # What is the same on all replicas: PowerSGD's Q by name
        self.shared: dict[str, Tensor] = {}
        self.shared_before: dict[str, Tensor] = {}  # the same as the step in hand found it

    def __call__(self, bucket: Bucket, group: dist.ProcessGroup) -> "InFlight":
        bucket.sent_bytes = 0
        if self.error_feedback:
            for name, x in zip(bucket.names, bucket.views):
                residual = self.residuals.get(name)
                self.residuals[name] = torch.zeros_like(x) if residual is None else residual.to(x)
                self.before[name] = self.residuals[name]
                x.add_(self.residuals[name])
        return InFlight(self.exchange(self, bucket, group))

    def discard_step(self) -> None:
        """The step in hand is not taken: what it left unsent is owed no more, what was owed before
        still is. (PowerSGD's Q, a guess to start from, stays.)"""
        self.residuals |= self.before

    def forget(self, names: list[str]) -> None:
        """No replica has a gradient of these: nobody uses what was sent, and all is as before."""
        for now, before in ((self.residuals, self.before), (self.shared, self.shared_before)):
            now |= {name: before[name] for name in names if name in before}

    def keep(self, name: str, x: Tensor, sent: Tensor) -> None:
        """The residual of this parameter is now x - sent, except where that is not finite."""
        if self.error_feedback:
            left = (x - sent).view_as(self.residuals[name])
            self.residuals[name] = torch.where(left.isfinite(), left, self.residuals[name])

    def state_dict(self, rank: int, world: int) -> dict:
        """What replica `rank` of `world` has to put into a checkpoint."""
        return {"replicas": world, "residuals": {str(rank): self.residuals}, "shared": self.shared}

    def load_state_dict(self, read: Callable[[str], dict | int], rank: int, world: int) -> None:
        """Takes up what `state_dict` gave; read("residuals/3") is that part of the trees of all
        ranks, merged.

        On the same number of replicas each goes on with its own residuals; on another number all
        are summed and shared out equally, so that their sum, which the gradient still owes, stays
        what it was.
        """
        self.shared, saved = read("shared"), read("replicas")
        if saved == world:
            self.residuals = read(f"residuals/{rank}")
            return
        total: dict[str, Tensor] = {}
        for r in range(saved):
            for name, residual in read(f"residuals/{r}").items():
                total[name] = total[name] + residual if name in total else residual
        self.residuals = {name: residual / world for name, residual in total.items()}


class InFlight:
    """An exchange that has started: runs up to its first collective at once, the rest in wait()."""

    def __init__(self, steps: Iterator):
        self.steps, self.work = steps, next(steps)

    def wait(self) -> None:
        while self.work is not None:
            self.work.wait()
            self.work = next(self.steps, None)


# ---- messages that everybody gets from everybody: topk, sign, onebit -----------------------------
def topk(fraction: float = 0.01, error_feedback: bool = True) -> Compressor:
    """Only the `fraction` of each parameter's entries (0 < fraction <= 1) that is largest in
    magnitude."""
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction={fraction} is no share of the entries; it lies in (0, 1], as 0.01 does"
        )

    def encode(x: Tensor) -> list[Tensor]:
        # NaN counts as largest
        largest = x.flatten().abs().topk(max(1, round(fraction * x.numel()))).indices
        return [x.flatten()[largest], largest.to(torch.int32)]

    def add(message: list[Tensor], out: Tensor) -> None:
        values, indices = message[0], message[1].long()
        out.view(-1)[indices] += values  # no index comes twice, so replicas get the same bits

    return Compressor(gathered(encode, add), error_feedback)


def sign(error_feedback: bool = True) -> Compressor:
    """One bit per entry, and for each parameter the mean of the magnitudes."""

    def encode(x: Tensor) -> list[Tensor]:
        return [x.abs().mean().to(torch.float32), to_bytes(x >= 0)]

    def add(message: list[Tensor], out: Tensor) -> None:
        scale = message[0].to(out.dtype)
        out += torch.where(to_bits(message[1], out), scale, -scale)

    return Compressor(gathered(encode, add), error_feedback)


def onebit(error_feedback: bool = True) -> Compressor:
    """One bit per entry, and for each column the mean of the entries >= 0 and the mean of those
    below 0."""

    def encode(x: Tensor) -> list[Tensor]:
        m = columns(x)
        bits = m >= 0
        means = [torch.where(b, m, 0).sum(0) / b.sum(0).clamp(min=1) for b in (bits, ~bits)]
        return [torch.stack(means).to(torch.float32), to_bytes(bits)]

    def add(message: list[Tensor], out: Tensor) -> None:
        m, (high, low) = columns(out), message[0].to(out.dtype)  # each mean: (columns,)
        m += torch.where(to_bits(message[1], m), high, low)

    return Compressor(gathered(encode, add), error_feedback)


def gathered(encode: Callable[[Tensor], list[Tensor]], add: Callable[[list[Tensor], Tensor], None]):
    """The exchange in which every replica adds up the messages of all, in the order of ranks.

    encode(x): the message about one parameter, tensors whose shapes depend on x's shape alone;
    add(message, out): adds what it says to `out`.
    """

    def exchange(compressor: Compressor, bucket: Bucket, group: dist.ProcessGroup):
        messages = [encode(x) for x in bucket.views]
        for name, x, message in zip(bucket.names, bucket.views, messages):
            sent = torch.zeros_like(x)
            add(message, sent)
            compressor.keep(name, x, sent)
        mine = torch.cat(
            [part.view(-1).view(torch.uint8) for message in messages for part in message]
        )
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        bucket.sent_bytes = (len(everyone) - 1) * mine.nbytes
        yield dist.all_gather(everyone, mine, group=group, async_op=True)
        bucket.flat.zero_()
        for theirs in everyone:
            pieces = iter(theirs.split([part.nbytes for message in messages for part in message]))
            # Clone: a piece may begin at an odd byte
            for x, message in zip(bucket.views, messages):
                add([next(pieces).clone().view(part.dtype).view_as(part) for part in message], x)

    return exchange


def to_bytes(bits: Tensor) -> Tensor:
    """bool, any shape -> uint8 (ceil(d/8),): eight to a byte, the first one lowest."""
    bits = pad(bits.flatten().to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(
        1, dtype=torch.uint8
    )


def to_bits(packed: Tensor, like: Tensor) -> Tensor:
    """What to_bytes packed, as bool in the shape of `like`."""
    bits = packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.view(-1)[: like.numel()].view_as(like).bool()


# ---- messages that are summed on the way: powersgd, fp16, bf16 -----------------------------------
def powersgd(rank: int = 4, error_feedback: bool = True, seed: int = 0) -> Compressor:
    """Each matrix M as P Qᵀ of this rank, by one step of power iteration that goes on from the last
    step's Q:

        P = sum over replicas of M Q,    its columns made orthonormal
        Q = sum over replicas of Mᵀ P    (so P Qᵀ is the sum of the M, projected on the columns of
                                         P)

    The first Q is a function of (seed, name). Vectors, and matrices that P and Q would not make
    smaller, are sent as they are. QR makes P orthonormal also where M is 0 or of lower rank, as
    behind projections that start at 0; Gram-Schmidt would divide by 0.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: P and Q need at least 1 column; 1 to 8 are usual")

    def first_q(name: str, columns: int) -> Tensor:
        # Not the initial weights' key
        key = hashlib.sha256(f"{seed}:powersgd:{name}".encode()).digest()[:4]
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        return torch.randn(columns, rank, generator=generator)

    def exchange(compressor: Compressor, bucket: Bucket, group: dist.ProcessGroup):
        matrices, whole = {}, []
        for name, x in zip(bucket.names, bucket.views):
            m = columns(x)
            if rank * sum(m.shape) < m.numel():
                matrices[name] = m
                q = compressor.shared.get(name)
                fits = q is not None and q.shape == (m.shape[1], rank)
                compressor.shared[name] = (q if fits else first_q(name, m.shape[1])).to(m)
                compressor.shared_before[name] = compressor.shared[name]
            else:
                whole.append(x)
                compressor.keep(name, x, x)
        ps = [m @ compressor.shared[name] for name, m in matrices.items()]
        work, sums = summed(ps + whole, bucket, group)
        yield work
        for x, total in zip(whole, sums[len(matrices) :]):
            x.copy_(total)
        if not matrices:
            return
        ps = [orthonormal(p) for p in sums[: len(matrices)]]
        qs = [m.T @ p for m, p in zip(matrices.values(), ps)]
        work, sums = summed(qs, bucket, group)
        for (name, m), p, q in zip(matrices.items(), ps, qs):  # while the sums of Q are under way
            compressor.keep(name, m, p @ q.T)
        yield work
        for (name, m), p, q in zip(matrices.items(), ps, sums):
            m.copy_(p @ q.T)
            q = normalize(q, dim=0)  # same columns' span; P of tiny gradients would underflow
            compressor.shared[name] = torch.where(q.isfinite().all(), q, compressor.shared[name])

    return Compressor(exchange, error_feedback)


def orthonormal(p: Tensor) -> Tensor:
    """(a, r) -> an orthonormal basis of its columns, (a, r)."""
    return torch.linalg.qr(p.to(torch.promote_types(p.dtype, torch.float32))).Q.to(p.dtype)


def fp16(error_feedback: bool = True) -> Compressor:
    """Rounded to 11 significant bits; below 6e-5 fewer, below 3e-8 zero (kept for later), above
    65504 inf."""
    return Compressor(cast(torch.float16), error_feedback)


def bf16(error_feedback: bool = True) -> Compressor:
    """Rounded to 8 significant bits, with float32's range."""
    return Compressor(cast(torch.bfloat16), error_feedback)


def cast(dtype: torch.dtype):
    """The exchange in which everything is summed in this dtype."""

    def exchange(compressor: Compressor, bucket: Bucket, group: dist.ProcessGroup):
        rounded = [x.to(dtype) for x in bucket.views]
        for name, x, sent in zip(bucket.names, bucket.views, rounded):
            compressor.keep(name, x, sent)
        work, sums = summed(rounded, bucket, group)
        yield work
        for x, total in zip(bucket.views, sums):
            x.copy_(total)

    return exchange


def summed(tensors: list[Tensor], bucket: Bucket, group: dist.ProcessGroup):
    """Starts one all-reduce of all these tensors; returns what has a wait(), and the sums to be."""
    flat, n = torch.cat([x.flatten() for x in tensors]), dist.get_world_size(group)
    bucket.sent_bytes += 2 * (n - 1) * flat.nbytes // n
    sums = [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in tensors]), tensors)]
    return dist.all_reduce(flat, group=group, async_op=True), sums


def columns(x: Tensor) -> Tensor:
    """x as a matrix with the first dimension for rows; a vector is one column."""
    return x.view(x.shape[0], -1) if x.ndim > 1 else x.view(-1, 1)
