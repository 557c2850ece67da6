"""Plots as inline SVG: colours come from the page's style, so they follow light, dark and print.

Sizes are in SVG units; a chart is as wide as its place in the page allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from quantkit_eval.figures.divergence import Bin
from quantkit_eval.figures.layers import WeightCost
from quantkit_eval.figures.statistics import Interval

_WIDTH, _HEIGHT = 560, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 14, 44
_LETTER = 7.4
_HEAT_STEPS = 9


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model in the trade-off plot; `interval` is that of its KL divergence."""

    label: str
    bits: float
    kl: float
    interval: Interval
    outcome: str


def trade_off(points: Sequence[Point], floor: float | None) -> str:
    """Bits per weight against KL divergence (log scale), with the Pareto line and a noise floor."""
    drawn = [point for point in points if point.kl > 0]
    if not drawn:
        return ""
    values = [edge for p in drawn for edge in (p.kl, p.interval.low, p.interval.high)]
    values += [floor] if floor is not None and floor > 0 else []
    ys = [v for v in values if 0 < v < math.inf]
    low, high = math.floor(math.log10(min(ys)) * 2) / 2, math.ceil(math.log10(max(ys)) * 2) / 2
    high = max(high, low + 1)
    bits = [point.bits for point in drawn]
    left, right = min(bits) - 0.25, max(bits) + 0.25
    margin = max(0.12 * (right - left), 0.25)
    right += margin

    def x(value: float) -> float:
        return _LEFT + (value - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (math.log10(max(value, 10**low)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_log_axis(low, high, y), _axis_titles("bits per weight", "KL divergence, nats")]
    for tick in _ticks(left, right):
        parts.append(
            f'<text x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 17}" class="tick mid">{tick:g}</text>'
            f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_HEIGHT - _BOTTOM}" '
            f'y2="{_HEIGHT - _BOTTOM + 4}" class="axis"/>'
        )
    if floor is not None and floor > 0:
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(floor):.1f}" y2="{y(floor):.1f}" '
            f'class="floor"/><text x="{_LEFT + 4}" y="{y(floor) - 5:.1f}" class="tick">'
            "noise floor: the original in bfloat16</text>"
        )
    front = _pareto(drawn)
    if len(front) > 1:
        line = " ".join(f"{x(p.bits):.1f},{y(p.kl):.1f}" for p in front)
        parts.append(f'<polyline points="{line}" class="pareto"/>')
    for point in drawn:
        lower, upper = max(point.interval.low, 10**low), min(point.interval.high, 10**high)
        parts.append(
            f'<line x1="{x(point.bits):.1f}" x2="{x(point.bits):.1f}" y1="{y(lower):.1f}" '
            f'y2="{y(upper):.1f}" class="whisker {point.outcome}"/>'
            f'<circle cx="{x(point.bits):.1f}" cy="{y(point.kl):.1f}" r="5" '
            f'class="dot {point.outcome}"><title>{escape(point.label)}: {point.bits:.3f} bits, '
            f"KL {point.kl:.3g}</title></circle>"
        )
    parts += _labels([(x(p.bits), y(p.kl), p.label) for p in drawn])
    return _svg(_WIDTH, _HEIGHT, "Bits per weight against KL divergence", parts)


def histogram(bins: Sequence[Bin], floor: Sequence[Bin] | None, mean: float) -> str:
    """Shares of tokens by their KL divergence, the noise floor's as an outline."""
    kept = [
        k for k, b in enumerate(bins) if b.share > 0 or (floor is not None and floor[k].share > 0)
    ]
    if not kept:
        return ""
    first, last = kept[0], kept[-1]
    shown = list(bins[first : last + 1])
    outline = list(floor[first : last + 1]) if floor is not None else []
    most = max([b.share for b in shown] + [b.share for b in outline])
    width = (_WIDTH - _LEFT - _RIGHT) / len(shown)
    height = _HEIGHT - 90

    def y(share: float) -> float:
        return height - _BOTTOM - share / most * (height - _TOP - _BOTTOM)

    parts = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height - _BOTTOM}" '
        f'y2="{height - _BOTTOM}" class="axis"/>'
    ]
    for share in _ticks(0, most)[1:]:
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(share):.1f}" y2="{y(share):.1f}" '
            f'class="grid"/><text x="{_LEFT - 6}" y="{y(share) + 4:.1f}" class="tick end">'
            f"{100 * share:g} %</text>"
        )
    for index, found in enumerate(shown):
        left = _LEFT + index * width
        if found.share > 0:
            parts.append(
                f'<rect x="{left + 1:.1f}" y="{y(found.share):.1f}" width="{width - 2:.1f}" '
                f'height="{height - _BOTTOM - y(found.share):.1f}" class="bar"><title>KL '
                f"{found.low:.1e} to {found.high:.1e}: {100 * found.share:.2f} % of tokens"
                "</title></rect>"
            )
        if abs(math.log10(found.low) - round(math.log10(found.low))) < 1e-6:
            parts.append(
                f'<text x="{left:.1f}" y="{height - _BOTTOM + 17}" class="tick mid">'
                f"{_power(found.low)}</text>"
            )
    if outline:
        path = []
        for index, found in enumerate(outline):
            left = _LEFT + index * width
            path += [f"{left:.1f},{y(found.share):.1f}", f"{left + width:.1f},{y(found.share):.1f}"]
        parts.append(f'<polyline points="{" ".join(path)}" class="outline"/>')
    if shown[0].low < mean < shown[-1].high:
        place = (math.log10(mean) - math.log10(shown[0].low)) / (
            math.log10(shown[-1].high) - math.log10(shown[0].low)
        )
        at = _LEFT + place * (_WIDTH - _LEFT - _RIGHT)
        anchor, shift = ("end", -5) if place > 0.8 else ("start", 5)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}" '
            f'class="mark"/><text x="{at + shift:.1f}" y="{_TOP + 10}" class="tick" '
            f'text-anchor="{anchor}">mean {_short(mean)}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{height - 8}" class="title mid">'
        "KL divergence of a token, nats</text>"
    )
    return _svg(_WIDTH, height, "How many tokens have which KL divergence", parts)


