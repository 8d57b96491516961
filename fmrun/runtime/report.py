"""What a human reads, on stderr or in TensorBoard; and the two ways data leaves, on stdout.

On a terminal rich draws the progress bar. Anywhere else every line is written whole, as it is: no colours, no
wrapping, nothing cut. Text is never read as markup.
"""

import errno
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from .errors import UserError

SHOWN = {"loss/d": "d", "loss/g": "g", "fm/loss": "fm", "fm/share": "share"}
"""Keys of metrics.jsonl that the progress display shows, and what it calls them."""

PLAIN_INTERVAL = 5.0
BAR_INTERVAL = 0.1


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def escape(text: str) -> str:
    """Control characters, which would act on a terminal, as Python writes them: `\\n`, `\\x1b`."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def emit(text: str) -> None:
    """Write lines to stdout, control characters escaped; a reader that has gone away (`| head`) is no error."""
    _emit("\n".join(map(escape, text.split("\n"))))


def _emit(text: str) -> None:
    stream = getattr(sys.stdout, "data", sys.stdout)
    if stream is None:
        return
    try:
        _write(stream, text)
    except BrokenPipeError:
        _discard(stream)


class _Prints:
    """In the place of stdout: what a user's own code prints goes to stderr, for stdout is for `data`."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def divert_prints() -> None:
    """From now on only `emit` writes to stdout."""
    if not isinstance(sys.stdout, _Prints):
        sys.stdout = _Prints(sys.stdout)  # type: ignore[assignment]


def emit_json(value: Any) -> None:
    """Write data to stdout as JSON; NaN and infinities become null."""
    _emit(to_json_text(value))


def to_json_text(value: Any) -> str:
    """Data as JSON; NaN and infinities become null."""
    return json.dumps(_finite(value), indent=2)


