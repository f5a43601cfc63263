"""The chain of forgetting: how well the pre-trained network does the last steps of the reverse process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_difftune.callbacks.artifacts import artifact_folder, write_figure, write_table
from lightning_difftune.callbacks.bases import on_device
from lightning_difftune.callbacks.fid import DistanceCallback
from lightning_difftune.errors import ConfigError, DataError
from lightning_difftune.files import own_number
from lightning_difftune.metrics import FrechetDistance
from lightning_difftune.pictures import check_pictures
from lightning_difftune.plots import swap_figure


class ChainOfForgetting(DistanceCallback):
    """Leave the last p % of the reverse process to the pre-trained network and measure the pictures (Fig. 1).

    At the end of a validation every sample is generated once for each p, from the same noise: p = 0 is the tuned model
    alone, p = 100 the pre-trained one. All p share the tuned model's trajectory, so the default of eleven costs 6.5
    times the steps of one, not eleven times. The Fréchet distances to the real pictures are logged as
    ``fid/swap_30`` (or under the name of another extractor, see :class:`FID`) and written, with a curve and a strip of
    pictures, to ``chain-of-forgetting/step-0001000.csv``, ``.svg`` and ``.png``. If the distance falls before it rises,
    the tuned model has forgotten how to denoise near the data.

    Args:
        num_samples: Generated pictures per p.
        percents: The values of p, each in [0, 100].
        feature_extractor: As for :class:`FID`; ``None`` is Inception-v3.
        every_n_steps: Least number of optimizer steps between two evaluations in ``fit``; ``None`` is every validation.
        batch_size: Samples generated at a time.
        shown: Samples in the strip.
        reference: Real pictures, as for :class:`FID`; ``None`` asks the data module.
        generate: Maps sample indices (B,) int64 and P fractions in [0, 1] to pictures (P, B, 1 or 3, H, W) uint8;
            ``None`` asks the module's own ``generate_swapped``.
        cache_dir: Folder that caches statistics of the real pictures between runs.
        dirpath: Folder of the files; ``None`` is ``chain-of-forgetting`` in the logger's folder, or in the trainer's
            ``default_root_dir``.

    Raises:
        ConfigError: If a number is out of range or, when the trainer starts, if the module cannot generate swapped
            pictures or there are no real pictures.

    Example:
        >>> from lightning_difftune.callbacks import EMA
        >>> trainer = L.Trainer(callbacks=[EMA(), ChainOfForgetting(percents=(0, 20, 100))], logger=False)
    """

    method = "generate_swapped(indices, fractions)"
    function = "indices (B,) and P fractions that returns pictures (P, B, 1 or 3, H, W) uint8"

    def __init__(
        self,
        num_samples: int = 10_000,
        percents: Sequence[float] = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100),
        feature_extractor: nn.Module | None = None,
        every_n_steps: int | None = None,
        batch_size: int = 64,
        shown: int = 6,
        reference: Iterable[Tensor] | None = None,
        generate: Callable[[Tensor, Sequence[float]], Tensor] | None = None,
        cache_dir: str | Path | None = None,
        dirpath: str | Path | None = None,
    ) -> None:
        super().__init__(num_samples, feature_extractor, every_n_steps, batch_size, reference, generate, cache_dir)
        percents = [own_number(percent) for percent in percents]
        if not percents or not all(0 <= percent <= 100 for percent in percents) or shown < 1:
            raise ConfigError(
                "ChainOfForgetting needs percents in [0, 100] and a sample to show, found "
                f"percents {percents} and shown {shown}."
            )
        self.percents = sorted(set(percents))
        self.shown = shown
        self.dirpath = dirpath
        self.strip = torch.empty(0)
        self._folder = Path()

    @staticmethod
    def trajectories(settings: Mapping[str, Any]) -> float:
        """The tuned model's up to the last swap, which all p share, and p % of one for each: 6.5 by default."""
        percents = set(settings["percents"])
        return (100 - min(percents) + sum(percents)) / 100

    def claims(self) -> dict[str, str]:
        """The logged names, and the folder."""
        names = {f"the logged names '{self.monitor}/swap_...'": "Leave one out, or give it another feature_extractor."}
        folder = {f"the folder {self.dirpath or 'chain-of-forgetting'}": "Give one of them another dirpath."}
        return names | folder

    def logged(self) -> dict[str, float]:
        """The latest distances by logged name."""
        return {f"{self.monitor}/swap_{percent:g}": value for percent, value in (self.last_value or {}).items()}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, on all processes."""
        super().setup(trainer, pl_module, stage)
        self._folder = artifact_folder(trainer, self.dirpath, "chain-of-forgetting")

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Measure the distance for each p on all processes, log and plot them."""
        strip = []  # batches of the first samples, kept on the first process, which has them
        with on_device(self.distance, pl_module) as distance, self.progress(trainer) as progress:
            self.measure_reference(trainer, progress)
            distances = [FrechetDistance(distance.feature_extractor) for _ in self.percents]
            for swapped_distance in distances:
                swapped_distance.to(distance.device).load_real_state(distance.real_state())
            for batch in progress.track(self.share(trainer), description=f"{self.monitor}: swapped pictures"):
                swapped = self.swapped_pictures(trainer, pl_module, batch)
                for swapped_distance, pictures in zip(distances, swapped, strict=True):
                    swapped_distance.update(pictures.to(distance.device), real=False)
                strip.append(swapped[:, : max(0, self.shown - batch.start)].cpu())
            values = trainer.strategy.broadcast([swapped_distance.compute().item() for swapped_distance in distances])
        result = dict(zip(self.percents, values, strict=True))
        self.history.append((step, result))
        for name, value in self.logged().items():
            pl_module.log(name, value, reduce_fx="max", sync_dist=True)
        if trainer.is_global_zero:
            self.strip = torch.cat(strip, dim=1)
            path = self._folder / f"step-{step:07d}"
            write_table(path.with_suffix(".csv"), ("swapped_percent", self.monitor), result.items())
            name = self.distance.name
            write_figure(path, swap_figure({"tuned": result}, {"tuned": self.strip}, f"Fréchet distance ({name})"))

    def swapped_pictures(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: range) -> Tensor:
        """Pictures (P, B, 1 or 3, H, W) uint8 for sample indices, generated at the trainer's precision."""
        fractions = [percent / 100 for percent in self.percents]
        swapped, maker = self._generated(trainer, pl_module, batch, fractions)
        if not isinstance(swapped, Tensor) or swapped.shape[:2] != (len(self.percents), len(batch)):
            found = tuple(swapped.shape) if isinstance(swapped, Tensor) else type(swapped).__name__
            raise DataError(
                f"{maker} {found} for {len(self.percents)} fractions and {len(batch)} indices, expected pictures "
                f"({len(self.percents)}, {len(batch)}, 1 or 3, H, W) uint8."
            )
        check_pictures(swapped[0], maker)
        return swapped


def swap_meter(callbacks: Iterable[Callback]) -> ChainOfForgetting:
    """The run's own :class:`ChainOfForgetting`, or one with the settings of its other Fréchet distance."""
    distances = [callback for callback in callbacks if isinstance(callback, DistanceCallback)]
    if not distances:
        raise ConfigError(
            "The config has neither a ChainOfForgetting nor a FID callback that says how pictures are measured. Add "
            "one of them, such as by --trainer.callbacks+=lightning_difftune.callbacks.ChainOfForgetting."
        )
    own = next((callback for callback in distances if isinstance(callback, ChainOfForgetting)), None)
    if own is not None:
        return own
    like = distances[0]
    extractor = like.distance.feature_extractor
    chain = ChainOfForgetting(like.num_samples, feature_extractor=extractor, batch_size=like.batch_size)
    chain.reference, chain.cache = like.reference, like.cache
    return chain
