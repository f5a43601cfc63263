"""Facts of an image source without decoding it: labels, file names, class names, a content hash.

Sources have them as attributes. torchvision has no common names for them, so its names are listed here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from lightning_difftune.errors import DataError
from lightning_difftune.files import array_digest

_Fact = TypeVar("_Fact")
# torchvision: CIFAR, MNIST, ImageFolder; SVHN, STL10; Food101, Flowers102, SUN397, DTD, Aircraft, Pets; Caltech101.
_LABEL_ATTRIBUTES = ("labels", "targets", "_labels", "y")
_PATH_ATTRIBUTES = ("paths", "_image_files", "_images")
# Lists of (path, label): ImageFolder, ImageNet; StanfordCars, GTSRB.
_SAMPLE_ATTRIBUTES = ("samples", "_samples")
_CLASS_NAME_ATTRIBUTES = ("class_names", "classes", "categories")
_READ_AS_STORED = ("lightning_difftune", "torchvision", "torch")  # packages whose sources only decode what is stored


class ImageSource(Protocol):
    """Interface of data sources: pictures by index, each with a class index or a caption.

    Any map-style data set is one, including torchvision's. The attributes and methods below are optional; the
    documentation has an example.

    - ``labels``: all class indices (N,), integers. Needed for ``class_balanced`` and few-shot partitions, and checked
      before a run starts.
    - ``class_names``: names in the order of the indices. They match the classes of held-out pictures to the target's.
    - ``captions``: all N captions, in place of labels.
    - ``paths``: the N files. ``describe(index)``: a name for picture ``index`` in messages, if it has no file.
    - ``content_digest()``: a string that changes when a picture does, for comparison with caches. Without it, a source
      is identified by 64 of its pictures and, if it has ``paths``, by the files' names, sizes and times.
    - ``picture_digests()``: N strings, each of which changes when that picture does. With them, a latent cache encodes
      only changed pictures and keeps the rest; without, it refuses a changed source. This package's sources and
      torchvision's do not need them.
    - ``control_paths``: the N files of control maps.
    - ``left_out``: numbers of unused files by kind, for ``difftune data check``.
    """

    def __len__(self) -> int:
        """Number of pictures, N."""
        ...

    def __getitem__(self, index: int, /) -> tuple[Any, ...]:
        """Picture ``index``: ``(image, label)``, ``(image, caption)`` or ``(image, caption, control map)``.

        The image is a ``PIL.Image`` or uint8 pixels: an array (H, W) or (H, W, C), or a tensor (C, H, W), of any size.
        """
        ...


class Relabelled(Dataset[tuple[Any, ...]]):
    """A source with other labels or captions; everything else is the wrapped source's.

    Args:
        source: The source.
    """

    def __init__(self, source: Any) -> None:
        self.source: Any = source

    def __len__(self) -> int:
        return len(self.source)

    @property
    def paths(self) -> list[str] | None:
        """The files, if the source has some."""
        return paths_of(self.source)

    def describe(self, index: int) -> str:
        """The location of picture ``index``, for messages."""
        return location_of(self.source, index) or f"image {index}"

    def content_digest(self) -> str | None:
        """A hash of pictures and labels; ``None`` if only reading the pictures would tell."""
        content = content_digest_of(self.source)
        return None if content is None else array_digest(content, *self._label_facts())

    def _label_facts(self) -> Sequence[npt.NDArray[Any] | str]:
        """What determines the labels or captions, in addition to the source."""
        raise NotImplementedError


def require_source(source: Any) -> None:
    """Raise :class:`DataError` unless pictures can be read by index."""
    if isinstance(source, DataLoader):
        wrong = "a DataLoader, whose batches are made already; pass its data set"
    elif isinstance(source, str | Path):
        wrong = f"the path {str(source)!r}; pass a data set that reads it"
    elif isinstance(source, Mapping):
        wrong = f"a dictionary of {', '.join(map(str, list(source)[:8]))}; pass one of its parts"
    elif isinstance(source, IterableDataset) or not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        wrong = (
            f"{type(source).__name__}, which can be iterated but has no picture number i; a run that can be "
            "repeated and resumed needs one. Write the first examples to a folder, as HubImages does with keep and "
            "limit, or give it __len__ and __getitem__"
        )
    else:
        return
    raise DataError(
        f"the image source is {wrong}. Expected a map-style data set of (image, label) or (image, caption), such as "
        "lightning_difftune.data.ImageFolder or any of torchvision's."
    )


def labels_of(source: Any) -> torch.Tensor | None:
    """Class indices of all pictures, (N,) int64; ``None`` if only reading the pictures would tell.

    ``Subset`` and ``ConcatDataset`` are unwrapped. The labels of a source with a ``target_transform``, which changes
    them on reading, are unknown.
    """
    if isinstance(source, Subset):
        inner = labels_of(source.dataset)
        return None if inner is None else inner[torch.as_tensor(np.asarray(source.indices, dtype=np.int64))]
    if isinstance(source, ConcatDataset):
        parts = [labels_of(part) for part in source.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if getattr(source, "target_transform", None) is not None:
        return None
    candidates = [getattr(source, name, None) for name in _LABEL_ATTRIBUTES]
    candidates += [[label for _, label in samples] for samples in _sample_lists(source)]
    for values in candidates:
        if _fits(values, len(source)):
            labels = np.asarray(values)
            if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
                return torch.from_numpy(labels.astype(np.int64))
    return None


def paths_of(source: Any) -> list[str] | None:
    """The file of every picture; ``None`` if pictures are not separate files or their names are unknown."""
    if isinstance(source, Subset | ConcatDataset):
        return _looked_through(source, paths_of)
    candidates = [getattr(source, name, None) for name in _PATH_ATTRIBUTES]
    candidates += [[path for path, _ in samples] for samples in _sample_lists(source)]
    for values in candidates:
        if _fits(values, len(source)) and all(isinstance(value, (str, Path)) for value in values):
            return [str(value) for value in values]
    return None


def captions_of(source: Any) -> list[str] | None:
    """The caption of every picture, if the source has captions and knows them without reading its pictures."""
    if isinstance(source, Subset | ConcatDataset):
        return _looked_through(source, captions_of)
    captions = getattr(source, "captions", None)
    return [str(caption) for caption in captions] if _fits(captions, len(source)) else None


def location_of(source: Any, index: int) -> str | None:
    """The file, or entry in a file, of picture ``index``, for messages."""
    if isinstance(source, Subset):
        return location_of(source.dataset, int(source.indices[index]))
    if hasattr(source, "describe"):
        return str(source.describe(index))
    paths = paths_of(source)
    return None if paths is None else paths[index]


def class_names_of(source: Any) -> list[str] | None:
    """Names of the classes in the order of their indices, or None.

    Raises:
        DataError: The parts of a ``ConcatDataset`` number their classes differently.
    """
    if isinstance(source, Subset):
        return class_names_of(source.dataset)
    if isinstance(source, ConcatDataset):
        known = [names for names in map(class_names_of, source.datasets) if names is not None]
        if any(names != known[0] for names in known):
            unlike = next(names for names in known if names != known[0])
            raise DataError(
                f"the parts of a ConcatDataset number their classes differently: {known[0][:5]} and {unlike[:5]}. Put "
                "their pictures into folders of the same classes, or list them in one CSV file."
            )
        return known[0] if known else None
    for name in _CLASS_NAME_ATTRIBUTES:
        names = getattr(source, name, None)
        if isinstance(names, Sequence) and not isinstance(names, str) and len(names):
            return [str(entry) for entry in names]
    return None


def name_of_class(label: int, names: Sequence[str] | None) -> str:
    """The name of a class, or ``class 7`` if it is unknown."""
    return names[label] if names is not None and 0 <= label < len(names) else f"class {label}"


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
        return _looked_through(source, _files_of)
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
        return _looked_through(source, picture_digests_of)
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


def _sample_lists(source: Any) -> list[Sequence[tuple[Any, Any]]]:
    lists = (getattr(source, name, None) for name in _SAMPLE_ATTRIBUTES)
    return [samples for samples in lists if _fits(samples, len(source)) and all(len(entry) == 2 for entry in samples)]


def _looked_through(source: Subset | ConcatDataset, fact: Callable[[Any], list[_Fact] | None]) -> list[_Fact] | None:
    """A fact of every picture of a ``Subset`` or ``ConcatDataset``, if all of its sources know it."""
    if isinstance(source, Subset):
        inner = fact(source.dataset)
        return None if inner is None else [inner[i] for i in source.indices]
    parts = [fact(part) for part in source.datasets]
    known = [part for part in parts if part is not None]
    return [entry for part in known for entry in part] if len(known) == len(parts) else None


def _fits(values: Any, count: int) -> TypeGuard[Sequence[Any]]:
    return (
        isinstance(values, (Sequence, np.ndarray, torch.Tensor))
        and not isinstance(values, str)
        and len(values) == count
    )
