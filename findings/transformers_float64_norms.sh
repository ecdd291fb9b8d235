#!/usr/bin/env bash
# transformers: a model in float64. Its RMSNorm and its rotary angles are computed in float32.
# Packages: transformers==5.24.0 torch==2.13.0. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" transformers==5.24.0 torch==2.13.0 numpy
cat > "$folder/try.py" <<'PY'
"""Guess, before it was run: `model.double()` of Llama gives a norm that is float32's, about 1e-7 off.

Seen: the norm's output has the dtype float64 and the digits of float32, and an input that is 1e-9
larger in one place gives the same output: a gradient by differences is 0 there. GPT-2's LayerNorm
is exact."""
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
norm = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).double().model.norm
x = torch.randn(1, 32, dtype=torch.float64)
y = norm(x)
plain = x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
off = float((y - plain).abs().max())
moved = x.clone()
moved[0, 0] += 1e-9
same = torch.equal(norm(moved), y)
words = dict(vocab_size=64, bos_token_id=None, eos_token_id=None)
gpt2 = GPT2LMHeadModel(GPT2Config(**words, n_embd=32, n_layer=1, n_head=2)).double()
layer_norm = gpt2.transformer.ln_f(x)
centred = x - x.mean(-1, keepdim=True)
exact = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
print(f"{y.dtype}: RMSNorm is {off:.1e} off, the same for a moved input: {same}")
print(f"LayerNorm is {float((layer_norm - exact).abs().max()):.1e} off")
assert y.dtype == torch.float64 and 1e-9 < off < 1e-6 and same
assert (layer_norm - exact).abs().max() < 1e-14
PY
PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
