"""Claim: a run that meets poisoned batches, or a jump of its learning rate, recovers if a guard
skips the step, tightens the clip, cuts the learning rate, or rolls back and leaves the data out;
without a guard it does not.

Source: the three lessons on stability (spike above 5 x EMA, 5 x window mean or 3 x the loss before;
gradient norm above 10: clip to 0.1; roll back 100 steps and drop the batch); PaLM, 2204.02311.

Protocol: 2 layers of width 64, 8 rows of 64 bytes a step, 240 steps, wsd, validation loss every 5
steps on 4096 fixed tokens, three seeds. From step 121 on one of these, put into data.Rows,
GPT.forward, the schedule:
    poison       the rows of 3 batches are uniformly random bytes, nothing else is touched
    long         the same for 12 batches: more than skipping takes for chance (accept=10)
    nan          the loss of 3 batches is NaN
    jump         every lr x 30 in steps 121 to 125, each time those steps are taken
    jump once    the same, but over for good once the guard has rolled back
`fragile` is AdamW at lr 0.01 without gradient clipping; `default` is this repository's: Muon,
clipping at 1. Policies have the guard's default numbers unless the name says otherwise; a policy
named after a text has its detector; `warn` acts as `none`. Gaps are to the clean run of the same
seed. Batches to be back are those computed, repeated ones too, from the fault to the first
evaluation behind it that is no worse than the last before it.

Expected: rollback ends within 1 % of the clean run, no guard does not. A ban cannot help against
the jump: it is no row's fault, and what its first step has done to the weights is there before the
loss shows it. (The setups and the sizes of the faults were chosen in trials with another seed.)

    python -m experiments.spike_recovery [--quick] [--out=DIR] [--jobs=N]
"""

import math
import tempfile
from pathlib import Path
from statistics import fmean

# Else `precision` is one of us
import torch

import monitor
from data import dataset
from experiments import protocol
from experiments.findings import INK, below, groups, markdown, paired, pick, plus_minus
from metrics import logger
from model import GPT
from run import build

SETUPS = {"fragile": dict(optim="adamw", lr=0.01, grad_clip="none"), "default": {}}
NUMBERS = {  # policy -> flags
    "none": dict(on_spike="none", on_nonfinite="none"),
    "skip": dict(on_spike="skip", on_nonfinite="skip"),
    "clip": dict(on_spike="clip"),
    "lr cut": dict(on_spike="lr_cut", on_nonfinite="lr_cut"),
    "rollback": dict(on_spike="rollback", on_nonfinite="rollback"),
    "skip, accept=30": {"on_spike": "skip", "monitor.accept": 30},
    "texts: skip above 5 x EMA": {"on_spike": "skip", "monitor.detector": "ema"},
    "texts: skip above 3 x previous": {"on_spike": "skip", "monitor.detector": "previous"},
    "texts: clip 0.1 above norm 10": {"on_spike": "clip", "monitor.detector": "grad_norm"},
}
USUAL = ["none", "skip", "clip", "lr cut", "rollback"]
TEXTS = [name for name in NUMBERS if name.startswith("texts")]
PLAN = [
    ("fragile", "clean", ["skip"]),
    ("fragile", "poison", USUAL + TEXTS),
    ("fragile", "long", ["none", "skip", "skip, accept=30", "rollback"]),
    ("fragile", "nan", ["none", "skip", "lr cut", "rollback"]),
    ("fragile", "jump", USUAL + TEXTS),
    ("fragile", "jump once", ["rollback"]),
    ("default", "clean", ["skip"]),
    ("default", "poison", ["none", "skip", "rollback"]),
    ("default", "jump", ["none", "skip", "lr cut"]),
]
GRID = [
    dict(setup=setup, fault=fault, policy=policy, seed=seed)
    for setup, fault, policies in PLAN
    for policy in policies
    for seed in (1, 2, 3)
]
QUICK = [
    one
    for one in GRID
    if one["seed"] == 1
    and one["setup"] == "fragile"
    and one["policy"] in ("none", "skip", "rollback")
    and one["fault"] in ("clean", "poison", "jump")
]
LENGTH = {"clean": 0, "poison": 3, "long": 12, "nan": 3, "jump": 5, "jump once": 5}
BATCH, TIMES = 8, 30
TAKE, FORWARD, SCHEDULE = dataset.Dataset.__call__, GPT.forward, build.lr_schedule


