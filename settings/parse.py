"""The settings of a run, filled from recipes and the command line, and written down again.

    python train.py [recipe.toml] [--field=value ...]          later wins; --field value is the same

The fields are in settings/fields.py, one line each, and settings/checks.py says which of them fit
together. Parsing, `--help` and the saved `config.toml` are derived from those lines. A field with a
dot belongs to what another field selects: `--opt.betas=0.9,0.95` goes to the constructor of
`--optim`, `--schedule.NAME=` to the schedule. run/options.py checks it against the signature there.
In TOML a dotted field is a quoted key: `"opt.betas" = [0.9, 0.95]`.

A run's `config.toml` is a recipe for the same run. Its table [chosen] has the values that the run
chose where nobody gave one. No check holds them against the user. As soon as a later word makes it
another run (another optimizer, say) they are chosen anew.

Nothing here is executed: values are numbers, strings, booleans and lists of them. Every mistake is
a ValueError whose one line says what came, what is allowed and what to type.
"""

import ast
import codecs
import difflib
import json
import os
import tomllib
import types
import typing
from pathlib import Path
from typing import Literal

from settings import fields
from settings.checks import check
from settings.fields import FIELDS, NAMESPACES, OPEN, PATHS, SECTIONS, TYPES, Auto, Config
from settings.synonyms import ABSENT, HERE, RECIPE_FLAGS, RECIPES, STAGES

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


