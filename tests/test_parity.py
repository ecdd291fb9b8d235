"""The parity oracle names the first tensor that differs, and why; and is silent where nothing does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity_plain import Plan, sound, train

from parity.compare import Comparison, Recording
from parity.diagnose import diagnose

ROOT = Path(__file__).parent.parent
BIG = "blocks.1.up.weight"
# Plan of the fault; kind and name of the first tensor that differs; cause.
FAULTS = [
    (dict(fault="not_summed", at=BIG), "gradient", BIG, "not_summed"),
    (dict(fault="not_summed", at="blocks.0.norm1.weight", ranks=4), "gradient", "", "not_summed"),
    (dict(fault="not_summed", at="tokens.weight", micro=2), "gradient", "", "not_summed"),
    (dict(fault="not_summed_all"), "gradient", "head.weight", "not_summed"),
    (dict(fault="mean"), "gradient", "head.weight", "not_summed"),
    (dict(fault="mean_one", at="blocks.0.q.bias", ranks=4), "gradient", "", "not_summed"),
    (dict(fault="mean", shards=True, optimizer="sgd"), "gradient", "head.weight", "not_summed"),
    (dict(fault="rank_left_out", at=BIG, ranks=4), "gradient", BIG, "not_summed"),
    (dict(fault="scaled_by_micro", ranks=1, micro=4), "output", "(loss)", "not_summed"),
    (dict(fault="summed_twice", at=BIG), "gradient", BIG, "summed_twice"),
    (dict(fault="summed_twice", at="norm.bias", ranks=4), "gradient", "", "summed_twice"),
    (dict(fault="own_twice", at="blocks.0.v.weight"), "gradient", "", "summed_twice"),
    (dict(fault="bias_twice", at="blocks.1.down"), "output", "", "summed_twice"),
    (dict(fault="local_means", ignore=True), "output", "(loss)", "mean_of_means"),
    (dict(fault="local_means", ignore=True, ranks=1, micro=4), "output", "(loss)", "mean_of_means"),
    (dict(fault="tied_head_detached", tied=True), "gradient", "tokens.weight", "half_tied"),
    (dict(fault="tied_embedding_detached", tied=True), "gradient", "tokens.weight", "half_tied"),
    (dict(fault="stale_weight", at=BIG), "weight", BIG, "stale"),
    (dict(fault="stale_gradient", at="blocks.0.q.weight"), "gradient", "", "stale"),
    (dict(fault="not_cleared"), "gradient", "head.weight", "stale"),
    (dict(fault="gradient_shards_swapped", at=BIG), "gradient", BIG, "wrong_order"),
    (dict(fault="weights_shards_swapped", at="tokens.weight"), "weight", "", "wrong_order"),
    (dict(fault="weights_transposed", at="blocks.0.out.weight"), "weight", "", "wrong_order"),
    (dict(fault="weights_heads_swapped", at="blocks.0.q.weight"), "weight", "", "heads"),
    (dict(fault="heads_swapped", at="blocks.0"), "output", "blocks.0.heads", "heads"),
    (dict(fault="heads_interleaved", at="blocks.1"), "output", "blocks.1.heads", "heads"),
    (dict(fault="weights_halves_swapped", at="blocks.1.k.weight"), "weight", "", "rotary"),
    (dict(fault="weights_neighbours", at="blocks.1.q.weight"), "weight", "", "rotary"),
    (dict(fault="rotary_sign", at="blocks.0.rotary_q"), "output", "", "rotary"),
    (dict(fault="rotary_neighbours", at="blocks.1.rotary_k"), "output", "", "rotary"),
    (dict(fault="rotary_halves", at="blocks.0.rotary_k"), "output", "", "rotary"),
    (dict(fault="positions", at="blocks.0.rotary_q"), "output", "", "position"),
    (dict(fault="positions_late", at="blocks.1.rotary_q"), "output", "", "position"),
    (dict(fault="learned_positions", position="learned"), "output", "positions", "position"),
    (dict(fault="micro_lost", micro=2), "gradient", "head.weight", "micro_batch"),
    (dict(fault="no_accumulation", at=BIG, ranks=1, micro=4), "gradient", BIG, "micro_batch"),
    (dict(fault="backward_skipped", micro=2), "output_gradient", "head", "micro_batch"),
    (dict(fault="samples_of_rank_0"), "input", "(0)", "wrong_samples"),
    (dict(fault="masks_by_rank", at="blocks.1.mask", dropout=0.2), "output", "", "random"),
    (dict(fault="weights_drawn_anew", at="blocks.0.up.weight"), "weight", "", "random"),
    (dict(fault="local_norm", clip=0.05, shards=True), "clipped", "head.weight", "local_norm"),
    (dict(fault="local_norm", clip=0.05, shards=True, more={"norm": True}), "norm", "", "local_norm"),
    (dict(fault="clipped_one_by_one", clip=0.05), "clipped", "head.weight", "local_norm"),
    (dict(fault="clipped_before_sum"), "gradient", "head.weight", "local_norm"),
    (dict(fault="no_decay", at=BIG), "weight", BIG, "weight_decay"),
    (dict(fault="decay_twice", at="all"), "weight", "tokens.weight", "weight_decay"),
    (dict(fault="decay_grows", at="norm.weight"), "weight", "", "weight_decay"),
    (dict(fault="decay_late", at=BIG), "weight", BIG, "weight_decay"),
    (dict(fault="decay_without_lr", at=BIG, optimizer="sgd"), "weight", BIG, "weight_decay"),
    (dict(fault="step_count", at="all"), "weight", "tokens.weight", "bias_correction"),
    (dict(fault="no_first_correction", at=BIG), "weight", BIG, "bias_correction"),
    (dict(fault="no_second_correction", at=BIG), "weight", BIG, "bias_correction"),
    (dict(fault="shard_as_matrix", at=BIG, optimizer="muon", shards=True), "weight", BIG, "shard_as_matrix"),
    (dict(fault="shard_norms", at=BIG, optimizer="lamb", shards=True), "weight", BIG, "shard_as_matrix"),
    (dict(fault="bf16_product", at="blocks.0.up"), "output", "", "low_precision"),
    (dict(fault="fp32_product", at="blocks.1.q"), "output", "", "low_precision"),
    (dict(fault="bf16_inputs", at="blocks.0.down"), "output", "", "low_precision"),
    (dict(fault="tf32_product", at="blocks.0.out"), "output", "", "low_precision"),
    (dict(fault="bf16_sum"), "gradient", "head.weight", "low_precision"),
    (dict(fault="weights_bf16", at="blocks.0.up.weight"), "weight", "", "low_precision"),
    (dict(fault="bf16_inputs", at="blocks.0.down", dtype=torch.float32), "output", "", "low_precision"),
    (dict(fault="nan", at=BIG), "gradient", BIG, "nonfinite"),
]  # fmt: skip
# What no hypothesis explains: another answer than "I do not know" would be wrong.
STRANGE = [
    dict(fault="relu", at="blocks.0"),
    dict(fault="norm_eps"),
    dict(fault="no_scale", at="blocks.1"),
    dict(fault="swapped_k_v", at="blocks.0"),
    dict(fault="sees_the_future", at="blocks.0"),
    dict(fault="label_smoothing"),
    dict(fault="no_bias", at="blocks.1.up"),
    dict(fault="half_input", at="blocks.1.up"),
    dict(fault="l2", at=BIG),
    dict(fault="beta2", at=BIG),
    dict(fault="sign", at=BIG),
    dict(fault="noise", at=BIG),
]


def found(plan: Plan, folder: Path):
    """What parity says of a planted fault: (difference, finding), or None."""
    train(sound(plan), folder / "a")
    train(plan, folder / "b")
    comparison = Comparison(Recording(folder / "a"), Recording(folder / "b"))
    first = comparison.first()
    if first is None:
        return None
    return first, diagnose(comparison, first)


def check(settings: dict, kind: str, name: str, cause: str, folder: Path) -> None:
    plan = Plan(**settings)
    first, finding = found(plan, folder)
    assert first.key[1] == kind, (first, finding)
    wanted = name or plan.at
    assert first.key[2] == wanted or kind == "norm", (first, finding)
    assert finding.cause == cause, (first, finding)


def title(case) -> str:
    settings = case[0] if isinstance(case, tuple) else case
    return "-".join(str(value) for key, value in settings.items() if key in ("fault", "at"))


@pytest.mark.parametrize("case", FAULTS, ids=title)
def test_a_fault_in_a_plain_torch_model_is_named(case, tmp_path):
    check(*case, tmp_path)


@pytest.mark.parametrize("settings", STRANGE, ids=title)
def test_a_fault_of_another_kind_is_not_given_a_wrong_cause(settings, tmp_path):
    first, finding = found(Plan(**settings), tmp_path)
    assert finding.cause == "unknown", (first, finding)
