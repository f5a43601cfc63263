"""The gradient of elastic weight consolidation's penalty, added to the gradients that an optimizer is about to use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_difftune.callbacks.weight_updates import WeightUpdate, active_update, full_precision


def add_penalty_gradient(
    strength: float,
    trained: dict[str, nn.Parameter],
    reference: dict[str, Tensor],
    updates: dict[str, WeightUpdate],
    information: dict[str, Tensor] | None,
) -> None:
    """Add the gradient of strength / 2 * sum_i F_i (theta_i - theta0_i)^2.

    Args:
        strength: Lambda.
        trained: The parameters by name whose gradients are to be changed.
        reference: Their values before training, of those that do not count by an update.
        updates: Layers whose factors count by their update of a weight: theta - theta0 is that update.
        information: F by the names of both; ``None`` for 1.
    """
    with torch.no_grad():
        for name in trained.keys() & reference.keys():
            weight = full_precision(trained[name].detach())
            pull = (weight - reference[name].to(weight)) * strength
            add_gradient(trained[name], pull if information is None else pull * information[name].to(pull))
    for name, layer in updates.items():
        factors = [p for factor, p in trained.items() if factor.startswith(f"{name}.")]
        if factors:
            with torch.enable_grad():
                squares = active_update(layer).square()
                weighted = squares if information is None else squares * information[name].to(squares)
                gradients = torch.autograd.grad(strength / 2 * weighted.sum(), factors, allow_unused=True)
            for parameter, gradient in zip(factors, gradients, strict=True):
                if gradient is not None:
                    add_gradient(parameter, gradient)


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to what a parameter has, or start it."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter)
    else:
        parameter.grad.add_(gradient.to(parameter.grad))
