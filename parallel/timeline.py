"""Pipeline schedules as data: the order of each rank's work, its cost unrun, and its messages.

A schedule is data: the order of each rank's work. m=8 micro-batches, time to the right, digits
forwards, letters backwards (here twice as long), dots idle;
`python -m parallel.pipeline --schedule=1f1b` draws it:

    gpipe  01234567.........aabbccddeeffgghh     1f1b  0123......aa4bb5cc6dd7ee.ff.gg.hh
           .01234567......aabbccddeeffgghh..           .012....aa3bb4cc5dd6ee7ff.gg.hh..
           ..01234567...aabbccddeeffgghh....           ..01..aa2bb3cc4dd5ee6ff7gg.hh....
           ...01234567aabbccddeeffgghh......           ...0aa1bb2cc3dd4ee5ff6gg7hh......

    schedule      idle share of all time, m >= p    forwards in memory on rank r, at most
    naive         1 - 1/p                           1
    gpipe         (p-1) / (m + p-1)                 m
    1f1b          (p-1) / (m + p-1)                 p - r
    interleaved   (p-1) / (vm + p-1)                (v+1)p - 2r - 1, through 1/v of the layers each
    zerobubble    (p-1) / (3m + p-1) if F = I = W   p

(Texts often give (p-1)/m, idle per busy time.)

References: GPipe, Huang et al. 2018 (1811.06965); 1F1B: PipeDream-flush, Narayanan et al. 2020
(2006.09503); interleaved: Narayanan et al. 2021 (2104.04473); zero bubble: Qi et al. 2023
(2401.10241).
"""

import difflib
import itertools
from typing import NamedTuple


class Op(NamedTuple):
    # F forward, B backward, or in two parts: I gradient of the input, W gradient of the weights
    kind: str
    micro_batch: int
    chunk: int = 0


