"""What backward computes again: the same bits from fewer bytes, and clear errors."""

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import model as model_file
from layers import fewer_passes
from layers import recompute as recompute_file
from layers.recompute import RESULTS, casts, forget_results, recompute
from model import GPT, GPTConfig
from parallel.autocast_linear import keep_no_copies, linear
from parallel.pipeline import defer_weight_gradients, weight_gradients
from settings.fields import ARCHS

TRAITS = {
    arch: {name: x for name, x in traits.items() if name in GPTConfig.__dataclass_fields__}
    for arch, traits in ARCHS.items()
}
SIZE = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=16, vocab_size=64)


def gpt(arch: str, **more) -> GPT:
    model = GPT(GPTConfig(**SIZE, **TRAITS[arch] | more))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model


def gradients(model: GPT, autocast: torch.dtype | None) -> list:
    ids = torch.arange(32).view(2, 16)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(ids, ids, sample_ids=torch.arange(2))
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def plainly(monkeypatch) -> None:
    monkeypatch.setattr(model_file, "recompute", lambda function, x: function(x))
    monkeypatch.setattr(model_file, "casts", lambda x, n: [x] * n)
    monkeypatch.setattr(model_file, "forget_results", contextlib.nullcontext)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_the_same_bits_as_without(arch, dtype, monkeypatch):
    model = gpt(arch, dropout=0.1)
    autocast = dtype if dtype.itemsize == 2 else None
    if dtype == torch.float64:
        model.double()
    found = gradients(model, autocast)
    plainly(monkeypatch)
    expected = gradients(model, autocast)
    assert all(map(torch.equal, found, expected))


def bytes_saved(model: GPT) -> int:
    storages = {}

    def pack(x):
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x.detach()

    with saved_tensors_hooks(pack, lambda x: x):
        model(torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long))
    return sum(x.nbytes() for x in storages.values())


@pytest.mark.parametrize("arch, fewer", [("gpt2", 6), ("modern", 7)])
def test_hooks_around_a_model_see_only_what_is_kept(arch, fewer, monkeypatch):
    """In tensors of (B, T, C) a layer; here k and v are half as wide as q."""
    model = gpt(arch)
    here = bytes_saved(model)
    plainly(monkeypatch)
    unit = 2 * 16 * 32 * 4
    assert bytes_saved(model) - here >= fewer * 2 * unit


def test_nothing_stays_after_backward_or_without_one():
    gc.collect()
    before = set(RESULTS.values())  # of graphs that other tests left
    gc.disable()
    try:
        model = gpt("modern")
        kept = []
        hook = model.blocks["0"].mlp.fc.register_forward_hook(
            lambda _, args, out: kept.append(weakref.ref(out))
        )
        gradients(model, None)
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros(2, 16, dtype=torch.long))
        hook.remove()
        assert len(kept) == 2 and [x() for x in kept] == [None, None]
        assert set(RESULTS.values()) <= before
    finally:
        gc.enable()


def test_backward_lets_go_of_what_it_has_passed_unless_the_graph_is_kept():
    x = torch.ones(3, requires_grad=True) * 2
    w = torch.ones(3, requires_grad=True)
    seen = weakref.ref(x.untyped_storage())
    with forget_results():
        y = (recompute(fewer_passes.Square.apply, x, saves_little=True) * w).sum()
    first = torch.autograd.grad(y, w, retain_graph=True)
    del x
    assert torch.equal(*first, *torch.autograd.grad(y, w, retain_graph=True))
    y.backward()
    assert seen() is None and torch.equal(w.grad, *first)  # though y is still here


def test_a_detached_use_may_ask_for_the_result_later():
    x = torch.ones(3, requires_grad=True)
    w = torch.ones(3, requires_grad=True)
    with forget_results():
        y = recompute(fewer_passes.Square.apply, x * 2, saves_little=True)
        detached = (y.detach() * w).sum()
    y.sum().backward()
    detached.backward()
    assert torch.equal(w.grad, torch.full((3,), 4.0))


@pytest.mark.parametrize("saves_little", [False, True])
def test_a_graph_that_is_kept_keeps_nothing_of_its_backward(saves_little, monkeypatch):
    seen = []

    class Seen(recompute_file.Again):
        def __init__(self, *args):
            super().__init__(*args)
            seen.append(self)

    monkeypatch.setattr(recompute_file, "Again", Seen)
    x = torch.randn(4, requires_grad=True) * 1
    w = torch.randn(4, requires_grad=True)
    with forget_results():
        y = (recompute(fewer_passes.Square.apply, x, saves_little=saves_little) * w).sum()
    first = torch.autograd.grad(y, w, retain_graph=True)
    y.backward(retain_graph=True)
    (again,) = seen
    assert not again.found and not again.unpacked and torch.equal(w.grad, *first)
    x.detach().add_(1)
    with pytest.raises(RuntimeError, match="was changed in place"):
        y.backward()


