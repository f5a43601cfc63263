"""Fréchet distance between generated and real pictures, during validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lightning_difftune.callbacks.bases import MeasuringCallback, SampleCallback, on_device
from lightning_difftune.errors import ConfigError
from lightning_difftune.metrics import FrechetDistance, InceptionV3Features, ReferenceCache
from lightning_difftune.metrics.frechet import reference_key
from lightning_difftune.pictures import check_pictures
from lightning_difftune.protocols import SupportsReferenceImages


class DistanceCallback(MeasuringCallback, SampleCallback):
    """Base of callbacks that measure Fréchet distances between generated and real pictures.

    The sums over the real pictures are measured once or read from the cache. The extractor is on the accelerator only
    during an evaluation, and never in a checkpoint. For the arguments see :class:`FID`.
    """

    def __init__(
        self,
        num_samples: int,
        feature_extractor: nn.Module | None,
        every_n_steps: int | None,
        batch_size: int,
        reference: Iterable[Tensor] | None,
        generate: Callable[..., Tensor] | None,
        cache_dir: str | Path | None,
    ) -> None:
        super().__init__(num_samples, batch_size, every_n_steps, generate)
        self.history = []
        self.reference = reference
        self.cache = ReferenceCache(cache_dir) if cache_dir is not None else None
        self._distance = FrechetDistance(feature_extractor) if feature_extractor is not None else None
        self.reference_key: str | None = None  # of the wanted real sums: pictures and extractor
        self._ready: str | None = None  # key of the measured ones
        self._given: Any = None  # the reference of a key of an id, which is kept so that no other gets the id

    @property
    def distance(self) -> FrechetDistance:
        """The metric, made on first use if it needs the weights of Inception-v3."""
        if self._distance is None:
            self._distance = FrechetDistance(InceptionV3Features())
        return self._distance

    @property
    def monitor(self) -> str:
        """The logged name, for ``ModelCheckpoint(monitor=...)``."""
        return "fid" if self._distance is None else self._distance.key

    @property
    def state_key(self) -> str:
        """Distinguishes several of these callbacks with different extractors."""
        return self._generate_state_key(monitor=self.monitor, num_samples=self.num_samples)

    def claims(self) -> dict[str, str]:
        """The logged name."""
        return {f"the logged name '{self.monitor}'": "Leave one out, or give it another feature_extractor."}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the extractor and the reference, and log the extractor's name."""
        super().setup(trainer, pl_module, stage)
        if stage not in ("fit", "validate"):
            return
        source = self._source(trainer)
        name, is_fid = self.distance.name, self.monitor == "fid"
        rank_zero_info(
            f"Every value logged as '{self.monitor}' is a Fréchet distance through {name}, "
            f"{self.num_samples:,} generated pictures."
            + ("" if is_fid else " It is not FID: compare it with itself, at the same number of pictures.")
        )
        if is_fid and self.num_samples < self.distance.num_features:
            rank_zero_warn(
                f"{self.num_samples:,} pictures are too few to estimate the covariance of {name}'s "
                f"{self.distance.num_features:,} features: the distance comes out too large, and values compare only "
                f"at equal num_samples. Raise num_samples above {self.distance.num_features:,}."
            )
        if isinstance(source, SupportsReferenceImages):
            self.reference_key = reference_key(source.reference_identity(), self.distance.feature_extractor)
        else:
            self.reference_key, self._given = f"the reference given, {id(source)}", source
            if self.cache is not None:
                rank_zero_warn("The reference has no reference_identity(), so its statistics are not kept on disk.")

    def _source(self, trainer: L.Trainer) -> Iterable[Tensor] | SupportsReferenceImages:
        if self.reference is not None:
            return self.reference
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, SupportsReferenceImages):
            return datamodule
        raise ConfigError(
            f"{type(self).__name__} has no real pictures to compare with: the trainer's data module has no "
            "reference_images() and reference_identity(), and the callback was given no reference. Pass `reference=`: "
            "batches of pictures (B, 1 or 3, H, W) uint8, such as a list of tensors."
        )

    def measure_reference(self, trainer: L.Trainer, progress: Progress) -> None:
        """Fill the real sums if needed, from the cache on the first process or from the pictures on all."""
        if self._ready == self.reference_key:
            return
        source, distance = self._source(trainer), self.distance
        cache = self.cache if isinstance(source, SupportsReferenceImages) else None
        key = str(self.reference_key)
        distance.reset_real()
        self._ready = None
        state = cache.load(key) if cache is not None and trainer.is_global_zero else None
        if trainer.strategy.broadcast(state is not None):
            if state is not None:
                distance.load_real_state(state)
            count = distance.real_features_num_samples
        else:
            images = source.reference_images() if isinstance(source, SupportsReferenceImages) else source
            for number, pictures in enumerate(progress.track(images, description=f"{self.monitor}: real pictures")):
                if number % trainer.world_size == trainer.global_rank:
                    check_pictures(pictures, "The reference gave")
                    distance.update(pictures.to(distance.device), real=True)
            with distance.sync_context():
                count = distance.real_features_num_samples.clone()
                if cache is not None and trainer.is_global_zero:
                    cache.store(key, distance.real_state())
        self._ready = self.reference_key
        if self.monitor == "fid" and 0 < int(count) < distance.num_features:
            rank_zero_warn(
                f"FID compares with {int(count):,} real pictures, too few to estimate the covariance of "
                f"{distance.num_features:,} features: it comes out too large, and compares only with values against "
                "the same pictures. Hold out more, or set reference: train of the data."
            )

    @staticmethod
    def progress(trainer: L.Trainer) -> Progress:
        """A bar for long work, if the trainer shows bars."""
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        # Its own console: Lightning's bar is live on the global one.
        console = Console()
        return Progress(console=console, transient=True, disable=not shown or not console.is_terminal)


