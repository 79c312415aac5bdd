"""Small inline SVG charts for the pages: numbers in, markup out, no dependency, no script.

Colors are the page's CSS variables, so that one drawing serves light and dark. Every chart is
named by a sentence (`label`) that tells a screen reader what it shows.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 380, 210


LEFT, RIGHT, TOP, BOTTOM = 44, 10, 12, 34
SIDE = 360  # cells of a heat image at most, either way
MAX_COLUMNS = 80  # above, columns are too thin to tell apart
Format = Callable[[float], str]


def short(value: float) -> str:
    """A number as an axis shows it: 950, 1.2k, 1.3M, 0.05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share in 0..1 as an axis shows it: 25%."""
    return f"{100 * value:.3g}%"


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Round values between low and high, about `count` of them; `whole`: only integers."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between low and high; fewer where they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        values = [m * 10.0**p for p in powers for m in steps]
        values = [v for v in values if low * 0.999 <= v <= high * 1.001]
        if len(values) <= 6:
            return values if len(values) > 1 else [low, high]
    return values[:: math.ceil(len(values) / 6)]


class Plot:
    """One drawing: two axes, then marks."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        label: str,
        x_title: str = "",
        x_format: Format = short,
        y_format: Format = short,
        x_whole: bool = False,
        x_log: bool = False,
        x_ticks: Sequence[float] | None = None,
        left: int = LEFT,
        height: int = HEIGHT,
    ) -> None:
        """x, y: ranges of the axes; x_log needs positive ones. left: room for y's labels."""
        self.x_log, self.left = x_log, left
        self.x_range, self.y_range = _widened(x), _widened(y)
        self.x_ticks = x_ticks
        self.label, self.height = label, height
        self.marks: list[str] = []
        self._axes(x_title, x_format, y_format, x_whole)

    def px(self, value: float) -> float:
        """Horizontal position of a value, in the drawing's units."""
        low, high = self.x_range
        if self.x_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.left + (value - low) / (high - low) * (WIDTH - self.left - RIGHT)

    def py(self, value: float) -> float:
        """Vertical position of a value, in the drawing's units."""
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def _axes(self, x_title: str, x_format: Format, y_format: Format, x_whole: bool) -> None:
        right, bottom = WIDTH - RIGHT, self.height - BOTTOM
        for value in ticks(*self.y_range):
            y = self.py(value)
            self.marks.append(f'<path class="rule" d="M{self.left} {y:.1f}H{right}"/>')
            self.text(self.left - 6, y + 3.5, y_format(value), "end")
        for value in self._x_ticks(x_whole):
            self.text(self.px(value), bottom + 14, x_format(value), "middle")
        self.marks.append(f'<path class="axis" d="M{self.left} {bottom}H{right}"/>')
        self.text((self.left + right) / 2, self.height - 4, x_title, "middle")

    def _x_ticks(self, whole: bool) -> Sequence[float]:
        if self.x_ticks is not None:
            return self.x_ticks
        return log_ticks(*self.x_range) if self.x_log else ticks(*self.x_range, whole=whole)

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> None:
        """A text at a position of the drawing (not of the axes). kind: CSS classes."""
        self.marks.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}'
            "</text>"
        )

    def column(self, x0: float, x1: float, y: float, title: str, kind: str = "") -> None:
        """A column from the axis up to y."""
        left, right = self.px(x0), self.px(x1)
        gap = 1 if right - left > 4 else 0
        top = self.py(y)
        self.marks.append(
            f'<rect class="fill {kind}" x="{left + gap / 2:.1f}" y="{top:.1f}" '
            f'width="{max(0.4, right - left - gap):.1f}" '
            f'height="{max(0.0, self.height - BOTTOM - top):.1f}"><title>{escape(title)}</title>'
            "</rect>"
        )

    def line(self, x: Sequence[float], y: Sequence[float], kind: str = "line") -> None:
        """A line through points; those of no finite y are left out."""
        points = " ".join(
            f"{self.px(a):.1f},{self.py(b):.1f}"
            for a, b in zip(x, y, strict=True)
            if math.isfinite(b)
        )
        self.marks.append(f'<polyline class="{kind}" points="{points}"/>')

    def dot(self, x: float, y: float, title: str, radius: float = 4, kind: str = "fill") -> None:
        """A dot, named by a title that shows when pointed at."""
        self.marks.append(
            f'<circle class="{kind}" cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="{radius:.1f}">'
            f"<title>{escape(title)}</title></circle>"
        )

    def svg(self) -> Markup:
        """The drawing as markup."""
        body = "".join(self.marks)
        return Markup(
            f'<svg class="chart" viewBox="0 0 {WIDTH} {self.height}" role="img" '
            f'aria-label="{escape(self.label)}">{body}</svg>'
        )


