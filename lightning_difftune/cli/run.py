"""A run on disk: its location and its files, complete or of a killed run."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from lightning_difftune.callbacks.ema import averages_in
from lightning_difftune.cli.parser import yaml_problem
from lightning_difftune.cli.run_files import (
    CONFIG,
    MARKS,
    Series,
    checkpoints_below,
    in_order,
    launch_of,
    launches_below,
    mapping_of,
    newest,
    newest_checkpoint,
    only_one,
    read_checkpoint,
    read_metrics,
    text_of,
)
from lightning_difftune.errors import CheckpointError, ConfigError, DataError
from lightning_difftune.trust import check_trust

STEP = re.compile(r"step-(\d+)")  # the name of a picture of a step


class Run:
    """One launch of a run: its checkpoint, config, logs and pictures, each read on first use.

    Files that a killed run did not write are empty.

    Args:
        path: The folder of the launch, with ``config.yaml`` and ``metrics.csv``, such as ``.../version_0``.
        checkpoint: One of its checkpoints; by default the newest in the folder's ``checkpoints``.
    """

    def __init__(self, path: Path, checkpoint: Path | None = None) -> None:
        self.path = path
        self.checkpoint = checkpoint or newest(checkpoints_below(path / "checkpoints"))

    @classmethod
    def find(cls, place: str | Path, saved: bool = False) -> Run:
        """Find a run by any of its places.

        Args:
            place: The trainer's ``default_root_dir``, the folder of a launch, its folder of checkpoints, or a
                checkpoint. Of several launches, the newest that trained is used.
            saved: Whether it must have a checkpoint.

        Raises:
            DataError: If there is no run, or there are several.
            CheckpointError: If it must have a checkpoint and there is none.
        """
        place = Path(place).expanduser()
        if place.is_file() or place.suffix == ".ckpt":
            if not place.exists():
                raise CheckpointError(f"The checkpoint {place} does not exist. Check the path.")
            if place.suffix in (".yaml", ".yml"):
                raise DataError(
                    f"{place} is a config, not a run. Start a run by `difftune fit --config {place}`, or name a run by "
                    "its folder or one of its checkpoints."
                )
            return cls(launch_of(place), place)
        if not place.is_dir():
            raise DataError(f"{place} does not exist. Name a run by its folder or one of its checkpoints.")
        if saved:
            checkpoint = newest_checkpoint(place)
            if checkpoint is None:
                raise CheckpointError(
                    f"There is no checkpoint of a run in {place}. Name the folder of a run that has saved one, or a "
                    "checkpoint."
                )
            only_one(place, [launch_of(file) for file in checkpoints_below(place)])
            return cls(launch_of(checkpoint), checkpoint)
        launches = launches_below(place)
        if not launches and any(checkpoints_below(place)):  # a folder of checkpoints
            return cls.find(place, saved=True)
        if not launches:
            raise DataError(
                f"{place} is not the folder of a run: neither it nor a folder below it has a {' or a '.join(MARKS)}. "
                "Name the run's default_root_dir, or the folder where its config.yaml is."
            )
        only_one(place, launches)
        runs = {run.path: run for run in sorted(map(cls, launches), key=lambda run: (run.last_written, str(run.path)))}
        ordered = [runs[launch] for launch in in_order(list(runs))]
        return next((run for run in reversed(ordered) if run.has_step), ordered[-1])

    # -- the checkpoint -------------------------------------------------------------------------------------------

    @cached_property
    def content(self) -> dict[str, Any]:
        """The checkpoint's content, with its tensors mapped into memory; empty without one."""
        return {} if self.checkpoint is None else read_checkpoint(self.checkpoint)

    @property
    def step(self) -> int | str:
        """Optimizer steps of the checkpoint."""
        return self.content.get("global_step", "?")

    @property
    def class_names(self) -> list[str] | None:
        """Names of the target's classes, if the checkpoint has them."""
        return self.content.get("class_names")

    @property
    def averages(self) -> Any:
        """The averaged weights, if the checkpoint has any, with ``average_parameters(module)`` and ``num_updates``."""
        return averages_in(self.content)

    def settings(self, trusted: Sequence[str] = (), parts: Sequence[str] | None = None) -> dict[str, Any]:
        """The run's settings, from the checkpoint or the file next to it.

        Args:
            trusted: Further packages and names that the settings may name.
            parts: Required keys; names under other keys need not be trusted. All by default.

        Raises:
            CheckpointError: If the checkpoint is damaged.
            ConfigError: If the settings are in neither, or name code that is not trusted.
        """
        file = self.path / "config.yaml"
        if CONFIG not in self.content and not file.is_file():
            raise ConfigError(
                f"{self.checkpoint} does not hold the config of its run, and there is none next to it: looked for "
                f"{file}. Pass what the run was started with, --config BASE --config OVERLAY ..."
            )
        where = f"the config in {self.checkpoint}" if CONFIG in self.content else str(file)
        try:
            text = self.content[CONFIG] if CONFIG in self.content else file.read_text(encoding="utf-8")
            settings = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{where} is not YAML ({yaml_problem(error)}). Pass --config.") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"{where} is not a mapping of settings. Pass --config.")
        if parts is not None:
            settings = {key: value for key, value in settings.items() if key in parts}
        for key in ("ckpt_path", "weights_only"):  # a file must not choose the checkpoint, or whether it may run code
            settings.pop(key, None)
        check_trust(settings, str(self.checkpoint or file), trusted)
        return settings

    # -- the folder -----------------------------------------------------------------------------------------------

    @cached_property
    def config_text(self) -> str:
        """The text of ``config.yaml``, else the checkpoint's settings, else empty."""
        if text := text_of(self.path / "config.yaml"):
            return text
        try:
            return str(self.content.get(CONFIG, ""))
        except CheckpointError:
            return ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config; empty without one."""
        return mapping_of(yaml.safe_load, self.config_text)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """The content of ``environment.json``; empty without one."""
        return mapping_of(json.loads, text_of(self.path / "environment.json"))

    @cached_property
    def metrics(self) -> dict[str, Series]:
        """(step, value) of each logged name, in order, including values that are not finite."""
        return read_metrics(self.path / "metrics.csv")

    @cached_property
    def _pictures(self) -> list[Path]:
        return sorted(self.path / name for name in glob("*/*.png", root_dir=self.path))  # without hidden ones

    @cached_property
    def grids(self) -> dict[str, dict[int, Path]]:
        """Pictures by step, for each folder of them, such as ``samples``."""
        grids: dict[str, dict[int, Path]] = defaultdict(dict)
        for file in self._pictures:
            if step := STEP.fullmatch(file.stem):
                grids[file.parent.name][int(step[1])] = file
        return dict(grids)

    @cached_property
    def figures(self) -> list[Path]:
        """The other pictures that callbacks drew."""
        return [file for file in self._pictures if not STEP.fullmatch(file.stem)]

    @property
    def last_written(self) -> datetime:
        """Time of the last write to the logs."""
        files = [self.path / name for name in MARKS]
        if self.checkpoint is not None:
            files.append(self.checkpoint)
        return datetime.fromtimestamp(next((f.stat().st_mtime for f in files if f.is_file()), 0.0)).astimezone()

    def setting(self, *keys: str) -> Any:
        """A value of the config, such as ``setting("trainer", "max_steps")``; ``None`` if there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def callback(self, name: str) -> dict[str, Any] | None:
        """Arguments of the config's callback with this class name, or ``None``."""
        for entry in entries(self.setting("trainer", "callbacks")):
            if class_name(entry) == name:
                return entry.get("init_args") or {}
        return None

    def finite(self, name: str) -> Series:
        """The finite values of a logged name."""
        return [(step, value) for step, value in self.metrics.get(name, []) if math.isfinite(value)]

    @property
    def score_facts(self) -> dict[str, dict[str, Any]]:
        """The measured values that rank models, by logged name.

        Each has ``higher_is_better`` and a ``label``; see
        :meth:`~lightning_difftune.callbacks.MeasuringCallback.scores`.
        """
        known = self.environment.get("scores")
        return {name: facts for name, facts in (known or {}).items() if name in self.metrics}

    @property
    def scores(self) -> dict[str, bool]:
        """Logged names of metrics of generated pictures, and whether higher is better."""
        return {name: bool(facts.get("higher_is_better")) for name, facts in self.score_facts.items()}

    @property
    def last_step(self) -> int:
        """Optimizer steps in the logs, which Lightning counts from 0."""
        return max((series[-1][0] + 1 for name, series in self.metrics.items() if name.startswith("train/")), default=0)

    @property
    def first_step(self) -> int:
        """The step of the first line in the logs: of a run that was resumed, later ones only are in its folder."""
        return min((series[0][0] + 1 for name, series in self.metrics.items() if name.startswith("train/")), default=0)

    @property
    def has_step(self) -> bool:
        """Whether it has trained: its logs have a step, or its folder a checkpoint."""
        return self.checkpoint is not None or self.last_step > 0

    @property
    def max_steps(self) -> int | None:
        """The planned number of steps, if the config has it and no number of epochs that may end the run sooner."""
        steps, epochs = self.setting("trainer", "max_steps"), self.setting("trainer", "max_epochs")
        return steps if isinstance(steps, int) and steps > 0 and epochs in (None, -1) else None

    @property
    def stopped_early(self) -> bool:
        """Whether the logs end before the run's last step, allowing for steps after the last line of the log."""
        return self.max_steps is not None and self.last_step + self.log_interval <= self.max_steps

    @property
    def log_interval(self) -> int:
        """Steps between two lines of the logs."""
        return self.setting("trainer", "log_every_n_steps") or 50

    @property
    def validates_all(self) -> bool:
        """Whether ``val/loss`` is of all held-out pictures, not of the first batches: as few as one picture."""
        limit = self.setting("trainer", "limit_val_batches")
        return limit is None or (isinstance(limit, float) and limit == 1)

    @property
    def step_words(self) -> str:
        """What a step is, where it is not one batch of one process; empty otherwise."""
        processes, window = self.environment.get("processes", 1), self.setting("trainer", "accumulate_grad_batches")
        each = f" on each of {processes} processes" if processes > 1 else ""
        return each + (f", {window} batches per step" if isinstance(window, int) and window > 1 else "")


def entries(value: Any) -> list[Any]:
    """The entries of a config's key that takes one or a list of them, such as ``trainer.callbacks``."""
    return [] if value is None else value if isinstance(value, list) else [value]


def class_name(entry: Any) -> str:
    """The class of an entry in a config, without its module; empty if it is not one of a class."""
    return str(entry.get("class_path", "")).rpartition(".")[2] if isinstance(entry, dict) else ""
