"""The forgetting meter: at which noise levels a model learns the target, and where it forgets the source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_difftune.callbacks.artifacts import artifact_folder, write_figure, write_table
from lightning_difftune.callbacks.steps import OptimizerStepCallback
from lightning_difftune.draws import Draws
from lightning_difftune.errors import CheckpointError, ConfigError, DataError, check_counts
from lightning_difftune.plots import forgetting_figure
from lightning_difftune.protocols import Denoiser, SupportsDenoisingLosses
from lightning_difftune.schedules import fit_schedule
from lightning_difftune.trainers import evaluating, is_last_step, refuse_sharding

COST = 0.02  # share of the training time, at the default interval
PASSES = 3  # forward passes that cost about as much as forward and backward of the same batch


class ForgettingMeter(OptimizerStepCallback):
    """Measure the loss by noise level during training, and its gap to the frozen pre-trained model.

    The same few samples, with the same noise and timesteps, are denoised every time: held-out target data (evenly
    spaced, since these are often sorted by class) and samples of the memory bank (from the first training batches).
    The timesteps of a bin are spread evenly over it. It logs ``forgetting/target/t000-099``, the current loss, and
    ``forgetting_gap/target/t000-099``, the loss minus the pre-trained model's; likewise for ``bank``. A negative gap
    on the target is learning, a positive one on the bank is forgetting. The pre-trained model is loaded for one
    measurement at the start and dropped.

    At the end of training, ``forgetting/losses.csv``, a heat map of the relative loss over steps and timesteps
    (``forgetting.svg`` and ``.png``), and ``schedule.json``, a proposal for
    :class:`~lightning_difftune.schedules.MeasuredSchedule`, are written. Only the first process measures.

    Args:
        every_n_steps: Optimizer steps between two measurements; it also measures at the start, once there are enough
            samples of the bank, and at the last step. ``None`` chooses an interval that costs about 2 %
            of the training, counting a training step as three forward passes of each of its batches.
        num_bins: Bins of equal width over the T timesteps.
        num_samples: Samples per bin of each of the two kinds.
        seed: Seed of their noise.
        dirpath: Folder of the files; ``None`` is ``forgetting`` in the logger's folder, or in the trainer's
            ``default_root_dir``.

    Raises:
        ConfigError: If a number is not positive or, when training starts, if the module has no pre-trained network to
            compare with or there are no held-out data.

    Example:
        >>> trainer = L.Trainer(callbacks=[ForgettingMeter(num_bins=20)], logger=False)
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        num_bins: int = 10,
        num_samples: int = 16,
        seed: int = 0,
        dirpath: str | Path | None = None,
    ) -> None:
        check_counts("ForgettingMeter", every_n_steps=every_n_steps, num_bins=num_bins, num_samples=num_samples)
        self.every_n_steps = every_n_steps
        self.num_bins = num_bins
        self.num_samples = num_samples
        self.seed = seed
        self.dirpath = dirpath
        self.interval = every_n_steps
        self.edges: list[int] = []  # borders of the bins, num_bins + 1
        self.history: list[tuple[int, dict[str, list[float]]]] = []  # step, and losses by bin of each kind
        self.pretrained: dict[str, list[float]] = {}
        self._folder = Path()
        self._target: Any = None
        self._bank: Any = None
        self._probe: tuple[Tensor, Any, Tensor] | None = None  # x0, condition, is_retention; None until complete

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the module and find the folder, on all processes."""
        refuse_sharding(trainer, "ForgettingMeter measures")
        self._folder = artifact_folder(trainer, self.dirpath, "forgetting")
        if stage == "fit" and not isinstance(pl_module, SupportsDenoisingLosses):
            raise ConfigError(
                f"ForgettingMeter compares a module with the network it was tuned from, but {type(pl_module).__name__} "
                "lacks some of num_timesteps, prepare, denoise, pretrained, source_condition and denoising_losses. Add "
                "what protocols.SupportsDenoisingLosses lists, or remove the callback."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the held-out samples."""
        super().on_train_start(trainer, pl_module)
        self._probe, step = None, trainer.global_step
        steps: Any = pl_module.num_timesteps
        self.edges = [round(k * steps / self.num_bins) for k in range(self.num_bins + 1)]
        self.history = [(s, losses) for s, losses in self.history if s <= step] if step > 0 else []
        if not self.history:  # a new run, not a resumed one
            self._bank, self.pretrained = None, {}
        if not trainer.is_global_zero:
            return
        source: Any = trainer.fit_loop.epoch_loop.val_loop._data_source  # the data module's, or loaders given to fit
        loaders = source.dataloader() if source.is_defined() else None
        loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
        self._target = spread_over(loader, self.num_samples) if loader is not None else None
        if self._target is None:
            raise ConfigError(
                "ForgettingMeter needs held-out target data, but the validation data are empty. Set val_target of the "
                "data, or remove the callback."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Collect samples of the bank from the first batches, then measure the start of training."""
        if not trainer.is_global_zero or self._probe is not None:
            return
        target, retention = target_of(batch), batch.get("retention")
        if retention is not None and (self._bank is None or count_of(self._bank) < self.num_samples):
            bank = retention if self._bank is None else joined(self._bank, retention)
            self._bank = {name: column[: self.num_samples] for name, column in bank.items()}
            if count_of(self._bank) < self.num_samples:
                return
        self._start(trainer, pl_module, count_of(target) + (0 if retention is None else count_of(retention)))

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Measure, if due."""
        if self._probe is None or self.interval is None:
            return
        if self.is_due(self.interval) or is_last_step(trainer):
            self._record(trainer, pl_module, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the last step if that is left, write table, heat map and proposed schedule, and free the samples."""
        if self._probe is not None and self._latest_step != self._measured_step:
            self._record(trainer, pl_module, self._latest_step)
        self._target = self._probe = None
        if not trainer.is_global_zero or not self.history:
            return
        bins = list(zip(self.edges, self.edges[1:], strict=False))
        rows = [
            (step, kind, first, end - 1, loss, pretrained)
            for step, losses in self.history
            for kind, by_bin in losses.items()
            for (first, end), loss, pretrained in zip(bins, by_bin, self.pretrained[kind], strict=True)
        ]
        header = ("step", "data", "first_t", "last_t", "loss", "pretrained_loss")
        write_table(self._folder / "losses.csv", header, rows)
        write_figure(self._folder / "forgetting", forgetting_figure(self.history, self.pretrained, self.edges))
        levels = [(first + end + 1) / 2 / self.edges[-1] for first, end in bins]
        path = self._folder / "schedule.json"
        try:
            fit_schedule(path, levels, self.pretrained["target"], self.history[-1][1]["target"])
            rank_zero_info(f"The forgetting meter proposes the schedule {path} (lightning_difftune.MeasuredSchedule).")
        except (ConfigError, OSError) as error:
            rank_zero_warn(f"The forgetting meter proposes no schedule: {error}")

    # -- details ------------------------------------------------------------------------------------------------------

    def _start(self, trainer: L.Trainer, pl_module: Any, batch_size: int) -> None:
        """Prepare the samples once, and measure the pre-trained model."""
        batch = {"target": trainer.strategy.batch_to_device(self._target, dataloader_idx=0)}
        if self._bank is not None:
            self._bank = batch["retention"] = move_data_to_device(self._bank, pl_module.device)
        with evaluating(pl_module), trainer.precision_plugin.forward_context():
            self._probe = pl_module.prepare(batch, Draws(self.seed, 0, pl_module.device))
            if self.interval is None:
                passes = self.num_bins * len(self._probe[0])
                step = PASSES * batch_size * trainer.accumulate_grad_batches
                self.interval = math.ceil(passes / (COST * step))
            if not self.pretrained:
                condition = pl_module.source_condition(self._probe[1])
                self.pretrained = self._losses(pl_module, pl_module.pretrained(), condition)
        if not self.history or self.history[-1][0] < trainer.global_step:
            self._record(trainer, pl_module, trainer.global_step)

    def _losses(self, pl_module: Any, denoise: Denoiser, condition: Any) -> dict[str, list[float]]:
        """Mean loss of target and bank samples in each bin."""
        assert self._probe is not None
        x0, _, is_retention = self._probe
        kinds = {"target": ~is_retention, "bank": is_retention}
        kinds = {kind: mask for kind, mask in kinds.items() if bool(mask.any())}
        places = torch.zeros(len(x0), device=x0.device)  # positions in the bin, from 0 to 1, evenly for each kind
        for mask in kinds.values():
            count = int(mask.sum())
            places[mask] = (torch.arange(count, device=x0.device) + 0.5) / count
        means = []
        for k, (first, end) in enumerate(zip(self.edges, self.edges[1:], strict=False)):
            t = (first + places * (end - first)).long()
            noise = Draws(self.seed, k + 1, x0.device).normal(*x0.shape)
            losses = pl_module.denoising_losses(denoise, x0, condition, t, noise)
            means.append(torch.stack([losses[mask].mean() for mask in kinds.values()]))
        return dict(zip(kinds, torch.stack(means, dim=1).tolist(), strict=True))

    def _record(self, trainer: L.Trainer, pl_module: Any, step: int) -> None:
        """Measure the weights of this step and log the losses."""
        assert self._probe is not None
        with evaluating(pl_module), trainer.precision_plugin.forward_context():
            losses = self._losses(pl_module, pl_module.denoise, self._probe[1])
        self.history.append((step, losses))
        self._measured_step = step
        digits = len(str(self.edges[-1] - 1))
        scalars = {}
        for kind, by_bin in losses.items():
            for k, loss in enumerate(by_bin):
                name = f"{kind}/t{self.edges[k]:0{digits}}-{self.edges[k + 1] - 1:0{digits}}"
                scalars[f"forgetting/{name}"] = loss
                scalars[f"forgetting_gap/{name}"] = loss - self.pretrained[kind][k]
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)

    def state_dict(self) -> dict[str, Any]:
        """The measurements and the bank's samples, so that a resumed run measures the same samples."""
        return {"history": list(self.history), "pretrained": dict(self.pretrained), "bank": self._bank}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the measurements from before a run was resumed."""
        widths = {len(by_bin) for by_bin in state_dict["pretrained"].values()}
        if widths - {self.num_bins}:
            raise CheckpointError(
                f"The checkpoint's ForgettingMeter has {widths.pop()} bins, this one {self.num_bins}. Set num_bins to "
                "that of the run."
            )
        self.history, self.pretrained = list(state_dict["history"]), dict(state_dict["pretrained"])
        self._bank = state_dict["bank"]


def target_of(batch: Any) -> dict[str, Any]:
    """The target samples of a batch.

    Raises:
        DataError: If the batch is not a dict with some.
    """
    if isinstance(batch, Mapping) and isinstance(target := batch.get("target"), dict):
        return target
    raise DataError(
        'ForgettingMeter takes batches {"target": {...}, "retention": {...}} of columns of samples, the second as an '
        f"option; found a {type(batch).__name__}. Let the loaders return such dicts, or remove the callback."
    )


def spread_over(loader: Any, count: int) -> dict[str, Any] | None:
    """At most ``count`` target samples, evenly spaced over all batches of a loader; ``None`` if it is empty."""
    found: dict[str, Any] | None = None
    for batch in loader:
        chosen = evenly(target_of(batch), -(-count // len(loader)))
        found = chosen if found is None else joined(found, chosen)
    return None if found is None else evenly(found, count)


def evenly(samples: dict[str, Any], count: int) -> dict[str, Any]:
    """At most ``count`` samples of a dict of columns, evenly spaced."""
    there = count_of(samples)
    places = [place * there // count for place in range(count)] if count < there else list(range(there))
    return {
        name: column[places] if isinstance(column, Tensor) else [column[place] for place in places]
        for name, column in samples.items()
    }


def count_of(samples: dict[str, Any]) -> int:
    """Number of samples in a dict of columns."""
    return len(next(iter(samples.values())))


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The samples of two dicts of columns, tensors or lists."""
    return {
        name: torch.cat([column, second[name]]) if isinstance(column, Tensor) else [*column, *second[name]]
        for name, column in first.items()
    }
