"""One run of a sweep: where it stands, by its folder, and what brings it further."""

from dataclasses import dataclass
from pathlib import Path

from ..compare.configs import differences
from ..config.presets import FREE_ON_RESUME
from ..data.places import located
from ..runs.folder import Run
from ..runtime.errors import UserError
from .grid import Combination

DECIDED_BY_DATA = ("data.channels",)
"""What a run writes into its config otherwise than it was asked for, once it has seen its images."""


@dataclass(frozen=True)
class Item:
    """One run of a sweep."""

    folder: Path
    """The sweep's, absolute."""
    combination: Combination
    seed: int
    evaluate: bool | None
    """None: an evaluation that fails is no failure."""
    trust_code: bool = False

    @property
    def name(self) -> str:
        return f"{self.combination.name}_seed-{self.seed}"

    @property
    def run(self) -> Run:
        return Run(self.folder / self.name)

    @property
    def state(self) -> str:
        """`new`, `running` (by whatever process), `finished` and `diverged`, of which nothing is left to be trained, or
        `open`."""
        if not self.run.config_file.is_file():
            return "new"
        state = self.run.state
        if state == "finished" and int(self.run.status().get("step", 0)) < self.combination.config.train.steps:
            return "open"
        return state if state in ("running", "finished", "diverged") else "open"

    @property
    def evaluated(self) -> bool:
        """Whether its end has the scores that `eval` gives: those of raw weights or of other images are not."""
        step = self.run.status().get("step")
        return any(
            record.get("step") == step and record.get("weights") == "ema" and record.get("default") is True
            for record in self.run.evaluations()
        )

    @property
    def done(self) -> bool:
        """Whether nothing is left to be done."""
        state = self.state
        return state == "diverged" or (state == "finished" and (self.evaluate is False or self.evaluated))

    @property
    def command(self) -> list[str]:
        """What brings it further: `train`, `resume`, or `eval`."""
        config, where = self.combination.config, ["--runs-dir", str(self.folder)]
        where += ["--trust-code"] * self.trust_code
        match self.state:
            case "new":
                return ["train", *self.combination.train, "--seed", str(self.seed), "--name", self.name, *where]
            case "finished":
                return ["eval", self.name, "--device", config.device, *where]
        return ["resume", self.name, "--steps", str(config.train.steps), *where]

    def refuse_another(self) -> None:
        """UserError where the run that lies there is of another experiment."""
        if not self.run.config_file.is_file():
            return
        config = self.combination.config
        here = config.model_copy(update={"data": located(config.data, config.task)})
        for key, (was, now) in differences([self.run.config(), here.model_dump(mode="json")]).items():
            settled = key.startswith("generator.") and now is None  # by the file of generator.init
            if key not in DECIDED_BY_DATA and not settled and not key.startswith(FREE_ON_RESUME):
                raise UserError(
                    f"run {self.name} in {self.folder} is of {key}={was}, and this sweep is of {key}={now}; give another "
                    f"--name, or vary {key} with --over"
                )
