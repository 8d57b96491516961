"""DCGAN: shapes, names, first weights, and weights from a file."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.helpers import tiny_config
from torch import nn

from fmrun.feature_matching.discriminator import Discriminator
from fmrun.feature_matching.term import feature_shapes
from fmrun.models.base import init_normal
from fmrun.models.dcgan import KERNELS, DcganDiscriminator, DcganGenerator
from fmrun.models.norm import SpectralNorm
from fmrun.models.weights import load_weights
from fmrun.runtime.errors import UserError
from fmrun.runtime.rng import torch_generator
from fmrun.tasks.generate import build_generator
from fmrun.tasks.pair import build_discriminator

NORMS = ("batch", "spectral", "group", "none")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("size", "channels"), list(itertools.product(KERNELS, (1, 3))))
def test_generator_makes_images_of_its_size(size, channels):
    image = DcganGenerator(size, channels, 4, 5, rng())(torch.randn(2, 5))
    assert image.shape == (2, channels, size, size)
    assert image.abs().max() < 1
    assert image.std() > 0


@pytest.mark.parametrize(("size", "channels", "norm"), [*itertools.product(KERNELS, (1,), NORMS), (64, 3, "batch")])
def test_discriminator_gives_a_logit_an_image_and_its_features_in_order(size, channels, norm):
    width = 4
    net = DcganDiscriminator(size, channels, width, norm, rng())
    assert isinstance(net, Discriminator)
    out = net(torch.randn(3, channels, size, size), net.feature_names)
    assert out.logits.shape == (3,)
    assert tuple(out.features) == net.feature_names
    side = {28: (14, 7, 4)}.get(size, tuple(size >> k for k in range(1, 8) if size >> k >= 4))
    expected = [(width * 2**i, s, s) for i, s in enumerate(side) for _ in range(2)]
    assert [tuple(f.shape[1:]) for f in out.features.values()] == expected
    assert list(feature_shapes(net, (channels, size, size), net.feature_names).values()) == expected


@pytest.mark.parametrize("size", KERNELS)
def test_groups_name_layers_that_exist_and_all_is_all(size):
    net = DcganDiscriminator(size, 1, 4, "batch", rng())
    blocks = tuple(f"block{i + 1}" for i in range(len(KERNELS[size])))
    assert net.feature_names == tuple(itertools.chain(*((f"{b}.conv", b) for b in blocks)))
    assert net.groups["all"] == net.feature_names
    assert net.groups["key"] == blocks
    assert net.groups["early"] == blocks[: len(blocks) // 2]
    middle = {3: blocks[1:2], 4: blocks[1:3], 5: blocks[2:3]}[len(blocks)]
    assert net.groups["mid"] == middle
    assert net.auto == f"{blocks[-1]}.conv"


@pytest.mark.parametrize("norm", NORMS)
def test_asking_for_layers_changes_neither_logits_nor_features(norm):
    net = DcganDiscriminator(28, 1, 4, norm, rng())
    image = torch.randn(3, 1, 28, 28)
    whole = net(image, net.feature_names)
    assert torch.equal(whole.logits, net(image).logits)
    for name in net.feature_names:
        alone = net(image, (name,), False)
        assert alone.logits is None
        assert list(alone.features) == [name]
        assert torch.equal(alone.features[name], whole.features[name])


def test_features_are_those_of_the_published_computation():
    """conv -> norm (not on the first) -> leaky ReLU 0.2, then a 4 x 4 convolution to one logit."""
    net = DcganDiscriminator(32, 1, 4, "group", rng()).double()
    x = image = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    out = net(image, net.feature_names)
    for i, block in enumerate(net.blocks, 1):
        x = nn.functional.conv2d(x, block["conv"].weight, block["conv"].bias, stride=2, padding=1)
        assert torch.allclose(out.features[f"block{i}.conv"], x)
        if i > 1:
            x = nn.functional.group_norm(x, block["norm"].num_groups, block["norm"].weight, block["norm"].bias)
        x = torch.where(x > 0, x, 0.2 * x)
        assert torch.allclose(out.features[f"block{i}"], x)
    logits = (x * net.head.weight).sum((1, 2, 3)) + net.head.bias
    assert torch.allclose(out.logits, logits)


def test_first_weights_have_the_published_spread():
    g, d = DcganGenerator(64, 3, 16, 20, rng()), DcganDiscriminator(64, 3, 16, "batch", rng())
    for net in (g, d):
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
                assert module.weight.mean().item() == pytest.approx(0, abs=2e-3)
                assert module.bias is None or not module.bias.any()
            elif isinstance(module, nn.BatchNorm2d):
                assert module.weight.mean().item() == pytest.approx(1, abs=0.02)
                assert 0 < module.weight.std().item() < 0.04
                assert not module.bias.any()


def test_spectral_norm_comes_after_the_first_weights_are_drawn():
    """Trap 9: under a parametrization, writing `.weight` afterwards would do nothing."""
    net = DcganDiscriminator(64, 3, 16, "spectral", rng())
    convs = [block["conv"] for block in net.blocks] + [net.head]
    for conv in convs:
        chain = conv.parametrizations.weight
        assert chain.original.std().item() == pytest.approx(0.02, rel=0.15)
        assert isinstance(chain[0], SpectralNorm)
        sigma = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
        assert sigma.item() == pytest.approx(1, abs=0.1)


def test_normal_initialisation_leaves_buffers_and_other_layers_alone():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.tensor([1.0, 4, 6, 4, 1]) / 16)
            self.linear = nn.Linear(3, 3)
            self.free = nn.Parameter(torch.full((3,), 7.0))
            self.conv = nn.Conv2d(1, 1, 3)

    net = Fixed()
    linear = net.linear.weight.clone()
    init_normal(net, rng())
    assert net.kernel.tolist() == [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
    assert torch.equal(net.linear.weight, linear)
    assert (net.free == 7).all()
    assert net.conv.weight.abs().max() < 0.2


@pytest.mark.parametrize(("build", "of"), [(build_generator, 1), (build_discriminator, (1, 28, 28))])
def test_first_weights_follow_from_the_seed_alone(build, of):
    def weights(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        state = build(tiny_config(seed=seed, discriminator__norm="spectral"), of).state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        return state

    a, b, other = weights(0, 1), weights(0, 2), weights(1, 1)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], other[n]) for n in a)


def test_feature_shapes_leave_buffers_alone():
    net = DcganDiscriminator(28, 1, 4, "batch", rng())
    before = {n: b.clone() for n, b in net.named_buffers()}
    feature_shapes(net, (1, 28, 28), net.feature_names)
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
GENERATOR_KEYS = [
    "project.weight",
    *(f"norm.{tail}" for tail in NORM),
    "blocks.0.conv.weight",
    *(f"blocks.0.norm.{tail}" for tail in NORM),
    "blocks.1.conv.weight",
    *(f"blocks.1.norm.{tail}" for tail in NORM),
    "image.weight",
    "image.bias",
]
DISCRIMINATOR_KEYS = {
    "batch": [
        "blocks.0.conv.weight",
        "blocks.0.conv.bias",
        "blocks.1.conv.weight",
        *(f"blocks.1.norm.{tail}" for tail in NORM),
        "blocks.2.conv.weight",
        *(f"blocks.2.norm.{tail}" for tail in NORM),
        "head.weight",
        "head.bias",
    ],
    "spectral": [
        f"{module}.{tail}"
        for module in ("blocks.0.conv", "blocks.1.conv", "blocks.2.conv", "head")
        for tail in (
            "bias",
            "parametrizations.weight.original",
            "parametrizations.weight.0.u",
            "parametrizations.weight.0.v",
        )
    ],
}


def test_names_in_the_state_dict_are_stable():
    """Files that users have saved depend on them."""
    assert list(DcganGenerator(32, 1, 4, 5, rng()).state_dict()) == GENERATOR_KEYS
    for norm, keys in DISCRIMINATOR_KEYS.items():
        assert list(DcganDiscriminator(32, 1, 4, norm, rng()).state_dict()) == keys


# Weights from a file


def saved(folder: Path, net: nn.Module, prefix: str = "", **changes: torch.Tensor | None) -> str:
    tensors = {f"{prefix}{n}": t.clone() for n, t in net.state_dict().items()}
    for name, value in changes.items():
        name = prefix + name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    path = folder / "weights.safetensors"
    save_file(tensors, path)
    return str(path)


def fresh(seed: int) -> DcganGenerator:
    return DcganGenerator(28, 1, 4, 5, rng(seed))


@pytest.mark.parametrize("prefix", ["", "ema.", "generator."])
def test_weights_load_from_a_state_dict_or_a_checkpoint(tmp_path, prefix):
    source, net = fresh(1), fresh(2)
    load_weights(net, saved(tmp_path, source, prefix), ("ema", "generator"), "generator.init")
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in source.state_dict().items())


def test_the_average_is_preferred_to_the_raw_generator(tmp_path):
    raw, average, net = fresh(1), fresh(2), fresh(3)
    tensors = {f"generator.{n}": t for n, t in raw.state_dict().items()}
    tensors |= {f"ema.{n}": t for n, t in average.state_dict().items()}
    save_file(tensors, tmp_path / "both.safetensors")
    load_weights(net, str(tmp_path / "both.safetensors"), ("ema", "generator"), "generator.init")
    assert torch.equal(net.image.weight, average.image.weight)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image__bias": None}, r"Missing key\(s\) in state_dict: .image\.bias"),
        ({"extra": torch.zeros(1)}, r"Unexpected key\(s\) in state_dict: .extra"),
        ({"image__bias": torch.zeros(2)}, r"size mismatch for image\.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_reason(tmp_path, changes, words):
    net = fresh(2)
    with pytest.raises(UserError, match=rf"generator\.init: .* holds another net .*{words}"):
        load_weights(net, saved(tmp_path, fresh(1), **changes), ("ema",), "generator.init")


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"generator\.init: there is no file '.*nowhere\.safetensors'"):
        load_weights(fresh(0), str(tmp_path / "nowhere.safetensors"), (), "generator.init")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"is not a readable \.safetensors file"):
        load_weights(fresh(0), str(broken), (), "generator.init")


def test_a_config_starts_nets_from_files(tmp_path):
    config = tiny_config(seed=3)
    image = (1, 28, 28)
    path = saved(tmp_path, build_discriminator(config, image))
    net = build_discriminator(tiny_config(seed=4, discriminator__init=path), image)
    assert torch.equal(net.head.weight, build_discriminator(config, image).head.weight)


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_logits_keep_full_precision_under_autocast(norm):
    net = DcganDiscriminator(32, 1, 8, norm, torch_generator(0, "init", 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(torch.randn(16, 1, 32, 32), ("block1",))
    assert out.features["block1"].dtype == torch.bfloat16
    assert out.logits.dtype == torch.float32
    assert not torch.equal(out.logits, out.logits.bfloat16().float())
