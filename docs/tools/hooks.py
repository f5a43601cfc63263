"""Hooks of mkdocs: pages that may not be written yet, and the table of configs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MEASURED = {"study": "Studies", "performance": "Performance", "reliability": "Reliability"}


def on_config(config: Any) -> Any:
    """Give the pages of measurements their place, those of them that exist."""
    pages = [{title: f"{name}.md"} for name, title in MEASURED.items() if Path(config.docs_dir, f"{name}.md").is_file()]
    if pages:
        config.nav.insert(-1, {"What was measured": pages})
    return config


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Put the table of configs into the page that asks for it."""
    return markdown.replace("{{ configs }}", configs_table()) if page.file.src_uri == "configs.md" else markdown


def configs_table() -> str:
    """A table a folder and a row a config: its file, and the first sentence of the comment that it opens with."""
    lines: list[str] = []
    for folder in sorted({file.parent for file in (ROOT / "configs").rglob("*.yaml")}):
        lines += [f"## {folder.relative_to(ROOT)}", "", "| config | what it is |", "| --- | --- |"]
        lines += [f"| `{file.name}` | {first_sentence(file)} |" for file in sorted(folder.glob("*.yaml"))] + [""]
    return "\n".join(lines)


def first_sentence(file: Path) -> str:
    """What a config says about itself first."""
    comment = file.read_text(encoding="utf-8").split("\n#\n")[0]
    words = " ".join(line.lstrip("# ") for line in comment.splitlines() if line.startswith("#"))
    return re.split(r"(?<!Fig)(?<!Seg)(?<!App)\.(?: |$)", words)[0].rstrip(":").replace("|", r"\|")
