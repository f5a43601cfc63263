"""A small classifier of handwritten digits, which also supplies features for a Fréchet distance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_difftune.errors import ConfigError
from lightning_difftune.protocols import GeneratesClasses

BUNDLED = Path(__file__).parent / "weights" / "digit-classifier.safetensors"


class DigitClassifier(nn.Module):
    """Convolutional classifier of small grey digits with 64 features before its last layer.

    The bundled weights were trained by ``python -m pretraining.digit_classifier`` on the 4,000 training
    pictures of :class:`~lightning_difftune.data.HandwrittenDigits`, cropped to 24 and resized to 20 pixels as in the
    quickstart; the 1,000 held-out pictures measure its accuracy.

    As a feature extractor of :class:`~lightning_difftune.callbacks.FID` it gives a Fréchet distance that distinguishes
    digits, which ImageNet features do poorly at this size. It is not FID, and is logged as ``fd_digit_classifier``.

    Args:
        weights: Trained weights; ``None`` starts from random ones.
    """

    name = "FD-digit-classifier"
    num_features = 64

    def __init__(self, weights: str | Path | None = BUNDLED) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),  # 10 x 10
            *(nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2)),  # 5 x 5
            *(nn.Conv2d(48, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            *(nn.Linear(256, self.num_features), nn.ReLU()),
        )
        self.head = nn.Linear(self.num_features, 10)
        if weights is not None:
            self.load_state_dict(load_file(weights))
        self.eval().requires_grad_(weights is None)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 1, 20, 20) uint8 => features (B, 64) float32."""
        return self.features(images.float() / 255)

    def classify(self, images: Tensor) -> Tensor:
        """Pictures (B, 1, 20, 20) uint8 => digits (B,) int64."""
        with torch.inference_mode():
            return self.head(self(images)).argmax(1)


class RecognisedDigits:
    """Share of generated digits that :class:`DigitClassifier` recognises as the requested digit.

    Args:
        per_digit: Number of pictures per digit.
    """

    def __init__(self, per_digit: int = 20) -> None:
        self.classes = torch.arange(10).repeat_interleave(per_digit)
        self.classifier = DigitClassifier()

    def samples(self, module: GeneratesClasses) -> Tensor:
        """Pictures (10 * per_digit, 1, 20, 20) uint8 on the CPU, sorted by the requested digit."""
        return module.generate(torch.arange(len(self.classes)), module.class_conditions(self.classes)).cpu()

    def share(self, samples: Tensor) -> float:
        """The share of recognised samples, between 0 and 1."""
        return (self.classifier.classify(samples) == self.classes).float().mean().item()

    def check(self, module: Any) -> None:
        """See :class:`~lightning_difftune.protocols.ChecksModule`.

        Raises:
            ConfigError: If the module's classes are not the ten digits.
        """
        if (classes := getattr(module, "num_classes", None)) != 10:
            raise ConfigError(f"RecognisedDigits asks for ten digits; {type(module).__name__} has {classes} classes.")

    def evaluate(self, module: Any) -> dict[str, float]:
        """``recognised``: the share, for the module's current weights, at the trainer's precision."""
        with module.trainer.precision_plugin.forward_context():
            samples = self.samples(module)
        return {"recognised": self.share(samples)}
