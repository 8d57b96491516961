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

from fmrun.config import overrides as overlay
from fmrun.config import presets
from fmrun.config.acting import ACTS, idle
from fmrun.config.fields import FIELDS, NONE_WORDS, OPTIONAL, SECTIONS
from fmrun.config.presets import Override, flatten, from_json, parse_set, render, resolve
from fmrun.config.schema import Config
from fmrun.runtime.errors import UserError

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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


def test_listing_presets_imports_no_pydantic():
    code = (
        "import sys; from fmrun.config import presets; presets.names(); presets.describe('dcgan'); "
        "sys.exit(any(m in sys.modules for m in ('pydantic', 'torch', 'numpy', 'yaml')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- -s


def test_shorthands_name_fields():
    assert set(overlay.SHORTHANDS.values()) <= set(FIELDS)


def test_many_mistakes_are_counted():
    assert message(*[f"x{n}yzzy=1" for n in range(9)]).endswith("; and 4 more")


# ---- properties

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def values(schema: dict):
    """What a JSON schema of a setting allows."""
    if choices := schema.get("examples") or schema.get("enum") or [schema[k] for k in ("const",) if k in schema]:
        return st.sampled_from(choices)
    if "anyOf" in schema:
        return st.one_of(*map(values, schema["anyOf"]))
    kind = schema["type"]
    if kind == "array":
        item = schema["prefixItems"][0] if "prefixItems" in schema else schema["items"]
        return st.lists(values(item), min_size=schema.get("minItems", 0), max_size=schema.get("maxItems", 4))
    if kind == "integer":
        top = schema.get("maximum", schema.get("exclusiveMaximum", 21) - 1)
        return st.integers(schema.get("minimum", -20), top)
    if kind == "number":
        low, high = (schema.get(f"exclusive{m.title()}", schema.get(m)) for m in ("minimum", "maximum"))
        ends = {"exclude_min": "exclusiveMinimum" in schema, "exclude_max": "exclusiveMaximum" in schema}
        return st.floats(low, high, allow_nan=False, allow_infinity=False, **ends)
    if kind == "object":
        return st.just({})
    return {"null": st.none(), "boolean": st.booleans()}.get(
        kind, TEXT.filter(lambda text: text and text not in NONE_WORDS)
    )  # which say none


@st.composite
def configs(draw):
    always = sorted(key for key in FIELDS if key.rpartition(".")[0] not in OPTIONAL)
    keys = draw(st.lists(st.sampled_from(always), unique=True, max_size=8))
    data: dict = {}
    for key in keys:
        *sections, name = key.split(".")
        table = data
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = draw(values(FIELDS[key].schema))
    try:
        return Config.model_validate(data)
    except ValidationError:
        assume(False)


@st.composite
def acting_configs(draw):
    """Configs in which what does not act has its default: the command line refuses it otherwise."""
    config = draw(configs())
    data = config.model_dump()
    for key in FIELDS:
        if idle(config, key):
            *sections, name = key.split(".")
            table = data
            for section in sections:
                table = table[section]
            del table[name]
    return Config.model_validate(data)


def test_every_whole_number_has_an_upper_bound():
    def numbers(schema):
        inner = [
            *schema.get("anyOf", ()),
            *schema.get("prefixItems", ()),
            *[schema[k] for k in ("items",) if k in schema],
        ]
        return [schema] * (schema.get("type") == "integer" and "enum" not in schema) + [
            n for part in inner for n in numbers(part)
        ]

    found = {key: numbers(field.schema) for key, field in FIELDS.items() if not key.endswith("layers")}
    assert sum(map(len, found.values())) > 40
    unbounded = [k for k, schemas in found.items() for n in schemas if not {"maximum", "exclusiveMaximum"} & n.keys()]
    assert unbounded == []


@QUICK
@given(configs())
def test_a_config_survives_json(config):
    assert from_json(json.loads(config.model_dump_json())) == config
    assert from_json(json.loads(json.dumps(config.model_dump(mode="json")))) == config


@QUICK
@given(acting_configs())
def test_a_config_survives_the_command_line(config):
    assume(config.generator.target is config.discriminator.target is None)
    assert not any(idle(config, key) for key in FIELDS)
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


# ---- settings without effect


@pytest.mark.parametrize(
    ("preset", "texts", "expected"),
    [
        ("munet-x2-cpu", ["generator.type=span"], {"generator.blocks": None, "generator.features": 24}),
        ("dcgan-64", ["generator.target=own_nets:Net"], {"generator.width": 32}),
        ("dcgan-fm-mse", ["feature_matching.match=mmd"], {"feature_matching.criterion": None}),
    ],
)
def test_what_a_preset_sets_goes_with_the_choice_that_it_follows(preset, texts, expected, monkeypatch):
    monkeypatch.setattr("fmrun.config.trust.admit", lambda *_: None)
    got = flatten(resolve(preset, None, [parse_set(text) for text in texts], need_data=False))
    assert {key: got[key] for key in expected} == expected


def test_what_the_table_of_settings_names_is_there():
    known = {*FIELDS, *SECTIONS}
    assert {*ACTS, *(selector for selector, _ in ACTS.values())} <= known
    for selector, values in ACTS.values():
        schema = FIELDS[selector].schema
        assert set(values) <= {*schema.get("enum", values), *range(0)}


def test_an_older_run_with_a_setting_without_effect_is_read_and_resumed():
    data = json.loads(resolve("munet-x2-cpu", None, []).model_dump_json())
    data["generator"]["width"] = 4
    data["losses"]["ldl"] = None
    assert presets.revise(data, [parse_set("log.every=7")], ["log."]).generator.width == 4
    with pytest.raises(UserError, match=r"eval\.kid_every is for task generate, not upscale"):
        presets.revise(data, [parse_set("eval.kid_every=7")], ["eval."])
    data["losses"]["ldl"] = {"weight": 1.0}
    with pytest.raises(UserError, match=r"has no field 'losses\.ldl\.weight'"):
        presets.revise(data, [], [])


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
            "this version of fmrun has no field 'train.stepz'; the run was made by another",
        ),
        ('{"train": {"steps": 0}}', "train.steps is 0; it must be a whole number, from 1 to 1,000,000,000"),
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
    assert set(flat) == {key for key in FIELDS if key.rpartition(".")[0] not in OPTIONAL} | set(OPTIONAL)
    assert [flat[key] for key in OPTIONAL] == [None] * len(OPTIONAL)
    assert all(not isinstance(v, float) or math.isfinite(v) for v in flat.values())


