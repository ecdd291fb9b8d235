"""Data of strangers: each is read as what it is, or refused in one sentence, never as other ids.

A wrong width, a header read as ids, another encoding: such runs end well, with a loss that means
nothing.
"""

import codecs
import gzip
import io
import math
import os
import pickle
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiktoken
import torch
from harness import init_weights, run_ranks
from test_train import ROOT, go

import sample
from checkpoint import load as checkpoint
from data import corpora, dataset, foreign, megatron, shards, texts
from data.dataset import Dataset, Tokens
from data.tokenizer import Tokenizer
from layers import generation
from model import GPT, GPTConfig
from parallel import tensor
from parallel.mesh import make_mesh
from parallel.shard import sharded
from run import evaluate
from run.microbatches import MicroBatches

SOME = np.random.default_rng(0)
START = SOME.bit_generator.state
ENGLISH = "The cat sat on the mat, and the dog on the log.\n"


def zipf(n: int, n_vocab: int) -> np.ndarray:
    """Ids as text has them: a few often, many rarely."""
    return np.minimum((SOME.pareto(0.6, n) * 3).astype(np.int64), n_vocab - 1)


def folder(path: Path, **contents) -> str:
    """A folder with train.bin and val.bin of these bytes or arrays."""
    path.mkdir(exist_ok=True)
    for name, content in ({"val": np.arange(200, dtype="<u2")} | contents).items():
        raw = content if isinstance(content, bytes) else content.tobytes()
        (path / f"{name}.bin").write_bytes(raw)
    return str(path)


def load(where, tokenizer="bytes", vocab_size=None, cache=None) -> corpora.Corpus:
    cache = "never made" if cache is None else str(cache)
    return corpora.load(str(where), tokenizer, cache, vocab_size=vocab_size)


def refused(where, *words: str, **options) -> str:
    """The one line with which load() refuses, which has these words."""
    with pytest.raises(ValueError) as error:
        load(where, **options)
    said = str(error.value)
    assert type(error.value) is ValueError and "\n" not in said and len(said) < 700, said
    for word in words:
        assert word in said, said
    return said


def encoding(pieces: dict[bytes, int], special: dict[str, int], pattern: str = r"\S+|\s+"):
    ranks = {bytes([i]): i for i in range(256)} | pieces
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(autouse=True)
def the_same_numbers_in_every_test():
    SOME.bit_generator.state = START


@pytest.fixture
def gpt2(monkeypatch):
    """A table of 259 words in the place of gpt2's."""
    table = encoding({b"th": 256, b"the": 257}, {"<|endoftext|>": 258})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: table)


# ---- the width of an id --------------------------------------------------------------------------
WIDE = [
    ("<u4", 65),
    ("<i4", 50257),
    ("<u4", 128256),
    ("<i4", 200019),
    ("<i8", 65),
    ("<u8", 50257),
    ("<i8", 128256),
]


@pytest.mark.parametrize("dtype, n_vocab", WIDE)
@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_ids_of_4_and_8_bytes_without_a_header_are_read_as_they_are(tmp_path, dtype, n_vocab, kind):
    ids = zipf(6000, n_vocab) if kind == "zipf" else SOME.integers(0, n_vocab, 6000)
    where = folder(tmp_path / "d", train=ids[:5000].astype(dtype), val=ids[5000:].astype(dtype))
    corpus = load(where, "ids", n_vocab)
    assert np.array_equal(corpus.train.slice(0, 5000), ids[:5000])
    assert np.array_equal(corpus.val.slice(0, 1000), ids[5000:])
    assert f"ids of {dtype[-1]} bytes" in corpus.name


@pytest.mark.parametrize(
    "tokenizer, n_vocab", [("bytes", None), ("ids", None), ("ids", 50257), ("ids", 100_000)]
)
def test_wide_ids_beyond_the_vocabulary_are_named_and_no_larger_vocabulary_is_advised(
    tmp_path, tokenizer, n_vocab
):
    ids = SOME.integers(100_000, 128_256, 5000).astype("<u4")
    where = folder(tmp_path / "d", train=ids, val=ids[:500])
    said = refused(
        where, f"token id {ids[0]}", "token 0 of train.bin", tokenizer=tokenizer, vocab_size=n_vocab
    )
    assert "--tokenizer= that made these ids" in said and str(ids[0] + 1) not in said


VALID = {
    "text": zipf(20000, 50257),
    "uniform": SOME.integers(0, 50257, 20000),
    "all 16 bits": SOME.integers(0, 65536, 20000),
    "characters": SOME.integers(0, 65, 20000),
    "bytes": SOME.integers(0, 256, 20000),
    "four letters": SOME.integers(0, 4, 20000),
    "bits": SOME.integers(0, 2, 20000),
    "zeros": np.zeros(5000, np.int64),
    "one id": np.full(5000, 300),
    "an id that is text": np.full(5000, 8224),
    "the last id": np.full(5000, 65535),
    "few among zeros": np.where(SOME.random(20000) < 0.01, SOME.integers(1, 50000, 20000), 0),
    "zeros, then text": np.append(np.zeros(5000, np.int64), zipf(5000, 50257)),
    "text, then zeros": np.append(zipf(5000, 50257), np.zeros(5000, np.int64)),
    "rows padded to 128": np.concatenate(
        [np.pad(zipf(n, 50257) + 1, (0, 128 - n)) for n in SOME.integers(4, 128, 100)]
    ),
    "a short row, then longer ones": np.concatenate(
        [np.pad(zipf(n, 50257) + 1, (0, 512 - n)) for n in [8, *SOME.integers(100, 512, 40)]]
    ),
    "counting": np.arange(20000),
    "counting to 300": np.arange(20000) % 300,
    "pairs": np.stack([SOME.integers(16, 4096, 5000), SOME.integers(0, 16, 5000)], 1).ravel(),
}


@pytest.mark.parametrize("name", VALID)
def test_ids_of_2_bytes_stay_ids_of_2_bytes(tmp_path, name):
    for n in (len(VALID[name]), 1, 2, 3, 7, 33, 100):
        VALID[name][:n].astype("<u2").tofile(tmp_path / "a.bin")
        ids = shards.read_shard(tmp_path / "a.bin")
        assert ids.dtype == np.uint16 and np.array_equal(ids, VALID[name][:n]), n


