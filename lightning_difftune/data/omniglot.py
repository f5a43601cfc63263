"""Omniglot characters drawn with MNIST's pen: the source domain of a small model that is tuned to digits.

MNIST's pictures are black-and-white scans, scaled into a 20-pixel box with antialiasing and pasted so that the centre of
mass lies at the centre of 28 x 28 pixels (LeCun et al. 1998, "Gradient-based learning applied to document recognition",
section III.A). Omniglot's drawings (Lake et al. 2015) are mouse traces of a constant width. Rendered through the steps
below they share MNIST's low-level statistics, so that what a model keeps of them also serves the digits.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_difftune.errors import ConfigError, DataError

DRAWING_SIZE = 105  # pixels; every Omniglot drawing
_TORCHVISION_FOLDER = Path("omniglot-py", "images_background")
_REACH = 18  # source pixels; farther from the ink no pen is wide enough to matter
_SUPERSAMPLING = 3
_DRAWINGS_AT_ONCE = 64

# Jitter of one rendering, tuned so that the renderings match MNIST (see the class docstring).
_PEN_WIDTH_MEAN, _PEN_WIDTH_LOG_STD = 2.7, 0.2  # output pixels at a 20-pixel box
_PEN_WIDTH_RANGE = (1.2, 4.5)
_PRESSURE_STD = 0.2  # of the width along the strokes
_SLANT_MEAN, _SLANT_STD = 0.25, 0.25  # tangent; to the right
_ROTATION_STD = 0.12  # radians
_ASPECT_LOG_STD = 0.2
_EDGE_WIDTH = 0.3  # output pixels
_SMOOTHING = 2.0  # source pixels
_PEAK = 254  # grey level of full ink: MNIST's core is 253 to 255
_APART = 0.75  # of the rate at which separate strokes gain area
_MIN_EXTENT = 12  # source pixels; a dot is not blown up beyond this

_HOW_TO_GET = (
    "Download the drawings with torchvision.datasets.Omniglot(root, download=True) and pass the same root, "
    "or pass an .npz that holds them."
)


class RenderedOmniglot(Dataset[tuple[Tensor, int]]):
    """Every Omniglot drawing, rendered ``variants`` times as MNIST was made.

    Item ``i`` is drawing ``i % N``, variant ``i // N``, and depends on ``(seed, i)`` alone. Per rendering the pen's
    width, its pressure along the strokes, slant, rotation and aspect are drawn anew; the drawing is scaled (aspect
    kept) until its longer side fills the box, antialiased, and shifted by whole pixels until its centre of mass lies at
    pixel ``image_size / 2``, as in MNIST. All renderings are made at first use and kept in memory (784 bytes each);
    nothing is written to disk.

    Args:
        root: An ``.npz`` file with ``ink`` (N, ceil(105 * 105 / 8)) uint8, packed bits, 1 = ink, ``labels`` (N,) and
            ``class_names`` (K,); or the root folder of ``torchvision.datasets.Omniglot(root, background=True)``.
        variants: Renderings per drawing.
        seed: Seed of the jitter.
        image_size: Height and width of a picture, in pixels.
        box: Longer side of the rendered character, in pixels.

    Attributes:
        num_classes: Number of characters K; all alphabets share one flat list.
        class_names: ``alphabet/character`` of each class.
        labels: (N * variants,) int64, the class of each item.

    Raises:
        ConfigError: ``variants`` is not positive or the box does not fit the picture.
        DataError: ``root`` does not exist or does not hold Omniglot drawings.
    """

    def __init__(
        self, root: str | Path, variants: int = 16, seed: int = 0, image_size: int = 28, box: int = 20
    ) -> None:
        if variants < 1:
            raise ConfigError(f"variants must be 1 or more, found {variants}; it is the number of renderings a drawing.")
        if not 8 <= box <= image_size:
            raise ConfigError(
                f"box must lie between 8 and image_size ({image_size}), found {box}; MNIST has box 20 in 28."
            )
        self.root = Path(root)
        self.variants, self.seed, self.image_size, self.box = variants, seed, image_size, box
        self._ink, labels, self.class_names = _read_folder(self.root) if self.root.is_dir() else _read_npz(self.root)
        self.num_classes = len(self.class_names)
        self.labels: NDArray[np.int64] = np.tile(labels, variants)
        self._images: Tensor | None = None

    def __len__(self) -> int:
        """Drawings times variants."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Picture (1, image_size, image_size) uint8, white on black, and its class."""
        return self.images[index], int(self.labels[index])

    @property
    def images(self) -> Tensor:
        """All pictures, (N * variants, 1, image_size, image_size) uint8; rendered when first asked for."""
        if self._images is None:
            self._images = self._render_all()
        return self._images

    def _render_all(self) -> Tensor:
        drawings = len(self._ink)
        jitter = [_Jitter(drawings, self.seed, variant) for variant in range(self.variants)]
        images = torch.empty((self.variants, drawings, 1, self.image_size, self.image_size), dtype=torch.uint8)
        for start in range(0, drawings, _DRAWINGS_AT_ONCE):
            chunk = slice(start, start + _DRAWINGS_AT_ONCE)
            ink = torch.from_numpy(np.unpackbits(self._ink[chunk], axis=1, count=DRAWING_SIZE**2)).bool()
            ink = F.pad(ink.view(-1, DRAWING_SIZE, DRAWING_SIZE), (_REACH,) * 4)
            distance, half_width, widest = _measure(ink)
            ends = _row_ends(ink)
            for variant in range(self.variants):
                boxed = _draw(distance, ends, half_width, widest, jitter[variant].rows(chunk), self.box)
                images[variant, chunk] = _centre(boxed, self.image_size)
        return images.flatten(0, 1)


