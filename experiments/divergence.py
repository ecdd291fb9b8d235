"""Claim: a run that has diverged, or learns nothing, is named by its losses alone, and no run that
learns is.

Source: none of the lessons. A run at a learning rate 1000 times too high ended at 5.93 from 5.58
nats, finite, rolled back now and then, and looked fine. The rule is that of metrics/divergence.py.

Protocol: 2 layers of width 32, 8 rows of 32 bytes a step, 60 to 300 steps, all policies at their
defaults (but where ten NaN in a row would end the run). 20 runs diverge: by a learning rate that
grows past what the optimizer can bear, that is too high from the beginning, or too high for a
pretrained model. 20 are stuck: at a learning rate of next to nothing, or at one that keeps the
model where counting single tokens is. 40 learn: each of the 12 optimizers (4 also at their own
rates, slow here), schedules with restarts and warm-ups, precisions, batches of 1 to 64, a growing
one, dropout, fine-tuning on the same text and on another one, 4 and 24 KiB of text until they are
memorised, an extended run, with evaluations and without. The limits were chosen on Python's source
with other seeds and learning rates. They are judged on prose (pydoc_data, the language's reference)
and on random sums, "17+25=42", in turns. A run is bad by what was done to it. Beside that a
criterion of its losses alone, apart from the rule, is asked: it learns if the median of its last
tenth is at most a tenth above that of any other, and below 0.9 of the entropy of single tokens or 5
% below that of the fifth tenth and the first loss.

Expected: at least 38 of the 40 bad runs are named before they end, and none of the 40 good ones.

    python -m experiments.divergence [--quick] [--out=DIR] [--jobs=N]
"""

import math
import random
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median

from experiments import protocol
from experiments.findings import INK, judged, listed, markdown, pick

# A step takes some milliseconds.
USUAL = dict(
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=32,
    batch_size=8,
    steps=200,
    eval_every=30,
    eval_tokens=2048,
    precision="fp32",
    on_spike="skip",
    on_nonfinite="skip",
    plot="false",
)
CONSTANT = dict(schedule="constant", warmup_steps=0)


def at(optim: str, lr: float, **more) -> dict:
    """One lr for every kind of parameter: Muon has others for what is no matrix."""
    fields = CONSTANT | dict(optim=optim, lr=lr, embed_lr=lr) | more
    is_tied = more.get("arch") == "gpt2"
    return fields if is_tied else fields | dict(head_lr=lr)


def rising(optim: str, lr: float, **more) -> dict:
    """lr grows from 1/10,000, through what is good for this optimizer, up to this."""
    shape = {"schedule.pct_start": 0.98, "schedule.div_factor": 1e4}
    return at(optim, lr, **more) | dict(schedule="onecycle") | shape


