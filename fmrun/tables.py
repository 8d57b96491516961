"""Tables that a terminal shows whole: as they are, turned on their side, or in parts, whichever fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len

from .report import format_cell, format_table

WIDTH = 80
"""Columns of a terminal that a table is to fit into."""

Column = tuple[str, Sequence[Any]]
"""A head, and a cell for each row as `format_table` takes them."""


def fitted(keys: Sequence[Column], columns: Sequence[Column], width: int = WIDTH) -> str:
    """A table in as few parts as fit into `width`: in one, else in one with rows and columns exchanged, else in parts, an
    empty line between, each of which begins with `keys`, the columns that say what a row is.

    Exchanged, the cells of the first key are the heads. A part of one column is as wide as it has to be: nothing is cut.
    """
    parts = _parts(keys, columns, width)
    if len(parts) > 1:
        (corner, heads), rows = keys[0], [*keys[1:], *columns]
        cells = [[name, *map(format_cell, values)] for name, values in rows]
        turned = format_table([corner, *map(format_cell, heads)], cells)
        if cell_len(max(turned.splitlines(), key=cell_len)) <= width:
            return turned
    return "\n\n".join(
        format_table([name for name, _ in part], list(zip(*(values for _, values in part), strict=True)))
        for part in parts
    )


def _parts(keys: Sequence[Column], columns: Sequence[Column], width: int) -> list[list[Column]]:
    parts: list[list[Column]] = [[*keys]]
    first = sum(2 + _width(key) for key in keys)
    used = first
    for column in columns:
        if len(parts[-1]) > len(keys) and used + _width(column) > width:
            parts.append([*keys])
            used = first
        parts[-1].append(column)
        used += _width(column) + 2
    return parts


def _width(column: Column) -> int:
    head, cells = column
    return max(map(cell_len, (head, *map(format_cell, cells))))
