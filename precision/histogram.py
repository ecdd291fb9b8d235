"""Which values a format would lose: counts of each tensor's values by power of two.

    exponent       -24 ... -15    -14 ... 15      16 ...
    fp16     zero  | subnormal  | all 11 bits  |  saturates
                   2^-24        2^-14          2^16

    format  bits  largest  smallest normal  smallest  values of a tensor in [2^e, 2^(e+1)) become
    fp16     16   65504    2^-14            2^-24     zero if e < smallest's exponent - 1,
    bf16     16   3.4e38   2^-126           2^-133    subnormal if e < smallest normal's,
    e4m3      8   448      2^-6             2^-9      saturated if e > largest's exponent,
    e5m2      8   57344    2^-14            2^-16     and are kept otherwise

Bins are whole powers of two, so two kinds of values are counted in the wrong place: exact halves of
the smallest number become zero, but count as subnormal; and values between the largest number and
the next power of two (448 ... 512 in e4m3) saturate, but count as kept. Multiplying by a power of
two, as loss scaling does, moves a histogram to the right by that many bins and changes nothing
else: one recording answers for every scale.

    recorder = Recorder(model, out_dir, interval=100)
    recorder.start(step)                           before the forward passes
    recorder.write(weights, gradients)             once summed: a tensor a line, histograms.jsonl

    python -m precision.histogram RUN [--format=fp16] [--scale=65536] [--step=N] [--out=FILE.png]

prints the tensors of RUN, or of its histograms.jsonl, that would lose most, and draws all of them.
Gradients are multiplied by --scale first. To choose a format, record a run in a wider one: what
fp16 has lost can no longer be counted.

Each rank counts the values it holds, its shard of a tensor or all of it. Rank 0 adds up the counts
of all ranks and writes them (one gather of 2.3 KB a tensor and rank). A tensor that n ranks hold
alike counts n times, which changes no share.

Micikevicius et al. 2018 (1710.03740) found by such a picture that gradients need scaling.

Example:
    import torch
    from precision.histogram import exponents, outside
    counts = exponents(1e-6 * torch.randn(10000))  # small gradients
    zero, subnormal, saturated = outside(counts, "fp16")
    assert subnormal > 0.9
    zero, subnormal, saturated = outside(counts, "fp16", scale=65536)
    assert zero + subnormal + saturated < 0.01
"""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Exponents of the first and the last bin; float64 values beyond count in these two.
LOWEST = -150
HIGHEST = 128
# Exponents of two: of the smallest number, the smallest normal number, the largest number.
FORMATS = {
    "fp16": (-24, -14, 15),
    "bf16": (-133, -126, 127),
    "e4m3": (-9, -6, 8),
    "e5m2": (-16, -14, 15),
}
KINDS = ("weight", "activation", "gradient", "gradient of activation")


