"""Config files, and the `losses:` list of super-resolution configs."""

import pytest

from fmrun.config.presets import Override, parse_set, resolve
from fmrun.config.yaml import TYPES
from fmrun.runtime.errors import UserError


def write(tmp_path, text, name="exp.yml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def config(tmp_path, text, name="exp.yml", preset=None, overrides=()):
    return resolve(preset, write(tmp_path, text, name), overrides)


def message(tmp_path, text, name="exp.yml"):
    path = write(tmp_path, text, name)
    with pytest.raises(UserError) as caught:
        resolve(None, path, [])
    said = str(caught.value)
    assert "\n" not in said
    assert "Traceback" not in said
    return said.removeprefix("--config: ").replace(str(path), name)


# ---- files


@pytest.mark.parametrize("name", ["exp.toml", "exp.yaml", "exp.yml", "exp.json", "EXP.YML"])
def test_an_empty_file_is_nothing(tmp_path, name):
    assert config(tmp_path, "", name) == resolve(None, None, [])


def test_a_file_lies_on_the_preset_and_below_the_flags(tmp_path):
    text = "description: mine\ntrain:\n  steps: 7\nseed: 5\n"
    got = config(tmp_path, text, preset="dcgan-fm-mmd", overrides=[Override("--seed", "seed", "6")])
    assert (got.train.steps, got.seed, got.feature_matching.match) == (7, 6, "mmd")


def test_the_flag_comes_before_extends(tmp_path):
    assert config(tmp_path, 'extends = "dcgan-fm-mmd"', "exp.toml", preset="dcgan").feature_matching.weight == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\ntrain:\n  <<: 3\n", "line 3: expected a mapping or list of mappings for merging"),
        ("train:\n  <<: {steps: 1}\n  <<: {steps: 2}\n", "line 3: found duplicate merge key"),
        ("seed: 1\r\nseed: 2\r\n", 'line 2: found duplicate key "seed"'),
        ("train: {}\nseed: !!bool maybe\n", "a value is not what its tag says"),
        ("seed: !!int x\n", "invalid literal"),
        ('train: {}\npreset: "\x01"\n', "unacceptable character #x0001"),
        ("seed: 1\ntrain: [\n", "line 3: "),
        ("a: !!python/object/apply:os.system ['touch PWNED']", "line 1: could not determine a constructor"),
        ("a: !!python/name:os.system ''", "line 1: could not determine a constructor"),
    ],
)
def test_yaml_that_cannot_be_read_is_named_with_its_line(tmp_path, text, said):
    assert message(tmp_path, text).startswith(f"exp.yml: it is not valid YAML ({said}")


def test_merges_of_merges_take_no_memory(tmp_path):
    assert "there is no field 'a'" in message(tmp_path, "a: &a {<<: *a}\n")
    names = "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 30)}]}}\n" for i in range(1, 30))
    assert "there is no field" in message(tmp_path, f"a0: &a0 {{x: 1}}\n{names}")


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, "", "exp.toml")
    with pytest.raises(UserError, match=r"^--config: there is no file '.*exp.tml'; did you mean 'exp.toml'\?$"):
        resolve(None, tmp_path / "exp.tml", [])
    with pytest.raises(UserError, match="is a folder, not a config file"):
        resolve(None, tmp_path, [])
    with pytest.raises(UserError, match="there is no file"):
        resolve(None, tmp_path / "nowhere" / "exp.toml", [])


# ---- losses


def test_a_feature_matching_entry_as_it_stands(tmp_path):
    text = """
losses:
  - type: featurematchingloss
    loss_weight: 0.2
    criterion: l1
    reduction: mean
    start_iter: 0
"""
    got = config(tmp_path, text)
    fm = got.feature_matching
    assert (fm.weight, fm.criterion, fm.reduction, fm.balance, fm.match) == (
        0.2,
        "l1",
        "mean",
        "none",
        "mean",
    )
    assert got.losses == resolve(None, None, []).losses


def test_an_entry_leaves_nothing_of_the_preset(tmp_path):
    base = write(tmp_path, "extends: dcgan-fm-mmd\nlosses: [{type: featurematchingloss, ramp: 9}]")
    fm = resolve(None, base, []).feature_matching
    assert (fm.weight, fm.match, fm.criterion, fm.ramp, fm.balance) == (1.0, "mean", "l1", 9, "none")


