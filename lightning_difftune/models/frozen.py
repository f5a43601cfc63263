"""A network that is used and never trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network that is never trained, and whose weights are in nobody's checkpoint.

    It follows its parent module to any device, but its weights are no parameters of the parent: they enter neither its
    state dict nor its optimizer, EMA or gradient synchronisation. Always in eval mode; gradients flow through it, not
    into it.

    Args:
        network: Taken over and frozen.

    Example:
        >>> parent = nn.Sequential(nn.Linear(2, 2), Frozen(nn.Linear(2, 2)))
        >>> list(parent.state_dict()), parent.double()[1].network.weight.dtype
        (['0.weight', '0.bias'], torch.float64)
    """

    network: Any

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.__dict__["network"] = network.requires_grad_(False).eval()  # past nn.Module's registration
        self.training = False

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the network stays in eval mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the network along with the parent module."""
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network says."""
        return self.network(*args, **kwargs)
