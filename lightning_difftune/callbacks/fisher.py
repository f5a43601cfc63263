"""The diagonal of the Fisher information: how much each weight matters for what the pre-trained model does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_difftune.errors import ConfigError
from lightning_difftune.protocols import SupportsBank, SupportsRetentionLoss

Loss = Callable[[L.LightningModule, Any], Tensor]


class DiagonalFisher:
    r"""Estimates :math:`F_i = \frac1N \sum_n (\partial \ell_n / \partial \theta_i)^2` at the pre-trained weights.

    This is the diagonal of the empirical Fisher information, as in Kirkpatrick et al. (2017), where :math:`\ell` is a
    negative log-likelihood, which a squared error is up to a constant, and each batch is *one sample*: the squared
    gradient of a batch's mean is not the mean of the squares, and smaller.

    By default the samples are those of the data module's memory bank, one at a time, and the loss is the module's
    retention loss: see :class:`~lightning_difftune.protocols.SupportsBank` and
    :class:`~lightning_difftune.protocols.SupportsRetentionLoss`. For any other module, pass ``batches`` and ``loss``.

    The module is in eval mode and in full precision meanwhile, global random numbers go on as if nothing had happened,
    and the processes of a run share the samples.

    Args:
        num_samples: N, at most; each costs a forward and a backward pass of one batch.
        batches: Where samples come from instead of the bank; the same, in the same order, on every process.
        loss: ``loss(module, batch)`` => scalar, instead of the module's retention loss.

    Raises:
        ConfigError: If ``num_samples`` is not positive.
    """

    def __init__(self, num_samples: int = 256, batches: Iterable[Any] | None = None, loss: Loss | None = None) -> None:
        if num_samples < 1:
            raise ConfigError(f"num_samples of DiagonalFisher must be at least 1, found {num_samples}.")
        self.num_samples = num_samples
        self.batches = batches
        self.loss = loss

    def estimate(
        self, trainer: L.Trainer, module: L.LightningModule, weights: dict[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """The diagonal for the given parameters of the module, float32 on their devices.

        Args:
            trainer: The module's, with the data set up.
            module: At its pre-trained weights.
            weights: Parameters by name, trained or not.

        Raises:
            ConfigError: If there are no samples or no loss, or the loss does not depend on the parameters.
        """
        loss = self.loss if self.loss is not None else retention_loss
        strategy = trainer.strategy
        sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        count = torch.zeros((), device=module.device)
        with undisturbed(module, weights.values()):
            for batch in islice(self._batches(trainer), trainer.global_rank, self.num_samples, trainer.world_size):
                value = loss(module, strategy.batch_to_device(batch))
                if not value.requires_grad:
                    raise ConfigError("The loss of DiagonalFisher does not depend on the weights that are trained.")
                gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                for total, gradient in zip(sums.values(), gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient.float(), gradient.float())
                count += 1
        count = strategy.reduce(count, reduce_op="sum")
        if count == 0:
            raise ConfigError("DiagonalFisher has no samples: its batches, or the memory bank, are empty.")
        return {name: strategy.reduce(total, reduce_op="sum") / count for name, total in sums.items()}

    def _batches(self, trainer: L.Trainer) -> Iterator[Any]:
        if self.batches is not None:
            yield from self.batches
            return
        data = getattr(trainer, "datamodule", None)
        bank = data.open_bank() if isinstance(data, SupportsBank) else None
        if bank is None:
            raise ConfigError(
                "DiagonalFisher has no samples: the data module has no memory bank. Pass batches and a loss, such as "
                "DiagonalFisher(batches=loader, loss=lambda module, batch: ...)."
            )
        for index in range(len(bank)):
            yield {**bank.read(torch.tensor([index])), "index": index}


def retention_loss(module: L.LightningModule, batch: Any) -> Tensor:
    """The loss of one sample of the bank, at a timestep and noise that depend on its index alone."""
    if not isinstance(module, SupportsRetentionLoss):
        raise ConfigError(
            f"{type(module).__name__} does not say what its loss on a sample of the bank is (`retention_loss`). Pass "
            "DiagonalFisher a loss."
        )
    return module.retention_loss(batch, batch.pop("index"))


@contextmanager
def undisturbed(module: L.LightningModule, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Eval mode, full precision and gradients for ``weights``; afterwards all is as it was, random numbers included."""
    modes = {part: part.training for part in module.modules()}
    frozen = [weight for weight in weights if not weight.requires_grad]
    devices = [module.device] if module.device.type != "cpu" else []
    module.eval()
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        with (
            torch.random.fork_rng(devices, device_type=module.device.type if devices else "cuda"),
            torch.autocast(module.device.type, enabled=False),
            torch.enable_grad(),
        ):
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for part, mode in modes.items():
            part.training = mode
