"""Config files, and the `losses:` list of super-resolution configs."""

import pytest
import yaml

from fmrun.config import FeatureMatchingConfig, LossesConfig
from fmrun.config.fields import FIELDS
from fmrun.errors import UserError
from fmrun.presets import Override, parse_set, resolve
from fmrun.yaml_config import TYPES, read_losses


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


def test_extends_names_the_base_and_the_flag_comes_before_it(tmp_path):
    text = 'extends = "dcgan-fm-mmd"\nseed = 1\n'
    assert config(tmp_path, text, "exp.toml").feature_matching.match == "mmd"
    assert config(tmp_path, text, "exp.toml", preset="dcgan").feature_matching.weight == 0


def test_yaml_numbers_and_words(tmp_path):
    text = "optim:\n  generator:\n    lr: 1e-4\nseed: 010\ndata:\n  path: 2024-01-01\ncompile: yes\ntrain:\n"
    got = config(tmp_path, text)
    assert (got.optim.generator.lr, got.seed, got.data.path, got.compile) == (1e-4, 10, "2024-01-01", True)


MERGED = """\
optim:
  generator: &adam {lr: 1e-4, eps: 0.1}
  discriminator:
    lr: 2e-4
    <<: [*adam, {eps: 0.3, betas: [0.2, 0.7]}]
"""


@pytest.mark.parametrize("text", [MERGED, f"\ufeff{MERGED}", MERGED.replace("\n", "\r\n")])
def test_yaml_merges_tables_and_comes_from_any_editor(tmp_path, text):
    optim = config(tmp_path, text).optim
    assert (optim.generator.lr, optim.generator.eps) == (1e-4, 0.1)
    assert (optim.discriminator.lr, optim.discriminator.eps, optim.discriminator.betas) == (2e-4, 0.1, (0.2, 0.7))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\ntrain:\n\tsteps: 3\n", "exp.yml, line 3: it is not valid YAML (a tab where only spaces may be)"),
        ("seed: 1\ntrain:\n  <<: 3\n", "exp.yml, line 3: '<<' is given once, with a table or a list of tables"),
        ("train:\n  <<: {steps: 1}\n  <<: {steps: 2}\n", "exp.yml, line 3: '<<' is given once"),
        ("seed: 1\r\nseed: 2\r\n", "exp.yml, line 2: 'seed' is given twice"),
        ("train: {}\nseed: !!bool maybe\n", "exp.yml, line 2: it is not valid YAML ('maybe')"),
        ("train: {}\nseed: !!set {a}\n", "exp.yml, line 2: it is not valid YAML (could not determine a constructor"),
        ('train: {}\npreset: "\x01"\n', "exp.yml, line 2: it is not valid YAML (a control character, 0x01)"),
    ],
)
def test_yaml_that_cannot_be_read_is_named_with_its_line(tmp_path, text, said):
    assert message(tmp_path, text).startswith(said)


def test_merges_of_merges_take_no_memory(tmp_path):
    names = "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 30)}]}}\n" for i in range(1, 30))
    assert "there is no field" in message(tmp_path, f"a0: &a0 {{x: 1}}\n{names}")


def test_none_clears_in_files(tmp_path):
    assert config(tmp_path, 'feature_matching.criterion = "none"', "exp.toml").feature_matching.criterion is None
    assert config(tmp_path, "optim: {clip_grad_norm: null}").optim.clip_grad_norm is None


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "exp.toml",
            'discriminator.norm = "btach"',
            "exp.toml: discriminator.norm is 'btach'; allowed: batch, spectral, group, instance, none; did you mean 'batch'?",
        ),
        ("exp.toml", "seed = 1\nseed = 2", "exp.toml, line 2: it is not valid TOML (a setting is given twice)"),
        ("exp.toml", "seed == 1", "exp.toml, line 1: it is not valid TOML (Invalid value)"),
        ("exp.yml", "seed: 1\ntrain: {}\nseed: 2\n", "exp.yml, line 3: 'seed' is given twice"),
        ("exp.yml", "train:\n  steps: 1\n  steps: 2\n", "exp.yml, line 3: 'steps' is given twice"),
        ("exp.yml", "? [a]\n: 1\n", "exp.yml, line 1: a key must be a name"),
        ("exp.json", '{"seed": 1, "seed": 2}', "exp.json: 'seed' is given twice"),
        ("exp.json", '{\n"seed" 1}', "exp.json, line 2: it is not valid JSON (Expecting ':' delimiter)"),
        ("exp.yml", "- a\n", "exp.yml: the top level is a list; a config is a table of settings, like seed = 0"),
        ("exp.yml", "hello", "exp.yml: the top level is a single value; a config is a table of settings, like seed = 0"),
        ("exp.yml", b"seed: \xff", "cannot read exp.yml: it is not UTF-8 text; save it as UTF-8"),
        ("exp.txt", "seed: 1", "exp.txt: a config file ends in .toml, .yaml, .yml or .json"),
        ("exp.yml", "1: 2", "exp.yml: there is no field '1'"),
        ("exp.yml", "ema: 5", "exp.yml: ema is a section, not a value; its fields: decay, warmup"),
        ("exp.yml", "data: {path: 7}", "exp.yml: data.path is 7; it must be text; put it in quotes"),
        ("exp.yml", "seed: true", "exp.yml: seed is true; it must be a whole number, 0 or greater and less than 2^63"),
        ("exp.yml", "ema: {decay: .nan}", "exp.yml: ema.decay is nan; it must be a finite number, 0 or greater and "
         "less than 1"),
        (
            "exp.yml",
            "discriminator: {norm: no}",
            "exp.yml: discriminator.norm is false; put it in quotes (a bare yes, no, on or off is a truth value in "
            "YAML); allowed: batch, spectral, group, instance, none",
        ),
        (
            "exp.toml",
            'extends = "dcgn"',
            "exp.toml: extends: there is no preset 'dcgn'; did you mean 'dcgan'? (fmrun presets lists them)",
        ),
        (
            "exp.toml",
            "seed = -1\ntrain.stpes = 1\n",
            "exp.toml: there is no field 'train.stpes'; did you mean 'train.steps'?; and more",
        ),
        ("exp.toml", "train.accumulate = 3", "exp.toml: train: accumulate 3 does not divide batch_size 64"),
    ],
)  # fmt: skip
def test_mistakes_in_files(tmp_path, name, text, expected):
    got = message(tmp_path, text, name)
    assert got.startswith(expected.removesuffix("; and more"))


