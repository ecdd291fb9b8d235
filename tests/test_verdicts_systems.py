"""Verdicts follow from figures: made-up rows in which all holds, then each figure spoiled, one at a
time."""

import math

import pytest
from test_experiments import load


def compression(module):
    share = {
        "none": 1,
        "accumulation 4": 0.25,
        "topk 10 %": 0.08,
        "topk 1 %": 0.02,
        "topk 0.1 %": 0.01,
        "sign": 1 / 32,
        "onebit": 1 / 32,
        "powersgd 1": 0.02,
        "powersgd 2": 0.04,
        "powersgd 4": 0.08,
    }
    share |= {f"SGD, {name}": share[name] for name in ("none", "topk 10 %", "onebit", "powersgd 4")}
    loss = {"none": 2.0, "onebit": 2.04}
    worse = {False: 1.03, True: 1, None: 1}
    good = [
        g
        | {
            "val_loss": loss.get(g["method"], 2.002) * worse[g["feedback"]] + g["seed"],
            "sent": 1e6 * share[g["method"]],
            "ms": 90.0,
        }
        for g in module.GRID
    ]
    spoiled = [
        ("topk 10 %", "sent", 2e5),
        ("onebit", "sent", 5e4),
        ("accumulation 4", "sent", 5e5),
        ("powersgd 4", "sent", 2e5),
        ("topk 1 %", "val_loss", 4.1),
        ("powersgd 4", "val_loss", math.nan),
        ("onebit", "val_loss", 4.4),
        ("accumulation 4", "val_loss", 4.2),
        ("sign", "val_loss", 5),
        ("SGD, topk 10 %", "val_loss", 4.1),
        ("SGD, onebit", "val_loss", 4.4),
        ("SGD, powersgd 4", "val_loss", math.nan),
    ]
    return good, [
        (dict(method=name) | ({} if name[0] == "a" else dict(feedback=True)), figure, bad)
        for name, figure, bad in spoiled
    ]


def accumulation(module):
    def figures(part, precision, micro_batches, seed):
        return {
            "update": {
                "gap": 1e-6 if precision == "fp32" else 1e-3,
                "error": 1e-3,
                "error_1": 1e-3,
            },
            "sent": {"ours": 100, "torch": 100, "torch without": 100 * micro_batches},
            "train": {"val_loss": 2 + 0.01 * seed + 1e-4 * micro_batches},
        }[part]

    return [g | figures(**g) for g in module.GRID], [
        (dict(part="update", precision="fp32"), "gap", 1e-4),
        (dict(part="update"), "error", 2e-3),
        (dict(part="train", micro_batches=4), "val_loss", 2.1),
        (dict(part="sent", micro_batches=4), "ours", 400),
        (dict(part="train", precision="fp16", micro_batches=8), "val_loss", math.nan),
        (dict(part="sent", micro_batches=8), "torch without", 100),
    ]


def parallel_layouts(module):
    told = [module.formula(g["layout"], g["precision"]) for g in module.GRID]
    good = [
        g | {"sent": t, "told": t, "most": t, "losses": [5.0, 4.0]}
        for g, t in zip(module.GRID, told)
    ]
    return good, [
        (dict(layout="tp", precision="fp64"), "losses", [5, 4 + 1e-8]),
        (dict(layout="pp", precision="fp32"), "losses", [5.01, 4]),
        (dict(layout="pp", precision="fp32"), "losses", [math.nan, 4]),
        (dict(layout="fsdp"), "sent", 1.0),
        (dict(layout="one process"), "sent", 5.0),
    ]


def pipeline_bubble(module):
    def figures(part, schedule, p, m):
        ops = module.timeline.schedule(schedule, p, m, module.CHUNKS.get(schedule, 1))
        plan = module.timeline.simulate(ops)
        return {
            "measured": plan.bubble,
            "simulated": plan.bubble,
            "formula": module.formula(schedule, p, m),
            "seconds_a_step": 0.1,
            "in_flight": max(plan.in_flight),
            "planned": max(plan.in_flight),
        }

    one = dict(part="sleep", schedule="1f1b", p=4, m=16)
    return [g | figures(**g) for g in module.GRID], [
        (one, "measured", 0.3),
        (one, "simulated", 0.2),
        (one, "in_flight", 16),
        (one | dict(part="model", p=2), "measured", 0.4),
        (one | dict(schedule="zerobubble"), "measured", 0.12),
    ]


