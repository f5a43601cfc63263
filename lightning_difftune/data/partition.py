"""Random partitions of data sets that come without a split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from lightning_difftune.data.source_facts import paths_of
from lightning_difftune.errors import ConfigError


class Partition(Subset[Any]):
    """One part of a random partition, for data sets that come without a split.

    The paper's SUN397 is ``Partition(SUN397(root), {"train": 76128, "val": 10875, "test": 21750}, "train")``. The parts
    are disjoint and depend on the seed alone: where the files' names are known, the pictures are numbered by sorted
    name first, since some data sets list their files in the order of the file system, which differs between machines.

    Args:
        source: A map-style data set of ``(image, label)``.
        sizes: All parts by name, as numbers of pictures, or as shares that sum to at most 1.
        part: The part to use.
        seed: Seed of the permutation.

    Raises:
        ConfigError: The sizes are neither counts nor shares, exceed the source, or have no such part.
    """

    def __init__(self, source: Dataset, sizes: Mapping[str, int | float], part: str, seed: int = 0) -> None:
        count = len(source)  # type: ignore[arg-type]
        if part not in sizes:
            raise ConfigError(f"no part {part!r} in the partition; found {', '.join(map(repr, sizes))}.")
        bounds = _bounds(sizes, count)
        position = list(sizes).index(part)
        paths = paths_of(source)
        by_name = np.arange(count) if paths is None else np.asarray(sorted(range(count), key=paths.__getitem__))
        # RandomState's streams are frozen for good; Generator's may change with NumPy's version.
        order = np.random.RandomState(seed).permutation(count)[bounds[position] : bounds[position + 1]]
        if not len(order):
            raise ConfigError(f"the part {part!r} of {count} pictures is empty with the sizes {dict(sizes)}.")
        super().__init__(source, by_name[np.sort(order)].tolist())


def _bounds(sizes: Mapping[str, int | float], count: int) -> list[int]:
    values = list(sizes.values())
    ends = np.cumsum([0, *values])
    if any(value <= 0 for value in values):
        raise ConfigError(f"the sizes {dict(sizes)} of a partition must be above 0.")
    if all(isinstance(value, int) for value in values):
        if ends[-1] > count:
            raise ConfigError(f"the sizes {dict(sizes)} need {ends[-1]} pictures, but there are {count}.")
        return [int(end) for end in ends]
    if all(isinstance(value, float) for value in values) and ends[-1] <= 1 + 1e-9:
        return [round(float(end) * count) for end in ends]
    raise ConfigError(f"the sizes {dict(sizes)} of a partition; expected counts, or shares that sum to at most 1.")
