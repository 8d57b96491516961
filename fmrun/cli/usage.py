"""What is wrong with a command line, in fmrun's words instead of its parser's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import nearest

QUOTED = re.compile(r"'([^']*)'")
COMMAND = re.compile(r"No such command (['\"])(.*?)\1\.?(?: Did you mean (.*)\?)?")
"""The parser puts a name with an apostrophe in double quotes."""


def sentence(error: Any, arguments: Sequence[str]) -> str:
    """One sentence on a usage error of the parser's, and which help to look at; `arguments` are those typed."""
    message = " ".join(error.format_message().split()).rstrip(".")
    kind = type(error).__name__
    if kind == "BadParameter":
        said = _value(error, message)
    elif kind == "NoSuchOption":
        said = f"there is no option {error.option_name}{_meant(error.possibilities or [])}"
    elif kind == "BadOptionUsage":
        said = f"{error.option_name} takes no value" if "not take" in message else f"{error.option_name} needs a value"
    elif command := COMMAND.fullmatch(message):
        said = f"there is no command '{command[2]}'{_meant(QUOTED.findall(command[3] or ''))}"
    elif extra := re.fullmatch(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message):
        said = f"there is no place for '{extra[1]}': options begin with --"
    else:
        said = message
    path = error.ctx.command_path if getattr(error, "ctx", None) is not None else _command(arguments)
    help_ = f"{path} --help shows what there is"
    return f"{said} ({help_})" if said.endswith("?") else f"{said}; {help_}"


def _value(error: Any, message: str) -> str:
    """What a value is, and what it must be."""
    flag = max(getattr(error.param, "opts", None) or [str(error.param_hint)], key=len)
    found = error.__cause__.errors()[0] if hasattr(error.__cause__, "errors") else None
    if found is None:
        return message
    value, limits = found["input"], found.get("ctx", {})
    if choices := re.search(r"is not one of (.+)", found["msg"]):
        allowed = QUOTED.findall(choices[1])
        return f"{flag} is '{value}'; allowed: {', '.join(allowed)}{nearest(str(value), allowed)}"
    if found["type"].startswith("int"):
        return f"{flag} is '{value}'; it must be a whole number"
    if "ge" in limits:
        return f"{flag} is {value}; it must be {limits['ge']} or greater"
    if "le" in limits:
        return f"{flag} is {value}; it must be {limits['le']} or less"
    return f"{flag} is '{value}'; {found['msg']}"


def _meant(possible: Sequence[str]) -> str:
    return f"; did you mean '{possible[0]}'?" if possible else ""


def _command(arguments: Sequence[str]) -> str:
    """The command typed, where the parser does not say."""
    return f"fmrun {arguments[0]}" if arguments and not arguments[0].startswith("-") else "fmrun"
