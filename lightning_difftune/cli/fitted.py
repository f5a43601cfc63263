"""What is asked of a finished run: its callbacks and its averaged weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from lightning_difftune.callbacks import EMA
from lightning_difftune.cli.lightning import DiffTuneCLI

T = TypeVar("T")


def callbacks_of(cli: DiffTuneCLI, kind: type[T]) -> list[T]:
    """The run's callbacks of one kind."""
    return [callback for callback in vars(cli.trainer)["callbacks"] if isinstance(callback, kind)]


def averaged_weights(cli: DiffTuneCLI) -> AbstractContextManager[None]:
    """A ``with`` block in which the averaged weights stand in, if the run has averages; else the weights are left."""
    averages = callbacks_of(cli, EMA)
    return averages[0].average_parameters(cli.model) if averages else nullcontext()


def count_trainable(cli: DiffTuneCLI) -> int:
    """Parameters that the run trains."""
    return sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
