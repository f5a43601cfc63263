"""Hooks of mkdocs: pages that may not be written yet, the table of configs, and the help of the commands."""

from __future__ import annotations

import os
import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
MEASURED = {"study": "Studies", "performance": "Performance", "reliability": "Reliability"}


def on_config(config: Any) -> Any:
    """Give the pages of measurements their place, those of them that exist."""
    pages = [{title: f"{name}.md"} for name, title in MEASURED.items() if Path(config.docs_dir, f"{name}.md").is_file()]
    if pages:
        config.nav.insert(-1, {"What was measured": pages})
    return config


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Put generated text into the pages that ask for it."""
    for asked, made in (("{{ configs }}", configs_table), ("{{ commands }}", commands_help)):
        if asked in markdown:
            markdown = markdown.replace(asked, made())
    return markdown


def configs_table() -> str:
    """A table for each folder, and a row for each config: its file, and the first sentence of its comment."""
    lines: list[str] = []
    for folder in sorted({file.parent for file in (ROOT / "configs").rglob("*.yaml")}):
        lines += [f"## {folder.relative_to(ROOT)}", "", "| config | what it is |", "| --- | --- |"]
        lines += [f"| `{file.name}` | {first_sentence(file)} |" for file in sorted(folder.glob("*.yaml"))] + [""]
    return "\n".join(lines)


def commands_help() -> str:
    """A heading for each command, and what its ``--help`` prints; commands that take a config have the same options."""
    from lightning_difftune.cli import OWN, main

    parts: list[str] = []
    for command in ("fit", *OWN):
        printed = StringIO()
        with mock.patch.dict(os.environ, COLUMNS="100"), redirect_stdout(printed), suppress(SystemExit):
            main([command, "--help"])
        parts += [f"## difftune {command}", "", "```text", printed.getvalue().strip(), "```", ""]
    return "\n".join(parts)


def first_sentence(file: Path) -> str:
    """What a config says about itself first."""
    comment = file.read_text(encoding="utf-8").split("\n#\n")[0]
    words = " ".join(line.lstrip("# ") for line in comment.splitlines() if line.startswith("#"))
    return re.split(r"(?<!Fig)(?<!Seg)(?<!App)(?<!Eq)\.(?: |$)", words)[0].rstrip(":").replace("|", r"\|")
