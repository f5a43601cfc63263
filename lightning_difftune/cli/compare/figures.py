"""The figures of a study, after the paper's Figs. 5 and 6."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_difftune import plots
from lightning_difftune.cli.compare.study import Study
from lightning_difftune.cli.compare.table import EWC, Line, relative

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_GROUPS = 3  # side by side in one category
EWC_LABELS = {"ewc/total": "squared L2 distance, sum", "ewc/mean": "squared L2 distance per parameter"}


def draw_figures(study: Study, lines: Sequence[Line], folder: Path) -> None:
    """Draw the figures that there are results for, as PNG and SVG.

    ``curves`` is the main metric over the steps (Fig. 6a), ``final`` the metrics at the end, ``ewc`` the distance from
    the pre-trained weights (Fig. 5), ``sweep`` the metrics over each quantity in the runs' ``at``, such as tau (Figs.
    6c and 6d), and ``gains`` the change of the main metric over the study's ``gain_over``. Bars of a single run and
    sweeps of a single value are not drawn; those of earlier results are deleted.
    """
    main = next(iter(study.metrics))
    figures: dict[str, Figure] = {}
    if all(main in line.history for line in lines):
        figures["curves"] = curves_figure(study, lines, main)
    if len(lines) > 1:
        finals = {name: f"{name} ({better} is better)" for name, better in study.metrics.items()}
        figures["final"] = bars_figure(study, lines, finals)
        if any(name in line.values for name in EWC for line in lines):
            figures["ewc"] = bars_figure(study, lines, EWC_LABELS)
    values: dict[str, set[float]] = defaultdict(set)
    for line in lines:
        for quantity, value in line.run.at.items():
            values[quantity].add(value)
    if quantities := [quantity for quantity, found in values.items() if len(found) > 1]:
        figures["sweep"] = sweep_figure(study, lines, quantities)
    if study.gain_over and any(line.change is not None for line in lines):
        figures["gains"] = gains_figure(study, lines, main)
    for name in ("curves", "final", "ewc", "sweep", "gains"):
        if name in figures:
            plots.save(figures[name], folder / name)
        else:  # of other results
            for suffix in (".png", ".svg"):
                (folder / name).with_suffix(suffix).unlink(missing_ok=True)


def curves_figure(study: Study, lines: Sequence[Line], metric: str) -> Figure:
    """One panel per comparison, or per quantity and method if runs have an ``at``."""
    panels: dict[str, dict[str, Any]] = defaultdict(dict)
    swept = {line.run.method for line in lines if line.run.at}
    for line in lines:
        for quantity, x in line.run.at.items():
            title = quantity if len(swept) == 1 else f"{line.run.method}: {quantity}"
            add(panels[title], f"{x:g}{line.run.group and ', '}{line.run.group}", line, metric)
    for name, compared in comparisons([line for line in lines if not line.run.at]):
        first, one_method = compared[0].run, len({line.run.method for line in compared}) == 1
        one_group = len({line.run.group for line in compared}) == 1
        title = first.method if one_method else first.group if one_group else ""
        title = title if title and title not in panels else name
        for line in compared:
            add(panels[title], (line.run.group if one_method else line.run.method) or line.run.name, line, metric)
    figure, axes = grid(study, -(-len(panels) // 3), min(3, len(panels)), sharey=True)
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        plots.curves(axis, series, title, metric)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def comparisons(lines: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    """Each run that others are compared with, by name, and those others; the remaining runs, by method."""
    references = {line.run.name for line in lines} & {line.run.against for line in lines}
    found: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        compared = [("run", name) for name in (line.run.name, line.run.against) if name in references]
        for key in dict.fromkeys(compared or [("method", line.run.method)]):
            found[key].append(line)
    return [(name, members) for (_, name), members in found.items()]


def add(series: dict[str, Any], label: str, line: Line, metric: str) -> None:
    """Add the curve of a run under ``label``, or under its own name where another run has that label."""
    series[line.run.name if label in series else label] = by_step(line.history[metric])


def by_step(histories: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[float, list[float]]]:
    """The values of all seeds at the steps that all have: where some runs end, a mean of the others misleads."""
    begun = [history for history in histories if history]
    values: dict[int, list[float]] = defaultdict(list)
    for history in begun:
        for step, value in history:
            values[step].append(value)
    return [(float(step), found) for step, found in sorted(values.items()) if len(found) == len(begun)]


def bars_figure(study: Study, lines: Sequence[Line], labels: Mapping[str, str]) -> Figure:
    """One panel per metric: methods with their groups side by side, or one bar per run that has the metric."""
    lines = [line for line in lines if any(line.values.get(metric) for metric in labels)]
    groups = list(dict.fromkeys(line.run.group for line in lines))
    paired = len({(line.run.method, line.run.group) for line in lines}) == len(lines) and len(groups) <= MOST_GROUPS
    figure, axes = grid(study, len(labels), 1)
    for axis, (metric, label) in zip(axes, labels.items(), strict=True):
        if paired:
            methods = list(dict.fromkeys(line.run.method for line in lines))
            cells = {(line.run.method, line.run.group): line.values.get(metric, ()) for line in lines}
            values = {group: [cells.get((method, group), ()) for method in methods] for group in groups}
            plots.bars(axis, methods, values, metric, label)
        else:
            names = [line.run.name for line in lines]
            plots.bars(axis, names, {"": [line.values.get(metric, ()) for line in lines]}, metric, label)
    return figure


def sweep_figure(study: Study, lines: Sequence[Line], quantities: Sequence[str]) -> Figure:
    """The metrics over each quantity, one curve per method and group."""
    figure, axes = grid(study, len(study.metrics), len(quantities))
    panels = [(metric, quantity) for metric in study.metrics for quantity in quantities]
    for axis, (metric, quantity) in zip(axes, panels, strict=True):
        series: dict[str, list[tuple[float, Sequence[float]]]] = defaultdict(list)
        there = sorted((line for line in lines if quantity in line.run.at), key=lambda line: line.run.at[quantity])
        for line in there:
            x, name = line.run.at[quantity], ", ".join(filter(None, (line.run.method, line.run.group)))
            name = line.run.name if any(x == other for other, _ in series[name]) else name  # differs in another
            series[name].append((x, line.values[metric]))
        label = f"{metric} ({study.metrics[metric]} is better)"
        plots.curves(axis, series, "", label, x_label=quantity)
        xs = sorted({line.run.at[quantity] for line in there})
        if xs[0] > 0 and xs[-1] / xs[0] > 8:  # learning rates and sizes
            axis.set_xscale("log")
            axis.minorticks_off()
        axis.set_xticks(xs, labels=[f"{x:g}" for x in xs], fontsize=8)
    return figure


def gains_figure(study: Study, lines: Sequence[Line], main: str) -> Figure:
    """Each run's change of the main metric over metrics of its reference run: small markers per seed, a large mean."""
    figure, axes = grid(study, 1, len(study.gain_over), sharey=True)
    by_name = {line.run.name: line for line in lines}
    for axis, over in zip(axes, study.gain_over, strict=True):
        series: dict[str, list[tuple[str, list[tuple[float, float]]]]] = defaultdict(list)
        for line in lines:
            before = by_name.get(line.run.against or "")
            if before is not None:
                values = zip(before.values[over], before.values[main], strict=True)
                starts = dict(zip(before.seeds, values, strict=True))
                ends = [
                    (starts[seed], end)
                    for seed, end in zip(line.seeds, line.values[main], strict=True)
                    if seed in starts
                ]
                points = [(x, relative(end, start)) for (x, start), end in ends if start]
                series[line.run.method] += [(line.run.group, points)] if points else []
        plots.scatter(axis, series, f"{over}, without", f"change of {main}")
    return figure


def grid(study: Study, rows: int, columns: int, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with panels in rows, and its panels row by row."""
    from matplotlib.figure import Figure

    width = 9.0 if columns == 1 else 4.2 * columns
    figure = Figure(figsize=(width, 3.2 * rows + 0.4), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    figure.suptitle(study.title, fontsize=12)
    return figure, list(axes.flat)


def contact_sheet(grids: Mapping[str, Path]) -> bytes:
    """PNG with the first ten samples of each run in a row, from grids of ten columns."""
    from PIL import Image, ImageDraw

    rows = []
    for path in grids.values():
        with Image.open(path) as picture:
            rows.append(picture.convert("RGB").crop((0, 0, picture.width, (picture.height - 2) // 10 + 2)))
    left, height = 8 + 6 * max(map(len, grids)), max(row.height for row in rows)
    sheet = Image.new("RGB", (left + max(row.width for row in rows), height * len(rows)), "white")
    for number, (name, row) in enumerate(zip(grids, rows, strict=True)):
        ImageDraw.Draw(sheet).text((4, number * height + height // 2 - 6), name, fill="black")
        sheet.paste(row, (left, number * height))
    png = io.BytesIO()
    sheet.save(png, format="PNG", optimize=True)
    return png.getvalue()
