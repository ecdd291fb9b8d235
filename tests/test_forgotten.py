"""A forgotten call is a RuntimeError of one sentence and no silent divergence, and what is no
mistake does not trip it: each layout, in float64."""

import functools
import gc

import pytest
import torch
import torch._dynamo  # imported before the ranks are forked, or each of them spends a second on it
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
from harness import run_ranks
from torch import nn

from parallel import compression
from parallel.ddp import DDP
from parallel.diloco import DiLoCo
from parallel.fsdp import FSDP
from parallel.mesh import make_mesh
from parallel.pipeline import Pipeline
from parallel.replicas import GUARDS
from parallel.zero import ZeRO

CPU = torch.device("cpu")
LAYOUTS = {
    "ddp": functools.partial(DDP, bucket_mb=1e-4),
    "topk": lambda *where: DDP(*where, 1e-4, reduce=compression.topk(fraction=0.3)),
    "zero1": functools.partial(ZeRO, stage=1),
    "zero2": functools.partial(ZeRO, stage=2),
    "zero3": functools.partial(ZeRO, stage=3),
    "fsdp": FSDP,
    "diloco": functools.partial(DiLoCo, every=2),
}
FOREIGN_MAY_STEP = ("ddp", "topk", "fsdp")
SLOW = ("topk", "zero1", "zero2")
every_layout = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYOUTS]
)


class Trap(torch.autograd.Function):
    """The identity, whose backward raises while `armed`."""

    armed = False

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        if Trap.armed:
            raise ArithmeticError("this backward raises half-way")
        return dy


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last = nn.Linear(6, 1)

    def forward(self, x):
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = block(torch.tanh(x))
            if i == 1:
                x = Trap.apply(x)
        return self.last(x)


def start(name, optimizer="made", lr=0.1):
    torch.manual_seed(0)
    replicas = LAYOUTS[name](dist.group.WORLD, CPU)
    model = replicas.parallelize(Net().double())
    if optimizer == "made":
        return model, replicas, replicas.make_optimizer(torch.optim.SGD, model.parameters(), lr=lr)
    return model, replicas, torch.optim.SGD(model.parameters(), lr=lr)


def loss_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(3, 4, generator=generator, dtype=torch.float64)).square().sum() / 12


def weights_of(replicas):
    full = {}
    for name, w in replicas.weights().items():
        full[name] = (w.full_tensor() if hasattr(w, "placements") else w).detach().clone()
    return full


# ---- what is refused -----------------------------------------------------------------------------
def said(work, *arguments):
    try:
        work(*arguments)
    except RuntimeError as error:
        return str(error)


def mistakes(rank, world, name):
    found = {}
    for optimizer in ("made", "own"):
        model, replicas, stepper = start(name, optimizer)
        loss_of(model, rank).backward()
        found[f"{optimizer}, unfinished"] = said(stepper.step)
        replicas.finish_gradients()
        found[f"{optimizer}, finished"] = said(stepper.step)
        model.zero_grad()
        # And again in a later step: nothing is remembered wrongly.
        loss_of(model, rank).backward()
        found[f"{optimizer}, unfinished later"] = said(stepper.step)

    # last_micro_batch() forgotten, in a run that is long enough to see where it leads.
    model, replicas, stepper = start(name)
    told, told_replicas, told_stepper = start(name)
    for step in range(2):
        for i in range(2):
            told_replicas.last_micro_batch(i == 1)
            loss_of(told, 10 * step + 2 * i + rank).backward()
        told_replicas.finish_gradients()
        told_stepper.step()
        told.zero_grad()
    for step in range(2):
        for i in range(2):
            found["silent"] = said(loss_of(model, 10 * step + 2 * i + rank).backward)
            if found["silent"]:
                return found
        replicas.finish_gradients()
        stepper.step()
        model.zero_grad()
    found["sums are right"] = same(weights_of(replicas), weights_of(told_replicas))

    model, replicas, stepper = start(name)
    replicas.last_micro_batch(False)
    loss_of(model, rank).backward()
    found["none is last"] = said(replicas.finish_gradients)
    return found


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.allclose(a[key], b[key], rtol=1e-12, atol=1e-12) for key in a
    )


