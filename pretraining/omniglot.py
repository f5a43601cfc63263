"""Omniglot characters drawn with MNIST's pen: the source domain of a small model that is tuned to digits.

MNIST's pictures are black-and-white scans, scaled into a 20-pixel box with antialiasing and pasted so that the centre
of mass lies at the centre of 28 x 28 pixels (LeCun et al. 1998, "Gradient-based learning applied to document
recognition", section III.A). Omniglot's drawings (Lake et al. 2015) are mouse traces of a constant width. Here they go
through MNIST's steps, with the jitter below tuned on 5,000 digits; renderings against digits: mean ink 0.131 / 0.131,
empty pixels 0.807 / 0.807, saturated pixels (250 and more) 0.074 / 0.073, quartiles of the stroke width 2.2, 2.7, 3.2 /
2.3, 2.7, 3.1 pixels, Frechet distance of inked 5 x 5 patches 0.014 (digits against mirrored digits: 0.19).
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.models import DiT, load_dit

# Lengths are in pixels of the picture, or, where said, of the drawing.
_PEN_WIDTH, _PEN_WIDTH_LOG_STD = 2.5, 0.24  # median, at MNIST's box
_PRESSURE_STD = 0.2  # of the width, along the strokes
_SLANT_MEAN, _SLANT_STD = 0.25, 0.25  # tangent; positive leans right, as digits do
_ROTATION_STD = 0.12  # radians
_ASPECT_LOG_STD = 0.2
_EDGE_WIDTH = 0.3
_PEAK = 254  # grey level of full ink; MNIST's core is 253 to 255
_SMOOTHING = 2.0  # drawing
_APART = 0.9  # of the highest rate at which growing strokes gain area
_MIN_EXTENT = 12  # drawing; a dot is not blown up beyond this

_MNIST_BOX = 20
_DRAWING_SIZE = 105
_PACKED_BYTES = -(-(_DRAWING_SIZE**2) // 8)
_REACH, _INK_REACH = 18, 5  # drawing; how far distances are measured outside and inside the ink
_RING = 5  # drawing; thinner rings gain unevenly on the pixel lattice
_SUPERSAMPLING = 3
_DRAWINGS_AT_ONCE = 64
_TORCHVISION_FOLDER = Path("omniglot-py", "images_background")
_HOW_TO_GET = (
    "Download the drawings with torchvision.datasets.Omniglot(root, download=True) and pass the same root, "
    "or pass an .npz that holds them."
)


class RenderedOmniglot(Dataset[tuple[Tensor, int]]):
    """Every Omniglot drawing, rendered ``variants`` times as MNIST was made.

    Item ``i`` is drawing ``i % N``, variant ``i // N``, and depends only on ``(seed, i)``. Per rendering the pen's
    width, its pressure along the strokes, slant, rotation and aspect are drawn anew; the drawing is scaled (aspect
    kept) until its longer side fills the box, antialiased, and shifted by whole pixels until its centre of mass lies at
    pixel ``image_size / 2``, as in MNIST. A pen too wide for a crowded character is narrowed. Everything is rendered at
    first use, on the CPU, and kept in memory (784 bytes a picture, about 0.3 ms); nothing is written to disk.

    Args:
        root: An ``.npz`` file with ``ink`` (N, ceil(105 * 105 / 8)) uint8, packed bits, 1 = ink, ``labels`` (N,) and
            ``class_names`` (K,); or the root folder of ``torchvision.datasets.Omniglot(root, background=True)``.
        variants: Renderings per drawing.
        seed: Seed of the jitter.
        image_size: Height and width of a picture, in pixels.
        box: Longer side of the rendered character, in pixels; the pen scales with it.

    Attributes:
        num_classes: Number of characters K; all alphabets share one flat list.
        class_names: ``alphabet/character`` of each class.
        labels: (N * variants,) int64, the class of each item.

    Raises:
        ConfigError: ``variants`` is not positive or the box does not fit the picture.
        DataError: ``root`` does not exist or does not hold Omniglot drawings.
    """

    def __init__(
        self, root: str | Path, variants: int = 16, seed: int = 0, image_size: int = 28, box: int = _MNIST_BOX
    ) -> None:
        if variants < 1:
            raise ConfigError(f"variants must be 1 or more, found {variants}: the number of renderings a drawing.")
        if not 0 < box <= image_size:
            raise ConfigError(f"box must lie in 1..image_size ({image_size}), found {box}; MNIST has box 20 in 28.")
        self.variants, self.seed, self.image_size, self.box = variants, seed, image_size, box
        root = Path(root)
        self._ink, labels, self.class_names = _read_folder(root) if root.is_dir() else _read_npz(root)
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
        """All pictures, (N * variants, 1, image_size, image_size) uint8.

        Read this once before a ``DataLoader`` forks its workers, or each worker renders its own copy.
        """
        if self._images is None:
            self._images = self._render_all()
        return self._images

    def _render_all(self) -> Tensor:
        drawings = len(self._ink)
        jitter = [_jitter(drawings, self.seed, variant) for variant in range(self.variants)]
        images = torch.empty((self.variants, drawings, 1, self.image_size, self.image_size), dtype=torch.uint8)
        for start in range(0, drawings, _DRAWINGS_AT_ONCE):
            chunk = slice(start, start + _DRAWINGS_AT_ONCE)
            ink = torch.from_numpy(np.unpackbits(self._ink[chunk], axis=1, count=_DRAWING_SIZE**2)).bool()
            strokes = _measure(F.pad(ink.view(-1, _DRAWING_SIZE, _DRAWING_SIZE), (_REACH,) * 4))
            for variant in range(self.variants):
                character = _draw(strokes, jitter[variant][chunk], self.box)
                images[variant, chunk] = _centre(character, self.image_size)
        return images.flatten(0, 1)


def _read_npz(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """Packed ink (N, bytes), labels (N,) and class names of an ``.npz`` file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            ink, labels, names = archive["ink"], archive["labels"], archive["class_names"]
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. {_HOW_TO_GET}") from error
    except (KeyError, ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is not an .npz with the arrays ink, labels and class_names ({error}). {_HOW_TO_GET}"
        ) from error
    if ink.dtype != np.uint8 or ink.shape[1:] != (_PACKED_BYTES,) or not len(ink):
        raise DataError(
            f"{path}: ink must be uint8 of shape (N, {_PACKED_BYTES}), found {ink.dtype} {ink.shape}. "
            f"Pack 105 x 105 drawings, 1 = ink, with np.packbits(drawings.reshape(N, -1), axis=1)."
        )
    if (
        labels.shape != (len(ink),)
        or labels.dtype.kind not in "iu"
        or not 0 <= labels.min() <= labels.max() < len(names)
    ):
        raise DataError(
            f"{path}: labels must be {len(ink)} integers in 0..{len(names) - 1}, one per drawing, found {labels.dtype} "
            f"{labels.shape} {sorted(set(labels.ravel().tolist()))[-3:]}. Make them indices into class_names."
        )
    blank = np.flatnonzero(~ink.any(axis=1))
    if len(blank):
        raise DataError(f"{path}: {len(blank)} drawings have no ink, the first is {blank[0]}. Remove them.")
    return ink, labels.astype(np.int64), [str(name) for name in names]


