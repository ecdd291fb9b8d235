"""The pipeline against one model, in float64; schedules by simulation alone; what is sent and
kept."""

import contextlib
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import init_weights, run_ranks

from layers.generation import generate
from model import GPT, GPTConfig
from parallel.pipeline import Pipeline, defer_weight_gradients, main, weight_gradients
from parallel.timeline import SCHEDULES, Op, layers, programs, schedule, simulate
from precision import onednn

MODERN = dict(
    n_layer=8, n_head=2, n_kv_head=1, n_embd=16, block_size=8, vocab_size=32, zero_init=False
)
GPT2 = MODERN | dict(
    n_layer=9,
    norm="layernorm",
    activation="gelu",
    position="learned",
    qk_norm=False,
    n_kv_head=2,
    tied=True,
    bias=True,
    init="gpt2",
    logit_cap=None,
    dropout=0.2,
)
SHAPES = {"modern": MODERN, "gpt2": GPT2}
B, T, C = 2, 8, 16
LIKE = ((B, T, C), torch.float64, torch.device("cpu"))
HIDDEN = B * T * C * 8  # bytes of one micro-batch's hidden states
ALL = [
    (name, p, m, v)
    for p in range(1, 9)
    for m in range(1, 17)
    for name in SCHEDULES
    for v in (1, 2, 3)
    if (name == "interleaved") == (v > 1) and (v == 1 or m % p == 0)
]

MESSAGES = [(name, p, m, v) for name, p, m, v in ALL if p > 1 and m <= 8]


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """Weights drawn on the meta device import it: once here, not in each rank."""
    with torch.device("meta"):
        build(MODERN)


def build(shape, part=None):
    return GPT(GPTConfig(**shape), part).double()


def micro_batch(i):
    tokens = torch.randint(32, (B, T + 1), generator=torch.Generator().manual_seed(i))
    return tokens[:, :-1], tokens[:, 1:], torch.arange(i * B, i * B + B)


@cache
def alone(shape, m):
    """Losses and gradients of one model; losses without dropout."""
    model, losses, scale = init_weights(build(SHAPES[shape])), [], 1 / (m * B * T)
    for i in range(m):
        x, targets, rows = micro_batch(i)
        loss = model(x, targets, sample_ids=rows)
        (loss * scale).backward()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        clean = [model(*micro_batch(i)[:2]).item() for i in range(m)]
    return losses, {name: p.grad for name, p in model.named_parameters()}, clean


@contextlib.contextmanager
def wire():
    """A list of the bytes of each message that is given to dist.batch_isend_irecv to be sent."""
    sizes, real = [], dist.batch_isend_irecv

    def watched(calls):
        sizes.extend(call.tensor.nbytes for call in calls if call.op is dist.isend)
        return real(calls)

    dist.batch_isend_irecv = watched
    yield sizes
    dist.batch_isend_irecv = real


class Stage:
    """One rank of a pipeline over a GPT."""

    def __init__(self, name, shape, v=1, product=None):
        self.pipe = Pipeline(
            dist.group.WORLD, name, shape["n_layer"], v, tied=shape.get("tied", False)
        )
        self.model = init_weights(build(shape, self.pipe.stage_layers))
        for module in self.model.modules() if product else ():
            if hasattr(module, "matmul"):
                module.matmul = product
        if name == "zerobubble":
            self.pipe.deferred = defer_weight_gradients(self.model)

    def forward(self, i, layers, x):
        tokens, targets, rows = micro_batch(i)
        return self.model(tokens if x is None else x, targets, torch.arange(T), rows, layers)

    def step(self, m, **options):
        losses = self.pipe.run(m, self.forward, lambda i: LIKE, 1 / (m * B * T), **options)
        self.gradients = {name: p.grad for name, p in self.model.named_parameters()}
        return [loss.item() for loss in losses]


