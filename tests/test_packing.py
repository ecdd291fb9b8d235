"""Packed sequences: whole documents one after another, the last one cut where the sequence ends."""

import hashlib
import random

import numpy as np
import pytest
import torch
from test_resume_edges import TINY, refused
from test_resume_edges import start as run
from test_train import assert_same_bits, rows, trace

from checkpoint import load
from data import dataset, packing
from data.packing import Packed

D = 7


def corpus(lengths, begins: bool = True) -> np.ndarray:
    """(tokens,) documents of these lengths; every token but D is there once. And one token more."""
    lengths = np.asarray(lengths)
    ids = np.arange(100, 101 + lengths.sum())
    starts = np.cumsum(lengths) - lengths
    ids[starts if begins else starts[1:]] = D
    return ids


def packed(ids: np.ndarray, T: int, seed: int = 1, n_shards: int = 1, **more) -> Packed:
    tokens = dataset.Tokens(np.array_split(ids, n_shards), "numbers")
    return Packed(tokens, T, seed, int(ids.max()) + 1, token=D, **more)


def check(ids: np.ndarray, found: Packed) -> None:
    """All that is claimed of the sequences, whatever the plan."""
    T = found.block_size
    n = len(ids) - 1  # the last token is only a target
    begins = (ids == D) | (np.arange(len(ids)) == 0)
    edges = [*np.flatnonzero(begins[:n]), n]
    end_of = dict(zip(edges, edges[1:]))
    used = np.zeros(n, int)
    samples = found.read(range(found.per_epoch)).numpy()
    assert samples.shape == (found.per_epoch, T + 1)
    for sample, i in zip(samples, found.sequence_numbers(range(found.per_epoch)).tolist()):
        pieces = found.pieces(i)
        where = np.concatenate([np.arange(*piece) for piece in pieces])
        assert np.array_equal(sample, ids[where]) and len(where) == T + 1
        assert all(begins[start] for start, _ in pieces), "a piece begins inside a document"
        assert all(end_of[start] == stop for start, stop in pieces[:-1]), "cut inside a sequence"
        assert where[-2] + 1 == where[-1] <= end_of[pieces[-1][0]], "the last target"
        inputs = where[:-1]
        used[inputs] += 1
        # Each target is the true next token, but for the last document's last one.
        wrong = inputs[sample[1:] != ids[inputs + 1]]
        assert set(wrong) <= {n - 1}
        assert ids[0] == D or 0 not in inputs[1:], "nobody sees where it begins"
    assert used.max() == 1
    assert len(found.piece_starts) == len(found.piece_lengths) == found.borders[-1]
    lost = {"rests": 0, "filling": 0, "left": 0, "empty": 0}
    for start, stop in end_of.items():
        n_used = used[start:stop].sum()
        if stop - start == 1:
            assert not n_used, "a D before a D is in no sequence"
            lost["empty"] += 1
            continue
        lost["rests"] += max(stop - start - T, 0)
        lost["filling" if n_used else "left"] += min(stop - start, T) - n_used
    if ids[0] == D:  # else whole documents may have had to give way to the first
        assert lost == {kind: getattr(found, kind) for kind in lost}
    n_lost = found.rests + found.filling + found.left + found.empty
    assert sum(lost.values()) == n_lost == n - found.per_epoch * T
    assert found.left < T, "enough for another sequence"


def test_rows_of_any_documents_are_what_they_should_be():
    draw = random.Random(0)
    for seed in range(120):
        T = draw.choice([1, 2, 3, 5, 8, 13, 30])
        most = draw.choice([2, 3, T + 1, 2 * T, 3 * T])
        lengths = [draw.randint(1, most) for _ in range(draw.randint(2, 40))]
        lengths[0] += T + 1  # enough for a sequence
        draw.shuffle(lengths)
        ids = corpus(lengths, begins=draw.random() < 0.5)
        if draw.random() < 0.3:
            ids[-1] = D
        check(ids, packed(ids, T, seed, draw.choice([1, 2, 7])))


