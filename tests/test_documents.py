"""Files of documents: the same tokens and the same run in every format; damage is a sentence."""

import gzip
import importlib.util
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import train
from checkpoint import load as checkpoint
from data import corpora, documents, files, megatron, prepare, shards
from data.documents import Damage, Documents, Part, parts_of
from data.tokenizer import Tokenizer
from settings import parse

WORDS = 'the cat sat on the mat and\tsaw é 文 "quotes" \\ \n more <|endoftext|> \r\n end. '.split(
    " "
)
DRAW = random.Random(0)
TRAIN = [" ".join(DRAW.choices(WORDS, k=DRAW.randrange(1, 90))) for _ in range(30)]
VAL = [" ".join(DRAW.choices(WORDS, k=61)) for _ in range(4)]
TINY = (
    "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --eval_every=2 --steps=3 "
    "--sample_tokens=0 --precision=fp32 --device=cpu --plot=false --optim=adamw --threads=1"
).split()
pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow, which is optional"
)
zstandard = pytest.mark.skipif(
    importlib.util.find_spec("zstandard") is None, reason="needs zstandard, which is optional"
)


# ---- the same documents in every format ----------------------------------------------------------
def jsonl(texts: list[str], field="text") -> bytes:
    lines = [json.dumps({"id": i, field: text}) for i, text in enumerate(texts)]
    return ("\n".join(lines) + "\n").encode()


def index(lengths: list[int], code: int) -> bytes:
    """Megatron's .idx of as many documents, a sequence each."""
    n = len(lengths)
    starts = (np.cumsum(lengths) - lengths) * np.dtype(megatron.INDEX[code]).itemsize
    head = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + bytes([code])
    head += np.array([n, n + 1], "<u8").tobytes() + np.array(lengths, "<i4").tobytes()
    return head + starts.astype("<i8").tobytes() + np.arange(n + 1, dtype="<i8").tobytes()


def write(folder: Path, kind: str, field="text") -> str:
    """TRAIN and VAL in files of this kind; what --data= takes."""
    folder.mkdir(parents=True)
    for split, texts in (("train", TRAIN), ("val", VAL)):
        path = folder / f"{split}.{kind}"
        ids = [[*text.encode(), 0] for text in texts]  # the byte 0 is the end of a text
        if kind == "txt":
            for i, text in enumerate(texts):
                (folder / split).mkdir(exist_ok=True)
                (folder / split / f"{i:03d}.txt").write_bytes(text.encode())
        elif kind == "jsonl":
            path.write_bytes(jsonl(texts, field))
        elif kind == "jsonl.gz":  # of several members
            lines = jsonl(texts).splitlines(True)
            path.write_bytes(
                gzip.compress(b"".join(lines[:2])) + gzip.compress(b"".join(lines[2:]))
            )
        elif kind == "jsonl.zst":  # of several frames
            import zstandard

            lines = jsonl(texts).splitlines(True)
            pack = zstandard.ZstdCompressor().compress
            path.write_bytes(pack(b"".join(lines[:2])) + pack(b"".join(lines[2:])))
        elif kind == "parquet":
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.table({"id": [*range(len(texts))], "text": texts})
            pyarrow.parquet.write_table(table, path, row_group_size=7)
        elif kind in ("uint16", "int32"):  # Megatron's
            code, dtype = {"uint16": (8, "<u2"), "int32": (4, "<i4")}[kind]
            (folder / f"{split}.bin").write_bytes(np.concatenate(ids).astype(dtype).tobytes())
            (folder / f"{split}.idx").write_bytes(index([*map(len, ids)], code))
        elif kind == "npy":
            np.save(path, np.concatenate(ids).astype(np.uint16))
    return str(folder)


def ids(corpus: corpora.Corpus) -> list[list[int]]:
    return [part.slice(0, len(part)).tolist() for part in (corpus.train, corpus.val)]


def load(data, tokenizer="bytes", cache="never made", **options) -> corpora.Corpus:
    return corpora.load(str(data), tokenizer, str(cache), **options)


