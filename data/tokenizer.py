"""Text <-> token ids: bytes, which need nothing, or any encoding of tiktoken."""

import difflib
import hashlib
from collections.abc import Iterable

import numpy as np


class Tokenizer:
    """Encodes and decodes by one of three kinds of vocabulary.

    name: `bytes` (each byte of UTF-8 is a token), the name of a tiktoken encoding, or `ids` (text
    made of numbers, for shards whose tokenizer nobody knows). n_vocab: of `ids`; the others know
    theirs. Raises ValueError for another name, or for tables that cannot be downloaded.
    """

    def __init__(self, name: str, n_vocab: int = 2**16):
        self.name = name
        self.n_vocab = n_vocab
        self.encoding = None  # of tiktoken
        self.special = {}  # name of a special token -> its id
        self.end_of_text = None  # the id that separates documents
        if name == "bytes":
            self.n_vocab = 256
            self.end_of_text = 0
        elif name != "ids":
            self.encoding = _tiktoken(name)
            self.n_vocab = self.encoding.n_vocab
            for special in self.encoding.special_tokens_set:
                self.special[special] = self.encoding.encode_single_token(special)
            self.end_of_text = self.special.get("<|endoftext|>")

    @property
    def key(self) -> str:
        """The name and, for an encoding, a hash of its table: one name may mean two tables."""
        if self.encoding is None:
            return self.name
        # All that decides a text's ids. `_pat_str` is private to tiktoken and may vanish.
        digest = hashlib.sha256(getattr(self.encoding, "_pat_str", "").encode())
        for i in range(self.n_vocab):
            token = self._bytes(i, b"")
            digest.update(b"%d %d " % (i, len(token)) + token)
        for name, i in sorted(self.special.items()):
            digest.update(f"{name} {i} ".encode())
        return f"{self.name}-{digest.hexdigest()[:12]}"

    def encode(self, text: str) -> np.ndarray:
        """(N,) int64 ids of the text; names of special tokens in it are ordinary text."""
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
        if self.encoding:
            return np.array(self.encoding.encode_ordinary(text), np.int64)
        # A lone surrogate has no UTF-8: it becomes a question mark.
        return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; broken UTF-8 and unused ids become U+FFFD."""
        if self.name == "ids":
            return " ".join(str(int(i)) for i in ids)
        # Join first: a character may be divided between two tokens. 0xff is never UTF-8.
        return b"".join(self._bytes(int(i), b"\xff") for i in ids).decode(errors="replace")

    def byte_lengths(self, vocab_size: int = 0) -> np.ndarray | None:
        """(V,) how many bytes of text each id stands for, V = max(n_vocab, vocab_size).

        0 for special tokens, unused ids and ids beyond the tokenizer's. None for `ids`.
        """
        if self.name == "ids":
            return None
        # A special token stands for no text: it would make bits per byte look better.
        special = set(self.special.values())
        ids = range(max(self.n_vocab, vocab_size))
        return np.array([0 if i in special else len(self._bytes(i, b"")) for i in ids])

    def _bytes(self, i: int, unused: bytes) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(i) if self.encoding else bytes([i])
        except (KeyError, ValueError, OverflowError):
            # Encodings have gaps, and a model's vocabulary may be padded.
            return unused


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
        raise ValueError(
            f"unknown tokenizer {name[:50]!r}: try --tokenizer={near}; known are {', '.join(known)}"
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