@every_layout
def test_a_forgotten_call_is_an_error_or_does_no_harm(name):
    for found in run_ranks(2, mistakes, name):
        sentence = "came before finish_gradients"
        assert sentence in found["made, unfinished"]
        assert sentence in found["made, unfinished later"]
        assert found["made, finished"] is None
        if name in FOREIGN_MAY_STEP:
            assert sentence in found["own, unfinished"] and found["own, finished"] is None
            assert sentence in found["own, unfinished later"]
        else:
            for when in ("unfinished", "finished", "unfinished later"):
                assert "make_optimizer() returns may step" in found[f"own, {when}"]
        if name in ("ddp", "topk"):
            assert "last_micro_batch(i + 1 == n)" in found["silent"]
        else:
            assert found["silent"] is None and found["sums are right"]
            # The others send in finish_gradients() what is left.
            assert (found["none is last"] is None) == (name != "fsdp")


def optimizers_before(rank, world):
    """Made before parallelize(), and dropped in part."""
    torch.manual_seed(rank)
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replicas = LAYOUTS["ddp"](dist.group.WORLD, CPU)
    replicas.parallelize(model)
    loss_of(model, rank).backward()
    first = said(optimizer.step)
    model.last.zero_grad()
    second = said(loss_of(model, rank).backward)
    return first, second


def test_an_older_optimizer_and_a_gradient_dropped_alone_are_noticed():
    for first, second in run_ranks(2, optimizers_before):
        assert "came before finish_gradients" in first
        assert "dropped some gradients of an unfinished step" in second


def test_nothing_watches_when_the_layout_is_gone():
    before = len(GUARDS)
    replicas = ZeRO(None, CPU, 1)
    replicas.parallelize(Net())
    assert len(GUARDS) == before + 1
    del replicas
    gc.collect()
    assert len(GUARDS) == before


# ---- what is not ---------------------------------------------------------------------------------
def undisturbed(*_) -> None:
    """The run that all others must equal."""


def skipped_before_finish(model, replicas, rank):
    replicas.last_micro_batch(True)
    loss_of(model, 100 + rank).backward()
    model.zero_grad()


def skipped_while_accumulating(model, replicas, rank):
    replicas.last_micro_batch(False)
    loss_of(model, 100 + rank).backward()
    replicas.discard_step()
    model.zero_grad()


def skipped_after_finish(model, replicas, rank):
    replicas.last_micro_batch(True)
    loss_of(model, 100 + rank).backward()
    replicas.finish_gradients()
    replicas.discard_step()
    model.zero_grad()


def raised(model, replicas, rank):
    replicas.last_micro_batch(True)
    Trap.armed = True
    with pytest.raises(ArithmeticError):
        loss_of(model, 100 + rank).backward()
    Trap.armed = False
    model.zero_grad()


def forward_alone(model, replicas, rank):
    with torch.no_grad():
        loss_of(model, 100 + rank)


def another_model(model, replicas, rank):
    """It steps while the gradients here are unfinished."""
    other = nn.Linear(4, 1).double()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    loss_of(other, rank).backward()
    optimizer.step()


# (disturbance, when: before the step, or between its micro-batches)
DISTURBANCES = {
    "skipped before finish": (skipped_before_finish, "before"),
    "skipped while accumulating": (skipped_while_accumulating, "before"),
    "skipped after finish": (skipped_after_finish, "before"),
    "a backward raised": (raised, "before"),
    "no_grad forward": (forward_alone, "before"),
    "evaluation between": (forward_alone, "between"),
    "another model between": (another_model, "between"),
}


def disturbed(rank, world, name):
    return {
        label: run(rank, name, *how)
        for label, how in {"": (undisturbed, "before"), **DISTURBANCES}.items()
    }


def run(rank, name, disturb, when):
    model, replicas, optimizer = start(name)
    for step in range(4):
        if when == "before":
            disturb(model, replicas, rank)
        for i in range(2):
            replicas.last_micro_batch(i == 1)
            loss_of(model, 10 * step + 2 * i + rank).backward()
            if when == "between":
                disturb(model, replicas, rank)
        replicas.finish_gradients()
        optimizer.step()
        model.zero_grad()
    return weights_of(replicas)


@every_layout
def test_what_is_no_mistake_changes_nothing(name):
    for found in run_ranks(2, disturbed, name):
        expected = found.pop("")
        assert len(found) == len(DISTURBANCES)
        for label, weights in found.items():
            assert same(weights, expected), label


