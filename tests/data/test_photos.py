"""Photographs: whatever a file is, what comes out looks like it, has its depth and alpha, and is where it should be."""

import io
import struct

import numpy as np
import pytest
import pyvips
import torch
from PIL import Image, ImageCms
from torch import nn

from fmrun.data.files import BadImage
from fmrun.data.photos import read_photo
from fmrun.models.tiling import Tiles
from fmrun.models.upscalers import Tiling, build_upscaler
from fmrun.runtime.errors import SaveError, UserError
from fmrun.runtime.report import Reporter
from fmrun.sample.upscale import bleed, enlarge, upscale_photos

TILES = Tiles(Tiling(4, 1), 16, 4)


class Nearest(nn.Module):
    def __init__(self, scale: int = 2):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x.repeat_interleave(self.scale, -1).repeat_interleave(self.scale, -2)


def doubled(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(2, axis=0).repeat(2, axis=1)


def noise(*shape: int, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def image_of(pixels: np.ndarray) -> pyvips.Image:
    """(H, W, C) as grey or colours."""
    kinds = ("b-w", "srgb") if pixels.dtype == np.uint8 else ("grey16", "rgb16")
    return pyvips.Image.new_from_array(pixels, interpretation=kinds[pixels.shape[-1] > 2])


def write(path, pixels: np.ndarray, **metadata) -> None:
    image = image_of(pixels).copy()
    for name, value in metadata.items():
        image.set_type(pyvips.GValue.gint_type, name, value)
    image.write_to_file(str(path))


def pixels_of(path) -> np.ndarray:
    """(H, W, C) of a file, by libvips alone."""
    image = pyvips.Image.new_from_file(str(path))
    return image.numpy().reshape(image.height, image.width, image.bands)


def seen(path) -> np.ndarray:
    """(H, W, C), as fmrun reads it."""
    image, _ = read_photo(path)
    return image.numpy().reshape(image.height, image.width, image.bands)


def run(path, out, **settings):
    settings = {"scale": 2, "channels": 3, "tiles": TILES, "report": Reporter(stream=io.StringIO())} | settings
    return upscale_photos(settings.pop("net", Nearest()), path, out, **settings)


def once(tmp_path, path, **settings) -> np.ndarray:
    (made,) = run(path, tmp_path / "out", **settings)
    return pixels_of(made)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_depth_and_channels_come_through(tmp_path, dtype, channels, suffix):
    pixels = noise(21, 33, channels, dtype=dtype)
    if channels % 2 == 0:
        pixels[..., -1] = np.iinfo(dtype).max
    write(source := tmp_path / "a.png", pixels)
    assert np.array_equal(seen(source), pixels)
    for net_channels in (1, 3, 4):
        (made,) = run(source, tmp_path / f"{net_channels}.{suffix}", channels=net_channels)
        assert np.array_equal(pixels_of(made), doubled(pixels))
        assert pixels_of(made).dtype == dtype


def tiff(pixels: np.ndarray, order: str, extra: int | None = None) -> bytes:
    height, width, channels = pixels.shape
    code = {"<": b"II*\0", ">": b"MM\0*"}[order]
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    bits = struct.pack(f"{order}{channels}H", *[8 * pixels.dtype.itemsize] * channels)
    tags = [(256, 4, width), (257, 4, height), (259, 3, 1), (262, 3, 2 if channels > 2 else 1), (277, 3, channels)]
    tags += [(278, 4, height), (279, 4, len(data)), (273, 4, 8)]
    tags += [] if extra is None else [(338, 3, extra)]
    where = 8 + len(data)
    tags += [(258, 3, None)]
    body = struct.pack(order + "H", len(tags))
    for tag, kind, value in sorted(tags, key=lambda t: t[0]):
        if value is None and channels > 2:
            body += struct.pack(order + "HHII", tag, kind, channels, where)
        else:
            value = 16 if value is None else value
            packed = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
            body += struct.pack(order + "HHI", tag, kind, 1) + packed
    return code + struct.pack(order + "I", where + len(bits)) + data + bits + body + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("channels", "extra"), [(1, None), (3, None), (4, 2), (4, 1)])
def test_16_bit_tiff_keeps_every_bit(tmp_path, order, channels, extra):
    pixels = noise(7, 9, channels, dtype=np.uint16)
    if extra == 1:  # premultiplied
        pixels[..., :3] = pixels[..., :3].astype(np.int64) * pixels[..., 3:] // 65535
    (tmp_path / "a.tif").write_bytes(tiff(pixels, order, extra))
    meant = pixels.astype(np.float64)
    if extra == 1:
        meant[..., :3] = (meant[..., :3] * 65535 / np.maximum(meant[..., 3:], 1)).clip(0, 65535)
    found = seen(tmp_path / "a.tif")
    assert found.dtype == np.uint16
    assert np.abs(found - meant).max() <= (extra == 1)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tif", "png", "gif", "avif"])
def test_formats(tmp_path, suffix):
    image = Image.fromarray(noise(18, 20, 3) // 8 * 8)
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(tmp_path / f"a.{suffix}") as found:
        meant = np.asarray(found.convert("RGB"))
    assert np.array_equal(once(tmp_path, tmp_path / f"a.{suffix}"), doubled(meant))


def test_palette_with_transparency_and_bilevel(tmp_path):
    image = Image.fromarray(noise(6, 6) // 64)
    image.putpalette(bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9]))
    image.save(tmp_path / "p.png", transparency=3)
    with Image.open(tmp_path / "p.png") as found:
        meant = np.asarray(found.convert("RGBA"))
    assert np.array_equal(seen(tmp_path / "p.png"), meant)
    assert 0 < (meant[..., 3] == 0).sum() < 36
    bits = noise(5, 5) > 127
    for suffix in ("png", "bmp"):
        Image.fromarray(bits).save(tmp_path / f"b.{suffix}")
        found = once(tmp_path, tmp_path / f"b.{suffix}", overwrite=True)
        assert np.array_equal(found[..., 0], doubled(bits * np.uint8(255)))


@pytest.mark.parametrize("channels", [1, 3])
def test_one_colour_may_mean_transparent(tmp_path, channels):
    pixels = noise(5, 6, channels)
    pixels[2, 3] = key = np.arange(7, 7 + channels, dtype=np.uint8)
    meaning = tuple(map(int, key)) if channels == 3 else int(key[0])
    Image.fromarray(pixels.squeeze()).save(tmp_path / "a.png", transparency=meaning)
    found = seen(tmp_path / "a.png")
    assert np.array_equal(found[..., :channels], pixels)
    assert np.array_equal(found[..., channels] == 0, (pixels == key).all(-1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_orientation_is_applied_and_not_kept(tmp_path, orientation, deep):
    pixels = noise(5, 8, 3, dtype=np.uint16 if deep else np.uint8)
    write(tmp_path / "a.tif", pixels, orientation=orientation)
    turns = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud]
    turns += [lambda a: a.swapaxes(0, 1), lambda a: np.rot90(a, -1)]
    turns += [lambda a: np.rot90(a, 2).swapaxes(0, 1), lambda a: np.rot90(a, 1)]
    (made,) = run(tmp_path / "a.tif", tmp_path / "out.tif")
    assert np.array_equal(pixels_of(made), doubled(turns[orientation - 1](pixels)))
    assert Image.open(made).getexif().get(0x0112, 1) == 1


def test_profile_is_kept_where_it_still_says_the_truth(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, pixels, kept in (
        ("rgb.jpg", (9, 9, 3), True),
        ("rgb.bmp", (9, 9, 3), False),
        ("grey.png", (9, 9), False),
    ):
        Image.fromarray(noise(*pixels)).save(tmp_path / name, icc_profile=srgb)
        with Image.open(run(tmp_path / name, tmp_path / "out", overwrite=True)[0]) as image:
            assert image.info.get("icc_profile") == (srgb if kept else None)
            assert image.mode == ("L" if name == "grey.png" else "RGB")


def test_cmyk_and_lab_become_srgb(tmp_path):
    Image.new("RGB", (9, 9), (250, 20, 30)).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(Image.new("RGB", (9, 9), (250, 20, 30)), lab).save(tmp_path / "l.tif")
    profiled = image_of(np.full((9, 9, 3), (200, 90, 80), np.uint8)).icc_transform("cmyk", input_profile="srgb")
    profiled.write_to_file(str(tmp_path / "p.jpg"), Q=95)
    with Image.open(tmp_path / "p.jpg") as image:
        profile = io.BytesIO(image.info["icc_profile"])
        meant = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    for name, colour, near in (
        ("c.jpg", (250, 20, 30), 6),
        ("l.tif", (250, 20, 30), 6),
        ("p.jpg", meant.getpixel((4, 4)), 1),
    ):
        assert np.abs(once(tmp_path, tmp_path / name).astype(int) - colour).max() <= near, name


def test_more_than_16_bits_are_refused(tmp_path):
    pyvips.Image.new_from_array(noise(9, 9).astype(np.float32)).write_to_file(str(tmp_path / "a.tif"))
    with pytest.raises(UserError, match=r"of more than 16 bits per pixel and channel \(.*a\.tif\)"):
        run(tmp_path / "a.tif", tmp_path / "out")


def test_colours_of_the_transparent_do_not_darken_edges(tmp_path):
    pixels = np.zeros((24, 24, 4), np.uint8)
    pixels[8:16, 8:16] = (200, 100, 50, 255)

    class Blur(Nearest):
        def forward(self, x):
            return super().forward(nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False))

    write(tmp_path / "a.png", pixels)
    made = once(tmp_path, tmp_path / "a.png", net=Blur())
    alpha = made[..., 3]
    assert 256 < (alpha > 0).sum() < 600
    assert np.abs(made[alpha > 0][:, :3].astype(int) - [200, 100, 50]).max() <= 1
    assert (alpha[18:30, 18:30] == 255).all()
    assert (alpha[:8] == 0).all()


def test_bleeding_keeps_what_is_seen_and_fills_what_is_not():
    colour = torch.rand(1, 3, 13, 22, generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    alpha = (torch.rand(1, 1, 13, 22, generator=torch.Generator().manual_seed(1)) < 0.1).float()
    filled = bleed(colour * alpha, alpha)
    assert torch.equal(filled * alpha, colour * alpha)
    assert filled.min() >= 0.5 - 1e-6
    nothing = torch.zeros_like(alpha)
    assert torch.equal(bleed(colour, nothing), colour)


def test_alpha_in_tiles_equals_alpha_at_once():
    photo = image_of(noise(70, 40, 4))
    many, one = (
        np.concatenate(list(enlarge(Nearest(3), photo, scale=3, channels=3, tiles=tiles)))
        for tiles in (TILES, Tiles(Tiling(4, 1), 200, 4))
    )
    assert np.abs(many.astype(int) - one).max() <= 1
    assert (many != one).mean() < 0.01


def test_a_real_net_makes_grey_of_grey_and_takes_each_depth():
    net = build_upscaler("compact", 2, 3, torch.Generator().manual_seed(0), features=4, blocks=1)
    grey = noise(20, 20, 1)
    shallow, fine = (
        np.concatenate(list(enlarge(net, image_of(pixels), scale=2, channels=3, tiles=TILES)))
        for pixels in (grey, grey.astype(np.uint16) * 257)
    )
    assert shallow.shape == fine.shape == (40, 40, 1)
    assert np.abs(fine / 257 - shallow).max() <= 0.501


def test_not_a_number_is_no_picture(tmp_path):
    class Broken(Nearest):
        def forward(self, x):
            return super().forward(x) * float("nan")

    write(tmp_path / "a.png", noise(5, 5, 3))
    with pytest.raises(UserError, match="not-a-number"):
        run(tmp_path / "a.png", tmp_path / "out", net=Broken())
    assert not list((tmp_path / "out").iterdir())


def test_folders_are_walked_and_keep_their_shape(tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("a.png", "deep/a.png", "deep/er/b.v2.png"):
        write(folder / name, noise(4, 4, 3))
    (folder / "notes.txt").write_text("no image")
    made = run(folder, tmp_path / "out")
    assert made == [tmp_path / "out" / name for name in ("a_x2.png", "deep/a_x2.png", "deep/er/b.v2_x2.png")]
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == made
    assert f"'{folder}': 1 .txt left out" in capsys.readouterr().err


def test_nothing_is_replaced_unasked(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.png", noise(4, 4, 3))
    (made,) = run(tmp_path / "in", tmp_path / "out")
    made.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"already there: .*a_x2\.png; give another --out, or --overwrite"):
        run(tmp_path / "in", tmp_path / "out")
    assert made.read_bytes() == b"mine"
    assert run(tmp_path / "in", tmp_path / "out", overwrite=True) == [made]


def test_one_file_goes_where_it_is_said(tmp_path):
    write(tmp_path / "a.png", noise(4, 4, 3))
    assert run(tmp_path / "a.png", tmp_path / "b.PNG") == [tmp_path / "b.PNG"]
    for source, out, words in (
        ("a.png", "a.png", "that is the image itself"),
        ("a.png", "c.jpg", "give a folder, or a name ending in .png, .tif, .tiff"),
        (".", "c.png", "give a folder"),
        ("missing.png", "out", "there is no file or folder"),
    ):
        with pytest.raises(UserError, match=words):
            run(tmp_path / source, tmp_path / out, overwrite=True)
    (tmp_path / "in").mkdir()
    for name in ("a.bmp", "a.png"):
        Image.fromarray(noise(4, 4, 3)).save(tmp_path / "in" / name)
    with pytest.raises(UserError, match=r"a\.bmp' and '.*a\.png' would both become '.*a_x2\.png': rename one of them"):
        run(tmp_path / "in", tmp_path / "out")


def test_all_that_cannot_be_read_is_named_and_the_others_are_made(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "cut.png", "z.png"):
        write(folder / name, noise(40, 40, 3))
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:900])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"hello")
    (folder / "svg.png").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>")
    with pytest.raises(UserError) as caught:
        run(folder, tmp_path / "out")
    text = str(caught.value)
    assert "4 of 6 images cannot be used" in text
    for name in ("cut.png", "empty.jpg", "text.jpg", "svg.png"):
        assert name in text
    assert "\n" not in text
    assert text.endswith("the others are done")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_x2.png", "z_x2.png"]
    with pytest.raises(BadImage):
        read_photo(folder / "text.jpg")


def test_only_the_first_of_several_frames_and_it_says_so(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    said = io.StringIO()
    made = once(tmp_path, tmp_path / "a.webp", report=Reporter(stream=said))
    assert tuple(made[0, 0]) == (255, 0, 0)
    assert "holds 2 images; the first is upscaled" in said.getvalue()


def test_a_disk_that_refuses_is_one_sentence(tmp_path):
    write(tmp_path / "a.png", noise(4, 4, 3))
    (tmp_path / "out").write_text("a file")
    with pytest.raises((SaveError, UserError), match="out"):
        run(tmp_path / "a.png", tmp_path / "out")


def test_the_same_photograph_gives_the_same_bytes(tmp_path):
    write(tmp_path / "a.png", noise(20, 30, 4))
    first, second = (run(tmp_path / "a.png", tmp_path / name)[0].read_bytes() for name in "bc")
    assert first == second
