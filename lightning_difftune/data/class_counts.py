"""How many pictures the classes of a target have, and what to say of small ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_difftune.data.image_files import shorten

FEW_PICTURES = 10  # of a class


def describe_small_classes(labels: Tensor, num_classes: int, names: Sequence[str] | None = None) -> str | None:
    """A sentence about the classes with few pictures, the smallest first; ``None`` if all have enough.

    Args:
        labels: Classes (N,) int64 of the pictures.
        num_classes: How many classes there are.
        names: What they are called.

    Example:
        >>> describe_small_classes(torch.tensor([0] * 12 + [1] * 3), 2, ["ant", "bee"])
        '1 of 2 classes have fewer than 10 pictures, which is little to learn a class from: bee 3. ...'
        >>> describe_small_classes(torch.zeros(10, dtype=torch.int64), 1) is None
        True
    """
    counts: list[int] = torch.bincount(labels, minlength=num_classes).tolist()
    small = sorted((label for label, count in enumerate(counts) if count < FEW_PICTURES), key=counts.__getitem__)
    if not small:
        return None
    said = [f"{names[i] if names is not None else f'class {i}'} {counts[i]}" for i in small if counts[i]]
    return (
        f"{len(small)} of {len(counts)} classes have fewer than {FEW_PICTURES} pictures, which is little to learn a "
        f"class from: {shorten(said, 4) or 'all of them none'}. Samples of these will repeat what there is; add "
        "pictures, or merge classes."
    )
