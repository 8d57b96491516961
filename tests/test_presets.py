"""Presets, flags and files become one config, or one sentence."""

import json
import math
import string
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fmrun import overlay, presets
from fmrun.config import Config, LossesConfig
from fmrun.config.fields import FIELDS, OPTIONAL, Kind, is_optional
from fmrun.errors import UserError
from fmrun.presets import Override, flatten, from_json, parse_set, render, resolve

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def sets(*texts, preset=None, file=None):
    return resolve(preset, file, [parse_set(text) for text in texts])


def message(*texts, preset=None, file=None):
    with pytest.raises(UserError) as caught:
        sets(*texts, preset=preset, file=file)
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


# ---- presets


def test_every_preset_resolves_and_says_what_it_is():
    assert presets.DEFAULT in presets.names()
    for name in presets.names():
        assert presets.describe(name).endswith(".")
        config = resolve(name, None, [Override("--data", "data.path", "images")])
        assert config.data.path == "images"


def test_without_arguments_the_default_preset():
    assert resolve(None, None, []) == resolve("dcgan-fm", None, [])


def test_control_differs_in_feature_matching_only():
    control, treated = flatten(resolve("dcgan", None, [])), flatten(resolve("dcgan-fm", None, []))
    differing = {key.split(".")[0] for key in treated if control[key] != treated[key]}
    assert differing == {"feature_matching"}
    assert control["feature_matching.weight"] == 0


def test_the_presets_are_what_they_are_called():
    fm = resolve("dcgan-fm", None, []).feature_matching
    assert (fm.weight, fm.match, fm.layers, fm.balance) == (1, "mean", ("key",), "gradient")
    mse = resolve("dcgan-fm-mse", None, []).feature_matching
    assert (mse.weight, mse.match, mse.criterion, mse.balance) == (0.1, "sample", "l2", "none")
    mmd = resolve("dcgan-fm-mmd", None, []).feature_matching
    assert (mmd.weight, mmd.match, mmd.balance) == (1, "mmd", "gradient")


def test_large_preset_wants_images_of_ones_own():
    assert message(preset="dcgan-64") == (
        "preset dcgan-64: data.image_size is 64, but the bundled images are 28 px; give larger ones with --data FOLDER"
    )
    config = resolve("dcgan-64", None, [Override("--data", "data.path", "pictures")])
    assert (config.data.image_size, config.data.fit, config.generator.width) == (64, "crop", 64)
    assert config.feature_matching == resolve("dcgan-fm", None, []).feature_matching
    assert resolve("dcgan-64", None, [], need_data=False).data.image_size == 64


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "_folder", lambda: tmp_path)
    return tmp_path


def test_bases_are_merged_deeply(folder):
    (folder / "a.toml").write_text('description = "A."\nseed = 1\n[train]\nsteps = 5\nbatch_size = 8\n')
    (folder / "b.toml").write_text('extends = "a"\n[train]\nsteps = 6\n')
    (folder / "c.toml").write_text('extends = "b"\nseed = 2\n')
    assert presets.load("c") == {"seed": 2, "train": {"steps": 6, "batch_size": 8}}


def test_a_circle_of_presets_is_one_sentence(folder):
    (folder / "a.toml").write_text('extends = "b"\n')
    (folder / "b.toml").write_text('extends = "a"\n')
    with pytest.raises(UserError, match=r"^preset 'b' extends itself: a -> b -> a$"):
        presets.load("a")


