"""Counted n-grams against Kneser-Ney written out over dictionaries, and as a part of a run."""

from collections import Counter

import numpy as np
import pytest
import torch
from harness import init_weights, run_ranks
from test_train import go, rows

import sample
from checkpoint import __main__, load
from data import corpora
from layers import ngram
from layers.generation import generate
from layers.ngram import NGrams
from model import GPT, GPTConfig
from settings import parse


def naive(grams: Counter, V: int, context: tuple, w: int, discounts: list[float]) -> float:
    """p_k of w behind the k tokens of context; grams: the counts of the k + 1-grams."""
    k = len(context)
    below = Counter(g[1:] for g in grams)
    p = naive(below, V, context[1:], w, discounts) if k else 1 / V
    follow = {g[-1]: n for g, n in grams.items() if g[:-1] == context and n > 0}
    if not follow:
        return p
    d = discounts[k]
    back = sum(min(n, d) for n in follow.values())
    return (max(follow.get(w, 0) - d, 0) + back * p) / sum(follow.values())


def grams_of(text: list[int], order: int) -> Counter:
    return Counter(tuple(text[i : i + order + 1]) for i in range(len(text) - order))


def lower(grams: Counter, times: int) -> Counter:
    for _ in range(times):
        grams = Counter(g[1:] for g in grams)
    return grams


@pytest.mark.parametrize(
    "order, V, table", [(1, 5, 2**22), (2, 5, 30), (3, 4, 0), (4, 3, 40), (3, 300, 0)]
)
def test_it_is_kneser_ney(monkeypatch, order, V, table):
    monkeypatch.setattr(ngram, "TABLE", table)
    monkeypatch.setattr(ngram, "MANY", 1)
    draw = np.random.default_rng(order)
    text = (draw.random(400) ** 2 * V).astype(np.uint16)
    counts, grams = NGrams(text, order, V), grams_of(text.tolist(), order)
    discounts = []
    for k in range(order + 1):
        of = Counter(lower(grams, order - k).values())
        discounts.append(np.clip(of[1] / max(of[1] + 2 * of[2], 1), 0.1, 0.95))
    tokens = draw.integers(0, V, (3, 9))
    tokens[0] = text[5:14]
    p = counts.log_probs(tokens).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(3, 9), rtol=0, atol=1e-5)
    for b, t, w in (
        (b, t, w) for b in range(3) for t in (0, 1, 3, 8) for w in range(0, V, max(1, V // 4))
    ):
        k = min(t + 1, order)
        context = tuple(tokens[b, t + 1 - k : t + 1].tolist())
        expected = naive(lower(grams, order - k), V, context, w, discounts)
        assert p[b, t, w].item() == pytest.approx(expected, rel=1e-5), (b, t, w)


def test_what_a_token_added_is_taken_off(monkeypatch):
    """The counts of a text with one n-gram fewer."""
    monkeypatch.setattr(ngram, "TABLE", 0)
    order, V, draw = 3, 4, np.random.default_rng(7)
    text = (draw.random(120) ** 2 * V).astype(np.uint16).tolist()
    counts, grams = NGrams(np.array(text), order, V), grams_of(text, order)
    discounts = [float(o.d) for o in counts.orders]
    once = 0
    for start in range(0, 100, 5):
        row, answers = text[start : start + 5], text[start + 1 : start + 6]
        p = counts.log_probs(np.array([row]), np.array([answers])).exp()
        # It ends with the answer to the row's fourth token
        gone = tuple(text[start + 1 : start + 5])
        fewer = Counter(grams)
        fewer[gone] -= 1
        fewer += Counter()  # without what is 0
        once += gone not in fewer
        first = Counter(g[1:] for g in lower(grams, 2))  # order 0 is a table, and left as it is
        for w in range(V):
            p_0 = naive(first, V, (), w, discounts)
            expected = with_base(fewer, gone[:-1], w, discounts, p_0)
            assert p[0, 3, w].item() == pytest.approx(expected, rel=1e-5), (start, w)
    assert once > 3


def with_base(grams: Counter, context: tuple, w: int, discounts: list[float], p: float) -> float:
    """naive, with p for order 0."""
    if not context:
        return p
    p = with_base(Counter(g[1:] for g in grams), context[1:], w, discounts, p)
    follow = {g[-1]: n for g, n in grams.items() if g[:-1] == context}
    if not follow:
        return p
    back = sum(min(n, discounts[len(context)]) for n in follow.values())
    return (max(follow.get(w, 0) - discounts[len(context)], 0) + back * p) / sum(follow.values())


def test_what_cannot_be_counted_is_said(monkeypatch):
    text = np.arange(50) % 7
    for order, V, problem in (
        (8, 256, "from 1 to 7"),
        (4, 50304, "from 1 to 3"),
        (0, 256, "from 1 to 7"),
    ):
        with pytest.raises(ValueError, match=problem):
            NGrams(text, order, V)
    with pytest.raises(ValueError, match="token id 6, and vocab_size is 5"):
        NGrams(text, 2, 5)
    monkeypatch.setattr(ngram, "LIMIT", 40)
    with pytest.raises(ValueError, match="texts of 3 to 40 tokens, not of 50"):
        NGrams(text, 2, 7)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="texts of 7 to 134,217,728 tokens, not of 6"):
        NGrams(text[:6], 6, 256)


# ---- in a model ----------------------------------------------------------------------------------
def small(text, order: int = 3) -> tuple[GPT, NGrams]:
    c = GPTConfig(n_layer=1, n_head=2, n_kv_head=2, n_embd=16, block_size=8, vocab_size=256)
    model, counts = init_weights(GPT(c)), NGrams(text, order, 256)
    counts.add_to(model)
    return model, counts


@pytest.mark.parametrize("table", [0, 2**22])
def test_the_loss_of_a_silent_network_is_the_prior_s(monkeypatch, table):
    monkeypatch.setattr(ngram, "TABLE", table)
    text = np.frombuffer(b"she sells sea shells by the sea shore, " * 9, np.uint8)
    model, counts = small(text)
    torch.nn.init.zeros_(model.head.weight)
    x = torch.from_numpy(text[3:20].astype(np.int64))[None]
    for training in (True, False):
        model.train(training)
        p = counts.log_probs(x[:, :8].numpy(), x[:, 1:9].numpy() if training else None)
        expected = -p.gather(-1, x[:, 1:9, None]).sum()
        torch.testing.assert_close(model(x[:, :8], x[:, 1:9]), expected)
    assert model(x[:, :8], x[:, 1:9]) < 5  # 44 for one that knows nothing
    rare = torch.from_numpy(np.random.default_rng(0).permutation(256)[None, :9])
    model, _ = small(rare.numpy().astype(np.uint8)[0], 2)
    torch.nn.init.zeros_(model.head.weight)
    seen = [model.train(training)(rare[:, :8], rare[:, 1:]).item() for training in (True, False)]
    assert seen[0] > seen[1] + 8  # what it has seen once, here, does not help it to learn


def test_generation_sees_the_same_prior_with_kept_keys_and_without():
    text = np.frombuffer(b"she sells sea shells by the sea shore, " * 9, np.uint8)
    model, _ = small(text)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    model.eval()
    ids = torch.from_numpy(text[:3].astype(np.int64))[None].repeat(2, 1)
    ids[1] += 1
    fast = generate(model, ids, 5, temperature=0)
    for _ in range(5):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, True)], 1)
    assert torch.equal(fast, ids)
    assert generate(model, ids, 20, temperature=0).shape == (2, 28)  # beyond block_size


