"""ZeRO against one process: stages 1, 2 and 3, in float64; what each rank holds; what is sent."""

import copy
import weakref
from functools import partial, reduce

import pytest
import torch
import torch.distributed as dist
from harness import fitted, joined, placed, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import parallel.zero
from checkpoint.load import load
from checkpoint.save import save
from checkpoint.slices import as_slices
from layers.generation import generate
from model import GPT, GPTConfig, initial_weight
from optim import param_groups
from optim.adamw import AdamW
from optim.muon import Muon
from optim.schedule_free import SGDScheduleFree
from optim.sgd import SGD
from parallel.ddp import DDP
from parallel.shard import Shard
from parallel.zero import ZeRO
from precision import onednn

CPU, ROWS = torch.device("cpu"), 16  # rows in a global batch
MODERN = dict(
    n_layer=2, n_head=2, n_kv_head=2, n_embd=16, block_size=8, vocab_size=32, zero_init=False
)
GPT2 = MODERN | dict(
    n_layer=3,
    norm="layernorm",
    activation="gelu",
    position="learned",
    qk_norm=False,
    tied=True,
    bias=True,
    init="gpt2",
    logit_cap=None,
)
UNEVEN = GPT2 | dict(n_layer=1, n_embd=14, vocab_size=31)  # 3 ranks divide none of its shapes
OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.5}),
    "adamw": (AdamW, {"lr": 1e-2}),
    "muon": (Muon, {"lr": 0.02, "ns_dtype": "float64"}),
    "schedule_free": (SGDScheduleFree, {"lr": 0.5}),
}


def build(shape, dtype=torch.float64):
    with torch.device("meta"):
        return GPT(GPTConfig(**shape)).to(dtype)


def batch(step, shape):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(shape["vocab_size"], (ROWS, shape["block_size"] + 1), generator=generator)


class Replica:
    """One rank's side of a run; rank 0 of 1 without a group is the oracle."""

    def __init__(
        self, replicas, rank, world, shape=MODERN, optimizer="sgd", frozen=(), dtype=torch.float64
    ):
        self.replicas, self.rank, self.world, self.shape = replicas, rank, world, shape
        model = build(shape, dtype)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        cls, options = OPTIMIZERS[optimizer]
        self.model = fitted(replicas, cls, model).parallelize(model)
        replicas.init_weights(lambda name, size: initial_weight(self.model.config, name, size))
        lr, others = options["lr"], 0.01 if optimizer == "muon" else options["lr"]
        lrs = dict(matrix=lr, embedding=others, head=others, scalar=others)
        groups = param_groups.param_groups(self.model, lrs, 0.1, muon=optimizer == "muon")
        rest = {k: v for k, v in options.items() if k != "lr"}
        self.optimizer = replicas.make_optimizer(cls, groups, **rest)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()

    def loss(self, tokens, rows):
        return self.model(tokens[rows, :-1], tokens[rows, 1:], sample_ids=rows)

    def gradients(self, step, micro_batches=1):
        """Returns the loss of my rows."""
        tokens, total = batch(step, self.shape), 0.0
        size = ROWS * self.shape["block_size"]
        parts = torch.arange(ROWS).tensor_split(self.world)[self.rank].chunk(micro_batches)
        for i, rows in enumerate(parts):
            self.replicas.last_micro_batch(i == len(parts) - 1)
            loss = self.loss(tokens, rows) / size
            loss.backward()
            total += loss.item()
        self.replicas.finish_gradients()
        return total

    def norm(self):
        squares = torch.zeros((), dtype=torch.float64)
        for g in self.replicas.gradients().values():
            squares += g.square().sum() if self.replicas.is_primary else 0
        if dist.is_initialized():
            dist.all_reduce(squares)
        return squares.sqrt().item()

    def step(self, step, micro_batches=1):
        loss = self.gradients(step, micro_batches)
        norm = self.norm()
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def run(self, steps=3, micro_batches=1):
        """Losses of my rows, gradient norms, the weights I have to save."""
        pairs = [self.step(i, micro_batches) for i in range(steps)]
        weights = placed(self.replicas, self.replicas.weights())
        return [loss for loss, _ in pairs], [norm for _, norm in pairs], weights


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """Weights drawn on the meta device import it: once here, not in each rank."""
    build(MODERN)


