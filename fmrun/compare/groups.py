"""What is compared: runs, and groups of them that differ in their seed alone."""

from __future__ import annotations

from dataclasses import dataclass

FAILED = ("diverged", "failed")
"""States of runs whose scores do not count: what they reached is no result of the experiment."""


@dataclass(frozen=True)
class Member:
    """One run."""

    name: str
    path: str
    seed: int
    state: str
    step: int
    steps: int
    message: str | None
    """What ended it, if something did."""
    remarks: tuple[tuple[int, str], ...]
    """(step, sentence): what the rules of `health` have to say about its metrics."""

    @property
    def failed(self) -> bool:
        return self.state in FAILED


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    members: tuple[Member, ...]
    matches_features: bool
    control: bool
    """Whether the others are compared with this one."""
    share: float | None
    """Gradient of feature matching relative to the adversarial one, mean over the last half of training."""
    diversity: float | None
    """Of generated images relative to real ones, mean over the last quarter of training."""
    images_per_second: float | None
    """Median over training, as the runs were made: other work on the machine slows them."""
    speed_spread: float | None
    """The factor by which that varied, between runs or within one."""
    step_cost: float | None
    """Time per step relative to the control's; None where there is none, under other conditions (machine, device,
    versions), or where speeds varied too much to tell."""

    @property
    def failures(self) -> int:
        return sum(member.failed for member in self.members)
