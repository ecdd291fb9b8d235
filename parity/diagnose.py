"""Why the first tensor differs: hypotheses, each tried on the numbers alone.

Most hypotheses compute from the recordings what the tensor would be if they were true, and are
believed where that is the tensor found, to the precision of the numbers. A few fit its looks alone:
masks and weights drawn anew, the size of rounding, singular vectors, other token ids. Where none
fits, the answer is "I do not know". Tried in this order:

    parity/experts.py    where tokens go in a mixture of experts, and what keeps loads even
    parity/noise.py      another dtype, other masks
    parity/elsewhere.py  the right numbers in the wrong place, or of the wrong time
    parity/rotary.py     q and k rotated otherwise
    parity/clipping.py   norms, and clipping by them
    parity/parts.py      a gradient as a sum of what each backward adds
    parity/sums.py       sums over too few, too many, with wrong weights
    parity/updates.py    the optimizer's step
    parity/noise.py      weights drawn anew, the size of rounding
"""

import torch

from parity import clipping, elsewhere, experts, noise, parts, sums, updates
from parity.case import Case, Finding
from parity.compare import Comparison, Difference, rms
from parity.recording import Recording

# cause: what it is called in the report.
CAUSES = {
    "missing": "a tensor is missing",
    "nonfinite": "numbers are not finite",
    "not_summed": "not summed",
    "summed_twice": "summed twice, or over too many",
    "mean_of_means": "a mean of means",
    "loss_divisor": "the loss's divisor",
    "backward_scale": "the recorder's backward_scale",
    "unnamed": "samples without numbers",
    "half_tied": "one half of a tied weight",
    "sp_partial": "a replicated weight left partial",
    "stale": "stale numbers",
    "wrong_order": "shards in the wrong order",
    "wrong_samples": "other samples",
    "heads": "heads permuted",
    "rotary": "rotary halves",
    "position": "wrong positions",
    "micro_batch": "a missing micro-batch",
    "random": "random numbers that differ",
    "local_norm": "clipped by a local norm",
    "weight_decay": "weight decay",
    "bias_correction": "bias correction",
    "learning_rate": "another learning rate",
    "shard_as_matrix": "a shard stepped as a whole matrix",
    "choice": "another choice of experts",
    "bias_update": "the experts' bias moved otherwise",
    "term_scale": "a term of balance has another factor",
    "term_batch": "a term of each sequence taken over several",
    "idle_expert": "an expert without tokens has no gradient",
    "low_precision": "low precision",
    "rounding": "plain rounding",
    "unknown": "unknown",
}
LOOK = {
    "not_summed": "the all-reduce or reduce-scatter over that axis, and what divides the loss",
    "summed_twice": "who else sums over that axis, and what is counted N times",
    "mean_of_means": "the divisor of the loss: the tokens of all ranks and micro-batches",
    "loss_divisor": "what divides the loss: the tokens of all ranks and micro-batches, once",
    "backward_scale": "nothing in the trainer: its ranks' losses are means, and so is their sum",
    "unnamed": "the call of recorder.batch before each forward",
    "half_tied": "the sum of the tied weight's two gradients",
    "sp_partial": "the all-reduce over the tensor parallel ranks of what sees some tokens alone",
    "stale": "the broadcast or gather after the step, and what zero_grad clears",
    "wrong_order": "the offsets by which shards are cut out and put together",
    "wrong_samples": "which samples each rank and micro-batch takes",
    "heads": "the views and transposes around attention, and how a fused weight is taken apart",
    "rotary": "rotate(), and the convention of the checkpoint: halves or neighbours, and the sign",
    "position": "the position ids that each rank passes on",
    "micro_batch": "what is accumulated, and when gradients are cleared",
    "random": "the seed of each rank: masks and initial weights must not depend on the layout",
    "local_norm": "the all-reduce of the squared norm before clipping, and what it counts",
    "weight_decay": "the optimizer's decay: its factor, its place, its parameter groups",
    "bias_correction": "the optimizer's step count: where it is raised, saved, loaded",
    "learning_rate": "the schedule and the groups' lr",
    "shard_as_matrix": "what the optimizer is given: it needs the full matrix or a global norm",
    "choice": "nothing, where their gap is rounding's; else ties, and the dtype of the scores",
    "bias_update": "who moves it, when, and by which counts: once a step, by the whole batch's",
    "term_scale": "what the term's gradient is multiplied by: the same as the token loss, once",
    "term_batch": "over which tokens the term's fractions and means are taken",
    "idle_expert": "the gradient of an expert without rows: zeros, and on every rank",
    "low_precision": "casts, autocast, TF32 switches, dtypes of buckets and buffers",
    "rounding": "nothing here: it grows with depth, as rounding does",
    "missing": "which ranks hold it, and its name there",
    "nonfinite": "the inputs of this module",
    "unknown": "what this module and its shards do with the inputs, which agree",
}