def inject(fault: str, first: int) -> None:
    """From now on in this process training meets the fault after `first` updates."""
    bad, state = range(BATCH * first, BATCH * (first + LENGTH[fault])), {}

    def take(self, numbers):
        rows = TAKE(self, numbers)
        hit = [i for i, n in enumerate(numbers) if self.seed is not None and n in bad]
        state["nan"] = hit and fault == "nan"
        for i in hit if fault in ("poison", "long") else ():
            draw = torch.Generator().manual_seed(numbers[i])
            rows[i] = torch.randint(256, rows[i].shape, generator=draw)
        return rows

    def forward(self, x, targets=None, *more, **named):
        out = FORWARD(self, x, targets, *more, **named)
        return out * math.nan if state.get("nan") and self.training and out.ndim == 0 else out

    def schedule(cfg, options):
        usual = SCHEDULE(cfg, options)

        def factor(step, kind="matrix"):
            state["over"] = state.get("over") or (
                fault == "jump once" and step < state.get("step", 0)
            )
            state["step"] = step
            jumps = first <= step < first + LENGTH[fault] and not state["over"]
            return usual(step, kind) * (TIMES if jumps else 1)

        return factor

    dataset.Dataset.__call__, GPT.forward = take, forward
    if "jump" in fault:
        build.lr_schedule = schedule


def row(keys: dict, quick: bool) -> dict:
    first, steps = (40, 80) if quick else (120, 240)
    if keys["fault"] != "clean":
        inject(keys["fault"], first)
    with tempfile.TemporaryDirectory() as folder:
        aborted = False
        try:
            protocol.train_run(
                out_dir=f"{folder}/run",
                seed=keys["seed"],
                steps=steps,
                n_layer=2,
                n_head=2,
                n_embd=64,
                block_size=64,
                batch_size=BATCH,
                precision="fp32",
                eval_every=5,
                eval_tokens=4096,
                **SETUPS[keys["setup"]],
                **NUMBERS[keys["policy"]],
            )
        except monitor.Aborted:
            aborted = True
        lines = logger.read_metrics(Path(folder, "run", "metrics.jsonl"))
        return figures(lines, first, first + LENGTH[keys["fault"]]) | {"aborted": aborted}


