"""tokenizer.json, Hugging Face's file of a tokenizer, by their package `tokenizers` (optional).

The package encodes; data/tokenizer_spec.py says which bytes an id stands for. What else it leaves
open is decided here:

End of a document  `eos_token` of the files beside it (BESIDE), or else a usual name (ENDS)
Start of one       what the file sets before a text, an id such as <s> or a space, goes before each
                   document once: a long text comes in pieces, and later ones `continue` it
Names in a text    `</s>` that somebody typed is four letters, not the end of a document. Added
                   tokens that are not special, such as <think>, are what they are
Cutting, filling   `truncation`, `padding` and `dropout` in the file are ignored
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path

from data import tokenizer_spec

FILE = "tokenizer.json"
# Files beside it -> their field that names the end of a document; an _id field has ids.
BESIDE = {
    "tokenizer_config.json": "eos_token",
    "special_tokens_map.json": "eos_token",
    "config.json": "eos_token_id",
    "generation_config.json": "eos_token_id",
}
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "<|im_end|>")


class TokenizerFile:
    """A tokenizer.json.

    special: name -> id; end_of_text: the id that ends a document, or None; end: its name, and who
    says so; start: ids that go before each document; bytes: id -> bytes of text, or None; warnings:
    a sentence each; may_be_cut: long texts may come in pieces. Raises ValueError where the file is
    none, or the package is missing.
    """

    def __init__(self, path: str):
        self.path = find(path)
        self.raw, spec = read(self.path)
        plain = self._loaded(spec)
        check_ids(self.path, spec, plain)
        added = plain.get_added_tokens_decoder()  # id -> its token
        vocab = plain.get_vocab(with_added_tokens=True)
        self.n_vocab = max(vocab.values(), default=-1) + 1
        if not 0 < self.n_vocab < 2**24:
            raise ValueError(f"{self.path} has ids up to {self.n_vocab - 1:,}: it is damaged")
        self.special = {token.content: i for i, token in added.items() if token.special}
        self.start = set_before(plain, vocab)
        name, self.end = end_of_document(self.path, self.special, vocab)
        self.end_of_text = vocab.get(name)
        is_special = name is None or name in self.special
        if not is_special:
            self.special[name] = self.end_of_text
            for token in spec.get("added_tokens") or []:
                token["special"] = bool(token.get("special")) or token["content"] == name
        # All that decides ids; not how they become text again.
        deciding = {k: v for k, v in spec.items() if k not in ("decoder", "post_processor")}
        text = json.dumps([deciding, self.end_of_text, self.start])
        self.hash = hashlib.sha256(text.encode()).hexdigest()[:12]

        words = plain.get_vocab(with_added_tokens=False)
        to_bytes = tokenizer_spec.alphabet(spec)
        self.bytes = None
        if to_bytes is not None:
            self.bytes = {i: to_bytes(word) for word, i in words.items()}
            for name, i in vocab.items():
                if name not in words or name in self.special:
                    self.bytes[i] = name.encode(errors="replace")
        first = tokenizer_spec.unspeakable(spec, self.special)
        later = tokenizer_spec.without_prefix(first)
        self.may_be_cut = tokenizer_spec.may_be_cut(spec)
        self.first = plain if is_special and first is spec else self._loaded(first)
        self.later = self.first if later == first else self._loaded(later)
        self.sets_space = False
        if self.bytes is not None:
            self.sets_space = self.join(self.encode("a")).startswith(b" ")
        self.warnings = [f"{self.path}: {trap}" for trap in tokenizer_spec.traps(spec, words)]

    def _loaded(self, spec: dict):
        """The package's tokenizer of a parsed file. Names of special tokens are text to it."""
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"--tokenizer={self.path} needs `pip install tokenizers`; `bytes` needs nothing"
            ) from None
        try:
            found = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except (KeyboardInterrupt, SystemExit):
            raise
        # Some damage makes the package panic, which is no Exception.
        except BaseException as error:
            raise ValueError(
                f"tokenizers {tokenizers.__version__} cannot use {self.path}: {short(error)}"
            ) from None
        found.encode_special_tokens = True
        return found

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """The ids of a text, or of a later piece of one; without those of `start`."""
        tokenizer = self.later if continues else self.first
        # A lone surrogate has no UTF-8: it becomes a question mark.
        text = text.encode(errors="replace").decode()
        try:
            # A batch of one text: unlike encode(), it lets other threads run.
            (found,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:
            raise ValueError(f"{self.path} cannot encode the text: {short(error)}") from error
        return found.ids

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids; 0xff, which is never UTF-8, for an unused id."""
        return b"".join(self.bytes.get(i, b"\xff") for i in ids)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, without what the file sets before a text."""
        if ids[: len(self.start)] == self.start:
            ids = ids[len(self.start) :]
        if self.bytes is None:
            text = self.first.decode(ids, skip_special_tokens=False)
            return text.replace(tokenizer_spec.NEVER, "")
        # A character may be divided between two tokens.
        text = self.join(ids).decode(errors="replace")
        return text.removeprefix(" ") if self.sets_space else text

    def save(self, folder: Path) -> None:
        """Writes the file, and what lies beside it, so that `folder` is this tokenizer.

        For transformers, too, which would take a class by the model's family, with other tokens.
        """
        beside = self.path.with_name("tokenizer_config.json")
        said = {"tokenizer_class": "PreTrainedTokenizerFast"}
        with contextlib.suppress(OSError, ValueError, RecursionError, TypeError):
            said = dict(json.loads(beside.read_bytes()))
        for name, i in self.special.items():
            if i == self.end_of_text:
                said["eos_token"] = name
        files = {FILE: self.raw, beside.name: json.dumps(said).encode()}
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = folder / name
            if not path.exists() or path.read_bytes() != content:
                unfinished = folder / f"{name}.tmp"
                unfinished.write_bytes(content)
                os.replace(unfinished, path)


def short(error: BaseException) -> str:
    """An error's message in one line, short enough for a sentence."""
    return " ".join(str(error).split())[:200]


def find(path: str) -> Path:
    """The file at `path`, or in the folder there. Raises ValueError where there is none."""
    found = Path(path)
    if found.is_dir():
        found = found / FILE
        others = [p.name for p in sorted(Path(path).iterdir()) if is_another_kind(p)]
        if others and not found.exists():
            raise ValueError(f"{path} has no {FILE}, but {others[0]}; {CONVERT}")
    if not found.is_file():
        raise ValueError(f"--tokenizer={path}: there is no file {found}; give a {FILE}")
    if is_another_kind(found):
        raise ValueError(f"{path} is a vocabulary of another kind; {CONVERT}")
    return found


CONVERT = f"transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW) writes {FILE}"


def is_another_kind(path: Path) -> bool:
    return path.suffix in (".model", ".tiktoken", ".bpe") or path.name == "merges.txt"


def read(path: Path) -> tuple[bytes, dict]:
    """(its bytes, parsed). Raises ValueError where they are no tokenizer."""
    try:
        raw = path.read_bytes()
        spec = json.loads(raw)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is cut short, or no JSON ({short(error)}): copy it again"
        ) from None
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict):
        raise ValueError(
            f"{path} is JSON, but no tokenizer: that has a field `model` with a vocabulary; give "
            f"the {FILE} of a model"
        )
    if not model.get("vocab"):
        raise ValueError(f"the model in {path} has no vocabulary: give the {FILE} of a trained one")
    # They would cut texts, fill them up, and draw other ids each time.
    spec |= {"truncation": None, "padding": None}
    if "dropout" in model:
        model["dropout"] = None
    return raw, spec


