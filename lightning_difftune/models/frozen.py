"""A network that is used and never trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from lightning_difftune.models.precision import takes_its_own_type


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
    keeps_type = False
    """Whether the weights keep their type where the parent module is cast."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        takes_its_own_type(network)
        self.__dict__["network"] = network.requires_grad_(False).eval()  # past nn.Module's registration
        self.training = False

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the network stays in eval mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the network along with the parent module."""
        move = (lambda tensor: tensor.to(fn(tensor).device)) if self.keeps_type else fn
        self.network._apply(move, recurse)
        return super()._apply(fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network says."""
        return self.network(*args, **kwargs)
