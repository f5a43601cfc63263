"""Make ``config_files`` and ``tiny_data`` importable, and a place to run configs in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from config_files import CONFIGS, PRETRAINING


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with the config hub in it."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "configs").symlink_to(CONFIGS)
    (folder / "pretraining").symlink_to(PRETRAINING)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
