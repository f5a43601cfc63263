"""The table of a study: mean and spread over seeds, with and without Diff-Tuning."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_difftune.cli.compare.study import Study, StudyRun
from lightning_difftune.errors import ConfigError
from lightning_difftune.files import atomic_write
from lightning_difftune.plots import rounded

EWC = ("ewc/total", "ewc/mean")  # shown if a run has them
WORDS = ("run", "method", "group")  # text columns; the others are numbers


@dataclass(frozen=True)
class Line:
    """One run of a study, over its seeds."""

    run: StudyRun  # the entry of the study file
    seeds: tuple[int, ...]  # the finished seeds
    values: Mapping[str, tuple[float, ...]]  # final values by metric, one per seed
    history: Mapping[str, tuple[Sequence[tuple[int, float]], ...]]  # curves by metric, one per seed
    parameters: int  # trainable parameters
    seconds: tuple[float, ...]  # seconds of each fit
    converged: Mapping[str, tuple[int | None, ...]]  # steps by monitor and threshold, one per seed
    change: float | None = None  # of the main metric, relative to the reference run, over common seeds
    best: tuple[float, ...] = ()  # the main metric at each seed's best validation, if there are several
    best_change: float | None = None  # the change of `best`


def comparison(study: Study, results: Sequence[tuple[StudyRun, Mapping[str, Any]]]) -> list[Line]:
    """Gather results into one line per run, in the study's order."""
    by_run: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for run, result in results:
        missing = [name for name in study.metrics if name not in result["values"]]
        if missing:
            raise ConfigError(
                f"{study.path}: metrics names {missing[0]!r}, which {result['name']} does not have; it has "
                f"{', '.join(result['values'])}."
            )
        by_run[run.name].append(result)
    main, better = next(iter(study.metrics.items()))
    best = min if better == "lower" else max
    lines = {name: line_of(run, by_run[name]) for name, run in study.runs.items() if name in by_run}
    for name, line in lines.items():
        curves = line.history.get(main, ())
        if curves and all(len(curve) > 1 for curve in curves):
            measured = [[value for _, value in curve if math.isfinite(value)] for curve in curves]
            lines[name] = replace(line, best=tuple(best(values, default=math.nan) for values in measured))
    return [with_changes(line, lines.get(line.run.against or ""), main) for line in lines.values()]


def machines(results: Iterable[Mapping[str, Any]]) -> str:
    """A note on results of different hardware or versions, whose differences are not those of their settings alone."""
    made: dict[str, list[str]] = defaultdict(list)
    for result in results:
        versions = [f"{name} {result.get('versions', {}).get(name)}" for name in ("torch", "lightning_difftune")]
        made[", ".join([str(result.get("hardware")), *versions])].append(result["name"])
    groups = [f"{where} ({few(names)})" for where, names in made.items()]
    note = "Results are of different hardware or versions; a change between them is not of the settings alone: "
    return "" if len(groups) < 2 else f"{note}{'; '.join(groups)}."


def other_pictures(results: Iterable[Mapping[str, Any]]) -> str:
    """A note on results whose settings name the same data, which had other pictures in between."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        if pictures := result.get("pictures"):  # older results do not have them
            data = result["identity"]["settings"].get("data", {}).get("init_args", {})
            named = json.dumps([data.get("target"), data.get("val_target")]).replace("{seed}", str(result["seed"]))
            found[named][json.dumps(pictures)].append(result["name"])
    for groups in found.values():
        if len(groups) > 1:
            counts = [f"{json.loads(made).get('pictures')} ({few(names)})" for made, names in groups.items()]
            return (
                "Runs whose settings name the same pictures had others, by their number or by names, sizes and times "
                f"of files; a change between them is not of the settings alone: {', '.join(counts)}."
            )
    return ""


def few(names: Sequence[str]) -> str:
    """The first three names."""
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def line_of(run: StudyRun, results: Sequence[Mapping[str, Any]]) -> Line:
    """The line of one run."""
    shared = [name for name in results[0]["values"] if all(name in result["values"] for result in results)]
    curves = [name for name in shared if all(name in result["history"] for result in results)]
    return Line(
        run=run,
        seeds=tuple(result["seed"] for result in results),
        values={name: tuple(result["values"][name] for result in results) for name in shared},
        history={name: tuple(result["history"][name] for result in results) for name in curves},
        parameters=results[0]["trainable_parameters"],
        seconds=tuple(result["fit_seconds"] for result in results),
        converged=convergence(results),
    )


def convergence(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int | None, ...]]:
    """The step at which each :class:`~lightning_difftune.callbacks.SuddenConvergence` passed its threshold."""
    steps = [
        {f"{seen['monitor']} at {seen['threshold']:g}": seen["step"] for seen in found if seen["threshold"] is not None}
        for found in (result["sudden_convergence"] for result in results)
    ]
    return {name: tuple(found[name] for found in steps) for name in steps[0] if all(name in found for found in steps)}


def with_changes(line: Line, before: Line | None, metric: str) -> Line:
    """The line with the relative changes of a metric's mean and best values, over the seeds of both lines."""
    if before is None:
        return line
    changes = []
    for olds, news in ((before.values[metric], line.values[metric]), (before.best, line.best)):
        starts, ends = dict(zip(before.seeds, olds, strict=False)), dict(zip(line.seeds, news, strict=False))
        shared = starts.keys() & ends.keys()
        total = sum(starts[seed] for seed in shared)
        changes.append(relative(sum(ends[seed] for seed in shared), total) if total else None)
    return replace(line, change=changes[0], best_change=changes[1])


