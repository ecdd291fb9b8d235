"""What a run says of itself on the screen: a few aligned lines at its start, and at its end.

    model      modern, 3.28M parameters: 4 layers, 4 heads, width 256; context of 256 tokens
    data       python: 15.7M tokens to train on, 1.75M held out; a vocabulary of 256
    batch      32 x 256 = 8,192 tokens a step; 600 steps = 4.92M tokens, 0.3 times the text
    ...
    done       600 steps and 4.92M tokens; 80 s here, 61.4k tokens/s, 0.71 GiB at most
    loss       1.31 at the end; validation 1.38 at the end, 1.37 at best (step 540)
    next       python sample.py out

The long list of all settings is in train.log and config.toml.
"""

import math
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

import schedules
from metrics.flops import active_params
from metrics.labels import loss_text
from metrics.logger import read_metrics, short
from parallel.mesh import Mesh
from run import auto
from settings.fields import DECAYS, FIELDS, Config, flag

# Settings that other lines of the summary show, or that say where a run is, not what it is.
SHOWN = ("out_dir", "data", "data_dir", "resume", "steps", "optim", "precision", "arch")
QUIET = ("save", "resume")  # events that mean nothing special


def aligned(parts: list[tuple[str, str]]) -> list[str]:
    """(head, text) pairs as lines. A head that follows itself is left out."""
    lines = []
    before = ""
    for head, text in parts:
        lines.append(f"{'' if head == before else head:<11}{text}")
        before = head
    return lines


# ---- at the start --------------------------------------------------------------------------------
def at_start(
    cfg: Config,
    mesh: Mesh,
    corpus,
    train_data,
    full_model: torch.nn.Module,
    lrs: dict[str, float],
    lr_schedule: Callable[[int], float],
    options: dict[str, dict],
    hardware: str,
    why_emulated: str | None,
) -> list[str]:
    """The lines that introduce a run.

    lrs: peak lr of each kind of parameter; lr_schedule: step -> factor of every lr; options: the
    dotted settings, by namespace; why_emulated: why FP8 is emulated, or None.
    """
    parts = [
        ("model", about_model(cfg, full_model)),
        ("data", about_data(corpus)),
        *(("documents", text) for text in about_packing(cfg, train_data)),
        *(("documents", text) for text in about_documents(cfg, corpus)),
        ("batch", about_batch(cfg, train_data.per_epoch * cfg.block_size)),
        ("optimizer", about_optimizer(cfg, lrs)),
        ("schedule", about_schedule(cfg, lr_schedule)),
        ("precision", about_precision(cfg, hardware, why_emulated, mesh.world == 1)),
        ("layout", about_layout(cfg, mesh)),
        *(("memory", text) for text in about_memory(cfg)),
        ("guards", about_guards(cfg, options["monitor"])),
        ("saves", about_saves(cfg)),
    ]
    changed = []
    for name in sorted(cfg.given):
        if name in FIELDS and name not in SHOWN and getattr(cfg, name) != FIELDS[name].default:
            changed.append(flag(name, getattr(cfg, name))[2:])
    if changed:
        more = f" and {len(changed) - 8} more, in config.toml" if len(changed) > 8 else ""
        parts.append(("unusual", " ".join(changed[:8]) + more))
    return aligned(parts)


def about_model(cfg: Config, full_model: torch.nn.Module) -> str:
    n_params = sum(p.numel() for p in full_model.parameters())
    heads = f"{cfg.n_head} heads"
    if cfg.head_dim is not None:
        heads += f" of {cfg.head_dim}"
    active = ""
    experts = ""
    if cfg.n_expert is not None:
        active = f", {short(active_params(full_model))} of them active"
        spread = f" in one layer of {cfg.moe_every}" if cfg.moe_every > 1 else ""
        experts = f"{cfg.n_expert} experts{spread}, {cfg.n_expert_active} of a token, "
        if cfg.n_shared_expert:
            experts += f"{cfg.n_shared_expert} shared, "
    return (
        f"{cfg.arch}, {short(n_params)} parameters{active}: {cfg.n_layer} layers, {experts}"
        f"{heads}, width {cfg.n_embd}; context of {cfg.block_size} tokens"
    )


def about_data(corpus) -> str:
    return (
        f"{corpus.name}: {short(len(corpus.train))} tokens to train on, "
        f"{short(len(corpus.val))} held out; a vocabulary of {corpus.tokenizer.n_vocab:,}"
    )


