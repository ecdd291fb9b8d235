"""Shapes of models that were published, by their size; and a guess for any other size.

    7B    Llama 2 7B, as its makers released it
    70B   Llama 3 70B
    6B    none is published, so a guess: heads of 128, about 128 channels a layer, no gated MLP

A size is known under its name, 13B, or by its count of parameters to 1 %. Where two families have
one, the first in SHAPES is taken; others by name, as in --model=qwen2.5-7b.

Sources: each family's config.json as its makers released it, and their reports: Llama 3
(Grattafiori et al. 2024, 2407.21783; 3.2: model card), Llama 2 (Touvron et al. 2023, 2307.09288),
Qwen3 (Yang et al. 2025, 2505.09388), Qwen2.5 (Yang et al. 2024, 2412.15115), GPT-3 (Brown et al.
2020, 2005.14165, table 2.1), GPT-2 (Radford et al. 2019). block_size is the length of most of
pre-training, not the longest that the released model reads. OpenAI's 50257 words are filled up to
50304, which tensor parallelism can split. GPT-3's banded attention is counted as full.

`asked` turns the flags of a command into a shape, and says in a sentence whose it is.
`python -m memory.known` lists them all (with metrics/outlets.py).

Neighbours: memory/shapes.py, precision/amp.py

Example:
    from memory.known import guess, known
    name, shape = known(13e9)
    print(name, shape)
    assert (name, shape["n_layer"], shape["n_embd"]) == ("llama2-13b", 40, 5120)
    assert known(6e9) is None and guess(6e9)["n_embd"] == 4096
"""

import difflib
import math

from memory.shapes import Experts

COLUMNS = (
    "n_layer n_embd n_head n_kv_head mlp_width vocab_size block_size arch head_dim tied qkv_bias"
).split()
# Name -> parameters, and the columns as far as they are not the trait's default.
SHAPES = {
    "llama3-8b": (8.030e9, 32, 4096, 32, 8, 14336, 128256, 8192, "llama"),
    "llama3-70b": (70.554e9, 80, 8192, 64, 8, 28672, 128256, 8192, "llama"),
    "llama3-405b": (405.853e9, 126, 16384, 128, 8, 53248, 128256, 8192, "llama"),
    "llama3.2-1b": (1.236e9, 16, 2048, 32, 8, 8192, 128256, 8192, "llama", None, True),
    "llama3.2-3b": (3.213e9, 28, 3072, 24, 8, 8192, 128256, 8192, "llama", None, True),
    "llama2-7b": (6.738e9, 32, 4096, 32, 32, 11008, 32000, 4096, "llama"),
    "llama2-13b": (13.016e9, 40, 5120, 40, 40, 13824, 32000, 4096, "llama"),
    "llama2-70b": (68.977e9, 80, 8192, 64, 8, 28672, 32000, 4096, "llama"),
    "qwen3-0.6b": (0.596e9, 28, 1024, 16, 8, 3072, 151936, 4096, "qwen3", 128, True),
    "qwen3-1.7b": (1.721e9, 28, 2048, 16, 8, 6144, 151936, 4096, "qwen3", 128, True),
    "qwen3-4b": (4.022e9, 36, 2560, 32, 8, 9728, 151936, 4096, "qwen3", 128, True),
    "qwen3-8b": (8.191e9, 36, 4096, 32, 8, 12288, 151936, 4096, "qwen3", 128),
    "qwen3-14b": (14.768e9, 40, 5120, 40, 8, 17408, 151936, 4096, "qwen3", 128),
    "qwen3-32b": (32.762e9, 64, 5120, 64, 8, 25600, 151936, 4096, "qwen3", 128),
    "qwen2.5-0.5b": (0.494e9, 24, 896, 14, 2, 4864, 151936, 4096, "llama", None, True, True),
    "qwen2.5-1.5b": (1.544e9, 28, 1536, 12, 2, 8960, 151936, 4096, "llama", None, True, True),
    "qwen2.5-3b": (3.086e9, 36, 2048, 16, 2, 11008, 151936, 4096, "llama", None, True, True),
    "qwen2.5-7b": (7.616e9, 28, 3584, 28, 4, 18944, 152064, 4096, "llama", None, False, True),
    "qwen2.5-14b": (14.770e9, 48, 5120, 40, 8, 13824, 152064, 4096, "llama", None, False, True),
    "qwen2.5-32b": (32.764e9, 64, 5120, 40, 8, 27648, 152064, 4096, "llama", None, False, True),
    "qwen2.5-72b": (72.706e9, 80, 8192, 64, 8, 29568, 152064, 4096, "llama", None, False, True),
    "gpt3-175b": (174.6e9, 96, 12288, 96, 96, None, 50304, 2048, "gpt2"),
    "gpt2-124m": (0.1244e9, 12, 768, 12, 12, None, 50304, 1024, "gpt2"),
    "gpt2-355m": (0.3549e9, 24, 1024, 16, 16, None, 50304, 1024, "gpt2"),
    "gpt2-774m": (0.7741e9, 36, 1280, 20, 20, None, 50304, 1024, "gpt2"),
    "gpt2-1.5b": (1.5577e9, 48, 1600, 25, 25, None, 50304, 1024, "gpt2"),
}
FAMILIES = {
    "llama3": "Llama 3",
    "llama3.2": "Llama 3.2",
    "llama2": "Llama 2",
    "qwen3": "Qwen3",
    "qwen2.5": "Qwen2.5",
    "gpt3": "GPT-3",
    "gpt2": "GPT-2",
}
UNITS = {"m": 1e6, "b": 1e9}


