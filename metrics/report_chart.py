"""Curves as inline SVG, for a page about runs.

    a path      holds the data as shares of the chart's width and height, from its left and top: a
                browser's float32 has neither a step of 1e9 nor a loss of 1e30
    data-scale  has the ends of both axes, which make values of shares; log10 where logarithmic
    report.js   zooms by changing the viewBox around the paths, and reads values off them

Without a script the curves are there all the same. Long ones are thinned: of each of n equal
stretches of x the least and the largest value stay, so a spike does.
"""

import math
from dataclasses import dataclass

from metrics.labels import tick_labels
from metrics.logger import short
from metrics.report_page import Markup, tag

WIDTH = 960
LEFT, RIGHT, TOP, BOTTOM = 84, 12, 6, 22  # around the frame of a chart
ROW = 14  # height of a row of events
WHOLE = ("step", "2 to the")  # axes of whole numbers


@dataclass
class Curve:
    """points: (x, y) in order of x; a y of None is a gap. run: which box of the page hides it."""

    name: str
    points: list
    color: str
    look: str = "line"  # or pale, dots, ring
    run: int = 0


LOOKS = {
    "line": dict(stroke_width=1.8),
    "pale": dict(stroke_width=0.8, stroke_opacity=0.35),
    "dots": dict(stroke_width=7),
    "ring": dict(stroke_width=14, stroke_opacity=0.35),
}


def thinned(points: list, n: int) -> list:
    """At most 2 n points: of each of n stretches of x the least and the largest y."""
    if len(points) <= 2 * n:
        return points
    first = points[0][0]
    width = (points[-1][0] - first) / n
    stretches = {}
    for point in points:
        stretches.setdefault(min(int((point[0] - first) / width), n - 1), []).append(point)
    kept = []
    for stretch in stretches.values():
        finite = [point for point in stretch if point[1] is not None]
        ends = [stretch[0]]  # a gap
        if finite:
            ends = [min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])]
        kept += sorted({*ends}, key=lambda p: p[0])
    return kept


def share(x: float, digits: int) -> str:
    """As short as may be: 0.50 is .5"""
    words = f"{x:.{digits}f}".rstrip("0").rstrip(".")
    return words.replace("0.", ".", 1) if words.lstrip("-").startswith("0.") else words


def path_of(curve: Curve, height, x_limits: tuple, y_limits: tuple, n: int) -> str:
    """The curve as a path's d. height: y -> its place on the axis; limits: those of both axes."""
    left, right = x_limits
    low, high = y_limits
    digits = max(6, math.ceil(math.log10(right - left)) + 1)  # tell each step from the next
    far = 1e6  # heights: what a browser's float32 still draws
    lines = [[]]
    for x, y in thinned(curve.points, n):
        if y is None or (height is math.log10 and y <= 0):
            lines.append([])
            continue
        down = min(max((high - height(y)) / (high - low), -far), far)
        lines[-1].append(f"{share((x - left) / (right - left), digits)},{share(down, 6)}")
    if curve.look in ("dots", "ring"):
        lines = [[pair] for line in lines for pair in line]
    # A point alone is a line of no length with round ends: a dot.
    return "".join("M" + " ".join(line) + "h0" * (len(line) == 1) for line in lines if line)


def ticks(low: float, high: float, n: float, is_whole: bool = False) -> list[float]:
    """At most n + 1 round numbers from low to high. is_whole: none between 1 and 2."""
    least = (high - low) / n
    power = 10.0 ** math.floor(math.log10(least))
    step = power * next((times for times in (1, 2, 5) if times * power >= least), 10)
    step = max(step, 1) if is_whole else step
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]


def label(x: float) -> str:
    """A number beside an axis."""
    if 0 < abs(x) < 1e-3:
        return f"{x:.3g}"
    return short(x) if abs(x) >= 1e4 else f"{x:.5g}"


def labelled(left: float, right: float, is_whole: bool) -> dict[float, str]:
    """Place on the x axis -> what stands there."""
    for n in (8, 4):  # long labels need room
        places = ticks(left, right, n, is_whole)
        words = tick_labels(places)
        if max(map(len, words), default=0) < 14:
            break
    return dict(zip(places, words))


