"""What `auto` and `none` mean on this machine."""

import math
import os

import torch

from data.tokenizer import Tokenizer
from hooks.keep import beneath
from hooks.wear import worn
from layers import rope_scaling
from metrics import flops
from optim.attributes import attribute
from optim.param_groups import averages_weights
from precision import amp
from run.optimizers import trial
from settings import checks
from settings.fields import Config, head_size, mlp_size, trait, update, with_traits

# What torch.compile costs and saves on a CPU, by two cores of an AMD EPYC (Zen 4):
# experiments/results/bench_step.md.
COMPILE_SECONDS = 20.0  # from nothing; 4 where torch's cache has the kernels already
EAGER_FLOPS = 95e9  # that a thread computes in a second of an eager step
SAVED_SHARE = 0.14  # of an eager step's time
SAVED_PER_BLOCK = 0.8e-3  # seconds a block and micro-batch, of Python and of small kernels


def resolve_auto(
    cfg: Config, device: torch.device, optimizer_class: type, has_replicas: bool
) -> Config:
    """cfg with a value for every `auto`, and for every `none` that means the optimizer's default.

    has_replicas: two or more replicas share the batch. One replica leaves data_parallel open. Sets
    torch's threads and determinism, too. Raises ValueError for what cannot run here.
    """
    configure_torch(cfg)
    if cfg.attention == "flex" and device.type != "cuda":
        raise ValueError(
            f"attention=flex is for GPUs, torch cannot train with it on {device.type}; type "
            "--attention=sdpa"
        )
    # The model will want it, but only once its data are there.
    rope_scaling.parse(cfg.rope_scaling)
    learning_rates = resolve_learning_rates(cfg, optimizer_class)

    # Some optimizers never leave a start at zero (LOG.md has the figures).
    if cfg.zero_init == "auto" and not attribute(optimizer_class, "zero_init"):
        cfg = update(cfg, zero_init=False)
    if cfg.data_parallel == "auto" and has_replicas:
        cfg = update(cfg, data_parallel=resolve_data_parallel(cfg, optimizer_class))
    precision = amp.choose(cfg.precision, device)
    return update(
        with_traits(cfg),
        device=str(device),
        precision=precision,
        attention=resolve_attention(cfg, precision, device),
        compile=resolve_compile(cfg, precision, device, has_replicas),
        schedule=resolve_schedule(cfg, optimizer_class),
        **learning_rates,
    )


def configure_torch(cfg: Config) -> None:
    """Sets torch's CPU threads, and its kernels that give the same bits each time."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if cfg.deterministic:
        # cuBLAS reads this once, when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def resolve_data_parallel(cfg: Config, optimizer_class: type) -> str:
    """zero1 shares out a step that computes much, such as Muon's; ddp sends less otherwise."""
    # Compression and DiLoCo need the full state on every rank.
    needs_full_state = cfg.compress is not None or cfg.diloco_every is not None
    if attribute(optimizer_class, "heavy_step") and not needs_full_state:
        return "zero1"
    return "ddp"


def resolve_schedule(cfg: Config, optimizer_class: type) -> str:
    """A Schedule-Free optimizer needs no schedule: constant. All others decay: wsd."""
    if cfg.schedule != "auto":
        return cfg.schedule
    if averages_weights(beneath(optimizer_class)):
        return "constant"
    return "wsd"


def resolve_attention(cfg: Config, precision: str, device: torch.device) -> str:
    """`auto` is plain where that is faster than torch's kernel, and sdpa elsewhere.

    Beyond 512 tokens plain gains little, and its probabilities take much memory; but a mask of
    documents costs torch's kernel the half that it skips otherwise, and plain nothing. float64, in which
    layouts and versions are compared, keeps one kernel on every machine.
    """
    if cfg.attention != "auto":
        return cfg.attention
    is_ring = cfg.cp > 1 and cfg.cp_attention == "ring"  # it has an attention of its own
    longest = 2048 if cfg.document_mask else 512
    is_short = cfg.block_size <= longest and cfg.window is None
    if device.type == "cpu" and is_short and not is_ring and precision != "fp64":
        return "plain"
    return "sdpa"


def resolve_compile(cfg: Config, precision: str, device: torch.device, has_replicas: bool) -> str:
    """`auto` compiles on a GPU, unless the schedule takes apart what the compiler fuses.

    On a CPU it compiles where steps_that_pay() says so. Raises ValueError for --compile.NAME where
    nothing is compiled.
    """
    mode = cfg.compile
    if mode == "auto":
        is_zero_bubble = cfg.pp > 1 and cfg.pp_schedule == "zerobubble"
        is_alone = not has_replicas and cfg.tp == cfg.cp == cfg.pp == 1
        mode = "off"
        if device.type == "cuda" and not is_zero_bubble:
            mode = "default"
        elif device.type == "cpu" and cfg.steps >= steps_that_pay(cfg, precision, is_alone):
            mode = "default"
    if mode == "off" and cfg.sub("compile"):
        raise ValueError("--compile.* has nothing to do with compile=off; type --compile=default")
    return mode