class FID(DistanceCallback):
    """Generate pictures at the end of a validation and log their Fréchet distance to real pictures.

    With Inception-v3 this is FID, logged as ``fid``. With any other extractor it is not, and is logged under the
    extractor's name, such as ``fd_efficientnet_lite0``; see :attr:`monitor`. Sample indices are distributed over the
    processes in batches of ``batch_size``, sums are float64, and sample i depends only on i, so the result does not
    depend on the number of GPUs. The extractor is on the accelerator only during the evaluation, and never in a
    checkpoint.

    Args:
        num_samples: Generated pictures; 10,000 in the paper.
        feature_extractor: Maps pictures uint8 (B, 1 or 3, H, W) to features (B, D); has ``num_features`` = D and, if it
            has one, a ``name``. ``None`` is :class:`~lightning_difftune.metrics.InceptionV3Features`.
        every_n_steps: Least number of optimizer steps between two evaluations in ``fit``; ``None`` is every validation.
        batch_size: Pictures generated at a time.
        reference: Real pictures in batches (B, 1 or 3, H, W) uint8, in the same order on all processes. ``None`` uses
            the data module's ``reference_images()``.
        generate: Maps sample indices (B,) int64 to pictures (B, 1 or 3, H, W) uint8; ``None`` uses the module's own
            ``generate``.
        cache_dir: Folder that caches statistics of the real pictures between runs. The reference needs a
            ``reference_identity()``, which data modules have.

    Raises:
        ConfigError: If a number is not positive or, when the trainer starts, if the module cannot generate pictures or
            there are no real ones.

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
        """Measure the distance on all processes and log it."""
        with on_device(self.distance, pl_module) as distance:
            with self.progress(trainer) as progress:
                self.measure_reference(trainer, progress)
                distance.reset()
                for batch in progress.track(self.share(trainer), description=f"{self.monitor}: generated pictures"):
                    distance.update(self.pictures(trainer, pl_module, batch).to(distance.device), real=False)
            value = trainer.strategy.broadcast(distance.compute().item())
        self.record(pl_module, self.monitor, value, step)
