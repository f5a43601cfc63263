"""The published package: one version everywhere, and a wheel that runs the quickstart without the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from setuptools import find_namespace_packages

import lightning_difftune

ROOT = Path(__file__).parents[1]
MOST_MEGABYTES = 50  # of a wheel; the bundled weights are 43 of them


def test_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert lightning_difftune.__version__ == version
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert version in re.findall(r"\d+\.\d+\.\d+", (ROOT / "CHANGELOG.md").read_text().split("## ")[1])


def test_every_folder_of_code_and_of_configs_is_found():
    """A folder that is not found would be missing from the wheel alone."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = set(find_namespace_packages(str(ROOT), **settings))
    code = {file.parent.relative_to(ROOT) for file in (ROOT / "lightning_difftune").rglob("__init__.py")}
    configs = {Path("lightning_difftune", file.parent.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.yaml")}
    assert {".".join(folder.parts) for folder in code | configs} <= found
    assert not [name for name in found if name.split(".")[0] != "lightning_difftune"]


def test_citation_has_what_the_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Zhong", "Guo", "Dong", "Long"]


def test_workflow_runs_make_targets_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    runs = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert runs
    assert all(re.fullmatch(r"make (\S+)( PYTHON=python)?", run)[1] in targets for run in runs)


def test_hooks_are_the_linters_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = (ROOT / "Makefile").read_text()
    for hook in hooks:
        program, *arguments = hook["entry"].removeprefix(".venv/bin/").split()
        assert f"$(BIN)/{' '.join([program, *arguments[:1]]).replace(' --force-exclude', '')}" in recipe


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel, built from a source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "No matching distribution found for setuptools" in done.stdout + done.stderr:
        pytest.skip("`build` could not install setuptools: no package index can be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_distributions_hold_what_they_should(built):
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.stat().st_size < MOST_MEGABYTES * 1e6
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("lightning_difftune", "configs"):
        for file in (ROOT / folder).rglob("*"):
            wanted = file.suffix in {".py", ".yaml", ".css", ".safetensors", ".json", ".typed"}
            if file.is_file() and wanted and "__pycache__" not in file.parts:
                inside = file.relative_to(ROOT).as_posix()
                assert (inside if folder == "lightning_difftune" else f"lightning_difftune/{inside}") in packed
    assert not [name for name in packed if name.startswith(("tests", "docs", "notebooks", "configs", "pretraining"))]
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "Makefile", "tests/conftest.py", "docs/index.md"} <= names


@pytest.mark.slow
def test_quickstart_runs_from_the_wheel(built, tmp_path):
    """In a new environment that has our dependencies but not us, and in an empty folder."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")  # their own .pth files are not followed
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True)

    work = tmp_path / "work"
    work.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command):
        return subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, check=True, timeout=900
        ).stdout

    assert str(site) in run(python, "-c", "import lightning_difftune; print(lightning_difftune.__file__)")
    difftune = python.with_name("difftune")
    assert run(difftune, "--version").strip() == lightning_difftune.__version__
    run(difftune, "quickstart", "--steps", "4", "--output", "out")
    assert (work / "out" / "report.png").stat().st_size > 10_000
    run(difftune, "report", "out/diff-tuning", "--output", "page.html")
    assert "dit-nano-omniglot tuned on HandwrittenDigits" in (work / "page.html").read_text()
