#!/usr/bin/env bash
# transformers: position ids that begin anew in each packed document.
# Packages: transformers==5.24.0 torch==2.13.0. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" transformers==5.24.0 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""Guess, before it was run: position ids that begin anew keep packed documents apart in training,
and are ignored by the mask while a cache is in use.

Seen: they keep them apart only in a call that says use_cache=False and passes no attention mask. A
model fresh from its config has use_cache on, in training too: there, and with a mask of ones, the
second document sees the first, and nothing is said. The positions themselves begin anew either way.
The same with transformers 4.57.6, and with sdpa in place of eager."""
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).train()
ids = torch.randint(1, 64, (1, 12))
position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])  # of 5 and of 7 tokens
ones = torch.ones_like(ids)
cases = {
    "by default": {},
    "without a cache": dict(use_cache=False),
    "without a cache, a mask of ones": dict(use_cache=False, attention_mask=ones),
    "a mask of ones": dict(attention_mask=ones),
}
apart = {}
with torch.no_grad():
    alone = model(ids[:, 5:], use_cache=False).logits
    for name, words in cases.items():
        logits = model(ids, position_ids=position_ids, **words).logits[:, 5:]
        apart[name] = float((logits - alone).abs().max())
        print(f"{name}: {apart[name]:.0e} from the second document alone")
assert [name for name, distance in apart.items() if distance < 1e-5] == ["without a cache"]
assert min(distance for name, distance in apart.items() if name != "without a cache") > 0.01
PY
PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
