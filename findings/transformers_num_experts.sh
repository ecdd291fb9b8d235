#!/usr/bin/env bash
# transformers: a Qwen3-MoE that version 5 has saved, loaded by version 4.
# Packages: transformers==5.24.0, transformers==4.57.6, torch==2.13.0. Seen on a CPU (x86-64, Linux),
# Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder/5" transformers==5.24.0 torch==2.13.0 numpy
python3 -m pip install -q --target "$folder/4" transformers==4.57.6 torch==2.13.0 numpy
cat > "$folder/save.py" <<'PY'
"""Guess, before it was run: config.json has num_experts=4, the name in Qwen's own files."""
import json
import sys

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1)
heads = dict(num_attention_heads=2, num_key_value_heads=2)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts)).save_pretrained(sys.argv[1])
config = json.load(open(f"{sys.argv[1]}/config.json"))
print({key: config.get(key) for key in ("num_experts", "num_local_experts")})
assert "num_experts" not in config and config["num_local_experts"] == 4
PY
cat > "$folder/load.py" <<'PY'
"""Guess, before it was run: 4 experts. Seen: 128, the default, so the router does not fit; a model
with 128 experts would load, and any other number is an error or a model with new weights."""
import sys

from transformers import AutoConfig, AutoModelForCausalLM

print("experts:", AutoConfig.from_pretrained(sys.argv[1]).num_experts)
assert AutoConfig.from_pretrained(sys.argv[1]).num_experts == 128
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except RuntimeError as error:
    print(error)
    assert "size mismatch" in str(error)
else:
    raise AssertionError("it was loaded")
PY
PYTHONPATH="$folder/5" python3 -W ignore "$folder/save.py" "$folder/model"
PYTHONPATH="$folder/4" python3 -W ignore "$folder/load.py" "$folder/model"
