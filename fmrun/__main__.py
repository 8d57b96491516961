"""`fmrun` and `python -m fmrun`: runs the command line and turns whatever happens into an exit code."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    from .cli import app
    from .errors import BAD_INPUT, INTERNAL, FmrunError

    code = 0
    try:
        result = app(prog_name="fmrun", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except FmrunError as error:
        _tell(str(error))
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
            _tell(f"{error.strerror}{where}")
            code = INTERNAL
        else:
            import traceback

            traceback.print_exc()
            _tell("this is a bug in fmrun, not in what you did; please report it with the lines above")
            code = INTERNAL
    assert BAD_INPUT == 2
    _leave(code)


def _usage(error: Exception) -> int:
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":
        print(context.get_help() if context is not None else message)
        return 0
    path = context.command_path if context is not None else "fmrun"
    _tell(f"{message.rstrip('.')}; {path} --help shows what there is")
    return 2


def _tell(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        from .report import Reporter

        Reporter().error(message)


def _leave(code: int) -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass
    sys.exit(code)


if __name__ == "__main__":
    main()