def test_listing_presets_imports_no_pydantic():
    code = (
        "import sys; from fmrun import presets; presets.names(); presets.describe('dcgan'); "
        "sys.exit(any(m in sys.modules for m in ('pydantic', 'torch', 'numpy', 'yaml')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- -s


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=007", 7),
        ("seed=1e3", 1000),
        ("seed=0x10", 16),
        ("train.steps=1_000", 1000),
        ("train.steps= 5 ", 5),
        ("optim.generator.lr=1e-4", 1e-4),
        ("optim.generator.lr=.5", 0.5),
        ("ema.decay=0", 0.0),
        ("data.path=007", "007"),
        ("data.path=2024-01-01", "2024-01-01"),
        ("data.path=1e-4", "1e-4"),
        ("data.path=true", "true"),
        ("data.path=a=b", "a=b"),
        ("data.path='quoted'", "quoted"),
        ("data.valid_path=none", None),
        ("data.valid_path='none'", "none"),
        ("data.channels=null", None),
        ("data.channels=3", 3),
        ("data.image_size=28", 28),
        ("feature_matching.criterion=None", None),
        ("optim.clip_grad_norm=none", None),
        ("discriminator.norm=none", "none"),
        ("discriminator.norm='none'", "none"),
        ("feature_matching.balance=null", "none"),
        ("precision=fp32", "fp32"),
        ("compile=true", True),
        ("compile=false", False),
        ("device=cuda:1", "cuda:1"),
        ("losses.gan.type=BCE", "vanilla"),
        ("feature_matching.layers=1,3,5", [1, 3, 5]),
        ("feature_matching.layers=block1,block2.conv", ["block1", "block2.conv"]),
        ("feature_matching.layers=[block1, -1]", ["block1", -1]),
        ('feature_matching.layers=["block1", -1]', ["block1", -1]),
        ("feature_matching.layers=-1", [-1]),
        ("feature_matching.layers=key", ["key"]),
        ("feature_matching.layer_weights=uniform", "uniform"),
        ("feature_matching.layer_weights=0.1,1", [0.1, 1.0]),
        ("feature_matching.layer_weights=2", [2.0]),
        ("optim.generator.betas=0,.9", [0.0, 0.9]),
        ("train.augment=", []),
        ("train.augment=none", []),
        ("train.augment=color,cutout", ["color", "cutout"]),
    ],
)
def test_values_parse_by_the_type_of_the_field(text, expected):
    got = flatten(sets(text))[text.partition("=")[0]]
    assert got == expected
    assert type(got) is type(expected)


def test_a_section_takes_an_inline_table():
    gan = sets('losses.gan={type = "hinge", weight = 2}').losses.gan
    assert (gan.type, gan.weight) == ("hinge", 2.0)


def test_later_wins():
    assert sets("seed=1", "seed=2").seed == 2
    assert resolve(None, None, [parse_set("seed=1"), Override("--seed", "seed", 3)]).seed == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.stpes=5", "there is no field 'train.stpes'; did you mean 'train.steps'?"),
        ("batch_size=3", "there is no field 'batch_size'; did you mean 'train.batch_size'?"),
        ("train.seed=3", "there is no field 'train.seed'; did you mean 'seed'?"),
        (
            "lr=1",
            "there is no field 'lr'; did you mean 'optim.generator.lr' or 'optim.discriminator.lr'?",
        ),
        ("lambda_feature=1", "there is no field 'lambda_feature'; did you mean 'feature_matching.weight'?"),
        ("xyzzy=3", "there is no field 'xyzzy'; `fmrun presets dcgan` lists them"),
        (
            "ema=5",
            "ema is a section, not a value; its fields: decay, warmup",
        ),
        ("ema={dcay = 1}", "there is no field 'ema.dcay'; did you mean 'ema.decay'?"),
        ("train.steps=abc", "train.steps is 'abc'; it must be a whole number, from 1 to 1,000,000,000"),
        ("train.steps=1.5", "train.steps is 1.5; it must be a whole number, from 1 to 1,000,000,000"),
        ("train.steps=", "train.steps is ''; it must be a whole number, from 1 to 1,000,000,000"),
        ("train.steps=true", "train.steps is 'true'; it must be a whole number, from 1 to 1,000,000,000"),
        ("train.steps=0", "train.steps is 0; it must be from 1 to 1,000,000,000"),
        ("seed=-1", "seed is -1; it must be 0 or greater and less than 2^63"),
        ("data.workers=65", "data.workers is 65; it must be from 0 to 64"),
        ("ema.decay=1", "ema.decay is 1; it must be 0 or greater and less than 1"),
        ("optim.generator.lr=0", "optim.generator.lr is 0; it must be greater than 0"),
        ("optim.generator.lr=nan", "optim.generator.lr is 'nan'; it must be a finite number, greater than 0"),
        ("losses.gan.weight=inf", "losses.gan.weight is 'inf'; it must be a finite number, 0 or greater"),
        ("compile=yes", "compile is 'yes'; it must be true or false"),
        ("compile=1", "compile is '1'; it must be true or false"),
        ("data.image_size=33", "data.image_size is 33; allowed: 28, 32, 64, 128"),
        ("data.channels=2", "data.channels is 2; allowed: 1, 3, 4, none"),
        ("data.path=", "data.path is ''; it must not be empty"),
        (
            "precision=fp31",
            "precision is 'fp31'; allowed: auto, fp32, bf16, fp16, fp64; did you mean 'fp32'?",
        ),
        ("device=gpu", "device is 'gpu'; allowed: auto, cpu, cuda, cuda:0, mps; did you mean 'cpu'?"),
        (
            "optim.generator.betas=0.5",
            "optim.generator.betas is '0.5'; it must be a list of 2 finite numbers, each 0 or greater and less than 1",
        ),
        (
            "feature_matching.layer_weights=unifrom",
            "feature_matching.layer_weights is 'unifrom'; it must be 'uniform' or a list of one or more finite "
            "numbers, each 0 or greater; did you mean 'uniform'?",
        ),
        (
            "feature_matching.layers=none",
            "feature_matching.layers is 'none'; it must be a list of one or more names or indices",
        ),
        ("train.accumulate=3", "accumulate 3 does not divide batch_size 64"),
        ("feature_matching.kernel=rbf", "kernel applies to match 'mmd' only, not 'mean'"),
        ("train.steps", "there is no '='; write it as -s KEY=VALUE, like -s train.steps=100"),
        ("=5", "there is no field before '='; write it as -s KEY=VALUE, like -s train.steps=100"),
    ],
)
def test_mistakes_in_set(text, expected):
    assert message(text) == f"-s {text}: {expected}"


