"""Texts -> pieces -> ids: a long text is encoded in pieces, many at once and in little memory.

    text 0 = ab|cdef|g     text 1 = hi       |: where a text may be cut, see cut()
    ab  cdef  g  ∎  hi                       ∎: the id that ends a text, or the ids of a line break

Whoever has all texts takes pieces_of and encoded, which uses threads. Whoever has one document
after another takes document_ids. Both find the same ids.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data import texts
from data.tokenizer import Tokenizer

PIECE = 2**16  # bytes


def check_end(name: str, tokenizer: Tokenizer) -> None:
    """Raises ValueError where several texts need an end of text that nobody named."""
    if tokenizer.file and tokenizer.end_of_text is None:
        beside = tokenizer.file.path.with_name("tokenizer_config.json")
        raise ValueError(
            f"--data={name} has several texts, and nothing says which token of {tokenizer.name} "
            f'ends one: write {{"eos_token": "NAME"}} into {beside}, or train it with the special '
            "token <|endoftext|>"
        )


def pieces_of(
    name: str,
    some: list[np.ndarray],
    tokenizer: Tokenizer,
    continues: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, bool] | None]:
    """(a piece, does it continue a text?) of texts, each (N,) uint8; None between two of them.

    continues: so does the first text; on_bytes: is told the bytes of each piece.
    """
    for text in texts.with_marks(some, None):
        if text is None:
            yield None
            continues = False
            continue
        size = PIECE if tokenizer.may_be_cut else len(text)
        for piece, n_bytes in cut_up(name, text, size):
            yield piece, continues
            continues = True
            if on_bytes is not None:
                on_bytes(n_bytes)


def cut_up(name: str, text: np.ndarray, size: int) -> Iterator[tuple[str, int]]:
    """(a piece of at most `size` bytes, its bytes) of one text, (N,) uint8."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        is_last = end == len(text)
        if not is_last:
            end = texts.character_start(text, end)
        piece = decoded(name, text[start:end].tobytes())
        if not is_last:
            piece = piece[: cut(piece)]
            end = start + len(piece.encode())
        yield piece, end - start
        start = end


def cut(text: str) -> int:
    """Where to divide a text so that usual tokenizers find the tokens of the whole.

    They take white space together, or put one space before a word. So: after a line break or
    before a space that stands alone; or after any line break; or, in a very long word, anywhere.
    Where words of a vocabulary span lines, some tokens beside a cut are others.
    """
    for mark, after in (("\n", 1), (" ", 0)):
        at = text.rfind(mark, 1, -1)
        while at > 0:
            # o200k takes a slash together with the line break before it.
            if not (text[at - 1].isspace() or text[at + 1].isspace() or text[at + 1] == "/"):
                return at + after
            at = text.rfind(mark, 1, at)
    return text.rfind("\n") + 1 or len(text)


def decoded(name: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--data={name} is not text in UTF-8 ({error.reason}): convert it, or use "
            "--tokenizer=bytes, which takes any file"
        ) from error


def encoded(
    pieces: Iterable[tuple[str, bool] | None], tokenizer: Tokenizer
) -> Iterator[np.ndarray]:
    """(N,) the ids of each piece; for None, between two texts, the id that ends one."""

    # In threads: tiktoken and tokenizers release the GIL. A batch at a time, for there may be
    # millions of texts.
    pieces = iter(pieces)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(pieces, 256)):
            yield from pool.map(lambda piece: _ids(piece, tokenizer), batch)


def document_ids(name: str, raw: bytes, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """(N,) the ids of each piece of one document, and last the id that ends it."""
    if tokenizer.name == "bytes":
        yield np.frombuffer(raw, np.uint8)
    # Nearly all documents are one piece.
    elif len(raw) <= PIECE:
        yield _ids((decoded(name, bytes(raw)), False), tokenizer)
    else:
        for piece in pieces_of(name, [np.frombuffer(raw, np.uint8)], tokenizer):
            yield _ids(piece, tokenizer)
    yield _ids(None, tokenizer)


def _ids(piece: tuple[str, bool] | None, tokenizer: Tokenizer) -> np.ndarray:
    """(N,) int64"""
    if piece is None and tokenizer.end_of_text is None:
        return tokenizer.encode("\n")
    if piece is None:
        return np.array([tokenizer.end_of_text])
    text, continues = piece
    ids = tokenizer.encode(text, continues)
    if continues or not tokenizer.start:
        return ids
    return np.append(np.array(tokenizer.start, np.int64), ids)
