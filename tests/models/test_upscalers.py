"""Upscalers: what each architecture offers, that spandrel finds what was saved, community files, and how far nets see."""

import itertools
import math
import pickle

import pytest
import torch
from safetensors.torch import save_file
from spandrel import ModelLoader

from fmrun.models.upscalers import (
    ARCHITECTURES,
    Upscaler,
    build_upscaler,
    fuse_convolutions,
    load_pretrained,
    read_pretrained,
    tiling,
    upscaler_for,
)
from fmrun.runtime.errors import UserError

TINY = {
    "compact": {"features": 4, "blocks": 2},
    "span": {"features": 4},
    "realplksr": {"features": 8, "blocks": 2, "kernel": 5},
    "esrgan": {"features": 4, "blocks": 2},
}
OFFERED = [(name, s, c) for name, a in ARCHITECTURES.items() for s, c in itertools.product(a.scales, a.channels)]
VARIANTS = [
    ("span", 2, 3, {"norm": True}),
    ("realplksr", 2, 3, {"layer_norm": True}),
    *(("realplksr", scale, 3, {"dysample": True}) for scale in (1, 2, 3, 4)),
    *(("esrgan", scale, channels, {"unshuffle": True}) for scale in (1, 2) for channels in (1, 3, 4)),
]
ALL = [(*offer, {}) for offer in OFFERED] + VARIANTS


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=rng(seed))


def tiny(arch: str, scale: int = 2, channels: int = 3, seed: int = 0, **params) -> torch.nn.Module:
    return build_upscaler(arch, scale, channels, rng(seed), **TINY[arch] | params)


