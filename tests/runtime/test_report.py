"""What a human reads: on a terminal, through a pipe, after the reader has gone."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import fmrun
from support.made_runs import made_run

from fmrun.runtime import report
from fmrun.runtime.errors import UserError
from fmrun.runtime.report import Reporter, TensorBoard, format_metrics, format_number, format_table

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")

LONG = "[bold]/a/very/long/path[/bold] " + "x" * 200 + " [end]"
TRAIN = f"""
import sys, time
from fmrun.runtime.report import Reporter, emit
reporter = Reporter()
reporter.note({LONG!r})
with reporter.progress(20, images_per_step=64) as progress:
    for step in range(1, 21):
        time.sleep(0.03)
        progress.advance(step, {{"loss/d": 0.69314718, "loss/g": 1.25, "fm/loss": 0.031, "fm/share": 0.1}})
        if step == 10:
            reporter.warn("careful [now]")
            emit("data")
reporter.error("the [end]")
"""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def on_terminal(code: str, width: int = 80, **variables: str) -> tuple[str, str]:
    """stdout through a pipe, and all that a terminal of this width receives on stderr."""
    import fcntl
    import struct
    import termios

    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    environment = clean | {"TERM": "xterm-256color"} | variables
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, env=environment
    )
    os.close(terminal)
    received = b""
    while True:
        try:
            chunk = os.read(controller, 65536)
        except OSError:
            break
        if not chunk:
            break
        received += chunk
    os.close(controller)
    out, _ = process.communicate()
    assert process.returncode == 0
    return out.decode(), received.decode()


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_terminal_shows_one_line_with_bar_speed_eta_and_losses() -> None:
    out, shown = on_terminal(TRAIN, width=120)
    assert out == "data\n"
    text = visible(shown)
    drawn = re.findall(r"━+ +(\d+)/20 .*? img/s  ETA \d:\d\d:\d\d  d 0\.6931  g 1\.25  fm 0\.031  share 0\.1", text)
    assert len(drawn) >= 2
    assert "20/20" in text
    assert LONG in text
    assert "warning: careful [now]" in text
    assert "error: the [end]" in text
    assert "\x1b[33m" in shown
    assert shown.count("\x1b[?25h") == shown.count("\x1b[?25l") == 1


CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
EVIL = "a\x1b[31m\nb\x9b2J\x07"
ESCAPED = r"a\x1b[31m\nb\x9b2J\x07"


def test_control_characters_do_not_act_on_a_terminal() -> None:
    code = TRAIN.replace("careful [now]", EVIL.encode("unicode_escape").decode())
    _, shown = on_terminal(code, width=120)
    assert f"warning: {ESCAPED}" in visible(shown)
    assert "\x1b[33mwarning: \x1b[0m" in shown
    assert "\x1b[31m" not in shown


@pytest.mark.usefixtures("workplace")
def test_control_characters_in_names_are_escaped_everywhere() -> None:
    run, other = (made_run(Path("runs"), name, kid={100: 1.0}) for name in ("run", "other"))
    run.write_status(state="failed", message=EVIL)
    run.env_file.write_text(json.dumps({"command": ["fmrun", EVIL]}))
    other.add_evaluation({"step": 100, "weights": "ema", "settings": {}, "metrics": {EVIL: 1.0}})
    evil = run.path.rename(Path("runs", EVIL))
    commands = {
        "list": ("runs",),
        "show": ("runs", EVIL),
        "compare": ("compare", EVIL, "other"),
        "metric": ("compare", EVIL, "other", "--metric", EVIL),
        "mistake": ("train", "--data", EVIL),
        "run": ("sample", f"{EVIL}2"),
        "checkpoints": ("sample", EVIL),
        "preset": ("presets", EVIL),
        "option": (f"--{EVIL}",),
        "picture": ("data-preview", "--data", "images.npz", "-s", "data.image_size=28", "--out", f"{EVIL}.png"),
    }
    for what, arguments in commands.items():
        done = fmrun(*arguments)
        assert not CONTROL.search(done.out + done.err), what
        assert "Traceback" not in done.err
        assert ESCAPED in (done.out + done.err).replace("\\x0a", "\\n"), what
        assert not done.errors or len(done.err.splitlines()) == 1 + len(done.warnings), what
    assert len(fmrun("runs").out.splitlines()) == 4
    assert json.loads(fmrun("runs", "--json", EVIL).out)["message"] == EVIL
    assert evil.exists()


@pytest.mark.parametrize("width", [30, 80])
def test_bar_stays_on_one_line_of_a_narrow_terminal(width: int) -> None:
    _, shown = on_terminal(TRAIN.replace(repr(LONG), "'short'"), width=width)
    lines = re.split(r"[\r\n]+", visible(shown))
    assert any("20/20" in line for line in lines)
    assert max(map(len, lines)) <= width
    assert "\x1b[1A" not in shown


def test_no_color_on_a_terminal() -> None:
    _, shown = on_terminal(TRAIN, NO_COLOR="1")
    codes = {int(c) for group in re.findall(r"\x1b\[([0-9;]*)m", shown) for c in group.split(";") if c}
    assert not codes & {*range(30, 50), *range(90, 108)}
    assert "20/20" in shown


def test_dumb_terminal_gets_plain_lines() -> None:
    _, shown = on_terminal(TRAIN, TERM="dumb")
    assert "\x1b" not in shown
    assert "step 1/20" in shown
    assert "step 20/20" in shown


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"COLUMNS": "20"}, {"FORCE_COLOR": "1"}])
def test_pipe_gets_whole_plain_lines(variables: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, env=os.environ | variables)
    assert done.stdout == "data\n"
    assert "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == LONG
    assert lines[1] == "step 1/20  d 0.6931  g 1.25  fm 0.031  share 0.1"
    assert lines[2] == "warning: careful [now]"
    assert re.fullmatch(r"step 20/20  \d+ img/s  d 0\.6931  g 1\.25  fm 0\.031  share 0\.1", lines[3])
    assert lines[4:] == ["error: the [end]"]


def test_plain_lines_come_first_every_five_seconds_and_last() -> None:
    clock, stream = Clock(), io.StringIO()
    with Reporter(stream=stream, clock=clock).progress(100) as progress:
        for step in range(1, 101):
            clock.now += 0.3
            progress.advance(step)
    shown = [int(n) for n in re.findall(r"step (\d+)/", stream.getvalue())]
    assert shown == [1, 18, 35, 52, 69, 86, 100]


def test_speed_and_eta_leave_out_the_start() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = report.Progress(Reporter(stream=stream, clock=clock), 1000, 400, 10)
    assert progress.line() == "400/1000"
    clock.now += 300
    progress.advance(401)
    assert progress.line() == "401/1000"
    for step in range(402, 500):
        clock.now += 0.5
        progress.advance(step)
    assert progress.line() == "499/1000  20 img/s  ETA 0:04:10"


def test_last_line_comes_also_when_training_breaks() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream, clock=Clock())

    def train() -> None:
        with reporter.progress(9) as progress:
            progress.advance(1)
            progress.advance(2, {"loss/d": math.nan})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train()
    assert stream.getvalue().splitlines() == ["step 1/9", "step 2/9  d nan"]


def test_other_ranks_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet_rank=True)
    reporter.note("a")
    reporter.warn("b")
    reporter.error("c")
    with reporter.progress(2) as progress:
        progress.advance(2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_reader_that_leaves_is_no_error(stream: str) -> None:
    say = {"stdout": "emit('x' * 100)", "stderr": "Reporter().note('x' * 100)"}[stream]
    code = f"from fmrun.runtime.report import *\nfor _ in range(5000): {say}\nprint('end', file=open({{0!r}}, 'w'))"
    other = "stderr" if stream == "stdout" else "stdout"
    read, write = os.pipe()
    pipes = {stream: write, other: subprocess.PIPE}
    end = Path(os.devnull)
    process = subprocess.Popen([sys.executable, "-c", code.format(str(end))], **pipes)  # type: ignore[call-overload]
    os.close(write)
    os.read(read, 10)
    os.close(read)
    out, err = process.communicate()
    assert process.returncode == 0
    assert not out
    assert not err


def test_data_that_cannot_be_written_is_an_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from fmrun.runtime.report import *; emit('x')"], stdout=full, stderr=-1
        )
    assert done.returncode


def test_names_that_are_not_text_are_still_written() -> None:
    code = "from fmrun.runtime.report import *; emit('a\\udcff ü'); Reporter().note('b\\udcff ü')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0
    assert done.stdout == b"a\\udcff \\xfc\n"
    assert done.stderr == b"b\\udcff \\xfc\n"


def test_emit_json_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    report.emit_json({"a": [1.5, math.nan, (math.inf,)], "b": {"c": None, "d": "x"}})
    assert json.loads(capsys.readouterr().out) == {"a": [1.5, None, [None]], "b": {"c": None, "d": "x"}}


def test_numbers_are_short() -> None:
    numbers = [0.69314718, 12, 123456, 1.2e-5, 12345.6, 3.0, 1e9, math.nan, -1234.5]
    assert [format_number(x) for x in numbers] == [
        "0.6931", "12", "123456", "1.2e-05", "12346", "3", "1e+09", "nan", "-1234",
    ]  # fmt: skip
    assert format_metrics({"step": 3, "loss/g": None, "loss/d": 1, "time/x": 2}) == "d 1  g nan"


def test_table_is_aligned_and_never_cut() -> None:
    text = format_table(["name", "n", "x"], [["[red]", 1, 0.123456], ["画像" + "y" * 99, 1000, None]])
    from rich.cells import cell_len

    lines = text.splitlines()
    assert lines[2].startswith("[red] ")
    assert lines[2].endswith("     1  0.1235")
    assert len({cell_len(line) for line in lines}) == 1
    assert format_table(["a"], []) == "a\n-"


def test_tensorboard_after_a_cut_has_no_step_twice(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "tensorboard"
    board = TensorBoard(folder)
    assert not folder.exists()
    for step in (10, 20, 30):
        board.row({"step": step, "loss/d": step / 10, "fm/share": None})
    (killed,) = folder.iterdir()
    with open(killed, "ab") as file:
        file.write(b"\x18\0\0\0torn")
    killed.rename(folder / "events.out.tfevents.1.a.1.0")  # of an earlier second
    resumed = TensorBoard(folder, after=20)
    for step in (25, 30, 40):
        resumed.row({"step": step, "loss/d": step})
    resumed.close()
    board.close()

    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/d")] == [
        (10, 1),
        (20, 2),
        (25, 25),
        (30, 30),
        (40, 40),
    ]
    assert events.Tags()["scalars"] == ["loss/d"]


def test_tensorboard_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'pip install "fmrun\[tensorboard\]"'):
        TensorBoard(tmp_path)
