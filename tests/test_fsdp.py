"""Our use of FSDP2 against one process on the whole batch, in float64."""

import functools
from pathlib import Path

import pytest
import torch
import torch._dynamo  # imported before the ranks are forked, or each of them spends a second on it
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
from harness import init_weights, run_ranks

from checkpoint.load import load
from checkpoint.save import save
from layers.generation import generate
from model import GPT, GPTConfig, initial_weight
from optim.adafactor import Adafactor
from optim.adamw import AdamW
from optim.lamb import LAMB
from optim.muon import Muon
from optim.param_groups import param_groups
from optim.schedule_free import AdamWScheduleFree
from optim.sgd import SGD
from parallel.fsdp import FSDP, Broadcasts
from parallel.shard import sharded

CPU = torch.device("cpu")
MODERN = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=8, block_size=8, vocab_size=13)
GPT2 = dict(
    MODERN,
    tied=True,
    norm="layernorm",
    activation="gelu",
    position="learned",
    bias=True,
    qk_norm=False,
    zero_init=False,
    init="gpt2",
    logit_cap=None,
)
OPTIMIZERS = [SGD, AdamW, Muon, Adafactor, LAMB, AdamWScheduleFree]
STEPS, BATCH = 4, 12


def start(group, arch, **options):
    c = GPTConfig(**arch)
    with torch.device("meta"):
        model = GPT(c)
    replicas = FSDP(group, CPU, **options)
    model = replicas.parallelize(model.to(torch.float64))

    # Noise on top, or gpt2's biases and modern's projections would be zeros
    def source(name, shape):
        generator = torch.Generator().manual_seed(len(name))
        return initial_weight(c, name, shape) + 0.1 * torch.randn(shape, generator=generator)

    replicas.init_weights(source)
    return model, replicas


def optimizer_of(cls, model, replicas):
    lrs = dict(matrix=0.02, embedding=0.01, head=0.01, scalar=0.01)
    return replicas.make_optimizer(cls, param_groups(model, lrs, 0.1, muon=cls is Muon))


def batch(step: int, size: int = BATCH) -> torch.Tensor:
    return torch.randint(0, 13, (size, 9), generator=torch.Generator().manual_seed(step))


def forward_backward(model, replicas, step, rank, world, micro_batches):
    loss, parts = 0.0, batch(step).chunk(world)[rank].chunk(micro_batches)
    for i, tokens in enumerate(parts):
        replicas.last_micro_batch(i == len(parts) - 1)
        total = model(tokens[:, :-1], tokens[:, 1:]) / (BATCH * 8)
        total.backward()
        loss += total.item()
    replicas.finish_gradients()
    squares = (
        torch.stack([g.square().sum() for g in replicas.gradients().values()]).sum()
        * replicas.is_primary
    )
    if dist.is_initialized():
        dist.all_reduce(squares)
    return loss, squares.sqrt().item()


def evaluate(model, replicas, optimizer):
    """What Schedule-Free asks for, in the middle of training; no other method notices."""
    tokens, found = batch(99, 4), []
    for mode in (getattr(optimizer, m, None) for m in ("eval", "train")):
        if mode is not None:
            mode()
            replicas.broadcast_weights()
        model.eval()
        with torch.no_grad():
            found.append(model(tokens[:, :-1], tokens[:, 1:]).item())
        model.train()
    return found


