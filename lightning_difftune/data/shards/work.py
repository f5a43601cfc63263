"""How the building of a folder is dealt out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from torch import Tensor


class ShardBatch(TypedDict):
    """Samples to generate together, all of one shard."""

    shard: int
    indices: Tensor  # (B,) int64, consecutive


class ShardWork(Sequence[ShardBatch]):
    """The batches that one rank still has to generate, in order.

    A class of its own because Lightning would take a plain list for several dataloaders.

    Args:
        batches: What is left to do.
        num_done: Samples of this rank that were finished before.
    """

    def __init__(self, batches: Sequence[ShardBatch], num_done: int) -> None:
        self._batches = batches
        self.num_done = num_done

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, position: Any) -> Any:
        """A batch, or a list of them for a slice."""
        return self._batches[position]
