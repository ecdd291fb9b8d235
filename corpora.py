"""Corpora -> token shards: the name that --data= gives becomes tokens for training and for validation.

Shards (`.bin`) come in the formats that people already have:
    headerless   uint16 tokens: nanoGPT's train.bin and val.bin
    headered     256 int32 (magic, version, number of tokens), then tokens, as llm.c and modded-nanogpt do:
                 (20240520, 1) is uint16, (20240801, 7) is uint32, which we write for n_vocab > 65536. A count
                 beyond 32 bits goes on in the fourth int32, which is zero elsewhere.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import Tokens, check
from download import download, hexdigest, making, progress
from tokenizer import Tokenizer

CORPORA = ("python", "shakespeare", "openwebtext", "fineweb")
CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
OPENWEBTEXT = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets"
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic of a shard: version, type of its tokens
SMALL = 64 * 2**20  # bytes of shards up to which every token is checked, and hashed, before training begins


@dataclass(frozen=True)
class Corpus:
    name: str
    sha256: str  # of the text, or of shards; of large ones the names, sizes, first 64 KiB and 64 samples
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens


def load(data: str, tokenizer: str, cache_dir: str, url: str | None = None,
         vocab_size: int | None = None) -> Corpus:
    """The corpus named `data`. What is downloaded or tokenised for it stays in `cache_dir` for the next time.

    python        this interpreter's standard library; validation is whole files, 7 % of the bytes
    shakespeare   tinyshakespeare, 1.1 MB; validation is the last 10 %
    openwebtext   21 parts, or the first N with `openwebtext:N`, each 0.6 GB to download, 0.43 billion gpt2
                  tokens or so; validation is one document in 2000. Archives may be deleted once tokenised
    fineweb       9 files of 100 million gpt2 tokens, 0.2 GB each, or the first N of 103 with `fineweb:N`
    FILE          any text in UTF-8 (any bytes with the tokenizer `bytes`); validation is the last 10 %
    FOLDER        .bin shards, sorted by name: `val` in the name is validation; training is those with `train`
                  in the name or, where none has it, all the others

    `url` is a mirror: a folder on the web (or file:///...) with the same file names. Whatever a user can get
    wrong is a ValueError. Let one process per machine prepare the cache before the others load it.
    """
    name, _, count = data.partition(":")
    for field, given in (("data", data), ("data_dir", cache_dir)):
        if not (given.isprintable() and 0 < len(given) < 500):
            raise ValueError(f"--{field}={given[:50]!r} is empty, too long, or has characters that no "
                             "terminal shows: give that file or folder a plain name")
    path, cache = (Path(os.path.expanduser(given)) for given in (data, cache_dir))
    words = Tokenizer(tokenizer)
    if url and name not in CORPORA[1:]:
        raise ValueError(f"--data_url={url} is a mirror for {', '.join(CORPORA[1:])}; --data={data} "
                         "downloads nothing: leave --data_url= out")
    try:
        if data == "python":
            corpus = _python(words, cache)
        elif data == "shakespeare":
            file = download(f"{url or CHAR_RNN}/input.txt", cache / "shakespeare" / "input.txt",
                            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
            corpus = _text(data, file, words, cache)
        elif name == "openwebtext":
            corpus = _openwebtext(data, _number(data, count, 21, 21), words, cache, url or OPENWEBTEXT)
        elif name == "fineweb":
            corpus = _fineweb(data, _number(data, count, 9, 103), words, cache, url or FINEWEB)
        elif path.is_dir():
            corpus = _folder(data, path, words, vocab_size)
        elif path.is_file():
            corpus = _text(data, path, words, cache)
        else:
            near = "".join(f" did you mean {c}?" for c in difflib.get_close_matches(name, CORPORA, 1))
            raise ValueError(f"--data={data} does not exist:{near} it takes {', '.join(CORPORA)}, "
                             "a text file, or a folder of .bin shards")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"--data={data} cannot be read, or cannot be kept in {cache}: {error}") from error
    for tokens in (corpus.train, corpus.val):
        if sum(shard.nbytes for shard in tokens.shards) <= SMALL:
            for shard in tokens.shards:
                check(shard, vocab_size or corpus.tokenizer.n_vocab, tokens.name)
    return corpus


def _number(data: str, count: str, default: int, most: int) -> int:
    if ":" in data and not (count.isdecimal() and 1 <= int(count) <= most):
        raise ValueError(f"--data={data}: after the colon goes a number of files, from 1 to {most}")
    return int(count or default)


# --- text ---


def _python(words: Tokenizer, cache: Path) -> Corpus:
    """Ordered by the sha256 of the file names, so that any stretch of it is a fair sample of the modules."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idlelib", "pydoc_data", "turtledemo", "site-packages", "dist-packages"}
    paths = [path for m in sys.stdlib_module_names for path in (root / f"{m}.py", *(root / m).rglob("*.py"))]
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


