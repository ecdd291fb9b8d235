"""The optimizer class that --optim= names, and the arguments its constructor needs."""

import importlib
import pkgutil

import torch

import optim
from optim import param_groups
from settings import checks
from settings.fields import Config


def chosen(cfg: Config) -> type[torch.optim.Optimizer]:
    """The class of --optim=, with the hooks of --hooks= and the average of --ema=.

    Raises ValueError.
    """
    optimizer_class = find_optimizer(cfg.optim)
    if cfg.hooks is None and not cfg.sub("hook") and cfg.ema is None:
        return optimizer_class
    from run.hooks import with_hooks

    return with_hooks(cfg, optimizer_class)


def optimizer_files() -> list[str]:
    """Modules of optim/ that hold optimizers."""
    helpers = ("attributes", "param_groups", "mup", "qk_clip")
    return [m.name for m in pkgutil.iter_modules(optim.__path__) if m.name not in helpers]


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class that `file` or `file.Class` names in optim/.

    `file` alone means the first class that is defined there, else the one that is imported there.
    Raises ValueError with the nearest name, or with what the file lacks.
    """
    file, dot, wanted = name.partition(".")
    files = optimizer_files()
    if file not in files:
        raise ValueError(
            f"--optim={name}: there is no such file in optim/; {checks.nearest(file, files)}"
        )
    where = f"--optim={name}: optim/{file}.py"
    module = import_file(file, where)

    # An imported class counts, too: a file may do no more than import another package's optimizer.
    found = {}
    for class_name, member in module.items():
        is_optimizer = isinstance(member, type) and issubclass(member, torch.optim.Optimizer)
        if is_optimizer and member is not torch.optim.Optimizer:
            found[class_name] = member
    own = [c for c in found.values() if c.__module__ == module["__name__"]]
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
    if wanted:
        return found[wanted]
    return [*own, *found.values()][0]


def import_file(file: str, where: str) -> dict:
    """The names of the module optim.`file`. where: how its errors begin. Raises ValueError."""
    try:
        return vars(importlib.import_module(f"optim.{file}"))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where} imports {error.name}, which is not installed; type pip install "
            f"{error.name}, or take another optimizer"
        ) from None
    except Exception as error:  # whatever a file can raise
        raise ValueError(
            f"{where} cannot be imported: {in_a_line(error)}; python -m optim.{file} shows "
            "the line, or take another optimizer"
        ) from None


def in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def trial(cfg: Config, optimizer_class: type) -> tuple[dict, dict]:
    """(a group of such an optimizer, the arguments its constructor cannot do without).

    The arguments are among lr and weight_decay. Only making one shows what is needed: signatures
    hide arguments behind **options and sentinels. Expects checked --opt.NAME. Raises ValueError
    where no optimizer can be made.
    """
    param_groups.skip_compiler_import()
    options = cfg.sub("opt")
    lr = {"lr": 1e-3 if cfg.lr is None else cfg.lr}
    decay = {"weight_decay": cfg.weight_decay or 0.0}

    # Fewest arguments first, so that what succeeds is what is needed.
    first_error = None
    for needed in ({}, lr, decay, lr | decay):
        try:
            # A matrix, for Muon refuses vectors.
            made = optimizer_class([torch.nn.Parameter(torch.zeros(1, 1))], **needed, **options)
            return made.param_groups[0], needed
        except Exception as error:  # whatever a constructor can raise
            first_error = first_error or error

    # A ValueError of the optimizer is a sentence for the user already.
    if isinstance(first_error, ValueError):
        raise ValueError(" ".join(str(first_error).split())) from None
    raise ValueError(
        f"--opt.*: {optimizer_class.__name__} cannot take {options}: {in_a_line(first_error)}; "
        "--lr= and --opt.NAME= give it arguments"
    )
