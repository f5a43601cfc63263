"""Annotators with a network: depth and normals by MiDaS, segmentation by UperNet, and their base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import pi
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.metrics.control_similarity import ade20k_palette, paint, to_palette
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.hub import folder_of
from lightning_difftune.pictures import check_pictures

if TYPE_CHECKING:
    from transformers import DPTForDepthEstimation, UperNetForSemanticSegmentation

_UNUSED = "neck.fusion_stage.layers.0.residual_layer1"  # MiDaS's first layer adds no residual
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in the training of UperNet's backbones


class NetworkAnnotator(ABC):
    """Base of annotators that use a network.

    It is not an ``nn.Module``, so a module that holds one neither trains nor saves its network. The network is opened
    for the first map or the identity, follows the pictures to their device, and computes in float32, also under
    autocast.

    Args:
        source: The network, which is frozen in place; or the local folder or hub repository to open it from.
    """

    name: ClassVar[str]
    channels: ClassVar[int]

    def __init__(self, source: str | Path | nn.Module) -> None:
        self.source = source
        self._network: Any = None
        self._fingerprint: str | None = None

    @abstractmethod
    def open(self, source: str | Path) -> nn.Module:
        """Open the network from a folder or repository."""

    @abstractmethod
    def annotate(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [0, 1], on the network's device => maps (B, channels, H, W) uint8."""

    @abstractmethod
    def constants(self) -> str:
        """The settings that determine the maps, for the identity."""

    @property
    def network(self) -> Any:
        """The network.

        Raises:
            CheckpointError: If it cannot be opened; the message names annotator, source and remedy.
        """
        if self._network is None:
            network = self.source
            if not isinstance(network, nn.Module):
                try:
                    # Opening may first initialise at random; trainer.validate runs in inference mode.
                    with isolate_rng(), torch.inference_mode(False):
                        network = self.open(network)
                except CheckpointError as error:
                    raise CheckpointError(
                        f"{type(self).__name__} has no weights for its network from {str(self.source)!r}: {error} Pass "
                        f"what you have as {type(self).__name__}(source=...): a local folder, or the network itself."
                    ) from error
            self._network = self.prepare(network).requires_grad_(False).eval()
        return self._network

    def prepare(self, network: nn.Module) -> nn.Module:
        """Change a given or opened network before use; the base changes nothing."""
        return network

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 => control maps (B, channels, H, W) uint8 on the same device.

        Raises:
            DataError: If the pictures have another type or shape.
            CheckpointError: If the network cannot be opened.
        """
        check_pictures(pictures, f"{type(self).__name__} was given", channels=(3,))
        self.network.to(pictures.device)
        with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
            return self.annotate(pictures.float() / 255).to(pictures.device)

    def identity(self) -> str:
        """The name, the constants, and the class and fingerprint of the network.

        Raises:
            CheckpointError: If the network cannot be opened.
        """
        network = self.network
        if self._fingerprint is None:
            self._fingerprint = fingerprint(network)
        return f"{self.name} {self.constants()} {type(network).__name__} {self._fingerprint}"


def _open_transformers(kind: str, source: str | Path, unused: tuple[str, ...] = ()) -> Any:
    """Open a transformers network in float32; weights must exist for all but the ``unused`` parameters."""
    folder = folder_of(source, "")
    import transformers  # slow to import

    try:
        network, info = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, ImportError) as error:
        raise CheckpointError(f"{folder} cannot be opened as transformers' {kind}: {error}") from error
    missing = sorted(key for key in map(str, info["missing_keys"]) if not key.startswith(unused or ("\0",)))
    if missing or info["mismatched_keys"]:
        names = missing or sorted(map(str, info["mismatched_keys"]))
        raise CheckpointError(
            f"{folder} does not hold the weights of a {kind}: {len(names)} do not fit, the first is {names[0]}."
        )
    return network


class _Midas(NetworkAnnotator):
    """Relative inverse depth as MiDaS predicts it; base of the two below."""

    def __init__(self, source: str | DPTForDepthEstimation | Path = "Intel/dpt-hybrid-midas") -> None:
        super().__init__(source)

    def open(self, source: str | Path) -> nn.Module:
        """Open a DPT."""
        return _open_transformers("DPTForDepthEstimation", source, unused=(_UNUSED,))

    def prepare(self, network: Any) -> nn.Module:
        """Remove a layer that computes nothing and that published weights lack."""
        # Its random weights would change the fingerprint.
        network.neck.fusion_stage.layers[0].residual_layer1 = nn.Identity()
        return network

    def depth(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] => inverse depth (B, H, W), large where near, in the network's own scale."""
        size = self.network.config.image_size
        inputs = F.interpolate(pixels, (size, size) if isinstance(size, int) else size, mode="bicubic", antialias=True)
        depth = self.network(pixel_values=inputs.clamp(0, 1) * 2 - 1).predicted_depth
        return F.interpolate(depth[:, None], pixels.shape[-2:], mode="bicubic")[:, 0]


