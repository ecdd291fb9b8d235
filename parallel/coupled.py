"""Optimizers whose step of one parameter depends on others."""

import inspect

import torch
from torch import nn


def refuse_coupled(cls: type[torch.optim.Optimizer], groups: list[dict], arguments: dict) -> None:
    """Raises ValueError for a method whose step of one parameter depends on the others (Prodigy,
    LBFGS): where they are dealt out to ranks or stepped one after the other it would silently be
    another method.

    Tried, not asked: a matrix alone and beside another one, in float64, with the options of the
    first group. What cannot be tried here (options for a GPU, say) passes.
    """
    why = (
        f"{cls.__name__} looks at all parameters together, and here they are stepped apart; take a"
        " layout in which one optimizer has them all (--data_parallel=ddp), or another optimizer"
    )
    closure = inspect.signature(cls.step).parameters.get("closure")
    # LBFGS: called again and again
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(why)
    options = {
        k: v for k, v in groups[0].items() if k not in ("params", "names", "param_names", "kind")
    }
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 2, 2, generator=generator, dtype=torch.double)
    noise = torch.randn(20, 2, 2, 2, generator=generator, dtype=torch.double)

    def moved(n: int, turn: int) -> torch.Tensor:
        """By how much 20 steps move the first of n matrices; the second one's gradient turns, or
        not."""
        params = [nn.Parameter(w.clone()) for w in weights[:n]]
        optimizer = cls([{**options, "params": params}], **arguments)
        getattr(optimizer, "train", lambda: None)()
        for step in range(20):
            torch.manual_seed(step)  # a method that draws noise draws the same for the first matrix
            for p, g, scale in zip(params, noise[step], (1, 100 * turn**step)):
                p.grad = scale * (1 + g / 10)
            optimizer.step()
        return params[0].detach() - weights[0]

    with torch.random.fork_rng(devices=[]):
        try:
            alone, *beside = moved(1, 1), moved(2, 1), moved(2, -1)
        except Exception:
            return
    if max((alone - x).abs().max() for x in beside) > 1e-6 * alone.abs().max():
        raise ValueError(why)