def diagnose(comparison: Comparison, difference: Difference) -> Finding:
    """The likely cause of the first difference."""
    key = difference.key
    if key not in comparison.b.entries:
        found = experts.idle(comparison, key)
        return found or Finding("missing", f"the {key[1]} of {key[2]} is on no rank")
    case = Case(comparison, difference)
    if difference.why:
        found = elsewhere.incomplete(case)
        return found or Finding("missing", difference.why)
    if any(not block.x.isfinite().all() for block in case.bad):
        return Finding("nonfinite", "some numbers are inf or NaN, in a module whose inputs agree")
    hypotheses = (
        *experts.HYPOTHESES,
        *noise.EXACT,
        *elsewhere.HYPOTHESES,
        *clipping.HYPOTHESES,
        *sums.HYPOTHESES,
        *updates.HYPOTHESES,
        *noise.LAST,
    )
    for hypothesis in hypotheses:
        found = hypothesis(case)
        if found is not None:
            return found
    return unknown(case)


def unknown(case: Case) -> Finding:
    """No cause; but where the parts of a gradient are right, that is known."""
    if case.kind in ("gradient", "clipped"):
        of_all = parts.parts_of(case)
        if len(case.b.ranks) > 1 and of_all and parts.summands(case, of_all):
            return Finding(
                "unknown",
                "I do not know; but forward and backward are right on every rank (what they add"
                " to the gradient adds up to the right one); what reduces or writes it is not",
                "what reduces, scales, rounds or writes this gradient",
            )
    return Finding("unknown", "I do not know: no hypothesis gives these numbers")


# ---- for people ----------------------------------------------------------------------------------
def report(comparison: Comparison, difference: Difference, finding: Finding) -> str:
    """What the command says."""
    step, kind, name = difference.key
    others = comparison.others(difference)
    of_kind = sum(1 for key in comparison.order if key[:2] == difference.key[:2])
    before = comparison.order.index(difference.key)
    lines = [
        f"B has {layout(comparison.b)}; the oracle A has {layout(comparison.a)}",
        f"{before} tensors agree, in order of execution; the first that differs:",
        f"  {difference}",
        f"  {how(comparison, difference)}",
    ]
    names = [other.key[2] for other in others if other.key != difference.key]
    also = f": also {', '.join(names[:3])}" if names else ""
    dots = ", ..." if len(names) > 3 else ""
    lines.append(f"  {len(others)} of the {of_kind} of its kind in this step{also}{dots}")
    lacking = comparison.lacking()
    if lacking:
        lines.append(f"  not all is compared: {lacking}")
    cause = CAUSES[finding.cause]
    said = finding.sentence.startswith((cause, "I do not know"))
    lines.append(f"likely: {finding.sentence}" if said else f"likely: {cause}: {finding.sentence}")
    lines.append(f"look at: {finding.look or LOOK[finding.cause]}")
    return "\n".join(lines)


def layout(recording: Recording) -> str:
    """The ranks and axes of a recording, such as "4 ranks: dp 2 x tp 2"."""
    n = len(recording.ranks)
    axes = " x ".join(f"{axis} {size}" for axis, (size, _) in recording.axes.items() if size > 1)
    return f"{n} rank{'s' * (n > 1)}" + (f": {axes}" if axes else "")


def how(comparison: Comparison, difference: Difference) -> str:
    """Ratio, ranks and part, in one line."""
    if difference.why or difference.key not in comparison.b.entries:
        return difference.why
    case = Case(comparison, difference)
    if case.kind == "input":
        return f"on {case.ranks_of(case.bad)}"
    block = max(case.bad, key=lambda block: block.gap)
    size = rms(block.y)
    of_update = " of the last update" if case.kind == "weight" and case.step > 0 else ""
    where = case.ranks_of(case.bad)
    words = [f"relative difference {difference.relative:.1e}{of_update} on {where}"]
    if size:
        ratio = float((block.x * block.y).mean()) / size**2
        words.append(f"B is {ratio:.4g} times A, along A")
    if block.x.ndim and block.x.numel() > 1:
        off = (block.x - block.y).abs()
        worst = torch.unravel_index(off.argmax(), off.shape)
        at = [int(i) for i in worst]
        words.append(f"worst at {at} of rank {block.rank}'s {list(off.shape)}")
    return "; ".join(words)
