"""How the cost grows: with the batch, the model, the memory bank and the number of processes.

    python benchmarks/scaling.py

Trains DiTs on pictures of noise and builds memory banks, one size after the other, and draws the curves next to the
figures (scaling.png). Each process has one thread, so that two of them are twice the hardware.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from harness import now, parser_of, quiet_trainer, report
from lightning.pytorch.callbacks import Callback

from lightning_difftune import DiTDiffTuningModule, MemoryBank, MemoryBankDataModule
from lightning_difftune.data import ArrayImages
from lightning_difftune.models import DiT
from lightning_difftune.plots import curves
from lightning_difftune.sampling import Sampler


class Rate(Callback):
    """Samples per second of all processes, after a warm-up, written by the first of them."""

    def __init__(self, path: Path, batch_size: int, warm_up: int = 3) -> None:
        self.path, self.batch_size, self.warm_up, self.began = path, batch_size, warm_up, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start after the warm-up."""
        if trainer.global_step == self.warm_up:
            self.began = now()

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write the rate."""
        if trainer.is_global_zero:
            samples = (trainer.global_step - self.warm_up) * self.batch_size * trainer.world_size
            self.path.write_text(json.dumps(samples / (now() - self.began)))


def module_of(hidden: int, depth: int) -> DiTDiffTuningModule:
    """A DiT of 64 tokens."""
    torch.manual_seed(0)
    model = DiT(32, 4, 3, hidden, depth, hidden // 32, num_classes=10)
    optimizer = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.0, fused=True)
    return DiTDiffTuningModule(model, optimizer=optimizer, sampler=Sampler(num_inference_steps=4, guidance_scale=1.0))


def training_rate(folder: Path, hidden: int, depth: int, batch_size: int, processes: int, steps: int) -> float:
    """Samples per second of a training."""
    pictures = ArrayImages(np.random.default_rng(0).integers(0, 256, (512, 32, 32, 3), np.uint8), np.arange(512) % 10)
    module = module_of(hidden, depth)
    bank = folder / f"bank-{hidden}-{depth}"
    MemoryBank.build(bank, built(module).bank_generator(), 64)
    data = MemoryBankDataModule(pictures, 10, 32, 3, bank=bank, bank_size=64, batch_size=batch_size)
    settings = {"devices": processes, "strategy": "ddp_spawn"} if processes > 1 else {}
    rate = Rate(folder / "rate.json", batch_size)
    quiet_trainer(steps + rate.warm_up, rate, accelerator="cpu", **settings).fit(module, data)
    return float(json.loads((folder / "rate.json").read_text()))


def built(module: DiTDiffTuningModule) -> DiTDiffTuningModule:
    """The module with its network."""
    module.configure_model()
    return module


def bank_seconds(folder: Path, size: int) -> float:
    """Seconds to build a bank."""
    generator = built(module_of(192, 4)).bank_generator()
    start = now()
    MemoryBank.build(folder / f"bank-of-{size}", generator, size, batch_size=50)
    return now() - start


def draw(path: Path, results: dict[str, dict[float, float]]) -> None:
    """A panel for each curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.4), layout="constrained", facecolor="white")
    for axes, (name, result) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        x_label, _, y_label = name.partition(": ")
        points = [(x, [y]) for x, y in result.items()]
        curves(axes, {y_label: points}, f"By {x_label}", y_label, x_label)
        axes.set_ylim(0, 1.1 * max(result.values()))
        axes.get_legend().remove()
    figure.savefig(path, dpi=120)


def main(options: argparse.Namespace) -> None:
    """Measure every curve."""
    torch.set_num_threads(1)
    steps = options.steps
    results: dict[str, dict[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["batch size: pictures/s"] = {
            size: training_rate(folder, 192, 4, size, 1, steps) for size in (8, 16, 32, 64)
        }
        results["millions of parameters: ms of training a picture"] = {}
        for hidden, depth in ((96, 4), (192, 4), (288, 4), (384, 4)):
            size = sum(p.numel() for p in built(module_of(hidden, depth)).parameters()) / 1e6
            rate = training_rate(folder, hidden, depth, 16, 1, steps)
            results["millions of parameters: ms of training a picture"][round(size, 2)] = 1e3 / rate
        results["samples in the memory bank: seconds to build it"] = {
            size: bank_seconds(folder, size) for size in (250, 500, 1000, 2000)
        }
        results["processes of one thread: pictures/s"] = {
            count: training_rate(folder, 192, 4, 16, count, steps) for count in range(1, options.processes + 1)
        }
    rows = [(name, f"{x:g}", f"{y:.3g}") for name, result in results.items() for x, y in result.items()]
    report(options, "How the cost grows", ("curve", "x", "y"), rows, results)
    draw(options.output.with_suffix(".png"), results)


if __name__ == "__main__":
    parser = parser_of(__doc__, "scaling")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    main(parser.parse_args())
