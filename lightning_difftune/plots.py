"""Figures: pictures in grids, curves and bars, readable in print and in grey."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning_difftune.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

T = TypeVar("T")
LINES: tuple[dict[str, Any], ...] = (  # colour, dash and marker; all three differ, for prints in grey
    {"color": "#0b5fa5", "linestyle": "-", "marker": "o"},
    {"color": "#c1440e", "linestyle": "--", "marker": "s"},
    {"color": "#2e7d32", "linestyle": "-.", "marker": "^"},
    {"color": "#6a3d9a", "linestyle": ":", "marker": "D"},
    {"color": "#8c6d1f", "linestyle": (0, (6, 2, 1, 2, 1, 2)), "marker": "v"},
    {"color": "#444444", "linestyle": (0, (1, 3)), "marker": "x"},
    {"color": "#b0217e", "linestyle": (0, (8, 3)), "marker": "P"},
    {"color": "#1b8a8f", "linestyle": (0, (4, 2, 1, 2)), "marker": "*"},
    {"color": "#e09b0b", "linestyle": (0, (2, 2, 6, 2)), "marker": "h"},
    {"color": "#7f9db9", "linestyle": (0, (3, 1)), "marker": "<"},
    {"color": "#7d4a3a", "linestyle": (0, (1, 1, 5, 1)), "marker": ">"},
    {"color": "#a3b82c", "linestyle": (0, (10, 2, 2, 2)), "marker": "p"},
)
BARS: tuple[dict[str, Any], ...] = (  # fill and hatch; brightness and pattern both differ
    {"color": "#0b5fa5", "edgecolor": "black"},
    {"color": "#f2c49b", "edgecolor": "black", "hatch": "//"},
    {"color": "#dddddd", "edgecolor": "black", "hatch": ".."},
)


def picture_grid(axes: Axes, images: Tensor, columns: int, title: str, row_labels: Sequence[str] = ()) -> None:
    """Draw pictures (N, 1 or 3, H, W) uint8 in rows of ``columns``, with an optional label before each row."""
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
    series: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    title: str,
    y_label: str,
    x_label: str = "training step",
) -> None:
    """Draw named series of (x, values): a line through the means, and a band from the minimum to the maximum."""
    for style, (name, points) in zip(cycle(LINES), series.items(), strict=False):
        xs, values = zip(*points, strict=True)
        axes.plot(xs, [statistics.fmean(group) for group in values], label=name, markersize=4, **style)
        if any(len(group) > 1 for group in values):
            lows, highs = [min(group) for group in values], [max(group) for group in values]
            axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
    _label(axes, title, y_label)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3)
    if any(series):
        axes.legend(frameon=False, fontsize=8)


def scatter(
    axes: Axes,
    series: Mapping[str, Sequence[tuple[str, Sequence[tuple[float, float]]]]],
    x_label: str,
    y_label: str,
) -> None:
    """Draw named series of (label, (x, y) by seed) on axes of percent: small markers per seed, a large mean.

    The labels are at the top, above the mean x of their points; near ones share a place, from left to right.
    """
    places: dict[str, list[float]] = {}
    for style, (name, groups) in zip(cycle(LINES), series.items(), strict=False):
        look = {"color": style["color"], "marker": style["marker"], "linestyle": "none"}
        for number, (label, points) in enumerate(groups):
            xs, ys = zip(*points, strict=True)
            x, y = statistics.fmean(xs), statistics.fmean(ys)
            axes.plot(xs, ys, markersize=3, alpha=0.5, **look)
            axes.plot(x, y, markersize=7, label=None if number else name, **look)
            places.setdefault(label, []).append(x)
    axes.margins(x=0.1, y=0.1)
    low, high = axes.get_xlim()
    ticks: list[tuple[float, str]] = []
    for x, label in sorted((statistics.fmean(xs), label) for label, xs in places.items()):
        if ticks and x - ticks[-1][0] < 0.2 * (high - low):  # no room for two labels side by side
            before, others = ticks.pop()
            ticks.append(((before + x) / 2, f"{others}\n{label}"))
        else:
            ticks.append((x, label))
    axes.secondary_xaxis("top").set_xticks(*zip(*ticks, strict=True), fontsize=7)
    for line in (axes.axhline, axes.axvline):
        line(0, color="black", linewidth=0.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:+.0%}")
    _label(axes, "", y_label)
    axes.set_xlabel(x_label, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def bars(
    axes: Axes, categories: Sequence[str], groups: Mapping[str, Sequence[Sequence[float]]], title: str, y_label: str
) -> None:
    """Draw a bar per category and group: the mean of its values, with a line from the minimum to the maximum.

    ``groups`` maps a group's name to the values of each category; a category without values has no bar. One or two
    categories are centred in the space of three, so that bars are about as wide in all figures.
    """
    width = 0.8 / len(groups)
    labels: list[Annotation] = []
    for number, (style, (group, values)) in enumerate(zip(cycle(BARS), groups.items(), strict=False)):
        measured = [position for position, found in enumerate(values) if found]
        xs = [position + (number - (len(groups) - 1) / 2) * width for position in measured]
        means = [statistics.fmean(values[position]) for position in measured]
        axes.bar(xs, means, width * 0.92, label=group or None, linewidth=0.6, **style)
        for x, mean, position in zip(xs, means, measured, strict=True):
            low, high = min(values[position]), max(values[position])
            axes.plot([x, x], [low, high], color="black", linewidth=1.2)
            end, offset, va = (low, -1, "top") if mean < 0 else (high, 1, "bottom")  # outside of the bar
            where: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": va}
            labels.append(axes.annotate(rounded(mean, 3), (x, end), (0, offset), fontsize=7, **where))
    rotate = max(map(len, categories)) * len(categories) > 80
    slant: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if rotate else {}
    axes.set_xticks(range(len(categories)), labels=categories, fontsize=8, **slant)
    slots = max(len(categories), 3)
    if slots > len(categories):
        middle = (len(categories) - 1) / 2
        axes.set_xlim(middle - slots / 2, middle + slots / 2)
    _label(axes, title, y_label)
    # About fourteen characters of labels fit in an inch; labels that need more space are rotated.
    longest = max((len(label.get_text()) for label in labels), default=0)
    inches = axes.bbox.width / axes.figure.dpi
    upright = longest * slots * len(groups) > 14 * inches
    for annotation in labels:
        annotation.set_rotation(90 if upright else 0)
    below = any(annotation.get_verticalalignment() == "top" for annotation in labels)
    axes.margins(y=(0.35 if below else 0.2) if upright else 0.1)  # with labels on both sides, the bars are shorter
    if any(groups):
        above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(groups)}
        axes.legend(frameon=False, fontsize=8, **above)


def evenly(values: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of some values, spread evenly from the first to the last.

    Example:
        >>> evenly([0, 10, 20, 30, 40], 3), evenly([0, 10], 3)
        ([0, 20, 40], [0, 10])
    """
    places = {round(k * (len(values) - 1) / max(1, count - 1)) for k in range(count)}
    return [values[place] for place in sorted(places)]


