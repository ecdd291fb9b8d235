"""A claim tried on one's own text, within a budget of time: which of these ends lower?

    python -m experiments.optimizers  --data=FILE --optims=muon,adamw --budget=10m
    python -m experiments.schedules   --data=FILE --schedules=cosine,wsd --budget=10m
    python -m experiments.large_batch --data=FILE --cases=adamw:4,adamw:64,lamb:64 --budget=10m
    python -m experiments.compression --data=FILE --methods=none,powersgd_4 --budget=10m
    python -m experiments.precision   --data=FILE --precisions=fp32,bf16 --budget=10m
    python -m experiments.moe         --data=FILE --models=mlp,bias_and_z --budget=10m

    --budget=10m     s, m or h, kept within 10 %    --out=out-claims/...   where it is written
    --trials=3       learning rates of each, from   --seed=0               the next are its seeds
    --range=3        its usual one / 3 to it x 3    --steps=N              instead of what fits
    --field=value    any other of train.py, for all candidates: --n_embd=128 --tokenizer=gpt2

1. A few steps of each candidate tell what a step takes. The plan is printed.
2. A seed is one whole try: each candidate at each of its learning rates, all from one start and
   one order of the data; its loss is that of the best rate. So the luck of a sweep is in the spread
   over seeds. (One sweep, then seeds at its winner, finds differences between equals in 5 to 17 %
   of simulated claims instead of 5 %, the more the flatter the sweep: two sweeps pick other rates
   by chance.)
3. As many seeds as time allows; significance.py judges. Time decides how many, never the losses.

All candidates take equal steps, or, in large_batch, equal tokens. One that is named twice is
compared with itself from other seeds: what is said then is what chance says. The same command goes
on after Ctrl-C; with a larger budget it adds seeds, and counts as another look.
"""

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data import corpora
from experiments import claim_page, protocol
from experiments.budget import Asked, Session
from metrics.outlets import reader_may_leave
from run import control
from settings import checks, parse

UNITS = dict(s=1, m=60, h=3600)
OURS = dict(budget="10m", out="", seed="0", trials="3", range="3", steps="", data="", jobs="")
NEVER = ("lr", "out_dir", "resume", "eval_every", "save_every", "data_url", "init_from")
SIZE = dict(n_layer=2, n_embd=64, block_size=64, batch_size=8, precision="fp32", weight_decay=0)
SIZE |= dict(eval_tokens=8192, plot=False)


@dataclass(frozen=True)
class Claim:
    """An experiment's entry. flag: names the candidates; example: of them; fields: train.py's, for
    all; ranks: processes of a run."""

    flag: str
    example: str
    fields: dict
    ranks: int = 1


# In each the learning rate is swept, and the final validation loss compared.
CLAIMS = {
    "optimizers": Claim("optims", "muon,adamw", {}),
    "schedules": Claim("schedules", "cosine,wsd", {"optim": "adamw", "opt.betas": (0.9, 0.95)}),
    "large_batch": Claim(
        "cases", "adamw:4,adamw:64", dict(zero_init=False, grad_clip="none", schedule="cosine")
    ),
    "compression": Claim("methods", "none,powersgd_4", {}, ranks=2),
    "precision": Claim("precisions", "fp32,bf16", {}),
    "moe": Claim("models", "mlp,bias_and_z", {}),
}


def slug(text: str) -> str:
    """ "WSD, linear" as it is typed: wsd_linear."""
    return re.sub(r"[^\w.:]+", "_", text.lower()).strip("_")


