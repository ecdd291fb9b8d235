"""Every setting of a run: one flat dataclass, a line for each.

A line is a field's type, its default, what it means with its unit, which numbers it may be, and
whether a run that goes on may change it. settings/parse.py derives the command line, `--help`, recipes and
the saved `config.toml` from these lines, settings/checks.py refuses what does not go together.

None (`none` in TOML and on the command line) means off or, where the help says so, chosen for you,
as does `auto`. What a model's `auto` traits are is in ARCHS.
"""

import shlex
import typing
from dataclasses import dataclass, field, fields, replace
from typing import Literal

Auto = Literal["auto"]

# May a run that goes on change this field? With resume=auto only FREE and FRESH ones, with
# resume=PATH (a branch) BRANCH ones too. A FRESH field is never taken from the earlier run; others
# are where the command leaves them open.
NEVER, BRANCH, FREE, FRESH = "never", "branch", "free", "fresh"


def knob(default, help: str, change: str = NEVER, least=None, below=None):
    """One setting. `least` and `below` bound numbers: least <= value < below."""
    return field(default=default, metadata=dict(help=help, change=change, least=least, below=below))


@dataclass
class Config:
    # the run
    out_dir: str = knob(
        "out", "folder for checkpoints, metrics.jsonl, config.toml, loss.png", FRESH
    )
    steps: int = knob(180, "optimizer steps", FREE, least=1)
    batch_size: int = knob(16, "sequences per optimizer step, over all ranks", least=1)
    micro_batch_size: int | None = knob(
        None,
        "sequences per rank and forward; none = batch/ranks on a CPU, what fits on a GPU",
        FREE,
        least=1,
    )
    block_size: int = knob(256, "tokens per sequence", least=1)
    seed: int = knob(1337, "decides initial weights, order of rows, dropout masks", least=0)
    deterministic: bool = knob(
        False, "only kernels that give the same bits each time; slower on a GPU", FREE
    )
    resume: str = knob(
        "auto",
        "auto: go on in out_dir | never: anew | PATH: branch from a run or checkpoint",
        FRESH,
    )
    device: str = knob("auto", "auto (cuda, else mps, else cpu) or a torch device name", FRESH)
    threads: int | None = knob(
        None, "CPU threads per process; none = torch's choice", FRESH, least=1, below=1025
    )
    # data
    data: str = knob(
        "python",
        "python, shakespeare, openwebtext, fineweb, a text file, a folder of shards",
        BRANCH,
    )
    tokenizer: str = knob("bytes", "bytes or the name of a tiktoken encoding, such as gpt2")
    data_dir: str = knob("data_cache", "folder for downloads and tokenized shards", FRESH)
    data_url: str | None = knob(
        None, "mirror to download a corpus from, instead of its public home", FRESH
    )
    eval_tokens: int = knob(32768, "size of the fixed held-out set, tokens", FREE, least=1)
    eval_rows: Literal["spread", "first"] = knob(
        "spread", "spread over what is held out | its first", FREE
    )
    # model
    arch: Literal["modern", "gpt2", "track3"] = knob(
        "modern", "decides the traits left at auto below"
    )
    n_layer: int = knob(4, "transformer blocks", least=1)
    n_head: int = knob(4, "attention heads", least=1)
    n_kv_head: int | None = knob(
        None, "heads of keys and values (grouped queries); none = n_head", least=1
    )
    n_embd: int = knob(256, "width of the residual stream", least=1)
    vocab_size: int | None = knob(
        None, "none = the tokenizer's, rounded up to a multiple of 64", least=1
    )
    dropout: float = knob(
        0.0, "share of embeddings and block outputs set to zero", least=0, below=1
    )
    norm: Literal["auto", "rmsnorm", "rmsnorm_gain", "layernorm"] = knob(
        "auto", "modern: rmsnorm (no gain), gpt2: layernorm, track3: rmsnorm_gain"
    )
    embed_norm: bool | Auto = knob("auto", "a norm before the first block too; only track3: true")
    activation: Literal["auto", "relu2", "gelu"] = knob("auto", "relu2 (squared); gpt2: gelu")
    position: Literal["auto", "rotary", "rotary_half", "learned"] = knob(
        "auto",
        "modern: rotary, gpt2: learned, track3: rotary_half (half of a head turns, base 1024)",
    )
    qk_norm: bool | Auto = knob("auto", "normalise queries and keys; gpt2: false")
    attention_scale: float | Auto | None = knob(
        "auto", "what q.k is multiplied by; none = 1/sqrt(head size), track3: 0.12", least=0
    )
    window: int | None = knob(
        None, "tokens that a query sees, itself among them; none = all", least=1
    )
    attention: Literal["sdpa", "plain", "flex"] = knob(
        "sdpa",
        "torch's kernel | written out, faster in bf16 on a CPU up to 512 tokens | FlexAttention,"
        " for GPUs",
        FREE,
    )
    tied: bool | Auto = knob("auto", "the output head shares the embedding; only gpt2: true")
    bias: bool | Auto = knob("auto", "biases in the blocks' Linear and in LayerNorm; modern: false")
    head_bias: bool | Auto = knob("auto", "a bias in the output head; only track3: true")
    zero_init: bool | Auto = knob(
        "auto", "projections and untied head start at 0; false: gpt2, Adam's kind"
    )
    init: Literal["auto", "fan_in", "torch", "gpt2"] = knob(
        "auto",
        "std of matrices; modern: 0.5/sqrt(fan_in), gpt2: 0.02, track3: torch,"
        " sqrt(1/3)/sqrt(fan_in)",
    )
    logit_cap: float | Auto | None = knob(
        "auto", "logits stay within +-this; 15, gpt2: none", least=0
    )
    logit_cap_form: Literal["auto", "tanh", "root"] = knob(
        "auto", "cap*tanh(x/cap) | cap*x/sqrt(x^2 + cap^2), track3's"
    )
    ngram_embed: int | None = knob(
        None,
        "n-grams of 2 to so many tokens have embeddings too, by hash (layers/ngram_embedding.py)",
        least=2,
    )
    ngram_rows: int = knob(16384, "rows of the table that they share", least=1)
    init_from: str | None = knob(
        None, "run or checkpoint whose weights alone are the start (fine-tuning)"
    )
    # optimizer; --opt.NAME= goes to its constructor
    optim: str = knob("muon", "file in optim/ (its first class) or file.Class")
    lr: float | None = knob(
        None, "peak learning rate; none = the optimizer's own default", BRANCH, least=0
    )
    weight_decay: float | None = knob(
        None, "none = the optimizer's own; matrices and head only", BRANCH, least=0
    )
    decay_embeddings: bool = knob(
        False, "weight_decay for embeddings too, as nanoGPT has it", BRANCH
    )
    embed_lr: float | None = knob(
        None, "lr of embeddings; none = lr, with Muon 0.01", BRANCH, least=0
    )
    head_lr: float | None = knob(
        None, "lr of an untied head; none = lr, with Muon 0.01", BRANCH, least=0
    )
    scalar_lr: float | None = knob(
        None, "lr of gains and biases; none = lr, with Muon 0.01", BRANCH, least=0
    )
    grad_clip: float | None = knob(
        1.0, "the gradient's global norm is scaled down to this", BRANCH, least=0
    )
    clip_value: float | None = knob(
        None, "first each gradient entry is cut to +-this", BRANCH, least=0
    )
    z_loss: float | None = knob(
        None,
        "this x (log Z)^2 of each token is minimised too, but not logged; usual: 1e-4",
        BRANCH,
        least=0,
    )
    ngram: int | None = knob(
        None,
        "counted n-grams with up to so many tokens of context are the logits' prior (layers/ngram.py)",
        least=1,
    )
    qk_clip: float | None = knob(
        None,
        "heads whose attention logits exceed this are scaled back; usual: 100 (optim/qk_clip.py)",
        BRANCH,
        least=0,
    )
    # spikes and faults; --monitor.NAME= goes to the guard
    on_spike: Literal["warn", "skip", "rollback", "clip", "lr_cut", "abort"] | None = knob(
        "skip", "what happens to a step whose loss or gradient jumps (monitor.py)", FREE
    )
    on_nonfinite: Literal["warn", "skip", "rollback", "lr_cut", "abort"] | None = knob(
        "skip", "the same for NaN and infinity; fp16's overflows are its loss scaler's", FREE
    )
    patience: int | None = knob(
        None,
        "evaluations without a better loss until the run ends with its best weights",
        FREE,
        least=1,
    )
    min_delta: float = knob(
        0.0, "what a better loss is better by, nats, for patience", FREE, least=0
    )
    # schedule; --schedule.NAME= goes to it
    schedule: Literal[
        "auto", "wsd", "cosine", "linear", "constant", "inverse_sqrt", "sgdr", "onecycle"
    ] = knob("auto", "auto = wsd, and constant for Schedule-Free, which needs none", FREE)
    warmup_frac: float = knob(0.02, "share of the steps for linear warm-up", FREE, least=0, below=1)
    warmup_steps: int | None = knob(None, "the same in steps; overrides warmup_frac", FREE, least=0)
    warmup_start: float | None = knob(
        None, "share of lr where warm-up starts; none = 1/warmup", FREE, least=0
    )
    decay_frac: float = knob(0.4, "wsd: share of the steps for the final decay", FREE, least=0)
    min_lr_frac: float = knob(0.0, "where the decay ends, as a share of lr", FREE, least=0)
    lr_scaling: Literal["linear", "sqrt"] | None = knob(
        None, "scales each lr with batch_size/base_batch_size"
    )
    base_batch_size: int | None = knob(None, "the batch size that lr was found at", least=1)
    mup_base_width: int | None = knob(
        None, "muP: the n_embd that lr was found at; none = off", least=1
    )
    momentum_warmup: int | None = knob(
        None, "steps over which momentum grows from 0.85 to its own", FREE, least=1
    )
    batch_ramp: int | None = knob(None, "steps over which the batch grows to batch_size", least=1)
    batch_ramp_from: int | None = knob(
        None, "sequences it grows from, in steps of as many", least=1
    )
    # numbers and layout
    precision: Literal["auto", "fp64", "fp32", "bf16", "bf16_sr", "fp16", "fp8"] = knob(
        "auto",
        "fp64: the oracle | bf16: autocast over fp32 weights | bf16_sr: bf16 weights, stochastic"
        " rounding | fp16: with loss scaling | fp8: the blocks' products | auto: fp32 or bf16, what"
        " is fast here",
    )
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = knob(
        "auto", "torch.compile of each block, and how; auto: default on a GPU, off on a CPU", FREE
    )
    data_parallel: Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp"] = knob(
        "auto",
        "ddp: replicas | zero1, 2, 3: state, gradients, weights at owners | fsdp: in shards | auto:"
        " zero1 for Muon, SOAP and Shampoo, which it spreads over the ranks, else ddp",
        FREE,
    )
    fsdp_shard: int | None = knob(
        None,
        "fsdp: ranks that share one copy, the others repeat it (hybrid); none = all, 1 = no"
        " sharding",
        FREE,
        least=1,
    )
    reshard: bool = knob(True, "fsdp: weights are dropped after forward and gathered again", FREE)
    bucket_mb: float = knob(25.0, "ddp, zero: size of a gradient bucket, MiB", FREE, least=0)
    reduce_dtype: Literal["fp32", "bf16"] | None = knob(
        None, "zero, fsdp: numbers in which gradients are summed over ranks; none = their own", FREE
    )
    compress: Literal["topk", "sign", "onebit", "powersgd", "fp16", "bf16"] | None = knob(
        None, "ddp: gradients are sent compressed, with error feedback", FREE
    )
    diloco_every: int | None = knob(
        None, "ddp: replicas take so many steps alone, then average (another algorithm)", least=1
    )
    param_dtype: Literal["fp32", "bf16"] | None = knob(
        None, "fsdp: numbers in which weights are gathered and used; none = their own", FREE
    )
    tp: int = knob(1, "tensor parallel: ranks among which each matrix is split", FRESH, least=1)
    sp: bool = knob(
        False, "sequence parallel: between matrices each tp rank has some of the tokens", FRESH
    )
    cp: int = knob(1, "context parallel: ranks among which each sequence is split", FRESH, least=1)
    cp_attention: Literal["ring", "ulysses"] = knob(
        "ring", "keys and values go round | each rank has all tokens of some heads", FRESH
    )
    pp: int = knob(1, "pipeline parallel: stages of layers", FRESH, least=1)
    pp_schedule: Literal["naive", "gpipe", "1f1b", "interleaved", "zerobubble"] = knob(
        "1f1b", "the order in which a stage works on micro-batches", FRESH
    )
    pp_chunks: int | None = knob(
        None, "interleaved: stretches of layers on each rank; none = 2", FRESH, least=1
    )
    activation_checkpoint: str | None = knob(
        None,
        "what backward computes again: full | full_sharded | full_offload | every_K | segments_K | "
        "attention | mlp | selective; or offload, which keeps it in host memory",
        FREE,
    )
    offload: Literal["cpu", "disk"] | None = knob(
        None, "where optimizer state waits: host memory, or files in out_dir", FREE
    )
    offload_params: Literal["cpu", "disk"] | None = knob(
        None, "zero3, fsdp: where weights wait between uses", FREE
    )
    timeout_minutes: float = knob(
        10.0,
        "a collective that waits so long for another rank ends the run",
        FRESH,
        least=0.01,
        below=1e5,
    )
    # looking and saving
    histogram_every: int | None = knob(
        None,
        "steps between counts of exponents of all tensors (precision/histogram.py)",
        FREE,
        least=1,
    )
    watch_every: int | None = knob(
        None,
        "steps between rows with attention logits, log Z, sizes of updates (metrics/watch.py)",
        FREE,
        least=1,
    )
    log_every: int = knob(1, "steps between train rows in metrics.jsonl", FREE, least=1)
    eval_every: int | None = knob(
        60, "steps between evaluations, also at the end; 0 = never", FREE, least=0
    )
    save_every: int | None = knob(
        100, "steps between checkpoints; 0 = only at the end", FREE, least=0
    )
    save_hours: float | None = knob(
        None,
        "a checkpoint also after so many hours without one; 0 = after each step",
        FREE,
        least=0,
    )
    keep: int | None = knob(2, "checkpoints kept, the newest; none = all", FREE, least=1)
    keep_every: int | None = knob(
        None,
        "a checkpoint also every so many steps, kept for ever beside the newest",
        FREE,
        least=1,
    )
    async_save: bool = knob(
        True, "write checkpoints beside training, which waits only for a copy in host memory", FREE
    )
    plot: bool = knob(True, "draw out_dir/loss.png at the end", FRESH)
    tensorboard: bool = knob(False, "also write to out_dir/tensorboard", FRESH)
    wandb: str | None = knob(
        None,
        "project of Weights & Biases to send numbers to; WANDB_MODE=offline keeps them here",
        FRESH,
    )
    debug_ranks: bool = knob(
        False,
        "each rank's steps, and its stacks where it stands, go to out_dir/debug (parallel/watchdog.py)",
        FRESH,
    )
    sample_tokens: int = knob(
        200, "length of the sample printed at the end; 0 = none", FREE, least=0
    )
    peak_flops: float | None = knob(
        None, "FLOP/s of one device, for MFU; none = by its name", FREE, least=0
    )

    options: dict = field(default_factory=dict)  # the dotted fields, full name -> value

    def __post_init__(self):
        self.given = {
            f.name
            for f in fields(self)
            if f.name != "options" and getattr(self, f.name) != f.default
        }
        self.earlier = set()  # what the commands before gave, of a run that goes on

    def sub(self, namespace: str) -> dict:
        """The dotted fields of one namespace: sub("opt") -> {"betas": (0.9, 0.95)}."""
        return {
            k.split(".", 1)[1]: v for k, v in self.options.items() if k.startswith(namespace + ".")
        }