def test_a_vocabulary_above_65536_never_reads_2_bytes(tmp_path):
    for name, ids in VALID.items():
        where = folder(tmp_path / "d", train=ids.astype("<u2"), val=ids.astype("<u2"))
        for n_vocab in (65537, 128_256, 200_019):
            try:
                corpus = load(where, "ids", n_vocab)
            except ValueError:
                continue
            assert name == "zeros" and corpus.train.shards[0].itemsize == 4, name
    assert "needs: use the --tokenizer= or --vocab_size=" in refused(
        where, tokenizer="ids", vocab_size=100_277
    )


def test_a_header_says_2_bytes_whatever_the_vocabulary(tmp_path):
    shards.write_shard(tmp_path / "train.bin", [np.arange(1000)], 50257)
    shards.write_shard(tmp_path / "val.bin", [np.arange(1000)], 50257)
    assert load(tmp_path, "ids", 128_256).train.slice(0, 1000).tolist() == list(range(1000))


def test_a_file_that_says_nothing_of_its_width_follows_the_others(tmp_path):
    few, many = np.array([3, 0, 5], "<u4"), SOME.integers(0, 50257, 5000).astype("<u4")
    where = folder(tmp_path / "d", train=many, val=few)
    assert load(where, "ids", 50257).val.slice(0, 3).tolist() == [3, 0, 5]
    where = folder(tmp_path / "d", train=many.astype("<u2"), val=few)
    assert load(where, "ids", 50257).val.slice(0, 6).tolist() == [3, 0, 0, 0, 5, 0]


def test_large_wide_shards_are_known_by_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SAMPLED", 2**16)
    for dtype, n_vocab in (*WIDE, ("<u2", 50257)):
        ids = zipf(150_000, n_vocab)
        ids.astype(dtype).tofile(tmp_path / "a.bin")
        assert np.array_equal(shards.read_shard(tmp_path / "a.bin", n_vocab), ids), dtype


@pytest.mark.parametrize("dtype", [">u2", ">u4", ">i8"])
def test_big_endian_ids_are_refused(tmp_path, dtype):
    where = folder(tmp_path / "d", train=zipf(5000, 50257).astype(dtype))
    refused(where, "train.bin", "big-endian", "shards.write_shard", tokenizer="ids")


@pytest.mark.parametrize("extra", [2, 1, 3])
def test_wide_ids_cut_within_one_are_no_ids(tmp_path, extra):
    raw = zipf(5000, 50257).astype("<u4").tobytes()
    where = folder(tmp_path / "d", train=raw[:-extra])
    refused(where, f"train.bin has {20000 - extra} bytes", "copy it again", tokenizer="ids")


