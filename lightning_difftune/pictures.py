"""Pictures: conversion to 8-bit pixels and to values in [-1, 1], checks, grids and PNG."""

from __future__ import annotations

import contextlib
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import get_data_path
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightning_difftune.errors import DataError

UInt8Array = npt.NDArray[np.uint8]

_MODES = {1: "L", 3: "RGB"}
_SIDE = 96  # pixels; smaller pictures are shown enlarged
_GAP = 2  # pixels around each picture
_LABEL = 130  # pixels for the names of rows

# -- uint8 and [-1, 1] ------------------------------------------------------------------------------------------------


def to_uint8(pixel_values: Tensor) -> Tensor:
    """Pixel values, clamped to [-1, 1] => pictures uint8 of the same shape."""
    return ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pixel_values(pixels: Tensor) -> Tensor:
    """uint8 pixels of any shape => float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def check_pictures(pictures: Any, whose: str, count: int | None = None, channels: tuple[int, ...] = (1, 3)) -> None:
    """Check that ``pictures`` are (B, C, H, W) uint8.

    Args:
        pictures: The object to check.
        whose: Subject and verb of the message, for example ``"Canny was given"``.
        count: The expected B, if known.
        channels: The allowed values of C.

    Raises:
        DataError: If they are not, or there are none.

    Example:
        >>> check_pictures(torch.zeros(2, 3, 8, 8), "Canny was given")
        Traceback (most recent call last):
        lightning_difftune.errors.DataError: Canny was given torch.float32 (2, 3, 8, 8), expected pictures uint8 ...
    """
    expected = f"pictures uint8 (B, {' or '.join(map(str, channels))}, H, W)"
    if not isinstance(pictures, Tensor):
        raise DataError(f"{whose} a {type(pictures).__name__}, expected {expected} in a tensor.")
    wrong = pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] not in channels
    if wrong or not pictures.numel():
        raise DataError(
            f"{whose} {pictures.dtype} {tuple(pictures.shape)}, expected {expected}. Scale [-1, 1] by (x + 1) * 127.5, "
            "round, clamp to 0..255 and cast to uint8."
        )
    if count is not None and len(pictures) != count:
        raise DataError(f"{whose} {len(pictures)} pictures for {count} indices, expected one each.")


# -- pixels of a data set ---------------------------------------------------------------------------------------------


def to_pixels(image: object, image_size: int, channels: int) -> UInt8Array:
    """Centre-cropped 8-bit pixels of one picture.

    EXIF orientation is applied, transparency is composited on white, colour and grey are converted into each other
    (ITU-R 601-2 luma), 16-bit grey keeps its high byte. An array or tensor of the right size and channels is not
    changed.

    Args:
        image: A ``PIL.Image``, an array (H, W) or (H, W, 1, 3 or 4), or a tensor (H, W) or (1, 3 or 4, H, W); arrays
            and tensors are uint8, arrays may also be bool or uint16.
        image_size: Height and width of the result.
        channels: 1 (grey) or 3 (RGB).

    Returns:
        (channels, image_size, image_size) uint8, a copy.

    Raises:
        DataError: The object is not a picture. Pillow's errors on damaged bytes are passed on.
        ValueError: A picture without a defined white level (32-bit integer or floating point).
    """
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
        if image.ndim == 3:
            image = image.transpose(1, 2, 0)
    if isinstance(image, np.ndarray):
        array = _eight_bit_array(image)
        if array.shape == (image_size, image_size, channels):
            return np.array(array.transpose(2, 0, 1), order="C")
        image = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
    if not isinstance(image, Image.Image):
        raise DataError(
            f"the data set yields {type(image).__name__} where a picture is expected: a PIL image, a uint8 array "
            "(H, W) or (H, W, C), or a uint8 tensor (C, H, W)."
        )
    cropped = center_crop(_convert(_upright(image), channels), image_size)
    return np.array(np.asarray(cropped).reshape(image_size, image_size, channels).transpose(2, 0, 1), order="C")


def with_channels(maps: Tensor, channels: int) -> Tensor:
    """Maps (B, c, H, W) with ``channels`` channels if that loses no colour, as of grey saved in colour; else unchanged.

    Example:
        >>> with_channels(torch.ones(2, 3, 8, 8), 1).shape, with_channels(torch.rand(2, 3, 8, 8), 1).shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 3, 8, 8]))
    """
    if maps.ndim != 4 or maps.shape[1] == channels or not (maps == maps[:, :1]).all():
        return maps
    return maps[:, :1].expand(-1, channels, -1, -1)


def largest_value(image: object) -> int | None:
    """The largest value of a 16-bit picture, from 0 to 65,535; ``None`` for an 8-bit one.

    Pillow keeps only the high bytes of colour pictures, so the result is the largest value with that high byte.
    """
    if isinstance(image, Tensor):
        image = image.numpy()
    if isinstance(image, Image.Image):
        tile: Any = getattr(image, "tile", None)  # the stored format; empty after decoding
        stored = tile[0][3] if tile else ""
        if image.mode.startswith("RGB") and ";16" in str(stored):
            return int(np.asarray(image)[..., :3].max()) * 256 + 255
        return int(np.asarray(image).max()) if image.mode.startswith("I") else None
    return int(image.max()) if isinstance(image, np.ndarray) and image.dtype == np.uint16 else None


def center_crop(image: Image.Image, image_size: int) -> Image.Image:
    """The centre crop of Dhariwal & Nichol (2021), used in DiT's training.

    The picture is halved with a box filter as long as its shorter side stays at least ``image_size``,
    resized bicubically until that side is ``image_size``, and cropped to the central square.

    Args:
        image: Any picture of mode ``L`` or ``RGB``.
        image_size: Height and width of the result, in pixels.

    Raises:
        ValueError: The aspect ratio is so extreme that the resized picture would exceed Pillow's limit against
            decompression bombs.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if min(image.size) != image_size:
        scale = image_size / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"a picture of {image.width}x{image.height} pixels would grow to {size[0]}x{size[1]} before the crop"
            )
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def _eight_bit_array(array: npt.NDArray[np.generic]) -> UInt8Array:
    """Any accepted array => (H, W, C) uint8 with C in 1, 3, 4."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype not in (np.uint8, np.uint16, np.bool_):
        raise DataError(
            f"the data set yields an array of shape {array.shape} and type {array.dtype}; expected uint8 pixels, "
            "(H, W) or (H, W, 1, 3 or 4) in an array, (1, 3 or 4, H, W) in a tensor. Undo scaling and normalisation "
            "in the data set's transform: the pictures are scaled to [-1, 1] later."
        )
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return (array.astype(np.uint16) >> 8).astype(np.uint8)
    return array.astype(np.uint8, copy=False)


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # outside the next block, which must not hide errors about the pixels
    with contextlib.suppress(Exception):  # damaged EXIF data does not affect the pixels
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = image.copy()  # the data set may own this one
            ImageOps.exif_transpose(image, in_place=True)
    return image


def _convert(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "F":
        raise ValueError("a floating point picture has no defined white level; convert it to 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # 16-bit grey, which some Pillow versions open as 32-bit integers
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > np.iinfo(np.uint16).max):
            raise ValueError("a 32-bit integer picture has no defined white level; convert it to 8 or 16 bits")
        return _convert(Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8)), channels)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert(_MODES[channels])


# -- grids and PNG ----------------------------------------------------------------------------------------------------


def grid_of(pictures: Tensor, columns: int, names: Sequence[str] | None = None) -> Tensor:
    """A grid of pictures, small ones enlarged, with the name of each row on the left.

    Args:
        pictures: (N, 1 or 3, H, W) uint8.
        columns: Pictures per row.
        names: Names of the rows, if any. Pass them to :func:`to_png` as ``rows``.

    Returns:
        (3, height, width) uint8.
    """
    from torchvision.utils import make_grid

    factor = max(1, _SIDE // pictures.shape[-1])
    enlarged = pictures.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    grid = make_grid(enlarged, nrow=columns, padding=_GAP)
    if len(pictures) == 1:  # make_grid adds no gap around a single picture
        grid = torch.nn.functional.pad(grid, (_GAP,) * 4)
    return grid if names is None else torch.cat([_labels(names, grid.shape[1]), grid], 2)


def _labels(names: Sequence[str], height: int) -> Tensor:
    """Names below each other, each at the middle of its row: (3, height, _LABEL) uint8."""
    strip = Image.new("RGB", (_LABEL, height))
    draw = ImageDraw.Draw(strip)
    row = height / len(names)
    for number, name in enumerate(names):
        composed = unicodedata.normalize("NFC", name)
        lines = textwrap.wrap(composed, 18, max_lines=max(1, int(row // 15)), placeholder=" ...")
        middle, font = (6, (number + 0.5) * row), ImageFont.truetype(_font_with(frozenset(composed)), 11)
        draw.multiline_text(middle, "\n".join(lines), font=font, anchor="lm", fill="white")
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1)


@lru_cache
def _font_with(characters: frozenset[str]) -> str:
    """DejaVu Sans, or if it lacks some of the characters the installed font that has most of them."""
    known = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    if not _lacking(known, characters):
        return known
    from matplotlib.font_manager import findSystemFonts  # reads or builds its cache of all fonts

    return min([known, *sorted(findSystemFonts())], key=lambda font: (_lacking(font, characters), font != known))


def _lacking(font: str, characters: frozenset[str]) -> int:
    """The number of characters that a font does not have; all, if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        known = FT2Font(font).get_charmap()
    except (OSError, RuntimeError):
        return len(characters)
    return sum(ord(character) not in known for character in characters)


def pictures_of(grid: Path, rows: int, columns: int) -> Tensor:
    """The pictures (rows, columns, 3, H, W) uint8 of a saved :func:`grid_of`, at their size in the grid."""
    with Image.open(grid) as image:
        left = _GAP + (_LABEL if "rows" in image.info else 0)
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[:, _GAP:, left:]
    height, width = pixels.shape[1] // rows, pixels.shape[2] // columns
    cells = pixels.unfold(1, height, height).unfold(2, width, width)  # (3, rows, columns, height, width)
    return cells[..., :-_GAP, :-_GAP].permute(1, 2, 0, 3, 4)


def to_png(picture: Tensor, **texts: str) -> bytes:
    """A picture (1 or 3, H, W) uint8 as a PNG file with text chunks."""
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    pixels = picture.permute(1, 2, 0).cpu().numpy()
    content = BytesIO()
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    image.save(content, format="PNG", pnginfo=chunks)
    return content.getvalue()