def _short(value: float) -> str:
    return f"{value:.2g}".replace("e-0", "e-")


def heat_map(weights: Sequence[WeightCost]) -> str:
    """Relative output error of every weight: blocks from left to right, their weights downwards."""
    roles = list(dict.fromkeys(weight.role for weight in weights))
    blocks = sorted({weight.block for weight in weights})
    if not roles:
        return ""
    cells: dict[tuple[str, int], WeightCost] = {}
    for weight in weights:
        key = (weight.role, weight.block)
        # Experts share a cell: the worst one shows, a broken one before all.
        if key not in cells or _rank(weight) > _rank(cells[key]):
            cells[key] = weight
    levels = [math.log10(max(cell.error, 1e-8)) for cell in cells.values()]
    # From white to full colour over what there is, but over a factor of ten at least.
    low = math.floor(2 * min(levels)) / 2
    edges = (low, max(math.ceil(2 * max(levels)) / 2, low + 1))
    side = 40 if len(blocks) <= 12 else 22 if len(blocks) <= 40 else 14
    tall = 24
    left = 12 + _LETTER * max(len(role) for role in roles)
    width, height = left + side * len(blocks) + 8, 8 + tall * len(roles) + 58
    parts = []
    for row, role in enumerate(roles):
        parts.append(
            f'<text x="{left - 8:.0f}" y="{8 + row * tall + 16}" class="tick end">'
            f"{escape(role)}</text>"
        )
        for column, block in enumerate(blocks):
            cell = cells.get((role, block))
            if cell is not None:
                parts.append(_cell(cell, edges, left + column * side, 8 + row * tall, side, tall))
    step = max(1, -(-24 // side))
    for column, block in enumerate(blocks):
        if column % step == 0:
            parts.append(
                f'<text x="{left + (column + 0.5) * side:.0f}" y="{8 + tall * len(roles) + 15}" '
                f'class="tick mid">{block}</text>'
            )
    parts.append(_heat_legend(edges, left, height - 26))
    chart = _svg(width, height, "Relative output error of every weight", parts)
    return chart.replace("<svg ", f'<svg style="width:{width:.0f}px" ', 1)


def interval_strip(
    low: float, high: float, value: float, edges: tuple[float, float], limit: float | None
) -> str:
    """A small interval with its estimate on a scale from edges[0] to edges[1], zero marked."""
    width, height = 150, 22

    def x(number: float) -> float:
        share = (number - edges[0]) / max(edges[1] - edges[0], 1e-12)
        return 4 + min(max(share, 0.0), 1.0) * (width - 8)

    parts = [
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="2" y2="{height - 2}" class="axis"/>',
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="11" y2="11" class="whisker"/>',
        f'<circle cx="{x(value):.1f}" cy="11" r="4" class="dot"/>',
    ]
    if limit is not None:
        parts.insert(
            1, f'<line x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="2" y2="20" class="floor"/>'
        )
    chart = _svg(width, height, f"{value:.4g}, interval {low:.4g} to {high:.4g}", parts)
    return chart.replace("<svg ", '<svg style="width:150px;min-width:0" ', 1)


def _rank(weight: WeightCost) -> tuple[bool, float]:
    return weight.defect is not None, weight.error


def _strength(level: float, edges: tuple[float, float]) -> float:
    """How strong the colour of a logarithmic level is, 0.06 to 1."""
    return min(max((level - edges[0]) / (edges[1] - edges[0]), 0.06), 1.0)


def _cell(
    weight: WeightCost, edges: tuple[float, float], x: float, y: float, side: float, tall: float
) -> str:
    strength = _strength(math.log10(max(weight.error, 1e-8)), edges)
    title = f"{weight.name}: {weight.error:.2e}"
    mark = ""
    if weight.defect is not None:
        title += f" - {weight.defect}"
        mark = (
            f'<text x="{x + side / 2:.0f}" y="{y + 17:.0f}" class="alarm mid">!</text>'
            f'<rect x="{x + 1:.0f}" y="{y + 1:.0f}" width="{side - 2:.0f}" '
            f'height="{tall - 2:.0f}" class="alarm-box"/>'
        )
    return (
        f'<rect x="{x + 1:.0f}" y="{y + 1:.0f}" width="{side - 2:.0f}" height="{tall - 2:.0f}" '
        f'rx="3" class="heat" fill-opacity="{strength:.2f}"><title>{escape(title)}</title></rect>'
        f"{mark}"
    )


def _heat_legend(edges: tuple[float, float], x: float, y: float) -> str:
    parts = []
    for step in range(_HEAT_STEPS):
        level = edges[0] + step / (_HEAT_STEPS - 1) * (edges[1] - edges[0])
        parts.append(
            f'<rect x="{x + step * 14:.0f}" y="{y:.0f}" width="13" height="10" class="heat" '
            f'fill-opacity="{_strength(level, edges):.2f}"/>'
        )
    low, high = (f"{100 * 10**edge:.2g} %" for edge in edges)
    parts.append(f'<text x="{x:.0f}" y="{y + 23:.0f}" class="tick">{low}</text>')
    parts.append(f'<text x="{x + 126:.0f}" y="{y + 23:.0f}" class="tick end">{high}</text>')
    return "".join(parts)


def _labels(points: Iterable[tuple[float, float, str]]) -> list[str]:
    """Names beside their points, moved until they cover neither each other nor a point."""
    placed = list(points)
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y, _ in placed]
    parts = []
    for x, y, label in sorted(placed, key=lambda p: (p[1], p[0])):
        length = _LETTER * len(label)
        spots = [(x + 10, y + 4, "start"), (x - 10, y + 4, "end")]
        spots += [(x, y + shift, "middle") for shift in (-12, 20)]
        spots += [
            (x + dx, y + 4 + shift, "start" if dx > 0 else "end")
            for shift in (-14, 14, -28, 28, -42, 42, -56, 56)
            for dx in (10, -10)
        ]
        best = spots[0]
        for at_x, at_y, anchor in spots:
            start = {"start": at_x, "end": at_x - length, "middle": at_x - length / 2}[anchor]
            box = (start, at_y - 11, start + length, at_y + 3)
            inside = box[0] > _LEFT and box[2] < _WIDTH and box[1] > _TOP and box[3] < _HEIGHT - 40
            if inside and not any(_overlap(box, other) for other in taken):
                best = (at_x, at_y, anchor)
                taken.append(box)
                break
        parts.append(
            f'<text x="{best[0]:.1f}" y="{best[1]:.1f}" class="label" '
            f'text-anchor="{best[2]}">{escape(label)}</text>'
        )
    return parts


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both bits and divergence, by bits."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bits, p.kl)):
        if not front or point.kl < front[-1].kl:
            front.append(point)
    return front


def _log_axis(low: float, high: float, y: object) -> str:
    assert callable(y)
    parts = []
    for exponent in range(math.ceil(low - 1), math.floor(high) + 1):
        for digit in (1, 2, 5) if high - low < 2.5 else (1,):
            value = digit * 10.0**exponent
            if not 10**low <= value <= 10**high * 1.001:
                continue
            at = y(value)
            parts.append(
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
                f'class="grid"/><text x="{_LEFT - 6}" y="{at + 4:.1f}" class="tick end">'
                f"{_plain(value)}</text>"
            )
    return "".join(parts)


def _axis_titles(below: str, beside: str) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_HEIGHT - _BOTTOM}" '
        f'y2="{_HEIGHT - _BOTTOM}" class="axis"/>'
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 7}" class="title mid">'
        f"{below}</text>"
        f'<text transform="translate(13 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)" '
        f'class="title mid">{beside}</text>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, four to seven of them."""
    raw = max(high - low, 1e-12) / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _power(value: float) -> str:
    exponent = round(math.log10(value))
    return {0: "1", 1: "10", -1: "0.1", -2: "0.01"}.get(
        exponent, f'10<tspan dy="-5" font-size="9">{exponent}</tspan>'
    )


def _plain(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value < 1e-4 else f"{value:g}"


def _svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
