"""The optimizers under everybody else's tools, cell by cell: tests/partners.py says how."""

import functools
import re

import pytest
import torch
from partners import (
    CASES,
    HOOKS,
    NOTES,
    PAGE,
    PARTNERS,
    REFUSALS,
    SCHEDULE_FREE,
    STEPS,
    WITH_HOOKS,
    WORN,
    Job,
    Said,
    alone,
    column,
    compare,
    compiled,
    dcp,
    final,
    fit,
    hooks_page,
    jobs,
    net,
    page,
    said,
    same,
    scaled,
    title,
    weights,
)

from optim.adafactor import Adafactor

every = pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
ONE = [name for name, partner in PARTNERS.items() if partner.ranks == 1]
TWO = [name for name, partner in PARTNERS.items() if partner.ranks == 2]


@functools.cache
def on_two_ranks(name: str, classes: tuple = tuple(CASES)) -> dict:
    return column(name, list(classes))


def expect(name: str, cls: type, found: Said | None) -> None:
    """It works, or it is refused as the table says: with this type, in one sentence, when made."""
    if (title(cls), name) not in REFUSALS:
        assert found is None
        return
    kind, part = REFUSALS[title(cls), name]
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


# ---- with hooks ----------------------------------------------------------------------------------
ROW = {title(cls): cls for cls in WORN}
FAST = {
    ("OneCycleLR", "EMA-Nesterov: SGD"),
    ("DCP state_dict", "average: SGD"),
    ("load hooks", "average: AdamW"),
    ("fully_shard", "hyperball: AdamW"),
    ("fully_shard", "radius_pin: SGD"),
}


@pytest.mark.parametrize(
    "name, row",
    [
        pytest.param(name, row, marks=(pytest.mark.slow,) * ((name, row) not in FAST))
        for name in PARTNERS
        for row in ROW
    ],
)
def test_under_a_partner_a_hook_is_itself(name, row):
    # On two ranks all rows at once, but for the fast one.
    one = PARTNERS[name].ranks == 1 or (name, row) in FAST
    classes = (ROW[row],) if one else tuple(WORN)
    expect(name, ROW[row], on_two_ranks(name, classes)[ROW[row]])


@pytest.mark.slow
@pytest.mark.parametrize("hook", HOOKS)
def test_compiled_by_inductor_a_hook_is_itself(hook):
    ((job, _),) = jobs(ROW[f"{hook}: SGD"])
    if hook == "uw_floor, rows":  # torch 2.13 cannot fuse these loops on a CPU; it says so
        with pytest.raises(torch._inductor.exc.InductorError, match="KeyError"):
            compiled(job, "inductor")
    else:
        same(compiled(job, "inductor"), alone(job), "the same class by hand")


@pytest.mark.parametrize("row", ROW)
def test_a_hook_changes_what_its_optimizer_does(row):
    ((job, _),) = jobs(ROW[row])
    plain = alone(Job(WORN[ROW[row]].plain, job.options))
    assert max((x - y).abs().max() for x, y in zip(alone(job), plain)) > 1e-4


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_takes_a_tensor_as_lr(hook):
    for job in jobs(ROW[f"{hook}: AdamW"])[0]:
        model = net()
        groups = [
            group | {"lr": torch.tensor(group["lr"], dtype=torch.float64)}
            for group in job.groups(model)
        ]
        optimizer = job.cls(groups)
        fit(model, optimizer, range(STEPS))
        same(final(model, optimizer), alone(job), "that of a number")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("plain", ["SGD", "AdamW"])
def test_a_fused_step_that_overflows_is_skipped_by_hooks_too(hook, plain):
    ((_, twin),) = jobs(ROW[f"{hook}: {plain}"])
    fused = Job(twin.cls, {**twin.options, "fused": True})
    same(scaled(fused), scaled(fused, by_hand=True), "that without the steps that overflow")
    assert not fused.start()[1]._step_supports_amp_scaling


@pytest.mark.parametrize("hook", HOOKS)
def test_dcps_step_at_lr_0_moves_not_a_bit(hook):
    for cls in (torch.optim.SGD, torch.optim.AdamW):
        model = net().float()
        optimizer, before = HOOKS[hook](cls)(model.parameters(), lr=0.1), weights(model)
        dcp.get_optimizer_state_dict(model, optimizer)
        assert all(map(torch.equal, before, weights(model)))
        assert cls is torch.optim.SGD or optimizer.state  # it has stepped


@pytest.mark.parametrize(
    "part, classes, least", [(0, CASES, 140), (2, WORN, 300)], ids=["optimizers", "hooks"]
)
def test_the_page_has_every_cell_and_nothing_that_fails(part, classes, least):
    text = PAGE.read_text(encoding="utf-8").partition(WITH_HOOKS)[part]
    wanted = [title(cls) for cls in classes]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == list(PARTNERS) and [row[0] for row in rows[2:]] == wanted
    footnotes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.M))
    for cls, *cells in rows[2:]:
        for name, found in zip(PARTNERS, cells, strict=True):
            yes, number = found.startswith("yes"), found.removeprefix("yes").strip(", ")
            assert yes == ((cls, name) not in REFUSALS), (cls, name)
            if not yes:
                assert REFUSALS[cls, name][1] in footnotes[number]
            else:
                assert footnotes.get(number) == NOTES.get((cls, name)), (cls, name)
    assert sum(found.startswith("yes") for row in rows[2:] for found in row) >= least


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
    columns = {name: dict.fromkeys(WORN) for name in PARTNERS}
    columns["DDP"][ROW["uw_floor: Muon"]] = no
    text, every = hooks_page(columns), len(WORN) * len(PARTNERS)
    assert f"{every - 1} of {every} cells work" in text and ". ValueError: not so; do" in text


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
