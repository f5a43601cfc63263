"""The average of the weights: one foreach call against a Python loop and against Lightning's callback.

    python benchmarks/ema.py

Updates the averages of a DiT (DiT-S/2, 33 M parameters) in turns: by our callback's foreach call, by the loop over
named parameters of the authors' code, and by `torch.optim.swa_utils.AveragedModel`, which Lightning's
EMAWeightAveraging wraps. A loop's cost depends on the number of tensors, so smaller models are shown as well.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from harness import now, parser_of, report
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_difftune.callbacks import EMA
from lightning_difftune.models import DiT

DECAY = 0.9999


def foreach(model: DiT) -> Callable[[], None]:
    """Our callback's update, as the Trainer calls it."""
    module: Any = L.LightningModule()
    module.model = model
    trainer: Any = SimpleNamespace(ckpt_path=None, global_step=0)
    callback = EMA(decay=DECAY)
    callback.on_fit_start(trainer, module)
    callback.on_train_start(trainer, module)

    def update() -> None:
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    return update


def python_loop(model: DiT) -> Callable[[], None]:
    """A loop over named parameters."""
    averages = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update() -> None:
        named = dict(averages.named_parameters())
        for name, parameter in model.named_parameters():
            named[name].mul_(DECAY).add_(parameter.data, alpha=1 - DECAY)

    return update


def averaged_model(model: DiT) -> Callable[[], None]:
    """Torch's own copy of a whole model."""
    averages = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return lambda: averages.update_parameters(model)


def main(options: argparse.Namespace) -> None:
    """Time the three on each size, in turns."""
    sizes = {"DiT, 0.3 M": (64, 4), "DiT, 5 M": (192, 8), "DiT-S/2, 33 M": (384, 12)}
    results, rows = {}, []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, (hidden, depth) in sizes.items():
        model = DiT(32, 2, 4, hidden, depth, hidden // 64 or 1).to(device)
        updates = {"foreach": foreach(model), "loop": python_loop(model), "averaged model": averaged_model(model)}
        seconds: dict[str, list[float]] = {way: [] for way in updates}
        for _ in range(options.turns + 1):
            for way, update in updates.items():
                start = now()
                for _ in range(options.updates):
                    update()
                seconds[way].append((now() - start) / options.updates)
        medians = {way: statistics.median(times[1:]) for way, times in seconds.items()}
        pairs = zip(seconds["foreach"][1:], seconds["loop"][1:], strict=True)
        ratio = statistics.median([ours / loop for ours, loop in pairs])
        results[name] = {**medians, "foreach / loop": ratio, "parameters": sum(p.numel() for p in model.parameters())}
        rows.append((name, *(f"{medians[way] * 1e3:.2f} ms" for way in updates), f"{ratio:.2f}"))
    columns = ("model", "foreach", "Python loop", "AveragedModel", "foreach / loop")
    report(options, "One update of the averages", columns, rows, results)


if __name__ == "__main__":
    parser = parser_of(__doc__, "ema")
    parser.add_argument("--updates", type=int, default=5, help="updates in a turn")
    parser.add_argument("--turns", type=int, default=15)
    main(parser.parse_args())