@pytest.mark.parametrize("before", [2, 6, 10, 4, 8, 40])
@pytest.mark.parametrize("dtype", ["<u4", "<i8"])
def test_wide_ids_behind_a_few_unknown_bytes_are_refused(tmp_path, before, dtype):
    raw = (
        SOME.integers(5000, 65536, before // 2).astype("<u2").tobytes()
        + zipf(5000, 50257).astype(dtype).tobytes()
    )
    refused(folder(tmp_path / "d", train=raw), "big-endian, or begin behind", tokenizer="ids")


def test_negative_ids_are_named(tmp_path):
    for dtype in ("<i4", "<i8"):
        ids = zipf(5000, 50257).astype(dtype)
        ids[40:50] = -100
        refused(
            folder(tmp_path / "d", train=ids),
            "token 40 of train.bin",
            tokenizer="ids",
            vocab_size=2**16,
        )


def test_text_and_ids_of_one_byte_are_no_shards(tmp_path):
    latin = ((ENGLISH + "d\xe9j\xe0 vu, na\xefve gar\xe7on ") * 100).encode("latin1")
    texts = [(ENGLISH * 5).encode(), (ENGLISH * 500).encode(), ("déjà vu ✓ " * 300).encode(), latin]
    texts += [
        SOME.integers(0, 65, 9000).astype(np.uint8),
        SOME.integers(0, 4, 9000).astype(np.uint8),
    ]
    for content in texts:
        where = folder(tmp_path / "d", train=content)
        refused(where, "train.bin holds text, or ids of one byte", tokenizer="ids")


# ---- headers and files of other tools ------------------------------------------------------------
def header(*first: int, words: int = 256, dtype="<u4") -> bytes:
    return np.array([*first, *[0] * (words - len(first))], dtype).tobytes()


IDS = zipf(3000, 50257)
HEADERS = {
    "llm.c, another version": header(20240520, 2, 3000),
    "llm.c, uint32 of version 1": header(20240801, 1, 3000),
    "llm.c, evaluation": header(20240522, 1, 3000),
    "llm.c, model": header(20240326, 3, 1024, 50257, 12, 12, 768),
    "next year's": header(20270101, 1, 3000),
    "big-endian": header(20240520, 1, 3000, dtype=">u4"),
    "no date, a count": header(1, 3000),
    "no date, no count": header(77, 5, 9),
    "a count of 8 bytes": np.array([3000], "<u8").tobytes(),
    "bytes, then type": np.array([6000], "<u8").tobytes() + np.array([2], "<u4").tobytes(),
    "512 bytes": header(77, 5, words=128),
    "a count in 64 bytes": header(3, 1, 3000, words=16),
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_an_unknown_header_is_no_run_of_tokens(tmp_path, name, dtype):
    where = folder(tmp_path / "d", train=HEADERS[name] + IDS.astype(dtype).tobytes())
    said = refused(where, "train.bin", "unknown", "shards.write_shard", tokenizer="ids")
    assert "rename" not in said and "cut" not in said and "skip" not in said


@pytest.mark.parametrize("n", [12, 40, 500, 1024, 1030])
def test_a_header_that_begins_with_a_date_is_known_with_little_behind_it(tmp_path, n):
    for magic in (20240522, 20270101, 20240520):
        raw = header(magic, 9, 3000) + IDS.astype("<u2").tobytes()
        said = refused(folder(tmp_path / "d", train=raw[:n]), "train.bin", tokenizer="ids")
        assert f"{magic} of version 9" in said or "has a header that is cut short" in said


def test_what_write_shard_is_advised_for_it_does_safely(tmp_path):
    shards.write_shard(tmp_path / "a.bin", [IDS.astype("<u4"), IDS], 50257)
    assert np.array_equal(shards.read_shard(tmp_path / "a.bin"), np.append(IDS, IDS))
    for bad in (-1, 50257, 70000):
        with pytest.raises(ValueError, match=f"ids from .*{bad}.* n_vocab is 50257"):
            shards.write_shard(tmp_path / "b.bin", [np.append(IDS, bad)], 50257)
    assert not (tmp_path / "b.bin").exists()


@pytest.mark.parametrize("n", [5, 12, 100, 1023, 1024, 1026, 7022])
def test_a_shard_shorter_or_longer_than_its_header_says_is_refused(tmp_path, n):
    whole = header(20240520, 1, 3000) + IDS.astype("<u2").tobytes()
    assert len(load(folder(tmp_path / "d", train=whole), "ids").train) == 3000
    refused(folder(tmp_path / "d", train=whole[:n]), "train.bin has", tokenizer="ids")
    refused(folder(tmp_path / "d", train=whole + bytes(n)), "train.bin has", tokenizer="ids")


def packed(kind: str) -> bytes:
    """A file of this kind, by the library that makes them where we have it."""
    rows, out = [{"text": ENGLISH}] * 200, io.BytesIO()
    match kind:
        case "gzip":
            return gzip.compress(ENGLISH.encode() * 50)
        case "bzip2":
            return __import__("bz2").compress(ENGLISH.encode() * 50)
        case "xz":
            return __import__("lzma").compress(ENGLISH.encode() * 50)
        case "zip":
            with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
                file.writestr("a.txt", ENGLISH * 50)
        case "npz":
            np.savez(out, ids=IDS)
        case "npy":
            np.save(out, IDS.astype("<u2"))
        case "npy of objects":
            np.save(out, np.array(rows, object), allow_pickle=True)
        case "pt":
            torch.save({"w": torch.arange(1000)}, out)
        case "pt, old":
            torch.save({"w": torch.arange(1000)}, out, _use_new_zipfile_serialization=False)
        case "safetensors":
            return safetensors.numpy.save({"w": np.arange(1000)})
        case "tar":
            with tarfile.open(fileobj=out, mode="w") as file:
                file.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
        case "pickle 2" | "pickle 3" | "pickle 4" | "pickle 5":
            return pickle.dumps(rows, protocol=int(kind[-1]))
        case "sqlite":
            return b"SQLite format 3\x00" + bytes(range(256)) * 8
        case "zstd":
            return b"\x28\xb5\x2f\xfd" + SOME.bytes(2000)
        case "parquet":
            return b"PAR1" + SOME.bytes(2000) + b"PAR1"
        case "arrow file":
            return b"ARROW1\0\0" + SOME.bytes(2000)
        case "arrow stream":
            return b"\xff\xff\xff\xff" + np.array([400], "<u4").tobytes() + SOME.bytes(2000)
        case "hdf5":
            return b"\x89HDF\r\n\x1a\n" + SOME.bytes(2000)
        case "pdf":
            return b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + SOME.bytes(2000)
        case "megatron index":
            return index(8, [3000])
        case "litgpt":
            return (
                b"LITPKDS" + np.array([1, 8, 3000], "<u8").tobytes() + IDS.astype("<u2").tobytes()
            )
        case "gguf":
            return b"GGUF" + SOME.bytes(2000)
    return out.getvalue()


def index(code: int, lengths: list[int], version: int = 1, magic: bytes = b"MMIDIDX\0\0") -> bytes:
    """Megatron's NAME.idx."""
    n = len(lengths)
    raw = magic + np.array([version], "<u8").tobytes() + bytes([code])
    raw += np.array([n, n + 1], "<u8").tobytes() + np.array(lengths, "<i4").tobytes()
    ends = np.cumsum(lengths, dtype="<i8")
    starts = (ends - lengths) * np.dtype(megatron.INDEX.get(code, "<i4")).itemsize
    return raw + starts.astype("<i8").tobytes() + np.arange(n + 1, dtype="<i8").tobytes()


PACKED = {
    "gzip": "gzip",
    "bzip2": "bzip2",
    "xz": "xz",
    "zip": "zip",
    "npz": "zip",
    "npy": "NumPy",
    "npy of objects": "NumPy",
    "pt": "zip",
    "pt, old": "pickle",
    "safetensors": "safetensors",
    "tar": "tar",
    "pickle 2": "pickle",
    "pickle 3": "pickle",
    "pickle 4": "pickle",
    "pickle 5": "pickle",
    "sqlite": "SQLite",
    "zstd": "zstd",
    "parquet": "Parquet",
    "arrow file": "Arrow",
    "arrow stream": "Arrow",
    "hdf5": "HDF5",
    "pdf": "PDF",
    "megatron index": "Megatron",
    "litgpt": "LitGPT",
    "gguf": "GGUF",
}


@pytest.mark.parametrize("kind", PACKED)
def test_a_file_of_another_kind_is_neither_a_shard_nor_a_text(tmp_path, gpt2, kind):
    raw = packed(kind)
    for tail in (b"", b"\0"):  # an odd size is no better
        where = folder(tmp_path / "d", train=raw + tail)
        if tail and "pickle" in PACKED[kind]:
            continue
        refused(where, "train.bin", PACKED[kind], tokenizer="ids")
        refused(where, "train.bin", PACKED[kind], tokenizer="gpt2", vocab_size=50304)
    (tmp_path / "a.txt").write_bytes(raw)
    for tokenizer in ("bytes", "gpt2"):
        refused(
            tmp_path / "a.txt", "a.txt", PACKED[kind], tokenizer=tokenizer, cache=tmp_path / "cache"
        )
    assert not (tmp_path / "cache").exists()


def test_text_about_other_kinds_is_text(tmp_path):
    for words in ("PAR1 is a magic. ", "GGUF! ", "ORCs live there. ", "BZh? ", "Obj ", "ARROW1 "):
        (tmp_path / "a.txt").write_text(words + ENGLISH * 20)
        assert len(load(tmp_path / "a.txt").train) > 800


# ---- Megatron ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "code, dtype", [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")]
)
def test_megatrons_index_says_the_type_of_the_ids(tmp_path, code, dtype):
    ids = SOME.integers(0, 100, 3000)
    where = folder(tmp_path / "d", train=ids.astype(dtype), val=ids[:500].astype(dtype))
    (tmp_path / "d" / "train.idx").write_bytes(index(code, [1000, 1500, 500]))
    (tmp_path / "d" / "val.idx").write_bytes(index(code, [500]))
    corpus = load(where, "ids", 128_256)
    assert np.array_equal(corpus.train.slice(0, 3000), ids) and len(corpus.val) == 500


@pytest.mark.parametrize(
    "fault, word",
    [
        (index(6, [3000]), "floats"),
        (index(7, [3000]), "floats"),
        (index(0, [3000]), "unknown"),
        (index(9, [3000]), "unknown"),
        (index(8, [3000], version=2), "no index of Megatron's, version 1"),
        (index(8, [3000], magic=b"TNTIDX\0\0\0"), "no index of Megatron's"),
        (b"", "no index of Megatron's"),
        (b"MMIDIDX\0\0", "no index of Megatron's"),
        (index(8, [3000])[:36], "is cut short"),
        (index(8, [2999]), "copy it again"),
        (index(4, [3000]), "copy it again"),
        (index(8, []), "copy it again"),
    ],
)
def test_an_index_that_does_not_fit_is_a_sentence(tmp_path, fault, word):
    where = folder(tmp_path / "d", train=IDS.astype("<u2"))
    (tmp_path / "d" / "train.idx").write_bytes(fault)
    refused(where, "train.", word, tokenizer="ids")


# ---- whose ids -----------------------------------------------------------------------------------
def test_nanogpts_characters_are_ids_and_nobody_opens_the_pickle(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "load", None)
    ids = SOME.integers(0, 65, 3000).astype("<u2")
    where = folder(tmp_path / "d", train=ids, val=ids[:300])
    (tmp_path / "d" / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    for tokenizer, n_vocab in (("bytes", None), ("bytes", 65), ("bytes", 300), ("gpt2", None)):
        said = refused(where, "meta.pkl", tokenizer=tokenizer, vocab_size=n_vocab)
        assert f"not {tokenizer}: type --tokenizer=ids --vocab_size=65" in said
    corpus = load(where, "ids", 65)
    assert corpus.tokenizer.byte_lengths() is None and len(corpus.train) == 3000


def test_ids_between_the_tokenizers_vocabulary_and_the_models_never_end_in_an_index_error(
    tmp_path, gpt2, monkeypatch, capsys
):
    """The tokenizer has 259 words, the model 320."""
    ids = SOME.integers(0, 320, 4000).astype("<u2")
    where = folder(tmp_path / "d", train=ids, val=ids[:600])
    first = int(np.flatnonzero(ids >= 259)[0])
    refused(
        where,
        f"token id {ids[first]}, and vocab_size is 259 (token {first} of train.bin)",
        tokenizer="gpt2",
    )
    more = [
        f"--data={where}",
        "--tokenizer=gpt2",
        "--vocab_size=320",
        "--sample_tokens=20",
        "--steps=2",
    ]
    final = go(where, tmp_path / "run", *more)
    assert final["val_bpb"] > 0
    sample.main([str(tmp_path / "run"), "--tokens=50", "--temperature=1000", "--top_k=0"])
    assert "\ufffd" in capsys.readouterr().out
    go(where, tmp_path / "counted", *more, "--ngram=2")  # counts them, and evaluates
    monkeypatch.setattr(corpora, "SMALL", 0)  # large data: only rows are looked at
    monkeypatch.setattr(corpora, "_stretches", lambda n: [])
    assert go(where, tmp_path / "large", *more[:2], "--steps=1")["val_bpb"] > 0


def test_a_bad_id_deep_in_large_data_is_named_with_its_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "SMALL", 0)
    monkeypatch.setattr(corpora, "_stretches", lambda n: [])
    ids = np.arange(1000, dtype="<u2") % 200
    later = ids.copy()
    later[700] = 999
    where = folder(tmp_path / "d", train_0=ids, train_1=later)
    rows = Dataset(load(where, "bytes").train, 10, None, 256)
    with pytest.raises(ValueError, match=r"token id 999, .* \(token 700 of train_1.bin\)"):
        rows(range(rows.per_epoch))


def alone(model: GPT) -> MicroBatches:
    """What computes micro-batches of a model that is all here."""
    cpu = torch.device("cpu")
    positions = torch.arange(model.config.block_size)
    return MicroBatches(model, None, None, cpu, "fp32", positions, (0, torch.float32, 1))


def test_a_prompt_that_the_model_does_not_know_is_a_sentence():
    model = init_weights(
        GPT(GPTConfig(vocab_size=50, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, block_size=8))
    ).eval()
    for bad in (50, 107, -1):
        with pytest.raises(ValueError, match=f"{bad}.*the model knows 0 to 49"):
            generation.generate(model, torch.tensor([[3, bad]]), 2)
    words = evaluate.sample(alone(model), Tokenizer("bytes"), 5, 0)
    assert len(words) == 6  # a line break is 10, which it knows
    tiny = init_weights(
        GPT(GPTConfig(vocab_size=8, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, block_size=8))
    )
    assert evaluate.sample(alone(tiny), Tokenizer("bytes"), 5, 0).startswith("\n")  # id 0


# ---- which files ---------------------------------------------------------------------------------
NAMES = {
    "val.bin": "val",
    "my-val-000.bin": "val",
    "fineweb_val_000000.bin": "val",
    "validation.bin": "val",
    "valid.bin": "val",
    "VAL.bin": "val",
    "myVal.bin": "val",
    "val0.bin": "val",
    "a.val.bin": "val",
    "interval.bin": "train",
    "medieval_train.bin": "train",
    "evaluate.bin": "train",
    "éval.bin": "train",
    unicodedata.normalize("NFD", "éval.bin"): "train",
    "value.bin": "train",
    "carnival_train.bin": "train",
    "valtrain.bin": "train",
    "data00.bin": "train",
}


@pytest.mark.parametrize("name", NAMES)
def test_val_is_a_word_of_a_name(tmp_path, name):
    other = "other_val.bin" if NAMES[name] == "train" else "other.bin"
    for i, file in enumerate((name, other)):
        np.full(50, i, "<u2").tofile(tmp_path / file)
    corpus = load(tmp_path)
    assert getattr(corpus, NAMES[name]).slice(0, 1).tolist() == [0]
    assert (len(corpus.train), len(corpus.val)) == (50, 50)


@pytest.mark.parametrize(
    "names, words",
    [
        (["train_val.bin", "val.bin"], "train_val.bin says both train and val"),
        (["val_training.bin", "a.bin"], "val_training.bin says both"),
        (["train.bin", "interval.bin"], "none of them val data"),
        (["val.bin", "val_1.bin"], "none of them train data"),
        (["val.bin", "test.bin"], "none of them train data"),
    ],
)
def test_names_that_say_both_or_leave_a_side_empty_are_a_sentence(tmp_path, names, words):
    for name in names:
        np.arange(50, dtype="<u2").tofile(tmp_path / name)
    refused(tmp_path, words)


def test_test_data_and_what_a_system_left_in_a_folder_are_not_trained_on(tmp_path):
    for i, name in enumerate(("a.bin", "val.bin", "test.bin", "._a.bin", ".hidden.bin")):
        np.full(50, i, "<u2").tofile(tmp_path / name)
    (tmp_path / "old.bin").mkdir()
    corpus = load(tmp_path)
    assert set(corpus.train.slice(0, len(corpus.train))) == {0} and len(corpus.val) == 50


@pytest.mark.parametrize("name", ["train.bin", "train_2.bin", "val.bin"])
def test_a_dangling_link_is_named(tmp_path, name):
    where = folder(tmp_path / "d", train=np.arange(50, dtype="<u2"))
    (tmp_path / "d" / name).unlink(missing_ok=True)
    (tmp_path / "d" / name).symlink_to(tmp_path / "gone" / "x.bin")
    refused(where, name, "is a link to", "gone/x.bin, which is not there")
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    refused(tmp_path / "a.txt", "is a link to", "gone.txt, which is not there")


def test_a_folder_of_texts_is_one_text_sorted_by_name(tmp_path):
    for name, words in (
        ("b.txt", "second"),
        ("a.txt", "first\n"),
        ("C.txt", ""),
        ("c.txt", "third"),
        (".DS_Store.txt", "no"),
        ("readme.md", "no"),
    ):
        (tmp_path / name).write_text(words * 20)
    corpus = load(tmp_path)
    text = "\0".join(["first\n" * 20, "second" * 20, "third" * 20])
    both = np.concatenate([part.slice(0, len(part)) for part in (corpus.train, corpus.val)])
    n_bytes = len(text) - 2
    assert corpus.tokenizer.decode(both) == text
    assert len(corpus.val) == n_bytes - n_bytes * 9 // 10
    assert "3 texts, the byte 0 between two; held out: the last tenth; empty: C.txt" in corpus.name


def test_the_order_of_texts_is_the_same_where_letters_are_composed_otherwise(tmp_path):
    seen = []
    for form in ("NFC", "NFD"):
        (tmp_path / form).mkdir()
        for name in ("e.txt", "é.txt", "f.txt", "z.txt"):
            path = tmp_path / form / unicodedata.normalize(form, name)
            path.write_text(name * 30)
        seen.append(load(tmp_path / form).sha256)
    assert seen[0] == seen[1]


def test_texts_named_after_what_they_are_for_are_kept_apart(tmp_path):
    for name in ("TinyStories-train.txt", "TinyStories-valid.txt", "test.txt"):
        (tmp_path / name).write_text(name * 30)
    corpus = load(tmp_path)
    assert corpus.tokenizer.decode(corpus.train.slice(0, len(corpus.train))).startswith(
        "TinyStories-train"
    )
    assert corpus.tokenizer.decode(corpus.val.slice(0, len(corpus.val))).startswith(
        "TinyStories-valid"
    )
    assert "held out: TinyStories-valid.txt; left alone: test.txt" in corpus.name
    (
        tmp_path / "TinyStories-valid.txt"
    ).unlink()  # a novel may be called "The Test": all are joined
    corpus = load(tmp_path)
    assert len(corpus.train) + len(corpus.val) == 30 * len("TinyStories-train.txt" + "test.txt") + 1


def test_patterns_and_lists_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "deep/c.txt", "deep/er/d.txt", "x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name * 20 + "\n")
    for given, found in (
        ("*.txt", "ab"),
        ("**/*.txt", "abcd"),
        ("b.txt,a.txt", "ba"),
        ("a.txt, x.md", "ax"),
        ("deep/*.txt,b.txt", "cb"),
        ("[ab].txt", "ab"),
        ("a.txt,*.txt", "ab"),
        (f"{tmp_path}/*.txt,x.md", "abx"),
    ):
        corpus = load(given)
        text = corpus.tokenizer.decode(
            np.concatenate([p.slice(0, len(p)) for p in (corpus.train, corpus.val)])
        )
        starts = [
            line.rpartition("/")[0] and line.split("/")[-1][0] or line[0]
            for line in text.replace("\0", "").splitlines()
        ]
        assert "".join(starts) == found, given
    refused("a.txt,nothing.txt", "'nothing.txt'", "is no file")
    refused("*.text", "'*.text'", "matches no file")
    (tmp_path / "1,5 [draft].txt").write_text(ENGLISH * 9)  # a file with such a name is that file
    assert len(load("1,5 [draft].txt").train) == len(ENGLISH * 9) * 9 // 10
    where = folder(tmp_path / "d", train=np.arange(200, dtype="<u2"))
    assert (
        len(load(f"{where}/*.bin").val)
        == len(load(f"{where}/train.bin,{where}/val.bin").val)
        == 200
    )
    refused(f"{where}/*.bin,a.txt", "shards and others")


def test_a_folder_with_neither_says_what_it_has(tmp_path):
    refused(tmp_path, "is empty; put .txt texts, .jsonl, .parquet or .bin shards there")
    for name in ("a.xlsx", "b.pt", "sub/a.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(ENGLISH)
    assert f"type --data='{tmp_path}/**/*.md'" in refused(tmp_path, ".pt .xlsx")
    load(f"{tmp_path}/**/*.md")
    (tmp_path / "sub" / "a.md").rename(tmp_path / "sub" / "train.bin")
    refused(tmp_path, f"type --data={tmp_path}/sub")


def test_a_folder_that_may_not_be_read_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text(ENGLISH * 30)
    if os.name == "posix" and os.getuid():
        (tmp_path / "d").chmod(0)
    else:  # root may read everything

        def forbidden(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "listdir", forbidden)
    refused(tmp_path / "d", "cannot be read", "Permission denied")
    (tmp_path / "d").chmod(0o700)


def test_a_tilde_is_a_home(tmp_path, monkeypatch, gpt2, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(ENGLISH * 30)
    folder(tmp_path / "d", train=np.arange(200, dtype="<u2"))
    for given in ("~/a.txt", "~/*.txt", "~/a.txt,~/b.txt", "~/d"):
        assert len(load(given).train) >= 200
    corpora.load("~/a.txt", "gpt2", "~/cache")
    assert {path.name for path in (tmp_path / "cache").rglob("*.bin")} == {"train.bin", "val.bin"}
    with pytest.raises(ValueError, match="--data_dir=~nobody-of-this-name/x: nobody here"):
        corpora.load("~/a.txt", "gpt2", "~nobody-of-this-name/x")
    go(tmp_path / "a.txt", tmp_path / "run", "--steps=1")
    sample.main(["~/run", "--tokens=3"])
    assert capsys.readouterr().out and sorted(os.listdir(tmp_path)) == [
        "a.txt",
        "b.txt",
        "cache",
        "d",
        "run",
    ]


# ---- files that change ---------------------------------------------------------------------------
def test_a_text_or_shards_rewritten_under_a_run_change_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(ENGLISH * 3000)
    where = folder(tmp_path / "d", train=np.arange(60_000, dtype="<u2") % 200)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_text(ENGLISH * 3000)
    for given, file in (
        (tmp_path / "a.txt", "a.txt"),
        (where, "d/train.bin"),
        (tmp_path / "t", "t/a.txt"),
    ):
        tokens = load(given).train
        before = tokens.slice(0, len(tokens)).copy()
        (tmp_path / file).write_bytes(b"a few words")  # as an editor saves
        assert np.array_equal(tokens.slice(0, len(tokens)), before)


def test_a_large_file_that_is_cut_is_a_sentence_and_one_put_in_its_place_no_harm(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(texts, "IN_MEMORY", 1000)
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(ENGLISH * 3000)
    cut, replaced, gone = (load(tmp_path / name).train for name in ("a.txt", "b.txt", "c.txt"))
    rows = Dataset(cut, 16, 0, 256)
    rows(range(8))
    (tmp_path / "a.txt").write_text("a few words")
    with pytest.raises(ValueError, match="a.txt was cut to 11 bytes while a run read it"):
        rows(range(8, 16))
    (tmp_path / "new.txt").write_text("a few words")
    os.replace(tmp_path / "new.txt", tmp_path / "b.txt")
    (tmp_path / "c.txt").unlink()
    for tokens in (replaced, gone):
        assert tokens.slice(len(tokens) - 5, len(tokens)).shape == (5,)
    assert len(load(f"{tmp_path}/b.txt,{__file__}").train.mapped) == 2


@pytest.mark.slow
def test_a_run_outlives_an_editors_save_and_ends_with_its_checkpoint(tmp_path):
    (tmp_path / "my.txt").write_text(ENGLISH * 20_000)
    words = [
        "--n_layer=1",
        "--n_head=2",
        "--n_embd=16",
        "--block_size=16",
        "--batch_size=2",
        "--steps=100000",
        "--eval_every=0",
        "--save_every=0",
        "--sample_tokens=0",
        "--plot=false",
        "--precision=fp32",
        "--compile=off",
        "--device=cpu",
        f"--out_dir={tmp_path / 'out'}",
        f"--data={tmp_path / 'my.txt'}",
    ]
    run = subprocess.Popen(
        [sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    while run.poll() is None and not (
        metrics.exists() and '"step": 20, "loss"' in metrics.read_text()
    ):
        time.sleep(0.1)
    (tmp_path / "my.txt").write_text("a few more words. " * 300)
    lines = len(metrics.read_text().splitlines())
    while run.poll() is None and len(metrics.read_text().splitlines()) < lines + 50:
        time.sleep(0.1)
    run.terminate()
    assert run.wait(30) == 0 and checkpoint.newest(tmp_path / "out").step > 20


# ---- the cache -----------------------------------------------------------------------------------
def test_tokens_are_kept_by_the_tokenizers_table_not_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the other thing\n" * 200)
    tables = [
        encoding({b"th": 256, b"the": 257}, {"<|endoftext|>": 258}),
        encoding({b"ot": 256, b"the": 257}, {"<|endoftext|>": 258}),  # another piece
        encoding({b"th": 256, b"the": 257}, {"<|endoftext|>": 259}),  # another number
        encoding({b"th": 256, b"the": 257}, {"<|end|>": 258}),  # another name
        encoding({b"th": 256, b"the": 257}, {"<|endoftext|>": 258}, r"\S|\s"),  # cut otherwise
    ]
    for table in [*tables, tables[0]]:
        monkeypatch.setattr(tiktoken, "get_encoding", lambda name: table)
        train = load(tmp_path / "a.txt", "gpt2", cache=tmp_path / "cache").train
        ids = np.array(table.encode_ordinary("the other thing\n" * 180))
        assert np.array_equal(train.slice(0, len(train)), ids)
    assert len(list((tmp_path / "cache").iterdir())) == len(tables)
    assert Tokenizer("bytes").key == "bytes" and Tokenizer("gpt2").key == Tokenizer("gpt2").key


# ---- encodings -----------------------------------------------------------------------------------
WORDS = {
    "english": ENGLISH,
    "russian": "Кот сидел на ковре, а собака на бревне.\n",
    "chinese": "猫坐在垫子上，狗坐在木头上，上面有一只鸟。\n",
}


@pytest.mark.parametrize("language", WORDS)
@pytest.mark.parametrize(
    "name", ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le", "utf-32-be", "utf-32"]
)
def test_text_in_utf_16_or_32_is_refused_with_and_without_a_mark(tmp_path, gpt2, language, name):
    (tmp_path / "a.txt").write_bytes((WORDS[language] * 60).encode(name))
    for tokenizer in ("bytes", "gpt2"):
        refused(
            tmp_path / "a.txt",
            "a.txt is text",
            "iconv -f",
            tokenizer=tokenizer,
            cache=tmp_path / "cache",
        )
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "name, words",
    [
        ("latin1", "na\xefve caf\xe9, d\xe9j\xe0 vu\n"),
        ("cp1252", "\u201csmart\u201d quotes \u2013 and more\n"),
        ("koi8-r", WORDS["russian"]),
        ("gb18030", WORDS["chinese"]),
        ("shift_jis", "猫が好きです。\n"),
        ("latin1", ENGLISH * 3 + "one caf\xe9\n"),
    ],
)
def test_text_in_an_older_encoding_is_refused_under_bytes_too(tmp_path, gpt2, name, words):
    (tmp_path / "a.txt").write_bytes((words * 60).encode(name))
    for tokenizer in ("bytes", "gpt2"):
        refused(
            tmp_path / "a.txt", "a.txt is text, but not in UTF-8", "iconv -f", tokenizer=tokenizer
        )


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, gpt2):
    plain = ("déjà vu ✓\n" * 40).encode()
    (tmp_path / "a.txt").write_bytes(plain)
    (tmp_path / "b.txt").write_bytes(codecs.BOM_UTF8 + plain)
    one, other = load(tmp_path / "a.txt"), load(tmp_path / "b.txt")
    assert one.sha256 == other.sha256 and len(one.train) == len(other.train)
    corpus = load(tmp_path, "gpt2", cache=tmp_path / "cache")
    ids = np.concatenate([part.slice(0, len(part)) for part in (corpus.train, corpus.val)])
    assert corpus.tokenizer.decode(ids).encode() == plain + b"<|endoftext|>" + plain


def test_utf_8_with_a_few_broken_places_and_what_is_no_text_are_bytes(tmp_path, gpt2):
    broken = "déjà vu ✓\n".encode() * 40 + b"\xe9\xff broken"
    for raw in (
        broken,
        SOME.bytes(5000),
        bytes(range(256)) * 20,
        b"\0" * 999,
        (ENGLISH * 20).encode() + b"\0",
    ):
        (tmp_path / "a.dat").write_bytes(raw)
        corpus = load(tmp_path / "a.dat")
        both = np.concatenate([part.slice(0, len(part)) for part in (corpus.train, corpus.val)])
        assert both.tobytes() == raw
    (tmp_path / "a.dat").write_bytes(broken)
    refused(
        tmp_path / "a.dat", "not text in UTF-8, 2 places", "--tokenizer=bytes", tokenizer="gpt2"
    )


def test_characters_across_the_pieces_that_are_looked_at_are_no_faults():
    for shift in range(4):
        text = np.frombuffer(b"x" * shift + "✓é\U0001f600".encode() * 150_000, np.uint8)
        assert foreign.not_text(text, False) is None
    late = np.frombuffer(b"x" * (2**20 + 5) + b"\xe9" + b"x" * 100, np.uint8)
    assert "UTF-8" in foreign.not_text(late, True)


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"", "is empty"),
        (b"\n", "nothing but white space"),
        (b" \t\r\n" * 50_000, "nothing but white space"),
        (codecs.BOM_UTF8, "nothing but white space"),
    ],
)
def test_a_text_without_text_is_a_sentence(tmp_path, raw, words):
    (tmp_path / "a.txt").write_bytes(raw)
    refused(tmp_path / "a.txt", "a.txt", words)
    (tmp_path / "d").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "d" / name).write_bytes(raw)
    refused(tmp_path / "d", words)
    (tmp_path / "d" / "b.txt").write_text(ENGLISH * 9)  # beside a text it does no harm
    assert len(load(tmp_path / "d").train) >= len(ENGLISH * 9) * 9 // 10