def about_documents(cfg: Config, corpus) -> list[str]:
    """A line where documents are hidden from each other: how long they are at the beginning."""
    if not cfg.document_mask:
        return []
    n = 0
    seen = 0
    # Nearly always the first tokens answer this.
    while not n and seen < len(corpus.train):
        some = corpus.train.slice(seen, min(len(corpus.train), seen + 2**20))
        seen += len(some)
        # Of several in a row, the last one begins a document that is not empty.
        is_token = some == cfg.document_token
        n = int(is_token.sum() - (is_token[1:] & is_token[:-1]).sum())
    if not n:
        return [
            f"token {cfg.document_token} is nowhere in the tokens to train on: nothing is hidden; "
            "give data of several documents, or another --document_token"
        ]
    return [
        f"hidden from each other; token {cfg.document_token} begins one, about every "
        f"{short(seen / n)} tokens"
    ]


def about_packing(cfg: Config, packed) -> list[str]:
    """Lines on what --pack has made of the documents, and has cut."""
    if cfg.pack is None:
        return []
    lost = {
        "from documents longer than a sequence": packed.rests,
        "to fill sequences": packed.filling,
        "left over": packed.left,
        "empty documents": packed.empty,
    }
    cut = sum(lost.values()) / packed.n_tokens
    # A share that shows as 0.0 % is no news.
    kinds = [f"{n / packed.n_tokens:.1%} {what}" for what, n in lost.items()]
    kinds = [kind for kind in kinds if not kind.startswith("0.0%")]
    text = (
        f"packed: {packed.n_documents:,} documents in {packed.per_epoch:,} sequences; "
        f"{cut:.1%} of the tokens are cut"
    )
    if kinds:
        text += ": " + ", ".join(kinds)
    lines = [text]
    if packed.rests > packed.n_tokens // 4:
        advice = "leave --pack= out"
        if packed.fitting <= packed.n_tokens // 100:  # enough for a hundred sequences
            advice = f"try --block_size={packed.fitting}, or {advice}"
        lines.append(f"block_size={cfg.block_size} is short for these documents: {advice}")
    return lines


def about_batch(cfg: Config, n_train: int) -> str:
    tokens = cfg.batch_size * cfg.block_size
    # After the ramp every step has the full batch.
    n_ramp = min(cfg.batch_ramp or 0, cfg.steps)
    total = (cfg.steps - n_ramp) * tokens
    for step in range(n_ramp):
        batch_size = schedules.batch_at(step, cfg.batch_size, cfg.batch_ramp_from, cfg.batch_ramp)
        total += batch_size * cfg.block_size
    ramp = ""
    if cfg.batch_ramp_from is not None:
        ramp = f" (at first {cfg.batch_ramp_from} x {cfg.block_size})"
    times = total / n_train
    by_heart = ""
    if times > 50 and cfg.patience is None:
        by_heart = " (it may learn it by heart: --patience=3 keeps the best weights)"
    return (
        f"{cfg.batch_size} x {cfg.block_size} = {tokens:,} tokens a step{ramp}, "
        f"in micro-batches of {cfg.micro_batch_size}; {cfg.steps:,} steps = {short(total)} tokens, "
        f"{times:.2g} times {'the text' if cfg.pack is None else 'what is packed'}{by_heart}"
    )


def about_optimizer(cfg: Config, lrs: dict[str, float]) -> str:
    kinds_of = {}  # lr -> the kinds of parameters that have it
    for kind, lr in lrs.items():
        kinds_of.setdefault(lr, []).append(kind)
    each = ", ".join(f"{lr:g} ({', '.join(kinds)})" for lr, kinds in kinds_of.items())
    if len(kinds_of) == 1:
        each = f"{lrs['matrix']:g}"
    clip = "not clipped" if cfg.grad_clip is None else f"clipped to norm {cfg.grad_clip:g}"
    wearing = "" if cfg.hooks is None else f" wearing {cfg.hooks.replace(',', ', ')}"
    decay = f"weight decay {cfg.weight_decay:g}"
    return f"{cfg.optim}{wearing}: lr {each}; {decay}; gradients {clip}"


def about_schedule(cfg: Config, lr_schedule: Callable[[int], float]) -> str:
    warmup = cfg.warmup_steps
    if warmup is None:
        warmup = round(cfg.warmup_frac * cfg.steps)
    text = f"{cfg.schedule}: {warmup} steps of warm-up"
    if schedules.takes(cfg.schedule, "decay"):
        own = {kind: getattr(cfg, name) for kind, name in DECAYS.items()}
        for kind, frac in {"": cfg.decay_frac, **own}.items():
            if frac is not None:
                n_decay = min(cfg.steps - warmup, round(frac * cfg.steps))
                text += f", {kind or 'decay'} from step {cfg.steps - n_decay} on"
    return f"{text}; the last step has {lr_schedule(cfg.steps - 1):.2g} x lr"


