"""Texts of one's own: which are read, in which order, what lies between two, and their hash."""

import os
import random
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from harness import run_ranks

import sample
import train
from checkpoint import load as checkpoint
from data import corpora, files, texts
from settings import parse

CAT = "The cat sat on the mat, and the dog on the log.\n"
TINY = (
    "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --eval_every=0 "
    "--sample_tokens=0 --precision=fp32 --device=cpu --plot=false --optim=adamw --save_every=1"
).split()
# In their order: capitals come first, and "a.txt" before "a/z.txt".
BOOKS = {"B.txt": "B" * 30, "a.txt": "a" * 50, "a/z.txt": "z" * 70, "a/é.txt": "é" * 20}


def make(folder: Path, contents: dict[str, str | bytes]) -> Path:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def load(data, tokenizer="bytes", cache="never made") -> corpora.Corpus:
    return corpora.load(str(data), tokenizer, str(cache))


def ids(corpus: corpora.Corpus) -> list[int]:
    """All of them, what is held out behind what is trained on."""
    return [i for part in (corpus.train, corpus.val) for i in part.slice(0, len(part)).tolist()]


def refused(data, tokenizer="bytes", cache="never made") -> str:
    with pytest.raises(ValueError) as error:
        load(data, tokenizer, cache)
    said = str(error.value)
    assert "\n" not in said and len(said) < 700, said
    return said


@pytest.fixture
def gpt2(monkeypatch):
    """A table of 258 words in the place of gpt2's; its end of text is 257."""
    special = {"<|endoftext|>": 257}

    def use(special=special):
        ranks = {bytes([i]): i for i in range(256)} | {b"at": 256}
        table = tiktoken.Encoding(
            "gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens=special
        )
        monkeypatch.setattr(tiktoken, "get_encoding", lambda name: table)

    use()
    return use


# ---- which texts, and in which order -------------------------------------------------------------
def test_a_folder_is_read_at_any_depth_in_the_order_of_its_paths(tmp_path):
    make(tmp_path / "books", BOOKS)
    make(tmp_path / "books", {"notes.md": "no", ".hidden.txt": "no", ".git/a.txt": "no"})
    corpus = load(tmp_path / "books")
    text = "\0".join(BOOKS.values()).encode()
    assert ids(corpus) == [*text]
    assert "(4 texts, the byte 0 between two; held out: the last tenth)" in corpus.name


def test_the_order_in_which_a_system_lists_files_does_not_matter(tmp_path, monkeypatch):
    folder = make(tmp_path, {f"{n % 3}/{n * 7 % 11}.txt": CAT * (n + 1) for n in range(11)})
    usual = load(folder)
    walk, listdir = os.walk, os.listdir

    def shuffled(*given, **options):
        for here, folders, names in walk(*given, **options):
            random.shuffle(folders)
            random.shuffle(names)
            yield here, folders, names

    monkeypatch.setattr(os, "walk", shuffled)
    monkeypatch.setattr(os, "listdir", lambda path: random.sample(x := listdir(path), len(x)))
    for seed in range(5):
        random.seed(seed)
        again = load(folder)
        assert ids(again) == ids(usual) and again.sha256 == usual.sha256


def test_patterns_and_lists_mean_the_same_texts_as_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(make(tmp_path, {f"books/{name}": text for name, text in BOOKS.items()}))
    whole = load("books")
    for data in ("books/**/*.txt", "books/", "books/B.txt,books/a.txt,books/a/*", "books,books/a"):
        assert (ids(load(data)), load(data).sha256) == (ids(whole), whole.sha256), data
        assert len(files.listed(data)) == 4, data
    assert ids(load("books/a.txt, books/B.txt")) == [*b"a" * 50, 0, *b"B" * 30]
    make(tmp_path, {"1,5 [draft].txt": "x" * 40, "n[1].txt": "y" * 30, "n1.txt": "wrong"})
    assert ids(load("1,5 [draft].txt")) == [*b"x" * 40]
    assert ids(load("n[1].txt,books/B.txt")) == [*b"y" * 30, 0, *b"B" * 30]
    make(tmp_path / "c,d [1]", {"a.txt": "x" * 40})
    assert ids(load("c,d [1]")) == [*b"x" * 40]