# ---- counts --------------------------------------------------------------------------------------
def exponents(x: Tensor) -> Tensor:
    """Counts of x's values, int64 (281,) on the CPU; counts of shards add up to the full tensor's.

    They are: how many values are zero, how many are not finite, how many lie in [2^-150, 2^-149),
    ..., [2^128, 2^129).
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).flatten()
    exponent = torch.frexp(x).exponent - 1  # frexp's mantissa is in [1/2, 1)
    bins = exponent.clamp(LOWEST, HIGHEST) - LOWEST + 2
    # Zeros and values that are not finite have no exponent: the first two counts are theirs.
    bins = torch.where(x.isfinite(), bins, 1).masked_fill(x == 0, 0)
    return torch.bincount(bins, minlength=HIGHEST - LOWEST + 3).cpu()


def outside(counts: Tensor, format: str, scale: float = 1.0) -> tuple[float, float, float]:
    """The shares of values, multiplied by `scale`, that become zero, become subnormal, saturate.

    counts: (281,) of `exponents`. The shares are of the finite values other than 0. Raises
    ValueError for an unknown format and for a scale that is no power of two.
    """
    if format not in FORMATS:
        raise ValueError(f"--format={format} is not known; take one of {', '.join(FORMATS)}")
    smallest, normal, largest = FORMATS[format]
    values = counts[2:].double()
    exponent = torch.arange(LOWEST, HIGHEST + 1) + power(scale)
    ranges = (
        exponent < smallest - 1,
        (exponent >= smallest - 1) & (exponent < normal),
        exponent > largest,
    )
    # A tensor of zeros alone loses nothing; max() spares it the division by 0.
    total = max(values.sum().item(), 1)
    return tuple(values[chosen].sum().item() / total for chosen in ranges)


def power(scale: float) -> int:
    """k of scale = 2^k. Raises ValueError for a scale that is no power of two."""
    mantissa = 0
    if 0 < scale < math.inf:
        mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5:
        raise ValueError(
            f"--scale={scale:g} is no power of two, such as 65536; bins move as a whole"
        )
    return exponent - 1


# ---- recording -----------------------------------------------------------------------------------
class Recorder:
    """Counts in every `interval`-th step (None: never) and writes to out_dir/histograms.jsonl.

    All ranks make one and call start and write in every step. Activations are the outputs of the
    nn.Linear modules: under activation checkpointing they count twice. A head that gives the loss
    (--loss_chunk) has none. torch.compile has to come
    first.
    """

    def __init__(self, model: nn.Module, out_dir: str | Path, interval: int | None):
        self.model = model
        self.path = Path(out_dir, "histograms.jsonl")
        self.interval = interval
        self.step = None  # the step that is being recorded
        self.counts = {}  # (tensor, kind) -> (281,)
        self.hooks = []

    def start(self, step: int, scale: float = 1.0) -> None:
        """Before the forward passes of a step: begins to count, if it is this step's turn.

        step: how many steps are completed. scale: the loss scale, by which gradients of activations
        are divided.
        """
        is_due = self.interval and step % self.interval == 0
        self.step = step if is_due else None
        if self.step is None:
            return
        # Hooks exist in recorded steps alone: the others lose no time to them.
        self.hooks = [
            module.register_forward_hook(self.make_hook(name, scale))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def make_hook(self, name: str, scale: float) -> Callable:
        """A forward hook that counts a module's output and, in backward, the output's gradient."""

        def count_gradient(gradient: Tensor) -> None:
            self.add(name, "gradient of activation", gradient, scale)

        def hook(module, inputs, output: Tensor) -> None:
            # An evaluation within a recorded step would count activations of other data.
            if not module.training:
                return
            # A head that gives the loss in place of logits.
            if output.ndim == 0:
                return
            self.add(name, "activation", output)
            if output.requires_grad:
                output.register_hook(count_gradient)

        return hook

    def add(self, name: str, kind: str, x: Tensor, scale: float = 1.0) -> None:
        """Adds the counts of x / scale to the tensor's."""
        x = x.detach()
        # A DTensor: each rank counts its own shard.
        if hasattr(x, "to_local"):
            x = x.to_local()
        if scale != 1:
            x = x.to(torch.promote_types(x.dtype, torch.float32)) / scale
        self.counts[name, kind] = self.counts.get((name, kind), 0) + exponents(x)

    def write(self, weights: Callable[[], dict], gradients: dict[str, Tensor]) -> None:
        """After the sums over ranks and after unscaling, before clipping: ends what start began.

        weights: gives {name: tensor}, and is called in recorded steps alone.
        """
        if self.step is None:
            return
        # Off at once, so that what follows the step, such as an evaluation, is not slowed down.
        for hook in self.hooks:
            hook.remove()
        for name, x in weights().items():
            self.add(name, "weight", x)
        for name, x in gradients.items():
            self.add(name, "gradient", x)

        # A collective: every rank makes it, also one without a tensor. Rank 0 writes for all.
        counts_of_ranks = gather_on_rank_0(self.counts)
        self.counts = {}
        if counts_of_ranks is None:
            return
        total = {}
        for counts in counts_of_ranks:
            for key, count in counts.items():
                total[key] = total.get(key, 0) + count
        lines = [json.dumps(row(self.step, *key, count)) + "\n" for key, count in total.items()]
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            # The disk is full, for one: a log is not worth a run.
            warnings.warn(f"{self.path} cannot be written: {error.strerror}", stacklevel=2)


