"""Hypotheses about a mixture of experts (layers/moe.py): where tokens go, what keeps loads even.

scores    a bias that has moved since the step began
choice    tokens whose experts have scores that lie together
counts    those of one micro-batch; of tokens that count twice (of one replica: parity/sums.py)
bias      moved by other counts, in a step that is skipped, or not at all
terms     a term of balance N times in the router's gradient, or of a micro-batch as one sequence
inside    an output with that of a module inside it twice, such as a shared expert
strangers an expert's gradient with other experts' in it; the weight of another one
idle      an expert without tokens, and so without a gradient
"""

import math
import re

import torch
from torch import Tensor

from parity.case import Case, Finding
from parity.compare import Comparison, rms
from parity.elsewhere import span
from parity.parts import counts as numbers
from parity.recording import Key

EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.")


# ---- what the recordings say of a layer ----------------------------------------------------------
def rows_of(piece, n: int) -> list[int]:
    """The samples of a piece, in the batch."""
    first = piece.index[0]
    return list(range(first, first + n)) if isinstance(first, int) else list(first)


def loads(case: Case, n_expert: int) -> dict[int, list[Tensor]]:
    """Rank -> tokens of each expert (E,) in each of its forwards, as B's tokens have chosen."""
    found = {}
    pieces = case.b.entries.get((case.step, "choice", case.name), [])
    for piece in sorted(pieces, key=lambda piece: piece.at):
        load = torch.bincount(piece.load().flatten(), minlength=n_expert).double()
        found.setdefault(piece.rank, []).append(load)
    return found


# ---- the choice ----------------------------------------------------------------------------------
def scores(case: Case) -> Finding | None:
    """The same scores plus another bias."""
    if case.kind != "output" or not case.name.endswith(".biased_scores"):
        return None
    for block in case.bad:
        off = block.x - block.y  # (B, T, E)
        if rms(off - off.flatten(0, -2).mean(0)) > 0.01 * rms(off):
            return None
    block = case.bad[0]
    samples = span(rows_of(block.piece, len(block.x)))
    moved = float((block.x - block.y).abs().max())
    return Finding(
        "bias_update",
        f"for the samples {samples} rank {block.rank} adds another bias to the scores than that of"
        f" the step's start, up to {moved:.1g} apart: it moves within a step",
    )


def choice(case: Case) -> Finding | None:
    """From scores that agree another choice: how far are they apart?"""
    if case.kind != "choice":
        return None
    scores = case.of(case.a, case.step, "output", f"{case.name}.biased_scores")
    if scores is None:
        return None
    n = 0
    gap = 0.0
    for block in case.bad:
        mine = scores[block.where[0], block.where[1]]  # (B, T, E)
        a = mine.gather(-1, block.y.long())
        b = mine.gather(-1, block.x.long())
        n += int((block.x != block.y).any(-1).sum())
        gap = max(gap, float((a.sum(-1) - b.sum(-1)).abs().max()))
    return Finding(
        "choice",
        f"from the same scores {n} tokens go to other experts on {case.ranks_of(case.bad)}, whose"
        f" scores are up to {gap:.1g} apart",
    )


# ---- counts --------------------------------------------------------------------------------------
def counts(case: Case) -> Finding | None:
    """Whose tokens have been counted, how often?"""
    if case.kind != "counts":
        return None
    of_rank = loads(case, len(case.right))
    for block in case.bad:
        n = float(block.x.sum() / block.y.sum())
        if n > 1 and torch.equal(block.x, n * block.y):
            also = numbers(case).get(round(n))
            return Finding(
                "summed_twice",
                f"on {case.ranks_of(case.bad)} each token counts {n:g} times: in a forward that is"
                f" repeated, or there are {also or 'as many of something'}",
            )
        forwards = [sum(together) for together in zip(*of_rank.values())]
        for i, load in enumerate(forwards, 1):
            if len(forwards) > 1 and torch.equal(block.x, load):
                return Finding("micro_batch", f"they are the counts of micro-batch {i} alone")
            if torch.equal(block.x, block.y - load):
                return Finding("micro_batch", f"the tokens of micro-batch {i} are not counted")
    return None


# ---- the bias ------------------------------------------------------------------------------------
def bias(case: Case) -> Finding | None:
    """What has moved it: other counts, or nothing that should?"""
    before = case.of(case.a, case.step - 1, "selection_bias", case.name)
    if case.kind != "selection_bias" or before is None:
        return None
    right = case.right - before
    block = case.bad[0]
    wrong = block.x - before
    who = case.ranks_of(case.bad)
    size = float(wrong.abs().max())
    if size == 0:
        return Finding("bias_update", f"on {who} the bias does not move in step {case.step}")
    if not right.any():
        skipped = is_skipped(case)
        why = "is skipped" if skipped else "leaves it where it is"
        return Finding("bias_update", f"step {case.step} {why}, and on {who} the bias moves")
    own = sum(loads(case, len(right)).get(block.rank, []))
    if torch.is_tensor(own) and is_same((own.mean() - own).sign() * size, wrong):
        return Finding(
            "bias_update", f"rank {block.rank} moves the bias by the counts of its own tokens alone"
        )
    factor = size / float(right.abs().max())
    if is_same(factor * right, wrong):
        return Finding("learning_rate", f"on {who} the bias moves {factor:.4g} times as far")
    if is_same(-factor * right, wrong):
        return Finding("bias_update", f"on {who} the bias moves the other way")
    return None


