"""Distance of the trained weights from the pre-trained ones."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor, nn

from lightning_difftune.callbacks.steps import OptimizerStepCallback, newly_trained, same_objects
from lightning_difftune.errors import CheckpointError, ConfigError, check_counts
from lightning_difftune.models.checkpoints import differences
from lightning_difftune.trainers import is_last_step, refuse_sharding


class EWC(OptimizerStepCallback):
    r"""Log the squared L2 distance of the tunable parameters from their pre-trained values (Fig. 5 of the paper).

    ``ewc/total`` is :math:`\sum_i (\theta_i - \theta_i^0)^2`, ``ewc/mean`` is this divided by the number of trained
    parameters, and ``ewc/<block>`` are the parts of the total, with ``ewc/rest`` for parameters outside all blocks.

    :math:`\theta^0` are the values of the parameters that require a gradient when ``fit`` starts, or of those that are
    unfrozen later, so the factors and adapters of a tuner count from their initial values, though the pre-trained
    network has none. Layers of ``peft`` with a weight update, such as LoRA's, count by that update: merged minus
    original weight, alpha / r included, instead of by their factors. (DoRA's magnitudes are not such an update and do
    not count.)

    Nothing is synchronized: under DDP all processes hold the same weights. A second or resumed ``fit`` of the same
    module measures from the start of the first.

    Args:
        every_n_steps: Optimizer steps between two measurements; the last step is measured as well. All of them are
            logged, independently of the trainer's ``log_every_n_steps``.
        blocks: Regular expression; parameters whose names have the same first match form one block, named after the
            match. The default matches ``blocks.3`` of transformers and ``down_blocks.1`` or ``mid_block`` of diffusers'
            UNets. ``None`` logs no blocks.
        offload: Keep the pre-trained values in the host's memory, not on the accelerator. They take as much memory as
            the trained parameters; a measurement copies them over block by block.
        save_reference: Save the pre-trained values in checkpoints, which adds the size of the trained parameters.
            Without them a run cannot be resumed with this callback in a new process.

    Raises:
        ConfigError: If ``every_n_steps`` is not positive or ``blocks`` is not a regular expression.

    Example:
        >>> trainer = L.Trainer(callbacks=[EWC(every_n_steps=50)], logger=False)
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        blocks: str | None = r"\w*blocks\.\d+|mid_block",
        offload: bool = False,
        save_reference: bool = True,
    ) -> None:
        check_counts("EWC", every_n_steps=every_n_steps)
        try:
            self._pattern = None if blocks is None else re.compile(blocks)
        except re.error as error:
            raise ConfigError(f"blocks of EWC must be a regular expression, found {blocks!r}: {error}.") from error
        self.every_n_steps = every_n_steps
        self.offload = offload
        self.save_reference = save_reference
        self._reference: dict[str, Tensor] | None = None  # None until a fit starts or a checkpoint is loaded
        self._trained: dict[str, nn.Parameter] = {}  # empty until a module is attached
        self._frozen: dict[str, nn.Parameter] = {}  # the module's other parameters, while it is trained
        self._updates: dict[str, WeightUpdate] = {}  # layers whose trained parameters count by their update
        self._latest: dict[str, float] = {}  # what was logged last, for callbacks that monitor it in a resumed run

    @torch.no_grad()
    def measure(self, module: nn.Module) -> dict[str, Tensor]:
        """Distances of the current weights of ``module``, by logged name.

        Args:
            module: The fitted module, possibly inside :meth:`EMA.average_parameters`.

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

        distances = {  # block by block, to save memory
            block: nn.utils.get_total_norm(self._moves(names, reference)).square() for block, names in blocks.items()
        }
        total = torch.stack(list(distances.values())).sum()
        logged = {"ewc/total": total, "ewc/mean": total / sum(p.numel() for p in self._trained.values())}
        if self._pattern is not None:
            logged |= {f"ewc/{block}": value for block, value in distances.items()}
        return logged

    def _moves(self, names: list[str], reference: dict[str, Tensor]) -> list[Tensor]:
        """Differences of weights from the start, in float32 or better."""
        plain = [name for name in names if name in reference]
        weights = [full_precision(self._trained[name].detach()) for name in plain]
        starts = [reference[name].to(weight) for name, weight in zip(plain, weights, strict=True)]
        moves = list(torch._foreach_sub(weights, starts)) if plain else []
        return moves + [active_update(self._updates[name]) for name in names if name in self._updates]

    # -- when ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse strategies that hold only a part of each parameter."""
        refuse_sharding(trainer, "EWC measures")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the pre-trained values of the checkpoint or of the previous ``fit``, or take the module's."""
        named = dict(pl_module.named_parameters())
        trained = {name: p for name, p in named.items() if p.requires_grad}
        if not trained:
            raise ConfigError("EWC has nothing to measure: no parameter of the module requires a gradient.")
        known, before = self._reference or {}, self._trained or named  # a part that was trained may be frozen again
        trained |= {name: named[name] for name in known if name in named and before.get(name) is named[name]}
        updates = trained_updates(pl_module)
        plain = plain_of(trained, updates)
        source = str(trainer.ckpt_path or "the loaded state")
        if self._reference is not None and not self._trained:  # loaded, from a checkpoint or by hand
            problems = differences(self._reference, plain)
            if problems:
                raise CheckpointError(
                    f"The pre-trained values of EWC in {source} do not fit what is trained: {problems}. Use the model "
                    "and tuner of that run."
                )
        elif not same_objects(self._trained, trained):
            if trainer.ckpt_path:
                raise CheckpointError(
                    f"{source} does not hold the pre-trained values that EWC measures from, and its weights are no "
                    "longer those. Resume without EWC, or from a checkpoint of a run with EWC(save_reference=True)."
                )
            trained = {name: p for name, p in trained.items() if p.requires_grad}
            self._reference = {name: p.detach().clone() for name, p in plain_of(trained, updates).items()}
            self._latest = {}
        self._trained, self._updates = trained, updates
        self._frozen = {name: p for name, p in named.items() if name not in trained}
        self._place()
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._latest.items()})

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Measure parameters that were unfrozen since from their values, which are still the pre-trained ones."""
        if found := newly_trained(self._frozen):
            self._trained, self._updates = self._trained | found, trained_updates(pl_module)
            fresh = {name: p.detach().clone() for name, p in plain_of(found, self._updates).items()}
            self._reference = (self._reference or {}) | fresh
            self._place()

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Measure, if due."""
        if self.is_due(self.every_n_steps) or is_last_step(trainer):
            self._log(trainer, pl_module, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the last step of a run that was ended by ``max_time`` or a callback."""
        if self._latest_step != self._measured_step:
            self._log(trainer, pl_module, self._latest_step)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        self._measured_step = step
        # Not by the module's log, which would repeat this value at each later step that is logged.
        metrics = self.measure(pl_module)
        trainer.callback_metrics.update(metrics)
        self._latest = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
        for logger in trainer.loggers:
            logger.log_metrics(self._latest, step=step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move off the accelerator together with the module."""
        self._place()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``reference`` and the ``latest`` values by name; empty before the first ``fit`` or without a reference."""
        if not self.save_reference or self._reference is None:
            return {}
        return {"reference": dict(self._reference), "latest": dict(self._latest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over pre-trained values; they are tied to a module's parameters when a ``fit`` starts."""
        if "reference" not in state_dict:
            raise CheckpointError(
                f"The state of EWC holds {sorted(state_dict)}, expected 'reference'. Pass what this callback's "
                "state_dict returned."
            )
        self._reference = dict(state_dict["reference"])
        self._latest = dict(state_dict.get("latest", {}))  # older checkpoints have none
        self._trained = {}
        self._updates = {}

    # -- details ------------------------------------------------------------------------------------------------------

    def _block(self, name: str) -> str:
        match = self._pattern.search(name) if self._pattern is not None else None
        return match.group() if match else "rest"

    def _place(self) -> None:
        """Move the pre-trained values to the device where they are kept."""
        if self._reference is not None and self._trained:
            for name, tensor in self._reference.items():
                self._reference[name] = tensor.to("cpu" if self.offload else self._trained[name].device)


@runtime_checkable
class WeightUpdate(Protocol):
    """A layer of ``peft`` whose adapters add to a weight."""

    adapter_layer_names: tuple[str, ...]
    active_adapters: list[str]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Merged minus original weight."""
        ...


def trained_updates(module: nn.Module) -> dict[str, WeightUpdate]:
    """The layers under ``module`` with an adapter that is trained, by name."""
    updates = {name: layer for name, layer in module.named_modules() if isinstance(layer, WeightUpdate)}
    return {
        name: layer
        for name, layer in updates.items()
        if any(
            p.requires_grad and n.split(".")[0] in layer.adapter_layer_names
            for n, p in module.get_submodule(name).named_parameters()
        )
    }


def plain_of(trained: dict[str, nn.Parameter], updates: dict[str, WeightUpdate]) -> dict[str, nn.Parameter]:
    """The trained parameters that are not factors of the updates."""
    factors = tuple(f"{name}.{part}." for name, layer in updates.items() for part in layer.adapter_layer_names)
    return {name: p for name, p in trained.items() if not name.startswith(factors)}


def active_update(layer: WeightUpdate) -> Tensor:
    """The sum of the updates of the layer's weight by its active adapters, in float32 or better."""
    parts = [getattr(layer, name, {}) for name in layer.adapter_layer_names]
    active = [name for name in layer.active_adapters if any(name in part for part in parts)]
    return torch.stack([full_precision(layer.get_delta_weight(name)) for name in active]).sum(0)


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if it is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