def _widened(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    return (low, high) if high > low else (low, low + 1)


def histogram(
    counts: np.ndarray,
    edges: np.ndarray,
    *,
    label: str,
    x_title: str,
    unit: str,
    x_format: Format = short,
    x_whole: bool = False,
) -> Markup:
    """A column per bin. counts: [B]. edges: [B + 1]. unit: what is counted."""
    plot = Plot(
        (float(edges[0]), float(edges[-1])),
        (0, float(counts.max())),
        label=label,
        x_title=x_title,
        x_format=x_format,
        x_whole=x_whole,
    )
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        title = f"{x_format(low)} to {x_format(high)}: {count:,} {unit}"
        plot.column(float(low), float(high), float(count), title)
    return plot.svg()


def sorted_sizes(sizes: np.ndarray, label: str) -> Markup:
    """Cluster sizes from the largest down, with the even share as a line. sizes: int [K]."""
    order = np.argsort(-sizes, kind="stable")
    count = len(sizes)
    plot = Plot(
        (0, count),
        (0, float(sizes.max())),
        label=label,
        x_title="clusters, largest first",
        x_whole=True,
    )
    if count <= MAX_COLUMNS:
        for rank, cluster in enumerate(order):
            title = f"cluster {cluster}: {sizes[cluster]:,} images"
            plot.column(rank, rank + 1, float(sizes[cluster]), title)
    else:
        chosen = np.linspace(0, count - 1, 200).astype(int)
        x = [0, *(chosen + 0.5), count, count, 0]
        ends = [sizes[order[0]], *sizes[order[chosen]], sizes[order[-1]], 0, 0]
        plot.line([float(v) for v in x], [float(v) for v in ends], "area")
    even = float(sizes.mean())
    plot.line([0, count], [even, even], "reference")
    plot.text(WIDTH - RIGHT, plot.py(even) - 4, f"even: {even:,.0f}", "end", "note")
    return plot.svg()


def curves(steps: Sequence[float], values: np.ndarray, *, label: str) -> Markup:
    """A faint line per head over the steps, and their mean. values: [S, H]."""
    keep = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 160)).astype(int))
    x, y = np.asarray(steps, dtype=float)[keep], values[keep]
    finite = y[np.isfinite(y)]
    bounds = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    plot = Plot((float(x[0]), float(x[-1])), bounds, label=label, x_title="step")
    if y.shape[1] > 1:
        for head in range(y.shape[1]):
            plot.line(x.tolist(), y[:, head].tolist(), "line faint")
    plot.line(x.tolist(), y.mean(axis=1).tolist())
    return plot.svg()


def heads(
    values: Sequence[float], references: Sequence[tuple[str, float, str]], label: str
) -> Markup:
    """A dot per head at its accuracy, and lines to compare with: (name, value, css class)."""
    every = [*values, *(value for _, value, _ in references)]
    low, high = min(every), max(every)
    pad = max(0.01, (high - low) * 0.12)
    bounds = (max(0.0, low - pad), min(1.0, high + pad))
    plot = Plot(
        (0, len(values) + 1),
        bounds,
        label=label,
        x_title="heads, best first",
        y_format=percent,
        x_whole=True,
    )
    for rank, value in enumerate(sorted(values, reverse=True), start=1):
        plot.dot(rank, value, f"head ranked {rank}: {value:.1%}", 3.5)
    used: list[float] = []
    for name, value, kind in references:
        plot.line([0, len(values) + 1], [value, value], f"reference {kind}")
        y = plot.py(value) - 4
        while any(abs(y - other) < 11 for other in used):
            y += 11
        used.append(y)
        plot.text(WIDTH - RIGHT, y, f"{name} {value:.1%}", "end", f"note {kind}")
    return plot.svg()


