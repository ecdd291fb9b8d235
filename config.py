"""The settings of a run: one flat dataclass, filled from recipes and the command line, checked in one place.

    python train.py [recipe.toml] [--field=value ...]          later wins

A field is one line below: its type, its default, what it means with its unit, and whether a run that goes on
may change it. Parsing, `--help`, the check and the saved `config.toml` are derived from that line.
Fields with a dot belong to whatever another field selected and are checked against its signature:
`--opt.betas=0.9,0.95` goes to the constructor of `--optim`, `--schedule.NAME=` to the schedule.
In TOML a dotted field is a quoted key: `"opt.betas" = [0.9, 0.95]`.

None (`none` in TOML and on the command line) means off or, where the help says so, chosen for you, as does
`auto`. Nothing here is executed: values are numbers, strings, booleans and lists of them. Every mistake is a
ValueError whose one line says what came, what is allowed and what to type.
"""

import ast
import difflib
import importlib.util
import inspect
import math
import os
import tomllib
import types
import typing
from dataclasses import dataclass, field, fields, replace
from typing import Literal

Auto = Literal["auto"]

# May a run that goes on change this field? With resume=auto only FREE and FRESH ones, with resume=PATH (a
# branch) BRANCH ones too. A FRESH field is never taken from the earlier run; others are where the command
# leaves them open.
NEVER, BRANCH, FREE, FRESH = "never", "branch", "free", "fresh"


def knob(default, help: str, change: str = NEVER, least=None, below=None):
    """One setting. `least` and `below` bound numbers: least <= value < below."""
    return field(default=default, metadata=dict(help=help, change=change, least=least, below=below))


