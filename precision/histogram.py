"""Which values a format would lose: of every tensor, how many lie in each power of two.

    exponent       -24 ... -15    -14 ... 15      16 ...
    fp16     zero  | subnormal  | all 11 bits  |  saturates
                   2^-24        2^-14          2^16

    format  bits  largest  smallest normal  smallest  values of a tensor in [2^e, 2^(e+1)) become
    fp16     16   65504    2^-14            2^-24     zero if e < smallest's exponent - 1,
    bf16     16   3.4e38   2^-126           2^-133    subnormal if e < smallest normal's,
    e4m3      8   448      2^-6             2^-9      saturated if e > largest's exponent,
    e5m2      8   57344    2^-14            2^-16     and are kept otherwise

Bins are whole powers of two, so three things are counted as kept or as subnormal that are not
quite: exact halves of the smallest number become zero, and what lies between the largest number and
the next power of two saturates (448 ... 512 in e4m3). Multiplying by a power of two, as loss
scaling does, moves a histogram to the right by that many bins and changes nothing else: one
recording answers for every scale.

    recorder = Recorder(model, out_dir, every=100)
    recorder.start(step)                           before the forward passes
    recorder.write(weights, gradients)             once summed: a tensor a line, histograms.jsonl

    python -m precision.histogram RUN [--format=fp16] [--scale=65536] [--step=N] [--out=FILE.png]

prints the tensors of RUN, or of its histograms.jsonl, that would lose most, and draws all of them.
--scale is what gradients are multiplied with. To choose a format record a run in a wider one: what
fp16 has lost is no longer there to be counted.

With several ranks each one counts what it holds, its part of a sharded or split tensor, and rank 0
adds all of them up and writes (one gather of 2.3 KB a tensor and rank). What n ranks hold alike
counts n times, which changes no share.

Micikevicius et al. 2018 (1710.03740) found by such a picture that gradients need scaling.
"""

import json
import math
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

LOWEST, HIGHEST = -150, 128  # bins; float64 values beyond them are in the outermost
FORMATS = {
    "fp16": (-24, -14, 15),
    "bf16": (-133, -126, 127),
    "e4m3": (-9, -6, 8),
    "e5m2": (-16, -14, 15),
}
KINDS = ("weight", "activation", "gradient", "gradient of activation")


