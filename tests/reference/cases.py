"""The runs that are compared, a line for each, and the texts that they learn.

A case is one command or several, one after the other in the same folder. A command has the flags
TINY, then its own, which win. `needs` are words that must be on its screen or in its metrics.jsonl:
without them the case would be about nothing. A float64 case has a trace, stored in traces.json.

The texts are made here from fixed seeds: no file of the repository decides what a run learns.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TINY = (
    "--data=words.txt --out_dir=out --device=cpu --precision=fp64 --n_layer=2 --n_head=2 "
    "--n_embd=32 --block_size=32 --batch_size=8 --steps=6 --eval_every=3 --eval_tokens=256 "
    "--save_every=0 --sample_tokens=16 --plot=false"
)
# How far from its trace a float64 run may be, relative. With the plainest kernels of MKL the
# furthest run is 6e-15 away, and SOAP, which magnifies rounding, 4e-6. The log p of n-grams is a
# float32 logarithm, which CPUs round differently: 4e-9 away.
EXACT, AMPLIFIED = 1e-12, 1e-4
OWN, BARE = "own", "bare"


@dataclass(frozen=True)
class Command:
    """A line of a shell; TREE in it is the root of the checkout.

    status: what it exits with. stop: see launcher.py. how: OWN starts a new process, as a user
    does, with torchrun for several ranks; BARE leaves TINY out."""

    flags: str = ""
    ranks: int = 1
    status: int = 0
    stop: str | None = None
    how: str = ""
    script: str = "train.py"


@dataclass(frozen=True)
class Case:
    name: str
    commands: tuple[Command, ...]
    needs: tuple[str, ...]
    trace: float | None  # how far from it; None: there is none


def one(name: str, flags="", ranks=1, trace: float | None = EXACT, needs=(), **more) -> Case:
    """A case of one command."""
    return many(name, Command(flags, ranks, **more), trace=trace, needs=needs)


def many(name: str, *commands: Command, trace: float | None = EXACT, needs=()) -> Case:
    """A case of these commands. Without a trace where one of them is not in float64."""
    rough = any("--precision" in command.flags or command.how for command in commands)
    return Case(name, commands, tuple(needs), None if rough else trace)


def refused(name: str, *lines: str, ranks=1) -> Case:
    """Command lines that end with status 2."""
    return Case(name, tuple(Command(line, ranks, status=2) for line in lines), (), None)


# fmt: off
# ---- one process ---------------------------------------------------------------------------------
STEADY = "--dropout=0.1 --micro_batch_size=4"  # accumulation, and masks by sequence
SGD = f"{STEADY} --optim=sgd --opt.momentum=0.9 --opt.nesterov=true --weight_decay=0.1 --lr=0.1"
MUON = f"{STEADY} --optim=muon --weight_decay=0.1 --momentum_warmup=4 --decay_frac=0.5"
SOAP = "--optim=soap --opt.eps=1e-2 --lr=1e-3"
OPTIMIZERS = [
    one("sgd", SGD),
    one("adamw", f"{STEADY} --optim=adamw --schedule=cosine --warmup_steps=2 --min_lr_frac=0.1"),
    one("adam_l2",
        f"{STEADY} --optim=adam_l2 --weight_decay=0.01 --schedule=linear --warmup_start=0.5"),
    one("adafactor", f"{STEADY} --optim=adafactor --schedule=inverse_sqrt --warmup_steps=3"),
    one("lion", f"{STEADY} --optim=lion --schedule=sgdr --schedule.T_0=2"),
    one("lars", f"{STEADY} --optim=lars --schedule=onecycle --grad_clip=none"),
    one("lamb", f"{STEADY} --optim=lamb --schedule=constant --warmup_frac=0.5"),
    one("shampoo", f"{STEADY} --optim=shampoo --opt.eps=1e-4 --opt.precondition_frequency=3"),
    one("soap", f"{STEADY} {SOAP}", trace=AMPLIFIED),
    one("muon", MUON),
    one("schedule_free", f"{STEADY} --optim=schedule_free --save_every=3"),
    one("schedule_free_sgd", f"{STEADY} --optim=schedule_free.SGDScheduleFree --weight_decay=0.1"),
    one("lr_by_kind", "--embed_lr=0.02 --head_lr=0.005 --weight_decay=0.1 --decay_embeddings=true"),
    one("lr_scaling", "--lr_scaling=sqrt --base_batch_size=32 --clip_value=0.001"),
    one("mup", "--optim=adamw --mup_base_width=16"),
    one("batch_ramp", "--optim=adamw --batch_ramp=4 --batch_ramp_from=2"),
]
MODELS = [
    one("gpt2", "--arch=gpt2 --optim=adamw --dropout=0.1 --scalar_lr=0.002"),
    one("track3", "--arch=track3 --attention=plain"),
    one("grouped_queries", "--n_head=4 --n_kv_head=2 --tied=true --logit_cap_form=root"),
    one("traits", "--norm=layernorm --activation=gelu --position=learned --bias=true --init=torch"),
    one("window_ngram", "--window=8 --ngram=3 --z_loss=1e-4", trace=AMPLIFIED),
    one("ngram_embed", "--ngram_embed=3 --ngram_rows=512 --eval_rows=first"),
    one("qk_clip",
        "--qk_norm=false --qk_clip=0.01 --watch_every=2 --optim=adamw", needs=["max_logit"]),
    one("histogram_watch",
        "--histogram_every=2 --watch_every=2 --log_every=2", needs=["max_logit"]),
]
CHECKPOINTED = "--n_layer=4 --optim=adamw --dropout=0.1"
KINDS = "full full_offload every_2 segments_2 attention mlp selective offload".split()
RECOMPUTED = [one(f"recompute_{kind}", f"{CHECKPOINTED} --activation_checkpoint={kind}")
              for kind in KINDS]
PRECISIONS = [
    one("fp32", "--precision=fp32 --save_every=3"),
    one("fp32_shampoo", "--precision=fp32 --optim=shampoo"),
    one("bf16", "--precision=bf16"),
    one("bf16_plain", "--precision=bf16 --attention=plain --optim=adamw --opt.fused=true"),
    one("bf16_sr", "--precision=bf16_sr --optim=adamw"),
    one("fp16", "--precision=fp16 --optim=adamw --scaler.window=2"),
    one("fp16_overflow",
        "--precision=fp16 --optim=adamw --scaler.init_power=40", needs=["overflowed"]),
    one("fp8", "--precision=fp8 --optim=adamw"),
    one("fp8_tensor", "--precision=fp8 --optim=adamw --fp8.scaling=tensor"),
]
COMPILED = [  # slow, a minute or so on one core, if torch has not kept what it compiled
    one("compiled",
        "--precision=fp32 --optim=adamw --compile=default --n_layer=1 --steps=3", how=OWN),
] if any(map(shutil.which, ("c++", "g++", "clang++"))) else []

# ---- ranks ---------------------------------------------------------------------------------------
COMPRESSED = "--data_parallel=ddp --optim=adamw --save_every=3"
OFFLOADED = "--offload=cpu --offload_params=cpu"
ON_DISK = "--offload=disk --offload_params=disk"
DATA_PARALLEL = [
    one("ddp", "--data_parallel=ddp --micro_batch_size=2 --dropout=0.1 --bucket_mb=0.01", 2),
    one("zero1", "--data_parallel=zero1 --micro_batch_size=2 --dropout=0.1", 2),
    one("zero1_soap", f"--data_parallel=zero1 {SOAP}", 2, AMPLIFIED),
    one("zero2", "--data_parallel=zero2 --micro_batch_size=2 --bucket_mb=0.01 --watch_every=2", 2),
    one("zero3", "--data_parallel=zero3 --micro_batch_size=2 --save_every=3", 2),
    one("zero3_adamw", "--data_parallel=zero3 --optim=adamw --dropout=0.1", 2),
    one("zero3_schedule_free", "--data_parallel=zero3 --optim=schedule_free --save_every=3", 2),
    one("fsdp", "--data_parallel=fsdp --micro_batch_size=2 --dropout=0.1 --save_every=3", 2),
    one("fsdp_adamw", "--data_parallel=fsdp --optim=adamw --reshard=false --watch_every=2", 2),
    one("fsdp_no_shard", "--data_parallel=fsdp --fsdp_shard=1 --optim=adamw", 2),
    one("fsdp_hybrid", "--data_parallel=fsdp --fsdp_shard=2", 4),
    one("fsdp_bf16",
        "--precision=fp32 --data_parallel=fsdp --param_dtype=bf16 --reduce_dtype=bf16", 2),
    one("zero2_bf16",
        "--precision=fp32 --data_parallel=zero2 --reduce_dtype=bf16 --micro_batch_size=2", 2),
    one("zero1_fp32",
        "--precision=bf16_sr --data_parallel=zero1 --reduce_dtype=fp32 --optim=adamw", 2),
    one("zero1_fp16", "--precision=fp16 --data_parallel=zero1 --scaler.init_power=40", 2,
        needs=["overflowed"]),
    one("ddp_fp8", "--precision=fp8 --optim=adamw --fp8.scaling=row", 2),
    one("offload_cpu", "--optim=adamw --offload=cpu"),
    one("offload_disk", "--offload=disk --data_parallel=zero1", 2),
    one("zero3_offload_cpu", f"--data_parallel=zero3 {OFFLOADED}", 2),
    one("zero3_offload_disk", "--data_parallel=zero3 --offload_params=disk --optim=adamw", 2),
    one("fsdp_offload_cpu", f"--data_parallel=fsdp {OFFLOADED} --optim=adamw", 2),
    one("fsdp_offload_disk", f"--data_parallel=fsdp {ON_DISK}", 2),
    one("diloco", "--diloco_every=3 --optim=adamw --diloco.momentum=0.8", 2),
    one("powersgd", f"{COMPRESSED} --compress=powersgd --compress.rank=2", 2),
    one("topk", f"{COMPRESSED} --compress=topk --compress.fraction=0.1", 2),
    one("sign", f"{COMPRESSED} --compress=sign", 2),
    one("onebit", f"{COMPRESSED} --compress=onebit", 2),
    one("compress_fp16", f"{COMPRESSED} --compress=fp16", 2),
    one("compress_bf16", f"{COMPRESSED} --compress=bf16", 2),
]
DEEP = "--n_layer=4 --micro_batch_size=2 --dropout=0.1"
MODEL_PARALLEL = [
    one("tp", "--tp=2 --dropout=0.1 --watch_every=2", 2),
    one("tp_gpt2", "--tp=2 --arch=gpt2 --optim=adamw --activation_checkpoint=full_sharded", 2),
    one("tp_sp", "--tp=2 --sp=true --dropout=0.1 --save_every=3", 2),
    one("cp_ring", "--cp=2 --dropout=0.1", 2),
    one("cp_ulysses", "--cp=2 --cp_attention=ulysses --window=8", 2),
    one("pp_naive", f"{DEEP} --pp=2 --pp_schedule=naive --optim=adamw", 2),
    one("pp_gpipe", f"{DEEP} --pp=2 --pp_schedule=gpipe", 2),
    one("pp_1f1b", f"{DEEP} --pp=2 --pp_schedule=1f1b", 2),
    one("pp_interleaved", f"{DEEP} --pp=2 --pp_schedule=interleaved --optim=adamw", 2),
    one("pp_zerobubble", f"{DEEP} --pp=2 --pp_schedule=zerobubble", 2),
    one("pp_tied", f"{DEEP} --pp=2 --arch=gpt2 --optim=adamw", 2),
    one("dp_tp", "--tp=2 --data_parallel=ddp --optim=adamw", 4),
    one("fsdp_tp_sp", "--tp=2 --sp=true --data_parallel=fsdp --optim=adamw", 4),
    one("tp_pp", f"{DEEP} --tp=2 --pp=2", 4),
    one("zero1_pp",
        f"{DEEP} --pp=2 --pp_schedule=interleaved --data_parallel=zero1 {SOAP}", 4, AMPLIFIED),
    one("fsdp_pp", f"{DEEP} --pp=2 --data_parallel=fsdp --optim=adamw", 4),
    one("zero1_cp", "--cp=2 --data_parallel=zero1", 4),
    one("zero1_tp", "--tp=2 --data_parallel=zero1 --save_every=3", 4),
]

# ---- what happens to a run -----------------------------------------------------------------------
SPIKY = ("--data=spiky.txt --steps=24 --eval_every=8 --optim=adamw --lr=1e-2 --monitor.warmup=4 "
         "--monitor.detector=previous --monitor.factor=1.1 --monitor.recover=4")
BACK = "--on_spike=rollback --monitor.ring_every=3 --monitor.rollbacks=9"
DISK = (f"{BACK} --monitor.ring=0 --monitor.factor=1.6 --seed=1 --save_every=4 --async_save=false "
        "--keep=none")
DIVERGING = ("--arch=gpt2 --optim=sgd --lr=1e200 --grad_clip=none --weight_decay=0 "
             "--monitor.accept=3 --sample_tokens=0")
SPIKE, NONFINITE, ROLLBACK = '"event": "spike"', '"event": "nonfinite"', '"event": "rollback"'
ABORT = '"action": "abort"'
FAULTS = [
    one("spike_warn", f"{SPIKY} --on_spike=warn", needs=[SPIKE]),
    one("spike_skip", f"{SPIKY} --on_spike=skip", needs=[SPIKE]),
    one("spike_clip", f"{SPIKY} --on_spike=clip", needs=[SPIKE]),
    one("spike_lr_cut", f"{SPIKY} --on_spike=lr_cut", needs=[SPIKE]),
    one("spike_abort", f"{SPIKY} --on_spike=abort", status=1, needs=[SPIKE, ABORT]),
    one("spike_rollback", f"{SPIKY} {BACK}", needs=[ROLLBACK]),
    one("spike_given_up", f"{SPIKY} {BACK} --monitor.recover=100 --monitor.rollbacks=2", status=1,
        needs=[ROLLBACK, ABORT]),
    one("spike_disk", f"{SPIKY} {DISK}", needs=[ROLLBACK]),
    one("spike_zero3", f"{SPIKY} {BACK} --data_parallel=zero3 --optim=muon", 2, needs=[ROLLBACK]),
    one("spike_ema",
        f"{SPIKY} --monitor.detector=ema+grad_norm --monitor.factor=1.05 --monitor.decay=0.5",
        needs=['"detector": "ema"']),
    one("spike_window",
        f"{SPIKY} --monitor.detector=window --monitor.factor=1.05 --monitor.window=4",
        needs=['"detector": "window"']),
    one("spike_robust", "--data=spiky.txt --steps=40 --optim=adamw --lr=1e-2 --monitor.z=3",
        needs=['"detector": "robust"']),
    one("nonfinite_skip", f"{DIVERGING} --on_nonfinite=skip", status=1, needs=[NONFINITE, ABORT]),
    one("nonfinite_rollback",
        f"{DIVERGING} --on_nonfinite=rollback", status=1, needs=[NONFINITE, ROLLBACK]),
    one("nonfinite_lr_cut",
        f"{DIVERGING} --on_nonfinite=lr_cut", status=1, needs=[NONFINITE, ABORT]),
    one("nonfinite_warn", f"{DIVERGING} --on_nonfinite=warn", needs=[NONFINITE]),
    one("patience", "--optim=sgd --lr=3 --steps=20 --eval_every=2 --patience=2 --min_delta=0.01",
        needs=["the best weights are"]),
]
SAVED = "--save_every=2 --async_save=false"
TERM, KILL = "TERM:.tmp-step-00000002/index.json", "KILL:.tmp-step-00000004/index.json"
BRANCH = "--resume=out/step-00000002 --out_dir=branch --lr=0.01 --schedule=linear --data=spiky.txt"
ENDINGS = [
    many("more_steps", Command("--steps=3 --optim=adamw"), Command("--steps=6 --optim=adamw")),
    many("finished", Command("--steps=3"), Command("--steps=3"), needs=["is finished at step 3"]),
    many("terminated", Command(SAVED, stop=TERM), Command(SAVED)),
    many("killed", Command(SAVED, status=-9, stop=KILL), Command(SAVED)),
    many("terminated_zero3", Command(f"{SAVED} --data_parallel=zero3", 2, stop=TERM),
         Command(f"{SAVED} --data_parallel=zero3", 2)),
    many("other_layouts", Command("--steps=2 --tp=2", 2),
         Command("--steps=4 --data_parallel=zero3", 2), Command("--steps=6")),
    many("fewer_replicas", Command("--steps=3 --data_parallel=ddp --compress=topk", 2),
         Command("--steps=6 --data_parallel=ddp --compress=none"),
         needs=["compression had not sent"]),
    many("branch", Command("--steps=4 --save_every=2 --keep=none"), Command(BRANCH),
         Command(f"{BRANCH} --steps=7")),
    many("anew", Command("--steps=2"), Command("--steps=3 --resume=never --optim=adamw")),
    many("fine_tuning", Command("--steps=3"),
         Command("--init_from=out --out_dir=tuned --optim=adamw --steps=3")),
    many("rollback_resumed", Command(f"{SPIKY} {BACK} --steps=13"), Command(f"{SPIKY} {BACK}"),
         needs=[ROLLBACK]),
    one("debug_ranks_plot", "--debug_ranks=true --plot=true", 2),
    many("sample", Command("--steps=3 --precision=fp32"),
         Command("out --prompt=ka --tokens=40 --device=cpu", how=BARE, script="sample.py")),
]
DATA = [
    one("folder_of_texts", "--data=texts --optim=adamw"),
    one("list_of_texts", "--data=words.txt,spiky.txt --optim=adamw"),
    one("shards", "--data=shards --tokenizer=ids --vocab_size=300 --optim=adamw", 2),
]

# ---- the command line ----------------------------------------------------------------------------
SMALL = ("--plot=false --device=cpu --n_embd=32 --n_head=2 --block_size=32 --batch_size=4 "
         "--micro_batch_size=2 --steps=2 --data=words.txt --eval_tokens=64 --sample_tokens=8 "
         "--threads=1")
SMALLER = f"{SMALL} --tokenizer=bytes --vocab_size=256 --n_layer=2 --precision=bf16 --compile=off"
RECIPES = dict(cpu=SMALL, nanogpt_cpu=SMALL, cpu_speedrun=SMALL, gpt2_124m=SMALLER, track3=SMALLER,
               speedrun=SMALLER)
USERS = [
    one("python",
        "--data=python --n_layer=1 --n_embd=32 --block_size=64 --steps=3 --eval_tokens=512",
        how=f"{OWN} {BARE}"),
    one("torchrun", "--optim=adamw", 2, how=OWN),
    many("recipes", *[Command(f"TREE/configs/{name}.toml --out_dir={name} {flags}", how=BARE)
                      for name, flags in RECIPES.items()]),
    one("help", "--help", how=f"{OWN} {BARE}"),
]
REFUSALS = [
    refused("refused_flags", "--learning_rate=0.1", "--stepz=3", "--steps", "--steps=many",
            "--steps=0", "--steps=", "--optim=adm", "--opt.beta=0.9 --optim=adamw",
            "--opt.betas=0.9 --optim=adamw", "--no_tied=true", "missing.toml", "--schedule.T_0=2",
            "--monitor.detector=nose", "--monitor.decay=0.5", "--device=warp"),
    refused("refused_pairs", "--fsdp_shard=2", "--sp=true", "--n_embd=33", "--n_embd=30",
            "--window=32", "--qk_clip=100", "--pp=4", "--data_parallel=zero2 --tp=2",
            "--ngram=3 --cp=2", "--batch_ramp=3", "--compress=topk --diloco_every=2",
            "--compress=topk --on_spike=rollback", "--grad_clip=0", "--patience=2 --eval_every=0",
            "--scaler.window=3", "--attention=flex --n_embd=16", "--lr_scaling=sqrt",
            "--logit_cap=none --logit_cap_form=root", "--batch_size=6 --micro_batch_size=4"),
    refused("refused_paths", "--data=missing.txt", "--data=shakespear", "--resume=nowhere",
            "--init_from=nowhere", "--data=shards", "--out_dir=words.txt", "--tokenizer=gpt5"),
    refused("refused_ranks", "--tp=4", "--batch_size=7", "--tp=2 --compress=topk", ranks=2),
    many("refused_runs", Command("--steps=2"), Command("--steps=4 --lr=0.5", status=2),
         Command("--steps=4 --n_layer=3", status=2), Command("--steps=4 --optim=adamw", status=2),
         Command("--resume=out --out_dir=new --n_embd=64", status=2),
         Command("--resume=out --steps=4", status=2),
         Command("--resume=out --out_dir=new --steps=2", status=2),
         Command("--steps=4 --data=spiky.txt", status=2)),
]
# fmt: on

CASES = [
    *OPTIMIZERS,
    *MODELS,
    *RECOMPUTED,
    *PRECISIONS,
    *COMPILED,
    *DATA_PARALLEL,
    *MODEL_PARALLEL,
    *FAULTS,
    *ENDINGS,
    *DATA,
    *USERS,
    *REFUSALS,
]
# What is meant to differ from the base. A case that is in CHANGED is run, but not compared; where
# only what people read has changed, REWORDED has the words of the base and ours.
CHANGED: dict[str, str] = {}  # case: why
REWORDED: dict[str, str] = {}  # words of the base: our words


# ---- the texts -----------------------------------------------------------------------------------
def draws(seed: int) -> Iterator[int]:
    """Numbers below 2^31, the same on every machine and in every version of Python."""
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
        yield seed >> 33


def words(seed: int, length: int) -> bytes:
    """Lines of made-up words, a letter of two bytes among them."""
    parts = ("ka", "lo", "mi", "re", "nu", "sta", "ten", "bro", "é", "sh", "al", "or")
    ends = (" ", " ", ", ", ".\n")
    number, text = draws(seed), ""
    while len(text) < length:
        text += "".join(parts[next(number) % 12] for _ in range(1 + next(number) % 3))
        text += ends[next(number) % 4]
    return text.encode()


def spiky() -> bytes:
    """What is soon learnt and, in it, a passage of noise: a batch that meets it is a spike."""
    number = draws(11)
    plain = b"".join((b"ab ", b"ab ", b"abc ", b"ab, ")[next(number) % 4] for _ in range(5000))
    noise = bytes(next(number) % 256 for _ in range(400))
    return plain[:6000] + noise + plain[6000:]


def shard(seed: int, length: int) -> bytes:
    """Token ids below 300, two bytes each; two in three are below 30."""
    number = draws(seed)
    limits = (300, 30, 30)
    return b"".join((next(number) % limits[i % 3]).to_bytes(2, "little") for i in range(length))


def write_texts(folder: Path) -> None:
    files = {
        "words.txt": words(7, 24000),
        "spiky.txt": spiky(),
        "texts/a.txt": words(1, 6000),
        "texts/b.txt": words(2, 6000),
        "texts/val.txt": words(3, 3000),
        "shards/train.bin": shard(4, 9000),
        "shards/val.bin": shard(5, 2000),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