@dataclass
class Config:
    # the run
    out_dir: str = knob("out", "folder for checkpoints, metrics.jsonl, config.toml, loss.png", FRESH)
    steps: int = knob(180, "optimizer steps", FREE, least=1)
    batch_size: int = knob(16, "sequences per optimizer step, over all ranks", least=1)
    micro_batch_size: int | None = knob(
        None, "sequences per rank and forward; none = batch/ranks on a CPU, what fits on a GPU", FREE, least=1
    )
    block_size: int = knob(256, "tokens per sequence", least=1)
    seed: int = knob(1337, "decides initial weights, order of rows, dropout masks", least=0)
    deterministic: bool = knob(
        False, "only kernels that give the same bits each time; slower on a GPU", FREE
    )
    resume: str = knob(
        "auto", "auto: go on in out_dir | never: anew | PATH: branch from a run or checkpoint", FRESH
    )
    device: str = knob("auto", "auto (cuda, else mps, else cpu) or a torch device name", FRESH)
    threads: int | None = knob(
        None, "CPU threads per process; none = torch's choice", FRESH, least=1, below=1025
    )
    # data
    data: str = knob(
        "python", "python, shakespeare, openwebtext, fineweb, a text file, a folder of shards", BRANCH
    )
    tokenizer: str = knob("bytes", "bytes or the name of a tiktoken encoding, such as gpt2")
    data_dir: str = knob("data_cache", "folder for downloads and tokenized shards", FRESH)
    data_url: str | None = knob(None, "mirror to download a corpus from, instead of its public home", FRESH)
    eval_tokens: int = knob(32768, "size of the fixed held-out set, tokens", FREE, least=1)
    eval_rows: Literal["spread", "first"] = knob("spread", "spread over what is held out | its first", FREE)
    # model
    arch: Literal["modern", "gpt2", "track3"] = knob("modern", "decides the traits left at auto below")
    n_layer: int = knob(4, "transformer blocks", least=1)
    n_head: int = knob(4, "attention heads", least=1)
    n_kv_head: int | None = knob(None, "heads of keys and values (grouped queries); none = n_head", least=1)
    n_embd: int = knob(256, "width of the residual stream", least=1)
    vocab_size: int | None = knob(None, "none = the tokenizer's, rounded up to a multiple of 64", least=1)
    dropout: float = knob(0.0, "share of embeddings and block outputs set to zero", least=0, below=1)
    norm: Literal["auto", "rmsnorm", "rmsnorm_gain", "layernorm"] = knob(
        "auto", "modern: rmsnorm (no gain), gpt2: layernorm, track3: rmsnorm_gain"
    )
    embed_norm: bool | Auto = knob("auto", "a norm before the first block too; only track3: true")
    activation: Literal["auto", "relu2", "gelu"] = knob("auto", "relu2 (squared); gpt2: gelu")
    position: Literal["auto", "rotary", "rotary_half", "learned"] = knob(
        "auto", "modern: rotary, gpt2: learned, track3: rotary_half (half of a head turns, base 1024)"
    )
    qk_norm: bool | Auto = knob("auto", "normalise queries and keys; gpt2: false")
    attention_scale: float | Auto | None = knob(
        "auto", "what q.k is multiplied by; none = 1/sqrt(head size), track3: 0.12", least=0
    )
    tied: bool | Auto = knob("auto", "the output head shares the embedding; only gpt2: true")
    bias: bool | Auto = knob("auto", "biases in the blocks' Linear and in LayerNorm; modern: false")
    head_bias: bool | Auto = knob("auto", "a bias in the output head; only track3: true")
    zero_init: bool | Auto = knob("auto", "projections and untied head start at 0; false: gpt2, Adam's kind")
    init: Literal["auto", "fan_in", "torch", "gpt2"] = knob(
        "auto", "std of matrices; modern: 0.5/sqrt(fan_in), gpt2: 0.02, track3: torch, sqrt(1/3)/sqrt(fan_in)"
    )
    logit_cap: float | Auto | None = knob("auto", "logits stay within +-this; 15, gpt2: none", least=0)
    logit_cap_form: Literal["auto", "tanh", "root"] = knob(
        "auto", "cap*tanh(x/cap) | cap*x/sqrt(x^2 + cap^2), track3's"
    )
    init_from: str | None = knob(None, "run or checkpoint whose weights alone are the start (fine-tuning)")
    # optimizer; --opt.NAME= goes to its constructor
    optim: str = knob("muon", "file in optim/ (its first class) or file.Class")
    lr: float | None = knob(None, "peak learning rate; none = the optimizer's own default", BRANCH, least=0)
    weight_decay: float | None = knob(
        None, "none = the optimizer's own; matrices and head only", BRANCH, least=0
    )
    embed_lr: float | None = knob(None, "lr of embeddings; none = lr, with Muon 0.01", BRANCH, least=0)
    head_lr: float | None = knob(None, "lr of an untied head; none = lr, with Muon 0.01", BRANCH, least=0)
    scalar_lr: float | None = knob(None, "lr of gains and biases; none = lr, with Muon 0.01", BRANCH, least=0)
    grad_clip: float | None = knob(1.0, "the gradient's global norm is scaled down to this", BRANCH, least=0)
    clip_value: float | None = knob(None, "first each gradient entry is cut to +-this", BRANCH, least=0)
    z_loss: float | None = knob(
        None, "this x (log Z)^2 of each token is minimised too, but not logged; usual: 1e-4", BRANCH, least=0
    )
    ngram: int | None = knob(
        None, "counted n-grams with up to so many tokens of context are the logits' prior (ngram.py)", least=1
    )
    qk_clip: float | None = knob(
        None, "heads whose attention logits exceed this are scaled back; usual: 100 (qk_clip.py)", BRANCH,
        least=0,
    )
    # spikes and faults; --monitor.NAME= goes to the guard
    on_spike: Literal["warn", "skip", "rollback", "clip", "lr_cut", "abort"] | None = knob(
        "skip", "what happens to a step whose loss or gradient jumps (spikes.py)", FREE
    )
    on_nonfinite: Literal["warn", "skip", "rollback", "lr_cut", "abort"] | None = knob(
        "skip", "the same for NaN and infinity; fp16's overflows are its loss scaler's", FREE
    )
    patience: int | None = knob(
        None, "evaluations without a better loss until the run ends with its best weights", FREE, least=1
    )
    min_delta: float = knob(0.0, "what a better loss is better by, nats, for patience", FREE, least=0)
    # schedule; --schedule.NAME= goes to it
    schedule: Literal["auto", "wsd", "cosine", "linear", "constant", "inverse_sqrt", "sgdr", "onecycle"] = (
        knob("auto", "auto = wsd, and constant for Schedule-Free, which needs none", FREE)
    )
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
    mup_base_width: int | None = knob(None, "muP: the n_embd that lr was found at; none = off", least=1)
    momentum_warmup: int | None = knob(
        None, "steps over which momentum grows from 0.85 to its own", FREE, least=1
    )
    batch_ramp: int | None = knob(None, "steps over which the batch grows to batch_size", least=1)
    batch_ramp_from: int | None = knob(None, "sequences it grows from, in steps of as many", least=1)
    # numbers and layout
    precision: Literal["auto", "fp64", "fp32", "bf16", "bf16_sr", "fp16", "fp8"] = knob(
        "auto",
        "fp64: the oracle | bf16: autocast over fp32 weights | bf16_sr: bf16 weights, stochastic rounding | "
        "fp16: with loss scaling | fp8: the blocks' products | auto: fp32 or bf16, what is fast here",
    )
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = knob(
        "auto", "torch.compile of each block, and how; auto: default on a GPU, off on a CPU", FREE
    )
    data_parallel: Literal["ddp", "zero1", "zero2", "zero3", "fsdp"] = knob(
        "ddp", "ddp: replicas | zero1, 2, 3: state, gradients, weights at owners | fsdp: in shards", FREE
    )
    fsdp_shard: int | None = knob(
        None, "fsdp: ranks that share one copy, the others repeat it (hybrid); none = all, 1 = no sharding",
        FREE, least=1,
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
    sp: bool = knob(False, "sequence parallel: between matrices each tp rank has some of the tokens", FRESH)
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
        None, "what backward computes again: full | full_sharded | full_offload | every_K | segments_K | "
        "attention | mlp | selective; or offload, which keeps it in host memory", FREE,
    )
    offload: Literal["cpu", "disk"] | None = knob(
        None, "where optimizer state waits: host memory, or files in out_dir", FREE
    )
    offload_params: Literal["cpu", "disk"] | None = knob(
        None, "zero3, fsdp: where weights wait between uses", FREE
    )
    timeout_minutes: float = knob(
        10.0, "a collective that waits so long for another rank ends the run", FRESH, least=0.01, below=1e5
    )
    # looking and saving
    histogram_every: int | None = knob(
        None, "steps between counts of exponents of all tensors (precision/histogram.py)", FREE, least=1
    )
    watch_every: int | None = knob(
        None, "steps between rows with attention logits, log Z, sizes of updates (watch.py)", FREE, least=1
    )
    log_every: int = knob(1, "steps between train rows in metrics.jsonl", FREE, least=1)
    eval_every: int | None = knob(60, "steps between evaluations, also at the end; 0 = never", FREE, least=0)
    save_every: int | None = knob(100, "steps between checkpoints; 0 = only at the end", FREE, least=0)
    save_hours: float | None = knob(
        None, "a checkpoint also after so many hours without one; 0 = after each step", FREE, least=0
    )
    keep: int | None = knob(2, "checkpoints kept, the newest; none = all", FREE, least=1)
    keep_every: int | None = knob(
        None, "a checkpoint also every so many steps, kept for ever beside the newest", FREE, least=1
    )
    async_save: bool = knob(
        True, "write checkpoints beside training, which waits only for a copy in host memory", FREE
    )
    plot: bool = knob(True, "draw out_dir/loss.png at the end", FRESH)
    tensorboard: bool = knob(False, "also write to out_dir/tensorboard", FRESH)
    wandb: str | None = knob(
        None, "project of Weights & Biases to send numbers to; WANDB_MODE=offline keeps them here", FRESH
    )
    debug_ranks: bool = knob(
        False, "each rank's steps, and its stacks where it stands, go to out_dir/debug (faults.py)", FRESH
    )
    sample_tokens: int = knob(200, "length of the sample printed at the end; 0 = none", FREE, least=0)
    peak_flops: float | None = knob(None, "FLOP/s of one device, for MFU; none = by its name", FREE, least=0)

    options: dict = field(default_factory=dict)  # the dotted fields, full name -> value

    def __post_init__(self):
        self.given = {
            f.name for f in fields(self) if f.name != "options" and getattr(self, f.name) != f.default
        }

    def sub(self, namespace: str) -> dict:
        """The dotted fields of one namespace: sub("opt") -> {"betas": (0.9, 0.95)}."""
        return {k.split(".", 1)[1]: v for k, v in self.options.items() if k.startswith(namespace + ".")}


