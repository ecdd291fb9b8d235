"""Documents that do not see each other: each is to the model what it is alone.

The oracle knows no mask: it runs the same weights over each document by itself.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matrix import LAYOUTS, MODEL_PARALLEL, TINY, assert_one_process, runs, text

import train
from data.dataset import Tokens
from data.tokenizer import Tokenizer
from layers import attention, document_mask
from layers.generation import generate
from memory import activation_checkpoint
from metrics.watch import Watch
from model import GPT, GPTConfig, initial_weight
from run import auto, pretrained, summary
from run.evaluate import sample
from run.microbatches import MicroBatches
from settings import parse

SLOW = pytest.mark.slow
D = 0  # the token with which a document begins


def make(**traits) -> GPT:
    size = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, block_size=24, vocab_size=8)
    # Nothing at zero, and no large weights: every part of the model has to show.
    config = GPTConfig(**size | dict(zero_init=False, init="torch") | traits)
    model = GPT(config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_weight(config, name, tuple(p.shape)))
            if name == "grams.weight":
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


def some_ids() -> torch.Tensor:
    """(3, 25): short and long documents, empty ones, one that begins a row, one that ends it."""
    ids = torch.randint(1, 8, (3, 25), generator=torch.Generator().manual_seed(0))
    for row, place in (0, 5), (0, 6), (0, 17), (1, 0), (1, 23), (2, 12), (2, 24):
        ids[row, place] = D
    return ids


def documents(ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets) of each document, (1, its length)."""
    found = []
    for row in ids.split(1):
        begins = [0, *(i for i in range(1, 24) if row[0, i] == D), 24]
        for begin, end in itertools.pairwise(begins):
            found.append((row[:, begin:end], row[:, begin + 1 : end + 1]))
    return found


TRAITS = {
    "sdpa": {},
    "plain": dict(attention="plain"),
    "sdpa, window 6": dict(window=6),
    "sdpa, window 2": dict(window=2),
    "sdpa, as wide as the sequence": dict(window=24),
    "plain, window 6": dict(window=6, attention="plain"),
    "learned positions, a head for all": dict(position="learned", n_kv_head=4),
    "half of a head turns": dict(position="rotary_half", qk_norm="gain"),
    "n-grams": dict(ngram_embed=3, ngram_rows=64),
    "experts": dict(n_expert=3, router_z_loss=0.01),
}


@pytest.mark.parametrize("traits", TRAITS.values(), ids=TRAITS)
def test_loss_and_gradients_are_those_of_each_document_alone(traits):
    ids = some_ids()
    masked = make(document_mask=True, document_token=D, **traits)
    alone = make(**traits)
    loss = masked(ids[:, :-1], ids[:, 1:])
    loss.backward()
    total = 0.0
    for inputs, targets in documents(ids):
        part = alone(inputs, targets)
        part.backward()
        total += part.item()
    assert abs(loss.item() - total) < 1e-12
    for (name, p), q in zip(masked.named_parameters(), alone.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=0, atol=1e-12), name
    # Without the mask it is another loss: else this would prove nothing.
    assert abs(alone(ids[:, :-1], ids[:, 1:]).item() - total) > 1e-3


@pytest.mark.parametrize("window", [None, 6])
def test_flex_is_sdpa(window):
    ids = some_ids()
    losses = []
    for kind in "sdpa", "flex":
        model = make(attention=kind, window=window, document_mask=True, document_token=D)
        with torch.no_grad():  # torch has no backward for it on a CPU
            losses.append(model(ids[:, :-1], ids[:, 1:]).item())
    assert abs(losses[0] - losses[1]) < 1e-12


@pytest.mark.parametrize("kind", ["sdpa", "plain"])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_over_many_chunks_is_the_formula(kind, window):
    torch.manual_seed(0)
    T = 300
    q = torch.randn(2, 4, T, 8, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, 2, T, 8, dtype=torch.float64, requires_grad=True)
    starts = document_mask.starts(torch.randint(0, 90, (2, T)), D)
    shown = torch.zeros(2, 1, T, T, dtype=torch.bool)
    for b, i in itertools.product(range(2), range(T)):
        first = max(int(starts[b, i]), 0 if window is None else i - window + 1)
        shown[b, 0, i, first : i + 1] = True
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ keys.mT * 8**-0.5).masked_fill(~shown, -torch.inf)
    expected = scores.softmax(-1) @ values
    hidden = document_mask.make(kind, window, starts)
    found = attention.choose(kind, window)(q, k, v, documents=hidden)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    dy = torch.randn_like(found)
    pairs = zip(*(torch.autograd.grad(y, (q, k, v), dy) for y in (found, expected)))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("window", [None, 6])
