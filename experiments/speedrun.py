"""Claim: each line of the CPU speedrun's recipe earns its place: changed back, the run takes longer
to the same loss; and n-grams that are counted, which its rules leave out, save most of what is
left.

Source: configs/cpu_speedrun.toml, ours; its traits are those of the nanoGPT speedruns (Jordan et
al. 2024), which found them on GPUs; n-gram embeddings: layers/ngram_embedding.py.

Protocol: the recipe as it is, at three lengths; then with one thing changed at its own number of
steps, 3 seeds each, one run at a time with all cores. Figures: the validation loss at the end and
the seconds that all steps, and the counting of n-grams before them, took together. The three
lengths give what a second is worth there, in nats. So each change is given in seconds: those it
takes more, and those that its loss is worse by. It is clear where, seed by seed, mean x sqrt(n) is
at least 3.1 standard deviations. The default corpus; and for the changes that are expected to be
clear also `topics`, the language's own reference (pydoc_data), prose of 0.4 MB.

Expected: without n-gram embeddings, with pairs of bytes alone, with a lr of 0.01 for embeddings,
with AdamW, two layers, a zero start, float32, torch's attention or AdamW's embeddings in eight
passes it takes longer; NorMuon, Polar Express, cautious decay, GELU and no cap change little in so
few steps.

    python -m experiments.speedrun [--quick] [--out=DIR] [--jobs=N]
"""

import math
import tempfile
import time
from pathlib import Path

from experiments import protocol
from experiments.findings import (
    INK,
    clear,
    dots,
    judged,
    listed,
    markdown,
    mean_sd,
    pick,
    plus_minus,
)
from run import build
from settings import parse

