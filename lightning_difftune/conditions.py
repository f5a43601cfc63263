"""Conditions of a network: ``None``, a tensor of B rows, or (nested) dicts of such tensors, on one road."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take(condition: Any, rows: Tensor) -> Any:
    """The entries ``rows`` (K,) int64 of a condition of B samples.

    Example:
        >>> take({"prompt_embeds": torch.arange(3), "size": {"h": torch.arange(3)}}, torch.tensor([2, 0]))
        {'prompt_embeds': tensor([2, 0]), 'size': {'h': tensor([2, 0])}}
    """
    if isinstance(condition, dict):
        return {name: take(value, rows) for name, value in condition.items()}
    return None if condition is None else condition[rows.to(condition.device)]


def concatenate(first: Any, second: Any) -> Any:
    """Join two conditions of the same structure along the batch."""
    if isinstance(first, dict):
        return {name: concatenate(value, second[name]) for name, value in first.items()}
    return None if first is None else torch.cat([first, second])


def where(mask: Tensor, first: Any, second: Any) -> Any:
    """``first`` where the mask (B,) is set and ``second`` elsewhere; a row of either may stand for all B."""
    if isinstance(first, dict):
        return {name: where(mask, value, second[name]) for name, value in first.items()}
    if first is None:
        return None
    return torch.where(mask.view(-1, *(1,) * (max(first.ndim, second.ndim) - 1)), first, second)


def expand(condition: Any, count: int) -> Any:
    """A condition of one row, for ``count`` samples."""
    if isinstance(condition, dict):
        return {name: expand(value, count) for name, value in condition.items()}
    return None if condition is None else condition.expand(count, *condition.shape[1:])


def to(condition: Any, device: torch.device) -> Any:
    """A condition on a device."""
    if isinstance(condition, dict):
        return {name: to(value, device) for name, value in condition.items()}
    return None if condition is None else condition.to(device)


def equal(first: Any, second: Any) -> bool:
    """Whether two conditions are the same, value by value; ``None`` is equal to nothing."""
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(equal(first[k], second[k]) for k in first)
        )
    return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