LAYOUTS = dict(fsdp_shard="fsdp", reshard="fsdp", param_dtype="fsdp", reduce_dtype="zero1 zero2 zero3 fsdp",
               compress="ddp", diloco_every="ddp", offload_params="zero3 fsdp",
               bucket_mb="ddp zero1 zero2 zero3")  # the layouts that a field is for  # fmt: skip
NAMESPACES = ("opt", "schedule", "compress", "diloco", "scaler", "fp8", "compile", "monitor")
CHOSEN = (
    "micro_batch_size",
    "n_kv_head",
    "vocab_size",
    "lr",
    "weight_decay",
    "embed_lr",
    "head_lr",
    "scalar_lr",
)
SECTIONS = dict(out_dir="The run", data="Data", arch="Model", optim="Optimizer", on_spike="Spikes and faults",
                schedule="Schedule",
                precision="Numbers and layout", log_every="Looking and saving")  # fmt: skip
ARCHS = {
    "modern": dict(norm="rmsnorm", embed_norm=False, activation="relu2", position="rotary", qk_norm=True,
                   attention_scale=None, tied=False, bias=False, head_bias=False, zero_init=True,
                   init="fan_in", logit_cap=15.0, logit_cap_form="tanh"),
    "gpt2": dict(norm="layernorm", embed_norm=False, activation="gelu", position="learned", qk_norm=False,
                 attention_scale=None, tied=True, bias=True, head_bias=False, zero_init=False,
                 init="gpt2", logit_cap=None, logit_cap_form="tanh"),
    "track3": dict(norm="rmsnorm_gain", embed_norm=True, activation="relu2", position="rotary_half",
                   qk_norm=True, attention_scale=0.12, tied=False, bias=True, head_bias=True,
                   zero_init=True, init="torch", logit_cap=15.0, logit_cap_form="root"),
}  # fmt: skip
FIELDS = {f.name: f for f in fields(Config) if f.name != "options"}
TYPES = typing.get_type_hints(Config)


