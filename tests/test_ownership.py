"""The owners of parallel/replicas.py beside the two rules written out, a search through all ranks
each time."""

import math

import pytest

from memory.estimate import gpt_shapes
from parallel.replicas import owners_by_shape, owners_by_size

ARCHS = ("modern", "gpt2", "track3")


def by_shape_slowly(shapes, n):
    owners, load = {}, [0] * n
    alike = {shape: [name for name in shapes if shapes[name] == shape] for shape in shapes.values()}
    for shape in sorted(alike, key=lambda s: (-math.prod(s) * len(alike[s]), s)):
        have = [0] * n
        for name in alike[shape]:
            rank = min(range(n), key=lambda r: (have[r], load[r]))
            owners[name] = rank
            have[rank] += 1
            load[rank] += math.prod(shape)
    return owners


def by_size_slowly(shapes, n):
    owners, load = [None] * len(shapes), [0] * n
    for i in sorted(range(len(shapes)), key=lambda i: (-math.prod(shapes[i]), shapes[i])):
        owners[i] = min(range(n), key=lambda rank: load[rank])
        load[owners[i]] += math.prod(shapes[i])
    return owners


@pytest.mark.parametrize("n", [1, 2, 3, 8, 200])
@pytest.mark.parametrize("arch", ARCHS)
def test_owners_are_those_a_search_through_all_ranks_finds(arch, n):
    shapes = {name: shape for name, (_, shape) in gpt_shapes(5, 16, 40, 8, arch).items()}
    assert owners_by_shape(shapes, n) == by_shape_slowly(shapes, n)
    assert owners_by_size([*shapes.values()], n) == by_size_slowly([*shapes.values()], n)


def test_the_rules_differ_where_one_parameter_outweighs_many():
    shapes = {"embed": (100, 4)} | {f"matrix {i}": (4, 4) for i in range(4)}
    assert [*owners_by_shape(shapes, 2).values()].count(0) == 3  # as many matrices as the other
    assert owners_by_size([*shapes.values()], 2) == [0, 1, 1, 1, 1]
