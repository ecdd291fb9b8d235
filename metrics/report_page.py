"""A page as one HTML file that fetches nothing, and in which every text is text.

words         are escaped wherever they stand; Markup is what this project has made of them
the browser   is told by a Content-Security-Policy to run this one script, which it knows by its
              hash, and to load nothing: what escaping had missed would still be dead
"""

import base64
import hashlib
import html
import re
from pathlib import Path

HERE = Path(__file__).parent
MOST_ROWS, MOST_COLUMNS = 300, 12  # of a table
# Control characters, and those that change the direction of what follows.
UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Markup(str):
    """HTML that is not escaped again."""


def text(value) -> Markup:
    """Any value as text. What a file cannot hold, HTML forbids, or would turn the words round
    becomes a mark."""
    if isinstance(value, Markup):
        return value
    words = str(value).encode("utf-8", "replace").decode()
    words = UNFIT.sub("\ufffd", words)
    return Markup(html.escape(words))


def tag(name: str, *inside, **attributes) -> Markup:
    """<name attributes>inside</name>. A trailing _ of an attribute is dropped; others become -."""
    pairs = [
        f' {key.rstrip("_").replace("_", "-")}="{text(x)}"'
        for key, x in attributes.items()
        if x is not None
    ]
    return Markup(f"<{name}{''.join(pairs)}>{''.join(map(text, inside))}</{name}>")


def table(head: list, rows: list[list], best: int | None = None) -> Markup:
    """best: the row that is marked."""
    lines = [tag("tr", *(tag("th", cell) for cell in head))] if head else []
    for i, row in enumerate(rows):
        cells = [tag("td", "" if cell is None else cell) for cell in row]
        lines.append(tag("tr", *cells, class_="best" if i == best else None))
    return tag("div", tag("table", *lines), class_="scroll")


def shown(value, longest: int = 300):
    """A value of a file as a cell. Markup is ours, and stays."""
    if isinstance(value, Markup):
        return value
    text = f"{value:.6g}" if type(value) is float else str(value)
    return text if len(text) <= longest else text[: longest - 1] + "\u2026"


def listed(head: list, rows: list[list], best: int | None = None) -> list[Markup]:
    """A table that is no longer than a page can bear."""
    cells = [[shown(cell) if cell is not None else "" for cell in row] for row in rows[:MOST_ROWS]]
    found = [table([shown(name) for name in head], cells, best)]
    if len(rows) > MOST_ROWS:
        found.append(quiet(f"and {len(rows) - MOST_ROWS} more rows"))
    return found


def quiet(words: str) -> Markup:
    return tag("p", words, class_="quiet")


def page(title: str, *sections) -> str:
    script = (HERE / "report.js").read_text(encoding="utf-8")
    style = (HERE / "report.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{sha256(script)}'; style-src '{sha256(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"{tag('title', title)}\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(map(text, sections))
        + f"\n<script>{script}</script>\n</body>\n</html>\n"
    )


def sha256(code: str) -> str:
    digest = hashlib.sha256(code.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
