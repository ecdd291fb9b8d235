"""Rules in place of lists: a sharding says exactly what the list of its boxes says."""

import itertools
import random

import pytest
import torch
from harness import run_ranks

from benchmarks import scale_save
from checkpoint import exchange, plan, shardings
from checkpoint.slices import Slice
from parallel.shard import Shard


def parts(n: int, ranks: int, how: str) -> list[tuple[int, int]]:
    """(offset, size) of each rank's part of n rows."""
    if how == "chunk":  # torch's: all the same, the last ones less or nothing
        size = -(-n // ranks)
        edges = [min(i * size, n) for i in range(ranks + 1)]
    elif how == "even":  # the first ones have one more
        edges = [i * (n // ranks) + min(i, n % ranks) for i in range(ranks + 1)]
    else:
        edges = [i * n // ranks for i in range(ranks + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(edges)]


def layout(rng: random.Random) -> tuple[list[int], int, list]:
    """(full shape, world, boxes by rank) of rows over dp ranks and columns over tp ranks."""
    dp, tp, first = rng.randint(1, 9), rng.randint(1, 4), rng.choice([0, 0, 3])
    full = [rng.randint(1, 30), rng.randint(tp, 12)]
    how = rng.choice(["chunk", "even", "spread"])
    boxes = []
    for d, (row, rows) in enumerate(parts(full[0], dp, how)):
        for t, (column, columns) in enumerate(parts(full[1], tp, "even")):
            if rows and columns:
                boxes.append((first + d * tp + t, [row, column], [rows, columns]))
    return full, first + dp * tp, boxes


def overlap(box, low, high) -> bool:
    _, offsets, shape = box
    return all(max(o, i) < min(o + n, j) for o, n, i, j in zip(offsets, shape, low, high))


def test_rules_say_what_the_list_of_boxes_says():
    rng = random.Random(5)
    for _ in range(300):
        full, world, boxes = layout(rng)
        sharding = shardings.compress(boxes)
        assert list(shardings.boxes(sharding)) == boxes
        assert shardings.count(sharding) == len(boxes)
        shardings.check("w", full, sharding, world)
        held = {rank: (offsets, shape) for rank, offsets, shape in boxes}
        assert [shardings.box_of(sharding, r) for r in range(world + 2)] == [
            held.get(r) for r in range(world + 2)
        ]
        for _ in range(5):
            low = [rng.randint(0, n) for n in full]
            high = [rng.randint(i, n) for i, n in zip(low, full)]
            found = list(shardings.overlapping(sharding, low, high))
            assert found == [box for box in boxes if overlap(box, low, high)]


def change(boxes: list, rng: random.Random) -> str:
    """One fault in a list of boxes, by what it is."""
    i = rng.randrange(len(boxes))
    rank, offsets, shape = boxes[i]
    dim = rng.randrange(2)
    what = rng.choice(["shifted", "dropped", "smaller", "same box", "same rank"])
    if what == "dropped":
        del boxes[i]
    elif what == "same rank":
        boxes[i] = (boxes[i - 1][0], offsets, shape)
    elif what == "same box":
        boxes[i] = (rank, *boxes[i - 1][1:])
    elif what == "shifted":
        boxes[i] = (rank, [o + (d == dim) for d, o in enumerate(offsets)], shape)
    else:
        boxes[i] = (rank, offsets, [n - (d == dim) for d, n in enumerate(shape)])
    return what


def test_a_sharding_is_refused_if_and_only_if_a_cell_is_bare_or_a_rank_has_two():
    rng = random.Random(6)
    refused = dict.fromkeys(["shifted", "dropped", "smaller", "same box", "same rank"], 0)
    for _ in range(600):
        full, world, boxes = layout(rng)
        what = change(boxes, rng)
        bare = torch.ones(full, dtype=torch.bool)
        for _, offsets, shape in boxes:
            bare[tuple(slice(o, o + n) for o, n in zip(offsets, shape))] = False
        ranks = [rank for rank, _, _ in boxes]
        fits = all(o + n <= m for _, *b in boxes for o, n, m in zip(*b, full))
        good = fits and not bare.any() and len(set(ranks)) == len(ranks) > 0
        try:
            shardings.check("w", full, shardings.compress(boxes), world)
            assert good, (what, full, boxes)
        except ValueError:
            assert not good, (what, full, boxes)
            refused[what] += 1
    assert min(refused.values()) > 30, refused


ALL = {"rank": 0, "offsets": [0, 0], "shape": [8, 6], "repeat": []}
QUARTER = {"rank": 0, "offsets": [0, 0], "shape": [2, 3]}


@pytest.mark.parametrize(
    "sharding",
    [
        [QUARTER | {"repeat": [[2, 1, [0, 3]], [4, 1, [2, 0]]]}],  # rank 1 has two boxes
        [ALL, QUARTER | {"rank": 1, "offsets": [6, 0], "repeat": [[4, 1, [-2, 0]]]}],
        [ALL, QUARTER | {"rank": 1, "repeat": [[1, 1, [0, 0]]]}],
        [ALL, QUARTER | {"rank": 1, "repeat": [[True, 1, [0, 0]]]}],
    ],
)
def test_rules_that_no_list_has_made_are_refused_even_where_they_cover_all(sharding):
    shardings.check("w", [8, 6], [ALL], world=9)
    with pytest.raises(ValueError, match="w "):
        shardings.check("w", [8, 6], sharding, world=9)


# ---- descriptions --------------------------------------------------------------------------------
def heard_of(trees: list[dict]) -> tuple[list, dict]:
    described = [plan.describe(tree) for tree in trees]
    heard = [[d.form_key(), d.boxes, d.numbers] for d in described]
    return heard, {d.form_key(): d.form for d in described}


def test_ranks_of_several_forms_make_one_plan():
    """A tied weight on two stages, vectors that tp does not divide, a rank with nothing."""
    w = torch.zeros(4, 6)
    trees = []
    for rank in range(8):
        stage, t = divmod(rank, 4)
        half = Slice(w[:, :3], Shard((4, 6), (0, 3 * (t % 2))))
        trees.append({f"stage{stage}": half, "tied": half, "gain": torch.zeros(6), "lr": rank})
    trees[7] = {}
    merged = plan.merge(*heard_of(trees))
    first = [plan.written_by(merged, rank) for rank in range(8)]
    assert first[0] == ["stage0", "tied", "gain"] and first[1] == ["stage0", "tied"]
    assert first[4] == first[5] == ["stage1"] and first[2] == first[3] == first[6] == first[7] == []
    assert merged["tree"]["lr"] == {"$": "value", "rank": 0}
    assert plan.with_values(merged, [["here"]] + [[]] * 7)["lr"] == "here"


def test_the_index_of_many_ranks_is_as_short_as_that_of_few_and_so_is_a_ranks_message(tmp_path):
    few, many = (
        scale_save.save(world, folder=tmp_path / str(world), n_layer=1) for world in (16, 112)
    )
    assert few["shardings"] == many["shardings"] and few["forms"] == many["forms"] == 1
    for name in ("index_bytes", "sent_bytes", "plan_bytes"):
        assert many[name] < 1.1 * few[name], name
    # A rank of 8 has what 14 had, and each weight has a file more or less at its edges.
    fewer, more = (scale_save.resume(tmp_path / "112", now, n_layer=1) for now in (8, 224))
    assert 14 <= fewer["files"] <= 18 and more["files"] <= 6


# ---- messages ------------------------------------------------------------------------------------
def talk(rank, world):
    rng = random.Random(rank)
    own = rng.randbytes([0, 5, 3 * exchange.HEAD, exchange.HEAD][rank])
    gathered = exchange.gather(own, None)
    answers = [exchange.broadcast(text if rank == 0 else None, None) for text in (b"", own * 900)]
    return own, gathered, answers[0], exchange.broadcast(b"".join(gathered or []), None)


def test_short_and_long_messages_arrive_whole():
    told = run_ranks(4, talk)
    sent = [own for own, *_ in told]
    assert [gathered for _, gathered, _, _ in told] == [sent, None, None, None]
    for _, _, empty, everything in told:
        assert (empty, everything) == (b"", b"".join(sent))


@pytest.mark.parametrize("rows, ranks", [(7, 3), (3, 7), (768, 5), (1, 1)])
@pytest.mark.parametrize("cut", ["first", "spread", "rotated"])
def test_the_simulated_ranks_have_every_row_once(rows, ranks, cut):
    for turn in (0, 5):
        held = [scale_save.rows_of(rows, ranks, rank, cut, turn) for rank in range(ranks)]
        assert [row for first, n in held for row in range(first, first + n)] == list(range(rows))
