"""Bases of callbacks that evaluate generated pictures or measure repeatedly."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

from lightning_difftune.errors import CheckpointError, ConfigError, check_counts
from lightning_difftune.pictures import check_pictures
from lightning_difftune.trainers import has_validation, is_last_step, refuse_sharding, stops_early


class GenerationCallback(Callback, ABC):
    """Base of callbacks that generate pictures at the end of a validation, with the validated weights.

    Subclass it for an evaluation of your own: :meth:`evaluate` is called on every process when it is due, and
    generates its pictures in the batches of :meth:`batches`. With :class:`EMA` among the callbacks, the weights are
    the averaged ones. It is not called in Lightning's sanity check or ``fast_dev_run``. The global random state is
    restored afterwards, so the frequency of evaluations does not change the training. For a value that belongs in
    checkpoints and in the report, derive from
    :class:`~lightning_difftune.callbacks.MeasuringCallback` as well.

    Args:
        num_samples: Number of generated pictures, indices 0 .. num_samples - 1.
        batch_size: Pictures generated at a time.
        every_n_steps: Least number of optimizer steps between two runs in ``fit``; ``None`` runs at each validation.
            The last validation of a fit is never left out.

    Raises:
        ConfigError: If a number is not positive or, when the trainer starts, if its strategy shards parameters: the
            processes do not generate equally often, and would wait for each other.

    Example:
        >>> class Brightness(GenerationCallback):
        ...     def evaluate(self, trainer, pl_module, step):
        ...         pictures = [pl_module.generate(torch.tensor(batch)) for batch in self.batches()]
        ...         pl_module.log("brightness", torch.cat(pictures).float().mean())
        >>> Brightness(num_samples=10, batch_size=4, every_n_steps=None).batches()
        [range(0, 4), range(4, 8), range(8, 10)]
    """

    @staticmethod
    def trajectories(settings: Mapping[str, Any]) -> float:
        """Reverse processes that a sample costs with these arguments of the constructor, for ``difftune plan``."""
        return 1.0

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
        """Evaluate pictures of the weights after ``step`` optimizer steps; called on every process."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would mix its results with others or change the weights, and reset the step of the last run.

        Raises:
            ConfigError: If the strategy shards parameters, another callback has one of :meth:`claims` in common, or
                Lightning's ``WeightAveraging`` puts the weights back before this callback sees the averages.
        """
        name = type(self).__name__
        refuse_sharding(trainer, f"{name} generates pictures with")
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks:
            if other is self or not isinstance(other, GenerationCallback):
                continue
            for claim in self.claims().keys() & other.claims().keys():
                raise ConfigError(
                    f"{name} and another {type(other).__name__} have {claim} in common: the results of the one would "
                    f"be taken for those of the other. {self.claims()[claim]}"
                )
        before = takewhile(lambda callback: callback is not self, callbacks)
        averaging = next((callback for callback in before if isinstance(callback, WeightAveraging)), None)
        if averaging is not None and stage == "fit":
            raise ConfigError(
                f"{type(averaging).__name__} puts the trained weights back before {name} generates, so that its "
                f"pictures would not be of the averages that are validated. Move {type(averaging).__name__} behind "
                f"{name} in the list of callbacks, or use lightning_difftune.callbacks.EMA, which may stand anywhere "
                "in it."
            )
        self._checkpoint_step = self._latest_step = None

    def claims(self) -> dict[str, str]:
        """What no other callback may have in common, such as the logged name, and what to do if one has; in words."""
        return {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn, if there will be no validation."""
        warn_without_validation(trainer, self)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the step of the weights, which ``trainer.validate(ckpt_path=...)`` does not know."""
        self._checkpoint_step = checkpoint["global_step"]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run, if due."""
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        step = trainer.global_step if fitting or self._checkpoint_step is None else self._checkpoint_step
        last = self._latest_step
        waits = self.every_n_steps is not None and last is not None and step < last + self.every_n_steps
        if fitting and waits and not (is_last_step(trainer) or stops_early(trainer)):
            warn_of_followers(trainer, self)
            return
        with isolate_rng():
            self.evaluate(trainer, pl_module, step)
        self._latest_step = step

    def batches(self) -> list[range]:
        """The sample indices in fixed batches, the same on every process."""
        starts = range(0, self.num_samples, self.batch_size)
        return [range(start, min(start + self.batch_size, self.num_samples)) for start in starts]

    def share(self, trainer: L.Trainer) -> list[range]:
        """The batches of this process, if all processes take part."""
        return self.batches()[trainer.global_rank :: trainer.world_size]