def is_same(x: Tensor, y: Tensor) -> bool:
    return rms(x - y) <= 1e-3 * rms(y)


def is_skipped(case: Case) -> bool:
    """Has A's step left every weight where it was?"""
    weights = [key for key in case.a.entries if key[:2] == (case.step, "weight")]
    return not any(case.comparison.update(key).any() for key in weights)


# ---- terms of balance ----------------------------------------------------------------------------
def terms(case: Case) -> Finding | None:
    """The router's gradient without the terms' right share, or with that of other sequences."""
    layer, _, word = case.name.rpartition(".")
    if case.kind != "output_gradient" or word != "logits":
        return None
    found = Terms.of(case, layer)
    if found is None:
        return None
    gap = rms(case.wrong - case.right)
    off = (case.wrong - case.right).flatten()
    columns = torch.stack([g.flatten() for g in found.gradients.values()], 1)
    if columns.norm() > 0:
        c = torch.linalg.lstsq(columns, off.unsqueeze(1), driver="gelsd").solution.flatten()
        if rms(columns @ c - off) <= min(case.tolerance, 1e-3) * gap:
            return scaled(case, dict(zip(found.gradients, c.tolist())))
    wanted = found.gradients.get("sequence_loss")
    if wanted is None:
        return None
    for what, groups in found.groups():
        d = (found.sequence_gradient(groups) - wanted).flatten()
        if rms(d - off) <= min(case.tolerance, 1e-3) * gap:
            return Finding("term_batch", f"moe_sequence_loss takes {what} for one sequence")
    return None


def scaled(case: Case, more: dict[str, float]) -> Finding | None:
    """more: what there is too much of each term, as a multiple of it."""
    said = []
    for term, c in more.items():
        if abs(c) < 1e-6:
            continue
        ratio = 1 + c
        # fp16's loss scale is in both terms of A's gradient.
        power = round(math.log2(1 - c)) if c < -1 else 0
        if power and abs(2.0**power / (1 - c) - 1) < 1e-3:
            said.append(f"{term} lacks the loss scale {2**power}")
            continue
        n = round(ratio) if ratio > 1 else round(1 / ratio) if ratio > 1e-3 else 0
        if n > 1 and min(abs(ratio - n), abs(ratio * n - 1)) < 1e-4 * n:
            times = f"{n} times" if ratio > 1 else f"1/{n} of"
            there_are = numbers(case).get(n)
            because = f", and there are {there_are}" if there_are else ""
            said.append(f"{term} is {times} the right one{because}")
        else:
            said.append(f"{term} is {ratio:.4g} times the right one")
    return Finding("term_scale", f"in the router's gradient {'; '.join(said)}") if said else None


