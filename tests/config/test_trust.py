"""Code that a file names runs only where this user has allowed it."""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.commands import BARE as TINY
from support.commands import Done, fmrun, forget, good, same_runs, saved, steps, train
from support.sweeping import good_sweep
from support.two_ranks import two

from fmrun.compare.pictures import _last_sheet
from fmrun.config import trust
from fmrun.config.fields import FIELDS
from fmrun.config.trust import Target, locate
from fmrun.runs import checkpoint
from fmrun.runs.folder import Run
from fmrun.runtime.errors import UserError

RUNS = Path("runs")

NETS = """
from torch import nn

{more}

class Judge(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 1, 3, 1, 1))

    def forward(self, x):
        return self.net(x)
"""

JUDGE = ("-s", "discriminator.target=own_nets:Judge")


@pytest.fixture(autouse=True)
def home(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nobody has allowed anything yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workplace / "home"))
    monkeypatch.setattr(trust, "_ADMITTED", {})
    known, finders = set(sys.modules), list(sys.meta_path)
    yield workplace / "home" / "fmrun" / "trusted.json"
    sys.meta_path[:] = finders
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in ("own_nets", "own_parts", "package", "harmless", "lurking", "shelved"):
            del sys.modules[name]


def refused(done: Done) -> str:
    assert (done.code, done.out) == (2, ""), done.err
    (error,) = done.errors
    return error


# ---- every command × every place × every target


@dataclass(frozen=True)
class Evil:
    target: str
    params: dict[str, Any]
    words: str
    """What the sentence says that it is."""


TARGETS = {
    "system": Evil("os:system", {"command": "touch PWNED"}, "code of Python 3."),
    "subprocess": Evil("subprocess:check_output", {"args": ["touch", "PWNED"]}, "code of Python 3."),
    "exec": Evil("builtins:exec", {"source": "open('PWNED', 'w')"}, "code of Python 3."),
    "torch": Evil("torch.nn:Identity", {}, "code of torch 2."),
    "installed": Evil("harmless.nets:Net", {}, "code of harmless-nets 1.5"),
    "current folder": Evil("lurking:Net", {}, "lurking.py"),
    "package": Evil("package.inner.lurking:Net", {}, "lurking.py and 1 file that it imports"),
}
SIDE_EFFECT = "open('PWNED', 'w')\n"