def refused(data, **options) -> str:
    with pytest.raises(ValueError) as error:
        load(data, **options)
    said = str(error.value)
    assert "\n" not in said and len(said) < 700, said
    return said


PACKAGES = [pytest.param("parquet", marks=pyarrow), pytest.param("jsonl.zst", marks=zstandard)]


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", *PACKAGES])
def test_the_same_documents_in_any_format_are_the_same_tokens(tmp_path, kind):
    expected = ids(load(write(tmp_path / "jsonl", "jsonl")))
    assert expected == [[*"\0".join(texts).encode()] for texts in (TRAIN, VAL)]
    assert ids(load(write(tmp_path / "other", kind))) == expected


@pytest.mark.parametrize("kind", ["uint16", "int32", "npy"])
def test_shards_of_others_are_read_in_place_and_end_with_one_mark_more(tmp_path, kind):
    corpus = load(write(tmp_path / "other", kind))
    texts = ids(load(write(tmp_path / "jsonl", "jsonl")))
    assert ids(corpus) == [tokens + [0] for tokens in texts]
    for tokens in (corpus.train, corpus.val):  # nothing is copied when there is much of it
        path = tmp_path / "other" / tokens.files[0]
        assert isinstance(shards.read_shard(path, 256), np.memmap)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_without_val_in_a_name_the_last_tenth_is_held_out_as_of_texts(tmp_path, kind):
    if kind == "parquet" and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("needs pyarrow, which is optional")
    write(tmp_path / "a", kind)
    write(tmp_path / "b", "txt")
    expected = load(f"{tmp_path}/b/train")
    found = load(f"{tmp_path}/a/train.{kind}")
    assert ids(found) == ids(expected)
    assert "30 documents; held out: the last tenth; the byte 0 between two" in found.name


def test_the_hash_is_of_the_documents_and_not_of_the_files(tmp_path):
    first = load(write(tmp_path / "a", "jsonl"))
    assert load(write(tmp_path / "b", "jsonl.gz")).sha256 == first.sha256
    (tmp_path / "a" / "train.jsonl").write_bytes(jsonl([*TRAIN[:-1], TRAIN[-1] + "."]))
    assert load(tmp_path / "a").sha256 != first.sha256
    # Two documents are not the one that has both.
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_bytes(jsonl(["a" * 50 + "\0" + "b" * 50]))
    (tmp_path / "c" / "b.jsonl").write_bytes(jsonl(["a" * 50, "b" * 50]))
    one, two = (load(tmp_path / "c" / name) for name in ("a.jsonl", "b.jsonl"))
    assert sum(ids(one), []) == sum(ids(two), []) and one.sha256 != two.sha256
    # The borders between two documents, and between the splits, count.
    hashes = set()
    for known, held_out in ((["ab", "c"], ["d"]), (["a", "bc"], ["d"]), (["ab"], ["c", "d"])):
        for split, texts in (("train", known), ("val", held_out)):
            (tmp_path / "c" / f"{split}.jsonl").write_bytes(jsonl(texts))
        hashes.add(load(f"{tmp_path}/c/train.jsonl,{tmp_path}/c/val.jsonl").sha256)
    assert len(hashes) == 3


def weights(data: str, out: Path, *flags: str) -> tuple:
    result = train.main(parse.parse([f"--data={data}", f"--out_dir={out}", *TINY, *flags]))
    tensors = checkpoint.resolve(str(out)).tree("model")
    return result["loss"], result["val_loss"], {k: v.numpy().tobytes() for k, v in tensors.items()}


