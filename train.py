"""Train a GPT. The whole run, top to bottom.

    python train.py                                          a small GPT on this Python's own source, on a CPU
    python train.py configs/gpt2_124m.toml --lr=3e-4         a recipe, then fields that override it
    torchrun --standalone --nproc_per_node=2 train.py        the same run on two ranks
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py

`python train.py --help` lists every field. The same command again goes on where the run stopped.
Exit status: 0 done, or stopped by SIGTERM or Ctrl-C after a checkpoint; 2 a user's mistake; 1
anything else.
"""

import contextlib
import functools
import shutil
import sys
import time
from pathlib import Path

import torch

import monitor as spikes
import schedules
from checkpoint import load, state
from checkpoint import save as saving
from checkpoint.early_stopping import Best
from data import corpora, dataset
from data.cursor import Position
from memory import activation_checkpoint
from metrics import flops as monitor
from metrics import logger, outlets, plot, watch
from model import GPT, GPTConfig, initial_weight
from optim import param_groups
from parallel import context, launch, pipeline, sequence, tensor, watchdog
from parallel import mesh as meshes
from precision import amp, histogram, stochastic
from run import announce, auto, build, control, evaluate, optimizers, resume
from run import batch as run_batch
from run.options import resolve_options
from settings import fields, parse


