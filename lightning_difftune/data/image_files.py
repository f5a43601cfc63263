"""Image sources of picture files: class folders, CSV lists (DF20-Mini), and CUB-200-2011.

An image source is a map-style data set of ``(image, label)``, such as every torchvision data set; the classes here
read formats that torchvision does not. They decode lazily and leave size, colour and damaged files to
:class:`~lightning_difftune.data.images.ImageTargets`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch.utils.data import Dataset

from lightning_difftune.data.folders import (
    SPLIT_FOLDERS,
    Folder,
    captions_beside,
    describe_files,
    paths_below,
    read_csv,
    read_text,
    shorten,
)
from lightning_difftune.errors import DataError, check_lists

_FOLDER_LAYOUT = (
    "expected one sub-folder per class with pictures in it, such as root/daisy/001.jpg (or pictures alone, without "
    "sub-folders, for a single class)."
)
_LISTS = frozenset({".csv", ".json", ".jsonl", ".parquet", ".tsv"})
_CLASS_INDEX = re.compile(r"\d+(\.0*)?")  # table software writes 12 as 12.0 if a column has an empty cell


class ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Pictures opened by path; base of the classes below."""

    paths: list[str]
    labels: npt.NDArray[np.int64]
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.paths[index]), int(self.labels[index])

    def describe(self, index: int) -> str:
        """The file of picture ``index``, for messages."""
        return self.paths[index]


class ImageFolder(ImageFiles):
    """Pictures in folders: one sub-folder per class, in the order of their sorted names.

    Files may be in nested folders below their class. A folder with pictures and no sub-folders is a single class 0.
    Hidden and system files and folders are left out, see :class:`~lightning_difftune.data.folders.Folder`;
    ``left_out`` counts them and other files that are not read.

    Args:
        root: The folder of the class folders of one split.

    Raises:
        DataError: ``root`` is missing, not a folder, without pictures, has a class without pictures or pictures next to
            its class folders, or is the parent of splits.
    """

    def __init__(self, root: str | Path) -> None:
        place = Folder(root, _FOLDER_LAYOUT)
        self.root = place.root
        folders = place.subfolders()
        loose, other = place.files(recursive=False)
        lists = [file for file in other if Path(file).suffix.lower() in _LISTS]
        if folders and loose:
            raise DataError(
                f"{self.root} holds {len(loose)} pictures (such as {Path(loose[0]).name}) next to its {len(folders)} "
                "class folders, so their class is unknown; move them into a class folder or elsewhere."
            )
        if folders and SPLIT_FOLDERS.issuperset(name.lower() for name in folders):
            raise DataError(
                f"the sub-folders of {self.root} are the splits {', '.join(folders)}, not classes; "
                f"give one of them as root, such as {self.root / folders[0]}."
            )
        self.class_names = [unicodedata.normalize("NFC", name) for name in folders] or [self.root.resolve().name]
        if odd := [name for name in self.class_names if re.search(r"[\ud800-\udfff]", name)]:
            raise DataError(
                f"the name of the folder {os.fsencode(odd[0])!r} in {self.root} is not UTF-8. It names a class: rename "
                "it, for instance with `convmv -f latin1 -t utf-8`."
            )
        self.paths = loose
        labels = [0] * len(loose)
        empty = []
        for label, name in enumerate(folders):
            files, unknown = place.files(self.root / name, recursive=True)
            other += unknown
            self.paths += files
            labels += [label] * len(files)
            if not files:
                empty.append(f"{name} ({describe_files(unknown)})" if unknown else name)
        place.leave_out(other)
        self.left_out = place.left_out
        self._warn_of_unread(other, lists)
        self.labels = np.asarray(labels, dtype=np.int64)
        if not self.paths:
            folders_too = f"{len(folders)} sub-folders and " if folders else ""
            raise DataError(
                f"no pictures under {self.root}; found {folders_too}{describe_files(other)}; {_FOLDER_LAYOUT}"
            )
        if empty:
            raise DataError(
                f"{len(empty)} of the {len(folders)} class folders in {self.root} hold no pictures: "
                f"{shorten(empty)}; remove them or fill them, since every folder has a row in the label table."
            )

    def _warn_of_unread(self, other: list[str], lists: list[str]) -> None:
        captions = captions_beside(self.paths, other)
        if captions or any(Path(file).stem.lower() == "metadata" for file in other):
            found = f"{len(captions):,} of {len(self.paths):,} pictures" if captions else "pictures, in a metadata file"
            rank_zero_warn(
                f"{self.root} has captions of {found}, which ImageFolder does not read; CaptionedFolder does."
            )
        elif lists:
            rank_zero_warn(
                f"{self.root}: {shorten([Path(file).name for file in lists])} is not read. CaptionedFolder "
                "reads captions and control maps from metadata.jsonl, and ListedImages classes from a CSV file."
            )


