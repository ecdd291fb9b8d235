"""Texts of your own -> one text: what lies between two of them, what is held out, and its hash.

    books/a.txt        ┐     a.txt ∎ b/c.txt ∎ d.txt        ∎ the tokenizer's end of text:
    books/b/c.txt      ├──►  ├─ trained on ─┤ held │        <|endoftext|>, with --tokenizer=bytes
    books/d.txt        ┘                                    the byte 0; a line break if it has none

Order       by the path below the folder that all have in common; a list: as it is typed
Held out    the last tenth of all bytes; or the files whose names say so, see data/files.py
Left out    a text without a byte, which the first lines of a run name
Refused     by name: what cannot be read; what is no text in UTF-8, see data/foreign.py. With
            --tokenizer=bytes any bytes are taken, but no text in another encoding, and no archive
The hash    covers the bytes of each text and its path below the common folder, so the folder may be
            moved or copied; a text that is changed, added, taken away or renamed changes it. Of a
            single text it covers the bytes alone
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.files import relative
from data.foreign import foreign, not_text
from data.shards import HEADERS

# Smaller texts are read into memory, larger ones are mapped.
IN_MEMORY = 2**30  # bytes, of all together
MAPS = 500  # a process may have about a thousand files open
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read(data: str, paths: list[Path], any_bytes: bool) -> dict[Path, np.ndarray]:
    """Path -> (N,) uint8, the bytes of each text without a byte order mark; no empty texts.

    data: what was typed; any_bytes: also take what is no text. Raises ValueError, which names the
    files, where some cannot be read or are no text, and where there is nothing but white space.
    """
    texts = {}
    faults = {}
    large = sum(path.stat().st_size for path in paths) > IN_MEMORY
    n_maps = 0
    for path in paths:
        try:
            # Each map keeps a file open.
            is_mapped = large and n_maps < MAPS
            n_maps += is_mapped
            text = bytes_of(path, is_mapped)
            # Anything else would train without an error, and its loss would mean nothing.
            fault = fault_of(path, text, any_bytes)
        except OSError as error:
            fault = f"cannot be read: {error.strerror}"
        if fault:
            faults[path] = fault
        elif len(text):
            texts[path] = text
    if faults:
        raise ValueError(_refusal(faults))
    if not any(path.stat().st_size for path in paths):
        raise ValueError(f"--data={data} is empty: give a file with text, or --data=python")
    # Nearly always the beginning of the first one answers this.
    if not any(t[: 2**16].tobytes().strip() or t.tobytes().strip() for t in texts.values()):
        raise ValueError(f"--data={data} has nothing but white space: give a file with text")
    return texts


def bytes_of(path: Path, large: bool) -> np.ndarray:
    """(N,) uint8"""
    # The system refuses to map 0 bytes.
    if large and path.stat().st_size:
        text = np.memmap(path, np.uint8, "r")
    else:
        text = np.fromfile(path, np.uint8)
    if text[:3].tobytes() == BYTE_ORDER_MARK:
        text = text[3:]
    return text


def fault_of(path: Path, text: np.ndarray, any_bytes: bool) -> str | None:
    """Why the file is no text, as the middle of a sentence; None where it is one."""
    if len(text) >= 4 and int(text[:4].view("<u4")[0]) in HEADERS:
        return "is a shard of token ids: name it .bin, and give its folder"
    return foreign(path) or not_text(text, any_bytes)


def _refusal(faults: dict[Path, str]) -> str:
    """One sentence about files that cannot be used: the fault of the first, the names of others."""
    first, *others = faults
    said = f"{first} {faults[first]}"
    if others:
        # In many folders there may be a file of the same name.
        said += f"; nor can these be used: {some(['/'.join(path.parts[-2:]) for path in others])}"
    return said


def some(names: list[str]) -> str:
    """The first few, and how many more there are."""
    shown = ", ".join(names[:3])
    if len(names) > 3:
        shown += f" and {len(names) - 3} more"
    return shown


def hold_out(texts: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(to train on, held out): the last tenth of the bytes of all is held out."""
    end = sum(map(len, texts)) * 9 // 10
    train = []
    for i, text in enumerate(texts):
        if end < len(text):
            break
        train.append(text)
        end -= len(text)
    # This text is divided. No mark follows its first part, for it does not end there.
    cut = character_start(text, end)
    if cut:
        train.append(text[:cut])
    return train, [text[cut:], *texts[i + 1 :]]


def character_start(text: np.ndarray, end: int) -> int:
    """The start of the UTF-8 character that a cut at `end` would divide, else `end`."""
    # A character has at most 4 bytes; all but the first are 10xxxxxx.
    for start in range(end, max(end - 4, -1), -1):
        if text[start] & 0xC0 != 0x80:
            return start
    return end


def with_marks(texts: list, mark) -> Iterator:
    """The texts, with the mark between two."""
    for i, text in enumerate(texts):
        if i > 0:
            yield mark
        yield text


def as_tokens(texts: list[np.ndarray], end_of_text: int) -> list[np.ndarray]:
    """The bytes of all texts, with this byte between two: one array, or many if they are large."""
    parts = [*with_marks(texts, np.full(1, end_of_text, np.uint8))]
    if sum(map(len, parts)) > IN_MEMORY or len(parts) < 2:
        return parts
    return [np.concatenate(parts)]


def sha256(texts: dict[Path, np.ndarray]) -> str:
    """The hash that a resumed run compares: of the bytes and, of several texts, their names."""
    if len(texts) == 1:
        return hashlib.sha256(*texts.values()).hexdigest()
    digest = hashlib.sha256()
    for path, name in relative([*texts]).items():
        content = hashlib.sha256(texts[path]).hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()
