"""What more ranks bring, and what a larger model costs, on the CPU.

    python bench.py scaling [--quick] [--out=FILE.md]

Ranks. The same global batch on 1, 2 and 4 ranks of DDP which share the cores (threads = cores //
ranks, at least 1), and on one process with 2 threads against two with one each; with Muon (on 4
too), whose matrices every replica works on and zero1 deals out, and with AdamW. All take turns; a
run's figures are those of its median step, the table's are medians over rounds, ratios are round by
round to one process with the same optimizer, with the smallest and largest. Sent: by a rank in a
step, beside ddp's 2 (n-1)/n x the gradients' 4 bytes a parameter. Peak: the resident set of rank 0;
under ddp the others hold the same.

Sizes. Blocks of 1, 2, 4, 8, 16 times the parameters, by twice the depth, then twice the width, in
turn. N is all parameters; FLOPs of a token are metrics/flops.py's 6 N' + 12 L C T (N' without the
embedding), forward and backward; the predicted bytes memory/ranks.py's. A process holds the
interpreter and torch besides: so `own` is the peak less that of a model of next to nothing. It is
more than predicted, which counts tensors: kernels' workspaces and what the allocator keeps are in
it.

Growth. A line through the logarithms: measured ~ x^exponent, by least squares, 1 where cost is
proportional. Memory as a line through the bytes: a + b N, in which b is the bytes that a further
parameter takes, its activations too. Time grows slower than FLOPs as long as larger products are
more efficient ones, memory slower than N, as activations grow as L C and parameters as L C^2.
--quick: small models, one round.
"""

import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import linear_regression, median

import torch

from benchmarks import runs
from memory.activations import activation_bytes
from memory.ranks import bytes_per_rank
from memory.shapes import Shapes, gpt_shapes
from metrics import flops as monitor
from precision import amp

FLAGS = {"--quick": "", "--out": ".+"}
USUAL = [
    "--eval_every=0",
    "--save_every=0",
    "--sample_tokens=0",
    "--log_every=1",
    "--resume=never",
    "--device=cpu",
    f"--data_dir={runs.CACHE}",
]
WORDS, KINDS = 256, ("embedding", "matrix", "head", "scalar")


@dataclass(frozen=True)
class Case:
    """A job: the default one but for its size."""

    n_layer: int
    n_embd: int
    batch_size: int = 16
    block_size: int = 256
    steps: int = 12
    n_head: int = 4

    def once(self, threads: int, ranks: int = 1, more: tuple = ()) -> dict:
        """The train row of a run's median step. Raises RuntimeError."""
        words = [*(f"--{name}={value}" for name, value in vars(self).items()), *more]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            _, rows = runs.run([*words, f"--threads={threads}", *USUAL], Path(folder, "run"), ranks)
        last = [row for row in rows if "step_s" in row][-1]
        # None on Windows, which does not tell a process its peak.
        return runs.middle(rows) | {"peak_bytes": last["peak_bytes"] or math.nan}

    def shapes(self) -> Shapes:
        return gpt_shapes(self.n_layer, self.n_embd, WORDS, self.block_size, n_head=self.n_head)

    def parameters(self, kinds=KINDS) -> int:
        return sum(math.prod(shape) for kind, shape in self.shapes().values() if kind in kinds)

    def flops(self) -> float:
        """Of a token, forward and backward."""
        n = self.parameters(("matrix", "head"))
        return monitor.flops_per_token(n, self.n_layer, self.n_embd, self.block_size)

    def predicted(self, precision: str) -> float:
        """Bytes, by memory/ranks.py: the default optimizer, the whole batch at once."""
        kept = activation_bytes(
            precision, self.batch_size * self.block_size, self.n_layer, self.n_embd, WORDS
        )
        logits = self.batch_size * self.block_size * WORDS
        return bytes_per_rank(
            self.shapes(), "muon", precision=precision, activations=kept, logits=logits
        )["total"]


# The third is the default recipe's size, and main() measures ranks with it.
SIZES = [Case(4, 128), Case(8, 128), Case(4, 256), Case(8, 256), Case(4, 512)]
WAYS = {("muon", "ddp"): 4, ("muon", "zero1"): 2, ("adamw", "ddp"): 2}  # on up to so many ranks
SMALL = [Case(*size, 4, 32, 4, 2) for size in ((2, 16), (4, 16), (2, 32))]


def exponent(xs: list[float], ys: list[float]) -> float:
    """e of y ~ x^e, by least squares through the logarithms."""
    return linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def in_turn(cases: list, rounds: int, measure) -> dict:
    """{case: its figures, one a round}: all of them take turns."""
    found = {case: [] for case in cases}
    for i in range(rounds):
        for case in cases:
            found[case].append(measure(case))
            runs.tell(
                f"round {i + 1} of {rounds}: {case}: {found[case][-1]['tokens_per_s']:,.0f}"
                " tokens/s"
            )
    return found


def of(rows: list[dict], key: str) -> float:
    return median(row[key] for row in rows)


def ratios(rows: list[dict], to: list[dict]) -> str:
    return runs.spread([a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(rows, to)])