def test_a_text_shorter_than_a_row_says_what_to_type_before_anything_else_is_done(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(
        ValueError, match=r"\(val\) has 10 tokens, and one sequence needs 17: use --block_size=9"
    ):
        go(tmp_path / "a.txt", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_shard_under_another_name_is_no_text(tmp_path):
    shards.write_shard(tmp_path / "train.dat", [np.arange(1000) % 200], 256)
    refused(tmp_path / "train.dat", "is a shard of token ids")


# ---- what a model says ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run_on_ids(tmp_path_factory):
    """A run on shards whose tokenizer nobody gave: train.py's default is bytes."""
    home = tmp_path_factory.mktemp("ids")
    ids = SOME.integers(0, 300, 4000).astype("<u2")
    where = folder(home / "d", train=ids, val=ids[:500])
    go(where, home / "run", "--steps=1", "--vocab_size=300")
    return home


def test_sample_knows_shards_without_a_tokenizer(run_on_ids, capsys):
    for more in ((), ("--prompt=17 299",)):
        sample.main([str(run_on_ids / "run"), "--tokens=6", *more])
        ids = [int(word) for word in capsys.readouterr().out.split()]
        assert len(ids) == 7 + bool(more) and max(ids) < 300 and ids[0] == (17 if more else 0)
    with pytest.raises(ValueError, match="'hello' is no token id.*'17 4 256'"):
        sample.main([str(run_on_ids / "run"), "--prompt=hello"])
    with pytest.raises(ValueError, match="is no token id"):
        sample.main([str(run_on_ids / "run"), "--prompt=" + "9" * 40])
    with pytest.raises(ValueError, match="are 17 to 300, and the model knows 0 to 299"):
        sample.main([str(run_on_ids / "run"), "--prompt=17 300"])
    sample.main([str(run_on_ids / "run"), "--tokens=6", "--tokenizer=bytes", "--prompt=a"])
    assert capsys.readouterr().out.startswith("a")


@pytest.mark.parametrize(
    "given, name",
    [
        ("{}/d", "ids"),
        ("{}/gone", "ids"),
        ("{}/d/*.bin", "ids"),
        ("{}/gone.txt", "bytes"),
        ("{}/t", "bytes"),
        ("{}/t/text", "bytes"),
        ("python", "bytes"),
        ("shakespeare", "bytes"),
        ("{}/t/*", "bytes"),
    ],
)
def test_only_shards_have_ids_of_nobody(run_on_ids, given, name):
    (run_on_ids / "t").mkdir(exist_ok=True)
    for file in ("a.txt", "text"):
        (run_on_ids / "t" / file).write_text(ENGLISH)
    assert corpora.tokenizer_of(given.format(run_on_ids), "bytes", 300).name == name
    assert corpora.tokenizer_of(given.format(run_on_ids), "bytes", 256).name == "bytes"


def test_special_tokens_in_a_prompt_are_text_and_the_user_is_told(tmp_path, gpt2, capsys):
    (tmp_path / "a.txt").write_text("the other thing\n" * 200)
    go(
        tmp_path / "a.txt",
        tmp_path / "run",
        "--steps=1",
        "--tokenizer=gpt2",
        f"--data_dir={tmp_path / 'c'}",
    )
    capsys.readouterr()
    sample.main([str(tmp_path / "run"), "--tokens=2", "--prompt=<|endoftext|>the"])
    said = capsys.readouterr()
    assert said.out.startswith("<|endoftext|>the")
    assert "<|endoftext|> in --prompt= is text, not one token" in said.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["ascii", "cp1252", "C"],
)
def test_a_terminal_of_any_code_page_shows_what_it_can(run_on_ids, env):
    words = [
        "sample.py",
        str(run_on_ids / "run"),
        "--tokenizer=bytes",
        "--prompt=naïve ✓ \U0001f600",
        "--tokens=5",
    ]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | env, capture_output=True
    )
    assert done.returncode == 0 and done.stdout.startswith(b"na"), done.stderr
    assert b"Traceback" not in done.stderr


