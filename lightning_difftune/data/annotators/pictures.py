"""What every annotator asks of the pictures that it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_difftune.errors import DataError


def require_pictures(pictures: Tensor, annotator: str) -> None:
    """Raise :class:`DataError` unless these are pictures (B, 3, H, W) uint8, at least one.

    Example:
        >>> require_pictures(torch.zeros(2, 3, 8, 8), "Canny")
        Traceback (most recent call last):
        lightning_difftune.errors.DataError: Canny annotates pictures uint8 (B, 3, H, W), found torch.float32 (2, 3, ...
    """
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.numel():
        raise DataError(
            f"{annotator} annotates pictures uint8 (B, 3, H, W), found {pictures.dtype} {tuple(pictures.shape)}. Scale "
            "[-1, 1] by (x + 1) * 127.5, round, clamp to 0..255 and cast to uint8; repeat grey to three channels."
        )
