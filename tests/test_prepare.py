"""`python -m data.prepare`: the same bytes for any number of processes and after any kill."""

import errno
import filecmp
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_documents import TRAIN, VAL, jsonl, write
from test_documents import ids as ids_of
from test_documents import load as load_corpus

from data import documents, pieces, prepare, shards

ROOT = Path(__file__).parent.parent
# Small units, so that a small corpus has many. Each process that is spawned reads this file, too.
SCRIPT = """
import os, sys, time
from data import prepare
prepare.SMALLEST = 2000
{}
if __name__ == "__main__":
    sys.exit(prepare.main())
"""


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """Some files of all kinds that need no package; units of 2 KB."""
    monkeypatch.setattr(prepare, "SMALLEST", 2000)
    folder = tmp_path / "in"
    write(folder, "jsonl.gz")
    for path in folder.iterdir():
        path.rename(folder / path.name.replace("train", "x").replace("val", "y"))
    draw = random.Random(3)
    long = [" ".join(draw.choices(["aa", "b", "é\n"], k=draw.randrange(300))) for _ in range(60)]
    (folder / "a.jsonl").write_bytes(jsonl(long))
    return folder


def quick(monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


def made(corpus: Path, out: Path, **options) -> dict:
    return prepare.prepare(str(corpus), str(out), "bytes", **{"held_out": 0.2} | options)


def documents_in(out: Path, split: str) -> list[bytes]:
    tokens = [
        shards.read_shard(path, 256).astype(np.uint8) for path in sorted(out.glob(f"{split}*"))
    ]
    return np.concatenate(tokens).tobytes().split(b"\0")[:-1]


def same(one: Path, two: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir()), (one, two)
    return filecmp.cmpfiles(one, two, names, shallow=False)[0] == names


# ---- what is written -----------------------------------------------------------------------------
def test_all_documents_are_in_order_and_one_in_n_is_held_out_by_its_hash(
    tmp_path, corpus, monkeypatch
):
    quick(monkeypatch)
    out = tmp_path / "out"
    counts = made(corpus, out)
    lines = [json.loads(line)["text"] for line in (corpus / "a.jsonl").read_bytes().splitlines()]
    expected = [text.encode() for text in [*lines, *TRAIN, *VAL] if text]
    train, val = documents_in(out, "train"), documents_in(out, "val")
    assert train == [text for text in expected if text in {*train}]
    assert sorted(train + val) == sorted(expected)
    assert 0.1 < len(val) / len(expected) < 0.3
    assert len([*out.glob("train*")]) > 5 and len([*out.glob("val*")]) == 1
    assert counts == {
        "documents": len(train),
        "tokens": sum(len(text) + 1 for text in train),
        "bytes": sum(map(len, expected)),
        "val_documents": len(val),
        "val_tokens": sum(len(text) + 1 for text in val),
        "empty": lines.count(""),
        "damaged": 0,
    }
    assert not (out / ".prepare").exists()
    # Whatever else is read beside them, the same documents are held out.
    (corpus / "a.jsonl").unlink()
    made(corpus, tmp_path / "fewer")
    assert {*documents_in(tmp_path / "fewer", "val")} == {*val} & {t.encode() for t in TRAIN + VAL}


def test_names_say_what_is_held_out_and_a_run_reads_the_folder(tmp_path, monkeypatch):
    quick(monkeypatch)
    where = write(tmp_path / "in", "jsonl")
    out = tmp_path / "out"
    prepare.prepare(where, str(out), "bytes")
    texts = ids_of(load_corpus(where))
    assert ids_of(load_corpus(out)) == [tokens + [0] for tokens in texts]
    said = json.loads((out / "prepare.json").read_text())
    assert [name for _, name, *_ in said["inputs"]] == ["train.jsonl", "val.jsonl"]


def test_long_texts_are_cut_as_by_a_run_and_have_a_mark_at_their_end(tmp_path, monkeypatch):
    quick(monkeypatch)
    monkeypatch.setattr(pieces, "PIECE", 50)
    monkeypatch.setattr(prepare, "BATCH", 64)
    monkeypatch.setattr(documents, "LINE", 100)  # longer texts are mapped
    folder = tmp_path / "in"
    (folder / "val").mkdir(parents=True)
    (folder / "train.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(TRAIN).encode())
    (folder / "val" / "a.txt").write_bytes("\n".join(VAL).encode())
    (folder / "val" / "b.txt").write_bytes(b"")
    write_tokenizer(tmp_path)
    counts = prepare.prepare(str(folder), str(tmp_path / "out"), f"{tmp_path}/tokenizer.json")
    expected = ids_of(load_corpus(folder, f"{tmp_path}/tokenizer.json", tmp_path / "cache"))
    found = ids_of(load_corpus(tmp_path / "out", f"{tmp_path}/tokenizer.json"))
    assert found == [tokens + [found[0][-1]] for tokens in expected]
    assert counts["empty"] == 1 and counts["documents"] == counts["val_documents"] == 1


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json of bytes, with two of them as a word, and an end."""
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "at"])}
    words = Tokenizer(models.BPE(vocab, [("a", "t")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(folder / "tokenizer.json"))


def test_units_are_neither_too_small_nor_too_many(tmp_path, corpus):
    for smallest, most in ((1, 300), (10**9, 1)):
        prepare.SMALLEST = smallest
        units = prepare.units_of({"train": sorted(corpus.iterdir())})
        total = sum(path.stat().st_size for path in corpus.iterdir())
        assert sum(part.size for _, parts in units for part in parts) == total
        assert 1 <= len(units) <= most
        assert len(units) > 40 or smallest > 1


# ---- processes, kills and faults -----------------------------------------------------------------
def command(corpus: Path, out: Path, *flags: str, first="") -> subprocess.Popen:
    """first: what each process does before."""
    script = out.with_name(f"{out.name}.py")
    script.write_text(SCRIPT.format(first))
    words = [sys.executable, script, corpus, out, "--tokenizer=bytes", "--held_out=0.2", *flags]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    }
    return subprocess.Popen(words, env=environment, text=True, stdout=-1, stderr=-1)


@pytest.mark.slow
def test_three_processes_write_the_bytes_of_one(tmp_path, corpus):
    one, three = (command(corpus, tmp_path / f"out{n}", f"--jobs={n}") for n in (1, 3))
    said, faults = three.communicate(timeout=60)
    assert three.returncode == 0 == one.wait(timeout=60), faults
    assert same(tmp_path / "out1", tmp_path / "out3")
    n = json.loads((tmp_path / "out3" / "prepare.json").read_text())["counts"]
    assert f"{n['documents']:,} documents, {n['tokens']:,} tokens to train on" in said
    assert f"python train.py --data={tmp_path}/out3 --tokenizer=bytes" in said


class Killed(BaseException):
    pass


def test_a_kill_between_any_two_steps_costs_nothing(tmp_path, corpus, monkeypatch):
    quick(monkeypatch)
    whole = tmp_path / "whole"
    made(corpus, whole)
    out = tmp_path / "out"
    left = 0

    def counted(step):
        def wrapped(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            # Who was killed tidies nothing up.
            return step(*args, **options) if left > 0 else None

        return wrapped

    n_kills = 0
    for step in [*range(1, 9), *range(8, 60, 7), 1, 1, 1, 2]:
        left = step
        with monkeypatch.context() as here:
            here.setattr(os, "replace", counted(os.replace))
            here.setattr(Path, "unlink", counted(Path.unlink))
            here.setattr(prepare.shutil, "rmtree", counted(prepare.shutil.rmtree))
            try:
                made(corpus, out)
            except Killed:
                n_kills += 1
    made(corpus, out)
    assert n_kills > 8 and same(whole, out)
    # After the last step but one.
    with monkeypatch.context() as here, pytest.raises(Killed):
        left = 1
        here.setattr(prepare.shutil, "rmtree", counted(prepare.shutil.rmtree))
        made(corpus, tmp_path / "late")
    made(corpus, tmp_path / "late")
    assert same(whole, tmp_path / "late")


@pytest.mark.slow
def test_twenty_kills_at_random_cost_nothing(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    draw = random.Random(7)
    lines = [" ".join(draw.choices(["aa", "b", "é\n"], k=draw.randrange(900))) for _ in range(4000)]
    (folder / "a.jsonl").write_bytes(jsonl(lines))
    began = time.monotonic()
    assert command(folder, tmp_path / "whole", "--jobs=2").wait() == 0
    seconds = time.monotonic() - began
    out = tmp_path / "out"
    n_kills = n_in_work = 0
    while n_kills < 20:
        # A line of its own: more of it would be done before the twentieth kill.
        slow = "f = os.fsync; os.fsync = lambda x: (time.sleep(0.02), f(x))"
        process = command(folder, out, "--jobs=2", first=slow)
        time.sleep(draw.uniform(0.2, 0.5) * seconds)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            break
        n_kills += 1
        n_in_work += (out / ".prepare").exists() and not (out / "prepare.json").exists()
        time.sleep(0.02)
    process = command(folder, out, "--jobs=2")
    assert process.wait() == 0, process.stderr.read()
    assert n_in_work >= 10 and same(tmp_path / "whole", out)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_no_process_outlives_the_one_that_was_killed(tmp_path, corpus):
    # Their first shards are never done.
    pids = tmp_path / "pids"
    first = f"""
def fsync(file):
    if __name__ != "__main__":
        open({str(pids)!r}, "a").write(f"{{os.getpid()}} ")
        time.sleep(60)
os.fsync = fsync
"""
    process = command(corpus, tmp_path / "out", "--jobs=2", first=first)
    until = time.monotonic() + 20
    while not (pids.exists() and len(pids.read_text().split()) >= 2):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.wait()
    for pid in pids.read_text().split():
        while is_alive(pid):
            assert time.monotonic() < until, f"{pid} is still there"
            time.sleep(0.02)


def is_alive(pid: str) -> bool:
    """Nobody may have waited for it: then it is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_is_a_sentence_and_the_work_continues(tmp_path, corpus, monkeypatch, error):
    left = 6  # while the third shard is written

    def fsync(file):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ValueError) as said:
        made(corpus, tmp_path / "out")
    if error == errno.ENOSPC:
        assert f"the disk of {tmp_path}/out is full: make room and type the same" in str(said.value)
    else:
        assert "Permission denied: what is done is kept" in str(said.value)
    assert not [*tmp_path.rglob("*.bin.tmp")]  # a full disk keeps no half file
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("train*")}
    assert done
    made(corpus, tmp_path / "out")
    made(corpus, tmp_path / "whole")
    assert same(tmp_path / "whole", tmp_path / "out")
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