LAYOUTS = dict(
    fsdp_shard="fsdp",
    reshard="fsdp",
    param_dtype="fsdp",
    reduce_dtype="zero1 zero2 zero3 fsdp",
    compress="ddp",
    diloco_every="ddp",
    offload_params="zero3 fsdp",
    bucket_mb="ddp zero1 zero2 zero3",
)  # the layouts that a field is for
NAMESPACES = ("opt", "schedule", "compress", "diloco", "scaler", "fp8", "compile", "monitor")
PATHS = ("out_dir", "data", "data_dir", "resume", "init_from")  # here ~ is the home folder
CHOSEN = (
    "micro_batch_size",
    "n_kv_head",
    "vocab_size",
    "lr",
    "weight_decay",
    "embed_lr",
    "head_lr",
    "scalar_lr",
)  # where none means: the run chooses
SECTIONS = dict(
    out_dir="The run",
    data="Data",
    arch="Model",
    optim="Optimizer",
    on_spike="Spikes and faults",
    schedule="Schedule",
    precision="Numbers and layout",
    log_every="Looking and saving",
)
ARCHS = {
    "modern": dict(
        norm="rmsnorm",
        embed_norm=False,
        activation="relu2",
        position="rotary",
        qk_norm=True,
        attention_scale=None,
        tied=False,
        bias=False,
        head_bias=False,
        zero_init=True,
        init="fan_in",
        logit_cap=15.0,
        logit_cap_form="tanh",
    ),
    "gpt2": dict(
        norm="layernorm",
        embed_norm=False,
        activation="gelu",
        position="learned",
        qk_norm=False,
        attention_scale=None,
        tied=True,
        bias=True,
        head_bias=False,
        zero_init=False,
        init="gpt2",
        logit_cap=None,
        logit_cap_form="tanh",
    ),
    "track3": dict(
        norm="rmsnorm_gain",
        embed_norm=True,
        activation="relu2",
        position="rotary_half",
        qk_norm=True,
        attention_scale=0.12,
        tied=False,
        bias=True,
        head_bias=True,
        zero_init=True,
        init="torch",
        logit_cap=15.0,
        logit_cap_form="root",
    ),
}
FIELDS = {f.name: f for f in fields(Config) if f.name != "options"}
TYPES = typing.get_type_hints(Config)
OPEN = {name for name, f in FIELDS.items() if f.default == "auto" or name in CHOSEN} - {"resume"}


