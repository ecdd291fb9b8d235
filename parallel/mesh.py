"""Who stands where: the ranks of a run as one 4-D grid (pp, dp, cp, tp), always all four, most of
them of size 1.

    rank = ((pp_i * dp + dp_i) * cp + cp_i) * tp + tp_i        tp innermost: neighbours share the
                                                               fastest link

    pp  pipeline stages: layers are split          dp  data parallel: sequences are split
    cp  context parallel: each sequence is split   tp  tensor parallel: each matrix is split

A group holds the ranks that differ from me in one coordinate alone; `replicas` those that differ in
dp or cp, which hold the same weights and sum their gradients. A group of size 1 is None, and a
collective over None is the identity: one process runs the same lines as a thousand.
"""

import contextlib
import hashlib
import inspect
import math
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

AXES = ("pp", "dp", "cp", "tp")
LAUNCHER = "stops with torchrun"  # a thread's name


@dataclass(frozen=True)
class Mesh:
    sizes: dict[str, int]  # {"pp": 1, "dp": 4, "cp": 1, "tp": 1}
    coords: dict[str, int]  # my place on each axis
    # Pp, dp, cp, tp, replicas; None where the size is 1
    groups: dict[str, dist.ProcessGroup | None]
    rank: int
    world: int
    device: torch.device  # where small tensors must lie to be sent

    def sum(self, *values: float) -> list[float]:
        """Numbers added over all ranks, in float64."""
        if self.world == 1:
            return [float(v) for v in values]
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.tolist()

    def agree(self, value: int) -> int:
        """Rank 0's value on every rank; also a barrier."""
        return int(self.sum(value if self.rank == 0 else 0)[0])

    def alike(self, text: str) -> bool:
        """Do all ranks have the same text? All learn it."""
        mine = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
        return self.sum(self.agree(mine) != mine) == [0.0]

    def norm(self, tensors: list[torch.Tensor], everywhere: bool = True) -> torch.Tensor:
        """The 2-norm of the tensors of all ranks (or only of mine) together, 0-dim; the same on all
        of them.

        What several ranks hold, one of them may bring.
        """
        norm = torch.nn.utils.get_total_norm(tensors)
        if everywhere and self.world > 1:
            squares = norm.to(self.device, torch.float64).square()
            dist.all_reduce(squares)
            norm = squares.sqrt().to(tensors[0].device if tensors else self.device)
        return norm

    def table(self) -> list[str]:
        """The grid in lines for people; [] for one process."""
        what = dict(
            pp="stages of layers",
            dp="sequences",
            cp="parts of each sequence",
            tp="parts of each matrix",
        )
        lines, stride = [], self.world
        for axis, size in self.sizes.items():
            stride //= size
            first = " ".join(str(i * stride) for i in range(min(size, 8))) + " ..." * (size > 8)
            lines += [f"{axis}  {size:>4} {what[axis]:22} ranks {first}"] if size > 1 else []
        return ["mesh: the ranks along each axis, beginning at rank 0", *lines] if lines else []

    def first_on_each_machine(self, work):
        """work() by one process of each machine, then by the others: the first one fills the
        caches."""
        first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        result = work() if first else None
        self.agree(0)
        return result if first else work()


