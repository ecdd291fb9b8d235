"""Files of tensors: read straight into place, hashed while they are read and written."""

import gc
import hashlib
import itertools
import os
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import grid, random_bits, raw

from checkpoint import save as saving
from checkpoint import tensor_file
from checkpoint.load import CheckpointDamaged, load
from checkpoint.save import save, write_file
from checkpoint.slices import DTYPES, Slice
from checkpoint.tensor_file import TensorFile, first_number, sha256_of
from parallel.shard import Shard


# ---- reading -------------------------------------------------------------------------------------
def boxes(shape):
    ranges = [[slice(i, j) for i in range(n) for j in range(i + 1, n + 1)] for n in shape]
    return itertools.product(*ranges)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 1, 3), (2, 3, 2, 2)])
def test_a_run_is_found_where_the_numbers_of_a_box_follow_one_another(shape):
    count = torch.arange(torch.Size(shape).numel()).view(shape)
    for box in boxes(shape):
        numbers = count[box].flatten().tolist()
        is_run = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert first_number(list(shape), box) == (numbers[0] if is_run else None), box


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_box_has_the_bits_of_the_library(tmp_path, dtype):
    there = random_bits((3, 4), dtype)
    save_file({"one": torch.ones(3), "w": there}, tmp_path / "f")
    file = TensorFile(tmp_path / "f")
    for box in boxes((3, 4)):
        want = there[box]
        # As a whole, and into columns of something larger.
        out, wide = torch.empty_like(want), torch.empty(3, 9, dtype=dtype)
        inside = wide[: want.shape[0], 2 : 2 + want.shape[1]]
        file.read("w", box, out)
        file.read("w", box, inside)
        assert raw(out.contiguous()) == raw(want.contiguous()) == raw(inside.contiguous())


def test_rows_are_read_without_the_library_and_columns_with_it(tmp_path):
    save(tmp_path, 1, {"w": grid()})
    c = load(tmp_path / "step-00000001")
    file = c._stored("w", 0, [8, 6])

    class Facts:
        def get_slice(self, name):
            return self

        def get_shape(self):
            return [8, 6]

        def get_dtype(self):
            return "F64"

    file.library = Facts()  # it has no numbers
    assert torch.equal(c.tensor("w"), grid()) and torch.equal(
        c.tensor("w", (2, 0), (3, 6)), grid()[2:5]
    )
    with pytest.raises(TypeError):
        c.tensor("w", (0, 2), (8, 3))


def test_a_file_that_is_cut_short_after_it_was_opened_is_named(tmp_path):
    save(tmp_path, 1, {"w": grid(100, 100)})
    c = load(tmp_path / "step-00000001")
    path = c.path / "rank_0.safetensors"
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CheckpointDamaged, match="rank_0.safetensors cannot be read: .* ends early"):
        c.tensor("w")


def test_files_are_closed_with_their_checkpoint(tmp_path):
    save(tmp_path, 1, {"w": grid()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c = load(tmp_path / "step-00000001")
        file = c._stored("w", 0, [8, 6]).file
        assert not file.closed
        del c
        gc.collect()
        assert file.closed


def test_what_is_there_is_filled_in_place(tmp_path):
    save(tmp_path, 1, {"model": {"w": grid(), "b": torch.arange(6.0)}})
    c = load(tmp_path / "step-00000001")
    p = torch.nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    memory = p.data_ptr()
    c.weights("model").fill(p, "w")
    assert torch.equal(p, grid()) and p.data_ptr() == memory and p.requires_grad
    loss = p.square().sum()
    c.weights("model").fill(p, "w")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    rows, turned, half = (
        torch.zeros(2, 6),
        torch.zeros(6, 8).T,
        torch.zeros(8, 6, dtype=torch.bfloat16),
    )
    rows = rows.double()
    c.fill(rows, "model/w", (5, 0))
    c.fill(turned, "model/w")
    c.fill(half, "model/w")
    assert torch.equal(rows, grid()[5:7])
    assert torch.equal(turned, grid().float()) and torch.equal(half, grid().bfloat16())
    for out, name, offsets, says in (
        (rows, "model/w", None, r"has shape \[8, 6\], and is to fill \[2, 6\]"),
        (rows, "model/w", (7, 0), r"no box of \[2, 6\] begins at \[7, 0\]"),
        (rows, "model/x", None, "has no tensor 'model/x'"),
    ):
        with pytest.raises(ValueError, match=says):
            c.fill(out, name, offsets)
    with pytest.raises(ValueError, match=r"does not fit: w is \(8, 6\), not \(2, 6\)"):
        c.weights("model").fill(rows, "w")


@pytest.mark.parametrize("has_preadv", [True, False])
def test_threads_read_one_file_at_once(tmp_path, monkeypatch, has_preadv):
    if not has_preadv:
        monkeypatch.delattr(os, "preadv", raising=False)
    saved = {f"w{i}": torch.full((64, 1024), float(i)) for i in range(4)}
    save(tmp_path, 1, {"model": saved})
    c = load(tmp_path / "step-00000001")
    c.tensor("model/w0")
    wrong = []

    def read(name):
        for _ in range(100):
            try:
                if not torch.equal(c.tensor(f"model/{name}"), saved[name]):
                    wrong.append(name)
            except ValueError as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(name,)) for name in saved]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs os.preadv")