# ---- reading -------------------------------------------------------------------------------------
def parse(argv: list[str]) -> Config:
    """The command line's settings. Raises ValueError on any mistake, SystemExit(0) after
    `--help`."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    given = {}  # what the user gave
    chosen = {}  # what an earlier run chose
    for word in joined(argv):
        if word.startswith("--"):
            name, _, text = word[2:].partition("=")
            found = {name: from_text(name, text)}
        else:
            found = read_recipe(word)
        found_chosen = {}
        for name in list(found):
            if name.startswith("chosen."):
                found_chosen[name.removeprefix("chosen.")] = found.pop(name)

        # What was chosen for another run (its lr for another optimizer, say) does not fit this one.
        if any(makes_another_run(name) for name in found):
            chosen = {}
        chosen = {n: v for n, v in chosen.items() if n not in found} | found_chosen
        given = {n: v for n, v in given.items() if n not in found_chosen} | found
    cfg = Config(
        **{n: v for n, v in (chosen | given).items() if "." not in n},
        options={n: v for n, v in given.items() if "." in n},
    )
    cfg.given = set(given)
    return check(cfg, has_traits=cfg.init_from is None, has_experts=cfg.resume in ("auto", "never"))


def joined(argv: list[str]) -> list[str]:
    """["--steps", "5"] as ["--steps=5"]. Raises ValueError for a flag that has no value."""
    words = with_equals(argv)
    for word in words:
        name, equals, text = word[2:].partition("=")
        if word.startswith("--") and not text:
            # A name that we have under another name needs that hint, and no value.
            known(name)
        if word.startswith("--") and not equals:
            value = "true" if name in FIELDS and bool in kinds(name) else "VALUE"
            raise ValueError(f"--{name} has no value; type --{name}={value}")
    return words


def with_equals(argv: list[str], alone: tuple[str, ...] = ()) -> list[str]:
    """`--name value`, `--name = value` and the like as `--name=value`.

    alone: flags that never have a value, such as --quick. A flag keeps no value where the next word
    is a flag or a recipe.
    """
    words = []
    left = list(argv)

    def next_is_value() -> bool:
        return bool(left) and not left[0].startswith("--") and not left[0].endswith(".toml")

    while left:
        word = left.pop(0)
        has_value = not word.startswith("--") or word.partition("=")[2] or word in alone
        # The sign may be in a word of its own.
        while not has_value and next_is_value():
            text = left.pop(0).removeprefix("=")
            word = f"{word.removesuffix('=')}={text}"
            has_value = bool(text)
        words.append(word)
    return words


def read_recipe(path: str) -> dict:
    """A TOML recipe as {field: value}. Raises ValueError.

    A table like [opt] and a quoted key like "opt.betas" mean the same.
    """
    path = os.path.expanduser(path)
    theirs = path.replace(os.sep, "/").rpartition("/")[2]
    if theirs in RECIPES:
        raise ValueError(
            f"{path} is a recipe of another trainer; here type {RECIPES[theirs]}, and see "
            "docs/coming_from.md"
        )
    if theirs.endswith((".py", ".json", ".yaml", ".yml")):
        raise ValueError(
            f"the recipe {path} is no TOML, whose lines are like steps = 100; the names of other "
            "trainers' settings are in docs/coming_from.md"
        )
    own = os.path.join(path, "config.toml")
    if os.path.isdir(path) and os.path.isfile(own):
        raise ValueError(f"the recipe {path} is the folder of a run; its recipe is {own}")
    # Reading a pipe might wait for ever, reading a device never end.
    if not os.path.isfile(path) and os.path.exists(path):
        raise ValueError(
            f"cannot read the recipe {path}: it is no file; flags look like --steps=100"
        )
    try:
        with open(path, "rb") as file:
            raw = file.read()
        # The > of Windows PowerShell writes UTF-16, and some editors begin UTF-8 with a mark.
        is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        table = tomllib.loads(raw.decode("utf-16" if is_utf16 else "utf-8-sig"))
    except OSError as error:
        hint = near_recipe(path) or "flags look like --steps=100"
        raise ValueError(f"cannot read the recipe {path}: {error.strerror}; {hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the recipe {path} is damaged: {error}") from None
    values = {}
    for name, value in table.items():
        if isinstance(value, dict):
            values.update({f"{name}.{k}": v for k, v in value.items()})
        else:
            values[name] = value
    return {name: from_toml(name, value, path) for name, value in values.items()}


def near_recipe(path: str) -> str:
    """What to type for a recipe that is not there, if its name is near one of ours; else ""."""
    ours = [recipe.name for recipe in sorted(CONFIGS.glob("*.toml"))]
    name = os.path.basename(path)
    near = difflib.get_close_matches(f"{name.removesuffix('.toml')}.toml", ours, 1, 0.75)
    return f"did you mean configs/{near[0]}?" if near else ""


def known(name: str, text: str = "") -> None:
    """Raises ValueError, with the nearest name, where there is no field of this one.

    text: the value that was typed, which may decide what it is called here.
    """
    if name in FIELDS or ("." in name and name.split(".")[0] in NAMESPACES):
        return
    plain = name.replace("-", "_").lower()
    # The best hint first: the name as it is written here, another trainer's name, a near one.
    hints = []
    for word in (plain, plain.rpartition(".")[2]):
        # DeepSpeed's stages are layouts here.
        if word in ("zero", "zero_stage", "stage") and text in STAGES:
            hints.append(STAGES[text])
        for ours in (word, HERE.get(word)):
            if ours in FIELDS or ours in HERE.values():
                hints.append(ours)
    if plain.startswith("no_") and plain[3:] in FIELDS:
        hints.append(f"{plain[3:]}=false")
    hints += difflib.get_close_matches(plain, FIELDS, 1)
    hint = "--help lists all fields, docs/coming_from.md what other trainers call them"
    if hints:
        hint = f"did you mean --{hints[0]}?"
    last = plain.rpartition(".")[2]
    if last in ABSENT:
        hint = f"{ABSENT[last]}; leave it out"
    if plain in RECIPE_FLAGS:
        recipe = text or "FILE.toml"
        hint = f"a recipe is a word without --: python train.py {recipe} --steps=100"
    raise ValueError(f"there is no field {name[:100]!r}; {hint}")


def from_text(name: str, text: str):
    """The value that --name=text gives a field. Raises ValueError."""
    known(name, text)
    if not text.strip():
        raise ValueError(f"--{name}= is empty; type a value ({allowed(name)}), or leave it out")
    # The owner of a dotted field is known only when all words are read: run/options.py checks it.
    if "." in name:
        return literal(name, text)
    word = text.lower()
    if word == "none" and type(None) in kinds(name):
        return None
    for kind in kinds(name):
        if kind is bool and word in ("true", "false"):
            return word == "true"
        if typing.get_origin(kind) is Literal and word in typing.get_args(kind):
            return word
        if kind is str:
            return os.path.expanduser(text) if name in PATHS else text
        if kind in (int, float):
            value = number(kind, text)
            if value is not None:
                return value
    # A message is one line, however long the text and however many lines were typed.
    shown = " ".join(text.split())[:200]
    raise ValueError(f"--{name}={shown} is not allowed; it takes {allowed(name)}")


WORDS = {"none": None, "true": True, "false": False}


def literal(name: str, text: str):
    """A number, a word, or a list of them: 0.9,0.95. Parses, never runs."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = WORDS.get(text.lower(), text)
        # literal_eval takes None and True, but users type none and true: 0.9,none is a list too.
        if value is text and "," in text:
            parts = [part.strip().lower() for part in text.split(",")]
            found = [WORDS.get(part, number(float, part)) for part in parts]
            if all(x is not None or part == "none" for x, part in zip(found, parts)):
                value = tuple(found)
    if isinstance(value, list):
        value = tuple(value)
    return plain_only(value, f"--{name}={text}")


