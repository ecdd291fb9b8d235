"""Which settings fit together.

Every mistake is a ValueError whose one line says what came, what is allowed and what to type.

    check            a number out of its range, and fields that contradict each other
    check_options    dotted fields against the signature of what they belong to
"""

import difflib
import importlib.util
import inspect
import math
import re

import schedules
from settings.fields import (
    ARCHS,
    DECAYS,
    FIELDS,
    LAYOUTS,
    OF_EXPERTS,
    Config,
    flag,
    head_size,
    mlp_size,
    model_chunks,
    plain,
    trait,
)


def check(cfg: Config, has_traits: bool = True, has_experts: bool = True) -> Config:
    """The same config if every field, and the fields together, make sense; else ValueError.

    has_traits: False where --init_from= may yet bring the model's traits (run/pretrained.py).
    has_experts: False where the run that this one branches off may yet bring some.
    """
    check_ranges(cfg)
    check_text(cfg)
    if has_traits:
        check_heads(cfg)
        check_attention(cfg)
        check_positions(cfg)
        check_experts(cfg, has_experts)
        check_model_parallel(cfg)
        check_qk_clip(cfg)
    check_schedule(cfg)
    check_batch(cfg)
    check_data_parallel(cfg)
    check_packages(cfg)
    check_owners(cfg)
    check_replicas_apart(cfg)
    check_early_stopping(cfg)
    check_ema(cfg)
    check_zeros(cfg)
    profiled_steps(cfg.profile, cfg.steps)
    return cfg


def check_ranges(cfg: Config) -> None:
    for name, f in FIELDS.items():
        value = getattr(cfg, name)
        least = f.metadata["least"]
        below = f.metadata["below"]
        if not is_number(value):
            continue
        # A bound for every field: else --block_size=1e30 would pass and overflow deep inside torch.
        if below is None:
            below = 2**31 if type(value) is int else math.inf
        # Compared first: isfinite raises for an int that is too large for a float. NaN fails too.
        if not (least <= value < below and math.isfinite(value)):
            value = str(value)[:40]
            raise ValueError(
                f"{name}={value} is out of range; it must be at least {least} and below {below}"
            )


def profiled_steps(profile: str | None, steps: int) -> range:
    """The steps of --profile=FIRST:LAST, of which 1 is the first; none where it is off.

    steps: of the run. Raises ValueError for what is no range, or begins after them.
    """
    if profile is None:
        return range(0)
    numbers = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", profile)
    if not numbers or not 1 <= int(numbers[1]) < int(numbers[2]):
        raise ValueError(
            f"profile={profile[:40]} is no range of steps FIRST:LAST, of which 1 is the first"
            " and LAST is left out; type --profile=10:13 for steps 10, 11 and 12"
        )
    if int(numbers[1]) > steps:
        first = max(1, steps - 2)
        raise ValueError(
            f"profile={profile} begins after the last step, {steps}; type"
            f" --profile={first}:{steps + 1}, or more steps"
        )
    return range(int(numbers[1]), int(numbers[2]))


def check_text(cfg: Config) -> None:
    values = {name: getattr(cfg, name) for name in FIELDS} | cfg.options
    for name, value in values.items():
        # Python makes lone surrogates of argv's bytes that are not UTF-8. TOML cannot hold them.
        if any("\ud800" <= letter <= "\udfff" for letter in str(value)):
            what = f"{name}={ascii(value)[:200]} is no text in UTF-8"
            raise ValueError(f"{what}; rename it, or type another")