def weights_of(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    fuse_convolutions(net)
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_every_architecture_has_what_it_says():
    assert {name: (a.scales, a.channels) for name, a in ARCHITECTURES.items()} == {
        "compact": ((1, 2, 3, 4), (1, 3, 4)),
        "span": ((1, 2, 3, 4), (1, 3, 4)),
        "realplksr": ((1, 2, 3, 4), (3,)),
        "esrgan": ((1, 2, 4), (1, 3, 4)),
    }
    for name, a in ARCHITECTURES.items():
        assert upscaler_for(name, 2, 3).params == a.params


@pytest.mark.parametrize(("arch", "scale", "channels", "params"), ALL)
def test_what_is_saved_is_found_by_spandrel_and_upscales_the_same(tmp_path, arch, scale, channels, params):
    net = tiny(arch, scale, channels, **params)
    image = noise(1, channels, 8, 12)
    made = net(image)
    assert made.shape == (1, channels, 8 * scale, 12 * scale)
    made.square().mean().backward()
    trained = [p.grad is not None for name, p in net.named_parameters() if "eval_conv" not in name]
    assert all(trained)

    file = tmp_path / "net.safetensors"
    save_file(weights_of(net), file)
    found = ModelLoader().load_from_file(file)
    title = "PLKSR" if arch == "realplksr" else ARCHITECTURES[arch].title
    assert (found.architecture.id, found.scale, found.input_channels, found.output_channels) == (
        *(title, scale),
        *(channels, channels),
    )
    assert type(found.model) is ARCHITECTURES[arch].net
    with torch.no_grad():
        assert torch.equal(found.model.eval()(image), net.eval()(image.clone()))

    assert read_pretrained(file)[1] == upscaler_for(arch, scale, channels, **TINY[arch] | params)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_are_exactly_those_of_spandrels_class(arch):
    net = tiny(arch)
    assert list(weights_of(net)) == list(ARCHITECTURES[arch].net(**net.hyperparameters).state_dict())


def test_spans_convolutions_of_inference_are_those_it_was_trained_with():
    net = tiny("span")
    image = noise(1, 3, 9, 9)
    weights = weights_of(net)
    trained = net.train()(image)
    net.eval()
    for module in net.modules():
        if hasattr(module, "update_params"):
            module.update_params = lambda: None
    net.load_state_dict(weights)
    assert torch.allclose(net(image), trained, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_first_weights_follow_from_the_generator_alone(arch):
    random = torch.get_rng_state()
    a, b, other = (tiny(arch, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], other[name]) for name in a)


def test_esrgans_dense_blocks_begin_small():
    net = tiny("esrgan", features=32)
    state = net.state_dict()
    inside = state["model.1.sub.0.RDB1.conv1.0.weight"]
    outside = state["model.1.sub.2.weight"]
    assert inside.std() < 0.2 * outside.std()


# What cannot be had


@pytest.mark.parametrize(
    ("arch", "scale", "channels", "params", "words"),
    [
        ("esrgan", 3, 3, {}, r"ESRGAN upscales by x1, x2, x4, not x3; choose another type"),
        ("compact", 8, 3, {}, r"Compact upscales by x1, x2, x3, x4, not x8"),
        ("compact", 2, 2, {}, r"Compact takes images of 1, 3, 4 channels, not 2"),
        ("realplksr", 2, 1, {}, r"RealPLKSR takes images of 3 channels, not 1"),
        ("span", 2, 4, {"norm": True}, r"generator\.norm: SPAN's is for 3 channels, not 4; set it to false"),
        ("realplksr", 2, 3, {"features": 6}, r"generator\.features: RealPLKSR's must be a multiple of 4, not 6"),
        ("realplksr", 2, 3, {"kernel": 4}, r"generator\.kernel: RealPLKSR's must be odd, not 4"),
        ("esrgan", 4, 3, {"unshuffle": True}, r"generator\.unshuffle: ESRGAN's is for x1 and x2, not x4"),
    ],
)
def test_an_impossible_combination_is_one_sentence(arch, scale, channels, params, words):
    with pytest.raises(UserError, match=words) as caught:
        build_upscaler(arch, scale, channels, rng(), **params)
    assert "\n" not in str(caught.value)


def test_a_parameter_that_is_none_is_the_default():
    assert upscaler_for("span", 2, 3, features=None, norm=None, blocks=None).params == ARCHITECTURES["span"].params


# Files


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_file_becomes_the_net_that_it_was(tmp_path, arch, kind):
    source = tiny(arch, seed=5)
    file = tmp_path / f"net.{kind}"
    if kind == "safetensors":
        save_file(weights_of(source), file)
    else:
        torch.save({"params_ema": source.state_dict()}, file)
    random = torch.get_rng_state()
    net, upscaler = read_pretrained(file)
    assert torch.equal(torch.get_rng_state(), random)
    assert upscaler == upscaler_for(arch, 2, 3, **TINY[arch])
    assert net.training
    image = noise(1, 3, 8, 8)
    assert torch.equal(net(image), source(image))
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("prefix", ["module.", "net_g.", "_orig_mod.", "ema_model.", "ema.", "generator."])
def test_prefixes_of_trainers_and_compilers_are_taken_off(tmp_path, prefix):
    source = tiny("compact")
    weights = {prefix + name: value for name, value in weights_of(source).items()}
    if prefix in ("ema.", "generator."):
        weights["discriminator.head.bias"] = torch.zeros(1)
    save_file(weights, tmp_path / "net.safetensors")
    net, _ = read_pretrained(tmp_path / "net.safetensors")
    assert torch.equal(net.body[0].weight, source.body[0].weight)


def test_half_precision_files_become_float32(tmp_path):
    weights = {name: value.half() for name, value in weights_of(tiny("compact")).items()}
    save_file(weights, tmp_path / "net.safetensors")
    net, _ = read_pretrained(tmp_path / "net.safetensors")
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_the_newer_names_of_esrgan_are_understood(tmp_path):
    old = weights_of(tiny("esrgan", 2, features=4, blocks=2))
    new = {}
    for name, value in old.items():
        parts = name.split(".")
        tail = parts[-1]
        if parts[1] == "0":
            new[f"conv_first.{tail}"] = value
        elif parts[1] == "1" and parts[3] == "2":
            new[f"conv_body.{tail}"] = value
        elif parts[1] == "1":
            new[f"body.{parts[3]}.{parts[4].lower()}.{parts[5]}.{tail}"] = value
        else:
            new[f"{ {'3': 'conv_up1', '5': 'conv_hr', '7': 'conv_last'}[parts[1]] }.{tail}"] = value
    save_file(new, tmp_path / "net.safetensors")
    net, upscaler = read_pretrained(tmp_path / "net.safetensors")
    assert upscaler == upscaler_for("esrgan", 2, 3, features=4, blocks=2)
    assert all(torch.equal(value, old[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"scale": 4}, r"asks for scale 4: add -s data\.scale=2$"),
        ({"channels": 1}, r"asks for channels 1: add -s data\.channels=3$"),
        ({"arch": "span"}, r"asks for type span: add -s generator\.type=compact$"),
        (
            {"scale": 4, "params": {"features": 64, "blocks": 2, "kernel": 3}},
            r"asks for scale 4, features 64, kernel 3: add -s data\.scale=2 -s generator\.features=4 "
            r"-s generator\.kernel=none$",
        ),
    ],
)
def test_a_file_of_another_net_is_described(tmp_path, asked, words):
    save_file(weights_of(tiny("compact")), tmp_path / "net.safetensors")
    with pytest.raises(
        UserError, match=r"generator\.init: '.*' is Compact x2, 3 channels, features 4, blocks 2, .*" + words
    ):
        load_pretrained(
            tmp_path / "net.safetensors", **{"scale": 2, "channels": 3, "arch": "compact", "params": {}} | asked
        )


