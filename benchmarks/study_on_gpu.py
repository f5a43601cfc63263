"""The runs of a study on one GPU within a number of seconds, several at a time, in its order or that of ``--only``.

    python benchmarks/study_on_gpu.py configs/studies/photos32.yaml --seconds 400 --archive photos32.tar.gz

A run of a small model leaves a large GPU idle most of the time, so several processes share it. The archive has the
results and samples of the finished runs, and is rewritten after each of them. ``difftune compare`` with the same study
file does the remaining runs, there or elsewhere.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path

from rich.console import Console

from lightning_difftune.cli.compare import chosen, run_jobs
from lightning_difftune.cli.compare.jobs import Job, read_jobs
from lightning_difftune.cli.compare.study import StudyRun, read_study


def in_order(runs: list[StudyRun], seeds: list[int], first: int) -> list[tuple[StudyRun, int]]:
    """The first runs with all seeds, then the others with the first seed, then these with the other seeds."""
    pairs = [(run, seed) for seed in seeds for run in runs[:first]]
    return pairs + [(run, seed) for seed in seeds for run in runs[first:]]


def work(jobs: list[Job]) -> None:
    """Do runs that no other process is doing, as the leader of a process group that is stopped as one."""
    os.setpgrp()
    run_jobs(jobs, Console(soft_wrap=True, highlight=False))


def write_archive(path: Path, jobs: list[Job]) -> None:
    """Results, samples and logs of the runs so far."""
    part = path.with_name(f".{path.name}")
    with tarfile.open(part, "w:gz") as archive:
        for job in jobs:
            for file in (job.result_path, job.grid_path, job.folder / "log.txt"):
                if file.is_file():
                    archive.add(file)
    part.replace(path)


def main() -> None:
    """Start the processes, watch them, and stop them when the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seconds", type=float, default=400.0, help="time for everything")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--first", type=int, default=2, help="runs to do with all seeds before the others")
    parser.add_argument("--only", nargs="+", help="names of runs, in this order (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds (default: those of the study)")
    parser.add_argument("--archive", type=Path, default=Path("study.tar.gz"))
    options = parser.parse_args()
    end = time.monotonic() + options.seconds

    study = read_study(options.study)
    pairs = in_order(chosen(study, options.only), options.seeds or list(study.seeds), options.first)
    jobs = list(read_jobs(study, pairs, study.output, study.kept))
    print(f"{len(jobs)} runs, {options.processes} at a time, {options.seconds:.0f} s")
    workers = [multiprocessing.get_context("fork").Process(target=work, args=(jobs,)) for _ in range(options.processes)]
    for worker in workers:
        worker.start()
    finished = -1
    while time.monotonic() < end and any(worker.is_alive() for worker in workers):
        time.sleep(1)
        if (count := sum(job.result_path.is_file() for job in jobs)) != finished:
            finished = count
            print(f"{count} of {len(jobs)} are finished, {end - time.monotonic():.0f} s are left", flush=True)
            write_archive(options.archive, jobs)
    for worker in workers:
        if worker.is_alive() and worker.pid is not None:
            os.killpg(worker.pid, signal.SIGKILL)  # a run that is resumed starts from its last checkpoint
    for worker in workers:
        worker.join()
    write_archive(options.archive, jobs)


if __name__ == "__main__":
    main()
