"""A gradient missing on some ranks is zero there; missing on all, the parameter is left alone.
Every layout against one process on the whole batch, in float64: weights, state and counted steps.

The model has a spare parameter for each of CASES in its blocks, some more before and after them. A
case says which rows use it when; in one process the same rows do.
"""

import functools
import math

import pytest
import torch
import torch._dynamo  # imported before the ranks are forked, or each of them spends a second on it
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
from harness import fitted, run_ranks, weights_here
from torch import nn

from checkpoint import load, save
from optim.adamw import AdamW
from optim.muon import Muon
from optim.param_groups import load_state_by_name, param_groups, state_by_name
from optim.sgd import SGD
from parallel import compression
from parallel.ddp import DDP
from parallel.diloco import DiLoCo
from parallel.fsdp import FSDP
from parallel.replicas import RollCall
from parallel.zero import ZeRO

CPU, WIDTH, STEPS, MICRO, ROWS = torch.device("cpu"), 4, 4, 2, 12
OPTIMIZERS = {
    "sgd": (SGD, dict(momentum=0.9)),
    "adamw": (AdamW, {}),
    "muon": (Muon, dict(ns_dtype="float64")),
}
NOT = math.nan  # the rows do not use the parameter
CASES = {  # (step, rank, world, micro-batch) -> what the parameter is multiplied with, or NOT
    "nowhere": lambda step, rank, world, micro: 1.0,
    "first_rank": lambda step, rank, world, micro: NOT if rank == 0 else 1.0,
    "last_rank": lambda step, rank, world, micro: NOT if rank == world - 1 else 1.0,
    "only_last": lambda step, rank, world, micro: 1.0 if rank == world - 1 else NOT,
    "everywhere": lambda step, rank, world, micro: NOT,
    "some_steps": lambda step, rank, world, micro: NOT if step in (0, 2) else 1.0,
    "at_first": lambda step, rank, world, micro: 1.0 if step < 2 else NOT,
    "in_turn": lambda step, rank, world, micro: NOT if step % world == rank or step == 2 else 1.0,
    "zero": lambda step, rank, world, micro: 0.0,
    "zero_on_one": lambda step, rank, world, micro: 1.0 if step == 0 else 0.0 if rank == 1 else NOT,
    "early": lambda step, rank, world, micro: 1.0 if micro == 0 and rank == 1 else NOT,
    "late": lambda step, rank, world, micro: 1.0 if micro == MICRO - 1 and rank == 0 else NOT,
}
BEFORE, AFTER = ("everywhere", "in_turn"), ("first_rank", "some_steps")


class Spares(nn.Module):
    """x + sum over cases of factor x @ spare, for the rows whose factor is no NaN."""

    def __init__(self, cases):
        super().__init__()
        self.cases = {case: i for i, case in enumerate(CASES) if case in cases}
        for i, case in enumerate(self.cases):
            shape = (WIDTH, WIDTH) if i % 3 else (WIDTH,)
            self.register_parameter(case, nn.Parameter(torch.empty(shape, dtype=torch.float64)))

    def forward(self, x, factors):
        for case, i in self.cases.items():
            rows, spare = ~factors[:, i].isnan(), getattr(self, case)
            if rows.any():
                used = x[rows] @ spare if spare.ndim == 2 else x[rows] * spare
                add = used * factors[rows, i, None].to(x)
                x = x.index_add(0, rows.nonzero().flatten(), add.to(x))
        return x


class Block(nn.Module):
    def __init__(self, cases):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.spares = Spares(cases)

    def forward(self, x, factors):
        return self.spares(x + torch.tanh(self.fc(x)), factors)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        names = list(CASES)
        self.first, self.begin = nn.Linear(WIDTH, WIDTH, dtype=torch.float64), Spares(BEFORE)
        self.blocks = nn.ModuleDict({str(i): Block(names[i::3]) for i in range(3)})
        self.end, self.last = Spares(AFTER), nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x, factors, skipped=()):
        x = self.begin(self.first(x), factors)
        for name, block in self.blocks.items():
            if name not in skipped:
                x = block(x, factors)
        return self.last(self.end(x, factors)).square().sum() / ROWS


def weights(name, shape):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape, generator=generator, dtype=torch.float64) / 3