def test_a_mask_is_of_the_dtype_that_attention_computes_in(window):
    """torch refuses another one, or copies the mask in every layer."""
    starts = document_mask.starts(some_ids()[:, :-1], D)

    def dtypes(dtype: torch.dtype) -> set:
        masks = document_mask.make("sdpa", window, starts, dtype).mask
        return {mask.dtype for mask in (masks if window else [masks])}

    assert dtypes(torch.float64) == {torch.float64}
    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes(torch.float32) == {torch.bfloat16}
        assert dtypes(torch.float64) == {torch.float64}


def test_a_mask_is_kept_once_for_all_layers():
    """torch would keep floats made of a bool mask in each layer: findings/README.md."""
    kept = set()

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] == (24, 24):
            kept.add(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model = make(n_layer=3, document_mask=True, document_token=D)
        loss = model(some_ids()[:, :-1], some_ids()[:, 1:])
    assert len(kept) == 1 and loss.requires_grad


def test_a_micro_batch_has_the_documents_of_its_inputs():
    """Those of the targets lie a place earlier."""
    ids = some_ids()
    model = make(document_mask=True, document_token=D)
    here = torch.arange(24)
    batches = MicroBatches(model, None, None, torch.device("cpu"), "fp64", here, None)
    loss, targets = batches.forward([0, 1, 2], lambda sample_ids: ids)
    assert torch.equal(targets, ids[:, 1:])
    assert loss.item() == model(ids[:, :-1], ids[:, 1:]).item()


def test_the_largest_logit_is_of_keys_that_a_query_sees():
    """Watch asks for it of the documents that attention gets."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 9, 8, dtype=torch.float64)
    starts = document_mask.starts(torch.tensor([[1, 0, 2, 3, 0, 0, 1, 2, 3], [1, 2] * 4 + [0]]), D)
    shown = document_mask.seen(starts)
    logits = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~shown, -torch.inf)
    watch = SimpleNamespace(
        mesh=SimpleNamespace(groups={"cp": None}),
        position_ids=torch.arange(9),
        model=SimpleNamespace(config=GPTConfig()),
        max_logit=torch.full((1, 4), -torch.inf, dtype=torch.float64),
        heads=slice(0, 4),
    )
    block = SimpleNamespace(training=True)
    hidden = document_mask.make("plain", None, starts)
    Watch.attention_fn(watch, 0, block, attention.choose("plain", None), q, k, v, documents=hidden)
    assert torch.allclose(watch.max_logit[0], logits.amax((0, 2, 3)))


def test_a_run_says_where_it_finds_documents():
    def said(token: int, *more: str) -> list[str]:
        cfg = parse.parse([f"--document_token={token}", *more])
        train = Tokens([np.array([5, 0, 6, 7, 0, 65535, 65535, 5], np.uint16)])
        return summary.about_documents(cfg, SimpleNamespace(train=train))

    assert "every 4 tokens" in said(0, "--document_mask=true")[0]
    assert "token 3 is nowhere in the tokens" in said(3, "--document_mask=true")[0]
    assert "every 8 tokens" in said(2**16 - 1, "--document_mask=true", "--vocab_size=65536")[0]
    assert said(0, "--pack=best_fit") == []


def test_a_dropout_mask_is_of_the_place_in_the_sequence():
    """Two documents of the same tokens in a sequence: their masks differ, as their places do."""
    ids = torch.tensor([[0, 5, 3, 0, 5, 3, 0]])
    model = make(dropout=0.5, document_mask=True, document_token=D)
    sample = torch.tensor([7])
    model.loss_fn = lambda logits, targets, count: (logits, None)
    logits = model(ids[:, :-1], ids[:, 1:], sample_ids=sample)
    assert not torch.allclose(logits[:, :3], logits[:, 3:])
    logits = model.eval()(ids[:, :-1], ids[:, 1:], sample_ids=sample)
    assert torch.allclose(logits[:, :3], logits[:, 3:])


@pytest.mark.parametrize(
    "traits", [{}, dict(window=4), dict(position="learned"), TRAITS["n-grams"]]
)
def test_a_text_that_is_written_token_by_token_forgets_earlier_documents(traits):
    """Greedy texts, through a cache, across new documents and past block_size tokens."""
    model = make(document_mask=True, document_token=D, **traits).eval()
    with torch.no_grad():
        model.head.weight[D] *= 3  # so that documents end now and then
    prompt = torch.tensor([[1, 2, 0, 4, 5], [3, 0, 0, 6, 7]])
    found = generate(model, prompt, 40, temperature=0)
    assert (found[:, 5:] == D).any()
    ids = known = prompt  # known: what the cache holds, and the newest token
    for _ in range(40):
        if known.shape[1] > 24:
            known = ids[:, -12:]
        new = model(known)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], 1)
        known = torch.cat([known, new], 1)
    assert torch.equal(found, ids)


# ---- runs ----------------------------------------------------------------------------------------
MASKED = ["--document_mask=true", "--document_token=32"]  # a document for each square
CLIPPED = ["--qk_norm=false", "--qk_clip=0.02"]
FAST = ["tp 2 + sp", "pp 2 1f1b", "cp 2 ulysses"]
IMPOSSIBLE = [name for name in MODEL_PARALLEL if "cp" in name and "ulysses" not in name]
OTHERS = [name for name in LAYOUTS | MODEL_PARALLEL if name not in FAST + IMPOSSIBLE]


@pytest.mark.parametrize("layout", [*FAST, *(pytest.param(x, marks=SLOW) for x in OTHERS)])
def test_every_layout_is_one_process(layout):
    assert_one_process(layout, *MASKED)


@pytest.mark.parametrize(
    "layout, flags",
    [
        pytest.param(layout, flags, marks=SLOW)
        for layout, flags in [
            ("pp 2 1f1b", ["--arch=gpt2", "--n_kv_head=2"]),
            ("tp 2 + sp", ["--arch=gpt2", "--n_kv_head=2"]),
            ("fsdp 2 x tp 2", ["--window=5", "--n_kv_head=2"]),
            ("cp 2 ulysses", ["--window=5"]),
            ("pp 2 zerobubble", ["--ngram_embed=3", "--attention=plain"]),
            ("tp 2 + sp", ["--ngram_embed=3", "--activation_checkpoint=full"]),
            ("cp 2 ulysses", ["--activation_checkpoint=attention", "--attention=plain"]),
            ("ep 2", ["--n_expert=4"]),
            ("zero1 2 x pp 2", [*CLIPPED, "--watch_every=2"]),
            ("cp 2 ulysses", [*CLIPPED, "--watch_every=2"]),
            ("tp 2 + sp", [*CLIPPED, "--n_kv_head=2"]),
            *((layout, ["--pack=best_fit"]) for layout in ["zero3 2", *FAST]),
        ]
    ],
)
def test_other_models_on_layouts_are_one_process(layout, flags):
    assert_one_process(layout, *MASKED, *flags)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--cp=2", *MASKED], "--cp_attention=ulysses"),
        (["--document_token=32"], "--document_mask=true or --pack=best_fit too"),
        (["--ngram=3", *MASKED], "ngram counts across documents"),
    ],
)
def test_what_cannot_be_is_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        parse.parse(flags)


def test_where_documents_begin():
    def token(argv, tokenizer):
        return auto.with_tokenizer(parse.parse(argv), tokenizer).document_token

    assert token(["--document_mask=true"], Tokenizer("bytes")) == 0
    assert token(MASKED, Tokenizer("bytes")) == 32
    assert token([], Tokenizer("bytes")) is None
    begun = Tokenizer("bytes")
    begun.start = [5, 6]  # as Llama's <s>, which goes before each document
    assert token(["--pack=best_fit"], begun) == 5
    for argv, said in (
        (["--document_mask=true"], "type --document_token=ID"),
        (["--pack=best_fit", "--vocab_size=64", "--document_token=64"], "not below vocab_size=64"),
    ):
        with pytest.raises(ValueError, match=said):
            token(argv, Tokenizer("ids", 64))


def test_a_prompt_begins_a_document():
    tokenizer = Tokenizer("bytes")
    assert tokenizer.prompt("a", None) == ([97], 0)
    assert tokenizer.prompt("a", 7) == ([7, 97], 1)
    assert tokenizer.prompt("", 7) == ([7], 1)
    tokenizer.start = [5, 6]
    assert tokenizer.prompt("a", 5) == tokenizer.prompt("a", None) == ([5, 6, 97], 0)
    assert tokenizer.prompt("a", 7) == ([7, 5, 6, 97], 1)


@pytest.mark.parametrize("token", [None, 9])
def test_a_sample_begins_a_document_and_does_not_show_its_token(token):
    model = make(vocab_size=16, document_token=token)
    batches = MicroBatches(model, None, None, torch.device("cpu"), "fp64", torch.arange(24), None)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    text = sample(batches, Tokenizer("bytes"), 5, seed=0)
    assert seen[0] == ([[10]] if token is None else [[9]])
    assert text.startswith("\n") and len(text) == 6


def test_weights_bring_the_mask_that_they_were_trained_with(tmp_path):
    text(tmp_path)
    runs(0, 1, str(tmp_path), "fp64", ["SGD"], ["--steps=1", *MASKED])

    def brought(*flags: str) -> tuple:
        words = [*TINY, "--optim=sgd", f"--init_from={tmp_path}/SGD", *flags]
        cfg = pretrained.with_its_settings(parse.parse(words))
        return cfg.document_mask, cfg.document_token

    assert brought() == (True, 32)
    assert brought("--document_mask=false") == (False, None)
    assert brought("--document_token=48") == (True, 48)
    with pytest.raises(ValueError, match="type --document_mask=false"):
        brought("--ngram=3")
    # The same command again resumes.
    again = [*TINY, "--optim=sgd", f"--data={tmp_path}/squares.txt", "--steps=2"]
    again += [f"--init_from={tmp_path}/SGD", f"--out_dir={tmp_path}/tuned", "--save_every=1"]
    train.main(parse.parse(again))
    train.main(parse.parse([*again, "--steps=3"]))
    assert "document_mask = true" in (tmp_path / "tuned" / "config.toml").read_text()


def test_a_cpu_takes_the_kernel_that_a_mask_does_not_slow_down():
    def kind(*flags: str) -> str:
        return auto.resolve_attention(parse.parse([*flags]), "fp32", torch.device("cpu"))

    masked = "--document_mask=true"
    assert kind("--block_size=1024") == "sdpa" and kind("--block_size=1024", masked) == "plain"
    assert kind("--block_size=4096", masked) == "sdpa"


def test_what_all_blocks_share_does_not_travel(monkeypatch):
    sent = []
    masks = set()
    make_mask = document_mask.added
    send = activation_checkpoint.Trip.send

    def added(*args):
        mask = make_mask(*args)
        masks.add(mask.data_ptr())
        return mask

    def sends(trip, x):
        sent.append(x.data_ptr())
        return send(trip, x)

    monkeypatch.setattr(document_mask, "added", added)
    monkeypatch.setattr(activation_checkpoint.Trip, "send", sends)
    model = make(n_layer=3, document_mask=True, document_token=D)
    activation_checkpoint.apply_activation_checkpointing(model, "offload")
    model(some_ids()[:, :-1], some_ids()[:, 1:]).backward()
    assert sent and masks and not masks & {*sent}


def test_documents_need_a_token():
    with pytest.raises(ValueError, match="document_token, the id with which one begins"):
        GPT(GPTConfig(document_mask=True))


def test_hidden_states_do_not_say_where_documents_begin():
    model = make(document_mask=True, document_token=D)
    with pytest.raises(ValueError, match="document_starts"):
        model(torch.randn(1, 4, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="document_starts"):
        model(torch.tensor([[3]]), position_ids=torch.tensor([4]))
