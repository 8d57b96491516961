"""Tables that fit into a terminal: as they are, turned, or in parts."""

from __future__ import annotations

from fmrun.tables import WIDTH, fitted

KEYS = [("run", ["plain", "matched"]), ("step", [900, 1500])]


def scores(count: int, rows: int = 2) -> list[tuple[str, list[float]]]:
    return [(f"a_score_called_{i}", [i + row / 8 for row in range(rows)]) for i in range(count)]


def width(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_what_fits_has_a_row_each() -> None:
    head, _, plain, matched = fitted(KEYS, scores(3)).splitlines()
    assert head.split() == ["run", "step", "a_score_called_0", "a_score_called_1", "a_score_called_2"]
    assert plain.split() == ["plain", "900", "0", "1", "2"]
    assert matched.split() == ["matched", "1500", "0.125", "1.125", "2.125"]


def test_what_is_too_wide_is_turned_and_says_the_same() -> None:
    text = fitted(KEYS, scores(9))
    head, _, *lines = text.splitlines()
    assert width(text) <= WIDTH
    assert head.split() == ["run", "plain", "matched"]
    assert lines[0].split() == ["step", "900", "1500"]
    assert [line.split() for line in lines[1:]] == [[name, f"{a:g}", f"{b:.4g}"] for name, (a, b) in scores(9)]


def test_what_is_too_wide_both_ways_comes_in_parts_that_each_name_their_rows() -> None:
    keys = [("run", [f"a-run-of-some-name-{i}" for i in range(9)]), ("step", [100] * 9)]
    text = fitted(keys, scores(9, rows=9))
    parts = [part.splitlines() for part in text.split("\n\n")]
    assert width(text) <= WIDTH
    assert len(parts) > 1
    assert all(part[0].split()[:2] == ["run", "step"] and len(part) == 11 for part in parts)
    assert [name for part in parts for name in part[0].split()[2:]] == [name for name, _ in scores(9)]


def test_a_column_wider_than_a_terminal_is_not_cut() -> None:
    assert "x" * 99 in fitted(KEYS, [("words", ["x" * 99, "y"])])