def start(replicas, optimizer, make=Net, dtype=None):
    with torch.device("meta"):
        model = make()
    cls, options = OPTIMIZERS[optimizer]
    replicas = fitted(replicas, cls, model)
    model = replicas.parallelize(model if dtype is None else model.to(dtype))
    replicas.init_weights(weights)
    lrs = dict(matrix=0.05, embedding=0.05, head=0.05, scalar=0.03)
    groups = param_groups(model, lrs, 0.1, muon=cls is Muon)
    for group in groups:
        group["weight_decay"] = 0.1  # of vectors too
    return model, replicas.make_optimizer(cls, groups, **options)


def rows(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)


def factors(step, rank, world, micro, n):
    row = [how(step, rank, world, micro) for how in CASES.values()]
    return torch.tensor([row] * n, dtype=torch.float64)


def parts(step, rank, world):
    """The micro-batches of a rank: rows, their factors."""
    mine = rows(step).chunk(world)[rank].chunk(MICRO)
    return [(x, factors(step, rank, world, i, len(x))) for i, x in enumerate(mine)]


def step_of(model, optimizer, replicas, batches, **options):
    for i, (x, how) in enumerate(batches):
        replicas.last_micro_batch(i == len(batches) - 1)
        model(x.to(next(model.parameters()).dtype), how, **options).backward()
    replicas.finish_gradients()
    optimizer.step()
    model.zero_grad(set_to_none=True)  # alone, as in train.py: it knows no offloaded parameter


def held(replicas, optimizer):
    """What this rank has of weights and state: {(name, key): (value, its offsets in the whole)}."""
    weights = weights_here(replicas).items()
    found = {(name, "weight"): (w, offsets) for name, (w, _, offsets) in weights}
    for name, state in state_by_name(optimizer)["state"].items():
        offsets = replicas.shards[name][1] if name in replicas.shards else None
        for key, x in state.items():
            x = torch.as_tensor(x, dtype=torch.float64).clone()
            found[name, key] = x, (0,) * x.ndim if offsets is None or x.ndim == 0 else offsets
    return found


@functools.cache
def alone(world, optimizer):
    """One process on the whole batch, whose rows use what they use on the ranks."""
    replicas = DDP(None, CPU)
    model, optimizer = start(replicas, optimizer)
    for step in range(STEPS):
        every = [part for rank in range(world) for part in parts(step, rank, world)]
        step_of(model, optimizer, replicas, [[torch.cat(x) for x in zip(*every)]])
    return {key: x for key, (x, _) in held(replicas, optimizer).items()}


def same(ranks, expected):
    """What the ranks hold together is the expected, all of it and no more."""
    assert set().union(*ranks) == expected.keys()
    for key, x in expected.items():
        full, shards = torch.full_like(x, torch.nan), [r[key] for r in ranks if key in r]
        for value, offsets in shards:
            at = tuple(slice(o, o + n) for o, n in zip(offsets, value.shape))
            full[at] = value
            close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
            close(value, x[at], msg=lambda m: f"{key}: {m}")
        assert not full.isnan().any(), key


LAYOUTS = {
    "ddp": DDP,
    "ddp small": functools.partial(DDP, bucket_mb=1e-4),
    "topk": functools.partial(DDP, reduce="topk", bucket_mb=3e-4),
    "powersgd": functools.partial(DDP, reduce="powersgd"),
    **{f"zero{i}": functools.partial(ZeRO, stage=i) for i in (1, 2, 3)},
    **{f"zero{i} small": functools.partial(ZeRO, stage=i, bucket_mb=1e-4) for i in (1, 2, 3)},
    "zero3 cpu": functools.partial(ZeRO, stage=3, offload_params="cpu"),
    "fsdp": FSDP,
    "fsdp kept": functools.partial(FSDP, reshard=False),
    **{f"fsdp shard{s}": functools.partial(FSDP, shard=s) for s in (1, 2)},
    "fsdp cpu": functools.partial(FSDP, offload_params="cpu"),
}
EXACT = dict(topk=dict(fraction=1.0), powersgd=dict(rank=WIDTH))  # these send everything


def made(layout):
    kind = LAYOUTS[layout]
    if "reduce" in getattr(kind, "keywords", {}):
        name = kind.keywords["reduce"]
        return kind(dist.group.WORLD, CPU, reduce=getattr(compression, name)(**EXACT[name]))
    return kind(dist.group.WORLD, CPU)