@pytest.fixture
def targets(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that leave a file when they are imported: in the current folder, in a package there, and installed."""
    site = workplace / "site"
    for folder in (site / "harmless", site / "harmless_nets-1.5.dist-info", workplace / "package" / "inner"):
        folder.mkdir(parents=True)
    (site / "harmless_nets-1.5.dist-info" / "METADATA").write_text("Name: harmless-nets\nVersion: 1.5\n")
    (site / "harmless_nets-1.5.dist-info" / "top_level.txt").write_text("harmless\n")
    (site / "harmless_nets-1.5.dist-info" / "RECORD").write_text("harmless/__init__.py,,\nharmless/nets.py,,\n")
    text = f"{SIDE_EFFECT}from torch import nn\nclass Net(nn.Identity):\n    pass\n"
    for place in (site / "harmless/nets.py", Path("lurking.py"), Path("package/inner/lurking.py")):
        place.write_text(text)
    for place in (site / "harmless/__init__.py", Path("package/inner/__init__.py")):
        place.write_text(SIDE_EFFECT)  # `package` itself has none
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], checkpoint.Checkpoint, bytes]:
    """Config, checkpoint and rows of a small run."""
    folder = tmp_path_factory.mktemp("trained")
    here = os.getcwd()
    os.chdir(folder)
    try:
        from support.commands import write_images

        write_images(folder / "images.npz")
        train("--steps", "1", "--name", "run")
    finally:
        os.chdir(here)
    run = folder / RUNS / "run"
    return json.loads((run / "config.json").read_text()), saved(run, 1), (run / "metrics.jsonl").read_bytes()


@dataclass(frozen=True)
class Place:
    """Where a target can stand."""

    section: str

    def put(self, evil: Evil, config: dict[str, Any]) -> dict[str, Any]:
        return {**config, self.section: {**config[self.section], "target": evil.target, "params": evil.params}}


PLACES = {name: Place(name) for name in ("generator", "discriminator")}

COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "--config", "mine.json"),
    "train --dry-run": ("train", "--config", "mine.json", "--dry-run"),
    "probe-layers --config": ("probe-layers", "--config", "mine.json"),
    "data-preview": ("data-preview", "--config", "mine.json"),
    "sweep": ("sweep", "--config", "mine.json", "--over", "train.batch_size=8,10", "--seeds", "2"),
    "sweep --plan": ("sweep", "--config", "mine.json", "--over", "train.batch_size=8,10", "--plan"),
    "resume": ("resume", "sent"),
    "resume --steps": ("resume", "sent", "--steps", "3", "--data", "images.npz"),
    "probe-layers": ("probe-layers", "sent"),
    "sample": ("sample", "sent"),
    "sample FILE": ("sample", "runs/sent/checkpoints/step-00000001.safetensors"),
    "export": ("export", "sent"),
    "export FILE": ("export", "runs/sent/checkpoints/step-00000001.safetensors", "--out", "x.safetensors"),
    "eval": ("eval", "sent"),
    "eval FILE": ("eval", "runs/sent/checkpoints/step-00000001.safetensors"),
    "compare --html": ("compare", "sent", "other", "--html", "page.html"),
}


def plant(
    place: Place, evil: Evil, trained: tuple[dict[str, Any], checkpoint.Checkpoint, bytes], workplace: Path
) -> None:
    """A config file, and two runs with checkpoints, whose hashes are right and whose config names `evil`."""
    config, found, metrics = trained
    config = {**config, "data": {**config["data"], "path": str(workplace / "images.npz")}}
    config["train"] = {**config["train"], "steps": 2}
    sent = place.put(evil, config)
    Path("mine.json").write_text(json.dumps(sent))
    for seed, name in enumerate(("sent", "other")):
        run = RUNS / name
        checkpoint.save(run / "checkpoints", found.tensors, replace(found.meta, config={**sent, "seed": seed}))
        (run / "metrics.jsonl").write_bytes(metrics)
        (run / "config.json").write_text(json.dumps({**sent, "seed": seed}))


@pytest.mark.parametrize(
    ("command", "name", "section"),
    [
        (command, name, tuple(PLACES)[(i + j) % len(PLACES)])
        for i, command in enumerate(COMMANDS)
        for j, name in enumerate(TARGETS)
    ],
)
def test_what_nobody_has_allowed_is_not_imported(
    command: str, name: str, section: str, trained: Any, targets: None, workplace: Path, home: Path
) -> None:
    """Every command with every target; all places with every command and with every target."""
    evil = TARGETS[name]
    plant(PLACES[section], evil, trained, workplace)
    before = set(sys.modules)
    error = refused(fmrun(*COMMANDS[command]))
    assert not {m for m in set(sys.modules) - before if m.partition(".")[0] == evil.target.partition(".")[0]}
    assert not Path("PWNED").exists()
    assert not home.exists()
    file = COMMANDS[command][COMMANDS[command].index("--config") + 1] if "--config" in COMMANDS[command] else "runs/"
    assert error.startswith(f"error: {file}")
    assert f'{section}.target "{evil.target}"' in error
    assert json.dumps(evil.params) in error or not evil.params
    assert evil.words in error
    assert error.endswith("which you have not allowed; if you trust it, add --trust-code")


def test_data_of_a_file_alone_ask_nothing(trained: Any, targets: None, workplace: Path) -> None:
    """Tables of numbers, and lists, are for everyone."""
    plant(PLACES["generator"], TARGETS["system"], trained, workplace)
    for command in (("compare", "sent", "other"), ("runs",), ("runs", "sent")):
        good(*command)
    assert not Path("PWNED").exists()


def test_trust_code_runs_it_in_every_command_and_asks_no_more(workplace: Path, home: Path) -> None:
    Path("own_nets.py").write_text(NETS.format(more=""))
    config = {"discriminator": {"target": "own_nets:Judge"}}
    Path("mine.json").write_text(json.dumps(config))
    own = ("--config", "mine.json")
    refused(fmrun("train", *TINY, *own))
    good("train", *TINY, *own, "--steps", "1", "--name", "run", "--trust-code")
    assert stat.S_IMODE(home.stat().st_mode) == 0o600
    assert [entry["target"] for entry in json.loads(home.read_text())["trusted"].values()] == ["own_nets:Judge"]
    good("train", *TINY, *own, "--dry-run")
    good("probe-layers", "run")
    good("sample", "run", "--num", "2")
    good("export", "run")


@pytest.mark.parametrize(
    "command",
    [
        ("resume", "run", "--steps", "2"),
        ("probe-layers", "run"),
        ("sample", "run", "--num", "2"),
        ("sample", "runs/run/checkpoints/step-00000001.safetensors"),
        ("export", "run"),
        ("compare", "run", "other", "--html", "page.html"),
    ],
)
def test_a_file_under_another_home_asks_exactly_once(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_nets.py").write_text(NETS.format(more=""))
    train(*JUDGE, "--steps", "1", "--name", "run")
    train(*JUDGE, "--steps", "1", "--name", "other", "--seed", "1")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(Path("elsewhere").resolve()))
    refused(fmrun(*command))
    good(*command, "--trust-code")
    good(*command)


# ---- what is allowed


def test_typing_a_target_allows_it_with_these_params_alone(home: Path) -> None:
    Path("own_nets.py").write_text(NETS.format(more=""))
    train(*JUDGE, "--dry-run", "-s", "discriminator.params.width=3")
    for width, code in ((3, 0), (5, 2)):
        config = {"discriminator": {"target": "own_nets:Judge", "params": {"width": width}}}
        Path("mine.json").write_text(json.dumps(config))
        assert fmrun("train", *TINY, "--config", "mine.json", "--dry-run").code == code


def test_params_typed_on_top_of_a_file_do_not_allow_its_target() -> None:
    Path("own_nets.py").write_text(NETS.format(more=""))
    Path("mine.json").write_text(json.dumps({"discriminator": {"target": "own_nets:Judge"}}))
    typed = ("-s", "discriminator.params.width=3")
    assert "you have not allowed" in refused(fmrun("train", *TINY, "--config", "mine.json", *typed))


def test_params_that_a_file_gives_are_not_allowed_by_typing_the_target() -> None:
    Path("own_nets.py").write_text(NETS.format(more=""))
    Path("mine.json").write_text(json.dumps({"discriminator": {"params": {"width": 3}}}))
    typed = ("--config", "mine.json", *JUDGE)
    assert "you have not allowed" in refused(fmrun("train", *TINY, *typed))
    assert "you have not allowed" in refused(fmrun("train", *TINY, *typed, "-s", "discriminator.params.width=5"))
    train(*typed, "-s", "discriminator.params={width = 5}", "--dry-run")


def test_the_trust_message_lists_all_code_and_no_parameter_can_hide(
    trained: Any, targets: None, workplace: Path
) -> None:
    config = {
        "generator": {"target": "lurking:Net"},
        "discriminator": {"target": "os:system", "params": {"a": "x" * 9000, "command": "touch PWNED", "z": "\x1b[2K"}},
    }
    Path("mine.json").write_text(json.dumps(config))
    error = refused(fmrun("train", *TINY, "--config", "mine.json"))
    assert 'generator.target "lurking:Net" runs' in error
    assert '"command": "touch PWNED"' in error
    assert "\x1b" not in error
    assert len(error) < 1500
    assert error.endswith("if you trust all of it, add --trust-code")
    plant(PLACES["generator"], TARGETS["current folder"], trained, workplace)
    other = checkpoint.read(RUNS / "other/checkpoints/step-00000001.safetensors")
    named = PLACES["generator"].put(TARGETS["system"], other.meta.config)
    checkpoint.save(RUNS / "other/checkpoints", other.tensors, replace(other.meta, config=named))
    error = refused(fmrun("eval", "sent", "other"))
    assert "lurking:Net" in error
    assert "touch PWNED" in error


PARTS = "from torch import nn\nclass Act(nn.ReLU):\n    pass\n"


@pytest.mark.parametrize("changed", ["own_nets.py", "own_parts/act.py", "own_parts/__init__.py"])
def test_a_changed_byte_asks_again_also_of_what_is_imported(changed: str) -> None:
    more = "def late():\n    from own_parts.act import Act\n    return Act\nimport random\n"
    Path("own_nets.py").write_text(NETS.format(more=more).replace("nn.ReLU()", "late()()"))
    Path("own_parts").mkdir()
    Path("own_parts/__init__.py").write_text("")
    Path("own_parts/act.py").write_text(PARTS)
    Path("random.py").write_text("raise SystemExit('Python has a module of this name')")
    train(*JUDGE, "--steps", "1", "--name", "run")
    good("probe-layers", "run")
    with open(changed, "a") as file:
        file.write("#")
    error = refused(fmrun("resume", "run", "--steps", "2"))
    assert error.endswith("which has changed since you allowed it; if you trust it, add --trust-code")
    done = good("resume", "run", "--steps", "2", "--trust-code")
    assert any("the code of own_nets:Judge is not what run run was started with" in line for line in done.warnings)
    assert (RUNS / "run/code/discriminator" / changed).read_text() + "#" == Path(changed).read_text()
    good("resume", "run", "--steps", "3")


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[" * 100_000, b'{"trusted": []}', b'{"trusted": {"x": 3}}', b"\xff"]
)
def test_a_lost_or_damaged_list_asks_again(content: bytes | None, home: Path) -> None:
    Path("own_nets.py").write_text(NETS.format(more=""))
    Path("mine.json").write_text(json.dumps({"discriminator": {"target": "own_nets:Judge"}}))
    dry = ("train", *TINY, "--config", "mine.json", "--dry-run")
    good(*dry, "--trust-code")
    if content is None:
        home.unlink()
    else:
        home.write_bytes(content)
    refused(fmrun(*dry))
    good(*dry, "--trust-code")
    good(*dry)


def test_where_no_list_can_be_written_the_command_works_and_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own_nets.py").write_text(NETS.format(more=""))
    Path("a_file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(Path("a_file").resolve()))
    done = train(*JUDGE, "--steps", "1", "--name", "run")
    assert any("own_nets:Judge is allowed in this command alone, not remembered: " in line for line in done.warnings)
    refused(fmrun("resume", "run", "--steps", "2"))
    good("resume", "run", "--steps", "2", "--trust-code")


def test_two_commands_that_allow_at_once_both_are_remembered(home: Path) -> None:
    for i in range(20):
        Path(f"own_{i}.py").write_text("")
    codes = [locate(Target("generator", f"own_{i}:Net")) for i in range(20)]
    children = []
    for code in codes:
        if (pid := os.fork()) == 0:
            trust._remember(code)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 20
    assert set(json.loads(home.read_text())["trusted"]) == {code.digest for code in codes}


# ---- what is imported


def test_byte_code_that_lies_there_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached file may claim to belong to the source that was allowed."""
    monkeypatch.setattr(sys, "pycache_prefix", None)
    Path("own_nets.py").write_text(NETS.format(more=""))
    Path("evil.py").write_text(SIDE_EFFECT)
    cached = py_compile.compile(
        "evil.py",
        "__pycache__/own_nets." + sys.implementation.cache_tag + ".pyc",
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    assert cached is not None
    train(*JUDGE, "--dry-run")
    assert not Path("PWNED").exists()


@pytest.mark.parametrize("how", ["import_module", "star", "iter_modules"])
def test_of_a_package_every_file_is_hashed_however_it_is_imported(how: str) -> None:
    more = {
        "import_module": "import importlib\nimportlib.import_module(__package__ + '.la' + 'te')\n",
        "star": "from . import *\n",
        "iter_modules": "import pkgutil, importlib, own_parts\nfor m in pkgutil.iter_modules(own_parts.__path__):\n"
        "    m.name == 'late' and importlib.import_module('own_parts.' + m.name)\n",
    }
    Path("own_parts").mkdir()
    Path("own_parts/__init__.py").write_text("__all__ = ['late']\n")
    Path("own_parts/late.py").write_text("")
    Path("own_parts/judges.py").write_text(NETS.format(more=more[how]))
    judge = ("-s", "discriminator.target=own_parts.judges:Judge")
    train(*judge, "--steps", "1", "--name", "run")
    assert "own_parts.late" in sys.modules
    Path("own_parts/late.py").write_text(SIDE_EFFECT)
    assert "has changed since you allowed it" in refused(fmrun("probe-layers", "run"))
    Path("own_parts/late.py").write_text("")
    Path("own_parts/new.py").write_text(SIDE_EFFECT)
    assert "has changed since you allowed it" in refused(fmrun("probe-layers", "run"))
    assert not Path("PWNED").exists()


def test_of_a_folder_without_init_nothing_is_found_but_what_was_hashed() -> None:
    Path("own_parts").mkdir()
    Path("own_parts/late.py").write_text(SIDE_EFFECT)
    more = "import importlib\nimportlib.import_module('own_parts.la' + 'te')\n"
    Path("own_parts/judges.py").write_text(NETS.format(more=more))
    error = refused(fmrun("train", *TINY, "-s", "discriminator.target=own_parts.judges:Judge"))
    assert "No module named 'own_parts.late'" in error
    assert not Path("PWNED").exists()


def test_what_a_function_imports_later_is_the_file_that_was_hashed() -> None:
    """Also where an installed package has its name."""
    Path("own_nets.py").write_text(
        NETS.format(more="").replace(
            "return self.net(x)", "import submitit\n        assert submitit.MINE\n        return self.net(x)"
        )
    )
    Path("submitit.py").write_text("MINE = True\n")
    assert "submitit" not in sys.modules
    train(*JUDGE, "--steps", "1", "--name", "run")
    del sys.modules["submitit"]


def test_the_current_folder_gives_nothing_but_the_files_that_were_hashed() -> None:
    more = "import importlib\nhidden = importlib.import_module('lur' + 'king')\n"
    Path("own_nets.py").write_text(NETS.format(more=more))
    Path("lurking.py").write_text(SIDE_EFFECT)
    error = refused(fmrun("train", *TINY, *JUDGE))
    assert "fails: ModuleNotFoundError: No module named 'lurking'" in error
    assert error.endswith("only files that import statements name are found")
    assert os.getcwd() not in sys.path
    assert "" not in sys.path
    assert not Path("PWNED").exists()


def test_two_runs_with_files_of_one_name_have_each_its_own(workplace: Path) -> None:
    for name, width in (("one", 3), ("two", 5)):
        (workplace / name).mkdir()
        os.chdir(workplace / name)
        Path("own_nets.py").write_text(NETS.format(more="").replace("width=4", f"width={width}"))
        good("train", *TINY, *JUDGE, "--data", "../images.npz", "--steps", "1", "--name", name, "--runs-dir", "../runs")
    os.chdir(workplace)
    for name, width in (("one", 3), ("two", 5), ("one", 3)):
        layers = json.loads(good("probe-layers", name, "--json").out)["layers"]
        assert layers[0]["channels"] == width


def test_a_folder_that_bears_an_installed_packages_name_hides_nothing() -> None:
    Path("own_nets.py").write_text(NETS.format(more="import scipy.ndimage, shelved.inner"))
    Path("scipy").mkdir()
    Path("shelved").mkdir()
    Path("shelved/inner.py").write_text("")
    code = locate(Target("discriminator", "own_nets:Judge"))
    assert sorted(code.files) == ["own_nets", "shelved", "shelved.inner"]
    train(*JUDGE, "--dry-run")


def test_a_pipe_or_a_huge_file_is_not_read() -> None:
    os.mkfifo("own_nets.py")
    with pytest.raises(UserError, match="there is no module 'own_nets'"):
        locate(Target("discriminator", "own_nets:Judge"))
    with open("own_parts.py", "wb") as file:
        file.truncate(trust.MOST_SOURCE + 1)
    with pytest.raises(UserError, match=r"own_parts\.py is larger than 10 MB"):
        locate(Target("discriminator", "own_parts:Judge"))


def test_code_that_is_imported_without_being_admitted_is_refused() -> None:
    """A command that forgets to ask."""
    Path("own_nets.py").write_text(NETS.format(more=""))
    with pytest.raises(trust.Untrusted, match=r"\"own_nets:Judge\" runs .*own_nets\.py, which you have not allowed"):
        trust.admitted(Target("discriminator", "own_nets:Judge"))


def test_every_target_of_the_schema_is_looked_at() -> None:
    """A later place is one line in `trust.SECTIONS`."""
    assert tuple(key.removesuffix(".target") for key in FIELDS if key.endswith(".target")) == trust.SECTIONS


# ---- other files


def test_a_picture_of_a_run_is_a_png_or_nothing(trained: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others would start programs: PostScript is drawn by Ghostscript."""
    plant(PLACES["generator"], Evil("torch.nn:Identity", {}, ""), trained, workplace)
    Path("bin").mkdir()
    Path("bin/gs").write_text("#!/bin/sh\ntouch PWNED\nexit 1\n")
    Path("bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}{os.pathsep}{os.environ['PATH']}")
    for name in ("sent", "other"):
        for file in (RUNS / name / "checkpoints").iterdir():
            file.unlink()
        (RUNS / name / "samples").mkdir()
        (RUNS / name / "samples/step-00000001.png").write_text(
            "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\nshowpage\n"
        )
    done = good("compare", "sent", "other", "--html", "page.html")
    assert "no picture of sent: run sent has no checkpoint yet" in done.err
    _last_sheet(Run(RUNS / "sent"))  # as of super-resolution, whose sheets are shown as they lie there
    assert not Path("PWNED").exists()


# ---- memory


ALIASES = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
FILES = {
    "aliases.yaml": (ALIASES, "holds more than 10000 values"),
    "endless.yaml": ("a: &a [*a]\n", "is nested too deeply"),
    "deep.json": ("[" * 200_000, "is nested too deeply"),
    "deep.toml": (f"a = {'[' * 100_000}", "is nested too deeply"),
    "deep.yaml": ("[" * 3_000, "is nested too deeply"),
    "large.toml": (f"a = '{'x' * 1_000_000}'", "is larger than 1 MB"),
    "pipe.toml": (None, "is not a regular file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_takes_no_more_memory_than_a_config_needs(name: str) -> None:
    text, words = FILES[name]
    if text is None:
        os.mkfifo(name)
    else:
        Path(name).write_text(text)
    assert words in refused(fmrun("train", "--config", name))


# ---- own nets as before


def test_typed_nets_resume_unasked_after_a_kill_and_from_another_folder(workplace: Path) -> None:
    Path("own_nets.py").write_text(NETS.format(more="from own_parts import act\n"))
    Path("own_parts.py").write_text("act = 1\n")
    own = (*TINY, *JUDGE, "-s", "checkpoint.every=4", "-s", "log.every=2")
    good("train", *own, "--steps", "6", "--name", "whole")
    shutil.copytree(RUNS / "whole", RUNS / "killed")
    forget(RUNS / "killed", 4)
    good("train", *own, "--steps", "6", "--name", "seed", "--seed", "1")
    (workplace / "other folder").mkdir()
    os.chdir(workplace / "other folder")
    where = ("--runs-dir", str(workplace / RUNS))
    good("resume", "killed", *where)
    same_runs(workplace / RUNS / "whole", workplace / RUNS / "killed", 6)
    for command in (
        ("sample", "whole", "--num", "2"),
        ("export", "whole"),
        ("probe-layers", "whole"),
        ("compare", "whole", "seed", "--html", "page.html"),
    ):
        good(*command, *where)


def test_typed_nets_train_on_two_ranks() -> None:
    Path("own_nets.py").write_text(NETS.format(more=""))
    first, _ = two("train", *TINY, *JUDGE, "--steps", "2", "--name", "run")
    assert first.code == 0, first.err
    first, _ = two("resume", "run", "--steps", "3")
    assert first.code == 0, first.err
    assert steps(RUNS / "run")[-1] == 3


def test_a_sweep_of_typed_nets_trains_in_processes_that_read_the_list(home: Path) -> None:
    Path("own_nets.py").write_text(NETS.format(more=""))
    over = ("--over", "discriminator.params.width=3,4", "--seeds", "1", "--no-eval", "--name", "s")
    good_sweep(*TINY, *JUDGE, *over, "--steps", "1")
    assert len(json.loads(home.read_text())["trusted"]) == 2
    logs = RUNS / "s" / "logs"
    assert "--trust-code" not in "".join(log.read_text() for log in logs.iterdir())
    home.unlink()
    good_sweep(*TINY, *JUDGE, *over, "--steps", "2", "--trust-code")
    assert "--trust-code" in "".join(log.read_text() for log in logs.iterdir())


def test_a_file_in_the_current_folder_is_not_imported_by_its_name(workplace: Path) -> None:
    """`python -m fmrun` puts the current folder onto the path; what fmrun imports later must not come from there."""
    for name in ("queue", "yaml", "typer", "torch", "submitit"):
        Path(f"{name}.py").write_text(SIDE_EFFECT + "raise SystemExit('imported from the current folder')\n")
    done = subprocess.run(
        [sys.executable, "-m", "fmrun", "train", *TINY, "--steps", "1", "--name", "run"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not Path("PWNED").exists()
