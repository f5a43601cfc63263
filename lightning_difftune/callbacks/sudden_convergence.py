"""Sudden convergence: the step at which a validation score jumps."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_difftune.callbacks.bases import MeasuringCallback, warn_without_validation
from lightning_difftune.errors import ConfigError, check_choice, check_counts

Mode = Literal["max", "min"]
ControlTask = Literal["edge", "sketch", "depth", "normal", "segmentation_coco", "segmentation_ade20k"]

# Table 4 of the Diff-Tuning paper: blurred SSIM for edge and sketch, MSE for depth and normal, pixel accuracy; each as
# ControlSimilarity logs it.
_TABLE_4: dict[ControlTask, tuple[str, float, Mode]] = {
    "edge": ("control/ssim", 0.55, "max"),
    "sketch": ("control/ssim", 0.75, "max"),
    "depth": ("control/mse", 0.04, "min"),
    "normal": ("control/mse", 0.06, "min"),
    "segmentation_coco": ("control/pixel_accuracy", 0.5, "max"),
    "segmentation_ade20k": ("control/pixel_accuracy", 0.4, "max"),
}


class Leap(NamedTuple):
    """An improvement between two validations.

    Attributes:
        rise: Improvement of the second value over the first; positive in either mode.
        start_step: The optimizer step of the first validation.
        end_step: The optimizer step of the second.
    """

    rise: float
    start_step: int
    end_step: int


class SuddenConvergence(MeasuringCallback):
    """Find the step at which a logged scalar converges suddenly, as ControlNets do (Appendix C of the paper).

    The values of all validations of a ``fit`` give two results. With a threshold, the step of convergence is the first
    of ``patience`` successive validations beyond it, known after the last of them. With or without one, the leap is
    the largest rise (in mode ``"min"``, fall) from a validation to one of the next ``window``; any curve has one, so
    it tells when convergence was sudden, not whether.

    The step is logged as ``sudden_convergence/step``, and at the end of training the leap as
    ``sudden_convergence/leap``, ``/leap_start_step`` and ``/leap_end_step``. Steps are optimizer steps
    (``trainer.global_step``). With several of these callbacks, the names are ``sudden_convergence/<monitor>/step`` and
    so on.

    A validation in which the scalar is not logged, or is NaN or infinite, is skipped: it neither counts nor interrupts.
    The sanity check and ``fast_dev_run`` are ignored. The values are part of checkpoints, so a resumed run gives the
    same results. (Only the validation right after a checkpoint of ``ModelCheckpoint(every_n_train_steps=...)`` is then
    missing: Lightning does not repeat it on resuming. Save after validation, or at other steps.) All processes follow
    the first one's value, which loggers show; log with ``sync_dist=True`` to average over all data.

    Args:
        monitor: Name of the scalar, logged in validation by any module or callback.
        threshold: Value to pass, in the scalar's units; ``None`` finds only the leap.
        mode: ``"max"`` if larger is better, ``"min"`` if smaller is.
        patience: Successive validations that must lie beyond the threshold. The paper does not state its number; 1 is
            the plain crossing.
        stop: Stop the fit at convergence. ``min_steps`` and ``min_epochs`` of the trainer still hold.
        window: Largest number of validations in a leap. 5 are 500 steps in the paper's runs.

    Raises:
        ConfigError: If an argument is invalid or, in the first validation, if nothing logs ``monitor``.

    Example:
        >>> callback = SuddenConvergence.for_task("edge")
        >>> callback.monitor, callback.threshold, callback.mode
        ('control/ssim', 0.55, 'max')
        >>> callback.history = [(100, 0.125), (200, 0.25), (300, 0.75), (400, 0.75)]
        >>> callback.convergence_step
        300
        >>> callback.window = 1
        >>> callback.leap
        Leap(rise=0.5, start_step=200, end_step=300)
    """

    def __init__(
        self,
        monitor: str,
        threshold: float | None = None,
        mode: Mode = "max",
        patience: int = 1,
        stop: bool = False,
        window: int = 5,
    ) -> None:
        check_choice("SuddenConvergence", "mode", mode, *get_args(Mode))
        if threshold is not None and not math.isfinite(threshold):
            raise ConfigError(f"The threshold of SuddenConvergence must be a finite number, found {threshold}.")
        check_counts("SuddenConvergence", patience=patience, window=window)
        if stop and threshold is None:
            raise ConfigError(
                "SuddenConvergence can stop the fit only at a threshold, found none. Pass `threshold=`, or "
                "`stop=False` to get the leap at the end."
            )
        self.monitor = monitor
        self.threshold = threshold
        self.mode = mode
        self.patience = patience
        self.stop = stop
        self.window = window
        self.history = []
        self._latest_logged: Tensor | None = None

    @classmethod
    def for_task(
        cls, task: ControlTask, monitor: str | None = None, patience: int = 1, stop: bool = False, window: int = 5
    ) -> SuddenConvergence:
        """The callback with the paper's threshold and direction for a control task (Table 4).

        The scores are SSIM of blurred maps for edge (0.55) and sketch (0.75), mean squared error for depth (0.04) and
        normal (0.06), and pixel accuracy for segmentation (0.5 on COCO, 0.4 on ADE20k). A configuration file writes
        ``class_path: lightning_difftune.callbacks.SuddenConvergence.for_task``.

        Args:
            task: One of the six.
            monitor: Logged name of the task's score; by default that of
                :class:`~lightning_difftune.callbacks.ControlSimilarity` with the task's metric.
            patience: As for the class.
            stop: As for the class.
            window: As for the class.

        Raises:
            ConfigError: If the task is not one of the six.
        """
        if task not in _TABLE_4:
            raise ConfigError(
                f"The paper has no threshold for the task {task!r}. Its tasks are {', '.join(_TABLE_4)}; for another "
                "one, pass `threshold` and `mode` to SuddenConvergence."
            )
        score, threshold, mode = _TABLE_4[task]
        return cls(score if monitor is None else monitor, threshold, mode, patience, stop, window)

    @property
    def convergence_step(self) -> int | None:
        """The first of ``patience`` successive steps beyond the threshold, or ``None`` if there is none yet."""
        if self.threshold is None:
            return None
        run: list[int] = []
        for step, value in self.history:
            run = [*run, step] if self._gain(self.threshold, value) > 0 else []
            if len(run) == self.patience:
                return run[0]
        return None

    @property
    def leap(self) -> Leap | None:
        """The largest rise over ``window`` validations, on ties the shortest and earliest; ``None`` without a rise."""
        best: Leap | None = None
        for distance in range(1, self.window + 1):
            for (start, before), (end, after) in zip(self.history, self.history[distance:], strict=False):
                rise = self._gain(before, after)
                if rise > (best.rise if best else 0):
                    best = Leap(rise, start, end)
        return best

    @property
    def state_key(self) -> str:
        """Distinguishes several of these callbacks with different scalars."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn, if there will be no validation."""
        super().on_train_start(trainer, pl_module)
        warn_without_validation(trainer, self)
        self._latest_logged = trainer.callback_metrics.get(self.monitor)  # of a checkpoint; no new value

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the value of this validation, whichever module or callback logged it."""
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.state.fn != TrainerFn.FITTING:
            return
        value = trainer.strategy.broadcast(self._logged_value(trainer))
        if value is None:
            names = ", ".join(f"'{name}'" for name in trainer.callback_metrics) or "nothing"
            raise ConfigError(
                f"SuddenConvergence watches '{self.monitor}', which was not logged in training or validation. Logged: "
                f"{names}. Pass one of these as `monitor`, or log it with `self.log('{self.monitor}', ...)`."
            )
        if not math.isfinite(value):
            return
        step = trainer.global_step
        # A resumed run may validate again at the checkpoint's step.
        self.history = [(s, v) for s, v in self.history if s < step]
        known = self.convergence_step is not None
        self.history.append((step, value))
        converged = self.convergence_step
        if converged is None:
            return
        if not known:
            rank_zero_info(
                f"Sudden convergence at step {converged:,}: '{self.monitor}' is "
                f"{'above' if self.mode == 'max' else 'below'} {self.threshold}, at {value:.4g} in step {step:,}."
            )
            for logger in trainer.loggers:
                logger.log_metrics({f"{self._prefix(trainer)}/step": float(converged)}, step=step)
        if self.stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report the leap, and warn if there was no convergence."""
        if self.threshold is not None and self.history and self.convergence_step is None:
            rank_zero_info(
                f"No sudden convergence: '{self.monitor}' was not {'above' if self.mode == 'max' else 'below'} "
                f"{self.threshold} in {self.patience} successive validation{'s' if self.patience > 1 else ''}."
            )
        leap = self.leap
        if leap is None:
            return
        rank_zero_info(
            f"The largest leap of '{self.monitor}' within {self.window} validation{'s' if self.window > 1 else ''} is "
            f"{leap.rise:.4g} for the better, between steps {leap.start_step:,} and {leap.end_step:,}."
        )
        for logger in trainer.loggers:
            logger.log_metrics(
                {
                    f"{self._prefix(trainer)}/leap": leap.rise,
                    f"{self._prefix(trainer)}/leap_start_step": float(leap.start_step),
                    f"{self._prefix(trainer)}/leap_end_step": float(leap.end_step),
                },
                step=trainer.global_step,
            )

    def _prefix(self, trainer: L.Trainer) -> str:
        others = [c for c in trainer.callbacks if isinstance(c, SuddenConvergence)]  # type: ignore[attr-defined]
        return "sudden_convergence" if len(others) == 1 else f"sudden_convergence/{self.monitor}"

    def _gain(self, before: float, after: float) -> float:
        return after - before if self.mode == "max" else before - after

    def _logged_value(self, trainer: L.Trainer) -> float | None:
        """This validation's value, NaN if there is none, ``None`` if there has never been any."""
        logged = trainer.callback_metrics.get(self.monitor)
        if logged is None:
            return None if self._latest_logged is None and not self.history else math.nan
        # The trainer keeps the tensor of a scalar that this validation did not log; the value must not count twice.
        if logged is self._latest_logged:
            return math.nan
        self._latest_logged = logged
        return logged.item()
