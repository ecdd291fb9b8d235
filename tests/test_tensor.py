"""Tensor parallelism against the whole model, in float64; what is sent; who is refused."""

from fractions import Fraction

import pytest
import torch
import torch._dynamo  # noqa: F401  (once here, not in every forked rank)
import torch.distributed as dist
import torch.distributed.tensor.parallel  # noqa: F401
import torch.nn.functional as F
from harness import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from layers.generation import generate
from memory.meter import Meter
from model import GPT, GPTConfig, key
from parallel import tensor
from parallel.ddp import DDP
from parallel.mesh import make_mesh
from parallel.replicas import allocate
from parallel.shard import Shard, sharded
from parallel.tensor import loss_fn
from settings import fields

CPU = torch.device("cpu")
MODERN = dict(n_layer=2, n_head=4, n_kv_head=4, n_embd=16, block_size=8, vocab_size=32, dropout=0.2)
GPT2 = MODERN | dict(
    norm="layernorm",
    activation="gelu",
    position="learned",
    qk_norm=False,
    tied=True,
    bias=True,
    init="gpt2",
    logit_cap=None,
)
GQA = MODERN | dict(n_head=8, n_kv_head=4, n_embd=32, mup_base_width=16)
TRACK3 = MODERN | fields.ARCHS["track3"]
LLAMA = MODERN | fields.ARCHS["llama"] | dict(qkv_bias=True, rope_scaling="llama3:4:1:4:16")
QWEN3 = MODERN | fields.ARCHS["qwen3"] | dict(n_head=8, head_dim=6, mlp_width=24)
SHAPES = (MODERN, GPT2, GQA, TRACK3, LLAMA, QWEN3)


def build(shape, layers=None, dtype=torch.float64):
    with torch.device("meta"):
        return GPT(GPTConfig(**shape), layers).to(dtype)


