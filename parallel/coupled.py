"""Optimizers whose step of one parameter depends on others: found by trying, and refused."""

import inspect

import torch
from torch import nn

TRIAL_STEPS = 20


def refuse_coupled(cls: type[torch.optim.Optimizer], groups: list[dict], arguments: dict) -> None:
    """Raises ValueError for a method that couples parameters, such as Prodigy or LBFGS.

    If its parameters are dealt out to ranks, or stepped one after the other, such a method would
    silently be another one. The class is tried, not asked: it steps a matrix alone and beside
    another one, in float64, with the options of the first group. If it cannot be tried here (its
    options need a GPU, say), it passes.
    """
    why = (
        f"{cls.__name__} looks at all parameters together, and here they are stepped apart; take a"
        " layout in which one optimizer has them all (--data_parallel=ddp), or another optimizer"
    )
    # A method that must be given a closure computes the loss again and again, as LBFGS does.
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(why)

    not_options = ("params", "names", "param_names", "kind")
    options = {key: value for key, value in groups[0].items() if key not in not_options}
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 2, 2, generator=generator, dtype=torch.double)
    noise = torch.randn(TRIAL_STEPS, 2, 2, 2, generator=generator, dtype=torch.double)

    def moved(n: int, sign: int) -> torch.Tensor:
        """By how much the steps move the first of n matrices, a (2, 2) tensor.

        sign=-1: the second matrix's gradient changes its sign from step to step.
        """
        params = [nn.Parameter(w.clone()) for w in weights[:n]]
        optimizer = cls([{**options, "params": params}], **arguments)
        if hasattr(optimizer, "train"):
            optimizer.train()  # Schedule-Free refuses to step otherwise
        for step in range(TRIAL_STEPS):
            # A method that draws noise must draw the same for the first matrix.
            torch.random.default_generator.manual_seed(step)
            # The second gradient is 100 times larger, so that its influence shows.
            for p, g, scale in zip(params, noise[step], (1, 100 * sign**step)):
                p.grad = scale * (1 + g / 10)
            optimizer.step()
        return params[0].detach() - weights[0]

    # The trial seeds the CPU's generator, which gets its state back. (torch.manual_seed would seed
    # those of GPUs, too.)
    with torch.random.fork_rng(devices=[]):
        try:
            alone = moved(1, 1)
            beside = [moved(2, 1), moved(2, -1)]
        except Exception:
            return
    tolerance = 1e-6 * alone.abs().max()
    if max((alone - x).abs().max() for x in beside) > tolerance:
        raise ValueError(why)
