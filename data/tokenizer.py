"""Text <-> token ids: bytes, which need nothing, an encoding of tiktoken, or a tokenizer.json."""

import difflib
import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.tokenizer_json import FILE, TokenizerFile

COPY = "tokenizer"  # the folder, in a run's folder, of its tokenizer.json


class Tokenizer:
    """Encodes and decodes by one of four kinds of vocabulary.

    name: `bytes` (each byte of UTF-8 is a token), the name of a tiktoken encoding, a tokenizer.json
    or its folder (data/tokenizer_json.py), or `ids` (text made of numbers, for shards whose
    tokenizer nobody knows). n_vocab: of `ids`; the others know theirs. Raises ValueError for
    another name, for tables that cannot be downloaded, and for a file that is no tokenizer.
    """

    def __init__(self, name: str, n_vocab: int = 2**16):
        self.name = name
        self.n_vocab = n_vocab
        self.encoding = None  # of tiktoken
        self.file = None  # a tokenizer.json
        self.special = {}  # name of a special token -> its id
        self.end_of_text = None  # the id that separates documents
        self.end = "<|endoftext|>"  # what a user is told of it
        self.start = []  # ids that go before each document
        self.warnings = []
        self.may_be_cut = True  # long texts are encoded in pieces
        if name == "bytes":
            self.n_vocab = 256
            self.end_of_text = 0
            self.end = "the byte 0"
        elif is_file(name):
            self.file = TokenizerFile(name)
            self.n_vocab = self.file.n_vocab
            self.special = self.file.special
            self.end_of_text = self.file.end_of_text
            self.end = self.file.end
            self.start = self.file.start
            self.warnings = self.file.warnings
            self.may_be_cut = self.file.may_be_cut
        elif name != "ids":
            self.encoding = _tiktoken(name)
            self.n_vocab = self.encoding.n_vocab
            for special in self.encoding.special_tokens_set:
                self.special[special] = self.encoding.encode_single_token(special)
            self.end_of_text = self.special.get("<|endoftext|>")

    @property
    def document_token(self) -> int | None:
        """The id with which each document begins but the first of a text; None where none does.

        It is the first of `start`, or else the end of the document before.
        """
        return self.start[0] if self.start else self.end_of_text

    def prompt(self, text: str, document_token: int | None) -> tuple[list[int], int]:
        """(ids of a text that begins a document, how many of the first of them say nothing of it).

        document_token: of the model's config; None where the run knew no documents.
        """
        ids = [*self.start, *self.encode(text).tolist()]
        if document_token is None or self.start[:1] == [document_token]:
            return ids, 0
        return [document_token, *ids], 1

    @functools.cached_property
    def key(self) -> str:
        """The kind and, but for bytes and ids, a hash of all that decides ids."""
        if self.file:
            return f"json-{self.file.hash}"
        if self.encoding is None:
            return self.name
        # One name may mean two tables. `_pat_str` is private to tiktoken and may vanish.
        digest = hashlib.sha256(getattr(self.encoding, "_pat_str", "").encode())
        for i in range(self.n_vocab):
            token = self._bytes(i, b"")
            digest.update(b"%d %d " % (i, len(token)) + token)
        for name, i in sorted(self.special.items()):
            digest.update(f"{name} {i} ".encode())
        return f"{self.name}-{digest.hexdigest()[:12]}"

    def encode(self, text: str, continues: bool = False) -> np.ndarray:
        """(N,) int64 ids of the text; names of special tokens in it are ordinary text.

        continues: it is a later piece of a text. Some tokenizer.json set a space before a text.
        """
        if self.name == "ids":
            words = text.split()
            for word in words:
                # Below 19 digits a number fits into int64.
                if not (word.isascii() and word.isdecimal() and len(word) < 19):
                    raise ValueError(
                        f"{word[:50]!r} is no token id, and --tokenizer=ids takes only these, such"
                        " as '17 4 256'"
                    )
            return np.array(words, np.int64)
        if self.file:
            return np.array(self.file.encode(text, continues), np.int64)
        if self.encoding:
            return self._encode_by_tiktoken(text)
        # A lone surrogate has no UTF-8: it becomes a question mark.
        return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64)

    def _encode_by_tiktoken(self, text: str) -> np.ndarray:
        # The same ids without a Python object for each, a fifth faster.
        to_numpy = getattr(self.encoding, "encode_to_numpy", None)
        if to_numpy is not None:
            try:
                return to_numpy(text, disallowed_special=()).astype(np.int64)
            except UnicodeEncodeError:
                pass  # a lone surrogate, which encode_ordinary replaces
        return np.array(self.encoding.encode_ordinary(text), np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; broken UTF-8 and unused ids become U+FFFD."""
        if self.name == "ids":
            return " ".join(str(int(i)) for i in ids)
        if self.file:
            return self.file.decode([int(i) for i in ids])
        # Join first: a character may be divided between two tokens. 0xff is never UTF-8.
        return b"".join(self._bytes(int(i), b"\xff") for i in ids).decode(errors="replace")

    def byte_lengths(self, vocab_size: int = 0) -> np.ndarray | None:
        """(V,) how many bytes of text each id stands for, V = max(n_vocab, vocab_size).

        0 for special tokens, unused ids and ids beyond the tokenizer's. None for `ids`, and for a
        tokenizer.json that does not say.
        """
        if self.name == "ids" or (self.file and self.file.bytes is None):
            return None
        # A special token stands for no text: it would make bits per byte look better.
        special = set(self.special.values())
        ids = range(max(self.n_vocab, vocab_size))
        return np.array([0 if i in special else len(self._bytes(i, b"")) for i in ids])

    def save(self, run: Path) -> None:
        """Keeps a copy of a tokenizer.json in a run's folder; the other kinds have only a name."""
        if self.file:
            self.file.save(run / COPY)

    def _bytes(self, i: int, unused: bytes) -> bytes:
        if self.file:
            return self.file.bytes.get(i, unused)
        try:
            return self.encoding.decode_single_token_bytes(i) if self.encoding else bytes([i])
        except (KeyError, ValueError, OverflowError):
            # Encodings have gaps, and a model's vocabulary may be padded.
            return unused


def is_file(name: str) -> bool:
    """Is it a path? A folder without / or a file in it might be a name of tiktoken's too."""
    return name.endswith(".json") or "/" in name or os.sep in name


def kept(name: str, checkpoint: Path) -> str:
    """The tokenizer of a checkpoint whose run calls it `name`.

    A path may lead nowhere by now, or to another file: of a tokenizer.json the run's copy counts.
    """
    # The best checkpoint lies a folder deeper than the others.
    for run in checkpoint.parents[:2]:
        if is_file(name) and (run / COPY / FILE).exists():
            return os.path.join(run, COPY)
    return name


def _tiktoken(name: str):
    try:
        import tiktoken
    except ImportError:
        raise ValueError(
            f"--tokenizer={name} needs `pip install tiktoken`; `bytes` needs nothing"
        ) from None
    known = ["bytes", "ids", *tiktoken.list_encoding_names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
        if os.path.exists(name):
            near = f"./{name}"
        raise ValueError(
            f"unknown tokenizer {name[:50]!r}: try --tokenizer={near}; known are "
            f"PATH/tokenizer.json, {', '.join(known)}"
        )
    # Its tables are downloaded on first use.
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        # The advice comes first: what a failed connection says is long, and helps few.
        reason = " ".join(str(error).split())
        if len(reason) > 100:
            reason = reason[:100].rpartition(" ")[0] + " ..."
        raise ValueError(
            f"tiktoken cannot fetch its encoding {name}: set TIKTOKEN_CACHE_DIR to a folder filled "
            f"on a machine with network, or use --tokenizer=bytes ({reason})"
        ) from error
