"""The settings of a run, filled from recipes and the command line, and written down again.

    python train.py [recipe.toml] [--field=value ...]          later wins

The fields are in settings.py, one line each, what goes together in checks.py. Parsing, `--help` and the saved
`config.toml` are derived from those lines. Fields with a dot belong to whatever another field selected and
are checked against its signature: `--opt.betas=0.9,0.95` goes to the constructor of `--optim`,
`--schedule.NAME=` to the schedule. In TOML a dotted field is a quoted key: `"opt.betas" = [0.9, 0.95]`.

Nothing here is executed: values are numbers, strings, booleans and lists of them. Every mistake is a
ValueError whose one line says what came, what is allowed and what to type.
"""

import ast
import difflib
import os
import tomllib
import types
import typing
from typing import Literal

from checks import check
from settings import FIELDS, NAMESPACES, SECTIONS, TYPES, Auto, Config


# ---- reading ---------------------------------------------------------------------------------------------
def parse(argv: list[str]) -> Config:
    """The command line's settings. Raises ValueError on any mistake, SystemExit(0) after `--help`."""
    values = {}
    if "--help" in argv or "-h" in argv:
        print(help_text())
        raise SystemExit(0)
    for word in argv:
        if not word.startswith("--"):
            values.update(read_recipe(word))
            continue
        name, equals, text = word[2:].partition("=")
        known(name)
        if not equals:
            raise ValueError(f"--{name} has no value; type --{name}=VALUE")
        values[name] = from_text(name, text)
    cfg = Config(
        **{k: v for k, v in values.items() if "." not in k},
        options={k: v for k, v in values.items() if "." in k},
    )
    cfg.given |= values.keys()
    return check(cfg)


def read_recipe(path: str) -> dict:
    """A TOML recipe as {field: value}; a table like [opt] and a quoted key like "opt.betas" mean the same."""
    if not os.path.isfile(path) and os.path.exists(path):  # a pipe would wait, a device never end
        raise ValueError(f"cannot read the recipe {path}: it is no file; flags look like --steps=100")
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
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


ELSEWHERE = dict(max_iters="steps", learning_rate="lr", gradient_accumulation_steps="batch_size",
                 eval_interval="eval_every", eval_iters="eval_tokens", dataset="data", min_lr="min_lr_frac",
                 warmup_iters="warmup_steps", decay_lr="schedule", beta1="opt.betas", beta2="opt.betas",
                 dtype="precision", seq_len="block_size")  # other trainers' names  # fmt: skip


def known(name: str) -> None:
    if name in FIELDS or ("." in name and name.split(".")[0] in NAMESPACES):
        return
    near = [ELSEWHERE[name]] if name in ELSEWHERE else difflib.get_close_matches(name, FIELDS, 1)
    hint = f"did you mean --{near[0]}?" if near else "--help lists those there are"
    raise ValueError(f"there is no field {name!r}; {hint}")


def from_text(name: str, text: str):
    if "." in name:  # checked against a signature later
        try:
            return ast.literal_eval(text)  # numbers, tuples; parses, never runs
        except (ValueError, SyntaxError):
            return {"none": None, "true": True, "false": False}.get(text.lower(), text)
    for kind in kinds(name):
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if typing.get_origin(kind) is Literal and text in typing.get_args(kind):
            return text
        if kind is str and text:
            return text
        if kind in (int, float) and (value := number(kind, text)) is not None:
            return value
    shown = " ".join(text.split())[:200]
    raise ValueError(f"--{name}={shown} is not allowed; it takes {allowed(name)}")


def from_toml(name: str, value, path: str):
    known(name)
    if isinstance(value, str) and value.lower() == "none":
        value = None
    if "." in name:
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, int | float | str | None) for part in parts):  # no dates, no tables
            raise ValueError(f"{name} = {repr(value)[:200]} in {path} is no number, word or list of them")
        return tuple(value) if isinstance(value, list) else value
    for kind in kinds(name):
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        elif kind in (int, float) and type(value) in (int, float):
            if (converted := number(kind, repr(value))) is not None:
                return converted
        elif type(value) is kind:
            return value
    raise ValueError(f"{name} = {repr(value)[:200]} in {path} is not allowed; it takes {allowed(name)}")


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


def allowed(name: str) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return ", ".join(words.get(k) or ", ".join(typing.get_args(k)) for k in kinds(name))


# ---- writing ---------------------------------------------------------------------------------------------
def to_dict(cfg: Config) -> dict:
    """Plain values for a checkpoint."""
    return {name: getattr(cfg, name) for name in FIELDS} | {"options": dict(cfg.options)}


def from_dict(saved: dict) -> Config:
    """The config of a checkpoint, each value checked as if from a recipe. Raises ValueError."""
    try:
        values = {name: from_toml(name, saved[name], "the checkpoint") for name in FIELDS if name in saved}
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["options"].items()}
        return check(Config(**values, options=options))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint's settings are not what this program writes: {error}") from None


def to_toml(cfg: Config, notes: dict) -> str:
    """The resolved settings as a recipe; `notes` (commit, versions) become comments at its head."""

    def shown(value) -> str:
        if value is None:
            return '"none"'
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(shown(v) for v in value) + "]"
        if isinstance(value, str):
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
        return str(value).lower() if isinstance(value, bool) else repr(value)

    lines = [f"# {key}: {value}" for key, value in notes.items()]
    lines += [f"{name} = {shown(getattr(cfg, name))}" for name in FIELDS]
    lines += [f'"{name}" = {shown(value)}' for name, value in cfg.options.items()]
    return "\n".join(lines) + "\n"


def help_text() -> str:
    lines = ["python train.py [recipe.toml] [--field=value ...]", "", "Later wins. The same under torchrun."]
    for name, f in FIELDS.items():
        if name in SECTIONS:
            lines += ["", SECTIONS[name]]
        lines.append(f"  --{name:17} {f.metadata['help']} [{str(f.default).lower()}]")
        if any(typing.get_origin(k) is Literal and k is not Auto for k in kinds(name)):
            lines.append(f"{'':22}one of: {allowed(name)}")
    lines += [
        "",
        "  --opt.NAME=       an argument of the optimizer's constructor, such as --opt.betas=0.9,0.95",
    ]
    lines += ["  --schedule.NAME=  an argument of the schedule, such as --schedule.shape=cosine"]
    lines += ["  --compress.NAME=  an argument of the compression, such as --compress.rank=4"]
    lines += ["  --diloco.NAME=    an argument of the outer step, such as --diloco.momentum=0.9"]
    lines += ["  --scaler.NAME=    an argument of fp16's loss scaler, such as --scaler.fixed=1024"]
    lines += ["  --compile.NAME=   dynamic, verbose or backend, such as --compile.verbose=true"]
    lines += ["  --fp8.NAME=       an argument of FP8, such as --fp8.scaling=tensor"]
    lines += ["  --monitor.NAME=   a number of the spike guard, such as --monitor.detector=ema"]
    return "\n".join(lines)