def test_yaml_syntax_names_the_line(tmp_path):
    assert message(tmp_path, "seed: 1\ntrain: [\n").startswith("exp.yml, line 3: it is not valid YAML (")
    assert message(tmp_path, "a: 1\n---\nb: 2\n").startswith("exp.yml, line 2: it is not valid YAML (")
    assert "it is not valid YAML" in message(tmp_path, "a: !!python/object/apply:os.system ['true']")


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


def test_layers_and_an_adversarial_loss(tmp_path):
    text = """
losses:
  - type: Feature_Matching_Loss
    loss_weight: 0.05
    layers: [0, 2, 4, 5]
    criterion: charbonnier
    reduction: sum
    eps: 1e-6
    start_iter: 500
  - type: ganloss
    gan_type: hinge
    loss_weight: 0.1
"""
    got = config(tmp_path, text)
    fm = got.feature_matching
    assert (fm.layers, fm.criterion, fm.reduction, fm.eps, fm.start_step) == (
        (0, 2, 4, 5),
        "charbonnier",
        "sum",
        1e-6,
        500,
    )
    assert (got.losses.gan.type, got.losses.gan.weight) == ("hinge", 0.1)


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


def test_per_sample_where_images_correspond():
    paired = read_losses([{"type": "featurematchingloss"}], "upscale")
    assert {s.key: s.value for s in paired.settings}["feature_matching.match"] == "sample"


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
        ("[{type: l1_loss}]", "l1_loss belongs to super-resolution, where every image has its original; task 'generate' "
         "takes featurematchingloss and ganloss only"),
        ("[{type: ganlos}]", "losses entry 1: there is no loss type 'ganlos'; did you mean 'ganloss'?"),
        ("[{type: ganloss}, {type: GANLoss}]", "losses entry 2: ganloss is already entry 1; each type is given once"),
        ("[{loss_weight: 1}]", "losses entry 1 has no type; known: featurematchingloss, ganloss, l1loss"),
        ("[ganloss]", "losses entry 1 is 'ganloss'; it must be a table with a type, like {type: ganloss}"),
        ("[{type: ganloss, los_weight: 1}]", "losses entry 1 (ganloss): there is no key 'los_weight'; did you mean "
         "'loss_weight'?"),
        ("[{type: ganloss, weight: 1, loss_weight: 1}]", "losses entry 1 (ganloss): weight and loss_weight are the same "
         "setting; give one"),
        ("[{type: ganloss, loss_weight: -1}]", "losses entry 1 (ganloss): loss_weight is -1; it must be 0 or greater"),
        ("[{type: ganloss, gan_type: hing}]", "losses entry 1 (ganloss): gan_type is 'hing'; allowed: vanilla, lsgan, "
         "hinge, wgan, r3gan; did you mean 'hinge'?"),
        ("[{type: featurematchingloss, start_iter: 5}, {type: ganloss, start_iter: 5}]", "losses entry 1 "
         "(featurematchingloss): the generator has nothing to learn from before step 5: losses.gan.start_step or "
         "feature_matching.start_step must be 0"),
    ],
)  # fmt: skip
def test_mistakes_in_the_list(tmp_path, entries, expected):
    said = message(tmp_path, f"losses: {entries}")
    assert said.startswith("exp.yml: ")
    assert expected.split(": ")[-1] in said
    if "nothing to learn" not in expected:
        assert said.startswith(f"exp.yml: {expected}")


