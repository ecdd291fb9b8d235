"""Every way to keep less against keeping all: the same numbers, the bytes, what is computed once
more."""

import functools
import math
from functools import partial

import pytest
import torch
import torch._dynamo  # imported before the ranks are forked, or each of them spends a second on it
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.functional as F
from harness import gpu, init_weights, run_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from layers.generation import generate
from memory import activation_checkpoint
from memory.activation_checkpoint import HOW, apply_activation_checkpointing, parse
from memory.activations import activation_bytes
from memory.meter import Meter
from model import GPT, GPTConfig, initial_weight
from parallel import context, pipeline, sequence, tensor
from parallel.ddp import DDP
from parallel.fsdp import FSDP
from parallel.zero import ZeRO
from precision import onednn
from settings import fields
from settings import parse as settings

CPU = torch.device("cpu")
ALL = [
    "full",
    "full_sharded",
    "full_offload",
    "every_1",
    "every_3",
    "segments_1",
    "segments_3",
    "attention",
    "mlp",
    "selective",
    "offload",
]
MODERN = dict(
    n_layer=4,
    n_head=4,
    n_kv_head=2,
    n_embd=16,
    block_size=8,
    vocab_size=32,
    zero_init=False,
    dropout=0.1,
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
)
IDS = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(1))


def build(how, shape=MODERN, dtype=torch.float64, device=CPU):
    model = init_weights(GPT(GPTConfig(**shape)).to(device, dtype))
    apply_activation_checkpointing(model, how)
    return model


def run(model, rows=slice(None), autocast=False, device=CPU):
    numbers = torch.arange(len(IDS), device=device)[rows]
    ids = IDS.to(device)[rows]
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = model(ids[:, :-1], ids[:, 1:], sample_ids=numbers)
    loss.backward()
    return loss.detach()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def bitwise(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


# ---- the same numbers ----------------------------------------------------------------------------
ON_GPU = ("full", "segments_3", "selective", "offload")


@pytest.mark.parametrize("how", [gpu(how) if how in ON_GPU else how for how in ALL])
@pytest.mark.parametrize(
    "shape, dtype, autocast", [(MODERN, torch.float64, False), (GPT2, torch.float32, True)]
)
def test_loss_and_gradients_are_bitwise_those_of_keeping_all(
    how, shape, dtype, autocast, device, deterministic
):
    found, expected = (build(way, shape, dtype, device) for way in (how, "none"))
    for _ in range(2):  # gradients accumulate
        losses = [run(model, autocast=autocast, device=device) for model in (found, expected)]
        assert torch.equal(*losses)
    bitwise(gradients(found), gradients(expected))


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN"
)
@pytest.mark.parametrize("how", ["full", "selective", "offload"])
def test_products_by_onednn(how):
    results = []
    for model in build("none", dtype=torch.float32), build(how, dtype=torch.float32):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.matmul = onednn.linear
        with Calls() as calls:
            run(model)
        results.append((gradients(model), calls.of("mkldnn._linear_pointwise")))
    bitwise(results[1][0], results[0][0])
    # The last one too: a Function's
    assert results[1][1] == results[0][1] + (24 if how == "full" else 0)


def replicas(rank, world, layout, hows, shape):
    """Gradients here under each of hows, and what was sent."""
    results = []
    for how in hows:
        group = dist.group.WORLD if world > 1 else None
        kinds = {"ddp": DDP, "fsdp": FSDP} | {f"zero{i}": partial(ZeRO, stage=i) for i in (1, 2, 3)}
        spread = kinds[layout](group, CPU)
        with torch.device("meta"):
            model = GPT(GPTConfig(**shape)).to(torch.float64)
        apply_activation_checkpointing(model, how)
        spread.parallelize(model)
        spread.init_weights(partial(initial_weight, model.config))
        for i, rows in enumerate(torch.arange(4).chunk(world)[rank].chunk(2)):
            spread.last_micro_batch(i == 1)
            run(model, rows)
        spread.finish_gradients()
        results.append((spread.gradients(), spread.sent_bytes))
    return results


