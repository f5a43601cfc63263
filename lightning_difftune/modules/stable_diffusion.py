"""What the Diff-Tuning modules of Stable Diffusion pipelines share: text, latents and the noise schedule."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_difftune.diffusion import GaussianDiffusion
from lightning_difftune.draws import Draws
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.losses import eps_mse_loss
from lightning_difftune.models import FrozenAutoencoder, FrozenTextEncoder
from lightning_difftune.models.checkpoint_files import read_json
from lightning_difftune.models.diffusers_folder import folder_of, open_network
from lightning_difftune.modules.base import DiffTuningModule, adamw
from lightning_difftune.modules.subjects import Subject, refuse
from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.protocols import DiffTuningBatch, RetentionBatch, TargetBatch, Tuner
from lightning_difftune.sampling import Sampler


def stable_diffusion_process() -> GaussianDiffusion:
    """Stable Diffusion's forward process: betas whose roots rise linearly, 0.00085 to 0.012 over 1000 steps."""
    return GaussianDiffusion(1000, 0.00085, 0.012, "scaled_linear")


def stable_diffusion_objective() -> DiffTuningObjective:
    """Eq. 5 with the simple loss over Stable Diffusion's forward process."""
    return DiffTuningObjective(loss=eps_mse_loss, diffusion=stable_diffusion_process())


