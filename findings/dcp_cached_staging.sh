#!/usr/bin/env bash
# torch.distributed.checkpoint: async_save with FileSystemWriter(cache_staged_state_dict=True) where there is no accelerator.
# Packages: torch==2.13.0 numpy. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""The docstring of FileSystemWriter says of cache_staged_state_dict that it decreases staging latency and takes
memory; not that it needs an accelerator. Without the option async_save works on a CPU.

Seen: RuntimeError: Cannot access accelerator device when none is available. The buffers are pinned, whatever
there is to pin them for."""
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
seen = {}
with tempfile.TemporaryDirectory() as folder:
    for kept in False, True:
        writer = dcp.FileSystemWriter(f"{folder}/{kept}", cache_staged_state_dict=kept)
        try:
            dcp.async_save({"w": torch.ones(3)}, storage_writer=writer).result()
            seen[kept] = "saved"
        except RuntimeError as error:
            seen[kept] = str(error)
dist.destroy_process_group()
print(seen)
assert seen == {False: "saved", True: "Cannot access accelerator device when none is available."}
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
