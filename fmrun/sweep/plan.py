"""A sweep's folder, and which of its runs are still to be trained.

runs/SWEEP/
  sweep.json                     fields, seeds, combinations, and which run is which
  configs/COMBINATION.json       each combination's settings, resolved; a config for `fmrun train --config`
  COMBINATION_seed-N/            the runs, as any other
  logs/COMBINATION_seed-N.log    what each said
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__, records
from ..config import Config
from ..errors import UserError, nearest
from ..presets import FREE_ON_RESUME, flatten, from_json, render
from ..runs import NAME, Run, exclusive, make_folder, saving, to_json, write_atomic
from .grid import (
    MATCHING,
    WEIGHT,
    Combination,
    folder_name,
    identity,
    label,
    representative,
    short_names,
    without_matching,
)

LOGS, CONFIGS, FILE = "logs", "configs", "sweep.json"


@dataclass(frozen=True)
class Planned:
    """One run: a combination with a seed."""

    combination: str
    seed: int
    run: Run

    @property
    def name(self) -> str:
        return self.run.name


@dataclass
class Sweep:
    """All that was ever asked of the sweep in `folder`, by this command or earlier ones."""

    folder: Path
    keys: list[str] = field(default_factory=list)
    """Fields that vary."""
    seeds: list[int] = field(default_factory=list)
    combinations: dict[str, Combination] = field(default_factory=dict)
    """By the name that their runs begin with."""
    runs: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Combination and seed of each run."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def file(self) -> Path:
        return self.folder / FILE

    @property
    def shorts(self) -> dict[str, str]:
        return short_names(self.keys)

    def label(self, name: str) -> str:
        return label(self.combinations[name].settings, self.shorts)

    def planned(self, run: str) -> Planned:
        combination, seed = self.runs[run]
        return Planned(combination, seed, Run(self.folder / run))

    def settings(self, combination: str) -> dict[str, Any]:
        """All of a combination's config but the seed, as JSON has it."""
        return self.combinations[combination].config.model_dump(mode="json", exclude={"seed"})

    def config_file(self, combination: str) -> Path:
        return self.folder / CONFIGS / f"{combination}.json"

    def log_file(self, run: str) -> Path:
        return self.folder / LOGS / f"{run}.log"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the sweep while it runs; a second command is refused with a UserError."""
        try:
            make_folder(self.folder)
        except OSError as error:
            raise UserError(
                f"cannot make a sweep in {self.folder.parent}: {error.strerror}; make it writable or give another --runs-dir"
            ) from error
        refusal = (
            f"sweep {self.name} is being run by process {{}}; wait for it to end, or stop it first (it can be continued "
            "by the same command)"
        )
        with exclusive(self.folder / ".lock", refusal):
            try:
                yield
            finally:
                if not self.file.exists():  # refused before anything began
                    (self.folder / ".lock").unlink(missing_ok=True)
                    with suppress(OSError):
                        self.folder.rmdir()

    def add(self, found: Sequence[Combination], keys: Sequence[str], seeds: Sequence[int]) -> list[Planned]:
        """Take in a grid, and give its runs: seed by seed, so that a sweep that is stopped has compared what it could.

        UserError if what lies in the folder already is another experiment.
        """
        self._refuse_another(found, keys)
        self.keys += [key for key in keys if key not in self.keys]
        known = {identity(c.config, self.keys): name for name, c in self.combinations.items()}
        self.combinations = {name: self._described(c) for name, c in self.combinations.items()}
        names = []
        for new in found:
            combination = self._described(new)
            name = known.get(identity(combination.config, self.keys))
            if name is None:
                name = folder_name(combination.settings, self.shorts, self.combinations)
            self.combinations[name] = combination
            names.append(name)
        self.seeds = sorted({*self.seeds, *seeds})
        asked = [(name, seed) for seed in seeds for name in names]
        self.runs |= {f"{name}_seed-{seed}": (name, seed) for name, seed in asked}
        return [self.planned(f"{name}_seed-{seed}") for name, seed in asked]

    def _described(self, combination: Combination) -> Combination:
        """The combination with a value for each field that varies, also those that it was made without."""
        config, flat, said = combination.config, flatten(combination.config), combination.settings

        def value(key: str) -> Any:
            if key in said or key in flat:
                return said.get(key, flat.get(key))
            present = any(
                k.startswith(f"{key}.") for k in flat
            )  # an optional section; else one of its fields, or neither
            return "set" if present else None

        keys = [k for k in self.keys if not combination.is_control or not k.startswith(MATCHING) or k == WEIGHT]
        return Combination({key: value(key) for key in keys}, without_matching(config))

    def _refuse_another(self, found: Sequence[Combination], keys: Sequence[str]) -> None:
        if not self.combinations:
            return
        free_to_vary = {*self.keys, *keys, "seed"}
        old, new = representative(list(self.combinations.values())), representative(found)
        plain = old.is_control or new.is_control
        then, now = flatten(old.config), flatten(new.config)
        for key in dict.fromkeys((*then, *now)):
            if key in free_to_vary or key.startswith(FREE_ON_RESUME) or (plain and key.startswith(MATCHING)):
                continue
            if then.get(key) != now.get(key):
                raise UserError(
                    f"sweep {self.name} is of {_shown(key, then)}, and this is of {_shown(key, now)}; give another --name, "
                    f"or vary {key} with --over"
                )
        if "train.steps" not in free_to_vary and now["train.steps"] < then["train.steps"]:
            raise UserError(
                f"sweep {self.name} trains {then['train.steps']} steps, and --steps is {now['train.steps']}; give as many or "
                "more, or another --name"
            )

    def write(self, command: Sequence[str]) -> None:
        """Put the plan, and the command it is of, where the next command and a reader find it."""
        for folder in (self.folder / CONFIGS, self.folder / LOGS):
            make_folder(folder)
        for name in self.combinations:
            self._write(self.config_file(name), self.settings(name))
        self._write(
            self.file,
            {
                "fmrun": __version__,
                "command": list(command),
                "over": self.keys,
                "seeds": self.seeds,
                "combinations": {
                    name: {"settings": c.settings, "control": c.is_control} for name, c in self.combinations.items()
                },
                "runs": {run: {"combination": name, "seed": seed} for run, (name, seed) in self.runs.items()},
            },
        )

    @staticmethod
    def _write(path: Path, content: Mapping[str, Any]) -> None:
        with saving(path):
            write_atomic(path, to_json(content))


def open_sweep(runs_dir: Path, name: str) -> Sweep:
    """The sweep of this name, as it lies there or empty."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name '{name}' is not a name for a sweep: at most 100 letters, digits, '.', '_' and '-', "
            "the first a letter or digit"
        )
    folder = runs_dir / name
    sweep = Sweep(folder)
    if (folder / "config.json").exists():
        raise UserError(f"--name {name}: there is a run of this name in {runs_dir}; give the sweep another")
    if not sweep.file.exists():
        if folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir()):
            raise UserError(f"--name {name}: {folder} is there already, and is no sweep; give another name")
        return sweep
    try:
        content = records.read(sweep.file, records.Sweep)
    except UserError as error:
        raise UserError(f"{error}; give another --name, or move {folder} away") from None
    sweep.keys, sweep.seeds = content["over"], content["seeds"]
    sweep.runs = {run: (entry["combination"], entry["seed"]) for run, entry in content["runs"].items()}
    settings = {key: entry["settings"] for key, entry in content["combinations"].items()}
    sweep.combinations = {key: Combination(s, from_json(sweep.config_file(key))) for key, s in settings.items()}
    return sweep


