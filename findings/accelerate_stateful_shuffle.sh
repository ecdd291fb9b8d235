#!/usr/bin/env bash
# accelerate with use_stateful_dataloader=True: a shuffled DataLoader, saved and loaded in the middle of an epoch.
# Packages: accelerate==1.15.0 torchdata==0.11.0 torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" accelerate==1.15.0 torchdata==0.11.0 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""load_state brings back how many batches were read but not their order: the rest comes from another permutation.

The docs of torchdata's StatefulDataLoader, which then is behind it, speak of checkpoints in the middle
of an epoch, and need no sampler of one's own for shuffling. Seen, of 12 rows, 6 before the save: with
use_seedable_sampler the 6 others follow, without it (as by default) 3 come twice and 3 never. No error,
no warning."""
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader


def prepared(seedable: bool):
    torch.manual_seed(0)
    settings = DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=seedable)
    accelerator = Accelerator(cpu=True, dataloader_config=settings)
    return accelerator, accelerator.prepare(DataLoader(range(12), batch_size=3, shuffle=True))


found = {}
for seedable in True, False:
    with tempfile.TemporaryDirectory() as folder:
        accelerator, batches = prepared(seedable)
        before, rest = [], []
        for i, batch in enumerate(batches):
            (before if i < 2 else rest).extend(batch.tolist())
            if i == 1:
                accelerator.save_state(folder)
        accelerator.free_memory()
        accelerator, batches = prepared(seedable)
        accelerator.load_state(folder)
        resumed = [x for batch in batches for x in batch.tolist()]
    found[seedable] = sorted(set(before) & set(resumed))
    print(f"seedable {seedable}: {before}, then {rest}, resumed {resumed}; twice: {found[seedable]}")
    assert len(resumed) == 6 and (resumed == rest) == seedable
assert found[True] == [] and len(found[False]) == 3
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
