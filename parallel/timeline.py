"""Pipeline schedules as data: the order of each rank's work, its cost unrun, and its messages.

A schedule is a list of operations for each rank. m=8 micro-batches, time to the right, digits
forwards, letters backwards (here twice as long), dots idle;
`python -m parallel.pipeline --schedule=1f1b` draws it:

    gpipe  01234567.........aabbccddeeffgghh     1f1b  0123......aa4bb5cc6dd7ee.ff.gg.hh
           .01234567......aabbccddeeffgghh..           .012....aa3bb4cc5dd6ee7ff.gg.hh..
           ..01234567...aabbccddeeffgghh....           ..01..aa2bb3cc4dd5ee6ff7gg.hh....
           ...01234567aabbccddeeffgghh......           ...0aa1bb2cc3dd4ee5ff6gg7hh......

    schedule      bubble: idle share, m >= p        forwards in memory on rank r, at most
    naive         1 - 1/p                           1
    gpipe         (p-1) / (m + p-1)                 m
    1f1b          (p-1) / (m + p-1)                 p - r
    interleaved   (p-1) / (vm + p-1)                (v+1)p - 2r - 1, through 1/v of the layers each
    zerobubble    (p-1) / (3m + p-1) if F = I = W   p

p: ranks, m: micro-batches, v: model chunks on each rank. The bubble is the idle share of all time.
(Texts often give (p-1)/m, idle per busy time.)

References: GPipe, Huang et al. 2018 (1811.06965); 1F1B, PipeDream-flush, Narayanan et al. 2020
(2006.09503); interleaved, Narayanan et al. 2021 (2104.04473); ZB-H1, Qi et al. 2023 (2401.10241).

Example:
    from parallel.timeline import schedule, simulate

    timeline = simulate(schedule("1f1b", p=4, m=8))
    print(timeline)
    assert abs(timeline.bubble - 3 / 11) < 1e-9  # (p-1) / (m + p-1)
    assert timeline.in_flight == [4, 3, 2, 1]  # p - r
"""

import difflib
import inspect
import itertools
from typing import NamedTuple


class Op(NamedTuple):
    """One operation of a rank, on one micro-batch, in one of the rank's model chunks.

    kind: F forward, B backward; or the backward in two parts: I the input's gradient, W the
    weights' gradients.
    """

    kind: str
    micro_batch: int
    chunk: int = 0


# ---- schedules: they differ in how many forwards a rank is ahead ---------------------------------
def alternating(forwards: list[Op], backwards: list[Op], ahead: int) -> list[Op]:
    """`ahead` forwards, then forwards and backwards in turn, then the remaining backwards."""
    pairs = list(zip(forwards[ahead:], backwards))
    in_turn = [op for pair in pairs for op in pair]
    return forwards[:ahead] + in_turn + backwards[len(pairs) :]


def each(kind: str, m: int) -> list[Op]:
    """This kind of operation on each of m micro-batches."""
    return [Op(kind, i) for i in range(m)]


def naive(rank: int, p: int, m: int, v: int) -> list[Op]:
    """One micro-batch at a time through all stages and back: one rank works, all others wait."""
    return alternating(each("F", m), each("B", m), 0)


def gpipe(rank: int, p: int, m: int, v: int) -> list[Op]:
    """All forwards, then all backwards: the activations of all m micro-batches are in memory."""
    return alternating(each("F", m), each("B", m), m)


def one_forward_one_backward(rank: int, p: int, m: int, v: int) -> list[Op]:
    """GPipe's bubble in less memory: a rank is ahead only until a first gradient can be back."""
    return alternating(each("F", m), each("B", m), p - 1 - rank)


def interleaved(rank: int, p: int, m: int, v: int) -> list[Op]:
    """1F1B on pv virtual stages, every p-th on a rank: the bubble's steps are 1/v as long.

    p micro-batches go through chunk 0, the same p through chunk 1, and so on, then the next p.
    """
    forwards = []
    backwards = []
    for start in range(0, m, p):
        group = range(start, start + p)
        for chunk in range(v):
            forwards += [Op("F", i, chunk) for i in group]
        # A backward passes the chunks in the opposite order.
        for chunk in reversed(range(v)):
            backwards += [Op("B", i, chunk) for i in group]
    return alternating(forwards, backwards, (v - 1) * p + 2 * (p - 1 - rank))


def zerobubble(rank: int, p: int, m: int, v: int) -> list[Op]:
    """ZB-H1: 1F1B in which other ranks wait for the input's gradient alone.

    Rank r computes the weights' gradients r micro-batches later. So every rank holds at most p
    forwards, and the weights' gradients that are left over fill the end.
    """
    ops = []
    for op in one_forward_one_backward(rank, p, m, v):
        if op.kind == "F":
            ops.append(op)
            continue
        ops.append(Op("I", op.micro_batch))
        if op.micro_batch >= rank:
            ops.append(Op("W", op.micro_batch - rank))
    return ops + each("W", m)[max(0, m - rank) :]


