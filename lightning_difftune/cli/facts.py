"""A run in words: its task, progress and quality, and the next commands."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_difftune.cli.run import Run, class_name
from lightning_difftune.cli.run_files import Series
from lightning_difftune.data.batches import retained_samples
from lightning_difftune.errors import DiffTuneError


def title(run: Run) -> str:
    """The model and its target."""
    base, target = run.setting("model", "init_args", "model"), _target(run)
    if isinstance(base, str) and base and target:
        return f"{base} tuned on {target}"
    return f"Run {run.path.resolve().name}"


def summary(run: Run) -> str:
    """The paragraph at the top: the training, its progress and its quality."""
    return " ".join(filter(None, (_recipe(run), _progress(run), *_results(run))))


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """Names and values of the run's time and environment."""
    facts = run.environment
    first = run.config_text.partition("\n")[0]
    if not facts:
        known = [("Lightning", first.partition("==")[2])] if first.startswith("# lightning") else []
        return [
            *known,
            ("Last log", f"{run.last_written:%Y-%m-%d %H:%M %Z}"),
            ("Else", "not recorded: the folder has no environment.json"),
        ]
    git, processes, threads = facts.get("git"), facts.get("processes", 1), facts.get("threads")
    versions: dict[str, str] = facts.get("versions") or {}
    commit = f"{git['commit']}{', with changes' if git.get('changed') else ''}" if git else "no repository"
    rows = [
        ("Started", str(facts.get("started", "unknown"))),
        ("Last log", run.last_written.isoformat(timespec="seconds")),
        ("Duration", _duration(run)),
        ("Device", f"{facts.get('hardware', 'unknown')}, {processes} process{'es' if processes != 1 else ''}"),
        ("Threads", str(threads) if threads else ""),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Commit", commit),
        ("Command", " ".join(map(str, facts.get("command", [])))),
        ("Seed", str(run.setting("seed_everything"))),
    ]
    return [(name, value) for name, value in rows if value]


def _target(run: Run) -> str:
    """The data set's class and folder; of a part or view, those of the data set inside."""
    source: Any = run.setting("data", "init_args", "target")
    while isinstance(source, dict) and isinstance(inner := (source.get("init_args") or {}).get("source"), dict):
        source = inner
    name = class_name(source)
    root = (source.get("init_args") or {}).get("root") if name else None
    return f"{name} {root}" if root else name


def _recipe(run: Run) -> str:
    data = run.setting("data", "init_args") or {}
    schedule = run.setting("model", "init_args", "objective", "init_args", "schedule") or {}
    if not data.get("batch_size"):
        return ""
    share = retained_samples(data.get("retention_share") or 0, data["batch_size"]) if data.get("bank") else 0
    if "train/loss" in run.metrics and "train/retention" not in run.metrics:
        share = 0  # a bank that tau = 0 leaves alone
    name, network = class_name(schedule), class_name(run.setting("model", "init_args", "tuner"))
    tau = (schedule.get("init_args") or {}).get("tau")
    counts = run.environment.get("class_counts") or {}
    method = f"Diff-Tuning of {network or 'all weights'}" if share else network or "Full fine-tuning"
    classes = sum(count > 0 for count in counts.values())
    target = f"{sum(counts.values()):,} pictures of {classes} classes, in " if counts else ""
    return (
        f"{method} on {target}batches of {data['batch_size']}"
        + (f", {share} of them from the memory bank" if share else "")
        + run.step_words.replace(" on", ", on", 1)
        + (f"; schedule {name}" if name else "")
        + (f", tau {tau:g}" if isinstance(tau, int | float) else "")
        + "."
    )


def _progress(run: Run) -> str:
    if not run.last_step:
        return "No training step was logged."
    resumed = (
        f" It was resumed, and its logs and all that is said here of its course begin at step {run.first_step:,}."
        if run.first_step > run.log_interval
        else ""
    )
    if run.max_steps is None:
        return f"The logs go to step {run.last_step:,}.{resumed}"
    if run.stopped_early:
        return f"It stopped at step {run.last_step:,} of {run.max_steps:,}, or is still running.{resumed}"
    return f"It ran all of its {run.max_steps:,} steps.{resumed}"


