"""What a setting stands for on this machine: a class for a name, a value for every `auto` and
`none`."""

import functools
import importlib
import os
from pathlib import Path

import torch

import monitor
import schedules
from data import dataset
from optim import mup, param_groups
from parallel.ddp import DDP
from parallel.mesh import Mesh, refuse_coupled
from precision import amp, onednn
from precision.loss_scale import LossScaler
from settings import checks
from settings.fields import Config, update, with_traits

# LARS, LAMB and Adafactor hardly leave a matrix of zeros; Adam's kind moves what lies before it by
# full steps along a gradient that is still noise (LOG.md has the figures).
AGAINST_ZERO = ("LARS", "LAMB", "Adafactor", "AdamW", "AdamL2", "Lion", "AdamWScheduleFree")

# Their steps multiply and factorise matrices, too much for every replica to repeat.
HEAVY = ("Muon", "SOAP", "Shampoo")


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class for `file` (its own first one, or the one it imports) or `file.Class` in optim/.
    Raises ValueError with the nearest name, or with what the file lacks."""
    file, dot, wanted = name.partition(".")
    folder = Path(__file__).parent / "optim"
    files = sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("param_groups", "mup"))
    if file not in files:
        raise ValueError(
            f"--optim={name}: there is no such file in optim/; {checks.nearest(file, files)}"
        )
    where = f"--optim={name}: optim/{file}.py"
    try:
        module = vars(importlib.import_module(f"optim.{file}"))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where} imports {error.name}, which is not installed; type pip install "
            f"{error.name}, or take another optimizer"
        ) from None
    except Exception as error:  # whatever a file can raise
        raise ValueError(
            f"{where} cannot be imported: {said(error)}; python -m optim.{file} shows "
            "the line, or take another optimizer"
        ) from None
    base = torch.optim.Optimizer
    classes = {n: c for n, c in module.items() if isinstance(c, type) and c is not base}
    found = {n: c for n, c in classes.items() if issubclass(c, base)}
    own = {n: c for n, c in found.items() if c.__module__ == module["__name__"]}
    if not found:
        raise ValueError(
            f"{where} has no optimizer; define or import a class there that is "
            "derived from torch.optim.Optimizer"
        )
    if dot and wanted not in found:
        near = checks.nearest(wanted, [*found])
        raise ValueError(f"--optim={name}: no such class in that file; {near}")
    if not wanted and not own and len(set(found.values())) > 1:
        raise ValueError(
            f"{where} imports {', '.join(found)}; type one, such as --optim={file}."
            f"{next(iter(found))}"
        )
    return found[wanted] if wanted else [*own.values(), *found.values()][0]


def said(error: Exception) -> str:
    """An error in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def trial(cfg: Config, optimizer_class: type) -> tuple[dict, dict]:
    """What a group of such an optimizer holds, and which of lr and weight_decay its constructor
    cannot do without. Only making one shows it: signatures hide things behind **options and
    sentinels. Raises ValueError where it cannot be made."""
    param_groups.without_compiler()
    ours = "params", "lr", "weight_decay"
    options = checks.check_options(cfg, "opt", optimizer_class, given=ours)
    lr = {"lr": 1e-3 if cfg.lr is None else cfg.lr}
    decay, why = {"weight_decay": cfg.weight_decay or 0.0}, None
    for needed in ({}, lr, decay, lr | decay):
        try:
            made = optimizer_class([torch.nn.Parameter(torch.zeros(1, 1))], **needed, **options)
            return made.param_groups[0], needed
        except Exception as error:  # whatever a constructor can raise
            why = why or error
    if isinstance(why, ValueError):
        raise ValueError(" ".join(str(why).split())) from None
    raise ValueError(
        f"--opt.*: {optimizer_class.__name__} cannot take {options}: {said(why)}; "
        "--lr= and --opt.NAME= give it arguments"
    )


def matrices_only(optimizer_class: type) -> bool:
    """Muon moves the matrices itself and everything else by AdamW, with other learning rates."""
    return getattr(optimizer_class, "matrices_only", False)


def own_defaults(cfg: Config, optimizer_class: type) -> tuple[float, float]:
    """The lr and the weight decay that the class itself has; 0 where it knows no decay. Raises
    ValueError where it has none of its own and cfg neither, or where cfg's would do nothing."""
    group, needed = trial(cfg, optimizer_class)
    what = f"--optim={cfg.optim}: {optimizer_class.__name__} has no"
    if "lr" not in group:
        raise ValueError(
            f"{what} lr in its groups, where the schedule sets it; let its "
            "constructor take one and keep it there, or take another optimizer"
        )
    if cfg.weight_decay and "weight_decay" not in group:
        raise ValueError(f"{what} weight decay; leave --weight_decay={cfg.weight_decay:g} out")
    for name, usual, own in (("lr", "1e-3", group["lr"]), ("weight_decay", "0", 0.0)):
        if getattr(cfg, name) is None and (name in needed or not checks.is_number(own)):
            raise ValueError(f"{what} default for {name}; type one, such as --{name}={usual}")
    return group["lr"], group.get("weight_decay", 0.0)


