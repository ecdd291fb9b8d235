"""What a tokenizer.json says of itself, as functions of the parsed file: no package is needed.

    normalizer -> pre_tokenizer -> model -> post_processor -> decoder       each may be a Sequence

Bytes of a token   by the alphabet in which the vocabulary is written (`alphabet`):
                     ByteLevel    a letter for each byte; that of the space is Ġ
                     Metaspace    plain text, where ▁ is a space; and, with byte_fallback, <0x0A>
                                  is the byte 10
                   Nobody knows them where a pre-tokenizer drops text (Whitespace), or pieces are
                   glued in another way (WordPiece's ##)
Prefix             the space that some files set before a text (`without_prefix`)
Names              `</s>` that somebody typed is text (`unspeakable`)
Traps              `traps`

Kudo and Richardson 2018 (1808.06226) for ▁; Radford et al. 2019 for the letters of bytes.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterator

# These pre-tokenizers drop text, and of these decoders we do not know the bytes.
DROPPING = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit"}
GLUING = {"WordPiece", "BPEDecoder", "CTC"}
# A count with a plus behind it; not \x{20}+, which is a letter.
COUNTED = re.compile(r"(?<!\\x)(\{\d*,?\d*\})\+")
# No text has this letter, so none spells a name that begins with it.
NEVER = "\ufdd0"


def parts(component) -> list[dict]:
    """The parts of a normalizer, pre-tokenizer or decoder, in their order."""
    if not isinstance(component, dict):
        return []
    for inner in ("normalizers", "pretokenizers", "decoders"):
        if isinstance(component.get(inner), list):
            return [part for each in component[inner] for part in parts(each)]
    return [component]


def types(spec: dict, *names: str) -> set[str]:
    return {str(part.get("type")) for name in names for part in parts(spec.get(name))}


# ---- bytes ---------------------------------------------------------------------------------------
def alphabet(spec: dict) -> Callable[[str], bytes] | None:
    """A function from a word of the vocabulary to its bytes; None where nobody knows them."""
    model = spec["model"]
    drops = DROPPING & types(spec, "pre_tokenizer") or any(
        part.get("behavior") == "Removed" for part in parts(spec.get("pre_tokenizer"))
    )
    glues = GLUING & types(spec, "decoder")
    marks = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if drops or glues or marks:
        return None
    if is_byte_level(spec):
        return bytes_of_letters
    falls_back = bool(model.get("byte_fallback")) or "ByteFallback" in types(spec, "decoder")
    return functools.partial(bytes_of_text, space(spec), falls_back)


def is_byte_level(spec: dict) -> bool:
    return "ByteLevel" in types(spec, "normalizer", "pre_tokenizer", "decoder")


def space(spec: dict) -> str:
    """The letter that stands for a space: "▁" in nearly all files."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        for part in parts(spec.get(name)):
            if part.get("type") == "Metaspace":
                return part.get("replacement", "▁")
            if part.get("type") == "Replace" and part.get("pattern") == {"String": " "}:
                return part.get("content") or " "
    return " "


@functools.cache
def byte_letters() -> dict[str, int]:
    """The letter of each byte: itself where it can be seen, else one from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    seen += range(ord("®"), ord("ÿ") + 1)
    unseen = sorted({*range(256)} - {*seen})
    letters = {chr(byte): byte for byte in seen}
    return letters | {chr(256 + i): byte for i, byte in enumerate(unseen)}


def bytes_of_letters(word: str) -> bytes:
    """Bytes by ByteLevel's letters; a word with another letter is plain text."""
    letters = byte_letters()
    if all(letter in letters for letter in word):
        return bytes(letters[letter] for letter in word)
    return word.encode(errors="replace")


def bytes_of_text(space: str, falls_back: bool, word: str) -> bytes:
    """Bytes of a word in plain text; falls_back: <0x0A> is one byte."""
    if falls_back and re.fullmatch("<0x[0-9A-Fa-f]{2}>", word):
        return bytes([int(word[3:5], 16)])
    return word.replace(space, " ").encode(errors="replace")


