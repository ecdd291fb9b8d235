"""Corpora -> token shards: the name that --data= gives becomes tokens for training and validation.

python, shakespeare, openwebtext, fineweb    texts that many know; the last two are large
FILE            a text in UTF-8
FOLDER          its .bin shards (data/shards.py) or, where it has none, its .txt texts
A,B  or  'A*'   files of one of these kinds; data/files.py says which of several are held out
"""

import difflib
import hashlib
import itertools
import os
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.dataset import Tokens
from data.download import download, hexdigest, making, progress
from data.files import IN_MEMORY, divided, joined, listed
from data.shards import read_shard, read_shards, write_shard
from data.tokenizer import Tokenizer

CORPORA = ("python", "shakespeare", "openwebtext", "fineweb")
CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
OPENWEBTEXT = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets"
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
SMALL = 64 * 2**20  # bytes of shards up to which each token is checked, and hashed, before training


@dataclass(frozen=True)
class Corpus:
    name: str
    # Of the text, or of shards; of large ones the names, sizes, first 64 KiB and 64 samples
    sha256: str
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens


def load(
    data: str, tokenizer: str, cache_dir: str, url: str | None = None, vocab_size: int | None = None
) -> Corpus:
    """The corpus named `data`. What is downloaded or tokenised for it stays in `cache_dir`.

    python        this interpreter's standard library; validation is whole files, 7 % of the bytes
    shakespeare   tinyshakespeare, 1.1 MB; validation is the last 10 %
    openwebtext   21 parts, or the first N with `openwebtext:N`, each 0.6 GB to download, 0.43
                  billion gpt2 tokens or so; validation is one document in 2000. Archives may be
                  deleted once tokenised
    fineweb       9 files of 100 million gpt2 tokens, 0.2 GB each, or the first N of 103 with
                  `fineweb:N`
    FILE          any text in UTF-8, a byte order mark left out (with the tokenizer `bytes` also
                  what is no text at all, such as music); validation is the last 10 %
    FOLDER, LIST  .bin shards or texts, see data/files.py

    `url` is a mirror: a folder on the web (or file:///...) with the same file names. Whatever a
    user can get wrong is a ValueError. Let one process per machine prepare the cache before the
    others load it.
    """
    name, _, count = data.partition(":")
    for field, given in (("data", data), ("data_dir", cache_dir)):
        if not (given.isprintable() and 0 < len(given) < 500):
            raise ValueError(
                f"--{field}={given[:50]!r} is empty, too long, or has characters that no "
                "terminal shows: give that file or folder a plain name"
            )
    cache = Path(os.path.expanduser(cache_dir))
    if cache_dir.startswith("~") and str(cache).startswith("~"):
        raise ValueError(f"--data_dir={cache_dir}: nobody here has that home; type the whole path")
    words = Tokenizer(tokenizer)
    if url and name not in CORPORA[1:]:
        raise ValueError(
            f"--data_url={url} is a mirror for {', '.join(CORPORA[1:])}; --data={data} "
            "downloads nothing: leave --data_url= out"
        )
    try:
        if data == "python":
            corpus = _python(words, cache)
        elif data == "shakespeare":
            file = download(
                f"{url or CHAR_RNN}/input.txt",
                cache / "shakespeare" / "input.txt",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            )
            corpus = _texts(data, [file], words, cache)
        elif name == "openwebtext":
            corpus = _openwebtext(
                data, _number(data, count, 21, 21), words, cache, url or OPENWEBTEXT
            )
        elif name == "fineweb":
            corpus = _fineweb(data, _number(data, count, 9, 103), words, cache, url or FINEWEB)
        elif files := listed(data):
            corpus = _files(data, files, words, cache, vocab_size)
        else:
            near = "".join(
                f" did you mean {c}?" for c in difflib.get_close_matches(name, CORPORA, 1)
            )
            raise ValueError(
                f"--data={data} does not exist:{near} it takes {', '.join(CORPORA)}, a text file, "
                "a folder of .bin shards or .txt texts, or a list a.txt,b.txt"
            )
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(
            f"--data={data} cannot be read, or cannot be kept in {cache}: {error}"
        ) from error
    for tokens in (corpus.train, corpus.val):
        small = sum(shard.nbytes for shard in tokens.shards) <= SMALL
        for shard, end in zip(tokens.shards, tokens.ends):
            for start, stop in [(0, len(shard))] if small else _stretches(len(shard)):
                first = end - len(shard) + start
                tokens.check(shard[start:stop], first, vocab_size or corpus.tokenizer.n_vocab)
    return corpus


def _number(data: str, count: str, default: int, most: int) -> int:
    if ":" in data and not (count.isdecimal() and 1 <= int(count) <= most):
        raise ValueError(f"--data={data}: after the colon goes a number of files, from 1 to {most}")
    return int(count or default)


