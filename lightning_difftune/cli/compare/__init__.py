"""``difftune compare``: runs a list of configs over seeds, and tabulates the results."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lightning_difftune import draws
from lightning_difftune.cli.arguments import CommandParser, check_writable
from lightning_difftune.cli.compare.figures import contact_sheet, draw_figures
from lightning_difftune.cli.compare.jobs import Job, finished_runs, read_jobs
from lightning_difftune.cli.compare.study import Study, StudyRun, check_seeds, read_study
from lightning_difftune.cli.compare.table import comparison, machines, other_pictures, write_tables
from lightning_difftune.cli.run import class_name, entries
from lightning_difftune.errors import ConfigError
from lightning_difftune.files import atomic_write, discard_temporaries
from lightning_difftune.locks import FolderLock

DESCRIPTION = """Compare the configs of a study file over its seeds, in tables and figures of the finished runs.

  difftune compare STUDY.yaml          tables and figures, and what is missing
  difftune compare STUDY.yaml --run    start what is missing, too

A study that was interrupted resumes where it stopped. Several processes of the same command, also on machines that
share a file system, divide the runs among themselves."""


def compare(argv: Sequence[str]) -> None:
    """Write the tables and figures of a study; with ``--run``, do the missing runs first."""
    parser = CommandParser("compare", DESCRIPTION)
    parser.usage = "difftune compare STUDY.yaml [options]"
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="the study file")
    parser.add_argument("--part", metavar="NAME", help="a part of the study file (default: its first document)")
    parser.add_argument("--run", action="store_true", help="start the runs that are missing, one after the other")
    parser.add_argument("--output", type=Path, help="folder of runs and results (default: the study's)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs to do, in this order (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="seeds to do (default: the study's)")
    parser.add_argument("--dry_run", action="store_true", help="check the configs and list the runs; write nothing")
    parser.add_argument("--report", action="store_true", help="write tables and figures of all results; run nothing")
    parser.add_argument("--rerun_changed", action="store_true", help="repeat runs whose config is no longer the same")
    options = parser.parse_args(argv)

    console = Console(soft_wrap=True, highlight=False)
    study = read_study(options.study, options.part)
    seeds = list(study.seeds) if options.seeds is None else options.seeds
    check_seeds(seeds, "--seeds")
    output, kept = study.output, study.kept
    if options.output is not None:
        output = kept = options.output / (options.part or "")
    if options.report:
        if options.only or options.seeds:
            raise ConfigError("--report shows all results. Leave out --only and --seeds.")
        report(study, [], output, kept, console)
        return
    starts = options.run or options.rerun_changed
    for folder in (output, kept) if starts else ():
        check_writable(folder)
    runs = [(run, seed) for seed in seeds for run in chosen(study, options.only)]
    jobs = list(read_jobs(study, runs, output, kept))
    refuse_shared(study, jobs)
    if options.dry_run:
        list_jobs(jobs, console)
        return
    refuse_changed(study, jobs, options.rerun_changed)
    failed = run_jobs(jobs, console) if starts else []
    missing = [job for job in jobs if job.result() is None]
    if len(missing) < len(jobs):
        with FolderLock(output).acquire(waits=True):
            discard_temporaries(kept)
            report(study, jobs, output, kept, console)
    if missing and not starts:
        list_jobs(missing, console)
        count = f"{len(missing)} run{'s' if len(missing) > 1 else ''}"
        console.print(f"Nothing was started. Add --run to start {count}, one after the other, in {output}.")
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(jobs)} runs failed: {', '.join(job.name for job in failed)}. The reason is at the "
            f"end of {failed[0].folder / 'log.txt'}; the same command tries them again."
        )


def chosen(study: Study, names: Sequence[str] | None) -> list[StudyRun]:
    """The runs with these names, in this order; by default all, in the study's."""
    unknown = [name for name in names or () if name not in study.runs]
    if unknown:
        raise ConfigError(f"{study.path} has no run {unknown[0]!r}; its runs are {', '.join(study.runs)}.")
    return [study.runs[name] for name in dict.fromkeys(study.runs if names is None else names)]


def list_jobs(jobs: Sequence[Job], console: Console) -> None:
    """Print each run's status: finished, started or to do."""
    for job in jobs:
        changed = job.differences()
        if changed:
            state = f"changed: {'; '.join(changed)}"
        elif job.result() is not None:
            state = "finished"
        else:
            checkpoint = job.checkpoint()
            state = "to do" if checkpoint is None else f"resumes from {checkpoint}"
        console.print(f"{job.name}: {state}")


