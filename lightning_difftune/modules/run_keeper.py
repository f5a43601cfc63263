"""Keeps a run true to its settings, also when it is stopped and resumed."""

from __future__ import annotations

import atexit
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import distributed
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.modules.changed_settings import RECORD, carry_settings, describe
from lightning_difftune.modules.checkpoint_io import write_whole
from lightning_difftune.modules.data_checks import check_classes
from lightning_difftune.trainers import has_validation, is_last_step, stops_early, window_in_epoch

WINDOW = "open_window"  # the checkpoint's key for the gradients of an unfinished accumulation window


class RunKeeper(Callback):
    """Keeps a run true to its settings; every Diff-Tuning module adds one.

    - Checkpoints are written atomically, and damaged ones are refused (:class:`AtomicCheckpointIO`).
    - Settings of the optimizer and its scheduler that changed since the checkpoint take effect, as does the
      patience of ``EarlyStopping``, or are refused. Everything else is restored to the bit.
    - Classes keep their numbers: data with others than the module's or the checkpoint's are refused.
    - Batches stay float32 at any precision: bf16-true would round pictures, cached latents and the bank's. The inputs
      of networks are cast in one place, :func:`~lightning_difftune.models.casts.takes_its_own_type`.
    - The last step is validated unless validation is off, and ``last.ckpt`` holds the last step, at any interval of
      validation and checkpoints, also where ``max_time``, ``EarlyStopping`` or another callback ends the run.
    - A checkpoint within an accumulation window holds the accumulated gradients, and a resumed run does not save the
      checkpoint that it was resumed from again.
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None
        self._configured: dict[str, Any] | None = None
        self._gradients: dict[str, torch.Tensor] | None = None
        self._before: tuple[Any, bool] | None = None  # the trainer's settings while the last validation is forced
        self._saved_step = -1
        self._class_names: list[str] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take over reading and writing checkpoints, and keep batches as the data module made them."""
        self._resumed = self._configured = self._gradients = self._class_names = None
        plugin: Any = trainer.precision_plugin
        plugin.convert_input = Precision.convert_input.__get__(plugin)  # converts nothing
        write_whole(trainer.strategy)
        if trainer.world_size > 1:
            atexit.register(leave_group)

    # -- resuming -------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint before anything in it is restored."""
        self._class_names = checkpoint.get("class_names")
        if trainer.state.fn != TrainerFn.FITTING:
            return
        refuse_unrestored(trainer)
        step = checkpoint.get("global_step", 0)
        if 0 <= trainer.max_steps < step:
            raise ConfigError(
                f"The checkpoint stands at step {step:,}, and trainer.max_steps is {trainer.max_steps:,}: nothing is "
                "left to train. Raise max_steps."
            )
        if step == trainer.max_steps:
            rank_zero_info(f"The checkpoint is of step {step:,} of {step:,}: raise trainer.max_steps to train more.")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, EarlyStopping) and state:
                state["patience"] = callback.patience
        reopen_epoch(checkpoint)
        self._resumed = checkpoint
        self._gradients = self._window_of(trainer, checkpoint)
        if trainer.optimizers:  # sharded strategies restore after they have set up
            self._carry(trainer)

    def _window_of(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        window = checkpoint.get(WINDOW)
        batches = window_in_epoch(trainer, checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"])
        if window is None:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            current = progress["current"]
            if current["ready"] % batches or (batches > 1 and progress["is_last_batch"]):
                # The windows differ from before, or an epoch begins: Lightning would cut the first window short.
                current["completed"] -= current["ready"]
                current["ready"] = current["started"] = current["processed"] = 0
            return None
        if window["batches"] != batches:
            raise ConfigError(
                f"The checkpoint is in the middle of a window of {window['batches']} accumulated batches, and "
                f"trainer.accumulate_grad_batches is {batches}. Set it to {window['batches']}, or resume from a "
                "checkpoint that was saved at a step."
            )
        gradients: dict[str, torch.Tensor] = window["gradients"]
        return gradients

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the optimizers' settings, and report changes since the checkpoint."""
        check_classes(pl_module, getattr(trainer, "datamodule", None), self._class_names)
        self._check_clipping(trainer)
        check_loader(trainer)
        self._carry(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the classes of the data, which may be others than those of the training."""
        check_classes(pl_module, getattr(trainer, "datamodule", None), self._class_names)

    on_test_start = on_validation_start

    def _carry(self, trainer: L.Trainer) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._configured = describe(trainer.optimizers, schedulers)
        checkpoint, self._resumed = self._resumed, None
        if checkpoint is not None:
            changes = carry_settings(checkpoint, trainer.optimizers, schedulers)
            if changes:
                step = checkpoint.get("global_step", 0)
                rank_zero_info(f"Changed since the checkpoint, from step {step:,} on: {', '.join(changes)}.")

    def _check_clipping(self, trainer: L.Trainer) -> None:
        plugin = trainer.precision_plugin
        scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        fused = any(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers)
        if scaled and fused and trainer.gradient_clip_val:
            raise ConfigError(
                f"trainer.gradient_clip_val is {trainer.gradient_clip_val}, but under {trainer.precision} a fused "
                "optimizer divides by the loss scale inside its step, where nothing can be clipped. Set fused: false "
                "of the optimizer, or trainer.precision: bf16-mixed, which has no loss scale."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the gradients and length of an open window, and mark the step that was resumed from as saved."""
        self._before, self._saved_step = None, -1
        trainer.accumulate_grad_batches = window_in_epoch(trainer, trainer.current_epoch)
        plateaus = [c for c in trainer.lr_scheduler_configs if isinstance(c.scheduler, ReduceLROnPlateau)]
        if plateaus and not has_validation(trainer):
            raise ConfigError(
                f"ReduceLROnPlateau follows {plateaus[0].monitor} from validation to validation, and this run has "
                "none: the rate would never change. Set val_target of the data, or take another scheduler."
            )
        if self._gradients is not None:
            parameters = dict(pl_module.named_parameters())
            for name, gradient in self._gradients.items():
                parameters[name].grad = gradient.to(parameters[name])
            self._gradients = None
        if trainer.ckpt_path:
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback._last_global_step_saved = trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the optimizers' settings and the gradients of an open window."""
        if self._configured is not None:
            checkpoint[RECORD] = self._configured
        if in_open_window(trainer):
            gradients = {
                name: trainer.strategy.reduce(parameter.grad.clone(), reduce_op="mean")
                for name, parameter in pl_module.named_parameters()
                if parameter.grad is not None
            }
            checkpoint[WINDOW] = {"batches": trainer.accumulate_grad_batches, "gradients": gradients}

    # -- the last step --------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and validate the last step: a trainer that should stop validates first."""
        if not (is_last_step(trainer) or stops_early(trainer)):
            return
        self._save(trainer)
        if has_validation(trainer):
            self._before = trainer.check_val_every_n_epoch, trainer.should_stop
            trainer.check_val_every_n_epoch = None
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, if a callback ends the run by what was validated."""
        if stops_early(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, if the run was ended after these hooks, and leave the trainer as it was."""
        if stops_early(trainer):
            self._save(trainer, is_over=True)
        if self._before is not None:
            trainer.check_val_every_n_epoch, trainer.should_stop = self._before
            self._before = None

    def _save(self, trainer: L.Trainer, is_over: bool = False) -> None:
        for callback in trainer.checkpoint_callbacks if self._saved_step != trainer.global_step else ():
            if isinstance(callback, ModelCheckpoint):
                save_last(trainer, callback, is_over)
        self._saved_step = trainer.global_step


def refuse_unrestored(trainer: L.Trainer) -> None:
    """Refuse to resume with what Lightning sets up where an epoch begins, and does not restore within one.

    Raises:
        ConfigError: If the trainer has ``overfit_batches`` or ``StochasticWeightAveraging``.
    """
    found = "trainer.overfit_batches" if trainer.overfit_batches else None  # type: ignore[attr-defined]
    if any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks):  # type: ignore[attr-defined]
        found = "StochasticWeightAveraging"
    if found is not None:
        raise ConfigError(
            f"A run with {found} cannot be resumed: Lightning does not restore it within an epoch, so the steps would "
            "differ from those of the run without a stop. Leave it out; lightning_difftune.callbacks.EMA is restored."
        )


def check_loader(trainer: L.Trainer) -> None:
    """Refuse a training loader that a data module made outside of the trainer, where it cannot know what it must.

    Raises:
        ConfigError: If there are several processes, accumulated gradients, or a checkpoint to resume from.
    """
    sampler = getattr(trainer.fit_loop._data_source.instance, "sampler", None)
    needed = trainer.world_size > 1 or trainer.accumulate_grad_batches > 1 or trainer.ckpt_path
    if needed and getattr(sampler, "progress", "not ours") is None:
        raise ConfigError(
            "The training loader was made outside of this trainer: it does not know the processes, the windows of "
            "accumulated gradients and the step that the run is resumed from. Pass the data module itself, "
            "trainer.fit(module, datamodule=data)."
        )


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Undo that Lightning counted an epoch in which a run was stopped: the resumed run does the rest of it."""
    loops = checkpoint["loops"]["fit_loop"]
    epochs, is_over = loops["epoch_progress"], loops["epoch_loop.batch_progress"]["is_last_batch"]
    if not is_over and epochs["current"]["processed"] == epochs["current"]["started"]:
        for counts in (epochs["total"], epochs["current"]):
            counts["processed"] = counts["completed"] = counts["started"] - 1


def save_last(trainer: L.Trainer, callback: ModelCheckpoint, is_over: bool = False) -> None:
    """Write ``last.ckpt`` at a last step where none is due, or warn that the steps since the latest are lost.

    Args:
        trainer: The trainer.
        callback: One of its checkpoint callbacks.
        is_over: Whether the end of the epoch, where one may be due, has passed.
    """
    every, epochs, step = callback._every_n_train_steps, callback._every_n_epochs, trainer.global_step
    is_epoch_due = epochs >= 1 and (trainer.current_epoch + 1) % epochs == 0  # at its end, which follows
    is_due = step % every == 0 if every else is_epoch_due and not is_over
    if is_due or callback._should_skip_saving_checkpoint(trainer):
        return
    if callback.save_last:
        callback._last_checkpoint_saved = ""  # so that save_last: link writes a file, not a link to an earlier step
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
    else:
        rank_zero_warn(
            f"ModelCheckpoint saved step {callback._last_global_step_saved:,} and the run ends at step {step:,}: what "
            "it learned in between is in no checkpoint. Set save_last: true of ModelCheckpoint, or an "
            "every_n_train_steps that divides trainer.max_steps."
        )


def in_open_window(trainer: L.Trainer) -> bool:
    """Whether there are accumulated gradients that the optimizer has not used yet."""
    if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
        return False
    loop = trainer.fit_loop.epoch_loop
    return loop.batch_progress.current.ready > 0 and loop._should_accumulate()


def leave_group() -> None:
    """Leave the group of processes, as Lightning does for NCCL alone: gloo may abort a process that exits within it."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def refuse_weights_alone(trainer: L.Trainer | None, checkpoint: dict[str, Any]) -> None:
    """Refuse to resume a run from a checkpoint without the optimizer's state.

    Raises:
        CheckpointError: If the trainer is about to do so.
    """
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING and "optimizer_states" not in checkpoint:
        raise CheckpointError(
            f"{trainer.ckpt_path} holds only weights, without the state of the optimizer: it was saved with "
            "save_weights_only. Take another checkpoint, or open it with load_from_checkpoint and start a new run."
        )
