"""Which parameter gets which treatment: every trainable parameter in exactly one group.

    embedding   weights of Embedding and EmbeddingBag, a tied head among them    own lr   no decay
    head        Linear outside the blocks, of logits or directly in a model      own lr   decay
    matrix      all else with two or more dimensions (Muon works on these)       lr       decay
    scalar      gains and biases: fewer than two dimensions                      own lr   no decay

A module's kind follows from what it is and where it is. Going by "embedding" or "norm" in the name,
as many recipes do, misses `wte` and decays it; and wrappers put `module.` or `_orig_mod.` before
names. torch.compile, DDP, fully_shard, checkpoint_wrapper and a module that holds the model change
no kind:

    wrapper   has no parameters of its own, and one child that has some: the child takes its place
    block     is an element of a ModuleList; of a Sequential or ModuleDict if all elements that have
              parameters are of one class, or if it has parts and another one is of its class; but
              a whole language model, such as a student or a teacher, is not
    logits    come from a Linear with an embedding's shape: one for each of its rows
    model     is what is left without wrappers, and the smallest module with embedding and logits

A square Linear may be anything: it gives logits only if the module that holds it has the embedding.
A Linear that is not square changes the width and is no block of a residual stream: it may give
logits as an element too, as in a head of several layers or a list of heads.

Example:
    import torch
    from torch import nn
    from optim.param_groups import param_groups
    block = nn.TransformerEncoderLayer(d_model=8, nhead=2)
    model = nn.Sequential(nn.Embedding(50, 8), block, nn.Linear(8, 50))
    lrs = {"embedding": 1e-2, "head": 3e-3, "matrix": 1e-3, "scalar": 1e-3}
    optimizer = torch.optim.AdamW(param_groups(model, lrs, weight_decay=0.1))
    names = {group["kind"]: group["names"] for group in optimizer.param_groups}
    assert names["embedding"] == ["0.weight"] and names["head"] == ["2.weight"]
    assert "1.linear1.weight" in names["matrix"] and "1.norm1.weight" in names["scalar"]
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer


def kinds(model: nn.Module) -> dict[str, str]:
    """{parameter name: embedding | head | matrix | scalar} for each trainable parameter.

    A parameter that several modules share has one entry, and a tied head is an embedding.
    """
    tables = {id(p) for m in model.modules() if is_table(m) for p in weights(m)}
    heads = {id(p) for m in find_heads(model) for p in weights(m)}
    found = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # Tables first: a tied head is one as well, and counts as an embedding.
        if id(p) in tables:
            found[name] = "embedding"
        elif p.ndim < 2:
            found[name] = "scalar"
        elif id(p) in heads:
            found[name] = "head"
        else:
            found[name] = "matrix"
    return found


# ---- what a module is, and where -----------------------------------------------------------------
def find_heads(model: nn.Module) -> list[nn.Module]:
    """The Linear modules that give logits, or that a model has directly."""
    root = unwrapped(model)
    placed = [((root,), root), *outside_blocks(root)]
    logits = find_logits(placed)
    models = [root, *(m for m, _ in logits)]
    # A classifier's Linear has not the shape of an embedding, but its parent is the model.
    direct = []
    for above, m in placed:
        if is_linear(m) and any(above[-1] is x for x in models):
            direct.append(m)
    return direct + [m for _, m in logits]


def find_logits(placed: list) -> list[tuple[nn.Module, nn.Module]]:
    """(model, Linear that gives its logits), of modules as `outside_blocks` gives them."""
    tables = [m for _, m in placed if is_table(m)]
    found = []
    for above, m in placed:
        if not is_linear(m):
            continue
        shape = m.out_features, m.in_features
        same = [t for t in tables if (t.num_embeddings, t.embedding_dim) == shape]
        if not same:
            continue
        # The smallest module around both is the model; for a square Linear only its own parent.
        candidates = above[-1:] if is_square(m) else reversed(above)
        for x in candidates:
            if x is not None and any(t is y for y in x.modules() for t in same):
                found.append((x, m))
                break
    return found


def outside_blocks(m: nn.Module, above: tuple = ()):
    """(modules above it, module) of all that is in m and in no block, without wrappers.

    For an element of a stack that is no block (a bare embedding, a bare Linear that is not square)
    the last module above is None.
    """
    above = (*above, m)
    stack = blocks(m)
    for child in m.children():
        inner = unwrapped(child)
        if not any(child is block for block in stack):
            yield above, inner
            yield from outside_blocks(inner, above)
        elif is_table(inner) or (is_linear(inner) and not is_square(inner)):
            yield (*above, None), inner


def unwrapped(m: nn.Module) -> nn.Module:
    """The module without what only wraps it."""
    while not is_linear(m) and not is_table(m) and not blocks(m):
        children = [c for c in m.children() if has_parameters(c)]
        has_own = next(m.parameters(recurse=False), None) is not None
        if len(children) != 1 or has_own:
            break
        m = children[0]
    return m


def blocks(m: nn.Module) -> list[nn.Module]:
    """The children of m that are blocks."""
    if not isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return []
    found = [c for c in m.children() if has_parameters(c)]
    # A Sequential or ModuleDict may be a whole model: its blocks have a class in common.
    if not isinstance(m, nn.ModuleList):
        inner = [unwrapped(c) for c in found]
        classes = [own_class(x) for x in inner]
        if len(set(classes)) > 1:
            found = [
                c for c, x, k in zip(found, inner, classes) if classes.count(k) > 1 and has_parts(x)
            ]
    # An embedding of relative positions in some blocks makes no language models of them: a language
    # model has blocks of its own, or all elements give logits.
    logits = [find_logits([*outside_blocks(unwrapped(c))]) if has_table(c) else [] for c in found]
    if all(any(not is_square(x) for _, x in pairs) for pairs in logits):
        return []
    return [c for c, pairs in zip(found, logits) if not (pairs and any(map(blocks, c.modules())))]


def own_class(m: nn.Module) -> type:
    """The class of m before fully_shard or a parametrization made a subclass of it."""
    added = ("torch.distributed", "torch.nn.utils")
    return next(c for c in type(m).__mro__ if not c.__module__.startswith(added))


def has_parameters(m: nn.Module) -> bool:
    return next(m.parameters(), None) is not None


def has_parts(m: nn.Module) -> bool:
    return next(m.children(), None) is not None


def has_table(m: nn.Module) -> bool:
    return any(map(is_table, m.modules()))


def has(m: nn.Module, *names: str) -> bool:
    """Does m itself have these? A wrapper passes on the attributes of what it wraps."""
    return all(name in vars(m) or hasattr(type(m), name) for name in names)


def is_linear(m: nn.Module) -> bool:
    return has(m, "in_features", "out_features") and bool(weights(m))


def is_square(m: nn.Module) -> bool:
    return m.in_features == m.out_features


def is_table(m: nn.Module) -> bool:
    return has(m, "num_embeddings", "embedding_dim")


def weights(m: nn.Module) -> list[nn.Parameter]:
    """The weight, or what a parametrization or weight norm makes it of."""
    named = m.named_parameters()
    return [p for n, p in named if n.removeprefix("parametrizations.").startswith("weight")]


# ---- groups --------------------------------------------------------------------------------------
def param_groups(
    model: nn.Module,
    lrs: dict[str, float],
    weight_decay: float,
    muon: bool = False,
    decay_embeddings: bool = False,
) -> list[dict]:
    """Groups for an optimizer's constructor, each with its `kind` and its parameters' full `names`.

    lrs: kind -> learning rate. With `muon`, all but the matrices carry `use_muon=False`.
    decay_embeddings: weight decay for these too, as nanoGPT has it.
    """
    params = dict(model.named_parameters())
    names_of = {}  # kind -> names
    for name, kind in kinds(model).items():
        names_of.setdefault(kind, []).append(name)
    # Decay pulls a rare token's embedding to 0 in every step, also where the token is absent.
    spared = ("scalar",) if decay_embeddings else ("embedding", "scalar")
    groups = []
    for kind, names in names_of.items():
        group = {
            "kind": kind,
            "names": names,
            "params": [params[name] for name in names],
            "lr": lrs[kind],
            "weight_decay": 0.0 if kind in spared else weight_decay,
        }
        if muon and kind != "matrix":
            group["use_muon"] = False
        groups.append(group)
    return groups


def skip_compiler_import() -> None:
    """Saves a run that compiles nothing the second it takes to import the compiler.

    Four methods of torch's Optimizer import it at their first call, only to be left out of
    compilation.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        # torch imports the compiler where this attribute is missing.
        if method is not None and not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)


