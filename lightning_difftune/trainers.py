"""Facts of a Lightning trainer that modules and callbacks ask for, and the mode in which pictures are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_difftune.errors import ConfigError


def has_validation(trainer: L.Trainer) -> bool:
    """Whether a fit has held-out batches to validate with; sets up their loaders if that has not been done."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.enable_validation:
        loop.setup_data()
    return trainer.enable_validation and any(loop.max_batches)


def window_in_epoch(trainer: L.Trainer, epoch: int) -> int:
    """Batches whose gradients are accumulated in an epoch; Lightning's callback sets it only where an epoch begins."""
    schedules = _window_schedules(trainer)
    return schedules[-1].get_accumulate_grad_batches(epoch) if schedules else trainer.accumulate_grad_batches


def common_window(trainer: L.Trainer) -> int:
    """Batches whose gradients are accumulated; a common multiple of all windows if they change with the epoch."""
    windows = (window for schedule in _window_schedules(trainer) for window in schedule.scheduling.values())
    return math.lcm(trainer.accumulate_grad_batches, *windows)


def _window_schedules(trainer: L.Trainer) -> list[GradientAccumulationScheduler]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]


def last_step(trainer: L.Trainer) -> int:
    """The step at which a running fit ends, by ``max_steps`` or ``max_epochs``; -1 if that is never, or not known."""
    if _window_schedules(trainer) or trainer.train_dataloader is None:  # steps of unknown number, or not loaded yet
        return trainer.max_steps
    steps = trainer.estimated_stepping_batches
    return trainer.max_steps if steps == math.inf else int(steps)


def is_last_step(trainer: L.Trainer) -> bool:
    """Whether a fit has come to its last step, by ``max_steps`` or ``max_epochs``."""
    is_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 == trainer.max_epochs
    # With several optimizers, the step may jump over max_steps.
    return 0 <= trainer.max_steps <= trainer.global_step or (is_last_epoch and trainer.is_last_batch)


def stops_early(trainer: L.Trainer) -> bool:
    """Whether a callback ends the run here, such as ``EarlyStopping`` or the timer of ``max_time``."""
    is_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return is_fit and trainer.should_stop and trainer.fit_loop._can_stop_early


def refuse_sharding(trainer: L.Trainer, needs: str) -> None:
    """Refuse strategies that shard parameters, for a callback that needs whole ones."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ConfigError(
            f"{needs} whole parameters, but {type(trainer.strategy).__name__} shards them. Use strategy='ddp' or a "
            "single device."
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A ``with`` block without gradients, with a module in eval mode; its parts get their modes back."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