def test_a_stream_that_lacks_letters_gets_a_mark_in_their_place(run_on_ids, monkeypatch):
    for name in ("ascii", "cp1252", "cp437", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=name))
        sample.main([str(run_on_ids / "run"), "--tokenizer=bytes", "--prompt=x ✓", "--tokens=1"])
        sys.stdout.flush()
        assert raw.getvalue().startswith(b"x ?" if name != "utf-8" else "x ✓".encode())


# ---- bits per byte -------------------------------------------------------------------------------
def small_model(n_vocab: int) -> GPT:
    model = GPT(
        GPTConfig(
            vocab_size=n_vocab,
            n_layer=1,
            n_head=2,
            n_kv_head=2,
            n_embd=16,
            block_size=8,
            zero_init=False,
        )
    )
    return init_weights(model).double()


def bits(rank: int, world: int, ids: np.ndarray) -> dict:
    """evaluate() of a fixed model on these ids."""
    table = encoding({b"th": 256, b"the": 257}, {"<|endoftext|>": 258})
    words = Tokenizer("bytes")
    words.n_vocab, words.encoding, words.special = 259, table, {"<|endoftext|>": 258}
    model = small_model(264)
    mesh = make_mesh(torch.device("cpu"), tp=world)
    if world > 1:
        whole = model.state_dict()
        model = small_model(264)
        shard_of_mine = sharded(
            lambda name, shape: whole[name], tensor.split(model, mesh.groups["tp"])
        )
        for name, p in model.named_parameters():
            p.data = shard_of_mine(name, tuple(p.shape)).clone()
    rows = Dataset(Tokens([ids]), 8, None, 264)
    before = model.loss_fn
    found = evaluate.evaluate(alone(model), rows, 64, 3, words, mesh)
    assert model.loss_fn is before
    return found


