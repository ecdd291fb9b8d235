"""Warnings before a run starts: settings without effect, jumps of the lr. And the run's record."""

import importlib.metadata
import inspect
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

import schedules
from checkpoint import save
from checkpoint.load import Checkpoint, resolve
from checkpoint.pretrained import find
from optim import param_groups
from optim.attributes import attribute
from parallel.mesh import Mesh
from run import build, pretrained
from run.build import state_on_disk
from run.optimizers import find_optimizer
from settings import parse
from settings.checks import profiled_steps
from settings.fields import DECAYS, FIELDS, Config, flag

# The settings that may explain a jump of the learning rate.
LR_FIELDS = (
    "steps",
    "schedule",
    "lr",
    "warmup_steps",
    "warmup_frac",
    "warmup_start",
    "decay_frac",
    *DECAYS.values(),
    "min_lr_frac",
)


def details(cfg: Config, requested_cfg: Config, mesh: Mesh, record: dict) -> list[str]:
    """For train.log alone: commit, machine, ranks, and what each `auto` and `none` stands for."""
    hardware = f"torch {record['torch']}, {record['hardware']}, {mesh.world} rank(s)"
    chosen = [
        f"{name}={getattr(cfg, name)}"
        for name in FIELDS
        if getattr(cfg, name) != getattr(requested_cfg, name)
    ]
    return [
        f"commit {record['commit']}, {hardware}",
        *mesh.table(),
        "chosen: " + " ".join(chosen),
    ]


def change_of_lr(cfg: Config, resumed_from: Checkpoint, full_model: torch.nn.Module) -> list[str]:
    """A line where the learning rate jumps because the run continues with other settings; else [].

    A schedule is a function of the step and of all steps: more of these stretch it, as if they had
    been meant from the beginning.
    """
    before = parse.from_dict(resumed_from.tree("config"))
    step = resumed_from.step

    def peak(run: Config) -> float:
        optimizer_class = find_optimizer(run.optim)
        kinds = param_groups.kinds(full_model)
        return build.learning_rates(run, optimizer_class, run.sub("opt"), kinds)["matrix"]

    def factor(run: Config, step: int) -> float:
        return build.lr_schedule(run, run.sub("schedule"))(step)

    # The last step of a run begins at before.steps - 1: a finished run is compared by its lr there.
    old_lr = peak(before) * factor(before, min(step, before.steps - 1))
    new_lr = peak(cfg) * factor(cfg, step)
    if step >= cfg.steps or abs(new_lr - old_lr) <= 0.02 * max(new_lr, old_lr):
        return []
    differ = [name for name in LR_FIELDS if getattr(before, name) != getattr(cfg, name)]
    because = ", ".join(
        f"{flag(name, getattr(cfg, name))[2:]} ({getattr(before, name)} before)" for name in differ
    )
    line = f"lr goes from {old_lr:.1e} to {new_lr:.1e} at step {step}: "
    line += because or "another schedule"
    if "steps" in differ and not schedules.is_endless(cfg.schedule):
        line += f"; the schedule is that of a run of {cfg.steps} steps from its beginning on"
        if new_lr > old_lr:
            line += instead_of_a_jump(before, resumed_from)
    return [line]


def instead_of_a_jump(before: Config, resumed_from: Checkpoint) -> str:
    """What to type to go on from where lr had not begun to fall; "" where there is no such step."""
    if not schedules.takes(before.schedule, "decay"):
        return ""
    first = before.steps - round(before.decay_frac * before.steps)
    if resumed_from.step <= first:
        return ""
    paths = [
        path
        for step, is_current, path in save.found(resumed_from.path.parent)
        if is_current and 0 < step <= first
    ]
    if paths:
        line = f"; without the jump: {flag('resume', str(paths[-1]))} --out_dir=NEW"
        return line if before.keep is None else f"{line}, before --keep={before.keep} deletes it"
    return (
        f"; without the jump: --resume=OUT/step-N --out_dir=NEW, from a checkpoint before the decay"
        f" (step {first} or earlier), but none is left; --keep_every= keeps some"
    )


