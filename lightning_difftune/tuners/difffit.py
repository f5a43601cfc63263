"""BitFit (Ben Zaken et al., 2022) trains the biases; DiffFit (Xie et al., 2023) also factors in the blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_difftune.errors import ConfigError
from lightning_difftune.tuners.base import Model, ParameterEfficientTuner, biases, find, find_blocks


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
        """A frozen copy; the trained biases belong to the plain model."""
        return self._untuned_copy(model)


class Gamma(nn.Module):
    """A factor per channel, starting at 1, on the output of the layer that it is attached to.

    It is a forward hook, so that the layer's own parameters keep their names.
    """

    def __init__(self, site: nn.Module, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.new_ones(linear.out_features))
        self.handle = site.register_forward_hook(self.scale)

    def scale(self, site: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Output (..., width) of the layer => scaled, in the same precision."""
        return output * self.weight.to(output.dtype)

    def fold_into(self, linear: nn.Linear) -> None:
        """Scale the rows of the linear layer that produces the output, and remove the hook."""
        with torch.no_grad():
            linear.weight.mul_(self.weight[:, None])
            if linear.bias is not None:
                linear.bias.mul_(self.weight)
        self.handle.remove()


class DiffFit(ParameterEfficientTuner):
    """Train all biases, the label table, and factors ("gammas") on the outputs of layers in the blocks.

    Table 1's 832,928 parameters of DiT-XL/2 with 101 classes imply 7H factors in each of the 28 blocks, or 14H in the
    first 14; their places are not public. The default is the authors' four places and the MLP's second layer, 7H in
    total, in every block. The DiffFit authors' code has 6H in half of the blocks (1,739,552 parameters
    with the 1001 rows of ImageNet's label table)::

        DiffFit(sites=("attn.qkv", "attn.proj", "attn", "mlp"), num_blocks=14)

    The paper trains it with batch size 64 and ten times the learning rate of full fine-tuning.

    Args:
        sites: Layers of a block whose output is scaled: linear layers, or branches that end in one. ``attn`` and
            ``attn.proj`` have one output, but two factors on it learn faster than one.
        num_blocks: Number of blocks, counted from the first; all by default.

    Raises:
        ConfigError: If a site is named twice.
    """

    def __init__(
        self,
        sites: tuple[str, ...] = ("attn.qkv", "attn.proj", "attn", "mlp.fc2", "mlp"),
        num_blocks: int | None = None,
    ) -> None:
        if not sites or len(set(sites)) < len(sites):
            raise ConfigError(f"DiffFit needs distinct sites, got {list(sites)}.")
        self.sites = tuple(sites)
        self.num_blocks = num_blocks

    def insert(self, model: nn.Module) -> list[nn.Parameter]:
        """Attach the factors to the sites."""
        blocks = find_blocks(model, "DiffFit")
        count = len(blocks) if self.num_blocks is None else self.num_blocks
        if not 0 < count <= len(blocks):
            raise ConfigError(f"DiffFit cannot scale {count} blocks; {type(model).__name__} has {len(blocks)}.")
        sites = [find(block, name, nn.Module, "DiffFit") for block in blocks[:count] for name in self.sites]
        linears = [last_linear(site) for site in sites]
        trained = list(biases(model))
        for site, linear in zip(sites, linears, strict=True):
            gamma = Gamma(site, linear)
            site.add_module("gamma", gamma)
            trained.append(gamma.weight)
        return trained

    def merge(self, model: Model) -> Model:
        """A frozen copy with the factors merged into its linear layers."""
        merged = self._untuned_copy(model)
        for site in list(merged.modules()):
            gamma = getattr(site, "gamma", None)
            if isinstance(gamma, Gamma):
                gamma.fold_into(last_linear(site))
                del site.gamma
        return merged


def last_linear(site: nn.Module) -> nn.Linear:
    """The linear layer that produces a site's output: the site itself, or the last one that it registers."""
    linears = [layer for layer in site.modules() if isinstance(layer, nn.Linear)]
    if not linears:
        raise ConfigError(
            f"DiffFit scales linear layers and branches that end in one; a {type(site).__name__} has none."
        )
    return linears[-1]
