"""The command line itself: what goes where, what is imported when, and every way to start."""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import (
    NETS,
    SMALL,
    TINY,
    Done,
    finish,
    fmrun,
    good,
    noise_images,
    rows,
    spawn,
    status,
    steps,
    train,
    write_folder,
    write_images,
)

from fmrun import __version__
from fmrun.config import presets

pytestmark = pytest.mark.usefixtures("workplace")

COMMANDS = (
    "train",
    "resume",
    "probe-layers",
    "sample",
    "eval",
    "compare",
    "sweep",
    "bench",
    "export",
    "presets",
    "runs",
)


# ---- help, and what it costs


def imported(commands: list[list[str]], modules: set[str]) -> Done:
    """The commands one after the other in a process, which says after each which of `modules` it has imported."""
    script = (
        "import sys; from fmrun.__main__ import main\n"
        f"for arguments in {commands!r}:\n"
        "  sys.argv = ['fmrun', *arguments]\n"
        "  try: main()\n  except SystemExit: pass\n"
        f"  print('loaded:', sorted({modules!r} & set(sys.modules)), file=sys.stderr)"
    )
    return finish(spawn(module=("-c", script)))


def test_quick_commands_import_nothing_heavy() -> None:
    heavy = {"torch", "torchvision", "numpy", "PIL", "safetensors", "fmrun.config.schema"}
    assert "loaded: []" in imported([["--help"]], heavy | {"pydantic"}).err
    # Typer may import Pydantic for the options of a command
    done = imported([["train", "--help"], ["presets"], ["runs"], ["--version"], ["trian"]], heavy)
    assert done.err.count("loaded: []") == 5, done.err


WRONG = [
    (["train", "--preset", "dcgna"], "did you mean 'dcgan'?"),
    (["train", "-s", "train.stpes=3"], "did you mean 'train.steps'?"),
    (["probe-layers", "--batch-size", "x"], "a whole number"),
    (["train", "--data", "imagse.npz"], "did you mean 'images.npz'?"),
    (
        ["data-preview", "--preset", "munet-x2", "-s", "data.lr_path=lost"],
        "data.lr_path: 'lost' does not exist",
    ),
    (["train", "--name", "a/b"], "--name 'a/b'"),
    (["train", "--runs-dir", "images.npz"], "is not a folder"),
    (["resume", "lost"], "no run 'lost'"),
    (["probe-layers", "lost"], "no run 'lost'"),
]


def test_what_is_wrong_is_said_before_torch_is_imported() -> None:
    done = imported([arguments for arguments, _ in WRONG], {"torch"})
    assert done.err.count("loaded: []") == len(WRONG), done.err
    for (_, said), line in zip(WRONG, done.errors, strict=True):
        assert said in line


def test_images_from_noise_need_no_upscalers() -> None:
    unneeded = {"spandrel", "torchvision", "scipy", "matplotlib", "onnx"}
    done = imported([["train", "--preset", "dcgan", *TINY, "--steps", "2"]], {"torch", *unneeded})
    assert "finished 2 steps" in done.err
    assert "loaded: ['torch']" in done.err, done.err


def test_help() -> None:
    alone, asked = good(), good("--help")
    assert alone.out == asked.out or alone.out.rstrip() == asked.out.rstrip()
    assert all(f"  {command} " in asked.out for command in COMMANDS)
    assert asked.err == ""
    text = good("train", "-h").out
    flags = ["--preset", "--config", "--lambda-feature", "--balance", "--layers", "--steps", "--batch-size", "--data"]
    for flag in [*flags, "--seed", "--device", "--name", "--set", "--runs-dir", "--dry-run"]:
        assert flag in text


def test_version() -> None:
    assert good("--version").out == f"fmrun {__version__}\n"


# ---- presets and runs


def test_presets() -> None:
    done = good("presets")
    assert done.err == ""
    listed = json.loads(good("presets", "--json").out)
    assert [entry["name"] for entry in listed] == presets.names()
    assert [entry["name"] for entry in listed if entry["default"]] == [presets.DEFAULT]
    for entry in listed:
        assert entry["name"] in done.out
        assert entry["description"] in done.out


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_shown_is_a_preset_that_can_be_typed(name: str) -> None:
    shown = good("presets", name).out.splitlines()
    config = json.loads(good("presets", name, "--json").out)
    again = presets.resolve(None, None, [presets.parse_set(line) for line in shown], need_data=False)
    assert again.model_dump(mode="json") == config