class Terms:
    """The gradients of a layer's terms at the router's logits, from what A has recorded.

    gradients: term -> (B, T, E), as they are in A where the loss is the mean over all tokens.
    """

    def __init__(self, case: Case, layer: str, logits: Tensor, chosen: Tensor):
        self.case = case
        self.layer = layer
        self.logits = logits
        self.k = chosen.shape[-1]
        self.gradients = {}
        z = self.value("z_loss")
        log_z = logits.logsumexp(-1, keepdim=True)
        if z:
            coefficient = z / float(log_z.square().sum())
            self.gradients["z_loss"] = self.mean(2 * coefficient * log_z * logits.softmax(-1))
        biased = case.a.whole((case.step, "output", f"{layer}.biased_scores"))
        before = case.of(case.a, case.step - 1, "selection_bias", layer)
        self.scores = biased - before
        is_softmax = rms(self.scores - logits.softmax(-1)) < 1e-3 * rms(self.scores)
        self.score = torch.softmax if is_softmax else lambda x, _: x.sigmoid()
        if self.value("sequence_loss"):
            samples = [[i] for i in range(len(logits))]
            self.gradients["sequence_loss"] = self.sequence_gradient(samples)

    @classmethod
    def of(cls, case: Case, layer: str) -> "Terms | None":
        logits = case.of(case.a, case.step, "output", f"{layer}.logits")
        chosen = case.of(case.a, case.step, "choice", layer)
        if logits is None or chosen is None:
            return None
        if (case.step - 1, "selection_bias", layer) not in case.a.entries:
            return None
        return cls(case, layer, logits, chosen)

    def value(self, term: str) -> float:
        found = self.case.of(self.case.a, self.case.step, "term", f"{self.layer}.{term}")
        return 0.0 if found is None else float(found)

    def mean(self, gradient: Tensor) -> Tensor:
        return gradient / self.logits.shape[:2].numel()

    def sequence_gradient(self, groups: list[list[int]]) -> Tensor:
        """Of the sequence-wise loss, where each group of samples is one sequence; times what makes
        of A's sequences A's value."""
        value, gradient = self.sequence_loss(groups)
        samples = [[i] for i in range(len(self.logits))]
        unit, _ = self.sequence_loss(samples)
        return self.mean(gradient * (self.value("sequence_loss") / unit))

    def sequence_loss(self, groups: list[list[int]]) -> tuple[float, Tensor]:
        """Value and gradient without the coefficient."""
        order = torch.sort(self.scores, dim=-1, descending=True, stable=True).indices
        chosen = order[..., : self.k]
        n_expert = self.logits.shape[-1]
        logits = self.logits.clone().requires_grad_()
        total = 0.0
        for group in groups:
            s = self.score(logits[group], -1).flatten(0, 1)  # (tokens, E)
            load = torch.bincount(chosen[group].flatten(), minlength=n_expert).to(s)
            share = s / s.sum(-1, keepdim=True)
            total = total + (load * n_expert / (self.k * len(s)) * share.sum(0)).sum()
        (gradient,) = torch.autograd.grad(total, logits)
        return float(total.detach()), gradient

    def groups(self):
        """(in words, lists of samples): what may have been taken for one sequence."""
        key = (self.case.step, "output", f"{self.layer}.logits")
        forwards = [rows_of(piece, len(x)) for piece, x in self.case.b.blocks(key)]
        yield "each micro-batch", forwards
        yield "the whole batch", [list(range(len(self.logits)))]


# ---- the output ----------------------------------------------------------------------------------
def inside(case: Case) -> Finding | None:
    """Is what is too much the output of a module inside this one?"""
    if case.kind != "output" or case.right.ndim < 2:
        return None
    off = case.wrong - case.right
    own = [key for key in case.comparison.order if key[:2] == case.key[:2]]
    own = [key for key in own if key[2].startswith(f"{case.name}.")]
    for key in reversed(own):  # the outermost first
        y = case.a.whole(key)
        size = float(y.square().sum())
        if y.shape != off.shape or size == 0:
            continue
        times = round(float((y * off).sum()) / size)
        if times >= 1 and case.same(times * y, off, rms(off)):
            return Finding("summed_twice", f"the output of {key[2]} is in it {times + 1} times")
    return None


# ---- spread over ranks ---------------------------------------------------------------------------
def strangers(case: Case) -> Finding | None:
    """Has an expert's gradient what another one of its layer has, too, or its weight that alone?"""
    found = EXPERT.match(case.name)
    if found is None or case.kind not in ("weight", "gradient"):
        return None
    layer, expert = found.groups()
    rest = case.name[found.end() :]
    others = {}  # number of an expert -> what A has of it
    for step, kind, name in case.a.entries:
        other = EXPERT.match(name)
        if (step, kind) != case.key[:2] or other is None or name[other.end() :] != rest:
            continue
        if other[1] == layer and other[2] != expert:
            others[other[2]] = case.a.whole((step, kind, name))
    who = case.ranks_of(case.bad)
    for other, y in others.items():
        if all(case.same(y[block.where], block.x, block.gap) for block in case.bad):
            said = f"{who} has in the place of expert {expert} of {layer} what is expert {other}'s"
            return Finding("wrong_order", said, "which ranks hold which experts, in which order")
    if case.kind != "gradient" or not others:
        return None
    added = set()
    for block in case.bad:
        columns = torch.stack([y[block.where].flatten().double() for y in others.values()], 1)
        off = (block.x - block.y).flatten().unsqueeze(1)
        c = torch.linalg.lstsq(columns, off, driver="gelsd").solution
        if rms(columns @ c.round() - off) > case.tolerance * block.gap:
            return None
        added = {other for other, n in zip(others, c.round().flatten().tolist()) if n}
    said = f"on {who} the gradient of {layer}'s expert {', '.join(sorted(added))} is in it, too"
    return Finding("summed_twice", said, "the sum over replicas: those with the same experts alone")


def idle(comparison: Comparison, key: Key) -> Finding | None:
    """Of what B has not: does it belong to an expert that no token has chosen?"""
    step, kind, name = key
    found = EXPERT.match(name)
    layer, expert = found.groups() if found else ("", "-1")
    if (step, "counts", layer) not in comparison.a.entries:
        return None
    if comparison.a.whole((step, "counts", layer))[int(expert)] > 0:
        return None
    return Finding(
        "idle_expert",
        f"expert {expert} of {layer} has no token in step {step}, and no {kind}; A's is"
        f" {'zeros' if kind == 'gradient' else 'there'}",
    )


HYPOTHESES = (scores, choice, counts, bias, terms, inside, strangers)
