"""What settings describe, built: each function reads a few fields and returns one object."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import torch

import monitor
import schedules
from data import corpora, dataset
from hooks.keep import beneath
from metrics.divergence import Divergence, unigram_entropy
from metrics.profile import Profiler
from model import GPTConfig
from optim import mup, param_groups
from optim.attributes import attribute
from parallel.autocast_linear import keep_no_copies
from parallel.ddp import DDP
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from parallel.protocol import DataParallel
from parallel.replicas import is_elementwise, refuse_coupled
from parallel.shard import Shard
from precision import amp, onednn
from precision.loss_scale import LossScaler
from run.optimizers import trial
from settings.checks import profiled_steps
from settings.fields import Config, model_chunks


def lr_schedule(cfg: Config, options: dict):
    """A function of the step and the kind of parameter: the factor of its learning rate.

    options: arguments of the schedule. Raises ValueError for one out of its range.
    """
    warmup = warmup_steps(cfg)
    decays = {
        "embedding": cfg.embed_decay_frac,
        "head": cfg.head_decay_frac,
        "scalar": cfg.scalar_decay_frac,
    }

    def factor(step: int, kind: str = "matrix") -> float:
        own = decays.get(kind)
        return schedules.multiplier(
            cfg.schedule,
            step,
            cfg.steps,
            warmup,
            cfg.min_lr_frac,
            cfg.decay_frac if own is None else own,
            cfg.warmup_start,
            **options,
        )

    # One call now: a bad argument is refused before the data are read.
    factor(cfg.steps)
    return factor


def warmup_steps(cfg: Config) -> int:
    # The share, warmup_frac, has a default, so warmup_steps counts first where it is given.
    if cfg.warmup_steps is not None:
        return cfg.warmup_steps
    return round(cfg.warmup_frac * cfg.steps)


def corpus(cfg: Config) -> corpora.Corpus:
    return corpora.load(
        cfg.data, cfg.tokenizer, cfg.data_dir, cfg.data_url, cfg.vocab_size, cfg.data_field
    )


def training_data(cfg: Config, tokens: dataset.Tokens) -> dataset.Dataset:
    """The samples to train on; those of the next step are read while the model computes.

    Raises ValueError where there are none.
    """
    arguments = tokens, cfg.block_size, cfg.seed, cfg.vocab_size, cfg.batch_size
    if cfg.pack is None:
        return dataset.Dataset(*arguments)
    from data.packing import Packed

    return Packed(*arguments, token=cfg.document_token)


def model_config(cfg: Config) -> GPTConfig:
    return GPTConfig(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)})


def pipe(cfg: Config, mesh: Mesh) -> Pipeline | None:
    """This rank's place in the pipeline; None without one."""
    group = mesh.groups["pp"]
    if group is None:
        return None
    return Pipeline(group, cfg.pp_schedule, cfg.n_layer, model_chunks(cfg), mesh.device, cfg.tied)


def hidden_states(cfg: Config, has_replicas: bool) -> tuple[int, torch.dtype, int]:
    """The hidden states between two stages of a pipeline: (width, dtype, divisor of the length).

    The divisor counts in training alone: an evaluation does not split the sequence over tp ranks.
    """
    dtype = amp.PRECISIONS[cfg.precision].weights
    # FSDP gathers weights in param_dtype, and a block's output has the dtype of its weights.
    if cfg.param_dtype is not None and has_replicas:
        dtype = DTYPES[cfg.param_dtype]
    divisor = cfg.tp if cfg.sp else 1
    return cfg.n_embd, dtype, divisor


