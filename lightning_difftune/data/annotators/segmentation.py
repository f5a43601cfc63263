"""Segmentation by UperNet in the colours of ADE20K: the control of the two segmentation tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_difftune.data.annotators.network import NetworkAnnotator, open_transformers
from lightning_difftune.errors import ConfigError
from lightning_difftune.metrics.palette import ade20k_palette, paint, to_palette

if TYPE_CHECKING:
    from transformers import UperNetForSemanticSegmentation

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which the backbones were trained with


class UperNetSegmentation(NetworkAnnotator):
    """Classes of pixels by UperNet (Xiao et al., 2018), painted in ADE20K's 150 colours.

    The paper has UperNet on UniFormer, which transformers lacks; the default is on ConvNeXt, trained on the same 150
    classes and painted in the same colours. Pictures are looked at in their own size.

    Args:
        source: The network; or the folder or hub repository of a ``UperNetForSemanticSegmentation``.
        palette: The colours (K, 3), 0 to 255, of its classes; ``None`` is ADE20K's.

    Raises:
        ConfigError: If the palette is none or, when it is first used, if it has fewer colours than the network classes.
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
        return open_transformers("UperNetForSemanticSegmentation", source)

    def annotate(self, pixels: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] => painted classes (B, 3, H, W) uint8."""
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        logits = self.network(pixel_values=(pixels - mean) / std).logits
        if logits.shape[1] > len(self.palette):
            raise ConfigError(
                f"The network of UperNetSegmentation tells {logits.shape[1]} classes apart, but the palette has "
                f"{len(self.palette)} colours. Pass a `palette` with one for each."
            )
        logits = F.interpolate(logits, pixels.shape[-2:], mode="bilinear")  # a no-op where it has that size
        return paint(logits.argmax(1), self.palette)

    def constants(self) -> str:
        """The palette."""
        return f"palette={bytes(self.palette.flatten().tolist()).hex()}"
