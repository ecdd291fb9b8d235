"""Compressed gradients: each replica sends a short message, and later what the message left out.

         replica 0                                      replica 1
    x0 = g0 + e0                                   x1 = g1 + e1       e: not sent yet, 0 at first
    s0 = what a short message says of x0           s1 = ...
    e0 = x0 - s0                 messages          e1 = x1 - s1
                  └──────────────►  ◄──────────────────┘
                 s0 + s1 is the gradient on both: a plain sum, as in parallel/ddp.py

By this error feedback (Seide et al. 2014; Stich et al. 2018, 1809.07599) nothing is lost, only
delayed: (sum of all sent) + e = sum of all gradients. Without it sign and top-k need not converge
(Karimireddy et al. 2019, 1901.09847). The residuals e are keyed by parameter name, and each message
is about one parameter. So nothing depends on how parameters are packed into buckets (torch's DDP
repacks them after its first step).

Bytes sent per rank and step on N replicas. A parameter has d entries of w bytes each, as a matrix
it is a x b:

    method        message                                        collective     bytes
    none          x                                              all-reduce     2 (N-1)/N dw
    topk(f)       the fd largest |x|: values, int32 indices      all-gather     (N-1) fd (w + 4)
    sign          bits x >= 0, one fp32 scale: mean |x|          all-gather     (N-1) (d/8 + 4)
    onebit        bits x >= 0, per column the fp32 means of the  all-gather     (N-1) (d/8 + 8b)
                  entries with bit 1 and of those with bit 0
    powersgd(r)   P (a x r), then Q (b x r): x is about P Qᵀ     2 all-reduces  2 (N-1)/N r(a + b) w
    fp16, bf16    x rounded                                      all-reduce     2 (N-1)/N 2d

The roll call of parallel/replicas.py adds 2 (N-1)/N bytes. An all-gather's bytes grow with N:
signs are shorter than plain float32 while N < 64, the top hundredth while N < 100. Papers average
over the workers. Here scales, means and Q are such that the plain sum over replicas comes out.

Use: DDP(group, device, reduce=topk(fraction=0.01)). A gradient that is not finite leaves a sum that
is not finite on every replica, for a monitor to see, but it changes neither residual nor Q. A
gradient that is missing on some replicas is zero there, and they send parts of their residuals. One
that is missing on all leaves residuals and Q as they were.

References:
- onebit: Seide, Fu, Droppo, Li and Yu 2014, "1-bit stochastic gradient descent". The choice of
  columns is ours; a vector is one column.
- sign: scaled as by Karimireddy et al.
- PowerSGD: Vogels, Karimireddy and Jaggi 2019 (1905.13727). In the paper e is what the average over
  replicas leaves of x; here it is what this replica's own P Qᵀ leaves of its own x. The sums, and
  so the run, are the same, and e stays small where replicas see different data.
- fp16, bf16: the ring adds in 16 bits. That rounding is the same on all replicas, and no residual
  has it.

Residuals start at 0, weights at those of rank 0, as DDP does it. Forgotten calls are DDP's errors;
a step that is dropped before finish_gradients() leaves the residuals as they were.

Neighbours: parallel/ddp.py, parallel/replicas.py

Example:
    import tempfile, torch
    import torch.distributed as dist, torch.multiprocessing as mp
    from parallel.compression import topk
    from parallel.ddp import DDP

    def train(rank, file):
        dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
        torch.manual_seed(rank)
        replicas = DDP(dist.group.WORLD, torch.device("cpu"), reduce=topk(fraction=0.1))
        model = replicas.parallelize(torch.nn.Linear(100, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for step in range(100):
            x = torch.randn(32, 100) / 10
            loss = (model(x) - x.sum(1, keepdim=True)).square().sum() / 64
            loss.backward()
            replicas.finish_gradients()
            optimizer.step()
            optimizer.zero_grad()
            first = loss.item() if step == 0 else first
        print(f"rank {rank}: loss {first:.2f} -> {loss:.2f}, {replicas.sent_bytes} bytes a step")
        assert loss < first / 2 and replicas.sent_bytes < 404 / 3  # DDP: 404, and 2 for the roll
        dist.destroy_process_group()

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(train, (f"{folder}/store",), nprocs=2, start_method="fork")
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize, pad

from parallel.ddp import Bucket
from parallel.replicas import split_like


class Compressor:
    """One of the methods below, with its memory; call it as `reduce(bucket, group)`.

    exchange(compressor, bucket, group): a generator that turns bucket.views into their sums over
    replicas. It calls `keep` with what it sent, and yields where it has to wait for a collective.
    """

    def __init__(self, exchange: Callable[..., Iterator], error_feedback: bool):
        self.exchange = exchange
        self.error_feedback = error_feedback
        # By parameter name: what this replica has not sent yet, now and before this step.
        self.residuals: dict[str, Tensor] = {}
        self.residuals_before: dict[str, Tensor] = {}
        # By parameter name: what is the same on all replicas (PowerSGD's Q), now and before.
        self.shared: dict[str, Tensor] = {}
        self.shared_before: dict[str, Tensor] = {}

    def __call__(self, bucket: Bucket, group: dist.ProcessGroup) -> "InFlight":
        """Starts the sum of the bucket over the group; returns what has a wait()."""
        bucket.sent_bytes = 0
        if self.error_feedback:
            for name, x in zip(bucket.names, bucket.views):
                # A residual from a checkpoint lies on the CPU.
                residual = self.residuals.get(name)
                residual = torch.zeros_like(x) if residual is None else residual.to(x)
                self.residuals[name] = residual
                self.residuals_before[name] = residual
                x.add_(residual)
        return InFlight(self.exchange(self, bucket, group))

    def begin_step(self) -> None:
        """The step before counts: how to undo it is forgotten, which is as large as the model."""
        self.residuals_before.clear()
        self.shared_before.clear()

    def discard_step(self) -> None:
        """This step is not taken: the residuals are again what they were before it.

        PowerSGD's Q stays, for it is only a first guess.
        """
        self.residuals |= self.residuals_before

    def forget(self, names: list[str]) -> None:
        """No replica has a gradient of these: nobody uses what was sent, and all is as before."""
        for name in names:
            if name in self.residuals_before:
                self.residuals[name] = self.residuals_before[name]
            if name in self.shared_before:
                self.shared[name] = self.shared_before[name]

    def keep(self, name: str, x: Tensor, sent: Tensor) -> None:
        """The residual of this parameter is now x - sent, except where that is not finite."""
        if self.error_feedback:
            old = self.residuals[name]
            new = (x - sent).view_as(old)
            self.residuals[name] = torch.where(new.isfinite(), new, old)

    def state_dict(self, rank: int, world: int) -> dict:
        """What replica `rank` of `world` puts into a checkpoint."""
        return {"replicas": world, "residuals": {str(rank): self.residuals}, "shared": self.shared}

    def load_state_dict(self, read: Callable[[str], dict | int], rank: int, world: int) -> None:
        """Takes up what `state_dict` gave.

        read("residuals/3") is that part of the entries of all ranks, merged. On the same number of
        replicas each resumes with its own residuals. On another number each gets an equal share of
        their sum, for the sum is what the gradient still owes.
        """
        self.shared = read("shared")
        n_saved = read("replicas")
        if n_saved == world:
            self.residuals = read(f"residuals/{rank}")
            return
        total: dict[str, Tensor] = {}
        for r in range(n_saved):
            for name, residual in read(f"residuals/{r}").items():
                total[name] = total[name] + residual if name in total else residual
        self.residuals = {name: residual / world for name, residual in total.items()}


class InFlight:
    """An exchange on its way: it runs to its first collective at once, and to its end in wait()."""

    def __init__(self, steps: Iterator):
        self.steps = steps
        self.work = next(steps)

    def wait(self) -> None:
        while self.work is not None:
            self.work.wait()
            self.work = next(self.steps, None)


# ---- messages that everybody gets from everybody: topk, sign, onebit -----------------------------
def topk(fraction: float = 0.01, error_feedback: bool = True) -> Compressor:
    """Sends only the `fraction` of each parameter's entries that is largest in magnitude.

    0 < fraction <= 1, else ValueError.
    """
    if not 0 < fraction <= 1:
        raise ValueError(
            f"fraction={fraction} is no share of the entries; it lies in (0, 1], as 0.01 does"
        )

    def encode(x: Tensor) -> list[Tensor]:
        x = x.flatten()
        n_sent = max(1, round(fraction * x.numel()))
        # NaN counts as largest, so every replica gets it.
        largest = x.abs().topk(n_sent).indices
        return [x[largest], largest.to(torch.int32)]

    def add(message: list[Tensor], out: Tensor) -> None:
        values, indices = message
        # No index comes twice, so the order of additions is the same on all replicas.
        out.view(-1)[indices.long()] += values

    return Compressor(gather_exchange(encode, add), error_feedback)


def sign(error_feedback: bool = True) -> Compressor:
    """Sends one bit for each entry, and for each parameter the mean of the magnitudes."""

    def encode(x: Tensor) -> list[Tensor]:
        return [x.abs().mean().to(torch.float32), to_bytes(x >= 0)]

    def add(message: list[Tensor], out: Tensor) -> None:
        scale = message[0].to(out.dtype)
        out += torch.where(to_bits(message[1], out), scale, -scale)

    return Compressor(gather_exchange(encode, add), error_feedback)


def onebit(error_feedback: bool = True) -> Compressor:
    """Sends one bit for each entry, and for each column two means: entries >= 0, entries < 0."""

    def encode(x: Tensor) -> list[Tensor]:
        m = columns(x)  # (a, b)
        bits = m >= 0
        means = [torch.where(b, m, 0).sum(0) / b.sum(0).clamp(min=1) for b in (bits, ~bits)]
        return [torch.stack(means).to(torch.float32), to_bytes(bits)]

    def add(message: list[Tensor], out: Tensor) -> None:
        m = columns(out)  # (a, b), a view
        high, low = message[0].to(out.dtype)  # (b,) each
        m += torch.where(to_bits(message[1], m), high, low)

    return Compressor(gather_exchange(encode, add), error_feedback)


def gather_exchange(
    encode: Callable[[Tensor], list[Tensor]], add: Callable[[list[Tensor], Tensor], None]
):
    """The exchange in which every replica adds up the messages of all, in the order of ranks.

    encode(x): the message about one parameter, tensors whose shapes depend on x's shape alone
    add(message, out): adds what the message says to `out`
    """

    def exchange(compressor: Compressor, bucket: Bucket, group: dist.ProcessGroup):
        # The residual is what the others will miss: decode my own messages as they will.
        messages = [encode(x) for x in bucket.views]
        for name, x, message in zip(bucket.names, bucket.views, messages):
            sent = torch.zeros_like(x)
            add(message, sent)
            compressor.keep(name, x, sent)

        # As bytes, messages of several dtypes share one collective.
        fields = [field for message in messages for field in message]
        mine = torch.cat([field.view(-1).view(torch.uint8) for field in fields])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        bucket.sent_bytes = (len(everyone) - 1) * mine.nbytes
        yield dist.all_gather(everyone, mine, group=group, async_op=True)

        # My own message is added in its rank's turn, so all replicas get bitwise the same sum.
        bucket.flat.zero_()
        sizes = [field.nbytes for field in fields]
        for theirs in everyone:
            chunks = iter(theirs.split(sizes))
            for x, message in zip(bucket.views, messages):
                # My own message has the dtypes and shapes of theirs. A field may begin at an odd
                # byte, where no view is allowed: so clone it.
                received = [next(chunks).clone().view(f.dtype).view_as(f) for f in message]
                add(received, x)

    return exchange


def to_bytes(bits: Tensor) -> Tensor:
    """bool, any shape -> uint8 (ceil(d/8),): eight to a byte, the first one lowest."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    bits = pad(bits.flatten().to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (bits << places).sum(1, dtype=torch.uint8)