def test_a_folder_with_shards_stays_a_folder_of_shards(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(50, dtype="<u2").tofile(tmp_path / name)
    make(tmp_path, {"readme.txt": CAT, "more/a.txt": CAT})
    assert len(load(tmp_path).train) == len(load(tmp_path).val) == 50


@pytest.mark.parametrize("loop", ["here/books/again", "books/a/up", "books/self"])
def test_a_linked_folder_is_read_and_a_loop_of_links_ends(tmp_path, loop):
    make(tmp_path / "here", {f"books/{name}": text for name, text in BOOKS.items()})
    (tmp_path / "books").symlink_to(tmp_path / "here" / "books")
    (tmp_path / loop).symlink_to(tmp_path / "here" / "books")
    assert ids(load(tmp_path / "books")) == [*"\0".join(BOOKS.values()).encode()]


def test_two_folders_that_link_to_each_other_end(tmp_path):
    make(tmp_path, {"a/a.txt": "a" * 30, "b/b.txt": "b" * 30})
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a")
    names = files.relative(files.listed(str(tmp_path)))
    assert sorted(names.values()) == ["a/a.txt", "a/other/b.txt", "b/b.txt", "b/other/a.txt"]


# ---- what lies between two, and what is held out -------------------------------------------------
def test_a_text_ends_in_the_tokenizers_end_of_text(tmp_path, gpt2):
    folder = make(tmp_path / "d", {"1.txt": "cat", "2.txt": "<|endoftext|>", "3.txt": "hat" * 9})
    corpus = load(folder, "gpt2", tmp_path / "cache")
    words = "<|endoftext|>".encode()
    assert ids(corpus) == [99, 256, 257, *words, 257, *[104, 256] * 9]
    assert "<|endoftext|> between two" in corpus.name
    assert corpus.tokenizer.decode([257]) == "<|endoftext|>"
    gpt2(special={})
    corpus = load(folder, "gpt2", tmp_path / "cache")
    assert ids(corpus) == [99, 256, 10, *words, 10, *[104, 256] * 9]
    assert "a line break between two" in corpus.name


def test_one_text_has_no_mark(tmp_path, gpt2):
    make(tmp_path, {"a.txt": "hat" * 9})
    for data in (tmp_path, tmp_path / "a.txt"):
        assert ids(load(data)) == [*b"hat" * 9]
        assert ids(load(data, "gpt2", tmp_path / "cache")) == [104, 256] * 9


def test_the_last_tenth_of_all_bytes_is_held_out_wherever_texts_end(tmp_path):
    for sizes in ([100], [90, 10], [89, 11], [50, 45, 5], [1] * 50 + [2] * 25, [5, 95], [99, 1]):
        some = [np.full(size, i, np.uint8) for i, size in enumerate(sizes)]
        train_texts, val_texts = texts.hold_out(some)
        assert (sum(map(len, train_texts)), sum(map(len, val_texts))) == (90, 10), sizes
        assert [*np.concatenate(train_texts + val_texts)] == [*np.concatenate(some)]
        assert min(map(len, train_texts + val_texts)) > 0
    wide = np.frombuffer("✓".encode() * 10, np.uint8)
    assert [len(part) for (part,) in texts.hold_out([wide])] == [27, 3]
    assert [len(part) for part in texts.hold_out([wide[:3]])] == [0, 1]


def test_a_file_named_after_validation_is_held_out_whole(tmp_path):
    contents = {"x/one.txt": "1" * 50, "x/two.txt": "2" * 50, "val/three.txt": "3" * 40}
    folder = make(tmp_path, contents | {"test/four.txt": "4", "val/nil.txt": ""})
    corpus = load(folder)
    assert corpus.val.slice(0, 40).tolist() == [*b"3" * 40] and len(corpus.val) == 40
    assert corpus.train.slice(0, 101).tolist() == [*b"1" * 50, 0, *b"2" * 50]
    assert corpus.name.endswith(
        "held out: nil.txt, three.txt; left alone: four.txt; empty: nil.txt)"
    )
    (folder / "val" / "three.txt").write_text("")
    assert "(val) is empty" in refused(folder)


def test_names_of_books_hold_nothing_out_by_chance(tmp_path):
    books = {"x/The Test of Time.txt": "t" * 50, "x/tests/deep/valid.txt": "v" * 40}
    folder = make(tmp_path, books | {"x/Training Day.txt": "d" * 60, "x/plain.txt": "p" * 50})
    corpus = load(folder)
    assert corpus.name.endswith("(4 texts, the byte 0 between two; held out: the last tenth)")
    assert len(corpus.val) == 20
    # As soon as every text says what it is for, it is no chance.
    (folder / "x" / "plain.txt").unlink()
    corpus = load(folder)
    assert "held out: valid.txt; left alone: The Test of Time.txt" in corpus.name
    assert (len(corpus.train), len(corpus.val)) == (60, 40)
    top = make(tmp_path / "top", {"Valid Reasons.txt": "v" * 40, "plain.txt": "p" * 60})
    assert len(load(top).val) == 10


def test_large_texts_are_mapped_and_are_the_same_tokens(tmp_path, monkeypatch):
    folder = make(tmp_path, BOOKS)
    small = load(folder)
    monkeypatch.setattr(texts, "IN_MEMORY", 100)
    large = load(folder)
    assert len(large.train.mapped) > 1 and len(small.train.mapped) == 0
    assert ids(large) == ids(small) and large.sha256 == small.sha256
    # No more maps than files may be open.
    monkeypatch.setattr(texts, "MAPS", 1)
    few = load(folder)
    assert len(few.train.mapped) < len(large.train.mapped)
    assert ids(few) == ids(small) and few.sha256 == small.sha256


# ---- what cannot be used -------------------------------------------------------------------------
def test_empty_texts_are_left_out_and_named(tmp_path):
    bom = b"\xef\xbb\xbf"
    folder = make(tmp_path, {"0.txt": "", "1.txt": CAT, "2.txt": bom, "3.txt": bom + CAT.encode()})
    corpus = load(folder)
    assert ids(corpus) == [*f"{CAT}\0{CAT}".encode()]
    assert "2 texts" in corpus.name and "empty: 0.txt, 2.txt" in corpus.name
    many = make(tmp_path / "many", {f"{n}.txt": "" for n in range(9)} | {"x.txt": CAT})
    assert "empty: 0.txt, 1.txt, 2.txt and 6 more" in load(many).name
    (many / "x.txt").write_text("")
    assert "is empty: give a file with text" in refused(many)


def test_what_is_no_text_is_named(tmp_path, gpt2):
    latin = "déjà vu, garçon\n".encode("latin-1") * 30
    packed = b"\x1f\x8b\x08" + bytes(range(256))
    folder = make(tmp_path / "d", {"a.txt": CAT, "b.txt": latin, "c.txt": CAT, "d.txt": packed})
    for tokenizer in ("bytes", "gpt2"):
        said = refused(folder, tokenizer, tmp_path / "cache")
        assert f"{folder / 'b.txt'} is text, but not in UTF-8" in said and "iconv" in said
        assert said.endswith("nor can these be used: d/d.txt")
    (folder / "b.txt").unlink()
    assert f"{folder / 'd.txt'} is a gzip file: unpack it" in refused(folder)
    # A single file of other bytes is taken by `bytes` and by no other tokenizer; so is one of many.
    odd = b"a\0\xff\xfe" * 50 + CAT.encode() * 9
    make(folder, {"d.txt": odd})
    assert ids(load(folder)) == [*CAT.encode(), 0, *CAT.encode(), 0, *odd]
    for data in (folder, folder / "d.txt"):
        assert "d.txt is not text in UTF-8" in refused(data, "gpt2", tmp_path / "cache")


@pytest.mark.parametrize("data", ["d", "d/*.txt", "d/a.txt,d/gone.txt", "d/deep"])
def test_a_link_to_nothing_is_named_however_it_is_reached(tmp_path, monkeypatch, data):
    monkeypatch.chdir(make(tmp_path, {"d/a.txt": CAT, "d/deep/b.txt": CAT}))
    folder = tmp_path / "d" / "deep" if data == "d/deep" else tmp_path / "d"
    (folder / "gone.txt").symlink_to("nowhere.txt")
    said = refused(data)
    assert "gone.txt is a link to nowhere.txt, which is not there: mend it" in said


def test_a_text_or_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    folder = make(tmp_path, {"a.txt": CAT, "b.txt": CAT, "locked/c.txt": CAT})
    if os.name == "posix" and os.getuid():
        (folder / "b.txt").chmod(0)
    else:  # root may read everything
        fromfile = np.fromfile

        def forbidden(path, *more):
            if Path(path).name == "b.txt":
                raise PermissionError(13, "Permission denied", str(path))
            return fromfile(path, *more)

        monkeypatch.setattr(np, "fromfile", forbidden)
    assert f"{folder / 'b.txt'} cannot be read: Permission denied" in refused(folder)
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert f"Permission denied: '{folder / 'locked'}'" in refused(folder)


def test_a_folder_without_texts_says_what_to_type_for_what_it_has(tmp_path):
    make(tmp_path / "d", {"a.md": CAT, "b/c.md": CAT, "x.png": "", ".hidden.txt": CAT})
    said = refused(tmp_path / "d")
    assert "has no .bin or .npy shards and no .txt, .jsonl or .parquet, but .md .png" in said
    assert said.endswith(f"for those type --data='{tmp_path / 'd'}/**/*.md'")
    assert ids(load(f"{tmp_path / 'd'}/**/*.md")) == [*f"{CAT}\0{CAT}".encode()]


# ---- the hash ------------------------------------------------------------------------------------
def test_the_hash_is_the_same_wherever_the_folder_lies(tmp_path, monkeypatch):
    first = make(tmp_path / "here", BOOKS)
    there = Path(shutil.copytree(first, tmp_path / "far" / "away, [1]"))
    (tmp_path / "link").symlink_to(there)
    one = load(first).sha256
    assert {load(there).sha256, load(tmp_path / "link").sha256} == {one}
    monkeypatch.chdir(first)
    assert load(".").sha256 == load("*.txt,a").sha256 == one
    # macOS stores é as two letters.
    (there / "a" / "é.txt").rename(there / "a" / unicodedata.normalize("NFD", "é.txt"))
    assert load(there).sha256 == one


def renamed(folder: Path) -> None:
    (folder / "a" / "z.txt").rename(folder / "a" / "zz.txt")  # stays at its place in the order


def moved(folder: Path) -> None:
    (folder / "a" / "z.txt").rename(folder / "z.txt")


def changed(folder: Path) -> None:
    (folder / "a.txt").write_text("a" * 49 + "b")


def border(folder: Path) -> None:
    """The same bytes, one of them on the other side of a border."""
    make(folder, {"B.txt": "B" * 29, "a.txt": "B" + "a" * 50})


def added(folder: Path) -> None:
    make(folder, {"more/new.txt": "n"})


def removed(folder: Path) -> None:
    (folder / "B.txt").unlink()


@pytest.mark.parametrize("change", [renamed, moved, changed, border, added, removed])
def test_what_makes_it_another_text_changes_the_hash(tmp_path, change):
    folder = make(tmp_path, BOOKS)
    before = load(folder).sha256
    make(folder, {"notes.md": "no text", ".hidden.txt": "no", "nil.txt": ""})
    assert load(folder).sha256 == before
    change(folder)
    assert load(folder).sha256 != before


def test_a_single_texts_hash_is_of_its_bytes(tmp_path):
    make(tmp_path, {"a.txt": CAT, "b/c.txt": CAT})
    assert load(tmp_path / "a.txt").sha256 == load(tmp_path / "b").sha256


# ---- in a run ------------------------------------------------------------------------------------
def start(*argv) -> dict:
    return train.main(parse.parse([*TINY, *map(str, argv)]))


def on_ranks(rank, world, folders, *argv):
    """One rank of a run; each of them may have a folder of its own, as on several machines."""
    data = folders[rank % len(folders)]
    try:
        start(f"--data={data}", *argv)
    except ValueError as error:
        return str(error)
    return checkpoint.newest(argv[0].partition("=")[2]).tree("record/data_sha256")


def test_ranks_read_the_same_folder_and_machines_with_another_one_hear_of_it(tmp_path):
    one = make(tmp_path / "one", {"a.txt": CAT * 40, "b/c.txt": CAT * 20})
    two = Path(shutil.copytree(one, tmp_path / "two"))
    said = run_ranks(2, on_ranks, [one, two], f"--out_dir={tmp_path}/out", "--steps=1")
    assert said == [load(one).sha256] * 2
    (two / "b" / "c.txt").rename(two / "b" / "d.txt")
    said = run_ranks(2, on_ranks, [one, two], f"--out_dir={tmp_path}/other", "--steps=1")
    assert all("is not the same on every machine; copy it to all from one" in x for x in said)


def test_a_run_resumes_where_the_folder_has_moved_and_not_where_it_has_changed(tmp_path):
    books = make(tmp_path / "books", {"a.txt": CAT * 40, "b/c.txt": CAT * 20})
    out = f"--out_dir={tmp_path}/out"
    start(f"--data={books}", out, "--steps=1")
    there = books.rename(tmp_path / "moved")
    start(f"--data={there}", out, "--steps=2")
    assert checkpoint.newest(tmp_path / "out").step == 2
    with pytest.raises(ValueError, match="books does not exist"):
        start(f"--data={books}", out, "--steps=3")
    (there / "b" / "c.txt").rename(there / "b" / "d.txt")
    with pytest.raises(ValueError, match="moved has changed since .*step-00000002 was written"):
        start(f"--data={there}", out, "--steps=3")


def test_a_sample_shows_the_byte_between_two_texts_as_a_line_break(tmp_path, capsys):
    # Every second byte is the mark: the model soon writes it.
    folder = make(tmp_path / "d", {f"{n}.txt": "a" for n in range(900)})
    more = ["--steps=30", "--lr=0.1", "--sample_tokens=40", "--schedule=constant"]
    start(f"--data={folder}", f"--out_dir={tmp_path}/out", *more)
    said = capsys.readouterr().out
    assert "---- a sample ----" in said and "a\na\na" in said and "\0" not in said
    log = (tmp_path / "out" / "train.log").read_bytes()
    assert b"a sample" in log and b"\0" not in log
    sample.main([f"{tmp_path}/out", "--tokens=40", "--prompt=a"])
    said = capsys.readouterr().out
    assert "a\na\na" in said and "\0" not in said
