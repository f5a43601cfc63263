"""What a run has left in its folder, whole or killed half-way."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lightning_difftune.errors import DataError

MARKS = ("metrics.csv", "config.yaml")  # either makes a folder a run's

Series = list[tuple[int, float]]


@dataclass(frozen=True)
class RunFolder:
    """A run's logs, config and pictures.

    Attributes:
        path: The folder.
        metrics: (step, value) of each logged name, in order; values that are not finite are in there, too.
        config: What ``config.yaml`` says; empty without one.
        config_text: The same as it is written.
        environment: What ``environment.json`` says; empty without one.
        grids: Pictures by step, for each folder of them, such as ``samples``.
        figures: The other pictures that callbacks drew.
        last_written: When the logs were last written to.
    """

    path: Path
    metrics: dict[str, Series]
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any]
    grids: dict[str, dict[int, Path]]
    figures: list[Path]
    last_written: datetime

    def setting(self, *keys: str) -> Any:
        """A value of the config, such as ``setting("trainer", "max_steps")``; None where there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def callback(self, name: str) -> dict[str, Any] | None:
        """Arguments of the config's callback of a class, or None."""
        callbacks = self.setting("trainer", "callbacks")
        for entry in callbacks if isinstance(callbacks, list) else []:
            if isinstance(entry, dict) and str(entry.get("class_path")).rpartition(".")[2] == name:
                return entry.get("init_args") or {}
        return None

    def finite(self, name: str) -> Series:
        """The finite values of a logged name."""
        return [(step, value) for step, value in self.metrics.get(name, []) if math.isfinite(value)]

    @property
    def last_step(self) -> int:
        """Optimizer steps that the logs know of; Lightning counts them from 0."""
        return max((series[-1][0] + 1 for name, series in self.metrics.items() if name.startswith("train/")), default=0)

    @property
    def max_steps(self) -> int | None:
        """Steps that the run was to have, if it says so."""
        steps = self.setting("trainer", "max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def stopped_early(self) -> bool:
        """Whether the logs end before the run's last step; the last ones may lie between two lines of the log."""
        every = self.setting("trainer", "log_every_n_steps") or 50
        return self.max_steps is not None and self.last_step + every <= self.max_steps

    @property
    def checkpoint(self) -> Path | None:
        """The latest checkpoint in the folder."""
        files = list((self.path / "checkpoints").glob("*.ckpt"))
        return max(files, key=lambda file: (file.stat().st_mtime, file.name == "last.ckpt"), default=None)


def find_run(path: Path) -> Path:
    """The run's folder: the path itself or, in a trainer's folder, the latest run of its logger.

    Raises:
        DataError: If there is none.
    """
    versions = [folder for folder in path.glob("lightning_logs/*") if any((folder / mark).is_file() for mark in MARKS)]
    if versions:
        return max(versions, key=lambda folder: max(file.stat().st_mtime for file in folder.iterdir()))
    if any((path / mark).is_file() for mark in MARKS):
        return path
    if not path.is_dir():
        raise DataError(f"{path} is no folder. `difftune report` takes the folder of a run, where its config.yaml is.")
    below = sorted({file.parent for mark in MARKS for file in path.glob(f"**/{mark}")})[:5]
    found = f"runs lie below it: {', '.join(map(str, below))}" if below else "nor is there one below it"
    raise DataError(
        f"{path} is no folder of a run: it has neither {' nor '.join(MARKS)}; {found}. Pass the folder where the run's "
        "config.yaml is, such as runs/NAME/lightning_logs/version_0."
    )


def read_run(path: Path) -> RunFolder:
    """Read what is there; whatever a killed run did not get to is empty."""
    text = _text(path / "config.yaml")
    grids: dict[str, dict[int, Path]] = defaultdict(dict)
    figures = []
    for file in sorted(path.glob("*/*.png")):
        if step := re.fullmatch(r"step-(\d+)", file.stem):
            grids[file.parent.name][int(step[1])] = file
        else:
            figures.append(file)
    logs = [file for name in ("metrics.csv", "config.yaml") if (file := path / name).is_file()]
    return RunFolder(
        path,
        read_metrics(path / "metrics.csv"),
        _mapping(yaml.safe_load, text),
        text,
        _mapping(json.loads, _text(path / "environment.json")),
        dict(grids),
        figures,
        datetime.fromtimestamp(logs[0].stat().st_mtime).astimezone(),
    )


def read_metrics(path: Path) -> dict[str, Series]:
    """The (step, value) of each name in a file of Lightning's CSVLogger; empty without a file.

    A last line without its end, where the run was killed in the middle of writing, is left out.
    """
    text = _text(path)
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    metrics: dict[str, Series] = defaultdict(list)
    for row in rows:
        step = _number(row.get("step"))
        if step is None or not math.isfinite(step):
            continue
        for name, cell in row.items():
            value = None if name in (None, "step", "epoch") else _number(cell)
            if value is not None:
                metrics[name].append((int(step), value))
    return {name: sorted(series, key=lambda point: point[0]) for name, series in metrics.items()}


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(parse: Any, text: str) -> dict[str, Any]:
    try:
        content = parse(text) if text else {}
    except (ValueError, yaml.YAMLError):  # cut off when the run was killed
        return {}
    return content if isinstance(content, dict) else {}