def trained(rank, world, layout):
    found = []
    for optimizer in OPTIMIZERS:
        replicas = made(layout)
        model, optimizer = start(replicas, optimizer)
        for step in range(STEPS):
            step_of(model, optimizer, replicas, parts(step, rank, world))
        found.append(held(replicas, optimizer))
    return found


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "layout, world",
    [
        ("ddp", 2),
        slow("ddp small", 3),
        ("topk", 2),
        slow("powersgd", 2),
        ("zero1", 2),
        ("zero2", 3),
        slow("zero3", 3),
        slow("zero1 small", 3),
        slow("zero2 small", 2),
        slow("zero3 small", 2),
        ("zero3 cpu", 2),
        ("fsdp", 2),
        slow("fsdp kept", 3),
        slow("fsdp shard1", 2),
        slow("fsdp shard2", 4),
        slow("fsdp cpu", 3),
    ],
)
def test_every_layout_treats_missing_gradients_as_one_process_does(layout, world):
    ranks = run_ranks(world, trained, layout)
    for i, optimizer in enumerate(OPTIMIZERS):
        same([r[i] for r in ranks], alone(world, optimizer))


def test_the_cases_tell_a_missing_gradient_from_a_zero_one():
    """The oracle itself: who never had a gradient has its first weights and no state, and so on."""
    found = alone(3, "adamw")
    steps = {name.rsplit(".", 1)[1]: int(x) for (name, key), x in found.items() if key == "step"}
    counted = dict(
        nowhere=4,
        first_rank=4,
        last_rank=4,
        only_last=4,
        some_steps=2,
        at_first=2,
        in_turn=3,
        zero=4,
        zero_on_one=4,
        early=4,
        late=4,
    )
    assert {case: n for case, n in steps.items() if case in CASES} == counted
    for name in (name for name, key in found if key == "weight" and name.endswith("everywhere")):
        assert torch.equal(found[name, "weight"], weights(name, found[name, "weight"].shape))
    zero = next(name for name, _ in found if name.endswith(".zero"))
    decayed = found[zero, "weight"]
    assert not torch.equal(decayed, weights(zero, decayed.shape))


# ---- compression that loses something ------------------------------------------------------------
METHODS = dict(topk=dict(fraction=0.3), sign={}, onebit={}, powersgd=dict(rank=1), fp16={}, bf16={})


def compressed(rank, world, methods, feedback):
    """Per method: the run where gradients are missing, and the one where each that is missing on
    some ranks alone is a zero there; whether a step without a gradient anywhere changed nothing."""
    found = {}
    for method in methods:
        runs = []
        for zeros in (False, True):
            reduce = getattr(compression, method)(**METHODS[method], error_feedback=feedback)
            replicas = DDP(dist.group.WORLD, CPU, bucket_mb=3e-4, reduce=reduce)
            model, optimizer = start(replicas, "adamw")
            still = True
            for step in range(STEPS):
                batches = parts(step, rank, world)
                every = torch.cat([how for r in range(world) for _, how in parts(step, r, world)])
                missing = every.isnan().all(0)
                for _, how in batches if zeros else []:
                    how[:, ~missing] = how[:, ~missing].nan_to_num(0.0)
                before = everything(model, optimizer, reduce)
                step_of(model, optimizer, replicas, batches)
                names = [case for case, gone in zip(CASES, missing) if gone]
                for key, x in everything(model, optimizer, reduce).items():
                    if key[1].rsplit(".", 1)[1] in names:
                        old = before.get(key)
                        first = key[0] == "q" or not x.any()  # a guess, or nothing owed
                        still &= torch.equal(x, old) if old is not None else first
            runs.append(everything(model, optimizer, reduce))
        found[method] = *runs, still
    return found


