"""Casts of a network's inputs to the type of its weights, and of its weights to that of autocast, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def takes_its_own_type(network: Network) -> Network:
    """Let a network with weights of any type be called with float32: samples and conditions are cast on input.

    Draws, noise, noise levels and results computed from them are float32 at any precision. Timesteps and ids, which a
    network embeds in float32 itself, are not cast.

    Returns:
        The network itself.

    Example:
        >>> takes_its_own_type(nn.Linear(2, 1).bfloat16())(torch.zeros(3, 2)).dtype
        torch.bfloat16
    """
    if cast_inputs not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(cast_inputs, with_kwargs=True)
    return network


@torch.compiler.disable  # otherwise it becomes a graph of its own in a compiled network
def cast_inputs(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The hook: arguments of a call => those that the network gets."""
    weights = (p for p in network.parameters() if isinstance(p, nn.Parameter))  # not the copies of WeightCasts
    dtype = next((p.dtype for p in weights if p.is_floating_point()), torch.float32)
    return cast(args, dtype), cast(kwargs, dtype)


def cast(value: Any, dtype: torch.dtype, name: str = "") -> Any:
    """Cast floating-point tensors of two or more dimensions, also inside dicts, lists and tuples."""
    if isinstance(value, Tensor):
        stays = not value.is_floating_point() or value.ndim < 2 or name.endswith("ids")
        return value if stays else value.to(dtype)
    if isinstance(value, Mapping):
        return {key: cast(entry, dtype, str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cast(entry, dtype, name) for entry in value)
    return value


class WeightCasts:
    """Makes autocast's half-precision copies of weights in one operation for many of them.

    Autocast casts the weights of linear layers and convolutions one by one, and their gradients in the backward pass:
    two small kernels per weight in each step. Inside ``with casts.active():``, under autocast, layers use the copies
    instead of their weights. Outputs and gradients are the same to the bit; gradients go to the weights themselves, in
    float32. Copies of frozen weights are kept between steps.

    Args:
        networks: Networks with the layers. Those with gradient checkpointing are left to autocast; those that switch
            autocast off for some of their layers are not supported.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with torch.autocast("cpu", torch.bfloat16), WeightCasts([layer]).active():
        ...     layer.weight.dtype, layer(torch.zeros(3, 2)).dtype
        (torch.bfloat16, torch.bfloat16)
        >>> layer.weight.dtype
        torch.float32
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._networks = list(networks)
        self._is_active = False
        self._find()

    def __getstate__(self) -> dict[str, Any]:
        return {"_networks": self._networks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_networks"])  # type: ignore[misc]

    def _find(self) -> None:
        """Find the weights; those that layers share are cast once."""
        networks = [network for network in self._networks if not any(map(is_checkpointed, network.modules()))]
        layers = [layer for network in networks for layer in network.modules() if isinstance(layer, _CAST)]
        self._places: list[tuple[Any, str]] = [
            (layer._parameters, name)
            for layer in layers
            for name, weight in layer._parameters.items()
            if weight is not None and weight.dtype == torch.float32
        ]
        self._there: list[Tensor] = [owner[name] for owner, name in self._places]
        numbers: dict[int, int] = {}
        self._number = [numbers.setdefault(id(weight), len(numbers)) for weight in self._there]
        self._weights = list({id(weight): weight for weight in self._there}.values())
        self._trained: list[bool] = []
        self._groups: list[_Group] = []
        self._frozen: dict[int, tuple[Any, Tensor]] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let layers use the copies; without gradients, trained weights are left to autocast, which caches them.

        Inside such a block, another one changes nothing: a teacher may be the trained network without its updates.
        """
        if self._is_active:
            yield
            return
        if not self._are_there():
            self._find()
        kind = self._weights[0].device.type if self._weights else "cpu"
        if not self._weights or not torch.is_autocast_enabled(kind):
            yield
            return
        dtype, copies = torch.get_autocast_dtype(kind), list[Tensor](self._weights)
        trained = [weight.requires_grad for weight in self._weights]
        if trained != self._trained:
            chosen = [number for number, flag in enumerate(trained) if flag]
            self._groups = [
                _Group(self._weights, chosen[start : start + GROUP]) for start in range(0, len(chosen), GROUP)
            ]
            self._trained, self._frozen = trained, {}
        if not all(trained):
            for number, flag in enumerate(trained):
                copies[number] = copies[number] if flag else self._kept(number, dtype)
        for group in self._groups if torch.is_grad_enabled() else ():
            results: Any = _CastTogether.apply(group, dtype, *group.weights)
            for number, copy in zip(group.numbers, results, strict=True):
                copies[number] = copy
        self._is_active = True
        try:
            for (owner, name), number in zip(self._places, self._number, strict=True):
                owner[name] = copies[number]
            yield
        finally:
            self._is_active = False
            for (owner, name), weight in zip(self._places, self._there, strict=True):
                owner[name] = weight

    def _are_there(self) -> bool:
        try:
            return all(map(is_, [owner[name] for owner, name in self._places], self._there))
        except KeyError:
            return False

    def _kept(self, number: int, dtype: torch.dtype) -> Tensor:
        """The copy of a frozen weight, made again if the weight has changed."""
        weight = self._weights[number]
        state = (weight.data_ptr(), None if weight.is_inference() else weight._version, dtype)
        if number not in self._frozen or self._frozen[number][0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._frozen[number] = state, torch.empty_like(weight, dtype=dtype).copy_(weight)
        return self._frozen[number][1]


def is_checkpointed(part: nn.Module) -> bool:
    """Whether a part of a diffusers network uses gradient checkpointing."""
    return bool(getattr(part, "gradient_checkpointing", False))


def weight_casts_of(network: nn.Module) -> WeightCasts:
    """The :class:`WeightCasts` of one network, made once."""
    if "_weight_casts" not in vars(network):
        vars(network)["_weight_casts"] = WeightCasts([network])
    casts: WeightCasts = vars(network)["_weight_casts"]
    return casts


_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # layers whose weights autocast casts
GROUP = 32  # weights per operation: gradients are ready in parts, so that DDP can overlap their exchange


class _Group:
    """A group of weights, and the memory of their copies while no graph holds it."""

    def __init__(self, weights: Sequence[Tensor], numbers: Sequence[int]) -> None:
        self.weights, self.numbers = [weights[number] for number in numbers], numbers
        self.spare: list[Tensor] | None = None

    def take(self, dtype: torch.dtype) -> list[Tensor]:
        """Memory for the copies."""
        spare, self.spare = self.spare, None
        if spare is not None and (spare[0].dtype, spare[0].device) == (dtype, self.weights[0].device):
            return spare
        return [torch.empty_like(weight, dtype=dtype) for weight in self.weights]


class _CastTogether(torch.autograd.Function):
    """Float32 weights => half-precision copies; gradients of the copies => float32 gradients of the weights."""

    @staticmethod
    def forward(ctx: Any, group: _Group, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        """All in one operation."""
        ctx.set_materialize_grads(False)
        ctx.group, ctx.copies = group, group.take(dtype)
        torch._foreach_copy_(ctx.copies, weights)
        return tuple(ctx.copies)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """All in one operation."""
        wide: list[Any] = [
            None if gradient is None else torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients
        ]
        pairs: list[Any] = [pair for pair in zip(wide, gradients, strict=True) if pair[1] is not None]
        if pairs:
            torch._foreach_copy_([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        ctx.group.spare = ctx.copies
        return None, None, *wide