def to_bits(packed: Tensor, like: Tensor) -> Tensor:
    """The bits that to_bytes packed, as bool in the shape of `like`."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = packed.unsqueeze(1) >> places & 1  # (ceil(d/8), 8)
    return bits.view(-1)[: like.numel()].view_as(like).bool()


# ---- messages that are summed on the way: powersgd, fp16, bf16 -----------------------------------
def powersgd(rank: int = 4, error_feedback: bool = True, seed: int = 0) -> Compressor:
    """Sends each matrix M as P Qᵀ of this rank, by one step of power iteration from the last Q:

        P = sum over replicas of M Q     its columns made orthonormal
        Q = sum over replicas of Mᵀ P    so P Qᵀ is the sum of the M, projected on P's columns

    The first Q is a function of (seed, name). Vectors, and matrices that P and Q would not make
    smaller, are sent as they are. QR makes P orthonormal also where M is 0 or of lower rank, as
    behind projections that start at 0; Gram-Schmidt would divide by 0. Raises ValueError for a rank
    below 1.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: P and Q need at least 1 column; 1 to 8 are usual")

    def exchange(compressor: Compressor, bucket: Bucket, group: dist.ProcessGroup):
        # Q is the same on all replicas: otherwise the sum of the M Q is not (sum of the M) Q.
        matrices = {}  # name -> (a, b)
        uncompressed = []
        for name, x in zip(bucket.names, bucket.views):
            m = columns(x)
            if rank * sum(m.shape) < m.numel():
                matrices[name] = m
                q = compressor.shared.get(name)
                # A checkpoint may have a Q with another number of columns.
                if q is None or q.shape != (m.shape[1], rank):
                    q = first_q(seed, name, m.shape[1], rank)
                compressor.shared[name] = q.to(m)
                compressor.shared_before[name] = compressor.shared[name]
            else:
                uncompressed.append(x)
                compressor.keep(name, x, x)

        # What is not compressed travels with P: it needs no collective of its own.
        ps = [m @ compressor.shared[name] for name, m in matrices.items()]
        work, sums = start_sum(ps + uncompressed, bucket, group)
        yield work
        for x, total in zip(uncompressed, sums[len(matrices) :]):
            x.copy_(total)
        if not matrices:
            return

        # The residuals need this replica's own Q alone (see the References), so they are computed
        # while the sum of the Qs is on its way.
        ps = [orthonormal(p) for p in sums[: len(matrices)]]
        qs = [m.T @ p for m, p in zip(matrices.values(), ps)]
        work, sums = start_sum(qs, bucket, group)
        for (name, m), p, q in zip(matrices.items(), ps, qs):
            compressor.keep(name, m, p @ q.T)
        yield work

        for (name, m), p, q in zip(matrices.items(), ps, sums):
            torch.mm(p, q.T, out=m)
            # The next step starts from this Q. Normalized columns span the same, and the next P
            # of tiny gradients does not underflow.
            q = normalize(q, dim=0)
            compressor.shared[name] = torch.where(q.isfinite().all(), q, compressor.shared[name])

    return Compressor(exchange, error_feedback)


