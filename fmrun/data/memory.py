"""How much memory there is to keep images in."""

import os
from pathlib import Path

import torch

UNKNOWN = 4 * 2**30
"""Assumed where the system does not say."""


def available_ram() -> int:
    """Bytes of RAM this process may take: what the machine has free, or its control group's limit."""
    return min([_free_ram(), *_group_limits()])


def available_on(device: torch.device) -> int:
    """Bytes free on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_ram()


def gigabytes(count: int) -> str:
    """`12.3 GB`."""
    return f"{count / 1e9:.1f} GB"


def _free_ram() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return UNKNOWN


def _group_limits() -> list[int]:
    """Limits set on this process by a container or a batch system (Linux control groups, version 2)."""
    root = Path("/sys/fs/cgroup")
    try:
        own = root / Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        files = [folder / "memory.max" for folder in (own, *own.parents) if folder.is_relative_to(root)]
        limits = [file.read_text().strip() for file in files if file.exists()]
    except OSError:
        return []
    return [int(limit) for limit in limits if limit.isdigit()]  # or "max"
