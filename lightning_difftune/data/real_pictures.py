"""The real pictures of a data module: training and held-out ones with matched classes, also for metrics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_difftune.data.batches import ReadTarget
from lightning_difftune.data.building import BATCH_SIZE
from lightning_difftune.data.derived import joined_by_name
from lightning_difftune.data.folders import shorten
from lightning_difftune.data.images import ImageTargets
from lightning_difftune.data.items import TargetItem
from lightning_difftune.data.source_facts import name_of_class, paths_of, require_source
from lightning_difftune.errors import ConfigError, DataError, check_choice, check_counts
from lightning_difftune.pictures import largest_value
from lightning_difftune.protocols import Split, TargetBatch

# Number of 16-bit pictures to check, and largest number of used bits that is an error (cameras, microscopes).
_DEPTH_SAMPLES = 16
MOST_WRONG_BITS = 14
FEW_PICTURES = 10  # per class


class RealPictures(L.LightningDataModule):
    """Training and held-out pictures, for metrics always in the same order and never mirrored.

    The arguments are those of :class:`~lightning_difftune.data.MemoryBankDataModule`.

    Raises:
        ConfigError: If the target has class labels and ``num_classes`` is not set.
        DataError: If a label is outside the label table, or the held-out pictures have a class that the target lacks.
    """

    def __init__(
        self,
        target: Dataset,
        val_target: Dataset | None,
        *,
        num_classes: int | None,
        image_size: int,
        channels: int,
        on_corrupt: Literal["error", "skip"],
        reference: Literal["val", "train"],
        build_batch_size: int | None,
    ) -> None:
        super().__init__()
        check_choice(type(self).__name__, "reference", reference, "val", "train")
        check_counts(type(self).__name__, num_classes=num_classes, build_batch_size=build_batch_size)
        self.num_classes, self.channels, self.reference = num_classes, channels, reference
        self.build_batch_size = build_batch_size
        self.target = ImageTargets(target, image_size, channels, on_corrupt)
        self.val_target: ImageTargets | None = None
        names = self.target.class_names  # an error if the parts of the target number their classes differently
        if val_target is not None:
            require_source(val_target)
            held_out = val_target if num_classes is None else joined_by_name(val_target, names)
            self.val_target = ImageTargets(held_out, image_size, channels, on_corrupt)
        if self.target.labels() is None:
            return
        if num_classes is None:
            raise ConfigError(
                "num_classes is not set, but the target has class labels. Set it to their number; for a model of text, "
                "make captions of them with lightning_difftune.data.ClassCaptions."
            )
        for targets in (self.target, self.val_target):
            if targets is not None and (known := targets.labels()) is not None:
                check_labels(known, num_classes, targets.describe)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the target's classes in the order of their labels, if its source has any."""
        return self.target.class_names if self.num_classes is not None else None

    def setup(self, stage: str) -> None:
        """Warn of held-out pictures that are trained on, maps in one part and small classes; refuse black pictures."""
        if stage != "fit":
            return
        check_depth(self.target)
        if self.val_target is not None and (said := describe_shared(self.target.source, self.val_target.source)):
            rank_zero_warn(said)
        if self.val_target is not None:
            mapped = {_has_maps(self.target): "target", _has_maps(self.val_target): "val_target"}
            if mapped.keys() == {True, False}:
                rank_zero_warn(
                    f"The pictures of {mapped[True]} have control maps of their own, and those of {mapped[False]} do "
                    "not: a ControlNet gets the annotator's for these. Give both maps of one kind."
                )
        labels = self.target.labels()
        if self.num_classes is not None and labels is not None:
            sentence = describe_small_classes(labels, self.num_classes, self.class_names)
            if sentence is not None:
                rank_zero_info(sentence)

    def reference_images(self) -> Iterator[Tensor]:
        """The real pictures that generated ones are compared with: batches (B, C, H, W) uint8 in a fixed order."""
        for batch in self._batches_of(self.reference):
            yield torch.stack([item.pixels for item in batch])

    def reference_identity(self) -> str:
        """Digest of the reference pictures."""
        return self.images_identity(self.reference)

    def labelled_images(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """Training or held-out pictures in batches (B, C, H, W) uint8 and their classes (B,) int64, in a fixed order.

        Raises:
            ConfigError: If no pictures are held out.
            DataError: If the pictures have captions instead of classes.
        """
        for batch in self._batches_of(split):
            labels = [item.label for item in batch if not isinstance(item.label, str)]
            if len(labels) < len(batch):
                raise DataError(f"{self._targets_of(split).describe(batch[0].source_index)} has no class label.")
            yield torch.stack([item.pixels for item in batch]), torch.tensor(labels)

    def examples_of(self, subject: str, count: int, skip: int = 0) -> Tensor:
        """Training pictures of a class or caption, (at most ``count``, C, H, W) uint8, after the first ``skip``."""
        subjects = self.target.subjects or []
        found = [index for index, name in enumerate(subjects) if name == subject][skip : skip + count]
        side = self.target.image_size
        return self.target.uint8(found) if found else torch.zeros(0, self.channels, side, side, dtype=torch.uint8)

    def images_identity(self, split: Split) -> str:
        """Digest of the training or held-out pictures."""
        return self._targets_of(split).identity()

    @property
    def num_control_examples(self) -> int:
        """Number of held-out pictures for controls; 0 without ``val_target``."""
        return len(self.val_target) if self.val_target is not None else 0

    def control_examples(self, indices: Sequence[int]) -> tuple[Any, ...]:
        """Held-out pictures (B, C, H, W) uint8 at the indices, their captions and, if they have some, control maps."""
        return self._targets_of("val").captioned(indices)

    def _targets_of(self, split: Split) -> ImageTargets:
        if split == "train":
            return self.target
        if self.val_target is None:
            raise ConfigError(
                "There are no held-out pictures to compare generated ones with. Set val_target of the data, or "
                "reference: train for FID against the training pictures."
            )
        return self.val_target

    def _batches_of(self, split: Split) -> Iterator[list[TargetItem]]:
        targets, size = self._targets_of(split), self.build_batch_size or BATCH_SIZE
        for start in range(0, len(targets), size):
            yield [targets.read(index) for index in range(start, min(len(targets), start + size))]


def check_depth(targets: ImageTargets) -> None:
    """Check a few 16-bit pictures: if no value is large, they use fewer bits and would be nearly black.

    Raises:
        DataError: If all of them have values of 14 bits or fewer.
    """
    largest, count = 0, 0
    for index in np.unique(np.linspace(0, len(targets) - 1, _DEPTH_SAMPLES).astype(int)).tolist():
        try:
            found = largest_value(targets.source[index][0])
        except Exception:  # reported on reading, by the policy on damaged pictures
            continue
        if found is None:
            return
        largest, count = max(largest, found), count + 1
    bits = largest.bit_length()
    if count and bits <= MOST_WRONG_BITS:
        raise DataError(
            f"{targets.describe(0)} and others are 16-bit pictures with values up to {largest:,} of 65,535: they hold "
            f"{max(bits, 8)} bits and would be trained on as nearly black. Multiply their values by "
            f"{2 ** (16 - max(bits, 8))}, or save them with 8 bits."
        )


def _has_maps(targets: ImageTargets) -> bool | None:
    """Whether the first picture comes with a control map; ``None`` if it cannot be read."""
    try:
        return len(targets.source[0]) > 2
    except Exception:  # reported on reading, by the policy on damaged pictures
        return None


class LabelledTargets:
    """Reads pictures or cached latents, and refuses labels outside the label table; ``where`` names picture i."""

    def __init__(self, read: ReadTarget, num_classes: int | None, where: Callable[[int], str]) -> None:
        self.read, self.num_classes, self.where = read, num_classes, where

    def __call__(self, indices: list[int], flips: list[bool]) -> TargetBatch:
        """Target samples (B, ...) at the indices."""
        batch = self.read(indices, flips)
        if self.num_classes is None:
            return batch
        if "class_labels" not in batch:
            raise DataError(
                f"{self.where(indices[0])} has a caption, but num_classes = {self.num_classes} asks for class labels. "
                "Leave num_classes out for a model of text; a class-conditional model needs (image, label)."
            )
        check_labels(batch["class_labels"], self.num_classes, lambda i: self.where(indices[i]))
        return batch


def check_labels(
    labels: Tensor | Sequence[int] | npt.NDArray[np.integer[Any]], num_classes: int, where: Callable[[int], str]
) -> None:
    """Refuse labels (N,) below 0 or above ``num_classes - 1``; the error names the first one by ``where``.

    Example:
        >>> check_labels([0, 1, 2], 3, "image {}".format)
        >>> check_labels([0, 3], 3, "image {}".format)
        Traceback (most recent call last):
        lightning_difftune.errors.DataError: label 3 of image 1 is outside the label table, whose 3 classes are 0..2 ...
    """
    values = np.asarray(labels, dtype=np.int64)
    outside = np.flatnonzero((values < 0) | (values >= num_classes))
    if not len(outside):
        return
    first = int(outside[0])
    fix = (
        f"set the number of classes to at least {int(values.max()) + 1}"
        if values.min() >= 0
        else "give every picture a label from 0"
    )
    raise DataError(
        f"label {int(values[first])} of {where(first)} is outside the label table, whose {num_classes} classes are "
        f"0..{num_classes - 1} ({len(outside)} of {len(values)} labels are outside); {fix}, or correct the labels."
    )


def describe_shared(target: Any, held_out: Any) -> str | None:
    """A warning of files that are in both sources; ``None`` if there are none, or all are, as in a run on one batch."""
    ours, theirs = ({os.path.abspath(path) for path in paths_of(source) or ()} for source in (target, held_out))
    shared = ours & theirs
    if not shared or ours == theirs:
        return None
    return (
        f"{len(shared):,} of {len(theirs):,} held-out pictures are training pictures, too, such as {min(shared)}: "
        "losses and distances on them do not show what is learned by heart. Parts of a Partition are disjoint if all "
        "have the same sizes, in the same order, and the same seed."
    )


def describe_small_classes(labels: Tensor, num_classes: int, names: Sequence[str] | None = None) -> str | None:
    """A warning about classes with few of the labels (N,), the smallest first; ``None`` if all have enough.

    Example:
        >>> describe_small_classes(torch.tensor([0] * 12 + [1] * 3), 2, ["ant", "bee"])
        '1 of 2 classes has fewer than 10 pictures, which is little to learn a class from: bee 3. ...'
        >>> describe_small_classes(torch.zeros(10, dtype=torch.int64), 1) is None
        True
    """
    counts: list[int] = torch.bincount(labels, minlength=num_classes).tolist()
    small = sorted((label for label, count in enumerate(counts) if count < FEW_PICTURES), key=counts.__getitem__)
    if not small:
        return None
    counted = [f"{name_of_class(label, names)} {counts[label]}" for label in small if counts[label]]
    return (
        f"{len(small)} of {len(counts)} classes {'has' if len(small) == 1 else 'have'} fewer than {FEW_PICTURES} "
        f"pictures, which is little to learn a class from: {shorten(counted, 4) or 'all of them none'}. Samples of "
        "these will repeat what there is; add pictures, or merge classes."
    )
