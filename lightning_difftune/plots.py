"""Figures: pictures in grids and curves over training, readable in print and in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = (  # colour, dash and marker; all three differ, so that a grey print can be read
    {"color": "#0b5fa5", "linestyle": "-", "marker": "o"},
    {"color": "#c1440e", "linestyle": "--", "marker": "s"},
    {"color": "#2e7d32", "linestyle": "-.", "marker": "^"},
    {"color": "#6a3d9a", "linestyle": ":", "marker": "D"},
)


def picture_grid(axes: Axes, images: Tensor, columns: int, title: str, row_labels: Sequence[str] = ()) -> None:
    """Draw pictures (N, 1 or 3, H, W) uint8 in rows of ``columns``, with an optional label in front of each row."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    padding = torch.zeros(rows * columns - count, channels, height, width, dtype=images.dtype)
    cells = torch.cat([images.cpu(), padding]).view(rows, columns, channels, height, width)
    canvas = cells.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    axes.imshow(canvas.expand(-1, -1, 3).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks([])
    axes.set_yticks([(row + 0.5) * height for row in range(len(row_labels))], labels=row_labels)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def curves(
    axes: Axes,
    series: Mapping[str, Sequence[tuple[int, float]]],
    title: str,
    y_label: str,
    x_label: str = "training step",
    log: bool = False,
) -> None:
    """Draw named series of (step, value), each with its last value written beside it."""
    for style, (name, points) in zip(LINES, series.items(), strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=f"{name}: {values[-1]:.3g} at the end", markersize=4, **style)  # type: ignore[arg-type]
    if log:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