PRETRAINING = dict(optim="adamw", lr=0.01, steps=150)
# Fields of a run, and three that are none. size: bytes of the text; pretrained: it takes the
# weights of a run on the same text, or on the other one; resumed: it extends a run of this many.
BARE = dict(arch="gpt2", grad_clip="none")
DIVERGING = {
    "muon, grows to 100, gpt2": rising("muon", 100.0, **BARE),
    "adamw, grows to 5, gpt2": rising("adamw", 5.0, **BARE),
    "lion, grows to 0.5, gpt2": rising("lion", 0.5, **BARE),
    "soap, grows to 20, gpt2": rising("soap", 20.0, **BARE),
    "shampoo, grows to 5, gpt2": rising("shampoo", 5.0, **BARE),
    "adamw, grows to 20": rising("adamw", 20.0),
    "sgd, grows to 500": rising("sgd", 500.0),
    "lars, grows to 5000": rising("lars", 5000.0),
    "lamb, grows to 5": rising("lamb", 5.0, on_nonfinite="warn"),
    "soap, grows to 50": rising("soap", 50.0),
    "shampoo, grows to 20": rising("shampoo", 20.0),
    "lars at 200": at("lars", 200.0),
    "lamb at 0.2": at("lamb", 0.2),
    "adamw at 1, gpt2": at("adamw", 1.0, **BARE),
    "adamw at 1, gpt2, rolled back": at("adamw", 1.0, **BARE | dict(on_spike="rollback")),
    "muon at 20, gpt2": at("muon", 20.0, **BARE),
    "lion at 0.3, gpt2": at("lion", 0.3, **BARE),
    "adamw at 1, pretrained": at("adamw", 1.0, pretrained="same"),
    "muon at 5, pretrained": at("muon", 5.0, pretrained="same"),
    "lion at 0.1, pretrained": at("lion", 0.1, pretrained="same"),
}
LOW = {
    "sgd": 2e-6,
    "adamw": 2e-8,
    "adam_l2": 2e-8,
    "adafactor": 2e-7,
    "lion": 2e-9,
    "lars": 2e-5,
    "lamb": 2e-8,
    "shampoo": 2e-8,
    "soap": 6e-8,
    "muon": 4e-7,
    "schedule_free": 5e-8,
    "schedule_free.SGDScheduleFree": 2e-5,
}
HIGH = {
    "sgd": 200.0,
    "adamw": 2.0,
    "adam_l2": 2.0,
    "shampoo": 2.0,
    "soap": 6.0,
    "muon": 4.0,
    "schedule_free": 5.0,
    "schedule_free.SGDScheduleFree": 2000.0,
}
STUCK = {f"{optim} at {lr:g}": at(optim, lr) for optim, lr in LOW.items()}
STUCK |= {f"{optim} at {lr:g}": at(optim, lr) for optim, lr in HIGH.items()}
GOOD = {
    "sgd": 1.0,
    "adamw": 0.01,
    "adam_l2": 0.01,
    "adafactor": 0.01,
    "lion": 0.001,
    "lars": 3.0,
    "lamb": 0.01,
    "shampoo": 0.01,
    "soap": 0.03,
    "muon": 0.02,
    "schedule_free": 0.01,
    "schedule_free.SGDScheduleFree": 1.0,
}
RESTARTS = {"schedule.T_0": 25, "schedule.T_mult": 2}
HEALTHY = {f"{optim} at {lr:g}": dict(optim=optim, lr=lr) for optim, lr in GOOD.items()}
HEALTHY |= {
    f"{optim}, its own lr": dict(optim=optim) for optim in ("adamw", "lion", "lamb", "soap")
}
HEALTHY |= {
    "cosine": dict(schedule="cosine", eval_every=0),
    "constant": dict(schedule="constant", eval_every=0),
    "inverse_sqrt": dict(schedule="inverse_sqrt"),
    "sgdr": dict(schedule="sgdr"),
    "adamw, sgdr": dict(optim="adamw", lr=0.01, schedule="sgdr", eval_every=0, **RESTARTS),
    "onecycle": dict(schedule="onecycle", eval_every=0),
    "no warm-up": dict(warmup_steps=0),
    "warm-up of half the run": dict(warmup_frac=0.5),
    "bf16": dict(precision="bf16"),
    "bf16_sr": dict(precision="bf16_sr"),
    "fp16": dict(precision="fp16", steps=60),
    "fp16, adamw": dict(precision="fp16", steps=60, optim="adamw", lr=0.01),
    "batch of 1": dict(batch_size=1),
    "batch of 1, adamw": dict(batch_size=1, optim="adamw", lr=0.003, steps=300),
    "batch of 64": dict(batch_size=64, steps=60),
    "a growing batch": dict(batch_ramp=100, batch_ramp_from=1),
    "gpt2, adamw": dict(arch="gpt2", optim="adamw", lr=0.01),
    "dropout": dict(dropout=0.2),
    "pretrained": dict(pretrained="same"),
    "pretrained on another text": dict(pretrained="other", optim="adamw", lr=0.003, eval_every=0),
    "pretrained, 4 KiB": dict(pretrained="same", size=4096, optim="adamw", lr=0.003, steps=300),
    "4 KiB": dict(size=4096, optim="adamw", lr=0.01, schedule="constant", steps=300),
    "24 KiB": dict(size=24 * 1024, steps=300),
    "extended from 60 steps": dict(steps=150, resumed=60),
}
RUNS = {"diverging": DIVERGING, "stuck": STUCK, "healthy": HEALTHY}
GRID = [
    dict(kind=kind, run=name, text=("prose", "sums")[i % 2], seed=100 + i)
    for kind, runs in RUNS.items()
    for i, name in enumerate(runs)
]
QUICK = [
    g
    for g in GRID
    if g["run"] in ("adamw at 1, gpt2", "muon at 4e-07", "sgd at 200", "muon at 0.02", "4 KiB")
]


# ---- rows ----------------------------------------------------------------------------------------
def prose() -> str:
    from pydoc_data import topics

    return "\n\n".join(topics.topics[key] for key in sorted(topics.topics))


def sums() -> str:
    draw = random.Random(0)
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(40_000)]
    return "".join(f"{a}+{b}={a + b}\n" for a, b in pairs)


TEXTS = {"prose": prose, "sums": sums}


def entropy(text: str) -> float:
    """Of its single bytes, nats: what a model that only counts them loses."""
    data = text.encode()
    shares = [count / len(data) for count in Counter(data).values()]
    return -sum(p * math.log(p) for p in shares)


