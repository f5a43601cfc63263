"""A finished run: its model and callbacks, after training or opened from its checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_difftune.callbacks import GenerationCallback
from lightning_difftune.cli.arguments import CONFIG_OPTIONS, values_of
from lightning_difftune.cli.lightning import DiffTuneCLI, ModelReader
from lightning_difftune.cli.run import Run
from lightning_difftune.cli.run_files import check_checkpoint
from lightning_difftune.modules import DiffTuningModule
from lightning_difftune.trust import split_trusted


class TunedRun:
    """A run's module with the weights of its checkpoint.

    Args:
        place: Any place of the run, as for :meth:`~lightning_difftune.cli.run.Run.find`.
        settings: ``--config``, overrides of its keys and ``--trust``, as for ``difftune fit``; default: the run's

    Raises:
        DataError: If there is no run, or there are several.
        ConfigError: If there is no config, or it is invalid.
        CheckpointError: If the checkpoint is missing, damaged, or of another model.
    """

    def __init__(self, place: str | Path, settings: Sequence[str] = ()) -> None:
        self.run = Run.find(place, saved=True)
        assert self.run.checkpoint is not None
        content = check_checkpoint(self.run.checkpoint)
        settings, trusted = split_trusted(settings)
        if not values_of(settings, *CONFIG_OPTIONS):
            kept = self.run.settings(trusted, ("seed_everything", "model", "data"))
            kept["trainer"] = {"precision": self.run.setting("trainer", "precision")}
            settings = ["--config", yaml.safe_dump(kept), *settings]
        self.reader = ModelReader(settings)
        self.module: DiffTuningModule = self.reader.model
        self.module.configure_model()
        self.module.on_load_checkpoint(content)
        self.module.load_state_dict(content["state_dict"])
        self.module.eval()
        self.leaves_averages = False  # whether the weights are those as trained, though there are averages

    def __str__(self) -> str:
        """A description for messages."""
        return f"{self.run.checkpoint}, step {self.run.step}, tuned from {self.module.base_identity['name']}"

    @property
    def precision(self) -> str:
        """That of the run's trainer, such as ``"bf16-mixed"``."""
        return str(self.reader.composed["trainer"]["precision"] or "32-true")

    def drawing(self) -> AbstractContextManager[None]:
        """A ``with`` block that draws as the run does, at its precision, on the module's device."""
        fabric = Fabric(accelerator=self.module.device.type, devices=1, precision=cast("Any", self.precision))
        fabric._precision.convert_module(self.module)  # the weights, if the precision is a "true" one
        return fabric.autocast()

    def weights(self, raw: bool, done: list[str]) -> AbstractContextManager[None]:
        """A ``with`` block in which the checkpoint's averages, if it has any, are the module's weights.

        Lightning's ``WeightAveraging`` saves its averages as the module's state, and the weights as trained beside it.
        """
        average, as_trained = self.run.averages, self.run.content.get("current_model_state")
        has_averages = average is not None or as_trained is not None
        self.leaves_averages = raw and has_averages
        if raw and as_trained is not None:
            self.module.load_state_dict(as_trained)
        if raw or average is None:
            kept = "averaged by Lightning" if has_averages and not raw else "as trained"
            done.append(f"weights: {kept}{'' if has_averages else '; the checkpoint has no averages'}")
            return nullcontext()
        done.append(f"weights: averaged over {average.num_updates:,} updates")
        return average.average_parameters(self.module)


def callbacks_with(cli: DiffTuneCLI, attribute: str) -> list[Any]:
    """The run's callbacks that have an attribute, such as ``average_parameters`` or ``convergence_step``."""
    return [callback for callback in vars(cli.trainer)["callbacks"] if hasattr(callback, attribute)]


def stop_if_asked(cli: DiffTuneCLI) -> None:
    """End a command that has more to do after a run, if a signal came when the run was at its last step."""
    if any(callback.stop_asked for callback in callbacks_with(cli, "stop_asked")):
        raise SIGTERMException


def scoring(cli: DiffTuneCLI) -> list[Any]:
    """The run's callbacks that log values which rank models; each has a ``history``."""
    return [callback for callback in callbacks_with(cli, "scores") if callback.scores()]


def averaged_weights(cli: DiffTuneCLI) -> AbstractContextManager[None]:
    """A ``with`` block with the averaged weights, if the run has any; the model, whose fit is over, is in eval mode."""
    cli.model.eval()
    averages = callbacks_with(cli, "average_parameters")
    return averages[0].average_parameters(cli.model) if averages else nullcontext()


def measure(cli: DiffTuneCLI, callback: Callback, checkpoint: Path) -> None:
    """Validate a checkpoint with a callback in place of those that generate pictures; the config is not saved."""
    trainer = vars(cli.trainer)
    kept = [c for c in trainer["callbacks"] if not isinstance(c, GenerationCallback | SaveConfigCallback)]
    trainer["callbacks"] = [*kept, callback]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")  # left out on purpose
        cli.trainer.validate(cli.model, datamodule=cli.datamodule, ckpt_path=str(checkpoint), verbose=False)


def count_trainable(cli: DiffTuneCLI) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
