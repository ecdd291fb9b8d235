"""The same model under other programs' settings: GPT-2, Llama, Mistral, Qwen 2 and 3, nanoGPT,
and with experts Mixtral and Qwen3-MoE.

    fields_of(config)     config.json -> our settings; raises for what would be another function
    config_of(fields)     our settings -> config.json; raises with all traits that no family has

Names and defaults are transformers' (5.x and 4.x). Where a family's tensors are: family_names.py.

Of a layer with experts a folder says what its weights compute. What keeps the experts' loads even
is the run's own: nothing of it is brought.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
WITH_EXPERTS = ("mixtral", "qwen3_moe")
WITH_QK_NORM = ("qwen3", "qwen3_moe")

# Our setting -> its name in config.json, where the value is the same.
GPT2_KEYS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "mlp_width": "n_inner",
    "norm_eps": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
}
LLAMA_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "vocab_size": "vocab_size",
    "mlp_width": "intermediate_size",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
# What transformers takes where config.json lacks a key. The others must be there: a number of
# experts that nobody wrote would be a guess.
DEFAULTS = {
    "gpt2": {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "llama": {"num_key_value_heads": None, "head_dim": None},
    "mistral": {"num_key_value_heads": 8, "head_dim": None},
    "qwen2": {"num_key_value_heads": 32, "head_dim": None},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "mixtral": {
        "num_key_value_heads": 8,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "head_dim": None,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
}
# Keys whose null means what follows from others.
NULLABLE = ("num_key_value_heads", "head_dim", "n_inner")
LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
# Keys that say nothing of what the weights compute.
SILENT = set(
    "model_type architectures torch_dtype dtype transformers_version _name_or_path use_cache "
    "initializer_range bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id "
    "decoder_start_token_id task_specific_params id2label label2id num_labels problem_type "
    "summary_activation summary_first_dropout summary_proj_to_labels summary_type "
    "summary_use_proj n_ctx pretraining_tp reorder_and_upcast_attn return_dict output_attentions "
    "output_hidden_states torchscript _attn_implementation _attn_implementation_autoset "
    "_commit_hash chunk_size_feed_forward name_or_path n_special predict_special_tokens "
    "output_past _num_labels is_llama_config transformers.js_config max_sequence_length "
    "unsloth_fixed unsloth_version output_router_logits".split()
)
# GPT-2's activations, by transformers' names: the same function has several.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Traits of ours that none of the families has, with the value that stands for "without".
WITHOUT = {
    "embed_norm": False,
    "head_bias": False,
    "logit_cap": None,
    "attention_scale": None,
    "mup_base_width": None,
    "ngram_embed": None,
    "ngram": None,
    "n_expert": None,
}
LIKE_GPT2 = WITHOUT | {
    "arch": "gpt2",
    "norm": "layernorm",
    "position": "learned",
    "rope_base": "auto",
    "rope_scaling": None,
    "qk_norm": False,
    "window": None,
}
# What a layer with experts computes.
OF_EXPERTS = (
    "n_expert n_expert_active n_shared_expert expert_width moe_every router normalize_gates"
).split()
# The settings that a folder may bring.
BROUGHT = (
    "arch n_layer n_head n_kv_head n_embd vocab_size head_dim norm norm_eps activation mlp_width "
    "position rope_base rope_scaling qk_norm window tied bias qkv_bias block_size "
    "embed_norm head_bias logit_cap attention_scale mup_base_width ngram_embed ngram tokenizer"
).split() + OF_EXPERTS


# ---- config.json -> settings ---------------------------------------------------------------------
class Keys:
    """The values of a config.json, taken one after another; nobody may leave one behind."""

    def __init__(self, config: dict, defaults: dict):
        self.left = {key: value for key, value in config.items() if key not in SILENT}
        self.defaults = defaults

    def take(self, key: str, kind: type, *default):
        """The value of a key, of this kind. Raises ValueError for another kind, or a missing key.

        default: in place of a missing key, or of null. Where there is none and null may be, None.
        """
        value = self.left.pop(key, None) if key in self.left else self.defaults.get(key)
        if value is not None:
            return checked(key, value, kind)
        if not default and key not in NULLABLE:
            raise ValueError(f"has no {key}")
        return default[0] if default else None

    def refuse(self, key: str, usual, *also) -> None:
        """Raises ValueError for another value than the usual one, or one of the others."""
        value = self.left.pop(key, usual)
        if value != usual and value not in also:
            raise ValueError(f"has {key}={shown(value)}, and {key}={shown(usual)} alone is read")

    def end(self) -> None:
        """Raises ValueError for a value that nobody has taken, unless it switches something off."""
        for key, value in self.left.items():
            if value not in (None, False, [], {}):
                raise ValueError(
                    f"has {shown(key)}={shown(value)}, which is not known here and may change what "
                    "the weights compute; if it does not, take it out of config.json"
                )


def checked(key: str, value, kind: type):
    """The value, if it is of this kind; ValueError otherwise. Numbers are above 0, and finite."""
    is_number = type(value) in (int, float) and abs(value) < 1e18 and value > 0
    if kind is bool and type(value) is bool or kind is str and type(value) is str:
        return value
    if kind is int and is_number and type(value) is int and value < 2**31:
        return value
    if kind is float and is_number:
        return float(value)
    if kind is dict and type(value) is dict:
        return value
    words = {int: "a whole number above 0", float: "a number above 0", bool: "true or false"}
    what = words.get(kind, "a table" if kind is dict else "text")
    raise ValueError(f"has {key}={shown(value)}, which is not {what}")


def shown(value) -> str:
    """A value of a stranger's file, for a message: one short line of ASCII."""
    return ascii(value)[:80]