def figures(lines: list[dict], first: int, last: int) -> dict:
    """Of a run whose fault begins after `first` updates and ends with step `last`. Its lines are in
    the order of time: steps that a rollback repeats come again, and the batch that it threw away is
    its event.
    """
    work, level, back, found, curve, banned, early = 0, math.inf, math.nan, [], [], set(), 0
    for line in lines:
        if "lr" in line:
            work += 1
        elif line.get("event") in ("spike", "nonfinite") and "rows" in line:
            found.append(line["step"])
            early += line["step"] <= first and not banned  # after a rollback the fault comes sooner
            if line["action"] in ("rollback", "abort"):
                work += 1
        elif line.get("event") == "rollback":
            banned |= {*range(line["banned"][0], line["banned"][1] + 1)}
        elif "val_loss" in line:
            loss = math.nan if line["val_loss"] is None else line["val_loss"]
            if line["step"] == first and level == math.inf:
                level = loss
            if line["step"] > first and line["step"] >= last and loss <= level and math.isnan(back):
                back = work - first
            if line["step"] >= first - 20:
                curve.append((work, round(loss, 4)))
    curve = curve[:: max(1, len(curve) // 60)]
    return {
        "val_loss": loss,
        "back": back,
        "work": work,
        "events": len(found),
        "false_alarms": early,
        "banned": len(banned),
        "batches": [x for x, _ in curve],
        "curve": [y for _, y in curve],
    }


def gaps(rows: list[dict], **keys) -> list[float]:
    """Of these rows to the clean runs of their setup and seed."""
    return paired(pick(rows, **keys), pick(rows, setup=keys["setup"], fault="clean"), "val_loss")


def cured(rows: list[dict], **keys) -> bool:
    found = pick(rows, **keys)
    return not any(r["aborted"] for r in found) and all(gap <= 0.01 for gap in gaps(rows, **keys))


def table(rows: list[dict]) -> str:
    lines = []
    for (setup, fault, policy), mine in groups(rows, "setup", "fault", "policy").items():
        keys, ended = dict(setup=setup, fault=fault, policy=policy), sum(r["aborted"] for r in mine)
        lost = [r["back"] for r in mine]
        back = "never" if any(map(math.isnan, lost)) else f"{fmean(lost):.0f}"
        broken = any(math.isnan(r["val_loss"]) for r in mine)
        loss = "NaN" if broken else plus_minus([r["val_loss"] for r in mine], ".3f")
        gap = "" if ended or broken or fault == "clean" else plus_minus(gaps(rows, **keys), "+.1%")
        lines.append(
            [
                setup,
                fault,
                f"**{policy}**" if cured(rows, **keys) and fault != "clean" else policy,
                f"the guard ended {ended} of {len(mine)}" if ended else loss,
                gap,
                "" if ended else back,
                *(
                    f"{fmean(r[name] for r in mine):.1f}".removesuffix(".0")
                    for name in ("events", "false_alarms", "banned", "work")
                ),
            ]
        )
    head = [
        "setup",
        "fault",
        "policy",
        "validation loss",
        "gap to clean",
        "batches to be back",
        "events",
        "false alarms",
        "rows banned",
        "batches computed",
    ]
    notes = (
        (
            "Means over seeds; events, alarms, rows and batches of one run. Bold: within 1 % of the"
            " clean"
        ),
        (
            "run with every seed. `never`: the loss is not back before the run ends, with one seed"
            " or more."
        ),
    )
    return markdown(head, lines) + "\n\n" + " ".join(notes)


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(14, 6)
    titles = {
        "poison": "3 batches of random bytes",
        "long": "12 batches of random bytes",
        "jump": f"learning rate x {TIMES} for 5 steps",
    }
    faults = [fault for fault in titles if pick(rows, setup="fragile", fault=fault)]
    colors = dict(zip(USUAL, INK)) | {"skip, accept=30": INK[3]}
    axes = figure.subplots(1, len(faults), squeeze=False, sharey=True)[0]
    for ax, fault in zip(axes, faults):
        clean = pick(rows, setup="fragile", fault="clean")[0]
        ax.plot(clean["batches"], clean["curve"], color="#999999", lw=4, label="no fault", zorder=1)
        for (name,), mine in groups(pick(rows, setup="fragile", fault=fault), "policy").items():
            if name not in TEXTS:
                xs, ys, ended = mine[0]["batches"], mine[0]["curve"], mine[0]["aborted"]
                label = "ended by the guard" if ended else f"{mine[0]['val_loss']:.2f}"
                label += f", {mine[0]['work']} batches" * (mine[0]["work"] > clean["work"])
                ax.plot(xs, ys, color=colors[name], lw=1.7, label=f"{name}: {label}")
                ax.plot(xs[-1], ys[-1], "X" if ended else "o", ms=7, color=colors[name])
        ax.set(
            title=titles[fault],
            xlabel="batches computed, repeated ones too",
            xlim=(xs[0] - 5, min(ax.get_xlim()[1], 1.6 * clean["work"])),
            ylim=(min(clean["curve"]) - 0.05, max(clean["curve"]) + 1.5),
        )
        ax.grid(alpha=0.25)
        below(ax, ncols=2, title=f"policy: end (no fault {clean['val_loss']:.2f})")
    figure.axes[0].set_ylabel(f"validation loss (nats per byte), seed {rows[0]['seed']}")


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    def cost(policy: str, setup: str = "fragile") -> str:
        keys = dict(setup=setup, fault="poison", policy=policy)
        ended = any(r["aborted"] for r in pick(rows, **keys))
        return "the run" if ended else f"{fmean(gaps(rows, **keys)):+.1%}"

    poison, jump = (
        {
            p: cured(rows, setup="fragile", fault=fault, policy=p)
            for (p,) in groups(pick(rows, setup="fragile", fault=fault), "policy")
            if p not in TEXTS
        }
        for fault in ("poison", "jump")
    )
    core = poison["rollback"] and not poison["none"]
    every = core and all(good for p, good in poison.items() if p != "none") and any(jump.values())
    failing = [p for p, good in poison.items() if not good and p != "none"]
    number = (
        f"3 poisoned batches cost without a guard {cost('none')} of loss, with rollback "
        f"{cost('rollback')}, with skip {cost('skip')}"
    )
    why = (
        f"rollback ends {'within' if poison['rollback'] else 'beyond'} 1 % of the clean run with"
        " every seed"
    )
    why += ", no guard " + ("too" if poison["none"] else "does not")
    why += (
        f"; {' and '.join(failing)} lose{'s' * (len(failing) == 1)} more than 1 %"
        if failing
        else ""
    )
    why += "; of the jump of the learning rate " + (
        f"{' and '.join(p for p, good in jump.items() if good)} cure it"
        if any(jump.values())
        else "no policy undoes the damage to 1 %"
    )
    if pick(rows, setup="default"):
        why += f"; to Muon with clipping the poison costs {cost('none', 'default')} without a guard"
    return ("holds" if every else "holds in part" if core else "does not hold"), number, why


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
