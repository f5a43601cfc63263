"""Base of the Diff-Tuning modules of text-to-image pipelines: family, text and latents."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_difftune import conditions
from lightning_difftune.errors import ConfigError, check_choice
from lightning_difftune.models import FrozenAutoencoder
from lightning_difftune.modules.base import DiffTuningModule
from lightning_difftune.modules.families import Family, Pipeline
from lightning_difftune.modules.families.text import PromptConditions, with_guidance
from lightning_difftune.modules.family import Asked, Subject
from lightning_difftune.modules.optimization import adamw
from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.protocols import BankGenerator, BankPictures, RetentionBatch, TargetBatch, Tuner
from lightning_difftune.sampling import NoiseScheduler, Sampler
from lightning_difftune.source import SourceFacts


class TextPipelineModule(DiffTuningModule, ABC):
    """Base of the modules conditioned on text: a pipeline's frozen autoencoder and text encoders, and prompts.

    Sample i of the memory bank is drawn and retained under prompt i mod n of ``bank_prompts``; pictures of a
    ``bank_source`` are retained under a single one. What is specific to a class of pipelines is its
    :class:`~lightning_difftune.modules.families.Family`.

    Args:
        model: A text-to-image pipeline: hub repository or local folder in diffusers' layout, or the bundled
            ``"sd-nano-flowers"``.
        revision: Branch, tag or commit of a hub repository.
        image_size: Side of the pictures in pixels; by default the size that the network was made for.
        prompts: Prompts of generated pictures; picture i has prompt i mod n.
        bank_prompts: Prompts of the memory bank; by default the empty one, the unconditional branch.
        prompt_dropout: Probability that a target sample is shown without its caption.
        distilled_guidance: Guidance of a guidance-distilled network, such as FLUX.1-dev, in sampling and for the bank,
            which stores it as a column. By default 3.5; ``None`` for the other networks, which take none.
        target_guidance: Guidance of such a network for target samples; 1 by default.
        is_step_distilled: Whether the pipeline was distilled to a few steps, so that replay of its samples is refused.
            By default read from its files: few-step schedulers, and names such as Turbo.
        frozen_dtype: Precision of the text encoders, and of the pre-trained network under adapters (LoRA) and when it
            draws the bank. Trained weights are float32.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        channels_last: Keep the trained network's weights in the memory format that convolutions prefer on GPUs.
        objective: The loss of Eq. 5; by default MirroredPowerSchedule(tau=1) and the simple loss for the pipeline's
            prediction type and noise process, at the noise levels that its family is trained at.
        optimizer: Callable that takes the trainable parameters; by default AdamW, lr 1e-4, no weight decay.
        lr_scheduler: Callable that takes the optimizer; the scheduler steps every training step. Constant by default.
        tuner: A parameter-efficient method; ``None`` trains the whole network.
        sampler: How pictures are generated; unset fields are the family's, for Stable Diffusion DPM-Solver++ in 20
            steps with guidance 7.5.
        bank_sampler: How the memory bank is generated; unset fields are those of ``sampler``, without guidance.
        seed: Seed of the training draws, the generated pictures and the bank.

    Raises:
        ConfigError: If the prompts are empty lists, the dropout is out of range or, when the networks are built, if
            the objective or a sampler contradicts the pipeline.
    """

    family: Family
    autoencoder: FrozenAutoencoder
    sample_shape: tuple[int, ...] = ()  # (c, h, w) of the latents, once the pipeline is open

    def __init__(
        self,
        model: str | Path = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision: str | None = None,
        image_size: int | None = None,
        prompts: Sequence[str] = ("",),
        bank_prompts: Sequence[str] = ("",),
        prompt_dropout: float = 0.1,
        distilled_guidance: float | None = None,
        target_guidance: float | None = None,
        is_step_distilled: bool | None = None,
        frozen_dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
        channels_last: bool = False,
        objective: DiffTuningObjective | None = None,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        tuner: Tuner | None = None,
        sampler: Sampler | None = None,
        bank_sampler: Sampler | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            objective=objective,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            tuner=tuner,
            sampler=sampler,
            bank_sampler=bank_sampler,
            seed=seed,
        )
        check_choice(type(self).__name__, "frozen_dtype", frozen_dtype, "float32", "bfloat16")
        if not 0 <= prompt_dropout < 1:
            raise ConfigError(f"prompt_dropout must be in [0, 1), got {prompt_dropout}.")
        for name, given in {"prompts": prompts, "bank_prompts": bank_prompts}.items():
            if isinstance(given, str) or not given or not all(isinstance(prompt, str) for prompt in given):
                raise ConfigError(f"{name} is a list of one prompt or more, such as ['a cat', '']; got {given!r}.")
        self.model, self.revision, self.image_size = str(model), revision, image_size
        self.prompts, self.bank_prompts = tuple(prompts), tuple(bank_prompts)
        self.prompt_dropout = prompt_dropout
        self.distilled_guidance, self.target_guidance = distilled_guidance, target_guidance
        self.is_step_distilled = is_step_distilled
        self.frozen_dtype: torch.dtype = getattr(torch, frozen_dtype)
        self.gradient_checkpointing = gradient_checkpointing
        self.channels_last = channels_last

    # -- networks -------------------------------------------------------------------------------------------------

    def open_pipeline(self) -> Any:
        """Open the pipeline: return its denoising network, on the CPU, and keep the frozen parts in this module."""
        self.pipeline = Pipeline(self.model, self.revision)
        self.family = self.pipeline.family
        network = self.pipeline.open_network(self.frozen_dtype if hasattr(self.tuner, "disabled") else torch.float32)
        self.autoencoder = self.pipeline.open_autoencoder()
        size = self.image_size or self.family.sample_size(network) * self.autoencoder.downsample
        self.sample_shape = self.autoencoder.latent_shape(size, getattr(self.family, "patch_size", 1))
        self.text_encoder = self.family.open_text(self.model, self.revision, size, self.frozen_dtype)
        self._text = PromptConditions(self.text_encoder)
        self.family.check(self.model, network, self.text_encoder, self.sample_shape[0])
        self._guidance = self.pipeline.guidance(network, self.distilled_guidance, self.target_guidance)
        return network

    def facts(self, network: Any, **identity: Any) -> SourceFacts:
        """The facts of the pipeline."""
        num_tokens = self.sample_shape[1] * self.sample_shape[2] // 4
        return self.pipeline.facts(network, self.autoencoder.scale, num_tokens, **identity)

    def apply_memory_options(self, network: Any) -> None:
        """Apply gradient checkpointing and the memory format to a network that gradients flow through."""
        if self.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if self.channels_last:
            network.to(memory_format=torch.channels_last)

    def default_scheduler(self) -> NoiseScheduler:
        """The family's, such as DPM-Solver++."""
        return self.family.scheduler(self.source_facts)

    def default_sampler(self) -> Sampler:
        """The family's, such as 20 steps with guidance 7.5 on all channels."""
        return self.family.sampler()

    def default_bank_sampler(self) -> Sampler:
        """Those of :attr:`sampler`, without guidance: a sample replayed under a prompt is drawn under it alone."""
        return replace(self.sampler, guidance_scale=1.0)

    def bank_generator(self, pictures: BankPictures | None = None) -> BankGenerator:
        """What fills a memory bank; refused if replay would undo distillation, or no prompt fits its samples."""
        if pictures is not None and len(set(self.bank_prompts)) > 1:
            raise ConfigError(
                f"bank_prompts has {len(self.bank_prompts)} prompts, and which of them fits a picture of bank_source "
                "is not known. Set bank_prompts to one that fits all of its pictures, or to [''], the unconditional "
                "branch; the pictures' own captions are not used."
            )
        self.configure_model()
        if self.uses_retention and self.objective.retention_target is None:
            network, scheduler = self.trainable_modules()[0], self.source_facts.scheduler or {}
            self.pipeline.refuse_replay(network, scheduler, self.is_step_distilled, self.bank_prompts)
        return super().bank_generator(pictures)

    def on_fit_start(self) -> None:
        """Warn if guided samples of the bank would be replayed as if they were plain ones."""
        super().on_fit_start()
        scale = self.bank_sampler.guidance_scale
        if self.uses_retention and scale != 1 and any(self.bank_prompts):
            rank_zero_warn(
                f"The memory bank is drawn under {next(filter(None, self.bank_prompts))!r} with guidance {scale}, and "
                "is replayed as if the model drew like that without: the network learns its own guided samples. Set "
                "bank_sampler's guidance_scale to 1 to retain what it is."
            )

    # -- text -----------------------------------------------------------------------------------------------------

    def embed(self, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        """Conditions of a fixed list of n prompts, n rows by name, computed once."""
        return self._text.table(prompts, self.device)

    def null_text(self) -> dict[str, Tensor]:
        """The condition of a dropped prompt, in one row."""
        return self._text.table((), self.device)

    def prompted(self, prompts: Sequence[str], indices: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Condition of prompt i mod n for indices (B,), and as many rows of the null condition."""
        condition = conditions.take(self.embed(tuple(prompts)), (indices % len(prompts)).to(self.device))
        condition = with_guidance(condition, self._guidance and self._guidance[0])
        return condition, self.null_condition(condition)

    # -- hooks of the base ----------------------------------------------------------------------------------------

    def encode(self, batch: TargetBatch) -> TargetBatch:
        """Pictures (B, 3, H, W) and captions => latents' mean and std (B, c, h, w), and the captions' conditions."""
        if "captions" not in batch:
            raise ConfigError(
                f"{type(self).__name__} needs captions, and the target has none. A data set of (image, label) gets "
                "some from lightning_difftune.data.ClassCaptions."
            )
        if self._caches_captions:
            text = self._text.captions(batch["captions"], self.device)
        else:
            text = conditions.to(self.text_encoder.encode(batch["captions"]), self.device)
        return cast("TargetBatch", {**super().encode({"pixel_values": batch["pixel_values"]}), **text})

    @property
    def _caches_captions(self) -> bool:
        return getattr(getattr(self._trainer, "datamodule", None), "latent_cache_path", None) is not None

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The columns that a caption becomes, such as ``prompt_embeds``."""
        return tuple(self.null_text())

    def on_train_start(self) -> None:
        """If captions are cached, move the text encoders off the GPU, since they are rarely needed then."""
        if self._caches_captions:
            for prompts in (self.prompts, self.bank_prompts):
                self.embed(prompts)
            self.null_text()
            self._text.forget_captions()
            self.text_encoder.network.to("cpu")

    resize_hint = "Set the model's image_size."

    @property
    def condition_dropout(self) -> float:
        """Probability that a target sample is shown without its caption."""
        return self.prompt_dropout

    def encoder_identity(self) -> str | None:
        """Autoencoder with its scale, and text encoders."""
        return f"{self.autoencoder.identity()}; {self.text_encoder.fingerprint()}"

    def target_condition(self, target: TargetBatch) -> Any:
        """The captions' conditions."""
        columns = cast("dict[str, Tensor]", target)
        condition = {name: columns[name] for name in self.null_text()}
        return with_guidance(condition, self._guidance and self._guidance[1])

    def null_condition(self, condition: Any) -> Any:
        """The condition with the prompt's part replaced by the null condition."""
        null = self.null_text()
        return {name: null[name].expand_as(value) if name in null else value for name, value in condition.items()}

    def conditions(self, indices: Tensor) -> tuple[Any, Any]:
        """Picture i shows prompt i mod n."""
        return self.prompted(self.prompts, indices)

    def names_of(self, indices: Sequence[int]) -> list[str] | None:
        """Their prompts."""
        return [self.prompts[index % len(self.prompts)] for index in indices]

    def source_conditions(self, indices: Tensor) -> tuple[Any, Any]:
        """Sample i of the bank has prompt i mod n of ``bank_prompts``."""
        return self.prompted(self.bank_prompts, indices)

    def retention_condition(self, retention: RetentionBatch) -> Any:
        """The prompts that the bank's samples were drawn with."""
        condition = conditions.take(self.embed(self.bank_prompts), retention["class_labels"])
        stored: Any = retention
        return with_guidance(condition, self._guidance and stored.get("guidance", self._guidance[1]))

    def bank_columns(self, indices: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """The prompts' numbers and, if the network takes one, the guidance."""
        guidance = {} if self._guidance is None else {"guidance": torch.full((len(indices),), self._guidance[0])}
        return {"class_labels": indices % len(self.bank_prompts), **guidance}

    def picture_columns(self, latents: Tensor) -> dict[str, Tensor]:
        """The only prompt's number. Pictures were drawn with no guidance: they are retained with the target's."""
        return {"class_labels": torch.zeros(len(latents), dtype=torch.int64)}

    def bank_spec(self) -> dict[str, Any]:
        """The prompts and what encodes them."""
        guidance = {} if self._guidance is None else {"guidance": self._guidance[0]}
        return {"prompts": list(self.bank_prompts), "text_encoder": self.text_encoder.fingerprint(), **guidance}

    # -- requests of users ------------------------------------------------------------------------------------------

    pipeline_tag = "text-to-image"
    card_tags = ("stable-diffusion",)

    def subjects(self, asked: Asked) -> list[Subject]:
        """The requested prompts; by default the module's own."""
        asked.refuse("classes", because="it takes prompts; use --prompts.")
        asked.refuse("controls", "maps", because="it follows no control pictures.")
        return [Subject(prompt, prompt) for prompt in asked.prompts or self.prompts]

    def conditions_for(self, subjects: Sequence[Subject]) -> tuple[Any, Any]:
        """Their prompts, and the empty one."""
        return self.prompted(tuple(subject.asked for subject in subjects), torch.arange(len(subjects)))
