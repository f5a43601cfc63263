from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_difftune.errors import DataError
from lightning_difftune.pictures import _font_with, center_crop, grid_of, to_pixels, to_png


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def halve(array: np.ndarray) -> np.ndarray:
    """Means of pairs along the width, then the height, rounded each time; sides are even."""
    for axis in (1, 0):
        first, second = (np.take(array, range(start, array.shape[axis], 2), axis).astype(int) for start in (0, 1))
        array = (first + second + 1) // 2
    return array


def bicubic_axis(array: np.ndarray, size: int) -> np.ndarray:
    """Antialiased cubic convolution (a = -0.5) along the first axis, written out tap by tap."""
    length = array.shape[0]
    scale = max(length / size, 1.0)
    out = []
    for i in range(size):
        centre = (i + 0.5) * length / size
        taps = range(max(0, math.floor(centre - 2 * scale + 0.5)), min(length, math.floor(centre + 2 * scale + 0.5)))
        x = np.abs((np.array(taps) - centre + 0.5) / scale)
        weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * (x**3 - 5 * x**2 + 8 * x - 4), 0))
        out.append(np.tensordot(weights / weights.sum(), array[list(taps)].astype(float), axes=1))
    return np.clip(np.floor(np.stack(out) + 0.5), 0, 255)


def plain_center_crop(array: np.ndarray, size: int, axes: tuple[int, int]) -> np.ndarray:
    while min(array.shape[:2]) >= 2 * size:
        array = halve(array)
    shape = [round(side * size / min(array.shape[:2])) for side in array.shape[:2]]
    for axis in axes:
        if array.shape[axis] != shape[axis]:
            array = bicubic_axis(array.swapaxes(0, axis), shape[axis]).swapaxes(0, axis)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (64, 64), (128, 256), (96, 40), (20, 48), (10, 7), (33, 47), (32, 61), (256, 1024)]
)
def test_crop_equals_the_plain_one(height, width):
    picture = noise(height, width)
    ours = to_pixels(Image.fromarray(picture), 32, 3)
    assert ours.shape == (3, 32, 32)
    # Pillow's weights are fixed-point, so one level off at the most; which axis it starts with depends on its version.
    plain = [plain_center_crop(picture, 32, axes) for axes in ((1, 0), (0, 1))]
    assert min(np.abs(ours.transpose(1, 2, 0) - expected).max() for expected in plain) <= 1


def test_crop_is_central_and_covers_the_shorter_side():
    picture = np.zeros((40, 100), np.uint8)
    picture[:, 30:70] = 200
    assert (to_pixels(picture, 40, 1) == 200).all()


def test_picture_of_the_size_passes_untouched():
    picture = noise(16, 16)
    assert np.array_equal(to_pixels(picture, 16, 3), picture.transpose(2, 0, 1))
    assert np.array_equal(to_pixels(Image.fromarray(picture), 16, 3), picture.transpose(2, 0, 1))
    assert np.array_equal(to_pixels(torch.from_numpy(picture).permute(2, 0, 1), 16, 3), picture.transpose(2, 0, 1))


def test_array_tensor_and_pil_picture_agree():
    picture = noise(50, 37)
    expected = to_pixels(Image.fromarray(picture), 24, 3)
    assert np.array_equal(to_pixels(picture, 24, 3), expected)
    assert np.array_equal(to_pixels(torch.from_numpy(picture).permute(2, 0, 1), 24, 3), expected)
    grey = picture[..., 0]
    assert np.array_equal(to_pixels(grey, 24, 1), to_pixels(torch.from_numpy(grey)[None], 24, 1))
    assert np.array_equal(to_pixels(grey, 24, 1), to_pixels(grey[..., None], 24, 1))


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation):
    stored = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(stored).save(file, format="PNG", exif=exif)
    loaded = Image.open(file)
    assert np.array_equal(to_pixels(loaded, 16, 3).transpose(1, 2, 0), UPRIGHT[orientation](stored))
    assert np.array_equal(np.asarray(loaded), stored)  # the caller's picture is left alone


