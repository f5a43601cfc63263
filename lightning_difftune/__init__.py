"""Diff-Tuning (NeurIPS 2024) for PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_difftune.data import MemoryBank, MemoryBankDataModule
    from lightning_difftune.modules import (
        ControlNetDiffTuningModule,
        DiffTuningModule,
        DiTDiffTuningModule,
        TextToImageDiffTuningModule,
    )
    from lightning_difftune.objective import DiffTuningObjective, WeightedDiffTuningObjective
    from lightning_difftune.schedules import (
        ForgettingSchedule,
        MeasuredSchedule,
        MirroredPowerSchedule,
        PowerSchedule,
        SNRSchedule,
    )

__version__ = "0.1.0"

_HOMES = {
    "ControlNetDiffTuningModule": "modules",
    "DiTDiffTuningModule": "modules",
    "DiffTuningModule": "modules",
    "DiffTuningObjective": "objective",
    "ForgettingSchedule": "schedules",
    "MeasuredSchedule": "schedules",
    "MemoryBank": "data",
    "MemoryBankDataModule": "data",
    "MirroredPowerSchedule": "schedules",
    "PowerSchedule": "schedules",
    "SNRSchedule": "schedules",
    "TextToImageDiffTuningModule": "modules",
    "WeightedDiffTuningObjective": "objective",
}

__all__ = [
    "ControlNetDiffTuningModule",
    "DiTDiffTuningModule",
    "DiffTuningModule",
    "DiffTuningObjective",
    "ForgettingSchedule",
    "MeasuredSchedule",
    "MemoryBank",
    "MemoryBankDataModule",
    "MirroredPowerSchedule",
    "PowerSchedule",
    "SNRSchedule",
    "TextToImageDiffTuningModule",
    "WeightedDiffTuningObjective",
]


def __dir__() -> list[str]:
    """The public names, imported on first use."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing the package stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