def gather_on_rank_0(counts: dict) -> list[dict] | None:
    """The counts of all ranks; None on the ranks other than 0."""
    if not dist.is_initialized():
        return [counts]
    is_main = dist.get_rank() == 0
    counts_of_ranks = [None] * dist.get_world_size() if is_main else None
    dist.gather_object(counts, counts_of_ranks)
    return counts_of_ranks


def row(step: int, name: str, kind: str, counts: Tensor) -> dict:
    """A line of histograms.jsonl; empty bins are left out."""
    zeros, nonfinite, *bins = counts.tolist()
    return {
        "step": step,
        "tensor": name,
        "kind": kind,
        "zeros": zeros,
        "nonfinite": nonfinite,
        "counts": {str(i + LOWEST): n for i, n in enumerate(bins) if n},
    }


# ---- reading -------------------------------------------------------------------------------------
def read(path: str | Path, step: int | None = None) -> tuple[int, dict[tuple[str, str], Tensor]]:
    """The step (None: the last one recorded) and its counts by (tensor, kind).

    path: a run's folder, or its histograms.jsonl. Of a step that was done again, as after a
    rollback, the last record holds. Raises ValueError where there is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "histograms.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; --histogram_every=N makes it") from None
    recorded = {}  # step -> (tensor, kind) -> counts
    for line in lines:
        try:
            step_of_line, key, counts = parse(line)
            recorded.setdefault(step_of_line, {})[key] = counts
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            # A run that was killed may leave half a line.
            continue
    if not recorded:
        raise ValueError(f"{path} has no histograms")
    if step is None:
        step = max(recorded)
    if step not in recorded:
        raise ValueError(f"{path} has no histograms of step {step}; it has {sorted(recorded)}")
    return step, recorded[step]


def parse(line: str) -> tuple[int, tuple[str, str], Tensor]:
    """(step, (tensor, kind), counts) of what `row` made: its inverse."""
    fields = json.loads(line)
    counts = torch.zeros(HIGHEST - LOWEST + 3, dtype=torch.int64)
    counts[:2] = torch.tensor([fields["zeros"], fields["nonfinite"]])
    for exponent, n in fields["counts"].items():
        counts[int(exponent) - LOWEST + 2] = n
    return fields["step"], (fields["tensor"], fields["kind"]), counts


# ---- showing -------------------------------------------------------------------------------------
def table(counts: dict[tuple[str, str], Tensor], format: str, scale: float) -> list[str]:
    """A line for each tensor, the greatest losses first; gradients are multiplied by `scale`."""
    found = []
    for (name, kind), n in counts.items():
        own_scale = scale if "gradient" in kind else 1.0
        zero, subnormal, saturated = outside(n, format, own_scale)
        is_zero = n[0].item() / max(n.sum().item(), 1)
        nonfinite = n[1].item()
        # Sorted by this: what training may not survive, then what the format loses.
        order = nonfinite, zero + saturated, zero, subnormal, saturated, is_zero, name, kind
        found.append(order)
    lines = [
        f"{'to zero':>9}{'subnormal':>10}{'too large':>10}{'is zero':>9}{'not finite':>11}  tensor"
    ]
    for nonfinite, _, *shares, name, kind in sorted(found, reverse=True):
        zero, subnormal, saturated, is_zero = (f"{100 * share:.2f}%" for share in shares)
        lines.append(
            f"{zero:>9}{subnormal:>10}{saturated:>10}{is_zero:>9}{nonfinite:>11}  {name}, {kind}"
        )
    return lines


def draw(
    counts: dict[tuple[str, str], Tensor], step: int, format: str, scale: float, path: str
) -> None:
    """A picture file: a row for each tensor, a column for each power of two.

    A field is dark where many values are. Lines show the format's range; for gradients they are
    where the range lies before the gradients are multiplied by `scale`.
    """
    from matplotlib.figure import Figure

    # counts begins with activations, so names come in the order of the forward pass.
    names = list(dict.fromkeys(name for name, _ in counts))
    panels = {}
    for kind in KINDS:
        keys = [(name, kind) for name in names if (name, kind) in counts]
        if keys:
            panels[kind] = keys
    heights = [len(keys) + 4 for keys in panels.values()]
    figure = Figure(figsize=(11, 1 + 0.16 * sum(heights)), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), height_ratios=heights, squeeze=False, sharex=True)[:, 0]

    # All used bins, and the format's range cut to 2^-40 ... 2^20: bf16's would fill the picture.
    smallest, normal, largest = FORMATS[format]
    used = sum(counts.values())[2:].nonzero().flatten().tolist()
    ends = [i + LOWEST for i in used] + [max(smallest - power(scale), -40), min(largest, 20)]
    lines = ((smallest - 1, "tab:red"), (normal, "tab:orange"), (largest + 1, "tab:red"))
    for ax, (kind, keys) in zip(axes, panels.items()):
        shares = torch.stack([counts[key][2:] / counts[key].sum() for key in keys]).log10()
        # log10 of shares: from a millionth of the values (light) to all of them (dark).
        image = ax.imshow(
            shares.numpy(),
            cmap="viridis_r",
            vmin=-6,
            vmax=0,
            aspect="auto",
            extent=(LOWEST, HIGHEST + 1, len(keys) - 0.5, -0.5),
        )
        shift = power(scale) if "gradient" in kind else 0
        for at, color in lines:
            ax.axvline(at - shift, color=color, lw=1.5)
        ax.set(xlim=(min(ends) - 2, max(ends) + 3))
        title = kind
        if shift != 0:
            title += f", to be multiplied by {scale:g}"
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_yticks(range(len(keys)), [name for name, _ in keys], fontsize=6)
    axes[-1].set_xlabel("log2 |value|", fontsize=8)
    # Above the maps: of many tensors the foot is a page away.
    figure.suptitle(
        f"step {step}, {format}: left of the first red line values become zero, up to the orange\n"
        "one subnormal, right of the other red one too large; dark is where most values are",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    figure.colorbar(image, ax=list(axes), label="log10 of the share of values", shrink=0.5)
    figure.savefig(path)


def main(arguments: list[str]) -> None:
    """The command. Raises ValueError for a user's mistake."""
    options = {"format": "fp16", "scale": "1", "step": None, "out": None}
    runs = []
    given = {}
    for argument in arguments:
        if argument.startswith("--") and "=" in argument:
            name, value = argument.removeprefix("--").split("=", 1)
            given[name] = value
        elif not argument.startswith("-"):
            runs.append(argument)
    # An option given twice, or a word that is none, is as wrong as an unknown option.
    all_read = len(runs) == 1 and len(given) + 1 == len(arguments)
    if not all_read or not given.keys() <= options.keys():
        raise ValueError(
            "usage: python -m precision.histogram RUN [--format=fp16] [--scale=65536] "
            "[--step=N] [--out=FILE.png]"
        )
    options |= given
    format = options["format"]
    try:
        scale = float(options["scale"])
        step = options["step"] and int(options["step"])
    except ValueError:
        raise ValueError("--scale takes a number, --step an integer") from None
    path = Path(runs[0])
    step, counts = read(path, step)
    # The whole table first: a wrong format must not leave half an answer.
    lines = table(counts, format, scale)
    print(
        f"step {step}, {format}, gradients x {scale:g}; shares of the values that are finite and"
        " not zero"
    )
    print("\n".join(lines))
    folder = path if path.is_dir() else path.parent
    picture = options["out"] or folder / "histograms.png"
    draw(counts, step, format, scale, picture)
    print(picture)


if __name__ == "__main__":
    from metrics.outlets import command

    command("precision.histogram", main, OSError, ImportError)
