"""Diff-Tuning of a model: the training step, validation, checkpoints and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric

from lightning_difftune.draws import Draws, float32_by_default
from lightning_difftune.errors import ConfigError, check_kinds
from lightning_difftune.losses import eps_mse_loss, hybrid_loss
from lightning_difftune.models.casts import WeightCasts, takes_its_own_type
from lightning_difftune.modules.bank_sources import EncodedPictures, PretrainedSamples
from lightning_difftune.modules.checkpoint_io import read_run
from lightning_difftune.modules.checkpoints import ARGUMENTS, arguments_of, complete, make_lean, rebuild
from lightning_difftune.modules.diffusion_model import DiffusionModel
from lightning_difftune.modules.optimization import ADAMW_RATE, adamw, default_rate, scheduler_config, step_plateaus
from lightning_difftune.modules.presets import announce
from lightning_difftune.modules.run_keeper import RunKeeper, refuse_weights_alone
from lightning_difftune.modules.step_losses import FiniteLoss, log_losses
from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.protocols import BankGenerator, BankPictures, Denoiser, DiffTuningBatch, Tuner
from lightning_difftune.sampling import Sampler
from lightning_difftune.source import LatentScale, SourceFacts


class DiffTuningModule(DiffusionModel):
    """Base of the Diff-Tuning modules: subclass it for a model family of your own.

    A subclass supplies what :class:`~lightning_difftune.modules.ModelFamily` lists; the training is here. Timesteps,
    noise and label dropout depend only on ``seed`` and the batch's index, so a run that is resumed or spread over more
    processes sees the same numbers.

    Args:
        objective: The loss of Eq. 5; the authors' preset by default. Its loss and forward process default to those of
            the model.
        optimizer: Callable that takes the trainable parameters; by default AdamW, lr 1e-4, no weight decay.
        lr_scheduler: Callable that takes the optimizer; the scheduler steps every training step. Constant by default. A
            length that is omitted or -1 is set to the run's; ``ReduceLROnPlateau`` steps after each validation, on
            ``val/loss`` or its ``monitor``.
        tuner: A parameter-efficient method; ``None`` trains all of :meth:`trainable_modules`.
        sampler: How pictures are generated; unset fields are those of :meth:`default_sampler`.
        bank_sampler: How the memory bank is generated; unset fields are those of ``sampler``.
        seed: Seed of the training draws, the generated pictures and the bank.

    Raises:
        ConfigError: When the networks are built, if the objective or a sampler contradicts the model.
    """

    def __init__(
        self,
        objective: DiffTuningObjective | None = None,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        tuner: Tuner | None = None,
        sampler: Sampler | None = None,
        bank_sampler: Sampler | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(sampler, bank_sampler, seed)
        check_kinds(
            type(self).__name__,
            optimizer=(optimizer, Callable, "a function, such as partial(torch.optim.AdamW, lr=1e-4)"),
            lr_scheduler=(lr_scheduler, Callable, "a function, such as partial(LinearLR, total_iters=500)"),
            tuner=(tuner, Tuner, "a tuner, such as LoRA(rank=8)"),
        )
        self.objective = objective if objective is not None else DiffTuningObjective()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.learning_rate: float | None = None  # in place of the optimizer's, as Lightning's `lr_find` sets it
        self.tuner = tuner
        # Lightning's own mean truncates the number of samples when several processes have an odd one.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.other_losses = nn.ModuleDict()
        self._is_built = False
        self._finite = FiniteLoss()

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Record the constructor's arguments for :meth:`load_from_checkpoint`."""
        module = super().__new__(cls)
        object.__setattr__(module, "_arguments", arguments_of(cls, args, options))
        return module

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        trust: Sequence[str] = (),
        **options: Any,
    ) -> Self:
        """Rebuild the module of a checkpoint, with its weights.

        Args:
            checkpoint_path: The file.
            map_location: Device of the module; the CPU by default.
            hparams_file: Not used: a checkpoint holds its module's arguments.
            strict: Whether the keys must match the module's exactly; its ``strict_loading`` by default.
            weights_only: ``False`` also opens objects other than tensors and plain values, which may run code.
            trust: Packages that the config in the checkpoint may name, as with ``difftune --trust``.
            options: Arguments that replace those of the checkpoint. A run from the command line saves all of them, one
                from Python only the plain values: pass the objects.

        Raises:
            CheckpointError: If the file is missing, damaged, or of another model.
            ConfigError: If an argument is missing; the message names it.
        """
        content = read_run(Path(checkpoint_path), weights_only=weights_only is not False)
        module = rebuild(cls, content, str(checkpoint_path), trust, options)
        module.configure_model()
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"], module.strict_loading if strict is None else strict)
        return module if map_location is None else module.to(map_location)

    def setup(self, stage: str) -> None:
        """Begin the means anew: an interrupted run left sums, and ``trainer.validate`` tensors of inference mode."""
        super().setup(stage)
        for mean in (self.val_loss, *self.other_losses.values()):
            cast("MeanMetric", mean).reset()

    @property
    def uses_retention(self) -> bool:
        """Whether the objective gives the memory bank any weight; false for tau = 0, which is plain fine-tuning."""
        return self.objective.uses_retention

    @float32_by_default()
    @torch.inference_mode(False)  # weights of inference mode could not be trained later
    def configure_model(self) -> None:
        """Build the networks and apply the tuner, once."""
        if self._is_built:
            return
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision(self.float32_matmul_precision)
        facts = self.build()
        if isinstance(facts, dict):
            facts = SourceFacts.of_identity(facts)
        if facts.latents is None and self.encoder_identity() is not None:
            facts = replace(facts, latents=LatentScale())  # an encoder means latents, of whatever scale
        self.objective = self.objective.of(facts)
        self.source_facts = self.objective.bind(facts)
        self.sampler = self.sampler  # completed and compared with the facts from here on
        self.bank_sampler = self.bank_sampler
        for network in self.trainable_modules():
            network.train(self.training)  # diffusers opens its models in eval mode
            takes_its_own_type(network)
            if self.tuner is not None:
                self.tuner.apply(network)
        self._weight_casts = WeightCasts(self.denoising_modules())
        self._is_built = True
        if self._trainer is None:  # a strategy moves it itself
            self.to(self.device)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check an objective, and bind one that is assigned after the model was built."""
        if name == "objective":
            kind = DiffTuningObjective, "an objective, such as DiffTuningObjective(PowerSchedule(tau=1.0))"
            check_kinds(type(self).__name__, objective=(value, *kind))
            if hasattr(self, "source_facts"):
                value = value.of(self.source_facts)
                self.source_facts = value.bind(self.source_facts)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Say of a network that is asked for too soon how it is built."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if not self.__dict__.get("_is_built", True) and not name.startswith("_"):
                error.add_note("The networks are built at the start of a fit; configure_model() builds them before.")
            raise

    # Weights may be asked for before a fit: these build the module first. After ddp_notebook, Lightning loads the
    # trained ones into a module that was built only in the other processes.

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters, of :meth:`parameters` as well."""
        self.configure_model()
        return super().named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """All weights and buffers."""
        self.configure_model()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Take over weights and buffers."""
        self.configure_model()
        return super().load_state_dict(*args, **kwargs)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every parameter that the optimizer sees."""
        parameters = [p for network in self.trainable_modules() for p in network.parameters() if p.requires_grad]
        if not parameters:
            raise ConfigError("Nothing is trainable: the tuner froze every parameter.")
        return parameters

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the trainable parameters and, if set, a scheduler stepped every training step."""
        optimizer = self.optimizer(self.trainable_parameters())
        if self.learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate
        if self.lr_scheduler is None:
            return optimizer
        default = ADAMW_RATE if self.optimizer is adamw else default_rate(optimizer)
        config: Any = scheduler_config(self.lr_scheduler, optimizer, self.trainer, default)
        return {"optimizer": optimizer, "lr_scheduler": config}

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a scheduler after an optimizer step; ``ReduceLROnPlateau`` steps after a validation instead."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            super().lr_scheduler_step(scheduler, metric)

    def on_validation_epoch_end(self) -> None:
        """Step the schedulers that follow a metric."""
        step_plateaus(self.trainer)

    def configure_callbacks(self) -> list[L.Callback]:
        """The :class:`RunKeeper` that every run needs; extend the list, do not replace it."""
        return [RunKeeper()]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip gradients, also for fused optimizers under bf16-mixed, which Lightning refuses because of fp16."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None and gradient_clip_val:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        """Announce what is about to be trained."""
        self._finite = FiniteLoss()
        self.source_facts = self.objective.bind(self.source_facts)  # its loss or schedule may have been assigned since
        announce(self)

    def bank_generator(self, pictures: BankPictures | None = None) -> BankGenerator:
        """What fills a memory bank: the pre-trained model, untouched by training, or the given pictures."""
        self.configure_model()
        if pictures is None:
            return PretrainedSamples(self, self.objective)
        return EncodedPictures(self, self.objective, pictures)

    def training_step(self, batch: DiffTuningBatch, batch_idx: int) -> Tensor:
        """One forward pass over both streams; logs the loss and its two terms.

        Raises:
            ConfigError: If only retention is trained and the batch has none.
            NumericsError: If a loss was not finite; checked every ``log_every_n_steps`` batches, before each checkpoint
                and at the end.
        """
        if self.objective.reconsolidation_weight == 0 and "retention" not in batch:
            raise ConfigError(
                "Nothing is learned: reconsolidation_weight is 0 and the data has no memory bank. Set bank: of the "
                "data to a folder, or raise reconsolidation_weight."
            )
        trainer = self._trainer  # without one, as under Fabric, a run is one epoch
        draws = self.draws(batch_idx if trainer is None else trainer.fit_loop.total_batch_idx)
        prepared = self.prepare(batch, draws)
        with self.weights_cast(self.denoise):
            output = self.objective(self.denoise, *prepared, draws, batch.get("retention"), self.teacher)
        self._finite.watch(batch_idx if trainer is None else trainer.global_step, output, prepared[2])
        every = 50 if trainer is None else trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and batch_idx % every == 0:
            self._finite.check(self)
        losses = {"train/loss": output.loss, "train/reconsolidation": output.reconsolidation}
        if "retention" in batch:
            losses["train/retention"] = output.retention
        log_losses(self, losses, self._place[1])
        return output.loss

    def on_train_end(self) -> None:
        """Check the losses since the last check."""
        self._finite.check(self)

    def validation_step(self, batch: DiffTuningBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val/loss`` on held-out target data, at the same timesteps and noise each time.

        Further loaders have ``val/loss/1`` and so on.
        """
        self._evaluate("val/loss", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: DiffTuningBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As :meth:`validation_step`, logged as ``test/loss``."""
        self._evaluate("test/loss", batch, batch_idx, dataloader_idx)

    def _evaluate(self, name: str, batch: DiffTuningBatch, batch_idx: int, dataloader_idx: int) -> None:
        rank, world_size = self._place
        draws = Draws(self.seed, batch_idx * world_size + rank, self.device)
        x0, condition, is_retention = self.prepare(batch, draws)
        output = self.objective(self.denoise, x0, condition, is_retention, draws)
        name = f"{name}/{dataloader_idx}" if dataloader_idx else name
        mean, attribute = self.val_loss, "val_loss"
        if name != "val/loss":
            if name not in self.other_losses:
                self.other_losses[name] = MeanMetric(nan_strategy="disable").to(self.device)
            mean, attribute = cast("MeanMetric", self.other_losses[name]), f"other_losses.{name}"
        count = len(next(iter(cast("Any", batch["target"]).values())))
        mean.update(output.reconsolidation.expand(count))  # not by weights: without NaN checks they have no effect
        self.log(name, mean, prog_bar=True, add_dataloader_idx=False, metric_attribute=attribute)

    @property
    def num_timesteps(self) -> int:
        """T of the forward process."""
        return self.objective.diffusion.num_timesteps

    def denoising_losses(self, denoise: Denoiser, x0: Tensor, condition: Any, t: Tensor, noise: Tensor) -> Tensor:
        """Simple losses (B,) of a network: those of the objective without weights or a variational term."""
        process = self.objective.diffusion
        x_t = process.add_noise(x0, noise, t)
        loss = eps_mse_loss if self.objective.loss is hybrid_loss else self.objective.loss
        return loss(denoise(x_t, t, condition), x0, x_t, noise, t, process)

    # -- checkpoints: the trained weights, and the identity of the rest -----------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen weights, add the identity of the base, and refuse weights that are not finite."""
        self._finite.check(self)
        make_lean(self, checkpoint)
        checkpoint[ARGUMENTS] = self._arguments

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base, and fill in the frozen weights of this one."""
        refuse_weights_alone(self._trainer, checkpoint)
        path = self._trainer.ckpt_path if self._trainer is not None else None
        complete(self, checkpoint, self.strict_loading, "The checkpoint" if path is None else str(path))