# ---- what optimizers of others may lack ----------------------------------------------------------
def averages_weights(optimizer: Optimizer | type[Optimizer]) -> bool:
    """Does it keep a second set of weights, to evaluate and save?

    Such a method (Schedule-Free, hooks/ema.py, hooks/ema_nesterov.py) has train() and eval(), which
    swap the two in the model.
    """
    return hasattr(optimizer, "eval")


def sent_bytes(optimizer: Optimizer) -> int:
    """Bytes that this rank sends in each step of the optimizer.

    parallel/adapter.py writes them on an optimizer whose parameters are sharded; others send
    nothing.
    """
    return getattr(optimizer, "sent_bytes", 0)


# ---- weights to evaluate, state by name ----------------------------------------------------------
@contextmanager
def evaluation_weights(optimizer: Optimizer, share: Callable[[], None] = lambda: None, **options):
    """Inside, the model holds the weights to evaluate, save and sample.

    For Schedule-Free they are the average x. options: of the optimizer's eval(). share(): tells
    other ranks that the optimizer's parameters here have changed. Gives {name: the weights training
    resumes from}, empty where they are the same. Afterwards the model holds the very bits it had:
    an evaluation changes nothing.
    """
    groups = optimizer.param_groups
    # Nothing to swap: there is no average, or eval() has put it into the model already.
    if not averages_weights(optimizer) or not any(g.get("train_mode", True) for g in groups):
        yield {}
        return
    # eval() and train() compute the weights anew, and rounding keeps them from coming back
    # bit for bit: keep copies of the weights and of what they lost in rounding.
    params = {name: p for g in groups for name, p in zip(g["names"], g["params"])}
    training = {name: p.detach().clone() for name, p in params.items()}
    lost = {p: state["lost"].clone() for p, state in optimizer.state.items() if "lost" in state}
    optimizer.eval(**options)
    share()
    yield training
    optimizer.train()
    # train() computes y anew and rounds it: put the very bits back.
    with torch.no_grad():
        for name, before in training.items():
            params[name].copy_(before)
        for p, state in optimizer.state.items():
            if p in lost:
                state["lost"].copy_(lost[p])
            else:
                state.pop("lost", None)
    share()


