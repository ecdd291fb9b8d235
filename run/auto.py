"""What `auto` and `none` stand for on this machine."""

import os

import torch

from optim.attributes import attribute
from optim.param_groups import averages_weights
from precision import amp
from run.optimizers import trial
from settings import checks
from settings.fields import Config, update, with_traits


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


def resolve_schedule(cfg: Config, optimizer_class: type) -> str:
    """Schedule-Free optimizers need none."""
    if cfg.schedule != "auto":
        return cfg.schedule
    return "constant" if averages_weights(optimizer_class) else "wsd"


def resolve_compile(cfg: Config, device: torch.device) -> str:
    """On a GPU, and where no schedule takes apart what it puts together. Raises ValueError for
    --compile.NAME where it stays off."""
    apart = cfg.pp > 1 and cfg.pp_schedule == "zerobubble"
    how = cfg.compile
    if how == "auto":
        how = "default" if device.type == "cuda" and not apart else "off"
    if how == "off" and cfg.sub("compile"):
        raise ValueError("--compile.* has nothing to do with compile=off; type --compile=default")
    return how


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
    other = 0.01 if attribute(optimizer_class, "matrices_only") else lr
    own = {name: getattr(cfg, name) for name in ("embed_lr", "head_lr", "scalar_lr")}
    # Where a start of zeros hurts (LOG.md has the figures)
    if cfg.zero_init == "auto" and not attribute(optimizer_class, "zero_init"):
        cfg = update(cfg, zero_init=False)
    if cfg.data_parallel == "auto" and replicas:
        # They need it on every rank
        whole = cfg.compress is not None or cfg.diloco_every is not None
        spread = attribute(optimizer_class, "heavy_step") and not whole
        cfg = update(cfg, data_parallel="zero1" if spread else "ddp")
    return update(
        with_traits(cfg),
        device=str(device),
        precision=amp.choose(cfg.precision, device),
        compile=resolve_compile(cfg, device),
        schedule=resolve_schedule(cfg, optimizer_class),
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
