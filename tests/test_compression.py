"""Compressed gradients against slow transcriptions of the papers, torch's PowerSGD hook, the
all-reduce."""

import functools
import hashlib
import itertools

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint import load as checkpoint
from checkpoint import save
from parallel import compression
from parallel.ddp import DDP, AllReduce, Bucket

CPU = torch.device("cpu")
METHODS = dict(
    topk=dict(fraction=0.1), sign={}, onebit={}, powersgd=dict(rank=2, seed=3), fp16={}, bf16={}
)
SHAPES = {"a": (12, 10), "b": (7,), "c": (4, 5, 6), "d": (3, 3), "e": (1,)}


def make(method: str, **options):
    return getattr(compression, method)(**METHODS[method] | options)


def gradient(name: str, rank: int, step: int, dtype=torch.float64) -> torch.Tensor:
    seed = sum(map(ord, name)) * 1000 + rank * 100 + step
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(dtype)


def filled_bucket(rank, step, dtype=torch.float64, names=SHAPES) -> Bucket:
    bucket = Bucket(
        [(name, nn.Parameter(torch.zeros(SHAPES[name], dtype=dtype))) for name in names]
    )
    for name, view in zip(bucket.names, bucket.views):
        view.copy_(gradient(name, rank, step, dtype))
    return bucket


def sums(rank, world, method, options, steps=5, dtype=torch.float64):
    """Per step: {name: sum}, {name: residual}."""
    reduce, seen = make(method, **options), []
    for step in range(steps):
        bucket = filled_bucket(rank, step, dtype)
        reduce(bucket, dist.group.WORLD).wait()
        named = {name: view.clone() for name, view in zip(bucket.names, bucket.views)}
        seen.append((named, dict(reduce.residuals)))
    return seen


def sums_of_all(rank, world, options):
    return {method: sums(rank, world, method, options) for method in METHODS}


# ---- slow transcriptions: entry by entry, all replicas in one process ----------------------------
def slow_topk(x, fraction):
    order = sorted(range(x.numel()), key=lambda i: -abs(x.view(-1)[i].item()))
    out = torch.zeros_like(x)
    for i in order[: max(1, round(fraction * x.numel()))]:
        out.view(-1)[i] = x.view(-1)[i]
    return out


def slow_sign(x):
    scale = torch.tensor(
        sum(abs(v) for v in x.flatten().tolist()) / x.numel(), dtype=torch.float32
    ).item()
    return (
        torch.tensor([scale if v >= 0 else -scale for v in x.flatten().tolist()]).to(x).view_as(x)
    )


def slow_onebit(x):
    m = x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(-1, 1)
    out = torch.zeros_like(m)
    for j in range(m.shape[1]):
        for up in (True, False):
            rows = [i for i, v in enumerate(m[:, j].tolist()) if (v >= 0) == up]
            if rows:
                mean = torch.tensor(
                    sum(m[i, j].item() for i in rows) / len(rows), dtype=torch.float32
                )
                out[rows, j] = mean.double()
    return out.view_as(x)


SLOW = {
    "topk": lambda x: slow_topk(x, 0.1),
    "sign": slow_sign,
    "onebit": slow_onebit,
    "fp16": lambda x: x.half().double(),
    "bf16": lambda x: x.bfloat16().double(),
}


@pytest.mark.parametrize("error_feedback", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_five_steps_equal_a_slow_transcription(world, error_feedback):
    """fp16 and bf16 on 2 replicas alone: the sum of 2 numbers is rounded once, whatever the
    ring."""
    ranks = run_ranks(world, sums_of_all, dict(error_feedback=error_feedback))
    for method in SLOW if world == 2 else ("topk", "sign", "onebit"):
        same_as_slow([seen[method] for seen in ranks], world, method, error_feedback)


def same_as_slow(ranks, world, method, error_feedback):
    nothing = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    residual = {(r, name): nothing[name] for r in range(world) for name in SHAPES}
    for step in range(5):
        for name in SHAPES:
            total = torch.zeros(SHAPES[name], dtype=torch.float64)
            for r in range(world):
                x = gradient(name, r, step) + residual[r, name]
                sent = SLOW[method](x)
                total += sent
                if error_feedback:
                    residual[r, name] = x - sent
                    torch.testing.assert_close(
                        ranks[r][step][1][name], x - sent, rtol=1e-6, atol=1e-6
                    )
            if method in ("fp16", "bf16"):
                total = total.to(
                    getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}[method])
                ).double()
            # 1e-6: a mean between two float32 numbers may be rounded to either
            for r in range(world):
                torch.testing.assert_close(ranks[r][step][0][name], total, rtol=1e-6, atol=1e-6)
                if method in ("topk", "fp16", "bf16"):
                    torch.testing.assert_close(
                        ranks[r][step][0][name], total, rtol=1e-15, atol=1e-15
                    )
    assert error_feedback or not ranks[0][-1][1]


