"""A table that fits into a terminal: as it is, turned."""

from __future__ import annotations

from fmrun.runtime.table import WIDTH, Table


def table(count: int, rows: int = 2, names: tuple[str, ...] = ("plain", "matched")) -> Table:
    scores = [f"a_score_called_{i}" for i in range(count)]
    cells = [[names[row], str(900 + row), *(f"{i + row / 8:.3f}" for i in range(count))] for row in range(rows)]
    return Table(["run", "step", *scores], cells, "lr" + "r" * count)


def width(text: str) -> int:
    return max(map(len, text.splitlines()))


def test_what_fits_has_a_row_each_and_numbers_end_alike() -> None:
    head, _, plain, matched = table(3).text().splitlines()
    assert head.split() == ["run", "step", "a_score_called_0", "a_score_called_1", "a_score_called_2"]
    assert plain.split() == ["plain", "900", "0.000", "1.000", "2.000"]
    assert matched.split() == ["matched", "901", "0.125", "1.125", "2.125"]
    assert len(head) == len(plain) == len(matched)


def test_what_is_too_wide_is_turned_and_says_the_same() -> None:
    text = table(9).text()
    head, _, *lines = text.splitlines()
    assert width(text) <= WIDTH
    assert head.split() == ["run", "plain", "matched"]
    assert lines[0].split() == ["step", "900", "901"]
    assert lines[9].split() == ["a_score_called_8", "8.000", "8.125"]


def test_a_column_wider_than_a_terminal_is_not_cut() -> None:
    assert "x" * 99 in Table(["run", "words"], [["a", "x" * 99], ["b", "y"]], "ll").text()
