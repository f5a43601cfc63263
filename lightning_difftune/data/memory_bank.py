"""The memory bank: samples of the pre-trained model that retention replays (the augmented dataset of Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from lightning_difftune.data.shards import FLOATS, ShardReader, ShardWriter, as_stored, build
from lightning_difftune.errors import StoreError, check_choice
from lightning_difftune.protocols import BankGenerator, RetentionBatch

KIND = "memory-bank"


class MemoryBank(ShardReader):
    """A finished memory bank, opened read-only; cheap to open, pickle and read.

    Sample i is an ``x0`` drawn from the pre-trained model with its own seed. Opening checks the manifest and every
    shard's size and header; :meth:`verify` reads every byte. ``spec`` is the generator's ``bank_spec()`` with the
    stored dtype.

    Args:
        path: The folder.
        num_samples: Number of samples to use, the first ones; ``None`` is all.

    Raises:
        StoreError: There is no finished bank, it is damaged, or it has fewer samples; the message names the file and
            the remedy.

    Example:
        >>> import torch
        >>> class Constant:
        ...     def bank_spec(self):
        ...         return {"seed": 0}
        ...     def generate_bank(self, indices):
        ...         return {"latents": indices.view(-1, 1, 1, 1).expand(-1, 4, 8, 8).float()}
        >>> bank = MemoryBank.build(getfixture("tmp_path") / "bank", Constant(), 100)
        >>> bank.read(torch.tensor([7, 3]))["latents"][:, 0, 0, 0]
        tensor([7., 3.])
    """

    def __init__(self, path: str | Path, num_samples: int | None = None) -> None:
        super().__init__(path, kind=KIND)
        self._num_samples = self.plan.num_samples if num_samples is None else num_samples
        if self._num_samples > self.plan.num_samples:
            raise StoreError(
                f"{self.path} has {self.plan.num_samples:,} samples, fewer than the {self._num_samples:,} that are "
                "needed. Use fewer, or let a Diff-Tuning module build the rest."
            )
        if self.dtypes.get("latents") not in FLOATS.values():
            raise StoreError(f"{self.path} holds {', '.join(sorted(self.shapes))}; a memory bank holds latents.")

    @classmethod
    def build(
        cls,
        path: str | Path,
        generator: BankGenerator,
        num_samples: int,
        *,
        batch_size: int = 64,
        shard_size: int = 1024,
        dtype: Literal["float32", "float16"] = "float32",
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
        progress: Callable[[int, int], None] | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> MemoryBank:
        """Open a bank, after generating its missing samples.

        Sample i depends only on the generator and i, so a smaller bank of the same generator and settings is extended,
        an interrupted build is resumed, and the first samples of a larger bank are used.

        Args:
            path: The folder.
            generator: The pre-trained model.
            num_samples: Samples in the bank (5K to 200K in Fig. 6d).
            batch_size: Largest number of samples generated together.
            shard_size: Samples per shard; a killed run loses at most two shards per rank.
            dtype: Type of stored latents and other floating-point columns.
            rank: Rank of this process.
            world_size: Number of processes; all must call this.
            barrier: Waits for all processes.
            progress: Called with this rank's number of finished samples, and its total.
            context: Context manager for generating, such as a trainer's precision.

        Raises:
            StoreError: The folder belongs to another model or other settings, is damaged, or the disk is full.
            ConfigError: A size below 1 or an unknown dtype.
        """
        check_choice("MemoryBank", "dtype", dtype, *FLOATS)
        spec = {**generator.bank_spec(), "dtype": dtype}
        writer = ShardWriter(path, kind=KIND, spec=spec, num_samples=num_samples, shard_size=shard_size)

        def generate(batches: list[Tensor]) -> Iterator[dict[str, Tensor]]:
            for indices in batches:
                with context():
                    made = generator.generate_bank(indices)
                check_latents(made)
                yield as_stored(made, dtype)

        build(writer, generate, batch_size, rank=rank, world_size=world_size, barrier=barrier, progress=progress)
        return cls(path, num_samples)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, h, w) of one sample."""
        return self.shapes["latents"]

    def __len__(self) -> int:
        return self._num_samples

    def read(self, indices: Tensor) -> RetentionBatch:
        """Read samples, in any order and with repeats.

        Args:
            indices: (B,) int64 in [0, len(self)).

        Returns:
            ``latents`` (B, c, h, w) and the generator's other columns, (B, ...) each, floating-point ones as float32.

        Raises:
            IndexError: An index is outside the bank.
        """
        tensors = self.rows(indices)
        return cast("RetentionBatch", {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()})


def check_latents(tensors: dict[str, Tensor]) -> None:
    """Refuse what a generator made if it has no floating-point latents."""
    made = {name: tensor.dtype for name, tensor in tensors.items()}
    if "latents" not in made or not made["latents"].is_floating_point:
        raise StoreError(f"A memory bank holds floating-point latents, but the generator made {made or 'nothing'}.")