class SampleCallback(GenerationCallback):
    """Base of callbacks that evaluate pictures generated from their indices alone.

    The pictures come from the function ``generate`` or, if that is ``None``, from the module's own ``generate``.
    """

    method = "generate(indices)"  # the module's method
    function = "indices (B,) that returns pictures (B, 1 or 3, H, W) uint8"  # the function that may replace it

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
        """Refuse at the start, not after an hour, a module that cannot generate pictures."""
        super().setup(trainer, pl_module, stage)
        if stage in ("fit", "validate"):
            generate, _ = self._generator(pl_module)
            whose = f"{type(pl_module).__name__}." if self.generate is None else "the function "
            check_takes(generate, whose + self.method, f"Pass `generate=`: a function of {self.function}.")

    def pictures(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: range) -> Tensor:
        """Pictures (B, 1 or 3, H, W) uint8 for sample indices, generated at the trainer's precision."""
        pictures, maker = self._generated(trainer, pl_module, batch)
        check_pictures(pictures, maker, len(batch))
        return pictures

    def _generated(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: range, *settings: Any
    ) -> tuple[Any, str]:
        """The generated pictures for sample indices, and the name of the function for messages."""
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

    A subclass sets ``self.history = []`` in its constructor and adds a (step, value) per evaluation. Checkpoints hold
    the history, so that a resumed run has all of it.
    """

    history: list[tuple[int, Any]]
    _latest_step: int | None = None

    @property
    def last_value(self) -> Any:
        """The latest value, or ``None`` before the first."""
        return self.history[-1][1] if self.history else None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the last value of the checkpoint again, for what monitors it before the next evaluation."""
        if self._latest_step is not None:
            for name, value in self.logged().items():
                trainer.callback_metrics.setdefault(name, torch.tensor(value))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Discard values of an earlier ``fit`` after the step that this one starts from."""
        self.history = [(step, value) for step, value in self.history if step <= trainer.global_step]
        super().on_train_start(trainer, pl_module)

    def record(self, pl_module: L.LightningModule, name: str, value: float, step: int) -> None:
        """Record and log a value that is the same on all processes."""
        self.history.append((step, value))
        # The maximum of equal values is that value to the bit; their mean need not be.
        pl_module.log(name, value, prog_bar=True, reduce_fx="max", sync_dist=True)

    def scores(self) -> dict[str, dict[str, Any]]:
        """The logged values that rank models, by name; none by default.

        Each has ``higher_is_better``, a ``label`` for figures and, if known, ``num_samples`` (generated pictures) and
        ``num_features`` (of the extractor), as plain JSON values. Runs write them to ``environment.json`` for
        ``difftune report``.
        """
        return {}

    def logged(self) -> dict[str, float]:
        """The latest values by logged name; none before the first."""
        return dict.fromkeys(self.scores(), self.last_value) if self.history else {}

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


def warn_without_validation(trainer: L.Trainer, callback: Callback) -> None:
    """Warn of a callback that acts at the end of validations in a run that has none."""
    if not has_validation(trainer):
        rank_zero_warn(
            f"{type(callback).__name__} acts at the end of validations, and this run has none, so that nothing will "
            "come of it. Set val_target of the data, and limit_val_batches of the trainer above 0."
        )


def warn_of_followers(trainer: L.Trainer, callback: Any) -> None:
    """Warn, where a callback does not measure, of what takes its last value for a new one."""
    names = callback.logged() if isinstance(callback, MeasuringCallback) else {}
    followers = [
        *(c for c in trainer.callbacks if isinstance(c, EarlyStopping)),  # type: ignore[attr-defined]
        *(c for c in trainer.checkpoint_callbacks if getattr(c, "save_top_k", 1) not in (0, 1)),
        *(config for config in trainer.lr_scheduler_configs if isinstance(config.scheduler, ReduceLROnPlateau)),
    ]
    for follower in followers:
        if (name := getattr(follower, "monitor", None)) in names:
            kind = type(getattr(follower, "scheduler", follower)).__name__
            rank_zero_warn(
                f"{kind} monitors {name}, which {type(callback).__name__} measures every {callback.every_n_steps} "
                f"steps: at the validations in between, {kind} takes the last value for a new one. Validate as seldom, "
                f"or leave every_n_steps of {type(callback).__name__} out."
            )


def check_takes(function: Callable[..., Any], call: str, fix: str) -> None:
    """Refuse a function that cannot be called with as many arguments as in ``call``, such as ``generate(indices)``.

    Raises:
        ConfigError: If it needs others; ``fix`` says what to do.
    """
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):  # one of C has none
        return
    try:
        found.bind(*[None] * (call.count(",") + 1))
    except TypeError as error:
        raise ConfigError(f"Pictures are generated by {call}, but that takes {found}: {error}. {fix}") from error


@contextmanager
def on_device(metric: Metric, pl_module: L.LightningModule) -> Iterator[Any]:
    """A metric on the module's device inside a ``with`` block; on the CPU for MPS, which has no float64."""
    try:
        yield metric.to("cpu" if pl_module.device.type == "mps" else pl_module.device)
    finally:
        metric.to("cpu")
