"""Milliseconds of one step, every class of optim/ against the fastest peer in eager PyTorch.

    python bench.py optim [--quick] [--only=adamw,muon] [--threads=2] [--out=FILE.md]
                          [--beside=FOLDER --model=default|gpt2|wide]

Ours and the peers' take turns in one process; torch's fused C++ kernels have a column as the limit.
Memory layout alone moves a step by up to a factor of 2: so each build allocates everything anew,
the candidates take turns for some rounds (A B C A B C), and a build gives each one's fastest round,
as other processes only ever add time. Milliseconds are medians over builds, the ratio ours/peer
too, with its smallest and largest value over builds in brackets. A peer 1.6 times slower than the
fastest in the first build is not built again. Every step has a new lr, as under a schedule, and a
new gradient, both outside the time. Shampoo, SOAP and KL-SOAP: means over ten steps, one of which
refreshes the preconditioners. KL-SOAP's peer is its authors' kl_opt.py, if PYTHONPATH has it;
TORCHDYNAMO_DISABLE=1 makes it eager.
--beside: the only peer is the class of another checkout's optim/. --model: on all matrices of a
model, that of `python train.py`, GPT-2 124M, or two layers of width 512; Muon has the two tables
outside of the blocks in an AdamW group.
--quick takes 1M parameters instead of 15M and 2 builds, and compiles only what --only names.
On a machine with other busy processes, set OMP_WAIT_POLICY=passive: threads that spin for each
other stall.
"""

import contextlib
import functools
import importlib
import importlib.util
import math
import random
import sys
import time
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from benchmarks import runs


