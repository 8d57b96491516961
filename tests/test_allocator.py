"""Memory that is kept between steps."""

import ctypes
import platform
import subprocess
import sys

import pytest

from fmrun import allocator

FAULTS = """
import resource, sys, torch
from fmrun.allocator import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
def work():
    a = torch.ones(20 * 2**18)
    b = torch.ones(20 * 2**18)
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_what_is_freed_is_not_asked_for_again():
    def faults(*arguments: str) -> int:
        command = [sys.executable, "-c", FAULTS, *arguments]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("keep") < 100
    assert faults() > 1000  # by default they are given back, or this would show nothing


@pytest.mark.parametrize("library", [object(), None])
def test_other_libraries_are_left_alone(monkeypatch, library):
    def load(name):
        if library is None:
            raise OSError(name)
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert not allocator.keep_freed_memory()
