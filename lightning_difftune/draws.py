"""Random numbers that depend only on a seed and an index, not on the number of processes or on earlier draws."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import Any

import torch
from torch import Tensor

VERSION = 2
"""Of the numbers below. Memory banks state it, since samples of another version are other samples."""


@torch.compiler.disable
def seed_of(stream: str, *key: int) -> int:
    """Mix the name of a stream and integers into one 63-bit seed; nearby keys give unrelated seeds.

    The name separates draws for different purposes: no two streams share a seed, whatever their keys.

    Example:
        >>> len({seed_of("noise", 7), seed_of("noise", 7, 0), seed_of("labels", 7), seed_of("labels", 7, 0)})
        4
    """
    numbers = (int(index(number)) for number in key)  # those of NumPy are written in other ways
    return int.from_bytes(hashlib.sha256(repr((stream, *numbers)).encode()).digest()[:8], "big") >> 1


@contextmanager
def float32_by_default() -> Iterator[None]:
    """A ``with`` block, or a decorator, in which tensors without a stated type are float32.

    Lightning's bf16-true and 64-true change the default around each step.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def seeded(device: torch.device, stream: str, *key: int) -> Iterator[None]:
    """A ``with`` block whose draws without a generator depend only on a name and integers; later draws do not notice.

    Example:
        >>> with seeded(torch.device("cpu"), "solver", 0, 7):
        ...     first = torch.randn(3)
        >>> with seeded(torch.device("cpu"), "solver", 0, 7):
        ...     torch.equal(torch.randn(3), first)
        True
    """
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        torch.default_generator.manual_seed(seed_of(stream, *key))
        if is_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed_of(stream, *key))
        yield


class Draws:
    """The random numbers of one training step.

    Every method draws for the global batch and returns this process's share: sample j of rank r is sample
    ``j * world_size + r`` of the global batch. So a step sees the same numbers on any number of processes, and a
    resumed run sees the same numbers as an uninterrupted one.

    Args:
        seed: Seed of the run.
        step: Index of the batch since the start of training.
        device: Where the numbers are drawn and returned.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, seed: int, step: int, device: torch.device | str = "cpu", rank: int = 0, world_size: int = 1
    ) -> None:
        self.generator = torch.Generator(device).manual_seed(seed_of("step", seed, step))
        self.rank, self.world_size = rank, world_size

    @torch.compiler.disable
    def uniform(self, size: int) -> Tensor:
        """(size,) float32 in [0, 1)."""
        full = torch.rand(size * self.world_size, **self._like)
        return full[self.rank :: self.world_size].contiguous()

    @torch.compiler.disable
    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 of the given shape, batch first."""
        size, *rest = shape
        full = torch.randn(size * self.world_size, *rest, **self._like)
        return full[self.rank :: self.world_size].contiguous()

    @property
    def _like(self) -> dict[str, Any]:
        # Independent of the default type: bfloat16 would reach only 737 of 1,000 timesteps.
        return {"generator": self.generator, "device": self.generator.device, "dtype": torch.float32}


def noise_of(seed: int, indices: Tensor, shape: tuple[int, ...], stream: str = "start noise") -> Tensor:
    """Normal float32 noise (B, *shape) on the CPU for sample indices (B,); row i depends only on (seed, indices[i]).

    Noise of another ``stream`` is independent of it.
    """
    noise = torch.empty(len(indices), *shape, dtype=torch.float32, device="cpu")
    for row, i in zip(noise, indices.tolist(), strict=True):
        row.normal_(generator=torch.Generator().manual_seed(seed_of(stream, seed, i)))
    return noise


def uniform_of(seed: int, indices: Tensor) -> Tensor:
    """Numbers (B,) float32 in [0, 1] on the CPU; entry i depends only on (seed, indices[i])."""
    values = [seed_of("uniform", seed, i) / 2**63 for i in indices.tolist()]
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def choices_of(seed: int, indices: Tensor, count: int) -> Tensor:
    """Choices (B,) int64 among 0 .. count - 1 on the CPU, uniform; entry i depends only on (seed, indices[i]).

    Example:
        >>> choices_of(0, torch.arange(8), 5).tolist()
        [3, 0, 1, 3, 4, 1, 0, 3]
    """
    return torch.tensor([choice_of(seed, i, count) for i in indices.tolist()], dtype=torch.int64, device="cpu")


def choice_of(seed: int, index: int, count: int) -> int:
    """One of 0 .. count - 1 for sample ``index``, uniform; depends only on (seed, index)."""
    return seed_of("choice", seed, index) % count