def steps_that_pay(cfg: Config, precision: str, is_alone: bool) -> float:
    """After so many steps torch.compile has saved as much time on a CPU as it took.

    inf where that was not measured: other precisions, several processes (is_alone is False),
    experts, dropout, where each layer is a compilation of its own. The rule asks no clock: the same
    command is the same run each time.
    """
    from layers import compile

    is_measured = is_alone and precision in ("fp32", "bf16") and cfg.dropout == 0
    is_measured = is_measured and cfg.n_expert is None
    if not is_measured or compile.lacking(torch.device("cpu")) is not None:
        return math.inf
    q_width = cfg.n_head * head_size(cfg)
    kv_width = (cfg.n_kv_head or cfg.n_head) * head_size(cfg)
    mlp_matrices = 3 if trait(cfg, "activation") == "swiglu" else 2
    per_channel = 2 * (q_width + kv_width) + mlp_matrices * mlp_size(cfg)
    block_params = per_channel * cfg.n_embd * cfg.n_layer
    context = cfg.window or cfg.block_size
    per_token = flops.flops_per_token(block_params, cfg.n_layer, q_width, context)
    work = per_token * cfg.batch_size * cfg.block_size
    eager = work / (EAGER_FLOPS * torch.get_num_threads())
    micro_batches = math.ceil(cfg.batch_size / (cfg.micro_batch_size or cfg.batch_size))
    saved = SAVED_SHARE * eager + SAVED_PER_BLOCK * cfg.n_layer * micro_batches
    return COMPILE_SECONDS / saved


def resolve_learning_rates(cfg: Config, optimizer_class: type) -> dict[str, float]:
    """lr, weight_decay, and the learning rates of embedding, head and scalars, all with a value."""
    lr, weight_decay = own_defaults(cfg, optimizer_class)
    if cfg.lr is not None:
        lr = cfg.lr
    # Some hooks are weight decay themselves, or undo it.
    if any(getattr(hook, "needs_decay_off", False) for hook in worn(optimizer_class)):
        weight_decay = 0.0
    elif cfg.weight_decay is not None:
        weight_decay = cfg.weight_decay

    # An optimizer for matrices alone hands all else to AdamW, whose lr has another unit.
    other_lr = 0.01 if attribute(optimizer_class, "matrices_only") else lr
    found = {"lr": lr, "weight_decay": weight_decay}
    for name in ("embed_lr", "head_lr", "scalar_lr"):
        found[name] = getattr(cfg, name)
        if found[name] is None:
            found[name] = other_lr
    return found


def own_defaults(cfg: Config, optimizer_class: type) -> tuple[float, float]:
    """The class's own lr and weight decay; a decay of 0 where it knows none.

    Raises ValueError where neither the class nor cfg has a value, and where cfg's value would do
    nothing.
    """
    group, needed = trial(cfg, optimizer_class)
    what = f"--optim={cfg.optim}: {optimizer_class.__name__} has no"
    if "lr" not in group:
        raise ValueError(
            f"{what} lr in its groups, where the schedule sets it; let its "
            "constructor take one and keep it there, or take another optimizer"
        )
    if cfg.weight_decay and "weight_decay" not in group:
        raise ValueError(f"{what} weight decay; leave --weight_decay={cfg.weight_decay:g} out")

    # A default counts only if the constructor works without the argument, and it is a number.
    for name, usual, own in (("lr", "1e-3", group["lr"]), ("weight_decay", "0", 0.0)):
        has_default = name not in needed and checks.is_number(own)
        if getattr(cfg, name) is None and not has_default:
            raise ValueError(f"{what} default for {name}; type one, such as --{name}={usual}")
    return group["lr"], group.get("weight_decay", 0.0)


def with_tokenizer(cfg: Config, tokenizer: Tokenizer) -> Config:
    """cfg with what depends on the vocabulary: see with_vocabulary(). And with its document_token.

    Raises ValueError, too, where documents are asked for and nothing says where they begin.
    """
    cfg = with_vocabulary(cfg, tokenizer.n_vocab)
    if not cfg.document_mask and cfg.pack is None:
        return cfg
    token = cfg.document_token
    if token is None:
        token = tokenizer.document_token
    asks = "document_mask=true" if cfg.document_mask else f"pack={cfg.pack}"
    if token is None:
        raise ValueError(
            f"--{asks} looks for the token between two documents, and --tokenizer={cfg.tokenizer} "
            "names none; type --document_token=ID, as --tokenizer=gpt2 has 50256"
        )
    if token >= cfg.vocab_size:
        raise ValueError(
            f"document_token={token} is not below vocab_size={cfg.vocab_size}; type the id that is "
            "between two documents of this data"
        )
    return update(cfg, document_token=token)


def with_vocabulary(cfg: Config, n_vocab: int) -> Config:
    """cfg with its vocab_size; none becomes the tokenizer's n_vocab, rounded up to 64.

    And with its loss_chunk, which depends on vocabulary and device. The rounding is the same on any
    layout. Raises ValueError where tp does not divide vocab_size.
    """
    # Matrix products are fastest at multiples of 64.
    rounded_up = -(-n_vocab // 64) * 64
    cfg = update(cfg, vocab_size=cfg.vocab_size or rounded_up)
    if cfg.vocab_size % cfg.tp:
        next_multiple = -(-cfg.vocab_size // cfg.tp) * cfg.tp
        raise ValueError(
            f"tp={cfg.tp} does not divide vocab_size={cfg.vocab_size}; try "
            f"--vocab_size={next_multiple}"
        )
    if cfg.loss_chunk == "auto":
        cfg = update(cfg, loss_chunk=resolve_loss_chunk(cfg))
    return cfg


def resolve_loss_chunk(cfg: Config) -> int | None:
    """How many tokens have logits at once; None, all, where logits are small beside the blocks."""
    if cfg.vocab_size < 8192:
        return None
    # A GPU needs larger products, and fewer of them.
    return 512 if cfg.device == "cpu" else 4096