def refuse_shared(study: Study, jobs: Sequence[Job]) -> None:
    """Refuse callbacks of two runs that write to one folder, where the last run would replace what the first wrote."""
    writers: dict[str, Job] = {}
    for job in jobs:
        for entry in entries(job.filled(job.settings["trainer"].get("callbacks"))):
            folder = (entry.get("init_args") or {}).get("dirpath")
            other = job if folder is None else writers.setdefault(folder, job)
            if other is not job:
                raise ConfigError(
                    f"{study.path}: {other.name} and {job.name} would write to one folder, {folder}, and the later one "
                    f"would replace what the other wrote. In dirpath of {class_name(entry)}, name "
                    "a folder inside {run}, or leave dirpath out."
                )


def refuse_changed(study: Study, jobs: Sequence[Job], rerun: bool) -> None:
    """Refuse to add to results and unfinished runs of another config, or delete them if ``rerun``."""
    for job in jobs:
        differences = job.differences()
        if differences and not rerun:
            raise ConfigError(
                f"{job.name} in {job.output} was made with another config: {'; '.join(differences[:5])}. Undo the "
                f"change in {study.path} or its configs, choose another --output, pass --rerun_changed to repeat it, "
                "or --report to see it."
            )
        if differences:
            with FolderLock(job.folder).acquire(waits=False):
                job.forget()


def run_jobs(jobs: Sequence[Job], console: Console) -> list[Job]:
    """Do the runs without a result that no other process is doing, one by one; returns those that failed."""
    failed = []
    for number, job in enumerate(jobs, start=1):
        count = f"{number}/{len(jobs)} {job.name}"
        if job.result() is not None:
            console.print(f"{count}: finished before")
            continue
        lock = FolderLock(job.folder)
        if not lock.try_acquire():
            console.print(f"{count}: another process is doing it")
            continue
        with lock:
            if job.result() is None:  # another process may have finished it meanwhile
                failed += [] if run_job(job, count, console) else [job]
    return failed


def run_job(job: Job, count: str, console: Console) -> bool:
    """Do one run in its own process, and return whether it has a result now."""
    job.discard_leftovers()
    checkpoint, log = job.checkpoint(), job.folder / "log.txt"
    console.print(f"{count}: log in {log}{'' if checkpoint is None else f', resumes from {checkpoint.name}'}")
    order = {
        "name": job.name,
        "seed": job.seed,
        "draws": draws.VERSION,
        "evaluate": job.filled(list(job.evaluators)),
        "digest": job.digest,
        "identity": job.identity,
        "files": job.files,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "result": str(job.result_path),
    }
    atomic_write(job.folder / "config.yaml", yaml.safe_dump(job.filled(job.settings), sort_keys=False).encode())
    atomic_write(job.folder / "job.json", (json.dumps(order, indent=1) + "\n").encode())
    status = start_process(job.folder)
    result = job.result()
    if result is None:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        console.print(f"{count}: failed with exit status {status}; {lines[-1] if lines else 'no word'}")
        return False
    console.print(f"{count}: {result['steps']:,} steps in {result['fit_seconds']:.0f} s")
    return True


def start_process(folder: Path) -> int:
    """Do a run in its own process, which frees its memory and isolates crashes; returns its exit status.

    The run's standard input is a pipe without content. When this process ends in any way, the pipe closes, and the run
    saves and stops: see :func:`~lightning_difftune.cli.compare.work.stop_with_parent`.
    """
    command = [sys.executable, "-m", "lightning_difftune.cli.compare.work", str(folder)]
    with (
        open(folder / "log.txt", "a") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT) as run,
    ):
        return run.wait()


def report(study: Study, jobs: Sequence[Job], output: Path, kept: Path, console: Console) -> None:
    """Write tables and figures of all existing results, not only of ``jobs``, and print the table."""
    results: list[tuple[StudyRun, Mapping[str, Any]]] = []
    grids: dict[str, Path] = {}  # of each run's first seed
    composed = [(job.run, job.seed) for job in jobs]
    others = [run for run in finished_runs(study, kept) if run not in composed]
    for job in sorted([*jobs, *read_jobs(study, others, output, kept)], key=lambda job: job.seed):
        result = job.result()
        if result is not None:
            results.append((job.run, result))
            grids.setdefault(job.run.name, job.grid_path)
            if differences := job.differences():
                console.print(f"{job.name} was made with another config: {'; '.join(differences)}")
    if not results:
        raise ConfigError(f"{kept / 'results'} has no result of {study.path} to report.")
    of = len(study.runs) * len({*study.seeds, *(result["seed"] for _, result in results)})
    console.print(f"{len(results)} of {of} results in {kept / 'results'}")
    for said in (machines(result for _, result in results), other_pictures(result for _, result in results)):
        if said:
            console.print(said)
    lines = comparison(study, results)
    write_tables(study, lines, kept, console)
    draw_figures(study, lines, output / "figures")
    if all(path.is_file() for path in grids.values()):  # grids of kept results may be on another machine
        atomic_write(kept / "samples.png", contact_sheet({name: grids[name] for name in study.runs if name in grids}))
    console.print(f"Tables {kept / 'table.csv'}, {kept / 'table.md'}; figures in {output / 'figures'}")
