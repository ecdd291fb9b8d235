"""The network under a run, axis by axis of the mesh: how fast it is, and which link is slow.

    torchrun --standalone --nproc_per_node=4 bench.py network [--tp=2] [--cp=1] [--pp=1]
                                             [--device=auto] [--sizes=1e5,1e8] [--quick]

On several machines the same words after the launch of docs/multinode.md. Give it the run's own tp,
cp and pp: an axis of neighbours may have a faster link than one that crosses machines. For a
message of S bytes that takes t seconds on N ranks:

    collective       what S is                              algorithm   bus bandwidth
    all-reduce       what each rank gives, and gets back    S/t         S/t x 2(N-1)/N
    all-gather       what each rank has in the end          S/t         S/t x (N-1)/N
    reduce-scatter   what each rank gives                   S/t         S/t x (N-1)/N
    point-to-point   what each rank sends to the next one   S/t         S/t
                     on a ring, while it receives as much

Bus bandwidth is what must leave each rank, per second, whatever the algorithm: compare it with the
link's data sheet, and between axes. (gloo's reduce-scatter sends what an all-reduce does, so it
looks half as fast.) The time of the smallest message, 4 bytes a rank, is the latency.

All groups of an axis work at the same time, as in training; t is a rank's median over some rounds
after one to warm up, and of the ranks the slowest one's. Then each two neighbours exchange a
message of the largest size, never two pairs with a rank in common at once:

    four ranks     0 - 1   2 - 3        then    1 - 2   3 - 0

so a bad cable shows as one slow pair, and a bad machine as a rank without any fast one.

Thakur, Rabenseifner, Gropp 2005, Optimization of Collective Communication Operations in MPICH.
"""

import functools
import re
import socket
import sys
import time
from statistics import median

import torch
import torch.distributed as dist

from parallel import launch
from parallel import mesh as meshes

FACTOR = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "point-to-point": lambda n: 1,
}
USAGE = (
    "torchrun --standalone --nproc_per_node=4 bench.py network [--tp=2] [--cp=1] [--pp=1] "
    "[--device=auto] [--sizes=1e5,1e8] [--quick]"
)