def test_runs() -> None:
    done = good("runs")
    assert (done.out, "no runs in runs yet" in done.err) == ("", True)
    assert json.loads(good("runs", "--json").out) == []
    train("--steps", "1", "--name", "first")
    train("--steps", "2", "--name", "second")
    table = good("runs").out.splitlines()
    assert table[0].split() == ["name", "state", "step", "steps", "started"]
    assert [line.split()[0] for line in table[2:]] == ["first", "second"]
    listed = json.loads(good("runs", "--json").out)
    assert [(r["name"], r["state"], r["step"], r["exit_code"]) for r in listed] == [
        ("first", "finished", 1, 0),
        ("second", "finished", 2, 0),
    ]
    one = json.loads(good("runs", "second", "--json").out)
    assert one["checkpoints"] == [2]
    assert one["command"].startswith("fmrun train ")
    assert "state: finished" in good("runs", "second").out
    assert json.loads(good("runs", "runs/first", "--json").out)["name"] == "first"
    assert json.loads(good("runs", "--runs-dir", "elsewhere", "--json").out) == []


def test_probe_layers() -> None:
    done = good("probe-layers", *TINY, "--json")
    result = json.loads(done.out)
    assert [layer["name"] for layer in result["layers"]] == [
        f"block{i}{tail}" for i in (1, 2, 3) for tail in (".conv", "")
    ]
    train("--steps", "2", "--name", "run")
    before = sorted(Path("runs").rglob("*"))
    of_run = json.loads(good("probe-layers", "run", "--json").out)
    assert of_run["step"] == 2
    table = good("probe-layers", "--no-data", *NETS)
    assert "block3" in table.out
    assert sorted(Path("runs").rglob("*")) == before


# ---- train


def test_without_arguments_it_trains_the_default_preset_on_bundled_images() -> None:
    done = good("train", "--steps", "2", *SMALL)
    assert [p.name for p in Path("runs").iterdir()] == ["dcgan-fm-001"]
    assert "10000 + 2000 held out images, 1 × 32 × 32, from bundled:fashion-mnist" in done.err
    assert "eval/d_valid" in rows(Path("runs/dcgan-fm-001"))[-1]


def test_dry_run_trains_nothing_and_prints_the_config() -> None:
    before = sorted(Path().rglob("*"))
    done = good("train", *TINY, "--steps", "7", "--lambda-feature", "0.25", "--dry-run")
    assert sorted(Path().rglob("*")) == before
    config = json.loads(done.out)
    assert (config["train"]["steps"], config["feature_matching"]["weight"]) == (7, 0.25)
    for said in ("data: 40 images", "generator ", "steps 0 to 7", "% of the adversarial one", "leave out --dry-run"):
        assert said in done.err
    assert "goes to: runs/dcgan-fm-001\n" in done.err
    (differing,) = (line for line in done.err.splitlines() if line.startswith("differs from preset dcgan-fm in: "))
    for setting in ("train.steps=7", "feature_matching.weight=0.25", "generator.width=4", "data.path=images.npz"):
        assert setting in differing
    assert "train.update" not in differing

    Path("again.json").write_text(done.out)
    again = good("train", "--config", "again.json", "--dry-run")
    assert json.loads(again.out) == config
    # the same experiment, whichever way it was said
    good("train", "--config", "again.json", "--name", "from-file")
    good("train", *TINY, "--steps", "7", "--lambda-feature", "0.25", "--name", "from-flags")
    ends = [
        Path("runs", name, "checkpoints", "step-00000007.safetensors").read_bytes()
        for name in ("from-file", "from-flags")
    ]
    assert ends[0] == ends[1]


def test_dry_run_names_the_preset_beneath_the_file_and_the_next_run() -> None:
    Path("mine.toml").write_text('extends = "dcgan-stacked"\nseed = 3\nlog.every = 25\n')
    (Path("runs") / "mine-007").mkdir(parents=True)
    done = good("train", "--config", "mine.toml", *NETS[:-2], "-s", "device=cpu", "--dry-run")
    assert "goes to: runs/mine-008\n" in done.err
    assert "differs from preset dcgan-stacked in: seed=3, device=cpu, generator.width=4" in done.err


