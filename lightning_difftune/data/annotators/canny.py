"""Canny edges, the control of the edge task."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_difftune.data.annotators.opencv import cv2_of
from lightning_difftune.errors import ConfigError
from lightning_difftune.pictures import check_pictures


class Canny:
    """Edges after Canny (1986), as OpenCV finds them: one pixel wide, 255 on 0.

    Gradients are 3 x 3 Sobel differences of the 8-bit channels, their strength |dx| + |dy| of the strongest channel.
    Local maxima above ``high`` are edges, and so are those above ``low`` that are connected to one. There is no
    smoothing beforehand, as in the ControlNet annotator. Maps are computed on the CPU.

    Args:
        low: Lower threshold; the paper has 100.
        high: Upper threshold; the paper has 200.

    Raises:
        ConfigError: If the thresholds are negative or in the wrong order or, when it is first used, if OpenCV is
            not installed.

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
        cv2 = cv2_of("Canny")
        images = pictures.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        maps = [torch.from_numpy(cv2.Canny(image, self.low, self.high)) for image in images]
        return torch.stack(maps)[:, None].to(pictures.device)

    def identity(self) -> str:
        """The name and the thresholds."""
        return f"canny low={self.low:g} high={self.high:g}"