def settled(cfg: Config, device: torch.device, optimizer_class: type, replicas: bool) -> Config:
    """The config with a value in place of every `auto`, and of every `none` that means the
    optimizer's own; and what torch itself has to be told. replicas: are there several? One leaves
    data_parallel open.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    if cfg.attention == "flex" and device.type != "cuda":
        raise ValueError(
            f"attention=flex is for GPUs, torch cannot train with it on {device.type}; type "
            "--attention=sdpa"
        )
    own_lr, own_decay = own_defaults(cfg, optimizer_class)
    lr = own_lr if cfg.lr is None else cfg.lr
    other = 0.01 if matrices_only(optimizer_class) else lr
    own = {name: getattr(cfg, name) for name in ("embed_lr", "head_lr", "scalar_lr")}
    schedule = "constant" if hasattr(optimizer_class, "eval") else "wsd"  # Schedule-Free
    gpu, apart = device.type == "cuda", cfg.pp > 1 and cfg.pp_schedule == "zerobubble"
    if cfg.zero_init == "auto" and optimizer_class.__name__ in AGAINST_ZERO:
        cfg = update(cfg, zero_init=False)
    if cfg.data_parallel == "auto" and replicas:
        # They need it on every rank
        whole = cfg.compress is not None or cfg.diloco_every is not None
        spread = optimizer_class.__name__ in HEAVY and not whole
        cfg = update(cfg, data_parallel="zero1" if spread else "ddp")
    return update(
        with_traits(cfg),
        device=str(device),
        precision=amp.choose(cfg.precision, device),
        compile=cfg.compile if cfg.compile != "auto" else "default" if gpu and not apart else "off",
        schedule=schedule if cfg.schedule == "auto" else cfg.schedule,
        lr=lr,
        weight_decay=own_decay if cfg.weight_decay is None else cfg.weight_decay,
        **{name: other if value is None else value for name, value in own.items()},
    )


def with_vocabulary(cfg: Config, n_vocab: int) -> Config:
    """vocab_size None is the tokenizer's, rounded up to a multiple of 64, on any layout. Raises
    ValueError where tp does not divide it."""
    cfg = update(cfg, vocab_size=cfg.vocab_size or -(-n_vocab // 64) * 64)
    if cfg.vocab_size % cfg.tp:
        more = -(-cfg.vocab_size // cfg.tp) * cfg.tp
        raise ValueError(
            f"tp={cfg.tp} does not divide vocab_size={cfg.vocab_size}; try --vocab_size={more}"
        )
    return cfg


def lr_schedule(cfg: Config):
    """Step -> what every learning rate is multiplied by. Raises ValueError for a bad
    --schedule.NAME."""
    options = checks.check_options(
        cfg, "schedule", schedules.SHAPES[cfg.schedule], given=schedules.OURS
    )
    warmup = round(cfg.warmup_frac * cfg.steps) if cfg.warmup_steps is None else cfg.warmup_steps

    def factor(step: int) -> float:
        return schedules.multiplier(
            cfg.schedule,
            step,
            cfg.steps,
            warmup,
            cfg.min_lr_frac,
            cfg.decay_frac,
            cfg.warmup_start,
            **options,
        )

    factor(cfg.steps)  # a bad argument shows now
    return factor


def learning_rates(
    cfg: Config, optimizer_class: type, options: dict, kinds: dict
) -> dict[str, float]:
    """The peak learning rate of each kind of parameter. kinds: name -> kind, of the whole model."""
    lrs = {
        "matrix": cfg.lr,
        "embedding": cfg.embed_lr,
        "head": cfg.head_lr,
        "scalar": cfg.scalar_lr,
    }
    for kind, lr in lrs.items():
        if f"{kind}_lr" in cfg.given and kind not in kinds.values():
            raise ValueError(f"--{kind}_lr: this model has no such parameters; leave it out")
        lrs[kind] = schedules.scaled_lr(lr, cfg.lr_scaling, cfg.batch_size, cfg.base_batch_size)
        if cfg.mup_base_width is not None:
            rule = mup.lr_multipliers(
                optimizer_class.__name__, cfg.n_embd, cfg.mup_base_width, **options
            )
            lrs[kind] *= rule[kind]
    return lrs


def state_on_disk(cfg: Config) -> bool:
    return "disk" in (cfg.offload, cfg.offload_params)


def offload_folder(cfg: Config, mesh: Mesh) -> Path:
    return Path(cfg.out_dir) / "offload" / f"rank_{mesh.rank}"


def offloaded(cfg: Config, mesh: Mesh, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer with its state elsewhere, stepped where the weights are."""
    from memory import offload

    where = torch.device("cpu") if cfg.offload_params else mesh.device
    return offload.offload(optimizer, cfg.offload, offload_folder(cfg, mesh) / "state", where)


