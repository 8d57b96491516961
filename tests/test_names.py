"""Names that fit on a line of pytest's report."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_no_test_has_a_name_of_70_characters_or_more():
    names = {name for path in TESTS.rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))}
    assert [name for name in sorted(names) if len(name) >= 70] == []
