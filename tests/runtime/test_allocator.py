"""Memory that is kept between steps."""

import ctypes
import platform
from types import SimpleNamespace

import pytest

from fmrun.runtime import allocator


@pytest.mark.parametrize(("answer", "kept"), [(1, True), (0, False)])
def test_both_thresholds_are_raised(monkeypatch, answer, kept):
    told = {}

    def mallopt(option, value):
        told[option] = value
        return answer

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert allocator.keep_freed_memory() is kept
    if kept:
        # numbers of mallopt(3): pages of one's own from 32 MiB on, 512 MiB kept
        assert told == {-3: 33554432, -1: 536870912}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_glibc_takes_them():
    assert allocator.keep_freed_memory()


@pytest.mark.parametrize("library", [object(), None])
def test_other_libraries_are_left_alone(monkeypatch, library):
    def load(name):
        if library is None:
            raise OSError(name)
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert not allocator.keep_freed_memory()