def test_the_same_documents_in_any_format_are_the_same_run_bitwise(tmp_path):
    kinds = ["txt", "jsonl", "int32"]
    if importlib.util.find_spec("pyarrow"):
        kinds.append("parquet")
    data = {kind: write(tmp_path / kind, kind) for kind in kinds}
    prepare.prepare(data["jsonl"], str(tmp_path / "prepared"), "bytes")
    data["prepared"] = tmp_path / "prepared"
    # One mark more, behind the last document, makes no sample more.
    lengths = [len(tokens) for tokens in ids(load(data["int32"]))]
    assert all((n - 1) // 16 == (n - 2) // 16 for n in lengths)
    runs = [weights(data[kind], tmp_path / f"run_{kind}") for kind in data]
    assert len(runs[0][2]) > 5 and all(run == runs[0] for run in runs[1:])


def test_the_field_is_named_and_a_wrong_name_is_told_what_there_is(tmp_path):
    where = write(tmp_path / "a", "jsonl", field="content")
    assert ids(load(where, field="content")) == ids(load(write(tmp_path / "b", "jsonl")))
    said = refused(where)
    assert f"{where}/train.jsonl, line 1: has no field 'text', but 'content', 'id'" in said
    assert "--data_field=" in said
    (tmp_path / "c.txt").write_text("plain " * 50)
    assert "leave --data_field= out" in refused(tmp_path / "c.txt", field="content")
    assert "says nothing about --data=python" in refused("python", field="content")


def test_texts_beside_documents_in_a_folder_are_asked_about(tmp_path):
    where = write(tmp_path / "a", "jsonl")
    (tmp_path / "a" / "README.txt").write_text("about")
    said = refused(where)
    assert (
        f"README.txt and train.jsonl: say which are data, such as --data='{where}/**/*.jsonl'"
        in said
    )
    assert len(load(f"{where}/**/*.jsonl").train) == len("\0".join(TRAIN).encode())
    # In a list somebody has said it: the text is one document more.
    both = load(f"{where}/train.jsonl,{where}/README.txt")
    assert bytes(sum(ids(both), [])).endswith(b"\0about")


def test_files_of_a_test_set_are_left_alone(tmp_path):
    (tmp_path / "train-0.jsonl").write_bytes(jsonl(TRAIN))
    (tmp_path / "test-0.jsonl").write_bytes(jsonl(["never"] * 9))
    found = load(tmp_path)
    assert sum(ids(found), []) == [*"\0".join(TRAIN).encode()]
    assert "left alone: test-0.jsonl" in found.name


def test_more_text_than_fits_is_sent_to_data_prepare(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "DOCUMENTS", 1000)
    said = refused(write(tmp_path / "a", "jsonl"))
    assert "python -m data.prepare" in said and "type --data=OUT" in said


@pytest.mark.parametrize("package, kind", [("zstandard", "jsonl.zst"), ("pyarrow", "parquet")])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package, kind):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / f"a.{kind}").write_bytes(b"something")
    assert f"needs `pip install {package}`" in refused(tmp_path / f"a.{kind}")


def test_names_of_special_tokens_in_a_document_are_ordinary_text(monkeypatch):
    ranks = {bytes([i]): i for i in range(256)} | {b"at": 256}
    table = tiktoken.Encoding(
        "gpt2", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 257}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: table)
    words = Tokenizer("gpt2")
    for text in ("cat<|endoftext|>", "<|endoftext|>" * 9, "", "é \udc00 at"):
        assert words.encode(text).tolist() == table.encode_ordinary(text)
        assert words.encode(text).dtype == np.int64


# ---- parts ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("end", ["\n", ""])
def test_parts_of_a_file_hold_each_line_once_whatever_their_size(tmp_path, end):
    draw = random.Random(1)
    lines = []
    for i in range(40):
        if draw.random() < 0.2:
            lines.append(draw.choice(["", "\r", "no JSON", '{"text": 3}', '{"text": ""}']))
        lines.append(json.dumps({"text": f"{i} " + "x" * draw.randrange(40)}))
    path = tmp_path / "a.jsonl"
    path.write_bytes(("\n".join(lines) + end).encode())
    size = path.stat().st_size
    whole = [*Documents(Part(path, 0, size, size), "text")]
    assert sum(isinstance(d, Damage) for d in whole) >= 2 and len(whole) > 40
    for each in [*range(1, 60), size - 1, size, size + 1]:
        parts = [*parts_of(path, each)]
        assert sum(part.size for part in parts) == size
        assert [d for part in parts for d in Documents(part, "text")] == whole