@pytest.mark.parametrize(
    "layout",
    [
        "fsdp",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("ddp", "zero1", "zero2", "zero3")),
    ],
)
def test_replicas_have_the_gradients_of_keeping_all(layout):
    hows = ALL if layout in ("zero3", "fsdp") else ["full", "segments_3", "selective", "offload"]
    for (expected, sent), *found in run_ranks(2, replicas, layout, ["none", *hows], GPT2):
        for how, (gradient, now_sent) in zip(hows, found):
            bitwise(gradient, expected)
            assert now_sent == sent, how
    whole = replicas(0, 1, "ddp", ["segments_3"], GPT2)[0][0]
    if layout == "ddp":  # ZeRO's ranks have rows, see tests/test_zero.py
        for name, x in expected.items():
            torch.testing.assert_close(x, whole[name], rtol=1e-10, atol=1e-10)


def tensor_parallel(rank, world, split, hows, shape):
    results, group = [], dist.group.WORLD if world > 1 else None
    for how in hows:
        model = init_weights(GPT(GPTConfig(**shape)).to(torch.float64))
        if split is not None:
            split(model, group)
        apply_activation_checkpointing(model, how, group)
        with Calls() as calls:
            loss = run(model)
        sums = [
            calls.of(f"c10d.{name}_", f"c10d._{name}_base_")
            for name in ("allreduce", "allgather", "reduce_scatter")
        ]
        results.append((loss, gradients(model), sums))
    return results


@pytest.mark.parametrize("split", [tensor.split, sequence.split])
def test_tensor_parallel_ranks_have_the_gradients_of_keeping_all(split):
    """And repeat the collectives that the docstring says; 4 layers."""
    hows = [how for how in ALL if (how, split) != ("full_sharded", sequence.split)]
    once = {
        "attention": (0, 0, 0),
        "mlp": (0, 0, 0),
        "offload": (0, 0, 0),
        "full_sharded": (4, 4, 0),
    }
    more = (4, 0, 0) if split is tensor.split else (0, 8, 4)
    shape = MODERN | dict(dropout=0.0)
    for (loss, expected, sums), *found in run_ranks(
        2, tensor_parallel, split, ["none", *hows], shape
    ):
        for how, (now, gradient, now_sums) in zip(hows, found):
            assert torch.equal(now, loss)
            bitwise(gradient, expected)
            layers = 2 if how == "every_3" else 4
            added = [x * layers // 4 for x in once.get(how, more)]
            if how.startswith("segments"):  # the MLP's g too, inside a segment
                inner = 4 - int(how[-1])
                added = [
                    a + inner * (m > 0) * (i != 1) for i, (a, m) in enumerate(zip(added, more))
                ]
            assert [b - a for a, b in zip(sums, now_sums)] == added, how


@pytest.mark.parametrize("split", [tensor.split, sequence.split])
def test_tensor_parallel_with_dropout_and_biases(split):
    hows = ["full", "segments_2", "selective"] + ["full_sharded"] * (split is tensor.split)
    for (loss, expected, _), *found in run_ranks(2, tensor_parallel, split, ["none", *hows], GPT2):
        for now, gradient, _ in found:
            assert torch.equal(now, loss)
            bitwise(gradient, expected)


def context_parallel(rank, world, way, hows):
    results = []
    for how in hows:
        model = init_weights(GPT(GPTConfig(**MODERN)).to(torch.float64))
        context.split(model, dist.group.WORLD, way)
        apply_activation_checkpointing(model, how)
        places = context.position_ids(8, world, rank, way)
        model(IDS[:, places], IDS[:, places + 1], places, torch.arange(4)).backward()
        results.append(gradients(model))
    return results


@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_context_parallel_ranks_have_the_gradients_of_keeping_all(way):
    for expected, *found in run_ranks(2, context_parallel, way, ["none", *ALL]):
        for gradient in found:
            bitwise(gradient, expected)


def stages(rank, world, name, chunks, hows):
    results = []
    for how in hows:
        pipe = pipeline.Pipeline(dist.group.WORLD, name, 4, chunks)
        model = init_weights(GPT(GPTConfig(**MODERN), pipe.stage_layers).to(torch.float64))
        apply_activation_checkpointing(model, how)

        def forward(i, layers, x, model=model):
            x = IDS[i : i + 1, :-1] if x is None else x
            return model(x, IDS[i : i + 1, 1:], torch.arange(8), torch.tensor([i]), layers)

        losses = pipe.run(4, forward, lambda i: ((1, 8, 16), torch.float64, CPU), 1.0)
        results.append((losses, gradients(model)))
    return results


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("interleaved", 2)])
def test_stages_of_a_pipeline_have_the_gradients_of_keeping_all(name, chunks):
    hows = [how for how in ALL if how != "segments_3"] + ["segments_2"]
    for (losses, expected), *found in run_ranks(2, stages, name, chunks, ["none", *hows]):
        for now, gradient in found:
            assert all(map(torch.equal, now, losses))
            bitwise(gradient, expected)


