"""Train a GPT. The whole run, top to bottom.

    python train.py                                              a small GPT on this Python's own source, minutes on a CPU
    python train.py configs/gpt2_124m.toml --optim=adamw         a recipe, then fields that override it
    torchrun --standalone --nproc_per_node=2 train.py            the same run on two ranks
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py      on two nodes

`python train.py --help` lists every field. The same command again continues where the run stopped.
Exit status: 0 done, or stopped by SIGTERM or Ctrl-C after a checkpoint; 2 a mistake of the user's; 1 anything else.
"""

import importlib
import inspect
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

import checkpoint
import config
import data
import logger
import monitor
import schedules
from model import GPT, GPTConfig, init_weights
from optim import param_groups
from parallel import mesh as meshes
from parallel.ddp import DDP
from precision import amp


def main(cfg: config.Config) -> dict:
    """One run from its settings to its last evaluation, which is returned. Uses an existing process group, if any.

    Raises ValueError for a user's mistake.
    """
    # ---- ranks: who am I, and on which device -----------------------------------------------------------------------
    device = meshes.pick_device(cfg.device)
    made_group = meshes.start(device)
    mesh = meshes.make_mesh(device)
    is_main = mesh.rank == 0
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)

    # ---- the earlier run, if there is one: its settings fill what the command line leaves open -----------------------
    out_dir, asked = Path(cfg.out_dir), cfg
    lock = checkpoint.RunLock(out_dir) if is_main else None
    earlier, in_place = checkpoint.find(cfg.out_dir, cfg.resume, mesh.agree, is_main)
    if earlier is not None:
        cfg = config.continued(cfg, earlier.tree("config"), branch=cfg.resume != "auto")
    step = first_step = earlier.step if earlier is not None else 0

    # ---- what auto and none stand for on this machine ----------------------------------------------------------------
    optimizer_class = find_optimizer(cfg.optim)
    cfg = config.with_traits(cfg)
    cfg = config.update(cfg, device=str(device), precision=amp.choose(cfg.precision, device))
    cfg = config.update(cfg, schedule="wsd" if cfg.schedule == "auto" else cfg.schedule)
    cfg = with_learning_rates(cfg, optimizer_class)
    opt_options = config.check_options(cfg, "opt", optimizer_class, given=("params", "lr", "weight_decay"))
    schedule_options = config.check_options(cfg, "schedule", schedules.SHAPES[cfg.schedule], given=("x", "minimum", "decay"))
    warmup = round(cfg.warmup_frac * cfg.steps) if cfg.warmup_steps is None else cfg.warmup_steps
    schedules.multiplier(cfg.schedule, cfg.steps, cfg.steps, 0, cfg.min_lr_frac, cfg.decay_frac, **schedule_options)

    # ---- data: one process per machine prepares it, then all open it -------------------------------------------------
    corpus = None
    for turn in (True, False):
        if turn == (int(os.environ.get("LOCAL_RANK", mesh.rank)) == 0):
            corpus = data.load(cfg.data, cfg.tokenizer, cfg.data_dir, cfg.data_url, cfg.vocab_size)
        mesh.agree(0)
    cfg = config.update(cfg, vocab_size=cfg.vocab_size or -(-corpus.tokenizer.n_vocab // 64) * 64)
    train_rows = data.Rows(corpus.train, cfg.block_size, cfg.seed, cfg.vocab_size)
    val_rows = data.Rows(corpus.val, cfg.block_size, None, cfg.vocab_size)

    # ---- model: the same start on every layout -----------------------------------------------------------------------
    shape = GPTConfig(**{name: getattr(cfg, name) for name in GPTConfig.__dataclass_fields__})
    model = init_weights(GPT(shape).to(device=device, dtype=amp.PARAM_DTYPE[cfg.precision]))
    if cfg.init_from is not None and earlier is None:
        load_weights(model, checkpoint.resolve(cfg.init_from))

    def run(numbers: list[int], rows: data.Rows = train_rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward on the rows with these numbers: the sum of the token losses, and the targets (B, T)."""
        tokens = rows(numbers)  # (B, T+1) int64
        if device.type == "cuda":
            tokens = tokens.pin_memory()
        tokens = tokens.to(device, non_blocking=True)
        where = torch.tensor(numbers, device=device) if cfg.dropout > 0 else None
        with amp.autocast(cfg.precision, device):
            return model(tokens[:, :-1], tokens[:, 1:], rows=where), tokens[:, 1:]

    # ---- data parallel: who adds which gradients to whose -------------------------------------------------------------
    replicas = dict(ddp=DDP)[cfg.data_parallel](mesh.groups["dp"], cfg.bucket_mb)
    model = replicas.wrap(model)
    share = batch_share(cfg, mesh)
    if cfg.micro_batch_size is None or share % cfg.micro_batch_size:
        cfg = config.update(cfg, micro_batch_size=largest_micro_batch(run, model, replicas, share, mesh))
    accumulation = share // cfg.micro_batch_size

    # ---- optimizer ----------------------------------------------------------------------------------------------------
    lrs = dict(matrix=cfg.lr, embedding=cfg.embed_lr, head=cfg.head_lr, scalar=cfg.scalar_lr)
    groups = param_groups.param_groups(model, lrs, cfg.weight_decay, muon=optimizer_class.__name__ == "Muon")
    optimizer = replicas.make_optimizer(optimizer_class, groups, **opt_options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]

    # ---- resume: everything a step depends on --------------------------------------------------------------------------
    rows_seen = 0
    if earlier is not None:
        load_weights(model, earlier)
        param_groups.load_state_by_name(optimizer, earlier.tree("optim"))
        rows_seen = earlier.tree("progress")["rows"]
        rng = earlier.tree("rng")
        torch.set_rng_state(rng.get(str(mesh.rank), rng["0"]))

    # ---- what this run is, for the user and for the record -------------------------------------------------------------
    log = logger.Logger(out_dir, cfg.steps, first_step, is_main, resumed=earlier is not None and in_place)
    record = logger.environment(device, mesh.world, corpus.sha256)
    if is_main:
        (out_dir / "config.toml").write_text(config.to_toml(cfg, record), encoding="utf-8")
    log.say(f"nanoscale {record['commit']}, torch {torch.__version__}, {record['hardware']}, {mesh.world} process(es)")
    log.say(f"{corpus.name}: {len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out, {corpus.sha256[:12]}")
    log.say(f"{sum(p.numel() for p in model.parameters()):,} parameters; a step is {cfg.batch_size} x {cfg.block_size} tokens"
            f" in {accumulation} micro-batch(es) of {cfg.micro_batch_size} on each of {mesh.sizes['dp']} replica(s)")  # fmt: skip
    chosen = {name: getattr(cfg, name) for name in config.FIELDS if getattr(cfg, name) != getattr(asked, name)}
    log.say("chosen: " + " ".join(f"{name}={value}" for name, value in chosen.items()))
    flops = monitor.flops_per_token(monitor.matmul_params(model), cfg.n_layer, cfg.n_embd, cfg.block_size)
    peak = cfg.peak_flops or monitor.peak_flops(record["hardware"], cfg.precision)

    def evaluate() -> dict:
        """Losses over the fixed held-out rows, spread evenly over the validation set, shared among the replicas."""
        count = max(1, min(cfg.eval_tokens // cfg.block_size, val_rows.per_epoch))
        mine = [i * val_rows.per_epoch // count for i in range(mesh.coords["dp"], count, mesh.sizes["dp"])]
        widths, loss, hits, tokens, n_bytes = corpus.tokenizer.byte_lengths(), 0.0, 0, 0, 0
        model.eval()
        with torch.no_grad():
            for i in range(0, len(mine), cfg.micro_batch_size):
                total, targets = run(mine[i : i + cfg.micro_batch_size], val_rows)
                loss, hits, tokens = loss + total.item(), hits + model.hits.item(), tokens + targets.numel()
                n_bytes += int(widths[targets.cpu().numpy()].sum()) if widths is not None else 0
        model.train()
        loss, hits, tokens, n_bytes = mesh.sum(loss, hits, tokens, n_bytes)
        return dict(val_loss=loss / tokens, val_bpb=loss / math.log(2) / n_bytes if n_bytes else None,
                    val_accuracy=hits / tokens, perplexity=math.exp(min(loss / tokens, 700)))  # fmt: skip

    def save() -> None:
        tree = dict(rng={str(mesh.rank): torch.get_rng_state()})
        if mesh.coords["dp"] == 0:
            tree |= dict(model=dict(model.named_parameters()), optim=param_groups.state_by_name(optimizer), config=config.to_dict(cfg),
                         progress=dict(rows=rows_seen, tokens=step * tokens_per_step), record=record)  # fmt: skip
        checkpoint.save(out_dir, step, tree, cfg.keep)
        log.event(step, "save")

    # ---- the loop ------------------------------------------------------------------------------------------------------
    params = [p for p in model.parameters() if p.requires_grad]
    tokens_per_step = cfg.batch_size * cfg.block_size
    latest, stop = {"step": step}, StopSignal()
    while True:
        # Look before leaping: the untrained model is step 0, and the last step is seen too.
        done, news = step >= cfg.steps, step > first_step or earlier is None
        if cfg.eval_every and (done or step % cfg.eval_every == 0) and (news or not in_place):
            latest |= {"step": step} | evaluate()
            log.evaluation({k: v for k, v in latest.items() if k != "loss"})

        # Nothing is lost: a checkpoint now and then, at the end, and when somebody asks us to stop.
        if news and (done or stop.agreed or (cfg.save_every and step and step % cfg.save_every == 0)):
            save()
        if done or stop.agreed:
            break

        # Accumulate: my share of the next rows, in micro-batches; the last one starts the sum over replicas.
        began, loss = time.perf_counter(), 0.0
        for i in range(accumulation):
            replicas.last_micro_batch(i == accumulation - 1)
            start = rows_seen + mesh.coords["dp"] * share + i * cfg.micro_batch_size
            total, _ = run(list(range(start, start + cfg.micro_batch_size)))
            (total / tokens_per_step).backward()
            loss = loss + total.detach()
        replicas.finish_gradients()
        rows_seen += cfg.batch_size

        # Clip what is raw: the logged norm is before clipping.
        grads = [p.grad for p in params if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(grads)
        if cfg.clip_value is not None:
            torch.nn.utils.clip_grad_value_(params, cfg.clip_value)
        if cfg.grad_clip is not None:
            norm = grad_norm if cfg.clip_value is None else torch.nn.utils.get_total_norm(grads)
            torch.nn.utils.clip_grads_with_norm_(params, cfg.grad_clip, norm)

        # Every group follows the schedule from its own initial lr.
        factor = schedules.multiplier(cfg.schedule, step, cfg.steps, warmup, cfg.min_lr_frac, cfg.decay_frac, **schedule_options)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # One sum over all ranks brings the loss of the global batch, and whether anybody was told to stop.
        loss, stops = mesh.sum(float(loss) / tokens_per_step, stop.asked)
        stop.agreed = stops > 0
        latest |= dict(step=step, loss=loss)
        seconds = time.perf_counter() - began
        if step % cfg.log_every == 0 or step == cfg.steps:
            speed = tokens_per_step / seconds
            log.train(dict(step=step, loss=loss, lr=cfg.lr * factor, grad_norm=float(grad_norm), tokens=step * tokens_per_step,
                           tokens_per_s=speed, mfu=monitor.mfu(speed / mesh.world, flops, peak), step_s=seconds,
                           peak_bytes=monitor.peak_bytes(device)))  # fmt: skip

    # ---- the end -------------------------------------------------------------------------------------------------------
    if step == first_step and earlier is not None:
        log.say(f"the run in {out_dir} is finished at step {step}; --steps= to go on, --resume=never to start anew")
    elif done and is_main:
        if cfg.sample_tokens:
            prompt = torch.from_numpy(corpus.tokenizer.encode("\n")).to(device)[None]
            ids = model.eval().generate(prompt, cfg.sample_tokens, temperature=0.8, top_k=50, seed=cfg.seed)
            log.say(f"---- a sample ----{corpus.tokenizer.decode(ids[0].tolist())}\n------------------")
        logger.plot(out_dir, out_dir / "loss.png")
    stop.restore()
    log.close()
    mesh.agree(0)
    if lock is not None:
        lock.release()
    if made_group:
        torch.distributed.destroy_process_group()
    return latest


# ---- the steps of main that have a name ----------------------------------------------------------------------------------
def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class for `file` (its first) or `file.Class` in optim/. Raises ValueError with the nearest name."""
    file, _, wanted = name.partition(".")
    files = sorted(p.stem for p in (Path(__file__).parent / "optim").glob("*.py") if p.stem not in ("param_groups", "mup"))
    if file not in files:
        raise ValueError(f"--optim={name}: there is no optim/{file}.py; {config.nearest(file, files)}")
    module = importlib.import_module(f"optim.{file}")
    classes = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)
               and c.__module__ == module.__name__}  # fmt: skip
    if wanted and wanted not in classes:
        raise ValueError(f"--optim={name}: optim/{file}.py has no {wanted}; {config.nearest(wanted, list(classes))}")
    return classes[wanted] if wanted else next(iter(classes.values()))


def with_learning_rates(cfg: config.Config, optimizer_class: type) -> config.Config:
    """Each lr and the weight decay that were left to the optimizer, as numbers."""
    default = inspect.signature(optimizer_class).parameters
    lr = default["lr"].default if cfg.lr is None else cfg.lr
    decay = default["weight_decay"].default if cfg.weight_decay is None else cfg.weight_decay
    other = 0.01 if optimizer_class.__name__ == "Muon" else lr  # Muon moves all but the matrices by AdamW
    own = {name: other if getattr(cfg, name) is None else getattr(cfg, name) for name in ("embed_lr", "head_lr", "scalar_lr")}
    return config.update(cfg, lr=lr, weight_decay=decay, **own)


def batch_share(cfg: config.Config, mesh: meshes.Mesh) -> int:
    """Sequences of each step that one replica computes. Raises ValueError if they or the micro-batches do not come out even."""
    dp = mesh.sizes["dp"]
    if cfg.batch_size % dp:
        raise ValueError(f"batch_size={cfg.batch_size} does not divide among {dp} replicas; for instance --batch_size={-(-cfg.batch_size // dp) * dp}")
    share = cfg.batch_size // dp
    if "micro_batch_size" in cfg.given and cfg.micro_batch_size and share % cfg.micro_batch_size:
        fits = max(m for m in range(1, min(share, cfg.micro_batch_size) + 1) if share % m == 0)
        raise ValueError(f"micro_batch_size={cfg.micro_batch_size} does not divide the {share} sequences of each rank "
                         f"(batch_size={cfg.batch_size} on {dp}); for instance --micro_batch_size={fits}")  # fmt: skip
    return share


def largest_micro_batch(run, model, replicas: DDP, share: int, mesh: meshes.Mesh) -> int:
    """The whole share on a CPU; on a GPU halved, on all ranks together, until forward and backward fit in memory."""
    size = share
    while mesh.device.type == "cuda":
        replicas.last_micro_batch(False)
        try:
            run(list(range(size)))[0].backward()
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if mesh.sum(not fits)[0] == 0:
            break
        if size % 2:
            raise ValueError(f"out of memory with micro_batch_size={size}; a smaller model, --block_size or --precision=bf16 "
                             "need less, or an even --batch_size lets it be halved")  # fmt: skip
        size //= 2
    return size


def load_weights(model: torch.nn.Module, saved: checkpoint.Checkpoint) -> None:
    """Raises ValueError if a parameter is missing or has another shape."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            try:
                p.copy_(saved.tensor(f"model/{name}"))
            except (KeyError, RuntimeError) as error:
                raise ValueError(f"{saved.path} does not fit this model at {name} {tuple(p.shape)}: {error}") from None


class StopSignal:
    """SIGTERM or Ctrl-C, once: asked for; agreed once all ranks know, at the same step. A second Ctrl-C is not held back."""

    def __init__(self):
        self.asked, self.agreed, self.before = False, False, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGTERM, signal.SIGINT)}

    def ask(self, number, frame) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    try:
        main(config.parse(sys.argv[1:]))
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