def relative(end: float, start: float) -> float:
    """The change from ``start`` as a share of its size: above 0 is higher, also of negative values.

    Example:
        >>> relative(3.0, 4.0), relative(-3.0, -4.0)
        (-0.25, 0.25)
    """
    return (end - start) / abs(start)


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds; ``None`` for a single one."""
    return statistics.stdev(values) if len(values) > 1 else None


def shown(values: Sequence[float]) -> str:
    """Mean and spread, with four and two digits, or all digits before the point."""
    deviation = spread(values)
    return rounded(statistics.fmean(values), 4) + ("" if deviation is None else f" ± {rounded(deviation, 2)}")


def thresholds_of(lines: Sequence[Line]) -> list[str]:
    """The monitors and thresholds of all runs."""
    return list(dict.fromkeys(name for line in lines for name in line.converged))


def steps(reached: Sequence[int | None]) -> list[str]:
    """The step of each seed in words."""
    return ["not reached" if step is None else f"{step:,}" for step in reached]


def cells(study: Study, lines: Sequence[Line]) -> list[list[str]]:
    """The readable table, headings first, without columns that are empty or repeat the run's name."""
    arrows = {"lower": "↓", "higher": "↑"}
    metrics = [f"{name} {arrows[better]}" for name, better in study.metrics.items()]
    thresholds = thresholds_of(lines)
    reached = [f"{name}: step" for name in thresholds]
    best = ["best over the steps", "change of the best"]
    rows = [["run", "method", "group", *metrics, "change", *best, *reached, *EWC, "trainable", "seconds", "seeds"]]
    rows += [
        [
            line.run.name,
            "" if all(other.run.method == other.run.name for other in lines) else line.run.method,
            line.run.group,
            *(shown(line.values[name]) for name in study.metrics),
            "" if line.change is None else f"{line.change:+.1%}",
            shown(line.best) if line.best else "",
            "" if line.best_change is None else f"{line.best_change:+.1%}",
            *(" / ".join(steps(line.converged.get(name, ()))) for name in thresholds),
            *(shown(line.values[name]) if name in line.values else "" for name in EWC),
            f"{line.parameters:,}",
            shown(line.seconds),
            ", ".join(map(str, line.seeds)),
        ]
        for line in lines
    ]
    return [list(row) for row in zip(*(column for column in zip(*rows, strict=True) if any(column[1:])), strict=True)]


def csv_text(study: Study, lines: Sequence[Line]) -> str:
    """Every number in full, one row per run."""
    names = [*study.metrics, *(name for name in EWC if any(name in line.values for line in lines))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    thresholds = thresholds_of(lines)
    columns = [f"{name} {what}" for name in names for what in ("mean", "std")]
    columns += ["change", "best mean", "best change", *(f"{name} steps" for name in thresholds)]
    writer.writerow(["run", "method", "group", *columns, "trainable_parameters", "seconds", "seeds"])
    for line in lines:
        row: list[Any] = [line.run.name, line.run.method, line.run.group]
        for name in names:
            values = line.values.get(name)
            row += ["", ""] if values is None else [statistics.fmean(values), spread(values)]
        row += [line.change, statistics.fmean(line.best) if line.best else None, line.best_change]
        row += [" ".join(map(str, line.converged.get(name, ()))) for name in thresholds]
        seconds = statistics.fmean(line.seconds)
        writer.writerow([*row, line.parameters, seconds, " ".join(map(str, line.seeds))])
    return text.getvalue()


def markdown(study: Study, lines: Sequence[Line]) -> str:
    """The table for a README."""
    heads, *rows = cells(study, lines)
    rules = ["---" if head in WORDS else "---:" for head in heads]
    rows = [heads, rules, *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def write_tables(study: Study, lines: Sequence[Line], output: Path, console: Console) -> None:
    """Write ``table.csv`` and ``table.md``, and print the table."""
    atomic_write(output / "table.csv", csv_text(study, lines).encode())
    atomic_write(output / "table.md", markdown(study, lines).encode())
    table = Table(title=study.title, title_justify="left")
    heads, *rows = cells(study, lines)
    for head in heads:
        table.add_column(head, justify="left" if head in WORDS else "right")
    for row in rows:
        table.add_row(*row)
    if not console.is_terminal:  # logs have no width
        console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
    pairs = {line.run.against for line in lines if line.change is not None}
    if pairs:
        console.print(f"change: of {next(iter(study.metrics))}, against {', '.join(sorted(map(str, pairs)))}.")
