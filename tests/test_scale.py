"""What many ranks cost: messages to the store counted on real ranks, and ranks that are played."""

import collections
import os
import secrets
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch.distributed import distributed_c10d

from benchmarks import scale
from checkpoint import exchange
from parallel import launch
from parallel.mesh import make_mesh


class CountingStore(dist.Store):
    """A store that counts what it is asked, in Python and in gloo."""

    def __init__(self, store):
        super().__init__()
        self.store = store
        self.asked = collections.Counter()

    def set(self, key, value):
        self.asked["set"] += 1
        self.store.set(key, value)

    def get(self, key):
        self.asked["get"] += 1
        return self.store.get(key)

    def wait(self, keys, timeout):
        self.asked["wait"] += 1
        self.store.wait(keys, timeout)

    def add(self, key, n):
        self.asked["add"] += 1
        return self.store.add(key, n)

    def check(self, keys):
        self.asked["check"] += 1
        return self.store.check(keys)


def asked_for_groups(rank, world):
    known = distributed_c10d._world.pg_map  # group -> (backend, store)
    backend, store = known[dist.group.WORLD]
    counting = CountingStore(store)
    known[dist.group.WORLD] = backend, counting
    mesh = make_mesh(torch.device("cpu"), tp=2, cp=2)
    groups = [group for group in known if group is not dist.group.WORLD]
    sizes = sorted(dist.get_world_size(group) for group in groups)
    for_mesh = counting.asked.total()
    saving = exchange.star(timedelta(seconds=20))
    for_saving = counting.asked.total() - for_mesh
    # The long message of rank 2 follows alone, and the answer is long.
    heard = exchange.gather(secrets.token_bytes(3000 if rank == 2 else 10), saving)
    exchange.broadcast(secrets.token_bytes(9000) if heard else None, saving)
    for_messages = counting.asked.total() - for_mesh - for_saving
    return for_mesh, sizes, mesh.sum(rank)[0], for_saving, for_messages


@pytest.fixture(scope="module")
def asked():
    return run_ranks(8, asked_for_groups)


def test_a_rank_asks_the_store_2n_plus_1_times_for_each_of_its_own_groups(asked):
    for for_mesh, sizes, total, _, _ in asked:
        # cp, tp and dp of 2, dp_cp of 4: this rank's, and no other's.
        assert sizes == [2, 2, 2, 4] and total == 28
        assert for_mesh == sum(2 * n + 1 for n in sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's gloo connects lazily")
def test_saving_asks_the_store_twice_for_each_rank_that_it_talks_to_before_the_first_save(asked):
    n_connections = [scale.n_connections(rank, 8) for rank in range(8)]
    assert n_connections == [7, 3, 2, 3, 1, 2, 2, 2]
    assert [for_saving for *_, for_saving, _ in asked] == [1 + 2 * n for n in n_connections]
    assert not any(for_messages for *_, for_messages in asked)
    assert max(scale.n_connections(rank, 16384) for rank in range(1, 16384)) == 14


@pytest.mark.parametrize(
    "platform, given, found",
    [
        ("linux", {}, "1"),
        ("darwin", {}, None),
        ("linux", {"TORCH_GLOO_LAZY_INIT": "0"}, "0"),
        ("linux", {"GLOO_DEVICE_TRANSPORT": "TCP_TLS"}, None),
    ],
)
def test_only_the_group_of_saving_is_lazy_and_only_where_gloo_can_be(
    monkeypatch, platform, given, found
):
    seen = []
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("TORCH_GLOO_LAZY_INIT", "GLOO_DEVICE_TRANSPORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "gather", lambda *arguments, **more: None)
    monkeypatch.setattr(dist, "broadcast", lambda *arguments, **more: None)
    monkeypatch.setattr(
        dist, "new_group", lambda **more: seen.append(os.environ.get("TORCH_GLOO_LAZY_INIT"))
    )
    exchange.star(timedelta(seconds=20))
    assert seen == [found]
    assert os.environ.get("TORCH_GLOO_LAZY_INIT") == given.get("TORCH_GLOO_LAZY_INIT")


def test_a_group_of_all_ranks_is_not_made_twice(monkeypatch):
    """As `dp` where nothing else divides the run, and as `ends` of a pipeline of two stages."""
    monkeypatch.setattr(dist, "new_group", None)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    from parallel.mesh import new_group

    assert new_group([0, 1, 2, 3], torch.device("cpu")) is dist.group.WORLD


@pytest.mark.parametrize("rank", [0, 5])
def test_a_played_start_asks_as_often_as_a_real_one(rank):
    played = scale.PlayedStore()
    launch.same_start(played, rank, 16384)
    assert played.asked == (5 if rank == 0 else 4)


@pytest.mark.slow
def test_a_played_run_costs_a_rank_no_more_on_many_ranks(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 2000)
    few, many = (
        scale.in_fresh_process("grid", world, world - 1, str(tmp_path), False)
        for world in (128, 16384)
    )
    assert few["calls"] == many["calls"] == 4
    # dp has 2 ranks or 256; the group of all ranks, and that of saving, are the world.
    assert (few["members"], many["members"]) == (128 * 2 + 8 + 8 + 2, 16384 * 2 + 8 + 8 + 256)
    assert many["set-up s"] < 3 * few["set-up s"] + 0.2


def test_the_index_of_a_checkpoint_is_as_long_for_32_ranks_as_for_4(tmp_path):
    few, many = (scale.measure_save(world, str(tmp_path), turns=1) for world in (4, 32))
    assert set(few) == set(scale.SAVE_COLUMNS)
    assert many["index kB"] < 1.01 * few["index kB"]
    assert many["files kB"] > 7 * few["files kB"]