def chart(
    curves: list[Curve],
    x_limits: tuple[float, float],
    y_limits: tuple[float, float],
    height: int = 140,
    log: bool = False,
    axis: str = "step",
    events: dict[str, tuple[list, str]] | None = None,
    n: int = 1000,
    names: dict[float, str] | None = None,
) -> Markup:
    """An SVG. Curves of one `axis` zoom together; whole numbers stand at one of steps.

    y_limits: as values, above 0 where log; events: name -> (places, colour), a row of ticks each;
    n: a curve has at most 2 n points; names: place on the x axis -> what stands there.
    """
    events = events or {}
    place = math.log10 if log else float
    left, right = x_limits
    low, high = map(place, y_limits)
    wide = WIDTH - LEFT - RIGHT
    bottom = TOP + height
    view = dict(class_="view", x=LEFT, width=wide, preserveAspectRatio="none")
    drawn = []
    for curve in curves:
        d = path_of(curve, place, x_limits, (low, high), n)
        # A ring has no value of its own to be read.
        name = None if curve.look == "ring" else curve.name
        style = dict(stroke=curve.color, data_name=name, data_run=curve.run)
        is_point = sum(y is not None for _, y in curve.points) == 1
        # A line through a single point shows nothing.
        look = dict(LOOKS["dots" if is_point and curve.look == "line" else curve.look])
        if curve.look == "dots" and len(curve.points) > 60:
            look["stroke_width"] = 4  # or they would be a thick line
        drawn.append(tag("path", d=d, **style, **look) if d else "")
    parts = [tag("svg", *drawn, y=TOP, height=height, viewBox="0 0 1 1", **view)]
    marks = []
    is_whole = axis in WHOLE
    longest = max(map(len, names.values())) if names else 0
    # Words that would lie over each other hang.
    is_turned = longest * len(names or ()) * 7 > wide
    room = max(BOTTOM, 6 * longest + 12) if is_turned else BOTTOM
    named = names
    names = names or labelled(left, right, is_whole)
    for x, words in names.items():
        at = min(LEFT + (x - left) / (right - left) * wide, WIDTH - 3.4 * len(words))
        turn = f"rotate(-60 {at:.1f} {bottom + 12})" if is_turned else None
        style = dict(text_anchor="end" if is_turned else "middle", transform=turn)
        style |= dict(data_at=f"{(x - left) / (right - left):.6g}") if named else {}
        marks.append(tag("text", words, x=f"{at:.1f}", y=bottom + (12 if turn else 15), **style))
    places = ticks(low, high, height / 30)
    values = [label(10**y) for y in places] if log else tick_labels(places)
    for y, words in zip(places, values):
        at = bottom - (y - low) / (high - low) * height + 4
        marks.append(tag("text", words, x=LEFT - 6, y=f"{at:.1f}", text_anchor="end"))
    parts.append(tag("g", *marks, class_="ticks"))
    rows = []
    heads = []
    for i, (name, (places, color)) in enumerate(events.items()):
        at = [(x - left) / (right - left) for x, _ in thinned([(x, 0) for x in places], n)]
        d = "".join(f"M{share(x, 12)},{i + 0.15}v.7" for x in at)
        rows.append(tag("path", d=d, stroke=color, stroke_width=2, data_name=name))
        at = bottom + room + ROW * (i + 0.8)
        heads.append(tag("text", name[:12], x=LEFT - 6, y=f"{at:.1f}", text_anchor="end"))
    total = bottom + room
    if rows:
        size = dict(y=total, height=ROW * len(rows), viewBox=f"0 0 1 {len(rows)}")
        parts += [tag("svg", *rows, **size, **view), *heads]
        total += ROW * len(rows) + 6
    frame = dict(x=LEFT, y=TOP, height=height)
    parts.append(tag("rect", class_="band", width=0, **frame))
    parts.append(tag("rect", class_="frame", width=wide, **frame))
    zooms = dict(data_axis=axis, data_log="1" if log else None)
    zooms |= dict(
        data_scale=f"{left!r} {right!r} {low!r} {high!r}", data_whole="1" if is_whole else None
    )
    return tag("svg", *parts, class_="chart", viewBox=f"0 0 {WIDTH} {total}", role="img", **zooms)


def key(curves: list[Curve]) -> Markup:
    """The names of curves, each beside a piece of it."""
    spans = []
    for curve in curves:
        d = "M1,7h14" if curve.look in ("line", "pale") else "M8,7h0"
        sign = tag("path", d=d, stroke=curve.color, **LOOKS[curve.look])
        spans.append(tag("span", tag("svg", sign, width=17, height=14), " ", curve.name))
    return tag("p", *spans, class_="key")


def box(run: int, color: str, name: str) -> Markup:
    """A box that hides the curves of a run, its colour and its name."""
    sign = tag("path", d="M1,7h14", stroke=color, stroke_width=4)
    # No end tag: tag() would write one.
    tick = Markup(f'<input type="checkbox" checked data-run="{run}">')
    return tag("label", tick, tag("svg", sign, width=17, height=14), name)


# From a quarter of the mean to four times of it, in half powers of two.
BLUE_TO_RED = "#2166ac #4393c3 #92c5de #d1e5f0 #f7f7f7 #fddbc7 #f4a582 #d6604d #b2182b".split()


def heat(shares: list[list[float]]) -> Markup:
    """A map. shares: for each step, of each expert its load over the mean; 0 is black."""
    cells = {}  # colour -> d
    for x, column in enumerate(shares):
        for y, share in enumerate(column):
            color = "#000000"
            if share > 0:
                color = BLUE_TO_RED[round(min(max(2 * math.log2(share), -4), 4)) + 4]
            cells[color] = cells.get(color, "") + f"M{x},{y}h1v1h-1z"
    paths = [tag("path", d=d, fill=color) for color, d in cells.items()]
    size = f"0 0 {len(shares)} {len(shares[0])}"
    height = min(max(30, 8 * len(shares[0])), 160)
    view = dict(viewBox=size, preserveAspectRatio="none", height=height, class_="heat")
    return tag("svg", *paths, shape_rendering="crispEdges", **view)
