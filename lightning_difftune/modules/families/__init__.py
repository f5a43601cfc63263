"""The text-to-image families: what each opens, how text becomes conditions, and how its network is called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_difftune.densities import TimestepDensity
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.models import FrozenAutoencoder, hub
from lightning_difftune.models.checkpoint_files import read_json
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.models.diffusers_layout import open_network
from lightning_difftune.models.hub import folder_of
from lightning_difftune.modules.families.flow_matching import Flux, StableDiffusion3
from lightning_difftune.modules.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from lightning_difftune.sampling import NoiseScheduler, Sampler
from lightning_difftune.source import LatentScale, SourceFacts


class Family(Protocol):
    """What is specific to one class of pipelines. No base class is needed."""

    network_folder: str  # of the network that denoises, such as "unet"; the module's attribute has the same name
    # Optional: is_autocast_throughout, true where no layer of the network switches autocast off. Weights are then cast
    # together, see WeightCasts. And patch_size, the latents per side of a token, 1 by default: pictures of another size
    # than a multiple of it are refused.

    def network_class(self) -> Any:
        """The network's class in diffusers; imported here, since diffusers is slow to import."""

    def sample_size(self, network: Any) -> int:
        """Latents per side of the pictures that the network was made for."""

    def open_text(self, model: str | Path, revision: str | None, image_size: int, dtype: torch.dtype) -> Any:
        """The text encoders of a pipeline, such as a :class:`~.text.PipelineText`."""

    def check(self, model: str, network: Any, text: Any, latent_channels: int) -> None:
        """Refuse networks that need more inputs than they get here.

        Raises:
            CheckpointError: If the parts do not fit, or the network takes further inputs.
        """

    def call(self, network: Any, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """x_t (B, c, h, w), t (B,) index or, in sampling, the scheduler's float => output (B, c, h, w).

        The only place for packing, ids, the network's own scale of time, and signs.
        """

    def sampler(self) -> Sampler:
        """The default sampler: steps and guidance, without a scheduler."""

    def scheduler(self, source: SourceFacts) -> NoiseScheduler:
        """The default scheduler for a model's noise process and prediction type."""

    def density(self, scheduler: Mapping[str, Any], num_tokens: int) -> TimestepDensity | None:
        """The noise levels that a model is trained at; ``None`` is uniform.

        Args:
            scheduler: Settings of the scheduler that it was published with.
            num_tokens: h w / 4 of its latents.
        """

    def is_step_distilled(self, network: Any, scheduler: dict[str, Any]) -> bool:
        """Whether network and scheduler show a distillation to a few steps, which replay would undo."""

    def takes_guidance(self, network: Any) -> bool:
        """Whether the network takes its guidance as a number, ``guidance`` (B,), instead of a second branch."""


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": StableDiffusion(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
    "FluxPipeline": Flux(),
    "StableDiffusion3Pipeline": StableDiffusion3(),
}
"""The family of each class that ``model_index.json`` may state; add your own."""

_FEW_STEPS = {"turbo", "lightning", "schnell", "lcm", "hyper", "flash", "tcd", "dmd", "dmd2"}


def few_step_name(names: Sequence[str]) -> str | None:
    """The first name with a word that marks models distilled to a few steps, such as ``sdxl-turbo``.

    Only the last part of a path or repository counts.

    Example:
        >>> few_step_name(["models/base", "stabilityai/stable-diffusion-3.5-large-turbo"])
        'stabilityai/stable-diffusion-3.5-large-turbo'
        >>> few_step_name(["lightning_runs/sdxl", "turboprop"])
    """
    words = ({*re.split(r"[^a-z0-9]+", Path(name).name.lower())} for name in names)
    return next((name for name, found in zip(names, words, strict=True) if found & _FEW_STEPS), None)


