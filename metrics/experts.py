"""How evenly tokens go to experts: numbers of a watched step, and a picture of the run.

    load of an expert  its tokens / the mean over the experts of its layer: 1 where all are even,
                       0 for an expert without tokens, at most experts / active experts

    what the train row of a watched step gets     for a layer, /LAYER      over all layers
    moe_load_max                                  most loaded expert       largest
    moe_load_min                                  least loaded expert      least
    moe_load_entropy                              -Σ p log p / log E       least
    moe_log_z                                     mean log Σ exp(logits)   -

p: an expert's share of the layer's tokens, E: experts; an entropy of 1 is even, of 0 is one expert
for all. log Z is the router's, in nats; the router's z-loss keeps it small.

    out_dir/moe_load.jsonl    a line a watched step: {"step": 20, "tokens": {LAYER: [12, 7, ...]}}
    out_dir/moe_load.png      a map for each layer, experts x steps, drawn at the end

    python -m metrics.experts RUN [--out=FILE.png]     draws it, also while the run goes on

The counts are exact and of the whole batch, whatever the layout (run/balance.py). A resumed run
cuts the file back to the step it loaded; after a rollback the next watched step cuts what it undid.
Exit status: 0 done; 2 a mistake, in one line.
"""

import json
import math
import os
import warnings
from pathlib import Path

from torch import Tensor

from metrics.labels import plain
from metrics.logger import cut_back, read_metrics
from metrics.outlets import command

# The colours end at a quarter of the mean load and at four times of it.
FACTOR = 4
NO_TOKEN = "#ffe600"  # yellow: black is too near to the blue of a quarter


def statistics(counts: dict[int, list[int]], log_z: list[float]) -> dict[str, float]:
    """What the train row gets. counts: layer -> tokens of each expert; log_z: mean of each."""
    found = {}
    for (layer, tokens), mean_log_z in zip(counts.items(), log_z, strict=True):
        total = sum(tokens)
        mean = total / len(tokens)
        shares = [n / total for n in tokens if n > 0]
        # Not -sum: an entropy of 0 would be -0.0.
        entropy = sum(p * math.log(1 / p) for p in shares) / math.log(len(tokens))
        found[f"moe_load_max/{layer}"] = max(tokens) / mean
        found[f"moe_load_min/{layer}"] = min(tokens) / mean
        found[f"moe_load_entropy/{layer}"] = entropy
        found[f"moe_log_z/{layer}"] = mean_log_z
    found["moe_load_max"] = max(found[f"moe_load_max/{layer}"] for layer in counts)
    found["moe_load_min"] = min(found[f"moe_load_min/{layer}"] for layer in counts)
    found["moe_load_entropy"] = min(found[f"moe_load_entropy/{layer}"] for layer in counts)
    return found


# ---- recording -----------------------------------------------------------------------------------
class Loads:
    """first_step: the loaded step; is_main: does this rank write the file?"""

    def __init__(self, out_dir: str | Path, first_step: int = 0, is_main: bool = True):
        self.path = Path(out_dir, "moe_load.jsonl")
        self.is_main = is_main
        self.last_step = first_step
        if is_main and self.path.exists():
            cut_back(str(self.path), first_step)

    def row(self, step: int, layers: list[int], counts: Tensor, log_z: Tensor) -> dict[str, float]:
        """After a watched step: writes its loads; returns `statistics` of them.

        layers: the numbers of those with experts; counts (layers, E); log_z (layers,). Returns {}
        where there are none.
        """
        if not layers:
            return {}
        tokens = dict(zip(layers, counts.tolist()))
        if self.is_main:
            self.write(step, {"step": step, "tokens": tokens})
        return statistics(tokens, log_z.tolist())

    def write(self, step: int, row: dict) -> None:
        try:
            # After a rollback these steps are done again.
            if step <= self.last_step and self.path.exists():
                cut_back(str(self.path), step - 1)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            # The disk is full, for one: a log is not worth a run.
            warnings.warn(f"{self.path} cannot be written: {error.strerror}", stacklevel=2)
        self.last_step = step

    def draw(self) -> None:
        """At the end: moe_load.png, where a step was watched."""
        if not self.is_main or not self.path.exists():
            return
        if self.path.stat().st_size:
            draw(self.path, self.path.with_suffix(".png"))
        else:  # what was watched has been undone, and so has an earlier picture
            self.path.with_suffix(".png").unlink(missing_ok=True)


