"""Small JSON files with wrong content: said, never a crash, and never in the way of other runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import NETS, fmrun, good, refused, rows, train
from support.made_runs import made_run

from fmrun.data import files
from fmrun.runs import checkpoint
from fmrun.runtime.errors import UserError, reading

pytestmark = pytest.mark.usefixtures("workplace")

RUNS = Path("runs")
DEEP = "[" * 100_000
BAD = {
    "not JSON": b"{",
    "not an object": b"[1]",
    "not text": b"\xff\xfe{",
    "nested": DEEP.encode(),
    "long number": b'{"step": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
@pytest.mark.parametrize("file", ["status.json", "env.json"])
def test_a_damaged_run_does_not_hide_the_others(file: str, content: bytes) -> None:
    for name in ("good", "bad"):
        made_run(RUNS, name)
    (RUNS / "bad" / file).write_bytes(content)
    done = good("runs", "--json")
    assert {run["name"] for run in json.loads(done.out)} == {"good", "bad"}
    (warning,) = done.warnings
    assert f"cannot read runs/bad/{file}: " in warning


def test_fields_of_a_wrong_type_are_missing_and_said() -> None:
    made_run(RUNS, "run", env={"command": ["fmrun", 3], "threads": 2})
    status = RUNS / "run" / "status.json"
    status.write_text(json.dumps({"state": "finished", "step": "many", "best": [], "started": 5, "mine": 1}))
    done = good("runs", "run", "--json")
    shown = json.loads(done.out)
    assert (shown["state"], shown["step"], shown["best"], shown["started"]) == ("finished", None, None, None)
    assert shown["command"] == ""
    assert done.warnings == [
        "warning: cannot read all of runs/run/status.json: step: Input should be a valid integer; ignored: best, started, step",
        "warning: cannot read all of runs/run/env.json: command.1: Input should be a valid string; ignored: command",
    ]


WRONG = (
    "[]",
    "{",
    '{"evaluations": 3}',
    '{"evaluations": [{"step": "x"}]}',
    '{"evaluations": [{"step": 1, "metrics": 1}]}',
)


@pytest.mark.parametrize("content", WRONG)
def test_evaluations_that_are_needed_are_not_ignored(content: str) -> None:
    for name in ("one", "two"):
        made_run(RUNS, name, kid={100: 1.0})
    (RUNS / "one" / "evaluations.json").write_text(content)
    refused(fmrun("compare", "one", "two"), ("cannot read runs/one/evaluations.json: ", "`fmrun eval one`"))
    assert "one" in good("runs").out


def test_noted_code_that_cannot_be_read() -> None:
    made_run(RUNS, "run", env={"code": {"generator": {"target": "own:Net"}}}, generator__target="own:Net")
    for command in ("resume", "probe-layers"):
        refused(fmrun(command, "run"), ("cannot read runs/run/env.json: code.generator.sha256: Field required",))


def test_a_status_is_needed_where_there_is_no_checkpoint() -> None:
    made_run(RUNS, "run")
    (RUNS / "run" / "status.json").write_text("{")
    before = rows(RUNS / "run")
    refused(fmrun("resume", "run"), ("cannot read runs/run/status.json: it is not valid JSON",))
    assert rows(RUNS / "run") == before


def test_rows_that_cannot_be_read_are_counted() -> None:
    train("--steps", "4", "--name", "run", "-s", "log.every=1")
    file = RUNS / "run" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1:3] = [b"\xff\xfe\n", b'{"loss": 1}\n', DEEP.encode() + b"\n"]
    file.write_bytes(b"".join(lines))
    said = "warning: runs/run/metrics.jsonl: 3 lines cannot be read and will be ignored"
    made_run(RUNS, "other")
    assert said in good("compare", "run", "other").warnings
    assert good("resume", "run", "--steps", "6").warnings.count(said) == 1
    file.write_bytes(file.read_bytes() + b'{"step": 7, "lo')  # a kill does that
    assert not [w for w in good("compare", "run", "other").warnings if "cannot be read" in w]


def test_an_empty_config_is_no_config_of_defaults() -> None:
    made_run(RUNS, "run").config_file.write_text("")
    refused(fmrun("resume", "run"), ("cannot read runs/run/config.json: it is empty",))


# ---- while a file is being read


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RecursionError(), "it is nested too deeply"),
        (MemoryError(), "it does not fit in memory"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "it is not UTF-8 text; save it as UTF-8"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_reading(error: Exception, reason: str) -> None:
    with pytest.raises(UserError) as caught, reading("a.toml"):
        raise error
    assert str(caught.value) == f"cannot read a.toml: {reason}"
    with pytest.raises(TypeError), reading("a.toml"):
        raise TypeError


def test_a_config_nested_too_deeply() -> None:
    for depth in (60, 900):
        Path("deep.json").write_text('{"generator": {"params": ' + '{"a": ' * depth + "1" + "}" * depth + "}}")
        refused(fmrun("train", "--config", "deep.json"), ("cannot read deep.json: it is nested too deeply",))


def test_a_checkpoint_nested_too_deeply() -> None:
    meta: dict[str, object] = {}
    for _ in range(400):
        meta = {"a": meta}
    images = checkpoint.ImagesIdentity({}, None)
    found = checkpoint.Meta(1, {"generator": {"params": meta}}, "", None, images, {}, {})
    weight = {f"{net}.weight": torch.zeros(1) for net in ("generator", "ema", "discriminator", "guard")}
    checkpoint.save(Path(), weight, found)
    refused(fmrun("sample", "step-00000001.safetensors"), ("is not as fmrun writes it",))


@pytest.mark.parametrize("arguments", [("sample",), ("resume",), ("runs",), ("train", "--config")])
def test_a_name_that_is_too_long(arguments: tuple[str, ...]) -> None:
    name = 300 * "x" + ".toml"
    refused(fmrun(*arguments, name), (f"cannot read {name}: File name too long",))


def test_files_that_do_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    train("--steps", "2", "--name", "run")
    file = next((RUNS / "run" / "checkpoints").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", full)
        refused(fmrun("train", *NETS, "--data", "images.npz"), ("cannot read images.npz: it does not fit in memory",))
        patch.setattr(checkpoint, "_digest", full)
        refused(fmrun("sample", "run"), (f"cannot read {file}: it does not fit in memory",))
    monkeypatch.setattr(files.Image.Image, "load", full)
    with pytest.raises(UserError, match="does not fit in memory"):
        files.decode(file.parent.parent / "samples" / "step-00000002.png")


def test_a_bug_is_still_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise TypeError("a mistake of ours")

    monkeypatch.setattr("fmrun.runs.folder.all_runs", wrong)
    done = fmrun("runs")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "TypeError: a mistake of ours" in done.err


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "pydantic"}
    code = (
        "import sys; from fmrun.__main__ import main; sys.argv = ['fmrun', '--help']\n"
        f"try: main()\nexcept SystemExit: sys.exit(not {heavy}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