def test_what_is_read_so_far_grows_to_the_size_of_the_part(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TRAIN))
    for part in parts_of(path, 500):
        reader = Documents(part, "text")
        seen = [reader.done for _ in reader]
        assert seen == sorted(seen) and reader.done == part.size


# ---- damage --------------------------------------------------------------------------------------
GOOD = ["first", "second é", "third"]
# A line between good ones -> what is said of it.
LINES = {
    b'{"text": "cut': "is no JSON",
    b'{"text": "a"': "is no JSON",
    b"{": "is no JSON",
    b"}": "is no JSON",
    b"text": "is no JSON",
    b"{'text': 'a'}": "is no JSON",
    b'{"text": "a",}': "is no JSON",
    b'{"text": "a"}{"text": "b"}': "is no JSON",
    b'{"text": "a"} x': "is no JSON",
    b'{text: "a"}': "is no JSON",
    b'{"text": "a\x01b"}': "is no JSON",
    b'{"text": "\\x41"}': "is no JSON",
    b'{"text": "\\u12"}': "is no JSON",
    b'\xef\xbb\xbf{"text": "a"}': "is no JSON",
    b"\0\0\0": "is no JSON",
    b"[" * 100_000: "is no JSON that can be read",
    b'{"text": ' + b"9" * 5000 + b"}": "is no JSON that can be read",
    b"null": "is null",
    b"7": "is a number",
    b"true": "is true or false",
    b'"text"': "is a string",
    b'["text"]': "is a list",
    b"[]": "is a list",
    b"{}": "has no field 'text', but no field",
    b'{"Text": "a"}': "has no field 'text', but 'Text'",
    b'{"a": {"text": "b"}}': "has no field 'text', but 'a'",
    b'{"text": null}': "has null in 'text'",
    b'{"text": 3}': "has a number in 'text'",
    b'{"text": 3.5}': "has a number in 'text'",
    b'{"text": NaN}': "has a number in 'text'",
    b'{"text": false}': "has true or false in 'text'",
    b'{"text": ["a"]}': "has a list in 'text'",
    b'{"text": {"text": "a"}}': "has an object in 'text'",
    b'{"text": "\\ud800"}': "has half a character",
    b'{"text": "a\\udfffb"}': "has half a character",
    b'{"text": "\xff"}': "is not UTF-8",
    b'{"text": "\xc3"}': "is not UTF-8",
    b'{"text": "\xed\xa0\x80"}': "is not UTF-8",
    b'{"text": "caf\xe9"}': "is not UTF-8",
    '{"text": "a"}'.encode("utf-16"): "is not UTF-8",
    b'{"text": "' + b"a" * 200_000 + b'"}': "is longer than",
}


def prepared(path: Path, out: Path, **options) -> tuple[list[bytes], dict]:
    """(the documents in OUT's shards, sorted; prepare.json) by bytes."""
    prepare.prepare(str(path), str(out), "bytes", held_out=0.5, **options)
    tokens = b"".join(
        shards.read_shard(shard, 256).astype(np.uint8).tobytes()
        for shard in sorted(out.glob("*.bin"))
    )
    found = json.loads((out / "prepare.json").read_text(encoding="utf-8"))
    assert tokens.endswith(b"\0")
    return sorted(tokens[:-1].split(b"\0")), found