def test_dry_run_finds_what_is_wrong() -> None:
    assert fmrun("train", *TINY, "--layers", "nowhere", "--dry-run").code == 2
    assert fmrun("train", *TINY, "--data", "nowhere", "--dry-run").code == 2
    train("--steps", "1", "--name", "there")
    for name in ("there", "a/b"):
        assert fmrun("train", *TINY, "--name", name, "--dry-run").code == 2


def test_flags_lie_over_the_file_and_the_file_over_the_preset() -> None:
    Path("c.toml").write_text('[train]\nsteps = 5\nbatch_size = 16\n[feature_matching]\nmatch = "moments"\n')
    done = good("train", "--preset", "dcgan-fm-mmd", "--config", "c.toml", "--batch-size", "4", *NETS, "--dry-run")
    config = json.loads(done.out)
    assert (config["train"]["steps"], config["train"]["batch_size"]) == (5, 4)
    assert (config["feature_matching"]["match"], config["feature_matching"]["weight"]) == ("moments", 1)


def test_names() -> None:
    train("--steps", "1")
    train("--steps", "1")
    train("--steps", "1", "--preset", "dcgan")
    Path("mine.toml").write_text("seed = 3")
    train("--steps", "1", "--config", "mine.toml")
    assert sorted(p.name for p in Path("runs").iterdir()) == ["dcgan-001", "dcgan-fm-001", "dcgan-fm-002", "mine-001"]


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_trains(name: str) -> None:
    upscaler = [*SMALL[4:], "-s", "generator.features=8", "-s", "generator.blocks=2", "-s", "data.patch_size=64"]
    flags = ["--preset", name, "--steps", "2", *(upscaler if "munet" in name else SMALL), "--name", "run"]
    if name.endswith("-64"):
        write_folder(Path("pictures"), count=6, size=70, channels=3)
        flags += ["--data", "pictures"]
    good("train", *flags)
    assert status(Path("runs/run"))["state"] == "finished"
    assert steps(Path("runs/run")) == [2]


def idx_file(path: Path) -> None:
    images = noise_images(12)
    path.write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes()))


def test_every_form_of_data_trains_alike() -> None:
    """The same images as a folder, an idx file and an array give the same weights."""
    write_folder(Path("folder"), count=12)
    idx_file(Path("train-images-idx3-ubyte.gz"))
    write_images(Path("array.npz"), count=12)
    ends = []
    for i, path in enumerate(("folder", "train-images-idx3-ubyte.gz", "array.npz")):
        good("train", *SMALL, "--data", path, "-s", "data.image_size=28", "--steps", "2", "--name", str(i))
        ends.append([{k: v for k, v in row.items() if "time" not in k} for row in rows(Path("runs", str(i)))])
    assert ends[0] == ends[1] == ends[2]


LOSSES = {
    "basic": """
losses:
  - type: featurematchingloss
    loss_weight: 0.2
    criterion: l1
    reduction: mean
    start_iter: 0
""",
    "selected-layers": """
losses:
  - type: FeatureMatchingLoss
    loss_weight: 0.05
    layers: [0, 2, 4, 5]
    criterion: charbonnier
    reduction: sum
    eps: 1e-6
    start_iter: 500
  - type: ganloss
    gan_type: vanilla
    loss_weight: 0.1
""",
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_list_of_losses_as_super_resolution_has_it(name: str) -> None:
    Path("c.yml").write_text(LOSSES[name])
    write_folder(Path("pictures"), count=6, size=64, channels=3)
    flags = (*SMALL, "--data", "pictures", "-s", "data.image_size=64", "--steps", "2", "--name", "run")
    good("train", "--config", "c.yml", *flags)
    config = json.loads(Path("runs/run/config.json").read_text())
    fm, gan = config["feature_matching"], config["losses"]["gan"]
    if name == "basic":
        assert (fm["weight"], fm["criterion"], fm["balance"], gan["weight"]) == (0.2, "l1", "none", 1.0)
        assert {"fm/block1", "fm/block4"} <= set(rows(Path("runs/run"))[-1])
    else:
        assert (fm["weight"], fm["layers"], fm["eps"], fm["start_step"]) == (0.05, [0, 2, 4, 5], 1e-6, 500)
        assert (fm["criterion"], fm["reduction"], gan["weight"]) == ("charbonnier", "sum", 0.1)


# ---- where things go


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **more}


