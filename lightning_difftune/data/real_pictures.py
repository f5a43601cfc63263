"""What a data module shows of its own pictures to those who compare generated ones with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_difftune.data.building import BATCH_SIZE
from lightning_difftune.data.images import ImageTargets, TargetItem
from lightning_difftune.errors import ConfigError, DataError


class RealPictures:
    """Training and held-out pictures, always in the same order and never mirrored.

    Attributes:
        target: The training pictures.
        val_target: Those held out, if there are any.
        reference: Which of the two FID compares with.
        build_batch_size: Pictures in a batch; ``None`` where that was left open.
    """

    target: ImageTargets
    val_target: ImageTargets | None
    reference: Literal["val", "train"]
    build_batch_size: int | None

    def reference_images(self) -> Iterator[Tensor]:
        """The real pictures that generated ones are compared with: batches (B, C, H, W) uint8 in a fixed order."""
        for batch in self._batches_of(self.reference):
            yield torch.stack([item.pixels for item in batch])

    def reference_identity(self) -> str:
        """Digest of the reference pictures."""
        return self.images_identity(self.reference)

    def labelled_images(self, split: Literal["train", "val"]) -> Iterator[tuple[Tensor, Tensor]]:
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

    def images_identity(self, split: Literal["train", "val"]) -> str:
        """Digest of the training or held-out pictures.

        Raises:
            ConfigError: If no pictures are held out.
        """
        return self._targets_of(split).identity()

    @property
    def num_control_examples(self) -> int:
        """Held-out pictures that controls can be taken from; 0 without ``val_target``."""
        return len(self.val_target) if self.val_target is not None else 0

    def control_examples(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Held-out pictures (B, C, H, W) uint8 at the indices, and their captions."""
        return self._targets_of("val").captioned(indices)

    def _targets_of(self, split: Literal["train", "val"]) -> ImageTargets:
        if split == "train":
            return self.target
        if self.val_target is None:
            raise ConfigError(
                "There are no held-out pictures to compare generated ones with. Set val_target of the data, or "
                "reference: train for FID against the training pictures."
            )
        return self.val_target

    def _batches_of(self, split: Literal["train", "val"]) -> Iterator[list[TargetItem]]:
        targets, size = self._targets_of(split), self.build_batch_size or BATCH_SIZE
        for start in range(0, len(targets), size):
            yield [targets.read(index) for index in range(start, min(len(targets), start + size))]
