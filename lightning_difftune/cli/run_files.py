"""How the files that a run leaves are read, whole or killed half-way."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from lightning_difftune.models.checkpoint_files import check_records
from lightning_difftune.modules.checkpoints import read_run

Series = list[tuple[int, float]]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint of a run holds, with its tensors mapped into memory; nothing is unpickled but tensors.

    Returns:
        Its content; nothing for a folder, as sharded strategies write them.

    Raises:
        CheckpointError: If it is missing, truncated or something else.
    """
    return {} if path.is_dir() else read_run(path, mmap=True, checked=False)


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint, compare its records with their checksums, and return what it holds.

    Raises:
        CheckpointError: If it is missing, truncated, altered or something else.
    """
    content = read_checkpoint(path)
    if content:
        check_records(path)
    return content


def read_metrics(path: Path) -> dict[str, Series]:
    """The (step, value) of each name in a file of Lightning's CSVLogger; empty without a file.

    A last line without its end, where the run was killed in the middle of writing, is left out.
    """
    text = text_of(path)
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


def text_of(path: Path) -> str:
    """What a file holds; empty without a file."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def mapping_of(parse: Any, text: str) -> dict[str, Any]:
    """What a text says, parsed; empty if it was cut off."""
    try:
        content = parse(text) if text else {}
    except (ValueError, yaml.YAMLError):  # cut off when the run was killed
        return {}
    return content if isinstance(content, dict) else {}
