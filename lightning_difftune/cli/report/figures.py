"""Curves of a run as SVG that stands in a page, in the page's own colours."""

from __future__ import annotations

import re
from dataclasses import dataclass
from io import StringIO
from typing import Any

from lightning_difftune import plots
from lightning_difftune.cli.run import Run, Series

POINTS = 40  # of a curve; where there are more, each stands for a few and the band shows how far these spread
INK = "#010203"  # stands for the page's colour of text
# Seen in figures of their own, or of no interest over the steps.
LEFT_OUT = re.compile(
    r"train/.*|forgetting(_gap)?/.*|.*/swap_.*|control/(seconds|time_share)|sudden_convergence/.*|ewc/.*|lr-.*"
)
MOST_OTHERS = 8


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    y_label: str
    series: dict[str, Series]


def panels(run: Run) -> list[Panel]:
    """What is worth a curve, the most telling first."""
    streams = {"target": "train/reconsolidation", "memory bank": "train/retention"}
    drawn = [Panel("Training losses of both streams", "loss", _named(run, streams))]
    drawn += [
        Panel(name, f"{'higher' if higher else 'lower'} is better", _named(run, {name: name}))
        for name, higher in run.scores.items()
    ]
    drawn.append(Panel("Loss on held-out pictures", "val/loss", _named(run, {"val/loss": "val/loss"})))
    rates = {name: name for name in run.metrics if name.startswith("lr-")}
    drawn.append(Panel("Learning rate", "learning rate", _named(run, rates)))
    drawn.append(Panel("Distance from the pre-trained weights", "squared L2", _named(run, {"total": "ewc/total"})))
    known = {"val/loss", *run.scores}
    others = [name for name in run.metrics if name not in known and not LEFT_OUT.fullmatch(name)]
    drawn += [Panel(name, name, _named(run, {name: name})) for name in others[:MOST_OTHERS]]
    return [panel for panel in drawn if panel.series]


def _named(run: Run, names: dict[str, str]) -> dict[str, Series]:
    return {label: series for label, name in names.items() if (series := run.finite(name))}


def gathered(series: Series) -> list[tuple[float, list[float]]]:
    """At most :data:`POINTS` points: the mean step and all values of a few neighbours each."""
    count = -(-len(series) // POINTS)
    groups = [series[start : start + count] for start in range(0, len(series), count)]
    return [(sum(step for step, _ in group) / len(group), [value for _, value in group]) for group in groups]


def svg(panel: Panel, prefix: str) -> str:
    """The panel as an ``svg`` element whose ids start with ``prefix`` and whose colours are the page's."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    style |= {"svg.fonttype": "none", "svg.hashsalt": "difftune", "font.size": 9}
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.0, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        plots.curves(
            axes, {name: gathered(series) for name, series in panel.series.items()}, panel.title, panel.y_label
        )
        if len(panel.series) == 1 and (legend := axes.get_legend()):
            legend.remove()
        buffer = StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return for_page(buffer.getvalue(), prefix, f"{panel.title}: {', '.join(panel.series)} over training steps")


def for_page(text: str, prefix: str, label: str) -> str:
    """A file of matplotlib's as an element of a page that holds several."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace(INK, "currentColor")
    for number, style in enumerate(plots.LINES):
        text = text.replace(style["color"], f"var(--line-{number})")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()
