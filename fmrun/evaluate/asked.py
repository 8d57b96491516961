"""What `fmrun eval` was asked for, and the images that it measures on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..config.presets import Override
from ..config.schema import Config
from ..data.store import Images
from ..metrics.reals import shown
from ..runtime.report import Reporter, note_once
from ..sample.sample import Source
from ..tasks import Data, kind


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    num: int | None = None
    extractor: str | None = None
    overrides: Sequence[Override] = ()
    steps: Sequence[int] = ()

    @property
    def default(self) -> bool:
        """Whether a checkpoint is measured as it is without any option."""
        return self.num is None and self.extractor is None and not self.overrides

    @property
    def other_images(self) -> bool:
        """Whether the images measured on are not a run's own."""
        return any(override.key == "data.path" for override in self.overrides)


class Opener:
    """Opens the data of runs, each once."""

    def __init__(self, asked: Asked, report: Reporter):
        self.asked, self.report = asked, report
        self._known: dict[tuple[str, int], Data] = {}

    def __call__(self, config: Config) -> Data:
        # which images are held out of a set depends on the run's seed
        key = config.data.model_dump_json(), config.seed if config.data.valid_fraction else 0
        if key not in self._known:
            progress = self.report.counting("checking images")
            self._known[key] = kind(config.task).open(config, progress, trained=False)
        return self._known[key]

    def pool(self, config: Config) -> tuple[Images, str]:
        """The images measured on, and what scores call them: those held out, else those trained on, which is said."""
        data, other = self(config), self.asked.other_images
        if data.valid is None and not other:
            note_once("no images were held out of training: measuring on those the generator learned from")
        what = ", held out" if data.valid is not None else "" if other else ", trained on"
        name = shown(config.data.valid_path or config.data.path) + what
        return data.train if data.valid is None else data.valid, name


class Scores(Protocol):
    """Measures generators of a task."""

    headline: str
    """The score by which the best checkpoint is told."""
    open: Opener

    def __call__(self, source: Source, config: Config) -> dict[str, Any]:
        """The scores of a generator and what real images score, as `Run.add_evaluation` takes them."""
        ...
