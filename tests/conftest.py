"""Small models in the layout of published ones, saved once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pipelines
import pytest


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
