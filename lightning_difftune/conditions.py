"""Conditions of a network: ``None``, a tensor of B rows, or (nested) dicts of such tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _each(function: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """Apply a function to each tensor of a condition and its counterparts in others of the same structure."""
    if isinstance(first, dict):
        return {name: _each(function, value, *(other[name] for other in others)) for name, value in first.items()}
    return None if first is None else function(first, *others)


def take(condition: Any, rows: Tensor) -> Any:
    """The entries ``rows`` (K,) int64 of a condition of B samples.

    Example:
        >>> take({"prompt_embeds": torch.arange(3), "size": {"h": torch.arange(3)}}, torch.tensor([2, 0]))
        {'prompt_embeds': tensor([2, 0]), 'size': {'h': tensor([2, 0])}}
    """
    return _each(lambda value: value[rows.to(value.device)], condition)


def concatenate(first: Any, second: Any) -> Any:
    """Join two conditions of the same structure along the batch."""
    return _each(lambda *both: torch.cat(both), first, second)


def where(mask: Tensor, first: Any, second: Any) -> Any:
    """``first`` where the mask (B,) is set and ``second`` elsewhere; a row of either may stand for all B."""

    def choose(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *(1,) * (max(one.ndim, other.ndim) - 1)), one, other)

    return _each(choose, first, second)


def to(condition: Any, device: torch.device) -> Any:
    """A condition on a device."""
    return _each(lambda value: value.to(device), condition)


def equal(first: Any, second: Any) -> bool:
    """Whether two conditions are the same, value by value; ``None`` is equal to nothing."""
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(equal(first[k], second[k]) for k in first)
        )
    return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
