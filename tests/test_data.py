"""Rows are a function of (seed, row number); shards, corpora, tokenizers and downloads do what they
say.

No network: downloads come from a small server inside the test.
"""

import hashlib
import http.server
import io
import socket
import tarfile
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

from data import corpora, dataset, download
from data.tokenizer import Tokenizer

needs_locks = pytest.mark.skipif(download.fcntl is None, reason="files have no locks here")


def tokens(n: int, pieces: int = 1) -> dataset.Tokens:
    return dataset.Tokens(np.array_split(np.arange(n, dtype=np.uint16), pieces), "counting")


def order(n: int, seed: int | None, epoch: int = 0) -> list[int]:
    rows = dataset.Dataset(tokens(n + 1), 1, seed, n + 1)
    return rows.sequence_numbers(range(epoch * n, (epoch + 1) * n)).tolist()


def fake_encoding(n_special: int = 0) -> tiktoken.Encoding:
    """All bytes, and 'th' and 'the' as tokens of their own."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}
    special = {"<|endoftext|>": 258 + n_special}
    return tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special
    )


@pytest.fixture
def gpt2(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake_encoding())


# --- rows ---


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 97, 100, 1024, 1025, 7919])
def test_every_epoch_visits_every_row_exactly_once(n):
    for seed in (0, 1337, 2**70):
        for epoch in (0, 1, 5):
            assert sorted(order(n, seed, epoch)) == list(range(n))


def test_different_epochs_and_seeds_have_different_orders():
    orders = [order(1000, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Random orders agree once on average
            assert sum(a == b for a, b in zip(one, other)) < 15


def test_the_order_of_rows_never_changes():
    """Old runs must stay reproducible: these numbers may never be edited."""
    assert order(10, 1337) == [2, 8, 5, 9, 0, 1, 4, 6, 3, 7]


def test_the_order_is_uniform_to_the_eye_of_chi_square():
    n, epochs = 10, 5000
    rows = dataset.Dataset(tokens(n + 1), 1, 7, n + 1)
    places = rows.sequence_numbers(range(n * epochs)).reshape(epochs, n)
    for column in (places[:, 0], places[:, 9], (places[:, 1] - places[:, 0]) % n):
        seen = np.bincount(column, minlength=n)
        seen, expected = seen[seen > 0], epochs / (seen > 0).sum()
        assert ((seen - expected) ** 2 / expected).sum() < 35


def test_rows_are_a_pure_function_of_seed_and_row_number():
    rows, again = (dataset.Dataset(tokens(1001), 10, 3, 1001) for _ in range(2))
    numbers = [5, 99, 100, 250, 5, 10**12]  # several epochs, out of order, twice the same
    one_by_one = torch.cat([again([number]) for number in reversed(numbers)]).flip(0)
    assert torch.equal(rows(numbers), one_by_one)
    assert torch.equal(rows(iter(numbers)), rows(np.array(numbers)))


def test_rows_read_ahead_are_the_same_whatever_is_asked_for(monkeypatch):
    text, ahead, read = tokens(1001), [], dataset.Dataset.read
    plain, rows = dataset.Dataset(text, 10, 3, 1001), dataset.Dataset(text, 10, 3, 1001, ahead=16)
    monkeypatch.setattr(
        dataset.Dataset, "read", lambda self, n: (ahead.append(tuple(n)), read(self, n))[1]
    )
    steps = [range(i, i + 4) for i in range(0, 64, 4)]  # four steps of 16, in fours
    # Back; bans; a ramp
    other = [range(20, 24), [70, 71, 80, 81], range(84, 92), range(100, 108), range(4)]
    for numbers in steps + other:
        assert torch.equal(rows(numbers), read(plain, numbers))
        assert (
            all(numbers[0] <= k[0] <= numbers[0] + 16 for k in rows.coming)
            and len(rows.coming) <= 17
        )
        if numbers == steps[-1]:
            # Each once: what comes was there
            assert [ahead.count(tuple(n)) for n in steps] == [1] * 16
    rows.pool.shutdown()


@pytest.mark.parametrize("n", [2**40, 2**40 + 1, 10**12 + 39])
def test_a_huge_epoch_is_permuted_without_a_table(n):
    keys = np.arange(8, dtype=np.uint64)[:, None].repeat(4096, 1)
    first, last = (
        dataset.permute(np.arange(4096), n, keys),
        dataset.permute(np.arange(n - 4096, n), n, keys),
    )
    both = np.concatenate([first, last])
    assert len(np.unique(both)) == 8192 and both.min() >= 0 and both.max() < n
    assert abs(both.mean() / n - 0.5) < 0.02


def test_row_i_covers_tokens_iT_to_iT_plus_T_across_shards():
    rows = dataset.Dataset(tokens(32, pieces=9), 5, None, 32)
    assert rows.per_epoch == 6
    assert rows(range(6)).tolist() == [list(range(5 * i, 5 * i + 6)) for i in range(6)]
    assert rows(range(6)).dtype == torch.int64
    assert torch.equal(rows([6, 7]), rows([0, 1]))  # validation goes round
    assert rows([]).shape == (0, 6)


def test_slices_of_shards_equal_slices_of_the_whole():
    whole, cut = np.arange(50), tokens(50, pieces=7)
    empty_between = dataset.Tokens([whole[:20], whole[:0], whole[20:]])
    for start in range(50):
        for stop in range(start + 1, 51):
            for pieces in (cut, empty_between):
                assert pieces.slice(start, stop).tolist() == list(range(start, stop))


def test_the_last_row_ends_with_the_last_token_when_it_fits_exactly():
    assert dataset.Dataset(tokens(11), 5, 0, 11).per_epoch == 2
    assert dataset.Dataset(tokens(10), 5, 0, 11).per_epoch == 1


def test_too_little_data_says_how_much_there_is_and_what_to_type():
    for n in (0, 1, 16):
        with pytest.raises(ValueError, match=rf"counting has {n} tokens.*17.*--block_size="):
            dataset.Dataset(tokens(n), 16, 0, 256)


@pytest.mark.parametrize("bad", [-1, 256, 1000])
def test_an_id_outside_the_vocabulary_is_named(bad):
    ids = np.zeros(100, np.int64)
    ids[77] = bad
    rows = dataset.Dataset(dataset.Tokens([ids]), 10, None, 256)
    rows([0, 1, 2])
    said = rf"id {bad}, and vocab_size is 256 \(token 77\).*--tokenizer=.*--vocab_size="
    with pytest.raises(ValueError, match=said):
        rows([7])


# --- tokenizers ---


def test_bytes_round_trip_and_broken_text_does_not_raise():
    words = Tokenizer("bytes")
    assert words.n_vocab == 256 and words.decode(words.encode("naïve ✓")) == "naïve ✓"
    assert words.decode([0xE2, 0x9C]) == "\ufffd" and "\ufffd" in words.decode([65, 300])
    assert words.byte_lengths().tolist() == [1] * 256
    assert torch.from_numpy(words.encode("hi")).tolist() == [104, 105]


def test_a_tiktoken_encoding_works_offline_once_its_tables_are_there(gpt2):
    words = Tokenizer("gpt2")
    assert words.n_vocab == 259 and words.encode("the ✓").tolist()[0] == 257
    assert words.decode(words.encode("the ✓ <|endoftext|>")) == "the ✓ <|endoftext|>"
    lengths = words.byte_lengths()
    assert lengths.shape == (259,) and lengths[257] == 3 and lengths[258] == 0
    assert lengths[words.encode("the other ✓")].sum() == len("the other ✓".encode())


def test_unused_ids_have_no_bytes_and_decode_to_a_mark(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake_encoding(n_special=2))
    words = Tokenizer("gpt2")
    assert words.n_vocab == 261 and words.byte_lengths()[258:].tolist() == [0, 0, 0]
    assert words.decode([104, 259, 105]) == "h\ufffdi"


def test_an_unknown_tokenizer_names_the_nearest():
    with pytest.raises(ValueError, match="'gtp2'.*--tokenizer=gpt2.*cl100k_base"):
        Tokenizer("gtp2")


def test_a_tiktoken_encoding_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    def offline(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(
        ValueError, match=r"gpt2: set TIKTOKEN_CACHE_DIR.*--tokenizer=bytes \(no route to host\)"
    ):
        Tokenizer("gpt2")


# --- text ---


@pytest.fixture(scope="module")
def python_corpus(tmp_path_factory):
    return corpora.load("python", "bytes", str(tmp_path_factory.mktemp("cache")))


def test_the_python_corpus_is_stable_and_plausible(python_corpus, tmp_path):
    again = corpora.load("python", "bytes", str(tmp_path / "never made"))
    assert again.sha256 == python_corpus.sha256 and len(again.train) == len(python_corpus.train)
    n_train, n_val = len(python_corpus.train), len(python_corpus.val)
    assert 5e6 < n_train + n_val < 5e7 and 0.05 < n_val / (n_train + n_val) < 0.10
    assert not (tmp_path / "never made").exists()


def test_validation_of_the_python_corpus_is_whole_files_unseen_in_training(python_corpus):
    train, val = (
        split.slice(0, len(split)).tobytes() for split in (python_corpus.train, python_corpus.val)
    )
    stdlib = Path(corpora.sysconfig.get_path("stdlib"))
    sources = [
        stdlib / f"{name}.py"
        for name in (
            "ast",
            "bisect",
            "enum",
            "heapq",
            "inspect",
            "json/decoder",
            "random",
            "shutil",
            "statistics",
            "threading",
            "typing",
            "zipfile",
        )
    ]
    for source in sources:
        raw = source.read_bytes().replace(b"\r\n", b"\n")
        assert (raw in train) != (raw in val), source
    assert (stdlib / "pydoc_data" / "topics.py").read_bytes() not in train + val


def test_a_text_file_holds_out_its_last_tenth(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(100)) * 10)
    corpus = corpora.load(str(tmp_path / "a.txt"), "bytes", str(tmp_path))
    assert (len(corpus.train), len(corpus.val)) == (900, 100)
    assert corpus.val.slice(0, 100).tolist() == list(range(100))
    assert corpus.sha256 == hashlib.sha256(bytes(range(100)) * 10).hexdigest()


def test_no_tokenizer_sees_half_a_character(tmp_path, gpt2):
    for n in range(1, 40):
        (tmp_path / "a.txt").write_text("✓" * n, encoding="utf-8")
        splits = [
            corpora.load(str(tmp_path / "a.txt"), name, str(tmp_path)) for name in ("bytes", "gpt2")
        ]
        train, val = ({len(getattr(s, part)) for s in splits} for part in ("train", "val"))
        assert len(train) == len(val) == 1 and train.pop() % 3 == val.pop() % 3 == 0


def test_tokens_of_a_text_are_made_once_and_equal_the_tokenizer(tmp_path, gpt2, monkeypatch):
    # Lines, then two stretches without any
    text = "the other\n" * 50_000 + "x" * 200_000 + "é" * 100_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    first = corpora.load(str(tmp_path / "a.txt"), "gpt2", str(tmp_path / "cache"))
    ids = np.concatenate([split.slice(0, len(split)) for split in (first.train, first.val)])
    assert Tokenizer("gpt2").decode(ids) == text and ids.dtype == np.uint16
    assert ids[:3].tolist() == Tokenizer("gpt2").encode("the other\n")[:3].tolist()
    shards = sorted((tmp_path / "cache").rglob("*"))
    assert [shard.name for shard in shards[1:]] == ["train.bin", "val.bin"]  # and nothing temporary

    monkeypatch.setattr(Tokenizer, "encode", None)  # the second time nothing is tokenised
    again = corpora.load(str(tmp_path / "a.txt"), "gpt2", str(tmp_path / "cache"))
    assert again.sha256 == first.sha256 and len(again.train) == len(first.train)
    (tmp_path / "a.txt").write_text(text + "!", encoding="utf-8")
    with pytest.raises(TypeError):  # other text, other cache
        corpora.load(str(tmp_path / "a.txt"), "gpt2", str(tmp_path / "cache"))


@needs_locks
def test_two_first_preparations_at_once_make_the_tokens_once(tmp_path, gpt2, monkeypatch, capsys):
    """Each has locks of its own, as two processes have."""
    (tmp_path / "a.txt").write_text("the other\n" * 30_000)
    encode, started, calls = Tokenizer.encode, threading.Event(), []

    def slow(self, text, *more):
        calls.append(threading.current_thread().name)
        started.set()
        time.sleep(0.1)
        return encode(self, text, *more)

    monkeypatch.setattr(Tokenizer, "encode", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(corpora.load, str(tmp_path / "a.txt"), "gpt2", str(tmp_path / "cache"))
        assert started.wait(10)
        second = pool.submit(corpora.load, str(tmp_path / "a.txt"), "gpt2", str(tmp_path / "cache"))
        ids = [one.result().train.slice(0, 100_000).tolist() for one in (first, second)]
    assert ids[0] == ids[1] and len(calls) == 6  # 5 pieces of the training part, 1 of the rest
    assert "being made by another process" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "cache").rglob("*.*")} == {"train.bin", "val.bin"}


@needs_locks
def test_two_downloads_at_once_are_one(server, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        url, path = f"{server.url}/a.bin", tmp_path / "new" / "a.bin"
        for one in [pool.submit(download.download, url, path, server.etag) for _ in range(8)]:
            assert one.result().read_bytes() == server.files["a.bin"]
    assert server.seen == [("a.bin", None)] and [file.name for file in path.parent.iterdir()] == [
        "a.bin"
    ]


def test_what_a_killed_preparation_left_is_in_nobodys_way(server, tmp_path):
    (tmp_path / "a.bin.lock").touch()
    (tmp_path / "a.bin.part").write_bytes(server.files["a.bin"][:100])
    download.download(f"{server.url}/a.bin", tmp_path / "a.bin", server.etag)
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_an_interrupted_tokenisation_leaves_no_shard(tmp_path):
    def interrupted():
        yield np.arange(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpora.write_shard(tmp_path / "a.bin", interrupted(), 256)
    assert not (tmp_path / "a.bin").exists()
    corpora.write_shard(tmp_path / "a.bin", [np.arange(5)], 256)
    assert corpora.read_shard(tmp_path / "a.bin").tolist() == [0, 1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def test_what_is_no_text_is_refused_for_tiktoken_and_read_as_bytes(tmp_path, gpt2):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\x00" * 100)
    with pytest.raises(ValueError, match="UTF-8.*--tokenizer=bytes"):
        corpora.load(str(tmp_path / "a.txt"), "gpt2", str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
    assert len(corpora.load(str(tmp_path / "a.txt"), "bytes", str(tmp_path)).train) == 450


def mistakes(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "train.bin").write_bytes(b"1234")
    (tmp_path / "some.txt").write_text("some text\n" * 10)
    return str(tmp_path)


@pytest.mark.parametrize(
    "given, tokenizer, sentence",
    [
        ("shakespear", "bytes", "--data=shakespear does not exist: did you mean shakespeare"),
        (
            "no/such/file.txt",
            "bytes",
            "file.txt does not exist: it takes python, shakespeare, .* a folder",
        ),
        ("{}/empty.txt", "bytes", "empty.txt is empty: give a file"),
        ("{}/train.bin", "bytes", "is a shard: give its folder"),
        ("{}/some.txt", "ids", "--tokenizer=ids is for .bin shards.*--tokenizer=bytes"),
        ("fineweb", "bytes", "fineweb is made of gpt2 tokens, not of bytes: use --tokenizer=gpt2"),
        ("fineweb:104", "gpt2", "a number of files, from 1 to 103"),
        ("fineweb:0", "gpt2", "a number of files"),
        ("openwebtext:all", "bytes", "a number of files, from 1 to 21"),
        ("openwebtext:", "bytes", "a number of files, from 1 to 21"),
    ],
)
def test_a_mistake_in_data_gets_one_clear_line(tmp_path, gpt2, given, tokenizer, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        corpora.load(given.format(mistakes(tmp_path)), tokenizer, str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_mirror_for_data_that_downloads_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--data=python downloads nothing: leave --data_url= out"):
        corpora.load("python", "bytes", str(tmp_path), url="http://127.0.0.1")


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path, gpt2):
    (tmp_path / "a.txt").write_text("some text\n" * 10)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be kept in .*file"):
        corpora.load(str(tmp_path / "a.txt"), "gpt2", str(tmp_path / "file"))


# --- shards ---


def headerless(path: Path, ids) -> None:
    np.array(ids, "<u2").tofile(path)


def headered(path: Path, ids, magic=20240520, version=1, count=None, dtype="<u2") -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())


def test_both_shard_formats_are_recognised_file_by_file(tmp_path):
    headered(tmp_path / "web_train_000002.bin", range(10, 20))
    headerless(tmp_path / "web_train_000001.bin", range(10))
    headered(tmp_path / "web_train_000003.bin", range(20, 30), 20240801, 7, dtype="<u4")
    headerless(tmp_path / "web_val_000000.bin", [7, 8])
    headerless(tmp_path / "test.bin", [9, 9])
    corpus = corpora.load(str(tmp_path), "bytes", "unused")
    assert corpus.train.slice(0, 30).tolist() == list(range(30)) and len(corpus.train) == 30
    assert corpus.val.slice(0, 2).tolist() == [7, 8] and len(corpus.val) == 2
    before = corpus.sha256
    headerless(tmp_path / "web_val_000000.bin", [8, 8])
    assert corpora.load(str(tmp_path), "bytes", "unused").sha256 != before


def test_without_train_in_any_name_all_other_shards_are_training(tmp_path):
    headerless(tmp_path / "b.bin", [2])
    headerless(tmp_path / "a.bin", [1])
    headerless(tmp_path / "val.bin", [3])
    assert corpora.load(str(tmp_path), "bytes", "unused").train.slice(0, 2).tolist() == [1, 2]


def test_written_shards_are_what_llm_c_reads(tmp_path):
    for n_vocab, magic, version, dtype in (
        (65536, 20240520, 1, "<u2"),
        (65537, 20240801, 7, "<u4"),
    ):
        corpora.write_shard(
            tmp_path / "ours.bin", [np.arange(10), np.array([n_vocab - 1])], n_vocab
        )
        headered(tmp_path / "theirs.bin", [*range(10), n_vocab - 1], magic, version, dtype=dtype)
        assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
        assert corpora.read_shard(tmp_path / "ours.bin").tolist() == [*range(10), n_vocab - 1]
    corpora.write_shard(tmp_path / "none.bin", [], 256)
    assert len(corpora.read_shard(tmp_path / "none.bin")) == 0


@pytest.mark.parametrize(
    "fault, sentence",
    [
        ("empty", "has 0 bytes"),
        ("odd", "has 7 bytes where 6 are expected, 3 ids of 2 bytes"),
        ("short header", "has a header that is cut short"),
        ("one number", "has a header that is cut short"),
        ("too few", "has 1042 bytes where 1044 are expected"),
        ("too many", "has 1046 bytes where 1044 are expected"),
        ("version", "begins with a header that is unknown here, 20240520 of version 3"),
    ],
)
def test_a_damaged_shard_is_refused(tmp_path, fault, sentence):
    path = tmp_path / "train.bin"
    headered(path, range(10), version=3 if fault == "version" else 1)
    good = path.read_bytes()
    damage = {
        "empty": b"",
        "odd": bytes(7),
        "short header": good[:500],
        "one number": good[:4],
        "too few": good[:-2],
        "too many": good + b"12",
        "version": good,
    }
    path.write_bytes(damage[fault])
    headerless(tmp_path / "val.bin", range(10))
    with pytest.raises(ValueError, match=f"train.bin {sentence}"):
        corpora.load(str(tmp_path), "bytes", "unused")


def test_a_folder_without_training_or_validation_shards_says_so(tmp_path):
    with pytest.raises(ValueError, match="is empty; put .txt texts, .jsonl"):
        corpora.load(str(tmp_path), "bytes", "unused")
    headerless(tmp_path / "train.bin", [1, 2])
    with pytest.raises(
        ValueError, match="has 1 .bin files, none of them val data: one needs 'val'"
    ):
        corpora.load(str(tmp_path), "bytes", "unused")
    (tmp_path / "train.bin").rename(tmp_path / "val.bin")
    with pytest.raises(ValueError, match="none of them train data"):
        corpora.load(str(tmp_path), "bytes", "unused")


def test_small_data_is_checked_in_full_at_load_and_large_data_in_samples_and_row_by_row(
    tmp_path, monkeypatch
):
    headerless(tmp_path / "train.bin", [1] * 99 + [999])
    headerless(tmp_path / "val.bin", [1] * 50)
    said = r"\(train\) holds token id 999, and vocab_size is 256 \(token 99 of train.bin\)"
    with pytest.raises(ValueError, match=said):
        corpora.load(str(tmp_path), "bytes", "unused")
    assert corpora.load(str(tmp_path), "bytes", "unused", vocab_size=1000).tokenizer.name == "ids"
    monkeypatch.setattr(corpora, "SMALL", 100)
    with pytest.raises(ValueError, match=said):  # a sample has it
        corpora.load(str(tmp_path), "bytes", "unused")
    monkeypatch.setattr(corpora, "_stretches", lambda n: [(0, n // 2)])
    corpus = corpora.load(str(tmp_path), "bytes", "unused", vocab_size=256)
    rows = dataset.Dataset(corpus.train, 9, None, 256)
    rows(range(10))
    with pytest.raises(ValueError, match="token id 999"):
        rows([10])


@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
def test_shards_made_anew_have_another_checksum(tmp_path, monkeypatch, small):
    """A run that goes on must notice; in small data each bit counts, in large ones a stretch of
    1/64."""
    monkeypatch.setattr(corpora, "SMALL", 2**30 if small else 0)
    ids = np.arange(2**19) % 251
    headerless(tmp_path / "val.bin", [7] * 100)
    seen = set()
    for start in [None, 0, *range(12345, len(ids), 70_000)]:
        changed = ids.copy()
        if start is not None:
            changed[start : start + (1 if small else len(ids) // 64 + 1)] += 1
        headerless(tmp_path / "train.bin", changed)
        seen.add(corpora.load(str(tmp_path), "bytes", "unused").sha256)
    assert len(seen) == 2 + len(range(12345, len(ids), 70_000))


def test_shards_of_an_unknown_tokenizer_have_no_bytes(tmp_path):
    headerless(tmp_path / "train.bin", [300, 400])
    headerless(tmp_path / "val.bin", [300])
    words = corpora.load(str(tmp_path), "bytes", "unused", vocab_size=500).tokenizer
    assert words.n_vocab == 500 and words.byte_lengths() is None
    assert words.decode([300, 400]) == "300 400" and words.encode("300 400").tolist() == [300, 400]


# --- downloads ---


class Server:
    """Serves `files`, in `moods`: no_range, break (midway, once), broken (always), redirect (with
    `etag`)."""

    def __init__(self):
        self.files, self.moods, self.seen = {}, set(), []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                name = urllib.parse.urlparse(self.path).path.lstrip("/")
                outer.seen.append((name, self.headers.get("Range")))
                if "redirect" in outer.moods and not name.startswith("storage/"):
                    self.send_response(302)
                    self.send_header("Location", f"/storage/{name}")
                    self.send_header("X-Linked-Etag", f'"{outer.etag}"')
                    self.end_headers()
                    return
                content = outer.files.get(name.removeprefix("storage/"))
                if content is None:
                    return self.send_error(404)
                start, asked = 0, self.headers.get("Range")
                if asked and "no_range" not in outer.moods:
                    start = int(asked.removeprefix("bytes=").rstrip("-"))
                    if start >= len(content):
                        return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                stop = len(content)
                if outer.moods & {"break", "broken"}:
                    stop = start + (stop - start) // 2 if "break" in outer.moods else start
                    outer.moods.discard("break")
                self.wfile.write(content[start:stop])

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server():
    server = Server()
    server.files["a.bin"] = bytes(range(256)) * 100
    server.etag = hashlib.sha256(server.files["a.bin"]).hexdigest()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_a_download_arrives_whole_and_only_once(server, tmp_path):
    path = download.download(f"{server.url}/a.bin", tmp_path / "new" / "a.bin", server.etag)
    assert path.read_bytes() == server.files["a.bin"]
    download.download(f"{server.url}/a.bin", path)
    assert server.seen == [("a.bin", None)] and [file.name for file in path.parent.iterdir()] == [
        "a.bin"
    ]


@pytest.mark.parametrize("have", [1, 2, 10_000, 25_599, 25_600])
def test_a_partial_download_is_continued(server, tmp_path, have):
    (tmp_path / "a.bin.part").write_bytes(server.files["a.bin"][:have])
    download.download(f"{server.url}/a.bin", tmp_path / "a.bin", server.etag)
    assert (tmp_path / "a.bin").read_bytes() == server.files["a.bin"]
    assert server.seen == [("a.bin", f"bytes={have - 1}-" if have > 1 else None)]


def test_a_server_that_ignores_range_sends_the_whole_file(server, tmp_path):
    server.moods.add("no_range")
    (tmp_path / "a.bin.part").write_bytes(b"x" * 9999)
    download.download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == server.files["a.bin"]


@pytest.mark.parametrize("mood", ["break", "break no_range"])
def test_a_connection_that_breaks_midway_is_taken_up_again(server, tmp_path, mood):
    server.moods.update(mood.split())
    download.download(f"{server.url}/a.bin", tmp_path / "a.bin", server.etag)
    assert (tmp_path / "a.bin").read_bytes() == server.files["a.bin"]
    assert [asked for _, asked in server.seen] == [None, "bytes=12799-"]


def test_a_connection_that_brings_nothing_more_ends_with_a_sentence_and_keeps_the_part(
    server, tmp_path
):
    server.moods.add("broken")
    (tmp_path / "a.bin.part").write_bytes(server.files["a.bin"][:1000])
    with pytest.raises(ValueError, match="cannot download .*/a.bin .*--data_url=.*--data=python"):
        download.download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin.part").read_bytes() == server.files["a.bin"][:1000]
    assert not (tmp_path / "a.bin").exists()


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(bytes(30_000))
    download.download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == server.files["a.bin"]


def test_a_damaged_part_is_removed_and_fetched_once_more(server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 5000)
    download.download(f"{server.url}/a.bin", tmp_path / "a.bin", server.etag)
    assert (tmp_path / "a.bin").read_bytes() == server.files["a.bin"]
    assert [asked for _, asked in server.seen] == ["bytes=4999-", None]


def test_a_wrong_checksum_twice_is_an_error_and_leaves_nothing(server, tmp_path):
    with pytest.raises(ValueError, match=f"{server.etag} instead of {'0' * 64}.*--data_url="):
        download.download(f"{server.url}/a.bin", tmp_path / "a.bin", "0" * 64)
    assert len(server.seen) == 2 and not list(tmp_path.iterdir())


def test_the_checksum_that_hugging_face_sends_with_its_redirect_is_used(server, tmp_path):
    server.moods.add("redirect")
    download.download(f"{server.url}/a.bin", tmp_path / "good.bin")
    server.etag = "f" * 64
    with pytest.raises(ValueError, match=f"instead of {'f' * 64}"):
        download.download(f"{server.url}/a.bin", tmp_path / "bad.bin")
    server.etag = "an-ordinary-etag"  # says nothing about the content
    download.download(f"{server.url}/a.bin", tmp_path / "other.bin")
    assert (tmp_path / "good.bin").read_bytes() == (tmp_path / "other.bin").read_bytes()


def test_without_network_the_error_says_what_else_to_use(tmp_path):
    with socket.socket() as taken:  # a port where nobody listens
        taken.bind(("127.0.0.1", 0))
        for name in ("shakespeare", "openwebtext:1"):
            with pytest.raises(
                ValueError, match="cannot download .*--data_url=.*--data=python or a text"
            ):
                corpora.load(
                    name, "bytes", str(tmp_path), url=f"http://127.0.0.1:{taken.getsockname()[1]}"
                )


def test_a_missing_file_and_a_nonsense_address_are_errors(server, tmp_path):
    with pytest.raises(ValueError, match="cannot download .*404"):
        download.download(f"{server.url}/b.bin", tmp_path / "b.bin")
    with pytest.raises(ValueError, match="cannot download nonsense/a.bin .*unknown url type"):
        download.download("nonsense/a.bin", tmp_path / "b.bin")


def test_shakespeare_with_another_text_is_refused(server, tmp_path):
    server.files["input.txt"] = b"To be, or so"
    with pytest.raises(ValueError, match="instead of 86c4e6aa9db7"):
        corpora.load("shakespeare", "bytes", str(tmp_path), url=server.url)


def test_fineweb_takes_the_number_of_files_asked_for(server, tmp_path, gpt2):
    for i, split in enumerate(["val", "train", "train", "train"]):
        headered(tmp_path / "shard", [i] * 10)
        server.files[f"mirror/fineweb_{split}_{i:06d}.bin"] = (tmp_path / "shard").read_bytes()
    three = corpora.load("fineweb:3", "gpt2", str(tmp_path), url=f"{server.url}/mirror")
    two = corpora.load("fineweb:2", "gpt2", str(tmp_path), url=f"{server.url}/mirror")
    assert (len(three.train), len(two.train), len(two.val)) == (30, 20, 10) and len(
        server.seen
    ) == 4
    assert two.train.slice(9, 11).tolist() == [1, 2]


def test_a_mirror_may_be_a_local_folder(server, tmp_path, gpt2):
    headered(tmp_path / "fineweb_val_000000.bin", [1] * 10)
    headered(tmp_path / "fineweb_train_000001.bin", [2] * 10)
    assert (
        len(corpora.load("fineweb:1", "gpt2", str(tmp_path / "cache"), url=tmp_path.as_uri()).train)
        == 10
    )


def tar(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("tokenizer, end", [("bytes", 0), ("gpt2", 258)])
def test_openwebtext_is_tokenised_part_by_part_and_restarts_there(
    server, tmp_path, gpt2, tokenizer, end
):
    documents = [f"the document {i}\n" for i in range(6000)]
    for part in range(2):
        mine = documents[part * 3000 : (part + 1) * 3000]
        halves = [
            {f"{i}.txt": mine[i].encode() for i in range(start, start + 1500)}
            for start in (0, 1500)
        ]
        members = {
            f"some/subset0{part}-{i}_data.xz": tar(half, "w:xz") for i, half in enumerate(halves)
        }
        server.files[f"urlsf_subset0{part}.tar"] = tar(members, "w:")
    second, server.files["urlsf_subset01.tar"] = (
        server.files["urlsf_subset01.tar"],
        b"not an archive",
    )
    with pytest.raises(ValueError, match="openwebtext:2 cannot be read"):
        corpora.load("openwebtext:2", tokenizer, str(tmp_path), url=server.url)
    (tmp_path / "openwebtext" / "urlsf_subset01.tar").unlink()
    del server.files["urlsf_subset01.tar"]
    with pytest.raises(ValueError, match="urlsf_subset01.tar .*404"):
        corpora.load("openwebtext:2", tokenizer, str(tmp_path), url=server.url)
    server.files["urlsf_subset01.tar"] = second
    # Its shards are there, it is not needed again
    (tmp_path / "openwebtext" / "urlsf_subset00.tar").unlink()
    corpus = corpora.load("openwebtext:2", tokenizer, str(tmp_path), url=server.url)
    assert [name for name, _ in server.seen].count("urlsf_subset00.tar") == 1

    def texts(split):
        ids = split.slice(0, len(split))
        documents = np.split(ids, np.flatnonzero(ids == end) + 1)
        assert len(documents.pop()) == 0 and all(ids[-1] == end for ids in documents)
        return [corpus.tokenizer.decode(ids[:-1]) for ids in documents]

    train, val = texts(corpus.train), texts(corpus.val)
    held_out = [d for d in documents if int(hashlib.sha256(d.encode()).hexdigest(), 16) % 2000 == 0]
    assert val == held_out and 0 < len(val) < 15
    assert train == [d for d in documents if d not in held_out]
