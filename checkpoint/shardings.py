"""Which rank holds which box of a tensor: a few rules, however many ranks there are.

Layouts cut tensors regularly, so where a rank's box lies follows from the rank's number. A grid is
one box that is repeated, each time on a later rank and further on in the tensor:

    (8, 6) over 4 dp ranks by rows and 2 tp ranks by columns         columns  0 1 2   3 4 5
                                                                    rows 0 1  rank 0  rank 1
    {"rank": 0, "offsets": [0, 0], "shape": [2, 3],                      2 3  rank 2  rank 3
     "repeat": [[2, 1, [0, 3]],      2 times, 1 rank and 3 columns on    4 5  rank 4  rank 5
                [4, 2, [2, 0]]]}     all that 4 times, each time         6 7  rank 6  rank 7
                                     2 ranks and 2 rows on

A sharding is a list of grids, in the order of their ranks. Rows that do not divide evenly make two
grids: of the ranks with a row more, and of the others. A box that fits nowhere is a grid of its
own, so a sharding can say everything that a list of all boxes can.

`compress` finds the grids. Everything else answers without going through all boxes: which ones a
shard overlaps, which one a rank holds, and, in `check`, whether they cover the whole tensor.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch

CELLS = 2**24  # that the boxes of one tensor may cut it into
SCATTERED = 2**18  # boxes of a grid that do not lie in a row

Box = tuple[int, list[int], list[int]]  # a rank, the offsets and the shape of what it holds


# ---- from boxes to grids -------------------------------------------------------------------------
def compress(boxes: list[Box]) -> list[dict]:
    """The boxes, given in the order of their ranks, as grids."""
    grids = []
    for rank, offsets, shape in boxes:
        grids.append({"rank": rank, "offsets": offsets, "shape": shape, "repeat": []})
    # First boxes become grids, then grids become grids of grids, until nothing repeats any more.
    while True:
        repeated = repeat_once(grids)
        if len(repeated) == len(grids):
            return grids
        grids = repeated


def repeat_once(grids: list[dict]) -> list[dict]:
    """The grids, where each stretch of equal ones at equal distances has become one grid."""
    found = []
    start = 0
    while start < len(grids):
        first = grids[start]
        distance = None
        end = start + 1
        while end < len(grids):
            next_distance = distance_of(grids[end - 1], grids[end])
            if next_distance is None or distance not in (None, next_distance):
                break
            distance = next_distance
            end += 1
        if end - start > 1:
            ranks, move = distance
            first = first | {"repeat": [*first["repeat"], [end - start, ranks, move]]}
        found.append(first)
        start = end
    return found


def distance_of(one: dict, other: dict) -> tuple[int, list[int]] | None:
    """(ranks, move) from one grid to another that is the same elsewhere; None if it is not."""
    if one["shape"] != other["shape"] or one["repeat"] != other["repeat"]:
        return None
    ranks = other["rank"] - one["rank"]
    move = [b - a for a, b in zip(one["offsets"], other["offsets"], strict=True)]
    # `overlapping` counts on boxes that never move back.
    return (ranks, move) if ranks > 0 and all(m >= 0 for m in move) else None


# ---- from grids to boxes -------------------------------------------------------------------------
def count(sharding: list[dict]) -> int:
    """How many boxes there are."""
    return sum(math.prod(times for times, _, _ in grid["repeat"]) for grid in sharding)


def last_rank(grid: dict) -> int:
    return grid["rank"] + sum((times - 1) * ranks for times, ranks, _ in grid["repeat"])


def reach(grid: dict, dim: int, repeat: list) -> int:
    """How far the box and these repeats of it extend in this dimension, from the grid's offset."""
    return grid["shape"][dim] + sum((times - 1) * move[dim] for times, _, move in repeat)