ORACLES = {}  # what one process does, computed once


def alone(**options):
    return Replica(DDP(None, CPU), 0, 1, **options)


def same(results, oracle, tolerance=1e-10):
    losses, norms, weights = oracle
    assert len(losses) > 0
    for _, mine, _ in results:
        torch.testing.assert_close(mine, norms, rtol=tolerance, atol=tolerance)
    merged = joined([held for _, _, held in results])
    whole = [sum(parts) for parts in zip(*(r[0] for r in results))]
    torch.testing.assert_close(whole, losses, rtol=tolerance, atol=tolerance)
    assert merged.keys() == weights.keys()
    for name, w in joined([weights]).items():
        torch.testing.assert_close(merged[name], w, rtol=tolerance, atol=tolerance)


def several(rank, world, stage, runs, options):
    results = []
    collectives = options.pop("collectives", False)
    row_ranks = options.pop("row_ranks", None)
    if row_ranks is not None:
        deal_all = parallel.zero.deal

        def deal_to_some(*args):
            owners = deal_all(*args)
            return owners | {name: row_ranks for name in ("embed.weight", "head.weight")}

        parallel.zero.deal = deal_to_some
    for run in runs:
        micro_batches = run.pop("micro_batches", 1)
        zero = ZeRO(dist.group.WORLD, CPU, stage, **options)
        assert not zero.has_collectives  # gloo, and few ranks
        zero.has_collectives = collectives
        replica = Replica(zero, rank, world, **run)
        results.append(replica.run(micro_batches=micro_batches))
    return results


def check(world, stage, runs, tolerance=1e-10, **options):
    results = run_ranks(world, several, stage, runs, options)
    for i, run in enumerate(runs):
        run = {k: v for k, v in run.items() if k != "micro_batches"}
        if repr(run) not in ORACLES:
            ORACLES[repr(run)] = alone(**run).run()
        same([r[i] for r in results], ORACLES[repr(run)], tolerance)