def test_exif_survives_a_conversion_by_the_data_set():
    stored = noise(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(stored).save(file, format="PNG", exif=exif)
    converted = Image.open(file).convert("RGB")  # what torchvision's loaders do
    assert np.array_equal(to_pixels(converted, 16, 3).transpose(1, 2, 0), np.rot90(stored, -1))


def test_damaged_exif_does_not_spoil_a_picture():
    file = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(file, format="PNG", exif=b"Exif\0\0XX*\0 no such header")
    assert np.array_equal(to_pixels(Image.open(file), 16, 3), noise(16, 16).transpose(2, 0, 1))


def test_transparency_is_laid_on_white():
    picture = np.zeros((4, 4, 4), np.uint8)
    picture[0, 0] = (0, 0, 0, 255)
    picture[0, 1] = (255, 0, 0, 128)
    pixels = to_pixels(picture, 4, 3)
    assert pixels[:, 0, 0].tolist() == [0, 0, 0]
    assert pixels[:, 0, 1].tolist() == [255, 127, 127]
    assert pixels[:, 1:].min() == 255
    assert to_pixels(picture, 4, 1)[0, 3, 3] == 255
    grey_alpha = Image.fromarray(np.zeros((4, 4, 2), np.uint8), "LA")
    assert to_pixels(grey_alpha, 4, 1).min() == 255


def test_palette_with_a_transparent_entry():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.putpixel((0, 0), 0)
    file = io.BytesIO()
    picture.save(file, format="PNG", transparency=0)
    pixels = to_pixels(Image.open(file), 4, 3)
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 1, 1].tolist() == [10, 20, 30]


def test_sixteen_bits_keep_the_high_byte():
    picture = (np.arange(16, dtype=np.uint16) * 4369).reshape(4, 4)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    expected = (picture // 256).astype(np.uint8)
    assert np.array_equal(to_pixels(Image.open(file), 4, 1)[0], expected)
    assert np.array_equal(to_pixels(Image.fromarray(picture.astype(np.int32)), 4, 1)[0], expected)
    assert np.array_equal(to_pixels(picture, 4, 3), np.broadcast_to(expected, (3, 4, 4)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("channels", [1, 3])
def test_white_and_black_stay_so_in_every_mode(mode, channels):
    for level in (0, 255):
        source = Image.new("RGB", (9, 6), (level,) * 3).convert(mode)
        assert (to_pixels(source, 6, channels) == level).all()


def test_grey_is_the_luma_of_the_colours():
    picture = np.zeros((2, 2, 3), np.uint8)
    picture[0, 0], picture[0, 1], picture[1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert to_pixels(picture, 2, 1)[0].tolist() == [[76, 150], [29, 0]]


def test_boolean_arrays_are_black_and_white():
    assert to_pixels(np.eye(3, dtype=bool), 3, 1)[0].tolist() == (np.eye(3) * 255).tolist()


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((8, 8, 3), np.float32), np.zeros((3, 8, 8), np.uint8), torch.zeros(3, 8, 8), np.zeros(8, np.uint8)],
)
def test_wrong_arrays_are_refused_with_what_was_found(wrong):
    with pytest.raises(DataError, match=r"expected uint8 pixels.*\[-1, 1\]"):
        to_pixels(wrong, 8, 3)


def test_no_picture_at_all_is_refused():
    with pytest.raises(DataError, match="yields str where a picture is expected"):
        to_pixels("a.png", 8, 3)


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.float32), np.full((4, 4), 70_000, np.int32)])
def test_pictures_without_a_white_level_are_refused(array):
    with pytest.raises(ValueError, match="no defined white level"):
        to_pixels(Image.fromarray(array), 4, 1)


def test_memory_is_bounded_for_extreme_shapes(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(ValueError, match="would grow to"):
        center_crop(Image.new("L", (1, 5000)), 64)


def test_names_of_rows_may_have_accents() -> None:
    """A font without these letters draws the same box for all of them; macOS writes them as two characters."""
    pictures = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    by_name = {name: grid_of(pictures, 1, [name]) for name in ("ä", "ö", "ß", "é", "ж", "λ")}
    assert len({to_png(grid) for grid in by_name.values()}) == len(by_name)
    assert torch.equal(grid_of(pictures, 1, ["a\u0308"]), by_name["ä"])


def font_of(file, *characters):
    """A font whose characters are all a bar from the bottom to the top."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in [(100, 800), (300, 800), (300, 0)]:
        pen.lineTo(corner)
    pen.closePath()
    glyphs = {".notdef": TTGlyphPen(None).glyph(), "bar": pen.glyph()}
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap(dict.fromkeys(map(ord, characters), "bar"))
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (400, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": file.stem, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(file)
    return str(file)


def test_names_in_another_script_take_an_installed_font_that_has_it(tmp_path, monkeypatch):
    one, two = font_of(tmp_path / "one.ttf", "花"), font_of(tmp_path / "two.ttf", "花", "木")
    fonts = [one, two, str(tmp_path / "broken.ttf")]
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    known = fonts_with("rose")
    assert known.endswith("DejaVuSans.ttf")
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: fonts)
    _font_with.cache_clear()
    try:
        assert [fonts_with(name) for name in ("花", "花木", "rose", "ж", "꧁")] == [one, two, known, known, known]
        pictures = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
        assert not torch.equal(grid_of(pictures, 1, ["花"]), grid_of(pictures, 1, ["꧁"]))
    finally:
        _font_with.cache_clear()


def fonts_with(name):
    return _font_with(frozenset(name))
