"""The small JSON files of runs: what of them fmrun reads, and of what type. Other keys are left alone."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..runtime.errors import UserError, reading
from ..runtime.files import Json
from ..runtime.report import warn_once

Step = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


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
    best: Json | None = None


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
    settings: Json = {}
    metrics: dict[str, float | None] = {}
    floor: dict[str, float | None] = {}
    bicubic: dict[str, float | None] = {}
    default: bool = False


class Evaluations(Record):
    """`evaluations.json`."""

    evaluations: list[Evaluation] = []


def read_record(path: Path, model: type[BaseModel], lenient: bool = False) -> Json:
    """What the file holds; empty where there is none. UserError if it is not what `model` says; `lenient`: what is wrong is as
    good as missing, and said."""
    try:
        content = _load(path)
    except UserError as error:
        if not lenient:
            raise
        warn_once(f"{error}; it is ignored")
        return {}
    try:
        model.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        if not lenient:
            raise UserError(f"cannot read {path}: {reason}") from None
        wrong = {str(problem["loc"][0]) for problem in error.errors()}
        warn_once(f"cannot read all of {path}: {reason}; ignored: {', '.join(sorted(wrong))}")
        return {key: value for key, value in content.items() if key not in wrong}
    return content


def _load(path: Path) -> Json:
    with reading(path):
        if not path.exists():
            return {}
        if not path.is_file():
            raise UserError(f"cannot read {path}: it is not a regular file")
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"cannot read {path}: it is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: it does not hold a JSON object")
    return content
