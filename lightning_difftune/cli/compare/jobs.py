"""One run of a study: its composed settings, its files, and its progress."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lightning_difftune import draws
from lightning_difftune.cli.compare.study import Study, StudyRun
from lightning_difftune.cli.lightning import ConfigReader
from lightning_difftune.cli.parser import resolved
from lightning_difftune.cli.run import entries
from lightning_difftune.cli.run_files import checkpoints_below, newest
from lightning_difftune.errors import ConfigError, StoreError
from lightning_difftune.files import discard_temporaries, file_digest, json_digest


@dataclass(frozen=True)
class Job:
    """One run with one seed.

    In settings and evaluators ``{run}``, ``{output}``, ``{results}`` and ``{seed}`` stand for the run's folder, the
    study's folder, the results' folder, and the seed.
    """

    run: StudyRun  # the entry of the study file
    seed: int
    settings: dict[str, Any]  # the composed configs and settings of the study, without defaults of the code
    evaluators: tuple[Mapping[str, Any], ...]  # measurements at the end
    output: Path  # folder of the study's runs
    kept: Path  # folder of its results

    @property
    def name(self) -> str:
        """Such as ``lora-seed0``."""
        return f"{self.run.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Log, checkpoints and config of the run."""
        return self.output / "runs" / self.name

    @property
    def result_path(self) -> Path:
        """The result of the finished run."""
        return self.kept / "results" / f"{self.name}.json"

    @property
    def grid_path(self) -> Path:
        """The sample grid of the finished run."""
        return self.folder / "samples.png"

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the result, as plain JSON values."""
        return {"settings": self.settings, "evaluate": list(self.evaluators)}

    @property
    def files(self) -> dict[str, str]:
        """The files that the settings name, such as weights and arrays, and their SHA-256; not those of other runs."""
        named = (Path(leaf) for leaf in leaves(self.identity).values() if isinstance(leaf, str) and "/" in leaf)
        return {str(path): _content(path, path.stat().st_mtime_ns) for path in named if path.is_file()}

    @property
    def digest(self) -> str:
        """Hash of the identity."""
        return json_digest(self.identity)

    def result(self) -> dict[str, Any] | None:
        """The result, if the run is finished."""
        return _read(self.result_path, "result")

    def order(self) -> dict[str, Any] | None:
        """The job that the run's folder was created for, if the run was started."""
        return _read(self.folder / "job.json", "order")

    def differences(self) -> list[str]:
        """Differences of settings, named files and random streams from those of the result or the unfinished run."""
        made = self.result() or self.order()
        if made is None:
            return []
        streams = {"version of the random streams": made.get("draws", 1)}  # results before version 2 do not have it
        before = leaves(made["identity"]) | streams
        now = leaves(self.identity) | dict.fromkeys(streams, draws.VERSION)
        keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        files, contents = made.get("files", {}), self.files  # older results do not have them
        changed = [file for file, content in contents.items() if files.get(file, content) != content]
        return [
            *(f"{key.removeprefix('settings.')} was {before.get(key)}, is {now.get(key)}" for key in keys),
            *(f"{file} has another content" for file in changed),
        ]

    def checkpoint(self) -> Path | None:
        """The checkpoint to resume an unfinished run from."""
        return newest(checkpoints_below(self.folder))

    def discard_leftovers(self) -> None:
        """Delete half-written files of killed runs."""
        discard_temporaries(self.folder)
        discard_temporaries(self.result_path.parent, self.result_path.name)

    def forget(self) -> None:
        """Delete the result and the run's folder."""
        self.result_path.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def filled(self, tree: Any) -> Any:
        """Settings or evaluators with real folders."""
        folders = {"{run}": str(self.folder), "{output}": str(self.output), "{results}": str(self.kept)}
        return filled(tree, folders | {"{seed}": str(self.seed)})


def read_jobs(study: Study, runs: Iterable[tuple[StudyRun, int]], output: Path, kept: Path) -> Iterator[Job]:
    """The jobs of runs and their seeds, with all configs composed and checked."""
    reader, composed = ConfigReader(), dict[str, dict[str, Any]]()
    for run, seed in runs:
        if run.name not in composed:
            try:
                settings = resolved(yaml.safe_load(reader.compose(study.arguments(run, seed))))
            except ConfigError as error:
                raise ConfigError(f"{study.path}: runs.{run.name} cannot be run. {error}") from error
            composed[run.name] = inside_run_folder(settings)
        settings = composed[run.name] | {"seed_everything": seed}
        yield Job(run, seed, settings, study.evaluators, output, kept)


def finished_runs(study: Study, kept: Path) -> list[tuple[StudyRun, int]]:
    """The runs with a result, and its seed, which may not be one of the study's."""
    found = []
    for run in study.runs.values():
        seeds = [
            path.stem.removeprefix(f"{run.name}-seed") for path in (kept / "results").glob(f"{run.name}-seed*.json")
        ]
        found += [(run, seed) for seed in sorted(int(seed) for seed in seeds if seed.isdecimal())]
    return found


def inside_run_folder(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with trainer and loggers writing to the run's own folder, and without a progress bar."""
    trainer = settings.setdefault("trainer", {})
    trainer |= {"default_root_dir": "{run}", "enable_progress_bar": False}
    for logger in entries(trainer.get("logger")):
        if isinstance(logger, dict) and "save_dir" in logger.get("init_args", {}):
            logger["init_args"]["save_dir"] = "{run}"
    return settings


def filled(tree: Any, values: Mapping[str, str]) -> Any:
    """A copy with the placeholders in its strings replaced."""
    if isinstance(tree, dict):
        return {key: filled(branch, values) for key, branch in tree.items()}
    if isinstance(tree, list):
        return [filled(branch, values) for branch in tree]
    if isinstance(tree, str):
        for placeholder, value in values.items():
            tree = tree.replace(placeholder, value)
    return tree


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Values by dotted path; list items by index."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: leaf for name, branch in items for key, leaf in leaves(branch, f"{path}.{name}".strip(".")).items()}


@cache
def _content(path: Path, modified: int) -> str:
    """The SHA-256 of a file, computed once while its time of modification is the same."""
    return file_digest(path)


def _read(path: Path, what: str) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
        if {"digest", "identity"} <= content.keys():
            return content
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        pass
    raise StoreError(f"{path} is not the {what} of a run of difftune compare. Move it away; the run is then repeated.")
