"""How much memory is available for keeping images."""

import os
from pathlib import Path

import torch


def available_ram() -> int:
    """Bytes of RAM this process may take: what the machine has free (half of all where it does not say, as macOS), or the
    limit of a container or a batch system (Linux control groups, version 2)."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        root = Path("/sys/fs/cgroup")
        group = root / Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        files = [folder / "memory.max" for folder in (group, *group.parents) if folder.is_relative_to(root)]
        limits = [file.read_text().strip() for file in files if file.exists()]
        return min([free, *(int(limit) for limit in limits if limit.isdigit())])  # or "max"
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 4 * 2**30


def available_on(device: torch.device) -> int:
    """Bytes free on `device`."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_ram()


def gigabytes(count: int) -> str:
    """`12.3 GB`."""
    return f"{count / 1e9:.1f} GB"
