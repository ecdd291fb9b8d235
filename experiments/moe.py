"""Claim: at equal FLOPs a token, experts end lower than an MLP; without a term for balance some
starve; a bias or a loss evens their loads at no cost in loss; and the router's z-loss, too, keeps
them from collapsing, softens the router's softmax and makes training steadier.

Source: experts at equal FLOPs: Shazeer et al. 2017 (1701.06538), Fedus et al. 2021 (2101.03961);
the bias: Wang et al. 2024 (2408.15664); the loss of a sequence: DeepSeek-V3 (2412.19437). The
z-loss is the second lesson's, whose formula is over "the logits of expert j"; the paper is ST-MoE
(Zoph et al. 2022, 2202.08906), which claims steadier training, not balance.

Protocol: the default corpus in bytes, 2 layers of width 64, 600 steps of 512 tokens, fp32, 5 seeds,
no guard. 8 experts of half the MLP's width, 2 of them a token, so the FLOPs of a token are
the MLP's but for the router's. Muon, train.py's default: its step has one size whatever a gradient
has, so an expert with few tokens moves as far as others. Schedule, clipping and all else are
train.py's.
`dense`: experts with train.py's terms (bias 1e-3, z 1e-3) and the MLP of equal FLOPs, each with 3
learning rates, around the MLP's best of experiments/optimizers.py; its best has the lowest mean.
An MLP of as many parameters as all experts has that one alone.
`terms`: at lr 2^-6, no term, each alone, those of train.py, and all three. The sequence loss has
DeepSeek-V3's 1e-4, and 1e-2, which was usual for such losses before.
`steady`: in bf16 at 8 times the usual lr, with Muon and AdamW, without and with the z-loss alone.
Loads and log Z are those of training batches, every 20 steps, over the last tenth of the run, means
over layers; a load is an expert's tokens over the mean, and it starves below 0.1. How sharp the
router's softmax is, and how many tokens would go to another pair of experts if its logits were
rounded to bf16, is taken from the last evaluation. "Clearly" is a mean x sqrt(n) of 3.1 standard
deviations or more, seed by seed.

Expected: experts end 1 to 3 % below the MLP, and above the one of as many parameters. Without a
term one to three of 16 experts starve, the most loaded has twice the mean or more. The bias evens
the loads within some hundred steps, 1e-2 does too, 1e-4 hardly; none of them costs as much as 0.3
%. The z-loss pulls log Z from ln 8 = 2.1 towards 0, so fewer choices hang on bf16's rounding, but
it can do so by moving all logits of a token together: it neither evens loads nor softens. Here the
router computes in fp32 under bf16, as ST-MoE's, and a step is clipped: at 8 times the lr no run
breaks down, with or without it.

    python -m experiments.moe [--quick] [--out=DIR] [--jobs=N]
    python -m experiments.moe --data=FILE --models=mlp,bias_and_z --budget=10m
"""

import math
import tempfile
from collections import deque

import torch