@pytest.mark.parametrize("world", [2, 4])
def test_sum_sent_plus_errors_is_gradients_plus_old_errors(world):
    """Each replica's part of the sum is its gradient + old residual - new residual; they add up to
    the sum.

    For fp16 and bf16 up to the rounding of the sum itself, in their own dtype."""
    everything = run_ranks(world, sums_of_all, {})
    for method in METHODS:
        ranks = [seen[method] for seen in everything]
        tolerance = {"fp16": 4e-3, "bf16": 4e-2, "topk": 1e-14}.get(method, 1e-12)
        for step in range(5):
            for name in SHAPES:
                owed = sum(gradient(name, r, step) - ranks[r][step][1][name] for r in range(world))
                if step:
                    owed = owed + sum(ranks[r][step - 1][1][name] for r in range(world))
                torch.testing.assert_close(
                    ranks[0][step][0][name], owed, rtol=tolerance, atol=tolerance
                )
                assert all(
                    torch.equal(seen[step][0][name], ranks[0][step][0][name]) for seen in ranks
                )
        # There was something to carry
        assert method in ("fp16", "bf16") or ranks[0][-1][1]["a"].norm() > 1


def exact_identity(rank, world):
    """x - sent on one replica, where every number is representable."""
    outcomes = {}
    vectors = dict(
        topk=[7.3, -1e-9, 0.1, 55.5] * 5,
        sign=[1.0, -3.0, 1.0, 3.0] * 2,
        onebit=[1.0, -3.0, 3.0, -1.0],
        fp16=[1 + 2**-20, 3.0, 5e-6, -7.7],
    )
    for method, values in vectors.items():
        x = torch.tensor(values, dtype=torch.float64)
        bucket = Bucket([("x", nn.Parameter(torch.zeros_like(x)))])
        bucket.flat.copy_(x if rank == 0 else torch.zeros_like(x))  # replica 1 sends zeros
        reduce = make(method)
        reduce(bucket, dist.group.WORLD).wait()
        outcomes[method] = x, bucket.flat, reduce.residuals["x"]
    return outcomes


def test_sent_plus_error_is_bitwise_the_gradient():
    for method, (x, sent, error) in run_ranks(2, exact_identity)[0].items():
        assert torch.equal(sent + error, x) and error.norm() > 0 and sent.norm() > 0, method


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_of_everything_is_the_all_reduce(dtype):
    for world in (2, 4):
        for seen in run_ranks(world, sums, "topk", dict(fraction=1.0), 2, dtype):
            for step, (named, residuals) in enumerate(seen):
                for name, x in named.items():
                    expected = sum(gradient(name, r, step, dtype) for r in range(world))
                    assert (
                        torch.equal(x, expected) and x.dtype == dtype and not residuals[name].any()
                    )


# ---- PowerSGD ------------------------------------------------------------------------------------
def low_rank(rank, world, r):
    left, right = (
        torch.randn(n, r, generator=torch.Generator().manual_seed(n + rank), dtype=torch.double)
        for n in (30, 40)
    )
    bucket = Bucket([("x", nn.Parameter(torch.zeros(30, 40, dtype=torch.double)))])
    reduce, seen = compression.powersgd(rank=4), []
    for step in range(3):
        bucket.flat.copy_((left @ right.T).flatten() * (step + 1))
        plain = bucket.flat.clone()
        dist.all_reduce(plain)
        reduce(bucket, dist.group.WORLD).wait()
        seen.append((bucket.flat.clone(), plain))
    return seen, reduce.residuals["x"]