def uncompiled(cfg: Config):
    """A context in which nothing is compiled.

    Each new token of a sample makes the sequence longer, and compiling each length takes minutes.
    """
    if cfg.compile == "off":
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def learning_rates(
    cfg: Config, optimizer_class: type, options: dict, kinds: dict
) -> dict[str, float]:
    """The peak learning rate of each kind of parameter.

    options: the optimizer's; kinds: parameter name -> kind, of the full model. Raises ValueError
    for a learning rate or a decay that was given for a kind that this model lacks.
    """
    lrs = {
        "matrix": cfg.lr,
        "embedding": cfg.embed_lr,
        "head": cfg.head_lr,
        "scalar": cfg.scalar_lr,
    }
    for kind, lr in lrs.items():
        has_decay = getattr(cfg, f"{kind}_decay_frac", None) is not None
        for name, is_given in ("lr", f"{kind}_lr" in cfg.given), ("decay_frac", has_decay):
            if is_given and kind not in kinds.values():
                raise ValueError(
                    f"--{kind}_{name}: this model has no such parameters; leave it out"
                )
        lrs[kind] = schedules.scaled_lr(lr, cfg.lr_scaling, cfg.batch_size, cfg.base_batch_size)
        if cfg.mup_base_width is not None:
            rule = mup.lr_multipliers(optimizer_class, cfg.n_embd, cfg.mup_base_width, **options)
            lrs[kind] *= rule[kind]
    return lrs


def state_on_disk(cfg: Config) -> bool:
    return "disk" in (cfg.offload, cfg.offload_params)


def offload_folder(cfg: Config, mesh: Mesh) -> Path:
    return Path(cfg.out_dir) / "offload" / f"rank_{mesh.rank}"


