"""The optimizers under everybody else's tools, cell by cell: tests/partners.py says how."""

import functools
import re

import pytest
import torch
from partners import (
    CASES,
    NOTES,
    PAGE,
    PARTNERS,
    REFUSALS,
    SCHEDULE_FREE,
    Said,
    column,
    compare,
    compiled,
    dcp,
    fit,
    jobs,
    net,
    page,
    said,
    weights,
)

from optim.adafactor import Adafactor

every = pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
ONE = [name for name, partner in PARTNERS.items() if partner.ranks == 1]
TWO = [name for name, partner in PARTNERS.items() if partner.ranks == 2]


@functools.cache
def on_two_ranks(name: str) -> dict:
    return column(name, list(CASES))


def expect(name: str, cls: type, found: Said | None) -> None:
    """It works, or it is refused as the table says: with this type, in one sentence, when made."""
    if (cls.__name__, name) not in REFUSALS:
        assert found is None
        return
    kind, part = REFUSALS[cls.__name__, name]
    assert found is not None and found.refused and found.type == kind.__name__, found
    assert part in found.message
    assert not re.search(r"[.?!]\s|\n", found.message), "more than one sentence"


@pytest.mark.parametrize(
    "name, cls",
    [
        pytest.param(
            name,
            cls,
            id=f"{name}-{cls.__name__}",
            marks=(pytest.mark.slow,)
            * (name == "torch.compile" and cls.__name__ not in ("AdamW", "Muon")),
        )
        for name in ONE
        for cls in CASES
    ],
)
def test_under_a_partner_a_class_is_itself(name, cls):
    expect(name, cls, column(name, [cls])[cls])


@every
@pytest.mark.parametrize("name", TWO)
def test_on_two_ranks_a_class_is_itself(name, cls):
    expect(name, cls, on_two_ranks(name)[cls])


@pytest.mark.slow
@every
def test_compiled_by_inductor_a_class_is_itself(cls):
    for job, twin in jobs(cls, calm=True):
        compare(PARTNERS["torch.compile"], job, twin, compiled(job, "inductor"))


def test_the_page_has_every_cell_and_nothing_that_fails():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == list(PARTNERS) and [row[0] for row in rows[2:]] == [c.__name__ for c in CASES]
    footnotes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.M))
    for cls, *cells in rows[2:]:
        for name, found in zip(PARTNERS, cells, strict=True):
            yes, number = found.startswith("yes"), found.removeprefix("yes").strip(", ")
            assert yes == ((cls, name) not in REFUSALS), (cls, name)
            if not yes:
                assert REFUSALS[cls, name][1] in footnotes[number]
            else:
                assert footnotes.get(number) == NOTES.get((cls, name)), (cls, name)
    assert sum(found.startswith("yes") for row in rows[2:] for found in row) >= 140


def test_the_page_shows_failures_and_refusals_as_what_they_are():
    columns = {name: dict.fromkeys(CASES) for name in PARTNERS}
    with pytest.raises(ZeroDivisionError) as error:
        1 / 0
    no = Said(True, "ValueError", "not so; do this", "x.py:1")
    columns["DDP"] = {**dict.fromkeys(CASES, said(error.value)), Adafactor: no}
    text = page(columns)
    n, every = len(CASES), len(CASES) * len(PARTNERS)
    assert (
        f"{every - n} of {every}\ncells work" in text and ". ValueError: not so; do this\n" in text
    )
    assert re.search(r"FAILS at test_partners.py:\d+, ZeroDivisionError: division by zero\n", text)


@pytest.mark.parametrize("cls", [Adafactor, torch.optim.Adafactor])
def test_torch_itself_refuses_to_cycle_what_adafactor_lacks(cls):
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        torch.optim.lr_scheduler.OneCycleLR(cls(net().parameters()), 0.1, 10)


@pytest.mark.parametrize("cls", SCHEDULE_FREE)
def test_dcp_in_eval_mode_is_refused_before_anything_moves(cls):
    ((job, _),) = jobs(cls)
    model, optimizer = job.start()
    fit(model, optimizer, range(2))
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    fresh, before = cls(job.groups(model)), weights(model)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"step\(\) in eval mode; call train\(\) first"):
        dcp.set_optimizer_state_dict(model, fresh, saved)
    assert all(map(torch.equal, before, weights(model))) and not fresh.state