def shapes(kind: str, quick: bool) -> list[tuple[int, ...]]:
    """A GPT's tensors ("all"), its hidden matrices ("hidden"), those of one narrower block
    ("block")."""
    n_layer, d, vocab_size = (4, 128, 1024) if quick else (6, 384, 12000)
    d = {"block": d // 2 if quick else 256}.get(kind, d)
    matrices = [(d, d)] * 4 + [(4 * d, d), (d, 4 * d)]
    if kind == "all":
        return [(vocab_size, d), (256, d)] + ([(d,), (d,)] + matrices) * n_layer + [(d,)]
    return matrices * (1 if kind == "block" else n_layer)


# Layers, width, and the rows of the two tables outside of the blocks.
MODELS = {"default": (4, 256, 256, 256), "gpt2": (12, 768, 50304, 1024), "wide": (2, 512, 256, 256)}


def model_shapes(model: str) -> list[tuple[int, ...]]:
    """A model's matrices, its two tables first."""
    n_layer, d, *tables = MODELS[model]
    return [(n, d) for n in tables] + ([(d, d)] * 4 + [(4 * d, d), (d, 4 * d)]) * n_layer


def plain_products(us, ns, ns_steps, dtype):
    """Muon's quintic as one writes it first, to compare: three products a step."""
    X = torch.stack([(u / u.norm().clamp(min=1e-7)).to(dtype) for u in us])
    X = X.mT if (tall := X.shape[1] > X.shape[2]) else X
    for _ in range(ns_steps):
        A = torch.bmm(X, X.mT)
        X = torch.baddbmm(X, (A @ A).mul_(2.0315).add_(A, alpha=-4.7750), X, beta=3.4445)
    return X.mT if tall else X


@functools.cache
def compiled(update):
    """The recipe of the docstrings: floats as 0-D tensors, or torch compiles again for every new
    lr."""
    fast = torch.compile(update, dynamic=True)
    # Cached: an lr is one tensor for all parameters of a step.
    tensor = functools.lru_cache(16)(functools.partial(torch.tensor, dtype=torch.float64))
    return lambda *args: fast(*(tensor(x) if isinstance(x, float) else x for x in args))


def one(path: str, patch=(), note="", **options):
    """A candidate: name in the table, class, options, and (module, name, value) to set while it
    steps."""
    return path.replace("optim.", "") + note, path, options, patch


def some(path: str, *kernels: str, **options):
    flags = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    return [one(path, (), f" {kernel}", **flags[kernel], **options) for kernel in kernels]


PO, SF, HB = "pytorch_optimizer.", "schedulefree.", "heavyball."
BOTH, ALL = ("loop", "foreach"), ("loop", "foreach", "fused")
EAGER, WHOLE = (("heavyball.utils", "compile_mode", None), ", eager"), ((), ", compile_step")
DECAY, TEN = {"weight_decay": 0.1}, {"preconditioning_compute_steps": 10}
# The defaults of our SOAP, for heavyball's.
OURS = {"precondition_frequency": 10, "max_precond_dim": 10000, "merge_dims": False}
PLAIN = ("optim.muon", "orthogonalize", plain_products)
ROWS = {  # name: (tensors, ours, the peers)
    "sgd": (
        "all",
        one("optim.sgd.SGD", momentum=0.9),
        [*some("torch.optim.SGD", *ALL, momentum=0.9, lr=0.1), one(HB + "SGD", *EAGER)],
    ),
    "adamw": (
        "all",
        one("optim.adamw.AdamW", **DECAY),
        [*some("torch.optim.AdamW", *ALL, **DECAY), one(HB + "AdamW", *EAGER, **DECAY)],
    ),
    "fused-adamw": (
        "all",
        one("optim.adamw.AdamW", **DECAY, fused=True),
        some("torch.optim.AdamW", "fused", **DECAY),
    ),
    "adaml2": (
        "all",
        one("optim.adam_l2.AdamL2", **DECAY),
        some("torch.optim.Adam", *ALL, **DECAY),
    ),
    "ademamix": (
        "all",
        one("optim.ademamix.AdEMAMix", **DECAY),
        [*some(PO + "AdEMAMix", *BOTH, **DECAY), one(HB + "AdEMAMix", *EAGER, **DECAY)],
    ),
    "adafactor": (
        "all",
        one("optim.adafactor.Adafactor"),
        [
            *some("torch.optim.Adafactor", *BOTH),
            *some(PO + "AdaFactor", *BOTH, betas=(None, 0.999)),
        ],
    ),
    "lion": ("all", one("optim.lion.Lion", **DECAY), some(PO + "Lion", *BOTH, **DECAY)),
    "lars": ("all", one("optim.lars.LARS", **DECAY), some(PO + "LARS", *BOTH, **DECAY)),
    "lamb": (
        "all",
        one("optim.lamb.LAMB", **DECAY),
        some(PO + "Lamb", *BOTH, max_grad_norm=0.0, **DECAY),
    ),
    "mars": (
        "all",
        one("optim.mars.MARS", exclude_1d=False, **DECAY),
        some(PO + "MARS", *BOTH, optimize_1d=True, **DECAY),
    ),
    "shampoo": (
        "block",
        one("optim.shampoo.Shampoo"),
        [
            one(PO + "Shampoo", **TEN),
            one(PO + "ScalableShampoo", **TEN, block_size=8192, start_preconditioning_step=1),
        ],
    ),
    "soap": (
        "block",
        one("optim.soap.SOAP"),
        [one(PO + "SOAP"), one(HB + "SOAP", *EAGER, **OURS, use_precond_schedule=False)],
    ),
    "klsoap": (
        "block",
        one("optim.kl_soap.KLSOAP"),
        [one("kl_opt.KLOpt", using_klsoap=True, cast_dtype=torch.float32)],
    ),
    # No peer: compare its time with the sum of SOAP's and Muon's.
    "soapmuon": (
        "block",
        one("optim.soap_muon.SOAPMuon"),
        [one("optim.soap.SOAP"), one("optim.muon.Muon")],
    ),
    "muon": (
        "hidden",
        one("optim.muon.Muon", **DECAY),
        [
            one("torch.optim.Muon", lr=0.02, **DECAY),
            *some(PO + "Muon", *BOTH, **DECAY),
            one(HB + "Muon", *EAGER, **DECAY),
        ],
    ),
    "muown": (
        "hidden",
        one("optim.muown.Muown", **DECAY),
        [one("emerging_optimizers.contrib.muown.Muown", **DECAY)],
    ),
    "dion": (
        "hidden",
        one("optim.dion.Dion3", **DECAY),
        [one("optim.muon.Muon", **DECAY, normuon_beta2=0.95)],
    ),
    "pmuon": ("block", one("optim.pmuon.PMuon", **DECAY), []),
    "muon-polar": (
        "hidden",
        one("optim.muon.Muon", **DECAY, ns="polar", ns_steps=4),
        [one("optim.muon.Muon", (), " with 5 quintic steps", **DECAY)],
    ),
    "adamwschedulefree": (
        "all",
        one("optim.schedule_free.AdamWScheduleFree"),
        [
            *some(SF + "AdamWScheduleFree", *BOTH),
            *some(PO + "ScheduleFreeAdamW", *BOTH),
            one(HB + "SFAdamW", *EAGER),
        ],
    ),
    "sgdschedulefree": (
        "all",
        one("optim.schedule_free.SGDScheduleFree"),
        [*some(SF + "SGDScheduleFree", *BOTH), *some(PO + "ScheduleFreeSGD", *BOTH)],
    ),
    "muon-products": (
        "hidden",
        one("optim.muon.Muon", **DECAY),
        [one("optim.muon.Muon", PLAIN, " with plain products", **DECAY)],
    ),
    "compiled-adamw": (
        "all",
        one("optim.adamw.AdamW", ("optim.adamw", "adamw_update", compiled), **DECAY),
        [one(HB + "AdamW", **DECAY), one(HB + "AdamW", *WHOLE, **DECAY, compile_step=True)],
    ),
    "compiled-lion": (
        "all",
        one("optim.lion.Lion", ("optim.lion", "lion_update", compiled), **DECAY),
        [one(HB + "SGD", (), " (it has no Lion)", **DECAY)],
    ),  # reads and writes as many tensors
    "compiled-schedulefree": (
        "all",
        one(
            "optim.schedule_free.AdamWScheduleFree",
            ("optim.schedule_free", "schedule_free_update", compiled),
        ),
        [one(HB + "SFAdamW"), one(HB + "SFAdamW", *WHOLE, compile_step=True)],
    ),
}
# Bytes of state as the docstrings promise: for each element, for each dimension of length n, and
# for each row.
STATE = {
    "sgd": (4, 0),
    "adamw": (8, 0),
    "adaml2": (8, 0),
    "ademamix": (12, 0),
    "lion": (4, 0),
    "lars": (4, 0),
    "lamb": (8, 0),
    "mars": (12, 0),
    "muon": (4, 0),
    "muown": (4, 0, 12),
    "pmuon": (4, lambda n: 8 * n * n),
    "adamwschedulefree": (8, 0),
    "sgdschedulefree": (4, 0),
    "adafactor": (0, lambda n: 4 * n),
    "shampoo": (8, lambda n: 8 * n * n),
    "soap": (8, lambda n: 8 * n * n),
    "klsoap": (8, lambda n: 8 * n * n + 4 * n),
    "soapmuon": (8, lambda n: 8 * n * n),
}


class Candidate:
    def __init__(
        self,
        path: str,
        options: dict,
        patch: tuple,
        tensor_shapes: list[tuple[int, ...]],
        n_tables: int = 0,
    ):
        module, name = path.rsplit(".", 1)
        self.params = [torch.randn(shape).mul_(0.02).requires_grad_() for shape in tensor_shapes]
        self.grads = [torch.empty(shape) for shape in tensor_shapes]
        groups = [{"params": self.params}]
        if name in ("Muon", "Muown", "Dion3", "SOAPMuon", "PMuon"):
            groups = [{"params": self.params[n_tables:], "use_muon": True}]
            if n_tables:
                groups.append({"params": self.params[:n_tables], "use_muon": False})
        self.optimizer = getattr(importlib.import_module(module), name)(groups, **options)
        self.patch = patch
        if "SFAdamW" in name or "ScheduleFree" in name:
            self.optimizer.train()

    def step(self, noise: torch.Tensor) -> float:
        """Milliseconds of one step; the gradients are the first numbers of `noise`."""
        for p, g in zip(self.params, self.grads):
            # Set anew for each step: some peers overwrite p.grad, or drop it.
            p.grad = g.copy_(noise[: g.numel()].view_as(g))
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.99
        with contextlib.ExitStack() as stack:
            if self.patch:
                module, name, value = importlib.import_module(self.patch[0]), *self.patch[1:]
                value = compiled(getattr(module, name)) if value is compiled else value
                stack.enter_context(mock.patch.object(module, name, value))
            start = time.perf_counter()
            self.optimizer.step()
            return 1000 * (time.perf_counter() - start)

    def state_bytes(self, row: str) -> str:
        """Bytes of state per parameter; AssertionError where they are not the docstring's."""
        found = sum(
            x.nbytes
            for s in self.optimizer.state.values()
            for x in s.values()
            if torch.is_tensor(x)
        )
        (per_element, per_dim, *per_row), size = STATE[row], sum(p.numel() for p in self.params)
        claim = per_element * size + sum(
            per_dim(n) for p in self.params for n in p.shape if per_dim
        )
        claim += sum(per_row) * sum(p.shape[0] for p in self.params)
        if found != claim:
            raise AssertionError(f"{found} bytes of state, the docstring's formula gives {claim}")
        return f"{found / size:.3g}"


def older(row: str, folder: str) -> list[tuple]:
    """The only peer of `row`: its class in another checkout, whose file is imported alone."""
    _, ours, peers = ROWS[row]
    # A variant is compared with the older checkout's usual form.
    _, path, options, patch = next((peer for peer in peers if peer[1] == ours[1]), ours)
    module, name = path.rsplit(".", 1)
    file = Path(folder, *module.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(f"beside.{module}", file)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    if patch:
        patch = (f"beside.{patch[0]}", *patch[1:])
    return [one(f"beside.{path}", patch, **options)]


def measure(row: str, quick: bool, skip, beside: str | None = None, model: str | None = None):
    """One line of the table; `skip(text)` hears of each peer that is missing or fails."""
    kind, (mine, *ours), peers = ROWS[row]
    if beside is not None:
        peers = older(row, beside)
    specs, times = {mine: ours} | {name: spec for name, *spec in peers}, {}
    tensor_shapes, state, n_tables = shapes(kind, quick), "as above", 0
    if model is not None:
        tensor_shapes, state, n_tables = model_shapes(model), "", 2
    warm, rounds, steps, builds = {
        "all": (3, 7, 1, 6),
        "hidden": (1, 3, 1, 4),
        "block": (1, 1, 10, 4),
    }[kind]
    warm, rounds, builds = (min(warm, 2), min(rounds, 2), 2) if quick else (warm, rounds, builds)
    if model is not None:
        builds = 2 if quick else 6
    limits = {name for name in specs if name.endswith(" fused") and "fused" not in row}  # not eager
    noise = torch.randn(max(map(math.prod, tensor_shapes)) + 1000).mul_(0.02)
    for build in range(builds):
        # Shifts the addresses of what is allocated next: layout alone changes the time of a step.
        junk = [torch.empty(random.randrange(1000, 1_000_000)) for _ in range(10)]
        candidates = {}
        for name, spec in list(specs.items()):
            try:
                candidates[name] = Candidate(*spec, tensor_shapes, n_tables)
                for _ in range(warm):
                    candidates[name].step(noise)
            except Exception as error:  # whatever a peer raises, the others are still measured
                if name == mine:
                    raise
                reason = "not installed" if isinstance(error, ImportError) else type(error).__name__
                skip(f"skipped {name}: {reason} ({str(error)[:100]!r})")
                del specs[name]
        passed: dict[str, list[float]] = {name: [] for name in specs}
        for i in range(rounds):
            for name in specs:
                round_ms = [candidates[name].step(noise[7 * (10 * i + j) :]) for j in range(steps)]
                passed[name].append(sum(round_ms) / steps)
        for name in specs:
            times.setdefault(name, []).append(min(passed[name]))
        # STATE knows no AdamW groups, which a whole model has.
        if row in STATE and model is None:
            state = candidates[mine].state_bytes(row)
        fastest = min(
            (times[name][0] for name in specs if name != mine and name not in limits), default=0
        )
        specs = {
            k: v for k, v in specs.items() if times[k][0] <= 1.6 * fastest or k in (mine, *limits)
        }
        del candidates, junk
    ms = {name: median(values) for name, values in times.items()}
    eager = sorted((name for name in specs if name != mine and name not in limits), key=ms.get)
    versus = ["none", "", ""]
    if eager:
        ratios = [a / b for a, b in zip(times[mine], times[eager[0]])]
        versus = [
            eager[0],
            f"{ms[eager[0]]:.1f}",
            f"**{median(ratios):.2f}** ({min(ratios):.2f}..{max(ratios):.2f})",
        ]
    fused = ", ".join(f"{ms[name]:.1f}" for name in ms if name in limits)
    rest = ", ".join(f"{k} {ms[k]:.1f}" for k in ms if k not in (mine, *eager[:1], *limits))
    title = mine.rsplit(".", 1)[1] if row in STATE else row
    return "| " + " | ".join([title, f"{ms[mine]:.1f}", *versus, fused, state, rest]) + " |"


def optim(argv: list[str], rows: list[str], quick: bool, **against) -> list[str]:
    """Prints the table as it grows; returns its lines."""
    lines, skipped = [], []

    def emit(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    emit(runs.header(["optim", *argv]) + "\n")
    emit(
        "| | ours, ms | fastest peer | its ms | ratio | torch fused, ms | state, B/parameter |"
        " others, ms |"
    )
    emit("|---" * 8 + "|")
    for row in rows:
        try:
            emit(measure(row, quick, lambda text: skipped.append(f"- {row}: {text}"), **against))
        except Exception as error:  # one broken optimizer does not end the bench
            emit(
                f"| {row} | failed: {type(error).__name__}: {error} | | | | | | |".replace(
                    "\n", " "
                )
            )
    emit("\n".join(["", *skipped]))
    return lines


def main(argv: list[str]) -> int:
    """What `python bench.py optim ...` does with the words after `optim`."""
    allowed = {"--quick": "", "--only": "[a-z0-9,-]+", "--threads": "[1-9][0-9]*", "--out": ".+"}
    allowed |= {"--beside": ".+", "--model": "|".join(MODELS)}
    flags = runs.flags(argv, allowed, __doc__)
    rows = [row for row in ROWS if "--quick" not in flags or "compiled" not in row]
    rows = flags["--only"].split(",") if "--only" in flags else rows
    for row in rows:
        if row not in ROWS:
            raise ValueError(
                f"--only={row} is not understood; {runs.usage(__doc__)}; NAME: {' '.join(ROWS)}"
            )
    if "--beside" in flags:
        for row in rows:
            file = ROWS[row][1][1].rpartition(".")[0].replace(".", "/") + ".py"
            if not Path(flags["--beside"], file).is_file():
                raise ValueError(f"--beside={flags['--beside']} has no {file}; type another folder")
    elif "--model" in flags:
        raise ValueError("--model compares two checkouts; type --beside=FOLDER too")
    torch.set_num_threads(int(flags.get("--threads", torch.get_num_threads())))
    against = {"beside": flags.get("--beside"), "model": flags.get("--model")}
    lines = optim(argv, rows, "--quick" in flags, **against)
    if "--out" in flags:
        Path(flags["--out"]).write_text("\n".join(lines) + "\n")
    return int(any("| failed:" in line for line in lines))
