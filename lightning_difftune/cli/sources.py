"""What pictures can be drawn with: runs, exports, published models and pipelines, each as a module with a sampler."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from lightning_difftune.cli.run import checkpoints_below, launches_below
from lightning_difftune.cli.tuned import TunedRun
from lightning_difftune.errors import ConfigError
from lightning_difftune.models.checkpoints import fingerprint
from lightning_difftune.modules import DiffTuningModule
from lightning_difftune.modules.opening import open_model


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
    module = open_model(name, base=base, vae=vae, text=text, solver=solver)
    network = module.trainable_modules()[0]
    return Source(module.eval(), [f"{name}: {type(network).__name__}"], None, base is not None)