# A resumed run takes these from its own settings, not from the checkpoint.
OWN_SETTINGS = ("lr", "initial_lr", "weight_decay", "momentum", "initial_momentum", "fused")


def state_by_name(optimizer: Optimizer) -> dict:
    """The optimizer's state by parameter name, and what its groups hold beside the parameters.

    Groups without a parameter on this rank are left out. load_state_by_name takes both.
    """
    state = {}
    groups = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"]):
            if p in optimizer.state:
                state[name] = dict(optimizer.state[p])  # eval() may put others in their place
        if group["params"]:
            left_out = ("params", "names", "kind")
            groups[group["kind"]] = {k: x for k, x in group.items() if k not in left_out}
    return {"state": state, "groups": groups}


def load_state_by_name(
    optimizer: Optimizer, groups: dict, state_of: Callable[[str, tuple[int, ...]], dict]
) -> None:
    """Loads state and what the groups count; learning rates and decay stay the config's.

    groups: as state_by_name gives them. state_of(name, shape on this rank): that parameter's state,
    {} for none.
    """
    state_dict = optimizer.state_dict()
    names = {}  # the parameter's number in state_dict -> its name
    for group in state_dict["param_groups"]:
        for key, x in groups[group["kind"]].items():
            # A checkpoint makes lists of tuples, such as betas.
            if key not in OWN_SETTINGS:
                group[key] = tuple(x) if isinstance(x, list) else x
        names |= zip(group["params"], group["names"])
    shapes = {}
    for group in optimizer.param_groups:
        shapes |= {name: p.shape for name, p in zip(group["names"], group["params"])}
    # Read for each parameter in turn, and only the shard that this rank holds.
    state_dict["state"] = {}
    for i, name in names.items():
        state = state_of(name, shapes[name])
        # A branch may go on without the average that its run kept (hooks/ema.py).
        if "ema" not in getattr(optimizer, "keeps", ()):
            state.pop("ema", None)
        if state:
            state_dict["state"][i] = state
    optimizer.load_state_dict(state_dict)


if __name__ == "__main__":
    block = nn.TransformerEncoderLayer(d_model=8, nhead=2)
    for name, kind in kinds(nn.Sequential(nn.Embedding(50, 8), block, nn.Linear(8, 50))).items():
        print(f"{kind:9}  {name}")
