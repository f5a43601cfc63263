"""The documentation: command lines that exist, code that imports, keys, names and messages that are there."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import lightning as L
import pytest

import lightning_difftune
from lightning_difftune import (
    ControlNetDiffTuningModule,
    DiTDiffTuningModule,
    MemoryBankDataModule,
    TextToImageDiffTuningModule,
    cli,
)
from lightning_difftune.cli.lightning import ConfigReader

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "README.md"])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIGHTNING = ("fit", "validate", "test", "predict")


def blocks(language):
    """The code blocks of all pages: (page, number of the block, its text)."""
    pattern = re.compile(rf"^( *)```{language}\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    for page in PAGES:
        for number, found in enumerate(pattern.finditer(page.read_text(encoding="utf-8")), start=1):
            text = "\n".join(line.removeprefix(found[1]) for line in found[2].splitlines())
            yield pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")


class Parsed(Exception):
    """Raised where a command's own parser has accepted its arguments."""


@pytest.fixture
def anywhere(tmp_path, monkeypatch):
    """A folder in which the paths of the documentation's commands mean the repository's configs, or nothing."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("quickstart/diff-tuning", "photos", "photos-canny", "captioned", "captions", "edges"):
        run = tmp_path / "runs" / name / "lightning_logs" / "version_0"
        run.mkdir(parents=True)
        shutil.copy(ROOT / "configs" / "quickstart.yaml", run / "config.yaml")
    for name in ("my", "captions", "edges", "xl", "sd"):
        shutil.copy(ROOT / "configs" / "quickstart.yaml", tmp_path / f"{name}.yaml")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def hooks():
    """What makes the pages of commands and configs."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "tools" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sentence_about_a_config_is_not_cut_at_an_abbreviation(hooks):
    rows = [line for line in hooks.configs_table().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert not [row for row in rows if row.count("(") != row.count(")")]


def test_every_option_of_a_command_is_explained_on_the_page_of_the_commands(hooks):
    """The page is made from the help; an option without a text there has nothing on its line or the next one."""
    page = hooks.commands_help()
    assert re.findall(r"^## difftune (\w+)$", page, re.MULTILINE) == ["fit", *cli.OWN]
    options = re.findall(r"^  (--\w+)((?: [A-Z]\S*| \[[^\]]*\]| \{[^}]*\}| \.\.\.)*)(.*)\n(.*)$", page, re.MULTILINE)
    assert len(options) > 50
    assert not [name for name, _, text, after in options if not (text.strip() or after.startswith("      "))]
    assert "{{ commands }}" in (ROOT / "docs" / "commands.md").read_text()


def check_difftune(args, monkeypatch):
    """Have a command line parsed by what would run it, and nothing run."""
    if args[0] in LIGHTNING:
        compose(args[1:])
        return
    rest = []
    known = argparse.ArgumentParser.parse_known_args

    def parse_known(parser, argv=None, namespace=None):
        rest.extend(known(parser, argv, namespace)[1])
        raise Parsed

    def parse(parser, argv=None, namespace=None):
        assert not known(parser, argv, namespace)[1]
        raise Parsed

    def refuse(parser, message):
        pytest.fail(message)

    assert args[0] in cli.COMMANDS
    for name, method in (("parse_args", parse), ("parse_known_args", parse_known), ("error", refuse)):
        monkeypatch.setattr(argparse.ArgumentParser, name, method)
    with pytest.raises(Parsed):
        cli.start(args)
    monkeypatch.undo()
    if rest:
        compose(rest)
    for name in args[1:]:
        assert not name.startswith("configs/") or Path(name).is_file()


def compose(args):
    """Compose configs and overrides; of a checkpoint, only its path is left out."""
    args = [arg for arg in args if arg != "--print_config"]
    if not args[0].startswith("--"):  # a run, which has its settings
        args = ["--config", "configs/quickstart.yaml", *args[1:]]
    if "--ckpt_path" in args and "--config" not in args:  # a checkpoint has its run's settings
        args = ["--config", "configs/quickstart.yaml", *args]
    while "--ckpt_path" in args:
        place = args.index("--ckpt_path")
        del args[place : place + 2]
    if args:  # else they are those of the checkpoint
        ConfigReader().compose(args)


@pytest.mark.parametrize("block", list(blocks("bash")))
def test_commands_exist(block, anywhere):
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    assert lines
    targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "difftune":
            with pytest.MonkeyPatch.context() as monkeypatch:
                check_difftune(words[1:], monkeypatch)
        elif words[0] == "cp":
            shutil.copy(words[1], words[2])
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets)
        elif words[:2] == ["python", "-c"]:
            compile(words[2], line, "exec")
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        elif words[:2] == ["pip", "install"]:
            extras = re.findall(r"\[(.*)\]", words[-1])
            assert set(",".join(extras).split(",")) <= {"", *PROJECT["optional-dependencies"]}
        else:
            assert words[0] in {"git", "pre-commit"}, f"no test knows how to check {line!r}"


