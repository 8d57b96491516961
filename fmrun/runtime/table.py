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

    def text(self, width: int = WIDTH) -> str:
        """Aligned, with rows and columns exchanged where it would be wider than `width` and so is less wide. Nothing is cut."""
        head, *rows = zip(self.header, *self.rows, strict=True)
        whole, turned = self._lines(), Table(head, rows, "l" + "r" * len(self.rows))._lines()
        if _width(whole) > max(width, _width(turned)):
            whole = turned
        return "\n".join([whole, *self.notes])

    def _lines(self) -> str:
        columns = [list(column) for column in zip(self.header, *self.rows, strict=True)]
        for column, side in zip(columns, self.align, strict=True):
            wide = max(map(cell_len, column))
            column[:] = [" " * (wide - cell_len(cell)) * (side == "r") + cell for cell in column]
        head, *rows = zip(*columns, strict=True)
        return format_table(head, rows)


def _width(text: str) -> int:
    return max(map(cell_len, text.splitlines()))
