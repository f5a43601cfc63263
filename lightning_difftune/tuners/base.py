"""Base of the parameter-efficient methods: freezing, the label table, and finding layers by name."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

from torch import nn

from lightning_difftune.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Module)


class ParameterEfficientTuner(ABC):
    """Base of the methods: a subclass inserts layers into a network and selects what is trained.

    Everything else is frozen except the label table of class-conditional models, which every method of Table 1 trains.
    """

    not_merged: str = "it does not say what its layers fold into"
    """Why :meth:`merge` is not possible, for a method that has none of its own."""

    @abstractmethod
    def insert(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Insert the method's layers in place and return the parameters to train.

        Layers are found and checked before the first one is changed, so that an error leaves the model unchanged.
        """

    def apply(self, model: nn.Module) -> None:
        """Insert the method's layers and train only them.

        Args:
            model: The pre-trained network, changed in place.

        Raises:
            ConfigError: If a tuner was already applied to it, or it lacks the layers that this one needs.
        """
        previous = getattr(model, "tuned_by", None)
        if previous is not None:
            raise ConfigError(
                f"{type(self).__name__} cannot be applied to a model that {previous} was applied to. Load the "
                "pre-trained model again, or continue with what merge returns."
            )
        trained = list(self.insert(model))
        table = getattr(model, "y_embedder", None)
        if isinstance(table, nn.Module):
            trained.extend(table.parameters())
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        cast("Any", model).tuned_by = type(self).__name__

    def merge(self, model: Model) -> Model:
        """A frozen copy that computes the same without the method's layers, for export.

        Args:
            model: A network that this tuner was applied to; it is not changed.

        Raises:
            ConfigError: If the method's layers have no equivalent in a plain network.
        """
        raise ConfigError(f"{type(self).__name__} cannot be merged: {self.not_merged}.")

    def _untuned_copy(self, model: Model) -> Model:
        """A frozen copy that another tuner may be applied to; it still has the inserted layers."""
        previous = getattr(model, "tuned_by", None)
        if previous != type(self).__name__:
            raise ConfigError(
                f"{type(self).__name__} can merge only what it was applied to; this model has {previous or 'no tuner'}."
            )
        merged = copy.deepcopy(model).requires_grad_(False)
        del cast("Any", merged).tuned_by
        return merged


def find(model: nn.Module, name: str, kind: type[Layer], tuner: str) -> Layer:
    """The layer of a model under a dotted name."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in model.named_children()) or "no layers"
        raise ConfigError(
            f"{tuner} looks for {name!r} in {type(model).__name__}, which has no such layer; it has {children}."
        ) from None
    if not isinstance(layer, kind):
        raise ConfigError(
            f"{tuner} needs {name!r} of {type(model).__name__} to be of the kind {kind.__name__}, "
            f"found {type(layer).__name__}."
        )
    return layer


def find_blocks(model: nn.Module, tuner: str) -> list[nn.Module]:
    """The transformer blocks of a model, in order."""
    return list(find(model, "blocks", nn.ModuleList, tuner))


def biases(model: nn.Module) -> Iterator[nn.Parameter]:
    """All biases of a model."""
    return (parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias")