SCHEDULES = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zerobubble": zerobubble,
}


def schedule(name: str, p: int, m: int, v: int = 1) -> list[list[Op]]:
    """[rank] -> its operations in order, for p ranks, m micro-batches and v model chunks a rank.

    Raises ValueError for a combination that is impossible.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, 1, 0)[0]
        raise ValueError(f"schedule={name} is none of {', '.join(SCHEDULES)}; did you mean {near}?")
    if min(p, m, v) < 1:
        raise ValueError(f"pp={p}, pp_chunks={v} and {m} micro-batches: each of them is at least 1")
    if (name == "interleaved") != (v > 1):
        raise ValueError(
            f"schedule={name} with --pp_chunks={v}: type --pp_chunks=2 or more for interleaved, "
            "and --pp_chunks=1 for all others"
        )
    if name == "interleaved" and m % p:
        raise ValueError(
            f"schedule=interleaved needs a multiple of pp={p} micro-batches, not {m}: choose "
            "another --micro_batch_size, or 1f1b with --pp_chunks=1"
        )
    return [SCHEDULES[name](rank, p, m, v) for rank in range(p)]


def layers(n_layer: int, p: int, v: int = 1) -> list[list[list[int]]]:
    """[rank][chunk] -> layer numbers; chunk c of rank r is virtual stage c p + r.

    If the stages cannot be equal, the last ones get one layer fewer: the very last also has the
    head. Raises ValueError where there are more stages than layers.
    """
    n_stages = p * v
    if n_stages > n_layer:
        raise ValueError(
            f"--pp={p} with --pp_chunks={v} is {n_stages} stages, and --n_layer={n_layer} gives no "
            "layer to some; type less of the two, or more layers"
        )
    size, n_larger = divmod(n_layer, n_stages)
    stages = []
    for stage in range(n_stages):
        # The first n_larger stages have one layer more each, and move all later stages on.
        first = stage * size + min(stage, n_larger)
        has_one_more = stage < n_larger
        stages.append(list(range(first, first + size + has_one_more)))
    return [stages[rank::p] for rank in range(p)]


# ---- what a schedule costs, without running it ---------------------------------------------------
class Timeline(NamedTuple):
    """When each operation of a schedule runs."""

    ops: list[list[Op]]  # [rank][operation]
    spans: list[list[tuple[float, float]]]  # [rank][operation]: its start and its end

    @property
    def end(self) -> float:
        return max(spans[-1][1] for spans in self.spans)

    @property
    def bubble(self) -> float:
        """The idle share of all ranks' time."""
        busy = sum(end - start for spans in self.spans for start, end in spans)
        return 1 - busy / (len(self.ops) * self.end)

    @property
    def in_flight(self) -> list[int]:
        """[rank] -> the most forwards of one chunk whose activations it keeps at one time."""
        # A forward keeps activations; the last part of its backward lets go of them.
        change = {"F": 1, "B": -1, "I": 0, "W": -1}
        return [max(itertools.accumulate(change[op.kind] for op in ops)) for ops in self.ops]

    def __str__(self) -> str:
        """A line for each rank: 0 1 .. forwards, a b .. backwards (or I), A B .. W.

        Later chunks are marked 0' 0'' and so on.
        """
        lines = []
        width = 1 + max(op.chunk for op in self.ops[0])
        for ops, spans in zip(self.ops, self.spans):
            # A cell is one unit of time: the lengths in COST are whole.
            cells = ["."] * round(self.end)
            for op, (start, end) in zip(ops, spans):
                mark = symbol(op) + "'" * op.chunk
                cells[round(start) : round(end)] = [mark] * (round(end) - round(start))
            lines.append("".join(mark.ljust(width) for mark in cells).rstrip())
        return "\n".join(lines)


def symbol(op: Op) -> str:
    """One character for an operation in the drawing."""
    if op.kind == "F":
        return str(op.micro_batch % 10)
    letter = chr(ord("a") + op.micro_batch % 26)
    return letter.upper() if op.kind == "W" else letter


# A backward multiplies twice, for the gradients of the input and of the weights; a forward once.
COST = {"F": 1, "B": 2, "I": 1, "W": 1}


