"""Captioned picture files: folders with texts or metadata, COCO's captions, and ADE20k."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from lightning_difftune.data.source_facts import CAPTION_KEYS, CONTROL_KEYS
from lightning_difftune.draws import choice_of
from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.models.frozen import DEFAULT_PROMPT

_FOLDER_LAYOUT = (
    'expected metadata.jsonl with lines such as {"file_name": "1.png", "text": "a red house"}, or a text file of '
    "each picture, 1.txt and 1.png."
)
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class CaptionedFiles(Dataset[tuple[Any, ...]]):
    """``(image, caption)`` or ``(image, caption, control)``, opened by path; base of the classes below."""

    def __init__(
        self, paths: Sequence[str], captions: Sequence[str], control_paths: Sequence[str] | None = None
    ) -> None:
        self.paths = list(paths)
        self.captions = list(captions)
        self.control_paths = None if control_paths is None else list(control_paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = Image.open(self.paths[index]), self.captions[index]
        return item if self.control_paths is None else (*item, Image.open(self.control_paths[index]))

    def describe(self, index: int) -> str:
        """The file of picture ``index``, for messages."""
        return self.paths[index]


class CaptionedFolder(CaptionedFiles):
    """A folder of captioned pictures, in either of two layouts.

    - ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``, the layout of Hugging Face data sets: a row per
      picture with ``file_name``, ``text`` (or ``caption``, or ``prompt``) and, in all rows or none, a control map as
      ``conditioning_image`` (or ``conditioning_image_file_name``, or ``control_image``). Paths start at the folder.
    - Otherwise, a text file for each picture in the folder or below: ``1.txt``, ``1.caption`` or ``1.png.txt`` for
      ``1.png``.

    Texts are UTF-8, or as their byte-order mark states. ``left_out`` counts the files that are not read.

    Args:
        root: The folder.

    Raises:
        DataError: If there are no pictures, a row is invalid (the message names it), a picture has no caption,
            pictures are missing, or ``root`` is the parent of splits.
        ConfigError: If the package that reads ``metadata.parquet`` is missing.
    """

    def __init__(self, root: str | Path) -> None:
        place = Folder(root, _FOLDER_LAYOUT)
        self.root = place.root
        pictures, other = place.files(recursive=True)
        lists = [file for file in other if Path(file).name.lower() in _METADATA and Path(file).parent == self.root]
        if len(lists) > 1:
            names = " and ".join(Path(file).name for file in lists)
            raise DataError(f"{self.root} has {names}, which may say different things. Keep one of them.")
        if lists:
            super().__init__(*self._listed(Path(lists[0])))
            unlisted = set(pictures).difference(self.paths, self.control_paths or ())
            place.left_out[f"pictures that {Path(lists[0]).name} does not list"] = len(unlisted)
            place.leave_out(set(other).difference(lists))
        else:
            folders = {Path(picture).relative_to(self.root).parts[0].lower() for picture in pictures}
            if len(folders) > 1 and SPLIT_FOLDERS.issuperset(folders):
                raise DataError(
                    f"the sub-folders of {self.root} are the splits {', '.join(sorted(folders))}: one would be trained "
                    "on with the others. Give one of them as root, and another to val_target."
                )
            texts = _texts_of(self.root, pictures, other)
            super().__init__(pictures, [" ".join(read_text(Path(texts[path])).split()) for path in pictures])
            place.leave_out(set(other).difference(texts.values()))
        self.left_out = place.left_out

    def _listed(self, file: Path) -> tuple[list[str], list[str], list[str] | None]:
        rows = _read_rows(file)
        text_key, control_key = _first_key(rows, CAPTION_KEYS), _first_key(rows, CONTROL_KEYS)
        for line, row in rows.items():
            for key in ("file_name", text_key or "text"):
                value = row.get(key)
                if not isinstance(value, str) or (key == "file_name" and not value):
                    raise DataError(f"{file}, line {line}: {key} is {value!r}, expected a string; keys: {sorted(row)}.")
            control = row.get(control_key) if control_key is not None else None
            if control is not None and not isinstance(control, str):
                raise DataError(f"{file}, line {line}: {control_key} is {control!r}, expected a path.")
        controls = (
            [row[control_key] for row in rows.values() if row.get(control_key)] if control_key is not None else []
        )
        if controls and len(controls) < len(rows):
            first = next(line for line, row in rows.items() if not row.get(control_key or ""))
            raise DataError(
                f"{file}, line {first}: no {control_key}, as in {len(rows) - len(controls)} of {len(rows)} "
                "lines; give all pictures one, or none."
            )
        self._warn_of_unused(file, next(iter(rows.values())), {"file_name", text_key, control_key})
        return (
            paths_below(self.root, [row["file_name"] for row in rows.values()], f"{file}, file_name"),
            [row[text_key or "text"] for row in rows.values()],
            paths_below(self.root, controls, f"{file}, {control_key}") if controls else None,
        )

    def _warn_of_unused(self, file: Path, row: dict[str, Any], used: set[str | None]) -> None:
        for key in row.keys() - used:
            value = row[key]
            if isinstance(value, str) and value and len(value) < 1000 and (self.root / value).is_file():
                rank_zero_warn(
                    f"{file} names a file under {key!r} ({value}), which is not used: a control map is called "
                    "conditioning_image."
                )


class CocoCaptions(CaptionedFiles):
    """COCO 2017 (Lin et al., 2014) as distributed, with one of the captions of each picture.

    The choice depends only on (seed, index of the picture): the paper draws one per picture (Appendix B.1).

    Args:
        root: The folder with ``annotations/captions_train2017.json`` and the folder of pictures ``train2017``.
        split: ``"train2017"`` (118,287 pictures) or ``"val2017"`` (5,000).
        seed: Seed of the choice.

    Raises:
        DataError: If the captions are missing or malformed, a picture has none, or the pictures are missing.
    """

    def __init__(self, root: str | Path, split: str = "train2017", seed: int = 0) -> None:
        file = Path(root, "annotations", f"captions_{split}.json").expanduser()
        if not file.is_file():
            raise DataError(
                f"{file} does not exist; expected annotations/captions_{split}.json and the folder {split} below root, "
                "as annotations_trainval2017.zip and the zip of the pictures unpack."
            )
        try:
            content = json.loads(file.read_bytes())
            names = {image["id"]: image["file_name"] for image in content["images"]}
            choices: dict[Any, list[str]] = {key: [] for key in names}
            for annotation in content["annotations"]:
                choices[annotation["image_id"]].append(" ".join(annotation["caption"].split()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file} is not a file of COCO captions ({type(error).__name__}: {error}); expected `images` with id "
                "and file_name, and `annotations` with the image_id of one of them and a caption."
            ) from error
        bare = [names[key] for key, captions in choices.items() if not captions]
        if bare or not names:
            found = f"{len(bare)} pictures without a caption: {shorten(bare)}" if names else "no pictures"
            raise DataError(f"{file} lists {found}. Take them out of `images`, or caption them.")
        super().__init__(
            paths_below(Path(root, split), list(names.values()), str(file)),
            [captions[choice_of(seed, i, len(captions))] for i, captions in enumerate(choices.values())],
        )


class ADE20k(CaptionedFiles):
    """ADE20k (Zhou et al., 2017) as the scene parsing challenge distributes it, with one prompt for all pictures.

    Args:
        root: The unpacked folder ``ADEChallengeData2016``, with ``images/training`` (20,210 pictures) and
            ``images/validation`` (2,000).
        split: ``"training"`` or ``"validation"``.
        prompt: The caption of every picture; the paper's by default.

    Raises:
        DataError: If there are no pictures.
    """

    def __init__(self, root: str | Path, split: str = "training", prompt: str = DEFAULT_PROMPT) -> None:
        folder = Path(root, "images", split).expanduser()
        paths, other = Folder(folder).files(recursive=False) if folder.is_dir() else ([], [])
        if not paths:
            raise DataError(
                f"no pictures in {folder}; found {describe_files(other)}. Set root to the folder ADEChallengeData2016 "
                "that ADEChallengeData2016.zip unpacks to."
            )
        super().__init__(paths, [prompt] * len(paths))


def _first_key(rows: dict[int, dict[str, Any]], names: Sequence[str]) -> str | None:
    return next((name for name in names if any(row.get(name) is not None for row in rows.values())), None)


def _texts_of(root: Path, pictures: list[str], other: list[str]) -> dict[str, str]:
    """The text file of every picture."""
    if not pictures:
        raise DataError(f"no pictures under {root}; found {describe_files(other)}; {_FOLDER_LAYOUT}")
    texts = captions_beside(pictures, other)
    if bare := [picture for picture in pictures if picture not in texts]:
        raise DataError(
            f"{len(bare)} of {len(pictures)} pictures under {root} have no caption: {shorten(bare)}; {_FOLDER_LAYOUT}"
        )
    return texts


def _read_rows(file: Path) -> dict[int, dict[str, Any]]:
    """The rows of a metadata file by line or row number."""
    if file.suffix.lower() == ".csv":
        rows: dict[int, dict[str, Any]] = dict(read_csv(file, ["file_name"]))
    elif file.suffix.lower() == ".parquet":
        rows = dict(enumerate(_read_parquet(file), start=1))
    else:
        rows = {}
        # Captions may contain other Unicode line separators, where splitlines() would split.
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number}: not JSON ({error}); found {line[:80]!r}.") from error
            if not isinstance(entry, dict):
                raise DataError(f"{file}, line {number}: expected an object, found {line[:80]!r}.")
            rows[number] = entry
    if not rows:
        raise DataError(f"{file} lists no pictures; {_FOLDER_LAYOUT}")
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(f"{file} is read with pyarrow. Install it: pip install pyarrow.") from error
    try:
        return list(parquet.read_table(file).to_pylist())
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{file} is not a whole parquet file ({error}).") from error
