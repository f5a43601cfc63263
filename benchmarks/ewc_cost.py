"""The cost of the EWC callback, as a share of the training time of the same run.

    python benchmarks/ewc_cost.py
    python benchmarks/ewc_cost.py --size DiT-XL/2 --batch-size 32 --precision bf16-mixed   # on a GPU

Trains a DiT on random samples and times the callback in every step, including measurements at its default interval.
Prints a table and writes it as JSON. The share should be below 1 %.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
from harness import Stopwatch, parser_of, quiet_trainer, report
from torch import Tensor

from lightning_difftune.callbacks import EWC
from lightning_difftune.models import DiT
from lightning_difftune.objective import DiffTuningObjective
from lightning_difftune.tuners import LoRA

Sample = tuple[Tensor, Tensor]


class Denoising(L.LightningModule):
    """A DiT on random latents and labels."""

    def __init__(self, size: str, batch_size: int, lora: bool) -> None:
        super().__init__()
        # "nano" is the size of the bundled dit-nano-omniglot.
        self.dit = DiT(20, 5, 1, 192, 3, 6, num_classes=242) if size == "nano" else DiT.from_size(size)
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
        """AdamW over the trained parameters."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def measure(options: argparse.Namespace, lora: bool, **settings: Any) -> dict[str, float]:
    """One run: seconds per step, and the callback's share of them."""
    L.seed_everything(0)
    module, ewc = Denoising(options.size, options.batch_size, lora), EWC(**settings)
    clock = Stopwatch(ewc, ("on_before_optimizer_step", "on_train_batch_end"))
    # The clock runs for whole intervals, with one measurement each.
    steps = options.intervals * ewc.every_n_steps + clock.warm_up
    quiet_trainer(steps, clock, ewc, precision=options.precision).fit(module)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {"trained": trained, "step_seconds": clock.training / clock.steps, "share": clock.share}


def main() -> None:
    """Run both cases."""
    parser = parser_of(__doc__, "ewc_cost")
    parser.add_argument("--size", default="nano", help="nano, or a published size such as DiT-XL/2")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--intervals", type=int, default=2, help="how many times the default interval is timed")
    options = parser.parse_args()

    results = {
        "full": measure(options, lora=False),
        "LoRA": measure(options, lora=True),
    }
    rows = [
        (name, f"{row['trained']:,}", f"{row['step_seconds'] * 1e3:.1f}", f"{row['share']:.2%}")
        for name, row in results.items()
    ]
    title = f"EWC every {EWC().every_n_steps} steps, {options.size}, batch {options.batch_size}"
    report(options, title, ("trained", "parameters", "ms a step", "EWC's share"), rows, results)


if __name__ == "__main__":
    main()
