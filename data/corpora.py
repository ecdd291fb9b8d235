"""Corpora -> token shards: the name that --data= gives becomes tokens for training and validation.

python, shakespeare, openwebtext, fineweb    texts that many know; the last two are large
FILE            a text in UTF-8
FOLDER          its .bin shards (data/shards.py) or, where it has none, the .txt texts at any depth,
                or the .jsonl and .parquet of documents (data/documents.py), or its .npy shards
A,B  or  'A*'   files of one of these kinds; data/files.py says which files these are, and which are
                held out, data/texts.py how several texts become one
"""

import difflib
import hashlib
import os
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import texts
from data.dataset import Tokens
from data.documents import Damage, Documents, parts_of
from data.download import download, hexdigest, making, progress
from data.files import divided, holds_documents, is_shard, listed
from data.pieces import check_end, encoded, pieces_of
from data.shards import read_shard, read_shards, write_shard
from data.tokenizer import Tokenizer

CORPORA = ("python", "shakespeare", "openwebtext", "fineweb")
CHAR_RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
OPENWEBTEXT = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets"
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
# More text than this is prepared beforehand (data/prepare.py): here all of it is in memory.
DOCUMENTS = 4 * 2**30  # bytes
# Every token of smaller shards is checked, and hashed, before training; larger ones are sampled.
SMALL = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Corpus:
    """Tokens for training and validation, and the tokenizer that made them.

    sha256: of the text, or of the shards; of large shards it covers names, sizes, the first 64 KiB
    and 64 stretches.
    """

    name: str
    sha256: str
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens


def load(
    data: str,
    tokenizer: str,
    cache_dir: str,
    url: str | None = None,
    vocab_size: int | None = None,
    field: str = "text",
) -> Corpus:
    """The corpus named `data`. Downloads and tokens are kept in `cache_dir`.

    python        this interpreter's standard library; validation is whole files, 7 % of the bytes
    shakespeare   tinyshakespeare, 1.1 MB; validation is the last 10 %
    openwebtext   21 parts, or the first N with `openwebtext:N`, each 0.6 GB to download, 0.43
                  billion gpt2 tokens or so; validation is one document in 2000. Archives may be
                  deleted once tokenised
    fineweb       9 files of 100 million gpt2 tokens, 0.2 GB each, or the first N of 103 with
                  `fineweb:N`
    FILE          any text in UTF-8, without its byte order mark (with the tokenizer `bytes` any
                  file at all, such as music); validation is the last 10 %
    FOLDER, LIST  shards, texts or documents, see data/files.py, data/texts.py, data/documents.py

    tokenizer: a name, see data/tokenizer.py; url: a mirror, a folder on the web (or file:///...)
    with the same file names; vocab_size: the model's, where it is larger than the tokenizer's;
    field: where .jsonl and .parquet have their text. Raises ValueError for whatever a user can get
    wrong. Let one process per machine prepare the cache before the others load it.
    """
    name, _, count = data.partition(":")
    for option, given in (("data", data), ("data_dir", cache_dir)):
        if not (given.isprintable() and 0 < len(given) < 500):
            raise ValueError(
                f"--{option}={given[:50]!r} is empty, too long, or has characters that no "
                "terminal shows: give that file or folder a plain name"
            )
    # Python leaves ~NAME as it is where no user has that name.
    cache = Path(os.path.expanduser(cache_dir))
    if cache_dir.startswith("~") and str(cache).startswith("~"):
        raise ValueError(f"--data_dir={cache_dir}: nobody here has that home; type the whole path")
    chosen = Tokenizer(tokenizer)
    if field != "text" and name in CORPORA:
        raise ValueError(f"--data_field={field} says nothing about --data={data}: leave it out")
    if url and name not in CORPORA[1:]:
        raise ValueError(
            f"--data_url={url} is a mirror for {', '.join(CORPORA[1:])}; --data={data} "
            "downloads nothing: leave --data_url= out"
        )
    # A broken disk, connection or archive is no bug of ours: the user gets one line, no traceback.
    try:
        if data == "python":
            corpus = _python(chosen, cache)
        elif data == "shakespeare":
            corpus = _shakespeare(chosen, cache, url or CHAR_RNN)
        elif name == "openwebtext":
            n_parts = _number(data, count, 21, 21)
            corpus = _openwebtext(data, n_parts, chosen, cache, url or OPENWEBTEXT)
        elif name == "fineweb":
            n_files = _number(data, count, 9, 103)
            corpus = _fineweb(data, n_files, chosen, cache, url or FINEWEB)
        else:
            files = listed(data)
            if not files:
                raise ValueError(_unknown(data, name))
            if field != "text" and not any(map(holds_documents, files)):
                raise ValueError(
                    f"--data_field={field} is a field of .jsonl and .parquet, and --data={data} "
                    "names none: leave --data_field= out"
                )
            corpus = _files(data, files, chosen, cache, vocab_size, field)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(
            f"--data={data} cannot be read, or cannot be kept in {cache}: {error}"
        ) from error
    # Ids outside the vocabulary are refused now, and not after days.
    for tokens in (corpus.train, corpus.val):
        _check_ids(tokens, vocab_size or corpus.tokenizer.n_vocab)
    return corpus