@pytest.mark.parametrize("world", (2, pytest.param(4, marks=pytest.mark.slow)))
@pytest.mark.parametrize("stage", (*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3))
def test_every_optimizer_equals_one_process(stage, world):
    runs = [dict(optimizer=o, micro_batches=m) for o in OPTIMIZERS for m in (1, 4)]
    # So small buckets that each parameter of more than 8 rows is cut.
    check(world, stage, runs, bucket_mb=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_shapes_of_models(stage):
    runs = [
        dict(shape=GPT2, optimizer="adamw", micro_batches=2),
        dict(shape=GPT2),
        dict(shape=GPT2 | dict(dropout=0.2)),
        dict(shape=MODERN | dict(tied=True), micro_batches=2),
    ]
    check(3, stage, runs, bucket_mb=1e-3)


def test_many_small_parts_and_accumulated_dropout():
    for stage in (1, 2, 3):
        check(2, stage, [dict(shape=MODERN | dict(dropout=0.2), micro_batches=4)], bucket_mb=1e-4)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_frozen_parameters_stay_and_are_saved(stage):
    runs = [
        dict(frozen=("embed.weight", "blocks.0.attn.q.weight"), optimizer="adamw"),
        dict(
            frozen=[
                n for n, _ in build(MODERN).named_parameters() if not n.startswith("blocks.1.mlp")
            ]
        ),
        dict(shape=GPT2, frozen=("embed.weight",), micro_batches=2),
    ]
    check(2, stage, runs)


@pytest.mark.parametrize("stage", (pytest.param(1, marks=pytest.mark.slow), 2, 3))
def test_one_collective_and_rows_on_some_ranks(stage):
    """As on a GPU, or on many ranks, with segments that end in the middle of parameters."""
    runs = [dict(optimizer="muon", micro_batches=2), dict(optimizer="adamw", shape=UNEVEN)]
    check(3, stage, runs, collectives=True)
    check(3, stage, runs[:1], row_ranks=(0, 2), collectives=True)


@pytest.mark.parametrize("offload", ("cpu", "disk"))
def test_offloaded_parameters_train_alike(offload, tmp_path):
    runs = [
        dict(optimizer=o, micro_batches=m)
        for o, m in (("adamw", 1), ("muon", 4), ("schedule_free", 1))
    ]
    results = run_ranks(2, offloaded, runs, offload, str(tmp_path))
    for i, run in enumerate(runs):
        same([r[i] for r in results], alone(optimizer=run["optimizer"]).run())
    one = Replica(ZeRO(None, CPU, 3, offload_params=offload, folder=tmp_path), 0, 1)
    same([one.run()], alone().run())


def offloaded(rank, world, runs, offload, folder):
    return several(
        rank, world, 3, runs, dict(offload_params=offload, folder=f"{folder}/rank_{rank}")
    )


def test_only_the_owner_of_an_offloaded_parameter_has_it_and_only_on_the_host(tmp_path):
    for off_device, kinds in run_ranks(2, where_offloaded, str(tmp_path)):
        assert off_device == 0 and kinds == {(True, True)}


def where_offloaded(rank, world, folder):
    zero = ZeRO(dist.group.WORLD, CPU, 3, offload_params="cpu")
    replica = Replica(zero, rank, world, optimizer="adamw")
    replica.gradients(0)
    stepped = [p for g in replica.optimizer.param_groups for p in g["params"]]
    ours = {id(p) for p in replica.model.parameters()}
    kinds = {(id(p) not in ours, p.grad is not None and p.device.type == "cpu") for p in stepped}
    return sum(p.untyped_storage().nbytes() for p in replica.model.parameters()), kinds


# ---- other ways to run the model -----------------------------------------------------------------
def looks(rank, world, stage, optimizer, shape):
    """Train, look, train: losses and samples on the weights to evaluate, and the run that goes
    on."""
    zero = ZeRO(dist.group.WORLD, CPU, stage) if world > 1 else DDP(None, CPU)
    replica = Replica(zero, rank, world, shape=shape, optimizer=optimizer)
    seen = []
    for step in range(3):
        with torch.no_grad(), param_groups.evaluation_weights(replica.optimizer):
            zero.broadcast_weights()
            replica.model.eval()
            seen.append(replica.loss(batch(9, shape), torch.arange(ROWS)).item())
            seen += generate(replica.model, torch.zeros(1, 1, dtype=torch.long), 10, seed=1)[
                0
            ].tolist()
            replica.model.train()
        zero.broadcast_weights()
        replica.gradients(step)
        # And no backward: none of these weights may be left
        replica.loss(batch(9, shape), torch.arange(1))
        replica.optimizer.step()
        replica.model.zero_grad(set_to_none=True)
    return seen, placed(zero, zero.weights())


@pytest.mark.parametrize("stage", (*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 3))
def test_evaluation_sampling_and_schedule_free_between_steps(stage):
    for optimizer, shape in (("schedule_free", MODERN), ("sgd", GPT2)):
        expected, weights = looks(0, 1, None, optimizer, shape)
        results = run_ranks(2, looks, stage, optimizer, shape)
        for seen, _ in results:
            torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-10)
        found = joined([held for _, held in results])
        torch.testing.assert_close(found, joined([weights]), rtol=1e-10, atol=1e-10)


def in_another_way(rank, world, how):
    """Float32 by oneDNN's function, bfloat16 by autocast, or activations made again, K blocks at a
    time (0: not at all); the run and the bytes it sends."""
    zero = ZeRO(dist.group.WORLD, CPU, 3) if world > 1 else DDP(None, CPU)
    dtype = torch.float64 if isinstance(how, int) else torch.float32
    replica = Replica(zero, rank, world, shape=GPT2, dtype=dtype)
    model, plain = replica.model, replica.loss
    if how == "onednn":
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.matmul = onednn.linear
    elif how == "autocast":

        def loss(tokens, rows):
            with torch.autocast("cpu", torch.bfloat16):
                return plain(tokens, rows)

        replica.loss = loss
    elif how:
        blocks = [*model.blocks.values()]
        runs = [partial(again, blocks[i : i + how]) for i in range(0, len(blocks), how)]
        model.run_blocks = lambda _, x, where: reduce(lambda x, run: run(x, where), runs, x)
    return replica.run(micro_batches=2), zero.sent_bytes


def again(run, x, where):
    def forward(x):
        for block in run:
            x = block(x, where)
        return x

    return checkpoint(forward, x, use_reentrant=False)


