"""Both streams of a run as one data set of whole batches: batch k depends only on (seed, k) and the rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightning_difftune.draws import seed_of
from lightning_difftune.errors import ConfigError
from lightning_difftune.protocols import DiffTuningBatch, RetentionBatch, TargetBatch
from lightning_difftune.trainers import common_window

FEWEST_EVALUATION_BATCHES = 64
ReadTarget = Callable[[list[int], list[bool]], TargetBatch]
ReadRetention = Callable[[Tensor], RetentionBatch]


class ShuffledStream:
    """An endless shuffled pass over N samples, cut into global batches that the ranks share.

    Global batch k holds positions [k*B*W, (k+1)*B*W) of the concatenated shuffles, so no sample is dropped at the end
    of a pass. Rank r takes every W-th of them, starting at r; together the ranks read what one process would.

    Args:
        num_samples: N.
        batch_size: B, samples per rank and step.
        seed: Seed of the shuffles.
        rank: Rank of this process, r.
        world_size: Number of processes, W.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._shuffle = lru_cache(maxsize=2)(self._shuffle_of_pass)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Pickle without the cached shuffles, for data loader workers."""
        return type(self), (self.num_samples, self.batch_size, self.seed, self.rank, self.world_size)

    def _shuffle_of_pass(self, number: int) -> npt.NDArray[np.int64]:
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, number))
        return torch.randperm(self.num_samples, generator=generator).numpy()

    def indices(self, step: int) -> list[int]:
        """The B sample indices of this rank at one step."""
        first = step * self.batch_size * self.world_size + self.rank
        positions = range(first, first + self.batch_size * self.world_size, self.world_size)
        return [self.sample_at(p) for p in positions]

    def sample_at(self, position: int) -> int:
        """The sample at one position of the stream."""
        return int(self._shuffle(position // self.num_samples)[position % self.num_samples])

    def coins(self, step: int) -> list[bool]:
        """B fair coin tosses of this rank at one step."""
        generator = torch.Generator().manual_seed(seed_of("mirrored", self.seed, step))
        tosses = torch.rand(self.batch_size * self.world_size, generator=generator) < 0.5
        return tosses[self.rank :: self.world_size].tolist()


class BalancedStream(ShuffledStream):
    """An endless class-balanced pass for long-tailed data: each class comes equally often.

    The stream passes through all classes in shuffled order, then again in another order; class c yields the next sample
    of its own shuffled passes each time. So a class of one picture is shown as often as one of a thousand, no picture
    repeats before the others of its class, and global batch k still depends only on (seed, k).

    Args:
        labels: Classes (N,) int64 of the samples; classes without samples are skipped. The others are the base's.

    Example:
        >>> stream = BalancedStream(np.array([0, 0, 0, 0, 0, 0, 7]), batch_size=4, seed=0)
        >>> sorted(int(stream.labels[i]) for i in stream.indices(0))
        [0, 0, 7, 7]
    """

    def __init__(
        self, labels: npt.NDArray[np.int64], batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(len(labels), batch_size, seed, rank, world_size)
        self.labels = labels
        classes = np.unique(labels)
        self._members = [np.flatnonzero(labels == label) for label in classes]
        self._order = lru_cache(maxsize=2)(self._order_of_pass)
        self._turns = lru_cache(maxsize=2 * len(classes))(self._turns_of_class)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Pickle without the cached shuffles, for data loader workers."""
        return type(self), (self.labels, self.batch_size, self.seed, self.rank, self.world_size)

    def _order_of_pass(self, number: int) -> npt.NDArray[np.int64]:
        generator = torch.Generator().manual_seed(seed_of("classes", self.seed, number))
        return torch.randperm(len(self._members), generator=generator).numpy()

    def _turns_of_class(self, position: int, number: int) -> npt.NDArray[np.int64]:
        generator = torch.Generator().manual_seed(seed_of("order of a class", self.seed, number, position))
        members = self._members[position]
        return members[torch.randperm(len(members), generator=generator).numpy()]

    def sample_at(self, position: int) -> int:
        """The sample at one position of the stream."""
        turn, place = divmod(position, len(self._members))
        chosen = int(self._order(turn)[place])  # once in each pass, so this is its turn number `turn`
        number, within = divmod(turn, len(self._members[chosen]))
        return int(self._turns(chosen, number)[within])