def test_powersgd_of_full_rank_is_the_all_reduce():
    """Two replicas' gradients of rank 2: P Qᵀ of rank 4 holds all of their sum."""
    for seen, residual in run_ranks(2, low_rank, 2):
        for got, expected in seen:
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        assert residual.abs().max() < 1e-10
    for got, expected in run_ranks(2, low_rank, 3)[0][0]:
        assert (got - expected).norm() > 0.01 * expected.norm()  # rank 6 does not fit


def net(dtype=torch.float64):
    torch.manual_seed(0)
    layers = (
        nn.Linear(12, 16),
        nn.Tanh(),
        nn.Linear(16, 20, bias=False),
        nn.Tanh(),
        nn.Linear(20, 9),
    )
    return nn.Sequential(*layers).to(dtype)


def rows(step, n=8, dtype=torch.float64):
    return torch.randn(
        n, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64
    ).to(dtype)


def steps(
    model,
    wait,
    world,
    rank,
    n,
    first=0,
    micro_batches=1,
    before=lambda last: None,
    dtype=torch.float64,
    factor=1,
):
    """n steps of SGD on the sum of all rows' losses / 8; the gradients of each step."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.2), []
    for step in range(first, first + n):
        model.zero_grad(set_to_none=True)
        parts = rows(step, dtype=dtype).chunk(world)[rank].chunk(micro_batches)
        for i, part in enumerate(parts):
            before(i == len(parts) - 1)
            (factor * (model(part) - 1).square().sum() / 8).backward()
        wait()
        seen.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return seen


def ours(rank, world, method, options, bucket_mb=25.0, n=6, micro_batches=1):
    reduce = AllReduce() if method is None else make(method, **options)
    replicas = DDP(dist.group.WORLD, CPU, bucket_mb, reduce)
    model = replicas.parallelize(net())
    wait, before = replicas.finish_gradients, replicas.last_micro_batch
    seen = steps(model, wait, world, rank, n, 0, micro_batches, before)
    return seen, [p.detach() for p in model.parameters()], replicas.sent_bytes


def first_q(seed, name, columns, rank):
    key = int.from_bytes(hashlib.sha256(f"{seed}:powersgd:{name}".encode()).digest()[:4], "little")
    return torch.randn(columns, rank, generator=torch.Generator().manual_seed(key))


def beside_torch(rank, world, dtype, columns):
    """Two plain steps (their hook insists), then six compressed ones, from the same Q."""
    mine = compression.powersgd(rank=columns, seed=3)
    replicas = DDP(dist.group.WORLD, CPU)
    model, got = replicas.parallelize(net(dtype)), []
    for step in range(8):
        replicas.reduce = mine if len(got) >= 2 else AllReduce()
        got += steps(model, replicas.finish_gradients, world, rank, 1, step, dtype=dtype)

    theirs = DistributedDataParallel(net(dtype))
    state = powerSGD_hook.PowerSGDState(
        None, columns, start_powerSGD_iter=2, min_compression_rate=1
    )
    names = {id(p): name for name, p in theirs.module.named_parameters()}

    def hook(state, bucket):
        if state.iter == 2:
            matrices = [p for p in bucket.parameters() if p.ndim > 1]  # each of them saves bytes
            qs = [
                first_q(3, names[id(p)], p.shape[1], columns).to(dtype).flatten() for p in matrices
            ]
            state.q_memory_dict[bucket.index()] = torch.cat(qs)
            size = columns * sum(len(p) for p in matrices)
            state.p_memory_dict[bucket.index()] = torch.empty(size, dtype=dtype)
        return powerSGD_hook.powerSGD_hook(state, bucket)

    theirs.register_comm_hook(state, hook)  # it averages
    return got, steps(theirs, lambda: None, world, rank, 8, dtype=dtype, factor=world)


@pytest.mark.parametrize(
    "dtype, columns, tolerance", [(torch.float32, 1, 2e-5), (torch.float64, 2, 1e-12)]
)
def test_powersgd_follows_torchs_hook_step_by_step(dtype, columns, tolerance):
    """Relative to each gradient's norm. Eight steps of training on its own gradients let
    float32's rounding grow: float64 is the proof."""
    for got, expected in run_ranks(2, beside_torch, dtype, columns):
        for step, (mine, theirs) in enumerate(zip(got, expected)):
            for a, b in zip(mine, theirs):
                assert (a - b).norm() <= tolerance * b.norm(), (step, a.shape)