class Description(NamedTuple):
    """What a config.json says."""

    family: str
    fields: dict  # our settings: BROUGHT, block_size only with learned positions
    longest: int  # tokens of a sequence that it was made for
    notes: list[str]  # what is worth a sentence


def fields_of(config: dict) -> Description:
    """What a config.json says, in our settings.

    Raises ValueError, whose message goes on after the file's name, for a model that would be
    another function here.
    """
    family = config.get("model_type")
    if type(family) is not str or family not in CLASSES:
        raise ValueError(
            f"has model_type={shown(family)}, which is not read; those read are "
            f"{', '.join(CLASSES)}"
        )
    defaults = ({} if family == "gpt2" else LLAMA_DEFAULTS) | DEFAULTS[family]
    keys = Keys(config, defaults)
    for key in ("is_encoder_decoder", "add_cross_attention"):
        keys.refuse(key, False)
    found = gpt2_fields(keys) if family == "gpt2" else llama_fields(keys, family)
    keys.end()
    return found


def gpt2_fields(keys: Keys) -> Description:
    fields = {}
    for ours, theirs in GPT2_KEYS.items():
        kind = {"norm_eps": float, "tied": bool}.get(ours, int)
        fields[ours] = keys.take(theirs, kind)
    name = keys.take("activation_function", str, "gelu_new")
    if name not in ACTIVATIONS:
        raise ValueError(
            f"has activation_function={shown(name)}; those read are {', '.join(ACTIVATIONS)}"
        )
    keys.refuse("scale_attn_weights", True)
    keys.refuse("scale_attn_by_inverse_layer_idx", False)
    notes = dropout_notes(keys, ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    fields = LIKE_GPT2 | fields | heads_of_gpt2(fields)
    fields |= {"bias": True, "qkv_bias": True, "activation": ACTIVATIONS[name]}
    fields["mlp_width"] = fields["mlp_width"] or 4 * fields["n_embd"]
    return Description("gpt2", fields, fields["block_size"], notes)


def heads_of_gpt2(fields: dict) -> dict:
    if fields["n_embd"] % fields["n_head"]:
        raise ValueError(
            f"has n_embd={fields['n_embd']}, which n_head={fields['n_head']} does not divide"
        )
    return {"n_kv_head": fields["n_head"], "head_dim": fields["n_embd"] // fields["n_head"]}


def llama_fields(keys: Keys, family: str) -> Description:
    fields = {}
    for ours, theirs in LLAMA_KEYS.items():
        kind = {"norm_eps": float, "tied": bool}.get(ours, int)
        fields[ours] = keys.take(theirs, kind)
    fields["n_kv_head"] = fields["n_kv_head"] or fields["n_head"]
    fields["head_dim"] = fields["head_dim"] or fields["n_embd"] // fields["n_head"]
    keys.refuse("hidden_act", "silu", "swish")
    keys.refuse("rope_interleaved", False)
    has_bias = keys.take("attention_bias", bool, False)
    mlp_bias = keys.take("mlp_bias", bool, False) if family == "llama" else False
    if has_bias != mlp_bias:
        raise ValueError(
            f"has attention_bias={shown(has_bias)} and mlp_bias={shown(mlp_bias)}, which must agree"
        )
    longest = keys.take("max_position_embeddings", int, 2048)
    rope_base, rope_scaling = rope_of(keys)
    fields |= WITHOUT | {
        "arch": "qwen3" if family in WITH_QK_NORM else "llama",
        "norm": "rmsnorm_gain",
        "activation": "swiglu",
        "position": "rotary",
        "rope_base": rope_base,
        "rope_scaling": rope_scaling,
        "qk_norm": "gain" if family in WITH_QK_NORM else False,
        "window": window_of(keys, family, fields["n_layer"]),
        "bias": has_bias,
        "qkv_bias": has_bias or family == "qwen2",
    }
    notes = dropout_notes(keys, ("attention_dropout",), 0.0)
    if family in WITH_EXPERTS:
        fields |= experts_of(keys, family, fields)
        notes += balance_notes(keys)
    return Description(family, fields, longest, notes)


def experts_of(keys: Keys, family: str, fields: dict) -> dict:
    """What the config says of experts: OF_EXPERTS."""
    # transformers 5 writes num_local_experts for both families, and reads either.
    names = ("num_experts", "num_local_experts")
    counts = {name: keys.take(name, int, None) for name in names}
    found = {n for n in counts.values() if n is not None}
    if not found:
        raise ValueError(f"has no {names[family == 'mixtral']}")
    if len(found) > 1:
        said = " and ".join(f"{name}={n}" for name, n in counts.items())
        raise ValueError(f"has {said}; take one of them out")
    n_expert = found.pop()
    n_active = keys.take("num_experts_per_tok", int)
    if n_active > n_expert:
        raise ValueError(f"has num_experts_per_tok={n_active}, more than its {n_expert} experts")
    found = {
        "n_expert": n_expert,
        "n_expert_active": n_active,
        "n_shared_expert": 0,
        "router": "softmax",
    }
    if family == "mixtral":
        own = {"expert_width": fields["mlp_width"], "moe_every": 1, "normalize_gates": True}
    else:
        own = {
            "expert_width": keys.take("moe_intermediate_size", int),
            "moe_every": moe_every_of(keys, fields["n_layer"]),
            "normalize_gates": keys.take("norm_topk_prob", bool),
        }
    return found | own


def moe_every_of(keys: Keys, n_layer: int) -> int:
    """moe_every; ValueError where the layers with experts are others than every N-th."""
    step = keys.take("decoder_sparse_step", int)
    dense = keys.left.pop("mlp_only_layers", None) or []
    if type(dense) is not list or not all(type(i) is int for i in dense):
        raise ValueError(f"has mlp_only_layers={shown(dense)}, which is no list of layers")
    with_experts = [i for i in range(step - 1, n_layer, step) if i not in dense]
    every = with_experts[0] + 1 if with_experts else 0
    if not every or with_experts != list(range(every - 1, n_layer, every)):
        raise ValueError(
            f"has decoder_sparse_step={step} and mlp_only_layers={shown(dense)}, so of {n_layer} "
            f"layers those with experts are {shown(with_experts)}, and here it is each "
            "moe_every-th, counted from 1"
        )
    return every


def balance_notes(keys: Keys) -> list[str]:
    """Sentences about how their experts were trained: it is no part of the weights' function."""
    found = []
    weight = share(keys, "router_aux_loss_coef", 0.001)
    if weight:
        found.append(
            f"router_aux_loss_coef={weight:g} is not taken over: that loss is of a batch, and is "
            "another one for each number of micro-batches (layers/moe.py); --moe_bias_lr=, "
            "--router_z_loss= and --moe_sequence_loss= are this run's own"
        )
    noise = share(keys, "router_jitter_noise", 0.0)
    if noise:
        found.append(f"router_jitter_noise={noise:g} is not taken over: a router has no noise here")
    return found


def dropout_notes(keys: Keys, names: Iterable[str], default: float) -> list[str]:
    """A sentence where they trained with dropout: it is no part of the weights' function."""
    found = []
    for name in names:
        value = share(keys, name, default)
        if value:
            found.append(f"{name}={value:g}")
    if not found:
        return []
    return [f"{', '.join(found)} is not taken over; --dropout= sets dropout here"]


def share(keys: Keys, name: str, default: float) -> float:
    """The value of a key that is from 0 to below 1; ValueError for another."""
    value = keys.left.pop(name, default)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(f"has {name}={shown(value)}, which is no share from 0 to 1")
    return value


def rope_of(keys: Keys) -> tuple[float, str | None]:
    """(rope_base, rope_scaling) as our settings have them."""
    # transformers 5 has one table with the base in it, version 4 the base beside the table.
    tables = [keys.take(key, dict, None) for key in ("rope_parameters", "rope_scaling")]
    tables = [table for table in tables if table]
    if len(tables) == 2 and tables[0] != tables[1]:
        raise ValueError("has rope_parameters and another rope_scaling; take one of them out")
    inner = Keys(tables[0] if tables else {}, {})
    base = keys.take("rope_theta", float, keys.defaults["rope_theta"])
    base = inner.take("rope_theta", float, base)
    kind = inner.take("type", str, "default")
    kind = inner.take("rope_type", str, kind)
    for table in (keys, inner):
        table.refuse("partial_rotary_factor", 1.0, None)
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = f"linear:{number(inner.take('factor', float))}"
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        parts = [number(inner.take(name, float)) for name in names]
        parts.append(str(inner.take("original_max_position_embeddings", int)))
        scaling = f"llama3:{':'.join(parts)}"
    else:
        raise ValueError(f"has rope_type={shown(kind)}; those read are default, linear, llama3")
    inner.end()
    return base, scaling


def number(x: float) -> str:
    """As short as it can be typed: 8 for 8.0."""
    return str(int(x)) if x == int(x) else repr(x)


def window_of(keys: Keys, family: str, n_layer: int) -> int | None:
    """The tokens that a query sees, itself among them; None = all.

    Raises ValueError where layers differ in it.
    """
    if family == "llama":
        return None
    # A missing key means transformers' own, null means none.
    keys.left.setdefault("sliding_window", None if family == "mixtral" else 4096)
    size = keys.take("sliding_window", int, None)
    first = 0  # of the layers that have a window
    if family not in ("mistral", "mixtral"):
        first = keys.left.pop("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise ValueError(f"has max_window_layers={shown(first)}, which is no number of layers")
        if family == "qwen3_moe":
            first = 0  # its files have the key, and transformers does not read it
        if not keys.take("use_sliding_window", bool, False):
            size = None
    n_full = n_layer if size is None else min(first, n_layer)
    usual = ["full_attention"] * n_full + ["sliding_attention"] * (n_layer - n_full)
    kinds = keys.left.pop("layer_types", None) or usual
    if kinds == ["full_attention"] * n_layer:
        return None
    if kinds == ["sliding_attention"] * n_layer and size is not None:
        return size
    raise ValueError(f"has layer_types={shown(kinds)}, and a window is the same in all layers here")


def nanogpt_fields(args: dict) -> Description:
    """What nanoGPT's model_args say; raises as fields_of does."""
    keys = Keys(args, {})
    names = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size")
    fields = LIKE_GPT2 | {name: keys.take(name, int) for name in names}
    fields["bias"] = fields["qkv_bias"] = keys.take("bias", bool)
    notes = dropout_notes(keys, ("dropout",), 0.0)
    keys.end()
    fields |= heads_of_gpt2(fields) | {"mlp_width": 4 * fields["n_embd"], "norm_eps": 1e-5}
    fields |= {"activation": "gelu", "tied": True}
    return Description("nanogpt", fields, fields["block_size"], notes)


# ---- settings -> config.json ---------------------------------------------------------------------
def config_of(fields: dict) -> dict:
    """The config.json of a model with our settings, of the first family that has them all.

    No setting is auto, or a none that follows from others. Raises ValueError with every trait that
    the nearest family does not have.
    """
    has_experts = fields["n_expert"] is not None
    families = [family for family in CLASSES if (family in WITH_EXPERTS) == has_experts]
    tried = {family: lacking(family, fields) for family in families}
    family = min(tried, key=lambda name: len(tried[name]))
    if tried[family]:
        traits = ", ".join(f"{name}={fields[name]}" for name in tried[family])
        raise ValueError(f"no family of transformers has {traits}; the nearest is {family}")
    config = gpt2_config(fields) if family == "gpt2" else llama_config(family, fields)
    return {"model_type": family, "architectures": [CLASSES[family]]} | config


def lacking(family: str, fields: dict) -> list[str]:
    """Our settings whose values the family does not have."""
    wanted = {name: (value,) for name, value in WITHOUT.items()}
    if family in WITH_EXPERTS:
        del wanted["n_expert"]
    if family == "gpt2":
        wanted |= {
            "norm": ("layernorm",),
            "activation": ("gelu", "gelu_tanh"),
            "position": ("learned",),
            "n_kv_head": (fields["n_head"],),
            "head_dim": (fields["n_embd"] // fields["n_head"],),
            "qk_norm": (False,),
            "window": (None,),
        }
    else:
        wanted |= {
            "norm": ("rmsnorm_gain",),
            "activation": ("swiglu",),
            "position": ("rotary",),
            "qk_norm": ("gain",) if family in WITH_QK_NORM else (False,),
            "bias": (False, True) if family == "llama" else (False,),
            "qkv_bias": (True,) if family == "qwen2" else (fields["bias"],),
            "window": (None,) if family == "llama" else (None, fields["window"]),
        }
    if family in WITH_EXPERTS:
        wanted |= {"router": ("softmax",), "n_shared_expert": (0,)}
    if family == "mixtral":
        wanted |= {"normalize_gates": (True,), "moe_every": (1,)}
    return [name for name, values in wanted.items() if fields[name] not in values]


def gpt2_config(fields: dict) -> dict:
    config = {theirs: fields[ours] for ours, theirs in GPT2_KEYS.items()}
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return config | {
        "activation_function": names[fields["activation"]],
        "resid_pdrop": fields["dropout"],
        "embd_pdrop": fields["dropout"],
        "attn_pdrop": 0.0,
    }


def llama_config(family: str, fields: dict) -> dict:
    config = {theirs: fields[ours] for ours, theirs in LLAMA_KEYS.items()}
    config |= {
        "hidden_act": "silu",
        "max_position_embeddings": longest(fields),
        "attention_dropout": 0.0,
        "rope_theta": fields["rope_base"],
        "rope_scaling": rope_table(fields["rope_scaling"]),
    }
    has_window = fields["window"] is not None
    if family == "llama":
        config |= {"attention_bias": fields["bias"], "mlp_bias": fields["bias"]}
    if family in ("mistral", "mixtral"):
        config["sliding_window"] = fields["window"]
    if family in ("qwen2", "qwen3"):
        config |= {
            "use_sliding_window": has_window,
            "sliding_window": fields["window"],
            "max_window_layers": 0 if has_window else fields["n_layer"],
        }
    if family in WITH_QK_NORM:
        config["attention_bias"] = False
    if family == "mixtral":
        config |= {
            # It has no MLP beside its experts.
            "intermediate_size": fields["expert_width"],
            "num_local_experts": fields["n_expert"],
            "num_experts_per_tok": fields["n_expert_active"],
        }
    if family == "qwen3_moe":
        config |= {
            "use_sliding_window": has_window,
            "sliding_window": fields["window"],
            "moe_intermediate_size": fields["expert_width"],
            "num_experts": fields["n_expert"],
            "num_experts_per_tok": fields["n_expert_active"],
            "decoder_sparse_step": fields["moe_every"],
            "mlp_only_layers": [],
            "norm_topk_prob": fields["normalize_gates"],
        }
    return config


def longest(fields: dict) -> int:
    """Tokens of a sequence that a rotary model is for; at least those its frequencies are for."""
    kind, *parts = (fields["rope_scaling"] or "").split(":")
    if kind != "llama3":
        return fields["block_size"]
    return max(fields["block_size"], int(float(parts[0]) * float(parts[-1])))


def rope_table(scaling: str | None) -> dict | None:
    """config.json's rope_scaling of our setting of that name."""
    if scaling is None:
        return None
    kind, *parts = scaling.split(":")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    table = {name: float(part) for name, part in zip(names, parts)}
    if kind == "llama3":
        table[names[-1]] = int(math.floor(table[names[-1]]))
    return {"rope_type": kind} | table
