"""AdaptFormer (Chen et al., 2022): a bottleneck parallel to the MLP of every block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_difftune.errors import ConfigError, check_counts
from lightning_difftune.tuners.base import ParameterEfficientTuner, find, find_blocks


class Adapter(nn.Module):
    """Down-projection, ReLU and up-projection; its output is zero before the first step."""

    def __init__(self, width: int, bottleneck: int, scale: float, like: Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(bottleneck, width, device=like.device, dtype=like.dtype)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, H) => (B, N, H)."""
        return self.scale * self.up(torch.relu(self.down(x)))


def add_adapter(mlp: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Forward hook of an MLP: add its adapter's output, given the same input."""
    return output + mlp.get_submodule("adapter")(*inputs)


class AdaptFormer(ParameterEfficientTuner):
    """Train one adapter per block, with its biases, and the label table.

    The adapter gets the MLP's input, the modulated norm, and its output passes through the MLP's gate. 4,280,320
    parameters of DiT-XL/2 with 101 classes at bottleneck 64 (Table 1).

    Args:
        bottleneck: Width of the adapter's hidden layer.
        scale: Factor of the adapter's output. The value behind Table 1 is not public; 0.1 is AdaptFormer's own.

    Raises:
        ConfigError: If one of them is not positive.
    """

    not_merged = (
        "its adapter has a ReLU of its own, which no layer of the plain model can take up. Keep the run's checkpoint "
        "and the pre-trained model"
    )

    def __init__(self, bottleneck: int = 64, scale: float = 0.1) -> None:
        check_counts("AdaptFormer", bottleneck=bottleneck)
        if not scale > 0:
            raise ConfigError(f"scale of AdaptFormer must be above 0, found {scale}: nothing would be trained.")
        self.bottleneck = bottleneck
        self.scale = scale

    def insert(self, model: nn.Module) -> list[nn.Parameter]:
        """Add an adapter parallel to the MLP of every block."""
        blocks = find_blocks(model, "AdaptFormer")
        mlps = [find(block, "mlp", nn.Module, "AdaptFormer") for block in blocks]
        inputs = [find(mlp, "fc1", nn.Linear, "AdaptFormer") for mlp in mlps]
        width = min(layer.in_features for layer in inputs)
        if not 0 < self.bottleneck <= width:
            raise ConfigError(
                f"AdaptFormer's bottleneck must be in [1, {width}], the tokens' width, got {self.bottleneck}."
            )
        trained: list[nn.Parameter] = []
        for mlp, layer in zip(mlps, inputs, strict=True):
            adapter = Adapter(layer.in_features, self.bottleneck, self.scale, layer.weight)
            mlp.add_module("adapter", adapter)
            mlp.register_forward_hook(add_adapter)
            trained.extend(adapter.parameters())
        return trained
