"""Claim: under μP the best learning rate of a narrow model is that of a wide one, so the search can
be done on the narrow one; what depth does to it is not covered.

Source: Yang et al. 2022, 2203.03466 (transfer, coordinate check: figures 1 and 5, appendix D), as
the second lesson tells it.

Protocol: the default corpus in bytes, 4 heads, 512 tokens a step, fp32. `width`: 2 layers, widths
64 to 512, base width 64; AdamW, Lion and Muon, each with and without μP, 7 learning rates a factor
2 apart, 100 steps, 2 seeds; the figure is the mean training loss of the last tenth of the steps.
With Muon the embedding's and the head's lr stay at 0.01. `depth`: the same at width 64 with 2 to 16
layers, AdamW with μP. `coordinates`: 5 steps at widths 64 to 1024, each optimizer at one lr; the
root mean square of the last block's MLP and of the logits, which start at 0, at the 5th step.

Expected: with μP the best lr moves by at most one grid step over 8 times the width; without,
AdamW's and Lion's fall as 1/width, so that the narrow model's lr is a bad one for the wide. Muon's
update has a spectral norm that does not depend on the width, so it should move little either way.
With μP the coordinates stay, without, AdamW's and Lion's grow like the width. Over 8 times the
depth the best lr falls by a factor 2 or more.

    python -m experiments.mup_transfer [--quick] [--out=DIR] [--jobs=N]
"""

import math

from torch.nn.modules import module as hooks

from experiments import protocol
from experiments.findings import INK, groups, judged, line, listed, markdown, mean_sd, pick
from model import GPT

LRS = {
    optim: [2.0**k for k in range(low, low + 7)]
    for optim, low in (("adamw", -11), ("lion", -13), ("muon", -8))
}
AT = {"adamw": 2.0**-7, "lion": 2.0**-10, "muon": 2.0**-5}  # of the coordinates
NAMES = {"adamw": "AdamW", "lion": "Lion", "muon": "Muon"}
CASES = [(optim, mup) for optim in LRS for mup in (True, False)]


def grid(widths: tuple, depths: tuple, wide: tuple, every: int, seeds: tuple) -> list[dict]:
    def one(
        part: str, optim: str, mup: bool, width: int, layers: int, lr: float, seed: int
    ) -> dict:
        return dict(part=part, optim=optim, mup=mup, width=width, layers=layers, lr=lr, seed=seed)

    found = [
        one("width", *case, width, 2, lr, seed)
        for case in CASES
        for width in widths
        for lr in LRS[case[0]][::every]
        for seed in seeds
    ]
    found += [
        one("depth", "adamw", True, 64, layers, lr, seed)
        for layers in depths
        for lr in LRS["adamw"][::every]
        for seed in seeds
    ]
    return found + [
        one("coordinates", *case, width, 2, AT[case[0]], seed)
        for case in CASES
        for width in wide
        for seed in seeds
    ]


GRID = grid((64, 128, 256, 512), (2, 4, 8, 16), (64, 128, 256, 512, 1024), 1, (1, 2))
QUICK = grid((64, 128), (2, 4), (64, 128), 8, (1,))


# ---- rows ----------------------------------------------------------------------------------------
def row(keys: dict, quick: bool) -> dict:
    looked = coordinates() if keys["part"] == "coordinates" else dict
    steps = 5 if keys["part"] == "coordinates" else 4 if quick else 100
    rows = protocol.train_run(
        optim=keys["optim"],
        mup_base_width=64 if keys["mup"] else None,
        n_embd=keys["width"],
        lr=keys["lr"],
        n_layer=keys["layers"],
        seed=keys["seed"],
        steps=steps,
        block_size=64,
        batch_size=8,
        precision="fp32",
        eval_every=0,
        zero_init=looked is not dict or "auto",
    )
    return {"loss": protocol.tail(rows)} | looked()