def test_a_zero_gradient_does_not_stop_powersgd():
    """As behind a projection that starts at 0: Q is 0 then, and has to come back."""

    def run(rank, world):
        bucket = Bucket([("x", nn.Parameter(torch.zeros(30, 40, dtype=torch.double)))])
        reduce = make("powersgd")
        for step in range(30):
            bucket.flat.zero_()
            bucket.views[0][:, :2] = float(step > 0)
            reduce(bucket, dist.group.WORLD).wait()
        return bucket.flat.view(30, 40)

    x = run_ranks(2, run)[0]
    torch.testing.assert_close(x[:, :2], torch.full_like(x[:, :2], 2.0), rtol=1e-6, atol=1e-6)


# ---- bytes, buckets, micro-batches ---------------------------------------------------------------
class Wire(TorchDispatchMode):
    """Bytes this rank sends, read off the collectives themselves."""

    sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        n = dist.get_world_size()
        if func.namespace == "c10d":
            if "allreduce" in str(func):
                self.sent += sum(2 * (n - 1) * x.nbytes // n for x in args[0])
            elif "allgather" in str(func):
                self.sent += sum((n - 1) * x.nbytes for x in args[1])
            else:
                raise AssertionError(func)
        return func(*args, **kwargs or {})


def counted(rank, world):
    seen = {}
    for method in METHODS:
        reduce, bucket = make(method), filled_bucket(rank, 0, torch.float32)
        with Wire() as wire:
            reduce(bucket, dist.group.WORLD).wait()
        seen[method] = wire.sent, bucket.sent_bytes
    return seen


def formula(method, n):
    """By hand, for the shapes 12x10, 7, 4x30, 3x3, 1 in float32."""
    ring = lambda entries, width: 2 * (n - 1) * entries * width // n  # noqa: E731
    return {
        "topk": (n - 1) * (12 + 1 + 12 + 1 + 1) * (4 + 4),
        "sign": (n - 1) * (15 + 1 + 15 + 2 + 1 + 5 * 4),
        "onebit": (n - 1) * (15 + 1 + 15 + 2 + 1 + 2 * 4 * (10 + 1 + 30 + 3 + 1)),
        "powersgd": ring(2 * 12 + 2 * 4 + 7 + 9 + 1, 4) + ring(2 * 10 + 2 * 30, 4),
        "fp16": ring(257, 2),
        "bf16": ring(257, 2),
    }[method]


@pytest.mark.parametrize("world", [2, 4])
def test_sent_bytes_are_the_formulas_and_those_on_the_wire(world):
    for seen in run_ranks(world, counted):
        for method, (wire, said) in seen.items():
            assert wire == said == formula(method, world), method


def bucketed(rank, world, n, cases):
    """cases: [(bucket_mb, micro_batches)]."""
    return {m: [ours(rank, world, m, {}, mb, n, micro) for mb, micro in cases] for m in METHODS}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_nothing_depends_on_buckets_and_replicas_stay_the_same(world):
    """Bitwise where every replica adds up alone; a ring of 4 adds in another order for each
    place."""
    ranks = run_ranks(world, bucketed, 6, [(25.0, 1), (1e-4, 1)])
    for method in METHODS:
        rounding = dict(powersgd=1e-12, fp16=1e-2, bf16=1e-1).get(method, 0) if world > 2 else 0
        for (seen, weights, sent), (seen_many, _, sent_many) in (
            result[method] for result in ranks
        ):
            for a, b in zip([x for s in seen for x in s], [x for s in seen_many for x in s]):
                torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)
            assert all(torch.equal(a, b) for a, b in zip(weights, ranks[0][method][0][1]))
            assert abs(sent - sent_many) <= 8  # a ring's share is rounded down for each bucket


