"""Held-out pictures with captions, as the control-similarity callback takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.utils.data import Dataset

from lightning_difftune.data.images import ImageTargets


class ControlExamples:
    """Pictures of a captioned source at the size the model is trained at, with their captions.

    Args:
        source: A map-style data set of ``(image, caption, ..)`` such as those of
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
        self.targets = ImageTargets(source, image_size, on_corrupt=on_corrupt)
        self.targets.captioned([0])

    @property
    def num_control_examples(self) -> int:
        """How many pictures there are."""
        return len(self.targets)

    def control_examples(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Positions => pictures (B, 3, image_size, image_size) uint8 and their captions.

        Raises:
            DataError: A damaged picture, unless those are skipped.
        """
        return self.targets.captioned(indices)
