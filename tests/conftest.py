import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules under test
sys.path.insert(0, str(Path(__file__).parent))  # harness

import torch

torch.set_num_threads(1)  # a forked child hangs in OpenMP if its parent ever used more