class Trap:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("kind", ["pth", "pt", "ckpt"])
def test_nothing_in_a_file_is_executed(tmp_path, capfd, kind):
    file = tmp_path / f"net.{kind}"
    torch.save({"params": tiny("compact").state_dict(), "more": Trap()}, file)
    with pytest.raises(UserError, match=r"is damaged or holds more than weights, and is not loaded") as caught:
        read_pretrained(file)
    file.write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(UserError, match="holds more than weights"):
        read_pretrained(file)
    assert "executed" not in capfd.readouterr().out
    assert "\n" not in str(caught.value)


def test_files_that_are_no_upscalers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"generator\.init: there is no file '.*nowhere\.pth'"):
        read_pretrained(tmp_path / "nowhere.pth")
    (tmp_path / "net.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is neither \.safetensors nor \.pth"):
        read_pretrained(tmp_path / "net.onnx")
    for name in ("net.safetensors", "net.pth"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match="is empty; copy or download it again"):
            read_pretrained(tmp_path / name)
    (tmp_path / "net.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"is not a readable \.safetensors file"):
        read_pretrained(tmp_path / "net.safetensors")
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"is no upscaler that spandrel knows"):
        read_pretrained(tmp_path / "other.safetensors")
    for content, words in (([1], "holds a list, not named weights"), ({"step": 3}, "holds no weights")):
        torch.save(content, tmp_path / "net.pth")
        with pytest.raises(UserError, match=words):
            read_pretrained(tmp_path / "net.pth")
    broken = weights_of(tiny("compact"))
    broken["body.2.weight"] = torch.zeros(1)
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match=r"looks like an upscaler but is damaged \(RuntimeError"):
        read_pretrained(tmp_path / "broken.safetensors")


