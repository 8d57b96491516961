"""What can be typed and written, good and bad, and what becomes of it: a value, or one sentence with the fix in it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from fmrun.config.overrides import SHORTHANDS
from fmrun.config.presets import FREE_ON_RESUME, Override, flatten, parse_set, resolve, revise
from fmrun.config.schema import Config
from fmrun.runtime.errors import UserError


def overrides(words: list[str]) -> list[Override]:
    pairs = zip(words[::2], words[1::2], strict=True)
    return [parse_set(text) if flag == "-s" else Override(flag, SHORTHANDS[flag], text) for flag, text in pairs]


def resolved(tail: str, file: Path | None = None) -> Config:
    """The config of `fmrun train` with these arguments."""
    words = shlex.split(tail)
    at = words.index("--preset") if "--preset" in words else None
    preset = None if at is None else words[at + 1]
    return resolve(preset, file, overrides(words if at is None else words[:at] + words[at + 2 :]), need_data=False)


def sentence(error: UserError) -> str:
    text = str(error)
    assert len(text.splitlines()) == 1
    return text


GOOD: dict[str, Any] = {
    "-s seed=007": 7,
    "-s seed=1e3": 1000,
    "-s train.steps=1_000": 1000,
    "--steps 0x10": 16,
    "--batch-size 32": 32,
    "-s optim.generator.lr=1e-4": 0.0001,
    "--lambda-feature .5": 0.5,
    "-s data.path=007": "007",
    "-s data.path=2024-01-01": "2024-01-01",
    "-s 'data.path=a=b'": "a=b",
    "-s data.valid_path=none": None,
    "-s \"data.valid_path='none'\"": None,
    "-s data.channels=null": None,
    "-s data.image_size=28": 28,
    "-s discriminator.norm=none": "none",
    "-s feature_matching.balance=null": "none",
    "-s compile=true": True,
    "--device cuda:1": "cuda:1",
    "-s losses.gan.type=BCE": "vanilla",
    "-s losses.gan.type=Wasserstein": "wgan",
    "-s feature_matching.layers=1,3,5": [1, 3, 5],
    "--layers key": ["key"],
    "--layers -1": [-1],
    "-s 'feature_matching.layers=[\"block1\", -1]'": ["block1", -1],
    "-s 'feature_matching.layers=[block1, block2.conv]'": ["block1", "block2.conv"],
    "-s feature_matching.layer_weights=0.1,1": [0.1, 1.0],
    "-s feature_matching.layer_weights=uniform": "uniform",
    "-s optim.generator.betas=0,.9": [0.0, 0.9],
    "-s train.augment=color,cutout": ["color", "cutout"],
    "-s train.augment=none": [],
    "-s 'losses.gan={type = \"hinge\", weight = 2}'": {
        "losses.gan.type": "hinge",
        "losses.gan.weight": 2.0,
        "losses.gan.start_step": 0,
        "losses.gan.ramp": 0,
        "losses.gan.r1": 0.0,
        "losses.gan.r2": 0.0,
        "losses.gan.penalty_every": 1,
    },
    "-s seed=1 -s seed=2": 2,
    "-s train.steps=5 --steps 6": 6,
    "--preset dcgan-fm-mse -s feature_matching.criterion=none": None,
    "--preset munet-x2 -s losses.l1.weight=2": 2.0,
    "--preset munet-x2 -s losses.charbonnier=none -s losses.l2.weight=1": 1.0,
    "-s compile=yes": True,
    "--preset dcgan-fm-mse -s feature_matching.match=mmd": "mmd",
}

BAD = {
    "--preset munet-x2-cpu -s generator.width=4": "-s generator.width=4: generator.width is for type dcgan, not compact, which has features, blocks; leave it out",
    "-s train.stpes=5": "-s train.stpes=5: there is no field 'train.stpes'; did you mean 'train.steps'?",
    "-s batch_size=3": "-s batch_size=3: there is no field 'batch_size'; did you mean 'train.batch_size'?",
    "-s lambda_feature=1": "-s lambda_feature=1: there is no field 'lambda_feature'; did you mean 'feature_matching.weight'?",
    "-s lr=1": "-s lr=1: there is no field 'lr'; did you mean 'optim.generator.lr' or 'optim.discriminator.lr'?",
    "-s xyzzy=3": "-s xyzzy=3: there is no field 'xyzzy'; `fmrun presets dcgan` lists them",
    "-s trian.steps=3": "-s trian.steps=3: there is no field 'trian.steps'; did you mean 'train.steps'?",
    "-s train.steps": "-s train.steps: there is no '='; write it as -s KEY=VALUE, like -s train.steps=100",
    "-s =5": "-s =5: there is no field before '='; write it as -s KEY=VALUE, like -s train.steps=100",
    "-s ema=5": "-s ema=5: ema is a section, not a value; its fields: decay, warmup",
    "-s 'ema={dcay = 1}'": "-s ema={dcay = 1}: there is no field 'ema.dcay'; did you mean 'ema.decay'?",
    "--steps abc": "--steps: train.steps is 'abc'; it must be a whole number, from 1 to 1,000,000,000",
    "--steps 0": "--steps: train.steps is 0; it must be a whole number, from 1 to 1,000,000,000",
    "--steps 2.5": "--steps: train.steps is 2.5; it must be a whole number, from 1 to 1,000,000,000",
    "-s train.steps=": "-s train.steps=: train.steps is ''; it must be a whole number, from 1 to 1,000,000,000",
    "-s seed=true": "-s seed=true: seed is 'true'; it must be a whole number, 0 or greater and less than 2^63",
    "--seed -1": "--seed: seed is -1; it must be a whole number, 0 or greater and less than 2^63",
    "--lambda-feature -1": "--lambda-feature: feature_matching.weight is -1; it must be a number, 0 or greater",
    "--lambda-feature inf": "--lambda-feature: feature_matching.weight is inf; it must be a number, 0 or greater",
    "-s ema.decay=1": "-s ema.decay=1: ema.decay is 1; it must be a number, 0 or greater and less than 1",
    "-s compile=maybe": "-s compile=maybe: compile is 'maybe'; it must be true or false",
    "-s data.image_size=33": "-s data.image_size=33: data.image_size is 33; allowed: 28, 32, 64, 128",
    "-s data.path=": "-s data.path=: data.path is ''; it must be text, not empty",
    "-s precision=FP31": "-s precision=FP31: precision is 'FP31'; allowed: auto, fp32, bf16, fp16, fp64; did you mean 'fp32'?",
    "--device gpu": "--device: device is 'gpu'; allowed: auto, cpu, cuda, cuda:0, mps; did you mean 'cpu'?",
    "-s optim.generator.betas=0.5": "-s optim.generator.betas=0.5: optim.generator.betas is '0.5'; it must be a list of 2 numbers, each 0 or greater and less than 1",
    "-s optim.generator.betas=0.5,1": "-s optim.generator.betas=0.5,1: optim.generator.betas is '0.5,1'; it must be a list of 2 numbers, each 0 or greater and less than 1",
    "-s train.augment=colour": "-s train.augment=colour: train.augment is 'colour'; it must be a list of color, translation, cutout; did you mean 'color'?",
    "--layers ''": "--layers: feature_matching.layers is ''; it must be a list of one or more names or indices",
    "-s feature_matching.layer_weights=unifrom": "-s feature_matching.layer_weights=unifrom: feature_matching.layer_weights is 'unifrom'; it must be uniform or a list of one or more numbers, each 0 or greater; did you mean 'uniform'?",
    "-s train.accumulate=3": "-s train.accumulate=3: train: accumulate 3 does not divide batch_size 64",
    "--batch-size 3 -s train.accumulate=2": "-s train.accumulate=2: train: accumulate 2 does not divide batch_size 3",
    "-s feature_matching.kernel=rbf": "-s feature_matching.kernel=rbf: feature_matching.kernel is for match mmd, not mean, which has criterion, estimator; leave it out",
    "-s discriminator.window=4": "-s discriminator.window=4: discriminator.window is for type munet, not dcgan, which has width, norm; leave it out",
    "-s data.scale=4": "-s data.scale=4: data.scale is for task upscale, not generate, which has root, image_size, fit; leave it out",
    "-s losses.l1.weight=1": "-s losses.l1.weight=1: losses.l1.weight is for task upscale, not generate; leave it out",
    "-s losses.l1=1": "-s losses.l1=1: losses.l1 is a section, not a value; its fields: weight, start_step, ramp, reduction (or none)",
    "-s losses.gan.weight=0 --lambda-feature 0": "--lambda-feature: losses.gan.weight and feature_matching.weight are 0: the generator has nothing to learn from",
    "-s optim.schedule.decay=cosine": "-s optim.schedule.decay=cosine: optim.schedule: decay 'cosine' needs decay_end after decay_start, not 0 after 0",
    "-s generator.params.width=3": "-s generator.params.width=3: generator: params are the arguments of a target, and there is none; set target too",
    "-s seed=x -s train.stpes=1": "-s train.stpes=1: there is no field 'train.stpes'; did you mean 'train.steps'?; -s seed=x: seed is 'x'; it must be a whole number, 0 or greater and less than 2^63",
    "--preset dcgn": "--preset: there is no preset 'dcgn'; did you mean 'dcgan'? (fmrun presets lists them)",
    "--preset exp.toml": "--preset: there is no preset 'exp.toml'; a file goes with --config",
    "--preset munet-x2-cpu -s generator.kernel=7": "-s generator.kernel=7: generator.kernel is for type realplksr, not compact, which has features, blocks; leave it out",
    "-s compile_mode=reduce-overhead": "-s compile_mode=reduce-overhead: compile_mode is for compile true, not false; leave it out",
}

GOOD_FILES: list[tuple[str, str, dict[str, Any]]] = [
    (
        "exp.toml",
        'extends = "dcgan-fm-mmd"\nseed = 1\n[feature_matching]\ncriterion = "none"\n',
        {"feature_matching.match": "mmd", "feature_matching.criterion": None, "seed": 1},
    ),
    ("exp.json", '{"seed": 5, "train": {"steps": "7"}}', {"seed": 5, "train.steps": 7}),
    (
        "exp.yml",
        "seed: 010\ntrain: {steps: 0o17}\ncompile: yes\ndata: {path: 2024-01-01}\noptim: {generator: {lr: 1e-4}}\n",
        {"seed": 10, "train.steps": 15, "compile": True, "data.path": "2024-01-01", "optim.generator.lr": 0.0001},
    ),
    (
        "exp.yml",
        "optim:\n  generator: &adam {lr: 1e-4, eps: 0.1}\n  discriminator:\n    lr: 2e-4\n    <<: [*adam, {eps: 0.3, betas: [0.2, 0.7]}]\n",
        {"optim.discriminator.lr": 0.0002, "optim.discriminator.eps": 0.1, "optim.discriminator.betas": [0.2, 0.7]},
    ),
    (
        "exp.yml",
        "\ufeffdata: {channels: null}\r\nfeature_matching:\r\n  layers: 1, block2\r\n",
        {"data.channels": None, "feature_matching.layers": [1, "block2"]},
    ),
    (
        "exp.yml",
        "task: upscale\ngenerator: {type: compact}\nfeature_matching: {layers: [1]}\nlosses: [{type: Feature_Matching_Loss, loss_weight: 0.2}, {type: l1_loss}]\n",
        {
            "feature_matching.weight": 0.2,
            "feature_matching.match": "sample",
            "feature_matching.criterion": "l1",
            "losses.l1.weight": 1.0,
            "losses.gan.weight": 0.0,
        },
    ),
]

BAD_FILES: list[tuple[str, str | bytes, str]] = [
    (
        "exp.toml",
        'discriminator.norm = "btach"',
        "exp.toml: discriminator.norm is 'btach'; allowed: batch, spectral, group, instance, none; did you mean 'batch'?",
    ),
    (
        "exp.toml",
        "seed = 1\nseed = 2",
        "exp.toml: it is not valid TOML (Cannot overwrite a value (at line 2, column 9))",
    ),
    (
        "exp.toml",
        "seed = -1\ntrain.stpes = 1",
        "exp.toml: there is no field 'train.stpes'; did you mean 'train.steps'?; seed is -1; it must be a whole number, 0 or greater and less than 2^63",
    ),
    ("exp.toml", "train.accumulate = 3", "exp.toml: train: accumulate 3 does not divide batch_size 64"),
    (
        "exp.toml",
        'extends = "dcgn"',
        "exp.toml: extends: there is no preset 'dcgn'; did you mean 'dcgan'? (fmrun presets lists them)",
    ),
    ("exp.toml", "data.path = 7", "exp.toml: data.path is 7; it must be text, not empty; put it in quotes"),
    (
        "exp.toml",
        'generator.type = "compact"\ngenerator.width = 4\ntask = "upscale"',
        "exp.toml: generator.width is for type dcgan, not compact, which has features, blocks; leave it out",
    ),
    (
        "exp.yml",
        "train:\n  steps: 1\n  steps: 2\n",
        'exp.yml: it is not valid YAML (line 3: found duplicate key "steps" with value "2" (original value: "1"))',
    ),
    ("exp.yml", "seed: true", "exp.yml: seed is true; it must be a whole number, 0 or greater and less than 2^63"),
    (
        "exp.yml",
        "discriminator: {norm: no}",
        "exp.yml: discriminator.norm is 'no'; allowed: batch, spectral, group, instance, none; did you mean 'none'?",
    ),
    ("exp.yml", "ema: 5", "exp.yml: ema is a section, not a value; its fields: decay, warmup"),
    ("exp.yml", "1: 2", "exp.yml: there is no field '1'; did you mean 'losses.gan.r1'?"),
    ("exp.yml", "? [a]\n: 1\n", "exp.yml: there is no field '('a',)'; `fmrun presets dcgan` lists them"),
    ("exp.yml", "- a\n", "exp.yml: the top level is a list; a config is a table of settings, like seed = 0"),
    (
        "exp.yml",
        "seed: 1\ntrain:\n\tsteps: 3\n",
        "exp.yml: it is not valid YAML (line 3: found character '\\t' that cannot start any token)",
    ),
    ("exp.yml", "a: 1\n---\nb: 2\n", "exp.yml: it is not valid YAML (line 2: but found another document)"),
    (
        "exp.yml",
        "seed: !!python/object/apply:os.system ['true']",
        "exp.yml: it is not valid YAML (line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system')",
    ),
    ("exp.yml", b"seed: \xff", "cannot read exp.yml: it is not UTF-8 text; save it as UTF-8"),
    ("exp.json", '{"seed": 1, "seed": 2}', "exp.json: it is not valid JSON ('seed' is given twice)"),
    ("exp.json", '{\n"seed" 1}', "exp.json: it is not valid JSON (Expecting ':' delimiter: line 2 column 8 (char 9))"),
    ("exp.txt", "seed: 1", "exp.txt: a config file ends in .toml, .yaml, .yml or .json"),
    (
        "exp.yml",
        "losses: [{type: l1_loss}]",
        "exp.yml: losses entry 1 (l1_loss) belongs to super-resolution, where every image has its original; task 'generate' takes featurematchingloss and ganloss only",
    ),
    ("exp.yml", "losses: [{type: ldlloss}]", "exp.yml: losses entry 1: fmrun has no ldlloss; leave it out"),
    (
        "exp.yml",
        "losses: [{type: ganlos}]",
        "exp.yml: losses entry 1: there is no loss type 'ganlos'; did you mean 'ganloss'?",
    ),
    (
        "exp.yml",
        "losses: [{type: ganloss, los_weight: 1}]",
        "exp.yml: losses entry 1 (ganloss): there is no key 'los_weight'; did you mean 'loss_weight'?",
    ),
    (
        "exp.yml",
        "losses: [{type: ganloss, gan_type: hing}]",
        "exp.yml: losses entry 1 (ganloss): gan_type is 'hing'; allowed: vanilla, lsgan, hinge, wgan, r3gan; did you mean 'hinge'?",
    ),
    (
        "exp.yml",
        "losses: [{type: ganloss, loss_weight: -1}]",
        "exp.yml: losses entry 1 (ganloss): loss_weight is -1; it must be a number, 0 or greater",
    ),
]

RESUMED: dict[str, Any] = {
    "-s log.every=3": 3,
    "--steps 99": 99,
    "-s train.batch_size=8": "-s train.batch_size=8: train.batch_size would make it another experiment; only log.*, eval.*, checkpoint.*, train.steps, data.workers, data.cache, device, threads, deterministic, cuda_graphs may be changed here; for another experiment: fmrun train",
    "-s log.evry=1": "-s log.evry=1: there is no field 'log.evry'; did you mean 'log.every'?",
    "--steps x": "--steps: train.steps is 'x'; it must be a whole number, from 1 to 1,000,000,000",
    "-s eval.kid_every=-1": "-s eval.kid_every=-1: eval.kid_every is -1; it must be a whole number, from 0 to 1,000,000,000",
}


@pytest.mark.parametrize("tail", GOOD)
def test_what_is_typed_is_a_value(tail: str) -> None:
    key, expected = overrides(shlex.split(tail)[-2:])[0].key, GOOD[tail]
    got = {k: v for k, v in flatten(resolved(tail)).items() if k == key or k.startswith(f"{key}.")}
    assert got.get(key, got) == expected


@pytest.mark.parametrize("tail", BAD)
def test_what_is_typed_is_one_sentence(tail: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(tail)
    assert sentence(caught.value) == BAD[tail]


def written(tmp_path: Path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(("name", "text", "expected"), GOOD_FILES)
def test_what_is_written_is_values(tmp_path: Path, name: str, text: str, expected: dict[str, Any]) -> None:
    got = flatten(resolved("", written(tmp_path, name, text)))
    assert {key: got[key] for key in expected} == expected


@pytest.mark.parametrize(("name", "text", "expected"), BAD_FILES)
def test_what_is_written_is_one_sentence(tmp_path: Path, name: str, text: str | bytes, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved("", written(tmp_path, name, text))
    assert sentence(caught.value).removeprefix("--config: ").replace(f"{tmp_path}/", "") == expected


@pytest.mark.parametrize("tail", RESUMED)
def test_what_a_resumed_run_takes(tail: str) -> None:
    saved, expected = json.loads(resolved("").model_dump_json()), RESUMED[tail]
    (override,) = overrides(shlex.split(tail))
    try:
        said: Any = flatten(revise(saved, [override], FREE_ON_RESUME))[override.key]
    except UserError as error:
        said = sentence(error)
    assert said == expected
