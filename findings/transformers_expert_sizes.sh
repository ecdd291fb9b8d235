#!/usr/bin/env bash
# transformers: models with experts, in float64, and of a width that 16 bytes do not divide.
# Packages: transformers==5.24.0 torch==2.13.0. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" transformers==5.24.0 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""Guess, before it was run: as Llama, a Qwen3-MoE runs in any dtype of floats and at any width.

Seen: the default way to multiply experts is torch's grouped_mm, also where it has no kernel: no
forward in float64, and none with experts of width 18 in float32. set_experts_implementation("eager")
runs both."""
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1)
heads = dict(num_attention_heads=2, num_key_value_heads=2)
ids = torch.arange(8)[None]


def forward(dtype: torch.dtype, width: int, kind: str | None = None) -> str:
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=width)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts)).to(dtype)
    if kind is not None:
        model.set_experts_implementation(kind)
    try:
        model(ids)
    except RuntimeError as error:
        return str(error)
    return "runs"


found = {}
for dtype, width in ((torch.float32, 16), (torch.float64, 16), (torch.float32, 18)):
    found[dtype, width] = forward(dtype, width)
    print(f"{dtype}, width {width}: {found[dtype, width]}")
    assert forward(dtype, width, "eager") == "runs"
assert found[torch.float32, 16] == "runs"
assert "got Double" in found[torch.float64, 16]
assert "multiple of 16 bytes" in found[torch.float32, 18]
PY
PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
