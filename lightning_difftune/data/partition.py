"""Random partitions of data sets that come without a split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Subset

from lightning_difftune.data.source_facts import labels_of, paths_of
from lightning_difftune.errors import ConfigError

IntArray = npt.NDArray[np.intp]


class Partition(Subset[Any]):
    """One part of a random partition, for data sets that come without a split.

    The paper's SUN397 is ``Partition(SUN397(root), {"train": 76128, "val": 10875, "test": 21750}, "train")``, and five
    pictures of each flower are ``Partition(Flowers102(root), {"train": 5}, "train", per_class=True)``. The parts are
    disjoint and depend only on the seed: where file names are known, pictures are first numbered by sorted name,
    since some data sets list their files in the order of the file system, which differs between machines.

    Args:
        source: A map-style data set of ``(image, label)``.
        sizes: All parts by name, as numbers of pictures, or as shares that sum to at most 1.
        part: The part to use.
        seed: Seed of the permutation.
        per_class: Whether the sizes are of each class: by counts a few-shot target, by shares a stratified partition.

    Raises:
        ConfigError: The sizes are neither counts nor shares, exceed the source or one of its classes, or have no such
            part; or ``per_class`` is set and the source does not know its labels without reading its pictures.
    """

    def __init__(
        self, source: Dataset, sizes: Mapping[str, int | float], part: str, seed: int = 0, per_class: bool = False
    ) -> None:
        count = len(source)  # type: ignore[arg-type]
        if part not in sizes:
            raise ConfigError(f"no part {part!r} in the partition; found {', '.join(map(repr, sizes))}.")
        position = list(sizes).index(part)
        paths = paths_of(source)
        by_name = np.arange(count) if paths is None else np.asarray(sorted(range(count), key=paths.__getitem__))
        # RandomState's streams never change; Generator's may change with NumPy's version.
        order = np.random.RandomState(seed).permutation(count)
        chosen = []
        for whole, members in _classes(source, by_name, order) if per_class else [("the source", order)]:
            bounds = _bounds(sizes, whole, len(members))
            chosen.append(members[bounds[position] : bounds[position + 1]])
        indices = by_name[np.sort(np.concatenate(chosen))].tolist()
        if not indices:
            raise ConfigError(f"the part {part!r} of {count} pictures is empty with the sizes {dict(sizes)}.")
        super().__init__(source, indices)


def _classes(source: Dataset, by_name: IntArray, order: IntArray) -> Iterator[tuple[str, IntArray]]:
    """Every class of the source, as it is called in messages, and the entries of ``order`` that are of it."""
    known = labels_of(source)
    if known is None:
        raise ConfigError("per_class needs a source that knows its labels without reading its pictures.")
    labels = known.numpy()[by_name[order]]
    for label in np.unique(labels):
        yield f"class {label}", order[labels == label]


def _bounds(sizes: Mapping[str, int | float], whole: str, count: int) -> list[int]:
    values = list(sizes.values())
    ends = np.cumsum([0, *values])
    if any(value <= 0 for value in values):
        raise ConfigError(f"the sizes {dict(sizes)} of a partition must be above 0.")
    if all(isinstance(value, int) for value in values):
        if ends[-1] > count:
            raise ConfigError(f"the sizes {dict(sizes)} need {ends[-1]} pictures, but {whole} has {count}.")
        return [int(end) for end in ends]
    if all(isinstance(value, float) for value in values) and ends[-1] <= 1 + 1e-9:
        return [round(float(end) * count) for end in ends]
    raise ConfigError(f"the sizes {dict(sizes)} of a partition; expected counts, or shares that sum to at most 1.")