def test_a_damaged_line_of_a_later_unit_has_its_line_in_the_file(tmp_path, corpus, monkeypatch):
    quick(monkeypatch)
    raw = (corpus / "a.jsonl").read_bytes().splitlines(True)
    raw[51] = b'{"text": 1}\n'
    raw[53] = b"{\n"
    (corpus / "a.jsonl").write_bytes(b"".join(raw))
    with pytest.raises(ValueError, match=f"^{corpus}/a.jsonl, line 52: .*--skip_damaged$"):
        made(corpus, tmp_path / "again")
    counts = made(corpus, tmp_path / "out", skip_damaged=True)
    assert counts["damaged"] == 2 and counts["documents"] + counts["val_documents"] > 80
    skipped = json.loads((tmp_path / "out" / "prepare.json").read_text())["skipped"]
    assert [re.search(r"line (\d+)", line)[1] for line in skipped] == ["52", "54"]
    # Whoever hears of it late keeps what is done.
    assert len([*(tmp_path / "again").glob("train*")]) > 3
    made(corpus, tmp_path / "again", skip_damaged=True)
    assert same(tmp_path / "out", tmp_path / "again")


# ---- what is refused -----------------------------------------------------------------------------
def test_another_job_in_the_same_folder_is_refused(tmp_path, corpus, monkeypatch):
    quick(monkeypatch)
    out = str(tmp_path / "out")
    first = made(corpus, out)
    before = (tmp_path / "out" / "prepare.json").stat().st_mtime_ns
    assert made(corpus, out) == first  # it is done
    assert (tmp_path / "out" / "prepare.json").stat().st_mtime_ns == before
    for options, word in (
        (dict(held_out=0.3), "--held_out=0.2"),
        (dict(field="body"), "--field=text"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {word}: take another folder"):
            made(corpus, out, **options)
    with open(corpus / "a.jsonl", "ab") as file:
        file.write(b'{"text": "one more"}\n')
    with pytest.raises(ValueError, match="files that have changed since"):
        made(corpus, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.pdf").write_bytes(b"%PDF-")
    with pytest.raises(ValueError, match="has files of another origin, thesis.pdf"):
        made(corpus, tmp_path / "other")


@pytest.mark.parametrize(
    "words, said",
    [
        ("nowhere OUT --tokenizer=bytes", "nowhere does not exist"),
        ("IN OUT --tokenizer=ids", "makes no tokens"),
        ("IN OUT --tokenizer=byts", "try --tokenizer=bytes"),
        ("IN OUT", "required: --tokenizer; usage: python -m data.prepare FOLDER OUT"),
        ("IN OUT --tokenizer=bytes --jobs=0", "--jobs=0: 1 or more"),
        ("IN OUT --tokenizer=bytes --held_out=1", "a share between 0 and 1"),
        ("IN OUT --tokenizer=bytes --skip", "unrecognized arguments: --skip"),
        ("IN OUT --tokenizer=bytes --held_out=1e-9", "documents none is held out"),
        ("SHARDS OUT --tokenizer=bytes", "has token shards already: type --data="),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(
    tmp_path, corpus, monkeypatch, capsys, words, said
):
    quick(monkeypatch)
    write(tmp_path / "shards", "uint16")
    places = {"IN": corpus, "OUT": tmp_path / "out", "SHARDS": tmp_path / "shards"}
    argv = [str(places.get(word, word)) for word in words.split()]
    assert prepare.main([*argv, "--jobs=1"] if "--jobs" not in words else argv) == 2
    found = capsys.readouterr()
    assert said in found.err and found.err.count("\n") == 1 and not found.out


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path):
    peaks = []
    line = jsonl([" ".join(TRAIN)[:2000]])
    for megabytes in (20, 200):
        path = tmp_path / f"{megabytes}.jsonl"
        with open(path, "wb") as file:
            for _ in range(megabytes):
                file.write(line * (10**6 // len(line)))
        code = "import resource; from data import prepare; prepare.main(); "
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        words = [sys.executable, "-c", code, str(path), f"{path}-out", "--tokenizer=bytes"]
        # All text is the same: the share decides whether it is all held out or none is.
        done = subprocess.run(
            [*words, "--jobs=1"], cwd=ROOT, text=True, capture_output=True, timeout=150
        )
        assert "held out" in done.stdout + done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 30 < 400, peaks
