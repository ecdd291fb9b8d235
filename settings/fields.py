"""Every setting of a run: one flat dataclass, a line for each.

A line says the field's type, its default, its meaning with the unit, its range, and whether a
resumed run may change it. settings/parse.py derives the command line, `--help`, recipes and the
saved `config.toml` from these lines. settings/checks.py refuses what is incompatible.

None (`none` in TOML and on the command line) means off or, where the help says so, chosen for you.
`auto` is always chosen for you. ARCHS has the values of a model's `auto` traits.
"""

import functools
import shlex
import typing
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from schedules import SHAPES

Auto = Literal["auto"]


def setting(default, help: str, change: str, least=None, below=None):
    """One setting. `least` and `below` bound numbers: least <= value < below."""
    return field(default=default, metadata=dict(help=help, change=change, least=least, below=below))


# May a resumed run change this setting? What its command leaves open comes from the earlier run.
# fixed: never. Another value makes another model, another order of data or another method.
fixed = functools.partial(setting, change="fixed")
# on_branch: only with --resume=PATH, whose branch has a folder and a history of its own.
on_branch = functools.partial(setting, change="on_branch")
# may_change: always. The earlier run's value holds until a command gives another one.
may_change = functools.partial(setting, change="may_change")
# per_run: always, and it never comes from the earlier run: it belongs to the machine or command.
per_run = functools.partial(setting, change="per_run")