# ---- the file changed ----------------------------------------------------------------------------
def without_prefix(spec: dict) -> dict:
    """The same file for a later piece of a text: no space is set before it."""
    # All but the vocabulary, which is large.
    spec = {k: v if k == "model" else copy.deepcopy(v) for k, v in spec.items()}
    for part in parts(spec.get("pre_tokenizer")):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)  # of older files
        elif part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
    normalizers = parts(spec.get("normalizer"))
    kept = [part for part in normalizers if part.get("type") != "Prepend"]
    if len(kept) < len(normalizers):
        spec["normalizer"] = {"type": "Sequence", "normalizers": kept}
    return spec


def may_be_cut(spec: dict) -> bool:
    """Has a long text the same tokens when it is encoded in pieces, later ones `without_prefix`?

    Not where white space at both ends of a piece is dropped, where a space is set before each word,
    or where it is set after an added token.
    """
    if "Strip" in types(spec, "normalizer"):
        return False
    for part in parts(spec.get("pre_tokenizer"))[1:]:
        # Behind another splitter each word begins like a text.
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space", True):
            return False
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never":
            return False
    sets_space = without_prefix(spec) != spec
    return not (sets_space and any(not t["special"] for t in spec.get("added_tokens") or []))


def unspeakable(spec: dict, special: dict[str, int]) -> dict:
    """The same file, whose special tokens have names that no text spells.

    BPE makes words of pieces, and no pieces make such a name. Other models look whole words up and
    would find it. A model's token for the unknown keeps its name, for the model looks for that.
    """
    model = spec["model"]
    if model.get("type") == "BPE" and not model.get("ignore_merges"):
        return spec
    names = special.keys() - {model.get("unk_token")}
    spec = copy.deepcopy(spec)
    for token in spec.get("added_tokens") or []:
        if token["content"] in names:
            token["content"] = NEVER + token["content"]
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, list):  # of pairs, Unigram's
        for pair in vocab:
            if pair[0] in names:
                pair[0] = NEVER + pair[0]
    else:
        renamed = {NEVER + word if word in names else word: i for word, i in vocab.items()}
        spec["model"]["vocab"] = renamed
    return spec


# ---- what a user should know ---------------------------------------------------------------------
def traps(spec: dict, words: dict[str, int]) -> Iterator[str]:
    """The traps in a file, a sentence each. words: the model's vocabulary."""
    for pattern in patterns(spec):
        found = COUNTED.search(pattern)
        if found:
            yield (
                f"its pattern has {found[0]}, by which tiktoken means {found[1]} that gives nothing"
                " back, and the package tokenizers any number of these: long numbers get other "
                f"ids than tiktoken's; if that is not meant, write {found[1]} into the file"
            )
            break
    if alphabet(spec) is None:
        yield "it drops text, or marks pieces of words, so bits per byte are unknown"
    model = spec["model"]
    if is_byte_level(spec):
        missing = "a byte"
        knows_all = byte_letters().keys() <= words.keys()
    else:
        missing = "a letter"
        has_bytes = {f"<0x{byte:02X}>" for byte in range(256)} <= words.keys()
        knows_all = model.get("byte_fallback") and has_bytes
    if knows_all:
        return
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:  # Unigram's
        unknown = model["vocab"][model["unk_id"]][0]
    becomes = f"becomes {unknown}" if unknown else "is left out without a word"
    yield f"{missing} that its vocabulary lacks {becomes}"


def patterns(spec: dict) -> Iterator[str]:
    """The regular expressions in a file."""
    for name in ("normalizer", "pre_tokenizer"):
        for part in parts(spec.get(name)):
            pattern = part.get("pattern")
            if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
                yield pattern["Regex"]
