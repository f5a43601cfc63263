"""Going on with a run: its newest checkpoint, and the settings that it was started with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info

from lightning_difftune.cli.environment import SaveRun
from lightning_difftune.errors import CheckpointError, ConfigError
from lightning_difftune.models.checkpoint_files import check_records

CONFIG = "config"  # the key of a checkpoint under which its run's settings are


class SavedConfig(SaveRun):
    """Puts the composed settings into every checkpoint, besides the run's ``config.yaml``.

    A folder may be shared by several runs, of which the last one overwrites the file; a checkpoint is of one run. What
    was logged before a checkpoint is on the disk when the checkpoint is.
    """

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add them as YAML, and have the loggers write what they hold back."""
        for logger in trainer.loggers:
            logger.save()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # skip_none: the name in all of version 4
            checkpoint[CONFIG] = self.parser.dump(self.config, skip_none=False)


def completed(args: Sequence[str]) -> list[str]:
    """A command line that names a checkpoint and no config, with the settings of the checkpoint's run put in.

    ``--ckpt_path last`` is the newest checkpoint under ``--trainer.default_root_dir``, or else under the working
    directory. Other options stay, and count more than the run's.

    Raises:
        CheckpointError: If there is no checkpoint, or it is damaged.
        ConfigError: If the settings of its run are nowhere to be found.
    """
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
    elif is_file_name(given):
        path = Path(given)
    else:
        return list(args)
    command, *rest = args
    settings = settings_of(path)
    describe(path, settings)
    return [command, "--config", yaml.safe_dump(settings, sort_keys=False), *rest, "--ckpt_path", str(path)]


def value_of(args: Sequence[str], option: str) -> str | None:
    """What an option is set to, the last time that it is given."""
    values = [after for arg, after in zip(args, [*args[1:], ""], strict=True) if arg == option]
    values += [arg.partition("=")[2] for arg in args if arg.startswith(f"{option}=")]
    return values[-1] if values else None


def is_file_name(checkpoint: str) -> bool:
    """Whether it is a path here, not a word of Lightning's own or an address."""
    return checkpoint.partition(":")[0] not in ("last", "hpc", "registry") and "://" not in checkpoint


def newest_checkpoint(root: Path) -> Path | None:
    """The checkpoint of a Lightning run below a folder that was written last; hidden folders are left out."""
    by_age = sorted(_checkpoints(root), key=lambda path: (path.stat().st_mtime_ns, str(path)), reverse=True)
    return next((path for path in by_age if "pytorch-lightning_version" in read_checkpoint(path)), None)


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """What the run of a checkpoint was started with: as the checkpoint holds it, or as the file beside it does.

    Raises:
        CheckpointError: If the checkpoint is missing or damaged.
        ConfigError: If the settings are in neither.
    """
    content = read_checkpoint(checkpoint)
    places = [folder / "config.yaml" for folder in checkpoint.resolve().parents[:2]]
    saved = next((place for place in places if place.is_file()), None)
    if CONFIG not in content and saved is None:
        raise ConfigError(
            f"{checkpoint} does not hold the config of its run, and there is none beside it: looked for {places[0]} "
            f"and {places[1]}. Pass what the run was started with, --config BASE --config OVERLAY ..."
        )
    where = f"the config in {checkpoint}" if CONFIG in content else str(saved)
    try:
        text = content[CONFIG] if CONFIG in content or saved is None else saved.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where} is no YAML ({' '.join(str(error).split())}). Pass --config.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{where} is no mapping of settings. Pass --config.")
    return settings


def describe(path: Path, settings: dict[str, Any]) -> None:
    """Say in one line what is gone on with."""
    step = read_checkpoint(path).get("global_step", "?")
    trainer = settings.get("trainer")
    last = trainer.get("max_steps") if isinstance(trainer, dict) else None
    rank_zero_info(f"Going on from {path}, step {step}{f' of {last}' if last else ''}, with the config of its run.")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of a run holds, with its tensors mapped into memory; nothing is unpickled but tensors.

    Returns:
        Its content; nothing for a folder, as sharded strategies write them.

    Raises:
        CheckpointError: If it is missing, truncated or something else.
    """
    if path.is_dir():
        return {}
    if not path.is_file():
        raise CheckpointError(f"The checkpoint {path} does not exist. Check ckpt_path.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load has no type of its own for damaged files
        raise CheckpointError(
            f"{path} is no whole checkpoint of a run ({str(error).partition(chr(10))[0]}). Take another one of the "
            "run's; weights without a run, such as an export, go into --model.init_args.model."
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path} is no checkpoint of a run; weights alone go into --model.init_args.model.")
    return content


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint, compare its records with their checksums, and return what it holds.

    Raises:
        CheckpointError: If it is missing, truncated, altered or something else.
    """
    content = read_checkpoint(path)
    if content:
        check_records(path)
    return content


def _checkpoints(root: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (Path(folder) / name for name in files if name.endswith(".ckpt") and not name.startswith("."))
