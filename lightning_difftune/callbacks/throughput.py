"""How many pictures a second a run trains on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Throughput:
    """Pictures a second over the latest steps, pauses such as validation left out.

    Args:
        window: Steps that count.
        clock: Seconds, growing.

    Example:
        >>> seconds = iter([0.0, 0.5, 10.0, 10.5])
        >>> meter = Throughput(clock=lambda: next(seconds))
        >>> meter.start(); meter.stop(8); meter.start(); meter.stop(8)
        >>> meter.rate
        16.0
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)
        self._clock = clock
        self._started: float | None = None

    def start(self) -> None:
        """A step begins, the wait for its data included where there is none before it."""
        self._started = self._clock()

    def stop(self, pictures: int) -> None:
        """The step is done, with so many pictures on all processes."""
        if self._started is not None:
            self._steps.append((self._clock() - self._started, pictures))
        self._started = None

    @property
    def rate(self) -> float:
        """Pictures a second; 0 before the first step."""
        seconds = sum(entry[0] for entry in self._steps)
        return sum(entry[1] for entry in self._steps) / seconds if seconds else 0.0


def pictures_in(batch: Any) -> int:
    """How many samples a batch has: those of all streams of :class:`DiffTuningBatch`, or the first tensor's.

    Example:
        >>> import torch
        >>> pictures_in({"target": {"pixel_values": torch.zeros(6, 1)}, "retention": {"latents": torch.zeros(2, 1)}})
        8
        >>> pictures_in([torch.zeros(3, 1), torch.zeros(3)])
        3
    """
    if isinstance(batch, dict) and "target" in batch:
        return sum(pictures_in(stream) for stream in batch.values())
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    entries = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((count for entry in entries if (count := pictures_in(entry))), 0)
