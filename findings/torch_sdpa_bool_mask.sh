#!/usr/bin/env bash
# torch: one bool mask for the attention of several layers, and what is kept of it for backward.
# Packages: torch==2.13.0. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""Guess, before it was run: a mask that all layers share is kept once for backward, a bool one in a
byte for each query and key.

Seen: scaled_dot_product_attention makes floats of a bool mask in each call, and keeps each of them:
four layers hold 16 times the bytes of the mask. A float mask, made once, is kept once."""
import torch
from torch.nn.functional import scaled_dot_product_attention

LAYERS = 4
q, k, v = (torch.randn(2, 4, 256, 32, requires_grad=True) for _ in range(3))
is_seen = torch.ones(2, 1, 256, 256, dtype=torch.bool).tril()
added = torch.zeros(is_seen.shape).masked_fill_(~is_seen, -torch.inf)


def kept(mask: torch.Tensor) -> int:
    """Bytes of masks that the calls keep."""
    masks = {}  # where it lies -> bytes

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] == (256, 256):
            storage = x.untyped_storage()
            masks[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        graphs = [scaled_dot_product_attention(q, k, v, attn_mask=mask) for _ in range(LAYERS)]
    return sum(masks.values()) if graphs else 0


print(f"bool mask: {is_seen.nbytes} bytes, kept: {kept(is_seen)}")
print(f"float mask: {added.nbytes} bytes, kept: {kept(added)}")
assert kept(is_seen) == LAYERS * added.nbytes == 16 * is_seen.nbytes
assert kept(added) == added.nbytes
PY
PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
