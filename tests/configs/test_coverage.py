"""Every file of the config hub opens with its command, is short of line, and has a family that tests it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from config_files import ALL_FILES, CONFIGS, FAMILIES, arguments, commands, files_of, header, leaves, settings

from lightning_difftune.cli.lightning import ConfigReader


@pytest.fixture(scope="module")
def reader() -> ConfigReader:
    return ConfigReader()


def test_every_file_is_covered_by_exactly_one_family() -> None:
    assert sorted(file for family in FAMILIES for file in files_of(family)) == ALL_FILES
    for family in FAMILIES:
        assert files_of(family), f"nothing is left of the family {family}"
        tests = Path(__file__).with_name(f"test_{family}.py").read_text()
        assert f'files_of("{family}")' in tests, "all of its files are tested, not a list of some"


@pytest.mark.parametrize("file", ALL_FILES)
def test_header_opens_with_a_command_that_names_the_file(file: str) -> None:
    assert file in arguments(file)
    named = [arg for command in commands(file) for arg in command if arg.startswith(("configs/", "pretraining/"))]
    assert all((CONFIGS.parent / name).is_file() for name in named)
    assert header(file)[:1].isupper(), "a sentence that says what the file is for comes first"


@pytest.mark.parametrize("file", ALL_FILES)
def test_lines_are_of_120_characters_at_most(file: str) -> None:
    lines = (CONFIGS.parent / file).read_text().splitlines()
    assert not [line for line in lines if len(line) > 120]


@pytest.mark.parametrize("file", [file for file in ALL_FILES if not file.startswith("configs/studies/")])
def test_the_config_that_a_run_saves_composes_to_the_same(file: str, reader: ConfigReader, tmp_path: Path) -> None:
    _, *args = arguments(file)
    saved = tmp_path / "config.yaml"
    saved.write_text(reader.compose(args))
    assert "Namespace(" not in saved.read_text(), "a Path before a class in a union writes the class as words"
    assert yaml.safe_load(reader.compose(["--config", str(saved)])) == yaml.safe_load(saved.read_text())


@pytest.mark.parametrize("file", ALL_FILES)
def test_a_run_of_more_than_a_thousand_steps_is_saved_on_its_way(file: str) -> None:
    first = next(yaml.safe_load_all((CONFIGS.parent / file).read_text())) or {}
    trainer = first.get("trainer", {})
    for callback in trainer.get("callbacks", []):
        if callback["class_path"].endswith("ModelCheckpoint") and trainer.get("max_steps", 0) > 1000:
            assert callback["init_args"]["every_n_train_steps"] <= trainer["max_steps"] / 4


METHODS = ("ablations", "loggers", "presets", "strategy", "tuners")


@pytest.mark.parametrize(
    "file",
    [
        *(file for family in METHODS for file in ALL_FILES if f"/{family}/" in file),
        "configs/text_to_image/whole_unet.yaml",
    ],
)
def test_an_overlay_of_a_method_sets_no_path(file: str) -> None:
    """Over any base, it would write there what belongs to another, or read it."""
    places = ("dir", "dirpath", "path", "root", "bank", "cache", "folder", "output")
    for key, value in leaves(settings(file)).items():
        name = key.rpartition(".")[2]
        assert value is None or name == "class_path" or not name.endswith(places), f"{key}: {value}"
        assert not str(value).startswith(("runs/", "data/")), f"{key}: {value}"
