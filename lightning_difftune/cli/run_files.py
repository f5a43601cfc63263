"""Finds and reads the files of runs, complete or of killed runs."""

from __future__ import annotations

import csv
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_difftune.errors import CheckpointError, DataError
from lightning_difftune.models.checkpoint_files import check_records
from lightning_difftune.modules.checkpoint_io import read_run

Series = list[tuple[int, float]]
CONFIG = "config"  # the checkpoint's key for its run's settings
MARKS = ("metrics.csv", "config.yaml")  # a folder with either is a launch


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a run's checkpoint, with its tensors mapped into memory; only tensors are unpickled.

    Empty for a folder, as sharded strategies write it. A file that cannot be read raises a ``CheckpointError``.
    """
    return {} if path.is_dir() else read_run(path, mmap=True, checked=False)


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint, compare its records with their checksums, and return its content."""
    content = read_checkpoint(path)
    if content:
        check_records(path)
    return content


def read_metrics(path: Path) -> dict[str, Series]:
    """The (step, value) pairs of each name in a file of Lightning's CSVLogger; empty without a file.

    An incomplete last line of a killed run is left out.
    """
    text = text_of(path)
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    metrics: dict[str, Series] = defaultdict(list)
    for row in rows:
        step = _number(row.get("step"))
        if step is not None and math.isfinite(step):
            for name, cell in row.items():
                if name not in (None, "step", "epoch") and (value := _number(cell)) is not None:
                    metrics[name].append((int(step), value))
    return {name: sorted(series, key=lambda point: point[0]) for name, series in metrics.items()}


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def text_of(path: Path) -> str:
    """The text of a file; empty without a file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def mapping_of(parse: Any, text: str) -> dict[str, Any]:
    """The parsed text; empty if it is truncated."""
    try:
        content = parse(text) if text else {}
    except (ValueError, yaml.YAMLError):  # truncated when the run was killed
        return {}
    return content if isinstance(content, dict) else {}


def newest(files: Iterable[Path]) -> Path | None:
    """The latest of some checkpoints; on ties, ``last.ckpt``.

    A copy of a run has other times of its files. So of launches that Lightning has numbered the last one is taken, and
    of checkpoints in one folder with the same settings the one with the most steps. Opening one takes a tenth of a
    second, so those are left closed whose name, as by Lightning, says that they have no more steps.
    """
    files = sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name == "last.ckpt", str(file)))
    if not files:
        return None
    launch = in_order([launch_of(file) for file in files])[-1]
    chosen = [file for file in files if launch_of(file) == launch][-1]
    beside = [file for file in reversed(files) if file.parent == chosen.parent and file != chosen]
    settings, most = _settings_and_steps(chosen) if beside else (None, 0)
    if settings is None:
        return chosen
    for file in sorted(beside, key=_most_steps, reverse=True):
        if _most_steps(file) <= most:
            break
        found, steps = _settings_and_steps(file)
        if found == settings and steps > most:
            chosen, most = file, steps
    return chosen


def _most_steps(checkpoint: Path) -> float:
    """Optimizer steps by the name that Lightning gives, ``epoch=3-step=400.ckpt``; infinite for other names."""
    step = re.search(r"(?<![^-])step=(\d+)(?![^-])", checkpoint.stem)
    return int(step[1]) if step else math.inf


def _settings_and_steps(checkpoint: Path) -> tuple[str | None, int]:
    try:
        content = read_checkpoint(checkpoint)
    except CheckpointError:  # damaged, which is said where it is opened
        return None, 0
    return content.get(CONFIG), content.get("global_step", 0)


def in_order(launches: Sequence[Path]) -> Sequence[Path]:
    """Launches by the numbers that Lightning gave them; in the given order, if they are of several folders."""
    numbers = [re.fullmatch(r"version_(\d+)", launch.name) for launch in launches]
    found = [(int(number[1]), launch) for number, launch in zip(numbers, launches, strict=True) if number]
    if len(found) < len(launches) or len({launch.parent for launch in launches}) > 1:
        return launches
    return [launch for _, launch in sorted(found, key=lambda entry: entry[0])]


def newest_checkpoint(root: Path) -> Path | None:
    """The latest checkpoint of a Lightning run below a folder, without hidden folders."""
    files = list(checkpoints_below(root))
    while (file := newest(files)) is not None:
        if "pytorch-lightning_version" in read_checkpoint(file):
            return file
        files.remove(file)
    return None


def checkpoints_below(root: Path) -> Iterator[Path]:
    """All checkpoints below a folder, files and the folders of sharded strategies, without hidden ones."""
    return (path for path in _paths_below(root) if path.suffix == ".ckpt")


def launches_below(root: Path) -> list[Path]:
    """The folders of launches, with a config or logs: the folder itself and those below it."""
    return list(dict.fromkeys(file.parent for file in _paths_below(root) if file.name in MARKS))


def launch_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint's config and logs: its own, or the one above; its own if neither has them."""
    here = checkpoint.absolute().parent
    return next((folder for folder in (here, here.parent) if any((folder / m).is_file() for m in MARKS)), here)


def root_of(launch: Path) -> Path:
    """The folder that a run's launches share: Lightning puts them in ``lightning_logs/version_N``."""
    if re.fullmatch(r"version_\d+", launch.name):
        launch = launch.parent
    return launch.parent if launch.name == "lightning_logs" else launch


def only_one(place: Path, launches: list[Path]) -> None:
    """Refuse a folder of several runs."""
    roots = sorted({root_of(launch.absolute()) for launch in launches})
    if len(roots) > 1 and place.absolute() not in roots:
        shown = ", ".join(str(root) for root in roots[:5]) + (", ..." if len(roots) > 5 else "")
        raise DataError(f"There are {len(roots)} runs in {place}: {shown}. Name one of them.")


def _paths_below(root: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (Path(folder) / name for name in sorted([*inner, *files]) if not name.startswith("."))