# ---- warnings ------------------------------------------------------------------------------------
def warnings(
    cfg: Config, mesh: Mesh, resumed_from: Checkpoint | None, full_model: torch.nn.Module
) -> list[str]:
    """A line for each setting that has no effect here, and for what a resumed run changes."""
    found = [
        *about_machine(cfg, mesh),
        *about_compile(cfg),
        *about_lr(cfg),
        *about_layout(cfg, mesh),
        *about_memory(cfg, mesh),
        *about_schedule(cfg),
        *about_resuming(cfg, mesh, resumed_from),
        *about_fine_tuning(cfg, resumed_from),
    ]
    if resumed_from is not None:
        found += change_of_lr(cfg, resumed_from, full_model)
    return found


def about_machine(cfg: Config, mesh: Mesh) -> Iterator[str]:
    """On a CPU whose cores others use, the threads of a product wait for the slowest of them."""
    cores = os.cpu_count() or 1
    if mesh.device.type == "cpu" and hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        if load > 1.5 * cores:
            advice = "" if cfg.threads == 1 else "; --threads=1 may be faster"
            yield f"this machine is busy (load {load:.1f} on {cores} cores): it is slower{advice}"


def about_compile(cfg: Config) -> Iterator[str]:
    moves_weights = cfg.data_parallel in ("zero3", "fsdp")
    if cfg.compile in ("reduce-overhead", "max-autotune") and moves_weights:
        yield (
            f"compile={cfg.compile}: a CUDA graph is recorded anew for each new address of a "
            f"weight, and data_parallel={cfg.data_parallel} gathers weights anew; "
            "--compile=default is faster"
        )


def about_lr(cfg: Config) -> Iterator[str]:
    own = inspect.signature(find_optimizer(cfg.optim)).parameters.get("lr")
    if "lr" not in cfg.given or own is None or not isinstance(own.default, float):
        return
    times = cfg.lr / own.default
    if not 0.1 < times < 10:
        yield f"lr={cfg.lr:g}: {cfg.optim}'s own is {own.default:g}"


def about_layout(cfg: Config, mesh: Mesh) -> Iterator[str]:
    alone = mesh.groups["dp_cp"] is None
    layout = cfg.data_parallel
    if alone and "data_parallel" in cfg.given and layout != "ddp":
        yield f"data_parallel={layout}: one replica, nothing to spread"
    every_replica_steps_all = layout == "ddp" and cfg.compress is None and cfg.diloco_every is None
    if not alone and every_replica_steps_all and attribute(find_optimizer(cfg.optim), "heavy_step"):
        yield (
            f"optim={cfg.optim}: every replica works on all matrices; --data_parallel=zero1 deals "
            "them out and sends as many bytes"
        )
    if alone and cfg.param_dtype is not None:
        yield (
            f"param_dtype={cfg.param_dtype}: one replica gathers nothing, weights stay as they are"
        )
    if cfg.pp == 1 and cfg.pp_schedule != "1f1b":
        yield f"pp_schedule={cfg.pp_schedule}: without --pp there is one stage"
    if cfg.cp == 1 and cfg.cp_attention != "ring":
        yield f"cp_attention={cfg.cp_attention}: without --cp each rank has whole sequences"
    every = cfg.diloco_every
    if every is not None and cfg.steps % every:
        yield (
            f"diloco_every={every} does not divide steps={cfg.steps}: the last round is in the "
            "checkpoint, but not in the saved model"
        )


def about_memory(cfg: Config, mesh: Mesh) -> Iterator[str]:
    on_cpu = mesh.device.type == "cpu"
    if on_cpu and "offload" in (cfg.activation_checkpoint or ""):
        how = cfg.activation_checkpoint
        yield f"activation_checkpoint={how}: activations are in host memory already"
    if cfg.async_save and state_on_disk(cfg):
        yield (
            "async_save: with offload to disk, training waits while a checkpoint is written; a "
            "copy in memory is what the disk was to spare"
        )
    if on_cpu and cfg.offload == "cpu":
        yield "offload=cpu: the state is in this memory already"
    if on_cpu and cfg.offload_params == "cpu":
        yield "offload_params=cpu: the weights are in this memory already"