def coordinates():
    """From now on two outputs of the model are looked at; what it returns gives their last
    sizes."""
    names, found = {}, {"last MLP": [], "logits": []}

    def before(model, _) -> None:
        if isinstance(model, GPT) and not names:
            names[model.blocks[str(model.config.n_layer - 1)].mlp] = "last MLP"
            names[model.head] = "logits"

    def after(module, _, out) -> None:
        if module in names and module.training:
            found[names[module]].append(out.detach().float().square().mean().sqrt().item())

    hooks.register_module_forward_pre_hook(before)
    hooks.register_module_forward_hook(after)
    return lambda: {name: sizes[4] for name, sizes in found.items()}


# ---- what they say -------------------------------------------------------------------------------
def losses(rows: list[dict]) -> dict[float, list[float]]:
    """{lr: the seeds' losses}"""
    return {lr: [r["loss"] for r in mine] for (lr,), mine in groups(rows, "lr").items()}


def best(rows: list[dict]) -> tuple[float, float]:
    """(lr, mean loss there) of the lowest mean."""
    found = {lr: mean_sd(values)[0] for lr, values in losses(rows).items()}
    lr = min(found, key=lambda lr: (math.isnan(found[lr]), found[lr]))
    return lr, found[lr]


def sizes(rows: list[dict], by: str, **keys) -> dict[int, list[dict]]:
    return {size: mine for (size,), mine in groups(pick(rows, **keys), by).items()}


def moved(by_size: dict[int, list[dict]]) -> int:
    """Grid steps from the best lr of the smallest to that of the largest."""
    first, *_, last = (best(rows)[0] for rows in by_size.values())
    return round(math.log2(last / first))


def price(by_size: dict[int, list[dict]]) -> float:
    """The largest one's loss at the smallest one's best lr, over its own best, - 1; NaN if it
    diverges."""
    first, *_, last = by_size.values()
    return mean_sd(losses(last)[best(first)[0]])[0] / best(last)[1] - 1


def slope(by_size: dict[int, list[dict]], name: str) -> float:
    """Of log size against log width: 0 where the width changes nothing, 1 in proportion."""
    x = [math.log(width) for width in by_size]
    y = [math.log(mean_sd([r[name] for r in rows])[0]) for rows in by_size.values()]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y)) / sum((a - middle) ** 2 for a in x)


def parts(rows: list[dict]) -> dict[str, bool]:
    found = {}
    for optim, mup in CASES:
        at = sizes(rows, "width", part="width", optim=optim, mup=mup)
        step, still = moved(at), mup or optim == "muon"
        text = (
            f"{NAMES[optim]} {'with' if mup else 'without'} μP: over {max(at) // min(at)} times the"
            " width"
        )
        text += (
            f" the best lr moves by 2^{step:+d}, the narrow one's costs the wide {price(at):+.1%}"
        )
        text += f" ({'at most a factor 2' if still else '2^-2 or less'})"
        found[text] = abs(step) <= 1 if still else step <= -2
    for optim, mup in CASES:
        at = sizes(rows, "width", part="coordinates", optim=optim, mup=mup)
        mlp, logits = slope(at, "last MLP"), slope(at, "logits")
        text = f"{NAMES[optim]} {'with' if mup else 'without'} μP: after 4 steps the last MLP"
        text += f" is as width^{mlp:+.2f}, the logits as width^{logits:+.2f}"
        if mup:
            found[f"{text} (both within 0.25 of 0)"] = max(abs(mlp), abs(logits)) <= 0.25
        elif optim != "muon":
            found[f"{text} (one of them 0.5 or more)"] = max(mlp, logits) >= 0.5
    deep = sizes(rows, "layers", part="depth")
    text = f"over {max(deep) // min(deep)} times the depth the best lr moves by 2^{moved(deep):+d}"
    found[f"{text}, the shallow one's costs the deep {price(deep):+.1%} (down)"] = moved(deep) < 0
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    word, _, why = judged(parts(rows))
    on, off = (sizes(rows, "width", part="width", optim="adamw", mup=mup) for mup in (True, False))
    number = f"AdamW's best lr moves by 2^{moved(on):+d} with μP and by 2^{moved(off):+d} without"
    return word, number, why


