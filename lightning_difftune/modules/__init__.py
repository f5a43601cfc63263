"""LightningModules, one per model family."""

from lightning_difftune.modules.base import DiffTuningModule
from lightning_difftune.modules.controlnet import ControlNetDiffTuningModule
from lightning_difftune.modules.diffusion_model import DiffusionModel
from lightning_difftune.modules.dit import DiTDiffTuningModule
from lightning_difftune.modules.family import ModelFamily
from lightning_difftune.modules.text_pipeline import TextPipelineModule
from lightning_difftune.modules.text_to_image import TextToImageDiffTuningModule

__all__ = [
    "ControlNetDiffTuningModule",
    "DiTDiffTuningModule",
    "DiffTuningModule",
    "DiffusionModel",
    "ModelFamily",
    "TextPipelineModule",
    "TextToImageDiffTuningModule",
]