@pytest.mark.parametrize("name", sorted(t for t, target in TYPES.items() if target.paired))
def test_paired_losses_are_known_and_named(tmp_path, name):
    assert f"exp.yml: {name} belongs to super-resolution" in message(tmp_path, f"losses: [{{type: {name}}}]")


def test_a_later_start_of_the_adversarial_loss(tmp_path):
    text = "losses: [{type: featurematchingloss}, {type: ganloss, gan_type: r3gan, start_iter: 20000}]"
    assert config(tmp_path, text).losses.gan.start_step == 20000


# ---- super-resolution


def sections(text):
    """The sections that a `losses:` list makes for super-resolution, each validated by itself."""
    losses = read_losses(yaml.safe_load(text)["losses"], "upscale")
    table: dict = {}
    for setting in losses.settings:
        inner = table
        *path, name = setting.key.split(".")
        for part in path:
            inner = inner.setdefault(part, {})
        inner[name] = FIELDS[setting.key].kind.coerce(setting.value)
    return (
        LossesConfig.model_validate(table.get("losses", {})),
        FeatureMatchingConfig.model_validate(table.get("feature_matching", {})),
        losses.replaces,
    )


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


def test_feature_matching_alone_leaves_the_presets_losses():
    losses, fm, replaces = sections(BASIC)
    assert replaces == ("feature_matching",)
    assert (fm.weight, fm.match, fm.criterion, fm.balance) == (0.2, "sample", "l1", "none")
    assert losses == LossesConfig()


def test_a_list_of_many_losses():
    losses, fm, replaces = sections(COMBINED)
    assert replaces == ("feature_matching", "losses")
    assert {name: config.weight for name, config in losses.image.items()} == {
        "charbonnier": 0.5,
        "convnext": 0.2,
        "frequency": 0.3,
        "hfen": 0.02,
    }
    assert (losses.gan.type, losses.gan.weight, losses.gan.start_step) == ("r3gan", 0.05, 20000)
    assert (fm.weight, fm.layers, fm.match, fm.criterion) == (0.1, (1, 3, 5, 9), "sample", "l1")


def test_selected_layers():
    losses, fm, _ = sections(SELECTED)
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
    "ldlloss": "ldl",
}


def test_every_paired_type_has_its_section():
    assert {name for name, target in TYPES.items() if target.paired} == set(PAIRED)


@pytest.mark.parametrize(("type_", "name"), PAIRED.items())
def test_a_paired_entry_as_it_stands(type_, name):
    alone, _, _ = sections(f"losses: [{{type: {type_}}}]")
    assert list(alone.image) == [name]
    assert alone.image[name].weight == 1.0
    losses, _, _ = sections(f"losses: [{{type: {type_.upper()}, loss_weight: 0.25, start_iter: 7, ramp: 3}}]")
    section = losses.image[name]
    assert (section.weight, section.start_step, section.ramp) == (0.25, 7, 3)
    assert losses.gan.weight == 0, "a list without a ganloss has no adversarial term"


def test_keys_of_that_style():
    losses, _, _ = sections(
        """
losses:
  - {type: charbonnierloss, eps: 1e-8, reduction: sum}
  - {type: ffloss, alpha: 0.5, patch_factor: 2, ave_spectrum: false, log_matrix: true, batch_matrix: true}
  - {type: hfenloss, criterion: l1, kernel_size: 9, sigma: 1.5, eps: 1e-6, reduction: mean}
  - {type: perceptualloss, layer_weights: {conv3_4: 1, conv5_4: 0.5}, criterion: charbonnier, w_lambda: 0.01, alpha: ~}
  - {type: convnextperceptualloss, layers: [1, 2], layer_weights: [1.0, 0.5], eps: 1e-6}
  - {type: distsloss, as_loss: true, load_weights: true, use_input_norm: true, clip_min: 0}
"""
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
        ("{type: charbonnierloss, epz: 1}", "losses entry 1 (charbonnierloss): there is no key 'epz'; did you mean 'eps'?"),
        ("{type: hfnloss}", "losses entry 1: there is no loss type 'hfnloss'; did you mean 'hfenloss'?"),
    ],
)  # fmt: skip
def test_mistakes_in_paired_entries(entry, expected):
    with pytest.raises(UserError) as caught:
        sections(f"losses: [{entry}]")
    assert str(caught.value) == expected


@pytest.mark.parametrize("text", [BASIC, COMBINED, SELECTED])
def test_whole_configs_resolve_for_super_resolution(tmp_path, text):
    path = write(tmp_path, "task: upscale\ngenerator: {type: compact}\n" + text)
    got = resolve(None, path, [], need_data=False)
    losses, fm, replaces = sections(text)
    assert got.feature_matching == fm
    if "losses" in replaces:
        assert got.losses == losses
