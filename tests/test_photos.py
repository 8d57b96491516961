"""Photographs: whatever a file is, what comes out looks like it, has its depth and alpha, and is where it should be."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn

from fmrun.data.files import BadImage
from fmrun.errors import SaveError, UserError
from fmrun.models.upscalers import build_upscaler
from fmrun.photos import Photo, png, read
from fmrun.report import Reporter
from fmrun.tiling import layout
from fmrun.upscaling import bleed, check, enlarge, plan, upscale_photos

CUT = layout(0, tile=16)


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


def reference_png(data: bytes) -> np.ndarray:
    """(H, W, C) of a PNG without interlacing, by the specification, byte by byte."""
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + content)
        chunks[kind] = chunks.get(kind, b"") + content
        at += 12 + size
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    step = channels * depth // 8
    raw, row = zlib.decompress(chunks[b"IDAT"]), width * step
    lines = np.zeros((height + 1, row + step), dtype=np.int64)
    for y in range(height):
        line = raw[y * (row + 1) : (y + 1) * (row + 1)]
        for x in range(row):
            a, b, c = lines[y + 1, x], lines[y, x + step], lines[y, x]
            p = a + b - c
            nearest = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            lines[y + 1, x + step] = (line[x + 1] + [0, a, b, (a + b) // 2, nearest][line[0]]) % 256
    flat = lines[1:, step:].astype(np.uint8).reshape(height, width, channels, depth // 8)
    return flat[..., 0] if depth == 8 else flat[..., 0].astype(np.uint16) * 256 + flat[..., 1]


def write_png(path, pixels: np.ndarray, chunks=()) -> None:
    path.write_bytes(b"".join(png(pixels.shape[1], pixels.shape[0], iter([pixels]), chunks)))


def run(path, out, **settings):
    settings = {"scale": 2, "channels": 3, "cut": CUT, "report": Reporter(stream=io.StringIO())} | settings
    return upscale_photos(settings.pop("net", Nearest()), path, out, **settings)


def once(tmp_path, path, **settings) -> Photo:
    (made,) = run(path, tmp_path / "out", **settings)
    return read(made)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_is_written_by_the_specification(dtype, channels):
    smooth = np.add.outer(np.arange(70), np.arange(9))[..., None] * np.arange(1, channels + 1) * 700
    for pixels in (noise(70, 9, channels, dtype=dtype), smooth.astype(dtype), np.zeros((1, 1, channels), dtype)):
        parts = [pixels[:1], pixels[1:66], pixels[66:]] if len(pixels) > 66 else [pixels]
        data = b"".join(png(pixels.shape[1], pixels.shape[0], iter(parts)))
        assert np.array_equal(reference_png(data), pixels)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.size == (pixels.shape[1], pixels.shape[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_depth_and_channels_of_a_png_come_through(tmp_path, dtype, channels):
    pixels = noise(21, 33, channels, dtype=dtype)
    if channels % 2 == 0:
        pixels[..., -1] = np.iinfo(dtype).max
    write_png(tmp_path / "a.png", pixels)
    photo = read(tmp_path / "a.png")
    assert photo.colour.dtype == dtype
    whole = photo.colour if photo.alpha is None else np.concatenate([photo.colour, photo.alpha[..., None]], -1)
    assert np.array_equal(whole, pixels)
    for net_channels in (1, 3, 4):
        made = run(tmp_path / "a.png", tmp_path / str(net_channels), channels=net_channels)
        assert made == [tmp_path / str(net_channels) / "a_x2.png"]
        assert np.array_equal(reference_png(made[0].read_bytes()), doubled(pixels))


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
    photo = read(tmp_path / "a.tif")
    assert photo.colour.dtype == np.uint16
    colour = pixels[..., :3].astype(np.float64)
    if extra == 1:
        colour = (colour * 65535 / np.maximum(pixels[..., 3:], 1)).round().clip(0, 65535)
    assert np.array_equal(photo.colour, colour.astype(np.uint16))
    assert (photo.alpha is None) == (channels < 4)
    if channels == 4:
        assert np.array_equal(photo.alpha, pixels[..., 3])


def test_compressed_16_bit_tiff_too(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    for order in "<>":
        for channels in (3, 4):
            pixels = noise(37, 29, channels, dtype=np.uint16)
            settings = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
            tifffile.imwrite(
                tmp_path / "a.tif",
                pixels,
                photometric="rgb",
                compression="zlib",
                predictor=True,
                byteorder=order,
                **settings,
            )
            photo = read(tmp_path / "a.tif")
            assert np.array_equal(photo.colour, pixels[..., :3])


def test_interlaced_16_bits(tmp_path):
    """Adam7 by hand: seven passes without filters."""
    for channels, kind in ((2, 4), (3, 2)):
        pixels = noise(11, 13, channels, dtype=np.uint16)
        raw = b""
        for y, x, dy, dx in (
            (0, 0, 8, 8),
            (0, 4, 8, 8),
            (4, 0, 8, 4),
            (0, 2, 4, 4),
            (2, 0, 4, 2),
            (0, 1, 2, 2),
            (1, 0, 2, 1),
        ):
            for line in pixels[y::dy, x::dx]:
                raw += b"\0" + line.astype(">u2").tobytes() if line.size else b""
        parts = [
            (b"IHDR", struct.pack(">IIBBBBB", 13, 11, 16, kind, 0, 0, 1)),
            (b"IDAT", zlib.compress(raw)),
            (b"IEND", b""),
        ]
        chunks = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts)
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
        photo = read(tmp_path / "a.png")
        whole = photo.colour if photo.alpha is None else np.concatenate([photo.colour, photo.alpha[..., None]], -1)
        assert np.array_equal(whole, pixels)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tif", "png", "gif"])
def test_formats(tmp_path, suffix):
    image = Image.fromarray(noise(18, 20, 3) // 8 * 8)
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(tmp_path / f"a.{suffix}") as found:
        meant = np.asarray(found.convert("RGB"))
    made = once(tmp_path, tmp_path / f"a.{suffix}")
    assert np.array_equal(made.colour, doubled(meant))
    assert made.alpha is None


def test_palette_with_transparency_and_bilevel(tmp_path):
    image = Image.fromarray(noise(6, 6) // 64)
    image.putpalette(bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9]))
    image.save(tmp_path / "p.png", transparency=3)
    photo = read(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as found:
        meant = np.asarray(found.convert("RGBA"))
    assert np.array_equal(photo.colour, meant[..., :3])
    assert np.array_equal(photo.alpha, meant[..., 3])
    assert 0 < (photo.alpha == 0).sum() < 36
    bits = noise(5, 5) > 127
    Image.fromarray(bits).save(tmp_path / "b.png")
    assert np.array_equal(once(tmp_path, tmp_path / "b.png").colour[..., 0], doubled(bits * np.uint8(255)))


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.uint8, 3), (np.uint16, 1), (np.uint16, 3)])
def test_one_colour_may_mean_transparent(tmp_path, dtype, channels):
    pixels = noise(5, 6, channels, dtype=dtype)
    pixels[2, 3] = key = np.arange(7, 7 + channels, dtype=dtype)
    pixels[1, 1] = key + (dtype(0) if channels == 1 else np.array([0, 0, 1], dtype))
    write_png(tmp_path / "a.png", pixels, ((b"tRNS", b"".join(struct.pack(">H", k) for k in key)),))
    photo = read(tmp_path / "a.png")
    assert np.array_equal(photo.colour, pixels)
    assert photo.alpha is not None
    assert np.array_equal(photo.alpha == 0, (pixels == key).all(-1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_orientation_is_applied_and_not_kept(tmp_path, orientation, deep):
    pixels = noise(5, 8, 3, dtype=np.uint16 if deep else np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_png(tmp_path / "a.png", pixels, ((b"eXIf", exif.tobytes()[6:]),))
    turns = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud]
    turns += [lambda a: a.swapaxes(0, 1), lambda a: np.rot90(a, -1)]
    turns += [lambda a: np.rot90(a, 2).swapaxes(0, 1), lambda a: np.rot90(a, 1)]
    made = once(tmp_path, tmp_path / "a.png")
    assert np.array_equal(made.colour, doubled(turns[orientation - 1](pixels)))


def test_profile_is_kept_where_it_still_says_the_truth(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise(9, 9, 3)).save(tmp_path / "rgb.jpg", icc_profile=srgb)
    Image.fromarray(noise(9, 9)).save(tmp_path / "grey.png", icc_profile=srgb)
    kept, dropped = (run(tmp_path / name, tmp_path / "out")[0] for name in ("rgb.jpg", "grey.png"))
    with Image.open(kept) as image:
        assert image.info["icc_profile"] == srgb
    with Image.open(dropped) as image:
        assert image.mode == "L"
        assert "icc_profile" not in image.info
    write_png(tmp_path / "gamma.png", noise(4, 4, 3), ((b"gAMA", struct.pack(">I", 100000)),))
    with Image.open(run(tmp_path / "gamma.png", tmp_path / "out")[0]) as image:
        assert image.info["gamma"] == 1.0


def test_cmyk_and_lab_become_srgb(tmp_path):
    Image.new("RGB", (9, 9), (250, 20, 30)).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(Image.new("RGB", (9, 9), (250, 20, 30)), lab).save(tmp_path / "l.tif")
    for name in ("c.jpg", "l.tif"):
        made = once(tmp_path, tmp_path / name).colour
        assert np.abs(made.astype(int) - [250, 20, 30]).max() <= 6


def test_colours_of_the_transparent_do_not_darken_edges(tmp_path):
    pixels = np.zeros((24, 24, 4), np.uint8)
    pixels[8:16, 8:16] = (200, 100, 50, 255)

    class Blur(Nearest):
        def forward(self, x):
            return super().forward(nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False))

    write_png(tmp_path / "a.png", pixels)
    made = once(tmp_path, tmp_path / "a.png", net=Blur())
    seen = made.alpha > 0
    assert 256 < seen.sum() < 600
    assert np.abs(made.colour[seen].astype(int) - [200, 100, 50]).max() <= 1
    assert (made.alpha[18:30, 18:30] == 255).all()
    assert (made.alpha[:8] == 0).all()


def test_bleeding_keeps_what_is_seen_and_fills_what_is_not():
    colour = torch.rand(1, 3, 13, 22, generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    alpha = (torch.rand(1, 1, 13, 22, generator=torch.Generator().manual_seed(1)) < 0.1).float()
    filled = bleed(colour * alpha, alpha)
    assert torch.equal(filled * alpha, colour * alpha)
    assert filled.min() >= 0.5 - 1e-6
    nothing = torch.zeros_like(alpha)
    assert torch.equal(bleed(colour, nothing), colour)


def test_alpha_in_bands_equals_alpha_at_once():
    photo = Photo(noise(70, 40, 3), noise(70, 40))
    many, one = (
        np.concatenate(list(enlarge(Nearest(3), photo, scale=3, channels=3, cut=cut)))
        for cut in (CUT, layout(0, tile=200))
    )
    assert np.abs(many.astype(int) - one).max() <= 1
    assert (many != one).mean() < 0.01


def test_a_real_net_makes_grey_of_grey_and_takes_each_depth():
    net = build_upscaler("compact", 2, 3, torch.Generator().manual_seed(0), features=4, blocks=1)
    grey = noise(20, 20, 1)
    shallow = np.concatenate(list(enlarge(net, Photo(grey, None), scale=2, channels=3, cut=CUT)))
    deep = Photo(grey.astype(np.uint16) * 257, None)
    fine = np.concatenate(list(enlarge(net, deep, scale=2, channels=3, cut=CUT)))
    assert shallow.shape == fine.shape == (40, 40, 1)
    assert np.abs(fine / 257 - shallow).max() <= 0.501


def test_not_a_number_is_no_picture(tmp_path):
    class Broken(Nearest):
        def forward(self, x):
            return super().forward(x) * float("nan")

    write_png(tmp_path / "a.png", noise(5, 5, 3))
    with pytest.raises(UserError, match="not-a-number"):
        run(tmp_path / "a.png", tmp_path / "out", net=Broken())
    assert not (tmp_path / "out").exists()


def test_folders_are_walked_and_keep_their_shape(tmp_path, capsys):
    folder = tmp_path / "in"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("a.png", "deep/a.png", "deep/er/b.v2.png"):
        write_png(folder / name, noise(4, 4, 3))
    (folder / "notes.txt").write_text("no image")
    told = []
    made = run(folder, tmp_path / "out", progress=lambda *done: told.append(done))
    assert made == [tmp_path / "out" / name for name in ("a_x2.png", "deep/a_x2.png", "deep/er/b.v2_x2.png")]
    assert all(path.is_file() for path in made)
    assert told == [(1, 1)] * 3
    assert f"'{folder}': 1 .txt left out" in capsys.readouterr().err


def test_nothing_is_replaced_unasked_and_results_are_not_upscaled_again(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_png(folder / "a.png", noise(4, 4, 3))
    for out in (folder, folder / "out", tmp_path / "other"):
        run(folder, out)
        for path in tmp_path.rglob("*_x2.png"):
            path.write_bytes(b"mine")
        with pytest.raises(UserError, match=r"already there: .*a_x2\.png; give another --out, or --overwrite"):
            run(folder, out)
        assert (out / "a_x2.png").read_bytes() == b"mine"
        assert run(folder, out, overwrite=True) == [out / "a_x2.png"]
        for path in tmp_path.rglob("*_x2.png"):
            path.unlink()


def test_one_file_goes_where_it_is_said(tmp_path):
    write_png(tmp_path / "a.png", noise(4, 4, 3))
    assert run(tmp_path / "a.png", tmp_path / "b.PNG") == [tmp_path / "b.PNG"]
    with pytest.raises(UserError, match="that is the image itself"):
        run(tmp_path / "a.png", tmp_path / "a.png", overwrite=True)
    with pytest.raises(UserError, match="a folder of images needs a folder"):
        run(tmp_path, tmp_path / "c.png")
    with pytest.raises(UserError, match="there is no file or folder"):
        run(tmp_path / "missing.png", tmp_path / "out")
    Image.fromarray(noise(4, 4, 3)).save(tmp_path / "a.bmp")
    with pytest.raises(UserError, match=r"a\.bmp' and '.*a\.png' would all become '.*a_x2\.png': rename all but one"):
        run(tmp_path, tmp_path / "out")


def test_all_that_cannot_be_read_is_named_before_anything_is_made(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "cut.png", "z.png"):
        write_png(folder / name, noise(40, 40, 3))
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:900])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_bytes(b"hello")
    with pytest.raises(UserError) as caught:
        run(folder, tmp_path / "out")
    text = str(caught.value)
    assert "3 of 5 images cannot be used" in text
    for name in ("cut.png", "empty.jpg", "text.jpg"):
        assert name in text
    assert "\n" not in text
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadImage):
        read(folder / "text.jpg")


def test_only_the_first_of_several_frames_and_it_says_so(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    said = io.StringIO()
    made = once(tmp_path, tmp_path / "a.webp", report=Reporter(stream=said))
    assert tuple(made.colour[0, 0]) == (255, 0, 0)
    assert "holds 2 images; the first is upscaled" in said.getvalue()


def test_a_disk_that_refuses_is_one_sentence(tmp_path):
    write_png(tmp_path / "a.png", noise(4, 4, 3))
    (tmp_path / "out").write_text("a file")
    with pytest.raises((SaveError, UserError), match="out"):
        run(tmp_path / "a.png", tmp_path / "out")


def test_the_same_photograph_gives_the_same_bytes(tmp_path):
    write_png(tmp_path / "a.png", noise(20, 30, 4))
    first, second = (run(tmp_path / "a.png", tmp_path / name)[0].read_bytes() for name in "bc")
    assert first == second
    jobs = plan(tmp_path / "a.png", tmp_path / "d", 2)
    check(jobs)