class _Jitter:
    """Random pen and pose of one variant of every drawing; row n does not depend on the number of rows."""

    def __init__(self, drawings: int, seed: int, variant: int) -> None:
        noise = np.random.default_rng((seed, variant)).standard_normal((drawings, 20))
        self._noise = torch.from_numpy(noise.clip(-2.5, 2.5)).float()

    def rows(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Pen width (B,) and pressure (B, 1, 4, 4) as factors, and pose (B, 2, 2): drawing to picture, area kept."""
        width, slant, angle, aspect, pressure = self._noise[chunk].split((1, 1, 1, 1, 16), dim=1)
        pen = (_PEN_WIDTH_MEAN * (width * _PEN_WIDTH_LOG_STD).exp()).clamp(*_PEN_WIDTH_RANGE).flatten()
        cos, sin = (angle * _ROTATION_STD).cos(), (angle * _ROTATION_STD).sin()
        stretch, shear = (aspect * _ASPECT_LOG_STD / 2).exp(), -(_SLANT_MEAN + slant * _SLANT_STD)  # minus: y points down
        zero = torch.zeros_like(stretch)
        rotation = torch.stack([cos, -sin, sin, cos], dim=-1).view(-1, 2, 2)
        slant_and_aspect = torch.stack([stretch, shear / stretch, zero, 1 / stretch], dim=-1).view(-1, 2, 2)
        return pen, (1 + _PRESSURE_STD * pressure).view(-1, 1, 4, 4), rotation @ slant_and_aspect


def _read_npz(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """Packed ink (N, bytes), labels (N,) and class names of an ``.npz`` file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            ink, labels, names = archive["ink"], archive["labels"], archive["class_names"]
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. {_HOW_TO_GET}") from error
    except (KeyError, ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is not an .npz of Omniglot drawings with the arrays ink, labels and class_names ({error}). "
            f"{_HOW_TO_GET}"
        ) from error
    row_bytes = -(-(DRAWING_SIZE**2) // 8)
    if ink.dtype != np.uint8 or ink.ndim != 2 or ink.shape[1] != row_bytes or not len(ink):
        raise DataError(
            f"{path}: ink must be uint8 of shape (N, {row_bytes}), the packed bits of {DRAWING_SIZE} x {DRAWING_SIZE} "
            f"drawings, found {ink.dtype} {ink.shape}. Pack it with np.packbits(ink.reshape(N, -1), axis=1)."
        )
    if labels.shape != (len(ink),) or labels.min() < 0 or labels.max() >= len(names):
        raise DataError(
            f"{path}: labels must be {len(ink)} numbers in 0..{len(names) - 1}, one a drawing, found shape "
            f"{labels.shape}, values {labels.min()}..{labels.max()}. Make labels index class_names."
        )
    empty = np.flatnonzero(~ink.any(axis=1))
    if len(empty):
        raise DataError(f"{path}: drawing {empty[0]} has no ink ({len(empty)} such drawings). Remove them.")
    return ink, labels.astype(np.int64), [str(name) for name in names]


def _read_folder(root: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """The same from ``root/omniglot-py/images_background/<alphabet>/<character>/*.png``, sorted by name."""
    folder = root / _TORCHVISION_FOLDER
    files = sorted(folder.glob("*/*/*.png"))
    if not files:
        raise DataError(f"{folder} holds no drawings (<alphabet>/<character>/*.png). {_HOW_TO_GET}")
    of_file = [path.parent.relative_to(folder).as_posix() for path in files]
    names = sorted(set(of_file))
    ink = np.stack([_read_drawing(path) for path in files])
    index = {name: label for label, name in enumerate(names)}
    return ink, np.array([index[name] for name in of_file], dtype=np.int64), names


def _read_drawing(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            drawing = np.asarray(image.convert("L")) < 128  # black ink on white
    except OSError as error:
        raise DataError(f"{path} cannot be read as a picture ({error}). Delete it and download Omniglot anew.") from error
    if drawing.shape != (DRAWING_SIZE, DRAWING_SIZE) or not drawing.any():
        raise DataError(
            f"{path} is not an Omniglot drawing: expected {DRAWING_SIZE} x {DRAWING_SIZE} pixels with black ink, found "
            f"{drawing.shape[1]} x {drawing.shape[0]} with {int(drawing.sum())} ink pixels. Download Omniglot anew."
        )
    return np.packbits(drawing.ravel())


def _squared_distance(mask: Tensor, reach: int) -> Tensor:
    """Squared distance (B, H, W) from each pixel to the nearest set pixel of ``mask``, at most ``(reach + 1) ** 2``.

    The two-pass Euclidean transform: nearest along the rows, then the lower envelope of parabolas along the columns.
    """
    limit = float((reach + 1) ** 2)
    field = torch.where(mask, 0.0, limit)
    for dim in (2, 1):
        best = field.clone()
        for step in range(1, reach + 1):
            near, far = field.narrow(dim, step, field.shape[dim] - step), field.narrow(dim, 0, field.shape[dim] - step)
            head, tail = best.narrow(dim, 0, near.shape[dim]), best.narrow(dim, step, far.shape[dim])
            torch.minimum(head, near + step**2, out=head)
            torch.minimum(tail, far + step**2, out=tail)
        field = best
    return field


def _measure(ink: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Measure drawings (B, H, W): all in source pixels.

    The distance to the outline, negative inside, is smoothed, which rounds off the steps of the black-and-white drawing,
    and shifted by the half-width. Across a straight stroke the mean distance of ink to its outline is half of that.

    Returns:
        Distance to the strokes' centrelines (B, H, W), the strokes' mean half-width (B,) and the radius of the widest
        pen (B,) that keeps the strokes apart.
    """
    outside, inside = _squared_distance(ink, _REACH).sqrt() - 0.5, _squared_distance(~ink, 5).sqrt() - 0.5
    half_width = 2 * (inside * ink).sum((1, 2)) / ink.sum((1, 2))
    position = torch.arange(ink.shape[-1])
    blur = torch.exp(-0.5 * ((position - position.unsqueeze(1)) / _SMOOTHING) ** 2)
    blur = blur / blur.sum(1, keepdim=True)
    outline = blur @ torch.where(ink, -inside, outside) @ blur.T
    return outline + half_width.view(-1, 1, 1), half_width, half_width + _gap(outside)


def _gap(outside: Tensor) -> Tensor:
    """By how much (B,) the strokes can grow before they run into each other.

    Growing ink gains area at a steady rate while strokes are apart and more slowly once they meet: the limit is where
    the rate falls below ``_APART`` of its highest so far.
    """
    area = torch.stack([(outside < distance).sum((1, 2)) for distance in range(_REACH + 1)], dim=1)
    growth = area.diff(dim=1)
    return (growth >= _APART * growth.cummax(dim=1).values).cumprod(dim=1).sum(1).float()


def _row_ends(ink: Tensor) -> Tensor:
    """Leftmost and rightmost ink pixel of every row, (B, 2 H, 2) as (x, y): the hull of each drawing lies among them.

    Rows without ink repeat the drawing's mean position.
    """
    batch, height, width = ink.shape
    inked = ink.any(2)
    left, right = ink.int().argmax(2), width - 1 - ink.flip(2).int().argmax(2)
    y = torch.arange(height).expand(batch, -1)
    ends = torch.cat([torch.stack([left, y], dim=2), torch.stack([right, y], dim=2)], dim=1).float()
    inked = inked.repeat(1, 2).unsqueeze(2)
    mean = (ends * inked).sum(1, keepdim=True) / inked.sum(1, keepdim=True)
    return torch.where(inked, ends, mean)


def _draw(
    distance: Tensor, ends: Tensor, half_width: Tensor, widest: Tensor, jitter: tuple[Tensor, Tensor, Tensor], box: int
) -> Tensor:
    """Characters drawn with a round pen so that their longer side fills the box: (B, box, box), 0 to 1."""
    pen, pressure, pose = jitter
    batch, size = len(distance), distance.shape[-1]
    posed = ends @ pose.transpose(1, 2)
    low, high = posed.amin(1), posed.amax(1)
    extent = ((high - low).amax(1) + 1 - 2 * half_width).clamp(min=_MIN_EXTENT)  # of the centrelines
    crowded = 2 * box * widest / (extent + 2 * widest)  # the widest pen at the scale that goes with it
    pen = (pen**-4 + crowded**-4) ** -0.25  # a smooth minimum
    scale = ((box - pen) / extent).view(-1, 1, 1)  # picture pixels a source pixel
    fine = box * _SUPERSAMPLING
    axis = (torch.arange(fine) + 0.5) / _SUPERSAMPLING - box / 2
    grid = torch.stack([axis.expand(fine, -1), axis.unsqueeze(1).expand(-1, fine)], dim=2).view(1, -1, 2)
    source = (grid / scale + ((low + high) / 2).unsqueeze(1)) @ torch.linalg.inv(pose).transpose(1, 2)
    source = ((2 * source + 1) / size - 1).view(batch, fine, fine, 2)  # grid_sample's coordinates
    sampled = F.grid_sample(distance.unsqueeze(1), source, padding_mode="border", align_corners=False)
    radius = pen.view(-1, 1, 1, 1) / 2 * F.interpolate(pressure, size=fine, mode="bilinear")
    coverage = ((radius - sampled * scale.unsqueeze(1)) / _EDGE_WIDTH + 0.5).clamp(0, 1)
    return F.avg_pool2d(coverage, _SUPERSAMPLING).squeeze(1)


def _centre(boxed: Tensor, image_size: int) -> Tensor:
    """Paste (B, box, box) pictures so that the centre of mass comes nearest to pixel ``image_size / 2``: uint8."""
    batch, box = len(boxed), boxed.shape[-1]
    room = image_size - box
    mass, axis = boxed.sum((1, 2)), torch.arange(box)
    offsets = [((boxed.sum(dim) * axis).sum(1) / mass).sub(image_size / 2).neg().round().long() for dim in (2, 1)]
    top, left = (offset.clamp(0, room).view(-1, 1) for offset in offsets)
    padded = F.pad(boxed, (room,) * 4)
    window = torch.arange(image_size) + room
    rows, columns = (window - top).unsqueeze(2), (window - left).unsqueeze(1)
    pasted = padded[torch.arange(batch).view(-1, 1, 1), rows, columns]
    return (pasted * _PEAK).round().byte().unsqueeze(1)