# ---- schedules: they differ in how many forwards a rank is ahead ---------------------------------
def alternating(forwards: list[Op], backwards: list[Op], ahead: int) -> list[Op]:
    """`ahead` forwards, then forwards and backwards in turn, then the rest of the backwards."""
    pairs = [op for pair in zip(forwards[ahead:], backwards) for op in pair]
    return forwards[:ahead] + pairs + backwards[len(pairs) // 2 :]


def each(kind: str, m: int) -> list[Op]:
    return [Op(kind, i) for i in range(m)]


def naive(rank: int, p: int, m: int, v: int) -> list[Op]:
    """One micro-batch at a time through all stages and back: one rank works, the others look on."""
    return alternating(each("F", m), each("B", m), 0)


def gpipe(rank: int, p: int, m: int, v: int) -> list[Op]:
    """All forwards, then all backwards: the activations of all m micro-batches wait in memory."""
    return alternating(each("F", m), each("B", m), m)


def one_forward_one_backward(rank: int, p: int, m: int, v: int) -> list[Op]:
    """GPipe's bubble in less memory: ahead only until a first gradient can be back from the later
    stages."""
    return alternating(each("F", m), each("B", m), p - 1 - rank)


def interleaved(rank: int, p: int, m: int, v: int) -> list[Op]:
    """1F1B on pv stages, every p-th on a rank: the bubble's steps have 1/v of the length. p
    micro-batches go through chunk 0, the same p through chunk 1, and so on, then the next p."""
    groups = [range(i, i + p) for i in range(0, m, p)]
    forwards = [Op("F", i, chunk) for group in groups for chunk in range(v) for i in group]
    backwards = [
        Op("B", i, chunk) for group in groups for chunk in reversed(range(v)) for i in group
    ]
    return alternating(forwards, backwards, (v - 1) * p + 2 * (p - 1 - rank))


def zerobubble(rank: int, p: int, m: int, v: int) -> list[Op]:
    """ZB-H1: 1F1B in which only the input's gradient is waited for. Rank r does the weights' r
    micro-batches later, so that all ranks hold p of them at most, and those that are left fill the
    end."""
    ops = []
    for op in one_forward_one_backward(rank, p, m, v):
        ops.append(op if op.kind == "F" else Op("I", op.micro_batch))
        if op.kind == "B" and op.micro_batch >= rank:
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
    """What each of p ranks does for m micro-batches, in order. Raises ValueError for what cannot
    be."""
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
    """Layer numbers [rank][chunk]; chunk c of rank r is virtual stage cp + r. If they do not
    divide, the last stages get one fewer: the very last also has the head. Raises ValueError where
    there are too few.
    """
    if p * v > n_layer:
        raise ValueError(
            f"--pp={p} with --pp_chunks={v} is {p * v} stages, and --n_layer={n_layer} gives no "
            "layer to some; type less of the two, or more layers"
        )
    starts = [s * (n_layer // (p * v)) + min(s, n_layer % (p * v)) for s in range(p * v + 1)]
    return [[list(range(*starts[s : s + 2])) for s in range(rank, p * v, p)] for rank in range(p)]


# ---- what a schedule costs, without running it ---------------------------------------------------
class Timeline(NamedTuple):
    ops: list[list[Op]]
    spans: list[list[tuple[float, float]]]  # start and end of each of them

    @property
    def bubble(self) -> float:
        """The idle share of all ranks' time."""
        busy = sum(end - start for spans in self.spans for start, end in spans)
        return 1 - busy / (len(self.ops) * max(spans[-1][1] for spans in self.spans))

    @property
    def in_flight(self) -> list[int]:
        """Of each rank, how many forwards (of one chunk) it keeps activations of at most."""
        steps = [[{"F": 1, "I": 0}.get(op.kind, -1) for op in ops] for ops in self.ops]
        return [max(itertools.accumulate(row)) for row in steps]

    def __str__(self) -> str:
        """A row a rank: 0 1 .. forwards, a b .. backwards (or I), A B .. W; 0' 0'' in the next
        chunks."""
        rows, width = [], 1 + max(op.chunk for op in self.ops[0])
        for ops, spans in zip(self.ops, self.spans):
            row = ["."] * max(round(spans[-1][1]) for spans in self.spans)
            for (kind, i, chunk), (start, end) in zip(ops, spans):
                mark = {"F": str(i % 10), "W": chr(65 + i % 26)}.get(
                    kind, chr(97 + i % 26)
                ) + "'" * chunk
                row[round(start) : round(end)] = [mark] * (round(end) - round(start))
            rows.append("".join(mark.ljust(width) for mark in row).rstrip())
        return "\n".join(rows)


COST = {"F": 1, "B": 2, "I": 1, "W": 1}


def simulate(ops: list[list[Op]], cost: dict[str, float] = COST) -> Timeline:
    """Each operation as early as can be, if it takes cost[kind] > 0 and a message nothing.

    Raises ValueError for a schedule that cannot go on, or in which a rank lacks something.
    """
    p, spans, ends, moved = len(ops), [[] for _ in ops], {}, True
    v, kinds = 1 + max(op.chunk for op in ops[0]), {op.kind for op in ops[0]}
    full = sorted({op._replace(kind=kind) for op in ops[0] for kind in kinds})
    if kinds not in ({"F"}, {"F", "B"}, {"F", "I", "W"}) or any(
        sorted(todo) != full for todo in ops
    ):
        raise ValueError(
            "each rank does F alone, F and B, or F, I and W, once for the same micro-batches"
        )
    while moved:
        moved = False
        for rank, todo in enumerate(ops):
            for kind, i, chunk in todo[len(spans[rank]) :]:
                s = chunk * p + rank
                needs = {"F": [("F", i, s - 1)] * (s > 0), "W": [("I", i, s)]}.get(
                    kind, [("F", i, s)] + [(kind, i, s + 1)] * (s < p * v - 1)
                )
                if not all(need in ends for need in needs):
                    break
                start = max(
                    [end for _, end in spans[rank][-1:]] + [ends[need] for need in needs] + [0]
                )
                ends[kind, i, s] = start + cost[kind]
                spans[rank].append((start, start + cost[kind]))
                moved = True
    stuck = [
        f"rank {r} at {todo[len(s)]}"
        for r, (todo, s) in enumerate(zip(ops, spans))
        if todo[len(s) :]
    ]
    if stuck:
        raise ValueError(f"this schedule cannot go on, each waits for another: {'; '.join(stuck)}")
    return Timeline(ops, spans)


# ---- messages are data too -----------------------------------------------------------------------
class Transfer(NamedTuple):
    send: bool
    peer: int
    # F: hidden states into (micro-batch, stage); B: the gradient of its output
    key: tuple[str, int, int]


def programs(timeline: Timeline) -> list[list[Op | list[Transfer]]]:
    """Each rank's operations with its messages in between; neighbouring ones are one batch.

    One walk through time writes every message into the programs of both sides at once. So all ranks
    keep one order: both sides of the first message that is not through are at it, and nobody waits
    for ever, even where a rank's messages go strictly in turn (NCCL). A batch holds nothing that is
    later than the start of the operation after it.
    """
    p, result = len(timeline.ops), [[] for _ in timeline.ops]
    work = [(r, *pair) for r in range(p) for pair in zip(timeline.ops[r], timeline.spans[r])]
    for _, starts, rank, op in sorted(
        (span[1 - s], s, r, op) for r, op, span in work for s in (0, 1)
    ):
        if starts:  # at one moment it comes after what ends
            result[rank].append(op)
            continue
        way = {"F": 1, "B": -1, "I": -1, "W": 0}[op.kind]
        to = op.chunk * p + rank + way
        if way and 0 <= to < p * (1 + max(op.chunk for op in timeline.ops[0])):
            key = ("F" if op.kind == "F" else "B", op.micro_batch, to)
            for here, there in (rank, to % p), (to % p, rank):
                if not result[here] or isinstance(result[here][-1], Op):
                    result[here].append([])
                result[here][-1].append(Transfer(here == rank, there, key))
    return result
