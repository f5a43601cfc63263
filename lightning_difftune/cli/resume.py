"""Resuming a run with the settings that it was started with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info

from lightning_difftune.cli.environment import SaveRun
from lightning_difftune.cli.run import CONFIG, Run, launch_of, newest_checkpoint
from lightning_difftune.errors import CheckpointError
from lightning_difftune.trust import split_trusted


class SavedConfig(SaveRun):
    """Puts the composed settings into every checkpoint, besides the run's ``config.yaml``.

    A folder may be shared by several runs, of which the last one overwrites the file; a checkpoint is of one run. What
    was logged before a checkpoint is on the disk when the checkpoint is.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put in what the module, which knows its model by now, made of settings that were left out."""
        settings = self.config.get("model", {}).get("init_args", {})
        for name, values in getattr(pl_module, "completed_settings", dict)().items():
            if name in settings:
                settings[name] = Namespace({**(vars(settings[name]) if settings[name] is not None else {}), **values})
        super().on_train_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add them as YAML, and have the loggers write what they hold back."""
        for logger in trainer.loggers:
            logger.save()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # skip_none: the name in all of version 4
            checkpoint[CONFIG] = self.parser.dump(self.config, skip_none=False)


def completed(args: Sequence[str]) -> list[str]:
    """A command line that names a checkpoint and no config, with the settings of the checkpoint's run put in.

    A run's folder may stand for its newest checkpoint, also as the first argument. ``--ckpt_path last`` is the newest
    checkpoint under ``--trainer.default_root_dir``, or else under the working directory. Other options stay, and count
    more than the run's. ``--trust NAME`` allows a package that those name.

    Raises:
        CheckpointError: If there is no checkpoint, or it is damaged.
        ConfigError: If the settings of its run are nowhere to be found, or name what could run other code.
    """
    args, trusted = split_trusted(args)
    if len(args) > 1 and not args[1].startswith("-"):  # the run as the first argument
        args = [args[0], "--ckpt_path", *args[1:]]
    given = value_of(args, "--ckpt_path")
    if given is None or value_of(args, "--config") is not None or value_of(args, "-c") is not None:
        return list(args)
    if given == "last":
        root = Path(value_of(args, "--trainer.default_root_dir") or ".")
        path = newest_checkpoint(root)
        if path is None:
            raise CheckpointError(
                f"There is no checkpoint of a run under {root.resolve()}. Start one with --config; it has to save "
                "checkpoints, as all configs of this package do."
            )
        run = Run(launch_of(path), path)
    elif is_file_name(given):
        run = Run.find(given, saved=True)
    else:
        return list(args)
    command, *rest = args
    settings = run.settings(trusted)
    describe(command, run, settings)
    return [command, "--config", yaml.safe_dump(settings, sort_keys=False), *rest, "--ckpt_path", str(run.checkpoint)]


def value_of(args: Sequence[str], option: str) -> str | None:
    """What an option is set to, the last time that it is given."""
    values = [after for arg, after in zip(args, [*args[1:], ""], strict=True) if arg == option]
    values += [arg.partition("=")[2] for arg in args if arg.startswith(f"{option}=")]
    return values[-1] if values else None


def is_file_name(checkpoint: str) -> bool:
    """Whether it is a path here, not a word of Lightning's own or an address."""
    return checkpoint.partition(":")[0] not in ("last", "hpc", "registry") and "://" not in checkpoint


def describe(command: str, run: Run, settings: dict[str, Any]) -> None:
    """Say in one line what is resumed, or opened."""
    trainer = settings.get("trainer")
    last = trainer.get("max_steps") if isinstance(trainer, dict) else None
    of = f" of {last}" if last else ""
    what = "Resuming from" if command == "fit" else "Opening"
    rank_zero_info(f"{what} {run.checkpoint}, step {run.step}{of}, with the config of its run.")


def is_requeued() -> bool:
    """Whether this is a SLURM job that was started again."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
