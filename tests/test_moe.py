"""The layer of experts beside a loop over tokens, in float64: outputs, gradients, counts, terms."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import layers.moe
from layers.moe import MoE, sort, update_bias
from layers.recompute import forget_results
from model import MLP, GPTConfig
from precision import onednn

C, WIDTH = 16, 24


def made(
    activation="swiglu",
    bias=False,
    router="softmax",
    normalize=True,
    shared=False,
    n=5,
    k=2,
    z_loss=0.3,
    sequence_loss=0.7,
    dtype=torch.float64,
):
    c = GPTConfig(n_embd=C, activation=activation, bias=bias)
    torch.manual_seed(0)
    layer = MoE(
        C,
        [MLP(c, WIDTH) for _ in range(n)],
        k,
        MLP(c, WIDTH) if shared else None,
        router,
        normalize,
        z_loss,
        sequence_loss,
    ).to(dtype)
    layer.selection_bias.copy_(0.1 * torch.randn(n))
    layer.loss_scale = 0.37
    return layer


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def largest(scores, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: (-scores[e].item(), e))[:k]


def loop(layer: MoE, x):
    """Token by token: (outputs, what is minimised besides times its scale, counts)."""
    n, k = len(layer.experts), layer.n_active
    counts, outputs, term = [0] * n, [], 0.0
    for sequence in x:
        held, shares = [0] * n, [0.0] * n
        for token in sequence:
            logits = [token @ w for w in layer.router.weight]
            if layer.score is torch.sigmoid:
                scores = [1 / (1 + (-v).exp()) for v in logits]
            else:
                scores = [v.exp() / sum(u.exp() for u in logits) for v in logits]
            chosen = largest([s + b for s, b in zip(scores, layer.selection_bias)], k)
            total = sum(scores[e] for e in chosen) if layer.normalize else 1.0
            y = sum(scores[e] / total * layer.experts[str(e)](token) for e in chosen)
            outputs.append(y if layer.shared is None else y + layer.shared(token))
            for e in chosen:
                counts[e] += 1
            for e in largest(scores, k):
                held[e] += 1
            for e in range(n):
                shares[e] = shares[e] + scores[e] / sum(scores)
            if layer.z_loss is not None:
                term = term + layer.z_loss * sum(v.exp() for v in logits).log() ** 2
        T = len(sequence)
        if layer.sequence_loss is not None:
            for e in range(n):
                term = term + layer.sequence_loss * T * (n / (k * T) * held[e]) * (shares[e] / T)
    return torch.stack(outputs).view(x.shape), layer.loss_scale * term, counts


def gradients(layer, x, loss):
    """Of all weights and of x, None where there is none."""
    layer.zero_grad()
    x.grad = None
    loss.backward()
    named = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
    return {name: None if g is None else g.clone() for name, g in named.items()}


def assert_is_the_loop(layer, x, tolerance=1e-12):
    weights = drawn(*x.shape)
    x = x.detach().requires_grad_()
    with forget_results():
        y = layer(x)
    found = gradients(layer, x, (y * weights).sum())
    expected, term, counts = loop(layer, x)
    plain = gradients(layer, x, (expected * weights).sum() + term)
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)
    for name, g in plain.items():
        zeros = torch.zeros_like(dict(layer.named_parameters()).get(name, x))
        torch.testing.assert_close(
            found[name], zeros if g is None else g, rtol=0, atol=tolerance, msg=name
        )
    assert layer.counts.tolist() == counts


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize(
    "activation, bias, router, normalize, shared",
    [
        ("swiglu", False, "softmax", True, False),
        ("swiglu", True, "sigmoid", True, True),
        ("relu2", False, "sigmoid", False, False),
        ("relu2", True, "softmax", False, True),
        ("gelu", True, "softmax", True, False),
    ],
)
def test_the_layer_is_a_loop_over_tokens(
    monkeypatch, block, activation, bias, router, normalize, shared
):
    monkeypatch.setattr(layers.moe, "BLOCK", block)
    layer = made(activation, bias, router, normalize, shared)
    assert_is_the_loop(layer, drawn(3, 7, C))
    assert layer.terms[2] > 0  # log Z


@pytest.mark.parametrize("terms", [(None, None), (0.3, None), (None, 0.7)])
def test_each_term_is_on_or_off(terms):
    assert_is_the_loop(made(z_loss=terms[0], sequence_loss=terms[1]), drawn(2, 5, C))


@pytest.mark.parametrize("k, n", [(1, 3), (3, 3), (2, 2)])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
def test_one_expert_a_token_or_all_of_them(k, n, shape):
    assert_is_the_loop(made(n=n, k=k), drawn(*shape, C))


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_all_tokens_to_one_expert_leave_the_others_gradients_of_zero(monkeypatch, bias, block):
    monkeypatch.setattr(layers.moe, "BLOCK", block)
    layer = made("relu2", bias=bias, k=1)
    layer.selection_bias.copy_(torch.tensor([0.0, 0, 9, 0, 0]))
    x = drawn(2, 6, C).requires_grad_()
    assert_is_the_loop(layer, x)
    assert layer.counts.tolist() == [0, 0, 12, 0, 0]
    found = gradients(layer, x, layer(x).sum())
    for e in "0134":
        for name, g in found.items():
            if name.startswith(f"experts.{e}."):
                assert g is not None and not g.any()
    # Loads that differ by more than ten times.
    layer.selection_bias.zero_()
    layer.counts.zero_()
    x = drawn(4, 40, C) + 2 * layer.router.weight[1].detach() / layer.router.weight[1].norm()
    assert_is_the_loop(layer, x)
    assert max(layer.counts) > 10 * (min(layer.counts) + 1)


def test_of_equal_scores_the_lower_index_is_chosen():
    layer = made(k=2)
    assert layer.choose(torch.tensor([1.0, 3, 3, 3, 1])).tolist() == [1, 2]
    assert layer.choose(torch.zeros(4, 7, 5)).tolist() == [[[0, 1]] * 7] * 4
    with torch.no_grad():
        layer.router.weight.zero_()
    layer.selection_bias.zero_()
    layer(drawn(2, 3, C)).sum().backward()
    assert layer.counts.tolist() == [6, 6, 0, 0, 0]


def test_a_bias_moves_the_choice_and_no_gate():
    layer = made(n=3, k=3)
    x = drawn(2, 4, C)
    before = layer(x)
    layer.selection_bias.copy_(torch.tensor([5.0, -5, 1]))
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n, k, block, least", [*itertools.product([1, 6], [1, 3], [1, 4], [0, 1])])
def test_rows_lead_to_tokens_and_slots_to_rows(n, k, block, least):
    scores = torch.rand(9, max(n, k) + 1, generator=torch.Generator().manual_seed(n + k))
    chosen = scores.argsort()[:, :k]
    n_expert = scores.shape[1] + 1  # the last one gets nothing
    rows, ends, slots, counts = sort(chosen, n_expert, block, least)
    assert counts.tolist() == [(chosen == e).sum().item() for e in range(n_expert)]
    assert (rows[slots] == torch.arange(9).unsqueeze(1)).all()
    assert (rows == 9).sum() == len(rows) - 9 * k  # the others are zeros
    assert len({*slots.flatten().tolist()}) == 9 * k and ends[-1] == len(rows)
    starts = [0, *ends.tolist()]
    for e in range(n_expert):
        where = (chosen == e).nonzero().tolist()
        found = [slots[t, j].item() for t, j in where]
        assert found == list(range(starts[e], starts[e] + counts[e]))  # by token, side by side
        size = starts[e + 1] - starts[e]
        assert size % block == 0 and size >= max(least, counts[e])
    # As many rows whatever the choice: no shape depends on it.
    assert len(rows) == len(sort(torch.zeros_like(chosen), n_expert, block, least).rows)


# ---- what is counted, and when -------------------------------------------------------------------
def test_an_evaluation_and_a_forward_that_is_computed_again_count_nothing():
    layer = made()
    x = drawn(2, 5, C).requires_grad_()
    with torch.no_grad():
        layer(x)
    layer(x)  # without a backward
    assert layer.counts.sum() == 0 and not layer.terms.any()
    layer(x).sum().backward()
    once, terms = layer.counts.clone(), layer.terms.clone()
    assert once.sum() == 20 and (terms > 0).all()
    plain = x.grad.clone()
    x.grad = None
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(layer.counts, 2 * once) and torch.equal(layer.terms, 2 * terms)
    assert torch.equal(x.grad, plain)


def test_micro_batches_count_and_add_up_to_the_batch():
    layer = made()
    x = drawn(4, 5, C)
    whole = gradients(layer, x.requires_grad_(), layer(x).sum())
    counts, terms = layer.counts.clone(), layer.terms.clone()
    layer.counts.zero_()
    layer.terms.zero_()
    layer.zero_grad()
    for part in x.detach().split(1):
        layer(part).sum().backward()
    assert torch.equal(layer.counts, counts)
    torch.testing.assert_close(layer.terms, terms, rtol=1e-6, atol=0)  # float32 sums
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=0, atol=1e-13)


def test_terms_change_gradients_and_never_the_value():
    layer = made()
    x = drawn(2, 5, C).requires_grad_()
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    layer.loss_scale = 0.0
    off = gradients(layer, x, layer(x).sum())
    for scale in (1.0, 1000.0):
        layer.loss_scale = scale
        on = gradients(layer, x, layer(x).sum())
        difference = on["router.weight"] - off["router.weight"]
        if scale == 1:
            first = difference
    torch.testing.assert_close(difference, 1000 * first, rtol=1e-9, atol=0)


def test_the_bias_goes_towards_even_loads():
    bias = torch.zeros(2, 4, dtype=torch.float64)
    update_bias(bias, torch.tensor([[7, 1, 4, 4], [4, 4, 4, 4]]), 0.25)
    assert bias.tolist() == [[-0.25, 0.25, 0, 0], [0, 0, 0, 0]]
    # A mean that is no whole number, and loads that float32 would round.
    update_bias(bias, torch.tensor([[2, 2, 2, 1], [2**40, 2**40 + 1, 2**40, 2**40]]), 0.25)
    assert bias.tolist() == [[-0.5, 0, -0.25, 0.25], [0.25, -0.25, 0.25, 0.25]]


# ---- the other ways to multiply ------------------------------------------------------------------
def results(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    found = gradients(layer, x, (y * drawn(*x.shape, dtype=x.dtype)).sum())
    return {"y": y.detach()} | found


@pytest.mark.parametrize("bias", [False, True])
def test_each_expert_by_its_own_forward_is_the_same(bias):
    layer = made(bias=bias)
    x = drawn(3, 7, C)
    expected = results(layer, x)
    layer.experts.product = None
    for name, found in results(layer, x).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-12, msg=name)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_torch_s_kernel_is_the_same(monkeypatch, dtype, tolerance, activation):
    """On a CPU the kernel takes no float64."""
    layer = made(activation, k=1, dtype=dtype)
    layer.selection_bias.copy_(torch.tensor([0.0, -9, 0, 0, 0]))  # an expert without tokens
    x = drawn(3, 7, C, dtype=dtype)
    expected = results(layer, x)
    asked = []
    monkeypatch.setattr(layers.moe, "has_kernel", lambda x, *widths: asked.append(widths) or True)
    for name, found in results(layer, x).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(found, expected[name], rtol=0, atol=tolerance * scale, msg=name)
    assert {*asked} == {(C, WIDTH), (WIDTH, C)}


def test_torch_func_sees_the_same_gradients():
    layer = made(z_loss=None, sequence_loss=None)
    x = drawn(2, 5, C).requires_grad_()
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    found = torch.func.grad(loss)(weights)
    expected = gradients(layer, x, layer(x).square().sum())
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], rtol=0, atol=1e-12, msg=name)


def test_autocast_leaves_the_router_in_float32_and_keeps_no_copy_of_a_weight():
    layer = made(dtype=torch.float32)
    x = drawn(4, 9, C, dtype=torch.float32).requires_grad_()
    logits, kept = [], []
    plain = layer.score
    layer.score = lambda x: logits.append(x) or plain(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
    exact = x @ layer.router.weight.t()
    assert logits[0].dtype == torch.float32 and torch.equal(logits[0], exact)
    shapes = {tuple(p.shape) for p in layer.experts.parameters()}
    copies = [t for t in kept if tuple(t.shape) in shapes and t.dtype == torch.bfloat16]
    assert not copies and y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y.float(), rtol=0.1, atol=0.1)


def test_the_kernel_is_for_rows_of_16_bytes_on_a_gpu():
    class Rows:
        is_cuda, itemsize, dtype = True, 2, torch.bfloat16

    kernel = hasattr(F, "grouped_mm")
    assert layers.moe.has_kernel(Rows, 16, 24) == kernel and not layers.moe.has_kernel(Rows, 16, 20)
    assert not layers.moe.has_kernel(torch.zeros(2, 16), 16, 24)
    Rows.itemsize, Rows.dtype = 8, torch.float64
    assert not layers.moe.has_kernel(Rows, 16, 24)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_scores_too_small_for_float32_still_share_a_token_out(router):
    """All chosen scores are 0 in float32: the bias has outvoted the large one."""
    layer = made(router=router, dtype=torch.float32)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([0.0, -900, -900, -910, -910])
    layer.selection_bias.copy_(torch.tensor([-9.0, 0, 0, 0, 0]))
    x = torch.ones(2, 3, C)
    found = results(layer, x)
    assert all(g.isfinite().all() for g in found.values())
    expected = (layer.experts["1"](x) + layer.experts["2"](x)) / 2
    torch.testing.assert_close(found["y"], expected.detach(), rtol=1e-5, atol=1e-5)


def test_what_a_step_counts_moves_with_the_layer_and_is_not_saved():
    layer = made().to("meta")
    assert layer.counts.is_meta and layer.terms.is_meta
    assert "selection_bias" in layer.state_dict() and "counts" not in layer.state_dict()


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch lacks oneDNN"
)
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_onednn_s_products_are_the_same_also_of_no_rows(activation):
    layer = made(activation, k=1, bias=True, dtype=torch.float32)
    layer.selection_bias.copy_(torch.tensor([0.0, -9, 0, 0, -9]))
    x = drawn(3, 7, C, dtype=torch.float32)
    expected = results(layer, x)
    layer.experts.product = onednn.matmul
    for name, found in results(layer, x).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4, msg=name)