def _text(name: str, path: Path, words: Tokenizer, cache: Path) -> Corpus:
    if path.suffix == ".bin" or path.stat().st_size == 0:
        fault = "is a shard: give its folder" if path.suffix == ".bin" else "is empty: give a file with text"
        raise ValueError(f"--data={name} {fault}, or --data=python")
    text = np.memmap(path, np.uint8, "r")
    cut = _character(text, len(text) * 9 // 10)
    return _tokenised(name, text[:cut], text[cut:], hexdigest(text), words, cache)


def _tokenised(name: str, train: np.ndarray, val: np.ndarray, sha256: str, words: Tokenizer, cache: Path):
    """Bytes of text -> Corpus. Bytes are tokens already; other tokens are made once and cached."""
    if words.name == "ids":
        raise ValueError(f"--tokenizer=ids is for .bin shards; --data={name} is text: use --tokenizer=bytes")
    splits = {"train": train, "val": val}
    for split, text in splits.items() if words.name != "bytes" else ():
        path = cache / f"{sha256[:32]}-{words.name}" / f"{split}.bin"
        with making(path) as missing, progress(f"tokenising {split}", len(text)) as bar:
            if missing:
                write_shard(path, _encoded(_pieces(name, text, bar), words), words.n_vocab)
        splits[split] = read_shard(path)
    return Corpus(name, sha256, words, *(Tokens([ids], f"{name} ({split})") for split, ids in splits.items()))


def _pieces(name: str, text: np.ndarray, bar) -> Iterator[str]:
    """Whole lines, about 64 KiB of them at a time, so that many can be tokenised at once in little memory."""
    start = 0
    while start < len(text):
        raw = text[start : start + 2**16].tobytes()
        if start + len(raw) < len(text):
            raw = raw[: raw.rfind(b"\n") + 1 or _character(text, start + len(raw)) - start]
        try:
            yield raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"--data={name} is not text in UTF-8 ({error.reason}): convert it, or use "
                             "--tokenizer=bytes, which takes any file") from error
        start += len(raw)
        bar.update(len(raw))


def _character(text: np.ndarray, end: int) -> int:
    """The start of the UTF-8 character that a cut at `end` would divide, else `end`."""
    return end - next((i for i in range(min(4, end + 1)) if text[end - i] & 0xC0 != 0x80), 0)


def _encoded(texts: Iterable[str], words: Tokenizer, end: int | None = None) -> Iterator[np.ndarray]:
    """Ids of each text, in parallel (tiktoken releases the GIL), with the id `end` after it."""
    texts = iter(texts)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(texts, 256)):
            for ids in pool.map(words.encode, batch):
                yield ids if end is None else np.append(ids, end)


def _openwebtext(name: str, count: int, words: Tokenizer, cache: Path, url: str) -> Corpus:
    """Gokaslan and Cohen, 2019: parts of about a thousand .tar.xz archives of some 400 documents."""
    train, val = [], []
    for i in range(count):
        train.append(cache / f"openwebtext-{words.name}" / f"train_{i:02d}.bin")
        val.append(cache / f"openwebtext-{words.name}" / f"val_{i:02d}.bin")
        with making(val[i]) as missing:  # the last file of a part to be written
            if missing:
                _openwebtext_part(f"urlsf_subset{i:02d}.tar", train[i], val[i], words, cache, url)
    return _shards(name, train, val, words)