def test_a_read_leaves_the_files_position_to_others(tmp_path):
    save_file({"w": torch.arange(8.0)}, tmp_path / "f")
    file = TensorFile(tmp_path / "f")
    file.file.seek(3)  # as a forked process does, which shares it
    out = torch.empty(8)
    file.read("w", (slice(0, 8),), out)
    assert torch.equal(out, torch.arange(8.0)) and file.file.tell() == 3


def test_a_model_takes_its_weights_without_a_copy_of_each(tmp_path, monkeypatch):
    model = torch.nn.Linear(6, 8)
    save(tmp_path, 1, {"model": dict(model.named_parameters())})
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data.zero_()
    saved = load(tmp_path / "step-00000001")
    monkeypatch.setattr(torch, "empty", None)
    saved.load_weights(model)
    assert all(torch.equal(p, want[name]) for name, p in model.named_parameters())


# ---- hashing -------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 7654])
def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path, monkeypatch, size):
    monkeypatch.setattr(tensor_file, "PIECE", 1000)
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    with open(tmp_path / "f", "rb", buffering=0) as file:
        assert sha256_of(file) == hashlib.sha256(data).hexdigest()


# ---- writing -------------------------------------------------------------------------------------
@pytest.fixture
def small_pieces(monkeypatch):
    """Threads and early writing, as they are for large files."""
    monkeypatch.setattr(saving, "ASIDE", 10)
    monkeypatch.setattr(saving, "AHEAD", 64)


def test_a_file_that_was_hashed_aside_is_whole(tmp_path, small_pieces):
    pieces = [os.urandom(n) for n in (3, 10, 500, 9, 64, 1, 4096)]
    facts = write_file(tmp_path / "f", iter(pieces))
    data = b"".join(pieces)
    assert (tmp_path / "f").read_bytes() == data
    assert facts == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    tree = {"w": grid(), "part": Slice(torch.ones(2, 3), Shard((2, 3), (0, 0)))}
    save(tmp_path, 1, tree)
    assert torch.equal(load(tmp_path / "step-00000001").tensor("w"), grid())
    assert load_file(tmp_path / "step-00000001" / "rank_0.safetensors").keys() == tree.keys()


def test_a_large_piece_is_hashed_while_it_is_written(tmp_path, monkeypatch, small_pieces):
    hashed, plain = threading.Event(), hashlib.sha256
    hashers = []

    class Digest:
        def __init__(self):
            self.digest = plain()
            self.hexdigest = self.digest.hexdigest

        def update(self, piece):
            hashers.append(threading.current_thread())
            self.digest.update(piece)
            hashed.set()

    class File:
        def __init__(self, path, mode):
            self.file = open(path, mode)
            self.fileno = self.file.fileno

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, piece):
            # It ends only if somebody else hashes at the same time.
            assert hashed.wait(20)
            self.file.write(piece)

    monkeypatch.setattr(saving.hashlib, "sha256", Digest)
    monkeypatch.setattr(saving, "open", File, raising=False)
    assert write_file(tmp_path / "f", [b"x" * 100])["sha256"] == plain(b"x" * 100).hexdigest()
    assert threading.current_thread() not in hashers and not hashers[0].is_alive()


def test_no_thread_outlives_a_write_that_fails(tmp_path, monkeypatch, small_pieces):
    before = threading.active_count()
    plain = hashlib.sha256

    class Slow:
        def update(self, piece):
            threading.Event().wait(0.2)

    class Full:
        def __init__(self, path, mode):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def write(self, piece):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.hashlib, "sha256", Slow)
    monkeypatch.setattr(saving, "open", Full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "f", [b"x" * 100])
    assert threading.active_count() == before and plain is not Slow


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be told")
def test_the_disk_is_told_of_all_bytes_once_and_in_order(tmp_path, monkeypatch, small_pieces):
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *what: told.append(what))
    write_file(tmp_path / "f", [b"x" * n for n in (50, 13, 1, 64, 200, 63)])
    assert told == [
        (0, 64, os.POSIX_FADV_DONTNEED),
        (64, 64, os.POSIX_FADV_DONTNEED),
        (128, 200, os.POSIX_FADV_DONTNEED),
    ]

    def refuse(*_):
        raise OSError("no such advice here")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    assert write_file(tmp_path / "h", [b"x" * 500])["bytes"] == 500
    monkeypatch.delattr(os, "posix_fadvise")
    assert write_file(tmp_path / "g", [b"x" * 500])["bytes"] == 500
