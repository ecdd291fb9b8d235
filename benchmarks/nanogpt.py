"""nanoGPT's own train.py beside ours: one step at its settings, and its published CPU recipe whole.

    python bench.py nanogpt --path=DIR [--data=python] [--runs=5] [--only=step] [--quick]
                            [--out=FILE.md]

DIR is a clone: git clone https://github.com/karpathy/nanoGPT. Its files are copied into a temporary
folder and run there unchanged, on the bytes of the same text. All take turns, each a process of its
own.

Step. 6 layers of width 384, 12 rows of 256 tokens, float32, AdamW, not compiled, no dropout, no
evaluation. Milliseconds are of the median step, the first third left out: of nanoGPT as it logs
them, its loop from end to end; of ours step_s, which leaves out the log's row (0.05 % of a step,
see python bench.py overhead).

Whole. Seconds from before the process starts until it has ended and its checkpoint is written:
nanoGPT's README's command for a CPU (4 layers of width 128, 2000 steps, evaluated every 250; its
checkpoint is the best of these), against the recipes of our leaderboard. Losses are speedrun.py's:
both models read the very same held-out text, in rows of their own.
nanoGPT always has the same seed; run i of ours has --seed=i.
--only=step leaves the whole processes out, and makes --runs rounds of the step, else 3.
--quick: a tiny model for the step, ten steps of the recipes, one round of each.
"""

import contextlib
import importlib.util
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks import runs, speedrun
from data import corpora, dataset
from settings import parse

FLAGS = {"--path": ".+", "--data": ".+", "--runs": "[1-9][0-9]*", "--only": "step"}
FLAGS |= {"--quick": "", "--out": ".+"}
FILES = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
SIZE = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=12)
QUICK = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=4)
THEIRS = [
    "--device=cpu",
    "--dtype=float32",
    "--compile=False",
    "--dataset=text",
    "--out_dir=run",
    "--log_interval=1",
    "--gradient_accumulation_steps=1",
]
RECIPE = [
    "config/train_shakespeare_char.py",
    *THEIRS,
    "--eval_iters=20",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]
OURS = ("cpu_speedrun.toml",)
SAME = [
    "--arch=gpt2",
    "--bias=false",
    "--optim=adamw",
    "--eval_every=0",
    *speedrun.EQUAL,
    "--device=cpu",
]


def prepare(path: Path, folder: Path, corpus: corpora.Corpus) -> None:
    """nanoGPT's files and the text, where its train.py looks for them."""
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(path / name, folder / name)
    (folder / "data" / "text").mkdir(parents=True)
    for name, tokens in (("train", corpus.train), ("val", corpus.val)):
        tokens.slice(0, len(tokens)).astype("uint16").tofile(
            folder / "data" / "text" / f"{name}.bin"
        )
    # What its data/*/prepare.py leaves: {"vocab_size": 256} as a pickle, in the protocol of text.
    (folder / "data" / "text" / "meta.pkl").write_bytes(b"(dVvocab_size\nI256\ns.")


def theirs(folder: Path, words: list[str]) -> tuple[float, list[float], float]:
    """Seconds of nanoGPT's process and of each step, and its last evaluation. Raises
    RuntimeError."""
    # The earlier run's checkpoint: a run that saves none must not be judged by it.
    shutil.rmtree(folder / "run", ignore_errors=True)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
    )
    seconds = time.perf_counter() - began
    steps = [
        float(ms) / 1000 for ms in re.findall(r"iter \d+: loss \S+, time ([\d.]+)ms", done.stdout)
    ]
    if done.returncode or not steps:
        raise RuntimeError(f"nanoGPT: {runs.reason(done.stderr) or 'no step'}")
    return seconds, steps, float(re.findall(r"step \d+: .* val loss (\S+)", done.stdout)[-1])