def row(keys: dict, quick: bool) -> dict:
    fields = USUAL | RUNS[keys["kind"]][keys["run"]] | dict(seed=keys["seed"])
    size = fields.pop("size", None)
    pretrained = fields.pop("pretrained", None)
    resumed = fields.pop("resumed", None)
    texts = {name: make()[:size] for name, make in TEXTS.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            Path(folder, f"{name}.txt").write_text(text, encoding="utf-8")
        fields |= dict(data=f"{folder}/{keys['text']}.txt", out_dir=f"{folder}/run")
        if pretrained is not None:
            (other,) = texts.keys() - {keys["text"]}
            name = keys["text"] if pretrained == "same" else other
            first = USUAL | PRETRAINING | dict(data=f"{folder}/{name}.txt")
            protocol.train_run(**first | dict(out_dir=f"{folder}/first"))
            fields["init_from"] = f"{folder}/first"
        if resumed is not None:
            protocol.train_run(**fields | dict(steps=resumed))
        rows = protocol.train_run(**fields)
    named = [row for row in rows if row.get("event") in ("divergence", "stuck")]
    losses = [math.inf if math.isnan(loss) else loss for loss in protocol.curve(rows)]
    tenth = len(losses) // 10
    levels = [median(losses[i * tenth : (i + 1) * tenth]) for i in range(10)]
    return {
        "steps": len(losses),
        "begin": losses[0],
        "levels": levels,
        "unigram": entropy(texts[keys["text"]]),
        "named": [row["event"] for row in named],
        "at": [row["step"] for row in named],
    }


# ---- what they say -------------------------------------------------------------------------------
def learns(r: dict) -> bool:
    """By its losses, and apart from the rule that is judged."""
    end = r["levels"][-1]
    knows_more_than_counts = end < 0.9 * r["unigram"]
    still_falls = end < min(0.95 * r["levels"][4], r["begin"])
    return end < 1.1 * min(r["levels"]) and (knows_more_than_counts or still_falls)


def parts(rows: list[dict]) -> dict[str, bool]:
    """What is claimed, in figures: does it hold?"""
    good = pick(rows, kind="healthy")
    bad = [r for r in rows if r["kind"] != "healthy"]
    n_bad = sum(bool(r["named"]) for r in bad)
    n_good = sum(bool(r["named"]) for r in good)
    return {
        f"{n_bad} of {len(bad)} bad runs are named (95 % or more)": n_bad >= 0.95 * len(bad),
        f"{n_good} of {len(good)} runs that learn are named (none)": n_good == 0,
    }


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    found = parts(rows)
    word, _, why = judged(found)
    number = "; ".join(text.partition(" (")[0] for text in [*found][:2])
    return word, number, why


def table(rows: list[dict]) -> str:
    head = ["kind", "run", "text", "first loss", "lowest level", "last level", "named at step"]
    cells = []
    for r in rows:
        named = ", ".join(f"{event} {step}" for event, step in zip(r["named"], r["at"]))
        levels = [f"{x:.3g}" for x in (r["begin"], min(r["levels"]), r["levels"][-1])]
        cells.append([r["kind"], r["run"], r["text"], *levels, f"{named or '-'} of {r['steps']}"])
    others = [r["run"] for r in rows if learns(r) != (r["kind"] == "healthy")]
    note = f"The criterion beside the rule takes {len(rows) - len(others)} of {len(rows)} runs for "
    note += f"what they are; not: {', '.join(others) or 'none'}."
    return "\n\n".join(["\n".join(listed(parts(rows))), note, markdown(head, cells)])


def picture(rows: list[dict], figure) -> None:
    """The levels of each run beside the entropy of single tokens; a dot where it is named."""
    figure.set_size_inches(11, 4)
    axes = figure.subplots(1, 3, sharey=True)
    for ax, kind, color in zip(axes, RUNS, INK):
        mine = pick(rows, kind=kind)
        for r in mine:
            ys = [min(level / r["unigram"], 3) for level in r["levels"]]
            ax.plot([5 + 10 * i for i in range(10)], ys, color=color, alpha=0.5, lw=1)
            if r["at"]:
                x = 100 * r["at"][0] / r["steps"]
                ax.plot(x, ys[min(9, int(x / 10))], "o", ms=4, color=color)
        ax.axhline(1, color="#999999", lw=0.8, ls="--")
        n_named = sum(bool(r["named"]) for r in mine)
        ax.set(title=f"{kind}: {n_named} of {len(mine)} named", xlabel="share of the run, %")
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("loss / entropy of single tokens")
    axes[0].plot([], [], "o", ms=4, color="#555555", label="named here")
    axes[0].legend(loc="lower left")
    figure.suptitle("Each line is a run's training loss; 3 stands for 3 and more")


if __name__ == "__main__":
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
