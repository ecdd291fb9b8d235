"""DiLoCo against the plain run where they are the same, and against a simulation in one process
elsewhere."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn

from checkpoint import load, save
from model import GPT, GPTConfig, initial_weight
from optim.adamw import AdamW
from optim.muon import Muon
from optim.param_groups import load_state_by_name, param_groups, state_by_name
from optim.schedule_free import AdamWScheduleFree
from optim.sgd import SGD
from parallel.ddp import DDP
from parallel.diloco import DiLoCo

CPU = torch.device("cpu")
CONFIG = dict(
    vocab_size=32, block_size=8, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, zero_init=False
)
BATCH = 8


def tokens(step):
    return torch.randint(32, (BATCH, 9), generator=torch.Generator().manual_seed(step))


def start(arch="modern"):
    with torch.device("meta"):
        model = GPT(GPTConfig(**CONFIG, **ARCHS[arch])).double()
    return model


ARCHS = {"modern": {}, "gpt2": dict(tied=True, bias=True, position="learned", norm="layernorm")}


def optimizer_of(replicas, model, cls, **arguments):
    lrs = dict.fromkeys(("matrix", "embedding", "head", "scalar"), arguments.pop("lr"))
    muon = getattr(cls, "matrices_only", False)
    return replicas.make_optimizer(cls, param_groups(model, lrs, 0.1, muon), **arguments)


def train(replicas, model, optimizer, rank, world, steps, micro_batches=1):
    """Losses of this rank's rows / (BATCH x 8), norms, bytes; weights at the end."""
    seen = []
    for step in steps:
        mine = tokens(step).chunk(world)[rank].chunk(micro_batches)
        for i, part in enumerate(mine):
            replicas.last_micro_batch(i == len(mine) - 1)
            loss = model(part[:, :-1], part[:, 1:]) / (BATCH * 8)
            loss.backward()
        replicas.finish_gradients()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        seen.append((float(loss.detach()), replicas.sent_bytes))
    return seen


def run(rank, world, cls, arguments, n, options=None, arch="modern", micro_batches=1):
    group = dist.group.WORLD if world > 1 else None
    replicas = DDP(group, CPU) if options is None else DiLoCo(group, CPU, **options)
    model = replicas.parallelize(start(arch))
    replicas.init_weights(lambda name, shape: initial_weight(model.config, name, shape))
    optimizer = optimizer_of(replicas, model, cls, **arguments)
    seen = train(replicas, model, optimizer, rank, world, range(n), micro_batches)
    return (
        seen,
        {name: p.detach().clone() for name, p in model.named_parameters()},
        replicas.weights(),
    )


LINEAR = [dict(lr=0.5), dict(lr=0.2, momentum=0.9), dict(lr=0.2, momentum=0.9, nesterov=True)]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_step_averaged_is_the_plain_run_for_sgd(world):
    for arch, arguments in zip(("modern", "gpt2", "modern"), LINEAR):
        expected = run(0, 1, SGD, arguments, 6, None, arch)[1]
        options = dict(every=1, lr=1.0, momentum=0.0, bucket_mb=1e-3)
        for _, weights, saved in run_ranks(world, run, SGD, arguments, 6, options, arch, 2):
            assert weights.keys() == expected.keys() and (
                saved.keys() == expected.keys() or not saved
            )
            for name, p in weights.items():
                torch.testing.assert_close(p, expected[name], rtol=1e-10, atol=1e-10)
                assert not saved or torch.equal(saved[name], p)


def test_it_is_another_algorithm_elsewhere():
    """Each of AdamW inside, momentum outside, two steps alone takes the run away from the plain
    one."""
    base = dict(every=1, lr=1.0, momentum=0.0)
    for cls, arguments, change in (
        (AdamW, dict(lr=0.01), {}),
        (SGD, dict(lr=0.5), dict(every=2)),
        (SGD, dict(lr=0.5), dict(momentum=0.9)),
    ):
        expected = run(0, 1, cls, arguments, 4)[1]
        weights = run_ranks(2, run, cls, arguments, 4, base | change)[0][1]
        assert max((weights[n] - expected[n]).abs().max() for n in expected) > 1e-4