# ---- reading ---------------------------------------------------------------------------------------------
def parse(argv: list[str]) -> Config:
    """The command line's settings. Raises ValueError on any mistake, SystemExit(0) after `--help`."""
    values = {}
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    for word in argv:
        if not word.startswith("--"):
            values.update(read_recipe(word))
            continue
        name, equals, text = word[2:].partition("=")
        known(name)
        if not equals:
            raise ValueError(f"--{name} has no value; type --{name}=VALUE")
        values[name] = from_text(name, text)
    cfg = Config(
        **{k: v for k, v in values.items() if "." not in k},
        options={k: v for k, v in values.items() if "." in k},
    )
    cfg.given |= values.keys()
    return check(cfg)


def read_recipe(path: str) -> dict:
    """A TOML recipe as {field: value}; a table like [opt] and a quoted key like "opt.betas" mean the same."""
    if not os.path.isfile(path) and os.path.exists(path):  # a pipe would wait, a device never end
        raise ValueError(f"cannot read the recipe {path}: it is no file; flags look like --steps=100")
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ValueError(
            f"cannot read the recipe {path}: {error.strerror}; flags look like --steps=100"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the recipe {path} is damaged: {error}") from None
    values = {}
    for name, value in table.items():
        if isinstance(value, dict):
            values.update({f"{name}.{k}": v for k, v in value.items()})
        else:
            values[name] = value
    return {name: from_toml(name, value, path) for name, value in values.items()}


def known(name: str) -> None:
    if name in FIELDS or ("." in name and name.split(".")[0] in NAMESPACES):
        return
    near = difflib.get_close_matches(name, FIELDS, 1)
    hint = f"did you mean --{near[0]}?" if near else "--help lists those there are"
    raise ValueError(f"there is no field {name!r}; {hint}")


def nearest(name: str, names: list[str], prefix: str = "") -> str:
    """The end of an error message about a name that is none of `names`."""
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(names)}"