DTYPES = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}


def data_parallel(cfg: Config, mesh: Mesh, cuts: dict[str, tuple]):
    """How ranks share the work, see the interface in parallel/ddp.py; each file is imported only if
    used.

    cuts: the parameters that tensor parallelism has cut, see parallel/tensor.py.
    """
    group, device = mesh.groups["replicas"], mesh.device
    folder, dtype = offload_folder(cfg, mesh) / "weights", DTYPES[cfg.reduce_dtype]
    if cfg.diloco_every is not None:
        from parallel.diloco import DiLoCo

        options = checks.check_options(
            cfg, "diloco", DiLoCo, ("group", "device", "every", "bucket_mb")
        )
        return DiLoCo(group, device, cfg.diloco_every, bucket_mb=cfg.bucket_mb, **options)
    if cfg.compress is not None:
        from parallel import compression

        if group is None:
            raise ValueError(
                f"--compress={cfg.compress} needs two or more replicas, one sends nothing; "
                "start with torchrun --nproc_per_node=2, or leave it out"
            )
        method = getattr(compression, cfg.compress)
        reduce = method(**checks.check_options(cfg, "compress", method))
        return DDP(group, device, cfg.bucket_mb, reduce)
    if cfg.data_parallel in ("auto", "ddp"):
        return DDP(group, device, cfg.bucket_mb)
    if cfg.data_parallel == "fsdp":
        from parallel.fsdp import FSDP

        return FSDP(
            group,
            device,
            cfg.fsdp_shard,
            cfg.reshard,
            dtype,
            DTYPES[cfg.param_dtype],
            cfg.offload_params,
            folder,
            cuts,
            mesh.groups["tp"],
        )
    from parallel.zero import ZeRO

    return ZeRO(
        group,
        device,
        int(cfg.data_parallel[-1]),
        cfg.bucket_mb,
        dtype,
        cfg.offload_params,
        folder,
        pinned=("embed.weight",) * (cfg.pp > 1),
    )


def products(cfg: Config, model: torch.nn.Module, device: torch.device, text: dataset.Tokens):
    """Replaces the model's products where there are better ones, adds z-loss and counted n-grams of
    the text; returns FP8's state or None."""
    if cfg.z_loss is not None:
        model.output = functools.partial(model.output, z_loss=cfg.z_loss)
    if cfg.ngram is not None:
        add_ngrams(cfg, model, text)
    if cfg.compile == "off" and onednn.faster(cfg.precision, device):
        for layer in (module for module in model.modules() if hasattr(module, "product")):
            layer.product = onednn.linear
    if cfg.precision != "fp8":
        return None
    from precision import fp8

    options = checks.check_options(cfg, "fp8", fp8.convert, ("model", "device", "only"))
    return fp8.convert(model, device, **options)


def add_ngrams(cfg: Config, model: torch.nn.Module, text: dataset.Tokens) -> None:
    from layers.ngram import LIMIT, NGrams

    try:
        # Too long a one is not even read
        tokens = text if len(text) > LIMIT else text.slice(0, len(text))
        NGrams(tokens, cfg.ngram, cfg.vocab_size).add_to(model)
    except ValueError as error:
        raise ValueError(f"--ngram={cfg.ngram} does not go: {error}") from None


def compiled(cfg: Config, model: torch.nn.Module, device: torch.device) -> str | None:
    """Compiles the blocks if asked to and possible; a sentence if it is not. Raises ValueError."""
    if cfg.compile == "off":
        if cfg.sub("compile"):
            raise ValueError(
                "--compile.* has nothing to do with compile=off; type --compile=default"
            )
        return None
    from layers import compile

    options = checks.check_options(cfg, "compile", compile.compile_blocks, ("model", "mode"))
    why = compile.lacking(device)
    if why is None:
        compile.compile_blocks(model, cfg.compile, **options)
    return why and f"compile={cfg.compile}: {why}; running uncompiled"


def loss_scaler(cfg: Config) -> LossScaler | None:
    return (
        LossScaler(**checks.check_options(cfg, "scaler", LossScaler))
        if cfg.precision == "fp16"
        else None
    )


