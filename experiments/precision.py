"""Claim: half precision trains as well as fp32: bf16 as it is, fp16 with loss scaling, without
which gradients vanish; FP8 with a scale for each block, where one for a tensor is too coarse; half
the bits are half the memory.

Source: the second lesson (number formats, AMP, FP8 with block-wise scales after DeepSeek-V3), the
third and the fifth (AMP, loss scaling, "about 50 % of the memory, same accuracy").

Protocol: `default`: 300 steps of train.py's default job, 3 seeds; the figure is the final
validation loss, seed by seed against fp32's, for fp8 also against bf16's. `fp16`: the same with 2
layers of width 64 and 512 tokens a step, as a CPU takes 30 times as long for fp16; with a fixed
scale of 2^-10 gradients are as small as if 2^19 tokens were averaged. The gradients of the last
fp32 step are counted by powers of two (precision/histogram.py); of the fp16 runs, how many became
zero. `outlier`: 2 layers of width 128, 150 steps, and before every product of the blocks one more
input channel: 2^18 times the largest activation at the first token of each sequence, zero
elsewhere, with zero weights. In exact arithmetic nothing changes, and the bf16 run has it too.
`gradient`: the relative error of one gradient of such a model, for outliers of 2^0 to 2^24.
`bytes`: what a forward pass of the default model keeps for backward.

Expected: bf16 within 0.3 % of fp32, fp8 by block within 0.25 % of bf16, fp16 with scaling within
0.3 % of fp32; without it gradients become zero, most of them at 2^-10. e4m3 is a float: an outlier
costs nothing up to 2^13 or so; at 2^18 one scale for a tensor leaves nothing of the other
activations, one for a row loses the token that has the outlier, one for a block 127 channels of
that token. Memory: kept activations by less than half, since norms and losses stay in fp32, weights
and state not at all; our fp8 keeps what bf16 keeps. The speed of fp8 says nothing here: it is
emulated.

    python -m experiments.precision [--quick] [--out=DIR] [--jobs=N]
    python -m experiments.precision --data=FILE --precisions=fp32,bf16 --budget=10m
"""

import re
import tempfile
from functools import partial

# Else `precision` is this file
import torch
import torch.nn.functional as F

import model
from data import corpora, dataset
from experiments import claims, protocol
from experiments.findings import (
    INK,
    dots,
    groups,
    judged,
    line,
    listed,
    markdown,
    mean_sd,
    paired,
    pick,
    plus_minus,
)
from precision import amp, fp8, histogram

SCALINGS, SEEDS = ("block", "row", "tensor"), (1, 2, 3)
CASES = {
    "gradient": ("bf16", *(f"fp8 {s}" for s in SCALINGS)),
    "bytes": ("fp32", "bf16", "bf16_sr", "fp16", "fp8 block"),
    "fp16": ("fp32", "fp16", "fp16 x 1", "fp16 x 2^-10"),
    "outlier": ("bf16", *(f"fp8 {s}" for s in SCALINGS), "fp8 tensor, no outlier"),
    "default": ("fp32", "bf16", "bf16_sr", *(f"fp8 {s}" for s in SCALINGS)),
}
SMALL = {
    "fp16": dict(n_layer=2, n_embd=64, block_size=64, batch_size=8),
    "default": {},
    "outlier": dict(n_layer=2, n_embd=128, block_size=128, batch_size=8),
}
RATIO, RATIOS = 18, range(0, 25, 2)  # powers of two


def grid(seeds: tuple[int, ...]) -> list[dict]:
    return [
        dict(part=part, case=case, seed=seed)
        for part, cases in CASES.items()
        for seed in (seeds[:1] if part == "bytes" else seeds)
        for case in cases
    ]


GRID, QUICK = grid(SEEDS), grid(SEEDS[:1])