def _stretches(n: int) -> list[tuple[int, int]]:
    """(start, stop) of the beginning of n things, and of 64 short stretches spread over them."""
    return [(0, 2**15), *((i, i + 2048) for i in range(0, n, n // 64 + 1))]


# --- files ---


def _files(
    data: str, files: list[Path], words: Tokenizer, cache: Path, vocab_size: int | None
) -> Corpus:
    """Shards or texts. Shards whose tokenizer nobody knows have the one named `ids`."""
    binary = [path for path in files if path.suffix.lower() == ".bin"]
    others = [path for path in files if path not in binary]
    if not binary:
        return _texts(data, files, words, cache)
    if others:
        raise ValueError(
            f"--data={data} names shards and others, {binary[0].name} and {others[0].name}: give"
            " one kind"
        )
    if len(files) == 1 and Path(os.path.expanduser(data)).is_file():
        raise ValueError(f"--data={data} is a shard: give its folder, or a list train.bin,val.bin")
    found = divided(data, files)
    if words.name != "ids" and (table := files[0].parent / "meta.pkl").exists():
        most = max(int(ids.max(initial=0)) for ids in read_shards(files, vocab_size or 2**16))
        raise ValueError(
            f"{table} says that these ids are of nanoGPT's own table, mostly characters, and not"
            f" {words.name}: type --tokenizer=ids --vocab_size={most + 1}, or the size that"
            " prepare.py printed"
        )
    if words.name == "bytes" and (vocab_size or 0) > 256:  # not bytes, then, and nobody says what
        words = Tokenizer("ids", vocab_size)
    small = sum(path.stat().st_size for path in files) <= IN_MEMORY
    corpus = _shards(data, found["train"], found["val"], words, vocab_size, small)
    widths = {shard.itemsize for tokens in (corpus.train, corpus.val) for shard in tokens.shards}
    if widths <= {2}:
        return corpus
    shown = " and ".join(map(str, sorted(widths)))
    return replace(corpus, name=f"{data} (ids of {shown} bytes)")


def tokenizer_of(data: str, tokenizer: str, vocab_size: int) -> Tokenizer:
    """The tokenizer that load() would find, where possible without the data: shards whose tokenizer
    nobody gave have `ids`."""
    if tokenizer != "bytes" or vocab_size <= 256 or data.partition(":")[0] in CORPORA:
        return Tokenizer(tokenizer)
    try:
        files = listed(data)
    except (ValueError, OSError):
        files = []
    ids = (".bin",) if files else (".bin", "")  # a name without a suffix was a folder's
    path = files[0] if files else Path(data)
    return Tokenizer("ids", vocab_size) if path.suffix.lower() in ids else Tokenizer("bytes")


# --- text ---


def _python(words: Tokenizer, cache: Path) -> Corpus:
    """Ordered by the sha256 of the file names, so that any stretch of it is a fair sample of the
    modules."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {
        "test",
        "tests",
        "idlelib",
        "pydoc_data",
        "turtledemo",
        "site-packages",
        "dist-packages",
    }
    paths = [
        path
        for m in sys.stdlib_module_names
        for path in (root / f"{m}.py", *(root / m).rglob("*.py"))
    ]
    names = [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    names = [name for name in names if not skip & set(name.split("/"))]
    names.sort(key=lambda name: hexdigest(name.encode()))
    if not names:
        raise ValueError(f"--data=python finds no source in {root}: use --data= with a text file")
    files = [(root / name).read_bytes().replace(b"\r\n", b"\n") for name in names]
    ends = np.cumsum([len(file) for file in files])
    cut = ends[np.searchsorted(ends, 0.07 * ends[-1])]
    text = np.frombuffer(b"".join(files), np.uint8)
    return _tokenised("python", text[cut:], text[:cut], hexdigest(text), words, cache)


def _texts(data: str, files: list[Path], words: Tokenizer, cache: Path) -> Corpus:
    """One text, or several."""
    found = divided(data, files)
    train = joined(data, found["train"], words.name == "bytes")
    sha256 = hexdigest(train)
    if "val" in found:
        val = joined(data, found["val"], words.name == "bytes")
        sha256 = hexdigest(f"{sha256} {hexdigest(val)}".encode())
        held_out = " ".join(path.name for path in found["val"][:3])
    else:
        cut = _character(train, len(train) * 9 // 10)
        train, val = train[:cut], train[cut:]
        held_out = "the last tenth"
    corpus = _tokenised(data, train, val, sha256, words, cache)
    if len(files) == 1:
        return corpus
    used = sum(map(len, found.values()))
    left = f", {len(files) - used} left alone" if used < len(files) else ""
    return replace(corpus, name=f"{data} ({used} texts, a line each, held out: {held_out}{left})")


def _tokenised(
    name: str, train: np.ndarray, val: np.ndarray, sha256: str, words: Tokenizer, cache: Path
):
    """Bytes of text -> Corpus. Bytes are tokens already; other tokens are made once and cached."""
    if words.name == "ids":
        raise ValueError(
            f"--tokenizer=ids is for .bin shards; --data={name} is text: use --tokenizer=bytes"
        )
    splits = {"train": train, "val": val}
    for split, text in splits.items() if words.name != "bytes" else ():
        path = cache / f"{sha256[:32]}-{words.key}" / f"{split}.bin"
        with making(path) as missing, progress(f"tokenising {split}", len(text)) as bar:
            if missing:
                write_shard(path, _encoded(_pieces(name, text, bar), words), words.n_vocab)
        splits[split] = read_shard(path)
    return Corpus(
        name, sha256, words, *(Tokens([ids], f"{name} ({split})") for split, ids in splits.items())
    )


def _pieces(name: str, text: np.ndarray, bar) -> Iterator[str]:
    """Whole lines, about 64 KiB of them at a time, so that many can be tokenised at once in little
    memory."""
    start = 0
    while start < len(text):
        raw = text[start : start + 2**16].tobytes()
        if start + len(raw) < len(text):
            raw = raw[: raw.rfind(b"\n") + 1 or _character(text, start + len(raw)) - start]
        try:
            yield raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--data={name} is not text in UTF-8 ({error.reason}): convert it, or use "
                "--tokenizer=bytes, which takes any file"
            ) from error
        start += len(raw)
        bar.update(len(raw))


def _character(text: np.ndarray, end: int) -> int:
    """The start of the UTF-8 character that a cut at `end` would divide, else `end`."""
    return end - next((i for i in range(min(4, end + 1)) if text[end - i] & 0xC0 != 0x80), 0)


def _encoded(
    texts: Iterable[str], words: Tokenizer, end: int | None = None
) -> Iterator[np.ndarray]:
    """Ids of each text, in parallel (tiktoken releases the GIL), with the id `end` after it."""
    texts = iter(texts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(texts, 256)):
            for ids in pool.map(words.encode, batch):
                yield ids if end is None else np.append(ids, end)


def _openwebtext(name: str, count: int, words: Tokenizer, cache: Path, url: str) -> Corpus:
    """Gokaslan and Cohen, 2019: parts of about a thousand .tar.xz archives of some 400
    documents."""
    train, val = [], []
    folder = cache / f"openwebtext-{words.key}"
    for i in range(count):
        train.append(folder / f"train_{i:02d}.bin")
        val.append(folder / f"val_{i:02d}.bin")
        with making(val[i]) as missing:  # the last file of a part to be written
            if missing:
                _openwebtext_part(f"urlsf_subset{i:02d}.tar", train[i], val[i], words, cache, url)
    return _shards(name, train, val, words)


def _openwebtext_part(
    file: str, train: Path, val: Path, words: Tokenizer, cache: Path, url: str
) -> None:
    archive, held_out = download(f"{url}/{file}", cache / "openwebtext" / file), []
    with progress(f"tokenising {file}", archive.stat().st_size) as bar:
        texts = _documents(archive, held_out, bar)
        write_shard(train, _encoded(texts, words, words.end_of_text), words.n_vocab)
    write_shard(val, _encoded(held_out, words, words.end_of_text), words.n_vocab)


def _documents(archive: Path, held_out: list[str], bar) -> Iterator[str]:
    """The documents of a part; but one in 2000, chosen by the sha256 of its text, goes to
    `held_out`."""
    with tarfile.open(archive) as outer:
        for member in outer:
            if member.name.endswith(".xz"):
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:xz") as inner:
                    for document in filter(tarfile.TarInfo.isfile, inner):
                        raw = inner.extractfile(document).read()
                        text = raw.decode(errors="replace")
                        if int(hexdigest(raw), 16) % 2000:
                            yield text
                        else:
                            held_out.append(text)
            bar.update(member.size)


# --- shards ---


def _fineweb(name: str, count: int, words: Tokenizer, cache: Path, url: str) -> Corpus:
    if words.name != "gpt2":
        raise ValueError(
            f"--data={name} is made of gpt2 tokens, not of {words.name}: use --tokenizer=gpt2"
        )
    files = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]
    val, *train = [download(f"{url}/{file}", cache / "fineweb" / file) for file in files]
    return _shards(name, train, [val], words)


def _shards(
    name: str,
    train: list[Path],
    val: list[Path],
    words: Tokenizer,
    vocab_size: int | None = None,
    in_memory: bool = False,
) -> Corpus:
    digest, paths = hashlib.sha256(), train + val
    found = read_shards(paths, vocab_size or words.n_vocab, in_memory)
    whole = sum(path.stat().st_size for path in paths) <= SMALL
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        raw = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        digest.update(raw[: size if whole else 2**16])
        for start in range(0, 0 if whole else size, size // 64 + 1):  # made anew, it shows
            digest.update(raw[start : start + 4096])
    n = len(train)
    splits = (
        Tokens(found[part], f"{name} ({split})", [path.name for path in paths[part]])
        for split, part in (("train", slice(n)), ("val", slice(n, None)))
    )
    return Corpus(name, digest.hexdigest(), words, *splits)