RECIPE = parse.read_recipe(str(protocol.ROOT / "configs" / "cpu_speedrun.toml"))
STEPS, AROUND = RECIPE["steps"], (0.75, 1.0, 1.25)
# What is changed -> the fields, of the lines of the recipe and of the defaults behind them
CHANGES = {
    "no n-gram embeddings": dict(ngram_embed="none"),
    "none, 2 layers, 320 steps": dict(
        ngram_embed="none", n_layer=2, steps=320, embed_lr=0.01, zero_init=True, lr=0.02
    ),
    "n-grams of 2": dict(ngram_embed=2),
    "n-grams of up to 3": dict(ngram_embed=3),
    "n-grams of up to 6": dict(ngram_embed=6),
    "8192 rows": dict(ngram_rows=8192),
    "32768 rows": dict(ngram_rows=32768),
    "embeddings' lr 0.01": dict(embed_lr=0.01),
    "embeddings' lr 0.04": dict(embed_lr=0.04),
    "zero init": dict(zero_init=True),
    "AdamW, lr 2^-7": dict(optim="adamw", lr=2.0**-7),
    "Schedule-Free AdamW, lr 2^-6": dict(optim="schedule_free", lr=2.0**-6),
    "GPT-2's traits": dict(arch="gpt2", n_kv_head=2),
    "2 layers": dict(n_layer=2),
    "width 96": dict(n_embd=96),
    "width 192": dict(n_embd=192),
    "keys and values for each head": dict(n_kv_head=2),
    "rows of 128, 12 a step": dict(block_size=128, batch_size=12),
    "rows of 32, 48 a step": dict(block_size=32, batch_size=48),
    "16 rows, 1.5x the steps": dict(batch_size=16, steps=STEPS * 3 // 2),
    "48 rows, half the steps": dict(batch_size=48, steps=STEPS // 2),
    "torch's attention": dict(attention="sdpa"),
    "embeddings in eight passes": {"opt.fused": False},
    "batch ramp from 4": dict(batch_ramp=STEPS // 2, batch_ramp_from=4),
    "float32": dict(precision="fp32"),
    "one thread": dict(threads=1),
    "lr 0.02": dict(lr=0.02),
    "lr 0.045": dict(lr=0.045),
    "cosine": dict(schedule="cosine"),
    "decay over 70 %": dict(decay_frac=0.7),
    "a window of 16": dict(window=16),
    "no QK norm": dict(qk_norm=False),
    "GELU": dict(activation="gelu"),
    "no logit cap": dict(logit_cap="none"),
    "3 Newton-Schulz steps": {"opt.ns_steps": 3},
    "Polar Express": {"opt.ns": "polar"},
    "NorMuon": {"opt.normuon_beta2": 0.95},
    "cautious decay 0.01": {"weight_decay": 0.01, "opt.cautious": True},
    "no clipping": dict(grad_clip="none"),
}
COUNTED = dict(ngram_embed="none", n_layer=2, zero_init=True)
STILL = dict(steps=1, lr=0, embed_lr=0, head_lr=0)
OTHERS = {
    **{f"counted n-grams of order {n} alone": COUNTED | STILL | dict(ngram=n) for n in (1, 3, 6)},
    **{
        f"counted n-grams of order 6, {n} steps on top": (
            COUNTED | dict(ngram=6, steps=n, lr=0.02, embed_lr=0.01)
        )
        for n in (10, 40)
    },
}
EARNED = (
    "no n-gram embeddings",
    "none, 2 layers, 320 steps",
    "n-grams of 2",
    "embeddings' lr 0.01",
    "zero init",
    "AdamW, lr 2^-7",
    "GPT-2's traits",
    "2 layers",
    "float32",
    "torch's attention",
    "embeddings in eight passes",
)
SEEDS = (1, 2, 3)


def grid(text: str, changes: list[str], seeds: tuple) -> list[dict]:
    """Length by length and change by change for each seed: what a busy machine does, it does to
    all."""
    cases = [*(("", x) for x in AROUND), *((name, 1.0) for name in changes)]
    return [
        dict(text=text, change=change, length=length, seed=seed)
        for seed in seeds
        for change, length in cases
    ]


GRID = grid("python", [*CHANGES, *OTHERS], SEEDS) + grid("topics", [*EARNED, *OTHERS], SEEDS)
QUICK = grid("topics", ["2 layers", "counted n-grams of order 6 alone"], (1,))


def row(keys: dict, quick: bool) -> dict:
    change = (CHANGES | OTHERS).get(keys["change"], {})
    own = {k: v for k, v in RECIPE.items() if not ("optim" in change and k.startswith("opt."))}
    counted, fields = counting(), own | change
    steps = max(1, round(fields["steps"] * keys["length"] / (20 if quick else 1)))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        fields |= dict(
            data=text_of(keys["text"], folder),
            out_dir=f"{folder}/run",
            steps=steps,
            seed=keys["seed"],
            eval_every=steps,
            eval_tokens=32768,
            log_every=1,
        )
        rows = protocol.train_run(**fields)
    seconds = sum(protocol.curve(rows, "step_s")) + counted()
    return {"val_loss": protocol.curve(rows, "val_loss")[-1], "training_s": seconds}


def counting():
    """From now on the counting of n-grams is timed; what this returns tells the seconds."""
    plain, spent = build.add_ngrams, [0.0]

    def timed(*args) -> None:
        began = time.perf_counter()
        plain(*args)
        spent[0] += time.perf_counter() - began

    build.add_ngrams = timed
    return lambda: spent[0]


def text_of(name: str, folder: str) -> str:
    if name == "python":
        return name
    from pydoc_data import topics

    path = Path(folder, "topics.txt")
    path.write_text(
        "\n\n".join(topics.topics[key] for key in sorted(topics.topics)), encoding="utf-8"
    )
    return str(path)


# ---- what they say -------------------------------------------------------------------------------
def slope(rows: list[dict], text: str) -> float:
    """Nats that one more second takes off the recipe's loss, through the means of its three
    lengths."""
    found = [pick(rows, text=text, change="", length=length) for length in AROUND]
    x, y = (
        [mean_sd([r[name] for r in mine])[0] for mine in found]
        for name in ("training_s", "val_loss")
    )
    middle = sum(x) / len(x)
    return -sum((a - middle) * b for a, b in zip(x, y)) / sum((a - middle) ** 2 for a in x)


def costs(rows: list[dict], text: str, change: str) -> list[float]:
    """Seconds that the change costs, seed by seed: more time, and a worse loss in seconds."""
    base = {r["seed"]: r for r in pick(rows, text=text, change="", length=1.0)}
    worth = slope(rows, text)
    return [
        r["training_s"]
        - base[r["seed"]]["training_s"]
        + (r["val_loss"] - base[r["seed"]]["val_loss"]) / worth
        for r in pick(rows, text=text, change=change)
    ]


def texts(rows: list[dict]) -> list[str]:
    return [*dict.fromkeys(r["text"] for r in rows)]


def changes(rows: list[dict]) -> list[str]:
    return [*dict.fromkeys(r["change"] for r in rows if r["change"])]


def parts(rows: list[dict]) -> dict[str, bool]:
    found = {}
    for text in texts(rows):
        for change in changes(pick(rows, text=text)):
            mine = costs(rows, text, change)
            said = f"{text}: {change} costs {plus_minus(mine, '+.1f')} s"
            if change in EARNED:
                found[f"{said} (clearly more than 0)"] = clear(mine)
            elif change in CHANGES:
                found[f"{said} (not clearly less than 0)"] = not clear([-x for x in mine])
            else:
                less = [less_than(rows, text, change, name) for name in ("val_loss", "training_s")]
                found[
                    f"{text}: {change}: loss {plus_minus([-x for x in less[0]], '+.3f')}, seconds "
                    f"{plus_minus([-x for x in less[1]], '+.1f')} (both clearly less)"
                ] = all(map(clear, less))
    return found


def less_than(rows: list[dict], text: str, change: str, name: str) -> list[float]:
    """By how much the figure is less than the recipe's, seed by seed."""
    base = {r["seed"]: r[name] for r in pick(rows, text=text, change="", length=1.0)}
    return [base[r["seed"]] - r[name] for r in pick(rows, text=text, change=change)]


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    word, _, why = judged(parts(rows))
    first = texts(rows)[0]
    base = pick(rows, text=first, change="", length=1.0)
    number = (
        f"the recipe: {plus_minus([r['val_loss'] for r in base], '.3f')} nats after "
        f"{plus_minus([r['training_s'] for r in base], '.1f')} s of steps"
    )
    return word, number, why


def table(rows: list[dict]) -> str:
    lines = []
    for change in ["", *changes(rows)]:
        for length in AROUND if not change else (1.0,):
            cells = [f"the recipe, {length:g}x its steps" if not change else change]
            for text in texts(rows):
                if not (mine := pick(rows, text=text, change=change, length=length)):
                    cells += [""] * 3
                    continue
                cost = (
                    "" if change not in CHANGES else plus_minus(costs(rows, text, change), "+.1f")
                )
                cells += [
                    plus_minus([r["val_loss"] for r in mine], ".3f"),
                    plus_minus([r["training_s"] for r in mine], ".1f"),
                    cost,
                ]
            lines.append(cells)
    head = [
        "changed",
        *(f"{text}: {what}" for text in texts(rows) for what in ("loss", "s", "costs, s")),
    ]
    worth = ", ".join(f"{text} {slope(rows, text):.3f}" for text in texts(rows))
    return "\n\n".join(
        ["\n".join(listed(parts(rows))), markdown(head, lines), f"Nats a second: {worth}."]
    )


SECONDS = (-0.5, 0, 0.5, 1, 2, 5, 10)  # ticks of the picture


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(13, 8)
    for ax, text, color in zip(
        figure.subplots(1, len(texts(rows)), squeeze=False)[0], texts(rows), INK
    ):
        changed = [change for change in changes(pick(rows, text=text)) if change in CHANGES]
        found = {change: costs(rows, text, change) for change in changed}
        found = {k: [x if math.isfinite(x) else 20.0 for x in v] for k, v in found.items()}
        dots(ax, dict(sorted(found.items(), key=lambda item: sum(item[1]))), color)
        ax.axvline(0, color="black", lw=0.8)
        # Half of the changes cost less than half a second: two would take the axis for themselves.
        ax.set_xscale("symlog", linthresh=1, linscale=2)
        ax.set_xticks(SECONDS, [f"{x:g}" for x in SECONDS])
        ax.minorticks_off()
        ax.set(
            xlabel="seconds it costs (< 0: faster; > 1: logarithmic)",
            title=f"{text}: one thing changed",
        )


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict, timed=True)
