"""The reference page and the editors' schema are current."""

import json

from fmrun.config import presets, reference
from fmrun.config.fields import FIELDS, SECTIONS, takes


def test_the_committed_pages_are_current():
    old = [name for name, text in reference.pages().items() if (reference.DOCS / name).read_text("utf-8") != text]
    assert old == [], "run python -m fmrun.config.reference"


def test_everything_is_described():
    assert [key for key, setting in FIELDS.items() if not setting.description] == []
    assert [key for key, info in SECTIONS.items() if not info.description] == []


def test_the_page_shows_every_field_and_preset():
    page = reference.markdown()
    for key in FIELDS:
        section, _, name = key.rpartition(".")
        part = page.split(f"## `{section}`" if section else "## Top level")[1].split("\n## ")[0]
        assert f"| `{name}` |" in part
    for name in presets.names():
        assert f"| `{name}` |" in page


def test_types_read_well():
    def said(key: str) -> str:
        return " | ".join(takes(FIELDS[key].schema))

    assert said("discriminator.norm") == "batch | spectral | group | instance | none"
    assert said("feature_matching.weight") == "a number, 0 or greater"
    assert said("feature_matching.layers") == "a list of one or more names or indices"
    assert said("optim.clip_grad_norm") == "a number, greater than 0 | none"
    assert said("compile") == "true | false"
    assert said("data.degradation.first.jpeg.quality") == "a list of 2 whole numbers, each from 1 to 100"


def test_the_schema_admits_what_files_say():
    schema = json.loads(json.dumps(reference.schema()))
    assert {"extends", "description", "losses"} <= set(schema["properties"])
    options = schema["$defs"]["FeatureMatchingConfig"]["properties"]["criterion"]["anyOf"]
    assert {"const": "none"} in options
