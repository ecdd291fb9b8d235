"""Words of a picture: any name is drawn as text, on one line, and a legend fits its page."""


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