def _read_folder(root: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """The same from ``root/omniglot-py/images_background/<alphabet>/<character>/*.png``, sorted by name."""
    folder = root / _TORCHVISION_FOLDER
    files = sorted(folder.glob("*/*/*.png"))
    if not files:
        raise DataError(f"{folder} holds no drawings (<alphabet>/<character>/*.png). {_HOW_TO_GET}")
    names, labels = np.unique([path.parent.relative_to(folder).as_posix() for path in files], return_inverse=True)
    return np.stack([_read_drawing(path) for path in files]), labels.astype(np.int64), names.tolist()


def _read_drawing(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            drawing = ~np.asarray(image.convert("1", dither=Image.Dither.NONE))  # black ink on white
    except OSError as error:
        raise DataError(f"{path} cannot be read as a picture ({error}). Download Omniglot anew.") from error
    if drawing.shape != (_DRAWING_SIZE, _DRAWING_SIZE) or not drawing.any():
        raise DataError(
            f"{path} must hold 105 x 105 pixels with black ink, found {drawing.shape[1]} x {drawing.shape[0]} "
            f"with {int(drawing.sum())} black pixels. Download Omniglot anew."
        )
    return np.packbits(drawing)


class _Strokes(NamedTuple):
    """What a pen needs to know of a batch of drawings, in their pixels."""

    distance: Tensor  # (B, H, W), from the strokes' centrelines
    half_width: Tensor  # (B,), of the strokes as drawn
    widest: Tensor  # (B,), radius of the widest pen that keeps the strokes apart
    outline: Tensor  # (B, P, 2), points (x, y) among which the convex hull lies


def _measure(ink: Tensor) -> _Strokes:
    """Measure the strokes of ``ink`` (B, H, W) bool.

    The distance to the ink's edge, negative inside, is smoothed, which rounds off the steps of the black-and-white
    drawing, and shifted by the half-width. Across a straight stroke the mean distance of ink to its edge is half of
    that.
    """
    outside, inside = _distance_to(ink, _REACH), _distance_to(~ink, _INK_REACH)
    half_width = 2 * (inside * ink).sum((1, 2)) / ink.sum((1, 2))
    position = torch.arange(ink.shape[-1])
    blur = torch.exp(-0.5 * ((position - position.unsqueeze(1)) / _SMOOTHING) ** 2)
    blur = blur / blur.sum(1, keepdim=True)
    distance = blur @ torch.where(ink, -inside, outside) @ blur.T + half_width.view(-1, 1, 1)
    return _Strokes(distance, half_width, half_width + _gap(outside), _row_ends(ink))


def _distance_to(mask: Tensor, reach: int) -> Tensor:
    """Distance (B, H, W) of each other pixel's centre to the edge of the nearest pixel of ``mask``, up to ``reach``.

    The two-pass Euclidean transform: nearest along the rows, then the lower envelope of parabolas along the columns.
    """
    field = torch.where(mask, 0.0, float((reach + 1) ** 2))
    for dim in (2, 1):
        best = field.clone()
        for step in range(1, reach + 1):
            length = field.shape[dim] - step
            for here, there in ((0, step), (step, 0)):
                nearest = best.narrow(dim, here, length)
                torch.minimum(nearest, field.narrow(dim, there, length) + step**2, out=nearest)
        field = best
    return field.sqrt() - 0.5


def _gap(outside: Tensor) -> Tensor:
    """By how much (B,) strokes can grow before they run into each other, from the distance outside the ink.

    Growing strokes gain area at a steady rate while they are apart, more slowly once they meet: the limit is where the
    rate falls below ``_APART`` of its highest so far.
    """
    area = torch.stack([(outside < distance).sum((1, 2)) for distance in range(_REACH + 1)], dim=1)
    growth = area[:, _RING:] - area[:, :-_RING]
    return (growth >= _APART * growth.cummax(dim=1).values).cumprod(dim=1).sum(1).float()


def _row_ends(ink: Tensor) -> Tensor:
    """First and last ink pixel of every row, (B, 2 H, 2) as (x, y); rows without ink repeat the mean of the others."""
    batch, height, width = ink.shape
    first, last = ink.int().argmax(2), width - 1 - ink.flip(2).int().argmax(2)
    ends = torch.stack([torch.cat([first, last], dim=1), torch.arange(height).repeat(batch, 2)], dim=2).float()
    inked = ink.any(2).repeat(1, 2).unsqueeze(2)
    return torch.where(inked, ends, (ends * inked).sum(1, keepdim=True) / inked.sum(1, keepdim=True))


def _jitter(drawings: int, seed: int, variant: int) -> Tensor:
    """Clipped normal numbers (drawings, 20) behind one variant; row n does not depend on how many rows there are."""
    noise = np.random.default_rng((seed, variant)).standard_normal((drawings, 20))
    return torch.from_numpy(noise.clip(-2.5, 2.5)).float()


def _pose(slant: Tensor, angle: Tensor, aspect: Tensor) -> Tensor:
    """Matrices (B, 2, 2) of determinant 1 that take a drawing to its picture, from normal numbers (B, 1)."""
    slant, angle, stretch = (
        _SLANT_MEAN + _SLANT_STD * slant,
        _ROTATION_STD * angle,
        (_ASPECT_LOG_STD / 2 * aspect).exp(),
    )
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).view(-1, 2, 2)
    # y points down, so leaning right is a negative shear.
    shape = torch.stack([stretch, -slant / stretch, torch.zeros_like(slant), 1 / stretch], dim=-1).view(-1, 2, 2)
    return rotation @ shape


def _draw(strokes: _Strokes, jitter: Tensor, box: int) -> Tensor:
    """Draw characters with a round pen so that their longer side fills the box: (B, box, box), 0 to 1."""
    width, slant, angle, aspect, pressure = jitter.split((1, 1, 1, 1, 16), dim=1)
    pose = _pose(slant, angle, aspect)
    posed = strokes.outline @ pose.transpose(1, 2)
    low, high = posed.amin(1), posed.amax(1)
    extent = ((high - low).amax(1) + 1 - 2 * strokes.half_width).clamp(min=_MIN_EXTENT)  # of the centrelines
    pen = box / _MNIST_BOX * _PEN_WIDTH * (_PEN_WIDTH_LOG_STD * width.flatten()).exp()
    widest = 2 * box * strokes.widest / (extent + 2 * strokes.widest)  # at the scale that goes with it
    pen = (pen**-4 + widest**-4) ** -0.25  # a smooth minimum
    scale = ((box - pen) / extent).view(-1, 1, 1)  # picture pixels a drawing pixel

    fine, size = box * _SUPERSAMPLING, strokes.distance.shape[-1]
    axis = (torch.arange(fine) + 0.5) / _SUPERSAMPLING - box / 2
    picture = torch.stack([axis.repeat(fine), axis.repeat_interleave(fine)], dim=1)
    drawing = (picture / scale + ((low + high) / 2).unsqueeze(1)) @ torch.linalg.inv(pose).transpose(1, 2)
    grid = ((2 * drawing + 1) / size - 1).view(-1, fine, fine, 2)
    distance = F.grid_sample(strokes.distance.unsqueeze(1), grid, padding_mode="border", align_corners=False)
    field = F.interpolate(1 + _PRESSURE_STD * pressure.view(-1, 1, 4, 4), size=fine, mode="bilinear")
    radius = pen.view(-1, 1, 1, 1) / 2 * field
    coverage = ((radius - distance * scale.unsqueeze(1)) / _EDGE_WIDTH + 0.5).clamp(0, 1)
    return F.avg_pool2d(coverage, _SUPERSAMPLING).squeeze(1)


def _centre(character: Tensor, image_size: int) -> Tensor:
    """Paste (B, box, box) so that the centre of mass comes nearest to pixel ``image_size / 2``: (B, 1, S, S) uint8."""
    batch, box = len(character), character.shape[-1]
    room = image_size - box
    mass, position = character.sum((1, 2)), torch.arange(box)
    centres = [(character.sum(dim) * position).sum(1) / mass for dim in (2, 1)]
    top, left = ((image_size / 2 - centre).round().long().clamp(0, room).view(-1, 1) for centre in centres)
    window = torch.arange(image_size) + room
    rows, columns = (window - top).unsqueeze(2), (window - left).unsqueeze(1)
    pasted = F.pad(character, (room,) * 4)[torch.arange(batch).view(-1, 1, 1), rows, columns]
    return (_PEAK * pasted).round().byte().unsqueeze(1)


def initialisation(name: str) -> DiT:
    """The weights of a model to start another one from, which may predict something else."""
    dit = load_dit(name)
    dit.sampling = None
    return dit