def format_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns, numbers to the right; as wide as it needs to be."""
    from rich.cells import cell_len

    cells = [list(map(escape, columns)), *([format_cell(value) for value in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    right = [bool(rows) and all(_is_number(row[i]) or row[i] is None for row in rows) for i in range(len(columns))]

    def line(row: list[str]) -> str:
        pads = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        padded = (p + c if r else c + p for c, p, r in zip(row, pads, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def format_number(value: float) -> str:
    """Four significant digits: `0.6931`, `1.2e-05`, `12346`."""
    if isinstance(value, int) or (math.isfinite(value) and 1000 <= abs(value) < 1e6):
        return f"{value:.0f}"
    return f"{value:.4g}"


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_metrics(row: Mapping[str, Any]) -> str:
    """The losses of a row of metrics on one line: `d 0.6931  g 1.2  fm 0.03  share 0.1`."""
    values = ((label, row[key]) for key, label in SHOWN.items() if key in row)
    return "  ".join(f"{label} {'nan' if value is None else format_number(float(value))}" for label, value in values)


class Reporter:
    """Tells a human what goes on. With `quiet_rank` (every process but the first) it says nothing."""

    def __init__(
        self,
        quiet_rank: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = None if quiet_rank else stream or sys.stderr
        self.clock = clock
        self.console = self._make_console()
        """Rich's console where there is a terminal to draw on, else None."""

    def note(self, text: str) -> None:
        self._say("", "", text)

    def warn(self, text: str) -> None:
        self._say("warning: ", "yellow", text)

    def error(self, text: str) -> None:
        self._say("error: ", "bold red", text)

    def counting(self, what: str, interval: float | None = None) -> Callable[[int, int], None]:
        """A callback for (done, in all) that says how far it is, every few seconds (or `interval`) of a long wait."""
        last = self.clock()

        def tell(done: int, total: int) -> None:
            nonlocal last
            if self.clock() - last >= (PLAIN_INTERVAL if interval is None else interval) and done < total:
                last = self.clock()
                self.note(f"{what}: {done} of {total}")

        return tell

    def progress(self, total: int, step: int = 0, images_per_step: int = 0) -> "closing[Progress]":
        """Follow a training from `step` to `total`: `advance` the progress it gives after each step."""
        return closing(Progress(self, total, step, images_per_step))

    def _make_console(self) -> Any:
        """A rich console on a terminal that can draw, else None."""
        if self._stream is None or not self._stream.isatty():
            return None
        from rich.console import Console

        console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        return None if console.is_dumb_terminal else console

    def _say(self, label: str, style: str, text: str) -> None:
        if self._stream is None:
            return
        text = escape(text)
        with self._surviving():
            if self.console is None:
                _write(self._stream, label + text)
            else:
                from rich.text import Text

                self.console.print(Text.assemble((label, style), text), soft_wrap=True)

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """A line that cannot be written is no reason to stop; after the reader has gone, nothing is tried."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO) and self._stream is not None:
                _discard(self._stream)
                self._stream = self.console = None


@cache
def warn_once(text: str) -> None:
    """A warning where no reporter is at hand; said once, however often it is met."""
    Reporter(quiet_rank=os.environ.get("RANK", "0") != "0").warn(text)


@cache
def note_once(text: str) -> None:
    """As `warn_once`, of what is no cause for concern."""
    Reporter(quiet_rank=os.environ.get("RANK", "0") != "0").note(text)


class Progress:
    """One line on a terminal, redrawn in place; elsewhere a line first, every few seconds and last."""

    def __init__(self, reporter: Reporter, total: int, step: int, images_per_step: int) -> None:
        self.reporter, self.total, self.step, self.images_per_step = reporter, total, step, images_per_step
        self._metrics: dict[str, Any] = {}
        self._began: tuple[float, int] | None = None
        """When the first step, which compiles and warms up, was done, and which it was."""
        self._shown_at = -math.inf
        self._shown_step: int | None = None
        self._bar = self._make_bar() if reporter.console is not None else None

    def advance(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """`step` steps are done; `metrics`, where there was a read-out, stay on display until the next."""
        now = self.reporter.clock()
        self.step = step
        self._metrics.update(metrics or {})
        self._began = self._began or (now, step)
        if now - self._shown_at >= (PLAIN_INTERVAL if self._bar is None else BAR_INTERVAL):
            self._show(now)

    def close(self) -> None:
        """Show where it ended."""
        if self._shown_step is not None and (self._bar is not None or self._shown_step != self.step):
            self._show(self.reporter.clock())
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()

    def line(self) -> str:
        """`120/3000  812 img/s  ETA 0:03:12  d 0.6931  g 1.2`"""
        parts = [f"{self.step}/{self.total}"]
        began, first = self._began or (0.0, self.step)
        if self.step > first and (elapsed := self.reporter.clock() - began) > 0:
            seconds = elapsed / (self.step - first)
            pace = f"{format_number(self.images_per_step / seconds)} img/s" if self.images_per_step else ""
            left = timedelta(seconds=round((self.total - self.step) * seconds))
            parts += [pace, f"ETA {left}" if self.step < self.total else ""]
        return "  ".join(filter(None, [*parts, format_metrics(self._metrics)]))

    def _show(self, now: float) -> None:
        self._shown_at, self._shown_step = now, self.step
        if self._bar is None:
            self.reporter.note(f"step {self.line()}")
            return
        with self.reporter._surviving():
            self._bar.update(self._bar.task_ids[0], completed=self.step, line=self.line())
            self._bar.refresh()

    def _make_bar(self) -> Any:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        # Refreshed by `advance`, not by a thread: data workers are forked while it is on display.
        bar = Bar(
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self.reporter.console,
            auto_refresh=False,
            redirect_stdout=False,
            expand=True,
        )
        bar.add_task("", total=self.total, completed=self.step, line=self.line())
        with suppress(OSError):
            bar.start()
        return bar


def require_tensorboard() -> None:
    """UserError unless the package that writes TensorBoard files is there."""
    if find_spec("tensorboard") is None:
        raise UserError('log.tensorboard needs an extra package: pip install "fmrun[tensorboard]"')


class TensorBoard:
    """Writes rows of metrics and images into `folder`, which it opens at the first write.

    `after` is the step a resumed run continues from: what was written past it is forgotten by readers.
    """

    def __init__(self, folder: Path, after: int | None = None) -> None:
        require_tensorboard()
        self.folder, self.after = folder, after
        self._writer: Any = None

    def row(self, row: Mapping[str, Any]) -> None:
        """Write every number of a row of metrics at its step, at once: a kill loses nothing."""
        writer = self._open()
        for key, value in row.items():
            if key != "step" and value is not None and not isinstance(value, str):
                writer.add_scalar(key, float(value), row["step"])
        writer.flush()

    def image(self, name: str, image: Any, step: int) -> None:
        """Write one image, (C, H, W), uint8 or floats in [0, 1]."""
        writer = self._open()
        writer.add_image(name, image, step)
        writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self.after is None else self.after + 1
            self._writer = SummaryWriter(str(self.folder), purge_step=purge)
        return self._writer


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text + "\n")
    except UnicodeEncodeError:  # a file name that is not text, a terminal that is not UTF-8
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def _discard(stream: TextIO) -> None:
    """Send what is still buffered nowhere, so that the interpreter does not stumble over it at exit."""
    with suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


def format_cell(value: Any) -> str:
    """A value as tables show it: `-` for None, four digits of a number; one line."""
    return "-" if value is None else format_number(value) if _is_number(value) else escape(str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value
