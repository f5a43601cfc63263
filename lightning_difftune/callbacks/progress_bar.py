"""The progress of runs that are measured in steps: as a bar, or as lines for logs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.progress import BarColumn, ProgressColumn, Task
from rich.table import Column
from rich.text import Text
from torch import Tensor

from lightning_difftune.trainers import is_last_step, last_step

LOSSES_EVERY = 0.5  # seconds
NARROW = 110  # characters, below which a bar and its numbers do not fit
BAR, OTHERS = 41, 10 + 18 + 14 + 5  # characters of the bar; of description, times, rate and the gaps


class Throughput:
    """Pictures per second over the latest ``window`` steps, the waits for their data included.

    Example:
        >>> seconds = iter([0.0, 0.5, 1.0, 10.0, 10.5])
        >>> meter = Throughput(clock=lambda: next(seconds))
        >>> meter.start(); meter.stop(8); meter.stop(8)
        >>> meter.pause(); meter.start(); meter.stop(8)  # a validation, from 1.0 to 10.0
        >>> meter.rate
        16.0
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)
        self._clock = clock
        self._started: float | None = None

    def start(self) -> None:
        """Begin a step, unless the end of the previous one has begun it."""
        if self._started is None:
            self._started = self._clock()

    def stop(self, pictures: int) -> None:
        """End the step, with the number of pictures on all processes, and begin the next."""
        if self._started is not None:
            now = self._clock()
            self._steps.append((now - self._started, pictures))
            self._started = now

    def pause(self) -> None:
        """Leave out the time until the next :meth:`start`."""
        self._started = None

    @property
    def rate(self) -> float:
        """Pictures per second; 0 before the first step."""
        seconds = sum(entry[0] for entry in self._steps)
        return sum(entry[1] for entry in self._steps) / seconds if seconds else 0.0


class TimedBar(ProgressBar):
    """A progress bar that measures the :class:`Throughput`, without validations and the saving of checkpoints."""

    throughput: Throughput

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.throughput.start()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        super().on_validation_start(trainer, pl_module)
        self.throughput.pause()

    def on_save_checkpoint(self, *_: Any) -> None:
        """Stop the clock."""
        self.throughput.pause()

    def on_train_end(self, *_: Any) -> None:
        """Stop the clock."""
        self.throughput.pause()


class StepProgressBar(TimedBar, RichProgressBar):
    """Lightning's rich progress bar, which counts the steps of the whole run if the trainer has ``max_steps``.

    A target of a thousand pictures has epochs of a few seconds, and Lightning's bar restarts at each. This one shows
    the progress and the remaining time, counted from the step where the run was resumed; pictures per second over all
    processes; the training losses, ``train/...``, read twice a second so that no step waits for the device; and
    metrics logged for the bar, such as the latest FID.

    Example:
        >>> trainer = L.Trainer(max_steps=24_000, callbacks=[StepProgressBar()], logger=False)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.throughput = Throughput()
        self._losses: dict[str, float] = {}
        self._losses_read = 0.0

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Lightning's columns with pictures per second; on a narrow terminal only the numbers, without the bar."""
        columns = [*super().configure_columns(trainer)[:-1], PicturesColumn(self)]
        if self._width() < NARROW:
            columns = [column for column in columns if not isinstance(column, BarColumn)]
        for column in columns:
            column._table_column = Column(no_wrap=True)
        return columns

    def _init_progress(self, trainer: L.Trainer) -> None:
        """Keep everything on one line; metrics that do not fit are left out."""
        super()._init_progress(trainer)
        if self._metric_component is not None:
            counts = 2 * len(f"{self.total_train_batches}") + 1
            others = OTHERS + counts + (0 if self._width() < NARROW else BAR)
            self._metric_component._table_column = Column(
                no_wrap=True, overflow="ellipsis", max_width=max(10, self._width() - others)
            )

    def _width(self) -> int:
        console = getattr(self, "_console", None)
        return NARROW if console is None else int(console.width)

    @property
    def total_train_batches(self) -> int | float:
        """Batches of the run, or of an epoch if ``max_steps`` is not set."""
        if self.trainer.max_steps < 0:
            return super().total_train_batches
        return last_step(self.trainer) * self.trainer.accumulate_grad_batches

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start a bar; in a run of ``max_steps`` only in the first epoch."""
        if trainer.max_steps < 0:
            super().on_train_epoch_start(trainer, pl_module)
        else:
            self._start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Continue counting across the epochs of a run of ``max_steps``."""
        self.throughput.stop(pictures_in(batch) * trainer.world_size)
        if trainer.max_steps < 0:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        else:
            self._start()  # a run that is resumed within an epoch does not start that epoch
            super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.fit_loop.total_batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Losses of training, and what was logged for the bar, without the logger's version number."""
        if not self._losses or time.monotonic() >= self._losses_read + LOSSES_EVERY:
            self._losses, self._losses_read = training_losses(trainer), time.monotonic()
        shown = shown_metrics({**self._losses, **super().get_metrics(trainer, pl_module)})
        column = getattr(self._metric_component, "_table_column", None)
        return shown if column is None or column.max_width is None else fitting(shown, column.max_width)

    def _start(self) -> None:
        if self.progress is not None and self.train_progress_bar_id is None:
            name = "Training".ljust(len(self.validation_description))  # so that the bars are aligned
            self.train_progress_bar_id = self.progress.add_task(name, total=self.total_train_batches)