# ---- sections that may be absent


def losses_of(*texts, below=None):
    """`losses` after these `-s`, on top of the table `below`."""
    layers = overlay.Layers()
    layers.table({"task": "upscale", "generator": {"type": "compact"}, **(below or {})}, "preset")
    for text in texts:
        layers.override(parse_set(text))
    return layers.config().losses


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
        ("losses.gan=none", "losses.gan is a section, not a value; its fields: "),
        ("losses.l1.weigth=1", "there is no field 'losses.l1.weigth'; did you mean 'losses.l1.weight'?"),
        ("losses.l1.weight=-1", "losses.l1.weight is -1; it must be a number, 0 or greater"),
        ("losses.perceptual.layer_weights=1,2", "losses.perceptual: layer_weights has 2 weights for the 5 entries of"),
        ("losses.hfen.kernel_size=4", "losses.hfen: kernel_size must be odd, not 4"),
    ],
)
def test_mistakes_in_optional_sections(text, expected):
    assert message(text).startswith(f"-s {text}: {expected}")


def test_an_absent_section_survives_a_runs_config():
    data = json.loads(sets("seed=3").model_dump_json())
    assert data["losses"]["l1"] is None
    assert presets.revise(data, [], []) == from_json(data)
    with pytest.raises(UserError, match=r"losses\.l1\.weight would make it another experiment"):
        presets.revise(data, [parse_set("losses.l1.weight=1")], ["train.steps"])


def test_short_names_suggest_what_is_always_there_first():
    assert "'feature_matching.weight'" in message("weight=1")