class TrainingBatches(Dataset[DiffTuningBatch]):
    """Item k is the whole batch of step k: ``{"target": ..., "retention": ...}``.

    Args:
        read_target: Reads target samples by indices and flips.
        target: The target's order.
        read_retention: Reads samples of the memory bank by indices; ``None`` omits that stream.
        retention: The bank's order.
        horizontal_flip: Whether half of the target samples are mirrored.
    """

    def __init__(
        self,
        read_target: ReadTarget,
        target: ShuffledStream,
        read_retention: ReadRetention | None = None,
        retention: ShuffledStream | None = None,
        horizontal_flip: bool = False,
    ) -> None:
        self.read_target, self.target = read_target, target
        self.read_retention, self.retention = read_retention, retention
        self.horizontal_flip = horizontal_flip

    def __len__(self) -> int:
        """Steps in one pass over the target, at least 1."""
        return max(1, self.target.num_samples // (self.target.batch_size * self.target.world_size))

    def __getitem__(self, step: int) -> DiffTuningBatch:
        flips = self.target.coins(step) if self.horizontal_flip else [False] * self.target.batch_size
        batch: DiffTuningBatch = {"target": self.read_target(self.target.indices(step), flips)}
        if self.read_retention is not None and self.retention is not None:
            batch["retention"] = self.read_retention(torch.tensor(self.retention.indices(step)))
        return batch


def evaluation_batch_size(num_samples: int, largest: int) -> int:
    """Samples per batch of held-out ones, independent of training and of the number of processes.

    So the loss is the same on one GPU and on eight: a process without a batch would leave validation while the others
    wait for it.
    """
    return max(1, min(largest, num_samples // FEWEST_EVALUATION_BATCHES))


class EvaluationBatches(Dataset[DiffTuningBatch]):
    """Item k is the k-th batch of held-out target samples, in order; the last one may be shorter."""

    def __init__(self, read_target: ReadTarget, num_samples: int, batch_size: int) -> None:
        self.read_target, self.num_samples, self.batch_size = read_target, num_samples, batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(self.num_samples / self.batch_size)

    def __getitem__(self, step: int) -> DiffTuningBatch:
        indices = list(range(step * self.batch_size, min(self.num_samples, (step + 1) * self.batch_size)))
        return {"target": self.read_target(indices, [False] * len(indices))}


class TrainingSteps(DistributedSampler[DiffTuningBatch]):
    """Step numbers that continue across epochs and start at the step of a resumed run, also within an epoch.

    Every process takes every step, each with its share of the batch. It is a ``DistributedSampler`` so that Lightning
    does not replace it; the epoch's number, which Lightning sets differently after a resume, is not used. The stream
    is endless. An epoch is one pass over the target, rounded up to whole accumulation windows, since Lightning would
    cut the last window short.

    Args:
        batches: The batches of one rank.
        progress: Returns the run's number of batches so far, in total and in this epoch. Without it, as outside a
            trainer, ``set_epoch`` sets the start of an iteration.
        window: Batches whose gradients are accumulated.
    """

    def __init__(
        self, batches: TrainingBatches, progress: Callable[[], tuple[int, int]] | None = None, window: int = 1
    ) -> None:
        super().__init__(batches, num_replicas=1, rank=0, shuffle=False)
        self.num_steps, self.progress = math.ceil(len(batches) / window) * window, progress

    @classmethod
    def in_trainer(cls, batches: TrainingBatches, trainer: Any) -> TrainingSteps:
        """The steps from a trainer's position in the stream; epochs are whole accumulation windows.

        Raises:
            ConfigError: If ``limit_train_batches`` would cut a window short.
        """
        if trainer is None:
            return cls(batches)
        window, limit = common_window(trainer), trainer.limit_train_batches
        count = limit if isinstance(limit, int) else int(limit * len(cls(batches, window=window)))
        if count % window and not trainer.fast_dev_run:
            shown = f"{limit}, {count} batches" if count != limit else str(limit)
            name = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"
            raise ConfigError(
                f"trainer.{name} is {shown}, which cuts a window of {window} accumulated batches short. "
                f"Set it to a number that is a multiple of {window}."
            )
        progress = trainer.fit_loop.epoch_loop.batch_progress
        steps = cls(batches, lambda: (progress.total.ready, progress.current.ready), window)
        if progress.current.ready > len(steps):
            # The epochs were longer before this resume: a new one begins here, at the same position in the stream.
            current: Any = progress.current
            current.completed -= current.ready
            current.ready = current.started = current.processed = 0
        return steps

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]  # a step number, not a sample
        first, in_epoch = self.progress() if self.progress is not None else (self.epoch * self.num_steps, 0)
        left = self.num_steps - in_epoch % self.num_steps  # a resume at the very end of an epoch begins the next
        return iter(range(first, first + left))

    def __len__(self) -> int:
        return self.num_steps


def retained_samples(share: float, batch_size: int) -> int:
    """Bank samples in a batch, ``int(share * batch_size)`` as in the authors' code, without errors of rounding.

    Example:
        >>> retained_samples(0.2, 32), retained_samples(0.29, 100), int(0.29 * 100)
        (6, 29, 28)
    """
    return int(round(share * batch_size, 9))


def changed_batches(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two states of a data module that changes the batches of all processes together."""
    whole = ("batch_size", "processes")
    same_whole = math.prod(was.get(key, 1) for key in whole) == math.prod(now.get(key, 1) for key in whole)
    left_out = ("content", "held_out", *(whole if same_whole else ()))
    keys = [key for key in was if key in now and key not in left_out]
    changed = [f"{key} {was[key]} -> {now[key]}" for key in keys if was[key] != now[key]]
    content = {state.get("content") for state in (was, now)}
    if None not in content and len(content) > 1:
        changed.append("the target's pictures (their files' names, sizes or times), labels or captions")
    return changed


def changed_held_out(was: tuple[int, str | None] | None, now: tuple[int, str | None] | None) -> str | None:
    """A warning of other held-out pictures, by number and content, if known; ``None`` if none were or are held out."""
    if not was or not now or (was[0] == now[0] and (None in (was[1], now[1]) or was[1] == now[1])):
        return None
    how = f"{was[0]:,} before, {now[0]:,} now" if was[0] != now[0] else "their files' names, sizes or times, or labels"
    return (
        f"The held-out pictures changed since the checkpoint ({how}): val/loss, distances and the best value so far, "
        "by which ModelCheckpoint and EarlyStopping decide, were measured on others. Keep the run's val_target, or "
        "start a new run to compare."
    )


def describe_no_retention(share: float, batch_size: int) -> str:
    """The message about a share that leaves a batch without a bank sample."""
    return (
        f"A retention_share of {share} leaves int({share} * {batch_size}) = 0 bank samples in a batch of {batch_size}. "
        "Raise one of them, or set bank: null for plain fine-tuning."
    )