def _unknown(data: str, name: str) -> str:
    """What to tell a user whose --data= names nothing."""
    near = "".join(f" did you mean {c}?" for c in difflib.get_close_matches(name, CORPORA, 1))
    return (
        f"--data={data} does not exist:{near} it takes {', '.join(CORPORA)}, a text file, "
        "a folder of .bin shards, .txt texts, .jsonl or .parquet, or a list a.txt,b.txt"
    )


def _check_ids(tokens: Tokens, vocab_size: int) -> None:
    """Raises ValueError for an id outside the vocabulary; a sample of large shards is checked."""
    small = sum(shard.nbytes for shard in tokens.shards) <= SMALL
    for shard, end in zip(tokens.shards, tokens.ends):
        stretches = [(0, len(shard))] if small else _stretches(len(shard))
        for start, stop in stretches:
            first = end - len(shard) + start
            tokens.check(shard[start:stop], first, vocab_size)


def _number(data: str, count: str, default: int, most: int) -> int:
    """How many files `data` asks for after its colon."""
    if ":" in data and not (count.isdecimal() and 1 <= int(count) <= most):
        raise ValueError(f"--data={data}: after the colon goes a number of files, from 1 to {most}")
    return int(count or default)


def _stretches(n: int) -> list[tuple[int, int]]:
    """(start, stop) of the beginning of n tokens, and of 64 short stretches spread over them."""
    return [(0, 2**15), *((i, i + 2048) for i in range(0, n, n // 64 + 1))]


# ---- files ---------------------------------------------------------------------------------------
def _files(
    data: str,
    files: list[Path],
    tokenizer: Tokenizer,
    cache: Path,
    vocab_size: int | None,
    field: str,
) -> Corpus:
    """Shards, documents or texts. Shards whose tokenizer nobody knows have the tokenizer `ids`."""
    shards = [path for path in files if is_shard(path)]
    others = [path for path in files if path not in shards]
    if not shards and any(map(holds_documents, files)):
        return _from_documents(data, files, tokenizer, cache, field)
    if not shards:
        return _texts(data, files, tokenizer, cache)
    if others:
        raise ValueError(
            f"--data={data} names shards and others, {shards[0].name} and {others[0].name}: give"
            " one kind"
        )
    if len(files) == 1 and Path(os.path.expanduser(data)).is_file():
        raise ValueError(f"--data={data} is a shard: give its folder, or a list train.bin,val.bin")
    found = divided(data, files)
    # nanoGPT's prepare.py for characters leaves its table as a pickle, which we never open.
    table = files[0].parent / "meta.pkl"
    if tokenizer.name != "ids" and table.exists():
        most = max(int(ids.max(initial=0)) for ids in read_shards(files, vocab_size or 2**16))
        raise ValueError(
            f"{table} says that these ids are of nanoGPT's own table, mostly characters, and not"
            f" {tokenizer.name}: type --tokenizer=ids --vocab_size={most + 1}, or the size that"
            " prepare.py printed"
        )
    # `bytes` is the default: a larger vocabulary shows that another tokenizer made these ids.
    if tokenizer.name == "bytes" and (vocab_size or 0) > 256:
        tokenizer = Tokenizer("ids", vocab_size)
    small = sum(path.stat().st_size for path in files) <= texts.IN_MEMORY
    corpus = _shards(data, found["train"], found["val"], tokenizer, vocab_size, small)
    # The type may have been guessed from the ids: say what was found, unless it is the usual one.
    widths = {shard.itemsize for tokens in (corpus.train, corpus.val) for shard in tokens.shards}
    if widths <= {2}:
        return corpus
    shown = " and ".join(map(str, sorted(widths)))
    return replace(corpus, name=f"{data} (ids of {shown} bytes)")


def tokenizer_of(data: str, tokenizer: str, vocab_size: int) -> Tokenizer:
    """The tokenizer that load() would find, even where the data are no longer there.

    Shards whose tokenizer nobody gave have `ids`.
    """
    if tokenizer != "bytes" or vocab_size <= 256 or data.partition(":")[0] in CORPORA:
        return Tokenizer(tokenizer)
    try:
        files = listed(data)
    except (ValueError, OSError):
        files = []
    if files:
        are_ids = is_shard(files[0])
    else:
        # A name without a suffix was the name of a folder, most likely of shards.
        are_ids = is_shard(Path(data)) or not Path(data).suffix
    return Tokenizer("ids", vocab_size) if are_ids else Tokenizer("bytes")


# ---- text ----------------------------------------------------------------------------------------
def _python(tokenizer: Tokenizer, cache: Path) -> Corpus:
    """The standard library's source.

    Ordered by the sha256 of the file names, so that any stretch is a fair sample of the modules.
    """
    # Only modules that Python names: the folder may hold other people's modules, too.
    root = sysconfig.get_path("stdlib")
    names = [f"{module}.py" for module in sys.stdlib_module_names]
    # Some systems leave these out, or have other people's packages there: the text should not
    # depend on that.
    skip = {
        "test",
        "tests",
        "idlelib",
        "pydoc_data",
        "turtledemo",
        "site-packages",
        "dist-packages",
    }
    for module in sys.stdlib_module_names - skip:
        for folder, inner, files in os.walk(os.path.join(root, module)):
            inner[:] = set(inner) - skip
            above = os.path.relpath(folder, root).replace(os.sep, "/")
            names += [f"{above}/{file}" for file in files if file.endswith(".py")]
    names = [name for name in names if os.path.isfile(os.path.join(root, name))]
    names.sort(key=lambda name: hexdigest(name.encode()))
    if not names:
        raise ValueError(f"--data=python finds no source in {root}: use --data= with a text file")
    files = []
    for name in names:
        with open(os.path.join(root, name), "rb") as file:
            content = file.read()
        # Windows ends lines in another way, and the same text must have the same sha256.
        if b"\r" in content:  # found at once where there is none, unlike the pair
            content = content.replace(b"\r\n", b"\n")
        files.append(content)
    # Whole files are held out: the first half of a file would help to guess the second.
    ends = np.cumsum([len(file) for file in files])
    cut = ends[np.searchsorted(ends, 0.07 * ends[-1])]
    text = np.frombuffer(b"".join(files), np.uint8)
    return _tokenised("python", [text[cut:]], [text[:cut]], hexdigest(text), tokenizer, cache)


def _shakespeare(tokenizer: Tokenizer, cache: Path, url: str) -> Corpus:
    file = download(
        f"{url}/input.txt",
        cache / "shakespeare" / "input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    )
    return _texts("shakespeare", [file], tokenizer, cache)


def _texts(data: str, files: list[Path], tokenizer: Tokenizer, cache: Path) -> Corpus:
    """One text, or several as one; the last tenth is held out unless names say what is."""
    any_bytes = tokenizer.name == "bytes"
    found = divided(data, files)
    train_texts = texts.read(data, found["train"], any_bytes)
    val_texts = {}
    val_continues = False
    if "val" in found:
        val_texts = texts.read(f"{data} (val)", found["val"], any_bytes)
        train = [*train_texts.values()]
        val = [*val_texts.values()]
        held_out = texts.some([path.name for path in found["val"]])
    else:
        train, val = texts.hold_out([*train_texts.values()])
        held_out = "the last tenth"
        # One part more than texts: what is held out begins in the middle of one.
        val_continues = len(train) + len(val) > len(train_texts)
    # A resumed run must find the same text, byte for byte: the sha256 is of all of it.
    sha256 = texts.sha256(train_texts | val_texts)
    corpus = _tokenised(data, train, val, sha256, tokenizer, cache, val_continues)
    if len(files) == 1:
        return corpus
    # The name is shown when a run starts: there a user sees a file that was left out by mistake.
    used = train_texts | val_texts
    chosen = dict.fromkeys(found["train"] + found.get("val", []))
    mark = "a line break" if tokenizer.end_of_text is None else tokenizer.end
    told = [f"{len(used)} texts, {mark} between two", f"held out: {held_out}"]
    for what, paths in (
        ("left alone", [path for path in files if path not in chosen]),
        ("empty", [path for path in chosen if path not in used]),
    ):
        if paths:
            told.append(f"{what}: {texts.some([path.name for path in paths])}")
    return replace(corpus, name=f"{data} ({'; '.join(told)})")


def _from_documents(
    data: str, files: list[Path], tokenizer: Tokenizer, cache: Path, field: str
) -> Corpus:
    """The documents of all files, one after another, as several texts; the same rules hold."""
    found = divided(data, files)
    any_bytes = tokenizer.name == "bytes"
    digest = hashlib.sha256()
    parts = {}
    told = []
    for split, paths in found.items():
        some, n_empty = _documents_of(data, paths, field, any_bytes)
        # Not of the files: the same documents as .jsonl and as .parquet are the same corpus.
        digest.update(f"{split} {len(some)}\n".encode())
        for document in some:
            digest.update(hashlib.sha256(document).digest())
        told.append(f"{len(some)} documents {'held out' if split == 'val' else 'to train on'}")
        told += [f"{n_empty} empty"] if n_empty else []
        parts[split] = some
    if not any(len(some[0]) for some in parts.values() if some):
        raise ValueError(f"--data={data} has no documents: give files with some, or --data=python")
    val_continues = False
    if "val" not in parts:
        n_documents = len(parts["train"])
        parts["train"], parts["val"] = texts.hold_out(parts["train"])
        val_continues = len(parts["train"]) + len(parts["val"]) > n_documents
        told[0] = f"{n_documents} documents; held out: the last tenth"
    mark = "a line break" if tokenizer.end_of_text is None else tokenizer.end
    told.append(f"{mark} between two")
    left = [path.name for path in files if path not in sum(found.values(), [])]
    if left:
        told.append(f"left alone: {texts.some(left)}")
    name = f"{data} ({'; '.join(told)})"
    train, val = parts["train"], parts["val"]
    sha256 = digest.hexdigest()
    corpus = _tokenised(data, train, val, sha256, tokenizer, cache, val_continues)
    return replace(corpus, name=name)


def _documents_of(
    data: str, paths: list[Path], field: str, any_bytes: bool
) -> tuple[list[np.ndarray], int]:
    """([(N,) uint8, a document each], the number of empty ones). Raises ValueError."""
    size = sum(path.stat().st_size for path in paths)
    text = bytearray()
    ends = []
    n_empty = 0
    with progress("reading documents", size) as bar:
        for path in paths:
            for part in parts_of(path, path.stat().st_size or 1):
                for document in Documents(part, field, any_bytes):
                    if isinstance(document, Damage):
                        raise ValueError(
                            f"{document}; mend it, name another field by --data_field=, or leave "
                            f"such out: python -m data.prepare {data} OUT --skip_damaged"
                        )
                    if len(text) + len(document) > DOCUMENTS:
                        raise ValueError(
                            f"--data={data} has more than {DOCUMENTS >> 30} GiB of text: make "
                            f"shards of it, python -m data.prepare {data} OUT, and type --data=OUT"
                        )
                    n_empty += not len(document)
                    if len(document):
                        text += document
                        ends.append(len(text))
                bar.update(part.size)
    whole = np.frombuffer(text, np.uint8)
    return [whole[start:end] for start, end in zip([0, *ends], ends)], n_empty


def _tokenised(
    name: str,
    train: list[np.ndarray],
    val: list[np.ndarray],
    sha256: str,
    tokenizer: Tokenizer,
    cache: Path,
    val_continues: bool = False,
) -> Corpus:
    """Texts, each (N,) uint8 -> Corpus. val_continues: the first in val is the rest of a text.

    Bytes are tokens already; other tokens are made once and cached.
    """
    if tokenizer.name == "ids":
        raise ValueError(
            f"--tokenizer=ids is for .bin shards; --data={name} is text: use --tokenizer=bytes"
        )
    if max(len(train), len(val)) > 1:
        check_end(name, tokenizer)
    found = []
    for split, some, continues in (("train", train, False), ("val", val, val_continues)):
        # Bytes of text are their own ids.
        if tokenizer.name == "bytes":
            shards = texts.as_tokens(some, tokenizer.end_of_text)
        else:
            path = cache / f"{sha256[:32]}-{tokenizer.key}" / f"{split}.bin"
            size = sum(map(len, some))
            with making(path) as missing, progress(f"tokenising {split}", size) as bar:
                if missing:
                    pieces = pieces_of(name, some, tokenizer, continues, bar.update)
                    write_shard(path, encoded(pieces, tokenizer), tokenizer.n_vocab)
            shards = [read_shard(path)]
        found.append(Tokens(shards, f"{name} ({split})"))
    return Corpus(name, sha256, tokenizer, *found)


def _openwebtext(name: str, count: int, tokenizer: Tokenizer, cache: Path, url: str) -> Corpus:
    """Gokaslan and Cohen, 2019: parts of about 1000 .tar.xz archives of some 400 documents each."""
    check_end(name, tokenizer)
    train = []
    val = []
    folder = cache / f"openwebtext-{tokenizer.key}"
    for i in range(count):
        train.append(folder / f"train_{i:02d}.bin")
        val.append(folder / f"val_{i:02d}.bin")
        # The validation file of a part is written last: where it exists, the part is complete.
        with making(val[i]) as missing:
            if missing:
                _openwebtext_part(
                    f"urlsf_subset{i:02d}.tar", train[i], val[i], tokenizer, cache, url
                )
    return _shards(name, train, val, tokenizer)


def _openwebtext_part(
    file: str, train: Path, val: Path, tokenizer: Tokenizer, cache: Path, url: str
) -> None:
    archive = download(f"{url}/{file}", cache / "openwebtext" / file)
    held_out = []
    # Training documents go to the disk as they come; the few that are held out fit in memory.
    with progress(f"tokenising {file}", archive.stat().st_size) as bar:
        pieces = _ended(_documents(archive, held_out, bar))
        write_shard(train, encoded(pieces, tokenizer), tokenizer.n_vocab)
    write_shard(val, encoded(_ended(held_out), tokenizer), tokenizer.n_vocab)


def _ended(documents: Iterable[str]) -> Iterator[tuple[str, bool] | None]:
    """The documents as pieces, and None after each."""
    for document in documents:
        yield document, False
        yield None


def _documents(archive: Path, held_out: list[str], bar) -> Iterator[str]:
    """The documents of a part, but for one in 2000, which goes to `held_out`.

    The sha256 of a document chooses: the same documents whatever else is read.
    """
    with tarfile.open(archive) as outer:
        for member in outer:
            if member.name.endswith(".xz"):
                for raw in _unpacked(outer.extractfile(member)):
                    text = raw.decode(errors="replace")
                    if int(hexdigest(raw), 16) % 2000:
                        yield text
                    else:
                        held_out.append(text)
            bar.update(member.size)


def _unpacked(file) -> Iterator[bytes]:
    """The files in a .tar.xz archive."""
    with tarfile.open(fileobj=file, mode="r:xz") as archive:
        for member in archive:
            if member.isfile():
                yield archive.extractfile(member).read()


# ---- shards --------------------------------------------------------------------------------------
def _fineweb(name: str, count: int, tokenizer: Tokenizer, cache: Path, url: str) -> Corpus:
    if tokenizer.name != "gpt2":
        raise ValueError(
            f"--data={name} is made of gpt2 tokens, not of {tokenizer.name}: use --tokenizer=gpt2"
        )
    # modded-nanogpt's shards: one for validation, the others for training.
    files = ["fineweb_val_000000.bin"]
    files += [f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1)]
    val, *train = [download(f"{url}/{file}", cache / "fineweb" / file) for file in files]
    return _shards(name, train, [val], tokenizer)


def _shards(
    name: str,
    train: list[Path],
    val: list[Path],
    tokenizer: Tokenizer,
    vocab_size: int | None = None,
    in_memory: bool = False,
) -> Corpus:
    paths = train + val
    shards = read_shards(paths, vocab_size or tokenizer.n_vocab, in_memory)
    # A resumed run must find the same data. A sample of large shards is hashed, for this is done at
    # every start, and shards that are made anew differ all over.
    digest = hashlib.sha256()
    whole = sum(path.stat().st_size for path in paths) <= SMALL
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        raw = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        if whole:
            digest.update(raw)
            continue
        digest.update(raw[: 2**16])
        for start in range(0, size, size // 64 + 1):
            digest.update(raw[start : start + 4096])
    n = len(train)
    return Corpus(
        name,
        digest.hexdigest(),
        tokenizer,
        Tokens(shards[:n], f"{name} (train)", [path.name for path in train]),
        Tokens(shards[n:], f"{name} (val)", [path.name for path in val]),
    )