@dataclass
class Config:
    # The run. A resumed one may have other steps and micro-batches, but the same batches.
    out_dir: str = per_run("out", "folder for checkpoints, metrics.jsonl, config.toml, loss.png")
    steps: int = may_change(180, "optimizer steps", least=1)
    batch_size: int = fixed(16, "sequences per optimizer step, over all ranks", least=1)
    micro_batch_size: int | None = may_change(
        None,
        "sequences per rank and forward; none = batch/ranks on a CPU, what fits on a GPU",
        least=1,
    )
    block_size: int = fixed(256, "tokens per sequence", least=1)
    seed: int = fixed(1337, "decides initial weights, order of samples, dropout masks", least=0)
    deterministic: bool = may_change(
        False, "only kernels that give the same bits each time; slower on a GPU"
    )
    resume: str = per_run(
        "auto", "auto: resume in out_dir | never: anew | PATH: branch from a run or checkpoint"
    )
    device: str = per_run("auto", "auto (cuda, else mps, else cpu) or a torch device name")
    threads: int | None = per_run(
        None, "CPU threads per process; none = torch's choice", least=1, below=1025
    )
    # Data. A branch may train on another text, but ids keep their meaning: same tokenizer.
    data: str = on_branch(
        "python",
        "python, shakespeare, openwebtext, fineweb, a text, a folder of .txt texts, .jsonl,"
        " .parquet or .bin shards, a.txt,b.txt, 'a/*.txt'",
    )
    data_field: str = on_branch("text", "where .jsonl and .parquet have the text of a document")
    document_mask: bool = fixed(
        False,
        "a token sees its own document alone, and positions begin anew in each"
        " (layers/document_mask.py)",
    )
    pack: Literal["best_fit"] | None = fixed(
        None,
        "best_fit: a sequence begins where a document begins, and what does not fit is cut"
        " (data/packing.py)",
    )
    document_token: int | None = fixed(
        None,
        "for document_mask and pack: the id with which a document begins; none = the tokenizer's",
        least=0,
    )
    tokenizer: str = fixed(
        "bytes", "bytes, a tiktoken encoding such as gpt2, or PATH/tokenizer.json (or its folder)"
    )
    data_dir: str = per_run("data_cache", "folder for downloads and tokenized shards")
    data_url: str | None = per_run(
        None, "mirror to download a corpus from, instead of its public home"
    )
    eval_tokens: int = may_change(32768, "size of the fixed held-out set, tokens", least=1)
    eval_rows: Literal["spread", "first"] = may_change(
        "spread", "held-out samples that are evaluated: evenly spaced | the first"
    )
    # Model. All are fixed but `attention`: its values are kernels for the same function.
    arch: Literal["modern", "gpt2", "track3", "llama", "qwen3"] = fixed(
        "modern", "decides the traits left at auto below"
    )
    n_layer: int = fixed(4, "transformer blocks", least=1)
    n_head: int = fixed(4, "attention heads", least=1)
    n_kv_head: int | None = fixed(
        None, "heads of keys and values (grouped queries); none = n_head", least=1
    )
    head_dim: int | None = fixed(None, "width of a head; none = n_embd/n_head", least=1)
    n_embd: int = fixed(256, "width of the residual stream", least=1)
    mlp_width: int | None = fixed(
        None,
        "width between the MLP's matrices; none = 4 n_embd, swiglu: 8/3 n_embd, rounded up to a"
        " multiple of 64",
        least=1,
    )
    vocab_size: int | None = fixed(
        None, "none = the tokenizer's, rounded up to a multiple of 64", least=1
    )
    dropout: float = fixed(
        0.0, "share of embeddings and block outputs set to zero", least=0, below=1
    )
    norm: Literal["auto", "rmsnorm", "rmsnorm_gain", "layernorm"] = fixed(
        "auto", "modern: rmsnorm (no gain), gpt2: layernorm, others: rmsnorm_gain"
    )
    norm_eps: float | Auto | None = fixed(
        "auto",
        "added under each norm's root; none = 1e-6, layernorm: 1e-5; llama: 1e-5, qwen3: 1e-6",
        least=1e-12,
        below=1,
    )
    embed_norm: bool | Auto = fixed("auto", "a norm before the first block too; only track3: true")
    activation: Literal["auto", "relu2", "gelu", "gelu_tanh", "swiglu"] = fixed(
        "auto",
        "relu2 (squared); gpt2: gelu; llama, qwen3: swiglu (a third matrix); gelu_tanh: OpenAI's"
        " GPT-2",
    )
    position: Literal["auto", "rotary", "rotary_half", "learned"] = fixed(
        "auto",
        "modern: rotary, gpt2: learned, track3: rotary_half (half of a head turns, base 1024)",
    )
    rope_base: float | Auto = fixed(
        "auto", "rotary: base of the frequencies; 10000, llama: 500000, qwen3: 1000000", least=1
    )
    rope_scaling: str | None = fixed(
        None,
        "rotary, for longer sequences: linear:FACTOR, llama3:FACTOR:LOW:HIGH:ORIGINAL"
        " (layers/rope_scaling.py)",
    )
    qk_norm: bool | Literal["auto", "gain"] = fixed(
        "auto", "normalise queries and keys; gpt2, llama: false, qwen3: gain (learned)"
    )
    attention_scale: float | Auto | None = fixed(
        "auto", "what q.k is multiplied by; none = 1/sqrt(head size), track3: 0.12", least=0
    )
    window: int | None = fixed(
        None, "tokens that a query sees, itself among them; none = all", least=1
    )
    attention: Literal["auto", "sdpa", "plain", "flex"] = may_change(
        "auto",
        "torch's kernel | written out | FlexAttention, for GPUs; auto: plain on a CPU for up to 512"
        " tokens, with document_mask 2048, else sdpa",
    )
    tied: bool | Auto = fixed("auto", "the output head shares the embedding; only gpt2: true")
    bias: bool | Auto = fixed(
        "auto", "biases in the blocks' Linear and in LayerNorm; gpt2, track3: true"
    )
    qkv_bias: bool | None = fixed(None, "biases of queries, keys and values; none = as bias")
    head_bias: bool | Auto = fixed("auto", "a bias in the output head; only track3: true")
    zero_init: bool | Auto = fixed(
        "auto", "projections and untied head start at 0; false: gpt2, llama, qwen3, Adam's kind"
    )
    init: Literal["auto", "fan_in", "torch", "gpt2"] = fixed(
        "auto",
        "std of matrices; modern: 0.5/sqrt(fan_in), gpt2, llama, qwen3: 0.02, track3: torch,"
        " sqrt(1/3)/sqrt(fan_in)",
    )
    logit_cap: float | Auto | None = fixed(
        "auto", "logits stay within +-this; 15, gpt2, llama, qwen3: none", least=0
    )
    logit_cap_form: Literal["auto", "tanh", "root"] = fixed(
        "auto", "cap*tanh(x/cap) | cap*x/sqrt(x^2 + cap^2), track3's"
    )
    ngram_embed: int | None = fixed(
        None,
        "n-grams of 2 to this many tokens have embeddings too, by hash (layers/ngram_embedding.py)",
        least=2,
    )
    ngram_rows: int = fixed(16384, "rows of the table that they share", least=1)
    # Mixture of experts. The rest means nothing without n_expert.
    n_expert: int | None = fixed(
        None, "experts in place of the MLP, none = off (layers/moe.py)", least=2
    )
    n_expert_active: int = fixed(2, "experts that a token goes through", least=1)
    n_shared_expert: int = fixed(0, "experts that all tokens go through besides", least=0)
    expert_width: int | None = fixed(
        None,
        "width between an expert's matrices; none = the MLP's / experts of a token, up to a"
        " multiple of 8",
        least=1,
    )
    moe_every: int = fixed(1, "layers from one with experts to the next; 2 = each second", least=1)
    router: Literal["softmax", "sigmoid"] = fixed("softmax", "a score from a token's logits")
    normalize_gates: bool = fixed(True, "the scores of a token's experts are made to add up to 1")
    router_z_loss: float | None = on_branch(
        1e-3, "as z_loss, of the router's logits (ST-MoE); none = off", least=0
    )
    moe_bias_lr: float | None = on_branch(
        1e-3,
        "each step moves an expert's bias in the choice by this, towards even loads (DeepSeek-V3);"
        " none = biases stay as they are",
        least=0,
    )
    moe_sequence_loss: float | None = on_branch(
        None, "weight of the loss for even loads within a sequence; usual: 1e-4", least=0
    )
    init_from: str | None = fixed(
        None,
        "weights to start from (fine-tuning): a run or checkpoint, a folder of Hugging Face, which"
        " sets the model's fields too, nanoGPT's ckpt.pt, our export",
    )
    # Optimizer. --opt.NAME= goes to its constructor. `optim` is fixed: none reads another's state.
    optim: str = fixed(
        "muon",
        "sgd, adamw, soap ...: a file in optim/, or file.Class; your own: put a file there",
    )
    hooks: str | None = fixed(
        None,
        "what changes its steps, in this order: hyperball,cautious_decay ...: files in hooks/;"
        " --hook.NAME.FIELD= sets a hook's field",
    )
    ema: float | None = on_branch(
        None,
        "horizon, in steps, of a running average of the weights: what is saved, sampled and, as"
        " val_loss_ema, evaluated",
        least=1,
    )
    ema_from: int = on_branch(0, "optimizer steps before the average begins", least=0)
    ema_share: float = on_branch(
        1.0, "of the average, in what is saved; the rest is the trained weights'", least=0
    )
    lr: float | None = on_branch(
        None, "peak learning rate; none = the optimizer's own default", least=0
    )
    weight_decay: float | None = on_branch(
        None, "none = the optimizer's own; matrices and head only", least=0
    )
    decay_embeddings: bool = on_branch(False, "weight_decay for embeddings too, as nanoGPT has it")
    embed_lr: float | None = on_branch(None, "lr of embeddings; none = lr, with Muon 0.01", least=0)
    head_lr: float | None = on_branch(
        None, "lr of an untied head; none = lr, with Muon 0.01", least=0
    )
    scalar_lr: float | None = on_branch(
        None, "lr of gains and biases; none = lr, with Muon 0.01", least=0
    )
    grad_clip: float | None = on_branch(
        1.0, "the gradient's global norm is scaled down to this", least=0
    )
    clip_value: float | None = on_branch(
        None, "first each gradient entry is cut to +-this", least=0
    )
    z_loss: float | None = on_branch(
        None,
        "this x (log Z)^2 of each token is minimised too, but not logged; usual: 1e-4",
        least=0,
    )
    ngram: int | None = fixed(
        None,
        "counted n-grams with up to this many tokens of context are the logits' prior"
        " (layers/ngram.py)",
        least=1,
    )
    qk_clip: float | None = on_branch(
        None,
        "heads whose attention logits exceed this are scaled back; usual: 100 (optim/qk_clip.py)",
        least=0,
    )
    # Spikes and faults. --monitor.NAME= goes to MonitorConfig (monitor.py).
    on_spike: Literal["warn", "skip", "rollback", "clip", "lr_cut", "abort"] | None = may_change(
        "skip", "what happens to a step whose loss or gradient jumps (monitor.py)"
    )
    on_nonfinite: Literal["warn", "skip", "rollback", "lr_cut", "abort"] | None = may_change(
        "skip", "the same for NaN and infinity; fp16's overflows are its loss scaler's"
    )
    on_divergence: Literal["warn", "abort"] | None = may_change(
        "warn", "a loss that stays above its start, or has risen for good (metrics/divergence.py)"
    )
    patience: int | None = may_change(
        None,
        "the run ends with its best weights after this many evaluations without a better loss",
        least=1,
    )
    min_delta: float = may_change(
        0.0, "for patience: a better loss is lower by more than this, nats", least=0
    )
    # Schedule. --schedule.NAME= goes to its function (schedules.py), which keeps no state.
    schedule: Literal["auto", *SHAPES] = may_change(
        "auto", "auto = wsd, and constant for Schedule-Free, which needs none"
    )
    warmup_frac: float = may_change(0.02, "share of the steps for linear warm-up", least=0, below=1)
    warmup_steps: int | None = may_change(None, "the same in steps; overrides warmup_frac", least=0)
    warmup_start: float | None = may_change(
        None, "share of lr where warm-up starts; none = 1/warmup", least=0
    )
    decay_frac: float = may_change(0.4, "wsd: share of the steps for the final decay", least=0)
    embed_decay_frac: float | None = may_change(
        None, "the same for embeddings; none = decay_frac", least=0
    )
    head_decay_frac: float | None = may_change(
        None, "the same for an untied head; none = decay_frac", least=0
    )
    scalar_decay_frac: float | None = may_change(
        None, "the same for gains and biases; none = decay_frac", least=0
    )
    min_lr_frac: float = may_change(0.0, "where the decay ends, as a share of lr", least=0)
    lr_scaling: Literal["linear", "sqrt"] | None = fixed(
        None, "scales each lr with batch_size/base_batch_size"
    )
    base_batch_size: int | None = fixed(None, "the batch size that lr was found at", least=1)
    mup_base_width: int | None = fixed(
        None, "muP: the n_embd that lr was found at; none = off", least=1
    )
    momentum_warmup: int | None = may_change(
        None, "first steps, over which momentum grows from 0.85 to its own", least=1
    )
    momentum_cooldown: int | None = may_change(
        None, "last steps, over which it goes back to 0.85", least=1
    )
    batch_ramp: int | None = fixed(None, "steps over which the batch grows to batch_size", least=1)
    batch_ramp_from: int | None = fixed(
        None, "sequences of the first step, and of each growth", least=1
    )
    # Numbers and layout. Checkpoints load on any layout, so a resumed run may have another.
    precision: Literal["auto", "fp64", "fp32", "bf16", "bf16_sr", "fp16", "fp8"] = fixed(
        "auto",
        "fp64: the oracle | bf16: autocast over fp32 weights | bf16_sr: bf16 weights, stochastic"
        " rounding | fp16: with loss scaling | fp8: the blocks' products | auto: fp32 or bf16, what"
        " is fast here",
    )
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] = may_change(
        "auto",
        "torch.compile of each block, and how; auto: default on a GPU, on a CPU where a run is long"
        " enough to pay for it",
    )
    data_parallel: Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp"] = may_change(
        "auto",
        "ddp: replicas | zero1, 2, 3: state, gradients, weights at owners | fsdp: in shards | auto:"
        " zero1 for Muon, SOAP and Shampoo, which it spreads over the ranks, else ddp",
    )
    fsdp_shard: int | None = may_change(
        None,
        "fsdp: ranks that share one copy, the others repeat it (hybrid); none = all, 1 = no"
        " sharding",
        least=1,
    )
    reshard: bool = may_change(True, "fsdp: weights are dropped after forward and gathered again")
    bucket_mb: float = may_change(25.0, "ddp, zero: size of a gradient bucket, MiB", least=0)
    reduce_dtype: Literal["fp32", "bf16"] | None = may_change(
        None, "zero, fsdp: dtype in which gradients are summed over ranks; none = their own"
    )
    compress: Literal["topk", "sign", "onebit", "powersgd", "fp16", "bf16"] | None = may_change(
        None, "ddp: gradients are sent compressed, with error feedback"
    )
    diloco_every: int | None = fixed(
        None, "ddp: replicas take this many steps alone, then average (another algorithm)", least=1
    )
    param_dtype: Literal["fp32", "bf16"] | None = may_change(
        None, "fsdp: dtype in which weights are gathered and used; none = their own"
    )
    tp: int = per_run(1, "tensor parallel: ranks among which each matrix is split", least=1)
    sp: bool = per_run(
        False, "sequence parallel: between matrices each tp rank has some of the tokens"
    )
    cp: int = per_run(1, "context parallel: ranks among which each sequence is split", least=1)
    cp_attention: Literal["ring", "ulysses"] = per_run(
        "ring", "keys and values go round | each rank has all tokens of some heads"
    )
    ep: int = per_run(1, "expert parallel: data-parallel ranks that share out the experts", least=1)
    pp: int = per_run(1, "pipeline parallel: stages of layers", least=1)
    pp_schedule: Literal["naive", "gpipe", "1f1b", "interleaved", "zerobubble"] = per_run(
        "1f1b", "the order in which a stage works on micro-batches"
    )
    pp_chunks: int | None = per_run(
        None, "interleaved: model chunks on each rank; none = 2", least=1
    )
    activation_checkpoint: str | None = may_change(
        None,
        "what backward computes again: full | full_sharded | full_offload | every_K | segments_K | "
        "attention | mlp | selective; or offload, which keeps it in host memory",
    )
    loss_chunk: int | Auto | None = may_change(
        "auto",
        "tokens whose logits are in memory at once; none = all; auto: all below 8192 words, else"
        " 512 on a CPU, 4096 on a GPU (layers/chunked_loss.py)",
        least=1,
    )
    offload: Literal["cpu", "disk"] | None = may_change(
        None, "where optimizer state waits: host memory, or files in out_dir"
    )
    offload_params: Literal["cpu", "disk"] | None = may_change(
        None, "zero3, fsdp: where weights wait between uses"
    )
    timeout_minutes: float = per_run(
        10.0,
        "a collective that waits this long for another rank ends the run",
        least=0.01,
        below=1e5,
    )
    # Looking and saving. Every *_every counts optimizer steps, whatever the batch size.
    histogram_every: int | None = may_change(
        None, "steps between counts of exponents of all tensors (precision/histogram.py)", least=1
    )
    watch_every: int | None = may_change(
        None,
        "steps between rows with attention logits, log Z, sizes of updates, loads of experts"
        " (metrics/watch.py, experts.py)",
        least=1,
    )
    log_every: int = may_change(1, "steps between train rows in metrics.jsonl", least=1)
    eval_every: int | None = may_change(
        60, "steps between evaluations, also at the end; 0 = never", least=0
    )
    save_every: int | None = may_change(
        100, "steps between checkpoints; 0 = only at the end", least=0
    )
    save_hours: float | None = may_change(
        None, "a checkpoint also after this many hours without one; 0 = after each step", least=0
    )
    keep: int | None = may_change(2, "checkpoints kept, the newest; none = all", least=1)
    keep_every: int | None = may_change(
        None, "steps between checkpoints that are kept for ever", least=1
    )
    async_save: bool = may_change(
        True, "write checkpoints beside training, which waits only for a copy in host memory"
    )
    plot: bool = per_run(True, "draw loss.png at the end; moe_load.png, of watched experts")
    report: bool = per_run(False, "write report.html at the end: the run on one page")
    tensorboard: bool = per_run(False, "also write to out_dir/tensorboard")
    wandb: str | None = per_run(
        None, "project of Weights & Biases to send numbers to; WANDB_MODE=offline keeps them here"
    )
    profile: str | None = per_run(
        None,
        "FIRST:LAST, steps whose traces go to out_dir/profile, LAST left out: 10:13 is three"
        " (metrics/profile.py)",
    )
    debug_ranks: bool = per_run(
        False,
        "each rank's steps, and its stacks when it hangs, go to out_dir/debug"
        " (parallel/watchdog.py)",
    )
    sample_tokens: int = may_change(
        200, "length of the sample printed at the end; 0 = none", least=0
    )
    peak_flops: float | None = may_change(
        None, "FLOP/s of one device, for MFU; none = by its name", least=0
    )

    # The dotted fields, such as "opt.betas" -> (0.9, 0.95). Their owners say which there are.
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        # The fields that the user gave. This guess misses one that was given its default, so the
        # parser, which knows what was typed, sets it anew.
        self.given = {
            f.name
            for f in fields(self)
            if f.name != "options" and getattr(self, f.name) != f.default
        }
        # What earlier commands of a resumed run gave: chosen() must not list it as a choice.
        self.given_earlier = set()

    def sub(self, namespace: str) -> dict:
        """The dotted fields of one namespace: sub("opt") -> {"betas": (0.9, 0.95)}."""
        prefix = namespace + "."
        return {
            name.removeprefix(prefix): value
            for name, value in self.options.items()
            if name.startswith(prefix)
        }


