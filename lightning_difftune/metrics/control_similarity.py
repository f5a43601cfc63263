"""How well generated pictures follow their controls: similarity of control maps, as in Table 4 of the paper."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.metrics.palette import ade20k_palette, nearest_classes, to_palette
from lightning_difftune.pictures import check_pictures


class MapSimilarity(Metric, ABC):
    """Mean over examples of a score of two control maps; base of the three below.

    Every example weighs the same. Sums are float64 and add up over processes, so the mean does not depend on how many
    there were, nor on the batch size.
    """

    key: str  # what a callback logs it as, below ``control/``
    full_state_update = False
    is_differentiable = False

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @abstractmethod
    def scores(self, generated_maps: Tensor, control_maps: Tensor) -> Tensor:
        """Two sets of maps (B, c, H, W) uint8 => B scores, float64."""

    def update(self, generated_maps: Tensor, control_maps: Tensor) -> None:
        """Add examples.

        Args:
            generated_maps: Maps of the generated pictures, (B, 1 or 3, H, W) uint8.
            control_maps: The maps they were generated from, of the same shape.

        Raises:
            DataError: If the maps have other types or shapes, or their shapes differ.
        """
        for maps in (generated_maps, control_maps):
            check_pictures(maps, f"{type(self).__name__} was given")
        if generated_maps.shape != control_maps.shape:
            raise DataError(
                f"{type(self).__name__} compares maps of one shape, found {tuple(generated_maps.shape)} of generated "
                f"pictures and {tuple(control_maps.shape)} of controls. Generate at the size of the controls, and "
                "annotate both alike."
            )
        self.total += self.scores(generated_maps, control_maps).sum()
        self.count += len(control_maps)

    def compute(self) -> Tensor:
        """The mean score, a float64 scalar.

        Raises:
            DataError: If there was no example yet.
        """
        if self.count == 0:
            raise DataError(f"{type(self).__name__} has seen no maps. Call update(generated_maps, control_maps) first.")
        return self.total / self.count


class BlurredSSIM(MapSimilarity):
    r"""Structural similarity of blurred maps, for the sparse maps of edge and sketch (thresholds 0.55 and 0.75).

    With :math:`a = G_\sigma * A` and :math:`b = G_\sigma * B` for the maps A and B, the mean over the pixels of

    .. math::
        \frac{(2 \mu_a \mu_b + C_1)(2 \sigma_{ab} + C_2)}{(\mu_a^2 + \mu_b^2 + C_1)(\sigma_a^2 + \sigma_b^2 + C_2)}

    where the moments are taken under a Gaussian window of standard deviation 1.5, and :math:`C_1 = (0.01 L)^2,
    C_2 = (0.03 L)^2` (Wang et al., 2004). Without the blur, edges that are one pixel off would count as missed. Borders
    are mirrored. Constant and empty maps have a similarity like any others, since L is given and not taken from the
    maps: two empty maps are at 1.

    The paper states neither sigma nor L. Values are comparable only if these and the size of the maps are equal.

    Args:
        sigma: Standard deviation of the blur in pixels. 3 is that of the sketch annotator at 512 px; scale it with the
            size of the maps.
        kernel_size: Width of the blur's kernel, odd; ``None`` reaches three standard deviations to either side.
        data_range: L, the range of the maps' values.

    Raises:
        ConfigError: If an argument is out of range.

    Example:
        >>> edges = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
        >>> edges[..., 16] = 255
        >>> similarity = BlurredSSIM(sigma=2)
        >>> round(similarity(edges, edges).item(), 4), round(similarity(edges.roll(1, 3), edges).item(), 2)
        (1.0, 0.89)
        >>> empty = torch.zeros_like(edges)
        >>> similarity(empty, empty).item()
        1.0
    """

    key = "ssim"
    higher_is_better = True

    def __init__(self, sigma: float = 3.0, kernel_size: int | None = None, data_range: float = 255.0) -> None:
        super().__init__()
        if not sigma > 0:
            raise ConfigError(f"sigma of BlurredSSIM must be positive, found {sigma}.")
        if not data_range > 0:
            raise ConfigError(f"data_range of BlurredSSIM must be positive, found {data_range}.")
        if kernel_size is not None and (kernel_size < 1 or kernel_size % 2 == 0):
            raise ConfigError(f"kernel_size of BlurredSSIM must be odd and positive, found {kernel_size}.")
        self.sigma = sigma
        self.kernel_size = 2 * ceil(3 * sigma) + 1 if kernel_size is None else kernel_size
        self.data_range = data_range

    def scores(self, generated_maps: Tensor, control_maps: Tensor) -> Tensor:
        """SSIM (B,) of the blurred maps, over all channels.

        Raises:
            DataError: If the maps are too small for the blur or for SSIM's window of 11 pixels.
        """
        from torchmetrics.functional.image import structural_similarity_index_measure
        from torchvision.transforms.functional import gaussian_blur

        needed = max(self.kernel_size, 11) // 2 + 1  # a mirrored border must be narrower than the map
        if min(control_maps.shape[-2:]) < needed:
            raise DataError(
                f"BlurredSSIM with a kernel of {self.kernel_size} needs maps of at least {needed} pixels per side, "
                f"found {tuple(control_maps.shape[-2:])}. Use a smaller sigma, or larger pictures."
            )
        generated, wanted = (
            gaussian_blur(maps.double(), [self.kernel_size] * 2, [self.sigma] * 2)
            for maps in (generated_maps, control_maps)
        )
        similarity = structural_similarity_index_measure(
            generated, wanted, gaussian_kernel=True, sigma=1.5, data_range=self.data_range, reduction="none"
        )
        assert isinstance(similarity, Tensor)  # a tuple only where a full picture is asked for
        return similarity.view(len(control_maps))  # torchmetrics squeezes a single one


class ControlMSE(MapSimilarity):
    r"""Mean squared error of maps scaled to [0, 1], for depth and normal (thresholds 0.04 and 0.06); less is better.

    .. math:: \frac{1}{c H W} \sum_{k} \left( \frac{A_k - B_k}{255} \right)^2

    Example:
        >>> depth = torch.full((2, 1, 8, 8), 51, dtype=torch.uint8)
        >>> round(ControlMSE()(torch.zeros_like(depth), depth).item(), 6)  # 0.2 squared
        0.04
    """

    key = "mse"
    higher_is_better = False

    def scores(self, generated_maps: Tensor, control_maps: Tensor) -> Tensor:
        """Mean squared errors (B,)."""
        return ((generated_maps.double() - control_maps.double()) / 255).square().flatten(1).mean(1)


class PixelAccuracy(MapSimilarity):
    r"""Share of pixels of one class in both segmentation maps (thresholds 0.5 on COCO, 0.4 on ADE20k).

    A pixel's class is the nearest colour of the palette, so resized and compressed maps are understood:

    .. math:: \frac{1}{H W} \sum_{k} [c(A_k) = c(B_k)], \quad c(x) = \arg\min_j \|x - p_j\|^2

    Args:
        palette: The colours (K, 3), 0 to 255; ``None`` is ADE20K's.

    Raises:
        ConfigError: If the palette has another shape or values that are not colours.

    Example:
        >>> accuracy = PixelAccuracy(palette=[[0, 0, 0], [255, 0, 0]])
        >>> control = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
        >>> control[:, 0, 0, 0] = 250
        >>> accuracy(torch.zeros_like(control), control).item()
        0.75
    """

    key = "pixel_accuracy"
    higher_is_better = True

    def __init__(self, palette: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__()
        self.palette = ade20k_palette() if palette is None else to_palette(palette)

    def scores(self, generated_maps: Tensor, control_maps: Tensor) -> Tensor:
        """Shares (B,) of equal classes.

        Raises:
            DataError: If the maps are not coloured.
        """
        if control_maps.shape[1] != 3:
            raise DataError(
                f"PixelAccuracy compares coloured maps (B, 3, H, W), found {tuple(control_maps.shape)}. Annotate with "
                "a segmentation that paints its classes."
            )
        generated, wanted = (nearest_classes(maps, self.palette) for maps in (generated_maps, control_maps))
        return (generated == wanted).flatten(1).double().mean(1)
