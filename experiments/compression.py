"""Claim: gradients can be sent in a few per cent of their bytes: TopK and PowerSGD save 90 to 99 %
at a negligible loss of accuracy thanks to error feedback, 1-bit sends 32 times less for a slight
loss, and accumulating K batches K times less for none.

Source: the first lesson, section 5, with its table of four methods; the papers are in
parallel/compression.py.

Protocol: a GPT of 4 layers and width 128 on 2 ranks, 200 steps of AdamW (the best lr of
mup_transfer at this width, 2^-7; the same for all, tuned for none of them) on 16 sequences of 128
tokens, 3 seeds. Three methods also with SGD (lr 2^-1, momentum 0.9), which error feedback is made
for. Accumulation: the same tokens in steps of four times as many, with the square root rule for the
lr. Bytes are those that parallel/compression.py hands to the collectives, indices and scales
included; the loss is the final validation loss against that of plain all-reduce with the same seed;
time is the median step's. Two processes of one machine exchange over its own memory, so time shows
what a method computes and not what it saves on a network: from both follows the speed of a network
below which it pays.

Expected: top-k costs 8 bytes an entry, so 10 % of the entries save 80 %, not 90; sign 32 times
less, onebit 20 or so with its two means a column; both as long as N = 2: all-gathers grow with the
ranks, at 64 signs save nothing. PowerSGD r(a+b)/(ab), which depends on the matrices: 1.6 % a rank
here. With error feedback topk 1 % and PowerSGD 4 within 1 % of plain, onebit within 5 %; without it
each method ends worse than with it. (SGD's rows were added when AdamW's were not so, after one
trial of four runs in which SGD's were.)

    python -m experiments.compression [--quick] [--out=DIR] [--jobs=N]
    python -m experiments.compression --data=FILE --methods=none,powersgd_4 --budget=10m
"""

import math
from statistics import median

# Else `compression` is this file
from experiments import claims, protocol
from experiments.findings import (
    INK,
    dots,
    groups,
    judged,
    listed,
    markdown,
    mean_sd,
    paired,
    pick,
    plus_minus,
)

METHODS = {  # name -> train.py's fields, claimed saving of bytes, claimed effect
    "topk 10 %": ({"compress": "topk", "compress.fraction": 0.1}, "90 to 99 %", "negligible"),
    "topk 1 %": ({"compress": "topk", "compress.fraction": 0.01}, "90 to 99 %", "negligible"),
    "topk 0.1 %": ({"compress": "topk", "compress.fraction": 0.001}, "90 to 99 %", "negligible"),
    "sign": ({"compress": "sign"}, "named, no figure", ""),
    "onebit": ({"compress": "onebit"}, "32 times", "slightly worse"),
    "powersgd 1": ({"compress": "powersgd", "compress.rank": 1}, "90 to 99 %", "negligible"),
    "powersgd 2": ({"compress": "powersgd", "compress.rank": 2}, "90 to 99 %", "negligible"),
    "powersgd 4": ({"compress": "powersgd", "compress.rank": 4}, "90 to 99 %", "negligible"),
}
SGD = {"optim": "sgd", "lr": 0.5}
WITH_SGD = {
    f"SGD, {name}": (METHODS[name][0] | SGD, *METHODS[name][1:])
    for name in ("topk 10 %", "onebit", "powersgd 4")
}
PLAIN = {
    "none": ({}, "", ""),
    "accumulation 4": ({}, "4 times", "none"),
    "SGD, none": (SGD, "", ""),
}
ALL, NONE = PLAIN | METHODS | WITH_SGD, ("none", "SGD, none")
STEPS, BATCH, EVERY, NEAR, SLIGHT = 200, 16, 4, 0.01, 0.05
SIZE = dict(n_layer=4, n_embd=128, block_size=128, optim="adamw", lr=2.0**-7, precision="fp32")


def grid(methods: list[str], seeds: tuple[int, ...]) -> list[dict]:
    cases = [(name, feedback) for name in methods for feedback in (True, False)]
    return [
        dict(method=name, feedback=feedback, seed=seed)
        for seed in seeds
        for name, feedback in [*((name, None) for name in PLAIN), *cases]
    ]


GRID = grid([*METHODS, *WITH_SGD], (1, 2, 3))
QUICK = grid(["topk 1 %", "onebit", "powersgd 4", "SGD, onebit"], (1,))