def test_an_entry_may_insist_on_a_statistic(tmp_path):
    insist = "losses: [{type: featurematchingloss, match: %s}]"
    assert config(tmp_path, insist % "sample").feature_matching.criterion == "l1"
    assert config(tmp_path, insist % "sliced").feature_matching.criterion is None
    unbiased = "losses: [{type: featurematchingloss, estimator: unbiased}]"
    assert config(tmp_path, unbiased).feature_matching.criterion == "l2"


def test_a_section_beside_the_list_adds_to_it(tmp_path):
    text = "losses: [{type: featurematchingloss, loss_weight: 2}]\nfeature_matching: {%s}"
    fm = config(tmp_path, text % "balance: gradient, ramp: 3").feature_matching
    assert (fm.weight, fm.balance, fm.ramp) == (2.0, "gradient", 3)
    assert message(tmp_path, text % "weight: 3") == (
        "exp.yml: feature_matching.weight and loss_weight of losses entry 1 (featurematchingloss) are the same "
        "setting; give one"
    )


def test_flags_lie_on_top_of_the_list(tmp_path):
    over = [parse_set("feature_matching.weight=3")]
    assert config(tmp_path, "losses: [{type: featurematchingloss}]", overrides=over).feature_matching.weight == 3


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("[{type: ganloss}, {type: GANLoss}]", "losses entry 2: ganloss is already entry 1; each type is given once"),
        ("[{loss_weight: 1}]", "losses entry 1 has no type; known: featurematchingloss, ganloss, l1loss"),
        ("[ganloss]", "losses entry 1 is 'ganloss'; it must be a table with a type, like {type: ganloss}"),
        ("[{type: ganloss, weight: 1, loss_weight: 1}]", "losses entry 1 (ganloss): weight and loss_weight are the same "
         "setting; give one"),
        ("[{type: featurematchingloss, start_iter: 5}, {type: ganloss, start_iter: 5}]", "losses entry 2 (ganloss): the "
         "generator has nothing to learn from before step 5: losses.gan.start_step or feature_matching.start_step must be 0"),
    ],
)  # fmt: skip
def test_mistakes_in_the_list(tmp_path, entries, expected):
    assert message(tmp_path, f"losses: {entries}").startswith(f"exp.yml: {expected}")


@pytest.mark.parametrize("name", sorted(t for t, target in TYPES.items() if target.has_targets))
def test_paired_losses_are_known_and_named(tmp_path, name):
    assert f"exp.yml: losses entry 1 ({name}) belongs to super-resolution" in message(
        tmp_path, f"losses: [{{type: {name}}}]"
    )


def test_a_later_start_of_the_adversarial_loss(tmp_path):
    text = "losses: [{type: featurematchingloss}, {type: ganloss, gan_type: r3gan, start_iter: 20000}]"
    assert config(tmp_path, text).losses.gan.start_step == 20000


# ---- super-resolution


def upscaling(tmp_path, text):
    """What a file for super-resolution with this text says of the losses."""
    got = config(tmp_path, f"task: upscale\ngenerator: {{type: compact}}\n{text}", preset="munet-x2")
    return got.losses, got.feature_matching


BASIC = """
# A losses block as it is usually added to an existing super-resolution config.
losses:
  - type: featurematchingloss
    loss_weight: 0.2
    criterion: l1
    reduction: mean
    start_iter: 0
"""
COMBINED = """
losses:
  - type: charbonnierloss
    loss_weight: 0.5
  - type: convnextperceptualloss
    loss_weight: 0.2
  - type: ffloss
    loss_weight: 0.3
  - type: featurematchingloss
    loss_weight: 0.1
    layers: [1, 3, 5, 9]
    criterion: l1
  - type: hfenloss
    loss_weight: 0.02
  - type: ganloss
    gan_type: r3gan
    loss_weight: 0.05
    start_iter: 20000
"""
SELECTED = """
losses:
  - type: FeatureMatchingLoss
    loss_weight: 0.05
    layers: [0, 2, 4, 5]
    criterion: charbonnier
    reduction: sum
    eps: 1e-6
    start_iter: 500
  - type: ganloss
    gan_type: vanilla
    loss_weight: 0.1
"""


def test_feature_matching_alone_leaves_the_presets_losses(tmp_path):
    losses, fm = upscaling(tmp_path, BASIC)
    assert (fm.weight, fm.match, fm.criterion, fm.balance) == (0.2, "sample", "l1", "none")
    assert losses == resolve("munet-x2", None, []).losses


