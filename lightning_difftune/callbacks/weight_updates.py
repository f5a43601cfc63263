"""Layers whose trained factors count by the update of a weight that they make, as LoRA's do."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class WeightUpdate(Protocol):
    """A layer of ``peft`` whose adapters add to a weight."""

    adapter_layer_names: tuple[str, ...]
    active_adapters: list[str]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Merged minus original weight."""
        ...


def trained_updates(module: nn.Module) -> dict[str, WeightUpdate]:
    """The layers under ``module`` with an adapter that is trained, by name."""
    updates = {name: layer for name, layer in module.named_modules() if isinstance(layer, WeightUpdate)}
    return {
        name: layer
        for name, layer in updates.items()
        if any(
            p.requires_grad and n.split(".")[0] in layer.adapter_layer_names
            for n, p in module.get_submodule(name).named_parameters()
        )
    }


def factor_prefixes(updates: dict[str, WeightUpdate]) -> tuple[str, ...]:
    """What the names of the updates' own factors begin with."""
    return tuple(f"{name}.{part}." for name, layer in updates.items() for part in layer.adapter_layer_names)


def active_update(layer: WeightUpdate) -> Tensor:
    """The sum of the updates of the layer's weight by its active adapters, in float32 or better."""
    parts = [getattr(layer, name, {}) for name in layer.adapter_layer_names]
    active = [name for name in layer.active_adapters if any(name in part for part in parts)]
    return torch.stack([full_precision(layer.get_delta_weight(name)) for name in active]).sum(0)


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is if it is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
