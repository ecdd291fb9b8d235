"""Dotted fields (--opt.NAME=, --monitor.NAME=, ...), checked once, before anything is built.

Each namespace belongs to a class or a function that another field selects. Its signature says which
names there are. A file is imported only if one of its fields is given.
"""

import schedules
from monitor import MonitorConfig
from run.auto import resolve_schedule
from settings.checks import check_options
from settings.fields import NAMESPACES, Config


def resolve_options(cfg: Config, optimizer_class: type) -> dict[str, dict]:
    """Namespace -> keyword arguments for its owner; {} where nothing was given.

    `auto` fields may still be open. Raises ValueError for a name or a kind of value that the owner
    does not take, and for an argument that has nothing to do in this run.
    """
    options = {namespace: {} for namespace in NAMESPACES}
    for namespace in NAMESPACES:
        if cfg.sub(namespace) and namespace != "hook":  # run/hooks.py has read these
            target, given = owner(cfg, namespace, optimizer_class)
            options[namespace] = check_options(cfg, namespace, target, given)
    check_monitor(cfg, options["monitor"])
    return options


def owner(cfg: Config, namespace: str, optimizer_class: type) -> tuple:
    """(the class or function of a namespace, its arguments that come from elsewhere)."""
    if namespace == "opt":
        return optimizer_class, ("params", "lr", "weight_decay")
    if namespace == "schedule":
        return schedules.SHAPES[resolve_schedule(cfg, optimizer_class)], schedules.OURS
    if namespace == "compress":
        from parallel import compression

        return getattr(compression, cfg.compress), ()
    if namespace == "diloco":
        from parallel.diloco import DiLoCo

        return DiLoCo, ("group", "device", "every", "bucket_mb")
    if namespace == "scaler":
        from precision.loss_scale import LossScaler

        return LossScaler, ()
    if namespace == "fp8":
        from precision.fp8 import convert

        return convert, ("model", "device", "only")
    if namespace == "compile":
        from layers.compile import compile_blocks

        return compile_blocks, ("model", "mode")
    return MonitorConfig, ()


def check_monitor(cfg: Config, options: dict) -> None:
    """Raises ValueError for a setting of the spike monitor out of its range, or without a use."""
    policies = {cfg.on_spike, cfg.on_nonfinite}
    # Setting -> the policy that alone reads it.
    needs = {
        "clip": "clip",
        "cut": "lr_cut",
        "ring": "rollback",
        "ring_every": "rollback",
        "rollbacks": "rollback",
    }
    # A setting that is not in `needs` is read under every policy: get() gives None.
    for name in options:
        if needs.get(name) not in {None, *policies}:
            raise ValueError(f"--monitor.{name} has nothing to do without --on_spike={needs[name]}")
    if options and policies == {None}:
        raise ValueError("--monitor.* has nothing to do with on_spike and on_nonfinite both none")

    # A rollback needs states in memory or checkpoints on disk.
    never_saves = not (cfg.save_every or cfg.save_hours)
    if "rollback" in policies and options.get("ring") == 0 and never_saves:
        raise ValueError(
            "--monitor.ring=0 goes back to checkpoints, and save_every=0 makes none; type "
            "--save_every=100, or leave --monitor.ring out"
        )
    # The dataclass checks the ranges.
    MonitorConfig(**options)