def box_of(sharding: list[dict], rank: int) -> tuple[list[int], list[int]] | None:
    """The offsets and the shape of the box that this rank holds; None where it holds none."""
    for grid in sharding:
        if not grid["rank"] <= rank <= last_rank(grid):
            continue
        rest = rank - grid["rank"]
        offsets = grid["offsets"]
        for times, ranks, move in reversed(grid["repeat"]):
            i = min(rest // ranks, times - 1)
            rest -= i * ranks
            offsets = [o + i * m for o, m in zip(offsets, move)]
        if rest == 0:
            return offsets, grid["shape"]
    return None


def overlapping(sharding: list[dict], low: list[int], high: list[int]) -> Iterator[Box]:
    """The boxes that share something with the box from `low` to `high`."""
    for grid in sharding:
        yield from _overlapping(grid, grid["rank"], grid["offsets"], grid["repeat"], low, high)


def _overlapping(grid, rank, offsets, repeat, low, high) -> Iterator[Box]:
    if not repeat:
        ends = [o + n for o, n in zip(offsets, grid["shape"])]
        if all(max(o, i) < min(e, j) for o, e, i, j in zip(offsets, ends, low, high)):
            yield rank, offsets, grid["shape"]
        return
    *inner, (times, ranks, move) = repeat
    first = 0
    stop = times
    for dim, m in enumerate(move):
        # The i-th time the boxes begin at begin + i m, and end before begin + i m + n.
        begin = offsets[dim]
        n = reach(grid, dim, inner)
        if m > 0:
            first = max(first, (low[dim] - begin - n) // m + 1)
            stop = min(stop, -((begin - high[dim]) // m))
    for i in range(first, stop):
        moved = [o + i * m for o, m in zip(offsets, move)]
        yield from _overlapping(grid, rank + i * ranks, moved, inner, low, high)


def boxes(sharding: list[dict]) -> Iterator[Box]:
    """All boxes, in the order of their ranks."""
    for grid in sharding:
        found = [(grid["rank"], grid["offsets"])]
        for times, ranks, move in grid["repeat"]:
            further = []
            for i in range(times):
                for rank, offsets in found:
                    moved = [o + i * m for o, m in zip(offsets, move)]
                    further.append((rank + i * ranks, moved))
            found = further
        for rank, offsets in found:
            yield rank, offsets, grid["shape"]


# ---- is it one? ----------------------------------------------------------------------------------
def inside(offsets: list, shape: list, full: list) -> bool:
    """Are `offsets` and `shape` a box inside a tensor of shape `full`? They may be any JSON."""
    if not all(type(n) is int for n in (*offsets, *shape, *full)):
        return False
    fits = all(0 <= o <= o + n <= m for o, n, m in zip(offsets, shape, full))
    return fits and len(offsets) == len(shape) == len(full)


def within(low: list, high: list, origin: list) -> tuple[slice, ...]:
    """The index of the box from `low` to `high` in a tensor that begins at `origin`."""
    return tuple(slice(i - o, j - o) for i, j, o in zip(low, high, origin))


def check(name: str, full: list, sharding: list, world: int) -> None:
    """Raises ValueError unless each rank below `world` holds one box at most, and all cover `full`.

    name: of the tensor, for the message. `full` and `sharding` may be any JSON: whatever raises
    here, such as a TypeError, is no sharding.
    """
    if not sharding or not all(grid_is_inside(grid, full) for grid in sharding):
        raise ValueError(f"{name} {full} has no slice, or one that reaches beyond its shape")
    # A file holds one box by a name. Grids in the order of their ranks share no rank.
    in_order = all(last_rank(a) < b["rank"] for a, b in pairwise(sharding))
    if not in_order or not 0 <= sharding[0]["rank"] <= last_rank(sharding[-1]) < world:
        raise ValueError(f"{name} has two slices in one file, or one on a rank beyond {world}")
    corners = []
    for grid in sharding:
        corners += merged_boxes(name, full, grid)
    check_cover(name, full, corners)


def grid_is_inside(grid: dict, full: list) -> bool:
    """Do all boxes of the grid lie in a tensor of shape `full`, each on a rank of its own?"""
    repeat = grid["repeat"]
    last = list(grid["offsets"])
    ranks_of_inner = 0
    for times, ranks, move in repeat:
        if not all(type(n) is int for n in (times, ranks, *move)):
            return False
        if times < 2 or ranks <= ranks_of_inner or min(move, default=0) < 0:
            return False
        ranks_of_inner += (times - 1) * ranks
        last = [o + (times - 1) * m for o, m in zip(last, move, strict=True)]
    is_rank = type(grid["rank"]) is int
    return is_rank and all(inside(o, grid["shape"], full) for o in (grid["offsets"], last))


def merged_boxes(name: str, full: list, grid: dict) -> list[tuple[list, list]]:
    """(low, high) of boxes that cover what the grid covers: one box, where its boxes touch."""
    found = [(grid["offsets"], [o + n for o, n in zip(grid["offsets"], grid["shape"])])]
    for times, _, move in grid["repeat"]:
        low, high = found[0]
        moving = [dim for dim, m in enumerate(move) if m]
        leaves_gaps = any(move[dim] > high[dim] - low[dim] for dim in moving)
        if len(found) == 1 and len(moving) <= 1 and not leaves_gaps:
            found = [(low, [h + (times - 1) * m for h, m in zip(high, move)])]
            continue
        # A damaged file may claim anything: do not let it take all memory.
        if times * len(found) > SCATTERED:
            raise ValueError(f"{name} {full} is cut into more than {SCATTERED} scattered pieces")
        moved = []
        for i in range(times):
            for box in found:
                moved.append(tuple([o + i * m for o, m in zip(corner, move)] for corner in box))
        found = moved
    return found


def check_cover(name: str, full: list[int], corners: list[tuple[list, list]]) -> None:
    """Raises ValueError where some part of a tensor of shape `full` is in none of the boxes.

    corners: (low, high) of each box. Each dimension is cut wherever a box begins or ends. So a cell
    of the grid between these cuts is held as a whole or not at all, and few cells have to be
    checked:

        boxes  0..3 and 2..5 of 7     cuts  0 2 3 5 7     cells held  yes yes yes no
    """
    cuts = []  # in each dimension, sorted
    for dim, n in enumerate(full):
        edges = {0, n}
        for low, high in corners:
            edges |= {low[dim], high[dim]}
        cuts.append(sorted(edges))
    cells_in = [len(edges) - 1 for edges in cuts]
    if math.prod(cells_in) > CELLS:
        raise ValueError(f"{name} {full} is cut into more than {CELLS} pieces")

    # Cells are marked, not the tensor's entries: 8 shards of it, however large, make 8 cells.
    number_of = [{edge: i for i, edge in enumerate(edges)} for edges in cuts]
    held = torch.zeros(cells_in, dtype=torch.bool)
    for low, high in corners:
        cells = [slice(number[i], number[j]) for number, i, j in zip(number_of, low, high)]
        held[tuple(cells)] = True
    if not held.all():
        first_hole = (~held).nonzero()[0].tolist()
        begins = [edges[i] for edges, i in zip(cuts, first_hole)]
        raise ValueError(f"no rank holds the part of {name} {full} that begins at {begins}")