# ---- the same numbers ----------------------------------------------------------------------------
def train_and_evaluate(rank, world, name, v):
    found = {}
    for kind, shape, counts in ("modern", MODERN, (4, 8)), ("gpt2", GPT2, (4,)):
        stage = Stage(name, shape, v)
        for m in counts:
            flags = []
            with wire() as sizes:
                losses = stage.step(m, before_backward=flags.append)
            assert sum(sizes) == stage.pipe.sent_bytes
            stage.pipe.all_reduce_tied_grads(stage.gradients)
            training = dict(vars(stage.pipe))
            assert not stage.pipe.inbox and not stage.pipe.outbox and not stage.pipe.deferred
            gradients = {n: g.clone() for n, g in stage.gradients.items()}
            stage.model.zero_grad(set_to_none=True)
            stage.model.eval()
            with torch.no_grad():
                clean = stage.pipe.run(m, stage.forward, lambda i: LIKE)
            stage.model.train()
            found[kind, m] = SimpleNamespace(
                losses=losses,
                gradients=gradients,
                clean=[loss.item() for loss in clean],
                flags=flags,
                wire=sum(sizes),
                sent=training["sent_bytes"],
                in_flight=training["in_flight"],
                idle=training["idle_s"],
                ends=[stage.pipe.first, stage.pipe.last],
            )
    return found


