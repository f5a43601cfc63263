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
    names = [name for name in trained if name in reference]
    if names:
        with torch.no_grad():
            weights = [full_precision(trained[name].detach()) for name in names]
            starts = [reference[name].to(weight) for name, weight in zip(names, weights, strict=True)]
            pulls = list(torch._foreach_sub(weights, starts))
            torch._foreach_mul_(pulls, strength)
            if information is not None:
                torch._foreach_mul_(pulls, [information[n].to(pull) for n, pull in zip(names, pulls, strict=True)])
            add_gradients([trained[name] for name in names], pulls)
    for name, layer in updates.items():
        factors = [p for factor, p in trained.items() if factor.startswith(f"{name}.")]
        if factors:
            with torch.enable_grad():
                squares = active_update(layer).square()
                weighted = squares if information is None else squares * information[name].to(squares)
                gradients = torch.autograd.grad(strength / 2 * weighted.sum(), factors, allow_unused=True)
            found = [(p, gradient) for p, gradient in zip(factors, gradients, strict=True) if gradient is not None]
            add_gradients([p for p, _ in found], [gradient for _, gradient in found])


def add_gradients(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    """Add to what the parameters have, or start it."""
    known = [parameter.grad for parameter in parameters if parameter.grad is not None]
    more = [gradient.to(p.grad) for p, gradient in zip(parameters, gradients, strict=True) if p.grad is not None]
    if known:
        torch._foreach_add_(known, more)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient.to(parameter)
