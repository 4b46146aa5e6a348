"""The parts of charts: text made safe for XML, axes with round ticks, the frame of a plot.

Colours and fonts come from the report's style sheet through classes (``c0`` to ``c5`` are the series' colours). So a
chart follows the reader's light or dark scheme, and a strict content security policy can refuse inline styles.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 280
COLORS = 6
_TOP, _BOTTOM, _LEFT, _RIGHT = 30, 44, 50, 16
_LETTER = 7.8  # an upper bound on the mean width of a letter at the charts' font size, in viewBox units

_PICTURES: dict[int, str] = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)}
_PICTURES |= {0x7F: "\u2421"} | dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd")
# Marks that turn the direction of the text after them, also of text that is not the model's.
_PICTURES |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


def clean(text: str) -> str:
    """Text made safe for XML and HTML.

    Markup and quotes are escaped. Control characters, which XML forbids and terminals obey, become visible symbols
    (U+2400 and up); tab and newline stay. Lone surrogates, which no file can hold, and marks that override the
    direction of text become U+FFFD.
    """
    return html.escape(text.replace("\r\n", "\n").translate(_PICTURES), quote=True)


def element(name: str, inner: str = "", /, **attributes: object) -> str:
    """``<name attributes>inner</name>``. ``inner`` is markup; attribute values are escaped.

    In attribute names a trailing underscore (``class_``) is dropped, others become hyphens. Floats keep two decimals.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{clean(_coordinate(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{pairs}>{inner}</{name}>"


def text(content: str, x: float, y: float, class_: str = "", anchor: str = "start") -> str:
    """A line of text with its baseline at (x, y)."""
    return element("text", clean(content), x=x, y=y, class_=class_, text_anchor=anchor)


def path(points: Iterable[tuple[float, float]], class_: str) -> str:
    """A line through the points, with a gap at points that are not finite."""
    steps, down = [], False
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            down = False
            continue
        steps.append(f"{'L' if down else 'M'}{x:.1f} {y:.1f}")
        down = True
    return element("path", d=" ".join(steps), class_=class_) if steps else ""


def shorten(name: str, letters: int) -> str:
    """The name; if it is longer than ``letters``, an ellipsis replaces its end."""
    return name if len(name) <= letters else name[: letters - 1].rstrip() + "\u2026"


def label_width(names: Iterable[str]) -> float:
    """The width that the longest of the names needs, in viewBox units."""
    return max((len(name) for name in names), default=0) * _LETTER


@dataclass(frozen=True)
class Axis:
    """A range and its ticks, all in data units."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where ``value`` lies between low (0) and high (1)."""
        return (value - self.low) / (self.high - self.low)

    def tick_label(self, tick: float) -> str:
        """The tick as text, with as many decimals as the step between ticks needs."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 1.0
        if max(abs(self.low), abs(self.high)) >= 1e5 or step < 1e-4:
            return f"{tick:.3g}"
        decimals = next((d for d in range(5) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 5)
        return f"{tick:,.{decimals}f}".replace("-", "\u2212")


def axis_for(values: Iterable[float], count: int = 5, *, tight: bool = False) -> Axis:
    """An axis around the finite values with about ``count`` round ticks (steps of 1, 2, 2.5 or 5 times a power of ten).

    Args:
        values: values in data units. NaN and infinities are left out; without any value the axis goes from 0 to 1.
        tight: whether the axis ends at the data instead of at the next tick.
    """
    finite = [float(v) for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-12):
        room = 0.5 * abs(low) or 0.5
        low, high = low - room, high + room
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if tight:
        ticks = [i * step for i in range(first, last + 1) if low - 1e-9 * step <= i * step <= high + 1e-9 * step]
        return Axis(low, high, tuple(ticks))
    return Axis(first * step, last * step, tuple(i * step for i in range(first, last + 1)))


@dataclass(frozen=True)
class Frame:
    """The plotting area: converts data units to viewBox units, and draws the axes."""

    x: Axis
    y: Axis
    right: float = _RIGHT  # room on the right, for labels at the ends of lines
    left: float = _LEFT

    def at(self, x: float, y: float) -> tuple[float, float]:
        """(x, y) in data units, as viewBox coordinates."""
        across = self.left + self.x.share(x) * (WIDTH - self.left - self.right)
        return across, HEIGHT - _BOTTOM - self.y.share(y) * (HEIGHT - _TOP - _BOTTOM)

    def axes(self, x_label: str, y_label: str) -> str:
        """Grid lines, tick labels, the x label below, and the y label above the axis, written horizontally."""
        parts = []
        left, bottom = self.at(self.x.low, self.y.low)
        right, _ = self.at(self.x.high, self.y.high)
        for tick in self.y.ticks:
            _, y = self.at(self.x.low, tick)
            parts.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
            parts.append(text(self.y.tick_label(tick), left - 8, y + 4, "tick", "end"))
        for tick in self.x.ticks:
            x, _ = self.at(tick, self.y.low)
            parts.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
            parts.append(text(self.x.tick_label(tick), x, bottom + 18, "tick", "middle"))
        parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        parts.append(text(x_label, (left + right) / 2, HEIGHT - 6, "label", "middle"))
        parts.append(text(y_label, 4, 14, "label"))
        return "".join(parts)


def picture(title: str, description: str, body: str, height: float = HEIGHT) -> str:
    """The whole ``<svg>``, with a title and a description for screen readers.

    Inside HTML no namespace is needed. So the page contains no ``http://``, and readers can see that it loads nothing.
    """
    words = element("title", clean(title)) + element("desc", clean(description))
    return f'<svg viewBox="0 0 {WIDTH} {_coordinate(height)}" role="img" class="chart">{words}{body}</svg>'


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in the same order, at least ``gap`` apart if there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap if placed else low))
    limit = high
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    result = [0.0] * len(wanted)
    for position, i in zip(placed, order, strict=True):
        result[i] = position
    return result


def _coordinate(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
