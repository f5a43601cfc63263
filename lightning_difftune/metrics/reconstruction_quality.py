"""How good the pictures of a latent model can be at best: what its autoencoder makes of real ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_difftune.errors import ConfigError
from lightning_difftune.metrics.frechet import FrechetDistance
from lightning_difftune.protocols import SupportsLabelledImages


@runtime_checkable
class SupportsReconstruct(Protocol):
    """A model of latents, whose autoencoder loses a part of every picture."""

    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) uint8 => what encoding and decoding makes of them, of the same shape and type."""
        ...


class ReconstructionQuality:
    """Fréchet distances of training pictures and of their reconstructions to the held-out pictures.

    An evaluator of ``difftune compare``, for modules that can ``reconstruct`` pictures. It uses no network but the
    autoencoder, so a run of 0 steps is enough. Its figures say which part of a model's distance is not due to its
    denoising:

    - ``fd_..._real`` (``fid_real`` through Inception-v3): of training pictures as they are, which is what a perfect
      model would have;
    - ``fd_..._reconstructed``: of the same pictures encoded and decoded, which is what a perfect denoiser would have;
    - ``psnr``: the peak signal-to-noise ratio of the reconstructions in dB, 20 log10 255 - 10 log10 of the mean squared
      error of their uint8 values.

    Args:
        feature_extractor: Maps pictures uint8 (B, 1 or 3, H, W) to features (B, D); has ``num_features``.
        every: Of the training pictures, every n-th. Distances are higher with fewer pictures, so compare with
            models of as many samples.

    Raises:
        ConfigError: If ``every`` is not positive.
    """

    def __init__(self, feature_extractor: nn.Module, every: int = 1) -> None:
        if every < 1:
            raise ConfigError(f"every of ReconstructionQuality must be at least 1, found {every}.")
        self.feature_extractor = feature_extractor
        self.every = every

    def evaluate(self, module: Any) -> dict[str, float]:
        """The figures.

        Raises:
            ConfigError: If the data cannot show its pictures, or the module cannot reconstruct them.
        """
        data = module.trainer.datamodule
        for owner, needed, method in (
            (data, SupportsLabelledImages, "labelled_images() of the data module"),
            (module, SupportsReconstruct, "reconstruct() of the module"),
        ):
            if not isinstance(owner, needed):
                raise ConfigError(f"ReconstructionQuality needs {method}; {type(owner).__name__} has none.")
        real, reconstructed = (FrechetDistance(self.feature_extractor).to(module.device) for _ in range(2))
        squares, values = 0.0, 0
        with torch.no_grad():
            for pictures, _ in data.labelled_images("val"):
                real.update(pictures.to(module.device), real=True)
            reconstructed.load_real_state(real.real_state())
            for pictures in self.some(data):
                decoded = module.reconstruct(pictures)
                real.update(pictures.to(module.device), real=False)
                reconstructed.update(decoded, real=False)
                squares += (decoded.cpu().double() - pictures.double()).square().sum().item()
                values += pictures.numel()
        return {
            f"{real.key}_real": real.compute().item(),
            f"{real.key}_reconstructed": reconstructed.compute().item(),
            "psnr": 10 * math.log10(255**2 * values / squares) if squares else math.inf,
        }

    def some(self, data: SupportsLabelledImages) -> Iterator[Tensor]:
        """Every n-th training picture uint8, in the batches of the data module."""
        seen = 0
        for pictures, _ in data.labelled_images("train"):
            kept = pictures[-seen % self.every :: self.every]
            seen += len(pictures)
            if len(kept):
                yield kept
