"""The same model under other names: GPT-2, Llama, Mistral, Qwen 2 and 3, nanoGPT.

    ours                     LLAMA's tensors                       GPT2's and NANOGPT's
    embed                    model.embed_tokens                    transformer.wte
    positions                                                      transformer.wpe
    blocks.N.attn_norm       model.layers.N.input_layernorm        transformer.h.N.ln_1
    blocks.N.attn.q, k, v    ... self_attn.q_proj, k_proj, v_proj  ... attn.c_attn, a third each
    blocks.N.attn.q_norm     ... self_attn.q_norm                  (k_norm likewise)
    blocks.N.attn.proj       ... self_attn.o_proj                  ... attn.c_proj
    blocks.N.mlp_norm        ... post_attention_layernorm          ... ln_2
    blocks.N.mlp.gate        ... mlp.gate_proj
    blocks.N.mlp.fc, proj    ... mlp.up_proj, down_proj            ... mlp.c_fc, c_proj
    final_norm, head         model.norm, lm_head                   transformer.ln_f, lm_head

GPT-2's matrices are stored (in, out), all others (out, in) as torch's Linear has them. Heads turn
the same way here and there: channel i with channel i + D/2, by the same sign (layers/
fewer_passes.py, turn), so no row of q or k moves.

    fields_of(config)     config.json -> our settings; raises for what would be another function
    config_of(fields)     our settings -> config.json; raises with all traits that no family has
    place(family, name)   our parameter -> where its numbers lie in theirs

Read and write go by the same tables. Names and defaults are transformers' (5.x and 4.x).
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """Where one of our modules lies in theirs."""

    module: str  # N is the layer's number
    transposed: bool = False  # a matrix of theirs is (in, out)
    third: int | None = None  # 0, 1, 2: q, k, v follow one another along our first dimension


class Tensor(NamedTuple):
    """Where one of our parameters lies in theirs."""

    name: str
    transposed: bool
    third: int | None


LLAMA = {
    "embed": Place("model.embed_tokens"),
    "blocks.N.attn_norm": Place("model.layers.N.input_layernorm"),
    "blocks.N.attn.q": Place("model.layers.N.self_attn.q_proj"),
    "blocks.N.attn.k": Place("model.layers.N.self_attn.k_proj"),
    "blocks.N.attn.v": Place("model.layers.N.self_attn.v_proj"),
    "blocks.N.attn.q_norm": Place("model.layers.N.self_attn.q_norm"),
    "blocks.N.attn.k_norm": Place("model.layers.N.self_attn.k_norm"),
    "blocks.N.attn.proj": Place("model.layers.N.self_attn.o_proj"),
    "blocks.N.mlp_norm": Place("model.layers.N.post_attention_layernorm"),
    "blocks.N.mlp.gate": Place("model.layers.N.mlp.gate_proj"),
    "blocks.N.mlp.fc": Place("model.layers.N.mlp.up_proj"),
    "blocks.N.mlp.proj": Place("model.layers.N.mlp.down_proj"),
    "final_norm": Place("model.norm"),
    "head": Place("lm_head"),
}
GPT2 = {
    "embed": Place("transformer.wte"),
    "positions": Place("transformer.wpe"),
    "blocks.N.attn_norm": Place("transformer.h.N.ln_1"),
    "blocks.N.attn.q": Place("transformer.h.N.attn.c_attn", True, 0),
    "blocks.N.attn.k": Place("transformer.h.N.attn.c_attn", True, 1),
    "blocks.N.attn.v": Place("transformer.h.N.attn.c_attn", True, 2),
    "blocks.N.attn.proj": Place("transformer.h.N.attn.c_proj", True),
    "blocks.N.mlp_norm": Place("transformer.h.N.ln_2"),
    "blocks.N.mlp.fc": Place("transformer.h.N.mlp.c_fc", True),
    "blocks.N.mlp.proj": Place("transformer.h.N.mlp.c_proj", True),
    "final_norm": Place("transformer.ln_f"),
    "head": Place("lm_head"),
}
MODULES = {
    "gpt2": GPT2,
    "nanogpt": {ours: place._replace(transposed=False) for ours, place in GPT2.items()},
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}
# What a model saved without its head leaves out of every name.
BASES = ("transformer.", "model.")
# Tensors that are no weights: masks and frequencies that earlier versions saved.
BUFFERS = re.compile(
    r".*(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq|rotary_emb\.original_inv_freq)"
)
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

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
# What transformers takes where config.json lacks a key. The others must be there.
DEFAULTS = {
    "gpt2": {"n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "llama": {"num_key_value_heads": None, "head_dim": None},
    "mistral": {"num_key_value_heads": 8, "head_dim": None},
    "qwen2": {"num_key_value_heads": 32, "head_dim": None},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
# Keys whose null means what follows from others.
NULLABLE = ("num_key_value_heads", "head_dim", "n_inner")
LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
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
    "unsloth_fixed unsloth_version".split()
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
# The settings that a folder may bring.
BROUGHT = (
    "arch n_layer n_head n_kv_head n_embd vocab_size head_dim norm norm_eps activation mlp_width "
    "position rope_base rope_scaling qk_norm window tied bias qkv_bias block_size "
    "embed_norm head_bias logit_cap attention_scale mup_base_width ngram_embed ngram tokenizer"
).split()


# ---- names ---------------------------------------------------------------------------------------
def place(family: str, name: str) -> Tensor | None:
    """Where our parameter `name` lies in the family's tensors; None where the family has none."""
    module, _, kind = name.rpartition(".")
    layer = re.match(r"blocks\.([0-9]+)\.", module)
    number = layer[1] if layer else ""
    if layer:
        module = f"blocks.N.{module[layer.end() :]}"
    found = MODULES[family].get(module)
    if found is None:
        return None
    theirs = found.module.replace(".N.", f".{number}.")
    # A bias, like a gain, has one dimension: nothing to transpose.
    return Tensor(f"{theirs}.{kind}", found.transposed and kind == "weight", found.third)


