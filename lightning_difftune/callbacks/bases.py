"""What callbacks share that look at generated pictures, measure repeatedly, or act after optimizer steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_difftune.errors import CheckpointError, ConfigError, check_counts
from lightning_difftune.pictures import check_pictures


class GenerationCallback(Callback, ABC):
    """Base of callbacks that have pictures generated at the end of a validation, by the weights it was run with.

    Subclass it to examine pictures in your own way: :meth:`evaluate` is called when it is time, on every process, and
    generates what it needs, in the batches that :meth:`batches` gives. With :class:`EMA` among the callbacks,
    the weights are the averaged ones. It is not called in Lightning's sanity check or ``fast_dev_run``. The global
    random state is the same afterwards, so looking at samples more or less often does not change the training. For a
    value that should be in checkpoints and in the report, derive from
    :class:`~lightning_difftune.callbacks.MeasuringCallback` as well.

    Args:
        num_samples: How many pictures are generated: indices 0 .. num_samples - 1.
        batch_size: How many at a time.
        every_n_steps: Optimizer steps that must lie between two runs in ``fit``; ``None`` runs at each validation.

    Raises:
        ConfigError: If a number is not positive.

    Example:
        >>> class Brightness(GenerationCallback):
        ...     def evaluate(self, trainer, pl_module, step):
        ...         pictures = [pl_module.generate(torch.tensor(batch)) for batch in self.batches()]
        ...         pl_module.log("brightness", torch.cat(pictures).float().mean())
        >>> Brightness(num_samples=10, batch_size=4, every_n_steps=None).batches()
        [range(0, 4), range(4, 8), range(8, 10)]
    """

    trajectories: float = 1.0
    """Reverse processes that a sample costs, for ``difftune plan``."""

    def __init__(self, num_samples: int, batch_size: int, every_n_steps: int | None) -> None:
        counts = {"num_samples": num_samples, "batch_size": batch_size, "every_n_steps": every_n_steps}
        check_counts(type(self).__name__, **counts)
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.every_n_steps = every_n_steps
        self._latest_step: int | None = None
        self._checkpoint_step: int | None = None

    @abstractmethod
    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Look at pictures of the weights after ``step`` optimizer steps; called on every process."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget at which step it last ran."""
        self._checkpoint_step = self._latest_step = None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how far the weights are trained, which ``trainer.validate(ckpt_path=...)`` would not know."""
        self._checkpoint_step = checkpoint["global_step"]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run, if it is time to."""
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        step = trainer.global_step if fitting or self._checkpoint_step is None else self._checkpoint_step
        last = self._latest_step
        waits = self.every_n_steps is not None and last is not None and step < last + self.every_n_steps
        if fitting and waits and step != trainer.max_steps:
            return
        with isolate_rng():
            self.evaluate(trainer, pl_module, step)
        self._latest_step = step

    def batches(self) -> list[range]:
        """The sample indices in fixed batches, the same on every process."""
        starts = range(0, self.num_samples, self.batch_size)
        return [range(start, min(start + self.batch_size, self.num_samples)) for start in starts]

    def share(self, trainer: L.Trainer) -> list[range]:
        """The batches that this process looks at, where all of them take part."""
        return self.batches()[trainer.global_rank :: trainer.world_size]