@pytest.mark.parametrize(
    "name, v", [(name, 2 if name == "interleaved" else 1) for name in SCHEDULES]
)
@pytest.mark.parametrize("p", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_every_schedule_is_one_model(name, v, p):
    ranks = run_ranks(p, train_and_evaluate, name, v)
    for (kind, m), last in ranks[-1].items():
        mine = [found[kind, m] for found in ranks]
        losses, gradients, clean = alone(kind, m)
        torch.testing.assert_close(last.losses, losses, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(last.clean, clean, rtol=1e-10, atol=1e-10)
        assert all(not rank.losses and not rank.clean for rank in mine[:-1])
        assert {n for rank in mine for n in rank.gradients} == {*gradients}
        for rank in mine:  # a tied gradient is on two of them
            for n, gradient in rank.gradients.items():
                torch.testing.assert_close(gradient, gradients[n], rtol=1e-10, atol=1e-10, msg=n)
        assert [rank.ends for rank in mine] == [[r == 0, r == p - 1] for r in range(p)]

        timeline = simulate(schedule(name, p, m, v))
        assert [rank.in_flight for rank in mine] == timeline.in_flight
        assert all(rank.idle > 0 for rank in mine)
        tied = 32 * C * 8 if kind == "gpt2" else 0
        for r, rank in enumerate(mine):
            messages = m * (v - (r == p - 1)) + m * (v - (r == 0))
            assert rank.wire == messages * HIDDEN
            assert rank.sent == rank.wire + tied * (r in (0, p - 1))
            count = 0 if name == "zerobubble" else 1
            assert rank.flags == [False] * (m * v - count) + [True] * count


def uneven(rank, world):
    stage = Stage("1f1b", MODERN | {"n_layer": 7})
    return stage.pipe.stage_layers, stage.step(3), stage.gradients


def test_layers_that_do_not_divide_and_fewer_micro_batches_than_ranks():
    SHAPES["seven"] = MODERN | {"n_layer": 7}
    ranks = run_ranks(4, uneven)
    assert [part for part, _, _ in ranks] == [[0, 1], [2, 3], [4, 5], [6]]
    losses, gradients, _ = alone("seven", 3)
    torch.testing.assert_close(ranks[-1][1], losses, rtol=1e-10, atol=1e-10)
    merged = {name: g for _, _, part in ranks for name, g in part.items()}
    torch.testing.assert_close(merged, gradients, rtol=1e-10, atol=1e-10)


def written(rank, world, name, v):
    stage = Stage(name, MODERN, v)
    x = micro_batch(0)[0][:1]

    def forward(x, position_ids):
        return stage.pipe.logits(
            stage.model, lambda b, t: ((b, t, C), *LIKE[1:]), 32, x, position_ids
        )

    with torch.no_grad():
        return forward(x, torch.arange(T)), generate(
            stage.model.eval(), x[:, :3], 9, forward=forward
        )


@pytest.mark.parametrize("p, name, v", [(2, "interleaved", 2), (4, "zerobubble", 1)])
def test_generation_runs_through_all_stages_and_ends_alike_everywhere(p, name, v):
    model, x = init_weights(build(MODERN)).eval(), micro_batch(0)[0][:1]
    for logits, ids in run_ranks(p, written, name, v):
        torch.testing.assert_close(logits, model(x).detach(), rtol=1e-10, atol=1e-10)
        assert torch.equal(ids, generate(model, x[:, :3], 9))


# ---- schedules, without running them -------------------------------------------------------------
def test_bubbles_are_the_formulas():
    for name, p, m, v in ALL:
        idle = (p - 1) / p if name == "naive" else (p - 1) / (v * m + p - 1)
        if name == "zerobubble":  # with F = I = W; fewer micro-batches than ranks cannot fill it
            idle = (p - 1) / (3 * m + p - 1) if m >= p else 1 - 3 * m / (2 * p + 2 * m - 1)
        timeline = simulate(schedule(name, p, m, v))
        assert timeline.bubble == pytest.approx(idle, abs=1e-12), (name, p, m, v)
        if name == "zerobubble" and p > 1:
            assert timeline.bubble < simulate(schedule("1f1b", p, m)).bubble


def test_activations_in_memory_are_the_formulas():
    for name, p, m, v in ALL:
        most = {
            "naive": [1] * p,
            "gpipe": [m] * p,
            "1f1b": [min(m, p - r) for r in range(p)],
            "interleaved": [min(v * m, (v + 1) * p - 2 * r - 1) for r in range(p)],
            "zerobubble": [min(m, p)] * p,
        }[name]
        assert simulate(schedule(name, p, m, v)).in_flight == most, (name, p, m, v)


def messages(program):
    return [t for step in program if not isinstance(step, Op) for t in step]


def test_no_order_of_messages_can_deadlock():
    """The strictest rule: a rank stays in a batch until all of it is through, each pair keeps one
    order, and an operation only uses what has come."""
    for name, p, m, v in MESSAGES:
        todo = programs(simulate(schedule(name, p, m, v)))
        for a in range(p):
            for b in range(p):
                sent = [t.key for t in messages(todo[a]) if t.send and t.peer == b]
                came = [t.key for t in messages(todo[b]) if not t.send and t.peer == a]
                assert sent == came, (name, p, m, v)
        here, through, have = [0] * p, set(), [set() for _ in range(p)]
        moved = True
        while moved:
            moved = False
            open_ = [messages(todo[r][here[r] : here[r] + 1]) for r in range(p)]
            for r in range(p):
                for t in open_[r]:
                    if any(
                        o.key == t.key and o.peer == r and o.send != t.send for o in open_[t.peer]
                    ):
                        through |= {(r, t), (t.peer, t._replace(send=not t.send, peer=r))}
            for r in range(p):
                if here[r] == len(todo[r]):
                    continue
                step = todo[r][here[r]]
                if isinstance(step, Op):
                    stage = step.chunk * p + r
                    if step.kind == "F" and stage:
                        assert ("F", step.micro_batch, stage) in have[r]
                    if step.kind in "BI" and stage < p * v - 1:
                        assert ("B", step.micro_batch, stage) in have[r]
                elif not all((r, t) in through for t in step):
                    continue
                else:
                    have[r] |= {t.key for t in step if not t.send}
                here[r], moved = here[r] + 1, True
        assert here == [len(program) for program in todo], (name, p, m, v)


def test_a_batch_of_messages_delays_nothing():
    """What comes in the same batch as a message is there, by the simulated clock, before its
    operation."""
    for name, p, m, v in MESSAGES:
        timeline = simulate(schedule(name, p, m, v))
        back = "I" if name == "zerobubble" else "B"
        done = {
            (op.kind, op.micro_batch, op.chunk * p + r): span
            for r in range(p)
            for op, span in zip(timeline.ops[r], timeline.spans[r])
        }
        for r, program in enumerate(programs(timeline)):
            for batch, op in zip(program, program[1:]):
                if isinstance(op, Op) and not isinstance(batch, Op):
                    start = done[op.kind, op.micro_batch, op.chunk * p + r][0]
                    for _, _, (way, i, to) in batch:
                        source = ("F", i, to - 1) if way == "F" else (back, i, to + 1)
                        assert done[source][1] <= start


def test_a_schedule_that_cannot_go_on_is_refused():
    good = schedule("1f1b", 2, 2)
    with pytest.raises(ValueError, match="cannot go on.*rank 0 at Op.*kind='B'"):
        simulate(
            [
                [Op("F", 0), Op("B", 0), Op("F", 1), Op("B", 1)],
                [Op("F", 0), Op("F", 1), Op("B", 0), Op("B", 1)],
            ]
        )
    for lacking in (
        [good[0], good[1][:-1]],
        [good[0], good[1] + good[1][-1:]],
        [good[0][:-1], good[1][:-1]],
        [[Op("F", 0), Op("I", 0)]],
    ):
        with pytest.raises(ValueError, match="each rank"):
            simulate(lacking)


def test_orders_are_those_of_torch():
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

    def ours(name, p, m, v=1):
        return [
            [(op.kind, op.micro_batch, op.chunk * p + r) for op in todo]
            for r, todo in enumerate(schedule(name, p, m, v))
        ]

    def theirs(todo):
        kinds = {"FORWARD": "F", "FULL_BACKWARD": "B"}
        kept = [a for a in todo if a is not None and a.computation_type.name in kinds]
        return [(kinds[a.computation_type.name], a.microbatch_index, a.stage_index) for a in kept]

    for p, m in (2, 4), (4, 4), (4, 8), (3, 9):
        stages = SimpleNamespace(pp_group_size=p, _num_stages=p, _n_microbatches=m)
        for name, cls in ("gpipe", schedules.ScheduleGPipe), ("1f1b", schedules.Schedule1F1B):
            order = cls._get_pipeline_order(stages)
            assert ours(name, p, m)[:-1] == [theirs(order[r]) for r in range(p - 1)]
            kinds = [
                [kind for kind, _, _ in todo]
                for todo in (ours(name, p, m)[-1], theirs(order[p - 1]))
            ]
            assert kinds[0] == kinds[1]  # 1F1B of 2.13 numbers the last rank's forwards from 1
        for v in 2, 3:
            stages = SimpleNamespace(pp_group_size=p, n_local_stages=v, microbatches_per_round=p)
            stages._n_microbatches, cls = m, schedules.ScheduleInterleaved1F1B
            order = [cls._calculate_single_rank_operations(stages, r) for r in range(p)]
            assert ours("interleaved", p, m, v) == [theirs(todo) for todo in order]


def test_layers_are_even_and_the_last_stages_have_fewer():
    assert layers(8, 2, 2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert layers(10, 4) == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7]], [[8, 9]]]
    for p, v in (1, 1), (3, 2), (4, 2):
        parts = layers(11, p, v)
        assert [i for c in range(v) for r in range(p) for i in parts[r][c]] == list(range(11))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: schedule("1f1v", 2, 4), "did you mean 1f1b"),
        (lambda: schedule("interleaved", 2, 4, 1), "--pp_chunks=2"),
        (lambda: schedule("interleaved", 4, 6, 2), "--micro_batch_size"),
        (lambda: schedule("gpipe", 2, 4, 2), "--pp_chunks=1"),
        (lambda: schedule("gpipe", 0, 4), "at least 1"),
        (lambda: layers(4, 3, 2), "--pp=3.*--pp_chunks=2.*--n_layer=4"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_type(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_timeline_is_drawn_and_bad_flags_end_with_2():
    flags = ["--schedule=zerobubble", "--pp=2", "--micro_batches=3"]
    head, drawing, legend = main(flags).split("\n\n")
    assert head == "zerobubble: 2 ranks, 3 micro-batches a step, 1 model chunk on each rank"
    assert drawing.splitlines() == [
        "time    0           kept  waits",
        "rank 0  01.aA2bBcC     2  10.0%",
        "rank 1  .0a1bA2cBC     2  10.0%",
    ]
    one = main(["--pp=1", "--micro_batches=1"]).splitlines()[0]
    assert one == "1f1b: 1 rank, 1 micro-batch a step, 1 model chunk on each rank"
    # What the legend says of the eleventh and the last letter.
    many = main(["--pp=1", "--micro_batches=27"])
    assert "10 is 0 again, but letters go on to z" in many and "9jj0kk1ll" in many
    assert "5zz6aa" in many
    marks = ["rank", "time", "0 1 2", "a b c", "A B C", ".", "kept", "waits"]
    assert [line[:9].strip() for line in legend.splitlines()] == marks
    two = main(["--schedule=interleaved", "--pp=2", "--pp_chunks=2"])
    assert "0'1'" in two and "2 model chunks" in two
    # A mark of the axis stands above its moment: here five units of two characters each.
    axis, row, *_ = two.split("\n\n")[1].splitlines()
    assert axis.index("5") - axis.index("0") == 10 and axis.index("0") == row.index("0", 6)
    # The legend has no mark that the drawing lacks.
    assert "0' a'" in main(["--schedule=interleaved"]) and "A B C" not in main([])
    assert all(f"--{name}=" in main(["--help"]) for name in ("schedule", "pp", "micro_batches"))
    for flag in "--stages=2", "--schedule=1f1v", "--pp_chunks=2", "--micro_batches=0":
        with pytest.raises(ValueError):
            main([flag])
    command = [sys.executable, "-m", "parallel.pipeline", "--pp=x"]
    root = Path(__file__).parent.parent
    bad = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stdout == "" and len(bad.stderr.splitlines()) == 1


# ---- zero bubble: a backward in two parts --------------------------------------------------------
def split_backward(shape, change=lambda model: None):
    """Gradients after the first half, after the second; what was deferred; the hooks that fired."""
    model = init_weights(build(shape))
    change(model)
    fired = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    queue = defer_weight_gradients(model)
    x, targets, rows = micro_batch(0)
    model(x, targets, sample_ids=rows).backward()
    first, count = {*fired}, len(queue)
    weight_gradients(queue)
    return first, count, fired, {name: p.grad for name, p in model.named_parameters()}


def whole_backward(shape, change=lambda model: None):
    model = init_weights(build(shape))
    change(model)
    x, targets, rows = micro_batch(0)
    model(x, targets, sample_ids=rows).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [MODERN, GPT2])
def test_only_products_are_deferred_and_hooks_fire(shape):
    others = {"embed.weight", "positions.weight"} if shape is GPT2 else {"embed.weight"}
    first, count, fired, gradients = split_backward(shape)
    assert first == others | {name for name in gradients if "norm" in name}
    assert count == 6 * shape["n_layer"] + 1  # q, k, v, proj, fc, proj and the head
    twice = {"embed.weight"} if shape.get("tied") else set()  # as embedding and as head
    assert sorted(fired) == sorted([*gradients, *twice])
    torch.testing.assert_close(gradients, whole_backward(shape), rtol=1e-12, atol=1e-12)


def frozen(model):
    model.embed.requires_grad_(False)  # the first block's input then needs no gradient
    model.blocks["0"].attn_norm.requires_grad_(False)
    for name in ("0", "3"):
        model.blocks[name].attn.q.requires_grad_(False)


def custom(model):
    for module in model.modules():
        if hasattr(module, "matmul"):
            module.matmul = Halved.apply


class Halved(torch.autograd.Function):
    """A product that is one custom Function, with another gradient than autograd would give."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dbias = rows.sum(0) / 5 if ctx.needs_input_grad[2] else None
        return dy @ weight / 2, rows.t() @ x.flatten(0, -2) / 3, dbias


@pytest.mark.parametrize("change", [frozen, custom])
@pytest.mark.parametrize("shape", [MODERN, GPT2 | {"dropout": 0.0}])
def test_the_split_composes_with_frozen_weights_and_other_products(shape, change):
    *_, gradients = split_backward(shape, change)
    torch.testing.assert_close(gradients, whole_backward(shape, change), rtol=1e-12, atol=1e-12)


def products(linear, weight, x):
    queue = defer_weight_gradients(linear)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear.matmul(x, weight, linear.bias)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    return queue


def test_the_split_composes_with_autocast_and_views():
    x, leaf = torch.randn(5, 6), torch.randn(8, 6, requires_grad=True)
    linear = torch.nn.Linear(6, 4)
    linear.matmul = torch.nn.functional.linear
    queue = products(linear, leaf[2:6], x.requires_grad_())
    assert len(queue) == 1 and leaf.grad is None and linear.bias.grad is None
    dx, x.grad = x.grad, None
    weight_gradients(queue)
    got = dx, leaf.grad, linear.bias.grad
    leaf.grad = linear.bias.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.nn.functional.linear(x, leaf[2:6], linear.bias)
    y.float().square().sum().backward()
    torch.testing.assert_close(got, (x.grad, leaf.grad, linear.bias.grad), rtol=0, atol=0)
    assert leaf.grad[0].eq(0).all() and leaf.grad.dtype == torch.float32


def test_the_split_frees_what_it_kept():
    model = init_weights(build(MODERN))
    seen, queue = [], defer_weight_gradients(model)
    product = model.blocks["3"].mlp.fc.matmul

    def watched(x, weight, bias):
        y = product(x, weight, bias)
        seen.extend(weakref.ref(part.untyped_storage()) for part in (x, y))
        return y

    model.blocks["3"].mlp.fc.matmul = watched
    model(*micro_batch(0)[:2]).backward()
    assert seen[0]() is not None and seen[1]() is None  # the output went with the first half
    weight_gradients(queue)
    assert seen[0]() is None and not queue


def test_without_gradients_nothing_is_wrapped():
    model = init_weights(build(MODERN))
    queue = defer_weight_gradients(model)
    with torch.no_grad():
        model(*micro_batch(0)[:2])
    assert not queue


def fp32_split(rank, world):
    torch.manual_seed(0)
    shape = MODERN | {"n_layer": 2}
    pipe = Pipeline(dist.group.WORLD, "zerobubble", 2)
    model = init_weights(GPT(GPTConfig(**shape), pipe.stage_layers))
    for module in model.modules():
        if hasattr(module, "matmul"):
            module.matmul = onednn.linear
    pipe.deferred = defer_weight_gradients(model)

    def forward(i, layers, x):
        return model(micro_batch(i)[0] if x is None else x, micro_batch(i)[1], layers=layers)

    pipe.run(4, forward, lambda i: (LIKE[0], torch.float32, LIKE[2]), 1.0)
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN"
)
def test_zero_bubble_composes_with_onednn():
    merged = {name: g for part in run_ranks(2, fp32_split) for name, g in part.items()}
    model = init_weights(GPT(GPTConfig(**MODERN | {"n_layer": 2})))
    for i in range(4):
        model(*micro_batch(i)[:2]).backward()
    torch.testing.assert_close(
        merged, {n: p.grad for n, p in model.named_parameters()}, rtol=1e-3, atol=1e-3
    )
