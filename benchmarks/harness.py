"""Helpers of the benchmarks: a clock that waits for the device, timed callbacks, saved tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table


def now() -> float:
    """The time in seconds after synchronising the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def device_name() -> str:
    """Description of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next((line for line in cpu_info() if line.startswith("model name")), "").partition(": ")[2]
    return f"{model or platform.processor() or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def cpu_info() -> list[str]:
    """Linux's lines about the processor, none elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


class Stopwatch(Callback):
    """Times the hooks of another callback, and the training around them.

    The clock waits for the device before and after each timed hook, so on a GPU the steps are a little slower than
    without it. Give it to the trainer in addition to the other callback.

    Args:
        callback: The callback with the timed hooks.
        hooks: Their names.
        warm_up: Number of first steps that are not timed.
    """

    def __init__(self, callback: Callback, hooks: Iterable[str], warm_up: int = 10) -> None:
        self.own: dict[str, float] = dict.fromkeys(hooks, 0.0)
        self.warm_up = warm_up
        self.steps, self.began, self.total = 0, 0.0, 0.0
        self.is_counting = False
        for hook in self.own:
            setattr(callback, hook, self._timed(hook, getattr(callback, hook)))

    def _timed(self, name: str, hook: Callable[..., None]) -> Callable[..., None]:
        @wraps(hook)
        def call(*args: Any, **kwargs: Any) -> None:
            start = now()
            hook(*args, **kwargs)
            if self.is_counting:
                self.own[name] += now() - start

        return call

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start after the warm-up."""
        if trainer.global_step == self.warm_up and not self.is_counting:
            self.is_counting, self.began = True, now()

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Stop."""
        self.total, self.steps = now() - self.began, trainer.global_step - self.warm_up
        self.is_counting = False

    @property
    def training(self) -> float:
        """Seconds of the training without the hooks."""
        return self.total - sum(self.own.values())

    @property
    def share(self) -> float:
        """The hooks' time as a share of the training's."""
        return sum(self.own.values()) / self.training


def quiet_trainer(steps: int, *callbacks: Callback, **settings: Any) -> L.Trainer:
    """A trainer on one device that writes and draws nothing."""
    settings = {"devices": 1, "logger": False, "num_sanity_val_steps": 0, "limit_val_batches": 0} | settings
    return L.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def parser_of(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with ``--output``, the JSON file of the figures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(f"runs/benchmarks/{name}.json"), help="the figures as JSON")
    return parser


def report(
    options: argparse.Namespace, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], results: Any
) -> None:
    """Print a table, its first column as text and the rest as figures, and write its data."""
    table = Table(title=f"{title}; {device_name()}", title_justify="left")
    for k, heading in enumerate(columns):
        table.add_column(heading, justify="left" if k == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True).print(table)
    settings = {name: str(value) for name, value in vars(options).items()}
    content = {"device": device_name(), "torch": torch.__version__, "settings": settings, "results": results}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=2) + "\n")
