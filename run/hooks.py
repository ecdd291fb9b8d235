"""The hooks that --hooks= names, with their --hook.NAME.FIELD=, and --ema=, on the optimizer."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable

import torch

import hooks as folder
from hooks.ema import averaged
from hooks.wear import hooked
from settings import checks
from settings.fields import Config

HELPERS = ("wear", "keep", "ema")  # files in hooks/ that --hooks= does not name
# Hooks of which the first undoes what the second does -> why.
CONTRADICT = {
    ("hyperball", "radial_brake"): "hyperball keeps the norm that radial_brake slows down",
    ("hyperball", "radius_pin"): "both decide a matrix's norm",
    ("hyperball", "uw_floor"): "hyperball gives every step the same relative size",
    ("hyperball", "cautious_decay"): "hyperball undoes what decay takes away",
}


def with_hooks(cfg: Config, optimizer_class: type) -> type[torch.optim.Optimizer]:
    """The class that wears the hooks of cfg, and averages.

    A second set of weights comes last, around all that changes a step. Raises ValueError for
    unknown hooks and fields, values out of range, and hooks that contradict each other, the
    optimizer or another setting.
    """
    names = [] if cfg.hooks is None else cfg.hooks.split(",")
    for field in cfg.sub("hook"):
        name, dot, _ = field.partition(".")
        if not dot:
            raise ValueError(f"--hook.{field}= has no field; type --hook.NAME.FIELD=")
        if name not in names:
            raise ValueError(f"--hook.{field} needs --hooks={name}")
    hooks = [make(cfg, name) for name in names]
    check_together(cfg, names)
    for name, hook in zip(names, hooks):
        if getattr(hook, "needs_decay_off", False) and cfg.weight_decay:
            raise ValueError(
                f"--hooks={name} and --weight_decay={cfg.weight_decay:g} contradict each other;"
                " leave --weight_decay out, and the optimizer's own is off"
            )
    if cfg.zero_init is True and not all(getattr(hook, "starts_at_zero", True) for hook in hooks):
        raise ValueError(
            f"--hooks={cfg.hooks} keeps a matrix of zeros at zero; leave --zero_init=true out"
        )
    of_steps = [hook for hook in hooks if not hasattr(hook, "wear")]
    made = optimizer_class
    if of_steps:
        made = said_of(f"--hooks={cfg.hooks}", hooked, made, of_steps)
    if cfg.ema is not None:
        made = said_of(f"--ema={cfg.ema:g}", averaged, made, cfg.ema, cfg.ema_from, cfg.ema_share)
    for name, hook in zip(names, hooks):
        if hook not in of_steps:
            made = said_of(f"--hooks={name}", hook.wear, made)
            if hook.start >= cfg.steps:
                raise ValueError(f"--hook.{name}.start={hook.start} is past the {cfg.steps} steps")
    return made


def said_of(what: str, make: Callable, *arguments):
    """make(*arguments), whose ValueError begins with the flag it is about."""
    try:
        return make(*arguments)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def check_together(cfg: Config, names: list[str]) -> None:
    """Raises ValueError for hooks, or hooks and settings, that contradict each other."""
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise ValueError(f"--hooks={cfg.hooks} names {twice[0]} twice; once is enough")
    for pair, why in CONTRADICT.items():
        if all(name in names for name in pair):
            raise ValueError(f"--hooks={cfg.hooks}: {why}; leave {' or '.join(pair)} out")
    for name in ("diloco_every", "qk_clip"):
        if "hyperball" in names and getattr(cfg, name) is not None:
            raise ValueError(
                f"--hooks={cfg.hooks}: --{name} moves weights after the step, off their norm; leave"
                " one of the two out"
            )
    if names and cfg.mup_base_width is not None:
        raise ValueError(
            "--hooks= has no rule for muP: which lr a wider model wants is not known; leave"
            " --mup_base_width or --hooks out"
        )


def make(cfg: Config, name: str) -> Callable:
    """The hook of this name with its fields. Raises ValueError."""
    files = [m.name for m in pkgutil.iter_modules(folder.__path__) if m.name not in HELPERS]
    if name not in files:
        near = "type --ema=100 (steps)" if name == "ema" else checks.nearest(name, files)
        raise ValueError(f"--hooks={cfg.hooks}: there is no {name!r} in hooks/; {near}")
    module = importlib.import_module(f"hooks.{name}")
    own = [x for x in vars(module).values() if dataclasses.is_dataclass(x)]
    hook = next(x for x in own if x.__module__ == module.__name__)
    options = checks.check_options(cfg, f"hook.{name}", hook)
    try:
        return hook(**options)
    except ValueError as error:
        raise ValueError(f"--hook.{name}.{error}") from None
