"""Who holds what: the rules of parallel/replicas.py beside searches, bounds and GPT-2's balance."""

import math

import pytest

from memory.ranks import bytes_per_rank
from memory.shapes import gpt_shapes
from parallel.replicas import deal, lightest_ranks, owners_by_size

ARCHS = ("modern", "gpt2", "track3", "llama", "qwen3")
GPT2_124M = gpt_shapes(n_layer=12, n_embd=768, vocab_size=50304, arch="gpt2", n_head=12)


def by_size_slowly(shapes, n):
    owners, load = [None] * len(shapes), [0] * n
    for i in sorted(range(len(shapes)), key=lambda i: (-math.prod(shapes[i]), shapes[i])):
        owners[i] = min(range(n), key=lambda rank: load[rank])
        load[owners[i]] += math.prod(shapes[i])
    return owners


@pytest.mark.parametrize("n", [1, 2, 3, 8, 200])
@pytest.mark.parametrize("arch", ARCHS)
def test_owners_are_those_a_search_through_all_ranks_finds(arch, n):
    shapes = [shape for _, shape in gpt_shapes(5, 16, 40, 8, arch).values()]
    assert owners_by_size(shapes, n) == by_size_slowly(shapes, n)


def test_the_largest_comes_first_and_goes_to_the_rank_with_least():
    assert owners_by_size([(4, 4), (100, 4), (4, 4), (4, 4)], 2) == [1, 0, 1, 1]


def test_rows_go_to_all_ranks_and_what_is_needed_in_full_to_one():
    shapes = {"a": (4, 4), "b": (4, 4), "gain": (7,), "scale": (), "none": (0, 4)}
    owners = deal(shapes, {"gain", "scale", "none", "b", "of another stage"}, 3)
    assert owners.keys() == shapes.keys()
    # b is large, and the owner of a has as much already.
    assert owners["a"] == (0,) and owners["b"] == [1, 2] and owners["gain"] == range(3)
    # What has no rows to share out has one owner.
    assert len(owners["scale"]) == len(owners["none"]) == 1
    assert set(deal(shapes, (), 3).values()) <= {(0,), (1,), (2,)}
    assert set(deal(shapes, shapes, 1).values()) <= {(0,), range(1)}


def test_a_large_parameter_leaves_out_ranks_with_large_matrices():
    shapes = {"embed": (60, 4), "gain": (4,), "m": (10, 10), "n": (10, 10)}
    owners = deal(shapes, {"embed", "gain"}, 5)
    assert owners["m"] == (0,) and owners["n"] == (1,)
    assert owners["embed"] == [2, 3, 4] and owners["gain"] == range(5)


@pytest.mark.parametrize("load", [[0] * 6, [9, 0, 0, 5, 1, 0], [100, 90, 80, 1, 2, 3], [7]])
@pytest.mark.parametrize("rows", [1, 30, 1000])
def test_the_lightest_ranks_are_as_even_as_any_number_of_them(load, rows):
    def fullest(ranks):
        return max(x + rows / len(ranks) * (i in ranks) for i, x in enumerate(load))

    ranks = lightest_ranks(load, rows)
    by_load = sorted(range(len(load)), key=load.__getitem__)
    best = min(fullest(by_load[:k]) for k in range(1, len(load) + 1))
    if len(ranks) == len(load):
        assert fullest(ranks) <= best / 0.95
    else:
        assert fullest(ranks) == best and list(ranks) == sorted(ranks)


@pytest.mark.parametrize("n", [8, 16, 64])
@pytest.mark.parametrize("optim, most", [("adamw", 1.10), ("muon", 1.35)])
def test_the_fullest_rank_of_gpt2_holds_little_more_than_the_mean(optim, most, n):
    ddp = bytes_per_rank(GPT2_124M, optim, "ddp")
    shared = {"zero1": ["state"], "zero2": ["gradients", "state"]}
    shared["zero3"] = ["parameters", "gradients", "state"]
    for layout, parts in shared.items():
        held = bytes_per_rank(GPT2_124M, optim, layout, n, micro_batches=2)
        mean = sum(ddp[part] for part in parts) / n
        ratio = sum(held[part] for part in parts) / mean
        assert 0.999 < ratio < most, (layout, ratio)
