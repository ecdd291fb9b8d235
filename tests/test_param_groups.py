"""What a parameter is does not depend on what the model is wrapped in."""

import pytest
import torch
import torch._dynamo  # before the ranks are forked
from harness import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from model import GPT, GPTConfig
from optim.muon import Muon
from optim.param_groups import kinds, param_groups


# ---- models of many layouts ----------------------------------------------------------------------
class Holder(nn.Module):
    """A module that has this and that; what a LightningModule, a trainer or a loss would be."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Attention(Holder):
    def __init__(self, c):
        super().__init__(q=nn.Linear(c, c), v=nn.Linear(c, c), proj=nn.Linear(c, c, bias=False))


class Expert(Holder):
    def __init__(self, c):
        super().__init__(fc=nn.Linear(c, 4 * c), proj=nn.Linear(4 * c, c))


class Block(Holder):
    """Some Linears stand in it directly, as in many blocks."""

    def __init__(self, c, **more):
        super().__init__(
            norm=nn.LayerNorm(c),
            attn=Attention(c),
            fc=nn.Linear(c, 4 * c),
            proj=nn.Linear(4 * c, c),
            gate=nn.Linear(c, c),
            **more,
        )


def blocks(c, n, make=Block):
    return nn.ModuleList(make(c) for _ in range(n))


def moe(c):
    return Block(c, router=nn.Linear(c, 3), experts=nn.ModuleList(Expert(c) for _ in range(3)))


def nano(v, c, n, tied=True):
    parts = dict(
        wte=nn.Embedding(v, c),
        wpe=nn.Embedding(16, c),
        drop=nn.Dropout(),
        h=blocks(c, n),
        ln_f=nn.LayerNorm(c),
    )
    model = Holder(transformer=nn.ModuleDict(parts), lm_head=nn.Linear(c, v, bias=False))
    if tied:
        model.transformer.wte.weight = model.lm_head.weight
    return model


def karpathy(v, c, n, *last):
    return Holder(
        token=nn.Embedding(v, c),
        position=nn.Embedding(c, c),
        blocks=nn.Sequential(*blocks(c, n), *last),
        ln_f=nn.LayerNorm(c),
        lm_head=nn.Linear(c, v),
    )


def llama(v, c, n):
    body = Holder(embed_tokens=nn.Embedding(v, c), layers=blocks(c, n), norm=nn.RMSNorm(c))
    return Holder(model=body, lm_head=nn.Linear(c, v, bias=False))


def t5(v, c, n):
    shared, stacks = nn.Embedding(v, c), []
    for _ in range(2):
        stacks.append(Holder(embed_tokens=shared, block=blocks(c, n), norm=nn.RMSNorm(c)))
        stacks[-1].block[0].relative = nn.Embedding(8, c)  # of as many rows as some of its Linears
        if n > 1:
            stacks[-1].block[-1].relative = nn.Embedding(4 * c, c)
    return Holder(shared=shared, encoder=stacks[0], decoder=stacks[1], lm_head=nn.Linear(c, v))


def own(**more):
    shape = dict(n_layer=3, n_head=2, n_kv_head=2, block_size=8)
    return lambda v, c, n: GPT(GPTConfig(**shape | more, n_embd=c, vocab_size=v))


GPT2 = dict(norm="layernorm", position="learned", tied=True, bias=True)
LANGUAGE = {
    "own": own(head_bias=True, norm="rmsnorm_gain", embed_norm=True, ngram_embed=3, ngram_rows=8),
    "own, tied": own(**GPT2),
    "nanoGPT": nano,
    "nanoGPT, untied": lambda v, c, n: nano(v, c, n, tied=False),
    "Sequential": karpathy,
    "Sequential with a norm": lambda v, c, n: karpathy(v, c, n, nn.LayerNorm(c)),
    "Sequential alone": lambda v, c, n: nn.Sequential(
        nn.Embedding(v, c), *blocks(c, n), nn.LayerNorm(c), nn.Linear(c, v)
    ),
    "Llama": llama,
    "T5": t5,
    "mixture of experts": lambda v, c, n: Holder(
        wte=nn.Embedding(v, c), layers=blocks(c, n, moe), out=nn.Linear(c, v)
    ),
    "no layers": lambda v, c, n: Holder(
        wte=nn.Embedding(v, c), rnn=nn.LSTM(c, c), lm_head=nn.Linear(c, v)
    ),
    "layers that are Linears": lambda v, c, n: Holder(
        wte=nn.EmbeddingBag(v, c),
        norm=nn.LayerNorm(c),
        body=blocks(c, n, lambda c: nn.Linear(c, c)),
        lm_head=nn.Linear(c, v),
    ),
    "Linears in a Sequential": lambda v, c, n: Holder(
        wte=nn.Embedding(v, c),
        body=nn.Sequential(*(nn.Linear(c, c) for _ in range(n))),
        norm=nn.LayerNorm(c),
        lm_head=nn.Linear(c, v),
    ),
}
HEADS = dict.fromkeys(LANGUAGE, ("lm_head.weight",)) | {
    "own": ("head.weight",),
    "own, tied": (),
    "nanoGPT": (),
    "mixture of experts": ("out.weight",),
    "Sequential alone": ("4.weight",),
}
OTHERS = {
    "MLP": lambda: Holder(fc1=nn.Linear(6, 7), act=nn.ReLU(), fc2=nn.Linear(7, 3)),
    "one Linear": lambda: nn.Linear(6, 3),
    "several layers": lambda: nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.LayerNorm(6)
    ),
    "classifier": lambda: Holder(
        stem=nn.Conv2d(3, 4, 3),
        blocks=nn.Sequential(
            *(Holder(conv=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4)) for _ in range(2))
        ),
        fc=nn.Linear(4, 9),
    ),
    "first stage": lambda: GPT(GPTConfig(n_layer=4, n_embd=16), [0, 1]),
    "middle stage": lambda: GPT(GPTConfig(n_layer=4, n_embd=16), [1]),
    "last stage": lambda: GPT(GPTConfig(n_layer=4, n_embd=16), [2, 3]),
    "last stage, tied": lambda: GPT(GPTConfig(n_layer=4, n_embd=16, **GPT2), [2, 3]),
    "middle stage of blocks with Linears": lambda: Holder(blocks=nn.ModuleDict({"1": Block(8)})),
    "weight norm": lambda: Holder(
        wte=nn.Embedding(9, 8),
        blocks=blocks(8, 2),
        head=parametrizations.weight_norm(nn.Linear(8, 9, bias=False)),
    ),
}
HEADS |= {
    "MLP": ("fc1.weight", "fc2.weight"),
    "one Linear": ("weight",),
    "several layers": ("0.weight", "2.weight"),
    "classifier": ("fc.weight",),
    "first stage": (),
    "middle stage": (),
    "last stage": ("head.weight",),
    "last stage, tied": (),
    "middle stage of blocks with Linears": (),
    "weight norm": tuple(f"head.parametrizations.weight.original{i}" for i in (0, 1)),
}
SIZES = {
    "": (11, 8, 2),
    "v=c": (8, 8, 2),
    "one layer": (11, 8, 1),
    "one layer, v=c": (8, 8, 1),
    "v=4c": (32, 8, 2),
}  # a vocabulary as large as what blocks are inside
MODELS = {
    (name, size): lambda make=make, at=at: make(*at)
    for name, make in LANGUAGE.items()
    for size, at in SIZES.items()
    if (name, at[2]) != ("Sequential alone", 1)
}  # a layer like any other
MODELS |= {(name, ""): make for name, make in OTHERS.items()}
WRAPPED = [key for key in MODELS if key[1] == "v=c" or key[0] in (*OTHERS, "own", "Llama", "T5")]


# ---- what they are wrapped in --------------------------------------------------------------------
def each(model, wrap, every=1):
    """The same model with every `every`-th block wrapped."""
    for m in reversed([*model.modules()]):  # inner ones first, as fully_shard wants it
        inside = isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        children = [
            (name, c)
            for name, c in m.named_children()
            if isinstance(c, nn.Linear) or type(c).__name__ in ("Block", "Expert", "Holder")
        ]
        for name, child in children[::every] if inside else ():
            m._modules[name] = wrap(child)
    return model


def linears(model, wrap):
    """The same model with each Linear and embedding wrapped."""
    for m in [*model.modules()]:
        for name, child in m.named_children():
            if isinstance(child, (nn.Linear, nn.Embedding)):
                m._modules[name] = wrap(child)
    return model if not isinstance(model, nn.Linear) else wrap(model)


class Shown(Holder):
    """Shows the shape of what it wraps, as adapters and quantised layers do."""

    def __init__(self, inner):
        super().__init__(inner=inner)
        for name in ("in_features", "out_features", "num_embeddings", "embedding_dim"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))


def sharded(model):
    mesh = init_device_mesh("cpu", (1,))
    return fully_shard(each(model, lambda m: fully_shard(m, mesh=mesh), 2), mesh=mesh)


compiled, held = torch.compile, lambda m: Holder(net=m, loss=nn.CrossEntropyLoss())
WRAPPERS = {
    "compiled": compiled,
    "compiled in place": lambda m: (m.compile(), m)[1],
    "compiled blocks": lambda m: each(m, compiled),
    "half of the blocks compiled": lambda m: each(m, compiled, 2),
    "compiled Linears": lambda m: linears(m, compiled),
    "Linears in wrappers that show their shape": lambda m: linears(m, Shown),
    "data parallel": nn.DataParallel,
    "ddp": DistributedDataParallel,
    "sharded": sharded,
    "checkpointed": checkpoint_wrapper,
    "checkpointed blocks": lambda m: each(m, checkpoint_wrapper),
    "half of the blocks checkpointed": lambda m: each(m, checkpoint_wrapper, 2),
    "held": held,
    "averaged": AveragedModel,
    "held twice": lambda m: held(held(m)),
    "compiled ddp": lambda m: compiled(DistributedDataParallel(m)),
    "ddp of compiled": lambda m: DistributedDataParallel(compiled(m)),
    "held ddp of compiled blocks": lambda m: held(DistributedDataParallel(each(m, compiled))),
    "compiled holder of sharded": lambda m: compiled(held(sharded(m))),
    "checkpointed blocks, compiled, ddp": lambda m: DistributedDataParallel(
        compiled(each(m, checkpoint_wrapper))
    ),
}
ADDED = ("_orig_mod", "module", "_checkpoint_wrapped_module", "net", "inner")


def plain_names(found):
    return {".".join(p for p in name.split(".") if p not in ADDED): k for name, k in found.items()}


def all_wrapped(rank, world):
    results = {}
    for key in WRAPPED:
        for name, wrap in WRAPPERS.items():
            results[key, name] = plain_names(kinds(wrap(MODELS[key]())))
    return results


@pytest.fixture(scope="module")
def wrapped():
    """{(model, wrapper): kinds}, by one process that is a group of its own."""
    return run_ranks(1, all_wrapped)[0]


@pytest.mark.parametrize("key", WRAPPED, ids=" ".join)
def test_every_wrapped_form_has_the_kinds_of_the_plain_model(key, wrapped):
    expected = kinds(MODELS[key]())
    for name in WRAPPERS:
        assert wrapped[key, name] == expected, name


@pytest.mark.parametrize("key", MODELS, ids=" ".join)
def test_heads_embeddings_and_scalars_are_those_and_all_else_is_a_matrix(key):
    model = MODELS[key]()
    found, params = kinds(model), dict(model.named_parameters())
    assert {n for n, kind in found.items() if kind == "head"} == {*HEADS[key[0]]}
    kind_of = nn.Embedding, nn.EmbeddingBag
    tables = {id(m.weight) for m in model.modules() if isinstance(m, kind_of)}
    for name, kind in found.items():
        if kind != "head":
            vector = params[name].ndim < 2
            right = "embedding" if id(params[name]) in tables else "scalar" if vector else "matrix"
            assert kind == right, name


@pytest.mark.parametrize("key", MODELS, ids=" ".join)
def test_a_model_on_the_meta_device_has_the_same_kinds(key):
    with torch.device("meta"):
        model = MODELS[key]()
    assert kinds(model) == kinds(MODELS[key]())


# ---- several models in one -----------------------------------------------------------------------
PAIRS = {
    "two attributes": lambda a, b: Holder(student=a, teacher=b),
    "ModuleDict": lambda a, b: Holder(nets=nn.ModuleDict({"student": a, "teacher": b})),
    "ModuleDict itself": lambda a, b: nn.ModuleDict({"student": a, "teacher": b}),
    "ModuleList": lambda a, b: Holder(nets=nn.ModuleList([a, b])),
    "compiled": lambda a, b: nn.ModuleDict({"student": compiled(a), "teacher": b}),
    "compiled holder": lambda a, b: compiled(Holder(nets=nn.ModuleList([a, compiled(b)]))),
    "with weights of its own": lambda a, b: Holder(nets=nn.ModuleList([a, b]), mix=nn.LayerNorm(4)),
}


@pytest.mark.parametrize("size", ["", "v=c"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_a_student_and_a_teacher_have_the_kinds_that_they_have_alone(name, size):
    make = MODELS[name, size]
    if (name, size) == ("no layers", "v=c"):
        pytest.skip("is no different from a block")
    alone = [*kinds(make()).values()]
    for holder in nn.Sequential(make()), nn.ModuleList([make()]), nn.ModuleDict({"only": make()}):
        assert [*kinds(holder).values()] == alone
    for pair in PAIRS.values():
        for teacher, expected in (make().requires_grad_(False), alone), (make(), alone + alone):
            found = kinds(pair(make(), teacher))
            assert [kind for name, kind in found.items() if "mix" not in name] == expected


def test_more_heads_are_heads():
    """Of other sizes, of later tokens, of several layers; alone, held, and beside other weights."""

    def model():
        body = llama(11, 8, 2)
        body.value = nn.Linear(8, 1)
        body.later = nn.ModuleList(nn.Linear(8, 11) for _ in range(2))
        body.lm_head = nn.Sequential(nn.Dropout(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 11))
        return body

    expected = {"value.weight", "later.0.weight", "later.1.weight", "lm_head.3.weight"}
    for m in (model(), held(model()), Holder(net=model(), scale=nn.LayerNorm(3))):
        assert {n for n, k in plain_names(kinds(m)).items() if k == "head"} == expected
    padded = llama(11, 8, 2)
    padded.lm_head = nn.Linear(8, 64)
    for m in (padded, compiled(padded), held(padded)):
        assert plain_names(kinds(m))["lm_head.weight"] == "head"


def test_raw_parameters_and_kernels_are_matrices_also_at_the_root():
    model = Holder(conv=nn.Conv1d(3, 4, 2), pair=nn.Bilinear(2, 3, 4), fc=nn.Linear(4, 2))
    model.position, model.gain = nn.Parameter(torch.zeros(1, 5, 4)), nn.Parameter(torch.zeros(4))
    assert kinds(model) == {
        "position": "matrix",
        "gain": "scalar",
        "conv.weight": "matrix",
        "conv.bias": "scalar",
        "pair.weight": "matrix",
        "pair.bias": "scalar",
        "fc.weight": "head",
        "fc.bias": "scalar",
    }
    inside = Holder(body=Holder(fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 4)))
    assert {*kinds(inside).values()} == {"head", "scalar"}
    inside.position = nn.Parameter(torch.zeros(5, 4))  # now it is a model, and no wrapper of one
    assert {*kinds(inside).values()} == {"matrix", "scalar"}


# ---- the groups ----------------------------------------------------------------------------------
@pytest.mark.parametrize("wrapper", ["compiled", "compiled blocks", "checkpointed", "held"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_every_trainable_parameter_is_in_one_group_with_its_kinds_lr_and_decay(name, wrapper):
    lrs = dict(matrix=0.02, embedding=0.3, head=0.004, scalar=0.04)
    model = MODELS[name, ""]()
    frozen = next(p for p in reversed([*model.parameters()]) if p.ndim > 1)
    frozen.requires_grad_(False)
    model = WRAPPERS[wrapper](model)
    groups, named = param_groups(model, lrs, 0.1, muon=True), dict(model.named_parameters())
    Muon(groups)
    found = [(n, p) for g in groups for n, p in zip(g["names"], g["params"], strict=True)]
    assert len(found) == len(named) - 1 and all(p is not frozen for _, p in found)
    assert len({id(p) for _, p in found}) == len(found) and all(named[n] is p for n, p in found)
    for g in groups:
        assert g["lr"] == lrs[g["kind"]] and g.get("use_muon", True) == (g["kind"] == "matrix")
        assert g["weight_decay"] == (0.1 if g["kind"] in ("head", "matrix") else 0.0)