def test_a_function_that_saves_its_result_may_say_that_it_saves_little():
    x = torch.randn(4, requires_grad=True)
    with forget_results():
        y = recompute(torch.exp, x * 1, saves_little=True)
    y.sum().backward()
    assert torch.equal(x.grad, x.detach().exp())


def test_hooks_around_see_each_tensor_of_a_function_that_saves_little_once():
    packed = []
    x = torch.randn(4, 8, requires_grad=True) * 1
    with saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        y = recompute(lambda x: fewer_passes.Normed.apply(x, 1e-6), x, saves_little=True)
    assert packed == [(4, 8), (4, 1)]  # x, and the root mean square of each row
    y.sum().backward()


def test_without_gradients_nothing_is_remembered():
    before = set(RESULTS.values())
    with torch.no_grad(), forget_results():
        y = recompute(F.gelu, torch.ones(3))
        assert set(RESULTS.values()) <= before and not y.requires_grad


def test_a_second_derivative_and_a_retained_graph():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64, requires_grad=True)
    w = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def twice(call):
        with forget_results():
            y = (call(F.gelu, x) * w).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, w], retain_graph=True)
        return [first, *second, *torch.autograd.grad(y, [x, w])]

    assert all(map(torch.equal, twice(recompute), twice(lambda function, x: function(x))))


def test_a_changed_input_or_parameter_is_an_error_and_no_wrong_gradient():
    norm = torch.nn.LayerNorm(4)
    w = torch.randn(4, 4, requires_grad=True)
    for changed in ("x", "gain", "w"):
        x = torch.randn(3, 4, requires_grad=True) * 1
        with forget_results():
            y = recompute(norm, x) @ w
        with torch.no_grad():
            {"x": x, "gain": norm.weight, "w": w}[changed].add_(1)
        with pytest.raises(RuntimeError, match="changed in place after"):
            y.sum().backward()


def part(h, w):
    return casts(h[:, 4:], 1)[0] @ w[4:]


def rows(h, w):
    """As a copy of the first rows would lie in memory, but they are the last."""
    return casts(h[1:], 1)[0] @ w


def repeated(h, w):
    """As many numbers as the whole."""
    return casts(h[1:2].expand(3, 8), 1)[0] @ w


def turned(h, w):
    return w.t() @ casts(h.t(), 1)[0]


def doubled(h, w):
    return h.mul_(2) @ w


def doubled_in_part(h, w):
    h[:, 4:].mul_(2)
    return h @ w


def dropped(h, w):
    torch.manual_seed(0)
    return F.dropout(h, 0.5, inplace=True) @ w


def cast_then_doubled(h, w):
    (before,) = casts(h, 1)
    (after,) = casts(h.mul_(2), 1)
    return before @ w + (after @ w).square()


def cast_doubled(h, w):
    return casts(h, 1)[0].detach().mul_(2) @ w + h.sum()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        part,
        rows,
        repeated,
        turned,
        doubled,
        doubled_in_part,
        dropped,
        cast_then_doubled,
        cast_doubled,
    ],
)
def test_a_part_or_a_changed_result_has_the_gradients_of_plain_autograd(use, autocast):
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, 4, requires_grad=True)

    def found(call):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), forget_results():
            y = use(call(torch.sin, x), w)
        return torch.autograd.grad(y.float().sum(), [x, w])

    assert all(map(torch.equal, found(recompute), found(lambda function, x: function(x))))


def test_a_conjugate_of_a_result_has_the_gradients_of_plain_autograd():
    x = torch.randn(3, 4, dtype=torch.complex64, requires_grad=True)
    w = torch.randn(4, 4, dtype=torch.complex64, requires_grad=True)

    def found(call):
        with forget_results():
            y = call(torch.exp, x).conj() @ w
        return torch.autograd.grad(y.abs().sum(), [w, x])

    assert all(map(torch.equal, found(recompute), found(lambda function, x: function(x))))


def test_a_function_may_change_its_own_result_in_place():
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), forget_results():
        y = recompute(lambda x: x.sin().mul_(2), x) @ w
    found = torch.autograd.grad(y.sum(), [x, w])
    expected = torch.autograd.grad((x.sin() * 2 @ w).sum(), [x, w])
    assert len(kept) == 2 and all(map(torch.equal, found, expected))  # x and w


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func_has_the_gradients_of_plain_autograd(autocast):
    model = gpt("modern")
    if autocast:
        keep_no_copies(model)
    names = [name for name, _ in model.named_parameters()]
    ids = torch.arange(32).view(2, 16)

    def loss(parameters, ids):
        return torch.func.functional_call(model, parameters, (ids[None], ids[None]))

    def loss_of_rows(ids):
        return torch.func.vmap(loss, (None, 0))(dict(model.named_parameters()), ids)[0]

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outside = torch.autograd.grad(loss_of_rows(ids), list(model.parameters()))
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
        expected = torch.autograd.grad(model(ids[:1], ids[:1]), list(model.parameters()))
    rtol = 0.05 if autocast else 1e-5
    for name, one, value in zip(names, outside, expected):
        for found in (one, each[name][0]):
            torch.testing.assert_close(found, value, rtol=0, atol=rtol * value.abs().max())


