"""The page: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path

from PIL import Image

from lightning_difftune import __version__
from lightning_difftune.cli.report.advice import RULES, advise
from lightning_difftune.cli.report.facts import environment_rows, summary, title
from lightning_difftune.cli.report.figures import panels, svg
from lightning_difftune.cli.run import Run

MOST_GRIDS = 6  # of a folder: the first, the last, and some between them
WIDEST = 1000  # pixels of an embedded picture


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
    steps = sorted(grids)
    count = min(MOST_GRIDS, len(steps))
    chosen = sorted({steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)})
    note = "" if len(chosen) == len(steps) else f'\n<p class="soft">{len(chosen)} of {len(steps)} are shown.</p>'
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
    """A picture in the page, or a line about it where a killed run left half of a file."""
    try:
        with Image.open(file) as image:
            shown = image.convert("RGB")
        shown.thumbnail((WIDEST, WIDEST))
    except OSError as error:
        return f"<figure><figcaption>{escape(caption)}: cannot be read ({escape(str(error))})</figcaption></figure>"
    content = min((_encoded(shown, kind) for kind in ("PNG", "JPEG")), key=lambda kind_bytes: len(kind_bytes[1]))
    data = base64.b64encode(content[1]).decode()
    width, height = shown.size
    return (
        f'<figure><img src="data:image/{content[0].lower()};base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _encoded(image: Image.Image, kind: str) -> tuple[str, bytes]:
    buffer = BytesIO()
    image.save(buffer, format=kind, quality=90, optimize=True)
    return kind, buffer.getvalue()


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>\n{cells}\n</table>"


def _config(run: Run) -> str:
    if not run.config_text:
        return "<p>The folder has no config.yaml.</p>"
    lines = run.config_text.count("\n")
    return f"<details>\n<summary>config.yaml, {lines} lines</summary>\n<pre>{escape(run.config_text)}</pre>\n</details>"
