"""What a sweep is asked for: values, seeds, combinations, names."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrun.config.presets import Override
from fmrun.runs.folder import NAME
from fmrun.runtime.errors import UserError
from fmrun.sweep import grid

PLAIN = st.text(
    st.characters(codec="ascii", exclude_characters="[](){}\"',\\", exclude_categories=["C"]), min_size=1
).map(str.strip)
QUOTED = st.text(st.characters(codec="ascii", exclude_categories=["C"], exclude_characters='"\\')).map(
    lambda t: f'"{t}"'
)
LIST = st.lists(PLAIN).map(lambda parts: f"[{','.join(parts)}]")
VALUE = st.one_of(PLAIN.filter(bool), QUOTED, LIST)


def combos(*overs: str, sets: tuple[str, ...] = (), preset: str = "dcgan-fm") -> list[grid.Combination]:
    overrides = [Override(f"-s {text}", *text.split("=", 1)) for text in sets]
    return grid.combinations(preset, None, overrides, [grid.parse_over(text) for text in overs])


# ---- values


@given(st.lists(VALUE, min_size=1))
def test_what_is_joined_by_commas_is_split_again(parts: list[str]) -> None:
    assert grid.parse_over(f"x={','.join(parts)}").values == tuple(parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0,0.1, 1 ,10", ("0", "0.1", "1", "10")),
        ("[block1],[block1,block2]", ("[block1]", "[block1,block2]")),
        ("{a=1,b=2},none", ("{a=1,b=2}", "none")),
        ("\"a,b\",'c,]',d", ('"a,b"', "'c,]'", "d")),
    ],
)
def test_only_commas_at_the_top_split(text: str, parts: tuple[str, ...]) -> None:
    assert grid.parse_over(f"x={text}").values == parts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("feature_matching.layers=[block1,block2", "a list stands in brackets"),
        ("feature_matching.layers=block1]", "write it as"),
        ('data.path="a,b', "write it as"),
        ("feature_matching.weight=0,,1", "write it as"),
        ("feature_matching.weight=", "write it as"),
        ("feature_matching.weight", "write it as --over FIELD=VALUE,VALUE"),
        ("=1,2", "write it as --over"),
        ("seed=1,2", "seeds are given with --seeds"),
        ("--seed=1,2", "seeds are given with --seeds"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        grid.parse_over(text)
    assert str(error.value).startswith(f"--over {text}")


@pytest.mark.parametrize("name", ["lambda_feature", "lambda-feature", "--lambda-feature", "feature_matching.weight"])
def test_shorthands_are_fields(name: str) -> None:
    assert grid.parse_over(f"{name}=0,1") == grid.Over("feature_matching.weight", ("0", "1"))


@pytest.mark.parametrize(
    ("text", "seeds"), [("5", (0, 1, 2, 3, 4)), ("1", (0,)), ("3,7,9", (3, 7, 9)), ("7,", (7,)), (" 9 , 3", (9, 3))]
)
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert grid.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1,,2", "1,1", "1.5", ",", "²", "9" * 30, f"1,{2**63}"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        grid.parse_seeds(text)


# ---- combinations


def test_weight_zero_is_one_control_for_all_feature_matching_settings() -> None:
    found = combos(
        "feature_matching.weight=0,0.1", "feature_matching.match=mean,sample", "feature_matching.layers=[block1],[all]"
    )
    assert [c.config.feature_matching.weight for c in found] == [0, 0.1, 0.1, 0.1, 0.1]
    assert [c.name for c in found[:2]] == ["weight-0", "weight-0.1_match-mean_layers-block1"]
    assert found[0].train == ("--preset", "dcgan-fm", "-s", "feature_matching.weight=0")


def test_what_is_not_feature_matching_makes_a_control_of_its_own() -> None:
    found = combos("feature_matching.weight=0,1", "train.batch_size=8,16")
    assert [c.name for c in found] == [f"weight-{weight}_batch-size-{size}" for weight in (0, 1) for size in (8, 16)]


def test_equal_values_are_one_combination() -> None:
    assert len(combos("feature_matching.weight=0.1,1e-1,0.10")) == 1
    assert len(combos("train.steps=5,6")) == 2  # makes no other experiment, but was asked for


def test_a_sweep_over_seeds_alone_is_one_combination() -> None:
    (only,) = combos()
    assert only.name == "base"
    assert only.config.feature_matching.weight == 1


@pytest.mark.parametrize(
    ("overs", "sets", "words"),
    [
        (("feature_matching.wieght=0,1",), (), "did you mean 'feature_matching.weight'"),
        (
            ("feature_matching.match=mean,middle",),
            (),
            "--over feature_matching.match=middle: .*'middle'; allowed: sample",
        ),
        (("train.steps=5", "train.steps=6"), (), "--over is given twice for a field"),
        (("train.steps=5,6",), ("train.steps=7",), "-s train.steps=7: --over varies train.steps"),
        (("train.steps=5,6",), ("seed=7",), "seeds are given with --seeds"),
        (("feature_matching.match=mean,mmd",), ("feature_matching.weight=0",), "weight is 0 in every combination"),
        (
            ("feature_matching.match=mean,mmd", "feature_matching.criterion=l1,l2"),
            (),
            "feature_matching.criterion is for match sample, mean or moments, not mmd",
        ),
    ],
)
def test_combinations_that_are_refused(overs: tuple[str, ...], sets: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        combos(*overs, sets=sets)


def test_optional_sections_can_be_varied() -> None:
    found = combos("losses.l1=none,{}", preset="munet-x2-cpu")
    assert [c.config.losses.l1 is None for c in found] == [True, False]


# ---- names


def test_short_names_tell_the_fields_apart() -> None:
    keys = ["feature_matching.weight", "losses.gan.weight", "train.steps", "device"]
    assert grid.short_names(keys) == {
        "feature_matching.weight": "feature_matching.weight",
        "losses.gan.weight": "losses.gan.weight",
        "train.steps": "steps",
        "device": "device",
    }
    assert grid.short_names(["feature_matching.weight", "feature_matching.match"]) == {
        "feature_matching.weight": "weight",
        "feature_matching.match": "match",
    }


def test_names_can_be_read_by_people_and_file_systems() -> None:
    layers = "feature_matching.layers=[block1],[block1,-1],[Block1],[key]"
    names = [c.name for c in combos(layers, "feature_matching.weight=1e-3,10")]
    assert names[0] == "layers-block1_weight-0.001"
    assert "layers-block1--1_weight-10" in names
    assert "layers-Block1_weight-10-2" in names  # case does not count everywhere
    assert len(names) == 8
    assert all(NAME.fullmatch(name) for name in names)


@settings(max_examples=40)
@given(st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True))
def test_any_value_gives_a_legal_name(values: list[str]) -> None:
    taken: list[str] = []
    for value in values:
        taken.append(grid.folder_name({"data.path": value}, {"data.path": "path"}, taken))
    assert len({name.casefold() for name in taken}) == len(values)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) and len(name) < 80 for name in taken)


def test_the_same_command_finds_the_same_sweep() -> None:
    assert (
        grid.default_name("dcgan-fm", ["feature_matching.weight", "train.batch_size"]) == "dcgan-fm-weight-batch-size"
    )
    assert grid.default_name("../x", []) == "x"