def test_bits_per_byte_leave_tokens_without_bytes_out_on_both_sides():
    ids = SOME.integers(0, 258, 65)
    ids[[3, 17, 40, 41]] = 258  # special
    ids[[9, 50]] = 262  # beyond the tokenizer
    found = bits(0, 1, ids)
    inputs, targets = (torch.from_numpy(x).reshape(8, 8) for x in (ids[:-1], ids[1:]))
    logits = small_model(264).eval()(inputs)
    nats = -torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    lengths = {256: 2, 257: 3, 258: 0, 262: 0}
    widths = torch.tensor([[lengths.get(int(t), 1) for t in row] for row in targets])
    nats = nats.detach()
    expected = float(nats[widths > 0].sum() / math.log(2) / widths.sum())
    assert found["val_bpb"] == pytest.approx(expected, rel=1e-12)
    assert found["val_loss"] == pytest.approx(float(nats.mean()), rel=1e-12)  # of all tokens
    assert abs(float(nats.sum() / math.log(2) / widths.sum()) / expected - 1) > 0.05
    assert widths.eq(0).sum() == 6


def test_bits_per_byte_are_the_same_where_the_vocabulary_is_split():
    ids = SOME.integers(0, 258, 65)
    ids[[3, 17, 40, 41]] = 258
    one = bits(0, 1, ids)
    for two in run_ranks(2, bits, ids):
        assert all(two[name] == pytest.approx(one[name], rel=1e-9) for name in one)


