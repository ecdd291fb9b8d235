"""Ring attention and Ulysses against attention on one process, in float64; what they keep, send,
compute."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import layers.recompute
from layers.attention import causal_attention
from layers.generation import generate
from memory.meter import Meter
from model import GPT, GPTConfig, key
from parallel import context
from parallel.context import position_ids, split
from parallel.mesh import make_mesh

CPU = torch.device("cpu")
MODERN = dict(
    n_layer=2, n_head=4, n_kv_head=4, n_embd=16, block_size=24, vocab_size=32, zero_init=False
)
GPT2 = MODERN | dict(
    norm="layernorm",
    activation="gelu",
    position="learned",
    qk_norm=False,
    tied=True,
    bias=True,
    init="gpt2",
    logit_cap=None,
    dropout=0.2,
)
GQA_MUP = MODERN | dict(n_head=8, n_kv_head=4, n_embd=32, mup_base_width=16, dropout=0.2)


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """Dispatch modes and checkpoints import it: once here, not in each rank."""
    import torch._dynamo  # noqa: F401


def core(way, group, plain=causal_attention):
    """What `split` puts in place of a module's `plain` core."""
    module = torch.nn.Module()
    module.attention_fn, module.head_size = plain, 1
    module.q = module.k = torch.nn.Linear(1, 12)
    split(module, group, way)
    return module.attention_fn


def qkv(heads, kv_heads, T=24, D=8, dtype=torch.float64, seed=0):
    """q, k, v and a gradient, laid out as the projections leave them: (B, T, H, D) in memory."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (
        torch.randn(2, T, h, D, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads, heads)
    )
    return [x.to(dtype).transpose(1, 2) for x in numbers]


def with_gradients(attention, q, k, v, dout):
    """out, dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))]


def furthest(xs, ys):
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(xs, ys, strict=True))


# ---- it is attention -----------------------------------------------------------------------------
def attend(rank, n, way, heads):
    results = []
    for H, Hkv in heads:
        tensors = qkv(H, Hkv)
        whole, at = with_gradients(causal_attention, *tensors), position_ids(24, n, rank, way)
        mine = [x[:, :, at] for x in tensors]
        parts = with_gradients(core(way, dist.group.WORLD), *mine)
        again = with_gradients(core(way, dist.group.WORLD), *mine)
        assert all(torch.equal(a, b) for a, b in zip(parts, again))  # to the bit
        results.append(furthest([x[:, :, at] for x in whole], parts))
        # The gradient of a plain sum
        mine[3] = torch.ones((), dtype=torch.float64).expand(mine[3].shape)
        whole = with_gradients(causal_attention, *tensors[:3], torch.ones_like(tensors[3]))
        parts = with_gradients(core(way, dist.group.WORLD), *mine)
        results.append(furthest([x[:, :, at] for x in whole], parts))
    return results


@pytest.mark.parametrize("n", (2, 3, 4))
def test_ring_attention_is_attention(n):
    assert max(map(max, run_ranks(n, attend, "ring", [(4, 4), (6, 2), (5, 1)]))) < 1e-12


@pytest.mark.parametrize("n", (2, 3, 4))
def test_ulysses_is_attention(n):
    assert max(map(max, run_ranks(n, attend, "ulysses", [(12, 12), (24, 12), (4 * n, n)]))) < 1e-12


def attend_in_a_mesh(rank, world):
    mesh, tensors, results = make_mesh(CPU, tp=2, cp=2), qkv(4, 2, seed=rank % 2), []
    for way in ("ring", "ulysses"):  # the group's ranks are 0 and 2, or 1 and 3
        at = position_ids(24, 2, mesh.coords["cp"], way)
        parts = with_gradients(core(way, mesh.groups["cp"]), *(x[:, :, at] for x in tensors))
        results.append(
            furthest([x[:, :, at] for x in with_gradients(causal_attention, *tensors)], parts)
        )
    return results


def test_it_stays_in_its_group():
    assert max(map(max, run_ranks(4, attend_in_a_mesh))) < 1e-12