def test_where_hooks_are_forbidden_forward_and_backward_are_as_without():
    model = gpt("gpt2")
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        found = gradients(model, torch.bfloat16)
    assert all(map(torch.equal, found, gradients(model, torch.bfloat16)))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_on_the_meta_device_gives_its_shapes(arch):
    model = gpt(arch).to("meta")
    keep_no_copies(model)
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    loss = model(ids, ids)
    assert loss.is_meta and loss.requires_grad
    loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("x_shape", [(8,), (5, 8), (2, 5, 8), (0, 8)])
def test_autocast_linear_has_the_gradients_of_torch(x_shape):
    x = torch.randn(x_shape, requires_grad=True)
    weight, bias = torch.randn(3, 8, requires_grad=True), torch.randn(3, requires_grad=True)

    def found(function):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, weight, bias)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, weight, bias])]

    for here, expected in zip(found(linear), found(F.linear)):
        torch.testing.assert_close(here, expected, rtol=0.02, atol=0.02)


def test_autocast_linear_leaves_float64_alone_as_torch_does():
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        for mixed in [(x.float(), weight), (x, weight.float())]:
            with pytest.raises(RuntimeError, match="same dtype"):
                linear(*mixed)


def test_a_function_that_does_something_else_the_second_time_is_an_error():
    calls = []

    def moody(x):
        calls.append(1)
        return x.exp() if len(calls) == 1 else x.exp().sin()

    y = recompute(moody, torch.ones(3, requires_grad=True) * 1)
    with pytest.raises(RuntimeError, match="saved 1 tensors for backward at first and 2 now"):
        y.sum().backward()


def test_hooks_of_a_module_are_called_once_and_may_change_its_result():
    norm = torch.nn.LayerNorm(4)
    calls = []
    norm.register_forward_hook(lambda _, args, out: calls.append(1) or out * 2)
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with forget_results():
        found = torch.autograd.grad((recompute(norm, x) @ w).square().sum(), [x, w])
    assert len(calls) == 1
    expected = torch.autograd.grad((norm(x) @ w).square().sum(), [x, w])
    assert all(map(torch.equal, found, expected))


def test_products_of_one_input_share_its_cast_and_add_up_in_its_dtype():
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = casts(x, 2)
        assert one.dtype == torch.bfloat16 and one.data_ptr() == two.data_ptr()
        assert casts(x.double(), 1)[0].dtype == torch.float64
    small = torch.full_like(one, 2.0**-9)
    (found,) = torch.autograd.grad([one, two], x, [torch.ones_like(one), small])
    assert (found == 1 + 2.0**-9).all()  # in bfloat16 it would be 1
    assert casts(x, 2) == [x, x]


def test_weight_gradients_may_come_later(monkeypatch):
    """As in zero bubble: the inputs of products are computed again for them."""

    def later() -> list:
        model = gpt("modern").double()
        queue = defer_weight_gradients(model)
        ids = torch.arange(32).view(2, 16)
        model(ids, ids).backward()
        weight_gradients(queue)
        return [p.grad for p in model.parameters()]

    found = later()
    plainly(monkeypatch)
    assert all(map(torch.equal, found, later()))


def test_the_second_time_has_the_first_one_s_autocast_and_leaves_nothing():
    """Relu saves its own result: who holds that holds the graph that it is from."""
    results = []
    w = torch.randn(4, 4, requires_grad=True)

    def product(x):
        y = F.relu(x @ w)
        results.append(weakref.ref(y))
        return y

    x = torch.randn(3, 4, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with torch.autocast("cpu", torch.bfloat16), forget_results():
            y = recompute(product, x) @ w
        found = torch.autograd.grad(y.float().sum(), [x, w])
        del y
        assert [y() for y in results] == [None, None]
    finally:
        gc.enable()
    with torch.autocast("cpu", torch.bfloat16):
        y = product(x) @ w
    assert all(map(torch.equal, found, torch.autograd.grad(y.float().sum(), [x, w])))


def test_small_tensors_are_kept(monkeypatch):
    """Python's work would cost more than the memory is worth; the gradients are the same bits."""
    found = []
    for least in (0, 4 * 8 * 8, 4 * 8 * 8 + 1):
        monkeypatch.setattr(recompute_file, "LEAST", least)
        kept = []
        x = torch.arange(64.0).view(8, 8).requires_grad_()
        with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            with forget_results(x):
                y = recompute(torch.nn.functional.gelu, x) @ torch.ones(8, 8, requires_grad=True)
        n_results = len(RESULTS)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        found.append((n_results, gradient))
        del y
    assert [n for n, _ in found] == [1, 1, 0]
    assert torch.equal(found[0][1], found[2][1])
    with torch.autocast("cpu", torch.bfloat16):
        (cast,) = casts(x, 1)
    assert cast is x
