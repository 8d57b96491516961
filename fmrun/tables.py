"""One model of a table, and its text for a terminal; pages render the same cells by their template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len

from .report import format_table

WIDTH = 80
"""Columns of a terminal that a table is to fit into."""


@dataclass(frozen=True)
class Table:
    """Cells are text, formatted by who makes the table; `-` is nothing."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    """A letter per column: `l` or `r`."""
    notes: Sequence[str] = ()
    """Sentences below the table."""
    keys: int = 1
    """How many columns, the first ones, say what a row is."""

    def text(self, width: int = WIDTH) -> str:
        """Aligned: as it is if that fits into `width`, else with rows and columns exchanged if that does, else in parts, each
        with the key columns. Nothing is cut: a part of one column is as wide as it has to be."""
        head, *rows = zip(self.header, *self.rows, strict=True)
        turned = Table(head, rows, "l" + "r" * len(self.rows))
        parts = self._parts(width)
        if len(parts) > 1 and len(whole := turned._parts(width)) == 1:
            parts = whole
        return "\n".join(["\n\n".join(parts), *self.notes])

    def _parts(self, width: int) -> list[str]:
        columns = [list(column) for column in zip(self.header, *self.rows, strict=True)]
        widths = [max(map(cell_len, column)) for column in columns]
        for column, wide, side in zip(columns, widths, self.align, strict=True):
            column[:] = [" " * (wide - cell_len(cell)) * (side == "r") + cell for cell in column]
        keys: list[int] = [*range(self.keys)]
        parts: list[list[int]] = [[]]
        for place in range(self.keys, len(columns)):
            if parts[-1] and sum(widths[i] + 2 for i in (*keys, *parts[-1], place)) - 2 > width:
                parts.append([])
            parts[-1].append(place)
        chosen = ([columns[i] for i in (*keys, *part)] for part in parts)
        return [format_table([c[0] for c in part], list(zip(*(c[1:] for c in part), strict=True))) for part in chosen]
