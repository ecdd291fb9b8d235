"""Optimizer classes that keep a second set of weights: what hooks/ema.py and ema_nesterov.py share.

Such a class is a subclass of any optimizer's, of the same name, with eval() and train() as
optim/schedule_free.py has them: train() before training, eval() before anything else, both may be
called twice. A new optimizer is in train mode; step() in eval mode raises. The tensors lie in the
optimizer's own state, so checkpoints, rollbacks and every layout hold them, and each is stepped
element by element: a shard by itself.

Example:
    import torch
    from hooks.keep import subclass
    class_of = lambda cls: subclass(class_of, cls, (), {"steps": 0}, keys=("first",))
    optimizer = class_of(torch.optim.SGD)([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.steps == 0
"""

import functools
import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer


def subclass(
    make: Callable,
    cls: type[Optimizer],
    arguments: tuple,
    body: dict,
    keys: Sequence[str],
    passing: Sequence[str] = (),
) -> type[Optimizer]:
    """A subclass of cls of the same name with this body, which pickles as make(cls, *arguments).

    keys, passing: the names of what it keeps of a parameter in the optimizer's state, always or in
    eval mode. They are loaded as they are: torch would round them to the parameter's dtype, and cls
    need not know them.
    """
    names = (*keys, *passing)

    def load_state_dict(self, state_dict: dict) -> None:
        own = {}

        def take_own(_, saved: dict) -> dict:
            numbers = [i for group in saved["param_groups"] for i in group["params"]]
            params = [p for group in self.param_groups for p in group["params"]]
            for i, p in zip(numbers, params):
                own[p] = {key: x for key, x in saved["state"].get(i, {}).items() if key in names}
            others = {
                i: {key: x for key, x in state.items() if key not in names}
                for i, state in saved["state"].items()
            }
            return {**saved, "state": others}

        def put_own(_) -> None:
            for p, entries in own.items():
                for key, x in entries.items():
                    self.state[p][key] = x.to(p.device, copy=True)

        # After the caller's pre-hooks, which may reorder, and before the caller's post-hooks.
        first = self.register_load_state_dict_pre_hook(take_own)
        last = self.register_load_state_dict_post_hook(put_own, prepend=True)
        try:
            cls.load_state_dict(self, state_dict)
        finally:
            first.remove()
            last.remove()

    own = {"load_state_dict": load_state_dict, "keeps": (*keys, *getattr(cls, "keeps", ()))}
    body = own | recipe(make, cls, arguments) | body
    if hasattr(cls, "state_numbers"):

        @functools.wraps(cls.state_numbers)
        def state_numbers(shape, *others, **options):
            return cls.state_numbers(shape, *others, **options) + len(keys) * math.prod(shape)

        body["state_numbers"] = staticmethod(state_numbers)
    return type(cls.__name__, (cls,), body)


def recipe(make: Callable, cls: type[Optimizer], arguments: tuple) -> dict:
    """What the body of a class needs that make(cls, *arguments) makes: no module has its name."""

    def reduce(self, protocol):
        return made_again, layers(type(self)), self.__getstate__()

    made_by = {"beneath": cls, "made_by": (make, arguments), "__reduce_ex__": reduce}
    # torch's fused kernels skip a step that overflows inside step(), where nothing else learns of
    # it. With this GradScaler unscales by itself, and does not call step().
    scaled_outside = property(lambda self: False, lambda self, value: None)
    return made_by | {"__module__": cls.__module__, "_step_supports_amp_scaling": scaled_outside}


def layers(cls: type[Optimizer]) -> tuple:
    """(the class at the bottom, what has made the next one, ...)"""
    if "made_by" not in vars(cls):
        return (cls,)
    return *layers(cls.beneath), vars(cls)["made_by"]


def made_again(cls: type[Optimizer], *made_by: tuple) -> Optimizer:
    """What a pickle begins with."""
    for make, arguments in made_by:
        cls = make(cls, *arguments)
    return cls.__new__(cls)


def plain_step(cls: type[Optimizer]) -> Callable:
    """cls.step without what torch adds to it at a class's first instance: that comes once more."""
    return cls.step.__wrapped__ if getattr(cls.step, "hooked", False) else cls.step


def check_mode(optimizer: Optimizer) -> None:
    """Raises RuntimeError in eval mode."""
    if not all(group.get("train_mode", True) for group in optimizer.param_groups):
        raise RuntimeError(
            f"{type(optimizer).__name__}: the model holds the weights to evaluate; call"
            " optimizer.train() before step()"
        )


def beneath(cls: type[Optimizer]) -> type[Optimizer]:
    """The class that `subclass` was given, at the bottom; cls itself where it is none of these."""
    return layers(cls)[0]


if __name__ == "__main__":
    print(__doc__)