def test_a_list_of_many_losses(tmp_path):
    losses, fm = upscaling(tmp_path, COMBINED)
    weights = {name: config.weight for name, config in losses.image.items()}
    assert weights == {"charbonnier": 0.5, "convnext": 0.2, "frequency": 0.3, "hfen": 0.02}
    assert (losses.gan.type, losses.gan.weight, losses.gan.start_step) == ("r3gan", 0.05, 20000)
    assert (fm.weight, fm.layers, fm.match, fm.criterion) == (0.1, (1, 3, 5, 9), "sample", "l1")


def test_selected_layers(tmp_path):
    losses, fm = upscaling(tmp_path, SELECTED)
    assert losses.image == {}
    assert (losses.gan.type, losses.gan.weight) == ("vanilla", 0.1)
    assert (fm.layers, fm.criterion, fm.reduction, fm.eps, fm.start_step) == (
        (0, 2, 4, 5),
        "charbonnier",
        "sum",
        1e-6,
        500,
    )


PAIRED = {
    "l1loss": "l1",
    "mseloss": "l2",
    "charbonnierloss": "charbonnier",
    "perceptualloss": "perceptual",
    "convnextperceptualloss": "convnext",
    "mobilenetperceptualloss": "mobilenet",
    "ffloss": "frequency",
    "hfenloss": "hfen",
    "distsloss": "dists",
    "lpipsloss": "lpips",
}


def test_every_paired_type_has_its_section():
    assert {name for name, target in TYPES.items() if target.has_targets} == set(PAIRED)


@pytest.mark.parametrize(("type_", "name"), PAIRED.items())
def test_a_paired_entry_as_it_stands(tmp_path, type_, name):
    alone, _ = upscaling(tmp_path, f"losses: [{{type: {type_}}}]")
    assert list(alone.image) == [name]
    assert alone.image[name].weight == 1.0
    entries = f"[{{type: {type_.upper()}, loss_weight: 0.25, start_iter: 7, ramp: 3}}, {{type: ganloss}}]"
    section = upscaling(tmp_path, f"losses: {entries}")[0].image[name]
    assert (section.weight, section.start_step, section.ramp) == (0.25, 7, 3)
    assert alone.gan.weight == 0, "a list without a ganloss has no adversarial term"


def test_keys_of_that_style(tmp_path):
    losses, _ = upscaling(
        tmp_path,
        """
losses:
  - {type: charbonnierloss, eps: 1e-8, reduction: sum}
  - {type: ffloss, alpha: 0.5, patch_factor: 2, ave_spectrum: false, log_matrix: true, batch_matrix: true}
  - {type: hfenloss, criterion: l1, kernel_size: 9, sigma: 1.5, eps: 1e-6, reduction: mean}
  - {type: perceptualloss, layer_weights: {conv3_4: 1, conv5_4: 0.5}, criterion: charbonnier, w_lambda: 0.01, alpha: ~}
  - {type: convnextperceptualloss, layers: [1, 2], layer_weights: [1.0, 0.5], eps: 1e-6}
  - {type: distsloss, as_loss: true, load_weights: true, use_input_norm: true, clip_min: 0}
""",
    )
    assert (losses.charbonnier.eps, losses.charbonnier.reduction) == (1e-8, "sum")
    f = losses.frequency
    assert (f.alpha, f.patch_factor, f.average_spectrum, f.log_weights, f.batch_weights) == (0.5, 2, False, True, True)
    h = losses.hfen
    assert (h.criterion, h.kernel_size, h.sigma, h.eps) == ("l1", 9, 1.5, 1e-6)
    assert (losses.perceptual.layers, losses.perceptual.layer_weights) == (("conv3_4", "conv5_4"), (1.0, 0.5))
    assert (losses.convnext.layers, losses.convnext.layer_weights) == ((1, 2), (1.0, 0.5))
    assert losses.dists.weight == 1.0


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("{type: perceptualloss, antialiased: true}", "losses entry 1 (perceptualloss): antialiased is true; fmrun offers "
         "false only"),
        ("{type: perceptualloss, layers: [pool1], layer_weights: {pool1: 1}}", "losses entry 1 (perceptualloss): layers and "
         "the names in layer_weights are the same setting; give one"),
    ],
)  # fmt: skip
def test_mistakes_in_paired_entries(tmp_path, entry, expected):
    assert message(tmp_path, f"task: upscale\nlosses: [{entry}]") == f"exp.yml: {expected}"