@pytest.mark.parametrize(("value", "shown"), [("-1", "-1"), (-1.0, "-1.0")])
def test_a_shorthand_is_named_as_typed(value, shown):
    with pytest.raises(UserError) as caught:
        resolve(None, None, [Override("--lambda-feature", "feature_matching.weight", value)])
    assert str(caught.value) == f"--lambda-feature: feature_matching.weight is {shown}; it must be 0 or greater"


def test_shorthands_name_fields():
    assert set(overlay.SHORTHANDS.values()) <= set(FIELDS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dcgn", "there is no preset 'dcgn'; did you mean 'dcgan'? (fmrun presets lists them)"),
        ("../dcgan", "there is no preset '../dcgan'; did you mean 'dcgan'? (fmrun presets lists them)"),
        ("exp.toml", "there is no preset 'exp.toml'; a file goes with --config"),
    ],
)
def test_unknown_presets(name, expected):
    assert message(preset=name) == f"--preset: {expected}"


def test_a_conflict_names_the_last_flag_that_made_it():
    text = message("feature_matching.match=mmd", preset="dcgan-fm-mse")
    assert text.startswith("-s feature_matching.match=mmd: criterion 'l2' does not apply to match 'mmd'")
    with pytest.raises(UserError, match=r"^--batch-size: train: accumulate 2 does not divide batch_size 3$"):
        resolve(None, None, [parse_set("train.accumulate=2"), Override("--batch-size", "train.batch_size", "3")])


def test_several_mistakes_are_all_told_in_one_line():
    assert message("seed=x", "train.stpes=1") == (
        "-s train.stpes=1: there is no field 'train.stpes'; did you mean 'train.steps'?; "
        "-s seed=x: seed is 'x'; it must be a whole number, 0 or greater and less than 2^63"
    )
    assert message(*[f"x{n}yzzy=1" for n in range(9)]).endswith("; and 4 more")