def everything(model, optimizer, reduce):
    names = {p: name for name, p in model.named_parameters()}
    state = {
        (key, names[p]): torch.as_tensor(x).clone()
        for p, s in optimizer.state.items()
        for key, x in s.items()
    }
    kept = {("residual", n): x.clone() for n, x in reduce.residuals.items()}
    kept |= {("q", n): x.clone() for n, x in reduce.shared.items() if n in reduce.shared}
    return state | kept | {("weight", n): p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("feedback", [True, slow(False)])
def test_compression_keeps_what_it_owes_of_a_gradient_that_nobody_has(feedback):
    for found in run_ranks(2, compressed, METHODS, feedback):
        for method, (missing, zeros, still) in found.items():
            assert still, method
            assert missing.keys() == zeros.keys(), method
            for key, x in zeros.items():
                assert torch.equal(missing[key], x), (method, key)


# ---- whole blocks, whole backwards ---------------------------------------------------------------
def skipping(rank, world, layout, skipped):
    replicas = made(layout)
    model, optimizer = start(replicas, "adamw")
    for step in range(STEPS):
        gone = skipped[rank] if step > 0 else ()
        step_of(model, optimizer, replicas, parts(step, rank, world), skipped=gone)
    return held(replicas, optimizer)


@pytest.mark.parametrize("layout", ["ddp", "zero1", "zero2", "zero3"])
def test_a_rank_may_skip_blocks_that_others_run(layout):
    replicas = DDP(None, CPU)
    last = ([("0", "1"), ("2",)],)  # the last block too
    for gone in ([("0", "1"), ()], [("0",), ("1",)]) if layout == "zero3" else last:
        model, optimizer = start(replicas, "adamw")
        for step in range(STEPS):
            for rank in range(2):
                for x, how in parts(step, rank, 2):
                    model(x, how, skipped=gone[rank] if step > 0 else ()).backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
        expected = {key: x for key, (x, _) in held(replicas, optimizer).items()}
        same(run_ranks(2, skipping, layout, gone), expected)


def absent(rank, world, layout):
    """Rank 1 makes no backward at all in steps 1 and 3, no first one in step 2."""
    replicas = made(layout)
    model, optimizer = start(replicas, "adamw")
    for step in range(STEPS):
        for i, (x, how) in enumerate(parts(step, rank, world)):
            replicas.last_micro_batch(i == MICRO - 1)
            if rank == 0 or step == 0 or (step, i) == (2, MICRO - 1):
                model(x, how).backward()
        replicas.finish_gradients()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    return held(replicas, optimizer)


@pytest.mark.parametrize("layout", ["ddp", "zero1", "zero2"])
def test_a_rank_may_have_nothing_to_learn_from(layout):
    replicas = DDP(None, CPU)
    model, optimizer = start(replicas, "adamw")
    for step in range(STEPS):
        for rank in range(2):
            for i, (x, how) in enumerate(parts(step, rank, 2)):
                if rank == 0 or step == 0 or (step, i) == (2, MICRO - 1):
                    model(x, how).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    expected = {key: x for key, (x, _) in held(replicas, optimizer).items()}
    same(run_ranks(2, absent, layout), expected)


# ---- what else may happen to a gradient ----------------------------------------------------------
def mixed(rank, world, options):
    """Gathered or summed in bfloat16: near the oracle, and as many steps of each parameter."""
    replicas = FSDP(dist.group.WORLD, CPU, **options)
    model, optimizer = start(replicas, "adamw", dtype=torch.float32)
    for step in range(STEPS):
        step_of(model, optimizer, replicas, parts(step, rank, world))
    return held(replicas, optimizer)


@pytest.mark.parametrize(
    "options",
    [
        dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        dict(reduce_dtype=torch.bfloat16),
    ],
)
def test_fsdp_in_two_precisions_counts_the_same_steps(options):
    expected = alone(2, "adamw")
    ranks = run_ranks(2, mixed, options)
    assert set().union(*ranks) == expected.keys()
    for found in ranks:
        for (name, key), (x, _) in found.items():
            if key == "step":
                assert x == expected[name, key], name
            elif key == "weight":
                torch.testing.assert_close(x.double(), expected[name, key], rtol=0, atol=0.15)


def probed(rank, world, layout):
    """A micro-batch that is tried and thrown away had what the step has not."""
    replicas = made(layout)
    model, optimizer = start(replicas, "adamw")
    replicas.last_micro_batch(False)
    x = rows(9)[:2]
    model(x, torch.ones(2, len(CASES), dtype=torch.float64)).backward()
    if layout != "zero1":  # as train.py does: there nothing has been sent
        replicas.finish_gradients()
    model.zero_grad(set_to_none=True)
    for step in range(STEPS):
        step_of(model, optimizer, replicas, parts(step, rank, world))
    return held(replicas, optimizer)


@pytest.mark.parametrize("layout", ["ddp", "zero1", "zero2"])
def test_nothing_of_a_probe_counts(layout):
    same(run_ranks(2, probed, layout), alone(2, "adamw"))


def unannounced(rank, world, layout):
    """Nobody calls last_micro_batch: each backward sends its gradients."""
    replicas = made(layout)
    replicas.last_micro_batch = lambda flag: None
    model, optimizer = start(replicas, "adamw")
    for step in range(STEPS):
        step_of(model, optimizer, replicas, parts(step, rank, world))
    return held(replicas, optimizer)


@pytest.mark.parametrize("layout", ["zero1", "zero3", "fsdp"])
def test_a_gradient_of_any_micro_batch_counts_if_each_is_sent(layout):
    same(run_ranks(2, unannounced, layout), alone(2, "adamw"))


def thawing(rank, world, replicas):
    """From step 2 on one parameter is frozen, and another, frozen so far, no longer."""
    with torch.device("meta"):
        model = Net()
    thaws, freezes = "blocks.1.fc.weight", "blocks.2.fc.weight"
    model.get_parameter(thaws).requires_grad_(False)
    model = replicas.parallelize(model)
    replicas.init_weights(weights)
    model.get_parameter(thaws).requires_grad_()  # for param_groups
    lrs = dict.fromkeys(("matrix", "embedding", "head", "scalar"), 0.05)
    optimizer = replicas.make_optimizer(AdamW, param_groups(model, lrs, 0.1))
    model.get_parameter(thaws).requires_grad_(False)
    for step in range(STEPS):
        model.get_parameter(thaws).requires_grad_(step >= 2)
        model.get_parameter(freezes).requires_grad_(step < 2)
        batches = parts(step, rank, world)
        if world == 1:
            every = [part for r in range(2) for part in parts(step, r, 2)]
            batches = [[torch.cat(x) for x in zip(*every)]]
        step_of(model, optimizer, replicas, batches)
    return held(replicas, optimizer)


def thaws_in(rank, world, layout):
    if layout == "ddp":
        with pytest.raises(
            RuntimeError, match=r"frozen at parallelize.*set requires_grad before parallelize"
        ):
            thawing(rank, world, made(layout))
        return None
    return thawing(rank, world, made(layout))


@pytest.mark.parametrize("layout", ["ddp", "zero1", "zero3", "fsdp"])
def test_parameters_freeze_and_thaw_as_in_one_process(layout):
    ranks = run_ranks(2, thaws_in, layout)
    if layout != "ddp":
        expected = {key: x for key, (x, _) in thawing(0, 1, DDP(None, CPU)).items()}
        same(ranks, expected)


def by_hand(rank, world):
    replicas = made("ddp small")
    model, _ = start(replicas, "sgd")
    replicas.last_micro_batch(True)
    model(rows(0), torch.full((ROWS, len(CASES)), NOT)).backward()
    spare = model.begin.everywhere
    spare.grad = torch.full_like(spare, 1.0 + rank)
    replicas.finish_gradients()
    return spare.grad.flatten().tolist()[:2], model.begin.in_turn.grad


def test_a_gradient_put_there_by_hand_is_summed_too():
    assert run_ranks(2, by_hand) == [([3.0, 3.0], None)] * 2


def test_a_roll_call_names_what_nobody_has_and_reads_nothing_for_who_lacks_nothing():
    def quiet(rank, world):
        call = RollCall([True, rank == 0], dist.group.WORLD, CPU)
        wanted = [1] if rank else []
        call.flags = call.flags if rank else None  # would fail if it were read
        return call.missing_everywhere(wanted), call.sent_bytes

    assert run_ranks(2, quiet) == [([], 2)] * 2

    def ask(rank, world):
        call = RollCall([rank == 2, False, True], dist.group.WORLD, CPU)
        return call.missing_everywhere([1] if rank == 2 else [0, 1])

    assert run_ranks(3, ask) == [[1]] * 3


# ---- what is refused -----------------------------------------------------------------------------
def unfinished(rank, world, layout):
    replicas = made(layout)
    model, optimizer = start(replicas, "sgd")
    [batch] = [part for i, part in enumerate(parts(0, rank, world)) if i == 0]
    step_of(model, optimizer, replicas, [batch])
    replicas.last_micro_batch(True)
    model(*batch).backward()
    with pytest.raises(RuntimeError, match="call finish_gradients.. after the last backward"):
        optimizer.step()
    replicas.finish_gradients()
    optimizer.step()
    if layout.startswith("zero"):
        new = nn.Parameter(torch.zeros(2))
        with pytest.raises(ValueError, match="every rank would step.*make_optimizer"):
            optimizer.add_param_group({"params": [new], "names": ["new"]})
        assert all(new is not p for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("layout", ["ddp", "zero1", "zero3", "fsdp"])
def test_a_step_before_the_gradients_are_finished_is_refused(layout):
    run_ranks(2, unfinished, layout)


def test_one_process_may_step_as_it_likes():
    for replicas in (DDP(None, CPU), ZeRO(None, CPU, 2), FSDP(None, CPU)):
        model, optimizer = start(replicas, "sgd")
        model(*parts(0, 0, 1)[0]).backward()
        optimizer.step()
        new = nn.Parameter(torch.zeros(2))
        optimizer.add_param_group({"params": [new], "kind": "new", "names": ["new"]})


# ---- DiLoCo --------------------------------------------------------------------------------------
def local(rank, world, first, n, folder, options):
    """n inner steps; what the outer step knows. From a checkpoint if first > 0."""
    replicas = DiLoCo(dist.group.WORLD, CPU, **options)
    model, optimizer = start(replicas, "adamw")
    if first:
        saved = load.load(folder / f"step-{first:08d}")
        replicas.init_weights(saved.weights("model"))
        own = replicas.load_state_dict(lambda part: saved.tree(f"diloco/{part}", missing={}))
        groups = saved.tree("optim/groups")
        load_state_by_name(optimizer, groups, lambda name, *_: own.get(name, {}))
    for step in range(first, first + n):
        step_of(model, optimizer, replicas, parts(step, rank, world))
    if folder is not None:
        state = state_by_name(optimizer)
        tree = {"model": replicas.weights(), "optim": state if replicas.rank == 0 else {}}
        save.save(folder, first + n, tree | {"diloco": replicas.state_dict(state["state"])})
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    return named, replicas.anchor, replicas.outer_momentum


def simulated(world, n, every, lr=0.7, momentum=0.9):
    """The replicas one after the other; the outer step is torch's SGD, which skips a None."""
    replicas = [DDP(None, CPU) for _ in range(world)]
    pairs = [start(r, "adamw") for r in replicas]
    anchor = dict(start(DDP(None, CPU), "adamw")[0].named_parameters())
    outer, moved = torch.optim.SGD(anchor.values(), lr=lr, momentum=momentum, nesterov=True), set()
    for step in range(n):
        for rank, (model, optimizer) in enumerate(pairs):
            for x, how in parts(step, rank, world):
                (model(x, how) * world).backward()
            moved |= {name for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            model.zero_grad(set_to_none=True)
        if step % every == every - 1:
            for name, p in anchor.items():
                mean = sum(model.get_parameter(name).detach() for model, _ in pairs) / world
                p.grad = p.detach() - mean if name in moved else None
            outer.step()
            moved.clear()
            for model, _ in pairs:
                model.load_state_dict(anchor)
    return [dict(model.named_parameters()) for model, _ in pairs], anchor


@pytest.mark.slow
def test_diloco_leaves_alone_what_no_replica_has_moved_in_a_round(tmp_path):
    """In steps 0 and 2 some parameters have no gradient anywhere: with every=1 whole rounds."""
    for every, n in ((1, 4), (2, 5)):
        expected, anchor = simulated(2, n, every)
        whole = run_ranks(2, local, 0, n, None, dict(every=every))
        for (named, mine, _), theirs in zip(whole, expected):
            close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
            for name, p in named.items():
                close(p, theirs[name].detach())
                close(mine[name], anchor[name].detach())
    run_ranks(2, local, 0, 3, tmp_path, dict(every=2))  # in the middle of a round
    resumed = run_ranks(2, local, 3, 2, tmp_path, dict(every=2))
    for found, straight in zip(resumed, whole):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(found, straight) for name in b)
