"""The losses of a step, logged and checked without waiting for the device in every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from lightning_difftune.errors import NumericsError
from lightning_difftune.objective import ObjectiveOutput

BINS = 10  # of equal width over the timesteps
KEPT = 50  # steps whose losses are kept on the device until they are checked


def log_losses(module: Any, losses: dict[str, Tensor], world_size: int) -> None:
    """Log the losses of a batch, as the means over all processes; of accumulated batches loggers get the last one's."""
    if world_size > 1:
        # All processes have the same shares of both streams, so the mean of their means is that of the global batch.
        # `sync_dist` would hold all of them at a barrier for each value; this is one gather, which nobody waits for.
        everyone: Any = module.all_gather(torch.stack(list(losses.values())).detach())  # (W, number of losses)
        losses = dict(zip(losses, everyone.mean(0), strict=True))
    results: Any = None if module._trainer is None else module._trainer._results
    for name, loss in losses.items():
        known = None if results is None else results.get(f"training_step.{name}")
        if known is None or known.has_reset:  # the first step of an epoch
            # Not for Lightning's progress bar, which would wait for the device in each step to get the numbers.
            module.log(name, loss)
        else:  # what `log` does after 1,900 Python calls that inspect the metric
            known.forward(loss.detach(), 1)


class FiniteLoss:
    """Keeps the losses of the latest steps on the device, and finds the first that is not finite on request.

    A step costs only the memory of B numbers. The steps between that loss and the check are lost; checkpoints are not,
    since each is preceded by a check.
    """

    def __init__(self) -> None:
        # (4,) int64: whether a loss is not finite, its step, timestep and stream (0 target, 1 retention, -1 unknown)
        self._first: Tensor | None = None
        self._steps: list[tuple[int, ObjectiveOutput, Tensor]] = []

    def watch(self, step: int, output: ObjectiveOutput, is_retention: Tensor) -> None:
        """Keep a step's losses (B,), whose streams are ``is_retention`` (B,) bool."""
        nothing = is_retention.new_empty(0)
        kept = ObjectiveOutput(output.loss.detach(), nothing, nothing, output.per_sample.detach(), output.timesteps)
        self._steps.append((step, kept, is_retention))
        if len(self._steps) >= KEPT:
            self._look()

    @torch.no_grad()
    def _look(self) -> None:
        """Find the first kept loss that is not finite, on the device."""
        for step, output, is_retention in self._steps:
            bad = ~output.per_sample.isfinite()
            sample = bad.long().argmax().view(1)
            known = bad.any()
            now = torch.stack(
                [
                    (known | ~output.loss.isfinite()).long(),
                    torch.full_like(sample[0], step),
                    torch.where(known, output.timesteps.index_select(0, sample)[0], -1),
                    torch.where(known, is_retention.index_select(0, sample)[0].long(), -1),
                ]
            )
            self._first = now if self._first is None else torch.where(self._first[0] > 0, self._first, now)
        self._steps = []

    def check(self, module: Any) -> None:
        """Check the kept losses on all processes at once.

        Raises:
            NumericsError: If a loss was not finite on one of them.
        """
        self._look()
        if self._first is None:
            return
        found = self._first
        if distributed.is_available() and distributed.is_initialized():
            everyone = [torch.empty_like(found) for _ in range(distributed.get_world_size())]
            distributed.all_gather(everyone, found)
            found = min(everyone, key=lambda record: (int(record[0]) == 0, int(record[1])))
        bad, step, timestep, stream = found.tolist()
        if not bad:
            return
        width = -(-module.num_timesteps // BINS)
        low = timestep // width * width
        where = (
            f"in the {('target', 'retention')[stream]} stream at t = {timestep}, of timesteps {low} to "
            f"{min(low + width, module.num_timesteps) - 1}"
            if stream >= 0
            else "in the sum over the batch"
        )
        raise NumericsError(
            f"The loss was first not finite at step {step}, {where}. Nothing has been saved since; resume from the "
            "last checkpoint by `difftune fit RUN` with a lower learning rate, trainer.gradient_clip_val, or "
            "trainer.precision 32-true or bf16-mixed. If it is at the first step, look at the data and the weights."
        )
