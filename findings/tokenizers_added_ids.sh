#!/usr/bin/env bash
# tokenizers: a tokenizer.json whose special token has an id beyond the vocabulary's size, as cl100k_base's has.
# Packages: tokenizers==0.23.3. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" tokenizers==0.23.3
cat > "$folder/try.py" <<'PY'
"""The `id` that a file gives an added token is not read: the package counts on from the vocabulary's size.

Seen: a file says <|endoftext|> is 9, the loaded tokenizer says 2 and writes 2 into the file it saves."""
import json

from tokenizers import Tokenizer

flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
spec = {
    "version": "1.0",
    "added_tokens": [dict(id=9, content="<|endoftext|>", **flags)],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
}
tokenizer = Tokenizer.from_str(json.dumps(spec))
found = tokenizer.token_to_id("<|endoftext|>")
saved = json.loads(tokenizer.to_str())["added_tokens"][0]["id"]
print("the file says 9, the tokenizer", found, "and saves", saved)
assert (found, saved) == (2, 2)
PY
PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
