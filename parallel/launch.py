"""Processes that torchrun started become one run: they find each other, and end together.

On GPUs (NCCL; read in torch's sources, not run yet). One process makes no group at all, so a single
GPU never meets NCCL. init_process_group gets no `device_id`: with one, each new group splits the
communicator of all ranks (ncclCommSplit), for which all of them must call, while in
parallel/mesh.py a group's members make it alone (pytorch pull request 129965). So communicators are
made at their first use, on the device of torch.cuda.set_device, which pick_device() has called;
objects and barriers travel through it too. A first message between two ranks of a larger group
would hang without a collective of the whole group before it (pull request 74701):
parallel/pipeline.py makes one. destroy_process_group() comes after a sum that all ranks have read.

Example:
    import torch
    from parallel import launch

    device = launch.pick_device("cpu")
    made_group = launch.start(device)  # under torchrun: joins the others, True
    rank, world = launch.launched()
    print(f"rank {rank} of {world} on {device}")
    assert (made_group, rank, world) == (False, 0, 1)
    launch.end()
"""

import contextlib
import inspect
import json
import os
import signal
import sys
import threading
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

WATCHER = "stops with torchrun"  # a thread's name


def start(device: torch.device, minutes: float = 10) -> bool:
    """Joins the processes that torchrun started; gloo on a CPU, NCCL on GPUs.

    Returns True if this call made the process group, so that the caller should destroy it. A
    collective that waits longer than `minutes` ends the run, and so does the death of torchrun.
    Raises ValueError for an environment that describes no rank.
    """
    # A torchrun killed by SIGKILL leaves its processes behind, so a thread watches for that. A
    # second call of start() needs no second thread.
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    is_watched = any(thread.name == WATCHER for thread in threading.enumerate())
    if under_torchrun and not is_watched:
        torchrun = os.getppid()
        threading.Thread(target=stop_with, args=(torchrun,), name=WATCHER, daemon=True).start()

    if dist.is_initialized():
        return False
    rank, world = launched()
    if world == 1:
        return False

    timeout = timedelta(minutes=minutes)
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives a restart, so each start gets its own names in it.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
        store = dist.PrefixStore(same_start(store, rank, world), store)
    dist.init_process_group(
        backend_of(device), store=store, rank=rank, world_size=world, timeout=timeout
    )
    return True


def backend_of(device: torch.device) -> str:
    """What moves this device's tensors between processes: NCCL takes those of GPUs alone."""
    return "nccl" if device.type == "cuda" else "gloo"


