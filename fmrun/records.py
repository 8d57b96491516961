"""The small JSON files of runs: what of them fmrun reads, and of what type. Other keys are left alone."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError, reading
from .report import warn_once

Step = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Best(Record):
    metric: str
    value: float
    step: Step


class Status(Record):
    """`status.json`."""

    state: str | None = None
    step: Step | None = None
    steps: Step | None = None
    saved: Step | None = None
    started: str | None = None
    updated: str | None = None
    exit_code: int | None = None
    message: str | None = None
    best: Best | None = None


class Code(Record):
    target: str
    sha256: str
    folder: str | None
    installed: str | None


class Env(Record):
    """`env.json`."""

    command: list[str] = []
    fmrun: str | None = None
    torch: str | None = None
    processor: str | None = None
    gpus: list[str] | None = None
    cores: int | None = None
    threads: int | None = None
    code: dict[str, Code] = {}
    job: str | None = None


class Evaluation(Record):
    step: Step
    weights: str = "ema"
    settings: dict[str, Any] = {}
    metrics: dict[str, float | None] = {}
    floor: dict[str, float | None] = {}
    bicubic: dict[str, float | None] = {}
    default: bool = False


class Evaluations(Record):
    """`evaluations.json`."""

    evaluations: list[Evaluation] = []


def read(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """What the file holds; empty where there is none. UserError if it is not what `model` says."""
    content = _load(path)
    try:
        model.model_validate(content)
    except ValidationError as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from None
    return content


def read_known(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """As `read`; what is wrong is as good as missing, and said."""
    try:
        content = _load(path)
        model.model_validate(content)
    except UserError as error:
        warn_once(f"{error}; it is ignored")
        return {}
    except ValidationError as error:
        wrong = {str(problem["loc"][0]) for problem in error.errors()}
        warn_once(f"cannot read all of {path}: {_reason(error)}; ignored: {', '.join(sorted(wrong))}")
        return {key: value for key, value in content.items() if key not in wrong}
    return content


def _load(path: Path) -> dict[str, Any]:
    with reading(path):
        if not path.exists():
            return {}
        if not path.is_file():
            raise UserError(f"cannot read {path}: it is not a regular file")
        text = path.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UserError(f"cannot read {path}: it is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it does not hold a JSON object")
    return content


def _reason(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    what = problem["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"{place}: {what}" if place else what
