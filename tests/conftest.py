"""Small models in the layout of published ones, saved once for all tests, and the order of the files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pipelines
import pytest

LONGEST = ("test_pages.py", "test_notebooks.py", "test_studies.py", "test_compare.py", "test_plan.py", "test_ddp.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that two processes, each doing whole files, end at the same time."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of :func:`pipelines.stable_diffusion`."""
    return str(pipelines.stable_diffusion(tmp_path_factory.mktemp("models") / "pipeline"))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a family's tiny pipeline, saved once."""
    made: dict[Any, str] = {}

    def folder(family: str, **settings: Any) -> str:
        key = family, *sorted(settings.items())
        if key not in made:
            made[key] = str(getattr(pipelines, family)(tmp_path_factory.mktemp(family) / "pipeline", **settings))
        return made[key]

    return folder
