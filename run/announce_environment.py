"""Commit, versions, hardware and data of a run."""

import importlib.metadata
import os
import platform
import subprocess


def environment(device, ranks: int, data_sha256: str) -> dict:
    """What one must know to run this again: commit, versions, hardware, data. `device` is a
    torch.device."""
    import torch

    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    # A hook's, of elsewhere
    env = {name: x for name, x in os.environ.items() if not name.startswith("GIT_")}
    commit = ""
    try:
        prefix, found = (
            subprocess.run(git + words, capture_output=True, text=True, timeout=10, env=env).stdout
            for words in (["rev-parse", "--show-prefix"], ["describe", "--always", "--dirty"])
        )
        # A copy in a folder of another repository has none
        commit = "" if prefix.strip() else found.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    gpu = device.type == "cuda"
    cpu = f"{platform.machine()} CPU with {torch.get_num_threads()} thread(s)"
    versions = {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "cuda": str(torch.version.cuda).lower(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else "none",
    }
    return (
        {"commit": commit or "unknown"}
        | versions
        | {
            "platform": platform.platform(),
            "hardware": torch.cuda.get_device_name(device) if gpu else cpu,
            "devices": torch.cuda.device_count() if gpu else 0,
            "cores": os.cpu_count(),
            "ranks": ranks,
            "data_sha256": data_sha256,
        }
    )
