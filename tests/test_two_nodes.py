"""Two nodes: two torchrun agents on addresses of their own are one process, and every kind of
launch is documented."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest
from test_commands import place, understood  # noqa: F401
from test_train import ROOT, close, flags, go, rows
from torch.distributed.run import get_args_parser

DOCUMENT, SLURM = ROOT / "docs" / "multinode.md", ROOT / "configs" / "slurm.sh"
TEXT = str(ROOT / "model.py")
BLOCKS = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("torchrun")]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs 127.0.0.2, which Linux has by itself"
)
@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_two_agents_are_one_process(tmp_path, rendezvous):
    port, more = free_port(), ["--optim=adamw", "--precision=fp64", "--steps=6", "--dropout=0.1"]
    go(TEXT, tmp_path / "one", *more)
    agents = []
    for node, address in enumerate(("127.0.0.1", "127.0.0.2")):
        meet = {
            "c10d": ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=two"],
            "static": [f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"],
        }
        agents.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nnodes=2",
                    "--nproc_per_node=1",
                    *meet[rendezvous],
                    f"--local_addr={address}",
                    "train.py",
                    *flags(TEXT, tmp_path / "two", *more),
                ],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                text=True,
                encoding="utf-8",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        said = [agent.communicate(timeout=90)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # a test that failed leaves nothing running; the rest ended long ago
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum("layout     2 ranks: " in text for text in said) == 1  # rank 0 speaks, for both
    for kind in ("loss", "val_loss"):
        one, two = (rows(tmp_path / run, kind) for run in ("one", "two"))
        assert 6 in one
        close(two, one, 1e-10)


# ---- the documents' commands ---------------------------------------------------------------------
@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_launch_says_where_the_nodes_meet(command):
    """That its words are understood is tests/test_commands.py's."""
    launch = get_args_parser().parse_args(shlex.split(command)[1:])
    assert launch.rdzv_endpoint.endswith(":29500") or (
        launch.master_addr and launch.node_rank in (0, 1)
    )


def test_every_kind_of_launch_is_documented():
    text = " ".join(COMMANDS)
    for words in (
        "--nnodes=2",
        "--nnodes=1:2",
        "--max_restarts",
        "--rdzv_backend=c10d",
        "--node_rank=1",
        "bench.py network",
    ):
        assert words in text
    assert len(DOCUMENT.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.skipif(shutil.which("bash") is None, reason="runs a bash script")
def test_the_slurm_script_starts_torchrun_on_the_first_node(tmp_path, place):  # noqa: F811
    """SLURM is not needed: its commands are played by two lines each."""
    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
    for name, line in ("scontrol", "printf 'node7\\nnode8\\n'"), ("srun", "printf '%s\\n' \"$@\""):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "123000",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
    }
    job["PATH"] = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    run = subprocess.run(
        ["bash", SLURM, "--lr=0.5", "--out_dir=a folder"],
        env=os.environ | job,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    words = run.stdout.splitlines()
    understood(place, words[words.index("torchrun") :])
    assert {
        "--nnodes=2",
        "--nproc_per_node=8",
        "--rdzv_endpoint=node7:29500",
        "--rdzv_id=123000",
        "--lr=0.5",
        "--out_dir=a folder",
    } <= {*words}
    options = re.findall(r"^#SBATCH (--[a-z-]+)=", SLURM.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--time"} <= {*options}
