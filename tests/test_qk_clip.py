"""QK-clip: the largest logits are those of plain scores; where they exceed tau, exactly that head
shrinks."""

import math

import pytest
import torch
from harness import device_flags, gpu, init_weights
from test_train import go

from checkpoint import load
from layers.generation import generate
from metrics import watch
from model import GPT, GPTConfig
from optim import param_groups, qk_clip
from parallel import context
from parallel.mesh import make_mesh
from settings import parse

CPU = torch.device("cpu")
GQA = dict(
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=16,
    block_size=8,
    vocab_size=16,
    qk_norm=False,
    zero_init=False,
)
GPT2 = GQA | dict(
    n_kv_head=4, norm="layernorm", activation="gelu", position="learned", tied=True, bias=True
)


def scores(q, k, places):
    """(B, H, t, T) q·k/√D, later keys -inf, head by head."""
    found = q.new_full((*q.shape[:3], k.shape[2]), -math.inf)
    for h in range(q.shape[1]):
        for i, place in enumerate(places):
            keys = k[:, h * k.shape[1] // q.shape[1], : place + 1]
            found[:, h, i, : place + 1] = (keys * q[:, h, i, None]).sum(-1) / math.sqrt(q.shape[3])
    return found


@pytest.mark.parametrize("most", [1, gpu(100), 2**22])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_the_largest_logits_are_those_of_plain_scores(monkeypatch, most, kv, device):
    monkeypatch.setattr(qk_clip, "MAX_SCORES", most)
    generator = torch.Generator().manual_seed(kv)
    q = torch.randn(3, 4, 12, 6, dtype=torch.float64, generator=generator).to(device)
    k = torch.randn(3, kv, 12, 6, dtype=torch.float64, generator=generator).to(device)
    k[:, :, -1] *= 100  # seen by the last query alone
    for places in (
        torch.arange(12),
        context.position_ids(12, 2, 0),
        context.position_ids(12, 2, 1),
    ):
        places = places.to(device)
        mine = q[:, :, places]
        expected = scores(mine, k, places.tolist()).amax((0, 2, 3))
        torch.testing.assert_close(
            qk_clip.max_logits(mine, k, places), expected, rtol=1e-13, atol=0
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-6), (torch.bfloat16, 2**-8)])
def test_half_precision_does_not_overflow(dtype, tolerance, device):
    q, k = (torch.randn(1, 2, 8, 16).mul(200).to(device, dtype) for _ in range(2))
    expected = scores(q.double(), k.double(), range(8)).amax((0, 2, 3))
    assert expected.max() > 65504 / 4
    with torch.autocast(device.type, dtype):
        found = qk_clip.max_logits(q * 4, k * 4, torch.arange(8, device=device)) / 16
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)


def test_each_heads_logits_are_scaled_by_its_own_factor():
    top = torch.tensor([[50.0, 100, 200, 400, math.nan, math.inf, -3, 101]], dtype=torch.float64)
    q, k = qk_clip.factors(top, 100.0, 4)
    product = q * k.repeat_interleave(2, -1)
    expected = torch.tensor([[1, 1, 1 / 2, 1 / 4, 1, 1, 1, 100 / 101]], dtype=torch.float64)
    torch.testing.assert_close(product, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(k, torch.tensor([[1, 1 / 2, 1, (100 / 101) ** 0.5]]).double())
    q, k = qk_clip.factors(top[:, :4], 100.0, 4)
    torch.testing.assert_close(q, k, rtol=1e-14, atol=0)  # no sharing: the square root each
    assert (q[0, :2] == 1).all()


def batch(seed, device=CPU):
    return torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(seed)).to(device)


class Scores:
    """In place of attention: softmax by hand, and the largest logit of each head."""

    def __init__(self, window=None):
        self.top, self.window = -math.inf, window

    def __call__(self, q, k, v):
        s = scores(q.detach(), k.detach(), range(q.shape[2]))
        if self.window is not None:
            s = s.masked_fill(torch.ones_like(s).tril(-self.window) > 0, -math.inf)
        self.top = torch.maximum(s.amax((0, 2, 3)), torch.as_tensor(self.top).to(s))
        full = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / math.sqrt(q.shape[3])
        full = full.masked_fill(s == -math.inf, -math.inf).softmax(-1)
        return full @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)


