"""What an optimizer class says of itself, and what is assumed of one that does not.

    attribute      assumed   what it decides
    elementwise    False     may a shard of a parameter be stepped alone? (asked and assumed in
                             parallel/adapter.py and fsdp.py)
    elementwise_elsewhere  False  as elementwise, of all but hidden matrices (hooks/wear.py)
    matrices_only  False     do all parameters but matrices belong in groups with use_muon=False?
    zero_init      True      may projections and head start at 0?
    heavy_step     False     too much work for every replica to repeat: ranks share it out
    mup_rule       None      how a step scales, in the words of optim/mup.py; None: no rule
    state_numbers  -         numbers of state that a parameter of a shape takes, for
                             memory/ranks.py; keyword-only arguments are the options that matter

zero_init, heavy_step and mup_rule belong to the method. A class without them, such as
torch.optim.AdamW, takes them from our class of the same name. The others belong to the code, and a
class speaks only for itself.

Example:
    import torch
    from optim.attributes import attribute
    class Mine(torch.optim.SGD):
        heavy_step = True
    assert attribute(Mine, "heavy_step")
    assert not attribute(torch.optim.SGD, "heavy_step")
"""

import importlib
import pkgutil

from torch.optim import Optimizer

import optim

ASSUMED = {"matrices_only": False, "zero_init": True, "heavy_step": False, "mup_rule": None}
OF_THE_METHOD = ("zero_init", "heavy_step", "mup_rule")


def attribute(cls: type[Optimizer], name: str):
    """What `cls` says of itself under this name, or what is assumed of it."""
    if hasattr(cls, name):
        return getattr(cls, name)
    # torch.optim.AdamW says nothing of itself: our class of the same name answers for it.
    if name in OF_THE_METHOD:
        for ours in own_classes().values():
            if ours.__name__ == cls.__name__ and hasattr(ours, name):
                return getattr(ours, name)
    return ASSUMED[name]


def own_classes() -> dict[str, type[Optimizer]]:
    """The optimizers that the files here define, as --optim= names them.

    A file's first one is `file`, others are `file.Class`. A file that cannot be imported has none.
    """
    found = {}
    for file in sorted(module.name for module in pkgutil.iter_modules(optim.__path__)):
        try:
            module = importlib.import_module(f"optim.{file}")
        except Exception:
            # A file that somebody adds can raise anything; --optim=FILE shows the error.
            continue
        for name, cls in vars(module).items():
            if not isinstance(cls, type) or not issubclass(cls, Optimizer):
                continue
            # Not a class that the file only imports, such as one of torch's.
            if cls.__module__ == module.__name__:
                key = f"{file}.{name}" if file in found else file
                found[key] = cls
    return found


if __name__ == "__main__":
    print(f"{'':33} {'  '.join(ASSUMED)}")
    for name, cls in own_classes().items():
        print(f"{name:33}", *(f"{attribute(cls, key)!s:{len(key) + 1}}" for key in ASSUMED))