def test_text_that_is_all_special_has_no_bits_per_byte():
    assert bits(0, 1, np.full(65, 258))["val_bpb"] is None


def test_nothing_is_computed_twice_where_every_token_has_bytes():
    model = small_model(256)
    before = model.loss_fn
    with evaluate.loss_without_bytes(model, Tokenizer("bytes").byte_lengths(256)) as silent:
        assert model.loss_fn is before and silent == [0.0]


def test_the_one_place_that_maps_users_files_is_the_one_that_watches_them():
    """Another np.memmap of a user's file would bring SIGBUS back."""
    for name in (
        "data/corpora.py",
        "data/files.py",
        "data/texts.py",
        "data/shards.py",
        "data/foreign.py",
        "data/dataset.py",
    ):
        lines = [line for line in (ROOT / name).read_text().splitlines() if "np.memmap(" in line]
        assert len(lines) == {"data/corpora.py": 1, "data/texts.py": 1, "data/shards.py": 1}.get(
            name, 0
        ), name
    assert dataset.Tokens([np.arange(3)]).mapped == {}


def test_a_model_of_nan_writes_a_sentence_and_its_attention_comes_back():
    model = GPT(GPTConfig(vocab_size=256, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    before = model.blocks["0"].attn.attention_fn
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN or infinite, so no token can be drawn"):
            generation.generate(model, torch.zeros(1, 1, dtype=torch.int64), 2, temperature)
    assert model.blocks["0"].attn.attention_fn is before
    said = evaluate.sample(alone(model), Tokenizer("bytes"), 5, 0)
    assert said.startswith("\nthere is none: the model's logits")