def from_text(name: str, text: str):
    if "." in name:  # checked against a signature later
        try:
            return ast.literal_eval(text)  # numbers, tuples; parses, never runs
        except (ValueError, SyntaxError):
            return {"none": None, "true": True, "false": False}.get(text.lower(), text)
    for kind in kinds(name):
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if typing.get_origin(kind) is Literal and text in typing.get_args(kind):
            return text
        if kind is str and text:
            return text
        if kind in (int, float) and (value := number(kind, text)) is not None:
            return value
    shown = " ".join(text.split())[:200]
    raise ValueError(f"--{name}={shown} is not allowed; it takes {allowed(name)}")


def from_toml(name: str, value, path: str):
    known(name)
    if isinstance(value, str) and value.lower() == "none":
        value = None
    if "." in name:
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, int | float | str | None) for part in parts):  # no dates, no tables
            raise ValueError(f"{name} = {repr(value)[:200]} in {path} is no number, word or list of them")
        return tuple(value) if isinstance(value, list) else value
    for kind in kinds(name):
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        elif kind in (int, float) and type(value) in (int, float):
            if (converted := number(kind, repr(value))) is not None:
                return converted
        elif type(value) is kind:
            return value
    raise ValueError(f"{name} = {repr(value)[:200]} in {path} is not allowed; it takes {allowed(name)}")


def number(kind: type, text: str):
    for convert in (kind, float):  # float second, for whole numbers written as 1e6
        try:
            value = convert(text)
            return kind(value) if kind is float or value == int(value) else None
        except (ValueError, OverflowError):
            pass
    return None


def kinds(name: str) -> tuple:
    hint = TYPES[name]
    return (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )


def allowed(name: str) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return ", ".join(words.get(k) or ", ".join(typing.get_args(k)) for k in kinds(name))


