"""Train a GPT. The whole run, top to bottom.

    python train.py                                          a small GPT on this Python's own source, on a CPU
    python train.py configs/gpt2_124m.toml --lr=3e-4         a recipe, then fields that override it
    torchrun --standalone --nproc_per_node=2 train.py        the same run on two ranks
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py

`python train.py --help` lists every field. The same command again goes on where the run stopped.
Exit status: 0 done, or stopped by SIGTERM or Ctrl-C after a checkpoint; 2 a user's mistake; 1 anything else.
"""

import contextlib
import functools
import shutil
import sys
import time
from pathlib import Path

import torch

import checkpoint
import choices
import config
import data
import evaluation
import logger
import monitor
import resume
import schedules
from memory import activation_checkpoint, offload
from model import GPT, GPTConfig, initial_weight
from optim import param_groups
from parallel import context, pipeline, sequence, tensor
from parallel import mesh as meshes
from precision import amp, histogram, stochastic


def main(cfg: config.Config) -> dict:
    """One run, from its settings to its last metrics, which are returned.

    Uses the process group if there is one. Raises ValueError for a user's mistake.
    """
    # ---- ranks: who am I, and on which device --------------------------------------------------------------
    device = meshes.pick_device(cfg.device)
    made_group = meshes.start(device)
    mesh = meshes.make_mesh(device, cfg.tp, cfg.cp, cfg.pp)
    is_main = mesh.rank == 0
    torch.manual_seed(cfg.seed)  # nothing below draws from it, but a fork of this file may

    # ---- the earlier run, if there is one: its settings fill what the command line leaves open ------------
    out_dir, asked = Path(cfg.out_dir), cfg
    lock = resume.RunLock(out_dir) if is_main else None
    earlier, in_place = resume.find(out_dir, cfg.resume, is_main, mesh.agree)
    if earlier is not None:
        saved = earlier.tree("config")
        cfg = resume.continued(cfg, saved, branch=cfg.resume != "auto")
        cfg = config.update(cfg, resume=saved["resume"]) if in_place else cfg
    step = first_step = earlier.step if earlier is not None else 0

    def leave(metrics: dict) -> dict:
        mesh.agree(0)  # nobody goes while another still works
        if is_main:
            shutil.rmtree(out_dir / "offload", ignore_errors=True)
        if lock is not None:
            lock.release()
        if made_group:
            torch.distributed.destroy_process_group()
        return metrics

    if earlier is not None and step >= cfg.steps:
        if not in_place:
            raise ValueError(f"a branch from step {step} needs more than --steps={cfg.steps}")
        if is_main:
            print(f"the run in {out_dir} is finished at step {step}; type --steps= or --resume=never")
        return leave(logger.latest(out_dir))

    # ---- what auto and none stand for on this machine, and what the dotted fields must fit ----------------
    optimizer_class = choices.find_optimizer(cfg.optim)
    cfg = choices.settled(cfg, device, optimizer_class)
    opt_options = config.check_options(cfg, "opt", optimizer_class, given=("params", "lr", "weight_decay"))
    lr_factor = choices.lr_schedule(cfg)  # step -> what every lr is multiplied by

    # ---- data ---------------------------------------------------------------------------------------------
    corpus = mesh.first_on_each_machine(
        lambda: data.load(cfg.data, cfg.tokenizer, cfg.data_dir, cfg.data_url, cfg.vocab_size)
    )
    cfg = choices.with_vocabulary(cfg, corpus.tokenizer.n_vocab)
    train_rows = data.Rows(corpus.train, cfg.block_size, cfg.seed, cfg.vocab_size)
    val_rows = data.Rows(corpus.val, cfg.block_size, None, cfg.vocab_size)

    if earlier is not None and (in_place or "data" not in cfg.given):
        if earlier.tree("record/data_sha256") != corpus.sha256:
            raise ValueError(f"--data={cfg.data} has changed since {earlier.path} was written")

    # ---- model: the same start on every layout ------------------------------------------------------------
    group, pipe = mesh.groups["pp"], None
    if group is not None:
        pipe = pipeline.Pipeline(group, cfg.pp_schedule, cfg.n_layer, config.chunks(cfg), device, cfg.tied)
    with torch.device("meta"):  # shapes alone; the layout decides what is held where
        whole = GPT(GPTConfig(**{name: getattr(cfg, name) for name in GPTConfig.__dataclass_fields__}))
        model = GPT(whole.config, None if pipe is None else pipe.layers)
    dtype = amp.PARAM_DTYPE[cfg.precision]
    model = model.to(dtype)
    weights = functools.partial(initial_weight, model.config)  # by name and shape
    if earlier is not None:
        weights = earlier.weights("training_weights" if earlier.has("training_weights") else "model")
    elif cfg.init_from is not None:
        weights = checkpoint.resolve(cfg.init_from).weights("model")

    # ---- tensor, sequence, context: the part of each matrix, and of each sequence, that is here -----------
    cuts = (sequence if cfg.sp else tensor).split(model, mesh.groups["tp"])  # by name, where it lies
    context.split(model, mesh.groups["cp"], cfg.cp_attention)
    places = context.positions(cfg.block_size, cfg.cp, mesh.coords["cp"], cfg.cp_attention).to(device)

    # ---- how products are computed, and what backward computes again --------------------------------------
    eights, scaler = choices.products(cfg, model, device), choices.loss_scaler(cfg)  # fp8's and fp16's
    scales = {name: kept for name, kept in (("fp8", eights), ("scaler", scaler)) if kept is not None}
    if pipe is not None and cfg.pp_schedule == "zerobubble":
        pipe.deferred = pipeline.defer_weight_gradients(model)
    activation_checkpoint.keep_less(model, cfg.activation_checkpoint or "none", mesh.groups["tp"])
    uncompiled = choices.compiled(cfg, model, device)  # why, or None

    def run(numbers: range | list[int], rows: data.Rows = train_rows, layers=None, x=None):
        """Forward on the rows with these numbers: the sum of the token losses, and the targets (B, T). In a
        pipeline through these layers, x being what the stage before gave."""
        tokens = rows(numbers)  # (B, T+1) int64
        tokens = (tokens.pin_memory() if device.type == "cuda" else tokens).to(device, non_blocking=True)
        inputs, targets = tokens[:, places], tokens[:, places + 1]
        which = torch.tensor(numbers, device=device) if cfg.dropout > 0 else None
        with amp.autocast(cfg.precision, device):
            return model(inputs if x is None else x, targets, places, which, layers), targets

    def hidden(n: int, length: int) -> tuple:
        """Shape, dtype and device of what the stages of a pipeline send each other of n sequences."""
        length //= cfg.tp if cfg.sp and model.training else 1
        own = cfg.param_dtype is None or mesh.groups["replicas"] is None
        return (n, length, cfg.n_embd), dtype if own else choices.DTYPES[cfg.param_dtype], device

    def each(batches: list, rows: data.Rows, scale: float | None = None, look=None) -> torch.Tensor | float:
        """Forward on micro-batches of row numbers, and backward of each loss times `scale`. look(i, loss,
        targets) sees each loss; their sum is returned, 0 where a pipeline's last stage is another rank's."""

        def part(i: int, layers=None, x=None) -> torch.Tensor:
            out, targets = run(batches[i], rows, layers, x)
            if look is not None and out.ndim == 0:  # hidden states are for the next stage
                look(i, out, targets)
            return out

        if pipe is not None:
            like = [hidden(len(numbers), len(places)) for numbers in batches]
            return sum(pipe.run(len(batches), part, like.__getitem__, scale, replicas.last_micro_batch))
        total = 0.0
        for i in range(len(batches)):
            if scale is not None:
                replicas.last_micro_batch(i + 1 == len(batches))
            loss = part(i)
            if scale is not None:
                (loss * scale).backward()
            total = total + loss.detach()
        return total

    # ---- data parallel: who holds which weights, gradients and state --------------------------------------
    replicas = choices.data_parallel(cfg, mesh, cuts)
    model = replicas.wrap(model)
    replicas.fill(tensor.part_of(weights, cuts))
    share, size = config.batch_share(cfg, mesh.sizes["dp"]), cfg.micro_batch_size
    if size is None or share % size or (share // size % cfg.pp and "micro_batch_size" not in cfg.given):
        size = choices.largest_micro_batch(run, model, replicas, share, mesh)
        cfg = config.update(cfg, micro_batch_size=size)
    if pipe is not None:
        pipe.plan(share // cfg.micro_batch_size, True)  # a schedule that cannot be shows now

    # ---- optimizer ----------------------------------------------------------------------------------------
    param_groups.without_compiler()
    lrs = choices.learning_rates(cfg, optimizer_class, opt_options, param_groups.kinds(whole))
    groups = param_groups.param_groups(model, lrs, cfg.weight_decay,
                                       choices.matrices_only(optimizer_class))
    make_optimizer, boxes = choices.stepper(cfg, mesh, cuts, optimizer_class)
    optimizer = replicas.make_optimizer(make_optimizer, groups, **opt_options)
    boxes |= replicas.boxes  # by name, of what the optimizer has a part of: where it lies
    for group in optimizer.param_groups:
        group["initial_lr"], group["initial_momentum"] = group["lr"], group.get("momentum")
    if hasattr(optimizer, "train"):
        optimizer.train()  # Schedule-Free keeps two sets of weights
    if cfg.precision == "bf16_sr":
        optimizer = stochastic.stochastic(optimizer, cfg.seed, boxes)
    if cfg.offload is not None:  # from now on state comes to the device only to be stepped
        where = torch.device("cpu") if cfg.offload_params else device
        folder = choices.offload_folder(cfg, mesh) / "state"
        optimizer = offload.offload(optimizer, cfg.offload, folder, where)
    at_anchor = getattr(replicas, "at_anchor", contextlib.nullcontext)  # DiLoCo looks at averaged weights

    # ---- resume: everything a step depends on -------------------------------------------------------------
    rows_seen, own = 0, {}
    if earlier is not None:
        if hasattr(replicas, "load"):
            own = replicas.load(lambda path: earlier.tree(f"replicas/{path}", missing={})) or {}

        def state_of(name: str, shape: tuple[int, ...]) -> dict:
            box = (*boxes[name], shape) if name in boxes else None
            return own.get(name) or earlier.tree(f"optim/state/{name}", box, missing={})

        param_groups.load_state_by_name(optimizer, earlier.tree("optim/groups"), state_of)
        rows_seen = earlier.tree("progress")["rows"]
        for name, kept in scales.items():
            kept.load(earlier.tree(name, missing={}))
        rng = earlier.tree("rng")
        torch.set_rng_state(rng.get(str(mesh.rank), rng["0"]))

    # ---- what this run is, for the user and for the record ------------------------------------------------
    if is_main and not (in_place and earlier is not None):
        resume.set_aside(out_dir)  # a fresh start; nothing is lost
    log = logger.Logger(out_dir, cfg.steps, first_step, is_main, earlier is not None and in_place,
                        cfg.tensorboard, cfg.wandb, config.to_dict(cfg))  # fmt: skip
    record = logger.environment(device, mesh.world, corpus.sha256)
    if is_main:
        (out_dir / "config.toml").write_text(config.to_toml(cfg, record), encoding="utf-8")
    log.say(f"commit {record['commit']}, torch {record['torch']}, {record['hardware']}, {mesh.world} rank(s)")
    log.say(f"{corpus.name}: {len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out")
    log.say(f"{cfg.arch}: {sum(p.numel() for p in whole.parameters()):,} parameters; a step is "
            f"{cfg.batch_size} x {cfg.block_size} tokens, in micro-batches of {cfg.micro_batch_size}")
    notes = [uncompiled, eights and eights.emulated, choices.chosen(cfg, asked)]
    for line in filter(None, mesh.table() + choices.remarks(cfg, mesh, earlier) + notes):
        log.say(line)
    flops = monitor.flops_per_token(monitor.matmul_params(whole), cfg.n_layer, cfg.n_embd, cfg.block_size)
    peak = cfg.peak_flops or monitor.peak_flops(record["hardware"], cfg.precision.removesuffix("_sr"))

    def counted(gradients: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Of the gradients on this rank those of which no other rank brings the same numbers."""
        tied_copy = {"embed.weight"} if mesh.coords["pp"] > 0 else {}
        cut = cuts if mesh.coords["tp"] > 0 else gradients
        return [g for n, g in gradients.items() if replicas.counts and n in cut and n not in tied_copy]

    def save() -> None:
        state = param_groups.state_by_name(optimizer)
        state["state"] = checkpoint.boxed(state["state"], boxes)
        tree = {"rng": {str(mesh.rank): torch.get_rng_state()}, "optim": state if replicas.counts else {}}
        if hasattr(replicas, "tree"):
            tree["replicas"] = replicas.tree(state["state"])
        if is_main:
            tree |= {"config": config.to_dict(cfg), "progress": {"rows": rows_seen}, "record": record}
        tree |= {name: kept.tree() for name, kept in scales.items()}
        with param_groups.evaluation_weights(optimizer, replicas.share_weights) as training_weights:
            tree |= {"model": checkpoint.boxed(replicas.weights(), tensor.boxes(cuts))}
            if training_weights and replicas.counts:
                tree |= {"training_weights": checkpoint.boxed(training_weights, boxes)}
            checkpoint.save(out_dir, step, tree, cfg.keep)
        log.event(step, "save")

    # ---- the loop -----------------------------------------------------------------------------------------
    latest, stop = {"step": step}, resume.StopSignal()
    recorder = histogram.Recorder(model, out_dir, cfg.histogram_every)
    while True:
        # Look first: the untrained model is step 0, and the last step is seen too.
        done, news = step >= cfg.steps, step > first_step or earlier is None
        if cfg.eval_every and (done or step % cfg.eval_every == 0) and (news or not in_place):
            with param_groups.evaluation_weights(optimizer, replicas.share_weights), at_anchor():
                latest |= evaluation.evaluate(model, each, val_rows, cfg.eval_tokens, cfg.micro_batch_size,
                                              corpus.tokenizer, mesh)  # fmt: skip
            log.evaluation({k: v for k, v in latest.items() if k != "loss"})

        # Nothing is lost: a checkpoint now and then, at the end, and when somebody asks us to stop.
        if news and (done or stop.agreed or (cfg.save_every and step and step % cfg.save_every == 0)):
            save()
        if done or stop.agreed:
            break

        # Accumulate my share of the next rows in micro-batches; the last one starts the sum over replicas.
        began = time.perf_counter()
        batch = schedules.batch_at(step, cfg.batch_size, cfg.batch_ramp_from, cfg.batch_ramp)
        tokens, share = batch * cfg.block_size, batch // mesh.sizes["dp"]
        first, size = rows_seen + mesh.coords["dp"] * share, cfg.micro_batch_size
        scale = scaler.scale if scaler is not None else 1.0
        recorder.start(step, scale)
        batches = [range(i, i + size) for i in range(first, first + share, size)]
        loss = each(batches, train_rows, scale / tokens)
        replicas.finish_gradients()
        rows_seen += batch

        # Clip what is raw; the logged norm is that before clipping.
        gradients = replicas.gradients()
        if pipe is not None:
            pipe.share_tied(gradients)
        if scaler is not None:
            scaler.unscale(gradients)
        recorder.write(replicas.weights, gradients)
        grad_norm = norm = mesh.norm(counted(gradients), cfg.diloco_every is None)
        if cfg.clip_value is not None:
            for gradient in gradients.values():
                gradient.clamp_(-cfg.clip_value, cfg.clip_value)
            norm = mesh.norm(counted(gradients), cfg.diloco_every is None)
        if cfg.grad_clip is not None and gradients:  # a rank may own none
            torch._foreach_mul_([*gradients.values()], (cfg.grad_clip / (norm + 1e-6)).clamp(max=1.0))

        # Every group follows the schedule from an lr of its own.
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(step)
            if cfg.momentum_warmup is not None:
                end = group["initial_momentum"]
                group["momentum"] = schedules.momentum_at(step, cfg.momentum_warmup, 0.85, end)
        if scaler is None or scaler.update(bool(grad_norm.isfinite())):
            optimizer.step()
        else:
            log.event(step + 1, "skip", f"the gradients overflowed at a loss scale of {scale:g}")
        if eights is not None:
            eights.step(mesh.groups["replicas"], mesh.groups["tp"])
        model.zero_grad(set_to_none=True)

        # One sum over all ranks brings the loss of the whole batch, and word that somebody was told to stop.
        loss, stops = mesh.sum(float(loss) / tokens * (mesh.coords["tp"] == 0), stop.asked)
        stop.agreed, seconds = stops > 0, time.perf_counter() - began
        step += 1
        latest |= {"step": step, "loss": loss}
        if step % cfg.log_every == 0 or step == cfg.steps:
            speed = tokens / seconds
            sent = replicas.sent_bytes + getattr(optimizer, "sent_bytes", 0) + getattr(pipe, "sent_bytes", 0)
            log.train({"step": step, "loss": loss, "lr": lrs["matrix"] * lr_factor(step - 1),
                       "grad_norm": float(grad_norm), "tokens": rows_seen * cfg.block_size,
                       "tokens_per_s": speed, "mfu": monitor.mfu(speed / mesh.world, flops, peak),
                       "step_s": seconds, "peak_bytes": monitor.peak_bytes(device), "sent_bytes": sent,
                       **({"idle_s": pipe.idle_s} if pipe is not None else {})})  # of rank 0

    # ---- the end ------------------------------------------------------------------------------------------
    if done and cfg.sample_tokens:  # on every rank: a forward may be a collective
        prompt = torch.from_numpy(corpus.tokenizer.encode("\n")).to(device)[None]
        prompt = prompt if prompt.numel() else prompt.new_zeros(1, 1)  # shards of an unknown tokenizer
        stages = pipe and functools.partial(pipe.through, model, hidden, cfg.vocab_size)
        eager = contextlib.nullcontext() if cfg.compile == "off" else torch.compiler.set_stance("force_eager")
        with param_groups.evaluation_weights(optimizer, replicas.share_weights), at_anchor(), eager:
            ids = model.eval().generate(prompt, cfg.sample_tokens, 0.8, 50, cfg.seed, stages)
        log.say(f"---- a sample ----{corpus.tokenizer.decode(ids[0].tolist())}\n------------------")
    if done and is_main and step > 1:  # one point is no curve
        logger.plot(out_dir, out_dir / "loss.png")
    stop.restore()
    log.close()
    return leave(latest)


if __name__ == "__main__":
    try:
        main(config.parse(sys.argv[1:]))
        meshes.end()
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that went away
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:  # before the loop, which has a handler of its own: nothing to lose yet
        sys.exit(130)
