"""Metrics without generated samples: held-out loss by noise level, and the autoencoder's reconstruction error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_difftune.draws import Draws
from lightning_difftune.errors import ConfigError, check_counts
from lightning_difftune.metrics.frechet import FrechetDistance
from lightning_difftune.metrics.sample_quality import check_labelled
from lightning_difftune.pictures import to_pixel_values
from lightning_difftune.protocols import SupportsDenoisingLosses, SupportsLabelledImages


class HeldOutLoss:
    """The denoising loss on held-out pictures by noise level, and its change from the pre-trained model.

    An evaluator of ``difftune compare``, for class-conditional modules. The pictures are evenly spaced over the
    held-out data; each is denoised once in every bin, at a timestep spread evenly over the bin, by the tuned network
    under its class and by the pre-trained one under the null class, at the same noise. ``held_out_loss/t000`` is the
    first bin's mean squared error, named after its lowest timestep, and ``held_out_gap/t000`` is tuned / pre-trained
    - 1: above 0, the tuned model has forgotten how to denoise at this level.

    Args:
        num_samples: Number of pictures.
        num_bins: Bins of equal width over the timesteps.
        batch_size: Pictures per batch.
        seed: Seed of the noise.

    Raises:
        ConfigError: If a number is not positive.
    """

    def __init__(self, num_samples: int = 1020, num_bins: int = 10, batch_size: int = 255, seed: int = 0) -> None:
        check_counts("HeldOutLoss", num_samples=num_samples, num_bins=num_bins, batch_size=batch_size)
        self.num_samples, self.num_bins, self.batch_size, self.seed = num_samples, num_bins, batch_size, seed

    def check(self, module: Any) -> None:
        """See :class:`~lightning_difftune.protocols.ChecksModule`.

        Raises:
            ConfigError: If the module cannot be compared with a pre-trained one, or its data has no labelled or no
                held-out pictures.
            DataError: If the pictures have captions instead of classes.
        """
        if not isinstance(module, SupportsDenoisingLosses):
            raise ConfigError(
                f"HeldOutLoss needs a module with what protocols.SupportsDenoisingLosses lists; found "
                f"{type(module).__name__}."
            )
        check_labelled(module, "HeldOutLoss")

    def evaluate(self, module: Any) -> dict[str, float]:
        """The losses and gaps, for the module's current weights. Raises what :meth:`check` does."""
        self.check(module)
        data = module.trainer.datamodule
        pictures, labels = (torch.cat(parts) for parts in zip(*data.labelled_images("val"), strict=True))
        chosen = torch.linspace(0, len(labels) - 1, min(self.num_samples, len(labels))).round().long()
        edges = [round(k * module.num_timesteps / self.num_bins) for k in range(self.num_bins + 1)]
        pretrained, training = module.pretrained(), module.training
        module.eval()  # drops no labels
        sums = torch.zeros(2, self.num_bins, dtype=torch.float64)
        with torch.no_grad(), module.trainer.precision_plugin.forward_context():
            for number, batch in enumerate(chosen.split(self.batch_size)):
                target = {"pixel_values": to_pixel_values(pictures[batch]), "class_labels": labels[batch]}
                target = {name: column.to(module.device) for name, column in target.items()}
                draws = Draws(self.seed, number, module.device)
                x0, condition, _ = module.prepare({"target": target}, draws)
                places = (torch.arange(len(x0), device=x0.device) + 0.5) / len(x0)
                for k, (first, end) in enumerate(pairwise(edges)):
                    t, noise = (first + places * (end - first)).long(), draws.normal(*x0.shape)
                    tuned = module.denoising_losses(module.denoise, x0, condition, t, noise)
                    before = module.denoising_losses(pretrained, x0, module.source_condition(condition), t, noise)
                    sums[:, k] += torch.stack([tuned.sum(), before.sum()]).cpu().double()
        module.train(training)
        digits = len(str(edges[-1] - 1))
        named = {f"t{first:0{digits}}": sums[:, k].tolist() for k, first in enumerate(edges[:-1])}
        return {f"held_out_loss/{name}": tuned / len(chosen) for name, (tuned, _) in named.items()} | {
            f"held_out_gap/{name}": tuned / before - 1 for name, (tuned, before) in named.items()
        }


@runtime_checkable
class SupportsReconstruct(Protocol):
    """A latent model, whose autoencoder is lossy."""

    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) uint8 => the same, encoded and decoded."""
        ...


class ReconstructionQuality:
    """Fréchet distances of training pictures and their reconstructions to the held-out pictures.

    An evaluator of ``difftune compare``, for modules that can ``reconstruct`` pictures. It uses only the autoencoder,
    so a run of 0 steps is enough. Its metrics show which part of a model's distance is not due to denoising:

    - ``fd_..._real`` (``fid_real`` with Inception-v3): distance of training pictures, which a perfect model would have;
    - ``fd_..._reconstructed``: of the same pictures encoded and decoded, which a perfect denoiser would have;
    - ``psnr``: the peak signal-to-noise ratio of the reconstructions in dB, 20 log10 255 - 10 log10 of the mean squared
      error of their uint8 values.

    Args:
        feature_extractor: Maps pictures uint8 (B, 1 or 3, H, W) to features (B, D); has ``num_features``.
        every: n: use every n-th training picture. Distances are higher with fewer pictures, so compare with models of
            as many samples.

    Raises:
        ConfigError: If ``every`` is not positive.
    """

    def __init__(self, feature_extractor: nn.Module, every: int = 1) -> None:
        check_counts("ReconstructionQuality", every=every)
        self.feature_extractor = feature_extractor
        self.every = every

    def check(self, module: Any) -> None:
        """See :class:`~lightning_difftune.protocols.ChecksModule`.

        Raises:
            ConfigError: If the data has no labelled or no held-out pictures, or the module cannot reconstruct them.
            DataError: If the pictures have captions instead of classes.
        """
        check_labelled(module, "ReconstructionQuality")
        if not isinstance(module, SupportsReconstruct):
            raise ConfigError(
                f"ReconstructionQuality needs reconstruct() of the module; {type(module).__name__} has none."
            )

    def evaluate(self, module: Any) -> dict[str, float]:
        """The metrics. Raises what :meth:`check` does."""
        self.check(module)
        data = module.trainer.datamodule
        real, reconstructed = (FrechetDistance(self.feature_extractor).to(module.device) for _ in range(2))
        squares, values = 0.0, 0
        with torch.no_grad():
            for pictures, _ in data.labelled_images("val"):
                real.update(pictures.to(module.device), real=True)
            reconstructed.load_real_state(real.real_state())
            for pictures in self._every_nth(data):
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

    def _every_nth(self, data: SupportsLabelledImages) -> Iterator[Tensor]:
        """Every n-th training picture uint8, in the batches of the data module."""
        seen = 0
        for pictures, _ in data.labelled_images("train"):
            kept = pictures[-seen % self.every :: self.every]
            seen += len(pictures)
            if len(kept):
                yield kept