def test_micro_batches_are_compressed_once():
    results = run_ranks(2, bucketed, 3, [(1e-4, 1), (1e-4, 4)])[0]
    for method, ((one, _, sent), (four, _, sent_four)) in results.items():
        tolerance = dict(fp16=1e-3, bf16=1e-2).get(method, 1e-5)
        for a, b in zip([x for s in one for x in s], [x for s in four for x in s]):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert sent == sent_four


@pytest.mark.slow
def test_with_error_feedback_everything_arrives():
    """The same gradient 200 times: what has arrived is 200 times it, but for one residual."""

    def run(rank, world):
        seen = {}
        for method, error_feedback in itertools.product(METHODS, (True, False)):
            reduce, total = make(method, error_feedback=error_feedback), 0
            for _ in range(200):
                bucket = filled_bucket(rank, 0, names="a")
                reduce(bucket, dist.group.WORLD).wait()
                total = total + bucket.views[0]
            seen[method, error_feedback] = total / 200
        return seen

    expected = gradient("a", 0, 0) + gradient("a", 1, 0)
    for (method, error_feedback), mean in run_ranks(2, run)[0].items():
        off = (mean - expected).norm() / expected.norm()
        assert off < 0.1 if error_feedback or method in ("fp16", "bf16") else off > 0.2, (
            method,
            off,
        )


def test_a_step_can_be_undone_until_the_next_one_begins():
    """How to undo a step is as large as the model: it is gone before the next forward."""

    def run(rank, world):
        reduce = compression.topk(fraction=0.1)
        replicas = DDP(dist.group.WORLD, CPU, reduce=reduce)
        model = replicas.parallelize(net())

        def step(i, finish=True):
            replicas.last_micro_batch(True)
            kept = len(reduce.residuals_before)
            (model(rows(i).chunk(world)[rank]) - 1).square().sum().backward()
            if finish:
                replicas.finish_gradients()
            return kept

        def owed():
            return {name: x.clone() for name, x in reduce.residuals.items()}

        kept = [step(0)]
        model.zero_grad()
        first = owed()
        kept.append(step(1))
        replicas.discard_step()
        discarded = owed()
        model.zero_grad()
        # Dropped without a word: last_micro_batch comes before anybody knows.
        kept.append(step(2, finish=False))
        model.zero_grad()
        kept.append(step(3))
        replicas.discard_step()
        dropped = owed()
        same = all(torch.equal(first[n], x[n]) for x in (discarded, dropped) for n in first)
        return kept, same

    # The last of them finds what the dropped step may have to take back.
    for kept, same in run_ranks(2, run):
        assert kept[:3] == [0, 0, 0] and kept[3] > 0 and same


# ---- what is not finite, what is not allowed -----------------------------------------------------
def test_a_bad_gradient_is_seen_by_all_and_forgotten():
    def run(rank, world):
        outcomes = {}
        for method, bad in itertools.product(METHODS, (float("nan"), float("inf"))):
            reduce, seen = make(method), []
            for step in range(3):
                bucket = filled_bucket(rank, step)
                if step == 1 and rank == 1:
                    bucket.views[0][3, 2] = bad
                reduce(bucket, dist.group.WORLD).wait()
                seen.append(bool(bucket.flat.isfinite().all()))
            outcomes[method, bad] = (
                seen,
                all(bool(x.isfinite().all()) for x in reduce.residuals.values()),
            )
        return outcomes

    for outcomes in run_ranks(2, run):
        for case, outcome in outcomes.items():
            assert outcome == ([True, False, True], True), case


def test_bad_options_are_refused():
    for fraction in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match="fraction=.*it lies in"):
            compression.topk(fraction=fraction)
    with pytest.raises(ValueError, match="rank=0"):
        compression.powersgd(rank=0)


# ---- checkpoints ---------------------------------------------------------------------------------
def reader(folder):
    saved = checkpoint.load(folder)
    return lambda part: saved.tree(f"compress/{part}", missing={})


