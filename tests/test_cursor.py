"""The place in the data against a list that is really filtered; early stopping on losses by
hand."""

import json
import math
import random
import shutil

import pytest

from checkpoint.early_stopping import EarlyStopping
from data.cursor import Cursor


def test_batches_are_those_of_a_naive_list_without_the_banned_rows():
    for seed in range(200):
        draw, place, gone, taken = random.Random(seed), Cursor(), set(), []
        for _ in range(30):
            if draw.random() < 0.4:
                first = draw.randrange(300)
                last = first + draw.randrange(12)
                place.skip(first, last)
                gone |= set(range(first, last + 1))
            n = draw.randrange(1, 17)
            naive = [r for r in range(place.next, place.next + 1000) if r not in gone][:n]
            rows = place.next_samples(n)
            assert list(rows) == naive == list(place.next_samples(n))
            for ranks in (d for d in (1, 2, 4) if n % d == 0):  # shares join to the batch
                assert [
                    r for k in range(ranks) for r in rows[k * n // ranks : (k + 1) * n // ranks]
                ] == naive
            place.next = rows[-1] + 1
            taken += naive
            assert place.seen == len([r for r in range(place.next) if r not in gone])
            other = Cursor()
            other.load_state_dict(json.loads(json.dumps(place.state_dict())))
            assert (
                other.next_samples(20) == place.next_samples(20)
                and other.state_dict() == place.state_dict()
            )
        assert place.skipped_samples == sorted(place.skipped_samples)
        assert all(
            a[1] + 1 < b[0] for a, b in zip(place.skipped_samples, place.skipped_samples[1:])
        )
        assert sum(b - a + 1 for a, b in place.skipped_samples) == len(gone)


def test_without_bans_a_batch_is_a_range_and_old_progress_loads():
    place = Cursor()
    place.load_state_dict({"rows": 40})
    assert place.next_samples(8) == range(40, 48) and place.seen == 40
    saved = {"rows": 9, "banned": [[1, 2]]}
    same, other = (7, 9, [[1, 2]]), (7, 7, [])
    for data, kept in (({}, same), ({"data": "x"}, same), ({"data": "y"}, other)):
        place = Cursor("x")
        place.load_state_dict(saved | data)
        assert (place.seen, place.next, place.skipped_samples) == kept


def test_best_counts_evaluations_without_enough_improvement(tmp_path):
    best = EarlyStopping(tmp_path, patience=3, min_delta=0.1)
    losses = [3.0, 2.95, math.nan, 2.8, 2.75, -math.inf, 2.71]
    assert [i for i, x in enumerate(losses) if best.update(i, x)] == [0, 3]
    assert best.should_stop and best.state_dict()["step"] == 3 and best.path.name == "step-00000003"
    assert not EarlyStopping(tmp_path, None).update(0, 1.0)


def test_an_evaluation_seen_again_after_a_rollback_counts_once(tmp_path):
    best = EarlyStopping(tmp_path, patience=2)
    best.update(10, 1.0)
    for _ in range(5):
        assert not best.update(20, 2.0)
    assert not best.should_stop and not best.update(30, 2.0) and best.should_stop


def test_a_best_that_is_gone_is_forgotten(tmp_path):
    best = EarlyStopping(tmp_path, 3)
    best.update(10, 1.0)
    again = EarlyStopping(tmp_path, 3)
    again.load_state_dict(best.state_dict())
    assert again.state_dict()["loss"] == pytest.approx(1.0)
    shutil.rmtree(best.path)
    again.load_state_dict(best.state_dict())
    assert again.state_dict()["loss"] == math.inf
    best.path.mkdir()
    again.load_state_dict(best.state_dict())
    assert again.state_dict() == best.state_dict() and again.state_dict()["loss"] == pytest.approx(
        1.0
    )
