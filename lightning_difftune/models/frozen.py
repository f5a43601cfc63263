"""Networks that are used and never trained, and the casting of a network's inputs to its own type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def takes_its_own_type(network: Network) -> Network:
    """Let a network be called with float32 whatever its weights are: samples and conditions are cast on the way in.

    Draws, noise and noise levels are float32 at any precision, and so is what is computed from them. Timesteps and ids,
    which a network embeds in float32 itself, stay as they are.

    Returns:
        The network itself.

    Example:
        >>> takes_its_own_type(nn.Linear(2, 1).bfloat16())(torch.zeros(3, 2)).dtype
        torch.bfloat16
    """
    if cast_inputs not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(cast_inputs, with_kwargs=True)
    return network


@torch.compiler.disable  # a graph of its own otherwise, where the network is compiled
def cast_inputs(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The hook: arguments of a call => those that the network sees."""
    weights = (p for p in network.parameters() if isinstance(p, nn.Parameter))  # and not copies, of WeightCasts
    dtype = next((p.dtype for p in weights if p.is_floating_point()), torch.float32)
    return cast(args, dtype), cast(kwargs, dtype)


def cast(value: Any, dtype: torch.dtype, name: str = "") -> Any:
    """Floating-point tensors of two dimensions or more in another type, also inside dicts, lists and tuples."""
    if isinstance(value, Tensor):
        stays = not value.is_floating_point() or value.ndim < 2 or name.endswith("ids")
        return value if stays else value.to(dtype)
    if isinstance(value, Mapping):
        return {key: cast(entry, dtype, str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cast(entry, dtype, name) for entry in value)
    return value


class Frozen(nn.Module):
    """Holds a network that is never trained, and whose weights are not in any checkpoint.

    It follows its parent module to any device, but its weights are not parameters of the parent: they enter neither its
    state dict nor its optimizer, EMA or gradient synchronisation. Always in eval mode; gradients flow through it, not
    into it.

    Args:
        network: The network; it is frozen.

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
        self.__dict__["network"] = network.requires_grad_(False).eval()  # bypasses nn.Module's registration
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
        """The network's output."""
        return self.network(*args, **kwargs)