class ListedImages(ImageFiles):
    """Pictures listed in a CSV file with a header, one row per picture.

    The defaults fit DF20-Mini: ``ListedImages("DF20M", "DF20M-train_metadata_PROD.csv")`` and
    ``DF20M-public_test_metadata_PROD.csv``.

    Args:
        root: The folder that the listed paths are relative to.
        csv_file: The list.
        path_column: Column of the paths.
        label_column: Column of the labels: names, which become indices in the order of ``class_names``, or only class
            indices, unless ``class_names`` has them all.
        where: Use only rows with these values in these columns, such as ``{"split": "train"}``.
        class_names: The classes; by default the names found, in sorted order.

    Raises:
        DataError: The list or a column is missing, a label is empty or unknown, no row matches, or the files are not
            below ``root``.
    """

    def __init__(
        self,
        root: str | Path,
        csv_file: str | Path,
        path_column: str = "image_path",
        label_column: str = "class_id",
        where: Mapping[str, str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        check_lists(type(self).__name__, class_names=class_names)
        rows = read_csv(Path(csv_file).expanduser(), [path_column, label_column, *(where or {})])
        chosen = {
            line: row for line, row in rows.items() if all(row[key] == value for key, value in (where or {}).items())
        }
        if not chosen:
            found = {key: dict(Counter(row[key] for row in rows.values())) for key in (where or {})}
            raise DataError(f"{csv_file} lists no pictures{f' with {dict(where)}; found {found}' if where else ''}.")
        for line, row in chosen.items():
            if not row[path_column] or not row[label_column]:
                column = label_column if row[path_column] else path_column
                raise DataError(f"{csv_file}, line {line}: {column} is empty; fill it or remove the row.")
        self.paths = paths_below(root, [row[path_column] for row in chosen.values()], f"{csv_file}, {path_column}")
        names = [unicodedata.normalize("NFC", row[label_column]) for row in chosen.values()]
        self.class_names = None if class_names is None else [unicodedata.normalize("NFC", name) for name in class_names]
        if not set(names).issubset(self.class_names or [""]) and all(map(_CLASS_INDEX.fullmatch, names)):
            self.labels = np.asarray([int(float(name)) for name in names], dtype=np.int64)
            return
        if self.class_names is None:
            self.class_names = sorted(set(names))
        rank = {name: index for index, name in enumerate(self.class_names)}
        if unknown := sorted(set(names) - set(rank)):
            raise DataError(f"{csv_file}, {label_column}: {shorten(unknown)} not among the {len(rank)} class_names.")
        self.labels = np.asarray([rank[name] for name in names], dtype=np.int64)


class CUB200(ImageFiles):
    """CUB-200-2011 (Wah et al., 2011) as distributed: 5,994 training and 5,794 test pictures of 200 birds.

    Args:
        root: The unpacked folder ``CUB_200_2011`` with ``images/``, ``images.txt``, ``image_class_labels.txt``,
            ``train_test_split.txt`` and ``classes.txt``.
        train: Whether to use the training or the test part.

    Raises:
        DataError: One of the lists is missing, or they do not match.
    """

    def __init__(self, root: str | Path, train: bool = True) -> None:
        folder = Path(root).expanduser()
        files, labels, training, classes = (
            _read_pairs(folder / name)
            for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
        )
        if not files.keys() == labels.keys() == training.keys() or not set(labels.values()) <= classes.keys():
            raise DataError(
                f"the lists in {folder} do not fit together: {len(files)} images, {len(labels)} labels, "
                f"{len(training)} split entries, {len(classes)} classes; unpack CUB_200_2011.tgz again."
            )
        chosen = [key for key in files if (training[key] == "1") == train]
        if not chosen:
            raise DataError(
                f"{folder / 'train_test_split.txt'} has no picture in the {'train' if train else 'test'} part."
            )
        self.paths = paths_below(folder / "images", [files[key] for key in chosen], str(folder / "images.txt"))
        self.labels = np.asarray([int(labels[key]) - 1 for key in chosen], dtype=np.int64)  # the lists count from 1
        self.class_names = list(classes.values())


def _read_pairs(path: Path) -> dict[str, str]:
    """Lines of ``key value``."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected the unpacked folder CUB_200_2011 with its lists of images.")
    lines = [line.split(maxsplit=1) for line in read_text(path).split("\n") if line.strip()]
    for number, entries in enumerate(lines, start=1):
        if len(entries) != 2:
            raise DataError(f"{path}, line {number}: expected an identifier and a value, found {' '.join(entries)!r}.")
    return {key: value.strip() for key, value in lines}
