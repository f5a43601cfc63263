"""LightningModules, one a model family."""

from lightning_difftune.modules.base import DiffTuningModule
from lightning_difftune.modules.dit import DiTDiffTuningModule

__all__ = ["DiTDiffTuningModule", "DiffTuningModule"]
