"""What pictures can be drawn with: runs, exports, published models and pipelines, each as a module with a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from lightning_difftune.cli.run import checkpoints_below, launches_below
from lightning_difftune.cli.tuned import TunedRun
from lightning_difftune.diffusion import RectifiedFlow
from lightning_difftune.errors import ConfigError
from lightning_difftune.models import DiT, FrozenAutoencoder, load_dit
from lightning_difftune.models.checkpoint_files import read_json
from lightning_difftune.models.checkpoints import BUNDLED, fingerprint
from lightning_difftune.models.diffusers_folder import open_network
from lightning_difftune.modules import DiffTuningModule, DiTDiffTuningModule, TextToImageDiffTuningModule
from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.sampling import Sampler


class Source:
    """A model to draw pictures with.

    Args:
        module: Built, in eval mode.
        done: What to say about it.
        run: The run that it comes from, if it does.
        has_base: Whether the model that it was tuned from is there, too.
    """

    def __init__(
        self,
        module: DiffTuningModule,
        done: list[str],
        run: TunedRun | None = None,
        has_base: bool = True,
    ) -> None:
        self.module, self.done, self.run = module, done, run
        self.has_base = has_base

    def weights(self, raw: bool) -> AbstractContextManager[None]:
        """A ``with`` block in which a run's averages are the weights, if it has any and they are wanted."""
        return self.run.weights(raw, self.done) if self.run is not None else nullcontext()

    @property
    def fingerprint(self) -> str:
        """Identity of the weights as they are now."""
        return "+".join(fingerprint(network) for network in self.module.trainable_modules())


def open_source(
    name: str,
    settings: Sequence[str] = (),
    *,
    base: str | None = None,
    vae: str | None = None,
    text: bool = False,
    solver: str | None = None,
) -> Source:
    """Open a model by its path or name.

    Args:
        name: A run's folder or checkpoint, a DiT or an export of one, a Stable Diffusion pipeline, a UNet's folder, or
            the name of a bundled model.
        settings: For a run, ``--config`` and overrides of its keys.
        base: The pre-trained model of an export, for Domain Guidance; or the pipeline of a UNet.
        vae: The autoencoder of a latent DiT that comes without one.
        text: Whether a hub repository is a text-to-image pipeline.
        solver: The scheduler that is asked for; of flow matching, it says what a DiT predicts whose file does not.

    Raises:
        ConfigError: If something is missing to draw with it, or settings are given that only runs have.
        CheckpointError: If it cannot be opened.
    """
    path = Path(name).expanduser()
    if path.suffix == ".ckpt" or (path.is_dir() and (launches_below(path) or any(checkpoints_below(path)))):
        run = TunedRun(path, settings)
        return Source(run.module, [str(run)], run)
    if settings:
        raise ConfigError(f"Unknown options: {' '.join(settings)}. Only a checkpoint takes keys of its run's config.")
    folder = BUNDLED / name if (BUNDLED / name).is_dir() else path
    kind = kind_of(folder) if folder.is_dir() else ""
    is_pipeline = (folder / "model_index.json").exists() and kind != "DiTPipeline"
    if is_pipeline or (text and not folder.exists()):
        module: DiffTuningModule = TextToImageDiffTuningModule(name)
        module.configure_model()
    elif kind == "UNet2DConditionModel":
        module = open_unet(name, base)
    elif kind == "ControlNetModel":
        raise ConfigError(f"{name} is a ControlNet, which draws after control maps; open it with diffusers' pipelines.")
    else:
        module = open_dit(name, folder, base, vae, solver)
    network = module.trainable_modules()[0]
    return Source(module.eval(), [f"{name}: {type(network).__name__}"], None, base is not None)


def kind_of(folder: Path) -> str:
    """The class that a diffusers folder states; empty if it states none."""
    files = (folder / "model_index.json", folder / "config.json")
    stated = next((read_json(file) for file in files if file.exists()), {})
    return str(stated.get("_class_name", ""))


def open_unet(name: str, base: str | None) -> DiffTuningModule:
    """A pipeline with the UNet of a folder in place of its own."""
    from diffusers.models import UNet2DConditionModel

    if base is None:
        raise ConfigError(f"{name} is a UNet alone. Name the pipeline that it belongs to: --base FOLDER or owner/name.")
    module = TextToImageDiffTuningModule(base)
    module.configure_model()
    module.unet = open_network(UNet2DConditionModel, name)
    return module


def open_dit(name: str, folder: Path, base: str | None, vae: str | None, solver: str | None) -> DiffTuningModule:
    """A DiT with the sampler that it was exported with, and its autoencoder if it denoises latents."""
    dit = load_dit(name)
    is_flow = dit.sampling is None and solver is not None and "flow" in solver.lower()
    module = DiTDiffTuningModule(
        model=base if base is not None else dit,
        autoencoder=autoencoder_of(folder, vae, dit, name),
        objective=DiffTuningObjective(diffusion=RectifiedFlow()) if is_flow else None,
        sampler=Sampler.from_settings(dit.sampling) if dit.sampling is not None else None,
    )
    module.configure_model()
    module.dit = dit
    return module


def autoencoder_of(folder: Path, vae: str | None, dit: DiT, name: str) -> FrozenAutoencoder | None:
    """The autoencoder that is asked for, lies in the folder or is named by the export; ``None`` for a model of pixels.

    Raises:
        ConfigError: If a model of latents comes without.
    """
    if vae is not None:
        is_pipeline = any((place / "vae" / "config.json").exists() for place in (BUNDLED / vae, Path(vae).expanduser()))
        return FrozenAutoencoder.of_pipeline(vae) if is_pipeline else FrozenAutoencoder(vae)
    if (folder / "vae" / "config.json").exists():
        return FrozenAutoencoder.of_pipeline(folder)
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
