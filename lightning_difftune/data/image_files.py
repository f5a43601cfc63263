"""Image sources that are files of their own: class folders, CSV lists (DF20-Mini) and CUB-200-2011.

An image source is a map-style data set of ``(image, label)``, so every torchvision data set is one as it is; the
classes here read what torchvision does not. They decode lazily and leave size, colour and damaged files to
:class:`~lightning_difftune.data.images.ImageTargets`.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import Dataset

from lightning_difftune.errors import DataError

IMAGE_EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_SPLIT_FOLDERS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
_FOLDER_LAYOUT = (
    "expected one sub-folder a class with pictures in it, such as root/daisy/001.jpg (or pictures alone, without "
    "sub-folders, for a single class)."
)
# Rows whose files are looked for at once, to tell a wrong root from single missing pictures.
_PROBED_ROWS = 100
_CLASS_INDEX = re.compile(r"\d+(\.0*)?")  # table software writes 12 as 12.0 once a column has an empty cell


class _ImageFiles(Dataset[tuple[Image.Image, int]]):
    """Pictures that are opened by their paths; what the classes below share."""

    paths: list[str]
    labels: npt.NDArray[np.int64]
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.paths[index]), int(self.labels[index])


class ImageFolder(_ImageFiles):
    """Pictures in folders: one sub-folder a class, the classes in the order of their sorted names.

    Files may lie in nested folders below their class. A folder with pictures and no sub-folders is a single class 0.
    Hidden files and folders are left out.

    Args:
        root: The folder of the class folders, of one split.

    Raises:
        DataError: ``root`` is missing, is no folder, holds no pictures, holds a class without pictures, holds
            pictures beside its class folders, or is the parent of splits.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            found = "is a file" if self.root.exists() else "does not exist"
            raise DataError(f"the image folder {self.root} {found}; {_FOLDER_LAYOUT}")
        folders = sorted(p.name for p in self.root.iterdir() if p.is_dir() and not _is_hidden(p.name))
        loose, other = find_pictures(self.root, recursive=False)
        if folders and loose:
            raise DataError(
                f"{self.root} holds {len(loose)} pictures (such as {Path(loose[0]).name}) beside its {len(folders)} "
                "class folders, so their class is unknown; move them into a class folder or away."
            )
        if folders and _SPLIT_FOLDERS.issuperset(name.lower() for name in folders):
            raise DataError(
                f"the sub-folders of {self.root} are the splits {', '.join(folders)}, not classes; "
                f"give one of them as root, such as {self.root / folders[0]}."
            )
        self.class_names = folders or [self.root.name]
        self.paths = loose
        labels = [0] * len(loose)
        empty = []
        for label, name in enumerate(folders):
            files, unknown = find_pictures(self.root / name, recursive=True)
            other += unknown
            self.paths += files
            labels += [label] * len(files)
            if not files:
                empty.append(name)
        self.labels = np.asarray(labels, dtype=np.int64)
        if not self.paths:
            beside = f"{len(folders)} sub-folders and " if folders else ""
            raise DataError(f"no pictures under {self.root}; found {beside}{describe_files(other)}; {_FOLDER_LAYOUT}")
        if empty:
            raise DataError(
                f"{len(empty)} of the {len(folders)} class folders in {self.root} hold no pictures: "
                f"{shorten(empty)}; remove them or fill them, since every folder is a row of the label table."
            )


class ListedImages(_ImageFiles):
    """Pictures listed in a CSV file with a header, one row a picture.

    The defaults fit DF20-Mini: ``ListedImages("DF20M", "DF20M-train_metadata_PROD.csv")`` and
    ``DF20M-public_test_metadata_PROD.csv``.

    Args:
        root: The folder that the listed paths start from.
        csv_file: The list.
        path_column: Column of the paths.
        label_column: Column of the labels: class indices throughout, or names, which become indices in the order of
            ``class_names``.
        where: Use only rows with these values in these columns, such as ``{"split": "train"}``.
        class_names: The classes. Without them, names are numbered in sorted order of those found: give them when one
            list may lack a class that another has.

    Raises:
        DataError: The list or a column is missing, a label is empty or unknown, no row is chosen, or the files are not
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
        rows = _read_csv(Path(csv_file), [path_column, label_column, *(where or {})])
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
        names = [row[label_column] for row in chosen.values()]
        self.class_names = None if class_names is None else list(class_names)
        if all(_CLASS_INDEX.fullmatch(name) for name in names):
            self.labels = np.asarray([int(float(name)) for name in names], dtype=np.int64)
            return
        if self.class_names is None:
            self.class_names = sorted(set(names))
        rank = {name: index for index, name in enumerate(self.class_names)}
        if unknown := sorted(set(names) - set(rank)):
            raise DataError(f"{csv_file}, {label_column}: {shorten(unknown)} not among the {len(rank)} class_names.")
        self.labels = np.asarray([rank[name] for name in names], dtype=np.int64)


class CUB200(_ImageFiles):
    """CUB-200-2011 (Wah et al., 2011) as it is distributed: 5,994 training and 5,794 test pictures of 200 birds.

    Args:
        root: The unpacked folder ``CUB_200_2011`` with ``images/``, ``images.txt``, ``image_class_labels.txt``,
            ``train_test_split.txt`` and ``classes.txt``.
        train: The training part, else the test part.

    Raises:
        DataError: One of the lists is missing, or they do not fit together.
    """

    def __init__(self, root: str | Path, train: bool = True) -> None:
        folder = Path(root)
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


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def find_pictures(folder: Path, *, recursive: bool) -> tuple[list[str], list[str]]:
    """Sorted paths of the pictures in a folder, and of the other files."""
    images: list[str] = []
    other: list[str] = []
    for directory, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if recursive and not _is_hidden(name)]
        for name in files:
            if not _is_hidden(name):
                known = Path(name).suffix.lower() in IMAGE_EXTENSIONS
                (images if known else other).append(str(Path(directory, name)))
    return sorted(images), other


def describe_files(files: Sequence[str]) -> str:
    """What to call files that are no pictures in a message."""
    if not files:
        return "no files"
    suffixes = Counter(Path(file).suffix or "no extension" for file in files)
    return "files of other types: " + ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))


def _read_csv(path: Path, columns: Sequence[str]) -> dict[int, dict[str, str]]:
    """Rows by line number."""
    if not path.is_file():
        raise DataError(f"the list of images {path} does not exist.")
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise DataError(f"{path} has no column {missing}; found {list(reader.fieldnames or [])}.")
        rows = ((reader.line_num, row) for row in reader)
        return {line: {key: (row[key] or "").strip() for key in columns} for line, row in rows}


def _read_pairs(path: Path) -> dict[str, str]:
    """Lines of ``key value``."""
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected the unpacked folder CUB_200_2011 with its lists of images.")
    lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, entries in enumerate(lines, start=1):
        if len(entries) != 2:
            raise DataError(f"{path}, line {number}: expected an identifier and a value, found {' '.join(entries)!r}.")
    return {key: value.strip() for key, value in lines}


def paths_below(root: str | Path, names: Sequence[str], where: str) -> list[str]:
    """Paths of listed pictures.

    Raises:
        DataError: If none of the first hundred is there; ``where`` names the list.
    """
    paths = [str(Path(root, name)) for name in names]
    if not any(Path(path).is_file() for path in paths[:_PROBED_ROWS]):
        raise DataError(
            f"the pictures listed in {where} are not below {root}: {paths[0]} does not exist, nor do the next ones. "
            "Set root to the folder that the listed paths start from."
        )
    return paths


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """The first names and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