def make_mesh(device: torch.device, tp: int = 1, cp: int = 1, pp: int = 1) -> Mesh:
    """The grid over the existing process group (or over this one process); dp takes what the others
    leave.

    Collective: all ranks make all groups in the same order. Raises ValueError if the sizes do not
    divide the world.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world % (tp * cp * pp):
        raise ValueError(
            f"tp*cp*pp = {tp * cp * pp} does not divide the {world} processes; start with "
            f"torchrun --nproc_per_node={tp * cp * pp} or a multiple of it"
        )
    sizes = dict(pp=pp, dp=world // (tp * cp * pp), cp=cp, tp=tp)
    grid = torch.arange(world).view(*sizes.values())
    coords = dict(zip(AXES, (int(i) for i in (grid == rank).nonzero()[0])))
    groups, made = {}, {}
    for name, dims in dict(pp=[0], dp=[1], cp=[2], tp=[3], replicas=[1, 2]).items():
        size = math.prod(grid.shape[dim] for dim in dims)
        for members in grid.movedim(dims, list(range(-len(dims), 0))).reshape(-1, size).tolist():
            if size > 1 and tuple(members) not in made:
                made[tuple(members)] = new_group(members, device, everybody=True)
            if rank in members:
                groups[name] = made.get(tuple(members))
    return Mesh(sizes, coords, groups, rank, world, device)


def new_group(ranks: list[int], device: torch.device, everybody: bool = False) -> dist.ProcessGroup:
    """A group of these ranks, made by them alone or by `everybody`, that waits no longer than the
    world does: torch's default for a group is half an hour."""
    options = getattr(dist.group.WORLD._get_backend(device), "options", None)
    patience = getattr(options, "_timeout", None)
    return dist.new_group(ranks, timeout=patience, use_local_synchronization=not everybody)


def allocate(module: nn.Module, device: torch.device, keep=lambda p: True) -> nn.Module:
    """Real, uninitialised memory for every parameter on the meta device for which `keep` holds.

    Unlike `Module.to_empty`, a tied parameter stays one parameter.
    """
    made = {}
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False, remove_duplicate=False):
            if p.is_meta and keep(p):
                if p not in made:
                    # _like imports a compiler
                    empty = torch.empty(p.shape, dtype=p.dtype, device=device)
                    made[p] = nn.Parameter(empty, p.requires_grad)
                setattr(part, name, made[p])
    return module


def mapped_file(path: Path, numbers: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor whose memory is the file `path`. Its room on the disk is taken now: where there
    is none, OSError, not a bus error in the middle of a step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = numbers * dtype.itemsize
    try:
        with open(path, "wb") as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(
            f"{path.parent} has no room for offloaded weights: one more file needs {size:,} bytes, "
            f"{shutil.disk_usage(path.parent).free:,} are free ({error.strerror})"
        ) from error
    return torch.from_file(str(path), shared=True, size=numbers, dtype=dtype)


def start(device: torch.device, minutes: float = 10) -> bool:
    """Joins the processes torchrun started; True if this call made the process group (and should
    destroy it).

    gloo on a CPU, NCCL on GPUs. A collective that waits longer than `minutes` ends the run, and so
    does the death of torchrun.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not any(
        t.name == LAUNCHER for t in threading.enumerate()
    ):
        threading.Thread(target=stop_with, args=(os.getppid(),), name=LAUNCHER, daemon=True).start()
    if dist.is_initialized():
        return False
    rank, world = launched()
    if world == 1:
        return False
    backend, store = "nccl" if device.type == "cuda" else "gloo", None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(minutes=minutes),
        )
        store = dist.PrefixStore(same_start(store, rank, world), store)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=minutes)
    )
    return True


def launched() -> tuple[int, int]:
    """Rank and world as torchrun says them in the environment; (0, 1) without. Raises ValueError
    where only some of its variables are set, or set to what cannot be: the others would be waited
    for in vain.
    """
    given = {
        name: os.environ.get(name, "")
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    if given["WORLD_SIZE"] in ("", "1"):
        return 0, 1
    said = ", ".join(f"{name}={value or '(not set)'}" for name, value in given.items())
    numbers = (given[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    rank, world, port = (int(number) if number.isdecimal() else -1 for number in numbers)
    if not (given["MASTER_ADDR"] and 0 <= rank < world and 0 < port < 65536):
        raise ValueError(
            f"the environment says {said}, which is no place among several processes; start "
            "with torchrun, or type: unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT"
        )
    return rank, world


def same_start(store: dist.Store, rank: int, world: int) -> str:
    """A name that all ranks of this start share with no earlier one.

    torchrun keeps one store over its restarts, and there still lie the addresses of the dead: who reads one
    before its new owner has written it knocks at a closed door, or waits. So each rank leaves a
    name that it has just made up, rank 0 answers to any name it finds, until all have said that the
    answer reached them.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"here/{rank}", mine)
        start = store.get(f"answer/{mine}").decode()  # waits
        store.set(f"{start}/{rank}", "heard")
        return start
    others, end = range(1, world), time.monotonic() + store.timeout.total_seconds()
    while not store.check([f"{mine}/{r}" for r in others]):
        if time.monotonic() > end:
            raise dist.DistStoreError("timed out before every rank had come")
        for r in filter(lambda r: store.check([f"here/{r}"]), others):
            store.set(f"answer/{store.get(f'here/{r}').decode()}", mine)
        time.sleep(0.02)
    return mine