def check_heads(cfg: Config) -> None:
    """The width divides into heads, and a head into the pairs that rotary positions turn."""
    position = trait(cfg, "position")
    size = head_size(cfg)
    parts = {"rotary": 2, "rotary_half": 4}.get(position, 1)
    if cfg.head_dim is None and cfg.n_embd % cfg.n_head:
        # No number of heads fits some widths (odd ones under rotary): then hint at a wider model.
        counts = range(1, min(cfg.n_embd, 10**4) + 1)
        fits = [n for n in counts if cfg.n_embd % n == 0 and cfg.n_embd // n % parts == 0]
        if fits:
            best = f"--n_head={min(fits, key=lambda n: abs(n - cfg.n_head))}"
        else:
            wider = -(-cfg.n_embd // (parts * cfg.n_head)) * parts * cfg.n_head
            best = f"--n_embd={wider}"
        raise ValueError(
            f"n_embd={cfg.n_embd} is not divisible by n_head={cfg.n_head}; for instance {best}"
        )
    if cfg.n_head % (cfg.n_kv_head or cfg.n_head):
        fits = divisor(cfg.n_head, cfg.n_kv_head)
        raise ValueError(
            f"n_head={cfg.n_head} is not divisible by n_kv_head={cfg.n_kv_head}; "
            f"for instance --n_kv_head={fits}"
        )
    if size % parts:
        what = "n_embd/n_head" if cfg.head_dim is None else "head_dim"
        raise ValueError(
            f"position={position} needs a head size divisible by {parts}, not {what} "
            f"= {size}; type --head_dim={-(-size // parts) * parts}, or --position=learned"
        )


def check_attention(cfg: Config) -> None:
    """Attention, logits, and the table of n-gram embeddings."""
    scale = trait(cfg, "attention_scale")
    form = cfg.logit_cap_form
    # muP multiplies q.k by 8/head size. attention_scale would replace that factor.
    if cfg.mup_base_width is not None and scale is not None:
        raise ValueError(
            f"attention_scale={scale:g} fixes what mup_base_width sets to 8/head size; type "
            "--attention_scale=none, or leave mup_base_width out"
        )
    # A recipe may repeat the architecture's own form; only another one asks for a cap.
    if trait(cfg, "logit_cap") is None and form not in ("auto", ARCHS[cfg.arch]["logit_cap_form"]):
        raise ValueError(
            f"logit_cap_form={form} has no meaning with logit_cap=none; type --logit_cap=15"
        )
    # It would change nothing: no query has that many tokens to see.
    if cfg.window is not None and cfg.window >= cfg.block_size:
        raise ValueError(
            f"window={cfg.window} is no window over block_size={cfg.block_size} tokens; type a "
            "smaller one, or leave it out"
        )
    size = head_size(cfg)
    if cfg.attention == "flex" and size < 16:
        raise ValueError(
            f"attention=flex has no kernel for heads of {size}, 16 is the "
            "least; type a smaller --n_head=, or --attention=sdpa"
        )
    if cfg.attention == "flex" and cfg.precision == "fp64":
        raise ValueError(
            "attention=flex has no kernel for float64; type --precision=fp32, or --attention=sdpa"
        )
    if cfg.document_token is not None and not cfg.document_mask and cfg.pack is None:
        raise ValueError(
            "document_token has no meaning without document_mask or pack; type "
            "--document_mask=true or --pack=best_fit too"
        )
    if cfg.document_mask and cfg.ngram is not None:
        raise ValueError(
            "ngram counts across documents and is incompatible with document_mask; type "
            "--document_mask=false, or leave ngram out"
        )
    if cfg.ngram_embed is None and cfg.ngram_rows != FIELDS["ngram_rows"].default:
        raise ValueError("ngram_rows has no meaning without ngram_embed; type --ngram_embed=5 too")


def check_experts(cfg: Config, has_experts: bool) -> None:
    """Mixture of experts, with itself and with the rest."""
    if cfg.n_expert is None:
        for name in (*OF_EXPERTS, "ep") if has_experts else ():
            if getattr(cfg, name) not in (None, FIELDS[name].default):
                raise ValueError(f"{name} means nothing without experts; type --n_expert=8 too")
        return
    if cfg.n_expert_active > cfg.n_expert:
        raise ValueError(
            f"n_expert_active={cfg.n_expert_active} of a token are more than n_expert="
            f"{cfg.n_expert}; type --n_expert_active={min(2, cfg.n_expert)}"
        )
    if cfg.n_expert_active == 1 and cfg.normalize_gates:
        raise ValueError(
            "n_expert_active=1 with normalize_gates=true: the gate is always 1, and the loss tells "
            "the router nothing; type --normalize_gates=false"
        )
    if cfg.moe_every > cfg.n_layer:
        raise ValueError(
            f"moe_every={cfg.moe_every} leaves none of {cfg.n_layer} layers with experts; type "
            f"--moe_every={cfg.n_layer}, or less"
        )
    if cfg.n_expert % cfg.ep:
        raise ValueError(
            f"ep={cfg.ep} does not divide n_expert={cfg.n_expert}; type "
            f"--n_expert={-(-cfg.n_expert // cfg.ep) * cfg.ep}"
        )
    check_expert_parallel(cfg)
    if cfg.mup_base_width is not None:
        raise ValueError(
            "mup_base_width has no rule for experts and their router; leave one of them out"
        )


def check_expert_parallel(cfg: Config) -> None:
    """What cannot go with experts on some of the data-parallel ranks alone."""
    if cfg.ep == 1:
        return
    if cfg.data_parallel in ("zero2", "zero3"):
        raise ValueError(
            f"ep={cfg.ep} is not there for data_parallel={cfg.data_parallel}; type "
            "--data_parallel=zero1 or fsdp, or leave ep out"
        )
    for name in ("compress", "diloco_every", "offload", "offload_params", "fsdp_shard"):
        if getattr(cfg, name) is not None:
            raise ValueError(f"ep={cfg.ep} is incompatible with {name}; leave one of them out")
    if cfg.precision == "bf16_sr":
        raise ValueError(
            f"ep={cfg.ep} is incompatible with precision=bf16_sr; type --precision=bf16"
        )


def check_positions(cfg: Config) -> None:
    """Fields of rotary positions, where there are none, or with frequencies of their own."""
    position = trait(cfg, "position")
    has_own = {"learned": "has no frequencies", "rotary_half": "has a base of its own, 1024"}
    for name in ("rope_base", "rope_scaling"):
        # A value that an earlier run chose is not in `given`.
        is_given = name in cfg.given and getattr(cfg, name) not in ("auto", None)
        if is_given and position in has_own:
            raise ValueError(
                f"{name}={getattr(cfg, name)} has no meaning: position={position} "
                f"{has_own[position]}; type --position=rotary, or leave {name} out"
            )


def check_schedule(cfg: Config) -> None:
    """Fields that have no meaning for the schedule that was typed.

    For one that `auto` chose, run/announce.py warns.
    """
    is_typed = "schedule" in cfg.given and cfg.schedule != "auto"
    for name in ("decay_frac", *DECAYS.values()):
        has_decay = getattr(cfg, name) != FIELDS[name].default
        if is_typed and has_decay and not schedules.takes(cfg.schedule, "decay"):
            raise ValueError(
                f"{name} has no meaning for schedule={cfg.schedule}; leave it out, or"
                " --schedule=wsd"
            )
    if is_typed and cfg.min_lr_frac and not schedules.takes(cfg.schedule, "minimum"):
        raise ValueError(
            f"min_lr_frac has no meaning for schedule={cfg.schedule}, which never decays; leave it"
            " out"
        )
    # Checked here, because a field's `below` excludes its bound, and a share of 1 is allowed.
    for name in ("decay_frac", *DECAYS.values(), "min_lr_frac", "warmup_start"):
        if (getattr(cfg, name) or 0) > 1:
            raise ValueError(f"{name}={getattr(cfg, name)} is a share, from 0 to 1")


def check_batch(cfg: Config) -> None:
    if (cfg.lr_scaling is None) != (cfg.base_batch_size is None):
        raise ValueError(
            "lr_scaling and base_batch_size go together: --lr_scaling=sqrt --base_batch_size=32"
        )
    if (cfg.batch_ramp is None) != (cfg.batch_ramp_from is None):
        raise ValueError(
            "batch_ramp and batch_ramp_from go together: --batch_ramp=1000 --batch_ramp_from=8"
        )
    if cfg.batch_ramp_from is not None and cfg.batch_size % cfg.batch_ramp_from:
        fits = divisor(cfg.batch_size, cfg.batch_ramp_from)
        raise ValueError(
            f"batch_ramp_from={cfg.batch_ramp_from} does not divide batch_size="
            f"{cfg.batch_size}; for instance --batch_ramp_from={fits}"
        )


def check_data_parallel(cfg: Config) -> None:
    """Fields that only some layouts have."""
    # `auto` becomes ddp or zero1 later (run/auto.py). Until then only ddp's fields are safe.
    layout = cfg.data_parallel.replace("auto", "ddp")
    for name, layouts in LAYOUTS.items():
        if getattr(cfg, name) != FIELDS[name].default and layout not in layouts.split():
            others = " or ".join(f"--data_parallel={other}" for other in layouts.split())
            raise ValueError(
                f"{name} does not work with data_parallel={cfg.data_parallel}; "
                f"leave it out, or type {others}"
            )


def check_model_parallel(cfg: Config) -> None:
    """tp, sp, cp and pp, with each other and with the rest."""
    split = [name for name in ("tp", "pp") if getattr(cfg, name) > 1]
    check_tensor_parallel(cfg)
    check_context_parallel(cfg)
    check_ngrams(cfg, split)
    check_pipeline(cfg, split)
    if cfg.activation_checkpoint == "full_sharded" and (cfg.sp or cfg.tp == 1):
        raise ValueError(
            "activation_checkpoint=full_sharded shares out what tp ranks hold alike, with tp=1 "
            "or sp=true nothing is; type --activation_checkpoint=full"
        )
    for name in ("compress", "diloco_every"):
        clashing = list(split)
        # Between rounds DiLoCo's replicas have different weights, and cp ranks share one sequence.
        if cfg.cp > 1 and name == "diloco_every":
            clashing.append("cp")
        if getattr(cfg, name) is not None and clashing:
            raise ValueError(
                f"{name} works between full models and is incompatible with {clashing[0]}; leave "
                "one of them out"
            )


def check_tensor_parallel(cfg: Config) -> None:
    heads = cfg.n_kv_head or cfg.n_head
    # A rank holds whole heads: of queries, and of the keys and values that these read.
    for name, number in (("n_head", cfg.n_head), ("n_kv_head", heads)):
        if number % cfg.tp:
            fits = divisor(math.gcd(cfg.n_head, heads), cfg.tp)
            raise ValueError(
                f"tp={cfg.tp} does not divide {name}={number}, and a head is not split; "
                f"--tp={fits} would"
            )
    width = mlp_size(cfg)
    if width % cfg.tp:
        raise ValueError(
            f"tp={cfg.tp} does not divide the MLP's width, {width}; type"
            f" --mlp_width={-(-width // cfg.tp) * cfg.tp}"
        )
    if cfg.sp and cfg.tp == 1:
        raise ValueError(
            "sp=true splits tokens among the ranks of tensor parallelism; type --tp=2, or more"
        )


def check_context_parallel(cfg: Config) -> None:
    is_ring = cfg.cp > 1 and cfg.cp_attention == "ring"
    # Causal attention costs late tokens more: each rank of a ring has an early and a late chunk.
    for_cp = cfg.cp * 2 if is_ring else cfg.cp
    # Sequence parallelism splits the tokens of a cp rank once more, over its tp ranks.
    for_sp = cfg.cp * cfg.tp if cfg.sp else cfg.cp
    parts = math.lcm(for_cp, for_sp)
    if cfg.block_size % parts:
        better = -(-cfg.block_size // parts) * parts
        raise ValueError(
            f"cp={cfg.cp} and sp={str(cfg.sp).lower()} cut a sequence into {parts} equal parts; "
            f"block_size={cfg.block_size} cannot be, try --block_size={better}"
        )
    only = (("window", (None,)), ("attention", ("auto", "sdpa")), ("document_mask", (False,)))
    for name, usual in only:
        value = getattr(cfg, name)
        if is_ring and value not in usual:
            raise ValueError(
                f"{name}={plain(value)} is incompatible with cp_attention=ring, which has an "
                "attention of its own; type --cp_attention=ulysses"
            )
    # Ulysses trades tokens for heads: each rank gets all tokens of some heads.
    heads = (cfg.n_kv_head or cfg.n_head) // cfg.tp
    if cfg.cp > 1 and not is_ring and heads % cfg.cp:
        raise ValueError(
            f"cp_attention=ulysses deals out heads, and cp={cfg.cp} does not divide the "
            f"{heads} of keys and values; type --cp_attention=ring"
        )


def check_ngrams(cfg: Config, split: list[str]) -> None:
    # The prior reads all tokens before one, which cp splits, and is added to all its logits,
    # which tp splits and only the last pipeline stage has.
    if cfg.ngram is not None and (split or cfg.cp > 1):
        raise ValueError(
            "ngram needs full sequences and logits on a rank and is incompatible with "
            f"{[*split, 'cp'][0]}; leave one of them out"
        )
    if cfg.ngram_embed is not None and cfg.cp > 1:
        raise ValueError(
            "ngram_embed needs the tokens before a rank's own and is incompatible with cp; type "
            "--tp= instead, or leave one of them out"
        )


def check_pipeline(cfg: Config, split: list[str]) -> None:
    """The pipeline's stages, and data-parallel layouts that send too often for a pipeline."""
    layout = cfg.data_parallel
    chunks = model_chunks(cfg)
    if cfg.pp_chunks is not None and (cfg.pp_chunks > 1) != (cfg.pp_schedule == "interleaved"):
        raise ValueError(
            f"pp_chunks={cfg.pp_chunks} is incompatible with pp_schedule={cfg.pp_schedule}; type "
            "--pp_schedule=interleaved --pp_chunks=2, or leave pp_chunks out"
        )
    if cfg.pp > 1 and cfg.pp * chunks > cfg.n_layer:
        raise ValueError(
            f"pp={cfg.pp} stages of {chunks} model chunk(s) need {cfg.pp * chunks} "
            f"layers, n_layer is {cfg.n_layer}; try --pp={max(1, cfg.n_layer // chunks)}"
        )
    if layout in ("zero2", "zero3") and split:
        raise ValueError(
            f"data_parallel={layout} would send gradients or weights again for each micro-batch "
            f"in flight and is incompatible with {split[0]}; type --data_parallel=fsdp or zero1"
        )
    # Zero bubble computes weight gradients after fsdp has sent them, and cuts up compiled graphs.
    zero_bubble = cfg.pp > 1 and cfg.pp_schedule == "zerobubble"
    if layout == "fsdp" and zero_bubble:
        raise ValueError(
            "pp_schedule=zerobubble computes weight gradients when fsdp has sent them; type "
            "--pp_schedule=1f1b, or --data_parallel=zero1"
        )
    if zero_bubble and cfg.compile not in ("auto", "off"):
        raise ValueError(
            "pp_schedule=zerobubble takes apart what compile puts together; type "
            "--pp_schedule=1f1b, or --compile=off"
        )
    how = cfg.activation_checkpoint or "none"
    if zero_bubble and how != "none":
        raise ValueError(
            f"--activation_checkpoint={how} is incompatible with --pp_schedule=zerobubble, which "
            "keeps activations for the weights' gradients; type --pp_schedule=1f1b"
        )


def check_packages(cfg: Config) -> None:
    # Else only the Logger would find out, after the corpus is prepared and the model is built.
    for name in ("tensorboard", "wandb"):
        if getattr(cfg, name) and importlib.util.find_spec(name) is None:
            raise ValueError(f"--{name} needs a package: pip install {name}")


def check_owners(cfg: Config) -> None:
    """Dotted fields whose owner is switched off. run/options.py checks all others by signature."""
    for namespace, owner in (("compress", "compress"), ("diloco", "diloco_every")):
        if cfg.sub(namespace) and getattr(cfg, owner) is None:
            raise ValueError(f"--{namespace}.{next(iter(cfg.sub(namespace)))} needs --{owner}=")
    for namespace, precision in (("scaler", "fp16"), ("fp8", "fp8")):
        if cfg.sub(namespace) and cfg.precision != precision:
            raise ValueError(
                f"--{namespace}.{next(iter(cfg.sub(namespace)))} needs --precision={precision}"
            )


def check_replicas_apart(cfg: Config) -> None:
    """compress and diloco_every keep numbers that differ from replica to replica."""
    for name in ("compress", "diloco_every"):
        if getattr(cfg, name) is not None and cfg.precision in ("fp16", "bf16_sr"):
            raise ValueError(
                f"{name} adds up over steps what precision={cfg.precision} scales or rounds; "
                f"type --precision=bf16, or leave {name} out"
            )
    if cfg.compress is not None and cfg.diloco_every is not None:
        raise ValueError("compress and diloco_every are incompatible; leave one of them out")
    apart = cfg.compress or cfg.diloco_every
    # Snapshots in memory lack error feedback and outer weights. Checkpoints have them.
    rolls_back = "rollback" in (cfg.on_spike, cfg.on_nonfinite)
    if apart and rolls_back and cfg.options.get("monitor.ring") != 0:
        raise ValueError(
            "compress and diloco_every keep more than the states in memory hold; type "
            "--monitor.ring=0 to roll back to the newest checkpoint"
        )


def check_early_stopping(cfg: Config) -> None:
    if cfg.patience is not None and not cfg.eval_every:
        raise ValueError(
            "patience counts evaluations, and eval_every=0 makes none; type --eval_every=60"
        )
    if cfg.patience is not None and cfg.diloco_every is not None:
        raise ValueError(
            "patience is incompatible with diloco_every, whose average is not what it trains on"
        )
    if cfg.min_delta and cfg.patience is None:
        raise ValueError("min_delta means nothing without patience; type --patience=5 too")


def check_ema(cfg: Config) -> None:
    for name in ("ema_from", "ema_share"):
        if cfg.ema is None and getattr(cfg, name) != FIELDS[name].default:
            raise ValueError(f"{name} means nothing without ema; type --ema=100 too (steps)")
    if not 0 < cfg.ema_share <= 1:
        raise ValueError(f"ema_share={cfg.ema_share:g} is not allowed; it must lie in (0, 1]")
    if cfg.ema is not None and cfg.ema_from >= cfg.steps:
        raise ValueError(
            f"ema_from={cfg.ema_from} leaves none of the {cfg.steps} steps to average; type a"
            " smaller one"
        )
    looks_ahead = "ema_nesterov" in (cfg.hooks or "").split(",")
    for name, is_on in (("ema", cfg.ema is not None), ("hooks=ema_nesterov", looks_ahead)):
        if is_on and cfg.diloco_every is not None:
            raise ValueError(
                f"{name} keeps a second set of each replica's own weights, and diloco_every lets"
                " them diverge; leave one of the two out"
            )


def check_qk_clip(cfg: Config) -> None:
    # qk_clip shrinks the weights of queries and keys; a norm behind them undoes the factor.
    if cfg.qk_clip is not None and trait(cfg, "qk_norm"):
        raise ValueError(
            f"qk_clip={cfg.qk_clip:g} scales queries and keys, and "
            f"qk_norm={plain(trait(cfg, 'qk_norm'))} undoes that; "
            "type --qk_norm=false, or leave qk_clip out"
        )
    if cfg.qk_clip is not None and cfg.diloco_every is not None:
        raise ValueError(
            "qk_clip compares all replicas, and diloco_every lets them diverge; leave one of them "
            "out"
        )


def check_zeros(cfg: Config) -> None:
    """None switches these off. A 0 would look as if it did, too."""
    names = "grad_clip clip_value z_loss qk_clip attention_scale logit_cap peak_flops"
    names += " router_z_loss moe_bias_lr moe_sequence_loss"
    for name in names.split():
        if getattr(cfg, name) == 0:
            raise ValueError(f"{name}=0 makes no sense; type --{name}=none to switch it off")


def check_options(cfg: Config, namespace: str, target, given: tuple = ()) -> dict:
    """sub(namespace), if the signature of `target` takes it.

    given: parameters that come from elsewhere, such as `params` and `lr`. Raises ValueError, with
    the nearest name, for another name, and for a value whose kind differs from the default's (text
    for a number).
    """
    parameters = inspect.signature(target).parameters
    taken = {}
    takes_any = False  # by **options: only the target knows their names
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind is not parameter.VAR_POSITIONAL and name not in given:
            taken[name] = parameter
    values = cfg.sub(namespace)
    for name, value in values.items():
        if name in taken and not is_of_kind(value, taken[name]):
            typed = flag(f"{namespace}.{name}", value)
            usual = flag("", taken[name].default).partition("=")[2]
            raise ValueError(f"{typed} is of the wrong kind; the default is {usual}")
        if name not in taken and (name in given or not takes_any):
            hint = nearest(name, list(taken), f"--{namespace}.") if taken else "it takes none"
            raise ValueError(
                f"--{namespace}.{name}: {target.__name__} has no such argument; {hint}"
            )
    return values


def is_of_kind(value, parameter: inspect.Parameter) -> bool:
    """Is the value of the same kind as the parameter's default?"""
    default = parameter.default
    # A bool is an int in Python, and no number for a user.
    if parameter.annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    # A required argument has no default that shows its kind: any value passes.
    if default is inspect.Parameter.empty:
        return True
    if isinstance(default, tuple):
        right_length = isinstance(value, tuple) and len(value) == len(default)
        return right_length and all(x is None or is_number(x) for x in value)
    if is_number(default):
        return is_number(value)
    if isinstance(default, bool):
        return isinstance(value, bool)
    return not isinstance(value, (tuple, list, dict))


def divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`, and up to 10,000, so that a huge n takes no time."""
    return next(d for d in range(min(n, most, 10**4), 0, -1) if n % d == 0)


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def nearest(name: str, names: list[str], prefix: str = "") -> str:
    """The end of an error message about a name that is none of `names`."""
    near = difflib.get_close_matches(name, names, 1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"there are {', '.join(names)}"
