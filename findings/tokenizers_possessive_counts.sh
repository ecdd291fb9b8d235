#!/usr/bin/env bash
# tokenizers: a Split by tiktoken's own pattern of cl100k_base, beside tiktoken with the same pattern and table.
# Packages: tokenizers==0.23.3 tiktoken==0.14.0. Seen on a CPU (x86-64, Linux), Python 3.11.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install -q --target "$folder" tokenizers==0.23.3 tiktoken==0.14.0
cat > "$folder/try.py" <<'PY'
"""Numbers are to be cut into threes. tiktoken's engine reads {1,3}+ as possessive, the other one as repeated.

Seen: tiktoken 123 456 7, tokenizers 1234567; with {1,3} both cut alike. Nothing warns."""
import tiktoken
from tokenizers import Regex, pre_tokenizers

text = "a 1234567"
for count in "{1,3}+", "{1,3}":
    pattern = r"\p{N}" + count + r"|[^\p{N}]+"
    # Every run of digits is a word of this table, so that ids show where the pattern cuts.
    words = [bytes([i]) for i in range(256)]
    for start in range(7):
        words += [b"1234567"[start:stop] for stop in range(start + 2, 8)]
    table = {word: i for i, word in enumerate(sorted(words, key=len))}
    encoding = tiktoken.Encoding("try", pat_str=pattern, mergeable_ranks=table, special_tokens={})
    theirs = [encoding.decode([i]) for i in encoding.encode(text)]
    theirs = [word for word in theirs if word.isdigit()]
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    found = [word for word, _ in split.pre_tokenize_str(text) if word.isdigit()]
    print(count, "tiktoken", *theirs, "| tokenizers", *found)
    assert theirs == ["123", "456", "7"]
    assert found == (["1234567"] if count == "{1,3}+" else theirs)
PY
PYTHONPATH="$folder" python3 -W ignore "$folder/try.py"
