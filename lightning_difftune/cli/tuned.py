"""The tuned model of a finished run, opened from its checkpoint and the config in it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from lightning_difftune.callbacks import EMA
from lightning_difftune.cli.lightning import ModelReader
from lightning_difftune.cli.resume import check_checkpoint, settings_of
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
    """Open the model of a checkpoint, which holds its config or has it beside it.

    Args:
        checkpoint: The file.
        settings: ``--config`` and overrides of its keys, as for ``difftune fit``.

    Raises:
        ConfigError: If there is no config, or something in it cannot be used.
        CheckpointError: If the file is missing, damaged, or of another model.
    """
    content = check_checkpoint(checkpoint)
    if "--config" not in settings:
        saved = settings_of(checkpoint)
        kept = {key: value for key, value in saved.items() if key in ("seed_everything", "model", "data")}
        settings = ["--config", yaml.safe_dump(kept), *settings]
    return TunedRun(checkpoint, ModelReader(settings), content)


def run_folder(checkpoint: Path) -> Path | None:
    """The folder of a run's saved config and logs: that of the checkpoint, or one folder up."""
    return next((folder for folder in checkpoint.resolve().parents[:2] if (folder / "config.yaml").is_file()), None)