def main(cfg: fields.Config) -> dict:
    """One run, from its settings to its last metrics, which are returned.

    Uses the process group if there is one. Raises ValueError for a user's mistake.
    """
    # ---- ranks: who am I, and on which device ----------------------------------------------------
    device = launch.pick_device(cfg.device)
    made_group = launch.start(device, cfg.timeout_minutes)
    mesh = meshes.make_mesh(device, cfg.tp, cfg.cp, cfg.pp)
    is_main = mesh.rank == 0
    torch.manual_seed(cfg.seed)  # nothing below draws from it, but a fork of this file may

    # ---- the earlier run, if there is one: its settings fill what the command line leaves open ---
    out_dir, asked = Path(cfg.out_dir), cfg
    lock = control.RunLock(out_dir) if is_main else None
    earlier, in_place = resume.find(out_dir, cfg.resume, is_main, mesh.agree)
    diary = watchdog.Diary(
        out_dir / "debug" if cfg.debug_ranks else None, mesh, cfg.timeout_minutes
    )
    if earlier is not None:
        saved = earlier.tree("config")
        cfg = resume.continued(cfg, saved, branch=cfg.resume != "auto")
        cfg = fields.update(cfg, resume=saved["resume"]) if in_place else cfg
    step = first_step = earlier.step if earlier is not None else 0

    def leave(metrics: dict) -> dict:
        mesh.agree(0)  # nobody goes while another still works
        if is_main and (cfg.offload or cfg.offload_params):
            shutil.rmtree(out_dir / "offload", ignore_errors=True)
        diary.close()
        if lock is not None:
            lock.release()
        if made_group:
            torch.distributed.destroy_process_group()
        return metrics

    if earlier is not None and step >= cfg.steps:
        if not in_place:
            raise ValueError(f"a branch from step {step} needs more than --steps={cfg.steps}")
        if is_main:
            more = "type --steps= or --resume=never"
            outlets.print_line(f"the run in {out_dir} is finished at step {step}; {more}")
        return leave(logger.latest(out_dir))

    # ---- what auto and none stand for on this machine, and what the dotted fields must fit -------
    optimizer_class = optimizers.find_optimizer(cfg.optim)
    options = resolve_options(cfg, optimizer_class)
    cfg = auto.settled(cfg, device, optimizer_class, mesh.groups["replicas"] is not None)
    lr_factor = build.lr_schedule(cfg, options["schedule"])  # step -> what lr is multiplied by

    # ---- data ------------------------------------------------------------------------------------
    corpus = mesh.first_on_each_machine(
        lambda: corpora.load(cfg.data, cfg.tokenizer, cfg.data_dir, cfg.data_url, cfg.vocab_size)
    )
    if not mesh.alike(corpus.sha256):
        raise ValueError(
            f"--data={cfg.data} is not the same on every machine; copy it to all from one"
        )
    cfg = auto.with_vocabulary(cfg, corpus.tokenizer.n_vocab)
    train_rows = dataset.Rows(
        corpus.train, cfg.block_size, cfg.seed, cfg.vocab_size, ahead=cfg.batch_size
    )
    val_rows = dataset.Rows(corpus.val, cfg.block_size, None, cfg.vocab_size)

    if earlier is not None and (in_place or "data" not in cfg.given):
        if earlier.tree("record/data_sha256") != corpus.sha256:
            raise ValueError(
                f"--data={cfg.data} has changed since {earlier.path} was written, or is another "
                "text; give the one of then, or choose another --out_dir"
            )

    # ---- model: the same start on every layout ---------------------------------------------------
    group, pipe, dtype = mesh.groups["pp"], None, amp.PARAM_DTYPE[cfg.precision]
    if group is not None:
        pipe = pipeline.Pipeline(
            group, cfg.pp_schedule, cfg.n_layer, fields.model_chunks(cfg), device, cfg.tied
        )
    with torch.device("meta"):  # shapes alone; the layout decides what is held where
        whole = GPT(
            GPTConfig(**{name: getattr(cfg, name) for name in GPTConfig.__dataclass_fields__})
        )
        model = GPT(whole.config, None if pipe is None else pipe.layers).to(dtype)
    weights = functools.partial(initial_weight, model.config)  # by name and shape
    if earlier is not None:
        weights = state.training_weights(earlier)
    elif cfg.init_from is not None:
        weights = load.resolve(cfg.init_from).weights("model")

    # ---- tensor, sequence, context: the part of each matrix, and of each sequence, that is here --
    # By name, where it lies
    cuts = (sequence if cfg.sp else tensor).split(model, mesh.groups["tp"])
    context.split(model, mesh.groups["cp"], cfg.cp_attention)
    places = context.positions(cfg.block_size, cfg.cp, mesh.coords["cp"], cfg.cp_attention).to(
        device
    )

    # ---- how products are computed, and what backward computes again -----------------------------
    eights = build.products(cfg, options["fp8"], model, device, corpus.train)
    scaler = build.loss_scaler(cfg, options["scaler"])
    scales = {
        name: kept for name, kept in (("fp8", eights), ("scaler", scaler)) if kept is not None
    }
    if pipe is not None and cfg.pp_schedule == "zerobubble":
        pipe.deferred = pipeline.defer_weight_gradients(model)
    activation_checkpoint.keep_less(model, cfg.activation_checkpoint or "none", mesh.groups["tp"])
    uncompiled = build.compiled(cfg, options["compile"], model, device)  # why, or None

    def run(numbers: range | list[int], rows: dataset.Rows = train_rows, layers=None, x=None):
        """Forward on the rows with these numbers: the sum of the token losses, and the targets (B,
        T). In a pipeline through these layers, x being what the stage before gave."""
        tokens = rows(numbers)  # (B, T+1) int64
        tokens = (tokens.pin_memory() if device.type == "cuda" else tokens).to(
            device, non_blocking=True
        )
        inputs, targets = tokens[:, places], tokens[:, places + 1]
        which = torch.tensor(numbers, device=device) if cfg.dropout > 0 else None
        with amp.autocast(cfg.precision, device):
            return model(inputs if x is None else x, targets, places, which, layers), targets

    def hidden(n: int, length: int) -> tuple:
        """Shape, dtype and device of what the stages of a pipeline send each other of n
        sequences."""
        length //= cfg.tp if cfg.sp and model.training else 1
        own = cfg.param_dtype is None or mesh.groups["replicas"] is None
        return (n, length, cfg.n_embd), dtype if own else build.DTYPES[cfg.param_dtype], device

    def each(
        batches: list, rows: dataset.Rows, scale: float | None = None, look=None
    ) -> torch.Tensor | float:
        """Forward on micro-batches of row numbers, and backward of each loss times `scale`. look(i,
        loss, targets) sees each loss; their sum is returned, 0 where a pipeline's last stage is
        another rank's.
        """

        def part(i: int, layers=None, x=None) -> torch.Tensor:
            out, targets = run(batches[i], rows, layers, x)
            if look is not None and out.ndim == 0:  # hidden states are for the next stage
                look(i, out, targets)
            return out

        if pipe is not None:
            like = [hidden(len(numbers), len(places)) for numbers in batches]
            return sum(
                pipe.run(len(batches), part, like.__getitem__, scale, replicas.last_micro_batch)
            )
        total = 0.0
        for i in range(len(batches)):
            if scale is not None:
                replicas.last_micro_batch(i + 1 == len(batches))
            loss = part(i)
            if scale is not None:
                (loss * scale).backward()
            total = total + loss.detach()
        return total

    # ---- data parallel: who holds which weights, gradients and state -----------------------------
    replicas = build.data_parallel(cfg, options["diloco"] | options["compress"], mesh, cuts)
    model = replicas.wrap(model)
    replicas.fill(tensor.part_of(weights, cuts))
    share, size = run_batch.batch_share(cfg, mesh.sizes["dp"]), cfg.micro_batch_size
    if (
        size is None
        or share % size
        or (share // size % cfg.pp and "micro_batch_size" not in cfg.given)
    ):
        size = run_batch.largest_micro_batch(run, model, replicas, share, mesh)
        cfg = fields.update(cfg, micro_batch_size=size)
    if pipe is not None:
        pipe.plan(share // cfg.micro_batch_size, True)  # a schedule that cannot be shows now

    # ---- optimizer -------------------------------------------------------------------------------
    param_groups.without_compiler()
    lrs = build.learning_rates(cfg, optimizer_class, options["opt"], param_groups.kinds(whole))
    groups = param_groups.param_groups(
        model,
        lrs,
        cfg.weight_decay,
        optimizers.matrices_only(optimizer_class),
        cfg.decay_embeddings,
    )
    make_optimizer, boxes = build.stepper(cfg, mesh, cuts, optimizer_class)
    optimizer = replicas.make_optimizer(make_optimizer, groups, **options["opt"])
    boxes |= replicas.boxes  # by name, of what the optimizer has a part of: where it lies
    if hasattr(optimizer, "train"):
        optimizer.train()  # Schedule-Free keeps two sets of weights
    if cfg.precision == "bf16_sr":
        optimizer = stochastic.stochastic(optimizer, cfg.seed, boxes)
    if cfg.offload is not None:  # from now on state comes to the device only to be stepped
        optimizer = build.offloaded(cfg, mesh, optimizer)

    # ---- everything a step depends on, and what watches over it ----------------------------------
    place, best = Position(corpus.sha256), Best(out_dir / "best", cfg.patience, cfg.min_delta)
    kept = scales | {"progress": place, "best": best}  # by name, what can tree() and load()
    run_state = state.State(optimizer, replicas, boxes, cuts, mesh, kept)
    saver = saving.Saver(
        out_dir,
        cfg.save_every,
        cfg.save_hours,
        cfg.keep,
        cfg.keep_every,
        cfg.async_save and not build.state_on_disk(cfg),
    )
    disk = state.Disk(out_dir, run_state, saver)
    kept["guard"] = guard = build.spike_monitor(
        cfg, options["monitor"], model, optimizer, place, [*scales.values()], disk
    )
    if earlier is not None:
        run_state.load(earlier, None if in_place else [*scales, "progress"])

    # ---- what this run is, for the user and for the record ---------------------------------------
    if is_main and not (in_place and earlier is not None):
        control.set_aside(out_dir)  # a fresh start; nothing is lost
    log = logger.Logger(
        out_dir,
        cfg.steps,
        first_step,
        is_main,
        earlier is not None and in_place,
        cfg.tensorboard,
        cfg.wandb,
        parse.to_dict(cfg),
    )
    record = announce.environment(device, mesh.world, corpus.sha256)
    if is_main:
        (out_dir / "config.toml").write_text(parse.to_toml(cfg, record), encoding="utf-8")
    said = announce.lines(cfg, asked, mesh, record, corpus, whole, earlier)
    if eights is not None and eights.emulated:
        said.append(
            f"precision=fp8: emulated here, the same numbers, but slower ({eights.emulated})"
        )
    for line in filter(None, [*said, uncompiled]):
        log.say(line)
    seen = cfg.window or cfg.block_size
    flops = monitor.flops_per_token(monitor.matmul_params(whole), cfg.n_layer, cfg.n_embd, seen)
    peak = cfg.peak_flops or monitor.peak_flops(
        record["hardware"], cfg.precision.removesuffix("_sr")
    )
    about = {"config": parse.to_dict(cfg), "record": record} if is_main else {}

    def save(last: bool = False) -> None:
        with run_state.tree() as tree:
            saver.save(step, about | tree, last)

    # ---- the loop --------------------------------------------------------------------------------
    latest, stop, overdue = {"step": step}, control.StopSignal(), False
    recorder = histogram.Recorder(model, out_dir, cfg.histogram_every)
    watcher = watch.Watch(
        mesh,
        model,
        optimizer,
        boxes,
        run_state.counted,
        cfg.watch_every,
        cfg.qk_clip,
        cfg.cp_attention,
        cfg.compile != "off",
    )
    while True:
        diary.step(step + 1)
        # Look first: the untrained model is step 0, and the last step is seen too.
        done, news = step >= cfg.steps, step > first_step or earlier is None
        # Whoever asks us to stop waits for the checkpoint, not for an evaluation.
        due = cfg.eval_every and (done or step % cfg.eval_every == 0) and (news or not in_place)
        if due and not stop.agreed:
            with run_state.looking():
                found = evaluate.evaluate(
                    model,
                    each,
                    val_rows,
                    cfg.eval_tokens,
                    cfg.micro_batch_size,
                    corpus.tokenizer,
                    mesh,
                    cfg.eval_rows == "first",
                    stopped=lambda: stop.heard(mesh),
                )
                if found is not None:
                    latest |= found
                    best.look(
                        step, latest["val_loss"], lambda: about | {"model": run_state.weights()}
                    )
            if found is not None:
                log.evaluation({k: v for k, v in latest.items() if k != "loss"})
        if (done := done or best.over) and best.worse:
            log.say(run_state.take_best(best.path))

        # Nothing is lost: a checkpoint now and then, at the end, and when somebody asks us to stop.
        if news and (done or stop.agreed or overdue or saver.due(step)):
            save(last=done or stop.agreed)
        log.events(best.news() + saver.news())  # of the background too, a full disk for instance
        if done or stop.agreed:
            break

        # Accumulate my share of the next rows in micro-batches; the last one starts the sum over
        # replicas.
        guard.snapshot(step)
        began = time.perf_counter()
        batch = schedules.batch_at(step, cfg.batch_size, cfg.batch_ramp_from, cfg.batch_ramp)
        tokens, share = batch * cfg.block_size, batch // mesh.sizes["dp"]
        rows, first, size = place.rows(batch), mesh.coords["dp"] * share, cfg.micro_batch_size
        scale = scaler.scale if scaler is not None else 1.0
        recorder.start(step, scale)
        watcher.start(step)
        batches = [rows[i : i + size] for i in range(first, first + share, size)]
        loss = each(batches, train_rows, scale / tokens)
        replicas.finish_gradients()

        # The raw gradient's norm; one sum over all ranks brings the loss of the whole batch, and
        # word that somebody was told to stop. The guard looks at both before anything changes.
        gradients = replicas.gradients()
        if pipe is not None:
            pipe.share_tied(gradients)
        if scaler is not None:
            scaler.unscale(gradients)
        recorder.write(replicas.weights, gradients)
        grad_norm = norm = run_state.norm(gradients, cfg.diloco_every is None)
        loss = float(loss) / tokens * (mesh.coords["tp"] == 0)
        loss, stops, late, seen = mesh.sum(
            loss, stop.asked, saver.overdue(), float(grad_norm) / mesh.world
        )
        verdict, overdue = guard.check(step, loss, seen, rows), late > 0
        stop.agreed = stops > 0 or verdict == "abort"
        log.events(guard.events)
        if verdict in ("skip", "abort") and hasattr(replicas, "undo"):
            replicas.undo()  # what compression owes for these gradients
        if verdict == "rollback":
            model.zero_grad(set_to_none=True)
            latest["step"] = step = guard.back_at
            save()  # the ban too; what was saved since is of a past that is no more
            saver.drop_after(step)
        if verdict in ("rollback", "abort"):
            continue
        place.next = rows[-1] + 1

        # Clip; the logged norm is that before clipping.
        if cfg.clip_value is not None:
            for gradient in gradients.values():
                gradient.clamp_(-cfg.clip_value, cfg.clip_value)
            norm = run_state.norm(gradients, cfg.diloco_every is None)
        limit = guard.clip(step, cfg.grad_clip)
        if limit is not None and gradients:  # a rank may own none
            torch._foreach_mul_([*gradients.values()], (limit / (norm + 1e-6)).clamp(max=1.0))

        # Every group follows the schedule from an lr of its own.
        factor = lr_factor(step) * guard.lr(step)
        schedules.follow(optimizer.param_groups, step, factor, cfg.momentum_warmup)
        if verdict == "step" and (scaler is None or scaler.update(bool(grad_norm.isfinite()))):
            optimizer.step()
        elif verdict == "step":
            log.event(step + 1, "skip", f"the gradients overflowed at a loss scale of {scale:g}")
        if eights is not None:
            eights.step(mesh.groups["replicas"], mesh.groups["tp"])
        model.zero_grad(set_to_none=True)

        looked = watcher.row(norm, limit)
        step, seconds = step + 1, time.perf_counter() - began
        latest |= {"step": step, "loss": loss}
        if looked or step % cfg.log_every == 0 or step == cfg.steps:
            speed = tokens / seconds
            sent = (
                replicas.sent_bytes
                + getattr(optimizer, "sent_bytes", 0)
                + getattr(pipe, "sent_bytes", 0)
            )
            log.train(
                {
                    "step": step,
                    "loss": loss,
                    "lr": lrs["matrix"] * factor,
                    "grad_norm": float(grad_norm),
                    "tokens": place.seen * cfg.block_size,
                    "tokens_per_s": speed,
                    "mfu": monitor.mfu(speed / mesh.world, flops, peak),
                    "step_s": seconds,
                    "peak_bytes": monitor.peak_bytes(device),
                    "sent_bytes": sent,
                    # Of rank 0
                    **({"idle_s": pipe.idle_s} if pipe is not None else {}),
                    **looked,
                }
            )

    # ---- the end ---------------------------------------------------------------------------------
    if done and cfg.sample_tokens:  # on every rank: a forward may be a collective
        stages = pipe and functools.partial(pipe.through, model, hidden, cfg.vocab_size)
        eager = (
            contextlib.nullcontext()
            if cfg.compile == "off"
            else torch.compiler.set_stance("force_eager")
        )
        with run_state.looking(), eager:
            text = evaluate.sample(
                model, corpus.tokenizer, cfg.sample_tokens, cfg.seed, device, stages
            )
        log.say(f"---- a sample ----{text}\n------------------")
    if cfg.plot and done and is_main and step > 1:  # one point is no curve
        plot.plot(out_dir, out_dir / "loss.png")
    stop.close()
    log.close()
    leave(latest)
    if guard.sentence:
        raise spikes.Aborted(guard.sentence)
    return latest


if __name__ == "__main__":
    try:
        main(parse.parse(sys.argv[1:]))
        launch.end()
    except (
        ValueError,
        OSError,
        spikes.Aborted,
    ) as error:  # a mistake; a full disk, a lost folder; the guard
        outlets.complain(f"train.py: {error}")
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except RuntimeError as error:  # another rank died, or is silent: a sentence; else as it came
        watchdog.leave(error)
    except (
        KeyboardInterrupt
    ):  # before the loop, which has a handler of its own: nothing to lose yet
        sys.exit(130)
