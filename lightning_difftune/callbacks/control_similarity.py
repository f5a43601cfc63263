"""Measures during validation how well generated pictures follow their controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_difftune.callbacks.artifacts import PictureLog
from lightning_difftune.callbacks.bases import GenerationCallback, MeasuringCallback, check_takes, on_device
from lightning_difftune.errors import ConfigError, DataError, check_counts, check_kinds
from lightning_difftune.pictures import check_pictures, grid_of, with_channels
from lightning_difftune.protocols import SupportsControlExamples

ROWS = ("control map", "drawn after it", "map found in what was drawn")  # of the pictures that are saved


@runtime_checkable
class SupportsControl(Protocol):
    """A module whose pictures follow control maps."""

    def generate_controlled(self, indices: Tensor, conditioning: Tensor, captions: Sequence[str]) -> Tensor:
        """Generate one picture per control map; the noise of sample i depends only on the seed and i.

        Args:
            indices: Sample indices (B,) int64.
            conditioning: Control maps (B, c, H, W) uint8, on any device.
            captions: B captions.

        Returns:
            Pictures (B, 3, H, W) uint8.
        """
        ...

    def annotate(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) uint8 on any device => their control maps (B, c, H, W) uint8."""
        ...


class ControlSimilarity(MeasuringCallback, GenerationCallback):
    """Generate pictures from held-out controls, annotate them, and log how similar the maps are.

    :class:`~lightning_difftune.callbacks.SuddenConvergence` finds its step on this curve (Appendix C of the paper).
    The controls are annotated once. Sample i has the same noise, control and caption every time. Examples are
    distributed over the processes in batches of ``batch_size`` and the metric is summed over processes, so the value,
    which is logged as :attr:`monitor`, does not depend on the number of GPUs.

    The first examples are shown in ``control/step-0001000.png`` and in every logger that takes images, one per
    column: the control at the top, the generated picture in the middle and its own map at the bottom.

    Eight pictures of 50 guided steps cost about as much as 100 training steps of batch 4. ``control/seconds`` is the
    duration of an evaluation, ``control/time_share`` the share of all of them in the time since training began. To
    reduce it, give the module's sampler fewer steps or raise ``every_n_steps``.

    Args:
        metric: Takes ``update(generated_maps, control_maps)`` with maps (B, c, H, W) uint8, such as
            :class:`~lightning_difftune.metrics.BlurredSSIM`.
        num_samples: Number of examples, the first held-out ones.
        every_n_steps: Least number of optimizer steps between two evaluations in ``fit``; ``None`` is every validation.
        batch_size: Pictures generated at a time.
        dirpath: Folder of the pictures; ``None`` is ``control`` in the logger's folder, or in the trainer's
            ``default_root_dir``.
        controls: Source of the held-out pictures and captions; ``None`` is the data module.
        num_shown: Examples in the picture.

    Raises:
        ConfigError: If a number is not positive or, when the trainer starts, if the module cannot generate from
            controls or there are too few held-out pictures.

    Example:
        >>> from lightning_difftune.metrics import BlurredSSIM
        >>> ControlSimilarity(BlurredSSIM(sigma=1)).monitor
        'control/ssim'
    """

    def __init__(
        self,
        metric: Metric,
        num_samples: int = 8,
        every_n_steps: int | None = None,
        batch_size: int = 4,
        dirpath: str | Path | None = None,
        controls: SupportsControlExamples | None = None,
        num_shown: int = 8,
    ) -> None:
        super().__init__(num_samples, batch_size, every_n_steps)
        check_counts("ControlSimilarity", num_shown=num_shown)
        check_kinds("ControlSimilarity", metric=(metric, Metric, "a metric, such as BlurredSSIM()"))
        self.metric = metric
        self.controls = controls
        self.num_shown = min(num_shown, num_samples)
        self.picture_log = PictureLog("control", dirpath)
        self.history = []
        self._annotated: dict[int, tuple[Tensor, list[str]]] = {}  # first index of a batch => its controls and captions
        self._training_since: float | None = None
        self._seconds_spent = 0.0
        self._warned = False

    @property
    def monitor(self) -> str:
        """The logged name: ``control/`` and the metric's ``key``, or its class if it has none."""
        return f"control/{getattr(self.metric, 'key', type(self.metric).__name__.lower())}"

    @property
    def state_key(self) -> str:
        """Distinguishes several of these callbacks with different metrics."""
        return self._generate_state_key(monitor=self.monitor, num_samples=self.num_samples)

    def claims(self) -> dict[str, str]:
        """The logged name."""
        return {f"the logged name '{self.monitor}'": "Leave one out, or give it another metric."}

    def scores(self) -> dict[str, dict[str, Any]]:
        """The similarity or error, with the metric's direction."""
        better = bool(getattr(self.metric, "higher_is_better", True))
        name = type(self.metric).__name__
        return {self.monitor: {"higher_is_better": better, "label": f"How well controls are followed ({name})"}}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse missing parts at the start, and log the cost of an evaluation."""
        super().setup(trainer, pl_module, stage)
        self.picture_log.locate(trainer)
        self._annotated.clear()
        self._training_since, self._seconds_spent, self._warned = None, 0.0, False
        if stage not in ("fit", "validate"):
            return
        module, way = _controlled(pl_module), "control_similarity.SupportsControl says what it takes and returns."
        check_takes(module.generate_controlled, "generate_controlled(indices, conditioning, captions)", way)
        check_takes(module.annotate, "annotate(pictures)", way)
        held_out = self._examples(trainer).num_control_examples
        if held_out < self.num_samples:
            raise ConfigError(
                f"ControlSimilarity needs {self.num_samples} examples, but only {held_out} are held out. Lower "
                "num_samples, or hold out more pictures."
            )
        steps = getattr(getattr(pl_module, "sampler", None), "num_inference_steps", None)
        rank_zero_info(
            f"Every value logged as '{self.monitor}' costs {self.num_samples} generated pictures"
            + (f" x {steps} denoising steps" if steps else "")
            + "; 'control/seconds' is how long that took, 'control/time_share' its share of the time in training."
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of ``control/time_share``."""
        super().on_train_start(trainer, pl_module)
        self._training_since = perf_counter()

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Generate, annotate and compare on all processes; log the value and the picture."""
        started = perf_counter()
        module = _controlled(pl_module)
        self.metric.reset()
        shown: dict[int, Tensor] = {}
        with on_device(self.metric, pl_module) as metric:
            for batch in self.share(trainer):
                controls, captions = self._controls_of(trainer, pl_module, batch)
                with trainer.precision_plugin.forward_context():
                    pictures = module.generate_controlled(
                        torch.tensor(batch, device=pl_module.device), controls.to(pl_module.device), captions
                    )
                check_pictures(pictures, f"{type(pl_module).__name__}.generate_controlled returned", len(batch))
                if pictures.shape[-2:] != controls.shape[-2:]:
                    raise DataError(
                        f"{type(pl_module).__name__}.generate_controlled returned pictures of "
                        f"{tuple(pictures.shape[-2:])} pixels for controls of {tuple(controls.shape[-2:])}."
                    )
                maps = _annotate(module, pictures)
                controls = with_channels(controls, maps.shape[1])
                metric.update(maps.to(metric.device), controls.to(metric.device))
                for row, index in enumerate(batch[: max(0, self.num_shown - batch.start)]):
                    column = (controls[row], pictures[row], maps[row])
                    shown[index] = torch.stack([cell.to("cpu").expand(3, -1, -1) for cell in column])
            value = trainer.strategy.broadcast(float(metric.compute()))
        columns = self._gather(trainer, pl_module.device, shown)
        if trainer.is_global_zero:
            rows = columns.transpose(0, 1).flatten(0, 1)  # (3 * num_shown, 3, H, W)
            self.picture_log.show(trainer, grid_of(rows, self.num_shown, ROWS), step, rows=", ".join(ROWS))
        self.record(pl_module, self.monitor, value, step)
        self._log_cost(trainer, pl_module, started)

    def _log_cost(self, trainer: L.Trainer, pl_module: L.LightningModule, started: float) -> None:
        now = perf_counter()
        pl_module.log("control/seconds", now - started, reduce_fx="max", sync_dist=True)
        if trainer.state.fn != TrainerFn.FITTING or self._training_since is None:
            return
        self._seconds_spent += now - started
        share = self._seconds_spent / (now - self._training_since)
        pl_module.log("control/time_share", share, reduce_fx="max", sync_dist=True)
        if share > 0.5 and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"ControlSimilarity has taken {share:.0%} of the time since training began, {now - started:.1f} s the "
                "last time. Raise every_n_steps, lower num_samples, or give the sampler fewer steps."
            )

    def _examples(self, trainer: L.Trainer) -> SupportsControlExamples:
        source = self.controls if self.controls is not None else getattr(trainer, "datamodule", None)
        if isinstance(source, SupportsControlExamples):
            return source
        raise ConfigError(
            "ControlSimilarity has no held-out pictures to take controls from: "
            f"{'`controls`' if self.controls is not None else 'the data module'} has no num_control_examples and "
            "control_examples(indices). Pass `controls=`: an object that has them, such as "
            "lightning_difftune.data.ControlExamples."
        )

    def _controls_of(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: range) -> tuple[Tensor, list[str]]:
        """Control maps (B, c, H, W) uint8 on the CPU, the source's own or annotated on first use, and captions."""
        if batch.start not in self._annotated:
            source = self._examples(trainer)
            pictures, captions, *own = source.control_examples(list(batch))
            maker = f"{type(source).__name__}.control_examples"
            check_pictures(pictures, f"{maker} returned", len(batch))
            if len(captions) != len(batch):
                raise DataError(f"{maker} returned {len(captions)} captions for {len(batch)} indices.")
            maps = own[0] if own else _annotate(_controlled(pl_module), pictures.to(pl_module.device))
            check_pictures(maps, f"{maker} returned control maps", len(batch))
            self._annotated[batch.start] = maps.cpu(), list(captions)
        return self._annotated[batch.start]

    def _gather(self, trainer: L.Trainer, device: torch.device, shown: dict[int, Tensor]) -> Tensor:
        """The columns (num_shown, 3, 3, H, W) of all processes, on each of them."""
        first = next(iter(shown.values()), None)
        shape = trainer.strategy.broadcast([] if first is None else list(first.shape))
        columns = torch.zeros(self.num_shown, *shape, dtype=torch.uint8, device=device)
        for index, column in shown.items():
            columns[index] = column
        return trainer.strategy.reduce(columns, reduce_op="sum").cpu()


def _controlled(pl_module: L.LightningModule) -> SupportsControl:
    if isinstance(pl_module, SupportsControl):
        return pl_module
    raise ConfigError(
        f"ControlSimilarity needs a module whose pictures follow control maps, but {type(pl_module).__name__} lacks "
        "`generate_controlled(indices, conditioning, captions)` or `annotate(pictures)`. Add the methods; "
        "lightning_difftune.callbacks.control_similarity.SupportsControl says what they take and return."
    )


def _annotate(module: SupportsControl, pictures: Tensor) -> Tensor:
    maps = module.annotate(pictures)
    check_pictures(maps, f"{type(module).__name__}.annotate returned", len(pictures))
    return maps
