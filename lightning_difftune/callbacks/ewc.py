"""How far training has moved the weights from the pre-trained ones."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_difftune.callbacks.fisher import DiagonalFisher
from lightning_difftune.callbacks.penalty import add_penalty_gradient
from lightning_difftune.callbacks.weight_updates import (
    WeightUpdate,
    active_update,
    base_weight,
    factor_prefixes,
    full_precision,
    trained_updates,
)
from lightning_difftune.errors import CheckpointError, ConfigError


class EWC(Callback):
    r"""Log the squared L2 distance of the tunable parameters from their pre-trained values (Fig. 5 of the paper).

    ``ewc/total`` is :math:`\sum_i (\theta_i - \theta_i^0)^2`, ``ewc/mean`` is that divided by the number of parameters
    that are trained, and ``ewc/<block>`` are the parts of the total, with ``ewc/rest`` for what is in no block.

    :math:`\theta^0` are the values of the parameters that require a gradient when ``fit`` starts, so factors and
    adapters that a tuner has inserted count from their initial values, though the pre-trained network has none. The
    layers of ``peft`` that state their update of a weight, as LoRA's do, count by that update: merged minus original
    weight, alpha / r included, whatever the factors are. (DoRA's magnitudes are no such update and do not count.)

    With ``fisher`` the same distances weighted by the diagonal Fisher information,
    :math:`\sum_i F_i (\theta_i - \theta_i^0)^2`, are logged as ``ewc_fisher/total`` and ``ewc_fisher/<block>``: moves
    of weights that matter for the bank's samples count more. For LoRA, F is that of the merged weight.

    With ``penalty`` :math:`\lambda`, training minimises :math:`\frac\lambda2 \sum_i F_i (\theta_i - \theta_i^0)^2`
    besides (elastic weight consolidation; with F = 1 where no ``fisher`` is given). Its gradient is added where the
    optimizer is about to step: once a step however many batches are accumulated, after AMP has unscaled the gradients
    and DDP has averaged them, and before they are clipped. So it works in any module, and the training loss that is
    logged does not contain it; ``ewc/penalty`` is its value.

    Nothing is synchronized: under DDP all processes hold the same weights. A second ``fit`` of the same module, and a
    resumed one, measure from where the first began.

    Args:
        every_n_steps: Optimizer steps between two measurements; there is also one at the trainer's ``max_steps``. All
            of them are logged, whatever the trainer's ``log_every_n_steps``.
        blocks: Regular expression; parameters whose names have the same first match are one block, named after the
            match. The default is for ``blocks.3`` of transformers and ``down_blocks.1`` or ``mid_block`` of diffusers'
            UNets. ``None`` logs no blocks.
        offload: Keep the pre-trained values in the host's memory, not on the accelerator. They take as much memory as
            the parameters that are trained, and a measurement copies them over block by block.
        save_reference: Have checkpoints hold the pre-trained values, which makes them larger by the size of what is
            trained, twice that with ``fisher``. Without them a run cannot be resumed with this callback in a new
            process.
        fisher: How to estimate the Fisher information when training starts; ``None`` weights all alike.
        penalty: Lambda of the penalty; 0 only measures.

    Raises:
        ConfigError: If ``every_n_steps`` is not positive, ``blocks`` is no regular expression or ``penalty`` is
            negative.

    Example:
        >>> trainer = L.Trainer(callbacks=[EWC(every_n_steps=50)], logger=False)
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        blocks: str | None = r"\w*blocks\.\d+|mid_block",
        offload: bool = False,
        save_reference: bool = True,
        fisher: DiagonalFisher | None = None,
        penalty: float = 0.0,
    ) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps of EWC must be at least 1, found {every_n_steps}.")
        try:
            self._pattern = None if blocks is None else re.compile(blocks)
        except re.error as error:
            raise ConfigError(f"blocks of EWC must be a regular expression, found {blocks!r}: {error}.") from error
        if not penalty >= 0:
            raise ConfigError(f"penalty of EWC must be at least 0, found {penalty}.")
        self.every_n_steps = every_n_steps
        self.offload = offload
        self.save_reference = save_reference
        self.fisher = fisher
        self.penalty = penalty
        self._reference: dict[str, Tensor] | None = None  # None until a fit starts or a checkpoint brings it
        self._trained: dict[str, nn.Parameter] = {}  # empty until a module is seen
        self._updates: dict[str, WeightUpdate] = {}  # layers whose trained parameters count by their update
        self._information: dict[str, Tensor] | None = None  # the diagonal, by the names of both
        self._latest_step = 0

    @torch.no_grad()
    def measure(self, module: nn.Module) -> dict[str, Tensor]:
        """Distances of the weights that ``module`` has now, under the names they are logged by.

        Args:
            module: The one that was fitted, perhaps inside :meth:`EMA.average_parameters`.

        Returns:
            Scalar tensors on the module's device.

        Raises:
            ConfigError: If no ``fit`` of this module has started.
        """
        parameters = dict(module.named_parameters())
        reference = self._reference
        if reference is None or not self._trained or any(parameters.get(n) is not p for n, p in self._trained.items()):
            raise ConfigError(
                f"EWC has no pre-trained values of this {type(module).__name__}. Run trainer.fit with the callback "
                "first, and pass the same module."
            )
        blocks: dict[str, list[str]] = defaultdict(list)
        for name in [*reference, *self._updates]:
            blocks[self._block(name)].append(name)

        distances: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        for block, names in blocks.items():  # one after the other, to need little memory
            moves = self._moves(names, reference)
            distances[block] = nn.utils.get_total_norm(list(moves.values())).square()
            if self._information is not None:
                terms = [(self._information[name].to(move) * move.square()).sum() for name, move in moves.items()]
                weighted[block] = torch.stack(terms).sum()
        total = torch.stack(list(distances.values())).sum()
        logged = {"ewc/total": total, "ewc/mean": total / sum(p.numel() for p in self._trained.values())}
        parts = {"ewc": distances}
        if weighted:
            logged["ewc_fisher/total"] = total = torch.stack(list(weighted.values())).sum()
            parts["ewc_fisher"] = weighted
        if self.penalty:
            logged["ewc/penalty"] = self.penalty / 2 * total
        if self._pattern is not None:
            logged |= {f"{kind}/{block}": value for kind, values in parts.items() for block, value in values.items()}
        return logged

    def _moves(self, names: list[str], reference: dict[str, Tensor]) -> dict[str, Tensor]:
        """What has become of weights since the start, in float32 or better."""
        plain = [name for name in names if name in reference]
        weights = [full_precision(self._trained[name].detach()) for name in plain]
        starts = [reference[name].to(weight) for name, weight in zip(plain, weights, strict=True)]
        moves = dict(zip(plain, torch._foreach_sub(weights, starts), strict=True)) if plain else {}
        return moves | {name: active_update(self._updates[name]) for name in names if name in self._updates}

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies that hold only a part of each parameter."""
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise ConfigError(
                f"EWC measures whole parameters, but {type(trainer.strategy).__name__} shards them. "
                "Use strategy='ddp' or a single device."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the pre-trained values of the checkpoint or of the previous ``fit``, or those the module has.

        Raises:
            CheckpointError: If the checkpoint has none, or has those of other parameters.
            ConfigError: If nothing is trained.
        """
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        if not trained:
            raise ConfigError("EWC has nothing to measure: no parameter of the module requires a gradient.")
        updates = trained_updates(pl_module)
        factors = factor_prefixes(updates)
        plain = {name: p for name, p in trained.items() if not name.startswith(factors)}
        source = str(trainer.ckpt_path or "the loaded state")
        if self._reference is not None and not self._trained:  # loaded, from a checkpoint or by hand
            _require_match(self._reference, plain, source)
        elif self._trained.keys() != trained.keys() or any(self._trained[n] is not p for n, p in trained.items()):
            if trainer.ckpt_path:
                raise CheckpointError(
                    f"{source} does not hold the pre-trained values that EWC measures from, and its weights are no "
                    "longer those. Resume without EWC, or from a checkpoint of a run with EWC(save_reference=True)."
                )
            self._reference = {name: p.detach().clone() for name, p in plain.items()}
            self._information = None
        self._trained = trained
        self._updates = updates
        self._place()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step that a resumed run continues from, and estimate the Fisher information of a new one.

        Raises:
            CheckpointError: If the run is resumed and its checkpoint has no Fisher information.
        """
        self._latest_step = trainer.global_step
        assert self._reference is not None
        weights = {name: self._trained[name] for name in self._reference}
        weights |= {name: base_weight(layer) for name, layer in self._updates.items()}
        if self.fisher is None:
            self._information = None
        elif self._information is None:
            if trainer.global_step > 0:
                raise CheckpointError(
                    f"{trainer.ckpt_path or 'The earlier fit'} has no Fisher information, and the weights are no "
                    "longer those that it is estimated at. Resume without `fisher`, or from a run that had it."
                )
            self._information = self.fisher.estimate(trainer, pl_module, weights)
        else:
            _require_match(self._information, weights, str(trainer.ckpt_path or "the loaded state"))
        self._place()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty's gradient to those of the optimizer's parameters."""
        if not self.penalty:
            return
        assert self._reference is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # Fused optimizers undo fp16's scale later.
        strength = self.penalty
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            strength *= scaler.get_scale()
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = {name: p for name, p in self._trained.items() if id(p) in mine}
        add_penalty_gradient(strength, trained, self._reference, self._updates, self._information)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, if the optimizer has stepped and it is time to."""
        step = trainer.global_step
        if step == self._latest_step:
            return
        self._latest_step = step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            # Not by the module's log, which would give loggers this value again at each later step that they log.
            metrics = self.measure(pl_module)
            trainer.callback_metrics.update(metrics)
            if trainer.loggers:
                values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the accelerator together with the module."""
        self._place()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``reference`` and ``fisher`` by name; empty before the first ``fit`` or without ``save_reference``."""
        if not self.save_reference or self._reference is None:
            return {}
        information = {} if self._information is None else {"fisher": dict(self._information)}
        return {"reference": dict(self._reference), **information}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over pre-trained values; they are tied to a module's parameters when a ``fit`` starts.

        Raises:
            CheckpointError: If this is not the state of an EWC.
        """
        if "reference" not in state_dict:
            raise CheckpointError(
                f"The state of EWC holds {sorted(state_dict)}, expected 'reference'. Pass what this callback's "
                "state_dict returned."
            )
        self._reference = dict(state_dict["reference"])
        self._information = dict(state_dict["fisher"]) if "fisher" in state_dict else None
        self._trained = {}
        self._updates = {}

    # -- details ------------------------------------------------------------------------------------------------------

    def _block(self, name: str) -> str:
        match = self._pattern.search(name) if self._pattern is not None else None
        return match.group() if match else "rest"

    def _place(self) -> None:
        """Bring the pre-trained values to where they are kept."""
        if self._reference is not None and self._trained:
            devices = {name: "cpu" if self.offload else p.device for name, p in self._trained.items()}
            devices |= {name: "cpu" if self.offload else base_weight(x).device for name, x in self._updates.items()}
            for kept in (self._reference, self._information or {}):
                for name, tensor in kept.items():
                    kept[name] = tensor.to(devices[name])


def _require_match(reference: dict[str, Tensor], plain: dict[str, nn.Parameter], source: str) -> None:
    differing = sorted(
        name
        for name in reference.keys() | plain.keys()
        if name not in reference or name not in plain or reference[name].shape != plain[name].shape
    )
    if differing:
        raise CheckpointError(
            f"The pre-trained values of EWC in {source} do not fit what is trained: {len(differing)} tensors are "
            f"missing, unknown or of another shape, the first is {differing[0]}. Use the model and tuner of that run."
        )