def train(group, rank, world, cls, arch, micro_batches=1, **options):
    model, replicas = start(group, arch, **options)
    optimizer = optimizer_of(cls, model, replicas)
    assert type(optimizer) is cls
    if hasattr(optimizer, "train"):
        optimizer.train()
    losses, norms, evals = [], [], []
    for step in range(STEPS):
        loss, norm = forward_backward(model, replicas, step, rank, world, micro_batches)
        if cls is not SGD:  # whose steps show a wrong factor only if nothing makes up for it
            for g in replicas.gradients().values():
                g.mul_(min(1.0, 0.5 / norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.zero_grad(set_to_none=True)
        losses.append(loss)
        norms.append(norm)
        if step == 1:
            evals = evaluate(model, replicas, optimizer)
    ids = generate(model, batch(7, 1)[:, :3], 6, temperature=0)
    if arch is GPT2:
        assert model.head.weight is model.embed.weight
    weights = {
        n: w.full_tensor() if hasattr(w, "placements") else w for n, w in replicas.weights().items()
    }
    return losses, norms, evals, ids.tolist(), {n: w.detach().clone() for n, w in weights.items()}


@functools.cache
def alone(cls, tied=False):
    return train(None, 0, 1, cls, GPT2 if tied else MODERN)


def many(rank, world, arch, classes, micro_batches, options):
    return [
        train(dist.group.WORLD, rank, world, cls, arch, micro_batches, **options) for cls in classes
    ]


def assert_equal_to_one_process(ranks, classes, tied=False):
    for cls, *found in zip(classes, *ranks):
        losses, norms, evals, ids, weights = alone(cls, tied)
        close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
        double = functools.partial(torch.tensor, dtype=torch.float64)
        close(double([f[0] for f in found]).sum(0), double(losses))
        for f in found:
            close(double(f[1]), double(norms))
            close(double(f[2]), double(evals))
            assert f[3] == ids and f[4].keys() == weights.keys()
            # But one: its gradient is rounding alone, which Adam magnifies
            for name, w in f[4].items():
                if not name.endswith("attn.k.bias"):
                    close(w, weights[name], msg=lambda m: f"{cls.__name__} {name}: {m}")


LAYOUTS = [
    pytest.param(2, 1, {}, marks=pytest.mark.slow),
    pytest.param(2, 3, dict(reshard=False), marks=pytest.mark.slow),
    pytest.param(4, 3, {}, marks=pytest.mark.slow),
    pytest.param(4, 2, dict(shard=2), marks=pytest.mark.slow),
    pytest.param(4, 1, dict(shard=2, reshard=False), marks=pytest.mark.slow),
    pytest.param(4, 3, dict(shard=1), marks=pytest.mark.slow),
    # 13 rows and 8 channels over 3 ranks
    (3, 2, dict(reshard=False)),
]


@pytest.mark.parametrize("world, micro_batches, options", LAYOUTS)
def test_every_optimizer_equals_one_process(world, micro_batches, options):
    ranks = run_ranks(world, many, MODERN, OPTIMIZERS, micro_batches, options)
    assert_equal_to_one_process(ranks, OPTIMIZERS)


@pytest.mark.parametrize(
    "world, options",
    [
        (2, {}),
        (3, dict(reshard=False)),
        pytest.param(4, dict(shard=2), marks=pytest.mark.slow),
    ],
)
def test_a_tied_head_stays_one_parameter(world, options):
    ranks = run_ranks(world, many, GPT2, [SGD, Muon], 1, options)
    assert_equal_to_one_process(ranks, [SGD, Muon], tied=True)


@pytest.mark.parametrize(
    "arch, where",
    [
        pytest.param(MODERN, "disk", id="modern-disk"),
        pytest.param(GPT2, "cpu", id="gpt2-cpu", marks=pytest.mark.slow),
        pytest.param(MODERN, "cpu", id="modern-cpu", marks=pytest.mark.slow),
        pytest.param(GPT2, "disk", id="gpt2-disk", marks=pytest.mark.slow),
    ],
)
def test_offloaded_shards_train_the_same(where, arch, tmp_path):
    classes = [SGD, Muon] if arch is GPT2 else [AdamW, LAMB]
    ranks = run_ranks(3, many, arch, classes, 2, dict(offload_params=where, folder=tmp_path))
    assert_equal_to_one_process(ranks, classes, tied=arch is GPT2)


def storages(rank, world, folder):
    model, replicas = start(dist.group.WORLD, MODERN, offload_params="disk", folder=folder)
    optimizer = optimizer_of(AdamW, model, replicas)
    forward_backward(model, replicas, 0, rank, world, 1)
    optimizer.step()
    with torch.no_grad():
        shards = {name: p.to_local() for name, p in replicas.weights().items()}
    return {name: (x.untyped_storage().filename, x.clone()) for name, x in shards.items()}


def test_on_disk_the_file_is_the_weight(tmp_path):
    """Also for the rank whose shard is shorter than the others'."""
    for shards in run_ranks(3, storages, tmp_path):
        assert len({file for file, _ in shards.values()}) == len(shards)
        for file, shard in shards.values():
            flat = (
                torch.from_file(file, size=shard.numel(), dtype=shard.dtype)
                if shard.numel()
                else shard
            )
            assert Path(file).parent == tmp_path and torch.equal(flat.view(shard.shape), shard)


# ---- what is held, and what is sent --------------------------------------------------------------
def held(rank, world, options):
    model, replicas = start(dist.group.WORLD, MODERN, **options)
    whole = sum(p.numel() for p in replicas.weights().values())
    with torch.no_grad():
        here = sum(p.to_local().numel() for p in replicas.weights().values())
    optimizers = {cls: optimizer_of(cls, model, replicas) for cls in (AdamW, Muon)}
    optimizer = optimizers[Muon]  # the last one made
    assert replicas.shards.keys() == {"embed.weight", "head.weight"} - {
        n for n, p in replicas.weights().items() if not p.to_local().numel()
    }
    forward_backward(model, replicas, 0, rank, world, 1)
    optimizer.step()
    state = {}
    for group in optimizer.param_groups:
        for p, name in zip(group["params"], group["names"], strict=True):
            state |= {(name, key): x for key, x in optimizer.state[p].items() if torch.is_tensor(x)}
    return whole, here, state, dict(replicas.shards)


@pytest.mark.parametrize("world, options", [(3, {}), (4, dict(shard=2))])
def test_state_is_held_once_and_shards_put_it_together(world, options):
    model, replicas = start(None, MODERN)
    optimizer = optimizer_of(Muon, model, replicas)
    forward_backward(model, replicas, 0, 0, 1, 1)
    optimizer.step()
    names = {p: n for n, p in model.named_parameters()}
    expected = {
        (names[p], key): x
        for p, state in optimizer.state.items()
        for key, x in state.items()
        if torch.is_tensor(x)
    }
    ranks = run_ranks(world, held, options)
    shard = options.get("shard", world)
    for first in range(0, world, shard):  # each replica holds everything once
        found, seen = {k: torch.full_like(x, torch.nan) for k, x in expected.items()}, 0
        for whole, here, state, shards in ranks[first : first + shard]:
            assert here <= whole / shard * 1.3
            for (name, key), x in state.items():
                shape, offsets = shards.get(name, (tuple(x.shape), (0,) * x.ndim))
                assert shape == tuple(found[name, key].shape)
                at = tuple(slice(o, o + n) for o, n in zip(offsets, x.shape))
                assert found[name, key][at].isnan().all()
                found[name, key][at] = x
                seen += x.numel()
        assert seen == sum(x.numel() for x in expected.values())
        for k, x in expected.items():
            torch.testing.assert_close(found[k], x, rtol=1e-10, atol=1e-10)
        matrices = [
            sum(x.numel() for (_, key), x in r[2].items() if key == "momentum_buffer")
            for r in ranks
        ]
        assert max(matrices) - min(matrices) <= 32 * 8  # no more than one matrix apart


class Sent(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes by the formula of each collective."""

    def __enter__(self):
        self.bytes, self.calls = 0, []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("c10d::")
        if func.namespace == "c10d":
            group = next(
                a for a in args if "ProcessGroup" in str(getattr(a, "_type", lambda: "")())
            )
            n = dist.ProcessGroup.unbox(group).size()
            self.calls.append(name)
            if name == "broadcast_":
                # The mean over the ranks, each of which broadcasts its own part.
                self.bytes += args[0][0].nbytes * (n - 1) // n
            elif name == "_reduce_scatter_base_":
                self.bytes += args[1].nbytes * (n - 1) // n
            elif name == "allreduce_":
                self.bytes += 2 * args[0][0].nbytes * (n - 1) // n
        return func(*args, **(kwargs or {}))


def count(rank, world, options, micro_batches):
    model, replicas = start(dist.group.WORLD, dict(MODERN, vocab_size=16), **options)
    optimizer = optimizer_of(Muon, model, replicas)
    found = []
    for step in range(2):
        with Sent() as sent:
            for i in range(micro_batches):
                replicas.last_micro_batch(i == micro_batches - 1)
                tokens = batch(i, 2)
                model(tokens[:, :-1], tokens[:, 1:]).backward()
            replicas.finish_gradients()
        with Sent() as sent_by_step:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        found.append((sent.bytes, sent.calls, replicas.sent_bytes))
        assert sent_by_step.calls == ["alltoall_base_"] * (0 if replicas.shard_ranks == 1 else 2)
        # The next step must not find anything gathered already
        evaluate(model, replicas, optimizer)
    return found


@pytest.mark.parametrize(
    "world, options, gathers, reduces",
    [
        (2, {}, 1 + 2 * 2 * 3, 3),
        (2, dict(reshard=False), 3, 3),
        (4, dict(shard=2), 13, 3),
        (4, dict(shard=1), 0, 0),
    ],
)
def test_bytes_and_collectives_are_those_of_the_formula(world, options, gathers, reduces):
    for steps in run_ranks(world, count, options, 3):
        for sent, calls, said in steps:
            assert sent == said
            shard = options.get("shard", world)
            assert calls.count("broadcast_") == gathers * shard
            assert calls.count("_reduce_scatter_base_") == reduces
            assert calls.count("allreduce_") == 3 * ("shard" in options) + 1  # 1: the roll call


def looked_at(rank, world):
    model, replicas = start(dist.group.WORLD, MODERN, reshard=False)
    optimizer = optimizer_of(LAMB, model, replicas)
    evaluate(model, replicas, optimizer)
    assert all(hasattr(p, "placements") for p in model.parameters())
    forward_backward(model, replicas, 0, rank, world, 1)
    optimizer.step()
    before = evaluate(model, replicas, optimizer)
    with torch.no_grad():  # as a method's eval() might
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.mul_(0.5)
    assert evaluate(model, replicas, optimizer) == before
    replicas.broadcast_weights()
    assert evaluate(model, replicas, optimizer) != before
    replicas.last_micro_batch(False)  # leaves the weights gathered
    model(batch(0)[:, :-1], batch(0)[:, 1:]).backward()
    replicas.init_weights(lambda name, shape: initial_weight(GPTConfig(**MODERN), name, shape))
    after = evaluate(model, replicas, optimizer)
    replicas.broadcast_weights()  # the owners, too, have the new weights
    assert evaluate(model, replicas, optimizer) == after != before
    return after


def test_weights_filled_in_later_replace_all_copies():
    with torch.device("meta"):
        model = GPT(GPTConfig(**MODERN))
    replicas = FSDP(None, CPU)
    model = replicas.parallelize(model.to(torch.float64))
    replicas.init_weights(lambda name, shape: initial_weight(GPTConfig(**MODERN), name, shape))
    expected = evaluate(model, replicas, optimizer_of(SGD, model, replicas))
    for found in run_ranks(2, looked_at):
        assert found == pytest.approx(expected, abs=1e-10)


def read_from_checkpoint(rank, world, path):
    with torch.device("meta"):
        model = GPT(GPTConfig(**MODERN)).to(torch.float64)
    replicas = FSDP(dist.group.WORLD, CPU)
    model = replicas.parallelize(model)
    saved = load(path, verify=False)
    read, n_read = saved.fill, []

    def counted(out, *arguments):
        n_read.append(out.numel())
        read(out, *arguments)

    saved.fill = counted
    replicas.init_weights(sharded(saved.weights("model"), {}))
    held = sum(p.to_local().numel() for p in model.parameters())
    return held, sum(n_read), {name: p.full_tensor() for name, p in model.named_parameters()}


def test_a_rank_reads_only_its_rows_of_a_checkpoint(tmp_path):
    model = init_weights(GPT(GPTConfig(**MODERN)).to(torch.float64))
    path = save(tmp_path, 1, {"model": dict(model.named_parameters())})
    n_all = sum(p.numel() for p in model.parameters())
    ranks = run_ranks(4, read_from_checkpoint, path)
    assert sum(held for held, _, _ in ranks) == n_all
    for held, n_read, weights in ranks:
        assert n_read == held <= 0.26 * n_all
        assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def half_precision(rank, world, policy):
    found = []
    for options in ({}, policy):
        c = GPTConfig(**MODERN)
        with torch.device("meta"):
            model = GPT(c)
        replicas = FSDP(dist.group.WORLD, CPU, **options)
        model = replicas.parallelize(model)
        replicas.init_weights(lambda name, shape: initial_weight(c, name, shape) + 0.01)
        optimizer = optimizer_of(SGD, model, replicas)
        losses = []
        for step in range(3):
            losses.append(forward_backward(model, replicas, step, rank, world, 2)[0])
            assert all(g.dtype == torch.float32 for g in replicas.gradients().values())
            optimizer.step()
            model.zero_grad(set_to_none=True)
        found.append((losses, replicas.sent_bytes - len(replicas.params)))  # without the roll call
    return found


def test_gathering_and_reducing_in_bfloat16_halves_the_bytes():
    for (full, bytes_), (half, fewer) in run_ranks(
        2, half_precision, dict(param_dtype=torch.bfloat16)
    ):
        assert half == pytest.approx(full, rel=0.02) and half != full and fewer * 2 == bytes_
    for (_, bytes_), (_, fewer) in run_ranks(2, half_precision, dict(reduce_dtype=torch.bfloat16)):
        assert bytes_ / 2 < fewer < bytes_


def refused(rank, world):
    with pytest.raises(
        ValueError, match="shard=2 does not divide the 3 data-parallel ranks; take 1, 3"
    ):
        FSDP(dist.group.WORLD, CPU, shard=2)
    with pytest.raises(ValueError, match="needs a folder"):
        FSDP(dist.group.WORLD, CPU, offload_params="disk")
    with pytest.raises(ValueError, match="take cpu, disk or none"):
        FSDP(dist.group.WORLD, CPU, offload_params="tape")
    with pytest.raises(ValueError, match="two or more replicas"):
        FSDP(None, CPU, offload_params="cpu")


def test_what_cannot_be_is_refused():
    run_ranks(3, refused)


def test_one_process_needs_no_process_group():
    model, replicas = start(None, MODERN)
    assert not dist.is_initialized() and replicas.is_primary and replicas.shards == {}
    assert replicas.weights() == dict(model.named_parameters()) and replicas.sent_bytes == 0
    assert not any(hasattr(p, "placements") for p in model.parameters())


def by_broadcasts(rank, world, shard):
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

    found = []
    for plain in (False, True):
        model, replicas = start(dist.group.WORLD, MODERN, shard=shard)
        for shards in replicas.shard_groups:
            assert isinstance(shards._all_gather_comm, Broadcasts)
            if plain:
                shards._all_gather_comm = DefaultAllGather()
        loss, _ = forward_backward(model, replicas, 0, rank, world, 2)
        found.append((loss, [g.clone() for g in replicas.gradients().values()]))
    (loss, gradients), (plain_loss, plain_gradients) = found
    assert loss == plain_loss
    return all(map(torch.equal, gradients, plain_gradients))


@pytest.mark.parametrize("world, shard", [(3, None), (4, 2)])
def test_on_gloo_shards_are_gathered_by_broadcasts_of_the_same_bits(world, shard):
    assert run_ranks(world, by_broadcasts, shard) == [True] * world
