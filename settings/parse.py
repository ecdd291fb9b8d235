"""The settings of a run, filled from recipes and the command line, and written down again.

    python train.py [recipe.toml] [--field=value ...]          later wins; --field value is the same

The fields are in settings/fields.py, one line each, what goes together in settings/checks.py.
Parsing, `--help` and the saved `config.toml` are derived from those lines. Fields with a dot belong
to whatever another field selected: `--opt.betas=0.9,0.95` goes to the constructor of `--optim`,
`--schedule.NAME=` to the schedule; run/options.py checks them against its signature. In TOML a
dotted field is a quoted key: `"opt.betas" = [0.9, 0.95]`.

A run's `config.toml` is a recipe for the same run. What `auto` and `none` stood for there is in its
table [chosen]: values that nobody asked for. No check holds them against the user, and as soon as a
later word makes it another run (another optimizer, say) they are chosen anew.

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
from typing import Literal

from settings import fields
from settings.checks import check
from settings.fields import FIELDS, NAMESPACES, OPEN, PATHS, SECTIONS, TYPES, Auto, Config
from settings.synonyms import HERE


# ---- reading -------------------------------------------------------------------------------------
def parse(argv: list[str]) -> Config:
    """The command line's settings. Raises ValueError on any mistake, SystemExit(0) after
    `--help`."""
    values, open_ = {}, {}  # what was asked for, and what earlier runs chose
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    for word in joined(argv):
        name, _, text = word[2:].partition("=")
        found = {name: from_text(name, text)} if word.startswith("--") else read_recipe(word)
        own = {n.removeprefix("chosen."): found.pop(n) for n in [*found] if n.startswith("chosen.")}
        if any(makes_another_run(n) for n in found):
            open_ = {}
        open_ = {n: v for n, v in open_.items() if n not in found} | own
        values = {n: v for n, v in values.items() if n not in own} | found
    cfg = Config(
        **{k: v for k, v in (open_ | values).items() if "." not in k},
        options={k: v for k, v in values.items() if "." in k},
    )
    cfg.given = set(values)
    return check(cfg)


def joined(argv: list[str]) -> list[str]:
    """["--steps", "5"] as ["--steps=5"]. Raises ValueError for a flag that has no value."""
    words, left = [], list(argv)
    while left:
        word = left.pop(0)
        name, equals, text = word[2:].partition("=")
        if word.startswith("--") and not text:
            known(name)
            while (
                not text and left and not left[0].startswith("--") and not left[0].endswith(".toml")
            ):
                text = left.pop(0).removeprefix("=")
            if not equals and not text:
                value = "true" if name in FIELDS and bool in kinds(name) else "VALUE"
                raise ValueError(f"--{name} has no value; type --{name}={value}")
            word = f"--{name}={text}"
        words.append(word)
    return words


def read_recipe(path: str) -> dict:
    """A TOML recipe as {field: value}; a table like [opt] and a quoted key like "opt.betas" mean
    the same."""
    path = os.path.expanduser(path)
    if os.path.isdir(path) and os.path.isfile(own := os.path.join(path, "config.toml")):
        raise ValueError(f"the recipe {path} is the folder of a run; its recipe is {own}")
    if not os.path.isfile(path) and os.path.exists(path):  # a pipe would wait, a device never end
        raise ValueError(
            f"cannot read the recipe {path}: it is no file; flags look like --steps=100"
        )
    try:
        with open(path, "rb") as file:
            raw = file.read()
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # of Windows' shell
        table = tomllib.loads(raw.decode("utf-16" if wide else "utf-8-sig"))
    except OSError as error:
        raise ValueError(
            f"cannot read the recipe {path}: {error.strerror}; flags look like --steps=100"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the recipe {path} is damaged: {error}") from None
    values = {}
    for name, value in table.items():
        if isinstance(value, dict):
            values.update({f"{name}.{k}": v for k, v in value.items()})
        else:
            values[name] = value
    return {name: from_toml(name, value, path) for name, value in values.items()}


def known(name: str) -> None:
    """Raises ValueError, with the nearest name, where there is no field of this one."""
    if name in FIELDS or ("." in name and name.split(".")[0] in NAMESPACES):
        return
    plain = name.replace("-", "_").lower()
    near = [n for word in (plain, plain.rpartition(".")[2]) for n in (word, HERE.get(word))]
    near = [n for n in near if n in FIELDS or n in HERE.values()]
    if plain.startswith("no_") and plain[3:] in FIELDS:
        near.append(f"{plain[3:]}=false")
    near += difflib.get_close_matches(plain, FIELDS, 1)
    hint = f"did you mean --{near[0]}?" if near else "--help lists those there are"
    raise ValueError(f"there is no field {name[:100]!r}; {hint}")


def from_text(name: str, text: str):
    """The value that --name=text gives a field. Raises ValueError."""
    known(name)
    if not text.strip():
        raise ValueError(f"--{name}= is empty; type a value ({allowed(name)}), or leave it out")
    if "." in name:  # checked against a signature later
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
        if kind in (int, float) and (value := number(kind, text)) is not None:
            return value
    shown = " ".join(text.split())[:200]
    raise ValueError(f"--{name}={shown} is not allowed; it takes {allowed(name)}")


WORDS = {"none": None, "true": True, "false": False}


def literal(name: str, text: str):
    """A number, a word, or a list of them: 0.9,0.95. Parses, never runs."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = WORDS.get(text.lower(), text)
        if value is text and "," in text:  # one of them may be none
            parts = [part.strip().lower() for part in text.split(",")]
            found = [WORDS.get(part, number(float, part)) for part in parts]
            if all(x is not None or part == "none" for x, part in zip(found, parts)):
                value = tuple(found)
    return plain_only(name, tuple(value) if isinstance(value, list) else value, f"--{name}={text}")