@pytest.fixture
def quick(monkeypatch):
    """No disk waits, and lines are long soon."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(documents, "LINE", 150_000)


def check_damage(path: Path, out: Path, word: str, kept: list[str], n: int = 1) -> None:
    """Refused in a sentence that names the file and holds `word`; else only the damage is left
    out, and counted."""
    assert word in refused(path) and str(path) in refused(path)
    for held_out in (0.5, 0.6):
        with pytest.raises(ValueError) as error:
            prepare.prepare(str(path), f"{out}-{held_out}", "bytes", held_out=held_out)
        said = str(error.value)
        assert str(path) in said and word in said and "\n" not in said and len(said) < 600
    texts, found = prepared(path, out, skip_damaged=True)
    assert texts == sorted(text.encode() for text in kept)
    assert found["counts"]["damaged"] == n == len(found["skipped"])
    assert str(path) in found["skipped"][0] and word in found["skipped"][0]


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_line_is_refused_with_its_place_or_left_out_alone(tmp_path, quick, packed):
    good = [json.dumps({"text": text}).encode() for text in GOOD]
    for i, (line, word) in enumerate([*LINES.items()][:: 5 if packed else 1]):
        raw = b"\n".join([good[0], b"", line, *good[1:]]) + b"\n"
        path = tmp_path / f"{i}.jsonl{'.gz' * packed}"
        path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)
        check_damage(path, tmp_path / f"out{i}", f"line 3: {word}", GOOD)


def test_lines_that_are_no_damage(tmp_path, quick):
    raw = b'\xef\xbb\xbf{"text": "first"}\r\n\r\n \n{"text": "", "a": null}\n'
    raw += b'{"a": {"text": 3}, "text": "second \\u00e9"}\n{"text": "x", "text": "third"}'
    (tmp_path / "a.jsonl").write_bytes(raw)
    texts, found = prepared(tmp_path / "a.jsonl", tmp_path / "out")
    assert texts == sorted(text.encode() for text in GOOD)
    assert found["counts"]["empty"] == 1 and found["counts"]["damaged"] == 0
    assert sum(ids(load(tmp_path / "a.jsonl")), []) == [*"\0".join(GOOD).encode()]


def test_a_gzip_file_cut_anywhere_gives_the_lines_before_the_cut(tmp_path, quick):
    rest = [f"{i} {DRAW.random()}" for i in range(200)]
    whole = gzip.compress(jsonl(GOOD), 0) + gzip.compress(jsonl(rest), 0)
    first = len(gzip.compress(jsonl(GOOD), 0))
    for i, cut in enumerate((first + 3, first + 12, first + 900, len(whole) - 8, len(whole) - 1)):
        path = tmp_path / f"{i}.jsonl.gz"
        path.write_bytes(whole[:cut])
        text = whole[first + 15 : cut]  # stored, not packed: what lies before the cut is readable
        n = min(text.count(b"\n"), 200)
        kept = GOOD + rest[:n]
        check_damage(path, tmp_path / f"out{i}", f"behind line {3 + n}", kept)


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda raw: raw[:-8] + b"abcd" + raw[-4:], "CRC"),
        (lambda raw: raw[:-4] + b"abcd", "length"),
        (lambda raw: raw + b"garbage", "Not a gzipped file"),
    ],
)
def test_a_gzip_file_with_damage_at_its_end_gives_its_lines(tmp_path, quick, change, word):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(change(gzip.compress(jsonl(GOOD))))
    check_damage(path, tmp_path / "out", word, GOOD)


@pytest.mark.parametrize(
    "name, raw",
    [
        ("a.jsonl.gz", b""),
        ("a.jsonl.gz", jsonl(GOOD)),
        ("a.jsonl.gz", b"\x1f\x8b"),
        ("a.jsonl", gzip.compress(jsonl(GOOD), mtime=0)),
        ("a.txt", gzip.compress(jsonl(GOOD), mtime=0)),
        ("a.txt", "text".encode("utf-16")),
        pytest.param("a.jsonl.zst", b"", marks=zstandard),
        pytest.param("a.jsonl.zst", jsonl(GOOD), marks=zstandard),
        pytest.param("a.parquet", b"", marks=pyarrow),
        pytest.param("a.parquet", b"PAR1", marks=pyarrow),
        pytest.param("a.parquet", jsonl(GOOD), marks=pyarrow),
    ],
)
def test_a_file_that_is_another_than_its_name_says_costs_only_itself(tmp_path, quick, name, raw):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    path.write_bytes(raw)
    good = tmp_path / "in" / "good.jsonl"
    good.write_bytes(jsonl(GOOD))
    both = f"{path},{good}"
    with pytest.raises(ValueError) as error:
        prepare.prepare(both, str(tmp_path / "refused"), "bytes")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert str(path) in refused(both)
    texts, found = prepared(both, tmp_path / "out", skip_damaged=True)
    assert texts == sorted(text.encode() for text in GOOD) and found["counts"]["damaged"] >= 1


@zstandard
def test_a_zstd_file_cut_anywhere_is_no_shorter_file(tmp_path, quick):
    import zstandard

    rest = [f"{i} {DRAW.random()}" for i in range(200)]
    pack = zstandard.ZstdCompressor(write_checksum=True).compress
    whole = pack(jsonl(GOOD)) + pack(jsonl(rest))
    first = len(pack(jsonl(GOOD)))
    for i, cut in enumerate((first + 2, first + 9, len(whole) // 2, len(whole) - 1)):
        path = tmp_path / f"{i}.jsonl.zst"
        path.write_bytes(whole[:cut])
        assert "cut short" in refused(path)
        texts, found = prepared(path, tmp_path / f"out{i}", skip_damaged=True)
        assert {text.encode() for text in GOOD} <= {*texts} and found["counts"]["damaged"] == 1
        assert {*texts} <= {text.encode() for text in GOOD + rest}
    damaged = bytearray(whole)
    damaged[-2] ^= 255  # the checksum
    path = tmp_path / "sum.jsonl.zst"
    path.write_bytes(damaged)
    assert "damaged" in refused(path)


@pyarrow
def test_damage_in_a_parquet_table_is_told_by_row(tmp_path, quick):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(name: str, column, **options) -> Path:
        columns = {"id": [*range(len(column))], "text": column}
        pq.write_table(pa.table(columns), tmp_path / name, **options)
        return tmp_path / name

    for i, kind in enumerate(
        (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()))
    ):
        path = table(f"null{i}.parquet", pa.array([GOOD[0], None, *GOOD[1:], ""]).cast(kind))
        check_damage(path, tmp_path / f"out{i}", "row 2: has null in 'text'", GOOD)
    raw = [GOOD[0].encode(), GOOD[1].encode(), b"\xff", GOOD[2].encode()]
    path = table("bytes.parquet", pa.array(raw, pa.binary()))
    check_damage(path, tmp_path / "bytes", "row 3: has bytes in 'text' that are not UTF-8", GOOD)
    broken = pa.Array.from_buffers(pa.string(), 4, pa.array(raw, pa.binary()).buffers())
    check_damage(table("str.parquet", broken), tmp_path / "str", "row 3: has bytes", GOOD)
    for i, column in enumerate((pa.array([1, 2]), pa.array([["a"]]), pa.array([{"text": "a"}]))):
        assert "strings are expected" in refused(table(f"type{i}.parquet", column))
    assert "has no column 'body', but 'id', 'text'" in refused(path, field="body")
    whole = table("whole.parquet", pa.array(GOOD)).read_bytes()
    for cut in (5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.parquet").write_bytes(whole[:cut])
        assert "cut.parquet, behind row 0: cannot be read" in refused(tmp_path / "cut.parquet")
    # The index at the end is whole, and the pages before it are not.
    options = dict(compression="none", use_dictionary=False, write_page_checksum=True)
    hurt = bytearray(table("hurt.parquet", pa.array(["x" * 5000] * 600), **options).read_bytes())
    hurt[hurt.rindex(b"x" * 100)] = ord("y")
    (tmp_path / "hurt.parquet").write_bytes(hurt)
    assert "hurt.parquet, behind row" in refused(tmp_path / "hurt.parquet")


# ---- shards of others ----------------------------------------------------------------------------
def test_a_damaged_index_of_megatrons_is_a_sentence(tmp_path):
    where = Path(write(tmp_path / "a", "uint16"))
    path = where / "train.idx"
    whole = path.read_bytes()
    n = len(TRAIN)

    def change(at: int, number: int, size: int = 8) -> bytes:
        return whole[:at] + number.to_bytes(size, "little", signed=number < 0) + whole[at + size :]

    pointers = 34 + 4 * n
    cases = {
        b"": "no index of Megatron's",
        whole[:20]: "no index of Megatron's",
        b"X" + whole[1:]: "no index of Megatron's",
        change(9, 2): "no index of Megatron's, version 1",
        change(17, 6, 1): "floats",
        change(17, 99, 1): "unknown",
        change(17, 4, 1): "begins at byte",
        whole[:-1]: "is cut short or damaged",
        whole[:100]: "is cut short or damaged",
        whole + b"\0": "is cut short or damaged",
        change(18, n - 1): "is cut short or damaged",
        change(18, n + 1): "is cut short or damaged",
        change(18, 2**62): "is cut short or damaged",
        change(26, n): "is cut short or damaged",
        change(26, 2**63): "is cut short or damaged",
        change(34, -5, 4): "has a sequence of -5 ids",
        change(34, 10**6, 4): "sequence 1",
        change(pointers, 2): "sequence 0",
        change(pointers + 8, 10**9): "sequence 1",
        change(pointers + 8 * (n - 1), -2): f"sequence {n - 1}",
        change(pointers + 8 * n, 1): "borders of documents",
        change(pointers + 8 * (n + 1), 10**6): "borders of documents",
        change(len(whole) - 8, n + 1): "borders of documents",
    }
    for raw, word in cases.items():
        path.write_bytes(raw)
        said = refused(where)
        assert word in said and str(path) in said, (word, said)
    path.write_bytes(whole + bytes(n))  # with modes of several media
    assert len(load(where).train) == len("\0".join(TRAIN).encode()) + 1
    bin_file = where / "train.bin"
    for raw in (bin_file.read_bytes()[:-1], bin_file.read_bytes() + b"\0\0"):
        bin_file.write_bytes(raw)
        assert f"{bin_file} has {len(raw)} bytes" in refused(where)


def test_a_damaged_or_unfit_npy_is_a_sentence(tmp_path):
    where = Path(write(tmp_path / "a", "npy"))
    path = where / "train.npy"
    whole = path.read_bytes()
    for raw in (b"", whole[:5], whole[:50], b"X" + whole[1:], b"\x93NUMPY\x09" + whole[7:]):
        path.write_bytes(raw)
        assert f"{path} is no .npy array" in refused(where)
    for raw in (whole[:-1], whole[:-2], whole + b"\0\0"):
        path.write_bytes(raw)
        assert f"{path} has {len(raw)} bytes" in refused(where)
    for array in (np.zeros((3, 4), "<u2"), np.zeros(9), np.zeros(9, ">u2"), np.zeros(9, "<i8")):
        np.save(path, array)
        assert "is an array of" in refused(where)
    np.save(path, np.array([{}], object), allow_pickle=True)
    assert "is an array of object" in refused(where)
    for dtype in ("<i4", "<u4"):
        np.save(path, np.arange(200, dtype=dtype))
        assert load(where).train.slice(0, 200).tolist() == [*range(200)]
    np.save(path, np.array([1, 256, 2], np.uint16))
    assert "holds token id 256" in refused(where)


def test_shards_are_named_as_such(tmp_path):
    assert files.listed(write(tmp_path / "a", "npy")) == [
        tmp_path / "a" / "train.npy",
        tmp_path / "a" / "val.npy",
    ]
    np.save(tmp_path / "a" / "notes.npy", np.zeros(3))
    (tmp_path / "a" / "b.txt").write_text("texts come before arrays " * 9)
    assert files.listed(str(tmp_path / "a")) == [tmp_path / "a" / "b.txt"]
