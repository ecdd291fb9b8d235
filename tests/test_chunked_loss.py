"""The loss in chunks is the loss: with every trait and option, in every dtype, on every layout."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matrix import LAYOUTS, MODEL_PARALLEL, difference, sgd

from layers.chunked_loss import chunked_loss
from model import GPT, GPTConfig, initial_weight, loss_fn
from parallel.pipeline import defer_weight_gradients, weight_gradients
from run.auto import with_vocabulary
from run.evaluate import loss_without_bytes
from run.resume import continued
from settings import parse

SIZES = dict(n_layer=1, n_head=2, n_kv_head=2, n_embd=16, block_size=12, vocab_size=40)
TRAITS = {
    "capped by tanh": dict(),
    "capped by a root, with a bias": dict(logit_cap_form="root", head_bias=True),
    "tied, without a cap": dict(tied=True, logit_cap=None, zero_init=False),
    "muP": dict(mup_base_width=8, logit_cap=None),
}


def made(traits: dict, dtype=torch.float64) -> GPT:
    config = GPTConfig(**SIZES, **traits)
    model = GPT(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_weight(config, name, p.shape))
            # The head starts at 0, where every chunk is alike.
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(SIZES["vocab_size"], (3, 13), generator=generator)
    targets = ids[:, 1:].clone()
    targets[1, :3] = -100  # left out
    return ids[:, :-1], targets


def trained(model: GPT, chunk: int | None, scale: float = 1 / 36) -> dict[str, torch.Tensor]:
    model.loss_chunk = chunk
    model.zero_grad(set_to_none=True)
    loss = model(*tokens())
    (loss * scale).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return found | {"loss": loss.detach()}


def furthest(found: dict, expected: dict) -> float:
    """The largest difference, relative to the largest number of each tensor."""
    assert found.keys() == expected.keys()
    apart = [0.0]
    for name, x in expected.items():
        largest = max(x.abs().max().item(), 1e-30)
        apart.append((found[name] - x).abs().max().item() / largest)
    return max(apart)


@pytest.mark.parametrize("z_loss", [None, 0.1])
@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS.keys())
def test_gradients_are_those_of_all_logits_at_once(traits, z_loss):
    model = made(traits)
    if z_loss is not None:
        model.loss_fn = functools.partial(loss_fn, z_loss=z_loss)
    whole = trained(model, None)
    # 36 tokens: in even chunks, with a rest, each token alone, and all of them in one chunk.
    for chunk in (12, 10, 1, 100):
        assert furthest(trained(model, chunk), whole) < 1e-12


def test_evaluation_counts_and_loses_the_same():
    model = made({}).eval()
    with torch.no_grad():
        ids, targets = tokens()
        targets[:, ::2] = model(ids).argmax(-1)[:, ::2]
        loss = model(ids, targets)
        n_correct = model.n_correct
        assert n_correct >= 18
        model.loss_chunk = 10
        assert model(ids, targets).item() == pytest.approx(loss.item(), rel=1e-13)
        assert model.n_correct == n_correct
        # Generation needs the logits.
        assert model(ids).shape == (3, 12, 40)


def test_tokens_without_bytes_are_counted_over_all_chunks():
    model = made({}).eval()
    widths = np.arange(SIZES["vocab_size"]) % 3  # a third of the words have none
    found = []
    with torch.no_grad(), loss_without_bytes(model, widths) as silent:
        for model.loss_chunk in (None, 10):
            silent[0] = 0.0
            model(*(ids.clamp(min=0) for ids in tokens()))
            found.append(silent[0])
    assert found[0] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-13)


def test_a_prior_of_the_logits_is_cut_with_them():
    model = made({})
    prior = torch.randn(3, 12, 40, dtype=torch.float64)
    model.logit_bias = lambda targets: prior
    assert furthest(trained(model, 10), trained(model, None)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_as_near_to_float64_as_without_chunks(dtype):
    exact = trained(made({}), None)
    model = made({}, torch.float32)

    def distance(chunk: int | None) -> float:
        with torch.autocast("cpu", dtype):
            found = trained(model, chunk)
        return furthest({name: x.double() for name, x in found.items()}, exact)

    assert distance(10) < 1.2 * distance(None)


def test_weights_in_bfloat16_sum_their_gradient_in_float32():
    """A sum in bfloat16 stops growing at 256."""
    x = torch.ones(600, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked_loss(x, weight, None, lambda logits, where: logits.float().sum(), 1).backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.item() == 600


def test_frozen_tensors_get_no_gradient_and_a_second_backward_is_refused():
    x = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(5, 4)
    bias = torch.randn(5, requires_grad=True)
    targets = torch.arange(6) % 5

    def loss_of(logits, where):
        return F.cross_entropy(logits, targets[where], reduction="sum")

    loss = chunked_loss(x, weight, bias, loss_of, 4)
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, weight, bias), targets), [x, bias])
    (loss / 6).backward(retain_graph=True)
    torch.testing.assert_close((x.grad, bias.grad), expected)
    assert weight.grad is None
    with pytest.raises(RuntimeError, match="gone back"):
        loss.backward()


def test_no_more_than_a_chunk_of_logits_is_ever_there():
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    model = GPT(GPTConfig(**SIZES | dict(vocab_size=4000, n_embd=4), zero_init=False))
    model.loss_chunk = 8
    model.embed.requires_grad_(False)
    with Sizes():
        model(*tokens()).backward()
    assert largest == 8 * 4000 * 4


def test_zero_bubble_defers_the_blocks_weight_gradients_and_has_the_heads():
    model = made({})
    whole = trained(model, None)
    queue = defer_weight_gradients(model)
    model.loss_chunk = 10
    model.zero_grad(set_to_none=True)
    (model(*tokens()) / 36).backward()
    assert len(queue) == 6  # q, k, v, proj, fc, proj
    assert furthest({"head": model.head.weight.grad}, {"head": whole["head.weight"]}) < 1e-12
    weight_gradients(queue)
    assert (
        furthest({n: p.grad for n, p in model.named_parameters()} | {"loss": whole["loss"]}, whole)
        < 1e-12
    )


# ---- train.py, on layouts ------------------------------------------------------------------------
LARGE = (
    "tp 2 + sp",
    "zero3 2",
    "pp 2 zerobubble",
    "zero1 2 x cp 2 x tp 2 + sp",
    "fsdp 2 x tp 2",
    "pp 2 x tp 2",
    "cp 2",
    "fsdp 2",
    "ddp 2",
)
SETTINGS = ("--z_loss=0.01",)


@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.slow) for name in LARGE])
def test_a_layout_with_chunks_is_one_process_without(layout):
    one = "one process" if layout in LAYOUTS else "one larger process"
    whole = sgd(one, *SETTINGS)
    assert difference(sgd(layout, *SETTINGS, "--loss_chunk=5"), whole) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "track3"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *MODEL_PARALLEL])
def test_every_layout_with_chunks_is_one_process_without(layout, arch):
    settings = f"--arch={arch}", *SETTINGS, "--micro_batch_size=2", "--eval_tokens=144"
    one = "one process" if layout in LAYOUTS else "one larger process"
    found = sgd(layout, *settings, "--loss_chunk=5")
    assert difference(found, sgd(one, *settings)) < 1e-10


def test_auto_means_chunks_for_many_words_and_earlier_runs_stay_whole():
    few = with_vocabulary(parse.parse(["--device=cpu"]), 256)
    assert few.loss_chunk is None
    many = with_vocabulary(parse.parse(["--device=cpu"]), 50257)
    assert many.loss_chunk == 512
    assert with_vocabulary(parse.parse(["--device=cuda"]), 50257).loss_chunk == 4096
    assert with_vocabulary(parse.parse(["--loss_chunk=none"]), 50257).loss_chunk is None
    # A resumed run keeps what it began with; one that knew no chunks had none.
    saved = parse.to_dict(many)
    again = parse.parse(["--device=cpu"])
    assert continued(again, saved, branch=False).loss_chunk == 512
    del saved["loss_chunk"]
    assert continued(again, saved, branch=False).loss_chunk is None
    other = parse.parse(["--loss_chunk=7"])
    assert continued(other, saved, branch=False).loss_chunk == 7
