"""What a run says of itself before it starts."""

import importlib.metadata
import os
import platform
import subprocess

import torch

from checkpoint.load import Checkpoint, resolve
from data.corpora import Corpus
from optim import param_groups
from parallel.mesh import Mesh
from run import build
from run.auto import HEAVY
from run.build import state_on_disk
from run.optimizers import find_optimizer
from settings import parse
from settings.fields import FIELDS, Config, flag


def lines(
    cfg: Config,
    asked: Config,
    mesh: Mesh,
    record: dict,
    corpus: Corpus,
    whole: torch.nn.Module,
    earlier: Checkpoint | None,
) -> list[str]:
    """For people: commit, machine, data, model, ranks, what each `auto` and `none` stands for;
    remarks."""
    differ = {n: getattr(cfg, n) for n in FIELDS if getattr(cfg, n) != getattr(asked, n)}
    return [
        (
            f"commit {record['commit']}, torch {record['torch']}, {record['hardware']},"
            f" {mesh.world} rank(s)"
        ),
        f"{corpus.name}: {len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out",
        (
            f"{cfg.arch}: {sum(p.numel() for p in whole.parameters()):,} parameters; a step is"
            f" {cfg.batch_size} x {cfg.block_size} tokens, in micro-batches of"
            f" {cfg.micro_batch_size}"
        ),
        *mesh.table(),
        "chosen: " + " ".join(f"{name}={value}" for name, value in differ.items()),
        *remarks(cfg, mesh, earlier),
        *([] if earlier is None else change_of_lr(cfg, earlier, whole)),
    ]


def change_of_lr(cfg: Config, earlier: Checkpoint, whole: torch.nn.Module) -> list[str]:
    """A line where the learning rate jumps because the run goes on with other settings; else []. A
    schedule is a function of the step and of all steps: more of these stretch it, as if they had
    been meant from the beginning."""
    before, step = parse.from_dict(earlier.tree("config")), earlier.step

    def peak(run: Config) -> float:
        optimizer_class, kinds = find_optimizer(run.optim), param_groups.kinds(whole)
        return build.learning_rates(run, optimizer_class, run.sub("opt"), kinds)["matrix"]

    def factor(run: Config, step: int) -> float:
        return build.lr_schedule(run, run.sub("schedule"))(step)

    was = peak(before) * factor(before, min(step, before.steps - 1))
    now = peak(cfg) * factor(cfg, step)
    if abs(now - was) <= 0.02 * max(now, was):
        return []
    names = (
        "steps",
        "schedule",
        "lr",
        "warmup_steps",
        "warmup_frac",
        "warmup_start",
        "decay_frac",
        "min_lr_frac",
    )
    differ = [n for n in names if getattr(before, n) != getattr(cfg, n)]
    because = [f"{flag(n, getattr(cfg, n))[2:]} ({getattr(before, n)} before)" for n in differ]
    because = ", ".join(because) or "another schedule"
    more = ""
    if "steps" in differ and cfg.schedule not in ("constant", "inverse_sqrt"):
        more = f"; the schedule is that of a run of {cfg.steps} steps from its beginning on"
    return [f"lr goes from {was:.1e} to {now:.1e} at step {step}: {because}{more}"]


