"""The files that --data= names, and which of them are held out.

    FILE              that file, whatever its name
    FOLDER            its .bin shards or, where it has none, the .txt files at any depth in it, or
                      the files of documents (.jsonl, .parquet), or its .npy shards, sorted by
                      their paths. Texts beside documents are refused: README.txt is no data
    'books/*.txt'     what the pattern matches, sorted; ** stands for folders at any depth
    a.txt,b.txt       these, in this order; a folder or a pattern may be one of them

Hidden files and folders, whose names begin with a dot, are left out. A link to nothing, a pipe and
a folder that may not be read are refused by name: no text should be missing unnoticed.

Of several files, the words of a file's name, or of its folders', say what it is for:

    val, valid, validation   held out: val.bin, my-val-000.bin, web_val_000001.bin; not interval.bin
    train, training          for training; where no file has this word, all the others are
    test                     left alone

Nobody knows what train_val.bin is, so it is refused. Shards need files of both kinds. Texts and
files of documents may do without, and names of texts are often names of books. So they count where
every text has such a word (stories-train.txt, stories-valid.txt), or where a file or folder at the
top is called just so (val.txt, val/a.txt). Else data/texts.py holds out the last tenth of all.
"""

import glob
import os
import re
import shlex
import unicodedata
from pathlib import Path

SHARDS = (".bin", ".npy")
# See data/documents.py. A .json alone is a single object, and no data.
DOCUMENTS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".parquet")
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

    A list keeps the order of its parts. Raises ValueError where it names a folder or a pattern
    without a file for us.
    """
    path = Path(os.path.expanduser(data))
    if _exists(path):
        return _at(data, path)
    # Only a list, or a pattern that quotes have kept from the shell, may still name files.
    if "," not in data and not glob.has_magic(data):
        return []
    found = []
    for part in data.split(","):
        part = os.path.expanduser(part.strip())
        # A file called notes[1].txt is that file, and no pattern.
        if part and _exists(Path(part)):
            found += _at(data, Path(part))
            continue
        # A pattern may match folders beside the files that it is for.
        paths = [Path(name) for name in glob.glob(part, recursive=True)]
        files = [path for path in paths if not path.is_dir()]
        if not files:
            what = "matches no file" if glob.has_magic(part) else "is no file"
            raise ValueError(
                f"{part[:200]!r} in --data={data} {what}; it takes files, such as "
                "a.txt,b.txt or 'texts/*.txt'"
            )
        found += _readable(sorted(files, key=_order))
    # Two patterns may match the same file.
    return list(dict.fromkeys(found))


def is_shard(path: Path) -> bool:
    return path.suffix.lower() in SHARDS


def holds_documents(path: Path) -> bool:
    """Many documents in one file, and not one?"""
    return path.name.lower().endswith(DOCUMENTS)


def _exists(path: Path) -> bool:
    # A link to nothing exists here: whoever typed its name should hear of it.
    return path.is_symlink() or path.exists()


def _at(data: str, path: Path) -> list[Path]:
    return _in_folder(data, path) if path.is_dir() else _readable([path])


def _in_folder(data: str, folder: Path) -> list[Path]:
    """Its shards or, where it has none, the texts or files of documents at any depth in it."""
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    paths = sorted((folder / name for name in names), key=_order)
    shards = [path for path in paths if is_shard(path) and not path.is_dir()]
    bins = [path for path in shards if path.suffix.lower() == ".bin"]
    if bins:
        return _readable(bins)
    below = sorted(_below(folder), key=_order)
    texts = [path for path in below if path.suffix.lower() == ".txt"]
    documents = [path for path in below if holds_documents(path)]
    if texts and documents:
        kind = next(kind for kind in DOCUMENTS if documents[0].name.lower().endswith(kind))
        pattern = shlex.quote(f"{folder}/**/*{kind}")
        raise ValueError(
            f"--data={data} has texts and files of documents, {texts[0].name} and "
            f"{documents[0].name}: say which are data, such as --data={pattern}"
        )
    if texts or documents or shards:
        return _readable(texts or documents or shards)
    if not below:
        raise ValueError(
            f"--data={data} is empty; put .txt texts, .jsonl, .parquet or .bin shards there, or "
            "name another folder"
        )
    # Texts often have another suffix, and shards lie one folder deeper: then the message says what
    # to type for them.
    others = sorted({path.suffix for path in below if path.suffix}) or ["nothing of a known kind"]
    hint = ""
    for suffix in (".md", ".rst", ".py", ".tex", ".html", ".c"):
        if suffix in others and not hint:
            hint = f"; for those type --data={shlex.quote(f'{folder}/**/*{suffix}')}"
    deeper = [path for path in below if is_shard(path)]
    if deeper:
        hint = f"; for {deeper[0].name} type --data={shlex.quote(str(deeper[0].parent))}"
    raise ValueError(
        f"--data={data} has no .bin or .npy shards and no .txt, .jsonl or .parquet, but "
        f"{' '.join(others[:9])}{hint}"
    )


def _below(folder: Path) -> list[Path]:
    """All files at any depth, but none that is hidden or lies in a hidden folder."""

    def fail(error: OSError):
        raise error

    found = []
    # Without onerror, a folder that may not be read would be left out in silence.
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in folders if not _leads_back(here / name)]
        found += [here / name for name in names if not name.startswith(".")]
    return found


def _leads_back(folder: Path) -> bool:
    """Is it a link to a folder on the way to itself? It would be followed for ever."""
    return folder.is_symlink() and folder.resolve() in {up.resolve() for up in folder.parents}


def _readable(paths: list[Path]) -> list[Path]:
    """The same files. Raises ValueError for a link to nothing, a pipe or a device among them."""
    for path in paths:
        # Reading a pipe would wait for ever.
        if not path.is_file():
            raise ValueError(f"--data={_no_file(path)}")
    return paths


def _no_file(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return (
            f"{path} is a link to {os.readlink(path)}, which is not there: mend it, or take it away"
        )
    return f"{path} is no file that can be read, but a pipe, a device or the like: take it away"


def _order(path: Path) -> str:
    """The key by which files are sorted: the same whether a system stores é as 1 letter or 2."""
    return unicodedata.normalize("NFC", path.as_posix())


def relative(files: list[Path]) -> dict[Path, str]:
    """Each file's path below the folder that all have in common, with / on every system."""
    absolute = [os.path.abspath(path) for path in files]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return {path: _order(Path(os.path.relpath(name, root))) for path, name in zip(files, absolute)}