def numbers(name, shape):
    """A whole parameter: random everywhere, so that no bias and no gain is special."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(key(0, name))) * 0.3


@torch.no_grad()
def fill(model, source=numbers):
    for name, p in allocate(model, CPU).named_parameters():
        p.copy_(source(name, tuple(p.shape)))
    return model


def ready(split, group, shape, layers=None, dtype=torch.float64):
    model = build(shape, layers, dtype)
    tp_shards = split(model, group)
    return fill(model, sharded(numbers, tp_shards)), tp_shards


def tokens(shape, rows=3):
    ids = torch.randint(
        shape["vocab_size"],
        (rows, shape["block_size"] + 1),
        generator=torch.Generator().manual_seed(1),
    )
    return ids[:, :-1], ids[:, 1:], torch.arange(rows) + 5


def add_gradients(into, model):
    for name, p in model.named_parameters():
        if p.grad is not None:
            into[name] = into[name] + p.grad if name in into else p.grad
    return into


def train(split, group, shape, way):
    """Loss, gradients by name, shards: of the whole model, with recomputed blocks, or as two
    stages."""
    x, targets, rows = tokens(shape)
    place = torch.arange(shape["block_size"]).flip(0)  # as a cut by context may have it: not 0..T-1
    if way == "two stages":
        (first, tp_shards), (second, more) = (ready(split, group, shape, [i]) for i in (0, 1))
        hidden = first(x, position_ids=place, sample_ids=rows)
        received = hidden.detach().requires_grad_()
        loss = second(received, targets, position_ids=place, sample_ids=rows)
        loss.backward()
        hidden.backward(received.grad)
        share = 1 if group is None or split is tensor.split else group.size()
        assert hidden.shape == (len(x), x.shape[1] // share, shape["n_embd"])
        return loss.item(), add_gradients(add_gradients({}, first), second), tp_shards | more
    model, tp_shards = ready(split, group, shape)
    if way == "recomputed":
        for block in model.blocks.values():
            block.forward = lambda *a, f=block.forward: checkpoint(f, *a, use_reentrant=False)
    loss = model(x, targets, position_ids=place, sample_ids=rows)
    loss.backward()
    return loss.item(), add_gradients({}, model), tp_shards


def several(rank, world, split, shapes):
    return [train(split, dist.group.WORLD, shape, way) for shape, way in shapes]


def unsharded(parts, name, shards):
    """A parameter's gradient from those of the ranks; where it is not cut, all must hold the
    same."""
    if name in shards:
        sizes = zip(parts[0][name].shape, shards[name][0])
        [dim] = [dim for dim, (here, full) in enumerate(sizes) if here != full]
        return torch.cat([p[name] for p in parts], dim)
    for p in parts[1:]:
        torch.testing.assert_close(p[name], parts[0][name], rtol=1e-12, atol=1e-12)
    return parts[0][name]


def check_gradients(world, split, tolerance=1e-10):
    cases = [(shape, "whole") for shape in SHAPES]
    cases += [(MODERN, "two stages"), (GPT2, "two stages"), (GPT2, "recomputed")]
    results = run_ranks(world, several, split, cases)
    for i, (shape, way) in enumerate(cases):
        loss, grads, none = train(split, None, shape, "whole")
        assert none == {} and len(grads) == len(list(build(shape).named_parameters()))
        for r in results:
            assert abs(r[i][0] - loss) <= tolerance * loss, (shape, way)
            assert r[i][1].keys() == grads.keys()
        for name, grad in grads.items():
            # All scores of a query move together
            zero = name.endswith("attn.k.bias") and shape is GPT2
            assert zero or grad.abs().max() > 1e-3, name
            found = unsharded([r[i][1] for r in results], name, results[0][i][2])
            torch.testing.assert_close(found, grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("world", (2, 4))
def test_loss_and_every_gradient_are_the_whole_models(world):
    check_gradients(world, tensor.split)


def evaluate(rank, world, split, shapes):
    """In eval mode: loss, hits, logits, greedy and drawn tokens."""
    found = []
    for shape in shapes:
        model, _ = ready(split, dist.group.WORLD if world > 1 else None, shape)
        model.eval()
        x, targets, _ = tokens(shape)
        with torch.no_grad():
            loss, logits = model(x, targets).item(), model(x)
        drawn = [
            generate(model, x[:2, :3], 7, t, top_k=k, seed=3) for t, k in ((0, None), (1.0, 20))
        ]
        model(x, targets)
        found.append((loss, model.n_correct.item(), model.n_correct.shape, logits, *drawn))
    return found


def check_evaluation(split, world=2):
    alone = evaluate(0, 1, split, SHAPES)
    for result in run_ranks(world, evaluate, split, SHAPES):
        for found, expected in zip(result, alone):
            torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
            assert found[1:3] == expected[1:3] and found[2] == ()
            torch.testing.assert_close(found[3], expected[3], rtol=1e-12, atol=1e-12)
            assert torch.equal(found[4], expected[4]) and torch.equal(found[5], expected[5])


def test_evaluation_and_generation_are_the_whole_models():
    check_evaluation(tensor.split)


# ---- the loss ------------------------------------------------------------------------------------
def logits_and_targets(kind, words=32, rows=2500):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, rows // 5, words, dtype=torch.float64, generator=generator)
    targets = torch.randint(words, (5, rows // 5), generator=generator)
    if kind == "ties":
        return logits.mul(1.5).round(), targets
    if kind == "equal":
        return torch.zeros_like(logits), targets
    if kind == "large":
        return logits * 1e4, targets
    return logits, targets.masked_fill(targets == 3, -100)  # what F.cross_entropy passes over


def losses(rank, world, kinds):
    found = []
    for kind in kinds:
        logits, targets = logits_and_targets(kind)
        mine = logits.chunk(world, -1)[rank].clone().requires_grad_()
        loss, hits = loss_fn(mine, targets, True, dist.group.WORLD)
        (loss * 3).backward()
        assert loss_fn(mine, targets, False, dist.group.WORLD)[1] is None
        again = mine.detach().clone().requires_grad_()
        both, nothing = loss_fn(again, None, True, dist.group.WORLD)
        both.square().sum().backward()
        assert nothing is None
        found.append((loss.detach(), hits, mine.grad, both.detach(), again.grad))
    return found


@pytest.mark.parametrize("world", (2, 4))
def test_loss_hits_and_logits_are_those_of_all_words(world):
    kinds = ("ties", "equal", "large", "passed over")
    results = run_ranks(world, losses, kinds)
    for i, kind in enumerate(kinds):
        logits, targets = logits_and_targets(kind)
        logits.requires_grad_()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        (loss * 3).backward()
        for r in results:
            torch.testing.assert_close(r[i][0], loss.detach(), rtol=1e-12, atol=0)
            assert r[i][1] == (logits.argmax(-1) == targets).sum() and r[i][1].shape == ()
            assert torch.equal(r[i][3], logits.detach())
        grads, through = (torch.cat([r[i][j] for r in results], -1) for j in (2, 4))
        torch.testing.assert_close(grads, logits.grad, rtol=1e-12, atol=1e-12)
        assert torch.equal(through, 2 * logits.detach())


def loss_memory(rank, world):
    logits = torch.randn(8, 1024, 64, requires_grad=True)
    targets = torch.zeros(8, 1024, dtype=torch.int64)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with Meter() as meter, hooks:
        meter.watch([logits, targets])
        before = meter.now()
        loss, _ = loss_fn(logits, targets, False, dist.group.WORLD)
        forward = meter.peak - before
        large = {x.untyped_storage().data_ptr() for x in kept if x.nbytes >= logits.nbytes}
        kept.clear()
        meter.reset()
        loss.backward()
        backward = meter.peak - before
    return (
        forward / logits.nbytes,
        large == {logits.untyped_storage().data_ptr()},
        backward / logits.nbytes,
    )


def test_the_loss_makes_no_copy_of_the_logits_in_forward():
    for forward, same, backward in run_ranks(2, loss_memory):
        assert same and forward < 0.4 and backward < 1.4


# ---- bytes ---------------------------------------------------------------------------------------
class Sent(TorchDispatchMode):
    """Bytes sent by this rank, by the formula of each collective on a ring."""

    def __init__(self, n):
        super().__init__()
        self.n, self.ops = (
            n,
            {name: [0, 0] for name in ("allreduce_", "all_gather", "reduce_scatter")},
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, n = func(*args, **(kwargs or {})), self.n
        if func.namespace == "c10d":
            names = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}
            name = func.name().split("::")[1]
            name = names.get(name, name)
            x = args[1] if name == "all_gather" else args[0]  # the smaller of its two tensors
            times = n - 1 if isinstance(x, torch.Tensor) else Fraction(2 * (n - 1), n)
            self.ops[name][0] += 1
            self.ops[name][1] += times * (x if isinstance(x, torch.Tensor) else x[0]).nbytes
        return out

    def total(self):
        return sum(bytes_ for _, bytes_ in self.ops.values())


def sent(rank, world, split, shape, dtype, layers, autocast):
    """What a rank sends in training, in evaluation, and for logits; the ops of training."""
    model, _ = ready(split, dist.group.WORLD, shape, layers, dtype)
    x, targets, rows = tokens(shape)
    place, found = torch.arange(shape["block_size"]), []
    if layers is not None and 0 not in layers:
        x = torch.randn(*x.shape, shape["n_embd"], dtype=dtype).requires_grad_()
        x = (
            x.detach()
            .narrow(1, 0, x.shape[1] // (1 if split is tensor.split else world))
            .requires_grad_()
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Sent(world) as counter:
            model(x, targets, position_ids=place, sample_ids=rows).sum().backward()
        found += [counter.total(), counter.ops]
        model.eval()
        if model.head is not None and x.ndim == 2:
            for t in (targets, None):
                with Sent(world) as counter, torch.no_grad():
                    model(x, t)
                found.append(counter.total())
    return found


def activation(shape, itemsize, world, rows=3):
    return Fraction((world - 1) * rows * shape["block_size"] * shape["n_embd"] * itemsize, world)


@pytest.mark.parametrize("world", (2, 4))
def test_bytes_sent_are_the_formula(world):
    layers, words, count = MODERN["n_layer"], MODERN["vocab_size"], 3 * MODERN["block_size"]
    a, w, share = activation(MODERN, 8, world), 8, Fraction(world - 1, world)
    loss = 2 * share * 3 * count * w
    results = run_ranks(world, sent, tensor.split, MODERN, torch.float64, None, False)
    for total, ops, evaluation, logits in results:
        assert total == 2 * (2 * layers + 1) * 2 * a + loss
        assert ops["allreduce_"][0] == 2 * (2 * layers + 1) + 2 and ops["all_gather"][0] == 0
        assert evaluation == (2 * layers + 1) * 2 * a + loss + 2 * share * count * (w + 8)
        assert logits == (2 * layers + 1) * 2 * a + 2 * share * count * words * w


def test_bytes_of_a_stage_and_under_autocast():
    [(total, _), _] = run_ranks(2, sent, tensor.split, GPT2, torch.float64, [0], False)
    a = activation(GPT2, 8, 2)
    # Forward with the embedding, backward without a head
    assert total == (2 + 1) * 2 * a + 2 * 2 * a
    [(total, _), _] = run_ranks(2, sent, tensor.split, GPT2, torch.float64, [1], False)
    assert total == 2 * 2 * a + (2 + 1) * 2 * a + 3 * 3 * 8 * 8
    [(total, *_), _] = run_ranks(2, sent, tensor.split, MODERN, torch.float32, None, True)
    half = activation(MODERN, 2, 2)
    assert total == (4 + 5) * 2 * half + 2 * activation(MODERN, 4, 2) + 3 * 3 * 8 * 4


# ---- parameters ----------------------------------------------------------------------------------
def holdings(rank, world):
    """A model that holds data, cut; the same made on the meta device and filled."""
    model = fill(build(GPT2))
    model.blocks["1"].mlp.fc.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    tp_shards = tensor.split(model, dist.group.WORLD)
    after = dict(model.named_parameters())
    assert all(after[name] is p and type(p) is nn.Parameter for name, p in before.items())
    assert (
        model.head.weight is model.embed.weight
        and not after["blocks.1.mlp.fc.weight"].requires_grad
    )
    # The rest is given back
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in after.values())
    fc, proj = model.blocks["0"].mlp.fc, model.blocks["0"].mlp.proj
    assert (fc.in_features, fc.out_features, proj.in_features, proj.out_features) == (
        16,
        32,
        32,
        16,
    )
    assert (model.head.out_features, model.embed.num_embeddings) == (16, 16)
    filled, _ = ready(tensor.split, dist.group.WORLD, GPT2)
    for name, p in filled.named_parameters():
        assert torch.equal(p, after[name])
        source = sharded(numbers, tp_shards)
        size = tp_shards[name][0] if name in tp_shards else tuple(p.shape)
        assert torch.equal(source(name, size), numbers(name, size))  # asked for the whole
    return {name: p.detach() for name, p in after.items()}, tp_shards


def test_each_rank_keeps_its_part():
    results = run_ranks(2, holdings)
    tp_shards = results[0][1]
    split_ones = {
        n
        for i in (0, 1)
        for m in ("attn.q", "attn.k", "attn.v", "mlp.fc")
        for n in (f"blocks.{i}.{m}.weight", f"blocks.{i}.{m}.bias")
    }
    split_ones |= {f"blocks.{i}.{m}.proj.weight" for i in (0, 1) for m in ("attn", "mlp")} | {
        "embed.weight"
    }
    assert tp_shards.keys() == split_ones
    assert tp_shards["blocks.0.attn.proj.weight"] == Shard((16, 16), (0, 0))
    assert results[1][1]["blocks.0.mlp.fc.bias"] == Shard((64,), (32,))
    assert results[1][1]["blocks.0.mlp.proj.weight"] == Shard((16, 64), (0, 32))
    assert results[1][1]["embed.weight"] == Shard((32, 16), (16, 0))
    for name, p in fill(build(GPT2)).named_parameters():
        assert torch.equal(unsharded([r[0] for r in results], name, tp_shards), p)


def test_one_rank_changes_nothing():
    model = build(MODERN)
    before = {name: (p, p.shape) for name, p in model.named_parameters()}
    forwards, out = [m.forward for m in model.modules()], model.loss_fn
    assert tensor.split(model, None) == {} and model.loss_fn is out
    assert {name: (p, p.shape) for name, p in model.named_parameters()} == before
    assert forwards == [m.forward for m in model.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert sharded(numbers, {})("embed.weight", (3, 2)).shape == (3, 2)


def refused(rank, world, split, cases):
    said = []
    for change, options, _ in cases:
        model = build(MODERN | change)
        before = [p.shape for p in model.parameters()]
        try:
            split(model, dist.group.WORLD, **options)
            said.append("")
        except ValueError as error:
            assert before == [p.shape for p in model.parameters()]  # nothing is half done
            said.append(str(error))
    return said


THREE = dict(n_head=3, n_kv_head=3)
REFUSALS = {
    4: [
        (
            dict(n_head=2, n_kv_head=2),
            {},
            "--tp=4 does not divide the 2 heads of blocks.0.attn.q; type --n_head=4 or --tp=2",
        ),
        (dict(n_kv_head=2), {}, "the 2 heads of blocks.0.attn.k; type --n_kv_head=4 or --tp=2"),
        ({}, dict(column=("up",), row=("down",), vocabulary=()), "no module's name"),
    ],
    3: [
        (
            dict(n_embd=30) | THREE,
            {},
            "--tp=3 does not divide the 32 words of the vocabulary; type --vocab_size=33 or --tp=2",
        ),
        (
            {},
            dict(column=("mlp.fc",), row=("mlp.proj",), vocabulary=()),
            "--tp=3 does not divide the width 64 of blocks.0.mlp.fc; type --mlp_width=66 or --tp=2",
        ),
        (dict(n_embd=24, vocab_size=33) | THREE, {}, ""),
    ],
}


@pytest.mark.parametrize("world", (4, 3))
def test_what_cannot_be_cut_is_refused_by_name(world):
    for said in run_ranks(world, refused, tensor.split, REFUSALS[world]):
        for found, (_, _, message) in zip(said, REFUSALS[world]):
            assert message in found and bool(message) == bool(found)


# ---- beside others -------------------------------------------------------------------------------
def late_product(rank, world):
    model, _ = ready(tensor.split, dist.group.WORLD, GPT2)
    called = []
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            m.matmul = lambda x, w, b, name=name: (
                called.append((name, b is None)) or F.linear(x, w, b)
            )
    model(*tokens(GPT2)[:2], sample_ids=tokens(GPT2)[2])
    return called


def test_products_can_be_replaced_after_the_cut():
    for called in run_ranks(2, late_product):
        assert len(called) == 2 * 6 + 1
        assert all(no_bias == (name.endswith("proj") or name == "head") for name, no_bias in called)


class Gated(nn.Module):
    """Somebody else's: three plain Linear layers under other names."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def gated(rank, world, how):
    model = fill(nn.Sequential(Gated(), Gated()).double())
    x = torch.randn(
        2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    ).requires_grad_()
    if how == "ours":
        tensor.split(model, dist.group.WORLD, column=("gate", "up"), row=("down",), vocabulary=())
    if how == "torch":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        plan = {"*.gate": ColwiseParallel(), "*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
        parallelize_module(model, DeviceMesh.from_group(dist.group.WORLD, "cpu"), plan)
    y = model(x)
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    return y.detach(), x.grad, [g.to_local() if how == "torch" else g for g in grads]


def test_another_model_is_cut_as_torch_cuts_it():
    alone = gated(0, 1, "alone")
    for ours, theirs in zip(run_ranks(2, gated, "ours"), run_ranks(2, gated, "torch")):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours[:2], alone[:2], rtol=1e-10, atol=1e-10)


