"""A window is a mask written out, in stretches or by FlexAttention, on every layout and token by
token."""

import pytest
import torch
from harness import device_flags, gpu, init_weights
from matrix import assert_one_process
from test_qk_clip import scores

import train
from layers import attention
from layers.attention import causal_attention, choose, plain_attention
from layers.generation import generate
from metrics.logger import read_metrics
from model import GPT, GPTConfig
from optim import qk_clip
from run import auto
from settings import parse


def qkv(T: int, kv: int, dtype=torch.float64, grad=True, D=6, device="cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T + kv)
    shapes = ((2, 4, T, D), (2, kv, T, D), (2, kv, T, D))
    drawn = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
    return [x.to(device).requires_grad_(grad) for x in drawn]


def seen(T: int, window: int) -> torch.Tensor:
    window = window or T
    return torch.tensor([[i - window < j <= i for j in range(T)] for i in range(T)])


def by_hand(q, k, v, window):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    products = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(
        ~seen(q.shape[2], window).to(q.device), -torch.inf
    )
    return products.softmax(-1) @ v


@pytest.mark.parametrize("attend", [causal_attention, plain_attention])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize(
    "T, window",
    [(12, 1), (12, 4), (12, 5), (13, 12), gpu(13, 7), (24, 3), (8, 8), (8, 30), (12, None)],
)
def test_a_window_is_the_mask_written_out_and_so_are_its_gradients(
    T, window, kv, attend, device, monkeypatch
):
    monkeypatch.setattr(attention, "CHUNK", 5)
    inputs = qkv(T, kv, device=device)
    outs = [f(*inputs, window) for f in (attend, by_hand)]
    weights = torch.randn(outs[0].shape, dtype=torch.float64).to(device)
    grads = [torch.autograd.grad((out * weights).sum(), inputs) for out in outs]
    for found, expected in zip([outs[0], *grads[0]], [outs[1], *grads[1]]):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_written_out_it_is_torchs_kernel_and_in_bfloat16_no_further_from_the_truth_than_rounding(
    kv, device
):
    inputs = qkv(40, kv, device=device)
    found, expected = (choose(kind, None)(*inputs) for kind in ("plain", "sdpa"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    half = [choose(kind, None)(*(x.bfloat16() for x in inputs)) for kind in ("plain", "sdpa")]
    assert [x.dtype for x in half] == [torch.bfloat16] * 2
    off = [(x - expected).square().mean().sqrt().item() for x in half]
    # A GPU's kernel keeps its scores in float32.
    assert off[0] < (2 if device.type == "cpu" else 4) * off[1] < 0.02


@pytest.mark.parametrize("window", [None, 5, 128, 130])
def test_flex_attention_sees_the_same(window):
    inputs = qkv(300, 2, torch.float32, grad=False)  # 3 blocks of 128
    with torch.no_grad():
        found, expected = (choose(kind, window)(*inputs) for kind in ("flex", "sdpa"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_flex_attention_has_the_same_gradients(device):
    inputs = qkv(300, 2, torch.float32, D=32, device=device)
    if device.type == "cpu":
        pytest.skip("torch has no backward of FlexAttention on a CPU")
    grads = [
        torch.autograd.grad(choose(kind, 70)(*inputs).square().sum(), inputs)
        for kind in ("flex", "sdpa")
    ]
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_the_largest_logits_are_those_that_are_seen():
    q, k, _ = qkv(12, 2, grad=False)
    k[:, :, 0] *= 100  # seen by the first four alone
    unseen = scores(q, k, range(12)).masked_fill(~seen(12, 4), -torch.inf)
    found = qk_clip.max_logits(q, k, torch.arange(12), 4)
    torch.testing.assert_close(found, unseen.amax((0, 2, 3)), rtol=1e-13, atol=0)
    assert not torch.equal(found, qk_clip.max_logits(q, k, torch.arange(12)))


SHAPE = dict(
    n_layer=2, n_head=4, n_kv_head=2, n_embd=16, block_size=14, vocab_size=50, zero_init=False
)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 3, 9])
def test_what_is_generated_token_by_token_is_what_whole_rows_say(length, device):
    models = [init_weights(GPT(GPTConfig(**SHAPE, window=w)).double().eval()) for w in (4, None)]
    models = [model.to(device) for model in models]
    ids = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(length)).to(device)
    found = generate(models[0], ids, 14 - length, temperature=0)
    for n in range(length, 14):
        assert torch.equal(models[0](found[:, :n])[:, -1].argmax(-1), found[:, n])
    ids = torch.randperm(28, generator=torch.Generator().manual_seed(length)).view(2, 14)
    ids = ids.to(device)
    differ = (models[0](ids) - models[1](ids)).abs() > 1e-9
    assert not differ[:, :4].any() and differ[:, 4:].any(-1).all()


def test_a_full_block_goes_on_from_its_last_half():
    model = init_weights(GPT(GPTConfig(**SHAPE, window=4)).double().eval())
    ids = torch.randint(50, (2, 3), generator=torch.Generator().manual_seed(0))
    found, start = generate(model, ids, 30, temperature=0), 0
    for n in range(3, 33):
        start = n - 7 if n - start > 14 else start
        assert torch.equal(model(found[:, start:n])[:, -1].argmax(-1), found[:, n])


FLAGS = ["--window=3"]
SOME = ["ddp 2", "zero3 2", "fsdp 2", "tp 2 + sp", "cp 2 ulysses", "pp 2 1f1b"]
FAST = ("cp 2 ulysses",)


@pytest.mark.parametrize("flags", [FLAGS, [*FLAGS, "--attention=plain"]])
@pytest.mark.parametrize(
    "layout", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in SOME]
)
def test_every_layout_is_one_process(layout, flags):
    assert_one_process(layout, *flags)


WORDS = [
    "--n_layer=2",
    "--n_embd=16",
    "--n_head=2",
    "--block_size=16",
    "--batch_size=4",
    "--window=5",
    "--steps=4",
    "--eval_tokens=64",
    "--eval_every=4",
    "--sample_tokens=8",
    "--precision=fp64",
    "--save_every=0",
    "--peak_flops=1e9",
]


@pytest.mark.parametrize(
    "more",
    [
        gpu(["--activation_checkpoint=selective"]),
        ["--activation_checkpoint=attention"],
        ["--attention=plain"],
        ["--activation_checkpoint=selective", "--attention=plain"],
        pytest.param(["--compile=default", "--compile.backend=aot_eager"], marks=pytest.mark.slow),
    ],
)
def test_recomputed_or_compiled_it_is_the_same_run(tmp_path, text, more, device):
    def losses(*words):
        train.main(
            parse.parse(
                [
                    f"--data={text}",
                    f"--out_dir={tmp_path / 'run'}",
                    "--resume=never",
                    *device_flags(device),
                    *WORDS,
                    *words,
                ]
            )
        )
        rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
        return [
            row[name] for row in rows for name in ("loss", "grad_norm", "val_loss") if name in row
        ]

    assert losses(*more) == pytest.approx(losses(), rel=1e-10)


def test_a_window_counts_in_the_utilisation(tmp_path, text):
    """12 L C T of attention, T being what a query sees."""

    def flops(*words):
        train.main(
            parse.parse(
                [
                    f"--data={text}",
                    f"--out_dir={tmp_path / 'run'}",
                    "--resume=never",
                    *WORDS,
                    *words,
                ]
            )
        )
        row = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "mfu" in row][-1]
        return row["mfu"] * 1e9 / row["tokens_per_s"]

    assert flops("--window=none") - flops() == pytest.approx(12 * 2 * 16 * (16 - 5))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--window=256"], "window=256 is no window over block_size=256 tokens"),
        (["--window=0"], "window=0 is out of range"),
        (["--window=8", "--cp=2"], "window=8 is incompatible with cp_attention=ring.*ulysses"),
        (["--attention=flex", "--n_embd=64", "--n_head=8"], "no kernel for heads of 8.*--n_head"),
        (
            ["--attention=flex", "--cp=2"],
            "attention=flex is incompatible with cp_attention=ring.*ulysses",
        ),
        (["--attention=flex", "--precision=fp64"], "no kernel for float64.*--precision=fp32"),
    ],
)
def test_what_cannot_be_is_said(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse.parse(flags)


def test_flex_attention_without_a_gpu_is_said(tmp_path, text):
    cfg = parse.parse(
        [f"--data={text}", f"--out_dir={tmp_path}", "--attention=flex", "--device=cpu"]
    )
    with pytest.raises(ValueError, match="attention=flex is for GPUs.*--attention=sdpa"):
        train.main(cfg)


def test_plain_attention_for_transforms_autocast_and_one_backward():
    q, k, v = qkv(9, 2)
    inputs = q.detach(), k.detach(), v.detach()
    found, expected = (
        torch.func.grad(lambda *x: f(*x, None).sin().sum(), (0, 1, 2))(*inputs)
        for f in (plain_attention, by_hand)
    )
    for ours, plain in zip(found, expected):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-13)
    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.autograd.grad(plain_attention(q, k, v).sum(), q, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain_attention(*(x.float() for x in inputs)).dtype == torch.bfloat16
        assert plain_attention(*inputs).dtype == torch.float64


def test_plain_attention_takes_what_the_kernel_takes():
    q, k, v = qkv(9, 2)
    for empty in (plain_attention, attention.causal_attention):
        assert empty(q[:0], k[:0], v[:0]).shape == q[:0].shape
    assert plain_attention(q.to("meta"), k.to("meta"), v.to("meta")).shape == q.shape
    single = [x.detach().float().requires_grad_() for x in (q, k, v)]
    plain = torch.autograd.grad(plain_attention(*single).sin().sum(), single)
    loss = plain_attention(*single).sin().sum()
    with torch.autocast("cpu", torch.bfloat16):
        within = torch.autograd.grad(loss, single)
    assert all(map(torch.equal, within, plain))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q.detach(), torch.ones_like(q))
        y = plain_attention(dual, k.detach(), v.detach())
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    _, expected = torch.func.jvp(
        lambda q: by_hand(q, k.detach(), v.detach(), None), (q.detach(),), (torch.ones_like(q),)
    )
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-13)


def test_probabilities_of_keys_that_nobody_sees_are_not_kept(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 4)
    numbers = []

    def pack(x):
        numbers.append(x.numel())
        return x

    q, k, v = qkv(12, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        plain_attention(q, k, v)
    pairs = 2 * 4 * 4  # sequences, heads, queries of a chunk
    assert numbers[3:] == [pairs * 4, pairs * 8, pairs * 12]


@pytest.mark.parametrize(
    "flags, kind, expected",
    [
        ([], "cpu", "plain"),
        (["--precision=fp64"], "cpu", "sdpa"),
        (["--block_size=512"], "cpu", "plain"),
        (["--block_size=1024"], "cpu", "sdpa"),
        (["--window=64"], "cpu", "sdpa"),
        (["--attention=sdpa"], "cpu", "sdpa"),
        (["--cp=2"], "cpu", "sdpa"),
        (["--cp=2", "--cp_attention=ulysses"], "cpu", "plain"),
        ([], "cuda", "sdpa"),
    ],
)
def test_auto_takes_the_faster_kernel(flags, kind, expected):
    cfg = parse.parse(flags)
    precision = "bf16" if cfg.precision == "auto" else cfg.precision
    assert auto.resolve_attention(cfg, precision, torch.device(kind)) == expected