from experiments import claims, protocol
from experiments.findings import (
    INK,
    clear,
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
from layers.moe import MoE, Router
from metrics import experts, flops
from model import GPT
from run import build
from settings import parse


def terms(bias: float | None = None, z: float | None = None, sequence: float | None = None) -> dict:
    """The flags of 8 experts with these terms."""
    return dict(n_expert=8, moe_bias_lr=bias, router_z_loss=z, moe_sequence_loss=sequence)


DENSE = {"MLP": {}, "wide MLP": dict(mlp_width=1024)}  # 4 and 16 times the width
TERMS = {
    "no term": terms(),
    "bias": terms(bias=1e-3),
    "sequence 1e-4": terms(sequence=1e-4),
    "sequence 1e-2": terms(sequence=1e-2),
    "z": terms(z=1e-3),
    "bias and z": terms(bias=1e-3, z=1e-3),
    "all": terms(bias=1e-3, z=1e-3, sequence=1e-4),
}
EXPERTS = "bias and z"  # train.py's
LRS, SEEDS = (2.0**-7, 2.0**-6, 2.0**-5), (1, 2, 3, 4, 5)
LR = LRS[1]
HIGH = {"muon": 2.0**-3, "adamw": 2.0**-4}  # 8 times the best, each one's own
N_LAYER, BATCH, BLOCK = 2, 8, 64
STARVED = 0.1


def grid(lrs: tuple, names: tuple, high: dict, seeds: tuple) -> list[dict]:
    def keys(part, case, lr, optim="muon", precision="fp32") -> dict:
        return dict(part=part, case=case, optim=optim, precision=precision, lr=lr)

    dense = [keys("dense", case, lr) for case in ("MLP", EXPERTS) for lr in lrs]
    dense.append(keys("dense", "wide MLP", LR))
    usual = [keys("terms", case, LR) for case in names]
    steady = [keys("steady", case, lr, o, "bf16") for o, lr in high.items() for case in PAIR]
    return [one | dict(seed=seed) for one in [*dense, *usual, *steady] for seed in seeds]


PAIR = "no term", "z"  # without and with the z-loss, and nothing else
# Those of `dense` at LR are no rows of `terms` as well.
NAMES = tuple(name for name in TERMS if name != EXPERTS)
GRID = grid(LRS, NAMES, HIGH, SEEDS)
QUICK = grid((LR,), ("no term", "bias", "sequence 1e-2", "z", "all"), {"muon": 2.0**-3}, SEEDS[:1])


# ---- rows ----------------------------------------------------------------------------------------
def row(keys: dict, quick: bool) -> dict:
    steps, tokens = (20, 4096) if quick else (600, 32768)
    flags = (DENSE | TERMS)[keys["case"]]
    has_experts = "n_expert" in flags
    looked = choices(N_LAYER * tokens // (BATCH * BLOCK)) if has_experts else dict
    options = {"opt.betas": (0.9, 0.95)} if keys["optim"] == "adamw" else {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = f"{folder}/run"
        rows = protocol.train_run(
            out_dir=run,
            optim=keys["optim"],
            lr=keys["lr"],
            precision=keys["precision"],
            seed=keys["seed"],
            steps=steps,
            n_layer=N_LAYER,
            n_embd=64,
            block_size=BLOCK,
            batch_size=BATCH,
            eval_every=steps,
            eval_tokens=tokens,
            watch_every=(2 if quick else 20) if has_experts else None,
            plot=False,
            **flags,
            **options,
        )
        losses = protocol.curve(rows)
        figures = {
            "val_loss": protocol.curve(rows, "val_loss")[-1],
            "loss": protocol.tail(rows),
            # Nats from a step to the next
            "jumps": sum(b > a + 0.5 for a, b in zip(losses, losses[1:])),
        }
        figures |= sizes(run)
        if has_experts:
            figures |= loads(experts.read(run)[1]) | log_zs(rows) | looked()
    return figures


def sizes(run: str) -> dict:
    """Parameters, and FLOPs of a token, forward and backward."""
    cfg = parse.parse([f"{run}/config.toml"])
    model = GPT(build.model_config(cfg))
    n = flops.matmul_params(model)
    return {
        "params": sum(p.numel() for p in model.parameters()),
        "flops": flops.flops_per_token(n, cfg.n_layer, cfg.n_embd, cfg.block_size),
    }


def last(values: list) -> list:
    """Its last tenth."""
    return values[-max(1, len(values) // 10) :]


def loads(layers: dict[int, list[list[int]]]) -> dict:
    """Figures of the loads; layers: the tokens of each expert in each watched step."""
    steps = [
        experts.statistics({0: tokens}, [0.0]) for of in layers.values() for tokens in last(of)
    ]
    shares = [
        n * len(tokens) / sum(tokens)
        for of in layers.values()
        for tokens in last(of)
        for n in tokens
    ]
    curve = [
        mean_sd([experts.statistics({0: tokens}, [0.0])["moe_load_max"] for tokens in of_step])[0]
        for of_step in zip(*layers.values())
    ]
    return {
        "entropy": mean_sd([one["moe_load_entropy"] for one in steps])[0],
        "least": mean_sd([one["moe_load_min"] for one in steps])[0],
        "most": mean_sd([one["moe_load_max"] for one in steps])[0],
        "starved": sum(share < STARVED for share in shares) / len(shares),
        "most_curve": [float(f"{x:.4g}") for x in curve],
    }


def log_zs(rows: list[dict]) -> dict:
    """The router's log Z; far from 0 is how far either way, so that layers do not cancel."""
    layers = [protocol.curve(rows, f"moe_log_z/{i}") for i in range(N_LAYER)]
    curve = [mean_sd(list(of_step))[0] for of_step in zip(*layers)]
    return {
        "log_z": mean_sd([x for of in layers for x in last(of)])[0],
        "log_z_size": mean_sd([abs(x) for of in layers for x in last(of)])[0],
        "log_z_curve": [float(f"{x:.4g}") for x in curve],
    }


def choices(n_calls: int):
    """From now on routers are looked at, outside training; what it returns gives the figures of the
    last n_calls."""
    seen, logits = deque(maxlen=n_calls), []
    forward, choose = Router.forward, MoE.choose

    def keep_logits(router, x):
        found = forward(router, x)
        logits[:] = [found.detach()]
        return found

    def look(layer, scores):
        chosen = choose(layer, scores)
        if not torch.is_grad_enabled():
            narrow = logits[0].bfloat16().to(scores.dtype)
            other = choose(layer, layer.score(narrow) + layer.selection_bias)
            moved = (chosen.sort(-1).values != other.sort(-1).values).any(-1)
            largest = layer.score(logits[0]).amax(-1)
            seen.append((moved.double().mean().item(), largest.mean().item()))
        return chosen

    Router.forward, MoE.choose = keep_logits, look

    def figures() -> dict:
        moved, largest = ([one[i] for one in seen] for i in (0, 1))
        return {"moved": mean_sd(moved)[0], "largest": mean_sd(largest)[0]}

    return figures


# ---- what they say -------------------------------------------------------------------------------
def best(rows: list[dict], case: str) -> list[dict]:
    """The rows of its learning rate with the lowest mean loss; one that diverged is none."""
    found = groups(pick(rows, part="dense", case=case), "lr").values()
    return min(found, key=lambda g: (math.isnan(x := mean_sd([r["val_loss"] for r in g])[0]), x))


def usual(rows: list[dict], case: str) -> list[dict]:
    """The rows of these terms in fp32 at LR."""
    return pick(rows, part="dense" if case == EXPERTS else "terms", case=case, lr=LR)


def mean(rows: list[dict], name: str) -> float:
    return mean_sd([r[name] for r in rows])[0]


def gaps(rows: list[dict], case: str) -> list[float]:
    """Validation loss against no term, seed by seed."""
    return paired(usual(rows, case), usual(rows, "no term"), "val_loss")


def falls(rows: list[dict], base: list[dict], name: str) -> list[float]:
    """The base's figure less that of the same seed."""
    other = {r["seed"]: r[name] for r in base}
    return [other[r["seed"]] - r[name] for r in rows]


def settings(rows: list[dict]) -> dict[str, tuple[list[dict], list[dict]]]:
    """What the z-loss was tried in -> the rows without and with it."""
    found = {f"fp32, Muon, lr {power(LR)}": tuple(usual(rows, case) for case in PAIR)}
    for (optim, lr), mine in groups(pick(rows, part="steady"), "optim", "lr").items():
        name = f"bf16, {'Muon' if optim == 'muon' else 'AdamW'}, lr {power(lr)}"
        found[name] = tuple(pick(mine, case=case) for case in PAIR)
    return found


def power(lr: float) -> str:
    return f"2^{math.log2(lr):.0f}"


def parts(rows: list[dict]) -> dict[str, bool]:
    """What is claimed, in figures: does it hold?"""
    dense = paired(best(rows, EXPERTS), best(rows, "MLP"), "val_loss")
    wide = paired(best(rows, "wide MLP"), best(rows, EXPERTS), "val_loss")
    free = usual(rows, "no term")
    over = {
        case: mean(usual(rows, case), "most") - 1
        for case in ("no term", "bias", "sequence 1e-2", "z")
    }
    found = {
        (
            f"at equal FLOPs a token, 8 experts end {plus_minus(dense, '+.2%')} from an MLP, each"
            " at its best lr (clearly below)"
        ): clear([-x for x in dense]),
        (
            f"an MLP of as many parameters ends {plus_minus(wide, '+.2%')} from the experts"
            " (clearly below: their bound)"
        ): clear([-x for x in wide]),
        (
            f"without a term {mean(free, 'starved'):.0%} of the experts get less than a tenth of"
            " the mean load (5 % or more)"
        ): mean(free, "starved") >= 0.05,
    }
    for case in ("bias", "sequence 1e-2", "z"):
        found[
            f"{case} alone: the most loaded expert is {over[case]:.2f} over the mean, without a"
            f" term {over['no term']:.2f} (half or less)"
        ] = over[case] <= over["no term"] / 2
    for case in ("bias", "sequence 1e-2", "z"):
        cost = gaps(rows, case)
        # A term that scatters much must not pass for that alone.
        found[f"{case} alone moves the loss by {plus_minus(cost, '+.2%')} (0.3 % or less up)"] = (
            not clear(cost) and mean_sd(cost)[0] <= 0.003
        )
    return found | parts_of_z(rows)


def parts_of_z(rows: list[dict]) -> dict[str, bool]:
    """Those of the router's z-loss."""
    found = {}
    for name, (free, held) in settings(rows).items():
        far, near = mean(free, "log_z_size"), mean(held, "log_z_size")
        found[
            f"{name}: |log Z| is {near:.2f} with the z-loss, {far:.2f} without (half or less)"
        ] = near <= far / 2
        found[
            f"{name}: the largest score is {mean(held, 'largest'):.3f} with it, "
            f"{mean(free, 'largest'):.3f} without (clearly lower: a softer softmax)"
        ] = clear(falls(held, free, "largest"))
        found[
            f"{name}: in bf16 {mean(held, 'moved'):.2%} of the choices would be others with it, "
            f"{mean(free, 'moved'):.2%} without (clearly fewer)"
        ] = clear(falls(held, free, "moved"))
        if held[0]["part"] != "steady":
            continue
        found[
            f"{name}: it moves the loss by {plus_minus(paired(held, free, 'val_loss'), '+.2%')}"
            " (clearly down)"
        ] = clear([-x for x in paired(held, free, "val_loss")])
        jumps = [sum(r["jumps"] for r in some) for some in (held, free)]
        found[
            f"{name}: {jumps[0]} jumps of the loss with it, {jumps[1]} without (clearly fewer)"
        ] = clear(falls(held, free, "jumps"))
    return found


def verdict(rows: list[dict]) -> tuple[str, str, str]:
    return judged(parts(rows))


def table(rows: list[dict]) -> str:
    return "\n\n".join(
        [
            "\n".join(listed(parts(rows))),
            "Validation loss at each learning rate that was tried (bold: the best):",
            table_of_losses(rows),
            f"In fp32 at lr {power(LR)}; loads and log Z are of the last tenth of the run:",
            table_of_terms(rows),
            "The router's z-loss alone, and nothing:",
            table_of_z(rows),
        ]
    )


def table_of_losses(rows: list[dict]) -> str:
    lrs = [*groups(pick(rows, part="dense"), "lr")]
    lines = []
    for (case,), mine in groups(pick(rows, part="dense"), "case").items():
        top = best(rows, case)[0]["lr"]
        tried = [[r["val_loss"] for r in pick(mine, lr=lr)] for (lr,) in lrs]
        losses = [plus_minus(x) if x else "" for x in tried]
        marked = [f"**{x}**" if lr == top else x for (lr,), x in zip(lrs, losses)]
        name = case if case in DENSE else f"8 experts, {case}"
        lines.append([name, f"{mine[0]['flops']:,.0f}", f"{mine[0]['params']:,}", *marked])
    head = ["", "FLOPs a token", "parameters", *(f"lr {power(lr)}" for (lr,) in lrs)]
    return markdown(head, lines)


def table_of_terms(rows: list[dict]) -> str:
    lines = []
    for case in TERMS:
        mine = usual(rows, case)
        if not mine:
            continue
        numbers = [
            plus_minus([r[name] for r in mine], form)
            for name, form in (
                ("entropy", ".3f"),
                ("least", ".2f"),
                ("most", ".2f"),
                ("starved", ".0%"),
                ("log_z", ".2f"),
                ("val_loss", ".4f"),
            )
        ]
        gap = "" if case == "no term" else plus_minus(gaps(rows, case), "+.2%")
        lines.append([case, *numbers, gap])
    head = [
        "terms",
        "entropy of the loads",
        "least load",
        "most load",
        "starved experts",
        "router's log Z",
        "validation loss",
        "against no term",
    ]
    return markdown(head, lines)


def table_of_z(rows: list[dict]) -> str:
    lines = []
    for name, both in settings(rows).items():
        for case, mine in zip(("none", "1e-3"), both):
            numbers = [
                plus_minus([r[figure] for r in mine], form)
                for figure, form in (
                    ("log_z", ".2f"),
                    ("largest", ".3f"),
                    ("moved", ".2%"),
                    ("most", ".2f"),
                    ("val_loss", ".4f"),
                )
            ]
            lines.append([name, case, *numbers, sum(r["jumps"] for r in mine)])
    head = [
        "",
        "z-loss",
        "router's log Z",
        "largest score",
        "choices that bf16 would change",
        "most load",
        "validation loss",
        "loss jumps > 0.5 nats, all seeds",
    ]
    return markdown(head, lines)


def picture(rows: list[dict], figure) -> None:
    figure.set_size_inches(13, 9)
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    (losses, balance), (drift, steady) = figure.subplots(2, 2)
    names = {
        "MLP of equal\nFLOPs": "MLP",
        "8 experts,\n2 a token": EXPERTS,
        "MLP of equal\nparameters": "wide MLP",
    }
    dots(losses, {name: [r["val_loss"] for r in best(rows, case)] for name, case in names.items()})
    losses.set(
        xlabel="validation loss, nats a byte, each at its best lr",
        title="Do experts beat an MLP?",
    )
    shown = {case: mine for case in TERMS if (mine := usual(rows, case))}
    dots(balance, {case: [r["most"] for r in mine] for case, mine in shown.items()}, INK[1])
    dots(balance, {case: [r["least"] for r in mine] for case, mine in shown.items()}, INK[0])
    balance.axvline(1, color="black", lw=0.8)
    balance.set(
        xlabel="tokens / mean of the layer (blue: least loaded expert, red: most loaded)",
        title="Loads in the last tenth of the run: 1 is even",
    )
    for (name, both), color in zip(settings(rows).items(), INK):
        for label, mine, style in zip(("no z-loss", "z-loss"), both, ("-", "--")):
            curve = [mean_sd(list(x)) for x in zip(*(r["log_z_curve"] for r in mine))]
            share = [(i + 1) / len(curve) for i in range(len(curve))]
            drift.plot(share, [m for m, _ in curve], style, color=color, label=f"{name}, {label}")
            if len(mine) > 1:
                low, high = [m - sd for m, sd in curve], [m + sd for m, sd in curve]
                drift.fill_between(share, low, high, color=color, alpha=0.12, lw=0)
    drift.axhline(0, color="black", lw=0.8)
    drift.set(
        xlabel="share of the run",
        ylabel="router's log Z, nats (shade: sd over seeds)",
        title="What the router's z-loss does to log Z",
    )
    drift.legend(frameon=False, fontsize=8)
    drift.grid(alpha=0.25)
    costs = {case: [100 * x for x in gaps(rows, case)] for case in shown if case != "no term"}
    for name, (free, held) in [*settings(rows).items()][1:]:
        costs[f"z, {name}"] = [100 * x for x in paired(held, free, "val_loss")]
    dots(steady, costs)
    steady.axvline(0, color="black", lw=0.8)
    steady.set(
        xlabel="validation loss against no term, %, seed by seed",
        title="What the terms cost: left of 0 is better",
    )


# ---- on somebody's own text ----------------------------------------------------------------------
TYPED = {claims.slug(case): flags for case, flags in (DENSE | TERMS).items()}


def candidate(name: str) -> dict:
    return {"lr": LR} | TYPED[name]


if __name__ == "__main__":
    claims.main(__file__, [*TYPED], candidate)
    protocol.main(__doc__, __file__, GRID, QUICK, row, table, picture, verdict)
