"""The flags of memory/estimate.py and memory/plan.py as commands: read, checked, listed.

    --params=7B --gpus 64 --compare      words -> (name, text)      from_text -> the value

7B is 7e9, as are K, M and T. A default shows its flag's kind; a flag whose default is false needs
no value. command() prints what a command says, or its error in a line.

Example:
    from memory.flags import from_text, words
    found = words(["--params=7B", "--gpus", "64"])
    values = {name: from_text(name, text, default=8) for name, text in found}
    assert values == {"params": 7_000_000_000, "gpus": 64}
"""

import difflib
import math
import textwrap


def check(what: str, value, known) -> None:
    """Raises ValueError, with the nearest name, for a value that is not in `known`."""
    if value in known:
        return
    near = difflib.get_close_matches(str(value), [k for k in known if k], 1)
    hint = f"there are: {', '.join(map(str, known)) or 'none'}"
    if near:
        hint = f"did you mean {near[0]}?"
    raise ValueError(f"{what} {value!r} is not known; {hint}")


SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def words(argv: list[str], switches=()) -> list[tuple[str, str]]:
    """(name, text) of each --name=text, or --name text; (name, "true") of a bare switch.

    Raises ValueError.
    """
    left = list(argv)
    found = []
    while left:
        word = left.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if name in switches and not equals:
            text = "true"
        elif not equals and left and not left[0].startswith("--"):
            text = left.pop(0)
        if not word.startswith("--") or not text:
            raise ValueError(f"{word!r} is not understood; type --name=value")
        found.append((name, text))
    return found


def from_text(name: str, text: str, default, choices=(), is_fraction: bool = False):
    """The value of --name=text: one of the choices, or else of the default's kind.

    A number is whole unless is_fraction. Raises ValueError for what is not allowed.
    """
    # every_2 and segments_4 are on no list: activation_bytes checks them.
    if name == "activation_checkpoint":
        return text
    if default is None and text.lower() == "none":
        return None
    if choices:
        check(name, text, choices)
        return None if text == "none" else text
    if type(default) is bool or name in ("tied", "qkv_bias"):
        check(name, text.lower(), ("true", "false"))
        return text.lower() == "true"
    value = number(text)
    # --batch=0 leaves activations out.
    least = 0 if is_fraction or name in ("batch", "n_shared_expert") else 1
    if least <= value < math.inf:
        if is_fraction:
            return value
        if value == round(value):
            return round(value)
    what = "a number, 0 or more"
    if not is_fraction:
        what = f"a whole number, {least} or more, as 8, 350M, 7e9, 7B or 1.5T"
    raise ValueError(f"{name}={text} is not allowed; it takes {what}")


def number(text: str) -> float:
    """7e9, 7B or 7GB as 7e9; NaN where it is no number."""
    if text[-2:].lower() in ("kb", "mb", "gb", "tb"):
        text = text[:-1]
    factor = SUFFIXES.get(text[-1:].lower())
    try:
        if factor is None:
            return float(text)
        # 4.1B must pass as whole, but 4.1 * 1e9 is 4099999999.9999995.
        return round(float(text[:-1]) * factor, 3)
    except ValueError:
        return math.nan


def usage(defaults: dict, names: dict, says: dict[str, str]) -> str:
    """The flags with their defaults, what each is for, and the words that some of them take."""
    lines = ["Flags, as --name=value or --name value; the values here are the defaults:"]
    for name, value in defaults.items():
        if value in (None, True, False):
            value = str(value).lower()
        text = says.get(name, "")
        choices = [x for x in names.get(name, ()) if x != str(value)]
        if choices:
            text += f" (or {', '.join(choices)})"
        flag = f"  --{name}={value}"
        if len(flag) > 30:
            lines.append(flag)
            flag = ""
        wrapped = textwrap.wrap(text, 68) or [""]
        lines.append(f"{flag:31} {wrapped[0]}".rstrip())
        lines += [" " * 32 + line for line in wrapped[1:]]
    return "\n".join(lines)


if __name__ == "__main__":
    print("numbers that memory.estimate and memory.plan understand, such as")
    for text in "7B", "80GB", "4.1e9":
        print(f"    {text:6} which is {number(text):g}")