class MidasDepth(_Midas):
    """Depth by MiDaS (Ranftl et al., 2020, 2021): 255 is the nearest point of each picture, 0 the farthest.

    Pictures are resized to the square size of the network's training, 384 pixels for DPT-hybrid, and the depth back to
    the picture's size. A picture of constant depth gives a map of zeros.

    Args:
        source: The network; or the folder or hub repository of a ``DPTForDepthEstimation``.

    Example:
        >>> MidasDepth().channels  # no weights are needed before the first picture
        1
    """

    name = "midas-depth"
    channels = 1

    def annotate(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] => depth (B, 1, H, W) uint8."""
        return (normalised(self.depth(pixels)) * 255).byte()[:, None]  # truncated, as in the published annotator

    def constants(self) -> str:
        """None."""
        return "min-max"


class MidasNormal(_Midas):
    r"""Surface normals from the slope of MiDaS's depth: x in red, y in green, z in blue, [-1, 1] as 0 to 255.

    .. math:: n = \frac{(S_x * d, S_y * d, z)}{\|(S_x * d, S_y * d, z)\|}

    with Sobel's 3 x 3 differences S of the depth d in the network's own scale. Where the depth is far, x and y are 0.

    Args:
        source: The network; or the folder or hub repository of a ``DPTForDepthEstimation``.
        background_threshold: Points below this depth, normalised to [0, 1] in each picture, are background. 0.1 in
            ControlNet's annotator.
        z: Larger is flatter; 2 pi in ControlNet's annotator.

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

    A range below a thousandth of the depth is rounding error and is not stretched: a flat depth gives 0.

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


class UperNetSegmentation(NetworkAnnotator):
    """Classes of pixels by UperNet (Xiao et al., 2018), painted in ADE20K's 150 colours.

    The paper uses UperNet with UniFormer, which transformers lacks; the default has ConvNeXt, trained on the same 150
    classes and painted in the same colours. Pictures keep their size.

    Args:
        source: The network; or the folder or hub repository of a ``UperNetForSemanticSegmentation``.
        palette: The colours (K, 3), 0 to 255, of its classes; ``None`` is ADE20K's.

    Raises:
        ConfigError: If these are not colours or, on first use, if there are fewer than the network has classes.
    """

    name = "upernet-segmentation"
    channels = 3

    def __init__(
        self,
        source: str | UperNetForSemanticSegmentation | Path = "openmmlab/upernet-convnext-small",
        palette: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(source)
        self.palette = ade20k_palette() if palette is None else to_palette(palette)

    def open(self, source: str | Path) -> nn.Module:
        """Open a UperNet."""
        return _open_transformers("UperNetForSemanticSegmentation", source)

    def annotate(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] => painted classes (B, 3, H, W) uint8."""
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        logits = self.network(pixel_values=(pixels - mean) / std).logits
        if logits.shape[1] > len(self.palette):
            raise ConfigError(
                f"The network of UperNetSegmentation distinguishes {logits.shape[1]} classes, but the palette has "
                f"{len(self.palette)} colours. Pass a `palette` with one for each."
            )
        logits = F.interpolate(logits, pixels.shape[-2:], mode="bilinear")  # a no-op at equal size
        return paint(logits.argmax(1), self.palette)

    def constants(self) -> str:
        """The palette."""
        return f"palette={bytes(self.palette.flatten().tolist()).hex()}"
