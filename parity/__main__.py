"""Which tensor of a run differs first from another layout's run, and why.

    python -m parity "--tp=2 --pp=2" [--ranks=4] [--against="..."] [RECIPE] [FLAGS]
        trains a few steps of RECIPE (default: a tiny GPT) by train.py, with these flags and with
        those of --against (default: none, on one process), and compares; --against=DIR: a recording
    python -m parity A B [--names=map.toml]
        compares two recordings (parity/record.py), from any trainers; A is right

    --steps=3         how many
    --precision=fp64  or fp32, bf16, ...: what train.py computes with
    --keep=DIR        keeps the recordings in DIR/a and DIR/b
    --json            the finding, or "cause": null, as one line of JSON

Exit status: 0 all agree, 1 something differs, B lacks something or a rank died, 2 a user's mistake.
"""

import json
import math
import shlex
import sys
import tempfile
from pathlib import Path

from metrics.outlets import command
from parity.compare import Comparison
from parity.diagnose import diagnose, report
from parity.recording import Recording, read_names

TINY = """--n_layer=2 --n_head=4 --n_embd=32 --block_size=16 --batch_size=8 --vocab_size=256
--zero_init=false --dropout=0.1 --lr=0.01 --grad_clip=0.5 --schedule=constant""".split()
QUIET = """--eval_every=none --sample_tokens=0 --plot=false --save_every=0 --device=cpu
--resume=never""".split()
LAYOUT = ("--tp", "--sp", "--cp", "--pp", "--ep", "--data_parallel", "--cp_attention")
LAYOUT = (*LAYOUT, "--pp_schedule")
OWN = {"ranks": None, "against": None, "steps": "3", "precision": "fp64", "keep": None}


def main(argv: list[str]) -> int:
    if not argv or argv == ["--help"]:
        print(__doc__.strip())
        return 0 if argv else 2
    own = dict(OWN)
    names = None
    as_json = "--json" in argv
    rest = []
    given = []  # of our own flags
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--names="):
            names = read_names(value)
        elif word.startswith("--") and name in OWN and " " not in word.split("=")[0]:
            if not equals or (name == "keep" and not value):
                raise ValueError(f"{word} lacks its value; type --{name}=...")
            own[name] = value
            given.append(word)
        elif word != "--json":
            rest.append(word)
    if not rest:
        raise ValueError('no layout and no recordings; type python -m parity "--tp=2", or A B')
    if rest[0] and not rest[0].startswith("-"):
        return compare(*two_folders(rest, given), names, as_json)
    if names is not None and not is_recording(own["against"]):
        raise ValueError("--names= is for recordings: type python -m parity A B --names=map.toml")
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(own["keep"] or folder)
        record_both(shlex.split(rest[0]), rest[1:], own, keep, Path(folder))
        oracle = keep / "a"
        if is_recording(own["against"]):
            oracle = own["against"]
        return compare(oracle, keep / "b", names, as_json)


def two_folders(rest: list[str], given: list[str]) -> tuple[str, str]:
    """A and B, where nothing stands beside them that has no meaning there."""
    folders = [word for word in rest if not word.startswith("-")]
    strange = given + [word for word in rest if word not in folders]
    if strange:
        raise ValueError(
            f"{strange[0]} says nothing about two recordings; beside A B stand --names= and --json"
        )
    if len(folders) != 2:
        raise ValueError(
            f"{len(folders)} recordings ({' '.join(folders)}); type two, python -m parity A B,"
            ' or a layout in quotes, python -m parity "--tp=2"'
        )
    return folders[0], folders[1]


def is_recording(path: str | None) -> bool:
    return path is not None and Path(path, "rank_0.jsonl").is_file()


def compare(a, b, names: dict | None, as_json: bool) -> int:
    comparison = Comparison(Recording(a), Recording(b, names))
    first = comparison.first()
    lacking = comparison.lacking()
    n = len(comparison.order)
    fact = {"cause": None, "compared": n, "of": len(comparison.a.order), "lacking": lacking}
    if first is None:
        said = f"all {n} tensors agree (the largest difference is {comparison.of_bound:.0e} of"
        said = f"{said} its bound)"
        if lacking:
            said = f"not all is compared: {lacking}\nwhat is compared agrees"
        print(json.dumps(fact | {"of_bound": comparison.of_bound}) if as_json else said)
        return 1 if lacking else 0
    finding = diagnose(comparison, first)
    if as_json:
        step, kind, name = first.key
        error = first.relative if math.isfinite(first.relative) else None
        fact |= {"kind": kind, "name": name, "step": step, "cause": finding.cause}
        print(json.dumps(fact | {"sentence": finding.sentence, "error": error}))
    else:
        print(report(comparison, first, finding))
    return 1


def record_both(flags: list[str], rest: list[str], own: dict, keep: Path, folder: Path) -> None:
    """Runs both layouts. Raises ValueError for what train.py refuses."""
    from parity.ours import record_ranks
    from settings import parse

    for word in rest:
        if word.partition("=")[0] in LAYOUT:
            raise ValueError(
                f"{word} stands outside the quotes, so both sides would have it; type"
                f' "{" ".join([*flags, word])}" as one word'
            )
    has_recipe = any(word.endswith(".toml") for word in rest)
    recipe = rest if has_recipe else [*TINY, *rest]
    if not has_recipe and not any(word.startswith("--data=") for word in recipe):
        text = folder / "squares.txt"
        text.write_text(" ".join(str(i * i) for i in range(3000)), encoding="utf-8")
        recipe = [*recipe, f"--data={text}"]
    words = [*recipe, *flags, *shlex.split(own["against"] or "")]
    optims = [word for word in words if word.startswith(("--optim=", "--opt.ns_dtype="))]
    if own["precision"] == "fp32" and not has_recipe and set(optims) <= {"--optim=muon"}:
        # Muon's products in bf16 would make of rounding in fp32 a difference of 1 %.
        recipe = [*recipe, "--opt.ns_dtype=float32"]
    recipe = [*recipe, *QUIET, f"--steps={own['steps']}", f"--precision={own['precision']}"]
    sides = {"b": flags}
    if not is_recording(own["against"]):
        sides = {"a": shlex.split(own["against"] or ""), "b": flags}
    for side, extra in sides.items():
        if (keep / side).exists():
            raise ValueError(f"{keep / side} is there already; type another --keep=")
        words = [*recipe, *extra]
        if not any(word.startswith("--data_parallel=") for word in words):
            words.append("--data_parallel=ddp")
        cfg = parse.parse([*words, f"--out_dir={folder / ('out_' + side)}"])
        n = cfg.tp * cfg.cp * cfg.pp
        if side == "b":
            n = ranks(own["ranks"], n)
        record_ranks(cfg, keep / side, n)


def ranks(word: str | None, least: int) -> int:
    """How many processes: what --ranks says, or as few as make a layout."""
    if word is None:
        return max(2, least)
    if not word.isdecimal() or int(word) < 1:
        raise ValueError(f"--ranks={word} is no number of processes; type --ranks={max(2, least)}")
    return int(word)


if __name__ == "__main__":
    try:
        command("parity", main)
    except RuntimeError as error:  # of a rank, with its traceback
        print(f"parity: a run failed:\n{error}", file=sys.stderr)
        sys.exit(1)
