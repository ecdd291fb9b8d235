"""Words of a picture: any name is drawn as text, on one line, and a legend fits its page."""

import math


def one_line(text) -> str:
    """Without what a terminal would act on and a font has no shape for, such as a newline."""
    # A file's name may hold bytes that are no text.
    text = str(text).encode("utf-8", "replace").decode()
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def plain(text, longest: int = 24) -> str:
    """Text that matplotlib draws as it is, on one line.

    A long one keeps only its end, where paths differ.
    """
    text = one_line(text)
    if len(text) > longest:
        text = "…" + text[1 - longest :]
    # A legend leaves out what begins with an underscore.
    if text.startswith("_"):
        text = " " + text
    # matplotlib takes text between two $ for a formula.
    return text.replace("$", r"\$")


def columns(labels: list[str], width: float) -> int:
    """How many labels of a legend fit side by side into `width` inches."""
    # An inch has room for 11 letters, and a label takes 8 more for its sign and the gaps.
    longest = max(map(len, labels))
    return max(1, round(11 * width) // (8 + longest))


def loss_text(x: float) -> str:
    """A loss with four decimals, where these say something; else with four digits."""
    return f"{x:.4f}" if x == 0 or 1e-3 <= abs(x) < 1e4 else f"{x:.4g}"


def duration(seconds: float) -> str:
    """90 -> 90 s, 1800 -> 30.0 min, 7200 -> 2.0 h"""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def tick_labels(places: list[float]) -> list[str]:
    """Labels of evenly spaced ticks, with the digits that tell one from the next.

    report.js has the same in its language.
    """
    largest = max(map(abs, places), default=0)
    if len(places) < 2 or largest == 0:
        return [f"{x:,.0f}" if x == round(x) and abs(x) < 1e15 else f"{x:.6g}" for x in places]
    gap = abs(places[1] - places[0])
    digits = math.floor(math.log10(gap) + 1e-9)  # of the gap: 0.05 has -2, 0.25 too
    times = gap / 10.0**digits
    digits -= abs(times - round(times)) > 1e-3
    exact = max(0, math.floor(math.log10(largest)) - digits)  # digits after the first
    if largest < 1e-3 or largest >= 1e16:
        return ["0" if abs(x) < gap / 2 else f"{x:.{exact}e}" for x in places]
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        least = 1e-3 if size > 1e3 and largest >= 1e3 * size else 0.1
        if largest >= max(size, 1e4) and gap >= least * size * (1 - 1e-9):
            n = max(0, round(math.log10(size)) - digits)
            return ["0" if abs(x) < gap / 2 else f"{x / size:.{n}f}{letter}" for x in places]
    return [f"{0.0 if abs(x) < gap / 2 else x:,.{max(0, -digits)}f}" for x in places]
