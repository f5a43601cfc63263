"""Metrics of generated pictures, as torchmetrics classes, and the networks that they use."""

from __future__ import annotations

from lightning_difftune.metrics.control_similarity import BlurredSSIM, ControlMSE, PixelAccuracy
from lightning_difftune.metrics.digit_classifier import DigitClassifier, RecognisedDigits
from lightning_difftune.metrics.extractors import EfficientNetLite0Features, InceptionV3Features
from lightning_difftune.metrics.frechet import FrechetDistance, ReferenceCache, frechet_distance
from lightning_difftune.metrics.held_out import HeldOutLoss, ReconstructionQuality
from lightning_difftune.metrics.sample_quality import SampleQuality

__all__ = [
    "BlurredSSIM",
    "ControlMSE",
    "DigitClassifier",
    "EfficientNetLite0Features",
    "FrechetDistance",
    "HeldOutLoss",
    "InceptionV3Features",
    "PixelAccuracy",
    "RecognisedDigits",
    "ReconstructionQuality",
    "ReferenceCache",
    "SampleQuality",
    "frechet_distance",
]
