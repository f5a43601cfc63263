"""``difftune report``: a run as one self-contained HTML page, with curves as SVG in the page's colours."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_difftune import __version__, plots
from lightning_difftune.cli.arguments import CommandParser
from lightning_difftune.cli.facts import environment_rows, sample_command, summary, title
from lightning_difftune.cli.report.advice import RULES, advise
from lightning_difftune.cli.run import Run
from lightning_difftune.cli.run_files import Series
from lightning_difftune.errors import DataError
from lightning_difftune.files import atomic_write

DESCRIPTION = """Write a run's curves, pictures, config, environment and what to try next as one HTML page.

The page needs no network and no other file, so it can be sent to someone. Of a run that is still
training, or was killed, it shows what there is so far.

  difftune report runs/quickstart/diff-tuning
  difftune report runs/flowers/lightning_logs/version_0 --output flowers.html

RUN is the run's default_root_dir (its newest launch that trained), the folder of a launch, or a checkpoint."""

MOST_GRIDS = 6  # per folder: the first, the last, and some between them
WIDEST = 1000  # pixels of an embedded picture


def report(argv: Sequence[str]) -> None:
    """Write the page and print its path."""
    parser = CommandParser("report", DESCRIPTION)
    parser.add_run()
    parser.add_argument("--output", type=Path, default=None, help="the page (default: report.html in the run's folder)")
    options = parser.parse_args(argv)
    run = Run.find(options.run)
    output = options.output or run.path / "report.html"
    content = page(run).encode()
    try:
        atomic_write(output, content)
    except OSError as error:
        raise DataError(f"The report cannot be written: {error}. Choose another place: --output FILE.html.") from error
    print(f"{output}: {len(content) / 1e6:.1f} MB, of the run in {run.path}; open it in a browser")
    if run.checkpoint is not None:
        print(f"Next: {sample_command(run)}")


def page(run: Run) -> str:
    """The report as HTML."""
    css = (files(__package__) / "page.css").read_text(encoding="utf-8")
    heading = escape(title(run))
    parts = [
        f"<h1>{heading}</h1>\n<p>{escape(summary(run))}</p>",
        _section("What to try next", _advice(run)),
        _section("Curves", _curves(run)),
        *(_section(f"Pictures over time: {escape(name)}", _grids(run, name)) for name in run.grids),
        _section("Figures", figures) if (figures := _figures(run)) else "",
        _section("Environment", _table(environment_rows(run))),
        _section("Config", _config(run)),
        f'<p class="soft">Made by <code>difftune report</code> {__version__} from {escape(str(run.path))}.</p>',
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>"


def _advice(run: Run) -> str:
    items = [
        f'<li>{escape(advice.what)}<br><span class="soft">{escape(advice.evidence)}</span>'
        + (f"<code>{escape(advice.command)}</code>" if advice.command else "")
        + "</li>"
        for advice in advise(run)
    ]
    if items:
        return '<ol class="advice">\n' + "\n".join(items) + "\n</ol>"
    return f"<p>Nothing in the logs asks for a change; {len(RULES)} rules looked at them.</p>"


def _curves(run: Run) -> str:
    if not run.metrics:
        return (
            "<p>There are none: metrics.csv is missing or empty. Lightning's CSVLogger writes it: "
            "<code>--trainer.logger lightning.pytorch.loggers.CSVLogger</code>.</p>"
        )
    drawn = [f"<div>{svg(panel, f'p{number}')}</div>" for number, panel in enumerate(panels(run))]
    note = "A line is the mean of neighbouring values, and the band around it their range. Steps count from 0."
    if not any(name.startswith("lr-") for name in run.metrics):
        note += " The learning rate was not logged; the callback LearningRateMonitor does that."
    return f'<div class="panels">\n{"".join(drawn)}\n</div>\n<p class="soft">{note}</p>'


def _grids(run: Run, name: str) -> str:
    grids = run.grids[name]
    chosen = plots.evenly(sorted(grids), MOST_GRIDS)
    note = "" if len(chosen) == len(grids) else f'\n<p class="soft">{len(chosen)} of {len(grids)} are shown.</p>'
    shown = [(grids[step], f"step {step:,}" if step else "the base model, before the first step") for step in chosen]
    real = run.path / name / "real.png"
    if real.is_file():
        shown.insert(0, (real, "real pictures"))
    pictures = "\n".join(_picture(file, caption) for file, caption in shown)
    return f'<div class="pictures">\n{pictures}\n</div>{note}'


def _figures(run: Run) -> str:
    figures = [file for file in run.figures if file.name != "real.png" or file.parent.name not in run.grids]
    pictures = "\n".join(_picture(file, f"{file.parent.name}/{file.name}") for file in figures)
    return f'<div class="pictures">\n{pictures}\n</div>' if figures else ""


def _picture(file: Path, caption: str) -> str:
    """A picture in the page, or a line about it if a killed run left half a file."""
    try:
        with Image.open(file) as image:
            shown = image.convert("RGB")
        shown.thumbnail((WIDEST, WIDEST))
    except OSError as error:
        return f"<figure><figcaption>{escape(caption)}: cannot be read ({escape(str(error))})</figcaption></figure>"
    encoded: dict[str, bytes] = {}
    for kind in ("png", "jpeg"):
        buffer = BytesIO()
        shown.save(buffer, format=kind, quality=90, optimize=True)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    data = base64.b64encode(encoded[kind]).decode()
    width, height = shown.size
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>\n{cells}\n</table>"


def _config(run: Run) -> str:
    if not run.config_text:
        return "<p>The folder has no config.yaml.</p>"
    lines = run.config_text.count("\n")
    return f"<details>\n<summary>config.yaml, {lines} lines</summary>\n<pre>{escape(run.config_text)}</pre>\n</details>"


POINTS = 40  # of a curve; of more values, each point is the mean of a few and the band their range
INK = "#010203"  # placeholder for the page's text colour
# Shown in separate figures, or not of interest over the steps.
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
    """The curves to draw, most informative first."""
    known = {"val/loss", *run.scores}
    others = [name for name in run.metrics if name not in known and not LEFT_OUT.fullmatch(name)]
    streams = {"target": "train/reconsolidation", "memory bank": "train/retention"}
    drawn: list[tuple[str, str, dict[str, str]]] = [  # title, label of the y-axis, and labels of logged names
        ("Training losses of both streams", "loss", streams),
        *((name, f"{'higher' if high else 'lower'} is better", {name: name}) for name, high in run.scores.items()),
        (f"Loss on {'' if run.validates_all else 'the first '}held-out pictures", "val/loss", {"val/loss": "val/loss"}),
        ("Learning rate", "learning rate", {name: name for name in run.metrics if name.startswith("lr-")}),
        ("Distance from the pre-trained weights", "squared L2", {"total": "ewc/total"}),
        *((name, name, {name: name}) for name in others[:MOST_OTHERS]),
    ]
    found = [
        Panel(title, label, {shown: series for shown, name in names.items() if (series := run.finite(name))})
        for title, label, names in drawn
    ]
    return [panel for panel in found if panel.series]


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
    """Matplotlib's SVG file as an element of a page with several."""
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
