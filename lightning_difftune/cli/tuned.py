"""The tuned model of a finished run, opened from its checkpoint and the config beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from lightning_difftune.callbacks import EMA
from lightning_difftune.cli.lightning import ModelReader, check_checkpoint
from lightning_difftune.errors import ConfigError
from lightning_difftune.modules import DiffTuningModule


class TunedRun:
    """A run's module with the weights of a checkpoint.

    Args:
        checkpoint: The file.
        reader: What made the module, and can open its data.
        content: What the file holds.

    Raises:
        ConfigError: If the config makes another kind of module.
        CheckpointError: If the weights are not the module's.
    """

    def __init__(self, checkpoint: Path, reader: ModelReader, content: dict[str, Any]) -> None:
        module: Any = reader.model
        if not isinstance(module, DiffTuningModule):
            raise ConfigError(f"The config of {checkpoint} has a {type(module).__name__}, no Diff-Tuning module.")
        self.checkpoint, self.reader, self.content, self.module = checkpoint, reader, content, module
        module.configure_model()
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
        module.eval()

    @property
    def step(self) -> int | str:
        """Optimizer steps that the weights are trained for."""
        return self.content.get("global_step", "?")

    def weights(self, raw: bool, done: list[str]) -> AbstractContextManager[None]:
        """A ``with`` block in which the checkpoint's averages, if it has any, are the module's weights.

        Args:
            raw: Leave the averages out.
            done: Gets a line that says which weights those are.
        """
        states = [state for state in self.content.get("callbacks", {}).values() if "averages" in state]
        if raw or not states:
            done.append("weights: as trained" + ("" if states else "; the checkpoint has no averages"))
            return nullcontext()
        average = EMA()
        average.load_state_dict(states[0])
        done.append(f"weights: averaged by EMA over {average.num_updates:,} updates")
        return average.average_parameters(self.module)


def open_run(checkpoint: Path, settings: Sequence[str] = ()) -> TunedRun:
    """Open the model of a checkpoint; its config is found beside it.

    Args:
        checkpoint: The file.
        settings: ``--config`` and overrides of its keys, as for ``difftune fit``.

    Raises:
        ConfigError: If there is no config, or something in it cannot be used.
        CheckpointError: If the file is missing, damaged, or of another model.
    """
    check_checkpoint(checkpoint)
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    with TemporaryDirectory() as workspace:
        if "--config" not in settings:
            settings = ["--config", str(config_beside(checkpoint, Path(workspace))), *settings]
        reader = ModelReader(settings)
    return TunedRun(checkpoint, reader, content)


def run_folder(checkpoint: Path) -> Path | None:
    """The folder of a run's saved config and logs: that of the checkpoint, or one folder up."""
    return next((folder for folder in checkpoint.resolve().parents[:2] if (folder / "config.yaml").is_file()), None)


def config_beside(checkpoint: Path, workspace: Path) -> Path:
    """The part of a run's saved config that makes its model and data.

    Raises:
        ConfigError: If there is no config beside the checkpoint or one folder up.
    """
    folder = run_folder(checkpoint)
    if folder is None:
        beside, above = (place / "config.yaml" for place in checkpoint.resolve().parents[:2])
        raise ConfigError(
            f"There is no config of the run beside {checkpoint}: looked for {beside} and {above}. Pass what the "
            "run was started with, --config BASE --config OVERLAY ..."
        )
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    kept = workspace / "config.yaml"
    kept.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k in ("seed_everything", "model", "data")}))
    return kept
