"""Classes of image sources: their labels checked, joined by name, and counted."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Subset

from lightning_difftune.data.folders import shorten
from lightning_difftune.data.source_facts import Relabelled, class_names_of, labels_of
from lightning_difftune.errors import DataError

FEW_PICTURES = 10  # of a class


def joined_by_name(source: Any, names: Sequence[str] | None, whose: str = "val_target") -> Any:
    """A source with the class numbers of another one.

    Args:
        source: The source, such as held-out pictures.
        names: Class names of the other one in the order of their numbers, such as the training pictures'.
        whose: What to call the source in a message.

    Returns:
        The source as it is if one of the two has no names, or the names are the same; else with its labels renumbered.

    Raises:
        DataError: If it has pictures of a class that is not among ``names``, or two of ``names`` are the same.

    Example:
        >>> from lightning_difftune.data import ArrayImages
        >>> held_out = ArrayImages(np.zeros((2, 8, 8), np.uint8), [0, 1], class_names=["daisy", "tulip"])
        >>> joined_by_name(held_out, ["daisy", "rose", "tulip"]).labels
        array([0, 2])
    """
    own = class_names_of(source)
    if own is None or names is None or _same(own) == _same(names) or _changes_labels(source):
        return source
    numbers = {name: number for number, name in enumerate(_same(names))}
    if len(numbers) < len(names):
        twice = sorted({name for name in names if _same(names).count(_same([name])[0]) > 1})
        raise DataError(f"{whose} cannot be joined by class names: the target has {shorten(twice)} twice. Rename one.")
    labels = labels_of(source)
    used = range(len(own)) if labels is None else sorted(set(labels.tolist()))
    strangers = [own[label] for label in used if 0 <= label < len(own) and _same([own[label]])[0] not in numbers]
    if strangers:
        raise DataError(
            f"{whose} has classes that the target does not have: {shorten(strangers)}. The target's are "
            f"{shorten(list(names))}. Take their pictures out, or rename the class if it is another spelling."
        )
    return _Renumbered(source, np.asarray([numbers.get(name, -1) for name in _same(own)]), list(names))


def _changes_labels(source: Any) -> bool:
    """Whether a ``target_transform`` stands between the names and the labels."""
    inner = source.dataset if isinstance(source, Subset) else source
    return getattr(inner, "target_transform", None) is not None


def _same(names: Sequence[str]) -> list[str]:
    """Names as they are compared: one Unicode form, no spaces around."""
    return [unicodedata.normalize("NFC", name).strip() for name in names]


class _Renumbered(Relabelled):
    """A source whose labels are other numbers of the same classes."""

    def __init__(self, source: Any, numbers: npt.NDArray[np.int64], class_names: list[str]) -> None:
        super().__init__(source)
        self.numbers, self.class_names = numbers, class_names
        known = labels_of(source)
        if known is not None:
            self.labels = np.asarray([self._number(label) for label in known.tolist()], dtype=np.int64)

    def _number(self, label: int) -> int:
        return int(self.numbers[label]) if 0 <= label < len(self.numbers) else label  # others are refused as they are

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, label, *rest = self.source[index]
        return image, self._number(int(label)), *rest

    def _told(self) -> list[npt.NDArray[np.int64]]:
        return [self.numbers]


def check_labels(
    labels: Tensor | Sequence[int] | npt.NDArray[np.integer[Any]], num_classes: int, where: Callable[[int], str]
) -> None:
    """Refuse labels without a row in the label table.

    Args:
        labels: (N,) class indices.
        num_classes: Classes of the label table, its null row not counted.
        where: Name of picture i for the message, such as :meth:`ImageTargets.describe`.

    Raises:
        DataError: A label below 0 or above ``num_classes - 1``; it names the first one.

    Example:
        >>> check_labels([0, 1, 2], 3, "image {}".format)
        >>> check_labels([0, 3], 3, "image {}".format)
        Traceback (most recent call last):
        lightning_difftune.errors.DataError: label 3 of image 1 is outside the label table, whose 3 classes are 0..2 ...
    """
    values = np.asarray(labels, dtype=np.int64)
    outside = np.flatnonzero((values < 0) | (values >= num_classes))
    if not len(outside):
        return
    first = int(outside[0])
    fix = (
        f"set the number of classes to at least {int(values.max()) + 1}"
        if values.min() >= 0
        else "give every picture a label from 0"
    )
    raise DataError(
        f"label {int(values[first])} of {where(first)} is outside the label table, whose {num_classes} classes are "
        f"0..{num_classes - 1} ({len(outside)} of {len(values)} labels are outside); {fix}, or correct the labels."
    )


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
    said = [
        f"{names[i] if names is not None and i < len(names) else f'class {i}'} {counts[i]}" for i in small if counts[i]
    ]
    return (
        f"{len(small)} of {len(counts)} classes have fewer than {FEW_PICTURES} pictures, which is little to learn a "
        f"class from: {shorten(said, 4) or 'all of them none'}. Samples of these will repeat what there is; add "
        "pictures, or merge classes."
    )
