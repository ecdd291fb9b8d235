"""Recipes and data files that are damaged, cut short, made of the wrong things or made to harm:
each is one sentence, or works; never a traceback, never a wait. All mutations come from a fixed
seed.
"""

import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from data import corpora, dataset
from settings import parse

ROOT = Path(__file__).parent.parent
RECIPES = sorted(ROOT.glob("configs/*.toml"))
WORDS = [
    b"nan",
    b"inf",
    b"-1",
    b"1e400",
    b"0",
    b"true",
    b'"none"',
    b"[]",
    b"{}",
    b"[1, [2]]",
    b'""',
    b"\x00",
    b"\xff\xfe",
    b"=",
    b'"""',
    b"[opt]\n",
    b"[[steps]]\n",
    b"'",
    b"9" * 400,
    b"9" * 5000,
    b"1979-05-27",
    b"#",
    b"\"__import__('os').system('x')\"",
    b"[" * 3000,
    b"\xe2\x80\xae",
    b"opt.betas = 1\n",
]


@contextmanager
def seconds(limit: int):
    """A wait is a failure, where the system has an alarm."""
    if hasattr(signal, "SIGALRM"):
        before = signal.signal(
            signal.SIGALRM, lambda *_: (_ for _ in ()).throw(AssertionError("it waits"))
        )
        signal.alarm(limit)
    try:
        yield
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """One to three changes: bytes flipped, a piece cut, doubled or moved, a word where a value
    was."""
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        match rng.randrange(6):
            case 0:
                raw = raw[:a] + bytes(rng.randrange(256) for _ in range(3)) + raw[a + 3 :]
            case 1:
                raw = raw[:a] + raw[b:]
            case 2:
                raw = raw[:a] + raw[a:b] * 2 + raw[b:]
            case 3:
                raw = raw[:a]
            case 4:
                lines = raw.split(b"\n")
                i = rng.randrange(len(lines))
                lines[i] = lines[i].partition(b"=")[0] + b"= " + rng.choice(WORDS)
                raw = b"\n".join(lines)
            case 5:
                raw = raw[:a] + rng.choice(WORDS) + raw[a:]
    return raw


def sentence(error: ValueError) -> None:
    """What a user gets is one line that says something, and nothing of the terminal's own."""
    said = str(error)
    assert said and "\n" not in said, said[:300]
    assert type(error) is ValueError


def parsed(path: Path) -> bool:
    """Whether the recipe is taken; a refusal must be a sentence."""
    try:
        cfg = parse.parse([str(path), "--steps=1"])
    except ValueError as error:
        sentence(error)
        return False
    text = parse.to_toml(cfg, {})  # what is taken can be written and read again
    path.write_text(text, encoding="utf-8")
    again = parse.parse([str(path)])
    assert parse.to_toml(again, {}) == text
    return True


def recipes(count: int):
    rng = random.Random(20240817)
    for i in range(count):
        yield mutated(RECIPES[i % len(RECIPES)].read_bytes(), rng)


def test_of_600_damaged_recipes_each_is_taken_or_refused_in_one_line(tmp_path):
    path, taken = tmp_path / "a.toml", 0
    for i, raw in enumerate(recipes(600)):
        path.write_bytes(raw)
        try:
            with seconds(5):
                taken += parsed(path)
        except BaseException as error:
            raise AssertionError(f"recipe {i}: {raw[:2000]!r}") from error
    assert 30 < taken < 400  # the mutations do something, and not always too much


@pytest.mark.parametrize(
    "field", ["steps", "lr", "data", "tied", "keep", "schedule", "logit_cap", '"opt.betas"']
)
def test_each_word_in_the_place_of_a_value_is_taken_or_refused_in_one_line(tmp_path, field):
    for word in WORDS:
        (tmp_path / "a.toml").write_bytes(field.encode() + b" = " + word)
        parsed(tmp_path / "a.toml")
        try:
            parse.parse(
                [f"--{field.strip(chr(34))}={word.decode(errors='surrogateescape').strip()}"]
            )
        except ValueError as error:
            sentence(error)


# ---- data ----------------------------------------------------------------------------------------
def shard(
    ids, magic: int | None = 20240520, version: int = 1, count: int | None = None, high: int = 0
) -> bytes:
    """A .bin file as a writer would make it; magic None: without a header."""
    if magic is None:
        return np.array(ids, "<u2").tobytes()
    head = np.zeros(256, "<u4")
    head[:4] = magic, version, len(ids) if count is None else count, high
    return head.tobytes() + np.array(ids, "<u2" if magic == 20240520 else "<u4").tobytes()


IDS = [*range(256)] * 3
SHARDS = [shard(IDS), shard(IDS, None), shard(IDS, 20240801, 7)]
HEADS = [
    shard(IDS, count=c, high=h)
    for c, h in ((2**31, 0), (0, 1), (2**32 - 1, 2**32 - 1), (0, 0), (767, 0))
]
HEADS += [
    shard(IDS, magic=m, version=v) for m, v in ((20240520, 7), (20240801, 1), (20240520, 2**32 - 1))
]


def loaded(where: Path, tokenizer: str = "bytes") -> bool:
    """Whether the data are taken, in which case every row can be read; a refusal must be a
    sentence."""
    try:
        corpus = corpora.load(str(where), tokenizer, str(where.parent / "cache"))
        for tokens in (corpus.train, corpus.val):
            rows = dataset.Dataset(tokens, 8, 1, 256)
            ids = rows(range(rows.per_epoch))
            assert ids.min() >= 0 and ids.max() < 256
    except ValueError as error:
        sentence(error)
        return False
    return True


