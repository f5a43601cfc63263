"""The memory bank: samples of the pre-trained model that retention replays (the augmented dataset of Algorithm 1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_difftune.data.shards import ShardBatch, ShardReader, ShardWork, ShardWriter, build
from lightning_difftune.errors import ConfigError, StoreError
from lightning_difftune.protocols import BankGenerator, RetentionBatch

KIND = "memory-bank"
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class MemoryBank:
    """A finished memory bank, opened read-only; cheap to open, to pickle and to read from.

    Sample i is an ``x0`` drawn from the pre-trained model with its own seed. Opening checks the manifest and every
    shard's size and header; :meth:`verify` reads every byte.

    Args:
        path: The folder.

    Raises:
        StoreError: There is no finished bank, or it is damaged; the message names the file and the cure.

    Example:
        >>> class Constant:
        ...     def bank_spec(self):
        ...         return {"seed": 0}
        ...     def generate_bank(self, indices):
        ...         return {"latents": indices.view(-1, 1, 1, 1).expand(-1, 4, 8, 8).float()}
        >>> bank = MemoryBank.build(getfixture("tmp_path") / "bank", Constant(), 100)
        >>> bank.read(torch.tensor([7, 3]))["latents"][:, 0, 0, 0]
        tensor([7., 3.])
    """

    def __init__(self, path: str | Path) -> None:
        self._reader = ShardReader(path, kind=KIND)
        if self._reader.dtypes.get("latents") not in _DTYPES.values():
            raise StoreError(
                f"{self.path} holds {', '.join(sorted(self._reader.shapes))}; a memory bank holds latents."
            )

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
    ) -> MemoryBank:
        """Open a bank, after generating what is still missing of it.

        A finished bank of the same generator and settings is opened as it is, an interrupted one is gone on with.

        Args:
            path: The folder.
            generator: The pre-trained model.
            num_samples: Samples in the bank (5K to 200K in Fig. 6d).
            batch_size: Most samples generated together.
            shard_size: Samples in a shard. A killed run loses at most two shards on each rank: the one that is
                written and the one that is made.
            dtype: How latents, and other columns of floating-point numbers, are stored.
            rank: This process.
            world_size: Number of processes; all must call this.
            barrier: Waits for all processes.
            progress: Called with the samples that this rank has done, and has to do in all.

        Raises:
            StoreError: The folder was made by another model or other settings, is damaged, or the disk is full.
            ConfigError: A size below 1 or an unknown dtype.
        """
        writer = cls.writer(path, generator.bank_spec(), num_samples, shard_size=shard_size, dtype=dtype)

        def generate(indices: Tensor) -> dict[str, Tensor]:
            return _as_stored(writer, generator.generate_bank(indices))

        build(writer, generate, batch_size, rank=rank, world_size=world_size, barrier=barrier, progress=progress)
        return cls(path)

    @staticmethod
    def writer(
        path: str | Path,
        bank_spec: dict[str, Any],
        num_samples: int,
        *,
        shard_size: int = 1024,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> ShardWriter:
        """The writer of a bank, for :func:`bank_work` and :class:`MemoryBankWriter`; see :meth:`build`."""
        if dtype not in _DTYPES:
            raise ConfigError(f"A memory bank's dtype is one of {', '.join(_DTYPES)}, got {dtype!r}.")
        spec = {**bank_spec, "dtype": dtype}
        return ShardWriter(path, kind=KIND, spec=spec, num_samples=num_samples, shard_size=shard_size)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._reader.path

    @property
    def spec(self) -> dict[str, Any]:
        """What decided the bank's bytes: the generator's ``bank_spec()`` and the stored dtype."""
        return self._reader.spec

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, h, w) of one sample."""
        return self._reader.shapes["latents"]

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, indices: Tensor) -> RetentionBatch:
        """Read samples, in any order and with repeats.

        Args:
            indices: (B,) int64 in [0, len(self)).

        Returns:
            ``latents`` (B, c, h, w) and whatever else the bank's generator made, (B, ...) each, float32 where they are
            floating-point numbers.

        Raises:
            IndexError: An index lies outside the bank.
        """
        tensors = self._reader.read(indices)
        return cast("RetentionBatch", {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()})

    def verify(self) -> None:
        """Read every byte and compare the hashes.

        Raises:
            StoreError: A shard was altered.
        """
        self._reader.verify()

    def require(self, spec: dict[str, Any]) -> None:
        """Make sure that the bank is what ``spec`` would make; see :attr:`spec`.

        Raises:
            StoreError: It is not; the message names the keys that differ.
        """
        self._reader.require(spec)

    def require_shape(self, shape: Sequence[int]) -> None:
        """Make sure that a model which denoises samples of ``shape`` (c, h, w) can train on the bank.

        Raises:
            StoreError: It cannot; the message names both shapes.
        """
        if tuple(shape) != self.latent_shape:
            raise StoreError(
                f"{self.path} is a bank of another shape: its samples are {self.latent_shape}, but the model denoises "
                f"{tuple(shape)}. Build a bank with the model that is fine-tuned, in a folder of its own."
            )


def bank_work(writer: ShardWriter, batch_size: int, rank: int = 0, world_size: int = 1) -> ShardWork:
    """What one rank's ``predict_dataloader`` returns to fill a bank: ``{"shard": int, "indices": (B,) int64}``.

    Return it as it is: Lightning deals out the items of a ``DataLoader`` a second time. If a rank may have nothing left
    to do, set ``allow_zero_length_dataloader_with_multiple_devices`` on the data module.
    """
    return writer.work(batch_size, rank, world_size)


class MemoryBankWriter(BasePredictionWriter):
    """Writes what ``predict_step`` makes of the batches of :func:`bank_work`, and finishes the bank.

    ``predict_step`` returns what :meth:`BankGenerator.generate_bank` does for ``batch["indices"]``. Call
    ``trainer.predict(..., return_predictions=False)``, or Lightning keeps the whole bank in memory as well.

    Args:
        writer: The bank's, from :meth:`MemoryBank.writer`.
    """

    def __init__(self, writer: ShardWriter) -> None:
        super().__init__("batch")
        self.writer = writer

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep Lightning from warning that it cannot tell a batch's samples: ours name theirs."""
        warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: dict[str, Tensor],
        batch_indices: Sequence[int] | None,
        batch: ShardBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Take the samples; a shard is written when they are its last."""
        self.writer.add(batch, _as_stored(self.writer, prediction))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finish the bank when all ranks are done.

        Not in ``on_predict_end``, which Lightning skips on ranks that had nothing left to do; never after an error.
        """
        if stage == "predict":
            self.writer.flush()
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                self.writer.finish()
            trainer.strategy.barrier()
            self.writer.unlock()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let another job go on."""
        self.writer.unlock()


def _as_stored(writer: ShardWriter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {name: tensor.dtype for name, tensor in tensors.items()}
    if "latents" not in made or not made["latents"].is_floating_point:
        raise StoreError(f"A memory bank holds floating-point latents, but the generator made {made or 'nothing'}.")
    dtype = _DTYPES[writer.plan.spec["dtype"]]
    return {name: x.detach().cpu().to(dtype if x.is_floating_point() else x.dtype) for name, x in tensors.items()}