# ---- checking --------------------------------------------------------------------------------------------
def check(cfg: Config) -> Config:
    """The same config if every field, and the fields together, make sense; else ValueError."""
    for name, f in FIELDS.items():
        value, least, below = getattr(cfg, name), f.metadata["least"], f.metadata["below"]
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        below = 2**31 if below is None and type(value) is int else math.inf if below is None else below
        if not (least <= value < below and math.isfinite(value)):  # in this order: ints may be too large
            value = str(value)[:40]
            raise ValueError(f"{name}={value} is out of range; it must be at least {least} and below {below}")
    if cfg.n_embd % cfg.n_head:
        near = [h for h in range(1, cfg.n_embd + 1) if cfg.n_embd % h == 0]
        best = min(near, key=lambda h: abs(h - cfg.n_head))
        raise ValueError(
            f"n_embd={cfg.n_embd} is not divisible by n_head={cfg.n_head}; for instance --n_head={best}"
        )
    if cfg.n_head % (cfg.n_kv_head or cfg.n_head):
        raise ValueError(f"n_head={cfg.n_head} is not divisible by n_kv_head={cfg.n_kv_head}")
    position, size = trait(cfg, "position"), cfg.n_embd // cfg.n_head
    if parts := {"rotary": 2, "rotary_half": 4}.get(position):
        if size % parts:
            raise ValueError(f"position={position} needs a head size divisible by {parts}, not n_embd/n_head "
                             f"= {size}; change n_head or type --position=learned")
    scale, form = trait(cfg, "attention_scale"), cfg.logit_cap_form
    if cfg.mup_base_width is not None and scale is not None:
        raise ValueError(f"attention_scale={scale:g} fixes what mup_base_width sets to 8/head size; type "
                         "--attention_scale=none, or leave mup_base_width out")
    if trait(cfg, "logit_cap") is None and form not in ("auto", ARCHS[cfg.arch]["logit_cap_form"]):
        raise ValueError(f"logit_cap_form={form} has no meaning with logit_cap=none; type --logit_cap=15")
    if cfg.schedule not in ("auto", "wsd") and cfg.decay_frac != FIELDS["decay_frac"].default:
        raise ValueError(
            f"decay_frac has no meaning for schedule={cfg.schedule}; leave it out, or --schedule=wsd"
        )
    if cfg.schedule == "constant" and cfg.min_lr_frac:
        raise ValueError("min_lr_frac has no meaning for schedule=constant, which never decays; leave it out")
    for name in ("decay_frac", "min_lr_frac", "warmup_start"):
        if (getattr(cfg, name) or 0) > 1:
            raise ValueError(f"{name}={getattr(cfg, name)} is a share, from 0 to 1")
    if (cfg.lr_scaling is None) != (cfg.base_batch_size is None):
        raise ValueError("lr_scaling and base_batch_size go together: --lr_scaling=sqrt --base_batch_size=32")
    if (cfg.batch_ramp is None) != (cfg.batch_ramp_from is None):
        raise ValueError("batch_ramp and batch_ramp_from go together: --batch_ramp=1000 --batch_ramp_from=8")
    if cfg.batch_ramp_from is not None and cfg.batch_size % cfg.batch_ramp_from:
        raise ValueError(f"batch_ramp_from={cfg.batch_ramp_from} does not divide batch_size={cfg.batch_size}")
    for name, layouts in LAYOUTS.items():
        if getattr(cfg, name) != FIELDS[name].default and cfg.data_parallel not in layouts.split():
            others = " or ".join(f"--data_parallel={layout}" for layout in layouts.split())
            raise ValueError(f"{name} does not work with data_parallel={cfg.data_parallel}; "
                             f"leave it out, or type {others}")
    check_model_parallel(cfg)
    for name in ("tensorboard", "wandb"):
        if getattr(cfg, name) and importlib.util.find_spec(name) is None:
            raise ValueError(f"--{name} needs a package: pip install {name}")
    for namespace, owner in (("compress", "compress"), ("diloco", "diloco_every")):
        if cfg.sub(namespace) and getattr(cfg, owner) is None:
            raise ValueError(f"--{namespace}.{next(iter(cfg.sub(namespace)))} needs --{owner}=")
    for namespace, precision in (("scaler", "fp16"), ("fp8", "fp8")):
        if cfg.sub(namespace) and cfg.precision != precision:
            raise ValueError(f"--{namespace}.{next(iter(cfg.sub(namespace)))} needs --precision={precision}")
    for name in ("compress", "diloco_every"):
        if getattr(cfg, name) is not None and cfg.precision in ("fp16", "bf16_sr"):
            raise ValueError(f"{name} adds up over steps what precision={cfg.precision} scales or rounds; "
                             f"type --precision=bf16, or leave {name} out")
    more, back = cfg.compress or cfg.diloco_every, "rollback" in (cfg.on_spike, cfg.on_nonfinite)
    if more and back and cfg.options.get("monitor.ring") != 0:
        raise ValueError("compress and diloco_every keep more than the states in memory hold; type "
                         "--monitor.ring=0 to roll back to the newest checkpoint")
    if cfg.patience is not None and not cfg.eval_every:
        raise ValueError("patience counts evaluations, and eval_every=0 makes none; type --eval_every=60")
    if cfg.patience is not None and cfg.diloco_every is not None:
        raise ValueError("patience does not go with diloco_every, whose average is not what it trains on")
    if cfg.min_delta and cfg.patience is None:
        raise ValueError("min_delta means nothing without patience; type --patience=5 too")
    if cfg.compress is not None and cfg.diloco_every is not None:
        raise ValueError("compress and diloco_every do not go together; leave one of them out")
    if cfg.qk_clip is not None and trait(cfg, "qk_norm"):
        raise ValueError(f"qk_clip={cfg.qk_clip:g} scales queries and keys, and qk_norm=true undoes that; "
                         "type --qk_norm=false, or leave qk_clip out")
    if cfg.qk_clip is not None and cfg.diloco_every is not None:
        raise ValueError("qk_clip looks at all replicas, which diloco_every lets go apart; leave one "
                         "of them out")
    for name in ("grad_clip", "clip_value", "z_loss", "qk_clip", "attention_scale", "logit_cap",
                 "peak_flops"):  # fmt: skip
        if getattr(cfg, name) == 0:
            raise ValueError(f"{name}=0 makes no sense; type --{name}=none to switch it off")
    return cfg