def table(rows: list[dict]) -> str:
    lines = []
    for part, by, cases in (("width", "width", CASES), ("depth", "layers", [("adamw", True)])):
        for optim, mup in cases:
            at = sizes(rows, by, part=part, optim=optim, mup=mup)
            rim = {LRS[optim][0]: ", rim", LRS[optim][-1]: ", rim"}
            cells = [
                f"{size}: 2^{math.log2(lr):.0f} ({loss:.3f}{rim.get(lr, '')})"
                for size, (lr, loss) in ((size, best(mine)) for size, mine in at.items())
            ]
            lines.append(
                [
                    NAMES[optim],
                    "on" if mup else "off",
                    part,
                    *cells,
                    f"2^{moved(at):+d}",
                    f"{price(at):+.1%}",
                ]
            )
    columns = len(lines[0]) - 5
    head = [
        "optimizer",
        "μP",
        "grows",
        *["size: best lr (loss)"] * columns,
        "best lr moves",
        "price of the smallest one's lr",
    ]
    seconds = {
        width: sum(r["seconds"] or 0 for r in mine)
        for width, mine in sizes(rows, "width", part="width").items()
    }
    times = seconds[max(seconds)] / (seconds[min(seconds)] or math.nan)
    saved = f"Width {max(seconds)} took {times:.1f} times the time of width {min(seconds)}."
    return "\n\n".join(["\n".join(listed(parts(rows))), markdown(head, lines), saved])


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(15, 10)
    axes = figure.subplots(3, 3)
    for across, optim in enumerate(LRS):
        for down, mup in enumerate((True, False)):
            ax, at = axes[down, across], sizes(rows, "width", part="width", optim=optim, mup=mup)
            name = f"{NAMES[optim]} {'with' if mup else 'without'} μP"
            curves(ax, at, "width", f"{name}: the best lr {movement(at)}")
    ax, deep = axes[2, 0], sizes(rows, "layers", part="depth")
    curves(ax, deep, "layers", f"AdamW, μP, deeper: the best lr {movement(deep)}")
    for ax, name in zip(axes[2, 1:], ("last MLP", "logits")):
        for (optim, mup), color in zip(CASES, [c for c in INK[:3] for _ in (0, 1)]):
            at = sizes(rows, "width", part="coordinates", optim=optim, mup=mup)
            line(
                ax,
                {w: [r[name] for r in mine] for w, mine in at.items()},
                color=color,
                marker=".",
                ls="-" if mup else "--",
                label=f"{NAMES[optim]}{'' if mup else ', no μP'}",
            )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set(xlabel="width", ylabel="root mean square", title=f"After 4 steps: the {name}")
    axes[2, 2].set_ylim(top=10 * axes[2, 2].get_ylim()[1])
    axes[2, 2].legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def movement(by_size: dict[int, list[dict]]) -> str:
    steps = moved(by_size)
    return f"moves by a factor of 2^{steps}" if steps else "stays"


def curves(ax, at: dict[int, list[dict]], by: str, title: str) -> None:
    rim = min(best(mine)[1] for mine in at.values()) + 1.2  # what is worse lies there
    for (size, mine), color in zip(at.items(), INK):
        shown = {
            lr: [min(x, rim) if x == x else rim for x in values]
            for lr, values in losses(mine).items()
        }
        line(ax, shown, f"{by} {size}", color=color, marker=".")
        ax.plot(*best(mine), "o", ms=11, mfc="none", mew=2, color=color)
    ax.set(xlabel="learning rate, at width 64", ylabel="training loss (nats per byte)", title=title)
    ax.set_xscale("log", base=2)
    # The curves are valleys: the middle of the top is free.
    ax.legend(frameon=False, fontsize=8, title="circle: the best", loc="upper center")


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
