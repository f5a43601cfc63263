"""Saves and stops a run when a scheduler takes the machine away."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from torch import distributed

from lightning_difftune.callbacks.progress_bar import StepLines, StepProgressBar
from lightning_difftune.callbacks.steps import OptimizerStepCallback


class Preemption(OptimizerStepCallback):
    """Save ``last.ckpt`` and stop when SIGTERM, or SLURM's warning of the time limit, arrives.

    A run stops right after an optimizer step, the same one on all processes even if only one of them got the signal, so
    the checkpoint resumes to the bit; a validation that is running or due is finished first. Ask the scheduler for
    enough notice: ``#SBATCH --signal=SIGUSR1@120``. ``fit`` then ends with ``SIGTERMException``, for which the command
    line has exit status 143. A run at its last step ends as always; ``stop_asked`` is for what comes after it.

    In a SLURM job the signal of a ``SLURMEnvironment`` with ``auto_requeue`` (Lightning's default, SIGUSR1) also
    requeues the job. Lightning's own handlers save inside the signal handler, in the middle of a step.

    The checkpoint goes to the folder of the first ``ModelCheckpoint``, or to ``checkpoints`` in the log's folder.

    Example:
        >>> trainer = L.Trainer(callbacks=[Preemption()], logger=False)
    """

    def __init__(self) -> None:
        self._training = False
        self.stop_asked = False
        self._requeue = False
        self._saved_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's signal handlers; Lightning restores the original ones at the end."""
        super().on_train_start(trainer, pl_module)
        self._training, self.stop_asked, self._requeue = True, False, False
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._notice)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            signal.signal(environment.requeue_signal, self._notice_requeue)

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Stop after this step if any process got a signal; within an accumulation window, at its end."""
        self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let a validation after the step finish; the loop would stop it at its first batch."""
        if self._training:
            trainer._signal_connector.received_sigterm = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop after this validation if any process got a signal.

        Lightning resumes a checkpoint of this moment without a second validation, unlike one saved after the loop.
        """
        if self._training and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._stop_if_asked(trainer)
            if trainer.received_sigterm:
                self._save(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        if trainer.world_size > 1:  # Lightning checks only the first process, and each process raises on its own
            votes = torch.tensor(
                [self.stop_asked, self._requeue], dtype=torch.int32, device=trainer.strategy.root_device
            )
            distributed.all_reduce(votes, distributed.ReduceOp.MAX)
            self.stop_asked, self._requeue = (bool(vote) for vote in votes.tolist())
        if trainer.global_step == trainer.max_steps:  # it ends anyway
            return
        if trainer.is_last_batch and trainer.num_training_batches > trainer.accumulate_grad_batches:
            return  # the epoch would be counted twice; the next step is soon enough
        if self.stop_asked:
            trainer._signal_connector.received_sigterm = True  # the loop checks it after the step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is left to save."""
        self._training = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save, and requeue the job if the signal asks for it."""
        if not self._training or not isinstance(exception, SIGTERMException):
            return
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        if self._requeue and trainer.is_global_zero:
            requeue()

    def _save(self, trainer: L.Trainer) -> None:
        self._saved_step = trainer.global_step
        path = checkpoint_folder(trainer) / "last.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"Stopped by a signal after step {trainer.global_step}; saved {path}.")

    def _notice(self, number: int, frame: Any) -> None:
        self.stop_asked = True

    def _notice_requeue(self, number: int, frame: Any) -> None:
        self.stop_asked = self._requeue = True


def checkpoint_folder(trainer: L.Trainer) -> Path:
    """The folder of a run's checkpoints."""
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    return Path(folders[0]) if folders else Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


def requeue() -> None:
    """Ask SLURM to start this job again."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    if not re.fullmatch("[0-9_]+", job):
        rank_zero_warn(f"The job is not requeued: {job!r} is not a SLURM job id.")
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        rank_zero_info(f"Requeued SLURM job {job}.")
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"SLURM job {job} could not be requeued ({error}); the checkpoint is saved.")


def with_defaults(callbacks: Iterable[Callback]) -> list[Callback]:
    """The callbacks of a run with the defaults: progress in steps, and :class:`Preemption`."""
    progress = StepProgressBar if Console().is_terminal or Console().is_jupyter else StepLines
    callbacks = [progress() if type(callback) is RichProgressBar else callback for callback in callbacks]
    if any(isinstance(callback, Preemption) for callback in callbacks):
        return callbacks
    return [*callbacks, Preemption()]  # last, so that it saves the state after the other callbacks
