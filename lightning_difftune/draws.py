"""Random numbers that depend on a seed and an index alone: not on the number of processes, nor on what ran before."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def seed_of(*key: int) -> int:
    """Mix non-negative integers into one 63-bit seed; nearby keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Draws:
    """The random numbers of one training step.

    Every method draws for the global batch and returns this process's share: sample j of rank r is sample
    ``j * world_size + r`` of the global batch. So a step sees the same numbers on one process or on many, and a
    resumed run sees the numbers that it would have seen.

    Args:
        seed: Seed of the run.
        step: Index of the batch since the start of training.
        device: Where the numbers are drawn and returned.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self, seed: int, step: int, device: torch.device | str = "cpu", rank: int = 0, world_size: int = 1
    ) -> None:
        self.generator = torch.Generator(device).manual_seed(seed_of(seed, step))
        self.rank, self.world_size = rank, world_size

    def uniform(self, size: int) -> Tensor:
        """(size,) float32 in [0, 1)."""
        device = self.generator.device
        full = torch.rand(size * self.world_size, generator=self.generator, device=device)
        return full[self.rank :: self.world_size].contiguous()

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 of the given shape, batch first."""
        size, *rest = shape
        full = torch.randn(size * self.world_size, *rest, generator=self.generator, device=self.generator.device)
        return full[self.rank :: self.world_size].contiguous()


def noise_of(seed: int, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Start noise (B, *shape) on the CPU for sample indices (B,); row i depends on (seed, indices[i]) alone."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(seed, 0, i))) for i in indices.tolist()]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def uniform_of(seed: int, indices: Tensor) -> Tensor:
    """Numbers (B,) float32 in [0, 1] on the CPU; entry i depends on (seed, indices[i]) alone."""
    return torch.tensor([seed_of(seed, 2, i) / 2**63 for i in indices.tolist()], dtype=torch.float32)


def labels_of(seed: int, indices: Tensor, num_classes: int) -> Tensor:
    """Class labels (B,) int64, uniform over the classes; row i depends on (seed, indices[i]) alone."""
    return torch.tensor([seed_of(seed, 1, i) % num_classes for i in indices.tolist()], dtype=torch.int64)


def choice_of(seed: int, index: int, count: int) -> int:
    """One of 0 .. count - 1 for sample ``index``, uniform; depends on (seed, index) alone.

    Example:
        >>> [choice_of(0, index, 5) for index in range(8)]
        [1, 0, 2, 4, 0, 2, 2, 4]
    """
    return seed_of(seed, 2, index) % count