def exchange(out: torch.Tensor, to: int, into: torch.Tensor, source: int, group) -> None:
    """Sends `out` to one rank of the group and receives `into` from another, at the same time."""
    ops = [
        dist.P2POp(dist.isend, out, group=group, group_peer=to),
        dist.P2POp(dist.irecv, into, group=group, group_peer=source),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def collectives(group, x: torch.Tensor, y: torch.Tensor) -> dict:
    """Name -> the call that moves a message of x's size. x and y: of one shape, N divides their
    length."""
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # by their age
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    part = x[: len(x) // n].clone()
    return {
        "all-reduce": lambda: dist.all_reduce(x, group=group),
        "all-gather": lambda: gather(y, part, group=group),
        "reduce-scatter": lambda: scatter(part, x, group=group),
        "point-to-point": lambda: exchange(x, (rank + 1) % n, y, (rank - 1) % n, group),
    }


def seconds(work, mesh: meshes.Mesh, rounds: int, repeats: int) -> float:
    """Of one work() on this rank: the median over rounds that all ranks of the world begin
    together."""
    passed = []
    for _ in range(rounds + 1):
        mesh.agree(0)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        passed.append((time.perf_counter() - start) / repeats)
    return median(passed[1:])


def measure(
    mesh: meshes.Mesh, axis: str, sizes: list[int], rounds: int
) -> tuple[list[tuple], dict]:
    """[(collective, bytes, seconds)] and {(rank, rank): seconds} for each two neighbours.
    Collective.

    sizes: in bytes, each rounded up to whole numbers of float32, as many on every rank.
    """
    group, n, me, rows, pairs = mesh.groups[axis], mesh.sizes[axis], mesh.coords[axis], [], {}
    ranks = dist.get_process_group_ranks(group)
    for size in sorted({4 * n} | {-(-size // (4 * n)) * 4 * n for size in sizes}):
        x, y = (torch.zeros(size // 4, device=mesh.device) for _ in range(2))
        repeats = int(max(1, min(rounds, 1e7 // size)))
        for name, work in collectives(group, x, y).items():
            rows.append((name, size, seconds(work, mesh, rounds, repeats)))
    links = range(n if n > 2 else 1)  # the i-th: from the i-th rank of the axis to the next
    phase = {i: 2 if n % 2 and i == n - 1 else i % 2 for i in links}
    for now in range(max(phase.values()) + 1):
        mine = [(i, (i + 1) % n) for i in links if phase[i] == now and me in (i, (i + 1) % n)]
        work = [
            functools.partial(exchange, x, sum(pair) - me, y, sum(pair) - me, group)
            for pair in mine
        ]
        t = seconds(work[0] if work else lambda: None, mesh, rounds, repeats)
        pairs |= {(ranks[i], ranks[j]): t for i, j in mine}
    everybody: list = [None] * mesh.world
    dist.all_gather_object(everybody, (rows, pairs))
    rows = [
        (name, size, max(theirs[i][2] for theirs, _ in everybody))
        for i, (name, size, _) in enumerate(rows)
    ]
    slower: dict = {}  # of the two ends
    for pair, t in (item for _, theirs in everybody for item in theirs.items()):
        slower[pair] = max(t, slower.get(pair, 0.0))
    return rows, slower


def lines(axis: str, n: int, rows: list[tuple], pairs: dict, hosts: list[str]):
    """The table's lines for one axis, and what its links say."""
    for name, size, t in rows:
        rate = size / t / 1e9
        yield (
            f"{axis:4}{n:>6}  {name:15}{size:>12}{1e6 * t:>12.1f}{rate:>10.3g}"
            f"{rate * FACTOR[name](n):>10.3g}"
        )
    size, slowest = rows[-1][1], max(pairs, key=pairs.get)
    rate = {pair: size / t / 1e9 for pair, t in pairs.items()}
    a, b = slowest
    said = (
        f"{axis}: {len(pairs)} pairs of neighbours, {size} bytes each way, GB/s: median"
        f" {median(rate.values()):.3g}, slowest {rate[slowest]:.3g}: rank {a} ({hosts[a]}) - rank"
        f" {b} ({hosts[b]})"
    )
    if n > 2:
        best = {r: max(x for pair, x in rate.items() if r in pair) for pair in rate for r in pair}
        r = min(best, key=best.get)
        said += (
            f"; at their best: median rank {median(best.values()):.3g}, slowest {best[r]:.3g}: "
            f"rank {r} ({hosts[r]})"
        )
    yield said


def main(argv: list[str]) -> int:
    """What `python bench.py network ...` does with the words after `network`."""
    flags = {
        "--tp": "1",
        "--cp": "1",
        "--pp": "1",
        "--device": "auto",
        "--sizes": "",
        "--quick": "",
    }
    allowed = dict.fromkeys(("--tp", "--cp", "--pp"), "[1-9][0-9]*")
    size = "[1-9][0-9]*(e[0-9])?"
    allowed |= {"--device": "[a-z0-9:]+", "--sizes": f"{size}(,{size})*", "--quick": ""}
    given = dict(word.partition("=")[::2] for word in argv)
    wrong = [
        f"{k}={v}" for k, v in given.items() if k not in allowed or not re.fullmatch(allowed[k], v)
    ]
    made = False
    try:
        if wrong:
            raise ValueError(f"not understood: {' '.join(wrong)}; usage: {USAGE}")
        flags |= given
        sizes = [int(float(size)) for size in (flags["--sizes"] or "1e5,1e6,1e7,1e8").split(",")]
        if "--quick" in given and "--sizes" not in given:
            sizes = [10_000, 100_000]
        device = launch.pick_device(flags["--device"])
        made = launch.start(device)
        if not dist.is_initialized():
            raise ValueError(f"one process has no network; start it with {USAGE}")
        mesh = meshes.make_mesh(device, *(int(flags[f"--{axis}"]) for axis in ("tp", "cp", "pp")))
        hosts: list = [None] * mesh.world
        dist.all_gather_object(hosts, socket.gethostname())
        if mesh.rank == 0:
            print(
                f"{mesh.world} ranks on {len(set(hosts))} machine(s), {dist.get_backend()},"
                f" {device.type}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n"
            )
            print(
                "axis ranks  collective            bytes          us  alg GB/s  bus GB/s",
                flush=True,
            )
        said = []
        for axis in (axis for axis in meshes.AXES if mesh.groups[axis] is not None):
            rows, pairs = measure(mesh, axis, sizes, 3 if "--quick" in given else 7)
            *table, links = lines(axis, mesh.sizes[axis], rows, pairs, hosts)
            said.append(links)
            if mesh.rank == 0:
                print(*table, sep="\n", flush=True)
        if mesh.rank == 0:
            print("", *said, sep="\n", flush=True)
        mesh.agree(0)
    except ValueError as error:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"bench.py network: {error}", file=sys.stderr)
        return 2
    finally:
        if made:
            dist.destroy_process_group()
    return 0
