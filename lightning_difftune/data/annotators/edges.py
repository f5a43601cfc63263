"""Edge annotators: Canny by OpenCV, and sketches from HED's soft edges."""

from __future__ import annotations

import itertools
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_difftune.data.annotators.networks import NetworkAnnotator
from lightning_difftune.errors import CheckpointError, ConfigError, DataError
from lightning_difftune.models import hub
from lightning_difftune.pictures import check_pictures

_WEIGHTS = "ControlNetHED.pth"
# Lines of three pixels: a maximum along one of them is a ridge.
_LINES = (
    np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0]], np.uint8),
    np.array([[0, 1, 0], [0, 1, 0], [0, 1, 0]], np.uint8),
    np.eye(3, dtype=np.uint8),
    np.ascontiguousarray(np.eye(3, dtype=np.uint8)[::-1]),
)


class Canny:
    """Edges after Canny (1986), as OpenCV finds them: one pixel wide, 255 on 0.

    Gradients are 3 x 3 Sobel differences of the 8-bit channels, their strength |dx| + |dy| of the strongest channel.
    Local maxima above ``high`` are edges, and so are those above ``low`` that are connected to one. There is no
    smoothing beforehand, as in the ControlNet annotator. Maps are computed on the CPU.

    Args:
        low: Lower threshold; 100 in the paper.
        high: Upper threshold; 200 in the paper.

    Raises:
        ConfigError: If the thresholds are negative or in the wrong order or, on first use, if OpenCV is not installed.

    Example:
        >>> canny = Canny()
        >>> pictures = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        >>> pictures[..., 4:] = 255
        >>> canny(pictures)[0, 0, 4].tolist()
        [0, 0, 0, 255, 0, 0, 0, 0]
    """

    channels = 1

    def __init__(self, low: float = 100, high: float = 200) -> None:
        if not 0 <= low <= high:
            raise ConfigError(f"The thresholds of Canny must be 0 <= low <= high, found low={low} and high={high}.")
        self.low = low
        self.high = high

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 => edges (B, 1, H, W) uint8, 0 or 255.

        Raises:
            DataError: If the pictures have another type or shape.
        """
        check_pictures(pictures, "Canny was given", channels=(3,))
        cv2 = _cv2_of("Canny")
        images = pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        maps = [torch.from_numpy(cv2.Canny(image, self.low, self.high)) for image in images]
        return torch.stack(maps)[:, None].to(pictures.device)

    def identity(self) -> str:
        """The name and the thresholds."""
        return f"canny low={self.low:g} high={self.high:g}"


class _Stage(nn.Module):
    """Convolutions of one resolution, and a side output."""

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * depth]
        self.convs = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)))
        self.projection = nn.Conv2d(out_channels, 1, 1)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            h = F.relu(conv(h))
        return h, self.projection(h)


class HED(nn.Module):
    """Holistically-nested edge detection (Xie & Tu, 2015) in the layout of ControlNet's weights, ``ControlNetHED.pth``.

    Five stages at full to a sixteenth of the resolution, each with a side output; the edges are the sigmoid of their
    mean.

    Args:
        widths: Channels of the stages.
    """

    def __init__(self, widths: tuple[int, int, int, int, int] = (64, 128, 256, 512, 512)) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))  # mean colour, 0 to 255
        stages = zip((3, *widths), widths, (2, 2, 3, 3, 3), strict=False)
        self.block1, self.block2, self.block3, self.block4, self.block5 = (_Stage(*stage) for stage in stages)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] => edges (B, 1, H, W) in [0, 1].

        Raises:
            DataError: If a side is shorter than 16 pixels.
        """
        if min(pixels.shape[-2:]) < 16:
            raise DataError(f"HED takes pictures of at least 16 pixels per side, found {tuple(pixels.shape[-2:])}.")
        h, side = self.block1(pixels * 255 - self.norm)
        total = side
        for stage in (self.block2, self.block3, self.block4, self.block5):
            h, side = stage(F.max_pool2d(h, 2))
            total = total + F.interpolate(side, pixels.shape[-2:], mode="bilinear")
        return (total / 5).sigmoid()