def test_upscalers_that_fmrun_does_not_train_are_named(tmp_path):
    from spandrel.architectures.ESRGAN import ESRGAN
    from spandrel.architectures.PLKSR import PLKSR, RealPLKSR

    nets = {
        r"is a PLKSR x2, and fmrun trains Compact, SPAN, RealPLKSR, ESRGAN": PLKSR(
            dim=8, n_blocks=1, upscaling_factor=2, kernel_size=5
        ),
        r"is a RealPLKSR x2 with split_ratio 0\.5, which fmrun does not train": RealPLKSR(
            dim=8, n_blocks=1, upscaling_factor=2, kernel_size=5, split_ratio=0.5
        ),
        r"is a ESRGAN x2 with plus True, which fmrun does not train": ESRGAN(
            num_filters=4, num_blocks=1, scale=2, plus=True
        ),
        r"is a ESRGAN x2 with 1 channels going in and 3 coming out": ESRGAN(
            in_nc=1, num_filters=4, num_blocks=1, scale=2
        ),
    }
    for words, net in nets.items():
        save_file({name: value.contiguous() for name, value in net.state_dict().items()}, tmp_path / "net.safetensors")
        with pytest.raises(UserError, match=words):
            read_pretrained(tmp_path / "net.safetensors")


# How far they see


def seen(net: torch.nn.Module, scale: int, side: int) -> int:
    """Pixels of the small image, from its middle outwards, that pixels made of the middle one depend on."""
    net = net.double().train()
    image = torch.rand(1, 3, side, side, generator=rng(), dtype=torch.float64).requires_grad_()
    middle = side // 2
    made = net(image)[..., middle * scale : (middle + 1) * scale, middle * scale : (middle + 1) * scale]
    (gradient,) = torch.autograd.grad((made * noise(*made.shape, seed=3).double()).sum(), image)
    rows = gradient[0].abs().sum((0, 2)).nonzero().flatten()
    return int(max(middle - rows[0], rows[-1] - middle))


LOCAL = [
    *(("compact", scale, {}) for scale in (1, 2, 4)),
    ("span", 2, {}),
    ("span", 4, {"norm": True}),
    ("realplksr", 2, {"layer_norm": True}),
    *(("esrgan", scale, {"blocks": 1}) for scale in (1, 2, 4)),
    *(("esrgan", scale, {"blocks": 1, "unshuffle": True}) for scale in (1, 2)),
]


@pytest.mark.parametrize(("arch", "scale", "params"), LOCAL)
def test_the_radius_is_as_far_as_the_net_sees(arch, scale, params):
    params = TINY[arch] | params
    radius = tiling(upscaler_for(arch, scale, 3, **params)).radius
    slack = 6 if params.get("unshuffle") else 1
    found = seen(tiny(arch, scale, **params), scale, 2 * (radius + 8) // 4 * 4 + 8)
    assert radius - slack <= found <= radius


def test_a_norm_over_the_image_sees_everywhere():
    assert tiling(upscaler_for("realplksr", 2, 3)).radius is None
    assert seen(tiny("realplksr", 2, blocks=1), 2, 60) == 30


def test_tiles_that_overlap_by_the_radius_equal_the_whole():
    upscaler = upscaler_for("compact", 2, 3, **TINY["compact"])
    net, image, r = tiny("compact").eval(), noise(1, 3, 20, 40), tiling(upscaler).radius
    with torch.no_grad():
        whole, left = net(image), net(image[..., : 20 + r])
    assert torch.allclose(left[..., :40], whole[..., :40], atol=1e-6)


@pytest.mark.parametrize(("arch", "scale", "channels", "params"), ALL)
def test_the_smallest_tile_can_be_upscaled(arch, scale, channels, params):
    upscaler = upscaler_for(arch, scale, channels, **TINY[arch] | params)
    side = tiling(upscaler).smallest
    with torch.no_grad():
        made = tiny(arch, scale, channels, **params).eval()(noise(1, channels, side, side))
    assert made.shape == (1, channels, side * scale, side * scale)


def test_the_published_nets_see_as_far_as_is_known():
    radii = {name: tiling(upscaler_for(name, 4, 3)).radius for name in ARCHITECTURES}
    assert radii == {"compact": 18, "span": 21, "realplksr": None, "esrgan": math.ceil(347 + 1.25)}
    assert str(Upscaler("compact", 2, 1, {"features": 4})) == "Compact x2, 1 channel, features 4"