def check_ids(path: Path, spec: dict, tokenizer) -> None:
    """Raises ValueError where the package gives an added token another id than the file does.

    It counts on from the vocabulary's size, whatever the file says.
    """
    for token in spec.get("added_tokens") or []:
        found = tokenizer.token_to_id(token["content"])
        if found != token["id"]:
            raise ValueError(
                f"{path} gives {token['content']!r} the id {token['id']}, and the package "
                f"tokenizers makes it {found}, for ids before it have no token: add tokens for "
                "these to `added_tokens`"
            )


def end_of_document(path: Path, special: dict, vocab: dict) -> tuple[str | None, str]:
    """(name of the token that ends a document, the same and who says so), or (None, "")."""
    names = {i: name for name, i in vocab.items()}
    for file, field in BESIDE.items():
        try:
            said = json.loads((path.parent / file).read_bytes())[field]
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            continue
        if isinstance(said, dict):
            said = said.get("content")
        # A chat model has several ends: of a document, then of a reply.
        if isinstance(said, list) and said:
            said = said[0]
        name = names.get(said) if isinstance(said, int) else said
        if isinstance(name, str) and name in vocab:
            return name, f"{name} ({field} of {file})"
    for name in ENDS:
        if name in special:
            return name, f"{name} (a usual name)"
    return None, ""


def set_before(tokenizer, vocab: dict) -> list[int]:
    """The ids that the file sets before each text, such as <s>."""
    # A vocabulary may have no "a", and leave it out: then a word of its own tells.
    for text in ("a", *itertools.islice(vocab, 1000)):
        bare = tokenizer.encode(text, add_special_tokens=False).ids
        full = tokenizer.encode(text, add_special_tokens=True).ids
        for i in range(len(full) - len(bare) + 1):
            if bare and full[i : i + len(bare)] == bare:
                return full[:i]
    return []
