"""Target images for the data module: cropped, 8-bit and labelled, with a policy on damaged files."""

from __future__ import annotations

import errno
import operator
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.utils.data import Dataset

from lightning_difftune.data.digests import content_digest_of, may_change_on_reading, picture_digests_of
from lightning_difftune.data.items import TargetItem, as_batch, controls_of
from lightning_difftune.data.source_facts import (
    captions_of,
    class_names_of,
    labels_of,
    location_of,
    name_of_class,
    require_source,
)
from lightning_difftune.errors import ConfigError, DataError, check_choice
from lightning_difftune.files import array_digest, text_digest
from lightning_difftune.pictures import to_pixels
from lightning_difftune.protocols import TargetBatch

# In succession. If a disk is not mounted, one quick error is clearer than a hundred thousand warnings.
_MAX_UNREADABLE_RUN = 100
# Pictures to read if a source has no other way to identify its content.
_IDENTITY_SAMPLES = 64
# Errors of one file; any other errno (too many open files, an unplugged disk) concerns the machine.
_FILE_ERRNOS = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP})


class ImageTargets:
    """Pictures of an image source, at the model's training size.

    Cropping and colour are described at :func:`~lightning_difftune.pictures.to_pixels`. A picture that cannot be
    decoded (truncated, empty, missing, not a picture, beyond Pillow's limit against decompression bombs) raises an
    error that names it or, with ``on_corrupt="skip"``, is replaced by the next readable picture and its label: always
    the same one, so that caches and runs agree. There is one warning per picture and process.

    Args:
        source: A map-style data set of ``(image, label)`` or ``(image, caption)``, and possibly a control map; see
            :class:`~lightning_difftune.data.ImageSource`.
        image_size: Height and width of the pictures.
        channels: 1 (grey) or 3 (RGB).
        on_corrupt: ``"error"`` or ``"skip"``.

    Raises:
        ConfigError: A setting out of range.
        DataError: The source is empty, or cannot be indexed.

    Example:
        >>> targets = ImageTargets([(np.full((8, 12), 255, np.uint8), 3)], image_size=4)
        >>> batch = targets.pixels([0], flips=[False])
        >>> batch["pixel_values"].shape, float(batch["pixel_values"].max()), batch["class_labels"].tolist()
        (torch.Size([1, 3, 4, 4]), 1.0, [3])
    """

    def __init__(
        self,
        source: Dataset,
        image_size: int,
        channels: int = 3,
        on_corrupt: Literal["error", "skip"] = "error",
    ) -> None:
        if image_size < 1:
            raise ConfigError(f"image_size is {image_size}; expected the height and width in pixels, at least 1.")
        if channels not in (1, 3):
            raise ConfigError(f"channels is {channels}; expected 1 (grey) or 3 (RGB).")
        check_choice(type(self).__name__, "on_corrupt", on_corrupt, "error", "skip")
        require_source(source)
        self.source: Any = source
        self.image_size = image_size
        self.channels = channels
        self.on_corrupt = on_corrupt
        self.skipped: dict[int, str] = {}  # index => reason, for the pictures that this process has tried to read
        if len(self) == 0:
            raise DataError(f"the image source ({type(source).__name__}) is empty; expected at least one picture.")

    def __len__(self) -> int:
        return len(self.source)

    def labels(self) -> Tensor | None:
        """The class indices (N,) int64; ``None`` if only reading the pictures would tell.

        For a skipped picture, :meth:`pixels` returns its replacement's label instead.
        """
        return labels_of(self.source)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their indices, if the source has any."""
        return class_names_of(self.source)

    @cached_property
    def subjects(self) -> list[str] | None:
        """The caption or class (name or number) of each of the N pictures; ``None`` if unknown."""
        captions, labels, names = captions_of(self.source), self.labels(), self.class_names
        if captions is not None or labels is None:
            return captions
        return [name_of_class(label, names) for label in labels.tolist()]

    def pixels(self, indices: Sequence[int], flips: Sequence[bool]) -> TargetBatch:
        """A training batch of the pictures at B indices, those with a flip mirrored left to right.

        Returns:
            ``pixel_values`` (B, C, H, W) float32 in [-1, 1]; ``class_labels`` (B,) int64 or B ``captions``; and
            ``conditioning_pixel_values`` (B, 1 or 3, H, W) uint8 if the source has control maps.

        Raises:
            DataError: A picture is damaged and not skipped, or the source yields something else.
        """
        return as_batch([self.read(index) for index in indices], flips)

    def uint8(self, indices: Sequence[int]) -> Tensor:
        """Pictures (B, C, H, W) uint8, for reference statistics and display."""
        return torch.stack([self.read(index).pixels for index in indices])

    def captioned(self, indices: Sequence[int]) -> tuple[Any, ...]:
        """Pictures (B, C, H, W) uint8, their captions and, if there are any, control maps (B, 1 or 3, H, W) uint8.

        Raises:
            DataError: If the source has no captions, or control maps of only some of the pictures.
        """
        items = [self.read(index) for index in indices]
        captions = [item.label for item in items if isinstance(item.label, str)]
        if len(captions) < len(items):
            raise DataError(
                f"{self.describe(indices[0])} has no caption. Wrap a labelled source in ClassCaptions, or use a source "
                "of captioned files, such as CaptionedFolder."
            )
        maps = controls_of(items)
        return torch.stack([item.pixels for item in items]), captions, *([torch.stack(maps)] if maps else [])

    def read(self, index: int) -> TargetItem:
        """One picture, or its replacement; raises as :meth:`pixels` does."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        for candidate in range(index, index + min(len(self), _MAX_UNREADABLE_RUN)):
            item = self._load(candidate % len(self))
            if item is not None:
                return item
        raise DataError(
            f"none of {min(len(self), _MAX_UNREADABLE_RUN)} pictures in a row from {self.describe(index)} could be "
            f"read, the last because of: {list(self.skipped.values())[-1]}. Check the disk."
        )

    def describe(self, index: int) -> str:
        """A name for picture ``index`` in messages: its index and, if known, its file."""
        location = location_of(self.source, index)
        return f"image {index}" if location is None else f"image {index} ({location})"

    def identity(self) -> str:
        """A hash of what determines the pictures: the source's content, labels, size, channels and crop.

        It is the key of caches. Files are identified by names, sizes and modification times, arrays by their bytes. A
        source with a ``transform``, and a data set of one's own without a ``content_digest`` or labels, is identified
        by 64 of its pictures and their labels as well, so that a change of others alone is not detected.
        """
        return self._identity

    @cached_property
    def unread_identity(self) -> str | None:
        """A hash of the source's content, labels and captions; ``None`` if only reading the pictures would tell."""
        return None if self._content is None else array_digest(self._content, *self._texts())

    @cached_property
    def _content(self) -> str | None:
        return content_digest_of(self.source)

    def _texts(self) -> list[npt.NDArray[Any] | str]:
        labels = self.labels()
        return ["labels unknown" if labels is None else labels.numpy(), *(captions_of(self.source) or ())]

    @cached_property
    def _identity(self) -> str:
        parts = [
            f"adm centre crop, {self.image_size} px, {self.channels} channels, {len(self)} images",
            type(self.source).__name__ if self._content is None else self._content,
            *self._texts(),
        ]
        is_unknown = self.labels() is None and captions_of(self.source) is None
        if self._content is None or is_unknown or may_change_on_reading(self.source):
            positions = np.unique(np.linspace(0, len(self) - 1, _IDENTITY_SAMPLES).astype(int))
            items = [self.read(position) for position in positions.tolist()]
            parts.append(torch.stack([item.pixels for item in items]).numpy())
            parts.extend(str(item.label) for item in items)
            parts.extend(item.control.numpy() for item in items if item.control is not None)
        return array_digest(*parts)

    def picture_digests(self) -> Tensor | None:
        """A number for each picture, (N,) int64, that changes with the picture and its label or caption.

        ``None`` if only reading the pictures would tell.
        """
        digests, labels = picture_digests_of(self.source), self.labels()
        texts = captions_of(self.source) or (None if labels is None else labels.tolist())
        if digests is None or texts is None:
            return None
        pairs = zip(digests, texts, strict=True)
        return torch.tensor([int(text_digest(f"{digest} {text}")[:15], 16) for digest, text in pairs])

    def _load(self, index: int) -> TargetItem | None:
        """The picture, or None if it is damaged and skipped."""
        if index in self.skipped:
            return None
        image: Any = None
        try:
            entry = self.source[index]
            if not isinstance(entry, (tuple, list)) or len(entry) not in (2, 3):
                raise DataError(
                    f"the data set yields {type(entry).__name__}; expected (image, label), (image, caption) or "
                    "(image, caption, control map)."
                )
            image, label, control = (*entry, None)[:3]
            pixels = torch.from_numpy(to_pixels(image, self.image_size, self.channels))
            return TargetItem(pixels, _label(label), index, None if control is None else self._control(control))
        except DataError as error:
            raise DataError(f"{self.describe(index)}: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise a dozen types on damaged bytes
            if isinstance(error, OSError) and error.errno is not None and error.errno not in _FILE_ERRNOS:
                raise
            self._refuse_or_skip(index, image, error)
            return None

    def _control(self, control: Any) -> Tensor:
        grey = control.mode in ("1", "L") if isinstance(control, Image.Image) else np.ndim(control) == 2
        return torch.from_numpy(to_pixels(control, self.image_size, 1 if grey else 3))

    def _refuse_or_skip(self, index: int, image: Any, error: Exception) -> None:
        what = self.describe(index)
        if isinstance(image, ImageFile):
            image.close()  # Pillow does so only after the last byte
        filename = getattr(image, "filename", "")
        if filename and str(filename) not in what:  # the only place where torchvision's Caltech101 names its files
            what += f" ({filename})"
        reason = f"{type(error).__name__}: {error}"
        if self.on_corrupt == "error":
            raise DataError(
                f"{what} cannot be read ({reason}). Repair or remove it, or set on_corrupt='skip' to put the next "
                "readable picture in its place."
            ) from error
        self.skipped[index] = f"{what}: {reason}"
        warnings.warn(
            f"{what} cannot be read ({reason}); the next readable picture takes its place "
            f"({len(self.skipped)} skipped so far in this process).",
            stacklevel=2,
        )


def _label(label: Any) -> int | str:
    if isinstance(label, str):
        return label
    try:
        return operator.index(label)
    except TypeError as error:
        raise DataError(
            f"the label is {label!r} ({type(label).__name__}); expected an integer class index or a caption."
        ) from error