def _openwebtext_part(file: str, train: Path, val: Path, words: Tokenizer, cache: Path, url: str) -> None:
    archive, held_out = download(f"{url}/{file}", cache / "openwebtext" / file), []
    with progress(f"tokenising {file}", archive.stat().st_size) as bar:
        texts = _documents(archive, held_out, bar)
        write_shard(train, _encoded(texts, words, words.end_of_text), words.n_vocab)
    write_shard(val, _encoded(held_out, words, words.end_of_text), words.n_vocab)


def _documents(archive: Path, held_out: list[str], bar) -> Iterator[str]:
    """The documents of a part; but one in 2000, chosen by the sha256 of its text, goes to `held_out`."""
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
        raise ValueError(f"--data={name} is made of gpt2 tokens, not of {words.name}: use --tokenizer=gpt2")
    files = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]
    val, *train = [download(f"{url}/{file}", cache / "fineweb" / file) for file in files]
    return _shards(name, train, [val], words)


def _folder(name: str, folder: Path, words: Tokenizer, vocab_size: int | None) -> Corpus:
    files = sorted(file for file in folder.glob("*.bin") if file.is_file())  # a pipe would make us wait
    val = [file for file in files if "val" in file.name]
    rest = [file for file in files if file not in val]
    train = [file for file in rest if "train" in file.name] or rest
    for split, found in (("train", train), ("val", val)):
        if not found:
            raise ValueError(f"--data={name} has {len(files)} .bin files, none of them {split} data: add "
                             f"one with {split!r} in its name")
    if words.name == "bytes" and (vocab_size or 0) > 256:  # not bytes, then, and nobody says what
        words = Tokenizer("ids", vocab_size)
    return _shards(name, train, val, words)


def _shards(name: str, train: list[Path], val: list[Path], words: Tokenizer) -> Corpus:
    digest, paths = hashlib.sha256(), train + val
    whole = sum(path.stat().st_size for path in paths) <= SMALL
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        raw = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        digest.update(raw[: size if whole else 2**16])
        for start in range(0, 0 if whole else size, size // 64 + 1):  # made anew, it shows
            digest.update(raw[start : start + 4096])
    splits = (Tokens([read_shard(path) for path in part], f"{name} ({split})")
              for split, part in (("train", train), ("val", val)))
    return Corpus(name, digest.hexdigest(), words, *splits)


def read_shard(path: Path) -> np.ndarray:
    """The tokens of a .bin file, memory-mapped; ValueError when its size or header is wrong."""
    size, header = path.stat().st_size, np.fromfile(path, "<u4", 256).tolist()
    version, dtype = HEADERS.get(header[0] if header else 0, (None, "<u2"))
    if version is None:
        start, count = 0, max(size // 2, 1)
    elif size < 1024 or header[1] != version:
        raise ValueError(f"{path} has a header that is cut short, or not of version {version}: copy it again")
    else:
        start, count = 1024, header[2] + (header[3] << 32)
    expected = start + count * np.dtype(dtype).itemsize
    if size != expected:
        raise ValueError(f"{path} has {size} bytes where {expected} are expected: copy it again, or "
                         "delete it if it can be made again")
    return np.memmap(path, dtype, "r", offset=start) if count else np.empty(0, dtype)


def write_shard(path: Path, pieces: Iterable[np.ndarray], n_vocab: int) -> None:
    """Writes tokens under a temporary name, then their count in the header, and only then gives the name."""
    magic = 20240520 if n_vocab <= 2**16 else 20240801
    version, dtype = HEADERS[magic]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, count = path.with_name(path.name + ".tmp"), 0
    with open(unfinished, "wb") as file:
        file.write(bytes(1024))
        for piece in pieces:
            file.write(piece.astype(dtype).tobytes())
            count += len(piece)
        file.seek(0)
        file.write(np.array([magic, version, count % 2**32, count >> 32], "<u4").tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
