"""What a run was, in words."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from lightning_difftune.cli.run import Run


def title(run: Run) -> str:
    """What was tuned to what."""
    base, target = _base(run), _target(run)
    if base and target:
        return f"{base} tuned on {target}"
    return f"Run {run.path.resolve().name}"


def summary(run: Run) -> str:
    """The paragraph at the top: what was trained how, how far it came, and how good it is."""
    return " ".join(filter(None, (_recipe(run), _progress(run), *_results(run))))


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """Names and values of when and where the run was."""
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
    rows = [
        ("Started", str(facts.get("started", "unknown"))),
        ("Last log", run.last_written.isoformat(timespec="seconds")),
        ("Duration", _duration(run)),
        ("Device", f"{facts.get('hardware', 'unknown')}, {processes} process{'es' if processes != 1 else ''}"),
        ("Threads", str(threads) if threads else ""),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        (
            "Commit",
            f"{git['commit']}{', with changes' if git.get('changed') else ''}" if git else "no repository",
        ),
        ("Command", " ".join(map(str, facts.get("command", [])))),
        ("Seed", str(run.setting("seed_everything"))),
    ]
    return [(name, value) for name, value in rows if value]


def _base(run: Run) -> str:
    model = run.setting("model", "init_args", "model")
    return str(model) if isinstance(model, str) else ""


def _target(run: Run) -> str:
    """The data set's class and folder; the data set inside it where it is a part or a view of another."""
    source: Any = run.setting("data", "init_args", "target")
    while isinstance(source, dict) and isinstance(inner := (source.get("init_args") or {}).get("source"), dict):
        source = inner
    if not isinstance(source, dict) or "class_path" not in source:
        return ""
    root = (source.get("init_args") or {}).get("root")
    return source["class_path"].rpartition(".")[2] + (f" {root}" if root else "")


def _recipe(run: Run) -> str:
    data = run.setting("data", "init_args") or {}
    schedule = run.setting("model", "init_args", "objective", "init_args", "schedule") or {}
    tuner = run.setting("model", "init_args", "tuner") or {}
    if not data.get("batch_size"):
        return ""
    share = int((data.get("retention_share") or 0) * data["batch_size"]) if data.get("bank") else 0
    name = str(schedule.get("class_path", "")).rpartition(".")[2]
    tau = (schedule.get("init_args") or {}).get("tau")
    counts = run.environment.get("class_counts") or {}
    network = str(tuner.get("class_path", "")).rpartition(".")[2]
    method = f"Diff-Tuning of {network or 'all weights'}" if share else network or "Full fine-tuning"
    target = f"{sum(counts.values()):,} pictures of {len(counts)} classes, in " if counts else ""
    return (
        f"{method} on {target}batches of {data['batch_size']}"
        + (f", {share} of them from the memory bank" if share else "")
        + (f"; schedule {name}" if name else "")
        + (f", tau {tau:g}" if isinstance(tau, int | float) else "")
        + "."
    )


def _progress(run: Run) -> str:
    if not run.last_step:
        return "No training step was logged."
    if run.max_steps is None:
        return f"The logs go to step {run.last_step:,}."
    if run.stopped_early:
        return f"It stopped at step {run.last_step:,} of {run.max_steps:,}, or is still running."
    return f"It ran all of its {run.max_steps:,} steps."


def _results(run: Run) -> list[str]:
    results = []
    for name, higher in run.scores.items():
        if series := run.finite(name):
            step, best = (max if higher else min)(series, key=lambda point: point[1])
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


def _duration(run: Run) -> str:
    try:
        seconds = (run.last_written - datetime.fromisoformat(str(run.environment.get("started")))).total_seconds()
    except (ValueError, TypeError):
        return ""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min {rest % 60} s" if seconds >= 0 else ""
