"""Diffusion Transformer (Peebles & Xie, 2023) on timm's layers, under the official key names."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from lightning_difftune.errors import ConfigError

SIZES = {  # name: (hidden_size, depth, num_heads); Peebles & Xie, Table 1
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


class TimestepEmbedder(nn.Module):
    """Sinusoid of the timestep, then a two-layer perceptron."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def sinusoid(self, t: Tensor) -> Tensor:
        """Timesteps t (B,) => [cos, sin] features (B, frequency_embedding_size), float32.

        The frequencies are 10000^(-i/half) for i in 0..half-1, without diffusers' ``downscale_freq_shift`` of 1.
        Kept in float32 under any autocast: bfloat16 would merge half of the 1000 timesteps.
        """
        half = self.frequency_embedding_size // 2
        exponent = torch.arange(half, device=t.device, dtype=torch.float32) / half
        angle = t[:, None].float() * torch.exp(-math.log(10_000) * exponent)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        """Timesteps t (B,), fractions included => (B, hidden_size)."""
        return self.mlp(self.sinusoid(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Table of class embeddings; its last row is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Class ids y (B,) int64 => (B, hidden_size)."""
        return self.embedding_table(y)


class TanhGELU(nn.GELU):
    """GELU in its tanh approximation, as in DiT."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens x (B, N, H) scaled by 1 + scale and shifted, both (B, 1, H)."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Transformer block whose norms are modulated and whose branches are gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=TanhGELU)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, H) under the condition c (B, H) => tokens (B, N, H)."""
        modulation = self.adaLN_modulation(c).unsqueeze(1)  # once, not once per part
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=2)
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm and the projection of every token to its patch."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens x (B, N, H) under c (B, H) => flat patches (B, N, patch_size^2 * out_channels)."""
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=2)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Class-conditional diffusion transformer in latent or pixel space.

    The state dict has the official names (``x_embedder.proj``, ``blocks.i.attn.qkv``, ...), so the authors' checkpoints
    load unchanged. Timestep and label embedders are shared by all blocks. Labels are dropped outside the network, by
    the module that trains it.

    Args:
        input_size: Side of the square input, in latent or raw pixels.
        patch_size: Side of one patch; must divide ``input_size``.
        in_channels: Channels of the input.
        hidden_size: Width H of a token.
        depth: Number of blocks.
        num_heads: Attention heads; must divide ``hidden_size``.
        mlp_ratio: Width of the MLP's hidden layer, divided by H.
        num_classes: Classes K; the label table has K + 1 rows, the last one for the null class.
        learn_sigma: Whether the output has a second set of channels for the variance (LEARNED_RANGE).
        class_names: Names of the K classes, or of the first ones; saved in exports.

    Raises:
        ConfigError: If a size does not divide another, or there are too many names.

    Example:
        >>> model = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=4)
        >>> x, t, y = torch.zeros(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 999, model.null_class])
        >>> model(x, t, y).shape
        torch.Size([3, 8, 8, 8])
    """

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ConfigError(f"patch_size {patch_size} does not divide input_size {input_size}.")
        if hidden_size % num_heads or hidden_size % 4:
            raise ConfigError(f"hidden_size {hidden_size} must be a multiple of num_heads ({num_heads}) and of 4.")
        if class_names is not None and len(class_names) > num_classes:
            raise ConfigError(f"{len(class_names)} class_names were given for num_classes {num_classes}.")
        self.architecture: dict[str, Any] = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
        }
        self.class_names = class_names
        self.sampling: dict[str, Any] | None = None  # its sampling settings, if known; saved in exports
        self.out_channels = 2 * in_channels if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        positions = sincos_2d(input_size // patch_size, hidden_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, N, H)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.reset_parameters()

    @classmethod
    def from_size(cls, name: str, input_size: int = 32, in_channels: int = 4, num_classes: int = 1000) -> DiT:
        """Build a published size with fresh weights.

        Args:
            name: ``"DiT-{S,B,L,XL}/{2,4,8}"``, e.g. ``"DiT-XL/2"``.
            input_size: Side of the input; 32 is the latent of a 256-pixel picture.
            in_channels: Channels of the input.
            num_classes: Classes without the null class.

        Raises:
            ConfigError: If the name is not one of the published ones.
        """
        size, _, patch = name.removeprefix("DiT-").partition("/")
        if size not in SIZES or patch not in {"2", "4", "8"}:
            raise ConfigError(
                f"{name!r} is not a DiT size. Sizes are DiT-S, B, L, XL with patch /2, /4, /8: 'DiT-XL/2'."
            )
        return cls(input_size, int(patch), in_channels, *SIZES[size], num_classes=num_classes)

    @property
    def num_classes(self) -> int:
        """Classes in the label table, without the null class."""
        return self.y_embedder.embedding_table.num_embeddings - 1

    @property
    def null_class(self) -> int:
        """Row of the label table that stands for "no class": the last one."""
        return self.num_classes

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one input."""
        side = self.architecture["input_size"]
        return self.architecture["in_channels"], side, side

    def reset_parameters(self) -> None:
        """Initialise as published: Xavier linears, N(0, 0.02) embedders, zero modulations and output."""
        for name, layer in self.named_modules():
            if not isinstance(layer, nn.Linear):
                continue
            if "adaLN_modulation" in name or name == "final_layer.linear":
                nn.init.zeros_(layer.weight)
            elif name.startswith("t_embedder"):
                nn.init.normal_(layer.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as one linear layer over flat patches
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def resize_label_table(self, num_classes: int, class_names: list[str] | None = None) -> None:
        """Replace the label table by one of ``num_classes + 1`` fresh rows; only the null row keeps its values."""
        if class_names is not None and len(class_names) != num_classes:
            raise ConfigError(f"{len(class_names)} class_names were given for num_classes {num_classes}.")
        old = self.y_embedder.embedding_table.weight
        table = nn.Embedding(num_classes + 1, old.shape[1], device=old.device, dtype=old.dtype)
        with torch.no_grad():
            nn.init.normal_(table.weight, std=0.02)
            table.weight[-1] = old[-1]
        self.y_embedder.embedding_table = table
        self.architecture["num_classes"] = num_classes
        self.class_names = class_names

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Flat patches (B, N, p*p*C) => picture (B, C, H, W)."""
        side, p = self.x_embedder.grid_size[0], self.architecture["patch_size"]
        patches = patches.reshape(len(patches), side, side, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), self.out_channels, side * p, side * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise and, with ``learn_sigma``, the variance's interpolation.

        Args:
            x: Noisy input (B, C, H, W).
            t: Timesteps (B,) in [0, T), fractions included.
            y: Class ids (B,) int64 in [0, num_classes]; ``null_class`` for no class.

        Returns:
            (B, C or 2C, H, W).
        """
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))


def sincos_2d(side: int, hidden_size: int) -> Tensor:
    """Fixed positions (1, side*side, hidden_size): sine and cosine of the column, then of the row."""
    omega = 10_000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, H/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, H/2)
    columns = axis[None].expand(side, -1, -1)
    rows = axis[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, hidden_size).float()
