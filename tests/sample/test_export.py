"""Export: what other programs load makes the same images, and a file that they would misread is never written."""

import os
import sys
from pathlib import Path

import pytest
import torch
from spandrel import ModelLoader
from spandrel.architectures.ESRGAN import ESRGAN
from torch import nn

from fmrun.models.dcgan import DcganGenerator
from fmrun.models.upscalers import ARCHITECTURES, build_upscaler
from fmrun.models.weights import load_weights
from fmrun.runtime.errors import FmrunError, UserError
from fmrun.sample import export
from fmrun.sample.export import export_onnx, export_upscaler, export_weights

TINY = {
    "compact": {"features": 4, "blocks": 2},
    "span": {"features": 4},
    "realplksr": {"features": 8, "blocks": 1, "kernel": 5},
    "esrgan": {"features": 4, "blocks": 1},
}
ONNX_CASES = [
    ("span", 3, 1, {}),
    ("esrgan", 2, 3, {"unshuffle": True}),
]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(arch: str, scale: int = 2, channels: int = 3, **params) -> nn.Module:
    return build_upscaler(arch, scale, channels, rng(), **TINY[arch] | params)


def facts(scale: int = 2, channels: int = 3) -> dict:
    return {"scale": scale, "channels": channels}


@pytest.mark.parametrize(("arch", "scale"), [(a, s) for a, about in ARCHITECTURES.items() for s in about.scales])
def test_spandrel_detects_the_file_and_makes_the_same_images(tmp_path, arch, scale):
    for channels in ARCHITECTURES[arch].channels:
        net = tiny(arch, scale, channels)
        path = tmp_path / f"{channels}.safetensors"
        made = export_upscaler(net, path, **facts(scale, channels))
        assert made.difference == 0
        assert made.size == path.stat().st_size
        found = ModelLoader().load_from_file(path)
        assert (found.scale, found.input_channels, found.output_channels) == (scale, channels, channels)
        assert type(found.model) is ARCHITECTURES[arch].net
        image = torch.rand(1, channels, 20, 12, generator=rng(1))
        with torch.no_grad():
            assert torch.equal(found.model.eval()(image), net.eval()(image))


def test_what_spandrel_misreads_is_not_written(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"older")
    esrgan = ESRGAN(in_nc=3, out_nc=3, num_filters=4, num_blocks=1, scale=3)
    with pytest.raises(UserError, match=r"takes the generator, ESRGAN x3, 3 channels, for ESRGAN x2, 3 to 3 channels"):
        export_upscaler(esrgan, path, **facts(3))
    with pytest.raises(UserError, match=r"spandrel does not detect the generator, Sequential x2, 3 channels"):
        export_upscaler(nn.Sequential(nn.Conv2d(3, 12, 3, 1, 1), nn.PixelShuffle(2)), path, **facts())
    with pytest.raises(UserError, match=r"x4, 3 channels, for .*Compact x2"):
        export_upscaler(tiny("compact"), path, **facts(4))
    odd = tiny("realplksr")
    odd.feats[1].norm.num_groups = 2
    with pytest.raises(FmrunError, match="makes other images than the run's generator"):
        export_upscaler(odd, path, **facts())
    broken = tiny("compact")
    with torch.no_grad():
        broken.body[0].bias[0] = float("nan")
    with pytest.raises(UserError, match=r"a value of body\.0\.bias is not a number"):
        export_upscaler(broken, path, **facts())
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    old = os.umask(0o027)
    try:
        export_upscaler(tiny("compact"), tmp_path / "new" / "net.safetensors", **facts())
    finally:
        os.umask(old)
    assert (tmp_path / "new" / "net.safetensors").stat().st_mode & 0o777 == 0o640


def test_weights_of_a_dcgan_start_another(tmp_path):
    net, other = (DcganGenerator(28, 1, 4, 8, rng(seed)) for seed in (0, 1))
    made = export_weights(net, tmp_path / "net.safetensors")
    assert (made.difference, made.what) == (0, f"{len(net.state_dict())} tensors")
    load_weights(other, str(tmp_path / "net.safetensors"), (), "generator.init")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(("arch", "scale", "channels", "params"), ONNX_CASES)
def test_onnx_takes_any_size_and_makes_the_same_images(tmp_path, capfd, arch, scale, channels, params):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = tiny(arch, scale, channels, **params)
    path = tmp_path / "net.onnx"
    made = export_onnx(net, path, channels=channels)
    assert made.difference < 1e-4
    assert capfd.readouterr().out == ""
    assert list(tmp_path.iterdir()) == [path]
    data = path.read_bytes()
    assert os.fsencode(Path(torch.__file__).parent) not in data
    assert b"stack_trace" not in data
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, channels, "height", "width"]
    assert session.get_outputs()[0].shape[:2] == [1, channels]
    net.eval()
    for height, width in ((8, 8), (31, 50), (64, 36)):
        image = torch.rand(1, channels, height, width, generator=rng(height))
        (result,) = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(result) - net(image)).abs().max() < 1e-4


def test_onnx_from_latents(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = DcganGenerator(28, 1, 4, 8, rng())
    made = export_onnx(net, tmp_path / "net.onnx", latent_dim=8)
    assert made.difference < 1e-5
    session = ort.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 8]
    assert session.get_outputs()[0].shape == ["batch", 1, 28, 28]
    latents = torch.randn(7, 8, generator=rng(3))
    (result,) = session.run(None, {"latent": latents.numpy()})
    with torch.no_grad():
        assert (torch.from_numpy(result) - net.eval()(latents)).abs().max() < 1e-5


def test_onnx_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(export, "ONNX_TOLERANCE", 0.0)
    net = DcganGenerator(28, 1, 4, 8, rng())
    with pytest.raises(FmrunError, match=r"is not written: for latent \(3, 8\) ONNX's result is off by"):
        export_onnx(net, tmp_path / "net.onnx", latent_dim=8)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_one_sentence_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(UserError, match=r'pip install "fmrun\[export\]"'):
        export_onnx(tiny("compact"), tmp_path / "net.onnx", channels=3)