def simulated(world, cls, arguments, n, every, lr, momentum, nesterov):
    """All replicas one after the other, the outer step by torch's SGD; the loss of each is its
    rows' mean."""
    alone = DDP(None, CPU)
    anchor = alone.parallelize(start())
    alone.init_weights(lambda name, shape: initial_weight(anchor.config, name, shape))
    outer = torch.optim.SGD(anchor.parameters(), lr=lr, momentum=momentum, nesterov=nesterov)
    models = [copy.deepcopy(anchor) for _ in range(world)]
    inner = [optimizer_of(alone, model, cls, **arguments) for model in models]
    for step in range(n):
        for model, optimizer, mine in zip(models, inner, tokens(step).chunk(world)):
            optimizer.zero_grad()
            (model(mine[:, :-1], mine[:, 1:]) / (len(mine) * 8)).backward()
            optimizer.step()
        if step % every == every - 1:
            for p, *theirs in zip(anchor.parameters(), *(model.parameters() for model in models)):
                p.grad = sum((p - q).detach() for q in theirs) / world
            outer.step()
            for model in models:
                model.load_state_dict(anchor.state_dict())
    return [dict(m.named_parameters()) for m in models], dict(anchor.named_parameters())


@pytest.mark.parametrize(
    "world, every, momentum, nesterov, cls, arguments",
    [
        (4, 4, 0.9, True, SGD, dict(lr=0.5, momentum=0.9)),
        (4, 4, 0.9, True, AdamW, dict(lr=0.01)),
        (2, 3, 0.9, False, Muon, dict(lr=0.02, ns_dtype=torch.float64)),
        (1, 4, 0.9, True, SGD, dict(lr=0.5)),
    ],
)
def test_diloco_equals_a_simulation_in_one_process(
    world, every, momentum, nesterov, cls, arguments
):
    """Three rounds and a half: anchors, and what each replica has gone on to from there."""
    n, options = (
        3 * every + every // 2,
        dict(every=every, lr=0.7, momentum=momentum, nesterov=nesterov),
    )
    models, anchor = simulated(world, cls, arguments, n, **options)
    ranks = run_ranks(world, run, cls, arguments, n, options)
    for (_, weights, saved), expected in zip(ranks, models):
        for name, p in weights.items():
            torch.testing.assert_close(p, expected[name].detach(), rtol=1e-10, atol=1e-10)
    for name, p in ranks[0][2].items():
        torch.testing.assert_close(p, anchor[name].detach(), rtol=1e-10, atol=1e-10)
    assert not any(saved for _, _, saved in ranks[1:])
    # Half a round on
    assert any((p - anchor[name]).norm() > 1e-3 for name, p in ranks[0][1].items())


