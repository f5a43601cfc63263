"""Which image source a path stands for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from lightning_difftune.data.captioned_files import CaptionedFolder
from lightning_difftune.data.hub_images import HubImages
from lightning_difftune.data.image_arrays import NpzImages
from lightning_difftune.data.image_files import IMAGE_EXTENSIONS, ImageFolder
from lightning_difftune.data.web_dataset import WebDatasetShards

_HUB_FILES = ("dataset_dict.json", "state.json", "dataset_infos.json")


def open_images(path: str, split: str | None = None) -> Any:
    """Open pictures by looking at what is there.

    An ``.npz`` file is read by :class:`NpzImages`; ``.tar`` files by :class:`WebDatasetShards`; a folder with
    ``metadata.jsonl`` or with text files beside its pictures by :class:`CaptionedFolder`; one that ``save_to_disk``
    wrote by :class:`HubImages`, as is what is no path at all; any other folder by :class:`ImageFolder`.

    Args:
        path: File, folder, pattern of shards, or name of a data set on the Hugging Face hub.
        split: For data sets that have several.

    Raises:
        DataError: If there is nothing, or it cannot be used.
        ConfigError: If a package is missing.
    """
    place = Path(path).expanduser()
    if place.suffix == ".npz":
        return NpzImages(place, split)
    if place.suffix == ".tar" or any(place.glob("*.tar")):
        return WebDatasetShards(str(place))
    if not place.exists():
        # What has the form of a name on the hub is one; all else is a folder that is not there.
        is_name = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
        return HubImages(path, split or "train") if is_name and path.count("/") == 1 else ImageFolder(place)
    if any((place / name).exists() for name in _HUB_FILES):
        return HubImages(place, split or "train")
    return CaptionedFolder(place) if has_captions(place) else ImageFolder(place)


def has_captions(folder: Path) -> bool:
    """Whether a folder has ``metadata.jsonl``, or a text file beside most of its pictures."""
    if (folder / "metadata.jsonl").exists():
        return True
    pictures = [file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_EXTENSIONS]
    looked_at = random.Random(0).sample(pictures, min(50, len(pictures)))
    return sum(file.with_suffix(".txt").is_file() for file in looked_at) > len(looked_at) / 2