def first_q(seed: int, name: str, n_columns: int, rank: int) -> Tensor:
    """(n_columns, rank)"""
    # The word "powersgd" makes it independent of the initial weights, also keyed by name.
    key = hashlib.sha256(f"{seed}:powersgd:{name}".encode()).digest()[:4]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return torch.randn(n_columns, rank, generator=generator)


def orthonormal(p: Tensor) -> Tensor:
    """(a, r) -> an orthonormal basis of its columns, (a, r)."""
    # QR exists in float32 and float64 alone.
    wide = p.to(torch.promote_types(p.dtype, torch.float32))
    return torch.linalg.qr(wide).Q.to(p.dtype)


def fp16(error_feedback: bool = True) -> Compressor:
    """Rounds to 11 significant bits: fewer below 6e-5, zero below 3e-8, inf above 65504."""
    return Compressor(cast_exchange(torch.float16), error_feedback)


def bf16(error_feedback: bool = True) -> Compressor:
    """Rounds to 8 significant bits, with float32's range."""
    return Compressor(cast_exchange(torch.bfloat16), error_feedback)


def cast_exchange(dtype: torch.dtype):
    """The exchange in which everything is summed in this dtype."""

    def exchange(compressor: Compressor, bucket: Bucket, group: dist.ProcessGroup):
        # The bucket as a whole: one cast there, one back.
        rounded = bucket.flat.to(dtype)
        for name, x, sent in zip(bucket.names, bucket.views, split_like(rounded, bucket.views)):
            compressor.keep(name, x, sent)
        yield start_all_reduce(rounded, bucket, group)
        bucket.flat.copy_(rounded)

    return exchange


def start_sum(tensors: list[Tensor], bucket: Bucket, group: dist.ProcessGroup):
    """Starts one all-reduce of all these tensors.

    Returns what has a wait(), and the tensors that hold the sums after it.
    """
    flat = torch.cat([x.flatten() for x in tensors])
    return start_all_reduce(flat, bucket, group), split_like(flat, tensors)


def start_all_reduce(flat: Tensor, bucket: Bucket, group: dist.ProcessGroup) -> dist.Work:
    """Starts the sum of `flat` over the group, in place, and counts its bytes."""
    n = dist.get_world_size(group)
    bucket.sent_bytes += 2 * (n - 1) * flat.nbytes // n
    return dist.all_reduce(flat, group=group, async_op=True)


def columns(x: Tensor) -> Tensor:
    """x as a matrix: the first dimension counts its rows, and a vector is one column."""
    return x.view(x.shape[0], -1) if x.ndim > 1 else x.view(-1, 1)


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
