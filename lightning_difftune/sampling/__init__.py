"""The denoising loop: any diffusers scheduler, guidance, and a change of models between steps."""

from lightning_difftune.sampling.loop import Guided, Reverse, sample, swap
from lightning_difftune.sampling.sampler import AUTHORS, Sampler
from lightning_difftune.sampling.schedulers import (
    NoiseScheduler,
    adds_noise,
    ddim,
    ddim_for,
    is_flow,
    scheduler_named,
)

__all__ = [
    "AUTHORS",
    "Guided",
    "NoiseScheduler",
    "Reverse",
    "Sampler",
    "adds_noise",
    "ddim",
    "ddim_for",
    "is_flow",
    "sample",
    "scheduler_named",
    "swap",
]