def plain_only(name: str, value, said: str):
    parts = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, int | float | str | None) for part in parts):  # no dates, no tables
        raise ValueError(f"{' '.join(said.split())[:200]} is no number, word or list of them")
    return value


def from_toml(name: str, value, path: str):
    """The value that a line of a recipe gives a field. Raises ValueError."""
    if name.startswith("chosen.") and name[7:] in OPEN:
        name = name[7:]
    known(name)
    if "." in name:
        value = tuple(map(none, value)) if isinstance(value, list) else none(value)
        return plain_only(name, value, f"{name} = {value!r} in {path}")
    if none(value) is None and type(None) in kinds(name):
        return None
    for kind in kinds(name):
        if isinstance(value, str) and not value.strip():
            break
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        elif kind in (int, float) and type(value) in (int, float):
            if (converted := number(kind, repr(value))) is not None:
                return converted
        elif type(value) is kind:
            return os.path.expanduser(value) if name in PATHS else value
    raise ValueError(
        f"{name} = {repr(value)[:200]} in {path} is not allowed; it takes {allowed(name)}"
    )


def none(value):
    """TOML has no null: the word none stands for it."""
    return None if isinstance(value, str) and value.lower() == "none" else value


def number(kind: type, text: str):
    for convert in (kind, float):  # float second, for whole numbers written as 1e6
        try:
            value = convert(text)
            return kind(value) if kind is float or value == int(value) else None
        except (ValueError, OverflowError):
            pass
    return None


def kinds(name: str) -> tuple:
    hint = TYPES[name]
    return (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )


def change(name: str) -> str:
    return FIELDS[name].metadata["change"]


def makes_another_run(name: str) -> bool:
    return "." in name or name == "device" or change(name) in ("fixed", "on_branch")


def allowed(name: str) -> str:
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
    """Plain values for a checkpoint. cwd: where relative paths begin."""
    values = {name: getattr(cfg, name) for name in FIELDS} | {"options": dict(cfg.options)}
    try:
        here = os.getcwd()
    except OSError:  # it was deleted
        here = ""
    return values | {"chosen": fields.chosen(cfg), "cwd": here}


def from_dict(saved: dict) -> Config:
    """The config of a checkpoint, each value checked as if from a recipe. Raises ValueError."""
    try:
        values = {
            name: from_toml(name, saved[name], "the checkpoint") for name in FIELDS if name in saved
        }
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["options"].items()}
        cfg = Config(**values, options=options)
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
        if isinstance(value, str):  # as JSON has it, but for DEL
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return str(value).lower() if isinstance(value, bool) else repr(value)

    open_ = fields.chosen(cfg)
    lines = [f"# {key}: {value}" for key, value in notes.items()]
    lines += [f"{name} = {shown(getattr(cfg, name))}" for name in FIELDS if name not in open_]
    lines += [f'"{name}" = {shown(value)}' for name, value in cfg.options.items()]
    if open_:
        lines += ["", "[chosen]  # what auto and none stood for; nobody asked for it"]
    for name in open_:
        here = "# here: " * (change(name) == "per_run")  # of this machine, not of the run
        lines.append(f"{here}{name} = {shown(getattr(cfg, name))}")
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
        if any(typing.get_origin(k) is Literal and k is not Auto for k in kinds(name)):
            lines.append(f"{'':22}one of: {allowed(name)}")
    lines += [
        "",
        (
            "  --opt.NAME=       an argument of the optimizer's constructor, such as"
            " --opt.betas=0.9,0.95"
        ),
    ]
    lines += ["  --schedule.NAME=  an argument of the schedule, such as --schedule.shape=cosine"]
    lines += ["  --compress.NAME=  an argument of the compression, such as --compress.rank=4"]
    lines += ["  --diloco.NAME=    an argument of the outer step, such as --diloco.momentum=0.9"]
    lines += ["  --scaler.NAME=    an argument of fp16's loss scaler, such as --scaler.fixed=1024"]
    lines += ["  --compile.NAME=   dynamic, verbose or backend, such as --compile.verbose=true"]
    lines += ["  --fp8.NAME=       an argument of FP8, such as --fp8.scaling=tensor"]
    lines += ["  --monitor.NAME=   a number of the spike guard, such as --monitor.detector=ema"]
    return "\n".join(lines)