def rounded(value: float, digits: int) -> str:
    """A number with ``digits`` significant digits, including zeros, or with all digits before the point."""
    return f"{value:#,.{digits}g}".rstrip(".") if abs(value) < 10**digits - 0.5 else f"{value:,.0f}"


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and SVG; the same figure gives the same bytes."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "difftune"}):
        with atomic_file(path.with_suffix(".png")) as file:
            figure.savefig(file, format="png", dpi=120)
        with atomic_file(path.with_suffix(".svg")) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})


def _label(axes: Axes, title: str, y_label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel(y_label, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def swap_curves(axes: Axes, series: Mapping[str, Mapping[float, float]], y_label: str, x_label: str) -> None:
    """Draw distances over the percentage of the reverse process that another model does."""
    for style, (name, distances) in zip(cycle(LINES), series.items(), strict=False):
        percents = sorted(distances)
        values = [distances[percent] for percent in percents]
        axes.plot(percents, values, label=name, markersize=4, **style)
        best = min(distances, key=lambda percent: distances[percent])
        axes.plot(best, distances[best], marker="*", markersize=13, color=style["color"], linestyle="none")
    axes.set_ylim(0, 1.08 * max(max(distances.values()) for distances in series.values()))
    _frame(axes, "Least distance marked by a star", x_label, y_label)


def swap_figure(
    series: Mapping[str, Mapping[float, float]],
    strips: Mapping[str, Tensor],
    y_label: str,
    tail: str = "the pre-trained model",
) -> Figure:
    """The chain of forgetting of one or more models: a curve and a strip of pictures for each (paper, Fig. 1).

    Args:
        series: Distance by percent of swapped steps, for each model.
        strips: Pictures (P, n, 1 or 3, H, W) uint8 of each model, P in the order of the sorted percents.
        y_label: Name of the distance.
        tail: Name of the model that does the swapped steps.
    """
    from matplotlib.figure import Figure

    x_label = f"last steps done by {tail} (%)"
    shapes = [(strip.shape[0] * strip.shape[-1], strip.shape[1] * strip.shape[-2]) for strip in strips.values()]
    width = min(max(2.3 * max(across / down for across, down in shapes), 3), 9)  # inches; a strip is about 2.3 high
    size = 5.5 + width, 1.2 + 2.6 * max(len(strips), 1.4)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplot_mosaic([["curve", name] for name in strips], width_ratios=[5, width])
    swap_curves(axes["curve"], series, y_label, x_label)
    for name, pictures in strips.items():
        percents = sorted(series[name])
        picture_grid(axes[name], pictures.transpose(0, 1).flatten(0, 1), len(percents), name)
        width = pictures.shape[-1]
        centres = [(column + 0.5) * width for column in range(len(percents))]
        axes[name].set_xticks(centres, labels=[f"{percent:g}" for percent in percents], fontsize=8)
        axes[name].set_xlabel(x_label, fontsize=9)
    return figure


def heat_map(axes: Axes, values: Tensor, steps: Sequence[int], edges: Sequence[int], title: str, label: str) -> None:
    """Draw values (K bins, N steps) over training steps and timesteps, with a line where they change sign.

    ``edges`` are the K + 1 borders of the bins, data at the bottom; ``label`` explains the colours.
    """
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    borders = [steps[0], *middles, steps[-1]] if middles else [steps[0] - 0.5, steps[0] + 0.5]
    mesh = axes.pcolormesh(borders, edges, values.numpy(), cmap="cividis", rasterized=True)
    if len(steps) > 1 and len(edges) > 2 and bool((values > 0).any()) and bool((values < 0).any()):
        centres = [(a + b) / 2 for a, b in pairwise(edges)]
        axes.contour(steps, centres, values.numpy(), levels=[0], colors="white", linewidths=1.5)
    axes.figure.colorbar(mesh, ax=axes, label=label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("training step")
    axes.set_ylabel("timestep t (0 is data)")


def forgetting_figure(
    history: Sequence[tuple[int, Mapping[str, Sequence[float]]]],
    pretrained: Mapping[str, Sequence[float]],
    edges: Sequence[int],
) -> Figure:
    """Heat maps of log2(loss / the pre-trained model's) over training step and timestep, one per kind of data.

    Args:
        history: (step, losses by bin for each kind) of the measurements.
        pretrained: The pre-trained model's losses by bin, for each kind.
        edges: Borders of the bins.
    """
    from matplotlib.figure import Figure

    names = {"target": "Held-out target data: below 0 is learnt", "bank": "Memory bank: above 0 is forgotten"}
    figure = Figure(figsize=(5.5 * len(pretrained), 3.8), layout="constrained", facecolor="white")
    for axes, (kind, before) in zip(
        figure.subplots(1, len(pretrained), squeeze=False)[0], pretrained.items(), strict=True
    ):
        losses = torch.tensor([by_kind[kind] for _, by_kind in history], dtype=torch.float64).T
        change = (losses / torch.tensor(before, dtype=torch.float64)[:, None]).log2()
        steps = [step for step, _ in history]
        heat_map(axes, change, steps, edges, names.get(kind, kind), "log2 of loss / pre-trained model's loss")
    return figure


def ideal_distances(axes: Axes, series: Mapping[str, Sequence[tuple[int, float]]], title: str) -> None:
    """Draw named distances to ideal denoisers by timestep, each a list of (t, root mean squared difference of x0)."""
    for style, (name, points) in zip(cycle(LINES), series.items(), strict=False):
        timesteps, values = zip(*points, strict=True)
        axes.plot(timesteps, values, label=name, markersize=3, **style)
    axes.set_ylim(bottom=0)
    _frame(axes, title, "timestep t (0 is data)", "RMS distance to the ideal denoiser")


def _frame(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