def stable_diffusion_sampler(num_inference_steps: int = 20, guidance_scale: float = 7.5) -> Sampler:
    """DPM-Solver++ over Stable Diffusion's betas: 20 steps of it stand for the 50 of DDIM that the paper has."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Sampler(scheduler, num_inference_steps, guidance_scale, guidance_channels=None)


class StableDiffusionModule(DiffTuningModule, ABC):
    """Base of the modules whose condition is text: the frozen autoencoder and text encoder of a pipeline, and prompts.

    The memory bank's sample i has prompt i mod n of ``bank_prompts`` and is retained under it; the default is the empty
    prompt, the unconditional branch. Subclasses load the networks that denoise.

    Args:
        model: A Stable Diffusion pipeline: hub repository or local folder in diffusers' layout, or the bundled
            ``"sd-nano-flowers"``.
        revision: Branch, tag or commit of a hub repository.
        image_size: Side of the pictures in pixels; by default the size that the UNet was made for.
        prompts: What generated pictures show; picture i has prompt i mod n.
        bank_prompts: The prompts that the memory bank is drawn with.
        prompt_dropout: Probability that a target sample is shown without its caption.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        channels_last: Keep the trained network's weights in the memory format that convolutions prefer on GPUs.
        objective: The loss of Eq. 5; the simple loss and MirroredPowerSchedule(tau=1) by default.
        optimizer: Given the trainable parameters, returns an optimizer.
        lr_scheduler: Given the optimizer, returns a scheduler that steps every training step; constant by default.
        tuner: A parameter-efficient method; ``None`` trains the whole network.
        sampler: How pictures are generated; DPM-Solver++ in 20 steps with guidance 7.5 by default.
        bank_sampler: How the memory bank is generated; like ``sampler`` by default.
        seed: Seed of training draws, of generated pictures and of the bank.

    Raises:
        ConfigError: If the prompts are empty lists, the dropout is out of range or, when the networks are built, if
            objective, samplers and pipeline do not have one noise schedule.
    """

    def __init__(
        self,
        model: str | Path = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision: str | None = None,
        image_size: int | None = None,
        prompts: Sequence[str] = ("",),
        bank_prompts: Sequence[str] = ("",),
        prompt_dropout: float = 0.1,
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
        objective = objective if objective is not None else stable_diffusion_objective()
        sampler = sampler if sampler is not None else stable_diffusion_sampler()
        super().__init__(objective, optimizer, lr_scheduler, tuner, sampler, bank_sampler, seed)
        if not 0 <= prompt_dropout < 1:
            raise ConfigError(f"prompt_dropout must be in [0, 1), got {prompt_dropout}.")
        if not prompts or not bank_prompts:
            raise ConfigError("prompts and bank_prompts need one prompt each at least; the empty one is ''.")
        self.model, self.revision, self.image_size = str(model), revision, image_size
        self.prompts, self.bank_prompts = tuple(prompts), tuple(bank_prompts)
        self.prompt_dropout = prompt_dropout
        self.gradient_checkpointing = gradient_checkpointing
        self.channels_last = channels_last
        self._embeddings: dict[tuple[str, ...], Tensor] = {}

    # -- networks -------------------------------------------------------------------------------------------------

    def open_unet(self) -> Any:
        """The pipeline's pre-trained UNet, on the CPU."""
        from diffusers.models import UNet2DConditionModel

        return open_network(UNet2DConditionModel, self.model, "unet", self.revision)

    def apply_memory_options(self, network: Any) -> None:
        """Set up gradient checkpointing and the memory format of a network that gradients flow through."""
        if self.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if self.channels_last:
            network.to(memory_format=torch.channels_last)

    def build_frozen(self, unet: Any) -> None:
        """Open the autoencoder and the text encoder, and check that the parts are of one pipeline."""
        folder = folder_of(self.model, "vae", self.revision)
        scaling_factor = read_json(folder / "vae" / "config.json").get("scaling_factor", 0.18215)
        self.autoencoder = FrozenAutoencoder(folder, scaling_factor, "vae")
        self.text_encoder = FrozenTextEncoder(self.model, self.revision)
        width = unet.config.cross_attention_dim
        if width != self.text_encoder.shape[1]:
            raise CheckpointError(
                f"{self.model}: the UNet takes embeddings of width {width}, the text encoder makes "
                f"{self.text_encoder.shape[1]}. The parts are not of one pipeline."
            )
        self._check_noise_schedule(folder)
        size = self.image_size if self.image_size is not None else unet.config.sample_size * self.autoencoder.downsample
        self._sample_shape = self.autoencoder.latent_shape(size)

    def _check_noise_schedule(self, folder: Path) -> None:
        """Refuse a loss or a sampler over other betas than the pipeline was pre-trained with."""
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        file = folder_of(self.model, "unet", self.revision) / "scheduler" / "scheduler_config.json"
        config = read_json(file)
        kind = config.get("prediction_type", "epsilon")
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        pipeline = DDPMScheduler(**{name: config[name] for name in names if name in config}).alphas_cumprod
        process = self.objective.diffusion
        if not isinstance(process, GaussianDiffusion):
            raise ConfigError(
                f"{self.model} was not pre-trained by {type(process).__name__}, the objective's diffusion."
            )
        ours = {"the objective's diffusion": process.sqrt_alphas_cumprod.square()}
        for name, sampler in (("sampler", self.sampler), ("bank_sampler", self.bank_sampler)):
            ours[f"the scheduler of {name}"] = getattr(sampler.scheduler, "alphas_cumprod", pipeline)
            if sampler.scheduler.config.get("prediction_type", "epsilon") != kind:
                raise ConfigError(
                    f"{self.model} predicts {kind!r}, the scheduler of {name} is set for "
                    f"{sampler.scheduler.config.get('prediction_type', 'epsilon')!r}. Set its prediction_type."
                )
        for name, alphas_cumprod in ours.items():
            if alphas_cumprod.shape != pipeline.shape or (alphas_cumprod.cpu() - pipeline).abs().max() > 1e-3:
                raise ConfigError(
                    f"{name} has another noise schedule than {self.model}, whose {file.name} says "
                    f"{ {key: config.get(key) for key in names[:4]} }. Give it these betas; those of Stable Diffusion "
                    "are GaussianDiffusion(1000, 0.00085, 0.012, 'scaled_linear')."
                )

    # -- text -----------------------------------------------------------------------------------------------------

    def embed(self, prompts: tuple[str, ...]) -> Tensor:
        """Embeddings (n, L, D) of a fixed list of prompts, made once."""
        if prompts not in self._embeddings:
            self._embeddings[prompts] = torch.cat([self.text_encoder.encode([prompt]) for prompt in prompts])
        table = self._embeddings[prompts] = self._embeddings[prompts].to(self.device)
        return table

    def null_embedding(self) -> Tensor:
        """The empty prompt's embedding (1, L, D)."""
        return self.embed(("",))

    def prompted(self, prompts: tuple[str, ...], indices: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) of prompt i mod n for indices (B,), and as many of the empty prompt."""
        condition = self.embed(prompts)[(indices % len(prompts)).to(self.device)]
        return condition, self.null_embedding().expand_as(condition)

    # -- what the base asks for -----------------------------------------------------------------------------------

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(c, h, w) of the latents."""
        return self._sample_shape

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) => pixel values (B, 3, H, W) in [-1, 1]."""
        return self.autoencoder.decode(latents)

    def encode(self, batch: TargetBatch) -> TargetBatch:
        """Pictures (B, 3, H, W) and captions => latents' mean and std (B, c, h, w), embeddings (B, L, D).

        Raises:
            ConfigError: If the pictures have no captions, or become latents of another shape.
        """
        if "captions" not in batch:
            raise ConfigError(
                f"{type(self).__name__} needs captions, and the target has none. A data set of (image, label) gets "
                "some from lightning_difftune.data.ClassCaptions."
            )
        mean, std = self.posterior(batch["pixel_values"])
        return {"latent_mean": mean, "latent_std": std, "prompt_embeds": self.text_encoder.encode(batch["captions"])}

    shape_cure = "Set the model's image_size."

    def encode_pixels(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] => mean and std (B, c, h, w) of their latents."""
        return self.autoencoder.encode(pixel_values.to(self.device))

    def encoder_identity(self) -> str | None:
        """Autoencoder, its scale, and text encoder."""
        scale = self.autoencoder.scaling_factor
        return f"{self.autoencoder.fingerprint()} x {scale}; {self.text_encoder.fingerprint()}"

    def conditions(self, indices: Tensor) -> tuple[Any, Any]:
        """Picture i shows prompt i mod n."""
        return self.prompted(self.prompts, indices)

    def source_conditions(self, indices: Tensor) -> tuple[Any, Any]:
        """Sample i of the bank has prompt i mod n of ``bank_prompts``."""
        return self.prompted(self.bank_prompts, indices)

    def bank_columns(self, indices: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """The prompts' numbers."""
        return {"class_labels": indices % len(self.bank_prompts)}

    def bank_embeddings(self, retention: RetentionBatch) -> Tensor:
        """Embeddings (B, L, D) of the prompts that the bank's samples were drawn with."""
        return self.embed(self.bank_prompts)[retention["class_labels"].to(self.device)]

    def retention_condition(self, retention: RetentionBatch) -> Any:
        """The bank's prompts."""
        return self.bank_embeddings(retention)

    def bank_spec(self) -> dict[str, Any]:
        """The prompts and what encodes them."""
        return {"prompts": list(self.bank_prompts), "text_encoder": self.text_encoder.fingerprint()}

    def prepare(self, batch: DiffTuningBatch, draws: Draws) -> tuple[Tensor, Any, Tensor]:
        """Target samples with captions dropped at random, then retained ones under their bank prompts."""
        target = batch["target"] if "latent_mean" in batch["target"] else self.encode(batch["target"])
        mean, embeddings = target["latent_mean"], target["prompt_embeds"]
        x0 = mean + target["latent_std"] * draws.normal(*mean.shape)
        if self.training:
            dropped = draws.uniform(len(mean)) < self.prompt_dropout
            embeddings = torch.where(dropped[:, None, None], self.null_embedding(), embeddings)
        if "retention" in batch:
            retained = batch["retention"]
            x0 = torch.cat([x0, retained["latents"].to(x0.dtype)])
            embeddings = torch.cat([embeddings, self.bank_embeddings(retained)])
        return x0, embeddings, torch.arange(len(x0), device=x0.device) >= len(mean)

    # -- what people ask it for -------------------------------------------------------------------------------------

    pipeline_tag = "text-to-image"
    card_tags = ("stable-diffusion",)

    def subjects(
        self,
        classes: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        controls: Sequence[str] | None = None,
    ) -> list[Subject]:
        """Prompts; its own where nobody asks for others."""
        refuse([("--classes", classes)], "it is asked in words; use --prompts.")
        refuse([("--controls", controls)], "it follows no control pictures.")
        return [Subject(prompt, prompt) for prompt in prompts or self.prompts]

    def conditions_for(self, subjects: Sequence[Subject]) -> tuple[Any, Any]:
        """Their prompts, and the empty one."""
        return self.prompted(tuple(subject.asked for subject in subjects), torch.arange(len(subjects)))
