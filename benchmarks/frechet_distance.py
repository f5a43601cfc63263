"""The Fréchet distance: ours against torchmetrics', time and error.

    python benchmarks/frechet_distance.py

Both compute it from the same sums, in turns, for more and for fewer pictures than features; the reference is computed
from the centred features themselves, by a singular value decomposition in float64. Ours keeps the real pictures' factor
from the first call, as in a training with many evaluations. Then the memory of updates is checked.
"""

from __future__ import annotations

import argparse
import statistics
import tracemalloc
from typing import Any

import torch
from harness import now, parser_of, report
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_difftune.metrics import FrechetDistance


class Given(nn.Module):
    """An extractor whose inputs are the features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The input."""
        return features


def features_of(count: int, num_features: int, seed: int) -> Tensor:
    """Features (count, D) whose variances fall over six decades, as those of networks do."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -3, num_features, dtype=torch.float64)
    rotation = torch.randn(num_features, num_features, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    features = torch.randn(count, num_features, dtype=torch.float64, generator=generator) * scale
    return features @ (rotation / num_features**0.5) + 0.01 * seed


def reference(real: Tensor, fake: Tensor) -> float:
    """The distance from centred features: the trace is a nuclear norm, and no covariance is formed."""
    x, y = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (real, fake))
    x, y = (torch.linalg.qr(z, mode="r").R if len(z) > z.shape[1] else z for z in (x, y))
    root = torch.linalg.svdvals(x @ y.T).sum()
    means = (real.mean(0) - fake.mean(0)).square().sum()
    return (means + x.square().sum() + y.square().sum() - 2 * root).item()


def addresses(metric: FrechetDistance) -> dict[str, int]:
    """Where in memory the sums are."""
    return {name: getattr(metric, name).data_ptr() for name in metric.metric_state}


def main(options: argparse.Namespace) -> None:
    """Compare both on each number of pictures."""
    results: dict[str, Any] = {}
    rows = []
    dim = options.num_features
    for real_count, fake_count in ((5 * dim // 2, 5 * dim // 2), (dim // 2, dim // 4)):
        real, fake = features_of(real_count, dim, 1), features_of(fake_count, dim, 2)
        expected = reference(real, fake)
        metrics = {"ours": FrechetDistance(Given(dim)), "torchmetrics": FrechetInceptionDistance(Given(dim))}
        seconds: dict[str, list[float]] = {name: [] for name in metrics}
        errors = {}
        for metric in metrics.values():
            metric.set_dtype(torch.float64)
            for some, is_real in ((real, True), (fake, False)):
                metric.update(some, real=is_real)
        for _ in range(options.repeats + 1):
            for name, metric in metrics.items():
                metric._computed = None
                start = now()
                value = metric.compute().item()
                seconds[name].append(now() - start)
                errors[name] = abs(value - expected) / expected
        ours, theirs = (statistics.median(seconds[name][1:]) for name in metrics)
        key = f"{real_count:,} real, {fake_count:,} generated"
        results[key] = {"ours_s": ours, "torchmetrics_s": theirs, "ratio": theirs / ours, "errors": errors}
        figures = f"{ours:.2f} s", f"{theirs:.2f} s", f"{theirs / ours:.1f}"
        rows.append((key, *figures, *(f"{errors[name]:.1e}" for name in metrics)))
    metric = FrechetDistance(Given(dim))
    batch = features_of(64, dim, 3)
    metric.update(batch, real=False)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    states = addresses(metric)
    for _ in range(50):
        metric.update(batch, real=False)
    grown = tracemalloc.get_traced_memory()[0] - before
    same = sum(address == states[name] for name, address in addresses(metric).items())
    results["updates"] = {"python_bytes_after_50": grown, "states_in_place": same, "states": len(states)}
    columns = ("pictures", "ours", "torchmetrics", "ratio", "our error", "torchmetrics' error")
    report(options, f"Fréchet distance of {dim:,} features", columns, rows, results)
    print(f"50 updates: {same} of {len(states)} states in the same memory, {grown / 1e3:.0f} kB more of Python's.")


if __name__ == "__main__":
    parser = parser_of(__doc__, "frechet_distance")
    parser.add_argument("--num-features", type=int, default=2048, help="2,048 are Inception-v3's")
    parser.add_argument("--repeats", type=int, default=3)
    main(parser.parse_args())