@pytest.mark.parametrize(
    "how, tolerance",
    (
        ("onednn", 1e-5),
        ("autocast", 1e-2),
        (1, 1e-10),
        *(pytest.param(n, 1e-10, marks=pytest.mark.slow) for n in (2, 3)),
    ),
)
def test_stage_3_under_other_products_and_activation_checkpointing(how, tolerance):
    if how == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    results = run_ranks(2, in_another_way, how)
    same([run for run, _ in results], in_another_way(0, 1, how)[0], tolerance)
    if isinstance(how, int):
        assert results[0][1] == run_ranks(2, in_another_way, 0)[0][1]


def after_a_failure(rank, world, stage, fails):
    """Gradients of a step; before it, with `fails`, a backward that raised, and a mere forward."""

    def fail(gradient):
        raise ArithmeticError

    zero = ZeRO(dist.group.WORLD, CPU, stage, bucket_mb=1e-3)
    model = zero.parallelize(build(MODERN))
    zero.init_weights(partial(initial_weight, model.config))
    ids = batch(rank, MODERN)
    loss = partial(model, ids[:, :-1], ids[:, 1:], sample_ids=torch.arange(ROWS))
    zero.last_micro_batch(True)
    if fails:
        hook = model.blocks["0"].attn.q.weight.register_hook(fail)
        with pytest.raises(ArithmeticError):
            loss().backward()
        hook.remove()
        with torch.no_grad():
            loss()
        model.zero_grad()
    loss().backward()
    zero.finish_gradients()
    return {name: g.clone() for name, g in zero.gradients().items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_after_a_failed_backward_is_the_usual_one(stage):
    usual, after = (run_ranks(2, after_a_failure, stage, fails) for fails in (False, True))
    for ours, theirs in zip(after, usual):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def by_hand(rank, world, stage):
    """Two optimizers that clear only their own; what a stranger's step says; a deep copy."""
    zero = ZeRO(dist.group.WORLD, CPU, stage, blocks="")
    model = zero.parallelize(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)))
    first, last = (zero.make_optimizer(SGD, layer.parameters(), lr=0.1) for layer in model)
    model(torch.ones(2, 4)).square().sum().backward()
    zero.finish_gradients()
    first.step()
    first.zero_grad()
    kept = [p.grad is not None for g in last.param_groups for p in g["params"]]
    dropped = [p.grad is None for g in first.param_groups for p in g["params"]]
    last.step()
    model.zero_grad()
    dropped += [p.grad is None for p in zero.owned_params().values()]
    if stage == 1:
        copy.deepcopy(model).zero_grad()  # of an average of the weights, say
    else:
        with pytest.raises(TypeError, match="has freed the model's weights"):
            copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="only the optimizer that make_optimizer"):
        torch.optim.SGD(zero.owned_params().values(), lr=0.1).step()
    return all(kept) and all(dropped) and len(kept) > 0


@pytest.mark.parametrize("stage", (1, 3))
def test_two_optimizers_a_deep_copy_and_a_step_of_a_stranger(stage):
    assert run_ranks(2, by_hand, stage) == [True, True]


# ---- edges ---------------------------------------------------------------------------------------
def uneven_use(rank, world, stage):
    """Parameters that no rank uses, and one that rank 0 alone does."""
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    model = build(MODERN)
    for name in ("0", "1"):
        extra = torch.nn.Parameter(torch.empty(3, device="meta", dtype=torch.float64))
        model.blocks[name].register_parameter("extra", extra)
    zero = ZeRO(dist.group.WORLD, CPU, stage, bucket_mb=1e-4)
    zero.parallelize(model)
    zero.init_weights(lambda name, size: initial_weight(model.config, name, size))
    out, tokens = [], batch(0, MODERN)[:2]
    if rank == 0:
        scale = torch.arange(16.0)
        model.blocks["0"].register_forward_hook(
            lambda block, args, x: x + block.extra.sum() * scale
        )
    for _ in range(2):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        zero.finish_gradients()
        mine = zero.owned_params()
        out.append({n: p.grad for n, p in mine.items() if n.endswith("extra")})
        model.zero_grad(set_to_none=True)
    return out


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_parameter_unused_on_some_rank_does_not_block(stage):
    results = run_ranks(2, uneven_use, stage)
    for step in range(2):
        # Two of the three elements are rank 0's.
        for rank, n in enumerate((2, 1)):
            grads = results[rank][step]
            assert grads["blocks.1.extra"] is None
            assert grads["blocks.0.extra"].abs().min() > 1e-6 and len(grads["blocks.0.extra"]) == n