class PicturesColumn(ProgressColumn):
    """Pictures per second, in the bar of training."""

    max_refresh = 0.5

    def __init__(self, bar: StepProgressBar) -> None:
        super().__init__()
        self.bar = bar

    def render(self, task: Task) -> Text:
        """The rate, or nothing for other bars."""
        is_training = task.id == self.bar.train_progress_bar_id
        return Text(f"{self.bar.throughput.rate:.0f} images/s" if is_training else "", style="dim")


class StepLines(TimedBar):
    """The progress as one line per interval, for logs and other outputs where a bar cannot move.

    A line has the step, pictures per second over all processes, the remaining time, and metrics logged for the bar.

    Args:
        every_n_steps: Optimizer steps between two lines; the trainer's ``log_every_n_steps`` by default.

    Example:
        >>> trainer = L.Trainer(max_steps=24_000, callbacks=[StepLines(every_n_steps=100)], logger=False)
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.throughput = Throughput()
        self._is_enabled = True
        self._latest = -1
        self._began = (0.0, 0)

    def disable(self) -> None:
        """Disable the lines, on all processes but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Enable the lines."""
        self._is_enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record where the run, or its resumed part, begins."""
        super().on_train_start(trainer, pl_module)
        self._began, self._latest = (time.perf_counter(), trainer.global_step), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line, if due."""
        self.throughput.stop(pictures_in(batch) * trainer.world_size)
        if trainer.global_step >= self._latest + self._interval(trainer) or is_last_step(trainer):
            self._print(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the metrics of the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._latest = -1
            self._print(trainer, pl_module)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Losses of training, and what was logged for the bar, without the logger's version number."""
        return shown_metrics({**training_losses(trainer), **super().get_metrics(trainer, pl_module)})

    def _interval(self, trainer: L.Trainer) -> int:
        return self.every_n_steps or max(vars(trainer).get("log_every_n_steps", 1), 1)

    def _print(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._is_enabled or trainer.global_step == self._latest:
            return
        self._latest = trainer.global_step
        parts = [f"Training {trainer.global_step}", f"{self.throughput.rate:.0f} images/s"]
        if trainer.max_steps > 0:
            seconds, first = self._began
            taken, last = (time.perf_counter() - seconds) / max(1, trainer.global_step - first), last_step(trainer)
            parts[0] += f"/{last}"
            parts.append(f"{timedelta(seconds=round(taken * (last - trainer.global_step)))} left")
        metrics = self.get_metrics(trainer, pl_module)
        parts += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
        ]
        print("  ".join(parts), flush=True)


def training_losses(trainer: L.Trainer) -> dict[str, float]:
    """The last logged values of ``train/...``; waits for the device."""
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("train/")}


def shown_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics for a bar, training losses by their short names, without the logger's version number.

    Example:
        >>> shown_metrics({"v_num": 3, "train/loss": 0.5, "val/loss": 0.25, "fid": 31.0})
        {'loss': 0.5, 'val/loss': 0.25, 'fid': 31.0}
    """
    return {name.removeprefix("train/"): value for name, value in metrics.items() if name != "v_num"}


def fitting(metrics: dict[str, Any], width: int) -> dict[str, Any]:
    """The first metrics that a bar can show in full.

    Example:
        >>> fitting({"loss": 0.5, "reconsolidation": 0.4, "retention": 0.1}, 35)
        {'loss': 0.5, 'reconsolidation': 0.4}
    """
    shown: dict[str, Any] = {}
    for name, value in metrics.items():
        width -= len(f"{name}: {value:.3f} " if isinstance(value, float) else f"{name}: {value} ")
        if width < -1 and shown:
            break
        shown[name] = value
    return shown


def pictures_in(batch: Any) -> int:
    """Number of samples in a batch: of all streams of a :class:`DiffTuningBatch`, or in the first tensor.

    Example:
        >>> import torch
        >>> pictures_in({"target": {"pixel_values": torch.zeros(6, 1)}, "retention": {"latents": torch.zeros(2, 1)}})
        8
        >>> pictures_in([torch.zeros(3, 1), torch.zeros(3)])
        3
    """
    if isinstance(batch, dict) and "target" in batch:
        return sum(pictures_in(stream) for stream in batch.values())
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    entries = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((count for entry in entries if (count := pictures_in(entry))), 0)