class Pipeline:
    """A text-to-image pipeline: its family and its files.

    Args:
        model: Hub repository or local folder in diffusers' layout, or a bundled name.
        revision: Branch, tag or commit of a hub repository.

    Raises:
        CheckpointError: If it is not found, or its class is not supported.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        folder = hub.local_folder(model)
        file = folder / "model_index.json"
        if not folder.exists() and (repository := hub.repository_of(model, revision)) is not None:
            file = hub.fetch_file(repository[0], "model_index.json", repository[1])
        # Folders of Stable Diffusion 1.x and 2.x may state no class.
        stated = str(read_json(file).get("_class_name")) if file.exists() else next(iter(FAMILIES))
        if stated not in FAMILIES:
            raise CheckpointError(
                f"{model} is a {stated}, which is not supported. Supported are pipelines of the class "
                f"{' or '.join(FAMILIES)}."
            )
        self.model, self.revision, self.family = model, revision, FAMILIES[stated]

    @property
    def folder(self) -> Path:
        """The folder of its network, local or in the hub's cache."""
        return folder_of(self.model, self.family.network_folder, self.revision)

    def open_network(self, dtype: torch.dtype = torch.float32) -> Any:
        """The pre-trained network that denoises, on the CPU."""
        family = self.family
        return open_network(family.network_class(), self.model, family.network_folder, self.revision, dtype)

    def open_autoencoder(self) -> FrozenAutoencoder:
        """Its frozen autoencoder."""
        return FrozenAutoencoder(folder_of(self.model, "vae", self.revision), None, "vae")

    def facts(self, network: Any, latents: LatentScale, num_tokens: int, **identity: Any) -> SourceFacts:
        """Its facts: from ``scheduler_config.json``, and the timestep density for pictures of ``num_tokens``."""
        scheduler = read_json(self.folder / "scheduler" / "scheduler_config.json")
        return SourceFacts.of_scheduler(
            self.model,
            fingerprint(network),
            scheduler,
            latents=latents,
            condition="text",
            density=self.family.density(scheduler, num_tokens),
            identity=identity,
        )

    def guidance(self, network: Any, drawn: float | None, trained: float | None) -> tuple[float, float] | None:
        """The guidance of a guidance-distilled network, for generated samples and for target samples.

        Raises:
            ConfigError: If numbers are given for a network that takes none.
        """
        if self.family.takes_guidance(network):
            return 3.5 if drawn is None else float(drawn), 1.0 if trained is None else float(trained)
        if (drawn, trained) != (None, None):
            raise ConfigError(
                f"{self.model} does not take its guidance as a number, but distilled_guidance and target_guidance are "
                f"{(drawn, trained)}. Leave them out; guidance between two branches is the sampler's guidance_scale."
            )
        return None

    def refuse_replay(
        self, network: Any, scheduler: Mapping[str, Any], is_step_distilled: bool | None, prompts: Sequence[str]
    ) -> None:
        """Refuse a bank of samples or pictures if it would undo a distillation, or a prompt is of no use.

        Args:
            network: The network.
            scheduler: Settings of the scheduler that the pipeline was published with.
            is_step_distilled: What the user says; ``None`` reads it from the pipeline's files.
            prompts: The bank's prompts.

        Raises:
            ConfigError: If the pipeline was distilled to a few steps, or has no branch for the empty prompt.
        """
        sign = "what is_step_distilled says" if is_step_distilled else None
        if is_step_distilled is None:
            sign = self.sign_of_few_steps(network, scheduler)
        if sign is not None:
            raise ConfigError(
                f"{self.model} was distilled to a few steps, by {sign}. Training on its samples as data (replay) "
                "undoes that. Retain by the network's own predictions: set the objective's retention_target to "
                "OnlineTeacher, or tune the model that it was distilled from. If it was not, set is_step_distilled to "
                "false."
            )
        if self.family.takes_guidance(network) and not all(prompts):
            raise ConfigError(
                f"{self.model} takes its guidance as a number and has no unconditional branch in sampling, so there "
                "is nothing to retain under the empty prompt. Set bank_prompts to captions of what it should keep."
            )

    def sign_of_few_steps(self, network: Any, scheduler: Mapping[str, Any]) -> str | None:
        """The sign that it was distilled to a few steps, network and scheduler or a name; ``None`` if there is none."""
        if self.family.is_step_distilled(network, dict(scheduler)):
            return "what its network and its scheduler are"
        files = (self.folder / "model_index.json", self.folder / self.family.network_folder / "config.json")
        stated = [str(read_json(file).get("_name_or_path", "")) for file in files if file.exists()]
        name = few_step_name([self.model, *stated])
        return None if name is None else f"its name {name}"
