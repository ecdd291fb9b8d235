"""Which parameter gets which treatment: every trainable parameter in exactly one group.

    embedding   weights of nn.Embedding, a tied head among them      own lr   no weight decay
    head        Linear outside the blocks                            own lr   decay
    matrix      every other weight with two or more dimensions       lr       decay (Muon works on these)
    scalar      gains and biases: fewer than two dimensions          own lr   no weight decay

Decided by the type of the module, the number of dimensions and, for the head, its place at the root. Going by
"embedding" or "norm" in the name, as many recipes do, misses `wte` and decays it.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer


def kinds(model: nn.Module) -> dict[str, str]:
    """{parameter name: embedding | head | matrix | scalar} for every trainable parameter, each storage
    once."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in embeddings:
            found[name] = "embedding"
        elif p.ndim < 2:
            found[name] = "scalar"
        else:
            found[name] = "matrix" if "." in name.removesuffix(".weight") else "head"
    return found


def param_groups(
    model: nn.Module, lrs: dict[str, float], weight_decay: float, muon: bool = False
) -> list[dict]:
    """Groups for an optimizer's constructor, each with its `kind` and its parameters' full `names`.

    lrs: kind -> learning rate. With `muon`, all but the matrices carry `use_muon=False`.
    """
    params, groups = dict(model.named_parameters()), {}
    for name, kind in kinds(model).items():
        groups.setdefault(kind, []).append(name)
    return [
        dict(kind=kind, names=names, params=[params[n] for n in names], lr=lrs[kind],
             weight_decay=0.0 if kind in ("embedding", "scalar") else weight_decay,
             **({"use_muon": False} if muon and kind != "matrix" else {}))
        for kind, names in groups.items()
    ]  # fmt: skip


def without_compiler() -> None:
    """Saves a run that compiles nothing the second it takes to import the compiler.

    Four methods of torch's Optimizer import it at their first call, only to be left out of compilation.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)


@contextmanager
def evaluation_weights(optimizer: Optimizer, share=lambda: None):
    """Inside, the model holds the weights to evaluate, save and sample: for Schedule-Free the average x.

    share(): tells other ranks that the optimizer's parameters here have changed. Gives {name: the weights
    training goes on from}, empty where they are the same. Afterwards the model holds the very bits it had:
    looking changes nothing.
    """
    if not hasattr(optimizer, "eval"):
        yield {}
        return
    params = {n: p for g in optimizer.param_groups for n, p in zip(g["names"], g["params"])}
    kept = {n: p.detach().clone() for n, p in params.items()}
    optimizer.eval()
    share()
    yield kept
    optimizer.train()
    with torch.no_grad():
        for name, before in kept.items():
            params[name].copy_(before)
    share()


CONFIGS = ("lr", "initial_lr", "weight_decay", "momentum", "initial_momentum", "fused")  # the config's to say


def state_by_name(optimizer: Optimizer) -> dict:
    """The optimizer's state by parameter name, and its groups without the parameters (only groups that have
    some here): what load_state_by_name takes."""
    state = {
        n: optimizer.state[p]
        for g in optimizer.param_groups
        for n, p in zip(g["names"], g["params"])
        if p in optimizer.state
    }
    groups = {
        g["kind"]: {k: v for k, v in g.items() if k not in ("params", "names", "kind")}
        for g in optimizer.param_groups
        if g["params"]
    }
    return dict(state=state, groups=groups)


def load_state_by_name(optimizer: Optimizer, groups: dict, state_of) -> None:
    """State and whatever the groups count; the learning rates and the decay stay the config's.

    groups: as state_by_name gives them; state_of(name, shape): the state of that parameter, of which this
    shape is here; {} for none.
    """
    new, shapes = optimizer.state_dict(), {n: p.shape for g in optimizer.param_groups
                                           for n, p in zip(g["names"], g["params"])}  # fmt: skip
    ids = {}
    for group in new["param_groups"]:
        old = {k: tuple(v) if isinstance(v, list) else v for k, v in groups[group["kind"]].items()}
        group.update({k: v for k, v in old.items() if k not in CONFIGS})
        ids |= zip(group["params"], group["names"])
    new["state"] = {i: state for i, name in ids.items() if (state := state_of(name, shapes[name]))}
    optimizer.load_state_dict(new)
