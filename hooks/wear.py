"""An optimizer class that wears hooks: each may change what a step has done to a hidden matrix.

    before = a copy of every hidden matrix
    the optimizer's step, with weight decay and all
    for each hook in turn: hook(p, before, lr)            in place on p

So a hook knows nothing of the optimizer, and the optimizer nothing of hooks: `before - p` is what
the one has done and the other may change. The class stays a subclass of the optimizer's, with its
state, its groups and its schedulers; a skipped step stays skipped.

A hidden matrix is a parameter of a group of kind "matrix" (optim/param_groups.py); in groups
without a kind, whatever has two dimensions or more, but for use_muon=False. Norms are those of
whole matrices and rows, so the class says elementwise = False, and ZeRO, FSDP2 and tensor
parallelism hand it whole matrices. Embeddings, head and vectors may still be stepped in shards. A
half-precision matrix is handed over in float32, but what the optimizer did is rounded by then: a
step that is lost in rounding is none to a hook. Under precision/stochastic.py it is not yet
rounded. Memory: a copy of the matrices that this rank steps, during the step; nothing between.

A hook is any callable of (p, before, lr). It may say
    starts_at_zero = False     a matrix of zeros would stay zero: projections must not start there
    needs_decay_off = True     the optimizer's own weight decay contradicts it
    takes_dtensors = False     it needs plain tensors; DTensors' own operations give whole norms
A step at lr 0 leaves every weight as it is: torch.distributed.checkpoint takes one on its own.
Refused: Schedule-Free, whose step moves two sets of weights.

Neighbours: hooks/keep.py

Example:
    import torch
    from hooks.wear import hooked
    def keep_norm(p, before, lr):
        p.mul_(before.norm() / p.norm())
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    norms = [p.norm().item() for p in model.parameters() if p.ndim == 2]
    optimizer = hooked(torch.optim.AdamW, [keep_norm])(
        model.parameters(), lr=0.01, weight_decay=0
    )
    for _ in range(20):
        x = torch.randn(64, 8)
        loss = (model(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = [p.norm().item() for p in model.parameters() if p.ndim == 2]
    assert all(abs(a - b) < 1e-4 for a, b in zip(norms, after))
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from hooks.keep import beneath, plain_step, recipe


def hooked(cls: type[Optimizer], hooks: Sequence[Callable]) -> type[Optimizer]:
    """A subclass of cls of the same name whose step() ends with `hooks`, in this order.

    Raises ValueError for a class that averages weights.
    """
    if hasattr(cls, "eval"):
        raise ValueError(
            f"{cls.__name__} keeps a second set of weights, and a hook sees one; take another"
            " optimizer, or no hook"
        )
    # A class that wears hooks gets more of them.
    cls, hooks = beneath(cls), (*worn(cls), *hooks)
    plain = plain_step(cls)

    def step(self, closure=None):
        moved = [
            (p, p.detach().clone(), group["lr"])
            for group in self.param_groups
            for p in group["params"]
            # A closure may bring the gradients only now.
            if p.numel() and is_hidden(p, group) and (closure or p.grad is not None)
            # A tensor is not asked: on a GPU that would wait for it.
            if torch.is_tensor(group["lr"]) or group["lr"] != 0
        ]
        loss = plain(self, closure)
        for p, before, lr in moved:
            change(p, before, lr, hooks)
        return loss

    def add_param_group(self, param_group: dict) -> None:
        cls.add_param_group(self, param_group)
        group = self.param_groups[-1]
        plain_only = [hook for hook in hooks if not getattr(hook, "takes_dtensors", True)]
        if plain_only and any(
            hasattr(p, "placements") and is_hidden(p, group) for p in group["params"]
        ):
            # torch has appended the group already: take it back before the error.
            self.param_groups.pop()
            raise ValueError(
                f"{type(plain_only[0]).__name__}: needs whole matrices and got DTensors;"
                " make_optimizer of parallel/sharded_optimizer.py brings them together"
            )

    attributes = {"step": step, "hooks": hooks, **recipe(hooked, cls, (hooks,))}
    attributes["add_param_group"] = add_param_group
    attributes["elementwise"] = False
    attributes["elementwise_elsewhere"] = getattr(cls, "elementwise", False)
    if not all(getattr(hook, "starts_at_zero", True) for hook in hooks):
        attributes["zero_init"] = False
    return type(cls.__name__, (cls,), attributes)


def worn(cls: type[Optimizer]) -> tuple[Callable, ...]:
    """The hooks of a class that `hooked` has made; () of any other."""
    return getattr(cls, "hooks", ())


def is_hidden(p: Tensor, group: dict) -> bool:
    if p.is_complex():
        return False
    if "kind" in group:
        return group["kind"] == "matrix"
    return p.ndim >= 2 and group.get("use_muon") is not False


@torch.no_grad()
def change(p: Tensor, before: Tensor, lr: float, hooks: Sequence[Callable]) -> None:
    """In place on p, which a step at lr has moved from `before`."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    work, before = p.detach().to(dtype), before.to(dtype)
    for hook in hooks:
        hook(work, before, lr)
    if p.dtype != dtype:
        p.copy_(work)  # rounded once


if __name__ == "__main__":
    print(__doc__)