def row(keys: dict, quick: bool) -> dict:
    name, times = keys["method"], EVERY if keys["method"].startswith("accumulation") else 1
    fields, *_ = ALL[name]
    if keys["feedback"] is not None:
        fields = fields | {"compress.error_feedback": keys["feedback"]}
    if times > 1:
        fields = dict(micro_batch_size=BATCH // 2, lr_scaling="sqrt", base_batch_size=BATCH)
    small = dict(n_layer=2, n_embd=64, block_size=32, eval_tokens=2048) if quick else {}
    steps = (8 if quick else STEPS) // times
    fields = SIZE | small | fields | dict(steps=steps, batch_size=BATCH * times, seed=keys["seed"])
    rows = protocol.train_run(2, **fields, eval_every=1000, on_spike="none", on_nonfinite="none")
    times_of = protocol.curve(rows, "step_s")
    return {
        "val_loss": protocol.curve(rows, "val_loss")[-1],
        "loss": protocol.tail(rows),
        "sent": protocol.curve(rows, "sent_bytes")[-1] / times,
        "ms": 1000 * median(times_of[len(times_of) // 3 :]) / times,
    }


# ---- findings ------------------------------------------------------------------------------------
def of(rows: list[dict], method: str, feedback: bool | None = True) -> list[dict]:
    return pick(rows, method=method, feedback=None if method in PLAIN else feedback)


def gaps(rows: list[dict], method: str, feedback: bool | None = True) -> list[float]:
    """Validation loss against that of plain all-reduce with the same optimizer, seed by seed."""
    return paired(of(rows, method, feedback), of(rows, plain(method)), "val_loss")


def plain(method: str) -> str:
    return "SGD, none" if method in WITH_SGD else "none"


def share(rows: list[dict], method: str, ranks: int = 2) -> float:
    """Bytes sent, as a share of plain all-reduce's: measured on 2 ranks; an all-gather's grows as
    N/2."""
    gathers = method.removeprefix("SGD, ").split()[0] in ("topk", "sign", "onebit")
    return of(rows, method)[0]["sent"] / of(rows, "none")[0]["sent"] * (ranks / 2 if gathers else 1)


def parts(rows: list[dict]) -> dict[str, bool]:
    here, found = {r["method"] for r in rows}, {}
    sparse = [name for name in METHODS if name in here and not name.startswith(("sign", "onebit"))]
    for kind in ("topk", "powersgd"):
        saved = {
            name.split(maxsplit=1)[1]: 1 - share(rows, name)
            for name in sparse
            if name.startswith(kind)
        }
        text = (
            f"{kind} {', '.join(saved)} saves {', '.join(f'{x:.1%}' for x in saved.values())} (90"
            " to 99 %)"
        )
        found[text] = all(0.895 <= x <= 0.995 for x in saved.values())
    times = 1 / share(rows, "onebit")
    found[f"onebit sends {times:.1f} times less (32, within 5 %)"] = abs(times / 32 - 1) <= 0.05
    rate = 1 / share(rows, "accumulation 4")
    found[f"accumulating 4 batches sends {rate:.1f} times less (4)"] = abs(rate / 4 - 1) < 1e-3
    for name, low, high, said in (
        ("topk 1 %", -NEAR, NEAR, "within 1 %"),
        ("powersgd 4", -NEAR, NEAR, "within 1 %"),
        ("onebit", 0, SLIGHT, "worse by up to 5 %"),
        ("accumulation 4", -NEAR, NEAR, "within 1 %"),
        ("SGD, topk 10 %", -NEAR, NEAR, "within 1 %"),
        ("SGD, powersgd 4", -NEAR, NEAR, "within 1 %"),
        ("SGD, onebit", -1, SLIGHT, "at most 5 % worse"),
    ):
        if name not in here:
            continue
        off = gaps(rows, name)
        found[f"{name} ends {plus_minus(off, '+.1%')} from plain ({said})"] = (
            low <= mean_sd(off)[0] <= high
        )
    for optimizer, methods in (("AdamW", METHODS), ("SGD", WITH_SGD)):
        tried = [name for name in methods if name in here]
        better = [
            x for x in tried if mean_sd(gaps(rows, x, True))[0] < mean_sd(gaps(rows, x, False))[0]
        ]
        found[
            f"with {optimizer} error feedback ends better in {len(better)} of {len(tried)} methods"
            " (all)"
        ] = better == tried
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    found = parts(rows)
    word, _, why = judged(found)
    number = "; ".join(
        text.partition(" (")[0]
        for text in found
        if text.startswith(("topk 1 % ends", "powersgd 4", "SGD, powersgd"))
    )
    return word, number, why


def pays(rows: list[dict], method: str, feedback: bool | None) -> str:
    """The speed of a network, in MB/s, below which the bytes saved are worth the time computed."""
    mine, base = of(rows, method, feedback), of(rows, plain(method))
    later = mean_sd([r["ms"] for r in mine])[0] - mean_sd([r["ms"] for r in base])[0]
    saved = base[0]["sent"] - mine[0]["sent"]
    return "any" if later <= 0 else f"{saved / later / 1000:,.0f}" if saved > 0 else "nowhere"


def table(rows: list[dict]) -> str:
    lines = []
    for (name, feedback), mine in groups(rows, "method", "feedback").items():
        _, claimed, effect = ALL[name]
        base, less = name in NONE, share(rows, name)
        lines.append(
            [
                name,
                {None: "", True: "yes", False: "no"}[feedback],
                f"{mine[0]['sent']:,.0f}",
                f"{1 - less:.1%} ({1 / less:.1f} times)",
                claimed,
                f"{1 / share(rows, name, 64):.1f} times",
                plus_minus([r["val_loss"] for r in mine]),
                "" if base else plus_minus(gaps(rows, name, feedback), "+.1%"),
                effect,
                f"{mean_sd([r['ms'] for r in mine])[0]:.0f}",
                "" if base else pays(rows, name, feedback),
            ]
        )
    head = [
        "method",
        "error feedback",
        "bytes a rank sends in a step",
        "saved, 2 ranks",
        "the lesson",
        "64 ranks",
        "validation loss",
        "against plain",
        "the lesson",
        "ms a step",
        "pays below, MB/s",
    ]
    return "\n\n".join(
        [
            "\n".join(listed(parts(rows))),
            markdown(head, lines),
            (
                "Where the lesson's figures differ from ours: an entry of top-k travels with its"
                " index, 8 bytes for 4, so a fraction f saves 1 - 2f; 32 times is the bits alone,"
                " and onebit adds two means for each column of each matrix, which weigh the more"
                " the fewer rows it has; top-k and bits are all-gathered, so each of N ranks gets"
                " N-1 messages, and the saving shrinks as 2/N (64 ranks: computed from the bytes of"
                " two). PowerSGD's sums are all-reduced: its saving depends on the matrices' sizes"
                " alone, 64 ranks or two. Accumulating does not change an update (experiment"
                " accumulation); sent once for four batches it means a quarter of the updates, and"
                " that is what its loss shows. Its bytes and times are for as many tokens as the"
                " others' step. What error feedback sends late, SGD's steps add up to as if it had"
                " come in time. AdamW, we think, takes it for one large gradient: the entry's"
                " second moment stays up, and its steps short."
            ),
        ]
    )


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(13, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    limit = 60.0  # per cent: what is worse lies at the rim
    tried = [case for case in groups(rows, "method", "feedback") if case[0] not in NONE]
    values = {
        f"{name}{'' if feedback is None else ', feedback' if feedback else ', without'}": [
            min(100 * x, limit) if math.isfinite(x) else limit for x in gaps(rows, name, feedback)
        ]
        for name, feedback in tried
    }
    left.axvspan(-100 * NEAR, 100 * NEAR, color=INK[2], alpha=0.15, lw=0)
    dots(left, values)
    left.set(
        title="What it costs (green: within 1 %)",
        xlim=(-3, limit + 2),
        xlabel="validation loss against plain all-reduce's, %",
    )
    family = dict(zip(("accumulation", "topk", "sign", "onebit", "powersgd"), INK))
    shown = [
        name for (name,) in groups(rows, "method") if name in METHODS or name == "accumulation 4"
    ]
    for name, color in ((name, family[name.split()[0]]) for name in shown):
        pair = [pick(rows, method=name, feedback=feedback) for feedback in (True, False)]
        if all(pair):
            heights = [min(100 * mean_sd(gaps(rows, name, k))[0], limit) for k in (True, False)]
            right.plot([1 / share(rows, name)] * 2, heights, color=color, lw=1, zorder=1)
        for feedback, face in ((None, color), (True, color), (False, "none")):
            mine = pick(rows, method=name, feedback=feedback)
            if mine:
                y = min(100 * mean_sd(gaps(rows, name, feedback))[0], limit)
                right.plot(
                    1 / share(rows, name),
                    y,
                    "o",
                    ms=8,
                    mec=color,
                    mfc=face if face == color else "white",
                )
                if feedback is not False:
                    right.annotate(
                        name,
                        (1 / share(rows, name), y),
                        xytext=(7, -3),
                        fontsize=9,
                        textcoords="offset points",
                        bbox=dict(fc="white", ec="none", alpha=0.85, pad=0.5),
                    )
    right.axhspan(-100 * NEAR, 100 * NEAR, color=INK[2], alpha=0.15, lw=0)
    right.set(
        xscale="log",
        title="What it saves, AdamW on 2 ranks (hollow: without feedback)",
        xlabel="times fewer bytes",
        ylabel="validation loss against plain's, %",
        xlim=(3, 1500),
        ylim=(-3, limit + 2),
    )
    ticks = (4, 10, 32, 100, 500)
    right.set_xticks(ticks, ticks)
    right.minorticks_off()
    right.grid(alpha=0.25)


# ---- on somebody's own text ----------------------------------------------------------------------
TYPED = {claims.slug(method): own[0] for method, own in ALL.items() if "accum" not in method}


def candidate(name: str) -> dict:
    return {"optim": "adamw", "lr": 2.0**-7} | TYPED[name]


if __name__ == "__main__":
    claims.main(__file__, [*TYPED], candidate)
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict, timed=True)
