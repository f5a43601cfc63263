"""The optimizer and its scheduler, made to fit the length of the run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lightning_difftune.errors import ConfigError

# The argument that sets a scheduler's length, for schedulers that have one.
LENGTHS: dict[type[LRScheduler], str] = {
    OneCycleLR: "total_steps",
    CosineAnnealingLR: "T_max",
    PolynomialLR: "total_iters",
}
LEFT_OUT = (None, -1)  # means: take it from the trainer or, for max_lr, from the optimizer
ADAMW_RATE = 1e-4


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The authors' optimizer: AdamW without weight decay at a constant learning rate of 1e-4."""
    return AdamW(parameters, lr=ADAMW_RATE, weight_decay=0.0)


def run_length(trainer: L.Trainer) -> int | None:
    """Optimizer steps of a run, from ``max_steps`` or ``max_epochs``; ``None`` if it has no end."""
    if trainer.max_epochs in (None, -1):
        return trainer.max_steps if trainer.max_steps != -1 else None
    steps = trainer.estimated_stepping_batches
    trainer.fit_loop._combined_loader = None  # made only for the count; the loop makes its own
    return None if math.isinf(steps) else int(steps)


def scheduler_config(
    build: Callable[..., Any], optimizer: Optimizer, trainer: L.Trainer, default_lr: float | None = None
) -> dict[str, Any]:
    """Build a scheduler that ends with the run, as ``configure_optimizers`` returns it.

    A length that is omitted or -1 (``total_steps`` of ``OneCycleLR``, ``T_max`` of ``CosineAnnealingLR``,
    ``total_iters`` of ``PolynomialLR``) is set to the run's; ``max_lr`` of ``OneCycleLR`` to the optimizer's rate.

    Args:
        build: Callable that takes the optimizer and returns a scheduler. Omitted arguments are filled in for a class,
            a ``functools.partial`` of one, and what Lightning's command line makes of a ``class_path``.
        optimizer: The optimizer.
        trainer: The trainer that is about to fit.
        default_lr: The optimizer's rate if it was not set.

    Raises:
        ConfigError: If the scheduler and the run end at different steps.
    """
    kind, given = _class_of(build)
    length = next((name for known, name in LENGTHS.items() if kind is not None and issubclass(kind, known)), None)
    missing: dict[str, Any] = {}
    if length is not None and given.get(length) in LEFT_OUT and given.get("epochs") is None:
        steps = run_length(trainer)
        if steps is None:
            raise ConfigError(
                f"{kind.__name__} lasts until the end of the run, but the run has no end. Set trainer.max_steps."  # type: ignore[union-attr]
            )
        missing[length] = max(steps, 1)
    if kind is OneCycleLR:
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        peak = given.get("max_lr")
        if peak in LEFT_OUT:
            missing["max_lr"] = rates
        elif isinstance(peak, int | float) and any(rate not in (peak, default_lr) for rate in rates):
            rank_zero_warn(
                f"OneCycleLR takes the rate up to max_lr = {peak:g}; the optimizer's lr of {rates[0]:g} is not used. "
                "Leave max_lr out (or set it to -1), and it is the optimizer's lr."
            )
    scheduler = build(optimizer, **missing)
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        check_length(scheduler, trainer)
    config = {"scheduler": scheduler, "interval": "step"}
    if isinstance(scheduler, ReduceLROnPlateau):  # stepped by `step_plateaus`, before a checkpoint is saved
        config |= {"monitor": getattr(scheduler, "monitor", "val/loss"), "strict": False}
    return config


def check_length(scheduler: Any, trainer: L.Trainer) -> None:
    """Refuse a scheduler that does not end with the run.

    Raises:
        ConfigError: If it does.
    """
    found = length_of(scheduler)
    if found is None:
        return
    name, length = found
    steps = run_length(trainer)
    if steps is None or length == steps or steps < 1:
        return
    what = {
        "total_steps": "end in an error there" if length < steps else "not come down to its end",
        "T_max": "rise again from there" if length < steps else "not come down to its end",
        "total_iters": "be 0 from there" if length < steps else "not come down to its end",
    }[name]
    raise ConfigError(
        f"{type(scheduler).__name__} ends at step {length:,} ({name}), but the run has {steps:,} steps "
        f"(trainer.max_steps): the rate would {what}. Leave {name} out (or set it to -1), and it is the run's length."
    )


def length_of(scheduler: Any) -> tuple[str, int] | None:
    """The name and value of the argument for a scheduler's last step; ``None`` if it has no end."""
    if isinstance(scheduler, SequentialLR):
        last = length_of(scheduler._schedulers[-1])
        return None if last is None else (last[0], last[1] + scheduler._milestones[-1])
    if isinstance(scheduler, ChainedScheduler):
        return next((found for inner in scheduler._schedulers if (found := length_of(inner)) is not None), None)
    name = next((name for kind, name in LENGTHS.items() if isinstance(scheduler, kind)), None)
    return None if name is None else (name, getattr(scheduler, name))


def default_rate(optimizer: Optimizer) -> float | None:
    """The default learning rate of an optimizer's class."""
    parameter = inspect.signature(type(optimizer)).parameters.get("lr")
    default = None if parameter is None else parameter.default
    return float(default) if isinstance(default, int | float) else None


def _class_of(build: Any) -> tuple[type[LRScheduler] | None, Mapping[str, Any]]:
    """The class that a factory makes and the arguments that it passes, if they are visible."""
    given: Mapping[str, Any] = {}
    parts: list[Any] = [build]
    if isinstance(build, partial):  # jsonargparse's partial has the class among its arguments
        parts, given = [build.func, *build.args], build.keywords
    found = next((part for part in parts if inspect.isclass(part) and issubclass(part, LRScheduler)), None)
    return found, given


def step_plateaus(trainer: L.Trainer) -> None:
    """Step the schedulers that follow a metric, after a validation of ``fit``.

    Raises:
        ConfigError: If the metric was not logged.
    """
    if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
        return
    for config in trainer.lr_scheduler_configs:
        if not isinstance(config.scheduler, ReduceLROnPlateau):
            continue
        metric = trainer.callback_metrics.get(str(config.monitor))
        if metric is None:
            found = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise ConfigError(
                f"ReduceLROnPlateau monitors {config.monitor}, which the validation did not log; it logged {found}. "
                "Set monitor of lightning.pytorch.cli.ReduceLROnPlateau to one of them, or set val_target."
            )
        config.scheduler.step(float(metric))
