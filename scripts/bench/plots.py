"""Plots as small SVG files: a bar for each library, rows one below the other.

A bar ends at the median, a line spans the quartiles.  The scale is logarithmic, since the figures
of one row often lie orders of magnitude apart; what is zero has no bar.
"""

from __future__ import annotations

import math
from html import escape

from .figures import OURS, Row, Spread, Topic, number

WIDTH, LABEL, VALUE = 760, 170, 115
BAR, GAP, HEAD = 14, 4, 30
OWN, OTHER, INK, PAPER = "#1f6feb", "#b6bec8", "#1f2328", "#ffffff"


def plot(topic: Topic) -> str:
    """The rows of a topic that are to be drawn."""
    parts: list[str] = []
    top = 8.0
    for row in topic.rows:
        if row.name in topic.drawn and row.ours is not None:
            drawn, height = _panel(row, row.ours, top)
            parts += drawn
            top += height
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" '
        f'font-family="sans-serif" font-size="11" fill="{INK}" role="img">\n'
        f"<title>{escape(topic.title)}</title>\n"
        f'<rect width="100%" height="100%" fill="{PAPER}"/>\n{body}\n</svg>\n'
    )


def _panel(row: Row, ours: Spread, top: float) -> tuple[list[str], float]:
    """One row, best first, and its height."""
    bars = {OURS: ours, **row.peers}
    ordered = sorted(bars.items(), key=lambda item: item[1].median, reverse=row.more_is_better)
    scale = _Scale([end for spread in bars.values() for end in (spread.median, spread.high)])
    better = "more is better" if row.more_is_better else "less is better"
    unit = f"{row.unit}, " if row.unit else ""
    title = escape(f"{row.name} ({unit}{better})")
    parts = [f'<text x="8" y="{top + 16:.0f}" font-weight="bold">{title}</text>']
    y = top + HEAD - 6
    for label, spread in ordered:
        colour = OWN if label == OURS else OTHER
        middle = y + BAR / 2
        end = scale(spread.median)
        parts.append(
            f'<text x="{LABEL - 6}" y="{middle + 4:.1f}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{LABEL}" y="{y:.1f}" width="{end - LABEL:.1f}" height="{BAR}" '
            f'fill="{colour}"/>'
        )
        if spread.samples > 1:
            parts.append(
                f'<path d="M{scale(spread.low):.1f} {middle:.1f}H{scale(spread.high):.1f}" '
                f'stroke="{INK}"/>'
            )
        words = escape(f"{number(spread.median)} {row.unit}".strip())
        after = max(end, scale(spread.high)) + 5
        parts.append(f'<text x="{after:.1f}" y="{middle + 4:.1f}">{words}</text>')
        y += BAR + GAP
    return parts, y - top + 6


class _Scale:
    """From a figure to a place on the page."""

    def __init__(self, values: list[float]) -> None:
        positive = [value for value in values if value > 0] or [1.0]
        self._low = math.log10(min(positive)) - 0.3
        self._span = max(math.log10(max(positive)) - self._low, 0.3)

    def __call__(self, value: float) -> float:
        if value <= 0:
            return LABEL
        share = (math.log10(value) - self._low) / self._span
        return LABEL + max(0.0, share) * (WIDTH - LABEL - VALUE)