# ---- properties

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def values(kind: Kind):
    if kind.name == "list":
        assert kind.item is not None
        size = {"min_size": kind.length or kind.min_length, "max_size": kind.length or 4}
        lists = st.lists(values(kind.item), **size)
        strategy = lists | st.sampled_from(kind.choices) if kind.choices else lists
    elif kind.name == "bool":
        strategy = st.booleans()
    elif kind.choices:
        strategy = st.sampled_from(kind.choices)
    elif kind.name == "int":
        top = kind.le if kind.le is not None else 10**6 if kind.lt is None else kind.lt - 1
        strategy = st.integers(int(kind.ge or 0), int(top))
    elif kind.name == "float":
        low = kind.ge if kind.ge is not None else kind.gt
        high = kind.le if kind.le is not None else kind.lt
        strategy = st.floats(
            low,
            high,
            exclude_min=kind.gt is not None,
            exclude_max=kind.lt is not None,
            allow_nan=False,
            allow_infinity=False,
        )
    elif kind.name == "layer":
        strategy = TEXT | st.integers(-20, 20)
    else:
        strategy = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
    return st.none() | strategy if kind.nullable else strategy


@st.composite
def configs(draw):
    always = sorted(key for key in FIELDS if not is_optional(key))
    keys = draw(st.lists(st.sampled_from(always), unique=True, max_size=8))
    data: dict = {}
    for key in keys:
        *sections, name = key.split(".")
        table = data
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = draw(values(FIELDS[key].kind))
    try:
        return Config.model_validate(data)
    except ValidationError:
        assume(False)


def test_every_whole_number_has_an_upper_bound():
    kinds = [(key, kind) for key, field in FIELDS.items() for kind in (field.kind, field.kind.item) if kind]
    numbers = [(key, kind) for key, kind in kinds if kind.name == "int"]
    assert len(numbers) > 40
    assert [key for key, kind in numbers if kind.le is None and kind.lt is None] == []


@QUICK
@given(configs())
def test_a_config_survives_json(config):
    assert from_json(json.loads(config.model_dump_json())) == config
    assert from_json(json.loads(json.dumps(config.model_dump(mode="json")))) == config


@QUICK
@given(configs())
def test_a_config_survives_the_command_line(config):
    assume(config.generator.target is config.discriminator.target is None)
    overrides = [parse_set(render(key, value)) for key, value in flatten(config).items()]
    assert resolve("dcgan-fm-mmd", None, overrides, need_data=False) == config


@QUICK
@given(st.sampled_from(sorted(FIELDS)), st.data())
def test_a_typo_suggests_the_field(key, data):
    assume(len(key) > 4)
    place = data.draw(st.integers(0, len(key) - 2))
    typo = data.draw(
        st.sampled_from(
            [
                key[:place] + key[place + 1] + key[place] + key[place + 2 :],
                key[:place] + key[place + 1 :],
                key[:place] + data.draw(st.sampled_from(string.ascii_lowercase)) + key[place:],
            ]
        )
    )
    assume(typo not in FIELDS and typo.count(".") == key.count(".") and not typo.startswith("."))
    assume(not any(k != key and _near(typo, k) for k in FIELDS))
    assert f"'{key}'" in message(f"{typo}=1")


def _near(typo, other):
    """Whether one edit could also have come from `other` (`train.augment` and `train.augments` would)."""
    from difflib import SequenceMatcher

    return SequenceMatcher(None, typo, other).ratio() > 1 - 2.5 / max(len(typo), len(other))


@QUICK
@given(st.text(max_size=30), st.text(max_size=30))
def test_no_text_is_anything_but_a_config_or_a_sentence(key, value):
    for text in (f"{key}={value}", f"seed={value}", f"feature_matching.layers={value}", f"data.fit={value}"):
        said = ""
        try:
            sets(text)
        except UserError as error:
            said = str(error)
        assert len(said.splitlines()) <= 1


# ---- a run's config


def test_from_json_file(tmp_path):
    config = sets("seed=3", "feature_matching.layers=block1,-1")
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert from_json(path) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"train": {"stepz": 1}}',
            "this version of fmrun has no field 'train.stepz'; the run was made by a newer",
        ),
        ('{"train": {"steps": 0}}', "train.steps is 0; it must be from 1 to 1,000,000,000"),
        ('{"train": 5}', "train is a section, not a value"),
        ("{", "it is not valid JSON"),
        ("[]", "the top level is a list"),
    ],
)
def test_a_damaged_run_config(tmp_path, text, expected):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        from_json(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)