@pytest.mark.parametrize("block", list(blocks("python")))
def test_code_imports_what_there_is(block):
    for file, section in re.findall(r'^--8<-- "(.*):(.*)"$', block, re.MULTILINE):  # a part of a file of the tests
        assert f"# --8<-- [start:{section}]" in (ROOT / file).read_text()
    block = re.sub(r"^--8<--.*$", "", block, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "lightning_difftune":
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_every_public_package_has_its_page():
    """What is in a package's ``__all__`` is on the page that renders the package."""
    rendered = set(re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE))
    for file in (ROOT / "lightning_difftune").glob("*/__init__.py"):
        if "__all__" in file.read_text():
            assert f"lightning_difftune.{file.parent.name}" in rendered
    assert {f"lightning_difftune.{home}" for home in lightning_difftune._HOMES.values()} <= rendered


def test_keys_exist():
    """Every key that starts at the model, the data or the trainer is an argument there, and is written short."""
    models = set[str]()
    for module in (DiTDiffTuningModule, ControlNetDiffTuningModule, TextToImageDiffTuningModule):
        models |= set(inspect.signature(module).parameters)
    known = {
        "model": models,
        "data": set(inspect.signature(MemoryBankDataModule).parameters),
        "trainer": set(inspect.signature(L.Trainer).parameters),
    }
    found = []
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"(model|data)\.init_args\.", text), f"{page.name}: the short key is the one to show"
        for scope, key in re.findall(r"`(?:--)?(model|data|trainer)\.(\w+)", text):
            found.append(key)
            assert key in known[scope], f"{page.name}: {scope}.{key}"
    assert len(found) > 50


def test_classes_exist():
    """Objects that are named with their module exist."""
    for page in PAGES:
        for name in re.findall(r"`(lightning_difftune(?:\.\w+)*\.[A-Za-z]\w*)`", page.read_text()):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), f"{page.name}: {name}"


def test_configs_exist():
    for page in PAGES:
        for name in re.findall(r"`(configs/[\w/]+(?:\.yaml)?)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_quoted_messages_are_ours():
    """Errors quoted in the headings of the troubleshooting page exist in the code."""
    sources = [file.read_text() for file in (ROOT / "lightning_difftune").rglob("*.py")]
    code = re.sub(r'"\n\s*f?"', "", "\n".join(sources))
    headings = re.findall(r"^### (\".*)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert headings
    for quoted in re.findall(r'"([^"]*)"', "\n".join(headings)):
        for part in quoted.split("..."):
            assert part.strip() in code, quoted


def test_every_dependency_is_explained():
    """Each package has a row in one of the first two tables, and there are no others."""
    tables = (ROOT / "docs" / "dependencies.md").read_text().split("## What we write by hand")[0]
    listed = set()
    for row in re.findall(r"^\| .* \|$", tables, re.MULTILINE):
        listed.update(re.findall(r"`([\w-]+)`", row.rsplit(" | ", 1)[0]))
    wanted = [*PROJECT["dependencies"]]
    for extra in PROJECT["optional-dependencies"].values():
        wanted += extra
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}
    assert names - {"lightning_difftune"} == listed
