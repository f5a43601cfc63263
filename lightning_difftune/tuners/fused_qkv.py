"""Attention's fused query, key and value as three linear layers, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PARTS = ("q", "k", "v")


class SplitQKV(nn.Module):
    """A fused linear layer H => 3H as three layers ``q``, ``k`` and ``v``, which adapters find by name.

    The function is the same; :meth:`fuse` gives the layer under the official key names back.

    Example:
        >>> fused, x = nn.Linear(4, 12), torch.randn(2, 4)
        >>> split = SplitQKV(fused)
        >>> torch.allclose(split(x), fused(x)), torch.equal(split.fuse().weight, fused.weight)
        (True, True)
    """

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        weights = fused.weight.detach().chunk(3)
        biases = fused.bias.detach().chunk(3) if fused.bias is not None else (None, None, None)
        self.q, self.k, self.v = (linear_of(weight, bias) for weight, bias in zip(weights, biases, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., H) => queries, keys and values side by side (..., 3H)."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    def fuse(self) -> nn.Linear:
        """The three layers as one."""
        parts = (self.q, self.k, self.v)
        weight = torch.cat([part.weight.detach() for part in parts])
        return linear_of(weight, None if self.q.bias is None else torch.cat([part.bias.detach() for part in parts]))


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of the given values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def fused_names(model: nn.Module) -> list[str]:
    """Names of a model's fused layers: linear ones called ``qkv`` with three outputs per input."""
    return [
        name
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] == "qkv"
        and isinstance(layer, nn.Linear)
        and layer.out_features == 3 * layer.in_features
    ]


def split_qkv(model: nn.Module) -> None:
    """Split the fused layers of a model in place; ``peft`` then opens adapters of :class:`LoRA` on it."""
    for name in fused_names(model):
        fused = model.get_submodule(name)
        assert isinstance(fused, nn.Linear)
        model.set_submodule(name, SplitQKV(fused))


def fuse_qkv(model: nn.Module) -> None:
    """Undo :func:`split_qkv` in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SplitQKV):
            model.set_submodule(name, layer.fuse())