def plain_only(value, said: str):
    """The value, if it is plain; `said` is what the user typed. Raises ValueError."""
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, int | float | str | None) for part in parts):
        raise ValueError(f"{' '.join(said.split())[:200]} is no number, word or list of them")
    return value


def from_toml(name: str, value, path: str):
    """The value that a line of a recipe gives a field. Raises ValueError."""
    if name.startswith("chosen.") and name[7:] in OPEN:
        name = name[7:]
    known(name)
    if "." in name:
        # A tuple, as from the command line: == must hold between a recipe and typed words.
        value = tuple(map(none, value)) if isinstance(value, list) else none(value)
        return plain_only(value, f"{name} = {value!r} in {path}")
    if none(value) is None and type(None) in kinds(name):
        return None
    is_empty = isinstance(value, str) and not value.strip()
    for kind in kinds(name):
        if is_empty:
            break
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        # Not isinstance: TOML's true is an int in Python.
        elif kind in (int, float) and type(value) in (int, float):
            converted = number(kind, repr(value))
            if converted is not None:
                return converted
        elif type(value) is kind:
            return os.path.expanduser(value) if name in PATHS else value
    raise ValueError(
        f"{name} = {repr(value)[:200]} in {path} is not allowed; it takes {allowed(name)}"
    )


def none(value):
    """The value, and None for the word none: TOML has no null."""
    if isinstance(value, str) and value.lower() == "none":
        return None
    return value


def number(kind: type, text: str):
    """The text as an int or float; None where it is no such number. 1e6 is a whole number, too."""
    for convert in (kind, float):
        try:
            value = convert(text)
            # int() of an infinity or a NaN raises: neither is a whole number.
            is_of_kind = kind is float or value == int(value)
            return kind(value) if is_of_kind else None
        except (ValueError, OverflowError):
            pass
    return None


def kinds(name: str) -> tuple:
    """The types that a field may have: (int, NoneType) for `int | None`."""
    hint = TYPES[name]
    is_union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if is_union else (hint,)


def change(name: str) -> str:
    return FIELDS[name].metadata["change"]


def makes_another_run(name: str) -> bool:
    """Does a value for this field make it another run, which chooses anew?"""
    return "." in name or name == "device" or change(name) in ("fixed", "on_branch")