def about_precision(cfg: Config, hardware: str, why_emulated: str | None, is_alone: bool) -> str:
    text = f"{cfg.precision} on {hardware}"
    if cfg.compile != "off":
        text += f", compiled ({cfg.compile})"
    if cfg.device == "cpu" and "compile" not in cfg.given:
        n_steps = auto.steps_that_pay(cfg, cfg.precision, is_alone)
        if n_steps < math.inf:
            text += f"; compiling pays after about {math.ceil(n_steps):,} steps"
    if why_emulated is None:
        return text
    # On a CPU nobody asks which GPU would be needed.
    if cfg.device == "cpu" and not why_emulated.startswith("--"):
        return f"{text}. No FP8 hardware here: emulating it (same numbers, slower)."
    return f"{text}; FP8 is emulated, the same numbers, but slower ({why_emulated})"


def about_layout(cfg: Config, mesh: Mesh) -> str:
    if mesh.world == 1:
        return "1 process"
    axes = " x ".join(f"{axis} {n}" for axis, n in mesh.sizes.items() if n > 1)
    text = f"{mesh.world} ranks: {axes}"
    if mesh.groups["dp_cp"] is not None:
        text += f"; {cfg.data_parallel}"
    if cfg.ep > 1:
        text += f"; experts over {cfg.ep} of them"
    if cfg.sp:
        text += "; sp"
    if cfg.pp > 1:
        text += f"; pipeline {cfg.pp_schedule}"
    if cfg.compress is not None:
        text += f"; gradients compressed by {cfg.compress}"
    if cfg.diloco_every is not None:
        text += f"; DiLoCo, {cfg.diloco_every} steps a round"
    return text


def about_memory(cfg: Config) -> list[str]:
    """A line for each way in which memory is saved."""
    lines = []
    how = cfg.activation_checkpoint
    if how is not None and how != "none":
        verb = "kept in host memory" if how == "offload" else "computed again in backward"
        lines.append(f"activations of {cfg.n_layer} blocks are {verb} ({how})")
    if cfg.offload is not None:
        lines.append(f"optimizer state waits on the {where(cfg.offload)}")
    if cfg.offload_params is not None:
        lines.append(f"weights wait on the {where(cfg.offload_params)}")
    return lines


def where(place: str) -> str:
    return {"cpu": "host", "disk": "disk"}[place]


def about_guards(cfg: Config, monitor: dict) -> str:
    parts = [
        f"a spike: {cfg.on_spike or 'off'}",
        f"a loss that is not finite: {cfg.on_nonfinite or 'off'}",
    ]
    if "rollback" in (cfg.on_spike, cfg.on_nonfinite):
        ring = monitor.get("ring", 2)
        every = monitor.get("ring_every", 25)
        armed = f"{ring} snapshots in memory, one every {every} steps"
        parts.append(f"rollback is armed ({armed if ring else 'to checkpoints'})")
    parts.append(f"divergence: {cfg.on_divergence or 'off'}")
    if cfg.patience is not None:
        parts.append(f"stops after {cfg.patience} evaluations that are not better")
    return "; ".join(parts)


def about_saves(cfg: Config) -> str:
    evaluates = f"evaluates every {cfg.eval_every} steps" if cfg.eval_every else "never evaluates"
    saves = f"every {cfg.save_every} steps" if cfg.save_every else "at the end"
    return f"{evaluates}; saves {saves} in {cfg.out_dir}"


