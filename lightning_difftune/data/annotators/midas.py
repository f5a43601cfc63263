"""Depth by MiDaS, and normals from it: the controls of the depth and normal tasks."""

from __future__ import annotations

from math import pi
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_difftune.data.annotators.network import NetworkAnnotator, open_transformers
from lightning_difftune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import DPTForDepthEstimation

_UNUSED = "neck.fusion_stage.layers.0.residual_layer1"  # the first layer adds no residual


class _Midas(NetworkAnnotator):
    """Relative inverse depth as MiDaS predicts it; base of the two below."""

    def __init__(self, source: str | DPTForDepthEstimation | Path) -> None:
        super().__init__(source)

    def open(self, source: str | Path) -> nn.Module:
        """Open a DPT."""
        return open_transformers("DPTForDepthEstimation", source, unused=(_UNUSED,))

    def prepare(self, network: Any) -> nn.Module:
        """Take out a layer that computes nothing and that published weights leave out, so that its random ones do not
        get into the fingerprint.
        """  # noqa: D205
        network.neck.fusion_stage.layers[0].residual_layer1 = nn.Identity()
        return network

    def depth(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] => inverse depth (B, H, W), near is large, in the network's own scale."""
        size = self.network.config.image_size
        inputs = F.interpolate(pixels, (size, size) if isinstance(size, int) else size, mode="bicubic", antialias=True)
        depth = self.network(pixel_values=inputs.clamp(0, 1) * 2 - 1).predicted_depth
        return F.interpolate(depth[:, None], pixels.shape[-2:], mode="bicubic")[:, 0]


class MidasDepth(_Midas):
    """Depth by MiDaS (Ranftl et al., 2020, 2021): 255 is the nearest point of each picture, 0 the farthest.

    Pictures are resized to the square that the network was trained at, 384 pixels for DPT-hybrid, and the depth back to
    the picture's size. A picture whose depth is the same everywhere gives a map of zeros.

    Args:
        source: The network; or the folder or hub repository of a ``DPTForDepthEstimation``.

    Example:
        >>> MidasDepth().channels  # no weights are needed before the first picture
        1
    """

    name = "midas-depth"
    channels = 1

    def __init__(self, source: str | DPTForDepthEstimation | Path = "Intel/dpt-hybrid-midas") -> None:
        super().__init__(source)

    def annotate(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] => depth (B, 1, H, W) uint8."""
        return (normalised(self.depth(pixels)) * 255).byte()[:, None]  # cut off, as the published annotator does

    def constants(self) -> str:
        """None."""
        return "min-max"


class MidasNormal(_Midas):
    r"""Surface normals from the slope of MiDaS's depth: x in red, y in green, z in blue, [-1, 1] as 0 to 255.

    .. math:: n = \frac{(S_x * d, S_y * d, z)}{\|(S_x * d, S_y * d, z)\|}

    with Sobel's 3 x 3 differences S of the depth d in the network's own scale. Where the depth is far, x and y are 0.

    Args:
        source: The network; or the folder or hub repository of a ``DPTForDepthEstimation``.
        background_threshold: Depth below which a point is background, of the range [0, 1] of its picture. ControlNet's
            annotator has 0.1.
        z: Larger is flatter; ControlNet's annotator has 2 pi.

    Raises:
        ConfigError: If the threshold is outside [0, 1] or z is not positive.
    """

    name = "midas-normal"
    channels = 3

    def __init__(
        self,
        source: str | DPTForDepthEstimation | Path = "Intel/dpt-hybrid-midas",
        background_threshold: float = 0.1,
        z: float = 2 * pi,
    ) -> None:
        super().__init__(source)
        if not 0 <= background_threshold <= 1:
            raise ConfigError(f"background_threshold of MidasNormal must be in [0, 1], found {background_threshold}.")
        if not z > 0:
            raise ConfigError(f"z of MidasNormal must be positive, found {z}.")
        self.background_threshold = background_threshold
        self.z = z

    def annotate(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] => normals (B, 3, H, W) uint8."""
        return normals(self.depth(pixels), self.background_threshold, self.z)

    def constants(self) -> str:
        """Threshold and z."""
        return f"background={self.background_threshold:g} z={self.z:g}"


def normalised(depth: Tensor) -> Tensor:
    """Depth (B, H, W) of any scale => [0, 1] in each picture.

    A range of less than a thousandth of the depth is not spread out: it would be rounding, and a flat depth gives 0.

    Example:
        >>> normalised(torch.tensor([[[1.0, 3.0, 2.0]], [[7.0, 7.0, 7.0]]])).tolist()
        [[[0.0, 1.0, 0.5]], [[0.0, 0.0, 0.0]]]
    """
    above = depth - depth.amin((1, 2), keepdim=True)
    least = 1e-3 * depth.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)
    return above / above.amax((1, 2), keepdim=True).maximum(least)


def normals(depth: Tensor, background_threshold: float, z: float) -> Tensor:
    """Depth (B, H, W) => normals (B, 3, H, W) uint8; borders are mirrored."""
    smooth, difference = depth.new_tensor([1.0, 2.0, 1.0]), depth.new_tensor([-1.0, 0.0, 1.0])
    sobel = torch.stack([torch.outer(smooth, difference), torch.outer(difference, smooth)])[:, None]
    slopes = F.conv2d(F.pad(depth[:, None], (1, 1, 1, 1), mode="reflect"), sobel)  # (B, 2, H, W): along x, along y
    slopes = slopes * (normalised(depth) >= background_threshold)[:, None]
    vectors = F.normalize(torch.cat([slopes, torch.full_like(slopes[:, :1], z)], dim=1), dim=1)
    return (vectors * 127.5 + 127.5).clamp(0, 255).byte()