def is_biased(family: str, name: str) -> bool:
    """Has the module of our parameter a bias in every model of the family?"""
    is_table = name.rpartition(".")[0] in ("embed", "positions", "head")
    return family == "gpt2" and not is_table


def without_base(name: str) -> str:
    """The name in a model that was saved without its head: h.0.ln_1.weight."""
    for base in BASES:
        name = name.removeprefix(base)
    return name


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
    defaults = DEFAULTS[family] | ({} if family == "gpt2" else LLAMA_DEFAULTS)
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
        "arch": "qwen3" if family == "qwen3" else "llama",
        "norm": "rmsnorm_gain",
        "activation": "swiglu",
        "position": "rotary",
        "rope_base": rope_base,
        "rope_scaling": rope_scaling,
        "qk_norm": "gain" if family == "qwen3" else False,
        "window": window_of(keys, family, fields["n_layer"]),
        "bias": has_bias,
        "qkv_bias": has_bias or family == "qwen2",
    }
    notes = dropout_notes(keys, ("attention_dropout",), 0.0)
    return Description(family, fields, longest, notes)


def dropout_notes(keys: Keys, names: Iterable[str], default: float) -> list[str]:
    """A sentence where they trained with dropout: it is no part of the weights' function."""
    found = []
    for name in names:
        value = keys.left.pop(name, default)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise ValueError(f"has {name}={shown(value)}, which is no share from 0 to 1")
        if value:
            found.append(f"{name}={value:g}")
    if not found:
        return []
    return [f"{', '.join(found)} is not taken over; --dropout= sets dropout here"]


def rope_of(keys: Keys) -> tuple[float, str | None]:
    """(rope_base, rope_scaling) as our settings have them."""
    # transformers 5 has one table with the base in it, version 4 the base beside the table.
    tables = [keys.take(key, dict, None) for key in ("rope_parameters", "rope_scaling")]
    tables = [table for table in tables if table]
    if len(tables) == 2 and tables[0] != tables[1]:
        raise ValueError("has rope_parameters and another rope_scaling; take one of them out")
    inner = Keys(tables[0] if tables else {}, {})
    base = keys.take("rope_theta", float, 10000.0)
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
    # A missing key means transformers' own 4096, null means none.
    keys.left.setdefault("sliding_window", 4096)
    size = keys.take("sliding_window", int, None)
    first = 0  # of the layers that have a window
    if family != "mistral":
        first = keys.left.pop("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise ValueError(f"has max_window_layers={shown(first)}, which is no number of layers")
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
    tried = {family: lacking(family, fields) for family in CLASSES}
    family = min(tried, key=lambda name: len(tried[name]))
    if tried[family]:
        traits = ", ".join(f"{name}={fields[name]}" for name in tried[family])
        raise ValueError(f"no family of transformers has {traits}; the nearest is {family}")
    config = gpt2_config(fields) if family == "gpt2" else llama_config(family, fields)
    return {"model_type": family, "architectures": [CLASSES[family]]} | config


def lacking(family: str, fields: dict) -> list[str]:
    """Our settings whose values the family does not have."""
    wanted = {name: (value,) for name, value in WITHOUT.items()}
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
            "qk_norm": ("gain",) if family == "qwen3" else (False,),
            "bias": (False, True) if family == "llama" else (False,),
            "qkv_bias": (True,) if family == "qwen2" else (fields["bias"],),
            "window": (None,) if family == "llama" else (None, fields["window"]),
        }
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
    if family == "mistral":
        config["sliding_window"] = fields["window"]
    if family in ("qwen2", "qwen3"):
        config |= {
            "use_sliding_window": has_window,
            "sliding_window": fields["window"],
            "max_window_layers": 0 if has_window else fields["n_layer"],
        }
    if family == "qwen3":
        config["attention_bias"] = False
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