def test_a_missing_run_config(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        from_json(tmp_path / "config.json")


def test_flatten_has_every_field_in_order():
    flat = flatten(Config())
    assert list(flat) != []
    assert set(flat) == {key for key in FIELDS if not is_optional(key)} | set(OPTIONAL)
    assert [flat[key] for key in OPTIONAL] == [None] * len(OPTIONAL)
    assert all(not isinstance(v, float) or math.isfinite(v) for v in flat.values())


# ---- sections that may be absent


def losses_of(*texts, below=None):
    """`losses` after these `-s`, on top of the table `below`, whatever the task."""
    layers = overlay.Layers()
    layers.table(below or {}, "preset")
    for text in texts:
        layers.override(parse_set(text))
    table = layers.nested()
    layers.stop_if_wrong()
    return LossesConfig.model_validate(table.get("losses", {}))


BELOW = {"losses": {"l1": {"weight": 0.5, "ramp": 3}}}


def test_the_first_setting_makes_the_section():
    assert losses_of().image == {}
    assert losses_of("losses.l1.weight=2").l1.weight == 2
    assert losses_of("losses.hfen={}").hfen == type(losses_of("losses.hfen.weight=1").hfen)()
    assert losses_of("losses.l1={weight=2, start_step=5}").l1.start_step == 5


def test_a_section_is_changed_removed_and_made_anew():
    assert losses_of("losses.l1.weight=2", below=BELOW).l1.ramp == 3
    for word in ("none", "null"):
        assert losses_of(f"losses.l1={word}", below=BELOW).l1 is None
    assert losses_of("losses.l1.weight=2", "losses.l1=none", below=BELOW).image == {}
    anew = losses_of("losses.l1=none", "losses.l1.weight=2", below=BELOW).l1
    assert (anew.weight, anew.ramp) == (2, 0)
    assert losses_of("losses={l1='none'}", below=BELOW).l1 is None
    kept = losses_of("losses.l1={}", below=BELOW).l1
    assert (kept.weight, kept.ramp) == (0.5, 3)
    assert losses_of(below={"losses": {"l1": None}}).l1 is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("losses.l1.weight=1", "-s losses.l1.weight=1: losses.l1 compares each image with its original, which exists in "
         "super-resolution only; task 'generate' has none: remove with losses.l1=none"),
        ("losses.l1=1", "-s losses.l1=1: losses.l1 is a section, not a value; its fields: weight, start_step, ramp, "
         "reduction (or none)"),
        ("losses.gan=none", "-s losses.gan=none: losses.gan is a section, not a value; its fields: "),
        ("losses.l1.weigth=1", "-s losses.l1.weigth=1: there is no field 'losses.l1.weigth'; did you mean "
         "'losses.l1.weight'?"),
        ("losses.l1.weight=-1", "-s losses.l1.weight=-1: losses.l1.weight is -1; it must be 0 or greater"),
        ("losses.perceptual.layer_weights=1,2", "-s losses.perceptual.layer_weights=1,2: layer_weights "
         "has 2 weights for the 5 entries of layers; give one for each"),
        ("losses.hfen.kernel_size=4", "-s losses.hfen.kernel_size=4: kernel_size must be odd, not 4"),
    ],
)  # fmt: skip
def test_mistakes_in_optional_sections(text, expected):
    assert message(text).startswith(expected)


def test_several_paired_losses_are_one_sentence():
    assert message("losses.l1.weight=1", "losses.hfen.weight=1").startswith(
        "-s losses.hfen.weight=1: losses.l1, losses.hfen compare each image with its original"
    )


def test_an_absent_section_survives_a_runs_config():
    data = json.loads(sets("seed=3").model_dump_json())
    assert data["losses"]["l1"] is None
    assert presets.revise(data, [], []) == from_json(data)
    with pytest.raises(UserError, match=r"losses\.l1\.weight would make it another experiment"):
        presets.revise(data, [parse_set("losses.l1.weight=1")], ["train.steps"])


def test_short_names_suggest_what_is_always_there_first():
    assert "'feature_matching.weight'" in message("weight=1")
