"""Captioned pictures that are files of their own: COCO, ADE20k, and any folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from lightning_difftune.data.image_files import describe_files, find_pictures, paths_below, shorten
from lightning_difftune.draws import choice_of
from lightning_difftune.errors import DataError
from lightning_difftune.files import array_digest, stat_digest
from lightning_difftune.prompts import DEFAULT_PROMPT

_FOLDER_LAYOUT = (
    'expected metadata.jsonl with lines such as {"file_name": "1.png", "text": "a red house"}, or a text file beside '
    "each picture, 1.txt beside 1.png."
)


class _Row(NamedTuple):
    """A line of metadata.jsonl."""

    line: int
    file_name: str
    text: str
    conditioning_image: str | None


class _CaptionedFiles(Dataset[tuple[Any, ...]]):
    """``(image, caption)`` or ``(image, caption, control)``, opened by their paths; what the classes below share."""

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

    def content_digest(self) -> str:
        """A hash of captions and of the files' names, sizes and modification times."""
        controls = [] if self.control_paths is None else [stat_digest(self.control_paths)]
        return array_digest(stat_digest(self.paths), *controls, *self.captions)


class CocoCaptions(_CaptionedFiles):
    """COCO 2017 (Lin et al., 2014) as it is distributed, one of the captions of each picture.

    Which one depends on (seed, index of the picture) alone, as the paper draws one for each picture (Appendix B.1).

    Args:
        root: The folder of ``annotations/captions_train2017.json`` and of the folder ``train2017`` of pictures.
        split: ``"train2017"`` (118,287 pictures) or ``"val2017"`` (5,000).
        seed: Seed of the choice.

    Raises:
        DataError: If the captions are missing or no captions file, a picture has none, or the pictures are not there.
    """

    def __init__(self, root: str | Path, split: str = "train2017", seed: int = 0) -> None:
        file = Path(root, "annotations", f"captions_{split}.json")
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
                f"{file} is no file of COCO captions ({type(error).__name__}: {error}); expected `images` with id and "
                "file_name, and `annotations` with the image_id of one of them and a caption."
            ) from error
        bare = [names[key] for key, captions in choices.items() if not captions]
        if bare or not names:
            found = f"{len(bare)} pictures without a caption: {shorten(bare)}" if names else "no pictures"
            raise DataError(f"{file} lists {found}. Take them out of `images`, or caption them.")
        super().__init__(
            paths_below(Path(root, split), list(names.values()), str(file)),
            [captions[choice_of(seed, i, len(captions))] for i, captions in enumerate(choices.values())],
        )


class ADE20k(_CaptionedFiles):
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
        folder = Path(root, "images", split)
        paths, other = find_pictures(folder, recursive=False)
        if not paths:
            raise DataError(
                f"no pictures in {folder}; found {describe_files(other)}. Set root to the folder ADEChallengeData2016 "
                "that ADEChallengeData2016.zip unpacks to."
            )
        super().__init__(paths, [prompt] * len(paths))


class CaptionedFolder(_CaptionedFiles):
    """A folder of captioned pictures, in either of two layouts.

    - ``metadata.jsonl``, the layout of Hugging Face data sets: a JSON object a line with ``file_name``, ``text`` and,
      in all lines or none, ``conditioning_image``, a control map. Paths start at the folder.
    - Without it, a text file beside each picture in the folder or below: ``1.txt`` beside ``1.png``.

    Args:
        root: The folder.

    Raises:
        DataError: If there are no pictures, a line cannot be used (the message names it), a picture has no caption,
            or the pictures are not there.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            found = "is a file" if self.root.exists() else "does not exist"
            raise DataError(f"the image folder {self.root} {found}; {_FOLDER_LAYOUT}")
        listed = self.root / "metadata.jsonl"
        if not listed.exists():
            super().__init__(*self._beside())
            return
        rows = _read_rows(listed)
        controls = [row.conditioning_image for row in rows if row.conditioning_image is not None]
        if controls and len(controls) < len(rows):
            first = next(row for row in rows if row.conditioning_image is None)
            raise DataError(
                f"{listed}, line {first.line}: no conditioning_image, as in {len(rows) - len(controls)} of {len(rows)} "
                "lines; give all pictures one, or none."
            )
        super().__init__(
            paths_below(self.root, [row.file_name for row in rows], f"{listed}, file_name"),
            [row.text for row in rows],
            paths_below(self.root, controls, f"{listed}, conditioning_image") if controls else None,
        )

    def _beside(self) -> tuple[list[str], list[str]]:
        paths, other = find_pictures(self.root, recursive=True)
        if not paths:
            raise DataError(f"no pictures under {self.root}; found {describe_files(other)}; {_FOLDER_LAYOUT}")
        files = [Path(path).with_suffix(".txt") for path in paths]
        bare = [str(path) for path, file in zip(paths, files, strict=True) if not file.is_file()]
        if bare:
            raise DataError(
                f"{len(bare)} of {len(paths)} pictures under {self.root} have no caption: {shorten(bare)}; "
                f"{_FOLDER_LAYOUT}"
            )
        return paths, [" ".join(file.read_text(encoding="utf-8-sig", errors="replace").split()) for file in files]


def _read_rows(file: Path) -> list[_Row]:
    rows: list[_Row] = []
    # Captions may hold other line separators of Unicode, where splitlines() would cut.
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: no JSON ({error}); found {line[:80]!r}.") from error
        if not isinstance(entry, dict):
            raise DataError(f"{file}, line {number}: expected an object, found {line[:80]!r}.")
        name, text, control = (entry.get(key) for key in ("file_name", "text", "conditioning_image"))
        for key, value in (("file_name", name), ("text", text)):
            if not isinstance(value, str) or (key == "file_name" and not value):
                raise DataError(f"{file}, line {number}: {key} is {value!r}, expected a string; keys: {sorted(entry)}.")
        if control is not None and not isinstance(control, str):
            raise DataError(f"{file}, line {number}: conditioning_image is {control!r}, expected a path.")
        rows.append(_Row(number, str(name), str(text), control))
    if not rows:
        raise DataError(f"{file} lists no pictures; {_FOLDER_LAYOUT}")
    return rows