# ---- at the end ----------------------------------------------------------------------------------
def at_end(
    cfg: Config,
    mesh: Mesh,
    full_model: torch.nn.Module,
    step: int,
    seconds: float,
    was_aborted: bool,
    was_stopped: bool,
) -> list[str]:
    """The lines that close a run, from its metrics.jsonl: losses, cost, events, what to type next.

    step: steps done; seconds: of this process; was_aborted: by a monitor; was_stopped: by a signal,
    or aborted. Rank 0 alone calls it.
    """
    reason = None
    if was_aborted:
        reason = "the monitor ended it"
    elif was_stopped:
        reason = "a signal asked for it"
    elif step < cfg.steps:
        reason = f"patience={cfg.patience}: no better evaluation came"
    out_dir = Path(cfg.out_dir)
    # A run whose log somebody has deleted ends well all the same.
    rows = []
    if (out_dir / "metrics.jsonl").exists():
        rows = read_metrics(out_dir / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "val_loss" in row]
    parts = [("done" if reason is None else "stopped", about_cost(step, seconds, trained, reason))]
    if trained:
        parts.append(("loss", about_losses(trained, evaluated, cfg.patience)))
    if mesh.world > 1 and trained:
        n_params = sum(p.numel() for p in full_model.parameters())
        parts.append(("sent", about_messages(cfg, mesh, n_params, trained)))
    parts.append(("events", about_events(rows)))
    # After early stopping the same command would stop at once.
    continues = was_stopped and step < cfg.steps
    picture = "".join(f", {x}" for x in ("loss.png", "report.html") if (out_dir / x).exists())
    parts.append(("folder", f"{out_dir}: checkpoints, metrics.jsonl, train.log{picture}"))
    parts += [("next", command) for command in next_commands(cfg, continues)]
    return aligned(parts)


def about_cost(step: int, seconds: float, trained: list[dict], reason: str | None) -> str:
    text = f"{step:,} steps"
    if trained:
        recent = sorted(row["tokens_per_s"] for row in trained[-50:])
        text += (
            f" and {short(trained[-1]['tokens'])} tokens; {minutes(seconds)} here, "
            f"{short(recent[len(recent) // 2])} tokens/s"
        )
        peaks = [row["peak_bytes"] for row in trained if row["peak_bytes"] is not None]
        if peaks:  # Windows tells none
            text += f", {max(peaks) / 2**30:.2f} GiB at most"
    return text if reason is None else f"{text}; {reason}"


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def about_losses(trained: list[dict], evaluated: list[dict], patience: int | None) -> str:
    text = f"{number(trained[-1]['loss'])} at the end"
    if evaluated:
        last = evaluated[-1]
        # A stop may have skipped the last evaluation.
        place = "at the end" if last["step"] >= trained[-1]["step"] else f"at step {last['step']}"
        text += f"; validation {number(last['val_loss'])} {place}"
        if "val_loss_ema" in last:
            text += f", {number(last['val_loss_ema'])} the average"
    # With --ema= it is the average that is saved, and what patience counts.
    evaluated = [row | {"val_loss": row.get("val_loss_ema", row["val_loss"])} for row in evaluated]
    finite = [row for row in evaluated if row["val_loss"] is not None]
    if finite:
        best = min(finite, key=lambda row: row["val_loss"])
        text += f", {number(best['val_loss'])} at best (step {best['step']})"
        text += verdict(finite[0], best, finite[-1], patience)
    return text


def verdict(first: dict, best: dict, last: dict, patience: int | None) -> str:
    """What a validation loss that did not fall, or rose again, means; "" where it fell."""
    if last["step"] > first["step"] and best["val_loss"] > 0.98 * first["val_loss"]:
        return ": it learnt nothing; try a lower --lr"
    if last["val_loss"] > 1.05 * best["val_loss"] and patience is None:
        return ": it is worse since then; --patience=3 keeps the best weights"
    return ""


def number(loss: float | None) -> str:
    """A loss as metrics.jsonl has it: None where it was not finite."""
    return "not a number" if loss is None else loss_text(loss)


def about_messages(cfg: Config, mesh: Mesh, n_params: int, trained: list[dict]) -> str:
    sent = sum(row["sent_bytes"] for row in trained) / len(trained)
    text = f"{sent / 2**20:.3g} MiB a step and rank"
    saves = cfg.compress is not None or cfg.diloco_every is not None
    if saves and sent > 0:
        # What an all-reduce of all gradients in float32 would send.
        replicas = mesh.sizes["dp"] * mesh.sizes["cp"]
        plain = 2 * (replicas - 1) / replicas * 4 * n_params
        text += f"; ddp would send {plain / sent:.3g} times as much"
    return text


def about_events(rows: list[dict]) -> str:
    counts = Counter(row["event"] for row in rows if "event" in row)
    told = [f"{n} {event}" for event, n in counts.items() if event not in QUIET]
    return ", ".join(told) or "none"


def next_commands(cfg: Config, continues: bool) -> list[str]:
    """Two commands that a user may want now."""
    folder = shlex.quote(str(cfg.out_dir))
    commands = [f"python sample.py {folder}"]
    if not continues:
        commands.append(
            f"python -m metrics.plot {folder} OTHER_RUN    (both curves in one picture)"
        )
    else:
        commands.append("the same command again: it continues this run")
    return commands
