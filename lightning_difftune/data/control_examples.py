"""Held-out pictures with captions, as the control-similarity callback takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.source_facts import location_of
from lightning_difftune.errors import DataError


class ControlExamples:
    """Pictures of a captioned source at the size the model is trained at, with their captions.

    Args:
        source: A map-style data set of ``(image, caption, ..)`` with ``captions``, such as those of
            :mod:`~lightning_difftune.data.captioned_files` or :class:`~lightning_difftune.data.ClassCaptions`.
        image_size: Height and width of the pictures.
        on_corrupt: ``"error"``, or ``"skip"`` to put the next readable picture in the place of a damaged one.

    Raises:
        ConfigError: A setting out of range.
        DataError: The source is empty, or has no captions.

    Example:
        >>> import numpy as np
        >>> from lightning_difftune.data import ArrayImages, ClassCaptions
        >>> roses = ArrayImages(np.zeros((5, 12, 8), np.uint8), class_names=["rose"])
        >>> examples = ControlExamples(ClassCaptions(roses), image_size=8)
        >>> pictures, captions = examples.control_examples([3, 4])
        >>> examples.num_control_examples, pictures.shape, captions
        (5, torch.Size([2, 3, 8, 8]), ['a photo of a rose', 'a photo of a rose'])
    """

    def __init__(self, source: Dataset, image_size: int, on_corrupt: Literal["error", "skip"] = "error") -> None:
        captions = getattr(source, "captions", None)
        if captions is None:
            raise DataError(
                f"{type(source).__name__} has no `captions`. Wrap a labelled source in ClassCaptions, or use a source "
                "of captioned files, such as CaptionedFolder."
            )
        self.captions: list[str] = list(captions)
        self.images = ImageTargets(_PicturesAlone(source), image_size, on_corrupt=on_corrupt)

    @property
    def num_control_examples(self) -> int:
        """How many pictures there are."""
        return len(self.images)

    def control_examples(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Positions => pictures (B, 3, image_size, image_size) uint8 and their captions.

        Raises:
            DataError: A damaged picture, unless those are skipped.
        """
        items = [self.images.read(index) for index in indices]
        return torch.stack([item.pixels for item in items]), [self.captions[item.source_index] for item in items]


class _PicturesAlone(Dataset[tuple[Any, int]]):
    """A captioned source as one of ``(image, label)``, every picture of class 0."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.source[index][0], 0

    def describe(self, index: int) -> str:
        """Where picture ``index`` is."""
        return location_of(self.source, index) or type(self.source).__name__
