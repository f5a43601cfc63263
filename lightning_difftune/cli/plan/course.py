"""When a run steps and validates, by its config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from jsonargparse import Namespace

from lightning_difftune.data.batches import ShuffledStream, TrainingBatches, TrainingSteps, evaluation_batch_size


@dataclass(frozen=True)
class Course:
    """The course of a run; see ``RunKeeper`` for its last step."""

    window: int  # batches per optimizer step
    steps: int  # optimizer steps; 0 if unknown
    validations: tuple[int, ...] | None  # optimizer steps before each validation; ``None`` if unknown

    @classmethod
    def of(cls, trainer: Namespace, target_batch: int, num_targets: int | None, has_held_out: bool) -> Course:
        """The course of a trainer's config, with ``target_batch`` target samples in a batch on all devices together.

        The number of target pictures is ``None`` if unknown.
        """
        window = trainer.accumulate_grad_batches or 1
        epoch = None if num_targets is None else batches_per_epoch(trainer, target_batch, num_targets, window)
        by_steps = trainer.max_steps if trainer.max_steps is not None and trainer.max_steps > 0 else None
        epochs = trainer.max_epochs or (1000 if by_steps is None else -1)  # as Lightning has it
        by_epochs = epochs * (epoch // window) if epochs > 0 and epoch is not None else None
        steps = min((count for count in (by_steps, by_epochs) if count is not None), default=0)
        if not steps or not has_held_out or trainer.limit_val_batches in (0, 0.0):
            return cls(window, steps, ())
        batches = validated_batches(trainer, steps * window, epoch)
        return cls(window, steps, None if batches is None else tuple(batch // window for batch in batches))

    def times_due(self, every_n_steps: int | None) -> int:
        """At how many validations a callback acts that waits ``every_n_steps`` in between, but not at the last."""
        times, latest = 0, -math.inf
        for number, step in enumerate(self.validations or (), start=1):
            if step >= latest + (every_n_steps or 0) or number == len(self.validations or ()):
                times, latest = times + 1, step
        return times


def batches_per_epoch(trainer: Namespace, target_batch: int, num_targets: int, window: int) -> int:
    """Batches of an epoch, which is a pass over the target in whole windows."""
    stream = ShuffledStream(num_targets, target_batch, seed=0)
    count = len(TrainingSteps(TrainingBatches(cast("Any", None), stream), window=window))
    limit = trainer.limit_train_batches
    return count if limit is None else min(count, limit) if isinstance(limit, int) else int(count * limit)


def validated_batches(trainer: Namespace, total: int, epoch: int | None) -> list[int] | None:
    """Batches before each validation of a run of ``total`` batches; ``None`` if unknown.

    ``val_check_interval`` counts batches, not steps; the last step is always validated.
    """
    interval: Any = 1.0 if trainer.val_check_interval is None else trainer.val_check_interval
    if trainer.check_val_every_n_epoch is None and isinstance(interval, int):
        found = list(range(interval, total + 1, interval))
    elif epoch is None or not isinstance(interval, int | float):
        return None
    else:
        every = trainer.check_val_every_n_epoch or 1
        within = interval if isinstance(interval, int) else max(1, int(epoch * interval))
        ends = range(every * epoch, total + epoch, every * epoch)  # of the epochs with validations
        found = [end - epoch + batch for end in ends for batch in range(within, epoch + 1, within)]
        found = [batch for batch in found if batch <= total]
    return found if found[-1:] == [total] else [*found, total]


def held_out_seen(count: int, largest: int, limit: Any, devices: int) -> int:
    """Held-out pictures in a validation, of ``count``, in batches of at most ``largest``."""
    if limit is None or (limit == 1.0 and isinstance(limit, float)):
        return count
    size = evaluation_batch_size(count, largest)
    each = math.ceil(math.ceil(count / size) / devices)  # batches of a device
    batches = limit if isinstance(limit, int) else int(each * limit)
    return min(count, batches * size * devices)