def who_has_gradients(rank, world, stage):
    zero = ZeRO(dist.group.WORLD, CPU, stage)
    replica = Replica(zero, rank, world, optimizer="muon")
    replica.gradients(0, micro_batches=2)
    in_model = {n for n, p in replica.model.named_parameters() if p.grad is not None}
    owned = zero.owned_params()
    full = {n for n, p in owned.items() if p is replica.model.get_parameter(n)}
    return in_model, full, {*owned}, placed(zero, zero.gradients())


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_gradients_are_with_their_owners_alone(stage):
    results = run_ranks(4, who_has_gradients, stage)
    for in_model, full, owned, gradients in results:
        assert in_model == full and owned == gradients.keys()
    assert joined([g for *_, g in results]).keys() == dict(build(MODERN).named_parameters()).keys()


def between_micro_batches(rank, world, stage, optimizer):
    replica = Replica(ZeRO(dist.group.WORLD, CPU, stage), rank, world, optimizer=optimizer)
    replica.replicas.last_micro_batch(False)
    replica.loss(batch(0, MODERN), torch.tensor([rank])).backward()
    held = {p.grad is not None for p in replica.model.parameters()}
    dropped = replica.model if optimizer == "sgd" else replica.optimizer
    dropped.zero_grad(set_to_none=True)  # a probe for the largest micro-batch
    return held, replica.run()


def test_stage_1_waits_for_the_last_micro_batch_and_nothing_of_a_probe_remains():
    for stage, optimizer in ((1, "sgd"), (2, "sgd"), (2, "muon"), (3, "muon")):
        results = run_ranks(2, between_micro_batches, stage, optimizer)
        assert [held for held, _ in results] == [{stage == 1}] * 2
        same([run for _, run in results], alone(optimizer=optimizer).run())


def sent(rank, world, stage, micro_batches, reduce_dtype, optimizer):
    zero = ZeRO(dist.group.WORLD, CPU, stage, 1e-3, reduce_dtype)
    replica, counted = Replica(zero, rank, world, optimizer=optimizer, dtype=torch.float32), []

    def counting(call, times):
        def counted_call(x, *a, **kwargs):
            # A reduce-scatter's first tensor is what comes back: 1/world of what is summed.
            counted.append(times * max(t.nbytes for t in (x, *a) if torch.is_tensor(t)))
            return call(x, *a, **kwargs)

        return counted_call

    replica.norm = lambda: None
    with pytest.MonkeyPatch.context() as patch:
        for module, name, times in (
            (dist, "reduce", 1),
            (dist, "isend", 1),
            (dist, "irecv", 1),
            (dist, "broadcast", 1),
            (dist, "all_reduce", 2),
            (parallel.zero, "all_gather", 1),
            (parallel.zero, "reduce_scatter", 1),
        ):
            patch.setattr(module, name, counting(getattr(module, name), times))
        for step in range(2):
            counted.clear()
            replica.step(step, micro_batches)
    return zero.sent_bytes, sum(counted)


def test_sent_bytes_are_the_tables():
    sizes = {n: 4 * p.numel() for n, p in build(MODERN).named_parameters()}
    whole, blocks = sum(sizes.values()), sum(b for n, b in sizes.items() if n.startswith("blocks"))
    roll_call = 2 * len(sizes)
    table = {
        1: lambda a: 2 * whole,
        2: lambda a: (a + 1) * whole,
        3: lambda a: a * (2 * whole + blocks),
    }
    for optimizer, stage, micro_batches in (
        ("sgd", 1, 1),
        ("muon", 1, 2),
        ("sgd", 2, 2),
        ("sgd", 3, 2),
        ("muon", 3, 2),
    ):
        for formula, counted in run_ranks(2, sent, stage, micro_batches, None, optimizer):
            assert counted == table[stage](micro_batches) + roll_call
            assert abs(formula - counted / 2) < 100
    for formula, counted in run_ranks(2, sent, 1, 1, torch.bfloat16, "sgd"):
        assert counted == 1.5 * whole + roll_call


