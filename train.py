"""Train a GPT. The whole run, top to bottom.

    python train.py                                     a small GPT on Python's own source, on a CPU
    python train.py configs/gpt2_124m.toml --lr=3e-4    a recipe, then fields that override it
    torchrun --standalone --nproc_per_node=2 train.py   the same run on two ranks

`python train.py --help` lists every field; docs/multinode.md has the commands for several machines.
The same command again continues the run where it stopped. Exit status: 0 done, or stopped by
SIGTERM or Ctrl-C after a checkpoint; 2 a user's mistake; 130 a Ctrl-C before the loop, or a second
one; 1 anything else.
"""

import functools
import gc
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # until all is imported: what modules make stays, and to look at it takes time

import torch

import schedules
from checkpoint.early_stopping import EarlyStopping
from checkpoint.save import Saver
from checkpoint.state import Disk, State, training_weights
from data.cursor import Cursor
from data.dataset import Dataset
from memory.activation_checkpoint import apply_activation_checkpointing
from memory.heap import keep_freed_memory
from metrics import experts, flops, outlets, plot, report
from metrics.logger import Logger, latest
from metrics.watch import Watch
from model import GPT, initial_weight
from monitor import Aborted
from optim import param_groups
from optim.attributes import attribute
from parallel import context, expert, launch, pipeline, sequence, tensor, watchdog
from parallel.mesh import make_mesh
from parallel.shard import Shard, sharded
from precision import amp, histogram, stochastic
from run import announce, auto, batch, build, control, optimizers, pretrained, resume, summary
from run.balance import Balance
from run.evaluate import evaluate, sample
from run.microbatches import MicroBatches
from run.options import resolve_options
from settings import fields, parse