def about_schedule(cfg: Config) -> Iterator[str]:
    if cfg.min_lr_frac and not schedules.takes(cfg.schedule, "minimum"):
        yield f"min_lr_frac={cfg.min_lr_frac:g}: schedule={cfg.schedule} never decays"
    for name in ("decay_frac", *DECAYS.values()):
        decays = getattr(cfg, name) != FIELDS[name].default
        if decays and not schedules.takes(cfg.schedule, "decay"):
            yield f"{name}={getattr(cfg, name):g}: schedule={cfg.schedule} has none"
    if cfg.decay_embeddings and not cfg.weight_decay:
        yield "decay_embeddings: weight_decay is 0, so nothing decays"


def about_resuming(cfg: Config, mesh: Mesh, resumed_from: Checkpoint | None) -> Iterator[str]:
    if resumed_from is None:
        return
    bad_evaluations = resumed_from.tree("best/bad", missing=0)
    if cfg.patience is not None and bad_evaluations >= cfg.patience:
        yield (
            f"patience={cfg.patience}: this run has stopped early; to continue type "
            "--patience=none, or more"
        )
    steps = profiled_steps(cfg.profile, cfg.steps)
    if steps and resumed_from.step >= steps[-1]:
        done = resumed_from.step
        first = min(done + 2, cfg.steps)
        yield (
            f"profile={cfg.profile}: nothing is profiled, as {done} steps are done already; type "
            f"--profile={first}:{first + 3}"
        )
    # Only compression and DiLoCo put a number of replicas into a checkpoint.
    saved = resumed_from.tree("replicas/replicas", missing=0)
    replicas = mesh.sizes["dp"] * mesh.sizes["cp"]
    if saved and cfg.compress is None and cfg.diloco_every is None:
        yield "what compression had not sent yet is dropped"
    elif saved not in (0, replicas):
        yield (
            f"{saved} replicas were saved, now there are {replicas}: what they had not told each "
            "other yet is summed and shared out"
        )


def about_fine_tuning(cfg: Config, resumed_from: Checkpoint | None) -> Iterator[str]:
    if cfg.init_from is None or resumed_from is not None:
        return
    yield from pretrained.notes(cfg)
    if find(cfg.init_from) is not None:
        return
    old = resolve(cfg.init_from).tree("config", missing={})
    if cfg.ngram is None and old.get("ngram"):
        yield (
            f"{cfg.init_from} learned on top of counted n-grams, and here there are none; type "
            "--ngram= as there"
        )


# ---- for the record ------------------------------------------------------------------------------
def environment(device: torch.device, ranks: int, data_sha256: str) -> dict:
    """What one must know to run this again: commit, versions, hardware, data."""
    on_gpu = device.type == "cuda"
    hardware = f"{platform.machine()} CPU with {torch.get_num_threads()} thread(s)"
    nccl = "none"
    if on_gpu:
        hardware = torch.cuda.get_device_name(device)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "commit": commit() or "unknown",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        # A CPU build has None here. TOML has no null: the record says "none".
        "cuda": str(torch.version.cuda).lower(),
        "nccl": nccl,
        "platform": platform.platform(),
        "hardware": hardware,
        "devices": torch.cuda.device_count() if on_gpu else 0,
        "cores": os.cpu_count(),
        "ranks": ranks,
        "data_sha256": data_sha256,
    }


def commit() -> str:
    """This checkout's commit, with "-dirty" where files have changed; "" where git knows none."""
    root = Path(os.path.abspath(__file__)).parent.parent
    # A copy in a folder of another repository has no commit of its own.
    if not (root / ".git").exists():
        return ""
    # A git hook sets variables that point to another repository.
    env = {name: x for name, x in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
