"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_difftune.callbacks.steps import OptimizerStepCallback, newly_trained, same_objects
from lightning_difftune.errors import CheckpointError, ConfigError, check_counts
from lightning_difftune.models.checkpoints import differences
from lightning_difftune.trainers import last_step, refuse_sharding

KEPT_AT_MOST = 0.5  # of the weights at the start, in the averages at the end; the paper's runs keep 0.09


class EMA(OptimizerStepCallback):
    r"""Average the trained weights over the steps, and validate, test and predict with the average.

    After every optimizer step, :math:`\bar\theta \leftarrow \bar\theta + (1 - d)(\theta - \bar\theta)` in float32 for
    each parameter that requires a gradient when ``fit`` starts or from a later step on; frozen parameters and buffers
    are left alone and cost nothing. The averages replace the weights from ``on_validation_start`` to
    ``on_validation_end``, and likewise in test and predict; other callbacks see them in ``on_validation_epoch_end``, at
    any position in the list. A checkpoint always holds the raw weights in ``state_dict`` and the averages in this
    callback's state, so a resumed run is the same to the bit. (A checkpoint saved with ``save_weights_only`` has no
    averages.)

    Args:
        decay: d. Diff-Tuning's official code uses 0.9999 and samples from the average.
        warmup: Use min(d, (1 + n) / (10 + n)) after n steps, so that short runs forget their start.
        every_n_steps: k: update after every k-th optimizer step, with d^k in place of d. The averages are then read and
            written k times less often, 12 bytes per parameter each time, and are up to k - 1 steps old.

    Raises:
        ConfigError: If the decay is outside [0, 1), or ``every_n_steps`` is below 1; when the trainer starts, beside
            Lightning's ``WeightAveraging``, or if ``every_n_steps`` is above 1 with several optimizers.

    Example:
        >>> trainer = L.Trainer(callbacks=[EMA(decay=0.999)], logger=False)
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = False, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"The decay of EMA must be in [0, 1), found {decay}. The paper's code has 0.9999.")
        check_counts("EMA", every_n_steps=every_n_steps)
        self.decay = decay
        self.warmup = warmup
        self.every_n_steps = every_n_steps
        self.num_updates = 0
        self._averages: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}  # the averaged parameters; empty until a module is attached
        self._frozen: dict[str, nn.Parameter] = {}  # those of the module in training that are not averaged
        self._raw: dict[str, Tensor] = {}  # the weights, while the averages replace them
        self._narrow = False  # whether any weights have fewer bits than their averages
        self._restored = False

    @contextmanager
    def average_parameters(self, module: nn.Module) -> Iterator[None]:
        """Replace the weights of ``module`` by the averages inside a ``with`` block.

        Do not train inside: the parameters are the averages there.

        Raises:
            ConfigError: If there are no averages of this module.
            CheckpointError: If loaded averages do not fit it.
        """
        if not self._attach(module):
            raise ConfigError(
                f"EMA holds no averages of this {type(module).__name__}. Run trainer.fit with it first. After a fit in "
                "other processes, as by ddp_notebook, they are in the checkpoint: averages_in(torch.load(path)) of "
                "lightning_difftune.callbacks.ema."
            )
        if self._raw:  # they already replace the weights, in a validation
            yield
            return
        self._swap_in()
        try:
            yield
        finally:
            self._swap_out()

    # -- averaging ------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies that hold only a part of each parameter, and other averages in the weights' place."""
        refuse_sharding(trainer, "EMA averages")
        others = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
        if others:
            raise ConfigError(
                f"EMA and {type(others[0]).__name__} both put their averages in the weights' place, in validations and "
                "checkpoints, and one would get those of the other. Leave one out."
            )
        self._restored = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue the averages of the checkpoint or of the previous ``fit``, or start from the weights."""
        named = dict(pl_module.named_parameters())
        trained = {name: p for name, p in named.items() if p.requires_grad}
        if not trained:
            raise ConfigError("EMA has nothing to average: no parameter of the module requires a gradient.")
        if self.every_n_steps > 1 and len(trainer.optimizers) > 1:
            raise ConfigError(
                f"EMA(every_n_steps={self.every_n_steps}) counts the steps of {len(trainer.optimizers)} optimizers, so "
                "that its averages would be over fewer steps of each. Leave every_n_steps out."
            )
        before = self._parameters if self._parameters else named  # a part that was averaged may be frozen again
        trained |= {name: named[name] for name in self._averages if name in named and before.get(name) is named[name]}
        if self._averages and not self._parameters:  # loaded, from a checkpoint or by hand
            self._require_match(trained, str(trainer.ckpt_path or "the loaded state"))
        elif trainer.ckpt_path or not same_objects(self._parameters, trained):
            if trainer.ckpt_path:
                rank_zero_warn(f"{trainer.ckpt_path} holds no averages; EMA starts from its weights.")
            trained = {name: p for name, p in trained.items() if p.requires_grad}
            self._averages, self.num_updates = {}, 0
        self._parameters, self._narrow = {}, False
        self._frozen = {name: p for name, p in named.items() if name not in trained}
        self._include(trained)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Average parameters that were unfrozen since, which were the same in all steps so far."""
        self._include(newly_trained(self._frozen))

    def _include(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Average these parameters, from their weights if there are no averages of them."""
        for name, p in parameters.items():
            dtype = torch.promote_types(p.dtype, torch.float32)
            known = self._averages.get(name)
            self._averages[name] = p.detach().clone().to(dtype) if known is None else known.to(p.device, dtype)
            self._narrow |= p.dtype != dtype
            self._parameters[name] = p

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn of averages that will hardly move, which validations and samples would show in place of the weights."""
        super().on_train_start(trainer, pl_module)
        end = last_step(trainer)
        if end < 0 or self.warmup or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        updates = self.num_updates + (end - trainer.global_step) // self.every_n_steps
        kept = self.decay ** (self.every_n_steps * updates)
        if kept > KEPT_AT_MOST:
            rank_zero_warn(
                f"When this run ends, at step {end:,}, the averages of EMA(decay={self.decay}) will be {kept:.0%} "
                "the weights that it began with, and they are what is validated and sampled. Set warmup: true of EMA, "
                "or a lower decay."
            )

    @torch.no_grad()
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Update the averages, if due."""
        if not self.is_due(self.every_n_steps):
            return
        n = self.num_updates * self.every_n_steps
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        averages = list(self._averages.values())
        weights: list[Tensor] = [self._parameters[name] for name in self._averages]
        if self._narrow:
            weights = [weight.to(average.dtype) for weight, average in zip(weights, averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - decay**self.every_n_steps)
        self.num_updates += 1

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move off the accelerator together with the module."""
        for name, p in self._parameters.items():
            self._averages[name] = self._averages[name].to(p.device)

    # -- swapping -------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the averages in."""
        self._stand_in(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        self._swap_out()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the weights back, also before a checkpoint is saved because of the exception."""
        self._swap_out()

    def _stand_in(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Weights from a file without averages must not be replaced by averages of an earlier fit.
        of_other_weights = trainer.state.fn != TrainerFn.FITTING and bool(trainer.ckpt_path) and not self._restored
        if not of_other_weights and self._attach(pl_module):
            self._swap_in()
        else:
            rank_zero_info("EMA holds no averages of these weights; the weights themselves are used.")

    def _attach(self, module: nn.Module) -> bool:
        """Tie loaded averages to a module's parameters; whether the averages belong to this module."""
        named = dict(module.named_parameters())
        if not self._parameters and self._averages:
            averaged = {name: named[name] for name in self._averages.keys() & named.keys()}
            self._require_match(averaged, "the loaded state")
            self._parameters = {name: averaged[name] for name in self._averages}
        return bool(self._parameters) and all(named.get(name) is p for name, p in self._parameters.items())

    def _require_match(self, parameters: Mapping[str, nn.Parameter], source: str) -> None:
        problems = differences(self._averages, parameters)
        if problems:
            raise CheckpointError(
                f"The weight averages in {source} do not fit the model: {problems}. Use the model and tuner that they "
                "were saved with."
            )

    def _swap_in(self) -> None:
        # trainer.validate runs in inference mode, whose tensors cannot take part in guidance by gradients.
        with torch.inference_mode(False):
            self._raw = {name: p.data for name, p in self._parameters.items()}
            for name, p in self._parameters.items():
                p.data = self._averages[name].to(p)  # the same memory, unless the weights are of another type

    def _swap_out(self) -> None:
        for name, weights in self._raw.items():
            self._parameters[name].data = weights
        self._raw = {}

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the raw weights into a checkpoint that is saved while the averages replace them."""
        if self._raw:
            self._swap_out()
            try:
                checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
            finally:
                self._swap_in()

    def state_dict(self) -> dict[str, Any]:
        """``averages`` by parameter name, and ``num_updates``; empty before the first ``fit``."""
        return {"num_updates": self.num_updates, "averages": dict(self._averages)} if self._averages else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over averages; they are tied to the parameters of the next module."""
        if not {"num_updates", "averages"} <= state_dict.keys():
            raise CheckpointError(
                f"The state of EMA holds {sorted(state_dict)}, expected 'averages' and 'num_updates'. "
                "Pass what this callback's state_dict returned."
            )
        self._swap_out()
        self.num_updates = state_dict["num_updates"]
        self._averages = dict(state_dict["averages"])
        self._parameters = {}
        self._restored = True


def averages_in(checkpoint: Mapping[str, Any]) -> EMA | None:
    """The averaged weights that a checkpoint holds; ``None`` if there are none."""
    states = checkpoint.get("callbacks", {}).values()
    state = next((state for state in states if "averages" in state), None)
    if state is None:
        return None
    averages = EMA()
    averages.load_state_dict(state)
    return averages
