"""Kernels without a deterministic form are told before or when they are met, in one sentence with the way out."""

from __future__ import annotations

import pytest
import torch

from fmrun.config.schema import Config
from fmrun.runtime.errors import UserError
from fmrun.runtime.precision import deterministic_or_said
from fmrun.train.run import check_determinism

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def config(dysample: bool | None, deterministic: bool) -> Config:
    return Config.model_validate(
        {
            "task": "upscale",
            "generator": {"type": "realplksr", "dysample": dysample},
            "discriminator": {"type": "munet", "norm": "spectral"},
            "deterministic": deterministic,
        }
    )


def test_dysample_on_a_gpu_is_refused_at_the_start() -> None:
    with pytest.raises(UserError, match=r"generator\.dysample .* add -s deterministic=false"):
        check_determinism(config(True, True), GPU)


@pytest.mark.parametrize(
    ("dysample", "deterministic", "device"),
    [(True, False, GPU), (True, True, CPU), (False, True, GPU), (None, True, GPU)],
)
def test_what_can_be_as_deterministic_as_asked_is_not(
    dysample: bool | None, deterministic: bool, device: torch.device
) -> None:
    check_determinism(config(dysample, deterministic), device)


def test_a_kernel_without_a_deterministic_form_is_named() -> None:
    def work() -> None:
        with deterministic_or_said():
            torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))

    work()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(
            UserError, match=r"^put_ has no deterministic form on this device; add -s deterministic=false"
        ):
            work()
    finally:
        torch.use_deterministic_algorithms(False)


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="something else"), deterministic_or_said():
        raise RuntimeError("something else")