def train(rank, world, method, folder, first, n, load):
    reduce = make(method)
    replicas = DDP(dist.group.WORLD, CPU, reduce=reduce)
    model = replicas.parallelize(net())
    if load:
        reduce.load_state_dict(reader(folder / "step-00000003"), rank, world)
        replicas.init_weights(
            lambda name, shape: checkpoint.load(folder / "step-00000003").tensor(f"model/{name}")
        )
    seen = steps(
        model, replicas.finish_gradients, world, rank, n, first, before=replicas.last_micro_batch
    )
    tree = {"model": replicas.weights(), "compress": reduce.state_dict(rank, world)}
    if folder is not None:
        save.save(folder, first + n, tree)
    return seen[3 - first :] if first < 3 else seen, reduce.residuals, reduce.shared


@pytest.mark.parametrize("method", ["topk", "powersgd"])
def test_a_resume_goes_on_bitwise(method, tmp_path):
    whole = run_ranks(2, train, method, None, 0, 6, False)
    run_ranks(2, train, method, tmp_path, 0, 3, False)
    resumed = run_ranks(2, train, method, tmp_path, 3, 3, True)
    for (a, ra, qa), (b, rb, qb) in zip(whole, resumed):
        assert (
            all(torch.equal(x, y) for s, t in zip(a, b) for x, y in zip(s, t))
            and len(a) == len(b) == 3
        )
        assert all(torch.equal(ra[n], rb[n]) for n in ra) and all(
            torch.equal(qa[n], qb[n]) for n in qa
        )
        assert len(ra) == 5 and len(qa) == (3 if method == "powersgd" else 0)


@pytest.mark.parametrize("saved, loaded", [(4, 2), (2, 4), (4, 3)])
def test_another_number_of_replicas_owes_the_same_sum(saved, loaded, tmp_path):
    def load(rank, world):
        reduce = make("powersgd")
        reduce.load_state_dict(reader(tmp_path / "step-00000003"), rank, world)
        return reduce.residuals, reduce.shared

    before = run_ranks(saved, train, "powersgd", tmp_path, 0, 3, False)
    after = run_ranks(loaded, load)
    for name in before[0][1]:
        owed, owes = sum(r[1][name] for r in before), sum(r[0][name] for r in after)
        torch.testing.assert_close(owes, owed, rtol=1e-14, atol=1e-14)
        assert all(torch.equal(r[0][name], after[0][0][name]) for r in after)
    assert all(torch.equal(q, after[-1][1][name]) for name, q in before[0][2].items())


def test_another_rank_draws_a_new_q():
    def run(rank, world):
        old, new = make("powersgd"), make("powersgd", rank=1)
        old(filled_bucket(rank, 0), dist.group.WORLD).wait()
        everyone = [None, None]
        dist.all_gather_object(everyone, old.residuals)
        tree = {"replicas": 2, "shared": old.shared, "residuals": dict(zip("01", everyone))}
        new.load_state_dict(
            lambda part: functools.reduce(dict.get, part.split("/"), tree), rank, world
        )
        new(filled_bucket(rank, 1), dist.group.WORLD).wait()
        return new.shared["a"].shape

    assert run_ranks(2, run) == [(10, 1)] * 2


def test_a_residual_left_by_another_method_is_paid_once():
    def run(rank, world):
        old, new, seen = make("topk"), make("powersgd"), []
        old(filled_bucket(rank, 0), dist.group.WORLD).wait()
        owed = old.residuals["d"].clone()
        new.residuals = old.residuals  # as a checkpoint would hand them on
        for step in (1, 2):
            bucket = filled_bucket(rank, step)
            new(bucket, dist.group.WORLD).wait()
            # A matrix too small to factor
            seen.append(bucket.views[bucket.names.index("d")].clone())
        return seen, owed

    ranks = run_ranks(2, run)
    plain = [gradient("d", 0, step) + gradient("d", 1, step) for step in (1, 2)]
    torch.testing.assert_close(
        ranks[0][0][0], plain[0] + ranks[0][1] + ranks[1][1], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(ranks[0][0][1], plain[1], rtol=1e-12, atol=1e-12)