def shell(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = command.replace("fmrun ", f"{sys.executable} -m fmrun ")
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(**env), timeout=120)


ANSI = re.compile(r"\x1b\[")


def test_a_pipe_gets_whole_lines_without_colours() -> None:
    """And two processes at once, `python -m fmrun` with it."""
    train("--steps", "1", "--name", "a" * 90)
    done = shell("fmrun runs | cat; fmrun presets | cat; fmrun resume lost | cat", COLUMNS="40", TERM="xterm-256color")
    assert not ANSI.search(done.stdout + done.stderr)
    assert [line for line in done.stdout.splitlines() if line.startswith("a" * 90 + "  finished")]
    for name in presets.names():
        assert presets.describe(name) in done.stdout
    assert done.stderr.splitlines() == [
        "error: there is no run 'lost' in runs; `fmrun runs` lists them",
    ]


def test_closed_streams_are_no_failure() -> None:
    flags = " ".join(map(str, TINY))
    assert shell(f"fmrun train {flags} --steps 1 --name run <&- >&- 2>&-").returncode == 0
    assert status(Path("runs/run"))["exit_code"] == 0


def test_a_reader_that_goes_away_is_no_error() -> None:
    """Output that nobody reads any more does not stop a training, and is no traceback."""
    flags = " ".join(TINY)
    done = shell(f"fmrun train {flags} --steps 30 --name run -s log.every=1 2>&1 | head -1; echo ${{PIPESTATUS[0]}}")
    assert done.stdout.splitlines() == ["run run in runs/run", "0"]
    assert done.stderr == ""
    assert status(Path("runs/run"))["state"] == "finished"
    done = shell("fmrun presets dcgan --json | true; echo ${PIPESTATUS[0]}")
    assert done.stdout.splitlines() == ["0"]
    assert done.stderr == ""


def on_terminal(*arguments: str, **env: str) -> str:
    """What a command shows on a terminal of 80 columns."""
    import pty

    parent, child = pty.openpty()
    process = spawn(*arguments, stdout=child, stderr=child, env={"TERM": "xterm-256color", **env})
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert finish(process).code == 2
    return shown.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals to make")
def test_colours_on_a_terminal_and_none_when_refused() -> None:
    coloured = on_terminal("resume", "lost")
    assert ANSI.search(coloured)
    plain = on_terminal("resume", "lost", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3\dm", plain)
    assert "error: there is no run 'lost'" in re.sub(r"\x1b\[[0-9;]*m", "", plain)


def test_data_on_stdout_and_words_on_stderr() -> None:
    train("--steps", "1", "--name", "run")
    done = good("sample", "run", "--num", "1")
    assert done.out == "runs/run/samples/seed-0-of-step-1.png\n"
    assert done.err == "made by run run, step 1, averaged weights\n"
    assert train("--steps", "1").out == ""
    json.loads(good("probe-layers", *TINY, "--json").out)


# ---- completion


def test_completion_knows_presets_and_runs() -> None:
    from fmrun.cli import options

    assert options.complete_presets("") == presets.names()
    assert options.complete_presets("dcgan-fm-") == [n for n in presets.names() if n.startswith("dcgan-fm-")]
    assert options.complete_runs("") == []
    train("--steps", "1", "--name", "alpha")
    train("--steps", "1", "--name", "beta")
    assert options.complete_runs("") == ["alpha", "beta"]
    assert options.complete_runs("be") == ["beta"]


def test_completion_in_a_shell() -> None:
    train("--steps", "1", "--name", "alpha")
    for words, expected in (
        ("fmrun resume al", "alpha"),
        ("fmrun train --preset dcgan-f", "dcgan-fm"),
        ("fmrun sam", "sample"),
    ):
        env = {"_FMRUN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        script = "from fmrun.__main__ import main; main()"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(**env))
        assert expected in done.stdout.split(), (words, done)
