"""N-grams' rows are those of the hash written out; nothing changes before the first step; layouts
agree."""

import pytest
import torch
from matrix import assert_one_process

import train
from layers.generation import generate
from model import GPT, GPTConfig, initial_weight
from settings import parse

SMALL = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=16, block_size=12, vocab_size=50)
K, ROWS = 4, 97


def rows_by_hand(ids: list[int], place: int) -> list[int]:
    """Numbers of the rows of the n-grams that end at this place, in Python's own integers."""
    h, found = ids[place], []
    for k in range(1, K):
        before = ids[place - k] if place >= k else -1
        h = (h + 0x9E3779B1 * (before + 2)) % 2**32
        h = (h ^ (h >> 16)) * 0x45D9F3B % 2**32
        found.append((h ^ (h >> 16)) % ROWS)
    return found


def gpt(device="cpu", **more) -> GPT:
    model = GPT(GPTConfig(**SMALL, **more)).double()
    for name, p in model.named_parameters():
        p.data = initial_weight(model.config, name, tuple(p.shape)).double()
    return model.to(device)


@pytest.mark.gpu
def test_the_sum_of_the_rows_that_the_hash_says_is_added_to_the_embedding(device):
    model = gpt(device, ngram_embed=K, ngram_rows=ROWS)
    ids = torch.randint(50, (3, 12)).to(device)
    model.grams.weight.data.normal_()
    seen = []
    model.run_blocks = lambda blocks, x, where: seen.append(x) or x
    for mode in (True, False):
        model.train(mode)
        model(ids)
    table = model.grams.weight
    for b, row in enumerate(ids.tolist()):
        for t in range(12):
            expected = model.embed.weight[row[t]] + table[rows_by_hand(row, t)].sum(0)
            assert all(torch.allclose(x[b, t], expected, 1e-12) for x in seen)


def test_rows_are_spread_and_orders_and_places_differ():
    model = gpt(ngram_embed=3, ngram_rows=2**20)
    ids = torch.cartesian_prod(torch.arange(50), torch.arange(50))  # each pair of tokens
    two = model.grams.find(ids, torch.arange(2))[0, :, 1]
    assert len(two.unique()) > 0.995 * 2500  # 3 collisions are to be expected
    three = model.grams.find(torch.tensor([[1, 2, 3], [2, 1, 3], [3, 2, 1]]), torch.arange(3))[
        :, :, 2
    ]
    assert len(three.unique()) == 6  # (2 3), (1 3), (2 1), and three of three tokens


def test_nothing_changes_before_the_first_step_and_the_table_learns():
    with_, without, ids = gpt(ngram_embed=K), gpt(), torch.randint(50, (2, 12))
    with_.head.weight.data.normal_()
    without.head.weight.data.copy_(with_.head.weight)
    assert torch.equal(with_(ids), without(ids))
    with_(ids, ids).backward()
    assert (with_.grams.weight.grad != 0).any(-1).sum() > 20


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 7])
def test_what_is_generated_token_by_token_is_what_whole_rows_say(length, device):
    model = gpt(device, ngram_embed=K, ngram_rows=ROWS).eval()
    ids = torch.randint(50, (2, length)).to(device)
    model.grams.weight.data.normal_()
    model.head.weight.data.normal_()
    found = generate(model, ids, 12 - length, temperature=0)
    for n in range(length, 12):
        assert torch.equal(model(found[:, :n])[:, -1].argmax(-1), found[:, n])


FLAGS = ["--ngram_embed=3", "--ngram_rows=64"]
SOME = ["ddp 2", "zero3 2", "fsdp 2", "tp 2", "tp 2 + sp", "pp 2 1f1b", "zero1 2 x pp 2"]
FAST = ("tp 2 + sp",)


@pytest.mark.parametrize(
    "layout", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in SOME]
)
def test_every_layout_is_one_process(layout):
    assert_one_process(layout, *FLAGS)


def test_a_run_goes_on_bitwise_and_samples(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 100)
    words = [
        f"--data={text}",
        "--n_layer=1",
        "--n_embd=16",
        "--n_head=2",
        "--block_size=16",
        "--batch_size=2",
        "--ngram_embed=4",
        "--ngram_rows=500",
        "--eval_tokens=64",
        "--sample_tokens=8",
    ]
    whole = train.main(parse.parse([*words, "--steps=6", f"--out_dir={tmp_path / 'a'}"]))
    train.main(parse.parse([*words, "--steps=6", f"--out_dir={tmp_path / 'b'}", "--save_every=3"]))
    for path in (tmp_path / "b").glob("step-00000006*"):
        path.rename(tmp_path / "gone")
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    again = train.main(parse.parse([*words, "--steps=6", f"--out_dir={tmp_path / 'b'}"]))
    assert again == whole and "a sample" in capsys.readouterr().out
    without = [word for word in words if not word.startswith("--ngram")]
    words = [*without, "--steps=1", f"--out_dir={tmp_path / 'c'}", f"--init_from={tmp_path / 'a'}"]
    train.main(parse.parse(words))  # its weights bring their n-grams
    config = (tmp_path / "c" / "config.toml").read_text()
    assert "ngram_embed = 4" in config and "ngram_rows = 500" in config


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--ngram_embed=4", "--cp=2"], "ngram_embed needs the tokens before a rank's own"),
        (["--ngram_rows=64"], "ngram_rows has no meaning without ngram_embed"),
        (["--ngram_embed=1"], "ngram_embed=1 is out of range; it must be at least 2"),
    ],
)
def test_what_cannot_be_is_said(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse.parse(flags)