def exponents(x: Tensor) -> Tensor:
    """int64 (281,) on the CPU: how many values are zero, are not finite, lie in [2^-150, 2^-149),
    ..., [2^128, 2^129). Counts of parts of a tensor add up to those of the tensor."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).flatten()
    exponent = torch.frexp(x).exponent - 1  # frexp's mantissa is in [1/2, 1)
    bins = exponent.clamp(LOWEST, HIGHEST) - LOWEST + 2
    bins = torch.where(x.isfinite(), bins, 1).masked_fill(x == 0, 0)
    return torch.bincount(bins, minlength=HIGHEST - LOWEST + 3).cpu()


def outside(counts: Tensor, format: str, scale: float = 1.0) -> tuple[float, float, float]:
    """Of the finite values other than 0, multiplied by `scale`, the shares that become zero, become
    subnormal and saturate. Raises ValueError for another format and for a scale that is no power of
    two."""
    if format not in FORMATS:
        raise ValueError(f"--format={format} is not known; take one of {', '.join(FORMATS)}")
    smallest, normal, largest = FORMATS[format]
    shift, values = power(scale), counts[2:].double()
    exponent = torch.arange(LOWEST, HIGHEST + 1) + shift
    parts = (
        exponent < smallest - 1,
        (exponent >= smallest - 1) & (exponent < normal),
        exponent > largest,
    )
    total = max(values.sum().item(), 1)
    return tuple(values[part].sum().item() / total for part in parts)


def power(scale: float) -> int:
    """k of scale = 2^k."""
    mantissa, exponent = math.frexp(scale) if 0 < scale < math.inf else (0, 0)
    if mantissa != 0.5:
        raise ValueError(
            f"--scale={scale:g} is no power of two, such as 65536; bins move as a whole"
        )
    return exponent - 1


class Recorder:
    """Counts in every `every`-th step (never if None) and writes to out_dir/histograms.jsonl.

    All ranks make one and call start and write in every step. Activations are the outputs of the
    nn.Linear modules: under activation checkpointing they count twice, and torch.compile has to
    come first.
    """

    def __init__(self, model: nn.Module, out_dir: str | Path, every: int | None):
        self.model, self.path, self.every = model, Path(out_dir, "histograms.jsonl"), every
        self.step, self.counts, self.hooks = None, {}, []

    def start(self, step: int, scale: float = 1.0) -> None:
        """Before the forward passes of a step; step: how many are completed; scale: the loss scale,
        by which gradients of activations are divided."""
        self.step = step if self.every and step % self.every == 0 else None
        if self.step is None:
            return

        def watch(name: str):
            def hook(module, inputs, output: Tensor) -> None:
                if module.training:
                    self.add(name, "activation", output)
                    if output.requires_grad:
                        output.register_hook(
                            lambda g: self.add(name, "gradient of activation", g, scale)
                        )

            return hook

        self.hooks = [
            module.register_forward_hook(watch(name))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def add(self, name: str, kind: str, x: Tensor, scale: float = 1.0) -> None:
        x = x.detach().to_local() if hasattr(x, "to_local") else x.detach()
        x = x.to(torch.promote_types(x.dtype, torch.float32)) / scale if scale != 1 else x
        self.counts[name, kind] = self.counts.get((name, kind), 0) + exponents(x)

    def write(self, weights, gradients: dict[str, Tensor]) -> None:
        """After the sums over ranks and after unscaling, before clipping: the end of the step that
        start began. weights: a function that gives {name: tensor}."""
        if self.step is None:
            return
        for hook in self.hooks:
            hook.remove()
        for kind, tensors in (("weight", weights()), ("gradient", gradients)):
            for name, x in tensors.items():
                self.add(name, kind, x)
        everyone, self.counts = [self.counts], {}
        if dist.is_initialized():
            mine, everyone = everyone[0], [None] * dist.get_world_size()
            dist.gather_object(mine, everyone if dist.get_rank() == 0 else None)
            if dist.get_rank() > 0:
                return
        total = {}
        for key, counts in (item for counted in everyone for item in counted.items()):
            total[key] = total.get(key, 0) + counts
        rows = (json.dumps(row(self.step, *key, counts)) + "\n" for key, counts in total.items())
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(rows))
        except OSError as error:  # a full disk: a log is not worth a run
            warnings.warn(f"{self.path} cannot be written: {error.strerror}", stacklevel=2)


def row(step: int, name: str, kind: str, counts: Tensor) -> dict:
    zeros, nonfinite, *bins = counts.tolist()
    return {
        "step": step,
        "tensor": name,
        "kind": kind,
        "zeros": zeros,
        "nonfinite": nonfinite,
        "counts": {str(i + LOWEST): n for i, n in enumerate(bins) if n},
    }


def read(path: str | Path, step: int | None = None) -> tuple[int, dict[tuple[str, str], Tensor]]:
    """The step (None: the last one recorded) and its counts by (tensor, kind); a step that was done
    again counts as it was the last time. Raises ValueError."""
    path, found = Path(path), {}
    path = path / "histograms.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; --histogram_every=N makes it") from None
    for line in lines:
        try:
            r, counts = json.loads(line), torch.zeros(HIGHEST - LOWEST + 3, dtype=torch.int64)
            counts[:2] = torch.tensor([r["zeros"], r["nonfinite"]])
            for exponent, n in r["counts"].items():
                counts[int(exponent) - LOWEST + 2] = n
            found.setdefault(r["step"], {})[r["tensor"], r["kind"]] = counts
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
        ):  # a kill may leave half a line
            continue
    steps = sorted(found)
    if not steps or (step is not None and step not in found):
        raise ValueError(
            f"{path} has no histograms" + (f" of step {step}; it has {steps}" if steps else "")
        )
    step = steps[-1] if step is None else step
    return step, found[step]


def table(counts: dict[tuple[str, str], Tensor], format: str, scale: float) -> list[str]:
    """A line for each tensor, those that lose most first; gradients are multiplied by scale."""
    found = []
    for (name, kind), n in counts.items():
        shares = outside(n, format, scale if "gradient" in kind else 1.0)
        already = n[0].item() / max(n.sum().item(), 1)
        found.append((n[1].item(), shares[0] + shares[2], *shares, already, name, kind))
    lines = [
        f"{'to zero':>9}{'subnormal':>10}{'too large':>10}{'is zero':>9}{'not finite':>11}  tensor"
    ]
    for nonfinite, _, *shares, name, kind in sorted(found, reverse=True):
        zero, subnormal, saturated, already = (f"{100 * share:.2f}%" for share in shares)
        lines.append(
            f"{zero:>9}{subnormal:>10}{saturated:>10}{already:>9}{nonfinite:>11}  {name}, {kind}"
        )
    return lines


def draw(
    counts: dict[tuple[str, str], Tensor], step: int, format: str, scale: float, path: str
) -> None:
    """A picture file: a row for each tensor, a column for each power of two, dark where many values
    are, and the format's range, for gradients as it lies before they are multiplied by scale."""
    from matplotlib.figure import Figure

    order = [*dict.fromkeys(name for name, _ in counts)]  # that of the forward pass
    kinds = {
        kind: sorted((key for key in counts if key[1] == kind), key=lambda key: order.index(key[0]))
        for kind in KINDS
    }
    kinds = {kind: keys for kind, keys in kinds.items() if keys}
    heights = [len(keys) + 4 for keys in kinds.values()]
    figure = Figure(figsize=(11, 1 + 0.16 * sum(heights)), dpi=120, layout="constrained")
    axes = figure.subplots(len(kinds), height_ratios=heights, squeeze=False, sharex=True)[:, 0]
    smallest, normal, largest = FORMATS[format]
    used = sum(counts.values())[2:].nonzero().flatten().tolist()
    ends = [i + LOWEST for i in used] + [max(smallest - power(scale), -40), min(largest, 20)]
    for ax, (kind, keys) in zip(axes, kinds.items()):
        shares = torch.stack([counts[key][2:] / counts[key].sum() for key in keys]).log10()
        image = ax.imshow(
            shares.numpy(),
            cmap="viridis_r",
            vmin=-6,
            vmax=0,
            aspect="auto",
            extent=(LOWEST, HIGHEST + 1, len(keys) - 0.5, -0.5),
        )
        shift = power(scale) if "gradient" in kind else 0
        for at, color in (
            (smallest - 1, "tab:red"),
            (normal, "tab:orange"),
            (largest + 1, "tab:red"),
        ):
            ax.axvline(at - shift, color=color, lw=1.5)
        ax.set(xlim=(min(ends) - 2, max(ends) + 3))
        ax.set_title(
            kind + f", to be multiplied by {scale:g}" * (shift != 0), loc="left", fontsize=9
        )
        ax.set_yticks(range(len(keys)), [name for name, _ in keys], fontsize=6)
    axes[-1].set_xlabel(
        f"log2 |value| at step {step}.  {format}: left of the first red line becomes zero, "
        "up to the orange one subnormal; right of the other red one is too large",
        fontsize=8,
    )
    figure.colorbar(image, ax=list(axes), label="log10 of the share of values", shrink=0.5)
    figure.savefig(path)


def main(arguments: list[str]) -> None:
    options = {"format": "fp16", "scale": "1", "step": None, "out": None}
    runs = [a for a in arguments if not a.startswith("-")]
    given = dict(
        a.removeprefix("--").split("=", 1) for a in arguments if a.startswith("--") and "=" in a
    )
    if len(runs) != 1 or len(given) + 1 != len(arguments) or not given.keys() <= options.keys():
        raise ValueError(
            "usage: python -m precision.histogram RUN [--format=fp16] [--scale=65536] "
            "[--step=N] [--out=FILE.png]"
        )
    options |= given
    try:
        scale, step = float(options["scale"]), options["step"] and int(options["step"])
    except ValueError:
        raise ValueError("--scale takes a number, --step an integer") from None
    step, counts = read(runs[0], step)
    lines = table(counts, format := options["format"], scale)
    print(
        f"step {step}, {format}, gradients x {scale:g}; shares of the values that are finite and"
        " not zero"
    )
    print("\n".join(lines))
    folder = Path(runs[0]) if Path(runs[0]).is_dir() else Path(runs[0]).parent
    draw(counts, step, format, scale, options["out"] or folder / "histograms.png")
    print(options["out"] or folder / "histograms.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
