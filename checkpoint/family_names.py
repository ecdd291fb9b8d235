"""Where a model's tensors lie under other programs' names: our parameter -> theirs.

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

    a layer with experts     MIXTRAL's                        QWEN3_MOE's
    blocks.N.mlp.router      ... block_sparse_moe.gate        ... mlp.gate
    blocks.N.mlp.experts.E   ... block_sparse_moe.experts.E   ... mlp.experts.E
        .gate, fc, proj          .w1, w3, w2                      .gate_proj, up_proj, down_proj

transformers 5 has a layer's experts in two tensors, gate and up one after the other:

    mlp.experts.gate_up_proj (E, 2 width, C)      mlp.experts.down_proj (E, C, width)

It saves them one by one, under the names above, unless save_pretrained() is told otherwise
(save_original_format=False). Both are read, the first is written.

    place(family, name)   our parameter -> where its numbers lie in theirs
    places(family, name)  the same, with all that is read
"""

import re
from typing import NamedTuple


class Place(NamedTuple):
    """Where one of our modules lies in theirs."""

    module: str  # N is the layer's number, E the expert's
    transposed: bool = False  # a matrix of theirs is (in, out)
    # (1, 3): the second of three that follow one another along our first dimension
    part: tuple[int, int] | None = None
    stacked: bool = False  # `module` is a tensor with the weights of all experts: (E, ...)


class Tensor(NamedTuple):
    """Where one of our parameters lies in theirs."""

    name: str
    transposed: bool = False
    part: tuple[int, int] | None = None
    expert: int | None = None  # in a tensor of all experts: which


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
MIXTRAL = LLAMA | {
    "blocks.N.mlp.router": Place("model.layers.N.block_sparse_moe.gate"),
    "blocks.N.mlp.experts.E.gate": Place("model.layers.N.block_sparse_moe.experts.E.w1"),
    "blocks.N.mlp.experts.E.fc": Place("model.layers.N.block_sparse_moe.experts.E.w3"),
    "blocks.N.mlp.experts.E.proj": Place("model.layers.N.block_sparse_moe.experts.E.w2"),
}
QWEN3_MOE = LLAMA | {
    "blocks.N.mlp.router": Place("model.layers.N.mlp.gate"),
    "blocks.N.mlp.experts.E.gate": Place("model.layers.N.mlp.experts.E.gate_proj"),
    "blocks.N.mlp.experts.E.fc": Place("model.layers.N.mlp.experts.E.up_proj"),
    "blocks.N.mlp.experts.E.proj": Place("model.layers.N.mlp.experts.E.down_proj"),
}
GATE_UP = "model.layers.N.mlp.experts.gate_up_proj"
STACKED = QWEN3_MOE | {
    "blocks.N.mlp.experts.E.gate": Place(GATE_UP, part=(0, 2), stacked=True),
    "blocks.N.mlp.experts.E.fc": Place(GATE_UP, part=(1, 2), stacked=True),
    "blocks.N.mlp.experts.E.proj": Place("model.layers.N.mlp.experts.down_proj", stacked=True),
}
GPT2 = {
    "embed": Place("transformer.wte"),
    "positions": Place("transformer.wpe"),
    "blocks.N.attn_norm": Place("transformer.h.N.ln_1"),
    "blocks.N.attn.q": Place("transformer.h.N.attn.c_attn", True, (0, 3)),
    "blocks.N.attn.k": Place("transformer.h.N.attn.c_attn", True, (1, 3)),
    "blocks.N.attn.v": Place("transformer.h.N.attn.c_attn", True, (2, 3)),
    "blocks.N.attn.proj": Place("transformer.h.N.attn.c_proj", True),
    "blocks.N.mlp_norm": Place("transformer.h.N.ln_2"),
    "blocks.N.mlp.fc": Place("transformer.h.N.mlp.c_fc", True),
    "blocks.N.mlp.proj": Place("transformer.h.N.mlp.c_proj", True),
    "final_norm": Place("transformer.ln_f"),
    "head": Place("lm_head"),
}
# The first names are those that are written.
MODULES = {
    "gpt2": [GPT2],
    "nanogpt": [{ours: place._replace(transposed=False) for ours, place in GPT2.items()}],
    "llama": [LLAMA],
    "mistral": [LLAMA],
    "qwen2": [LLAMA],
    "qwen3": [LLAMA],
    "mixtral": [MIXTRAL, STACKED],
    "qwen3_moe": [QWEN3_MOE, STACKED],
}
# What a model saved without its head leaves out of every name.
BASES = ("transformer.", "model.")
# Tensors that are no weights: masks and frequencies that earlier versions saved.
BUFFERS = re.compile(
    r".*(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq|rotary_emb\.original_inv_freq)"
)


def place(family: str, name: str) -> Tensor | None:
    """Where our parameter `name` is written; None where the family has none."""
    found = places(family, name)
    return found[0] if found else None


def places(family: str, name: str) -> list[Tensor]:
    """Where our parameter `name` may lie in the family's tensors; [] where the family has none."""
    module, _, kind = name.rpartition(".")
    numbers = re.match(r"blocks\.([0-9]+)\.(?:mlp\.experts\.([0-9]+)\.)?", module)
    layer, expert = numbers.groups() if numbers else (None, None)
    module = re.sub(r"^blocks\.[0-9]+\.", "blocks.N.", module)
    module = re.sub(r"\.experts\.[0-9]+\.", ".experts.E.", module)
    found = []
    for modules in MODULES[family]:
        if module not in modules:
            continue
        there = modules[module]
        theirs = there.module.replace(".N.", f".{layer}.")
        if there.stacked:
            # transformers' own parameter, of no module: it has no kind, and the weights alone.
            if kind == "weight":
                found.append(Tensor(theirs, part=there.part, expert=int(expert)))
            continue
        theirs = theirs.replace(".E.", f".{expert}.")
        # A bias, like a gain, has one dimension: nothing to transpose.
        transposed = there.transposed and kind == "weight"
        found.append(Tensor(f"{theirs}.{kind}", transposed, there.part))
    return found


def is_selection_bias(name: str) -> bool:
    """Is it the experts' bias in the choice (layers/moe.py)? No family has one."""
    return name.endswith(".selection_bias")


def is_biased(family: str, name: str) -> bool:
    """Has the module of our parameter a bias in every model of the family?"""
    is_table = name.rpartition(".")[0] in ("embed", "positions", "head")
    return family == "gpt2" and not is_table


def without_base(name: str) -> str:
    """The name in a model that was saved without its head: h.0.ln_1.weight."""
    for base in BASES:
        name = name.removeprefix(base)
    return name
