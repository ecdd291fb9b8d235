import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules under test
sys.path.insert(0, str(Path(__file__).parent))  # harness

import pytest
import torch

torch.set_num_threads(1)  # a forked child hangs in OpenMP if its parent ever used more


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
