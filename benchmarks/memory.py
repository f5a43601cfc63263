"""Does resident memory stay flat while a run trains, and while a bank is built?

    python benchmarks/memory.py                                  # 2,000 steps of the quickstart, 200,000 samples
    python benchmarks/memory.py --steps 200 --samples 20000

Both run in this process, and its resident memory is read from /proc every hundred steps, or two thousand samples.
Growth is the slope of a line through the second half of the points; the first half is warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_difftune import MemoryBank
from lightning_difftune.cli.lightning import run_lightning

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """Resident megabytes of this process, without files mapped from the disk."""
    _, total, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (total - shared) * PAGE / 1e6


class Watch(Callback):
    """Records resident memory every hundred steps."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Note it."""
        if trainer.global_step % 100 == 0:
            self.points.append((trainer.global_step, resident()))


def training(steps: int, folder: Path) -> list[tuple[int, float]]:
    """Memory over the steps of the quickstart's Diff-Tuning run, which validates every 175 steps."""
    watch = Watch()
    with as_file(files("lightning_difftune.configs")) as configs:
        args = ["--config", str(configs / "quickstart.yaml"), "--trainer.max_steps", str(steps)]
        args += ["--model.init_args.lr_scheduler.init_args.total_steps", str(steps)]
        args += ["--data.init_args.bank", str(folder / "bank"), "--trainer.enable_progress_bar", "false"]
        args += ["--trainer.default_root_dir", str(folder), "--trainer.logger.init_args.save_dir", str(folder)]
        cli = run_lightning(args, run=False)
    callbacks: Any = cli.trainer
    callbacks.callbacks.append(watch)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return watch.points


class Tiny:
    """A generator of samples that cost nothing: 4 x 8 x 8, a kilobyte each."""

    def bank_spec(self) -> dict[str, Any]:
        """What it is."""
        return {"model": "tiny"}

    def generate_bank(self, indices: Tensor) -> dict[str, Tensor]:
        """Latents (B, 4, 8, 8)."""
        return {"latents": (indices.view(-1, 1, 1, 1) + torch.arange(256).view(4, 8, 8)).float()}


def building(samples: int, folder: Path) -> list[tuple[int, float]]:
    """Memory over the samples of a bank."""
    points: list[tuple[int, float]] = []

    def progress(done: int, total: int) -> None:
        if done % 2000 == 0:
            points.append((done, resident()))

    MemoryBank.build(folder / "tiny", Tiny(), samples, batch_size=50, progress=progress)
    return points


def summary(points: list[tuple[int, float]]) -> dict[str, float]:
    """Memory at the start, the middle and the end, the peak, and the growth over the second half by a fitted line."""
    half = np.array(points[len(points) // 2 :])
    slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0])
    values = [value for _, value in points]
    return {
        "first_mb": values[0],
        "middle_mb": values[len(values) // 2],
        "last_mb": values[-1],
        "peak_mb": max(values),
        "growth_of_second_half_mb": slope * float(half[-1, 0] - half[0, 0]),
    }


def main() -> None:
    """Measure, print a table and write the points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--output", type=Path, default=Path("runs/memory.json"))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as workspace:
        folder = Path(workspace)
        for name, points in (
            (f"bank of {options.samples:,} samples", building(options.samples, folder)),
            (f"{options.steps:,} steps of the quickstart", training(options.steps, folder)),
        ):
            found[name] = {**summary(points), "points": points}
            options.output.write_text(json.dumps(found, indent=1))
    table = Table("job", *(name.replace("_", " ") for name in summary(points)))
    for name, result in found.items():
        table.add_row(name, *(f"{value:.1f}" for key, value in result.items() if key != "points"))
    Console().print(table)


if __name__ == "__main__":
    main()