def control_of(sweep: Sweep, chosen: str | None) -> dict[str, str]:
    """The control of each combination that has one, both by name.

    `chosen` is the control of all others. Without it, a combination's control is the one equal to it but for feature
    matching, which has weight 0 there.
    """
    if chosen is not None:
        known = {
            **{name: name for name in sweep.combinations},
            **{sweep.label(name): name for name in sweep.combinations},
        }
        if chosen not in known:
            raise UserError(
                f"--control: there is no combination '{chosen}'{nearest(chosen, list(known))}; there are "
                f"{', '.join(sweep.combinations)}"
            )
        return {name: known[chosen] for name in sweep.combinations if name != known[chosen]}
    controls = {identity(c.config, sweep.keys): name for name, c in sweep.combinations.items() if c.is_control}
    found = {}
    for name, combination in sweep.combinations.items():
        weight = combination.config.feature_matching.model_copy(update={"weight": 0.0})
        plain = without_matching(combination.config.model_copy(update={"feature_matching": weight}))
        if not combination.is_control and (control := controls.get(identity(plain, sweep.keys))):
            found[name] = control
    return found


def standing(planned: Planned, config: Config) -> str:
    """What is to be done about a run: `new`, `resume`, `extend`, `elsewhere` (another process trains it), or nothing:
    `finished`, `diverged` (it would again)."""
    run = planned.run
    if not run.config_file.is_file():
        return "new"
    state, steps = run.state, config.train.steps
    if state == "running" and os.name != "nt":  # runs are not locked on Windows, so that a killed one seems to go on
        return "elsewhere"
    if state == "diverged":
        return "diverged"
    if state == "finished":
        return "finished" if int(run.status().get("step", 0)) >= steps else "extend"
    return "resume"


def changed_settings(run: Run, config: Config) -> list[str]:
    """The `KEY=VALUE`s of settings that a run may change and that this sweep wants otherwise than the run has them."""
    then, now = flatten(from_json(run.config())), flatten(config)
    changed = [key for key in now if key.startswith(FREE_ON_RESUME) and key != "device" and now[key] != then.get(key)]
    return [render(key, now[key]) for key in changed]


def _shown(key: str, flat: Mapping[str, Any]) -> str:
    return render(key, flat[key]) if key in flat else f"no {key}"
