"""The loss by noise level on held-out pictures, against the pre-trained model's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from lightning_difftune.draws import Draws
from lightning_difftune.errors import ConfigError
from lightning_difftune.pictures import to_pixel_values
from lightning_difftune.protocols import SupportsDenoisingLosses, SupportsLabelledImages


class HeldOutLoss:
    """The denoising loss on held-out pictures by noise level, and its change against the pre-trained model.

    An evaluator of ``difftune compare``, for class-conditional modules. The pictures are evenly spaced over the
    held-out data; each is denoised once in every bin, at a timestep spread evenly over the bin, by the tuned network
    under its class and by the pre-trained one under the null class, at the same noise. ``held_out_loss/t000`` is the
    first bin's mean squared error, named after its lowest timestep, and ``held_out_gap/t000`` is tuned / pre-trained
    - 1: above 0 the tuned model has forgotten how to denoise there.

    Args:
        num_samples: Pictures.
        num_bins: Bins of equal width over the timesteps.
        batch_size: Pictures at a time.
        seed: Of the noise.

    Raises:
        ConfigError: If a number is not positive.
    """

    def __init__(self, num_samples: int = 1020, num_bins: int = 10, batch_size: int = 255, seed: int = 0) -> None:
        for name, number in (("num_samples", num_samples), ("num_bins", num_bins), ("batch_size", batch_size)):
            if number < 1:
                raise ConfigError(f"{name} of HeldOutLoss must be at least 1, found {number}.")
        self.num_samples, self.num_bins, self.batch_size, self.seed = num_samples, num_bins, batch_size, seed

    def evaluate(self, module: Any) -> dict[str, float]:
        """The losses and gaps, for the weights that the module has now.

        Raises:
            ConfigError: If the module cannot be compared with a pre-trained one, or its data has no labelled pictures.
        """
        data = module.trainer.datamodule
        comparable = isinstance(module, SupportsDenoisingLosses)
        if not (comparable and isinstance(data, SupportsLabelledImages)):
            raise ConfigError(
                f"HeldOutLoss needs a module with what protocols.SupportsDenoisingLosses lists and a data module with "
                f"labelled_images(); found {type(module).__name__} and {type(data).__name__}."
            )
        pictures, labels = (torch.cat(parts) for parts in zip(*data.labelled_images("val"), strict=True))
        chosen = torch.linspace(0, len(labels) - 1, min(self.num_samples, len(labels))).round().long()
        edges = [round(k * module.num_timesteps / self.num_bins) for k in range(self.num_bins + 1)]
        pretrained, training = module.pretrained(), module.training
        module.eval()  # in which no label is dropped
        sums = torch.zeros(2, self.num_bins, dtype=torch.float64)
        with torch.no_grad(), module.trainer.precision_plugin.forward_context():
            for number, batch in enumerate(chosen.split(self.batch_size)):
                target = {"pixel_values": to_pixel_values(pictures[batch]), "class_labels": labels[batch]}
                target = {name: column.to(module.device) for name, column in target.items()}
                draws = Draws(self.seed, number, module.device)
                x0, condition, _ = module.prepare({"target": target}, draws)
                places = (torch.arange(len(x0), device=x0.device) + 0.5) / len(x0)
                for k, (first, end) in enumerate(pairwise(edges)):
                    t, noise = (first + places * (end - first)).long(), draws.normal(*x0.shape)
                    tuned = module.denoising_losses(module.denoise, x0, condition, t, noise)
                    before = module.denoising_losses(pretrained, x0, module.source_condition(condition), t, noise)
                    sums[:, k] += torch.stack([tuned.sum(), before.sum()]).double().cpu()
        module.train(training)
        digits = len(str(edges[-1] - 1))
        named = {f"t{first:0{digits}}": sums[:, k].tolist() for k, first in enumerate(edges[:-1])}
        return {f"held_out_loss/{name}": tuned / len(chosen) for name, (tuned, _) in named.items()} | {
            f"held_out_gap/{name}": tuned / before - 1 for name, (tuned, before) in named.items()
        }
