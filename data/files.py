"""The files that --data= names, and which of them are held out.

Of several files, the words of a file's name say what it is for:

    val, valid, validation   held out: val.bin, my-val-000.bin, web_val_000001.bin; not interval.bin
    train, training          for training; where no file has this word, all the others are
    test                     left alone

Nobody knows what train_val.bin is, so it is refused. Shards need files of both kinds. Texts may do
without: if no name says that its file is held out, all are joined in the order of their names, each
ending in a line break, and the last tenth is held out.
"""

import glob
import os
import re
import shlex
import unicodedata
from pathlib import Path

import numpy as np

from data.foreign import foreign, not_text
from data.shards import HEADERS

# Smaller files are read into memory, larger ones are mapped.
IN_MEMORY = 2**30  # bytes
# A word of a file's name -> what the file is for.
WORDS = {
    "val": "val",
    "valid": "val",
    "validation": "val",
    "train": "train",
    "training": "train",
    "test": "test",
}


def listed(data: str) -> list[Path]:
    """The files that --data= names, sorted; [] where nothing has that name.

    Raises ValueError where it names a folder or a pattern without a file for us.
    """
    path = Path(os.path.expanduser(data))
    if path.is_dir():
        return _in_folder(data, path)
    if path.is_file():
        return [path]
    if path.is_symlink() or path.exists():
        raise ValueError(f"--data={_no_file(path)}")
    # Only a list, or a pattern that quotes have kept from the shell, may still name files.
    if "," not in data and not glob.has_magic(data):
        return []
    found = []
    for part in data.split(","):
        part = os.path.expanduser(part.strip())
        paths = [Path(name) for name in glob.glob(part, recursive=True)]
        files = [path for path in paths if path.is_file()]
        if not files:
            what = "matches no file" if glob.has_magic(part) else "is no file"
            raise ValueError(
                f"{part[:200]!r} in --data={data} {what}; it takes files, such as "
                "a.txt,b.txt or 'texts/*.txt'"
            )
        found += sorted(files, key=_order)
    # Two patterns may match the same file.
    return list(dict.fromkeys(found))


def _in_folder(data: str, folder: Path) -> list[Path]:
    """Its shards or, where it has none, its texts."""
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    paths = sorted((folder / name for name in names), key=_order)
    for suffix in (".bin", ".txt"):
        mine = [path for path in paths if path.suffix.lower() == suffix and not path.is_dir()]
        for path in mine:
            # Reading a pipe would wait for ever.
            if not path.is_file():
                raise ValueError(_no_file(path))
        if mine:
            return mine
    # Often the files lie one folder deeper: then the message says what to type for them.
    others = sorted({path.suffix for path in paths if path.suffix}) or ["nothing of a known kind"]
    texts = sorted(folder.glob("*/*.txt"))
    shards = sorted(folder.glob("*/*.bin"))
    hint = ""
    if texts:
        hint = f"; for {texts[0]} and the like type --data={shlex.quote(f'{folder}/**/*.txt')}"
    elif shards:
        hint = f"; for {shards[0].name} type --data={shlex.quote(str(shards[0].parent))}"
    raise ValueError(
        f"--data={data} has 0 .bin shards and 0 .txt texts, but {' '.join(others[:9])}{hint}"
    )


def _no_file(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return (
            f"{path} is a link to {os.readlink(path)}, which is not there: mend it, or take it away"
        )
    return f"{path} is no file that can be read, but a pipe, a device or the like: take it away"


def _order(path: Path) -> str:
    """The key by which files are sorted: the same whether a system stores é as 1 letter or 2."""
    return unicodedata.normalize("NFC", path.as_posix())


def divided(data: str, files: list[Path]) -> dict[str, list[Path]]:
    """{"train": files, "val": files}, by the words of their names.

    "val" is missing where the last tenth of the texts is to be held out. Raises ValueError where
    the names of shards leave training or validation without a file.
    """
    shards = files[0].suffix.lower() == ".bin"
    if len(files) == 1 and not shards:
        return {"train": files}
    # The names of folders below the common one count, too: val/a.bin.
    absolute = [os.path.abspath(path) for path in files]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    words = {}
    for path, name in zip(files, absolute):
        name = unicodedata.normalize("NFC", os.path.relpath(name, root))
        # myVal.bin has two words.
        name = re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower()
        words[path] = {WORDS[word] for word in re.findall(r"[^\W\d_]+", name) if word in WORDS}
        if {"train", "val"} <= words[path]:
            raise ValueError(
                f"{path} says both train and val in its name: name it after what it is for"
            )
    val = [path for path in files if "val" in words[path]]
    rest = [path for path in files if not words[path] & {"val", "test"}]
    train = [path for path in rest if "train" in words[path]] or rest
    if not val and not shards:
        return {"train": files}
    for split, found in (("train", train), ("val", val)):
        if not found:
            raise ValueError(
                f"--data={data} has {len(files)} {files[0].suffix} files, none of them "
                f"{split} data: one needs {split!r} as a word of its name, such as "
                f"{split}{files[0].suffix} or web_{split}_000001{files[0].suffix}"
            )
    return {"train": train, "val": val}


def joined(data: str, paths: list[Path], any_bytes: bool) -> np.ndarray:
    """(N,) uint8: the bytes of these texts, without byte order marks.

    any_bytes: also take what is no text. Raises ValueError where a file is no text, or all are
    empty.
    """
    sizes = {path: path.stat().st_size for path in paths}
    if not any(sizes.values()):
        raise ValueError(f"--data={data} is empty: give a file with text, or --data=python")
    large = sum(sizes.values()) > IN_MEMORY
    if large and len(paths) > 1:
        raise ValueError(
            f"--data={data} has more than {IN_MEMORY:,} bytes: join the texts in one file"
        )
    texts = []
    for path in paths:
        text = np.memmap(path, np.uint8, "r") if large else np.fromfile(path, np.uint8)
        # Anything else would train without an error, and its loss would mean nothing.
        if len(text) >= 4 and int(text[:4].view("<u4")[0]) in HEADERS:
            raise ValueError(f"{path} is a shard of token ids: name it .bin, and give its folder")
        fault = foreign(path) or not_text(text, any_bytes)
        if fault:
            raise ValueError(f"{path} {fault}")
        byte_order_mark = b"\xef\xbb\xbf"
        if text[:3].tobytes() == byte_order_mark:
            text = text[3:]
        texts.append(text)
        # The next text begins on a line of its own.
        line_break = ord("\n")
        if len(paths) > 1 and len(text) and text[-1] != line_break:
            texts.append(np.full(1, line_break, np.uint8))
    text = texts[0] if len(texts) == 1 else np.concatenate(texts)
    # Nearly always the beginning alone answers this.
    if not text[: 2**16].tobytes().strip() and not text.tobytes().strip():
        raise ValueError(f"--data={data} has nothing but white space: give a file with text")
    return text