def test_a_first_document_without_its_token_is_in_front_even_where_others_must_go():
    # Best fit: 9 and 3 + 3 + 3. The 9 fills the sequence of two 3s, and in front it leaves 1 token.
    ids = corpus([9, 3, 3, 3], begins=False)
    found = packed(ids, 10)
    check(ids, found)
    whole, (start, stop) = found.pieces(0)
    assert whole == (0, 9) and stop - start == 1 + 1


@pytest.mark.parametrize(
    "lengths, shares",  # of rests, filling, left, empty
    [
        ([600] * 50, (0, 176 / 1200, 0, 0)),
        ([300] * 40, (0, 176 / 1200, 0, 0)),
        ([1024] * 9, (0, 0, 0, 0)),
        ([1025] * 9, (1 / 1025, 0, 0, 0)),
        ([3000] * 9, (1976 / 3000, 0, 0, 0)),
        ([2] * 2500, (0, 0, 904 / 5000, 0)),
        ([1, 1024] * 4, (0, 0, 0, 1 / 1025)),
        ([1024, 500], (0, 0, 500 / 1524, 0)),
        ([500, 600], (0, 76 / 1100, 0, 0)),
        ([10, 2000, 1, 1014], (976 / 3025, 0, 0, 1 / 3025)),
        ([1000, 24] * 20, (0, 0, 0, 0)),
    ],
)
def test_what_is_cut_of_plain_documents(lengths, shares):
    ids = corpus(lengths)
    found = packed(ids, 1024)
    check(ids, found)
    lost = found.rests, found.filling, found.left, found.empty
    assert [x / found.n_tokens for x in lost] == pytest.approx(shares)


@pytest.mark.parametrize("n, most", [(20_000, 0.005), (1000, 0.01), (200, 0.03)])
def test_of_short_documents_hardly_any_token_is_cut(n, most):
    lengths = np.random.RandomState(0).lognormal(np.log(200), 0.6, n).astype(int) + 1
    ids = corpus(lengths)
    found = packed(ids, 1024)
    if n <= 1000:
        check(ids, found)
    assert (found.filling + found.left) / found.n_tokens < most
    assert found.rests / found.n_tokens < 0.01


def test_rows_are_a_function_of_tokens_and_seed_alone():
    lengths = np.random.RandomState(1).randint(1, 50, 500)
    ids = corpus(lengths)
    T = 64
    plain = packed(ids, T)
    epoch = plain(range(plain.per_epoch))
    for n_shards in (1, 7):
        again = packed(ids, T, n_shards=n_shards)
        assert torch.equal(again(range(again.per_epoch)), epoch)
    # A checkpoint holds one integer, so the plan must stay as it is.
    digest = hashlib.sha256(epoch.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "1c682b31941d2618", "a resumed run would see other samples"
    # Equal lengths, other documents: the seed decides which lie together.
    other = packed(ids, T, seed=2)
    rows_of = [{tuple(sorted(found.pieces(i))) for i in range(100)} for found in (plain, other)]
    assert len(rows_of[0] & rows_of[1]) < 30
    # The next epoch has the same sequences in another order.
    n = plain.per_epoch
    later = plain(range(n, 2 * n))
    assert not torch.equal(later, epoch)
    assert {tuple(sequence) for sequence in later.tolist()} == {
        tuple(sequence) for sequence in epoch.tolist()
    }


def test_rows_mix_the_corpus_and_begin_with_any_of_their_documents():
    ids = corpus([20] * 500 + [30] * 500)
    found = packed(ids, 100)
    pieces = [found.pieces(i) for i in range(found.per_epoch)]
    spans = [max(sequence)[0] - min(sequence)[0] for sequence in pieces if len(sequence) > 2]
    assert np.median(spans) > len(ids) / 4
    first = [stop - start for (start, stop), *_ in pieces]
    assert 20 in first and 30 in first


@pytest.mark.parametrize("shorter", [324, 400])
def test_of_two_documents_either_is_in_front(shorter):
    """Else the model would learn that a first document is long, and does not end."""
    ids = corpus([700] * 300 + [shorter] * 300)
    found = packed(ids, 1024)
    check(ids, found)
    n = [found.pieces(i)[0] for i in range(found.per_epoch)]
    short = sum(stop - start == shorter for start, stop in n)
    assert len(n) == 300 and 140 < short < 160


def test_reading_ahead_gives_the_same_samples():
    ids = corpus(np.random.RandomState(2).randint(1, 50, 300))
    plain, ahead = packed(ids, 64), packed(ids, 64, ahead=8)
    for i in range(0, 64, 8):
        assert torch.equal(ahead(range(i, i + 8)), plain(range(i, i + 8)))


def test_a_search_by_chunks_finds_every_document(monkeypatch):
    ids = corpus([3, 1, 1, 5, 2, 4, 1])
    expected = np.flatnonzero(ids == D)
    for chunk in range(1, 20):
        monkeypatch.setattr(packing, "CHUNK", chunk)
        for n_shards in (1, 3):
            tokens = dataset.Tokens(np.array_split(ids, n_shards))
            assert packing.document_starts(tokens, D).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "ids",
    [[1, 2, 3, 4, 5], [D, 2, 3, 4, 5], [1, 2, 3, 4, D]],
    ids=["no document token", "at the start", "at the end"],
)
def test_one_document_is_refused(ids):
    with pytest.raises(
        ValueError, match=r"numbers is one document, for token 7 .*--document_token="
    ):
        packed(np.array(ids), 2)