def test_sent_bytes_are_ddps_divided_by_every():
    for world in (2, 4):
        ddp = run_ranks(world, run, SGD, dict(lr=0.1), 8)[0][0]
        diloco = run_ranks(world, run, SGD, dict(lr=0.1), 8, dict(every=4))[0][0]
        weights = run(0, 1, SGD, dict(lr=0.1), 1)[1]
        size = sum(p.nbytes + 1 for p in weights.values())  # 1: the roll call
        assert [sent for _, sent in diloco] == [0, 0, 0, 2 * (world - 1) * size // world] * 2
        assert sum(sent for _, sent in diloco) * 4 == sum(sent for _, sent in ddp)


def test_wire_carries_one_all_reduce_of_the_weights_per_round():
    def count(rank, world):
        sizes, plain = [], dist.all_reduce
        dist.all_reduce = lambda x, *a, **k: (sizes.append(x.nbytes), plain(x, *a, **k))[1]
        _, weights, _ = run(rank, world, SGD, dict(lr=0.1), 7, dict(every=3, bucket_mb=1e-3))
        dist.all_reduce = plain
        return sizes, sum(p.nbytes + 1 for p in weights.values())

    for sizes, weights in run_ranks(2, count):
        assert sum(sizes) == 2 * weights and len(sizes) > 4  # two rounds, several buckets


# ---- looking and saving --------------------------------------------------------------------------
def look(rank, world):
    replicas = DiLoCo(dist.group.WORLD, CPU, every=3)
    model = replicas.parallelize(start())
    replicas.init_weights(lambda name, shape: initial_weight(model.config, name, shape))
    optimizer = optimizer_of(replicas, model, AdamW, lr=0.01)
    train(replicas, model, optimizer, rank, world, range(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with replicas.outer_weights():
        inside = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    return before, inside, after, replicas.weights()


def test_looking_shows_the_same_anchor_on_all_and_changes_nothing():
    ranks = run_ranks(2, look)
    for before, inside, after, _ in ranks:
        for name in before:
            assert torch.equal(before[name], after[name]) and torch.equal(
                inside[name], ranks[0][3][name]
            )
    assert not torch.equal(ranks[0][0]["head.weight"], ranks[1][0]["head.weight"])
    assert not torch.equal(ranks[0][0]["head.weight"], ranks[0][1]["head.weight"])


def resumable(rank, world, folder, first, n, options):
    """As train.py does it: from the checkpoint of step `first` if there is one, n steps, a
    checkpoint."""
    replicas = DiLoCo(dist.group.WORLD if world > 1 else None, CPU, **options)
    model = replicas.parallelize(start())
    saved = load.load(folder / f"step-{first:08d}") if first else None
    initial = functools.partial(initial_weight, model.config)
    replicas.init_weights(saved.weights("model") if first else initial)
    optimizer = optimizer_of(replicas, model, AdamW, lr=0.01)
    if first:
        own = replicas.load_state_dict(lambda part: saved.tree(f"diloco/{part}", missing={}))
        states = saved.tree("optim/state") | own
        load_state_by_name(
            optimizer, saved.tree("optim/groups"), lambda name, *_: states.get(name, {})
        )
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(replicas, model, optimizer, rank, world, range(first, first + n))
    if folder is not None:
        state = state_by_name(optimizer)
        tree = {"model": replicas.weights(), "optim": state if replicas.rank == 0 else {}}
        save.save(folder, first + n, tree | {"diloco": replicas.state_dict(state["state"])})
    end = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: s["exp_avg"] for name, s in state_by_name(optimizer)["state"].items()}
    return begin, end, moments, replicas.anchor


@pytest.mark.parametrize("first", [4, 6])
def test_a_resume_goes_on_bitwise_inside_a_round_and_between_two(first, tmp_path):
    options = dict(every=3)
    whole = run_ranks(2, resumable, None, 0, 10, options)
    run_ranks(2, resumable, tmp_path, 0, first, options)
    for resumed, expected in zip(
        run_ranks(2, resumable, tmp_path, first, 10 - first, options), whole
    ):
        for part in (1, 2, 3):  # weights, inner state, anchor
            assert all(torch.equal(resumed[part][n], x) for n, x in expected[part].items())
    assert not torch.equal(whole[0][1]["head.weight"], whole[1][1]["head.weight"])
    files = load.load(tmp_path / f"step-{first:08d}").names()
    assert any(name.startswith("diloco/1/weights/") for name in files) == (first == 4)


@pytest.mark.parametrize("saved, loaded", [(4, 2), (2, 4), (2, 1)])
def test_another_number_of_replicas_keeps_the_outer_gradient(saved, loaded, tmp_path):
    before = run_ranks(saved, resumable, tmp_path, 0, 5, dict(every=3))
    after = run_ranks(loaded, resumable, tmp_path, 5, 2, dict(every=3))
    for name in before[0][1]:
        mean = sum(r[1][name] for r in before) / saved
        for begin, _, _, anchor in after:
            torch.testing.assert_close(begin[name], mean, rtol=1e-14, atol=1e-14)
            # The round ended after one step
            assert not torch.equal(anchor[name], before[0][3][name])
            assert torch.equal(anchor[name], after[0][3][name])


def test_bad_options_are_refused():
    for options, word in (
        (dict(every=0), "every=0"),
        (dict(every=2, lr=0), "lr=0"),
        (dict(every=2, momentum=1), "momentum=1"),
    ):
        with pytest.raises(ValueError, match=word):
            DiLoCo(None, CPU, **options)
    replicas = DiLoCo(None, CPU, every=2)
    model = replicas.parallelize(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="AdamWScheduleFree.*adamw"):
        optimizer_of(replicas, model, AdamWScheduleFree, lr=0.1)
