"""What identifies the pictures of a source without decoding them, also where others wrap it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_difftune.data.source_facts import location_of, looked_through, paths_of
from lightning_difftune.files import array_digest

_READ_AS_STORED = ("lightning_difftune", "torchvision", "torch")  # packages whose sources only decode what is stored


class Relabelled(Dataset[tuple[Any, ...]]):
    """A source with other labels or captions; everything else is the wrapped source's."""

    def __init__(self, source: Any) -> None:
        self.source: Any = source

    def __len__(self) -> int:
        return len(self.source)

    @property
    def paths(self) -> list[str] | None:
        """The files, if the source has some."""
        return paths_of(self.source)

    def describe(self, index: int) -> str | None:
        """The location of picture ``index``, for messages; ``None`` if unknown."""
        return location_of(self.source, index)

    def content_digest(self) -> str | None:
        """A hash of pictures and labels; ``None`` if only reading the pictures would tell."""
        content = content_digest_of(self.source)
        return None if content is None else array_digest(content, *self._label_facts())

    def _label_facts(self) -> Sequence[npt.NDArray[Any] | str]:
        """What determines the labels or captions, in addition to the source."""
        raise NotImplementedError


def content_digest_of(source: Any) -> str | None:
    """A hash that changes with the stored pictures; ``None`` if only reading the pictures would tell.

    It covers the names below the common folder, sizes and modification times in seconds of the files of pictures and
    control maps, so a hundred thousand take about a second; for arrays, the bytes.
    """
    if hasattr(source, "content_digest"):
        digest = source.content_digest()  # None from a wrapper of a source with unknown content
        return None if digest is None else str(digest)
    files = _files_of(source)
    if files is not None:
        return stat_digest([path for both in files for path in both])
    if isinstance(source, Subset):
        inner = content_digest_of(source.dataset)
        return None if inner is None else array_digest(inner, np.asarray(source.indices, dtype=np.int64))
    if isinstance(source, ConcatDataset):
        parts = [content_digest_of(part) for part in source.datasets]
        known = [part for part in parts if part is not None]
        return array_digest(*known) if len(known) == len(parts) else None
    data = getattr(source, "data", None)  # CIFAR, MNIST, SVHN, STL10, USPS
    if isinstance(data, (np.ndarray, torch.Tensor)) and len(data) == len(source):
        return array_digest(np.asarray(data))
    return None


def _files_of(source: Any) -> list[tuple[str, ...]] | None:
    """The files of every picture and its control map; ``None`` if there are none, or the source hashes its content."""
    if hasattr(source, "content_digest"):
        return None
    if isinstance(source, Subset | ConcatDataset):
        return looked_through(source, _files_of)
    paths, controls = paths_of(source), getattr(source, "control_paths", None)
    if paths is None:
        return None
    return list(zip(paths, *([] if controls is None else [map(str, controls)]), strict=True))


def picture_digests_of(source: Any) -> list[str] | None:
    """A string per picture that changes with the stored picture; ``None`` if only reading would tell.

    A source's own ``picture_digests()`` come first. For a file it is its name with that of its folder, its size and its
    modification time in seconds; for an array the SHA-256 of its bytes.
    """
    if _has_transform(source):
        return None
    if _tells(source, "picture_digests"):
        return list(map(str, source.picture_digests()))
    if _is_own(source, "__getitem__"):
        return None
    if isinstance(source, Relabelled):
        return picture_digests_of(source.source)
    if isinstance(source, Subset | ConcatDataset):
        return looked_through(source, picture_digests_of)
    files = _files_of(source)
    if files is not None:
        return ["".join(map(stat_digest, zip(both))) + Path(both[0]).parent.name for both in files]
    data = getattr(source, "data", None)
    if isinstance(data, np.ndarray | torch.Tensor) and len(data) == len(source):
        return [array_digest(np.asarray(picture)) for picture in data]
    return None


def stat_digest(paths: Sequence[str]) -> str:
    """A hash of files: their names below the common folder, sizes and modification times in seconds."""
    absolute = [os.path.abspath(path) for path in paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in absolute])
    digest = hashlib.sha256()
    for path in absolute:
        name = path[len(folder) :].lstrip(os.sep).replace(os.sep, "/")
        try:
            status = os.stat(path)
            facts = f"{status.st_size} {int(status.st_mtime)}"
        except FileNotFoundError:  # reported on reading
            facts = "missing"
        digest.update(f"{name}\0{facts}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def may_change_on_reading(source: Any) -> bool:
    """Whether pictures may differ from what is stored, and change while that does not.

    So it is with a torchvision ``transform``, and with a data set of one's own, whose code may crop or filter, unless
    it has a ``content_digest``.
    """
    if _has_transform(source) or (_is_own(source, "__getitem__") and not _tells(source, "content_digest")):
        return True
    if isinstance(source, ConcatDataset):
        return any(map(may_change_on_reading, source.datasets))
    inner = source.dataset if isinstance(source, Subset) else source.source if isinstance(source, Relabelled) else None
    return inner is not None and may_change_on_reading(inner)


def _tells(source: Any, method: str) -> bool:
    """Whether a source has this method, and not by inheritance where its code reads pictures in its own way."""
    return hasattr(source, method) and (_is_own(source, method) or not _is_own(source, "__getitem__"))


def _is_own(source: Any, method: str) -> bool:
    """Whether a method of a source is neither torchvision's nor this package's."""
    kind = next((kind for kind in type(source).__mro__ if method in vars(kind)), type(source))
    return kind.__module__.partition(".")[0] not in _READ_AS_STORED


def _has_transform(source: Any) -> bool:
    return getattr(source, "transform", None) is not None or getattr(source, "transforms", None) is not None
