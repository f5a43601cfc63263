"""Metrics of how well pictures follow their controls: similarity of maps (Table 4), and palettes of classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.pictures import check_pictures

# The 150 colours of the MIT scene parsing benchmark (Zhou et al., 2017), class 1 "wall" first, six digits per class.
_ADE20K = (
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04"
    "ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffff"
    "e0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe000"
    "99ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff00"
    "0052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc2"
    "00ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ff"
    "ff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ff"
    "ff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff"
)
_CHUNK = 65_536  # colours compared with the whole palette at a time


class MapSimilarity(Metric, ABC):
    """Mean over examples of a similarity score of two control maps; base of the three below.

    Every example has the same weight. Sums are float64 and add up over processes, so the mean does not depend on the
    number of processes or on the batch size.
    """

    key: str  # its logged name, after ``control/``
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
            control_maps: The maps that they were generated from, of the same shape.

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
            DataError: If there were no examples.
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
    are mirrored. Similarity is defined for constant and empty maps too, since L is given and not taken from the maps:
    two empty maps have 1.

    The paper states neither sigma nor L. Values are comparable only if these and the size of the maps are equal.

    Args:
        sigma: Standard deviation of the blur in pixels. The sketch annotator has 3 at 512 px; scale it with the size of
            the maps.
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
        assert isinstance(similarity, Tensor)  # a tuple only with return_full_image
        return similarity.view(len(control_maps))  # torchmetrics squeezes a single score


class ControlMSE(MapSimilarity):
    r"""Mean squared error of maps scaled to [0, 1], for depth and normal (thresholds 0.04 and 0.06); lower is better.

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
    r"""Share of pixels with the same class in both segmentation maps (thresholds 0.5 on COCO, 0.4 on ADE20k).

    A pixel's class is the nearest colour of the palette, so resized and compressed maps work:

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


# -- colours of segmentation maps -------------------------------------------------------------------------------------


def ade20k_palette() -> Tensor:
    """The colours (150, 3) uint8 of the ADE20K classes, as in the training of published ControlNets.

    Classes 6 and 48 share one colour, (140, 140, 140); decoding gives 6.

    Example:
        >>> ade20k_palette()[[0, 2]].tolist()  # wall, sky
        [[120, 120, 120], [6, 230, 230]]
    """
    return torch.tensor(list(bytes.fromhex(_ADE20K)), dtype=torch.uint8).view(150, 3)


def to_palette(colours: Sequence[Sequence[int]]) -> Tensor:
    """Lists of colours => (K, 3) uint8.

    Raises:
        ConfigError: Unless these are triples of 0 to 255, at least one.

    Example:
        >>> to_palette([[0, 0, 0], [255, 0]])
        Traceback (most recent call last):
        lightning_difftune.errors.ConfigError: A palette has one colour [r, g, b] of 0 to 255 per class; entry 1 ...
    """
    for index, colour in enumerate(colours):
        if len(colour) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in colour):
            raise ConfigError(
                f"A palette has one colour [r, g, b] of 0 to 255 per class; entry {index} is {list(colour)}."
            )
    if not colours:
        raise ConfigError("A palette needs at least one colour, found none.")
    return torch.tensor([list(colour) for colour in colours], dtype=torch.uint8)


def paint(classes: Tensor, palette: Tensor) -> Tensor:
    """Class indices (B, H, W) int64 => maps (B, 3, H, W) uint8."""
    return palette.to(classes.device)[classes].permute(0, 3, 1, 2).contiguous()


def nearest_classes(maps: Tensor, palette: Tensor) -> Tensor:
    """Maps (B, 3, H, W) uint8 => indices (B, H, W) int64 of the nearest colours; the first one on ties.

    Example:
        >>> palette = torch.tensor([[0, 0, 0], [255, 0, 0]], dtype=torch.uint8)
        >>> maps = torch.tensor([[120, 120, 120], [200, 90, 90]], dtype=torch.uint8).view(2, 3, 1, 1)
        >>> nearest_classes(maps, palette).flatten().tolist()
        [0, 1]
    """
    r, g, b = maps.long().unbind(1)
    # A map has few distinct colours, so each is looked up once.
    codes, where = torch.unique((r << 16) + (g << 8) + b, return_inverse=True)
    colours = torch.stack([codes >> 16, codes >> 8 & 255, codes & 255], dim=1)
    targets = palette.to(maps.device).long()
    # torch.argmin does not define which of equal entries it returns; here the index breaks ties.
    tie_break = torch.arange(len(targets), device=maps.device)
    nearest = [
        ((part[:, None] - targets).square().sum(-1) * len(targets) + tie_break).argmin(1)
        for part in colours.split(_CHUNK)
    ]
    return torch.cat(nearest)[where]