def watched(shape, lr, tau, every=None, device=CPU):
    model = init_weights(GPT(GPTConfig(**shape)).double())
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):  # biases too
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).double() * 0.3)
    model.to(device)
    groups = param_groups.param_groups(model, dict.fromkeys(watch.KINDS, lr), 0.0)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    watcher = watch.Watch(make_mesh(device), model, optimizer, {}, dict.values, every, tau)
    return model, optimizer, watcher


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [GQA, GPT2])
def test_steps_are_those_by_hand(shape, device):
    model, optimizer, watcher = watched(shape, 1e-3, 0.5, device=device)
    hand, plain, _ = watched(shape, 1e-3, None, device=device)
    clipped, kv, D = 0, shape["n_kv_head"], shape["n_embd"] // shape["n_head"]
    for step in range(3):
        watcher.start(step)
        cores = [Scores() for _ in hand.blocks]
        for block, core in zip(hand.blocks.values(), cores):
            block.attn.attention_fn = core
        for part in batch(step, device).chunk(2):  # two micro-batches
            for m in (model, hand):
                m(part[:, :-1], part[:, 1:]).backward()
        optimizer.step(), plain.step()
        with torch.no_grad():
            for block, core in zip(hand.blocks.values(), cores):
                gamma = [min(1.0, 0.5 / s) if s > 0 else 1.0 for s in core.top.tolist()]
                clipped += sum(g < 1 for g in gamma)
                for j in range(kv):
                    heads = range(j * len(gamma) // kv, (j + 1) * len(gamma) // kv)
                    least = min(gamma[h] for h in heads)
                    for p in block.attn.k.parameters():
                        p[j * D : (j + 1) * D] *= math.sqrt(least)
                    for p in block.attn.q.parameters():
                        for h in heads:
                            p[h * D : (h + 1) * D] *= gamma[h] / math.sqrt(least)
        optimizer.zero_grad(), plain.zero_grad()
        for (name, p), q in zip(model.named_parameters(), hand.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=name)
    assert 0 < clipped < 3 * 2 * shape["n_head"], "all or nothing proves little"


@pytest.mark.gpu
def test_the_same_rows_then_reach_tau_and_no_more(device):
    model, optimizer, watcher = watched(GQA, 0.0, 3.6, device=device)
    x, attention, seen = batch(0, device)[:, :-1], model.blocks["0"].attn, []
    for _ in range(2):
        watcher.start(0)
        model(x, x).backward()
        seen.append(watcher.max_logit[0].clone())
        optimizer.step()
    expected = seen[0].clamp(max=3.6)
    torch.testing.assert_close(seen[1], expected, rtol=1e-12, atol=0)
    assert (seen[0] > 3.6).any() and (seen[0] < 3.6).any()
    before, watcher.max_logit = (
        attention.q.weight.clone(),
        torch.full_like(watcher.max_logit, math.nan),
    )
    optimizer.step()
    assert torch.equal(attention.q.weight, before)


def test_evaluation_and_generation_are_not_looked_at():
    model, optimizer, watcher = watched(GQA, 0.0, 1e-6)
    watcher.start(0)
    model.eval()
    model(batch(0)[:, :-1])
    generate(model, batch(0)[:, :2], 3)
    model.train()
    assert (watcher.max_logit == -math.inf).all()


@pytest.mark.gpu
def test_a_resumed_run_is_the_same_bits(tmp_path, text, device, deterministic):
    flags = [
        *device_flags(device),
        "--qk_norm=false",
        "--qk_clip=0.01",
        "--zero_init=false",
        "--schedule=constant",
    ]
    for run, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        go(text, tmp_path / run, *flags, f"--steps={steps}", "--save_every=2")
    whole, parts = (load.newest(tmp_path / run).weights("model") for run in ("whole", "parts"))
    for name in ("blocks.0.attn.q.weight", "blocks.1.attn.k.weight"):
        assert torch.equal(whole(name, (32, 32)), parts(name, (32, 32)))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--qk_clip=100"], "--qk_norm=false"),
        (["--qk_clip=100", "--arch=gpt2", "--qk_norm=true"], "--qk_norm=false"),
        (["--qk_clip=100", "--qk_norm=false", "--diloco_every=5"], "leave one of them out"),
        (["--qk_clip=0", "--qk_norm=false"], "--qk_clip=none"),
    ],
)
def test_what_cannot_be_is_refused(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse.parse(flags)
    parse.parse(["--qk_clip=100", "--arch=gpt2"])


def test_a_second_set_of_weights_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="optim=schedule_free keeps a second set"):
        go(text, tmp_path, "--qk_norm=false", "--qk_clip=100", "--optim=schedule_free")