def offloaded(cfg: Config, mesh: Mesh, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer with its state in host memory or in files, stepped where the weights are."""
    from memory import offload

    device = torch.device("cpu") if cfg.offload_params else mesh.device
    return offload.offload(optimizer, cfg.offload, offload_folder(cfg, mesh) / "state", device)


# Bytes of all weights' copies from which on a layer of Python that keeps none is worth its time.
WORTH_A_FUNCTION = 2**23
DTYPES = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}


def data_parallel(
    cfg: Config,
    options: dict,
    mesh: Mesh,
    tp_shards: dict[str, Shard],
    by_rows: set[str],
    expert_names: list[str] = (),
) -> DataParallel:
    """How replicas share the work, see parallel/protocol.py.

    options: arguments of the outer step or of the compression, see run/options.py.
    tp_shards: name -> shard, for each parameter that tensor parallelism divides.
    by_rows: the names of the parameters that the optimizer steps element by element.
    expert_names: of the parameters that expert parallelism leaves to this rank.
    Raises ValueError for a compression without a second replica.
    """
    group = mesh.groups["dp_cp"]
    device = mesh.device
    folder = offload_folder(cfg, mesh) / "weights"
    reduce_dtype = DTYPES[cfg.reduce_dtype]

    # Each file is imported only where it is used: a plain run reads none of the others.
    if cfg.diloco_every is not None:
        from parallel.diloco import DiLoCo

        return DiLoCo(group, device, cfg.diloco_every, bucket_mb=cfg.bucket_mb, **options)
    if cfg.compress is not None:
        # DDP, with another reduction of its buckets.
        from parallel import compression

        if group is None:
            raise ValueError(
                f"--compress={cfg.compress} needs two or more replicas, one sends nothing; "
                "start with torchrun --nproc_per_node=2, or leave it out"
            )
        reduce = getattr(compression, cfg.compress)(**options)
        return DDP(group, device, cfg.bucket_mb, reduce)
    others = {}  # parameters that some of the replicas hold alone
    if cfg.ep > 1:
        others = dict.fromkeys(expert_names, mesh.groups["expert_dp_cp"])
    if cfg.data_parallel in ("auto", "ddp"):
        return DDP(group, device, cfg.bucket_mb, others=others)
    if cfg.data_parallel == "fsdp":
        from parallel.fsdp import FSDP

        return FSDP(
            group,
            device,
            cfg.fsdp_shard,
            cfg.reshard,
            reduce_dtype,
            DTYPES[cfg.param_dtype],
            cfg.offload_params,
            folder,
            tp_shards,
            mesh.groups["tp"],
            others=others,
        )
    from parallel.zero import ZeRO

    # zero1, zero2 or zero3: the stage is the last digit.
    zero_stage = int(cfg.data_parallel[-1])
    # The first and the last stage of a pipeline both hold a tied embedding: the same rank of each
    # must own the same of it.
    pinned = ("embed.weight",) if cfg.pp > 1 else ()
    return ZeRO(
        group,
        device,
        zero_stage,
        cfg.bucket_mb,
        reduce_dtype,
        cfg.offload_params,
        folder,
        pinned=pinned,
        by_rows=by_rows,
        tp_shards=tp_shards,
        others=others,
    )


def stepped_by_rows(optimizer_class: type, kinds: dict[str, str]) -> set[str]:
    """The names of the parameters that the optimizer steps element by element.

    kinds: name -> kind, see optim/param_groups.py.
    """
    matrices_only = attribute(optimizer_class, "matrices_only")
    found = set()
    for name, kind in kinds.items():
        group = {"kind": kind, "use_muon": kind == "matrix" or not matrices_only}
        if is_elementwise(optimizer_class, group):
            found.add(name)
    return found


def set_loss(cfg: Config, model: torch.nn.Module, text: dataset.Tokens) -> None:
    """Gives the model's loss what the settings ask for: chunks, z-loss, n-grams of the text.

    Raises ValueError for n-grams that cannot be counted.
    """
    model.loss_chunk = cfg.loss_chunk
    if cfg.z_loss is not None:
        model.loss_fn = functools.partial(model.loss_fn, z_loss=cfg.z_loss)
    if cfg.ngram is not None:
        add_ngrams(cfg, model, text)


def add_ngrams(cfg: Config, model: torch.nn.Module, text: dataset.Tokens) -> None:
    from layers.ngram import LIMIT, NGrams

    try:
        # NGrams refuses a text above the limit by its length alone: it need not be read.
        tokens = text if len(text) > LIMIT else text.slice(0, len(text))
        NGrams(tokens, cfg.ngram, cfg.vocab_size).add_to(model)
    except ValueError as error:
        raise ValueError(f"--ngram={cfg.ngram} is not possible: {error}") from None


def convert_linears(
    cfg: Config,
    options: dict,
    model: torch.nn.Module,
    device: torch.device,
):
    """Gives the Linear layers faster matrix products, or smaller ones.

    options: arguments of precision/fp8.py. Returns FP8's state, or None. Raises ValueError where
    FP8 cannot run.
    """
    precision = amp.PRECISIONS[cfg.precision]
    # torch.compile emits this operator by itself.
    if cfg.compile == "off" and onednn.faster(precision.products, device):
        for module in model.modules():
            if hasattr(module, "matmul"):
                module.matmul = onednn.linear
            if hasattr(module, "product"):  # of experts (layers/moe.py)
                module.product = onednn.matmul
    # torch.compile casts by itself; zero bubble computes twice what is one autograd Function.
    is_zerobubble = cfg.pp > 1 and cfg.pp_schedule == "zerobubble"
    copies = sum(p.numel() for p in model.parameters()) * precision.products.itemsize
    has_copies = precision.products != precision.weights and copies >= WORTH_A_FUNCTION
    if cfg.compile == "off" and has_copies and not is_zerobubble:
        keep_no_copies(model)
    if not precision.fp8_blocks:
        return None
    from precision import fp8

    state = fp8.convert(model, device, **options)
    for module in model.modules():
        if hasattr(module, "product"):
            module.product = None  # each expert by its own forward
    return state


def compile_model(
    cfg: Config, options: dict, model: torch.nn.Module, device: torch.device
) -> str | None:
    """Compiles each block, or returns a sentence that says why this machine cannot.

    options: arguments of torch.compile. Returns None where the blocks are compiled, or compile is
    off. Raises ValueError for a bad argument.
    """
    if cfg.compile == "off":
        return None
    from layers.compile import compile_blocks, lacking

    why_not = lacking(device)
    if why_not is not None:
        return f"compile={cfg.compile}: {why_not}; running uncompiled"
    compile_blocks(model, cfg.compile, **options)
    return None


def loss_scaler(cfg: Config, options: dict) -> LossScaler | None:
    if not amp.PRECISIONS[cfg.precision].loss_scaling:
        return None
    return LossScaler(**options)


def spike_monitor(
    cfg: Config, options: dict, model: torch.nn.Module, optimizer, cursor, kept: list, disk
) -> monitor.SpikeMonitor:
    """The monitor that answers jumps of loss and gradient.

    options: its --monitor.NAME settings; cursor: the position in the data; kept: other objects
    that a step changes; disk: the run's checkpoints, for a rollback.
    """
    return monitor.SpikeMonitor(
        model,
        optimizer,
        cursor,
        kept,
        cfg.on_spike,
        cfg.on_nonfinite,
        amp.PRECISIONS[cfg.precision].loss_scaling,
        monitor.MonitorConfig(**options),
        disk,
    )


def profiler(cfg: Config, mesh: Mesh, log) -> Profiler | None:
    """What profiles the steps of --profile; None without them. log: takes lines for the user."""
    steps = profiled_steps(cfg.profile, cfg.steps)
    if not steps:
        return None
    folder = Path(cfg.out_dir, "profile")
    return Profiler(folder, mesh.rank, mesh.device, steps.start, steps.stop, log)


def divergence(cfg: Config, text: dataset.Tokens) -> Divergence:
    """What names a run that has diverged, or is stuck; text: the tokens to train on."""
    # Reading the text costs some milliseconds, which a run without it is spared.
    unigram = 0.0 if cfg.on_divergence is None else unigram_entropy(text)
    return Divergence(cfg.on_divergence, cfg.steps, warmup_steps(cfg), cfg.vocab_size, unigram)


def optimizer_factory(cfg: Config, mesh: Mesh, tp_shards: dict[str, Shard], optimizer_class: type):
    """(a callable that makes the optimizer, the shards of its parameters by parameter).

    Where tensor parallelism divides matrices, the callable wraps the class in an adapter, which
    gathers full matrices for methods that need them. The dictionary of shards is filled when the
    optimizer is made. Raises ValueError for options that this optimizer or layout cannot take.
    """
    group, needed = trial(cfg, optimizer_class)
    refuse_momentum_options(cfg, optimizer_class, group)

    # A class that cannot be made without lr or weight_decay gets them as defaults.
    if needed:
        init = functools.partialmethod(optimizer_class.__init__, **needed)
        optimizer_class = type(optimizer_class.__name__, (optimizer_class,), {"__init__": init})

    # All of these step parameters apart from each other, so no update may depend on another one.
    is_sharded = cfg.data_parallel not in ("auto", "ddp") and mesh.groups["dp_cp"] is not None
    is_model_parallel = mesh.sizes["tp"] * mesh.sizes["pp"] > 1
    steps_in_chunks = cfg.offload or amp.PRECISIONS[cfg.precision].stochastic
    if is_sharded or is_model_parallel or steps_in_chunks:
        refuse_coupled(optimizer_class, [{}], cfg.sub("opt"))

    # FSDP has an adapter of its own, which knows the tensor parallel shards too.
    if not tp_shards or cfg.data_parallel == "fsdp":
        return optimizer_class, {}
    from parallel.adapter import Adapter

    shards = {}

    # The replicas call it with their own groups of parameters, which train.py does not see.
    def make(groups: list[dict], **arguments) -> torch.optim.Optimizer:
        adapter = Adapter(
            optimizer_class, groups, tp_shards=tp_shards, tp_group=mesh.groups["tp"], **arguments
        )
        shards.update(adapter.shards)
        # For State: owners must see weights that something else has put into the model, and the
        # model those that an average has put into the owners'.
        adapter.optimizer.gather_weights = adapter.gather_weights
        adapter.optimizer.share_weights = adapter.broadcast_weights
        return adapter.optimizer

    return make, shards


def refuse_momentum_options(cfg: Config, optimizer_class: type, group: dict) -> None:
    """Raises ValueError for a momentum's schedule or qk_clip that the optimizer cannot take.

    group: a group of parameters as this optimizer fills it.
    """
    # Schedule-Free's momentum says where its average lies: it must not change during the run.
    averages = param_groups.averages_weights(beneath(optimizer_class))
    for name in ("momentum_warmup", "momentum_cooldown"):
        if getattr(cfg, name) is not None and (averages or "momentum" not in group):
            what = name.removeprefix("momentum_").replace("down", " down").replace("warm", "warm ")
            raise ValueError(f"--optim={cfg.optim} has no momentum to {what}; leave --{name} out")
    if cfg.qk_clip is not None and param_groups.averages_weights(optimizer_class):
        what = f"--optim={cfg.optim}" if averages else "--ema, or --hooks=ema_nesterov,"
        raise ValueError(
            f"--qk_clip scales weights, and {what} keeps a second set of them; leave one of the two"
            " out"
        )