def with_replicas(rank, world, split):
    mesh = make_mesh(CPU, tp=2)
    model = build(GPT2)
    tp_shards = split(model, mesh.groups["tp"])
    replicas = DDP(mesh.groups["dp"], CPU)
    replicas.parallelize(model)
    replicas.init_weights(sharded(numbers, tp_shards))
    x, targets, rows = (t[mesh.coords["dp"] :: 2] for t in tokens(GPT2, rows=4))
    loss = model(x, targets, sample_ids=rows)
    loss.backward()
    replicas.finish_gradients()
    return mesh.coords, loss.item(), {n: p.grad for n, p in model.named_parameters()}, tp_shards


def check_replicas(split):
    model = fill(build(GPT2))
    x, targets, rows = tokens(GPT2, rows=4)
    loss = model(x, targets, sample_ids=rows)
    loss.backward()
    results = run_ranks(4, with_replicas, split)
    assert abs(sum(r[1] for r in results) / 2 - loss.item()) < 1e-10
    for dp in (0, 1):
        tp = [r for r in results if r[0]["dp"] == dp]
        for name, p in model.named_parameters():
            found = unsharded([r[2] for r in tp], name, tp[0][3])
            torch.testing.assert_close(found, p.grad, rtol=1e-10, atol=1e-10)


def test_ddp_over_it_is_one_process():
    check_replicas(tensor.split)


def lower(rank, world, split):
    found = []
    for shape in (MODERN, GPT2):
        model, _ = ready(split, dist.group.WORLD if world > 1 else None, shape, dtype=torch.float32)
        x, targets, rows = tokens(shape)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, targets, sample_ids=rows)
        loss.backward()
        whole_ones = ("norm.weight", "positions.weight", "proj.bias")
        grads = [p.grad for n, p in model.named_parameters() if n.endswith(whole_ones)]
        found += [loss.item(), torch.nn.utils.get_total_norm(grads).item()]
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    return torch.tensor(found)


def check_autocast(split):
    alone = lower(0, 1, split)
    for found in run_ranks(2, lower, split):
        torch.testing.assert_close(found, alone, rtol=0.02, atol=1e-6)


def test_under_autocast_it_is_near():
    check_autocast(tensor.split)