def test_documents_that_fill_no_sequence_are_refused():
    with pytest.raises(ValueError, match="2 documents, together shorter than a sequence"):
        packed(corpus([1, 1, 1, 1, 1, 1, 2, 2]), 5)


def test_a_bad_id_is_named_with_its_place():
    ids = np.array([D, 1, 2, D, 99, 3, 4, D, 5])
    tokens = dataset.Tokens([ids[:4], ids[4:]], "numbers", ["a.bin", "b.bin"])
    found = Packed(tokens, 4, 1, 50, token=D)
    with pytest.raises(ValueError, match=r"token id 99, .*\(token 0 of b.bin\)"):
        found(range(found.per_epoch))


def test_a_packed_run_says_so_and_resumes_bitwise_and_only_as_packed(tmp_path, capsys):
    # Lines are documents, of 10 and 40 bytes; the first 4500 are trained on.
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(b"\n%09d\n%039d" % (i, 7 * i) for i in range(100)))
    more = [f"--data={text}", "--schedule=constant", "--save_every=2", *TINY]
    pack = ["--pack=best_fit", "--document_token=10"]
    run(*more, *pack, f"--out_dir={tmp_path / 'whole'}", "--steps=4")
    said = " ".join(capsys.readouterr().out.split())
    # 24 of 40 are lost, and 4 of two times 10; the very last byte is only a target.
    assert (
        "packed: 180 documents in 135 sequences; 52.0% of the tokens are cut: 48.0% from documents "
        "longer than a sequence, 4.0% to fill sequences block_size=16 is short for these "
        "documents: try --block_size=32, or leave"
    ) in said
    parts = tmp_path / "parts"
    run(*more, *pack, f"--out_dir={parts}", "--steps=2")
    there = [*more, f"--out_dir={parts}", "--steps=4"]
    assert "holds a run with pack=best_fit, now it is none: type --pack=best_fit" in refused(*there)
    assert "holds a run with document_token=10, now it is 32" in refused(
        *there, pack[0], "--document_token=32"
    )
    branch = [*more, f"--out_dir={tmp_path / 'branch'}", f"--resume={parts}", "--steps=4"]
    assert "a branch cannot change it to none" in refused(*branch, "--pack=none")
    run(*there, pack[0])  # the token is that of the run
    assert trace(parts) == trace(tmp_path / "whole") and len(rows(parts)) == 4
    assert_same_bits(*(load.newest(path).tree() for path in (parts, tmp_path / "whole")))
    run(*more, f"--out_dir={tmp_path / 'plain'}", "--steps=1")
    assert trace(tmp_path / "plain")[1] != trace(parts)[1]
    assert "packed:" not in capsys.readouterr().out.split("data   ")[-1]