def launched() -> tuple[int, int]:
    """This process's rank and the number of ranks, from torchrun's environment; (0, 1) without it.

    Raises ValueError where only some of its variables are set, or where their values are
    impossible: this process would wait for the others in vain.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name, "") for name in names}
    if given["WORLD_SIZE"] in ("", "1"):
        return 0, 1

    def number(name: str) -> int:
        return int(given[name]) if given[name].isdecimal() else -1

    rank, world, port = number("RANK"), number("WORLD_SIZE"), number("MASTER_PORT")
    if not (given["MASTER_ADDR"] and 0 <= rank < world and 0 < port < 65536):
        found = ", ".join(f"{name}={value or '(not set)'}" for name, value in given.items())
        raise ValueError(
            f"the environment says {found}, which is no place among several processes; start "
            "with torchrun, or type: unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT"
        )
    return rank, world


def same_start(store: dist.Store, rank: int, world: int) -> str:
    """A name that all ranks of this start share, and that no earlier start has used.

    torchrun keeps one store over its restarts, so the store still holds the addresses of dead
    ranks. A rank that reads such an address before its new owner has written it connects to
    nobody, or waits. So rank 0 makes up a name, and nobody uses it before all ranks have it:

        start         the name              rank 0 writes it, and removes it when all have come
        NAME/r        "here"                rank r writes, read only when a rank is missing
        NAME/count    how many have come    rank r adds one
        NAME/all      "here"                the last one to come writes, rank 0 waits
        NAME/go       the name to use       rank 0 writes, the others wait

    Where a start died before all had come, its name is still there, and a rank may find it before
    rank 0 has written the new one. So rank 0 leaves the new name as the old one's answer.
    On any number of ranks each sends a handful of messages: rank 0 reads a count, and no ranks.

    Raises DistStoreError after the store's timeout; rank 0's says who is missing.
    """
    if rank > 0:
        start = None
        answer = store.get("start").decode()  # waits
        while answer != start:
            start = answer
            store.set(f"{start}/{rank}", "here")
            if store.add(f"{start}/count", 1) == world - 1:
                store.set(f"{start}/all", "here")
            answer = store.get(f"{start}/go").decode()  # waits
        return start

    start = uuid.uuid4().hex
    dead = store.get("start").decode() if store.check(["start"]) else None
    # In this order: whoever reads `start` from now on needs no answer under the dead name.
    store.set("start", start)
    if dead is not None:
        store.set(f"{dead}/go", start)
    try:
        store.wait([f"{start}/all"])
    except dist.DistStoreError:
        missing = [r for r in range(1, world) if not store.check([f"{start}/{r}"])]
        raise dist.DistStoreError(f"timed out, {still_missing(missing)}") from None
    # Gone before anybody goes on: the next start's ranks must not find it with its answer.
    store.delete_key("start")
    store.set(f"{start}/go", start)
    return start


def still_missing(ranks: list[int]) -> str:
    """The ranks that have not come, for people."""
    shown = " ".join(str(rank) for rank in ranks[:8])
    if len(ranks) > 8:
        shown += f" ... ({len(ranks)})"
    return f"still missing: rank{'s' if len(ranks) > 1 else ''} {shown}"


def stop_with(launcher: int, every: float = 1, patience: float = 60) -> None:
    """Waits until the process `launcher` is no longer this process's parent, then ends this one.

    Whoever kills torchrun wants the run to stop, and the same command started again would find the
    run's folder in use. every: seconds between two checks; patience: seconds to save a checkpoint.

    On one machine the process sends itself SIGTERM, and the run saves a checkpoint. Where torchrun
    runs on other machines too, the process ends without one: a run that stops with status 0 counts
    as finished there, while a run that lost a machine resumes from its last checkpoint.
    """
    # Linux could signal a parent's death, but it means the thread that started us. On Windows a
    # parent's number never changes, and this loop never ends.
    while os.getppid() == launcher:
        time.sleep(every)
    with contextlib.suppress(OSError):  # nobody may be reading
        who = f"rank {os.environ.get('RANK', 0)}"
        print(f"{who}: torchrun is gone, so this rank stops", file=sys.stderr)
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience)
    os._exit(1)


def tell_torchrun(sentence: str) -> None:
    """Lets torchrun's last lines say why this process is about to end; without torchrun, nothing.

    torchrun prints some thirty lines when a process fails. They end with what the process that
    failed first has left in its error file, or else with advice about such files.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # Whole seconds decide who was first. Another rank that ends because of this one must be later.
    extra = {"py_callstack": sentence, "timestamp": str(int(time.time()) - 1)}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": sentence, "extraInfo": extra}}, file)


def end() -> None:
    """Ends one of several processes with status 0; returns where there is only one.

    The work is done. The interpreter's own teardown would abort where gloo's threads still run.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) <= 1:
        return
    # os._exit writes nothing that is still in a buffer.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody may be reading
            stream.flush()
    os._exit(0)


def pick_device(name: str) -> torch.device:
    """`auto`, or a device by its name; on GPUs each process of a machine gets its own.

    Raises ValueError for a device that this machine lacks.
    """
    if name == "auto":
        name = best_device()
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("known are cuda, mps and cpu")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        if device.type == "cuda":
            index = int(os.environ.get("LOCAL_RANK", device.index or 0))
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        # A device that torch knows may still be broken: only using it tells.
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device={name} is not available here ({reason}); try --device=cpu"
        ) from None
    return device


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