# Fields that mean nothing without n_expert.
OF_EXPERTS = (
    "n_expert_active",
    "n_shared_expert",
    "expert_width",
    "moe_every",
    "router",
    "normalize_gates",
    "router_z_loss",
    "moe_bias_lr",
    "moe_sequence_loss",
)
# Field -> the layouts of data_parallel that read it. Under the others it would do nothing.
LAYOUTS = dict(
    fsdp_shard="fsdp",
    reshard="fsdp",
    param_dtype="fsdp",
    reduce_dtype="zero1 zero2 zero3 fsdp",
    compress="ddp",
    diloco_every="ddp",
    offload_params="zero3 fsdp",
    bucket_mb="ddp zero1 zero2 zero3",
)
# The first words of dotted fields. Each has one owner, whose signature has the second words.
NAMESPACES = (
    "opt",
    "hook",
    "schedule",
    "compress",
    "diloco",
    "scaler",
    "fp8",
    "compile",
    "monitor",
)
# Kind of parameter -> the share of the steps for its decay, where it has one of its own.
DECAYS = dict(embedding="embed_decay_frac", head="head_decay_frac", scalar="scalar_decay_frac")
# Fields in which ~ is the home folder: a shell does not expand it behind the = of --data=~/text.
PATHS = ("out_dir", "data", "tokenizer", "data_dir", "resume", "init_from")
# Fields whose none the run replaces by a number, which config.toml records under [chosen].
CHOSEN = (
    "micro_batch_size",
    "document_token",
    "n_kv_head",
    "vocab_size",
    "lr",
    "weight_decay",
    "embed_lr",
    "head_lr",
    "scalar_lr",
)
# First field of a section of --help -> its heading.
SECTIONS = dict(
    out_dir="The run",
    data="Data",
    arch="Model",
    optim="Optimizer",
    on_spike="Spikes and faults",
    schedule="Schedule",
    precision="Numbers and layout",
    histogram_every="Looking and saving",
)
# --arch -> what its `auto` traits are. Each arch has all traits, so with_traits leaves no `auto`.
ARCHS = {
    "modern": dict(
        norm="rmsnorm",
        norm_eps=None,
        embed_norm=False,
        activation="relu2",
        position="rotary",
        rope_base=10000.0,
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
        norm_eps=None,
        embed_norm=False,
        activation="gelu",
        position="learned",
        rope_base=10000.0,
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
        norm_eps=None,
        embed_norm=True,
        activation="relu2",
        position="rotary_half",
        rope_base=10000.0,
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
    "llama": dict(
        norm="rmsnorm_gain",
        norm_eps=1e-5,
        embed_norm=False,
        activation="swiglu",
        position="rotary",
        rope_base=500000.0,
        qk_norm=False,
        attention_scale=None,
        tied=False,
        bias=False,
        head_bias=False,
        zero_init=False,
        init="gpt2",
        logit_cap=None,
        logit_cap_form="tanh",
    ),
}
ARCHS["qwen3"] = ARCHS["llama"] | dict(norm_eps=1e-6, rope_base=1000000.0, qk_norm="gain")
FIELDS = {f.name: f for f in fields(Config) if f.name != "options"}
TYPES = typing.get_type_hints(Config)
# Fields that a run may have to choose: the table [chosen] of config.toml holds them. The auto of
# resume is a rule that every start applies anew, not a choice.
OPEN = {name for name, f in FIELDS.items() if f.default == "auto" or name in CHOSEN} - {"resume"}


def trait(cfg: Config, name: str):
    """The model's trait of this name; where it is `auto`, the architecture's."""
    given = getattr(cfg, name)
    return ARCHS[cfg.arch][name] if given == "auto" else given


def with_traits(cfg: Config) -> Config:
    """`auto` traits replaced by the architecture's."""
    traits = {name: trait(cfg, name) for name in ARCHS[cfg.arch]}
    return update(cfg, n_kv_head=cfg.n_kv_head or cfg.n_head, **traits)


def head_size(cfg: Config) -> int:
    """The width of a head."""
    return cfg.head_dim or cfg.n_embd // cfg.n_head


def mlp_size(cfg: Config) -> int:
    """The width between the MLP's matrices, as GPTConfig in model.py has it."""
    if cfg.mlp_width is not None:
        return cfg.mlp_width
    if trait(cfg, "activation") == "swiglu":
        return -(-8 * cfg.n_embd // (3 * 64)) * 64
    return 4 * cfg.n_embd


def update(cfg: Config, **values) -> Config:
    """A copy with other values that remembers which fields the user gave."""
    # replace() runs __post_init__, which guesses `given` anew.
    new = replace(cfg, **values)
    new.given = set(cfg.given)
    new.given_earlier = set(cfg.given_earlier)
    return new


def chosen(cfg: Config) -> list[str]:
    """The fields that the run chose: no command gave them, and they have a value."""
    requested = cfg.given | cfg.given_earlier
    return [n for n in FIELDS if n in OPEN - requested and getattr(cfg, n) != FIELDS[n].default]


def flag(name: str, value) -> str:
    """What to type in a shell to give a field this value."""
    if not isinstance(value, (tuple, list)):
        text = plain(value)
    elif not value:
        text = "()"
    else:
        text = ",".join(map(plain, value))
        # Without a comma at its end one value would be read as a number, not as a tuple.
        if len(value) == 1:
            text += ","
    return f"--{name}={shlex.quote(text)}"


def plain(value) -> str:
    """A value as the command line has it: none, true, 0.1, text."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def model_chunks(cfg: Config) -> int:
    """How many runs of consecutive layers each rank of a pipeline has."""
    usual = 2 if cfg.pp_schedule == "interleaved" else 1
    return cfg.pp_chunks or usual