# ---- rows ----------------------------------------------------------------------------------------
def row(keys: dict, quick: bool) -> dict:
    part, case, seed = keys["part"], keys["case"], keys["seed"]
    if part == "gradient":
        return gradient_errors(case, seed)
    if part == "bytes":
        return kept_bytes(case)
    if part == "outlier" and "no outlier" not in case:
        fp8.linear = partial(with_outlier, fp8.linear, 2.0**RATIO)  # what fp8.convert takes
        model.Linear.matmul = staticmethod(partial(with_outlier, F.linear, 2.0**RATIO))
    steps = 4 if quick else 150 if part == "outlier" else 300
    fields = SMALL["fp16" if quick else part] | dict(
        steps=steps, seed=seed, histogram_every=steps - 1
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = protocol.train_run(out_dir=f"{folder}/run", **fields, **precision_of(case))
        end = {"val_loss": protocol.curve(rows, "val_loss")[-1], "loss": protocol.tail(rows)}
        return end | counted(f"{folder}/run")


def precision_of(case: str) -> dict:
    """train.py's fields for "fp8 row", "fp16 x 2^-10", ..."""
    name, _, rest = case.removesuffix(", no outlier").partition(" ")
    if name == "fp8":
        return {"precision": name, "fp8.scaling": rest}
    scale = {"": {}, "x 1": {"scaler.fixed": 1.0}, "x 2^-10": {"scaler.fixed": 2.0**-10}}[rest]
    return {"precision": name} | scale


def counted(run: str) -> dict:
    """The last step's gradients, of weights and of activations: the share that is zero; of the
    others by powers of two from 2^-60 on; those that fp16 would lose if they were multiplied by
    2^-10, 1, 2^16.
    """
    _, counts = histogram.read(run)
    total = sum(n for (_, kind), n in counts.items() if "gradient" in kind)
    lost = {f"lost_{k}": histogram.outside(total, "fp16", 2.0**k)[0] for k in (-10, 0, 16)}
    start = -60 - histogram.LOWEST + 2
    shares = [float(f"{x:.3g}") for x in (total[start : start + 80] / total[2:].sum()).tolist()]
    return {"zero": (total[0] / total.sum()).item()} | lost | {"histogram": shares}


def with_outlier(matmul, ratio: float, x, weight, bias=None, **options):
    """The layer with a channel in front that its weights ignore: 0, and at the first token an
    outlier."""
    extra = x.new_zeros(*x.shape[:-1], 1)
    extra[..., 0, 0] = ratio * x.detach().abs().amax()
    x, weight = torch.cat([extra, x], -1), torch.cat([weight.new_zeros(len(weight), 1), weight], 1)
    return matmul(x, weight, bias, **options)


def gradient_errors(case: str, seed: int) -> dict:
    """‖g - g'‖/‖g'‖ over the blocks' matrices, g' in fp32 without outlier, for each of RATIOS."""
    shape = model.GPTConfig(n_layer=2, n_embd=128, block_size=128, zero_init=False, seed=seed)
    corpus = corpora.load("python", "bytes", str(protocol.CACHE))
    tokens = dataset.Dataset(corpus.train, 128, seed, 256)(range(8))
    gpt, linear, device = model.GPT(shape), fp8.linear, torch.device("cpu")
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            p.copy_(model.initial_weight(shape, name, tuple(p.shape)))

    def gradient(precision: str) -> torch.Tensor:
        gpt.zero_grad()
        with amp.autocast(precision, device):
            gpt(tokens[:, :-1], tokens[:, 1:]).backward()
        return torch.cat(
            [p.grad.flatten() for n, p in gpt.named_parameters() if n.startswith("blocks.")]
        )

    true, errors = gradient("fp32"), []
    for k in RATIOS:
        fp8.linear = partial(with_outlier, linear, 2.0**k)
        for module in gpt.modules():
            if isinstance(module, model.Linear):
                module.matmul = partial(with_outlier, F.linear, 2.0**k)
        if case != "bf16":
            fp8.convert(gpt, device, case.removeprefix("fp8 "))
        errors.append(
            ((gradient("bf16" if case == "bf16" else "fp32") - true).norm() / true.norm()).item()
        )
    return {"errors": errors}


def kept_bytes(case: str) -> dict:
    """Of the default model, bytes that one forward of 2 x 256 tokens keeps for backward, per token;
    and bytes of weight and gradient, per parameter."""
    name, device = precision_of(case)["precision"], torch.device("cpu")
    gpt, kept = model.GPT(model.GPTConfig()).to(amp.PRECISIONS[name].weights), {}
    own = {p.untyped_storage()._cdata for p in gpt.parameters()}
    if name == "fp8":
        fp8.convert(gpt, device)

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    tokens = torch.randint(256, (2, 257), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), amp.autocast(name, device):
        gpt(tokens[:, :-1], tokens[:, 1:])
    # Autocast's, of weights: they are no activations
    copies = {p.numel() for p in gpt.parameters()}
    kept = [x for at, x in kept.items() if at not in own and x.numel() not in copies]
    sizes = sum(x.untyped_storage().nbytes() for x in kept)
    return {"kept": sizes / 512, "per_parameter": 2 * next(gpt.parameters()).element_size()}


# ---- what they say -------------------------------------------------------------------------------
def gaps(rows: list[dict], part: str, case: str, base: str) -> list[float]:
    return paired(pick(rows, part=part, case=case), pick(rows, part=part, case=base), "val_loss")


def mean_of(rows: list[dict], part: str, case: str, name: str) -> float:
    return mean_sd([r[name] for r in pick(rows, part=part, case=case)])[0]


def against(rows: list[dict], part: str, case: str, *bases: str) -> list[str]:
    """Cells: the case, its loss, the gaps to these."""
    loss = plus_minus([r["val_loss"] for r in pick(rows, part=part, case=case)])
    return [case, loss, *(plus_minus(gaps(rows, part, case, base), "+.2%") for base in bases)]


def error(rows: list[dict], case: str, k: int) -> str:
    found = [r["errors"][RATIOS.index(k)] for r in pick(rows, part="gradient", case=case)]
    return plus_minus(found, ".3f") if found else ""


def parts(rows: list[dict]) -> dict[str, bool]:
    """What is claimed, in figures: does it hold?"""
    bf16, block = gaps(rows, "default", "bf16", "fp32"), gaps(rows, "default", "fp8 block", "bf16")
    scaled, fixed = (gaps(rows, "fp16", case, "fp32") for case in ("fp16", "fp16 x 2^-10"))
    lost = [mean_of(rows, "default", "fp32", f"lost_{k}") for k in (-10, 0, 16)]
    rough, fine = (gaps(rows, "outlier", f"fp8 {s}", "bf16") for s in ("tensor", "block"))
    kept = {r["case"]: r["kept"] for r in pick(rows, part="bytes")}
    half, eight = kept["bf16"] / kept["fp32"], kept["fp8 block"] / kept["bf16"]
    return {
        f"bf16 ends {plus_minus(bf16, '+.2%')} from fp32 (claimed: within 0.3 %)": within(
            bf16, 0.003
        ),
        f"fp8 by block {plus_minus(block, '+.2%')} from bf16 (within 0.25 %)": within(
            block, 0.0025
        ),
        f"fp16 with scaling {plus_minus(scaled, '+.2%')} from fp32 (within 0.3 %)": within(
            scaled, 0.003
        ),
        f"fp16 at a fixed 2^-10 {plus_minus(fixed, '+.1%')} (more than 1 % worse)": (
            mean_sd(fixed)[0] > 0.01
        ),
        (
            f"fp16 would make {lost[0]:.1%}, {lost[1]:.2%}, {lost[2]:.3%} of the default job's"
            " gradients 0 at a scale of 2^-10, 1, 2^16"
            " (with scaling a tenth of those without, or less)"
        ): (lost[2] <= lost[1] / 10),
        (
            f"with outliers fp8 by tensor ends {plus_minus(rough, '+.1%')},"
            f" by block {plus_minus(fine, '+.1%')} from bf16"
            " (by tensor worse with every seed, by 1 % at least)"
        ): (min(rough) > max(fine) + 0.01),
        f"bf16 keeps {half:.2f} of the bytes of fp32's activations (half: 0.6 or less)": (
            half <= 0.6
        ),
        f"fp8 keeps {eight:.2f} of bf16's (half: 0.6 or less)": eight <= 0.6,
    }


def within(values: list[float], limit: float) -> bool:
    """The mean lies within +-limit; NaN does not."""
    return abs(mean_sd(values)[0]) <= limit


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    return judged(parts(rows))


def table(rows: list[dict]) -> str:
    lines = listed(parts(rows))
    bench, kept = (
        protocol.RESULTS / "benchmarks.md",
        {r["case"]: r for r in pick(rows, part="bytes")},
    )
    speeds = bench.read_text(encoding="utf-8") if bench.exists() else ""
    speeds = dict(re.findall(r"^\| (\w+) \| \*\*.+?\*\* \(.+?\) \| ([\d,]+) \|", speeds, re.M))
    sizes = {case: kept.get(case, kept["fp8 block"]) for case in CASES["default"]}
    default = [
        [
            *against(rows, "default", case, "fp32", "bf16"),
            f"{size['kept']:,.0f}",
            size["per_parameter"],
            "emulated" if "fp8" in case else speeds.get(case, "not measured"),
        ]
        for case, size in sizes.items()
    ]
    small = [
        [*against(rows, "fp16", case, "fp32"), f"{mean_of(rows, 'fp16', case, 'zero'):.1%}"]
        for case in CASES["fp16"]
    ]
    outlier = [
        [*against(rows, "outlier", case, "bf16"), *(error(rows, case, k) for k in (0, 14, 16, 18))]
        for case in CASES["outlier"]
    ]
    return "\n\n".join(
        [
            "\n".join(lines),
            markdown(
                [
                    "default job",
                    "validation loss",
                    "against fp32",
                    "against bf16",
                    "bytes kept for a token",
                    "bytes of weight and gradient",
                    "tokens/s",
                ],
                default,
            ),
            (
                "tokens/s: [benchmarks](benchmarks.md), as rows here run two at a time; emulated"
                " FP8 has no speed."
            ),
            markdown(
                ["small job", "validation loss", "against fp32", "gradients that are 0"], small
            ),
            markdown(
                [
                    f"outliers of 2^{RATIO}",
                    "validation loss",
                    "against bf16",
                    *(f"gradient's error at 2^{k}" for k in (0, 14, 16, 18)),
                ],
                outlier,
            ),
        ]
    )


def percent(rows: list[dict], part: str, base: str, name: str = "") -> dict[str, list[float]]:
    cases = [case for case in CASES[part] if case != base]
    return {
        name + case.replace(" x ", ", loss x "): [100 * x for x in gaps(rows, part, case, base)]
        for case in cases
    }


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(12.5, 8.5)
    (losses, counts), (errors, outlier) = figure.subplots(2, 2)
    losses.axvspan(-0.3, 0.3, color=INK[2], alpha=0.15, lw=0)
    dots(losses, percent(rows, "default", "fp32") | percent(rows, "fp16", "fp32", "small job: "))
    losses.set_xscale("symlog", linthresh=1, linscale=3)
    ticks = (-1, -0.3, 0, 0.3, 1, 10, 100)
    losses.set(
        xlim=(-1, 300),
        title="300 steps in each precision (green: within 0.3 %)",
        xlabel="validation loss against fp32's, same seed, % (> 1: logarithmic)",
    )
    losses.set_xticks(ticks, [f"{x:+g}" for x in ticks])
    shares = zip(*(r["histogram"] for r in pick(rows, part="default", case="fp32")))
    means = [100 * mean_sd(found)[0] for found in shares]
    top = max(means)
    counts.bar(range(-60, 20), means, 1, color=INK[5], alpha=0.6, align="edge")
    for y, shift, color, name in (
        (1.08, 0, INK[1], "as they are"),
        (1.24, 16, INK[2], "times 2^16"),
    ):
        counts.plot(
            [-25 - shift, 16 - shift], [y * top] * 2, lw=6, color=color, solid_capstyle="butt"
        )
        counts.text(
            -24.5 - shift,
            (y + 0.025) * top,
            f"fp16's range, gradients {name}",
            ha="left",
            va="bottom",
            fontsize=9,
        )
        counts.axvline(-25 - shift, ymax=y / 1.42, color=color, ls="--", lw=1.2)
    counts.set(
        xlim=(-60, 17),
        ylim=(0, 1.42 * top),
        xlabel="log2 |gradient|, of weights and activations",
        ylabel="% of the gradients that are not 0",
        title="Default job: fp16 makes 0 what is left of its line",
    )
    for ((case,), mine), color in zip(groups(pick(rows, part="gradient"), "case").items(), INK):
        points = zip(RATIOS, zip(*(r["errors"] for r in mine)))
        line(errors, {k: [*e] for k, e in points}, case, color=color, marker="o", ms=4)
    errors.set(
        yscale="log",
        xlabel="log2 of outlier / largest activation",
        ylabel="relative error of a gradient",
        title="An outlier that the weights ignore",
    )
    errors.legend(frameon=False)
    dots(outlier, percent(rows, "outlier", "bf16"), INK[1])
    outlier.set(
        xlabel="validation loss against bf16's with the same outliers and seed, %",
        title=f"150 steps with outliers of 2^{RATIO}",
    )


# ---- on somebody's own text ----------------------------------------------------------------------
TYPED = {claims.slug(case): case for case in dict.fromkeys((*CASES["default"], *CASES["fp16"]))}


def candidate(name: str) -> dict:
    return {"lr": 2.0**-5} | precision_of(TYPED[name])


if __name__ == "__main__":
    claims.main(__file__, [*TYPED], candidate)
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