def remarks(cfg: Config, mesh: Mesh, earlier: Checkpoint | None) -> list[str]:
    """Of each flag that has nothing to do here, that it has not; what a resumed run does not take
    up as it was."""
    saved = earlier.tree("replicas/replicas", missing=0) if earlier is not None else 0
    n, alone = (
        mesh.sizes["dp"] * mesh.sizes["cp"],
        cfg.compress is None and cfg.diloco_every is None,
    )
    on_cpu, every, layout = mesh.device.type == "cpu", cfg.diloco_every, cfg.data_parallel
    start = cfg.init_from is not None and earlier is None
    was = resolve(cfg.init_from).tree("config", missing={}) if start else {}
    found = {
        f"data_parallel={layout}: one replica, nothing to spread": (
            mesh.groups["replicas"] is None and "data_parallel" in cfg.given and layout != "ddp"
        ),
        f"optim={cfg.optim}: every replica works on all matrices; --data_parallel=zero1 deals them out and sends as many bytes": (
            mesh.groups["replicas"] is not None
            and layout == "ddp"
            and alone
            and find_optimizer(cfg.optim).__name__ in HEAVY
        ),
        f"param_dtype={cfg.param_dtype}: one replica gathers nothing, weights stay as they are": (
            mesh.groups["replicas"] is None and cfg.param_dtype is not None
        ),
        f"pp_schedule={cfg.pp_schedule}: without --pp there is one stage": (
            cfg.pp == 1 and cfg.pp_schedule != "1f1b"
        ),
        f"cp_attention={cfg.cp_attention}: without --cp each rank has whole sequences": (
            cfg.cp == 1 and cfg.cp_attention != "ring"
        ),
        f"activation_checkpoint={cfg.activation_checkpoint}: activations are in host memory already": (
            on_cpu and "offload" in (cfg.activation_checkpoint or "")
        ),
        "async_save: with offload to disk, training waits while a checkpoint is written; a copy in memory is what the disk was to spare": (
            cfg.async_save and state_on_disk(cfg)
        ),
        "offload=cpu: the state is in this memory already": on_cpu and cfg.offload == "cpu",
        "offload_params=cpu: the weights are in this memory already": (
            on_cpu and cfg.offload_params == "cpu"
        ),
        f"min_lr_frac={cfg.min_lr_frac:g}: schedule=constant never decays": (
            cfg.schedule == "constant" and cfg.min_lr_frac
        ),
        f"decay_frac={cfg.decay_frac:g}: schedule={cfg.schedule} has none": (
            cfg.schedule != "wsd" and cfg.decay_frac != FIELDS["decay_frac"].default
        ),
        "decay_embeddings: weight_decay is 0, so nothing decays": (
            cfg.decay_embeddings and not cfg.weight_decay
        ),
        f"patience={cfg.patience}: this run has stopped early; to go on type --patience=none, or more": (
            cfg.patience is not None
            and earlier is not None
            and earlier.tree("best/bad", missing=0) >= cfg.patience
        ),
        f"diloco_every={every} does not divide steps={cfg.steps}: the last round is in the checkpoint, but not in the saved model": (
            every is not None and cfg.steps % every
        ),
        "what compression had not sent yet is dropped": saved and alone,
        f"{cfg.init_from} learned on top of counted n-grams, and here there are none; type --ngram= as there": (
            cfg.ngram is None and was.get("ngram")
        ),
        f"{cfg.init_from} learned with embeddings of n-grams, and here there are none; type --ngram_embed= as there": (
            cfg.ngram_embed is None and was.get("ngram_embed")
        ),
        f"{cfg.init_from} learned with window={was.get('window')}; type --window= as there": (
            was.get("window") not in (None, cfg.window)
        ),
        f"{saved} replicas were saved, now there are {n}: what they had not told each other yet is summed and shared out": (
            saved not in (0, n) and not alone
        ),
    }
    return [sentence for sentence, holds in found.items() if holds]


def environment(device, ranks: int, data_sha256: str) -> dict:
    """What one must know to run this again: commit, versions, hardware, data. `device` is a
    torch.device."""
    import torch

    git = ["git", "-C", os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    # A hook's, of elsewhere
    env = {name: x for name, x in os.environ.items() if not name.startswith("GIT_")}
    commit = ""
    try:
        prefix, found = (
            subprocess.run(git + words, capture_output=True, text=True, timeout=10, env=env).stdout
            for words in (["rev-parse", "--show-prefix"], ["describe", "--always", "--dirty"])
        )
        # A copy in a folder of another repository has none
        commit = "" if prefix.strip() else found.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    gpu = device.type == "cuda"
    cpu = f"{platform.machine()} CPU with {torch.get_num_threads()} thread(s)"
    versions = {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "cuda": str(torch.version.cuda).lower(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else "none",
    }
    return (
        {"commit": commit or "unknown"}
        | versions
        | {
            "platform": platform.platform(),
            "hardware": torch.cuda.get_device_name(device) if gpu else cpu,
            "devices": torch.cuda.device_count() if gpu else 0,
            "cores": os.cpu_count(),
            "ranks": ranks,
            "data_sha256": data_sha256,
        }
    )
