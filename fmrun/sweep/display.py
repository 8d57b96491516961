"""What a human sees while a sweep runs: a table that is redrawn on a terminal, a line for each event elsewhere."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from ..report import Reporter, counted, escape, format_duration

INTERVAL = 0.5
"""Seconds between redraws."""


@dataclass(frozen=True)
class Line:
    """A run that is being worked on."""

    name: str
    what: str
    """`step 120/2500`, `evaluation`, `waiting`."""
    seconds: float


class Display:
    """Follows a sweep of `total` runs."""

    def __init__(self, report: Reporter, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.report, self.total = report, total
        self._clock = clock
        self._shown_at = -INTERVAL
        self._live: Any = None

    @contextmanager
    def on(self) -> Iterator["Display"]:
        """Draw until the end of the block."""
        if self.report.console is not None:
            from rich.live import Live

            self._live = Live(console=self.report.console, auto_refresh=False, transient=True)
            with suppress(OSError):
                self._live.start()
        try:
            yield self
        finally:
            if self._live is not None:
                with suppress(OSError):
                    self._live.stop()
                self._live = None

    def show(self, lines: Callable[[], Sequence[Line]], done: int, failed: int, left: float | None) -> None:
        """Redraw where there is something to draw on and it is time; only then `lines` is asked for."""
        now = self._clock()
        if self._live is None or now - self._shown_at < INTERVAL:
            return
        self._shown_at = now
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for column in ("run", "at", "time"):
            table.add_column(Text(column), no_wrap=True, overflow="ellipsis")
        for line in lines():
            table.add_row(Text(escape(line.name)), Text(escape(line.what)), Text(format_duration(line.seconds)))
        with suppress(OSError):
            self._live.update(Group(Text(self.summary(done, failed, left)), table), refresh=True)

    def summary(self, done: int, failed: int, left: float | None) -> str:
        """`12 of 60 runs done, 1 failed, ETA 3:12`"""
        parts = [f"{done} of {counted(self.total, 'run')} done"]
        if failed:
            parts.append(f"{failed} failed")
        if left is not None and done + failed < self.total:
            parts.append(f"ETA {format_duration(left)}")
        return ", ".join(parts)
