"""Colours of segmentation maps: from classes to the ADE20K palette and back to the nearest class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_difftune.errors import ConfigError

# The 150 colours of the MIT scene parsing benchmark (Zhou et al., 2017), class 1 "wall" first, six digits a class.
_ADE20K = (
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04"
    "ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffff"
    "e0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe000"
    "99ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff00"
    "0052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc2"
    "00ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ff"
    "ff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ff"
    "ff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff"
)
_CHUNK = 65_536  # colours compared with the whole palette at a time


def ade20k_palette() -> Tensor:
    """The colours (150, 3) uint8 of the ADE20K classes, as published ControlNets were trained with.

    Classes 6 and 48 share one colour, (140, 140, 140); decoding gives 6.

    Example:
        >>> ade20k_palette()[[0, 2]].tolist()  # wall, sky
        [[120, 120, 120], [6, 230, 230]]
    """
    return torch.tensor(list(bytes.fromhex(_ADE20K)), dtype=torch.uint8).view(150, 3)


def to_palette(colours: Sequence[Sequence[int]]) -> Tensor:
    """Colours written as lists => (K, 3) uint8.

    Raises:
        ConfigError: Unless these are triples of 0 to 255, at least one.

    Example:
        >>> to_palette([[0, 0, 0], [255, 0]])
        Traceback (most recent call last):
        lightning_difftune.errors.ConfigError: A palette has one colour [r, g, b] of 0 to 255 per class; entry 1 ...
    """
    for index, colour in enumerate(colours):
        if len(colour) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in colour):
            raise ConfigError(
                f"A palette has one colour [r, g, b] of 0 to 255 per class; entry {index} is {list(colour)}."
            )
    if not colours:
        raise ConfigError("A palette needs at least one colour, found none.")
    return torch.tensor([list(colour) for colour in colours], dtype=torch.uint8)


def paint(classes: Tensor, palette: Tensor) -> Tensor:
    """Class indices (B, H, W) int64 => maps (B, 3, H, W) uint8."""
    return palette.to(classes.device)[classes].permute(0, 3, 1, 2).contiguous()


def nearest_classes(maps: Tensor, palette: Tensor) -> Tensor:
    """Maps (B, 3, H, W) uint8 => indices (B, H, W) int64 of the nearest colours; of equally near ones, the first.

    Example:
        >>> palette = torch.tensor([[0, 0, 0], [255, 0, 0]], dtype=torch.uint8)
        >>> maps = torch.tensor([[120, 120, 120], [200, 90, 90]], dtype=torch.uint8).view(2, 3, 1, 1)
        >>> nearest_classes(maps, palette).flatten().tolist()
        [0, 1]
    """
    r, g, b = maps.long().unbind(1)
    # A map has few different colours, so each is looked up once.
    codes, where = torch.unique((r << 16) + (g << 8) + b, return_inverse=True)
    colours = torch.stack([codes >> 16, codes >> 8 & 255, codes & 255], dim=1)
    targets = palette.to(maps.device).long()
    # torch.argmin does not promise which of equal entries it returns; the index itself breaks the tie here.
    tie_break = torch.arange(len(targets), device=maps.device)
    nearest = [
        ((part[:, None] - targets).square().sum(-1) * len(targets) + tie_break).argmin(1)
        for part in colours.split(_CHUNK)
    ]
    return torch.cat(nearest)[where]
