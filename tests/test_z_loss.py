"""z-loss: its gradient is that of z (log Z)^2 of the logits that are used, its value is not
there."""

import functools

import pytest
import torch
import torch.distributed as dist
from harness import init_weights, run_ranks
from test_train import go, rows

import model as models
from model import GPT, GPTConfig
from parallel import tensor
from settings import parse

Z = 0.03


def numbers(seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 12, dtype=torch.float64, generator=generator) * 3
    targets = torch.randint(12, (2, 5), generator=generator)
    targets[1, 3] = -100
    return logits.to(device).requires_grad_(), targets.to(device)


def by_hand(logits, targets):
    """Loss, and the gradient of what is minimised: loops and exponentials."""
    loss = total = 0
    for row, target in zip(logits.flatten(0, 1), targets.flatten().tolist()):
        if target != -100:
            log_z = row.exp().sum().log()
            loss = loss + log_z - row[target]
            total = total + log_z - row[target] + Z * log_z**2
    return loss.detach(), torch.autograd.grad(total, logits)[0]


@pytest.mark.gpu
def test_the_gradient_has_it_and_the_value_has_not(device):
    logits, targets = numbers(device=device)
    plain, _ = models.loss_fn(logits, targets, False)
    loss, hits = models.loss_fn(logits, targets, True, Z)
    expected, gradient = by_hand(logits, targets)
    assert torch.equal(loss, plain) and hits is not None
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(3 * loss, logits)[0], 3 * gradient, rtol=1e-12, atol=1e-12
    )
    assert (gradient - torch.autograd.grad(plain, logits)[0]).abs().max() > 0.01


def cut_vocabulary(rank, world, z_loss):
    logits, targets = numbers()
    mine = logits.detach().chunk(world, -1)[rank].clone().requires_grad_()
    loss, hits = tensor.loss_fn(mine, targets, True, dist.group.WORLD, z_loss)
    (3 * loss).backward()
    return loss.detach(), mine.grad, hits


def test_a_cut_vocabulary_gives_the_same_gradient():
    logits, targets = numbers()
    expected, gradient = by_hand(logits, targets)
    results = run_ranks(2, cut_vocabulary, Z)
    for loss, _, _ in results:
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    found = torch.cat([grad for _, grad, _ in results], -1)
    torch.testing.assert_close(found, 3 * gradient, rtol=1e-12, atol=1e-12)
    without = torch.cat([grad for _, grad, _ in run_ranks(2, cut_vocabulary, None)], -1)
    assert (found - without).abs().max() > 0.01


@pytest.mark.gpu
def test_log_z_is_that_of_the_capped_logits(device):
    shape = dict(
        n_layer=1, n_head=2, n_kv_head=2, n_embd=16, block_size=8, vocab_size=12, logit_cap=2.0
    )
    model = init_weights(GPT(GPTConfig(**shape, zero_init=False, tied=True)).double()).to(device)
    with torch.no_grad():
        model.embed.weight.mul_(50)
    x, y = torch.randint(12, (2, 2, 8), generator=torch.Generator().manual_seed(1)).to(device)
    logits = model(x)
    assert logits.abs().max() > 1.5
    total = models.loss_fn(logits, y, False)[0] + Z * logits.exp().sum(-1).log().square().sum()
    expected = torch.autograd.grad(total, model.embed.weight)[0]
    model.loss_fn = functools.partial(model.loss_fn, z_loss=Z)
    model(x, y).backward()
    torch.testing.assert_close(model.embed.weight.grad, expected, rtol=1e-11, atol=1e-11)


def test_a_run_logs_cross_entropy_and_learns_a_smaller_log_z(tmp_path, text):
    flags = [
        "--precision=fp64",
        "--watch_every=1",
        "--logit_cap=none",
        "--eval_every=4",
        "--steps=4",
    ]
    go(text, tmp_path / "off", *flags)
    go(text, tmp_path / "on", *flags, "--z_loss=1")
    off, on = rows(tmp_path / "off"), rows(tmp_path / "on")
    assert on[1]["loss"] == off[1]["loss"] and on[1]["grad_norm"] > off[1]["grad_norm"]
    val_off, val_on = (rows(tmp_path / name, "val_loss")[0]["val_loss"] for name in ("off", "on"))
    assert val_on == val_off
    last = max(on)
    assert abs(on[last]["log_z"]) < abs(off[last]["log_z"]) - 0.01


def test_no_z_loss_is_written_none():
    with pytest.raises(ValueError, match="--z_loss=none"):
        parse.parse(["--z_loss=0"])
