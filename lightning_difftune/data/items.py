"""One picture of the target with what belongs to it, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_difftune.errors import DataError
from lightning_difftune.pictures import to_pixel_values
from lightning_difftune.protocols import TargetBatch


class TargetItem(NamedTuple):
    """One picture of the target domain."""

    pixels: Tensor  # (C, H, W) uint8
    label: int | str  # class index or caption
    source_index: int  # the picture that was read: another one if the requested one is damaged and skipped
    control: Tensor | None = None  # (1 or 3, H, W) uint8, if the source has control maps


def controls_of(items: Sequence[TargetItem]) -> list[Tensor]:
    """The control maps of all items, all in colour if some are; empty if none has one.

    Raises:
        DataError: Only some have one.
    """
    controls = [item.control for item in items if item.control is not None]
    if len(controls) not in (0, len(items)):
        raise DataError("some pictures of the data set have a control map and others do not.")
    channels = max(map(len, controls), default=1)
    return [control.expand(channels, -1, -1) for control in controls]


def as_batch(items: Sequence[TargetItem], flips: Sequence[bool]) -> TargetBatch:
    """Items as one batch; those with a flip are mirrored, left to right.

    Raises:
        DataError: Some items have a caption and others do not; or as :func:`controls_of`.
    """
    batch: TargetBatch = {"pixel_values": to_pixel_values(_stack([item.pixels for item in items], flips))}
    captions = [item.label for item in items if isinstance(item.label, str)]
    controls = controls_of(items)
    if len(captions) not in (0, len(items)):
        raise DataError("some pictures of the data set have a caption and others do not.")
    if captions:
        batch["captions"] = captions
    else:
        batch["class_labels"] = torch.tensor([item.label for item in items], dtype=torch.int64)
    if controls:
        batch["conditioning_pixel_values"] = _stack(controls, flips)
    return batch


def mirror(batch: TargetBatch) -> TargetBatch:
    """A batch of pictures, and of their control maps, mirrored left to right."""
    mirrored = batch.copy()
    mirrored["pixel_values"] = batch["pixel_values"].flip(-1)
    if "conditioning_pixel_values" in batch:
        mirrored["conditioning_pixel_values"] = batch["conditioning_pixel_values"].flip(-1)
    return mirrored


def _stack(pictures: Sequence[Tensor], flips: Sequence[bool]) -> Tensor:
    return torch.stack([pixels.flip(-1) if flip else pixels for pixels, flip in zip(pictures, flips, strict=True)])