def memory_per_rank(module):
    def figures(part, case, **keys):
        parts = {
            k: 10
            for name in ("parameters", "gradients", "state")
            for k in (name, f"predicted_{name}")
        }
        return {
            "sources": lambda: module.row(dict(part=part, case=case, width=0, optim="adamw"), True),
            "process": lambda: {"found": 3e8 if case == "disk" else 5e8, "predicted_state": 2.01e8},
            "measured": lambda: parts | {"predicted": 100, "found": 101},
            "offloaded": lambda: {"predicted": 100, "found": 99, "host": 50, "predicted_host": 50},
        }[part]()

    return [g | figures(**g) for g in module.GRID], [
        (dict(case="10B on each GPU"), "predicted", 121e9),
        (dict(case="zero3", part="measured"), "found", 94),
        (dict(case="fsdp", part="offloaded"), "found", 110),
        (dict(case="ddp", part="offloaded"), "host", 60),
        (dict(part="process", case="disk"), "found", 4e8),
    ]


def activation_checkpoint(module):
    size = {"none": 160, "full": 27, "attention": 110, "selective": 90}
    power = dict(zip(module.WAYS, (1, 0.5, 0.7, 0.5)))

    def figures(part, how, layers, seed):
        if part == "depth":
            return {"run_as": how, "tensors": 20 * layers ** power[how]}
        return {"tensors": size.get(how, 60), "peak": 1, "ratio": 1.33, "ms": 1, "gradient_gap": 0}

    return [g | figures(**g) for g in module.GRID], [
        (dict(part="step", how="full"), "ratio", 1.25),
        (dict(part="step", how="full"), "ratio", 1.5),
        (dict(how="sqrt(kL) segments", layers=256), "tensors", 1000),
        (dict(how="mlp"), "gradient_gap", 1e-9),
        (dict(part="depth", how="full", layers=256), "tensors", 600),
        (dict(how="selective"), "tensors", 10),
        (dict(part="depth", how="none", layers=256), "tensors", 2000),
    ]


def compile_modes(module):
    speed = dict(zip(module.MODES, (100, 120, 130, 140)))

    def figures(part, mode, seed):
        if part == "lengths":
            return {"graphs": 5 if mode == "fixed" else 2, "breaks": 0}
        return {
            "tokens_per_s": speed[mode] + seed / 10,
            "compile_s": 90 if mode == "max-autotune" else 20,
            "loss": 2.5,
            "breaks": 0,
            "graphs": 1,
            "again": 0,
        }

    large, small = (
        (lambda mode: dict(part="large", mode=mode)),
        (lambda mode: dict(part="small", mode=mode)),
    )
    return [g | figures(**g) for g in module.GRID], [
        (small("default"), "tokens_per_s", 95),
        (large("max-autotune"), "tokens_per_s", 119),
        (large("max-autotune"), "compile_s", 21),
        (small("reduce-overhead"), "tokens_per_s", 120),
        (large("default"), "breaks", 1),
        (large("default"), "again", 1),
        (small("default"), "loss", math.nan),
        (dict(part="lengths", mode="dynamic"), "graphs", 5),
    ]


def search(module):
    best = {"grid": 2.2, "random": 2.1, "optuna": 2.0}

    def figures(method, seed):
        loss = best[method] + 0.003 * (7 * seed % 5) * (1 + (method == "optuna") / 10)
        settings = {f"best_{name}": 1.0 for name in module.RANGES}
        return settings | {
            "best": loss,
            "losses": [math.nan, loss + 1, loss],
            "drawn": [[1.0] * 4] * 3,
        }

    return [g | figures(**g) for g in module.GRID], [
        (dict(method="random"), "best", 2.25),
        (dict(method="optuna"), "best", 2.3),
    ]


MADE = [
    compression,
    accumulation,
    parallel_layouts,
    pipeline_bubble,
    memory_per_rank,
    activation_checkpoint,
    compile_modes,
    search,
]


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.__name__)
def test_a_verdict_follows_its_figures(made):
    module = load(made.__name__)
    good, spoiled = made(module)
    assert module.verdict(good)[0] == "holds", module.verdict(good)
    for where, figure, bad in spoiled:
        hit = [all(r[k] == v for k, v in where.items()) for r in good]
        rows = [r | {figure: bad} if h else r for r, h in zip(good, hit)]
        word, number, why = module.verdict(rows)
        assert any(hit) and word != "holds" and "not so" in why, (where, figure, bad)
        assert number and "|" in module.table(rows)


def test_a_search_in_which_nothing_is_significant_is_too_small():
    module = load("search")
    good, _ = search(module)
    noise = {
        (m, s): 2 + 0.01 * (-1) ** (s + i) for i, m in enumerate(module.METHODS) for s in range(6)
    }
    assert (
        module.verdict([r | {"best": noise[r["method"], r["seed"]]} for r in good])[0]
        == "not at this scale"
    )