def test_of_400_damaged_shards_each_is_taken_or_refused_in_one_line(tmp_path):
    rng, taken = random.Random(11), 0
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "val.bin").write_bytes(shard([1] * 100))
    for i in range(400):
        raw = (SHARDS + HEADS)[i % 11]
        for _ in range(0 if i < 11 else rng.randint(1, 3) if i % 2 else 0):  # the size stays right
            at = rng.randrange(len(raw) - 1)
            raw = raw[:at] + bytes([rng.choice([0, 1, 255]), 0]) + raw[at + 2 :]
        raw = mutated(raw, rng) if i > 10 and not i % 2 else raw
        (tmp_path / "d" / "train.bin").write_bytes(raw)
        try:
            with seconds(5):
                taken += loaded(tmp_path / "d")
        except BaseException as error:
            raise AssertionError(f"shard {i}: {raw[:40]!r} ... {len(raw)} bytes") from error
    assert 20 < taken < 300


@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
def test_a_token_beyond_the_vocabulary_is_found_wherever_it_is(tmp_path, monkeypatch, small):
    monkeypatch.setattr(corpora, "SMALL", corpora.SMALL if small else 0)
    rng = random.Random(5)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "val.bin").write_bytes(shard([1] * 100))
    for _ in range(60):
        ids = [7] * 801
        ids[rng.randrange(801)] = rng.randrange(256, 2**16)
        (tmp_path / "d" / "train.bin").write_bytes(shard(ids, rng.choice([None, 20240520])))
        assert not loaded(tmp_path / "d")


def test_of_200_damaged_texts_each_is_taken_or_refused_in_one_line(tmp_path, monkeypatch):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    rng, taken = random.Random(3), 0
    text = "déjà vu ✓ \U0001f600 end\n".encode() * 40
    for i, raw in enumerate([b"", b"x", b"\xff", b"\x80" * 50, b"\n" * 50, b"\x00" * 999, text]):
        (tmp_path / "a.txt").write_bytes(raw)
        with seconds(5):
            assert loaded(tmp_path / "a.txt") == (len(raw) > 90)
    for i in range(193):
        (tmp_path / "a.txt").write_bytes(raw := mutated(text, rng))
        try:
            with seconds(5):
                taken += loaded(tmp_path / "a.txt", "gpt2")
        except BaseException as error:
            raise AssertionError(f"text {i}: {raw!r}") from error
    assert 10 < taken < 190


@pytest.mark.parametrize(
    "name",
    [
        "",
        "\0",
        "a" * 5000,
        "~nobody-of-this-name/x",
        "/dev/null",
        "//",
        "/dev/zero",
        "python:",
        "shakespeare:3",
        "fineweb:-1",
        ".",
        "..",
        "~",
        "--",
        "\n",
        "openwebtext:\u0663",
        "PYTHON",
        "file:///etc/passwd",
    ],
)
@pytest.mark.parametrize("field", ["data", "data_dir", "tokenizer"])
def test_a_strange_name_is_a_sentence(tmp_path, monkeypatch, name, field):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"text " * 100)
    given = {"data": str(tmp_path / "a.txt"), "tokenizer": "bytes", "data_dir": str(tmp_path)} | {
        field: name
    }
    with seconds(20):
        try:
            corpora.load(given["data"], given["tokenizer"], given["data_dir"])
        except ValueError as error:
            sentence(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "val.bin").write_bytes(shard([1] * 100))
    os.mkfifo(tmp_path / "d" / "train.bin")
    os.mkfifo(tmp_path / "pipe.txt")
    with seconds(5):
        assert not loaded(tmp_path / "d") and not loaded(tmp_path / "pipe.txt")
        (tmp_path / "d" / "train.bin").unlink()
        for target in ("/dev/zero", tmp_path, tmp_path / "nothing"):
            (tmp_path / "d" / "train.bin").symlink_to(target)
            assert not loaded(tmp_path / "d")
            (tmp_path / "d" / "train.bin").unlink()
        for recipe in (tmp_path / "pipe.txt", "/dev/zero", tmp_path):
            with pytest.raises(ValueError):
                parse.parse([str(recipe)])


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read everything"
)
def test_a_file_that_may_not_be_read_is_a_sentence(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text " * 100)
    (tmp_path / "a.txt").chmod(0)
    assert not loaded(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="cannot read the recipe"):
        parse.parse([str(tmp_path / "a.txt")])


# ---- as a process --------------------------------------------------------------------------------
def train(*argv: str) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", *argv], cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1, done.stderr[-2000:]
    assert done.stderr.startswith(b"train.py: ")


@pytest.mark.slow
def test_a_process_ends_with_2_and_one_line(tmp_path):
    out, folder = f"--out_dir={tmp_path / 'out'}", tmp_path / "d"
    folder.mkdir()
    path = tmp_path / "a.toml"
    wrong = []
    for raw in recipes(600):
        path.write_bytes(raw)
        if not parsed(path):
            wrong.append(raw)
    for raw in wrong[:60:10]:
        path.write_bytes(raw)
        train(str(path), out)
    (folder / "val.bin").write_bytes(shard([1] * 1000))
    for raw in (
        shard(IDS, count=2**31),
        shard([7] * 900 + [999]),
        SHARDS[0][:1000],
        b"",
        shard(IDS, version=9),
    ):
        (folder / "train.bin").write_bytes(raw)
        train(f"--data={folder}", "--block_size=16", "--device=cpu", out)
