"""What a run ran on and with."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """What a run ran on and with. Never fails: what cannot be found out is None."""
    import torch

    from .. import __version__

    def gpus() -> list[str]:
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]

    return {
        "fmrun": __version__,
        "git": _attempt(_git_revision),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _attempt(version, name) for name in ("torchvision", "numpy", "safetensors")},
        "cuda": torch.version.cuda,
        "cudnn": _attempt(torch.backends.cudnn.version),
        "platform": platform.platform(),
        "processor": cpu_model(),
        "cores": os.cpu_count(),
        "threads": _attempt(torch.get_num_threads),
        "gpus": _attempt(gpus),
        "host": platform.node(),
    }


def cpu_model() -> str | None:
    """The processor's name as its maker gives it."""
    if sys.platform == "darwin":
        return _attempt(_output, "sysctl", "-n", "machdep.cpu.brand_string")
    cpuinfo = _attempt(Path("/proc/cpuinfo").read_text) or ""
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine() or None


def _git_revision() -> str | None:
    """The revision checked out in the current folder. Read from files: git itself would run what the folder's own
    configuration names."""
    here = Path.cwd()
    git = next(folder / ".git" for folder in (here, *here.parents) if (folder / ".git").exists())
    if git.is_file():  # a work tree or submodule, whose repository lies elsewhere
        git = git.parent / _text(git).removeprefix("gitdir:").strip()
    head = _text(git / "HEAD").strip()
    name = head.removeprefix("ref:").strip()
    lines = [line for folder in (git, git / _text(git / "commondir").strip()) for line in _refs(folder, name)]
    return next((line for line in (head, *lines) if re.fullmatch(r"[0-9a-f]{40,64}", line)), None)


def _refs(git: Path, name: str) -> list[str]:
    packed = [line.partition(" ")[0] for line in _text(git / "packed-refs").splitlines() if line.endswith(f" {name}")]
    return [_text(git / name).strip(), *packed]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception:
        return None
