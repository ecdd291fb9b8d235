import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules under test
sys.path.insert(0, str(Path(__file__).parent))  # harness

import pytest
import torch

torch.set_num_threads(1)  # a forked child hangs in OpenMP if its parent ever used more


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes((Path(__file__).parent.parent / "model.py").read_bytes())
    return str(path)