def simulate(ops: list[list[Op]], cost: dict[str, float] = COST) -> Timeline:
    """When each operation runs if it starts as early as possible and a message takes no time.

    ops: [rank][operation]; cost: kind of operation -> its length, above 0. Raises ValueError for a
    schedule in which ranks wait for each other for ever, or in which a rank lacks an operation.
    """
    p = len(ops)
    v = 1 + max(op.chunk for op in ops[0])
    check_complete(ops)
    spans = [[] for _ in ops]
    ends = {}  # (kind, micro-batch, virtual stage) -> when it ends
    # Rounds over all ranks, until a round runs nothing: then all is done, or all wait.
    moved = True
    while moved:
        moved = False
        for rank, todo in enumerate(ops):
            # A rank keeps its order: it waits at the first operation that lacks something.
            for op in todo[len(spans[rank]) :]:
                stage = op.chunk * p + rank
                needs = needed(op, stage, p * v)
                if not all(need in ends for need in needs):
                    break
                free = spans[rank][-1][1] if spans[rank] else 0
                start = max([free, *(ends[need] for need in needs)])
                end = start + cost[op.kind]
                ends[op.kind, op.micro_batch, stage] = end
                spans[rank].append((start, end))
                moved = True

    # The last round ran nothing, so whatever is left waits for ever.
    stuck = []
    for rank, todo in enumerate(ops):
        n_done = len(spans[rank])
        if n_done < len(todo):
            stuck.append(f"rank {rank} at {todo[n_done]}")
    if stuck:
        raise ValueError(
            f"this schedule cannot go on, each rank waits for another: {'; '.join(stuck)}"
        )
    return Timeline(ops, spans)


def check_complete(ops: list[list[Op]]) -> None:
    """Raises ValueError if a rank lacks an operation, or has one twice."""
    kinds = {op.kind for op in ops[0]}
    all_ops = sorted({op._replace(kind=kind) for op in ops[0] for kind in kinds})
    is_known = kinds in ({"F"}, {"F", "B"}, {"F", "I", "W"})
    if not is_known or any(sorted(todo) != all_ops for todo in ops):
        raise ValueError(
            "each rank does F alone, F and B, or F, I and W, once for the same micro-batches"
        )


def needed(op: Op, stage: int, n_stages: int) -> list[tuple[str, int, int]]:
    """What must have ended before op can start: (kind, micro-batch, virtual stage)."""
    kind, i, _ = op
    if kind == "F":
        return [("F", i, stage - 1)] if stage > 0 else []
    if kind == "W":
        return [("I", i, stage)]
    # The last stage begins its backward from the loss, all others from the next stage's gradient.
    needs = [("F", i, stage)]
    if stage < n_stages - 1:
        needs.append((kind, i, stage + 1))
    return needs


# ---- messages are data too -----------------------------------------------------------------------
class Transfer(NamedTuple):
    """One side of a message: this rank sends it to `peer`, or receives it from there."""

    send: bool
    peer: int
    key: tuple[str, int, int]  # F: hidden states into (micro-batch, stage); B: their gradient


def programs(timeline: Timeline) -> list[list[Op | list[Transfer]]]:
    """Each rank's operations with its messages in between; neighbouring messages are one batch.

    One walk through time writes every message into the programs of both sides at once. So all ranks
    keep one order: both sides of the first unfinished message have reached it, and nobody waits for
    ever, even where a rank's messages go strictly in turn (NCCL). A batch holds nothing that is
    later than the start of the operation after it.
    """
    p = len(timeline.ops)
    n_stages = p * (1 + max(op.chunk for op in timeline.ops[0]))
    # At one moment what ends comes before what starts: its message is then in the program already.
    events = []  # (time, does it start?, rank, operation)
    for rank in range(p):
        for op, (start, end) in zip(timeline.ops[rank], timeline.spans[rank]):
            events.append((end, 0, rank, op))
            events.append((start, 1, rank, op))
    result = [[] for _ in range(p)]
    for _, starts, rank, op in sorted(events):
        if starts:
            result[rank].append(op)
            continue
        # W sends nothing: weights' gradients stay on their rank.
        direction = {"F": 1, "B": -1, "I": -1, "W": 0}[op.kind]
        to_stage = op.chunk * p + rank + direction
        if direction == 0 or not 0 <= to_stage < n_stages:
            continue
        key = ("F" if op.kind == "F" else "B", op.micro_batch, to_stage)
        # Both sides at once, before anything later is written on either.
        receiver = to_stage % p
        add_transfer(result[rank], Transfer(True, receiver, key))
        add_transfer(result[receiver], Transfer(rank == receiver, rank, key))
    return result


def add_transfer(program: list[Op | list[Transfer]], transfer: Transfer) -> None:
    """Adds it to the batch at the program's end, or to a new one after an operation."""
    if not program or isinstance(program[-1], Op):
        program.append([])
    program[-1].append(transfer)


if __name__ == "__main__":
    example = __doc__.partition("Example:\n")[2]
    print(example)
    exec(inspect.cleandoc(example))
