"""Opens published models, exports and pipelines as the module of their family, for sampling."""

from __future__ import annotations

from pathlib import Path

from lightning_difftune.diffusion import RectifiedFlow
from lightning_difftune.errors import ConfigError
from lightning_difftune.models import DiT, FrozenAutoencoder, load_dit
from lightning_difftune.models.checkpoint_files import read_json
from lightning_difftune.models.diffusers_layout import open_network
from lightning_difftune.models.hub import local_folder
from lightning_difftune.modules.base import DiffTuningModule
from lightning_difftune.modules.dit import DiTDiffTuningModule
from lightning_difftune.modules.text_to_image import TextToImageDiffTuningModule
from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.sampling import Sampler


def open_model(
    name: str, *, base: str | None = None, vae: str | None = None, text: bool = False, solver: str | None = None
) -> DiffTuningModule:
    """Open a model other than a run, by its path or name.

    Args:
        name: A DiT or an export of one, a text-to-image pipeline, the folder of its UNet or
            transformer, or the name of a bundled model.
        base: The pre-trained model of an export, for Domain Guidance; or the pipeline of a UNet or transformer.
        vae: The autoencoder of a latent DiT that includes none.
        text: Whether a hub repository is a text-to-image pipeline.
        solver: The requested scheduler; it gives the prediction type of a DiT whose file states none.

    Raises:
        ConfigError: If a part that sampling needs is missing.
        CheckpointError: If it cannot be opened.
    """
    folder = local_folder(name)
    kind = kind_of(folder) if folder.is_dir() else ""
    is_pipeline = (folder / "model_index.json").exists() and kind != "DiTPipeline"
    if is_pipeline or (text and not folder.exists()):
        module = TextToImageDiffTuningModule(name)
        module.configure_model()
        return module
    if kind == "UNet2DConditionModel" or (kind.endswith("Transformer2DModel") and not kind.startswith("DiT")):
        return open_part(name, kind, base)
    if kind == "ControlNetModel":
        raise ConfigError(f"{name} is a ControlNet, which needs control maps; open it with diffusers' pipelines.")
    return open_dit(name, folder, base, vae, solver)


def kind_of(folder: Path) -> str:
    """The class name in a diffusers folder; empty if there is none."""
    files = (folder / "model_index.json", folder / "config.json")
    stated = next((read_json(file) for file in files if file.exists()), {})
    return str(stated.get("_class_name", ""))


def open_part(name: str, kind: str, base: str | None) -> DiffTuningModule:
    """A pipeline with its UNet or transformer replaced by that of a folder."""
    if base is None:
        raise ConfigError(
            f"{name} is only a {kind}. Name the pipeline that it belongs to: --base FOLDER or owner/name."
        )
    module = TextToImageDiffTuningModule(base)
    module.configure_model()
    setattr(module, module.family.network_folder, open_network(module.family.network_class(), name))
    return module


def open_dit(name: str, folder: Path, base: str | None, vae: str | None, solver: str | None) -> DiffTuningModule:
    """A DiT with the sampler of its export and, if it denoises latents, its autoencoder."""
    dit = load_dit(name)
    is_flow = dit.sampling is None and solver is not None and "flow" in solver.lower()
    module = DiTDiffTuningModule(
        model=base if base is not None else dit,
        autoencoder=autoencoder_of(folder, vae, dit, name),
        objective=DiffTuningObjective(diffusion=RectifiedFlow()) if is_flow else None,
        sampler=Sampler.from_settings(sampling) if "num_inference_steps" in (sampling := dit.sampling or {}) else None,
    )
    module.configure_model()
    module.dit = dit
    return module


def autoencoder_of(folder: Path, vae: str | None, dit: DiT, name: str) -> FrozenAutoencoder | None:
    """The autoencoder that is requested, in the folder, or named by the export; ``None`` for a pixel model.

    Raises:
        ConfigError: If a latent model has none.
    """
    if vae is not None:
        is_pipeline = (local_folder(vae) / "vae" / "config.json").exists()
        return FrozenAutoencoder(vae, subfolder="vae" if is_pipeline else None)
    if (folder / "vae" / "config.json").exists():
        return FrozenAutoencoder(folder, subfolder="vae")
    named = (dit.sampling or {}).get("autoencoder")
    if named is not None:
        return FrozenAutoencoder(**named)
    channels = dit.sample_shape[0]
    if channels in (1, 3):
        return None
    raise ConfigError(
        f"{name} denoises latents of {channels} channels and comes without the autoencoder that decodes them. Name it: "
        "--vae stabilityai/sd-vae-ft-ema, or a folder."
    )