def ranks_table(found: dict[tuple, list[dict]], case: Case, cores: int) -> list[str]:
    """found: {(optimizer, layout, ranks, threads of each): runs}."""
    lines = []
    for (optim, layout, n, threads), mine in found.items():
        formula = f"{2 * (n - 1) * 4 * case.parameters() // n:,}" if layout == "ddp" else ""
        lines.append(
            [
                f"{optim}, {layout}",
                f"{n} x {threads}",
                f"{of(mine, 'tokens_per_s'):,.0f}",
                ratios(mine, found[optim, "ddp", 1, cores]),
                f"{of(mine, 'peak_bytes') / 2**20:,.0f}",
                f"{of(mine, 'sent_bytes'):,.0f}",
                formula,
            ]
        )
    head = [
        "",
        "ranks x threads",
        "tokens/s",
        f"ratio to 1 x {cores}",
        "peak MiB",
        "bytes sent",
        "ddp's formula",
    ]
    said = [
        f"- {optim}, {layout}: 2 ranks of one thread / one process of 2: "
        f"**{ratios(found[optim, layout, 2, 1], found[optim, 'ddp', 1, 2])}**"
        for optim, layout, n, threads in found
        if (n, threads) == (2, 1)
    ]
    return [
        (
            f"Ranks, {case.n_layer} layers x {case.n_embd}, {case.batch_size} x {case.block_size} "
            "tokens a step over all:"
        ),
        "",
        *runs.table(head, lines),
        "",
        *said,
    ]


def sizes_table(found: dict[Case, list[dict]], empty: float, precision: str) -> list[str]:
    """empty: peak bytes of a process with next to no model."""
    lines, first = [], next(iter(found)).parameters(("matrix",))
    for case, mine in found.items():
        speed, own = of(mine, "tokens_per_s"), of(mine, "peak_bytes") - empty
        lines.append(
            [
                f"x{case.parameters(('matrix',)) / first:g}",
                f"{case.n_layer} x {case.n_embd}",
                f"{case.parameters():,}",
                f"{case.flops() / 1e6:.2f}",
                f"{speed:,.0f}",
                f"{1000 * of(mine, 'step_s'):.1f}",
                f"{speed * case.flops() / 1e9:.1f}",
                f"{of(mine, 'peak_bytes') / 2**20:,.0f}",
                f"{own / 2**20:,.0f}",
                f"{case.predicted(precision) / 2**20:,.0f}",
            ]
        )
    head = [
        "blocks",
        "layers x width",
        "N",
        "MFLOP a token",
        "tokens/s",
        "ms a step",
        "GFLOP/s",
        "peak MiB",
        "own",
        "predicted",
    ]
    return runs.table(head, lines)


def growth(found: dict[Case, list[dict]], empty: float) -> list[str]:
    """How time and memory grow, as formulas with what was measured in them."""
    seconds = [1 / of(mine, "tokens_per_s") for mine in found.values()]
    counts, flops = [case.parameters() for case in found], [case.flops() for case in found]
    peaks = [of(mine, "peak_bytes") for mine in found.values()]
    own = linear_regression(counts, peaks)
    lines = [
        "- FLOPs a token = 6 N' + 12 L C T",
        (
            f"- seconds a token ~ FLOPs^{exponent(flops, seconds):.2f} ~"
            f" N^{exponent(counts, seconds):.2f}"
        ),
        f"- peak bytes = {own.intercept / 2**20:,.0f} MiB + {own.slope:.1f} N",
    ]
    if min(peaks) > empty:
        lines[-1] += f"; own bytes ~ N^{exponent(counts, [peak - empty for peak in peaks]):.2f}"
    return lines


def main(argv: list[str]) -> int:
    """What `python bench.py scaling ...` does with the words after `scaling`: 0, or 1 where a run
    failed."""
    flags, cores = runs.flags(argv, FLAGS, __doc__), os.cpu_count() or 1
    quick = "--quick" in flags
    sizes, rounds = (SMALL, 1) if quick else (SIZES, 3)
    case = sizes[2]
    layouts = [
        (*way, n, max(1, cores // n)) for way, most in WAYS.items() for n in (1, 2, 4) if n <= most
    ]
    layouts += [(*way, *pair) for way in WAYS for pair in ((1, 2), (2, 1))]
    layouts = [x for x in dict.fromkeys(layouts) if x[1] == "ddp" or x[2] > 1]
    try:  # the first start also fills the cache
        empty = replace(case, n_layer=1, n_embd=4 * case.n_head, batch_size=1).once(cores)[
            "peak_bytes"
        ]
        longer = replace(case, steps=case.steps if quick else 18)
        by_ranks = in_turn(
            layouts,
            1 if quick else 5,
            lambda x: longer.once(x[3], x[2], (f"--optim={x[0]}", f"--data_parallel={x[1]}")),
        )
        by_size = in_turn(sizes, rounds, lambda size: size.once(cores))
    except RuntimeError as error:
        runs.tell(f"bench.py scaling: {error}")
        return 1
    precision = amp.choose("auto", torch.device("cpu"))
    tokens = f"{case.batch_size} x {case.block_size} tokens"
    lines = [
        runs.header(["scaling", *argv]),
        "",
        *ranks_table(by_ranks, case, cores),
        "",
        (
            f"Sizes, one process of {cores} threads, {precision}, {tokens} a step; a process "
            f"with next to no model: {empty / 2**20:,.0f} MiB."
        ),
        "",
        *sizes_table(by_size, empty, precision),
        "",
        *growth(by_size, empty),
    ]
    runs.show(lines, flags.get("--out"))
    return 0
