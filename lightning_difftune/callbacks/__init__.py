"""Lightning callbacks for any project: they need methods of a module, never a class of this package."""

from __future__ import annotations

from lightning_difftune.callbacks.bases import GenerationCallback, MeasuringCallback
from lightning_difftune.callbacks.chain_of_forgetting import ChainOfForgetting
from lightning_difftune.callbacks.control_similarity import ControlSimilarity
from lightning_difftune.callbacks.ema import EMA
from lightning_difftune.callbacks.ewc import EWC
from lightning_difftune.callbacks.fid import FID
from lightning_difftune.callbacks.forgetting_meter import ForgettingMeter
from lightning_difftune.callbacks.preemption import Preemption
from lightning_difftune.callbacks.regional_compile import RegionalCompile
from lightning_difftune.callbacks.sample_grid import SampleGrid
from lightning_difftune.callbacks.sudden_convergence import SuddenConvergence

__all__ = [
    "EMA",
    "EWC",
    "FID",
    "ChainOfForgetting",
    "ControlSimilarity",
    "ForgettingMeter",
    "GenerationCallback",
    "MeasuringCallback",
    "Preemption",
    "RegionalCompile",
    "SampleGrid",
    "SuddenConvergence",
]