# ---- torch's own random numbers ------------------------------------------------------------------
class Drop(nn.Module):
    """In the place of one of model.py's Dropouts: x -> function(x)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, where):
        return self.function(x)


def with_attention(attention, *options):
    return lambda q, k, v: attention(q, *(x.repeat_interleave(2, 1) for x in (k, v)), *options)


SDPA = partial(F.scaled_dot_product_attention, dropout_p=0.3, is_causal=True)
RANDOM = {
    "nn.Dropout": nn.Dropout(0.3),
    "F.dropout": lambda x: F.dropout(x, 0.3),
    "SDPA": None,
    "noise": lambda x: x * torch.randn_like(x),
    "in place": lambda x: x * torch.empty_like(x).bernoulli_(0.7),
}


def random_steps(how, kind, change=lambda model: None):
    """Gradients, losses and random state after two micro-batches of a model that draws numbers."""
    model = init_weights(GPT(GPTConfig(**MODERN | dict(dropout=0.0))).double())
    for block in model.blocks.values():
        if kind == "SDPA":
            block.attn.attention_fn = with_attention(SDPA)
        else:
            block.drop_attn, block.drop_mlp = Drop(RANDOM[kind]), Drop(RANDOM[kind])
            # inside of what `attention` and `mlp` cover
            block.attn.q = nn.Sequential(block.attn.q, nn.Dropout(0.3))
            block.mlp.fc = nn.Sequential(block.mlp.fc, nn.Dropout(0.3))
    apply_activation_checkpointing(model, how)
    change(model)
    torch.manual_seed(0)
    losses = [run(model), run(model)]
    return gradients(model) | {"losses": torch.stack(losses), "state": torch.get_rng_state()}


@pytest.mark.parametrize("kind", RANDOM)
def test_what_draws_random_numbers_draws_the_same_ones_again(kind):
    expected = random_steps("none", kind)
    assert not torch.equal(expected["losses"][0], expected["losses"][1])  # random it is
    for how in ALL:
        bitwise(random_steps(how, kind), expected)


def test_selective_draws_again_what_attention_draws(monkeypatch):
    """On a GPU attention with dropout is one operation; were its result kept, what draws after it
    would find the random state that it did not move. Here one like it, and dropout after it."""

    @torch.library.custom_op("drawing::attention", mutates_args=())
    def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
        mask = (torch.rand(*q.shape[:-1], k.shape[-2]) >= dropout_p).to(q) if dropout_p else None
        weights = (q @ k.mT).softmax(-1)
        mask = torch.ones_like(weights) if mask is None else mask
        return (weights * mask) @ v, mask

    def backward(ctx, grad, _):
        q, k, v, mask = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            y = ((leaves[0] @ leaves[1].mT).softmax(-1) * mask) @ leaves[2]
        return *torch.autograd.grad(y, leaves, grad), None

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], output[1])

    attention.register_autograd(backward, setup_context=save)
    monkeypatch.setattr(
        activation_checkpoint, "PRODUCTS", (*activation_checkpoint.PRODUCTS, "drawing.attention")
    )
    for p, again in ((0.3, 4), (0.0, 0)):
        found = []
        for how in ("none", "selective"):
            with Calls() as calls:
                drawing = torch.ops.drawing.attention
                core = with_attention(lambda *args: drawing(*args)[0], *[p] * (p > 0))
                found.append(
                    random_steps(
                        how,
                        "nn.Dropout",
                        lambda model, core=core: [
                            setattr(b.attn, "attention_fn", core) for b in model.blocks.values()
                        ],
                    )
                )
            found.append(calls.of("drawing.attention"))
        bitwise(found[2], found[0])
        assert found[3] - found[1] == 2 * again


# ---- what is computed again ----------------------------------------------------------------------
class Calls(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def of(self, *names):
        return sum(
            n for op, n in self.counts.items() if any(op.startswith(f"{name}.") for name in names)
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))

    def both(self):
        attention = self.of("aten._scaled_dot_product_flash_attention_for_cpu")
        return self.of("aten.mm", "aten.addmm", "aten._scaled_mm"), attention


AGAIN = {
    "none": (0, 0),
    "full": (20, 4),
    "every_3": (10, 2),
    "segments_1": (23, 4),
    "segments_3": (21, 4),
    "attention": (12, 4),
    "mlp": (4, 0),
    "selective": (0, 0),
    "offload": (0, 0),
    "full_offload": (20, 4),
}  # products and attentions; 24 and 4 in one forward


@pytest.mark.parametrize("how", AGAIN)
def test_products_are_repeated_as_the_docstring_says(how):
    counts = []
    for model in build("none", MODERN | dict(dropout=0.0)), build(how, MODERN | dict(dropout=0.0)):
        with Calls() as calls:
            run(model)
        counts.append(calls.both())
    assert tuple(b - a for a, b in zip(*counts)) == AGAIN[how]


@pytest.mark.parametrize("how", ["full", "segments_2", "every_2", "selective", "attention", "mlp"])
def test_each_part_is_computed_once_more_and_none_in_evaluation(how):
    model, counts = init_weights(GPT(GPTConfig(**MODERN)).double()), []
    parts = [b.attn if how == "attention" else b.mlp for b in model.blocks.values()]
    for i, part in enumerate(parts):  # a forward that is inside of what is computed again
        plain = part.forward
        part.forward = lambda *args, i=i, plain=plain: (counts.append(i), plain(*args))[1]
    apply_activation_checkpointing(model, how)
    model.eval()
    with torch.no_grad():
        model(IDS[:, :-1], IDS[:, 1:])
        generate(model, IDS[:1, :1], 3)
    assert sorted(counts) == sorted([0, 1, 2, 3] * 4)
    counts.clear()
    model.train()
    run(model)
    assert sorted(counts[4:]) == ([0, 2] if how == "every_2" else [0, 1, 2, 3])


# ---- the bytes -----------------------------------------------------------------------------------
SIZE, TOKENS = dict(n_layer=6, n_embd=64, vocab_size=32), 4 * 128
UNIT = 4 * TOKENS * 64  # bytes of one (B, T, C)
TRAITS = fields.ARCHS
KEPT = {
    "none": 10,
    "full": 1,
    "every_2": 5.5,
    "every_5": 7,
    "segments_3": 0.5,
    "attention": 6,
    "mlp": 6,
    "selective": 11,
}  # units a layer
# Gate and fc of width 3C in place of one of 4C.
GATED = KEPT | dict(none=12, every_2=6.5, every_5=8.33, attention=8, selective=13)


def peak(how, arch="modern", precision="fp32", group=None, size=SIZE, device=CPU):
    """Bytes of activations at the end of forward, and at most, all in all and in backward alone."""
    shape = size | dict(n_head=2, n_kv_head=2, block_size=128) | TRAITS[arch]
    model = GPT(GPTConfig(**shape))
    model = init_weights(model.double() if precision == "fp64" else model).to(device)
    apply_activation_checkpointing(model, how, group)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    # Autocast's copies of the weights are small beside so many
    rows = 32 if precision == "bf16" else 4
    ids = torch.zeros(rows, 128, dtype=torch.long, device=device)
    with Meter() as meter:
        meter.watch([(p, p.grad) for p in model.parameters()])
        start = meter.now()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(ids, ids)
        kept, forward = meter.now() - start, meter.peak - start
        meter.reset()
        loss.backward()
        backward = meter.peak - start
    return kept, max(forward, backward), backward


@pytest.mark.parametrize(
    "arch, precision",
    [
        gpu("modern", "fp32"),
        ("qwen3", "fp32"),
        *(
            pytest.param(arch, precision, marks=pytest.mark.slow)
            for arch in TRAITS
            for precision in ("bf16", "fp64", "fp32")
            if (arch, precision) not in (("modern", "fp32"), ("qwen3", "fp32"))
        ),
    ],
)
def test_bytes_are_those_of_the_estimate_and_of_the_docstring_s_table(arch, precision, device):
    """The peak of backward, to 5 percent (10 on a GPU, whose kernels keep other small things); what
    forward leaves of a layer (beside that of the head)."""
    accuracy, units_off = (0.05, 0.3) if device == CPU else (0.1, 1.0)
    for how, units in (GATED if arch in ("llama", "qwen3") else KEPT).items():
        kept, _, most = peak(how, arch, precision, device=device)
        tokens = TOKENS * (8 if precision == "bf16" else 1)
        expected = partial(activation_bytes, precision, tokens, **SIZE, arch=arch)
        assert most == pytest.approx(expected(activation_checkpoint=how), rel=accuracy), how
        if precision == "fp32":
            head = expected(n_layer=0, in_backward=False) / UNIT
            assert (kept / UNIT - head) / 6 == pytest.approx(units, abs=units_off), how


@pytest.mark.parametrize("how", ["mlp", "attention"])
@pytest.mark.parametrize("arch", ["modern", "llama"])
def test_backward_lets_go_of_each_layer_it_has_passed(how, arch):
    """24 layers, so that a tensor that stays of each would show."""
    size = SIZE | dict(n_layer=24)
    expected = activation_bytes("fp32", TOKENS, **size, arch=arch, activation_checkpoint=how)
    assert peak(how, arch, size=size)[1] == pytest.approx(expected, rel=0.05)


def test_of_24_layers_full_needs_less_than_a_quarter():
    size = SIZE | dict(n_layer=24)
    assert peak("full", size=size)[1] < 0.25 * peak("none", size=size)[1]


def shares(rank, world):
    return {how: peak(how, group=dist.group.WORLD)[0] for how in ("full", "full_sharded")}


def test_ranks_share_out_the_inputs_of_blocks():
    for kept in run_ranks(2, shares):
        assert kept["full"] - kept["full_sharded"] == pytest.approx(6 * UNIT / 2, rel=0.05)
    for tp in 1, 2:
        full = activation_bytes("fp32", TOKENS, **SIZE, activation_checkpoint="full_sharded", tp=tp)
        assert full == activation_bytes("fp32", TOKENS, **SIZE, activation_checkpoint="full") - (
            (tp - 1) * 5 * UNIT / 2
        )  # the sixth's is back, whole


class Thin(nn.Module):
    """A layer that keeps one tensor, its result: what Chen et al. count."""

    def forward(self, x, where):
        return x.tanh()


def in_turn(blocks, x, where):
    return functools.reduce(lambda x, block: block(x, where), blocks, x)


def thin_peak(how, layers):
    model, x = nn.Module(), torch.zeros(1000, dtype=torch.float64, requires_grad=True)
    model.run_blocks, model.blocks = in_turn, nn.ModuleDict({str(i): Thin() for i in range(layers)})
    for block in model.blocks.values():
        block.attn = block.mlp = nn.Identity()
    apply_activation_checkpointing(model, how)
    with Meter() as meter:
        loss = model.run_blocks(list(model.blocks.values()), x * 1, None).sum()
        loss.backward()
    return meter.peak / 8000


@pytest.mark.slow
def test_segments_need_least_at_the_square_root_of_layers_times_what_one_keeps():
    """Of layers that keep one tensor at sqrt(L); of blocks, which keep 10, near L itself."""
    curve = {k: thin_peak(f"segments_{k}", 16) for k in range(1, 17)}
    assert min(curve, key=curve.get) in (3, 4, 5) and curve[4] < 0.8 * min(curve[1], curve[16])
    size = SIZE | dict(n_layer=16)
    assert peak("segments_4", size=size)[1] > 1.4 * peak("segments_16", size=size)[1]
    kept = partial(activation_bytes, "fp32", TOKENS)
    curve = {k: kept(**size, activation_checkpoint=f"segments_{k}") for k in range(1, 17)}
    assert min(curve, key=curve.get) >= 8 and curve[4] > 1.4 * curve[16]
    size["n_layer"] = 256  # 50.6 = sqrt(10 x 256)
    curve = {k: kept(**size, activation_checkpoint=f"segments_{k}") for k in range(1, 257)}
    assert 43 <= min(curve, key=curve.get) <= 64 and curve[12] > 2 * curve[52]


def test_what_is_offloaded_leaves_the_device(monkeypatch):
    """Copies stand for host memory: they hold what autograd would keep, each storage once, no
    weights."""
    homes = []

    def send(trip, x):
        homes.append(x.clone())
        return homes[-1]

    def kept(model):
        with Meter() as meter:
            meter.watch(list(model.parameters()))
            fixed = meter.now()
            loss = model(IDS[:, :-1], IDS[:, 1:], sample_ids=torch.arange(4))
            return loss, meter.now() - fixed

    loss, everything = kept(expected := build("none"))
    loss.backward()
    monkeypatch.setattr(activation_checkpoint.Trip, "send", send)
    for how in "offload", "full_offload":
        homes.clear()
        loss, here = kept(model := build(how))
        away = sum(x.nbytes for x in homes)
        if how == "offload":
            assert here == pytest.approx(everything, rel=0.05) and here - away < 0.15 * everything
        else:
            assert [x.nbytes for x in homes] == [8 * 4 * 8 * 16] * 4
        loss.backward()
        bitwise(gradients(model), gradients(expected))


def test_what_is_saved_elsewhere_stays_there():
    """Kernels of a GPU save some numbers on the host. Here the block is there, and they are not."""
    trip = activation_checkpoint.Trip(nn.Linear(2, 2), CPU, None, lambda: None)
    x = torch.empty(2, device="meta")
    assert trip.unpack(trip.pack(x)) is x and trip.hosts == []


# ---- mistakes ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "how",
    [
        "all",
        "every",
        "every_0",
        "every_K",
        "every_2.5",
        "every_-1",
        "segments_0",
        "segments_5",
        "segments_",
        "segments_K",
        "Full",
        "",
    ],
)
def test_what_is_not_known_is_refused_with_what_to_type(how):
    with pytest.raises(ValueError, match="type --activation_checkpoint=") as error:
        build(how)
    assert all(name in str(error.value) for name in HOW) and "\n" not in str(error.value)


def test_numbers_are_read():
    assert parse("every_12", 4) == ("every", 12) and parse("segments_4", 4) == ("segments", 4)
    assert all(parse(how, 1)[0] == how for how in HOW if not how.endswith("K"))


@pytest.mark.parametrize("how", ALL)
def test_zero_bubble_is_refused(how):
    flags = ["--pp=2", "--pp_schedule=zerobubble"]
    settings.parse([*flags, "--activation_checkpoint=none"])
    with pytest.raises(ValueError, match=f"{how} is incompatible with .*type --pp_schedule=1f1b"):
        settings.parse([*flags, f"--activation_checkpoint={how}"])


# ---- compiled ------------------------------------------------------------------------------------
SLOW_COMPILED = ["full", "selective", "segments_2", "attention", "full_sharded"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["offload", *SLOW_COMPILED])
def test_compiled_blocks(how):
    expected, model = (
        build("none", MODERN | dict(dropout=0.0)),
        build(how, MODERN | dict(dropout=0.0)),
    )
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward)
    torch.testing.assert_close(run(model), run(expected))
    for name, x in gradients(expected).items():
        torch.testing.assert_close(gradients(model)[name], x)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "selective", "segments_2", "attention", "mlp"])
def test_compiled_blocks_draw_the_same_random_numbers_again(how):
    def compiled(model):
        torch._dynamo.reset()
        for block in model.blocks.values():
            block.forward = torch.compile(block.forward, backend="aot_eager")

    for kind in ("nn.Dropout", "SDPA"):
        bitwise(random_steps(how, kind, compiled), random_steps("none", kind, compiled))


def test_all_variants_are_tested():
    tested = {parse(how, math.inf)[0] for how in ALL} | {"none"}
    assert tested == {how.removesuffix("_K") for how in HOW}
