"""What the EWC callback costs, as a share of the training time of the same run.

    python benchmarks/ewc_cost.py
    python benchmarks/ewc_cost.py --size DiT-XL/2 --batch-size 32 --precision bf16-mixed   # on a GPU

Trains a DiT on random samples and times what the callback does in every step, measurements at its default interval
included. Prints a table and writes it as JSON. The share should be below 1 % without a penalty.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_difftune.callbacks import EWC
from lightning_difftune.callbacks.fisher import DiagonalFisher
from lightning_difftune.models import DiT
from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.tuners import LoRA

Sample = tuple[Tensor, Tensor]


class Denoising(L.LightningModule):
    """A DiT on random latents and labels."""

    def __init__(self, size: str, batch_size: int, lora: bool) -> None:
        super().__init__()
        # The size of the bundled models where none is named.
        nano = {"input_size": 20, "patch_size": 5, "in_channels": 1, "hidden_size": 192, "depth": 3, "num_heads": 6}
        self.dit = DiT(**nano, num_classes=242) if size == "nano" else DiT.from_size(size)
        if lora:
            LoRA().apply(self.dit)
        self.objective, self.batch_size = DiffTuningObjective(), batch_size

    def samples(self, count: int) -> Sample:
        """Latents (B, c, h, w) and labels (B,)."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(count) % self.dit.num_classes
        return torch.randn(count, *self.dit.sample_shape, generator=generator), labels

    def loss(self, batch: Sample) -> Tensor:
        """The plain objective."""
        x0, labels = batch
        return self.objective(self.dit, x0, labels, torch.zeros_like(labels, dtype=torch.bool)).loss

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """One step."""
        return self.loss(batch)

    def train_dataloader(self) -> Any:
        """Batches of those samples."""
        data = torch.utils.data.TensorDataset(*self.samples(8 * self.batch_size))
        return torch.utils.data.DataLoader(data, self.batch_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what is trained."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class TimedEWC(EWC):
    """Times its own hooks, and the run around them."""

    warm_up = 10  # steps that do not count

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clocks after the warm-up."""
        if trainer.global_step == self.warm_up:
            self.own, self.began = 0.0, now(pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Time the penalty."""
        start = now(pl_module) if self.penalty else 0.0
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.penalty and trainer.global_step >= self.warm_up:
            self.own += now(pl_module) - start

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time the measurement."""
        is_time = trainer.global_step % self.every_n_steps == 0
        start = now(pl_module) if is_time else time.perf_counter()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        end = now(pl_module) if is_time else time.perf_counter()
        if trainer.global_step > self.warm_up:
            self.own += end - start
        self.total = end - getattr(self, "began", end)


def now(module: nn.Module) -> float:
    """Seconds, once the device has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(options: argparse.Namespace, lora: bool, **settings: Any) -> dict[str, float]:
    """One run: seconds a step, and the callback's share of it."""
    L.seed_everything(0)
    module, ewc = Denoising(options.size, options.batch_size, lora), TimedEWC(**settings)
    steps = options.intervals * ewc.every_n_steps + TimedEWC.warm_up
    steps -= steps % ewc.every_n_steps - TimedEWC.warm_up  # the clock runs for whole intervals
    trainer = L.Trainer(
        max_steps=steps,
        precision=options.precision,
        devices=1,
        callbacks=[ewc],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    training = ewc.total - ewc.own
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    timed = steps - TimedEWC.warm_up
    return {"trained": trained, "step_seconds": training / timed, "share": ewc.own / training}


def main() -> None:
    """Run the four cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="nano", help="nano, or a published size such as DiT-XL/2")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--intervals", type=int, default=2, help="how many times the default interval is timed")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/ewc_cost.json"))
    options = parser.parse_args()

    def loss(module: Any, batch: Sample) -> Tensor:
        return module.loss(batch)

    samples = [tuple(x[None] for x in pair) for pair in zip(*Denoising("nano", 1, False).samples(4), strict=True)]
    if options.size != "nano":
        samples = [(torch.randn(1, 4, 32, 32), torch.tensor([i])) for i in range(4)]
    fisher = DiagonalFisher(batches=samples, loss=loss)
    results = {
        "full": measure(options, lora=False),
        "LoRA": measure(options, lora=True),
        "full, Fisher": measure(options, lora=False, fisher=fisher),
        "full, Fisher and penalty": measure(options, lora=False, fisher=fisher, penalty=1.0),
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    table = Table(title=f"EWC every {EWC().every_n_steps} steps, {options.size}, batch {options.batch_size}, {device}")
    for heading in ("trained", "parameters", "ms a step", "EWC's share"):
        table.add_column(heading, justify="left" if heading == "trained" else "right")
    for name, row in results.items():
        table.add_row(name, f"{row['trained']:,}", f"{row['step_seconds'] * 1e3:.1f}", f"{row['share']:.2%}")
    Console().print(table)
    settings = {name: str(value) for name, value in vars(options).items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"device": device, "settings": settings, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
