"""Curves as inline SVG, for a page about runs.

    a path      holds the data themselves: x as it is, y negated, log10 of it on a logarithmic axis
    report.js   zooms by changing the viewBox around the paths, and reads values off them

Without a script the curves are there all the same. Long ones are thinned: of each of n equal
stretches of x the least and the largest value stay, so a spike does.
"""

import math
from dataclasses import dataclass

from metrics.logger import short
from metrics.report_page import Markup, tag

WIDTH = 960
LEFT, RIGHT, TOP, BOTTOM = 84, 12, 6, 22  # around the frame of a chart
ROW = 14  # height of a row of events


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


def path_of(curve: Curve, height, low: float, high: float, n: int) -> str:
    """The curve as a path's d. height: y -> its place on the axis; low, high: the axis's limits."""
    far = 1e6 * (high - low)  # what a browser's float32 still draws
    lines = [[]]
    for x, y in thinned(curve.points, n):
        if y is None or (height is math.log10 and y <= 0):
            lines.append([])
            continue
        place = min(max(height(y), low - far), high + far)
        lines[-1].append(f"{x:.10g},{-place:.6g}")
    if curve.look in ("dots", "ring"):
        lines = [[pair] for line in lines for pair in line]
    # A point alone is a line of no length with round ends: a dot.
    return "".join("M" + " ".join(line) + "h0" * (len(line) == 1) for line in lines if line)


def ticks(low: float, high: float, n: float) -> list[float]:
    """At most n + 1 round numbers from low to high."""
    least = (high - low) / n
    power = 10.0 ** math.floor(math.log10(least))
    step = power * next((times for times in (1, 2, 5) if times * power >= least), 10)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]


def label(x: float) -> str:
    """A number beside an axis."""
    if 0 < abs(x) < 1e-3:
        return f"{x:.3g}"
    return short(x) if abs(x) >= 1e4 else f"{x:.5g}"


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
    """An SVG. Curves of one `axis` zoom together.

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
        d = path_of(curve, place, low, high, n)
        # A ring has no value of its own to be read.
        name = None if curve.look == "ring" else curve.name
        style = dict(stroke=curve.color, data_name=name, data_run=curve.run)
        look = dict(LOOKS[curve.look])
        if curve.look == "dots" and len(curve.points) > 60:
            look["stroke_width"] = 4  # or they would be a thick line
        drawn.append(tag("path", d=d, **style, **look) if d else "")
    box = f"{left:.10g} {-high:.6g} {right - left:.10g} {high - low:.6g}"
    parts = [tag("svg", *drawn, y=TOP, height=height, viewBox=box, **view)]
    marks = []
    names = names or {x: label(x) for x in ticks(left, right, 8)}
    for x, words in names.items():
        at = LEFT + (x - left) / (right - left) * wide
        marks.append(tag("text", words, x=f"{at:.1f}", y=bottom + 15, text_anchor="middle"))
    for y in ticks(low, high, height / 30):
        at = bottom - (y - low) / (high - low) * height + 4
        words = label(10**y if log else y)
        marks.append(tag("text", words, x=LEFT - 6, y=f"{at:.1f}", text_anchor="end"))
    parts.append(tag("g", *marks, class_="ticks"))
    rows = []
    heads = []
    for i, (name, (places, color)) in enumerate(events.items()):
        d = "".join(f"M{x:.10g},{i + 0.15}v.7" for x, _ in thinned([(x, 0) for x in places], n))
        rows.append(tag("path", d=d, stroke=color, stroke_width=2, data_name=name))
        at = bottom + BOTTOM + ROW * (i + 0.8)
        heads.append(tag("text", name[:12], x=LEFT - 6, y=f"{at:.1f}", text_anchor="end"))
    total = bottom + BOTTOM
    if rows:
        strip = f"{left:.10g} 0 {right - left:.10g} {len(rows)}"
        size = dict(y=total, height=ROW * len(rows), viewBox=strip)
        parts += [tag("svg", *rows, **size, **view), *heads]
        total += ROW * len(rows) + 6
    frame = dict(x=LEFT, y=TOP, height=height)
    parts.append(tag("rect", class_="band", width=0, **frame))
    parts.append(tag("rect", class_="frame", width=wide, **frame))
    zooms = dict(data_axis=axis, data_log="1" if log else None)
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
