"""Opens a path as an image source, and inspects its pictures before training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from lightning_difftune.data.building import read_ahead
from lightning_difftune.data.captioned_files import CaptionedFolder
from lightning_difftune.data.folders import Folder, captions_beside
from lightning_difftune.data.hub_images import HubImages
from lightning_difftune.data.image_arrays import NpzImages
from lightning_difftune.data.image_files import ImageFolder
from lightning_difftune.data.source_facts import (
    captions_of,
    class_names_of,
    distinct_names,
    labels_of,
    location_of,
    name_of_class,
)
from lightning_difftune.data.web_dataset import WebDatasetShards
from lightning_difftune.errors import DataError
from lightning_difftune.pictures import largest_value, to_pixels

_HUB_FILES = ("dataset_dict.json", "state.json", "dataset_infos.json")
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "F"})


def open_images(path: str, split: str | None = None) -> Any:
    """Open a path as the image source that fits its contents.

    An ``.npz`` file is read by :class:`NpzImages`; ``.tar`` files by :class:`WebDatasetShards`; a folder with captions
    (a metadata file, or text files of its pictures) by :class:`CaptionedFolder`; a folder of ``save_to_disk`` or a name
    on the hub by :class:`HubImages`; any other folder by :class:`ImageFolder`.

    Args:
        path: File, folder, pattern of shards, or name of a data set on the Hugging Face hub.
        split: Name of the split, for data sets with several.

    Raises:
        DataError: If nothing usable is found.
        ConfigError: If a package is missing.
    """
    place = Path(path).expanduser()
    if place.suffix == ".npz":
        return NpzImages(place, split)
    if place.suffix == ".tar" or glob("*.tar", root_dir=place):
        return WebDatasetShards(str(place))
    if not place.exists():
        # Anything that does not look like a hub name is a folder that does not exist.
        is_name = path.count("/") == 1 and not path.startswith((".", "/", "~"))
        return HubImages(path, split or "train") if is_name else ImageFolder(place)
    if any((place / name).exists() for name in _HUB_FILES):
        return HubImages(place, split or "train")
    return CaptionedFolder(place) if place.is_dir() and _has_captions(place) else ImageFolder(place)


def _has_captions(root: Path) -> bool:
    """Whether a folder has a metadata file, or text files for its pictures or for most pictures below it."""
    folder = Folder(root)
    loose, other = folder.files(recursive=False)
    if any(Path(file).stem.lower() == "metadata" for file in other) or captions_beside(loose, other):
        return True
    pictures, other = folder.files(recursive=True)
    return len(captions_beside(pictures, other)) > len(pictures) / 2


class PictureFacts(NamedTuple):
    """Facts of one picture."""

    label: int | None  # None for captions
    width: int = 0  # pixels, upright
    height: int = 0
    is_grey: bool = False
    has_alpha: bool = False
    is_rotated: bool = False  # by its EXIF orientation
    largest: int | None = None  # largest value of a 16-bit picture
    digest: str = ""  # of the pixels, upright and with their transparency
    error: str | None = None  # why it, or its control map, cannot be read
    control_size: tuple[int, int] | None = None  # width and height of its control map, if it has one


class Inspection:
    """The facts of a source; ``pictures`` has an entry for each picture."""

    def __init__(self, source: Any, pictures: Sequence[PictureFacts]) -> None:
        self.source, self.pictures = source, list(pictures)
        self.notes: list[str] = []  # warnings on opening it
        self.readable = [picture for picture in self.pictures if picture.error is None]

    def name(self, index: int) -> str:
        """A name for picture ``index``."""
        return location_of(self.source, index) or f"image {index}"

    def counts(self) -> dict[str, int]:
        """Number of pictures per class name or number, in the order of the classes; empty for captions."""
        counts = Counter(picture.label for picture in self.pictures if picture.label is not None)
        names = distinct_names(class_names_of(self.source) or [])
        labels = range(max([*counts, len(names) - 1]) + 1) if counts else ()
        return {name_of_class(label, names): counts[label] for label in labels}

    def unreadable(self) -> dict[str, str]:
        """Pictures that cannot be read, with the reasons."""
        return {self.name(i): picture.error for i, picture in enumerate(self.pictures) if picture.error is not None}

    def duplicates(self) -> list[list[int]]:
        """Groups of pictures with exactly the same pixels, by their numbers."""
        groups: dict[str, list[int]] = {}
        for index, picture in enumerate(self.pictures):
            if picture.error is None:
                groups.setdefault(picture.digest, []).append(index)
        return [group for group in groups.values() if len(group) > 1]


def inspect(source: Any, num_workers: int = 0, progress: Callable[[int], None] | None = None) -> Inspection:
    """Decode every picture of a source, in worker processes if there are any, and record its facts.

    ``progress`` is called with the number of finished pictures.

    Raises:
        DataError: If the source yields anything but pictures.
    """
    labels = labels_of(source) if captions_of(source) is None else None
    known = None if labels is None else labels.tolist()
    pictures = []
    for facts in read_ahead(partial(_facts_at, source, known), len(source), num_workers):
        pictures.append(facts)
        if progress is not None:
            progress(len(pictures))
    return Inspection(source, pictures)


def _facts_at(source: Any, labels: list[int] | None, index: int) -> PictureFacts:
    known = None if labels is None else labels[index]
    what = ""
    try:
        image, label, *controls = source[index]
        if known is None and not isinstance(label, str):
            known = int(label)
        if known is not None and known < 0:
            return PictureFacts(known, error=f"its label is {known}, and classes have numbers from 0")
        facts = _facts_of(image, known)
        for control in controls:
            what = "its control map: "
            found = _facts_of(control, None)
            facts = facts._replace(control_size=(found.width, found.height))
        return facts
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged bytes
        return PictureFacts(known, error=f"{what}{type(error).__name__}: {error}")


def _facts_of(image: Any, label: int | None) -> PictureFacts:
    """Facts of one picture; passes on Pillow's errors on damaged bytes."""
    largest = largest_value(image)
    to_pixels(image, 1, 3)  # as in training, for its errors
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).squeeze(2).numpy() if image.ndim == 3 else image.numpy()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image.squeeze(2) if image.ndim == 3 and image.shape[2] == 1 else image)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    upright = ImageOps.exif_transpose(image) if orientation != 1 else image
    has_alpha = bool(upright.has_transparency_data)
    pixels = upright.convert("RGBA" if has_alpha else "RGB") if upright.mode not in _GREY_MODES else upright
    digest = hashlib.sha256(f"{pixels.mode} {pixels.size}".encode() + pixels.tobytes()).hexdigest()
    width, height = upright.size
    is_grey = upright.mode in _GREY_MODES
    return PictureFacts(label, width, height, is_grey, has_alpha, orientation != 1, largest, digest)