class HEDSketch(NetworkAnnotator):
    """Sketches: soft edges, thinned to their ridges and redrawn with a thick pen, 255 on 0.

    The 8-bit edges are blurred (``sigma``); local maxima above ``threshold`` along any of four directions are kept;
    these are blurred (``pen``), and values above ``cut`` are ink. With the defaults, that is the scribble of
    ControlNet's annotators, made by the same OpenCV functions on the CPU. The lengths are in pixels, so pictures
    smaller than 512 px may need smaller ones.

    Args:
        source: A network from pictures (B, 3, H, W) in [0, 1] to edges (B, 1, H, W) in [0, 1], or to a list of edges
            whose last entry is used, as PiDiNet returns; or a file of :class:`HED`'s weights, or the folder or hub
            repository of ``ControlNetHED.pth``.
        threshold: Weaker edges, 0 to 255, are left out.
        sigma: Blur before thinning.
        pen: Blur after thinning.
        cut: Grey level, 0 to 255, above which a pixel is ink.
    """

    name = "hed-sketch"
    channels = 1

    def __init__(
        self,
        source: str | Path | nn.Module = "lllyasviel/Annotators",
        threshold: float = 127,
        sigma: float = 3.0,
        pen: float = 3.0,
        cut: int = 4,
    ) -> None:
        super().__init__(source)
        self.threshold = threshold
        self.sigma = sigma
        self.pen = pen
        self.cut = cut

    def open(self, source: str | Path) -> nn.Module:
        """Fill a :class:`HED`."""
        file = _weights_file(source)
        try:
            state: dict[str, Any] = (
                load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
            )
            network = HED()
            network.load_state_dict(state)
        except (OSError, RuntimeError, UnpicklingError, SafetensorError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} does not hold the weights of HED: {error}") from error
        return network

    def annotate(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] => sketches (B, 1, H, W) uint8, 0 or 255."""
        edges = self.network(pixels)
        if isinstance(edges, list | tuple):
            edges = edges[-1]
        if edges.shape != (len(pixels), 1, *pixels.shape[-2:]):
            raise DataError(
                f"The network of HEDSketch gave edges {tuple(edges.shape)} for pictures {tuple(pixels.shape)}; it must "
                "give (B, 1, H, W) in [0, 1]."
            )
        levels = (edges[:, 0] * 255).clamp(0, 255).byte().cpu().numpy()
        return torch.from_numpy(np.stack([self.sketch(level) for level in levels]))[:, None]

    def sketch(self, edges: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Edges (H, W), 0 to 255 => ink (H, W), 0 or 255."""
        cv2 = _cv2_of("HEDSketch")
        smooth = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), self.sigma)
        ridges = np.logical_or.reduce([cv2.dilate(smooth, line) == smooth for line in _LINES])
        thin = np.where(ridges & (smooth > self.threshold), np.uint8(255), np.uint8(0))
        return np.where(cv2.GaussianBlur(thin, (0, 0), self.pen) > self.cut, np.uint8(255), np.uint8(0))

    def constants(self) -> str:
        """Threshold, blurs and cut."""
        return f"threshold={self.threshold:g} sigma={self.sigma:g} pen={self.pen:g} cut={self.cut}"


def _weights_file(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        path /= _WEIGHTS
    if path.is_file():
        return path
    if not isinstance(source, str) or not hub.is_repo_id(source):
        raise CheckpointError(f"{path} does not exist; a hub repository is written 'owner/name'.")
    return hub.fetch_file(source, _WEIGHTS)


def _cv2_of(annotator: str) -> ModuleType:
    """The module ``cv2``, or an error that names the annotator."""
    try:
        import cv2
    except ImportError as error:  # not installed, or a build that needs desktop libraries
        raise ConfigError(
            f"{annotator} needs OpenCV, which cannot be imported ({error}). Run `pip install opencv-python-headless`."
        ) from error
    return cv2
