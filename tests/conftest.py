"""Every test, and every process a test starts, computes with one thread and outside any launcher."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NO_COLOR", "FORCE_COLOR", "COLUMNS"):
    os.environ.pop(variable, None)

# a shell starts background jobs with interrupts ignored, which the processes of the tests would inherit
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# what is kept between commands is kept between the tests of one session, and away from the user's own
_CACHE = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = os.environ["XDG_CONFIG_HOME"] = _CACHE.name

# whatever folder they are started in, they run the fmrun that lies beside these tests
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))

# where Python may write no byte code, each process compiles torch anew, which takes longer than most tests
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", os.path.join(_CACHE.name, "bytecode"))
    import torch._dynamo  # what every optimiser imports, before processes that again may not write

import torch  # noqa: E402

torch.set_num_threads(1)

from support.commands import leave_out_what_takes_long  # noqa: E402

leave_out_what_takes_long()


LONG = ("test_gpu", "test_sweep_launch", "test_adding", "test_distributed", "test_sweep", "test_trust", "test_cli")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that is the current one, with 40 grey images of 28 px in `images.npz`."""
    from support.commands import end_all, write_images

    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images.npz")
    yield tmp_path
    end_all()


@pytest.fixture
def small_extractor(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an extractor for this test: twelve fixed projections of the image, shrunk by four."""
    from fmrun.losses.pretrained import as_rgb
    from fmrun.metrics.extractors import EXTRACTORS, Extractor

    weight = torch.randn(3 * 49, 12, generator=torch.Generator().manual_seed(0))

    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(as_rgb(images.float() / 255), 4).flatten(1) @ weight

    small = Extractor("small", features, weights="00000000", resize="none")
    monkeypatch.setitem(EXTRACTORS, "small", lambda device: small)
    return "small"