def reliability(
    confidence: Sequence[float], accuracy: Sequence[float], rows: Sequence[int], label: str
) -> Markup:
    """Accuracy over confidence; a dot's area is its number of images; the diagonal is perfect."""
    plot = Plot(
        (0, 1), (0, 1), label=label, x_title="confidence", x_format=percent, y_format=percent
    )
    plot.line([0, 1], [0, 1], "reference")
    biggest = max(rows)
    many = [i for i, count in enumerate(rows) if count >= 0.005 * biggest]  # few rows are noise
    plot.line([confidence[i] for i in many], [accuracy[i] for i in many], "line faint")
    for x, y, count in zip(confidence, accuracy, rows, strict=True):
        title = f"confidence {x:.0%}: {y:.1%} right, {count:,} images"
        plot.dot(x, y, title, 2.5 + 7 * math.sqrt(count / biggest))
    return plot.svg()


Point = tuple[float, float, str, bool]  # x, y, what it is, whether it is the best trial


def padded(values: Sequence[float], part: float = 0.06) -> tuple[float, float]:
    """A range with room around the values: `part` of their span on each side."""
    low, high = min(values), max(values)
    pad = (high - low) * part or max(abs(high) * part, 1e-3)
    return low - pad, high + pad


def _point(plot: Plot, x: float, y: float, title: str, best: bool) -> None:
    plot.dot(x, y, title, 3.2, "fill trial")
    if best:
        plot.dot(x, y, title, 6.5, "best")


def scatter(
    points: Sequence[Point],
    *,
    label: str,
    x_title: str,
    x_log: bool = False,
    x_whole: bool = False,
    x_ticks: Sequence[float] | None = None,
    trend: tuple[Sequence[float], Sequence[float]] | None = None,
    y_format: Format = short,
) -> Markup:
    """Points, the best one ringed, and a line (x, y) through them. x_log: x > 0."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    bounds = (min(xs) / 1.15, max(xs) * 1.15) if x_log else padded(xs, 0.04)
    plot = Plot(
        bounds,
        padded(ys),
        label=label,
        x_title=x_title,
        x_log=x_log,
        x_whole=x_whole,
        x_ticks=x_ticks,
        y_format=y_format,
    )
    if trend is not None and len(trend[0]) > 1:
        plot.line(*trend, "line trend")
    for x, y, title, best in points:
        _point(plot, x, y, title, best)
    return plot.svg()


def categories(
    groups: Sequence[tuple[str, Sequence[tuple[float, str, bool]]]], *, label: str, x_title: str
) -> Markup:
    """A row of points per category, its mean a bar. groups: name, then (value, text, best) each."""
    every = [value for _, points in groups for value, _, _ in points]
    longest = max(len(name) for name, _ in groups)
    left = min(150, max(LEFT, 14 + round(6.3 * longest)))
    row = 26
    height = TOP + BOTTOM + row * len(groups)
    plot = Plot(padded(every), (0, 1), label=label, x_title=x_title, left=left, height=height)
    plot.marks = [mark for mark in plot.marks if "rule" not in mark and 'anchor="end"' not in mark]
    for place, (name, points) in enumerate(groups):
        middle = TOP + row * (place + 0.5)
        plot.marks.append(f'<path class="rule" d="M{left} {middle:.1f}H{WIDTH - RIGHT}"/>')
        plot.text(left - 8, middle + 3.5, name, "end")
        for number, (value, title, best) in enumerate(points):
            shift = 3.5 * (number % 3 - 1) if len(points) > 1 else 0.0  # so that few hide another
            y = (height - BOTTOM - middle - shift) / (height - BOTTOM - TOP)
            _point(plot, value, y, title, best)
        mean = plot.px(sum(point[0] for point in points) / len(points))
        plot.marks.append(f'<path class="mean" d="M{mean:.1f} {middle - 10:.1f}v20"/>')
    return plot.svg()


def heat_image(table: np.ndarray) -> str:
    """A big non-negative matrix as a small transparent PNG (data URI), row-normalized.

    table: [C, K]. Blocks of cells are summed where it is larger than SIDE. The ink is one color
    and its opacity the share, so that it reads on light and on dark ground.
    """
    from PIL import Image

    for axis in (0, 1):
        step = math.ceil(table.shape[axis] / SIDE)
        table = np.add.reduceat(table, np.arange(0, table.shape[axis], step), axis=axis)
    rows = table / np.maximum(1, table.sum(axis=1, keepdims=True))
    ink = np.zeros((*rows.shape, 4), dtype=np.uint8)
    ink[..., :3] = (45, 140, 190)
    ink[..., 3] = np.round(255 * np.sqrt(rows)).astype(np.uint8)  # the root shows small shares
    stream = io.BytesIO()
    Image.fromarray(ink, "RGBA").save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