def trait(cfg: Config, name: str):
    """The model's trait of this name, the architecture's where it is `auto`."""
    return ARCHS[cfg.arch][name] if getattr(cfg, name) == "auto" else getattr(cfg, name)


def with_traits(cfg: Config) -> Config:
    """`auto` traits replaced by the architecture's."""
    traits = {name: trait(cfg, name) for name in ARCHS[cfg.arch]}
    return update(cfg, n_kv_head=cfg.n_kv_head or cfg.n_head, **traits)


def update(cfg: Config, **values) -> Config:
    """A copy with other values that remembers which fields the user gave."""
    new = replace(cfg, **values)
    new.given, new.earlier = set(cfg.given), set(cfg.earlier)
    return new


def chosen(cfg: Config) -> list[str]:
    """The fields that no command gave and that have a value: what `auto` and `none` stood for."""
    asked = cfg.given | cfg.earlier
    return [n for n in FIELDS if n in OPEN - asked and getattr(cfg, n) != FIELDS[n].default]


def flag(name: str, value) -> str:
    """What to type in a shell for this field to have this value; what messages tell people to
    type."""
    if isinstance(value, (tuple, list)):
        text = ",".join(map(plain, value)) + "," * (len(value) == 1) if value else "()"
    else:
        text = plain(value)
    return f"--{name}={shlex.quote(text)}"


def plain(value) -> str:
    """A value as the command line has it: none, true, 0.1, text."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def chunks(cfg: Config) -> int:
    """Stretches of layers on each rank of a pipeline."""
    return cfg.pp_chunks or (2 if cfg.pp_schedule == "interleaved" else 1)
