"""`fmrun` and `python -m fmrun`: runs the command line and turns whatever happens into an exit code."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    sys.path.pop(0)  # the current folder, which `python -m` puts there

import signal
from contextlib import suppress

SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long the threads of an OpenMP runtime (GNU's, LLVM's and Intel's) spin while they wait: by default so long that busy
neighbours on the same cores hold them up (docs/performance.md)."""


def main() -> None:
    _replace_closed_streams()
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", *SPIN)):
        os.environ.update(SPIN)  # read when torch is imported
    with suppress(OSError):  # an empty entry of PYTHONPATH: nothing in the current folder is imported by its mere name
        sys.path[:] = [entry for entry in sys.path if entry not in ("", os.getcwd())]
    from .cli import app
    from .runtime.errors import INTERNAL, FmrunError

    code = 0
    try:
        result = app(prog_name="fmrun", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except FmrunError as error:
        _tell(str(error), error.everywhere)
        code = error.exit_code
    except KeyboardInterrupt:
        _tell("interrupted")
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + getattr(signal, "SIGPIPE", 13)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command line's parser
            code = _usage(error)
        elif type(error).__name__ == "Abort":
            _tell("interrupted")
            code = 128 + signal.SIGINT
        elif isinstance(error, OSError) and error.strerror:
            where = f" ({error.filename})" if error.filename else ""
            _tell(f"{error.strerror}{where}", everywhere=False)
            code = INTERNAL
        elif "RANK" in os.environ and _lost_another(error):
            _tell("another process has ended; what it said itself, and status.json, tell why")
            code = INTERNAL
        else:
            import traceback

            traceback.print_exc()
            _tell("internal error: this is a bug in fmrun; please report it with the lines above", everywhere=False)
            code = INTERNAL
    _leave(code)


def _replace_closed_streams() -> None:
    """What is said goes nowhere where the shell has closed a standard stream; the next file opened would take its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


def _usage(error: Exception) -> int:
    """Say in one line what Typer finds wrong with the command line, and which help to look at."""
    message = error.format_message()  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message)
        return 0
    said = " ".join(message.split()).rstrip(".").replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    _tell(f"{said}; {context.command_path if context else 'fmrun'} --help shows what there is", everywhere=None)
    return 2


def _lost_another(error: Exception) -> bool:
    """Whether torch.distributed found another process gone."""
    words = ("DistBackendError", "DistNetworkError", "gloo", "Connection")
    return isinstance(error, RuntimeError) and any(word in f"{type(error).__name__} {error}" for word in words)


def _tell(message: str, everywhere: bool | None = True) -> None:
    """Say it once, not once a process. `everywhere` as in `FmrunError`: what is wrong before the processes meet is wrong for
    all that torchrun starts on a machine, and else known to this one alone."""
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    if everywhere is None and "TORCHELASTIC_RUN_ID" in os.environ:
        quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    else:
        quiet = rank != "0" and bool(everywhere)
    if not quiet:
        from .runtime.report import Reporter

        Reporter().error(message if rank == "0" else f"process {rank}: {message}")


def _leave(code: int) -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass
    sys.exit(code)


if __name__ == "__main__":
    main()
