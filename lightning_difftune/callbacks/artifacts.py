"""Files that callbacks leave beside the logs: pictures, tables, figures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def artifact_folder(trainer: L.Trainer, dirpath: str | Path | None, name: str) -> Path:
    """The folder asked for, or ``name`` in the logger's folder or the trainer's ``default_root_dir``.

    To be called on all processes, since ``trainer.log_dir`` is a broadcast.
    """
    log_dir = trainer.log_dir
    return Path(dirpath) if dirpath else Path(log_dir or trainer.default_root_dir) / name


def write_artifact(path: Path, content: bytes) -> None:
    """Write a file in one piece. A full disk costs the file, not the training: it is a warning."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        rank_zero_warn(f"{path} could not be saved: {error}. Training goes on.")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows of numbers and plain words as CSV."""
    lines = [",".join(f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row) for row in rows]
    write_artifact(path, "\n".join([",".join(header), *lines, ""]).encode())


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as ``path`` with the suffixes .svg, for print, and .png."""
    for suffix in (".svg", ".png"):
        content = BytesIO()
        figure.savefig(content, format=suffix[1:], dpi=150)
        write_artifact(path.with_suffix(suffix), content.getvalue())