def main(requested_cfg: fields.Config) -> dict:
    """One run, from its settings to its last metrics, which are returned.

    Uses the process group if there is one. Raises ValueError for a user's mistake.
    """
    started = time.perf_counter()

    # ---- ranks: which process this is, on which device, where in the grid (pp, dp, cp, tp) -------
    device = launch.pick_device(requested_cfg.device)
    made_group = launch.start(device, requested_cfg.timeout_minutes)
    sizes = (requested_cfg.tp, requested_cfg.cp, requested_cfg.pp, requested_cfg.ep)
    mesh = make_mesh(device, *sizes)
    is_main = mesh.rank == 0
    if device.type == "cpu":
        keep_freed_memory()  # or each step clears anew what the last one gave back
    torch.manual_seed(requested_cfg.seed)  # nothing here draws from it; what you add may

    # ---- the earlier run in this folder: its settings fill what the command line leaves open -----
    out_dir = Path(requested_cfg.out_dir)
    lock = control.RunLock(out_dir) if is_main else None
    # same_run: the checkpoint is out_dir's own, else this run is a branch.
    resumed_from, same_run = resume.find(out_dir, requested_cfg.resume, is_main, mesh.agree)
    debug_dir = out_dir / "debug" if requested_cfg.debug_ranks else None
    rank_log = watchdog.RankLog(debug_dir, mesh, requested_cfg.timeout_minutes)
    continued_cfg = resume.with_saved_settings(requested_cfg, resumed_from, same_run)
    if resumed_from is None:  # the weights of --init_from= bring their model's settings
        continued_cfg = pretrained.with_its_settings(continued_cfg)
    offloads = bool(continued_cfg.offload or continued_cfg.offload_params)
    leave = functools.partial(control.leave, mesh, lock, rank_log, made_group, offloads)
    step = 0  # steps done; parallel/watchdog.py reads it, and cfg, by name
    if resumed_from is not None:
        step = resumed_from.step
    owes_evaluation = resume.owes_evaluation(
        continued_cfg, resumed_from, same_run, is_main, mesh.agree
    )
    if resumed_from is not None and step >= continued_cfg.steps and not owes_evaluation:
        resume.report_finished(continued_cfg, step, same_run, is_main)
        leave()
        return latest(out_dir)

    # ---- settings: what `auto` and `none` stand for on this machine ------------------------------
    optimizer_class = optimizers.chosen(continued_cfg)
    has_replicas = mesh.groups["dp_cp"] is not None
    options = resolve_options(continued_cfg, optimizer_class)  # the dotted fields, by namespace
    auto_cfg = auto.resolve_auto(continued_cfg, device, optimizer_class, has_replicas)
    lr_schedule = build.lr_schedule(auto_cfg, options["schedule"])  # step -> factor of every lr

    # ---- data: the first process of each machine fills the cache ---------------------------------
    corpus = mesh.first_on_each_machine(functools.partial(build.corpus, auto_cfg))
    resume.check_same_data(auto_cfg, corpus, mesh, resumed_from, same_run)
    # Complete, but for the micro-batch size: from here on read cfg.
    cfg = auto.with_tokenizer(auto_cfg, corpus.tokenizer)
    train_data = build.training_data(cfg, corpus.train)
    val_data = Dataset(corpus.val, cfg.block_size, None, cfg.vocab_size)

    # ---- model: shapes alone; the layout decides which rank holds what ---------------------------
    precision = amp.PRECISIONS[cfg.precision]
    pipe = build.pipe(cfg, mesh)
    with torch.device("meta"):
        full_model = GPT(build.model_config(cfg))
        stage_layers = None if pipe is None else pipe.stage_layers
        model = GPT(full_model.config, stage_layers).to(precision.weights)
    # A weight is a function of its name and shape: the same start on every layout.
    if resumed_from is not None:
        weights = training_weights(resumed_from)
    elif cfg.init_from is not None:
        weights = pretrained.weights(cfg.init_from)
    else:
        weights = functools.partial(initial_weight, model.config)

    # ---- expert, tensor, sequence, context parallel: this rank's experts, shards, tokens ---------
    dispatched = [0]  # bytes that experts' rows have sent
    expert.split(model, mesh.groups["ep"], dispatched)
    split = sequence.split if cfg.sp else tensor.split
    tp_shards = {name: Shard(*where) for name, where in split(model, mesh.groups["tp"]).items()}
    context.split(model, mesh.groups["cp"], cfg.cp_attention)
    position_ids = context.position_ids(cfg.block_size, cfg.cp, mesh.coords["cp"], cfg.cp_attention)
    position_ids = position_ids.to(device)

    # ---- precision, activation checkpointing, compilation: how a block is computed ---------------
    build.set_loss(cfg, model, corpus.train)
    fp8_state = build.convert_linears(cfg, options["fp8"], model, device)
    expert_layers = dict.fromkeys(expert.layers_of(model), mesh.groups["expert_dp_cp"])
    loss_scaler = build.loss_scaler(cfg, options["scaler"])
    if pipe is not None and cfg.pp_schedule == "zerobubble":
        pipe.deferred = pipeline.defer_weight_gradients(model)
    apply_activation_checkpointing(model, cfg.activation_checkpoint or "none", mesh.groups["tp"])
    why_not_compiled = build.compile_model(cfg, options["compile"], model, device)

    # ---- data parallel: who holds which weights, gradients and state -----------------------------
    kinds = param_groups.kinds(full_model)  # name -> matrix, embedding, head or scalar
    replicas = build.data_parallel(
        cfg,
        options["diloco"] | options["compress"],
        mesh,
        tp_shards,
        build.stepped_by_rows(optimizer_class, kinds),
        expert.names_of(model),
    )
    model = replicas.parallelize(model)
    replicas.init_weights(sharded(weights, tp_shards))
    # Of experts: their loads, and the biases that keep these even.
    balance = Balance(model, mesh, cfg.moe_bias_lr)
    balance.init_weights(weights)
    hidden_format = build.hidden_states(cfg, has_replicas)
    micro_batches = MicroBatches(
        model, replicas, pipe, device, cfg.precision, position_ids, hidden_format
    )
    micro_batch_size = batch.micro_batch_size(cfg, micro_batches, train_data, mesh)

    # ---- optimizer -------------------------------------------------------------------------------
    param_groups.skip_compiler_import()  # saves a second
    lrs = build.learning_rates(cfg, optimizer_class, options["opt"], kinds)
    groups = param_groups.param_groups(
        model,
        lrs,
        cfg.weight_decay,
        attribute(optimizer_class, "matrices_only"),
        cfg.decay_embeddings,
    )
    make_optimizer, shards = build.optimizer_factory(cfg, mesh, tp_shards, optimizer_class)
    optimizer = replicas.make_optimizer(make_optimizer, groups, **options["opt"])
    # make_optimizer has filled `shards`: name -> the shard that the optimizer sees of a weight.
    shards |= {name: Shard(*where) for name, where in replicas.shards.items()}
    if param_groups.averages_weights(optimizer):
        optimizer.train()  # one set of weights to train, one to evaluate
    if precision.stochastic:
        optimizer = stochastic.stochastic(optimizer, cfg.seed, shards)
    if cfg.offload is not None:
        # From now on state comes to the device only to be stepped.
        optimizer = build.offloaded(cfg, mesh, optimizer)

    # ---- everything that a step depends on: a checkpoint holds it, a rollback restores it --------
    cursor = Cursor(corpus.sha256)
    in_background = cfg.async_save and not build.state_on_disk(cfg)
    saver = Saver(out_dir, cfg.save_every, cfg.save_hours, cfg.keep, cfg.keep_every, in_background)
    early_stopping = EarlyStopping(out_dir / "best", cfg.patience, cfg.min_delta, saver)
    divergence = build.divergence(cfg, corpus.train)
    scales = {"fp8": fp8_state, "scaler": loss_scaler}
    scales = {name: part for name, part in scales.items() if part is not None}
    kept = scales | {"progress": cursor, "best": early_stopping, "divergence": divergence}
    run_state = State(optimizer, replicas, balance, shards, tp_shards, mesh, kept)
    disk = Disk(out_dir, run_state, saver)
    undone = [*scales.values(), divergence, balance]  # by a rollback
    spike_monitor = build.spike_monitor(
        cfg, options["monitor"], model, optimizer, cursor, undone, disk
    )
    # run_state holds this dict: from here on the monitor is in every checkpoint too. It comes this
    # late because it may roll back to the disk, so to a run_state.
    kept["guard"] = spike_monitor
    # A branch starts early stopping and the monitors anew.
    if resumed_from is not None:
        run_state.load_state_dict(
            resumed_from, None if same_run else kept.keys() - {"best", "guard", "divergence"}
        )

    # ---- what this run is, for the user and for the record ---------------------------------------
    continues_log = resumed_from is not None and same_run
    if is_main and not continues_log:
        control.set_aside(out_dir)  # a fresh start deletes nothing
    final_cfg = fields.update(cfg, micro_batch_size=micro_batch_size)
    config = parse.to_dict(final_cfg)
    record = announce.environment(device, mesh.world, corpus.sha256)
    if corpus.tokenizer.file is not None:
        record["tokenizer"] = corpus.tokenizer.key
    logger = Logger(
        out_dir,
        cfg.steps,
        step,
        is_main,
        continues_log,
        cfg.tensorboard,
        cfg.wandb,
        config,
    )
    metadata = {}  # what a checkpoint says of the run that wrote it
    if is_main:
        metadata = {"config": config, "record": record}
        (out_dir / "config.toml").write_text(parse.to_toml(final_cfg, record), encoding="utf-8")
        corpus.tokenizer.save(out_dir)
    for line in announce.details(final_cfg, requested_cfg, mesh, record):
        logger.log(line, terminal=False)
    why_emulated = None if fp8_state is None else fp8_state.why_emulated
    lines = summary.at_start(
        final_cfg,
        mesh,
        corpus,
        train_data,
        full_model,
        lrs,
        lr_schedule,
        options,
        record["hardware"],
        why_emulated,
    )
    lines += corpus.tokenizer.warnings
    lines += announce.warnings(final_cfg, mesh, resumed_from, full_model)
    if why_not_compiled is not None:
        lines.append(why_not_compiled)
    for line in lines:
        logger.log(line)
    token_flops = flops.flops_per_token(
        flops.matmul_params(full_model),
        cfg.n_layer,
        cfg.n_head * fields.head_size(cfg),
        cfg.window or cfg.block_size,
    )
    peak_flops = cfg.peak_flops or flops.peak_flops(record["hardware"], precision.peak)

    # ---- the loop --------------------------------------------------------------------------------
    metrics = {"step": step}
    stop = control.StopSignal()
    # States up to this step are evaluated and saved already.
    settled_step = -1 if resumed_from is None else step
    is_overdue = False  # is a checkpoint due by the clock?
    if owes_evaluation:
        # A stop cut it off: evaluate now, then save again with early stopping's count.
        settled_step -= 1
        is_overdue = True
    evaluate_now = functools.partial(
        evaluate,
        micro_batches,
        val_data,
        cfg.eval_tokens,
        micro_batch_size,
        corpus.tokenizer,
        mesh,
        first=cfg.eval_rows == "first",
        stopped=functools.partial(stop.heard, mesh),
    )
    recorder = histogram.Recorder(model, out_dir, cfg.histogram_every)
    # It measures logits and updates, and clips q and k (--qk_clip).
    watch = Watch(
        mesh,
        model,
        optimizer,
        shards,
        run_state.deduplicate,
        cfg.watch_every,
        cfg.qk_clip,
        cfg.cp_attention,
        compiled=cfg.compile != "off",
    )
    loads = experts.Loads(out_dir, step, is_main)
    profiler = build.profiler(cfg, mesh, logger.log)
    while True:
        rank_log.step(step + 1)
        is_done = step >= cfg.steps
        state_is_new = step > settled_step

        # Evaluate, step 0 and the last one too; a branch also evaluates the state it starts from. A
        # stop skips the evaluation or cuts it off: evaluate() calls `heard`, then returns None.
        is_due = cfg.eval_every and (is_done or step % cfg.eval_every == 0)
        if is_due and (state_is_new or not same_run) and not stop.agreed:
            trained = None  # beside the average of --ema=, the weights that training goes on from
            if cfg.ema is not None and step > cfg.ema_from:
                with run_state.eval_weights(blend=False):
                    trained = evaluate_now()
            with run_state.eval_weights():
                found = evaluate_now()
                if found is not None:
                    weights_now = functools.partial(run_state.with_weights, metadata)
                    early_stopping.update(step, found["val_loss"], weights_now)
            if found is not None and trained is not None:
                found = trained | {"val_loss_ema": found["val_loss"]}
            if found is not None:
                metrics |= found
                logger.evaluation({"step": step} | found)
                # A run that stops early ends with its best weights, whatever became of the last.
                if not early_stopping.should_stop:
                    divergence.evaluated(step, found["val_loss"])
        logger.events(divergence.pop_events())
        stop.agreed = stop.agreed or divergence.sentence != ""
        is_done = is_done or early_stopping.should_stop
        if is_done and early_stopping.best_is_earlier:
            # For the sample, and as the checkpoint's model; the checkpoint has the last ones too.
            logger.log(run_state.restore_best(early_stopping.path))

        # Save now and then, at the end, and when somebody asks us to stop.
        if state_is_new and (is_done or stop.agreed or is_overdue or saver.due(step)):
            run_state.save(saver, step, metadata, last=is_done or stop.agreed)
        logger.events(early_stopping.pop_events())
        logger.events(saver.pop_events())
        if is_done or stop.agreed:
            break

        if profiler is not None:
            profiler.start(step + 1)

        # Forward and backward over this rank's samples (run/batch.py, run/microbatches.py). The
        # last micro-batch starts the replicas' sum. It is no mean: the loss of each is divided by
        # the tokens of all.
        spike_monitor.snapshot(step)
        began = time.perf_counter()
        batch_size = schedules.batch_at(step, cfg.batch_size, cfg.batch_ramp_from, cfg.batch_ramp)
        n_tokens = batch_size * cfg.block_size
        samples = cursor.next_samples(batch_size)
        loss_scale = 1.0 if loss_scaler is None else loss_scaler.scale
        recorder.start(step, loss_scale)
        watch.start(step)
        balance.begin(loss_scale / n_tokens)
        dispatched[0] = 0
        my_samples = batch.split(samples, mesh, micro_batch_size)  # one list a micro-batch
        loss_sum = micro_batches.forward_backward(my_samples, train_data, loss_scale / n_tokens)
        replicas.finish_gradients()
        balance.finish_counts()
        gradients = replicas.gradients()
        if pipe is not None:
            pipe.all_reduce_tied_grads(gradients)
        if loss_scaler is not None:
            loss_scaler.unscale(gradients)
        recorder.write(replicas.weights, gradients)

        # The gradient's norm before clipping. DiLoCo's replicas go apart: each has its own.
        has_one_norm = cfg.diloco_every is None
        grad_norm = run_state.norm(gradients, everywhere=has_one_norm)

        # One all-reduce for all that the ranks must agree on. The tp ranks hold the same loss: it
        # is counted once. Stages before the last hold 0. mean_norm is grad_norm, or with DiLoCo the
        # mean over the replicas: one number for all.
        loss = float(loss_sum) / n_tokens if mesh.coords["tp"] == 0 else 0.0
        loss, n_stop, n_overdue, mean_norm = mesh.sum(
            loss, stop.requested, saver.overdue(), float(grad_norm) / mesh.world
        )
        is_overdue = n_overdue > 0

        # The monitor sees loss and norm before the update. At a rollback, check() has put back the
        # weights, the optimizer and the cursor when it returns.
        verdict = spike_monitor.check(step, loss, mean_norm, samples)
        logger.events(spike_monitor.events)
        stop.agreed = n_stop > 0 or verdict == "abort"
        if verdict in ("skip", "abort"):
            replicas.discard_step()
        if verdict == "rollback":
            model.zero_grad(set_to_none=True)
            step = spike_monitor.back_at
            metrics["step"] = step
            # The checkpoint must know which samples are skipped from now on, or a restart would
            # read them again. Those of later steps never happened.
            run_state.save(saver, step, metadata)
            saver.drop_after(step)
            settled_step = min(settled_step, step - 1)  # later states are new again
        if verdict in ("rollback", "abort"):
            continue

        # "step" and "skip" go on: a skipped step counts and uses up its samples, without an update.
        cursor.next = samples[-1] + 1

        # Clip. A rank may own no gradient at all.
        norm = grad_norm
        if cfg.clip_value is not None:
            for gradient in gradients.values():
                gradient.clamp_(-cfg.clip_value, cfg.clip_value)
            norm = run_state.norm(gradients, everywhere=has_one_norm)
        max_norm = spike_monitor.max_norm(step, cfg.grad_clip)
        if max_norm is not None and gradients:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*gradients.values()], factor)

        # Step. Every group follows the schedule of its kind from its own peak lr.
        cut = spike_monitor.lr_factor(step)
        lr_factors = {kind: cut * lr_schedule(step, kind) for kind in lrs}
        schedules.follow(
            optimizer.param_groups,
            step,
            lr_factors,
            cfg.momentum_warmup,
            cfg.momentum_cooldown,
            cfg.steps,
        )
        if verdict == "step":
            if loss_scaler is None or loss_scaler.update(bool(grad_norm.isfinite())):
                optimizer.step()
                balance.step()
            else:
                replicas.discard_step()
                why = f"the gradients overflowed at a loss scale of {loss_scale:g}"
                logger.event(step + 1, "skip", why)
        if fp8_state is not None:
            # Also after a skipped step: its forward has moved the history of the scales.
            fp8_state.step(mesh.groups["dp_cp"], mesh.groups["tp"], expert_layers)
        model.zero_grad(set_to_none=True)
        step += 1
        divergence.update(step, loss)
        if profiler is not None:
            profiler.end(step)

        # Log. float() above has waited for the gradients; on a GPU the optimizer's own work falls
        # into the seconds of the next step.
        watched = watch.row(norm, max_norm)
        if watched:
            watched |= loads.row(step, *balance.loads(n_tokens))
        seconds = time.perf_counter() - began
        metrics |= {"step": step, "loss": loss}
        if watched or step % cfg.log_every == 0 or step == cfg.steps:
            tokens_per_s = n_tokens / seconds
            row = {
                "step": step,
                "loss": loss,
                "lr": lrs["matrix"] * lr_factors["matrix"],
                "grad_norm": float(grad_norm),
                "tokens": cursor.seen * cfg.block_size,
                "tokens_per_s": tokens_per_s,
                "mfu": flops.mfu(tokens_per_s / mesh.world, token_flops, peak_flops),
                "step_s": seconds,
                "peak_bytes": flops.peak_bytes(device),
                "sent_bytes": replicas.sent_bytes + param_groups.sent_bytes(optimizer),
            }
            row["sent_bytes"] += dispatched[0]
            if pipe is not None:
                row["sent_bytes"] += pipe.sent_bytes
                row["idle_s"] = pipe.idle_s
            logger.train(row | balance.row(n_tokens) | watched)

    # ---- the end: a sample of what the model writes, and the curve -------------------------------
    if profiler is not None:
        profiler.close()
    if is_done and cfg.sample_tokens:
        # On every rank: a forward may be a collective.
        with run_state.eval_weights(), build.uncompiled(cfg):
            text = sample(micro_batches, corpus.tokenizer, cfg.sample_tokens, cfg.seed)
        logger.log(f"---- a sample ----{text}\n------------------")
    if cfg.plot and is_done and is_main and step > 1:  # one point is no curve
        plot.plot(out_dir, out_dir / "loss.png")
        loads.draw()
    if cfg.report and is_main:
        report.write(out_dir, out_dir / "report.html")
    sentence = spike_monitor.sentence or divergence.sentence  # why a monitor ended the run
    if is_main:
        seconds = time.perf_counter() - started
        was_aborted = sentence != ""
        for line in summary.at_end(cfg, mesh, full_model, step, seconds, was_aborted, stop.agreed):
            logger.log(line)
    stop.close()
    logger.close()
    leave()
    if sentence:
        raise Aborted(sentence)
    return metrics


if __name__ == "__main__":
    # No collection needs to look at the modules again, the one at the end of the process included.
    gc.freeze()
    gc.enable()
    try:
        with outlets.reader_may_leave():  # of --help; a run goes on without readers
            main(parse.parse(sys.argv[1:]))
        launch.end()
    except ValueError as error:  # a user's mistake
        outlets.complain(f"train.py: {error}")
        launch.tell_torchrun(f"train.py: {error}")
        sys.exit(2)
    except (OSError, Aborted) as error:  # a full disk, a lost folder; the monitor
        outlets.complain(f"train.py: {error}")
        launch.tell_torchrun(f"train.py: {error}")
        sys.exit(1)
    except RuntimeError as error:  # another rank died, or is silent: a sentence; else as it came
        watchdog.leave(error)
    except KeyboardInterrupt:  # the loop has a handler of its own: before it, or the second one
        outlets.complain("train.py: interrupted; the same command resumes from what was saved")
        sys.exit(130)