def check_model_parallel(cfg: Config) -> None:
    """tp, sp, cp and pp, with each other and with the rest."""
    layout, ring = cfg.data_parallel, cfg.cp > 1 and cfg.cp_attention == "ring"
    heads, split = cfg.n_kv_head or cfg.n_head, [n for n in ("tp", "pp") if getattr(cfg, n) > 1]
    for name, number in (("n_head", cfg.n_head), ("n_kv_head", heads)):
        if number % cfg.tp:
            raise ValueError(f"tp={cfg.tp} does not divide {name}={number}, and a head is not split; "
                             f"--tp={math.gcd(cfg.tp, number)} would")
    if cfg.sp and cfg.tp == 1:
        raise ValueError("sp=true splits tokens among the ranks of tensor parallelism; type --tp=2, or more")
    parts = math.lcm(cfg.cp * (2 if ring else 1), cfg.cp * (cfg.tp if cfg.sp else 1))
    if cfg.block_size % parts:
        better = -(-cfg.block_size // parts) * parts
        raise ValueError(f"cp={cfg.cp} and sp={str(cfg.sp).lower()} cut a sequence into {parts} equal parts; "
                         f"block_size={cfg.block_size} cannot be, try --block_size={better}")
    if cfg.cp > 1 and not ring and heads // cfg.tp % cfg.cp:
        raise ValueError(f"cp_attention=ulysses deals out heads, and cp={cfg.cp} does not divide the "
                         f"{heads // cfg.tp} of keys and values; type --cp_attention=ring")
    if cfg.ngram is not None and (split or cfg.cp > 1):
        raise ValueError(f"ngram needs whole rows and logits on a rank and does not go with "
                         f"{[*split, 'cp'][0]}; leave one of them out")
    if cfg.pp_chunks is not None and (cfg.pp_chunks > 1) != (cfg.pp_schedule == "interleaved"):
        raise ValueError(f"pp_chunks={cfg.pp_chunks} does not go with pp_schedule={cfg.pp_schedule}; type "
                         "--pp_schedule=interleaved --pp_chunks=2, or leave pp_chunks out")
    if cfg.pp > 1 and cfg.pp * chunks(cfg) > cfg.n_layer:
        raise ValueError(f"pp={cfg.pp} stages of {chunks(cfg)} stretch(es) need {cfg.pp * chunks(cfg)} "
                         f"layers, n_layer is {cfg.n_layer}; try --pp={max(1, cfg.n_layer // chunks(cfg))}")
    if layout in ("zero2", "zero3") and split:
        raise ValueError(f"data_parallel={layout} would send gradients or weights again for each micro-batch "
                         f"in flight and does not go with {split[0]}; type --data_parallel=fsdp or zero1")
    if layout == "fsdp" and cfg.pp > 1 and cfg.pp_schedule == "zerobubble":
        raise ValueError("pp_schedule=zerobubble computes weight gradients when fsdp has sent them; type "
                         "--pp_schedule=1f1b, or --data_parallel=zero1")
    if cfg.pp > 1 and cfg.pp_schedule == "zerobubble" and cfg.compile not in ("auto", "off"):
        raise ValueError("pp_schedule=zerobubble takes apart what compile puts together; type "
                         "--pp_schedule=1f1b, or --compile=off")
    if cfg.activation_checkpoint == "full_sharded" and (cfg.sp or cfg.tp == 1):
        raise ValueError("activation_checkpoint=full_sharded shares out what tp ranks hold alike, with tp=1 "
                         "or sp=true nothing is; type --activation_checkpoint=full")
    for name in ("compress", "diloco_every"):
        apart = split + ["cp"] * (cfg.cp > 1 and name == "diloco_every")
        if getattr(cfg, name) is not None and apart:
            raise ValueError(f"{name} works between whole models and does not go with {apart[0]}; leave one "
                             "of them out")


def chunks(cfg: Config) -> int:
    """Stretches of layers on each rank of a pipeline."""
    return cfg.pp_chunks or (2 if cfg.pp_schedule == "interleaved" else 1)


def check_options(cfg: Config, namespace: str, target, given: tuple = ()) -> dict:
    """sub(namespace) if `target`'s signature takes it, else ValueError with the nearest name.

    given: parameters that come from elsewhere, such as `params` and `lr`. A value whose kind differs from the
    default's (text for a number) is refused.
    """
    taken = {k: p.default for k, p in inspect.signature(target).parameters.items() if k not in given}
    values = cfg.sub(namespace)
    for name, value in values.items():
        if name not in taken:
            hint = nearest(name, list(taken), f"--{namespace}.") if taken else "it takes none"
            raise ValueError(f"--{namespace}.{name}: {target.__name__} has no such argument; {hint}")
        default = taken[name]
        if inspect.signature(target).parameters[name].annotation is int:
            right = isinstance(value, int) and not isinstance(value, bool)
        elif isinstance(default, tuple):
            right = isinstance(value, tuple) and len(value) == len(default) and all(map(is_number, value))
        elif is_number(default):
            right = is_number(value)
        else:
            right = (
                isinstance(value, bool)
                if isinstance(default, bool)
                else not isinstance(value, (tuple, list, dict))
            )
        if not right:
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            raise ValueError(f"--{namespace}.{name}={value} is of the wrong kind; the default is {shown}")
    return values


def batch_share(cfg: Config, dp: int) -> int:
    """Sequences of the smallest step on one of dp replicas. Raises ValueError where parts are not even."""
    micro = cfg.micro_batch_size
    name = "batch_size" if cfg.batch_ramp_from is None else "batch_ramp_from"
    batch = getattr(cfg, name)
    if batch % dp:
        raise ValueError(f"{name}={batch} does not divide by {dp} ranks; try --{name}={-(-batch // dp) * dp}")
    share = batch // dp
    if "micro_batch_size" in cfg.given and micro is not None and share % micro:
        fits = max(m for m in range(1, min(share, micro) + 1) if share % m == 0)
        raise ValueError(f"micro_batch_size={micro} does not divide the {share} sequences of each rank "
                         f"({name}={batch} over {dp}); try --micro_batch_size={fits}")
    return share


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
    new.given = set(cfg.given)
    return new


# ---- writing ---------------------------------------------------------------------------------------------
def to_dict(cfg: Config) -> dict:
    """Plain values for a checkpoint."""
    return {name: getattr(cfg, name) for name in FIELDS} | {"options": dict(cfg.options)}


def from_dict(saved: dict) -> Config:
    """The config of a checkpoint, each value checked as if from a recipe. Raises ValueError."""
    try:
        values = {name: from_toml(name, saved[name], "the checkpoint") for name in FIELDS if name in saved}
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["options"].items()}
        return check(Config(**values, options=options))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint's settings are not what this program writes: {error}") from None