def allowed(name: str) -> str:
    """What a field takes, for the end of an error message."""
    if "." in name:
        return "a number, a word, or a list of them"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "none",
    }
    return ", ".join(words.get(k) or ", ".join(typing.get_args(k)) for k in kinds(name))


# ---- writing -------------------------------------------------------------------------------------
def to_dict(cfg: Config) -> dict:
    """Plain values for a checkpoint."""
    values = {name: getattr(cfg, name) for name in FIELDS}
    try:
        here = os.getcwd()
    except OSError:  # the folder was deleted
        here = ""
    values["options"] = dict(cfg.options)
    values["chosen"] = fields.chosen(cfg)
    # A run that is resumed from another folder finds relative paths from here.
    values["cwd"] = here
    return values


def from_dict(saved: dict) -> Config:
    """The config of a checkpoint, each value checked as if from a recipe. Raises ValueError."""
    try:
        # Earlier versions knew no chunks: what they began goes on with the logits of all tokens.
        saved = {"loss_chunk": None} | saved
        values = {
            name: from_toml(name, saved[name], "the checkpoint") for name in FIELDS if name in saved
        }
        # The checkpoint is JSON, which has made lists of tuples.
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["options"].items()}
        cfg = Config(**values, options=options)
        # Where the checkpoint lacks the list, all that a run may choose counts as chosen.
        cfg.given -= {*saved.get("chosen", OPEN)}
        return check(cfg)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint's settings are not what this program writes: {error}"
        ) from None


def to_toml(cfg: Config, notes: dict) -> str:
    """The resolved settings as a recipe; `notes` (commit, versions) become comments at its head."""

    def shown(value) -> str:
        if value is None:
            return '"none"'
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(shown(v) for v in value) + "]"
        if isinstance(value, str):
            # A JSON string is a TOML string, but TOML wants DEL (0x7f) escaped too.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        if isinstance(value, bool):
            return str(value).lower()
        return repr(value)

    chosen = fields.chosen(cfg)
    lines = [f"# {key}: {value}" for key, value in notes.items()]
    lines += [f"{name} = {shown(getattr(cfg, name))}" for name in FIELDS if name not in chosen]
    lines += [f'"{name}" = {shown(value)}' for name, value in cfg.options.items()]
    if chosen:
        lines += ["", "[chosen]  # what auto and none stood for; nobody asked for it"]
    for name in chosen:
        line = f"{name} = {shown(getattr(cfg, name))}"
        # A fact of this machine is a comment: another machine chooses for itself.
        if change(name) == "per_run":
            line = f"# here: {line}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def help_text() -> str:
    lines = [
        "python train.py [recipe.toml] [--field=value ...]",
        "",
        "Later wins. The same under torchrun.",
    ]
    for name, f in FIELDS.items():
        if name in SECTIONS:
            lines += ["", SECTIONS[name]]
        lines.append(f"  --{name:17} {f.metadata['help']} [{str(f.default).lower()}]")
        # `auto` alone, as in `bool | auto`, is no list of choices.
        if any(typing.get_origin(k) is Literal and k is not Auto for k in kinds(name)):
            lines.append(f"{'':22}one of: {allowed(name)}")
    lines += [
        "",
        "  --opt.NAME=       an argument of the optimizer's constructor, such as"
        " --opt.betas=0.9,0.95",
        "  --schedule.NAME=  an argument of the schedule, such as --schedule.shape=cosine",
        "  --compress.NAME=  an argument of the compression, such as --compress.rank=4",
        "  --diloco.NAME=    an argument of the outer step, such as --diloco.momentum=0.9",
        "  --scaler.NAME=    an argument of fp16's loss scaler, such as --scaler.fixed=1024",
        "  --compile.NAME=   dynamic, verbose or backend, such as --compile.verbose=true",
        "  --fp8.NAME=       an argument of FP8, such as --fp8.scaling=tensor",
        "  --monitor.NAME=   a number of the spike monitor, such as --monitor.detector=ema",
    ]
    return "\n".join(lines)