def shape_of(name: str) -> dict:
    """The shape of a name in SHAPES; without what is a default. Raises ValueError for another."""
    if name.lower() not in SHAPES:
        near = difflib.get_close_matches(name.lower(), SHAPES, 1, 0.5)
        hint = "python -m memory.known lists them"
        if near:
            hint = f"did you mean {near[0]}? {hint}"
        raise ValueError(f"model {name!r} is not known; {hint}")
    found = dict(zip(COLUMNS, SHAPES[name.lower()][1:]))
    return {column: value for column, value in found.items() if value is not None}


def title(name: str) -> str:
    """llama2-13b -> Llama 2 13B."""
    family, size = name.lower().rsplit("-", 1)
    return f"{FAMILIES[family]} {size.upper()}"


def named_size(name: str) -> float:
    """llama2-13b -> 13e9."""
    size = name.rsplit("-", 1)[1]
    return round(float(size[:-1]) * UNITS[size[-1]])


def alike(params: float) -> list[str]:
    """Names of the published models of this size, the one to take first."""
    by_name = [name for name in SHAPES if named_size(name) == params]
    by_count = [name for name in SHAPES if abs(params / SHAPES[name][0] - 1) < 0.01]
    return list(dict.fromkeys(by_name + by_count))


def known(params: float) -> tuple[str, dict] | None:
    """(name, shape) of the published model of so many parameters; None: there is none."""
    names = alike(params)
    return (names[0], shape_of(names[0])) if names else None


