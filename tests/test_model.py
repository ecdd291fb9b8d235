import pytest
import torch
import torch.nn.functional as F
from harness import init_weights

from layers.fewer_passes import turn
from layers.generation import generate
from model import GPT, Dropout, ForwardContext, GPTConfig, initial_weight, rotary_angles
from settings import fields

TINY = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=16, vocab_size=64)
GPT2 = dict(
    TINY,
    n_kv_head=4,
    norm="layernorm",
    activation="gelu",
    position="learned",
    qk_norm=False,
    tied=True,
    bias=True,
    zero_init=False,
    init="gpt2",
    logit_cap=None,
)
TRACK3 = dict(TINY, **fields.ARCHS["track3"])
QWEN3 = dict(TINY, **fields.ARCHS["qwen3"], head_dim=6, rope_scaling="llama3:4:1:4:16")
ARCHS = [GPTConfig(**TINY), GPTConfig(**GPT2), GPTConfig(**TRACK3), GPTConfig(**QWEN3)]


def tokens(*shape, seed=0, device="cpu"):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def awake(config, device="cpu"):
    """Zero-initialised projections would hide most of the model."""
    model = init_weights(GPT(config).double())
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05)
    return model.to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("config", ARCHS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_every_device_computes_the_loss_and_gradients_of_the_cpu(config, dtype, tolerance, device):
    found = []
    for where in ("cpu", device):
        model = awake(config).to(where, dtype)
        loss = model(tokens(3, 16, device=where), tokens(3, 16, seed=1, device=where))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    (loss, *gradients), (other_loss, *others) = found
    torch.testing.assert_close(other_loss.cpu(), loss, rtol=tolerance, atol=0)
    # A bias of the keys has a gradient of 0, and what rounding leaves of it.
    limit = tolerance * max(x.abs().max().item() for x in gradients)
    for here, there in zip(gradients, others):
        torch.testing.assert_close(there.cpu(), here, rtol=tolerance, atol=limit)


@pytest.mark.parametrize("config", ARCHS)
def test_the_loss_is_the_sum_of_token_losses(config):
    model, x, y = awake(config), tokens(3, 16), tokens(3, 16, seed=1)
    logits = model(x)
    assert logits.shape == (3, 16, 64)
    by_hand = -torch.log_softmax(logits, -1).gather(-1, y[..., None]).sum()
    torch.testing.assert_close(model(x, y), by_hand, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        model(x[:1], y[:1]) + model(x[1:], y[1:]), by_hand, rtol=1e-12, atol=0
    )


@pytest.mark.gpu
@pytest.mark.parametrize("config", ARCHS)
def test_no_token_sees_the_future(config, device):
    model, x = awake(config, device), tokens(1, 16, device=device)
    later = x.clone()
    later[0, 9] = (x[0, 9] + 1) % 64
    a, b = model(x), model(later)
    assert torch.equal(a[:, :9], b[:, :9]) and not torch.equal(a[:, 9], b[:, 9])


@pytest.mark.parametrize("config", ARCHS)
def test_a_model_cut_into_stages_is_the_same_function_with_the_same_names(config):
    model, x, y = awake(config), tokens(2, 16), tokens(2, 16, seed=1)
    first = GPT(config, layers=[0]).double()
    last = GPT(config, layers=[1]).double()
    names = set(dict(first.named_parameters())) | set(dict(last.named_parameters()))
    weights = model.state_dict()
    assert names - {"head.weight"} == set(dict(model.named_parameters())) - {"head.weight"}
    for stage in (first, last):
        stage.load_state_dict({n: weights[n] for n in stage.state_dict()})
    torch.testing.assert_close(last(first(x), y), model(x, y), rtol=1e-12, atol=0)


def test_the_start_depends_on_seed_and_name_alone():
    c = GPTConfig(**TINY)
    whole, part = init_weights(GPT(c)), init_weights(GPT(c, layers=[1]))
    assert torch.equal(whole.blocks["1"].attn.q.weight, part.blocks["1"].attn.q.weight)
    assert not torch.equal(whole.blocks["0"].attn.q.weight, whole.blocks["1"].attn.q.weight)
    torch.rand(7)
    half = init_weights(GPT(c).to(torch.bfloat16))
    assert torch.equal(half.embed.weight, whole.embed.weight.bfloat16())
    other = initial_weight(GPTConfig(**TINY, seed=2), "embed.weight", (64, 32))
    assert not torch.equal(other, whole.embed.weight)


def test_the_start_is_the_same_on_every_machine():
    """A change of these numbers changes every run: it would be a new format."""
    w = initial_weight(GPTConfig(), "blocks.0.attn.q.weight", (256, 256))
    torch.testing.assert_close(
        w[0, :3], torch.tensor([-0.0310739409, 0.0297504682, -0.0086885532]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("config, first_loss", [(ARCHS[0], 4.1589), (ARCHS[1], 4.16)])
def test_the_first_loss_is_a_uniform_guess(config, first_loss):
    model, x = init_weights(GPT(config)), tokens(4, 16)
    assert abs(model(x, tokens(4, 16, seed=1)).item() / 64 - first_loss) < 0.05


def test_scaled_init():
    c = GPTConfig(**GPT2)
    assert abs(initial_weight(c, "blocks.0.mlp.proj.weight", (256, 1024)).std() - 0.02 / 2) < 1e-4
    assert abs(initial_weight(c, "blocks.0.mlp.fc.weight", (1024, 256)).std() - 0.02) < 1e-4
    assert initial_weight(c, "blocks.0.attn_norm.weight", (8,)).eq(1).all()
    assert initial_weight(c, "blocks.0.attn_norm.bias", (8,)).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_computed_in_float32(dtype):
    x = (torch.randn(8, 64) * 300).to(dtype)  # squares overflow float16
    assert torch.equal(
        F.rms_norm(x, (64,), eps=1e-6), F.rms_norm(x.float(), (64,), eps=1e-6).to(dtype)
    )


@pytest.mark.gpu
def test_loss_and_logits_are_float32_under_bf16_autocast(device):
    model, x = init_weights(GPT(GPTConfig(**TINY))).to(device), tokens(2, 16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert model(x).dtype == torch.float32
        assert model(x, x).dtype == torch.float32
    assert model.double()(x).dtype == torch.float64


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.double), torch.randn(1, 1, 1, 8, dtype=torch.double)

    def score(i, j):
        turned = [
            turn(x, *rotary_angles(torch.tensor([n]), 8, torch.double)) for x, n in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(13, 11), rtol=1e-12, atol=1e-12)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_positions_may_be_given_for_a_part_of_the_sequence():
    model, x = awake(GPTConfig(**TINY)), tokens(2, 16)
    torch.testing.assert_close(
        model(x, position_ids=torch.arange(16).expand(2, 16)), model(x), rtol=1e-12, atol=1e-12
    )
    with pytest.raises(ValueError, match="block_size"):
        model(tokens(1, 17))


def test_the_attention_core_is_replaceable():
    model, x = awake(GPTConfig(**TINY)), tokens(2, 16)

    def by_hand(q, k, v):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf).softmax(-1) @ v

    expected = model(x)
    for block in model.blocks.values():
        block.attn.attention_fn = by_hand
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_tied_weights_are_one_parameter():
    model = GPT(GPTConfig(**GPT2))
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_hits_count_the_right_guesses():
    model, x, y = awake(ARCHS[0]).eval(), tokens(3, 16), tokens(3, 16, seed=1)
    model(x, y)
    assert model.n_correct == (model(x).argmax(-1) == y).sum()


# ---- dropout -------------------------------------------------------------------------------------
def masks(config, rows, positions, name="blocks.0.attn", device="cpu"):
    x = torch.ones(len(rows), len(positions), config.n_embd, device=device)
    places, samples = (torch.tensor(ids, device=device) for ids in (positions, rows))
    return Dropout(config, name)(x, ForwardContext(places, samples, None))


@pytest.mark.gpu
def test_a_dropout_mask_depends_on_row_and_position_not_on_the_batch_or_the_device(device):
    c = GPTConfig(dropout=0.25, n_embd=256)
    whole = masks(c, [5, 6, 7, 10**12], list(range(32)))
    there = masks(c, [6, 7], list(range(8, 16)), device=device)
    assert torch.equal(whole[1:3, 8:16], there.cpu())
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, masks(c, [5, 6, 7, 10**12], list(range(32)), "blocks.1.attn"))


def test_dropout_keeps_the_right_share_and_the_mean():
    kept = masks(GPTConfig(dropout=0.25, n_embd=512), list(range(64)), list(range(64)))
    share = (kept > 0).float()
    assert abs(share.mean() - 0.75) < 2e-3  # 2M draws: sd 3e-4
    assert abs(kept.mean() - 1) < 2e-3 and kept.max() == 1 / 0.75
    for dims in (
        (1, 2),
        (0, 2),
        (0, 1),
    ):  # no row, position or channel is special: sd at most 2.4e-3... 6.8e-3
        assert (share.mean(dims) - 0.75).abs().max() < 0.035
    neighbours = ((share[..., 1:] - 0.75) * (share[..., :-1] - 0.75)).mean() / (0.75 * 0.25)
    assert abs(neighbours) < 5e-3


def test_dropout_is_off_in_eval_and_needs_rows_in_training():
    model, x = awake(GPTConfig(**TINY, dropout=0.5)), tokens(2, 16)
    with pytest.raises(ValueError, match="sample_ids"):
        model(x)
    rows = torch.tensor([3, 4])
    assert torch.equal(model(x, sample_ids=rows), model(x, sample_ids=rows)) and not torch.equal(
        model(x, sample_ids=rows), model(x, sample_ids=rows + 1)
    )
    assert torch.equal(model.eval()(x), model(x))


# ---- generation ----------------------------------------------------------------------------------
@pytest.mark.gpu
def test_generation_is_repeatable_and_goes_past_the_block(device):
    model, ids = awake(ARCHS[0], device).eval(), tokens(2, 3, device=device)
    a, b = (generate(model, ids, 20, top_k=5, seed=s) for s in (1, 1))
    assert a.shape == (2, 23) and torch.equal(a, b) and torch.equal(a[:, :3], ids)
    assert not torch.equal(a, generate(model, ids, 20, top_k=5, seed=2))


@pytest.mark.gpu
@pytest.mark.parametrize("config", ARCHS)
def test_kept_keys_and_values_change_nothing(config, device):
    model, ids = awake(config, device).eval(), tokens(2, 3, device=device)
    cores = [block.attn.attention_fn for block in model.blocks.values()]
    got = generate(model, ids, 30, temperature=0)
    start = 0
    for n in range(3, 33):  # without a cache; full at 16 tokens, it goes on from the last 8
        start = n - 8 if n - start > 16 else start
        assert torch.equal(got[:, n], model(got[:, start:n])[:, -1].argmax(-1))
    assert [block.attn.attention_fn for block in model.blocks.values()] == cores


def test_temperature_zero_takes_the_likeliest():
    model, x = awake(ARCHS[0]).eval(), tokens(1, 4)
    assert generate(model, x, 1, temperature=0)[0, -1] == model(x)[0, -1].argmax()
