"""What is asked of a finished run: its callbacks and its averaged weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lightning_difftune.cli.lightning import DiffTuneCLI


@runtime_checkable
class AveragesParameters(Protocol):
    """A callback with averages of the weights."""

    def average_parameters(self, module: nn.Module) -> AbstractContextManager[None]:
        """A ``with`` block in which they stand in for the weights."""


@runtime_checkable
class FindsConvergence(Protocol):
    """A callback that watches for the step at which a scalar converges."""

    monitor: str
    threshold: float | None
    convergence_step: int | None
    leap: Any


def callbacks_of(cli: DiffTuneCLI, kind: Any) -> list[Any]:
    """The run's callbacks of one class, or those that do what a protocol says."""
    return [callback for callback in vars(cli.trainer)["callbacks"] if isinstance(callback, kind)]


def scoring(cli: DiffTuneCLI) -> list[Any]:
    """The run's callbacks that log what tells a better model from a worse one; each has a ``history`` of it."""
    return [callback for callback in vars(cli.trainer)["callbacks"] if getattr(callback, "scores", dict)()]


def averaged_weights(cli: DiffTuneCLI) -> AbstractContextManager[None]:
    """A ``with`` block in which the averaged weights stand in, if the run has averages; else the weights are left."""
    averages = callbacks_of(cli, AveragesParameters)
    return averages[0].average_parameters(cli.model) if averages else nullcontext()


def count_trainable(cli: DiffTuneCLI) -> int:
    """Parameters that the run trains."""
    return sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