def guess(params: float, vocab_size: int = 50304) -> dict:
    """A usual shape for so many parameters: heads of 128, about 128 channels a layer.

    From 12 L C^2 = params. C is a multiple of 1024 from 768 on. L follows from C, and is a multiple
    of 4 from 32 on. Below 1e9 the words weigh more: C, a multiple of 128, is nearest to 64 L.
    """
    if params < 1e9:
        shapes = []
        for C in range(128, 1537, 128):
            L = max(1, round((params - 2 * vocab_size * C) / (12 * C**2)))
            shapes.append((abs(math.log(C / (64 * L))), L, C))
        _, L, C = min(shapes)
        return dict(n_layer=L, n_embd=C, n_head=C // 128, n_kv_head=C // 128)
    C = 128 * (params / 12 / 128**2) ** (1 / 3)
    grain = 1024 if C >= 768 else 128
    C = max(1, round(C / grain)) * grain
    L = (params - 2 * vocab_size * C) / (12 * C**2)
    L = 4 * round(L / 4) if L >= 32 else round(L)
    return dict(n_layer=max(1, L), n_embd=C, n_head=C // 128, n_kv_head=C // 128)


# ---- the flags of a model ------------------------------------------------------------------------
# Flags that mean nothing without n_expert.
OF_EXPERTS = ("n_expert_active", "n_shared_expert", "expert_width", "moe_every")
FLAGS = dict(
    params=None,
    model=None,
    **dict.fromkeys(COLUMNS),
    n_expert=None,
    n_expert_active=2,
    n_shared_expert=0,
    expert_width=None,
    moe_every=1,
)
SAYS = dict(
    params="parameters, as 355M, 7B or 1.5T: the published shape of this size, else a guess",
    model="a published model by its name, such as llama2-13b (python -m memory.known lists them)",
    n_layer="the shape itself, in place of --params: layers",
    n_embd="channels",
    n_head="heads of queries; none: of 128 channels each",
    n_kv_head="heads of keys and values; none: as n_head",
    mlp_width="width between the MLP's matrices; none: the architecture's",
    vocab_size="words; none: the published model's, otherwise 50304",
    block_size="tokens of a sequence; none: the published model's, otherwise 2048",
    arch="architecture; none: the published model's, otherwise modern",
    head_dim="channels of a head; none: n_embd / n_head",
    tied="does the head share the embedding's weights? none: as published, or as arch has it",
    qkv_bias="have queries, keys and values biases? none: as published, or as arch has it",
    n_expert="experts in place of an MLP (docs/moe.md); none: no experts",
    n_expert_active="experts that a token goes through",
    n_shared_expert="experts that every token goes through",
    expert_width="width of an expert; none: the MLP's, shared out among the active ones",
    moe_every="each so-manyth layer has experts",
)
TYPE_ONE = "type --params=13B, --model=llama2-13b, or the model's own --n_layer=40 --n_embd=5120"


def asked(s: dict) -> tuple[dict, str]:
    """(shape, whose it is in a sentence) of the flags in s. None of them: not typed.

    Raises ValueError where they contradict each other, or say too little.
    """
    by_name = [name for name in ("params", "model") if s[name] is not None]
    by_hand = [name for name in ("n_layer", "n_embd") if s[name] is not None]
    if len(by_name) + bool(by_hand) > 1:
        both = " and ".join(f"--{name}" for name in (by_name + by_hand)[:2])
        raise ValueError(f"{both} both say which model it is; {TYPE_ONE}")
    if not by_name and len(by_hand) < 2:
        raise ValueError(TYPE_ONE)
    if by_name and s["n_expert"] is not None:
        raise ValueError(f"--n_expert needs --n_layer and --n_embd; leave --{by_name[0]} out")
    if s["params"] is not None and s["params"] < 1e5:
        raise ValueError(
            f"params={s['params']} is fewer than any model has; type --params={s['params']}B, or "
            f"--params={s['params']}M"
        )
    vocab_size = s["vocab_size"] or 50304
    typed = {name: s[name] for name in COLUMNS if s[name] is not None}
    whose = "your shape"
    shape = {}
    if by_name:
        names = alike(s["params"]) if s["model"] is None else [s["model"]]
        if names:
            shape = shape_of(names[0])
            whose = f"{title(names[0])}, the published shape"
            if typed:
                changed = " ".join(f"{name}={value}" for name, value in typed.items())
                whose += f" but with {changed}"
            if names[1:]:
                whose += f" (of this size also: {' '.join(f'--model={x}' for x in names[1:])})"
        else:
            shape = guess(s["params"], vocab_size)
            whose = "no such size is published: the shape is a guess"
            near = min(SHAPES, key=lambda name: abs(math.log(s["params"] / SHAPES[name][0])))
            if abs(s["params"] / SHAPES[near][0] - 1) < 0.1:
                whose += f" (nearest: --model={near})"
    shape |= typed
    C = shape["n_embd"]
    heads = max(1, C // 128)
    shape = dict(n_head=heads if C % heads == 0 else 1) | shape
    usual = dict(n_kv_head=shape["n_head"], vocab_size=50304, block_size=2048, arch="modern")
    shape = usual | shape
    parts = (C if shape.get("head_dim") is None else 0, shape["n_head"], shape["n_kv_head"])
    if parts[0] % parts[1] or parts[1] % parts[2]:
        raise ValueError(
            f"n_embd={C}, n_head={parts[1]} and n_kv_head={parts[2]} must divide, each the one "
            "before"
        )
    return {name: shape[name] for name in COLUMNS if name in shape}, whose


def check_experts(s: dict) -> None:
    """Raises ValueError for flags of experts that do not fit the model."""
    if s["n_expert"] is None:
        usual = {name: FLAGS[name] for name in OF_EXPERTS} | dict(ep=1)
        for name, value in usual.items():
            if s.get(name, value) != value:
                raise ValueError(f"{name} means nothing without experts; type --n_expert=8 too")
        return
    if s["n_expert_active"] > s["n_expert"]:
        raise ValueError(
            f"n_expert_active={s['n_expert_active']} is more than n_expert={s['n_expert']}; type "
            "--n_expert_active=2"
        )
    if s["moe_every"] > (s["n_layer"] or math.inf):
        raise ValueError(
            f"moe_every={s['moe_every']} is more than n_layer={s['n_layer']}; type --moe_every=1"
        )


def experts_of(s: dict) -> Experts | None:
    """The experts that the flags describe, on a GPU."""
    if s["n_expert"] is None:
        return None
    return Experts(s["n_expert"], **{name: s[name] for name in OF_EXPERTS}, ep=s.get("ep", 1))


def listing(argv: list[str]) -> str:
    lines = [f"{'--model=':14} {'parameters':>12}  shape"]
    for name, (count, *_) in SHAPES.items():
        shape = " ".join(f"{key}={value}" for key, value in shape_of(name).items())
        lines.append(f"{name:14} {count / 1e9:10.3f}e9  {shape}")
    return "\n".join(lines)


if __name__ == "__main__":
    from metrics.outlets import command

    command("known.py", lambda words: print(listing(words)))
