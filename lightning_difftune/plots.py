"""Figures: pictures in grids and curves over training, readable in print and in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def swap_curves(axes: Axes, series: Mapping[str, Mapping[float, float]], y_label: str) -> None:
    """Draw distances against the part of the reverse process that is left to the pre-trained model, in percent."""
    for style, (name, distances) in zip(LINES, series.items(), strict=False):
        percents = sorted(distances)
        values = [distances[percent] for percent in percents]
        axes.plot(percents, values, label=name, markersize=4, **style)  # type: ignore[arg-type]
        best = min(distances, key=lambda percent: distances[percent])
        axes.plot(best, distances[best], marker="*", markersize=13, color=style["color"], linestyle="none")
    axes.set_title("Least distance marked by a star", fontsize=10, loc="left")
    axes.set_xlabel("last steps done by the pre-trained model (%)")
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def swap_figure(series: Mapping[str, Mapping[float, float]], strips: Mapping[str, Tensor], y_label: str) -> Figure:
    """The chain of forgetting of one model or several: a curve each, and a strip of pictures each (paper, Fig. 1).

    Args:
        series: Distance by percent of swapped steps, for each model.
        strips: Pictures (P, n, 1 or 3, H, W) uint8 of each model, P in the order of the sorted percents.
        y_label: What the distance is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.2 + 2.6 * max(len(strips), 1.4)), layout="constrained", facecolor="white")
    axes = figure.subplot_mosaic([["curve", name] for name in strips], width_ratios=[1, 1.6])
    swap_curves(axes["curve"], series, y_label)
    for name, pictures in strips.items():
        percents = sorted(series[name])
        picture_grid(axes[name], pictures.transpose(0, 1).flatten(0, 1), len(percents), name)
        width = pictures.shape[-1]
        centres = [(column + 0.5) * width for column in range(len(percents))]
        axes[name].set_xticks(centres, labels=[f"{percent:g}" for percent in percents], fontsize=8)
        axes[name].set_xlabel("last steps done by the pre-trained model (%)", fontsize=9)
    return figure