class SampleCallback(GenerationCallback):
    """Base of callbacks that look at pictures asked for by their indices alone.

    The pictures come from the function ``generate`` or, if that is ``None``, from the module's own ``generate``.
    """

    method = "generate(indices)"  # of the module
    function = "indices (B,) that returns pictures (B, 1 or 3, H, W) uint8"  # that is given in its place

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        every_n_steps: int | None,
        generate: Callable[..., Tensor] | None,
    ) -> None:
        super().__init__(num_samples, batch_size, every_n_steps)
        self.generate = generate

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say at the start, not after an hour, that nothing can generate pictures."""
        super().setup(trainer, pl_module, stage)
        if stage in ("fit", "validate"):
            self._generator(pl_module)

    def pictures(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: range) -> Tensor:
        """Pictures (B, 1 or 3, H, W) uint8 for sample indices, generated at the trainer's precision."""
        pictures, maker = self._generated(trainer, pl_module, batch)
        check_pictures(pictures, maker, len(batch))
        return pictures

    def _generated(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: range, *settings: Any
    ) -> tuple[Any, str]:
        """What is generated for sample indices, and who returned it, for messages."""
        generate, maker = self._generator(pl_module)
        with trainer.precision_plugin.forward_context():
            return generate(torch.tensor(batch, device=pl_module.device), *settings), maker

    def _generator(self, pl_module: L.LightningModule) -> tuple[Callable[..., Tensor], str]:
        if self.generate is not None:
            return self.generate, "The function `generate` returned"
        name = self.method.partition("(")[0]
        own = getattr(pl_module, name, None)
        if own is not None:
            return own, f"{type(pl_module).__name__}.{name} returned"
        raise ConfigError(
            f"{type(self).__name__} needs pictures, but {type(pl_module).__name__} has no method `{self.method}` and "
            f"the callback was given none. Add the method, or pass `generate=`: a function of {self.function}."
        )


class MeasuringCallback(Callback):
    """Base of callbacks that measure the same thing repeatedly.

    A subclass has ``self.history = []`` in its constructor and adds a (step, value) for each evaluation. The history is
    part of checkpoints, so that a resumed run has all of it.
    """

    history: list[tuple[int, Any]]
    _latest_step: int | None = None

    @property
    def last_value(self) -> Any:
        """The latest value, or ``None`` before the first."""
        return self.history[-1][1] if self.history else None

    def record(self, pl_module: L.LightningModule, name: str, value: float, step: int) -> None:
        """Keep a value that all processes hold, and log it."""
        self.history.append((step, value))
        # The maximum of equal values is that value to the bit, which their mean need not be.
        pl_module.log(name, value, prog_bar=True, reduce_fx="max", sync_dist=True)

    def scores(self) -> dict[str, dict[str, Any]]:
        """What it logs that tells a better model from a worse one, by name; none by default.

        Each has ``higher_is_better``, a ``label`` for figures and, where they are known, ``num_samples`` (generated
        pictures) and ``num_features`` (of the extractor), as plain JSON values. Runs write it to their
        ``environment.json``, from which ``difftune report`` has it.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The history of (step, value)."""
        return {"history": list(self.history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the history."""
        if "history" not in state_dict:
            raise CheckpointError(
                f"The state of {type(self).__name__} holds {sorted(state_dict)}, expected 'history'. Pass what this "
                "callback's state_dict returned."
            )
        self.history = [(int(step), value) for step, value in state_dict["history"]]
        self._latest_step = self.history[-1][0] if self.history else None


class OptimizerStepCallback(Callback, ABC):
    """Base of callbacks that act after an optimizer step, which with accumulated gradients is not every batch."""

    _latest_step = 0

    @abstractmethod
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Act on the weights after ``step`` optimizer steps."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step that a resumed run continues from."""
        self._latest_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act, if the optimizer has stepped."""
        if trainer.global_step != self._latest_step:
            self._latest_step = trainer.global_step
            self.after_step(trainer, pl_module, trainer.global_step)


def refuse_sharding(trainer: L.Trainer, needs: str) -> None:
    """Refuse strategies that hold only a part of each parameter, for a callback that needs whole parameters."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ConfigError(
            f"{needs} whole parameters, but {type(trainer.strategy).__name__} shards them. Use strategy='ddp' or a "
            "single device."
        )


def same_objects(ours: Mapping[str, nn.Parameter], theirs: Mapping[str, nn.Parameter]) -> bool:
    """Whether the same parameters have the same names."""
    return ours.keys() == theirs.keys() and all(p is theirs[name] for name, p in ours.items())


@contextmanager
def on_device(metric: Metric, pl_module: L.LightningModule) -> Iterator[Any]:
    """A metric, on the module's device inside a ``with`` block; it stays on the CPU for MPS, which has no float64."""
    try:
        yield metric.to("cpu" if pl_module.device.type == "mps" else pl_module.device)
    finally:
        metric.to("cpu")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A ``with`` block without gradients in which a module is in evaluation mode; its parts get their modes back."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
