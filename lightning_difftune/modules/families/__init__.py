"""The text-to-image families: what each opens, how text becomes conditions, and how its network is called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_difftune.densities import TimestepDensity
from lightning_difftune.errors import CheckpointError
from lightning_difftune.models import hub
from lightning_difftune.models.checkpoint_files import read_json
from lightning_difftune.modules.families.flow_matching import Flux, StableDiffusion3
from lightning_difftune.modules.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from lightning_difftune.sampling import NoiseScheduler, Sampler
from lightning_difftune.source import SourceFacts


class Family(Protocol):
    """What one class of pipelines has of its own. No base class is needed."""

    network_folder: str  # of the network that denoises, such as "unet"; the module's attribute has the same name
    # Optional: is_autocast_throughout, true where no layer of the network switches autocast off. Weights are then cast
    # together, see WeightCasts.

    def network_class(self) -> Any:
        """Class of diffusers that the network has; imported here, since diffusers is slow to import."""

    def sample_size(self, network: Any) -> int:
        """Latents per side of the pictures that the network was made for."""

    def open_text(self, model: str | Path, revision: str | None, image_size: int, dtype: torch.dtype) -> Any:
        """The text encoders of a pipeline; :class:`~.text.PipelineText` makes them of a pipeline's class."""

    def check(self, model: str, network: Any, text: Any, latent_channels: int) -> None:
        """Refuse networks that need more than they are given here.

        Raises:
            CheckpointError: If the parts do not fit, or the network takes further inputs.
        """

    def call(self, network: Any, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """x_t (B, c, h, w), t (B,) index or, in sampling, the scheduler's float => output (B, c, h, w).

        The only place for packing, ids, the network's own scale of time, and signs.
        """

    def sampler(self) -> Sampler:
        """How pictures are drawn by default: steps and guidance, without a scheduler."""

    def scheduler(self, source: SourceFacts) -> NoiseScheduler:
        """The default scheduler over a model's process and for what it predicts."""

    def density(self, num_tokens: int) -> TimestepDensity | None:
        """At which noise levels the family is trained, for pictures of 2 x 2 latents' tokens; ``None`` is uniform."""

    def is_step_distilled(self, network: Any, scheduler: dict[str, Any]) -> bool:
        """Whether network and scheduler are those of one distilled to a few steps, which replay would undo."""

    def takes_guidance(self, network: Any) -> bool:
        """Whether the network is told its guidance as a number, ``guidance`` (B,), in place of a second branch."""


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": StableDiffusion(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
    "FluxPipeline": Flux(),
    "StableDiffusion3Pipeline": StableDiffusion3(),
}
"""The family of each class that ``model_index.json`` may state; add your own."""

_FEW_STEPS = {"turbo", "lightning", "schnell", "lcm", "hyper", "flash", "tcd", "dmd", "dmd2"}


def few_step_name(names: Sequence[str]) -> str | None:
    """The first name with a word that models distilled to a few steps are called by, such as ``sdxl-turbo``.

    Of a path or a repository the last part counts.

    Example:
        >>> few_step_name(["models/base", "stabilityai/stable-diffusion-3.5-large-turbo"])
        'stabilityai/stable-diffusion-3.5-large-turbo'
        >>> few_step_name(["lightning_runs/sdxl", "turboprop"])
    """
    words = ({*re.split(r"[^a-z0-9]+", Path(name).name.lower())} for name in names)
    return next((name for name, found in zip(names, words, strict=True) if found & _FEW_STEPS), None)


def sign_of_few_steps(
    family: Family, network: Any, scheduler: Mapping[str, Any], folder: Path, model: str
) -> str | None:
    """What says that a pipeline was distilled to a few steps; ``None`` if nothing does.

    Args:
        family: Its family.
        network: The network that denoises.
        scheduler: Settings of the scheduler that it was published with.
        folder: Where its files lie.
        model: Its name, or the path that it was asked for by.
    """
    if family.is_step_distilled(network, dict(scheduler)):
        return "what its network and its scheduler are"
    files = (folder / "model_index.json", folder / family.network_folder / "config.json")
    stated = [str(read_json(file).get("_name_or_path", "")) for file in files if file.exists()]
    name = few_step_name([model, *stated])
    return None if name is None else f"its name {name}"


def family_of(model: str | Path, revision: str | None = None) -> Family:
    """The family of a pipeline, by the class that its ``model_index.json`` states.

    Raises:
        CheckpointError: If it is of a class that is not supported.
    """
    stated = pipeline_class(model, revision)
    if stated not in FAMILIES:
        raise CheckpointError(
            f"{model} is a {stated}, which is not supported. Supported are pipelines of the class "
            f"{' or '.join(FAMILIES)}."
        )
    return FAMILIES[stated]


def pipeline_class(model: str | Path, revision: str | None = None) -> str:
    """The class of a pipeline; that of Stable Diffusion 1.x and 2.x for a folder that states none.

    Raises:
        CheckpointError: If it is a repository that cannot be had.
    """
    folder = hub.local_folder(model)
    file = folder / "model_index.json"
    if not folder.exists() and (repository := hub.repository_of(str(model), revision)) is not None:
        file = hub.fetch_file(repository[0], "model_index.json", repository[1])
    return str(read_json(file).get("_class_name")) if file.exists() else next(iter(FAMILIES))
