import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules under test
sys.path.insert(0, str(Path(__file__).parent))  # harness

# cuBLAS sums in one order if it may keep this workspace; it reads the variable at its start.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import layers.recompute

torch.set_num_threads(1)  # a forked child hangs in OpenMP if its parent ever used more


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="where the tests marked gpu have their tensors: cpu, cuda"
    )


# Here tiny models stand for large ones, whose norms and activations are computed again.
layers.recompute.LEAST = 0


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where a test marked `gpu` makes its tensors; every such test takes it.

    A GPU has a number, as its tensors say it: cuda:0.
    """
    chosen = torch.device(request.config.getoption("--device"))
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


@pytest.fixture
def deterministic(device):
    """For claims of equal bits: on a GPU attention's backward adds in any order unless told."""
    if device.type != "cuda":
        yield
        return
    # Warnings alone: some operations have no other way, and say so.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


FORKS = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: FORKS.append(None))


@pytest.fixture(autouse=True)
def no_fork(request):
    """Fails a test marked `gpu` that forks: on a GPU its child could not use CUDA."""
    before = len(FORKS)
    yield
    forks = len(FORKS) > before and request.node.get_closest_marker("gpu") is not None
    assert not forks, "this test is marked gpu, and forks: take one process, or the mark off"


@pytest.fixture(autouse=True)
def one_thread():
    """Fails the test that leaves torch with more threads, for a later test's child would hang."""
    yield
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert n_threads == 1, f"this test left torch with {n_threads} threads"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes((Path(__file__).parent.parent / "model.py").read_bytes())
    return str(path)