def two_optimizers(rank, world, name):
    """One for the blocks, one for the rest; they step together, and then in turn."""
    weights = []
    for n in (1, 2):
        torch.manual_seed(0)
        replicas = LAYOUTS[name](dist.group.WORLD, CPU)
        model = replicas.parallelize(Net().double())
        params = dict(model.named_parameters())
        groups = [
            [p for key, p in params.items() if key.startswith("blocks") == inside]
            for inside in (True, False)
        ]
        groups = groups if n == 2 else [list(params.values())]
        make = functools.partial(replicas.make_optimizer, torch.optim.SGD, lr=0.1)
        optimizers = [make(group) for group in groups]
        for step in range(3):
            loss_of(model, 2 * step + rank).backward()
            replicas.finish_gradients()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
        weights.append(weights_of(replicas))
    return same(*weights)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "diloco"])
def test_two_optimizers_are_as_good_as_one(name):
    """(DiLoCo counts the steps of its one optimizer.)"""
    assert run_ranks(2, two_optimizers, name) == [True, True]


# ---- the pipeline --------------------------------------------------------------------------------
class Stage(nn.Module):
    """Words in, words out: embed and head are one matrix, on the first and on the last rank."""

    def __init__(self, pipe):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): nn.Linear(6, 6) for i in pipe.stage_layers})
        if pipe.first or pipe.last:
            self.embed = nn.Embedding(10, 6)

    def forward(self, ids, layers, x):
        x = self.embed(ids) if x is None else x
        for i in layers:
            x = torch.tanh(self.layers[str(i)](x))
        if 1 not in layers:
            return x
        return nn.functional.cross_entropy(x @ self.embed.weight.T, ids)


def piped(rank, world):
    torch.manual_seed(rank)
    pipe = Pipeline(dist.group.WORLD, "1f1b", 2, tied=True)
    stage = Stage(pipe).double()
    drawn = stage.embed.weight.detach().clone()
    pipe.tie(stage)
    started = stage.embed.weight.detach().clone()
    optimizer = torch.optim.AdamW(stage.parameters(), lr=0.05)
    ids = torch.arange(10).view(2, 5)
    like = (5, 6), torch.float64, CPU

    def forward_backward():
        pipe.run(2, lambda i, layers, x: stage(ids[i], layers, x), lambda i: like, backward=0.5)

    def named():
        return {key: p.grad for key, p in stage.named_parameters() if p.grad is not None}

    forward_backward()
    forgotten = said(optimizer.step)
    pipe.all_reduce_tied_grads(named())
    optimizer.step()
    optimizer.zero_grad()
    forward_backward()
    optimizer.zero_grad()  # a skipped step
    forward_backward()
    forward_backward()  # accumulated
    pipe.all_reduce_tied_grads(named())
    optimizer.step()
    return drawn, started, forgotten, stage.embed.weight.detach().clone()


def test_a_tied_weight_starts_and_stays_alike_on_both_ends():
    (drawn, first, said_first, end), (_, second, said_second, other_end) = run_ranks(2, piped)
    assert torch.equal(first, drawn) and torch.equal(second, drawn)
    assert torch.equal(end, other_end) and not torch.equal(end, drawn)
    for sentence in (said_first, said_second):
        assert "came before all_reduce_tied_grads" in sentence


def piped_replicas(rank, world):
    """Two stages, two replicas; the pipeline is not told of replicas.last_micro_batch."""
    mesh = make_mesh(CPU, pp=2)
    torch.manual_seed(rank)
    pipe = Pipeline(mesh.groups["pp"], "1f1b", 2)
    replicas = DDP(mesh.groups["dp"], CPU)
    stage = replicas.parallelize(Stage(pipe).double())
    start = {key: p.detach().clone() for key, p in stage.named_parameters()}
    ids = torch.arange(10).view(2, 5)
    like = (5, 6), torch.float64, CPU
    work = functools.partial(
        pipe.run, 2, lambda i, layers, x: stage(ids[i], layers, x), lambda i: like, 0.5
    )
    work(replicas.last_micro_batch)
    replicas.finish_gradients()
    stage.zero_grad()
    sentence = said(work)
    if pipe.last:
        # The other stage waits for this gradient.
        dist.send(torch.zeros(*like[0], dtype=like[1]), group=pipe.group, group_dst=0)
    return mesh.coords["pp"], start, sentence


def test_replicas_of_a_stage_start_alike_and_must_hear_of_the_last_micro_batch():
    ranks = sorted(run_ranks(4, piped_replicas), key=lambda found: found[0])
    for (_, a, _), (_, b, _) in (ranks[:2], ranks[2:]):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for _, _, sentence in ranks:
        assert "last_micro_batch(i + 1 == n)" in sentence
