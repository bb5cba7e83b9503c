"""Charts and pictures as inline SVG, so that a report is one file that needs nothing else."""

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#64748b")
INK, FAINT, LINE = "#334155", "#94a3b8", "#e2e8f0"
WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 14, 34

Number = int | float


class Bar(NamedTuple):
    """One bar: a share, its interval, and where it belongs."""

    label: str
    value: float
    low: float
    high: float
    series: int = 0


def line_chart(
    series: Mapping[str, Sequence[tuple[int, float]]], marks: Mapping[str, int], y_label: str, x_label: str = "step"
) -> str:
    """Curves, mostly over training steps; `marks` are the steps at which something begins, named at the top."""
    points = [point for curve in series.values() for point in curve if math.isfinite(point[1])]
    if not points:
        return "<p>Nothing was recorded.</p>"
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = _ticks(min(0, lowest), max(0, highest))
    to_x, to_y = _scale(x_ticks, LEFT, WIDTH - RIGHT), _scale(y_ticks, HEIGHT - BOTTOM, TOP + 12)
    parts = [*_y_axis(y_ticks, to_y, y_label), *_x_axis(x_ticks, to_x, x_label)]
    for n, (name, step) in enumerate((name, step) for name, step in marks.items() if step >= x_ticks[0]):
        x = to_x(step)
        parts.append(tag("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, stroke=FAINT, stroke_dasharray="2 3"))
        parts.append(tag("text", name, x=x + 3, y=TOP + 6 + 10 * (n % 2), fill=FAINT))
    for n, curve in enumerate(series.values()):
        path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in curve if math.isfinite(y))
        parts.append(tag("polyline", points=path, fill="none", stroke=_colour(n), stroke_width=1.6))
    return _svg(parts) + legend(list(series))


def bar_chart(bars: Sequence[Bar], chance: float | None = None) -> str:
    """Shares between 0 and 1 as bars with their intervals, and perhaps a line at chance."""
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    to_y = _scale(ticks, HEIGHT - BOTTOM, TOP)
    parts = _y_axis(ticks, to_y, "accuracy")
    slot = (WIDTH - LEFT - RIGHT) / max(len(bars), 1)
    width = min(slot * 0.62, 46)
    for n, bar in enumerate(bars):
        x, y, base = LEFT + (n + 0.5) * slot, to_y(bar.value), to_y(0)
        middle = {"x": x, "text_anchor": "middle"}
        colour = _colour(bar.series)
        parts += [
            tag("rect", x=x - width / 2, y=y, width=width, height=base - y, rx=2, fill=colour, opacity=0.85),
            tag("line", x1=x, x2=x, y1=to_y(bar.low), y2=to_y(bar.high), stroke=INK),
            tag("text", f"{bar.value:.2f}", **middle, y=base - 6, fill="white" if base - y > 20 else INK),
            tag("text", bar.label, **middle, y=HEIGHT - BOTTOM + 15),
        ]
    if chance is not None:
        y, red = to_y(chance), COLOURS[4]
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, stroke=red, stroke_dasharray="4 3"))
        parts.append(tag("text", "chance", x=WIDTH - RIGHT, y=y - 4, text_anchor="end", fill=red))
    return _svg(parts)


def legend(names: Sequence[str]) -> str:
    """Names beside their colours."""
    items = (f'<span><i style="background:{_colour(n)}"></i>{html.escape(name)}</span>' for n, name in enumerate(names))
    return f'<div class="legend">{"".join(items)}</div>'


def picture(image: Image.Image, scale: int, cell: tuple[int, int, int] | None = None) -> str:
    """An image, enlarged; `cell` = (row, column, side in pixels) gets a frame."""
    parts = []
    if cell is not None:
        row, column, side = cell
        size = side * scale
        frame = {"fill": "none", "stroke": COLOURS[1], "stroke_width": 2.5, "rx": 3}
        parts.append(tag("rect", x=column * size, y=row * size, width=size, height=size, **frame))
    return _on(image, scale, parts)


def heat(image: Image.Image, weights_RC: np.ndarray, most: float, scale: int = 3) -> str:
    """An image under a grid of weights: the larger a weight, up to `most`, the more a cell is coloured."""
    rows, cols = weights_RC.shape
    width, height = image.size[0] * scale, image.size[1] * scale
    size = {"width": width / cols, "height": height / rows}
    parts = []
    for (r, c), weight in np.ndenumerate(weights_RC):
        opacity = round(0.85 * min(float(weight) / most, 1.0), 3)
        x, y = c * size["width"], r * size["height"]
        parts.append(tag("rect", x=x, y=y, **size, fill="#f97316", opacity=opacity))
    return _on(image, scale, parts)


def _on(image: Image.Image, scale: int, parts: Sequence[str]) -> str:
    """SVG elements on top of an enlarged image."""
    width, height = image.size[0] * scale, image.size[1] * scale
    picture = tag("image", href=data_uri(image), width=width, height=height)
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{picture}{"".join(parts)}</svg>'


def data_uri(image: Image.Image) -> str:
    """The image itself, as an address."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tag(name: str, text: str = "", **attributes: str | Number) -> str:
    """An SVG element; `_` in a name stands for `-`."""
    pairs = (f'{key.replace("_", "-")}="{_plain(value)}"' for key, value in attributes.items())
    return f"<{name} {' '.join(pairs)}>{html.escape(text)}</{name}>"


def _plain(value: str | Number) -> str:
    return value if isinstance(value, str) else f"{value:.3f}".rstrip("0").rstrip(".")


def _y_axis(ticks: Sequence[Number], to_y: Callable[[Number], float], label: str) -> list[str]:
    parts = []
    for tick in ticks:
        y = to_y(tick)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, stroke=LINE))
        parts.append(tag("text", f"{tick:g}", x=LEFT - 6, y=y + 3.5, text_anchor="end"))
    middle = (HEIGHT - BOTTOM + TOP) / 2
    turned = f"rotate(-90 11 {middle})"
    return [*parts, tag("text", label, x=11, y=middle, text_anchor="middle", fill=FAINT, transform=turned)]


def _x_axis(ticks: Sequence[Number], to_x: Callable[[Number], float], label: str) -> list[str]:
    parts = [tag("text", f"{t:g}", x=to_x(t), y=HEIGHT - BOTTOM + 15, text_anchor="middle") for t in ticks]
    return [*parts, tag("text", label, x=(LEFT + WIDTH) / 2, y=HEIGHT - 4, text_anchor="middle", fill=FAINT)]


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="chart">{"".join(parts)}</svg>'


def _ticks(low: Number, high: Number) -> list[Number]:
    """About five round numbers from at most `low` to at least `high`."""
    span = (high - low) or 1.0
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if span / (unit * m) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


def _scale(ticks: Sequence[Number], start: Number, end: Number) -> Callable[[Number], float]:
    low, high = ticks[0], ticks[-1]
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def _colour(n: int) -> str:
    return COLOURS[n % len(COLOURS)]
