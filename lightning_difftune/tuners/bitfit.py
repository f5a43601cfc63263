"""BitFit (Ben Zaken et al., 2022): train the biases."""

from __future__ import annotations

from torch import nn

from lightning_difftune.errors import ConfigError
from lightning_difftune.tuners.base import Model, ParameterEfficientTuner, biases


class BitFit(ParameterEfficientTuner):
    """Train all biases and the label table; nothing is inserted.

    607,136 parameters of DiT-XL/2 with 101 classes (Table 1).

    Example:
        >>> model = nn.Linear(3, 2)
        >>> BitFit().apply(model)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['bias']
    """

    def insert(self, model: nn.Module) -> list[nn.Parameter]:
        """The biases; nothing is inserted."""
        found = list(biases(model))
        if not found:
            raise ConfigError(f"BitFit looks for parameters named 'bias'; {type(model).__name__} has none.")
        return found

    def merge(self, model: Model) -> Model:
        """A frozen copy; the trained biases are the plain model's own."""
        return self._untuned_copy(model)
