"""RAM that a step frees, kept for the next one."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt(3)."""

LARGEST = 32 << 20
"""Bytes from which on an allocation has pages of its own; glibc takes no more."""
KEPT = 512 << 20
"""Bytes that may lie free before they are given back."""


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed; whether it will (glibc alone knows how to).

    By default it gives large tensors back at once, and the system hands every page of the next step out anew, with
    zeros in it: up to a fifteenth of a step on a CPU (docs/performance.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))