def _results(run: Run) -> list[str]:
    results = []
    for name, higher in run.scores.items():
        if series := run.finite(name):
            step, best = best_of(series, higher)
            better = "higher" if higher else "lower"
            results.append(
                f"{name} ({better} is better) went from {series[0][1]:.4g} to {series[-1][1]:.4g}, "
                + ("its best." if best == series[-1][1] else f"with its best, {best:.4g}, at step {step:,}.")
            )
    if converged := run.finite("sudden_convergence/step"):
        results.append(f"It converged suddenly at step {converged[-1][1]:,.0f}.")
    elif leap := run.finite("sudden_convergence/leap"):
        start, end = (run.finite(f"sudden_convergence/leap_{side}_step")[-1][1] for side in ("start", "end"))
        results.append(f"Its largest leap is {leap[-1][1]:.4g}, from step {start:,.0f} to {end:,.0f}.")
    if "fid" not in run.metrics and any(name.startswith("fd_") for name in run.metrics):
        results.append("A Fréchet distance through another network than Inception compares with no published FID.")
    return results


def best_of(series: Series, higher: bool) -> tuple[int, float]:
    """Step and value of the first best value of a series."""
    return (max if higher else min)(series, key=lambda point: point[1])


def _duration(run: Run) -> str:
    try:
        seconds = (run.last_written - datetime.fromisoformat(str(run.environment.get("started")))).total_seconds()
    except (ValueError, TypeError):
        return ""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min {rest % 60} s" if seconds >= 0 else ""


def name_of(run: Run) -> str:
    """The shortest path of a run: its ``default_root_dir`` if that leads to this launch."""
    root = run.setting("trainer", "default_root_dir")
    try:
        if root and Run.find(root).path.resolve() == run.path.resolve():
            return shlex.quote(str(root))
    except DiffTuneError:  # the run was moved, or the working directory is another one
        pass
    return shlex.quote(str(run.path))


def sample_command(run: Run) -> str:
    """The command to sample from a run: with a class name if there is one, with a picture for a ControlNet."""
    asked = ""
    if run.class_names:
        asked = f" --classes {shlex.quote(run.class_names[0])}"
    elif run.setting("model", "init_args", "annotator") is not None:
        asked = " --controls PICTURE.jpg"
    return f"difftune sample {name_of(run)}{asked}"


def export_command(run: Run) -> str:
    """The command to export a run's model."""
    return f"difftune export {name_of(run)} --output my-model"


def after_fit(trainer: Any) -> str:
    """The results of ``difftune fit``: run folder, checkpoint, latest scores, pictures, and the next commands."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    run, resumed = Run(folder), str(trainer.ckpt_path or "")
    if run.checkpoint is None and Path(resumed).is_file():
        before = Run.find(resumed)
        if before.step == trainer.global_step:
            again = f"difftune fit {name_of(before)} --trainer.max_steps {2 * trainer.global_step}"
            return f"Nothing was left to train: {resumed} is of the last step. To train more: {again}"
    told = [name for name in run.metrics if name in run.scores or name == "val/loss"]
    latest = [f"{name} {series[-1][1]:.4g}" for name in told if (series := run.finite(name))]
    pictures = [str(grids[max(grids)]) for grids in run.grids.values()]
    checkpoint = str(run.checkpoint)
    if run.checkpoint is None:
        callbacks = trainer.checkpoint_callbacks
        saved = [path for callback in callbacks if (path := callback.last_model_path or callback.best_model_path)]
        nothing = "no new one" if callbacks else "none: the config has no ModelCheckpoint"
        checkpoint = saved[0] if saved else nothing
    rows = [
        ("Run", f"{folder}, {trainer.global_step:,} steps"),
        ("Checkpoint", checkpoint),
        ("Metrics", f"{folder / 'metrics.csv'}: {', '.join(latest) or 'losses alone'}"),
        *(("Pictures", picture) for picture in pictures),
        ("Next", f"difftune report {name_of(run)}"),
    ]
    if run.checkpoint is not None:
        rows += [("", sample_command(run)), ("", export_command(run))]
    return "\n".join(f"{name:<12}{value}" for name, value in rows)