def read(name: str, words: list[str], names: list[str], find) -> Asked:
    """names: the candidates that there are, find(name) -> train.py's fields, lr the usual one;
    raises KeyError or ValueError. Raises ValueError for any mistake but those in the data."""
    claim, given, fields = CLAIMS[name], dict(OURS), {}
    for word in parse.joined(words):
        field, _, text = word[2:].partition("=")
        if not word.startswith("--"):
            raise ValueError(f"{word} is not understood; type --field=value")
        if field in NEVER:
            raise ValueError(f"--{field} is set by the claim; leave it out")
        (given if field in OURS or field == claim.flag else fields)[field] = text
    if not given["data"]:
        raise ValueError(f"--data=FILE is missing: the text to try --{claim.flag} on")
    found = candidates(claim, given.get(claim.flag, ""), names, find)
    for field in fields:
        if any(field in own for own in found.values()):
            raise ValueError(f"--{field} is what is compared; leave it out")
    numbers(given)
    label = f"{name}-{Path(given['data']).stem}-{'-'.join(map(slug, found))}"[:80]
    home = Path(given["out"] or Path("out-claims", label.replace(":", "x"))).expanduser()
    if protocol.RESULTS in (home.resolve(), *home.resolve().parents):
        raise ValueError(f"{protocol.RESULTS} holds the project's own; take another --out=DIR")
    asked = Asked(
        name=name,
        data=given["data"],
        candidates=found,
        fields=SIZE | claim.fields | fields,
        ranks=claim.ranks,
        budget=float(given["budget"][:-1]) * UNITS[given["budget"][-1]],
        home=home,
        seed=int(given["seed"]),
        trials=int(given["trials"]),
        range=float(given["range"]),
        steps=int(given["steps"]) if given["steps"] else None,
        jobs=int(given["jobs"] or at_a_time(claim.ranks)),
    )
    for own in found.values():
        parse.parse(protocol.as_words(asked.fields | own))
    return asked


def at_a_time(ranks: int) -> int:
    """Runs at a time: one on a GPU, else one for each core."""
    return 1 if torch.cuda.device_count() else max(1, (os.cpu_count() or 1) // ranks)


def candidates(claim: Claim, text: str, names: list[str], find) -> dict[str, dict]:
    """{name: train.py's fields} of --optims=muon,adamw. Raises ValueError."""
    found = {}
    for typed in filter(None, text.split(",")):
        one = slug(typed) if slug(typed) in names else typed.strip()
        try:
            fields = find(one)
        except KeyError:
            near = checks.nearest(one, names)
            raise ValueError(f"--{claim.flag}: there is no {one}; {near}") from None
        while one in found:
            one += " again"
        found[one] = fields
    if len(found) < 2:
        raise ValueError(
            f"a comparison needs two candidates or more; type --{claim.flag}={claim.example}"
        )
    return found


def numbers(given: dict[str, str]) -> None:
    """Raises ValueError where one of our own options is no number, or no time."""
    if not re.fullmatch(r"\d+(\.\d+)?[smh]", given["budget"]):
        raise ValueError(f"--budget={given['budget']} is no time; type --budget=10m, 90s or 2h")
    whole = r"[1-9]\d*"
    for part, form in dict(
        seed=r"\d+", trials=whole, steps=whole, jobs=whole, range=whole + r"(\.\d+)?"
    ).items():
        if given[part] and not re.fullmatch(form, given[part]):
            raise ValueError(
                f"--{part}={given[part]} is not allowed; type --{part}=3, for instance"
            )


def check_text(asked: Asked) -> tuple[Asked, int]:
    """asked with what identifies the text, and the number of tokens to train on. Raises ValueError
    for a text that does not do."""
    own = asked.fields
    corpus = corpora.load(asked.data, own.get("tokenizer", "bytes"), str(protocol.CACHE))
    least = 32 * int(own["block_size"])
    if len(corpus.val) < least:
        raise ValueError(
            f"--data={asked.data} is too short: {len(corpus.val):,} of its tokens are there to"
            f" compare losses on, {least:,} are the least; a text of {10 * least / 1000:.0f} KB"
            " does"
        )
    return replace(asked, text=corpus.sha256[:16]), len(corpus.train)


@reader_may_leave()
def main(file: str, names: list[str], find) -> None:
    """Where the command line has --data= or names candidates: the claim, and the end. Exit status
    0: judged, whatever was found; 1: a run failed; 2: a mistake; 130: Ctrl-C."""
    name, words = Path(file).stem, sys.argv[1:]
    mine = re.compile(rf"--(data|budget|{CLAIMS[name].flag})(=|$)")
    if "--help" in words or not any(map(mine.match, words)):
        return
    torch.set_num_threads(1)  # who forks must not have used more
    status, session = 0, None
    try:
        asked = read(name, words, names, find)
        asked, tokens = check_text(asked)
        lock = control.RunLock(asked.home)
        session = Session(asked)
        session.make_plan()
        print(claim_page.plan(session, tokens), flush=True)
        session.measure()
    except ValueError as error:
        print(f"{name}.py: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print(f"{name}.py: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        status = 130
    if session is not None and session.rows:
        claim_page.write(session)
    lock.release()
    sys.exit(status)