# ---- in a run ------------------------------------------------------------------------------------
def run(rank, world, *args):
    return go(*args)


@pytest.mark.slow
def test_a_run_starts_where_counting_ends_and_ranks_and_resume_change_nothing(tmp_path, text):
    more = ["--ngram=4", "--precision=fp64", "--optim=sgd", "--lr=0.1", "--micro_batch_size=2"]
    go(text, tmp_path / "one", *more)
    run_ranks(2, run, text, tmp_path / "two", *more, "--data_parallel=zero3", "--bucket_mb=0.01")
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert all(one[s]["loss"] == pytest.approx(two[s]["loss"], rel=1e-10) for s in one)
    go(text, tmp_path / "parts", *more, "--steps=6", "--schedule=constant")
    go(text, tmp_path / "parts", *more, "--steps=12", "--schedule=constant")
    go(text, tmp_path / "whole", *more, "--steps=12", "--schedule=constant")
    a, b = (load.newest(tmp_path / name) for name in ("parts", "whole"))
    assert all(torch.equal(w, b.tensor(f"model/{n}")) for n, w in a.tree("model").items())
    go(text, tmp_path / "none", *more, "--ngram=none")
    assert one[1]["loss"] < 0.75 * rows(tmp_path / "none")[1]["loss"]


def test_sample_counts_again_and_says_when_the_text_is_another(tmp_path, text, capsys):
    own = tmp_path / "text.txt"
    own.write_bytes(open(text, "rb").read())
    go(str(own), tmp_path / "run", "--ngram=4", "--steps=1")
    model, _ = sample.load(str(tmp_path / "run"))
    corpus = corpora.load(str(own), "bytes", str(tmp_path))
    same = GPT(model.config)
    load.newest(tmp_path / "run").load_weights(same)
    NGrams(corpus.train.slice(0, len(corpus.train)), 4, 256).add_to(same)
    x = torch.arange(10)[None] + 97
    assert torch.equal(model(x), same.eval()(x))
    own.write_bytes(b"another text " * 2000)
    with pytest.raises(ValueError, match="counts the run's data, and .* has changed"):
        sample.load(str(tmp_path / "run"))


def test_what_is_watched_and_what_z_loss_pulls_on_is_the_sum(tmp_path, text):
    go(text, tmp_path, "--ngram=4", "--watch_every=1", "--z_loss=10", "--steps=2")
    # The network is silent, a prior is normalised: log 1
    assert abs(rows(tmp_path)[1]["log_z"]) < 1e-3


def test_weights_that_need_the_counts_say_so(tmp_path, text, capsys):
    go(text, tmp_path / "a", "--ngram=4", "--steps=2")
    go(text, tmp_path / "b", f"--init_from={tmp_path / 'a'}", "--steps=1")
    assert "learned on top of counted n-grams" in capsys.readouterr().out
    __main__.main(["export", str(tmp_path / "a"), str(tmp_path / "w.safetensors")])
    assert "no language model" in capsys.readouterr().out
    go(text, tmp_path / "c", f"--init_from={tmp_path / 'a'}", "--steps=1", "--ngram=4")
    assert "on top of" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, problem",
    [
        (["--tp=2"], "is incompatible with tp"),
        (["--pp=2"], "is incompatible with pp"),
        (["--cp=2"], "is incompatible with cp"),
        (["--ngram=0"], "ngram=0"),
    ],
)
def test_refusals(words, problem):
    with pytest.raises(ValueError, match=problem):
        parse.parse(["--ngram=3", *words])


def test_an_order_that_does_not_fit_stops_a_run(tmp_path, text):
    with pytest.raises(
        ValueError, match="--ngram=9 is not possible: with 256 different tokens it is from 1"
    ):
        go(text, tmp_path, "--ngram=9")
