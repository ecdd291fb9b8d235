#!/usr/bin/env bash
# Products of ever new numbers of rows on a CPU: bfloat16 torch.mm, and float32 as compiled code multiplies.
# Packages: torch==2.13.0 numpy. Seen on a CPU with AVX-512 (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""oneDNN makes a kernel for each number of rows that it has not seen, and keeps it: 300 products of (rows, 512) by
(512, 512).

Seen in bfloat16: 1.11 ms a product and nothing kept for 1024 rows each time; 1.42 ms and 113 MB for 900 to 1150 rows
by chance (170 numbers of rows, 0.66 MB each); 1.16 ms and 2 MB for these rounded up to 64. In float32 by
mkldnn::_linear_pointwise, which torch.compile emits: 2.19 ms, 0 MB; 2.59 ms, 101 MB; 2.32 ms, 7 MB. Eager float32
keeps nothing. A mixture of experts has such numbers of rows in every step."""
import os
import random
import time

import torch

torch.set_num_threads(1)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(product, x, w, rows):
    product(x[:1024], w)
    before = resident()
    began = time.perf_counter()
    for n in rows:
        product(x[:n], w)
    return 1000 * (time.perf_counter() - began) / len(rows), resident() - before


def compiled(x, w):
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


draw = random.Random(0)
by_chance = [draw.randint(900, 1150) for _ in range(300)]
jobs = {
    "1024 rows each time": [1024] * 300,
    "by chance, up to 64": [-(-n // 64) * 64 for n in by_chance],
    "900 to 1150 by chance": by_chance,
}
for dtype, product in (torch.bfloat16, lambda x, w: torch.mm(x, w.t())), (torch.float32, compiled):
    x = torch.randn(1216, 512).to(dtype)
    w = torch.randn(512, 512).to(dtype)
    grown = []
    for name, rows in jobs.items():
        ms, megabytes = measure(product, x, w, rows)
        grown.append(megabytes)
        print(f"{dtype}, {name:22} {ms:.2f} ms a product, {megabytes:+.1f} MB")
    assert grown[2] > 30 and max(grown[:2]) < 15
PY
OMP_NUM_THREADS=1 PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
