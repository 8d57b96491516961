"""Threads that compute on a CPU: how many, and how they wait."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.commands import TINY, Background, good, saved

pytestmark = pytest.mark.usefixtures("workplace")


def test_threads_are_a_setting_that_is_recorded_and_checked() -> None:
    done = Background("train", *TINY, "-s", "threads=2", "--steps", "1", "--name", "run").end()
    assert done.code == 0, done.err
    run = Path("runs/run")
    assert json.loads((run / "env.json").read_text())["threads"] == 2
    assert saved(run, 1).meta.machine["threads"] == 2
    done = Background("resume", "run", "-s", "threads=1", "--steps", "2").end()
    assert any("threads: 2 then, 1 now" in line for line in done.warnings)


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "3"}])
def test_waiting_threads_spin_briefly_unless_the_user_says_how(own: dict[str, str], monkeypatch) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    good("presets")
    found = {name: os.environ[name] for name in names if name in os.environ}
    assert found == (own or {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"})
