"""Records a run's settings, versions, hardware and data, and resumes a run with its settings."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from lightning_difftune import __version__, draws
from lightning_difftune.callbacks.artifacts import write_artifact
from lightning_difftune.cli.arguments import CONFIG_OPTIONS, values_of
from lightning_difftune.cli.run import Run
from lightning_difftune.cli.run_files import CONFIG, launch_of, newest_checkpoint
from lightning_difftune.data.source_facts import distinct_names
from lightning_difftune.errors import CheckpointError
from lightning_difftune.trust import split_trusted


def circumstances() -> dict[str, Any]:
    """Versions, threads and hardware, for repeating the run."""
    return {
        "versions": {
            "lightning_difftune": __version__,
            "torch": torch.__version__,
            "lightning": L.__version__,
            "python": platform.python_version(),
        },
        "draws": draws.VERSION,  # of the random streams
        "threads": torch.get_num_threads(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
    }


def commit() -> dict[str, Any] | None:
    """The commit of the current repository, and whether its files differ; ``None`` outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return {"commit": head, "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or no commit yet
        return None


def class_counts(datamodule: Any) -> dict[str, int] | None:
    """Pictures per class, by name or index, if the target knows them without reading its pictures."""
    target: Any = getattr(datamodule, "target", None)
    labels = target.labels() if hasattr(target, "labels") else None
    if labels is None:
        return None
    counts = torch.bincount(labels, minlength=getattr(datamodule, "num_classes", None) or 0).tolist()
    names = distinct_names([str(name) for name in getattr(target, "class_names", None) or []])
    return {names[i] if i < len(names) else str(i): count for i, count in enumerate(counts)}


def scores(callbacks: Iterable[Any]) -> dict[str, Any]:
    """The callbacks' logged values that rank models."""
    return {name: facts for callback in callbacks for name, facts in getattr(callback, "scores", dict)().items()}


class SaveRun(SaveConfigCallback):
    """Saves ``config.yaml`` and ``environment.json`` in a run's folder, and the settings in every checkpoint.

    Several runs may share a folder, and the last one overwrites the files; a checkpoint belongs to one run.
    """

    _settings = ""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the folder on all processes, since ``trainer.log_dir`` is a broadcast."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        if stage != "fit":  # a fit saves at its start, after a checkpoint that does not match is refused
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Save, including settings that the module has filled in from its model."""
        settings = self.config.get("model", {}).get("init_args", {})
        for name, values in getattr(pl_module, "completed_settings", dict)().items():
            if name in settings:
                settings[name] = Namespace({**(vars(settings[name]) if settings[name] is not None else {}), **values})
        self._settings = ""
        super().setup(trainer, pl_module, "fit")

    @property
    def settings(self) -> str:
        """The config as YAML; written once for all checkpoints, as it takes a third of a second."""
        if not self._settings:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # skip_none, in version 4
                self._settings = self.parser.dump(self.config, skip_none=False)
        return self._settings

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write both files; failure is only a warning and does not stop the run."""
        record = {
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": sys.argv,
            **circumstances(),
            "processes": trainer.world_size,
            "git": commit(),
            "class_counts": class_counts(getattr(trainer, "datamodule", None)),
            "scores": scores(trainer.callbacks),
        }
        for name, text in {
            "config.yaml": self.settings,
            "environment.json": json.dumps(record, indent=2) + "\n",
        }.items():
            write_artifact(self._folder / name, text.encode())

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the settings as YAML, and flush the logs, so that they are on disk before the checkpoint."""
        for logger in trainer.loggers:
            logger.save()
        checkpoint[CONFIG] = self.settings


def completed(args: Sequence[str]) -> list[str]:
    """A command line with a checkpoint but no config, with the settings of the checkpoint's run inserted.

    A run's folder means its newest checkpoint, also as the first argument. ``--ckpt_path last`` is the newest
    checkpoint under ``--trainer.default_root_dir``, or else under the working directory. Other options override the
    run's. ``--trust NAME`` allows a package that the run's settings name.

    Raises:
        CheckpointError: If there is no checkpoint, or it is damaged.
        ConfigError: If the settings of its run are not found, or name code that is not trusted.
    """
    args, trusted = split_trusted(args)
    if len(args) > 1 and not args[1].startswith("-"):  # the run as the first argument
        args = [args[0], "--ckpt_path", *args[1:]]
    if not (given := values_of(args, "--ckpt_path")) or values_of(args, *CONFIG_OPTIONS):
        return list(args)
    if given[-1] == "last":
        root = Path([".", *values_of(args, "--trainer.default_root_dir")][-1])
        path = newest_checkpoint(root)
        if path is None:
            raise CheckpointError(
                f"There is no checkpoint of a run under {root.resolve()}. Start one with --config; it has to save "
                "checkpoints, as all configs of this package do."
            )
        run = Run(launch_of(path), path)
    elif is_file_name(given[-1]):
        run = Run.find(given[-1], saved=True)
    else:
        return list(args)
    command, *rest = args
    settings = run.settings(trusted)
    trainer = settings.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    last = trainer.get("max_steps") if trainer.get("max_epochs") in (None, -1) else None
    what = "Resuming from" if command == "fit" else "Opening"
    reached = f"{run.step} of {last}" if last else run.step
    rank_zero_info(f"{what} {run.checkpoint}, step {reached}, with the config of its run.")
    return [command, "--config", yaml.safe_dump(settings, sort_keys=False), *rest, "--ckpt_path", str(run.checkpoint)]


def is_file_name(checkpoint: str) -> bool:
    """Whether it is a local path, not one of Lightning's keywords or an address."""
    return checkpoint.partition(":")[0] not in ("last", "hpc", "registry") and "://" not in checkpoint
