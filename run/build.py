"""Concepts from settings: each function takes what a few fields say and returns the thing."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import torch

import monitor
import schedules
from data import corpora, dataset
from model import GPTConfig
from optim import mup, param_groups
from parallel.coupled import refuse_coupled
from parallel.ddp import DDP
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from parallel.protocol import DataParallel
from parallel.shard import Shard
from precision import amp, onednn
from precision.loss_scale import LossScaler
from run.optimizers import trial
from settings.fields import Config, model_chunks


def lr_schedule(cfg: Config, options: dict):
    """Step -> what every learning rate is multiplied by. Raises ValueError for a bad value in a
    --schedule.NAME."""
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


def corpus(cfg: Config) -> corpora.Corpus:
    return corpora.load(cfg.data, cfg.tokenizer, cfg.data_dir, cfg.data_url, cfg.vocab_size)


def model_config(cfg: Config) -> GPTConfig:
    return GPTConfig(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)})


def pipe(cfg: Config, mesh: Mesh) -> Pipeline | None:
    """This rank's place in the pipeline; None without one."""
    group = mesh.groups["pp"]
    if group is None:
        return None
    return Pipeline(group, cfg.pp_schedule, cfg.n_layer, model_chunks(cfg), mesh.device, cfg.tied)


def hidden_states(cfg: Config, has_replicas: bool) -> tuple[int, torch.dtype, int]:
    """What the stages of a pipeline send: width, dtype, and by what training divides the length."""
    dtype = amp.PRECISIONS[cfg.precision].weights
    if cfg.param_dtype is not None and has_replicas:
        dtype = DTYPES[cfg.param_dtype]
    return cfg.n_embd, dtype, cfg.tp if cfg.sp else 1


def uncompiled(cfg: Config):
    """A context in which nothing is compiled: each new token of a sample has a shape of its own."""
    if cfg.compile == "off":
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


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
            rule = mup.lr_multipliers(optimizer_class, cfg.n_embd, cfg.mup_base_width, **options)
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


def data_parallel(
    cfg: Config, options: dict, mesh: Mesh, tp_shards: dict[str, Shard]
) -> DataParallel:
    """How ranks share the work, see parallel/protocol.py; each file is imported only if used.

    options: of the outer step or the compression, see run/options.py.
    tp_shards: of the parameters that tensor parallelism has divided, see parallel/tensor.py.
    """
    group, device = mesh.groups["replicas"], mesh.device
    folder, dtype = offload_folder(cfg, mesh) / "weights", DTYPES[cfg.reduce_dtype]
    if cfg.diloco_every is not None:
        from parallel.diloco import DiLoCo

        return DiLoCo(group, device, cfg.diloco_every, bucket_mb=cfg.bucket_mb, **options)
    if cfg.compress is not None:
        from parallel import compression

        if group is None:
            raise ValueError(
                f"--compress={cfg.compress} needs two or more replicas, one sends nothing; "
                "start with torchrun --nproc_per_node=2, or leave it out"
            )
        reduce = getattr(compression, cfg.compress)(**options)
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
            tp_shards,
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


def products(
    cfg: Config,
    options: dict,
    model: torch.nn.Module,
    device: torch.device,
    text: dataset.Tokens,
):
    """Replaces the model's products where there are better ones, adds z-loss and counted n-grams of
    the text; returns FP8's state or None."""
    if cfg.z_loss is not None:
        model.loss_fn = functools.partial(model.loss_fn, z_loss=cfg.z_loss)
    if cfg.ngram is not None:
        add_ngrams(cfg, model, text)
    precision = amp.PRECISIONS[cfg.precision]
    if cfg.compile == "off" and onednn.faster(precision.products, device):
        for layer in (module for module in model.modules() if hasattr(module, "matmul")):
            layer.matmul = onednn.linear
    if not precision.fp8_blocks:
        return None
    from precision import fp8

    return fp8.convert(model, device, **options)


def add_ngrams(cfg: Config, model: torch.nn.Module, text: dataset.Tokens) -> None:
    from layers.ngram import LIMIT, NGrams

    try:
        # Too long a one is not even read
        tokens = text if len(text) > LIMIT else text.slice(0, len(text))
        NGrams(tokens, cfg.ngram, cfg.vocab_size).add_to(model)
    except ValueError as error:
        raise ValueError(f"--ngram={cfg.ngram} does not go: {error}") from None


def compiled(
    cfg: Config, options: dict, model: torch.nn.Module, device: torch.device
) -> str | None:
    """Compiles the blocks if asked to and possible; a sentence if it is not. Raises ValueError."""
    if cfg.compile == "off":
        return None
    from layers.compile import compile_blocks, lacking

    why = lacking(device)
    if why is None:
        compile_blocks(model, cfg.compile, **options)
    return why and f"compile={cfg.compile}: {why}; running uncompiled"


def loss_scaler(cfg: Config, options: dict) -> LossScaler | None:
    if not amp.PRECISIONS[cfg.precision].loss_scaling:
        return None
    return LossScaler(**options)


def spike_monitor(
    cfg: Config, options: dict, model: torch.nn.Module, optimizer, position, kept: list, disk
) -> monitor.SpikeMonitor:
    """kept: what else a step changes. disk: the run's checkpoints, to go back to."""
    return monitor.SpikeMonitor(
        model,
        optimizer,
        position,
        kept,
        cfg.on_spike,
        cfg.on_nonfinite,
        amp.PRECISIONS[cfg.precision].loss_scaling,
        monitor.MonitorConfig(**options),
        disk,
    )


def stepper(cfg: Config, mesh: Mesh, tp_shards: dict[str, Shard], optimizer_class: type):
    """(what makes the optimizer, the shards of the parameters of which it will have one): where
    tensor parallelism has divided matrices, a method that looks at full ones gets them full. Raises
    ValueError for bad options.
    """
    group, needed = trial(cfg, optimizer_class)
    # Schedule-Free, whose momentum says where its average lies
    averages = param_groups.averages_weights(optimizer_class)
    if cfg.momentum_warmup is not None and (averages or "momentum" not in group):
        raise ValueError(
            f"--optim={cfg.optim} has no momentum to warm up; leave --momentum_warmup out"
        )
    if cfg.qk_clip is not None and averages:
        raise ValueError(
            f"--qk_clip scales weights, of which --optim={cfg.optim} keeps a second set; "
            "type --optim=muon, or leave qk_clip out"
        )
    if needed:  # in other respects it is the class itself
        init = functools.partialmethod(optimizer_class.__init__, **needed)
        optimizer_class = type(optimizer_class.__name__, (optimizer_class,), {"__init__": init})
    spread = cfg.data_parallel not in ("auto", "ddp") and mesh.groups["replicas"] is not None
    if (
        spread
        or mesh.sizes["tp"] * mesh.sizes["pp"] > 1
        or cfg.offload
        or amp.PRECISIONS[cfg.precision].stochastic
    ):
        refuse_coupled(optimizer_class, [{}], cfg.sub("opt"))
    if not tp_shards or cfg.data_parallel == "fsdp":
        return optimizer_class, {}
    from parallel.adapter import Adapter

    shards = {}

    def make(groups: list[dict], **arguments) -> torch.optim.Optimizer:
        adapter = Adapter(
            optimizer_class, groups, tp_shards=tp_shards, tp_group=mesh.groups["tp"], **arguments
        )
        shards.update(adapter.shards)
        return adapter.optimizer

    return make, shards