def attend_roughly(rank, n):
    """Errors of out, dq, dk, dv against float64: one process's, ring's, Ulysses's, and of both
    together."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16, "autocast"):
        half = dtype != torch.float32
        inputs = [x.to(torch.bfloat16 if half else dtype) for x in qkv(8, 4, T=64, D=16)]
        truth = with_gradients(causal_attention, *(x.double() for x in inputs))
        inputs = [x.float() for x in inputs] if dtype == "autocast" else inputs
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            row = [with_gradients(causal_attention, *inputs)]
            for way in ("ring", "ulysses"):
                at = position_ids(64, n, rank, way)
                parts = with_gradients(core(way, dist.group.WORLD), *(x[:, :, at] for x in inputs))
                assert [x.dtype for x in parts] == [x.dtype for x in row[0]]
                row.append(
                    [x.new_zeros(y.shape).index_copy(2, at, x) for x, y in zip(parts, truth)]
                )
        for parts in row[1:]:
            for x in parts:
                dist.all_reduce(x)
        rows.append(
            [[(x.double() - y).norm().item() for x, y in zip(parts, truth)] for parts in row]
        )
    return rows


def test_float32_bf16_and_autocast_round_no_more_than_one_process():
    for alone, ring, ulysses in run_ranks(4, attend_roughly)[0]:
        assert all(0 < r < 1.3 * a for r, a in zip(ring, alone)), (ring, alone)
        assert all(u < 1.01 * a for u, a in zip(ulysses, alone)), (ulysses, alone)


# ---- in the model --------------------------------------------------------------------------------
def build(shape):
    """Every parameter random, so that no bias and no gain is special."""
    model = GPT(GPTConfig(**shape)).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(key(0, name))) * 0.3
            )
    return model


def step(model, at, checkpointed=False, autocast=False):
    """The loss of the tokens at these places, the gradients, the hits."""
    T = model.config.block_size
    ids = torch.randint(32, (3, T + 1), generator=torch.Generator().manual_seed(1))
    if checkpointed:
        for b in model.blocks.values():
            b.forward = lambda *a, f=b.forward: checkpoint(f, *a, use_reentrant=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(
            ids[:, :-1][:, at],
            ids[:, 1:][:, at],
            position_ids=at,
            sample_ids=torch.tensor([7, 1, 2]),
        )
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        model.eval()(ids[:, :-1][:, at], ids[:, 1:][:, at], position_ids=at)
    return {"loss": loss.detach(), "hits": model.n_correct.double()} | gradients


def model_run(rank, n, runs):
    results = []
    for shape, way, options in runs:
        model, oracle = build(shape), step(build(shape), torch.arange(24))
        before = generate(model.eval(), torch.arange(3).view(1, 3), 8)
        split(model.train(), dist.group.WORLD, way)
        mine = step(model, position_ids(24, n, rank, way), **options)
        for x in mine.values():
            dist.all_reduce(x)
        # Gpt2's k.bias has gradient 0
        scale = {name: 1 + x.norm().item() for name, x in oracle.items()}
        results.append(
            {name: furthest([mine[name]], [x]) / scale[name] for name, x in oracle.items()}
        )
        # By itself
        assert rank or torch.equal(generate(model, torch.arange(3).view(1, 3), 8), before)
    return results


@pytest.mark.parametrize("n", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_the_model_on_parts_of_the_sequence_is_the_model(n):
    runs = [(shape, way, {}) for shape in (MODERN, GPT2, GQA_MUP) for way in ("ring", "ulysses")]
    runs += [(GQA_MUP, way, {"checkpointed": True}) for way in ("ring", "ulysses")]
    for result in run_ranks(n, model_run, runs):
        for errors in result:
            assert len(errors) > 10 and max(errors.values()) < 1e-10, errors


def bf16_run(rank, n):
    """Losses, and distances from the float64 gradients relative to their norm: of one process, both
    ways."""

    def distance(found):
        pairs = [(found[name], x) for name, x in truth.items() if name not in ("loss", "hits")]
        return (
            sum((x - y).norm() ** 2 for x, y in pairs).sqrt()
            / sum(y.norm() ** 2 for _, y in pairs).sqrt()
        )

    truth, results = step(build(MODERN), torch.arange(24)), []
    for way in (None, "ring", "ulysses"):
        model = build(MODERN).float()
        at = position_ids(24, n, rank, way) if way else torch.arange(24)
        split(model, dist.group.WORLD if way else None, way or "ring")
        mine = step(model, at, autocast=True)
        for x in mine.values() if way else ():
            dist.all_reduce(x)
        results.append((mine["loss"].item(), distance(mine).item()))
    return results


def test_bf16_autocast_trains_the_model_as_well_on_parts():
    (loss, alone), *both = run_ranks(2, bf16_run)[0]
    for mine, distance in both:
        # Chance: 0.7 to 1.4
        assert mine == pytest.approx(loss, rel=5e-3) and 0 < distance < 2 * alone < 0.1


# ---- what it keeps, sends, computes --------------------------------------------------------------
def kept(rank, n, T=256):
    """For both ways: bytes of the storages saved for backward; the most alive beside inputs and
    dout."""
    results = []
    for way in ("ring", "ulysses"):
        at = position_ids(T, n, rank, way)
        q, k, v, dout = (
            x[:, :, at].contiguous() for x in qkv(4, 4, T=T, D=32, dtype=torch.float32)
        )
        storages, attention = {}, core(way, dist.group.WORLD if n > 1 else None)

        def save(x):
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        q, k, v = (x.requires_grad_() for x in (q, k, v))
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            y = attention(q, k, v)  # held here, or an address might come twice
        with Meter() as meter:
            meter.watch((q, k, v, dout))
            before = meter.now()
            attention(q, k, v).backward(dout)
        assert y.shape == q.shape
        results.append((sum(storages.values()), meter.peak - before))
    return results


def test_what_attention_keeps_for_backward_falls_as_one_over_n():
    alone = run_ranks(1, kept)[0]
    for n in (2, 4):
        for rank in run_ranks(n, kept):
            for (saved, peak), (whole, whole_peak) in zip(rank, alone):
                print(
                    f"n={n}: saved {saved} of {whole}, {saved / whole:.3f}; peak"
                    f" {peak / whole_peak:.3f}"
                )
                assert saved == pytest.approx(whole / n, rel=0.01)
                assert peak < 4 * whole_peak / n  # with the blocks under way and their gradients


def peak_of_a_step(rank, n, shape, least):
    """For both ways: the most bytes alive in a step of the model, beside weights and their
    gradients.

    least: the size from which on norms and activations are computed again.
    """
    results = []
    layers.recompute.LEAST = least  # in this process alone
    for way in ("ring", "ulysses"):
        model, at = build(shape), position_ids(shape["block_size"], n, rank, way)
        split(model, dist.group.WORLD if n > 1 else None, way)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with Meter() as meter:
            meter.watch([(p, p.grad) for p in model.parameters()])
            before = meter.now()
            step(model, at)
        results.append(meter.peak - before)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("least", [2**40, 0])
def test_the_peak_of_a_step_falls_as_one_over_n(least):
    """Ulysses keeps what has travelled, which one process computes again: q, k and out."""
    shape = MODERN | dict(n_layer=5, n_embd=32, block_size=64)
    alone = run_ranks(1, peak_of_a_step, shape, least)[0]
    for n in (2, 4):
        x = 3 * (64 // n) * 32 * 8  # bytes of a rank's activations at one place
        for ring, ulysses in run_ranks(n, peak_of_a_step, shape, least):
            assert ring == pytest.approx(alone[0] / n, rel=0.1)
            more = 3 * 5 * x if least == 0 else 0
            assert ulysses == pytest.approx(alone[1] / n + more, rel=0.1)


class Sent(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1]
        if func.namespace == "c10d":
            assert name in ("send", "recv_", "alltoall_base_"), name
            n = dist.get_world_size()
            self.bytes += sum(x.nbytes for x in args[0]) if name == "send" else 0
            self.bytes += args[1].nbytes * (n - 1) // n if name == "alltoall_base_" else 0
        return func(*args, **(kwargs or {}))


def count_bytes(rank, n, cases):
    results = []
    for way, H, Hkv, dtype in cases:
        q, k, v, dout = (x[:, :, position_ids(24, n, rank, way)] for x in qkv(H, Hkv, dtype=dtype))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        with Sent() as forward:
            out = core(way, dist.group.WORLD)(q, k, v)
        with Sent() as backward:
            out.backward(dout)
        kv, qo = k.nbytes + v.nbytes, q.nbytes + out.nbytes
        kv32 = max(kv, 4 * (k.numel() + v.numel()))
        told = (
            [(n - 1) * kv, (n - 1) * (kv + kv32)]
            if way == "ring"
            else [(n - 1) * (kv + qo) // n] * 2
        )
        results.append(([forward.bytes, backward.bytes], told))
    return results


@pytest.mark.parametrize("n", (2, 3, 4))
def test_the_bytes_sent_are_those_of_the_docstring(n):
    cases = [
        ("ring", 6, 2, torch.float64),
        ("ring", 4, 4, torch.float32),
        ("ring", 4, 4, torch.bfloat16),
        ("ulysses", 24, 12, torch.float64),
        ("ulysses", 12, 12, torch.bfloat16),
    ]
    for results in run_ranks(n, count_bytes, cases):
        for sent, told in results:
            assert sent == told and min(sent) > 0


def work(rank, n):
    """In the order they happen: the scores computed, `None` where messages start."""
    events, block, backward, batch = (
        [],
        context.block,
        context.block_backward,
        dist.batch_isend_irecv,
    )

    def scores(q, k, causal):
        t, s = q.shape[2], k.shape[2]
        assert t == s or not causal
        events.append(t * (t + 1) // 2 if causal else t * s)

    def counted(q, k, v, causal):
        scores(q, k, causal)
        return block(q, k, v, causal)

    def counted_backward(dout, q, out, lse, k, v, causal):
        scores(q, k, causal)
        return backward(dout, q, out, lse, k, v, causal)

    def sent(ops):
        events.append(None)
        return batch(ops)

    context.block, context.block_backward, dist.batch_isend_irecv = counted, counted_backward, sent
    at = position_ids(48, n, rank)
    with_gradients(core("ring", dist.group.WORLD), *(x[:, :, at] for x in qkv(2, 1, T=48)))
    return events


@pytest.mark.parametrize("n", (2, 3, 4))
def test_every_rank_computes_the_same_in_every_step_while_messages_travel(n):
    t, ranks = 48 // n, run_ranks(n, work)
    first, later = t * (t + 1) // 2, t * t // 2
    forward = [None, first] + [None, later] * (n - 2) + [later]
    backward = (
        [None, first] + [None, later] * (n - 2) + ([None, later] if n > 2 else [later]) + [None]
    )
    assert ranks == [forward + backward] * n
    assert n * (first + (n - 1) * later) == 48 * 49 // 2  # nothing is computed only to be masked


# ---- one block -----------------------------------------------------------------------------------
class Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal):
        out, lse = context.block(q, k, v, causal)
        ctx.save_for_backward(q, out, lse, k, v)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, dout):
        return *context.block_backward(dout, *ctx.saved_tensors, ctx.causal), None


def by_formula(monkeypatch):
    """As on a device without a fused kernel."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    aten = SimpleNamespace(**{name: context.formula, f"{name}_backward": context.formula_backward})
    monkeypatch.setattr(context, "aten", aten)


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("causal", (True, False))
def test_the_gradients_of_a_block_are_its_derivatives(causal, fused, monkeypatch):
    q, k, v, _ = (x.requires_grad_() for x in qkv(4, 2, T=4, D=3))
    if not fused:
        by_formula(monkeypatch)
    k, v = (x if causal else x[:, :, :3] for x in (k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: Block.apply(q, k, v, causal), (q, k, v))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("t, s, causal", ((6, 6, True), (6, 3, False), (3, 6, False)))
def test_the_formula_is_the_fused_kernel(t, s, causal, dtype, monkeypatch):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    q, k, v, dout = qkv(6, 2, T=6, dtype=dtype)
    q, dout, k, v = q[:, :, :t], dout[:, :, :t], k[:, :, :s], v[:, :, :s]
    lse = context.block(q, k, v, causal)[1] + 0.7  # as if there were other blocks

    def run():
        out, own = context.block(q, k, v, causal)
        return [out, own, *context.block_backward(dout, q, out.to(dtype), lse, k, v, causal)]

    fused = run()
    by_formula(monkeypatch)
    written = run()
    assert fused[1].dtype == written[1].dtype == torch.promote_types(dtype, torch.float32)
    assert furthest(fused, written) < tolerance


def test_the_order_of_merging_does_not_matter_and_nothing_overflows():
    q, k, v, _ = qkv(2, 2)
    whole = scaled_dot_product_attention(100 * q, k, v)
    for order in ((0, 1, 2), (2, 0, 1)):
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
        for i in order:
            keys = slice(8 * i, 8 * i + 8)
            context.merge(out, lse, *context.block(100 * q, k[:, :, keys], v[:, :, keys], False))
        assert furthest([out], [whole]) < 1e-12


def test_the_gpu_kernel_takes_what_it_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with FakeTensorMode():  # shapes and signatures alone
        q = torch.empty(2, 16, 6, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        k = torch.empty(2, 2, 8, 64, dtype=torch.bfloat16, device="cuda")
        wide_type, odd_size = q.new_empty(64, dtype=torch.float32), q.new_empty(20)
        assert context.on_gpu(q) and not context.on_gpu(wide_type) and not context.on_gpu(odd_size)
        out, lse = context.block(q, k, k, False)
        assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
        gradients = context.block_backward(out, q, out, lse, k, k, False)
        assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]


# ---- who holds what, who is refused --------------------------------------------------------------
@pytest.mark.parametrize("n", (1, 2, 3, 4))
def test_positions_are_a_partition_in_the_order_of_time(n):
    for way in ("ring", "ulysses"):
        parts = [position_ids(24, n, rank, way) for rank in range(n)]
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(24))
        for rank, part in enumerate(parts):
            assert part.dtype == torch.int64 and len(part) == 24 // n and (part.diff() > 0).all()
            c = 12 // n
            first = rank * c if way == "ring" else rank * 24 // n
            assert part[0] == first and part[-1] == (
                23 - first if way == "ring" else first + 24 // n - 1
            )


