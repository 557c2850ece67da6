"""Markdown tables that also read well on a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded cells: the first column left, the others right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [
            first.ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (widths[0] + 2),
        *("-" * (width + 1) + ":" for width in widths[1:]),
    ]
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, rows)])