def model_of(folder: Path) -> torch.nn.Module:
    """nanoGPT's model with the weights of its checkpoint: ids, targets -> (logits, mean loss)."""
    if not (folder / "run" / "ckpt.pt").exists():
        raise RuntimeError(
            "nanoGPT: no evaluation was better than the first one, so it left no checkpoint"
        )
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    saved = torch.load(folder / "run" / "ckpt.pt", map_location="cpu", weights_only=True)
    with contextlib.redirect_stdout(sys.stderr):  # it says how many parameters it has
        model = module.GPT(module.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    return model


def loss_of(folder: Path, held_out: dataset.Tokens, multiple: int) -> float:
    model = model_of(folder)
    return speedrun.mean_loss(
        lambda x, y: model(x, y)[1].item() * y.numel(), model.config.block_size, held_out, multiple
    )


def steps(folder: Path, text: list[str], rounds: int, quick: bool) -> dict[str, list[float]]:
    """{who: seconds of the median step, one a round}."""
    size = [f"--{name}={value}" for name, value in (QUICK if quick else SIZE).items()]
    n, found = 6 if quick else 15, {"nanoGPT, float32": [], "ours, fp32": [], "ours, bf16": []}
    for i in range(rounds):
        words = [
            *THEIRS,
            *size,
            "--dropout=0.0",
            "--bias=False",
            "--eval_iters=1",
            "--eval_interval=1000",
            "--always_save_checkpoint=False",
            f"--max_iters={n}",
        ]
        each = theirs(folder, words)[1]
        found["nanoGPT, float32"].append(median(each[len(each) // 3 :]))
        for precision in ("fp32", "bf16"):
            words = [
                *size,
                *text,
                *SAME,
                f"--precision={precision}",
                f"--steps={n}",
                "--log_every=1",
            ]
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as out:
                _, rows = runs.run(words, Path(out, "run"))
            found[f"ours, {precision}"].append(runs.middle(rows)["step_s"])
        last = {who: f"{1000 * mine[-1]:.0f} ms" for who, mine in found.items()}
        runs.tell(f"step, round {i + 1} of {rounds}: {last}")
    return found


def whole(
    folder: Path, text: list[str], held_out: dataset.Tokens, n: int, quick: bool
) -> dict[str, list]:
    """{who: its runs' seconds and losses}, the reference first."""
    recipes = {name: [str(runs.ROOT / "configs" / name), *text, *speedrun.EQUAL] for name in OURS}
    configs = {name: parse.parse(words) for name, words in recipes.items()}
    multiple = math.lcm(64, *(cfg.block_size for cfg in configs.values()))
    speedrun.stretches(len(held_out), multiple)  # a text that is too short shows now
    found = {"nanoGPT, its train.py": [], **{name: [] for name in OURS}}
    for i in range(n):
        words = [*RECIPE, *["--max_iters=10", "--lr_decay_iters=10", "--eval_interval=10"] * quick]
        seconds, _, val_loss = theirs(folder, words)
        loss = loss_of(folder, held_out, multiple)
        found["nanoGPT, its train.py"].append(
            {"seconds": seconds, "loss": loss, "val_loss": val_loss}
        )
        for name, words in recipes.items():
            count = 10 if quick else configs[name].steps
            words = [*words, f"--seed={i + 1}", f"--steps={count}", f"--eval_every={count}"]
            found[name].append(speedrun.once(words, held_out, multiple))
        for who, mine in found.items():
            runs.tell(
                f"run {i + 1} of {n}: {who}: {mine[-1]['seconds']:.1f} s, loss"
                f" {mine[-1]['loss']:.4f}"
            )
    return found


def steps_table(found: dict[str, list[float]]) -> list[str]:
    first, rows = next(iter(found.values())), []
    for who, mine in found.items():
        ratios = [a / b for a, b in zip(first, mine)]
        rows.append(
            [who, runs.spread([1000 * x for x in mine], ".0f"), f"**{runs.spread(ratios)}**"]
        )
    return runs.table(["", "ms a step", "nanoGPT's time / this"], rows)


def whole_lines(found: dict[str, list[dict]]) -> list[str]:
    (reference, theirs), *others = found.items()
    lines = []
    for name, mine in others:
        said = speedrun.report({reference: theirs, f"ours: {name}": mine}, None)
        lines += [line.replace("reference / ours", f"nanoGPT / {name}") for line in [*said, ""]]
    return lines[:-1]


def main(argv: list[str]) -> int:
    """What `python bench.py nanogpt ...` does with the words after `nanogpt`: 0, 1 where a run
    failed."""
    flags = runs.flags(argv, FLAGS, __doc__)
    path, quick = Path(flags.get("--path", "nanoGPT")), "--quick" in flags
    if missing := [name for name in FILES if not (path / name).is_file()]:
        raise ValueError(
            f"--path={path} has no {missing[0]}; type git clone https://github.com/karpathy/nanoGPT"
            ", then --path=nanoGPT"
        )
    text = [f"--data={flags.get('--data', 'python')}", f"--data_dir={runs.CACHE}"]
    cfg, n = parse.parse(text), 1 if quick else int(flags.get("--runs", 5))
    corpus = corpora.load(cfg.data, cfg.tokenizer, cfg.data_dir, cfg.data_url)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            prepare(path, Path(folder), corpus)
            by_whole = None
            rounds = min(n, 3)
            if "--only" in flags:
                rounds = n
            else:
                by_whole = whole(Path(folder), text, corpus.val, n, quick)
            by_step = steps(Path(folder), text, rounds, quick)
    except RuntimeError as error:
        runs.tell(f"bench.py nanogpt: {error}")
        return 1
    size = QUICK if quick else SIZE
    lines = [
        runs.header(["nanogpt", *(word for word in argv if not word.startswith("--path"))]),
        "",
        "A step of " + ", ".join(f"{name} {value}" for name, value in size.items()) + ":",
        "",
        *steps_table(by_step),
    ]
    if by_whole is not None:
        lines += ["", "Whole processes:", "", *whole_lines(by_whole)]
    runs.show(lines, flags.get("--out"))
    return 0