def overlap(rank, world, stage):
    """What happens in which order in one forward and backward of three blocks (units 1 to 3)."""
    zero, events = ZeRO(dist.group.WORLD, CPU, stage, 1e-3), []
    zero.has_collectives = True
    replica = Replica(zero, rank, world, shape=GPT2)
    unit = {id(part.flat): i for i, parts in enumerate(zero.units) for part in parts}
    for i, block in enumerate(replica.model.blocks.values(), 1):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: events.append(f"forward {i}"))
        block.attn.q.weight.register_hook(lambda *_, i=i: events.append(f"backward {i}"))
    plain = parallel.zero.reduce_scatter, parallel.zero.all_gather
    parallel.zero.all_gather = lambda x, *a, **kwargs: (
        events.append(f"fetch {unit[id(x)]}"),
        plain[1](x, *a, **kwargs),
    )[1]
    parallel.zero.reduce_scatter = lambda *a, **kwargs: (
        events.append("send"),
        plain[0](*a, **kwargs),
    )[1]
    replica.gradients(0)
    parallel.zero.reduce_scatter, parallel.zero.all_gather = plain
    return [e for e, before in zip(events, [None, *events]) if e != before]


def test_weights_come_one_unit_ahead_and_gradients_leave_at_once():
    forward = "fetch 0, fetch 1, fetch 2, forward 1, fetch 3, forward 2, fetch 4, forward 3"
    backward = (
        "fetch 3, fetch 2, send, backward 3, fetch 1, send, backward 2, send, backward 1, send"
    )
    assert run_ranks(2, overlap, 3)[0] == f"{forward}, {backward}".split(", ")
    for stage in (1, 2):
        events = ", ".join(run_ranks(2, overlap, stage)[0])
        assert "send, backward 2, send, backward 1, send" in events and "fetch" not in events


def rounded(rank, world):
    zero = ZeRO(dist.group.WORLD, CPU, 2, reduce_dtype=torch.bfloat16)
    replica = Replica(zero, rank, world, dtype=torch.float32)
    replica.gradients(0, micro_batches=2)
    return placed(zero, zero.gradients())


def test_reduce_dtype_rounds_what_is_sent():
    oracle = alone(dtype=torch.float32)
    oracle.gradients(0)
    expected = {n: p.grad for n, p in oracle.model.named_parameters()}
    grads = joined(run_ranks(2, rounded))
    assert grads.keys() == expected.keys()
    for name, g in grads.items():
        error = ((g - expected[name]).norm() / expected[name].norm()).item()
        assert 1e-5 < error < 1e-2 and g.dtype == torch.float32


