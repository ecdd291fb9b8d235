"""Processes that torchrun started become one run: they find each other, and end together."""

import contextlib
import os
import signal
import sys
import threading
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

LAUNCHER = "stops with torchrun"  # a thread's name


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

    torchrun keeps one store over its restarts, and there still lie the addresses of the dead: who
    reads one before its new owner has written it knocks at a closed door, or waits. So each rank
    leaves a name that it has just made up, rank 0 answers to any name it finds, until all have said
    that the answer reached them.
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
    Where torchrun runs on other machines too, it just ends: a run that stops well counts as
    finished there, and one that lost a machine goes on at its last checkpoint. (Linux could signal
    a parent's death, but means the thread that started us. On Windows a parent's number never
    changes, and nothing happens here.)
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
