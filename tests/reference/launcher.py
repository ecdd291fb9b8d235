"""Runs scripts of one checkout, each rank in a fork of a process that has torch imported already.

    python launcher.py TREE        a request in JSON a line on stdin, an answer a line on stdout

    request   {"script": "train.py", "argv": [...], "ranks": 2, "folder": DIR, "name": NAME,
               "stop": null}
    answer    {"status": [0, 0], "cpu": "AVX2"}       cpu: what torch's kernels use of it

A start of Python with torch takes 4 s, a fork 0.4 s. After the fork the script runs as in `python
TREE/train.py`: as `__main__`, from its file, with TREE first on sys.path, in the folder DIR. What
rank R prints goes to DIR/NAME.rankR.out and .err. Several ranks find each other as under torchrun,
by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

stop: "TERM:PATH" or "KILL:PATH" sends rank 0 that signal when it opens a file whose path ends in
PATH: so a run is stopped at the same line each time, and nobody needs to know the line.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback

SECONDS = 240  # a command that takes longer is killed, and its status is -9


def main(tree: str) -> None:
    sys.path[0] = tree  # in place of the folder of this file
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nowhere, stream)
    import torch
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    cpu = torch.backends.cpu.get_cpu_capability()
    for line in requests:
        status = run(tree, json.loads(line))
        print(json.dumps({"status": status, "cpu": cpu}), file=answers, flush=True)


def run(tree: str, request: dict) -> list[int]:
    """The exit statuses of all ranks; minus the signal where one ended a rank."""
    port = free_port()
    pids = []
    for rank in range(request["ranks"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            child(tree, request, rank, port)
    status = {}
    end = time.monotonic() + SECONDS
    while len(status) < len(pids):
        for pid in pids:
            if pid in status:
                continue
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                status[pid] = os.waitstatus_to_exitcode(code)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [status[pid] for pid in pids]


def child(tree: str, request: dict, rank: int, port: int) -> None:
    """One rank, from the fork to its end."""
    prefix = os.path.join(request["folder"], f"{request['name']}.rank{rank}")
    for stream, ending in ((1, "out"), (2, "err")):
        file = os.open(f"{prefix}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(request["folder"])
    if request["ranks"] > 1:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        os.environ["WORLD_SIZE"] = str(request["ranks"])
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    if request["stop"] and rank == 0:
        stop_at(*request["stop"].split(":"))
    script = os.path.join(tree, request["script"])
    sys.argv = [script, *request["argv"]]
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def stop_at(name: str, path: str) -> None:
    """Sends this process SIG`name` when it opens a file whose path ends in `path`, once."""
    left = [getattr(signal, f"SIG{name}")]

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and left and str(arguments[0]).endswith(path):
            os.kill(os.getpid(), left.pop())

    sys.addaudithook(hook)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    main(sys.argv[1])