def to_toml(cfg: Config, notes: dict) -> str:
    """The resolved settings as a recipe; `notes` (commit, versions) become comments at its head."""

    def shown(value) -> str:
        if value is None:
            return '"none"'
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(shown(v) for v in value) + "]"
        if isinstance(value, str):
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        return str(value).lower() if isinstance(value, bool) else repr(value)

    lines = [f"# {key}: {value}" for key, value in notes.items()]
    lines += [f"{name} = {shown(getattr(cfg, name))}" for name in FIELDS]
    lines += [f'"{name}" = {shown(value)}' for name, value in cfg.options.items()]
    return "\n".join(lines) + "\n"


def help_text() -> str:
    lines = ["python train.py [recipe.toml] [--field=value ...]", "", "Later wins. The same under torchrun."]
    for name, f in FIELDS.items():
        if name in SECTIONS:
            lines += ["", SECTIONS[name]]
        lines.append(f"  --{name:17} {f.metadata['help']} [{str(f.default).lower()}]")
        if any(typing.get_origin(k) is Literal and k is not Auto for k in kinds(name)):
            lines.append(f"{'':22}one of: {allowed(name)}")
    lines += [
        "",
        "  --opt.NAME=       an argument of the optimizer's constructor, such as --opt.betas=0.9,0.95",
    ]
    lines += ["  --schedule.NAME=  an argument of the schedule, such as --schedule.shape=cosine"]
    lines += ["  --compress.NAME=  an argument of the compression, such as --compress.rank=4"]
    lines += ["  --diloco.NAME=    an argument of the outer step, such as --diloco.momentum=0.9"]
    lines += ["  --scaler.NAME=    an argument of fp16's loss scaler, such as --scaler.fixed=1024"]
    lines += ["  --compile.NAME=   dynamic, verbose or backend, such as --compile.verbose=true"]
    lines += ["  --fp8.NAME=       an argument of FP8, such as --fp8.scaling=tensor"]
    lines += ["  --monitor.NAME=   a number of the spike guard, such as --monitor.detector=ema"]
    return "\n".join(lines)