def fetched(rank, world):
    """Which parameters rank asks for, and the bytes it holds after filling them."""
    model, asked = build(MODERN), []
    zero = fitted(ZeRO(dist.group.WORLD, CPU, 3), Muon, model)
    model = zero.parallelize(model)
    zero.init_weights(lambda name, size: asked.append(name) or torch.zeros(size))
    tensors = [*model.parameters(), *zero.owned_params().values()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return asked, sum(storages.values()), [tuple(p.shape) for p in model.parameters()]


def test_stage_3_holds_and_fills_only_its_own():
    sizes = {n: p.nbytes for n, p in build(MODERN).named_parameters()}
    results = run_ranks(4, fetched)
    outside = {"embed.weight", "head.weight"}  # all ranks have rows of these
    matrices = [n for asked, _, _ in results for n in asked if n not in outside]
    assert sorted(matrices) == sorted(sizes.keys() - outside)
    for asked, held, shapes in results:
        assert outside <= {*asked}
        assert held == sum(sizes[n] / (4 if n in outside else 1) for n in asked)
        assert shapes == [tuple(p.shape) for p in build(MODERN).parameters()]


def write_checkpoint(rank, world, stage, folder):
    replica = Replica(ZeRO(dist.group.WORLD, CPU, stage), rank, world, optimizer="adamw")
    replica.step(0)
    shards = {name: Shard(*where) for name, where in replica.replicas.shards.items()}
    optim = param_groups.state_by_name(replica.optimizer)
    optim["state"] = as_slices(optim["state"], shards)
    save(folder, 1, {"model": as_slices(replica.replicas.weights(), shards), "optim": optim})


def test_a_checkpoint_has_every_weight_and_every_state(tmp_path):
    oracle = alone(optimizer="adamw")
    oracle.step(0)
    for stage in (1, 3):
        run_ranks(3, write_checkpoint, stage, tmp_path / str(stage))
        saved = load(tmp_path / str(stage) / "step-00000001").tree()
        for name, p in oracle.model.named_parameters():
            torch.testing.assert_close(saved["model"][name], p.detach(), rtol=1e-10, atol=1e-10)
            state = oracle.optimizer.state[p]["exp_avg_sq"]
            found = saved["optim"]["state"][name]["exp_avg_sq"]
            torch.testing.assert_close(found, state, rtol=1e-10, atol=1e-20)


def test_one_replica_needs_no_process_group():
    for stage in (1, 2, 3):
        replica = Replica(ZeRO(None, CPU, stage), 0, 1, optimizer="muon")
        same([replica.run()], alone(optimizer="muon").run(), 0)
        assert replica.replicas.sent_bytes == 0


def test_what_cannot_be_is_refused_with_an_alternative():
    with pytest.raises(ValueError, match="take 1, 2 or 3"):
        ZeRO(None, CPU, 4)
    with pytest.raises(ValueError, match="--data_parallel=zero3"):
        ZeRO(None, CPU, 2, offload_params="cpu")
    with pytest.raises(ValueError, match="take cpu or disk"):
        ZeRO(None, CPU, 3, offload_params="tape")


class InOrder(torch.nn.Module):
    """Blocks called in any order, also twice."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        linears = {name: torch.nn.Linear(4, 4, device="meta") for name in ("0", "1")}
        self.blocks = torch.nn.ModuleDict(linears)

    def forward(self, x):
        for name in self.order:
            x = self.blocks[name](x)
        return x.sum()


def called_in_order(rank, world, stage, order):
    zero = ZeRO(dist.group.WORLD, CPU, stage)
    model = zero.parallelize(InOrder(order))
    zero.init_weights(lambda name, size: torch.ones(size))
    try:
        model(torch.ones(2, 4)).backward()
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("stage", (1, 3))
@pytest.mark.parametrize("order", ["01", "001", "011", "10", "010"])
def test_a_block_called_twice_or_out_of_order_is_refused(stage, order):
    """Its gradients would leave for their owner after the first of its two backwards."""
    said = run_ranks(2, called_in_order, stage, order)
    if order == "01":
        assert said == [None, None]
    else:
        assert all("each block at most once and in order" in text for text in said)


# ---- what is held --------------------------------------------------------------------------------
class Storages(TorchDispatchMode):
    """The bytes of the storages made inside, polled whenever one is made: that sees `resize_(0)`.
    Those below 4 kB, activations of a row of two tokens, do not count."""

    def __init__(self):
        super().__init__()
        self.seen, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            large = isinstance(x, torch.Tensor) and not x.is_meta and x.nbytes > 4096
            if large and x.untyped_storage() not in self.seen:
                self.seen.add(x.untyped_storage())
                self.peak = max(self.peak, self.now())
        return out

    def now(self):
        return sum(storage.nbytes() for storage in self.seen)


def peak(rank, world, stage):
    """Peak bytes over two steps of AdamW on one short row each, and what lives after a forward
    without and with autocast."""
    shape = MODERN | dict(n_layer=12, n_embd=64, block_size=2)
    with Storages() as storages:
        zero = ZeRO(dist.group.WORLD, CPU, stage, bucket_mb=0.1) if stage else DDP(None, CPU)
        replica = Replica(zero, rank, world, shape=shape, optimizer="adamw", dtype=torch.float32)
        for step in range(2):
            replica.loss(batch(step, shape), torch.tensor([rank])).backward()
            zero.finish_gradients()
            replica.optimizer.step()
            replica.model.zero_grad(set_to_none=True)
        result = [storages.peak]
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = replica.loss(batch(0, shape), torch.tensor([rank]))
            result.append(storages.now())
            del loss
    return result


@pytest.mark.slow
def test_memory_goes_down_with_the_stage_and_autocast_leaves_no_copies():
    whole, _, _ = peak(0, 1, None)
    for stage, most in ((2, 0.5), (3, 0.35)):
        for peak_bytes, plain, autocast in run_ranks(4, peak, stage):
            assert peak_bytes < most * whole
            assert stage == 2 or autocast < 1.05 * plain
