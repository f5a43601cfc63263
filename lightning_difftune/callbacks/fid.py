"""Fréchet distance of generated to real pictures during validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn

from lightning_difftune.callbacks.distance import DistanceCallback
from lightning_difftune.metrics import InceptionV3Features


class FID(DistanceCallback):
    """Generate pictures at the end of a validation and log their Fréchet distance to real ones.

    Through Inception-v3 this is FID, logged as ``fid``. Through any other extractor it is not, and is logged under the
    extractor's own name, such as ``fd_efficientnet_lite0``; see :attr:`monitor`. Sample indices are dealt out to the
    processes in batches of ``batch_size``, sums are float64, and sample i depends on i alone, so one GPU and eight give
    the same number. The extractor is on the accelerator during the evaluation only, and never in a checkpoint.

    Args:
        num_samples: Generated pictures; the paper has 10,000.
        feature_extractor: Maps pictures uint8 (B, 1 or 3, H, W) to features (B, D); has ``num_features`` = D and, if it
            has one, a ``name``. ``None`` is :class:`~lightning_difftune.metrics.InceptionV3Features`.
        every_n_steps: Optimizer steps that must lie between two evaluations in ``fit``; ``None`` is every validation.
        batch_size: Pictures generated at a time.
        reference: Real pictures in batches (B, 1 or 3, H, W) uint8, in the same order on all processes. ``None`` asks
            the data module for its ``reference_images()``.
        generate: Maps sample indices (B,) int64 to pictures (B, 1 or 3, H, W) uint8; ``None`` asks the module's own
            ``generate``.
        cache_dir: Folder where statistics of the real pictures are kept between runs. It takes a reference that
            tells its identity, as data modules do (``reference_identity()``).

    Raises:
        ConfigError: If a number is not positive or, when the trainer starts, if there is nothing to generate pictures
            or to compare them with.

    Example:
        >>> from lightning_difftune.metrics import EfficientNetLite0Features
        >>> FID(num_samples=2_000, feature_extractor=EfficientNetLite0Features()).monitor
        'fd_efficientnet_lite0'
    """

    def __init__(
        self,
        num_samples: int = 10_000,
        feature_extractor: nn.Module | None = None,
        every_n_steps: int | None = None,
        batch_size: int = 64,
        reference: Iterable[Tensor] | None = None,
        generate: Callable[[Tensor], Tensor] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(num_samples, feature_extractor, every_n_steps, batch_size, reference, generate, cache_dir)

    def scores(self) -> dict[str, dict[str, Any]]:
        """The distance: lower is better."""
        extractor = InceptionV3Features if self._distance is None else self._distance.feature_extractor
        facts = {"num_samples": self.num_samples, "num_features": extractor.num_features}
        label = "FID" if self._distance is None else f"Fréchet distance ({self._distance.name})"
        return {self.monitor: {"higher_is_better": False, "label": label, **facts}}

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Measure the distance with all processes and log it."""
        with self.on_device(pl_module) as distance:
            with self.progress(trainer) as progress:
                self.measure_reference(trainer, progress)
                distance.reset()
                for batch in progress.track(self.share(trainer), description=f"{self.monitor}: generated pictures"):
                    distance.update(self.pictures(trainer, pl_module, batch).to(distance.device), real=False)
            value = trainer.strategy.broadcast(distance.compute().item())
        self.history.append((step, value))
        # All processes hold the same value; the maximum of them is that value to the bit, which a mean need not be.
        pl_module.log(self.monitor, value, prog_bar=True, reduce_fx="max", sync_dist=True)