# ---- reading -------------------------------------------------------------------------------------
def read(run: str | Path) -> tuple[list[int], dict[int, list[list[int]]]]:
    """The watched steps, and for each layer the tokens of its experts in each of them.

    run: a run's folder, or its moe_load.jsonl. Raises ValueError where there are none.
    """
    path = Path(run)
    if path.is_dir():
        path = path / "moe_load.jsonl"
    try:
        rows = read_metrics(path)
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; a run with --n_expert=8 --watch_every=10 makes it"
        ) from None
    found = {}  # step -> layer -> tokens
    shape = None
    for row in rows:
        tokens = row.get("tokens")
        # Lines that are not like the first are no lines of ours.
        if not is_counts(tokens) or (shape or sizes(tokens)) != sizes(tokens):
            continue
        shape = sizes(tokens)
        # Undone by a rollback.
        found = {step: loads for step, loads in found.items() if step < row["step"]}
        found[row["step"]] = tokens
    if not found:
        raise ValueError(f"{path} has no loads of experts")
    layers = {int(layer): [tokens[layer] for tokens in found.values()] for layer in shape}
    return [*found], layers


def is_counts(tokens) -> bool:
    """Is it {"LAYER": [tokens of each expert]}, with at least one token in each layer?"""
    if not isinstance(tokens, dict) or not tokens:
        return False
    for layer, of_experts in tokens.items():
        if not layer.isdecimal() or not isinstance(of_experts, list):
            return False
        if not all(type(n) is int and n >= 0 for n in of_experts) or sum(of_experts) == 0:
            return False
    return True


def sizes(tokens: dict[str, list]) -> dict[str, int]:
    return {layer: len(of_experts) for layer, of_experts in tokens.items()}


# ---- drawing -------------------------------------------------------------------------------------
def draw(run: str | Path, path: str | Path) -> None:
    """The picture file `path`. Raises ValueError where nothing was recorded."""
    picture(*read(run), title_of(run)).savefig(path)


def title_of(run: str | Path) -> str:
    path = Path(os.path.abspath(run))
    name = path.name if path.is_dir() else path.parent.name
    return plain(name, 60)


def picture(steps: list[int], layers: dict[int, list[list[int]]], name: str):
    """A matplotlib Figure: a map for each layer, experts x steps."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    # One column of maps, or as many as keep the picture from growing without end.
    n_columns = 1 + (len(layers) - 1) // 12
    n_rows = -(-len(layers) // n_columns)
    n_expert = max(len(of_steps[0]) for of_steps in layers.values())
    height = min(max(0.9, 0.11 * n_expert), 3)  # of a map, in inches
    size = (3 + 6 * n_columns, 1.2 + n_rows * (height + 0.3))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    colors = colormaps["RdBu_r"].with_extremes(bad=NO_TOKEN)
    norm = LogNorm(1 / FACTOR, FACTOR)
    edges = edges_of(steps)
    for ax in axes.flat[len(layers) :]:
        ax.set_axis_off()
    for ax, (layer, of_steps) in zip(axes.flat, layers.items()):
        tokens = np.array(of_steps, dtype=float).T  # (E, steps)
        load = tokens / tokens.mean(0)
        # No token at all has a colour of its own, not that of a very small load.
        image = ax.pcolormesh(
            edges,
            np.arange(len(load) + 1) - 0.5,
            np.ma.masked_equal(load, 0),
            cmap=colors,
            norm=norm,
            rasterized=True,
        )
        ax.set_facecolor(NO_TOKEN)
        least, most = load[:, -1].min(), load[:, -1].max()
        title = f"layer {layer}: from {least:.2f} to {most:.2f} of the mean at step {steps[-1]}"
        ax.set_title(title, loc="left", fontsize=9)
        ax.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.suptitle(f"{name}: load of each expert (yellow: no token)", weight="bold")
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    bar = figure.colorbar(image, ax=axes, extend="both", aspect=30, shrink=min(1, 6 / size[1]))
    ticks = [1 / FACTOR, 0.5, 1, 2, FACTOR]
    bar.set_ticks(ticks, labels=["1/4", "1/2", "1: even", "2", "4"])
    bar.ax.minorticks_off()
    bar.set_label("tokens / mean of the layer")
    return figure


def edges_of(steps: list[int]) -> list[float]:
    """Where the column of each step begins, and the last one ends: halfway between two steps."""
    middles = [(a + b) / 2 for a, b in zip(steps, steps[1:])]
    if not middles:
        return [steps[0] - 0.5, steps[0] + 0.5]
    return [2 * steps[0] - middles[0], *middles, 2 * steps[-1] - middles[-1]]


def main(arguments: list[str]) -> None:
    """The command. Raises ValueError for a user's mistake."""
    runs = [word for word in arguments if not word.startswith("-")]
    outs = [word.removeprefix("--out=") for word in arguments if word.startswith("--out=")]
    if len(runs) != 1 or len(outs) > 1 or len(runs) + len(outs) < len(arguments):
        raise ValueError("usage: python -m metrics.experts RUN [--out=FILE.png]")
    folder = Path(runs[0])
    if not folder.is_dir():
        folder = folder.parent
    path = outs[0] if outs else folder / "moe_load.png"
    draw(runs[0], path)
    print(path)


if __name__ == "__main__":
    command("metrics.experts", main, OSError, ImportError)
