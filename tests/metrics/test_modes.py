"""Modes: stacked images, the classifier that tells them apart, how many there are and how evenly."""

import math

import numpy as np
import pytest
import torch
from support.helpers import bundled_labels

from fmrun.config.data import DataConfig
from fmrun.data.sources import open_images
from fmrun.data.store import Images
from fmrun.metrics.modes import WEIGHTS, Classifier, Modes, choose_modes, coverage, load_classifier


@pytest.fixture(scope="module")
def net() -> Classifier:
    return load_classifier()


def bundled(name: str, size: int = 28) -> tuple[Images, Images]:
    train, valid = open_images(DataConfig(path=f"bundled:{name}", image_size=size), 0)
    assert valid is not None
    return train, valid


def all_of(images: Images) -> np.ndarray:
    return images.read(range(len(images))).numpy()


def test_the_classifier_is_as_good_as_its_file_says(net: Classifier) -> None:
    import json

    from safetensors import safe_open

    with safe_open(WEIGHTS, framework="pt") as file:
        facts = json.loads(file.metadata()["fmrun"])
    _, valid = bundled("fashion-mnist")
    labels = Modes(1).labels(net, valid.read(range(len(valid))))
    found = float((labels == torch.from_numpy(bundled_labels("valid"))).double().mean())
    assert found == pytest.approx(facts["accuracy"]["bundled validation images"], abs=0.002)
    assert found > 0.88
    assert WEIGHTS.stat().st_size < 500_000


def test_stacked_images_are_three_grey_ones() -> None:
    train, valid = bundled("stacked-fashion-mnist")
    grey, _ = bundled("fashion-mnist")
    assert (len(train), len(valid)) == (50_000, 10_000)
    assert train.channels == 3
    label_of = {image.tobytes(): label for image, label in zip(all_of(grey), bundled_labels("train"), strict=True)}
    kinds = [tuple(label_of[channel.tobytes()] for channel in image) for image in all_of(train)]
    assert len(set(kinds)) == 1000
    again, _ = bundled("stacked-fashion-mnist")
    assert again.fingerprint == train.fingerprint


def test_kinds_of_stacked_images_are_read_channel_by_channel(net: Classifier) -> None:
    """At 32 px too, where the images lie in a black frame."""
    for size in (28, 32):
        _, grey = bundled("fashion-mnist", size)
        _, valid = bundled("stacked-fashion-mnist", size)
        images = valid.read(range(200))
        found = Modes(3).labels(net, images)
        single = [Modes(1).labels(net, images[:, c : c + 1]) for c in range(3)]
        assert torch.equal(found, 100 * single[0] + 10 * single[1] + single[2])
        label_of = {image.tobytes(): label for image, label in zip(all_of(grey), bundled_labels("valid"), strict=True)}
        labels = [[label_of[channel.tobytes()] for channel in image] for image in all_of(valid)[:200]]
        expected = torch.tensor(labels) @ torch.tensor([100, 10, 1])
        assert float((found == expected).double().mean()) > 0.6


def test_evenly_made_kinds_score_zero_and_one_kind_alone_log_of_all() -> None:
    assert coverage(torch.full((10,), 7.0)) == {"modes": 10, "modes_kl": pytest.approx(0, abs=1e-12)}
    alone = torch.zeros(1000)
    alone[3] = 50
    assert coverage(alone) == {"modes": 1, "modes_kl": pytest.approx(math.log(1000))}
    half = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert coverage(half)["modes_kl"] == pytest.approx(math.log(2))
    assert coverage(torch.tensor([3.0, 1.0]))["modes_kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_where_kinds_are_counted() -> None:
    assert choose_modes("bundled:fashion-mnist", 1, 32) == Modes(1)
    assert choose_modes("torchvision:FashionMNIST", 1, 28) == Modes(1)
    assert choose_modes("bundled:stacked-fashion-mnist", 3, 32) == Modes(3)
    assert choose_modes("bundled:fashion-mnist", 3, 32) is None
    assert choose_modes("bundled:fashion-mnist", 1, 64) is None
    assert choose_modes("/data/fashion/photos", 1, 32) is None
    assert choose_modes("/stacked/fashion-mnist/", 1, 32) == Modes(1)