def _words(name: str) -> set[str]:
    """What the words of a path say that the file is for: some of train, val, test."""
    # The names of folders count, too: val/a.bin. myVal.bin has two words.
    name = re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return {WORDS[word] for word in re.findall(r"[^\W\d_]+", name) if word in WORDS}


def divided(data: str, files: list[Path]) -> dict[str, list[Path]]:
    """{"train": files, "val": files}, by the words of their names.

    "val" is missing where the last tenth of the texts is to be held out. Raises ValueError where
    the names of shards leave training or validation without a file.
    """
    shards = is_shard(files[0])
    if len(files) == 1 and not shards:
        return {"train": files}
    names = relative(files)
    words = {path: _words(name) for path, name in names.items()}
    # A novel may be called "The Test", and lie deep in a folder of novels.
    if not shards and not all(words.values()):
        tops = {path: name.split("/")[0].partition(".")[0] for path, name in names.items()}
        words = {path: _words(top) if top.lower() in WORDS else set() for path, top in tops.items()}
    for path in files:
        if {"train", "val"} <= words[path]:
            raise ValueError(
                f"{path} says both train and val in its name: name it after what it is for"
            )
    val = [path for path in files if "val" in words[path]]
    rest = [path for path in files if not words[path] & {"val", "test"}]
    train = [path for path in rest if "train" in words[path]] or rest
    if not val and not shards:
        # A set of documents often comes as train-*.parquet and test-*.parquet.
        return {"train": rest if holds_documents(files[0]) and rest else files}
    for split, found in (("train", train), ("val", val)):
        if not found:
            raise ValueError(
                f"--data={data} has {len(files)} {files[0].suffix} files, none of them "
                f"{split} data: one needs {split!r} as a word of its name, such as "
                f"{split}{files[0].suffix} or web_{split}_000001{files[0].suffix}"
            )
    return {"train": train, "val": val}