def guard(cfg: Config, model: torch.nn.Module, state, disk) -> monitor.Guard:
    """The spike guard over this run's state. Raises ValueError for a bad --monitor.NAME."""
    ours = (
        "model",
        "optimizer",
        "position",
        "kept",
        "disk",
        "on_spike",
        "on_nonfinite",
        "precision",
    )
    options = checks.check_options(cfg, "monitor", monitor.Guard, ours)
    policies = {cfg.on_spike, cfg.on_nonfinite}
    needs = dict(
        clip="clip", cut="lr_cut", ring="rollback", ring_every="rollback", rollbacks="rollback"
    )
    for name in options:
        if needs.get(name) not in {None, *policies}:
            raise ValueError(f"--monitor.{name} has nothing to do without --on_spike={needs[name]}")
    if options and policies == {None}:
        raise ValueError("--monitor.* has nothing to do with on_spike and on_nonfinite both none")
    if (
        "rollback" in policies
        and options.get("ring") == 0
        and not (cfg.save_every or cfg.save_hours)
    ):
        raise ValueError(
            "--monitor.ring=0 goes back to checkpoints, of which save_every=0 makes none; type "
            "--save_every=100, or leave --monitor.ring out"
        )
    scales = [part for name, part in state.kept.items() if name in ("fp8", "scaler")]
    found = monitor.Guard(
        model,
        state.optimizer,
        state.kept["progress"],
        scales,
        cfg.on_spike,
        cfg.on_nonfinite,
        cfg.precision,
        disk=disk,
        **options,
    )
    state.kept["guard"] = found
    return found


def stepper(cfg: Config, mesh: Mesh, cuts: dict[str, tuple], optimizer_class: type):
    """(what makes the optimizer, boxes of the parameters it will see a part of): where tensor
    parallelism has cut matrices, a method that looks at whole ones gets them whole. Raises
    ValueError for bad options.
    """
    group, needed = trial(cfg, optimizer_class)
    # Schedule-Free, whose momentum says where its average lies
    averages = hasattr(optimizer_class, "eval")
    if cfg.momentum_warmup is not None and (averages or "momentum" not in group):
        raise ValueError(
            f"--optim={cfg.optim} has no momentum to warm up; leave --momentum_warmup out"
        )
    if needed:  # in other respects it is the class itself
        init = functools.partialmethod(optimizer_class.__init__, **needed)
        optimizer_class = type(optimizer_class.__name__, (optimizer_class,), {"__init__": init})
    spread = cfg.data_parallel not in ("auto", "ddp") and mesh.groups["replicas"] is not None
    if (
        spread
        or mesh.sizes["tp"] * mesh.sizes["pp"] > 1
        or cfg.offload
        or cfg.precision == "bf16_sr"
    ):
        refuse_coupled(optimizer_class, [{}], cfg.sub("opt"))
    if not cuts or cfg.data_parallel == "fsdp":
        return optimizer_class, {}
    from parallel.adapter import Adapter

    boxes = {}

    def make(groups: list[dict], **arguments) -> torch.optim.Optimizer:
        adapter = Adapter(
            optimizer_class, groups, cuts=cuts, cut_group=mesh.groups["tp"], **arguments
        )
        boxes.update(adapter.boxes)
        return adapter.optimizer

    return make, boxes


def largest_micro_batch(run, model, replicas, share: int, mesh: Mesh) -> int:
    """The whole share on a CPU; on a GPU halved, by all ranks together, until forward and backward
    fit. In a pipeline of p stages a size that gives 4 p micro-batches, or more, or as many as there
    can be.

    Where weights or gradients are spread, ranks that run out of memory leave the others in a
    collective, so there the first one that does ends the run with what to type. Raises ValueError.
    """
    if (pp := mesh.sizes["pp"]) > 1:
        counts = [n for n in range(pp, share + 1, pp) if share % n == 0]  # of micro-batches
        return share // min((n for n in counts if n >= 4 * pp), default=max(counts, default=share))
    size, spread = share, mesh.sizes["tp"] * mesh.sizes["cp"] > 1
    kind, stage = type(replicas).__name__, getattr(replicas, "stage", 3)
    spread |= (kind == "FSDP" or kind == "ZeRO" and stage > 1) and mesh.sizes["dp"] > 1
    while mesh.device.type == "cuda":
        replicas.last_micro_batch(spread)  # what is not sent would stay inside FSDP
        try:
            run(range(size))[0].backward()
            fits = True
        except torch.OutOfMemoryError:
            fits = False
            if spread:
                raise ValueError(
                    f"out of memory with {size} sequences at a time; type "
                    f"--micro_batch_size={max(1, size // 2)}, or less"
                ) from None
        if spread:
            replicas.finish_gradients()
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if mesh.sum(not fits)[0] == 0:
            break
        if size == 1:
            raise ValueError(
                "out of memory with one sequence at a time; --precision=bf16, a shorter "
                "--block_size or a smaller model need less"
            )
        size = max(m for m in range(1, size // 2 + 1) if share % m == 0)
    return size
