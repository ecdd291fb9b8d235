"""Sequence parallelism against the whole model, in float64; what is kept; what is sent. Shapes and
helpers are those of test_tensor.py."""

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from test_tensor import (
    GPT2,
    MODERN,
    SHAPES,
    activation,
    build,
    check_autocast,
    check_evaluation,
    check_gradients,
    check_replicas,
    ready,
    refused,
    sent,
    several,
    tokens,
    train,
)

from parallel import sequence, tensor


@pytest.mark.parametrize("world", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_loss_and_every_gradient_are_the_whole_models(world):
    check_gradients(world, sequence.split)


def test_evaluation_and_generation_are_the_whole_models():
    check_evaluation(sequence.split)


def test_ddp_over_it_is_one_process():
    check_replicas(sequence.split)


def test_under_autocast_it_is_near():
    check_autocast(sequence.split)


def test_each_rank_has_the_whole_gradient_of_what_sees_its_tokens_alone():
    _, expected, _ = train(sequence.split, None, GPT2, "whole")
    names = [
        n for n in expected if "norm" in n or n.endswith("proj.bias") or n == "positions.weight"
    ]
    assert len(names) == 2 * 2 * 2 + 2 + 2 * 2 + 1
    for [(_, grads, tp_shards)] in run_ranks(2, several, sequence.split, [(GPT2, "whole")]):
        for name in names:
            assert name not in tp_shards
            torch.testing.assert_close(grads[name], expected[name], rtol=1e-10, atol=1e-10)


def same_shards(rank, world):
    splits = (tensor.split, sequence.split)
    return [split(build(shape), dist.group.WORLD) for shape in SHAPES for split in splits]


def test_parameters_are_cut_as_by_tensor_parallelism_alone():
    for tp_shards in run_ranks(2, same_shards):
        assert tp_shards[::2] == tp_shards[1::2]


def test_one_rank_changes_nothing():
    model = build(GPT2)
    forwards = [m.forward for m in model.modules()]
    assert sequence.split(model, None) == {} and forwards == [m.forward for m in model.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())


# ---- refusals ------------------------------------------------------------------------------------
def six_tokens(rank, world):
    model, _ = ready(sequence.split, dist.group.WORLD, MODERN)
    x, targets, rows = tokens(MODERN)
    with torch.no_grad():
        model.eval()(x[:, :6], targets[:, :6])  # no refusal
    try:
        model.train()(x[:, :6], targets[:, :6], sample_ids=rows)
    except ValueError as error:
        return str(error)


def test_tokens_that_cannot_be_shared_out_are_refused_in_training():
    for said in run_ranks(4, six_tokens):
        assert (
            "--tp=4 with --sp=true cannot share out 6 tokens equally; type --block_size=8" in said
        )


def test_heads_are_refused_as_by_tensor_parallelism():
    for [said] in run_ranks(4, refused, sequence.split, [(dict(n_kv_head=2), {}, "")]):
        assert "--n_kv_head=4" in said


# ---- bytes sent ----------------------------------------------------------------------------------
@pytest.mark.parametrize("world", (2, 4))
def test_bytes_sent_are_the_formula(world):
    layers, count = GPT2["n_layer"], 3 * GPT2["block_size"]
    a, loss = activation(GPT2, 8, world), activation(GPT2 | dict(n_embd=2 * 3), 8, world)
    width = GPT2["n_embd"]
    # Norms, biases of rows, positions
    local = 8 * width * (layers * (4 + 2) + 2 + GPT2["block_size"])
    local_bytes = 2 * (world - 1) * local // world
    plain = run_ranks(world, sent, tensor.split, GPT2, torch.float64, None, False)
    for (total, ops, evaluation, logits), tp in zip(
        run_ranks(world, sent, sequence.split, GPT2, torch.float64, None, False), plain
    ):
        assert (
            ops["all_gather"]
            == ops["reduce_scatter"]
            == [2 * (2 * layers + 1), 2 * (2 * layers + 1) * a]
        )
        assert total == (2 * layers + 1) * 4 * a + local_bytes + loss
        assert total - local_bytes == tp[0]  # activations cost what they cost without
        assert (evaluation, logits) == (tp[2], tp[3])
        assert loss * world == (world - 1) * 2 * 3 * count * 8


def test_bytes_of_a_stage_and_under_autocast():
    [(total, _), _] = run_ranks(2, sent, sequence.split, MODERN, torch.float64, [1], False)
    assert total == (2 + 2 + 1) * 2 * activation(MODERN, 8, 2) + 3 * 3 * 8 * 8
    [(total, *_), _] = run_ranks(2, sent, sequence.split, MODERN, torch.float32, None, True)
    assert (
        total
        == (4 + 4 + 1) * 2 * activation(MODERN, 2, 2) + 2 * activation(MODERN, 4, 2) + 3 * 3 * 8 * 4
    )


# ---- what is kept for backward -------------------------------------------------------------------
class Kept:
    """Bytes that a module's operations keep for backward, without parameters; a storage counts
    once, and only in the innermost module that is watched."""

    def __init__(self, model, endings):
        self.storages, self.open = {}, []
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for name, module in model.named_modules():
            if tensor.ends(name, endings):
                module.register_forward_pre_hook(self.enter)
                module.register_forward_hook(self.leave)

    def enter(self, module, args):
        self.open.append(torch.autograd.graph.saved_tensors_hooks(self.keep, lambda x: x))
        self.open[-1].__enter__()

    def leave(self, module, args, out):
        self.open.pop().__exit__()

    def keep(self, x):
        storage = x.untyped_storage()
        if x.ndim > 1 and storage.data_ptr() not in self.parameters:
            # X: the address must not be used again
            self.storages[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    def total(self):
        return sum(bytes_ for bytes_, _ in self.storages.values())


def kept(rank, world, shapes, endings):
    found = []
    for shape in shapes:
        for split in (tensor.split, sequence.split):
            model, _ = ready(split, dist.group.WORLD, shape)
            # The first is inside and leaves the other the rest
            counters = [Kept(model, e) for e in endings]
            x, targets, rows = tokens(shape)
            model(x, targets, sample_ids=rows)
            found += [counter.total() for counter in counters]
    return found


@pytest.mark.parametrize("world", (2, 4))
def test_norms_dropout_and_residual_stream_keep_one_nth(world):
    between = (*sequence.DROPOUTS, "attn_norm", "mlp_norm", "final_norm")
    for found in run_ranks(world, kept, (MODERN, GPT2), (between, ("",))):
        for i in (0, 4):
            plain, plain_rest, shared, shared_rest = found[i : i + 4]
            assert plain > 9 * 3 * MODERN["block_size"] * MODERN["n_embd"] * 8
            assert shared * world == plain
            # Inputs of products, and attention: gathered, or cut already
            assert shared_rest == plain_rest
