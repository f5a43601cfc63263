"""Facts of an image source without decoding it: labels, file names, class names.

Sources have them as attributes. torchvision has no common names for them, so its names are listed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from lightning_difftune.errors import DataError

_Fact = TypeVar("_Fact")
# torchvision: CIFAR, MNIST, ImageFolder; SVHN, STL10; Food101, Flowers102, SUN397, DTD, Aircraft, Pets; Caltech101.
_LABEL_ATTRIBUTES = ("labels", "targets", "_labels", "y")
_PATH_ATTRIBUTES = ("paths", "_image_files", "_images")
# Lists of (path, label): ImageFolder, ImageNet; StanfordCars, GTSRB.
_SAMPLE_ATTRIBUTES = ("samples", "_samples")
_CLASS_NAME_ATTRIBUTES = ("class_names", "classes", "categories")
# What columns of captions and of control maps are called in data sets; the first that is there is read.
CAPTION_KEYS = ("text", "caption", "prompt")
CONTROL_KEYS = (
    "conditioning_image",
    "conditioning_image_file_name",
    "conditioning_file_name",
    "conditioning_image_path",
    "conditioning",
    "control_image",
    "control_file_name",
    "control",
)


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
        """Picture ``index``: ``(image, label)`` or ``(image, caption)``, and its control map if there are any.

        The image is a ``PIL.Image`` or uint8 pixels: an array (H, W) or (H, W, C), or a tensor (C, H, W), of any size.
        """
        ...


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
        return looked_through(source, paths_of)
    candidates = [getattr(source, name, None) for name in _PATH_ATTRIBUTES]
    candidates += [[path for path, _ in samples] for samples in _sample_lists(source)]
    for values in candidates:
        if _fits(values, len(source)) and all(isinstance(value, (str, Path)) for value in values):
            return [str(value) for value in values]
    return None


def captions_of(source: Any) -> list[str] | None:
    """The caption of every picture, if the source has captions and knows them without reading its pictures."""
    if isinstance(source, Subset | ConcatDataset):
        return looked_through(source, captions_of)
    captions = getattr(source, "captions", None)
    return [str(caption) for caption in captions] if _fits(captions, len(source)) else None


def location_of(source: Any, index: int) -> str | None:
    """The file, or entry in a file, of picture ``index``, for messages."""
    if isinstance(source, Subset):
        return location_of(source.dataset, int(source.indices[index]))
    if hasattr(source, "describe"):
        location = source.describe(index)  # None from a wrapper of a source with unknown locations
        return None if location is None else str(location)
    paths = paths_of(source)
    return None if paths is None else paths[index]


def class_names_of(source: Any) -> list[str] | None:
    """Names of the classes in the order of their indices, or None; several names of one class are joined by commas.

    With a ``target_transform``, ``classes`` and ``categories`` are of other indices, and only ``class_names`` counts.

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
    is_changed = getattr(source, "target_transform", None) is not None
    for name in _CLASS_NAME_ATTRIBUTES[: 1 if is_changed else None]:
        names = getattr(source, name, None)
        if isinstance(names, Sequence) and not isinstance(names, str) and len(names):
            return [", ".join(entry) if isinstance(entry, tuple | list) else str(entry) for entry in names]
    return None


def name_of_class(label: int, names: Sequence[str] | None) -> str:
    """The name of a class, or ``class 7`` if it is unknown."""
    return names[label] if names is not None and 0 <= label < len(names) else f"class {label}"


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names of classes, where two of one name are told apart by their numbers.

    Example:
        >>> distinct_names(["rose", "tulip", "rose"])
        ['rose (class 0)', 'tulip', 'rose (class 2)']
    """
    times = Counter(names)
    return [name if times[name] == 1 else f"{name} (class {label})" for label, name in enumerate(names)]


def _sample_lists(source: Any) -> list[Sequence[tuple[Any, Any]]]:
    lists = (getattr(source, name, None) for name in _SAMPLE_ATTRIBUTES)
    return [samples for samples in lists if _fits(samples, len(source)) and all(len(entry) == 2 for entry in samples)]


def looked_through(source: Subset | ConcatDataset, fact: Callable[[Any], list[_Fact] | None]) -> list[_Fact] | None:
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