def test_positions_refuse_what_cannot_be_cut():
    assert len(position_ids(12, 4, 0, "ulysses")) == 3 and len(position_ids(7, 1, 0, "ring")) == 7
    for size, n, way, pieces in ((12, 4, "ring", 8), (10, 4, "ulysses", 4), (4, 4, "ring", 8)):
        with pytest.raises(
            ValueError, match=f"--block_size={size}.* a multiple of {pieces}"
        ) as error:
            position_ids(size, n, 0, way)
        assert f"--cp={n}" in str(error.value)


def refuse(rank, n):
    messages = []
    for heads, kv_heads, cut in ((4, 2, 4), (2, 2, 2), (4, 4, 4)):
        model = build(MODERN | dict(n_head=4, n_kv_head=kv_heads, n_layer=1))
        for name in ("q", "k"):  # as tensor parallelism leaves it
            linear = getattr(model.blocks["0"].attn, name)
            rows = linear.weight.shape[0] * cut // 4
            linear.weight = torch.nn.Parameter(linear.weight[:rows].detach())
        try:
            split(model, dist.group.WORLD, "ulysses")
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
        split(model, dist.group.WORLD, "ring")  # takes any number
    return messages


def test_ulysses_refuses_heads_it_cannot_deal_out():
    few_kv, cut_by_tp, fits = run_ranks(4, refuse)[0]
    assert fits is None
    assert all(s in few_kv for s in ("--cp=4", "4 heads", "2 kv heads", "--cp_attention=ring"))
    assert "2 heads" in cut_by_tp and "1 kv heads" in cut_by_tp


def test_one_rank_changes_nothing():
    model = build(MODERN)
    cores = [b.attn.attention_fn for b in model.blocks.values()]
    for way in ("ring", "ulysses"):
        split(model, None, way)
        assert [b.attn.attention_fn for b in model.blocks.values()] == cores
        assert torch.equal(position_ids(24, 1, 0, way), torch.arange(24))


def own_core(rank, n):
    calls = []

    def plain(q, k, v):
        calls.append((q.shape, k.shape))
        return causal_attention(q, k, v)

    at = position_ids(24, n, rank, "ulysses")
    core("ulysses", dist.group.WORLD, plain)(*(x[:, :, at] for x in qkv(8, 4)[:3]))
    return calls


def test_ulysses_runs_the_core_that_was_there_on_the_whole_sequence():
    assert run_ranks(2, own_core) == [[((2, 4, 24, 8), (2, 2, 24, 8))]] * 2