def stop_with(launcher: int, every: float = 1, patience: float = 60) -> None:
    """Waits until the process `launcher` is no longer this one's parent, then ends this one: who
    killed
    torchrun wants the run to stop, and the same command started again would find the folder in use.

    It sends itself SIGTERM, upon which a run saves a checkpoint, and grants it `patience` seconds.
    Where
    torchrun runs on other machines too, it just ends: a run that stops well counts as finished there, and one
    that lost a machine goes on at its last checkpoint. (Linux could signal a parent's death, but
    means the thread that started us. On Windows a parent's number never changes, and nothing
    happens here.)
    """
    while os.getppid() == launcher:
        time.sleep(every)
    with contextlib.suppress(OSError):  # nobody may be reading
        print(
            f"rank {os.environ.get('RANK', 0)}: torchrun is gone, so this rank stops",
            file=sys.stderr,
        )
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience)
    os._exit(1)


def end() -> None:
    """Ends one of several processes with status 0, all being done, without the interpreter's
    teardown: there gloo's threads, where some still are, would abort it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody may be reading
                stream.flush()
        os._exit(0)


def pick_device(name: str) -> torch.device:
    """`auto`, or a device by its name; on GPUs each process of a machine gets its own.

    Raises ValueError for a device this machine lacks.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("known are cuda, mps and cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device={name} is not to be had here ({reason}); try --device=cpu"
        ) from None
    return device


def refuse_coupled(cls: type[torch.optim.Optimizer], groups: list[dict], arguments: dict) -> None:
    """Raises ValueError for a method whose step of one parameter depends on the others (Prodigy,
    LBFGS): where they are dealt out to ranks or stepped one after the other it would silently be
    another method.

    Tried, not asked: a matrix alone and beside another one, in float64, with the options of the
    first group. What cannot be tried here (options for a GPU, say) passes.
    """
    why = (
        f"{cls.__name__} looks at all parameters together, and here they are stepped apart; take a"
        " layout in which one optimizer has them all (--data_parallel=ddp), or another optimizer"
    )
    closure = inspect.signature(cls.step).parameters.get("closure")
    # LBFGS: called again and again
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(why)
    options = {
        k: v for k, v in groups[0].items() if k not in ("params", "names", "param_names", "kind")
    }
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 2, 2, generator=generator, dtype=torch.double)
    noise = torch.randn(20, 2, 2, 2, generator=generator, dtype=torch.double)

    def moved(n: int, turn: int) -> torch.Tensor:
        """By how much 20 steps move the first of n matrices; the second one's gradient turns, or
        not."""
        params = [nn.Parameter(w.clone()) for w in weights[:n]]
        optimizer = cls([{**options, "params": params}], **arguments)
        getattr(optimizer, "train", lambda: None)()
        for step in range(20):
            torch.manual_seed(step)  # a method that draws noise draws the same for the first matrix
            for p, g, scale in zip(params, noise[step], (1, 100 * turn**step)):
                p.grad = scale * (1 + g / 10)
            optimizer.step()
        return params[0].detach() - weights[0]

    with torch.random.fork_rng(devices=[]):
        try:
            alone, *beside = moved(1, 1), moved(2, 1), moved(2, -1)
        except Exception:
            return
    if max((alone - x).abs().max() for x in beside) > 1e-6 * alone.abs().max():
        raise ValueError(why)
