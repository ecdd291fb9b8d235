"""The class that --optim= names, and what it needs to be made."""

import importlib
import pkgutil

import torch

import optim
from optim import param_groups
from settings import checks
from settings.fields import Config


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class for `file` (its own first one, or the one it imports) or `file.Class` in optim/.
    Raises ValueError with the nearest name, or with what the file lacks."""
    file, dot, wanted = name.partition(".")
    others = ("attributes", "param_groups", "mup", "qk_clip")  # what stands beside the optimizers
    files = [m.name for m in pkgutil.iter_modules(optim.__path__) if m.name not in others]
    if file not in files:
        raise ValueError(
            f"--optim={name}: there is no such file in optim/; {checks.nearest(file, files)}"
        )
    where = f"--optim={name}: optim/{file}.py"
    try:
        module = vars(importlib.import_module(f"optim.{file}"))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where} imports {error.name}, which is not installed; type pip install "
            f"{error.name}, or take another optimizer"
        ) from None
    except Exception as error:  # whatever a file can raise
        raise ValueError(
            f"{where} cannot be imported: {said(error)}; python -m optim.{file} shows "
            "the line, or take another optimizer"
        ) from None
    base = torch.optim.Optimizer
    classes = {n: c for n, c in module.items() if isinstance(c, type) and c is not base}
    found = {n: c for n, c in classes.items() if issubclass(c, base)}
    own = {n: c for n, c in found.items() if c.__module__ == module["__name__"]}
    if not found:
        raise ValueError(
            f"{where} has no optimizer; define or import a class there that is "
            "derived from torch.optim.Optimizer"
        )
    if dot and wanted not in found:
        near = checks.nearest(wanted, [*found])
        raise ValueError(f"--optim={name}: no such class in that file; {near}")
    if not wanted and not own and len(set(found.values())) > 1:
        raise ValueError(
            f"{where} imports {', '.join(found)}; type one, such as --optim={file}."
            f"{next(iter(found))}"
        )
    return found[wanted] if wanted else [*own.values(), *found.values()][0]


def said(error: Exception) -> str:
    """An error in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def trial(cfg: Config, optimizer_class: type) -> tuple[dict, dict]:
    """What a group of such an optimizer holds, and which of lr and weight_decay its constructor
    cannot do without. Only making one shows it: signatures hide things behind **options and
    sentinels. --opt.* has been checked. Raises ValueError where it cannot be made."""
    param_groups.without_compiler()
    options = cfg.sub("opt")
    lr = {"lr": 1e-3 if cfg.lr is None else cfg.lr}
    decay, why = {"weight_decay": cfg.weight_decay or 0.0}, None
    for needed in ({}, lr, decay, lr | decay):
        try:
            made = optimizer_class([torch.nn.Parameter(torch.zeros(1, 1))], **needed, **options)
            return made.param_groups[0], needed
        except Exception as error:  # whatever a constructor can raise
            why = why or error
    if isinstance(why, ValueError):
        raise ValueError(" ".join(str(why).split())) from None
    raise ValueError(
        f"--opt.*: {optimizer_class.__name__} cannot take {options}: {said(why)}; "
        "--lr= and --opt.NAME= give it arguments"
    )
